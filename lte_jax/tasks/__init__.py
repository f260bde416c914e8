"""Tasks: what a model is trained and measured on, a file for each benchmark.

`data.task` names one; "" is language modelling on the texts of `data.train`. A new task is an entry
of a file here, or a file and its name below.
"""

from __future__ import annotations

from lte_jax.errors import UserError, nearest
from lte_jax.tasks import glue
from lte_jax.tasks.task import Classification

__all__ = ["TASKS", "Classification", "find"]
TASKS = {**glue.TASKS}


def find(name: str) -> Classification:
    """The task of that name.

    Raises:
      UserError: if there is none.
    """
    if name not in TASKS:
        raise UserError(f"data.task={name!r}: {nearest(name, TASKS)}")
    return TASKS[name]
