"""Writers survive being killed and resumed."""

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import types
import warnings

import pytest

from lte_jax.config import UserError
from lte_jax.writers import (
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    TerminalWriter,
    WandbWriter,
)


def lines(path):
    return [(r["stage"], r["step"]) for r in map(json.loads, path.read_text().splitlines())]


def run(path, stage, first, last, steps=10):
    writer = JsonlWriter(path)
    writer.start(stage, first, steps)
    for step in range(first + 1, last + 1):
        writer.write(stage, step, {"loss": 1.0 / step})
    writer.close()


def test_jsonl_resume_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(path, "router", 0, 5)
    run(path, "router", 3, 6)  # killed after 5, last saved at 3
    assert lines(path) == [("router", s) for s in range(1, 7)]
    run(path, "adapt", 0, 2)
    run(path, "adapt", 2, 3)
    assert lines(path) == [("router", s) for s in range(1, 7)] + [("adapt", s) for s in (1, 2, 3)]
    run(path, "adapt", 0, 1)
    assert lines(path) == [("router", s) for s in range(1, 7)] + [("adapt", 1)]
    run(path, "router", 4, 5)  # later stages go with it
    assert lines(path) == [("router", s) for s in range(1, 6)]


def test_jsonl_resume_drops_a_line_cut_off_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(path, "router", 0, 3)
    path.write_text(path.read_text()[:-5])
    run(path, "router", 3, 4)
    assert lines(path) == [("router", s) for s in (1, 2, 4)]


