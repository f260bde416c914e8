"""Several runs as one table and figure: what is a mean of what, against numbers by hand."""

import dataclasses
import json
import statistics

import numpy as np
import pytest

from lte_jax import config, figures, report, runs
from lte_jax.errors import UserError

# By target and seed: perplexity of the dense and of the sparse model, and sparsity.
MEASURED = {
    (0.5, 0): (4.0, 4.4, 0.50),
    (0.5, 1): (4.2, 4.41, 0.52),
    (0.75, 0): (4.0, 5.0, 0.74),
    (0.75, 1): (4.2, 5.46, 0.76),
}


def entry(name, ppl, sparsity, **more):
    shown = {"name": name, "token_ppl": ppl, "sparsity": sparsity, "latency_ratio": 1 - sparsity}
    if sparsity:
        shown |= {"sparsity_per_layer": [sparsity - 0.1, sparsity + 0.1], "threshold": 0.4}
        shown |= {"lte": {"threshold": 0.4}, "score_histogram": [3, 1]}
    return shown | more


def folder(root, name, models, target=0.5, seed=0, **changes):
    """A finished run's work directory, as far as it is read."""
    made = config.Experiment(seed=seed, **changes)
    made = dataclasses.replace(made, lte=dataclasses.replace(made.lte, target_sparsity=target))
    (root / name).mkdir()
    (root / name / "experiment.json").write_text(json.dumps(dataclasses.asdict(made)))
    (root / name / "results.json").write_text(json.dumps({"models": models}))
    return root / name


@pytest.fixture
def four(tmp_path):
    return [
        folder(
            *(tmp_path, f"{target}-{seed}", [entry("dense", dense, 0.0), entry("LTE", ppl, share)]),
            *(target, seed),
            report=bool(seed),  # of no consequence
        )
        for (target, seed), (dense, ppl, share) in MEASURED.items()
    ]


def test_runs_that_differ_in_the_seed_are_one_row(four):
    results = runs.together(four)
    assert runs.table(results).splitlines()[2:] == [
        "| dense |  | 0, 1 | 0.0% | 4.100 ± 0.141 |  | 1.00 |",
        "| LTE | 50% | 0, 1 | 51.0 ± 1.4% | 4.405 ± 0.007 | +7.5 ± 3.5% | 0.49 ± 0.01 |",
        "| LTE | 75% | 0, 1 | 75.0 ± 1.4% | 5.230 ± 0.325 | +27.5 ± 3.5% | 0.25 ± 0.01 |",
    ]
    [dense, half, _] = results[0]["models"]
    assert half["deviation"]["loss_of_quality"] == pytest.approx(statistics.stdev([10, 5]))
    np.testing.assert_allclose(half["sparsity_per_layer"], [0.41, 0.61])
    assert half["score_histogram"] == [6, 2] and dense["seeds"] == [0, 1]


def test_one_seed_has_no_deviation(four):
    lines = runs.table(runs.together(four[:1])).splitlines()
    assert lines[3] == "| LTE | 50% | 0 | 50.0% | 4.400 | +10.0% | 0.50 |"


def test_what_else_differs_is_in_the_name(four, tmp_path):
    small = config.LTEConfig(expert_size=8)
    models = [entry("dense", 4.0, 0.0), entry("LTE", 4.2, 0.5)]
    more = folder(tmp_path, "small", models, lte=small)
    control = [entry("dense", 3.9, 0.0)]
    longer = config.StagesConfig(finetune=config.StageConfig(steps=1500))
    more = [more, folder(tmp_path, "control", control, None, stages=longer)]
    text = runs.table(runs.together([*four, *more]))
    assert "| LTE, lte.expert_size=8 | 50% | 0 |" in text
    assert "| LTE, lte.expert_size=32 | 50% | 0, 1 |" in text
    assert "| dense, finetune.steps=0 |  | 0, 1 |" in text
    assert "| dense, finetune.steps=1500 |  | 0 | 0.0% | 3.900 |  |" in text


def test_metrics_of_a_task_have_a_column_each(tmp_path):
    def scored(name, accuracy, sparsity):
        made = entry(name, None, sparsity, metrics={"accuracy": accuracy, "f1": accuracy - 1})
        del made["token_ppl"]
        return made

    made = [
        folder(
            tmp_path, str(seed), [scored("dense", 90.0, 0.0), scored("LTE", mine, 0.5)], seed=seed
        )
        for seed, mine in enumerate((89.0, 88.0))
    ]
    lines = runs.table(runs.together(made)).splitlines()
    assert lines[0].startswith("| model | target | seeds | FFN sparsity | accuracy | f1 | against")
    assert lines[3] == (
        "| LTE | 50% | 0, 1 | 50.0% | 88.50 ± 0.71 | 87.50 ± 0.71 | -1.50 ± 0.71 | 0.50 |"
    )


def test_a_table_figures_and_numbers_are_written(four, tmp_path):
    pytest.importorskip("matplotlib")
    results = runs.together(four)
    made = runs.write(results, four, tmp_path / "out")
    assert [path.name for path in made] == [
        "table.md", "quality.png", "layers.png", "scores.png", "runs.json",
    ]  # fmt: skip
    assert all(path.stat().st_size for path in made)
    assert runs.table(results) in made[0].read_text() and str(four[3]) in made[0].read_text()
    assert json.loads(made[-1].read_text())["results"][0]["models"][1]["target"] == 0.5
    [axes] = figures._quality(results).axes
    [bars] = axes.containers
    up_and_down = bars.lines[2][1].get_segments()
    np.testing.assert_allclose(np.ptp(up_and_down[0][:, 1]), 2 * statistics.stdev([10, 5]))
    np.testing.assert_allclose(up_and_down[1][:, 1].mean(), 27.5)
    low, high = axes.get_ylim()
    assert all(low <= y <= high for bar in up_and_down for y in bar[:, 1])


def test_bad_input_of_runs(four, tmp_path):
    for places, words in {
        (four[0], four[1], four[0]): "hold one run, of seed 0: name one of them",
        (tmp_path / "none",): "is not a work directory of train.py",
    }.items():
        with pytest.raises(UserError, match=words):
            runs.together(places)
    (four[0] / "results.json").unlink()
    with pytest.raises(UserError, match=r"has no results.json: .* --workdir="):
        runs.together(four)
    assert report.read(four[1] / "results.json")
