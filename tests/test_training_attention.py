"""Attention of training on a CPU: kernels/cpu_attention.cc, and where it is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax import kernels, training_step
from lte_jax.config import ComputeConfig, ModelConfig, UserError
from lte_jax.kernels import cpu
from lte_jax.model import Transformer

pytestmark = pytest.mark.skipif(
    kernels.unavailable("cpu") is not None, reason=f"CPU kernels: {kernels.unavailable('cpu')}"
)
CONFIG = ModelConfig(
    vocab_size=40, d_model=64, d_ff=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    max_length=64,
)  # fmt: skip


def operands(b, length, heads, kv_heads, width, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(b, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.normal(size=shape) for shape in shapes]  # q, k, v and y's slope


def visible(b, length, causal, seed=0):
    """Of texts of some ten tokens that share rows."""
    segments = np.cumsum(np.random.default_rng(seed).random((b, length)) < 0.1, axis=1)
    seen = segments[:, :, None] == segments[:, None]
    return np.tril(seen) if causal else seen


def stated(q, k, v, dy, seen):
    """y and the slopes of q, k and v, by their definitions in float64."""
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("blhc,bthc->bhlt", q, k) / np.sqrt(q.shape[-1])
    e = np.where(seen[:, None], np.exp(scores), 0)
    p = e / e.sum(-1, keepdims=True)
    y = np.einsum("bhlt,bthc->blhc", p, v)
    dp = np.einsum("blhc,bthc->bhlt", dy, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    slopes = [np.einsum("bhlt,bthc->blhc", ds, k)]
    for left, right in ((ds, q), (p, dy)):
        slope = np.einsum("bhlt,blhc->bthc", left, right)
        slopes.append(slope.reshape(*slope.shape[:2], -1, group, slope.shape[-1]).sum(3))
    return y, *slopes


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(2, 64, 4, 4, 16), (1, 49, 4, 2, 32), (2, 130, 3, 1, 48), (1, 5, 2, 2, 80), (1, 1, 2, 1, 64)],
    ids=str,
)
def test_attention_and_its_slopes(shape, causal):
    q, k, v, dy = operands(*shape)
    seen = visible(*shape[:2], causal)
    small = [jnp.asarray(x, jnp.float32) for x in (q, k, v, dy)]
    y, pull = jax.vjp(lambda *x: cpu.attention(*x, jnp.asarray(seen), causal), *small[:3])
    expected = stated(q, k, v, dy, seen)
    for found, right in zip((y, *pull(small[3])), expected, strict=True):
        assert found.shape == right.shape
        np.testing.assert_allclose(found, right, atol=3e-6 * max(np.abs(right).max(), 1))


def test_scores_far_from_zero():
    """Differences of 1,000 between scores: their exponentials alone would not be numbers."""
    q, k, v, dy = operands(1, 20, 2, 2, 16)
    seen = visible(1, 20, True)
    q = 40 * q
    small = [jnp.asarray(x, jnp.float32) for x in (q, k, v, dy)]
    y, pull = jax.vjp(lambda *x: cpu.attention(*x, jnp.asarray(seen), True), *small[:3])
    for found, right in zip((y, *pull(small[3])), stated(q, k, v, dy, seen), strict=True):
        np.testing.assert_allclose(found, right, atol=2e-4 * max(np.abs(right).max(), 1))


def test_what_is_not_a_number_is_seen():
    """By the queries that see it, and by no others: training stops at it and says so."""
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in operands(1, 40, 2, 1, 16))
    seen = np.tril(np.ones((1, 40, 40), bool))
    y = cpu.attention(q, k.at[0, 20, 0, 3].set(jnp.nan), v, jnp.asarray(seen), True)
    assert np.isfinite(y[:, :20]).all() and np.isnan(y[:, 20:]).all()


def test_a_query_that_sees_nothing():
    q, k, v, dy = (jnp.asarray(x, jnp.float32) for x in operands(1, 40, 2, 1, 16))
    seen = jnp.asarray(np.tril(np.ones((1, 40, 40), bool))).at[0, 7].set(False)
    y, pull = jax.vjp(lambda *x: cpu.attention(*x, seen, True), q, k, v)
    assert not y[:, 7].any() and not pull(dy)[0][:, 7].any()
    assert all(np.isfinite(x).all() for x in (y, *pull(dy)))


def test_ten_runs_give_the_same_bits():
    q, k, v, dy = (jnp.asarray(x, jnp.float32) for x in operands(3, 100, 4, 2, 32))
    seen = jnp.asarray(visible(3, 100, True))
    run = jax.jit(lambda: jax.vjp(lambda *x: cpu.attention(*x, seen, True), q, k, v)[1](dy))
    first = run()
    for _ in range(9):
        assert all(np.array_equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("remat", [False, True])
def test_a_model_learns_the_same(remat):
    """Loss and gradients, with texts that share rows and padding, beside XLA's."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 50)))
    mask = jnp.asarray(np.repeat([[1] * 20 + [2] * 25 + [0] * 5], 2, axis=0))
    params = Transformer(CONFIG).init(jax.random.key(0), tokens)["params"]

    def gradients(attention):
        how = ComputeConfig(attention=attention, remat=remat, unroll=2 if attention == "cpu" else 1)
        model = training_step.trained_model(CONFIG, None, how, 1)
        assert model.attention == attention

        def loss(params):
            logits = model.apply({"params": params}, tokens, mask=mask).logits
            return jnp.mean(jnp.where(mask[..., None] > 0, logits, 0) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    (ours, slopes), (xlas, expected) = gradients("cpu"), gradients("xla")
    np.testing.assert_allclose(ours, xlas, rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for found, right in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-6 * scale)


def test_where_it_is_chosen():
    def chosen(config, devices, **how):
        how = ComputeConfig(**how)
        return training_step.trained_model(config, None, how, devices).attention

    narrow = dataclasses.replace(CONFIG, head_dim=12)
    assert chosen(CONFIG, 1) == "cpu"
    assert chosen(CONFIG, 1, attention="xla") == "xla"
    assert chosen(CONFIG, 8) == "xla"  # of a mesh
    assert chosen(CONFIG, None) == "xla"  # of a plan
    assert chosen(CONFIG, 1, dtype="bfloat16") == "xla"
    assert chosen(narrow, 1) == "xla"


@pytest.mark.parametrize(
    ("config", "devices", "dtype", "why"),
    [
        (CONFIG, 8, "float32", "the mesh has 8 devices, and it is for one"),
        (CONFIG, 1, "bfloat16", "type bfloat16: attention in training takes float32"),
        (dataclasses.replace(CONFIG, head_dim=12), 1, "float32", "heads 12 wide: no multiple of"),
    ],
)
def test_bad_input_what_it_cannot_compute(config, devices, dtype, why):
    how = ComputeConfig(attention="cpu", dtype=dtype)
    with pytest.raises(UserError, match=f'compute.attention="cpu" cannot run: {why}'):
        training_step.trained_model(config, None, how, devices)


def test_bad_input_one_of_another_width():
    q, k, v, _ = (jnp.zeros((1, 4, 2, 12)) for _ in range(4))
    with pytest.raises(cpu.Unsupported, match="12 wide"):
        cpu.attention(q, k, v, jnp.ones((1, 4, 4), bool), True)
