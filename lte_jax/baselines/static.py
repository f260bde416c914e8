"""Static removal: the same experts run for every token. The null hypothesis of dynamic sparsity.

Of each layer, the experts of least mean contribution to the residual stream are removed. Layers
keep the same number, or one more where the share that is wanted is not whole.

Dimension key: T tokens  E experts  M neurons per expert
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from lte_jax.baselines.method import Layer, Method
from lte_jax.config import LTEConfig
from lte_jax.selection import Active, Routing, Scores, contribution, largest


class Static(Routing):
    """The experts whose constant score is above 1/2: no threshold moves it."""

    by_threshold: ClassVar[bool] = False
    served: ClassVar[str] = "static"

    def active(self, scores_BLE: Scores, threshold: Float[Array, ""] | float) -> Active:
        """Those that stay."""
        del threshold
        return scores_BLE > 0.5


def start(lte: LTEConfig, layer: Layer, key) -> dict:
    """A constant logit of each expert: positive at those that stay."""
    del key
    down_EMD = layer.weights["down"]
    mean_E = jnp.mean(contribution(layer.h_TEM, down_EMD), axis=0)
    kept = 1.0 - lte.wanted_sparsity("lte.router_init='removal'")
    before, after = (round(kept * len(mean_E) * n) for n in (layer.index, layer.index + 1))
    stays_E = largest(mean_E, max(1, after - before))
    return {"bias": jnp.where(stays_E, 4.0, -4.0)}  # scores 0.982 and 0.018


METHODS = (
    Method(
        "static",
        "static removal",
        "experts of least mean contribution removed for all tokens",
        {"lte.router": "constant", "lte.router_init": "removal", "lte.routing": "static"},
        routings={"static": Static},
        starts={"removal": start},
    ),
)
