"""What a run needs is known before its first step, and is what it then takes."""

import collections
import dataclasses
import math
import re
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import (
    checkpoint,
    config,
    data,
    pipeline,
    plan,
    preflight,
    sharding,
    stages,
)
from lte_jax.cli import train
from lte_jax.config import CheckpointConfig, MeshConfig, UserError
from lte_jax.model import Transformer
from lte_jax.plan import devices, step
from lte_jax.sparsity import flops_per_token
from lte_jax.workdir import Paths

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
    here = plan.Devices.at_hand(sharding.make_mesh(experiment.mesh))
    return plan.Plan.of(experiment, scratch, here, (records, records))


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
    # Two while a save is completed; the router stage's last until the next stage has one.
    assert at_once[1] == {"finetune": 2} and at_once[3] == {"router": 2}
    assert at_once[4:] == [{"router": 1, "adapt": 1}, {"adapt": 2}]
    most, when = planned(experiment).disk(experiment.checkpoint)
    models = sum(plan.folder_bytes(experiment.source.scratch, x) for x in (None, experiment.lte))
    assert most == models + 2 * needs["router"].checkpoint
    assert when == "in stage router"


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
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

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
    paths = Paths(tmp_path)
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
    names = "model devices experts tokens kernels steps compute flops time disk memory host"
    assert rows["host"].startswith("33.2 kB for the largest array as it is read, 33.2 kB for")
    assert list(rows) == names.split()
    assert "parameters, from random weights" in rows["model"]
    assert rows["devices"] == "8 x cpu; mesh: data 8, fsdp 1, tensor 1"
    assert rows["experts"].startswith("2 x 8 x 8 (layers x experts x neurons); routers 528 ")
    assert rows["steps"] == "finetune 2, router 2, adapt 2"
    assert "128 a step (8 records of 16)" in rows["tokens"]
    assert "in stage router" in rows["disk"] and " are free" in rows["disk"]
    assert "teacher" in rows["memory"] and "activations" in rows["memory"]
    logits = "logits of 16 tokens (16.6 kB) on a device at a time"
    assert rows["compute"] == f"float32, remat False, {logits}, teacher in bfloat16"
    assert rows["time"] == "not known: no rate of cpu in float32 in the table"


def test_memory_is_of_a_device(experiment):
    split = dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=8))
    whole, part = (planned(x).stages[1].memory for x in (experiment, split))
    for name in "parameters", "gradients", "moments", "the stage's start":
        assert part[name] < whole[name] / 4  # norms and biases are on all
    assert whole["moments"] == pytest.approx(2 * whole["parameters"], rel=1e-3)
    assert whole["gradients"] == whole["parameters"]
    dense, _, adapt = (stage.memory for stage in planned(experiment).stages)
    assert "teacher" not in dense and adapt["moments"] < whole["moments"]  # routers are frozen
    for memory in whole, adapt:  # its matrices in bfloat16, vectors in float32
        assert memory["teacher"] == pytest.approx(adapt["parameters"] / 2, rel=0.05)
    # In float32 it is the router stage's start itself, unless that is another.
    compute = config.ComputeConfig(teacher_dtype="float32")
    wide = dataclasses.replace(experiment, compute=compute)
    _, router, adapt = (stage.memory for stage in planned(wide).stages)
    assert "teacher" not in router and adapt["teacher"] == adapt["parameters"]
    lte = dataclasses.replace(wide.lte, refit=True)
    refitted = planned(dataclasses.replace(wide, lte=lte)).stages[1].memory
    assert refitted["teacher"] == refitted["parameters"]


SHAPES = dict(d_model=256, d_ff=1024, num_heads=4, num_kv_heads=4, head_dim=64, num_layers=4)


def sized(name, mesh, vocab=512, rank=0, **compute):
    """A stage, its experiment and the mesh."""
    scratch = config.ModelConfig(**SHAPES, vocab_size=vocab)
    made = config.Experiment(
        source=config.SourceConfig(scratch=scratch),
        data=config.DataConfig(length=256, batch_size=16),
        stages=tiny.STAGES,
        mesh=MeshConfig(*mesh),
        compute=config.ComputeConfig(**compute),
        lora=config.LoraConfig(rank),
    )
    [stage] = [s for s in stages.make(made.stages, made.lte) if s.name == name]
    return stage, made, sharding.make_mesh(made.mesh)


