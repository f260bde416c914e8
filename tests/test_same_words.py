"""Greedy generation gives the same tokens through every implementation of the kernels."""

import pytest

import lte_jax
from lte_jax import data, kernels

PROMPTS = (
    "Once upon a time",
    "Lily and her mom went to the park",
    "The dog was sad",
    "One day, a boy named Tim",
    "There was a big tree",
)


@pytest.fixture(scope="module", params=[("stories260k", 4), ("babyllama", 32)], ids=lambda p: p[0])
def sparse(request, shared):
    """An LTE model at about half its experts, and prompts."""
    name, expert_size = request.param
    model, params = lte_jax.load(shared / "models" / name, "float32")  # as exact as they agree
    tokenizer = lte_jax.load_tokenizer(shared / "models" / name)
    texts = data.read_texts(str(shared / "data/tinystories/validation.jsonl"), newline=" ")[:24]
    rows = data.pad(data.tokenize(texts, tokenizer), 256)
    model, params = lte_jax.moefy(
        model, params, rows.tokens_RL, rows.segments_RL, expert_size=expert_size
    )
    return model, params, data.tokenize(PROMPTS, tokenizer)


@pytest.fixture(scope="module")
def expected(sparse):
    model, params, prompts = sparse
    return lte_jax.generate(
        model, params, prompts, max_new_tokens=200, eos_ids=(), implementation="reference"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in kernels.IMPLEMENTATIONS if n != "reference"])
def test_same_words(sparse, expected, name):
    if reason := kernels.unavailable(name):
        pytest.skip(reason)
    model, params, prompts = sparse
    if name == "pallas" and model.config.d_model % 128:
        pytest.skip(f"a width of {model.config.d_model} is none that a TPU takes")
    new = lte_jax.generate(
        model,
        params,
        prompts,
        max_new_tokens=len(expected[0]),
        eos_ids=(),
        implementation=name,
    )
    assert new == expected
