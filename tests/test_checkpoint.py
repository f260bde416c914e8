"""Checkpoints come back as saved: after kills, damage, on another mesh, and in the right number."""

import errno
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lte_jax import checkpoint
from lte_jax.checkpoint import Checkpointer, quiet_threads
from lte_jax.errors import UserError
from lte_jax.files import MANIFEST

WIDTH = 64


def state_at(step: int) -> dict:
    """A state every leaf of which tells the step."""
    return {
        "step": jnp.int32(step),
        "params": {"w": jnp.full((WIDTH, WIDTH), step, jnp.float32)},
        "moments": (jnp.full((3,), -step, jnp.bfloat16), None),
    }


def abstract(state=None, sharding=None) -> dict:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = state_at(0) if state is None else state
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def save_steps(folder: Path, steps, losses=None, **options) -> None:
    with Checkpointer(folder, **options) as checkpointer:
        for step in steps:
            metrics = None if losses is None else {"validation_loss": losses[step]}
            checkpointer.save(step, state_at(step), {"next_index": step}, metrics)


def restored(folder: Path) -> tuple[int, dict, dict] | None:
    with Checkpointer(folder) as checkpointer:
        return checkpointer.restore(abstract())


def assert_is(result, step: int) -> None:
    assert result is not None
    found, state, data_state = result
    assert found == step
    assert data_state == {"next_index": step}
    want = state_at(step)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_resume_restores_the_newest_step(tmp_path):
    save_steps(tmp_path, [1, 2, 5])
    assert_is(restored(tmp_path), 5)


def test_nothing_saved_yet_is_none(tmp_path):
    assert restored(tmp_path / "new") is None


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_at(1), {"next_index": 1})
        checkpointer.save(1, state_at(7), {"next_index": 7})
        assert_is(checkpointer.restore(abstract()), 1)
        checkpointer.save(1, state_at(7), {"next_index": 7})  # known from the restore too
    assert_is(restored(tmp_path), 1)


def test_state_may_be_donated_while_it_is_written(tmp_path):
    """The write is of the values at `save`, though the next step overwrites the buffers at once."""
    bump = jax.jit(lambda x: x + jnp.ones_like(x), donate_argnums=0)
    x = jnp.zeros((1000, 1000))
    with Checkpointer(tmp_path, keep_last=5) as checkpointer:
        for step in range(5):
            checkpointer.save(step, {"x": x}, {})
            for _ in range(3):
                x = bump(x)
        for step in reversed(range(5)):
            found, state, _ = checkpointer.restore(abstract({"x": x}))
            assert found == step
            np.testing.assert_array_equal(np.asarray(state["x"]), np.full(x.shape, 3.0 * step))
            (tmp_path / str(step) / MANIFEST).write_text("spoilt")


# -------------------------------------------------------------------------------------- retention


def test_keep_last(tmp_path):
    save_steps(tmp_path, range(1, 7), keep_last=2, keep_best=0)
    assert kept(tmp_path) == [5, 6]


def test_keep_best_by_validation_loss(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 4.0, 6: 5.0}
    save_steps(tmp_path, losses, losses, keep_last=1, keep_best=2)
    assert kept(tmp_path) == [2, 4, 6]


def test_keep_best_survives_a_restart(tmp_path):
    save_steps(tmp_path, [1, 2], {1: 1.0, 2: 2.0}, keep_last=1, keep_best=1)
    save_steps(tmp_path, [3, 4], {3: 3.0, 4: 4.0}, keep_last=1, keep_best=1)
    assert kept(tmp_path) == [1, 4]


# ------------------------------------------------------------------------- the stage before this


