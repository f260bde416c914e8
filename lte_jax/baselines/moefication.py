"""MoEfication: experts of similar neurons of a ReLU network, chosen by their positive activations.

Zhang et al. 2022 (arXiv 2110.01786) and its code (thunlp/MoEfication): k-means on normalised rows
of the first matrix; an expert's score is the sum of its neurons' activations; the k experts of
largest score run. Three ways to choose them: by those scores themselves (ground truth, as the LTE
paper ran it: an oracle), by a small network trained on them, or by the distance of the input to the
mean of an expert's rows. For networks of other activations the paper first swaps in ReLU and
fine-tunes: source.activation="relu" with a finetune stage.

Dimension key: B batch  L length  T tokens  D model width  E experts  M neurons per expert
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lte_jax.baselines.method import Layer, Method
from lte_jax.baselines.oracle import Oracle
from lte_jax.config import LTEConfig
from lte_jax.errors import UserError
from lte_jax.selection import Largest, Scores, View

_EPOCHS, _BATCH, _RATE = 30, 512, 1e-2  # of its code


@dataclasses.dataclass(frozen=True)
class GroundTruth(Oracle):
    """The experts of largest summed activation, which must be known."""

    served: ClassVar[str] = "activations"

    def scores(self, view: View) -> Scores:
        """Sums of the positive parts of the first matrix's activations."""
        return activation_sums(view.gate_BLEM)


@dataclasses.dataclass(frozen=True)
class OfUnitInput(Largest):
    """The experts of largest logit, of a router that reads the input at length 1."""

    served: ClassVar[str] = "top_k_unit"

    @staticmethod
    def router_input(x_BLD):
        """The input over its length."""
        return unit(x_BLD)


def activation_sums(gate_TEM) -> Scores:
    """An expert's score: the sum of max(activation, 0) over its neurons."""
    return jnp.sum(jnp.maximum(gate_TEM.astype(jnp.float32), 0.0), axis=-1)


def unit(x_TD):
    """Vectors at length 1."""
    x_TD = x_TD.astype(jnp.float32)
    return x_TD / jnp.maximum(jnp.linalg.norm(x_TD, axis=-1, keepdims=True), 1e-12)


def centers(layer: Layer):
    """The mean of the normalised rows of each expert, [E, D]."""
    return jnp.mean(unit(layer.first_EMD), axis=1)


def similar(lte: LTEConfig, layer: Layer, key) -> dict:
    """A linear router whose logits rank experts as -|x / |x| - center| does."""
    del lte, key
    center_ED = centers(layer)
    return {"kernel": 2 * center_ED.T, "bias": -jnp.sum(center_ED**2, axis=1)}


def trained(lte: LTEConfig, layer: Layer, key) -> dict:
    """Two matrices with tanh between, trained on the scores over their batch's maximum.

    They start as the centers and the identity, so there are as many hidden units as experts.

    Raises:
      UserError: if lte.router_rank is another number.
    """
    from lte_jax.baselines import predictor

    center_ED = centers(layer)
    if lte.router_rank not in (None, len(center_ED)):
        raise UserError(
            f"lte.router_rank={lte.router_rank}: expected None with lte.router_init='trained', "
            "whose network has a hidden unit for each expert"
        )
    begin = predictor.Weights(center_ED.T, jnp.eye(len(center_ED)))

    def loss(logits_TE, target_TE):
        return jnp.mean(predictor.cross_entropy(logits_TE, target_TE / target_TE.max()))

    how = predictor.Training(_EPOCHS, _BATCH, predictor.adam(_RATE), 0.1)
    target_TE = activation_sums(layer.gate_TEM)
    found = predictor.fit(begin, unit(layer.x_TD), target_TE, loss, jnp.tanh, how, key)
    return found.as_router()


_COMMON = {"lte.grouping": "kmeans"}
_PAPER = "Zhang et al. 2022"
METHODS = (
    Method(
        "moefication_oracle",
        "MoEfication, ground truth (oracle)",
        _PAPER,
        _COMMON | {"lte.router": "none", "lte.routing": "activations"},
        oracle=True,
        routings={"activations": GroundTruth},
    ),
    Method(
        "moefication_similarity",
        "MoEfication, similarity",
        _PAPER,
        _COMMON | {"lte.router_init": "similar", "lte.routing": "top_k_unit"},
        routings={"top_k_unit": OfUnitInput},
        starts={"similar": similar},
    ),
    Method(
        "moefication",
        "MoEfication, trained",
        _PAPER,
        _COMMON
        | {
            "lte.router": "two_layer",
            "lte.router_activation": "tanh",
            "lte.router_bias": False,
            "lte.router_init": "trained",
            "lte.routing": "top_k_unit",
        },
        starts={"trained": trained},
    ),
)
