"""The arithmetic of a Transformer, written once: training, prefill and decoding are the same code.

Blocks of attention and an FFN that is dense or made of routed experts; their differences between
families are keys of ModelConfig. `w` says how weights are read, see reading.py.

Dimension key: B batch  L length  T cache length  D model width  E experts  M neurons per expert
               N layers  H heads  K kv heads  C head width  V vocabulary
               S texts of a row  Y classes
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from lte_jax import sharding
from lte_jax.attention import (
    Cache,
    make_context,
    per_layer,
    rotate,
    rotation,
    visible_keys,
)
from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.kernels.reference import ACTIVATIONS
from lte_jax.losses import layer_means, tokens_of_texts
from lte_jax.reading import Slice, Stack, Weights
from lte_jax.selection import Choice, Routing, View, as_last


@flax.struct.dataclass
class Output:
    """What a forward pass returns; what is not used is not computed under `jax.jit`."""

    # Float32: of tokens [B, L, V], of classes [B, Y], or of several texts' classes [B, S, Y]. None
    # without a head.
    logits: Float[Array, "B ..."] | None
    scores: Float[Array, "N B L E"] | None  # router scores, float32; None under dense routing
    # Those that run, or the shares of parts that do (`selection.Choice`); None under dense routing.
    active: Bool[Array, "N B L E"] | Float[Array, "N B L P"] | None
    sparsity: Float[Array, ""]  # share of (real token, layer, expert) that is not active
    cache: Cache | None  # the extended cache, where one was given
    hidden: Float[Array, "B L D"]  # what the head reads


def transformer(
    config: ModelConfig,
    w: Slice | Stack,
    blocks: Callable,
    tokens_BL: Integer[Array | np.ndarray, "B L"],
    types_BL: Integer[Array | np.ndarray, "B L"] | None,
    segments_BL: Int[Array, "B L"],
    threshold: Float[Array, "*N"],
    cache: Cache | None,
    texts: int | None = None,
) -> Output:
    """Embedding, layers, last norm and head.

    Args:
      config: of the model.
      w: reads the weights outside the layers.
      blocks: runs the layers: (x, kv, own, context) -> (x, (kv, (scores, active))), where kv is
        the keys and values of the cache, or None, and own what `per_layer` returns, and thresholds.
      tokens_BL: token ids.
      types_BL: token types, of models that have them; None: all 0.
      segments_BL: > 0 at real tokens; see `make_context`.
      threshold: of the routing, or of each layer's.
      cache: to be extended, or None.
      texts: S, of each row, to classify; None: one, and the logits have no such axis.
    """
    context = make_context(config, segments_BL, cache)
    with jax.named_scope("embed"):
        x_BLD = sharding.constrain(embed(config, w, tokens_BL, types_BL, context))
    kv = None if cache is None else (cache["k"], cache["v"])
    own = jax.tree.map(jnp.asarray, per_layer(config))
    own["threshold"] = jnp.broadcast_to(threshold, config.num_layers)
    x_BLD, (kv, (scores_NBLE, active_NBLE)) = blocks(x_BLD, kv, own, context)
    with jax.named_scope("head"):
        hidden_BLD = x_BLD
        if "final_norm" in w.vectors:
            hidden_BLD = norm(config, w.vectors["final_norm"], x_BLD)
        logits = head(config, w, hidden_BLD, segments_BL, texts)
    if cache is not None and kv is not None:
        cache = {
            "k": kv[0],
            "v": kv[1],
            "segments": context["segments_BT"],
            "positions": context["positions_BT"],
            "index": cache["index"] + tokens_BL.shape[1],
        }
    sparsity = jnp.zeros((), jnp.float32)
    if active_NBLE is not None:
        sparsity = 1.0 - jnp.mean(layer_means(active_NBLE, segments_BL > 0))
    return Output(logits, scores_NBLE, active_NBLE, sparsity, cache, hidden_BLD)


def embed(config: ModelConfig, w: Slice | Stack, tokens_BL, types_BL, context) -> Array:
    """The sum of a token's embedding and those of its position and type, x [B, L, D]."""
    x_BLD = w.embed("embedding", tokens_BL)
    if config.embed_scale != 1:
        x_BLD *= jnp.asarray(config.embed_scale, x_BLD.dtype)
    if config.positions == "learned":  # padding may be longer than the table
        positions_BL = jnp.minimum(context["positions_BL"], config.max_length - 1)
        x_BLD += w.embed("positions", positions_BL + config.position_offset)
    if config.token_types:
        x_BLD += w.embed("types", jnp.zeros_like(tokens_BL) if types_BL is None else types_BL)
    if config.embed_norm:
        x_BLD = norm(config, w.vectors["embed"]["norm"], x_BLD)
    return w.drop(x_BLD)


