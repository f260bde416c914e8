"""The wheel: built offline, it carries the kernels and imports without the repository."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

pytest.importorskip("hatchling", reason="needs hatchling, of lte-jax[dev], to build the wheel")

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT))
    (made,) = folder.glob("lte_jax-*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> pathlib.Path:
    """An interpreter that sees the wheel and our dependencies, but not the repository."""
    env = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    _pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    # A .pth line adds the folder of the dependencies but not their .pth files, among which is the
    # one that leads an editable install to the repository.
    (site,) = (env / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"lte_jax", "lte_jax-0.1.0.dist-info"}
    kernels = [
        f for f in (ROOT / "kernels").rglob("*") if f.is_file() and "__pycache__" not in f.parts
    ]
    assert kernels
    for file in kernels:  # sources in C++ and tuned sizes as well as modules
        assert f"lte_jax/{file.relative_to(ROOT)}" in names


def test_wheel_imports_without_the_repository(python, tmp_path):
    modules = ["lte_jax", "lte_jax.config", "lte_jax.kernels"]
    stems = {f.stem for f in (ROOT / "kernels").glob("*.py")} - {"triton_kernels"}  # needs triton
    modules += [f"lte_jax.kernels.{stem}" for stem in sorted(stems)]
    code = (
        "import importlib, sys\n"
        f"assert {str(ROOT)!r} not in sys.path, sys.path\n"
        f"for name in {modules}:\n"
        "    print(importlib.import_module(name).__file__)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) == len(modules)
    assert all(str(python.parents[1]) in file for file in files)


def _pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
