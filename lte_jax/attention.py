"""Which keys a query sees, its position, and softmax attention over them.

Dimension key: B batch  L length  T cache length  H heads  K kv heads  C head width
               R pairs of a head that rotate (C/2, or fewer)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lte_jax.config import ModelConfig, RopeScaling

Cache = dict[str, Array]  # see `model.init_cache`


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


def per_layer(config: ModelConfig) -> dict[str, np.ndarray]:
    """What layers have of their own, beside weights: the first axis of each array is N.

    `slides`: whether the window bounds its attention. Where not all layers rotate alike, also
    `frequencies` [N, C/2] and `amplitude`, the factor of cosines and sines.
    """
    own = {"slides": np.array(sliding_layers(config))}
    if config.rope_layers is None and config.sliding_rope_theta is None:
        return own
    plain = dataclasses.replace(
        config, rope_scaling=None, rope_theta=config.sliding_rope_theta or config.rope_theta
    )
    kinds = [plain if slides and config.sliding_rope_theta else config for slides in own["slides"]]
    rotates = np.array(config.rope_layers or (True,) * config.num_layers)
    frequencies_NC = np.stack([rope_frequencies(kind) for kind in kinds])
    own["frequencies"] = np.where(rotates[:, None], frequencies_NC, np.float32(0))
    amplitudes = np.where(rotates, [rope_amplitude(kind) for kind in kinds], 1.0)
    return own | {"amplitude": amplitudes.astype(np.float32)}


_QUERY_BLOCKS, _SMALLEST_BLOCK = 8, 32


def masked_attention(
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


_SCORES_AT_ONCE = 1 << 25


def attention_in_turn(
    q_BLHC: Float[Array, "B L H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    visible_BLT: Bool[Array, "B L T"],
) -> Float[Array, "B L H C"]:
    """Softmax attention over the visible keys, for so many queries at a time as memory allows."""
    (b, length, h, _), t = q_BLHC.shape, k_BTKC.shape[1]
    size = max(1, _SCORES_AT_ONCE // (b * h * t))
    if length <= size:
        return masked_attention(q_BLHC, k_BTKC, v_BTKC, visible_BLT, blocked=False)
    fill = -length % size
    pad = lambda x: jnp.pad(x, [(0, 0), (0, fill), *[(0, 0)] * (x.ndim - 2)])  # noqa: E731
    cut = lambda x: jnp.moveaxis(x.reshape(b, -1, size, *x.shape[2:]), 1, 0)  # noqa: E731

    def some(part):
        return masked_attention(part[0], k_BTKC, v_BTKC, part[1], blocked=False)

    y = jax.lax.map(some, (cut(pad(q_BLHC)), cut(pad(visible_BLT))))
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, *q_BLHC.shape[2:])[:, :length]


def rotation(config: ModelConfig, own, context) -> tuple[Array, Array]:
    """The cosines and sines of this layer's angles, each [B, L, R]."""
    if "frequencies" not in own:
        return context["turns"]
    return turns(context["positions_BL"], own["frequencies"], own["amplitude"])


def turns(positions_BL, frequencies_R, amplitude) -> tuple[Array, Array]:
    """The cosines and sines, times `amplitude`, of each position and pair of a head."""
    angles_BLR = positions_BL[..., None].astype(jnp.float32) * frequencies_R[None, None]
    return amplitude * jnp.cos(angles_BLR), amplitude * jnp.sin(angles_BLR)


def rotate(x_BLHC: Float[Array, "B L H C"], turns: tuple[Array, Array]):
    """Rotary embedding with the halves of a head paired, as in HF's Llama; the rest stays."""
    cos, sin = (part_BLR[:, :, None] for part_BLR in turns)
    width = 2 * cos.shape[-1]
    x_BLHC, rest_BLHC = x_BLHC[..., :width], x_BLHC[..., width:]
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BLHC.dtype), rest_BLHC], axis=-1)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of what rotates of a head, float32."""
    width = config.rotary_dim or config.head_dim
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    return frequencies.astype(np.float32)


def rope_amplitude(config: ModelConfig) -> float:
    """The factor of cosines and sines."""
    return 1.0 if config.rope_scaling is None else config.rope_scaling.amplitude


def _stretched(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves are stretched, short ones kept (except by "linear"), those between blended."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "llama3":
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:  # yarn: evenly over the pairs between those that turn `high` and `low` times
        pairs = np.arange(len(frequencies))
        step = np.log(frequencies[0] / frequencies[-1]) / max(len(frequencies) - 1, 1)
        first, last = (np.log(turns[0] / bound) / step for bound in (high, low))
        first, last = max(np.floor(first), 0), min(np.ceil(last), 2 * len(frequencies) - 1)
        blend = 1 - np.clip((pairs - first) / (last - first or 1e-3), 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def make_context(config: ModelConfig, segments_BL, cache: Cache | None) -> dict[str, Array]:
    """What all layers share: who sees whom, rotary angles, the cache index."""
    if cache is None:
        index, segments_BT = jnp.zeros((), jnp.int32), segments_BL
    else:
        index = cache["index"]
        segments_BT = put(cache["segments"], segments_BL, index)
    queries_L = index + jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
    slots_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    same_BLT = segments_BL[:, :, None] == segments_BT[:, None]
    earlier_BLT = same_BLT & (queries_L[:, None] >= slots_T[None])[None]
    # The number of earlier tokens of the same segment, wherever in the row and the cache they lie.
    positions_BL = jnp.sum(earlier_BLT, axis=-1, dtype=jnp.int32) - 1
    positions_BT = positions_BL if cache is None else put(cache["positions"], positions_BL, index)
    context = {
        "visible_BLT": earlier_BLT if config.causal else same_BLT,
        "positions_BL": positions_BL,
        # Of layers that rotate alike: here, as each layer would compute them anew.
        "turns": turns(positions_BL, rope_frequencies(config), rope_amplitude(config)),
        "index": index,
        "segments_BT": segments_BT,
        "positions_BT": positions_BT,
    }
    if config.sliding_window is not None:
        behind_BLT = positions_BL[:, :, None] - positions_BT[:, None]
        context["near_BLT"] = behind_BLT < config.sliding_window
    return context


def put(cache_BT, new_BL, index):
    """The cache with new tokens from place `index` on; further axes are taken along."""
    return jax.lax.dynamic_update_slice_in_dim(cache_BT, new_BL, index, axis=1)
