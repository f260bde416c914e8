"""Qwen2 and Qwen2.5: a Llama with biases of queries, keys and values, and windows in some layers.

transformers: models/qwen2/configuration_qwen2.py.
"""

import dataclasses

from lte_jax.hf.families import llama
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    architectures={"lm": "Qwen2ForCausalLM"},
    keys=llama.KEYS,
    parts=(Rope(), Windows("some")),
    defaults={"num_kv_heads": 32, "max_length": 32768, "bos_id": None, "eos_ids": None},
    fixed={"qkv_bias": True},
    ignored=("attention_bias",),
)
