"""Log-likelihoods of given texts, logits of classes, and embeddings of texts, batched.

Inputs are padded on the right to a few lengths (powers of two), so few programs are compiled. Equal
inputs, such as those of four one-token answers to a question, are computed once.

Dimension key: B batch  L length  R records  D model width  S texts of a record  T texts
               V vocabulary  Y classes  Z width of embeddings
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import checks, interrupt, layers
from lte_jax.data import Records, eval_batches, pad
from lte_jax.errors import UserError
from lte_jax.model import Transformer, forward
from lte_jax.objective import predicted
from lte_jax.routing import make as make_routing
from lte_jax.selection import Routing

SHORTEST = 32  # tokens; no input is padded to less
Ids = Sequence[int] | np.ndarray
Pair = tuple[Ids, Ids]  # token ids of a context and of its continuation


class Likelihood(NamedTuple):
    """Of a continuation: its log-likelihood in nats, and whether greedy decoding writes it."""

    nats: float
    greedy: bool


def loglikelihoods(
    model: Transformer,
    params: Mapping[str, Any],
    pairs: Sequence[Pair],
    *,
    routing: Routing | str | None = None,
    threshold: float | Any = None,
    batch_size: int | Any = 8,
) -> tuple[list[Likelihood], float]:
    """The log-likelihood of each continuation after its context.

    Args:
      model: a decoder, dense or LTE.
      params: its parameters.
      pairs: token ids of context and continuation, neither of them empty. Of a pair with more than
        `max_length` + 1 tokens the first ones are cut off.
      routing: as in `lte_jax.apply`.
      threshold: in place of `model.lte.threshold`.
      batch_size: of the forward passes.

    Returns:
      A `Likelihood` for each pair, and the share of experts skipped over all tokens read.

    Raises:
      UserError: on a model without a head of next tokens, and on pairs that are empty or do not
        fit the model.
    """
    most = model.config.max_length
    checks.model(model, params)
    checks.integer("batch_size", batch_size, 1)
    checks.language_model(model.config, "a log-likelihood")
    numbers: dict[tuple[int, ...], list[int]] = {}  # input -> the pairs that it scores
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not 0 < len(continuation) <= most:
            raise UserError(
                f"text {number}: {len(context)} tokens of context, {len(continuation)} to predict: "
                f"expected at least 1 of each, and at most the model's max_length={most} to predict"
            )
        ids = tuple(map(int, [*context, *continuation][-(most + 1) :]))
        checks.token_ids(np.array(ids), model.config.vocab_size, f"text {number}")
        numbers.setdefault(ids[:-1], []).append(number)
    found: list[Any] = [None] * len(pairs)
    inputs = sorted(numbers, key=len, reverse=True)
    by_length = itertools.groupby(inputs, lambda ids: min(padded(len(ids)), most))
    records = (pad(map(np.asarray, group), length) for length, group in by_length)
    how = {"routing": routing, "threshold": threshold, "batch_size": batch_size}
    counts_2 = np.zeros(2)
    rows = _rows(_next_tokens, model, params, records, len(inputs), counts_2, **how)
    for ids, (score_L, best_L, last_V) in zip(inputs, rows, strict=True):
        for number in numbers[ids]:
            new = np.asarray(pairs[number][1])
            predicted = slice(len(ids) - len(new), len(ids))
            nats = score_L[predicted][:-1].sum(dtype=np.float64) + last_V[new[-1]]
            found[number] = Likelihood(float(nats), bool(np.array_equal(best_L[predicted], new)))
    return found, _share(counts_2)


def class_logits(
    model: Transformer,
    params: Mapping[str, Any],
    records: Records,
    *,
    routing: Routing | str | None = None,
    threshold: float | Any = None,
    batch_size: int | Any = 8,
) -> tuple[np.ndarray, float]:
    """A classifier's logits [T, Y] of labelled records' texts, and the share of experts skipped."""
    how = {"routing": routing, "threshold": threshold, "batch_size": batch_size}
    counts_2 = np.zeros(2)
    rows = _rows(_classes, model, params, [records], len(records), counts_2, **how)
    logits_RSY = np.stack([logits_SY for (logits_SY,) in rows])
    return logits_RSY[predicted(model, records[:])], _share(counts_2)


def embed_texts(
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Any,
    texts: Sequence[str] | Any,
    *,
    routing: Routing | str | None = None,
    threshold: float | Any = None,
    batch_size: int | Any = 32,
) -> np.ndarray:
    """The embedding of each text, [T, Z] float32, as sentence-transformers' `encode`.

        vectors = lte_jax.embed_texts(model, params, tokenizer, ["a text", "another"])

    What stands for a text is `ModelConfig.pooling`; then comes a dense layer where the model has
    one (else Z = D), and length 1 if `ModelConfig.unit_length`. `load` reads all of them from a
    folder of sentence-transformers.

    Args:
      model: an encoder or a decoder, dense or LTE.
      params: its parameters.
      tokenizer: its tokenizer; texts are cut to its `model_max_length`, or to the model's.
      texts: each with at least one token.
      routing: as in `lte_jax.apply`.
      threshold: in place of `model.lte.threshold`.
      batch_size: of the forward passes.

    Raises:
      UserError: on arguments that do not fit the model or each other.
    """
    checks.model(model, params)
    checks.integer("batch_size", batch_size, 1)
    several = isinstance(texts, list | tuple)
    if not (several and all(isinstance(text, str) for text in texts)):
        raise UserError("texts: expected a list of texts")
    config, width = model.config, model.config.embed_dim or model.config.d_model
    found = np.zeros((len(texts), width), np.float32)
    most = min(config.max_length, tokenizer.model_max_length)
    coded = tokenizer(list(texts), truncation=True, max_length=most)["input_ids"] if texts else []
    for number, ids in enumerate(coded):
        checks.token_ids(np.asarray(ids), config.vocab_size, f"text {number}")
        if not ids:
            raise UserError(f"text {number} has no tokens: expected at least one")
    order = sorted(range(len(coded)), key=lambda number: -len(coded[number]))
    by_length = itertools.groupby(order, lambda number: min(padded(len(coded[number])), most))
    groups = (pad([np.asarray(coded[i]) for i in group], length) for length, group in by_length)
    how = {"routing": routing, "threshold": threshold, "batch_size": batch_size}
    rows = _rows(_embeddings, model, params, groups, len(coded), np.zeros(2), **how)
    for number, (vector_Z,) in zip(order, rows, strict=True):
        found[number] = vector_Z
    return found


def padded(length: int) -> int:
    """The number of tokens that an input of this length is padded to."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _rows(
    compute, model, params, groups: Iterable[Records], total, counts_2, *, routing, threshold,
    batch_size,
) -> Iterator[tuple[np.ndarray, ...]]:  # fmt: skip
    """What `compute` gives for each record; adds skipped experts and tokens to `counts_2`."""
    from tqdm import tqdm

    how = make_routing(routing, model.config, model.lte)
    with tqdm(total=total, desc="scoring", unit=" texts", disable=None, leave=False) as bar:
        for records in groups:
            left = len(records)
            for batch in eval_batches(records, batch_size):
                interrupt.check("while scoring")
                outputs, *more = jax.device_get(compute(model, params, batch, threshold, how))
                counts_2 += more
                mine = min(left, batch_size)  # the rest fills the batch up
                left -= mine
                bar.update(mine)
                yield from zip(*(output[:mine] for output in outputs), strict=True)