def test_the_first_whole_step_clears_what_it_replaces(tmp_path, monkeypatch):
    """Not one that could not be written."""
    save_steps(tmp_path / "router", [1, 2])
    with Checkpointer(tmp_path / "adapt", replaces=[tmp_path / "router"]) as checkpointer:
        assert checkpointer.restore(abstract()) is None
        with monkeypatch.context() as patch, pytest.raises(UserError, match="adapt/1 could not"):
            full = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(checkpoint.files, "write_manifest", lambda *_: raise_(full))
            checkpointer.save(1, state_at(1), {"next_index": 1})
            checkpointer.wait()
        assert_is(restored(tmp_path / "router"), 2)
        checkpointer.save(1, state_at(1), {"next_index": 1})
        checkpointer.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["adapt"]
    assert_is(restored(tmp_path / "adapt"), 1)


def raise_(error):
    raise error


def test_a_folder_that_cannot_be_removed_costs_no_step(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, [1])
    denied = PermissionError(errno.EACCES, "Permission denied")
    with Checkpointer(tmp_path, keep_last=1, keep_best=0) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", lambda *_: raise_(denied))
            checkpointer.save(2, state_at(2), {"next_index": 2})
            checkpointer.wait()
        assert_is(checkpointer.restore(abstract()), 2)
    assert f"{tmp_path}/1 could not be removed (Permission denied)" in caplog.text


# What a run that has saved the first step of the next stage is killed at.
MOMENTS = {
    "before the manifest": (checkpoint.files, "write_manifest"),
    "before the clearing": (checkpoint, "_remove"),
    "half-way": (shutil, "rmtree"),
}


def die_at(moment: str, root: Path) -> None:
    """Saves a step that replaces another stage's, and is killed meanwhile."""
    with Checkpointer(root / "adapt", replaces=[root / "router"]) as checkpointer:
        setattr(*MOMENTS[moment], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        checkpointer.save(1, state_at(1), {"next_index": 1})
        checkpointer.wait()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_between_two_stages_loses_neither(tmp_path, processes, moment):
    router, adapt = tmp_path / "router", tmp_path / "adapt"
    save_steps(router, [1, 2])
    child = processes.Process(target=die_at, args=(moment, tmp_path))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    half = [] if moment != "half-way" else [tmp_path / "deleting-router"]
    assert checkpoint.half_done(tmp_path) == half
    if moment == "before the manifest":
        assert not checkpoint.holds_step(adapt)
        assert_is(restored(router), 2)
        return
    assert checkpoint.holds_step(adapt) and router.exists() == (moment != "half-way")
    with Checkpointer(adapt, replaces=[router]) as checkpointer:
        assert_is(checkpointer.restore(abstract()), 1)
    assert not router.exists()


# ----------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
def test_resume_detects_damage_to_any_file(tmp_path, caplog, damage):
    """Each file of the newest step in turn: found, named, and the step before it used."""
    save_steps(tmp_path / "whole", [1, 2])
    names = [path.relative_to(tmp_path / "whole/2") for path in all_files(tmp_path / "whole/2")]
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "2" / name)
        caplog.clear()
        assert_is(restored(folder), 1)
        [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert f"{folder}/2: " in warning and "\n" not in warning
        # Without a manifest, a step is one that was never finished.
        no_manifest = damage is Path.unlink and name == Path(MANIFEST)
        assert ("unfinished" if no_manifest else str(name)) in warning
        assert kept(folder) == [1] and (folder / "damaged/2").is_dir()


def test_resume_saves_a_damaged_step_again(tmp_path):
    save_steps(tmp_path, [1, 2])
    flip_bit(max(all_files(tmp_path / "2/state"), key=lambda path: path.stat().st_size))
    with Checkpointer(tmp_path) as checkpointer:
        assert_is(checkpointer.restore(abstract()), 1)
        checkpointer.save(2, state_at(2), {"next_index": 2})
    assert_is(restored(tmp_path), 2)


def test_a_step_under_another_name_is_not_taken(tmp_path, caplog):
    save_steps(tmp_path, [3, 4])
    (tmp_path / "4").rename(tmp_path / "40")
    assert_is(restored(tmp_path), 3)
    assert kept(tmp_path) == [3]
    assert "it holds step 4" in caplog.text


def test_bad_input_every_checkpoint_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in "1", "2":
        truncate(max(all_files(tmp_path / step / "state"), key=lambda p: p.stat().st_size))
    with pytest.raises(UserError, match=r"every checkpoint is damaged.*/2: .*/1: .*backup") as e:
        restored(tmp_path)
    assert "\n" not in str(e.value)
    assert kept(tmp_path) == [1, 2]  # untouched


def test_bad_input_checkpoint_of_another_shape(tmp_path):
    save_steps(tmp_path, [3])
    other = abstract()
    other["params"]["w"] = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    match = rf"{tmp_path}/3 .*params/w is float32\[64,64\] there and float32\[8,4\] in this run"
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match=match):
        checkpointer.restore(other)
    del other["params"]["w"]
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match="absent in this"):
        checkpointer.restore(other)


