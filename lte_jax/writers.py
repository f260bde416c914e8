"""Writers of metrics: terminal, JSON lines, TensorBoard, Weights & Biases.

A `Writer` is told when a stage starts or resumes, then receives named values by step, each step
once. The trainer has one writer; `MultiWriter` combines several. Only process 0 writes. A value has
the same name in all of them: docs/metrics.md lists the names, and says how to add a writer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lte_jax.config import Experiment
from lte_jax.errors import UserError
from lte_jax.files import atomic_write, explained

log = logging.getLogger(__name__)

# Shown on the terminal, in this order, if present. The objective has terms of either sign.
SHOWN = (
    "loss",
    "distill",
    "distill_hidden",
    "sparsity",
    "tokens_per_second",
    "validation_loss",
    "validation_sparsity",
)
# Values of the clock: all others are the same in every run of an experiment, interrupted or not.
CLOCK = ("seconds", "tokens_per_second")
_OLD_NAMES = {"task": "loss", "loss": "objective"}  # of the lines that have a "task"


class Writer:
    """A destination for metrics."""

    def start(self, stage: str, step: int, steps: int) -> None:
        """`stage` starts (step 0) or resumes after `step` of its `steps`."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Values measured after `step` of `stage`."""

    def close(self) -> None:
        """Flushes; no writes may follow."""


class MultiWriter(Writer):
    """Several writers as one."""

    def __init__(self, writers: Iterable[Writer]) -> None:
        self._writers = tuple(writers)

    def start(self, stage: str, step: int, steps: int) -> None:
        """See `Writer`."""
        for writer in self._writers:
            writer.start(stage, step, steps)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        for writer in self._writers:
            writer.write(stage, step, values)

    def close(self) -> None:
        """See `Writer`; closes all, even if one fails."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)


class TerminalWriter(Writer):
    """A progress bar per stage on a terminal; elsewhere (a file, CI) one plain line per write.

    Both show the values of SHOWN and the time left in the stage; the bar keeps the last of each.

    Args:
      file: text stream to write to; None: standard error.
    """

    def __init__(self, file: Any = None) -> None:
        self._file = file or sys.stderr
        self._bar: Any = None  # tqdm's; None off a terminal
        self._shown: dict[str, float] = {}

    def start(self, stage: str, step: int, steps: int) -> None:
        """See `Writer`."""
        self.close()
        self._shown, self._steps = {}, steps
        self._first: tuple[int, float] | None = None  # step and time of the first write
        if self._file.isatty():
            self._bar = tqdm(
                desc=stage,
                initial=step,
                total=steps,
                unit=" steps",
                file=self._file,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n}/{total} [{elapsed}<{remaining}]"
                "{postfix}",
            )

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._shown |= values
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(_spelled(self._shown)), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
            return
        parts, now = _spelled(values), time.monotonic()
        self._first = self._first or (step, now)  # which compiling came before
        if step > self._first[0]:
            left = (self._steps - step) * (now - self._first[1]) / (step - self._first[0])
            parts.append(f"{tqdm.format_interval(left)} left")
        print(f"{stage} {step}/{self._steps}", *parts, sep="  ", file=self._file, flush=True)

    def close(self) -> None:
        """See `Writer`."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _spelled(values: Mapping[str, float]) -> list[str]:
    """The values of SHOWN, in words."""
    return [
        f"{tqdm.format_sizeof(values[name])} tokens/s"
        if name == "tokens_per_second"
        else f"{name} {values[name]:.4g}"
        for name in SHOWN
        if name in values
    ]


