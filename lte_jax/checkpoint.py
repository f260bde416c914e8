"""Checkpoints of training states: saved in the background, verified on reading, safe to kill.

The folder of a `Checkpointer` holds

    <step>/            what Orbax wrote (state/, data/), and manifest.json, written last
    damaged/<step>/    what the last restart could not use
    deleting-<step>/   being deleted

A step is complete once its manifest exists: the size and SHA-256 of every file, the shape of every
leaf, and the metrics. Orbax commits a step, then the manifest is renamed into place, then older
steps are deleted, and those of the stages before; so a kill at any moment leaves the newest
complete step intact. Damage done later is found on reading: the step is named and moved aside, and
training resumes from the one before it. Of several processes each makes, and checks, the digests
of its own part.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from lte_jax import files
from lte_jax.errors import UserError
from lte_jax.files import MANIFEST, Damaged
from lte_jax.processes import exchanged, on_first

DAMAGED = "damaged"
_DELETING = "deleting-"  # before the name of a folder that is being deleted
_UNCOMMITTED = ".orbax-checkpoint-tmp"  # in the folder name of a step that Orbax is writing
_ABANDONED = "Event loop is closed"  # to which parts of a save report that has failed already
State = TypeVar("State")
_numbers = itertools.count()  # of the checkpointers of this process
log = logging.getLogger(__name__)


class Checkpointer(contextlib.AbstractContextManager):
    """Saves and restores training states by step; every process of a run calls every method.

    Args:
      folder: created if absent; for checkpoints only.
      keep_last: how many of the newest steps to keep, at least 1.
      keep_best: how many more steps to keep for their low validation loss.
      replaces: folders of others, which go once a step here is complete, or was restored.

    Raises:
      UserError: if the folder cannot be created or written to.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        keep_best: int = 1,
        *,
        replaces: Sequence[Path] = (),
    ):
        self.folder = Path(folder).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._replaces = replaces
        self._primary = jax.process_index() == 0
        self._finishing: Future | None = None
        self._number, self._readings = next(_numbers), itertools.count()
        self._saved: set[int] = set()  # steps saved or restored by this object
        if self._primary:
            self._prepare_folder()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        for name in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(name).addFilter(_is_news)

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts a save; returns once the arrays may be changed. Saving a step again is a no-op.

        Args:
          step: later than any step saved or restored before.
          state: a pytree of arrays, saved in their shardings.
          data_state: of the data iterator, JSON-serialisable.
          metrics: finite or not; keep_best goes by their "validation_loss".

        Raises:
          UserError: if this save or the previous one cannot be written.
        """
        if step in self._saved:
            return
        self.wait()
        if self._path(step).exists():
            raise UserError(
                f"checkpoint folder {self.folder} holds step {step} of an earlier run: "
                "resume from it, or choose an empty folder"
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data_state))
        )
        # Of its own: a failed save's error would be raised again by those that follow.
        orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        with self._explained(step):
            orbax.save(self._path(step), args=items)
        self._saved.add(step)
        values = {name: float(value) for name, value in (metrics or {}).items()}
        manifest = {"step": step, "metrics": values, "leaves": _leaves(state)}
        self._finishing = self._thread.submit(self._finish, orbax, manifest)

    def restore(self, abstract_state: State) -> tuple[int, State, dict[str, Any]] | None:
        """The newest undamaged (step, state, data_state), or None if nothing has been saved.

        Each process reads for damage what it wrote, or its part of that of other processes.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct, whose shardings the arrays get, on
            whatever mesh they were saved.

        Raises:
          UserError: if every step is damaged, or belongs to another model or optimizer.
        """
        self.wait()
        damage: dict[int, str] = {}
        for step in reversed(on_first(self._steps)):
            if (why := self._damage_of(step)) is None:
                break
            damage[step] = why
        else:
            step = None
        leaves = _leaves(abstract_state)
        on_first(lambda: self._settle(step, damage, leaves))
        if step is None:
            return None
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        )
        orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        restored = orbax.restore(self._path(step), args=items)
        self._saved = {step}
        if self._primary:  # killed in between, a run had not got to it
            self._remove_replaced()
        return step, restored.state, restored.data

    def wait(self) -> None:
        """Blocks until the last save is complete, manifest included.

        Raises:
          UserError: if it could not be written; earlier steps are untouched.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

    def close(self) -> None:
        """Finishes the last save and ends the background threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._primary:  # threads of a failed save may have written after the clean-up
                for half in half_done(self.folder):
                    shutil.rmtree(half, ignore_errors=True)

    def __exit__(self, *exception: object) -> None:
        """Closes."""
        self.close()

    def _prepare_folder(self) -> None:
        """Creates the folder, and removes what a killed run left half-written or half-deleted."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(
                f"checkpoint folder {self.folder} cannot be written to ({error.strerror}): "
                "choose a writable one"
            ) from None
        for leftover in half_done(self.folder):
            shutil.rmtree(leftover)
        unfinished = [s for s in self._steps() if not (self._path(s) / MANIFEST).exists()]
        self._set_aside({step: "unfinished, killed while saving" for step in unfinished})

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def _finish(self, orbax: ocp.AsyncCheckpointer, manifest: dict[str, Any]) -> None:
        """In the background: waits for Orbax's commit, writes the manifest, deletes old steps."""
        step = manifest["step"]
        with self._explained(step):
            orbax.close()
            found = self._inventory(step)
            if not self._primary:
                return
            files.write_manifest(self._path(step), manifest, found)
        for old in self._dispensable():
            _remove(self._path(old))
        self._remove_replaced()

    def _remove_replaced(self) -> None:
        for folder in self._replaces:
            if folder.exists():
                _remove(folder)

    def _inventory(self, step: int) -> dict[str, tuple[int, str]]:
        """Size and digest of each file of a step: each process reads what it wrote."""
        name = f"checkpoint {self._number}, {step}"
        exchanged(f"{name}, committed", None)  # once process 0 has renamed its folder
        own = jax.process_index()
        found = files.inventory(self._path(step), lambda file: _written_by(file) == own)
        parts = exchanged(name, found)
        return {file: entry for part in parts for file, entry in part.items()}

    def _dispensable(self) -> list[int]:
        """Steps that are neither among the newest nor among the best."""
        steps, rated = self._steps(), {}
        for step in steps:
            with contextlib.suppress(Damaged, KeyError):
                metrics = files.read_manifest(self._path(step))["metrics"]
                rated[step] = metrics["validation_loss"]
        # NaN sorts last; of equal losses the newest is best.
        best = sorted(rated, key=lambda s: (math.isnan(rated[s]), rated[s], -s))[: self._keep_best]
        return sorted(set(steps) - set(steps[-self._keep_last :]) - set(best))

    def _damage_of(self, step: int) -> str | None:
        """What is wrong with a step, the same in all processes; None: nothing."""
        own = None
        try:
            named = files.read_manifest(self._path(step))["files"]
            mine = _share(named, jax.process_index(), jax.process_count())
            manifest = files.verify(self._path(step), chosen=mine.__contains__)
            if manifest["step"] != step:
                raise Damaged(f"it holds step {manifest['step']}")
        except Damaged as error:
            own = str(error)
        found = exchanged(f"checkpoint {self._number}, reading {next(self._readings)}", own)
        return next((words for words in found if words is not None), None)

    def _settle(self, step: int | None, damage: Mapping[int, str], leaves: dict[str, str]) -> None:
        """Checks that the newest good step is of this model, and moves newer ones aside.

        Raises:
          UserError: if it is not, or if there is none among damaged ones.
        """
        if step is None:
            if damage:
                named = "; ".join(f"{self._path(step)}: {why}" for step, why in damage.items())
                raise UserError(
                    f"every checkpoint is damaged: {named}. Restore one from a backup, or remove "
                    f"{self.folder} to start over"
                )
            return
        saved = files.read_manifest(self._path(step))["leaves"]
        for name in [*leaves, *saved]:
            there, here = (of.get(name, "absent") for of in (saved, leaves))
            if there != here:
                raise UserError(
                    f"checkpoint {self._path(step)} is of another model or optimizer: {name} "
                    f"is {there} there and {here} in this run: use the configuration it was "
                    "saved with, or an empty folder"
                )
        self._set_aside(damage)

    def _set_aside(self, damage: Mapping[int, str]) -> None:
        """Moves unusable steps aside, replacing those of the previous restart."""
        if not damage:
            return
        shutil.rmtree(self.folder / DAMAGED, ignore_errors=True)
        (self.folder / DAMAGED).mkdir()
        for step, why in damage.items():
            aside = self._path(step).rename(self.folder / DAMAGED / str(step))
            log.warning("checkpoint %s: %s: moved to %s", self._path(step), why, aside)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns write failures into a UserError and removes what is half-written."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = files.disk_trouble(error)
            if reason is None:
                raise
            self._saved.discard(step)
            if self._primary:
                for half in self._path(step), *self.folder.glob(f"{step}{_UNCOMMITTED}*"):
                    shutil.rmtree(half, ignore_errors=True)
            raise UserError(
                f"checkpoint {self._path(step)} could not be written ({reason}): free some space "
                "or choose another folder; earlier checkpoints are untouched"
            ) from error


