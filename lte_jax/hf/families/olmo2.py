"""OLMo 2 and OLMo 3: norms on the outputs of attention and FFN, and on all query and key heads.

transformers: models/olmo2/configuration_olmo2.py and modeling_olmo2.py; models/olmo3/ likewise.
"""

import dataclasses

from lte_jax.hf.families import llama
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows

_ATTN = "model.layers.{}.self_attn"

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="olmo2",
    architectures={"lm": "Olmo2ForCausalLM"},
    keys=llama.KEYS | llama.ATTENTION_BIAS,
    tensors=llama.TENSORS
    | {
        "layers/attn_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "D"),
        "layers/ffn_norm/scale": ("model.layers.{}.post_feedforward_layernorm.weight", "D"),
        "layers/attn/q_full_norm/scale": (f"{_ATTN}.q_norm.weight", "HC"),
        "layers/attn/k_full_norm/scale": (f"{_ATTN}.k_norm.weight", "KC"),
    },
    defaults={"norm_eps": 1e-5, "bos_id": None, "eos_ids": 50279, "pad_id": 1},
    fixed={"norm_place": "output", "qk_full_norm": True},
)
OLMO3 = dataclasses.replace(
    FAMILY,
    model_type="olmo3",
    architectures={"lm": "Olmo3ForCausalLM"},
    # Layers with a window rotate as all others do, but are not stretched.
    parts=(Rope(theta=500000.0, sliding="rope_theta"), Windows("named", every=4)),
)
