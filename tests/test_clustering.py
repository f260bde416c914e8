"""Clusters of equal size: all vectors, good ones, the same on every machine."""

import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
from tiny import assert_order

from lte_jax import clustering
from lte_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Inertia of k-means-constrained 0.9.1, as in test_moefication.py, of the rows that --layer
# 2816x1024 makes, experts of 32.
PACKAGE_STRUCTURED = 2086.9305


@pytest.mark.parametrize("neurons, size", [(48, 1), (48, 2), (48, 12), (48, 24), (48, 48), (1, 1)])
def test_clusters_are_equal_and_cover_every_neuron(neurons, size):
    x_FD = np.random.default_rng(0).standard_normal((neurons, 7)).astype(np.float32)
    assert_order(clustering.balanced_kmeans(x_FD, neurons // size), neurons, size)


def test_degenerate_rows_still_give_equal_clusters():
    x_FD = np.ones((24, 5), np.float32)
    x_FD[:9] = 0  # dead neurons
    assert_order(clustering.balanced_kmeans(x_FD, 6), 24, 4)
    assert_order(clustering.balanced_kmeans(np.zeros((24, 5), np.float32), 6), 24, 4)


def test_planted_clusters_are_found():
    rng = np.random.default_rng(0)
    planted_F = rng.permutation(np.repeat(np.arange(20), 16))
    x_FD = rng.standard_normal((20, 64))[planted_F] + rng.standard_normal((320, 64))
    order_EM = clustering.balanced_kmeans(clustering.normalize(x_FD), 20)
    assert (planted_F[order_EM] == planted_F[order_EM[:, :1]]).all()


def test_no_swap_is_left_that_would_lower_the_inertia_much():
    """The bookkeeping of the search against inertia computed from its definition."""
    x_FD = clustering.normalize(np.random.default_rng(1).standard_normal((36, 12)))
    order_EM = clustering.balanced_kmeans(x_FD, 6)
    found = clustering.inertia(x_FD, order_EM)
    for i in range(36):
        for j in range(i):
            swapped_F = order_EM.ravel().copy()
            swapped_F[[i, j]] = swapped_F[[j, i]]
            assert clustering.inertia(x_FD, swapped_F.reshape(6, 6)) > found * (
                1 - 2 * clustering.TOLERANCE
            )


def test_kmeans_minimises_over_all_splits_of_a_small_layer():
    rng = np.random.default_rng(2)
    x_FD = clustering.normalize(rng.standard_normal((8, 3)))
    found = clustering.inertia(x_FD, clustering.balanced_kmeans(x_FD, 2))
    splits = (rng.permutation(8).reshape(2, 4) for _ in range(2000))  # there are 35
    assert found <= min(clustering.inertia(x_FD, split) for split in splits) + 1e-3


def test_inertia_within_one_percent_of_the_package():
    structured = runpy.run_path(str(REPOSITORY / "benchmarks/kmeans.py"))["structured"]
    x_FD = clustering.normalize(structured(2816, 1024))
    assert (
        clustering.inertia(x_FD, clustering.balanced_kmeans(x_FD, 88)) <= 1.01 * PACKAGE_STRUCTURED
    )


def test_gram_has_no_rounding():
    """The claim on which reproducibility rests: float32 products and sums are those of integers."""
    x_FD = clustering.normalize(np.random.default_rng(0).standard_normal((64, 3000)))
    gram_FF = clustering.exact_gram(x_FD)
    scale = (4095 - 0.5 * 3000**0.5) / np.linalg.norm(x_FD.astype(np.float64), axis=1).max()
    integers_FD = np.rint(x_FD * np.float32(scale)).astype(np.int64)
    np.testing.assert_array_equal(gram_FF.astype(np.int64), integers_FD @ integers_FD.T)
    assert gram_FF.max() < 2**24
    np.testing.assert_allclose(gram_FF / scale**2, x_FD @ x_FD.T, atol=1e-3)


CHECKSUM = """
import zlib, numpy as np
from lte_jax.clustering import balanced_kmeans, normalize
x_FD = np.random.PCG64(0).random_raw(768 * 256).reshape(768, 256) / 2.0**64 - 0.5
print(zlib.crc32(balanced_kmeans(normalize(x_FD), 24, seed=3).astype("<i4").tobytes()))
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"OPENBLAS_NUM_THREADS": "1"},
        {"OPENBLAS_NUM_THREADS": "5"},
        {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"},
    ],
    ids=["one-thread", "five-threads", "old-processor"],
)
def test_same_clusters_on_any_number_of_threads_and_any_machine(settings):
    """A number recorded on one machine: if it moves, old experiments cannot be reproduced."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)} | settings
    command = [sys.executable, "-c", CHECKSUM]
    found = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert int(found) == 3824965434


def test_a_long_row_disturbs_no_clusters():
    """Records are quantised by the longest: with one of 5,000 the others all were zeros."""
    rng = np.random.default_rng(0)
    planted_F = rng.permutation(np.repeat(np.arange(20), 16))
    x_FD = rng.standard_normal((20, 64))[planted_F] + rng.standard_normal((320, 64))
    x_FD[0] *= 5000
    order_EM = clustering.balanced_kmeans(x_FD, 20)
    together = [np.bincount(planted_F[expert_M[expert_M > 0]]).max() for expert_M in order_EM]
    assert sum(together) / 319 >= 0.95


def test_bad_input_clusters_that_do_not_divide():
    with pytest.raises(UserError, match="num_clusters=5 does not divide 48 rows"):
        clustering.balanced_kmeans(np.ones((48, 3), np.float32), 5)