def compiled(stage, experiment, mesh):
    """What XLA says of the memory of the step that the trainer runs."""
    ahead = runpy.run_path(str(ROOT / "benchmarks/ahead.py"))
    step, operands = ahead["step_of"](stage, experiment, mesh)
    with jax.set_mesh(mesh):
        return step.lower(*operands).compile().memory_analysis()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "vocab", "compute"),
    [
        ("router", (1, 8, 1), 512, {"remat": True}),  # a layer takes most
        ("router", (8, 1, 1), 4096, {"remat": False}),  # logits
        ("adapt", (1, 8, 1), 4096, {"remat": True, "head_tokens": 64}),  # logits in chunks
        ("finetune", (2, 2, 2), 512, {"remat": "dots_with_no_batch_dims_saveable"}),
        ("router", (1, 8, 1), 512, {"remat": True, "rank": 8}),
        ("adapt", (8, 1, 1), 4096, {"remat": True, "rank": 8, "head_tokens": 64}),
    ],
)
def test_bytes_of_a_step_are_those_that_xla_counts(name, mesh, vocab, compute):
    # Of models this small, what a fusion happens to keep is a hundredth.
    assert_counted(*sized(name, mesh, vocab, **compute), rel=0.11)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "variant", "keys"), [
    (8, "", ["compute.remat=True"]),
    (8, "", ["compute.remat=dots_with_no_batch_dims_saveable", "data.batch_size=64"]),
    (1, ":lora", []),
])  # fmt: skip
def test_bytes_of_llama7b_are_those_that_xla_counts(devices, variant, keys):
    """Of the router stage; in float32, as XLA has no bfloat16 on a CPU."""
    keys = ["source.path=", "compute.dtype=float32", "compute.teacher_dtype=float32", *keys]
    made = config.load_config(f"{ROOT}/configs/llama7b.py{variant}", keys)
    [stage] = [s for s in stages.make(made.stages, made.lte) if s.name == "router"]
    assert_counted(stage, made, sharding.make_mesh(made.mesh, jax.devices()[:devices]))


def assert_counted(stage, experiment, mesh, rel=0.1):
    """The plan is within a tenth of what XLA needs for the step, or as near as `rel` says."""
    found, here = compiled(stage, experiment, mesh), plan.Devices.at_hand(mesh)
    needed = plan.needs.of_stage(stage, experiment, experiment.source.scratch, here).memory
    state = needed["parameters"] + needed["moments"] + needed.get("frozen", 0)
    if stage.taught:  # by what is frozen, or in the router stage by the stage's start itself
        shared = needed.get("frozen", needed["the stage's start"])
        state += needed.get("teacher", shared)
    assert found.argument_size_in_bytes == pytest.approx(state, rel=0.01)
    work = needed["gradients"] + needed["activations"] + needed.get("logits", 0)
    whole = found.argument_size_in_bytes + found.temp_size_in_bytes
    print(stage.name, (state + work) / whole, work / found.temp_size_in_bytes)
    assert state + work == pytest.approx(whole, rel=rel)
    assert work == pytest.approx(found.temp_size_in_bytes, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [512, 4096])  # a layer takes most; logits
def test_bytes_of_the_report_are_those_that_xla_counts(vocab):
    """Of both models' forward passes, on one device."""
    _, made, _ = sized("router", (8, 1, 1), vocab)
    ahead = runpy.run_path(str(ROOT / "benchmarks/ahead.py"))
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    programs = [p for p in ahead["ending"](made, mesh) if p.name.startswith("evaluation")]
    for program in programs:
        found = program.lower().compile().memory_analysis()
        whole = found.argument_size_in_bytes + found.temp_size_in_bytes
        print(program.name, program.planned / whole)
        assert program.planned == pytest.approx(whole, rel=0.1)
    scratch = made.source.scratch
    models = [plan.report.weights(Transformer(scratch, lte)) for lte in (None, made.lte)]
    needed = plan.report.of_report(made, scratch, sparse=True)
    assert sum(needed.values()) == models[0] + programs[-1].planned
    assert [needed["dense model"], needed["LTE model"]] == models
    alone = dataclasses.replace(made, report_dense=False)
    alone = plan.report.of_report(alone, scratch, sparse=True)
    assert alone == {name: of for name, of in needed.items() if name != "dense model"}


# Operands and work, by libtpu 0.0.42.1 and jax-cuda12-plugin 0.10.2: `python benchmarks/ahead.py
# --only evaluation --config.data.batch_size=64`, for TPUs with --devices=v5p:64.
EVALUATIONS = {
    True: (13_477_879_808 + 22_279_813_696, 13_568_081_920 + 35_501_734_624),
    False: (13.5e9 + 11.1e9, 13.6e9 + 24.1e9),
}


@pytest.mark.parametrize("tpu", EVALUATIONS)
def test_bytes_of_the_report_are_those_of_compilers_for_devices_not_at_hand(tpu):
    keys = ["source.path=", "data.batch_size=64"]
    made = config.load_config(f"{ROOT}/configs/llama7b.py", keys)
    needed = plan.report.of_report(made, made.source.scratch, True, tpu)
    dense, lte = EVALUATIONS[tpu]
    assert sum(needed.values()) - needed["dense model"] == pytest.approx(lte, rel=0.05)
    needed = plan.report.of_report(made, made.source.scratch, False, tpu)
    assert sum(needed.values()) == pytest.approx(dense, rel=0.05)


