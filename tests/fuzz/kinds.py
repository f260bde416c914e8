"""The kinds of cases: what each gives the project, seeded, and what it then does with it.

A kind is a function of (rng, box) that lays its files into the empty folder `box`, the current one,
and returns a `Case`. What a case does must mean something: what was loaded also runs, and says
finite numbers or is refused.
"""

import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import sys
from collections.abc import Callable
from typing import Any

import hf_models
import jax
import mutate
import numpy as np
import tiny

import lte_jax
from lte_jax import data, hf
from lte_jax.config import Experiment, load_config, to_config_dict

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS = ["def f(x):\n    return x", "Zoë ate 3 apples.", "a", "The dog ran home and slept."]
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "do_sample": True}
TOKENS_BL = np.arange(24, dtype=np.int32).reshape(2, 12)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to try: a description, the deed, and where it may write."""

    what: str
    run: Callable[[], Any]
    writes: tuple[pathlib.Path, ...] = ()


# ------------------------------------------------------------------------------------- templates


@functools.cache
def models() -> dict[str, tuple]:
    """A dense model and an LTE model made from it, with their parameters."""
    config = dataclasses.replace(tiny.CONFIG, eos_ids=(2,))
    dense = tiny.model_and_params(None, config)
    settings = {"expert_size": 8, "grouping": "random", "router_init": "normal"}
    return {"dense": dense, "lte": lte_jax.moefy(*dense, **settings)}


_folders: dict[str, pathlib.Path] = {}


def prepare(root: pathlib.Path) -> None:
    """Makes the unharmed folders that cases begin with, and compiles what they share."""
    byte = data.byte_tokenizer()
    for name in hf_models.CASES:
        _folders[name] = hf_models.write_folder(root / name, hf_models.config_json(name))
        (root / name / "generation_config.json").write_text(json.dumps(GENERATION))
    small = hf_models.config_json("llama", vocab_size=259, num_hidden_layers=1, hidden_size=32)
    for dtype in ("float32", "bfloat16", "float16"):
        for shards in (1, 3):
            name = f"{dtype} in {shards}"
            _folders[name] = hf_models.write_folder(root / name, small, dtype=dtype, shards=shards)
            byte.save_pretrained(root / name)
    model, params = models()["lte"]
    experts_NEM = np.arange(128, dtype=np.int32).reshape(2, 8, 8) % 64
    hf.save(root / "lte", model.config, model.lte, params, None, experts_NEM)
    _folders["lte"] = root / "lte"
    lte_jax.generate(model, params, [[1, 2]], max_new_tokens=4)  # builds the CPU kernels


def copied(name: str, to: pathlib.Path) -> pathlib.Path:
    """A copy of an unharmed folder."""
    return pathlib.Path(shutil.copytree(_folders[name], to))


def misplaced(rng: random.Random, path: pathlib.Path) -> str:
    """Puts something else than a regular file in a file's place; says what."""
    path.unlink()
    kind = rng.choice(("nothing", "folder", "pipe", "device", "lost link", "loop", "empty"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind != "nothing":
        path.symlink_to({"device": "/dev/zero", "loop": path.name}.get(kind, "nowhere"))
    return f"{path.name} is {kind}"


def used(folder: Any, **settings: Any) -> str:
    """Loads a model and runs it; numbers that are not finite must be refused by `evaluate`."""
    model, params = lte_jax.load(folder, **settings)
    length = min(8, model.config.max_length)
    tokens_BL = np.arange(1, 1 + length, dtype=np.int32)[None] % model.config.vocab_size
    out = lte_jax.apply(model, params, tokens_BL)
    sparsity = float(out.sparsity)
    assert 0 <= sparsity <= 1, f"sparsity {sparsity}"
    scores = 0.0 if out.scores is None else out.scores
    if not (np.isfinite(np.asarray(out.logits, np.float32)).all() and np.isfinite(scores).all()):
        rows = data.Rows(tokens_BL, np.ones_like(tokens_BL))
        results = lte_jax.evaluate(model, params, rows, latency_rounds=0)
        loss = results["models"][-1]["loss"]
        raise AssertionError(f"logits or scores are not finite, and evaluate says loss {loss}")
    return f"{model.config.family}, {model.config.num_layers} layers, sparsity {sparsity:.2f}"


# ----------------------------------------------------------------------------------------- files


def config(rng: random.Random, box: pathlib.Path) -> Case:
    """config.json or generation_config.json of each family."""
    name, other = rng.choices(list(hf_models.CASES), k=2)
    folder = copied(name, box / "model")
    file = folder / rng.choice(("config.json",) * 5 + ("generation_config.json",))
    if rng.random() < 0.03:
        told = misplaced(rng, file)
    else:
        donor = hf_models.config_json(other)
        content, told = mutate.json_text(rng, json.loads(file.read_text()), donor)
        file.write_bytes(content)
    return Case(f"{name}/{file.name}: {told}", lambda: used(folder))


def weights(rng: random.Random, box: pathlib.Path) -> Case:
    """safetensors and their index."""
    name = f"{rng.choice(('float32', 'float32', 'bfloat16', 'float16'))} in {rng.choice((1, 3))}"
    folder = copied(name, box / "model")
    file = rng.choice(sorted(folder.glob("model*")))
    if rng.random() < 0.05:
        told = misplaced(rng, file)
    elif file.suffix == ".json":
        index = json.loads(file.read_text())
        if rng.random() < 0.5:
            tensor, shard = rng.choice(list(index["weight_map"].items()))
            places = ("..", f"../{shard}", f"../../box/model/{shard}", "/dev/zero", "/etc/passwd")
            place = rng.choice((*places, str(folder / shard), f"./{shard}", *mutate.STRINGS))
            index["weight_map"][tensor] = place
            content, told = mutate.dumps(index).encode(), f"{tensor} in {place[:60]!r}"
        else:
            content, told = mutate.json_text(rng, index)
        file.write_bytes(content)
    else:
        content, told = mutate.safetensors(rng, file.read_bytes())
        file.write_bytes(content)
    dtype = rng.choice((None, None, "float32", "bfloat16"))
    return Case(f"{name}/{file.name} as {dtype}: {told}", lambda: used(folder, dtype=dtype))


def lte(rng: random.Random, box: pathlib.Path) -> Case:
    """An LTE folder: config["lte"], routers, the order of experts, the manifest."""
    folder = copied("lte", box / "model")
    if rng.random() < 0.6:  # or most changes end at the sizes it holds
        (folder / "manifest.json").unlink(missing_ok=True)
    file = rng.choice([folder / "config.json", *folder.iterdir()])
    if rng.random() < 0.05:
        told = misplaced(rng, file)
    elif file.suffix == ".safetensors":
        content, told = mutate.safetensors(rng, file.read_bytes())
        file.write_bytes(content)
    else:
        raw = json.loads(file.read_text())
        if "lte" in raw and rng.random() < 0.7:
            raw["lte"], told = mutate.tree(rng, raw["lte"])
            content = mutate.dumps(raw).encode()
        else:
            content, told = mutate.json_text(rng, raw)
        file.write_bytes(content)

    def run():
        told = used(folder)
        order_NEM = hf.load_expert_order(folder)
        if order_NEM is not None:
            each_NF = np.sort(np.reshape(order_NEM, (len(order_NEM), -1)), axis=1)
            assert (each_NF == np.arange(each_NF.shape[1])).all(), "expert_order: no permutation"
        return told

    return Case(f"{file.name}: {told}", run)


def tokenizer(rng: random.Random, box: pathlib.Path) -> Case:
    """tokenizer.json and tokenizer_config.json."""
    folder = copied("float32 in 1", box / "model")
    file = folder / rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    raw, how = json.loads(file.read_text()), rng.random()
    if how < 0.03:
        told = misplaced(rng, file)
    elif how < 0.08 and file.name == "tokenizer_config.json":
        (folder / "mine.py").write_text("open('ran', 'w')\nclass T:\n    pass\n")
        file.write_text(json.dumps(raw | {"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}))
        told = "auto_map"
    else:
        content, told = mutate.json_text(rng, raw)
        file.write_bytes(content)

    def run():
        made = lte_jax.load_tokenizer(folder)
        documents = list(data.tokenize(TEXTS, made))
        assert len(documents) == len(TEXTS)
        for ids in documents:
            assert ids.ndim == 1 and ids.dtype == np.int32 and (ids >= 0).all()
            made.decode(ids.tolist())
        return f"{len(made)} tokens"

    return Case(f"{file.name}: {told}", run)


def texts(rng: random.Random, box: pathlib.Path) -> Case:
    """Text files of every kind through reading, tokenising and packing."""
    kind = rng.choice((".jsonl", ".jsonl", ".jsonl", ".json", ".txt", ".csv"))
    told = []
    rows: list[Any] = [{"text": rng.choice(TEXTS) * rng.choice((1, 1, 50))} for _ in range(5)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        at = rng.randrange(len(rows))
        rows[at], what = mutate.tree(rng, {"text": "abc"}) if rng.random() < 0.6 else (
            mutate.value(rng), "a value")  # fmt: skip
        told.append(f"row {at}: {what}")
    lines = [mutate.dumps(row) for row in rows]
    content = ("[" + ",\n".join(lines) + "]" if kind == ".json" else "\n".join(lines)).encode()
    how = rng.random()
    if how < 0.15:
        codec = rng.choice(("utf-16", "utf-8-sig", "latin-1", "utf-32-be"))
        content = content.decode().encode(codec, "replace")
        told.append(f"as {codec}")
    elif how < 0.35:
        content, what = mutate.blob(rng, content)
        told.append(what)
    elif how < 0.4:
        content, _ = content.replace(b"\n", b"\r\n"), told.append("CRLF")
    if rng.random() < 0.25:
        import gzip

        content = gzip.compress(content, mtime=0)
        if rng.random() < 0.5:
            content, what = mutate.blob(rng, content)
            told.append(f"gz: {what}")
        kind += ".gz"
    file = box / f"texts{kind}"
    file.write_bytes(content)
    if rng.random() < 0.04:
        told.append(misplaced(rng, file))
    column = rng.choice(("text",) * 8 + ("texts", "", "story\n"))
    newline = rng.choice(("\n", "\n", " ", "", "\ud800"))
    limit, length = rng.choice((None, None, 2, 0, -1)), rng.choice((2, 16, 64))

    def run():
        read = list(data.read_texts(str(file), column, newline, limit))
        for text in read:
            text.encode()
        documents = list(data.tokenize(read, data.byte_tokenizer()))
        packed = data.pack_rows(documents, length)
        assert (packed.segments_RL > 0).sum() == sum(map(len, documents))
        return f"{len(read)} texts, {len(packed)} rows"

    what = f"{file.name}, column {column!r}, limit {limit}: {'; '.join(told) or 'unharmed'}"
    return Case(what, run)


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
    """ "key=value" of an experiment, now and then of none."""
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
        return experiment.name

    return Case(f"{file} {' '.join(o[:80] for o in overrides)}", run)


def command(main: Callable[[], Any], program: str, arguments: list[str]) -> str:
    """Runs a program in this process; its one line `error: ...` is raised as a UserError."""
    old, sys.argv = sys.argv, [program, *arguments]
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
        sys.argv = old
    sys.stdout.flush()
    return "exit 0"


def script(name: str) -> Callable[[], Any]:
    """A script of the project's root, as a function to call."""
    import runpy

    return lambda: runpy.run_path(str(ROOT / name), run_name="__main__")


def flags(rng: random.Random, box: pathlib.Path) -> Case:
    """The flags of python -m lte_jax, evaluate.py and train.py."""
    from lte_jax import __main__ as program

    folder = copied("float32 in 1", box / "model")
    (box / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    which = rng.choice(("lte_jax", "evaluate.py", "train.py"))
    if which == "lte_jax":
        given = {"": str(folder), " ": "def", "--max-new-tokens": "4", "--temperature": "0",
                 "--top-k": "5", "--top-p": "0.9", "--seed": "3", "--routing": "dense",
                 "--implementation": "auto", "--dtype": "float32"}  # fmt: skip
        keep, main = {"", " ", "--max-new-tokens"}, program.main
    elif which == "evaluate.py":
        given = {"--model": str(folder), "--data": "texts.jsonl", "--out": "out",
                 "--length": "16", "--rows": "3", "--batch-size": "2", "--column": "text",
                 "--newline": " ", "--routing": "dense", "--threshold": "0.5", "--prompt": "def",
                 "--name": "mine", "--dtype": "float32", "--dense": str(folder)}  # fmt: skip
        keep, main = {"--model", "--data", "--out", "--length"}, script(which)
    else:
        given = {"--config": str(ROOT / "configs/demo.py:smoke"), "--workdir": "out",
                 "--config.data.train": "absent.jsonl"}  # fmt: skip
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
    writes = () if "\0" in out else (pathlib.Path(box, os.path.expanduser(out)),)
    told = " ".join(arguments).replace(str(box), "BOX")
    return Case(f"{which} {told}", lambda: command(main, which, arguments), writes)


# -------------------------------------------------------------------------------------- functions


def hostile(rng: random.Random, good: Any) -> Any:
    """An argument in place of `good`: another value, shape, dtype or kind."""
    anything = [
        *(None, True, -1, 0, 1, 7, 10**6, 2**31, 2**63, 10**30, 0.5, -0.5, float("nan"), float("inf")),
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
    name = rng.choice(("apply", "apply", "generate", "generate", "moefy", "load", "save", "evaluate"))
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
        rows = data.Rows(TOKENS_BL, np.ones_like(TOKENS_BL))
        good = shared | some | {
            "rows": rows, "baseline": None, "tokenizer": None, "name": None, "batch_size": 2,
            "prompt": "def", "sample_tokens": 4, "latency_rounds": 0,
        }  # fmt: skip
    wrong = {}
    for key in rng.sample([key for key in good if key != "tokenizer"], rng.choice((1, 1, 1, 2))):
        wrong[key] = hostile(rng, good[key])
    arguments = good | wrong
    if name == "save":
        path = arguments["path"]
        if isinstance(path, str | pathlib.Path) and str(path) not in ("", ".") and "\0" not in str(path):
            writes = (pathlib.Path(box, path),)

    def run():
        result = getattr(lte_jax, name)(**arguments)
        if name == "apply":
            assert np.isfinite(np.asarray(result.logits)).all(), "logits are not finite"
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


KINDS = {kind.__name__: kind for kind in (config, weights, lte, tokenizer, texts, settings, flags, api)}
