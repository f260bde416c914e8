"""Sets thresholds by what the scores of a calibration text are under them.

`settle` finds the threshold of one sparsity, `curve` those of all. The edges of a histogram's bins
are the thresholds that are tried.

Dimension key: B batch  L length  E experts  N layers  S bins of a histogram of scores
               R thresholds: 1 of all layers, or with `lte.per_layer` one of each
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lte_jax.model import Transformer, forward
from lte_jax.routing import kind
from lte_jax.sparsity import Curve

log = logging.getLogger(__name__)

SETTLED = 0.002  # of sparsity: tolerance of a threshold
CURVE_ENDS = (0.05, 0.95)  # sparsities that a curve reaches from and to, at least
_CURVE_STEP = 0.05  # of sparsity, from point to point
_PASSES = 8  # over the data, for one threshold
# Bins are equal parts of the logits of scores, as those of the few best experts differ by little.
_BINS, _LOGITS = 2**14, 12.0  # edges are from -12 to 12
_LEAST, _MOST = _BINS // 12, _BINS - _BINS // 12  # of edges that may be thresholds: -10 to 10

# Counts of scores [R, S], given the edges [R] that are their thresholds.
Histogram = Callable[[tuple[int, ...]], Int[np.ndarray, "R S"]]


def settle(
    histogram: Histogram,
    thresholds_R: Float[np.ndarray, " R"],
    target_sparsity: float,
    tolerance: float = SETTLED / 4,
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Finds the thresholds that give the target; returns them and the sparsities there.

    Scores depend on the thresholds of earlier layers. So the next try is the quantile of the scores
    under the last one. A threshold of several layers moves its own scores: its next try is within
    the bracket found so far, or its middle.

    Args:
      histogram: of scores over the data, see `histogram_over`.
      thresholds_R: to start from.
      target_sparsity: fraction of scores to lie at or below each threshold.
      tolerance: of that.
    """
    low, high = 0, _BINS  # edges known to give too little and too much, of the first threshold
    logits_R = np.log(thresholds_R / (1 - thresholds_R))
    edges_R = np.round((logits_R / _LOGITS + 1) / 2 * _BINS).astype(int).clip(_LEAST, _MOST)
    tried: dict[tuple[int, ...], np.ndarray] = {}
    while tuple(edges_R.tolist()) not in tried and len(tried) < _PASSES:
        counts_RS = histogram(tuple(edges_R.tolist()))
        below_RS = np.cumsum(counts_RS, axis=1) / np.sum(counts_RS, axis=1, keepdims=True)
        below_RS = np.pad(below_RS, ((0, 0), (1, 0)))
        shares_R = below_RS[np.arange(len(edges_R)), edges_R]
        tried[tuple(edges_R.tolist())] = shares_R
        if np.max(np.abs(shares_R - target_sparsity)) <= tolerance:
            break
        first = int(edges_R[0])
        low, high = (first, high) if shares_R[0] < target_sparsity else (low, first)
        edges_R = np.argmin(np.abs(below_RS - target_sparsity), axis=1)
        if not low < edges_R[0] < high:
            edges_R[0] = (low + high) // 2
        edges_R = edges_R.clip(_LEAST, _MOST)
    best = min(tried, key=lambda edges: np.max(np.abs(tried[edges] - target_sparsity)))
    return _thresholds(best), tried[best]


def _thresholds(edges_R: tuple[int, ...]) -> Float[np.ndarray, " R"]:
    logits_R = _LOGITS * (2 * np.asarray(edges_R) / _BINS - 1)
    return 1 / (1 + np.exp(-logits_R))


def curve(model: Transformer, histogram: Histogram) -> Curve:
    """Measures thresholds of sparsities 5% apart.

    They reach from 5 to 95%, and over all of `lte.sparsity_range`. Where many scores are equal,
    some are out of reach: a warning names them, and the curve leaves them out.
    """
    lte = model.lte
    assert lte is not None
    low, *_, high = sorted([*CURVE_ENDS, *lte.sparsity_range])
    wanted = np.linspace(low, high, round((high - low) / _CURVE_STEP) + 1)
    thresholds_R = np.full(model.config.num_layers if lte.per_layer else 1, lte.threshold)
    points: list[tuple[float, ...]] = []
    missed = []
    for share in wanted.round(6).tolist():
        thresholds_R, reached_R = settle(histogram, thresholds_R, share, SETTLED)
        point = (share, *thresholds_R.tolist())
        rises = not points or all(a < b for a, b in zip(points[-1], point, strict=True))
        if rises and np.max(np.abs(reached_R - share)) <= 2 * SETTLED:
            points.append(point)
        else:
            missed.append(share)
    log.log(
        logging.WARNING if missed else logging.INFO,
        "thresholds of %d sparsities measured%s",
        *(len(points), f"; out of reach: {missed}" if missed else ""),
    )
    return tuple(points)


def histogram_over(
    model: Transformer, params: Any, batches: Callable[[], Iterable[Any]], **options: Any
) -> Histogram:
    """The histogram of the scores over the batches; that of each threshold is computed once.

    `options` are those of jax.jit.
    """
    assert model.lte is not None
    together = not model.lte.per_layer
    count = jax.jit(functools.partial(score_histogram, model), **options)

    @functools.cache
    def histogram(edges_R: tuple[int, ...]) -> np.ndarray:
        thresholds_R = _thresholds(edges_R).astype(np.float32)
        threshold = thresholds_R[0] if together else thresholds_R
        parts = (np.asarray(count(params, batch, threshold), np.int64) for batch in batches())
        counts_NS = sum(parts, np.zeros((), np.int64))
        return counts_NS.sum(axis=0, keepdims=True) if together else counts_NS

    return histogram


def score_histogram(
    model: Transformer, params: Any, batch: Mapping[str, Array], threshold: Float[Array, "*N"] | Any
) -> Int[Array, "N S"]:
    """Counts scores of real tokens in each bin of their logits, under the served routing; jittable.

    Those beyond the edges are in the first and the last bin.
    """
    token_mask_BL = batch["segments"] > 0
    served = kind(model.lte and model.lte.routing).served
    out = forward(model, params, batch, routing=served, threshold=threshold)
    # A score equal to an edge is not above it, so it belongs to the bin below.
    place_NBLE = (jax.scipy.special.logit(out.scores) / _LOGITS + 1) / 2 * _BINS
    bin_NBLE = jnp.clip(jnp.ceil(place_NBLE) - 1, 0, _BINS - 1).astype(jnp.int32)
    real_BLE = jnp.broadcast_to(token_mask_BL[..., None], bin_NBLE.shape[1:]).astype(jnp.int32)
    return jax.vmap(lambda bin_BLE: jnp.zeros(_BINS, jnp.int32).at[bin_BLE].add(real_BLE))(bin_NBLE)
