"""What a run hands from one arrow to the next, and what its LTE folder says."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import hf, pipeline, sharding, trainer, training_step
from lte_jax.calibration import SETTLED
from lte_jax.config import ComputeConfig, LTEConfig, StageConfig
from lte_jax.workdir import Paths


def copied(tree):
    """The arrays of a tree, safe from what is done with theirs later."""
    return jax.tree.map(np.array, tree)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tiny.experiment(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    """A whole run: its folder, what each stage was given and made, and what was logged."""
    folder = tmp_path_factory.mktemp("run")
    calls, logged = {}, []
    fit = trainer.fit

    def watched(model, stage, params, control, *args, **kwargs):
        given = {"control": control, "params": params, "teacher": kwargs.get("teacher")}
        given = copied(given)
        trained = fit(model, stage, params, control, *args, **kwargs)
        made = {"params": trained.params, "control": trained.control}
        calls[stage.name] = given, copied(made)
        return trained

    class Keep(logging.Handler):
        def emit(self, record):
            logged.append(record.getMessage())

    handler, logger = Keep(), logging.getLogger("lte_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", watched)
        lte_jax.train(experiment, folder / "run")
    logger.removeHandler(handler)
    logger.setLevel(level)
    return folder / "run", calls, logged


def params_of(folder):
    return copied(lte_jax.load(folder)[1])


def test_each_stage_goes_on_from_the_one_before(run):
    """With its control too: the weight that it has found, and the sum of errors behind it."""
    root, stages, _ = run
    assert list(stages) == ["finetune", "router", "adapt"]
    assert equal(stages["finetune"][1]["params"], params_of(root / "dense"))
    assert equal(stages["router"][0]["params"], params_of(root / "experts"))
    assert equal(stages["adapt"][0]["params"], stages["router"][1]["params"])
    assert equal(stages["adapt"][1]["params"], params_of(root / "lte"))
    start, found = stages["router"][0]["control"], stages["router"][1]["control"]
    assert found.efficiency_weight != start.efficiency_weight and found.integral != start.integral
    assert equal(stages["adapt"][0]["control"], found)


def test_both_sparse_stages_learn_from_the_dense_model(run):
    """Its neurons in the order of the experts: what the stages start from, before any training."""
    root, stages, _ = run
    start = params_of(root / "experts")
    teacher = training_step.teacher_of(jax.tree.map(jnp.asarray, start), ComputeConfig())
    for name in ("router", "adapt"):
        given, made = stages[name]
        assert equal(given["teacher"], teacher)
        assert not equal(made["params"], start)


def test_the_lte_folder_says_which_threshold_was_found_last(run):
    root, _, logged = run
    [found] = [m[1] for line in logged if (m := re.match(r"threshold set to (\S+) on", line))]
    (_, start), (_, lte) = (hf.read_config(root / name) for name in ("experts", "lte"))
    assert lte.threshold == pytest.approx(float(found), abs=1e-4)
    assert abs(lte.threshold - start.threshold) > 1e-3


def test_the_lte_folder_says_where_each_neuron_was(run):
    """The dense model's neurons in that order are those of the experts, before they learn."""
    root, _, _ = run
    order_NEM = hf.load_expert_order(root / "lte")
    np.testing.assert_array_equal(order_NEM, hf.load_expert_order(root / "experts"))
    dense, experts = (params_of(root / name)["layers"]["ffn"] for name in ("dense", "experts"))
    for name in ("gate", "up", "down"):
        for n, order_EM in enumerate(order_NEM):
            np.testing.assert_array_equal(experts[name][n], dense[name][n, 0][order_EM])
    assert len(np.unique(order_NEM[0])) == order_NEM[0].size
    assert not np.array_equal(order_NEM[0].ravel(), np.arange(order_NEM[0].size))


def calibration(experiment, folder):
    return pipeline._Run(experiment, Paths(folder), sharding.make_mesh(experiment.mesh)).calibration


def test_calibration_is_as_large_as_the_width_asks_for(experiment, tmp_path):
    """32 real tokens for each of D + 1 = 33 unknowns, in rows of at most 16; or what is set."""
    asked = dataclasses.replace(experiment, lte=LTEConfig(expert_size=8))
    rows = calibration(asked, tmp_path)
    assert 32 * 33 <= (rows.segments_RL > 0).sum() < 32 * 33 + 2 * 16
    assert len(calibration(experiment, tmp_path)) == 4


def test_the_threshold_of_a_run_is_set_on_its_calibration_rows(experiment, run):
    root, _, logged = run
    model, params = lte_jax.load(root / "lte")
    rows = calibration(experiment, root)
    out = lte_jax.apply(model, params, rows.tokens_RL, mask=rows.segments_RL)
    assert abs(float(out.sparsity) - 0.5) <= SETTLED
    said = f"threshold set to {model.lte.threshold:.4f} on 4 calibration records"
    assert any(said in line for line in logged)


@pytest.mark.slow
def test_the_largest_seed_works(experiment, tmp_path):
    """The stage's name is mixed in, and the data loader takes 32 bits."""
    stages = dataclasses.replace(experiment.stages, router=StageConfig())
    few = dataclasses.replace(experiment, stages=stages, seed=2**31 - 1)
    lte_jax.train(few, tmp_path / "run")
