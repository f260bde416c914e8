"""Optimizers against steps worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lte_jax import optim, stages
from lte_jax import params as model_params
from lte_jax.config import LTEConfig, OptimConfig, StageConfig, StagesConfig
from lte_jax.errors import UserError

# Without memory and with an epsilon of one, Adam moves each parameter by rate g / (|g| + 1).
PLAIN = {"b1": 0.0, "b2": 0.0, "eps": 1.0}
RATE = 0.5


def stage(name, multiplier=1.0):
    config = StageConfig(
        steps=10, learning_rate=RATE, router_lr_multiplier=multiplier, warmup_ratio=0.0,
        schedule="constant",
    )  # fmt: skip
    made = stages.make(StagesConfig(config, config, config), LTEConfig())
    return next(s for s in made if s.name == name)


def params(router, up):
    ffn = {"router": {"kernel": jnp.array(router)}, "up": jnp.array(up)}
    return {"layers": {"ffn": ffn}, "embed": {"embedding": jnp.zeros(1)}}


def updates(config, stage, gradient, values=None):
    """One step's updates of the routers and of the model."""
    optimizer = optim.make(config, stage.config, stage.rules)
    values = values or jax.tree.map(jnp.zeros_like, gradient)
    step, _ = optimizer.update(gradient, optimizer.init(values), values)
    moved = optax.apply_updates(values, step)["layers"]["ffn"]
    start = values["layers"]["ffn"]
    return moved["router"]["kernel"] - start["router"]["kernel"], moved["up"] - start["up"]


def test_routers_and_model_are_clipped_apart():
    """Routers: a norm of 500 becomes 1. The model: a norm of 1/2 stays, whatever routers have."""
    gradient = params(router=[300.0, 400.0], up=[0.3, 0.4])
    router, up = updates(OptimConfig(**PLAIN, clip_norm=1.0), stage("router"), gradient)
    np.testing.assert_allclose(router, [-RATE * 0.6 / 1.6, -RATE * 0.8 / 1.8], rtol=1e-5)
    np.testing.assert_allclose(up, [-RATE * 0.3 / 1.3, -RATE * 0.4 / 1.4], rtol=1e-5)


def test_a_group_is_clipped_by_the_norm_of_all_its_parameters():
    gradient = params(router=[0.0], up=[3.0]) | {"embed": {"embedding": jnp.array([4.0])}}
    _, up = updates(OptimConfig(**PLAIN, clip_norm=1.0), stage("router"), gradient)
    np.testing.assert_allclose(up, [-RATE * 0.6 / 1.6], rtol=1e-5)


def test_a_clip_norm_of_zero_clips_nothing():
    gradient = params(router=[300.0], up=[3.0])
    router, up = updates(OptimConfig(**PLAIN, clip_norm=0.0), stage("router"), gradient)
    np.testing.assert_allclose(router, [-RATE * 300 / 301], rtol=1e-5)
    np.testing.assert_allclose(up, [-RATE * 3 / 4], rtol=1e-5)


def test_weight_decay_shrinks_parameters_whose_gradient_is_zero():
    values = params(router=[8.0], up=[2.0])
    gradient = jax.tree.map(jnp.zeros_like, values)
    router, up = updates(OptimConfig(weight_decay=0.1), stage("router", 3.0), gradient, values)
    np.testing.assert_allclose(router, [-3 * RATE * 0.1 * 8], rtol=1e-5)
    np.testing.assert_allclose(up, [-RATE * 0.1 * 2], rtol=1e-5)
    router, up = updates(OptimConfig(weight_decay=0.1), stage("adapt", 3.0), gradient, values)
    assert router == 0 and up == pytest.approx(-RATE * 0.1 * 2)


def test_routers_learn_at_a_multiple_of_the_rate():
    gradient = params(router=[0.25], up=[0.25])
    for multiplier in (0.5, 25.0):
        router, up = updates(OptimConfig(**PLAIN), stage("router", multiplier), gradient)
        np.testing.assert_allclose(up, [-RATE * 0.2], rtol=1e-5)
        np.testing.assert_allclose(router, multiplier * up, rtol=1e-5)


