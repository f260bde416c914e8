"""Every token of every document once, every row once an epoch, and resumed as if never stopped."""

import hashlib
import itertools
import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from lte_jax import data
from lte_jax.config import DataConfig, ModelConfig
from lte_jax.errors import UserError


def write_rows(path: Path, records) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return str(path)


def random_documents(seed: int, count: int, longest: int) -> list[np.ndarray]:
    """Documents of distinct tokens, so that each token tells where it is from."""
    ends = np.cumsum(np.random.default_rng(seed).integers(1, longest + 1, count))
    return np.split(np.arange(1, ends[-1] + 1, dtype=np.int32), ends[:-1])


def test_paths_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x" * 60}] * 20)
    for spelt in "~/a.jsonl", path + "/", "~//a.jsonl":
        assert data.read_texts(spelt) == ["x" * 60] * 20
    config = DataConfig(train="~/a.jsonl", validation=path, length=32, batch_size=1)
    with pytest.raises(UserError, match="is the training text"):
        data.build(config, data.byte_tokenizer(), MODEL, seed=0)


# ------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize("length", [2, 7, 16, 64])
def test_packing_has_every_token_once_with_right_segments(length):
    documents = random_documents(seed=length, count=200, longest=40)
    records = data.pack(documents, length)
    assert records.tokens_RL.shape[1] == length and records.tokens_RL.dtype == np.int32
    real = records.segments_RL > 0
    tokens = np.sort(records.tokens_RL[real])
    np.testing.assert_array_equal(tokens, np.arange(1, len(np.concatenate(documents)) + 1))
    assert not records.tokens_RL[~real].any()

    pieces = {tuple(d[i : i + length]) for d in documents for i in range(0, len(d), length)}
    for row in (records[i] for i in range(len(records))):
        segments = row["segments"]
        count = segments.max()
        # 1, 2, ... in runs, then padding.
        runs = [key for key, _ in itertools.groupby(segments)]
        assert runs == [*range(1, count + 1)] + [0] * int(segments[-1] == 0)
        for segment in range(1, count + 1):
            pieces.remove(tuple(row["tokens"][segments == segment]))
    assert not pieces


def test_packing_is_tight_and_keeps_short_documents_whole():
    documents = random_documents(seed=0, count=2000, longest=60)
    records = data.pack(documents, 128)
    assert (records.segments_RL > 0).mean() > 0.98
    first = {d[0]: len(d) for d in documents}
    for tokens, segments in zip(records.tokens_RL, records.segments_RL, strict=True):
        for segment in range(1, segments.max() + 1):
            own = tokens[segments == segment]
            assert first[own[0]] == len(own)


def test_padding_lays_one_document_a_row():
    records = data.pad([np.array([5, 6], np.int32), np.array([7, 8, 9, 10], np.int32)], 3)
    assert records.tokens_RL.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert records.segments_RL.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_digest_tells_rows_apart():
    tokens_RL, segments_RL = np.arange(12, dtype=np.int32).reshape(3, 4), np.ones((3, 4), np.int32)
    digest = data.Records(tokens_RL, segments_RL).digest()
    bytes_of = b"(3, 4)" + struct.pack("<24i", *range(12), *[1] * 12)
    assert digest == hashlib.sha256(bytes_of).hexdigest()
    other_RL = tokens_RL.copy()
    other_RL[2, 3] += 1
    others = [
        data.Records(other_RL, segments_RL),
        data.Records(tokens_RL, segments_RL * 2),
        data.Records(tokens_RL.reshape(4, 3), segments_RL.reshape(4, 3)),
        data.Records(tokens_RL[:2], segments_RL[:2]),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 5
    views = data.Records(np.asfortranarray(tokens_RL), segments_RL[::-1][::-1])
    assert views.digest() == digest


# ---------------------------------------------------------------------------------------- batches


def numbered_rows(count: int) -> data.Records:
    tokens_RL = np.repeat(np.arange(count, dtype=np.int32)[:, None], 3, axis=1)
    return data.Records(tokens_RL, np.ones_like(tokens_RL))


def row_numbers(batches) -> np.ndarray:
    return np.concatenate([batch["tokens"][:, 0] for batch in batches])


def test_each_epoch_has_every_row_once_in_a_new_order():
    stream = data.train_iterator(numbered_rows(10), batch_size=4, seed=0)
    first = next(stream)
    assert first["tokens"].shape == first["segments"].shape == (4, 3)
    assert first["tokens"].dtype == first["segments"].dtype == np.int32
    epochs = row_numbers([first, *itertools.islice(stream, 9)]).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_function_of_the_seed():
    records = numbered_rows(10)
    one, same, other = (
        row_numbers(itertools.islice(data.train_iterator(records, 5, seed), 4)).tolist()
        for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 7, 20])  # an epoch is 2.5 batches
