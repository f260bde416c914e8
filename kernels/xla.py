"""The sparse expert FFN as a loop over the active experts that XLA compiles for any device.

Each step slices one active expert out of the weights and adds its part of the output, so time and
memory traffic are proportional to the active experts. The trip count stays on the device. On a CPU
the loop runs on one core, at about 0.6 of the memory bandwidth; in bfloat16, jaxlib 0.10 first
converts all weights to float32 (later versions do not).

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .quantized import Quantized, Weight
from .reference import ACTIVATIONS, attend_many, compact, embed

__all__ = ["attend", "attend_many", "embed", "linear", "linears", "sparse_ffn"]
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)


def _of(w: Any, index: jax.Array, dtype: Any) -> jax.Array:
    """One of several matrices, as an array."""
    one = jax.tree.map(lambda a: _at(a, index), w)
    return one.astype(dtype) if isinstance(one, Quantized) else one


def sparse_ffn(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, Weight],
    layer: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """Output [B, D] of x's type, accumulated in float32; weights are stacked [N, E, M, D]."""
    act = ACTIVATIONS[activation]
    ids_E, count = compact(active_BE)
    first = layer * active_BE.shape[1]  # this layer's first expert in the flat view
    flatten = functools.partial(jax.tree.map, lambda w: w.reshape(-1, *w.shape[2:]))
    flat = {name: flatten(w) for name, w in weights.items()}

    def add_expert(i: jax.Array, y_BD: jax.Array) -> jax.Array:
        expert = ids_E[i]
        w = {name: _of(f, first + expert, x_BD.dtype) for name, f in flat.items()}

        def project(name: str) -> jax.Array:
            h_BM = jnp.einsum("BD,MD->BM", x_BD, w[name], preferred_element_type=jnp.float32)
            if f"{name}_bias" in w:
                h_BM += w[f"{name}_bias"].astype(jnp.float32)[None]
            return h_BM

        h_BM = act(project("gate")) * project("up") if "gate" in w else act(project("up"))
        active_B = _at(active_BE, expert, axis=1)
        h_BM = jnp.where(active_B[:, None], h_BM, 0.0).astype(w["down"].dtype)
        return y_BD + jnp.einsum("BM,MD->BD", h_BM, w["down"], preferred_element_type=jnp.float32)

    y_BD = jax.lax.fori_loop(0, count, add_expert, jnp.zeros(x_BD.shape, jnp.float32))
    return y_BD.astype(x_BD.dtype)


def linear(x_BK: jax.Array, w: Weight, layer: jax.Array, *, transposed: bool) -> jax.Array:
    """x w[layer], float32 [B, O]; w is stacked [N, K, O] or, transposed, [N, O, K]."""
    # TPUs and GPUs would round float32, and routers then choose other experts than in training.
    # Full precision costs nothing here: the time goes into reading w.
    precision = jax.lax.Precision.HIGHEST if x_BK.dtype == jnp.float32 else None
    dims = "BK,OK->BO" if transposed else "BK,KO->BO"
    return jnp.einsum(
        dims, x_BK, _of(w, layer, x_BK.dtype), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def linears(x_BK: jax.Array, ws: Sequence[Weight], layer: jax.Array) -> list[jax.Array]:
    """x w[layer] of each w, float32 [B, O]; they are stacked [N, K, O]."""
    return [linear(x_BK, w, layer, transposed=False) for w in ws]


def attend(
    q_BHC: jax.Array,
    k_BKC: jax.Array,
    v_BKC: jax.Array,
    k_NBTKC: jax.Array,
    v_NBTKC: jax.Array,
    visible_BT: jax.Array,
    layer: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new token per row, [B, H, C], and the caches with it at `layer`, `index`."""
    k_NBTKC, v_NBTKC = put(k_NBTKC, k_BKC, layer, index), put(v_NBTKC, v_BKC, layer, index)
    k_BTKC, v_BTKC = _at(k_NBTKC, layer), _at(v_NBTKC, layer)
    mask_B11T = visible_BT[:, None, None]
    y_B1HC = jax.nn.dot_product_attention(q_BHC[:, None], k_BTKC, v_BTKC, mask=mask_B11T)
    return y_B1HC[:, 0], k_NBTKC, v_NBTKC


def put(
    cache_NBTKC: jax.Array, new_BKC: jax.Array, layer: jax.Array, index: jax.Array
) -> jax.Array:
    """The cache with the keys, or values, of one new token per row."""
    zero = jnp.zeros((), jnp.int32)  # all indices need one type; under x64, Python's 0 is int64
    here = (layer, zero, index, zero, zero)
    return jax.lax.dynamic_update_slice(cache_NBTKC, new_BKC[None, :, None], here)
