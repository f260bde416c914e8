"""Building the CPU kernels: whatever the machine lacks, there is a clear line and a way on."""

import concurrent.futures
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax import kernels
from lte_jax.kernels import cpu

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


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """A compiler that does not optimise: most of the time of these tests is its."""
    script = tmp_path_factory.mktemp("bin") / "hasty"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("g++") or "clang++"} "$@" -O0\n')
    script.chmod(0o700)
    return str(script)


@pytest.fixture(scope="module")
def built(tmp_path_factory, hasty):
    """A cache into which two processes have built at once, and what they said."""
    cache = tmp_path_factory.mktemp("built")
    return cache, [finish(process) for process in [start(cache, CXX=hasty) for _ in range(2)]]


@needs_compiler
def test_they_run_here():
    """Else the tests of kernels skip them, with the compiler's error as the reason."""
    assert kernels.unavailable("cpu") is None


@needs_compiler
def test_processes_that_build_at_once(built):
    cache, ends = built
    for name, _, err in ends:
        assert (name, err) == ("cpu", "")
    assert [path.suffix for path in cache.iterdir()] == [".so"]


@needs_compiler
def test_a_damaged_library_is_built_anew(built, tmp_path, hasty):
    [library] = (tmp_path / path.name for path in built[0].iterdir())
    shutil.copy2(built[0] / library.name, library)
    whole = library.read_bytes()
    damaged = library.with_stem(library.stem[:-16] + "0" * 16)  # no build will ever replace it
    library.rename(damaged)
    damaged.write_bytes(whole[: len(whole) // 2])
    name, _, err = finish(start(tmp_path, CXX=hasty))
    assert name == "cpu"
    assert f"WARNING {damaged} is damaged" in err
    [mended] = tmp_path.iterdir()  # the damaged one is gone
    assert mended.read_bytes() == whole


@needs_compiler
def test_a_home_that_cannot_be_written(tmp_path, hasty):
    """Root may write anywhere, but not into a file."""
    file = tmp_path / "file"
    file.write_text("")
    name, _, err = finish(start(file / "cache", CXX=hasty))
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
    library = tmp_path / "cpu_ffn.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_build", lambda: library)
    with pytest.raises(cpu.Unsupported, match=f"{library}.*another folder in .LTE_JAX_CACHE"):
        cpu._load.__wrapped__()


@needs_compiler
def test_source_that_does_not_compile_says_why(tmp_path, monkeypatch):
    source = tmp_path / "broken.cc"
    source.write_text("int main() { return missing; }")
    monkeypatch.setattr(cpu, "_SOURCES", [source])
    monkeypatch.setenv("LTE_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(cpu.Unsupported, match="failed: .*error.*missing"):
        cpu._build()
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Building something that compiles at once, into tmp_path / "cache"."""
    source = tmp_path / "quick.cc"
    source.write_text("int quick;")
    monkeypatch.setattr(cpu, "_SOURCES", [source])
    monkeypatch.setenv("LTE_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PLANTED = """
#include <cstdio>
__attribute__((constructor)) void f() { std::fclose(std::fopen("MARKER", "w")); }
"""


@needs_compiler
def test_a_library_planted_by_another_is_not_loaded(built, tmp_path, hasty):
    """Its name holds nothing that others could not compute."""
    [name] = (path.stem[:-16] for path in built[0].iterdir())
    marker, source, planted = tmp_path / "ran", tmp_path / "planted.cc", tmp_path / "planted.so"
    source.write_text(PLANTED.replace("MARKER", str(marker)))
    subprocess.run(
        [shutil.which("g++") or "clang++", "-shared", "-fPIC", source, "-o", planted], check=True
    )
    cache = tmp_path / "everyone"
    cache.mkdir()
    cache.chmod(0o1777)
    shutil.copy(planted, cache / f"{name}{cpu._digest(planted.read_bytes())}.so")
    used, _, err = finish(start(cache, CXX=hasty))
    assert used == "cpu" and not marker.exists()
    assert err.count("\n") == 1 and "can be written by others (mode 1777" in err


def loosen(cache):
    cache.chmod(0o775)


def give_away(cache):
    if os.geteuid():
        pytest.skip("only root can give a folder to another user")
    os.chown(cache, 4321, 4321)


def link(cache):
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to("elsewhere")


def loosen_parent(cache):
    cache.parent.chmod(0o777)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (loosen, "can be written by others (mode 775; mend: chmod 700)"),
        (give_away, "belongs to another user (number 4321)"),
        (link, "is a symbolic link"),
        (loosen_parent, "where others can write"),
    ],
)
def test_bad_input_cache_that_is_not_this_users_alone(quick, change, reason, caplog):
    library = cpu._build()
    assert library.parent == quick and cpu._build() == library  # a good folder is used, silently
    assert not caplog.records
    change(quick)
    assert cpu._build().parent == cpu._build().parent != quick
    [record] = caplog.records
    assert reason in record.getMessage() and "LTE_JAX_CACHE" in record.getMessage()


def test_bad_input_cache_that_is_a_file(quick, caplog):
    quick.write_text("")
    assert cpu._cache_folder() != quick
    assert "cannot be written (File exists)" in caplog.text


def test_a_link_above_the_cache_is_followed(tmp_path, monkeypatch, caplog):
    """As /home often is one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    monkeypatch.setenv("LTE_JAX_CACHE", str(tmp_path / "link" / "cache"))
    assert cpu._cache_folder() == tmp_path / "home" / "cache"
    assert not caplog.records


@needs_compiler
def test_what_is_built_is_for_its_owner_alone(quick):
    for umask in (0o000, 0o022, 0o077):
        before = os.umask(umask)
        try:
            library = cpu._build()
        finally:
            os.umask(before)
        assert [p.stat().st_mode & 0o777 for p in (library, quick)] == [0o700, 0o700]
        library.unlink()
        quick.rmdir()


def loosen_library(library):
    library.chmod(0o777)


def link_library(library):
    library.rename(library.with_name("elsewhere"))
    library.symlink_to("elsewhere")


def give_library_away(library):
    give_away(library)


def make_it_a_pipe(library):
    library.unlink()
    os.mkfifo(library)


def empty(library):
    library.unlink()
    library.with_stem(library.stem[:-16] + cpu._digest(b"")).write_bytes(b"")


@needs_compiler
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (loosen_library, "can be written by others"),
        (link_library, "is a symbolic link"),
        (give_library_away, "belongs to another user"),
        (make_it_a_pipe, "is of another kind"),
        (empty, "is damaged"),
    ],
)
def test_bad_input_library_that_is_not_this_users_alone(quick, change, reason, caplog):
    library = cpu._build()
    change(library)
    assert cpu._build() == library and library.stat().st_size
    assert not cpu._distrust(library, stat.S_ISREG)
    assert reason in caplog.text and "building it anew" in caplog.text
    assert cpu._build() == library and len(caplog.records) == 1


