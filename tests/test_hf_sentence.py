"""Folders of sentence-transformers: the embeddings of texts, what is refused, and the way back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hf_folders import assert_complains
from hf_models import assert_bit_equal, config_json, read_tensors, write_folder

import lte_jax
from lte_jax import hf, tasks
from lte_jax import params as parameters
from lte_jax.config import UserError

WORDS = "the film is good bad a dull fine plot and no joy great".split()
TEXTS = ["the film is good", "a", "no joy and a dull plot " * 8, "great plot"]
KINDS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")


def module(kind, path=""):
    number = int(path[:1] or 0)
    kind = f"sentence_transformers.models.{kind}"
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def sentence_folder(
    path,
    chosen=("mean_tokens",),
    last=("Normalize",),
    case="bert",
    act="activation.Tanh",
    **changes,
):
    """A tiny encoder's folder with the settings of its embedding."""
    transformers = pytest.importorskip("transformers")
    folder = write_folder(path, config_json(case, **changes))
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
    modules = [module("Transformer"), module("Pooling", "1_Pooling")]
    modules += [module(kind, f"{i}_{kind}") for i, kind in enumerate(last, 2)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": 64} | {f"pooling_mode_{k}": k in chosen for k in KINDS}
    (folder / "1_Pooling/config.json").write_text(json.dumps(modes))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    if "Dense" in last:
        rng = np.random.default_rng(0)
        layer = {"linear.weight": rng.normal(0, 0.2, (24, 64)), "linear.bias": rng.normal(0, 1, 24)}
        settings = {"in_features": 64, "out_features": 24, "bias": True}
        settings["activation_function"] = f"torch.nn.modules.{act}"
        write_folder(folder / "2_Dense", settings, layer, "float32")
    return folder


def assert_library_agrees(folder, texts, found):
    """sentence-transformers itself, where it is installed, embeds the texts likewise."""
    try:
        import sentence_transformers
    except ImportError:
        return
    other = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(found, other.encode(texts), atol=1e-5)


def dense_by_hand(folder, vector_D, act):
    layer = read_tensors(folder / "2_Dense")
    vector_Z = layer["linear.weight"] @ vector_D + layer["linear.bias"]
    return np.tanh(vector_Z) if act.endswith("Tanh") else vector_Z


@pytest.mark.parametrize("kind", ["cls_token", "mean_tokens"])
@pytest.mark.parametrize("last", [(), ("Normalize",)])
def test_embeddings_by_hand(kind, last, tmp_path):
    folder = sentence_folder(tmp_path / "model", (kind,), last)
    model, params = lte_jax.load(folder, "float32")
    tokenizer = lte_jax.load_tokenizer(folder)
    found = lte_jax.embed_texts(model, params, tokenizer, TEXTS, batch_size=3)
    assert found.shape == (4, 64) and found.dtype == np.float32
    for vector_D, text in zip(found, TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids = ids if len(ids) <= 16 else [*ids[:15], tokenizer.sep_token_id]
        hidden_LD = np.asarray(lte_jax.apply(model, params, [ids]).hidden)[0]
        expected_D = hidden_LD[0] if kind == "cls_token" else hidden_LD.mean(axis=0)
        expected_D = expected_D / (np.linalg.norm(expected_D) if last else 1)
        np.testing.assert_allclose(vector_D, expected_D, atol=1e-5)
    assert lte_jax.embed_texts(model, params, tokenizer, []).shape == (0, 64)


@pytest.mark.parametrize("act", ["activation.Tanh", "linear.Identity"])
@pytest.mark.parametrize("last", [("Dense",), ("Dense", "Normalize")])
def test_a_dense_layer(act, last, tmp_path):
    """Read, computed and written, by lte_jax and as sentence-transformers would read it."""
    folder = sentence_folder(tmp_path / "model", ("mean_tokens",), last, act=act)
    model, params = lte_jax.load(folder, "float32")
    tokenizer = lte_jax.load_tokenizer(folder)
    found = lte_jax.embed_texts(model, params, tokenizer, TEXTS)
    assert found.shape == (4, 24)
    hidden_LD = np.asarray(lte_jax.apply(model, params, [tokenizer(TEXTS[0])["input_ids"]]).hidden)[
        0
    ]
    expected_Z = dense_by_hand(folder, hidden_LD.mean(axis=0), act)
    expected_Z = expected_Z / (np.linalg.norm(expected_Z) if len(last) > 1 else 1)
    np.testing.assert_allclose(found[0], expected_Z, atol=1e-5)
    for source in folder, None:
        lte_jax.save(tmp_path / "saved", model, params, source=source)
        again, same = lte_jax.load(tmp_path / "saved", verify=True)
        assert again.config == model.config
        vectors = lte_jax.embed_texts(again, same, tokenizer, TEXTS)
        np.testing.assert_array_equal(vectors, found)
        tokenizer.save_pretrained(tmp_path / "saved")
        assert_library_agrees(tmp_path / "saved", TEXTS, found)
        assert_bit_equal(*(read_tensors(f / "2_Dense") for f in (tmp_path / "saved", folder)))
        said, old = ((f / "2_Dense/config.json").read_text() for f in (tmp_path / "saved", folder))
        assert json.loads(said) == json.loads(old)
    tokens = np.random.default_rng(0).integers(0, 97, (4, 64))
    sparse, routed = lte_jax.moefy(model, params, tokens, expert_size=8)
    lte_jax.save(tmp_path / "lte", sparse, routed)
    assert lte_jax.load(tmp_path / "lte")[0].config.embed_dim == 24


def test_bad_input_dense(tmp_path):
    folder = sentence_folder(tmp_path / "model", last=("Dense",))
    good = json.loads((folder / "2_Dense/config.json").read_text())
    for changes, words in (
        ({"bias": False}, "bias=False: expected a bias"),
        ({"activation_function": "torch.nn.GELU"}, "'torch.nn.GELU', bias=True: expected a bias"),
        ({"out_features": 0}, "out_features=0: expected 64 and a positive integer"),
        ({"in_features": 3}, "in_features=3, out_features=24: expected 64"),
    ):
        (folder / "2_Dense/config.json").write_text(json.dumps(good | changes))
        assert_complains(lambda: hf.read_config(folder), "2_Dense", words)
    (folder / "2_Dense/config.json").write_text(json.dumps(good | {"out_features": 9}))
    words = "linear.weight has shape [24, 64], expected [out_features=9, hidden_size=64]"
    assert_complains(lambda: lte_jax.load(folder), words)


def test_a_decoder_s_last_token(tmp_path):
    case = {"hidden_size": 64, "num_attention_heads": 4}
    folder = sentence_folder(tmp_path / "model", ("lasttoken",), (), "llama", **case)
    model, params = lte_jax.load(folder, "float32")
    tokenizer = lte_jax.load_tokenizer(folder)
    [vector_D] = lte_jax.embed_texts(model, params, tokenizer, TEXTS[:1])
    hidden = lte_jax.apply(model, params, [tokenizer(TEXTS[0])["input_ids"]]).hidden
    np.testing.assert_allclose(vector_D, hidden[0, -1], atol=1e-5)


def test_embeddings_of_a_real_encoder(shared, minilm, tmp_path):
    """all-MiniLM-L6-v2 against torch, before and after it was saved."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    transformers = pytest.importorskip("transformers")
    lines = (shared / "data/glue/mrpc/validation.jsonl").read_text().splitlines()[:20]
    texts = [json.loads(line)[name] for line in lines for name in ("sentence1", "sentence2")]
    texts.append(" ".join(texts))  # longer than the folder's 256 tokens
    model, params = lte_jax.load(minilm, "float32")
    tokenizer = lte_jax.load_tokenizer(minilm)
    lte_jax.save(tmp_path / "saved", model, params, source=minilm)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    coded = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**coded).last_hidden_state
    real = coded["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1)).numpy()
    found = lte_jax.embed_texts(model, params, tokenizer, texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    similarities = (found[:-1:2] * found[1:-1:2]).sum(axis=1)
    assert similarities.min() < 0.9 < similarities.max()
    assert_library_agrees(tmp_path / "saved", texts, found)


@pytest.mark.parametrize("kind", ["cls_token", "mean_tokens"])
def test_the_way_back(kind, tmp_path):
    """With its source the settings are copied; without it they are written anew; LTE has them."""
    folder = sentence_folder(tmp_path / "model", (kind,))
    model, params = lte_jax.load(folder)
    for source in folder, None, folder:  # an older model is replaced
        lte_jax.save(tmp_path / "saved", model, params, source=source)
        assert lte_jax.load(tmp_path / "saved", verify=True)[0].config == model.config
        for name in ("modules.json", "1_Pooling/config.json"):
            mine, old = ((f / name).read_bytes() for f in (tmp_path / "saved", folder))
            assert (mine == old) == (source is not None)
        said = json.loads((tmp_path / "saved/modules.json").read_text())
        assert [m["type"].rpartition(".")[2] for m in said] == [
            "Transformer",
            "Pooling",
            "Normalize",
        ]
    assert hf.load_tokenizer(tmp_path / "saved").model_max_length == 16
    tokens = np.random.default_rng(0).integers(0, 97, (4, 64))
    sparse, routed = lte_jax.moefy(model, params, tokens, expert_size=8)
    lte_jax.save(tmp_path / "lte", sparse, routed, source=folder)
    again, params = lte_jax.load(tmp_path / "lte")
    assert again.config.pooling == model.config.pooling and again.config.unit_length
    vectors = lte_jax.embed_texts(again, params, hf.load_tokenizer(tmp_path / "lte"), TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    (tmp_path / "lte/1_Pooling/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds 1_Pooling, which is not part of a model"):
        lte_jax.save(tmp_path / "lte", sparse, routed)


@pytest.mark.parametrize("last", [("Normalize",), ("Dense", "Normalize")])
def test_a_classifier_of_such_a_folder_is_one_of_transformers(last, tmp_path, caplog):
    """It reads the first token, and nothing of the embedding is left in its folder."""
    folder = sentence_folder(tmp_path / "mean", last=last)
    model, params = lte_jax.load(folder)
    assert model.config.pooling == "mean" and model.config.unit_length
    config = tasks.find("sst2").dense_config(model.config)
    plain = write_folder(tmp_path / "plain", config_json("bert"))
    assert config == tasks.find("sst2").dense_config(hf.read_config(plain)[0])
    params = parameters.adopt(config, params, jax.random.key(0))
    hf.save(tmp_path / "classes", config, None, params, folder)
    assert "transformers would read" not in caplog.text
    left = {path.name for path in (tmp_path / "classes").iterdir()}
    assert not left & {"modules.json", "1_Pooling", "2_Dense", "sentence_bert_config.json"}
    written = hf.read_config(tmp_path / "classes")[0]
    assert written == config and tasks.find("sst2").dense_config(written) == written
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "classes").eval()
    tokens = np.array([[2, 5, 6, 7, 8, 3]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = lte_jax.apply(*lte_jax.load(tmp_path / "classes"), tokens).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_classifier_of_the_mean_is_read_back_and_said(tmp_path, caplog):
    """Its pooling is kept beside config.json, where transformers does not look."""
    folder = write_folder(tmp_path / "bert", config_json("bert_classes"))
    model, params = lte_jax.load(folder)
    lte_jax.save(tmp_path / "first", model, params)
    assert "transformers would read" not in caplog.text
    mean = model.clone(config=dataclasses.replace(model.config, pooling="mean"))
    lte_jax.save(tmp_path / "mean", mean, params)
    assert "transformers would read the first one" in caplog.text
    assert lte_jax.load(tmp_path / "mean")[0].config == mean.config


def test_a_folder_without_modules_is_as_before(tmp_path):
    folder = write_folder(tmp_path / "bert", config_json("bert"))
    model, params = lte_jax.load(folder)
    assert (model.config.pooling, model.config.unit_length) == ("first", False)
    lte_jax.save(tmp_path / "saved", model, params)
    assert not (tmp_path / "saved/modules.json").exists()


@pytest.mark.parametrize(
    ("chosen", "last", "words"),
    [
        (
            ("max_tokens",),
            (),
            "pooling by max_tokens is not supported: expected mean_tokens or cls",
        ),
        (("mean_sqrt_len_tokens",), (), "pooling by mean_sqrt_len_tokens is not supported"),
        (("cls_token", "mean_tokens"), (), "pooling by cls_token and mean_tokens is not"),
        (("lasttoken",), (), "pooling by lasttoken is not supported"),
        ((), (), "pooling by nothing is not supported"),
        (("mean_tokens",), ("LayerNorm",), "Pooling, LayerNorm are not supported: expected"),
        (("mean_tokens",), ("Normalize", "Dense"), "Pooling, Normalize, Dense are not supported"),
    ],
)
def test_bad_input_pooling(chosen, last, words, tmp_path):
    folder = sentence_folder(tmp_path / "model", chosen, last)
    assert_complains(lambda: hf.read_config(folder), words, "1_Pooling" if not last else "modules")


def test_bad_input_files(tmp_path):
    folder = sentence_folder(tmp_path / "model")
    for text, words in (
        ("{}", "holds a JSON dict: expected a list"),
        ("[3]", "expected a list of modules with a type"),
        ("[", "cannot be read"),
        (json.dumps([module("Transformer", "0_Transformer"), module("Pooling")]), "path='0_Tr"),
    ):
        (folder / "modules.json").write_text(text)
        assert_complains(lambda: hf.read_config(folder), "modules.json", words)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 0}')
    assert_complains(lambda: hf.load_tokenizer(folder), "max_seq_length=0: expected a positive")


def test_bad_input_of_embed_texts(tmp_path):
    folder = sentence_folder(tmp_path / "model")
    model, params = lte_jax.load(folder)
    tokenizer = lte_jax.load_tokenizer(folder)
    for texts in "one text", ["a", 3], 3:
        with pytest.raises(UserError, match="texts: expected a list of texts"):
            lte_jax.embed_texts(model, params, tokenizer, texts)
    with pytest.raises(UserError, match="batch_size=0: expected an integer of at least 1"):
        lte_jax.embed_texts(model, params, tokenizer, ["a"], batch_size=0)


def test_a_pooling_spelled_as_newer_versions_do(tmp_path):
    folder = sentence_folder(tmp_path / "model", last=())
    for said, expected in ("cls", "first"), (["mean"], "mean"):
        (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": said}))
        assert hf.read_config(folder)[0].pooling == expected
    for said in ["mean", "cls"], [{}], 3, "max":
        (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": said}))
        assert_complains(lambda: hf.read_config(folder), "1_Pooling", "is not supported: expected")
