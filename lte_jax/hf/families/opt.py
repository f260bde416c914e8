"""OPT: a GPT-2 with other names, whose positions begin at the third row of their table.

transformers: models/opt/configuration_opt.py and modeling_opt.py.
"""

import dataclasses

from lte_jax.hf.families import gpt2, llama
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields

_LAYER = "model.decoder.layers.{}"


def _both(path: str, name: str, matrix: str, vector: str) -> dict[str, tuple[str, str]]:
    return {
        f"{path}/kernel": (f"{_LAYER}.{name}.weight", matrix),
        f"{path}/bias": (f"{_LAYER}.{name}.bias", vector),
    }


def _norm(path: str, name: str) -> dict[str, tuple[str, str]]:
    return {f"{path}/scale": (f"{name}.weight", "D"), f"{path}/bias": (f"{name}.bias", "D")}


TENSORS = {
    "embed/embedding": ("model.decoder.embed_tokens.weight", "V D"),
    "embed/positions": ("model.decoder.embed_positions.weight", "S D"),
    **_norm("layers/attn_norm", f"{_LAYER}.self_attn_layer_norm"),
    **_both("layers/attn/q", "self_attn.q_proj", "HC D", "HC"),
    **_both("layers/attn/k", "self_attn.k_proj", "KC D", "KC"),
    **_both("layers/attn/v", "self_attn.v_proj", "KC D", "KC"),
    **_both("layers/attn/o", "self_attn.out_proj", "D HC", "D"),
    **_norm("layers/ffn_norm", f"{_LAYER}.final_layer_norm"),
    "layers/ffn/up": (f"{_LAYER}.fc1.weight", "EM D"),
    "layers/ffn/up_bias": (f"{_LAYER}.fc1.bias", "EM"),
    "layers/ffn/down": (f"{_LAYER}.fc2.weight", "D EM"),
    "layers/ffn/down_bias": (f"{_LAYER}.fc2.bias", "D"),
    **_both("layers/ffn/router", "mlp.router", "E D", "E"),  # ours
    **_norm("final_norm", "model.decoder.final_layer_norm"),
    "lm_head/kernel": ("lm_head.weight", "V D"),
}

FAMILY = dataclasses.replace(
    gpt2.FAMILY,
    model_type="opt",
    architectures={"lm": "OPTForCausalLM", "none": "OPTModel"},
    keys={
        **{key: llama.KEYS[key] for key in ("vocab_size", "d_model", "num_layers", "num_heads")},
        "d_ff": Key("ffn_dim", Fields.size, 3072),
        "max_length": llama.KEYS["max_length"],
        "activation": dataclasses.replace(gpt2.KEYS["activation"], default="relu"),
        "tie_embeddings": gpt2.KEYS["tie_embeddings"],
        **{key: llama.KEYS[key] for key in ("bos_id", "eos_ids", "pad_id")},
        "qkv_bias": Key("enable_bias", Fields.flag, True),
        "out_bias": Key("enable_bias", Fields.flag, True),
        "mlp_bias": Key("enable_bias", Fields.flag, True),
    },
    tensors=TENSORS,
    prefix="model.",
    defaults={"max_length": 2048, "bos_id": 2, "eos_ids": 2, "pad_id": 1},
    fixed={name: gpt2.FIXED[name] for name in ("norm", "norm_bias", "positions", "gated")}
    | {name: gpt2.FIXED[name] for name in ("num_kv_heads", "head_dim")}
    | {"position_offset": 2, "norm_eps": 1e-5},
    ignored=("word_embed_proj_dim",),
    expects={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    constants=r"$^",
)
