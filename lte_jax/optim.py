"""The optimizer: AdamW over parameter groups selected by path.

A stage gives rules `(path pattern, learning-rate multiplier or None)`; None freezes. Every
parameter needs a rule. Each group is clipped on its own, because gradients of routers and of the
model differ greatly in size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from lte_jax.config import OptimConfig, StageConfig
from lte_jax.errors import UserError

Rule = tuple[str, float | None]
_FROZEN = "frozen"


def labels(params: Any, rules: Sequence[Rule]) -> Any:
    """For each parameter, the pattern of the first rule that matches its path, or "frozen".

    Raises:
      UserError: on a parameter that no rule covers.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _label(path, rules), params)


def schedule(config: StageConfig) -> optax.Schedule:
    """Linear warm-up to the peak learning rate, then cosine, linear or no decay."""
    warmup = round(config.warmup_ratio * config.steps)
    peak, rest = config.learning_rate, max(config.steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_lr_ratio),
        "linear": optax.linear_schedule(peak, peak * config.final_lr_ratio, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # Starting at zero would waste the first step.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, decay], [warmup])


def make(
    config: OptimConfig, stage: StageConfig, rules: Sequence[Rule]
) -> optax.GradientTransformation:
    """AdamW for each group of `rules`, no updates for frozen parameters."""
    rate = schedule(stage)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    groups: dict[str, optax.GradientTransformation] = {_FROZEN: optax.set_to_zero()}
    for pattern, multiplier in rules:
        if multiplier is not None:
            groups[pattern] = optax.chain(
                clip,
                optax.scale_by_adam(config.b1, config.b2, config.eps),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(lambda step, m=multiplier: m * rate(step)),
            )
    return optax.partition(groups, lambda params: labels(params, rules))


def _label(path: tuple, rules: Sequence[Rule]) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, multiplier in rules:
        if re.fullmatch(pattern, name):
            return _FROZEN if multiplier is None else pattern
    raise UserError(f"no optimizer rule covers parameter {name!r}: add one (None freezes it)")
