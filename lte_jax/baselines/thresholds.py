"""The share of largest magnitudes as a logit, so that a threshold of 0.5 cuts at a quantile.

A magnitude m is above a cut c where sigmoid(log m - log c) = m / (m + c) is above 1/2: so methods
that cut magnitudes have a score in (0, 1), with a bias of -log c per layer, like a router's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lte_jax.selection import as_last

_LEAST = 1e-20  # in place of a magnitude of 0, whose logarithm is not finite


def score(magnitude: Float[Array, "*B E"], bias: Float[Array, " E"]) -> Float[Array, "*B E"]:
    """In (0, 1); 1/2 where the magnitude is exp(-bias)."""
    logarithm = jnp.log(jnp.maximum(magnitude.astype(jnp.float32), _LEAST))
    return jax.nn.sigmoid(logarithm + as_last(bias, logarithm))


def bias(magnitude: Float[Array, "*B E"], sparsity: float) -> Float[Array, " E"]:
    """The bias with which a share `sparsity` of the magnitudes is at or below 1/2."""
    cut = jnp.maximum(jnp.quantile(magnitude.astype(jnp.float32), sparsity), _LEAST)
    return jnp.full(magnitude.shape[-1], -jnp.log(cut))
