"""Reads the tensors of an HF or LTE folder into a parameter tree.

Every tensor is checked against the table of names.py before any is read. Then each array is filled
from disk tensor by tensor, a few rows at a time, each device's part straight into its buffer: this
takes hardly more memory than the result.

Dimension key: N layers  E experts  M neurons per expert
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.errors import UserError, nearest
from lte_jax.files import read_json
from lte_jax.hf import foreign, names, renaming, scaled, sentence
from lte_jax.hf.config_json import read_config
from lte_jax.hf.families import FAMILIES
from lte_jax.hf.fields import DTYPES
from lte_jax.hf.folder import CONFIG, EXPERT_ORDER, ONE_FILE, verify
from lte_jax.hf.names import Row, Span
from lte_jax.hf.stored import StoredTensor, open_file, open_tensors, say_once
from lte_jax.params import dimension_sizes, is_router

STORED_DTYPES: dict[str, str] = dict(zip(("F32", "BF16", "F16"), DTYPES, strict=True))
_ROWS_AT_ONCE_BYTES = 1 << 22


def load_params(
    folder: Path,
    config: ModelConfig,
    lte: LTEConfig | None,
    dtype: str | Mapping[str, str] | None = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """The parameters in a folder, as the parameter tree of `Transformer(config, lte)`.

    Args:
      folder: of an HF model (dense) or an LTE model, safetensors only.
      config: from `read_config`.
      lte: from `read_config`.
      dtype: float32, bfloat16 or float16, or that of each path; None keeps what is stored.
      shardings: a tree of NamedSharding like that of the parameters; each process reads the parts
        that its devices hold. None: the default device.

    Raises:
      UserError: if a tensor (named as in the file, with both shapes) is missing, unknown,
        misshapen or not floating point, a router's weights are not finite, or a file is missing,
        truncated or not as its manifest says.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {nearest(dtype, DTYPES)}")
    folder = Path(folder)
    verify(folder)
    sizes = dimension_sizes(config, lte)
    placed: dict[str, Any] = traverse_util.flatten_dict(shardings or {}, sep="/")
    params: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        tensors = open_parameters(folder, config, lte, stack)
        rows = names.table(config, lte)
        if format := scaled.format_of(read_json(folder / CONFIG)):
            if shardings is not None:
                raise UserError(
                    f"{folder} is in {format}, which is for inference on one device: name the "
                    "model that it was quantised from"
                )
            rows, params = _load_scaled(tensors, rows, format, sizes, str(dtype or config.dtype))
        _drop_tied_head(tensors, config)
        _check_names(folder, tensors, rows, sizes, config)
        for row in rows:
            own = dtype[row.path] if isinstance(dtype, Mapping) else dtype
            array_dtype = own or _common_dtype(tensors, row, sizes)
            params[row.path] = _load_row(
                tensors, row, sizes, array_dtype, placed[row.path] if placed else None
            )
    return traverse_util.unflatten_dict(params, sep="/")


def _load_scaled(
    tensors: dict[str, StoredTensor],
    rows: tuple[Row, ...],
    format: str,
    sizes: Mapping[str, int],
    dtype: str,
) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """The rows that are floats in a model of this format, and the other parameters by path."""
    held = {name: tensors.pop(name) for name in list(tensors) if scaled.is_part(name)}
    made = {row.path: scaled.load(row.path, format, held, sizes, dtype) for row in rows}
    floats = tuple(row for row in rows if made[row.path] is None)
    return floats, {path: value for path, value in made.items() if value is not None}


def check_params(folder: Path, config: ModelConfig) -> None:
    """Checks by names and shapes that a folder holds the parameters of a dense model.

    Raises:
      UserError: as `load_params` does.
    """
    rows, sizes = names.table(config, None), dimension_sizes(config, None)
    with contextlib.ExitStack() as stack:
        tensors = open_parameters(Path(folder), config, None, stack)
        _drop_tied_head(tensors, config)
        _check_names(Path(folder), tensors, rows, sizes, config)


