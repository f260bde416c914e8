"""What a source of texts may name: files, folders, globs, the hub, mixes; what is held out."""

import gzip
import json
import sys
import types

import huggingface_hub
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import config, data, pipeline
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.data.formats import CUT, cut
from lte_jax.errors import UserError

BYTES, MODEL = data.byte_tokenizer(), ModelConfig(vocab_size=259)
CONFIG = ModelConfig(d_model=32, d_ff=64, num_heads=2, num_kv_heads=2)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test is in a folder of its own, and names files as a user does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LTE_JAX_MIRROR", raising=False)
    return tmp_path


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path, name, content) -> None:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)


def refused(*parts, call=data.read_texts, source=None, **settings) -> None:
    with pytest.raises(UserError) as error:
        call(source, **settings) if source is not None else call()
    line = str(error.value)
    assert "\n" not in line and len(line) < 500
    for part in parts:
        assert part in line, line


# ---------------------------------------------------------------------------------- kinds of files

TABLE = b'id,text\r\n1,"one, ""two"""\r\n\r\n2,"three\nfour"\r\n'


def test_tables(here):
    write(here, "a.csv", b"\xef\xbb\xbf" + TABLE)
    write(here, "a.csv.gz", gzip.compress(TABLE))
    write(here, "a.tsv", TABLE.replace(b",", b"\t").replace(b'one\t "', b'one, "'))
    for name in "a.csv", "a.csv.gz", "a.tsv":
        assert data.read_texts(name) == ['one, "two"', "three\nfour"], name
        assert data.read_texts(name, "id") == ["1", "2"]
    write(here, "long.csv", b"text\n" + b"x" * 200_000 + b"\n")  # csv's own limit is lower
    assert len(data.read_texts("long.csv")[0]) == 200_000


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"id,story\n1,a\n", ["a.csv:2: no column 'text'", "columns: id, story"]),
        (b"text,id\na, b,1\n", ["a.csv:2: 3 fields, expected the 2", "double quotes"]),
        (b'text\n"a\n', ["a.csv:2: cannot be read as a table", "double quotes"]),
        (b"text\ncaf\xe9\n", ["a.csv: not UTF-8"]),
        (b"text\n", ["a.csv: no rows with text"]),
    ],
    ids=["column", "fields", "quotes", "encoding", "no rows"],
)
def test_bad_tables(here, content, parts):
    write(here, "a.csv", content)
    refused(*parts, source="a.csv")


def test_parquet(here):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (the extra `data`)")
    from pyarrow import parquet

    texts = [f"text {i}" for i in range(3000)]
    (here / "all/data").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": texts, "id": range(3000)}), "a.parquet")
    for i in range(2):
        name = f"all/data/train-0000{i}-of-00002.parquet"
        parquet.write_table(pyarrow.table({"text": texts[i::2]}), name)
    assert data.read_texts("a.parquet") == texts == data.read_texts("*.parquet")
    assert data.read_texts("a.parquet", limit=2) == texts[:2]
    assert data.read_texts("all") == texts[::2] + texts[1::2]
    refused(
        "a.parquet: row 1: no column 'story' (columns: text, id)",
        source="a.parquet",
        column="story",
    )
    refused("'id' holds int", source="a.parquet", column="id")
    write(here, "b.parquet", b"PAR1 and no more")
    refused("b.parquet: cannot be read as Parquet", source="b.parquet")


