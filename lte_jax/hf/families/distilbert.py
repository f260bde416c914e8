"""DistilBERT: a BERT of half the layers, without token types and pooler, under names of its own.

A classifier's dense layer is followed by a ReLU where BERT has a tanh; norms have BERT's epsilon,
which config.json does not say. transformers: models/distilbert/configuration_distilbert.py,
modeling_distilbert.py.
"""

import dataclasses

from lte_jax.hf.families import bert, llama
from lte_jax.hf.family import Key
from lte_jax.hf.fields import Fields

_LAYER = "distilbert.transformer.layer.{}"
TENSORS = {
    "embed/embedding": ("distilbert.embeddings.word_embeddings.weight", "V D"),
    "embed/positions": ("distilbert.embeddings.position_embeddings.weight", "S D"),
    "embed/norm/scale": ("distilbert.embeddings.LayerNorm.weight", "D"),
    "embed/norm/bias": ("distilbert.embeddings.LayerNorm.bias", "D"),
    "layers/attn/q/kernel": (f"{_LAYER}.attention.q_lin.weight", "HC D"),
    "layers/attn/q/bias": (f"{_LAYER}.attention.q_lin.bias", "HC"),
    "layers/attn/k/kernel": (f"{_LAYER}.attention.k_lin.weight", "KC D"),
    "layers/attn/k/bias": (f"{_LAYER}.attention.k_lin.bias", "KC"),
    "layers/attn/v/kernel": (f"{_LAYER}.attention.v_lin.weight", "KC D"),
    "layers/attn/v/bias": (f"{_LAYER}.attention.v_lin.bias", "KC"),
    "layers/attn/o/kernel": (f"{_LAYER}.attention.out_lin.weight", "D HC"),
    "layers/attn/o/bias": (f"{_LAYER}.attention.out_lin.bias", "D"),
    "layers/attn_norm/scale": (f"{_LAYER}.sa_layer_norm.weight", "D"),
    "layers/attn_norm/bias": (f"{_LAYER}.sa_layer_norm.bias", "D"),
    "layers/ffn/up": (f"{_LAYER}.ffn.lin1.weight", "EM D"),
    "layers/ffn/up_bias": (f"{_LAYER}.ffn.lin1.bias", "EM"),
    "layers/ffn/down": (f"{_LAYER}.ffn.lin2.weight", "D EM"),
    "layers/ffn/down_bias": (f"{_LAYER}.ffn.lin2.bias", "D"),
    "layers/ffn/router/kernel": (f"{_LAYER}.ffn.router.weight", "E D"),  # ours
    "layers/ffn/router/bias": (f"{_LAYER}.ffn.router.bias", "E"),  # ours
    "layers/ffn_norm/scale": (f"{_LAYER}.output_layer_norm.weight", "D"),
    "layers/ffn_norm/bias": (f"{_LAYER}.output_layer_norm.bias", "D"),
    "transform/kernel": ("vocab_transform.weight", "P D"),
    "transform/bias": ("vocab_transform.bias", "P"),
    "transform/norm/scale": ("vocab_layer_norm.weight", "P"),
    "transform/norm/bias": ("vocab_layer_norm.bias", "P"),
    "lm_head/kernel": ("vocab_projector.weight", "V D"),
    "lm_head/bias": ("vocab_projector.bias", "V"),
    "pooler/kernel": ("pre_classifier.weight", "P D"),
    "pooler/bias": ("pre_classifier.bias", "P"),
    "classifier/kernel": ("classifier.weight", "Y D"),
    "classifier/bias": ("classifier.bias", "Y"),
}
_SAME = ("vocab_size", "max_length", "tie_embeddings", "bos_id", "eos_ids", "pad_id")
FAMILY = dataclasses.replace(
    bert.FAMILY,
    model_type="distilbert",
    architectures={
        "none": "DistilBertModel",
        "classes": "DistilBertForSequenceClassification",
        "masked_lm": "DistilBertForMaskedLM",
    },
    keys={field: bert.KEYS[field] for field in _SAME}
    | {
        "d_model": Key("dim", Fields.size, 768),
        "d_ff": Key("hidden_dim", Fields.size, 3072),
        "num_layers": Key("n_layers", llama.LAYERS, 6),
        "num_heads": Key("n_heads", Fields.size, 12),
        "activation": Key("activation", Fields.activation, "gelu", write=llama.HF_ACTIVATIONS.get),
    },
    tensors=TENSORS,
    prefix="distilbert.",
    fixed=bert.FIXED
    | {
        "norm_eps": 1e-12,
        "pooler": lambda v: v["head"] == "classes",
        "pooler_activation": "relu",
    },
    expects={},
    constants=r"embeddings\.position_ids$",
    renamed={},
)
