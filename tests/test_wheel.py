"""The wheel: built offline, it carries the kernels and imports without the repository."""

import json
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
    kernels += [*(ROOT / "configs").rglob("*.py")]
    assert "lte_jax/py.typed" in names
    for file in kernels:  # sources in C++ and tuned sizes as well as modules
        assert f"lte_jax/{file.relative_to(ROOT)}" in names


def test_wheel_imports_without_the_repository(python, tmp_path):
    modules = ["lte_jax", "lte_jax.config", "lte_jax.kernels"]
    of_triton = {"triton_kernels", "triton_codes"}  # need it
    stems = {f.stem for f in (ROOT / "kernels").glob("*.py")} - of_triton
    modules += [f"lte_jax.kernels.{stem}" for stem in sorted(stems)]
    code = (
        "import importlib, sys\n"
        f"assert {str(ROOT)!r} not in sys.path, sys.path\n"
        f"for name in {modules}:\n"
        "    print(importlib.import_module(name).__file__)\n"
    )
    done = _run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) == len(modules)
    assert all(str(python.parents[1]) in file for file in files)


def test_wheel_brings_the_command_and_its_configs(python, tmp_path):
    command = python.with_name("lte-jax")
    assert _run(command, "--version", cwd=tmp_path).stdout.startswith("lte-jax 0.1.0 (jax ")
    done = _run(command, "train", "--config=demo:smok", "--workdir=w", cwd=tmp_path)
    own = next(python.parents[1].glob("lib/*/site-packages/lte_jax/configs/demo.py"))
    assert done.stderr == f"error: {own}: unknown variant 'smok': did you mean 'smoke'?\n"
    done = _run(command, "train", "--config=no_such", "--workdir=w", cwd=tmp_path)
    assert done.returncode == 2 and "(or one of demo, " in done.stderr


USER = """import lte_jax
model, params = lte_jax.load("runs/demo/lte", "float32")
tokenizer = lte_jax.load_tokenizer("runs/demo/lte")
sparse = lte_jax.moefy(model, params, [[1, 2]], expert_size=16, target_sparsity=0.5)
out = lte_jax.apply(model, params, [[1, 2]], routing="hard", threshold=0.4).logits
ids = lte_jax.generate(model, params, [[1, 2]], max_new_tokens=9, top_k=3)
text = lte_jax.generate_text(model, params, tokenizer, "Once", max_new_tokens=9).upper()
texts = lte_jax.generate_text(model, params, tokenizer, ["Once"], max_new_tokens=9)[0].upper()
lte_jax.save("mine", model, params, source="runs/demo/lte", dtype="float16")
"""
WRONG = {  # of a line above, a mistake in it
    2: ('"float32"', '"float23"'),
    4: ("expert_size", "expert_sise"),
    5: ('"hard"', '"hart"'),
    6: ("max_new_tokens=9", 'max_new_tokens="9"'),
    7: ("max_new_tokens", "max_tokens"),
    8: ("[0].upper", ".upper"),
    9: ("params, source", "source"),
}


def test_wheel_tells_type_checkers_what_its_functions_take(python, tmp_path):
    lines = USER.splitlines()
    (tmp_path / "right.py").write_text(USER)
    for number, (right, wrong) in WRONG.items():
        assert right in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(right, wrong)
    (tmp_path / "wrong.py").write_text("\n".join(lines))
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    pyright = [sys.executable, "-m", "basedpyright", "--pythonpath", python, "--outputjson"]
    told = json.loads(_run(*pyright, "right.py", "wrong.py", cwd=tmp_path).stdout)
    errors = [e for e in told["generalDiagnostics"] if e["severity"] == "error"]
    found = {(pathlib.Path(e["file"]).name, e["range"]["start"]["line"] + 1) for e in errors}
    assert found == {("wrong.py", number) for number in WRONG}, errors


@pytest.mark.slow
def test_wheel_trains_and_generates(python, tmp_path):
    """The packaged experiment, then the kernels of the wheel, built where it is installed."""
    command = python.with_name("lte-jax")
    flags = ("--config=demo:smoke", "--workdir=w", "--config.report=false")
    assert _run(command, "train", *flags, cwd=tmp_path).returncode == 0
    done = _run(command, "generate", "w/lte", "import", "--max-new-tokens=5", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("import"), done.stderr
    assert "kernels: cpu on cpu" in done.stderr


def _run(*command, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    """A command outside the repository, which no variable leads back to it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    settings = {"cwd": cwd, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(list(map(str, command)), **settings)


def _pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
