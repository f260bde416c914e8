"""Ministral 8B: a Mistral with a window in some layers.

transformers: models/ministral/configuration_ministral.py.
"""

import dataclasses

from lte_jax.hf.families import mistral
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows

FAMILY = dataclasses.replace(
    mistral.FAMILY,
    model_type="ministral",
    architectures={"lm": "MinistralForCausalLM"},
    parts=(Rope(), Windows("named")),
)
