"""The work directory of a run: its layout, its lock, and the configuration and inputs of the run.

    experiment.json          the configuration
    data/                    records, if data.cache is set
    inputs.json              number and SHA-256 of what was read: records, source model, tokenizer
    dense/ experts/ lte/     models, written atomically
    experts.begun/           layers that are grouped and routers, until experts/ is written
    checkpoints/<stage>/     training states
    metrics.jsonl tensorboard/ results.json table.md *.png
    wandb/ wandb-run         of Weights & Biases, if requested
    profile/<stage>/         traces, if requested
    .lock                    held by the process that uses the directory

The lock is the kernel's (flock) and ends with its process, so there are no stale locks. What a
killed run leaves behind is cleaned up at the next start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from lte_jax import checkpoint, files
from lte_jax.config import Experiment, from_mapping, moved
from lte_jax.errors import UserError

# Keys of an experiment that do not affect what is trained: they may change on resuming.
FREE = frozenset(
    "report report_dense sample_prompt sample_tokens sample_temperature latency_rounds log_every "
    "eval_every checkpoint mesh wandb".split()
)  # fmt: skip
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_DAMAGED = (
    "restore it from a backup; or, if command and data are those the run was started with, remove "
    "it: it is then written again"
)
log = logging.getLogger(__name__)


def affecting(overrides: Iterable[str]) -> list[str]:
    """Those of "key=value" overrides that affect what is trained and what is measured of it."""
    keyed = ((word.partition("=")[0], word) for word in overrides)
    return [word for key, word in keyed if key.split(".")[0] not in FREE]


class Paths:
    """Paths in a work directory; the layout is at the top of this file."""

    def __init__(self, root: Path):
        self.root = root
        self.experiment, self.inputs = root / "experiment.json", root / "inputs.json"
        self.metrics = root / "metrics.jsonl"
        self.dense, self.experts, self.lte = root / "dense", root / "experts", root / "lte"
        self.models = self.dense, self.experts, self.lte  # in the order they are made
        self.begun_experts = root / "experts.begun"

    def checkpoints(self, stage: str) -> Path:
        """Training states of a stage."""
        return self.root / "checkpoints" / stage

    def has(self, folder: Path) -> bool:
        """Whether one of `models` exists; they are written atomically."""
        return (folder / "config.json").exists()

    def begun(self) -> bool:
        """Whether it contains anything that depends on the configuration."""
        made = any(folder.exists() for folder in (*self.models, self.begun_experts))
        return made or any(self.root.glob("checkpoints/*/[0-9]*"))


# -------------------------------------------------------------------------------------------- lock


class InUse(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def held(root: Path) -> Iterator[int]:
    """Creates a work directory if needed, and locks other runs out of it.

    A directory created here that stays empty is removed again, with its new parents.

    Yields:
      The lock's file descriptor: a process that inherits it holds the lock, too.

    Raises:
      InUse: if another run uses it.
      UserError: if it cannot be created or written to.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(root)
    except OSError as error:
        raise UserError(
            f"workdir {root} cannot be created or written to ({error.strerror}): name another"
        ) from None
    try:
        yield lock
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            if made and os.listdir(root) == [".lock"]:
                (root / ".lock").unlink()
                for folder in made:
                    folder.rmdir()
        os.close(lock)


def _lock(root: Path) -> int:
    path = root / ".lock"
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning(
                    "%s: its file system has no locks (%s): do not start another run there",
                    *(root, error.strerror),
                )
                return lock
            holder = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
            os.close(lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise InUse(
                f"workdir {root} is in use by {holder}: wait for it to end, or name another"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.lstat()):
                break
        os.close(lock)  # its last holder has just removed the directory
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    words = f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})"
    with contextlib.suppress(OSError):  # a full disk: the next write will report it
        os.ftruncate(lock, 0)
        os.pwrite(lock, words.encode(errors="replace"), 0)
    return lock


# ------------------------------------------------------------------------------------- leftovers


