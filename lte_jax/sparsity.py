"""Controls sparsity during training, and computes what it saves.

Sparsity is the fraction of (real token, layer, expert) that is skipped. The user sets a target; the
efficiency-loss weight that reaches it depends on model, data and initialisation. So a PI controller
sets the weight while routers train. Once they are frozen, the threshold follows in small steps, as
scores still drift with the model. calibration.py then measures the final threshold on many batches.

With a sparsity_range, each step draws targets, whose thresholds are read off a curve of K points.
It follows what the steps measure. With `per_layer`, each layer has its own weight and threshold.

Dimension key: N layers  K points of a curve  [R]: a scalar, or [N] with `per_layer`
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lte_jax.config import LTEConfig, ModelConfig
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

# A step corrects the points next to its target, and all of them a little, as scores drift together.
# In logits, as the scores of the few best experts differ by little.
_CURVE_GAIN, _SHARED_GAIN = 1.5, 0.3
_LOGIT_RANGE = (-8.0, 8.0)
_CURVE_POINTS = 9  # while training


# Points of a sparsity and its threshold, or the thresholds of all layers; both ascending.
Curve = tuple[tuple[float, ...], ...]


@flax.struct.dataclass
class SparsityController:
    """The state that controls sparsity; part of every checkpoint. Float32."""

    # Any, because shardings and abstract values may stand in for the arrays.
    efficiency_weight: Any  # eta of Eq. 6, [R]
    integral: Any  # of the PI controller, [R]
    threshold: Any  # tau of Eq. 2, [R]
    target_sparsity: Any  # an array, so that one compiled step serves every target; 0: none
    # The curve, from depths (see `_depth`) [K] to the logits of thresholds [K, R], both ascending;
    # None: one target alone.
    depths_K: Any = None
    logits_K: Any = None

    @classmethod
    def start(cls, lte: LTEConfig, num_layers: int = 1, curve: Curve = ()) -> SparsityController:
        """The controller before the first step; with an lte.sparsity_range, on this `curve`."""
        shape = (num_layers,) if lte.per_layer else ()
        weight, threshold = (
            jnp.full(shape, x, jnp.float32) for x in (lte.efficiency_weight, lte.threshold)
        )
        target = jnp.asarray(lte.target_sparsity or 0.0, jnp.float32)
        control = cls(weight, jnp.copy(weight), threshold, target)
        if not lte.sparsity_range:
            return control
        low, high = 1 - np.sqrt(1 - np.array(lte.sparsity_range))
        depths_K = np.linspace(low, high, _CURVE_POINTS, dtype=np.float32)
        targets_K = 1 - (1 - depths_K) ** 2
        points_P, *columns_P = np.asarray(curve or ((0.0, 0.0), (1.0, 1.0))).T
        thresholds_KR = np.stack([np.interp(targets_K, points_P, c_P) for c_P in columns_P], 1)
        thresholds_KR = np.clip(thresholds_KR if shape else thresholds_KR[:, 0], 1e-4, 1 - 1e-4)
        logits_K = jnp.float32(np.log(thresholds_KR / (1 - thresholds_KR)))
        logits_K = jnp.broadcast_to(logits_K, (_CURVE_POINTS, *shape))
        return control.replace(depths_K=jnp.asarray(depths_K)).on_curve(logits_K)

    def on_curve(self, logits_K: Float[Array, "K ..."]) -> SparsityController:
        """With these logits of the targets' thresholds, and so that of `target_sparsity`."""
        logit = jnp.tensordot(self._shares(self.target_sparsity), logits_K, 1)
        return self.replace(logits_K=logits_K, threshold=jax.nn.sigmoid(logit))

    def _shares(self, target_sparsity: Float[Array, ""]) -> Float[Array, " K"]:
        """What each point of the curve has in a value at the target, interpolated."""
        step = self.depths_K[1] - self.depths_K[0]
        return jnp.maximum(0.0, 1.0 - jnp.abs(self.depths_K - _depth(target_sparsity)) / step)

    def drawn(self, key: Array, place: Float[Array, ""] | float = 0.0) -> SparsityController:
        """The controller for a (micro)batch: with a curve, a random target and its threshold.

        Depths are drawn uniformly. Microbatches of one step, at places 0, 1/P, 2/P, ..., draw them
        as far apart.
        """
        if self.depths_K is None:
            return self
        low, high = self.depths_K[0], self.depths_K[-1]
        depth = low + (high - low) * jnp.mod(jax.random.uniform(key) + place, 1.0)
        return self.replace(target_sparsity=1 - (1 - depth) ** 2).on_curve(self.logits_K)

    def steer_weight(
        self, active_fraction: Float[Array, "*R"], integral_gain: float = INTEGRAL_GAIN
    ) -> SparsityController:
        """Updates the efficiency weight after a step with this active fraction."""
        return self._steer_weight(active_fraction - (1.0 - self.target_sparsity), integral_gain)

    def _steer_weight(self, error: Float[Array, "*R"], integral_gain: float) -> SparsityController:
        integral = jnp.clip(self.integral + integral_gain * error, *_WEIGHT_RANGE)
        weight = jnp.clip(integral + _PROPORTIONAL_GAIN * error, *_WEIGHT_RANGE)
        return self.replace(integral=integral, efficiency_weight=weight)

    def steer_threshold(self, active_fraction: Float[Array, "*R"]) -> SparsityController:
        """Updates the threshold after a step with this active fraction."""
        error = active_fraction - (1.0 - self.target_sparsity)
        threshold = self.threshold + _THRESHOLD_GAIN * error
        return self.replace(threshold=jnp.clip(threshold, *_THRESHOLD_RANGE))

    def correction(
        self, active_fraction: Float[Array, "*R"], share: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "K ..."]:
        """What a microbatch with the target drawn adds to the logits of the curve.

        Args:
          active_fraction: of the microbatch, times `share`.
          share: of the whole batch's tokens that the microbatch has.
        """
        error = active_fraction - (1.0 - self.target_sparsity) * share
        gains_K = _CURVE_GAIN * self._shares(self.target_sparsity) + _SHARED_GAIN
        return jnp.tensordot(gains_K, error, 0)

    def steer_curve(self, correction_K: Float[Array, "K ..."]) -> SparsityController:
        """Updates the curve after a step, by the sum of its microbatches' `correction`."""
        logits_K = jnp.clip(self.logits_K + correction_K, *_LOGIT_RANGE)
        return self.on_curve(jax.lax.cummax(logits_K))

    def centre_curve(self, integral_gain: float = INTEGRAL_GAIN) -> SparsityController:
        """Updates the efficiency weight so that scores lie around one half.

        Where the thresholds follow the scores, nothing else keeps these from drifting to 0 or 1.
        """
        slope = 0.25  # of the sigmoid there
        return self._steer_weight(slope * jnp.mean(self.logits_K, axis=0), integral_gain)


