"""Building the CPU kernels: whatever the machine lacks, there is a clear line and a way on."""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax import kernels

ROOT = pathlib.Path(kernels._HERE).parents[1]
# Prints which implementation "auto" stands for and whether its output is the reference's.
SCRIPT = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
import jax.numpy as jnp
from lte_jax import kernels
from lte_jax.config import UserError

x_BD = jnp.linspace(-1, 1, 24).reshape(2, 12)
weights = {n: jnp.linspace(-2, 1, 5 * 3 * 12).reshape(5, 3, 12) for n in ("gate", "up", "down")}
active_BE = jnp.arange(10).reshape(2, 5) % 3 == 0
def ffn(name):
    return kernels.sparse_ffn(x_BD, active_BE, weights, activation="silu", implementation=name)
print("auto is", kernels.resolve("auto"))
expected = ffn("reference")
print("off by", float(jnp.abs(ffn("auto") - expected).max() / jnp.abs(expected).max()))
try:
    ffn("cpu")
except UserError as error:
    print("cpu:", error)
"""

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on the PATH"
)


def start(cache, **env):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "LTE_JAX_CACHE": str(cache)} | env
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = dict(
        line.split(" ", 2)[::2] for line in out.splitlines() if line[:4] in ("auto", "off ")
    )
    assert float(lines["off"]) < 1e-5
    return lines["auto"], out, err


@needs_compiler
def test_processes_that_build_at_once(tmp_path):
    for process in [start(tmp_path) for _ in range(2)]:
        name, _, err = finish(process)
        assert (name, err) == ("cpu", "")
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


@needs_compiler
def test_a_damaged_library_is_built_anew(tmp_path):
    finish(start(tmp_path))
    [library] = tmp_path.iterdir()
    whole = library.read_bytes()
    damaged = library.with_stem(library.stem[:-16] + "0" * 16)  # no build will ever replace it
    library.rename(damaged)
    damaged.write_bytes(whole[: len(whole) // 2])
    name, _, err = finish(start(tmp_path))
    assert name == "cpu"
    assert f"WARNING {damaged} is damaged" in err
    [mended] = tmp_path.iterdir()  # the damaged one is gone
    assert mended.read_bytes() == whole


@needs_compiler
def test_a_home_that_cannot_be_written(tmp_path):
    """Root may write anywhere, but not into a file."""
    file = tmp_path / "file"
    file.write_text("")
    name, _, err = finish(start(file / "cache"))
    assert name == "cpu"
    assert "cannot be written" in err and "LTE_JAX_CACHE" in err


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"PATH": ""}, "no C++ compiler (g++ or clang++) on the PATH: install one"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
        ({"CXX": "false"}, "false failed"),
    ],
)
def test_bad_input_no_working_compiler(tmp_path, env, reason):
    name, out, err = finish(start(tmp_path, **env))
    assert name == "xla"
    assert err.count("the slower XLA loop") == 1 and reason in err
    [line] = [line for line in out.splitlines() if line.startswith("cpu:")]
    assert "implementation='cpu' cannot run" in line and reason in line
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_library_that_may_not_be_loaded_says_why(tmp_path, monkeypatch):
    """As from a folder mounted noexec."""
    from lte_jax.kernels import cpu

    library = tmp_path / "cpu_ffn.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_build", lambda: library)
    with pytest.raises(cpu.Unsupported, match=f"{library}.*another folder in .LTE_JAX_CACHE"):
        cpu._load.__wrapped__()


@needs_compiler
def test_source_that_does_not_compile_says_why(tmp_path, monkeypatch):
    from lte_jax.kernels import cpu

    source = tmp_path / "broken.cc"
    source.write_text("int main() { return missing; }")
    monkeypatch.setattr(cpu, "_SOURCE", source)
    monkeypatch.setenv("LTE_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(cpu.Unsupported, match="failed: .*error.*missing"):
        cpu._build()
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
def test_many_calls_at_once():
    """More calls under way than threads: none waits for another forever, none disturbs another."""
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(rng.normal(size=(24, 8, 64)), jnp.float32)
        for name in ("gate", "up", "down")
    }
    cases = [
        (jnp.asarray(rng.normal(size=(b, 64)), jnp.float32), jnp.asarray(rng.random((b, 24)) < 0.5))
        for b in (1, 2, 5)
    ]
    ffn = jax.jit(
        lambda x, active: kernels.sparse_ffn(
            x, active, weights, activation="silu", implementation="cpu"
        )
    )
    expected = [np.asarray(ffn(*case)) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda i: np.asarray(ffn(*cases[i % 3])), range(600), timeout=120))
    for i, y_BD in enumerate(made):
        np.testing.assert_array_equal(y_BD, expected[i % 3])
