"""Parity: our logits are those of transformers (torch on CPU, float32), feature by feature."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CASES, SHARED_MODELS, config_json, write_folder

from lte_jax import hf
from lte_jax.model import Transformer

TOLERANCE = 1e-4  # max abs of the logits
LENGTH = 72  # longer than every sliding window, and than llama3's original context


def reference_logits(folder, tokens, mask=None):
    """What transformers computes, and its model."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mask = None if mask is None else torch.tensor(np.asarray(mask, np.int64))
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64)), attention_mask=mask).logits.numpy()


def our_logits(folder, tokens, mask=None):
    config, lte = hf.read_config(folder)
    params = hf.load_params(folder, config, lte, dtype="float32")
    model = Transformer(config, lte)
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens, mask=mask).logits)


def random_tokens(vocab_size, shape=(2, LENGTH)):
    return jnp.asarray(np.random.default_rng(1).integers(0, vocab_size, shape), jnp.int32)


def assert_parity(folder, tokens, mask=None):
    mine, theirs = our_logits(folder, tokens, mask), reference_logits(folder, tokens, mask)
    assert np.abs(theirs).max() > 0.5  # a model that says nothing agrees with everything
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    np.testing.assert_allclose(mine[real], theirs[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_parity_of_feature(case, tmp_path):
    folder = write_folder(tmp_path / case, config_json(case))
    assert_parity(folder, random_tokens(97))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_parity_with_padding(case, side, tmp_path):
    folder = write_folder(tmp_path / case, config_json(case))
    mask = np.ones((2, LENGTH), bool)
    mask[1, slice(0, 30) if side == "left" else slice(-30, None)] = False
    assert_parity(folder, random_tokens(97), jnp.asarray(mask))


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
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="the reference implementation needs torch")
    ours = write_folder(tmp_path / "ours", config_json(case))
    theirs = tmp_path / "theirs"
    model = transformers.AutoModelForCausalLM.from_pretrained(ours)
    model.save_pretrained(theirs, max_shard_size="100KB")
    assert "rope_parameters" in json.loads((theirs / "config.json").read_text())
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
