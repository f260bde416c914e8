"""GLUE: eight tasks of classification and regression, with the benchmark's own metrics.

Columns and labels as in the hub's data set nyu-mll/glue; metrics as in Wang et al. (2019), table 1,
by scikit-learn and scipy. RoBERTa's settings: fairseq's examples/roberta/README.glue.md.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lte_jax.tasks.task import Classification, library


def accuracy(guessed_R: np.ndarray, labels_R: np.ndarray) -> float:
    """The share of right answers."""
    return float(np.mean(guessed_R == labels_R))


def f1(guessed_R: np.ndarray, labels_R: np.ndarray) -> float:
    """Of class 1: the harmonic mean of precision and recall."""
    return float(library("sklearn.metrics").f1_score(labels_R, guessed_R, zero_division=0))


def matthews(guessed_R: np.ndarray, labels_R: np.ndarray) -> float:
    """Matthews' correlation."""
    return float(library("sklearn.metrics").matthews_corrcoef(labels_R, guessed_R))


def pearson(guessed_R: np.ndarray, labels_R: np.ndarray) -> float:
    """Pearson's correlation."""
    return float(library("scipy.stats").pearsonr(guessed_R, labels_R)[0])


def spearman(guessed_R: np.ndarray, labels_R: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(library("scipy.stats").spearmanr(guessed_R, labels_R)[0])


_SAME = ("not_equivalent", "equivalent")
_ENTAILED = ("entailment", "not_entailment")
_TASKS = (
    Classification("cola", ("sentence",), ("unacceptable", "acceptable"), {"matthews": matthews}),
    Classification("sst2", ("sentence",), ("negative", "positive"), {"accuracy": accuracy}),
    Classification("mrpc", ("sentence1", "sentence2"), _SAME, {"accuracy": accuracy, "f1": f1}),
    Classification(
        "stsb", ("sentence1", "sentence2"), (), {"pearson": pearson, "spearman": spearman}
    ),
    Classification(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        {"accuracy": accuracy, "f1": f1},
    ),
    Classification(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        {"accuracy": accuracy},
        validation=("validation_matched", "validation_mismatched"),
    ),
    Classification("qnli", ("question", "sentence"), _ENTAILED, {"accuracy": accuracy}),
    Classification("rte", ("sentence1", "sentence2"), _ENTAILED, {"accuracy": accuracy}),
)
TASKS = {
    task.name: dataclasses.replace(
        task, hub=f"nyu-mll/glue:{task.name}", folder=f"glue/{task.name}"
    )
    for task in _TASKS
}
