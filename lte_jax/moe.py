"""Routers and expert feed-forward layers.

The feed-forward network (FFN) of a block is a sum of experts, each a slice of M of its neurons; a
router scores every expert for every token. Four routings of the same weights (paper, section 4.2):

  dense             all experts run; the router plays no part
  soft              all run, each multiplied by its score (Eq. 3)
  hard              those with score > threshold run, unmultiplied (Eq. 2)
  straight_through  hard forward, soft gradient: scores learn under the routing they will serve

Dimension key: B batch  L length  D model width  E experts  M neurons per expert  F = E*M  N layers
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lte_jax.config import (
    Activation,
    LTEConfig,
    ModelConfig,
    Routing,
    UserError,
    num_experts,
)

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def router_logits(
    router: Mapping[str, Array], x_BLD: Float[Array, "*B D"]
) -> Float[Array, "*B E"]:
    """What the sigmoid of Eq. 1 is taken of, in float32 whatever the model computes in."""
    logits = x_BLD.astype(jnp.float32) @ router["kernel"].astype(jnp.float32)
    if "bias" in router:
        bias = router["bias"].astype(jnp.float32)
        logits += bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
    return logits


def active_experts(
    scores_BLE: Float[Array, "*B E"], threshold: Float[Array, ""] | float
) -> Bool[Array, "*B E"]:
    """The experts that run under hard routing: score strictly above the threshold (Eq. 2)."""
    return scores_BLE > threshold


def gates(
    routing: Routing, scores_BLE: Float[Array, "B L E"], threshold: Float[Array, ""] | float
) -> Float[Array, "B L E"]:
    """What each expert's contribution is multiplied by."""
    if routing == "soft":
        return scores_BLE
    active_BLE = active_experts(scores_BLE, threshold).astype(scores_BLE.dtype)
    if routing == "hard":
        return jax.lax.stop_gradient(active_BLE)
    if routing == "straight_through":
        return jax.lax.stop_gradient(active_BLE - scores_BLE) + scores_BLE
    raise UserError(f"routing={routing!r}: expected dense, soft, hard or straight_through")


def hidden(
    weights: Mapping[str, Array], x_BLD: Float[Array, "B L D"], activation: Activation
) -> Float[Array, "B L E M"]:
    """Neuron activations of every expert: act(x gate) * (x up), or act(x up) without a gate."""

    def project(name: str) -> Array:
        h_BLEM = jnp.einsum("BLD,EMD->BLEM", x_BLD, weights[name])
        if f"{name}_bias" in weights:
            h_BLEM += weights[f"{name}_bias"][None, None]
        return h_BLEM

    act = _ACTIVATIONS[activation]
    return act(project("gate")) * project("up") if "gate" in weights else act(project("up"))


class Router(nn.Module):
    """A linear layer and a sigmoid: one score per token and expert (Eq. 1)."""

    num_experts: int
    use_bias: bool

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
        """Scores in (0, 1), float32."""
        shape = (x_BLD.shape[-1], self.num_experts)
        router = {"kernel": self.param("kernel", nn.initializers.lecun_normal(), shape)}
        if self.use_bias:
            router["bias"] = self.param("bias", nn.initializers.zeros, shape[1:])
        return jax.nn.sigmoid(router_logits(router, x_BLD))


class ExpertFFN(nn.Module):
    """The FFN of one block: dense (one expert, no router) where `lte` is None."""

    config: ModelConfig
    lte: LTEConfig | None
    routing: Routing
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], threshold: Float[Array, ""] | float
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L E"] | None]:
        """The layer's output and the router's scores (None in a dense model)."""
        config, experts = self.config, num_experts(self.config, self.lte)
        weights = self._weights(experts, config.d_ff // experts)
        h_BLEM = hidden(weights, x_BLD, config.activation)
        self.sow("intermediates", "ffn_input", x_BLD)
        self.sow("intermediates", "hidden", h_BLEM)
        scores_BLE = None
        if self.lte is not None:
            scores_BLE = Router(experts, self.lte.router_bias, name="router")(x_BLD)
            if self.routing != "dense":
                gates_BLE = gates(self.routing, scores_BLE, threshold)
                h_BLEM *= gates_BLE.astype(h_BLEM.dtype)[..., None]
        y_BLD = jnp.einsum("BLEM,EMD->BLD", h_BLEM, weights["down"])
        if config.mlp_bias:  # outside the routing: it belongs to no expert
            bias_D = self.param("down_bias", nn.initializers.zeros, (config.d_model,))
            y_BLD += bias_D.astype(self.dtype)[None, None]
        return y_BLD, scores_BLE

    def _weights(self, experts: int, neurons: int) -> dict[str, Array]:
        shape = (experts, neurons, self.config.d_model)
        names = ("gate", "up", "down") if self.config.gated else ("up", "down")
        init = nn.initializers.normal(self.config.d_model**-0.5)
        weights = {name: self.param(name, init, shape) for name in names}
        if self.config.mlp_bias:
            for name in names[:-1]:
                bias = f"{name}_bias"
                weights[bias] = self.param(bias, nn.initializers.zeros, shape[:2])
        return {name: w.astype(self.dtype) for name, w in weights.items()}
