"""Does what is left of a sweep: several runs at a time, beside other sweeps on the same folder."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lte_jax import figures, interrupt, report
from lte_jax.sweep import processes
from lte_jax.sweep.expansion import Run
from lte_jax.sweep.folder import Folder
from lte_jax.workdir import InUse

# What does a run: config, work directory, overrides, descriptors to inherit -> exit code.
Runner = Callable[[str, Path, Sequence[str], Sequence[int]], int]
_LOOK_SECONDS = 1.0  # between two looks at signals and at what other sweeps have finished


def run_all(
    runs: Sequence[Run], folder: Folder, workers: int = 1, runner: Runner = processes.train
) -> list[Run]:
    """Does the runs that are not finished.

    A run that another process has taken is waited for, and done here if that one does not finish
    it. A run that fails does not keep the others from going on.

    Args:
      runs: in order; those that others go on from before them.
      folder: of the sweep.
      workers: how many at a time.
      runner: does one; it succeeds if the run is finished then, whatever its exit code.

    Returns:
      Those that failed, and those that would go on from them.

    Raises:
      Interrupted: after a signal, once the runs in progress have stopped.
    """
    waiting = [run for run in runs if not folder.finished(run)]
    with (
        processes.side_by_side(workers) as pool,
        _Progress(len(runs), len(runs) - len(waiting)) as progress,
    ):
        work = _Work(folder, runner, pool, workers, waiting, progress)
        work.to_the_end()
    left = sum(not folder.finished(run) for run in runs)
    interrupt.check(f"with {left} of {len(runs)} runs left")
    return work.failed


@dataclasses.dataclass
class _Work:
    """The state of `run_all`; all of it belongs to the main thread."""

    folder: Folder
    runner: Runner
    pool: concurrent.futures.Executor
    workers: int
    waiting: list[Run]
    progress: _Progress
    failed: list[Run] = dataclasses.field(default_factory=list)
    going: dict[concurrent.futures.Future, tuple[Run, contextlib.ExitStack]] = dataclasses.field(
        default_factory=dict
    )

    def to_the_end(self) -> None:
        """Until nothing waits or a signal has arrived, and nothing goes."""
        while self.going or (self.waiting and not interrupt.requested()):
            self.strike_off()
            while len(self.going) < self.workers and not interrupt.requested():
                if not self.begin():
                    break
            if self.going:
                how = {"return_when": concurrent.futures.FIRST_COMPLETED}
                ended, _ = concurrent.futures.wait(self.going, _LOOK_SECONDS, **how)
                for future in ended:
                    self.end(future)
            elif self.waiting:  # all are taken by others
                self.progress.say_once(f"waiting for {self.waiting[0].name}, taken by another")
                time.sleep(_LOOK_SECONDS)
            self.progress.refresh()

    def strike_off(self) -> None:
        """Takes what others have finished, or what goes on from a failed run, off the list."""
        for run in list(self.waiting):
            if self.folder.finished(run):
                self.waiting.remove(run)
                self.progress.finished(self.folder, run)
            elif any(run.after == other.name for other in self.failed):
                self.waiting.remove(run)
                self.failed.append(run)
                self.progress.say(f"{run.name}: not begun, as {run.after} failed")

    def begin(self) -> bool:
        """Begins the first run that can begin; False if there is none."""
        unfinished = {run.name for run in self.waiting}
        unfinished |= {run.name for run, _ in self.going.values()}
        for run in self.waiting:
            if run.after in unfinished:
                continue
            with contextlib.ExitStack() as stack:
                try:
                    lock = stack.enter_context(self.folder.taken(run))
                except InUse:
                    continue
                if self.folder.finished(run):  # while it was being taken: see `strike_off`
                    continue
                how = run.config, self.folder.workdir(run), run.overrides, (lock,)
                self.going[self.pool.submit(self.runner, *how)] = run, stack.pop_all()
            self.waiting.remove(run)
            return True
        return False

    def end(self, future: concurrent.futures.Future) -> None:
        """Notes what has become of a run."""
        run, stack = self.going.pop(future)
        with stack:
            code = future.result()
        if self.folder.finished(run):
            self.progress.finished(self.folder, run)
        elif not interrupt.requested():
            self.failed.append(run)
            log = processes.log(self.folder.workdir(run))
            self.progress.say(f"{run.name}: failed with code {code}, see {log}{_last(log)}")


class _Progress:
    """A bar over the runs, with the time left, and a line for each that ends."""

    def __init__(self, total: int, finished: int):
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, initial=finished, desc="runs", unit="run", smoothing=0, disable=None
        )
        self.number, self.total, self.before = finished, total, finished
        self.start, self.said = time.monotonic(), set[str]()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def refresh(self) -> None:
        """Shows the time."""
        self.bar.refresh()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def say_once(self, line: str) -> None:
        """A line, unless it was said."""
        if line not in self.said:
            self.said.add(line)
            self.say(line)

    def finished(self, folder: Folder, run: Run) -> None:
        """What a finished run has measured, and about how long the rest takes."""
        self.number += 1
        self.bar.update()
        model = report.read(folder.workdir(run) / "results.json")["models"][-1]
        name, value = figures.quality(model)
        words = f"{self.number}/{self.total} {run.name}: {name} {value:.3f}"
        words += f", {model['sparsity']:.1%} skipped" if model["sparsity"] else ""
        if left := self.total - self.number:
            each = (time.monotonic() - self.start) / (self.number - self.before)
            words += f"; about {_duration(left * each)} left"
        self.say(words)


def _last(log: Path) -> str:
    """The last line of a log, which is an error's own line if a user can mend it."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return f": {lines[-1][:300]}" if lines else ""


def _duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
