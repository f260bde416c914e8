"""StableLM: a Llama with LayerNorms, of whose heads a part rotates.

transformers: models/stablelm/configuration_stablelm.py and modeling_stablelm.py.
"""

import dataclasses

from lte_jax.hf.families import gpt2, llama, starcoder2
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields
from lte_jax.hf.rope import Rope

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="stablelm",
    architectures={"lm": "StableLmForCausalLM"},
    keys={name: key for name, key in llama.KEYS.items() if name != "head_dim"}
    | {
        "norm_eps": Key("layer_norm_eps", Fields.positive, 1e-5),
        "qkv_bias": Key("use_qkv_bias", Fields.flag, False),
    },
    parts=(Rope(partial="partial_rotary_factor", partial_share=0.25),),
    tensors=llama.TENSORS | starcoder2.NORM_BIASES,
    defaults={"num_kv_heads": 32, "max_length": 4096, "bos_id": 0, "eos_ids": 0},
    fixed={name: gpt2.FIXED[name] for name in ("norm", "norm_bias", "head_dim")},
    # In parallel, attention and FFN would share one norm.
    expects={"use_parallel_residual": False, "qk_layernorm": False},
)
