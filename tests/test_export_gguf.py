"""GGUF files: what is in them is ours, and llama.cpp, where it is installed, computes the same."""

import logging
import sys

import numpy as np
import pytest
import tiny
from hf_folders import assert_complains, edit, lte_folder
from hf_models import CASES, config_json, read_tensors, write_folder
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import lte_jax
from lte_jax import data, export_gguf
from lte_jax.cli import main
from lte_jax.export_gguf import vocabulary

RUN = [  # the cases of hf_models.py that llama.cpp has
    *("llama", "grouped_query", "multi_query", "llama3_rope", "linear_rope", "yarn", "tied"),
    *("attention_bias", "mlp_bias", "head_dim", "mistral_full", "qwen2", "qwen3"),
]
# Name in llama.cpp -> in a folder; "rows" of these are put in another order.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces,\n\n\ttabs; and 1234567 digits: 3.14 x10",
    "It's what they'd've SAID'LL \"quoted\" (or not)...",
    "naïve café, ÅÄÖ — 東京 ру́сский 😀!",
    "<s> is text </s>",
    "",
]


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf", reason="needs gguf (the extra `gguf`) to read files back")


@pytest.fixture(scope="module")
def llama_cpp(gguf):
    found = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, to run the files")
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return found


def written(folder, out, tokenizer=None, **settings):
    """Exports a folder; returns the model, its parameters and the file."""
    model, params = lte_jax.load(folder)
    export_gguf.export(out, model, params, tokenizer, **settings)
    return model, params, out


def halves(values, heads):
    """What the interleaving undoes: a head's even rows, then its odd ones."""
    rows = values.reshape(heads, -1, *values.shape[1:])
    return np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).reshape(values.shape)


def read_back(gguf, file, config, interleaved):
    """Name in a folder -> values in the file, as a folder has them, in the file's types."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        *block, name, kind = tensor.name.split(".")
        values = np.asarray(tensor.data)
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            values = values.view("bfloat16")
        if interleaved and name in heads:
            values = halves(values, heads[name])
        layer = f"model.layers.{block[1]}." if block else ""
        found[f"{layer}{NAMES.get(name, name)}.{kind}"] = values
    return found


# ---------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("case", RUN)
def test_the_tensors_are_those_of_the_folder(case, gguf, tmp_path):
    folder = write_folder(tmp_path / "model", config_json(case), dtype="float32")
    model, _, file = written(folder, tmp_path / "model.gguf")
    found = read_back(gguf, file, model.config, not case.startswith("qwen"))
    stretch = found.pop("rope_freqs.weight", None)
    assert (stretch is not None) == (model.config.rope_scaling is not None)
    expected = read_tensors(folder)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32 and found[name].tobytes() == values.tobytes(), name


def test_waves_are_stretched_as_much_as_ours(gguf, tmp_path):
    """Llama 3: short waves stay, long ones grow by the factor, those between by less."""
    folder = write_folder(tmp_path / "model", config_json("llama3_rope"))
    _, _, file = written(folder, tmp_path / "model.gguf")
    [stretch] = [t.data for t in gguf.GGUFReader(file).tensors if t.name == "rope_freqs.weight"]
    assert stretch[0] == 1 and stretch[-1] == pytest.approx(8) and (np.diff(stretch) >= 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_take_the_dtype_and_norms_stay_float32(dtype, gguf, tmp_path):
    folder = write_folder(tmp_path / "model", config_json("attention_bias"), dtype="float32")
    model, _, file = written(folder, tmp_path / "model.gguf", dtype=dtype)
    found = read_back(gguf, file, model.config, True)
    for name, values in read_tensors(folder).items():
        expected = values if values.ndim == 1 else values.astype(dtype)
        assert found[name].dtype == expected.dtype, name
        assert found[name].tobytes() == expected.tobytes(), name


def test_the_keys_are_those_of_the_config(gguf, tmp_path):
    raw = config_json("head_dim", head_dim=16, rope_theta=5e5, num_key_value_heads=2)
    _, _, file = written(write_folder(tmp_path / "m", raw), tmp_path / "m.gguf", name="mine")
    fields = gguf.GGUFReader(file).fields
    read = {name.removeprefix("llama."): field.contents() for name, field in fields.items()}
    expected = {"block_count": 3, "embedding_length": 64, "feed_forward_length": 96}
    expected |= {"attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 256}
    expected |= {"attention.key_length": 16, "rope.dimension_count": 16, "rope.freq_base": 5e5}
    expected |= {"vocab_size": 97, "general.name": "mine", "general.architecture": "llama"}
    assert {name: read[name] for name in expected} == expected
    assert read["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert read["tokenizer.ggml.model"] == "no_vocab"


# ------------------------------------------------------------------------------------- tokenizers


def learned(cut, normalizer=None, **options):
    """Byte-level BPE of a few texts, which cuts them by `cut` first."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", split_special_tokens=True
    )


