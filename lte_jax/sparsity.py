"""Controls sparsity during training, and computes what it saves.

Sparsity is the fraction of (real token, layer, expert) that is skipped. The user sets a target; the
efficiency-loss weight that reaches it depends on model, data and initialisation. So a PI controller
sets the weight while routers train. Once they are frozen, the threshold follows in small steps, as
scores still drift with the model. `settle` then measures the final threshold on many batches.

Dimension key: B batch  L length  E experts  N layers  S bins of a histogram of scores
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.model import Transformer, forward
from lte_jax.params import dimension_sizes, is_router, table
from lte_jax.routing import kind

# A signed PI controller of e = active fraction - target fraction: in each step, weight = P e +
# (sum of I e). The gains are from trials with a peak router learning rate of 2e-3, where sparsity
# came within a point of 50, 75 and 90%. Learning is an integrator, e' = -g weight, with g
# proportional to the rate (Adam). So e'' + g P e' + g I e = 0, with damping (P / 2) sqrt(g / I):
# 0.49 in those trials, where g = 1.2e-3. With I proportional to the rate as well, the damping is
# the same at any rate, until one step of P overshoots (g P > 2, about 40 times the rate).
INTEGRAL_GAIN, _PROPORTIONAL_GAIN = 2.0, 40.0
_REFERENCE_RATE = 2e-3
_WEIGHT_RANGE = (-5.0, 50.0)
# The threshold acts at once, so this gain holds at any learning rate: a step removes 0.1 d of the
# error, where d is the density of scores at the threshold (fraction per unit of score; 1 if
# uniform). It oscillates from d = 10 on and diverges from 20 on.
_THRESHOLD_GAIN = 0.1
_THRESHOLD_RANGE = (0.01, 0.99)

SETTLED = 0.002  # of sparsity: tolerance of the final threshold
_SETTLING_PASSES = 8
_BINS = 2**14  # edges are exact in float32


@flax.struct.dataclass
class SparsityController:
    """The state that controls sparsity; part of every checkpoint. Scalars, float32."""

    # Any, because shardings and abstract values may stand in for the arrays.
    efficiency_weight: Any  # eta of Eq. 6
    integral: Any  # of the PI controller
    threshold: Any  # tau of Eq. 2
    target_sparsity: Any  # an array, so that one compiled step serves every target; 0: none

    @classmethod
    def start(cls, lte: LTEConfig) -> SparsityController:
        """The controller before the first step."""
        weight = lte.efficiency_weight
        values = (weight, weight, lte.threshold, lte.target_sparsity or 0.0)
        return cls(*(jnp.asarray(value, jnp.float32) for value in values))

    def steer_weight(
        self, active_fraction: Float[Array, ""], integral_gain: float = INTEGRAL_GAIN
    ) -> SparsityController:
        """Updates the efficiency weight after a step with this active fraction."""
        error = active_fraction - (1.0 - self.target_sparsity)
        integral = jnp.clip(self.integral + integral_gain * error, *_WEIGHT_RANGE)
        weight = jnp.clip(integral + _PROPORTIONAL_GAIN * error, *_WEIGHT_RANGE)
        return self.replace(integral=integral, efficiency_weight=weight)

    def steer_threshold(self, active_fraction: Float[Array, ""]) -> SparsityController:
        """Updates the threshold after a step with this active fraction."""
        error = active_fraction - (1.0 - self.target_sparsity)
        threshold = self.threshold + _THRESHOLD_GAIN * error
        return self.replace(threshold=jnp.clip(threshold, *_THRESHOLD_RANGE))


def integral_gain(router_rate: float) -> float:
    """The integral gain for routers with this peak learning rate, see above."""
    return INTEGRAL_GAIN * router_rate / _REFERENCE_RATE


def settle(
    histogram: Callable[[float], Int[np.ndarray, " S"]], threshold: float, target_sparsity: float
) -> tuple[float, float]:
    """Finds the threshold that gives the target; returns it and the sparsity there.

    Scores depend on the threshold through earlier layers. So the next try is the quantile of the
    scores under the last one, or the middle of the bracket found so far if that is outside it.

    Args:
      histogram: from a threshold to `score_histogram` under it, summed over the data.
      threshold: to start from.
      target_sparsity: fraction of scores to lie at or below the threshold.
    """
    least, most = (round(bound * _BINS) for bound in _THRESHOLD_RANGE)
    low, high = 0, _BINS  # edges known to give too little and too much
    edge, tried = min(max(round(threshold * _BINS), least), most), {}
    while edge not in tried and len(tried) < _SETTLING_PASSES:
        counts_S = histogram(edge / _BINS)
        below_S = np.append(0, np.cumsum(counts_S)) / np.sum(counts_S)
        tried[edge] = float(below_S[edge])
        if abs(tried[edge] - target_sparsity) <= SETTLED / 4:
            break
        low, high = (edge, high) if tried[edge] < target_sparsity else (low, edge)
        edge = int(np.argmin(np.abs(below_S - target_sparsity)))
        edge = min(max(edge if low < edge < high else (low + high) // 2, least), most)
    best = min(tried, key=lambda edge: abs(tried[edge] - target_sparsity))
    return best / _BINS, tried[best]


def score_histogram(
    model: Transformer, params: Any, batch: Mapping[str, Array], threshold: Float[Array, ""] | float
) -> Int[Array, " S"]:
    """Counts scores of real tokens in each bin of (0, 1], under the served routing; jittable."""
    token_mask_BL = batch["segments"] > 0
    served = kind(model.lte.routing).served
    out = forward(model, params, batch, routing=served, threshold=threshold)
    # A score equal to an edge is not above it, so it belongs to the bin below.
    bin_NBLE = jnp.clip(jnp.ceil(out.scores * _BINS) - 1, 0, _BINS - 1).astype(jnp.int32)
    real_NBLE = jnp.broadcast_to(token_mask_BL[None, :, :, None], bin_NBLE.shape).astype(jnp.int32)
    return jnp.zeros(_BINS, jnp.int32).at[bin_NBLE].add(real_NBLE)


def flops_per_token(
    config: ModelConfig, lte: LTEConfig | None = None, sparsity: float = 0.0
) -> float:
    """FLOPs of one token, counted as in the paper's Table 1: attention projections, FFN, router.

    Table 1's "GFLOPs" are units of 2**30 and exclude embedding, head and attention scores; LLaMA-7B
    has 12.0625 of them. As in the table, LTE pays for the whole router.
    """
    return 2.0 * (_weights_per_token(config, lte, sparsity) + _router_weights(config, lte))


def bytes_per_token(
    config: ModelConfig, lte: LTEConfig | None = None, sparsity: float = 0.0, width: int = 2
) -> float:
    """Bytes of weights, `width` bytes each, that decoding one token at batch size 1 reads.

    Counts what flops_per_token counts, plus the output head; routers are float32. With the cached
    keys and values, divided by memory bandwidth, this bounds the time of a decode step from below.
    """
    weights = _weights_per_token(config, lte, sparsity) + config.vocab_size * config.d_model
    return width * weights + 4 * _router_weights(config, lte)


def _weights_per_token(config: ModelConfig, lte: LTEConfig | None, sparsity: float) -> float:
    attention = 2 * config.d_model * config.head_dim * (config.num_heads + config.num_kv_heads)
    served = kind("dense" if lte is None else kind(lte.routing).served)
    return config.num_layers * (attention + served.ffn_weights(config, sparsity))


def _router_weights(config: ModelConfig, lte: LTEConfig | None) -> int:
    sizes = dimension_sizes(config, lte)
    rows = (row for row in table(config, lte) if is_router(row.path) and row.is_matrix)
    return sum(math.prod(row.shape(sizes)) for row in rows)