def test_parquet_without_its_package(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(here, "a.parquet", b"PAR1")
    refused("a.parquet: reading Parquet needs", "pip install 'lte-jax[data]'", source="a.parquet")


def test_plain_text_is_cut_at_blank_lines(here):
    block = "word " * 300  # 1,500 characters
    text = "\n\n".join(f"{i}\n{block}" for i in range(40)) + "\n"
    write(here, "a.txt", text.encode())
    write(here, "b.md.gz", gzip.compress(text.replace("\n", "\r\n").encode()))
    for name in "a.txt", "b.md.gz":
        documents = data.read_texts(name)
        assert "".join(documents) == text
        assert all(d.endswith("\n\n") for d in documents[:-1])  # whole blocks
        assert all(CUT <= len(d) < CUT + 2000 for d in documents[:-1])
        assert data.count_texts(name) == len(documents) == 6
        assert data.read_texts(name, limit=2) == documents[:2]
        assert data.read_texts(name, join="|") == [text]  # as it stands
        assert data.count_texts(name, join="|") == 1


def test_plain_text_without_blank_lines():
    by_line = list(cut("line of a log\n" * 3000))
    assert "".join(by_line) == "line of a log\n" * 3000 and len(by_line) > 3
    assert all(piece.endswith("log\n") for piece in by_line)
    assert [len(piece) for piece in cut("x" * (4 * CUT + 5))] == [CUT, CUT, CUT, CUT + 5]
    assert list(cut("a\n\nb")) == ["a\n\nb"]  # short


# ------------------------------------------------------------------------------- folders and globs


def test_folders_and_globs(here):
    for name in "b.jsonl", "a.jsonl", "in/c.jsonl", ".hidden/d.jsonl", ".e.jsonl":
        write(here, f"texts/{name}", lines([name]))
    write(here, "texts/picture.png", b"not text")
    write(here, "texts/f.jsonl.gz", gzip.compress(lines(["f"])))
    assert data.read_texts("texts") == ["a.jsonl", "b.jsonl", "f", "in/c.jsonl"]
    assert data.read_texts("texts/") == data.read_texts(str(here / "texts"))
    assert data.read_texts("texts/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert data.read_texts("texts/**/*.jsonl") == ["a.jsonl", "b.jsonl", "in/c.jsonl"]
    assert data.read_texts("texts/[ab].jsonl", limit=1) == ["a.jsonl"]
    write(here, "odd [1]*.jsonl", lines(["its own name"]))
    assert data.read_texts("odd [1]*.jsonl") == ["its own name"]


def test_a_folder_with_a_file_for_each_split(here):
    for split in "train", "validation":
        write(here, f"of/{split}.jsonl", lines([split]))
        write(here, f"hub/data/{split}-00000-of-00001.jsonl", lines([split]))
    write(here, "of/notes.jsonl", lines(["no split"]))
    write(here, "hub/README.md", b"no text")
    for folder in "of", "hub":
        assert data.read_texts(folder) == data.read_texts(folder, split="train") == ["train"]
        assert data.read_texts(folder, split="validation") == ["validation"]
        refused("is a folder without test.jsonl", "found", source=folder, split="test")
        assert data.overlap(folder, folder) is None


def test_bad_folders_and_globs(here):
    (here / "empty").mkdir()
    refused("empty: is a folder without train.jsonl", "found nothing", source="empty")
    write(here, "other/a.log", b"one")
    refused("other: is a folder", "found a.log", source="other")
    write(here, "two/a.jsonl", lines(["a"]))
    write(here, "two/b.txt", b"b")
    refused("two: holds files of 2 kinds (.jsonl, .txt)", "two/**/*.jsonl", source="two")
    refused("two/*: holds files of 2 kinds", source="two/*")
    refused("two/*.csv: no file matches", "looked from", source="two/*.csv")
    refused("0.7*a.jsonl: no file matches", "spaces around", source="0.7*a.jsonl + 0.3*b.jsonl")
    write(here, "two/c.jsonl", b'{"story": "c"}\n')
    refused("two/c.jsonl:1: no column 'text'", "columns: story", source="two/*.jsonl")


# ------------------------------------------------------------------------------------------- mixes


def test_a_sum_of_sources_is_all_of_them(here):
    write(here, "a.jsonl", lines("abc"))
    write(here, "b/x.txt", b"plain")
    assert data.read_texts("a.jsonl + b") == ["a", "b", "c", "plain"]
    assert data.read_texts("b + a.jsonl", limit=2) == ["plain", "a", "b"]  # of each
    assert data.read_texts("a.jsonl + b", join="|") == ["a|b|c", "plain"]
    assert data.count_texts("a.jsonl + b") == 4
    write(here, "c + d.txt", b"its own name")
    assert data.read_texts("c + d.txt") == ["its own name"]


@pytest.mark.parametrize("factor", [1, 0.001, 12])
def test_weights_are_shares_of_the_characters(here, factor):
    """Texts of a are of 10 characters, those of b of 30: the shares are not of texts."""
    write(here, "a.jsonl", lines(f"a{i:09d}" for i in range(1000)))
    write(here, "b.jsonl", lines(f"b{i:029d}" for i in range(1000)))
    source = f"{0.25 * factor} * a.jsonl + {0.75 * factor} * b.jsonl"
    a, b = data.read_each(source)
    assert len(a) == len(b) == 1000
    a, b = data.read_each(f"{9 * factor} * a.jsonl + {factor} * b.jsonl")
    assert len(a) == 1000  # ended
    assert sum(map(len, b)) == pytest.approx(1000 * 10 / 9, abs=30)
    assert b == [f"b{i:029d}" for i in range(len(b))]  # the first ones
    assert data.read_each(source, limit=40)[1] == [f"b{i:029d}" for i in range(40)]


def hub(monkeypatch, number):
    """A data set of the hub of so many rows; what of it was asked for and read."""
    asked, read = [], []

    def load_dataset(name, config, split, streaming=False):
        asked.append((name, split, streaming))
        return ({"text": read.append(i) or f"row {i}"} for i in range(number))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked, read


def test_the_hub_is_read_only_as_far_as_needed(here, monkeypatch):
    asked, read = hub(monkeypatch, 10**9)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert len(data.read_texts("owner/name", limit=5)) == 5
    assert asked == [("owner/name", "train", True)] and len(read) <= 6
    read.clear()
    write(here, "a.jsonl", lines(["x" * 100]))
    groups = data.read_each("1 * a.jsonl + 1 * owner/name")  # a.jsonl ends first
    assert asked[-1] == ("owner/name", "train", False)
    assert len(groups[0]) == 1 and 15 < len(groups[1]) == len(read) < 25
    assert data.count_texts("owner/name") is None and len(read) < 25
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    data.read_texts("owner/name", limit=5)
    assert asked[-1] == ("owner/name", "train", False)  # what the cache has


def test_the_library_of_the_hub_itself_streams(here, monkeypatch):
    pytest.importorskip("datasets", reason="needs datasets (the extra `data`)")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for part in "train", "validation":
        write(here, f"set/{part}.jsonl", lines([f"{part} {i}" for i in range(9)]))
    rows = data.sources._hub_rows(str(here / "set"), "validation", streaming=True)
    assert next(rows) == (f"{here}/set: row 0", {"text": "validation 0"})
    with pytest.raises(UserError, match="cannot be loaded"):
        next(data.sources._hub_rows(str(here / "set"), "nowhere", streaming=True))


def test_a_stream_that_breaks_off_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        yield {"text": "one"}
        raise RuntimeError("connection\nreset")  # httpx's errors are no OSError either

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    refused("owner/name", "(connection)", "go online", "LTE_JAX_MIRROR", source="owner/name")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("0 * a.jsonl + 1 * a.jsonl", ["'0' is no weight", "expected positive numbers"]),
        ("-1 * a.jsonl", ["'-1' is no weight"]),
        ("nan * a.jsonl", ["'nan' is no weight"]),
        ("inf * a.jsonl", ["'inf' is no weight"]),
        ("half * a.jsonl", ["'half' is no weight", "0.7 * a.jsonl"]),
        ("0.5 * ", ["no weight of a source"]),
        ("a.jsonl + ", ["no weight of a source"]),
        ("0.5 * a.jsonl + a.jsonl", ["a weight for each source, or for none"]),
        ("a.jsonl + absent.jsonl", ["absent.jsonl: no such file"]),
        ("a.jsonl + empty.jsonl", ["empty.jsonl: the file is empty"]),
        ("1 * a.jsonl + 1 * blank.jsonl", ["blank.jsonl: no rows with text"]),
    ],
)
def test_bad_mixes(here, source, parts):
    write(here, "a.jsonl", lines(["a"]))
    write(here, "empty.jsonl", b"")
    write(here, "blank.jsonl", lines([""]))
    refused(*parts, source=source)


