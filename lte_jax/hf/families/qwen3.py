"""Qwen3: a Qwen2 with norms of queries and keys.

transformers: models/qwen3/configuration_qwen3.py.
"""

import dataclasses

from lte_jax.hf.families import llama, qwen2

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    model_type="qwen3",
    architectures={"lm": "Qwen3ForCausalLM"},
    keys=llama.KEYS | llama.ATTENTION_BIAS,
    defaults=qwen2.FAMILY.defaults | {"head_dim": 128},
    fixed={"qk_norm": True},
    ignored=(),
)
