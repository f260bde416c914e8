"""Sweeps: what a grid's runs are, that none is lost or made twice, and their summary, by NumPy."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import config, data, figures, files, report, style
from lte_jax.config import Row, Sweep
from lte_jax.errors import UserError
from lte_jax.sweep import command, processes, results, running, tables
from lte_jax.sweep.expansion import expand, with_starts
from lte_jax.sweep.folder import Folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "configs" / "demo.py:smoke")
DENSE = ("stages.router.steps=0", "stages.adapt.steps=0")


def grid(**changes):
    """Two dense rows and two sparse ones, two targets, three seeds."""
    methods = {
        "untouched": Row(DENSE, targets=()),
        "fine-tuned": Row((*DENSE, "stages.finetune.steps=5"), targets=()),
        "ours": Row(),
        "largest": Row(("lte.grouping=random",), oracle=True),
    }
    made = {"config": "demo.py", "methods": methods, "targets": (0.5, 0.9), "seeds": (0, 1, 2)}
    return Sweep(**made | {"reference": "ours"} | changes)


def quality(run):
    """A made-up perplexity and sparsity of a run, different in each."""
    rng = np.random.default_rng([*run.name.encode()])
    base = {"untouched": 4.0, "fine-tuned": 3.9, "ours": 4.4, "largest": 4.3}
    return base.get(run.method, 5.0) + 0.1 * rng.random() + (
        run.target or 0
    ), run.target and run.target + 0.01


class Fake:
    """Does runs at once; `broken` are those that fail."""

    def __init__(self, runs, broken=()):
        self.runs = {run.name: run for run in runs}
        self.broken, self.made = set(broken), []

    def __call__(self, spec, workdir, overrides, inherited):
        run = self.runs[workdir.name]
        self.made.append(run.name)
        assert overrides == run.overrides and os.fstat(inherited[0])
        if run.name in self.broken:
            processes.log(workdir).write_text("reading\nerror: too bad\n")
            return 1
        finish(run, workdir)
        return 0


def finish(run, workdir):
    """Writes what is read of a finished run."""
    ppl, sparsity = quality(run)
    model = {"name": "LTE", "token_ppl": ppl, "sparsity": sparsity or 0.0, "gflops_per_token": 2.0}
    if sparsity:
        layers = {"sparsity_per_layer": [sparsity - 0.1, sparsity + 0.1]}
        model |= layers | {"lte": {"threshold": 0.4}, "gflops_per_token": 2.0 - sparsity}
    workdir.mkdir(exist_ok=True)
    (workdir / "dense").mkdir(exist_ok=True)
    (workdir / "experiment.json").write_text(json.dumps(dataclasses.asdict(run.experiment)))
    stages = [{"stage": "router", "step": s, "seconds": 2.5 * s} for s in (1, 2)]
    stages.append({"stage": "adapt", "step": 1, "seconds": 7.0})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in stages))
    told = {"models": [model | {"name": "dense"}, model], "environment": {"commit": "abc"}}
    files.atomic_write(workdir / "results.json", json.dumps(told))  # another sweep may look


@pytest.fixture
def made(tmp_path):
    """The grid, its folder, its runs and what does them."""
    sweep, folder = grid(), Folder(tmp_path / "out")
    runs = expand(sweep, DEMO, folder.root)
    folder.check(sweep, runs)
    return sweep, folder, runs, Fake(runs)


# ----------------------------------------------------------------------------------------- the grid


def test_a_grid_expands_to_runs_that_train_py_takes(tmp_path):
    sweep = grid(overrides=("stages.adapt.steps=7", "log_every=3"))
    runs = expand(sweep, DEMO, tmp_path)
    assert [run.name for run in runs[:6]] == [
        "untouched-0", "fine-tuned-0", "ours-0.5-0", "ours-0.9-0", "largest-0.5-0",
        "largest-0.9-0",
    ]  # fmt: skip
    assert len(runs) == 18 and [run.seed for run in runs[::6]] == [0, 1, 2]
    dense, ours = runs[1].experiment, runs[3].experiment
    assert dense.stages.adapt.steps == 0  # a method's own goes before those of all
    assert (dense.log_every, dense.stages.finetune.steps, dense.seed) == (3, 5, 0)
    assert ours.lte.target_sparsity == 0.9 and ours.stages.adapt.steps == 7
    assert runs[-1].experiment.seed == 2 and runs[-1].experiment.lte.grouping == "random"


def test_a_run_goes_on_from_the_dense_model_of_its_seed(tmp_path):
    methods = {
        "later": Row(after="middle"),
        "middle": Row(DENSE, targets=(), after="start"),
        "start": Row(DENSE, targets=()),
    }
    runs = expand(Sweep("demo.py", methods, (0.5,), (4,)), DEMO, tmp_path)
    assert [run.name for run in runs] == ["start-4", "middle-4", "later-0.5-4"]
    assert [run.experiment.source.path for run in runs[1:]] == [
        str(tmp_path / "start-4" / "dense"), str(tmp_path / "middle-4" / "dense"),
    ]  # fmt: skip
    assert [run.experiment.seed for run in runs] == [4, 1004, 2004]
    assert [run.name for run in with_starts(runs, 2)] == [run.name for run in runs]
    assert with_starts(runs, 0) == [runs[0]]
    with pytest.raises(UserError, match="--run=3: the grid has 3 runs: expected 0 to 2"):
        with_starts(runs, 3)


def test_how_a_method_is_told_its_target(tmp_path):
    fixed = Row(
        ("lte.router_init=open", "lte.target_sparsity=None"),
        target="",
        at={0.5: ("lte.efficiency_weight=0.25",)},
    )
    weight = Row(target="lte.efficiency_weight={target}", targets=(0.75,))
    runs = expand(Sweep("demo.py", {"a": fixed, "b": weight}, (0.5, 0.9)), DEMO, tmp_path)
    told = [(r.experiment.lte.target_sparsity, r.experiment.lte.efficiency_weight) for r in runs]
    assert told == [(None, 0.25), (None, 0.0), (0.5, 0.75)]
    assert [run.target for run in runs] == [0.5, 0.9, 0.75]


ROW = Row(targets=())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {}}, "methods is empty"),
        ({"seeds": ()}, r"seeds=\(\): expected at least one"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\): expected each once"),
        ({"targets": (0.5, 1.0)}, r"targets\[1\]=1.0: expected strictly between 0 and 1"),
        ({"targets": ()}, r"methods\['ours'\].targets is the sweep's, which has none"),
        ({"reference": "our"}, "reference='our': did you mean 'ours'"),
        (
            {"methods": {"a": Row(after="b"), "ours": ROW}},
            "after='b': expected a method of one run",
        ),
        ({"methods": {"a": Row(after="ours"), "ours": Row()}}, "no method has targets"),
        (
            {"methods": {"a": Row((), (), after="ours"), "ours": Row((), (), after="b")}},
            "after='b'",
        ),
        (
            {"methods": {"a": Row(targets=(), after="ours"), "ours": Row(targets=(), after="a")}},
            r"methods\['a'\].after='ours': leads back to 'a'",
        ),
        ({"methods": {"ours": Row(at={0.7: ()})}}, r"at\[0.7\]: expected one of .* 0.5, 0.9"),
    ],
)
def test_bad_input_a_grid_that_makes_no_sense(changes, words):
    with pytest.raises(UserError, match=words):
        grid(**changes)


def test_bad_input_methods_that_are_none():
    for methods, words in (
        ("a", r"sweep.methods='a': expected a mapping from str to Row"),
        ({"a": ()}, r"sweep.methods\['a'\]=\(\): expected Row"),
        ({3: ROW}, "sweep.methods key=3: expected str"),
    ):
        with pytest.raises(UserError, match=words):
            config.from_mapping(Sweep, {"config": "demo.py", "methods": methods}, "sweep")


def test_bad_input_a_row():
    with pytest.raises(UserError, match="where the number goes, such as lte.target_sparsity="):
        Row(target="lte.target_sparsity=0.5")
    with pytest.raises(UserError, match="expected each once"):
        Row(targets=(0.5, 0.5))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row(("lte.expert_sise=8",), ()), "run a-0: unknown key config.lte.expert_sise: did you"),
        (Row(("report=False",), ()), "run a-0: config.report=False: expected True"),
        (Row(target="lte.expert_size={target}"), "run a-0.5-0: config.lte.expert_size=0.5"),
    ],
)
def test_bad_input_overrides_are_found_before_the_first_run(row, words, tmp_path):
    with pytest.raises(UserError, match=words):
        expand(Sweep("demo.py", {"a": row}, (0.5,)), DEMO, tmp_path)


def test_bad_input_names_that_make_one_folder(tmp_path):
    both = {"a, b": ROW, "a b": ROW}
    with pytest.raises(UserError, match="'a, b' and 'a b' both have a run named a-b-0"):
        expand(Sweep("demo.py", both), DEMO, tmp_path)


FILE = """
from lte_jax import config