def by_words(digits):
    words = pre_tokenizers.Split(Regex(vocabulary._WORDS % digits), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
)
TOKENIZERS = {
    "bytes": data.byte_tokenizer,
    "gpt-2": lambda: data.learned_tokenizer(TEXTS * 4, 400),
    "smollm": lambda: learned(DIGITS),
    "llama-bpe": lambda: learned(by_words("{1,3}"), ignore_merges=True),
    "qwen2": lambda: learned(by_words(""), normalizers.NFC()),
}


def with_vocabulary(folder, tokenizer):
    """A random model of that tokenizer's size."""
    size = len(tokenizer) + 3
    write_folder(folder, config_json("llama", vocab_size=size, num_hidden_layers=1))
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_level_tokenizers(name, gguf, tmp_path):
    tokenizer = TOKENIZERS[name]()
    folder = with_vocabulary(tmp_path / "model", tokenizer)
    _, _, file = written(folder, tmp_path / "model.gguf", tokenizer)
    fields = gguf.GGUFReader(file).fields
    read = {k.removeprefix("tokenizer.ggml."): field.contents() for k, field in fields.items()}
    assert (read["model"], read["pre"]) == ("gpt2", "gpt-2" if name == "bytes" else name)
    ids = tokenizer.get_vocab()
    assert read["tokens"][:-3] == sorted(ids, key=ids.get) and read["tokens"][-1].startswith("[PAD")
    kinds = gguf.TokenType
    assert read["token_type"][ids["<s>"]] == kinds.CONTROL
    assert read["token_type"][-1] == kinds.UNUSED and read["token_type"][100] == kinds.NORMAL
    assert read["add_bos_token"] == (name in ("bytes", "gpt-2"))
    begin = ids["<s>"] if read["add_bos_token"] else 1  # else config.json's, as the end is
    assert (read["bos_token_id"], read["eos_token_id"]) == (begin, 2)


def by_spaces(vocabulary_, merges, **parts):
    """BPE of whole texts, as SentencePiece's is; "</s>" is added."""
    made = Tokenizer(models.BPE(vocabulary_, merges))
    for name, part in parts.items():
        setattr(made, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def test_scores_rank_tokens_by_the_first_merge_that_makes_them(gguf, tmp_path):
    """That a later one, too, makes "abc" is no reason to prefer it less."""
    ids = {text: i for i, text in enumerate(("a", "b", "c", "▁", "bc", "abc", "ab"))}
    merges = [("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c")]
    tokenizer = by_spaces(ids, merges, normalizer=normalizers.Replace(" ", "▁"))
    folder = with_vocabulary(tmp_path / "model", tokenizer)
    _, _, file = written(folder, tmp_path / "model.gguf", tokenizer)
    fields = gguf.GGUFReader(file).fields
    scores = fields["tokenizer.ggml.scores"].contents()
    assert [scores[ids[text]] for text in ("bc", "abc", "ab")] == [0, -1, -2]
    assert scores[ids["a"]] == scores[-1] == -1e6  # no merge makes them
    assert not fields["tokenizer.ggml.add_space_prefix"].contents()


def test_a_real_tokenizer_of_scores(gguf, shared, tmp_path):
    folder = shared / "models/stories260k"
    tokenizer = lte_jax.load_tokenizer(folder)
    _, _, file = written(folder, tmp_path / "model.gguf", tokenizer)
    fields = gguf.GGUFReader(file).fields
    read = {k.removeprefix("tokenizer.ggml."): field.contents() for k, field in fields.items()}
    assert read["model"] == "llama" and read["add_space_prefix"] and read["add_bos_token"]
    scores = dict(zip(read["tokens"], read["scores"], strict=True))
    for text in TEXTS[:3]:
        whole = "▁" + text.replace(" ", "▁")
        known = "".join(c for c in whole if c in scores)  # others become bytes
        expected = tokenizer.backend_tokenizer.model.tokenize(known)
        assert vocabulary.merged(known, scores) == [token.value for token in expected]
    kinds = [read["token_type"][i] for i in (0, 1, 3, 300)]
    names = ("UNKNOWN", "CONTROL", "BYTE", "NORMAL")
    assert kinds == [gguf.TokenType[name] for name in names]


def test_of_equally_good_pairs_the_first_is_merged():
    scores = {"a": 0.0, "b": 0.0, "aa": -1.0, "ab": -0.5, "aab": -2.0}
    assert vocabulary.merged("aaaab", scores) == ["aa", "aab"]


# -------------------------------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize("case", RUN)
def test_llama_cpp_computes_the_same(case, llama_cpp, tmp_path):
    folder = write_folder(tmp_path / "model", config_json(case), dtype="float32")
    model, params, file = written(folder, tmp_path / "model.gguf")
    tokens = np.random.default_rng(0).integers(0, 97, 40).tolist()
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    settings = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1} | exact
    llama = llama_cpp.Llama(str(file), **settings)
    llama.eval(tokens)
    logits_LV = np.asarray(lte_jax.apply(model, params, [tokens]).logits[0])
    np.testing.assert_allclose(llama.scores[:40], logits_LV, atol=2e-4)


