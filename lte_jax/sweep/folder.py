"""The folder of a sweep: what of it is done, by whom a run is taken, and of which grid it is.

    grid.json               the grid
    <run>/ <run>.log        work directory of a run; its results.json, written last, says: finished
    .taken/<run>/.lock      held by the process that sees to the run, and by the run itself
    compiled/               programs that the runs share
    table.md *.png results.json

The lock of a work directory is its run's own; the sweep needs one from before that run starts. It
is inherited by the run, so that a run whose sweep was killed is not started a second time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import traverse_util

from lte_jax import files, workdir
from lte_jax.config import Sweep
from lte_jax.errors import UserError
from lte_jax.sweep.expansion import Run

_FREE = ("reference", "oracle")  # keys that change no run
_SETS = ("targets", "seeds")  # keys that may grow
_DAMAGED = "remove it: the next sweep writes it again"


@dataclasses.dataclass(frozen=True)
class Folder:
    """OUT of a sweep."""

    root: Path
    # Rows of an earlier results.json by name, whose runs are not made again: see `results.known`.
    known: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def workdir(self, run: Run) -> Path:
        """The work directory of a run."""
        return self.root / run.name

    def finished(self, run: Run) -> bool:
        """Whether a run is trained and measured."""
        return run.name in self.known or self.made(run)

    def made(self, run: Run) -> bool:
        """Whether that was here, and what it has made is at hand."""
        return (self.workdir(run) / "results.json").exists()

    @contextlib.contextmanager
    def taken(self, run: Run) -> Iterator[int]:
        """Keeps others from a run.

        Yields:
          The lock's file descriptor, for the run to inherit.

        Raises:
          workdir.InUse: if another process has taken it.
        """
        place = self.root / ".taken" / run.name
        with files.explained(place):  # it stays: another sweep may be about to lock it
            place.mkdir(parents=True, exist_ok=True)
        with workdir.held(place) as lock:
            yield lock

    def check(self, sweep: Sweep, runs: Sequence[Run]) -> None:
        """Refuses a folder of another grid, and runs of other settings; records the grid.

        A grid may grow, by methods, targets and seeds: what is finished stays.

        Raises:
          UserError: if so, naming the keys that differ.
        """
        path, new = self.root / "grid.json", plain(sweep)
        old = files.read_json(path, _DAMAGED) if path.exists() else None
        if old is not None and (different := _differing(old, new)):
            raise UserError(
                f"{self.root} holds a sweep of another grid, which differs in "
                f"{', '.join(different)}: restore it to go on, or choose another --out"
            )
        for run in runs:
            workdir.check_same(workdir.Paths(self.workdir(run)), run.experiment)
        if old != new:
            with files.explained(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
            files.atomic_write(path, json.dumps(new, indent=1) + "\n")


def plain(sweep: Sweep) -> dict[str, Any]:
    """The grid as JSON returns it."""
    return json.loads(json.dumps(dataclasses.asdict(sweep)))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys of an old grid that a new one changes, but for what may grow or is free."""
    gone = [name for name in old.get("methods", {}) if name not in new["methods"]]
    flat_old, flat_new = (
        {".".join(map(str, key)): value for key, value in traverse_util.flatten_dict(grid).items()}
        for grid in (old, new)
    )
    changed = [f"methods.{name}" for name in gone]
    for key, value in flat_old.items():
        last = key.rpartition(".")[2]
        if last in _FREE or any(key.startswith(f"methods.{name}.") for name in gone):
            continue
        value: Any = value  # flax has a type of its own for empty dictionaries
        now: Any = flat_new.get(key)
        both = [*value, *(now or ())] if isinstance(value, list) else []
        if both and all(isinstance(word, str) for word in both):  # overrides
            value, now = (workdir.affecting(words or ()) for words in (value, now))
        lists = last in _SETS and isinstance(value, list) and isinstance(now, list)
        grown = lists and value and set(value) <= set(now)
        if value != now and not grown:
            changed.append(key)
    return changed