@pytest.mark.parametrize("length", [32, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_a_tpu_holds_no_less_of_attention(length, causal):
    """Of one block of queries its scores and their softmax, too; of eight the softmax of all."""
    scratch = dataclasses.replace(tiny.CONFIG, max_length=256, d_ff=8, causal=causal)
    gpu, tpu = (
        plan.report.activations(Transformer(scratch), 4, length, tpu)["activations"]
        for tpu in (False, True)
    )
    assert tpu == gpu if not causal or length == 32 else tpu > gpu


def test_bad_input_a_report_that_cannot_fit(experiment):
    """Both models lie on one device, however many there are."""
    made = planned(dataclasses.replace(experiment, report=True))
    few = max(stage.bytes for stage in made.stages)
    gpus = dataclasses.replace(made.devices, kind="h200", memory=few)
    large = dataclasses.replace(made, devices=gpus, report=made.report | {"dense model": few})
    with pytest.raises(UserError) as caught:
        large.check_memory()
    shared = dataclasses.replace(made.devices, memory=few)  # CPU devices share their host's
    dataclasses.replace(large, devices=shared).check_memory()
    words = "set report=False, and run evaluate.py --workdir where both models fit"
    assert "the report needs" in str(caught.value) and str(caught.value).endswith(words)
    assert not planned(experiment).report


def test_flops_are_those_of_the_formula():
    """Of a matrix three times those of its forward pass; of attention's scores 7 halves of those.

    A teacher adds one forward pass, remat one more of the layers, and logits in chunks nothing.
    """
    scratch, length = tiny.CONFIG, 16
    tokens, width = 4 * length, scratch.num_heads * scratch.head_dim
    head = 2.0 * scratch.d_model * scratch.vocab_size
    scores = 2 * 2.0 * length * width * scratch.num_layers  # in one pass; blocks are computed again
    for name, remat in (("finetune", False), ("finetune", True), ("router", False)):
        lte = tiny.LTE if name == "router" else None
        made = config.Experiment(
            data=config.DataConfig(length=length),
            lte=tiny.LTE,
            compute=config.ComputeConfig(remat=remat),
        )
        found = step.count(tiny.stage(name), made, scratch, rows=4).flops
        chunks = dataclasses.replace(made.compute, head_tokens=8)
        chunks = dataclasses.replace(made, compute=chunks)
        assert step.count(tiny.stage(name), chunks, scratch, rows=4).flops == found
        layers = flops_per_token(scratch, lte)
        expected = 3 * (layers + head) + 3.5 * scores
        if remat:  # not the last products, whose results nobody reads
            expected += layers + scores
        if lte:
            expected += flops_per_token(scratch) + head + scores
        assert found == pytest.approx(tokens * expected, rel=0.12 if remat else 0.01)


def test_what_a_remat_policy_keeps():
    """From a layer's input alone to everything."""

    def kept(remat):
        stage, experiment, _ = sized("router", (8, 1, 1), remat=remat)
        return step.count(stage, experiment, experiment.source.scratch, rows=2).kept

    names = True, "dots_with_no_batch_dims_saveable", "dots_saveable", False
    nothing, products, with_scores, everything = map(kept, names)
    x = 4 * 2 * 256 * 256 * 4  # [N, B, L, D] float32
    assert x < nothing < 2.5 * x
    ffn, heads = 2 * 1024, 4 * 256  # gate and up; q, k, v and o
    assert products - nothing == pytest.approx(x / 256 * (ffn + heads), rel=0.25)
    assert products <= with_scores < everything


def test_bad_input_a_run_that_cannot_fit(experiment, tmp_path, monkeypatch):
    """It says so before texts are read, with the smallest mesh.fsdp that does."""
    wide = dataclasses.replace(experiment.source.scratch, d_model=512, head_dim=128)
    wide = dataclasses.replace(experiment, source=config.SourceConfig(scratch=wide))
    largest = max(stage.bytes for stage in planned(wide).stages)
    monkeypatch.setattr(devices, "host_memory", lambda: 8 * (largest // 2))
    monkeypatch.setattr(preflight, "_records", lambda *_: pytest.fail("it reads the texts"))
    with pytest.raises(UserError) as caught:
        lte_jax.train(wide, tmp_path / "run")
    words = str(caught.value)
    assert "stage router needs" in words and "on each of 8 x cpu, which can use" in words
    assert words.endswith(": it fits with mesh.data=-1 mesh.fsdp=4"), words
    there = dataclasses.replace(wide, mesh=MeshConfig(data=-1, fsdp=4))
    planned(there).check_memory()
    monkeypatch.setattr(devices, "host_memory", lambda: 8 * (largest // 40))
    with pytest.raises(UserError, match=r": take (\d+ such|larger) devices"):
        planned(wide).check_memory()
    assert not (tmp_path / "run").exists()


SMOKE = f"--config={ROOT / 'configs' / 'llama7b.py'}:smoke"


def test_a_plan_for_devices_that_are_not_here(capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("it trains"))
    train.main([SMOKE, "--plan=h200:8"])
    rows = {line.split()[0]: line[9:] for line in capsys.readouterr().out.splitlines()}
    assert rows["devices"] == "8 x h200; mesh: data 1, fsdp 8, tensor 1"
    assert "at 40% of 989.5 TFLOP/s a device (NVIDIA H200" in rows["time"]
    assert " a device at most, of 134 GB that it can use" in rows["memory"]
    assert "free" not in rows["disk"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--plan=h20:8"], "no device 'h20': did you mean 'h200'?"),
        (["--plan=h200:no"], "expected a number of devices, such as h200:8"),
        (["--plan=v5p:64"], "data.batch_size=8 does not divide over 64 devices"),
        (["--plan", "--config.source.path=nobody/nothing", "--config.source.scratch.vocab_size=259",
          "--config.mesh.fsdp=3"], "does not cover 8 devices"),
        ([], "required: --workdir"),
    ],
)  # fmt: skip
def test_bad_input_a_plan_for_nothing(flags, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([SMOKE, *flags])
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_a_model_that_is_not_here_is_not_guessed(monkeypatch, capsys):
    def absent(*_, **__):
        raise UserError("nobody/nothing cannot be downloaded")

    monkeypatch.setattr(plan.run.hf, "resolve", absent)
    source = config.SourceConfig(path="nobody/nothing")
    with pytest.raises(UserError, match="cannot be downloaded"):
        plan.show(config.Experiment(source=source), "h200:1")
    known = dataclasses.replace(source, scratch=tiny.CONFIG)
    made = config.Experiment(source=known, data=config.DataConfig(length=16, batch_size=8))
    plan.show(made, "h200:1")
    assert "counted is source.scratch, as source.path cannot be read" in capsys.readouterr().out


def test_jax_s_names_of_devices_are_known():
    names = {
        "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100",
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
        "TPU v6 lite": "v6e", "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA L4": "l4",
        "NVIDIA L40S": None, "cpu": None,
    }  # fmt: skip
    for kind, expected in names.items():
        found = [name for name, m in plan.MACHINES.items() if re.search(m.kind, kind)]
        assert found == ([expected] if expected else []), kind


PAGE = (ROOT / "docs" / "plan.md").read_text()


def test_the_page_has_the_devices_of_the_table():
    rows = (
        f"| `{name}` | {m.memory / 1e9:.0f} GB | {m.rate / 1e12:g} | {m.source} |"
        for name, m in plan.MACHINES.items()
    )
    assert "\n".join(rows) in PAGE


@pytest.mark.slow
def test_the_page_has_the_plan_that_is_printed(monkeypatch, capsys):
    def absent(*_, **__):
        raise UserError("no hub")

    monkeypatch.setattr(plan.run.hf, "resolve", absent)
    seven = ["--config=" + str(ROOT / "configs" / "llama7b.py")]
    train.main([*seven, "--plan=h200:8"])
    with pytest.raises(SystemExit):
        train.main([*seven, "--plan=h100:8", "--config.mesh.data=-1", "--config.mesh.fsdp=1"])
    printed = capsys.readouterr()
    assert printed.out.partition("\n")[2].partition("\ncounted")[0] in PAGE
    assert f"\n{printed.err.strip()}\n" in PAGE
    train.main([f"{seven[0]}:lora", "--plan=rtx4090"])
    adapted = capsys.readouterr().out.partition("\n")[2]
    assert adapted in (ROOT / "docs" / "scale.md").read_text()


def test_the_default_of_the_largest_config_fits_a_disk():
    """At 81 GB a checkpoint, the defaults of smaller runs would write 8.5 TB."""
    seven = config.load_config(str(ROOT / "configs" / "llama7b.py"))
    made = planned(seven, "bfloat16")
    assert made.stages[1].checkpoint == pytest.approx(81.4e9, rel=1e-3)  # 12 bytes a parameter
    assert made.disk(seven.checkpoint)[0] < 195e9 and made.written() < 1.7e12
    usual = dataclasses.replace(seven, checkpoint=CheckpointConfig())
    assert planned(usual, "bfloat16").written() == pytest.approx(8.51e12, rel=1e-3)
