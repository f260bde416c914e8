"""The compiled parts of generation: prefill, and the loop that decodes token by token.

Dimension key: B batch  L prompt length  E experts  N layers  V vocabulary  S new tokens
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lte_jax import layers
from lte_jax.attention import Cache
from lte_jax.model import Transformer, decode, init_cache
from lte_jax.routing import Dense, Routing, first_largest, largest

_BUCKET = 32  # numbers of tokens are rounded up to multiples of this, to compile fewer programs


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The settings that a compiled program depends on, besides shapes."""

    routing: Routing = Dense()
    implementation: str = "xla"  # of the sparse FFN
    greedy: bool = True
    top_k: int | None = None
    nucleus: bool = False  # whether top_p < 1
    eos_ids: tuple[int, ...] = ()


@flax.struct.dataclass
class SamplingParams:
    """The settings that can change without recompiling: float32 scalars."""

    threshold: Array
    temperature: Array
    top_p: Array


@flax.struct.dataclass
class DecodeState:
    """A batch during generation."""

    tokens_B: Array  # chosen last, not yet read by the model
    done_B: Array  # bool: an end-of-text token has been chosen
    step: Array  # int32, tokens chosen so far
    key: Array
    read: Array  # float32: share of experts read, mean over layers, summed over steps
    cache: Cache
    finite: Array  # bool: the logits of all tokens chosen so far were finite


def sampling_params(model, threshold=None, temperature=0.0, top_p=None) -> SamplingParams:
    """These settings as arrays. None: the model's own threshold, no top_p."""
    if threshold is None:
        threshold = 0.5 if model.lte is None else model.lte.threshold
    values = (threshold, temperature, 1.0 if top_p is None else top_p)
    return SamplingParams(*(jnp.asarray(value, jnp.float32) for value in values))


