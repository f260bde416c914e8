"""CMoE: shared experts of the busiest neurons, and routed ones chosen by a neuron of each.

Pei et al. 2025 (arXiv 2502.04416) and its code (JarvisPei/CMoE). For each calibration token the
K = 10 neurons of largest |h| are marked, with input and rows at length 1. The neurons marked most
often make the shared experts, which always run. The others are put in experts by one balanced
assignment, which minimises the L1 distance of marks to those of the next busiest neurons. The
router computes, for each routed expert, |silu(g x) (u x)| of its neuron whose marks are closest to
the expert's mean; the largest run. Half of the experts that run are shared. Its learned scales,
which start at 1, and its bias for balance are left out.

Dimension key: T tokens  D model width  F neurons  E experts  M neurons per expert
               S shared experts
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from lte_jax.baselines.method import Layer, Method
from lte_jax.baselines.moefication import unit
from lte_jax.config import LTEConfig
from lte_jax.errors import UserError
from lte_jax.kernels.reference import ACTIVATIONS
from lte_jax.selection import Largest, Scores, View, largest

MARKED = 10  # neurons of each token
_ALWAYS = 1e6  # logit of shared experts, above any other


@dataclasses.dataclass(frozen=True)
class Representative(Largest):
    """The shared experts and those whose representative neuron is the largest."""

    served: ClassVar[str] = "representative"

    def scores(self, view: View) -> Scores:
        """|act(g x) (u x)|; of shared experts more than that."""
        return jnp.abs(view.logits())


def shared_count(lte: LTEConfig, experts: int) -> int:
    """Half of the experts that run."""
    kept = 1.0 - lte.wanted_sparsity("lte.grouping='cmoe'")
    return max(1, round(kept * experts)) // 2


def marks(layer: Layer) -> np.ndarray:
    """True at the MARKED largest neurons of each token, [T, F]."""
    if "gate" not in layer.weights:
        raise UserError("method cmoe: expected a model with a gated FFN, as Llama's")
    x_TD, act = unit(layer.x_TD), ACTIVATIONS[layer.config.activation]
    gate_FD, up_FD = (unit(layer.weights[k]).reshape(-1, x_TD.shape[1]) for k in ("gate", "up"))
    h_TF = act(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)
    return np.asarray(largest(jnp.abs(h_TF), min(MARKED, h_TF.shape[1])))


def group(lte: LTEConfig, layer: Layer) -> np.ndarray:
    """The neurons of each expert, [E, M], the shared ones first."""
    from scipy.optimize import linear_sum_assignment

    mark_TF = marks(layer).astype(np.float32)
    neurons, size = mark_TF.shape[1], lte.expert_size
    experts = neurons // size
    shared = shared_count(lte, experts)
    busiest_F = np.argsort(-mark_TF.sum(axis=0), kind="stable")
    shared_F, rest_F = busiest_F[: shared * size], np.sort(busiest_F[shared * size :])
    center_TE = mark_TF[:, busiest_F[shared * size :][: experts - shared]]
    # Of 0/1 marks the L1 distance is a sum of squares: |a| + |b| - 2 a.b.
    rest_TF = mark_TF[:, rest_F]
    both_FE = rest_TF.T @ center_TE
    distance_FE = rest_TF.sum(axis=0)[:, None] + center_TE.sum(axis=0)[None] - 2 * both_FE
    _, place_F = linear_sum_assignment(np.repeat(distance_FE, size, axis=1))
    routed = [rest_F[place_F // size == expert] for expert in range(experts - shared)]
    return np.stack([*shared_F.reshape(shared, size), *routed]).astype(np.int32)


def start(lte: LTEConfig, layer: Layer, key) -> dict:
    """The rows of each expert's representative neuron, at length 1; shared ones always run."""
    del key
    mark_TEM = marks(layer).reshape(layer.h_TEM.shape).astype(np.float32)
    center_TE1 = mark_TEM.mean(axis=2, keepdims=True)
    nearest_E = np.argmin(np.abs(mark_TEM - center_TE1).sum(axis=0), axis=1)
    pick = lambda name: unit(layer.weights[name])[np.arange(len(nearest_E)), nearest_E].T  # noqa: E731
    busy_E = mark_TEM.sum(axis=(0, 2))
    shared = shared_count(lte, len(busy_E))
    always_E = np.zeros(len(busy_E), np.float32)
    always_E[np.argsort(-busy_E, kind="stable")[:shared]] = _ALWAYS
    return {"gate": {"kernel": pick("gate")}, "up": {"kernel": pick("up")}, "bias": always_E}


METHODS = (
    Method(
        "cmoe",
        "CMoE",
        "Pei et al. 2025",
        {
            "lte.grouping": "cmoe",
            "lte.router": "glu",
            "lte.router_init": "representative",
            "lte.routing": "representative",
        },
        routings={"representative": Representative},
        starts={"representative": start},
        groupings={"cmoe": group},
    ),
)
