"""What each stage trains, loses and controls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from lte_jax import losses, objective, optim, stages, training_step
from lte_jax.config import (
    PRESETS,
    LTEConfig,
    OptimConfig,
    StageConfig,
    StagesConfig,
)
from lte_jax.errors import UserError
from lte_jax.sparsity import SparsityController, flops_per_token

PRESET_NAMES = ["ours", pytest.param("paper", marks=pytest.mark.slow)]


def steps(stage, model, params, count, optim_config=tiny.OPTIM, rows=8):
    optimizer = optim.make(optim_config, stage.config, stage.rules)
    step = jax.jit(
        training_step.make_train_step(model, stage, optimizer, optim_config.microbatches)
    )
    lte = model.lte or tiny.LTE
    state = training_step.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), SparsityController.start(lte)
    )
    metrics = {}
    for i in range(count):
        state, metrics = step(state, tiny.batch(rows, seed=i), params)
    return state, metrics


def moved(before, after):
    before, after = (traverse_util.flatten_dict(t, sep="/") for t in (before, after))
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize("name", ["finetune", "router", "adapt"])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_one_step_moves_exactly_the_declared_leaves(name, preset):
    lte = dataclasses.replace(PRESETS[preset], expert_size=8)
    model, params = tiny.model_and_params(None if name == "finetune" else lte)
    # From the teacher itself distillation has no gradient: move away from it first.
    params = jax.tree.map(
        lambda p: p + 0.01 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params
    )
    state, _ = steps(tiny.stage(name, lte, task_weight=1.0), model, params, 1)
    everything = set(traverse_util.flatten_dict(params, sep="/"))
    frozen = {p for p in everything if "router" in p} if name == "adapt" else set()
    assert moved(params, state.params) == everything - frozen


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_routers_are_bit_identical_after_adapt(preset):
    lte = dataclasses.replace(PRESETS[preset], expert_size=8)
    model, params = tiny.model_and_params(lte)
    state, _ = steps(tiny.stage("adapt", lte), model, params, 12, OptimConfig(weight_decay=0.1))
    for name, array in params["layers"]["ffn"]["router"].items():
        np.testing.assert_array_equal(array, state.params["layers"]["ffn"]["router"][name])
    assert not np.array_equal(
        params["layers"]["ffn"]["down"], state.params["layers"]["ffn"]["down"]
    )


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_gradients_agree_with_finite_differences(routing):
    model, params = tiny.model_and_params()
    batch = tiny.batch(2)
    predicted = losses.loss_mask(batch["segments"])

    @jax.jit
    def loss(params):
        out = model.apply(
            {"params": params}, batch["tokens"], routing=routing, mask=batch["segments"]
        )
        return losses.cross_entropy(out.logits, batch["tokens"], predicted, jnp.float32(1))

    gradient = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    flat = traverse_util.flatten_dict(params, sep="/")
    checked = 0
    for path, slope in gradient.items():
        size = float(jnp.linalg.norm(slope))
        if routing == "hard" and "router" in path:  # Eq. 2: nothing flows through the indicator
            assert size == 0, path
            continue

        def along(t, path=path, slope=slope, size=size):
            moved = flat | {path: flat[path] + t * slope / size}
            return float(loss(traverse_util.unflatten_dict(moved, sep="/")))

        # Along the gradient the slope is its norm. The loss is a float32 near 80 that jumps where
        # a score crosses the threshold under hard routing: the best of some widths counts.
        widths = (1e-2, 3e-3, 1e-3)
        numeric = [(along(t) - along(-t)) / (2 * t) for t in widths]
        assert min(abs(n / size - 1) for n in numeric) < 0.02, (path, size, numeric)
        checked += 1
    assert checked >= 12


def test_straight_through_is_hard_forward_and_soft_backward():
    model, params = tiny.model_and_params()
    batch = tiny.batch(2)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, argnums=0)
    def total(params, routing):
        out = model.apply({"params": params}, batch["tokens"], routing=routing)
        return jnp.sum(out.logits**2) / 1e3

    (hard, _), (through, gradient) = (total(params, r) for r in ("hard", "straight_through"))
    np.testing.assert_allclose(hard, through, rtol=1e-6)
    assert np.abs(gradient["layers"]["ffn"]["router"]["kernel"]).max() > 1e-4


def test_straight_through_has_the_slope_of_soft_routing():
    """Where all scores are nearly one the two compute the same: the same slope, in its size too."""
    model, params = tiny.model_and_params()
    router = params["layers"]["ffn"]["router"]
    ffn = params["layers"]["ffn"] | {"router": router | {"bias": router["bias"] + 7.0}}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    batch = tiny.batch(2)

    @functools.partial(jax.jit, static_argnums=1)
    def slope(params, routing):
        def loss(params):
            out = model.apply({"params": params}, batch["tokens"], routing=routing)
            return jnp.sum(jnp.sin(out.logits))

        return jax.grad(loss)(params)["layers"]["ffn"]

    soft, through = slope(params, "soft"), slope(params, "straight_through")
    for name in ("kernel", "bias"):
        difference = jnp.linalg.norm(through["router"][name] - soft["router"][name])
        assert difference < 0.05 * jnp.linalg.norm(soft["router"][name]), name


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_model_whose_scores_are_all_on_the_threshold_trains(preset):
    lte = dataclasses.replace(PRESETS[preset], expert_size=8)
    model, params = tiny.model_and_params(lte)
    router = jax.tree.map(jnp.zeros_like, params["layers"]["ffn"]["router"])
    ffn = params["layers"]["ffn"] | {"router": router}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    state, metrics = steps(tiny.stage("router", lte, task_weight=1.0), model, params, 5)
    assert all(np.isfinite(v).all() for v in metrics.values()), metrics
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_padding_counts_in_no_loss_and_no_statistic():
    model, params = tiny.model_and_params()
    batch = tiny.batch(4)
    fill = {"tokens": 7, "segments": 0}
    longer = {k: jnp.pad(v, ((0, 3), (0, 5)), constant_values=fill[k]) for k, v in batch.items()}
    stage = tiny.stage("router", PRESETS["paper"], task_weight=1.0, distill_weight=0.5)
    loss = training_step.make_loss(model, stage)

    @jax.jit
    def parts(batch):
        counts = objective.counts_of(model, batch)
        return loss(params, params, batch, tiny.control(), counts)[1]

    short, padded = parts(batch), parts(longer)
    assert short.keys() >= {"loss", "distill", "efficiency", "separability", "active_fraction"}
    for name, value in short.items():
        np.testing.assert_allclose(value, padded[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_distillation_acts_on_the_last_token_of_a_text():
    """KL by hand over all real tokens, of which the task loss leaves each text's last out."""
    model, params = tiny.model_and_params()
    teacher = jax.tree.map(lambda p: p * 1.1, params)
    batch = tiny.batch(2)
    segments_BL = np.asarray(batch["segments"])
    counts = objective.counts_of(model, batch)
    assert float(counts["real"]) == float(counts["predicted"]) + 4  # two texts in each of two rows
    stage = tiny.stage("router", task_weight=0.5, distill_weight=0.5)
    parts = training_step.make_loss(model, stage)(params, teacher, batch, tiny.control(), counts)[1]
    logp, teacher_logp = (
        np.asarray(
            jax.nn.log_softmax(
                model.apply(
                    {"params": p}, batch["tokens"], routing=r, mask=batch["segments"]
                ).logits
            ),
            np.float64,
        )
        for p, r in ((params, stage.routing), (teacher, "dense"))
    )
    kl_BL = np.sum(np.exp(teacher_logp) * (teacher_logp - logp), axis=-1)
    assert float(parts["distill"]) == pytest.approx(np.mean(kl_BL[segments_BL > 0]), rel=1e-4)