def load_expert_order(folder: Path) -> np.ndarray | None:
    """The neuron of the dense model in each slot of an LTE folder, int32 [N, E, M], or None.

    Raises:
      UserError: if its manifest names the file but it is gone, or it is not a permutation of each
        layer's neurons.
    """
    folder = Path(folder)
    verify(folder)
    path = folder / EXPERT_ORDER
    if not path.exists():
        return None
    sizes = dimension_sizes(*read_config(folder))
    expected = tuple(sizes[letter] for letter in "NEM")
    with contextlib.ExitStack() as stack:
        tensor = open_file(path, stack).get("expert_order")
        if tensor is None or tensor.dtype != "I32" or tensor.shape != expected:
            found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise UserError(
                f"{path} holds {found} as expert_order, expected I32 {list(expected)} [num_layers, "
                "experts, expert_size]: copy the folder again"
            )
        order_NEM = tensor[:, :, :]
    check_expert_order(order_NEM, str(path))
    return order_NEM


def check_expert_order(order_NEM: np.ndarray, where: str) -> None:
    """Raises unless each layer names each of its neurons once; the error begins with `where`."""
    for layer, order_EM in enumerate(order_NEM):
        if not np.array_equal(np.sort(order_EM, axis=None), np.arange(order_EM.size)):
            raise UserError(
                f"{where}: layer {layer} of expert_order does not name each of {order_EM.size} "
                "neurons once: copy the folder, or make the experts, again"
            )


def open_parameters(
    folder: Path, config: ModelConfig, lte: LTEConfig | None, stack: contextlib.ExitStack
) -> dict[str, StoredTensor]:
    """As `open_tensors`, with stored names mapped to those of the table where possible."""
    tensors = open_tensors(folder, stack)
    if config.embed_dim is not None:
        below = open_file(folder / sentence.DENSE / ONE_FILE, stack)
        tensors |= {f"{sentence.DENSE}.{name}": tensor for name, tensor in below.items()}
    sizes, rows = dimension_sizes(config, lte), names.table(config, lte)
    expected = {name for row in rows for name in row.hf_names(sizes)}
    renamed, done = renaming.to_expected(tensors, expected, FAMILIES[config.family])
    if done and expected == set(renamed.values()):
        say_once(f"{folder}: {done}")
    return {new: tensors[old] for old, new in renamed.items()}


