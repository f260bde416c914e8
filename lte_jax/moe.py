"""Routers and expert feed-forward layers.

The feed-forward network (FFN) of a block is a sum of experts, each a slice of M of its neurons; a
router scores every expert for every token. Five routings of the same weights (paper, section 4.2):

  dense             all experts run; the router plays no part
  soft              all run, each multiplied by its score (Eq. 3)
  hard              those with score > threshold run, unmultiplied (Eq. 2)
  straight_through  hard forward, soft gradient: scores learn under the routing they will serve
  top_k             the (1 - target_sparsity) E experts of largest score, for comparisons

Dimension key: B batch  L length  D model width  E experts  M neurons per expert  F = E*M  N layers
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lte_jax.config import (
    Activation,
    LTEConfig,
    ModelConfig,
    Routing,
    UserError,
    nearest,
    num_experts,
    top_k,
)

_HIGHEST = jax.lax.Precision.HIGHEST
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def router_logits(router: Mapping[str, Array], x_BLD: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    """What the sigmoid of Eq. 1 is taken of, in float32 whatever the model computes in."""
    # Unless told otherwise, TPUs and GPUs round a float32 product's operands: other experts.
    logits = jnp.matmul(
        x_BLD.astype(jnp.float32), router["kernel"].astype(jnp.float32), precision=_HIGHEST
    )
    if "bias" in router:
        bias = router["bias"].astype(jnp.float32)
        logits += bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
    return logits


def active_experts(
    scores_BLE: Float[Array, "*B E"],
    threshold: Float[Array, ""] | float,
    top_k: int | None = None,
) -> Bool[Array, "*B E"]:
    """The experts that run: score strictly above the threshold (Eq. 2), or `largest` `top_k`."""
    return scores_BLE > threshold if top_k is None else largest(scores_BLE, top_k)


def largest(x_BE: Float[Array, "*B E"], count: int) -> Bool[Array, "*B E"]:
    """Where the `count` largest values of each row stand; of equal ones, those of lowest index."""
    return first_largest(x_BE, jax.lax.top_k(x_BE, count)[0][..., -1:], count)


def first_largest(
    x_BE: Float[Array, "*B E"], least_B1: Float[Array, "*B 1"], count: Int[Array, "*B 1"] | int
) -> Bool[Array, "*B E"]:
    """`largest`, where the smallest of the values that are kept is known already."""
    above_BE, equal_BE = x_BE > least_B1, x_BE == least_B1
    room_B1 = count - jnp.sum(above_BE, axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BE | (equal_BE & (jnp.cumsum(equal_BE, axis=-1, dtype=jnp.int32) <= room_B1))


def gates(
    routing: Routing, scores_BLE: Float[Array, "B L E"], active_BLE: Bool[Array, "B L E"]
) -> Float[Array, "B L E"]:
    """What each expert's contribution is multiplied by, given its score and whether it runs."""
    if routing == "soft":
        return scores_BLE
    ones_BLE = active_BLE.astype(scores_BLE.dtype)
    if routing in ("hard", "top_k"):
        return ones_BLE
    if routing == "straight_through":
        return jax.lax.stop_gradient(ones_BLE - scores_BLE) + scores_BLE
    raise UserError(f"routing={routing!r}: {nearest(str(routing), typing.get_args(Routing))}")


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
        init = nn.initializers.lecun_normal()
        router = {"kernel": self.param("kernel", init, shape, jnp.float32)}
        if self.use_bias:
            router["bias"] = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
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
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L E"] | None, Bool[Array, "B L E"] | None]:
        """The layer's output, router scores, active experts (None under dense routing)."""
        config, experts = self.config, num_experts(self.config, self.lte)
        weights = self._weights(experts, config.d_ff // experts)
        h_BLEM = hidden(weights, x_BLD, config.activation)
        self.sow("intermediates", "ffn_input", x_BLD)
        self.sow("intermediates", "hidden", h_BLEM)
        scores_BLE = active_BLE = None
        if self.lte is not None and (self.routing != "dense" or self.is_initializing()):
            scores_BLE = Router(experts, self.lte.router_bias, name="router")(x_BLD)
        if scores_BLE is not None and self.routing != "dense":
            kept = top_k(config, self.lte, self.routing)
            active_BLE = active_experts(scores_BLE, threshold, kept)
            gates_BLE = gates(self.routing, scores_BLE, active_BLE)
            h_BLEM *= gates_BLE.astype(h_BLEM.dtype)[..., None]
        y_BLD = jnp.einsum("BLEM,EMD->BLD", h_BLEM, weights["down"])
        if config.mlp_bias:  # outside the routing: it belongs to no expert
            bias_D = self.param("down_bias", nn.initializers.zeros, (config.d_model,), jnp.float32)
            y_BLD += bias_D.astype(self.dtype)[None, None]
        return y_BLD, scores_BLE, active_BLE

    def _weights(self, experts: int, neurons: int) -> dict[str, Array]:
        shape = (experts, neurons, self.config.d_model)
        names = ("gate", "up", "down") if self.config.gated else ("up", "down")
        init = nn.initializers.normal(self.config.d_model**-0.5)
        weights = {name: self.param(name, init, shape, jnp.float32) for name in names}
        if self.config.mlp_bias:
            for name in names[:-1]:
                bias = f"{name}_bias"
                weights[bias] = self.param(bias, nn.initializers.zeros, shape[:2], jnp.float32)
        return {name: w.astype(self.dtype) for name, w in weights.items()}


def contribution(
    h_BLEM: Float[Array, "*B E M"], down_EMD: Float[Array, "E M D"]
) -> Float[Array, "*B E"]:
    """The L2 norm of what each expert adds to the residual stream: how much it matters here."""
    einsum = functools.partial(jnp.einsum, precision=_HIGHEST)
    gram_EMK = einsum("EMD,EKD->EMK", down_EMD, down_EMD)  # M x M an expert: no [.., E, D]
    squared_BLE = einsum("...EM,EMK,...EK->...E", h_BLEM, gram_EMK, h_BLEM)
    return jnp.sqrt(jnp.maximum(squared_BLE, 0.0))
