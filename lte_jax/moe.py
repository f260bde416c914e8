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

import typing
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lte_jax import interrupt
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

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def router_logits(router: Mapping[str, Array], x_BLD: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    """What the sigmoid of Eq. 1 is taken of, in float32 whatever the model computes in."""
    logits = x_BLD.astype(jnp.float32) @ router["kernel"].astype(jnp.float32)
    if "bias" in router:
        bias = router["bias"].astype(jnp.float32)
        logits += bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
    return logits


def active_experts(
    scores_BLE: Float[Array, "*B E"],
    threshold: Float[Array, ""] | float,
    top_k: int | None = None,
) -> Bool[Array, "*B E"]:
    """The experts that run: score strictly above the threshold (Eq. 2), or the best `top_k`."""
    if top_k is None:
        return scores_BLE > threshold
    return scores_BLE >= jax.lax.top_k(scores_BLE, top_k)[0][..., -1:]


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
            bias_D = self.param("down_bias", nn.initializers.zeros, (config.d_model,))
            y_BLD += bias_D.astype(self.dtype)[None, None]
        return y_BLD, scores_BLE, active_BLE

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


def contribution(
    h_BLEM: Float[Array, "*B E M"], down_EMD: Float[Array, "E M D"]
) -> Float[Array, "*B E"]:
    """The L2 norm of what each expert adds to the residual stream: how much it matters here."""
    gram_EMK = jnp.einsum("EMD,EKD->EMK", down_EMD, down_EMD)  # M x M an expert: no [.., E, D]
    squared_BLE = jnp.einsum("...EM,EMK,...EK->...E", h_BLEM, gram_EMK, h_BLEM)
    return jnp.sqrt(jnp.maximum(squared_BLE, 0.0))


def random_router(key: Array, num_layers: int, d_model: int, experts: int, lte: LTEConfig):
    """Routers that know nothing: kernel [N, D, E] and bias [N, E].

    "normal": zero-mean logits of standard deviation `router_init_std` on inputs of unit RMS.
    "open": the same, smaller, and a bias that starts with all experts on.

    Raises:
      UserError: "open" without a bias, which has nothing to open with.
    """
    if lte.router_init == "open" and not lte.router_bias:
        raise UserError("lte.router_init='open' needs lte.router_bias=True: a bias opens the gates")
    std = lte.router_init_std * (0.1 if lte.router_init == "open" else 1.0) / d_model**0.5
    router = {"kernel": std * jax.random.normal(key, (num_layers, d_model, experts))}
    if lte.router_bias:
        level = lte.router_init_std if lte.router_init == "open" else 0.0
        router["bias"] = jnp.full((num_layers, experts), level)
    return router


def ridge_router(
    model: nn.Module, params, batches: Sequence[Mapping[str, Array | np.ndarray]], lte: LTEConfig
):
    """Routers regressed on what an oracle would choose: kernel [N, D, E] and bias [N, E].

    On each real token of `batches` ({"tokens", "segments"} [B, L]) the oracle keeps the experts
    of largest `contribution`; ridge regression of that choice on the FFN's input gives the
    direction of each expert's logit. A layer's logits are scaled to a standard deviation of
    `router_init_std`; the bias puts each expert's quantile where the oracle's frequency is.
    Runs the dense model twice over the batches.
    """
    experts, kept = num_experts(model.config, lte), 1.0 - (lte.target_sparsity or 0.5)
    top = max(1, round(kept * experts))

    @jax.jit
    def moments(params, batch):
        x_NTD, h_NTEM, real_T = _ffn_intermediates(model, params, batch)
        importance_NTE = jax.vmap(contribution)(h_NTEM, params["layers"]["ffn"]["down"])
        least_NT1 = jax.lax.top_k(importance_NTE, top)[0][..., -1:]
        chosen_NTE = (importance_NTE >= least_NT1).astype(jnp.float32) * real_T[None, :, None]
        x_NTD = jnp.concatenate([x_NTD, jnp.ones_like(x_NTD[..., :1])], -1) * real_T[None, :, None]
        return {
            "gram": jnp.einsum("NTD,NTK->NDK", x_NTD, x_NTD),
            "cross": jnp.einsum("NTD,NTE->NDE", x_NTD, chosen_NTE),
        }

    total = None
    for batch in batches:
        interrupt.check("while starting routers")
        part = moments(params, batch)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    kernel_NDE = jax.jit(_solve_ridge)(total["gram"], total["cross"])
    count, frequency_NE = total["gram"][0, -1, -1], total["cross"][:, -1]

    @jax.jit
    def logits(params, batch):
        x_NTD, _, real_T = _ffn_intermediates(model, params, batch)
        z_NTE = jnp.einsum("NTD,NDE->NTE", x_NTD, kernel_NDE)
        return jnp.where(real_T[None, :, None] > 0, z_NTE, jnp.nan)

    z_NTE = jnp.concatenate([logits(params, batch) for batch in batches], axis=1)
    std_N11 = jnp.sqrt(jnp.mean(jnp.nanvar(z_NTE, axis=1), axis=-1))[:, None, None]
    scale_N11 = lte.router_init_std / jnp.maximum(std_N11, 1e-6)
    kernel_NDE, z_NTE = kernel_NDE * scale_N11, z_NTE * scale_N11
    if not lte.router_bias:
        return {"kernel": kernel_NDE}
    cut = jax.vmap(jax.vmap(jnp.nanquantile, in_axes=(1, 0)))  # over layers, then experts
    cut_NE = cut(z_NTE, jnp.clip(1.0 - frequency_NE / count, 0.0, 1.0))
    return {"kernel": kernel_NDE, "bias": jnp.log(lte.threshold / (1 - lte.threshold)) - cut_NE}


def _solve_ridge(gram_NDK: Float[Array, "N K K"], cross_NDE: Float[Array, "N K E"]):
    """Ridge regression with an unpenalised constant (the last of K = D + 1); drops its row."""
    size = gram_NDK.shape[-1]
    level_N = jnp.trace(gram_NDK[:, :-1, :-1], axis1=1, axis2=2) / (size - 1)
    penalty_K = jnp.ones(size).at[-1].set(0.0)
    ridge_NDK = 1e-3 * level_N[:, None, None] * jnp.diag(penalty_K)[None]
    solve = jax.vmap(lambda a, b: jax.scipy.linalg.solve(a, b, assume_a="pos"))
    return solve(gram_NDK + ridge_NDK, cross_NDE)[:, :-1]


def _ffn_intermediates(model: nn.Module, params, batch):
    """FFN inputs [N, T, D] and hidden activations [N, T, E, M], T = B*L, and which tokens count."""
    _, sown = model.apply(
        {"params": params},
        batch["tokens"],
        mask=batch["segments"],
        routing="dense",
        mutable="intermediates",
    )
    (x_NBLD,), (h_NBLEM,) = (
        sown["intermediates"]["layers"]["ffn"][n] for n in ("ffn_input", "hidden")
    )
    real_T = (batch["segments"] > 0).astype(jnp.float32).reshape(-1)
    flat = lambda a: a.astype(jnp.float32).reshape(a.shape[0], -1, *a.shape[3:])  # noqa: E731
    return flat(x_NBLD), flat(h_NBLEM), real_T
