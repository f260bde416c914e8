"""The order of the house: every module has a number, and imports only from lower ones.

The numbers are the reading order of docs and the only direction of imports, wherever in a file the
import stands. A new module gets its number here.
"""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORDER = {
    "lte_jax.kernels.quantized": 0.05,
    "lte_jax.kernels.reference": 0.1,
    "lte_jax.kernels.xla": 0.2,
    "lte_jax.kernels.cpu": 0.3,
    "lte_jax.kernels.triton_kernels": 0.3,
    "lte_jax.kernels.triton_codes": 0.32,
    "lte_jax.kernels.triton_blocks": 0.33,
    "lte_jax.kernels.triton_call": 0.35,
    "lte_jax.kernels.gpu_codes": 0.37,
    "lte_jax.kernels.gpu_triton": 0.4,
    "lte_jax.kernels.tpu_pallas": 0.5,
    "lte_jax.errors": 1,
    "lte_jax.files": 2,
    "lte_jax.kernels.tune": 2.2,  # a command, not beneath everything as the kernels are
    "lte_jax.memory": 2.4,
    "lte_jax.interrupt": 2.5,
    "lte_jax.kept": 2.6,
    "lte_jax.processes": 2.7,
    "lte_jax.losses": 3,
    "lte_jax.config": 4,
    "lte_jax.params": 5,
    "lte_jax.quantization": 5.5,
    "lte_jax.sharding": 6,
    "lte_jax.hf": 7,
    "lte_jax.checks": 7.5,
    "lte_jax.checkpoint": 8,
    "lte_jax.kernels": 10,
    "lte_jax.selection": 10.8,
    "lte_jax.baselines": 10.9,
    "lte_jax.routing": 11,
    "lte_jax.attention": 11.5,
    "lte_jax.reading": 11.7,
    "lte_jax.layers": 12,
    "lte_jax.model": 13,
    "lte_jax.export_gguf": 13.2,
    "lte_jax.objective": 13.5,
    "lte_jax.router_init": 14,
    "lte_jax.refit": 14.2,
    "lte_jax.gptq": 14.3,
    "lte_jax.scales": 14.4,
    "lte_jax.clustering": 14.5,
    "lte_jax.moefication": 15,
    "lte_jax.sparsity": 16,
    "lte_jax.calibration": 16.5,
    "lte_jax.optim": 17,
    "lte_jax.stages": 17.5,
    "lte_jax.lora": 17.6,
    "lte_jax.data": 17.8,  # asks a model where texts end
    "lte_jax.scoring": 17.9,
    "lte_jax.generation": 17.95,
    "lte_jax.tasks": 18,
    "lte_jax.writers": 19,
    "lte_jax.training_step": 19.5,
    "lte_jax.trainer": 20,
    "lte_jax.evaluation": 22,
    "lte_jax.lm_eval": 22.2,
    "lte_jax.style": 22.4,
    "lte_jax.figures": 22.5,
    "lte_jax.report": 23,
    "lte_jax.workdir": 23.2,
    "lte_jax.runs": 23.3,
    "lte_jax.plan": 23.4,
    "lte_jax.preflight": 23.5,
    "lte_jax.pipeline": 24,
    "lte_jax.sweep": 25,
    "lte_jax.serve": 25.5,
    "lte_jax": 26,
    "lte_jax.cli": 27,
    "lte_jax.data.__main__": 27.5,  # a command, as kernels.tune is
    "lte_jax.export_gguf.__main__": 27.5,
    "lte_jax.serve.__main__": 27.5,
    "lte_jax.__main__": 28,
}
# Their own folder or script of that name must not be found in place of the packages they shadow.
SHADOWING = {"kernels", "configs", "train", "evaluate", "tests", "benchmarks"}

PACKAGE = sorted((ROOT / "lte_jax").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = PACKAGE + KERNELS


def test_the_files_are_found():
    assert len(PACKAGE) >= 10 and len(KERNELS) >= 2


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_downwards(file):
    name = _module(file)
    here = _room(name)
    assert here != "lte_jax" or name == here, f"{name} has no number in ORDER"
    for there in filter(None, map(_room, _imports(file.read_text(), file))):
        message = f"{name} ({ORDER[here]}) imports {there} ({ORDER[there]})"
        assert there == here or ORDER[there] < ORDER[here], message


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_imports_by_a_name_that_others_own(file):
    assert not {name.split(".")[0] for name in _imports(file.read_text(), file)} & SHADOWING


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.py")), ids=lambda f: f.name)
def test_configs_see_only_config(file):
    rooms = set(map(_room, _imports(file.read_text(), file)))
    seen = {"lte_jax.baselines"} if file.parent.name == "sweeps" else set()
    assert rooms <= {None, "lte_jax.config", *seen}


def test_readme_lists_the_rooms_in_their_order():
    """Its table "Where things are": a row holds neighbours in ORDER, each room stands once."""
    table = (ROOT / "README.md").read_text().partition("\n## Where things are\n")[2]
    cells = "\n".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    named = re.findall(r"`(?:lte_jax/)?(\w+)(?:\.py|/)`", cells.replace("`kernels/`", ""))
    listed = [f"lte_jax.{name}" for name in named if f"lte_jax.{name}" in ORDER]
    assert listed == sorted(listed, key=ORDER.__getitem__)
    rooms = {room for room in ORDER if room.count(".") == 1 and room != "lte_jax.__main__"}
    assert len(listed) == len(set(listed)) and set(listed) == rooms


def test_each_way_of_importing_is_seen():
    text = (
        "import lte_jax\nimport lte_jax.report as r\nfrom lte_jax import trainer, apply\n"
        "from . import losses\nfrom .model import Transformer\nfrom jax import numpy\n"
        "def f():\n    from lte_jax.kernels.tune import blocks\n"
    )
    imported = _imports(text, ROOT / "lte_jax" / "layers.py")
    assert [_room(name) for name in imported] == [
        *("lte_jax", "lte_jax.report", "lte_jax.trainer", "lte_jax"),
        *("lte_jax.losses", "lte_jax.model", None, "lte_jax.kernels.tune"),
    ]


def test_importing_the_package_is_quick():
    """What trains, or reads tokenizers, is imported when it is called."""
    heavy = {"datasets", "grain", "matplotlib", "optax", "orbax", "scipy.linalg", "transformers"}
    code = f"import sys, lte_jax; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_no_drawer_for_odds_and_ends():
    assert not [f for f in SOURCES if f.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_scripts_are_short(script):
    assert len((ROOT / script).read_text().splitlines()) <= 60


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in pathlib.Path(spec.origin).parents


def test_transformers_is_not_misled_by_the_folder_kernels():
    """`python train.py` puts the root first on sys.path; transformers then probes `kernels`."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import transformers\n"
        "transformers.utils.import_utils.is_kernels_available()\n"
        "from transformers import AutoConfig, AutoTokenizer\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _module(file: pathlib.Path) -> str:
    """The name a file is imported by: those of kernels/ are modules of lte_jax.kernels."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"lte_jax.{name}" if name.startswith("kernels.") else name


def _room(name: str) -> str | None:
    """The entry of ORDER that a module, or a name in it, belongs to; None for those of others."""
    while name and name not in ORDER:
        name = name.rpartition(".")[0]
    return name or None


def _imports(text: str, file: pathlib.Path) -> list[str]:
    """What a file imports, at any depth of its code: "package.module" or "package.module.name"."""
    package = _module(file).split(".")
    if file.name != "__init__.py":
        package.pop()
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found