class JsonlWriter(Writer):
    """One line per write: {"stage": ..., "step": ..., name: value, ...}; null for NaN and infinity.

    Appends to an existing file. When a stage starts or resumes, lines after its step (and of later
    stages) are dropped, so that a run that was killed and resumed has each step once; those of
    earlier versions get the names of today. If lines are damaged, the old file is kept as
    <name>.damaged.

    Raises:
      UserError: if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def start(self, stage: str, step: int, steps: int) -> None:
        """See `Writer`."""
        kept, damaged = _lines_before(self._path, stage, step)
        if damaged:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            atomic_write(aside, self._path.read_bytes())
            log.warning(
                "%s: line %d is damaged: dropped what cannot be read; the old file is kept as %s",
                *(self._path, damaged, aside),
            )
        atomic_write(self._path, "".join(kept))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {k: value if math.isfinite(value) else None for k, value in numbers.items()}
        with explained(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step} | finite) + "\n")


def _lines_before(path: Path, stage: str, step: int) -> tuple[list[str], int]:
    """The lines before the first one of `stage` after `step`; number of the first damaged, or 0.

    A last line without a newline was cut off by a kill; it does not count as damaged.
    """
    if not path.exists():
        return [], 0
    kept, damaged = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["stage"] == stage and record["step"] > step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or line.endswith("\n"):
                damaged = damaged or number
            continue
        if "task" in record:
            line = json.dumps({_OLD_NAMES.get(name, name): x for name, x in record.items()})
        kept.append(line if line.endswith("\n") else f"{line}\n")
    return kept, damaged


class TensorBoardWriter(Writer):
    """TensorBoard event files, one TensorBoard run per stage: <folder>/<stage>.

    Raises:
      UserError: if tensorboardX is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        except ImportError:
            raise UserError(
                "TensorBoard metrics need tensorboardX: pip install 'lte-jax[tensorboard]'"
            ) from None
        # Not its SummaryWriter: a full disk ends that one's thread, and it waits for it forever.
        self._open, self._scalar = event_file_writer.EventsWriter, summary.scalar
        self._protos, self._folder = event_pb2, Path(folder)
        self._events: Any = None

    def start(self, stage: str, step: int, steps: int) -> None:
        """See `Writer`."""
        self.close()
        folder = self._folder / stage
        with explained(self._folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The suffix: a file's name has its second, in which another process may have begun.
            self._events = self._open(str(folder / "events"), f".from-{step}")
        # From this step on, TensorBoard hides what an earlier process wrote.
        starts = self._protos.SessionLog(status=self._protos.SessionLog.START)
        self._add(step=step + 1, session_log=starts)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        for name, value in values.items():
            self._add(step=step, summary=self._scalar(name, float(value)))
        with explained(self._folder):
            self._events.flush()

    def _add(self, **event: Any) -> None:
        with explained(self._folder):
            self._events.write_event(self._protos.Event(wall_time=time.time(), **event))

    def close(self) -> None:
        """See `Writer`."""
        events, self._events = self._events, None
        if events is not None:
            with explained(self._folder):
                events.close()


def wandb_for(project: str) -> Any:
    """The package wandb.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(f"wandb={project!r} needs wandb: pip install 'lte-jax[wandb]'") from None
    return wandb


class WandbWriter(Writer):
    """Weights & Biases: a W&B run per work directory, in which <stage>/step counts <stage>/<name>.

    A run that resumes goes on with the same W&B run, whose id is in <folder>/wandb-run. W&B takes
    nothing back: steps that a killed run wrote after its last checkpoint are there twice.

    Args:
      project: its name, or entity/project.
      folder: the work directory; its name is the name of the run.
      settings: the experiment, as JSON.

    Raises:
      UserError: if wandb is not installed or refuses to start (no login, say).
    """

    def __init__(self, project: str, folder: str | Path, settings: Mapping[str, Any]) -> None:
        wandb, folder = wandb_for(project), Path(folder)
        entity, _, name = project.rpartition("/")
        known = folder / "wandb-run"
        if not known.exists():
            atomic_write(known, uuid.uuid4().hex[:12])
        try:
            self._run: Any = wandb.init(
                entity=entity or None,
                project=name,
                id=known.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=dict(settings),
            )
        except wandb.Error as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"wandb={project!r} cannot start ({why}): run `wandb login`, or set "
                "WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from None

    def start(self, stage: str, step: int, steps: int) -> None:
        """See `Writer`."""
        self._run.define_metric(f"{stage}/step")
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        named = {f"{stage}/{name}": float(value) for name, value in values.items()}
        self._run.log({f"{stage}/step": step} | named)

    def close(self) -> None:
        """See `Writer`."""
        self._run.finish()


def writers_of(root: Path, experiment: Experiment) -> Iterator[Writer]:
    """The writers that a run in the work directory `root` has by itself."""
    if experiment.wandb:
        yield WandbWriter(experiment.wandb, root, dataclasses.asdict(experiment))
    yield TerminalWriter(sys.stderr)
    yield JsonlWriter(root / "metrics.jsonl")
    try:
        yield TensorBoardWriter(root / "tensorboard")
    except UserError as error:
        log.info("not writing TensorBoard metrics: %s", error)