def test_weights_are_of_documents(here):
    write(here, "a.jsonl", lines(["a"]))
    refused("leave out the weights", source="1 * a.jsonl", join="")
    with data.read_rows("1 * a.jsonl") as rows:
        refused("only texts are mixed by weights", call=lambda: next(rows))


def test_a_mix_is_a_value_of_a_flag_and_of_a_config_file(here):
    mix = "0.7 * texts/*.jsonl + 0.3 * owner/name:config"
    (here / "c.py").write_text(
        "from lte_jax import config\n"
        "def get_config():\n"
        "    c = config.to_config_dict(config.Experiment())\n"
        f"    c.data.train = {mix!r}\n"
        "    return c\n"
    )
    assert config.load_config("c.py", [f"data.validation={mix}"]).data == DataConfig(
        train=mix, validation=mix
    )


# ---------------------------------------------------------------------------------- held-out parts


def build(train, end=None, **settings):
    settings = {"length": 64, "batch_size": 1, "max_validation_records": 10} | settings
    return data.build(DataConfig(train=train, **settings), BYTES, MODEL, 0, end)


def bytes_of(records) -> np.ndarray:
    return np.sort(records.tokens_RL[(records.segments_RL > 0) & (records.tokens_RL < 256)])


def test_each_source_gives_its_part_of_what_is_held_out(here, caplog):
    write(here, "a.jsonl", lines(["a" * 63] * 300))
    write(here, "b.jsonl", lines(["b" * 63] * 100))
    with caplog.at_level("INFO", "lte_jax"):
        train, held = build("a.jsonl + b.jsonl", max_validation_records=20)
    assert "a.jsonl: 300 texts, 19200 tokens, 75.0%" in caplog.text
    kinds = held.tokens_RL[:, 1].tolist()
    assert sorted(kinds) == [ord("a")] * 15 + [ord("b")] * 5
    assert len(train) == 380
    for changed in ("a.jsonl", "b.jsonl"):  # digests tell a resumed run that a file has changed
        write(here, changed, lines(["c" + "a" * 62] + ["a" * 63] * 99))
        assert build("a.jsonl + b.jsonl")[0].digest() != train.digest()


