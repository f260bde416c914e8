"""What generation compiles: reading the prompts, and the loop that decodes token by token.

Dimension key: B batch  L prompt length  D model width  E experts  M neurons per expert  F = E*M
               N layers  V vocabulary  S new tokens
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lte_jax.config import Routing, top_k
from lte_jax.kernels import sparse_ffn
from lte_jax.model import (
    Block,
    Cache,
    RMSNorm,
    Transformer,
    init_cache,
    make_context,
    sliding_layers,
)
from lte_jax.moe import active_experts, router_logits

_BUCKET = 32  # prompts and new tokens are rounded up to multiples of this: fewer compiled programs
_DENSE_ROWS = 256  # a dense FFN is read in blocks of at most so many neurons on a CPU


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled program depends on besides shapes."""

    routing: Routing = "dense"
    implementation: str = "xla"  # of the sparse FFN
    greedy: bool = True
    top_k: int | None = None
    nucleus: bool = False  # whether top_p < 1
    eos_ids: tuple[int, ...] = ()


@flax.struct.dataclass
class Knobs:
    """What may change without compiling anew; scalars, float32."""

    threshold: Array
    temperature: Array
    top_p: Array


@flax.struct.dataclass
class State:
    """A batch in the midst of generation."""

    tokens_B: Array  # chosen last, not yet read by the model
    done_B: Array  # bool: an end-of-text token has been chosen
    step: Array  # int32, tokens chosen so far
    key: Array
    cache: Cache


def make_knobs(model, threshold=None, temperature=0.0, top_p=None) -> Knobs:
    """Knobs as arrays; what is None is the model's own, or off."""
    if threshold is None:
        threshold = 0.5 if model.lte is None else model.lte.threshold
    values = (threshold, temperature, 1.0 if top_p is None else top_p)
    return Knobs(*(jnp.asarray(value, jnp.float32) for value in values))


def round_up(count: int) -> int:
    """To the next multiple of the bucket."""
    return -(-count // _BUCKET) * _BUCKET


def prefill(
    model: Transformer,
    params: Mapping[str, Any],
    plan: Plan,
    knobs: Knobs,
    prompts: Sequence[np.ndarray],
    *,
    room: int,
    seed: int = 0,
) -> State:
    """The state after reading the prompts and choosing the first new token of each.

    `room` is the number of new tokens that the cache shall have place for.
    """
    length = round_up(max(len(prompt) for prompt in prompts))
    tokens_BL = np.zeros((len(prompts), length), np.int32)
    real_BL = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, length - len(prompt) :] = prompt
        real_BL[row, length - len(prompt) :] = 1
    return _prefill(
        model, params, plan, knobs, tokens_BL, real_BL, round_up(room), jax.random.key(seed)
    )


@functools.partial(jax.jit, static_argnames=("model", "plan", "room"))
def _prefill(model, params, plan: Plan, knobs: Knobs, tokens_BL, real_BL, room: int, key) -> State:
    batch, length = tokens_BL.shape
    out = model.apply(
        {"params": params},
        tokens_BL,
        routing=plan.routing,
        mask=real_BL,
        threshold=knobs.threshold,
        cache=init_cache(model, batch, length + room),
    )
    zeros_B = jnp.zeros(batch, jnp.int32)
    state = State(zeros_B, zeros_B > 0, jnp.zeros((), jnp.int32), key, out.cache)
    return _choose(plan, knobs, state, out.logits[:, -1], out.cache)


@functools.partial(jax.jit, static_argnames=("model", "plan", "size"))
def extend(
    model: Transformer,
    params: Mapping[str, Any],
    plan: Plan,
    knobs: Knobs,
    state: State,
    limit: Array,
    size: int,
) -> tuple[Array, State]:
    """Up to `limit` more tokens of each row, at most `size`; stops early once all rows are done.

    Returns:
      tokens_BS: int32 [B, size]; -1 where a row had ended, and beyond what was asked for.
      the state after them.
    """
    experts = expert_weights(model, params, plan.routing)

    def more(carry):
        i, state, _ = carry
        return (i < jnp.minimum(limit, size)) & ~jnp.all(state.done_B)

    def one(carry):
        i, before, tokens_BS = carry
        logits_BV, cache = decode_step(model, params, experts, plan, knobs, before)
        state = _choose(plan, knobs, before, logits_BV, cache)
        chosen_B = jnp.where(before.done_B, -1, state.tokens_B)
        return i + 1, state, tokens_BS.at[:, i].set(chosen_B)

    tokens_BS = jnp.full((state.tokens_B.size, size), -1, jnp.int32)
    _, state, tokens_BS = jax.lax.while_loop(more, one, (jnp.int32(0), state, tokens_BS))
    return tokens_BS, state


