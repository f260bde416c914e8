"""Writing a parameter tree as an HF folder (dense) or an LTE folder.

Dimension key: N layers  E experts  M neurons per expert
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.errors import UserError, nearest
from lte_jax.files import read_json, replacing
from lte_jax.hf import names
from lte_jax.hf.config_json import DTYPES, read_config, write_config
from lte_jax.hf.hub import COMPANIONS, resolve
from lte_jax.hf.names import Row
from lte_jax.hf.weights import EXPERT_ORDER, INDEX, ONE_FILE, STORED_DTYPES, open_tensors

_TAGS = {dtype: tag for tag, dtype in STORED_DTYPES.items()} | {"int32": "I32"}
_CONFIG = "config.json"


def save(
    folder: str | Path,
    config: ModelConfig,
    lte: LTEConfig | None,
    params: Mapping[str, Any],
    source: str | Path | None = None,
    expert_order: Any = None,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: Any = None,
) -> None:
    """Writes a model folder, whole or not at all.

    Args:
      folder: to be made; an older model folder there is replaced.
      config: the dense model.
      lte: None for a dense model.
      params: the tree of `Transformer(config, lte)`; fully addressable from this process.
      source: folder or hub id of the model these parameters come from: its config.json,
        tokenizer, generation config and licence are taken over. None: config.json is made.
      expert_order: int32 [N, E, M], the neuron of the dense model in each slot.
      dtype: of the stored tensors, routers aside, which keep theirs: rounding would move scores
        across the threshold. None: each as in `source`, else config.dtype.
      max_shard_bytes: larger models are cut into several files with an index.
      tokenizer: a transformers tokenizer to put in the folder, in place of that of `source`.

    Raises:
      UserError: where the parameters are not those of the model, `source` is another model, or
        the folder holds other things or cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {nearest(dtype, DTYPES)}")
    source = None if source is None else resolve(source)
    settings = _config_json(config, lte, source, dtype)
    tensors = _plan(config, lte, params, source, dtype)
    order = None if expert_order is None else _plan_order(config, lte, expert_order)
    _check_replaceable(Path(folder))
    with replacing(Path(folder)) as new:
        if source is not None:
            _copy_companions(source, new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if isinstance(settings, Path):
            shutil.copyfile(settings, new / _CONFIG)
        else:
            (new / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _write_weights(new, tensors, max_shard_bytes)
        if order is not None:
            _write_safetensors(new / EXPERT_ORDER, [order])


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """An HF tensor to be written: one layer of one of our arrays, fetched when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    array: Any
    layer: int | None = None
    row: Row | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def fetch(self) -> np.ndarray:
        """Its values on the host, in the stored layout and dtype."""
        array = np.asarray(self.array if self.layer is None else self.array[self.layer])
        if self.row is not None:
            array = self.row.to_hf(array, self.sizes)
        return np.ascontiguousarray(array.astype(self.dtype, copy=False))


def _config_json(
    config: ModelConfig, lte: LTEConfig | None, source: Path | None, dtype: str | None
) -> dict[str, Any] | Path:
    """The object for config.json, or the path of the one that can be copied unchanged."""
    if source is None:
        settings = write_config(config, dtype or config.dtype)
    else:
        _check_source(config, source)
        settings = read_json(source / _CONFIG)
        if lte is None and dtype is None and "lte" not in settings:
            return source / _CONFIG
        settings.pop("lte", None)
        if dtype is not None:
            settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = dtype
    return settings if lte is None else settings | {"lte": dataclasses.asdict(lte)}


def _check_source(config: ModelConfig, source: Path) -> None:
    theirs = read_config(source)[0]
    for field in dataclasses.fields(config):
        mine, other = getattr(config, field.name), getattr(theirs, field.name)
        if mine != other and field.name != "dtype":
            raise UserError(
                f"source {source} has {field.name}={other!r}, the model to be saved {mine!r}: "
                "name the folder the model was made from, or none"
            )


def _plan(
    config: ModelConfig,
    lte: LTEConfig | None,
    params: Mapping[str, Any],
    source: Path | None,
    dtype: str | None,
) -> list[_Tensor]:
    """Every tensor to be written, checked but not yet fetched."""
    sizes, rows = names.sizes(config, lte), names.table(config, lte)
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    for path in sorted(flat.keys() ^ {row.path for row in rows}):
        problem = "is not a parameter of" if path in flat else "is missing from"
        raise UserError(f"{path} {problem} the model to be saved: config and params must agree")
    stored = {}
    if source is not None and dtype is None:
        with contextlib.ExitStack() as stack:
            known = open_tensors(source, stack)
            stored = {name: STORED_DTYPES.get(tensor.dtype) for name, tensor in known.items()}
    planned = []
    for row in rows:
        array = flat[row.path]
        if array.shape != row.shape(sizes):
            raise UserError(
                f"{row.path} has shape {list(array.shape)}, expected {list(row.shape(sizes))}: "
                "config and params must agree"
            )
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise UserError(f"{row.path} is spread over several processes: gather it before saving")
        own = str(array.dtype) if row.path.startswith("layers/ffn/router/") else None
        for layer, name in enumerate(row.hf_names(sizes)):
            kept = own or dtype or stored.get(name) or config.dtype
            where = layer if row.layered else None
            planned.append(_Tensor(name, kept, row.hf_shape(sizes), array, where, row, sizes))
    return planned


def _plan_order(config: ModelConfig, lte: LTEConfig | None, order_NEM: Any) -> _Tensor:
    sizes = names.sizes(config, lte)
    expected = tuple(sizes[letter] for letter in "NEM")
    if lte is None or np.shape(order_NEM) != expected:
        raise UserError(
            f"expert_order has shape {list(np.shape(order_NEM))}, expected [num_layers, experts, "
            f"expert_size]={list(expected)} of an LTE model"
        )
    return _Tensor("expert_order", "int32", expected, order_NEM)


def _write_weights(folder: Path, tensors: list[_Tensor], max_shard_bytes: int) -> None:
    """One file, or several with an index, named as transformers names them."""
    shards: list[list[_Tensor]] = [[]]
    for tensor in sorted(tensors, key=lambda t: t.name):
        filled = sum(t.num_bytes for t in shards[-1])
        if filled and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_safetensors(folder / ONE_FILE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, tensors: list[_Tensor]) -> None:
    """A safetensors file, one tensor at a time (safetensors' own writer wants all in memory).

    Format: github.com/huggingface/safetensors#format. A little-endian length, a JSON header, the
    tensors without gaps; wide types first, so that each is aligned.
    """
    tensors = sorted(tensors, key=lambda t: -np.dtype(t.dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    start = 0
    for tensor in tensors:
        stop = start + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _TAGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.fetch().reshape(-1).view(np.uint8).data)


def _copy_companions(source: Path, new: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and _matches(file.name, COMPANIONS):
            shutil.copyfile(file, new / file.name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _check_replaceable(folder: Path) -> None:
    """Raises where writing `folder` would destroy anything but an older model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder to write the model to")
    ours = (_CONFIG, INDEX, EXPERT_ORDER, "model*.safetensors", *COMPANIONS)
    held = sorted(folder.iterdir())
    foreign = [entry.name for entry in held if entry.is_dir() or not _matches(entry.name, ours)]
    if held and not foreign and not (folder / _CONFIG).exists():
        foreign = [held[0].name]
    if foreign:
        raise UserError(
            f"{folder} holds {foreign[0]}, which is not part of a model, and would be replaced: "
            "choose another folder, or empty this one"
        )
