"""Shards hold the records that memory would, whoever wrote them and however often he was killed."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import cli, data, files, interrupt, preflight, router_init, sharding
from lte_jax.config import DataConfig, MeshConfig, ModelConfig, SourceConfig
from lte_jax.data import building, preparing, shards, workers
from lte_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BYTES = data.byte_tokenizer()
MODEL = ModelConfig(vocab_size=259)
SMALL = {"CHUNK": 400, "GROUP": 1500}  # characters, so that a test has several of each


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, size in SMALL.items():
        monkeypatch.setattr(building, name, size)
    monkeypatch.setattr(preparing, "MOST_SHARDS", 3)


def write(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def stories(count: int, seed: int, longest: int = 90) -> list[str]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, count)
    return [bytes(rng.integers(97, 123, size, np.uint8)).decode() for size in sizes]


@pytest.fixture
def texts(tmp_path):
    write(tmp_path / "a.jsonl", stories(200, 0))
    write(tmp_path / "b.jsonl", stories(60, 1))
    write(tmp_path / "long.jsonl", stories(1, 2, 2) + ["x" * 3000, "yz" * 2000])
    write(tmp_path / "other.jsonl", stories(30, 3))
    return tmp_path


def settings(texts, train="a.jsonl", **more) -> DataConfig:
    named = {"train": train, "validation": more.pop("validation", "")}
    paths = {k: v.replace("@", f"{texts}/") for k, v in named.items()}
    return DataConfig(
        **({"length": 32, "batch_size": 8, "max_validation_records": 6} | more | paths)
    )


def make(folder, config, end=257, tokenizer=BYTES, **more):
    return preparing.prepare(folder, config, tokenizer, MODEL, end=end, **more)


def read(folder, config, end=257, tokenizer=BYTES, model=MODEL, seed=0):
    return data.opened(folder, config, tokenizer, model, seed, end)


def held(folder) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock"}


# ------------------------------------------------------------------------------------ same records


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pack": False},
        {"validation": "@other.jsonl"},
        {"train": "@a.jsonl + @b.jsonl", "max_documents": 50},
        {"train": "0.7 * @a.jsonl + 0.3 * @b.jsonl"},
        {"train": "@long.jsonl"},
        {"train": "@b.jsonl + @a.jsonl", "join": "\n", "newline": " "},
    ],
    ids=str,
)
def test_shards_hold_what_memory_does(texts, changes):
    config = settings(texts, **({"train": "@a.jsonl"} | changes))
    expected = data.build(config, BYTES, MODEL, 3, 257)
    found = make(texts / "out", config, seed=3)
    assert len(found["train"]["shards"]) > 1
    train, validation = read(texts / "out", config, seed=9)
    for part, stored in zip(expected, (train, validation), strict=True):
        np.testing.assert_array_equal(stored[:]["tokens"], part.tokens_RL)
        np.testing.assert_array_equal(np.asarray(stored.segments_RL), part.segments_RL)
        assert len(stored) == len(part) and stored.num_tokens == part.num_tokens
        assert stored.whole == part.whole and stored.length == part.length
    few, three = np.array([4, 0, 2]), train.take(np.array([4, 0, 2]))
    assert three.digest() == expected[0].take(few).digest()
    assert (
        train[1]["tokens"].shape == (32,)
        and (train[-1]["tokens"] == train[len(train) - 1]["tokens"]).all()
    )
    assert not (texts / "out" / shards.BEGUN).exists()


def test_large_vocabularies_are_held_in_more_bytes(texts):
    wide = dataclasses.replace(MODEL, vocab_size=2**16 + 1)
    config = settings(texts, "@a.jsonl")
    found = preparing.prepare(texts / "out", config, BYTES, wide, end=2**16)
    assert found["largest_token"] == 2**16 and found["dtype"] == "<i4"
    train, _ = read(texts / "out", config, end=2**16, model=wide)
    expected, _ = data.build(config, BYTES, wide, 0, 2**16)
    np.testing.assert_array_equal(train[:]["tokens"], expected.tokens_RL)


def test_records_are_read_when_they_are_asked_for(texts, monkeypatch):
    config = settings(texts, "@a.jsonl")
    make(texts / "out", config)
    numbers, original = [], shards.Stored._read
    monkeypatch.setattr(
        shards.Stored,
        "_read",
        lambda self, number: numbers.append(number) or original(self, number),
    )
    train, validation = read(texts / "out", config)
    assert len(numbers) == len(validation) < len(train)
    numbers.clear()
    monkeypatch.setattr(shards.Stored, "threads", 0)
    next(data.train_iterator(train, 8, 0, np.array([2, 5])))
    assert len(numbers) == 2  # this process's rows, of 8
    numbers.clear()
    monkeypatch.setattr(router_init, "ROWS_AT_A_TIME", 5)
    few = router_init.enough_records(train.segments_RL, 30, None, np.random.default_rng(0))
    whole = np.asarray(train.segments_RL)
    assert 32 <= len(few) <= len(numbers) - len(train) < len(few) + 5
    same = router_init.enough_records(whole, 30, None, np.random.default_rng(0))
    np.testing.assert_array_equal(few, same)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_order_does_not_depend_on_how_many_processes_read(texts, processes):
    config = settings(texts, "@a.jsonl")
    make(texts / "out", config)
    train, _ = read(texts / "out", config)
    in_memory = data.build(config, BYTES, MODEL, 0, 257)[0]
    whole = data.train_iterator(in_memory, 8, 5)
    rows = np.split(np.random.default_rng(0).permutation(8), processes)
    parts = [data.train_iterator(train, 8, 5, mine) for mine in rows]
    for _ in range(2 * len(train) // 8):  # into the third epoch
        expected, found = next(whole), [next(part) for part in parts]
        for key in "tokens", "segments":
            together = np.concatenate([batch[key] for batch in found])
            np.testing.assert_array_equal(together, expected[key][np.concatenate(rows)])
    state = json.loads(json.dumps(parts[0].get_state()))
    assert state == whole.get_state()
    again = data.train_iterator(train, 8, 5)  # by another number of processes
    again.set_state(state)
    for expected, found in itertools.islice(zip(whole, again, strict=False), 5):
        np.testing.assert_array_equal(expected["tokens"], found["tokens"])


@pytest.mark.slow
def test_training_from_shards_is_training_from_texts(tmp_path):
    from_texts = tiny.experiment(tmp_path / "texts")
    out = tmp_path / "shards"
    model_config, tokenizer, end = preflight.of_texts(from_texts)
    data.prepare(out, from_texts.data, tokenizer, model_config, end=end)
    stored = dataclasses.replace(from_texts.data, train=str(out))
    from_shards = dataclasses.replace(from_texts, data=stored)
    lines = []
    for name, experiment in ("a", from_texts), ("b", from_shards):
        lte_jax.train(experiment, tmp_path / name)
        read_lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        clock = ("seconds", "tokens_per_second", "step_seconds")
        lines.append(
            [{k: v for k, v in json.loads(x).items() if k not in clock} for x in read_lines]
        )
    losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
    assert losses[0] == losses[1] and len(losses[0]) >= 6
    for folder in "dense", "lte":
        assert held(tmp_path / "a" / folder) == held(tmp_path / "b" / folder)
    train_records = json.loads((tmp_path / "b/inputs.json").read_text())["rows/train"]
    assert train_records == [data.manifest(out)["train"][key] for key in ("records", "digest")]


# ------------------------------------------------------------------------------- killed and resumed

KILLING = """
import json, os, random, signal, sys, time
from pathlib import Path
from lte_jax.config import DataConfig, ModelConfig
from lte_jax import data
from lte_jax.data import building, preparing
out, config, sizes = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name, size in sizes.items():
    setattr(building, name, size)
