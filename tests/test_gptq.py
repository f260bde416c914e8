"""GPTQ: as the paper's algorithm says, and better than the nearest codes on what it was shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models

import lte_jax
from lte_jax import gptq, hf, quantization, router_init
from lte_jax.cli import main
from lte_jax.config import LTEConfig, UserError
from lte_jax.data import byte_tokenizer
from lte_jax.kernels import quantized
from lte_jax.model import Transformer

SMALL = dataclasses.replace(random_models.LLAMA, d_model=64, head_dim=16, d_ff=96, num_heads=4)
LTE = LTEConfig(expert_size=32)


def correlated(tokens, inputs, seed=0):
    """Inputs of very different sizes that depend on each other, as those of models do."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) * np.exp(rng.standard_normal(inputs))
    return (rng.standard_normal((tokens, inputs)) @ mix / inputs**0.5).astype(np.float32)


def nearest(w_OK, scales_OG, bits):
    scale_OK = jnp.repeat(jnp.asarray(scales_OG), 32, axis=1)
    return np.asarray(quantized.round_to(jnp.asarray(w_OK), scale_OK, bits))


def by_the_paper(w_OK, gram_KK, scales_OG, bits):
    """Equations 2 and 3 for one input after the other, with the inverse made anew each time."""
    zero, width = 2 ** (bits - 1), w_OK.shape[1]
    w = np.asarray(w_OK, np.float64).copy()
    damped = gram_KK + gptq.DAMPING * np.trace(gram_KK) / width * np.eye(width)
    left = list(np.argsort(-np.diag(gram_KK), kind="stable"))
    codes = np.zeros(w.shape)
    while left:
        q, inverse = left[0], np.linalg.inv(damped[np.ix_(left, left)])
        scale = scales_OG[:, q // 32].astype(np.float64)
        steps = np.divide(w[:, q], scale, out=np.zeros(len(w)), where=scale != 0)
        codes[:, q] = np.clip(np.round(steps) + zero, 0, 2 * zero - 1)
        error = w[:, q] - scale * (codes[:, q] - zero)
        w[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        left.pop(0)
    return codes


@pytest.mark.parametrize("format", quantized.BITS)
def test_codes_are_those_of_the_paper(format):
    """But for ties: float32 and float64 round a few weights in a thousand apart."""
    rng, x_TK = np.random.default_rng(1), correlated(300, 96)
    w_OK, gram_KK = rng.standard_normal((40, 96)).astype(np.float32), x_TK.T @ x_TK
    codes_OK, scales_OG = gptq.compensated(w_OK, gram_KK, format)
    expected_OK = by_the_paper(w_OK, gram_KK, scales_OG, quantized.BITS[format])
    same = codes_OK == expected_OK
    assert same.mean() > (0.97 if format == "int8" else 0.995)
    assert np.abs(codes_OK - expected_OK).max() <= 1 + (format == "int8")
    nearest_OK = nearest(w_OK, scales_OG, quantized.BITS[format])
    assert (codes_OK != nearest_OK).mean() > 0.1 or format == "int8"


@pytest.mark.parametrize("format", quantized.BITS)
def test_the_output_errs_less(format):
    rng, x_TK = np.random.default_rng(2), correlated(400, 128)
    w_OK = rng.standard_normal((64, 128)).astype(np.float32)

    def error(codes_OK, scales_OG):
        zero = 2 ** (quantized.BITS[format] - 1)
        rounded_OK = np.repeat(scales_OG, 32, 1) * (codes_OK - zero)
        return np.sum((x_TK @ (rounded_OK - w_OK).T) ** 2)

    codes_OK, scales_OG = gptq.compensated(w_OK, x_TK.T @ x_TK, format)
    nearest_OK = nearest(w_OK, scales_OG, quantized.BITS[format])
    assert error(codes_OK, scales_OG) < 0.4 * error(nearest_OK, scales_OG)


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest():
    w_OK = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    codes_OK, scales_OG = gptq.compensated(w_OK, np.eye(64), "int4")
    nearest_OK = nearest(w_OK, scales_OG, 4)
    np.testing.assert_array_equal(codes_OK, nearest_OK)


def model(lte, seed=0):
    """A random model whose FFN inputs and activations depend on each other a little."""
    transformer = Transformer(SMALL, lte)
    params = jax.jit(transformer.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    return transformer, params


TOKENS = np.random.default_rng(4).integers(0, SMALL.vocab_size, (24, 64))


@pytest.mark.parametrize("lte", [None, LTE], ids=["dense", "lte"])
def test_each_matrix_reads_what_the_model_gives_it(lte):
    """The sums are those of NumPy over real tokens, of inputs seen where they are read."""
    transformer, params = model(lte)
    batch = {"tokens": jnp.asarray(TOKENS[:2]), "segments": jnp.ones((2, 64), jnp.int32)}
    batch["segments"] = batch["segments"].at[1, 40:].set(0)
    sums = gptq._sums(transformer, params, batch, range(1, 2))
    _, sown = transformer.apply(
        {"params": params}, batch["tokens"], mask=batch["segments"], mutable=True
    )
    real = np.asarray(batch["segments"]).ravel() > 0
    ffn = sown["intermediates"]["layers"]["ffn"]
    x_TD = np.asarray(ffn["ffn_input"][0][1]).reshape(128, -1)[real]
    np.testing.assert_allclose(sums["ffn"][0], x_TD.T @ x_TD, rtol=1e-4, atol=1e-4)
    h_BLEM = np.asarray(ffn["hidden"][0][1])
    if lte is not None:
        out = lte_jax.apply(transformer, params, batch["tokens"], mask=batch["segments"])
        active_BLE = np.asarray(out.active[1])
        assert 0.05 < active_BLE.mean() < 0.95
        h_BLEM = h_BLEM * active_BLE[..., None]
    h_TF = h_BLEM.reshape(128, -1)[real]
    np.testing.assert_allclose(sums["down"][0], h_TF.T @ h_TF, rtol=1e-4, atol=1e-4)
    assert sums["qkv"].shape == (1, 64, 64) and sums["o"].shape == (1, 64, 64)


@pytest.mark.parametrize("lte", [None, LTE], ids=["dense", "lte"])
def test_a_model_changes_less(lte):
    """Its logits on the text it was shown; embedding and head are rounded as ever."""
    transformer, params = model(lte)
    expected = lte_jax.apply(transformer, params, TOKENS).logits

    def change(rounded):
        return float(jnp.mean((lte_jax.apply(transformer, rounded, TOKENS).logits - expected) ** 2))

    plain = lte_jax.quantize(transformer, params, "int4")
    small = lte_jax.quantize(transformer, params, "int4", calibration=TOKENS)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, plain)
    for room, name in (("embed", "embedding"), ("lm_head", "kernel")):
        same = jax.tree.map(np.testing.assert_array_equal, small[room][name], plain[room][name])
        assert same
    assert change(small) < 0.75 * change(plain)


def test_int8_too():
    transformer, params = model(LTE)
    small = lte_jax.quantize(transformer, params, "int8", calibration=TOKENS)
    assert quantization.format_of(small) == "int8"
    plain = lte_jax.quantize(transformer, params, "int8")
    kernels = (p["layers"]["attn"]["o"]["kernel"].astype(jnp.float32) for p in (small, plain))
    np.testing.assert_allclose(*kernels, atol=0.02)


def test_padding_says_nothing():
    transformer, params = model(LTE)
    mask = np.ones(TOKENS.shape, int)
    mask[:, 32:] = 0
    one = lte_jax.quantize(transformer, params, "int4", TOKENS[:, :32])
    other = lte_jax.quantize(transformer, params, "int4", TOKENS, mask)
    gate, same = (p["layers"]["ffn"]["gate"].codes for p in (one, other))
    assert (np.asarray(gate) == np.asarray(same)).mean() > 0.99


def test_bad_calibration():
    transformer, params = model(LTE)
    with pytest.raises(UserError, match="int3"):
        lte_jax.quantize(transformer, params, "int3", TOKENS)
    with pytest.raises(UserError, match="outside the vocabulary"):
        lte_jax.quantize(transformer, params, "int4", TOKENS + 61)
    with pytest.raises(UserError, match=r"layer 0: its inputs are not finite .* or all zero"):
        lte_jax.quantize(transformer, params, "int4", TOKENS, np.zeros(TOKENS.shape, int))


def test_in_the_command_line(tmp_path, capsys):
    transformer, params = Transformer(dataclasses.replace(SMALL, vocab_size=259), LTE), None
    params = jax.jit(transformer.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    lte_jax.save(tmp_path / "in", transformer, params)
    byte_tokenizer().save_pretrained(tmp_path / "in")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"Line {i} of so many.\n\n" for i in range(200)))
    words = ["convert", str(tmp_path / "in"), str(tmp_path / "out")]
    main([*words, "--quantize=int4", f"--calibration={texts}", "--calibration-tokens=1024"])
    assert "int4" in capsys.readouterr().out
    [ids] = lte_jax.data.tokenize([texts.read_text()], byte_tokenizer())
    records = lte_jax.data.pack([ids], 128)
    batches = router_init.rows(records[:8])
    bf16 = transformer.clone(dtype="bfloat16")
    expected = gptq.quantize(bf16, params, "int4", batches)
    _, back = lte_jax.load(tmp_path / "out")
    for room, name in (("ffn", "down"), ("ffn", "gate")):
        pair = (np.asarray(p["layers"][room][name].codes) for p in (back, expected))
        np.testing.assert_array_equal(*pair)
    with pytest.raises(SystemExit):
        main([*words, "--dtype=bfloat16", f"--calibration={texts}"])
    assert "--calibration is of --quantize" in capsys.readouterr().err
    assert hf.read_config(tmp_path / "out")[1] == LTE
