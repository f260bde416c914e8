"""Records on disk: shards that are read record by record, and the manifest that names them.

    train-00000-of-00004.array_record ...     ArrayRecord files
    validation-00000-of-00001.array_record
    manifest.json                             what they were made of, how many, and their digests

A stored record is the bytes of its L tokens, then of its L segments, as little-endian numbers of
the manifest's type. preparing.py writes such a folder, `opened` reads it: training records as they
are asked for, by their number, so memory does not grow with them.

Dimension key: L length  R records
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from lte_jax import files, interrupt
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data.building import check, check_enough
from lte_jax.data.packing import Records
from lte_jax.data.sources import local_path
from lte_jax.data.tokens import digest
from lte_jax.errors import UserError, one_line

KIND = "lte_jax records 1"  # with the version of the format
BEGUN = ".begun"  # folder within, while it is being prepared
ENDING = ".array_record"
# Eight records are compressed together: of 2,048 tokens, one of them is read in 50 us, and a reader
# holds 4 bytes a record of where they lie (alone 13 us and 30 bytes, 16 together 80 us).
_WRITING = "group_size:8,zstd:1"
_READING = "readahead_buffer_size:0,max_parallelism:0"  # one record at a time, from any place
_AGAIN = "prepare the texts again, or copy the folder again"


class _Shard:
    """A file of records, opened when one is asked for; for any thread."""

    def __init__(self, path: Path):
        self._path, self._lock, self._reader = path, threading.Lock(), None

    def read(self, number: int) -> bytes:
        """One record."""
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if self._reader is None:
                self._reader = ArrayRecordReader(str(self._path), _READING)
            # Of a list of numbers, it would take a time that grows with the file.
            [record] = self._reader.read(number, number + 1)
            return record


class Stored(Records):
    """Records of shards, read when they are asked for; all else is as of those in memory."""

    threads = 4

    def __init__(self, folder: Path, listed: Mapping[str, Any], length: int, dtype: str):
        """Opens nothing yet.

        Args:
          folder: that the shards lie in.
          listed: the manifest's entry of these records.
          length: L.
          dtype: of the stored numbers.
        """
        names, numbers = zip(*listed["shards"], strict=True)
        self.__dict__.update(  # the class is frozen
            folder=folder,
            listed=listed,
            more=MappingProxyType({}),
            _length=length,
            _dtype=np.dtype(dtype),
            _shards=[_Shard(folder / name) for name in names],
            _stops=[*itertools.accumulate(numbers)],
        )

    @property
    def length(self) -> int:
        """L."""
        return self._length

    def __len__(self) -> int:
        return self.listed["records"]

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        numbers = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        both_R2L = np.empty((numbers.size, 2, self.length), np.int32)
        for row, number in enumerate(numbers.ravel().tolist()):
            both_R2L[row] = self._read(range(len(self))[number])
        both = both_R2L.reshape(*numbers.shape, 2, self.length)
        return {"tokens": both[..., 0, :], "segments": both[..., 1, :]}

    def _read(self, number: int) -> np.ndarray:
        """Tokens and segments [2, L] of a record."""
        at = bisect.bisect_right(self._stops, number)
        before = self._stops[at - 1] if at else 0
        try:
            record = self._shards[at].read(number - before)
            return np.frombuffer(record, self._dtype).reshape(2, self.length)
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise UserError(
                f"{self.folder}: record {number} cannot be read ({one_line(error)}): {_AGAIN}"
            ) from None

    @property
    def tokens_RL(self) -> Any:
        """Read by index; all of them if they are made an array."""
        return _Column(self, "tokens")

    @property
    def segments_RL(self) -> Any:
        """As `tokens_RL`."""
        return _Column(self, "segments")

    @property
    def num_tokens(self) -> int:
        """How many tokens are not padding."""
        return self.listed["tokens"]

    def take(self, chosen: np.ndarray) -> Records:
        """These records, in memory."""
        return Records(**{f"{name}_RL": array for name, array in self[chosen].items()})

    def digest(self) -> str:
        """Of all shards' digests; no file is read."""
        return self.listed["digest"]


class _Column:
    """Tokens, or segments, [R, L] of stored records."""

    def __init__(self, records: Stored, name: str):
        self._records, self._name = records, name
        self.shape = len(records), records.length

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._records[index][self._name]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


# ----------------------------------------------------------------------------------------- writing


def type_of(model_config: ModelConfig, length: int) -> str:
    """The type of stored numbers that holds every token and every segment."""
    return "<u2" if max(model_config.vocab_size, length + 1) <= 2**16 else "<i4"


def write(path: Path, groups: Iterable[Records], dtype: str) -> dict[str, Any]:
    """Writes a shard atomically; the same records make the same bytes.

    Returns:
      Numbers of records and tokens, the largest token, and the file's size and SHA-256.

    Raises:
      UserError: if it cannot be written.
    """
    from array_record.python import array_record_module

    records = tokens = 0
    largest = -1
    half = path.with_name(f".{path.name}.half-written")
    with files.explained(path):
        half.touch()  # what is wrong with the place, in the system's words
        try:
            writer = array_record_module.ArrayRecordWriter(str(half), _WRITING)
            for group in groups:
                both_R2L = np.stack([group.tokens_RL, group.segments_RL], 1).astype(dtype)
                for both_2L in both_R2L:
                    writer.write(both_2L.tobytes())
                records, tokens = records + len(group), tokens + group.num_tokens
                largest = max(largest, int(group.tokens_RL.max(initial=-1)))
            writer.close()
            files.sync(half)
            found = {"size": half.stat().st_size, "sha256": files.sha256(half)}
            half.replace(path)
            files.sync(path.parent)
        except RuntimeError as error:  # of ArrayRecord
            raise OSError(0, one_line(error)) from None
        finally:
            half.unlink(missing_ok=True)
    return {"records": records, "tokens": tokens, "largest": largest} | found


