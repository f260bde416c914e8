"""Reading the tensors of an HF or LTE folder into a parameter tree.

Every tensor is checked against the table of names.py before any is read. Then each array of ours
is filled from disk tensor by tensor, the part of it that a device holds straight into that
device's buffer, some rows at a time: beyond the result hardly any memory is taken.

Dimension key: N layers  E experts  M neurons per expert
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  numpy learns bfloat16, without which safetensors cannot return it
import numpy as np
import safetensors
from flax import traverse_util

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.errors import UserError, nearest
from lte_jax.files import read_json
from lte_jax.hf import names
from lte_jax.hf.config_json import DTYPES
from lte_jax.hf.names import Row, Span

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT_ORDER = "expert_order.safetensors"
STORED_DTYPES: dict[str, str] = dict(zip(("F32", "BF16", "F16"), DTYPES, strict=True))
_TIED_HEAD = "lm_head.weight"
_ROWS_AT_ONCE_BYTES = 1 << 22


def load_params(
    folder: Path,
    config: ModelConfig,
    lte: LTEConfig | None,
    dtype: str | None = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """The parameters in a folder, as the tree that `Transformer(config, lte)` has.

    Args:
      folder: of an HF model (dense) or an LTE model, safetensors only.
      config: as `read_config` tells it.
      lte: as `read_config` tells it.
      dtype: float32, bfloat16 or float16; None keeps what is stored.
      shardings: a tree of NamedSharding like that of the parameters; each part of an array is
        read by the process and onto the device that holds it. None: the default device.

    Raises:
      UserError: where a tensor is missing, unknown, misshapen, of another kind than float, or
        a file is absent or truncated; by its HF name, with both shapes.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {nearest(dtype, DTYPES)}")
    sizes = names.sizes(config, lte)
    placed: dict[str, Any] = traverse_util.flatten_dict(shardings or {}, sep="/")
    params = {}
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(Path(folder), stack)
        rows = names.table(config, lte)
        _drop_harmless(tensors, config)
        _check_names(folder, tensors, rows, sizes, config)
        for row in rows:
            array_dtype = dtype or _common_dtype(tensors, row, sizes)
            params[row.path] = _load_row(
                tensors, row, sizes, array_dtype, placed[row.path] if placed else None
            )
    return traverse_util.unflatten_dict(params, sep="/")


def load_expert_order(folder: Path) -> np.ndarray | None:
    """The neuron of the dense model in each slot of an LTE folder, int32 [N, E, M].

    None where the folder does not say.
    """
    path = Path(folder) / EXPERT_ORDER
    if not path.exists():
        return None
    with contextlib.ExitStack() as stack:
        return _open(path, stack).get_tensor("expert_order")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on disk; slicing reads that part."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "F32", "BF16", ...
    slices: Any

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        return self.slices[key]


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """All tensors of a folder by name; they can be read while `stack` is open.

    Raises:
      UserError: where there are no safetensors, a shard is absent or truncated, or the index and
        the shards disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    index = _index(folder)
    for file in sorted(set(index.values())) if index is not None else [ONE_FILE]:
        opened = _open(folder / file, stack)
        for name in opened.keys():  # noqa: SIM118  not a mapping
            if name in tensors:
                both = f"{tensors[name].file} and {folder / file}"
                raise UserError(f"{name} is both in {both}: download them again")
            slices = opened.get_slice(name)
            shape = tuple(slices.get_shape())
            tensors[name] = StoredTensor(folder / file, shape, slices.get_dtype(), slices)
    for name, file in (index or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(
                f"{folder / INDEX} says that {name} is in {file}, which does not hold it: "
                "download both again"
            )
    return tensors


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard, or None where one file holds all."""
    if (folder / ONE_FILE).exists():
        return None
    if not (folder / INDEX).exists():
        held = sorted(file.name for file in folder.glob("*.bin"))
        raise UserError(
            f"{folder} has neither {ONE_FILE} nor {INDEX}, and only safetensors are read: convert "
            f'{held[0] if held else "another format"} with python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder if held else 'MODEL'}')"
            ".save_pretrained('NEW_FOLDER')\", which needs torch"
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(
            f"{folder / INDEX} has no weight_map of tensor names to files: download it again"
        )
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            held = sum(shard == file for shard in index.values())
            raise UserError(
                f"{folder / file} is absent, but {INDEX} says that it holds {held} tensors: "
                "download it again"
            )
    return index


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(
            f"{path} is truncated or corrupt ({e}): download or copy it again"
        ) from None


def _drop_harmless(tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Removes what old exporters store besides the parameters, having checked that it agrees."""
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # rotary frequencies follow from config.json, as in transformers
    embedding = tensors.get("model.embed_tokens.weight")
    if not config.tie_embeddings or _TIED_HEAD not in tensors or embedding is None:
        return
    head = tensors[_TIED_HEAD]
    if not _equal(head, embedding):
        raise UserError(
            f"{head.file}: {_TIED_HEAD} differs from model.embed_tokens.weight, although "
            "config.json says tie_word_embeddings=true: set it to false, or remove the tensor"
        )
    del tensors[_TIED_HEAD]


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Whether two matrices are equal, reading a few rows of each at a time."""
    cuts = [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
    return a.shape == b.shape and all(np.array_equal(a[cut, :], b[cut, :]) for cut in cuts)


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
    if missing := [name for name in expected if name not in tensors]:
        first = f"{missing[0]} {expected[missing[0]].describe(sizes)}"
        raise UserError(
            f"{folder} lacks {first}{_more(missing)}, which config.json asks for ({model}): "
            + ("set tie_word_embeddings=true, or " if missing[0] == _TIED_HEAD else "")
            + "correct config.json or download the checkpoint again"
        )
    if extra := [name for name in tensors if name not in expected]:
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
                f"{name} has dtype {tensor.dtype}, expected {', '.join(STORED_DTYPES)}: "
                f"store {tensor.file} unquantised"
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
            _fill_slot(slot, tensors[hf_names[layer]], row, sizes, cut)
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
        slot[where] = row.read(tensor, sizes, {**cut, lead: Span(start, end)})


def _aligned_zeros(shape: list[int], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """Zeros at an address at which JAX on a CPU takes the buffer over in place of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)
