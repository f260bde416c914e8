"""Texts to shards on disk: by many processes, killed and resumed at will, always the same bytes.

    FOLDER/.begun/settings.json      what the records are made of
    FOLDER/.begun/tokens-*.npy       token ids of each chunk of documents
    FOLDER/.begun/chunks.json        the chunks, once all texts are read
    FOLDER/train-*.array_record      a shard, complete as soon as it has its name, and
    FOLDER/.begun/train-*.json       what is in it
    FOLDER/manifest.json             last; then .begun is removed

Every file is written atomically, and its contents depend on the texts and the settings alone. So a
file that is there is done, and how many processes there were leaves no trace.

Dimension key: D documents of a source
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lte_jax import files, interrupt
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data import building, shards, sources, tokens, workers
from lte_jax.data.building import Chunk, HeldOut
from lte_jax.data.texts import stream_texts
from lte_jax.errors import UserError

MOST_SHARDS = 256  # of the training records: a reader has all of them open
_TEXTS = ("column", "newline", "join", "max_documents", "max_validation_records")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What there is to prepare, and how."""

    folder: Path
    data: DataConfig
    tokenizer: Any
    model_config: ModelConfig
    seed: int
    end: int | None

    @property
    def begun(self) -> Path:
        """The folder of what is not finished."""
        return self.folder / shards.BEGUN

    def run(self, pool: workers.Pool) -> None:
        """Goes on from what is there to the manifest."""
        found = self._tokenized(pool)
        names = [name for _, name in sources.parts(self.data.train)]
        sizes = [[] for _ in names]
        for number, (source, *_) in enumerate(found):
            sizes[source].append(_load(self._tokens(number))[0])
        joined = [np.concatenate(own).astype(np.int64) for own in sizes]
        building.tell_shares(names, joined)
        rng = np.random.default_rng(self.seed)
        held = building.hold_out(self.data, joined, rng)
        train = self._laid(pool, found, held)
        validation = self._validation(found, held, rng)
        self._finish(train, validation, sum(map(len, joined)))

    # ------------------------------------------------------------------------------------- tokens

    def _tokens(self, number: int) -> Path:
        return self.begun / f"tokens-{number:06}.npy"

    def _tokenized(self, pool: workers.Pool) -> list[tuple[int, int, int, int]]:
        """Of each chunk: its source, first document, documents and characters; all are on disk."""
        listed = self.begun / "chunks.json"
        if listed.exists():
            return [tuple(chunk) for chunk in files.read_json(listed, kind=list)]
        names = [name for _, name in sources.parts(self.data.train)]
        found = []

        def tasks() -> Iterator[tuple[int, Callable[..., Any] | None, tuple]]:
            how = building.how_to_read(self.data, "train")
            for number, chunk in enumerate(building.chunks(stream_texts(self.data.train, *how))):
                found.append((chunk.source, chunk.first, len(chunk.texts), chunk.characters))
                path = self._tokens(number)
                task = None if path.exists() else _tokenize
                what = path, chunk, names[chunk.source], self.model_config.vocab_size
                yield chunk.characters, task, what

        for _ in _done(pool, tasks(), "tokenising", " characters"):
            interrupt.check("while tokenising")
        files.atomic_write(listed, json.dumps(found))
        return found

    # ------------------------------------------------------------------------------------ records

    def _laid(
        self, pool: workers.Pool, found: Sequence[tuple[int, int, int, int]], held: list[HeldOut]
    ) -> dict[str, dict[str, Any]]:
        """Writes the training records; what is in each shard."""
        groups = building.groups([characters for *_, characters in found])
        each = -(-len(groups) // MOST_SHARDS)
        shares = [groups[start : start + each] for start in range(0, len(groups), each)]
        names = [_name("train", number, len(shares)) for number in range(len(shares))]

        def tasks() -> Iterator[tuple[int, Callable[..., Any] | None, tuple]]:
            for name, share in zip(names, shares, strict=True):
                chunks = [[(self._tokens(n), *found[n][:2]) for n in group] for group in share]
                size = sum(found[n][3] for group in share for n in group)
                task = None if self._told(name).exists() else _lay
                what = self.folder / name, self._told(name), chunks, held, self.data, self.end
                yield size, task, (*what, self._dtype)

        for _ in _done(pool, tasks(), "packing", " characters"):
            interrupt.check("while packing")
        return {name: files.read_json(self._told(name)) for name in names}

    def _told(self, name: str) -> Path:
        return self.begun / f"{name}.json"

    @property
    def _dtype(self) -> str:
        return shards.type_of(self.model_config, self.data.length)

    def _validation(
        self,
        found: Sequence[tuple[int, int, int, int]],
        held: list[HeldOut],
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """Writes the validation records; their entry in the manifest, and the shard's own."""
        documents: list[np.ndarray] = []
        if self.data.validation:
            named = self.data, self.tokenizer, self.model_config
            documents = building.named_validation(*named)
        for number, (source, first, many, _) in enumerate(found):
            if held[source].touches(first, first + many):
                of_chunk = _documents(self._tokens(number))
                documents += held[source].split(of_chunk, first, self.end)[1]
        records = building.lay(documents, self.data).some(self.data.max_validation_records, rng)
        name = _name("validation", 0, 1)
        return {
            name: shards.write(self.folder / name, [records], self._dtype),
            "whole": records.whole,
        }

    def _finish(self, train: dict, validation: dict, documents: int) -> None:
        """Writes the manifest, which makes the folder complete."""
        whole = validation.pop("whole")
        named = shards.listing(validation, whole=whole)
        written = train | validation
        kept = files.read_json(self.begun / "settings.json") | {
            "dtype": self._dtype,
            "largest_token": max(found["largest"] for found in written.values()),
            "train": shards.listing(train, documents=documents),
            "validation": named,
        }
        listed = {name: (found["size"], found["sha256"]) for name, found in written.items()}
        files.write_manifest(self.folder, kept, listed)
        shutil.rmtree(self.begun)


def prepare(
    folder: Path,
    data: DataConfig,
    tokenizer: Any,
    model_config: ModelConfig,
    *,
    seed: int = 0,
    end: int | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes the records that `building.build` makes into a folder of shards, or goes on with it.

    Memory grows by some thirty bytes a document, beside the chunks at work; where data.validation
    names a source, that is held in memory, too.

    Args:
      folder: to be made; may hold what an earlier call with the same arguments has left.
      data: sources, and how they are laid into records.
      tokenizer: the model's.
      model_config: the model's, for its vocabulary and length.
      seed: of what is held out and kept.
      end: the id to append to each training document, see `end_token`.
      processes: that tokenise and pack; 1: none beside this one. They leave no trace in the shards.

    Returns:
      The manifest.

    Raises:
      OtherRecords: if the folder was prepared, or begun, with others.
      UserError: as `building.build`; also if the folder holds anything else, or cannot be written.
    """
    building.check(data, tokenizer, model_config)
    made = Prepared(folder, data, tokenizer, model_config, seed, end)
    asked = _settings(made)
    if (folder / files.MANIFEST).exists():
        _check_same(folder, shards.manifest(folder), asked)
    else:
        _begin(made, asked)
        with workers.Pool(processes, tokenizer) as pool:
            made.run(pool)
    shutil.rmtree(made.begun, ignore_errors=True)  # of one that was killed after the manifest
    return shards.manifest(folder)


def _settings(made: Prepared) -> dict[str, Any]:
    """All that decides the records; the head of the manifest."""
    data = made.data
    texts = {key: getattr(data, key) for key in _TEXTS}
    named = {"train": data.train, "validation": data.validation}
    digests = {part: sources.digest(name, part) for part, name in named.items() if name}
    return {
        "kind": shards.KIND,
        "source": data.train,
        "validation_source": data.validation,
        "text": digests,
        "reading": texts,
        "tokenizer": tokens.digest(made.tokenizer),
        "length": data.length,
        "pack": data.pack,
        "end_token": made.end,
        "seed": made.seed,
    }


def _begin(made: Prepared, asked: dict[str, Any]) -> None:
    """Makes the folder, or sees that it holds the beginning of the same."""
    known = made.begun / "settings.json"
    if known.exists():
        return _check_same(made.folder, files.read_json(known), asked)
    held = sorted(path.name for path in made.folder.glob("*")) if made.folder.exists() else []
    if held := [name for name in held if name not in (shards.BEGUN, ".lock")]:
        raise UserError(
            f"{made.folder} holds {held[0]}: expected a new or empty folder to write shards to"
        )
    with files.explained(made.folder):
        made.begun.mkdir(parents=True, exist_ok=True)
    files.atomic_write(known, json.dumps(asked))


class OtherRecords(UserError):
    """A folder holds, or was begun with, records of other texts or settings."""


def _check_same(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuses to go on with other settings than a folder was begun with."""
    if different := [key for key in asked if found.get(key) != asked[key]]:
        key = different[0]
        raise OtherRecords(
            f"{folder} holds records prepared with another {key} ({str(found.get(key))[:60]}, now "
            f"{str(asked[key])[:60]}): name another folder, or remove this one"
        )


def _done(
    pool: workers.Pool,
    tasks: Iterable[tuple[int, Callable[..., Any] | None, tuple]],
    what: str,
    unit: str,
) -> Iterator[None]:
    """Yields after each task that is done, in order; a task of None is done already.

    A few more tasks than there are processes are made ahead. On a terminal, a progress bar.
    """
    from tqdm import tqdm

    waiting: collections.deque[tuple[int, Any]] = collections.deque()
    total = 0
    with tqdm(desc=what, unit=unit, unit_scale=True, delay=2, disable=None) as bar:
        for size, task, arguments in tasks:
            total += size
            waiting.append((size, task and pool.submit(task, *arguments)))
            while len(waiting) > 2 * pool.processes:
                _wait(waiting, bar)
                yield
        bar.total = total  # known only now
        while waiting:
            _wait(waiting, bar)
            yield


def _wait(waiting: collections.deque, bar: Any) -> None:
    size, future = waiting.popleft()
    if future is not None:
        future.result()
    bar.update(size)


def _name(part: str, number: int, of: int) -> str:
    return f"{part}-{number:05}-of-{of:05}{shards.ENDING}"


# ------------------------------------------------------------------------- tasks, in any process


def _tokenize(tokenizer: Any, path: Path, chunk: Chunk, name: str, vocab_size: int) -> None:
    """Writes the token ids of a chunk of the source `name`: [documents, size of each, ids...]."""
    documents = tokens.tokenize(chunk.texts, tokenizer, quiet=True)
    building.check_ids(documents, name, chunk.first, tokenizer, vocab_size)
    head = [len(documents), *map(len, documents)]
    file = io.BytesIO()
    np.save(file, np.concatenate([np.array(head, np.int32), *documents]))
    files.atomic_write(path, file.getvalue())


def _lay(
    tokenizer: Any,
    shard: Path,
    told: Path,
    groups: Sequence[Sequence[tuple[Path, int, int]]],
    held: Sequence[HeldOut],
    data: DataConfig,
    end: int | None,
    dtype: str,
) -> None:
    """Writes a shard of groups of chunks, each given by its file, source and first document."""

    def laid() -> Iterator[Any]:
        for group in groups:
            rest: list[np.ndarray] = []
            for path, source, first in group:
                rest += held[source].split(_documents(path), first, end)[0]
            yield building.lay(rest, data)

    files.atomic_write(told, json.dumps(shards.write(shard, laid(), dtype)))


def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of a chunk's documents, and all their ids, mapped."""
    with contextlib.suppress(ValueError, OSError):
        whole = np.asarray(np.load(path, mmap_mode="r"))
        return np.array(whole[1 : 1 + whole[0]]), whole[1 + whole[0] :]
    raise UserError(f"{path} is damaged: remove it; the same command makes it again")


def _documents(path: Path) -> list[np.ndarray]:
    """The documents of a chunk."""
    sizes_D, ids = _load(path)
    return np.split(ids, np.cumsum(sizes_D)[:-1])
