"""What a run needs is known before its first step, and is what it then takes."""

import collections
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import checkpoint, config, data, pipeline, plan, sharding
from lte_jax.config import CheckpointConfig, UserError
from lte_jax.preflight import Parts

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("finetune", "router", "adapt")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    keep = CheckpointConfig(every=1, keep_last=1, keep_best=0, keep_finished=False)
    return tiny.experiment(tmp_path_factory.mktemp("data"), checkpoint=keep)


def planned(experiment, dtype="float32"):
    """The plan of a run from random weights on four records."""
    rows = np.ones((4, experiment.data.length), np.int32)
    records = data.Records(rows, rows)
    scratch = dataclasses.replace(experiment.source.scratch, dtype=dtype)
    parts = Parts(scratch, None, None, (records, records), None, {})
    return plan.Plan.of(experiment, parts, sharding.make_mesh(experiment.mesh))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    """A run whose finished stages do not stay, and what lay on its disk at each new checkpoint."""
    root, seen = tmp_path_factory.mktemp("run") / "run", []
    write = checkpoint.files.write_manifest

    def told(folder, manifest, *found):
        write(folder, manifest, *found)
        if folder.parent.parent.name != "checkpoints":
            return
        leaves = [re.fullmatch(r"(\w+)\[(.*)\]", kind) for kind in manifest["leaves"].values()]
        sizes = (math.prod(int(n) for n in m[2].split(",") if n) * 4 for m in leaves)
        steps = collections.Counter(
            path.parent.parent.name for path in root.glob("checkpoints/*/[0-9]*/manifest.json")
        )
        seen.append((folder.parent.name, sum(sizes), dict(steps)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.files, "write_manifest", told)
        lte_jax.train(experiment, root)
    return root, seen


def test_checkpoints_are_as_large_and_as_many_as_planned(experiment, run):
    _, seen = run
    needs = {stage.name: stage for stage in planned(experiment).stages}
    assert [name for name, *_ in seen] == [name for name in STAGES for _ in range(2)]
    for name, size, _ in seen:
        assert size == needs[name].checkpoint
    at_once = [steps for *_, steps in seen]
    # Two while a save is completed; the router stage's last until the model is written.
    assert at_once[1] == {"finetune": 2} and at_once[3] == {"router": 2}
    assert at_once[5] == {"router": 1, "adapt": 2}
    most, when = planned(experiment).disk(experiment.checkpoint)
    models = sum(plan.folder_bytes(experiment.source.scratch, x) for x in (None, experiment.lte))
    assert most == models + needs["router"].checkpoint + 2 * needs["adapt"].checkpoint
    assert when == "in stage adapt"


def test_models_are_as_large_as_planned(experiment, run):
    root, _ = run
    for folder, lte in ("dense", None), ("experts", experiment.lte), ("lte", experiment.lte):
        size = (root / folder / "model.safetensors").stat().st_size
        expected = plan.folder_bytes(experiment.source.scratch, lte)
        assert 0 <= size - expected < 5000, folder  # its header


def test_finished_stages_are_removed_and_can_be_made_again(experiment, run, tmp_path):
    root, _ = run
    assert list((root / "checkpoints").iterdir()) == []
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "checkpoints" / "router" / "2").mkdir(parents=True)  # killed before it was removed
    lte_jax.train(experiment, copy)
    assert list((copy / "checkpoints").iterdir()) == []
    shutil.rmtree(copy / "lte")
    lte_jax.train(experiment, copy)
    assert files(copy / "lte") == files(root / "lte")


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes are free."""

    def free(number):
        usage = collections.namedtuple("usage", "total used free")(10**12, 0, number)
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage)

    return free


def test_bad_input_a_disk_without_room(experiment, tmp_path, room, monkeypatch):
    monkeypatch.setattr(pipeline.trainer, "fit", lambda *_, **__: pytest.fail("it trains"))
    wasteful = dataclasses.replace(experiment, checkpoint=CheckpointConfig(every=1))
    most, least = (planned(experiment).disk(x.checkpoint)[0] for x in (wasteful, experiment))
    assert least < most
    room(most - 1)
    with pytest.raises(UserError) as caught:
        lte_jax.train(wasteful, tmp_path / "new" / "run")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in ("when lte/ is", f"{most / 1e6:.3g} MB", f"it needs {least / 1e6:.3g} MB"):
        assert word in message, message
    assert "keep_last=1" in message and not (tmp_path / "new").exists()
    room(least - 1)
    with pytest.raises(UserError, match="free some, or name a workdir on another disk$"):
        lte_jax.train(experiment, tmp_path / "new" / "run")


def test_what_the_run_already_holds_needs_no_room(experiment, tmp_path, room):
    paths = plan.Paths(tmp_path)
    made = planned(experiment)
    most, _ = made.disk(experiment.checkpoint)
    room(most // 2)
    with pytest.raises(UserError, match="only .* are free"):
        made.check_room(paths)
    (paths.checkpoints("router") / "1").mkdir(parents=True)
    (paths.checkpoints("router") / "1" / "state").write_bytes(bytes(most // 4))
    with pytest.raises(UserError, match="and it holds .* of them"):
        made.check_room(paths)
    paths.dense.mkdir()
    (paths.dense / "model.safetensors").write_bytes(bytes(most // 4 + 2))
    made.check_room(paths)


def test_the_opening_table_says_what_is_about_to_happen(experiment, tmp_path, capsys, monkeypatch):
    class Enough(Exception):
        pass

    def fit(*_, **__):
        raise Enough

    monkeypatch.setattr(pipeline.trainer, "fit", fit)
    with pytest.raises(Enough):
        lte_jax.train(experiment, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line[9:] for line in lines}
    assert list(rows) == "model devices experts tokens kernels steps disk memory".split()
    state = json.loads(json.dumps(planned(experiment).stages[1].memory))
    number = state["parameters"] // 4
    assert "parameters, from random weights" in rows["model"]
    assert rows["devices"] == "8 x cpu; mesh: data 8, fsdp 1, tensor 1"
    assert rows["experts"].startswith("2 x 8 x 8 (layers x experts x neurons); routers 528 ")
    assert rows["steps"] == "finetune 2, router 2, adapt 2"
    assert "128 a step (8 records of 16)" in rows["tokens"]
    assert "in stage adapt" in rows["disk"] and " are free" in rows["disk"]
    assert "teacher" in rows["memory"] and number > 528


def test_memory_is_of_a_device(experiment):
    split = dataclasses.replace(experiment, mesh=config.MeshConfig(data=1, fsdp=8))
    whole, part = (planned(x).stages[1].memory for x in (experiment, split))
    for name in whole:
        assert part[name] < whole[name] / 4  # norms and biases are on all
    assert whole["moments"] == pytest.approx(2 * whole["parameters"], rel=1e-3)
    assert whole["teacher"] == whole["gradients"] == whole["parameters"]
    dense, _, adapt = (stage.memory for stage in planned(experiment).stages)
    assert "teacher" not in dense and adapt["moments"] < whole["moments"]  # routers are frozen


def test_the_default_of_the_largest_config_fits_a_disk():
    """At 81 GB a checkpoint, the defaults of smaller runs would write 8.5 TB."""
    seven = config.load_config(str(ROOT / "configs" / "llama7b.py"))
    made = planned(seven, "bfloat16")
    assert made.stages[1].checkpoint == pytest.approx(81.4e9, rel=1e-3)  # 12 bytes a parameter
    assert made.disk(seven.checkpoint)[0] < 280e9 and made.written() < 1.7e12
    usual = dataclasses.replace(seven, checkpoint=CheckpointConfig())
    assert planned(usual, "bfloat16").written() == pytest.approx(8.51e12, rel=1e-3)
