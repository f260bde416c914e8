"""Writes a parameter tree as an HF folder (dense) or an LTE folder.

Dimension key: N layers  E experts  M neurons per expert
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lte_jax import quantization, sharding
from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.errors import UserError, nearest
from lte_jax.files import expand, read_json, replacing, write_manifest
from lte_jax.hf import names, scaled, sentence
from lte_jax.hf.config_json import parse, read_config, write_config
from lte_jax.hf.families import FAMILIES
from lte_jax.hf.family import HEAD
from lte_jax.hf.fields import DTYPES
from lte_jax.hf.folder import CONFIG, EXPERT_ORDER, INDEX, ONE_FILE, check_replaceable, companions
from lte_jax.hf.hub import resolve
from lte_jax.hf.names import Row
from lte_jax.hf.weights import STORED_DTYPES, check_expert_order, open_parameters
from lte_jax.kernels.quantized import Quantized
from lte_jax.params import dimension_sizes, is_router

_TAGS = {dtype: tag for tag, dtype in STORED_DTYPES.items()} | {"int32": "I32", "uint8": "U8"}


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
    """Writes a model folder, whole or not at all; one tensor at a time is on the host.

    With several processes all must call it; process 0 writes, and the others return once they have
    done their part in gathering the tensors, before the folder is whole.

    Args:
      folder: the folder to make; an older model folder there is replaced.
      config: the dense model.
      lte: None for a dense model.
      params: the tree of `Transformer(config, lte)`, on one device or spread over many.
      source: folder or hub id of the model these parameters come from: its config.json,
        tokenizer, generation config and licence are copied. None: config.json is made.
      expert_order: int32 [N, E, M], the neuron of the dense model in each slot.
      dtype: of the stored tensors, except routers, which keep theirs: rounding would move scores
        across the threshold. None: that of each parameter; "source": that of each in `source`.
      max_shard_bytes: larger models are split into several files with an index.
      tokenizer: a transformers tokenizer to save instead of that of `source`.

    Raises:
      UserError: if the parameters are not the model's, `source` is another model, or the folder
        holds other things or cannot be written.
    """
    valid = DTYPES if source is None else (*DTYPES, "source")
    if dtype is not None and dtype not in valid:
        raise UserError(f"dtype={dtype!r}: {nearest(dtype, valid)}")
    source = None if source is None else resolve(source)
    if source is not None:
        _check_source(config, source)
    raw = _config_json(config, lte, source, quantization.format_of(params))
    stored = _stored_dtypes(source) if source is not None and dtype == "source" else {}
    tensors = _plan(config, lte, params, dtype, stored)
    order = None if expert_order is None else _plan_order(config, lte, expert_order)
    folder = expand(folder)
    if jax.process_index() != 0:
        return _take_part(tensors, max_shard_bytes)
    check_replaceable(folder)
    with replacing(folder) as new:
        for file in companions(source) if source is not None else ():
            shutil.copyfile(file, new / file.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        sentence.write(new, config, source)
        _write_config(new, raw, source, quantization.dtype_of(params) or _main_dtype(tensors))
        _write_weights(new, tensors, max_shard_bytes)
        if order is not None:
            _write_safetensors(new / EXPERT_ORDER, [order])
        write_manifest(new)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """An HF tensor to be written: one layer of one of our arrays, or of several, side by side."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    arrays: list[tuple[Any, Row | None]]  # Row None: as it is
    layer: int | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def gather(self) -> list[Any]:
        """Its parts, whole in every process; all must call this, in the same order."""
        return [sharding.gathered(array, self.layer) for array, _ in self.arrays]

    def fetch(self) -> np.ndarray:
        """Its values on the host, in the stored layout and dtype; see `gather`."""
        parts, axis = {}, 0
        for gathered, (_, row) in zip(self.gather(), self.arrays, strict=True):
            part = np.asarray(gathered)
            axis, begin = row.place(self.sizes) if row else (0, 0)
            parts[begin] = row.to_hf(part, self.sizes) if row else part
        whole = np.concatenate([parts[begin] for begin in sorted(parts)], axis).reshape(self.shape)
        return np.ascontiguousarray(whole.astype(self.dtype, copy=False))


