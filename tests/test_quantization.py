"""Weights of 8, 6 and 4 bits: their rounding, the kernels that read them, models and folders."""

import dataclasses
import json
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import random_models
import tiny
from lte_jax.kernels.quantized import Quantized

import lte_jax
from lte_jax import attention, hf, kernels, optim, quantization, reading, training_step
from lte_jax.cli import main
from lte_jax.config import LTEConfig, UserError
from lte_jax.generation import decoding
from lte_jax.generation.decoding import Decoder
from lte_jax.kernels import cpu, quantized
from lte_jax.model import Transformer, init_cache

FORMATS = list(quantized.BITS)
SMALL = dataclasses.replace(random_models.LLAMA, d_model=64, head_dim=16, d_ff=96, num_heads=4)


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rounded_by_hand(w_OK, format):
    """Codes and scales of each group as kernels/quantized.py says, in NumPy and by loops."""
    bits = quantized.BITS[format]
    zero = 2 ** (bits - 1)
    made = np.zeros(w_OK.shape)
    for o, row in enumerate(np.asarray(w_OK, np.float64)):
        for g in range(0, len(row), 32):
            group, best = row[g : g + 32], None
            largest = group[np.argmax(np.abs(group))]
            ends = [(zero - 1.0) * np.sign(largest)]
            steps = np.arange(-9.0, -5.9, 0.25) if format == "int4" else ends
            for step in steps:
                scale = largest / step
                if format == "int4":
                    codes = np.clip(np.round(group / scale), -zero, zero - 1)
                    scale = (group @ codes) / max(codes @ codes, 1)
                codes = np.clip(np.round(group / scale), -zero, zero - 1)
                error = np.sum((group - scale * codes) ** 2)
                if best is None or error < best[0]:
                    best = error, scale
            scale = float(np.float32(best[1]).astype(ml_dtypes.bfloat16))
            made[o, g : g + 32] = scale * np.clip(np.round(group / scale), -zero, zero - 1)
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_rounding(format):
    w_OK = normal(5, 64)
    got = quantized.quantize(w_OK, format, inputs_first=False, dtype="float32")
    expected = rounded_by_hand(w_OK, format)
    # The scale of int4 comes from sums in float32, which may round to the next bfloat16.
    assert np.mean(np.abs(got.astype("float32") - expected) < 1e-6) > 0.9
    same = np.sqrt(np.mean((expected - w_OK) ** 2))
    assert np.sqrt(np.mean((got.astype("float32") - w_OK) ** 2)) < 1.01 * same
    assert same < {"int8": 0.006, "int6": 0.026, "int4": 0.1}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_zero_or_not_whole_tiles(format):
    w_OK = normal(19, 96).at[3].set(0).at[4, 32:64].set(0)
    got = quantized.quantize(w_OK, format, inputs_first=False, dtype="float32")
    assert got.shape == (19, 96) and got.codes.shape[:2] == (2, 3)
    back = np.asarray(got.astype("float32"))
    assert not back[3].any() and not back[4, 32:64].any()
    ids = jnp.asarray([[18, 3], [0, 16]])
    assert np.array_equal(got.rows(ids), back[np.asarray(ids)])
    turned = quantized.quantize(w_OK.T, format, inputs_first=True, dtype="float32")
    assert np.array_equal(turned.astype("float32"), back.T)


def as_bytes(x_BK):
    """x as the CPU kernels round it: bytes in groups of 32, with a scale each."""
    x = np.asarray(x_BK, np.float32).reshape(len(x_BK), -1, 32)
    most = np.abs(x).max(-1, keepdims=True)
    steps = np.float32(127) / np.where(most > 0, most, np.float32(1))
    return (np.rint(x * steps) * (most / 127)).reshape(len(x_BK), -1)


def expert_weights(format, dtype, layers=2, experts=5, neurons=32, width=96):
    draw = {n: normal(layers, experts, neurons, width, seed=i) for i, n in enumerate("gud")}
    names = {"g": "gate", "u": "up", "d": "down"}
    how = {"format": format, "dtype": jnp.dtype(dtype)}
    made = {names[n]: quantized.quantize(w, inputs_first=n == "d", **how) for n, w in draw.items()}
    return made | {"up_bias": normal(layers, experts, neurons, seed=7, dtype=dtype)}


