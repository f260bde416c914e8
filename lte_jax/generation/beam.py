"""Beam search: the likeliest continuations kept side by side, in one compiled loop.

The rules are those of transformers' `generate(num_beams=...)` with its default early stopping, so
that the tokens are the same: a text's score is its log-probability / (new tokens ** penalty), and a
prompt is done once its best running beam scores no better than its worst finished one. Padding is
part of no n-gram, so a padded prompt continues as it does alone.

Dimension key: B prompts  K beams  R = B*K rows  C candidates  L prompt length  S new tokens
               H history  V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lte_jax.attention import Cache
from lte_jax.generation.decoding import AT_ONCE, Decoder, DecodeState, pad_left, round_up
from lte_jax.model import init_cache

_LOW = -1e9  # added to scores that are out of the running: transformers' number


@flax.struct.dataclass
class _Beams:
    """The running and the finished texts of each prompt, best first."""

    step: Array  # int32, tokens written so far
    history_BKH: Array  # prompt and new tokens of the running texts; -1: none
    scores_BK: Array  # log-probabilities of the running texts
    done_BKS: Array  # new tokens of finished texts; -1 after the end
    done_scores_BK: Array  # log-probabilities with length penalty
    is_done_BK: Array  # whether there is a finished text in that place
    live_B: Array  # whether a running text may still beat a finished one
    finite: Array  # whether all logits so far were finite


def search(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    *,
    beams: int,
    max_new_tokens: int,
    min_new_tokens: int,
    length_penalty: float,
    no_repeat_ngram: int,
) -> tuple[list[list[int]], bool]:
    """The best text of each prompt, and whether all logits were finite; see `generate`."""
    length = round_up(max(map(len, prompts)))
    best_BS, finite = _search(
        decoder,
        *pad_left(prompts, length, length),
        jnp.int32(max_new_tokens),
        jnp.int32(min_new_tokens),
        jnp.float32(length_penalty),
        beams=beams,
        ngram=no_repeat_ngram,
        size=round_up(max_new_tokens),
    )
    return [[int(t) for t in row if t >= 0] for row in np.asarray(best_BS)], bool(finite)


@functools.partial(jax.jit, static_argnames=("beams", "ngram", "size"))
def _search(
    decoder: Decoder,
    tokens_BL,
    mask_BL,
    limit,
    least,
    penalty,
    *,
    beams: int,
    ngram: int,
    size: int,
) -> tuple[Array, Array]:
    stack = decoder.stack()
    (number, length), end = tokens_BL.shape, tokens_BL.shape[1] + ngram
    cache = init_cache(decoder.model, number, length + size)
    turn = min(length, AT_ONCE)  # both powers of two
    logits_BV, cache = decoder.read(tokens_BL, mask_BL, length, cache, turn)
    cache = _for_each_beam(cache, beams)
    logits_RV = jnp.repeat(logits_BV, beams, axis=0)
    # A suffix of n - 1 tokens is always within the history: n places stand before the prompt.
    history_BH = jnp.pad(
        jnp.where(mask_BL > 0, tokens_BL, -1), ((0, 0), (ngram, size)), constant_values=-1
    )
    low_BK = jnp.full((number, beams), _LOW, jnp.float32)
    state = _Beams(
        step=jnp.int32(0),
        history_BKH=jnp.repeat(history_BH[:, None], beams, axis=1),
        scores_BK=low_BK.at[:, 0].set(0.0),  # else all beams would write the same
        done_BKS=jnp.full((number, beams, size), -1, jnp.int32),
        done_scores_BK=low_BK,
        is_done_BK=jnp.zeros((number, beams), bool),
        live_B=jnp.ones(number, bool),
        finite=jnp.bool_(True),
    )
    grow = functools.partial(
        _grow, eos_ids=decoder.eos_ids, limit=limit, least=least, penalty=penalty, ngram=ngram,
        end=end,
    )  # fmt: skip

    def more(carry):
        state, _, _ = carry
        return (state.step < limit) & jnp.any(state.live_B) & state.finite

    def one(carry):
        state, tokens_R, cache = carry
        done_R = jnp.repeat(~state.live_B, beams)
        rows = DecodeState.start(cache, jax.random.key(0)).replace(tokens_B=tokens_R, done_B=done_R)
        logits_RV, cache, _ = decoder.step(stack, rows)
        state, tokens_R, parent_R = grow(state, logits_RV)
        return state, tokens_R, _follow(cache, parent_R, length)

    state, tokens_R, parent_R = grow(state, logits_RV)
    state, _, _ = jax.lax.while_loop(more, one, (state, tokens_R, _follow(cache, parent_R, length)))
    return state.done_BKS[:, 0], state.finite


def _grow(
    state: _Beams, logits_RV, *, eos_ids, limit, least, penalty, ngram: int, end: int
) -> tuple[_Beams, Array, Array]:
    """The texts with one more token, the tokens [R], and the row that each text continues [R]."""
    number, beams = state.scores_BK.shape
    vocabulary, size = logits_RV.shape[1], state.done_BKS.shape[2]
    finite_B = jnp.isfinite(logits_RV).reshape(number, -1).all(axis=1) | ~state.live_B
    logp_RV = _allowed(state, logits_RV, eos_ids, least, ngram, end)

    # More candidates than beams: those that end here leave enough to go on with.
    count = max(2, 1 + len(eos_ids)) * beams
    total_BKV = logp_RV.reshape(number, beams, -1) + state.scores_BK[..., None]
    scores_BC, index_BC = jax.lax.top_k(total_BKV.reshape(number, -1), count)
    parent_BC, token_BC = index_BC // vocabulary, (index_BC % vocabulary).astype(jnp.int32)
    written_BCH = _at(state.history_BKH, parent_BC).at[:, :, end + state.step].set(token_BC)
    ends_BC = jnp.broadcast_to(state.step + 1 >= limit, token_BC.shape)
    for eos in eos_ids:
        ends_BC |= token_BC == eos

    running_BC = scores_BC + jnp.where(ends_BC, _LOW, 0.0)
    running_BK, kept_BK = jax.lax.top_k(running_BC, beams)

    finishes_BC = ends_BC & (jnp.arange(count) < beams)[None]
    new_length = (state.step + 1).astype(jnp.float32)
    out_of_question_BC = (
        jnp.where(finishes_BC, 0.0, _LOW) + jnp.where(state.live_B, 0.0, _LOW)[:, None]
    )
    finished_BC = scores_BC / new_length**penalty + out_of_question_BC
    done_BK, best_BK = jax.lax.top_k(
        jnp.concatenate([state.done_scores_BK, finished_BC], axis=1), beams
    )
    texts = jnp.concatenate([state.done_BKS, written_BCH[:, :, end : end + size]], axis=1)
    is_done = jnp.concatenate([state.is_done_BK, finishes_BC], axis=1)
    is_done_BK = _at(is_done, best_BK)
    worst_B1 = jnp.min(done_BK, axis=1, keepdims=True)
    bar_BK = jnp.where(is_done_BK, worst_B1, _LOW)
    hope_BK = running_BK[:, :1] / new_length**penalty > bar_BK
    parent_BK, token_BK = _at(parent_BC, kept_BK), _at(token_BC, kept_BK)
    state = _Beams(
        step=state.step + 1,
        history_BKH=_at(written_BCH, kept_BK),
        scores_BK=running_BK,
        done_BKS=_at(texts, best_BK),
        done_scores_BK=done_BK,
        is_done_BK=is_done_BK,
        live_B=state.live_B & jnp.any(hope_BK, axis=1),
        finite=state.finite & jnp.all(finite_B),
    )
    first_B1 = beams * jnp.arange(number, dtype=jnp.int32)[:, None]
    parent_R = (parent_BK + first_B1).reshape(-1)
    return state, token_BK.reshape(-1), parent_R


def _allowed(state: _Beams, logits_RV, eos_ids, least, ngram: int, end: int) -> Array:
    """Log-probabilities [R, V] of the next token, -inf where it may not stand."""
    logp_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32))
    vocabulary = logits_RV.shape[1]
    if ngram:
        history_RH = state.history_BKH.reshape(len(logits_RV), -1)
        repeats_RV = _repeats(history_RH, end + state.step, ngram, vocabulary)
        logp_RV = jnp.where(repeats_RV, -jnp.inf, logp_RV)
    for eos in eos_ids:
        early_1V = (jnp.arange(vocabulary) == eos)[None] & (state.step < least)
        logp_RV = jnp.where(early_1V, -jnp.inf, logp_RV)
    return logp_RV


def _repeats(history_RH: Array, end, ngram: int, vocabulary: int) -> Array:
    """True at tokens [R, V] that would repeat an n-gram of the history, which ends before `end`."""
    suffix = jax.lax.dynamic_slice_in_dim(history_RH, end - (ngram - 1), ngram - 1, axis=1)
    last = history_RH[:, ngram - 1 :]  # the last token of each n-gram, by where it starts
    same = (last >= 0) & jnp.all(suffix >= 0, axis=1, keepdims=True)
    for i in range(ngram - 1):
        same &= history_RH[:, i : i + last.shape[1]] == suffix[:, i : i + 1]
    rows_R1 = jnp.arange(len(history_RH))[:, None]
    banned_RV = jnp.zeros((len(history_RH), vocabulary), bool)
    return banned_RV.at[rows_R1, jnp.where(same, last, vocabulary)].set(True, mode="drop")


def _at(values: Array, index_BK: Array) -> Array:
    """values[b, index[b, k]] for all b and k; further axes are taken along."""
    return jax.vmap(lambda row, index: row[index])(values, index_BK)


def _for_each_beam(cache: Cache, beams: int) -> Cache:
    """The cache of B prompts as one of R rows, the beams of a prompt side by side."""
    axes = {"k": 1, "v": 1, "segments": 0, "positions": 0}
    return {n: jnp.repeat(x, beams, axis=axes[n]) if n in axes else x for n, x in cache.items()}


def _follow(cache: Cache, parent_R: Array, length: int) -> dict[str, Any]:
    """The cache with each row's new tokens those of its parent; prompts of beams are the same."""
    moved = {
        name: cache[name].at[:, :, length:].set(cache[name][:, parent_R, length:])
        for name in ("k", "v")
    }
    return cache | moved
