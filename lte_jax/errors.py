"""What a user can mend: one exception, and how command lines print it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import NoReturn

MAX_LENGTH = 499  # characters of a message


class UserError(ValueError):
    """Input the user can mend: one line naming the culprit, what was expected, and the mend.

    What is quoted may come from a stranger's file: control characters are escaped, and of a message
    that is too long the middle is left out, as the culprit stands first and the mend last.
    """

    def __init__(self, message: str):
        super().__init__(_tame(message))


def _tame(message: str) -> str:
    line = "".join(map(_printable, message.replace("\n", " ")))
    if len(line) > MAX_LENGTH:
        line = f"{line[: MAX_LENGTH // 2 - 5]} ... {line[-MAX_LENGTH // 2 :]}"
    return line


def _printable(character: str) -> str:
    """Itself, or its escape: terminals obey control characters, and cannot print surrogates."""
    return character if character.isprintable() else ascii(character)[1:-1]


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid one, or all of them where none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(valid)}"


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Around the main function of each script: how a program speaks and ends.

    What the user can mend is one line `error: ...` on stderr and exit code 2. Ctrl-C ends it with
    code 130 and a reader that has gone (`| head`) with 141, as shells count them, without a word.
    What the terminal's encoding lacks is printed as `?`. What the package chooses by itself, such
    as the kernels, is said on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("lte_jax")
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # or Python complains as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        _end_at_once_on_a_further_signal()
        raise SystemExit(130) from None
    except SystemExit as end:
        if end.code in (130, 143):  # a signal's: see interrupt.py
            _end_at_once_on_a_further_signal()
        raise
    except (UserError, OSError) as error:
        print(f"error: {UserError(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        log.setLevel(level)


def _end_at_once_on_a_further_signal() -> None:
    """While the interpreter takes itself apart, Ctrl-C would show as tracebacks of its insides."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


class Parser(argparse.ArgumentParser):
    """Of a command line whose words, quoted in an error, may hold newlines and worse.

    The description's own lines stay in `--help`.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """The usage and one line."""
        super().error(str(UserError(message)))


def argument(text: str) -> str:
    """An argument of the command line as text: bytes that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
