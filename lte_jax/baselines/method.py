"""What a method of others is: its settings, how it chooses, and how it is prepared.

Dimension key: T tokens  D model width  E experts  M neurons per expert
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.selection import Routing


class Layer(NamedTuple):
    """One layer's FFN on calibration tokens, float32: what a router may be made of."""

    x_TD: Float[np.ndarray, "T D"]  # inputs
    gate_TEM: Float[np.ndarray, "T E M"]  # act(x gate); without a gate act(x up)
    h_TEM: Float[np.ndarray, "T E M"]  # act(x gate) * (x up)
    weights: Mapping[str, Any]  # gate (if gated), up and down, [E, M, D]
    config: ModelConfig
    index: int  # of the layer, from 0

    @property
    def first_EMD(self) -> Float[np.ndarray, "E M D"]:
        """The matrix that the activation function follows."""
        return self.weights["gate" if self.config.gated else "up"]


# (lte, layer, key) -> the parameters of the layer's router
Start = Callable[[LTEConfig, Layer, Array], dict[str, Any]]
# (lte, layer of one expert) -> the neurons of each expert, [E, M]
Grouping = Callable[[LTEConfig, Layer], np.ndarray]
# (lte, layer) -> the matrices of the layer
Pruner = Callable[[LTEConfig, Layer], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of others, as a change of an experiment.

    Attributes:
      name: in METHODS.
      title: as in tables.
      source: publication.
      settings: key of an experiment -> value.
      trains_router: whether its router learns with the model, in the router stage; else it is
        frozen from the start and all steps are of the stage adapt.
      oracle: whether it computes what it then skips, so that it cannot be served.
      routings: names of `lte.routing` that it adds.
      starts: names of `lte.router_init` that it adds.
      groupings: names of `lte.grouping` that it adds.
      pruners: names of `lte.router_init` with which it changes the weights, having no router.
    """

    name: str
    title: str
    source: str
    settings: Mapping[str, Any]
    trains_router: bool = False
    oracle: bool = False
    routings: Mapping[str, type[Routing]] = dataclasses.field(default_factory=dict)
    starts: Mapping[str, Start] = dataclasses.field(default_factory=dict)
    groupings: Mapping[str, Grouping] = dataclasses.field(default_factory=dict)
    pruners: Mapping[str, Pruner] = dataclasses.field(default_factory=dict)