def _share(counts_2: np.ndarray) -> float:
    return float(counts_2[0] / max(counts_2[1], 1))


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _next_tokens(model, params, batch, threshold, how):
    """Of each position the score of the next token and the best token; all scores at the end."""
    out = forward(model, params, batch, routing=how, threshold=threshold)
    scores_BLV = jax.nn.log_softmax(out.logits)
    next_BL1 = jnp.roll(batch["tokens"], -1, axis=1)[:, :, None]
    next_BL = jnp.take_along_axis(scores_BLV, next_BL1, axis=2)[:, :, 0]
    last_B11 = jnp.maximum(jnp.sum(batch["segments"], axis=1) - 1, 0)[:, None, None]
    last_BV = jnp.take_along_axis(scores_BLV, last_B11, axis=1)[:, 0]
    return (next_BL, jnp.argmax(scores_BLV, axis=-1), last_BV), *_counts(out, batch)


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _classes(model, params, batch, threshold, how):
    out = forward(model, params, batch, routing=how, threshold=threshold)
    return (out.logits,), *_counts(out, batch)


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _embeddings(model, params, batch, threshold, how):
    out = forward(model, params, batch, routing=how, threshold=threshold)
    own_B1L = (batch["segments"] > 0)[:, None]
    vector_BZ = layers.pool(model.config, out.hidden, own_B1L)[:, 0].astype(jnp.float32)
    if "dense" in params:
        kernel_DZ, bias_Z = (params["dense"][n].astype(jnp.float32) for n in ("kernel", "bias"))
        vector_BZ = vector_BZ @ kernel_DZ + bias_Z[None]
        if model.config.embed_activation == "tanh":
            vector_BZ = jnp.tanh(vector_BZ)
    if model.config.unit_length:
        vector_BZ /= jnp.maximum(jnp.linalg.norm(vector_BZ, axis=1, keepdims=True), 1e-12)
    return (vector_BZ,), *_counts(out, batch)


def _counts(out, batch) -> tuple[jax.Array, jax.Array]:
    """Skipped experts, as a number of tokens that skip all, and tokens."""
    real = jnp.sum(batch["segments"] > 0, dtype=jnp.float32)
    return out.sparsity * real, real
