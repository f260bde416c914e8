"""The sparse expert FFN in plain jnp: the reference for all other kernels.

A row of the input is one token; it uses only the experts in its row of the mask:

    y_b = sum over active e of  down_e^T h,   h = act(gate_e x_b) * (up_e x_b)   (gated)
                                              h = act(up_e x_b)                  (not gated)

Here every expert is computed for every row and masked afterwards, in float32 at the highest
precision. README.md beside this file is the contract of every implementation.

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .quantized import Quantized, Weight


class Unsupported(Exception):
    """Raised for what an implementation cannot run, with the reason in one line."""


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def compact(active_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The experts that some row uses, as a list of static length with its count on the device.

    Returns:
      ids_E: int32, ascending; entries from `count` on are padding (zeros).
      count: int32 scalar.
    """
    used_E = active_BE.any(axis=0)
    (ids_E,) = jnp.nonzero(used_E, size=used_E.size, fill_value=0)
    return ids_E.astype(jnp.int32), used_E.sum(dtype=jnp.int32)


def sparse_ffn(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, Weight],
    layer: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """Output [B, D] of x's type, computed in float32; weights are stacked [N, E, M, D]."""
    w = {name: stacked[layer].astype(jnp.float32) for name, stacked in weights.items()}

    def project(name: str) -> jax.Array:
        x = x_BD.astype(jnp.float32)
        h_BEM = jnp.einsum("BD,EMD->BEM", x, w[name], precision="highest")
        return h_BEM + w[f"{name}_bias"][None] if f"{name}_bias" in w else h_BEM

    act = ACTIVATIONS[activation]
    h_BEM = act(project("gate")) * project("up") if "gate" in w else act(project("up"))
    h_BEM = jnp.where(active_BE[..., None], h_BEM, 0.0)
    return jnp.einsum("BEM,EMD->BD", h_BEM, w["down"], precision="highest").astype(x_BD.dtype)


def linear(x_BK: jax.Array, w: Weight, layer: jax.Array, *, transposed: bool) -> jax.Array:
    """x w[layer], float32 [B, O]; w is stacked [N, K, O] or, transposed, [N, O, K]."""
    w_KO = w[layer].astype(jnp.float32)
    w_KO = w_KO.T if transposed else w_KO
    return jnp.matmul(x_BK.astype(jnp.float32), w_KO, precision="highest")


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
    k_NBTKC = k_NBTKC.at[layer, :, index].set(k_BKC)
    v_NBTKC = v_NBTKC.at[layer, :, index].set(v_BKC)
    b, h, c = q_BHC.shape
    k_BTKC, v_BTKC = (cache[layer].astype(jnp.float32) for cache in (k_NBTKC, v_NBTKC))
    q_BKGC = q_BHC.astype(jnp.float32).reshape(b, k_BTKC.shape[2], -1, c)  # G heads share a kv head
    einsum = functools.partial(jnp.einsum, precision="highest")
    scores_BKGT = einsum("BKGC,BTKC->BKGT", q_BKGC, k_BTKC) / c**0.5
    scores_BKGT = jnp.where(visible_BT[:, None, None], scores_BKGT, -jnp.inf)
    y_BKGC = einsum("BKGT,BTKC->BKGC", jax.nn.softmax(scores_BKGT), v_BTKC)
    return y_BKGC.reshape(b, h, c).astype(q_BHC.dtype), k_NBTKC, v_NBTKC


def attend_many(
    q_BLHC: jax.Array,
    k_NBTKC: jax.Array,
    v_NBTKC: jax.Array,
    visible_BLT: jax.Array,
    layer: jax.Array,
    end: jax.Array,
) -> jax.Array:
    """Attention of several tokens per row over the caches, [B, L, H, C]; of nothing seen, zeros."""
    used_11T = jnp.arange(k_NBTKC.shape[2])[None, None] < end
    k_BTKC, v_BTKC = (
        jnp.where(used_11T[0, ..., None, None], cache[layer].astype(jnp.float32), 0.0)
        for cache in (k_NBTKC, v_NBTKC)
    )
    b, length, h, c = q_BLHC.shape
    q_BLKGC = q_BLHC.astype(jnp.float32).reshape(b, length, k_BTKC.shape[2], -1, c)
    einsum = functools.partial(jnp.einsum, precision="highest")
    scores_BKGLT = einsum("BLKGC,BTKC->BKGLT", q_BLKGC, k_BTKC) / c**0.5
    seen_B11LT = (visible_BLT & used_11T)[:, None, None]
    shares_BKGLT = jax.nn.softmax(jnp.where(seen_B11LT, scores_BKGLT, -1e30))
    shares_BKGLT = jnp.where(seen_B11LT, shares_BKGLT, 0.0)
    y_BLKGC = einsum("BKGLT,BTKC->BLKGC", shares_BKGLT, v_BTKC)
    return y_BLKGC.reshape(b, length, h, c).astype(q_BLHC.dtype)


def embed(tokens_B: jax.Array, table_VD: Weight) -> jax.Array:
    """Rows of the table: [B, D]."""
    return table_VD.rows(tokens_B) if isinstance(table_VD, Quantized) else table_VD[tokens_B]