def test_bad_input_folder_with_an_earlier_run(tmp_path):
    save_steps(tmp_path, [3])
    with pytest.raises(UserError, match="step 3 of an earlier run"):
        save_steps(tmp_path, [3])


def test_bad_input_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints cannot be written to"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_what_others_wrote_is_shared_out_for_reading():
    """All files once, whatever the numbers; with as many processes as then, each its own."""
    for writers in range(1, 6):
        own = [f"state/ocdbt.process_{w}/d/{n}" for w in range(writers) for n in range(7)]
        names = [*own, "state/manifest.ocdbt", "data/metadata"]
        for count in range(1, 10):
            shares = [checkpoint._share(names, process, count) for process in range(count)]
            assert sorted(name for share in shares for name in share) == sorted(names)
            assert all(shares) or count > writers * 7
            if count == writers:
                for process, share in enumerate(shares):
                    assert {checkpoint._written_by(name) for name in share} == {process}


# ------------------------------------------------------------------------------------------- mesh


def test_resume_mesh_restores_into_the_wanted_shardings(tmp_path):
    meshes = [
        jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        for shape in [(2, 4), (8, 1)]
    ]
    w = jnp.arange(64.0 * 32).reshape(64, 32)
    saved = jax.device_put({"w": w}, NamedSharding(meshes[0], P("fsdp", "tensor")))
    wanted = NamedSharding(meshes[1], P(None, "fsdp"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved, {})
        _, state, _ = checkpointer.restore(abstract(saved, wanted))
    assert state["w"].sharding == wanted
    np.testing.assert_array_equal(np.asarray(state["w"]), np.asarray(w))


# ------------------------------------------------------------------------------- kills, full disks


def save_forever(folder: Path, started) -> None:
    """Resumes, then saves every step until it is killed."""
    with Checkpointer(folder, keep_last=1, keep_best=1) as checkpointer:
        result = checkpointer.restore(abstract())
        step = 0 if result is None else result[0]
        started.set()
        while True:
            step += 1
            metrics = {"validation_loss": float(step % 7)}
            checkpointer.save(step, state_at(step), {"next_index": step}, metrics)


def run_out_of_space(folder: Path, answer) -> None:
    """Saves a small state, then one that no file may hold; answers with the error and the rest."""
    import resource

    os.dup2(os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, state_at(1), {"next_index": 1})
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    noise = jax.random.normal(jax.random.key(0), (300, 300))
    try:
        checkpointer.save(2, {"noise": noise}, {})
        checkpointer.wait()
        error = None
    except UserError as e:
        error = str(e)
    left = sorted(path.name for path in folder.iterdir())
    checkpointer.save(3, state_at(3), {"next_index": 3})  # fits again
    checkpointer.close()
    answer.put((error, left))


def finished(folder: Path) -> list[int]:
    return [int(path.parent.name) for path in folder.glob(f"[0-9]*/{MANIFEST}")]


@pytest.fixture(scope="module")
def processes():
    """Children forked from a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lte_jax.checkpoint", __name__])
    return context


def test_resume_after_sigkill_at_any_moment(tmp_path, processes, caplog):
    rng = random.Random(0)
    last = 0
    for kill in range(10):
        started = processes.Event()
        child = processes.Process(target=save_forever, args=(tmp_path, started))
        child.start()
        assert started.wait(120)
        while kill % 2 and not any(step > last for step in finished(tmp_path)):
            time.sleep(0.01)  # however slow the machine: every other child gets a step further
        time.sleep(rng.uniform(0.0, 0.4))
        child.kill()
        child.join()
        result = restored(tmp_path)
        if result is None:
            assert last == 0
            continue
        assert result[0] >= last, f"kill {kill} lost a finished step"
        last = result[0]
        assert_is(result, last)
    assert last >= 5
    assert not list(tmp_path.glob("deleting-*")) and not list(tmp_path.glob("*tmp*"))
    assert "SHA-256" not in caplog.text  # unfinished steps are told from damaged ones


def test_bad_input_full_disk(tmp_path, processes):
    folder, answer = tmp_path / "checkpoints", processes.Queue()
    child = processes.Process(target=run_out_of_space, args=(folder, answer))
    child.start()
    error, left = answer.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    assert f"{folder}/2 could not be written (File too large)" in error and "\n" not in error
    assert left == ["1"]
    assert "Traceback" not in (tmp_path / "checkpoints.log").read_text()
    assert_is(restored(folder), 3)


SAVING = """
import sys
import jax.numpy as jnp
from lte_jax import interrupt
from lte_jax.checkpoint import Checkpointer

with interrupt.handled("all is saved"), Checkpointer(sys.argv[1]) as checkpointer:
    for step in range(1, 10_000):
        checkpointer.save(step, {"w": jnp.full((300, 300), step, jnp.float32)}, {})
        print(step, flush=True)
        interrupt.check(f"after step {step}")
"""


def test_ctrl_c_in_a_save_waits_for_its_end(tmp_path):
    """Raised inside one, KeyboardInterrupt left two threads of Orbax waiting for each other."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and [process.stdout.readline() for _ in range(3)][-1] == "3\n"
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    last = int(["3", *out.split()][-1])
    assert f"stopped by SIGINT after step {last}: all is saved" in err
    assert finished(tmp_path) and max(finished(tmp_path)) == last  # whole, manifest and all


@pytest.mark.parametrize("what", ["disk", "bug"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_meet_a_full_disk_are_quiet(what, monkeypatch):
    """Of a library's threads: the next write tells. A bug is told as ever."""
    heard = []
    monkeypatch.setattr(threading, "excepthook", lambda args: heard.append(args.exc_value))

    def work():
        raise OSError(28, "No space left on device") if what == "disk" else ZeroDivisionError

    with quiet_threads():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(heard) == (what == "bug")


def test_what_a_killed_run_left_is_gone_before_anything_is_saved(tmp_path, monkeypatch):
    """Orbax's own clearing, in the background, once took the first new save away as well."""
    cleanup = "orbax.checkpoint._src.path.temporary_paths.cleanup_temporary_paths"
    monkeypatch.setattr(cleanup, lambda *_, **__: pytest.fail("Orbax clears in the background"))
    for name in ("1.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17"):
        (tmp_path / name / "state").mkdir(parents=True)
    with Checkpointer(tmp_path):
        assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize(
    ("error", "news"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),  # as asyncio logs one, unnamed
        (RuntimeError("Event loop is closed"), False),  # of what reports to a failed save
        (RuntimeError("a bug"), True),
    ],
)
def test_a_full_disk_is_told_once_and_a_bug_always(error, news):
    """The save that failed raises its error as well, with the path."""
    text = "Future exception was never retrieved"
    info = (type(error), error, None)
    record = logging.LogRecord("asyncio", logging.ERROR, "events.py", 1, text, (), info)
    assert checkpoint._is_news(record) is news
