"""Time and inertia of the balanced clustering of neurons, compared with alternatives.

    python benchmarks/kmeans.py --layer 11008x4096
    python benchmarks/kmeans.py --layer 2816x1024 --package
    python benchmarks/kmeans.py --expert-size 8 --package \
        --tensor MODEL/model.safetensors:model.layers.0.mlp.gate_proj.weight

A layer FxD is made of random vectors with some structure; a tensor is read from a safetensors
file. Inertia is the sum of squared distances of the L2-normalised rows to the mean of their
cluster. Compared are `lte_jax`, a random grouping, k-means without balance (ten rounds of Lloyd's
algorithm from random rows; clusters of any size) and, with --package, k-means-constrained (pip
install k-means-constrained; its defaults, random_state=0), which takes 15 minutes at 11008x4096.
CPU seconds are summed over threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lte_jax.clustering import inertia, normalize
from lte_jax.config import LTEConfig
from lte_jax.errors import UserError, cli_errors
from lte_jax.moefication import group_neurons


def structured(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows [F, D] around random centres, one for 32 rows, in dimensions of falling variance."""
    rng = np.random.default_rng(seed)
    spread_D = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    noise_FD = rng.standard_normal((rows, width), dtype=np.float32) * spread_D
    centres_KD = rng.standard_normal((rows // 32, width), dtype=np.float32) * spread_D
    return noise_FD + np.float32(0.5) * centres_KD[rng.integers(0, rows // 32, rows)]


def lloyd_inertia(x_FD: np.ndarray, num_clusters: int, rounds: int = 10) -> float:
    """Inertia of k-means without balance."""
    centres_ED = x_FD[np.random.default_rng(0).permutation(len(x_FD))[:num_clusters]]
    for _ in range(rounds):
        distances_FE = np.sum(centres_ED * centres_ED, axis=1) - 2 * (x_FD @ centres_ED.T)
        cluster_F = distances_FE.argmin(axis=1)
        for cluster in np.unique(cluster_F):
            centres_ED[cluster] = x_FD[cluster_F == cluster].mean(axis=0)
    return float(np.sum((x_FD - centres_ED[cluster_F]) ** 2, dtype=np.float64))


def package_order(x_FD: np.ndarray, num_clusters: int, n_init: int) -> np.ndarray:
    """Clusters [E, M] of the k-means-constrained package."""
    from k_means_constrained import KMeansConstrained

    size = len(x_FD) // num_clusters
    clusterer = KMeansConstrained(num_clusters, size, size, n_init=n_init, random_state=0)
    return np.argsort(clusterer.fit_predict(x_FD), kind="stable").reshape(num_clusters, size)


def read_tensor(name: str) -> np.ndarray:
    """The tensor FILE:NAME."""
    from safetensors import safe_open

    path, _, tensor = name.partition(":")
    with safe_open(path, "numpy") as file:
        return file.get_tensor(tensor).astype(np.float32)


def report(name: str, first_FD: np.ndarray, args: argparse.Namespace) -> None:
    """Prints the rows of one layer."""
    lte = LTEConfig(expert_size=args.expert_size, grouping="kmeans")
    random = dataclasses.replace(lte, grouping="random")
    x_FD = normalize(first_FD)
    experts = len(x_FD) // lte.expert_size
    print(f"\n{name}: {len(x_FD)} x {x_FD.shape[1]}, {experts} clusters of {lte.expert_size}\n")
    print("| method | inertia | to lte_jax | wall s | CPU s |\n|---|---|---|---|---|")

    def measure(method: str, make: Callable[[], np.ndarray | float], base: float | None) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        made = make()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        total = made if isinstance(made, float) else inertia(x_FD, made)
        change = f"{100 * (total / (base or total) - 1):+.2f}%"
        print(f"| {method} | {total:.4f} | {change} | {wall:.2f} | {cpu:.2f} |", flush=True)
        return total

    ours = measure("lte_jax", lambda: group_neurons(first_FD, lte, seed=args.seed), None)
    measure("random", lambda: group_neurons(first_FD, random, seed=args.seed), ours)
    measure("Lloyd, unbalanced", lambda: lloyd_inertia(x_FD, experts), ours)
    if args.package:
        version = importlib.metadata.version("k-means-constrained")
        label = f"k-means-constrained {version}, n_init={args.n_init}"
        measure(label, lambda: package_order(x_FD, experts, args.n_init), ours)


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layer", action="append", default=[], metavar="FxD")
    parser.add_argument("--tensor", action="append", default=[], metavar="FILE:NAME")
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--package", action="store_true", help="run k-means-constrained too")
    parser.add_argument("--n-init", type=int, default=10, help="runs of the package")
    args = parser.parse_args()
    if args.package:
        try:
            importlib.metadata.version("k-means-constrained")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                "--package needs k-means-constrained: pip install k-means-constrained"
            ) from None
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}")
    for size in args.layer or ([] if args.tensor else ["2816x1024"]):
        report(size, structured(*map(int, size.split("x"))), args)
    for name in args.tensor:
        report(name.partition(":")[2], read_tensor(name), args)


if __name__ == "__main__":
    main()
