"""WINA: entries of an input stay by magnitude times the norm of the column that they meet.

Chen et al. 2025 (arXiv 2505.19427): of the input x of a matrix W, the entries of largest |x_i| c_i
stay, c_i being the L2 norm of W's column i. The share that stays is the same for all matrices; the
rotation that makes columns orthogonal is left out. Of the FFN alone.

Dimension key: B batch  L length  D model width  E experts  M neurons per expert
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from lte_jax.baselines.method import Method
from lte_jax.baselines.teal import OfInputs
from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.selection import Active, View, as_last, largest


@dataclasses.dataclass(frozen=True)
class Wina(OfInputs):
    """The entries of largest magnitude times column norm."""

    served: ClassVar[str] = "wina"
    reads_weights: ClassVar[bool] = True
    inputs_kept: int
    neurons_kept: int

    @classmethod
    def of(cls, config: ModelConfig, lte: LTEConfig) -> Wina:
        """The same share of the inputs of all matrices, at least one entry of each."""
        kept = 1.0 - lte.wanted_sparsity("routing='wina'")
        return cls(*(max(1, round(kept * width)) for width in (config.d_model, config.d_ff)))

    def inputs(self, view: View, matrix: str) -> Float[Array, "*B D"]:
        """x, or zero where the product is small."""
        w_EMD = view.weights[matrix].astype(jnp.float32)
        x_BLD = jnp.abs(view.x_BLD.astype(jnp.float32))
        size_BLD = x_BLD * as_last(jnp.linalg.norm(w_EMD, axis=(0, 1)), x_BLD)
        return jnp.where(largest(size_BLD, self.inputs_kept), view.x_BLD, 0)

    def neurons(self, view: View) -> Active:
        """Those with the largest |h| times the norm of their row of down."""
        norm_E = jnp.linalg.norm(view.weights["down"][:, 0].astype(jnp.float32), axis=-1)
        h_BLE = jnp.abs(view.h_BLEM[..., 0].astype(jnp.float32))
        return largest(h_BLE * as_last(norm_E, h_BLE), self.neurons_kept)


METHODS = (
    Method(
        "wina",
        "WINA",
        "Chen et al. 2025",
        {"lte.expert_size": 1, "lte.router": "none", "lte.routing": "wina"},
        routings={"wina": Wina},
    ),
)
