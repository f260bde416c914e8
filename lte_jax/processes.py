"""Several processes as one program: how they join, agree, share work out, and end together.

On several hosts the same command runs once per host, or once per GPU, and JAX makes one mesh of all
their devices. Arrays on it are exchanged by collectives of XLA, in which every process must take
part, in the same order. All else (what process 0 found on the disk, who waits for whom, who has
failed) goes through the key-value store of JAX's coordination service, which process 0 runs: it
needs no device, and may take as long as it takes. One process alone does none of this.

The store has no public name in JAX; `_client` is the only use of a private one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lte_jax.errors import UserError, one_line
from lte_jax.kept import NOWHERE, Kept

T = TypeVar("T")
_HEARTBEAT_SECONDS = 20  # without a sign of life: a process is taken for dead
_PATIENCE_MS = 7 * 24 * 3600 * 1000  # a wait ends earlier if a process fails
_FAILED = "lte_jax/failed"
_POLL_SECONDS = 0.5
_GOODBYE_MS = 5_000  # for all to have heard that one has failed
_TOGETHER = (0, 143)  # exit codes that all processes have at the same moment
_firsts, _waits, _steps = itertools.count(), itertools.count(), itertools.count()


# ---------------------------------------------------------------------------------------- joining


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes and --process."""
    several = parser.add_argument_group(
        "several processes",
        "under srun, mpirun, Kubernetes and on Cloud TPU they are found without these flags",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="how many; 1: look for none")
    several.add_argument("--process", type=int, metavar="I", help="which this is, from 0")


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[None]:
    """One of several processes while it lasts, if it was started as one; else nothing changes.

    Must begin before the first use of a device. When a process fails, every other prints one line
    and ends, too, within seconds: without it, they would wait for it in a collective. Process 0
    alone logs.

    Args:
      flags: those of `add_flags`.

    Raises:
      UserError: if the flags do not go together, or the others are not found.
      SystemExit: as raised within, where all processes raise the same.
    """
    if not _join(flags):
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()
    if jax.process_index() != 0:
        logging.disable(logging.WARNING)
    try:
        yield
    except SystemExit as end:
        if end.code not in _TOGETHER:
            _fail(one_line(end.__context__ or end), end.code)
        _part(over, watch)
        raise
    except BaseException as error:
        if _is_of_connection(error):
            time.sleep(4 * _POLL_SECONDS)  # if another has failed, `_watch` says why and ends this
            words = f"another process has ended or cannot be reached ({one_line(error)})"
            print(f"error: {UserError(words)}", file=sys.stderr)
        else:
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {one_line(error)}", 1)
    _part(over, watch)


