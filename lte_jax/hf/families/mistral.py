"""Mistral: a Llama with a sliding window in all layers.

transformers: models/mistral/configuration_mistral.py.
"""

import dataclasses

from lte_jax.hf.families import llama
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architectures={"lm": "MistralForCausalLM"},
    keys=llama.KEYS,
    parts=(Rope(), Windows("all")),
    defaults={"num_kv_heads": 8, "max_length": 131072},
)
