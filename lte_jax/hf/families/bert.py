"""BERT, and encoders stored as one, such as MiniLM and most of sentence-transformers.

A norm follows each sum with the residual stream, every token sees all others, and a token's type
and position are embeddings. transformers: models/bert/configuration_bert.py, modeling_bert.py.
"""

from lte_jax.hf.families import llama
from lte_jax.hf.family import Family, Key
from lte_jax.hf.fields import Fields

_LAYER = "bert.encoder.layer.{}"
_SELF = f"{_LAYER}.attention.self"
TENSORS = {
    "embed/embedding": ("bert.embeddings.word_embeddings.weight", "V D"),
    "embed/positions": ("bert.embeddings.position_embeddings.weight", "S D"),
    "embed/types": ("bert.embeddings.token_type_embeddings.weight", "U D"),
    "embed/norm/scale": ("bert.embeddings.LayerNorm.weight", "D"),
    "embed/norm/bias": ("bert.embeddings.LayerNorm.bias", "D"),
    "layers/attn/q/kernel": (f"{_SELF}.query.weight", "HC D"),
    "layers/attn/q/bias": (f"{_SELF}.query.bias", "HC"),
    "layers/attn/k/kernel": (f"{_SELF}.key.weight", "KC D"),
    "layers/attn/k/bias": (f"{_SELF}.key.bias", "KC"),
    "layers/attn/v/kernel": (f"{_SELF}.value.weight", "KC D"),
    "layers/attn/v/bias": (f"{_SELF}.value.bias", "KC"),
    "layers/attn/o/kernel": (f"{_LAYER}.attention.output.dense.weight", "D HC"),
    "layers/attn/o/bias": (f"{_LAYER}.attention.output.dense.bias", "D"),
    "layers/attn_norm/scale": (f"{_LAYER}.attention.output.LayerNorm.weight", "D"),
    "layers/attn_norm/bias": (f"{_LAYER}.attention.output.LayerNorm.bias", "D"),
    "layers/ffn/up": (f"{_LAYER}.intermediate.dense.weight", "EM D"),
    "layers/ffn/up_bias": (f"{_LAYER}.intermediate.dense.bias", "EM"),
    "layers/ffn/down": (f"{_LAYER}.output.dense.weight", "D EM"),
    "layers/ffn/down_bias": (f"{_LAYER}.output.dense.bias", "D"),
    "layers/ffn/router/kernel": (f"{_LAYER}.router.weight", "E D"),  # ours
    "layers/ffn/router/bias": (f"{_LAYER}.router.bias", "E"),  # ours
    "layers/ffn_norm/scale": (f"{_LAYER}.output.LayerNorm.weight", "D"),
    "layers/ffn_norm/bias": (f"{_LAYER}.output.LayerNorm.bias", "D"),
    "pooler/kernel": ("bert.pooler.dense.weight", "P D"),
    "pooler/bias": ("bert.pooler.dense.bias", "P"),
    "transform/kernel": ("cls.predictions.transform.dense.weight", "P D"),
    "transform/bias": ("cls.predictions.transform.dense.bias", "P"),
    "transform/norm/scale": ("cls.predictions.transform.LayerNorm.weight", "P"),
    "transform/norm/bias": ("cls.predictions.transform.LayerNorm.bias", "P"),
    "lm_head/kernel": ("cls.predictions.decoder.weight", "V D"),
    "lm_head/bias": ("cls.predictions.bias", "V"),
    "classifier/kernel": ("classifier.weight", "Y D"),
    "classifier/bias": ("classifier.bias", "Y"),
}
KEYS = {
    "vocab_size": Key("vocab_size", Fields.size, 30522),
    "d_model": Key("hidden_size", Fields.size, 768),
    "d_ff": Key("intermediate_size", Fields.size, 3072),
    "num_layers": Key("num_hidden_layers", llama.LAYERS, 12),
    "num_heads": Key("num_attention_heads", Fields.size, 12),
    "max_length": Key("max_position_embeddings", Fields.size, 512),
    "token_types": Key("type_vocab_size", Fields.size, 2),
    "activation": Key("hidden_act", Fields.activation, "gelu", write=llama.HF_ACTIVATIONS.get),
    "norm_eps": Key("layer_norm_eps", Fields.positive, 1e-12),
    "tie_embeddings": Key("tie_word_embeddings", Fields.flag, True),
    "bos_id": Key("bos_token_id", Fields.token_id, None),
    "eos_ids": Key("eos_token_id", Fields.token_ids, None, write=llama.KEYS["eos_ids"].write),
    "pad_id": Key("pad_token_id", Fields.token_id, 0),
}
FIXED = {
    "causal": False,
    "norm": "layer",
    "norm_bias": True,
    "norm_place": "post",
    "positions": "learned",
    "embed_norm": True,
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "pooler": lambda v: v["head"] != "masked_lm",
    "num_kv_heads": lambda v: v["num_heads"],
    "head_dim": lambda v: v["d_model"] // v["num_heads"],
}
FAMILY = Family(
    "bert",
    {
        "none": "BertModel",
        "classes": "BertForSequenceClassification",
        "masked_lm": "BertForMaskedLM",
    },
    keys=KEYS,
    parts=(),
    tensors=TENSORS,
    prefix="bert.",
    fixed=FIXED,
    expects={
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
    # Copies of what is tied, and the head of next sentences beside that of masked words.
    constants=r"embeddings\.position_ids$|^cls\.predictions\.decoder\.bias$|^cls\.seq_relationship\.",
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
)