def _drop_tied_head(tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Removes a stored copy of a tied matrix, having checked that it is one."""
    named = FAMILIES[config.family].tensors
    head, embedding = (tensors.get(named[p][0]) for p in ("lm_head/kernel", "embed/embedding"))
    if not config.tie_embeddings or head is None or embedding is None:
        return
    if not _equal(head, embedding):
        raise UserError(
            f"{head.file}: {head.name} differs from {embedding.name}, although config.json says "
            "tie_word_embeddings=true: download both files again, or remove the tensor, which "
            "transformers ignores"
        )
    del tensors[named["lm_head/kernel"][0]]


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Whether two matrices are equal in the narrower type; reads a few rows at a time."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= STORED_DTYPES.keys():
        return False
    narrow = max(a.dtype, b.dtype, key=lambda dtype: (dtype != "F32", dtype == "BF16"))
    dtype = np.dtype(STORED_DTYPES[narrow])
    cuts = [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
    return all(
        np.array_equal(a[cut, :].astype(dtype), b[cut, :].astype(dtype), equal_nan=True)
        for cut in cuts
    )


def _check_names(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    rows: tuple[Row, ...],
    sizes: Mapping[str, int],
    config: ModelConfig,
) -> None:
    """Raises unless the tensors are exactly those of the table, with their shapes and dtypes."""
    expected = {name: row for row in rows for name in row.hf_names(sizes)}
    model = f"a {config.family} with num_hidden_layers={config.num_layers}"
    head = FAMILIES[config.family].tensors["lm_head/kernel"][0]
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        raw = read_json(folder / CONFIG)
        if found := foreign.misfit(raw, dtypes, missing, extra):
            raise UserError(f"{folder} {found}")
    if missing:
        first = f"{missing[0]} {expected[missing[0]].describe(sizes)}"
        raise UserError(
            f"{folder} lacks {first}{_more(missing)}, which config.json asks for ({model}): "
            + ("set tie_word_embeddings=true, or " if missing[0] == head else "")
            + "correct config.json or download the checkpoint again"
        )
    if extra:
        first = f"{extra[0]} {list(tensors[extra[0]].shape)}"
        raise UserError(
            f"{tensors[extra[0]].file} holds {first}{_more(extra)}, which config.json does not ask "
            f"for ({model}): correct config.json or remove the tensor"
        )
    for name, row in expected.items():
        tensor = tensors[name]
        if tensor.shape != row.hf_shape(sizes):
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, expected {row.describe(sizes)}: "
                f"correct config.json or replace {tensor.file}"
            )
        if tensor.dtype not in STORED_DTYPES:
            raise UserError(
                f"{tensor.file}: {name} has dtype {tensor.dtype}, expected "
                f"{', '.join(STORED_DTYPES)}: {foreign.dtype(folder, tensor.dtype)}"
            )


def _more(names_: list[str]) -> str:
    return f" and {len(names_) - 1} more" if len(names_) > 1 else ""


def _common_dtype(tensors: Mapping[str, StoredTensor], row: Row, sizes: Mapping[str, int]) -> str:
    """The dtype that one of our arrays is stored in."""
    first, *others = row.hf_names(sizes)
    for name in others:
        if tensors[name].dtype != tensors[first].dtype:
            raise UserError(
                f"{name} is {tensors[name].dtype} but {first} is {tensors[first].dtype}: "
                "give a dtype, to which both are converted"
            )
    return STORED_DTYPES[tensors[first].dtype]


def _load_row(
    tensors: Mapping[str, StoredTensor],
    row: Row,
    sizes: Mapping[str, int],
    dtype: str,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    shape, hf_names = row.shape(sizes), row.hf_names(sizes)

    def fill(index: tuple[slice, ...] | None) -> np.ndarray:
        """The part of our array that `index` cuts out; None: all of it."""
        index = index or (slice(None),) * len(shape)
        spans = [Span(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)]
        cut = dict(zip(row.ours, spans, strict=True))
        part = _aligned_zeros([span.stop - span.start for span in spans], np.dtype(dtype))
        layers = range(*cut["N"]) if row.layered else [0]
        for slot, layer in zip(part if row.layered else [part], layers, strict=True):
            with tensors[hf_names[layer]].opened() as tensor:
                _fill_slot(slot, tensor, row, sizes, cut)
            if is_router(row.path) and not np.isfinite(slot).all():
                raise UserError(
                    f"{tensor.file}: {tensor.name} has weights that are NaN or infinite, which no "
                    "router can choose experts by: take an older copy of the folder, or train again"
                )
        return part

    if sharding is None:
        return jax.device_put(fill(None))
    return jax.make_array_from_callback(shape, sharding, fill)


def _fill_slot(
    slot: np.ndarray,
    tensor: StoredTensor,
    row: Row,
    sizes: Mapping[str, int],
    cut: Mapping[str, Span],
) -> None:
    """Reads one HF tensor into our array of one layer, a few rows of the file at a time."""
    lead = row.lead(row.hf.split()[0], sizes)
    axis = row.ours.removeprefix("N").index(lead)
    first, stop = cut[lead]
    step = max(1, _ROWS_AT_ONCE_BYTES * (stop - first) // max(1, slot.nbytes))
    for start in range(first, stop, step):
        end = min(start + step, stop)
        where = (slice(None),) * axis + (slice(start - first, end - first),)
        with np.errstate(invalid="ignore"):  # NaN is kept: what runs the model names it
            slot[where] = row.read(tensor, sizes, {**cut, lead: Span(start, end)})


def _aligned_zeros(shape: list[int], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """Zeros, aligned so that JAX on a CPU uses the buffer without copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)
