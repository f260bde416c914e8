"""Texts of files, the hub and the standard library; what is wrong with them, in one line."""

import gc
import gzip
import io
import json
import os
import sys
import sysconfig
import types
from pathlib import Path

import pytest

from lte_jax import data, tasks
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.errors import UserError
from lte_jax.tasks.measurement import Run


def write_rows(path: Path, records) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return str(path)


def test_json_lines(tmp_path):
    records = [{"text": "one\ntwo"}, {"text": ""}, {"text": "three", "id": 3}, {"text": "four"}]
    path = write_rows(tmp_path / "a.jsonl", records)
    assert data.read_texts(path) == ["one\ntwo", "three", "four"]
    assert data.read_texts(path, newline=" ", limit=2) == ["one two", "three"]


def test_other_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"t": "one"}, {"t": "two"}], indent=2))
    (tmp_path / "lines.json").write_text('{"t": "one"}\n\n{"t": "two"}')
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"t": "one"}\n{"t": "two"}\n'))
    for name in "a.json", "lines.json", "a.jsonl.gz":
        assert data.read_texts(str(tmp_path / name), "t") == ["one", "two"], name
    assert data.read_texts(str(tmp_path / "a.txt")) == ["one\ntwo"]


def test_text_files_as_editors_write_them(tmp_path):
    """A mark of the byte order is no part of a text, and a line ends in one character."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one\r\ntwo\r\n")
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "one\\r\\ntwo"}\r\n{"text": "three"}\r\n')
    (tmp_path / "a.json").write_bytes(mark + b'[{"text": "one"},\r\n {"text": "two"}]')
    assert data.read_texts(str(tmp_path / "a.txt")) == ["one\ntwo\n"]
    assert data.read_texts(str(tmp_path / "a.jsonl")) == ["one\r\ntwo", "three"]
    assert data.read_texts(str(tmp_path / "a.json")) == ["one", "two"]


def test_records_joined_to_one_text(tmp_path):
    lines = ["= A =\n", "", "one\ntwo\n", "three\n"]
    path = write_rows(tmp_path / "a.jsonl", [{"text": line} for line in lines])
    assert data.read_texts(path, join="") == ["= A =\none\ntwo\nthree\n"]
    assert data.read_texts(path, join="\n", newline=" ") == ["= A = \n\none two \nthree "]
    assert data.read_texts(path, join=" ", limit=2) == ["= A =\n "]


def test_hub_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming=False):
        asked.append((name, config, split))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for source in "org/name", "org/name:config", "org/name:config:test", "org/name::test":
        assert data.read_texts(source, split="validation") == ["one", "two"]
    data.read_texts("name", split=None)
    assert asked == [
        ("org/name", None, "validation"),
        ("org/name", "config", "validation"),
        ("org/name", "config", "test"),
        ("org/name", None, "test"),
        ("name", None, "train"),
    ]


def test_standard_library_is_deterministic_and_split():
    everything = data.read_texts("python-stdlib")
    assert everything == data.read_texts("python-stdlib")
    train, validation = (data.read_texts(f"python-stdlib:{part}") for part in data.sources.SPLITS)
    assert sorted(train + validation) == sorted(everything)
    assert 0.01 < len(validation) / len(everything) < 0.1
    assert data.read_texts("python-stdlib", split="validation") == validation
    # Sorted by name: the first file at the top is the first of all.
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert everything[0] == (stdlib / "__future__.py").read_text(encoding="utf-8")
    assert len(everything) > 300 and not any("Copyright (c) pip" in text for text in everything)


# ---------------------------------------------------------------------------------- what is refused

GOOD = b'{"text": "a tale"}\n'

# name of the file, its content, the column asked for, what the error must tell
FILES = {
    "absent": ("a.jsonl", None, "text", ["a.jsonl: no such file"]),
    "empty": ("a.jsonl", b"", "text", ["a.jsonl: the file is empty", "expected rows"]),
    "blank": ("a.jsonl", b"\n \n", "text", ["a.jsonl: no rows", "expected at least one"]),
    "empty texts": ("a.jsonl", b'{"text": ""}\n', "text", ["no rows", "column 'text'"]),
    "broken line": (
        "a.jsonl",
        GOOD + b'{"text": "a',
        "text",
        ["a.jsonl:2: cannot be read as JSON", "mend"],
    ),
    "not an object": ("a.jsonl", GOOD + b"[1]\n", "text", ["a.jsonl:2: a JSON list", "expected"]),
    "misspelt column": (
        "a.jsonl",
        GOOD,
        "txt",
        ["a.jsonl:1: no column 'txt'", "did you mean 'text'? (data.column, or --column)"],
    ),
    "column gone halfway": ("a.jsonl", GOOD + b'{"story": "b"}\n', "text", ["a.jsonl:2", "story"]),
    "no columns": ("a.jsonl", b"{}\n", "text", ["a.jsonl:1: no column 'text'", "none"]),
    "numeric column": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n',
        "label",
        ["a.jsonl:1", "'label' holds int", "columns with text are text"],
    ),
    "null text": ("a.jsonl", GOOD + b'{"text": null}', "text", ["a.jsonl:2", "holds NoneType"]),
    "not UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff\xfe"}', "text", ["a.jsonl:2", "utf-8"]),
    "text not UTF-8": ("a.txt", b"caf\xe9", "text", ["a.txt: not UTF-8", "convert"]),
    "truncated gz": (
        "a.jsonl.gz",
        gzip.compress(GOOD * 999)[:-20],
        "text",
        ["a.jsonl.gz: cannot be read", "expected a readable file"],
    ),
    "no gz": ("a.jsonl.gz", GOOD, "text", ["a.jsonl.gz: cannot be read (Not a gzipped file"]),
    "broken list": ("a.json", b'[{"text": "a"},', "text", ["a.json: cannot be read as JSON"]),
    "bad row of a list": ("a.json", b'[{"text": "a"}, 5]', "text", ["a.json: row 2: a JSON int"]),
    "nested": (
        "a.jsonl",
        GOOD + b'{"text": "a", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "text",
        ["a.jsonl:2: JSON nested too deeply", "mend"],
    ),
    "nested list": ("a.json", b"[" * 100_000 + b"]" * 100_000, "text", ["a.json: JSON nested"]),
    "many digits": (
        "a.jsonl",
        GOOD * 2 + b'{"text": "a", "id": ' + b"9" * 5000 + b"}\n",
        "text",
        ["a.jsonl:3: cannot be read as JSON", "digits", "mend"],
    ),
    "only a byte order mark": ("a.txt", b"\xef\xbb\xbf", "text", ["a.txt: no rows with text"]),
    "UTF-16": ("a.txt", "one".encode("utf-16"), "text", ["a.txt: not UTF-8", "convert"]),
    "unknown kind": ("a.log", b"one", "text", ["a.log: unknown kind", ".jsonl"]),
}


def refused(parts, *args, **kwargs) -> None:
    with pytest.raises(UserError) as error:
        data.read_texts(*args, **kwargs)
    line = str(error.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("case", FILES)
def test_file(tmp_path, case):
    name, content, column, parts = FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused([str(tmp_path), *parts], str(tmp_path / name), column)


@pytest.mark.parametrize(
    ("source", "settings", "parts"),
    [
        ("", {}, ["source is ''", "expected a file, a folder"]),
        ("python-stdlib", {"limit": -1}, ["limit=-1", "at least 1, or None"]),
        ("python-stdlib", {"newline": "\ud800"}, ["newline=", "ud800", ": expected characters"]),
        ("python-stdlib", {"join": "\ud800"}, ["join=", "ud800", ": expected characters"]),
        ("python-stdlib:validatoin", {}, ["python-stdlib:validatoin", "did you mean 'validation'"]),
        ("/" + "x" * 5000, {}, ["/" + "x" * 59]),
        ("~nobody-of-that-name/a.jsonl", {}, ["~nobody-of-that-name/a.jsonl"]),
        ("./" + "a/" * 3000 + "b.jsonl", {}, ["a/" * 30]),
        ("/dev/null", {}, ["/dev/null: is a pipe or device: expected a file"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_source(source, settings, parts):
    refused(parts, source, **settings)


def test_folder_or_pipe_instead_of_file(tmp_path):
    refused([str(tmp_path), "is a folder without train.jsonl", "found nothing"], str(tmp_path))
    os.mkfifo(tmp_path / "a.jsonl")  # to open it would wait for a writer
    refused(["a.jsonl: is a pipe or device: expected a file"], str(tmp_path / "a.jsonl"))


def absent(*args, **kwargs):
    raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nat all")


@pytest.mark.parametrize(
    ("source", "load_dataset", "parts"),
    [
        (
            "no/such",
            absent,
            ["no/such: no such file, and the hub dataset", "doesn't exist", "MIRROR"],
        ),
        ("a/b:c:d:e", absent, ["a/b:c:d:e", "expected name, name:config or name:config:split"]),
        ("a/b", lambda *_, **__: [{"story": "a"}], ["a/b: row 0: no column 'text'", "story"]),
        ("a/b", None, ["a/b: no such file", "pip install 'lte-jax[data]'"]),
    ],
    ids=["absent", "parts", "column", "no datasets"],
)
def test_hub_source(monkeypatch, source, load_dataset, parts):
    fake = load_dataset and types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    refused(parts, source)


def records(name):
    """Reads the records of a task."""
    task = tasks.find(name).adapted(DataConfig(length=96))
    return lambda path: task.records(
        path, "train", DataConfig(length=96), data.byte_tokenizer(), ModelConfig(vocab_size=259)
    )


def mmlu(path):
    """Reads the questions of MMLU."""
    model = types.SimpleNamespace(config=ModelConfig())
    tasks.mmlu.TASKS["mmlu"].measure(Run(model, {}, data.byte_tokenizer(), path))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize(
    "read",
    [data.read_texts, records("sst2"), records("e2e"), mmlu],
    ids=["texts", "classification", "generation", "mmlu"],
)
def test_no_file_stays_open_after_a_bad_row(tmp_path, read, kind):
    """The error, here still held, holds what raised it: the iterator must not be in there open."""
    path = tmp_path / f"a.{kind}"
    row = b'{"text": 1}\n' * 3
    path.write_bytes(gzip.compress(row) if kind.endswith("gz") else row)
    with pytest.raises(UserError) as error:
        read(str(path))
    assert "a.jsonl" in str(error.value) and not still_open(path)


def test_no_file_stays_open_after_a_limit(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}] * 3)
    with data.read_rows(path) as rows:
        assert next(rows) == (f"{path}:1", {"text": "one"}) and still_open(path)
    assert not still_open(path)
    assert data.read_texts(path, limit=1) == ["one"] and not still_open(path)


def still_open(path) -> list:
    # Not isinstance: it asks the lazy modules of others for their __class__, which warn.
    files = [held for held in gc.get_objects() if type(held) is io.BufferedReader]
    return [f for f in files if not f.closed and getattr(f, "name", None) == os.fspath(path)]


def test_a_mirror_comes_before_the_hub(tmp_path, monkeypatch):
    for name, words in {
        "glue/sst2/train": "a",
        "glue/sst2/validation": "b",
        "plain/train": "c",
    }.items():
        path = tmp_path / "owner" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": words}) + "\n")
    monkeypatch.setenv("LTE_JAX_MIRROR", str(tmp_path))
    assert data.read_texts("owner/glue:sst2") == ["a"]
    assert data.read_texts("owner/glue:sst2", split="validation") == ["b"]
    assert data.read_texts("owner/glue:sst2:validation") == ["b"]
    assert data.read_texts("owner/plain") == ["c"]
    with pytest.raises(UserError, match="sst2: is a folder without test.jsonl.*found train.jsonl"):
        data.read_texts("owner/glue:sst2:test")


def test_texts_are_counted_as_they_are_read(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "", "two", "three")))
    assert data.count_texts(str(path)) == len(data.read_texts(str(path))) == 3
    assert data.count_texts(str(path), join="") == 4  # lines, empty ones too
    assert data.count_texts(str(path), most=3) == 3 and data.count_texts(str(path), most=2) is None
