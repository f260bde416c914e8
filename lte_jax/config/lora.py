"""The keys of low-rank adapters; lora.py has what they do."""

from __future__ import annotations

import dataclasses

from lte_jax.config.fields import Checked, Positive, Whole


@dataclasses.dataclass(frozen=True)
class LoraConfig(Checked):
    """Adapters in place of the matrices of attention and experts, which then stay as they are."""

    # Columns of an adapter's first matrix, rows of its second; 0: no adapters, all is trained.
    rank: Whole = 0
    alpha: Positive = 32.0  # what adapters add is multiplied by alpha / rank
