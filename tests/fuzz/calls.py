"""Kinds of cases that hurt what is said on a command line or in a call; see files.py."""

import dataclasses
import io
import json
import os
import pathlib
import random
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import mutate
import numpy as np
from files import TEXTS, Case, copied, models, used

import lte_jax
from lte_jax import data
from lte_jax.config import Experiment, load_config, to_config_dict

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS_BL = np.arange(24, dtype=np.int32).reshape(2, 12)

# ---------------------------------------------------------------------------------- command lines


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a nested dict."""
    found = {}
    for key, value in tree.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        found |= inner or {prefix + key: value}
    return found


KEYS = _flat(to_config_dict(Experiment()).to_dict()) | {
    "source.scratch.rope_scaling.factor": 1.0,
    "source.scratch.rope_scaling.kind": "linear",
}
WORDS = (
    *("None", "true", "()", "(1,)", "1,2", "[1]", "{}", "{'a': 1}", "1_000", "0x10", "1e400", "--"),
    *("lambda: 0", "1+1", "1j", "b'a'", "float('nan')", "'a", '"', "*", "=", "a=b", "-1", "inf"),
    *("(" * 300 + ")" * 300, "-" * 5000 + "1", "9" * 5000, "[" * 5000),
)


def text_of(rng: random.Random, near: Any = "") -> str:
    """The text of a flag, often one near the value `near`."""
    word = rng.choice((
        lambda: rng.choice(WORDS),
        lambda: rng.choice(mutate.STRINGS),
        lambda: str(rng.choice(mutate.NUMBERS)),
        lambda: str(mutate.nudge(rng, near)),
        lambda: str(mutate.nudge(rng, near)),
    ))  # fmt: skip
    return word().replace("\0", "")  # no command line can hold one


def override(rng: random.Random) -> str:
    """One `key=value` of an experiment, now and then of none."""
    key = rng.choice(list(KEYS))
    value = text_of(rng, KEYS[key])
    if rng.random() < 0.1:
        key = rng.choice((key[:-1], key.rpartition(".")[0], key + ".x", text_of(rng), key.upper()))
    return key if rng.random() < 0.02 else f"{key}={value}"


def settings(rng: random.Random, box: pathlib.Path) -> Case:
    """Overrides of an experiment's keys."""
    file = rng.choice(("demo.py:smoke", "demo.py:paper", "tinystories.py", "llama7b.py"))
    overrides = [override(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]

    def run():
        experiment = load_config(str(ROOT / "configs" / file), overrides)
        json.dumps(dataclasses.asdict(experiment), allow_nan=False)
        return experiment.seed

    return Case(f"{file} {' '.join(o[:80] for o in overrides)}", run)


def command(main: Callable[[], Any], program: str, arguments: list[str]) -> str:
    """Runs a program in this process; its one line `error: ...` is raised as a UserError."""
    old, sys.argv = (sys.argv, sys.stdin), [program, *arguments]
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"def\n"))  # the worker's own is its list of cases
    try:
        main()
    except SystemExit as stopped:
        said = sys.stderr.getvalue()
        if not stopped.code:
            return "exit 0"
        assert stopped.code == 2, f"exit {stopped.code}: {said[:200]}"
        assert said.endswith("\n") and "Traceback" not in said, said[:200]
        *before, last = said.removesuffix("\n").split("\n")
        at = last.find("error: ")
        assert at == 0 or (at > 0 and before[:1] and before[0].startswith("usage:")), said[:200]
        assert "error: " not in "".join(before), said[:200]
        origin = stopped.__context__ or stopped
        raise lte_jax.UserError(last[at + 7 :]).with_traceback(origin.__traceback__) from None
    finally:
        sys.argv, sys.stdin = old
    sys.stdout.flush()
    return "exit 0"


def script(name: str) -> Callable[[], Any]:
    """A script of the project's root, as a function to call."""
    return lambda: runpy.run_path(str(ROOT / name), run_name="__main__")


