"""From prompts of token ids to the ids that follow them.

Dimension key: B batch  L prompt length  V vocabulary  S new tokens
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Required, TypedDict

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from lte_jax import checks, kernels
from lte_jax.config import ModelConfig, RoutingName
from lte_jax.errors import Given, UserError
from lte_jax.generation import beam
from lte_jax.generation.decoding import Decoder, DecodeState, round_up
from lte_jax.model import Transformer
from lte_jax.routing import dial
from lte_jax.selection import Routing

STREAM_CHUNK = 8  # tokens between two calls of `stream`


class Settings(TypedDict, total=False):
    """The settings of `generate` that functions of texts pass on to it."""

    max_new_tokens: Required[int]
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    beams: int
    length_penalty: float
    no_repeat_ngram: int
    min_new_tokens: int
    eos_ids: Iterable[int] | None
    routing: Routing | RoutingName | None
    threshold: float | None
    sparsity: float | None
    implementation: str
    measured: Callable[[Measured], None] | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What it took to continue some prompts."""

    tokens: int  # new ones, of all prompts
    seconds: float  # compiling included
    later: tuple[int, float]  # tokens and seconds after the first two pieces, when all is compiled
    sparsity: float | None  # share of experts not read while decoding; None if all are run
    kernels: str

    @classmethod
    def of(cls, ends: Sequence[tuple[float, int]], read: float | None, kernels: str) -> Measured:
        """From the time and the number of tokens at the end of each piece."""
        (seconds, tokens), (start, before) = ends[-1], ends[min(1, len(ends) - 1)]
        sparsity = None if read is None else 1 - read
        return cls(tokens, seconds, (tokens - before, seconds - start), sparsity, kernels)


