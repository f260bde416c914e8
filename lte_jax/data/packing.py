"""Documents to token records, and records to batches.

Dimension key: B batch  L length  R records
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lte_jax import checks
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data.sources import overlap, parts
from lte_jax.data.texts import read_each
from lte_jax.data.tokens import tokenize
from lte_jax.errors import UserError

log = logging.getLogger(__name__)


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

    def __len__(self) -> int:
        return len(self.tokens_RL)

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


def digest(records: Records) -> str:
    """SHA-256 of the records' shape, tokens and segments: all of the data that training sees."""
    sha = hashlib.sha256(repr(records.tokens_RL.shape).encode())
    for array_RL in records.tokens_RL, records.segments_RL:
        sha.update(np.ascontiguousarray(array_RL, "<i4"))
    for name, array in sorted(records.more.items()):
        sha.update(name.encode() + np.ascontiguousarray(array, "<f4").tobytes())
    return sha.hexdigest()


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
        grain.MapDataset.source(records)
        .seed(seed)
        .shuffle()
        .repeat(None)
        .batch(batch_size, drop_remainder=True)
        .map(lambda batch: {key: value[mine] for key, value in batch.items()})
    )
    # Records are in memory: threads would have nothing to wait for.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


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


# ----------------------------------------------------------------------------------------- build


def build(
    data: DataConfig, tokenizer: Any, model_config: ModelConfig, seed: int, end: int | None = None
) -> tuple[Records, Records]:
    """Training and validation records as `data` describes them.

    If data.validation is "", a seeded choice of the training documents of each source is held out:
    enough for `max_validation_records` in all, at most a tenth of the source's tokens. Where most
    of them are in documents longer than a tenth, blocks of a record's length are held out, wherever
    they are. If there are more validation records than `max_validation_records`, a seeded choice is
    kept.

    Args:
      data: sources, and how they are laid into records.
      tokenizer: the model's.
      model_config: the model's, for its vocabulary and length.
      seed: of what is held out and kept.
      end: the id to append to each training document, see `end_token`. Validation records are the
        text alone, so that their perplexity compares with published figures.

    Raises:
      UserError: if data, tokenizer and model do not fit together.
    """
    check(data, tokenizer, model_config)
    sources = _documents(data, data.train, "train", tokenizer, model_config)
    rng = np.random.default_rng(seed)
    if data.validation:
        validation = _flat(_documents(data, data.validation, "validation", tokenizer, model_config))
        train = [_with_end(ids, end, data.length) for ids in _flat(sources)]
    else:
        train, validation, whole = [], [], sum(map(len, _flat(sources)))
        for (_, name), documents in zip(parts(data.train), sources, strict=True):
            share = sum(map(len, documents)) / whole
            most = math.ceil(share * data.max_validation_records)
            rest, held = _hold_out(name, documents, most, data.length, end, rng)
            train, validation = train + rest, validation + held
    lay = pack if data.pack else pad
    train_rows, validation_rows = lay(train, data.length), lay(validation, data.length)
    if len(train_rows) < data.batch_size:
        raise UserError(
            f"{data.train}: {len(train_rows)} training records of {data.length} tokens, fewer than "
            f"data.batch_size={data.batch_size}: lower data.batch_size or data.length, or add text"
        )
    return train_rows, validation_rows.some(data.max_validation_records, rng)


def check(data: DataConfig, tokenizer: Any, model_config: ModelConfig) -> None:
    """Refuses sources and lengths that do not fit the model, before anything is read."""
    if not data.train:
        raise UserError(
            "data.train is empty: expected a file, a folder, a hub dataset or 'python-stdlib' "
            "(--config.data.train=TEXTS)"
        )
    if data.length > model_config.max_length:
        raise UserError(
            f"data.length={data.length} is longer than the {model_config.max_length} positions "
            f"the model was trained for: set data.length to {model_config.max_length} or less"
        )
    if len(tokenizer) > model_config.vocab_size:
        log.info(
            "the tokenizer has %d tokens, the model's vocabulary %d: texts must not use the others",
            len(tokenizer),
            model_config.vocab_size,
        )
    if data.validation and (both := overlap(data.train, data.validation)):
        raise UserError(
            f"data.validation={data.validation!r}: {both} is the training text, too: name another, "
            "or '' to hold out a part of it"
        )


