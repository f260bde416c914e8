"""`UserError`, for problems the user can fix, and how command lines report it."""

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
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

MAX_LENGTH = 499  # characters per message
T = TypeVar("T")

# An argument that its function checks by itself, to say what is wrong in one line: to a type
# checker Given[int] is int, at run time anything.
if TYPE_CHECKING:
    Given = Annotated[T, "checked by the function"]
else:

    class Given:
        """See above."""

        def __class_getitem__(cls, hint: Any) -> Any:
            return Any


class UserError(ValueError):
    """Bad input: one line that names the culprit, what was expected, and the fix.

    Messages may quote untrusted files, so control characters are escaped. A message that is too
    long loses its middle: the culprit comes first and the fix last.
    """

    def __init__(self, message: str):
        # Escaped is what a terminal would obey or cannot print.
        line = message.replace("\n", " ")
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > MAX_LENGTH:
            line = f"{line[: MAX_LENGTH // 2 - 5]} ... {line[-MAX_LENGTH // 2 :]}"
        super().__init__(line)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid one, or all of them if none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(valid)}"


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Wraps the main function of a script: error messages, exit codes, logging.

    Errors the user can fix print one line `error: ...` on stderr and exit with 2. Ctrl-C exits
    with 130 and a closed pipe (`| head`) with 141, both silently. Characters that the terminal's
    encoding lacks print as `?`. Choices the package makes itself, such as the kernels, are logged
    on stderr.
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
        with contextlib.suppress(OSError, ValueError):  # or Python complains at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        _end_at_once_on_a_further_signal()
        raise SystemExit(130) from None
    except SystemExit as end:
        if end.code in (130, 143):  # from a signal, see interrupt.py
            _end_at_once_on_a_further_signal()
        raise
    except (UserError, OSError) as error:
        print(f"error: {UserError(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        log.setLevel(level)


def _end_at_once_on_a_further_signal() -> None:
    """Avoids tracebacks from the interpreter's shutdown when Ctrl-C arrives during it."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; `--help` keeps the description's line breaks."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message as one line, then exits."""
        super().error(str(UserError(message)))


def argument(text: str) -> str:
    """A command-line argument as text; bytes that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
