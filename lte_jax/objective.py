"""What the head of a model is trained for: which of its outputs have a loss, and which loss.

Dimension key: B batch  L length  S texts of a record
"""

from __future__ import annotations

import numpy as np
from jax import Array

from lte_jax import losses
from lte_jax.model import Transformer

# tokens and segments [B, L], int32; some have types or answers [B, L], or labels [B, S].
Batch = dict[str, Array | np.ndarray]


def predicted(model: Transformer, batch: Batch) -> Array | np.ndarray:
    """True at what has a task loss: positions [B, L] whose next token counts, or texts [B, S]."""
    if model.config.head == "classes":
        texts = batch["labels"].shape[1]
        return losses.tokens_of_texts(batch["segments"], texts).any(axis=2)
    return losses.loss_mask(batch["segments"], batch.get("answers"))


def distilled(model: Transformer, batch: Batch) -> Array | np.ndarray:
    """True at what the teacher is asked: all real tokens, or texts; of answers, what predicts."""
    if model.config.head == "classes" or "answers" in batch:
        return predicted(model, batch)
    return batch["segments"] > 0


def counts_of(model: Transformer, batch: Batch) -> dict[str, Array]:
    """How much of a batch is predicted, distilled and real, each at least 1."""
    masks = {
        "predicted": predicted(model, batch),
        "distilled": distilled(model, batch),
        "real": batch["segments"] > 0,
    }
    return {name: losses.count_true(mask) for name, mask in masks.items()}


def task_loss(model: Transformer, logits: Array, batch: Batch, count: Array) -> Array:
    """The loss of the model's head: of next tokens, or of labels."""
    if model.config.head == "classes":
        return losses.label_loss(logits, batch["labels"], predicted(model, batch), count)
    return losses.cross_entropy(logits, batch["tokens"], predicted(model, batch), count)
