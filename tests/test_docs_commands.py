"""Every command of README and docs that calls a program of ours runs to its end, made small.

    LTE_JAX_BLOCKS=1 pytest tests/test_docs_commands.py     (or: make blocks)

Small is the word `smoke` of each configuration, four steps where a line asks for more, and models
and data sets made up by docs_world.py under the names that the lines give. Lines share a folder,
and one that reads what another one makes (runs/mine) comes after it, on whichever page that is.
"""

import functools
import json
import math
import os
import pathlib
import re
import sys

import docs_world
import jax
import pytest
from docs_code import COMMANDS, OURS, ROOT, program

from lte_jax import config, figures, preflight, sharding

RUNS = re.compile(r"runs/[\w-]+")
# What makes a benchmark small. Pictures would be drawn into docs/, and the demo made small has no
# third layer.
SMALL = {
    "benchmarks/glue.py": ("--smoke", "--seeds=1", "--targets=0.9"),
    "benchmarks/pictures.py": ("--out=pictures", "--layer=2"),
    "benchmarks/quantization.py": ("--calibration-tokens=512",),
}


def _lines():
    """Page and words of each line that is run; of `make demo`, those of its recipe."""
    recipe = re.search(r"^demo:.*\n\t\$\(BIN\)/(python .*)$", (ROOT / "Makefile").read_text(), re.M)
    for page, words in COMMANDS:
        words = recipe[1].split() if words == ["make", "demo"] else words
        if program(words)[0] in OURS:
            yield page, words


def _small(page, words):
    """The words of a line, made small, with a place for what stands for a file of the reader's."""
    made = []
    for word in words:
        for name, place in docs_world.PLACES.get(page, {}).items():
            word = word.replace(name, place)
        if word.startswith("--config="):
            word += ",smoke" if ":" in word else ":smoke"
        made.append(re.sub(r"([.-]steps=)[1-9]\d*$", r"\g<1>4", word))
    return [*made, *SMALL.get(words[1], ())]


LINES = [_small(page, words) for page, words in _lines()]
WRITTEN = [f"{page}: {' '.join(words)}" for page, words in _lines()]


def _flag(words, name):
    """The value of a flag; None: it is not there."""
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), None)


def _makers():
    """The folders of runs/ that lines make for others -> the first line that does."""
    made = {}
    for number, words in enumerate(LINES):
        name = {"train": "workdir", "sweep": "out", "prepare": "out"}.get(program(words)[0])
        if name is not None:
            made.setdefault(_flag(words, name), number)
    return made


MAKERS = _makers()


def _needs(number):
    """The lines that make what a line reads."""
    found = (MAKERS.get(folder) for word in LINES[number] for folder in RUNS.findall(word))
    return sorted({maker for maker in found if maker not in (None, number)})


def _parameters():
    """Each line; with `pytest --dist loadgroup`, those that read or are read run in one process."""
    read = {maker for number in range(len(LINES)) for maker in _needs(number)}
    for number, words in enumerate(LINES):
        group = "sweep" if program(words)[0] == "sweep" else "runs"
        together = pytest.mark.xdist_group(group)
        marks = [together] if number in read or _needs(number) else []
        yield pytest.param(number, marks=marks, id=WRITTEN[number])


# --------------------------------------------------------------------------------- what is promised


def _train(words, said):
    if any(word.startswith("--plan") for word in words):
        assert "\nmemory   " in said.out
        return
    workdir = pathlib.Path(_flag(words, "workdir"))
    dense_only = "control" in _flag(words, "config")
    assert (workdir / "dense/config.json").exists()
    assert (workdir / "lte/config.json").exists() != dense_only
    measured = json.loads((workdir / "results.json").read_text())["models"]
    assert len(measured) == (1 if dense_only else 2)
    for model in measured:
        assert math.isfinite(figures.quality(model)[1]) and 0 <= model["sparsity"] <= 1
    assert said.out.strip().endswith("results.json") or "finished" in said.out
    assert not _flag(words, "config.wandb") or (workdir / "wandb-run").exists()


def _evaluate(words, said):
    shares = (_flag(words, "sparsity") or "").split(",")
    for name in (f"LTE, {100 * float(s):g}%" if s else "LTE" for s in shares):
        assert f"| {name} |" in said.out
    assert ("| dense |" in said.out) == any(word.startswith("--dense=") for word in words)
    for task in filter(None, (_flag(words, "tasks") or "").split(",")):
        assert f"| {task} |" in said.out
    if out := _flag(words, "out"):
        assert json.loads(pathlib.Path(out, "results.json").read_text())
        assert "| LTE |" in pathlib.Path(out, "table.md").read_text()


