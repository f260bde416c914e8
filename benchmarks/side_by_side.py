"""Runs of train.py side by side, a core each: what the benchmarks with many runs share."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def one_core_each(workers: int) -> ThreadPoolExecutor:
    """Threads pinned to a core each, as are the processes that they start.

    Two processes of two threads each would move their data between cores: a third slower.
    """
    if not hasattr(os, "sched_setaffinity"):  # macOS
        return ThreadPoolExecutor(workers)
    allowed = sorted(os.sched_getaffinity(0))
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for worker in range(workers):
        cores.put(allowed[worker % len(allowed)])
    return ThreadPoolExecutor(workers, initializer=lambda: os.sched_setaffinity(0, {cores.get()}))


def train(config: str, folder: Path, overrides: Sequence[str]) -> None:
    """Runs train.py in a process of its own, or goes on with it; its output is in `folder`.log.

    Args:
      config: a file of configs/, perhaps with words: "glue.py:sst2".
      folder: the run's.
      overrides: "key=value" of the config.
    """
    command = [sys.executable, "train.py", f"--config=configs/{config}"]
    command += [f"--workdir={folder.absolute()}", *(f"--config.{o}" for o in overrides)]
    # Two runs on one core each are faster than one after another on two. The user's flags win.
    flags = "--xla_cpu_multi_thread_eigen=false --xla_cpu_prefer_vector_width=512"
    flags = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    env = os.environ | {"XLA_FLAGS": flags, "TQDM_DISABLE": "1"}
    # Many runs have the same programs: compiling them again would take a quarter of the time.
    env["JAX_COMPILATION_CACHE_DIR"] = str((folder.parent / "compiled").absolute())
    path = folder.with_name(f"{folder.name}.log")
    with path.open("a") as log:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{folder.name} failed, see {path}")
