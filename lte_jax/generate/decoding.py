"""What generation compiles: reading the prompts, and the loop that decodes token by token.

Dimension key: B batch  L prompt length  D model width  E experts  M neurons per expert  F = E*M
               N layers  V vocabulary  S new tokens
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lte_jax import kernels
from lte_jax.config import ModelConfig, Routing, top_k
from lte_jax.model import (
    Cache,
    RMSNorm,
    Transformer,
    init_cache,
    make_context,
    rotate,
    sliding_layers,
    visible_keys,
)
from lte_jax.moe import active_experts, first_largest, largest

_BUCKET = 32  # prompts and new tokens are rounded up to multiples of this: fewer compiled programs
_DENSE_ROWS = 32  # a dense FFN is read in blocks of at most so many neurons


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
    read: Array  # float32: share of experts used by the batch, mean of layers, summed over steps
    cache: Cache
    finite: Array  # bool: so were the logits of all tokens chosen


def make_knobs(model, threshold=None, temperature=0.0, top_p=None) -> Knobs:
    """Knobs as arrays; what is None is the model's own, or off."""
    if threshold is None:
        threshold = 0.5 if model.lte is None else model.lte.threshold
    values = (threshold, temperature, 1.0 if top_p is None else top_p)
    return Knobs(*(jnp.asarray(value, jnp.float32) for value in values))


