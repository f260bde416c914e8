"""GPT-NeoX and Pythia: attention and FFN side by side, and a part of each head rotates.

Each head of `query_key_value` holds its queries, keys and values. transformers:
models/gpt_neox/configuration_gpt_neox.py and modeling_gpt_neox.py.
"""

import dataclasses

from lte_jax.hf.families import gpt2, llama
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields
from lte_jax.hf.rope import Rope

_LAYER = "gpt_neox.layers.{}"
_QKV = f"{_LAYER}.attention.query_key_value"
TENSORS = {
    "embed/embedding": ("gpt_neox.embed_in.weight", "V D"),
    "layers/attn_norm/scale": (f"{_LAYER}.input_layernorm.weight", "D"),
    "layers/attn_norm/bias": (f"{_LAYER}.input_layernorm.bias", "D"),
    "layers/attn/q/kernel": (f"{_QKV}.weight", "H0C D"),
    "layers/attn/q/bias": (f"{_QKV}.bias", "H0C"),
    "layers/attn/k/kernel": (f"{_QKV}.weight", "K1C D"),
    "layers/attn/k/bias": (f"{_QKV}.bias", "K1C"),
    "layers/attn/v/kernel": (f"{_QKV}.weight", "K2C D"),
    "layers/attn/v/bias": (f"{_QKV}.bias", "K2C"),
    "layers/attn/o/kernel": (f"{_LAYER}.attention.dense.weight", "D HC"),
    "layers/attn/o/bias": (f"{_LAYER}.attention.dense.bias", "D"),
    "layers/ffn_norm/scale": (f"{_LAYER}.post_attention_layernorm.weight", "D"),
    "layers/ffn_norm/bias": (f"{_LAYER}.post_attention_layernorm.bias", "D"),
    "layers/ffn/up": (f"{_LAYER}.mlp.dense_h_to_4h.weight", "EM D"),
    "layers/ffn/up_bias": (f"{_LAYER}.mlp.dense_h_to_4h.bias", "EM"),
    "layers/ffn/down": (f"{_LAYER}.mlp.dense_4h_to_h.weight", "D EM"),
    "layers/ffn/down_bias": (f"{_LAYER}.mlp.dense_4h_to_h.bias", "D"),
    "layers/ffn/router/kernel": (f"{_LAYER}.mlp.router.weight", "E D"),  # ours
    "layers/ffn/router/bias": (f"{_LAYER}.mlp.router.bias", "E"),  # ours
    "final_norm/scale": ("gpt_neox.final_layer_norm.weight", "D"),
    "final_norm/bias": ("gpt_neox.final_layer_norm.bias", "D"),
    "lm_head/kernel": ("embed_out.weight", "V D"),
}
_NAMED = "vocab_size d_model d_ff num_layers num_heads max_length activation tie_embeddings".split()

FAMILY = dataclasses.replace(
    gpt2.FAMILY,
    model_type="gpt_neox",
    architectures={"lm": "GPTNeoXForCausalLM", "none": "GPTNeoXModel"},
    keys={name: llama.KEYS[name] for name in (*_NAMED, "bos_id", "eos_ids", "pad_id")}
    | llama.ATTENTION_BIAS
    | {
        "norm_eps": Key("layer_norm_eps", Fields.positive, 1e-5),
        "parallel": Key("use_parallel_residual", Fields.flag, True),
    },
    parts=(Rope(theta_key="rotary_emb_base", partial="rotary_pct", partial_share=0.25),),
    tensors=TENSORS,
    prefix="gpt_neox.",
    defaults={"activation": "gelu", "bos_id": 0, "qkv_bias": True, "out_bias": True},
    fixed={name: gpt2.FIXED[name] for name in ("norm", "norm_bias", "gated", "mlp_bias")}
    | {name: gpt2.FIXED[name] for name in ("num_kv_heads", "head_dim")},
    expects={},
    constants=r"\.attention\.(bias|masked_bias)$",  # the causal mask
    renamed={r"^lm_head\.": "embed_out."},  # as transformers 5 calls it
)