@pytest.mark.parametrize("sizes", [[8000], [7000, 6000], [9000] + [20] * 4, [5000] * 9], ids=str)
def test_of_few_long_documents_blocks_are_held_out(here, sizes):
    texts = [
        "".join(chr(97 + (i * k + k) % 25) for i in range(size)) for k, size in enumerate(sizes, 1)
    ]
    write(here, "a.jsonl", lines(texts))
    train, held = build("a.jsonl", end=257)
    tokens = sum(sizes) + len(sizes)
    assert (held.segments_RL > 0).sum() <= tokens / 10
    whole = np.sort(np.frombuffer("".join(texts).encode(), np.uint8)).astype(np.int32)
    both = np.sort(np.concatenate([bytes_of(train), bytes_of(held)]))
    np.testing.assert_array_equal(both, whole)  # each character once
    ends = sum((len(text) + 1) % 64 > 0 for text in texts)
    assert (train.tokens_RL == 257).sum() in (ends, ends - 1)  # one may be held out
    assert not (held.tokens_RL == 257).any() and len(held)


def test_a_large_document_is_never_the_part_held_out(here):
    write(here, "a.jsonl", lines(["x" * 1000] + [f"{i:02d}" * 30 for i in range(20)]))
    for seed in range(5):
        settings = DataConfig(train="a.jsonl", length=64, batch_size=1)
        train, held = data.build(settings, BYTES, MODEL, seed)
        assert not (held.tokens_RL == ord("x")).any() and 1 <= len(held) < len(train) / 8


