"""Whatever is wrong with the data ends in one line that names it and says how to mend it."""

import gzip
import json
import os
import sys
import types

import pytest
from tokenizers import processors

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
        ["a.jsonl:2: cannot be read as JSON", "mend"],
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
    told(error, str(tmp_path), "is a folder: expected a file (.jsonl, .json, .txt)")


def test_pipe_or_device_instead_of_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")  # to open it would wait for a writer
    for path in str(tmp_path / "a.jsonl"), "/dev/null":
        with pytest.raises(UserError) as error:
            data.read_texts(path)
        told(error, path, "is a pipe or device: expected a file")


def test_paths_that_no_file_can_have():
    for path in "/" + "x" * 5000, "~nobody-of-that-name/a.jsonl", "./" + "a/" * 3000 + "b.jsonl":
        with pytest.raises(UserError) as error:
            data.read_texts(path)
        told(error, path.removeprefix("./")[:60])


def test_limit():
    with pytest.raises(UserError) as error:
        data.read_texts("python-stdlib", limit=-1)
    told(error, "limit=-1", "at least 1, or None")


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
    told(error, "roneneldan/TinyStories: no such file", "pip install 'lte-jax[data]'")


def test_hub_dataset_absent(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as error:
        data.read_texts("no/such")
    told(error, "no/such: the hub dataset cannot be loaded", "doesn't exist")


def test_hub_source_of_too_many_parts(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())
    with pytest.raises(UserError) as error:
        data.read_texts("some/set:config:train:text")
    told(error, "some/set:config:train:text", "expected name, name:config or name:config:split")


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
        ({"batch_size": 99}, ["training records of 32", "data.batch_size=99", "lower"]),
        ({"train": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
        ({"validation": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
        ({"validation": "TRAIN"}, ["is the training text", "hold out"]),
        (
            {"train": "ONE", "validation": ""},
            ["one document of 15 tokens", "too short", "name a validation source"],
        ),
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
    config = DataConfig(train="python-stdlib", length=32, max_documents=9)
    with pytest.raises(UserError) as error:
        data.build(config, data.byte_tokenizer(), ModelConfig(vocab_size=256), seed=0)
    told(error, "python-stdlib: text 1 has token id 256", "vocabulary of 256", "vocab_size")


def test_one_text_of_many_with_a_token_outside_the_vocabulary(tmp_path):
    texts = ["abc"] * 7 + ["é"] + ["é~"] * 5  # bytes 195 and 169
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = data.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    config = DataConfig(train=str(tmp_path / "a.jsonl"), length=4, batch_size=1)
    with pytest.raises(UserError) as error:
        data.build(config, tokenizer, ModelConfig(vocab_size=195), seed=0)
    told(error, "a.jsonl: text 8 has token id 195", "vocabulary of 195", "259 tokens")


def test_padding_would_keep_one_row_of_a_joined_text():
    with pytest.raises(UserError) as error:
        DataConfig(join="", pack=False)
    told(error, "pack=False", "expected True", "join")


def test_batch_that_processes_cannot_share():
    rows = data.pad([], 4)
    with pytest.raises(UserError) as error:
        data.train_iterator(rows, batch_size=6, seed=0, shard_index=0, shard_count=4)
    told(error, "data.batch_size=6", "4 processes")


@pytest.mark.parametrize("key", ["newline", "join"])
def test_what_stands_between_texts_is_text(key):
    with pytest.raises(UserError, match=f"{key}=.*ud800.*: expected characters"):
        data.read_texts("python-stdlib", limit=1, **{key: "\ud800"})
