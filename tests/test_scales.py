"""Learnt scales: nearer to the model in floats than GPTQ left it, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lte_jax.kernels.quantized import Quantized
from test_gptq import LTE, SMALL, TOKENS, model

import lte_jax
from lte_jax import gptq, router_init, scales
from lte_jax.cli import main
from lte_jax.config import UserError
from lte_jax.data import byte_tokenizer
from lte_jax.model import Transformer


def quantized_leaves(params):
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, Quantized)
    )
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lte", [None, LTE], ids=["dense", "lte"])
def test_what_the_head_reads_comes_nearer(lte, dtype):
    transformer, params = model(lte)
    transformer = transformer.clone(dtype=dtype)
    expected = lte_jax.apply(transformer, params, TOKENS).hidden

    def distance(rounded):
        hidden = lte_jax.apply(transformer, rounded, TOKENS).hidden
        return float(jnp.mean((hidden - expected) ** 2) / jnp.mean(expected**2))

    before = lte_jax.quantize(transformer, params, "int4", TOKENS)
    with jax.numpy_dtype_promotion("standard"):  # as JAX's attention needs it backwards
        after = lte_jax.quantize(transformer, params, "int4", TOKENS, scale_steps=60)
    assert distance(after) < (0.9 if lte else 0.8) * distance(before)


def test_only_scales_of_layers_change():
    transformer, params = model(LTE)
    before = quantized_leaves(lte_jax.quantize(transformer, params, "int4", TOKENS))
    after = quantized_leaves(lte_jax.quantize(transformer, params, "int4", TOKENS, scale_steps=3))
    assert before.keys() == after.keys()
    for path, old in before.items():
        new, learnt = after[path], path.startswith("layers") and isinstance(old, Quantized)
        jax.tree.map(
            np.testing.assert_array_equal, getattr(new, "codes", new), getattr(old, "codes", old)
        )
        if isinstance(old, Quantized):
            assert new.scales.dtype == jnp.bfloat16
            assert np.any(new.scales != old.scales) == learnt, path


def test_scales_depend_on_real_text_alone():
    transformer, params = model(LTE)
    mask = np.ones(TOKENS.shape, int)
    mask[:, 32:] = 0
    rounded = lte_jax.quantize(transformer, params, "int4", TOKENS)

    def learnt(tokens, mask=None):
        batches = router_init.rows(tokens, mask)
        made = scales.learn(transformer, params, rounded, batches, 3)
        return np.asarray(made["layers"]["ffn"]["gate"].scales, np.float32)

    np.testing.assert_array_equal(learnt(TOKENS), learnt(TOKENS))
    other = TOKENS.copy()
    other[:, 32:] = 0
    assert np.mean(learnt(TOKENS, mask) == learnt(other, mask)) > 0.99
    assert np.any(learnt(TOKENS) != learnt(other))


def test_bad_input_for_scales():
    transformer, params = model(LTE)
    with pytest.raises(UserError, match="scale_steps=5 needs calibration"):
        lte_jax.quantize(transformer, params, "int4", scale_steps=5)
    with pytest.raises(UserError, match="scale_steps"):
        lte_jax.quantize(transformer, params, "int4", TOKENS, scale_steps=-1)
    rounded = gptq.quantize(transformer, params, "int4", router_init.rows(TOKENS))
    bad = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(UserError, match="after 0 steps .* nan: expected a finite one"):
        scales.learn(transformer, bad, rounded, router_init.rows(TOKENS), 2)


def test_scales_in_the_command_line(tmp_path, capsys):
    transformer = Transformer(dataclasses.replace(SMALL, vocab_size=259), LTE)
    params = jax.jit(transformer.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    lte_jax.save(tmp_path / "in", transformer, params)
    byte_tokenizer().save_pretrained(tmp_path / "in")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"Line {i} of so many.\n\n" for i in range(200)))
    words = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--quantize=int4"]
    words += ["--dtype=float32", "--scale-steps=2"]
    with pytest.raises(SystemExit):
        main(words)
    assert "--scale-steps are on --calibration: give both" in capsys.readouterr().err
    main([*words, f"--calibration={texts}", "--calibration-tokens=1024"])
    [ids] = lte_jax.data.tokenize([texts.read_text()], byte_tokenizer())
    batches = router_init.rows(lte_jax.data.pack([ids], 128)[:8])
    rounded = gptq.quantize(transformer, params, "int4", batches)
    expected = scales.learn(transformer, params, rounded, batches, 2)
    _, back = lte_jax.load(tmp_path / "out")
    for name in ("gate", "down"):
        found = back["layers"]["ffn"][name].scales
        np.testing.assert_array_equal(found, expected["layers"]["ffn"][name].scales)
        assert np.any(found != rounded["layers"]["ffn"][name].scales)
