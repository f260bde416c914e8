"""What follows from an LTEConfig, and the named ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lte_jax.config.schema import LTEConfig, ModelConfig
from lte_jax.errors import UserError


def num_experts(config: ModelConfig, lte: LTEConfig | None) -> int:
    """E, the number of experts of an FFN; 1 for a dense model.

    Raises:
      UserError: if the expert size does not divide the FFN width.
    """
    if lte is None:
        return 1
    if config.d_ff % lte.expert_size:
        small = [m for m in range(1, math.isqrt(config.d_ff) + 1) if config.d_ff % m == 0]
        sizes = {*small, *(config.d_ff // m for m in small)}
        near = sorted(sorted(sizes, key=lambda m: abs(m - lte.expert_size))[:4])
        raise UserError(
            f"lte.expert_size={lte.expert_size} does not divide the FFN width {config.d_ff}: "
            f"nearby sizes that do are {', '.join(map(str, near))}"
        )
    return config.d_ff // lte.expert_size


def own_threshold(lte: LTEConfig | None) -> float | tuple[float, ...]:
    """The model's own threshold; with `per_layer` and a curve, one of each layer.

    Where the curve does not reach the target, that of its nearest point.
    """
    if lte is None:
        return 0.5
    if lte.per_layer and lte.curve and lte.target_sparsity is not None:
        return _between(lte, lte.target_sparsity)
    return lte.threshold


def threshold_at(lte: LTEConfig, sparsity: float) -> float | tuple[float, ...]:
    """The threshold at which this share of experts is skipped, between two points of `lte.curve`.

    With `per_layer`, that of each layer.

    Raises:
      UserError: without a curve, and beyond its ends.
    """
    if not lte.curve:
        raise UserError(
            f"sparsity={sparsity}: this model has thresholds for {lte.target_sparsity} alone; "
            "`lte_jax.calibrate` measures those of other sparsities, as does training with an "
            "lte.sparsity_range"
        )
    shares = [point[0] for point in lte.curve]
    if not shares[0] <= sparsity <= shares[-1]:
        raise UserError(
            f"sparsity={sparsity}: expected {shares[0]:.3f} to {shares[-1]:.3f}, for which this "
            "model has thresholds"
        )
    return _between(lte, sparsity)


def _between(lte: LTEConfig, sparsity: float) -> float | tuple[float, ...]:
    shares, *columns = zip(*lte.curve, strict=True)
    found = tuple(float(np.interp(sparsity, shares, column)) for column in columns)
    return found if lte.per_layer else found[0]


PRESETS: Mapping[str, LTEConfig] = {
    # What won on two models (docs/log.md). Both need a dense model beside the sparse one,
    # or calibration text, so they are not the defaults of `lte_jax.moefy`.
    "ours": LTEConfig(refit=True, hidden_distill_weight=4.0),
    # The paper's settings (section 5.1), except for the guard of Eq. 5. It does not state the
    # initialisation of routers: small normal weights are the usual choice.
    "paper": LTEConfig(
        grouping="kmeans",
        router_bias=False,
        router_init="normal",
        router_init_std=1.0,
        stage1_routing="soft",
        target_sparsity=None,
        efficiency_weight=1.0,
        separability_weight=0.5,
        distill_weight=0.0,
    ),
}
