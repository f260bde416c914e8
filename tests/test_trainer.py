"""The training loop: its validation, the order of its data, and where it resumes."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lte_jax import data, optim, sharding, stages, trainer, training_step, writers
from lte_jax.config import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    LTEConfig,
    MeshConfig,
    StageConfig,
    StagesConfig,
)
from lte_jax.errors import UserError
from lte_jax.sparsity import SparsityController

STEPS = 4


class Recorder(writers.MultiWriter):
    """A writer that keeps what it is told."""

    def __init__(self):
        super().__init__(())
        self.losses, self.lines = {}, []

    def write(self, stage, step, values):
        self.losses[step] = values["loss"]
        self.lines.append((step, dict(values)))


def fit(
    folder, stage="router", lte=tiny.LTE, rate=1e-3, seed=0, threshold=None, profile=None,
    fill=None, lines=False, eval_every=STEPS, log_every=1,
):  # fmt: skip
    """A stage of a few steps, all of them saved: what it ends with, and the loss of each step.

    With `lines`, in place of the losses, what the writer was told.
    """
    steps = StageConfig(steps=STEPS, learning_rate=rate)
    made = {s.name: s for s in stages.make(StagesConfig(steps, steps, steps), lte)}
    settings = Experiment(
        seed=seed, data=DataConfig(batch_size=8), checkpoint=CheckpointConfig(1, STEPS, 0),
        eval_every=eval_every, log_every=log_every,
    )  # fmt: skip
    model, params = tiny.model_and_params(lte)
    if fill is not None:
        params = jax.tree.map(lambda p: p.at[..., 0].set(fill), params)
    control = SparsityController.start(lte)
    if threshold is not None:
        control = control.replace(threshold=jnp.float32(threshold))
    recorder = Recorder()
    trained = trainer.fit(
        *(model, made[stage], params, control, (records(24, 0), records(12, 1)), settings, folder),
        recorder,
        mesh=sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        teacher=params,
        profile=profile,
    )
    return trained, recorder.lines if lines else recorder.losses


def records(count, seed):
    """Records of two texts each; in the last third the second is cut to three tokens."""
    made = {name: np.array(x) for name, x in tiny.batch(count, seed=seed).items()}
    for row in range(2 * count // 3, count):
        [second] = np.nonzero(made["segments"][row] == 2)
        made["segments"][row, second[3:]] = 0
    return data.Records(made["tokens"], made["segments"])


def test_validation_is_the_mean_over_tokens_under_hard_routing(tmp_path):
    """By hand, whatever routing the stage trains with; two batches of different length."""
    lte = LTEConfig(expert_size=8, stage1_routing="soft", distill_weight=0.0, target_sparsity=None)
    trained, _ = fit(tmp_path, lte=lte, rate=0.0, threshold=0.55)
    model, params = tiny.model_and_params(lte)
    validation = records(12, 1)

    apply = jax.jit(model.apply, static_argnames="routing")

    def measured(routing):
        out = apply(
            {"params": params},
            validation.tokens_RL,
            routing=routing,
            mask=validation.segments_RL,
            threshold=0.55,
        )
        logp_RLV = np.asarray(jax.nn.log_softmax(out.logits), np.float64)
        nll = [
            -logp_RLV[r, t, validation.tokens_RL[r, t + 1]]
            for r, t in np.ndindex(12, 15)
            if validation.segments_RL[r, t] == validation.segments_RL[r, t + 1] > 0
        ]
        skipped = ~np.asarray(out.active)[:, validation.segments_RL > 0]
        return np.mean(nll), np.mean(skipped)

    loss, sparsity = measured("hard")
    assert abs(loss - measured("soft")[0]) > 0.01
    assert trained.validation_loss == pytest.approx(loss, rel=1e-5)
    assert trained.validation_sparsity == pytest.approx(sparsity, abs=1e-5)
    assert 0.1 < sparsity < 0.9


def test_each_step_is_written_once_with_all_that_was_measured_after_it(tmp_path):
    trained, lines = fit(tmp_path, lines=True, log_every=3, eval_every=2)
    assert [step for step, _ in lines] == [2, 3, 4]  # validated, logged, last
    for step, values in lines:
        assert ("validation_loss" in values) == (step in (2, 4))
        layers = [values[f"sparsity_per_layer/0{n}"] for n in (1, 2)]
        assert values["sparsity"] == pytest.approx(np.mean(layers), abs=1e-6)
        assert abs(layers[0] - layers[1]) > 1e-3
        assert values["seconds"] > 0 and values["tokens_per_second"] > 0
        assert values["objective"] != values["loss"]
    assert lines[-1][1]["validation_loss"] == trained.validation_loss
    rate = optim.schedule(StageConfig(steps=STEPS, learning_rate=1e-3))
    found = [values["learning_rate"] for _, values in lines]
    np.testing.assert_allclose(found, [rate(1), rate(2), rate(3)], rtol=1e-6)


def test_a_stage_without_validations(tmp_path):
    trained, lines = fit(tmp_path, lines=True, log_every=3, eval_every=0)
    assert [step for step, _ in lines] == [3, 4]  # logged, last
    assert all("validation_loss" not in values for _, values in lines)
    assert trained.validation_loss is trained.validation_sparsity is None
    with_some, _ = fit(tmp_path / "with", lines=True, eval_every=2)
    assert with_some.validation_loss is not None
    equal = jax.tree.map(np.array_equal, trained.params, with_some.params)
    assert jax.tree.all(equal)


def test_a_step_whose_validation_was_cut_short_is_written_when_the_run_resumes(
    tmp_path, monkeypatch
):
    _, whole = fit(tmp_path / "whole", lines=True, eval_every=2)
    asked = []

    def requested():
        asked.append(True)
        return len(asked) > 2  # after the questions of the loop at steps 0 and 1: in a validation

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.interrupt, "requested", requested)
        patch.setattr(
            Recorder, "write", lambda self, stage, step, values: lines.append((step, values))
        )
        with pytest.raises(SystemExit):
            fit(tmp_path / "run", eval_every=2)
    assert [step for step, _ in lines] == [1]
    _, rest = fit(tmp_path / "run", lines=True, eval_every=2)

    def told(lines):
        drop = writers.CLOCK
        return [(step, {k: v for k, v in x.items() if k not in drop}) for step, x in lines]

    assert told(lines + rest) == told(whole)
    assert dict(rest)[2]["seconds"] > dict(lines)[1]["seconds"]


def test_the_pace_counts_steps_but_not_compiling_and_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    pace = trainer._Pace(before=50.0)
    now[0] += 30  # compiles
    pace.done(1000.0)
    assert pace.read() == {"seconds": 80.0}
    now[0] += 4
    pace.done(600.0)
    with pace.pause():
        now[0] += 100
    now[0] += 2
    pace.done(600.0)
    assert pace.read() == {"seconds": 186.0, "tokens_per_second": 200.0}
    assert pace.read() == {"seconds": 186.0}


def test_the_seed_decides_the_order_of_the_data(tmp_path):
    """At a rate of zero the loss of a step tells which records it saw."""
    one, other = (
        [*fit(tmp_path / str(seed), "adapt", rate=0.0, seed=seed)[1].values()] for seed in (0, 1)
    )
    assert len(set(one)) == len(set(other)) == STEPS
    assert one != other


def test_a_stage_goes_on_from_its_newest_checkpoint_to_the_same_bits(tmp_path):
    """With its optimizer, its control and its place in the data."""
    whole, losses = fit(tmp_path / "run")
    for step in range(3, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / str(step))
    again, others = fit(tmp_path / "run")
    assert others == {step: losses[step] for step in range(3, STEPS + 1)}
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
    assert jax.tree.map(float, whole.control) == jax.tree.map(float, again.control)
    assert whole.validation_loss == again.validation_loss


def test_a_finished_stage_is_not_trained_again(tmp_path):
    whole, _ = fit(tmp_path)
    again, losses = fit(tmp_path)
    assert losses == {}
    assert dataclasses.replace(again, params=None) == dataclasses.replace(whole, params=None)
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)


def test_weights_that_are_not_finite_stop_and_save_the_batch(tmp_path):
    with pytest.raises(UserError) as caught:
        fit(tmp_path, fill=jnp.nan)
    message = str(caught.value)
    assert "'router' step 1" in message and "loss=nan" in message and "learning_rate" in message
    with np.load(tmp_path / "nonfinite-1.npz") as saved:
        assert saved["tokens"].shape == (8, 16) and np.isnan(saved["metric_loss"])
    assert not list(tmp_path.glob("[0-9]*"))  # no checkpoint of a broken state


def test_the_loop_moves_nothing_between_host_and_devices_unseen(tmp_path, monkeypatch):
    """Batches go there and metrics come back by calls that say so."""
    guarded = []

    def guard(name, part):
        def run(*args):
            guarded.append(name)
            with jax.transfer_guard("disallow"):
                part(*args)

        monkeypatch.setattr(trainer._Loop, name, run)

    for name in ("advance", "validate", "save"):
        guard(name, getattr(trainer._Loop, name))
    fit(tmp_path)
    assert guarded.count("advance") == STEPS


def test_a_trace_of_a_few_steps(tmp_path):
    fit(tmp_path / "run", profile=tmp_path / "trace")
    [trace] = (tmp_path / "trace").rglob("*.xplane.pb")
    seen = trace.read_bytes()
    assert b"step_num" in seen and b"jit_step" in seen


def test_each_part_of_a_step_has_a_scope():
    lte = dataclasses.replace(tiny.LTE, separability_weight=0.1, distill_weight=0.5)
    model, params = tiny.model_and_params(lte)
    [_, stage, _] = stages.make(tiny.STAGES, lte)
    optimizer = optim.make(tiny.OPTIM, stage.config, stage.rules)
    state = training_step.TrainState(
        jnp.int32(0), params, optimizer.init(params), SparsityController.start(lte)
    )
    step = training_step.make_train_step(model, stage, optimizer)
    text = jax.jit(step).lower(state, tiny.batch(4), params).as_text(debug_info=True)
    parts = "embed attention router experts head task_loss teacher distillation efficiency"
    for part in [*parts.split(), "separability", "optimizer"]:
        assert f"{part}/" in text or f"{part})/" in text, part
