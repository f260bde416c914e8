"""Text generation: prompts in, continuations out; only active experts' weights are read.

Prompts of different length stand side by side, padded on the left, and each gets what it would get
alone. They are read whole (all experts, masked); then one compiled loop decodes token by token, its
FFNs going through the door to the sparse kernels (decoding.py). The text of a row depends on its
prompt, its place in the batch and the seed; not on other rows, nor on streaming.

Dimension key: B batch  L prompt length  V vocabulary  S new tokens
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lte_jax.config import Routing
from lte_jax.data import tokenize
from lte_jax.errors import UserError, nearest
from lte_jax.generate.decoding import Plan, extend, make_knobs, prefill, round_up
from lte_jax.kernels import resolve
from lte_jax.model import Transformer

STREAM_CHUNK = 8  # tokens between two calls of a stream


def generate(
    model: Transformer,
    params: Mapping[str, Any],
    tokens: Iterable[Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: Iterable[int] | None = None,
    routing: Routing | None = None,
    threshold: float | None = None,
    implementation: str = "auto",
    mask: Any = None,
    stream: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt; returns the new token ids of each, an end-of-text token included.

        prompts = [tokenizer("Once upon a time")["input_ids"], tokenizer("Lily")["input_ids"]]
        texts = tokenizer.batch_decode(lte_jax.generate(model, params, prompts, max_new_tokens=50))

    Args:
      model: dense or LTE, as from `lte_jax.load`.
      params: its parameters.
      tokens: a list of prompts, each a list of token ids, or an array [B, L].
      max_new_tokens: for each prompt; prompt and new tokens must fit in the model's max_length.
      temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
      top_k: sample among the k likeliest tokens only.
      top_p: sample among the fewest likeliest tokens that have this probability together.
      seed: of the sampling; the same seed gives the same text.
      eos_ids: tokens that end a text. None: those of the model; (): none.
      routing: as in `lte_jax.apply`. "hard", "top_k" and "straight_through" (hard going forward)
        read active experts only.
      threshold: in place of `model.lte.threshold`.
      implementation: of the sparse FFN, see `lte_jax.kernels.sparse_ffn`.
      mask: bool [B, L], the real tokens, where `tokens` is a padded array.
      stream: called with each prompt's newest tokens as soon as there are some.

    Raises:
      UserError: on prompts or settings that make no sense, naming which.
    """
    prompts = _prompts(tokens, mask, model.config.vocab_size)
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    plan = plan_for(
        model, routing, implementation, eos_ids, greedy=temperature == 0, top_k=top_k, top_p=top_p
    )
    knobs = make_knobs(model, threshold, temperature, top_p)

    state = prefill(model, params, plan, knobs, prompts, room=max_new_tokens, seed=seed)
    new: list[list[int]] = [[] for _ in prompts]

    def add(tokens_BS: np.ndarray) -> None:
        fresh = [[int(t) for t in row if t >= 0] for row in tokens_BS]
        for row, more in zip(new, fresh, strict=True):
            row += more
        if stream is not None:
            stream(fresh)

    add(np.asarray(state.tokens_B)[:, None])
    left = max_new_tokens - 1
    size = STREAM_CHUNK if stream else round_up(left)
    while left > 0 and not np.all(state.done_B):
        tokens_BS, state = extend(
            model, params, plan, knobs, state, jnp.int32(min(left, size)), size
        )
        add(np.asarray(tokens_BS))
        left -= size
    return new


def generate_text(
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Any,
    prompt: str,
    *,
    write: Callable[[str], Any] | None = None,
    **settings: Any,
) -> str:
    """The text that follows `prompt`; `settings` are those of `generate`.

    `write` gets it piece by piece as it comes, never half a character; the pieces add up to the
    text returned.
    """
    ids = tokenize([prompt], tokenizer)[0].tolist()
    skip = len(decode(tokenizer, ids))
    shown = 0

    def show(fresh: list[list[int]]) -> None:
        nonlocal shown
        ids.extend(fresh[0])
        # A character cut in two decodes to replacement characters at the end: they wait.
        text = decode(tokenizer, ids)[skip:].rstrip("\ufffd")
        if write is not None and len(text) > shown:
            write(text[shown:])
            shown = len(text)

    settings = {"stream": show} | settings if write is not None else settings
    prompt_length = len(ids)
    [new] = generate(model, params, [ids], **settings)
    text = decode(tokenizer, ids[:prompt_length] + new)[skip:]
    if write is not None and len(text) > shown:
        write(text[shown:])
    return text


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens left out and spaces left alone."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def plan_for(
    model: Transformer,
    routing: Routing | None = None,
    implementation: str = "auto",
    eos_ids: Iterable[int] | None = None,
    greedy: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Plan:
    """The plan of these settings of `generate`, for this model."""
    valid = typing.get_args(Routing)
    if routing not in (None, *valid):
        raise UserError(f"routing={routing!r}: {nearest(str(routing), valid)}")
    resolve(implementation)  # refuses a name that is none
    routing = "dense" if model.lte is None else routing or model.lte.routing
    return Plan(
        routing="hard" if routing == "straight_through" else routing,  # equal going forward
        implementation=implementation,
        greedy=greedy,
        top_k=top_k,
        nucleus=top_p is not None and top_p < 1,
        eos_ids=model.config.eos_ids if eos_ids is None else tuple(int(i) for i in eos_ids),
    )


def _prompts(tokens: Iterable[Any], mask: Any, vocab_size: int) -> list[np.ndarray]:
    """Each prompt as an array of token ids."""
    if mask is not None:
        tokens, mask = _array(tokens), _array(mask).astype(bool)
        if tokens.ndim != 2 or mask.shape != tokens.shape:
            raise UserError(
                f"tokens {tokens.shape} and mask {mask.shape}: expected two arrays of one shape "
                "[B, L]; lists of different length need no mask"
            )
        tokens = [row[real] for row, real in zip(tokens, mask, strict=True)]
    if isinstance(tokens, str):
        raise UserError("tokens is a text: expected a list of lists of token ids (generate_text?)")
    prompts = [np.asarray(row) for row in tokens]
    if not prompts:
        raise UserError("no prompt: expected a list of at least one list of token ids")
    for i, row in enumerate(prompts):
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise UserError(
                f"prompt {i} is {row.dtype}{list(row.shape)}: expected a list of token ids (one "
                "prompt alone is a list in a list)"
            )
        if not row.size:
            raise UserError(f"prompt {i} is empty: start it with the beginning-of-text token")
        if row.min() < 0 or row.max() >= vocab_size:
            wrong = int(row[(row < 0) | (row >= vocab_size)][0])
            raise UserError(
                f"prompt {i} has token id {wrong}, outside the vocabulary of {vocab_size}: use "
                "the model's own tokenizer"
            )
    return prompts


def _array(rows: Any) -> np.ndarray:
    """An array; of rows of different length, a vector."""
    try:
        return np.asarray(rows)
    except ValueError:
        return np.empty(len(rows), object)


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
    longest, most = max(len(p) for p in prompts), model.config.max_length
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if longest + max_new_tokens > most:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"max_length={most}: at most {max(most - longest, 0)} new tokens fit"
        )
    if not (np.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature={temperature}: expected 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: expected at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: expected within (0, 1], or None for all tokens")
