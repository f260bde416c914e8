"""The notebooks run as they are, but for the size of the experiment and for %pip."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(notebook):
    return json.loads(notebook.read_text())["cells"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'lte-jax[plot]'")
    cells = ["".join(cell["source"]) for cell in read(notebook) if cell["cell_type"] == "code"]
    code = "\n\n".join(cell for cell in cells if not cell.startswith("%pip"))
    assert '"configs/demo.py"' in code
    script = tmp_path / "notebook.py"
    script.write_text(code.replace('"configs/demo.py"', '"configs/demo.py:smoke"'))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    env = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "runs" / "notebook" / "table.md").read_text()
    assert table in done.stdout
    assert done.stdout.count("%") > table.count("%") + 5  # its sparsity and those of thresholds
    assert "\ndef read(" in done.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(notebook):
    for cell in read(notebook):
        assert not cell.get("outputs") and not cell.get("execution_count"), cell["id"]
