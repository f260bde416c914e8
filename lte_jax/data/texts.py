"""Texts of sources: files, the Hugging Face hub, the Python standard library, or a mix of them."""

from __future__ import annotations

import collections
import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lte_jax import checks
from lte_jax.data.formats import WholeText
from lte_jax.data.sources import is_stdlib, local_files, parts, read_rows
from lte_jax.errors import UserError, nearest

SURROGATE = re.compile("[\ud800-\udfff]")  # alone, which is no character
_SET_BY = " (data.column, or --column)"  # the column of texts; those of a task are its own


def read_texts(
    source: str,
    column: str = "text",
    newline: str = "\n",
    limit: int | None = None,
    split: str | None = None,
    join: str | None = None,
) -> list[str]:
    """The documents of `read_each`, those of one source after those of another."""
    return list(itertools.chain(*read_each(source, column, newline, limit, split, join)))


def read_each(
    source: str,
    column: str = "text",
    newline: str = "\n",
    limit: int | None = None,
    split: str | None = None,
    join: str | None = None,
) -> list[list[str]]:
    r"""The documents of each source that `source` names, empty ones left out.

    Args:
      source: a file (.jsonl of JSON lines, .json with a list, .csv and .tsv with names of columns,
        .parquet, .txt or .md, which are cut into documents; all but Parquet also .gz), a folder of
        those or of one for each split, a glob, a data set of the Hugging Face hub ("name",
        "name:config" or "name:config:split"), or "python-stdlib": the source files of this Python's
        standard library, sorted by name (":train" and ":validation" are its two parts, chosen by a
        hash of each file's name). Several stand in a sum, "a + b". With weights, "0.7 * a + 0.3 *
        b", each gives that share of the characters, from its first documents on, until one of them
        ends; no more than that is read.
      column: the key of the text in each record.
      newline: what replaces every "\n".
      limit: how many documents to read of each source, from the first; those of the hub are then
        read as they arrive, without the rest. None: all.
      split: the part to read if a source has parts and names none. None: "train", of the standard
        library all.
      join: None: each record is a document. A string joins all records of a source, empty ones too,
        into one running text: "" for data sets of lines that keep their newlines.

    Raises:
      UserError: if a source has no text, or a record is malformed; it names file and line.
    """
    groups: list[list[str]] = [[] for _ in parts(source)]
    for i, text in _each(source, column, newline, limit, split, join):
        groups[i].append(text)
    return groups


def stream_texts(
    source: str,
    column: str = "text",
    newline: str = "\n",
    limit: int | None = None,
    split: str | None = None,
    join: str | None = None,
) -> Iterator[tuple[int, str]]:
    """The documents of `read_each` one by one, each with the number of its source, from 0.

    In memory is one at a time. Sources with weights are read twice, first to find their shares.
    """
    how = column, newline, limit, split, join
    if parts(source)[0][0] is None:
        yield from _each(source, *how)
        return
    numbers = collections.Counter(i for i, _ in _each(source, *how))
    for i, (_, name) in enumerate(parts(source)):
        with contextlib.closing(_each(name, *how)) as texts:
            yield from ((i, text) for _, text in itertools.islice(texts, numbers[i]))


def _each(
    source: str,
    column: str,
    newline: str,
    limit: int | None,
    split: str | None,
    join: str | None,
) -> Iterator[tuple[int, str]]:
    """As `stream_texts`, but sources with weights in turns."""
    if not source:
        raise UserError(
            "data source is '': expected a file, a folder, a hub dataset or 'python-stdlib'"
        )
    if limit is not None:
        checks.integer("limit", limit, 1, words=", or None for all documents")
    for name, between in ("newline", newline), ("join", join):
        if not isinstance(between, str | None) or SURROGATE.search(between or ""):
            raise UserError(f"{name}={between!r}: expected characters that a text can hold")
    weights, names = zip(*parts(source), strict=True)
    if join is not None and None not in weights:
        raise UserError(f"{source}: joined records have no shares: leave out the weights, or join")
    having = set()
    with contextlib.ExitStack() as opened:
        texts = []
        for name in names:
            rows = read_rows(name, split, limit is not None, join is not None)
            found = _texts(opened.enter_context(rows), column, join is not None)
            own = (text.replace("\n", newline) for text in itertools.islice(found, limit))
            texts.append(own if join is None else _joined(own, join))
        for i, text in _in_order(texts) if None in weights else _in_proportion(weights, texts):
            having.add(i)
            yield i, text
    for i, name in enumerate(names):
        if i not in having:
            raise UserError(
                f"{name}: no rows with text in column {column!r}: expected at least one"
            )


def _texts(rows: Iterator[tuple[str, Any]], column: str, empty: bool) -> Iterator[str]:
    """The text of each record, empty ones too if `empty`."""
    texts = (
        str(row) if isinstance(row, WholeText) else text_of(row, column, where, _SET_BY)
        for where, row in rows
    )
    return (text for text in texts if text or empty)


def _joined(texts: Iterator[str], join: str) -> Iterator[str]:
    whole = [*texts]
    if any(whole):
        yield join.join(whole)


def _in_order(texts: Sequence[Iterator[str]]) -> Iterator[tuple[int, str]]:
    return ((i, text) for i, own in enumerate(texts) for text in own)


def _in_proportion(
    weights: Sequence[float], texts: Sequence[Iterator[str]]
) -> Iterator[tuple[int, str]]:
    """The first texts of each, so many that their characters are as the weights, until one ends."""
    taken = [0] * len(weights)
    while True:
        i = min(range(len(weights)), key=lambda i: taken[i] / weights[i])
        text = next(texts[i], None)
        if text is None:
            return
        taken[i] += len(text)
        yield i, text


def count_texts(
    source: str,
    column: str = "text",
    split: str | None = None,
    join: str | None = None,
    most: int = 100_000,
) -> int | None:
    """How many records `read_texts` has to read without a limit.

    None: more than `most`, or unknown: of the hub, all of which would be read, and of weighted
    mixes.
    """
    for weight, name in parts(source):
        if weight is not None or local_files(name, split) is None and not is_stdlib(name):
            return None
    with read_rows(source, split, whole=join is not None) as rows:
        number = sum(1 for _ in itertools.islice(_texts(rows, column, join is not None), most + 1))
    return number if number <= most else None


def text_of(row: Any, column: str, where: str, set_by: str = "") -> str:
    """The text in a column of a record; `set_by` says what names the column, for the error."""
    value = value_of(row, column, where, set_by)
    if not isinstance(value, str):
        kind, textual = type(value).__name__, [c for c in row if isinstance(row[c], str)]
        raise UserError(
            f"{where}: column {column!r} holds {kind}, expected text: "
            f"columns with text are {', '.join(textual) or 'none'}"
        )
    return value


def value_of(row: Any, column: str, where: str, set_by: str = "") -> Any:
    """What a column of a record holds; `set_by` as in `text_of`."""
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise UserError(f'{where}: a JSON {kind}: expected an object such as {{"{column}": "..."}}')
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r} (columns: {', '.join(row) or 'none'}): "
            f"{nearest(column, row)}{set_by}"
        )
    return row[column]
