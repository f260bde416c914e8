"""Safetensors files and shards: truncated, lying, absent, pipes and devices."""

import contextlib
import json
import os
import shutil
import signal
import struct

import numpy as np
import pytest
import safetensors.numpy
from hf_folders import EMBED, assert_complains, load
from hf_models import config_json, random_tensors, write_folder

from lte_jax import hf
from lte_jax.hf import stored


@pytest.fixture(autouse=True)
def forget_what_was_said():
    stored.say_once.cache_clear()


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_bad_input_truncated_file(keep, tmp_path):
    path = write_folder(tmp_path, config_json("llama")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_complains(lambda: load(tmp_path), path, "truncated or corrupt", "copy it again")


def test_bad_input_garbage_file(tmp_path):
    path = write_folder(tmp_path, config_json("llama")) / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert_complains(lambda: load(tmp_path), path, "truncated or corrupt")


@pytest.fixture
def sharded(tmp_path):
    return write_folder(tmp_path / "model", config_json("llama"), shards=2)


def test_bad_input_shard_absent(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    words = ["model-00002-of-00002.safetensors is absent", "15 tensors", "download"]
    assert_complains(lambda: load(sharded), *words)


def test_bad_input_index_names_what_the_shard_lacks(sharded):
    index = sharded / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    assert_complains(lambda: load(sharded), index, "model.layers.9.", "model-00001-of-00002")


def test_bad_input_index_names_the_wrong_shard(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001-of", "0000X-of", 1).replace("0000X", "00002"))
    assert_complains(lambda: load(sharded), index, "does not hold it")


def test_bad_input_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(first)
    name = min(tensors)
    safetensors.numpy.save_file(safetensors.numpy.load_file(second) | {name: tensors[name]}, second)
    assert_complains(lambda: load(sharded), name, first, second)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {"a": 1}}'])
def test_bad_input_corrupt_index(content, sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    assert_complains(lambda: load(sharded), index, "again")


@pytest.fixture
def unindexed(tmp_path):
    folder = write_folder(tmp_path / "model", config_json("llama"), shards=3)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def test_shards_without_an_index(unindexed, caplog):
    expected = random_tensors(config_json("llama"))
    np.testing.assert_array_equal(load(unindexed)[2]["embed"]["embedding"], expected[EMBED])
    assert "model-00001-of-00003.safetensors" in caplog.text
    for i, file in enumerate(sorted(unindexed.glob("*.safetensors"))):
        file.rename(unindexed / f"part_{i}.safetensors")
    np.testing.assert_array_equal(load(unindexed)[2]["embed"]["embedding"], expected[EMBED])


def test_bad_input_shard_of_a_set_absent(unindexed):
    (unindexed / "model-00002-of-00003.safetensors").unlink()
    assert_complains(lambda: load(unindexed), "model-00002-of-00003.safetensors is absent")


def test_bad_input_shards_that_overlap(unindexed):
    shutil.copy(unindexed / "model-00002-of-00003.safetensors", unindexed / "copy.safetensors")
    assert_complains(lambda: load(unindexed), "is both in", "copy.safetensors")


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", ".."]
)
def test_bad_input_shard_names_that_lead_elsewhere(file, tmp_path):
    folder = write_folder(tmp_path / "model", config_json("llama"), shards=2)
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][EMBED] = file
    index.write_text(json.dumps(raw))
    assert_complains(lambda: load(folder), index, repr(file), "without a path")


def header(*, length=None, **tensors):
    text = json.dumps(
        {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}
    ).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(8)


LIES = {
    "length": header(length=2**62),
    "long": header(length=99_999_999),
    "overflow": header(a=("F32", [2**33, 2**33], [0, 8])),
    "overflow to nothing": header(a=("F32", [2**62, 4], [0, 0])),
    "negative": header(a=("F32", [-2], [0, 8])),
    "dtype": header(a=("F16", [2], [0, 8])),
    "backwards": header(a=("F32", [2], [8, 0])),
    "overlap": header(a=("F32", [2], [0, 8]), b=("F32", [2], [0, 8])),
    "huge and empty": header(a=("F32", [0, 2**62], [0, 0]), b=("F32", [2], [0, 8])),
    "thousand dimensions": header(a=("F32", [1] * 1000 + [2], [0, 8])),
    "deep": struct.pack("<Q", 500_000) + b'{"a":' * 100_000,
    "name": header(**{"a\n\x1b[31m" + "b" * 1000: ("F32", [2], [0, 8])}),
}


@pytest.mark.parametrize("case", LIES)
def test_bad_input_lying_safetensors(case, tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    (folder / "model.safetensors").write_bytes(LIES[case])
    line = assert_complains(lambda: load(folder), folder)
    assert line.isprintable()


def test_bad_input_safetensors_header_that_eats_memory(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    size = 20 * 2**20
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        file.truncate(size + 8)
    assert_complains(lambda: load(folder), folder / "model.safetensors", "header of 20,971,520")


@contextlib.contextmanager
def in_time(seconds=10):
    """Ends what waits for a pipe."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_bad_input_no_regular_file(name, kind, tmp_path):
    folder = write_folder(tmp_path / "m", config_json("llama"))
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with in_time():
        line = assert_complains(lambda: (load(folder), hf.load_tokenizer(folder)), folder / name)
    assert "expected a regular file" in line