def flags(rng: random.Random, box: pathlib.Path) -> Case:
    """The flags of `lte-jax generate` and `convert`, evaluate.py and train.py."""
    from lte_jax.cli import convert, generate

    folder = copied("float32 in 1", box / "model")
    (box / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    which = rng.choice(("generate", "convert", "evaluate.py", "train.py"))
    if which == "generate":
        given = {"": str(folder), " ": "def", "--max-new-tokens": "4", "--temperature": "0",
                 "--top-k": "5", "--top-p": "0.9", "--seed": "3", "--routing": "dense",
                 "--implementation": "auto", "--dtype": "float32",
                 "--file": "texts.jsonl"}  # fmt: skip
        keep, main = {"", " ", "--max-new-tokens"}, generate.main
    elif which == "convert":
        given = {"": str(folder), " ": "out", "--dtype": "bfloat16"}
        keep, main = {"", " ", "--dtype"}, convert.main
    elif which == "evaluate.py":
        given = {"--model": str(folder), "--data": "texts.jsonl", "--out": "out",
                 "--length": "16", "--records": "3", "--batch-size": "2", "--column": "text",
                 "--newline": " ", "--routing": "dense", "--threshold": "0.5", "--prompt": "def",
                 "--name": "mine", "--dtype": "float32", "--dense": str(folder)}  # fmt: skip
        keep, main = {"--model", "--data", "--out", "--length"}, script(which)
    else:
        given = {"--config": str(ROOT / "configs/demo.py:smoke"), "--workdir": "out",
                 "--config.data.train": "absent.jsonl",
                 "--config.stages.finetune.steps": "0"}  # fmt: skip
        keep, main = set(given), script(which)
    given = {key: word for key, word in given.items() if key in keep or rng.random() < 0.3}
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice([*given, *given, "--no-such", "--help", "-1", "--config.seed"])
        given[key] = text_of(rng, given.get(key, ""))
        if rng.random() < 0.1:
            given.pop(key)
    arguments = [word if key.strip() == "" else f"{key}={word}" for key, word in given.items()]
    if which == "evaluate.py":
        arguments.append("--no-figures")
    out = given.get("--out") or given.get("--workdir") or "out"
    out = given.get(" ", "out") if which == "convert" else out
    writes = () if "\0" in out else (pathlib.Path(box, os.path.expanduser(out)),)
    told = " ".join(arguments).replace(str(box), "BOX")
    return Case(f"{which} {told}", lambda: command(main, which, arguments), writes)


def run(rng: random.Random, box: pathlib.Path) -> Case:
    """A whole run of a tiny experiment, some of whose settings make no sense."""
    lines = [json.dumps({"text": text * 9}) + "\n" for text in TEXTS * 4]
    (box / "texts.jsonl").write_text("".join(lines))
    stages = [f"stages.{stage}.steps=1" for stage in ("finetune", "router", "adapt")]
    few = ["data.batch_size=2", "data.length=16", "lte.calibration_records=2", "sample_tokens=2"]
    given = [*stages, *few, "data.train=texts.jsonl", "data.validation=", "report=false"]
    wrong = [override(rng) for _ in range(rng.choice((1, 1, 2)))]
    wrong = [o for o in wrong if ".steps=" not in o or o.endswith(("-1", "=0", "None", "x", "2"))]

    def deed():
        experiment = load_config(str(ROOT / "configs" / "demo.py:smoke"), [*given, *wrong])
        model, params = lte_jax.train(experiment, box / "out")
        tokens_BL = np.arange(8, dtype=np.int32)[None] % model.config.vocab_size
        out = lte_jax.apply(model, params, tokens_BL)
        assert np.isfinite(np.asarray(out.logits, np.float32)).all(), "logits are not finite"
        return ", ".join(sorted(path.name for path in (box / "out").iterdir()))

    return Case(" ".join(o[:80] for o in wrong), deed, (box / "out",))


# -------------------------------------------------------------------------------------- functions


def hostile(rng: random.Random, good: Any) -> Any:
    """An argument in place of `good`: another value, shape, dtype or kind."""
    anything = [
        *(
            None,
            True,
            -1,
            0,
            1,
            7,
            10**6,
            2**31,
            2**63,
            10**30,
            0.5,
            -0.5,
            float("nan"),
            float("inf"),
        ),
        *("", "hrad", "hard", "dense", "soft", "top_k", "x" * 5000, "a\nb", "\ud800", "\0", b"a"),
        *([], {}, (), [[]], [1, 2], [[1, 2], [3]], [["a"]], [[1.5, 2.5]], [[None]], [[2**70]]),
        *(object(), len, int, np.float32(3), np.int64(2), np.zeros(()), np.zeros((0, 4), int)),
        *(jax.numpy.ones((1, 4), int), np.array("a"), pathlib.Path("x"), iter([[1, 2]]), {1: 2}),
    ]
    if isinstance(good, np.ndarray):
        wider = np.concatenate([good, good], axis=-1)
        anything += 3 * [
            *(good[0], good[None], good[:, :0], good[:1], good[:, ::-1], wider, good.T),
            *(good.astype(float), good.astype(bool), good.astype(np.uint8), good.astype(np.int64)),
            *(good.astype("U"), good.astype(object), -good, good + 60, good + 2**30, good.tolist()),
            *(good.astype(np.uint64) + 2**63, good * np.nan, np.ma.array(good, mask=good > 3)),
        ]
    if isinstance(good, dict):  # parameters
        leaves, tree = jax.tree.flatten(good)
        for change in (lambda x: x[..., :-1], lambda x: x * np.nan, lambda x: np.asarray(x),
                       lambda x: x.astype("int32"), lambda x: x.astype("float16"), lambda x: None,
                       lambda x: x[None], lambda x: "w"):  # fmt: skip
            at = rng.randrange(len(leaves))
            anything.append(tree.unflatten(leaves[:at] + [change(leaves[at])] + leaves[at + 1 :]))
        anything += [
            {k: v for k, v in good.items() if k != rng.choice(list(good))},
            good | {"extra": np.zeros(3)}, {"params": good},
        ]  # fmt: skip
    return rng.choice(anything)


def api(rng: random.Random, box: pathlib.Path) -> Case:
    """Arguments of the public functions."""
    model, params = models()[rng.choice(("dense", "lte"))]
    shared = {"model": model, "params": params}
    some = {"routing": None, "threshold": 0.5}
    good: dict[str, Any]
    name = rng.choice(
        ("apply", "apply", "generate", "generate", "moefy", "load", "save", "evaluate")
    )
    writes: tuple[pathlib.Path, ...] = ()
    if name == "apply":
        good = shared | some | {"tokens": TOKENS_BL, "mask": np.ones_like(TOKENS_BL)}
    elif name == "generate":
        good = shared | some | {
            "tokens": TOKENS_BL, "max_new_tokens": 4, "temperature": 0.0, "top_k": None,
            "top_p": None, "seed": 0, "eos_ids": (), "implementation": "auto", "mask": None,
        }  # fmt: skip
    elif name == "moefy":
        model, params = models()["dense"]
        good = {
            "model": model, "params": params, "calibration": TOKENS_BL, "mask": None,
            "expert_size": 8, "target_sparsity": 0.5, "grouping": "random", "seed": 0,
            "router_init": "normal", "threshold": 0.5,
        }  # fmt: skip
    elif name == "load":
        good = {"path_or_hub_id": str(copied("float32 in 1", box / "model")), "dtype": None}
    elif name == "save":
        good = {"path": "out", "source": None} | shared
    else:
        records = data.Records(TOKENS_BL, np.ones_like(TOKENS_BL))
        good = shared | some | {
            "records": records, "baseline": None, "tokenizer": None, "name": None, "batch_size": 2,
            "prompt": "def", "sample_tokens": 4, "latency_rounds": 0,
        }  # fmt: skip
    wrong = {}
    for key in rng.sample([key for key in good if key != "tokenizer"], rng.choice((1, 1, 1, 2))):
        wrong[key] = hostile(rng, good[key])
    rounds = wrong.get("latency_rounds")
    if isinstance(rounds, int) and rounds > 9:  # right, and it would take that long
        wrong["latency_rounds"] = 9
    arguments = good | wrong
    if name == "save":
        path = arguments["path"]
        if (
            isinstance(path, str | pathlib.Path)
            and str(path) not in ("", ".")
            and "\0" not in str(path)
        ):
            writes = (pathlib.Path(box, path),)

    def run():
        result = getattr(lte_jax, name)(**arguments)
        if name == "apply" and "params" not in wrong:  # values of parameters are as they are
            assert np.isfinite(np.asarray(result.logits)).all(), "logits are not finite"
        if name == "apply":
            assert 0 <= float(result.sparsity) <= 1, f"sparsity {result.sparsity}"
        if name == "generate":
            assert all(0 <= t < 64 for row in result for t in row), result
        if name == "evaluate":
            json.dumps(result, allow_nan=False)
        if name == "save":
            used(arguments["path"])
        if name in ("load", "moefy"):
            made, weights = result
            out = lte_jax.apply(made, weights, TOKENS_BL)
            assert np.isfinite(np.asarray(out.logits, np.float32)).all(), "logits are not finite"
        return name

    told = ", ".join(f"{key}={brief(value)}" for key, value in wrong.items())
    return Case(f"{name}({told})", run, writes)


def brief(value: Any) -> str:
    """An argument in a few words."""
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict) and value:
        return f"{{{', '.join(map(str, value))}}}"
    return repr(value)[:60]


def canary(rng: random.Random, box: pathlib.Path) -> Case:
    """What must be seen as a failure: tests/test_fuzz.py asks for each of these once."""

    def say(message: str):
        raise lte_jax.UserError(message)

    deeds = {
        "exception": lambda: int("x"),
        "exit": lambda: sys.exit(2),
        "recursion": lambda: json.loads("[" * 100_000),
        "warning": lambda: warnings.warn("careful", stacklevel=1),
        "empty": lambda: say(""),
        "in the box": lambda: pathlib.Path("new").write_text("x"),
        "outside": lambda: (box.parent / "new").mkdir(),
        "program": lambda: subprocess.run(["true"]),
        "memory": lambda: np.ones((3 << 30) // 8).sum(),
        "crash": lambda: os.abort(),
        "hang": lambda: time.sleep(60),
    }
    what = rng.choice(list(deeds))
    return Case(what, deeds[what])


KINDS = (settings, flags, run, api, canary)
