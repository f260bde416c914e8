"""What is asked of the operands of the kernels, whichever of them runs: shapes, types, places.

Dimension key: as in the dispatch, __init__.py
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from lte_jax.errors import UserError, nearest

from .quantized import Weight
from .reference import ACTIVATIONS


def place(name: str, value: Array | int, size: int) -> Array:
    """An index as int32 scalar on the device, refused if it is known to be out of range."""
    found = jnp.asarray(value)
    if found.ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        raise UserError(f"{name} is {found.dtype}{list(found.shape)}, expected an integer")
    known = not isinstance(found, jax.core.Tracer) and found.is_fully_addressable
    if known and not 0 <= int(found) < size:
        raise UserError(f"{name} is {int(found)}, expected 0 to {size - 1}")
    return found.astype(jnp.int32)


def check_caches(name: str, q: Array, k_NBTKC: Array, v_NBTKC: Array, visible: Array, wanted):
    """Raises on what no attention could look at; `wanted` is the shape of `visible`."""
    n, _, t, k, _ = k_NBTKC.shape
    b, h, c = q.shape[0], *q.shape[-2:]
    if not k_NBTKC.shape == v_NBTKC.shape == (n, b, t, k, c) or h % k:
        raise UserError(
            f"{name}: q {q.shape}, caches {k_NBTKC.shape} and {v_NBTKC.shape}: expected [B, ..., "
            "H, C] and twice [N, B, T, K, C], H a multiple of K"
        )
    if not q.dtype == k_NBTKC.dtype == v_NBTKC.dtype:
        raise UserError(f"{name}: q and the caches differ in type: expected one")
    if visible.shape != wanted or visible.dtype != bool:
        raise UserError(
            f"{name}: visible is {visible.dtype}{list(visible.shape)}, expected bool{[*wanted]}"
        )


def check_linear(x_BK: Array, w: Weight, transposed: bool) -> None:
    """Raises on what no implementation could run; w is stacked by now."""
    if x_BK.ndim != 2 or w.ndim != 3 or w.shape[-1 if transposed else 1] != x_BK.shape[1]:
        expected = "[O, K]" if transposed else "[K, O]"
        raise UserError(f"linear: x {x_BK.shape} and w {w.shape}: expected [B, K] and {expected}")
    if w.dtype != x_BK.dtype:
        raise UserError(f"linear: x is {x_BK.dtype} and w {w.dtype}: expected one type")


def check_ffn(
    x_BD: Array, active_BE: Array, weights: Mapping[str, Weight], activation: str
) -> None:
    """Raises on what no implementation could run; the weights are stacked by now."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation!r}: {nearest(activation, ACTIVATIONS)}")
    if x_BD.ndim != 2 or active_BE.shape[:1] != x_BD.shape[:1] or active_BE.ndim != 2:
        raise UserError(
            f"sparse_ffn: x has shape {x_BD.shape} and active {active_BE.shape}, expected [B, D] "
            "and [B, E]: flatten the batch and length axes"
        )
    if active_BE.dtype != bool:
        raise UserError(f"sparse_ffn: active is {active_BE.dtype}, expected bool: scores > tau")
    known = {"gate", "up", "down", "gate_bias", "up_bias"}
    orphan = "gate_bias" in weights and "gate" not in weights
    if orphan or not {"up", "down"} <= set(weights) <= known:
        raise UserError(
            f"sparse_ffn: weights are {', '.join(sorted(weights))}; expected up and down, and "
            "optionally gate, up_bias and (with gate) gate_bias"
        )
    n, m = weights["up"].shape[0], weights["up"].shape[-2]
    e, d = active_BE.shape[1], x_BD.shape[1]
    for name, w in weights.items():
        expected = (n, e, m) if name.endswith("_bias") else (n, e, m, d)
        if w.shape != expected or w.dtype != x_BD.dtype:
            raise UserError(
                f"sparse_ffn: {name} is {w.dtype}{list(w.shape)}, expected "
                f"{x_BD.dtype}{list(expected)} (layers, E, M, D) to go with x and active"
            )