def test_microbatches_add_up_to_the_whole_batch():
    model, params = tiny.model_and_params()
    stage = tiny.stage("router", task_weight=0.5, distill_weight=0.5, hidden_distill_weight=0.5)
    whole, _ = steps(stage, model, params, 2)
    parts, _ = steps(stage, model, params, 2, dataclasses.replace(tiny.OPTIM, microbatches=4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), whole, parts)


def test_the_controller_finds_the_wanted_sparsity():
    lte = LTEConfig(expert_size=8, target_sparsity=0.75, distill_weight=0.0)
    model, params = tiny.model_and_params(lte)
    stage = tiny.stage(
        "router", lte, config=StageConfig(steps=150, learning_rate=1e-3, router_lr_multiplier=20.0)
    )
    _, metrics = steps(stage, model, params, 150)
    assert float(metrics["sparsity"]) == pytest.approx(0.75, abs=0.1)


def test_the_threshold_holds_the_sparsity():
    lte = LTEConfig(expert_size=8, target_sparsity=0.3)
    model, params = tiny.model_and_params(lte)
    state, metrics = steps(tiny.stage("adapt", lte), model, params, 80)
    assert float(metrics["sparsity"]) == pytest.approx(0.3, abs=0.05)
    assert float(state.control.threshold) < lte.threshold  # random routers begin near a half


def test_what_each_stage_is():
    lte = LTEConfig(
        target_sparsity=0.5, distill_weight=0.75, separability_weight=0.3, stage1_routing="soft"
    )
    config = StagesConfig(*(StageConfig(steps=s, learning_rate=1e-3) for s in (1, 2, 3)))
    finetune, router, adapt = stages.make(config, lte)
    assert [s.config.steps for s in (finetune, router, adapt)] == [1, 2, 3]
    assert [s.routing for s in (finetune, router, adapt)] == ["dense", "soft", "hard"]
    assert [s.task_weight for s in (finetune, router, adapt)] == [1.0, 0.25, 0.25]
    assert [s.distill_weight for s in (finetune, router, adapt)] == [0.0, 0.75, 0.75]
    assert [s.efficiency for s in (finetune, router, adapt)] == [False, True, False]
    assert [s.separability_weight for s in (finetune, router, adapt)] == [0.0, 0.3, 0.0]
    assert [s.steer for s in (finetune, router, adapt)] == [None, "weight", "threshold"]
    fixed = stages.make(config, dataclasses.replace(lte, target_sparsity=None))
    assert [s.steer for s in fixed] == [None, None, None]