def generate(
    model: Transformer,
    params: Mapping[str, Any],
    tokens: Given[Int[Array | np.ndarray, "B L"] | Sequence[Sequence[int] | Array | np.ndarray]],
    *,
    max_new_tokens: Given[int],
    temperature: Given[float] = 0.0,
    top_k: Given[int | None] = None,
    top_p: Given[float | None] = None,
    seed: Given[int] = 0,
    beams: Given[int] = 1,
    length_penalty: Given[float] = 1.0,
    no_repeat_ngram: Given[int] = 0,
    min_new_tokens: Given[int] = 0,
    eos_ids: Given[Iterable[int] | None] = None,
    routing: Given[Routing | RoutingName | None] = None,
    threshold: Given[float | None] = None,
    sparsity: Given[float | None] = None,
    implementation: Given[str] = "auto",
    mask: Any = None,
    stream: Given[Callable[[list[list[int]]], None] | None] = None,
    measured: Given[Callable[[Measured], None] | None] = None,
) -> list[list[int]]:
    """Continues each prompt; returns the new token ids of each, an end-of-text token included.

        [ids] = lte_jax.generate(model, params, [tokenizer("Once")["input_ids"]], max_new_tokens=9)

    Args:
      model: dense or LTE, as from `lte_jax.load`.
      params: its parameters.
      tokens: a list of prompts, each a list of token ids, or an array [B, L].
      max_new_tokens: for each prompt; prompt and new tokens must fit in the model's max_length.
      temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
      top_k: sample among the k likeliest tokens only; of equally likely ones, those of lowest id.
      top_p: sample among the fewest likeliest tokens that have this probability together.
      seed: of the sampling, 0 to 2^32 - 1; the same seed gives the same text.
      beams: 2 or more: beam search (beam.py) of that width, as transformers defines it.
      length_penalty: of beam search: power of the length that divides a text's log-probability.
      no_repeat_ngram: of beam search: n-grams of this size occur once in a text; 0: any may repeat.
      min_new_tokens: of beam search: tokens before a text may end.
      eos_ids: tokens that end a text. None: those of the model; (): none.
      routing: as in `lte_jax.apply`; all but "dense" and "soft" read active experts only.
      threshold: in place of `model.lte.threshold`.
      sparsity: share of experts to skip, in place of a threshold, see `lte_jax.calibrate`.
      implementation: of the sparse FFN, see `lte_jax.kernels.sparse_ffn`.
      mask: True (or > 0) at real tokens [B, L], where `tokens` is a padded array.
      stream: called with each prompt's newest tokens as soon as there are some.
      measured: called at the end with what it took; not by a beam search.

    Raises:
      UserError: on prompts and settings that make no sense, and where logits are not finite.
    """
    checks.model(model, params)
    checks.routing_of(model, routing)
    prompts = prompts_of(tokens, mask, model.config.vocab_size)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check(model.config, prompts, max_new_tokens, seed, threshold, stream, **sampling)
    search = {"length_penalty": length_penalty, "no_repeat_ngram": no_repeat_ngram}
    search |= {"min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens}
    settings = {"implementation": implementation, "eos_ids": ends_of(model.config, eos_ids)}
    threshold = dial(model.lte, routing, threshold, sparsity)
    decoder = Decoder.of(model, params, routing, threshold, **sampling, **settings)
    _check_search(decoder, stream, beams, **search)
    if beams > 1:
        return _searched(decoder, prompts, beams=beams, **search)
    return _continued(decoder, prompts, max_new_tokens, seed, stream, measured)


def _searched(decoder, prompts, *, max_new_tokens: int, **search) -> list[list[int]]:
    found, finite = beam.search(decoder, prompts, max_new_tokens=max_new_tokens, **search)
    return found if finite else _not_finite(decoder.model, max_new_tokens)


def _continued(decoder, prompts, max_new_tokens, seed: int, stream, measured) -> list[list[int]]:
    """The new tokens of each prompt, without beam search."""
    began, ends = time.perf_counter(), []
    first = state = decoder.prefill(prompts, room=max_new_tokens, seed=seed)
    size = STREAM_CHUNK if stream else round_up(max_new_tokens - 1)
    new: list[list[int]] = [[] for _ in prompts]
    for fresh, state in _pieces(decoder, first, max_new_tokens, size):
        for row, more in zip(new, fresh, strict=True):
            row += more
        ends.append((time.perf_counter() - began, sum(map(len, new))))
        if stream is not None:
            stream(fresh)
    if measured is not None:
        steps = int(state.step) - 1  # the first token is of the prefill, which reads all experts
        read = float(state.read) / steps if steps and decoder.routing.skips else None
        measured(Measured.of(ends, read, kernels.resolve(decoder.implementation)))
    return new


def _pieces(
    decoder: Decoder, state: DecodeState, count: int, size: int
) -> Iterator[tuple[list[list[int]], DecodeState]]:
    """The new tokens of each prompt, `size` at a time, until all have ended or have `count`.

    With them comes the state after them.
    """
    tokens_BS, made = np.array(state.tokens_B)[:, None], 1  # a copy: the state's is used up
    while True:
        if not state.finite:
            _not_finite(decoder.model, made)
        yield [[int(t) for t in row if t >= 0] for row in tokens_BS], state
        if made >= count or np.all(state.done_B):
            return
        limit = min(count - made, size)
        tokens_BS, state = decoder.go_on(state, jnp.int32(limit), size)
        tokens_BS, made = np.asarray(tokens_BS), made + limit


def _not_finite(model: Transformer, made: int) -> NoReturn:
    raise UserError(
        f"the model's logits are not finite after {made} new tokens or fewer: its weights "
        f"are not those of a working model, or overflow in {model.dtype}"
    )


def ends_of(config: ModelConfig, eos_ids: Any) -> tuple[int, ...] | None:
    """The tokens that end a text; None: those of the model."""
    if eos_ids is None:
        return None
    if not _is_list(eos_ids):
        raise UserError(f"eos_ids={eos_ids!r}: expected a list of token ids, or None")
    chosen = tuple(eos_ids)
    for number in chosen:
        checks.integer("eos_ids: token", number, 0, config.vocab_size - 1, ", the vocabulary")
    return tuple(map(int, chosen))


def prompts_of(tokens: Any, mask: Any, vocab_size: int) -> list[np.ndarray]:
    """Each prompt as an array of token ids."""
    if isinstance(tokens, str):
        raise UserError("tokens is a string: expected lists of token ids (or call generate_text)")
    if not _is_list(tokens):
        raise UserError(f"tokens is {type(tokens).__name__}: expected a list of lists of token ids")
    prompts = [np.asarray(checks.array(row, f"prompt {i}")) for i, row in enumerate(tokens)]
    if not prompts:
        raise UserError("no prompt: expected a list of at least one list of token ids")
    if mask is not None:
        shapes = {row.shape for row in prompts}
        if len(shapes) > 1 or prompts[0].ndim != 1:
            raise UserError(
                f"tokens has rows of shape {' and '.join(map(str, sorted(shapes)))}: with a mask, "
                "expected an array [B, L]; lists of different length need no mask"
            )
        tokens_BL, mask_BL = np.stack(prompts), checks.array(mask, "mask")
        checks.mask_of(tokens_BL, mask_BL)
        real_BL = np.asarray(mask_BL) > 0
        prompts = [row[real] for row, real in zip(prompts, real_BL, strict=True)]
    for i, row in enumerate(prompts):
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise UserError(
                f"prompt {i} is {row.dtype}{list(row.shape)}: expected a list of token ids (one "
                "prompt alone is a list in a list)"
            )
        if not row.size:
            raise UserError(f"prompt {i} is empty: start it with the beginning-of-text token")
        checks.token_ids(row, vocab_size, f"prompt {i}")
    return prompts


def _is_list(value: Any) -> bool:
    single = isinstance(value, str) or getattr(value, "shape", None) == ()
    return isinstance(value, Iterable) and not single


def check(
    config: ModelConfig, prompts, max_new_tokens, seed, threshold, stream, temperature, top_k, top_p
) -> None:
    """Raises on what `generate` refuses of these."""
    checks.function("stream", stream)
    checks.language_model(config, "generate")
    longest, most = max(map(len, prompts)), config.max_length
    checks.integer("max_new_tokens", max_new_tokens, 1)
    if longest + max_new_tokens > most:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"max_length={most}: at most {max(most - longest, 0)} new tokens fit"
        )
    if not checks.is_number(temperature) or not 0 <= temperature < np.inf:
        raise UserError(f"temperature={temperature!r}: expected 0 (greedy) or a positive number")
    if top_k is not None:
        checks.integer("top_k", top_k, 1, words=", or None for all tokens")
    if top_p is not None and not (checks.is_number(top_p) and 0 < top_p <= 1):
        raise UserError(f"top_p={top_p!r}: expected within (0, 1], or None for all tokens")
    checks.seed(seed)
    checks.threshold(threshold, config.num_layers)