def test_resume_of_data_continues_exactly(taken):
    records = numbered_rows(10)
    stream = data.train_iterator(records, batch_size=4, seed=0)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = row_numbers(itertools.islice(stream, 12))
    fresh = data.train_iterator(records, batch_size=4, seed=0)
    next(fresh)
    for resumed in fresh, stream:
        resumed.set_state(state)
        np.testing.assert_array_equal(row_numbers(itertools.islice(resumed, 12)), expected)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_are_disjoint_and_make_up_the_same_batches(shards):
    records = numbered_rows(10)
    whole = data.train_iterator(records, batch_size=4, seed=0)
    rows = np.split(np.arange(4), shards)
    parts = [data.train_iterator(records, 4, 0, of_shard) for of_shard in rows]
    for _ in range(6):
        np.testing.assert_array_equal(
            row_numbers([next(part) for part in parts]), row_numbers([next(whole)])
        )
    assert all(part.get_state() == whole.get_state() for part in parts)


@pytest.mark.parametrize("shards", [1, 2])
def test_eval_batches_have_every_row_once_and_padding_without_loss(shards):
    records = numbered_rows(10)
    rows = np.split(np.arange(4), shards)
    batches = zip(*[data.eval_batches(records, 4, of_shard) for of_shard in rows], strict=True)
    whole = [{k: np.concatenate([b[k] for b in parts]) for k in parts[0]} for parts in batches]
    assert [batch["tokens"].shape for batch in whole] == [(4, 3)] * 3
    segments = np.concatenate([batch["segments"] for batch in whole])
    assert segments[:10].all() and not segments[10:].any()
    np.testing.assert_array_equal(row_numbers(whole)[:10], np.arange(10))


# ------------------------------------------------------------------------------------------ build


MODEL = ModelConfig(vocab_size=259)


def test_build_from_files(tmp_path):
    texts = [f"document {i} " + "x" * i for i in range(100)]
    train = write_rows(tmp_path / "train.jsonl", [{"story": t} for t in texts])
    validation = write_rows(tmp_path / "validation.jsonl", [{"story": t} for t in texts[:50]])
    config = DataConfig(
        train=train, validation=validation, column="story", length=32, max_validation_records=7
    )
    tokenizer = data.byte_tokenizer()
    records, kept = data.build(config, tokenizer, MODEL, seed=0)
    everything = data.pack(data.tokenize(texts[:50], tokenizer), 32)
    assert len(kept) == 7 and kept.whole == len(everything) > 7
    assert (records.segments_RL > 0).sum() == sum(len(t) + 1 for t in texts)
    again = data.build(config, tokenizer, MODEL, seed=0)[1]
    other = data.build(config, tokenizer, MODEL, seed=1)[1]
    np.testing.assert_array_equal(kept.tokens_RL, again.tokens_RL)
    assert not np.array_equal(kept.tokens_RL, other.tokens_RL)


def test_build_holds_out_whole_documents_where_no_validation_is_named(tmp_path):
    texts = [f"{i:03d}" + "x" * 60 for i in range(100)]
    path = write_rows(tmp_path / "train.jsonl", [{"text": t} for t in texts])
    config = DataConfig(train=path, length=64, pack=False, max_validation_records=5)
    parts = data.build(config, data.byte_tokenizer(), MODEL, seed=0)
    names = [{bytes(row[1:4].tolist()).decode() for row in records.tokens_RL} for records in parts]
    assert len(names[0]) == 95 and len(names[1]) == 5
    assert not names[0] & names[1]


def test_build_from_the_standard_library(monkeypatch):
    texts = {
        part: data.read_texts("python-stdlib", split=part)[:30] for part in data.sources.SPLITS
    }
    monkeypatch.setattr(data.building, "read_each", lambda *args: [texts[args[4]]])
    config = DataConfig(train="python-stdlib", validation="python-stdlib", max_validation_records=8)
    records, kept = data.build(config, data.byte_tokenizer(), MODEL, seed=0)
    assert len(records) > 100 and len(kept) == 8
    assert (records.segments_RL > 0).sum() == sum(len(t.encode()) + 1 for t in texts["train"])