@pytest.mark.parametrize("name", ["router", "adapt"])
def test_the_loss_of_a_stage_is_the_sum_of_its_parts(name):
    """Each with its weight; the teacher is the dense model, in either stage."""
    lte = LTEConfig(expert_size=8, distill_weight=0.75, separability_weight=0.3, threshold=0.4)
    lte = dataclasses.replace(lte, hidden_distill_weight=0.6)
    model, params = tiny.model_and_params(lte)
    teacher, batch = jax.tree.map(lambda p: p * 1.1, params), tiny.batch(2)
    segments, real = batch["segments"], batch["segments"] > 0
    count = {
        "predicted": jnp.sum(losses.loss_mask(segments).astype(jnp.float32)),
        "real": jnp.sum(real.astype(jnp.float32)),
    }
    count["distilled"] = count["real"]
    control = tiny.control(lte).replace(efficiency_weight=jnp.float32(2.0))
    stage = tiny.stage(name, lte)
    total, parts = training_step.make_loss(model, stage)(params, teacher, batch, control, count)

    def out(params, routing):
        how = {"routing": routing, "mask": segments, "mutable": "intermediates"}
        found, sown = model.apply({"params": params}, batch["tokens"], **how)
        return found, sown["intermediates"]["layers"]["ffn"]["ffn_input"][0]

    (mine, x_NBLD), (dense, taught_NBLD) = out(params, stage.routing), out(teacher, "dense")
    far_NBL = np.sum((x_NBLD - taught_NBLD) ** 2, axis=3) / np.sum(taught_NBLD**2, axis=3)
    expected = {
        "distill_hidden": np.mean(far_NBL[:, real]),
        "loss": losses.cross_entropy(
            mine.logits, batch["tokens"], losses.loss_mask(segments), count["predicted"]
        ),
        "distill": losses.distillation(mine.logits, dense.logits, real, count["real"]),
        "efficiency": losses.efficiency(mine.scores, real, count["real"], 2),
        "active_fraction": 1.0 - mine.sparsity,
    }
    weights = {"loss": 0.25, "distill": 0.75, "distill_hidden": 0.6}
    if name == "router":
        weights |= {"efficiency": 2.0, "separability": 0.3}
        expected["separability"] = losses.separability(mine.scores, real, count["real"], 0.4, 1e-2)
    for part, value in expected.items():
        assert float(value) > 0.01 and float(parts[part]) == pytest.approx(float(value), rel=1e-4)
    by_hand = sum(weight * float(expected[part]) for part, weight in weights.items())
    assert float(total) == pytest.approx(by_hand, rel=1e-4)
    assert float(parts["objective"]) == float(total)


def test_a_step_steers_by_what_it_kept():
    for name, read, gain in (("router", "efficiency_weight", 50), ("adapt", "threshold", 0.1)):
        lte = LTEConfig(expert_size=8, target_sparsity=0.9, efficiency_weight=3.0)
        model, params = tiny.model_and_params(lte)
        # The gain of errors is 40, that of their sum 2 at a rate of 2e-3, and this is 1e-2.
        state, metrics = steps(tiny.stage(name, lte), model, params, 1)
        error = (1.0 - float(metrics["sparsity"])) - 0.1
        assert error > 0.2
        start = {"efficiency_weight": 3.0, "threshold": 0.5}
        expected = start | {read: start[read] + gain * error}
        assert float(state.control.efficiency_weight) == pytest.approx(
            expected["efficiency_weight"], rel=1e-4
        )
        assert float(state.control.threshold) == pytest.approx(expected["threshold"], rel=1e-4)


def test_stages_of_no_steps_are_left_out():
    made = stages.make(StagesConfig(adapt=StageConfig(steps=0)), LTEConfig())
    assert [stage.name for stage in made] == ["router"]


def test_flops_are_those_of_table_1():
    from lte_jax.config import ModelConfig

    llama = ModelConfig(
        vocab_size=32000, d_model=4096, d_ff=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128,
    )  # fmt: skip
    assert flops_per_token(llama) / 2**30 == pytest.approx(12.06, abs=0.01)
    # LTE on XSum, E2E and WikiText: the table does not print the sparsities that give its numbers.
    for sparsity, gflops in ((0.839, 5.38), (0.930, 4.65), (0.689, 6.59)):
        found = flops_per_token(llama, LTEConfig(), sparsity) / 2**30
        assert found == pytest.approx(gflops, abs=0.01)
    router = flops_per_token(llama, LTEConfig()) - flops_per_token(llama)
    assert router / 2**30 == pytest.approx(0.084, abs=1e-3)


@pytest.mark.parametrize("routing", ["dense"])
def test_a_model_that_would_be_served_dense_is_refused(routing):
    lte = dataclasses.replace(tiny.LTE, routing=routing)
    with pytest.raises(UserError, match="lte.routing='dense' runs all experts: expected 'hard'"):
        stages.make(tiny.STAGES, lte)
