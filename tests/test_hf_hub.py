"""How a model is named: a folder, a hub id, an address of the hub."""

import pytest
from hf_folders import assert_complains, load
from hf_models import assert_bit_equal, config_json, read_tensors, write_folder

import lte_jax
from lte_jax import hf
from lte_jax.errors import UserError


def test_bad_input_empty_folder(tmp_path):
    line = assert_complains(lambda: load(tmp_path), tmp_path / "config.json", "does not exist")
    assert "Hugging Face" in line


@pytest.mark.parametrize(
    "name", ["no/such-model", "no-such-model", "missing/folder/of/mine", "/a b"]
)
def test_bad_input_neither_folder_nor_hub_id(name):
    assert_complains(lambda: hf.resolve(name), name, "folder", "hub")


def test_bad_input_file_in_place_of_folder(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    path = folder / "model.safetensors"
    assert_complains(lambda: hf.resolve(path), path, "is a file", "folder of a model")


@pytest.mark.parametrize(
    ("spelled", "repository", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name/", "owner/name", None),
        ("gpt2", "gpt2", None),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        ("https://huggingface.co/owner/name", "owner/name", None),
        ("https://huggingface.co/owner/name/", "owner/name", None),
        ("https://huggingface.co/owner/name/tree/main", "owner/name", "main"),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F3/", "owner/name", "refs/pr/3"),
        ("https://huggingface.co/owner/name?library=jax", "owner/name", None),
        ("huggingface.co/owner/name", "owner/name", None),
        ("https://hf.co/owner/name", "owner/name", None),
    ],
)
def test_spellings_of_a_hub_model(spelled, repository, revision, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, revision, **_):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hf.resolve(spelled) == tmp_path
    assert asked == [(repository, revision)]


@pytest.mark.parametrize(
    "spelled",
    [
        "https://example.com/owner/name",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner/name/tree/main/subfolder",
        "owner/name@",
        "a" * 5000,
        "a\0b",
    ],
)
def test_bad_input_spellings(spelled):
    assert_complains(lambda: hf.resolve(spelled), "correct the path")


def test_bad_input_no_name():
    assert_complains(lambda: hf.resolve(""), "'' names no model", "folder or a hub id")


def test_home_folder_and_trailing_slash(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_folder(tmp_path / "m", config_json("llama"))
    assert hf.resolve("~/m/") == folder
    model, params = lte_jax.load("~/m/")
    lte_jax.save("~/new", model, params, source="~/m")
    assert_bit_equal(read_tensors(tmp_path / "new"), read_tensors(folder))


def test_a_mirror_comes_before_the_hub(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "mirror/owner/name", config_json("llama"))
    monkeypatch.setenv("LTE_JAX_MIRROR", str(tmp_path / "mirror"))
    assert hf.resolve("owner/name") == folder
    assert hf.resolve("https://huggingface.co/owner/name") == folder
    monkeypatch.setenv("LTE_JAX_MIRROR", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="LTE_JAX_MIRROR=.*absent: is no folder"):
        hf.resolve("owner/name")
