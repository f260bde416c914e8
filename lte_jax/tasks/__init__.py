"""Tasks: what a model is trained and measured on, a file for each benchmark.

`data.task` names one of TASKS, which can be trained on; "" is language modelling on the texts
of `data.train`. `evaluate.py --tasks` measures those of MEASURED. A new task is an entry of a file
here, or a file and its name below.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lte_jax.config import Count, flag
from lte_jax.errors import UserError, nearest
from lte_jax.model import Transformer
from lte_jax.routing import dials
from lte_jax.selection import Routing
from lte_jax.tasks import glue, mmlu, nlg, wikitext
from lte_jax.tasks.measurement import Run
from lte_jax.tasks.task import Classification, Task

__all__ = [
    "MEASURED",
    "SETTINGS",
    "TASKS",
    "Classification",
    "Run",
    "Task",
    "add_to",
    "find",
    "measure",
    "rows",
]
TASKS: dict[str, Task] = {**glue.TASKS, **nlg.TASKS}
MEASURED: Mapping[str, Any] = {**TASKS, **wikitext.TASKS, **mmlu.TASKS}
# Flags of evaluate.py in the order in which `measure` takes them, after tasks, model and params.
SETTINGS = ("data", "length", "records", "beams", "max_new_tokens")


def find(name: str, among: Mapping[str, Any] = TASKS, key: str = "data.task") -> Any:
    """The task of that name.

    Raises:
      UserError: if there is none; names `key`.
    """
    if name not in among:
        raise UserError(f"{key}={name!r}: {nearest(name, among)}")
    return among[name]


def _named(text: str) -> list[str]:
    """The `type=` of an argparse flag: names of tasks to measure, joined by commas."""
    try:
        return [find(name, MEASURED, "task").name for name in text.split(",")]
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `measure`'s own: which tasks, and how they generate."""
    add, count = parser.add_argument, flag(Count)
    add("--tasks", type=_named, help=f"joined by commas: {', '.join(MEASURED)}")
    add("--beams", type=count, help="of tasks that generate; 1: greedy")
    add("--max-new-tokens", type=count, help="that such tasks write")


def measure(
    names: Sequence[str],
    model: Transformer,
    params: Mapping[str, Any],
    source: str | None = None,
    length: int | None = None,
    limit: int | None = None,
    beams: int | None = None,
    max_new_tokens: int | None = None,
    *,
    tokenizer: Any,
    name: str | None = None,
    baseline: tuple[Transformer, Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    routing: Routing | str | None = None,
    threshold: float | None = None,
    sparsity: float | Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Measures a model, and the dense model it was made from, on tasks.

    Args:
      names: of tasks, see MEASURED.
      model: dense or LTE.
      params: its parameters.
      source: folder or hub id of the data, or a folder with a folder for each task (`task.folder`);
        None: each task's own hub id.
      length: tokens of a record; None: the task's own.
      limit: records to read, from the first (of MMLU: of each subject; of generation: prompts,
        evenly spread); None: all.
      beams: width of the beam search of tasks that generate; 1: greedy. None: the task's own.
      max_new_tokens: that they write; None: the task's own.
      tokenizer: of both models.
      name: of the model in the rows; None: "LTE" or "dense".
      baseline: the dense model and its parameters.
      batch_size: of the forward passes.
      routing: of `model`, as in `lte_jax.apply`.
      threshold: in place of `model.lte.threshold`.
      sparsity: share of experts to skip, in place of a threshold; one or several.

    Returns:
      Rows of JSON: "task", "model", "metric", "value", "error" (standard error, or None),
      "records" and "sparsity" (share of experts skipped).

    Raises:
      UserError: on an unknown task, before anything is measured, and as the tasks do.
    """
    chosen = [find(task, MEASURED, "--tasks") for task in names]
    how = {"batch_size": batch_size, "routing": routing}
    run = Run(model, params, tokenizer, source or "", length, limit, beams, max_new_tokens, how)
    at = dials(name, model.lte, routing, threshold, sparsity)
    runs = {who: dataclasses.replace(run, how=how | {"threshold": t}) for who, t in at.items()}
    if baseline is not None:
        model, params = baseline
        dense = dataclasses.replace(run, model=model, params=params, how={"batch_size": batch_size})
        runs = {"dense": dense} | runs
    return [row for task in chosen for row in rows(task, runs)]


def rows(task: Any, runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """What `measure` returns of one task, for each model by its name."""
    found = []
    for who, run in runs.items():
        metrics, sparsity = task.measure(run)
        row = {"task": task.name, "model": who, "sparsity": sparsity}
        found += [row | {"metric": m} | dataclasses.asdict(x) for m, x in metrics.items()]
    return found
