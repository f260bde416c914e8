"""A disk that fills up: one line, nothing lost, and the same command resumes once there is room."""

import os
import shutil
import subprocess

import pytest
import tiny

import lte_jax
from lte_jax import checkpoint, evaluation, hf, report
from lte_jax.errors import UserError

RESULT = ("lte/model.safetensors", "lte/config.json", "dense/model.safetensors")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mounted).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk, leave):
    """Leaves so many bytes free."""
    usage = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(0, usage.f_bavail * usage.f_frsize - leave)))


def before(monkeypatch, owner, name, action, times=1):
    """Calls `action` before the first calls of a function."""
    original, left = getattr(owner, name), [times]

    def call(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.slow
def test_bad_input_disk_full_in_each_phase(small_disk, tmp_path, monkeypatch, capfd):
    experiment = tiny.experiment(tmp_path / "data", report=True)
    lte_jax.train(experiment, tmp_path / "undisturbed")
    expected = {name: (tmp_path / "undisturbed" / name).read_bytes() for name in RESULT}
    workdir = small_disk / "run"
    phases = [
        (checkpoint.Checkpointer, "save", 4096),  # a few files fit, the arrays do not
        (checkpoint.Checkpointer, "save", 0),
        (hf, "save", 0),
        (hf, "save", 8192),
        (report, "write", 0),
    ]
    for owner, name, leave in phases:
        with monkeypatch.context() as patch:
            before(patch, owner, name, lambda leave=leave: fill(small_disk, leave))
            capfd.readouterr()
            with pytest.raises(UserError) as caught:
                lte_jax.train(experiment, workdir)
        assert "No space left" in str(caught.value) and "\n" not in str(caught.value)
        said = capfd.readouterr().err
        assert "Traceback" not in said and "Error" not in said, said
        (small_disk / "filler").unlink()
    monkeypatch.setattr(evaluation, "evaluate", evaluation.evaluate)
    lte_jax.train(experiment, workdir)
    assert {name: (workdir / name).read_bytes() for name in RESULT} == expected
    assert not [path.name for path in workdir.glob(".*") if path.name != ".lock"]