def put_right(paths: Paths) -> None:
    """Restores what a killed run had moved aside, removes what it left half-done, and logs it."""
    root = paths.root
    leftovers = list(root.glob(".*.half-written"))
    for folder in paths.models:
        # A run killed between the two renames of a replacement leaves the old folder renamed.
        for old in root.glob(f".{folder.name}.old-*"):
            if not folder.exists() and paths.has(old):
                old.rename(folder)
                log.warning("%s: restored; a run was killed while replacing it", folder)
        leftovers += [*root.glob(f".{folder.name}.new-*"), *root.glob(f".{folder.name}.old-*")]
    leftovers += checkpoint.half_done(root / "checkpoints")
    for stage in sorted({*root.glob("checkpoints/*/")} - {*leftovers}):
        leftovers += [*checkpoint.half_done(stage), *stage.glob(checkpoint.DAMAGED)]
    if not leftovers:
        return
    inside = (file for path in leftovers for file in (path, *path.rglob("*")))
    size = sum(file.lstat().st_size for file in inside if not file.is_dir())
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    names = _some([str(path.relative_to(root)) for path in leftovers], most=5)
    log.warning("%s: cleared %s, left by an earlier run (%.1f MB)", root, names, size / 1e6)


# ------------------------------------------------------------------------ configuration and inputs


def check_same(paths: Paths, experiment: Experiment) -> None:
    """Refuses a work directory with results of another configuration.

    Raises:
      UserError: if so, naming the keys; also if experiment.json is damaged.
    """
    if not paths.begun():
        return
    if not paths.experiment.exists():
        log.warning(
            "%s is missing from a work directory in use: assuming this configuration",
            paths.experiment,
        )
        return
    old = traverse_util.flatten_dict(moved(files.read_json(paths.experiment, _DAMAGED)))
    new = traverse_util.flatten_dict(plain(experiment))
    # A run of an earlier version has no keys that came later, whose defaults are what it did.
    old = traverse_util.flatten_dict(plain(Experiment())) | old
    different = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    if named := sorted(".".join(("config", *key)) for key in different if key[0] not in FREE):
        raise UserError(
            f"{paths.root} holds a run with another configuration, which differs in "
            f"{_some(named)}: restore it to resume, or choose a new workdir"
        )


def read_experiment(paths: Paths) -> Experiment:
    """The configuration of the run in a work directory.

    Raises:
      UserError: if it is missing or damaged.
    """
    if not paths.experiment.exists():
        raise UserError(f"{paths.root} is not a work directory of train.py (no experiment.json)")
    return from_mapping(Experiment, moved(files.read_json(paths.experiment, _DAMAGED)))


def recorded(paths: Paths) -> dict[str, Any]:
    """The inputs recorded when the run started; {} if there is no run or no record.

    Raises:
      UserError: if inputs.json is damaged.
    """
    if not (paths.begun() and paths.inputs.exists()):
        return {}
    return files.read_json(paths.inputs, _DAMAGED)


def check_inputs(paths: Paths, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Checks `inputs` against those recorded when the run started, and returns both merged.

    Raises:
      UserError: if one has changed; names it, with number and digest.
    """
    old = recorded(paths)
    if not old:
        return dict(inputs)
    groups = {name.partition("/")[0] for name in inputs}
    known = {name: value for name, value in old.items() if name.partition("/")[0] in groups}
    changed = [
        f"{name}: {_spell(known.get(name))} before, {_spell(inputs.get(name))} now"
        for name in sorted(known.keys() | inputs.keys())
        if known.get(name) != inputs.get(name)
    ]
    if changed:
        raise UserError(
            f"{paths.root} holds a run on other data ({_some(changed, '; ')}): restore the data "
            "to resume, or choose a new workdir"
        )
    return old | dict(inputs)


def claim(paths: Paths, experiment: Experiment, inputs: Mapping[str, Any]) -> None:
    """Records the configuration and inputs of the run, after all checks.

    Raises:
      UserError: as `check_inputs`; also if they cannot be written.
    """
    inputs = check_inputs(paths, inputs)
    if not paths.begun():
        paths.metrics.unlink(missing_ok=True)  # of a run that made nothing
    for path, values in ((paths.inputs, inputs), (paths.experiment, plain(experiment))):
        text = json.dumps(values, indent=1) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            files.atomic_write(path, text)


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON returns it: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def _spell(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], int):
        return f"{value[0]:,} ({str(value[1])[:8]})"
    return "none" if value is None else str(value)


def _some(words: list[str], comma: str = ", ", most: int = 3) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return comma.join(words[:most]) + more
