"""The notebooks, run by jupyter as they are but small (LTE_JAX_SMOKE); kept without outputs."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import tiny

import lte_jax
from lte_jax import data
from lte_jax.config import ModelConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODEL, TEXTS = "Xenova/llama2.c-stories15M", "roneneldan/TinyStories"  # of your_own_model.ipynb


def cells(notebook, kind="code"):
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a notebook needs of a checkout; a mirror of the hub with a random model and texts."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lte_jax", "kernels", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("notebooks", f"hub/{TEXTS}", "home"):
        (folder / name).mkdir(parents=True)
    config = ModelConfig(d_model=32, d_ff=64, num_heads=2, num_kv_heads=2, max_length=128)
    lte_jax.save(folder / "hub" / MODEL, *tiny.model_and_params(None, config))
    data.byte_tokenizer().save_pretrained(folder / "hub" / MODEL)
    for split in ("train", "validation"):
        texts = [f"{i} times upon a time, of {split}. " * 4 for i in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "hub" / TEXTS / f"{split}.jsonl").write_text(lines)
    return folder


def executed(name, checkout):
    """The outputs of a notebook that jupyter ran, by kind, in order."""
    copy = checkout / "notebooks" / f"{name}.ipynb"
    copy.write_text((ROOT / "notebooks" / copy.name).read_text())
    env = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    places = ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    env |= {place: str(checkout / "home" / place) for place in places}
    env |= {"LTE_JAX_SMOKE": "1", "LTE_JAX_MIRROR": str(checkout / "hub"), "TQDM_DISABLE": "1"}
    env["PATH"] = f"{pathlib.Path(sys.executable).parent}:{env['PATH']}"
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", str(copy)]
    done = subprocess.run(command, cwd=copy.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for cell in json.loads(copy.read_text())["cells"]:
        for output in cell.get("outputs", []):
            kinds = output.get("data") or {output["name"]: output["text"]}
            for kind, value in kinds.items():
                found.setdefault(kind, []).append("".join(value))
    return found


@pytest.fixture
def run(checkout):
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'lte-jax[plot]'")
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"no {package}: pip install 'lte-jax[dev]'")
    return lambda name: executed(name, checkout)


def rows(table):
    """The cells of a Markdown table, without its head."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.slow
def test_quickstart(run):
    found = run("quickstart")
    report, thresholds = found["text/markdown"]
    assert "| LTE |" in report and "LTE" in report.partition("wrote:")[0]
    shares = [float(row[1].rstrip("%")) for row in rows(thresholds)]
    assert shares == sorted(shares) and shares[0] == 0 and len(shares) == 6
    assert len(found["image/png"]) == 5
    assert "def read(" in "".join(found["stdout"])
    assert "Warning" not in "".join(found["stderr"])


@pytest.mark.slow
def test_what_routers_learn(run):
    kinds, experts, grouping = run("what_routers_learn")["text/markdown"]
    assert "| layer 1 | layer 2 |" in kinds  # counted from 1
    assert sum(float(row[1].rstrip("%")) for row in rows(kinds)) > 95
    assert 1 <= min(int(row[0]) for row in rows(experts))
    held = {row[0]: [float(cell.rstrip("%")) for cell in row[1:]] for row in rows(grouping)}
    for chosen, best in zip(held["router's choice"], held["best choice"], strict=True):
        assert chosen <= best


@pytest.mark.slow
@pytest.mark.long
def test_your_own_model(run, checkout):
    found = run("your_own_model")
    shape, table, *texts = found["text/markdown"]
    assert "| neurons of an FFN | 64 |" in shape and "4, 8, 16, 32, 64" in shape
    assert "| LTE |" in table and "| dense |" in table
    assert len(texts) == 2 and all("Once upon a time" in text for text in texts)
    assert (checkout / "runs/mine/lte/model.safetensors").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_begins_with_its_badge_and_installs(notebook):
    """From one address; in a checkout nothing is installed."""
    badge, install = cells(notebook, "markdown")[0], cells(notebook)[0]
    [address] = re.findall(r'^REPOSITORY = "https://github.com/(.*)"$', install, re.MULTILINE)
    place = f"colab.research.google.com/github/{address}/blob/main/notebooks/{notebook.name}"
    assert place in badge
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    known = {u for u in urls.values() if u.startswith("https://github.com/")}
    assert all(url.startswith(f"https://github.com/{address}") for url in known)
    [pip] = [line for line in install.splitlines() if "%pip" in line]
    assert pip.startswith("    ") and "git+{REPOSITORY}" in pip


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_may_be_run_again(notebook, tmp_path, monkeypatch):
    """In a checkout that is called lte_jax, as its package is."""
    for name in ("lte_jax", "notebooks"):
        (tmp_path / "lte_jax" / name).mkdir(parents=True)
    (tmp_path / "lte_jax/lte_jax/__init__.py").touch()
    monkeypatch.chdir(tmp_path / "lte_jax/notebooks")
    cell = re.sub(r"%pip .*", "raise AssertionError('it installs')", cells(notebook)[0])
    for _ in range(2):
        exec(cell, {})
        assert pathlib.Path.cwd() == tmp_path / "lte_jax"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count"), cell["id"]
