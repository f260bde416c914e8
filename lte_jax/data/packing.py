"""Documents to token records, and records to batches.

Dimension key: B batch  L length  R records
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np


class Example(NamedTuple):
    """What a model is asked to continue, and texts that would be right."""

    prompt: np.ndarray  # token ids
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Records:
    """Token records in memory; `records[i]` is {"tokens": int32 [L], "segments": int32 [L]}.

    `more` holds what a task adds, by its name in a batch: "types" and "answers" [R, L], "labels"
    [R, S] of a record's texts, which are its segments 1 to S. `examples` are for tasks of
    generation and in no batch.
    """

    tokens_RL: np.ndarray
    segments_RL: np.ndarray
    more: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    whole: int | None = None  # how many there were, if these are some of them and that is known
    threads: ClassVar[int] = 0  # that read ahead: in memory there is nothing to wait for

    def __len__(self) -> int:
        return len(self.tokens_RL)

    @property
    def length(self) -> int:
        """L."""
        return self.tokens_RL.shape[1]

    @property
    def num_tokens(self) -> int:
        """How many tokens are not padding."""
        return int(np.count_nonzero(self.segments_RL))

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        arrays = {"tokens": self.tokens_RL, "segments": self.segments_RL, **self.more}
        return {name: array[index] for name, array in arrays.items()}

    def take(self, chosen: np.ndarray) -> Records:
        """These records."""
        more = {name: array[chosen] for name, array in self.more.items()}
        return Records(self.tokens_RL[chosen], self.segments_RL[chosen], more)

    def some(self, most: int, rng: np.random.Generator) -> Records:
        """At most so many of these records, chosen by chance, in their order."""
        chosen = self.take(np.sort(rng.permutation(len(self))[:most]))
        return dataclasses.replace(chosen, whole=len(self))

    def digest(self) -> str:
        """SHA-256 of shape, tokens and segments: all of the data that training sees."""
        sha = hashlib.sha256(repr(self.tokens_RL.shape).encode())
        for array_RL in self.tokens_RL, self.segments_RL:
            sha.update(np.ascontiguousarray(array_RL, "<i4"))
        for name, array in sorted(self.more.items()):
            sha.update(name.encode() + np.ascontiguousarray(array, "<f4").tobytes())
        return sha.hexdigest()

    def trimmed(self) -> Records:
        """These records without the columns at the end that are padding in all of them."""
        width, length = self.segments_RL.shape[1], int(self.segments_RL.any(axis=0).sum())
        more = {k: x[:, :length] if x.shape[1:] == (width,) else x for k, x in self.more.items()}
        return Records(self.tokens_RL[:, :length], self.segments_RL[:, :length], more)


def pack(documents: Iterable[np.ndarray], length: int) -> Records:
    """Packs several documents into each record; no token is dropped.

    Documents longer than a record are cut into pieces of `length`; each piece then goes into the
    fullest record with room for it (best fit, in order), so no other document is cut.
    """
    pieces_by_row: list[list[np.ndarray]] = []
    free: list[tuple[int, int]] = []  # (tokens left, record), sorted
    for document in documents:
        for start in range(0, len(document), length):
            piece = document[start : start + length]
            at = bisect.bisect_left(free, (len(piece), 0))
            if at < len(free):
                left, record = free.pop(at)
            else:
                left, record = length, len(pieces_by_row)
                pieces_by_row.append([])
            pieces_by_row[record].append(piece)
            if left > len(piece):
                bisect.insort(free, (left - len(piece), record))
    return _fill_rows(pieces_by_row, length)


def pad(documents: Iterable[np.ndarray], length: int) -> Records:
    """One document per record, cut or padded to `length`."""
    return _fill_rows([[document[:length]] for document in documents], length)


def _fill_rows(pieces_by_row: Sequence[Sequence[np.ndarray]], length: int) -> Records:
    tokens_RL = np.zeros((len(pieces_by_row), length), np.int32)
    segments_RL = np.zeros_like(tokens_RL)
    for record, pieces in enumerate(pieces_by_row):
        start = 0
        for segment, piece in enumerate(pieces, 1):
            end = start + len(piece)
            tokens_RL[record, start:end] = piece
            segments_RL[record, start:end] = segment
            start = end
    return Records(tokens_RL, segments_RL)


# --------------------------------------------------------------------------------------- batches


def train_iterator(
    records: Records, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> Any:
    """An endless Grain iterator of {"tokens": [B, L], "segments": [B, L]}, int32 NumPy.

    Each epoch is reshuffled; a batch may hold the end of one and the start of the next. The batches
    are the same in every process; `rows` are those of each batch that this one takes (None: all),
    see `sharding.rows_here`. `get_state()` is a small JSON-able dict; `set_state` resumes exactly
    from any process's state, whatever the number of processes.
    """
    import grain

    mine = slice(None) if rows is None else rows
    dataset = (
        grain.MapDataset.range(len(records))
        .seed(seed)
        .shuffle()
        .repeat(None)
        .batch(batch_size, drop_remainder=True)
        .map(lambda numbers_B: records[numbers_B[mine]])  # no others are read
    )
    ahead = 2 * records.threads
    options = grain.ReadOptions(num_threads=records.threads, prefetch_buffer_size=ahead)
    return iter(dataset.to_iter_dataset(options))


def eval_batches(
    records: Records, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Every record once, in order, in batches like those of `train_iterator`.

    The last batch is filled up with records of zeros (segment 0), which count in no loss.
    """
    mine = slice(None) if rows is None else rows
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        missing = batch_size - len(batch["tokens"])
        zeros = {key: np.zeros((missing, *x.shape[1:]), x.dtype) for key, x in batch.items()}
        yield {key: np.concatenate([x, zeros[key]])[mine] for key, x in batch.items()}
