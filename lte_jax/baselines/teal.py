"""TEAL: entries of the inputs of all matrices below a cut are taken for zero.

Liu et al. 2024 (arXiv 2408.14690) and its code (FasterDecoding/TEAL): |x| above a cut stays, the
cut of an input being the quantile of its magnitudes at the wanted sparsity. Here of the FFN alone:
its input, which gate and up share, and h, the input of down. All at the same sparsity (its
"uniform"); the code sparsifies the second half of a prompt, here all tokens are.

Dimension key: B batch  L length  T tokens  D model width  E experts  M neurons per expert
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from lte_jax.baselines import thresholds
from lte_jax.baselines.method import Layer, Method
from lte_jax.config import LTEConfig
from lte_jax.selection import Active, Choice, Routing, View


class OfInputs(Routing):
    """Skips columns: entries of each matrix's input, in place of experts."""

    by_threshold: ClassVar[bool] = False
    reads_neurons: ClassVar[bool] = True

    def neurons(self, view: View) -> Active:
        """True at the neurons whose row of `down` is read."""
        raise NotImplementedError

    def choose(self, view: View, threshold: Float[Array, ""] | float) -> Choice:
        """The neurons that stay; `active` holds the share of each matrix that is read."""
        del threshold
        kept_BLE = self.neurons(view).astype(jnp.float32)
        names = [name for name in ("gate", "up") if name in view.weights]
        read = [jnp.mean(self.inputs(view, name) != 0, axis=-1) for name in names]
        read_BLP = jnp.stack([*read, jnp.mean(kept_BLE, axis=-1)], axis=-1)
        return Choice(read_BLP, read_BLP, kept_BLE)


class Teal(OfInputs):
    """The entries of large magnitude."""

    served: ClassVar[str] = "teal"

    def inputs(self, view: View, matrix: str) -> Float[Array, "*B D"]:
        """x, or zero below the cut."""
        del matrix
        score_BLD = thresholds.score(jnp.abs(view.x_BLD), view.weights["router"]["input_bias"])
        return jnp.where(score_BLD > 0.5, view.x_BLD, 0)

    def neurons(self, view: View) -> Active:
        """Those with |h| above the cut."""
        h_BLE = jnp.abs(view.h_BLEM[..., 0])
        return thresholds.score(h_BLE, view.weights["router"]["bias"]) > 0.5


def start(lte: LTEConfig, layer: Layer, key) -> dict:
    """The cuts of one layer. That of h is of h as it is before inputs are cut."""
    del key
    wanted = lte.wanted_sparsity("lte.router_init='quantiles'")
    return {
        "input_bias": thresholds.bias(jnp.abs(layer.x_TD), wanted),
        "bias": thresholds.bias(jnp.abs(layer.h_TEM[..., 0]), wanted),
    }


METHODS = (
    Method(
        "teal",
        "TEAL",
        "Liu et al. 2024",
        {
            "lte.expert_size": 1,
            "lte.router": "cuts",
            "lte.router_init": "quantiles",
            "lte.routing": "teal",
        },
        routings={"teal": Teal},
        starts={"quantiles": start},
    ),
)