def head(config: ModelConfig, w: Slice | Stack, x_BLD, segments_BL, texts: int | None):
    """Logits, float32: [B, L, V] of tokens, [B, (S,) Y] of classes, or None without a head."""
    if config.head == "masked_lm":
        x_BLD = ACTIVATIONS[config.activation](w.linear("transform", x_BLD))
        x_BLD = norm(config, w.vectors["transform"]["norm"], x_BLD)
    if "lm" in config.head:
        logits_BLV = w.head(x_BLD)
        return logits_BLV if config.logits_divisor == 1 else logits_BLV / config.logits_divisor
    if config.head == "none":
        return None
    own_BSL = tokens_of_texts(segments_BL, texts) if texts else (segments_BL > 0)[:, None]
    read_BSD = w.drop(pooled(config, w, x_BLD, own_BSL))
    logits_BSY = w.linear("classifier", read_BSD, exact=True)
    return logits_BSY if texts else logits_BSY[:, 0]


def pooled(config: ModelConfig, w: Slice | Stack, x_BLD: Array, own_BSL: Array) -> Array:
    """What a head reads of each text, [B, S, D]; `own` is True at its tokens."""
    x_BSD = pool(config, x_BLD, own_BSL)
    act = {"tanh": jnp.tanh, "relu": jax.nn.relu}[config.pooler_activation]
    return act(w.linear("pooler", x_BSD)) if config.pooler else x_BSD


def pool(config: ModelConfig, x_BLD: Array, own_BSL: Array) -> Array:
    """What stands for each text, [B, S, D]: its first token (of a decoder: its last) or the mean.

    `own` is True at the tokens of a text.
    """
    if config.pooling == "mean":
        own_BSL = own_BSL.astype(jnp.float32)
        weights_BSL = own_BSL / jnp.maximum(jnp.sum(own_BSL, axis=2, keepdims=True), 1)
        return jnp.einsum("bsl,bld->bsd", weights_BSL.astype(x_BLD.dtype), x_BLD)
    last_BS = own_BSL.shape[2] - 1 - jnp.argmax(own_BSL[..., ::-1], axis=2)
    place_BS = last_BS if config.causal else jnp.argmax(own_BSL, axis=2)
    return jnp.take_along_axis(x_BLD, place_BS[..., None], axis=1)


def block(config: ModelConfig, w: Slice | Stack, ffn: Callable, x_BLD, kv, own, context):
    """One layer: attention and FFN, each with norms and a residual connection.

    `ffn` is (x, threshold) -> (y, scores, active). Returns x, (k, v), and what `ffn` says of the
    experts.
    """
    place = config.norm_place

    def residual(name: str, x_BLD, part: Callable, read_BLD):
        """x plus what `part` makes of `read`, with norms around, and what else `part` returns."""
        first = functools.partial(norm, config, w.vectors[f"{name}_norm"])
        y_BLD, *others = part(first(read_BLD) if place in ("pre", "sandwich") else read_BLD)
        if place == "output":
            y_BLD = first(y_BLD)
        if place == "sandwich":
            y_BLD = norm(config, w.vectors[f"{name}_post_norm"], y_BLD)
        if config.residual_scale != 1:
            y_BLD *= jnp.asarray(config.residual_scale, y_BLD.dtype)
        x_BLD = x_BLD + w.drop(y_BLD)
        return sharding.constrain(first(x_BLD) if place == "post" else x_BLD), others

    with jax.named_scope("attention"):
        attend = functools.partial(attention, config, w.at("attn"), kv=kv, own=own, context=context)
        y_BLD, (kv,) = residual("attn", x_BLD, attend, x_BLD)
    with jax.named_scope("ffn"):
        read_BLD = x_BLD if config.parallel else y_BLD
        y_BLD, outputs = residual(
            "ffn", y_BLD, lambda h_BLD: ffn(h_BLD, own["threshold"]), read_BLD
        )
    return y_BLD, kv, tuple(outputs)


def norm(config: ModelConfig, weights: Weights, x: Array) -> Array:
    """RMSNorm or LayerNorm over the last dimension, computed in float32; of x's type."""
    y = x.astype(jnp.float32)
    if config.norm == "layer":
        y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    if config.norm_offset:  # in float32: 1 + a small number
        y = (y * (1 + as_last(weights["scale"], y))).astype(x.dtype)
    else:
        y = y.astype(x.dtype) * as_last(weights["scale"], x)
    return y + as_last(weights["bias"], x) if "bias" in weights else y


