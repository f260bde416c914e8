"""Small networks of two matrices, fitted to activations: the routers of several methods.

Dimension key: T tokens  D model width  R hidden units (lte.router_rank)  E experts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lte_jax import interrupt

Function = Callable[[Array], Array]


class Weights(NamedTuple):
    """outer(act(inner x)); without biases where they are None."""

    inner: Any  # [D, R]
    outer: Any  # [R, E]
    inner_bias: Any = None  # [R]
    outer_bias: Any = None  # [E]

    @classmethod
    def random(cls, key: Array, sizes: tuple[int, int, int], bias: bool) -> Weights:
        """Normal, with variance 1 / inputs; `sizes` are D, R and E."""
        width, rank, experts = sizes
        keys = jax.random.split(key)
        inner = jax.random.normal(keys[0], (width, rank)) / width**0.5
        outer = jax.random.normal(keys[1], (rank, experts)) / rank**0.5
        zeros = (jnp.zeros(rank), jnp.zeros(experts)) if bias else (None, None)
        return cls(inner, outer, *zeros)

    def __call__(self, x_TD: Array, act: Function) -> Float[Array, "T E"]:
        """The network's outputs."""
        hidden_TR = x_TD @ self.inner
        hidden_TR = act(hidden_TR if self.inner_bias is None else hidden_TR + self.inner_bias[None])
        y_TE = hidden_TR @ self.outer
        return y_TE if self.outer_bias is None else y_TE + self.outer_bias[None]

    def as_router(self) -> dict[str, Any]:
        """The parameters of a router of kind two_layer."""
        inner, outer = {"kernel": self.inner}, {"kernel": self.outer}
        if self.inner_bias is not None:
            inner["bias"], outer["bias"] = self.inner_bias, self.outer_bias
        return {"inner": inner, "outer": outer}


class Training(NamedTuple):
    """How to fit; the weights of least loss on the held-out tokens are kept."""

    epochs: int
    batch: int
    optimizer: optax.GradientTransformation
    held_out: float  # share of the tokens, the last ones
    patience: int | None = None  # stops after so many epochs without a smaller loss


def cross_entropy(logits_TE: Array, target_TE: Array) -> Array:
    """Of each sigmoid and its target in [0, 1], in nats."""
    return optax.sigmoid_binary_cross_entropy(logits_TE, target_TE)


def adam(rate: float, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """AdamW with a constant rate; PyTorch's defaults otherwise."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(optax.scale_by_adam(), decay, optax.scale(-rate))


def fit(
    begin: Weights,
    x_TD: Float[Array | np.ndarray, "T D"],
    target_TE: Float[Array | np.ndarray, "T E"],
    loss: Callable[[Array, Array], Array],
    act: Function,
    how: Training,
    key: Array,
) -> Weights:
    """The weights, fitted to `loss(network(x), target)` over epochs in random order."""
    x_TD, target_TE = jnp.asarray(x_TD), jnp.asarray(target_TE)
    kept = max(1, int(len(x_TD) * (1 - how.held_out)))
    seen, held = (x_TD[:kept], target_TE[:kept]), (x_TD[kept:], target_TE[kept:])
    if not len(held[0]):
        held = seen
    batch = min(how.batch, kept)

    def step(carry, places):
        weights, state = carry
        slope = jax.grad(lambda w: loss(w(seen[0][places], act), seen[1][places]))(weights)
        updates, state = how.optimizer.update(slope, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    @jax.jit
    def epoch(weights: Weights, state: optax.OptState, order: Array):
        (new, state), _ = jax.lax.scan(step, (weights, state), order)
        fitted = cast(Weights, new)
        return fitted, state, loss(fitted(held[0], act), held[1])

    weights, state = begin, how.optimizer.init(begin)
    best, least, waited = begin, float(loss(begin(held[0], act), held[1])), 0
    for key_of_epoch in jax.random.split(key, how.epochs):
        interrupt.check("while fitting routers")
        order = jax.random.permutation(key_of_epoch, kept)
        order = order[: kept // batch * batch].reshape(-1, batch)
        weights, state, found = epoch(weights, state, order)
        if float(found) < least:
            best, least, waited = weights, float(found), 0
        elif how.patience is not None and (waited := waited + 1) >= how.patience:
            break
    return best