def get_sweep(arg=""):
    words = config.variants(arg, "few")
    methods = {"a": config.Row(targets=())}
    return config.Sweep("configs/own.py:smoke", methods, overrides=("seed=1",))
"""


def test_the_configuration_is_of_the_grids_checkout(tmp_path, monkeypatch):
    (tmp_path / "configs/sweeps").mkdir(parents=True)
    (tmp_path / "configs/sweeps/grid.py").write_text(FILE)
    (tmp_path / "configs/own.py").write_text((ROOT / "configs/demo.py").read_text())
    monkeypatch.chdir("/")
    file = tmp_path / "configs/sweeps/grid.py"
    sweep, place = config.load_sweep(f"{file}:few", ["log_every=3"])
    assert place == f"{tmp_path / 'configs/own.py'}:smoke"
    assert sweep.overrides == ("seed=1", "log_every=3")
    (tmp_path / "configs/own.py").unlink()
    assert config.load_sweep(str(file))[1] == "configs/own.py:smoke"
    with pytest.raises(UserError, match=r"grid.py: unknown variant 'fev': did you mean 'few'"):
        config.load_sweep(f"{file}:fev")
    file.write_text("def get_sweep(arg=''):\n    return 3")
    with pytest.raises(UserError, match=r"get_sweep\(\) returned int: expected a Sweep"):
        config.load_sweep(str(file))
    with pytest.raises(UserError, match="no config file 'tinystorys'.*tinystories"):
        config.load_sweep("tinystorys")


@pytest.mark.parametrize("words", ["", ":smoke"])
@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/sweeps").glob("*.py")), ids=lambda f: f.stem
)
def test_every_grid_expands(file, words, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    sweep, place = config.load_sweep(f"{file.stem}{words}")  # by its name, from anywhere
    runs = expand(sweep, place, tmp_path)
    for run in runs:
        stages, lte = run.experiment.stages, run.experiment.lte
        assert max(s.steps for s in (stages.router, stages.adapt)) <= (20 if words else 10**6)
        sparse = stages.router.steps + stages.adapt.steps > 0
        # Without a target it is dense, or has a fixed weight: the configuration's target is not it.
        assert sparse if run.target is not None else not sparse or lte.target_sparsity is None
        assert run.experiment.latency_rounds == 0
    text = file.read_text().split('"""')[1]
    for part in (f"--config=configs/sweeps/{file.name} --out=", "Cost:", "Expect"):
        assert part in text
    assert f"{len(runs)} runs" in text or words


