"""Records of one file: JSON, CSV, Parquet, plain text; what is wrong with it, in one line."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lte_jax.errors import UserError, one_line

TABLES = {".csv": ",", ".tsv": "\t"}  # and what stands between their columns
PLAIN = (".txt", ".md")
KINDS = (".jsonl", ".json", *PLAIN, *TABLES, ".parquet")  # all but the last also followed by .gz
CUT = 8_000  # characters, at least, of the documents that a plain text is cut into
BLANK_LINE, LINE = re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n")


class WholeText(str):
    """A text that is a record by itself, without columns."""


def kind_of(path: Path) -> str:
    """The ending that says how to read a file; "" if there is none."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    return path.suffix if kind == ".parquet" else kind  # which compresses by itself


def file_rows(path: Path, whole: bool = False) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with its place for error messages.

    A record is an object of columns, or a `WholeText`: a plain text, if `whole`, or the documents
    it is cut into (`cut`).

    Raises:
      UserError: if it cannot be read.
    """
    kind = kind_of(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe waits for its writer
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise UserError(f"{path}: is {what}: expected a file ({', '.join(KINDS)})")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(3)
            if not start:
                raise UserError(f"{path}: the file is empty: expected rows of text")
            if start != codecs.BOM_UTF8:
                file.seek(0)
            if kind in PLAIN:
                text = file.read().decode().replace("\r\n", "\n")
                pieces = [text] if whole else cut(text)
                yield from ((str(path), WholeText(piece)) for piece in pieces)
            elif kind in TABLES:
                yield from _table_rows(path, TABLES[kind], file)
            elif kind == ".parquet":
                yield from _parquet_rows(path)
            elif kind in KINDS:
                yield from _json_rows(path, kind, file)
            else:
                raise UserError(f"{path}: unknown kind of file: expected {', '.join(KINDS)}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}): convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}): expected a readable file") from None


def cut(text: str) -> Iterator[str]:
    """A plain text as documents, which one after another are the text again.

    Each has CUT characters or more, up to the next blank line; if none comes within as many again,
    to the next end of a line, or else exactly CUT. The last one has up to twice as many.
    """
    start = 0
    while len(text) - start > 2 * CUT:
        reach = start + CUT, start + 2 * CUT
        found = BLANK_LINE.search(text, *reach) or LINE.search(text, *reach)
        end = found.end() if found else reach[0]
        yield text[start:end]
        start = end
    yield text[start:]


def _json_rows(path: Path, kind: str, file: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
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


def _table_rows(path: Path, between: str, file: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a table whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # Python's own refuses texts of 128 kB
    with io.TextIOWrapper(file, encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter=between, strict=True)
        try:
            names = next(rows)
            for row in filter(None, rows):  # without blank lines
                where = f"{path}:{rows.line_num}"
                if len(row) != len(names):
                    raise UserError(
                        f"{where}: {len(row)} fields, expected the {len(names)} of the first line "
                        f"({', '.join(names)}): put texts in double quotes"
                    )
                yield where, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{path}:{rows.line_num}: cannot be read as a table ({error}): put texts in double "
                "quotes, and double those within"
            ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs the package pyarrow: pip install 'lte-jax[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({one_line(error)}): copy it again"
        ) from None