def decode_step(
    model: Transformer,
    params: Mapping[str, Any],
    experts: Mapping[str, Array] | None,
    plan: Plan,
    knobs: Knobs,
    state: State,
) -> tuple[Array, Cache]:
    """Logits [B, V] of the token after `state.tokens_B`, and the cache with that token in it.

    The same function as `model.apply` with the cache, but for where FFN weights are read: a scan
    over layers that would slice them layer by layer would copy all experts, idle ones too.
    """
    tokens_B1 = state.tokens_B[:, None]
    if experts is None:
        out = model.apply(
            {"params": params},
            tokens_B1,
            routing=plan.routing,
            threshold=knobs.threshold,
            cache=state.cache,
        )
        return out.logits[:, 0], out.cache
    config, dtype = model.config, jnp.dtype(model.dtype)
    block = Block(config, model.lte, plan.routing, dtype)
    norm = RMSNorm(config.norm_eps, dtype)
    context = make_context(config, jnp.ones_like(tokens_B1), knobs.threshold, state.cache)

    def layer(x_BLD, scanned):
        p, cache, slides, index = scanned
        x_BLD, cache = block.apply(
            {"params": p}, x_BLD, cache, slides, context, method=Block.attend
        )
        h_BD = norm.apply({"params": p["ffn_norm"]}, x_BLD)[:, 0]  # pyright: ignore[reportCallIssue]
        active_BE = jnp.broadcast_to(
            ~state.done_B[:, None], (h_BD.shape[0], experts["up"].shape[1])
        )
        if plan.routing != "dense":
            scores_BE = jax.nn.sigmoid(router_logits(p["ffn"]["router"], h_BD))
            kept = top_k(config, model.lte, plan.routing)
            active_BE &= active_experts(scores_BE, knobs.threshold, kept)
        y_BD = sparse_ffn(
            h_BD,
            active_BE,
            experts,
            activation=config.activation,
            layer=index,
            implementation=plan.implementation,
        )
        if config.mlp_bias:
            y_BD += p["ffn"]["down_bias"].astype(dtype)[None]
        return x_BLD + y_BD[:, None], cache

    embed = nn.Embed(config.vocab_size, config.d_model, dtype=dtype)
    x_BLD = embed.apply({"params": params["embed"]}, tokens_B1)
    layers = params["layers"]
    small = {key: value for key, value in layers.items() if key != "ffn"}
    small["ffn"] = {k: v for k, v in layers["ffn"].items() if k in ("router", "down_bias")}
    kv = {"k": state.cache["k"], "v": state.cache["v"]}
    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    x_BLD, kv = jax.lax.scan(
        layer, x_BLD, (small, kv, jnp.asarray(sliding_layers(config)), indices)
    )
    x_BD = norm.apply({"params": params["final_norm"]}, x_BLD)[:, 0]  # pyright: ignore[reportCallIssue]
    tied = config.tie_embeddings
    head_DV = params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"]
    logits_BV = jnp.einsum(
        "BD,DV->BV", x_BD, head_DV.astype(dtype), preferred_element_type=jnp.float32
    )
    index = state.cache["index"] + 1
    return logits_BV, kv | {"segments": context["segments_BT"], "index": index}


def expert_weights(
    model: Transformer, params: Mapping[str, Any], routing: Routing
) -> dict[str, Array] | None:
    """FFN weights as the door wants them, [N, E, M, D]; None where it cannot serve the routing.

    A dense FFN is cut into blocks, all of them active: a block is sliced and multiplied while it
    is in the CPU's cache, where whole layers would be copied first.
    """
    if routing == "soft":
        return None
    names = ("gate", "up", "down", "gate_bias", "up_bias")
    dtype = jnp.dtype(model.dtype)
    weights = {k: w.astype(dtype) for k, w in params["layers"]["ffn"].items() if k in names}
    if routing != "dense":
        return weights
    width = model.config.d_ff
    most = _DENSE_ROWS if jax.default_backend() == "cpu" else width
    rows = max(m for m in range(1, min(most, width) + 1) if width % m == 0)
    return {k: w.reshape(w.shape[0], width // rows, rows, *w.shape[3:]) for k, w in weights.items()}


def _choose(plan: Plan, knobs: Knobs, state: State, logits_BV: Array, cache: Cache) -> State:
    """The state with the next token of each row chosen; rows that were done stay as they are."""
    if plan.greedy:
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        rows = jnp.arange(logits_BV.shape[0])
        keys_B = jax.vmap(
            lambda b: jax.random.fold_in(jax.random.fold_in(state.key, b), state.step)
        )(rows)
        allowed_BV = allowed_logits(plan, knobs, logits_BV)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, allowed_BV).astype(jnp.int32)
    tokens_B = jnp.where(state.done_B, state.tokens_B, tokens_B)
    done_B = state.done_B
    for eos in plan.eos_ids:
        done_B |= tokens_B == eos
    return State(tokens_B, done_B, state.step + 1, state.key, cache)


def allowed_logits(plan: Plan, knobs: Knobs, logits_BV: Array) -> Array:
    """Logits over temperature, -inf at tokens that top_k and then top_p exclude."""
    logits_BV = logits_BV / knobs.temperature
    if plan.top_k is not None and plan.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, plan.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if plan.nucleus:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # mass of all likelier tokens
        least_B1 = jnp.min(
            jnp.where(before_BV < knobs.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
        )
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV
