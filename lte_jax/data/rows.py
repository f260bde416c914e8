"""Documents to token rows, rows to batches; `build` is all of it at once.

Dimension key: B batch  L length  R rows
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lte_jax import interrupt
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data.texts import STDLIB, read_texts
from lte_jax.errors import UserError

TOKENIZER_BATCH = 256  # documents a call

# ------------------------------------------------------------------------------------ tokenising


def byte_tokenizer() -> Any:
    """A Hugging Face fast tokenizer of 259 tokens: id = byte, then <s>, </s> and <pad>.

    It needs no training and no download, survives `save_pretrained` and `AutoTokenizer`, and
    decodes whatever it encoded. "<s>" within a text is three characters, never the token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself, or from U+0100 on where it has none."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Each text as an int32 array of token ids, the tokenizer's bos in front where it has one.

    A progress bar appears on a terminal once it takes more than two seconds.
    """
    from tqdm import tqdm

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    documents = []
    with tqdm(total=len(texts), desc="tokenising", unit=" texts", delay=2, disable=None) as bar:
        for start in range(0, len(texts), TOKENIZER_BATCH):
            interrupt.check("while tokenising")
            batch = list(texts[start : start + TOKENIZER_BATCH])
            # verbose=False: documents longer than the model's context are cut later.
            encoded = tokenizer(
                batch, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            documents += [np.array(bos + ids, np.int32) for ids in encoded["input_ids"]]
            bar.update(len(batch))
    return documents


# ------------------------------------------------------------------------------------------ rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Token rows in memory; `rows[i]` is {"tokens": int32 [L], "segments": int32 [L]}."""

    tokens_RL: np.ndarray
    segments_RL: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_RL)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens_RL[index], "segments": self.segments_RL[index]}


def digest(rows: Rows) -> str:
    """SHA-256 of the rows, in hexadecimal: equal for equal tokens and segments alone."""
    found = hashlib.sha256()
    for x_RL in (rows.tokens_RL, rows.segments_RL):
        found.update(np.ascontiguousarray(x_RL, "<i4").data)
    return found.hexdigest()


