"""The stages of training as data: parameters, routing, losses and control of each.

    finetune   the dense model, on the task (optional)
    router     routers and model together, with sparsity pressure (paper: stage 1, Eq. 6)
    adapt      the model alone under hard routing, routers frozen (paper: stage 2)

Change how models are trained here; the loop in trainer.py knows no stage by name.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from lte_jax import sparsity
from lte_jax.config import LTEConfig, RoutingName, StageConfig, StagesConfig
from lte_jax.errors import UserError
from lte_jax.optim import Rule
from lte_jax.routing import kind


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: all that the trainer needs to run it."""

    name: str
    config: StageConfig
    routing: RoutingName
    rules: tuple[Rule, ...]  # (path pattern, learning-rate multiplier or None = frozen)
    task_weight: float = 1.0
    distill_weight: float = 0.0
    hidden_distill_weight: float = 0.0
    efficiency: bool = False  # weighted by the SparsityController
    separability_weight: float = 0.0  # lambda of Eq. 6
    steer: Literal["weight", "threshold"] | None = None
    integral_gain: float = sparsity.INTEGRAL_GAIN  # of steer="weight"

    @property
    def sparse(self) -> bool:
        """Whether it trains a model with experts, not the dense one."""
        return kind(self.routing).routed

    @property
    def taught(self) -> bool:
        """Whether it needs the dense model beside the one that it trains."""
        return self.distill_weight > 0 or self.hidden_distill_weight > 0


def make(stages: StagesConfig, lte: LTEConfig) -> tuple[Stage, ...]:
    """The stages that an experiment runs, in order; those without steps are left out.

    Raises:
      UserError: if the model would be served with all experts active.
    """
    served = kind(lte.routing).served
    if not kind(served).routed:
        raise UserError(
            f"lte.routing={lte.routing!r} runs all experts: expected 'hard', which the stages "
            "train for"
        )
    if lte.sparsity_range and not kind(served).by_threshold:
        raise UserError(
            f"lte.sparsity_range={lte.sparsity_range} moves the threshold, which does not decide "
            f"under lte.routing={lte.routing!r}: expected 'hard', or an empty range"
        )
    sparse = lte.target_sparsity is not None
    by_threshold = kind(lte.stage1_routing).by_threshold  # else the share of experts is given
    router_rate = stages.router.learning_rate * stages.router.router_lr_multiplier
    task, distill = 1.0 - lte.distill_weight, lte.distill_weight
    finetune = Stage("finetune", stages.finetune, "dense", ((".*", 1.0),))
    router = Stage(
        "router",
        stages.router,
        lte.stage1_routing,
        ((".*/router/.*", stages.router.router_lr_multiplier), (".*", 1.0)),
        task_weight=task,
        distill_weight=distill,
        hidden_distill_weight=lte.hidden_distill_weight,
        efficiency=by_threshold,
        separability_weight=lte.separability_weight if by_threshold else 0.0,
        steer="weight" if sparse and by_threshold else None,
        integral_gain=sparsity.integral_gain(router_rate),
    )
    adapt = Stage(
        "adapt",
        stages.adapt,
        served,
        ((".*/router/.*", None), (".*", 1.0)),
        task_weight=task,
        distill_weight=distill,
        hidden_distill_weight=lte.hidden_distill_weight,
        steer="threshold" if sparse and kind(served).by_threshold else None,
    )
    return tuple(stage for stage in (finetune, router, adapt) if stage.config.steps)
