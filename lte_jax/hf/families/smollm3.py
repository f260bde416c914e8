"""SmolLM3: a Llama some of whose layers have no positions.

transformers: models/smollm3/configuration_smollm3.py.
"""

import dataclasses
from typing import Any

from lte_jax.config import ModelConfig
from lte_jax.errors import UserError
from lte_jax.hf.families import llama
from lte_jax.hf.family import Values
from lte_jax.hf.fields import Fields
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows


class _NoRope:
    """The layers without rotary positions: 0 in `no_rope_layers`, or each fourth by default."""

    def read(self, fields: Fields, values: Values) -> Values:
        """Which layers rotate; None: all."""
        interval = fields.size("no_rope_layer_interval", 4)
        layers = range(values["num_layers"])
        default = [int((i + 1) % interval != 0) for i in layers]
        listed = fields.get("no_rope_layers", list, None) or default
        if len(listed) != len(layers) or not {*map(repr, listed)} <= {"0", "1"}:
            raise UserError(
                f"no_rope_layers has {len(listed)} entries, such as {listed[0]!r}: expected 0 or 1 "
                f"for each of {len(layers)} layers"
            )
        return {"rope_layers": None if all(listed) else tuple(map(bool, listed))}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The list."""
        rotates = config.rope_layers or (True,) * config.num_layers
        return {"no_rope_layers": [int(rotates_too) for rotates_too in rotates]}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="smollm3",
    architectures={"lm": "SmolLM3ForCausalLM"},
    parts=(Rope(theta=2e6), _NoRope(), Windows("none")),
    defaults={"num_kv_heads": 4, "max_length": 32768, "tie_embeddings": True}
    | {"bos_id": 128000, "eos_ids": 128001, "pad_id": 128004},
    ignored=("max_window_layers",),
    expects={"use_sliding_window": False},
)
