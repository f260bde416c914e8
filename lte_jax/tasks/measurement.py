"""What measuring a task gives, and what each kind of task is asked for.

Dimension key: R records
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lte_jax.data import local_path

RESAMPLES = 200  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric, its standard error (None: not known) and the number of records behind it."""

    value: float
    error: float | None
    records: int


@dataclasses.dataclass(frozen=True)
class Run:
    """How a model is measured: the arguments that all tasks have in common.

    Attributes:
      model: dense or LTE.
      params: its parameters.
      tokenizer: its tokenizer.
      source: folder or hub id of the data; "": the task's own hub id.
      length: tokens of a record; None: the task's own.
      limit: records to read, from the first (of MMLU: of each subject; of generation: prompts,
        evenly spread); None: all.
      beams: width of the beam search of generation; 1: greedy. None: the task's own.
      max_new_tokens: that generation writes; None: the task's own.
      how: routing, threshold and batch_size, as in `scoring.loglikelihoods`.
    """

    model: Any
    params: Mapping[str, Any]
    tokenizer: Any
    source: str = ""
    length: int | None = None
    limit: int | None = None
    beams: int | None = None
    max_new_tokens: int | None = None
    how: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def place(source: str, hub: str, folder: str) -> str:
    """Where a task's data are: `source`, its folder of that task, or the hub data set."""
    inside = local_path(source) / folder
    return str(inside) if source and os.path.isdir(inside) else source or hub


def mean(values_R: Any) -> Measured:
    """The mean and its standard error."""
    values_R = np.asarray(values_R, np.float64)
    count = len(values_R)
    error = float(values_R.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Measured(float(values_R.mean()), error, count)


def bootstrapped(
    metric: Callable[[np.ndarray, np.ndarray], float], guessed_R: np.ndarray, labels_R: np.ndarray
) -> float:
    """The standard error of a metric: its spread over records drawn anew, with replacement."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, len(labels_R), len(labels_R)) for _ in range(RESAMPLES))
    return float(np.std([metric(guessed_R[chosen], labels_R[chosen]) for chosen in drawn], ddof=1))
