"""What a task is: its columns, labels, loss and metrics, as data; and its records.

A file of this folder describes the tasks of one benchmark. A kind of task is a subclass of `Task`:
`Classification` here, `Generation` in generation.py. The loss follows from the model's head
(`ModelConfig.head`) and the records; the trainer knows no task.

Dimension key: R records  L length  S texts of a record  T texts  Y labels
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import numpy as np

from lte_jax import checks
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data import Records, check, overlap, pack, pad, read_rows, text_of, value_of
from lte_jax.errors import UserError
from lte_jax.objective import predicted
from lte_jax.scoring import class_logits
from lte_jax.tasks.measurement import Measured, Run, bootstrapped, place

log = logging.getLogger(__name__)
Metric = Callable[[np.ndarray, np.ndarray], float]  # of predictions [T] and labels [T]
# What a new classifier reads, whatever the embeddings of texts were: as transformers' classifiers.
FIRST_TOKEN: Mapping[str, Any] = {
    "pooling": "first", "embed_dim": None, "embed_activation": "none", "unit_length": False,
}  # fmt: skip


def library(name: str) -> Any:
    """A library that metrics are computed with.

    Raises:
      UserError: if it is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this metric needs {name}: pip install 'lte-jax[tasks]'") from None


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What preflight, pipeline and evaluation ask of a task, whatever its kind.

    Attributes:
      name: as in `data.task`.
      columns: what is read of a row, besides a label.
      validation: name of the validation split, or splits; (): there is none, and a part of the
        training rows is held out.
      decoding: settings of `generate` with which the model writes what is scored; None: the logits
        of its head are scored.
      source: where the task is described.
      hub: its data set on the Hugging Face hub.
      folder: where it lies in a folder of several data sets.
    """

    name: str
    columns: tuple[str, ...]
    validation: tuple[str, ...] = dataclasses.field(default=("validation",), kw_only=True)
    decoding: Mapping[str, Any] | None = dataclasses.field(default=None, kw_only=True)
    source: str = dataclasses.field(default="", kw_only=True)
    hub: str = dataclasses.field(default="", kw_only=True)
    folder: str = dataclasses.field(default="", kw_only=True)

    def adapted(self, data: DataConfig) -> Task:
        """The task with what `data` changes of it."""
        return self

    @abc.abstractmethod
    def dense_config(self, config: ModelConfig) -> ModelConfig:
        """The model's config with the head of this task.

        Raises:
          UserError: if its family has none.
        """

    @abc.abstractmethod
    def records(
        self, source: str, split: str, data: DataConfig, tokenizer: Any, config: ModelConfig
    ) -> Records:
        """The records of a split.

        Raises:
          UserError: on rows that do not fit the task; names file and line.
        """

    def texts(self, data: DataConfig) -> list[str]:
        """The training texts, for a tokenizer that is learned from them.

        Raises:
          UserError: if the task has no running text.
        """
        raise UserError(
            f"data.task={self.name!r} does not teach a tokenizer: expected source.tokenizer to be "
            "a folder or hub id"
        )

    @abc.abstractmethod
    def score(self, outputs: Any, expected: Any) -> dict[str, float]:
        """The metrics of what a model put out: logits and labels, or texts and references."""

    def build(
        self, data: DataConfig, tokenizer: Any, config: ModelConfig, seed: int = 0
    ) -> tuple[Records, Records]:
        """The records of training and of the (first) validation split.

        `seed` is of what a task chooses by chance.

        Raises:
          UserError: if data, tokenizer and model do not fit together.
        """
        check(data, tokenizer, config)
        train, validation = self._both(data, tokenizer, config)
        if len(train) < data.batch_size:
            raise UserError(
                f"{data.train}: {len(train)} training records, fewer than data.batch_size="
                f"{data.batch_size}: lower data.batch_size"
            )
        return train, validation

    def _both(self, data, tokenizer, config) -> tuple[Records, Records]:
        split = (self.validation or ("validation",))[0]
        if not data.validation and overlap(data.train, data.train, split):
            raise UserError(
                f"data.validation is '' and {data.train} has no validation part: name a validation "
                "file, or a folder with a file for each split"
            )
        train = self.records(data.train, "train", data, tokenizer, config)
        held_out = data.validation or data.train
        return train, self.records(held_out, split, data, tokenizer, config)


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """A label for each text or pair of texts, which are its `columns`.

    Attributes:
      labels: names of the classes, in the order of their numbers; () for a regression.
      metrics: name -> function, the first one is the one that papers give.
    """

    labels: tuple[str, ...]
    metrics: Mapping[str, Metric]

    def dense_config(self, config: ModelConfig) -> ModelConfig:
        """The encoder's config with a head of classes."""
        if config.causal:
            raise UserError(
                f"data.task={self.name!r} needs an encoder, such as roberta or bert; the model's "
                f"family is {config.family!r}"
            )
        number = len(self.labels) or 1
        reads = {} if config.head == "classes" else FIRST_TOKEN
        return dataclasses.replace(config, head="classes", num_labels=number, pooler=True, **reads)

    def build(
        self, data: DataConfig, tokenizer: Any, config: ModelConfig, seed: int = 0
    ) -> tuple[Records, Records]:
        """As of any task; of validation, a choice of data.max_validation_records."""
        train, validation = super().build(data, tokenizer, config, seed)
        return train, validation.some(data.max_validation_records, np.random.default_rng(seed))

    def records(
        self, source: str, split: str, data: DataConfig, tokenizer: Any, config: ModelConfig
    ) -> Records:
        """Texts or pairs, several a record if `data.pack`; long ones are cut, and that is said."""
        texts: list[list[str]] = []
        labels = []
        with read_rows(source, split, data.max_documents is not None) as rows:
            for where, row in itertools.islice(rows, data.max_documents):
                texts.append([text_of(row, column, where) for column in self.columns])
                labels.append(self._label(row, where))
        if not labels:
            raise UserError(f"{source}: no records of {self.name} in split {split!r}")
        kind = np.int32 if self.labels else np.float32
        return self._encode(texts, np.array(labels, kind), source, data, tokenizer, config)

    def _label(self, row: Any, where: str) -> Any:
        label = value_of(row, "label", where)
        number = isinstance(label, int | float) and not isinstance(label, bool)
        known = label in range(len(self.labels)) if self.labels else number and isfinite(label)
        if not (number and known):
            names = ", ".join(f"{i} ({name})" for i, name in enumerate(self.labels))
            raise UserError(
                f"{where}: label={label!r}: expected {names or 'a number'}"
                + (" (-1 marks a test set without labels)" if label == -1 else "")
            )
        return label

    def _encode(self, texts, labels_T, source, data, tokenizer, config) -> Records:
        length = data.length
        coded = tokenizer(*map(list, zip(*texts, strict=True)))
        ids, types, cut = [], [], 0
        for number, tokens in enumerate(map(np.asarray, coded["input_ids"])):
            checks.token_ids(tokens, config.vocab_size, f"{source}: text {number + 1}")
            one = {name: values[number] for name, values in coded.items()}
            if len(tokens) > length:
                cut += 1
                one = tokenizer(*texts[number], truncation=True, max_length=length)
            ids.append(np.asarray(one["input_ids"]))
            types.append(np.asarray(one.get("token_type_ids", np.zeros_like(ids[-1]))))
        if cut:
            log.warning("%s: %d of %d texts are cut to %d tokens", source, cut, len(ids), length)
        lay = functools.partial(pack if data.pack else pad, length=length)
        records = lay(ids)
        more = {"labels": _laid(labels_T, ids, lay, records.segments_RL)}
        if config.token_types > 1:
            more["types"] = lay(types).tokens_RL  # lengths alone decide where a text lies
        return Records(records.tokens_RL, records.segments_RL, more)

    def score(self, outputs: np.ndarray, expected: np.ndarray) -> dict[str, float]:
        """In percent, of logits [T, Y] and labels [T]."""
        guessed_T = outputs.argmax(axis=1) if self.labels else outputs[:, 0]
        return {name: 100 * metric(guessed_T, expected) for name, metric in self.metrics.items()}

    def measure(self, run: Run) -> tuple[dict[str, Measured], float]:
        """The metrics over the validation splits, in percent, and the share of experts skipped.

        Raises:
          UserError: on a model without this task's classes, and as `records` does.
        """
        config, number = run.model.config, len(self.labels) or 1
        if config.head != "classes" or config.num_labels != number:
            raise UserError(
                f"{self.name}: the model has no head of {number} classes: expected one trained for "
                f"it (train.py with data.task={self.name})"
            )
        source, found, sparsity = place(run.source, self.hub, self.folder), {}, []
        length = min(run.length or 512, config.max_length)
        data = DataConfig(train=source, length=length, max_documents=run.limit)
        for split in self.validation:
            records = self.records(source, split, data, run.tokenizer, config).trimmed()
            logits_TY, skipped = class_logits(run.model, run.params, records, **run.how)
            guessed_T = logits_TY.argmax(axis=1) if self.labels else logits_TY[:, 0]
            labels_T = records.more["labels"][predicted(run.model, records[:])]
            for name, metric in self.metrics.items():
                where = name if len(self.validation) == 1 else f"{name} ({split})"
                error = 100 * bootstrapped(metric, guessed_T, labels_T)
                found[where] = Measured(100 * metric(guessed_T, labels_T), error, len(labels_T))
            sparsity.append(skipped)
        return found, float(np.mean(sparsity))


def _laid(labels_T, ids, lay: Callable, segments_RL: np.ndarray) -> np.ndarray:
    """The labels of the texts of each record, [R, S]; 0 where a record has fewer than S texts."""
    numbers_RL = lay([np.full(len(tokens), number) for number, tokens in enumerate(ids)]).tokens_RL
    labels_RS = np.zeros((len(segments_RL), segments_RL.max()), labels_T.dtype)
    rows, columns = np.nonzero(segments_RL)
    labels_RS[rows, segments_RL[rows, columns] - 1] = labels_T[numbers_RL[rows, columns]]
    return labels_RS
