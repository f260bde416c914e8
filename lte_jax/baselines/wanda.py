"""Wanda: weights of small magnitude times input norm are set to zero, once, for all tokens.

Sun et al. 2023 (arXiv 2306.11695), section 3: the score of W_ij is |W_ij| |X_j|, |X_j| being the L2
norm of input j over the calibration tokens; within each output i the weights of smallest score go
(unstructured), or in each group of m consecutive inputs all but n (n:m). Here of the FFN's matrices
alone; h, the input of `down`, is that of the unpruned layer. Adapted, the zeros stay.

Dimension key: B batch  L length  T tokens  D model width  F neurons of the only expert
               P matrices  I inputs and O outputs of a matrix
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lte_jax.baselines.method import Layer, Method
from lte_jax.config import LTEConfig
from lte_jax.errors import UserError
from lte_jax.selection import Choice, Routing, View


class Pruned(Routing):
    """Every token uses the weights that are not zero."""

    by_threshold: ClassVar[bool] = False
    reads_neurons: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True
    served: ClassVar[str] = "pruned"

    def choose(self, view: View, threshold: Float[Array, ""] | float) -> Choice:
        """The share of each matrix that is not zero."""
        del threshold
        names = [name for name in ("gate", "up", "down") if name in view.weights]
        left_P = jnp.stack([jnp.mean(view.weights[name] != 0, dtype=jnp.float32) for name in names])
        left_BLP = jnp.broadcast_to(left_P, (*view.x_BLD.shape[:-1], len(names)))
        return Choice(left_BLP, left_BLP, None)


def kept(
    w_OI: Float[np.ndarray, "O I"],
    norm_I: Float[np.ndarray, " I"],
    sparsity: float,
    group: tuple[int, int] | None = None,
) -> np.ndarray:
    """True at the weights that stay; `group` is (n, m), None: unstructured."""
    score_OI = np.abs(w_OI) * norm_I
    if group is None:
        gone = int(score_OI.shape[1] * sparsity)
        return np.argsort(np.argsort(score_OI, axis=1, kind="stable"), axis=1) >= gone
    n, m = group
    if score_OI.shape[1] % m:
        raise UserError(
            f"Wanda {n}:{m}: a matrix of {score_OI.shape[1]} inputs: expected a multiple of {m}"
        )
    grouped = score_OI.reshape(len(score_OI), -1, m)
    rank = np.argsort(np.argsort(grouped, axis=2, kind="stable"), axis=2)
    return (rank >= m - n).reshape(score_OI.shape)


def pruner(group: tuple[int, int] | None = None):
    """(lte, layer) -> the layer's matrices with zeros."""

    def prune(lte: LTEConfig, layer: Layer) -> dict[str, np.ndarray]:
        sparsity = lte.wanted_sparsity("lte.router_init='wanda'")
        if group is not None and abs(1 - group[0] / group[1] - sparsity) > 1e-6:
            raise UserError(
                f"lte.target_sparsity={sparsity}: expected {1 - group[0] / group[1]} with Wanda "
                f"{group[0]}:{group[1]}"
            )
        x_I = np.linalg.norm(layer.x_TD, axis=0)
        h_I = np.linalg.norm(layer.h_TEM.reshape(len(layer.h_TEM), -1), axis=0)
        pruned = {}
        for name, w_EMD in layer.weights.items():
            w_FD = w_EMD.reshape(-1, w_EMD.shape[-1])
            if name == "down":  # whose columns are outputs
                stays_FD = kept(w_FD.T, h_I, sparsity, group).T
            else:
                stays_FD = kept(w_FD, x_I, sparsity, group)
            pruned[name] = (w_FD * stays_FD).reshape(w_EMD.shape)
        return pruned

    return prune


def _method(name: str, title: str, group: tuple[int, int] | None) -> Method:
    return Method(
        name,
        title,
        "Sun et al. 2023",
        {
            "lte.router": "none",
            "lte.router_init": name,
            "lte.routing": "pruned",
            "lte.refit": False,
        },
        routings={"pruned": Pruned},
        pruners={name: pruner(group)},
    )


METHODS = (
    _method("wanda", "Wanda, unstructured", None),
    _method("wanda_2_4", "Wanda, 2:4", (2, 4)),
    _method("wanda_4_8", "Wanda, 4:8", (4, 8)),
)