def listing(written: Mapping[str, Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """The manifest's entry of records, of what `write` returned for each shard."""
    total = {key: sum(found[key] for found in written.values()) for key in ("records", "tokens")}
    shards = [[name, found["records"]] for name, found in written.items()]
    joined = "".join(found["sha256"] for found in written.values())
    whole = hashlib.sha256(joined.encode()).hexdigest()
    return total | {"digest": whole, "shards": shards} | more


# ----------------------------------------------------------------------------------------- reading


def prepared(source: str) -> Path | None:
    """The folder that a source names, if it is one of shards, finished or not."""
    folder = local_path(source)
    try:
        names = [path.name for path in folder.iterdir()] if source else []
    except OSError:
        return None
    return folder if any(n == BEGUN or n.endswith(ENDING) for n in names) else None


def manifest(folder: Path) -> dict[str, Any]:
    """What the folder holds and was made of.

    Raises:
      UserError: if it is not finished, or none of preparing.py.
    """
    if not (folder / files.MANIFEST).exists():
        raise UserError(
            f"{folder} has no {files.MANIFEST}: expected a finished folder of shards: run the "
            "command that prepares it again, which goes on where it stopped"
        )
    try:
        found = files.read_manifest(folder)
    except files.Damaged as damage:
        raise UserError(f"{folder} is not as it was written: {damage}: {_AGAIN}") from None
    if found.get("kind") != KIND:
        raise UserError(
            f"{folder} holds {found.get('kind', 'something else')!r}, expected {KIND!r}: prepare "
            "the texts again with this version"
        )
    return found


def opened(
    folder: Path,
    data: DataConfig,
    tokenizer: Any,
    model_config: ModelConfig,
    seed: int,
    end: int | None,
) -> tuple[Stored, Records]:
    """Training records, read as they are asked for, and validation records, in memory.

    Of several processes each reads its share of the shards through, for their digests.

    Args:
      folder: of shards.
      data: of the run, whose records they are to be.
      tokenizer: the run's.
      model_config: the run's, for its vocabulary and length.
      seed: of the choice of validation records, if fewer are wanted than there are.
      end: the id that ends the run's training documents.

    Raises:
      UserError: if they are damaged, or other ones than the run asks for.
    """
    found = manifest(folder)
    check(dataclasses.replace(data, validation=""), tokenizer, model_config)
    _check_same(folder, found, data, digest(tokenizer), end)
    largest = found["largest_token"]
    if largest >= model_config.vocab_size:
        raise UserError(
            f"{folder} holds token id {largest}, outside the model's vocabulary of "
            f"{model_config.vocab_size}: prepare the texts for this model"
        )
    _check_files(folder, found["files"])
    how = found["length"], found["dtype"]
    train, kept = (Stored(folder, found[part], *how) for part in ("train", "validation"))
    check_enough(data, len(train))
    validation = kept.take(np.arange(len(kept)))
    validation = validation.some(data.max_validation_records, np.random.default_rng(seed))
    return train, dataclasses.replace(validation, whole=found["validation"]["whole"])


def _check_same(
    folder: Path, found: Mapping[str, Any], data: DataConfig, tokenizer: str, end: int | None
) -> None:
    """Refuses records that were made otherwise than the run asks for."""
    again = "or prepare the texts again"
    for key, value in (("length", data.length), ("pack", data.pack)):
        if found[key] != value:
            raise UserError(
                f"data.{key}={value}: {folder} holds records of data.{key}={found[key]}: set that, "
                f"{again}"
            )
    if found["tokenizer"] != tokenizer:
        raise UserError(
            f"{folder} was prepared with another tokenizer (SHA-256 {found['tokenizer'][:8]}) than "
            f"the run's ({tokenizer[:8]}): set source.tokenizer to that one, {again}"
        )
    if found["end_token"] != end:
        raise UserError(
            f"data.end_token={data.end_token!r} is token {end}: {folder} holds documents that end "
            f"with {found['end_token']}: set 'auto' to take that, {again}"
        )
    plain = DataConfig()
    for key, value in (("validation", found["validation_source"]), *found["reading"].items()):
        asked = getattr(data, key)
        if asked not in (value, getattr(plain, key)):
            raise UserError(
                f"data.{key}={asked!r}: {folder} was prepared with {value!r}: leave it out, {again}"
            )


def _check_files(folder: Path, listed: Mapping[str, Sequence[Any]]) -> None:
    """Refuses files of another size, and of this process's share those of another digest."""
    mine = {*itertools.islice(listed, jax.process_index(), None, jax.process_count())}
    for name, (size, sha) in listed.items():
        interrupt.check("while checking shards")
        path, wrong = folder / name, ""
        if not path.is_file():
            wrong = "is missing"
        elif path.stat().st_size != size:
            wrong = f"has {path.stat().st_size} bytes instead of {size}"
        elif name in mine and files.sha256(path) != sha:
            wrong = f"is corrupt (its SHA-256 is not {sha[:8]})"
        if wrong:
            raise UserError(f"{path} {wrong}: {_AGAIN}")
