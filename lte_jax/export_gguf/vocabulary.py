"""A tokenizer in a GGUF file, so that llama.cpp splits texts as the tokenizer itself does.

llama.cpp has code of its own for each kind of tokenizer. Two are written: byte-level BPE, by its
merges and the name that llama.cpp has for its way of cutting a text into words, and SentencePiece's
BPE ("▁" for spaces), of which llama.cpp wants a score for each token instead of merges.

Source: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lte_jax.config import ModelConfig
from lte_jax.errors import UserError

_SPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_WORDS = (  # of Llama 3; {} is how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level tokenizers cut words -> llama.cpp's name for it, and whether a word that is a token
# then stays whole whatever the merges say.
_CUTS = {
    ("words",): ("gpt-2", False),
    ("digit", "words"): ("smollm", False),
    (_WORDS % "{1,3}", "bytes"): ("llama-bpe", True),
    (_WORDS % "", "bytes"): ("qwen2", False),
}
_TEXTS, _TOKENS = 1000, 8  # random texts of so many tokens, on which both ways must agree
_MOST_WRONG = 0.01  # share of them
_UNMERGED = -1e6  # score of a token that no merge makes
log = logging.getLogger(__name__)


def add(gguf, writer, tokenizer: Any, config: ModelConfig) -> None:
    """Adds the tokenizer's keys; without one, the key that says so.

    Raises:
      UserError: if llama.cpp has no such tokenizer, or it has more tokens than the model.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise _unknown(f"it is a {type(tokenizer).__name__}, without tokenizer.json")
    state = json.loads(backend.to_str())
    kind, cuts = state["model"]["type"], _cuts(state["pre_tokenizer"])
    if kind != "BPE":
        raise _unknown(f"its model is {kind}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := state["model"].get(option):
            raise _unknown(f"its BPE has {option}={value!r}")
    texts = _texts(tokenizer, config)
    if {"words", "bytes"} & {*cuts}:
        writer.add_tokenizer_model("gpt2")
        _add_bytes(writer, state, cuts)
    else:
        writer.add_tokenizer_model("llama")
        _add_sentencepiece(writer, state, cuts, texts, backend.model)
    writer.add_token_list(texts)
    writer.add_token_types(_types(gguf.TokenType, state, tokenizer.get_vocab(), texts))
    _add_special(writer, tokenizer, config)


def _unknown(why: str) -> UserError:
    return UserError(
        f"llama.cpp has no tokenizer like this one ({why}): leave it out with --no-tokenizer, and "
        "give programs token ids"
    )


def _texts(tokenizer: Any, config: ModelConfig) -> list[str]:
    """The text of each id of the model; ids without one get names that no text is."""
    texts = [f"[PAD{i}]" for i in range(config.vocab_size)]
    for text, i in tokenizer.get_vocab().items():
        if i >= len(texts):
            raise UserError(
                f"the tokenizer's token {i} {text!r} is beyond the model's vocab_size="
                f"{config.vocab_size}: expected the tokenizer that the model was trained with"
            )
        texts[i] = text
    return texts


def _types(kinds, state: Mapping[str, Any], known: Mapping[str, int], texts: list[str]):
    """What each token is for."""
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    types = []
    for i, text in enumerate(texts):
        if text not in known:
            types.append(kinds.UNUSED)
        elif text == state["model"]["unk_token"]:
            types.append(kinds.UNKNOWN)
        elif i in added:
            types.append(kinds.CONTROL if added[i] else kinds.USER_DEFINED)
        elif state["model"]["byte_fallback"] and _BYTE.fullmatch(text):
            types.append(kinds.BYTE)
        else:
            types.append(kinds.NORMAL)
    return types


def _add_special(writer, tokenizer: Any, config: ModelConfig) -> None:
    """Which tokens begin and end texts, and whether the tokenizer puts them there."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise _unknown(f"it makes {whole} of {plain}")
    begin = [*before, config.bos_id, tokenizer.bos_token_id]
    ends = [*after, *config.eos_ids, tokenizer.eos_token_id]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    if not ends:
        raise UserError(
            "neither config.json nor the tokenizer says which token ends a text, and llama.cpp "
            "would take another: set eos_token_id in config.json"
        )
    pad = config.pad_id if config.pad_id is not None else tokenizer.pad_token_id
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    # llama.cpp ends at "end of turn" and "end of message" as it does at "end of text".
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for adder, i in zip(adders, ends, strict=False):
        adder(i)
    _if_any(writer.add_bos_token_id, next((i for i in begin if i is not None), None))
    _if_any(writer.add_unk_token_id, tokenizer.unk_token_id)
    _if_any(writer.add_pad_token_id, pad)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _if_any(adder: Callable[[int], None], i: int | None) -> None:
    if i is not None:
        adder(i)


# -------------------------------------------------------------------------------------- byte level


def _cuts(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A short name for each step in which a tokenizer cuts texts before it merges."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    return tuple(map(_cut, steps))


def _cut(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digit"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", str(step))
    return str(step)


def _add_bytes(writer, state: Mapping[str, Any], cuts: tuple[str, ...]) -> None:
    """Byte-level BPE: its merges, and how it cuts words."""
    model, normalizer = state["model"], state["normalizer"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:  # words then do not matter: every byte is a token
        cuts = ("words",)
    if cuts not in _CUTS:
        raise _unknown(f"it cuts texts by {' and '.join(cuts)}")
    name, whole = _CUTS[cuts]
    if merges and whole != bool(model.get("ignore_merges")):
        raise _unknown(f"it cuts as {name} does, with ignore_merges={not whole}")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unknown(f"its normalizer is {normalizer['type']}")
    if normalizer is not None:
        log.warning("llama.cpp does not normalise texts (NFC): give it composed characters")
    writer.add_tokenizer_pre(name)
    # llama.cpp asks for the key, which cannot be empty; a pair of nothing is never met.
    writer.add_token_merges(merges or [""])


# ----------------------------------------------------------------------------------- SentencePiece


def _add_sentencepiece(writer, state: Mapping[str, Any], cuts, texts: list[str], bpe: Any) -> None:
    """BPE with "▁" for spaces: a score of each token, by which llama.cpp merges pairs."""
    scores = _scores(state["model"])
    writer.add_add_space_prefix(_prefixed(state["normalizer"], state["pre_tokenizer"], cuts))
    writer.add_token_scores([scores.get(text, _UNMERGED) for text in texts])
    special = {token["content"] for token in state["added_tokens"]}
    wrong = _disagreements(scores, special, bpe)
    if len(wrong) > _MOST_WRONG * _TEXTS:
        raise _unknown(f"merging by score splits {len(wrong)} of {_TEXTS} texts otherwise")
    if wrong:
        log.warning(
            "llama.cpp merges by score, and so splits %d of %d random texts otherwise, such as %r",
            *(len(wrong), _TEXTS, wrong[0]),
        )
    if not state["model"]["byte_fallback"]:
        log.warning(
            "the tokenizer has no bytes as tokens: llama.cpp fails at characters that it lacks"
        )


def _prefixed(normalizer, pre_tokenizer, cuts: tuple[str, ...]) -> bool:
    """Whether a space is put in front of texts.

    Raises:
      UserError: if anything else is done to them than "▁" for spaces.
    """
    steps = [normalizer] if normalizer else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["normalizers"]
    prefixed = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE and not prefixed:
            prefixed = True
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "}:
            raise _unknown(f"its normalizer has {step}")
    if not pre_tokenizer:
        return prefixed
    if pre_tokenizer["type"] != "Metaspace" or pre_tokenizer.get("split", True) or prefixed:
        raise _unknown(f"it cuts texts by {' and '.join(cuts)}")
    return pre_tokenizer["prepend_scheme"] != "never"


def _scores(model: Mapping[str, Any]) -> dict[str, float]:
    """Of each token of the BPE; a token is the better, the earlier a merge makes it."""
    scores = dict.fromkeys(model["vocab"], _UNMERGED)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    for rank, (left, right) in reversed([*enumerate(pairs)]):
        scores[left + right] = -float(rank)
    return scores


def _disagreements(scores: Mapping[str, float], special: set[str], bpe: Any) -> list[str]:
    """Those of some random texts that llama.cpp's rule splits otherwise than the tokenizer does."""
    words = [t for t in scores if t not in special and not _BYTE.fullmatch(t)]
    words = [word for word in words if all(c in scores for c in word)]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(words, _TOKENS)) for _ in range(_TEXTS)]
    return [t for t in texts if merged(t, scores) != [token.value for token in bpe.tokenize(t)]]


def merged(text: str, scores: Mapping[str, float]) -> list[str]:
    """The tokens llama.cpp makes of a text: the best pair of neighbours that is one, and so on.

    Of equally good pairs, the first.
    """
    parts = list(text)
    while True:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        found = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [pairs[i]]
