"""Signals end a program at a safe point, with the code of the signal and one line."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny

from lte_jax import (
    checkpoint,
    clustering,
    data,
    evaluation,
    interrupt,
    moefication,
    sharding,
    trainer,
    writers,
)
from lte_jax.config import CheckpointConfig, MeshConfig, StageConfig
from lte_jax.generation.decoding import Decoder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_next_check(number, code, capsys):
    before = signal.getsignal(number)
    reached = []
    with pytest.raises(SystemExit) as stopped, interrupt.handled("all is saved"):
        interrupt.check("before it came")
        os.kill(os.getpid(), number)
        reached.append("the save went on to its end")
        assert interrupt.requested()
        interrupt.check("while testing")
        reached.append("never")
    assert reached == ["the save went on to its end"]
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"stopped by {number.name} while testing: all is saved\n"
    assert signal.getsignal(number) is before and not interrupt.requested()


def test_a_signal_after_the_last_check_is_not_swallowed(capsys):
    with pytest.raises(SystemExit) as stopped, interrupt.handled("all is saved"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM at its end: all is saved\n"


def test_without_a_handler_check_does_nothing():
    interrupt.check("anywhere")
    with interrupt.handled("all is saved", install=False):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        interrupt.check("anywhere")


def test_other_threads_leave_signals_alone():
    found = []

    def work():
        with interrupt.handled("all is saved"):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_nested_handlers_tell_once(capsys):
    with pytest.raises(SystemExit), interrupt.handled("outer"), interrupt.handled("inner"):
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.check("within")
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------- safe points


def rows(count):
    tokens, segments = (np.asarray(tiny.batch(count)[k]) for k in ("tokens", "segments"))
    return data.Records(tokens, segments)


def fit(folder, steps=1):
    """A dense stage of a few steps."""
    model, params = tiny.model_and_params(None)
    one = StageConfig(steps=steps, learning_rate=1e-3)
    experiment = tiny.experiment(folder, checkpoint=CheckpointConfig(every=99), eval_every=99)
    return trainer.fit(
        model, tiny.stage("finetune", config=one), params, tiny.control(),
        (rows(8), rows(8)), experiment, folder / "checkpoints", writers.MultiWriter(()),
        mesh=sharding.make_mesh(MeshConfig()),
    )  # fmt: skip


def terminate(monkeypatch, owner, name):
    """SIGTERM on the way into a function."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def stopped(where, action, capsys):
    with pytest.raises(SystemExit) as end, interrupt.handled("all is saved"):
        action()
        pytest.fail("it went on to its end")
    assert end.value.code == 143
    assert f"stopped by SIGTERM {where}" in capsys.readouterr().err


def test_a_signal_in_the_last_step_of_a_stage_ends_the_run(tmp_path, monkeypatch, capsys):
    """Once its state is saved, from which the run resumes."""
    terminate(monkeypatch, trainer._Loop, "advance")
    stopped("after step 1 of stage 'finetune'", lambda: fit(tmp_path), capsys)
    assert (tmp_path / "checkpoints" / "1" / "manifest.json").exists()


def test_a_signal_in_the_last_save_of_a_stage_ends_the_run(tmp_path, monkeypatch, capsys):
    terminate(monkeypatch, checkpoint.Checkpointer, "save")
    stopped("after step 1 of stage 'finetune'", lambda: fit(tmp_path), capsys)
    assert (tmp_path / "checkpoints" / "1" / "manifest.json").exists()


LOOPS = {
    "tokenising": lambda: data.tokenize(["a", "b"], data.byte_tokenizer()),
    "grouping": lambda: clustering.balanced_kmeans(np.eye(8, dtype=np.float32), 2),
    "reading for grouping": lambda: next(
        moefication.coactivations(*tiny.model_and_params(None), rows(2).tokens_RL)
    ),
    "starting routers": lambda: moefication.add_routers(
        *tiny.model_and_params(), rows(2).tokens_RL
    ),
    "measuring": lambda: evaluation.perplexity(*tiny.model_and_params(), rows(2)),
    "setting the threshold": lambda: trainer.settle_threshold(
        *(*tiny.model_and_params(), tiny.control(), rows(8), 8),
        mesh=sharding.make_mesh(MeshConfig()),
    ),
    "timing": lambda: evaluation.decode_latency(
        [Decoder.of(*tiny.model_and_params())], np.arange(4)
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_long_loops_are_safe_points(loop, capsys):
    def action():
        os.kill(os.getpid(), signal.SIGTERM)
        LOOPS[loop]()

    stopped(f"while {loop.removeprefix('reading for ')}", action, capsys)


def test_a_validation_is_cut_short(tmp_path, monkeypatch, capsys):
    seen = []

    def eval_batches(rows, *args, **kwargs):
        for batch in original(rows, 8, **kwargs):
            seen.append(batch)
            yield batch
            os.kill(os.getpid(), signal.SIGTERM)

    original = data.eval_batches
    monkeypatch.setattr(trainer.data, "eval_batches", eval_batches)
    model, params = tiny.model_and_params(None)
    many = rows(32)
    monkeypatch.setattr(sys.modules[__name__], "rows", lambda count: many)
    stopped("after step 1 of stage 'finetune'", lambda: fit(tmp_path), capsys)
    assert len(seen) == 2  # of four


def test_a_second_signal_ends_at_once():
    code = (
        "import sys, time\nfrom lte_jax import interrupt\n"
        "with interrupt.handled('all is saved'):\n"
        "    print('ready', flush=True)\n    time.sleep(6)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # `timeout` signals the process and its group
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "stopped at once by a second signal; run the same command to resume\n"
