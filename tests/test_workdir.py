"""The work directory: one holder, one configuration, the same inputs, no leftovers of kills."""

import dataclasses
import fcntl
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
from train_runs import without_clock

import lte_jax
from lte_jax import (
    checkpoint,
    evaluation,
    hf,
    pipeline,
    preflight,
    report,
    runs,
    workdir,
)
from lte_jax.config import UserError
from lte_jax.workdir import Paths

ROOT = Path(__file__).resolve().parents[1]
RESULT = ("lte/model.safetensors", "lte/config.json", "dense/model.safetensors")


def results(root):
    found = {name: (root / name).read_bytes() for name in RESULT}
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return found | {"metrics": list(map(without_clock, lines))}


def refused(experiment, root, *words):
    with pytest.raises(UserError) as caught:
        lte_jax.train(experiment, root)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tiny.experiment(tmp_path_factory.mktemp("data"), report=True)


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """A run to its end that nothing happened to; tests work on copies of it."""
    root = tmp_path_factory.mktemp("finished") / "run"
    lte_jax.train(experiment, root)
    return root


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


# -------------------------------------------------------------------------------------------- lock


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path):
    root = tmp_path / "run"
    with workdir.held(root):
        (root / "half").write_text("the first one's")
        for other in (0, 1):  # the same thread and another one
            said = []

            def second(said=said):
                try:
                    with workdir.held(root):
                        pass
                except UserError as error:
                    said.append(str(error))

            if other:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            else:
                second()
            assert (
                len(said) == 1 and f"process {os.getpid()} on " in said[0] and " since " in said[0]
            )
        assert (root / "half").exists()
    with workdir.held(root):
        pass


