"""A run that is killed, stopped, out of disk or robbed of a checkpoint ends as if nothing happened.

LTE_JAX_KILLS sets how many runs are killed (default 2), LTE_JAX_STOPS how many are stopped by a
signal (1), LTE_JAX_DISKS how many meet a full disk (1); `make resume` does 60, 12 and 10.
"""

import collections
import concurrent.futures
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from train_runs import (
    STAGES,
    STEPS,
    Process,
    Runs,
    Visit,
    assert_same,
    phase,
    remains,
    without_clock,
)

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("LTE_JAX_KILLS", "2"))
STOPS = int(os.environ.get("LTE_JAX_STOPS", "1"))
DISKS = int(os.environ.get("LTE_JAX_DISKS", "1"))
# Dealt out in this order; grouping holds the routers' start, `last` the final threshold.
PHASES = (
    *("exporting", "figures", "grouping", "saving", "last", "adapt", "results", "tokenising"),
    *("router", "finetune", "start"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("resume"))
    yield made
    for popen in made.started:
        popen.kill()
        popen.wait()


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory):
    """(what remains, visits, lines of stderr) of an undisturbed run, once all is compiled."""
    runs.finish(tmp_path_factory.mktemp("warm") / "run")
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = runs.start(workdir)
    visits = process.follow()
    err = process.end()
    assert process.popen.returncode == 0, err
    expected = remains(workdir)
    steps = [(x["stage"], x["step"]) for x in expected["metrics"]]
    assert steps == [(stage, i + 1) for stage in STAGES for i in range(STEPS)]
    assert not expected["left over"] and len(expected["report"]) == 4
    return expected, visits, set(err.splitlines())


def until(process: Process, target: str, usual: list[Visit], dice: random.Random) -> str:
    """Waits for a random moment of a phase (one of its visits, if it has many); where that fell."""
    lengths = [visit.end - visit.begin for visit in usual if visit.phase == target] or [0.0]
    turn = dice.randrange(len(lengths))
    delay = dice.random() * lengths[turn]

    def due(visits: list[Visit]) -> bool:
        seen = [visit for visit in visits if visit.phase == target][turn:]
        return bool(seen) and (seen[0].end - seen[0].begin >= delay or visits[-1] is not seen[0])

    return process.follow(due)[-1].phase


def disturb(runs, workdir, target: str, usual: list[Visit], dice: random.Random, signals) -> str:
    """Starts a run and sends `signals` at a random moment of a phase; where they met it.

    "over" where the run came to its end before.
    """
    process = runs.start(workdir)
    at = until(process, target, usual, dice)
    over = process.popen.poll() is not None
    for i, number in enumerate(signals):
        time.sleep(0.5 * (i > 0))
        process.popen.send_signal(number)
    err, code = process.end(), process.popen.returncode
    if over:
        assert code == 0, err
        return "over"
    if signals[0] == signal.SIGKILL:
        assert code in (-signal.SIGKILL, 0), err
        return phase(workdir)
    # A second signal may meet an interpreter that is all but gone: -2 is a shell's 130.
    at_last = -signals[0] if len(signals) > 1 else 0
    assert code in (128 + signals[0], at_last, 0), (code, err)
    assert "Traceback" not in err, err
    assert code == 0 or len([line for line in err.splitlines() if "stopped" in line]) == 1, err
    return at


