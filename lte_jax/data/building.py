"""Documents of a configuration to its training and validation records.

Documents are tokenised in chunks and packed in groups of chunks: how they are cut depends on the
texts alone. So `build`, in memory, and preparing.py, with many processes and on disk, make the same
records.

Dimension key: B batch  L length  D documents of a source
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lte_jax import checks
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data.packing import Records, pack, pad
from lte_jax.data.sources import overlap, parts
from lte_jax.data.texts import read_each
from lte_jax.data.tokens import tokenize
from lte_jax.errors import UserError

CHUNK = 2**21  # characters, at least, of documents that are tokenised together
GROUP = 2**24  # characters, at least, of documents that are packed together

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one source."""

    source: int  # its number
    first: int  # number of the first document within the source
    texts: list[str]

    @property
    def characters(self) -> int:
        """Of all its documents."""
        return sum(map(len, self.texts))


def chunks(texts: Iterable[tuple[int, str]]) -> Iterator[Chunk]:
    """Documents, each with the number of its source, in chunks of CHUNK characters or more.

    The last chunk of a source may have less.
    """
    for source, own in itertools.groupby(texts, lambda numbered: numbered[0]):
        first, waiting, size = 0, [], 0
        for _, text in own:
            waiting.append(text)
            size += len(text)
            if size >= CHUNK:
                yield Chunk(source, first, waiting)
                first, waiting, size = first + len(waiting), [], 0
        if waiting:
            yield Chunk(source, first, waiting)


def groups(characters: Sequence[int]) -> list[range]:
    """Numbers of consecutive chunks, of so many characters each, that are packed together."""
    made, start, size = [], 0, 0
    for number, more in enumerate(characters, 1):
        size += more
        if size >= GROUP or number == len(characters):
            made.append(range(start, number))
            start, size = number, 0
    return made


# ------------------------------------------------------------------------------------- in memory


def build(
    data: DataConfig, tokenizer: Any, model_config: ModelConfig, seed: int, end: int | None = None
) -> tuple[Records, Records]:
    """Training and validation records as `data` describes them, in memory.

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
    texts = read_each(data.train, *how_to_read(data, "train"))
    sources = _tokenized(data.train, texts, tokenizer, model_config)
    rng = np.random.default_rng(seed)
    sizes = [np.array([*map(len, documents)]) for documents in sources]
    held = hold_out(data, sizes, rng)
    numbered = ((i, text) for i, own in enumerate(texts) for text in own)
    cut, laid, validation = [*chunks(numbered)], [], []
    for group in groups([chunk.characters for chunk in cut]):
        rest: list[np.ndarray] = []
        for chunk in cut[group.start : group.stop]:
            documents = sources[chunk.source][chunk.first : chunk.first + len(chunk.texts)]
            stays, taken = held[chunk.source].split(documents, chunk.first, end)
            rest += stays
            validation += taken
        laid.append(lay(rest, data))
    train = laid[0] if len(laid) == 1 else joined(laid)
    if data.validation:
        validation = named_validation(data, tokenizer, model_config)
    check_enough(data, len(train))
    return train, lay(validation, data).some(data.max_validation_records, rng)


def joined(records: Sequence[Records]) -> Records:
    """All of them, one after another."""
    tokens_RL = np.concatenate([some.tokens_RL for some in records])
    return Records(tokens_RL, np.concatenate([some.segments_RL for some in records]))


def lay(documents: Iterable[np.ndarray], data: DataConfig) -> Records:
    """Documents in records, packed or padded."""
    return (pack if data.pack else pad)(documents, data.length)


def named_validation(
    data: DataConfig, tokenizer: Any, model_config: ModelConfig
) -> list[np.ndarray]:
    """The token ids of the documents of data.validation."""
    texts = read_each(data.validation, *how_to_read(data, "validation"))
    return [*itertools.chain(*_tokenized(data.validation, texts, tokenizer, model_config))]


def how_to_read(data: DataConfig, split: str) -> tuple[Any, ...]:
    """What `read_each` takes after the source."""
    return data.column, data.newline, data.max_documents, split, data.join


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


def check_enough(data: DataConfig, number: int) -> None:
    """Refuses fewer training records than a batch has."""
    if number < data.batch_size:
        raise UserError(
            f"{data.train}: {number} training records of {data.length} tokens, fewer than "
            f"data.batch_size={data.batch_size}: lower data.batch_size or data.length, or add text"
        )


def check_ids(
    documents: Sequence[np.ndarray], name: str, first: int, tokenizer: Any, vocab_size: int
) -> None:
    """Refuses documents of the source `name`, from number `first` on, outside the vocabulary."""
    for number, ids in enumerate(documents, first + 1):
        checks.token_ids(
            ids,
            vocab_size,
            f"{name}: text {number}",
            f"the tokenizer has {len(tokenizer)} tokens: use the one the model was trained "
            "with (source.tokenizer), or widen source.scratch.vocab_size",
        )


def tell_shares(names: Sequence[str], sizes: Sequence[np.ndarray]) -> None:
    """Logs what each of several sources gives, of so many tokens a document."""
    whole = sum(int(sizes_D.sum()) for sizes_D in sizes)
    for name, sizes_D in zip(names, sizes, strict=True):
        if len(names) > 1:
            size = int(sizes_D.sum())
            share = 100 * size / whole
            log.info("%s: %d texts, %d tokens, %.1f%%", name, len(sizes_D), size, share)


def _tokenized(
    source: str, texts: list[list[str]], tokenizer: Any, model_config: ModelConfig
) -> list[list[np.ndarray]]:
    """Of each source the token ids of each document, all within the model's vocabulary."""
    names, found = [name for _, name in parts(source)], []
    for name, own in zip(names, texts, strict=True):
        found.append(tokenize(own, tokenizer))
        check_ids(found[-1], name, 0, tokenizer, model_config.vocab_size)
    tell_shares(names, [np.array([*map(len, documents)]) for documents in found])
    return found