def runs_of(spec, tmp_path):
    """The runs of one of the package's grids, by name."""
    return {run.name: run for run in expand(*config.load_sweep(spec), tmp_path)}


def test_the_quick_grid_has_every_method_once(tmp_path):
    quick, whole = (runs_of(f"methods{words}", tmp_path) for words in (":quick", ""))
    assert {run.method for run in quick.values()} == {run.method for run in whole.values()}
    assert len(quick) == len({run.method for run in quick.values()})
    for run in quick.values():
        stages, data_ = run.experiment.stages, run.experiment.data
        assert sum(s.steps for s in (stages.finetune, stages.router, stages.adapt)) <= 30
        assert data_.max_validation_records == 64 and data_.length == 256


# Of an ablation, by how its name begins, the keys that go together.
TOGETHER = {
    "separability": {"separability_weight", "separability_eps"},
    "low-rank": {"router", "router_rank"},
    "two-layer": {"router", "router_rank", "router_activation", "router_init"},
    "fixed eta": {"router_init", "target_sparsity", "efficiency_weight"},
}


def test_an_ablation_changes_one_thing(tmp_path):
    runs = runs_of("ablations", tmp_path)
    ours, names = runs["ours-0.75-0"].experiment, []
    for run in runs.values():
        if run.seed or run.method.startswith(("dense", "ours")):
            continue
        names.append(run.method)
        same = {"lte": ours.lte, "stages": ours.stages, "optim": ours.optim}
        assert dataclasses.replace(run.experiment, **same) == ours
        assert (run.experiment.optim != ours.optim) == (run.method == "AdamW")
        other = run.method in ("shorter router stage", "AdamW")
        assert (run.experiment.stages != ours.stages) == other
        before, after = (dataclasses.asdict(e.lte) for e in (ours, run.experiment))
        changed = {key for key in before if before[key] != after[key]}
        allowed = [keys for start, keys in TOGETHER.items() if run.method.startswith(start)]
        assert changed <= allowed[0] if allowed else len(changed) == (not other)
    assert len(names) == len(runs) / 3 - 3


def test_the_search_of_eta_never_sees_the_stories_of_results(tmp_path):
    search, lambdas = (runs_of(f"paper{words}", tmp_path) for words in ("", ":separability"))
    assert {run.experiment.data.validation for run in search.values()} == {""}
    assert "" not in {run.experiment.data.validation for run in lambdas.values()}
    weights = {run.experiment.lte.separability_weight for run in lambdas.values() if run.target}
    assert weights == {0, 0.5, 1}
    for run in search.values():
        lte, free = run.experiment.lte, ("efficiency_weight", "separability_eps")
        own = {key: getattr(lte, key) for key in free}
        assert "dense" in run.method or lte == dataclasses.replace(config.PRESETS["paper"], **own)


def test_a_preset_as_overrides():
    base = str(ROOT / "configs/tinystories.py:babyllama")
    for name, preset in config.PRESETS.items():
        assert config.load_config(base, config.preset(name)).lte == preset
    assert config.preset("ours") == ()


def test_the_rows_of_tinystories_are_those_of_its_benchmark(tmp_path):
    """That is, its settings."""
    sweep, place = config.load_sweep(str(ROOT / "configs/sweeps/tinystories.py"))
    steps = set()
    for run in expand(sweep, place, tmp_path):
        stages = run.experiment.stages
        steps.add(stages.finetune.steps + stages.router.steps + stages.adapt.steps)
    assert steps == {0, 300}