def _join(flags: argparse.Namespace) -> bool:
    """Joins the other processes; False if there are none."""
    if flags.processes == 1:
        return False
    given = _of_flags(flags)
    launcher = "flags" if given else _launcher()
    if not launcher:
        return False
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **given)
    except (RuntimeError, ValueError, KeyError) as error:
        if launcher == "tpu" and isinstance(error, ValueError):  # libtpu, but no TPU
            return False
        raise UserError(
            f"the other processes were not found ({one_line(error)}): start all of them, or name "
            "them by --coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    return jax.process_count() > 1


def _of_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as `jax.distributed.initialize` takes it; {} if they are not used."""
    coordinator, processes, process = flags.coordinator, flags.processes, flags.process
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return {}
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: --coordinator=HOST:PORT, --processes=N and "
            "--process=I go together"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT, as in node1:9000")
    if not 0 <= process < processes:
        raise UserError(
            f"--process={process} of --processes={processes}: expected a number from 0 to that of "
            "the processes less one"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _launcher() -> str:
    """Which launcher, of those that JAX reads, may have started several of this process; or ""."""
    env = os.environ
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= env.keys():
        return "slurm" if int(env.get("SLURM_NTASKS", "1")) > 1 else ""
    if "OMPI_MCA_orte_hnp_uri" in env:
        return "ompi" if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 else ""
    if "TPU_WORKER_HOSTNAMES" not in env and "KUBERNETES_SERVICE_HOST" in env:
        indexed = "JOB_COMPLETION_INDEX" in env and importlib.util.find_spec("kubernetes")
        return "k8s" if indexed else ""
    return "tpu" if importlib.util.find_spec("libtpu") else ""  # JAX asks it for its hosts


def _client() -> Any:
    from jax._src import distributed  # nothing public leads to the key-value store

    return distributed.global_state.client


# ----------------------------------------------------------------------------------------- ending


def _watch(over: threading.Event) -> None:
    """Ends this process when another one has failed."""
    while not over.wait(_POLL_SECONDS):
        try:
            told = json.loads(_client().key_value_try_get(_FAILED))
        except jax.errors.JaxRuntimeError:  # none has; or process 0 is gone, which JAX notices
            continue
        if told["process"] != jax.process_index():
            words = f"stopped because process {told['process']} failed: {told['words']}"
            print(f"error: {UserError(words)}", file=sys.stderr)
            _leave(told["code"])
        return


def _fail(words: str, code: Any) -> NoReturn:
    """Tells the others, and ends this process once they know."""
    code = code if isinstance(code, int) else 1
    told = {"process": jax.process_index(), "words": words, "code": code}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or 0 is gone
        _client().key_value_set(_FAILED, json.dumps(told))
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends this process at once: an orderly end would wait for all others to end in order, too."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("lte_jax/left", _GOODBYE_MS)
    if jax.process_index() == 0:  # with it goes the coordination service, which others still use
        time.sleep(_POLL_SECONDS)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _part(over: threading.Event, watch: threading.Thread) -> None:
    """Waits for all to come to their end, and ends what joined them."""
    wait("end")
    over.set()
    watch.join()
    jax.distributed.shutdown()
    logging.disable(logging.NOTSET)


def _is_of_connection(error: BaseException) -> bool:
    """Whether a collective has failed because a process is gone, by what XLA says of it."""
    signs = ("gloo", "nccl", "connection", "unavailable", "deadline", "heartbeat")
    text = str(error)
    # JAX makes a ValueError of some, which begins with XLA's name of a status, as all of its do.
    xlas = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", text)
    known = isinstance(error, jax.errors.JaxRuntimeError) or xlas
    return bool(known) and any(sign in text.lower() for sign in signs)


def preempted() -> bool:
    """Whether to save and stop: after a SIGTERM to any process, true in all at the same call.

    Every process must call this equally often. With one process, always False.
    """
    return multihost_utils.reached_preemption_sync_point(next(_steps))


# --------------------------------------------------------------------------------------- agreeing


def on_first(action: Callable[[], Any]) -> Any:
    """Runs `action` in process 0 while the others wait; its result, JSON-able, in all.

    Raises:
      UserError: in the others if it raised anything in process 0.
    """
    if jax.process_count() == 1:
        return action()
    key = f"lte_jax/first/{next(_firsts)}"
    if jax.process_index() != 0:
        told = json.loads(_client().blocking_key_value_get(key, _PATIENCE_MS))
        if "problem" in told:
            raise UserError(f"process 0 failed: {told['problem']}")
        return told["result"]
    try:
        result = action()
    except Exception as error:
        _client().key_value_set(key, json.dumps({"problem": one_line(error)}))
        raise
    _client().key_value_set(key, json.dumps({"result": result}))
    return result


def check_alike(what: str, own: Mapping[str, Any]) -> None:
    """Checks that this process has the same JSON-able values as process 0.

    Raises:
      UserError: if not; names the first key that differs.
    """
    theirs = on_first(lambda: dict(own))
    if different := sorted(k for k in {*own, *theirs} if own.get(k) != theirs.get(k)):
        raise UserError(
            f"process {jax.process_index()} has other {what} than process 0 ({different[0]}): "
            "start all with the same command, on the same files"
        )


def wait(name: str) -> None:
    """Returns once every process has called it, in the main thread; `name` is for errors."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"lte_jax/{name}/{next(_waits)}", _PATIENCE_MS)


def exchanged(name: str, value: Any) -> list[Any]:
    """The JSON-able value of every process, in their order; for any thread.

    Args:
      name: of this exchange: the same in all processes, never used twice.
      value: of this process.
    """
    count, client = jax.process_count(), _client()
    if count == 1:
        return [value]
    client.key_value_set(f"lte_jax/{name}/{jax.process_index()}", json.dumps(value))
    keys = (f"lte_jax/{name}/{process}" for process in range(count))
    return [json.loads(client.blocking_key_value_get(key, _PATIENCE_MS)) for key in keys]


def once(make: Callable[[], Any], like: Any, kept: Kept = NOWHERE) -> Any:
    """What `make` makes in every process alike, a tree `like`; or what is kept of it."""
    if done := _finished(like, kept):
        return done[0]
    made = make()
    if jax.process_index() == 0:
        kept.write(0, made)
    return made


def spread(
    items: Callable[[int], Iterable[T]],
    work: Callable[[T], Any],
    like: Any,
    kept: Kept = NOWHERE,
) -> list[Any]:
    """`work` of each item, in order: each item is one process's, the results are all's, bit by bit.

    Every process goes through all items (to make one may take all of them, as a gathered array
    does) and holds its own.

    Args:
      items: those from a number on, the same in all processes.
      work: makes a tree of arrays, without the other processes.
      like: the shapes and types of that tree; float64 is exchanged as float32.
      kept: results that a killed run need not make again.
    """
    count, own = jax.process_count(), jax.process_index()
    results = _finished(like, kept)
    iterator = iter(items(len(results)))
    if count == 1:
        for item in iterator:
            results.append(work(item))
            kept.write(len(results) - 1, results[-1])
        return results
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    while True:
        mine, taken = zeros, 0
        for process, item in zip(range(count), iterator, strict=False):
            taken, mine = taken + 1, item if process == own else mine
        made = work(mine) if own < taken else zeros
        made = jax.tree.map(lambda x, leaf: np.asarray(x, leaf.dtype), made, zeros)
        wait("spread")  # work takes longer than a collective may
        for process in range(taken):
            results.append(multihost_utils.broadcast_one_to_all(made, own == process))
            if own == 0:
                kept.write(len(results) - 1, results[-1])
        if taken < count:
            return results


def _finished(like: Any, kept: Kept) -> list[Any]:
    """What is kept, as process 0 sees it."""
    found = kept.read(like)
    count = on_first(lambda: len(found))
    if len(found) < count:
        raise UserError(
            f"{kept.folder} holds {len(found)} items as process {jax.process_index()} sees it, "
            f"{count} as process 0 does: expected a work directory that all processes share"
        )
    return found[:count]
