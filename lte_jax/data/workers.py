"""Processes that tokenise beside this one.

They are started afresh, not forked: JAX has threads. They end with this process, also if it is
killed, and ignore the terminal's Ctrl-C: this process lets them finish what they are at.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from lte_jax import interrupt
from lte_jax.errors import UserError

_tokenizer: Any = None  # of a worker


class Pool:
    """Runs functions of a tokenizer, in so many processes; with 1, in this one."""

    def __init__(self, processes: int, tokenizer: Any):
        self.processes, self._tokenizer = processes, tokenizer
        self._executor = None
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(processes, spawn, _begin, (tokenizer,))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> _Result:
        """Begins `function(tokenizer, *arguments)`."""
        if self._executor is not None:
            return _Result(self._executor.submit(_call, function, *arguments))
        future: Future = Future()
        future.set_result(function(self._tokenizer, *arguments))
        return _Result(future)


class _Result:
    def __init__(self, future: Future):
        self._future = future

    def result(self) -> Any:
        """What the function returned, once it has.

        Raises:
          UserError: also if a process was ended from outside.
        """
        try:
            return self._future.result()
        except BrokenProcessPool:
            interrupt.check("with its workers")  # a signal to all processes at once
            raise UserError(
                "a worker process was ended from outside (short of memory?): run the same command "
                "again, which goes on, perhaps with fewer --workers"
            ) from None


def _begin(tokenizer: Any) -> None:
    """Makes a new process a worker."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each has a core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, to all its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(_tokenizer, *arguments)