def needs(name):
    if reason := kernels.unavailable(name):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_linear_is_a_sum_of_integers(rows, format, dtype):
    needs("cpu")
    w = quantized.quantize(normal(2, 20, 96), format, inputs_first=False, dtype=dtype)
    x_BK = normal(rows, 96, seed=1, dtype=dtype)
    got = kernels.linear(x_BK, w, layer=1, transposed=True, implementation="cpu")
    exact = np.float64(as_bytes(x_BK)) @ np.float64(w.astype("float32")[1]).T
    assert np.abs(got - exact).max() < 1e-5
    alone = kernels.linear(x_BK[-1:], w, layer=1, transposed=True, implementation="cpu")
    assert np.array_equal(got[-1:], alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 6])
def test_experts(rows, format, dtype):
    weights = expert_weights(format, dtype)
    x_BD = normal(rows, 96, seed=3, dtype=dtype)
    active_BE = jnp.asarray(np.random.default_rng(4).random((rows, 5)) < 0.6)
    run = lambda name, active=active_BE: np.asarray(  # noqa: E731
        kernels.sparse_ffn(x_BD, active, weights, activation="silu", layer=1, implementation=name),
        np.float32,
    )
    expected = run("reference")
    scale = np.abs(expected).max()
    rounding = 2e-6 if dtype == "float32" else 2e-2
    assert np.abs(run("xla") - expected).max() < rounding * scale
    needs("cpu")
    # x and the hidden activations are rounded to 127 steps of the largest of 32: 0.4% each.
    assert np.abs(run("cpu") - expected).max() < 0.02 * scale
    assert np.array_equal(run("cpu"), run("cpu"))
    assert not run("cpu", jnp.zeros_like(active_BE)).any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(wrong):
    """Bytes have no such values; weights that overflow must not end in plausible text."""
    needs("cpu")
    weights = expert_weights("int8", "float32")
    x_BD = normal(2, 96).at[1, 40].set(wrong)
    w = quantized.quantize(normal(20, 96), "int8", inputs_first=False, dtype="float32")
    y_BO = kernels.linear(x_BD, w, transposed=True, implementation="cpu")
    assert np.isfinite(y_BO[0]).all() and not np.isfinite(y_BO[1]).any()
    y_BD = kernels.sparse_ffn(
        x_BD, jnp.ones((2, 5), bool), weights, activation="silu", layer=0, implementation="cpu"
    )
    assert np.isfinite(y_BD[0]).all() and not np.isfinite(y_BD[1]).any()
    tiny = jnp.full((1, 96), 1e-38)
    assert np.isfinite(kernels.linear(tiny, w, transposed=True, implementation="cpu")).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_kernels_that_do_not_round_x(name, rows, format, dtype):
    """Experts, one matrix in either order, three at once."""
    needs(name)
    weights, x_BD = expert_weights(format, dtype), normal(rows, 96, seed=3, dtype=dtype)
    active_BE = jnp.asarray(np.random.default_rng(4).random((rows, 5)) < 0.6)
    draws = [normal(2, 96, outputs, seed=outputs) for outputs in (64, 20, 36)]
    how = {"format": format, "dtype": jnp.dtype(dtype)}
    ws = [quantized.quantize(w, inputs_first=True, **how) for w in draws]
    turned = quantized.quantize(draws[1].swapaxes(1, 2), inputs_first=False, **how)

    def run(name):
        how = {"layer": 1, "implementation": name}
        yield kernels.sparse_ffn(x_BD, active_BE, weights, activation="silu", **how)
        yield kernels.linear(x_BD, ws[1], **how)
        yield kernels.linear(x_BD, turned, transposed=True, **how)
        yield from kernels.linears(x_BD, ws, **how)

    rounding = 2e-6 if dtype == "float32" else 2e-2
    for got, expected in zip(run(name), run("reference"), strict=True):
        got, expected = (np.asarray(y, np.float32) for y in (got, expected))
        assert np.abs(got - expected).max() < rounding * np.abs(expected).max()


def test_kernels_of_floats_say_so():
    weights, x_BD = expert_weights("int8", "float32"), normal(1, 96)
    with pytest.raises(UserError, match="int8|cannot run"):
        kernels.sparse_ffn(
            *(x_BD, jnp.ones((1, 5), bool), weights),
            **{"activation": "silu", "layer": 0, "implementation": "pallas"},
        )


def model(lte=LTEConfig(expert_size=32), config=SMALL, dtype="float32"):  # noqa: B008
    made = Transformer(config, lte, dtype=dtype)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(made.init)(jax.random.key(0), tokens)["params"]
    return made, jax.tree.map(lambda x: x.astype(dtype), params)


def whole(params, like):
    """The parameters as arrays."""
    is_leaf = lambda x: isinstance(x, Quantized)  # noqa: E731
    arrays = jax.tree.map(lambda x: x.astype("float32"), params, is_leaf=is_leaf)
    return jax.tree.map(lambda a, b: a.reshape(b.shape), arrays, like)