def _config_json(
    config: ModelConfig, lte: LTEConfig | None, source: Path | None, format: str | None
) -> dict[str, Any]:
    """The object for config.json; that of `source` if there is one."""
    if source is None:
        raw = write_config(config, config.dtype)
    else:
        raw, family = read_json(source / CONFIG), FAMILIES[config.family]
        different = _differs(config, parse(raw, CONFIG)[0], sentence.FIELDS)
        if "activation" in different:  # source.activation of an experiment
            key = family.keys["activation"]
            raw |= {key.name: key.write(config.activation)}
        if {*different} & {*HEAD}:
            raw |= family.write_head(config)
    raw.pop("lte", None)
    raw.pop(scaled.KEY, None)
    if format is not None:
        raw |= {scaled.KEY: scaled.setting(format)}
    return raw if lte is None else raw | {"lte": dataclasses.asdict(lte)}


def _write_config(new: Path, raw: dict[str, Any], source: Path | None, dtype: str) -> None:
    """Writes config.json with this dtype: a copy of that of `source` if they agree."""
    if parse(raw, CONFIG)[0].dtype != dtype:
        raw = raw | {"torch_dtype" if "torch_dtype" in raw else "dtype": dtype}
    if source is not None and raw == read_json(source / CONFIG):
        shutil.copyfile(source / CONFIG, new / CONFIG)
    else:
        (new / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _main_dtype(tensors: list[_Tensor]) -> str:
    """The dtype for config.json: that of most weights, routers aside."""
    numbers: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        if all(row and not is_router(row.path) for _, row in tensor.arrays):
            numbers[tensor.dtype] += math.prod(tensor.shape)
    return max(DTYPES, key=lambda dtype: numbers[dtype])


def _check_source(config: ModelConfig, source: Path) -> None:
    theirs = read_config(source)[0]
    besides = sentence.FIELDS if config.head == "classes" != theirs.head else ()
    for name in _differs(config, theirs, (*HEAD, "activation", *besides)):
        raise UserError(
            f"source {source} has {name}={getattr(theirs, name)!r}, the model to be saved "
            f"{getattr(config, name)!r}: name the folder the model was made from, or none"
        )


def _differs(config: ModelConfig, other: ModelConfig, besides: tuple[str, ...]) -> list[str]:
    """The fields, but for the stored type and `besides`, in which two configs differ."""
    names_ = {field.name for field in dataclasses.fields(config)} - {"dtype", *besides}
    return sorted(name for name in names_ if getattr(config, name) != getattr(other, name))


def _stored_dtypes(source: Path) -> dict[str, str | None]:
    """Name -> type of the tensors of a folder."""
    with contextlib.ExitStack() as stack:
        known = open_parameters(source, *read_config(source), stack)
        return {name: STORED_DTYPES.get(tensor.dtype) for name, tensor in known.items()}


def _kept(stored: Mapping[str, str | None], name: str, config: ModelConfig) -> str | None:
    """The type of a tensor in the source, where it may have no head and so no prefix."""
    return stored.get(name) or stored.get(name.removeprefix(FAMILIES[config.family].prefix))


def _plan(
    config: ModelConfig,
    lte: LTEConfig | None,
    params: Mapping[str, Any],
    dtype: str | None,
    stored: Mapping[str, str | None],
) -> list[_Tensor]:
    """Every tensor to be written, checked but not yet fetched."""
    sizes, rows = dimension_sizes(config, lte), names.table(config, lte)
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    for path in sorted(flat.keys() ^ {row.path for row in rows}):
        problem = "is not a parameter of" if path in flat else "is missing from"
        raise UserError(f"{path} {problem} the model to be saved: config and params must agree")
    planned: dict[str, _Tensor] = {}
    for row in rows:
        array = flat[row.path]
        if isinstance(array, Quantized):
            for name, kind, shape, part, layer in scaled.parts(row.path, array):
                planned[name] = _Tensor(name, kind, shape, [(part, None)], layer)
            continue
        if array.shape != row.shape(sizes):
            raise UserError(
                f"{row.path} has shape {list(array.shape)}, expected {list(row.shape(sizes))}: "
                "config and params must agree"
            )
        own = str(array.dtype)
        if own not in DTYPES and (dtype is None or is_router(row.path)):
            raise UserError(
                f"{row.path} is {own}, expected {', '.join(DTYPES)}: convert it, or give a dtype"
            )
        for layer, name in enumerate(row.hf_names(sizes)):
            kept = _kept(stored, name, config) or own if dtype == "source" else dtype or own
            kept = own if is_router(row.path) else kept
            where = layer if row.layered else None
            shared = planned.get(name)
            if shared is None:
                parts = [(array, row)]
                planned[name] = _Tensor(name, kept, row.hf_shape(sizes), parts, where, sizes)
            elif shared.dtype == kept:
                shared.arrays.append((array, row))
            else:
                raise UserError(
                    f"{row.path} is {kept}, but {shared.dtype} in others of {name}: give a dtype"
                )
    return list(planned.values())


def _plan_order(config: ModelConfig, lte: LTEConfig | None, order_NEM: Any) -> _Tensor:
    sizes = dimension_sizes(config, lte)
    expected = tuple(sizes[letter] for letter in "NEM")
    if lte is None or np.shape(order_NEM) != expected:
        raise UserError(
            f"expert_order has shape {list(np.shape(order_NEM))}, expected [num_layers, experts, "
            f"expert_size]={list(expected)} of an LTE model"
        )
    check_expert_order(np.asarray(order_NEM), "expert_order")
    return _Tensor("expert_order", "int32", expected, [(order_NEM, None)])


def tensors(config: ModelConfig, params: Mapping[str, Any], dtype: str | None) -> list[_Tensor]:
    """The tensors of a dense model's HF folder: `name`, `dtype`, `shape`, and `fetch()`.

    Raises:
      UserError: if the parameters are not the model's.
    """
    return _plan(config, None, params, dtype, {})


def _files(tensors: list[_Tensor], max_shard_bytes: int) -> dict[str, list[_Tensor]]:
    """The files of a model, named as transformers names them, and what each holds, in order.

    A dense layer for embeddings has a folder of its own, where names are without it. In a file wide
    types come first, so that each tensor is aligned.
    """
    prefix = f"{sentence.DENSE}."
    below = [
        dataclasses.replace(t, name=t.name.removeprefix(prefix))
        for t in tensors
        if t.name.startswith(prefix)
    ]
    shards: list[list[_Tensor]] = [[]]
    for tensor in sorted(tensors, key=lambda t: t.name):
        if tensor.name.startswith(prefix):
            continue
        filled = sum(t.num_bytes for t in shards[-1])
        if filled and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    many = len(shards) > 1
    named = {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" if many else ONE_FILE: shard
        for i, shard in enumerate(shards, 1)
    }
    files = {f"{sentence.DENSE}/{ONE_FILE}": below} | named if below else named
    widest_first = lambda t: -np.dtype(t.dtype).itemsize  # noqa: E731
    return {name: sorted(held, key=widest_first) for name, held in files.items()}


def _take_part(tensors: list[_Tensor], max_shard_bytes: int) -> None:
    """Gathers all that `_write_weights` of process 0 gathers, in the same order."""
    for held in _files(tensors, max_shard_bytes).values():
        for tensor in held:
            tensor.gather()


def _write_weights(folder: Path, tensors: list[_Tensor], max_shard_bytes: int) -> None:
    """The files of a model, and an index if there are several."""
    files = _files(tensors, max_shard_bytes)
    for file, held in files.items():
        _write_safetensors(folder / file, held)
    weight_map = {t.name: file for file, held in files.items() if "/" not in file for t in held}
    if len({*weight_map.values()}) > 1:
        total = sum(t.num_bytes for file, held in files.items() if "/" not in file for t in held)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, tensors: list[_Tensor]) -> None:
    """Writes a safetensors file tensor by tensor (safetensors' own writer needs all in memory).

    Format: github.com/huggingface/safetensors#format. A little-endian length, a JSON header, the
    tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
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