def _generate(words, said):
    prompt = next(word for word in reversed(words) if not word.startswith("--"))
    assert said.out.startswith(prompt) and "tokens/s" in said.err


def _convert(words, said):
    model, out = words[2:4]
    kind = _flag(words, "quantize") or _flag(words, "dtype") or "dense"
    assert said.out.startswith(f"{out}: ") and kind in said.out
    names = {path.name for path in pathlib.Path(model).iterdir()}
    assert names == {path.name for path in pathlib.Path(out).iterdir()}


def _export_gguf(words, said):
    assert said.out.startswith(f"{words[3]}: llama, ")
    assert pathlib.Path(words[3]).read_bytes()[:4] == b"GGUF"


def _sweep(words, said):
    out = pathlib.Path(_flag(words, "out"))
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == 10 and not results["missing"]
    if "--list" in words:
        assert said.out.count("\tfinished\n") == 10
    elif (number := _flag(words, "run")) is not None:
        assert (out / results["runs"][int(number)]["name"] / "results.json").exists()
    else:
        assert "| ours |" in said.out and said.out.strip().endswith("results.json")


def _prepare(words, said):
    out = _flag(words, "out")
    assert said.out.endswith(f"{out}: train with --config.data.train={out}\n")
    assert (pathlib.Path(out) / "manifest.json").exists()


def _benchmark(words, said):
    if words[1] == "benchmarks/glue.py":
        table = pathlib.Path(_flag(words, "out"), "table.md").read_text()
        tasks = (_flag(words, "tasks") or "sst2,mrpc,rte").split(",")
        assert all(f"| {task} | LTE, 90% |" in table for task in tasks) and table in said.out
    elif words[1] == "benchmarks/quantization.py":
        rows = re.findall(
            r"^\| (\S+(?:, GPTQ)?(?:, scales learnt)?) \| [\d.]+ \| \S+% \| \S+% \|$",
            *(said.out, re.MULTILINE),
        )
        ways = ("", ", GPTQ", ", GPTQ, scales learnt")
        assert rows == [format + way for format in ("int8", "int6", "int4") for way in ways]
    else:
        drawn = [pathlib.Path("pictures", f"{name}.png") for name in ("idea", "kernels")]
        assert all(path.stat().st_size > 1000 for path in drawn)
        assert re.match(r"layer 2 skips \d", said.out)


CHECKS = {name: globals()[f"_{name.replace('-', '_')}"] for name in OURS}

# --------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    docs_world.make(folder)
    return folder


@pytest.fixture(scope="module")
def done():
    """The lines that have run, by number."""
    return set()


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("LTE_JAX_MIRROR", str(world / "hub"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes of sweeps
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "benchmarks"), *sys.path])
    one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one_device)  # as users have: the tests have eight


@pytest.mark.slow
def test_every_line_can_be_made_small(here):
    """What `make blocks` needs, seen without running it: words, places, models, data sets."""
    assert {program(words)[0] for words in LINES} <= CHECKS.keys()
    assert len(LINES) > 20 and len(MAKERS) > 10
    for words in LINES:
        kind = program(words)[0]
        assert kind != "benchmark" or words[1] in SMALL, f"say in SMALL what makes {words[1]} small"
        assert not re.search(r"\b(FOLDER|DATA)\b", " ".join(words)), words
        if kind == "train":
            keys = [word.removeprefix("--config.") for word in words if "--config." in word]
            made = config.load_config(_flag(words, "config"), [*keys, "wandb="])
            assert all(stage.steps <= 12 for stage in vars(made.stages).values())
            if made.data.train in MAKERS or any(word.startswith("--plan") for word in words):
                continue  # another line prepares it, or nothing is read
            mesh = sharding.make_mesh(made.mesh)
            assert preflight.prepare(made, mesh, None, {"end_token": None}).records


def _perform(number, done, monkeypatch, capsys):
    """Runs a line after those that make what it reads, and looks at what it promises."""
    for maker in _needs(number):
        if maker not in done:
            _perform(maker, done, monkeypatch, capsys)
    words = LINES[number]
    kind, args, call = program(words)
    monkeypatch.setattr(sys, "argv", [words[0], *args])
    capsys.readouterr()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        call()
    CHECKS[kind](words, capsys.readouterr())
    done.add(number)


@pytest.mark.skipif(
    "LTE_JAX_BLOCKS" not in os.environ, reason="some thirty runs take ten minutes: `make blocks`"
)
@pytest.mark.parametrize("number", [*_parameters()])
def test_a_line_runs_to_its_end(number, here, done, monkeypatch, capsys):
    if _flag(LINES[number], "config.wandb"):
        pytest.importorskip("wandb", reason="no wandb: pip install 'lte-jax[wandb]'")
    if number not in done:
        _perform(number, done, monkeypatch, capsys)
