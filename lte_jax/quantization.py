"""Weights of 8, 6 and 4 bits for inference.

The large matrices, those of attention, experts, embedding and head, are rounded in groups of 32
inputs (kernels/quantized.py); routers' are rounded to bfloat16, in which decoding reads them; norms
and biases stay as they are. The kernels read the codes; wherever else a matrix is used
(training-like forward passes, prefill), it is made an array again, a layer at a time.

Dimension key: N layers  E experts  M neurons per expert  D model width
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.errors import UserError, nearest
from lte_jax.kernels import quantized
from lte_jax.kernels.quantized import BITS, GROUP, Quantized
from lte_jax.params import LAYERS, Row, dimension_sizes, is_router, table

# Outside the layers. Of 6 bits at least: babyllama (0.9 M parameters) loses 3.7% of perplexity by
# these two in 4 bits, and 4.2% by all others.
_OTHERS = ("embed/embedding", "lm_head/kernel")


def quantize(
    config: ModelConfig, lte: LTEConfig | None, params: Mapping[str, Any], format: str, dtype: str
) -> dict[str, Any]:
    """The parameters with their large matrices as `Quantized`, for computing in `dtype`.

    A dense FFN is cut into blocks of 32 neurons, as decoding does: [N, d_ff/32, 32, D].

    Raises:
      UserError: if the format is unknown, or a matrix has a number of inputs that is no multiple
        of 32.
    """
    if format not in BITS:
        raise UserError(f"quantize: format={format!r}: {nearest(format, BITS)}")
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    dimensions = dimension_sizes(config, lte)
    for row in table(config, lte):
        if kind := format_in(row, format):
            where = cut(row, dimensions)
            flat[row.path] = nearest_codes(row, flat[row.path], where, kind, dtype)
        elif is_coarse(row):
            flat[row.path] = coarse(flat[row.path])
    return traverse_util.unflatten_dict(flat, sep="/")


def is_coarse(row: Row) -> bool:
    """Whether a parameter is rounded to bfloat16: the matrices of routers."""
    return is_router(row.path) and row.is_matrix


def coarse(array: Any) -> Any:
    """An array with the values that bfloat16 has."""
    return jnp.asarray(array).astype(jnp.bfloat16).astype(array.dtype)


def format_in(row: Row, format: str) -> str | None:
    """That of a parameter in a model of this format; None: it is not rounded."""
    if row.path in _OTHERS:
        return _of_others(format)
    return format if row.layered and row.is_matrix and not is_router(row.path) else None


def _of_others(format: str) -> str:
    """That of _OTHERS in a model of this format."""
    return "int6" if format == "int4" else format


def format_of(params: Mapping[str, Any]) -> str | None:
    """The format of quantized parameters, None for others."""
    return min((w.format for w in _rounded(params)), key=lambda name: BITS[name], default=None)


def dtype_of(params: Mapping[str, Any]) -> str | None:
    """What is computed in with quantized parameters, None for others."""
    return next((jnp.dtype(w.dtype).name for w in _rounded(params)), None)


def _rounded(params: Mapping[str, Any]) -> list[Quantized]:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def widths(params: Mapping[str, Any], dtype: str) -> tuple[float, float]:
    """Bytes a weight of the layers' matrices, and of the head's, where floats are of `dtype`."""
    format = format_of(params)
    if format is None:
        return (float(jnp.dtype(dtype).itemsize),) * 2
    each = {name: (bits + 16 / GROUP) / 8 for name, bits in BITS.items()}
    return each[format], each[_of_others(format)]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the array of a parameter is cut into matrices."""

    lead: tuple[int, ...]  # layers and experts
    sizes: tuple[int, ...]  # of one matrix
    inputs: int
    inputs_first: bool

    @property
    def outputs(self) -> int:
        """O."""
        return math.prod(self.sizes) // self.inputs


def cut(row: Row, dimensions: Mapping[str, int]) -> Cut:
    """That of a parameter of a model with these dimensions."""
    shape, letters = row.shape(dimensions), row.letters
    if "EM" in letters and dimensions["E"] == 1 and dimensions["M"] % GROUP == 0:
        shape = (shape[0], dimensions["M"] // GROUP, GROUP, *shape[3:])
    own = letters.removeprefix("N").removeprefix("E")
    inputs = "M" if row.path == f"{LAYERS}ffn/down" else row.start
    lead, sizes = shape[: len(letters) - len(own)], shape[len(letters) - len(own) :]
    count = math.prod(sizes[own.index(letter)] for letter in inputs)
    return Cut(lead, sizes, count, own.startswith(inputs))


def straight_through(
    config: ModelConfig, lte: LTEConfig | None, params: Mapping[str, Any], format: str
) -> dict[str, Any]:
    """The parameters as `quantize` would round them, with gradients as if it did not.

    Training through them makes weights that lose less by rounding (Bengio et al. 2013).
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    dimensions = dimension_sizes(config, lte)
    for row in table(config, lte):
        if kind := format_in(row, format):
            array, where = flat[row.path], cut(row, dimensions)
            w = matrices(row, array, where, kind)
            w = quantized.rounded(w, kind, inputs_first=where.inputs_first).reshape(array.shape)
            flat[row.path] = array + jax.lax.stop_gradient(w - array)
        elif is_coarse(row):
            array = flat[row.path]
            flat[row.path] = array + jax.lax.stop_gradient(coarse(array) - array)
    return traverse_util.unflatten_dict(flat, sep="/")


def matrices(row: Row, array: Any, where: Cut, format: str) -> Any:
    """An array as matrices of inputs and outputs, [*lead, K, O] or [*lead, O, K]."""
    if where.inputs % GROUP:
        raise UserError(
            f"quantize: {row.path} {list(array.shape)} has {where.inputs} inputs an output: "
            f"{format} takes multiples of {GROUP}"
        )
    matrix = (where.inputs, where.outputs)
    return array.reshape(*where.lead, *(matrix if where.inputs_first else matrix[::-1]))


def nearest_codes(row: Row, array: Any, where: Cut, format: str, dtype: str) -> Quantized:
    """A parameter with each weight rounded to what is nearest."""
    array = matrices(row, array, where, format)
    how = {"inputs_first": where.inputs_first, "dtype": jnp.dtype(dtype)}
    if row.layered:  # a layer at a time: the floats between take four times a layer's room
        each = [quantized.quantize(one, format, **how) for one in array]
        made = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
    else:
        made = quantized.quantize(array, format, **how)
    return dataclasses.replace(made, sizes=where.sizes)
