"""Every block of code in README, CONTRIBUTING and docs/ is run, or parsed by the real program.

Python blocks run in order, in one namespace a page, with small random models and made-up texts in
place of those they name. Of shell blocks every line is parsed by the program it calls, so that
flags, configuration keys and files exist, and those in RUN are run. test_docs_commands.py runs
those of programs of ours to their end.
"""

import argparse
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny
from docs_code import (
    COMMANDS,
    ENDLESS,
    FENCE,
    NOT_RUN,
    OURS,
    PAGES,
    PROJECT,
    ROOT,
    WRITTEN,
    blocks,
    program,
)

import lte_jax
import lte_jax.plan
import lte_jax.sweep.command
from lte_jax import data, preflight
from lte_jax.config import LTEConfig, ModelConfig

HUB = ("HuggingFaceTB/SmolLM-135M",)  # ids whose place a small random Llama takes
SLOW = {"docs/metrics.md": "trains a run of configs/demo.py:smoke"}

# Lines that are run, by how they begin.
RUN = (
    "lte-jax generate runs/mine/lte",
    "lte-jax convert runs/mine/lte",
    "python evaluate.py --model=runs/mine/lte --dense=runs/mine/dense --data=",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkout with a finished run, texts, and a folder of models by hub id."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "benchmarks", "tests", "train.py", "evaluate.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()  # README takes it for texts: one page is enough
    (folder / "docs" / "flops.md").symlink_to(ROOT / "docs" / "flops.md")
    texts = [f"{i} times upon a time. " * 4 for i in range(40)]
    for name in ("texts.jsonl", "others.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = ModelConfig(d_model=32, d_ff=64, num_heads=2, num_kv_heads=2, max_length=512)
    dense = tiny.model_and_params(None, config)
    sparse = tiny.model_and_params(LTEConfig(expert_size=32), config)
    for hub_id in HUB:
        lte_jax.save(folder / "hub" / hub_id, *dense)
        data.byte_tokenizer().save_pretrained(folder / "hub" / hub_id)
    curve = tuple((i / 20, i / 20) for i in range(1, 20))
    asked = sparse[0].clone(lte=LTEConfig(expert_size=32, curve=curve)), sparse[1]
    runs = {"mine/dense": dense, "mine/lte": sparse, "dial/dense": dense, "dial/lte": asked}
    for name, made in runs.items():
        lte_jax.save(folder / "runs" / name, *made, source=folder / "hub" / HUB[0])
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("LTE_JAX_MIRROR", str(world / "hub"))
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return world


def test_every_block_says_its_language():
    for page in PAGES:
        for language in {found[2] for found in FENCE.finditer((ROOT / page).read_text())}:
            assert language in ("python", "sh", "text"), f"{page}: ```{language}"
        outside = FENCE.sub("", (ROOT / page).read_text())
        code = re.search(r"^\n {4}(python|import|from|pip|make) .*", outside, re.MULTILINE)
        assert not code, f"{page}: code without a fence, which no test sees: {code[0]}"
    assert blocks("README.md", "python") and len(COMMANDS) > 20


def _kernels():
    """What the operands of docs/kernels.md may be."""
    shapes = {
        "x_BD": (2, 16), "x_BK": (2, 16), "w": (4, 16, 8), "q_BHC": (2, 4, 8), "k_BKC": (2, 2, 8),
        "v_BKC": (2, 2, 8), "keys": (4, 2, 64, 2, 8), "values": (4, 2, 64, 2, 8),
    }  # fmt: skip
    key = jax.random.key(0)
    weights = {name: jax.random.normal(key, (4, 3, 8, 16)) for name in ("gate", "up", "down")}
    made = {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
    made |= {"active_BE": jnp.ones((2, 3), bool), "seen": jnp.ones((2, 64), bool)}
    return made | {"weights": weights}


GIVEN = {"docs/kernels.md": _kernels}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if blocks(page, "python")
    ],
)
def test_python_blocks_run(page, here, monkeypatch):
    if page == "docs/tasks.md":  # all but lm-eval's own work, whose data sets are on the hub
        lm_eval = pytest.importorskip(
            "lm_eval", reason="no lm-eval: pip install 'lte-jax[lm-eval]'"
        )
        monkeypatch.setattr(lm_eval, "simple_evaluate", lambda model, tasks: {"results": tasks})
        monkeypatch.setattr(lm_eval.utils, "make_table", str)
    namespace = {"__name__": "__main__"} | GIVEN.get(page, dict)()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for line, block in blocks(page, "python"):
            exec(compile("\n" * (line - 1) + block, ROOT / page, "exec"), namespace)


class _Parsed(BaseException):
    """Raised once a program has its flags."""


def _stop(*_, **__):
    raise _Parsed


def _look_up(name, args):
    """Whether what a program of others is asked for exists."""
    if name == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {arg for arg in args if "=" not in arg} <= targets
    elif name == "pytest":
        files = [arg.partition("::")[0] for arg in args if arg.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files)
    elif name == "pip":
        for arg in args:
            for extra in re.sub(r".*\[(.*)\]|.*", r"\1", arg).split(","):
                assert not extra or extra in PROJECT["optional-dependencies"], extra


@pytest.mark.parametrize("command", range(len(COMMANDS)), ids=WRITTEN)
def test_commands_are_parsed(command, here, monkeypatch, record_property):
    _, words = COMMANDS[command]
    name, args, call = program(words)
    if call is None:
        assert name in NOT_RUN, f"say in docs_code.py why {name} is not run"
        record_property("only looked up", NOT_RUN[name])
        return _look_up(name, args)
    assert name in OURS + ENDLESS
    monkeypatch.setattr(sys, "argv", [words[0], *args])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(lte_jax, "train", _stop)  # after its configuration is read
    monkeypatch.setattr(lte_jax.plan, "show", _stop)
    monkeypatch.setattr(lte_jax.sweep.command, "perform", _stop)
    monkeypatch.setattr(preflight, "of_texts", _stop)
    for way in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, way)
        stop = lambda *given, parse=parse: _stop(parse(*given))  # noqa: E731
        monkeypatch.setattr(argparse.ArgumentParser, way, stop)
    before = dict(os.environ)
    try:
        with pytest.raises(_Parsed):
            call()
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("start", RUN)
def test_commands_run(start, here, monkeypatch, capsys):
    chosen = [words for _, words in COMMANDS if " ".join(words).startswith(start)]
    assert chosen, f"no page says {start} any more"
    for words in chosen:
        _, args, call = program(words)
        short = [re.sub(r"^(--scale-steps=)\d+$", r"\g<1>2", arg) for arg in args]
        monkeypatch.setattr(sys, "argv", [words[0], *short])
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            call()
        assert capsys.readouterr().out.strip()
