"""Finds the Triton kernels' fastest block sizes on this machine's GPU.

`python -m lte_jax.kernels.tune` writes tuned/<device>.json beside this file, which triton_blocks.py
reads; entries of other shapes stay in it. The search starts from the rule for the shape and varies
one number at a time until a round gains nothing: some thirty variants per kernel, a second or two
each, nearly all of it compilation.

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from lte_jax.errors import Parser, UserError, cli_errors
from lte_jax.files import atomic_write

from . import gpu_triton, triton_blocks
from .gpu_codes import combine as combine_codes
from .gpu_codes import hidden as hidden_codes
from .gpu_codes import ordered
from .quantized import BITS, GROUP, Quantized, Weight, quantize
from .reference import Unsupported
from .triton_blocks import Blocks

ROUNDS = 3  # at most, of varying each number
LAYERS, INPUTS = 8, 4  # distinct calls in a measurement: XLA would compute equal ones only once
Run = Callable[[tuple, int, Blocks], jax.Array]  # arrays; call number below LAYERS * INPUTS; blocks


@cli_errors()
def main() -> None:
    """Parses the flags and runs `tune` for each number of rows."""
    parser = Parser(prog="python -m lte_jax.kernels.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--d-model", type=int, default=4096, metavar="D")
    parser.add_argument("--d-ff", type=int, default=11008, metavar="F", help="E times M")
    parser.add_argument("--expert-size", type=int, default=32, metavar="M")
    parser.add_argument(
        "--linear",
        type=_matrix,
        nargs="*",
        metavar="KxO",
        help="other matrices of the model, inputs by outputs; KxOt: stored [O, K]; KxO:int6: of so "
        "many bits. Default: LLaMA2-7B's projections, those of q, k and v together, and its head "
        "(of int6 beside int4, as lte_jax.quantize has it)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16], metavar="B")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of idle experts per row")
    parser.add_argument(
        "--quantize",
        choices=[*BITS],
        help="weights of so many bits, but where --linear says another number",
    )
    parser.add_argument("--no-gate", action="store_true", help="an FFN of two matrices")
    parser.add_argument("--out", type=Path, help="the file to write (default: tuned/<device>.json)")
    flags = parser.parse_args()
    if flags.linear is None:
        head = "4096x32000" + ":int6" * (flags.quantize == "int4")
        flags.linear = [*map(_matrix, ("4096x12288", "4096x4096", head))]
    if reason := gpu_triton.unavailable():
        raise UserError(f"no block sizes can be timed here: {reason}")
    path = flags.out or triton_blocks.tuned_path()
    try:
        triton_blocks.read_tuned(path)  # raises before the work if it is damaged
        for rows in flags.rows:
            for name, cut, measured in tune(flags, rows):
                _add(path, name, cut, measured)
    except Unsupported as reason:
        raise UserError(str(reason)) from None
    print(path)


def tune(flags: argparse.Namespace, b: int) -> Iterator[tuple[str, Blocks, dict[str, float]]]:
    """For each kernel and shape: its key, the best blocks, and what was measured."""
    d, m, dtype = flags.d_model, flags.expert_size, jnp.dtype(flags.dtype)
    if m < 1 or flags.d_ff % m:
        raise UserError(f"--d-ff {flags.d_ff} is not a multiple of --expert-size {m}")
    inputs = {m: flags.quantize, d: flags.quantize}
    inputs |= {k: kind or flags.quantize for k, _, _, kind in flags.linear}
    if bad := [k for k, kind in inputs.items() if kind and k % GROUP]:
        raise UserError(f"--quantize: {bad[0]} inputs: expected a multiple of {GROUP}")
    e = flags.d_ff // m
    keys = iter(jax.random.split(jax.random.key(0), 100 + 10 * len(flags.linear)))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype) / math.sqrt(shape[-1])

    def weight(*shape: int, inputs_first: bool, kind: str | None = flags.quantize) -> Weight:
        w = normal(*shape)
        return w if kind is None else quantize(w, kind, inputs_first=inputs_first, dtype=dtype)

    names = ("up", "down") if flags.no_gate else ("up", "down", "gate")
    weights = {name: weight(LAYERS, e, m, d, inputs_first=name == "down") for name in names}
    x = [normal(b, d) for _ in range(INPUTS)]
    active = [jax.random.uniform(next(keys), (b, e)) >= flags.sparsity for _ in range(INPUTS)]
    used = sum(float(a.any(axis=0).mean()) for a in active) / INPUTS  # of the experts, by some row
    form = f" {flags.quantize}" if flags.quantize else ""
    size = used * _bytes(weights["down"])
    arrays = (x, active, weights)
    yield best(f"hidden{form}", b, m, d, dtype.name, 1, _hidden, arrays, size * (len(names) - 1))

    rule = triton_blocks.by_rule(f"hidden{form}", b, m, d, dtype.name)
    lists = [
        jax.jit(_hidden, static_argnums=(1, 2))(arrays, i * LAYERS, rule) for i in range(INPUTS)
    ]
    sizes = (d, m) if form else (m, d)
    arrays = (lists, weights["down"])
    yield best(f"combine{form}", b, *sizes, dtype.name, e, _combine, arrays, size)

    for k, o, transposed, kind in flags.linear:
        shape, kind = (o, k) if transposed else (k, o), kind or flags.quantize
        w = weight(LAYERS, *shape, inputs_first=not transposed, kind=kind)
        arrays = ([normal(b, k) for _ in range(INPUTS)], w)
        if kind:
            yield best(f"combine {kind}", b, o, k, dtype.name, 1, _linear, arrays, _bytes(w))
        else:
            kernel, run = ("project", _project) if transposed else ("combine", _linear)
            yield best(kernel, b, *shape, dtype.name, 1, run, arrays, _bytes(w))


def _bytes(w: Weight) -> float:
    """Of one of the layers."""
    return sum(part.nbytes for part in jax.tree.leaves(w)) / LAYERS


def _matrix(text: str) -> tuple[int, int, bool, str | None]:
    """Inputs, outputs, whether it is stored [O, K], and its format if it says one."""
    if not (found := re.fullmatch(rf"(\d+)x(\d+)(t?)(?::({'|'.join(BITS)}))?", text)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected inputs by outputs, such as 4096x4096 or 4096x32000:int6"
        )
    return int(found[1]), int(found[2]), bool(found[3]), found[4]


# Each runs call number i: the layer varies first, then the input.


def _hidden(arrays: tuple, i: int, cut: Blocks):
    x, active, weights = arrays
    layer, case = jnp.int32(i % LAYERS), i // LAYERS
    run = hidden_codes if isinstance(weights["up"], Quantized) else gpu_triton.hidden
    return run(x[case], active[case], weights, layer, activation="silu", cut=cut)


def _combine(arrays: tuple, i: int, cut: Blocks):
    lists, down = arrays
    h_EBM, ids_E, count = lists[i // LAYERS]
    run = combine_codes if isinstance(down, Quantized) else gpu_triton.combine
    return run(h_EBM, down, jnp.int32(i % LAYERS), ids_E, count, cut=cut)


def _linear(arrays: tuple, i: int, cut: Blocks):
    x, w = arrays
    if isinstance(w, Quantized):
        return combine_codes(ordered(x[i // LAYERS])[None], w, jnp.int32(i % LAYERS), cut=cut)
    return gpu_triton.combine(x[i // LAYERS][None], w[:, None], jnp.int32(i % LAYERS), cut=cut)


def _project(arrays: tuple, i: int, cut: Blocks):
    x, w = arrays
    return gpu_triton.project(x[i // LAYERS], w, jnp.int32(i % LAYERS), cut=cut)


def best(
    kernel: str,
    b: int,
    m: int,
    d: int,
    dtype: str,
    experts: int,
    run: Run,
    arrays: tuple,
    size: float,
) -> tuple[str, Blocks, dict[str, float]]:
    """The fastest blocks found for a kernel that reads `size` bytes of weights in a call."""
    from tqdm import tqdm

    rule = triton_blocks.by_rule(kernel, b, m, d, dtype, experts=experts)
    name = triton_blocks.key(kernel, b, m, d, dtype)
    times = {rule: milliseconds(run, arrays, rule)}
    bar = tqdm(desc=name, unit=" variants", initial=1)
    for _ in range(ROUNDS):
        before = min(times.values())
        for field, values in variants(kernel, b, dtype, rule).items():
            for value in values:
                cut = min(times, key=times.__getitem__)._replace(**{field: value})
                if cut not in times:
                    times[cut] = milliseconds(run, arrays, cut)
                    bar.update()
                    bar.set_postfix_str(f"{size / min(times.values()) / 1e6:.0f} GB/s")
        if min(times.values()) == before:
            break
    bar.close()
    cut = min(times, key=times.__getitem__)
    if math.isinf(times[cut]):
        raise UserError(f"{name}: no variant runs on this GPU")
    measured = {"ms": times[cut], "ms_by_rule": times[rule], "gb_per_s": size / times[cut] / 1e6}
    return name, cut, measured


def variants(kernel: str, b: int, dtype: str, rule: Blocks) -> dict[str, list[int]]:
    """Values to try for each number; a tensor core needs at least 16 rows of weights."""
    size = jnp.dtype(dtype).itemsize
    low = 1 if b == 1 else 16
    if " " in kernel:  # tiles of codes are cut from blocks of 16 outputs by 32 inputs
        return {
            "m": [m for m in (16, 32, 64, 128) if rule.m / 4 <= m <= rule.m * 4],
            "d": [n for n in (128, 256, 512, 1024, 2048) if rule.d / 4 <= n <= rule.d * 4],
            "stages": [1, 2, 3, 4, 5, 7],
            "warps": [1, 2, 4, 8],
        } | ({"splits": _splits(rule)} if kernel.startswith("combine") else {})
    found = {
        "m": [m for m in (1, 2, 4, 8, 16, 32, 64) if low <= m and rule.m / 4 <= m <= rule.m * 4],
        "d": [n // size for n in (128, 256, 512, 1024, 2048, 4096)],
        "stages": [1, 2, 3, 4, 5, 7, 9],
        "warps": [1, 2, 4, 8],
    }
    if kernel == "combine":
        found["splits"] = _splits(rule)
    return found


def _splits(rule: Blocks) -> list[int]:
    return sorted({max(1, round(rule.splits * f)) for f in (0.25, 0.5, 1, 1.5, 2, 4)})


def milliseconds(run: Run, arrays: tuple, cut: Blocks) -> float:
    """Median time of a call; infinite if these blocks cannot be compiled or run."""
    calls = LAYERS * INPUTS
    try:
        everything = jax.jit(lambda arrays: [run(arrays, i, cut) for i in range(calls)])
        jax.block_until_ready(everything(arrays))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(everything(arrays))
            times.append(time.perf_counter() - start)
    except Exception:  # Triton, ptxas and XLA raise different errors for tiles that are too large
        return math.inf
    return statistics.median(times) / calls * 1e3


def _add(path: Path, name: str, cut: Blocks, measured: dict[str, float]) -> None:
    """Adds a result to the file, which is replaced atomically."""
    import jax_triton
    import triton

    found = json.loads(path.read_text()) if path.exists() else {}
    found["device"] = jax.devices()[0].device_kind
    found["versions"] = {
        "jax": jax.__version__,
        "jax_triton": jax_triton.__version__,
        "triton": triton.__version__,
    }
    found.setdefault("blocks", {})[name] = cut._asdict()
    found.setdefault("measured", {})[name] = {k: round(v, 5) for k, v in measured.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