def _check_search(
    decoder, stream, beams, length_penalty, no_repeat_ngram, min_new_tokens, max_new_tokens
) -> None:
    """Refuses settings of beam search that make no sense, alone or together."""
    vocabulary = decoder.model.config.vocab_size
    most = vocabulary // max(2, 1 + len(decoder.eos_ids))
    words = f": the vocabulary has {vocabulary} tokens" if beams != 1 else ""
    checks.integer("beams", beams, 1, max(most, 1), words)
    if not checks.is_number(length_penalty) or not np.isfinite(length_penalty):
        raise UserError(f"length_penalty={length_penalty!r}: expected a finite number")
    checks.integer("no_repeat_ngram", no_repeat_ngram, 0, words=" (0: any n-gram may repeat)")
    checks.integer("min_new_tokens", min_new_tokens, 0, max_new_tokens, ", max_new_tokens")
    if beams == 1 and (length_penalty != 1 or no_repeat_ngram or min_new_tokens):
        raise UserError(
            "length_penalty, no_repeat_ngram and min_new_tokens are of beam search: expected "
            "beams=2 or more with them"
        )
    if beams > 1 and not decoder.greedy:
        raise UserError(f"beams={beams} with a temperature: expected temperature=0, or beams=1")
    if beams > 1 and stream is not None:
        raise UserError(f"beams={beams} with stream: a beam search has no text before its end")
