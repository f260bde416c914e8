"""Documents from files, the Hugging Face hub, or the Python standard library."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lte_jax import checks
from lte_jax.errors import UserError, nearest
from lte_jax.files import mirrored

STDLIB = "python-stdlib"
# Installed packages, and tests, which some distributions leave out.
NOT_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
FILE_KINDS = (".jsonl", ".json", ".txt")  # each may be followed by .gz
SPLITS = ("train", "validation")
SURROGATE = re.compile("[\ud800-\udfff]")  # alone, which is no character


class WholeText(str):
    """A text that is a record by itself, without columns."""


def read_texts(
    source: str,
    column: str = "text",
    newline: str = "\n",
    limit: int | None = None,
    split: str | None = None,
    join: str | None = None,
) -> list[str]:
    r"""The documents of `source`, empty ones left out.

    Args:
      source: a file (.jsonl of JSON lines, .json with a list, .txt with one document; each also
        .gz), a dataset of the Hugging Face hub ("name", "name:config" or "name:config:split"), or
        "python-stdlib": the source files of this Python's standard library, sorted by name
        (":train" and ":validation" are its two parts, chosen by a hash of each file's name).
      column: the key of the text in each record.
      newline: what replaces every "\n".
      limit: how many records to read, from the first. None: all.
      split: the part to read if `source` has parts and names none. None: a hub dataset's "train",
        all of the standard library.
      join: None: each record is a document. A string joins all records, empty ones too, into one
        running text: "" for data sets of lines that keep their newlines.

    Raises:
      UserError: if there is no text, or a record is malformed; it names file and line.
    """
    if not source:
        raise UserError(
            f"data source is '': expected a JSON-lines file, a hub dataset or {STDLIB!r}"
        )
    if limit is not None:
        checks.integer("limit", limit, 1, words=", or None for all documents")
    for name, between in ("newline", newline), ("join", join):
        if not isinstance(between, str | None) or SURROGATE.search(between or ""):
            raise UserError(f"{name}={between!r}: expected characters that a text can hold")
    with read_rows(source, split) as rows:
        texts = (
            str(row) if isinstance(row, WholeText) else text_of(row, column, where)
            for where, row in rows
        )
        texts = (text for text in texts if text or join is not None)
        texts = [text.replace("\n", newline) for text in itertools.islice(texts, limit)]
    if not any(texts):
        raise UserError(f"{source}: no rows with text in column {column!r}: expected at least one")
    return texts if join is None else [join.join(texts)]


def count_texts(
    source: str,
    column: str = "text",
    split: str | None = None,
    join: str | None = None,
    most: int = 100_000,
) -> int | None:
    """How many records `read_texts` has to read without a limit; None: more than `most`."""
    with read_rows(source, split) as rows:
        counted = (
            None
            for where, row in rows
            if join is not None
            or (row if isinstance(row, WholeText) else text_of(row, column, where))
        )
        number = sum(1 for _ in itertools.islice(counted, most + 1))
    return number if number <= most else None


def local_path(source: str) -> Path:
    """`source` as a path, `~` replaced by the home folder."""
    return Path(os.path.expanduser(source))  # unlike Path.expanduser, leaves an unknown ~user


def read_rows(
    source: str, split: str | None = None
) -> contextlib.AbstractContextManager[Iterator[tuple[str, Any]]]:
    """The records of `source`, as `read_texts` has it, each with its place for error messages.

    A record is an object of columns, or a `WholeText`. A folder holds a file for each split, such
    as train.jsonl. They are read within a `with`, whose end closes the file: an iterator left in
    the middle, by an error in a record or a limit, would keep it open until it is collected.
    """
    return contextlib.closing(_rows(source, split))


def _rows(source: str, split: str | None) -> Iterator[tuple[str, Any]]:
    name, _, part = source.partition(":")
    path = local_path(source)
    if name == STDLIB:
        return _stdlib_rows(part or split)
    is_local = os.path.lexists(path) or source.startswith((".", "/", "~"))
    if is_local or path.suffix in (*FILE_KINDS, ".gz"):
        return _file_rows(_of_split(path, split) if os.path.isdir(path) else path)
    if local := mirrored("/".join(source.split(":")[:2]).rstrip("/")):
        return _file_rows(_of_split(local, ":".join(source.split(":")[2:]) or split or "train"))
    return _hub_rows(source, split)


def _stdlib_rows(part: str | None) -> Iterator[tuple[str, Any]]:
    if part not in (None, *SPLITS):
        raise UserError(f"{STDLIB}:{part}: {nearest(part, SPLITS)}")
    root = Path(sysconfig.get_paths()["stdlib"])
    own = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - NOT_OF_STDLIB
        own += [Path(folder, f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    if not own:
        raise UserError(f"{STDLIB}: no source files in {root}: name a JSON-lines file instead")
    for name in sorted(own):
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        machine_made = name.startswith("_sysconfigdata")  # holds paths of the build machine
        if not machine_made and (part is None or held_out == (part == "validation")):
            text = (root / name).read_text(encoding="utf-8", errors="replace")
            yield name, WholeText(text)


def _of_split(folder: Path, split: str | None) -> Path:
    """The file of a split in a folder."""
    names = [f"{split}{kind}{gz}" for kind in FILE_KINDS for gz in ("", ".gz")]
    for name in names:
        if (folder / name).exists():
            return folder / name
    held = sorted(file.name for file in folder.iterdir())
    raise UserError(
        f"{folder}: is a folder without {split or 'train'}.jsonl (or {', '.join(FILE_KINDS[1:])}): "
        f"expected a file for each split, found {', '.join(held[:5]) or 'nothing'}"
    )


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    kind = Path(path.name.removesuffix(".gz")).suffix
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe waits for its writer
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise UserError(f"{path}: is {what}: expected a file ({', '.join(FILE_KINDS)})")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(3)
            if not start:
                raise UserError(f"{path}: the file is empty: expected rows of text")
            if start != codecs.BOM_UTF8:
                file.seek(0)
            if kind == ".txt":
                yield str(path), WholeText(file.read().decode().replace("\r\n", "\n"))
            elif kind in FILE_KINDS:
                yield from _json_rows(path, kind, file)
            else:
                raise UserError(f"{path}: unknown kind of file: expected {', '.join(FILE_KINDS)}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}): convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}): expected a readable file") from None


def _json_rows(path: Path, kind: str, file: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with its place for error messages."""
    start = file.tell()
    is_list = kind == ".json" and file.read(1) == b"["
    file.seek(start)
    if is_list:
        rows = _parse(file.read(), str(path))
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(file, 1):
        if not line.isspace():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply: mend or remove it") from None
    except ValueError as error:  # of JSON, of UTF-8, and of numbers with thousands of digits
        raise UserError(f"{where}: cannot be read as JSON ({error}): mend or remove it") from None


def text_of(row: Any, column: str, where: str) -> str:
    """The text in a column of a record."""
    value = value_of(row, column, where)
    if not isinstance(value, str):
        kind, textual = type(value).__name__, [c for c in row if isinstance(row[c], str)]
        raise UserError(
            f"{where}: column {column!r} holds {kind}, expected text: "
            f"columns with text are {', '.join(textual) or 'none'}"
        )
    return value


def value_of(row: Any, column: str, where: str) -> Any:
    """What a column of a record holds."""
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise UserError(f'{where}: a JSON {kind}: expected an object such as {{"{column}": "..."}}')
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r} (columns: {', '.join(row) or 'none'}): "
            f"{nearest(column, row)}"
        )
    return row[column]


def _hub_rows(source: str, split: str | None) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: no such file, and reading a hub dataset of that name needs the package "
            "datasets: pip install 'lte-jax[data]'"
        ) from None
    name, config, part, *more = source.split(":") + ["", ""]
    if any(more):
        raise UserError(f"{source}: expected name, name:config or name:config:split")
    try:
        rows = datasets.load_dataset(name, config or None, split=part or split or "train")
    except (OSError, ValueError, RuntimeError) as error:  # absent, offline, no such split
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: the hub dataset cannot be loaded ({reason})") from None
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows))
