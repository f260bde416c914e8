"""Runs of train.py as processes, side by side with an equal share of the cores each."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lte_jax import interrupt

# How often a stop is looked for. A child that has got the terminal's Ctrl-C itself takes the
# SIGTERM that follows so soon for the same request.
_LOOK_SECONDS = 0.1


def side_by_side(workers: int) -> ThreadPoolExecutor:
    """Threads with cores of their own, as have the processes that they start.

    Two processes of two threads each would move their data between cores: a third slower.
    """
    if not hasattr(os, "sched_setaffinity"):  # macOS
        return ThreadPoolExecutor(workers)
    allowed = sorted(os.sched_getaffinity(0))
    share, shares = max(1, len(allowed) // workers), queue.SimpleQueue()
    for worker in range(workers):
        start = worker * share % len(allowed)
        shares.put(allowed[start : start + share])
    return ThreadPoolExecutor(workers, initializer=lambda: os.sched_setaffinity(0, shares.get()))


def train(
    config: str, workdir: Path, overrides: Sequence[str] = (), inherited: Sequence[int] = ()
) -> int:
    """Runs an experiment in a process of its own, or goes on with it; returns its exit code.

    If a signal has arrived (interrupt.py), the process is asked to stop, and waited for.

    Args:
      config: as train.py takes it: "configs/glue.py:sst2".
      workdir: of the run; what the process prints is appended to `log(workdir)`.
      overrides: "key=value" of the config.
      inherited: file descriptors that the process keeps open.
    """
    command = [sys.executable, "-m", "lte_jax", "train", f"--config={config}"]
    command += ["--processes=1"]  # its runs are not one program, even under srun
    command += [f"--workdir={workdir.absolute()}", *(f"--config.{o}" for o in overrides)]
    with log(workdir).open("a") as told:
        process = subprocess.Popen(
            command, env=_environment(workdir), stdout=told, stderr=told, pass_fds=inherited
        )
    asked = False
    while True:
        try:
            return process.wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if interrupt.requested() and not asked:
                process.terminate()
                asked = True


def log(workdir: Path) -> Path:
    """Where the output of a run's processes is."""
    return workdir.with_name(f"{workdir.name}.log")


def _environment(workdir: Path) -> dict[str, str]:
    flags = ["--xla_cpu_prefer_vector_width=512"]
    # Two runs on one core each are faster than one after another on two.
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    flags.append(os.environ.get("XLA_FLAGS", ""))  # the user's win
    # Many runs have the same programs: compiling them again would take a quarter of the time.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str((workdir.parent / "compiled").absolute())}
    told = {"XLA_FLAGS": " ".join(flags).strip(), "TQDM_DISABLE": "1"}
    return compiled | os.environ | told