@pytest.mark.parametrize("name", [*TOKENIZERS, "babyllama", "stories260k"])
def test_llama_cpp_splits_texts_the_same(name, llama_cpp, request, tmp_path):
    if name in TOKENIZERS:
        tokenizer = TOKENIZERS[name]()
        folder = with_vocabulary(tmp_path / "model", tokenizer)
    else:
        folder = request.getfixturevalue("shared") / "models" / name
        tokenizer = lte_jax.load_tokenizer(folder)
    _, _, file = written(folder, tmp_path / "model.gguf", tokenizer)
    llama = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in TEXTS[:1] if name == "babyllama" else TEXTS[:-1]:  # it lacks some characters
        if name == "stories260k":
            text = text.replace("<s>", "").replace("</s>", "")  # tokens to it, text to llama.cpp
        assert llama.tokenize(text.encode()) == tokenizer(text)["input_ids"], text


def test_llama_cpp_writes_the_same(llama_cpp, shared, tmp_path):
    """20 tokens, the likeliest each time."""
    folder = shared / "models/babyllama"
    tokenizer = lte_jax.load_tokenizer(folder)
    model, params, file = written(folder, tmp_path / "model.gguf", tokenizer, dtype="float32")
    prompt = tokenizer("Once upon a time")["input_ids"]
    [expected] = lte_jax.generate(model, params, [prompt], max_new_tokens=20, eos_ids=())
    llama = llama_cpp.Llama(str(file), n_ctx=64, verbose=False, n_threads=1)
    assert llama.tokenize(b"Once upon a time") == prompt
    llama.eval(prompt)
    new = []
    for _ in range(20):
        new.append(llama.sample(temp=0.0))
        llama.eval(new[-1:])
    assert new == np.asarray(expected).tolist()


# --------------------------------------------------------------------------------------- mistakes


def test_the_command(gguf, tmp_path, capsys):
    tokenizer = TOKENIZERS["smollm"]()
    folder = with_vocabulary(tmp_path / "mine", tokenizer)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "mine.gguf"
    main(["export-gguf", str(folder), str(out), "--dtype=bfloat16"])
    assert capsys.readouterr().out == f"{out}: llama, {out.stat().st_size / 1e6:.1f} MB\n"
    fields = gguf.GGUFReader(out).fields
    assert fields["general.name"].contents() == "mine"
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    main(["export-gguf", str(folder), str(out), "--no-tokenizer"])  # over the older file
    assert "tokenizer.ggml.pre" not in gguf.GGUFReader(out).fields