def test_the_grid_of_the_documentation_expands(tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    namespace: dict = {}
    exec(block[1], namespace)
    runs = expand(namespace["get_sweep"](), str(ROOT / "configs/demo.py"), tmp_path)
    names = [run.name for run in runs if run.seed == 0]
    assert names == [
        "start-0", "dense-0", "ours-0.5-0", "ours-0.75-0", "random-groups-0.75-0",
        "fixed-eta-0.5-0", "fixed-eta-0.75-0",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ running


def test_every_run_is_made_once(made, capsys):
    _, folder, runs, fake = made
    assert running.run_all(runs, folder, 2, fake) == []
    assert sorted(fake.made) == sorted(run.name for run in runs)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18 and lines[-1].startswith("18/18 ") and " left" not in lines[-1]
    ours = f"ours-0.5-0: perplexity per token {quality(runs[2])[0]:.3f}, 51.0% skipped; about"
    assert any(ours in line for line in lines)
    assert running.run_all(runs, folder, 2, fake) == [] and len(fake.made) == 18
    assert capsys.readouterr().out == ""


class Killed(BaseException):
    """The end of a process, for a test."""


def test_a_killed_sweep_goes_on(made):
    _, folder, runs, fake = made

    def killed(spec, workdir, *how):
        if len(fake.made) == 7:
            raise Killed
        return fake(spec, workdir, *how)

    with pytest.raises(Killed):
        running.run_all(runs, folder, 1, killed)
    assert len(fake.made) == 7
    assert running.run_all(runs, folder, 1, fake) == []
    assert sorted(fake.made) == sorted(run.name for run in runs)  # none twice


def test_a_failing_run_does_not_stop_the_others(made, capsys):
    _, folder, runs, fake = made
    fake.broken = {"ours-0.5-1"}
    [failed] = running.run_all(runs, folder, 2, fake)
    assert failed.name == "ours-0.5-1" and len(fake.made) == 18
    log = folder.root / "ours-0.5-1.log"
    said = f"ours-0.5-1: failed with code 1, see {log}: error: too bad\n"
    assert said in capsys.readouterr().out
    fake.broken, fake.made = set(), []
    assert running.run_all(runs, folder, 2, fake) == [] and fake.made == ["ours-0.5-1"]


def test_what_goes_on_from_a_failed_run_fails_with_it(tmp_path, capsys):
    methods = {"ours": Row(after="start"), "start": Row(DENSE, ()), "other": Row()}
    sweep, folder = Sweep("demo.py", methods, (0.5,)), Folder(tmp_path)
    runs = expand(sweep, DEMO, tmp_path)
    fake = Fake(runs, broken={"start-0"})
    failed = running.run_all(runs, folder, 1, fake)
    assert [run.name for run in failed] == ["start-0", "ours-0.5-0"]
    assert fake.made == ["start-0", "other-0.5-0"]
    assert "ours-0.5-0: not begun, as start-0 failed" in capsys.readouterr().out


def test_two_sweeps_at_once_share_the_runs(made):
    _, folder, runs, fake = made

    def slowly(*how):
        time.sleep(0.02)
        return fake(*how)

    ended = []
    sweeps = [
        threading.Thread(target=lambda: ended.append(running.run_all(runs, folder, 2, slowly)))
        for _ in range(2)
    ]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join(60)
    assert ended == [[], []] and sorted(fake.made) == sorted(run.name for run in runs)


def test_a_run_in_other_hands_is_waited_for_and_taken_over(made, capsys, monkeypatch):
    """As that of a sweep that was killed: the run itself holds the lock."""
    _, folder, runs, fake = made
    monkeypatch.setattr(running, "_LOOK_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(folder.taken(runs[0]))
        sleeper = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    done = threading.Thread(target=running.run_all, args=(runs[:2], folder, 1, fake))
    done.start()
    deadline = time.monotonic() + 60
    while "waiting for untouched-0" not in capsys.readouterr().out:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert fake.made == ["fine-tuned-0"]
    sleeper.kill()  # without having finished it
    sleeper.wait()
    done.join(60)
    assert fake.made == ["fine-tuned-0", "untouched-0"]


def test_a_process_is_asked_to_stop_and_waited_for(tmp_path, monkeypatch):
    """Code 143, as of a run that has saved its state."""
    (tmp_path / "lte_jax").mkdir()
    (tmp_path / "lte_jax/__init__.py").touch()
    program = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    program += "print(sys.argv[1:], flush=True)\ntime.sleep(60)\n"
    (tmp_path / "lte_jax/__main__.py").write_text(program)
    monkeypatch.chdir(tmp_path)  # whose lte_jax comes first in `python -m`
    monkeypatch.delenv("PYTHONPATH", raising=False)
    log = processes.log(tmp_path / "run")
    stopping = lambda: log.exists() and "train" in log.read_text()  # noqa: E731
    monkeypatch.setattr(processes.interrupt, "requested", stopping)
    assert processes.train("demo", tmp_path / "run", ["seed=1"]) == 143
    told = ["train", "--config=demo", "--processes=1", f"--workdir={tmp_path / 'run'}"]
    told.append("--config.seed=1")
    assert log.read_text() == f"{told}\n"


# --------------------------------------------------------------------------------------- the folder


def test_a_grid_may_grow_but_not_change(made):
    sweep, folder, runs, fake = made
    running.run_all(runs, folder, 1, fake)
    more = dict(sweep.methods) | {"new": Row(("lte.grouping=kmeans",))}
    grown = grid(methods=more, targets=(0.5, 0.75, 0.9), seeds=(0, 1, 2, 3), reference="")
    folder.check(grown, expand(grown, DEMO, folder.root))
    less = {name: row for name, row in more.items() if name != "ours"}
    other = more | {"ours": Row(("lte.expert_size=8",))}
    kept = {"methods": more, "targets": (0.5, 0.75, 0.9), "seeds": (0, 1, 2, 3), "reference": ""}
    for named, change in {
        "methods.ours:": {"methods": less},
        "methods.ours.overrides:": {"methods": other},
        "seeds:": {"seeds": (0, 1)},
        "overrides:": {"overrides": ("optim.name=sgd", "log_every=3")},
        "config:": {"config": "glue.py"},
    }.items():
        with pytest.raises(UserError, match=f"another grid, which differs in {named}"):
            folder.check(grid(**kept | change), [])
    free = {"overrides": ("eval_every=0", "checkpoint.keep_last=1")}  # trains the same
    folder.check(grid(**kept | free), [])


def test_runs_of_an_earlier_sweep_are_not_made_again(made, tmp_path):
    """Only what it lacks, what has other settings, and what others still have to go on from."""
    sweep, folder, runs, fake = made
    for run in runs[:-3]:
        finish(run, folder.workdir(run))
    whole = results.collect(sweep, runs, folder)
    whole["runs"][1]["settings"] = ["seed=7"]
    whole["runs"][2]["settings"] += ["report_dense=False"]  # trains the same
    path = tmp_path / "results.json"
    path.write_text(json.dumps(whole))
    again = Folder(tmp_path / "again")
    again = dataclasses.replace(again, known=results.known(path, runs, again))
    again.check(sweep, runs)
    assert running.run_all(runs, again, 1, fake) == []
    assert fake.made == [run.name for run in (runs[1], *runs[-3:])]
    told = results.collect(sweep, runs, again)
    assert told["missing"] == [] and [row["name"] for row in told["runs"]] == [r.name for r in runs]
    for run in runs[-3:]:
        finish(run, folder.workdir(run))
    assert told["summary"] == results.collect(sweep, runs, folder)["summary"]
    goes_on, empty = dataclasses.replace(runs[1], after=runs[0].name), Folder(tmp_path / "empty")
    assert results.known(path, runs[:2], empty).keys() == {runs[0].name}
    assert results.known(path, [runs[0], goes_on], empty) == {}
    with pytest.raises(UserError, match="no results of a sweep"):
        (tmp_path / "other.json").write_text("{}")
        results.known(tmp_path / "other.json", runs, again)


def test_runs_of_other_settings_are_refused(made):
    """As after a change of the configuration's own file."""
    sweep, folder, runs, fake = made
    running.run_all(runs, folder, 1, fake)
    lte = dataclasses.replace(runs[2].experiment.lte, expert_size=8)
    changed = dataclasses.replace(
        runs[2], experiment=dataclasses.replace(runs[2].experiment, lte=lte)
    )
    with pytest.raises(UserError, match=r"ours-0.5-0 holds .* differs in config.lte.expert_size"):
        folder.check(sweep, [*runs[:2], changed])


# -------------------------------------------------------------------------------------- the results


@pytest.fixture
def gathered(made):
    sweep, folder, runs, fake = made
    running.run_all(runs, folder, 1, fake)
    return results.collect(sweep, runs, folder), {run.name: quality(run) for run in runs}


def test_the_summary_is_numpys(gathered):
    found, by_name = gathered
    assert found["dense"] == "fine-tuned" and found["metric"] == "perplexity per token"
    assert found["missing"] == [] and len(found["runs"]) == 18
    run = next(run for run in found["runs"] if run["name"] == "ours-0.9-1")
    assert (run["seconds"], run["commit"], run["target"]) == (12.0, "abc", 0.9)
    assert "lte.target_sparsity=0.9" in run["settings"] and run["quality"] == run["token_ppl"]
    ppl = {
        name: np.array([by_name[f"{name}-{seed}"][0] for seed in range(3)])
        for name in ("fine-tuned", "untouched", "ours-0.9", "largest-0.9")
    }
    assert ppl["fine-tuned"].mean() < ppl["untouched"].mean()
    [oracle] = [e for e in found["summary"] if (e["method"], e["target"]) == ("largest", 0.9)]
    loss = 100 * (ppl["largest-0.9"] / ppl["fine-tuned"] - 1)
    ours = 100 * (ppl["ours-0.9"] / ppl["fine-tuned"] - 1)
    for key, values in {
        "quality": ppl["largest-0.9"],
        "loss": loss,
        "difference": loss - ours,
        "sparsity": np.full(3, 0.91),
        "gflops_per_token": np.full(3, 1.09),
    }.items():
        expected = {"mean": values.mean(), "deviation": values.std(ddof=1)}
        expected["error"] = values.std(ddof=1) / np.sqrt(3)
        assert oracle[key] == pytest.approx(expected, abs=1e-12), key
    assert oracle["oracle"] and oracle["seeds"] == [0, 1, 2]
    np.testing.assert_allclose(oracle["sparsity_per_layer"], [0.81, 1.01])
    [best] = [e for e in found["summary"] if e["method"] == "fine-tuned"]
    assert best["loss"] == {"mean": 0.0, "deviation": 0.0, "error": 0.0}
    assert best["difference"] is None


def row(method, seed, value, target=None, **more):
    made = {"method": method, "target": target, "seed": seed, "quality": value, "oracle": False}
    made |= {"experts": target is not None, "sparsity": target or 0.0, "seconds": 1.0}
    return made | {"token_ppl": value, "gflops_per_token": 1.0} | more


def test_differences_are_of_the_same_seed():
    """Seeds that differ by far more than the methods."""
    rows = [row("dense", 0, 2.0), row("dense", 1, 4.0), row("ours", 1, 4.4, 0.5)]
    rows += [row("ours", 0, 2.2, 0.5), row("ours", 2, 9.0, 0.5)]
    [_, ours] = results.summary(rows, "dense")
    assert ours["loss"] == pytest.approx({"mean": 10.0, "deviation": 0.0, "error": 0.0}, abs=1e-9)
    assert ours["seeds"] == [0, 1, 2] and ours["quality"]["mean"] == pytest.approx(5.2)
    [alone] = results.summary([row("ours", 0, 2.2, 0.5)], None)
    assert alone["loss"] is None and alone["quality"]["error"] is None


def test_a_difference_at_as_many_flops():
    """Between targets of the reference, beyond its last one, of few seeds, not of oracles."""
    made = [row("dense", s, 2.0, gflops_per_token=4.0) for s in (0, 1)]
    for target, flops, value in ((0.5, 3.0, 2.2), (0.9, 2.0, 2.6)):
        made += [row("ours", s, value, target, gflops_per_token=flops) for s in (0, 1)]
    other = {"between": (2.75, 2.5), "dearer": (5.0, 2.1), "beyond": (1.95, 2.7), "far": (1.8, 3.0)}
    made += [
        row(name, 0, value, 0.9, gflops_per_token=flops) for name, (flops, value) in other.items()
    ]
    for seed, flops in enumerate((2.75, 1.8)):  # of one seed there would be a number
        made.append(row("half", seed, 2.5, 0.9, gflops_per_token=flops))
    made.append(row("oracle", 0, 2.1, 0.9, gflops_per_token=2.75) | {"oracle": True})
    made.append(row("unknown", 0, 2.1, 0.9, gflops_per_token=None))
    of = {e["method"]: e["difference_at_cost"] for e in results.summary(made, "dense", "ours")}
    assert of["between"] == {"mean": pytest.approx(25 - 15), "deviation": None, "error": None}
    assert of["beyond"]["mean"] == pytest.approx(35 - 31)
    none = ("dense", "ours", "dearer", "far", "half", "oracle", "unknown")
    assert all(of[name] is None for name in none) and len(of) == 9


def test_the_best_dense_row_is_of_seeds_that_all_have():
    rows = [row("a", 0, 2.0), row("a", 1, 9.0), row("b", 0, 3.0), row("ours", 0, 1.0, 0.5)]
    assert results.best_dense(rows) == "a"  # 5.5 over both seeds
    scored = [r | {"metrics": {"accuracy": r["quality"]}} for r in rows]
    assert results.best_dense(scored) == "b"  # of a metric more is better
    assert results.best_dense(rows[3:]) is None


def test_the_table(gathered):
    found, _ = gathered
    lines = tables.table(found).splitlines()
    by = {(e["method"], e["target"]): e for e in found["summary"]}
    one = by["largest", 0.9]
    assert lines[0] == (
        "| method | target | seeds | FFN sparsity | perplexity per token | against best dense | "
        "GFLOPs / token |"
    )
    told = f"{one['quality']['mean']:.3f} ± {one['quality']['error']:.3f}"
    against = f"{one['loss']['mean']:+.1f} ± {one['loss']['error']:.1f}%"
    assert f"| largest (oracle) | 90% | 3 | 91.0% | {told} | {against} | 1.09 |" in lines
    [best] = [line for line in lines if "| best dense |" in line]
    assert best.startswith("| fine-tuned |  | 3 | 0.0% |") and best.endswith(" | 2 |")
    assert len(lines) == 8 and len({line.count("|") for line in lines}) == 1
    said = tables.notes(found)
    assert "of the best dense row: fine-tuned." in said and "An oracle looks" in said
    runs = len(found["runs"])
    assert f"Not finished: 1 of {runs + 1} runs: x." in tables.notes(found | {"missing": ["x"]})
    many = tables.notes(found | {"missing": list("abcdefg")})
    assert f"Not finished: 7 of {runs + 7} runs, a the first." in many


def test_the_overview_has_a_line_for_each_method(gathered):
    found, _ = gathered
    lines = tables.overview(found).splitlines()
    by = {(e["method"], e["target"]): e for e in found["summary"]}
    assert lines[0] == "| method | seeds | as it is | 50% | 90% |"
    best = by["fine-tuned", None]["quality"]["mean"]
    assert f"| fine-tuned | 3 | {best:.3f} |  |  |" in lines
    for method, name in ("ours", "ours"), ("largest", "largest (oracle)"):
        told = [by[method, target]["loss"] for target in (0.5, 0.9)]
        cells = [f"{gap['mean']:+.1f} ± {gap['error']:.1f}%" for gap in told]
        assert f"| {name} | 3 |  | {' | '.join(cells)} |" in lines
    assert len({line.count("|") for line in lines}) == 1


def far_off():
    """Rows of which one has a figure's whole room, and one none of it."""
    rows = [row("dense", 0, 2.0), row("ours", 0, 2.2, 0.5), row("far", 0, 3.2, 0.5)]
    rows += [row("gone", 0, 3000.0, 0.5)]
    found = {"metric": "perplexity per token", "dense": "dense", "runs": rows, "missing": []}
    found["grid"] = {"reference": "ours"}
    return found | {"summary": results.summary(rows, "dense", "ours")}


def test_what_is_far_off_is_in_tables_alone():
    found = far_off()
    assert "| far | 1 |  | +60.0% |" in tables.overview(found)
    assert "| gone | 1 |  | 1,500 times |" in tables.overview(found)
    assert [entry["method"] for entry in tables._with_room(found)] == ["dense", "ours"]
    assert "Figures leave out" in tables.notes(found)
    assert "| gone | 50% | 1 | 50.0% | 3,000 | 1,500 times |" in tables.table(found)


def test_what_is_far_off_is_in_no_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure))
    tables.draw(far_off(), tmp_path)
    names = [line.get_label() for figure in drawn for axes in figure.axes for line in axes.lines]
    assert "ours" in names and not {"far", "gone"} & {*names}


def test_metrics_are_points_and_more_is_better():
    rows = [row("dense", s, 90.0 + s) for s in (0, 1)]
    rows += [row("ours", s, 89.0 - s, 0.5) for s in (0, 1)]
    for r in rows:
        del r["token_ppl"]
        r["metrics"] = {"accuracy": r["quality"]}
    best = results.best_dense(rows)
    found = {"metric": "accuracy", "dense": best, "runs": rows, "grid": {"reference": ""}}
    found |= {"summary": results.summary(rows, best), "missing": []}
    assert "| ours | 50% | 2 | 50.0% | 88.500 ± 0.500 | -2.00 ± 1.00 | 1 |" in tables.table(found)
    assert "in points" in tables.notes(found)


def test_files_and_figures(gathered, tmp_path):
    pytest.importorskip("matplotlib")
    found, _ = gathered
    written = tables.write(found, tmp_path)
    assert [path.name for path in written] == [
        "table.md", "quality.png", "cost.png", "layers.png", "ablation.png", "results.json",
    ]  # fmt: skip
    assert all(path.stat().st_size for path in written)
    assert json.loads(written[-1].read_text()) == json.loads(report.as_json(found))
    by = {(e["method"], e["target"]): e for e in found["summary"]}
    models = [{"models": tables._models(found)}]
    with style.applied():
        figure = figures.quality_panels({"": models}, across=figures.GFLOPS)
    [axes] = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert [*lines["dense"].get_xdata(), *lines["dense"].get_ydata()] == [2.0, 0.0]
    np.testing.assert_allclose(lines["ours"].get_xdata(), [1.49, 1.09])
    ends = [by["ours", target]["loss"] for target in (0.5, 0.9)]
    np.testing.assert_allclose(lines["ours"].get_ydata(), [end["mean"] for end in ends])
    bars = axes.containers[0].lines[2][1].get_segments()  # up and down
    np.testing.assert_allclose(
        np.ptp(np.array(bars)[:, :, 1], 1), [2 * end["error"] for end in ends]
    )
    panels = tables._differences(found)
    assert list(panels) == ["at 50%", "at 90%"]
    [shown] = panels["at 90%"].values()
    assert shown[0] == by["largest", 0.9]["difference"]["mean"]
    with style.applied():
        [left, _] = figures.bar_panels(panels, "x").axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["largest (oracle)"]
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], [
        by["largest", 0.5]["difference"]["mean"]
    ])  # fmt: skip


