"""Llama, and SmolLM2, which calls itself one.

transformers: models/llama/configuration_llama.py and modeling_llama.py.
"""

import functools

from lte_jax.hf.family import Family, Key
from lte_jax.hf.fields import ACTIVATIONS, MAX_LAYERS, Fields
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows

OPTIONAL_SIZE = functools.partial(Fields.size, nullable=True)
LAYERS = functools.partial(Fields.size, most=MAX_LAYERS)
HF_ACTIVATIONS = {ours: hf for hf, ours in reversed(ACTIVATIONS.items())}


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


KEYS = {
    "vocab_size": Key("vocab_size", Fields.size),
    "d_model": Key("hidden_size", Fields.size),
    "d_ff": Key("intermediate_size", Fields.size),
    "num_layers": Key("num_hidden_layers", LAYERS),
    "num_heads": Key("num_attention_heads", Fields.size),
    "num_kv_heads": Key("num_key_value_heads", OPTIONAL_SIZE, None, lambda v: v["num_heads"]),
    "head_dim": Key("head_dim", OPTIONAL_SIZE, None, lambda v: v["d_model"] // v["num_heads"]),
    "max_length": Key("max_position_embeddings", Fields.size, 2048),
    "activation": Key("hidden_act", Fields.activation, "silu", write=HF_ACTIVATIONS.__getitem__),
    "norm_eps": Key("rms_norm_eps", Fields.positive, 1e-6),
    "tie_embeddings": Key("tie_word_embeddings", Fields.flag, False),
    "bos_id": Key("bos_token_id", Fields.token_id, 1),
    "eos_ids": Key("eos_token_id", Fields.token_ids, 2, write=_one_or_list),
    "pad_id": Key("pad_token_id", Fields.token_id, None),
}
ATTENTION_BIAS = {
    "qkv_bias": Key("attention_bias", Fields.flag, False),
    "out_bias": Key("attention_bias", Fields.flag, False),
}
MLP_BIAS = {"mlp_bias": Key("mlp_bias", Fields.flag, False)}

_ATTN, _FFN = "model.layers.{}.self_attn", "model.layers.{}.mlp"

TENSORS = {
    "embed/embedding": ("model.embed_tokens.weight", "V D"),
    "layers/attn_norm/scale": ("model.layers.{}.input_layernorm.weight", "D"),
    "layers/attn/q/kernel": (f"{_ATTN}.q_proj.weight", "HC D"),
    "layers/attn/q/bias": (f"{_ATTN}.q_proj.bias", "HC"),
    "layers/attn/k/kernel": (f"{_ATTN}.k_proj.weight", "KC D"),
    "layers/attn/k/bias": (f"{_ATTN}.k_proj.bias", "KC"),
    "layers/attn/v/kernel": (f"{_ATTN}.v_proj.weight", "KC D"),
    "layers/attn/v/bias": (f"{_ATTN}.v_proj.bias", "KC"),
    "layers/attn/q_norm/scale": (f"{_ATTN}.q_norm.weight", "C"),
    "layers/attn/k_norm/scale": (f"{_ATTN}.k_norm.weight", "C"),
    "layers/attn/o/kernel": (f"{_ATTN}.o_proj.weight", "D HC"),
    "layers/attn/o/bias": (f"{_ATTN}.o_proj.bias", "D"),
    "layers/ffn_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "D"),
    "layers/ffn/gate": (f"{_FFN}.gate_proj.weight", "EM D"),
    "layers/ffn/up": (f"{_FFN}.up_proj.weight", "EM D"),
    "layers/ffn/down": (f"{_FFN}.down_proj.weight", "D EM"),
    "layers/ffn/gate_bias": (f"{_FFN}.gate_proj.bias", "EM"),
    "layers/ffn/up_bias": (f"{_FFN}.up_proj.bias", "EM"),
    "layers/ffn/down_bias": (f"{_FFN}.down_proj.bias", "D"),
    "layers/ffn/router/kernel": (f"{_FFN}.router.weight", "E D"),  # ours
    "layers/ffn/router/bias": (f"{_FFN}.router.bias", "E"),  # ours
    "final_norm/scale": ("model.norm.weight", "D"),
    "lm_head/kernel": ("lm_head.weight", "V D"),
}

FAMILY = Family(
    "llama",
    {"lm": "LlamaForCausalLM"},
    keys=KEYS | ATTENTION_BIAS | MLP_BIAS,
    parts=(Rope(), Windows("none")),
    tensors=TENSORS,
)
