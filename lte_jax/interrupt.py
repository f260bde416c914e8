"""Graceful shutdown on a signal, at a point where nothing is lost.

While `handled` is active, SIGTERM (from schedulers) and SIGINT (Ctrl-C) only set a flag. Long loops
call `check` where it is safe to stop; there the program exits with the shell's code for that
signal, 143 or 130. So no exception is raised inside a save, which would deadlock its threads. A
second signal ends the process at once, like SIGKILL; the next start cleans up.
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
# `timeout` and some schedulers signal the process, then its group: the same process twice.
_SAME_REQUEST_SECONDS = 0.2

_handling = False
_noted: tuple[int, float] | None = None  # signal and time of arrival


class Interrupted(SystemExit):
    """Exit on a signal, at a safe point; the exit code is 128 + its number."""

    def __init__(self, where: str):
        # When several processes stop together, another one may have received the signal.
        self.number = _noted[0] if _noted is not None else signal.SIGTERM
        super().__init__(128 + self.number)
        self.where, self.told = where, False


def requested() -> bool:
    """Whether a signal has arrived."""
    return _noted is not None


def check(where: str) -> None:
    """Exits here if a signal has arrived; does nothing outside `handled`.

    Args:
      where: completes "stopped by SIGTERM ...", such as "while tokenising".

    Raises:
      Interrupted: if a signal has arrived.
    """
    if _noted is not None:
        raise Interrupted(where)


@contextlib.contextmanager
def handled(afterwards: str, *, install: bool = True) -> Iterator[None]:
    """Defers SIGTERM and SIGINT to the next `check`; the exit prints one line on stderr.

    Changes nothing outside the main thread (a notebook's worker) or for signals that are ignored
    (a shell's background jobs). If nested, the outermost one counts.

    Args:
      afterwards: ends that line: what is saved, and how to resume.
      install: False if something else handles the signals, as JAX does for several processes.

    Raises:
      Interrupted: from a `check`, or at the end if a signal arrived after the last one.
    """
    global _handling, _noted
    outermost = install and not _handling
    outermost &= threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in SIGNALS if outermost}
    ours = {n: old for n, old in before.items() if old is not signal.SIG_IGN}
    try:
        for number in ours:
            signal.signal(number, _note)
        _handling |= outermost
        yield
        if outermost:
            check("at its end")
    except Interrupted as stop:
        if not stop.told:
            name = signal.Signals(stop.number).name
            print(f"stopped by {name} {stop.where}: {afterwards}", file=sys.stderr, flush=True)
        stop.told = True
        raise
    finally:
        for number, old in ours.items():
            signal.signal(number, old)
        if outermost:
            _handling, _noted = False, None


def _note(number: int, frame: object) -> None:
    global _noted
    now = time.monotonic()
    if _noted is None:
        _noted = number, now
        if os.isatty(2):
            os.write(2, b"\nstopping at the next safe point; signal again to stop at once\n")
    elif now - _noted[1] > _SAME_REQUEST_SECONDS:
        os.write(2, b"stopped at once by a second signal; run the same command to resume\n")
        os._exit(128 + number)