preparing.MOST_SHARDS = 3
tokenizer, seen, dice = data.byte_tokenizer(), set(), random.Random(0)
def files():
    return [p.name for p in out.rglob("*") if p.name[0] != "."]
def work():
    preparing.prepare(out, DataConfig(**config), tokenizer, ModelConfig(vocab_size=259), end=257)
    os._exit(0)
for turn in range(int(sys.argv[4])):
    if not (child := os.fork()):
        work()
    enough = len(files()) + dice.randint(0, 8)
    while len(files()) < enough and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.0005)
    if (out / "manifest.json").exists():
        break
    time.sleep(dice.uniform(0, 0.003))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.update(name.partition("-")[0] for name in files())
if not (child := os.fork()):
    work()
print(json.dumps({"code": os.waitpid(child, 0)[1], "seen": sorted(seen)}))
"""


def test_killed_at_random_moments_and_resumed_to_the_same_bytes(texts):
    config = settings(texts, "@a.jsonl + @b.jsonl")
    make(texts / "calm", config)
    given = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-c", KILLING, str(texts / "killed"), given, json.dumps(SMALL), "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["code"] == 0, done.stderr
    assert {"tokens", "train"} <= {*told["seen"]}, told  # it was killed in the middle
    assert held(texts / "killed") == held(texts / "calm")


def test_what_is_finished_is_not_done_again(texts, monkeypatch):
    config = settings(texts, "@a.jsonl")
    make(texts / "calm", config)
    calls = {"tokenize": 0, "lay": 0}

    def counted(owner, name, fails_at):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            calls[name] += 1
            if calls[name] == fails_at:
                raise ZeroDivisionError
            return original(*args, **kwargs)

        return call

    tokens_at, lay_at = 9, 4
    for owner, name, at in (preparing.tokens, "tokenize", tokens_at), (building, "lay", lay_at):
        monkeypatch.setattr(owner, name, counted(owner, name, at))
    out = texts / "out"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            make(out, config)
    kept = {name: (out / name).stat().st_mtime_ns for name in held(out)}
    make(out, config)
    chunks = len([name for name in kept if name.startswith(f"{shards.BEGUN}/tokens-")])
    assert calls["tokenize"] == chunks + 1 > tokens_at  # one was cut off, and done again
    finished = [name for name in kept if name.startswith("train-")]
    assert len(finished) == 1 and (out / finished[0]).stat().st_mtime_ns == kept[finished[0]]
    assert held(out) == held(texts / "calm")
    before = dict(calls)
    make(out, config)  # finished: nothing to do
    assert calls == before


def test_a_run_with_a_cache_tokenises_once(texts, monkeypatch):
    config = settings(texts, "@a.jsonl", length=16, cache=True)
    experiment = dataclasses.replace(tiny.experiment(texts / "of"), data=config)
    mesh, calls, original = sharding.make_mesh(MeshConfig()), [], preparing.tokens.tokenize

    def counted(own, *args, **kwargs):
        calls.append(len(own))
        return original(own, *args, **kwargs)

    def start():
        calls.clear()
        return preflight.prepare(experiment, mesh, None, {}, texts / "run" / "data")

    monkeypatch.setattr(preparing.tokens, "tokenize", counted)
    first = start()
    assert sum(calls) == 200 and first.records[0].folder == texts / "run" / "data"
    uncached = dataclasses.replace(experiment, data=dataclasses.replace(config, cache=False))
    memory = preflight.prepare(uncached, mesh, None, {}, texts / "none").records
    assert not (texts / "none").exists()
    for stored, held_in in zip(first.records, memory, strict=True):
        assert stored.take(np.arange(len(stored))).digest() == held_in.digest()
    again = start()
    assert not calls and again.inputs == first.inputs
    with open(texts / "a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    changed = start()  # which a run that has begun refuses
    assert sum(calls) == 201 and changed.inputs["rows/train"] != first.inputs["rows/train"]


@pytest.mark.slow
def test_workers_leave_no_trace_and_end_with_a_killed_command(texts):
    """The command itself, with workers: killed twice, each time going on with another number."""
    config = settings(texts, "@a.jsonl + @b.jsonl", max_validation_records=64)
    make(texts / "calm", config)
    (texts / "run.py").write_text(
        "from lte_jax import cli\nfrom lte_jax.data import building, preparing\n"
        f"building.CHUNK, building.GROUP = {SMALL['CHUNK']}, {SMALL['GROUP']}\n"
        "preparing.MOST_SHARDS = 3\n"
        "if __name__ == '__main__':\n    cli.main(prog='run', commands=('prepare',))\n"
    )
    (texts / "c.py").write_text(
        "from lte_jax import config\n"
        "def get_config():\n    c = config.to_config_dict(config.Experiment())\n"
        "    c.stages.finetune.steps = 1\n"
        "    c.data.length, c.data.batch_size = 32, 8\n    return c\n"
    )
    command = [sys.executable, "run.py", "prepare", "--config=c.py", "--out=out"]
    command += [f"--config.data.train={config.train}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for turn, count in enumerate((2, 1)):
        running = subprocess.Popen([*command, f"--workers={count}"], cwd=texts, env=env)
        deadline = time.monotonic() + 300
        while len([*(texts / "out" / shards.BEGUN).glob("tokens-*")]) <= 3 * turn:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        children = _children(running.pid)
        assert len(children) >= count * (count > 1)
        running.send_signal(signal.SIGKILL)
        running.wait()
        while any(os.path.exists(f"/proc/{child}") for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    done = subprocess.run(
        [*command, "--workers=2"], cwd=texts, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "out: train with --config.data.train=out" in done.stdout
    assert held(texts / "out") == held(texts / "calm")


def _children(process: int) -> list[int]:
    with open(f"/proc/{process}/task/{process}/children") as file:
        return [int(child) for child in file.read().split()]


def test_a_worker_that_is_ended_from_outside(monkeypatch):
    future = Future()
    future.set_exception(BrokenProcessPool("a process in the pool was terminated"))
    with pytest.raises(UserError, match="worker process was ended from outside .* goes on"):
        workers._Result(future).result()
    monkeypatch.setattr(interrupt, "_noted", (signal.SIGTERM, 0.0))  # to it and to this process
    with pytest.raises(SystemExit) as stopped:
        workers._Result(future).result()
    assert stopped.value.code == 143


# ---------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of shards, and the settings that it was prepared with."""
    folder = tmp_path_factory.mktemp("finished")
    config = DataConfig(
        train=write(folder / "a.jsonl", stories(200, 0)), length=32, batch_size=8, newline=" "
    )
    make(folder / "shards", config)
    return folder / "shards", dataclasses.replace(config, train=str(folder / "shards"))


