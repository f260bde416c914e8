"""Texts to the token ids that the tokenizer itself gives, in bounded memory.

A tokenizer takes some 180 bytes of memory per token. So short texts are tokenised in batches of
bounded size and long ones in overlapping windows, which are joined where both have the same tokens:
the ids are those of the whole text.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import logging
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lte_jax import interrupt
from lte_jax.data.texts import SURROGATE
from lte_jax.errors import UserError
from lte_jax.hf.tokenizer import import_transformers

BATCH_TEXTS = 256  # at most, in a call to the tokenizer
BATCH_CHARACTERS = 2**17  # likewise; a longer text is tokenised in windows
WINDOW = 2**14  # characters
OVERLAP = 2**10  # characters that a window shares with the one before
AGREE = 8  # tokens that windows must share on each side of the place where they are joined
BYTE_TOKENS = 259  # of the byte tokenizer
LEARNED_FROM = 10_000  # texts, at most, that a tokenizer is learned from
_SPECIAL = ("<s>", "</s>", "<pad>")
# verbose=False: documents longer than the model's context are cut later.
_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}

log = logging.getLogger(__name__)


def byte_tokenizer() -> Any:
    """A Hugging Face fast tokenizer of 259 tokens: id = byte, then <s>, </s> and <pad>.

    It needs no training and no download, survives `save_pretrained` and `AutoTokenizer`, puts <s>
    in front, and decodes whatever it encoded. "<s>" within a text is three characters, never the
    token.
    """
    import_transformers()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(list(_SPECIAL))
    return _fast(tokenizer)


def learned_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A Hugging Face fast tokenizer of at most `size` tokens: byte-level BPE of these texts.

    It starts with <s>, </s> and <pad>, then the bytes; in all else it is like `byte_tokenizer`, but
    pairs never cross from a word into the next. Of more than LEARNED_FROM texts, as many are read,
    evenly spread. The same texts give the same tokenizer.

    Raises:
      UserError: if `size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if size < BYTE_TOKENS:
        raise UserError(
            f"source.scratch.vocab_size={size}: expected at least {BYTE_TOKENS}, all bytes and "
            "three special tokens, to learn a tokenizer"
        )
    places = np.linspace(0, len(texts) - 1, min(LEARNED_FROM, len(texts))).round().astype(int)
    clean = (SURROGATE.sub("\ufffd", texts[int(i)]) for i in places)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(clean, trainer)
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    """A byte-level tokenizer with the special tokens, as transformers has it."""
    from tokenizers import decoders, processors

    begin, end, pad = _SPECIAL
    tokenizer.decoder = decoders.ByteLevel()
    front = [(begin, tokenizer.token_to_id(begin))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", None, front)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def digest(tokenizer: Any) -> str:
    """SHA-256 of all that decides which ids a tokenizer gives, wherever it was loaded from."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        described = json.loads(backend.to_str())
        # Calls set these; those of `tokenize` set none.
        described |= {"truncation": None, "padding": None}
    else:
        settings = {
            k: repr(v) for k, v in tokenizer.init_kwargs.items() if not k.endswith(("path", "file"))
        }
        described = [type(tokenizer).__name__, tokenizer.get_vocab(), settings]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def tokenize(
    texts: Sequence[str], tokenizer: Any, *, start: bool = True, quiet: bool = False
) -> list[np.ndarray]:
    """Each text as an int32 array of token ids.

    The ids start with what the tokenizer puts in front, such as <s>, unless the text begins with
    it; nothing is added at the end. With `start` False, each text is the middle of one and nothing
    is added at all. Lone surrogates, which are not characters, become U+FFFD and
    are counted in one log line. On a terminal, a progress bar appears after two seconds, unless
    `quiet`.
    """
    from tqdm import tqdm

    if not callable(tokenizer):
        kind = type(tokenizer).__name__
        raise UserError(f"tokenizer is {kind}: expected the result of load_tokenizer")
    prefix = _prefix(tokenizer) if start else np.zeros(0, np.int32)
    documents, replaced = [], 0
    style = {"unit": " characters", "unit_scale": True, "delay": 2, "disable": quiet or None}
    with tqdm(total=sum(map(len, texts)), desc="tokenising", **style) as bar:

        def progress(characters: int) -> None:
            interrupt.check("while tokenising")
            bar.update(characters)

        for batch in _batches(texts):
            clean = [SURROGATE.subn("\ufffd", text) for text in batch]
            replaced += sum(count for _, count in clean)
            for ids in _encode([text for text, _ in clean], tokenizer, progress):
                begins = np.array_equal(ids[: len(prefix)], prefix)
                documents.append(ids if begins else np.append(prefix, ids))
    if replaced:
        log.warning("%d lone surrogates in the text were replaced by U+FFFD", replaced)
    return documents