def computed(model: Transformer, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters in the types they are used in, so that no step converts them again.

    Routers are float32, all else is of the model's type; what has its type is not copied.
    """

    def convert(path, leaf):
        is_router = any(getattr(key, "key", None) == "router" for key in path)
        return jnp.asarray(leaf, jnp.float32 if is_router else model.dtype)

    return jax.tree.map_with_path(convert, params)


def round_up(count: int) -> int:
    """`count` rounded up to a multiple of the bucket."""
    return -(-count // _BUCKET) * _BUCKET


def prefill(
    model: Transformer,
    params: Mapping[str, Any],
    config: DecodeConfig,
    sampling: SamplingParams,
    prompts: Sequence[np.ndarray],
    *,
    room: int,
    seed: int = 0,
) -> DecodeState:
    """The state after reading the prompts and choosing the first new token of each.

    `room` is the number of new tokens that the cache has place for.
    """
    length = round_up(max(len(prompt) for prompt in prompts))
    tokens_BL = np.zeros((len(prompts), length), np.int32)
    token_mask_BL = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, length - len(prompt) :] = prompt
        token_mask_BL[row, length - len(prompt) :] = 1
    return _prefill(
        model,
        params,
        config,
        sampling,
        tokens_BL,
        token_mask_BL,
        round_up(room),
        jax.random.key(seed),
    )


@functools.partial(jax.jit, static_argnames=("model", "config", "room"))
def _prefill(
    model,
    params,
    config: DecodeConfig,
    sampling: SamplingParams,
    tokens_BL,
    token_mask_BL,
    room: int,
    key,
) -> DecodeState:
    batch, length = tokens_BL.shape
    out = model.apply(
        {"params": params},
        tokens_BL,
        routing=config.routing,
        mask=token_mask_BL,
        threshold=sampling.threshold,
        cache=init_cache(model, batch, length + room),
    )
    zeros_B = jnp.zeros(batch, jnp.int32)
    zero = jnp.zeros((), jnp.float32)
    state = DecodeState(
        zeros_B, zeros_B > 0, jnp.zeros((), jnp.int32), key, zero, out.cache, jnp.ones((), bool)
    )
    return _choose(config, sampling, state, out.logits[:, -1], out.cache)


@functools.partial(jax.jit, static_argnames=("model", "config", "size"))
def extend(
    model: Transformer,
    params: Mapping[str, Any],
    config: DecodeConfig,
    sampling: SamplingParams,
    state: DecodeState,
    limit: Array,
    size: int,
) -> tuple[Array, DecodeState]:
    """Up to `limit` more tokens of each row, at most `size`; stops early once all rows are done.

    Returns:
      tokens_BS: int32 [B, size]; -1 after a row's end and beyond `limit`.
      the state after them.
    """
    stack = stack_for(model, params, config.routing)

    def more(carry):
        i, state, _ = carry
        return (i < jnp.minimum(limit, size)) & ~jnp.all(state.done_B) & state.finite

    def one(carry):
        i, before, tokens_BS = carry
        logits_BV, cache, read = decode_step(model, params, stack, config, sampling, before)
        state = _choose(config, sampling, before, logits_BV, cache)
        state = state.replace(read=state.read + read)
        chosen_B = jnp.where(before.done_B, -1, state.tokens_B)
        return i + 1, state, tokens_BS.at[:, i].set(chosen_B)

    tokens_BS = jnp.full((state.tokens_B.size, size), -1, jnp.int32)
    _, state, tokens_BS = jax.lax.while_loop(more, one, (jnp.int32(0), state, tokens_BS))
    return tokens_BS, state


def decode_step(
    model: Transformer,
    params: Mapping[str, Any],
    stack: Any,
    config: DecodeConfig,
    sampling: SamplingParams,
    state: DecodeState,
) -> tuple[Array, Cache, Array]:
    """Logits [B, V] after `state.tokens_B`, the cache with that token, the share of experts read.

    `stack` is from `stack_for`; if it is None, all experts are read.
    """
    if stack is None:
        out = model.apply(
            {"params": params},
            state.tokens_B[:, None],
            routing=config.routing,
            threshold=sampling.threshold,
            cache=state.cache,
        )
        return out.logits[:, 0], out.cache, jnp.ones((), jnp.float32)
    live_B = ~state.done_B
    out = decode(
        model,
        stack,
        state.tokens_B,
        state.cache,
        routing=config.routing,
        threshold=sampling.threshold,
        live_B=live_B,
        implementation=config.implementation,
    )
    if out.active is None:
        return out.logits[:, 0], out.cache, jnp.any(live_B).astype(jnp.float32)
    used_NE = jnp.any(out.active[:, :, 0] & live_B[None, :, None], axis=1)
    return out.logits[:, 0], out.cache, jnp.mean(used_NE, dtype=jnp.float32)


def stack_for(model: Transformer, params: Mapping[str, Any], routing: Routing) -> Any:
    """The parameters for `decode`; None for a routing that the kernels do not support."""
    if not routing.skips or routing.reads_neurons:
        return None
    return layers.stacked(model.config, params, jnp.dtype(model.dtype))


def _choose(
    config: DecodeConfig,
    sampling: SamplingParams,
    state: DecodeState,
    logits_BV: Array,
    cache: Cache,
) -> DecodeState:
    """The state with each row's next token chosen; rows that are done stay as they are."""
    if config.greedy:
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        rows = jnp.arange(logits_BV.shape[0])
        keys_B = jax.vmap(
            lambda b: jax.random.fold_in(jax.random.fold_in(state.key, b), state.step)
        )(rows)
        allowed_BV = allowed_logits(config, sampling, logits_BV)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, allowed_BV).astype(jnp.int32)
    tokens_B = jnp.where(state.done_B, state.tokens_B, tokens_B)
    finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1) | state.done_B
    finite, done_B = state.finite & jnp.all(finite_B), state.done_B
    for eos in config.eos_ids:
        done_B |= tokens_B == eos
    return DecodeState(tokens_B, done_B, state.step + 1, state.key, state.read, cache, finite)


def allowed_logits(config: DecodeConfig, sampling: SamplingParams, logits_BV: Array) -> Array:
    """Logits over temperature, -inf at tokens that top_k and then top_p exclude.

    Of equally likely tokens, those of lowest id stay.
    """
    logits_BV = logits_BV / sampling.temperature
    if config.top_k is not None and config.top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(largest(logits_BV, config.top_k), logits_BV, -jnp.inf)
    if config.nucleus:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # mass of all likelier tokens
        count_B1 = jnp.sum(before_BV < sampling.top_p, axis=-1, keepdims=True, dtype=jnp.int32)
        count_B1 = jnp.maximum(count_B1, 1)  # a tiny top_p is 0 in float32
        least_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
        kept_BV = first_largest(logits_BV, least_B1, count_B1)
        logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    return logits_BV
