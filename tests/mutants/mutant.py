"""What a mutant is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault of one line, and the tests that are there to see it."""

    name: str  # of the fault: "the gradient is not clipped"
    file: str  # below the root of the tree
    old: str  # stands there once
    new: str
    tests: str  # files or node ids of pytest, with spaces between: quick ones

    @contextlib.contextmanager
    def applied(self, tree: pathlib.Path) -> Iterator[None]:
        """Within it the tree has the fault.

        Raises:
          LookupError: where there is no such file, or `old` does not stand in it exactly once.
        """
        path = tree / self.file
        if not path.is_file():
            raise LookupError(f"there is no file {self.file}")
        text, before = path.read_text(), path.stat()
        if (times := text.count(self.old)) != 1:
            raise LookupError(f"{self.old!r} stands {times} times in {self.file}: expected once")
        path.write_text(text.replace(self.old, self.new))
        # Python takes bytecode for that of a source of the same size and second.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
        try:
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def of(file: str, tests: str, *rows: tuple[str, str, str, str]) -> list[Mutant]:
    """Mutants of one file: (name, test, old, new); a test is in `tests` unless it says where."""
    return [
        Mutant(name, file, old, new, test if "/" in test else f"{tests}::{test}")
        for name, test, old, new in rows
    ]
