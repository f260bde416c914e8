"""What the head of a model is trained for: which of its outputs have a loss, and which loss.

The logits of a long batch may not exist all at once: they would be the largest arrays of a step, in
float32 and of student and teacher. `head_losses` then takes the head to chunks of the tokens.

Dimension key: B batch  L length  l length of a chunk  S texts of a record  D model width
               V vocabulary
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lte_jax import layers, losses, sharding
from lte_jax.kernels.quantized import Quantized
from lte_jax.layers import Output
from lte_jax.model import Transformer
from lte_jax.params import table
from lte_jax.reading import Slice

# tokens and segments [B, L], int32; some have types or answers [B, L], or labels [B, S].
Batch = dict[str, Array | np.ndarray]
Parts = dict[str, Array]

CHUNK = 2**28  # bytes of logits on a device that are held at once, unless compute.head_tokens says


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


def head_losses(
    model: Transformer,
    params: Any,
    out: Output,
    batch: Batch,
    counts: Parts,
    weights: tuple[float, float] = (1.0, 0.0),
    teacher: tuple[Any, Output] | None = None,
) -> tuple[Array, Parts]:
    """The losses of what the head says of a batch.

    Args:
      model: with `head_tokens`, see `chunk_length`.
      params: of the model.
      out: of a forward pass over the batch. In chunks, its logits are not used, so not computed.
      batch: or microbatch.
      counts: what to divide by: "predicted", and with a teacher "distilled".
      weights: of the task loss and of the distillation in the sum.
      teacher: the parameters and output of the dense model; None: no distillation.

    Returns:
      The weighted sum, and its parts "loss" and, with a teacher, "distill". In chunks, only the sum
      has a gradient.
    """
    rows, length = batch["segments"].shape
    devices = sharding.devices_along
    size = chunk_length(model, -(-rows // devices("data", "fsdp")), length, devices("tensor"))
    if size == length:
        parts = {"loss": task_loss(model, out.logits, batch, counts["predicted"])}
        if teacher is not None:
            mask, count = distilled(model, batch), counts["distilled"]
            parts["distill"] = losses.distillation(out.logits, teacher[1].logits, mask, count)
        return _weighted(parts, weights), parts
    targets_BL = losses.following(batch["tokens"])
    told = {"targets": targets_BL, "predicted": predicted(model, batch)}
    whole = {"counts": counts}
    if teacher is not None:
        told |= {"distilled": distilled(model, batch), "taught": teacher[1].hidden}
        whole["teacher"] = _head(model, teacher[0])
    typed = lambda w: w.astype(model.dtype) if w.ndim > 1 else w  # noqa: E731
    rounded = lambda w: isinstance(w, Quantized)  # noqa: E731
    head = jax.tree.map(typed, _head(model, params), is_leaf=rounded)
    return _chunked(model, size, weights, head, out.hidden, whole, told)


def chunk_length(model: Transformer, rows: int, length: int, tensor: int = 1) -> int:
    """How many tokens of each record the head is taken to at a time; `length`: to all.

    So many that a device with `rows` records, one of `tensor` that share the vocabulary, holds the
    logits of `model.head_tokens` tokens; None: CHUNK bytes of them.
    """
    if model.config.head != "lm":
        return length
    width = 4 * model.config.vocab_size // tensor
    tokens = CHUNK // width if model.head_tokens is None else model.head_tokens
    chunks = -(-length // max(tokens // rows, 1))
    return -(-length // max(chunks, 1))


def _weighted(parts: Parts, weights: tuple[float, float]) -> Array:
    total = weights[0] * parts["loss"]
    return total + weights[1] * parts["distill"] if "distill" in parts else total


def _head(model: Transformer, params: Any) -> Any:
    """The parameters that `layers.head` reads."""
    head: dict[str, Any] = {}
    own = "embed/embedding" if model.config.tie_embeddings else "lm_head/"
    for row in table(model.config, None):
        if row.path.startswith(own):
            part, name = row.path.split("/")
            head[part] = head.get(part, {}) | {name: params[part][name]}
    return head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(model, size, weights, head, x_BLD, whole, told) -> tuple[Array, Parts]:
    """`head_losses`, from hidden states x, `size` tokens of each record at a time."""

    def of_chunk(head, x_BlD, whole, told):
        return _of_chunk(model, weights, head, x_BlD, whole, told), None

    return _over_chunks(of_chunk, size, head, x_BLD, whole, told)[0]


def _forward(model, size, weights, *args):
    """Takes the gradient on the way, while the logits of a chunk are there.

    That costs what one pass over all logits costs; to take it later, they would be computed twice.
    A head that does not learn (lora.py) gets none.
    """
    learns = any(leaf.perturbed for leaf in jax.tree.leaves(args[0]))
    head, x_BLD, whole, told = jax.tree.map(lambda leaf: leaf.value, args)

    def of_chunk(head, x_BlD, whole, told):
        losses_of = functools.partial(_of_chunk, model, weights, whole=whole, told=told)
        gradient = jax.value_and_grad(losses_of, argnums=(1, 0) if learns else (1,), has_aux=True)
        sums, (d_x_BlD, *d_head) = gradient(head, x_BlD)
        return (sums, d_head), d_x_BlD

    (sums, d_head), d_x_BLD = _over_chunks(of_chunk, size, head, x_BLD, whole, told)
    d_heads = [jax.tree.map(lambda g, w: g.astype(w.dtype), d, head) for d in d_head]
    return sums, (d_heads[0] if learns else None, d_x_BLD)


def _backward(model, size, weights, gradients, cotangents):
    del model, size, weights
    scale, _ = cotangents
    times = lambda g: (scale * g.astype(jnp.float32)).astype(g.dtype)  # noqa: E731
    return *jax.tree.map(times, gradients), None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _of_chunk(model, weights, head, x_BlD, whole, told) -> tuple[Array, Parts]:
    """The weighted sum and the parts of a chunk's losses."""

    def logits(head: Any, x_BlD: Array, as_held: bool = False) -> Array:
        with jax.named_scope("head"):
            w = Slice(head, jnp.dtype(model.dtype), as_held=as_held)
            return layers.head(model.config, w, x_BlD, None, None)

    logits_BlV, counts = logits(head, x_BlD), whole["counts"]
    args = told["targets"], told["predicted"], counts["predicted"]
    parts = {"loss": losses.nll(logits_BlV, *args)}
    if "teacher" in whole:
        with jax.named_scope("teacher"):
            taught_BlV = logits(whole["teacher"], told["taught"], as_held=True)
        args = taught_BlV, told["distilled"], counts["distilled"]
        parts["distill"] = losses.distillation(logits_BlV, *args)
    return _weighted(parts, weights), parts