def _depth(sparsity: Float[Array, ""]) -> Float[Array, ""]:
    """From 50 to 75% is about as far as from 90 to 99%: quality falls more evenly with it."""
    return 1 - jnp.sqrt(1 - sparsity)


def integral_gain(router_rate: float) -> float:
    """The integral gain for routers with this peak learning rate, see above."""
    return INTEGRAL_GAIN * router_rate / _REFERENCE_RATE


def flops_per_token(
    config: ModelConfig, lte: LTEConfig | None = None, sparsity: float = 0.0
) -> float:
    """FLOPs of one token, counted as in the paper's Table 1: attention projections, FFN, router.

    Table 1's "GFLOPs" are units of 2**30 and exclude embedding, head and attention scores; LLaMA-7B
    has 12.0625 of them. As in the table, LTE pays for the whole router.
    """
    return 2.0 * (_weights_per_token(config, lte, sparsity) + _router_weights(config, lte))


def bytes_per_token(
    config: ModelConfig,
    lte: LTEConfig | None = None,
    sparsity: float = 0.0,
    width: float | int = 2,
    head_width: float | int | None = None,
) -> float:
    """Bytes of weights, `width` bytes each, that decoding one token at batch size 1 reads.

    Counts what flops_per_token counts, plus the output head (of `head_width`, if it has another);
    routers are float32, beside weights below two bytes bfloat16. `quantization.widths` are those of
    rounded weights. With the cached keys and values, divided by memory bandwidth, this bounds the
    time of a decode step from below.
    """
    head = config.vocab_size * config.d_model * (width if head_width is None else head_width)
    weights = _weights_per_token(config, lte, sparsity)
    return width * weights + head + (2 if width < 2 else 4) * _router_weights(config, lte)


def _weights_per_token(config: ModelConfig, lte: LTEConfig | None, sparsity: float) -> float:
    attention = 2 * config.d_model * config.head_dim * (config.num_heads + config.num_kv_heads)
    served = kind("dense" if lte is None else kind(lte.routing).served)
    return config.num_layers * (attention + served.ffn_weights(config, sparsity))


def _router_weights(config: ModelConfig, lte: LTEConfig | None) -> int:
    sizes = dimension_sizes(config, lte)
    rows = (row for row in table(config, lte) if is_router(row.path) and row.is_matrix)
    return sum(math.prod(row.shape(sizes)) for row in rows)
