"""The manifest of a folder: what changed in it is found."""

import pytest
from hf_folders import as_lte, assert_complains, flip, lte_folder

import lte_jax
from lte_jax import hf, pipeline


def test_what_changed_in_a_folder_is_found(tmp_path):
    folder = lte_folder(tmp_path / "lte")
    lte_jax.load(folder, verify=True)
    files = sorted(file.name for file in folder.iterdir() if file.name != "manifest.json")
    assert files == ["config.json", "expert_order.safetensors", "model.safetensors"]
    for name in files:
        kept = (folder / name).read_bytes()
        flip(folder / name, -2)  # the size stays
        line = assert_complains(lambda: lte_jax.load(folder, verify=True), folder, name)
        assert "SHA-256" in line and "manifest.json" in line
        (folder / name).write_bytes(kept + b" ")
        for read in (lte_jax.load, hf.read_config, hf.load_expert_order):
            assert_complains(lambda read=read: read(folder), folder, name, "bytes instead of")
        (folder / name).unlink()
        assert_complains(lambda: lte_jax.load(folder), folder, name)
        (folder / name).write_bytes(kept)
    flip(folder / "manifest.json", 80)
    assert_complains(lambda: lte_jax.load(folder), "manifest.json is corrupt")
    (folder / "manifest.json").unlink()
    lte_jax.load(folder, verify=True)


def test_bad_input_folder_of_a_run(tmp_path):
    """A run resumes only from folders that are, bit for bit, as it wrote them."""
    folder = lte_folder(tmp_path / "experts")
    pipeline._verify(folder)
    flip(folder / "model.safetensors")
    words = [folder, "model.safetensors is corrupt", "remove it", "again"]
    assert_complains(lambda: pipeline._verify(folder), *words)
    flip(folder / "model.safetensors")
    pipeline._verify(folder)
    (folder / "manifest.json").unlink()
    assert_complains(lambda: pipeline._verify(folder), folder, "manifest.json", "remove it")


def test_transformers_reads_a_folder_with_a_manifest(shared, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = shared / "models" / "stories260k"
    config, params, order = as_lte(source, lte := lte_jax.LTEConfig(expert_size=43))
    hf.save(tmp_path / "lte", config, lte, params, source=source, expert_order=order)
    assert (tmp_path / "lte" / "manifest.json").exists()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "lte").hidden_size == 64
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lte")
    assert tokenizer("Once").input_ids == hf.load_tokenizer(source)("Once").input_ids
    (tmp_path / "lte" / "tokenizer.json").unlink()
    assert_complains(lambda: hf.load_tokenizer(tmp_path / "lte"), "tokenizer.json")
    assert_complains(lambda: lte_jax.load(tmp_path / "lte"), "tokenizer.json is missing")