def test_of_few_short_documents_the_shortest_is_held_out(here):
    write(here, "a.jsonl", lines(["a" * 40, "b" * 20, "c" * 50]))
    train, held = build("a.jsonl")
    assert bytes_of(held).tolist() == [ord("b")] * 20 and len(train) == 2
    write(here, "a.jsonl", lines(["a" * 40]))
    refused("a.jsonl is one document of 41 tokens", "too short", call=lambda: build("a.jsonl"))


@pytest.mark.parametrize(
    ("train", "validation", "same"),
    [
        ("texts", "texts/b.jsonl", "texts/b.jsonl"),
        ("texts/*.jsonl", "texts", "texts/a.jsonl"),
        ("0.5 * c.jsonl + 0.5 * texts/a.jsonl", "./texts/a.jsonl", "texts/a.jsonl"),
        ("owner/name::test", "owner/name::test", "owner/name::test"),
        ("python-stdlib:train", "python-stdlib:train", "python-stdlib:train"),
        ("owner/name", "owner/name", None),
        ("owner/name:config", "owner/name:config:test", None),
        ("python-stdlib", "python-stdlib", None),
        ("texts/a.jsonl", "texts/b.jsonl", None),
    ],
)
def test_validation_is_other_text(here, train, validation, same):
    for name in "texts/a.jsonl", "texts/b.jsonl", "c.jsonl":
        write(here, name, lines(["a"]))
    settings = DataConfig(train=train, validation=validation)
    if same is None:
        data.check(settings, BYTES, MODEL)
    else:
        check = lambda: data.check(settings, BYTES, MODEL)  # noqa: E731
        refused(f"{same} is the training text", "hold out", call=check)


# ------------------------------------------------------------------------------ own texts and model


def test_the_config_for_own_checkpoints_is_neutral(here):
    for words in "", ":large", ":paper", ":large,paper":
        made = config.load_config(f"finetune{words}")
        assert made.source.path == made.data.train == made.data.validation == ""
        assert made.data.newline == "\n" and made.data.max_documents is None
        assert made.stages.finetune.steps == 0  # so that a missing model is an error
    own = ["data.train=texts.txt"]
    no_model = lambda: lte_jax.train(config.load_config("finetune", own), "run")  # noqa: E731
    refused("source.path is empty", "name a model (--config.source.path=MODEL)", call=no_model)
    assert not (here / "run").exists()


@pytest.mark.slow
def test_an_own_checkpoint_on_own_texts(here):
    """A folder of plain texts and a table, mixed; a text that has changed is refused."""
    lte_jax.save("mine", *tiny.model_and_params(None, CONFIG))
    BYTES.save_pretrained("mine")
    for i in range(3):
        text = "".join(f"A paragraph, number {j}.\nOf two lines.\n\n" for j in range(1000))
        write(here, f"texts/{i}.txt", text.encode())
    write(here, "rows.csv", b"text\n" + b"a row of a table\n" * 900)
    mix = "data.train=0.75 * texts + 0.25 * rows.csv"
    made = config.load_config("finetune:smoke", [mix, "source.path=mine", "lte.expert_size=8"])
    lte_jax.train(made, "run")
    results = json.loads((here / "run/results.json").read_text())
    assert results and (here / "run/lte/config.json").exists()
    inputs = json.loads((here / "run/inputs.json").read_text())
    assert min(inputs[f"rows/{part}"][0] for part in ("train", "validation")) > 0
    write(here, "rows.csv", b"text\n" + b"another row of it\n" * 900)
    again = lambda: pipeline.report_again("run")  # noqa: E731
    refused("run holds a run on other data", "rows/train", call=again)
