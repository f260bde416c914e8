"""How sparse, what it saves, and the control that makes it what the user asked for.

Sparsity is the share of (real token, layer, expert) that does not run. A user asks for a sparsity;
the weight of the efficiency loss that gives it depends on model, data and initialisation. So the
weight is the output of a PI controller while routers learn, and once they are frozen the threshold
follows in small steps (a frozen router drifts as the model under it moves).

Dimension key: B batch  L length  E experts  N layers
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.moe import num_experts

# Signed PI on kept - wanted, per step. Gains found in trials: within a point at 50, 75 and 90%.
_INTEGRAL_GAIN, _PROPORTIONAL_GAIN = 2.0, 40.0
_WEIGHT_RANGE = (-5.0, 50.0)
_THRESHOLD_GAIN = 0.1
_THRESHOLD_RANGE = (0.01, 0.99)


@flax.struct.dataclass
class Control:
    """What decides the sparsity of the next step; part of every checkpoint. Scalars, float32."""

    # Not annotated by shape: shardings and abstract values take the arrays' places at times.
    efficiency_weight: Any  # eta of Eq. 6
    integral: Any  # of the PI controller
    threshold: Any  # tau of Eq. 2
    target_sparsity: Any  # a value, so that one compiled step serves every target; 0: none

    @classmethod
    def start(cls, lte: LTEConfig) -> Control:
        """The control before the first step."""
        weight = lte.efficiency_weight
        values = (weight, weight, lte.threshold, lte.target_sparsity or 0.0)
        return cls(*(jnp.asarray(value, jnp.float32) for value in values))

    def steer_weight(self, kept: Float[Array, ""]) -> Control:
        """After a step that kept a share `kept` of the experts: the next efficiency weight."""
        error = kept - (1.0 - self.target_sparsity)
        integral = jnp.clip(self.integral + _INTEGRAL_GAIN * error, *_WEIGHT_RANGE)
        weight = jnp.clip(integral + _PROPORTIONAL_GAIN * error, *_WEIGHT_RANGE)
        return self.replace(integral=integral, efficiency_weight=weight)

    def steer_threshold(self, kept: Float[Array, ""]) -> Control:
        """After a step that kept a share `kept` of the experts: the next threshold."""
        error = kept - (1.0 - self.target_sparsity)
        threshold = self.threshold + _THRESHOLD_GAIN * error
        return self.replace(threshold=jnp.clip(threshold, *_THRESHOLD_RANGE))


def layer_sparsity(
    active_NBLE: Bool[Array, "N B L E"], real_BL: Bool[Array, "B L"]
) -> Float[Array, " N"]:
    """Sparsity of each layer over the real tokens."""
    weight_BL = real_BL.astype(jnp.float32)
    kept_NBL = jnp.mean(active_NBLE.astype(jnp.float32), axis=3)
    kept_N = jnp.sum(kept_NBL * weight_BL[None], axis=(1, 2))
    return 1.0 - kept_N / jnp.maximum(jnp.sum(weight_BL), 1.0)


def union_sparsity(
    active_NBLE: Bool[Array, "N B L E"], real_BL: Bool[Array, "B L"]
) -> Float[Array, ""]:
    """Share of experts that no row of the batch needs, mean over layers and positions.

    What a kernel that serves B rows at once can skip (paper, Fig. 15).
    """
    needed_NLE = jnp.any(active_NBLE & real_BL[None, :, :, None], axis=1)
    weight_L = jnp.any(real_BL, axis=0).astype(jnp.float32)
    kept = jnp.sum(jnp.mean(needed_NLE.astype(jnp.float32), axis=(0, 2)) * weight_L)
    return 1.0 - kept / jnp.maximum(jnp.sum(weight_L), 1.0)


def flops_per_token(
    config: ModelConfig, lte: LTEConfig | None = None, sparsity: float = 0.0
) -> float:
    """FLOPs of one token, counted as the paper's Table 1: attention projections, FFN, router.

    Table 1's "GFLOPs" are units of 2**30, and leave out embedding, head and attention scores;
    LLaMA-7B has 12.0625 of them. The router is charged in full, which the table says of LTE.
    """
    return 2.0 * (_weights_per_token(config, sparsity) + _router_weights(config, lte))


def bytes_per_token(
    config: ModelConfig, lte: LTEConfig | None = None, sparsity: float = 0.0, width: int = 2
) -> float:
    """Bytes of weights that one token of batch-1 decoding must read, `width` bytes each.

    Counts what flops_per_token counts and the output head; routers are float32. The floor of a
    decode step's time is this, and the cached keys and values, over the memory bandwidth.
    """
    weights = _weights_per_token(config, sparsity) + config.vocab_size * config.d_model
    return width * weights + 4 * _router_weights(config, lte)


def _weights_per_token(config: ModelConfig, sparsity: float) -> float:
    attention = 2 * config.d_model * config.head_dim * (config.num_heads + config.num_kv_heads)
    ffn = (3 if config.gated else 2) * config.d_model * config.d_ff
    return config.num_layers * (attention + ffn * (1.0 - sparsity))


def _router_weights(config: ModelConfig, lte: LTEConfig | None) -> int:
    return 0 if lte is None else config.num_layers * config.d_model * num_experts(config, lte)
