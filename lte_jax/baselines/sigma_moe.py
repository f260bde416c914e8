"""sigma-MoE: the experts of largest sigmoid score, each times its score.

Csordas et al. 2023 (arXiv 2310.10837), section 4: sel(x) = sigmoid(W x), top k, y = sum of
sel(x)[e] E_e(x). Its expert dropout and its loss for balance, the negative entropy of the mean
softmax, are for training from scratch and are left out. As the model is pretrained, scores are
doubled: at a logit of 0 an expert counts in full.

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
class SigmaMoE(Largest):
    """The experts of largest score, times twice the score."""

    weighs: ClassVar[bool] = True
    served: ClassVar[str] = "sigma"

    def scores(self, view: View) -> Scores:
        """Sigmoids."""
        return jax.nn.sigmoid(view.logits())

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """Twice the scores of the chosen."""
        return jnp.where(active_BLE, 2.0 * scores_BLE, 0.0)


METHODS = (
    Method(
        "sigma_moe",
        "sigma-MoE",
        "Csordas et al. 2023",
        {
            "lte.grouping": "kmeans",
            "lte.router_init": "normal",
            "lte.router_init_std": 0.1,
            "lte.router_bias": False,
            "lte.routing": "sigma",
            "lte.stage1_routing": "sigma",
        },
        trains_router=True,
        routings={"sigma": SigmaMoE},
    ),
)
