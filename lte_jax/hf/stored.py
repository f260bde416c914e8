"""The tensors of a folder on disk: which files hold them, and how to read slices of them.

Format: github.com/huggingface/safetensors#format; shards have an index, as in transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy bfloat16, which safetensors returns
import numpy as np
import safetensors

from lte_jax.errors import UserError
from lte_jax.files import check_regular, read_json
from lte_jax.hf import foreign
from lte_jax.hf.folder import EXPERT_ORDER, INDEX, ONE_FILE

_MAX_HEADER_BYTES = 1 << 24  # 80,000 tensors and more; the library itself reads up to 100 MB
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_NOT_THE_MODEL = re.compile(r"adapter_|consolidated|optimizer|scheduler|random_states")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk; slicing reads a part of it."""

    name: str  # in the file
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "F32", "BF16", ...
    slices: Any

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        return self.slices[key]

    @contextlib.contextmanager
    def opened(self) -> Iterator[StoredTensor]:
        """Itself, from a mapping of the file that ends: what is read counts as memory till then."""
        with safetensors.safe_open(self.file, framework="numpy") as file:
            yield dataclasses.replace(self, slices=file.get_slice(self.name))


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """All tensors of a folder by name; they can be read while `stack` is open.

    Raises:
      UserError: if there are no safetensors, a shard is missing or truncated, or the index and the
        shards disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    index = _index(folder)
    for file in sorted(set(index.values())) if index is not None else _files(folder):
        for name, tensor in open_file(folder / file, stack).items():
            if name in tensors:
                both = f"{tensors[name].file} and {folder / file}"
                raise UserError(f"{name} is both in {both}: download them again")
            tensors[name] = tensor
    for name, file in (index or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(
                f"{folder / INDEX} says that {name} is in {file}, which does not hold it: "
                "download both again"
            )
    return tensors


def open_file(path: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file."""
    again = "download or copy it again"
    try:
        check_regular(path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if _MAX_HEADER_BYTES < header < path.stat().st_size:
            raise UserError(
                f"{path} has a header of {header:,} bytes: expected at most {_MAX_HEADER_BYTES:,}"
            )
        opened = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}): {again}") from None
    except safetensors.SafetensorError as e:
        raise UserError(f"{path} is truncated or corrupt ({e}): {again}") from None
    tensors = {}
    for name in opened.keys():  # noqa: SIM118  not a mapping
        part = opened.get_slice(name)
        tensors[name] = StoredTensor(name, path, tuple(part.get_shape()), part.get_dtype(), part)
    return tensors


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard; None if there is no index."""
    if (folder / ONE_FILE).exists() or not (folder / INDEX).exists():
        return None
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(
            f"{folder / INDEX} has no weight_map of tensor names to files: download it again"
        )
    for file in sorted(set(index.values())):
        if file in ("", "..") or re.search(r"[/\\\0]", file):
            raise UserError(
                f"{folder / INDEX} names the file {file!r}: expected a file of this folder, without"
                " a path"
            )
        if not os.path.exists(folder / file):
            held = sum(shard == file for shard in index.values())
            repository = foreign.unfinished(folder)
            raise UserError(
                f"{folder / file} is absent, but {INDEX} says that it holds {held} tensors: "
                + (f"hf download {repository}" if repository else "download it again")
            )
    return index


def _files(folder: Path) -> list[str]:
    """The files of a model without an index: one, or all of a numbered set, or all there are."""
    if (folder / ONE_FILE).exists():
        return [ONE_FILE]
    held = sorted(file.name for file in folder.glob("*.safetensors") if os.path.exists(file))
    held = [name for name in held if name != EXPERT_ORDER and not _NOT_THE_MODEL.match(name)]
    if not held:
        raise UserError(f"{folder} {foreign.only_other_formats(folder)}")
    numbered = [found for found in map(_SHARD.fullmatch, held) if found]
    for stem, count in sorted({(shard["stem"], int(shard["count"])) for shard in numbered}):
        whole = (f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))
        if absent := next((name for name in whole if name not in held), None):
            raise UserError(
                f"{folder / absent} is absent, but others of its set are there: download it again"
            )
    listed = ", ".join(held[:3]) + " and so on" * (len(held) > 3)
    say_once(f"{folder} has neither {ONE_FILE} nor {INDEX}: read from {listed}")
    return held


@functools.cache
def say_once(line: str) -> None:
    """Logs, once, how a folder unlike those of transformers was read."""
    log.warning(line)