def test_many_methods_are_told_apart():
    marks = style.marks([str(i) for i in range(36)])
    assert len({(mark["color"], mark["marker"]) for mark in marks.values()}) == 36


# -------------------------------------------------------------------------------------- the command


def sweep_command(*words):
    command.main([f"--config={ROOT / 'configs/sweeps/tinystories.py:smoke'}", *words])


def test_the_command_lists_collects_and_fails(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = (f"--out={out}", "--no-figures")
    sweep_command(*flags, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["1\tdense-fine-tuned-0\t", "2\tours-0.5-0\t"]
    assert len(lines) == 10 and not out.exists()
    with pytest.raises(SystemExit) as stopped:
        sweep_command(*flags, "--collect")
    assert stopped.value.code == 2 and "has no finished run" in capsys.readouterr().err
    sweep, place = config.load_sweep("tinystories:smoke")
    runs = expand(sweep, place, out)

    def fake(spec, workdir, overrides, inherited):
        run = next(run for run in runs if run.name == workdir.name)
        if run.name == "ours-0.5-1":
            return 3
        finish(run, workdir)
        return 0

    run_all = running.run_all
    monkeypatch.setattr(command, "run_all", lambda *how: run_all(*how, runner=fake))
    sweep_command(*flags, "--run=3")
    assert [path.name for path in out.glob("*/results.json")] and not (out / "table.md").exists()
    with pytest.raises(SystemExit) as stopped:
        sweep_command(*flags, "--workers=2")
    assert stopped.value.code == (
        f"1 failed, and are tried again by the same command: {out / 'ours-0.5-1.log'}"
    )
    told = json.loads((out / "results.json").read_text())
    assert told["missing"] == ["ours-0.5-1"] and len(told["runs"]) == 9
    assert "Not finished: 1 of 10 runs: ours-0.5-1." in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--out=o", "--wrokers=2"), "unrecognized --wrokers=2"),
        (("--out=o", "--workers=0"), "expected a positive integer"),
        (("--out=o", "--run=1", "--collect"), "not allowed with argument"),
        (("--out=o", "--run=10"), "--run=10: the grid has 10 runs: expected 0 to 9"),
        (("--out=o", "--config.lte.expert_sise=8"), "unknown key config.lte.expert_sise"),
        ((), "required: --out"),
    ],
)
def test_bad_input_flags(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        sweep_command(*words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line in said
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------------------- for real


@pytest.mark.slow
@pytest.mark.skipif(
    "LTE_JAX_SWEEPS" not in os.environ, reason="twenty runs take five minutes: `make resume`"
)
def test_a_killed_sweep_of_real_runs_ends_as_if_nothing_happened(tmp_path):
    small = dataclasses.replace(tiny.CONFIG, vocab_size=259, max_length=64, d_ff=96)
    lte_jax.save(tmp_path / "model", *tiny.model_and_params(lte=None, config=small))
    data.byte_tokenizer().save_pretrained(tmp_path / "model")
    given = [f"--config.source.path={tmp_path / 'model'}"]
    for split, words in (("train", "fox and hen"), ("validation", "hen and hare")):
        texts = (json.dumps({"text": f"{i} {words} " * 9}) + "\n" for i in range(64))
        (tmp_path / f"{split}.jsonl").write_text("".join(texts))
        given.append(f"--config.data.{split}={tmp_path / split}.jsonl")
    call = [sys.executable, "-m", "lte_jax.sweep", "--workers=2", *given]
    call += ["--config=configs/sweeps/tinystories.py:smoke"]

    def sweep(out, killed=None, after=0.0):
        process = subprocess.Popen([*call, f"--out={out}"], cwd=ROOT, stdout=subprocess.PIPE)
        if killed is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(after)
            process.send_signal(killed)
        process.communicate(timeout=900)
        return process.returncode

    seed = int(os.environ.get("LTE_JAX_SEED", time.time_ns() % 1000))
    print(f"LTE_JAX_SEED={seed}")  # pytest shows it if the test fails
    moments, numbers = random.Random(seed), {}
    for name, kills in {"whole": 0, "killed": 5}.items():
        out, before = tmp_path / name, {}
        for i in range(kills):
            number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
            assert sweep(out, number, moments.uniform(2, 25)) in (-number, 128 + number, 0)
            assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
            before = {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")}
        assert sweep(out) == 0
        assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
        told = json.loads((out / "results.json").read_text())
        numbers[name] = [(run["name"], run["quality"], run["sparsity"]) for run in told["runs"]]
        model = json.loads((out / "ours-0.5-0/results.json").read_text())["models"][-1]
        assert "latency_ms" not in model and "sample" not in model
    assert len(numbers["whole"]) == 10 and numbers["killed"] == numbers["whole"]
