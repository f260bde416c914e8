"""Seed-OSS: a Llama whose queries, keys and values have biases of their own key.

transformers: models/seed_oss/configuration_seed_oss.py.
"""

import dataclasses

from lte_jax.hf.families import llama
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="seed_oss",
    architectures={"lm": "SeedOssForCausalLM"},
    keys=llama.KEYS
    | llama.MLP_BIAS
    | {
        "qkv_bias": Key("attention_bias", Fields.flag, True),
        "out_bias": Key("attention_out_bias", Fields.flag, False),
    },
    defaults={"num_kv_heads": 8, "head_dim": 128, "max_length": 524288}
    | {"bos_id": 0, "eos_ids": 2, "pad_id": 1},
)
