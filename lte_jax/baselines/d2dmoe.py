"""D2DMoE: a router predicts the norm of each expert's output; a token's number of experts varies.

Szatkowski et al. 2024 (arXiv 2310.04361) and its code (bartwojcik/D2DMoE): a network of two layers
regresses the L2 norms (mean squared error, absolute values of its outputs); an expert runs if its
predicted norm is above tau times the largest of the token. The model is first fine-tuned towards
sparse activations there, which is left out: all rows of a table start from the same model.

Dimension key: B batch  L length  T tokens  D model width  R hidden units  E experts
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from lte_jax.baselines.method import Layer, Method
from lte_jax.config import LTEConfig
from lte_jax.kernels.reference import ACTIVATIONS
from lte_jax.selection import Routing, Scores, View, contribution

_HIDDEN = 128  # of its routers
_EPOCHS, _BATCH, _RATE, _PATIENCE = 200, 512, 1e-3, 10


class DynamicK(Routing):
    """The experts whose predicted norm is above the threshold times the token's largest."""

    served: ClassVar[str] = "dynamic_k"

    def scores(self, view: View) -> Scores:
        """Predicted norms over their maximum: in [0, 1]."""
        norm_BLE = jnp.abs(view.logits())
        return norm_BLE / jnp.maximum(jnp.max(norm_BLE, axis=-1, keepdims=True), 1e-12)


def loss(predicted_TE, norm_TE):
    """Mean squared error of the absolute values."""
    return jnp.mean((jnp.abs(predicted_TE) - norm_TE) ** 2)


def start(lte: LTEConfig, layer: Layer, key) -> dict:
    """The router of one layer."""
    from lte_jax.baselines import predictor  # imports Optax, which only training needs

    norm_TE = contribution(layer.h_TEM, layer.weights["down"])
    sizes = layer.x_TD.shape[1], lte.router_rank or norm_TE.shape[1], norm_TE.shape[1]
    begin, gelu = predictor.Weights.random(key, sizes, bias=True), ACTIVATIONS["gelu"]
    how = predictor.Training(_EPOCHS, _BATCH, predictor.adam(_RATE), 0.1, _PATIENCE)
    return predictor.fit(begin, layer.x_TD, norm_TE, loss, gelu, how, key).as_router()


METHODS = (
    Method(
        "d2dmoe",
        "D2DMoE",
        "Szatkowski et al. 2024",
        {
            "lte.grouping": "kmeans",
            "lte.router": "two_layer",
            "lte.router_activation": "gelu",
            "lte.router_rank": _HIDDEN,
            "lte.router_init": "norms",
            "lte.routing": "dynamic_k",
        },
        routings={"dynamic_k": DynamicK},
        starts={"norms": start},
    ),
)