def test_jsonl_lines_of_an_earlier_version_get_the_names_of_today(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = [
        {"stage": "router", "step": 1, "task": 2.5, "loss": 0.1, "sparsity": 0.25},
        {"stage": "router", "step": 1, "validation_loss": 2.75},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    run(path, "router", 1, 2)
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first == {
        "stage": "router", "step": 1, "loss": 2.5, "objective": 0.1, "sparsity": 0.25,
    }  # fmt: skip
    assert second == old[1] and third == {"stage": "router", "step": 2, "loss": 0.5}


def test_jsonl_is_json_even_for_nan(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write("router", 1, {"loss": math.nan, "efficiency_weight": math.inf, "threshold": 0.5})
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "stage": "router", "step": 1, "loss": None, "efficiency_weight": None, "threshold": 0.5,
    }  # fmt: skip


def test_terminal_writes_plain_lines_off_a_terminal(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    file = io.StringIO()
    writer = TerminalWriter(file)
    writer.start("router", 20, 100)
    writer.write("router", 30, {"loss": 2.5, "grad_norm": 1.0, "validation_loss": 3.0})
    writer.write("router", 40, {"loss": 2.25, "sparsity": 0.5, "tokens_per_second": 20480.0})
    writer.close()
    first, second = file.getvalue().splitlines()
    assert first == "router 30/100  loss 2.5  validation_loss 3"
    assert second == "router 40/100  loss 2.25  sparsity 0.5  20.5k tokens/s  00:12 left"


def test_terminal_shows_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    writer = TerminalWriter(file)
    for stage in "router", "adapt":
        writer.start(stage, 20, 100)
        writer.write(stage, 30, {"loss": 2.5, "validation_loss": 2.75})
        writer.write(stage, 50, {"loss": 2.25})
    writer.close()
    for stage in "router", "adapt":
        shown = [part for part in file.getvalue().split("\r") if part.startswith(stage)]
        assert " 20/100 " in shown[0]
        assert " 50/100 " in shown[-1] and "loss 2.25, validation_loss 2.75" in shown[-1]


def test_tensorboard_events_are_there(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    writer = TensorBoardWriter(tmp_path)
    writer.start("router", 0, 10)
    writer.write("router", 1, {"loss": 2.5})
    writer.close()
    [events] = (tmp_path / "router").iterdir()
    assert b"loss" in events.read_bytes()


def test_tensorboard_shows_what_was_written(tmp_path):
    """Read back by TensorBoard itself, as its viewer does."""
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = pytest.importorskip(
            "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
        )
    for first in 0, 2:  # resumed from step 2
        writer = TensorBoardWriter(tmp_path)
        writer.start("router", first, 10)
        for step in range(first + 1, 5):
            writer.write("router", step, {"sparsity_per_layer/01": step / 8 + first})
        writer.close()
    seen = events.EventAccumulator(str(tmp_path / "router"), purge_orphaned_data=True)
    seen.Reload()
    assert seen.Tags()["scalars"] == ["sparsity_per_layer/01"]
    found = {event.step: event.value for event in seen.Scalars("sparsity_per_layer/01")}
    assert found == {1: 0.125, 2: 0.25, 3: 2.375, 4: 2.5}


FULL = """
import resource, sys
from pathlib import Path
from lte_jax.errors import UserError
from lte_jax.writers import TensorBoardWriter

writer = TensorBoardWriter(sys.argv[1])
writer.start("adapt", 0, 10000)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
values = {f"sparsity_per_layer/{i:02}": 0.5 for i in range(40)}
for step in range(1, 10000):
    size = sum(file.stat().st_size for file in Path(sys.argv[1]).rglob("events*"))
    try:
        writer.write("adapt", step, values)
    except UserError as error:
        sys.exit(f"{size} {error}")
"""


def test_tensorboard_on_a_full_disk_is_an_error_at_that_step(tmp_path):
    """In a process of its own: what waits for a thread that a full disk has ended waits forever."""
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    size, said = run.stderr.split(" ", 1)
    assert run.returncode == 1 and f"{tmp_path} cannot be written (File too large)" in said
    assert 16_000 < int(size) <= 20_000  # what came before is in the file


class FakeRun:
    """Takes what W&B's run would."""

    def __init__(self, said):
        self.said = said

    def define_metric(self, name, **how):
        self.said.append(("define", name, how))

    def log(self, values):
        self.said.append(("log", values))

    def finish(self):
        self.said.append(("finish",))


def test_wandb_is_told_each_step_of_each_stage(tmp_path, monkeypatch):
    said = []
    (tmp_path / "run").mkdir()

    def init(**settings):
        said.append(("init", settings))
        return FakeRun(said)

    fake = types.SimpleNamespace(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):  # a run that resumes keeps its id
        writer = WandbWriter("team/sparse", tmp_path / "run", {"seed": 3})
        writer.start("router", 0, 10)
        writer.write("router", 1, {"loss": 2.5})
        writer.close()
    first, again = (settings for what, settings in (s[:2] for s in said if s[0] == "init"))
    assert first == again and len(first.pop("id")) == 12
    assert first == {
        "entity": "team", "project": "sparse", "resume": "allow", "name": "run",
        "dir": str(tmp_path / "run"), "config": {"seed": 3},
    }  # fmt: skip
    assert said[1:5] == [
        ("define", "router/step", {}),
        ("define", "router/*", {"step_metric": "router/step"}),
        ("log", {"router/step": 1, "router/loss": 2.5}),
        ("finish",),
    ]


def test_bad_input_wandb_that_does_not_start(tmp_path, monkeypatch):
    def init(**settings):
        raise RuntimeError("No API key configured\nmore")

    fake = types.SimpleNamespace(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"wandb='x' cannot start \(No API key configured\): run"):
        WandbWriter("x", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'lte-jax\[wandb\]'"):
        WandbWriter("x", tmp_path, {})


def test_wandb_itself_writes_a_run_offline(tmp_path):
    """In a process of its own, as wandb starts others and warns of much."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs wandb: pip install 'lte-jax[wandb]'")
    code = (
        "import sys\nfrom lte_jax.writers import WandbWriter\n"
        "writer = WandbWriter('sparse', sys.argv[1], {'seed': 3})\n"
        "writer.start('router', 0, 10)\n"
        "writer.write('router', 1, {'loss': 2.5})\nwriter.close()\n"
    )
    env = os.environ | {"WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [written] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"router/loss" in written.read_bytes()


def test_multi_writer_writes_to_all(tmp_path):
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    writer = MultiWriter(map(JsonlWriter, paths))
    writer.start("router", 0, 10)
    writer.write("router", 1, {"loss": 2.5})
    writer.close()
    assert paths[0].read_text() == paths[1].read_text() != ""


def test_bad_input_tensorboard_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'lte-jax\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)


def test_bad_input_metrics_in_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    writer = JsonlWriter(tmp_path / "file" / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        writer.start("router", 0, 10)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        writer.write("router", 1, {"loss": 2.5})


def test_a_history_damaged_in_the_middle_is_kept_aside_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    run(path, "router", 0, 4)
    good = path.read_text().splitlines(keepends=True)
    damaged = good[0] + good[1][:9] + "\n" + good[2].replace('"stage"', '"sta') + good[3]
    path.write_text(damaged)
    run(path, "router", 4, 5)
    assert lines(path) == [("router", s) for s in (1, 4, 5)]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == damaged
    [said] = [r.getMessage() for r in caplog.records]
    assert "line 2 is damaged" in said and "metrics.jsonl.damaged" in said
