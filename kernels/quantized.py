"""Matrices of 8, 6 or 4 bits a weight, stored in the order in which the kernels read them.

A matrix of O outputs and K inputs is cut into tiles of 16 outputs by 32 inputs. The 32 weights of
an output in a tile share a scale, and a weight is

    scale * (code - zero)        codes 0 to 255, zero 128 (int8); 0 to 63, zero 32 (int6); 0 to 15,
                                 zero 8 (int4)

These are the blocks of Q8_0 and Q4_0 in GGUF files, with bfloat16 scales. In a tile the outputs are
the lanes of a vector: one load has 4 inputs of each of 16 outputs (int4: and 4 more, 16 inputs on,
in the upper halves of the bytes), as a CPU's dot products of bytes take them. A tile of int6 has
the lower 4 bits as int4 has its codes, then the upper 2 bits: in the first of two loads those of
inputs 0 to 3, 8 to 11, 16 to 19 and 24 to 27, from the lowest bits of the bytes on; in the second
the rest.

Dimension key: O outputs  K inputs  T = O/16 tiles, the last filled up with zeros  G = K/32 groups
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

LANES, GROUP = 16, 32
BITS = {"int8": 8, "int6": 6, "int4": 4}
# Of int4, the scales tried for a group: its largest weight over these.
_STEPS = tuple(-8.0 + 0.25 * i for i in range(-4, 9))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("format", "sizes", "inputs_first", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix, or several of one shape: it stands in for an array [..., *sizes].

    Its arrays may be sliced and stacked along the leading dimensions.
    """

    codes: Any  # uint8 [..., T, G, 512, 384 or 256]
    scales: Any  # bfloat16 [..., T, G, 16]
    format: str  # one of BITS
    sizes: tuple[int, ...]  # of one matrix
    inputs_first: bool  # whether its inputs are the first of these dimensions, or the last
    dtype: Any  # of what is computed with it

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it stands for."""
        return (*self.codes.shape[:-3], *self.sizes)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the array it stands for."""
        return len(self.shape)

    @property
    def inputs(self) -> int:
        """K."""
        return self.codes.shape[-2] * GROUP

    @property
    def outputs(self) -> int:
        """O."""
        return math.prod(self.sizes) // self.inputs

    def __getitem__(self, index: Any) -> Quantized:
        """Of several matrices the one, or those, at this index of the leading dimensions."""
        return jax.tree.map(lambda a: a[index], self)

    def reshape(self, *shape: int) -> Quantized:
        """Each matrix with other dimensions; inputs stay inputs."""
        lead = self.codes.ndim - 3
        assert math.prod(shape[lead:]) == math.prod(self.sizes), (self.shape, shape)
        return dataclasses.replace(self, sizes=tuple(shape[lead:]))

    def astype(self, dtype: Any) -> jax.Array:
        """The array it stands for."""
        w_OK = _weights(self.codes, self.scales, self.format)  # [..., T, 16, G, 32]
        w_OK = w_OK.reshape(*w_OK.shape[:-4], -1, self.inputs)[..., : self.outputs, :]
        w = jnp.swapaxes(w_OK, -1, -2) if self.inputs_first else w_OK
        return w.reshape(self.shape).astype(dtype)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of one matrix [O, K] as floats of its dtype: [..., K]."""
        codes, scales = self.codes[ids // LANES], self.scales[ids // LANES]
        tiles = _weights(codes, scales, self.format)  # [..., 16, G, 32]
        lane = (ids % LANES)[..., None, None, None]
        row = jnp.take_along_axis(tiles, lane, axis=-3)
        return row.reshape(*ids.shape, self.inputs).astype(self.dtype)


Weight: TypeAlias = jax.Array | Quantized


def quantize(w: jax.Array, format: str, *, inputs_first: bool, dtype: Any) -> Quantized:
    """The matrices in this format, each weight rounded to what is nearest.

    Args:
      w: floats, [..., K, O] if `inputs_first`, else [..., O, K]; K is a multiple of 32.
      format: one of BITS.
      inputs_first: see above.
      dtype: of what is to be computed with it.
    """
    w_OK = (jnp.swapaxes(w, -1, -2) if inputs_first else w).astype(jnp.float32)
    scales = scales_of(w_OK, format)
    codes, scales = packed(_codes(w_OK, scales, BITS[format]), scales, format)
    return Quantized(codes, scales, format, tuple(w.shape[-2:]), inputs_first, dtype)


def rounded(w: jax.Array, format: str, *, inputs_first: bool) -> jax.Array:
    """What `quantize` makes of the matrices, as floats."""
    w_OK = jnp.swapaxes(w, -1, -2) if inputs_first else w
    scales = scales_of(w_OK.astype(jnp.float32), format)
    codes = _codes(w_OK.astype(jnp.float32), scales, BITS[format])
    w_OK = jnp.repeat(scales, GROUP, axis=-1) * (codes - 2 ** (BITS[format] - 1))
    w_OK = w_OK.astype(w.dtype)
    return jnp.swapaxes(w_OK, -1, -2) if inputs_first else w_OK


def packed_shapes(inputs: int, outputs: int, format: str) -> tuple[tuple[int, ...], ...]:
    """Those of the codes and scales of a matrix."""
    tiles = (-(-outputs // LANES), inputs // GROUP)
    return (*tiles, LANES * GROUP * BITS[format] // 8), (*tiles, LANES)


@functools.partial(jax.jit, static_argnames="format")
def packed(codes_OK: jax.Array, scales_OG: jax.Array, format: str) -> tuple[jax.Array, jax.Array]:
    """Codes, one a weight, [..., O, K] and scales [..., O, G] as `Quantized` holds them."""
    fill = [(0, 0)] * (codes_OK.ndim - 2) + [(0, -codes_OK.shape[-2] % LANES), (0, 0)]
    zero = 2 ** (BITS[format] - 1)
    codes = jnp.pad(codes_OK, fill, constant_values=zero).astype(jnp.uint8)
    # [..., T, 16, G, 8 loads, 4] to [..., T, G, 8 loads, 16, 4]
    codes = codes.reshape(*codes.shape[:-2], -1, LANES, codes.shape[-1] // GROUP, GROUP // 4, 4)
    codes = jnp.moveaxis(codes, -4, -2)
    if format != "int8":
        low, high = jnp.split(codes & 15, 2, axis=-3)
        lower = low | high << 4
    if format == "int6":
        pairs = jnp.split(codes >> 4, 4, axis=-3)
        upper = functools.reduce(jnp.bitwise_or, (p << 2 * i for i, p in enumerate(pairs)))
        codes = jnp.concatenate([lower, upper], axis=-3)
    elif format == "int4":
        codes = lower
    scales = jnp.pad(scales_OG, fill)
    scales = scales.reshape(*scales.shape[:-2], -1, LANES, scales.shape[-1])
    codes = codes.reshape(*codes.shape[:-3], -1)
    return codes, jnp.swapaxes(scales, -1, -2).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="format")
def _weights(codes: jax.Array, scales: jax.Array, format: str) -> jax.Array:
    """The weights, [..., T, 16, G, 32], float32; the reverse of `packed`."""
    tiles = codes.reshape(*codes.shape[:-1], -1, LANES, 4)
    if format != "int8":
        lower, upper = tiles[..., :4, :, :], tiles[..., 4:, :, :]
        tiles = jnp.concatenate([lower & 15, lower >> 4], axis=-3)
    if format == "int6":
        tiles |= jnp.concatenate([upper >> 2 * i & 3 for i in range(4)], axis=-3) << 4
    tiles = jnp.moveaxis(tiles, -2, -4)  # [..., T, 16, G, 8, 4]
    tiles = tiles.reshape(*tiles.shape[:-2], GROUP).astype(jnp.int32) - 2 ** (BITS[format] - 1)
    return tiles.astype(jnp.float32) * jnp.swapaxes(scales, -1, -2).astype(jnp.float32)[..., None]


@functools.partial(jax.jit, static_argnames="bits")
def _codes(w_OK: jax.Array, scales_OG: jax.Array, bits: int) -> jax.Array:
    return round_to(w_OK, jnp.repeat(scales_OG, GROUP, axis=-1), bits)


def round_to(w: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """The code of each weight, as a float; where the scale is 0, zero's."""
    zero = 2 ** (bits - 1)
    steps = jnp.where(scale == 0, 0.0, w / jnp.where(scale == 0, 1.0, scale))
    return jnp.clip(jnp.round(steps) + zero, 0, 2 * zero - 1)


