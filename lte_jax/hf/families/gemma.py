"""Gemma (version 1) and Gemma 3 for text: norms that scale by 1 + w, and a scaled embedding.

Gemma 3 has norms on both sides of attention and FFN, norms of queries and keys, a factor of the
scores, and other rotary frequencies in layers with a window. transformers: models/gemma/ and
models/gemma3/, configuration_*.py and modeling_*.py.
"""

import dataclasses
from typing import Any

from lte_jax.config import Activation
from lte_jax.hf.families import llama
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields
from lte_jax.hf.rope import Rope
from lte_jax.hf.windows import Windows


def _activation(fields: Fields, key: str, default: str) -> Activation:
    """That of `hidden_act`, where old folders say "gelu" and mean its approximation."""
    name = fields.activation(key, default)
    return "gelu_tanh" if name == "gelu" else name


def _score_factor(fields: Fields, key: str, default: float) -> float:
    """One over the root of `query_pre_attn_scalar`."""
    return fields.positive(key, default) ** -0.5


def _scalar(factor: float) -> int | float:
    scalar = factor**-2
    return round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar


_ACTIVATION: dict[str, Any] = {"default": "gelu_pytorch_tanh"}
_ACTIVATION["write"] = llama.HF_ACTIVATIONS.__getitem__
FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma",
    architectures={"lm": "GemmaForCausalLM"},
    keys=llama.KEYS
    | llama.ATTENTION_BIAS
    | {"activation": Key("hidden_act", _activation, **_ACTIVATION)},
    defaults={"head_dim": 256, "num_kv_heads": 16, "max_length": 8192, "tie_embeddings": True}
    | {"bos_id": 2, "eos_ids": 1, "pad_id": 0},
    fixed={"norm_offset": True, "embed_scale": lambda v: v["d_model"] ** 0.5},
    expects={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
)
_NORM = "model.layers.{}."
GEMMA3 = dataclasses.replace(
    FAMILY,
    model_type="gemma3_text",
    architectures={"lm": "Gemma3ForCausalLM"},
    keys=FAMILY.keys
    | {
        "activation": Key("hidden_activation", Fields.activation, **_ACTIVATION),
        "attention_scale": Key("query_pre_attn_scalar", _score_factor, 256.0, write=_scalar),
    },
    parts=(
        Rope(theta=1e6, sliding="rope_local_base_freq", sliding_theta=1e4),
        Windows("named", every=6),
    ),
    tensors=llama.TENSORS
    | {
        "layers/attn_post_norm/scale": (f"{_NORM}post_attention_layernorm.weight", "D"),
        "layers/ffn_norm/scale": (f"{_NORM}pre_feedforward_layernorm.weight", "D"),
        "layers/ffn_post_norm/scale": (f"{_NORM}post_feedforward_layernorm.weight", "D"),
    },
    defaults=FAMILY.defaults | {"num_kv_heads": 4, "max_length": 131072},
    fixed=FAMILY.fixed | {"norm_place": "sandwich", "qk_norm": True},
    ignored=("hidden_act", "_sliding_window_pattern"),  # layer_types says the latter
    expects={"use_bidirectional_attention": False}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
)