def other_bytes(folder):
    path = sorted(folder.glob("train-*"))[0]
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def shorter(folder):
    path = sorted(folder.glob("train-*"))[0]
    path.write_bytes(path.read_bytes()[:-1])


def an_old_kind(folder):
    found = data.manifest(folder)
    listed = found.pop("files")
    listed = {name: tuple(entry) for name, entry in listed.items()}
    files.write_manifest(folder, found | {"kind": "lte_jax records 0"}, listed)


def edited(folder):
    path = folder / files.MANIFEST
    path.write_text(path.read_text().replace('"length": 32', '"length": 64'))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda f: (f / files.MANIFEST).unlink(), ["has no manifest.json", "prepares it again"]),
        (edited, ["manifest.json is corrupt", "prepare the texts again"]),
        (an_old_kind, ["'lte_jax records 0'", "expected 'lte_jax records 1'", "with this version"]),
        (other_bytes, ["train-00000-of-", "is corrupt (its SHA-256", "copy the folder again"]),
        (shorter, ["train-00000-of-", "bytes instead of", "copy the folder again"]),
        (lambda f: next(f.glob("val*")).unlink(), ["validation-00000-of-00001", "is missing"]),
    ],
    ids=["no-manifest", "edited", "old", "bytes", "shorter", "missing"],
)
def test_bad_input_damaged_shards(finished, tmp_path, damage, parts):
    folder, config = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    assert data.prepared(str(copy)) == copy
    refused(lambda: read(copy, dataclasses.replace(config, train=str(copy))), str(copy), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"length": 64}, ["data.length=64", "records of data.length=32: set that"]),
        ({"pack": False}, ["data.pack=False", "records of data.pack=True: set that"]),
        ({"newline": "|"}, ["data.newline='|'", "was prepared with ' '", "leave it out"]),
        ({"validation": "b.jsonl"}, ["data.validation='b.jsonl'", "was prepared with ''"]),
        ({"max_documents": 7}, ["data.max_documents=7", "was prepared with None"]),
        ({"batch_size": 999}, ["training records of 32", "data.batch_size=999"]),
        ({"length": 512}, ["data.length=512", "256 positions"]),
    ],
    ids=str,
)
def test_bad_input_shards_of_other_settings(finished, changes, parts):
    folder, config = finished
    refused(lambda: read(folder, dataclasses.replace(config, **changes)), *parts)


