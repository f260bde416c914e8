"""MoEfication: equal experts, a pure permutation, the same on every machine, and good clusters."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_order

import lte_jax
from lte_jax import clustering, hf, moefication, router_init
from lte_jax.config import LTEConfig, ModelConfig, UserError
from lte_jax.model import Transformer

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TINY = ModelConfig(vocab_size=31, d_model=16, d_ff=48, num_layers=3, mlp_bias=True)

# Inertia of k-means-constrained 0.9.1 (numpy 2.4.6), made on 2026-11-21 by
#   python benchmarks/kmeans.py --package --expert-size M --tensor \
#       ../shared/models/MODEL/model.safetensors:model.layers.LAYER.mlp.gate_proj.weight
# which is KMeansConstrained(E, M, M, n_init=10, random_state=0) on the L2-normalised rows.
PACKAGE = {  # (model, layer, M): inertia
    ("babyllama", 0, 32): 325.0463,
    ("babyllama", 0, 8): 279.6971,
    ("babyllama", 2, 32): 321.2338,
    ("babyllama", 2, 8): 276.2347,
    ("stories260k", 0, 4): 98.8177,
    ("stories260k", 2, 4): 101.4532,
}


@functools.cache
def make(config: ModelConfig = TINY):
    """A dense model with random parameters."""
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    # Biases start at zero, which no wrong permutation would show.
    noisy = jax.tree.map(lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32), params)
    return model, noisy


@functools.partial(jax.jit, static_argnames="model")
def logits(model, params, tokens):
    """Of a dense model."""
    return model.apply({"params": params}, tokens).logits


@functools.partial(jax.jit, static_argnames="model")
def all_on(model, params, tokens):
    """Logits of an expert model under hard routing, and whether all its experts ran."""
    n, e, _, d = params["layers"]["ffn"]["up"].shape
    router = {"kernel": jnp.zeros((n, d, e)), "bias": jnp.zeros((n, e))}
    ffn = params["layers"]["ffn"] | {"router": router}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    out = model.apply({"params": params}, tokens, routing="hard", threshold=0.25)
    return out.logits, jnp.all(out.active)


def kmeans(size: int = 8, **settings) -> LTEConfig:
    return LTEConfig(expert_size=size, grouping="kmeans", **settings)


def relative_error(a, b) -> float:
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


@pytest.mark.parametrize("name, layer, size", PACKAGE)
def test_inertia_of_real_layers(shared, name, layer, size):
    """Within 1% of the package (in fact below it), and far from a random grouping."""
    gate_FD = real_gate(shared, name, layer)
    x_FD = clustering.normalize(gate_FD)
    lte = kmeans(size)
    order_EM = moefication.group_neurons(gate_FD, lte)
    assert_order(order_EM, len(gate_FD), size)
    found = clustering.inertia(x_FD, order_EM)
    assert found <= 1.01 * PACKAGE[name, layer, size]
    random_EM = moefication.group_neurons(gate_FD, dataclasses.replace(lte, grouping="random"))
    assert found < 0.95 * clustering.inertia(x_FD, random_EM)


def real_gate(shared: pathlib.Path, name: str, layer: int) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(shared / "models" / name / "model.safetensors", "numpy") as file:
        return file.get_tensor(f"model.layers.{layer}.mlp.gate_proj.weight")


@pytest.mark.parametrize("grouping", ["kmeans", "random"])
def test_seed_and_layer_decide(grouping):
    x_FD = np.random.default_rng(0).standard_normal((96, 16)).astype(np.float32)

    def group(layer=0, **kwargs):
        lte = LTEConfig(expert_size=8, grouping=grouping)
        return moefication.group_neurons(x_FD, lte, layer, **kwargs)

    np.testing.assert_array_equal(group(), group())
    assert not np.array_equal(group(), group(seed=1))
    if grouping == "random":
        assert not np.array_equal(group(), group(layer=1))


def test_bfloat16_weights_are_taken_as_they_are():
    x_FD = np.random.default_rng(0).standard_normal((96, 16)).astype(jnp.bfloat16)
    lte = kmeans()
    np.testing.assert_array_equal(
        moefication.group_neurons(x_FD, lte),
        moefication.group_neurons(x_FD.astype(np.float32), lte),
    )


# ------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    "grouping, gated",
    [("kmeans", True), ("coactivation", True), ("random", True), ("kmeans", False)],
)
def test_all_experts_on_is_the_dense_model(grouping, gated):
    config = dataclasses.replace(TINY, gated=gated)
    model, params = make(config)
    tokens = jax.random.randint(jax.random.key(7), (2, 20), 0, config.vocab_size)
    lte = LTEConfig(expert_size=8, grouping=grouping)
    experts, new, order_NEM = moefication.to_experts(model, params, lte, np.asarray(tokens))
    assert experts.lte == lte
    for order_EM in order_NEM:
        assert_order(order_EM, config.d_ff, 8)
    found, all_ran = all_on(experts, new, tokens)
    assert all_ran
    assert relative_error(found, logits(model, params, tokens)) < 1e-5


def test_all_experts_on_is_the_dense_model_on_real_weights(shared):
    folder = shared / "models" / "babyllama"
    config, _ = hf.read_config(folder)
    model, params = Transformer(config), hf.load_params(folder, config, None)
    tokens = jax.random.randint(jax.random.key(0), (2, 128), 0, config.vocab_size)
    dense = logits(model, params, tokens)
    for size in (8, 32):
        experts, new, _ = moefication.to_experts(model, params, kmeans(size))
        found, all_ran = all_on(experts, new, tokens)
        assert all_ran
        assert relative_error(found, dense) < 1e-5


def test_permutation_moves_neurons_and_nothing_else():
    model, params = make()
    before = jax.tree.map(np.array, params)
    _, new, order_NEM = moefication.to_experts(model, params, kmeans())
    for n, order_EM in enumerate(order_NEM):
        for name in moefication.NEURON_MATRICES:
            expected = before["layers"]["ffn"][name][n, 0][order_EM]
            np.testing.assert_array_equal(new["layers"]["ffn"][name][n], expected)
    jax.tree.map(np.testing.assert_array_equal, params, before)  # the input is left alone
    for part in ("attn", "attn_norm", "ffn_norm"):
        jax.tree.map(np.testing.assert_array_equal, new["layers"][part], before["layers"][part])
    down_bias = new["layers"]["ffn"]["down_bias"]
    np.testing.assert_array_equal(down_bias, before["layers"]["ffn"]["down_bias"])


def test_to_dense_undoes_to_experts_to_the_bit():
    model, params = make()
    experts, new, order_NEM = moefication.to_experts(model, params, kmeans())
    new["layers"]["ffn"]["router"] = {"kernel": jnp.zeros((3, 16, 6))}
    back, old = moefication.to_dense(experts, new, order_NEM)
    assert back == model
    assert jax.tree.structure(old) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, old, params)


# ------------------------------------------------------------------------------------ co-activation


def test_coactivation_is_the_covariance_of_magnitudes(monkeypatch):
    """Against the definition, token by token; padding counts for nothing; any number of passes."""
    model, params = make()
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 12)).astype(np.int32)
    mask = np.arange(12)[None] < np.array([[12], [7], [1]])
    forward = functools.partial(model.apply, mutable=["intermediates"])
    _, state = jax.jit(forward)({"params": params}, tokens, mask=mask)
    h_NBLF = np.asarray(state["intermediates"]["layers"]["ffn"]["hidden"][0])[..., 0, :]
    found = list(moefication.coactivations(model, params, tokens, mask))
    assert len(found) == TINY.num_layers
    for covariance_FF, h_BLF in zip(found, h_NBLF, strict=True):
        expected_FF = np.cov(np.abs(h_BLF[mask]), rowvar=False, bias=True)
        np.testing.assert_allclose(covariance_FF, expected_FF, atol=1e-5)
    padded = np.where(mask, tokens, 5)
    monkeypatch.setattr(router_init, "PASS_BYTES", 1)  # one layer a pass
    again = list(moefication.coactivations(model, params, padded, mask))
    np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-7)


def test_coactivation_brings_together_what_fires_together():
    """Neurons that fire in planted groups, whatever their sign and whatever their weights."""
    rng = np.random.default_rng(0)
    group_F = rng.permutation(np.repeat(np.arange(6), 8))
    fires_TG = rng.random((400, 6)) < 0.2
    h_TF = fires_TG[:, group_F] * rng.standard_normal((400, 48))
    covariance_FF = np.cov(np.abs(h_TF), rowvar=False).astype(np.float32)
    lte = LTEConfig(expert_size=8, grouping="coactivation")
    unrelated_FD = rng.standard_normal((48, 16)).astype(np.float32)
    order_EM = moefication.group_neurons(unrelated_FD, lte, 0, covariance_FF)
    assert (group_F[order_EM] == group_F[order_EM[:, :1]]).all()


@pytest.mark.parametrize("size", [0, 5, 50, 500])
def test_a_massive_neuron_disturbs_no_grouping(size):
    """Neuron 0 fires on 1% of the tokens, so strongly that its variance is most of all variance."""
    rng = np.random.default_rng(0)
    planted_F = rng.permutation(np.repeat(np.arange(32), 32))
    fires_TG = rng.random((2000, 32)) < 0.1
    h_TF = np.abs(fires_TG[:, planted_F] + rng.standard_normal((2000, 1024)))
    h_TF[:, 0] = size * (rng.random(2000) < 0.01) if size else h_TF[:, 0]
    covariance_FF = np.cov(h_TF, rowvar=False).astype(np.float32)
    lte = LTEConfig(expert_size=32, grouping="coactivation")
    order_EM = moefication.group_neurons(np.zeros((1024, 1), np.float32), lte, 0, covariance_FF)
    together = [np.bincount(planted_F[expert_M[expert_M > 0]]).max() for expert_M in order_EM]
    assert sum(together) / 1023 >= 0.95


def test_calibration_rows_are_a_choice_of_the_seed():
    model, params = make()
    tokens = np.random.default_rng(0).integers(0, 31, (24, 9))

    def order(**settings):
        _, new = lte_jax.moefy(model, params, tokens, expert_size=8, **settings)
        return np.asarray(new["layers"]["ffn"]["up"])

    np.testing.assert_array_equal(order(calibration_records=8), order(calibration_records=8))
    np.testing.assert_array_equal(order(calibration_records=24), order())
    assert not np.array_equal(order(calibration_records=8), order())
    assert not np.array_equal(order(calibration_records=8, seed=1), order(calibration_records=8))


# ---------------------------------------------------------------------------------------- bad input


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("size", [5, 7, 32, 47, 49, 1000])
def test_bad_input_expert_size_names_divisors_near_it(size):
    model, params = make()
    with pytest.raises(UserError) as error:
        moefication.to_experts(model, params, kmeans(size))
    message = one_line(error)
    assert f"expert_size={size}" in message and "48" in message
    near = {5: "4, 6", 7: "6, 8", 32: "24", 47: "48", 49: "48", 1000: "48"}[size]
    assert near in message.partition("sizes that do")[2]


def test_bad_input_neurons_that_do_not_divide():
    with pytest.raises(UserError, match="expert_size=32 does not divide F=48"):
        moefication.group_neurons(np.ones((48, 3), np.float32), kmeans(32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_input_weights_that_are_not_finite_name_the_layer(value):
    model, params = make()
    ffn = params["layers"]["ffn"]
    ffn = ffn | {"gate": ffn["gate"].at[1, 0, 3, 4].set(value)}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    with pytest.raises(UserError, match="layer 1 has values that are not finite") as error:
        moefication.to_experts(model, params, kmeans())
    one_line(error)


@pytest.mark.parametrize(
    "calibration", [None, np.zeros(9, np.int32), np.zeros((0, 9), np.int32)], ids=["no", "1d", "0"]
)
def test_bad_input_coactivation_without_tokens(calibration):
    model, params = make()
    lte = LTEConfig(expert_size=8, grouping="coactivation")
    with pytest.raises(UserError, match="calibration has shape .* expected token ids") as error:
        moefication.to_experts(model, params, lte, calibration)
    one_line(error)


def test_bad_input_coactivation_of_padding_alone():
    model, params = make()
    lte = LTEConfig(expert_size=8, grouping="coactivation")
    tokens = np.zeros((2, 9), np.int32)
    with pytest.raises(UserError, match="all calibration tokens are padding"):
        moefication.to_experts(model, params, lte, tokens, np.zeros((2, 9), bool))


def test_bad_input_expert_model_where_a_dense_one_is_wanted():
    model, params = make()
    experts, new, _ = moefication.to_experts(model, params, kmeans())
    with pytest.raises(UserError, match="expected a dense model"):
        moefication.to_experts(experts, new, kmeans())


def test_bad_input_order_of_other_neurons():
    _, params = make()
    order_NEM = np.broadcast_to(np.arange(48).reshape(6, 8), (3, 6, 8)).copy()
    moefication.permute(params, order_NEM)
    twice = order_NEM.copy()
    twice[2, 5, 7] = 0
    for bad in (order_NEM[:2], order_NEM[:, :5], order_NEM + 1, twice):
        with pytest.raises(UserError, match="a permutation of its 48 neurons") as error:
            moefication.permute(params, bad)
        one_line(error)