def pack_rows(documents: Iterable[np.ndarray], length: int) -> Rows:
    """Rows that hold several documents each; every token of every document stands in one of them.

    Documents longer than a row are cut into pieces of `length`; each piece then goes into the
    fullest row that still has room for it (best fit, in order), so no other document is cut.
    """
    pieces_by_row: list[list[np.ndarray]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in documents:
        for start in range(0, len(document), length):
            piece = document[start : start + length]
            at = bisect.bisect_left(free, (len(piece), 0))
            if at < len(free):
                left, row = free.pop(at)
            else:
                left, row = length, len(pieces_by_row)
                pieces_by_row.append([])
            pieces_by_row[row].append(piece)
            if left > len(piece):
                bisect.insort(free, (left - len(piece), row))
    return _fill_rows(pieces_by_row, length)


def pad_rows(documents: Iterable[np.ndarray], length: int) -> Rows:
    """One document a row, cut at `length` or padded to it."""
    return _fill_rows([[document[:length]] for document in documents], length)


def _fill_rows(pieces_by_row: Sequence[Sequence[np.ndarray]], length: int) -> Rows:
    tokens_RL = np.zeros((len(pieces_by_row), length), np.int32)
    segments_RL = np.zeros_like(tokens_RL)
    for row, pieces in enumerate(pieces_by_row):
        start = 0
        for segment, piece in enumerate(pieces, 1):
            end = start + len(piece)
            tokens_RL[row, start:end] = piece
            segments_RL[row, start:end] = segment
            start = end
    return Rows(tokens_RL, segments_RL)


# --------------------------------------------------------------------------------------- batches


def train_iterator(
    rows: Rows, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
) -> Any:
    """An endless Grain iterator of {"tokens": [B, L], "segments": [B, L]}, int32 NumPy.

    Each epoch is shuffled anew; a batch may hold the end of one and the start of the next. Each
    of `shard_count` processes gets its equal slice, B = batch_size / shard_count, of the same
    global batches. `get_state()` is a small JSON-able dict; `set_state` of any shard's state
    continues exactly, whatever the number of shards.
    """
    import grain

    mine = _shard(batch_size, shard_index, shard_count)
    dataset = (
        grain.MapDataset.source(rows)
        .seed(seed)
        .shuffle()
        .repeat(None)
        .batch(batch_size, drop_remainder=True)
        .map(lambda batch: {key: value[mine] for key, value in batch.items()})
    )
    # Rows are in memory: threads would have nothing to wait for.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(
    rows: Rows, batch_size: int, shard_index: int = 0, shard_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order, in batches like those of `train_iterator`.

    The last one is filled up with rows of segments 0 (and tokens 0), which count in no loss.
    """
    mine = _shard(batch_size, shard_index, shard_count)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        missing = batch_size - len(batch["tokens"])
        yield {key: np.pad(x_BL, ((0, missing), (0, 0)))[mine] for key, x_BL in batch.items()}


def _shard(batch_size: int, shard_index: int, shard_count: int) -> slice:
    share, remainder = divmod(batch_size, shard_count)
    if remainder:
        raise UserError(
            f"data.batch_size={batch_size} is not a multiple of the {shard_count} processes: "
            "each takes an equal share of a batch"
        )
    return slice(shard_index * share, (shard_index + 1) * share)


# ----------------------------------------------------------------------------------------- build


def build(
    data: DataConfig, tokenizer: Any, model_config: ModelConfig, seed: int
) -> tuple[Rows, Rows]:
    """Training and validation rows as `data` describes them.

    A validation source of "" holds out a seeded choice of the training documents: enough for
    `max_validation_rows`, at most a tenth. Of more validation rows than that, a seeded choice
    is kept.

    Raises:
      UserError: where data, tokenizer and model do not fit each other.
    """
    _check(data, tokenizer, model_config)

    def documents(source: str, split: str) -> list[np.ndarray]:
        texts = read_texts(source, data.column, data.newline, data.max_documents, split=split)
        return tokenize(texts, tokenizer)

    train = documents(data.train, "train")
    rng = np.random.default_rng(seed)
    if data.validation:
        validation = documents(data.validation, "validation")
    else:
        train, validation = _hold_out(train, data.max_validation_rows * data.length, rng)
    lay = pack_rows if data.pack else pad_rows
    train_rows, validation_rows = lay(train, data.length), lay(validation, data.length)
    if len(train_rows) < data.batch_size:
        raise UserError(
            f"{data.train}: {len(train_rows)} training rows of {data.length} tokens, fewer than "
            f"data.batch_size={data.batch_size}: lower data.batch_size or data.length, or add text"
        )
    chosen = np.sort(rng.permutation(len(validation_rows))[: data.max_validation_rows])
    kept = validation_rows.tokens_RL[chosen], validation_rows.segments_RL[chosen]
    return train_rows, Rows(*kept)


def _check(data: DataConfig, tokenizer: Any, model_config: ModelConfig) -> None:
    if not data.train:
        raise UserError(
            "data.train is empty: expected a JSON-lines file, a hub dataset or 'python-stdlib'"
        )
    if data.length > model_config.max_length:
        raise UserError(
            f"data.length={data.length} is longer than the {model_config.max_length} positions "
            f"the model was trained for: set data.length to {model_config.max_length} or less"
        )
    if len(tokenizer) > model_config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary "
            f"{model_config.vocab_size}: use the tokenizer the model was trained with "
            "(source.tokenizer), or widen source.scratch.vocab_size"
        )
    one_part = data.train.startswith(f"{STDLIB}:") or Path(data.train).exists()
    if data.train == data.validation and one_part:
        raise UserError(
            f"data.validation={data.validation!r} is the training text: name another, or '' to "
            "hold out a part of it"
        )


def _hold_out(
    documents: list[np.ndarray], tokens: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits documents: (the rest in order, a random choice with about `tokens` tokens)."""
    if len(documents) < 2:
        raise UserError(
            "data.validation is '' and data.train is one document, too few to hold any out: "
            "name a validation source"
        )
    order = rng.permutation(len(documents))
    sizes = np.cumsum([len(documents[i]) for i in order])
    count = max(1, min(int(np.searchsorted(sizes, tokens)) + 1, len(documents) // 10))
    held = set(order[:count].tolist())
    rest = [d for i, d in enumerate(documents) if i not in held]
    return rest, [documents[i] for i in sorted(held)]