def test_build_from_real_stories(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    source = str(shared / "data/tinystories/validation.jsonl")
    config = DataConfig(train=source, max_validation_records=4, newline=" ")
    records, kept = data.build(config, tokenizer, ModelConfig(vocab_size=512), seed=0)
    text = tokenizer.decode(
        records.tokens_RL[0][records.segments_RL[0] == 1], skip_special_tokens=True
    )
    assert any(text.strip() in story for story in data.read_texts(source, newline=" "))
    assert len(kept) == 4


# ------------------------------------------------------------------------------- the end of a text


def segments_of(records: data.Records) -> list[list[int]]:
    """The token ids of each segment of each row, in order."""
    return [
        tokens[segments == segment].tolist()
        for tokens, segments in zip(records.tokens_RL, records.segments_RL, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


def build_lines(tmp_path, texts, end, **config):
    path = write_rows(tmp_path / "lines.jsonl", [{"text": text} for text in texts])
    config = {"train": path, "length": 8, "batch_size": 1} | config
    return data.build(DataConfig(**config), data.byte_tokenizer(), MODEL, 0, end)


def test_the_end_stands_after_the_last_piece(tmp_path):
    # With <s>: 4 tokens, 12 of which 8 fill a row, 8 that fill one, and 15: the end fills the last.
    texts = ["abc", "d" * 11, "e" * 7, "f" * 14]
    other = write_rows(tmp_path / "validation.jsonl", [{"text": text} for text in texts])
    records, kept = build_lines(tmp_path, texts, 257, validation=other)
    assert sorted(segments_of(records)) == sorted(
        [
            [256, *b"abc", 257],
            [256, *b"d" * 7],
            [*b"d" * 4, 257],
            [256, *b"e" * 7],
            [256, *b"f" * 7],
            [*b"f" * 7, 257],
        ]
    )
    assert 257 not in kept.tokens_RL  # perplexity is that of the text
    none, _ = build_lines(tmp_path, texts, None, validation=other)
    assert 257 not in none.tokens_RL and (none.segments_RL > 0).sum() == 4 + 12 + 8 + 15


def test_a_padded_row_that_cuts_its_document_has_no_end(tmp_path):
    texts = ["abc", "d" * 11, "e" * 7, "f" * 6]
    other = write_rows(tmp_path / "validation.jsonl", [{"text": text} for text in texts])
    records, kept = build_lines(tmp_path, texts, 257, validation=other, pack=False)
    assert segments_of(records) == [
        [256, *b"abc", 257],
        [256, *b"d" * 7],
        [256, *b"e" * 7],
        [256, *b"f" * 6, 257],
    ]
    assert 257 not in kept.tokens_RL


def test_documents_held_out_have_no_end(tmp_path):
    texts = [f"{i:02d}" for i in range(30)]
    records, kept = build_lines(tmp_path, texts, 257, max_validation_records=2, pack=False)
    assert all(ids[-1] == 257 for ids in segments_of(records))
    assert 257 not in kept.tokens_RL
    texts_of = [{bytes(ids[1:3]) for ids in segments_of(part)} for part in (records, kept)]
    assert len(texts_of[0]) == 27 and len(texts_of[1]) == 2 and not texts_of[0] & texts_of[1]


# ------------------------------------------------------------------------------- one running text


@pytest.mark.parametrize("kind", ["txt", "joined"])
def test_one_text_is_held_out_by_blocks_of_a_row(tmp_path, kind):
    text = "".join(f"{i:04d}" for i in range(210))  # with <s> 841 tokens: 105 records and a token
    if kind == "txt":
        (tmp_path / "a.txt").write_text(text)
        config = {"train": str(tmp_path / "a.txt")}
    else:
        config = {"join": ""}
    lines = [text[i : i + 21] for i in range(0, len(text), 21)]
    records, kept = build_lines(tmp_path, lines, 257, **config)
    blocks = [[256, *text.encode(), 257][i : i + 8] for i in range(0, 842, 8)]
    assert len(kept) == 10 and (kept.segments_RL == 1).all()
    held = kept.tokens_RL.tolist()
    assert [block for block in blocks if block in held] == held  # in the text's order
    assert records.tokens_RL[:-1].tolist() == [block for block in blocks[:-1] if block not in held]
    assert segments_of(records)[-1] == blocks[-1] == [*b"9", 257]
    assert build_lines(tmp_path, lines, 257, **config)[1].tokens_RL.tolist() == held


def test_joined_validation_is_one_text_too(tmp_path):
    other = write_rows(tmp_path / "validation.jsonl", [{"text": "ab\n"}, {"text": "cdefghijk\n"}])
    records, kept = build_lines(tmp_path, ["xyz\n", "uvw\n"], 257, validation=other, join="")
    assert segments_of(kept) == [[256, *b"ab\ncdef"], [*b"ghijk\n"]]
    assert segments_of(records) == [[256, *b"xyz\nuvw"], [*b"\n", 257]]


# ------------------------------------------------------------------------------------- vocabulary


def test_a_tokenizer_larger_than_the_vocabulary_may_have_tokens_to_spare(tmp_path, caplog):
    """As Llama 2 had, whose tokenizers came with a <pad> that the model does not know."""
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}] * 20)
    config = DataConfig(train=path, length=8, batch_size=1)
    model = ModelConfig(vocab_size=258)
    with caplog.at_level(logging.INFO):
        records, _ = data.build(config, data.byte_tokenizer(), model, 0, 257)
    assert records.tokens_RL.max() == 257
    assert caplog.text.count("the tokenizer has 259 tokens, the model's vocabulary 258") == 1


# ---------------------------------------------------------------------------------- what is refused


def told(error: pytest.ExceptionInfo, *parts: str) -> None:
    line = str(error.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


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
            ["one document of 15 tokens", "too short", "add text, lower data.length, or name a"],
        ),
    ],
    ids=str,
)
def test_build_refuses(tmp_path, changes, parts):
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