CASES = {
    "lte": (LTEConfig(expert_size=32), SMALL),
    "dense": (None, SMALL),
    "biases": (None, dataclasses.replace(random_models.VARIANTS["biases"], d_model=64, d_ff=96)),
    "tied": (LTEConfig(expert_size=32), dataclasses.replace(SMALL, tie_embeddings=True)),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_a_model_computes_with_its_rounded_weights(case, format):
    made, params = model(*CASES[case])
    small = lte_jax.quantize(made, params, format)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    got = lte_jax.apply(made, small, tokens).logits
    floats = whole(small, params)
    np.testing.assert_allclose(got, lte_jax.apply(made, floats, tokens).logits, atol=1e-5)
    of_all = {"routing": "dense"}  # as small a change as it is, some experts change
    got = lte_jax.apply(made, small, tokens, **of_all).logits
    error = jnp.abs(got - lte_jax.apply(made, params, tokens, **of_all).logits).max()
    assert 0 < error < {"int8": 0.2, "int6": 0.8, "int4": 3.0}[format]
    if format == "int4":
        return
    how = {"max_new_tokens": 6, "implementation": "xla"}
    prompts = [[1, 2, 3], [7]]
    assert lte_jax.generate(made, small, prompts, **how) == lte_jax.generate(
        made, floats, prompts, **how
    )


@pytest.mark.parametrize("case", ["lte", "dense"])
def test_a_text_is_the_same_alone_and_among_others(case):
    """Through the CPU kernels, prompts included."""
    needs("cpu")
    made, params = model(*CASES[case])
    small = lte_jax.quantize(made, params, "int8")
    ids = lte_jax.generate(made, small, [[1, 2, 3]], max_new_tokens=8, implementation="cpu")
    again = lte_jax.generate(made, small, [[1, 2, 3]] * 3, max_new_tokens=8, implementation="cpu")
    assert again == ids * 3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", ["lte", "dense", "tied"])
def test_folders_are_read_back_bit_equal(case, format, tmp_path):
    made, params = model(*CASES[case], dtype="bfloat16")
    small = lte_jax.quantize(made, params, format)
    lte_jax.save(tmp_path / "out", made, small)
    read, back = lte_jax.load(tmp_path / "out")
    assert read.dtype == "bfloat16" and read.lte == made.lte
    assert jax.tree.structure(back) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, back, small)
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size < 0.75 * sum(2 * leaf.size for leaf in jax.tree.leaves(params))


def saved(tmp_path, **changes):
    made, params = model()
    lte_jax.save(tmp_path / "out", made, lte_jax.quantize(made, params, "int8"))
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "out" / "manifest.json").unlink()
    return tmp_path / "out"


def test_damaged_folders(tmp_path):
    folder = saved(tmp_path, intermediate_size=64)
    with pytest.raises(UserError, match=r"ffn.gate.0.q is U8 .* expected U8 \[2, "):
        lte_jax.load(folder)
    folder = saved(tmp_path, num_hidden_layers=SMALL.num_layers + 1)
    with pytest.raises(UserError, match=r"kernel.*\.q U8 .* is missing"):
        lte_jax.load(folder)
    setting = {"quant_method": "lte_jax", "format": "int3", "group_size": 32}
    folder = saved(tmp_path, quantization_config=setting)
    with pytest.raises(UserError, match="int3.*int8"):
        lte_jax.load(folder)


def test_what_cannot_be_quantised():
    made, params = model()
    with pytest.raises(UserError, match="int2.*int8"):
        lte_jax.quantize(made, params, "int2")
    small = lte_jax.quantize(made, params, "int8")
    with pytest.raises(UserError, match="int8 already"):
        lte_jax.quantize(made, small, "int4")
    with pytest.raises(UserError, match="int8: moefy the model first"):
        dense, of_dense = model(None)
        lte_jax.moefy(dense, lte_jax.quantize(dense, of_dense, "int8"), expert_size=32)
    odd, of_odd = model(LTEConfig(expert_size=8))
    with pytest.raises(UserError, match="ffn/down.* has 8 inputs an output.*multiples of 32"):
        lte_jax.quantize(odd, of_odd, "int4")
    wrong = lte_jax.quantize(*model(config=dataclasses.replace(SMALL, d_ff=64)), "int8")
    with pytest.raises(UserError, match="layers/ffn/gate is int8"):
        lte_jax.apply(made, wrong, [[1, 2]])