@functools.partial(jax.jit, static_argnames="format")
def scales_of(w_OK: jax.Array, format: str) -> jax.Array:
    """The scale of each group of matrices [..., O, K] float32, as it is stored: [..., O, G]."""
    groups = w_OK.reshape(*w_OK.shape[:-1], -1, GROUP)
    scale = _scale_4(groups) if format == "int4" else _scale_to_ends(groups, BITS[format])
    return scale.astype(jnp.bfloat16).astype(jnp.float32)


def _scale_to_ends(w: jax.Array, bits: int) -> jax.Array:
    """As many steps to the largest weight of each group as there are: 127, or 31."""
    return jnp.max(jnp.abs(w), axis=-1) / (2 ** (bits - 1) - 1)


def _scale_4(w: jax.Array) -> jax.Array:
    """The scale of each group with the least squared error.

    Of some that put the largest weight at an end of the codes or beyond it, each made the best one
    for its codes, by least squares.
    """
    largest = jnp.take_along_axis(w, jnp.argmax(jnp.abs(w), axis=-1, keepdims=True), axis=-1)

    def better(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scale = largest / jnp.asarray(_STEPS, jnp.float32)[i]
        steps = round_to(w, scale, 4) - 8
        squares = jnp.sum(steps * steps, axis=-1, keepdims=True)
        scale = jnp.sum(w * steps, axis=-1, keepdims=True) / jnp.maximum(squares, 1)
        error = jnp.sum((w - scale * (round_to(w, scale, 4) - 8)) ** 2, axis=-1, keepdims=True)
        return jax.tree.map(
            lambda new, old: jnp.where(error < best[0], new, old), (error, scale), best
        )

    start = (jnp.full(largest.shape, jnp.inf, jnp.float32), jnp.zeros(largest.shape, jnp.float32))
    return jax.lax.fori_loop(0, len(_STEPS), better, start)[1][..., 0]
