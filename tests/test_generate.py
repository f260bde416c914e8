"""Generation: the cache changes nothing, sampling follows the distribution, streaming adds up."""

import functools
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from random_models import PROMPTS, make
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lte_jax import hf
from lte_jax.cli import main
from lte_jax.data import byte_tokenizer, tokenize
from lte_jax.errors import UserError
from lte_jax.generation import STREAM_CHUNK, Settings, decode, generate, generate_text
from lte_jax.model import Transformer


def by_full_forward(model, params, prompt, steps, routing=None):
    """Greedy decoding with no cache: the whole text anew for each token."""
    apply = jax.jit(
        lambda tokens, mask: model.apply({"params": params}, tokens, mask=mask, routing=routing)
    )
    ids = list(prompt)
    for _ in range(steps):
        tokens_1L = np.zeros((1, 64), np.int32)
        tokens_1L[0, : len(ids)] = ids
        logits_1LV = apply(tokens_1L, np.arange(64)[None] < len(ids)).logits
        ids.append(int(jnp.argmax(logits_1LV[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("variant", "routing"),
    [
        ("llama", "dense"),
        ("llama", "top_k"),
        ("llama", "hard"),
        ("sliding", "hard"),
    ],
)
def test_equals_repeated_full_forward(variant, routing):
    model, params = make(variant)
    new = generate(model, params, PROMPTS[:1], max_new_tokens=20, routing=routing)
    expected = by_full_forward(model, params, PROMPTS[0], 20, routing)
    assert new == [expected]
    assert len(set(expected)) >= 3  # else anything would pass


def test_routing_matters():
    """Hard and dense decoding differ, so the comparisons above compare something."""
    model, params = make()
    texts = [
        generate(model, params, PROMPTS, max_new_tokens=20, routing=r) for r in ("dense", "hard")
    ]
    assert texts[0] != texts[1]
    assert texts[0] == generate(
        model, params, PROMPTS, max_new_tokens=20, threshold=0.0, routing="hard"
    )


@pytest.mark.parametrize("routing", ["dense", "hard"])
def test_ragged_batch_equals_each_alone(routing):
    model, params = make()
    run = functools.partial(generate, model, params, max_new_tokens=25, routing=routing)
    together = run(PROMPTS)
    assert together == [run([prompt])[0] for prompt in PROMPTS]
    padded, mask = np.full((3, 12), 60), np.zeros((3, 12), bool)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    assert run(padded, mask=mask) == together


def test_dense_model_equals_lte_model_with_all_experts():
    model, params = make()
    dense = Transformer(model.config)
    ffn = {k: p for k, p in params["layers"]["ffn"].items() if k != "router"}
    one = {k: p.reshape(p.shape[0], 1, -1, p.shape[-1]) for k, p in ffn.items()}
    params_dense = params | {"layers": params["layers"] | {"ffn": one}}
    expected = generate(model, params, PROMPTS, max_new_tokens=25, routing="dense")
    assert generate(dense, params_dense, PROMPTS, max_new_tokens=25) == expected


def test_real_model(shared):
    folder = shared / "models" / "babyllama"
    config, lte = hf.read_config(folder)
    model = Transformer(config, lte)
    params = hf.load_params(folder, config, lte, dtype="float32")
    tokenizer = hf.load_tokenizer(folder)
    text = generate_text(model, params, tokenizer, "Once upon a time", max_new_tokens=40)
    prompt = tokenize(["Once upon a time"], tokenizer)[0].tolist()
    expected = by_full_forward(model, params, prompt, 40)
    assert "Once upon a time" + text == decode(tokenizer, prompt + expected)
    assert "there was a" in text


@pytest.mark.parametrize("count", [1, 2, 8, 9, 30])
def test_streamed_tokens_add_up(count):
    model, params = make()
    chunks = []
    new = generate(model, params, PROMPTS, max_new_tokens=count, stream=chunks.append)
    assert [len(row) for row in new] == [count] * 3
    assert [sum((chunk[row] for chunk in chunks), []) for row in range(3)] == new
    assert new == generate(model, params, PROMPTS, max_new_tokens=count)


def test_streamed_text_adds_up():
    model, params = make(vocab_size=259)
    tokenizer = byte_tokenizer()
    for prompt in ("Zoë", "a", "1 + "):  # random bytes: mostly no valid UTF-8
        pieces = []
        run = functools.partial(generate_text, model, params, tokenizer, prompt, max_new_tokens=30)
        text = run(write=pieces.append)
        assert "".join(pieces) == text == run()
        assert len(pieces) > 1 and "\ufffd" in text


def test_no_half_character_is_streamed(monkeypatch):
    tokenizer, said = byte_tokenizer(), "naïve 日本 🎈 fin"

    def one_byte_at_a_time(model, params, prompts, *, stream):
        for byte in said.encode():
            stream([[byte]])
        return [list(said.encode())]

    monkeypatch.setattr(sys.modules[generate_text.__module__], "generate", one_byte_at_a_time)
    pieces = []
    assert generate_text(*make(), tokenizer, "Zoë ", write=pieces.append) == said
    assert "".join(pieces) == said
    assert len(pieces) == len(said)
    assert not any("\ufffd" in piece for piece in pieces)


def fallback_tokenizer():
    """A tokenizer of a few letters that spells whatever else there is as bytes, as Llama's does."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeZ"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    model = models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize("vocabulary", ["bytes", "fallback", "stories260k"])
def test_pieces_of_any_tokens_add_up(vocabulary, monkeypatch, request):
    """Byte fallback too, where one wrong byte turns the characters before it into replacements."""
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    encoded = list("né日🎈".encode())
    if vocabulary == "fallback":
        tokenizer = fallback_tokenizer()
    elif vocabulary != "bytes":
        shared = request.getfixturevalue("shared")
        tokenizer = hf.load_tokenizer(shared / "models" / vocabulary)
    if vocabulary != "bytes":
        encoded = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in encoded]
    prompt = tokenize(["Zoë "], tokenizer)[0].tolist()
    ends = 0
    for seed in range(200):
        ids = rng.integers(0, len(tokenizer), rng.integers(1, 12)).tolist()
        for _ in range(rng.integers(0, 3)):  # whole characters, and some cut in two
            ids += encoded[: rng.integers(1, len(encoded) + 1)]
        ids += rng.integers(0, len(tokenizer), rng.integers(0, 3)).tolist()

        def by_chunks(model, params, prompts, *, stream, ids=ids, size=1 + seed % 3):
            for start in range(0, len(ids), size):
                stream([ids[start : start + size]])
            return [ids]

        monkeypatch.setattr(sys.modules[generate_text.__module__], "generate", by_chunks)
        pieces = []
        text = generate_text(*make(), tokenizer, "Zoë ", write=pieces.append)
        assert "".join(pieces) == text
        assert decode(tokenizer, prompt) + text == decode(tokenizer, prompt + ids)
        ends += text.endswith("\ufffd")
    assert 10 < ends < 190


def test_a_list_of_texts_gives_a_list_of_those_they_get_alone():
    """Whatever their lengths: the batch is padded on the left."""
    model, params = make(vocab_size=259)
    text = functools.partial(generate_text, model, params, byte_tokenizer(), max_new_tokens=12)
    prompts = ["Once upon a time there was", "x", "Zoë and"]
    alone = [text(prompt) for prompt in prompts]
    assert text(prompts) == text(tuple(prompts)) == alone and len(set(alone)) == 3
    assert text(prompts[:1]) == alone[:1]


def test_a_chat_puts_the_prompt_in_the_template_and_ends_with_the_tokenizers_end(monkeypatch):
    pytest.importorskip("jinja2")
    model, params = make(vocab_size=259)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<{{ messages[0].role }}>{{ messages[0].content }}<answer>"
    given = []
    spy = lambda *args, **settings: (given.append(args[2]), generate(*args, **settings))[1]  # noqa: E731
    monkeypatch.setattr(sys.modules[generate_text.__module__], "generate", spy)
    said = generate_text(model, params, tokenizer, "Why?", chat=True, max_new_tokens=12, eos_ids=())
    ids = list(b"<user>Why?<answer>")  # and no token in front: the template says what is there
    [new] = generate(model, params, [ids], max_new_tokens=12, eos_ids=())
    assert given == [[ids]] and said == decode(tokenizer, new) and len(new) == 12
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(new[4])
    stop = new.index(new[4])
    said = generate_text(model, params, tokenizer, ["Why?"], chat=True, max_new_tokens=12)
    assert said == [decode(tokenizer, ids + new[: stop + 1])[len(ids) :]] and stop < 11
    tokenizer.chat_template = "{{ raise_exception('no roles') }}"
    with pytest.raises(UserError, match="the chat template refuses it .*no roles"):
        generate_text(model, params, tokenizer, "Why?", chat=True, max_new_tokens=2)


def test_a_chat_without_jinja2_is_one_line(monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "x"
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(transformers.utils.chat_template_utils, "is_jinja_available", lambda: False)
    with pytest.raises(UserError, match="jinja2, which is not installed: pip install jinja2"):
        generate_text(*make(vocab_size=259), tokenizer, "Why?", chat=True, max_new_tokens=2)


def test_what_is_passed_on_is_what_generate_takes():
    """All but what is of token ids, or of `generate_text` itself."""
    keywords = inspect.signature(generate).parameters.values()
    taken = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY}
    assert Settings.__annotations__.keys() == taken - {"mask", "stream"}


def test_what_it_took_is_measured():
    model, params = make()
    told = []
    new = generate(model, params, PROMPTS, max_new_tokens=20, measured=told.append)
    [measured] = told
    assert measured.tokens == sum(map(len, new)) and measured.kernels == "cpu"
    assert measured.later == (0, 0.0) and measured.seconds > 0  # in one piece: no time of its own
    generate(model, params, PROMPTS[:1], max_new_tokens=20, measured=told.append, threshold=0.0)
    assert abs(told[-1].sparsity) < 1e-6 and 0 < measured.sparsity < 1
    generate(model, params, PROMPTS, max_new_tokens=20, measured=told.append, routing="soft")
    assert told[-1].sparsity is None
    streamed = {"stream": lambda fresh: None, "measured": told.append}
    generate(model, params, PROMPTS[:1], max_new_tokens=20, eos_ids=(), **streamed)
    assert told[-1].later[0] == 20 - 1 - STREAM_CHUNK and 0 < told[-1].later[1] < told[-1].seconds


def test_command_line(tmp_path, capsys, monkeypatch):
    model, params = make(vocab_size=259)
    hf.save(tmp_path / "model", model.config, model.lte, params)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    flags = ["lte-jax", "generate", str(tmp_path / "model"), "Hello", "--max-new-tokens", "30"]
    monkeypatch.setattr(sys, "argv", flags)
    main()
    settings = {"write": lambda text: None, "max_new_tokens": 30}
    text = generate_text(model, params, byte_tokenizer(), "Hello", **settings)
    assert capsys.readouterr().out == f"Hello{text}\n"


def test_command_line_of_a_folder_that_is_absent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lte-jax", "generate", str(tmp_path / "absent"), "Hello"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "absent" in error and error.count("\n") == 1