def test_a_run_leaves_no_lock_when_it_is_killed(tmp_path):
    root = tmp_path / "run"
    code = (
        "import sys, time, pathlib\nfrom lte_jax import workdir\n"
        "with workdir.held(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], text=True, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    refused_by = pytest.raises(UserError, match=rf"in use by process {process.pid} on .*wait for")
    with refused_by, workdir.held(root):
        pass
    process.kill()
    process.communicate()
    assert str(process.pid) in (root / ".lock").read_text()
    with workdir.held(root):
        pass


def test_an_unused_directory_is_removed_again(tmp_path):
    with pytest.raises(ZeroDivisionError), workdir.held(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with workdir.held(tmp_path / "run"):
        pass
    assert "has no locks (Function not implemented)" in caplog.text


def test_train_takes_the_lock_of_the_directory_that_a_shell_would_mean(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(pipeline.trainer, "fit", lambda *_, **__: pytest.fail("it trains"))
    with workdir.held(tmp_path / "run"):
        for spelled in (str(tmp_path / "run"), "~/run", "~/run/"):
            refused(experiment, spelled, f"workdir {tmp_path / 'run'} is in use by process")


def test_a_directory_in_which_nothing_was_made_is_claimed_anew(experiment, tmp_path):
    paths = Paths(tmp_path)
    workdir.claim(paths, experiment, {})
    other = dataclasses.replace(experiment, seed=1)
    workdir.check_same(paths, other)
    workdir.claim(paths, other, {})
    assert json.loads(paths.experiment.read_text())["seed"] == 1
    (paths.checkpoints("finetune") / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"differs in config\.seed"):
        workdir.check_same(paths, experiment)


def test_bad_input_directory_of_another_run(experiment, copy):
    other = dataclasses.replace(experiment, lte=dataclasses.replace(experiment.lte, expert_size=16))
    refused(other, copy, "config.lte.expert_size", "new workdir")


def test_bad_input_directory_that_cannot_be_made(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    refused(experiment, tmp_path / "file" / "run", "file", "name another")


def test_report_and_logging_may_change_on_the_way(experiment, tmp_path):
    paths = Paths(tmp_path)
    workdir.claim(paths, experiment, {})
    paths.dense.mkdir()
    free = dataclasses.replace(
        experiment, report=False, report_dense=False, sample_prompt="y", log_every=7, eval_every=9
    )
    free = dataclasses.replace(free, checkpoint=dataclasses.replace(free.checkpoint, every=3))
    workdir.check_same(paths, free)
    workdir.claim(paths, free, {})
    assert workdir.read_experiment(paths) == free


def test_a_run_begun_with_keys_of_an_earlier_version_goes_on(experiment, tmp_path):
    paths = Paths(tmp_path)
    paths.dense.mkdir()
    values = json.loads(json.dumps(dataclasses.asdict(experiment)))
    compute, rows = values.pop("compute"), values["lte"].pop("calibration_records")
    values["source"] |= {"compute_dtype": compute["dtype"], "remat": compute["remat"]}
    values |= {"name": "experiment", "calibration_rows": rows}
    values["lte"]["seed"] = 0
    paths.experiment.write_text(json.dumps(values))
    workdir.check_same(paths, experiment)
    assert workdir.read_experiment(paths) == experiment
    absent = values["stages"]["router"].pop("dropout")  # which came later
    paths.experiment.write_text(json.dumps(values))
    workdir.check_same(paths, experiment)
    router = dataclasses.replace(experiment.stages.router, dropout=absent + 0.1)
    other = dataclasses.replace(experiment.stages, router=router)
    with pytest.raises(UserError, match=r"differs in config\.stages\.router\.dropout"):
        workdir.check_same(paths, dataclasses.replace(experiment, stages=other))
    values["source"]["compute_dtype"] = "bfloat16"
    paths.experiment.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"differs in config\.compute\.dtype"):
        workdir.check_same(paths, experiment)


@pytest.mark.parametrize("name", ["experiment.json", "inputs.json"])
def test_bad_input_damaged_records_of_a_run(experiment, tmp_path, name):
    paths = Paths(tmp_path)
    workdir.claim(paths, experiment, {"end_token": 257})
    (paths.checkpoints("finetune") / "1").mkdir(parents=True)
    (tmp_path / name).write_text('{"half": ')
    refused(experiment, tmp_path, f"{name} cannot be read", "backup", "remove it")


def test_bad_input_other_data_on_the_way(experiment, copy):
    shutil.rmtree(copy / "lte")
    texts = Path(experiment.data.train)
    original = texts.read_text()
    texts.write_text(original.replace("abcd", "abce", 40))
    try:
        refused(experiment, copy, "other data", "rows/train", "before", "now")
    finally:
        texts.write_text(original)


def test_inputs_name_every_file_that_changed(tmp_path):
    paths = Paths(tmp_path)
    paths.dense.mkdir()
    old = {"rows/train": [64, "ab" * 32], "source/model.safetensors": [10, "cd" * 32]}
    paths.inputs.write_text(json.dumps(old))
    assert (
        workdir.check_inputs(paths, {"rows/train": [64, "ab" * 32]}) == old
    )  # source is done with
    with pytest.raises(UserError) as caught:
        workdir.check_inputs(paths, old | {"source/model.safetensors": [10, "ef" * 32]})
    assert "source/model.safetensors: 10 (cdcdcdcd) before, 10 (efefefef) now" in str(caught.value)


@pytest.mark.parametrize("folder", ["dense", "experts", "lte"])
def test_bad_input_one_flipped_bit_in_a_model_of_the_run(experiment, copy, folder):
    if folder != "lte":
        shutil.rmtree(copy / "lte")
    weights = copy / folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    refused(experiment, copy, str(copy / folder), "model.safetensors", "remove it")
    shutil.rmtree(copy / folder)
    lte_jax.train(experiment, copy)  # the mend it names
    assert (copy / folder / "model.safetensors").read_bytes() != content


# --------------------------------------------------------------------------------------- leftovers


def test_what_is_half_done_is_cleared_and_said(tmp_path, caplog):
    half = (
        *(".lte.new-abc", ".dense.old-abc", ".results.json.half-written"),
        *("checkpoints/deleting-finetune", "checkpoints/router/deleting-1"),
        "checkpoints/router/7.orbax-checkpoint-tmp",
        f"checkpoints/router/{checkpoint.DAMAGED}",
    )
    whole = ("lte", "checkpoints/router/1", "tensorboard", ".of-the-user")
    for name in (*half, *whole):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".lte.new-abc" / "model.safetensors").write_bytes(bytes(2_000_000))
    workdir.put_right(Paths(tmp_path))
    assert not [name for name in half if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in whole)
    [said] = [record.getMessage() for record in caplog.records]
    assert "cleared " in said and "and 2 more" in said and "(2.0 MB)" in said
    workdir.put_right(Paths(tmp_path))
    assert len(caplog.records) == 1


def test_what_a_killed_run_left_is_put_right_and_said_once(experiment, copy, finished, caplog):
    (copy / ".lte.new-abc").mkdir()
    (copy / ".lte.new-abc" / "model.safetensors").write_bytes(bytes(2_000_000))
    (copy / "dense").rename(copy / ".dense.old-abc")  # killed between two renames
    (copy / ".results.json.half-written").write_text("{")
    stage = copy / "checkpoints" / "router"
    for name in ("deleting-1", "7.orbax-checkpoint-tmp", checkpoint.DAMAGED):
        (stage / name).mkdir()
    lte_jax.train(experiment, copy)
    assert results(copy) == results(finished)
    assert not [p.name for p in copy.glob(".*") if p.name != ".lock"]
    assert sorted(p.name for p in stage.iterdir()) == ["1", "2"]
    [cleared] = [r.getMessage() for r in caplog.records if "cleared" in r.getMessage()]
    assert ".lte.new-abc" in cleared and "2.0 MB" in cleared and "damaged" in cleared
    assert [r for r in caplog.records if "restored" in r.getMessage()]
    caplog.clear()
    lte_jax.train(experiment, copy)
    assert "cleared" not in caplog.text


# ----------------------------------------------------------------------------------------- signals


def before(patch, owner, name, skip=0):
    """Sends SIGTERM on the way into a function, after so many calls of it."""
    original, left = getattr(owner, name), [skip]

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    patch.setattr(owner, name, call)


@pytest.mark.slow
def test_sigterm_in_every_phase_ends_with_143_and_in_the_same_bits(
    experiment, finished, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "run"
    phases = [
        (preflight.data, "tokenize", 0, "while tokenising", "experiment.json"),
        # The second save is that of the last step, after its validation.
        (checkpoint.Checkpointer, "save", 1, "of stage 'finetune'", "dense"),
        (hf, "save", 0, "after dense/", "experts"),
        (pipeline, "to_experts", 0, "while grouping", "experts"),
        (hf, "save", 0, "after experts/", "checkpoints/router"),
        (preflight.data, "eval_batches", 0, "after step 2 of stage 'router'", "lte"),
        (hf, "save", 0, "after lte/", "results.json"),
        (evaluation, "perplexity", 1, "while measuring", "results.json"),
        (report, "write", 0, "at its end", None),
    ]
    for owner, name, skip, where, absent in phases:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            before(patch, owner, name, skip)
            lte_jax.train(experiment, root)
        assert stopped.value.code == 143, where
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("stopped by SIGTERM ") and where in last, last
        assert absent is None or not (root / absent).exists()
    lte_jax.train(experiment, root)
    assert results(root) == results(finished)


# ------------------------------------------------------------------------------------------ report


def test_a_finished_run_reads_no_text_and_makes_what_is_absent(
    experiment, copy, finished, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(preflight.data, "build", lambda *_: pytest.fail("tokenised again"))
        patch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("measured again"))
        (copy / "layers.png").unlink(missing_ok=True)
        (copy / "table.md").unlink()
        lte_jax.train(experiment, copy)
    names = {path.name for path in finished.iterdir()}
    assert {path.name for path in copy.iterdir()} == names
    assert (copy / "table.md").read_bytes() == (finished / "table.md").read_bytes()


def test_the_report_alone(copy):
    for name in ("results.json", "table.md"):
        (copy / name).unlink()
    pipeline.report_again(copy)
    assert (copy / "results.json").exists() and (copy / "table.md").exists()
    measured = json.loads((copy / "results.json").read_text())
    old = measured | {"tokens": 1}
    (copy / "results.json").write_text(json.dumps(old))
    pipeline.report_again(copy)  # anew, whatever is there
    assert json.loads((copy / "results.json").read_text())["tokens"] == measured["tokens"] > 1
    shutil.rmtree(copy / "lte")
    with pytest.raises(UserError, match="is not finished"):
        pipeline.report_again(copy)
    with pytest.raises(UserError, match="not a work directory"):
        pipeline.report_again(copy / "nothing")


def test_finished_runs_make_one_table(finished, copy):
    changed = json.loads((copy / "experiment.json").read_text()) | {"seed": 1}
    (copy / "experiment.json").write_text(json.dumps(changed))
    together, alone = (runs.together(x)[0]["models"] for x in ([finished, copy], [finished]))
    for both, one in zip(together, alone, strict=True):
        assert both["seeds"] == [0, 1] and both["token_ppl"] == one["token_ppl"]
        assert set(both["deviation"].values()) == {0.0}


def test_a_report_without_the_dense_model(copy):
    before = json.loads((copy / "results.json").read_text())["models"]
    experiment = json.loads((copy / "experiment.json").read_text()) | {"report_dense": False}
    (copy / "experiment.json").write_text(json.dumps(experiment))
    (copy / "quality.png").unlink(missing_ok=True)
    pipeline.report_again(copy)
    [alone] = json.loads((copy / "results.json").read_text())["models"]
    assert [model["name"] for model in before] == ["dense", alone["name"]]
    assert alone["token_ppl"] == before[1]["token_ppl"]
    assert "| dense |" not in (copy / "table.md").read_text()


def evaluate(monkeypatch, *flags):
    """The script evaluate.py, in this process."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def test_the_report_alone_on_the_command_line(copy, monkeypatch, capsys):
    for name in ("results.json", "table.md"):
        (copy / name).unlink()
    evaluate(monkeypatch, f"--workdir={copy}")
    assert json.loads((copy / "results.json").read_text())["models"]
    assert (copy / "table.md").exists() and "| LTE |" in capsys.readouterr().out.replace("  ", " ")
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, f"--workdir={copy / 'lte'}")
    assert stopped.value.code == 2 and "is not a work directory" in capsys.readouterr().err


def test_the_command_line_tells_of_the_report_alone(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, "--help")
    help_text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--workdir" in help_text and "of a finished" in help_text
