"""The losses against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax import losses

REAL = jnp.array([[True, True, False]])
# Two layers, three tokens (the last is padding), two experts.
SCORES = jnp.array(
    [[[[0.5, 1.0], [0.0, 0.25], [0.9, 0.9]]], [[[0.5, 0.0], [1.0, 1.0], [0.9, 0.9]]]]
)


def test_predicted_is_where_the_next_token_is_of_the_same_text():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]])
    assert losses.loss_mask(segments).astype(int).tolist() == [
        [1, 0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
    ]


def test_cross_entropy_by_hand():
    """The first and the third token expect what follows with 1/8 and 1/4; others do not count."""
    p_LV = [[0.5, 0.375, 0.125], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]
    logits = jnp.log(jnp.array([p_LV])) + 3.0  # of any sum
    tokens, predicted = jnp.array([[1, 2, 0, 1]]), jnp.array([[True, False, True, False]])
    found = losses.cross_entropy(logits, tokens, predicted, jnp.float32(4))
    assert float(found) == pytest.approx((math.log(8) + math.log(4)) / 4, rel=1e-6)


def test_distillation_is_kl_of_the_teacher_to_the_model():
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln(4/3) / 2 = 0.144; the other way round it is 0.131.

    A second token has ln(4), of which only unlikely words know; the third is padding.
    """
    model = jnp.log(jnp.array([[[0.75, 0.25, 1e-30], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]])) + 2.0
    teacher = jnp.log(jnp.array([[[0.5, 0.5, 1e-30], [1e-30, 1e-30, 1.0], [0.1, 0.1, 0.8]]])) - 1.0
    found = losses.distillation(model, teacher, REAL, jnp.float32(2))
    assert float(found) == pytest.approx((math.log(4 / 3) / 2 + math.log(4)) / 2, rel=1e-5)
    same = losses.distillation(model, model + 1.0, REAL, jnp.float32(2))
    assert float(same) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("power", "expected"), [(1, 4.25 / 8), (2, 3.5625 / 8)])
def test_efficiency_is_the_mean_of_scores_to_the_power(power, expected):
    """Real scores: 1/2, 1, 0, 1/4 and 1/2, 0, 1, 1."""
    found = losses.efficiency(SCORES, REAL, jnp.float32(2), power)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_separability_by_hand():
    """Distances from 1/4, squared, in sixteenths: 1, 9, 1, 0 and 1, 1, 9, 9; eps is a sixteenth."""
    found = losses.separability(SCORES, REAL, jnp.float32(2), 0.25, 1 / 16)
    expected = 16 * sum(1 / (square + 1) for square in (1, 9, 1, 0, 1, 1, 9, 9)) / 8
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_separability_pushes_scores_away_from_the_threshold():
    scores = jnp.array([[[[0.2, 0.4]]]])
    one = jnp.ones((1, 1), bool)
    loss = lambda s: losses.separability(s, one, jnp.float32(1), 0.3, 1e-2)  # noqa: E731
    [below, above] = np.sign(jax.grad(loss)(scores)).ravel()
    assert (below, above) == (1, -1)  # a step down the gradient: lower, and higher


@pytest.mark.parametrize("eps", [1e-2, 1e-4])
def test_scores_on_the_threshold_give_finite_loss_and_gradient(eps):
    """As printed (eps 0) Eq. 5 divides by zero here."""
    scores = jnp.full((1, 2, 3, 4), 0.5)
    real, count = jnp.ones((2, 3), bool), jnp.float32(6)
    value, slope = jax.value_and_grad(losses.separability)(scores, real, count, 0.5, eps)
    assert np.isfinite(value) and value == pytest.approx(1 / eps)
    assert np.all(np.isfinite(slope))
    printed = losses.separability(scores, real, count, 0.5, 0.0)
    assert np.isinf(printed)
