"""Llama, and the families with the same tensor names: Mistral, Qwen2, Qwen3, SmolLM.

`TENSORS` maps each path of params.py to the tensor's name, with `{}` for the layer, and its layout:
a group of our dimension letters for each of its dimensions, so "HC D" is [H*C, D].
"""

_ATTN, _FFN = "model.layers.{}.self_attn", "model.layers.{}.mlp"

TENSORS: dict[str, tuple[str, str]] = {
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
