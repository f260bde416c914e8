"""Runs of train.py as processes: what they are at, told from outside, and what they leave."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lte_jax.writers import CLOCK

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("finetune", "router", "adapt")
STEPS = 6  # a stage
CONFIG = f"""
import runpy

def get_config(arg=""):
    c = runpy.run_path({str(ROOT / "configs" / "demo.py")!r})["get_config"]("smoke")
    for stage in c.stages.values():
        stage.steps = {STEPS}
    c.log_every = c.checkpoint.every = 1
    c.checkpoint.keep_finished = False
    c.eval_every = 3
    return c
"""


def phase(workdir: Path) -> str:
    """What the run that writes a work directory is at."""
    names = set(os.listdir(workdir)) if workdir.is_dir() else set()
    if any(name.startswith((".dense.", ".experts.", ".lte.")) for name in names):
        return "exporting"
    steps = [step for stage in STAGES for step in (workdir / "checkpoints" / stage).glob("[0-9]*")]
    if "lte" not in names and any(not (step / "manifest.json").exists() for step in steps):
        return "saving"
    if "lte" in names:
        drawn = any(name.endswith((".png", ".md")) for name in names)
        return "end" if "results.json" in names else "figures" if drawn else "results"
    if "experts" in names:
        if (workdir / "checkpoints" / "adapt" / str(STEPS) / "manifest.json").exists():
            return "last"
        return "adapt" if (workdir / "checkpoints" / "adapt").exists() else "router"
    if "dense" in names:
        return "grouping"
    return "finetune" if "experiment.json" in names else "tokenising" if names else "start"


@dataclasses.dataclass
class Visit:
    """A phase that a run was seen in, in seconds of its clock."""

    phase: str
    begin: float
    end: float


@dataclasses.dataclass
class Process:
    """train.py at work."""

    popen: subprocess.Popen
    workdir: Path
    stderr: Path

    def follow(self, stop: Callable[[list[Visit]], bool] = lambda visits: False) -> list[Visit]:
        """Watches it until it ends or `stop` says so; what was seen."""
        start = time.monotonic()
        visits = [Visit("start", 0.0, 0.0)]
        while self.popen.poll() is None and not stop(visits):
            now, at = time.monotonic() - start, phase(self.workdir)
            visits[-1].end = now
            if at != visits[-1].phase:
                visits.append(Visit(at, now, now))
            time.sleep(0.005)
        return visits

    def end(self, seconds: float = 120) -> str:
        """Waits for its end; what it said on stderr."""
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"it did not end:\n{self.stderr.read_text()[-2000:]}") from None
        return self.stderr.read_text()


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
        self.folder = folder
        self.started: list[subprocess.Popen] = []

    def start(self, workdir: Path, script: Sequence[str] = ("train.py",)) -> Process:
        command = [sys.executable, *script, f"--config={self.config}", f"--workdir={workdir}"]
        stderr = self.folder / f"{'-'.join(workdir.parts[-3:])}-{time.monotonic_ns()}.err"
        with stderr.open("w") as file:
            popen = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=subprocess.DEVNULL, stderr=file
            )
        self.started.append(popen)
        return Process(popen, workdir, stderr)

    def finish(self, workdir: Path) -> str:
        """Runs to the end; what it said on stderr."""
        process = self.start(workdir)
        err = process.end(600)
        assert process.popen.returncode == 0, err
        return err


def without_clock(line: str) -> dict:
    """A line of metrics.jsonl without times: all else is the same in an interrupted run."""
    record = json.loads(line)
    assert record["seconds"] > 0, record
    return {name: value for name, value in record.items() if name not in CLOCK}


def remains(workdir: Path) -> dict:
    """All that a run must end in, whatever happened on the way."""
    found: dict = {
        str(file.relative_to(workdir)): file.read_bytes()
        for folder in ("dense", "experts", "lte")
        for file in sorted((workdir / folder).iterdir())
    }
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [without_clock(line) for line in lines]
    found["results"] = json.loads((workdir / "results.json").read_text())
    del found["results"]["environment"]
    for model in found["results"]["models"]:
        del model["latency_ms"], model["latency_ratio"], model["latency_noise"]
    found["report"] = sorted(p.name for p in workdir.glob("*") if p.suffix in (".md", ".png"))
    hidden = [path for path in workdir.rglob("*") if path.name[0] == "." and path.name != ".lock"]
    hidden += workdir.rglob("*checkpoint-tmp*")
    hidden = [path for path in hidden if "damaged" not in path.parts]  # kept for one more start
    found["left over"] = sorted(str(path.relative_to(workdir)) for path in hidden)
    return found


def assert_same(workdir: Path, expected: dict) -> None:
    """Bit for bit; names what differs."""
    found = remains(workdir)
    different = [k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)]
    assert not different, {k: str(found.get(k))[:300] for k in different}