def _prefix(tokenizer: Any) -> np.ndarray:
    """The ids that the tokenizer puts in front of a text."""
    text = string.ascii_letters + string.digits  # some of them are in every vocabulary
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    return np.array(whole[:at], np.int32)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in order, in batches of bounded size; a long text is a batch of its own."""
    batch, size = [], 0
    for text in texts:
        if batch and (len(batch) == BATCH_TEXTS or size + len(text) > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _encode(batch: list[str], tokenizer: Any, progress: Callable[[int], Any]) -> list[np.ndarray]:
    """The ids of each text; `progress` is called with the number of characters done."""
    if len(batch[0]) > BATCH_CHARACTERS:
        if getattr(tokenizer, "is_fast", False):
            return [_encode_long(batch[0], tokenizer, progress)]
        log.warning(
            "a text of %d characters is tokenised at once, which takes much memory: only fast "
            "tokenizers (tokenizer.json) give the positions of tokens",
            len(batch[0]),
        )
    encoded = tokenizer(batch, **_PLAIN)
    progress(sum(map(len, batch)))
    return [np.array(ids, np.int32) for ids in encoded["input_ids"]]


# ------------------------------------------------------------------------------------ long texts


@dataclasses.dataclass(frozen=True)
class _Window:
    """Tokens of text[start:end]; columns of `tokens` [T, 3]: id, first character, character after.

    Tokens before `first` belong to the previous window.
    """

    start: int
    end: int
    tokens: np.ndarray
    first: int = 0


def _encode_long(text: str, tokenizer: Any, progress: Callable[[int], Any]) -> np.ndarray:
    """The ids of one text, window by window.

    Where two windows share no tokens, as within a letter repeated for pages, the first is widened
    until they do, or until it is the whole text.
    """
    ids = array.array("i")  # grows in place
    step, at_once = WINDOW - OVERLAP, BATCH_CHARACTERS // WINDOW
    starts = range(0, len(text) - OVERLAP, step)
    kept = None
    for at in range(0, len(starts), at_once):
        spans = [(start, start + WINDOW) for start in starts[at : at + at_once]]
        for window in _windows(text, spans, tokenizer):
            kept = kept or window
            while kept.end < window.end:
                if cut := _cut(kept, window):
                    ids.frombytes(kept.tokens[kept.first : cut[0], 0].tobytes())
                    kept = dataclasses.replace(window, first=cut[1])
                else:  # extended by its own length
                    [wider] = _windows(text, [(kept.start, 2 * kept.end - kept.start)], tokenizer)
                    kept = dataclasses.replace(wider, first=kept.first)
            progress(min(step, len(text) - window.start))
    ids.frombytes(kept.tokens[kept.first :, 0].tobytes())
    return np.frombuffer(ids, np.int32)


def _windows(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Iterator[_Window]:
    pieces = [text[start:end] for start, end in spans]
    encoded = tokenizer(pieces, return_offsets_mapping=True, **_PLAIN)
    for (start, end), ids, offsets in zip(
        spans, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        tokens = np.empty((len(ids), 3), np.int32)
        tokens[:, 0] = ids
        tokens[:, 1:] = np.array(offsets, np.int32).reshape(-1, 2) + start
        yield _Window(start, min(end, len(text)), tokens)


def _cut(left: _Window, right: _Window) -> tuple[int, int] | None:
    """Where to switch from one window to the next: an index into the tokens of each, or None.

    It is the place nearest the middle of their overlap where AGREE tokens on each side are the same
    in both, so that every pair of neighbouring tokens is one that the tokenizer made itself.
    """
    around = np.arange(-AGREE, AGREE)
    i = np.arange(left.first + AGREE, len(left.tokens) - AGREE + 1)
    i = i[left.tokens[i - AGREE, 1] >= right.start]
    # Several tokens may stand for one character: a text is cut between characters.
    i = i[left.tokens[i - 1, 2] <= left.tokens[i, 1]]
    j = np.searchsorted(right.tokens[:, 1], left.tokens[i, 1])
    inside = (j >= AGREE) & (j <= len(right.tokens) - AGREE)
    i, j = i[inside], j[inside]
    same = left.tokens[i[:, None] + around] == right.tokens[j[:, None] + around]
    i, j = i[same.all((1, 2))], j[same.all((1, 2))]
    if not len(i):
        return None
    nearest = np.argmin(np.abs(2 * left.tokens[i, 1] - right.start - left.end))
    return int(i[nearest]), int(j[nearest])