def computed(model: Transformer, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters in the types they are used in: what every step would else convert anew.

    Those that have their type already are not copied. Routers are float32, all else is the
    model's.
    """

    def convert(path, leaf):
        is_router = any(getattr(key, "key", None) == "router" for key in path)
        return jnp.asarray(leaf, jnp.float32 if is_router else model.dtype)

    return jax.tree.map_with_path(convert, params)


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
    zero = jnp.zeros((), jnp.float32)
    state = State(
        zeros_B, zeros_B > 0, jnp.zeros((), jnp.int32), key, zero, out.cache, jnp.ones((), bool)
    )
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
    stacked = large_params(model, params, plan.routing)

    def more(carry):
        i, state, _ = carry
        return (i < jnp.minimum(limit, size)) & ~jnp.all(state.done_B) & state.finite

    def one(carry):
        i, before, tokens_BS = carry
        logits_BV, cache, read = decode_step(model, params, stacked, plan, knobs, before)
        state = _choose(plan, knobs, before, logits_BV, cache)
        state = state.replace(read=state.read + read)
        chosen_B = jnp.where(before.done_B, -1, state.tokens_B)
        return i + 1, state, tokens_BS.at[:, i].set(chosen_B)

    tokens_BS = jnp.full((state.tokens_B.size, size), -1, jnp.int32)
    _, state, tokens_BS = jax.lax.while_loop(more, one, (jnp.int32(0), state, tokens_BS))
    return tokens_BS, state


def decode_step(
    model: Transformer,
    params: Mapping[str, Any],
    stacked: Mapping[str, Any] | None,
    plan: Plan,
    knobs: Knobs,
    state: State,
) -> tuple[Array, Cache, Array]:
    """Logits [B, V] after `state.tokens_B`, the cache with that token, the share of experts read.

    The same function as `model.apply` with the cache, but for how weights are read: through the
    door, with all layers stacked (`stacked`, from large_params) and the layer as an index. A scan
    that sliced them layer by layer would copy them, idle experts too.
    """
    tokens_B1 = state.tokens_B[:, None]
    if stacked is None:
        out = model.apply(
            {"params": params},
            tokens_B1,
            routing=plan.routing,
            threshold=knobs.threshold,
            cache=state.cache,
        )
        return out.logits[:, 0], out.cache, jnp.ones((), jnp.float32)
    config, dtype = model.config, jnp.dtype(model.dtype)
    context = make_context(config, jnp.ones_like(tokens_B1), knobs.threshold, state.cache)

    def layer(carry, scanned):
        x_BD, k_NBTKC, v_NBTKC = carry
        small, slides, index = scanned
        linear = _linear(plan, stacked, small, index, dtype)
        visible_BT = visible_keys(config, slides, context)[:, 0]
        h_BD = _norm(config, x_BD, small["attn_norm"])
        q_BHC, k_BKC, v_BKC = _heads(config, linear, small["attn"], h_BD, context["angles_BLC"])
        y_BHC, k_NBTKC, v_NBTKC = kernels.attend(
            *(q_BHC, k_BKC, v_BKC, k_NBTKC, v_NBTKC, visible_BT),
            layer=index,
            index=context["index"],
            implementation=plan.implementation,
        )
        x_BD += linear("o", y_BHC.reshape(x_BD.shape[0], -1))

        h_BD = _norm(config, x_BD, small["ffn_norm"])
        active_BE = _active(model, plan, knobs, stacked, small, index, h_BD)
        active_BE &= ~state.done_B[:, None]
        x_BD += kernels.sparse_ffn(
            h_BD,
            active_BE,
            stacked["ffn"],
            activation=config.activation,
            layer=index,
            implementation=plan.implementation,
        )
        if config.mlp_bias:
            x_BD += small["down_bias"].astype(dtype)[None]
        read = jnp.mean(jnp.any(active_BE, axis=0), dtype=jnp.float32)
        return (x_BD, k_NBTKC, v_NBTKC), read

    table_VD = params["embed"]["embedding"]
    x_BD = kernels.embed(state.tokens_B, table_VD, implementation=plan.implementation)
    slides_N = jnp.asarray(sliding_layers(config))
    indices_N = jnp.arange(config.num_layers, dtype=jnp.int32)
    (x_BD, k, v), read_N = jax.lax.scan(
        layer,
        (x_BD.astype(dtype), state.cache["k"], state.cache["v"]),
        (small_params(params["layers"]), slides_N, indices_N),
    )
    logits_BV = kernels.linear(
        _norm(config, x_BD, params["final_norm"]),
        stacked["head"],
        transposed=config.tie_embeddings,
        implementation=plan.implementation,
    )
    cache = {"k": k, "v": v, "index": state.cache["index"] + 1}
    cache |= {"segments": context["segments_BT"], "positions": context["positions_BT"]}
    return logits_BV, cache, jnp.mean(read_N)


def _norm(config: ModelConfig, x: Array, params: Mapping[str, Array]) -> Any:
    return RMSNorm(config.norm_eps, x.dtype).apply({"params": params}, x)


def _linear(plan: Plan, stacked, small, index: Array, dtype) -> Callable[[str, Array], Array]:
    """The product with an attention matrix of this layer, by its name, and its bias."""

    def linear(name: str, x_BK: Array) -> Array:
        w_NKO, bias = stacked["attn"][name], small["attn"].get(name, {}).get("bias")
        y_BO = kernels.linear(x_BK, w_NKO, layer=index, implementation=plan.implementation)
        y_BO = y_BO.astype(dtype)
        return y_BO if bias is None else y_BO + bias.astype(dtype).reshape(1, -1)

    return linear


def _heads(config: ModelConfig, linear, small, x_BD: Array, angles_B1C: Array) -> list[Array]:
    """Query, key and value heads of the new tokens: [B, H, C] and twice [B, K, C]."""
    heads = []
    for name in "qkv":
        count = config.num_heads if name == "q" else config.num_kv_heads
        x_B1HC = linear(name, x_BD).reshape(x_BD.shape[0], 1, count, config.head_dim)
        if config.qk_norm and name != "v":
            x_B1HC = _norm(config, x_B1HC, small[f"{name}_norm"])
        heads.append((x_B1HC if name == "v" else rotate(x_B1HC, angles_B1C))[:, 0])
    return heads


def _active(model, plan: Plan, knobs: Knobs, stacked, small, index: Array, h_BD: Array) -> Array:
    """The experts that each row uses, bool [B, E]: all blocks of a dense FFN."""
    if plan.routing == "dense":
        return jnp.ones((h_BD.shape[0], stacked["ffn"]["up"].shape[1]), bool)
    logits_BE = kernels.linear(
        h_BD.astype(jnp.float32),
        stacked["router"],
        layer=index,
        implementation=plan.implementation,
    )
    if "router_bias" in small:
        logits_BE += small["router_bias"].astype(jnp.float32)[None]
    kept = top_k(model.config, model.lte, plan.routing)
    return active_experts(jax.nn.sigmoid(logits_BE), knobs.threshold, kept)


def small_params(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The vectors among the layers' parameters, which a scan may slice: norms and biases."""
    ffn = layers["ffn"]
    small = {name: layers[name] for name in ("attn_norm", "ffn_norm")}
    small["attn"] = {
        name: {k: v for k, v in part.items() if k != "kernel"}
        for name, part in layers["attn"].items()
    }
    if "down_bias" in ffn:
        small["down_bias"] = ffn["down_bias"]
    if "bias" in ffn.get("router", {}):
        small["router_bias"] = ffn["router"]["bias"]
    return small


def large_params(
    model: Transformer, params: Mapping[str, Any], routing: Routing
) -> dict[str, Any] | None:
    """The matrices as the door wants them, all layers stacked; None if it has no such routing.

    Returns:
      attn: q, k, v, o [N, inputs, outputs]; ffn: gate, up, down [N, E, M, D] and biases; router
      [N, D, E], float32; head [D, V], or the embedding [V, D] where it is the head too.

    A dense FFN is cut into blocks, all of them active: work for every thread of a CPU and every
    multiprocessor of a GPU.
    """
    if routing == "soft":
        return None
    config, dtype = model.config, jnp.dtype(model.dtype)
    layers = params["layers"]
    attn = {name: layers["attn"][name]["kernel"].astype(dtype) for name in "qkvo"}
    inputs = {"q": config.d_model, "k": config.d_model, "v": config.d_model}
    attn = {
        name: w.reshape(w.shape[0], inputs.get(name, config.num_heads * config.head_dim), -1)
        for name, w in attn.items()
    }
    names = ("gate", "up", "down", "gate_bias", "up_bias")
    ffn = {name: w.astype(dtype) for name, w in layers["ffn"].items() if name in names}
    tied = config.tie_embeddings
    head = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
    stacked = {"attn": attn, "ffn": ffn, "head": head.astype(dtype)}
    if routing == "dense":
        rows = max(m for m in range(1, min(_DENSE_ROWS, config.d_ff) + 1) if config.d_ff % m == 0)
        blocks = config.d_ff // rows
        stacked["ffn"] = {
            name: w.reshape(w.shape[0], blocks, rows, *w.shape[3:]) for name, w in ffn.items()
        }
    else:
        stacked["router"] = layers["ffn"]["router"]["kernel"].astype(jnp.float32)
    return stacked


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
    finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1) | state.done_B
    finite, done_B = state.finite & jnp.all(finite_B), state.done_B
    for eos in plan.eos_ids:
        done_B |= tokens_B == eos
    return State(tokens_B, done_B, state.step + 1, state.key, state.read, cache, finite)


def allowed_logits(plan: Plan, knobs: Knobs, logits_BV: Array) -> Array:
    """Logits over temperature, -inf at tokens that top_k and then top_p exclude.

    Of equally likely tokens, those of lowest id stay.
    """
    logits_BV = logits_BV / knobs.temperature
    if plan.top_k is not None and plan.top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(largest(logits_BV, plan.top_k), logits_BV, -jnp.inf)
    if plan.nucleus:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # mass of all likelier tokens
        count_B1 = jnp.sum(before_BV < knobs.top_p, axis=-1, keepdims=True, dtype=jnp.int32)
        count_B1 = jnp.maximum(count_B1, 1)  # a tiny top_p is 0 in float32
        least_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
        kept_BV = first_largest(logits_BV, least_B1, count_B1)
        logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    return logits_BV
