"""Time the sparse FFN kernel against the best dense FFN and the limit of memory bandwidth.

    python benchmarks/ffn.py                                (LLaMA2-7B's FFN, batch 1: two minutes)
    python benchmarks/ffn.py --batch 1,2,4,8,16 --dtype bfloat16 --json benchmarks/results/ffn.json
    python benchmarks/ffn.py --brief                        (two sparsities in words: ten seconds)

Sparse times include the cost of routing: router product, threshold, finding the active experts, and
their FFN. They are medians over interleaved rounds, in which every measurement takes its turn; a
round goes through `--layers` different layers, so that no cache holds what the next call reads.
Dense is the faster of plain jax on whole matrices and this implementation with all experts on,
without a router; the two are compared first, and only the faster joins the rounds (the slower would
leave its temporaries behind for the others). The floor is the bytes of the active experts and the
router over the bandwidth measured in the same run: of reading on a CPU, of copying elsewhere.

Routing `uniform`: each row of the batch picks its experts independently. `skewed`: experts differ
in popularity (normally distributed logits shared by all rows, as strong as the token's own), so
rows overlap, as in trained models. The table's sparsity is that of a row; `union` is the share of
experts that no row of the batch uses, which is what saves time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lte_jax import kernels, report
from lte_jax.errors import cli_errors
from lte_jax.files import atomic_write
from lte_jax.kernels import cpu

_MATRICES = ("gate", "up", "down")
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.95)


def bandwidth(cores: int) -> float:
    """Bytes per second: read by the CPU's kernels, copied on an accelerator; best of several."""
    if jax.default_backend() == "cpu" and kernels.unavailable("cpu") is None:
        array, read = jnp.ones(2**28, jnp.float32), jax.jit(cpu.read)
        return array.nbytes / _least(lambda: jax.block_until_ready(read(array)))
    if jax.default_backend() == "cpu":
        array = np.ones((cores, 2**26), np.float32)
        with concurrent.futures.ThreadPoolExecutor(cores) as pool:
            return array.nbytes / _least(lambda: list(pool.map(np.max, array)))
    array = jnp.zeros(2**30, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return 2 * array.nbytes / _least(lambda: jax.block_until_ready(copy(array)))


def _least(function: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def make_weights(flags, dtype: str) -> dict[str, jax.Array]:
    """gate, up, down [N, E, M, D], router [N, D, E] and popularity [N, E] of random layers."""
    d, m, n = flags.d_model, flags.expert_size, flags.layers
    e = flags.d_ff // m

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, dtype):  # layer by layer: random bits take twice the memory
        keys = jax.random.split(key, n)
        return jax.lax.map(lambda k: jax.random.normal(k, shape, dtype) * d**-0.5, keys)

    keys = jax.random.split(jax.random.key(0), 5)
    weights = {
        name: normal(key, (e, m, d), dtype) for name, key in zip(_MATRICES, keys, strict=False)
    }
    weights["router"] = normal(keys[3], (d, e), "float32")
    weights["popularity"] = normal(keys[4], (e,), "float32") * d**0.5
    return weights


def sparse(weights, x_BD, threshold_NB, strength, implementation: str):
    """The sum of the layers' outputs, with experts chosen by the routers."""

    def layer(y_BD, scanned):
        popularity_E, threshold_B, index = scanned
        logits_BE = kernels.linear(
            x_BD.astype(jnp.float32), weights["router"], layer=index, implementation=implementation
        )
        scores_BE = jax.nn.sigmoid(logits_BE + strength * popularity_E)
        active_BE = scores_BE > threshold_B[:, None]
        return y_BD + _ffn(weights, x_BD, active_BE, index, implementation), active_BE

    indices = jnp.arange(len(weights["up"]), dtype=jnp.int32)
    return jax.lax.scan(layer, x_BD, (weights["popularity"], threshold_NB, indices))


def dense(weights, x_BD, implementation: str):
    """The sum of the layers' outputs, with all experts on and no router."""
    active_BE = jnp.ones((len(x_BD), weights["up"].shape[1]), bool)

    def layer(y_BD, index):
        return y_BD + _ffn(weights, x_BD, active_BE, index, implementation), None

    return jax.lax.scan(layer, x_BD, jnp.arange(len(weights["up"]), dtype=jnp.int32))[0]


def plain(layers, x_BD):
    """The same in plain jax, each layer's matrices [F, D] an array of their own."""
    y_BD = x_BD
    for w in layers:
        y_BD += (jax.nn.silu(x_BD @ w["gate"].T) * (x_BD @ w["up"].T)) @ w["down"]
    return y_BD


def _ffn(weights, x_BD, active_BE, index, implementation: str):
    experts = {name: weights[name] for name in _MATRICES}
    return kernels.sparse_ffn(
        x_BD, active_BE, experts, activation="silu", layer=index, implementation=implementation
    )


def thresholds(weights, x_BD, strength: float, sparsity: float) -> jax.Array:
    """The thresholds [N, B], float32, that give each row this sparsity."""
    logits_NBE = jnp.einsum("BD,NDE->NBE", x_BD.astype(jnp.float32), weights["router"])
    logits_NBE += strength * weights["popularity"][:, None]
    sorted_NBE = jnp.sort(jax.nn.sigmoid(logits_NBE), axis=-1)
    idle = round(sparsity * sorted_NBE.shape[-1])
    if idle == 0:
        return jnp.full(sorted_NBE.shape[:2], -1.0)
    return sorted_NBE[..., idle - 1 : idle + 1].mean(-1)  # between two scores: no rounding decides


def measure(flags, dtype: str, bytes_per_s: float) -> list[dict]:
    """All rows of the table for one type."""
    weights = make_weights(flags, dtype)
    layers, experts = weights["up"].shape[:2]
    matrices = {name: weights[name].reshape(layers, -1, flags.d_model) for name in _MATRICES}
    apart = [{name: w[i] for name, w in matrices.items()} for i in range(layers)]
    del matrices
    itemsize = jnp.dtype(dtype).itemsize
    router_bytes = weights["router"][0].nbytes
    expert_bytes = 3 * flags.expert_size * flags.d_model * itemsize
    rows = []
    for batch in flags.batch:
        x_BD = jax.random.normal(jax.random.key(batch), (batch, flags.d_model), dtype)
        run = jax.jit(functools.partial(dense, implementation=flags.implementation))
        denses = {
            "plain": functools.partial(jax.jit(plain), apart, x_BD),
            "kernel": functools.partial(run, weights, x_BD),
        }
        first = interleave(denses, 3, f"{dtype}, batch {batch}, dense")
        best = min(denses, key=first.__getitem__)
        calls: dict[object, Callable[[], object]] = {best: denses[best]}
        run = jax.jit(functools.partial(sparse, implementation=flags.implementation))
        # A single row overlaps with no other.
        for routing in flags.routing if batch > 1 else flags.routing[:1]:
            strength = {"uniform": 0.0, "skewed": 1.0}[routing]
            for sparsity in flags.sparsity:
                tau_NB = thresholds(weights, x_BD, strength, sparsity)
                calls[routing, sparsity] = functools.partial(
                    run, weights, x_BD, tau_NB, jnp.float32(strength)
                )
        times = interleave(calls, flags.rounds, f"{dtype}, batch {batch}")
        dense_s = times[best] / layers
        for key in calls:
            if isinstance(key, str):
                continue
            routing, sparsity = key
            y_BD, active_NBE = calls[key]()
            union = float(active_NBE.any(axis=1).mean())
            floor_s = (union * experts * expert_bytes + router_bytes) / bytes_per_s
            seconds = times[key] / layers
            rows.append(
                {
                    "implementation": kernels.resolve(flags.implementation),
                    "device": jax.devices()[0].device_kind,
                    "dtype": dtype,
                    "batch": batch,
                    "routing": routing,
                    "sparsity": 1.0 - float(active_NBE.mean()),
                    "union_sparsity": 1.0 - union,
                    "time_ms": 1e3 * seconds,
                    "dense_ms": 1e3 * dense_s,
                    "dense": best,
                    "plain_dense_ms": 1e3 * first["plain"] / layers,
                    "ratio_to_dense": seconds / dense_s,
                    "floor_ms": 1e3 * floor_s,
                }
            )
        check(weights, x_BD, active_NBE[0], flags.implementation)
    return rows


def interleave(calls, rounds: int, title: str) -> dict:
    """Median seconds of each call; the first round compiles and is not counted."""
    times: dict = {key: [] for key in calls}
    for turn in tqdm(range(rounds + 1), desc=title, leave=False):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}


