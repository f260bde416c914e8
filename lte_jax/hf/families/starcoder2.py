"""StarCoder2: a Llama with LayerNorms, biases, and an FFN without gate.

transformers: models/starcoder2/configuration_starcoder2.py and modeling_starcoder2.py.
"""

import dataclasses

from lte_jax.hf.families import gpt2, llama
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows

_LAYER = "model.layers.{}"
NORM_BIASES = {
    "layers/attn_norm/bias": (f"{_LAYER}.input_layernorm.bias", "D"),
    "layers/ffn_norm/bias": (f"{_LAYER}.post_attention_layernorm.bias", "D"),
    "final_norm/bias": ("model.norm.bias", "D"),
}
_BIAS = Key("use_bias", Fields.flag, True)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="starcoder2",
    architectures={"lm": "Starcoder2ForCausalLM"},
    keys=llama.KEYS
    | {"norm_eps": Key("norm_epsilon", Fields.positive, 1e-5)}
    | {"qkv_bias": _BIAS, "out_bias": _BIAS, "mlp_bias": _BIAS},
    parts=(Rope(), Windows("all", default=None)),
    tensors=llama.TENSORS
    | NORM_BIASES
    | {
        "layers/ffn/up": (f"{_LAYER}.mlp.c_fc.weight", "EM D"),
        "layers/ffn/up_bias": (f"{_LAYER}.mlp.c_fc.bias", "EM"),
        "layers/ffn/down": (f"{_LAYER}.mlp.c_proj.weight", "D EM"),
        "layers/ffn/down_bias": (f"{_LAYER}.mlp.c_proj.bias", "D"),
    },
    defaults={"num_kv_heads": 2, "max_length": 4096, "activation": "gelu_pytorch_tanh"}
    | {"tie_embeddings": True, "bos_id": 50256, "eos_ids": 50256},
    fixed={name: gpt2.FIXED[name] for name in ("norm", "norm_bias", "gated")},
    expects={"mlp_type": "default", "norm_type": "layer_norm"},
)
