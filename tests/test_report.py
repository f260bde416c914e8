"""Reports: a table, figures and results.json, and one line where they cannot be written."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from lte_jax import figures, report
from lte_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
DENSE = {
    "name": "dense",
    "token_ppl": 4.0,
    "byte_ppl": 2.0,
    "sparsity": 0.0,
    "gflops_per_token": 12.0625,
    "latency_ms": 3.0,
    "latency_ratio": 1.0,
}


def sparse(sparsity, ppl, name="LTE"):
    """An entry of an LTE model of eight layers."""
    rng = np.random.default_rng(0)
    layers = np.clip(sparsity + 0.1 * rng.standard_normal(8), 0, 1)
    scores = np.concatenate([rng.beta(1, 8, 7000), rng.beta(8, 2, 3000)])
    return DENSE | {
        "name": name,
        "token_ppl": ppl,
        "sparsity": sparsity,
        "sparsity_per_layer": layers.tolist(),
        "score_histogram": np.histogram(scores, 64, (0, 1))[0].tolist(),
        "lte": {"threshold": 0.47},
        "latency_ratio": 0.6,
        "sample": {"prompt": "Once", "text": " upon\n```a``` time"},
    }


def test_table():
    results = [{"models": [DENSE, sparse(0.75, 5.0)]}, {"models": [DENSE, sparse(0.5, 4.4)]}]
    lines = report.table(results).splitlines()
    assert len(lines) == 5  # the dense model, which both share, once
    assert lines[2] == "| dense | 4.000 | 2.000 | 0.0% | 12.1 | 3 | 1.00 |"
    assert lines[3] == "| LTE | 4.400 (+10.0%) | 2.000 | 50.0% | 12.1 | 3 | 0.60 |"
    assert lines[4].startswith("| LTE | 5.000 (+25.0%) | 2.000 | 75.0%")
    assert len({line.count("|") for line in lines}) == 1
    within = DENSE | {"name": "as fast", "latency_ratio": 0.9, "latency_noise": 0.12}
    faster = within | {"name": "faster", "latency_noise": 0.05}
    rows = report.table([{"models": [within, faster]}]).splitlines()
    times = [line.split("|")[-2] for line in rows]
    assert times[2:4] == [" about 1 ", " 0.90 "]
    bare = [{"models": [{"name": "x", "token_ppl": 2.0, "sparsity": 0.3}]}]
    assert report.table(bare).splitlines()[2] == "| x | 2.000 |  | 30.0% |  |  |  |"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"records": 64, "of_records": 324, "length": 256, "tokens": 9213},
         "64 of 324 records of 256 tokens, 9,213 predicted"),
        ({"records": 3, "of_records": 3}, "all 3 records"),
        ({"records": 1500, "of_records": None}, "1,500 records"),
        ({"tokens": 9213}, "9,213 tokens predicted"),  # of an earlier version
    ],
)  # fmt: skip
def test_how_much_was_measured_is_said(result, words):
    result = result | {"models": [DENSE]}
    assert report.extent(result) == words and words in report.notes([result])
    labelled = {k: v for k, v in DENSE.items() if k != "token_ppl"} | {"metrics": {"accuracy": 1.0}}
    assert "predicted" not in report.extent(result | {"models": [labelled]})


def test_report_of_several_results(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    points = {
        "LTE": [(0.5, 4.3), (0.75, 4.9), (0.9, 6.0)],
        "random router": [(0.5, 5), (0.75, 6.5)],
    }
    files = []
    for name, pairs in points.items():
        for sparsity, ppl in pairs:
            files.append(tmp_path / f"{name}-{sparsity}.json")
            files[-1].write_text(json.dumps({"models": [DENSE, sparse(sparsity, ppl, name)]}))
    report.main([*map(str, files), "--out", str(tmp_path / "report")])
    out = capsys.readouterr().out
    assert out.count("| LTE |") == 3 and out.count("| random router |") == 2
    made = {path.name: path for path in (tmp_path / "report").iterdir()}
    assert set(made) == {"table.md", "quality.png", "layers.png", "scores.png"}
    text = made["table.md"].read_text()
    assert "random router 75% wrote" in text and "````text" in text
    for name in ("quality.png", "layers.png", "scores.png"):
        assert made[name].read_bytes().startswith(b"\x89PNG") and made[name].stat().st_size > 10_000


def test_results_are_json_or_say_where_not():
    results = {"models": [{"name": "a", "token_ppl": 2.0, "sparsity": [0.0, float("nan")]}]}
    with pytest.raises(UserError, match=r"results.models.0.sparsity.1=nan: expected a finite"):
        report.as_json(results)
    assert json.loads(report.as_json({"a": [1.5, None]})) == {"a": [1.5, None]}


def test_results_come_last(tmp_path, monkeypatch):
    """A folder that has them has all: what was killed before is made anew."""
    pytest.importorskip("matplotlib")

    def full(*_):
        raise UserError("no room")

    monkeypatch.setattr(report, "draw", full)
    with pytest.raises(UserError, match="no room"):
        report.write([{"models": [DENSE, sparse(0.5, 4.4)]}], tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_quality_figure_shows_every_point(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    results = [{"models": [DENSE, sparse(0.5, 4.4), sparse(0.75, 5.0)]}]
    [axes] = figures._quality(results).axes
    [line] = [line for line in axes.lines if line.get_label() == "LTE"]
    np.testing.assert_allclose(line.get_xdata(), [50, 75])
    np.testing.assert_allclose(line.get_ydata(), [10, 25])
    assert figures.draw([{"models": [DENSE]}], tmp_path) == []  # nothing is sparse: no figure
    assert report.absent([{"models": [DENSE]}], tmp_path) == ["table.md", "results.json"]


def test_the_threshold_drawn_is_the_one_of_the_measurement():
    pytest.importorskip("matplotlib")
    for measured, drawn in ((0.3, 0.3), (0.0, 0.0), (None, 0.47)):  # None: of an earlier version
        entry = sparse(0.5, 4.4) | ({} if measured is None else {"threshold": measured})
        [axes] = figures._scores([{"models": [DENSE, entry]}]).axes
        [line] = axes.lines
        assert list(line.get_xdata()) == [drawn, drawn]


def test_means_of_several_runs_have_their_deviation():
    pytest.importorskip("matplotlib")
    deviation = {"sparsity": 0.02, "quality": 0.5, "loss_of_quality": 3.0}
    for dense, (_, spread) in (([DENSE], (10, 3.0)), ([], (4.4, 0.5))):
        results = [{"models": [*dense, sparse(0.5, 4.4) | {"deviation": deviation}]}]
        [axes] = figures._quality(results).axes
        x, y = (bars.get_segments()[0] for bars in axes.containers[0].lines[2])
        np.testing.assert_allclose(x[:, 0], [48, 52])
        np.testing.assert_allclose(np.ptp(y[:, 1]), 2 * spread)


def test_environment_names_versions_and_commit():
    env = report.environment()
    json.dumps(env)
    assert env["versions"]["jax"] == jax.__version__
    if (ROOT / ".git").exists():
        assert len(env["commit"].removesuffix("+")) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read"),
        ("[]", "holds a JSON list"),
        ('{"models": []}', "no results of evaluate.py"),
        ('{"models": [{"name": "x"}]}', "sparsity, token_ppl"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_input_of_report(content, message, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_input_report_into_a_file(tmp_path, capsys):
    results = {"models": [DENSE]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "results.json")])
    assert "name another place" in capsys.readouterr().err


def test_bad_input_figures_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = {"models": [DENSE]}
    with pytest.raises(UserError, match=r"lte-jax\[plot\]"):
        report.write([results], tmp_path)
    assert (tmp_path / "results.json").exists()  # the measuring is not lost
