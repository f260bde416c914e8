"""Tasks that prompt a decoder and score what it writes.

A row becomes pieces of text, each a prompt or an answer; the loss counts answers only, the end of
text included. Rows of the same prompt are references of one example.

Dimension key: R records  L length
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lte_jax import checks
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data import Example, Records, pack, pad, read_rows, tokenize
from lte_jax.errors import UserError
from lte_jax.generation import complete
from lte_jax.scoring import loglikelihoods
from lte_jax.tasks.measurement import Measured, Run, mean, place
from lte_jax.tasks.task import Task, library

log = logging.getLogger(__name__)
# Of texts, and the references of each; in the metric's usual unit. An array holds a value for each
# text, and the metric is their mean.
TextMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], float | np.ndarray]


class Piece(NamedTuple):
    """A part of a row's text; the tokens of answers have a loss."""

    text: str
    answer: bool = False
    reference: str = ""  # of an answer, the text without what marks its place and end


class _Row(NamedTuple):
    """A row in tokens: ids and marks of answers [T], the length of its prompt, its last answer."""

    ids: np.ndarray
    answers: np.ndarray
    prompt: int
    reference: str


@dataclasses.dataclass(frozen=True)
class Generation(Task):
    """A text for each prompt.

    Attributes:
      pieces: (row, its place for error messages, tokenizer) -> the row's prompts and answers; the
        last one is the answer that is scored.
      metrics: name -> function, the first one is the one that the LTE paper gives.
      libraries: that the metrics need.
      too_long: what is done with a prompt that does not leave the answer's `max_new_tokens` of
        data.length: "refuse" it, "cut" its first piece, or "drop" the row.
    """

    pieces: Callable[[Any, str, Any], list[Piece]]
    metrics: Mapping[str, TextMetric]
    libraries: tuple[str, ...] = ()
    too_long: Literal["refuse", "cut", "drop"] = "refuse"

    def adapted(self, data: DataConfig) -> Generation:
        """With the beams and max_new_tokens of `data`; greedy decoding has no other settings."""
        decoding = dict(self.decoding or {})
        if data.beams == 1:
            decoding = {"max_new_tokens": decoding["max_new_tokens"]}
        elif data.beams is not None:
            decoding["beams"] = data.beams
        if data.max_new_tokens is not None:
            decoding["max_new_tokens"] = data.max_new_tokens
        return dataclasses.replace(self, decoding=decoding)

    def dense_config(self, config: ModelConfig) -> ModelConfig:
        """The config of a decoder, as it is."""
        if not config.causal or config.head != "lm":
            raise UserError(
                f"data.task={self.name!r} needs a decoder, such as gpt2 or llama; the model's "
                f"family is {config.family!r}"
            )
        return config

    def records(
        self, source: str, split: str, data: DataConfig, tokenizer: Any, config: ModelConfig
    ) -> Records:
        """Prompts with answers, packed if `data.pack`.

        Of other splits than "train", data.max_validation_records examples, evenly spread.
        """
        rows = self._rows(source, split, data, tokenizer, config)
        return _lay(rows if split == "train" else _some(rows, data.max_validation_records), data)

    def texts(self, data: DataConfig) -> list[str]:
        """Prompts and answers of the training rows."""
        with read_rows(data.train, "train", data.max_documents is not None) as found:
            first = itertools.islice(found, data.max_documents)
            rows = [self.pieces(row, where, None) for where, row in first]
        return ["".join(piece.text for piece in pieces) for pieces in rows]

    def score(self, outputs: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
        """Of texts and the references of each."""
        return {name: found.value for name, found in self.scored(outputs, expected).items()}

    def scored(
        self, outputs: Sequence[str], expected: Sequence[Sequence[str]]
    ) -> dict[str, Measured]:
        """Likewise, with the standard errors of metrics that are means over texts."""
        return {
            name: mean(found) if np.ndim(found) else Measured(float(found), None, len(outputs))
            for name, metric in self.metrics.items()
            for found in [metric(outputs, expected)]
        }

    def measure(self, run: Run) -> tuple[dict[str, Measured], float]:
        """The metrics of what the model writes, and the share of experts skipped.

        `run.limit` counts prompts, evenly spread over the validation split, as in a run's report.
        The share is over prompts and references.

        Raises:
          UserError: on an encoder, without the task's libraries, and as `records` does.
        """
        self._check_libraries()
        config = self.dense_config(run.model.config)
        source = place(run.source, self.hub, self.folder)
        if not source:
            raise UserError(
                f"--tasks={self.name} has no validation split on the hub: expected --data=FILE of "
                "rows that were held out"
            )
        task = self.adapted(DataConfig(beams=run.beams, max_new_tokens=run.max_new_tokens))
        data = DataConfig(train=source, length=min(run.length or 2048, config.max_length))
        [split] = self.validation or ("validation",)
        rows = task._rows(source, split, data, run.tokenizer, config)
        rows = _some(rows, len(rows) if run.limit is None else run.limit)
        sparsity = 0.0
        if run.model.lte is not None:
            pairs = [(row.ids[: row.prompt], row.ids[row.prompt :]) for row in rows]
            sparsity = loglikelihoods(run.model, run.params, pairs, **run.how)[1]
        prompts, references = map(list, zip(*_examples(rows), strict=True))
        how = {**run.how, **(task.decoding or {}), "label": self.name}
        texts = complete(run.model, run.params, run.tokenizer, prompts, **how)
        return self.scored(texts, references), sparsity

    def _check_libraries(self) -> None:
        for name in self.libraries:  # now, not after hours of training
            library(name)

    def _both(self, data, tokenizer, config) -> tuple[Records, Records]:
        self._check_libraries()
        if data.validation or self.validation:
            return super()._both(data, tokenizer, config)
        rows = self._rows(data.train, "train", data, tokenizer, config)
        held = _some(rows, max(1, min(data.max_validation_records, len(rows) // 10)))
        prompts = {_prompt(row) for row in held}
        rest = [row for row in rows if _prompt(row) not in prompts]
        if not rest:
            raise UserError(f"{data.train}: {len(rows)} rows are too few to hold any out")
        return _lay(rest, data), _lay(held, data)

    def _rows(self, source, split, data, tokenizer, config) -> list[_Row]:
        end = tokenizer.eos_token_id
        if end is None or end >= config.vocab_size:
            raise UserError(
                f"data.task={self.name!r} needs an end of text: the tokenizer has none within the "
                f"model's vocabulary of {config.vocab_size}: set source.tokenizer"
            )
        new = dict(self.decoding or {})["max_new_tokens"]
        most = data.length - new
        if most < 1:
            raise UserError(
                f"data.length={data.length} leaves no room for a prompt: expected more than the "
                f"data.max_new_tokens={new} of task {self.name!r}"
            )
        with read_rows(source, split, data.max_documents is not None) as found:
            first = itertools.islice(found, data.max_documents)
            texts = {where: self.pieces(row, where, tokenizer) for where, row in first}
        if not texts:
            raise UserError(f"{source}: no rows of {self.name} in split {split!r}")
        coded = self._coded(list(texts.values()), tokenizer)
        rows, dropped, cut = [], 0, 0
        for (where, pieces), ids in zip(texts.items(), coded, strict=True):
            checks.token_ids(np.concatenate(ids), config.vocab_size, where)
            excess = sum(map(len, ids[:-1])) - most
            if excess > 0 and self.too_long == "drop":
                dropped += 1
                continue
            if excess > 0 and (self.too_long == "refuse" or excess >= len(ids[0])):
                raise UserError(
                    f"{where}: the prompt has {excess + most} tokens: expected at most {most}, as "
                    f"data.length={data.length} must hold {new} more for the answer"
                )
            if excess > 0:
                ids, cut = [ids[0][:-excess], *ids[1:]], cut + 1
            rows.append(_row(pieces, ids, end, data.length))
        if dropped or cut:
            words = f"{source}: of {len(texts)} rows, %d are dropped and %d prompts are cut"
            log.warning(f"{words}: data.length=%d is too short", dropped, cut, data.length)
        if not rows:
            raise UserError(f"{source}: no prompt fits in data.length={data.length}: raise it")
        return rows

    def _coded(self, texts: list[list[Piece]], tokenizer: Any) -> list[list[np.ndarray]]:
        """The token ids of each piece of each row; the first one has what begins a text."""
        first = tokenize([pieces[0].text for pieces in texts], tokenizer)
        middle = [piece.text for pieces in texts for piece in pieces[1:]]
        rest = iter(tokenize(middle, tokenizer, start=False))
        return [
            [begin, *itertools.islice(rest, len(pieces) - 1)]
            for begin, pieces in zip(first, texts, strict=True)
        ]


def _row(pieces: list[Piece], ids: list[np.ndarray], end: int, length: int) -> _Row:
    """A row of at most `length` tokens, with an end after each answer that has none."""
    ids = [
        np.append(part, np.int32(end)) if piece.answer and end not in part else part
        for piece, part in zip(pieces, ids, strict=True)
    ]
    marks = [np.full(len(part), p.answer, np.int32) for p, part in zip(pieces, ids, strict=True)]
    tokens, answers = np.concatenate(ids)[:length], np.concatenate(marks)[:length]
    return _Row(tokens, answers, sum(map(len, ids[:-1])), pieces[-1].reference)


def _prompt(row: _Row) -> bytes:
    return row.ids[: row.prompt].tobytes()


def _some(rows: list[_Row], most: int) -> list[_Row]:
    """The rows of `most` prompts, evenly spread over all of them."""
    prompts = list(dict.fromkeys(map(_prompt, rows)))
    places = np.linspace(0, len(prompts) - 1, min(most, len(prompts))).round().astype(int)
    kept = {prompts[i] for i in places}
    return [row for row in rows if _prompt(row) in kept]


def _lay(rows: list[_Row], data: DataConfig) -> Records:
    """The rows in records, and each prompt with the answers it has."""
    lay = pack if data.pack else pad
    records = lay([row.ids for row in rows], data.length)
    answers_RL = lay([row.answers for row in rows], data.length).tokens_RL  # lengths alone decide
    more = {"answers": answers_RL}
    return Records(records.tokens_RL, records.segments_RL, more, _examples(rows))


def _examples(rows: list[_Row]) -> tuple[Example, ...]:
    """Each prompt with the answers it has."""
    references: dict[bytes, list[str]] = {}
    for row in rows:
        references.setdefault(_prompt(row), []).append(row.reference)
    return tuple(
        Example(np.frombuffer(prompt, np.int32), tuple(texts))
        for prompt, texts in references.items()
    )