def _documents(
    data: DataConfig, source: str, split: str, tokenizer: Any, model_config: ModelConfig
) -> list[list[np.ndarray]]:
    """Of each source the token ids of each document, all within the model's vocabulary."""
    how = data.column, data.newline, data.max_documents, split, data.join
    names, groups = [name for _, name in parts(source)], []
    for name, texts in zip(names, read_each(source, *how), strict=True):
        groups.append(tokenize(texts, tokenizer))
        for number, ids in enumerate(groups[-1], 1):
            checks.token_ids(
                ids,
                model_config.vocab_size,
                f"{name}: text {number}",
                f"the tokenizer has {len(tokenizer)} tokens: use the one the model was trained "
                "with (source.tokenizer), or widen source.scratch.vocab_size",
            )
    if len(groups) > 1:
        sizes = [sum(map(len, group)) for group in groups]
        for name, group, size in zip(names, groups, sizes, strict=True):
            share = size / sum(sizes)
            log.info("%s: %d texts, %d tokens, %.1f%%", name, len(group), size, 100 * share)
    return groups


def _with_end(ids: np.ndarray, end: int | None, length: int) -> np.ndarray:
    """The document and its end token; none where it would begin a record, unpredicted."""
    return ids if end is None or len(ids) % length == 0 else np.append(ids, np.int32(end))


def _hold_out(
    name: str,
    documents: list[np.ndarray],
    most: int,
    length: int,
    end: int | None,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(The rest in order, with end tokens; a random choice of documents, or of blocks within them).

    Args:
      name: of the source.
      documents: its token ids.
      most: records of `length` tokens to hold out.
      length: of a block.
      end: token of a document's end.
      rng: of the choice.
    """
    order, whole = rng.permutation(len(documents)), sum(map(len, documents))
    small = [i for i in order if 10 * len(documents[i]) <= whole]
    sizes = np.cumsum([len(documents[i]) for i in small])
    enough = int(np.searchsorted(sizes, most * length)) + 1
    held = set()
    if 2 * sizes[-1:].sum() >= whole:
        held = {*small[: min(enough, int(np.searchsorted(sizes, whole / 10, side="right")))]}
    # The last block of a document, with its end, stays in training.
    blocks = [
        (i, a) for i, ids in enumerate(documents) for a in range(0, len(ids) - length, length)
    ]
    if not held and len(blocks) < 2:
        if len(documents) < 2:
            raise UserError(
                f"data.validation is '' and {name} is one document of {whole} tokens, too short to "
                f"hold any records of {length} out: add text, lower data.length, or name a "
                "validation source"
            )
        held = {min(order, key=lambda i: len(documents[i]))}
    ended = [_with_end(ids, end, length) for ids in documents]
    if held:
        rest = [ids for i, ids in enumerate(ended) if i not in held]
        return rest, [documents[i] for i in sorted(held)]
    chosen = rng.permutation(len(blocks))[: max(1, min(most, len(blocks) // 10))]
    cut = sorted(blocks[k] for k in chosen)
    return _without(ended, cut, length), [documents[i][a : a + length] for i, a in cut]


def _without(
    documents: list[np.ndarray], blocks: list[tuple[int, int]], length: int
) -> list[np.ndarray]:
    """The documents in pieces, without blocks, each named by its document and where it starts."""
    pieces = []
    for i, ids in enumerate(documents):
        cuts = [a for j, a in blocks if j == i]
        starts, ends = [0, *(a + length for a in cuts)], [*cuts, len(ids)]
        pieces += [ids[a:b] for a, b in zip(starts, ends, strict=True) if a < b]
    return pieces


def _flat(groups: Iterable[list[np.ndarray]]) -> list[np.ndarray]:
    return list(itertools.chain(*groups))
