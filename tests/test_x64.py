"""With JAX_ENABLE_X64=1, which users set for other work, all works and gives the same numbers."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import data, kernels, optim, trainer

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS = [[1, 7, 9, 30, 2, 2, 5], [4], [60, 3, 3, 18, 44]]


@jax.numpy_dtype_promotion("standard")  # jax.nn.dot_product_attention promotes bfloat16
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
    for dtype in ("float32", "bfloat16"):
        model = model.clone(dtype=dtype)
        for how in ("reference", "xla", "cpu"):
            if kernels.unavailable(how):
                continue
            for heat in (0.0, 1.0):
                sample = {"temperature": heat, "top_k": 20, "top_p": 0.9, "seed": 3}
                new = lte_jax.generate(
                    model, params, PROMPTS, max_new_tokens=9, implementation=how, **sample
                )
                found[f"generate {dtype} {how} {heat}"] = new
    model = model.clone(dtype="float32")
    rows = data.pad_rows(list(tokens), 12)
    measured = lte_jax.evaluate(
        model, params, rows, baseline=(dense, dense_params), latency_rounds=1
    )
    for entry in measured["models"]:
        found[f"evaluate {entry['name']}"] = [entry["loss"], entry["sparsity"]]
    for name in ("router", "adapt"):
        stage = tiny.stage(name)
        optimizer = optim.make(tiny.OPTIM, stage.config, stage.rules)
        state = trainer.TrainState(
            jnp.zeros((), jnp.int32), params, optimizer.init(params), tiny.control()
        )
        step = jax.jit(trainer.make_train_step(model, stage, optimizer, microbatches=2))
        for _ in range(2):
            state, metrics = step(state, batch, params)
        found |= _leaves(f"state {name}", (state, metrics))
    return {name: np.asarray(value) for name, value in found.items()}


def _leaves(name, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{name} {jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}


def _python(code, tmp_path):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": paths}
    run = [sys.executable, "-c", code, str(tmp_path / "found.npz")]
    done = subprocess.run(run, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return np.load(tmp_path / "found.npz")


# Of the suite: a few seconds each, and between them all that this kind breaks, which is where a
# program mixes index types (caches, kernels, sampling) or draws what it does not give a type.
SUBSET = {
    "test_generate.py": "decode_step or ragged or seed_and_place",
    "test_kernels.py": "linear or attend or embed",
    "test_moefy.py": "random or same_output",
    "test_checkpoint.py": "round_trip",
}


@pytest.mark.slow
def test_a_part_of_the_suite():
    files = [str(HERE / name) for name in SUBSET]
    chosen = " or ".join(SUBSET.values())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    env = os.environ | {"JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [*command, "-k", chosen, *files], env=env, capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_the_same_numbers(tmp_path):
    code = "import sys, numpy, conftest, test_x64\nnumpy.savez(sys.argv[1], **test_x64.numbers())\n"
    theirs, mine = _python(code, tmp_path), numbers()
    assert theirs.keys() == mine.keys()
    for name, value in mine.items():
        other = theirs[name]
        if np.issubdtype(value.dtype, np.floating) and not name.startswith("evaluate"):
            assert value.dtype == other.dtype == np.float32, name
            np.testing.assert_allclose(other, value, rtol=2e-4, atol=2e-5, err_msg=name)
        else:
            np.testing.assert_allclose(other, value, rtol=1e-5, err_msg=name)
