"""Writers survive being killed and resumed."""

import io
import json
import math
import sys

import pytest

from lte_jax.config import UserError
from lte_jax.writers import (
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    TerminalWriter,
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


def test_jsonl_is_json_even_for_nan(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write("router", 1, {"loss": math.nan, "efficiency_weight": math.inf, "threshold": 0.5})
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "stage": "router", "step": 1, "loss": None, "efficiency_weight": None, "threshold": 0.5,
    }  # fmt: skip


def test_terminal_writes_plain_lines_off_a_terminal(monkeypatch):
    clock = iter([0.0, 0.0, 2.0, 2.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    file = io.StringIO()
    writer = TerminalWriter(tokens_per_step=4096, file=file)
    writer.start("router", 20, 100)
    writer.write("router", 30, {"task": 2.5, "grad_norm": 1.0})
    writer.write("router", 40, {"task": 2.25, "sparsity": 0.5})
    writer.close()
    first, second = file.getvalue().splitlines()
    assert first == "router 30/100  loss 2.5"  # no speed yet: the first steps were compiled
    assert second == "router 40/100  loss 2.25  sparsity 0.5  20.5k tokens/s  00:12 left"


def test_terminal_shows_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    writer = TerminalWriter(tokens_per_step=4096, file=file)
    for stage in "router", "adapt":
        writer.start(stage, 20, 100)
        writer.write(stage, 30, {"task": 2.5})
        writer.write(stage, 30, {"validation_loss": 2.75})
        writer.write(stage, 50, {"task": 2.25})
    writer.close()
    for stage in "router", "adapt":
        shown = [part for part in file.getvalue().split("\r") if part.startswith(stage)]
        assert " 20/100 " in shown[0]
        assert " 50/100 " in shown[-1] and "loss 2.25, val 2.75" in shown[-1]


def test_tensorboard_events_are_there(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    writer = TensorBoardWriter(tmp_path)
    writer.start("router", 0, 10)
    writer.write("router", 1, {"loss": 2.5})
    writer.close()
    [events] = (tmp_path / "router").iterdir()
    assert b"loss" in events.read_bytes()


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
