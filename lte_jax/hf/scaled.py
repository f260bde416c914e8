"""Weights of 8, 6 and 4 bits in a folder: two tensors for each layer of a parameter.

`layers.attn.q.kernel.3.q` are the codes of layer 3, uint8, and `layers.attn.q.kernel.3.scale` their
scales, bfloat16, in the order of kernels/quantized.py: reading them is no work, and gives the same
bits. Names are those of the parameter tree (params.py). config.json says so in its
`quantization_config`, so that other programs refuse the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import quantization
from lte_jax.errors import UserError, nearest
from lte_jax.hf.stored import StoredTensor
from lte_jax.kernels.quantized import BITS, GROUP, Quantized, packed_shapes
from lte_jax.params import BY_PATH, Row

KEY, _METHOD = "quantization_config", "lte_jax"
_TYPES = {"q": ("uint8", "U8"), "scale": ("bfloat16", "BF16")}


def setting(format: str) -> dict[str, Any]:
    """What config.json says under KEY of a model in this format."""
    return {"quant_method": _METHOD, "format": format, "group_size": GROUP}


def format_of(raw: Mapping[str, Any]) -> str | None:
    """The format of the model with this config.json; None: it is not ours, or has none.

    Raises:
      UserError: if it is ours, but unknown.
    """
    found = raw.get(KEY)
    if not isinstance(found, Mapping) or found.get("quant_method") != _METHOD:
        return None
    if found.get("format") not in BITS or found.get("group_size") != GROUP:
        raise UserError(
            f"{KEY}: format={found.get('format')!r}, group_size={found.get('group_size')!r}: "
            f"{nearest(found.get('format'), BITS)}, in groups of {GROUP}"
        )
    return str(found["format"])


def parts(
    path: str, made: Quantized
) -> Iterator[tuple[str, str, tuple[int, ...], Any, int | None]]:
    """Of a parameter each tensor's name, type, shape, array and layer (None: all of the array)."""
    row = BY_PATH[path]
    for suffix, array in (("q", made.codes), ("scale", made.scales)):
        for layer in range(array.shape[0]) if row.layered else [None]:
            shape = tuple(array.shape[row.layered :])
            yield _name(row, layer, suffix), _TYPES[suffix][0], shape, array, layer


def load(
    path: str,
    format: str,
    tensors: Mapping[str, StoredTensor],
    dimensions: Mapping[str, int],
    dtype: str,
) -> Quantized | None:
    """A parameter of a model in this format; None: the format leaves it as it is.

    Args:
      path: of the parameter.
      format: of the model.
      tensors: by name; those of the parameter are looked up.
      dimensions: of the model.
      dtype: to compute in.

    Raises:
      UserError: if a tensor is missing, or has another shape or type than the model asks for.
    """
    row = BY_PATH[path]
    kind = quantization.format_in(row, format)
    if kind is None:
        return None
    where = quantization.cut(row, dimensions)
    layers = range(dimensions["N"]) if row.layered else [None]
    arrays = []
    for suffix, shape in zip(_TYPES, packed_shapes(where.inputs, where.outputs, kind), strict=True):
        shape = (*where.lead[row.layered :], *shape)
        read = [_read(_name(row, layer, suffix), suffix, shape, tensors) for layer in layers]
        arrays.append(jnp.asarray(np.stack(read) if row.layered else read[0]))
    made = Quantized(*arrays, kind, where.sizes, where.inputs_first, jnp.dtype(dtype))
    return jax.block_until_ready(made)


def is_part(name: str) -> bool:
    """Whether a tensor is one of ours, by its name."""
    return name.endswith((".q", ".scale"))


def _name(row: Row, layer: int | None, suffix: str) -> str:
    return ".".join((*row.path.split("/"), *([] if layer is None else [str(layer)]), suffix))


def _read(
    name: str, suffix: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]
) -> np.ndarray:
    expected = f"{_TYPES[suffix][1]} {list(shape)}"
    if name not in tensors:
        raise UserError(f"{name} {expected} is missing: copy the folder, or quantise, again")
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype != _TYPES[suffix][1]:
        raise UserError(
            f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {expected}: "
            "copy the folder, or quantise, again"
        )
    return tensor[(slice(None),) * len(shape)]
