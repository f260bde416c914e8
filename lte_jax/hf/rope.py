"""Reads and writes the rotary frequencies of a config.json, in its old and new spelling.

Format: `rope_scaling` of transformers 4, `rope_parameters` of 5; modeling_rope_utils.py there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lte_jax.config import ModelConfig, RopeScaling
from lte_jax.errors import UserError
from lte_jax.hf.family import Values
from lte_jax.hf.fields import Fields

_NEUTRAL = [("partial_rotary_factor", 1.0), ("attention_factor", 1.0), ("factor", 1.0)]
_NEUTRAL += [("truncate", True)]
_BOUNDS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast"),
}
_YARN_BOUNDS = (1.0, 32.0)  # of transformers, where the keys are absent
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary frequencies of a family."""

    kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")  # of stretching
    theta: float = 10000.0  # default base
    # Key of the base in layers with a window, and its default (None: the base of the others); ""
    # in families whose layers are alike.
    sliding: str = ""
    sliding_theta: float | None = None
    theta_key: str = "rope_theta"
    # Key of the share of each head that rotates, and its default; "": all of it.
    partial: str = ""
    partial_share: float = 1.0

    def read(self, fields: Fields, values: Values) -> Values:
        """The base of the rotary frequencies and how they are stretched."""
        outer_theta = fields.positive(self.theta_key, None)
        local_theta = fields.positive(self.sliding, None) if self.sliding else None
        old, new = fields.get("rope_scaling", dict, None), fields.get("rope_parameters", dict, None)
        section, raw = "rope_scaling" if old else "rope_parameters", old or new or {}
        if self.sliding and {_FULL, _SLIDING} & raw.keys():  # as transformers 5 spells it
            both = Fields(raw, f"{section}.")
            local = Fields(both.get(_SLIDING, dict, None) or {}, f"{section}.{_SLIDING}.")
            local_theta = local.positive("rope_theta", None)
            if local.get("rope_type", str, "default") != "default":
                raise local.wrong("rope_type", "default")
            _reject_unknown(local, "default")
            section, raw = f"{section}.{_FULL}", both.get(_FULL, dict, None) or {}
        rope = Fields(raw, f"{section}.")
        theta = rope.positive("rope_theta", None) or outer_theta or self.theta
        old_kind = rope.get("type", str, None)
        kind = rope.get("rope_type", str, None) or old_kind or "default"
        if kind not in self.kinds:
            valid = ", ".join(self.kinds)
            raise UserError(f"rope_type={kind!r} is not supported: valid are {valid}")
        read: Values = {}
        if self.partial:
            outer_share = fields.positive(self.partial, self.partial_share)
            share = rope.positive("partial_rotary_factor", None) or outer_share
            width = values["d_model"] // values["num_heads"]
            read["rotary_dim"] = None if share == 1 else int(width * share)
        outer = fields.size("original_max_position_embeddings", None)
        inner = rope.size("original_max_position_embeddings", None)
        scaling = _SCALINGS[kind](rope, outer or inner or values["max_length"])
        _reject_unknown(rope, kind)
        read |= {"rope_theta": theta, "rope_scaling": scaling}
        if self.sliding:
            read["sliding_rope_theta"] = local_theta or self.sliding_theta or theta
        return read

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The equivalent keys."""
        scaling, said = config.rope_scaling, None
        if scaling is not None:
            said = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling is not None and scaling.kind != "linear":
            bounds = (scaling.low_freq_factor, scaling.high_freq_factor)
            if scaling.kind == "llama3" or bounds != _YARN_BOUNDS:
                said |= dict(zip(_BOUNDS[scaling.kind], bounds, strict=True))
            said["original_max_position_embeddings"] = scaling.original_max_length
            if scaling.kind == "yarn" and scaling.amplitude != _amplitude(scaling.factor):
                said["attention_factor"] = scaling.amplitude
        raw = {self.theta_key: config.rope_theta, "rope_scaling": said}
        if self.partial:
            raw[self.partial] = (config.rotary_dim or config.head_dim) / config.head_dim
        if not self.sliding:
            return raw
        full = {"rope_theta": config.rope_theta} | (said or {"rope_type": "default"})
        local = {"rope_theta": config.sliding_rope_theta, "rope_type": "default"}
        return {"rope_parameters": {_FULL: full, _SLIDING: local}}


def _linear(rope: Fields, length: int) -> RopeScaling:
    return RopeScaling("linear", rope.positive("factor"))


def _llama3(rope: Fields, length: int) -> RopeScaling:
    low, high = map(rope.positive, _BOUNDS["llama3"])
    return RopeScaling("llama3", rope.positive("factor"), low, high, length)


def _yarn(rope: Fields, length: int) -> RopeScaling:
    low, high = (rope.positive(key, None) for key in _BOUNDS["yarn"])
    factor, amplitude = rope.positive("factor"), rope.positive("attention_factor", None)
    above, below = rope.positive("mscale", None), rope.positive("mscale_all_dim", None)
    if amplitude is None and above and below:
        amplitude = _amplitude(factor, above) / _amplitude(factor, below)
    amplitude = amplitude or _amplitude(factor)
    low, high = low or _YARN_BOUNDS[0], high or _YARN_BOUNDS[1]
    return RopeScaling("yarn", factor, low, high, length, amplitude)


_SCALINGS = {
    "default": lambda rope, length: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def _amplitude(factor: float, scale: float = 1.0) -> float:
    """The attention factor of yarn, as its paper suggests."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _reject_unknown(rope: Fields, kind: str) -> None:
    unknown = {
        key: value
        for key, value in rope.raw.items()
        if key not in rope.asked and value is not None and (key, value) not in _NEUTRAL
    }
    if unknown:
        raise UserError(
            f"{rope.section[:-1]} has {unknown}, which is not supported with rope_type={kind!r}: "
            "remove it if the model does not depend on it"
        )
