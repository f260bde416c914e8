"""CATS: a neuron runs if |act(x gate)| is above a cut; the gate matrix is always read.

Lee et al. 2024 (arXiv 2404.08763): the cut of a layer is the quantile of |act(x gate)| at the
wanted sparsity, over calibration tokens. Up and down projections of the other neurons are skipped,
so the FFN's share that is skipped is two thirds of the sparsity, which is of neurons.

Dimension key: T tokens  F neurons, each an expert
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from lte_jax.baselines import thresholds
from lte_jax.baselines.method import Layer, Method
from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.selection import Routing, Scores, View


class Cats(Routing):
    """The neurons whose gate is large."""

    reads_neurons: ClassVar[bool] = True
    served: ClassVar[str] = "cats"

    def scores(self, view: View) -> Scores:
        """|act(x gate)| over itself and the cut."""
        gate_BLE = jnp.abs(view.gate_BLEM[..., 0])
        return thresholds.score(gate_BLE, view.weights["router"]["bias"])

    @staticmethod
    def ffn_weights(config: ModelConfig, sparsity: float) -> float:
        """Gate, and what is left of up and down."""
        matrices = 3 if config.gated else 2
        return config.d_model * config.d_ff * (1 + (matrices - 1) * (1 - sparsity))


def start(lte: LTEConfig, layer: Layer, key) -> dict:
    """The cut of one layer."""
    del key
    wanted = lte.wanted_sparsity("lte.router_init='quantile'")
    return {"bias": thresholds.bias(jnp.abs(layer.gate_TEM[..., 0]), wanted)}


METHODS = (
    Method(
        "cats",
        "CATS",
        "Lee et al. 2024",
        {
            "lte.expert_size": 1,
            "lte.router": "constant",
            "lte.router_init": "quantile",
            "lte.routing": "cats",
        },
        routings={"cats": Cats},
        starts={"quantile": start},
    ),
)
