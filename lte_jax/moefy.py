"""Neurons into experts: which M neurons each expert gets, and the permutation that puts them there.

A dense FFN is a sum over its F neurons in any order, so E experts of M neurons are an order of the
neurons: `order_EM[e, m]` is the dense neuron that becomes neuron m of expert e. Three ways to find
one for a layer (`LTEConfig.grouping`):

  kmeans        neurons whose first-matrix rows (gate, or up where there is no gate) point the same
                way: balanced k-means on the L2-normalised rows, as in MoEfication (Zhang et al.,
                2022, section 3.1) and the paper (section 4.1)
  coactivation  neurons that are large on the same tokens: the same clustering with the covariance
                of their magnitudes |h| over calibration tokens in place of inner products of rows
  random        the control

Both clusterings need only inner products between neurons, a [F, F] float32 matrix: 0.5 GB for a
layer of LLaMA-7B, 3.3 GB for one of LLaMA-70B. Layers are taken one after the other.

Dimension key: N layers  F = E*M neurons of an FFN  E experts  M neurons per expert  D model width
               R calibration rows  L length  T tokens
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from lte_jax import interrupt, router_init
from lte_jax.config import LTEConfig, num_experts
from lte_jax.errors import UserError
from lte_jax.model import Transformer

NEURON_MATRICES = ("gate", "up", "down", "gate_bias", "up_bias")  # of layers/ffn: [N, E, M, ...]
COACTIVATION_BYTES = 4 * 2**30  # of [F, F] matrices gathered in one pass over the calibration data
TOLERANCE = 1e-4  # the clustering stops when a sweep lowers the inertia by a smaller share
MAX_SWEEPS = 50
LONGEST = 6.0  # medians of length that a vector to be clustered is shortened to


# ------------------------------------------------------------------------------------ the pipeline


def to_experts(
    model: Transformer,
    params: Any,
    lte: LTEConfig = LTEConfig(),  # noqa: B008 (frozen)
    calibration: np.ndarray | Array | None = None,
    mask: np.ndarray | Array | None = None,
    *,
    progress: bool = True,
) -> tuple[Transformer, dict[str, Any], Int[np.ndarray, "N E M"]]:
    """A dense model with its neurons in experts, all but the routers.

    Args:
      model: a dense Transformer.
      params: its parameters, fully addressable from this process; they stay as they are.
      lte: the expert size, and how and from which seed neurons are grouped.
      calibration: token ids [R, L] of typical text, for grouping="coactivation".
      mask: [R, L] as the model takes it, True or > 0 at real tokens. None: no padding.
      progress: show a bar over the layers if standard error is a terminal.

    Returns:
      The model with `lte`, its parameters without routers, and the dense neuron in each slot.

    Raises:
      UserError: where the expert size does not divide the FFN width, a layer's weights are not
        finite, or co-activation is asked for without calibration tokens.
    """
    if model.lte is not None:
        raise UserError("model: has experts already; expected a dense model, or `to_dense` of it")
    num_experts(model.config, lte)
    num_layers = model.config.num_layers
    first_N1FD = params["layers"]["ffn"]["gate" if model.config.gated else "up"]
    statistics = itertools.repeat(None, num_layers)
    if lte.grouping == "coactivation":
        statistics = coactivations(model, params, calibration, mask)
    disable = None if progress else True
    bar = tqdm(statistics, "grouping neurons", num_layers, unit="layer", disable=disable)
    order_NEM = np.stack(
        [
            group_neurons(np.asarray(first_N1FD[layer, 0]), lte, layer, covariance_FF)
            for layer, covariance_FF in enumerate(bar)
        ]
    )
    return model.clone(lte=lte), permute(params, order_NEM), order_NEM


def add_routers(
    model: Transformer,
    params: Any,
    calibration: np.ndarray | Array | None = None,
    mask: np.ndarray | Array | None = None,
) -> dict[str, Any]:
    """The parameters of `to_experts` with routers as `model.lte.router_init` says.

    Args:
      model: with experts.
      params: its parameters, without routers or with others.
      calibration: token ids [R, L] of typical text, for router_init="ridge": at least
        `router_init.TOKENS_PER_UNKNOWN` real tokens for each of D + 1 unknowns, or a warning
        says so. They are read row by row, in memory that does not grow with them.
      mask: [R, L] as the model takes it, True or > 0 at real tokens. None: no padding.

    Raises:
      UserError: where ridge is asked for without calibration tokens, or with padding alone.
    """
    config, lte = model.config, model.lte
    if lte.router_init != "ridge":
        experts, key = num_experts(config, lte), jax.random.key(lte.seed)
        router = router_init.random_router(key, config.num_layers, config.d_model, experts, lte)
    else:
        if calibration is None:
            raise UserError(
                "lte.router_init='ridge' starts routers from data: give calibration token ids "
                "[rows, length], or choose lte.router_init='normal'"
            )
        mask_RL = np.ones(calibration.shape, np.int32) if mask is None else np.asarray(mask)
        rows = [
            {"tokens": calibration[i : i + 1], "segments": mask_RL[i : i + 1].astype(np.int32)}
            for i in range(len(calibration))
        ]
        router = router_init.ridge_router(model, params, rows, lte)
    ffn = params["layers"]["ffn"] | {"router": router}
    return params | {"layers": params["layers"] | {"ffn": ffn}}


def to_dense(
    model: Transformer, params: Any, order_NEM: Int[np.ndarray, "N E M"]
) -> tuple[Transformer, dict[str, Any]]:
    """The dense model with every neuron back in its place: `to_experts` undone, routers dropped.

    Raises:
      UserError: where `order_NEM` is not an order of these neurons.
    """
    ffn = {name: w for name, w in params["layers"]["ffn"].items() if name != "router"}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    return model.clone(lte=None), permute(params, inverse(order_NEM))


def group_neurons(
    first_FD: Float[np.ndarray, "F D"],
    lte: LTEConfig,
    layer: int = 0,
    covariance_FF: Float[np.ndarray, "F F"] | None = None,
) -> Int[np.ndarray, "E M"]:
    """The neurons of each expert of one layer, ascending within an expert.

    The same on every machine for the same weights, except that the covariance is only as
    reproducible as the forward pass it comes from.

    Args:
      first_FD: the first matrix, a row a neuron, in any float type.
      lte: the expert size, grouping and seed.
      layer: seeds each layer differently; named in errors.
      covariance_FF: of the neurons' magnitudes, for grouping="coactivation".

    Raises:
      UserError: where what neurons are grouped by is not finite, or the expert size does not
        divide F.
    """
    experts, rest = divmod(len(first_FD), lte.expert_size)
    if rest:
        raise UserError(f"lte.expert_size={lte.expert_size} does not divide F={len(first_FD)}")
    seed = (lte.seed, layer)
    if lte.grouping == "random":
        return _canonical(_visits(len(first_FD), seed).reshape(experts, -1))
    coactivation = lte.grouping == "coactivation"
    grouped_by = covariance_FF if coactivation else first_FD.astype(np.float32)
    assert grouped_by is not None
    if not np.isfinite(grouped_by).all():
        what = "covariance of the neurons" if coactivation else "first matrix"
        raise UserError(
            f"layers/ffn: the {what} of layer {layer} has values that are not finite; "
            "expected the weights of a working model"
        )
    if coactivation:
        return balanced_partition(grouped_by, experts, seed=seed)
    return balanced_kmeans(normalize(first_FD), experts, seed=seed)


# ----------------------------------------------------------------------------- balanced clustering


def balanced_kmeans(
    x_FD: Float[np.ndarray, "F D"], num_clusters: int, *, seed: int | tuple[int, ...] = 0
) -> Int[np.ndarray, "E M"]:
    """Clusters of exactly F/E rows with a small sum of squared distances to their means.

    Rows longer than LONGEST medians count as that long: they are quantised by the longest (see
    `exact_gram`). Same input and seed, same clusters: on any number of threads and any machine.

    Raises:
      UserError: where `num_clusters` does not divide the number of rows.
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
    """Balanced k-means of vectors of which only the inner products are known, float32.

    Vectors longer than LONGEST medians count as that long. One massive neuron, and large models
    have some, would else be most of the inertia: the search would stop once it lies well, and
    chance would draw others to it.

    With clusters of equal size M the inertia is the trace of the Gram matrix less 1/M of the sum
    of its entries within clusters, so k-means is a balanced graph partition. Lloyd's rounds settle
    early here, for in small clusters a row is a large part of its own mean. Instead, clusters are
    grown one neuron at a time; then each neuron in turn changes places with the one neuron, of all
    in other clusters, with which this lowers the inertia most. A sweep costs F^2 operations.
    """
    shorter_F = _shortening(np.sqrt(np.maximum(np.diag(gram_FF), 0.0))).astype(np.float32)
    if (shorter_F < 1).any():  # a copy as large as a layer that most layers need not
        gram_FF = gram_FF * shorter_F[:, None] * shorter_F[None]
    visit_F = _visits(len(gram_FF), seed)
    clusters = _Clusters(gram_FF, num_clusters, visit_F)
    for _ in range(MAX_SWEEPS):
        interrupt.check("while grouping neurons")
        before = clusters.inertia()
        for neuron in visit_F.tolist():
            clusters.improve(neuron)
        if before - clusters.inertia() <= TOLERANCE * before:
            break
    return _canonical(clusters.members_EM)


