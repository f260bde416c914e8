"""Balanced clustering: splits vectors into groups of equal size, the same on every machine.

It needs only inner products, an [F, F] float32 matrix: 0.5 GB for a layer of LLaMA-7B, 3.3 GB for
one of LLaMA-70B.

Dimension key: F = E*M vectors (neurons)  E clusters (experts)  M vectors per cluster  D width
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from lte_jax import interrupt
from lte_jax.errors import UserError

TOLERANCE = 1e-4  # the search stops when a sweep lowers the inertia by a smaller share
MAX_SWEEPS = 50
LONGEST = 6.0  # longer vectors are shortened to this many median lengths


def balanced_kmeans(
    x_FD: Float[np.ndarray, "F D"], num_clusters: int, *, seed: int | tuple[int, ...] = 0
) -> Int[np.ndarray, "E M"]:
    """Balanced k-means: clusters of exactly F/E rows with a small sum of squared distances.

    Rows longer than LONGEST medians are shortened to that, because the longest row sets the
    quantisation step (see `exact_gram`). Deterministic, on any machine and number of threads.

    Raises:
      UserError: if `num_clusters` does not divide the number of rows.
    """
    if num_clusters < 1 or len(x_FD) % num_clusters:
        raise UserError(
            f"num_clusters={num_clusters} does not divide {len(x_FD)} rows into equal clusters"
        )
    shorter_F = _shortening(_norms(x_FD)).astype(np.float32)
    return balanced_partition(exact_gram(x_FD * shorter_F[:, None]), num_clusters, seed=seed)


def balanced_partition(
    gram_FF: Float[np.ndarray, "F F"], num_clusters: int, *, seed: int | tuple[int, ...] = 0
) -> Int[np.ndarray, "E M"]:
    """Balanced k-means from inner products alone, float32.

    Vectors longer than LONGEST medians are shortened to that. Large models have a few massive
    neurons; one of them would otherwise dominate the inertia, so that the search stops once it is
    placed and others join it by chance.

    With clusters of equal size M the inertia is the trace of the Gram matrix minus 1/M of the sum
    of its within-cluster entries, so k-means is a balanced graph partition. Lloyd's algorithm
    stalls here, because in a small cluster a row is a large part of its own mean. Instead, clusters
    grow one neuron at a time; then each neuron in turn is swapped with the neuron of another
    cluster that lowers the inertia most. A sweep costs F^2 operations.
    """
    shorter_F = _shortening(np.sqrt(np.maximum(np.diag(gram_FF), 0.0))).astype(np.float32)
    if (shorter_F < 1).any():  # most layers do without this [F, F] copy
        gram_FF = gram_FF * shorter_F[:, None] * shorter_F[None]
    visit_F = random_order(len(gram_FF), seed)
    clusters = _Clusters(gram_FF, num_clusters, visit_F)
    for _ in range(MAX_SWEEPS):
        interrupt.check("while grouping neurons")
        before = clusters.inertia()
        for neuron in visit_F.tolist():
            clusters.improve(neuron)
        if before - clusters.inertia() <= TOLERANCE * before:
            break
    return canonical(clusters.members_EM)


class _Clusters:
    """A balanced partition and the sums used to improve it.

    The sums are float32 and elementwise, so their order is the same on every machine, unlike that
    of a reduction.
    """

    def __init__(self, gram_FF: np.ndarray, num_clusters: int, visit_F: np.ndarray):
        """Grows each cluster from a free neuron by the free one nearest to the sum so far."""
        neurons = len(gram_FF)
        self.gram_FF, self.norm_F = gram_FF, np.diag(gram_FF).copy()
        self.least_gain = 1e-5 * float(self.norm_F.max())  # well above the rounding of the sums
        self.members_EM = np.zeros((num_clusters, neurons // num_clusters), np.intp)
        self.cluster_F = np.zeros(neurons, np.intp)
        self.toward_EF = np.zeros((num_clusters, neurons), np.float32)  # sum of gram over members
        taken_F = np.zeros(neurons, np.float32)  # -inf where taken
        seeds = iter(visit_F.tolist())
        for members_M, toward_F in zip(self.members_EM, self.toward_EF, strict=True):
            neuron = next(f for f in seeds if not taken_F[f])
            for m in range(len(members_M)):
                members_M[m], taken_F[neuron] = neuron, -np.inf
                toward_F += gram_FF[neuron]
                neuron = int(np.argmax(toward_F + taken_F))
        self.loss_F = np.zeros(neurons, np.float32)  # change of inner weight if a neuron leaves
        for cluster in range(num_clusters):
            self._settle(cluster)

    def _settle(self, cluster: int) -> None:
        members_M = self.members_EM[cluster]
        self.cluster_F[members_M] = cluster
        self.loss_F[members_M] = self.norm_F[members_M] - self.toward_EF[cluster, members_M]

    def inertia(self) -> float:
        """Sum of squared distances of the vectors to the mean of their cluster."""
        size = self.members_EM.shape[1]
        inner = float(np.sum(self.norm_F - self.loss_F, dtype=np.float64))
        return float(np.sum(self.norm_F, dtype=np.float64)) - inner / size

    def improve(self, i: int) -> None:
        """Swaps neuron i with its best partner if there is a gain.

        For i in A and j in B the inner weight (half of its sum over ordered pairs) grows by
        (G_iB + loss_i) + (G_jA + loss_j) - 2 G_ij.
        """
        a = int(self.cluster_F[i])
        gain_F = self.toward_EF[a] + self.loss_F
        gain_F += self.toward_EF[:, i][self.cluster_F]
        gain_F -= 2 * self.gram_FF[i]
        gain_F[self.members_EM[a]] = -np.inf
        j = int(np.argmax(gain_F))
        if gain_F[j] + self.loss_F[i] <= self.least_gain:
            return
        b, change_F = int(self.cluster_F[j]), self.gram_FF[j] - self.gram_FF[i]
        self.toward_EF[a] += change_F
        self.toward_EF[b] -= change_F
        for cluster, old, new in ((a, i, j), (b, j, i)):
            members_M = self.members_EM[cluster]
            members_M[members_M == old] = new
            self._settle(cluster)


def _shortening(length_F: np.ndarray) -> np.ndarray:
    """Factors, mostly 1, that limit lengths to LONGEST medians of the nonzero lengths."""
    if not length_F.any():
        return np.ones_like(length_F)
    longest = LONGEST * np.median(length_F[length_F > 0])
    return longest / np.maximum(length_F, longest)


def normalize(x_FD: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
    """Rows scaled to L2 norm 1, float32; rows of zeros stay."""
    x_FD = x_FD.astype(np.float32)
    return x_FD / np.maximum(_norms(x_FD), np.finfo(np.float32).tiny)[:, None].astype(np.float32)


def exact_gram(x_FD: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F F"]:
    """Inner products of the rows, scaled and quantised so that float32 sums are exact.

    Entries become integers and row norms less than 4096; by Cauchy-Schwarz every partial sum of
    an inner product is then an integer below 2^24, exact in float32. So the matrix product is the
    same bit for bit in any order of summation. The largest norm spans about 4,000 steps: at D=4096
    a unit row moves by 0.005, and its inner products with others by 1e-4.
    """
    scale = (4095.0 - 0.5 * x_FD.shape[1] ** 0.5) / max(float(_norms(x_FD).max()), 1e-30)
    x_FD = np.rint(x_FD * np.float32(scale))
    return x_FD @ x_FD.T


def inertia(x_FD: Float[np.ndarray, "F D"], order_EM: Int[np.ndarray, "E M"]) -> float:
    """Sum of squared distances of the rows to the mean of their cluster, in float64."""
    clusters = (x_FD[members_M].astype(np.float64) for members_M in order_EM)
    return sum(float(np.sum((x_MD - x_MD.mean(0)) ** 2)) for x_MD in clusters)


def _norms(x_FD: np.ndarray) -> np.ndarray:
    """L2 norms in float64, so that later rounding is the same on every machine."""
    return np.sqrt(np.einsum("FD,FD->F", x_FD, x_FD, dtype=np.float64))


def random_order(neurons: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """A random order. Across versions NumPy guarantees the raw bits, but not `permutation`."""
    return np.argsort(np.random.PCG64(seed).random_raw(neurons), kind="stable")


def canonical(members_EM: np.ndarray) -> np.ndarray:
    """Neurons ascending within an expert, experts by their first neuron."""
    members_EM = np.sort(members_EM, axis=1)
    return members_EM[np.argsort(members_EM[:, 0])].astype(np.int32)
