"""One decoder-only Transformer (Flax Linen) whose config spans the Llama family.

Pre-norm blocks of rotary attention and an FFN that is dense or made of routed experts; layers are
scanned, so every layer parameter has a leading axis N. The same forward pass trains, evaluates
and, given a cache, continues a text.

Dimension key: B batch  L length  T cache length  D model width  E experts  M neurons per expert
               N layers  H heads  K kv heads  C head width  V vocabulary
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lte_jax import checks, losses, sharding
from lte_jax.config import LTEConfig, ModelConfig, RopeScaling, Routing
from lte_jax.moe import ExpertFFN

Cache = dict[str, Array]


@flax.struct.dataclass
class Output:
    """What a forward pass returns; what is not used is not computed under `jax.jit`."""

    logits: Float[Array, "B L V"]  # float32
    scores: Float[Array, "N B L E"] | None  # router scores, float32; None under dense routing
    active: Bool[Array, "N B L E"] | None  # score > threshold; None under dense routing
    sparsity: Float[Array, ""]  # share of (real token, layer, expert) that is not active
    cache: Cache | None  # the extended cache, where one was given


class Transformer(nn.Module):
    """A dense (`lte` None) or LTE model: `model.apply({"params": params}, tokens)`."""

    config: ModelConfig
    lte: LTEConfig | None = None
    # Of the computation, whatever the parameters are stored in: float32 or bfloat16. Router
    # scores and logits are float32 always.
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        checks.compute_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B L"] | Any,
        *,
        routing: Routing | str | None = None,
        mask: Bool[Array | np.ndarray, "B L"] | Int[Array | np.ndarray, "B L"] | Any = None,
        threshold: Float[Array, ""] | float | Any = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the next token at each position.

        Args:
          tokens: token ids.
          routing: see moe.py; None takes `lte.routing` ("dense" where there are no experts).
          mask: True (or a segment id > 0) at real tokens; tokens see only their own segment, and
            each counts its positions for itself, padding left out wherever it lies. None: all
            real, one segment a row.
          threshold: in place of `lte.threshold`.
          cache: keys and values so far (`init_cache`), to which these tokens are appended.

        Raises:
          UserError: on arguments that do not fit the model or each other.
        """
        config, lte = self.config, self.lte
        checks.batch(config, tokens, mask, cache)
        checks.routing(routing)
        checks.threshold(threshold)
        dtype = jnp.dtype(self.dtype)
        if lte is None:
            routing, threshold = "dense", 0.5
        else:
            routing = routing or lte.routing
            threshold = lte.threshold if threshold is None else threshold
        segments_BL = (
            jnp.ones(tokens.shape, jnp.int32) if mask is None else jnp.asarray(mask, jnp.int32)
        )
        context = make_context(config, segments_BL, threshold, cache)

        embed = nn.Embed(config.vocab_size, config.d_model, dtype=dtype, name="embed")
        x_BLD = sharding.constrain(embed(tokens), "batch", None, None)
        layer_cache = None if cache is None else {"k": cache["k"], "v": cache["v"]}
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=config.num_layers,
        )(config, lte, routing, dtype, name="layers")
        x_BLD, (scores_NBLE, active_NBLE, layer_cache) = layers(
            x_BLD, layer_cache, jnp.asarray(sliding_layers(config)), context
        )
        x_BLD = RMSNorm(config.norm_eps, dtype, name="final_norm")(x_BLD)
        if config.tie_embeddings:
            head_DV = embed.embedding.T
        else:
            head_DV = Projection((config.vocab_size,), name="lm_head")((config.d_model,))["kernel"]
        logits_BLV = jnp.einsum(
            "BLD,DV->BLV", x_BLD, head_DV.astype(dtype), preferred_element_type=jnp.float32
        )

        sparsity = jnp.zeros((), jnp.float32)
        if active_NBLE is not None:
            sparsity = 1.0 - jnp.mean(losses.layer_means(active_NBLE, segments_BL > 0))
        if cache is not None and layer_cache is not None:
            cache = layer_cache | {
                "segments": context["segments_BT"],
                "positions": context["positions_BT"],
                "index": cache["index"] + tokens.shape[1],
            }
        return Output(logits_BLV, scores_NBLE, active_NBLE, sparsity, cache)


