"""Oracles: they compute every neuron, then keep the largest. Bounds, not methods to serve.

oracle_neurons   the neurons of largest |h| ("keep largest activations")
oracle_experts   the experts of largest contribution to the residual stream
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lte_jax.baselines.method import Method
from lte_jax.config import ModelConfig
from lte_jax.selection import Largest, Scores, View, contribution


@dataclasses.dataclass(frozen=True)
class Oracle(Largest):
    """The largest experts by something that only a dense FFN knows."""

    reads_neurons: ClassVar[bool] = True

    @staticmethod
    def ffn_weights(config: ModelConfig, sparsity: float) -> float:
        """All of them: what is skipped was computed to know it."""
        del sparsity
        return Largest.ffn_weights(config, 0.0)


@dataclasses.dataclass(frozen=True)
class OracleNeurons(Oracle):
    """The experts of largest mean |h|; with experts of one neuron, the largest neurons."""

    served: ClassVar[str] = "oracle_neurons"

    def scores(self, view: View) -> Scores:
        """Mean |h| of each expert."""
        return jnp.mean(jnp.abs(view.h_BLEM.astype(jnp.float32)), axis=-1)


@dataclasses.dataclass(frozen=True)
class OracleExperts(Oracle):
    """The experts whose outputs have the largest L2 norms."""

    served: ClassVar[str] = "oracle_experts"
    reads_weights: ClassVar[bool] = True

    def scores(self, view: View) -> Scores:
        """The norms."""
        down_EMD = view.weights["down"].astype(jnp.float32)
        return contribution(view.h_BLEM.astype(jnp.float32), down_EMD)


_COMMON = {"lte.router": "none"}
METHODS = (
    Method(
        "oracle_neurons",
        "largest neurons (oracle)",
        "keep largest activations; the bound of all methods that choose neurons",
        _COMMON | {"lte.routing": "oracle_neurons", "lte.expert_size": 1},
        oracle=True,
        routings={"oracle_neurons": OracleNeurons},
    ),
    Method(
        "oracle_experts",
        "largest experts (oracle)",
        "the choice that our routers start from",
        _COMMON | {"lte.routing": "oracle_experts"},
        oracle=True,
        routings={"oracle_experts": OracleExperts},
    ),
)