class _Clusters:
    """A balanced partition and the sums by which it is improved.

    These are float32 and computed elementwise, in an order that is the same on every machine, as
    that of a reduction would not be.
    """

    def __init__(self, gram_FF: np.ndarray, num_clusters: int, visit_F: np.ndarray):
        """Grows clusters: a free neuron, then always the free one nearest to the sum so far."""
        neurons = len(gram_FF)
        self.gram_FF, self.norm_F = gram_FF, np.diag(gram_FF).copy()
        self.least_gain = 1e-5 * float(self.norm_F.max())  # well above the rounding of the sums
        self.members_EM = np.zeros((num_clusters, neurons // num_clusters), np.intp)
        self.cluster_F = np.zeros(neurons, np.intp)
        self.toward_EF = np.zeros((num_clusters, neurons), np.float32)  # sum of gram over members
        taken_F = np.zeros(neurons, np.float32)  # -inf where it is
        seeds = iter(visit_F.tolist())
        for members_M, toward_F in zip(self.members_EM, self.toward_EF, strict=True):
            neuron = next(f for f in seeds if not taken_F[f])
            for m in range(len(members_M)):
                members_M[m], taken_F[neuron] = neuron, -np.inf
                toward_F += gram_FF[neuron]
                neuron = int(np.argmax(toward_F + taken_F))
        self.loss_F = np.zeros(neurons, np.float32)  # inner weight that leaves with a neuron, < 0
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
    """Factors, mostly 1, that leave no vector longer than LONGEST medians of those not zero."""
    if not length_F.any():
        return np.ones_like(length_F)
    longest = LONGEST * np.median(length_F[length_F > 0])
    return longest / np.maximum(length_F, longest)


def normalize(x_FD: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
    """Rows scaled to L2 norm 1, float32; rows of zeros stay."""
    x_FD = x_FD.astype(np.float32)
    return x_FD / np.maximum(_norms(x_FD), np.finfo(np.float32).tiny)[:, None].astype(np.float32)


def exact_gram(x_FD: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F F"]:
    """Inner products of the rows, scaled and quantised so that float32 sums have no rounding.

    Entries become integers and rows get norms below 4096; by Cauchy-Schwarz every partial sum of
    a product of two rows is then an integer below 2^24, which float32 holds. So a matrix product
    gives the same bits in any order of summation. The largest norm spans 4,000 steps or so: at
    D=4096 a unit row moves by 0.005, and its inner products with others by 1e-4.
    """
    scale = (4095.0 - 0.5 * x_FD.shape[1] ** 0.5) / max(float(_norms(x_FD).max()), 1e-30)
    x_FD = np.rint(x_FD * np.float32(scale))
    return x_FD @ x_FD.T


def inertia(x_FD: Float[np.ndarray, "F D"], order_EM: Int[np.ndarray, "E M"]) -> float:
    """Sum of squared distances of rows to the mean of their cluster, in float64."""
    clusters = (x_FD[members_M].astype(np.float64) for members_M in order_EM)
    return sum(float(np.sum((x_MD - x_MD.mean(0)) ** 2)) for x_MD in clusters)


def _norms(x_FD: np.ndarray) -> np.ndarray:
    """L2 norms in float64, so that what is rounded after them rounds alike everywhere."""
    return np.sqrt(np.einsum("FD,FD->F", x_FD, x_FD, dtype=np.float64))


def _visits(neurons: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """A random order. NumPy guarantees the raw bits across its versions, not `permutation`."""
    return np.argsort(np.random.PCG64(seed).random_raw(neurons), kind="stable")


def _canonical(members_EM: np.ndarray) -> np.ndarray:
    """Neurons ascending within an expert, experts by their first neuron."""
    members_EM = np.sort(members_EM, axis=1)
    return members_EM[np.argsort(members_EM[:, 0])].astype(np.int32)


# ------------------------------------------------------------------------------------ co-activation


def coactivations(
    model: Transformer,
    params: Any,
    calibration: np.ndarray | Array | None,
    mask: np.ndarray | Array | None = None,
) -> Iterator[Float[np.ndarray, "F F"]]:
    """For each layer in turn, the covariance of |h| over the real tokens.

    The data is read row by row, and once for as many layers as COACTIVATION_BYTES hold. On
    babyllama (experts of 32, the half with the largest sum of |h| kept) the squared error of the
    FFN outputs was 0.14 of theirs with k-means on rows, 0.12 with cosines of h, 0.105 with cosines,
    correlations or top-decile counts of |h|, and 0.104 with this. (Its largest deviation is 5.2
    medians; neurons beyond LONGEST medians count less, see `balanced_partition`.)

    Raises:
      UserError: where there are no calibration tokens, or not in rows.
    """
    if calibration is None or np.ndim(calibration) != 2 or not np.size(calibration):
        shape = None if calibration is None else np.shape(calibration)
        raise UserError(
            f"lte.grouping='coactivation': calibration has shape {shape}, expected token ids "
            "[rows, length]; give some, or choose lte.grouping='kmeans'"
        )
    mask_RL = np.ones(calibration.shape) if mask is None else mask
    mask_RL = np.asarray(mask_RL, np.int32)
    num_tokens = int(np.sum(mask_RL > 0))
    if not num_tokens:
        raise UserError("mask: all calibration tokens are padding; expected some real ones")
    num_layers, d_ff = model.config.num_layers, model.config.d_ff
    chunk = max(1, COACTIVATION_BYTES // (4 * d_ff**2))
    for start in range(0, num_layers, chunk):
        layers = range(start, min(start + chunk, num_layers))
        sums = None
        for row in range(len(calibration)):
            interrupt.check("while grouping neurons")
            rows = slice(row, row + 1)
            new = _magnitude_sums(model, params, calibration[rows], mask_RL[rows], layers)
            sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        for product_FF, sum_F in zip(*sums, strict=True):
            mean_F = np.asarray(sum_F) / np.float32(num_tokens)
            product_FF = np.asarray(product_FF) / np.float32(num_tokens)
            yield product_FF - mean_F[:, None] * mean_F[None]


@partial(jax.jit, static_argnames=("model", "layers"))
def _magnitude_sums(
    model: Transformer, params: Any, tokens_BL: Array, mask_BL: Array, layers: range
) -> tuple[Float[Array, "N F F"], Float[Array, "N F"]]:
    """Sums over the real tokens of |h_f| |h_g| and of |h_f|, for some layers."""
    _, state = model.apply(
        {"params": params}, tokens_BL, routing="dense", mask=mask_BL, mutable=["intermediates"]
    )
    h_NBLEM = state["intermediates"]["layers"]["ffn"]["hidden"][0][layers.start : layers.stop]
    h_NTF = jnp.abs(h_NBLEM.reshape(len(layers), tokens_BL.size, -1).astype(jnp.float32))
    h_NTF = jnp.where((mask_BL > 0).reshape(1, -1, 1), h_NTF, 0.0)
    product_NFG = jnp.einsum("NTF,NTG->NFG", h_NTF, h_NTF, precision=jax.lax.Precision.HIGHEST)
    return product_NFG, jnp.sum(h_NTF, axis=1)


# -------------------------------------------------------------------------------------- permutation


def permute(params: Any, order_NEM: Int[np.ndarray, "N E M"]) -> dict[str, Any]:
    """FFN neurons of each layer put into an order: [N, *, *, ...] becomes [N, E, M, ...].

    Gate, up, down and their biases move together, so the FFN computes the same; all else is
    returned as it is. The original is not changed: one matrix (of all layers) is copied at a time.

    Raises:
      UserError: where `order_NEM` is not an order of these neurons.
    """
    ffn = params["layers"]["ffn"]
    neurons = ffn["down"].shape[0], ffn["down"].shape[1] * ffn["down"].shape[2]
    order_NF = np.asarray(order_NEM).reshape(len(order_NEM), -1)
    identity_NF = np.broadcast_to(np.arange(neurons[1]), neurons)
    if order_NF.shape != neurons or not np.array_equal(np.sort(order_NF, axis=1), identity_NF):
        raise UserError(
            f"expert order of shape {np.shape(order_NEM)}: expected for each of {neurons[0]} layers"
            f" a permutation of its {neurons[1]} neurons; take the order this model was made with"
        )
    moved = {name: _permuted(ffn[name], order_NEM) for name in NEURON_MATRICES if name in ffn}
    return params | {"layers": params["layers"] | {"ffn": ffn | moved}}


@jax.jit
def _permuted(w_NEMD: Array, order_NEM: Array) -> Array:
    w_NFD = w_NEMD.reshape(w_NEMD.shape[0], -1, *w_NEMD.shape[3:])
    return jax.vmap(lambda w_FD, order_EM: w_FD[order_EM])(w_NFD, order_NEM)


def inverse(order_NEM: Int[np.ndarray, "N E M"]) -> Int[np.ndarray, "N 1 F"]:
    """The order that undoes `order_NEM`: `permute` by it gives the dense layout."""
    order_NF = np.asarray(order_NEM).reshape(len(order_NEM), -1)
    return np.argsort(order_NF, axis=1).astype(np.int32)[:, None]
