"""Stopping on a signal, at a moment when nothing is lost.

While `handled` is active, SIGTERM (a scheduler's) and SIGINT (Ctrl-C) only leave a note. Long
loops call `check` where it is safe to stop; there the program ends, with the exit code a shell
gives to that signal: 143 or 130. So no exception is ever raised inside a save, whose threads would
wait for each other for ever. A second signal ends the process at once, as SIGKILL would; the next
start clears up after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# `timeout` and some schedulers signal the process and then its group, which is the process again.
_SAME_REQUEST_SECONDS = 0.2

_handling = False
_noted: tuple[int, float] | None = None  # signal, and when it came


class Interrupted(SystemExit):
    """The end that a signal asked for, at a safe point; the exit code is 128 + its number."""

    def __init__(self, where: str):
        # Of several processes that stop together, this one may not have had the signal itself.
        self.number = _noted[0] if _noted is not None else signal.SIGTERM
        super().__init__(128 + self.number)
        self.where, self.told = where, False


def requested() -> bool:
    """Whether a signal has come."""
    return _noted is not None


def check(where: str) -> None:
    """Ends the program here if a signal has come; does nothing outside `handled`.

    Args:
      where: goes on from "stopped by SIGTERM ", such as "while tokenising".

    Raises:
      Interrupted: if so.
    """
    if _noted is not None:
        raise Interrupted(where)


@contextlib.contextmanager
def handled(afterwards: str, *, install: bool = True) -> Iterator[None]:
    """SIGTERM and SIGINT wait for the next `check`; the end is told in one line on stderr.

    Outside the main thread (a notebook's worker), and for a signal that is ignored (in a shell's
    background jobs), everything stays as it is. Nested, the outermost counts.

    Args:
      afterwards: ends that line: what is kept, and how to go on.
      install: False where somebody else hears the signals, as JAX does for several processes.

    Raises:
      Interrupted: from a `check`, or at the end if a signal came after the last one.
    """
    global _handling, _noted
    if _handling or not install or threading.current_thread() is not threading.main_thread():
        with _told(afterwards):
            yield
        return
    before = {n: signal.getsignal(n) for n in SIGNALS}
    ours = {n: old for n, old in before.items() if old is not signal.SIG_IGN}
    _handling = True
    try:
        for number in ours:
            signal.signal(number, _note)
        with _told(afterwards):
            yield
            check("at its end")
    finally:
        for number, old in ours.items():
            signal.signal(number, old)
        _handling, _noted = False, None


@contextlib.contextmanager
def _told(afterwards: str) -> Iterator[None]:
    try:
        yield
    except Interrupted as stop:
        if not stop.told:
            name = signal.Signals(stop.number).name
            print(f"stopped by {name} {stop.where}: {afterwards}", file=sys.stderr, flush=True)
        stop.told = True
        raise


def _note(number: int, frame: object) -> None:
    global _noted
    now = time.monotonic()
    if _noted is None:
        _noted = number, now
        if os.isatty(2):
            os.write(2, b"\nstopping at the next safe point; once more to stop at once\n")
    elif now - _noted[1] > _SAME_REQUEST_SECONDS:
        os.write(2, b"stopped at once by a second signal; the same command goes on\n")
        os._exit(128 + number)
