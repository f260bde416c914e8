"""Runs the Triton kernels in Triton's interpreter, on the CPU, against NumPy in float64.

Run by test_triton.py in a process of its own, as TRITON_INTERPRET=1 holds for a whole process.
Prints a JSON object: for each case the largest error, relative to the largest value expected.
"""

import itertools
import json
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import jax.numpy as jnp
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from lte_jax.kernels import (
    gpu_codes,
    gpu_triton,
    quantized,
    triton_blocks,
    triton_codes,
    triton_kernels,
)

E, N, LAYER = 5, 3, 1
ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + ERF(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: np.maximum(z, 0),
}


def repair_dot():
    """The interpreter keeps bfloat16 as bits and multiplies those in tl.dot: give it numbers."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def numbers(operand):
        if operand.dtype != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, numbers(a), numbers(b), *rest)

    builder.create_dot = create_dot


def launch(kernel, grid, arrays, constants):
    module = triton_codes if kernel.endswith("_codes") else triton_kernels
    getattr(module, kernel)[grid](*arrays, **constants)


def normal(rng, dtype, *shape):
    return torch.tensor(rng.normal(size=shape, scale=0.5)).to(getattr(torch, dtype))


def mask(rng, rows, kind):
    active = np.zeros((rows, E), bool)
    if kind == "all":
        active[:] = True
    elif kind == "one":
        active[:, E - 1] = True
    elif kind == "disjoint":
        for expert in range(E):
            active[expert % rows, expert] = True
    elif kind == "some":
        active = rng.random((rows, E)) < 0.4
        active[:, 0] = False  # the program that stores the count is idle
    return active


def ffn(rows, dtype, kind, m, d, activation="silu", gated=True, bias=False):
    """Error of the two kernels, launched as gpu_triton launches them."""
    rng = np.random.default_rng(rows)
    x, active = normal(rng, dtype, rows, d), torch.tensor(mask(rng, rows, kind))
    names = ("up", "down", "gate")[: 3 if gated else 2]
    w = {name: normal(rng, dtype, N, E, m, d) for name in names}
    if bias:
        w |= {f"{n}_bias": normal(rng, dtype, N, E, m) for n in ("up", "gate") if n in w}
    # Memory that nothing wrote shows: NaN in idle experts, in outputs and scratch.
    for weights in w.values():
        weights[LAYER, ~active.any(0)] = math.nan
        weights[[i for i in range(N) if i != LAYER]] = math.nan

    shape = (rows, m, d, dtype)
    first = triton_blocks.by_rule("hidden", *shape)
    second = triton_blocks.by_rule("combine", *shape, experts=E)
    layer = torch.tensor(LAYER, dtype=torch.int32)
    h = torch.full((E, rows, m), math.nan, dtype=x.dtype)
    ids, count = torch.full((E,), 10**6, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    optional = [w.get(name, w["up"]) for name in ("gate", "up_bias", "gate_bias")]
    launch(
        "hidden",
        (E, -(-m // first.m)),
        (x, active, layer, w["up"], *optional, h, ids, count),
        gpu_triton.hidden_constants(rows, E, m, d, first)
        | {"ACTIVATION": activation, "GATED": gated}
        | {"UP_BIAS": bias, "GATE_BIAS": bias and gated},
    )
    used = np.flatnonzero(active.numpy().any(0))
    assert count.item() == used.size and (ids[: used.size].numpy() == used).all(), (ids, count)
    partial = torch.full((second.splits, rows, d), math.nan)
    launch(
        "combine",
        (-(-d // second.d), second.splits),
        (h, w["down"], layer, ids, count, partial),
        gpu_triton.combine_constants(rows, E, m, d, second) | {"GATHER": True},
    )

    x, active = x.double().numpy(), active.numpy()
    w = {name: value[LAYER].double().numpy() for name, value in w.items()}

    def project(name):
        bias = w[f"{name}_bias"][None] if f"{name}_bias" in w else 0.0
        return np.einsum("bd,emd->bem", x, w[name]) + bias

    act = ACTIVATIONS[activation]
    hidden = act(project("gate")) * project("up") if gated else act(project("up"))
    hidden = np.where(active[..., None], hidden, 0.0)
    down = np.where(active.any(0)[:, None, None], w["down"], 0.0)
    return error(partial.sum(0), np.einsum("bem,emd->bd", hidden, down))


def linear(rows, dtype, k, o, transposed):
    rng = np.random.default_rng(rows)
    x, layer = normal(rng, dtype, rows, k), torch.tensor(LAYER, dtype=torch.int32)
    w = normal(rng, dtype, N, *((o, k) if transposed else (k, o)))
    w[[i for i in range(N) if i != LAYER]] = math.nan
    expected = x.double() @ (w[LAYER].double().T if transposed else w[LAYER].double())
    shape = (rows, *w.shape[1:], dtype)
    if transposed:
        cut = triton_blocks.by_rule("project", *shape)
        y = torch.full((rows, o), math.nan)
        constants = gpu_triton.project_constants(rows, o, k, cut)
        launch("project", (-(-o // cut.m),), (x, w, layer, y), constants)
        return error(y, expected)
    cut = triton_blocks.by_rule("combine", *shape)
    partial = torch.full((cut.splits, rows, o), math.nan)
    constants = gpu_triton.combine_constants(rows, 1, k, o, cut) | {"GATHER": False}
    arrays = (x, w, layer, layer, layer, partial)
    launch("combine", (-(-o // cut.d), cut.splits), arrays, constants)
    return error(partial.sum(0), expected)


def linears(rows, dtype, k, widths):
    """Three matrices in one launch."""
    rng = np.random.default_rng(rows)
    x, layer = normal(rng, dtype, rows, k), torch.tensor(LAYER, dtype=torch.int32)
    ws = [normal(rng, dtype, N, k, o) for o in widths]
    for w in ws:
        w[[i for i in range(N) if i != LAYER]] = math.nan
    cut = triton_blocks.by_rule("combine", rows, k, sum(widths), dtype)
    partial = torch.full((cut.splits, rows, sum(widths)), math.nan)
    grid = sum(-(-o // cut.d) for o in widths), cut.splits
    constants = gpu_triton.three_constants(rows, k, widths, cut)
    launch("combine_three", grid, (x, *ws, layer, partial), constants)
    expected = torch.cat([x.double() @ w[LAYER].double() for w in ws], 1)
    return error(partial.sum(0), expected)


def quantised(rng, dtype, form, *shape, inputs_first):
    """Matrices of a format and the floats that they stand for; of LAYER alone, the rest are NaN."""
    w = rng.normal(size=shape, scale=0.5).astype(np.float32)
    w = quantized.quantize(jnp.asarray(w), form, inputs_first=inputs_first, dtype=dtype)
    codes = torch.tensor(np.asarray(w.codes))
    scales = torch.tensor(np.asarray(w.scales, np.float32)).bfloat16()
    scales[[i for i in range(N) if i != LAYER]] = math.nan
    return codes, scales, np.asarray(w[LAYER].astype("float32"), np.float64)


def ordered(x):
    """Inputs in the order of words, as a torch tensor."""
    return torch.tensor(np.asarray(gpu_codes.ordered(jnp.asarray(x.float().numpy())))).to(x.dtype)


def ffn_codes(rows, dtype, form, kind, m, d, activation="silu", gated=True, bias=False):
    """Error of the two kernels of quantised experts, launched as gpu_codes launches them."""
    rng = np.random.default_rng(rows)
    x, active = normal(rng, dtype, rows, d), torch.tensor(mask(rng, rows, kind))
    names = ("up", "down", "gate")[: 3 if gated else 2]
    w = {n: quantised(rng, dtype, form, N, E, m, d, inputs_first=n == "down") for n in names}
    biases = {n: normal(rng, dtype, N, E, m) for n in ("up", "gate") if bias and n in w}
    for _, scales, _ in w.values():
        scales[LAYER, ~active.any(0)] = math.nan
    first = triton_blocks.by_rule(f"hidden {form}", rows, m, d, dtype)
    second = triton_blocks.by_rule(f"combine {form}", rows, d, m, dtype, experts=E)
    layer = torch.tensor(LAYER, dtype=torch.int32)
    h = torch.full((E, rows, m), math.nan, dtype=x.dtype)
    ids, count = torch.full((E,), 10**6, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    optional = [biases.get(name, h) for name in ("up", "gate")]
    launch(
        "hidden_codes",
        (E, -(-m // first.m)),
        (ordered(x), active, layer, *w["up"][:2], *w.get("gate", w["up"])[:2], *optional)
        + (h, ids, count),
        gpu_codes.hidden_constants(rows, E, m, d, form, first)
        | {"ACTIVATION": activation, "GATED": gated}
        | {"UP_BIAS": bias, "GATE_BIAS": bias and gated},
    )
    used = np.flatnonzero(active.numpy().any(0))
    assert count.item() == used.size and (ids[: used.size].numpy() == used).all(), (ids, count)
    partial = torch.full((second.splits, rows, d), math.nan)
    launch(
        "combine_codes",
        (-(-d // second.m), second.splits),
        (h, *w["down"][:2], layer, ids, count, partial),
        gpu_codes.combine_constants(rows, E, m, d, form, second) | {"GATHER": True},
    )

    x, active = x.double().numpy(), active.numpy()
    bias = {n: b[LAYER].double().numpy()[None] for n, b in biases.items()}

    def project(name):
        return np.einsum("bd,emd->bem", x, w[name][2]) + bias.get(name, 0.0)

    act = ACTIVATIONS[activation]
    hidden = act(project("gate")) * project("up") if gated else act(project("up"))
    hidden = np.where(active[..., None], hidden, 0.0)
    down = np.where(active.any(0)[:, None, None], w["down"][2], 0.0)
    return error(partial.sum(0), np.einsum("bem,emd->bd", hidden, down))


def linear_codes(rows, dtype, form, k, widths):
    """One matrix, [O, K], or three, [K, O], in one launch."""
    rng = np.random.default_rng(rows)
    x, layer = normal(rng, dtype, rows, k), torch.tensor(LAYER, dtype=torch.int32)
    cut = triton_blocks.by_rule(f"combine {form}", rows, sum(widths), k, dtype)
    partial = torch.full((cut.splits, rows, sum(widths)), math.nan)
    grid = sum(-(-o // cut.m) for o in widths), cut.splits
    if len(widths) == 1:
        codes, scales, w = quantised(rng, dtype, form, N, *widths, k, inputs_first=False)
        arrays = (ordered(x), codes, scales, layer, layer, layer, partial)
        constants = gpu_codes.combine_constants(rows, 1, k, *widths, form, cut) | {"GATHER": False}
        launch("combine_codes", grid, arrays, constants)
        return error(partial.sum(0), x.double().numpy() @ w.T)
    ws = [quantised(rng, dtype, form, N, k, o, inputs_first=True) for o in widths]
    constants = gpu_codes.three_constants(rows, k, widths, form, cut)
    arrays = (ordered(x), *(part for w in ws for part in w[:2]), layer, partial)
    launch("combine_three_codes", grid, arrays, constants)
    return error(partial.sum(0), x.double().numpy() @ np.concatenate([w for *_, w in ws], 1))


def attend(rows, dtype, heads, kv_heads, c, t, index, hidden=()):
    """Error of the two kernels; `hidden` places are seen by no row, others by four of five."""
    rng = np.random.default_rng(index)
    q = normal(rng, dtype, rows, heads, c)
    keys, values = (normal(rng, dtype, N, rows, t, kv_heads, c) for _ in "kv")
    seen = torch.tensor(rng.random((rows, t)) < 0.8)
    seen[:, list(hidden)] = False
    seen[:, index] = True
    seen[:, index + 1 :] = False
    for cache in (keys, values):  # what no query may read
        cache[[i for i in range(N) if i != LAYER]] = math.nan
        cache[LAYER][~seen] = math.nan
    constants = gpu_triton.attend_constants(rows, t, kv_heads, heads // kv_heads, c, dtype)
    splits = constants["SPLITS"]
    partial = torch.full((splits, rows, heads, c), math.nan)
    sums, y = torch.full((splits, rows, heads, 2), math.nan), torch.empty_like(q)
    layer, last = (torch.tensor(i, dtype=torch.int32) for i in (LAYER, index))
    arrays = (q, keys, values, seen, layer, last, partial, sums)
    launch("attend", (rows * kv_heads, splits), arrays, constants)
    constants = gpu_triton.merge_constants(rows * heads, c, splits)
    launch("merge", (rows * heads,), (partial, sums, y), constants)

    group = heads // kv_heads
    k, v = (x[LAYER].double().repeat_interleave(group, 2) for x in (keys, values))
    k, v = (torch.where(seen[..., None, None], x, 0.0) for x in (k, v))
    logits = torch.einsum("bhc,bthc->bht", q.double(), k) / math.sqrt(c)
    weights = torch.softmax(torch.where(seen[:, None], logits, -math.inf), 2)
    return error(y.double(), torch.einsum("bht,bthc->bhc", weights, v))


def error(y, expected):
    y, expected = np.asarray(y, np.float64), np.asarray(expected)
    return float(np.abs(y - expected).max() / (np.abs(expected).max() or 1.0))


def main():
    repair_dot()
    errors = {}
    for rows, kind in itertools.product(
        (1, 2, 3, 8, 16), ("none", "one", "some", "disjoint", "all")
    ):
        errors[f"float32 rows {rows} {kind}"] = ffn(rows, "float32", kind, 8, 48)
        if kind in ("none", "some"):
            errors[f"bfloat16 rows {rows} {kind}"] = ffn(rows, "bfloat16", kind, 8, 48)
    errors["float32 rows 33 some"] = ffn(33, "float32", "some", 8, 48)
    for activation, gated, bias in itertools.product(ACTIVATIONS, (True, False), (True, False)):
        name = f"float32 rows 1 {activation} gated={gated} bias={bias}"
        errors[name] = ffn(1, "float32", "some", 4, 32, activation, gated, bias)
    for dtype, rows in itertools.product(("float32", "bfloat16"), (1, 3)):
        name = f"{dtype} rows {rows} silu gated=True bias=True"
        errors[name] = ffn(rows, dtype, "some", 16, 32, bias=True)
        for m, d in ((32, 544), (64, 80), (6, 20), (43, 128)):  # several tiles; odd sizes
            errors[f"{dtype} rows {rows} {m}x{d}"] = ffn(rows, dtype, "some", m, d)
        for transposed, (k, o) in itertools.product((False, True), ((600, 40), (24, 84))):
            name = f"{dtype} rows {rows} linear {k}x{o} transposed={transposed}"
            errors[name] = linear(rows, dtype, k, o, transposed)
    for dtype, rows in itertools.product(("float32", "bfloat16"), (1, 3)):
        for k, widths in ((40, (96, 48, 48)), (70, (300, 20, 36))):
            name = f"{dtype} rows {rows} linears {k}x{widths}"
            errors[name] = linears(rows, dtype, k, widths)
        for heads, kv_heads, c in ((2, 2, 16), (6, 2, 24), (4, 1, 80), (71, 1, 64)):
            for t, index in ((256, 0), (256, 255), (1200, 700)):
                name = f"{dtype} rows {rows} attend {heads}/{kv_heads} x {c}, {index} of {t}"
                errors[name] = attend(rows, dtype, heads, kv_heads, c, t, index, range(3, 200))
    for form, dtype, rows in itertools.product(quantized.BITS, ("float32", "bfloat16"), (1, 3, 9)):
        for kind, (m, d) in (("some", (32, 96)), ("one", (64, 544)), ("none", (32, 32))):
            name = f"{dtype} rows {rows} {form} {m}x{d} {kind}"
            errors[name] = ffn_codes(rows, dtype, form, kind, m, d)
        for k, widths in ((64, (40,)), (672, (84,)), (32, (96, 48, 48)), (352, (300, 20, 36))):
            name = f"{dtype} rows {rows} {form} linear {k}x{widths}"
            errors[name] = linear_codes(rows, dtype, form, k, widths)
        name = f"{dtype} rows {rows} {form} gelu gated=False bias=True"
        errors[name] = ffn_codes(rows, dtype, form, "disjoint", 32, 64, "gelu", False, True)
        name = f"{dtype} rows {rows} {form} relu gated=True bias=True"
        errors[name] = ffn_codes(rows, dtype, form, "all", 32, 64, "relu", True, True)
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
