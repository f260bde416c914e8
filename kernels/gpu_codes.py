"""The kernels for NVIDIA GPUs, of weights of 8, 6 or 4 bits: the launches of triton_codes.py.

They are those of gpu_triton.py, but for the order of inputs, in which words have them. x is not
rounded; the kernels for CPUs round it.

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers  K inputs
               O outputs  S splits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .quantized import GROUP, LANES, Quantized, packed_shapes
from .triton_blocks import Blocks, padded, power
from .triton_call import call


def hidden(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, Quantized | jax.Array],
    layer: jax.Array,
    *,
    activation: str,
    cut: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As gpu_triton.hidden; h_EBM has the inputs of the down projection as words have them."""
    b, up = x_BD.shape[0], weights["up"]
    e, m = up.shape[1:3]
    gate = weights.get("gate", up)
    return call(
        "hidden_codes",
        (ordered(x_BD), active_BE, layer, up.codes, up.scales, gate.codes, gate.scales)
        # A kernel takes a fixed number of arrays: scales stand in for absent ones, unread.
        + tuple(weights.get(name, up.scales) for name in ("up_bias", "gate_bias")),
        hidden_shapes(b, e, m, x_BD.dtype),
        (e, -(-m // cut.m)),
        cut,
        **hidden_constants(b, e, m, up.inputs, up.format, cut),
        ACTIVATION=activation,
        GATED="gate" in weights,
        UP_BIAS="up_bias" in weights,
        GATE_BIAS="gate_bias" in weights,
    )


def combine(
    x_EBK: jax.Array,
    w: Quantized,
    layer: jax.Array,
    ids_E: jax.Array | None = None,
    count: jax.Array | None = None,
    *,
    cut: Blocks,
) -> jax.Array:
    """As gpu_triton.combine, of inputs as words have them; without a list, w has no experts."""
    (e, b, _), listed = x_EBK.shape, ids_E is not None
    partial_SBO = call(
        "combine_codes",
        (x_EBK, w.codes, w.scales, layer) + ((ids_E, count) if listed else (layer, layer)),
        jax.ShapeDtypeStruct((cut.splits, b, w.outputs), jnp.float32),
        (-(-w.outputs // cut.m), cut.splits),
        cut,
        **combine_constants(b, e, w.inputs, w.outputs, w.format, cut),
        GATHER=listed,
    )
    return partial_SBO.sum(axis=0)


def combine_three(
    x_BK: jax.Array, ws: Sequence[Quantized], layer: jax.Array, *, cut: Blocks
) -> jax.Array:
    """x times each of three matrices, side by side: float32 [B, O]."""
    b, widths = x_BK.shape[0], [w.outputs for w in ws]
    partial_SBO = call(
        "combine_three_codes",
        (ordered(x_BK), *(part for w in ws for part in (w.codes, w.scales)), layer),
        jax.ShapeDtypeStruct((cut.splits, b, sum(widths)), jnp.float32),
        (sum(-(-o // cut.m) for o in widths), cut.splits),
        cut,
        **three_constants(b, ws[0].inputs, widths, ws[0].format, cut),
    )
    return partial_SBO.sum(axis=0)


def hidden_shapes(b: int, e: int, m: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What both kinds of `hidden` return: h_EBM, ids_E and count."""
    sizes = ((e, b, m), dtype), ((e,), jnp.int32), ((1,), jnp.int32)
    return tuple(jax.ShapeDtypeStruct(*size) for size in sizes)


def ordered(x_BK: jax.Array) -> jax.Array:
    """Inputs in the order of words: those of one place together."""
    b, k = x_BK.shape
    return x_BK.reshape(b, k // 4, 4).swapaxes(1, 2).reshape(b, k)


def _constants(b: int, k: int, form: str, cut: Blocks) -> dict[str, int | str]:
    sizes = {"B": b, "G": k // GROUP, "ROWS": padded(b), "STAGES": cut.stages, "FORMAT": form}
    tile = packed_shapes(GROUP, LANES, form)[0][-1]  # bytes of a block of 16 outputs by 32 inputs
    return sizes | {"BLOCK_O": cut.m, "BLOCK_G": cut.d // GROUP, "TILE": tile}


def hidden_constants(b: int, e: int, m: int, k: int, form: str, cut: Blocks) -> dict:
    """The compile-time constants of `hidden_codes`, except the flags that describe the FFN."""
    return {"E": e, "M": m, "BLOCK_E": power(e)} | _constants(b, k, form, cut)


def combine_constants(b: int, e: int, k: int, o: int, form: str, cut: Blocks) -> dict:
    """The compile-time constants of `combine_codes`, except GATHER; x is [E, B, K]."""
    sizes = {"E": e, "OUTPUTS": o, "X_EXPERT": b * k, "SPLITS": cut.splits}
    return sizes | _constants(b, k, form, cut)


def three_constants(b: int, k: int, widths: Sequence[int], form: str, cut: Blocks) -> dict:
    """The compile-time constants of `combine_three_codes`."""
    outputs = dict(zip(("O_ONE", "O_TWO", "O_THREE"), widths, strict=True))
    return outputs | {"SPLITS": cut.splits} | _constants(b, k, form, cut)