def in_parallel(count: int, work: Callable[[int], str]) -> list[concurrent.futures.Future]:
    """Futures of work(0), work(1), ..., as many at a time as there are cores for us; all done."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [pool.submit(work, i) for i in range(count)]


def told(title: str, futures, capsys) -> collections.Counter:
    """How many of what `futures` met was met in which phase, printed."""
    met = collections.Counter()
    for future in futures:
        met.update(future.result() if future.exception() is None else ["failed"])
    with capsys.disabled():
        print(f"\n{title}: " + ", ".join(f"{name} {n}" for name, n in met.most_common()))
    return met


@pytest.fixture(scope="module")
def killed(runs, uninterrupted, tmp_path_factory):
    """Each run killed in a phase of its own, every third twice; then brought to its end."""
    expected, usual, _ = uninterrupted

    def work(i: int) -> list[str]:
        dice, workdir = random.Random(i), tmp_path_factory.mktemp("killed") / "run"
        first = PHASES[i % len(PHASES)]
        targets = [first, dice.choice(PHASES)] if i % 3 == 2 else [first]
        kill = [signal.SIGKILL]
        met = [disturb(runs, workdir, target, usual, dice, kill) for target in targets]
        runs.finish(workdir)
        assert_same(workdir, expected)
        shutil.rmtree(workdir)
        return met

    return in_parallel(KILLS, work)


@pytest.mark.parametrize("kill", range(KILLS))
def test_resume_after_sigkill_gives_the_same_bits(killed, kill):
    killed[kill].result()


def test_resume_kills_met_every_phase(killed, capsys):
    met = told(f"{KILLS} runs killed", killed, capsys)
    missed = set(PHASES) - met.keys()
    assert KILLS < 3 * len(PHASES) or not missed, missed


@pytest.fixture(scope="module")
def stopped(runs, uninterrupted, tmp_path_factory):
    """Runs stopped by SIGTERM, by Ctrl-C, or by Ctrl-C twice, in a phase each."""
    expected, usual, _ = uninterrupted
    ways = ([signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT])
    phases = ("last", "saving", *(p for p in PHASES if p not in ("last", "saving", "start")))

    def work(i: int) -> list[str]:
        dice, workdir = random.Random(i), tmp_path_factory.mktemp("stopped") / "run"
        at = phases[i % len(phases)]
        met = disturb(runs, workdir, at, usual, dice, ways[i % len(ways)])
        runs.finish(workdir)
        assert_same(workdir, expected)
        return [met]

    return in_parallel(STOPS, work)


@pytest.mark.parametrize("stop", range(STOPS))
def test_resume_after_sigterm_or_ctrl_c_gives_the_same_bits(stopped, stop):
    stopped[stop].result()


def test_resume_stops_are_told(stopped, capsys):
    told(f"{STOPS} runs stopped", stopped, capsys)


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """Small file systems, each empty."""
    places = [tmp_path_factory.mktemp("disk") for _ in range(DISKS)]
    mounted = []
    for place in places:
        command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(place)
    yield places
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_resume_after_a_full_disk_gives_the_same_bits(runs, uninterrupted, disks, capsys):
    """Somebody else's file takes all that is free, at a random moment of each phase."""
    expected, usual, said_usually = uninterrupted
    phases = (
        "saving",
        "figures",
        "exporting",
        "results",
        "finetune",
        "router",
        "adapt",
        "grouping",
    )

    def work(i: int) -> list[str]:
        dice, workdir, filler = random.Random(i), disks[i] / "run", disks[i] / "filler"
        process = runs.start(workdir)
        at = until(process, phases[i % len(phases)], usual, dice)
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:  # until it is full, whatever the run itself takes or frees meanwhile
                file.write(bytes(1 << 12))
        err = process.end()
        metrics = workdir / "metrics.jsonl"
        before = metrics.read_text().splitlines() if metrics.exists() else []
        before = [without_clock(line) for line in before if line.endswith("}")]
        filler.unlink()
        if process.popen.returncode:  # else there was nothing left to write
            steps = rf"({'|'.join(STAGES)}) \d+/{STEPS} "
            said = [line for line in err.splitlines() if not re.match(steps, line)]
            said = [line for line in said if line not in said_usually]
            assert process.popen.returncode == 2, (at, err)
            assert len(said) == 1 and said[0].startswith("error: "), (at, said)
            assert "No space left" in said[0] and len(said[0]) < 520, said[0]
            runs.finish(workdir)
        assert_same(workdir, expected)
        after = [without_clock(line) for line in metrics.read_text().splitlines()]
        assert after[: len(before)] == before
        return [at]

    futures = in_parallel(DISKS, work)
    told(f"{DISKS} full disks", futures, capsys)
    for future in futures:
        future.result()


def wait_for(path: Path, process: Process) -> None:
    process.follow(lambda visits: path.exists())
    assert path.exists(), process.stderr.read_text()


def test_resume_names_a_damaged_checkpoint_and_uses_the_one_before(runs, uninterrupted, tmp_path):
    """One file, one sort of damage: of each file and sort see tests/test_checkpoint.py."""
    process = runs.start(tmp_path / "run")
    stage = tmp_path / "run" / "checkpoints" / "router"
    wait_for(stage / "3" / "manifest.json", process)
    process.popen.kill()
    process.end()
    newest = max(int(p.parent.name) for p in stage.glob("[0-9]*/manifest.json"))
    victim = max(
        (stage / str(newest) / "state").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    finished = (tmp_path / "run" / "lte").exists()
    err = runs.finish(tmp_path / "run")
    if not finished and not (tmp_path / "run" / "checkpoints" / "adapt").exists():
        assert str(stage / str(newest)) in err and victim.name in err
    assert_same(tmp_path / "run", uninterrupted[0])


DYING = """
import os, shutil, signal
from pathlib import Path
from lte_jax import checkpoint
from lte_jax.cli import train

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def remove(folder):
    if folder.name == "router":
        {}
    real(folder)

real, checkpoint._remove = checkpoint._remove, remove
train.main()
"""


def test_resume_between_two_stages_when_only_one_has_checkpoints(runs, uninterrupted, tmp_path):
    """Killed as the second's first is whole; again half-way through clearing the first's."""
    workdir = tmp_path / "run"
    router, adapt = (workdir / "checkpoints" / name for name in ("router", "adapt"))
    for at, left in ("die()", [True, True]), ("shutil.rmtree = die", [False, True]):
        process = runs.start(workdir, ["-c", DYING.format(at)])
        err = process.end(600)
        assert process.popen.returncode == -signal.SIGKILL, err
        assert [router.exists(), (adapt / "1" / "manifest.json").exists()] == left
    assert (workdir / "checkpoints" / "deleting-router").exists()
    runs.finish(workdir)
    assert_same(workdir, uninterrupted[0])


def test_resume_a_second_run_is_refused_and_ctrl_c_in_a_save_ends_the_first(runs, tmp_path):
    first = runs.start(tmp_path / "run")
    wait_for(tmp_path / "run" / "experiment.json", first)
    second = runs.start(tmp_path / "run")
    *_, said = second.end().splitlines()
    assert second.popen.returncode == 2
    assert said.startswith("error: workdir ") and f"in use by process {first.popen.pid} " in said
    assert first.popen.poll() is None, first.stderr.read_text()
    while not list((tmp_path / "run").glob("checkpoints/*/*.orbax-checkpoint-tmp*")):
        assert first.popen.poll() is None, first.stderr.read_text()
        time.sleep(0.001)
    first.popen.send_signal(signal.SIGINT)
    said = first.end(60)
    assert first.popen.returncode == 130 and "stopped by SIGINT" in said, said
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("checkpoints/*/*.orbax-checkpoint-tmp*"))
