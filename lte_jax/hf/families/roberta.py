"""RoBERTa and XLM-RoBERTa: a BERT whose positions begin after the padding token's row.

transformers: models/roberta/configuration_roberta.py, modeling_roberta.py.
"""

import dataclasses

from lte_jax.errors import UserError
from lte_jax.hf.families import bert
from lte_jax.hf.fields import Fields

TENSORS = {
    path: (name.replace("bert.", "roberta.", 1), layout)
    for path, (name, layout) in bert.TENSORS.items()
} | {
    "transform/kernel": ("lm_head.dense.weight", "P D"),
    "transform/bias": ("lm_head.dense.bias", "P"),
    "transform/norm/scale": ("lm_head.layer_norm.weight", "P"),
    "transform/norm/bias": ("lm_head.layer_norm.bias", "P"),
    "lm_head/kernel": ("lm_head.decoder.weight", "V D"),
    "lm_head/bias": ("lm_head.bias", "V"),
}
CLASSIFIER = {  # its first layer is a pooler by another name
    "pooler/kernel": ("classifier.dense.weight", "P D"),
    "pooler/bias": ("classifier.dense.bias", "P"),
    "classifier/kernel": ("classifier.out_proj.weight", "Y D"),
    "classifier/bias": ("classifier.out_proj.bias", "Y"),
}


class _Positions:
    """`max_position_embeddings` counts the rows before the first position, too."""

    def read(self, fields: Fields, values: dict) -> dict:
        """The row of the first position, and how many positions follow."""
        if values["pad_id"] is None:
            raise UserError("pad_token_id is null: expected an id, from which positions count")
        offset = values["pad_id"] + 1
        return {"position_offset": offset, "max_length": values["max_length"] - offset}

    def write(self, config) -> dict:
        """All rows."""
        return {"max_position_embeddings": config.max_length + config.position_offset}


FAMILY = dataclasses.replace(
    bert.FAMILY,
    model_type="roberta",
    architectures={
        "none": "RobertaModel",
        "classes": "RobertaForSequenceClassification",
        "masked_lm": "RobertaForMaskedLM",
    },
    parts=(_Positions(),),
    tensors=TENSORS,
    heads={"classes": CLASSIFIER},
    prefix="roberta.",
    defaults={"vocab_size": 50265, "bos_id": 0, "eos_ids": 2, "pad_id": 1},
    constants=r"embeddings\.position_ids$|^lm_head\.decoder\.bias$",
)
XLM = dataclasses.replace(
    FAMILY,
    model_type="xlm-roberta",
    architectures={
        head: name.replace("Roberta", "XLMRoberta") for head, name in FAMILY.architectures.items()
    },
    defaults=FAMILY.defaults | {"vocab_size": 30522},
)