def _norm_of_heads(config: ModelConfig, weights: Weights, x_BLHC: Array) -> Array:
    """One norm over the outputs of all heads."""
    flat = {name: vector_HC.reshape(-1) for name, vector_HC in weights.items()}
    return norm(config, flat, x_BLHC.reshape(*x_BLHC.shape[:2], -1)).reshape(x_BLHC.shape)


def attention(config: ModelConfig, w: Slice | Stack, x_BLD, kv, own, context):
    """Grouped-query attention, with rotary positions if any: y [B, L, D], and (k, v) extended."""
    w.tap("qkv_reads", x_BLD)
    q_BLHC, k_BLKC, v_BLKC = w.linears("qkv", x_BLD)
    if "q_norm" in w.vectors:
        q_BLHC = norm(config, w.vectors["q_norm"], q_BLHC)
        k_BLKC = norm(config, w.vectors["k_norm"], k_BLKC)
    if "q_full_norm" in w.vectors:
        q_BLHC = _norm_of_heads(config, w.vectors["q_full_norm"], q_BLHC)
        k_BLKC = _norm_of_heads(config, w.vectors["k_full_norm"], k_BLKC)
    if config.positions == "rope":
        turns = rotation(config, own, context)
        q_BLHC, k_BLKC = rotate(q_BLHC, turns), rotate(k_BLKC, turns)
    if config.attention_scale is not None:  # attention itself divides by the root of C
        gain = config.attention_scale * math.sqrt(config.head_dim)
        q_BLHC *= jnp.asarray(gain, q_BLHC.dtype)
    visible_BLT = visible_keys(config, own["slides"], context)
    index, causal = context["index"], config.causal
    y_BLHC, kv = w.attend(q_BLHC, k_BLKC, v_BLKC, kv, visible_BLT, index, causal=causal)
    w.tap("o_reads", y_BLHC)
    return w.linear("o", y_BLHC), kv


def ffn(
    config: ModelConfig,
    lte: LTEConfig | None,
    routing: Routing,
    w: Slice | Stack,
    x_BLD: Float[Array, "B L D"],
    threshold: Float[Array, ""] | float,
) -> tuple[Array, Float[Array, "B L E"] | None, Array | None]:
    """The sum of the experts that run: y [B, L, D], router scores and active experts.

    Both are None where all experts run (`routing.routed` False); see `selection.Choice`.
    """
    logits = functools.partial(router, config, lte, w, routing.router_input(x_BLD))
    view = View(x_BLD, logits, w.vectors, key=w.key)

    def choose(h_BLEM=None, gate_BLEM=None) -> Choice:
        with jax.named_scope("router"):
            seen = dataclasses.replace(view, h_BLEM=h_BLEM, gate_BLEM=gate_BLEM)
            return routing.choose(seen, threshold)

    inputs = functools.partial(routing.inputs, view)
    with jax.named_scope("experts"):
        y_BLD, scores_BLE, active_BLE = w.experts(x_BLD, choose, config.activation, inputs)
    if "down_bias" in w.vectors:  # outside the routing: it belongs to no expert
        y_BLD += as_last(w.vectors["down_bias"], y_BLD)
    return y_BLD, scores_BLE, active_BLE


_BETWEEN = {"none": lambda x: x, "tanh": jnp.tanh}


def router(
    config: ModelConfig, lte: LTEConfig, w: Slice | Stack, x_BLD: Float[Array, "B L D"]
) -> Float[Array, "B L E"]:
    """The logit of each expert, float32; see `LTEConfig.router`."""
    if lte.router == "linear":
        return w.linear("router", x_BLD, exact=True)
    within = w.at("router")
    exact = functools.partial(within.linear, exact=True)
    if lte.router == "two_layer":
        act = (ACTIVATIONS | _BETWEEN)[lte.router_activation]
        return exact("outer", act(exact("inner", x_BLD)))
    bias_BLE = as_last(within.vectors["bias"].astype(jnp.float32), x_BLD.astype(jnp.float32))
    if lte.router == "glu":
        return ACTIVATIONS[config.activation](exact("gate", x_BLD)) * exact("up", x_BLD) + bias_BLE
    return jnp.broadcast_to(bias_BLE, (*x_BLD.shape[:-1], bias_BLE.shape[-1]))
