"""The work directory of a run: where things lie, who holds it, what it was begun with.

    experiment.json          the configuration
    inputs.json              number and SHA-256 of what was read: rows, source model, tokenizer
    dense/ experts/ lte/     models, each whole or absent
    checkpoints/<stage>/     training states
    metrics.jsonl tensorboard/ results.json table.md *.png
    profile/<stage>/         traces, where they are asked for
    .lock                    held by the process that works here

The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so
there is no stale one to clear. What a killed run leaves behind is put right at the next start.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lte_jax import checkpoint, files
from lte_jax.config import Experiment, from_mapping, moved
from lte_jax.errors import UserError

# Keys of an experiment on which no bit of what is trained depends: they may change on the way.
FREE = frozenset(
    "report sample_prompt sample_tokens sample_temperature log_every eval_every checkpoint"
    .split()
)  # fmt: skip
Inputs = Mapping[str, Any]  # name -> [number, digest], or a plain value that was read from data
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_DAMAGED = (
    "bring it back from a backup; or remove it, if this is the command and the data that the run "
    "was begun with: it is then written anew"
)
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Paths:
    """What a run leaves behind."""

    root: Path

    @property
    def experiment(self) -> Path:
        """The configuration, as JSON."""
        return self.root / "experiment.json"

    @property
    def inputs(self) -> Path:
        """Number and digest of what the run reads, as JSON."""
        return self.root / "inputs.json"

    @property
    def metrics(self) -> Path:
        """What was measured while training, a JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def dense(self) -> Path:
        """HF folder of the dense model that was converted."""
        return self.root / "dense"

    @property
    def experts(self) -> Path:
        """LTE folder before training: experts grouped, routers started."""
        return self.root / "experts"

    @property
    def lte(self) -> Path:
        """LTE folder of the result."""
        return self.root / "lte"

    def checkpoints(self, stage: str) -> Path:
        """Training states of a stage."""
        return self.root / "checkpoints" / stage

    def profile(self, stage: str) -> Path:
        """A trace of some steps of a stage, for TensorBoard or Perfetto."""
        return self.root / "profile" / stage

    @property
    def models(self) -> tuple[Path, ...]:
        """The model folders, in the order in which they are made."""
        return self.dense, self.experts, self.lte

    def has(self, folder: Path) -> bool:
        """Whether one of `models` is finished: they are whole or absent."""
        return (folder / "config.json").exists()

    def begun(self) -> bool:
        """Whether there is anything here that depends on the configuration."""
        return any(folder.exists() for folder in self.models) or any(
            self.root.glob("checkpoints/*/[0-9]*")
        )


# -------------------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Makes a work directory if need be, and keeps other runs out of it meanwhile.

    Left with nothing in it, the directory is removed again, with the parents made for it.

    Raises:
      UserError: where it cannot be made or written to, or another run holds it.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(root)
    except OSError as error:
        raise UserError(
            f"workdir {root} cannot be made or written to ({error.strerror}): name another place"
        ) from None
    try:
        yield
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
                    "%s: its file system has no locks (%s): let no other run work there",
                    *(root, error.strerror),
                )
                return lock
            holder = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
            os.close(lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(
                f"workdir {root} is in use by {holder}: wait for it to end, or name another"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.lstat()):
                break
        os.close(lock)  # its last holder removed the directory just now
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    words = f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})"
    with contextlib.suppress(OSError):  # a full disk: whatever is written next will tell
        os.ftruncate(lock, 0)
        os.pwrite(lock, words.encode(errors="replace"), 0)
    return lock


# ------------------------------------------------------------------------------------- leftovers


def put_right(paths: Paths) -> None:
    """Takes back what a killed run had moved aside, removes what it left half-done, and says so."""
    root = paths.root
    for folder in paths.models:
        # Killed between two renames, a folder that is being replaced is there under another name.
        for old in root.glob(f".{folder.name}.old-*"):
            if not folder.exists() and paths.has(old):
                old.rename(folder)
                log.warning("%s: put back, a run was killed while replacing it", folder)
    leftovers = list(root.glob(".*.half-written"))
    for folder in paths.models:
        leftovers += [*root.glob(f".{folder.name}.new-*"), *root.glob(f".{folder.name}.old-*")]
    for stage in sorted(root.glob("checkpoints/*/")):
        leftovers += [*checkpoint.half_done(stage), *stage.glob(checkpoint.DAMAGED)]
    if not leftovers:
        return
    size = sum(_bytes(path) for path in leftovers)
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    names = ", ".join(str(path.relative_to(root)) for path in leftovers[:5])
    more = f" and {len(leftovers) - 5} more" if len(leftovers) > 5 else ""
    log.warning("%s: cleared %s%s, left by an earlier run (%.1f MB)", root, names, more, size / 1e6)


