"""How rotary frequencies are stretched; the keys of a model's rope_scaling."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lte_jax.config.fields import Checked, Count, Positive
from lte_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling(Checked):
    """Stretching of the rotary frequencies (`rope_scaling` of an HF config)."""

    # linear: all frequencies alike; llama3: as in Llama 3.1; yarn: as in the paper of that name.
    kind: Literal["linear", "llama3", "yarn"]
    factor: Positive  # factor by which the wavelengths grow
    low_freq_factor: Positive = 1.0  # waves above original_max_length / this grow by factor
    high_freq_factor: Positive = 4.0  # waves below original_max_length / this stay
    original_max_length: Count = 8192  # context length before stretching, if not linear
    amplitude: Positive = 1.0  # factor of cosines and sines (yarn: its attention factor)

    def _check_together(self):
        if self.kind != "linear" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}: set a smaller low_freq_factor"
            )
