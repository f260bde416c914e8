"""Parity: our logits are those of transformers (torch on CPU, float32), feature by feature."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import flat
from hf_models import (
    CASES,
    FAMILY_CASES,
    SHARED_MODELS,
    config_json,
    is_decoder,
    reference,
    write_folder,
)

import lte_jax
from lte_jax import hf
from lte_jax.model import Transformer

TOLERANCE = 1e-4  # max abs of the logits
LENGTH = 72  # longer than every sliding window, and than llama3's original context


def theirs(folder, tokens, mask=None, types=None):
    """What transformers computes: hidden states, and logits of models with a head."""
    model = reference(folder)
    torch = sys.modules["torch"]
    given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    if mask is not None and model.config.model_type in (
        "gpt2",
        "bert",
        "distilbert",
    ):  # counts padding otherwise
        given["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    given = {k: torch.tensor(np.asarray(v, np.int64)) for k, v in given.items() if v is not None}
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    return {k: out[k].numpy() for k in ("logits",) if k in out} | {
        "hidden": out.hidden_states[-1].numpy()
    }


def load(folder):
    config, lte = hf.read_config(folder)
    return Transformer(config, lte), hf.load_params(folder, config, lte, dtype="float32")


def random_tokens(vocab_size, shape=(2, LENGTH)):
    """None of them a special one."""
    return np.random.default_rng(1).integers(3, vocab_size, shape).astype(np.int32)


def assert_parity(folder, tokens, mask=None, types=None):
    outputs = theirs(folder, tokens, mask, types)  # first: it skips without torch
    model, params = load(folder)
    mine = jax.jit(model.apply)({"params": params}, tokens, mask=mask, types=types)
    for name, expected in outputs.items():
        assert np.abs(expected).max() > 0.3  # a model that says nothing agrees with everything
        found = np.asarray(getattr(mine, name))
        assert found.shape == expected.shape
        if mask is not None and expected.ndim == 3:  # of tokens
            found, expected = found[mask], expected[mask]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_parity_of_feature(case, tmp_path):
    folder = write_folder(tmp_path / case, config_json(case))
    assert_parity(folder, random_tokens(97))


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_parity_with_padding(case, tmp_path):
    """On the left of one row, on the right of another; a classifier reads its first place."""
    folder = write_folder(tmp_path / case, config_json(case))
    tokens, mask = random_tokens(97, (3, LENGTH)), np.ones((3, LENGTH), bool)
    mask[1, :30] = case.endswith("classes")
    mask[2, -30:] = False
    assert_parity(folder, np.where(mask, tokens, 1), mask)


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("bert")])
def test_parity_of_token_types(case, tmp_path):
    folder = write_folder(tmp_path / case, config_json(case))
    types = np.repeat([[0, 1]], LENGTH // 2, axis=1).reshape(1, -1)
    assert_parity(folder, random_tokens(97, (1, LENGTH)), types=types.astype(np.int32))


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_parity_of_gradients(case, tmp_path):
    """Of the cross-entropy of each token's, or each text's, logits."""
    folder = write_folder(tmp_path / case, config_json(case))
    (model, params), tokens = load(folder), random_tokens(97, (2, 24))
    labels = tokens[:, ::-1].copy() if model.config.head != "classes" else np.array([0, 1])

    @jax.jit
    @jax.grad
    def gradient(params):
        losses = -jax.nn.log_softmax(model.apply({"params": params}, tokens).logits)
        return jnp.mean(jnp.take_along_axis(losses, labels[..., None], axis=-1))

    other = reference(folder)
    torch = sys.modules["torch"]
    logits = other(torch.tensor(tokens).long()).logits
    truth = torch.tensor(labels).long().flatten()
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), truth).backward()
    stored = {n: p.grad.numpy() for n, p in other.named_parameters() if p.grad is not None}
    _, expected = load(write_folder(tmp_path / "gradients", config_json(case), stored))
    found, expected = flat(gradient(params)), flat(expected)
    assert found.keys() == expected.keys()
    for path, theirs in expected.items():  # the bias of keys has none where positions are learned
        tolerance = 1e-3 * np.abs(theirs).max() + 1e-7
        np.testing.assert_allclose(found[path], theirs, rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("case", [c for c in FAMILY_CASES if is_decoder(c)])
def test_parity_of_generation(case, tmp_path):
    """Greedy, with a cache, of two prompts of unlike length."""
    folder = write_folder(tmp_path / case, config_json(case))
    (model, params), tokens = load(folder), random_tokens(97, (2, 12))
    mask = np.ones((2, 12), bool)
    mask[1, :5] = False
    other = reference(folder)
    torch = sys.modules["torch"]
    new = lte_jax.generate(model, params, tokens, mask=mask, max_new_tokens=30, eos_ids=())
    other.generation_config.eos_token_id = None
    prompts = {"inputs": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    texts = other.generate(**prompts, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert len({*new[0], *new[1]}) > 2
    assert new == texts[:, 12:].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parity_of_stored_dtype(dtype, tmp_path):
    folder = write_folder(tmp_path / dtype, config_json("llama", torch_dtype=dtype), dtype=dtype)
    config, lte = hf.read_config(folder)
    assert config.dtype == dtype
    stored = hf.load_params(folder, config, lte)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored)} == {dtype}
    assert_parity(folder, random_tokens(97))


def test_parity_of_sharded_checkpoint(tmp_path):
    folder = write_folder(tmp_path / "shards", config_json("grouped_query"), shards=3)
    assert_parity(folder, random_tokens(97))


@pytest.mark.parametrize("case", CASES)
def test_parity_of_folder_written_by_transformers(case, tmp_path):
    """Its own config.json (spelling of version 5) and its own safetensors, in shards."""
    ours = write_folder(tmp_path / "ours", config_json(case))
    theirs = tmp_path / "theirs"
    reference(ours).save_pretrained(theirs, max_shard_size="100KB")
    raw = json.loads((theirs / "config.json").read_text())
    assert "rope_parameters" in raw or "rope_theta" not in config_json(case)
    config, lte = hf.read_config(theirs)
    assert (config, lte) == hf.read_config(ours)
    mine = hf.load_params(ours, config, lte)
    for a, b in zip(
        jax.tree.leaves(mine), jax.tree.leaves(hf.load_params(theirs, config, lte)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_parity_of_real_model(name, shared):
    folder = shared / "models" / name
    assert_parity(folder, random_tokens(105, (2, 256)))


def test_parity_of_a_real_encoder(shared, minilm):
    """all-MiniLM-L6-v2: hidden states, and the similarities of the sentences of 20 pairs."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    transformers = pytest.importorskip("transformers")
    folder = minilm
    lines = (shared / "data/glue/mrpc/validation.jsonl").read_text().splitlines()[:20]
    texts = [json.loads(line)[name] for line in lines for name in ("sentence1", "sentence2")]
    coded = hf.load_tokenizer(folder)(texts, padding=True, return_tensors="np")
    real = coded["attention_mask"] > 0
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in coded.items()}
        expected = theirs(**inputs).last_hidden_state.numpy()
    config, lte = hf.read_config(folder)
    params = hf.load_params(folder, config, lte, dtype="float32")
    apply = jax.jit(Transformer(config, lte).apply)
    tokens, types = (
        jnp.asarray(coded[name], jnp.int32) for name in ("input_ids", "token_type_ids")
    )
    found = np.asarray(apply({"params": params}, tokens, types=types, mask=real).hidden)
    np.testing.assert_allclose(found[real], expected[real], atol=TOLERANCE)

    def similarities(hidden):
        mean = (hidden * real[..., None]).sum(axis=1) / real.sum(axis=1)[:, None]
        unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return (unit[::2] * unit[1::2]).sum(axis=1)

    assert similarities(expected).min() < 0.9 < similarities(expected).max()
    np.testing.assert_allclose(similarities(found), similarities(expected), atol=TOLERANCE)


@pytest.mark.parametrize(("name", "expected"), [("stories260k", 4.183), ("babyllama", 2.000)])
def test_parity_of_perplexity(name, expected, shared):
    """The protocol and the figures of ../shared/README.md."""
    folder = shared / "models" / name
    tokenizer = hf.load_tokenizer(folder)
    lines = (shared / "data/tinystories/validation.jsonl").read_text().splitlines()[:40]
    tokens, mask = np.zeros((40, 256), np.int32), np.zeros((40, 256), bool)
    for row, line in enumerate(lines):
        text = json.loads(line)["text"].replace("\n", " ")
        ids = [1, *tokenizer.encode(text, add_special_tokens=False)][:256]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    config, lte = hf.read_config(folder)
    params = hf.load_params(folder, config, lte)
    out = jax.jit(Transformer(config, lte).apply)({"params": params}, tokens, mask=mask)
    losses = -jax.nn.log_softmax(out.logits[:, :-1])
    picked = np.take_along_axis(np.asarray(losses), tokens[:, 1:, None], axis=-1)[..., 0]
    perplexity = np.exp(picked[mask[:, 1:]].mean())
    assert perplexity == pytest.approx(expected, rel=1e-3)
