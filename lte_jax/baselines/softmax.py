"""Noisy top-k softmax: the gate of sparsely-gated mixtures of experts.

Shazeer et al. 2017 (arXiv 1701.06538), equations 3 to 5: G(x) = softmax(keep the k largest of
x W + noise softplus(x W_noise)). Here the noise has a standard deviation of 1 in place of W_noise,
and there is no loss for balance, as experts are many and small. The softmax over the chosen is
times k, so that equal scores give the dense model's FFN; without that a pretrained model starts at
1/k of its FFN's output.

Dimension key: E experts
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lte_jax.baselines.method import Method
from lte_jax.selection import Active, Largest, Scores, View


@dataclasses.dataclass(frozen=True)
class SoftmaxTopK(Largest):
    """The experts of largest logit, each times k of its share in their softmax."""

    weighs: ClassVar[bool] = True
    random: ClassVar[bool] = True
    served: ClassVar[str] = "softmax"

    def scores(self, view: View) -> Scores:
        """The softmax of all logits, with noise in training."""
        logits_BLE = view.logits()
        if (key := view.key()) is not None:
            logits_BLE += jax.random.normal(key, logits_BLE.shape)
        return jax.nn.softmax(logits_BLE)

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """The softmax over the chosen, times their number."""
        kept_BLE = jnp.where(active_BLE, scores_BLE, 0.0)
        number_BL1 = jnp.sum(active_BLE, axis=-1, keepdims=True, dtype=jnp.float32)
        return number_BL1 * kept_BLE / jnp.sum(kept_BLE, axis=-1, keepdims=True)


METHODS = (
    Method(
        "softmax",
        "noisy top-k softmax",
        "Shazeer et al. 2017",
        {
            "lte.grouping": "kmeans",
            "lte.router_init": "normal",
            "lte.router_init_std": 0.1,
            "lte.router_bias": False,
            "lte.routing": "softmax",
            "lte.stage1_routing": "softmax",
        },
        trains_router=True,
        routings={"softmax": SoftmaxTopK},
    ),
)
