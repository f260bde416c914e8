"""One model for every sparsity: curves of thresholds, how they are trained, measured and used."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_sparsity import CALIBRATION, measured, scattered

import lte_jax
from lte_jax import (
    calibration,
    config,
    data,
    losses,
    routing,
    sharding,
    sparsity,
    stages,
    tasks,
    trainer,
    training_step,
)
from lte_jax.cli import evaluate, generate
from lte_jax.config import LTEConfig, MeshConfig, UserError
from lte_jax.sparsity import SparsityController

RANGE = LTEConfig(expert_size=8, target_sparsity=0.5, sparsity_range=(0.3, 0.9))


def fine(lte=None):
    """A model whose 64 experts a layer have scores that are spread out."""
    wide = dataclasses.replace(tiny.CONFIG, d_ff=128)
    model, params = tiny.model_and_params(lte or LTEConfig(expert_size=2), wide)
    return model, scattered(model, params)


@pytest.fixture(scope="module")
def dialled():
    """A model with a curve, and its parameters."""
    model, params = fine()
    given = CALIBRATION.tokens_RL, CALIBRATION.segments_RL
    return lte_jax.calibrate(model, params, *given), params


def test_a_curve_rises_from_end_to_end(dialled):
    curve = np.asarray(dialled[0].lte.curve)
    assert 15 <= len(curve) <= 25 and np.all(np.diff(curve, axis=0) > 0)
    assert curve[0, 0] == pytest.approx(0.05, abs=0.01)
    assert curve[-1, 0] == pytest.approx(0.95, abs=0.01)
    for share, threshold in curve[::6]:  # a point is what the model does at that threshold
        reached = measured(*dialled, threshold)
        assert reached == pytest.approx(share, abs=2 * calibration.SETTLED)


@pytest.mark.parametrize("asked", [0.08, 0.33, 0.5, 0.71, 0.9, 0.94])
def test_the_sparsity_asked_for_is_what_one_gets(dialled, asked):
    model, params = dialled
    given = CALIBRATION.tokens_RL
    out = lte_jax.apply(model, params, given, mask=CALIBRATION.segments_RL, sparsity=asked)
    assert float(out.sparsity) == pytest.approx(asked, abs=0.01)


def test_every_entry_takes_it(dialled):
    model, params = dialled
    at = config.threshold_at(model.lte, 0.8)
    prompt = [[5, 9, 2, 40, 3]]
    same = [
        lte_jax.generate(model, params, prompt, max_new_tokens=12, **how)
        for how in ({"sparsity": 0.8}, {"threshold": at})
    ]
    assert same[0] == same[1]
    results = lte_jax.evaluate(model, params, CALIBRATION, latency_rounds=0, sparsity=(0.2, 0.8))
    less, more = results["models"]
    assert (less["name"], more["name"]) == ("LTE, 20%", "LTE, 80%")
    assert less["sparsity"] == pytest.approx(0.2, abs=0.01)
    assert more["sparsity"] == pytest.approx(0.8, abs=0.01) and more["threshold"] == at
    [alone] = lte_jax.evaluate(model, params, CALIBRATION, latency_rounds=0, sparsity=0.8)["models"]
    timed = lte_jax.evaluate(model, params, CALIBRATION, latency_rounds=1, sparsity=(0.2, 0.8))
    ratios = [entry["latency_ratio"] for entry in timed["models"]]
    assert 1.0 not in ratios  # to all experts active, not to the first of them
    assert alone["name"] == "LTE" and alone["loss"] == more["loss"]


def test_it_is_saved_with_the_model_and_the_commands_take_it(dialled, tmp_path, capsys):
    wide = dataclasses.replace(tiny.CONFIG, d_ff=128, vocab_size=260)
    model, params = tiny.model_and_params(LTEConfig(expert_size=2), wide)
    params = scattered(model, params)
    model = lte_jax.calibrate(model, params, CALIBRATION.tokens_RL)
    lte_jax.save(tmp_path / "lte", model, params)
    data.byte_tokenizer().save_pretrained(tmp_path / "lte")
    assert lte_jax.load(tmp_path / "lte")[0].lte.curve == model.lte.curve

    (tmp_path / "texts.txt").write_text("Once upon a time. " * 9)
    folder = f"--model={tmp_path / 'lte'}"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        how = [folder, f"--data={tmp_path / 'texts.txt'}", "--length=24", "--no-figures"]
        evaluate.main([*how, "--sparsity=0.3,0.9", f"--out={tmp_path / 'out'}"])
        generate.main([str(tmp_path / "lte"), "On", "--max-new-tokens=9", "--sparsity=0.9"])
    models = json.loads((tmp_path / "out/results.json").read_text())["models"]
    assert [m["sparsity"] for m in models] == pytest.approx([0.3, 0.9], abs=0.06)  # another text
    told = capsys.readouterr()
    assert "LTE, 30%" in told.out and "of the experts skipped" in told.err


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"sparsity": 0.7, "threshold": 0.5}, "expected one of them"),
        ({"sparsity": 0.99}, r"sparsity=0.99: expected 0.0\d* to 0.9\d*"),
        ({"sparsity": "much"}, "expected a number"),
        ({"sparsity": True}, "expected a number"),
        ({"sparsity": 0.7, "routing": "top_k"}, "no threshold decides under routing 'top_k'"),
        ({"sparsity": 0.7, "routing": "dense"}, "no threshold decides under routing 'dense'"),
    ],
)
def test_what_makes_no_sense_is_refused(dialled, how, says):
    model, params = dialled
    with pytest.raises(UserError, match=says):
        lte_jax.apply(model, params, CALIBRATION.tokens_RL, **how)


def test_models_that_cannot_are_refused():
    model, params = tiny.model_and_params()
    with pytest.raises(UserError, match=r"thresholds for 0.5 alone; `lte_jax.calibrate`"):
        lte_jax.apply(model, params, CALIBRATION.tokens_RL, sparsity=0.7)
    dense, weights = tiny.model_and_params(None)
    with pytest.raises(UserError, match="a dense model runs all neurons"):
        lte_jax.apply(dense, weights, CALIBRATION.tokens_RL, sparsity=0.7)
    with pytest.raises(UserError, match="expected a model with experts"):
        lte_jax.calibrate(dense, weights, CALIBRATION.tokens_RL)
    with pytest.raises(UserError, match="each once"):
        routing.dials("LTE", model.lte, None, None, ())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity_range": (0.9, 0.3)}, "the least and the largest"),
        ({"sparsity_range": (0.3,)}, "the least and the largest"),
        ({"sparsity_range": (0.6, 0.9)}, "target_sparsity=0.5 is outside"),
        ({"sparsity_range": (0.3, 0.9), "target_sparsity": None}, "is outside"),
        ({"sparsity_range": (0.3, 0.9), "stage1_routing": "soft"}, "expected 'straight_through'"),
        ({"curve": ((0.1, 0.2), (0.2, 0.1))}, "all ascending"),
        ({"curve": ((0.1, 0.2), (0.2, 0.3, 0.4))}, "points of a sparsity"),
        ({"curve": ((0.1,),)}, "points of a sparsity"),
        ({"per_layer": True, "target_sparsity": None}, "expected a share for each layer"),
    ],
)
def test_settings_that_contradict_each_other(settings, says):
    with pytest.raises(UserError, match=says):
        LTEConfig(**settings)


def test_a_range_needs_a_threshold():
    made = dataclasses.replace(RANGE, routing="top_k")
    with pytest.raises(UserError, match="does not decide under lte.routing='top_k'"):
        stages.make(tiny.STAGES, made)


def controller():
    return SparsityController.start(RANGE, curve=((0.0, 0.0), (0.4, 0.2), (1.0, 1.0)))


def test_the_controller_starts_on_the_curve():
    control = controller()
    targets_K = 1 - (1 - control.depths_K) ** 2
    np.testing.assert_allclose(targets_K, 1 - np.linspace(0.7**0.5, 0.1**0.5, 9) ** 2, rtol=1e-5)
    expected = np.interp(targets_K, [0, 0.4, 1], [0, 0.2, 1])
    np.testing.assert_allclose(jax.nn.sigmoid(control.logits_K), expected, rtol=1e-5)
    # That of the target, 0.5, is between two points of the curve.
    assert float(control.threshold) == pytest.approx(0.2 + 0.1 / 0.6 * 0.8, abs=0.01)


def test_each_step_draws_its_target():
    control = controller()
    drawn = [control.drawn(jax.random.key(i)) for i in range(200)]
    targets = np.array([d.target_sparsity for d in drawn])
    assert targets.min() < 0.33 and targets.max() > 0.87
    depths = 1 - np.sqrt(1 - targets)  # uniform: more targets are high
    assert np.median(targets) == pytest.approx(1 - ((0.7**0.5 + 0.1**0.5) / 2) ** 2, abs=0.05)
    expected = jax.nn.sigmoid(jnp.interp(depths, control.depths_K, control.logits_K))
    np.testing.assert_allclose([d.threshold for d in drawn], expected, rtol=1e-5)
    # Microbatches of a step draw targets that are evenly apart.
    four = np.sort([control.drawn(jax.random.key(3), i / 4).target_sparsity for i in range(4)])
    apart = (0.7**0.5 - 0.1**0.5) / 4
    np.testing.assert_allclose(np.diff(np.sqrt(1 - four)), -apart, rtol=1e-4)
    alone = tiny.control()
    assert alone.drawn(jax.random.key(0)) is alone  # without a range nothing is drawn


def test_a_step_corrects_the_curve_near_its_target():
    control = controller()
    between = control.depths_K[2] + 0.25 * (control.depths_K[3] - control.depths_K[2])
    target = 1 - (1 - between) ** 2
    at = control.replace(target_sparsity=target)
    after = control.steer_curve(at.correction(1.0 - target + 0.1))  # a tenth too many are active
    moved_K = np.asarray(after.logits_K - control.logits_K)
    far = pytest.approx(0.1 * sparsity._SHARED_GAIN, rel=1e-3)
    assert moved_K[0] == far and moved_K[-1] == far
    gain = 0.1 * sparsity._CURVE_GAIN
    assert moved_K[2] - moved_K[0] == pytest.approx(0.75 * gain, rel=1e-3)
    assert moved_K[3] - moved_K[0] == pytest.approx(0.25 * gain, rel=1e-3)
    assert float(after.threshold) > float(control.threshold)
    pushed = control
    for _ in range(50):  # too few are active at one target, again and again
        pushed = pushed.steer_curve(at.correction(1.0 - target - 0.9))
        assert np.all(np.diff(pushed.logits_K) >= 0)
    assert float(pushed.logits_K[0]) >= -8


def test_scores_are_kept_from_drifting():
    control = controller()
    high = control.on_curve(control.logits_K * 0 + 2)
    low = control.on_curve(control.logits_K * 0 - 2)
    assert float(high.centre_curve().efficiency_weight) > 0  # lower scores are rewarded
    assert float(low.centre_curve().efficiency_weight) < 0


def test_a_training_step_uses_what_it_draws():
    """Of a curve that is right, the steps' sparsities are those drawn; frozen routers stay."""
    model, params = fine(LTEConfig(expert_size=2, sparsity_range=(0.2, 0.9)))
    histogram = calibration.histogram_over(model, params, lambda: [CALIBRATION[:]])
    curve = calibration.curve(model, histogram)
    control = SparsityController.start(model.lte, curve=curve)
    stage = tiny.stage("adapt", model.lte)
    optimizer = optax.sgd(0.0)
    step = jax.jit(training_step.make_train_step(model, stage, optimizer))
    state = training_step.TrainState(jnp.int32(0), params, optimizer.init(params), control)
    wanted, got = [], []
    for _ in range(12):
        state, metrics = step(state, CALIBRATION[:], params)
        wanted.append(float(metrics["drawn_sparsity"]))
        got.append(float(metrics["sparsity"]))
    assert max(wanted) - min(wanted) > 0.4
    np.testing.assert_allclose(got, wanted, atol=0.03)
    assert float(state.control.target_sparsity) == 0.5  # what is served is not what was drawn