def half_done(folder: Path) -> list[Path]:
    """What a killed run left half-written or half-deleted in the folder of a `Checkpointer`."""
    return [*folder.glob(f"{_DELETING}*"), *folder.glob(f"*{_UNCOMMITTED}*")]


def holds_step(folder: Path) -> bool:
    """Whether the folder of a `Checkpointer` has a complete step."""
    return any(folder.glob(f"[0-9]*/{MANIFEST}"))


def _remove(folder: Path) -> None:
    """Removes a folder, which under its name is whole or gone; `half_done` finds what is left."""
    try:
        shutil.rmtree(folder.rename(folder.with_name(f"{_DELETING}{folder.name}")))
    except OSError as error:  # what is saved is none the worse for it
        log.warning("%s could not be removed (%s)", folder, error.strerror)


def _leaves(tree: Any) -> dict[str, str]:
    """Path -> type of every leaf, such as "params/embed/embedding" -> "float32[512,64]"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}".replace(" ", "")
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _written_by(file: str) -> int:
    """The process that wrote a file of a step, by Orbax's names; what all share is process 0's."""
    part = re.search(r"ocdbt\.process_(\d+)/", file)
    return int(part[1]) if part else 0


def _share(names: Iterable[str], process: int, processes: int) -> set[str]:
    """Of a step's files those that one of the processes reads for damage.

    They are what it wrote itself, if there are as many processes as then. Else every process has
    the part of the writers at its place in their row, or its turn of the files of one writer.
    """
    writers: dict[int, list[str]] = {}
    for name in sorted(names):
        writers.setdefault(_written_by(name), []).append(name)
    count, mine = 1 + max(writers, default=0), set()
    for writer, written in writers.items():
        first, stop = (place * processes // count for place in (writer, writer + 1))
        turn = process - first
        if 0 <= turn < max(1, stop - first):
            mine.update(written[turn :: max(1, stop - first)])
    return mine


def _is_news(record: logging.LogRecord) -> bool:
    """False for logged tracebacks of errors that Orbax also raises: its own, and a full disk's."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    told = "orbax" in f"{record.pathname} {record.getMessage()}" or _ABANDONED in str(error)
    return error is None or not (told or files.disk_trouble(error))


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Hides tracebacks of library threads that die on a full disk: the next write reports it."""
    before, unraisable = threading.excepthook, sys.unraisablehook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, Exception) and files.disk_trouble(args.exc_value)):
            before(args)

    def unraisable_hook(args: sys.UnraisableHookArgs) -> None:
        # TensorStore reporting to the closed event loop of an abandoned save.
        if _ABANDONED not in str(args.exc_value):
            unraisable(args)

    threading.excepthook, sys.unraisablehook = hook, unraisable_hook
    yield  # after an error they stay: what it has abandoned may report later
    threading.excepthook, sys.unraisablehook = before, unraisable
