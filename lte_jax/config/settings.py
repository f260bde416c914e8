"""The keys of `LTEConfig` as keyword arguments, for type checkers; tests hold the two together."""

from __future__ import annotations

from typing import Literal, TypedDict

from lte_jax.config.names import (
    Grouping,
    RouterActivation,
    RouterKind,
    RouterStart,
    RoutingName,
)


class LTESettings(TypedDict, total=False):
    """What `lte_jax.moefy` takes; `LTEConfig` says what each means."""

    expert_size: int
    grouping: Grouping
    router: RouterKind
    router_rank: int | None
    router_activation: RouterActivation
    router_bias: bool
    router_init: RouterStart
    router_init_std: float
    refit: bool
    calibration_records: int | None
    threshold: float
    routing: RoutingName
    stage1_routing: Literal["soft", "straight_through", "softmax", "sigma"]
    target_sparsity: float | None
    sparsity_range: tuple[float, ...]
    per_layer: bool
    curve: tuple[tuple[float, ...], ...]
    efficiency_weight: float
    efficiency_power: Literal[1, 2]
    separability_weight: float
    separability_eps: float
    distill_weight: float
    hidden_distill_weight: float
