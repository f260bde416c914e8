"""Granite: a Llama with four scalars.

transformers: models/granite/configuration_granite.py and modeling_granite.py.
"""

import dataclasses

from lte_jax.hf.families import llama
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="granite",
    architectures={"lm": "GraniteForCausalLM"},
    keys=llama.FAMILY.keys
    | {
        "embed_scale": Key("embedding_multiplier", Fields.positive, 1.0),
        "attention_scale": Key("attention_multiplier", Fields.positive, 1.0),
        "residual_scale": Key("residual_multiplier", Fields.positive, 1.0),
        "logits_divisor": Key("logits_scaling", Fields.positive, 1.0),
    },
)
