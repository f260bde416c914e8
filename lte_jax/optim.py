"""The optimizer: AdamW, or Muon and AdamW, over parameter groups selected by path.

A stage gives rules `(path pattern, learning-rate multiplier or None)`; None freezes. Every
parameter needs a rule. Each group is clipped on its own, because gradients of routers and of the
model differ greatly in size.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix, so that all directions move
alike. It moves the matrices of layers; routers, embeddings, heads and vectors are AdamW's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from lte_jax.config import OptimConfig, StageConfig
from lte_jax.errors import UserError
from lte_jax.params import BY_PATH, is_router

Rule = tuple[str, float | None]
_FROZEN = "frozen"
_MATRICES = " by Muon"  # in the label of those of a group
# Of Muon's updates, as AdamW's have it, so that one learning rate serves both (Liu et al. 2025,
# "Muon is scalable for LLM training", section 2.2).
_ROOT_MEAN_SQUARE = 0.2


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
    """The optimizer of each group of `rules`, no updates for frozen parameters."""
    rate, muon = schedule(stage), config.name == "muon"
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    groups: dict[str, optax.GradientTransformation] = {_FROZEN: optax.set_to_zero()}
    for pattern, multiplier in rules:
        if multiplier is None:
            continue
        step = optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(lambda step, m=multiplier: m * rate(step)),
        )
        groups[pattern] = optax.chain(clip, adam, step)
        if muon:
            groups[pattern + _MATRICES] = optax.chain(clip, _orthogonalised(), step)

    def label(path: tuple, _: Any) -> str:
        group = _label(path, rules)
        return group + _MATRICES if muon and group != _FROZEN and _sides(path) else group

    return optax.partition(groups, lambda params: jax.tree_util.tree_map_with_path(label, params))


def _orthogonalised() -> optax.GradientTransformation:
    """Muon's updates, of AdamW's size."""

    def numbers(path: tuple, _: Any) -> MuonDimensionNumbers:
        return MuonDimensionNumbers(*(_sides(path) or ()))

    def sides(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(numbers, tree)

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        both = _sides(path) or ()
        longest = max(math.prod(update.shape[axis] for axis in side) for side in both)
        return _ROOT_MEAN_SQUARE * math.sqrt(longest) * update

    size = optax.stateless(lambda tree, _: jax.tree_util.tree_map_with_path(scaled, tree))
    return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=sides), size)


def _sides(path: tuple) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes of the two sides of a layer's matrix; None of other parameters."""
    row = BY_PATH[_name(path)]
    if not (row.layered and row.is_matrix) or is_router(row.path):
        return None
    letters = [(axis, letter) for axis, letter in enumerate(row.letters) if letter != "N"]
    one = tuple(axis for axis, letter in letters if letter in row.start)
    other = tuple(axis for axis, letter in letters if letter not in row.start)
    return one, other


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _label(path: tuple, rules: Sequence[Rule]) -> str:
    name = _name(path)
    for pattern, multiplier in rules:
        if re.fullmatch(pattern, name):
            return _FROZEN if multiplier is None else pattern
    raise UserError(f"no optimizer rule covers parameter {name!r}: add one (None freezes it)")
