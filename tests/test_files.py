"""Files that are whole or absent, folders that know what belongs to them, JSON that is checked."""

import json
import os

import pytest

from lte_jax import files
from lte_jax.errors import UserError
from lte_jax.files import Damaged, atomic_write


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "results.json"
    atomic_write(path, json.dumps({"a": 1}))
    atomic_write(path, b"second")
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_bad_input_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    atomic_write(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"results.json cannot be written \(No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_manifest_notices_every_change(tmp_path):
    (tmp_path / "a").write_text("abc")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_text("def")
    files.write_manifest(tmp_path, {"step": 4})
    manifest = files.verify(tmp_path)
    assert manifest["step"] == 4 and set(manifest["files"]) == {"a", "deep/b"}
    assert manifest["files"]["a"][0] == 3

    (tmp_path / "deep" / "b").write_text("deg")
    assert files.verify(tmp_path, digests=False)
    with pytest.raises(Damaged, match="deep/b is corrupt"):
        files.verify(tmp_path)
    (tmp_path / "deep" / "b").write_text("defg")
    with pytest.raises(Damaged, match="deep/b has 4 bytes instead of 3"):
        files.verify(tmp_path, digests=False)
    (tmp_path / "deep" / "b").unlink()
    with pytest.raises(Damaged, match="deep/b is missing"):
        files.verify(tmp_path, digests=False)

    text = (tmp_path / files.MANIFEST).read_text()
    (tmp_path / files.MANIFEST).write_text(text.replace(": 4", ": 40"))
    with pytest.raises(Damaged, match="manifest.json is corrupt"):
        files.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "4300 digits"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "cannot be read"),
        (b"[1]", "holds a JSON list"),
        (b" " * (files.MAX_JSON_BYTES + 1), "33,554,433 bytes"),
    ],
)
def test_bad_input_json(content, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_json(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message and len(message) < 500


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "config.json") == {"a": 1}


def test_bad_input_pipes_are_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="pipe, socket or device"):
        files.read_json(tmp_path / "config.json")


def test_bad_input_a_manifest_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / files.MANIFEST)
    with pytest.raises(Damaged, match="manifest.json is not a regular file"):
        files.verify(tmp_path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ([], "workdir is list: expected the path"),
        (None, "workdir is NoneType"),
        ("", "workdir is empty"),
        ("\ud800", r"workdir \ud800: no file can have this name"),
        ("a/\0", "no file can have this name"),
        ("a/" + "x" * 256, "no file can have this name"),
    ],
)
def test_bad_input_paths(path, words, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(UserError) as caught:
        files.expand(path, "workdir")
    assert words in str(caught.value)


def test_paths_of_bytes_that_are_not_utf8_are_paths(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).touch()
    assert files.expand(tmp_path / name).exists()
