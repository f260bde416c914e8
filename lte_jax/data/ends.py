"""Chooses the token that ends training texts, so the model does not unlearn where texts end.

Dimension key: B batch  L length  V vocabulary
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data.packing import eval_batches, pad
from lte_jax.data.texts import read_texts
from lte_jax.data.tokens import tokenize
from lte_jax.errors import UserError
from lte_jax.model import Transformer

DOCUMENTS = 64  # that the model is measured on
ROWS = 4  # documents per batch

log = logging.getLogger(__name__)


def end_token(
    data: DataConfig,
    tokenizer: Any,
    model_config: ModelConfig,
    load: Callable[[], tuple[Transformer, Mapping[str, Any]]] | None,
) -> int | None:
    """The id that `build` appends to each training document, as `data.end_token` says.

    Args:
      data: where the texts are, and which token to take.
      tokenizer: the model's.
      model_config: the model's, for its vocabulary.
      load: returns the pretrained model and its parameters, which "auto" measures: does it expect
        the tokenizer's eos or bos after the first 64 documents of data.train? (Many models never
        saw an eos: their texts were separated by the next one's bos.) None: the model starts from
        random weights, and "auto" is the eos.

    Returns:
      The id; None if there is to be none, or "auto" finds none within the vocabulary.

    Raises:
      UserError: if the tokenizer or the model's vocabulary lacks the token asked for.
    """
    named = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    ids = {k: v for k, v in named.items() if v is not None and v < model_config.vocab_size}
    if data.end_token == "none":
        return None
    if data.end_token != "auto":
        if data.end_token not in ids:
            raise UserError(
                f"data.end_token={data.end_token!r}: the tokenizer has no such token within the "
                f"model's vocabulary of {model_config.vocab_size}: set 'auto' or 'none'"
            )
        return ids[data.end_token]
    if load is None:
        return ids.get("eos")
    candidates = sorted(set(ids.values()))
    if len(candidates) < 2:
        return next(iter(candidates), None)
    limit = min(DOCUMENTS, data.max_documents or DOCUMENTS)
    texts = read_texts(data.train, data.column, data.newline, limit, "train", data.join)
    documents = tokenize(texts, tokenizer)
    means = end_probabilities(*load(), documents, candidates, data.length)
    likely = zip(means, candidates, strict=True)
    (most, end), *others = sorted(likely, key=lambda pair: -pair[0])
    log.info(
        "training documents end with token %s: of the candidates the likeliest after a text (%s); "
        "data.end_token sets another",
        _named(end, tokenizer),
        "; ".join([f"{most:.2g}", *(f"{_named(i, tokenizer)}: {p:.2g}" for p, i in others)]),
    )
    return end


def _named(token: int, tokenizer: Any) -> str:
    return f"{token} {tokenizer.convert_ids_to_tokens(token)!r}"


def end_probabilities(
    model: Transformer,
    params: Mapping[str, Any],
    documents: Sequence[np.ndarray],
    ids: Sequence[int],
    length: int,
) -> list[float]:
    """Each id's mean probability after a document's last token; the model sees `length` tokens."""
    records = pad([document[-length:] for document in documents if len(document)], length)
    sums = np.zeros(len(ids))
    for batch in eval_batches(records, ROWS):
        after_BV = _after_last(model, params, batch["tokens"], batch["segments"])
        after_BV = multihost_utils.process_allgather(after_BV, tiled=True)
        is_row_B1 = batch["segments"][:, :1] > 0
        sums += np.sum(np.asarray(after_BV)[:, list(ids)] * is_row_B1, axis=0)
    return [float(mean) for mean in sums / len(records)]


@functools.partial(jax.jit, static_argnames="model")
def _after_last(model, params, tokens_BL, segments_BL):
    """Probabilities [B, V] of the token after the last real token of each row."""
    logits_BLV = model.apply({"params": params}, tokens_BL, mask=segments_BL).logits
    last_B = jnp.maximum(jnp.sum(segments_BL > 0, axis=1) - 1, 0)
    logits_BV = jnp.take_along_axis(logits_BLV, last_B[:, None, None], axis=1)[:, 0]
    return jax.nn.softmax(logits_BV.astype(jnp.float32))