@needs_compiler
def test_a_library_that_cannot_be_read_is_built_anew(quick, monkeypatch, caplog):
    """Root reads everything: the refusal is played."""
    library = cpu._build()
    read_bytes, refused = pathlib.Path.read_bytes, [library]

    def read(path):
        if path in refused:
            refused.remove(path)
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read)
    assert cpu._build() == library and not refused
    assert "cannot be read (Permission denied): building it anew" in caplog.text


@needs_compiler
def test_no_home(tmp_path, monkeypatch, caplog):
    for name in ("HOME", "LTE_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as of a container's odd number
    assert cpu._cache_folder().is_dir()
    assert "this user has no home" in caplog.text


@needs_compiler
def test_a_compiler_of_several_words(quick, monkeypatch):
    monkeypatch.setenv("CXX", f"env LC_ALL=C {shutil.which('g++') or 'clang++'}")
    assert cpu._build().parent == quick


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("true", "true wrote nothing"),
        ("ccache 'g++", "No closing quotation"),
        ("no-such-ccache g++", r"no C\+\+ compiler \(no-such-ccache g\+\+\)"),
        ("TEXT", "TEXT cannot be run: Exec format error"),
    ],
)
def test_bad_input_compiler(quick, compiler, reason, monkeypatch):
    text = quick.with_name("text")
    text.write_text("no program")
    text.chmod(0o700)
    monkeypatch.setenv("CXX", compiler.replace("TEXT", str(text)))
    with pytest.raises(cpu.Unsupported, match=reason.replace("TEXT", str(text))):
        cpu._build()
    assert not list(quick.glob("*"))


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_many_rows_as_a_prompt_has(dtype):
    """More rows and outputs than a tile or a block takes, and none a multiple of it."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    rows, experts, neurons, width = 29, 5, 34, 326
    weights = {name: normal(experts, neurons, width) for name in ("gate", "up", "down")}
    weights["up_bias"] = normal(experts, neurons)
    x_BD, active_BE = normal(rows, width), jnp.asarray(rng.random((rows, experts)) < 0.5)
    active_BE = active_BE.at[:, 3].set(False).at[7].set(False)
    run = lambda name, rows=slice(None): np.asarray(  # noqa: E731
        kernels.sparse_ffn(
            x_BD[rows], active_BE[rows], weights, activation="silu", implementation=name
        ),
        np.float32,
    )
    expected = run("reference")
    rounding = (2e-6 if dtype == "float32" else 2e-2) * np.abs(expected).max()
    assert np.abs(run("cpu") - expected).max() < rounding
    assert not run("cpu")[7].any() and np.array_equal(run("cpu"), run("cpu"))
    assert np.abs(run("cpu", slice(3, 4)) - run("cpu")[3:4]).max() < rounding
    for transposed in (False, True):
        w = normal(70, width) if transposed else normal(width, 70)
        y, exact = (
            kernels.linear(x_BD, w, transposed=transposed, implementation=name)
            for name in ("cpu", "reference")
        )
        assert np.abs(y - exact).max() < 2e-6 * np.abs(exact).max()


def test_reading_alone_reads_all():
    """The result changes with any word, so none is left out."""
    data = jnp.arange(16 * 203, dtype=jnp.int32)
    whole = int(cpu.read(data)[0])
    places = (0, 16 * 101 + 5, 16 * 203 - 1)
    assert all(int(cpu.read(data.at[i].add(1 << 20))[0]) != whole for i in places)