def _over_chunks(of_chunk, size, head, x_BLD, whole, told) -> tuple[Any, Any]:
    """`of_chunk` of every chunk: its sums added up in float32, what it says of tokens in a row."""
    length = x_BLD.shape[1]

    def cut(x_BL: Array) -> Array:  # [chunks, B, l, ...]; what is added at the end has no loss
        added = [(0, 0), (0, -length % size), *[(0, 0)] * (x_BL.ndim - 2)]
        x_BL = jnp.pad(x_BL, added)
        return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], -1, size, *x_BL.shape[2:]), 1, 0)

    def joined(x_cBl: Array) -> Array:
        x_BL = jnp.moveaxis(x_cBl, 0, 1)
        return x_BL.reshape(x_BL.shape[0], -1, *x_BL.shape[3:])[:, :length]

    def all_chunks(shared: Any, rows: Any) -> tuple[Any, Any]:
        def step(sums, chunk):
            more, of_tokens = of_chunk(shared[0], chunk[0], shared[1], chunk[1])
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more), of_tokens

        chunks = jax.tree.map(cut, rows)
        first = jax.tree.map(lambda x: x[0], chunks)
        shapes, _ = jax.eval_shape(of_chunk, shared[0], first[0], shared[1], first[1])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        sums, of_tokens = jax.lax.scan(step, zeros, chunks)
        return sums, jax.tree.map(joined, of_tokens)

    on_rows = sharding.over_batch(all_chunks, x_BLD.shape[0])
    return on_rows((head, whole), (x_BLD, told))
