"""What a user can mend: one exception, and how command lines print it."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator

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
    """Ends the program on what the user can mend: one line `error: ...` on stderr, exit code 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
