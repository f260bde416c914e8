"""Whatever is wrong with the data ends in one line that names it and says how to mend it."""

import gzip
import json
import sys
import types

import pytest

from lte_jax import data
from lte_jax.config import DataConfig, ModelConfig, UserError

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
        ["a.jsonl:2: not valid JSON", "mend"],
    ),
    "not an object": ("a.jsonl", GOOD + b"[1]\n", "text", ["a.jsonl:2: a JSON list", "expected"]),
    "misspelt column": (
        "a.jsonl",
        GOOD,
        "txt",
        ["a.jsonl:1: no column 'txt'", "columns: text", "did you mean 'text'"],
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
    "broken list": ("a.json", b'[{"text": "a"},', "text", ["a.json: not valid JSON"]),
    "bad row of a list": ("a.json", b'[{"text": "a"}, 5]', "text", ["a.json: row 2: a JSON int"]),
    "unknown kind": ("a.parquet", b"PAR1", "text", ["a.parquet: unknown kind", ".jsonl"]),
}


def told(error: pytest.ExceptionInfo, *parts: str) -> None:
    line = str(error.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("case", FILES)
def test_file(tmp_path, case):
    name, content, column, parts = FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        data.read_texts(str(tmp_path / name), column)
    told(error, str(tmp_path), *parts)


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(UserError) as error:
        data.read_texts(str(tmp_path))
    told(error, str(tmp_path), "cannot be read (Is a directory)")


def test_source_unnamed():
    with pytest.raises(UserError) as error:
        data.read_texts("")
    told(error, "source is ''", "expected a JSON-lines file")


def test_unknown_part_of_the_standard_library():
    with pytest.raises(UserError) as error:
        data.read_texts("python-stdlib:validatoin")
    told(error, "python-stdlib:validatoin", "did you mean 'validation'")


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as error:
        data.read_texts("roneneldan/TinyStories")
    told(error, "roneneldan/TinyStories: no such file", "pip install 'lte-jax[eval]'")


def test_hub_dataset_absent(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as error:
        data.read_texts("no/such")
    told(error, "no/such: the hub dataset cannot be loaded", "doesn't exist")


def test_hub_dataset_without_the_column(monkeypatch):
    fake = types.SimpleNamespace(load_dataset=lambda *args, **kwargs: [{"story": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError) as error:
        data.read_texts("some/set")
    told(error, "some/set: row 0: no column 'text'", "story")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"length": 512}, ["data.length=512", "256 positions", "256 or less"]),
        ({"batch_size": 99}, ["training rows of 32", "data.batch_size=99", "lower"]),
        ({"train": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
        ({"validation": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
        ({"validation": "TRAIN"}, ["is the training text", "hold out"]),
        ({"train": "ONE", "validation": ""}, ["one document", "name a validation source"]),
    ],
    ids=str,
)
def test_build(tmp_path, changes, parts):
    files = {"TRAIN": 50, "VALIDATION": 5, "ONE": 1}
    for name, count in files.items():
        lines = (json.dumps({"text": f"tale {i} of many"}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    named = {"train": "TRAIN", "validation": "VALIDATION", "length": 32} | changes
    config = DataConfig(
        **{k: str(tmp_path / f"{v}.jsonl") if v in files else v for k, v in named.items()}
    )
    with pytest.raises(UserError) as error:
        data.build(config, data.byte_tokenizer(), ModelConfig(vocab_size=259), seed=0)
    told(error, *parts)


def test_build_with_a_tokenizer_of_another_model():
    config = DataConfig(train="python-stdlib", length=32)
    with pytest.raises(UserError) as error:
        data.build(config, data.byte_tokenizer(), ModelConfig(vocab_size=256), seed=0)
    told(error, "tokenizer has 259 tokens", "vocabulary 256", "vocab_size")


def test_batch_that_processes_cannot_share():
    rows = data.pad_rows([], 4)
    with pytest.raises(UserError) as error:
        data.train_iterator(rows, batch_size=6, seed=0, shard_index=0, shard_count=4)
    told(error, "data.batch_size=6", "4 processes")
