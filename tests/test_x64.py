"""With JAX_ENABLE_X64=1, which users set for other work, all works and gives the same numbers."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import data, kernels
from lte_jax.writers import CLOCK

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS = [[1, 7, 9, 30, 2, 2, 5], [4], [60, 3, 3, 18, 44]]


def numbers() -> dict[str, np.ndarray]:
    """What each entry of the package makes of the same input."""
    found = {}
    dense, dense_params = tiny.model_and_params(lte=None)
    batch = tiny.batch(rows=4)
    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segments"])
    settings = {"expert_size": 8, "target_sparsity": 0.5}
    for name, changes in {
        "ridge": {},
        "random": {"grouping": "kmeans", "router_init": "normal"},
    }.items():
        model, params = lte_jax.moefy(dense, dense_params, tokens, segments, **(settings | changes))
        found |= _leaves(f"moefy {name}", params)
        for routing in ("hard", "soft"):
            out = lte_jax.apply(model, params, tokens, mask=segments, routing=routing)
            found[f"{name} {routing} logits"], found[f"{name} scores"] = out.logits, out.scores
    for dtype, how, heat in (("float32", "cpu", 0.0), ("bfloat16", "xla", 1.0)):
        model = model.clone(dtype=dtype)
        if not kernels.unavailable(how):
            sample = {"temperature": heat, "top_k": 20, "top_p": 0.9, "seed": 3}
            new = lte_jax.generate(
                model, params, PROMPTS, max_new_tokens=9, implementation=how, **sample
            )
            found[f"generate {dtype} {how}"] = new
    model = model.clone(dtype="float32")
    rows = data.pad(list(tokens), 12)
    measured = lte_jax.evaluate(
        model, params, rows, baseline=(dense, dense_params), latency_rounds=0
    )
    for entry in measured["models"]:
        found[f"evaluate {entry['name']}"] = [entry["loss"], entry["sparsity"]]
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        model, params = lte_jax.train(tiny.experiment(root / "data"), root / "run")
        found |= _leaves("trained", params)
        found["trained threshold"] = np.float32(model.lte.threshold)
        for line in (root / "run" / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            at = f"{values.pop('stage')} {values.pop('step')}"
            same = values.keys() - set(CLOCK)
            found |= {f"measured {at} {name}": values[name] for name in same}
    return {name: np.asarray(value) for name, value in found.items()}


def test_generation_and_grouping_in_this_process():
    """The same ids and experts; quick, as what is compiled differs by its index types alone."""
    dense, params = tiny.model_and_params(lte=None)
    tokens = np.asarray(tiny.batch(rows=2)["tokens"])

    def made():
        model, sparse = lte_jax.moefy(dense, params, tokens, expert_size=8)
        texts = lte_jax.generate(model, sparse, PROMPTS, max_new_tokens=6, implementation="xla")
        scores = jax.jit(lte_jax.apply, static_argnums=0)(model, sparse, tokens).scores
        return texts, np.asarray(scores)

    texts, scores = made()
    with jax.enable_x64(True):
        same, close = made()
    assert same == texts and scores.dtype == close.dtype
    np.testing.assert_allclose(close, scores, rtol=2e-4, atol=2e-5)


def _leaves(name, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{name} {jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}


def _python(code, tmp_path):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": paths}
    run = [sys.executable, "-c", code, str(tmp_path / "found.npz")]
    done = subprocess.run(run, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(tmp_path / "found.npz") as found:
        return dict(found)


# Of the suite: quick ones, of each module that draws numbers or mixes index types.
SUBSET = {
    "test_generate.py": "ragged_batch",
    "test_decoding.py": "seed_and_place or eos_ends",
    "test_evaluation.py": "bytes_of_the_scored_text or by_hand",
    "test_moefication.py": "seed_and_layer_decide or to_dense_undoes",
    "test_roundtrip.py": "mixed_dtypes or stays_float32",
    "test_checkpoint.py": "restores_the_newest_step",
    "test_packing.py": "packing_has_every_token",
    "test_beam.py": "likelier_than_greedy or no_ngram_occurs",
    "test_scoring.py": "likelihoods_by_hand",
    "test_measured_tasks.py": "wikitext_by_hand or mmlu_by_hand",
    "test_tasks.py": "packed_texts",
    "test_nlg.py": "counts_answers_only",
    "test_hf_sentence.py": "embeddings_by_hand",
}


@pytest.mark.slow
@pytest.mark.long
def test_a_part_of_the_suite(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["-k", " or ".join(SUBSET.values()), f"--junitxml={tmp_path / 'ran.xml'}"]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in SUBSET)],
        env=os.environ | {"JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    ran = {
        case.get("classname") for case in ElementTree.parse(tmp_path / "ran.xml").iter("testcase")
    }
    assert {str(name).rpartition(".")[2] for name in ran} == {n.removesuffix(".py") for n in SUBSET}


@pytest.mark.slow
@pytest.mark.long
def test_the_same_numbers(tmp_path):
    code = "import sys, numpy, conftest, test_x64\nnumpy.savez(sys.argv[1], **test_x64.numbers())\n"
    theirs, mine = _python(code, tmp_path), numbers()
    assert theirs.keys() == mine.keys()
    for name, value in mine.items():
        other = theirs[name]
        if not name.startswith(("evaluate", "measured")):  # which are Python's numbers
            assert value.dtype == other.dtype and value.dtype != np.float64, name
        if name.startswith("trained"):  # Adam's first steps make a rounded 0 a step up or down
            assert np.mean(np.abs(other - value)) < 1e-3, name  # one of six steps
            continue
        rtol = 5e-3 if name.startswith("measured") else 2e-4
        np.testing.assert_allclose(other, value, rtol=rtol, atol=2e-5, err_msg=name)
