"""Kinds of cases that hurt files: what each gives the project, seeded, and what it does with it.

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
from collections.abc import Callable
from typing import Any

import hf_models
import mutate
import numpy as np
import tiny

import lte_jax
from lte_jax import data, hf

TEXTS = ["def f(x):\n    return x", "Zoë ate 3 apples.", "a", "The dog ran home and slept."]
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "do_sample": True}


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
        rows = data.Records(tokens_BL, np.ones_like(tokens_BL))
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
    elif file.name == "manifest.json":  # a digest, then JSON
        content, told = mutate.blob(rng, file.read_bytes())
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
    newline = rng.choice(("\n", "\n", " ", "", "\r\n"))
    limit, length = rng.choice((None, None, 2, 0, -1)), rng.choice((2, 16, 64))

    def run():
        read = list(data.read_texts(str(file), column, newline, limit))
        for text in read:
            text.encode()
        documents = list(data.tokenize(read, data.byte_tokenizer()))
        packed = data.pack(documents, length)
        assert (packed.segments_RL > 0).sum() == sum(map(len, documents))
        return f"{len(read)} texts, {len(packed)} rows"

    what = f"{file.name}, column {column!r}, limit {limit}: {'; '.join(told) or 'unharmed'}"
    return Case(what, run)


KINDS = (config, weights, lte, tokenizer, texts)