def check(weights, x_BD, active_BE, implementation: str) -> None:
    """Ends the program if a layer's output differs from the reference's."""
    got, expected = (
        _ffn(weights, x_BD, active_BE, jnp.int32(0), name).astype(jnp.float32)
        for name in (implementation, "reference")
    )
    error, largest = float(jnp.abs(got - expected).max()), float(jnp.abs(expected).max())
    share = 1e-5 if x_BD.dtype == jnp.float32 else 2e-2
    if not error <= share * largest:  # 0 of 0 where no expert is active
        raise SystemExit(
            f"error: {implementation} is off by {error:.1e} of {largest:.1e}, more than {share:.0e}"
        )


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [  # the last column is the share of the bandwidth that is used
        "| type | batch | rows | sparsity | union | ms | dense ms | of dense | floor ms | used |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['dtype']} | {r['batch']} | {r['routing']} | {r['sparsity']:.0%} "
            f"| {r['union_sparsity']:.0%} | {r['time_ms']:.3g} | {r['dense_ms']:.3g} "
            f"({r['dense']}) | {r['ratio_to_dense']:.2f} | {r['floor_ms']:.3g} "
            f"| {r['floor_ms'] / r['time_ms']:.0%} |"
        )
    return "\n".join(lines)


def in_words(rows: list[dict]) -> str:
    """What skipping gains, in a sentence."""
    parts = [
        f"{r['time_ms']:.3g} ms with {r['sparsity']:.0%} of its experts skipped "
        f"({r['ratio_to_dense']:.2f} of dense)"
        for r in rows
    ]
    return (
        "A model gains time once reading its weights is what takes it. An FFN layer of LLaMA2-7B "
        f"here, a token, {rows[0]['dtype']}: {rows[0]['dense_ms']:.3g} ms dense, "
        + ", ".join(parts)
    )


