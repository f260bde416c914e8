"""Several processes of one run do what one process does, and end together.

LTE_JAX_GROUP_KILLS sets how often one of them is killed (default 10).
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from test_tasks import ENCODER, WORDS, saved, sentences, write
from train_runs import without_clock

import lte_jax
from lte_jax import config, hf, processes, sharding
from lte_jax.config import CheckpointConfig, LTEConfig, MeshConfig, OptimConfig, UserError
from lte_jax.params import is_router

ROOT = Path(__file__).resolve().parents[1]
SOURCE = dataclasses.replace(tiny.CONFIG, vocab_size=260, num_kv_heads=4)  # a tensor axis of 4
ACROSS = MeshConfig(data=1, fsdp=1, tensor=4)  # each process holds half of every matrix, all rows
ROWS = MeshConfig(data=2, fsdp=2, tensor=1)
GROUP_KILLS = int(os.environ.get("LTE_JAX_GROUP_KILLS", "10"))
# What the others say when one is killed: we, or JAX.
TOLD = ("error: another process has ended", "error: stopped because process", "JAX distributed")
LONG = pytest.mark.skipif(
    "LTE_JAX_PROCESSES" not in os.environ, reason="whole runs by two processes: `make resume`"
)


@dataclasses.dataclass
class Group:
    """Processes of train.py."""

    popens: list[subprocess.Popen]
    errors: list[Path]

    def wait(self, seconds: float) -> None:
        """Waits so long, or until one has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and all(popen.poll() is None for popen in self.popens):
            time.sleep(0.01)

    def end(self, seconds: float = 900) -> tuple[list[int], list[str]]:
        """Waits for their end: exit codes and what they said on stderr."""
        until = time.monotonic() + seconds
        try:
            codes = [popen.wait(max(1, until - time.monotonic())) for popen in self.popens]
        finally:
            for popen in self.popens:
                popen.kill()
                popen.wait()
        return codes, [own_lines(path) for path in self.errors]


def own_lines(path: Path) -> str:
    """What a process has said, without what Gloo says of its connections."""
    lines = path.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def experiment(folder: Path, mesh: MeshConfig, steps: int = 2):
    """A run in which rounding stays rounding.

    Sums over devices differ in their order, and so in their last bits. With AdamW's usual eps a
    gradient of nothing but those would be a step of full size; ridge regression on few tokens
    makes them a thousand times larger.
    """
    lte = LTEConfig(expert_size=8, calibration_records=48)
    made = tiny.experiment(folder, mesh=mesh, lte=lte, optim=OptimConfig(eps=1e-3))
    stage = dataclasses.replace(made.stages.router, steps=steps)
    stages = dataclasses.replace(made.stages, router=stage)
    source = dataclasses.replace(made.source, scratch=SOURCE)
    return dataclasses.replace(made, source=source, stages=stages)


def start(folder: Path, made, workdir: Path, seeds: tuple[int, ...] = (0, 0)) -> Group:
    """Processes with four devices in all, as a user starts them: one for each of the seeds."""
    file = folder / "experiment.py"
    plain = dataclasses.asdict(made)
    file.write_text(
        "from lte_jax import config\n\ndef get_config(arg=''):\n"
        f"    made = config.from_mapping(config.Experiment, {plain!r})\n"
        "    return config.to_config_dict(made)\n"
    )
    words = ["train.py", f"--workdir={workdir}", f"--config={file}"]
    return launched(folder, [[*words, f"--config.seed={seed}"] for seed in seeds])


