"""Generation: E2E (restaurants described), XSum (one-sentence summaries), instruction tuning.

Columns as in the hub's data sets tuetschek/e2e_nlg and EdinburghNLP/xsum, and `messages` as in
allenai/tulu-v2-sft-mixture. Decoding as in microsoft/LoRA's examples/NLG (E2E) and BART's scripts
(XSum). Metrics by sacrebleu, nltk and rouge-score; docs/tasks.md says why not METEOR and CIDEr.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lte_jax.data import text_of, value_of
from lte_jax.errors import UserError, one_line
from lte_jax.tasks.generation import Generation, Piece
from lte_jax.tasks.task import library

_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*,?")
_ROLES = ("system", "user", "assistant")
# ---------------------------------------------------------------------------------------- metrics


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100: its tokenizer 13a, case counts, all references."""
    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return library("sacrebleu").corpus_bleu(list(texts), streams).score


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST-5 of nltk over lower-case words and punctuation; it has no upper bound."""
    words = library("nltk.tokenize").wordpunct_tokenize
    hypotheses = [words(text.lower()) for text in texts]
    known = [[words(ref.lower()) for ref in refs] for refs in references]
    longest = max(map(len, hypotheses))
    if not longest:
        return 0.0
    score = library("nltk.translate.nist_score").corpus_nist
    return score(known, hypotheses, n=min(5, longest))


def rouge(
    texts: Sequence[str], references: Sequence[Sequence[str]], kind: str, stem: bool
) -> np.ndarray:
    """F1 of rouge-score of each text [R], the best of its references, 0 to 100."""
    scorer = library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=stem)
    pairs = zip(texts, references, strict=True)
    scores_R = [scorer.score_multi(list(refs), text)[kind].fmeasure for text, refs in pairs]
    return 100 * np.array(scores_R)


# ---------------------------------------------------------------------------------------- prompts


def pair(
    prompt: str, answer: str, write: Callable[[str, str], str], lead: str
) -> Callable[[Any, str, Any], list[Piece]]:
    """Pieces of one prompt, the column `prompt` through `write` and then `lead`, and an answer."""

    def pieces(row: Any, where: str, tokenizer: Any) -> list[Piece]:
        given, wanted = (text_of(row, column, where).strip() for column in (prompt, answer))
        for column, text in (prompt, given), (answer, wanted):
            if not text:
                raise UserError(f"{where}: column {column!r} is empty: expected a text")
        return [Piece(write(given, where)), Piece(lead), Piece(" " + wanted, True, wanted)]

    return pieces


def slots(meaning: str, where: str) -> str:
    """A meaning such as name[Blue Spice], area[riverside] as name : Blue Spice | area : riverside.

    So does microsoft/LoRA's recipe for GPT-2, with other names of some slots (Type for eatType) and
    a special token in place of our ||.
    """
    found = _SLOT.findall(meaning)
    if not found or _SLOT.sub("", meaning).strip():
        raise UserError(
            f"{where}: meaning_representation={meaning[:60]!r}: expected slots, such as "
            "name[Blue Spice], area[riverside]"
        )
    return " | ".join(f"{name.strip()} : {value.strip()}" for name, value in found)


def turns(row: Any, where: str, tokenizer: Any) -> list[Piece]:
    """A conversation by the tokenizer's own chat template, or as "User: ...", "Assistant: ..."."""
    messages = _messages(value_of(row, "messages", where), where)
    template = getattr(tokenizer, "chat_template", None)
    write = _plain if template is None else functools.partial(_templated, tokenizer, where)
    pieces, done = [], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, whole = write(messages[:place], True), write(messages[: place + 1], False)
        if not (asked.startswith(done) and whole.startswith(asked)):
            raise UserError(
                f"{where}: the chat template writes earlier turns anew, so answers cannot be told "
                "from prompts: use rows of one turn, or a tokenizer with another template"
            )
        answer = Piece(whole[len(asked) :], True, message["content"].strip())
        pieces += [Piece(asked[len(done) :]), answer]
        done = whole
    return pieces


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    """The messages up to the last answer."""
    good = isinstance(messages, list | tuple) and all(
        isinstance(m, dict) and m.get("role") in _ROLES and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good:
        raise UserError(
            f"{where}: messages={repr(messages)[:60]}: expected a list of "
            '{"role": "user", "content": "..."}, with roles ' + ", ".join(_ROLES)
        )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[0] == 0 or any(not messages[i]["content"].strip() for i in answers):
        raise UserError(f"{where}: messages: expected a question and an answer that is not empty")
    return list(messages[: answers[-1] + 1])


def _plain(messages: list[dict[str, str]], ask: bool) -> str:
    text = ""
    for message in messages:
        between = "" if message["role"] == "assistant" else "\n"
        text += f"{message['role'].title()}: {message['content'].strip()}{between}"
    return text + "Assistant:" if ask else text


def _templated(tokenizer: Any, where: str, messages: list[dict[str, str]], ask: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # of the template's own, such as "roles must alternate"
        raise UserError(f"{where}: the chat template refuses it ({one_line(error)})") from None


# ------------------------------------------------------------------------------------------ tasks


def _rouge(kind: str, stem: bool) -> Callable[..., float]:
    return functools.partial(rouge, kind=kind, stem=stem)


def _verbatim(text: str, where: str) -> str:
    return text


_TASKS = (
    Generation(
        "e2e",
        ("meaning_representation", "human_reference"),
        pair("meaning_representation", "human_reference", slots, " ||"),
        {"rougeL": _rouge("rougeL", False), "bleu": bleu, "nist": nist},
        decoding={"max_new_tokens": 64, "beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4},
        libraries=("rouge_score", "sacrebleu", "nltk"),
        hub="tuetschek/e2e_nlg",
        folder="e2e_nlg",
        source="Novikova et al. (2017); microsoft/LoRA examples/NLG",
    ),
    Generation(
        "xsum",
        ("document", "summary"),
        pair("document", "summary", _verbatim, "\nTL;DR:"),
        {kind: _rouge(kind, True) for kind in ("rougeL", "rouge1", "rouge2")},
        decoding={
            "max_new_tokens": 60,
            "beams": 6,
            "length_penalty": 1.0,
            "no_repeat_ngram": 3,
            "min_new_tokens": 10,
        },
        libraries=("rouge_score",),
        too_long="cut",
        hub="EdinburghNLP/xsum",
        folder="xsum",
        source="Narayan et al. (2018); BART's scripts",
    ),
    Generation(
        "instruct",
        ("messages",),
        turns,
        {"rougeL": _rouge("rougeL", False)},
        decoding={"max_new_tokens": 128},
        libraries=("rouge_score",),
        too_long="drop",
        validation=(),
        folder="instruct",
        source="Wang et al. (2023), Tulu",
    ),
)
TASKS = {task.name: task for task in _TASKS}