def test_bad_input_shards_for_another_model(finished, tmp_path):
    folder, config = finished
    learned = data.learned_tokenizer(["some text"] * 3, 259 + 2)
    own = data.digest(learned)[:8]
    refused(
        lambda: read(folder, config, tokenizer=learned),
        *(str(folder), "another tokenizer (SHA-256", own, "set source.tokenizer"),
    )
    small_model = dataclasses.replace(MODEL, vocab_size=257)
    refused(lambda: read(folder, config, model=small_model), "token id 257", "vocabulary of 257")
    none = dataclasses.replace(config, end_token="none")
    refused(
        lambda: read(folder, none, end=None), "data.end_token='none'", "end with 257: set 'auto'"
    )


def test_the_run_checks_its_shards(finished):
    """Their end token is taken; what does not fit is found before the run begins."""
    folder, config = finished
    experiment = dataclasses.replace(
        tiny.experiment(folder.parent / "run"),
        data=config,
        source=SourceConfig(scratch=dataclasses.replace(MODEL, num_layers=1)),
    )
    mesh = sharding.make_mesh(MeshConfig())
    parts = preflight.prepare(experiment, mesh, None, {})
    assert isinstance(parts.records[0], data.Stored) and parts.inputs["end_token"] == 257
    longer = dataclasses.replace(config, length=64)
    other = dataclasses.replace(experiment, data=longer)
    refused(lambda: preflight.prepare(other, mesh, None, {}), "data.length=64", "data.length=32")
    learns = dataclasses.replace(experiment.source, tokenizer="bpe")
    refused(
        lambda: preflight.prepare(dataclasses.replace(experiment, source=learns), mesh, None, {}),
        *("source.tokenizer='bpe' is learned from texts", str(folder)),
    )