def _bytes(path: Path) -> int:
    inside = path.rglob("*") if path.is_dir() else ()
    return sum(file.lstat().st_size for file in (path, *inside) if not file.is_dir())


# ------------------------------------------------------------------------- what it was begun with


def check_same(paths: Paths, experiment: Experiment) -> None:
    """Refuses a work directory in which something was made with another configuration.

    Raises:
      UserError: if so, naming the keys; or where experiment.json is damaged.
    """
    if not paths.begun():
        return
    if not paths.experiment.exists():
        log.warning(
            "%s is gone from a work directory in use: it is taken to be of this configuration",
            paths.experiment,
        )
        return
    old, new = moved(files.read_json(paths.experiment, _DAMAGED)), _plain(experiment)
    kept = [{k: v for k, v in side.items() if k not in FREE} for side in (old, new)]
    if different := sorted(_differences(*kept)):
        raise UserError(
            f"{paths.root} holds a run of another configuration, which differs in "
            f"{_some(different)}: set it as it was to go on, or name a fresh workdir"
        )


def read_experiment(paths: Paths) -> Experiment:
    """The configuration of the run in a work directory.

    Raises:
      UserError: where there is none, or it is damaged.
    """
    if not paths.experiment.exists():
        raise UserError(f"{paths.root} is no work directory of train.py: no experiment.json there")
    return from_mapping(Experiment, moved(files.read_json(paths.experiment, _DAMAGED)))


def recorded(paths: Paths) -> dict[str, Any]:
    """The inputs that the run was begun with; {} where it is not begun, or nothing says so.

    Raises:
      UserError: where inputs.json is damaged.
    """
    if not (paths.begun() and paths.inputs.exists()):
        return {}
    return files.read_json(paths.inputs, _DAMAGED)


def check_inputs(paths: Paths, inputs: Inputs) -> dict[str, Any]:
    """All inputs of the run: those it was begun with, checked against `inputs` and joined to them.

    Raises:
      UserError: where one is no longer what it was; names it, with number and digest.
    """
    old = recorded(paths)
    if not old:
        return dict(inputs)
    groups = {_group(name) for name in inputs}
    known = {name: value for name, value in old.items() if _group(name) in groups}
    changed = [
        f"{name}: {_spell(known.get(name))} before, {_spell(inputs.get(name))} now"
        for name in sorted(known.keys() | inputs.keys())
        if known.get(name) != inputs.get(name)
    ]
    if changed:
        raise UserError(
            f"{paths.root} holds a run on other data ({_some(changed, '; ')}): bring back what it "
            "was to go on, or name a fresh workdir"
        )
    return old | dict(inputs)


def claim(paths: Paths, experiment: Experiment, inputs: Inputs) -> None:
    """Writes down what the run is, once all that can be checked is checked.

    Raises:
      UserError: when that cannot be written.
    """
    if not paths.begun():
        paths.metrics.unlink(missing_ok=True)  # of a run that got nowhere
    for path, values in ((paths.inputs, dict(inputs)), (paths.experiment, _plain(experiment))):
        text = json.dumps(values, indent=1) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            files.atomic_write(path, text)


def _plain(experiment: Experiment) -> dict[str, Any]:
    """As it comes back from JSON: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def _differences(old: Any, new: Any, where: str = "config") -> set[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return set() if old == new else {where}
    keys = old.keys() | new.keys()
    return set().union(*(_differences(old.get(k), new.get(k), f"{where}.{k}") for k in keys))


def _group(name: str) -> str:
    return name.partition("/")[0]


def _spell(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2:
        return f"{value[0]:,} ({str(value[1])[:8]})" if isinstance(value[0], int) else str(value)
    return "none" if value is None else str(value)


def _some(words: list[str], comma: str = ", ", most: int = 3) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return comma.join(words[:most]) + more
