"""Phi-3 and Phi-3.5: a Llama with two fused tensors in each layer.

transformers: models/phi3/configuration_phi3.py.
"""

import dataclasses

from lte_jax.hf.families import llama
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows

_QKV = "model.layers.{}.self_attn.qkv_proj.weight"
_GATE_UP = "model.layers.{}.mlp.gate_up_proj.weight"

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="phi3",
    architectures={"lm": "Phi3ForCausalLM"},
    keys=llama.KEYS,
    parts=(Rope(kinds=("default",)), Windows("all", default=None)),
    tensors=llama.TENSORS
    | {
        "layers/attn/q/kernel": (_QKV, "[HC]+KC+KC D"),
        "layers/attn/k/kernel": (_QKV, "HC+[KC]+KC D"),
        "layers/attn/v/kernel": (_QKV, "HC+KC+[KC] D"),
        "layers/ffn/gate": (_GATE_UP, "[EM]+EM D"),
        "layers/ffn/up": (_GATE_UP, "EM+[EM] D"),
    },
    defaults={"max_length": 4096, "norm_eps": 1e-5, "eos_ids": 32000, "pad_id": 32000},
)