def launched(folder: Path, commands: Sequence[Sequence[str]]) -> Group:
    """Processes of Python with four devices in all, of these words and the flags of `add_flags`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    count = len(commands)
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(4 // count), "JAX_PLATFORMS": "cpu"}
    popens, errors = [], []
    for process, words in enumerate(commands):
        flags = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={process}"]
        errors.append(folder / f"{process}.err")
        with errors[-1].open("w") as err, (folder / f"{process}.out").open("w") as out:
            command = [sys.executable, *words, *flags]
            popens.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
    return Group(popens, errors)


def alone(made, workdir: Path, devices: int = 4) -> None:
    """The run by this process."""
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh: make(mesh, jax.devices()[:devices]))
        lte_jax.train(made, workdir)


def assert_same_run(one: Path, other: Path, routers: float = 1e-4) -> None:
    """The losses of all steps, and all tensors of all folders; `routers` over their largest."""
    metrics = [
        [without_clock(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        for root in (one, other)
    ]
    assert len(metrics[0]) == len(metrics[1]) > 0
    for here, there in zip(*metrics, strict=True):
        assert here.keys() == there.keys() and here["stage"] == there["stage"]
        for name in {*here} & {"step", "loss", "validation_loss", "sparsity"}:
            assert here[name] == pytest.approx(there[name], rel=1e-5, abs=1e-6), (name, here, there)
    for folder in ("dense", "experts", "lte"):
        models = [lte_jax.load(root / folder) for root in (one, other)]
        (model, params), (other_model, other_params) = models
        assert model.config == other_model.config
        for path, array in flatten_dict(params, sep="/").items():
            there = np.asarray(flatten_dict(other_params, sep="/")[path])
            bound = routers * np.abs(there).max() if is_router(path) else 1e-5
            np.testing.assert_allclose(array, there, rtol=1e-5, atol=bound, err_msg=path)
        orders = [hf.load_expert_order(root / folder) for root in (one, other)]
        assert np.array_equal(*orders) if folder != "dense" else orders == [None, None]


def stops(root: Path) -> list[tuple[str, str]]:
    """Stage and step of each line of the metrics."""
    file = root / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(line["stage"], line["step"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(2, marks=[pytest.mark.slow, LONG]),
        pytest.param(4, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_several_processes_do_what_one_does_with_tensor_across_them(tmp_path, count):
    made = experiment(tmp_path / "texts", ACROSS)
    group = start(tmp_path, made, tmp_path / "many", (0,) * count)
    alone(made, tmp_path / "one")
    codes, errors = group.end()
    assert codes == [0] * count, errors
    assert_same_run(tmp_path / "one", tmp_path / "many")
    assert (tmp_path / "0.out").read_text().count("mesh:") == 1
    for other in range(1, count):
        assert not own_lines(tmp_path / f"{other}.out") and not errors[other]


def of_a_folder(folder: Path, mesh: MeshConfig):
    """A Llama that a run before has left, in Hugging Face's format."""
    made = experiment(folder, mesh)
    alone(made, folder / "before")
    source = config.SourceConfig(path=str(folder / "before/dense"))
    return dataclasses.replace(made, source=source)


def of_a_task(folder: Path, mesh: MeshConfig):
    """A classifier from an encoder's folder, whose records are pairs of texts and labels."""
    transformers = pytest.importorskip("transformers")
    vocabulary = folder / "vocab.txt"
    folder.mkdir()
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    encoder = saved(ENCODER, transformers.BertTokenizer(str(vocabulary)), folder / "encoder")
    texts = write(folder / "sst2/train.jsonl", sentences(64))
    write(folder / "sst2/validation.jsonl", sentences(16, seed=1))
    made = experiment(folder / "unused", mesh)
    task = {"task": "sst2", "train": str(texts), "length": 12, "pack": False}
    return dataclasses.replace(
        made,
        source=config.SourceConfig(path=str(encoder)),
        data=dataclasses.replace(made.data, **task),
        sample_tokens=0,
    )


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("mesh", [ACROSS, ROWS], ids=["across", "rows"])
@pytest.mark.parametrize("of", [of_a_folder, of_a_task])
def test_two_processes_train_what_folders_hold(tmp_path, of, mesh):
    made = of(tmp_path / "own", mesh)
    group = start(tmp_path, made, tmp_path / "many")
    alone(made, tmp_path / "one")
    codes, errors = group.end()
    assert codes == [0, 0], errors
    # The classifier's twenty words make the regression that routers start from nearly singular.
    assert_same_run(tmp_path / "one", tmp_path / "many", 1e-3 if of is of_a_task else 1e-4)