def listed(kind):
    """A flag's comma-separated values."""
    return lambda text: tuple(kind(word) for word in text.split(","))


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--d-ff", type=int, default=11008)
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", type=listed(str), default=("float32", "bfloat16"))
    parser.add_argument("--batch", type=listed(int), default=(1,))
    parser.add_argument("--sparsity", type=listed(float), default=SPARSITIES)
    parser.add_argument("--routing", type=listed(str), default=("uniform", "skewed"))
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here as well")
    brief = "a few rounds of bfloat16 at 50 and 90%, told in a sentence"
    parser.add_argument("--brief", action="store_true", help=brief)
    flags = parser.parse_args()
    if flags.brief:
        flags.dtype, flags.sparsity, flags.layers, flags.rounds = ("bfloat16",), (0.5, 0.9), 2, 5
        print(in_words(measure(flags, "bfloat16", math.inf)))
        return
    bytes_per_s = bandwidth(os.cpu_count() or 1)
    rows = [row for dtype in flags.dtype for row in measure(flags, dtype, bytes_per_s)]
    publish("ffn", rows, table(rows), bytes_per_s, flags)


def publish(benchmark: str, rows: list[dict], table: str, bytes_per_s: float, flags) -> None:
    """Prints the table and, with --json, writes the rows with their environment."""
    print(table)
    print(f"\nbandwidth {bytes_per_s / 1e9:.1f} GB/s; medians of {flags.rounds} rounds")
    if flags.json:
        record = report.environment() | {
            "benchmark": benchmark,
            "bandwidth_gb_per_s": bytes_per_s / 1e9,
            "rows": rows,
        }
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(flags.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
