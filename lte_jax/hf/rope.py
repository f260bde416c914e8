"""Reads and writes the rotary frequencies of a config.json, in its old and new spelling.

Format: `rope_scaling` of transformers 4, `rope_parameters` of 5; modeling_rope_utils.py there.
"""

from __future__ import annotations

from typing import Any

from lte_jax.config import ModelConfig, RopeScaling
from lte_jax.errors import UserError
from lte_jax.hf.family import Values
from lte_jax.hf.fields import Fields

_NEUTRAL = [("partial_rotary_factor", 1.0), ("attention_factor", 1.0), ("factor", 1.0)]


def read(fields: Fields, values: Values) -> Values:
    """The base of the rotary frequencies and how they are stretched."""
    outer_theta = fields.positive("rope_theta", None)
    old, new = fields.get("rope_scaling", dict, None), fields.get("rope_parameters", dict, None)
    rope = Fields(old or new or {}, "rope_scaling." if old else "rope_parameters.")
    theta = rope.positive("rope_theta", None) or outer_theta or 10000.0
    old_kind = rope.get("type", str, None)
    kind = rope.get("rope_type", str, None) or old_kind or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope_type={kind!r} is not supported: valid are default, linear, llama3")
    outer = fields.size("original_max_position_embeddings", None)
    inner = rope.size("original_max_position_embeddings", None)
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", rope.positive("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            factor=rope.positive("factor"),
            low_freq_factor=rope.positive("low_freq_factor"),
            high_freq_factor=rope.positive("high_freq_factor"),
            original_max_length=outer or inner or values["max_length"],
        )
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
    return {"rope_theta": theta, "rope_scaling": scaling}


def write(config: ModelConfig) -> dict[str, Any]:
    """The equivalent keys."""
    scaling, said = config.rope_scaling, None
    if scaling is not None:
        said = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            said |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_length,
            }
    return {"rope_theta": config.rope_theta, "rope_scaling": said}
