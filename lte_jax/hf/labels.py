"""The labels of a classifier: `id2label`, `label2id` and `num_labels` in config.json."""

from __future__ import annotations

from typing import Any

from lte_jax.config import ModelConfig
from lte_jax.hf.fields import Fields


def read(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """The number of labels; transformers' default is 2."""
    fields.asked |= {"label2id"}
    named = fields.get("id2label", dict, None)
    number = fields.size("num_labels", len(named) if named else 2)
    return {"num_labels": number} if values["head"] == "classes" else {}


def write(config: ModelConfig) -> dict[str, Any]:
    """The labels by transformers' default names."""
    if config.head != "classes":
        return {}
    names = [f"LABEL_{i}" for i in range(config.num_labels)]
    id2label = {str(i): name for i, name in enumerate(names)}
    return {"id2label": id2label, "label2id": {name: i for i, name in enumerate(names)}}