def test_converting_in_the_command_line(tmp_path, capsys):
    made, params = model()
    lte_jax.save(tmp_path / "in", made, params)
    main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--quantize=int4"])
    assert "int4" in capsys.readouterr().out
    read, back = lte_jax.load(tmp_path / "out")
    assert read.dtype == "bfloat16" and quantization.format_of(back) == "int4"
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "out"), str(tmp_path / "again"), "--quantize=int8"])
    assert "name the model that it was quantised from" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["lte", "dense", "tied"])
def test_training_through_rounded_weights(case):
    """A step's loss is that of the rounded model; its gradients are not zero, as rounding's are."""
    made, params = model(*CASES[case])
    made = made.clone(config=dataclasses.replace(made.config, vocab_size=64))
    params = jax.jit(made.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    lte = made.lte and dataclasses.replace(made.lte, target_sparsity=0.5)
    stage = tiny.stage("finetune" if lte is None else "adapt", lte or tiny.LTE)

    def step(params, format):
        config = dataclasses.replace(stage.config, quantize=format, steps=3, warmup_ratio=0.0)
        here = dataclasses.replace(stage, config=config)
        optimizer = optim.make(tiny.OPTIM, config, here.rules)
        run = jax.jit(training_step.make_train_step(made, here, optimizer))
        state = training_step.TrainState(
            jnp.int32(0), params, optimizer.init(params), tiny.control(lte or tiny.LTE)
        )
        return run(state, tiny.batch(), params)

    floats = whole(lte_jax.quantize(made, params, "int4"), params)
    (after, got), (_, expected) = step(params, "int4"), step(floats, None)
    assert float(got["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert got["loss"] != step(params, None)[1]["loss"]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, params)
    assert moved["layers"]["ffn"]["down"] > 0 and moved["layers"]["attn"]["q"]["kernel"] > 0


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_routers_are_read_in_bfloat16_and_multiplied_exactly(implementation):
    needs(implementation)
    made, params = model()
    small = lte_jax.quantize(made, params, "int4")
    kernel = small["layers"]["ffn"]["router"]["kernel"]
    assert kernel.dtype == jnp.float32 and np.any(
        kernel != params["layers"]["ffn"]["router"]["kernel"]
    )
    vectors, matrices = reading.stacked(made.config, small, "float32")
    assert matrices["layers"]["ffn"]["router"]["kernel"].dtype == jnp.bfloat16
    x_BLD = normal(3, 1, made.config.d_model)
    layer = jax.tree.map(lambda a: a[1], vectors["layers"])
    live_BL = jnp.ones((3, 1), bool)
    w = reading.Stack(layer, matrices["layers"], 1, live_BL, implementation).at("ffn")
    bias = small["layers"]["ffn"]["router"]["bias"][1]
    got, expected = (
        w.linear("router", x_BLD, exact=True),
        x_BLD @ kernel[1] + np.broadcast_to(bias, (3, 1, 3)),
    )
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.std(expected)))
    _, floats = reading.stacked(made.config, params, "float32")
    assert floats["layers"]["ffn"]["router"]["kernel"].dtype == jnp.float32


def test_bytes_of_a_token():
    made, params = model(config=dataclasses.replace(SMALL, vocab_size=64))
    small = lte_jax.quantize(made, params, "int4")
    counted = quantization.widths(small, "bfloat16")
    stored = small["layers"]["attn"]["o"]["kernel"]
    one = sum(a.nbytes for a in jax.tree.leaves(stored)) / np.prod(stored.shape)
    head = small["lm_head"]["kernel"]
    assert counted == (one, sum(a.nbytes for a in jax.tree.leaves(head)) / np.prod(head.shape))
    assert quantization.widths(params, "bfloat16") == (2, 2)


_LOGITS = """
import sys; sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np, test_quantization as t
from lte_jax import kernels
from lte_jax.kernels import cpu
x = t.normal(5, 96, seed=3)
for format in t.FORMATS:
    w = t.quantized.quantize(t.normal(2, 20, 96), format, inputs_first=False, dtype="float32")
    y = [kernels.linear(x, w, layer=1, transposed=True, implementation="cpu")]
    weights = t.expert_weights(format, "float32")
    y += [kernels.sparse_ffn(x, jnp.ones((5, 5), bool), weights, activation="relu", layer=0,
                             implementation="cpu")]
    print(np.concatenate([np.asarray(a).ravel() for a in y]).tolist())
for dtype in ("float32", "bfloat16"):
    for rows in (1, 3, 20):
        x = t.normal(rows, 96, seed=3, dtype=dtype)
        w = [t.normal(9, 32, 96, seed=i, dtype=dtype) / 8 for i in range(3)]
        y = [kernels.linear(x, w[0][0], layer=None, transposed=True, implementation="cpu")]
        y += [kernels.linear(x, w[0][0].T, layer=None, implementation="cpu")]
        for activation in ("silu", "gelu_tanh"):
            weights = dict(zip(("gate", "up", "down"), w))
            y += [kernels.sparse_ffn(x, jnp.ones((rows, 9), bool), weights, activation=activation,
                                     implementation="cpu")]
        print(np.concatenate([np.asarray(a, "float32").ravel() for a in y]).tolist())
q, k, v = (t.normal(2, 70, heads, 48, seed=heads, dtype="float32") for heads in (4, 2, 2))
seen = jnp.tril(jnp.ones((2, 70, 70), bool))
f = lambda *x: (cpu.attention(*x, seen, True) ** 2).sum()
for slope in jax.grad(f, (0, 1, 2))(q, k, v):
    print(np.asarray(slope).ravel().tolist())
"""


@pytest.mark.slow
def test_other_instruction_sets_give_the_same(tmp_path):
    """Products of bytes and of bfloat16 as AVX-512 has them, without those, by AVX2, by neither."""
    needs("cpu")
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86 compilers")
    compiler = cpu._compiler()[0]
    seen = []
    others = " -mno-avx512bf16 -mno-avx512vnni", " -mno-avx512f -mno-avxvnni", " -mno-avx"
    for flags in ("", *others):
        env = dict(os.environ)
        if flags:
            env |= {"CXX": compiler + flags, "LTE_JAX_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", _LOGITS], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seen.append([json.loads(line) for line in done.stdout.splitlines()])
    assert len(list((tmp_path / "cache").glob("*.so"))) == 3
    for other in seen[1:]:
        for i, (a, b) in enumerate(zip(seen[0], other, strict=True)):
            # Without fused products sums differ in the last bit, and a byte of the hidden
            # activations may, too; outputs in bfloat16 have eight bits.
            near = 8e-3 if len(FORMATS) + 3 <= i < len(FORMATS) + 6 else 1e-4
            np.testing.assert_allclose(a, b, atol=near * np.abs(a).max())


def test_reading_config_keeps_other_formats_out():
    raw = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert hf.scaled.format_of(raw) is None


@pytest.mark.parametrize("at_once", [64, 512])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_long_prompt_is_read_in_turns(format, at_once, monkeypatch):
    """By kernels that read prompts, in turns and with padding before them, as all at once."""
    needs("cpu")
    monkeypatch.setattr(cpu, "reads_prompts", lambda w: True)
    monkeypatch.setattr(decoding, "AT_ONCE", at_once)
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", 4 * 96 * 128)
    jax.clear_caches()
    made, params = model(config=dataclasses.replace(SMALL, max_length=512))
    if format:
        params = lte_jax.quantize(made, params, format)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, SMALL.vocab_size, n) for n in (170, 260, 3)]
    decoder = Decoder.of(made, params, implementation="cpu")
    state = decoder.prefill(prompts, room=40)
    length, size = int(state.cache["index"]), state.cache["k"].shape[2]
    assert size == 512 and length == 260  # read in turns of 128 or 64
    tokens_BL, mask_BL = decoding.pad_left(prompts, length, length)
    whole = decoder.apply(jnp.asarray(tokens_BL), init_cache(made, 3, size), mask=mask_BL)
    real = np.asarray(whole.cache["segments"]) > 0
    for name in ("segments", "positions"):
        assert np.array_equal(state.cache[name][real], whole.cache[name][real])
    assert np.array_equal(np.asarray(state.cache["segments"]) > 0, real)
    for name in "kv":
        a, b = (np.asarray(cache[name])[:, real] for cache in (state.cache, whole.cache))
        # Where x is rounded, too, some tokens choose another expert.
        assert np.linalg.norm(a - b) < (0.15 if format else 1e-5) * np.linalg.norm(b)
    if not format:
        assert np.array_equal(state.tokens_B, jnp.argmax(whole.logits[:, -1], axis=-1))
    jax.clear_caches()


def test_a_growing_chat_compiles_few_programs():
    """Twenty turns, each with all that was said before."""
    jax.clear_caches()
    made, params = model(None, config=dataclasses.replace(SMALL, max_length=1024))
    said: list[int] = []
    for turn in range(20):
        said += [1 + turn, 7, 9] * 8
        [answer] = lte_jax.generate(made, params, [said], max_new_tokens=20, eos_ids=[])
        said += answer
    assert len(said) == 20 * 44
    assert Decoder._prefill._cache_size() + Decoder.extend._cache_size() <= 6