@pytest.mark.slow
@LONG
def test_sigterm_to_one_saves_both_and_one_process_goes_on(tmp_path):
    """On another mesh, to what an undisturbed run of one process ends in."""
    made = experiment(tmp_path / "texts", ROWS, steps=40)
    made = dataclasses.replace(made, checkpoint=CheckpointConfig(every=1000), eval_every=20)
    group = start(tmp_path, made, tmp_path / "run")
    alone(made, tmp_path / "one")
    while "router" not in dict(stops(tmp_path / "run")) and group.popens[0].poll() is None:
        time.sleep(0.02)
    group.popens[1].send_signal(signal.SIGTERM)
    codes, errors = group.end()
    assert codes == [143, 143], errors
    told = [re.search(r"^stopped by SIGTERM after (step \d+ of .*):", err, re.M) for err in errors]
    assert told[0] and told[1] and told[0][1] == told[1][1], errors
    stage, step = stops(tmp_path / "run")[-1]
    assert told[0][1] == f"step {step} of stage {stage!r}" and step < 40
    other = dataclasses.replace(made, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    alone(other, tmp_path / "run", devices=8)
    assert_same_run(tmp_path / "one", tmp_path / "run")


def made_of(root: Path) -> dict[str, Any]:
    """All that a run must end in, whatever happened on the way."""
    found: dict[str, Any] = {
        str(file.relative_to(root)): file.read_bytes()
        for folder in ("dense", "experts", "lte")
        for file in sorted((root / folder).iterdir())
    }
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return found | {"metrics": [without_clock(line) for line in lines]}


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error"), True),
        (ValueError("a connection of layers"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: a bug"), False),
    ],
)
def test_errors_that_say_that_another_is_gone(error, gone):
    assert processes._is_of_connection(error) is gone


@pytest.mark.slow
@pytest.mark.long
def test_kills_of_one_of_four_at_random_moments_change_no_bit(tmp_path, monkeypatch):
    """All end with a line that says so; the same command goes on."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    keep = CheckpointConfig(every=1, keep_last=1, keep_best=0, keep_finished=False)
    made = experiment(tmp_path / "texts", ROWS, steps=6)
    made = dataclasses.replace(made, checkpoint=keep)
    for name in ("warm", "whole"):
        begin = time.monotonic()
        codes, errors = start(tmp_path, made, tmp_path / name, (0,) * 4).end()
        assert codes == [0] * 4, errors
    usual, dice, met = time.monotonic() - begin, random.Random(0), 0
    expected, runs = made_of(tmp_path / "whole"), itertools.count()
    workdir = tmp_path / f"run {next(runs)}"
    while met < GROUP_KILLS:
        group, victim = start(tmp_path, made, workdir, (0,) * 4), dice.randrange(4)
        group.wait(dice.uniform(0.2, 1.0) * usual)
        killed = group.popens[victim].poll() is None
        group.popens[victim].kill()
        codes, errors = group.end()
        others = {*range(4)} - {victim}
        if killed and any(codes[process] for process in others):
            met += 1
            assert codes[victim] == -signal.SIGKILL and 0 not in codes, (codes, errors)
            for process in others:
                assert any(words in errors[process] for words in TOLD), (process, errors[process])
        elif codes == [0] * 4:  # else all had done their work, and one was on its way out
            assert made_of(workdir) == expected
            workdir = tmp_path / f"run {next(runs)}"
    codes, errors = start(tmp_path, made, workdir, (0,) * 4).end()
    assert codes == [0] * 4, errors
    assert made_of(workdir) == expected


@pytest.mark.slow
def test_an_error_of_one_process_ends_both_with_a_line_each(tmp_path):
    made = experiment(tmp_path / "texts", ROWS)
    group = start(tmp_path, made, tmp_path / "run", seeds=(0, 1))
    codes, errors = group.end()
    assert codes == [2, 2], errors
    why = "process 1 has other settings than process 0 (seed): start all with the same command"
    assert errors[1].startswith(f"error: {why}") and errors[1].count("\n") == 1
    last = errors[0].splitlines()[-1]
    assert last.startswith(f"error: stopped because process 1 failed: {why}"), errors[0]


CHECKPOINTS = """
import argparse, pathlib, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from lte_jax import files, processes
from lte_jax.checkpoint import Checkpointer

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
processes.add_flags(parser)
flags = parser.parse_args()
digests, read = files._digests, []
files._digests = lambda paths: read.extend(paths) or digests(paths)
with processes.joined(flags), Checkpointer(flags.folder) as checkpointer:
    place = NamedSharding(jax.make_mesh((4,), ("x",)), P("x"))
    full = jax.jit(lambda n: jnp.full((4, 100, 100), n, jnp.float32), out_shardings=place)
    like = {"w": jax.ShapeDtypeStruct((4, 100, 100), jnp.float32, sharding=place)}
    for step in (1, 2):
        checkpointer.save(step, {"w": full(step)}, {"next_index": step})
    checkpointer.wait()
    processes.wait("saved")
    own = {path for path in read if "/2/" in str(path)}
    read.clear()
    assert checkpointer.restore(like)[0] == 2 and own and {*read} == own, (own, read)
    if jax.process_index() == 1:
        victim = max(own, key=lambda path: path.stat().st_size)
        victim.write_bytes(bytes(victim.stat().st_size))
    processes.wait("spoilt")
    step, state, seen = checkpointer.restore(like)
    assert step == 1 and seen == {"next_index": 1}
    assert all((shard.data == 1).all() for shard in state["w"].addressable_shards)
    print("done")
"""


@pytest.mark.slow
def test_each_process_checks_the_part_of_a_checkpoint_that_it_wrote(tmp_path):
    """What the second one finds spoilt, neither restores."""
    group = launched(tmp_path, [["-c", CHECKPOINTS, str(tmp_path / "steps")]] * 2)
    codes, errors = group.end()
    assert codes == [0, 0], errors
    assert [own_lines(tmp_path / f"{n}.out") for n in (0, 1)] == ["done\n"] * 2
    assert "steps/2: state/ocdbt.process_1/" in errors[0] and "is corrupt" in errors[0]
    assert (tmp_path / "steps" / "damaged" / "2").is_dir()


# ---------------------------------------------------------------------------------------- joining


def flags(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"coordinator": None, "processes": None, "process": None} | given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"coordinator": "a:1"}, "--processes and --process missing"),
        ({"processes": 2, "process": 0}, "--coordinator missing"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator=a: expected HOST:PORT"),
        ({"coordinator": "a:b", "processes": 2, "process": 0}, "--coordinator=a:b: expected"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process=2 of --processes=2"),
        ({"coordinator": "a:1", "processes": 2, "process": -1}, "--process=-1 of --processes=2"),
    ],
)
def test_bad_input_flags(given, told):
    with pytest.raises(UserError, match=re.escape(told)), processes.joined(flags(**given)):
        pytest.fail("it joined")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}
SLURM |= {"SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, ""),
        (SLURM | {"SLURM_NTASKS": "16"}, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, ""),  # without srun
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        (POD, ""),
        (POD | {"JOB_COMPLETION_INDEX": "0"}, "k8s"),
    ],
)
def test_several_processes_of_a_launcher_are_noticed(variables, launcher, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    there = {"kubernetes": "there", "libtpu": None}
    monkeypatch.setattr(importlib.util, "find_spec", there.__getitem__)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
    with processes.joined(flags()):
        assert bool(joined) == bool(launcher) == bool(processes._launcher())
        assert processes._launcher() == launcher
    joined.clear()
    with processes.joined(flags(processes=1)):
        assert not joined


def test_the_processes_of_a_tpu_are_those_that_jax_finds(monkeypatch):
    """Where libtpu is but no TPU, JAX says so, and the process is alone; nothing else is hidden."""
    monkeypatch.setattr(processes, "_launcher", lambda: "tpu")
    errors = iter([ValueError("no coordinator"), RuntimeError("cannot connect\nat all")])

    def initialize(**given):
        raise next(errors)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with processes.joined(flags()):
        assert jax.process_count() == 1
    with pytest.raises(UserError, match=r"not found \(cannot connect\)"):
        processes.joined(flags()).__enter__()


def test_one_process_agrees_with_itself():
    assert processes.on_first(lambda: {"a": [1]}) == {"a": [1]}
    assert processes.exchanged("name", 3) == [3]
    assert processes.spread(lambda start: "abc"[start:], str.upper, None) == ["A", "B", "C"]
    processes.wait("here")


# ------------------------------------------------------------------------------------------ files


def test_the_slurm_script_is_one():
    script = ROOT / "docs" / "launch" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives a task one GPU
    [line] = re.findall(r"^srun \S+ python (train\.py .*)$", text, re.MULTILINE)
    assert_parses(line.split()[1:])


def test_the_kubernetes_manifest_is_one():
    yaml = pytest.importorskip("yaml", reason="no PyYAML")
    service, job = yaml.safe_load_all((ROOT / "docs/launch/kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    [container] = pod["containers"]
    [line] = container["args"]
    words = line.replace("$JOB_COMPLETION_INDEX", "1").split()
    assert words[:3] == ["exec", "lte-jax", "train"]
    given = assert_parses(words[3:])
    port = container["ports"][0]["containerPort"]
    assert given.coordinator == f"{job['metadata']['name']}-0.{pod['subdomain']}:{port}"
    assert given.processes == spec["completions"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def assert_parses(words: list[str]) -> argparse.Namespace:
    """The flags of `train` and its configuration, from a line of a script."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--workdir", required=True)
    processes.add_flags(parser)
    given, made = config.parse_flags(parser, words)
    assert made.source.path and given.workdir
    return given
