"""GPT-2: LayerNorms and biases, learned positions, an FFN without gate.

Its matrices are those of transformers' Conv1D, [inputs, outputs]; one holds queries, keys and
values. transformers: models/gpt2/configuration_gpt2.py and modeling_gpt2.py.
"""

from lte_jax.hf.families import llama
from lte_jax.hf.family import Family, Key
from lte_jax.hf.fields import Fields

_LAYER = "transformer.h.{}"
TENSORS = {
    "embed/embedding": ("transformer.wte.weight", "V D"),
    "embed/positions": ("transformer.wpe.weight", "S D"),
    "layers/attn_norm/scale": (f"{_LAYER}.ln_1.weight", "D"),
    "layers/attn_norm/bias": (f"{_LAYER}.ln_1.bias", "D"),
    "layers/attn/q/kernel": (f"{_LAYER}.attn.c_attn.weight", "D [HC]+KC+KC"),
    "layers/attn/q/bias": (f"{_LAYER}.attn.c_attn.bias", "[HC]+KC+KC"),
    "layers/attn/k/kernel": (f"{_LAYER}.attn.c_attn.weight", "D HC+[KC]+KC"),
    "layers/attn/k/bias": (f"{_LAYER}.attn.c_attn.bias", "HC+[KC]+KC"),
    "layers/attn/v/kernel": (f"{_LAYER}.attn.c_attn.weight", "D HC+KC+[KC]"),
    "layers/attn/v/bias": (f"{_LAYER}.attn.c_attn.bias", "HC+KC+[KC]"),
    "layers/attn/o/kernel": (f"{_LAYER}.attn.c_proj.weight", "HC D"),
    "layers/attn/o/bias": (f"{_LAYER}.attn.c_proj.bias", "D"),
    "layers/ffn_norm/scale": (f"{_LAYER}.ln_2.weight", "D"),
    "layers/ffn_norm/bias": (f"{_LAYER}.ln_2.bias", "D"),
    "layers/ffn/up": (f"{_LAYER}.mlp.c_fc.weight", "D EM"),
    "layers/ffn/up_bias": (f"{_LAYER}.mlp.c_fc.bias", "EM"),
    "layers/ffn/down": (f"{_LAYER}.mlp.c_proj.weight", "EM D"),
    "layers/ffn/down_bias": (f"{_LAYER}.mlp.c_proj.bias", "D"),
    "layers/ffn/router/kernel": (f"{_LAYER}.mlp.router.weight", "E D"),  # ours
    "layers/ffn/router/bias": (f"{_LAYER}.mlp.router.bias", "E"),  # ours
    "final_norm/scale": ("transformer.ln_f.weight", "D"),
    "final_norm/bias": ("transformer.ln_f.bias", "D"),
    "lm_head/kernel": ("lm_head.weight", "V D"),
}
KEYS = {
    "vocab_size": Key("vocab_size", Fields.size, 50257),
    "d_model": Key("n_embd", Fields.size, 768),
    "d_ff": Key("n_inner", llama.OPTIONAL_SIZE, None, lambda v: 4 * v["d_model"]),
    "num_layers": Key("n_layer", llama.LAYERS, 12),
    "num_heads": Key("n_head", Fields.size, 12),
    "max_length": Key("n_positions", Fields.size, 1024),
    "activation": Key(
        "activation_function", Fields.activation, "gelu_new", write=llama.HF_ACTIVATIONS.get
    ),
    "norm_eps": Key("layer_norm_epsilon", Fields.positive, 1e-5),
    "tie_embeddings": Key("tie_word_embeddings", Fields.flag, True),
    "bos_id": Key("bos_token_id", Fields.token_id, 50256),
    "eos_ids": Key("eos_token_id", Fields.token_ids, 50256, write=llama.KEYS["eos_ids"].write),
    "pad_id": llama.KEYS["pad_id"],
}
FIXED = {
    "norm": "layer",
    "norm_bias": True,
    "positions": "learned",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "num_kv_heads": lambda v: v["num_heads"],
    "head_dim": lambda v: v["d_model"] // v["num_heads"],
}


FAMILY = Family(
    "gpt2",
    {"lm": "GPT2LMHeadModel", "none": "GPT2Model"},
    keys=KEYS,
    parts=(),
    tensors=TENSORS,
    prefix="transformer.",
    fixed=FIXED,
    expects={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    constants=r"\.attn\.(bias|masked_bias)$",  # the causal mask
)