def test_moments_by_hand():
    """Two steps of Adam on gradients 1 and 3, b1 = 1/2 and b2 = 3/4, with their bias corrected."""
    optimizer = optim.make(
        OptimConfig(b1=0.5, b2=0.75, eps=1e-8, clip_norm=0.0), stage("router").config, [(".*", 1.0)]
    )
    values = {"x": jnp.zeros(1)}
    state = optimizer.init(values)
    for gradient, mean, square in ((1.0, 1.0, 1.0), (3.0, 1.75 / 0.75, 2.4375 / 0.4375)):
        step, state = optimizer.update({"x": jnp.array([gradient])}, state, values)
        np.testing.assert_allclose(step["x"], [-RATE * mean / square**0.5], rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "a_third", "end"),
    [("cosine", 0.1 + 0.9 * 0.75, 0.1), ("linear", 1 - 0.9 / 3, 0.1), ("constant", 1.0, 1.0)],
)
def test_warmup_and_decay(schedule, a_third, end):
    """Ten steps up, of which the first moves already, then ninety down to a tenth of the peak."""
    config = StageConfig(
        steps=100, learning_rate=2.0, warmup_ratio=0.1, final_lr_ratio=0.1, schedule=schedule
    )
    rate = optim.schedule(config)
    found = [float(rate(step)) / 2.0 for step in (0, 4, 9, 10, 40, 100)]
    assert found == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1.0, a_third, end], rel=1e-5)


def test_a_parameter_without_an_optimizer_rule_is_an_error():
    _, params = tiny.model_and_params()
    with pytest.raises(UserError, match="embed/embedding"):
        optim.labels(params, [("layers/.*", 1.0)])


def _muon_steps(gradient_scale=1.0):
    """The gradient, and the first updates by Muon and by AdamW, of a model of two layers."""
    lte = tiny.LTE
    shapes = model_params.abstract(tiny.CONFIG, lte)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    gradient = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), shapes)
    first = gradient["layers"]["ffn"]["gate"].at[0].multiply(gradient_scale)
    gradient["layers"]["ffn"]["gate"] = first
    values = jax.tree.map(jnp.zeros_like, gradient)
    made = {}
    for name in ("muon", "adamw"):
        at = stage("router")
        optimizer = optim.make(OptimConfig(name=name, clip_norm=0.0), at.config, at.rules)
        made[name], _ = optimizer.update(gradient, optimizer.init(values), values)
    return gradient, made["muon"], made["adamw"]


@pytest.mark.parametrize(
    ("path", "inputs"),
    [("ffn/up", "D"), ("ffn/down", "EM"), ("attn/q/kernel", "D"), ("attn/o/kernel", "HC")],
)
def test_muon_moves_all_directions_of_a_matrix_alike(path, inputs):
    """Newton-Schulz brings singular values near 1, and keeps the singular vectors."""
    gradient, muon, _ = _muon_steps()
    letters = model_params.BY_PATH[f"layers/{path}"].letters[1:]
    order = sorted(range(len(letters)), key=lambda axis: letters[axis] not in inputs)
    rows = len([letter for letter in letters if letter in inputs])

    def matrix(tree):
        x = np.asarray(functools.reduce(lambda t, k: t[k], f"layers/{path}".split("/"), tree)[1])
        x = x.transpose(order)
        return x.reshape(int(np.prod(x.shape[:rows])), -1)

    got, u_s_v = matrix(muon), np.linalg.svd(matrix(gradient), full_matrices=False)
    size = RATE * 0.2 * np.sqrt(max(got.shape))
    turned = u_s_v[0].T @ -got @ u_s_v[2].T / size
    values, large = np.diag(turned), u_s_v[1] > 0.01 * np.linalg.norm(u_s_v[1])
    assert large.sum() > 3 and 0.6 < values[large].min() and values.max() < 1.3
    assert np.abs(turned - np.diag(values)).max() < 1e-3


def test_muon_moves_each_layer_by_itself_and_leaves_the_rest_to_adamw():
    _, muon, adamw = _muon_steps()
    _, scaled, _ = _muon_steps(gradient_scale=100.0)
    gate, gate_scaled = (tree["layers"]["ffn"]["gate"] for tree in (muon, scaled))
    np.testing.assert_allclose(gate_scaled, gate, atol=1e-4)  # whatever a layer's size
    for path in ("layers/ffn/router/kernel", "embed/embedding", "layers/ffn_norm/scale"):
        pick = functools.partial(functools.reduce, lambda t, k: t[k], path.split("/"))
        np.testing.assert_array_equal(pick(muon), pick(adamw))
    assert not np.allclose(muon["layers"]["ffn"]["gate"], adamw["layers"]["ffn"]["gate"], atol=0.1)