def test_tasks_are_measured_at_each(dialled, monkeypatch):
    model, params = dialled
    seen = []
    monkeypatch.setattr(tasks, "rows", lambda task, runs: seen.append(runs) or [])
    tasks.measure(["wikitext"], model, params, tokenizer=None, sparsity=(0.3, 0.6), name="ours")
    expected = {f"ours, {s}%": config.threshold_at(model.lte, s / 100) for s in (30, 60)}
    assert {name: run.how["threshold"] for name, run in seen[0].items()} == expected


EACH = LTEConfig(expert_size=2, target_sparsity=0.6, per_layer=True)


def test_each_layer_skips_what_is_asked():
    """One threshold for all layers leaves them apart here: their scores differ."""
    model, params = fine(EACH)
    router = params["layers"]["ffn"]["router"]
    shifted = router | {"bias": router["bias"] + jnp.array([[-1.0], [1.0]])}
    ffn = params["layers"]["ffn"] | {"router": shifted}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    given = CALIBRATION.tokens_RL, CALIBRATION.segments_RL
    model = lte_jax.calibrate(model, params, *given)
    assert len(model.lte.curve[0]) == 1 + tiny.CONFIG.num_layers

    def per_layer(model, **how):
        active = lte_jax.apply(model, params, given[0], mask=given[1], **how).active
        return 1 - np.asarray(losses.layer_means(active, jnp.asarray(given[1] > 0)))

    np.testing.assert_allclose(per_layer(model, sparsity=0.83), [0.83, 0.83], atol=0.01)
    np.testing.assert_allclose(per_layer(model), [0.6, 0.6], atol=0.01)  # its own
    together = model.clone(lte=dataclasses.replace(model.lte, per_layer=False, curve=()))
    apart = per_layer(lte_jax.calibrate(together, params, *given), sparsity=0.6)
    assert abs(apart[0] - apart[1]) > 0.1 and apart.mean() == pytest.approx(0.6, abs=0.01)
    # Kernels take the thresholds, too.
    prompt, read = [[5, 9, 2, 40, 3]], []
    how = {"max_new_tokens": 24, "eos_ids": (), "measured": read.append}
    new = lte_jax.generate(model, params, prompt, **how, implementation="xla")
    thresholds = config.own_threshold(model.lte)
    assert new == lte_jax.generate(model, params, prompt, **how, threshold=thresholds)
    assert read[0].sparsity == pytest.approx(0.6, abs=0.15)
    with pytest.raises(UserError, match="or one of each layer"):
        lte_jax.apply(model, params, given[0], threshold=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_run_whose_scores_are_all_equal_ends_with_a_model(per_layer, caplog):
    """No threshold lies between them: that is said, and what was trained is not lost."""
    lte = dataclasses.replace(RANGE, per_layer=per_layer)
    model, params = tiny.model_and_params(lte)
    router = jax.tree.map(jnp.zeros_like, params["layers"]["ffn"]["router"])
    ffn = params["layers"]["ffn"] | {"router": router}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    control = SparsityController.start(lte, tiny.CONFIG.num_layers)
    mesh = sharding.make_mesh(MeshConfig())
    made = trainer.calibrated(model, params, control, CALIBRATION, 8, mesh)
    assert made.curve == () and 0 < made.threshold < 1
    assert "of 0 sparsities measured; out of reach: [0.05, " in caplog.text
    lte_jax.apply(model.clone(lte=made), params, CALIBRATION.tokens_RL)
    low = dataclasses.replace(lte, curve=((0.1, 0.2), (0.2, 0.3)))
    expected = (0.3,) if per_layer else lte.threshold  # the nearest point has 20%
    assert config.own_threshold(low) == expected


def test_layers_are_steered_apart():
    control = SparsityController.start(EACH, 2)
    active_N = jnp.array([0.4, 0.7])  # 0.4 are wanted
    by_weight, by_threshold = control.steer_weight(active_N), control.steer_threshold(active_N)
    assert float(by_weight.efficiency_weight[0]) == pytest.approx(0, abs=1e-5)
    assert float(by_weight.efficiency_weight[1]) > 5
    np.testing.assert_allclose(by_threshold.threshold, [0.5, 0.53], rtol=1e-5)
    both = dataclasses.replace(EACH, sparsity_range=(0.3, 0.9))
    control = SparsityController.start(both, 2, ((0.0, 0.0, 0.2), (1.0, 0.6, 1.0)))
    np.testing.assert_allclose(control.threshold, [0.36, 0.68], atol=0.01)
    at = control.replace(target_sparsity=jnp.float32(0.6))
    moved = control.steer_curve(at.correction(jnp.array([0.5, 0.3]))).threshold
    assert float(moved[0]) > 0.37 and float(moved[1]) < 0.67


def test_pressure_is_of_each_layer():
    """A weight on one layer alone moves no other router."""
    model, params = fine(EACH)
    stage = tiny.stage("router", EACH, distill_weight=0.0, task_weight=0.0)
    control = SparsityController.start(EACH, 2).replace(efficiency_weight=jnp.array([0.0, 3.0]))
    batch = jax.tree.map(jnp.asarray, CALIBRATION[:])
    counts = training_step.counts_of(model, batch)
    loss = training_step.make_loss(model, stage)
    gradient = jax.grad(lambda p: loss(p, params, batch, control, counts)[0])(params)
    kernel_NDE = np.abs(gradient["layers"]["ffn"]["router"]["kernel"])
    # The first layer's router acts on the second's through what it lets pass, but not by itself.
    by_layer = kernel_NDE.sum(axis=(1, 2))
    assert by_layer[1] > 0
    alone = control.replace(efficiency_weight=jnp.array([3.0, 0.0]))
    gradient = jax.grad(lambda p: loss(p, params, batch, alone, counts)[0])(params)
    assert np.abs(gradient["layers"]["ffn"]["router"]["kernel"][1]).sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_run_ends_with_a_curve_that_holds(tmp_path, per_layer):
    experiment = tiny.experiment(tmp_path)
    lte = {"sparsity_range": (0.3, 0.9), "per_layer": per_layer, "expert_size": 2}
    lte = dataclasses.replace(experiment.lte, **lte)
    model, params = lte_jax.train(dataclasses.replace(experiment, lte=lte), tmp_path / "run")
    loaded, weights = lte_jax.load(tmp_path / "run/lte")
    assert loaded.lte == model.lte and len(loaded.lte.curve) > 5
    tokens = data.tokenize([(tmp_path / "texts.jsonl").read_text()], data.byte_tokenizer())[0]
    out = lte_jax.apply(loaded, weights, tokens[:4096].reshape(-1, 16), sparsity=0.5)
    assert float(out.sparsity) == pytest.approx(0.5, abs=0.1)  # of another text, cut anywhere