def test_bad_input_a_folder_that_is_not_free(texts):
    config = settings(texts, "@a.jsonl")
    refused(lambda: make(texts, config), f"{texts} holds a.jsonl", "a new or empty folder")
    out = texts / "out"
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "lay", lambda *args: 1 / 0)
        make(out, config)
    longer = dataclasses.replace(config, length=64)
    refused(
        lambda: make(out, longer), f"{out} holds records prepared with another length (32, now 64)"
    )
    assert (out / shards.BEGUN).exists()
    with open(texts / "a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    refused(lambda: make(out, config), "prepared with another text", "remove this one")
    (texts / "a.jsonl").write_text("".join((texts / "a.jsonl").read_text().splitlines(True)[:-1]))
    make(out, config)
    refused(lambda: make(out, config, seed=1), "prepared with another seed (0, now 1)")
    refused(lambda: make(out, config, end=None), "another end_token (257, now None)")


def test_bad_input_of_the_command(finished, texts, capsys):
    folder, _ = finished
    base = [f"--out={texts / 'out'}", "--config=demo:smoke"]
    train = "--config.data.train="

    def said(*flags):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["prepare", *base, *flags])
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "holds shards already" in said(f"{train}{folder}")
    assert "data.task='sst2': expected ''" in said("--config.data.task=sst2")
    assert "learned anew by each run" in said("--config.source.tokenizer=bpe")
    assert "--workers" in said("--workers=0")
    assert "nowhere.jsonl: no such file" in said(f"{train}nowhere.jsonl", "--workers=1")
    short = said(f"{train}{texts / 'a.jsonl'}", "--config.data.length=512", "--workers=1")
    assert "data.length=512" in short and "256 positions" in short


def test_the_command_prepares_what_the_run_reads(texts, capsys):
    flags = [f"--config.data.train={texts / 'a.jsonl'}", "--config.data.validation="]
    cli.main(["prepare", "--config=demo:smoke", f"--out={texts / 'out'}", "--workers=1", *flags])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("40 documents: ") and "validation records" in out[0]
    assert out[1] == f"{texts / 'out'}: train with --config.data.train={texts / 'out'}"
    experiment = lte_jax.config.load_config("demo:smoke", [flag[9:] for flag in flags])
    memory = data.build(experiment.data, BYTES, experiment.source.scratch, experiment.seed, 257)
    stored = read(texts / "out", experiment.data, model=experiment.source.scratch)
    assert stored[0].take(np.arange(len(stored[0]))).digest() == memory[0].digest()
    assert stored[1].digest() == memory[1].digest()


@pytest.mark.slow
def test_the_benchmark_measures_it(texts):
    lte_jax.save(texts / "model", *tiny.model_and_params(None, MODEL))
    BYTES.save_pretrained(texts / "model")
    command = [sys.executable, "benchmarks/prepare.py", f"--texts={texts / 'a.jsonl'}"]
    command += [f"--model={texts / 'model'}", f"--out={texts}", "--length=64", "--workers=1"]
    command += ["--documents=300", "--rounds=1", "--only=prepare"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "| prepare | 1 | " in done.stdout, done.stderr
    assert "300 documents" in done.stdout


def refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