# --------------------------------------------------------------------------------- what is held out


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What of one source is held out: documents, or blocks of `length` tokens within them."""

    length: int
    documents: frozenset[int] = frozenset()
    # Where they start, by the number of their document.
    blocks: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)

    def split(
        self, documents: Sequence[np.ndarray], first: int, end: int | None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(The rest in order, with end tokens; what is held out) of documents from `first` on."""
        rest, held = [], []
        for number, ids in enumerate(documents, first):
            if number in self.documents:
                held.append(ids)
                continue
            starts = self.blocks.get(number, ())
            held += [ids[start : start + self.length] for start in starts]
            # The last block of a document, with its end, stays in training.
            ended = _with_end(ids, end, self.length)
            begins = [0, *(start + self.length for start in starts)]
            pieces = zip(begins, [*starts, len(ended)], strict=True)
            rest += [ended[a:b] for a, b in pieces if a < b or not self.blocks]
        return rest, held

    def touches(self, first: int, stop: int) -> bool:
        """Whether something of documents `first` to `stop` is held out."""
        at = bisect.bisect_left(self._numbers, first)
        return at < len(self._numbers) and self._numbers[at] < stop

    @functools.cached_property
    def _numbers(self) -> list[int]:
        return sorted((*self.documents, *self.blocks))


def _with_end(ids: np.ndarray, end: int | None, length: int) -> np.ndarray:
    """The document and its end token; none where it would begin a record, unpredicted."""
    return ids if end is None or len(ids) % length == 0 else np.append(ids, np.int32(end))


def hold_out(
    data: DataConfig, sizes: Sequence[np.ndarray], rng: np.random.Generator
) -> list[HeldOut]:
    """What of each source is held out; nothing if data.validation names a source.

    Args:
      data: sources, and how much to hold out.
      sizes: of each source the tokens of each document [D].
      rng: of the choice.

    Raises:
      UserError: if a source is one document that is too short to be divided.
    """
    if data.validation:
        return [HeldOut(data.length)] * len(sizes)
    whole, held = sum(int(sizes_D.sum()) for sizes_D in sizes), []
    for (_, name), sizes_D in zip(parts(data.train), sizes, strict=True):
        most = math.ceil(int(sizes_D.sum()) / whole * data.max_validation_records)
        held.append(_choose(name, sizes_D, most, data.length, rng))
    return held


def _choose(
    name: str, sizes_D: np.ndarray, most: int, length: int, rng: np.random.Generator
) -> HeldOut:
    """A random choice of the source's documents, or of blocks within them.

    Args:
      name: of the source.
      sizes_D: tokens of its documents.
      most: records of `length` tokens to hold out.
      length: of a block.
      rng: of the choice.
    """
    order_D, whole = rng.permutation(len(sizes_D)), int(sizes_D.sum())
    small = order_D[10 * sizes_D[order_D] <= whole]
    reach = np.cumsum(sizes_D[small])
    enough = int(np.searchsorted(reach, most * length)) + 1
    if 2 * reach[-1:].sum() >= whole:
        tenth = int(np.searchsorted(reach, whole / 10, side="right"))
        if documents := frozenset(small[: min(enough, tenth)].tolist()):
            return HeldOut(length, documents)
    blocks_D = np.maximum(-(-(sizes_D - length) // length), 0)  # but for the last of each
    number = int(blocks_D.sum())
    if number < 2:
        if len(sizes_D) < 2:
            raise UserError(
                f"data.validation is '' and {name} is one document of {whole} tokens, too short to "
                f"hold any records of {length} out: add text, lower data.length, or name a "
                "validation source"
            )
        return HeldOut(length, frozenset({int(order_D[np.argmin(sizes_D[order_D])])}))
    chosen = np.sort(rng.permutation(number)[: max(1, min(most, number // 10))])
    ends_D, blocks = np.cumsum(blocks_D), {}
    for block in chosen.tolist():
        document = int(np.searchsorted(ends_D, block, side="right"))
        before = int(ends_D[document] - blocks_D[document])
        blocks.setdefault(document, []).append((block - before) * length)
    return HeldOut(length, blocks=blocks)