class Block(nn.Module):
    """Attention and FFN, each after a norm and around a residual connection."""

    config: ModelConfig
    lte: LTEConfig | None
    routing: Routing
    dtype: jnp.dtype

    def setup(self):
        """Declares the four parts under the names of the parameter tree."""
        self.attn_norm = RMSNorm(self.config.norm_eps, self.dtype)
        self.attn = Attention(self.config, self.dtype)
        self.ffn_norm = RMSNorm(self.config.norm_eps, self.dtype)
        self.ffn = ExpertFFN(self.config, self.lte, self.routing, self.dtype)

    def __call__(self, x_BLD, cache, slides, context):
        """One layer of the scan: (x, (router scores, active experts, cache))."""
        y_BLD, cache = self.attn(self.attn_norm(x_BLD), cache, slides, context)
        x_BLD = sharding.constrain(x_BLD + y_BLD, "batch", None, None)
        y_BLD, scores_BLE, active_BLE = self.ffn(self.ffn_norm(x_BLD), context["threshold"])
        x_BLD = sharding.constrain(x_BLD + y_BLD, "batch", None, None)
        return x_BLD, (scores_BLE, active_BLE, cache)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        """Normalised and scaled `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Projection(nn.Module):
    """The parameters of a linear map from `inputs` to `outputs` dimensions, and their use."""

    outputs: tuple[int, ...]
    use_bias: bool = False

    @nn.compact
    def __call__(self, inputs: tuple[int, ...]) -> dict[str, Array]:
        """kernel [*inputs, *outputs] and, if there is one, bias [*outputs]."""
        init = nn.initializers.normal(float(np.prod(inputs)) ** -0.5)
        made = {"kernel": self.param("kernel", init, (*inputs, *self.outputs), jnp.float32)}
        if self.use_bias:
            made["bias"] = self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32)
        return made


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD, cache, slides, context):
        """Attention output [B, L, D] and the cache with this layer's keys and values."""
        c = self.config
        q_BLHC = self._project("q", x_BLD, c.num_heads)
        k_BLKC = self._project("k", x_BLD, c.num_kv_heads)
        v_BLKC = self._project("v", x_BLD, c.num_kv_heads)
        if c.qk_norm:
            q_BLHC = RMSNorm(c.norm_eps, self.dtype, name="q_norm")(q_BLHC)
            k_BLKC = RMSNorm(c.norm_eps, self.dtype, name="k_norm")(k_BLKC)
        q_BLHC = rotate(q_BLHC, context["angles_BLC"])
        k_BLKC = rotate(k_BLKC, context["angles_BLC"])
        if cache is not None:
            cache = {
                "k": _put(cache["k"], k_BLKC, context["index"]),
                "v": _put(cache["v"], v_BLKC, context["index"]),
            }
            k_BLKC, v_BLKC = cache["k"], cache["v"]
        visible_BLT = visible_keys(c, slides, context)
        y_BLHC = attention(q_BLHC, k_BLKC, v_BLKC, visible_BLT, blocked=cache is None)
        out = Projection((c.d_model,), c.out_bias, name="o")((c.num_heads, c.head_dim))
        y_BLD = jnp.einsum("BLHC,HCD->BLD", y_BLHC, out["kernel"].astype(self.dtype))
        if c.out_bias:
            y_BLD += out["bias"].astype(self.dtype)[None, None]
        return y_BLD, cache

    def _project(self, name: str, x_BLD, heads: int):
        c = self.config
        made = Projection((heads, c.head_dim), c.qkv_bias, name=name)((c.d_model,))
        y_BLHC = jnp.einsum("BLD,DHC->BLHC", x_BLD, made["kernel"].astype(self.dtype))
        return y_BLHC + made["bias"].astype(self.dtype)[None, None] if c.qkv_bias else y_BLHC


