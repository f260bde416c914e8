"""A run that is killed, stopped or finds its newest checkpoint damaged ends as if nothing happened.

LTE_JAX_KILLS sets how many runs are killed at random moments (default 3; `make resume` does 20).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("LTE_JAX_KILLS", "3"))
STEPS = 6  # a stage
CONFIG = f"""
import runpy

def get_config(arg=""):
    c = runpy.run_path({str(ROOT / "configs" / "demo.py")!r})["get_config"]("smoke")
    for stage in c.stages.values():
        stage.steps = {STEPS}
    c.log_every = c.checkpoint.every = 1
    c.eval_every = 3
    c.report = False
    return c
"""


class Runs:
    """Starts train.py on one small experiment, with a compilation cache that all runs share."""

    def __init__(self, folder: Path):
        self.config = folder / "experiment.py"
        self.config.write_text(CONFIG)
        self.env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
        }
        self.env.pop("XLA_FLAGS", None)

    def start(self, workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "train.py", f"--config={self.config}", f"--workdir={workdir}"]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, workdir: Path) -> str:
        """Runs to the end; what it said on stderr."""
        process = self.start(workdir)
        _, err = process.communicate()
        assert process.returncode == 0, err
        return err


def result(workdir: Path) -> bytes:
    """Every bit of the parameters, and the threshold, which is in the configuration."""
    lte = workdir / "lte"
    return (lte / "model.safetensors").read_bytes() + (lte / "config.json").read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory):
    """(result, seconds) of a run that nothing happens to, once everything is compiled."""
    runs.finish(tmp_path_factory.mktemp("warm") / "run")
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    start = time.monotonic()
    runs.finish(workdir)
    return result(workdir), time.monotonic() - start


@pytest.mark.parametrize("kill", range(KILLS))
def test_resume_after_sigkill_gives_the_same_bits(runs, uninterrupted, tmp_path, kill):
    expected, seconds = uninterrupted
    moment = random.Random(kill).uniform(0.3, 1.0) * seconds  # imports take the first part
    process = runs.start(tmp_path / "run")
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    runs.finish(tmp_path / "run")
    assert result(tmp_path / "run") == expected
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(x["stage"], x["step"]) for x in lines if "loss" in x]
    stages = ("finetune", "router", "adapt")
    assert steps == [(stage, i + 1) for stage in stages for i in range(STEPS)]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)


def test_resume_after_sigterm_gives_the_same_bits(runs, uninterrupted, tmp_path):
    process = runs.start(tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "router" / "1" / "manifest.json", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 0, err
    if "stopped by SIGTERM" not in err:
        pytest.skip("the run was over before the signal came")
    assert not (tmp_path / "run" / "results.json").exists()
    runs.finish(tmp_path / "run")
    assert result(tmp_path / "run") == uninterrupted[0]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_resume_names_a_damaged_checkpoint_and_uses_the_one_before(
    runs, uninterrupted, tmp_path, damage
):
    process = runs.start(tmp_path / "run")
    stage = tmp_path / "run" / "checkpoints" / "router"
    wait_for(stage / "3" / "manifest.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = max(int(p.parent.name) for p in stage.glob("[0-9]*/manifest.json"))
    victim = max(
        (stage / str(newest) / "state").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    finished = (tmp_path / "run" / "lte").exists()
    err = runs.finish(tmp_path / "run")
    if not finished and not (tmp_path / "run" / "checkpoints" / "adapt").exists():
        assert str(stage / str(newest)) in err and victim.name in err
    assert result(tmp_path / "run") == uninterrupted[0]
