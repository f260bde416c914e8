"""MMLU (Hendrycks et al., 2021): four answers to a question, the likeliest letter is chosen.

The prompt, five examples from the dev split of the subject, and the way a long prompt is cut, from
the left, are those of lm-eval's `mmlu`, so that figures compare with its. Columns as in the hub's
data set cais/mmlu.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import Any

import numpy as np

from lte_jax import checks
from lte_jax.data import read_rows, text_of, tokenize, value_of
from lte_jax.errors import UserError
from lte_jax.scoring import loglikelihoods
from lte_jax.tasks.measurement import Measured, Run, mean, place

log = logging.getLogger(__name__)
LETTERS = "ABCD"


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Questions with lettered answers, by subject.

    Attributes:
      name: as in `--tasks`.
      hub: its data set on the Hugging Face hub.
      folder: where it lies in a folder of several data sets.
      shots: examples before each question.
      split: of the questions.
      shots_from: the split of the examples.
    """

    name: str
    hub: str
    folder: str
    shots: int = 5
    split: str = "test"
    shots_from: str = "dev"

    def measure(self, run: Run) -> tuple[dict[str, Measured], float]:
        """Accuracies in percent: of all questions, their mean over subjects, and each subject's.

        Also returns the share of experts skipped.

        Raises:
          UserError: on a model without a head of next tokens, and on records without question,
            choices, answer or subject.
        """
        checks.language_model(run.model.config, self.name)
        source = place(run.source, self.hub, self.folder)
        examples: dict[str, list[str]] = {}
        for _, question, answer, subject in _questions(source, self.shots_from):
            examples.setdefault(subject, []).append(f"{question} {LETTERS[answer]}\n\n")
        prompts, answers, subjects, asked = [], [], [], collections.Counter()
        for where, question, answer, subject in _questions(source, self.split):
            shown = examples.get(subject, [])[: self.shots]
            if len(shown) < self.shots:
                raise UserError(
                    f"{where}: subject {subject!r} has {len(shown)} examples in the split "
                    f"{self.shots_from!r}: expected {self.shots}"
                )
            asked[subject] += 1
            if run.limit is None or asked[subject] <= run.limit:
                prompts.append(_HEAD.format(subject.replace("_", " ")) + "".join(shown) + question)
                answers.append(answer)
                subjects.append(subject)
        if not prompts:
            raise UserError(f"{source}: no questions in split {self.split!r}")
        right_R, sparsity = self._right(run, prompts, np.array(answers))
        return _by_subject(right_R, np.array(subjects)), sparsity

    def _right(self, run: Run, prompts: list[str], answers_R: np.ndarray):
        """Whether the likeliest answer is right, for each prompt; the share of experts skipped."""
        contexts = tokenize(prompts, run.tokenizer)
        whole = tokenize([p + " " + letter for p in prompts for letter in LETTERS], run.tokenizer)
        pairs = [
            (contexts[i // len(LETTERS)], ids[len(contexts[i // len(LETTERS)]) :])
            for i, ids in enumerate(whole)
        ]
        cut = sum(len(context) > run.model.config.max_length for context in contexts)
        if cut:
            log.warning(
                "%s: %d of %d prompts are longer than the model's %d tokens: their start is cut",
                self.name, cut, len(prompts), run.model.config.max_length,
            )  # fmt: skip
        scores, sparsity = loglikelihoods(run.model, run.params, pairs, **run.how)
        nats_RC = np.array([score.nats for score in scores]).reshape(len(prompts), -1)
        return nats_RC.argmax(axis=1) == answers_R, sparsity


_HEAD = "The following are multiple choice questions (with answers) about {}.\n\n"


def _questions(source: str, split: str) -> list[tuple[str, str, int, str]]:
    """Of each record its place, text up to "Answer:", number of the right answer, and subject."""
    with read_rows(source, split) as rows:
        return [(where, *_question(row, where)) for where, row in rows]


def _question(row: Any, where: str) -> tuple[str, int, str]:
    question, subject = text_of(row, "question", where), text_of(row, "subject", where)
    choices, answer = value_of(row, "choices", where), value_of(row, "answer", where)
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise UserError(f"{where}: choices={choices!r}: expected a list of {len(LETTERS)} texts")
    if isinstance(answer, bool) or answer not in range(len(LETTERS)):
        raise UserError(f"{where}: answer={answer!r}: expected 0 to {len(LETTERS) - 1}")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([question.strip(), *lines, "Answer:"]), int(answer), subject


def _by_subject(right_R: np.ndarray, subjects_R: np.ndarray) -> dict[str, Measured]:
    names = sorted(set(subjects_R.tolist()))
    each = {name: mean(100.0 * right_R[subjects_R == name]) for name in names}
    errors = [one.error for one in each.values()]
    # Of a mean of independent means.
    error = None if None in errors else float(np.linalg.norm(errors)) / len(errors)
    average = Measured(float(np.mean([one.value for one in each.values()])), error, len(names))
    return {
        "accuracy": mean(100.0 * right_R),
        "accuracy, mean of subjects": average,
    } | {f"accuracy: {name}": one for name, one in each.items()}


TASKS = {"mmlu": MultipleChoice("mmlu", "cais/mmlu:all", "mmlu")}
