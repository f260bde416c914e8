"""Saving: onto other things, to a full disk, of other parameters; nothing is half-written."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from hf_folders import assert_complains, hub_snapshot, load
from hf_models import config_json, read_tensors, write_folder

from lte_jax import hf
from lte_jax.config import LTEConfig
from lte_jax.hf import export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("dense") / "model", config_json("llama"))
    return *load(folder), folder


def assert_save_complains(model, target, *words, **options):
    """That saving to `target` raises, and that everything beside it is as it was."""
    config, lte, params, _ = model
    beside = target.parent if target.parent.is_dir() else target.parent.parent
    before = sorted(map(str, beside.rglob("*"))) if beside != target.root else []
    assert_complains(lambda: hf.save(target, config, lte, params, **options), *words)
    after = sorted(map(str, beside.rglob("*"))) if beside != target.root else []
    assert before == after


def test_bad_input_export_onto_a_file(model, tmp_path):
    (tmp_path / "out").write_text("precious")
    assert_save_complains(model, tmp_path / "out", tmp_path / "out", "is a file")
    assert (tmp_path / "out").read_text() == "precious"


def test_bad_input_export_below_a_file(model, tmp_path):
    (tmp_path / "file").write_text("precious")
    target = tmp_path / "file" / "out"
    assert_save_complains(model, target, f"cannot write {target}", "choose a writable folder")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc on this system")
def test_bad_input_export_to_a_read_only_place(model):
    config, lte, params, _ = model
    words = ["cannot write /proc/out", "writable"]
    assert_complains(lambda: hf.save("/proc/out", config, lte, params), *words)


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints/"])
def test_bad_input_export_over_other_things(foreign, model, tmp_path):
    config, lte, params, _ = model
    target = tmp_path / "out"
    hf.save(target, config, lte, params)
    if foreign.endswith("/"):
        (target / foreign).mkdir()
    else:
        (target / foreign).write_text("precious")
    assert_save_complains(model, target, target, foreign.strip("/"), "choose another folder")


def test_bad_input_export_over_a_folder_without_config(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("precious")
    assert_save_complains(model, tmp_path / "out", "tokenizer.json", "choose another folder")


def test_bad_input_export_to_a_full_disk_simulated(model, tmp_path, monkeypatch):
    """An older model in that place survives."""
    config, lte, params, _ = model
    target = tmp_path / "out"
    hf.save(target, config, lte, params)
    before = read_tensors(target)
    write, written = export._Tensor.fetch, []

    def fetch(tensor):
        written.append(tensor.name)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(tensor)

    monkeypatch.setattr(export._Tensor, "fetch", fetch)
    assert_save_complains(model, target, f"cannot write {target}", "No space left on device")
    assert len(written) == 6 and sorted(read_tensors(target)) == sorted(before)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_bad_input_export_to_a_full_disk(model, small_disk):
    target = small_disk / "out"
    assert_save_complains(model, target, f"cannot write {target}", "No space left on device")
    free = shutil.disk_usage(small_disk)
    assert free.used == 0


def test_bad_input_export_of_other_parameters(model, tmp_path):
    config, lte, params, _ = model
    fewer = {k: v for k, v in params.items() if k != "lm_head"}
    more = params | {"head": {"kernel": params["lm_head"]["kernel"]}}
    narrow = params | {"lm_head": {"kernel": params["lm_head"]["kernel"][:, :5]}}
    cases = ((fewer, "is missing"), (more, "head/kernel"), (narrow, "[64, 5], expected [64, 97]"))
    for wrong, word in cases:
        assert_save_complains((config, lte, wrong, None), tmp_path / "out", word, "agree")


def test_bad_input_export_with_another_source(model, tmp_path):
    other = write_folder(tmp_path / "other", config_json("llama", rope_theta=5e5), {})
    words = [other, "rope_theta=500000.0", "10000.0"]
    assert_save_complains(model, tmp_path / "out", *words, source=other)


def test_bad_input_export_of_what_the_family_lacks(model, tmp_path):
    config, lte, params, folder = model
    for change in ({"qk_norm": True}, {"sliding_window": 8}, {"gated": False}, {"family": "gpt9"}):
        wrong = dataclasses.replace(config, **change)
        words = [next(iter(change))]
        assert_save_complains((wrong, lte, params, folder), tmp_path / "out", *words)


def test_bad_input_export_expert_order(model, tmp_path):
    words = ["expert_order", "[3, 96]"]
    assert_save_complains(model, tmp_path / "out", *words, expert_order=np.zeros((3, 96), int))


def test_bad_input_export_lte_size(model, tmp_path):
    config, _, params, folder = model
    broken_lte = (config, LTEConfig(expert_size=7), params, folder)
    assert_save_complains(broken_lte, tmp_path / "out", "expert_size=7", "96")


def test_export_follows_no_link_out_of_the_folder(tmp_path, caplog):
    (tmp_path / "secret").write_text("the key")
    folder = write_folder(tmp_path / "m", config_json("llama"))
    (folder / "LICENSE.txt").symlink_to("../secret")
    (folder / "NOTICE").write_text("ours")
    (folder / "NOTICE.md").symlink_to("NOTICE")
    os.mkfifo(folder / "vocab.txt")
    config, lte, params = load(folder)
    hf.save(tmp_path / "new", config, lte, params, source=folder)
    held = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert held == ["NOTICE", "NOTICE.md", "config.json", "manifest.json", "model.safetensors"]
    assert (tmp_path / "new" / "NOTICE.md").read_text() == "ours"
    assert "LICENSE.txt is not saved" in caplog.text and "vocab.txt is not saved" in caplog.text


@pytest.mark.parametrize("shared_store", [False, True])
def test_export_of_a_model_in_the_hub_cache(shared_store, tmp_path, caplog):
    folder = write_folder(tmp_path / "m", config_json("llama"))
    (folder / "LICENSE").write_text("free")
    snapshot = hub_snapshot(tmp_path / "hub", folder, shared_store)
    config, lte, params = load(snapshot)
    hf.save(tmp_path / "new", config, lte, params, source=snapshot)
    assert (tmp_path / "new" / "LICENSE").read_text() == "free" and not caplog.records
    assert (tmp_path / "new" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_another_activation_function_is_the_only_change_of_config_json(family, tmp_path):
    folder = write_folder(tmp_path / "m", config_json(family))
    config, _, params = load(folder)
    hf.save(
        tmp_path / "new",
        dataclasses.replace(config, activation="relu"),
        None,
        params,
        source=folder,
    )
    assert hf.read_config(tmp_path / "new")[0] == dataclasses.replace(config, activation="relu")
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "new"))
    assert len(changed := [key for key in new if new[key] != old.get(key)]) == 1, changed