def test_bad_input_models_without_a_gguf(gguf, tmp_path, capsys):
    def refused(case, *words, **changes):
        folder = write_folder(tmp_path / case, config_json(case, **changes))
        assert_complains(lambda: written(folder, tmp_path / "model.gguf"), *words)

    refused("gemma", "family='gemma' is not written as GGUF", "llama, mistral, qwen2, qwen3")
    refused("relu", "activation='relu' has no GGUF", "with 'silu'")
    refused("mistral", "sliding_window=8 has no GGUF", "max_position_embeddings=8")
    refused("qwen2_yarn", "rope_scaling has no GGUF with qwen2")
    refused("qwen2", "head_dim=32 has no GGUF", head_dim=32)
    written(  # a window as long as the context bounds nothing
        write_folder(tmp_path / "wide", config_json("mistral", sliding_window=256)),
        tmp_path / "wide.gguf",
    )
    folder = lte_folder(tmp_path / "lte")
    words = ("an LTE model has no GGUF", "lte-jax convert MODEL DENSE --dense")
    assert_complains(lambda: written(folder, tmp_path / "model.gguf"), *words)
    with pytest.raises(SystemExit):
        main(["export-gguf", str(folder), str(tmp_path / "model.gguf")])
    assert words[0] in capsys.readouterr().err
    assert not (tmp_path / "model.gguf").exists()


def test_bad_input_to_export(gguf, tmp_path, monkeypatch):
    model, params = tiny.model_and_params(lte=None)
    out = tmp_path / "model.gguf"

    def refused(*words, path=out, weights=params, **settings):
        assert_complains(lambda: export_gguf.export(path, model, weights, **settings), *words)

    refused("ends in .gguf", path=tmp_path / "model.safetensors")
    refused("did you mean 'bfloat16'", dtype="bfloat")
    large = params | {"embed": {"embedding": params["embed"]["embedding"] * 1e9}}
    refused("token_embd.weight", "float16 cannot hold", weights=large, dtype="float16")
    refused(
        "lm_head/kernel is missing", weights={k: v for k, v in params.items() if k != "lm_head"}
    )
    assert not list(tmp_path.iterdir())
    out.write_text("older")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    refused("model.gguf cannot be written (full)")
    assert out.read_text() == "older" and [*tmp_path.iterdir()] == [out]
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("gguf, which is not installed: pip install 'lte-jax[gguf]'")


def test_bad_input_tokenizers_without_a_gguf(gguf, tmp_path, caplog):
    def refused(tokenizer, *words, **changes):
        folder = with_vocabulary(tmp_path / "model", tokenizer)
        edit(folder, **changes)
        out = tmp_path / "model.gguf"
        assert_complains(lambda: written(folder, out, tokenizer), *words)
        assert not out.exists()

    pieces = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)]))
    pieces = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="a")
    refused(pieces, "its model is Unigram, not BPE", "--no-tokenizer")
    refused(learned(pre_tokenizers.ByteLevel(True)), "cuts texts by", "'add_prefix_space': True")
    refused(learned(by_words("{1,3}")), "as llama-bpe does, with ignore_merges=False")
    cut = pre_tokenizers.ByteLevel(False)
    refused(learned(cut, normalizers.Lowercase()), "its normalizer is Lowercase")
    vocabulary_ = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4, "▁": 5}
    unlike = by_spaces(vocabulary_, [("a", "b"), ("b", "a"), ("a", "ba")])
    refused(unlike, "merging by score splits", "of 1000 texts otherwise")
    spaces = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Lowercase()])
    refused(by_spaces(vocabulary_, [], normalizer=spaces), "its normalizer has", "Lowercase")
    endless = learned(cut)
    endless.eos_token = None
    refused(endless, "which token ends a text", "eos_token_id", eos_token_id=None)

    small = write_folder(tmp_path / "small", config_json("llama"))
    tokenizer = data.byte_tokenizer()
    assert_complains(
        lambda: written(small, tmp_path / "model.gguf", tokenizer),
        "the tokenizer's token ",
        "beyond the model's vocab_size=97",
    )


def test_every_case_of_a_written_family_is_run_or_refused(gguf, tmp_path):
    """None is written that llama.cpp is not asked to run above."""
    cases = [c for c, raw in CASES.items() if raw["model_type"] in export_gguf.FAMILIES]
    made = []
    for case in cases:
        folder = write_folder(tmp_path / case, config_json(case))
        try:
            written(folder, tmp_path / f"{case}.gguf")
            made.append(case)
        except lte_jax.UserError as error:
            assert "has no GGUF" in str(error)
    assert made == RUN
