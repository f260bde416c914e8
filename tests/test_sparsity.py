"""The control that reaches the sparsity asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lte_jax import calibration, data, losses, sharding, sparsity, stages, trainer
from lte_jax.config import LTEConfig, MeshConfig, StageConfig, StagesConfig
from lte_jax.sparsity import SparsityController

CALIBRATION = data.Records(*map(np.asarray, tiny.batch(24, seed=5).values()))


def scattered(model, params, seed=0):
    """Routers whose scores are spread out, other ones in each layer."""
    router = params["layers"]["ffn"]["router"]
    std = 2.0 / tiny.CONFIG.d_model**0.5
    shape = router["kernel"].shape
    kernel = std * jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    ffn = params["layers"]["ffn"] | {"router": {"kernel": kernel, "bias": router["bias"] + 0.3}}
    return params | {"layers": params["layers"] | {"ffn": ffn}}


def measured(model, params, threshold) -> float:
    """Sparsity on the calibration rows from the model itself."""
    out = model.apply(
        {"params": params},
        CALIBRATION.tokens_RL,
        routing="hard",
        mask=CALIBRATION.segments_RL,
        threshold=threshold,
    )
    return float(out.sparsity)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("last", [0.02, 0.97])
def test_the_last_threshold_is_that_of_the_calibration_records(target, last, caplog):
    """However far off the last batch left it; the same again after a kill; over devices too."""
    model, params = tiny.model_and_params()
    params = scattered(model, params)
    control = dataclasses.replace(
        tiny.control(),
        threshold=jnp.float32(last),
        target_sparsity=jnp.float32(target),
    )
    assert abs(measured(model, params, last) - target) > 0.05
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    caplog.set_level("INFO")
    found = trainer.settle_threshold(model, params, control, CALIBRATION, 8, mesh)
    reached = measured(model, params, found.threshold)
    assert reached == pytest.approx(target, abs=calibration.SETTLED)
    assert f"on 24 calibration records: sparsity {reached:.4f}" in caplog.text
    again = trainer.settle_threshold(model, params, control, CALIBRATION, 8, mesh)
    assert float(again.threshold) == float(found.threshold)
    assert found.replace(threshold=control.threshold) == control


def test_a_target_out_of_reach_is_said(caplog):
    """All scores are one half: there is nothing between all experts and none."""
    model, params = tiny.model_and_params()
    router = jax.tree.map(jnp.zeros_like, params["layers"]["ffn"]["router"])
    ffn = params["layers"]["ffn"] | {"router": router}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    mesh = sharding.make_mesh(MeshConfig())
    control = tiny.control(LTEConfig(expert_size=8, target_sparsity=0.7))
    found = trainer.settle_threshold(model, params, control, CALIBRATION, 8, mesh)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "sparsity 1.0000 (target 0.7000)" in record.getMessage()
    assert measured(model, params, found.threshold) == 1.0


def damping(rate: float) -> float:
    """Of the plant that the gains were found on, its learning scaled with the rate.

    kept' = -g weight, g = 1.2e-3 at a peak rate of routers of 2e-3: from the logarithmic decrement
    from its first trough to the crest after it.
    """
    router = StageConfig(steps=1, learning_rate=rate / 4.0, router_lr_multiplier=4.0)
    lte = LTEConfig(target_sparsity=0.5)
    stage = next(s for s in stages.make(StagesConfig(router=router), lte) if s.name == "router")
    slower = 2e-3 / rate

    def step(state, _):
        control, kept = state
        control = control.steer_weight(kept, stage.integral_gain)
        kept -= 1.2e-3 / slower * control.efficiency_weight
        return (control, kept), kept - 0.5

    start = (SparsityController.start(lte), jnp.float32(0.51))
    error = np.asarray(jax.lax.scan(step, start, None, round(400 * slower))[1], np.float64)
    trough = np.argmin(error)
    decrement = np.log(-error[trough] / np.max(error[trough:]))  # of half a period
    return float(decrement / np.hypot(np.pi, decrement))


def test_the_controller_is_damped_alike_at_any_learning_rate():
    """By hand: 20 sqrt(1.2e-3 / 2) = 0.49; with the integral gain unscaled, 0.045 at 1/120."""
    assert damping(2e-3) == pytest.approx(0.49, abs=0.03)
    assert damping(2e-3 / 120) == pytest.approx(0.49, abs=0.03)


# ---------------------------------------------------------------------------- the control by hand


def control(**values):
    """A control for a sparsity of three quarters."""
    values = {"target_sparsity": 0.75, "threshold": 0.5} | values
    start = tiny.control(LTEConfig(expert_size=8, target_sparsity=0.75))
    return start.replace(**{name: jnp.float32(value) for name, value in values.items()})


def test_the_control_starts_as_the_config_says():
    lte = LTEConfig(efficiency_weight=1.5, threshold=0.4, target_sparsity=0.7)
    start = SparsityController.start(lte)
    found = [start.efficiency_weight, start.integral, start.threshold, start.target_sparsity]
    assert [float(x) for x in found] == pytest.approx([1.5, 1.5, 0.4, 0.7])
    assert float(SparsityController.start(LTEConfig(target_sparsity=None)).target_sparsity) == 0.0


def test_the_weight_follows_the_error_and_its_sum():
    """A quarter is wanted. 35% kept: the sum grows by 2 x 0.1, the weight is 40 x 0.1 above it."""
    after = control(integral=1.0).steer_weight(jnp.float32(0.35), 2.0)
    assert float(after.integral) == pytest.approx(1.2, rel=1e-5)
    assert float(after.efficiency_weight) == pytest.approx(5.2, rel=1e-5)
    again = after.steer_weight(jnp.float32(0.25), 2.0)  # as wanted: the sum alone is left
    assert float(again.efficiency_weight) == pytest.approx(1.2, rel=1e-5)
    below = again.steer_weight(jnp.float32(0.2), 2.0)
    assert float(below.efficiency_weight) == pytest.approx(1.1 - 40 * 0.05, rel=1e-4)
    assert below.threshold == after.threshold == 0.5


@pytest.mark.parametrize(("kept", "bound"), [(1.0, 50.0), (0.0, -5.0)])
def test_the_sum_of_errors_is_bounded_and_so_turns_at_once(kept, bound):
    """After however long at a share that cannot be: else it would have to be unlearnt as long."""
    made = control()
    for _ in range(100):
        made = made.steer_weight(jnp.float32(kept), 2.0)
    assert float(made.integral) == float(made.efficiency_weight) == bound
    back = np.sign(0.25 - kept)
    after = made.steer_weight(jnp.float32(0.25 + back * 0.05), 2.0)
    assert float(after.integral) == pytest.approx(bound + back * 0.1, rel=1e-5)
    assert float(after.efficiency_weight) == pytest.approx(bound + back * 2.1, rel=1e-5)


def test_the_gain_is_in_proportion_to_the_rate_of_the_routers():
    assert sparsity.integral_gain(2e-3) == pytest.approx(2.0)
    assert sparsity.integral_gain(5e-4) == pytest.approx(0.5)


def test_the_threshold_follows_the_error_within_bounds():
    after = control().steer_threshold(jnp.float32(0.35))
    assert float(after.threshold) == pytest.approx(0.51)
    assert float(after.steer_threshold(jnp.float32(0.15)).threshold) == pytest.approx(0.50)
    assert after.efficiency_weight == control().efficiency_weight
    for kept, bound in ((1.0, 0.99), (0.0, 0.01)):
        made = control()
        for _ in range(40):
            made = made.steer_threshold(jnp.float32(kept))
        assert float(made.threshold) == pytest.approx(bound)


# ------------------------------------------------------------------------------ statistics by hand

# One layer, two rows of three tokens, four experts; the last token of the second row is padding.
ACTIVE = jnp.array(
    [[[[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]]], bool
)
REAL = jnp.array([[True, True, True], [True, True, False]])


def test_active_fraction_of_layers_counts_real_tokens():
    """5 of 20 run in the first layer, all in the second."""
    both = jnp.concatenate([ACTIVE, jnp.ones_like(ACTIVE)])
    np.testing.assert_allclose(losses.layer_means(both, REAL), [0.25, 1.0], atol=1e-6)


def test_bytes_are_those_of_the_weights_that_are_read():
    """Two layers: attention 32 x (32 + 16 + 16 + 32), FFN 3 x 32 x 64; head 64 x 32; 8 experts."""
    attention, ffn, head, router = 2 * 32 * 96, 2 * 3 * 32 * 64, 64 * 32, 2 * 32 * 8
    dense = sparsity.bytes_per_token(tiny.CONFIG)
    assert dense == 2 * (attention + ffn + head)
    sparse = sparsity.bytes_per_token(tiny.CONFIG, tiny.LTE, 0.75, width=4)
    assert sparse == 4 * (attention + ffn / 4 + head) + 4 * router
