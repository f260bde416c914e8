"""The control that reaches the sparsity asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lte_jax import data, sharding, sparsity, stages, trainer
from lte_jax.config import LTEConfig, MeshConfig, StageConfig, StagesConfig
from lte_jax.sparsity import Control

CALIBRATION = data.Rows(*map(np.asarray, tiny.batch(24, seed=5).values()))


def scattered(model, params, seed=0):
    """Routers whose scores are spread out, other ones in each layer."""
    router = params["layers"]["ffn"]["router"]
    std = 2.0 / tiny.CONFIG.d_model**0.5
    kernel = std * jax.random.normal(jax.random.key(seed), router["kernel"].shape)
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
    assert reached == pytest.approx(target, abs=sparsity.SETTLED)
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

    start = (Control.start(lte), jnp.float32(0.51))
    error = np.asarray(jax.lax.scan(step, start, None, round(400 * slower))[1], np.float64)
    trough = np.argmin(error)
    decrement = np.log(-error[trough] / np.max(error[trough:]))  # of half a period
    return float(decrement / np.hypot(np.pi, decrement))


def test_the_controller_is_damped_alike_at_any_learning_rate():
    """By hand: 20 sqrt(1.2e-3 / 2) = 0.49; with the integral gain unscaled, 0.045 at 1/120."""
    assert damping(2e-3) == pytest.approx(0.49, abs=0.03)
    assert damping(2e-3 / 120) == pytest.approx(0.49, abs=0.03)