def init_cache(model: Transformer, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` texts of up to `length` tokens.

    k, v [N, B, T, K, C]; segments [B, T], > 0 where a real token lies; positions [B, T] of the
    tokens in their segments; index: tokens so far.
    """
    c = model.config
    shape = (c.num_layers, batch_size, length, c.num_kv_heads, c.head_dim)
    return {
        "k": jnp.zeros(shape, model.dtype),
        "v": jnp.zeros(shape, model.dtype),
        "segments": jnp.zeros((batch_size, length), jnp.int32),
        "positions": jnp.zeros((batch_size, length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def abstract_params(model: Transformer) -> Any:
    """The parameter tree as ShapeDtypeStructs: shapes of any size at no cost."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def sliding_layers(config: ModelConfig) -> tuple[bool, ...]:
    """For each layer, whether its attention is cut to the sliding window."""
    if config.sliding_layers is not None:
        return config.sliding_layers
    return (config.sliding_window is not None,) * config.num_layers


def visible_keys(config: ModelConfig, slides, context) -> Bool[Array, "B L T"]:
    """The keys each query of this layer may see; `slides` says whether its window is bounded."""
    if config.sliding_window is None:
        return context["visible_BLT"]
    return context["visible_BLT"] & (context["near_BLT"] | ~slides)


_QUERY_BLOCKS, _SMALLEST_BLOCK = 8, 32


def attention(
    q_BLHC: Float[Array, "B L H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    visible_BLT: Bool[Array, "B L T"],
    blocked: bool,
) -> Float[Array, "B L H C"]:
    """Softmax attention over the visible keys.

    `blocked` says that T = L and query i sees no key beyond i: a block of queries is then compared
    with the keys up to its end only, and its scores are recomputed in the backward pass. That is
    half the work and an eighth of the memory, and twice as fast on a CPU.
    """
    length = q_BLHC.shape[1]
    size = max(-(-length // _QUERY_BLOCKS), _SMALLEST_BLOCK) if blocked else length
    attend = jax.nn.dot_product_attention
    attend = jax.checkpoint(attend) if blocked else attend
    blocks = []
    for start in range(0, length, size):
        rows = slice(start, start + size)
        keys = slice(0, start + size) if blocked else slice(None)
        mask_B1LT = visible_BLT[:, None, rows, keys]
        blocks.append(attend(q_BLHC[:, rows], k_BTKC[:, keys], v_BTKC[:, keys], mask=mask_B1LT))
    return jnp.concatenate(blocks, axis=1)


def rotate(x_BLHC: Float[Array, "B L H C"], angles_BLC: Float[Array, "B L C//2"]):
    """Rotary embedding with the halves of a head paired, as in HF's Llama."""
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles_BLC)[:, :, None], jnp.sin(angles_BLC)[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHC.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of a head, [C/2], float32."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float64)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    return frequencies.astype(np.float32)


def _stretched(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long waves are stretched, short ones kept, those between blended.
    wavelengths = 2 * np.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_length / wavelengths - low) / (high - low)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def make_context(
    config: ModelConfig, segments_BL, threshold, cache: Cache | None
) -> dict[str, Array]:
    """What all layers share: who sees whom, rotary angles, the threshold, the cache index."""
    if cache is None:
        index, segments_BT = jnp.zeros((), jnp.int32), segments_BL
    else:
        index = cache["index"]
        segments_BT = _put(cache["segments"], segments_BL, index)
    queries_L = index + jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
    slots_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    visible_BLT = segments_BL[:, :, None] == segments_BT[:, None]
    visible_BLT &= (queries_L[:, None] >= slots_T[None])[None]
    # The number of earlier tokens of the same segment, wherever in the row and the cache they lie.
    positions_BL = jnp.sum(visible_BLT, axis=-1, dtype=jnp.int32) - 1
    positions_BT = positions_BL if cache is None else _put(cache["positions"], positions_BL, index)
    context = {
        "visible_BLT": visible_BLT,
        "angles_BLC": positions_BL[..., None].astype(jnp.float32)
        * jnp.asarray(rope_frequencies(config))[None, None],
        "threshold": jnp.asarray(threshold, jnp.float32),
        "index": index,
        "segments_BT": segments_BT,
        "positions_BT": positions_BT,
    }
    if config.sliding_window is not None:
        behind_BLT = positions_BL[:, :, None] - positions_BT[:, None]
        context["near_BLT"] = behind_BLT < config.sliding_window
    return context


def _put(cache_BT, new_BL, index):
    """The cache with new tokens from place `index` on; further axes are taken along."""
    return jax.lax.dynamic_update_slice_in_dim(cache_BT, new_BL, index, axis=1)
