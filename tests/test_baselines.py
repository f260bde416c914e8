"""Each method of others against a statement of its rule in a few lines of NumPy."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.optimize import linear_sum_assignment

import lte_jax
from lte_jax import baselines, moefication
from lte_jax.baselines import cmoe, d2dmoe, deja_vu, predictor, static, wanda
from lte_jax.baselines import moefication as moefied
from lte_jax.config import LTEConfig, ModelConfig, StageConfig, StagesConfig, num_experts
from lte_jax.errors import UserError
from lte_jax.selection import Largest, View
from lte_jax.sparsity import flops_per_token

T, D, F, E, M = 7, 16, 24, 6, 4
CONFIG = ModelConfig(
    vocab_size=64, d_model=D, d_ff=F, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
)


def silu(x):
    return x / 2 * (1 + np.tanh(x / 2))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def top(x, count):
    """True at the largest of each row; random numbers have no ties."""
    return x >= np.sort(x, axis=-1)[..., -count][..., None]


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(T, D)).astype(np.float32)
    weights = {
        name: rng.normal(size=(E, M, D)).astype(np.float32) for name in ("gate", "up", "down")
    }
    gate_TEM = silu(np.einsum("TD,EMD->TEM", x_TD, weights["gate"]))
    h_TEM = gate_TEM * np.einsum("TD,EMD->TEM", x_TD, weights["up"])
    return baselines.Layer(x_TD, gate_TEM, h_TEM, weights, CONFIG, 0)


@pytest.fixture
def neurons(layer):
    """The same, with experts of one neuron."""
    flat = lambda a: a.reshape(T, F, 1)  # noqa: E731
    weights = {name: w.reshape(F, 1, D) for name, w in layer.weights.items()}
    return layer._replace(gate_TEM=flat(layer.gate_TEM), h_TEM=flat(layer.h_TEM), weights=weights)


def view(layer, logits=None, router=None, key=None):
    weights = layer.weights | {"router": router or {}}
    return View(
        jnp.asarray(layer.x_TD),
        lambda: jnp.asarray(logits),
        weights,
        jnp.asarray(layer.h_TEM),
        jnp.asarray(layer.gate_TEM),
        key=lambda: key,
    )


def routing(name, target=0.75, **settings):
    lte = LTEConfig(target_sparsity=target, **settings)
    return baselines.ROUTINGS[name].of(CONFIG, lte), lte


def active(how, seen):
    return np.asarray(how.choose(seen, 0.5).active)


def test_the_oracle_keeps_the_largest_neurons(neurons):
    how, _ = routing("oracle_neurons", expert_size=1)
    expected = top(np.abs(neurons.h_TEM[..., 0]), 6)
    np.testing.assert_array_equal(active(how, view(neurons)), expected)


def test_the_oracle_keeps_the_experts_that_add_most(layer):
    how, _ = routing("oracle_experts", 2 / 3, expert_size=M)
    added_TED = np.einsum("TEM,EMD->TED", layer.h_TEM, layer.weights["down"])
    expected = top(np.linalg.norm(added_TED, axis=-1), 2)
    np.testing.assert_array_equal(active(how, view(layer)), expected)


@pytest.mark.parametrize("target", [0.5, 0.75, 0.9, 0.95])
def test_a_number_of_experts_that_is_not_whole_is_one_on_average(target):
    config = dataclasses.replace(CONFIG, d_ff=11 * M)
    how = Largest.of(config, LTEConfig(target_sparsity=target, expert_size=M))
    rng = np.random.default_rng(0)
    shared = np.concatenate([np.full((4000, 1), 1e6), rng.random((4000, 10))], axis=1)
    large = 1e4 * rng.random((4000, 11))
    for scores in (rng.random((4000, 11)), rng.dirichlet(np.ones(11), 4000), large, shared):
        if scores is shared and target > 0.8:
            continue  # what is shared alone runs; CMoE has no shared expert there
        scores = scores.astype(np.float32)
        kept = np.asarray(how.active(jnp.asarray(scores), 0.5))
        number, wanted = kept.sum(axis=1), max(1.0, (1 - target) * 11)
        assert set(number) == {math.floor(wanted), math.ceil(wanted)}
        assert number.mean() == pytest.approx(wanted, abs=0.03)
        for row, mask, count in zip(scores[:50], kept, number, strict=False):
            np.testing.assert_array_equal(mask, top(row, count))


def test_static_removal_keeps_the_experts_that_add_most_on_average(layer):
    router = static.start(LTEConfig(target_sparsity=0.5, expert_size=M), layer, None)
    added_TED = np.einsum("TEM,EMD->TED", layer.h_TEM, layer.weights["down"])
    mean_E = np.linalg.norm(added_TED, axis=-1).mean(axis=0)
    np.testing.assert_array_equal(np.asarray(router["bias"]) > 0, top(mean_E, 3))
    lte = LTEConfig(target_sparsity=0.75, expert_size=M)  # 1.5 of 6 experts stay
    routers = [static.start(lte, layer._replace(index=n), None) for n in range(4)]
    assert sorted(int(np.sum(r["bias"] > 0)) for r in routers) == [1, 1, 2, 2]


def test_moefication_keeps_the_experts_of_largest_positive_activations(layer):
    how, _ = routing("activations", 2 / 3, expert_size=M)
    expected = top(np.maximum(layer.gate_TEM, 0).sum(axis=-1), 2)
    np.testing.assert_array_equal(active(how, view(layer)), expected)


def test_similarity_ranks_experts_by_the_distance_to_their_centers(layer):
    how, lte = routing("top_k_unit", 2 / 3, expert_size=M)
    router = moefied.similar(lte, layer, None)
    center_ED = unit(layer.weights["gate"]).mean(axis=1)
    distance_TE = np.linalg.norm(unit(layer.x_TD)[:, None] - center_ED[None], axis=-1)
    read = how.router_input(jnp.asarray(layer.x_TD))
    np.testing.assert_allclose(read, unit(layer.x_TD), rtol=1e-5)
    logits = np.asarray(read) @ np.asarray(router["kernel"]) + np.asarray(router["bias"])
    np.testing.assert_array_equal(active(how, view(layer, logits)), top(-distance_TE, 2))


def test_the_trained_selection_starts_at_the_centers_and_learns(layer, monkeypatch):
    many = np.random.default_rng(1).normal(size=(4000, D)).astype(np.float32)
    layer.weights["gate"][:2] *= 5  # larger than the others, which centers do not tell
    gate = silu(np.einsum("TD,EMD->TEM", many, layer.weights["gate"]))
    layer = layer._replace(x_TD=many, gate_TEM=gate, h_TEM=gate)
    lte = LTEConfig(expert_size=M, router="two_layer", router_bias=False)

    def loss(router):
        hidden = np.tanh(unit(many) @ router["inner"]["kernel"])
        logit_TE = hidden @ router["outer"]["kernel"]
        score_TE = np.maximum(gate, 0).sum(axis=-1)
        chosen = np.take_along_axis(score_TE, np.argsort(-logit_TE, axis=1)[:, :2], axis=1)
        return 1 - chosen.sum() / np.sort(score_TE, axis=1)[:, -2:].sum()  # share that is missed

    trained = moefied.trained(lte, layer, jax.random.key(0))
    monkeypatch.setattr(moefied, "_RATE", 0.0)
    begun = moefied.trained(lte, layer, jax.random.key(0))
    np.testing.assert_allclose(
        begun["inner"]["kernel"].T, unit(layer.weights["gate"]).mean(axis=1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(begun["outer"]["kernel"], np.eye(E))
    assert loss(trained) < 0.8 * loss(begun)


def test_deja_vu_labels_the_largest_neurons_and_weighs_positives(neurons):
    h_TF = neurons.h_TEM[..., 0]
    label_TF = np.asarray(deja_vu.labels(LTEConfig(target_sparsity=0.75), jnp.asarray(h_TF)))
    np.testing.assert_array_equal(label_TF, top(np.abs(h_TF), 6))
    logit_TF = np.random.default_rng(2).normal(size=(T, F))
    probability = 1 / (1 + np.exp(-logit_TF))
    weight = label_TF.mean() + 0.005
    each = -np.where(label_TF > 0, np.log(probability), weight * np.log(1 - probability))
    found = deja_vu.loss(jnp.asarray(logit_TF), jnp.asarray(label_TF))
    assert float(found) == pytest.approx(each.mean(), rel=1e-4)


def test_a_predictor_learns_what_it_can_and_keeps_its_best():
    rng = np.random.default_rng(3)
    x_TD = rng.normal(size=(400, D)).astype(np.float32)
    label_TF = (x_TD @ rng.normal(size=(D, F)) > 0).astype(np.float32)
    begin = predictor.Weights.random(jax.random.key(0), (D, D, F), bias=False)
    how = predictor.Training(40, 50, predictor.adam(1e-2), 0.1)
    found = predictor.fit(begin, x_TD, label_TF, deja_vu.loss, lambda x: x, how, jax.random.key(1))
    right = np.mean((np.asarray(x_TD @ found.inner @ found.outer) > 0) == label_TF)
    assert right > 0.95
    worse = predictor.Training(5, 50, predictor.adam(-1e-2), 0.1)  # each step makes it worse
    kept = predictor.fit(found, x_TD, label_TF, deja_vu.loss, lambda x: x, worse, jax.random.key(1))
    np.testing.assert_array_equal(kept.outer, found.outer)


def test_d2dmoe_runs_what_is_near_the_tokens_largest(layer):
    how, _ = routing("dynamic_k", 2 / 3, expert_size=M)
    norm_TE = np.random.default_rng(4).normal(size=(T, E)).astype(np.float32)
    kept = np.abs(norm_TE) > 0.3 * np.abs(norm_TE).max(axis=1, keepdims=True)
    found = how.choose(view(layer, norm_TE), 0.3)
    np.testing.assert_array_equal(found.active, kept)
    assert len(set(kept.sum(axis=1))) > 1, "the number varies"
    target_TE = np.random.default_rng(5).random((T, E))
    loss = d2dmoe.loss(jnp.asarray(norm_TE), jnp.asarray(target_TE))
    assert float(loss) == pytest.approx(np.mean((np.abs(norm_TE) - target_TE) ** 2), rel=1e-5)


def test_softmax_over_the_chosen_times_their_number(layer):
    how, _ = routing("softmax", 2 / 3, expert_size=M)
    logit_TE = np.random.default_rng(6).normal(size=(T, E)).astype(np.float32)
    kept = top(logit_TE, 2)
    power = np.exp(logit_TE) * kept
    found = how.choose(view(layer, logit_TE), 0.5)
    np.testing.assert_array_equal(found.active, kept)
    np.testing.assert_allclose(found.gates, 2 * power / power.sum(axis=1, keepdims=True), rtol=1e-5)
    noisy = [
        how.choose(view(layer, logit_TE, key=jax.random.key(seed)), 0.5).scores for seed in (0, 1)
    ]
    assert not np.allclose(*noisy), "training adds noise"


def test_sigma_moe_counts_experts_by_their_scores(layer):
    how, _ = routing("sigma", 2 / 3, expert_size=M)
    logit_TE = np.random.default_rng(7).normal(size=(T, E)).astype(np.float32)
    found = how.choose(view(layer, logit_TE), 0.5)
    expected = top(logit_TE, 2) * 2 / (1 + np.exp(-logit_TE))
    np.testing.assert_allclose(found.gates, expected, rtol=1e-5)


@pytest.mark.parametrize("target", [0.3, 0.75])  # at 0.3 large negative gates stay, too
def test_cats_cuts_the_gate_at_its_quantile(neurons, target):
    how, lte = routing("cats", target, expert_size=1)
    router = baselines.STARTS["quantile"](lte, neurons, None)
    gate_TF = np.abs(neurons.gate_TEM[..., 0])
    expected = gate_TF > np.quantile(gate_TF, target)
    np.testing.assert_array_equal(active(how, view(neurons, router=router)), expected)
    read = how.ffn_weights(CONFIG, 0.75)
    assert read == D * F * (1 + 2 * 0.25), "the gate is always read"


def test_teal_cuts_both_inputs_at_their_quantiles(neurons):
    how, lte = routing("teal", expert_size=1)
    router = baselines.STARTS["quantiles"](lte, neurons, None)
    seen = view(neurons, router=router)
    x_TD, h_TF = np.abs(neurons.x_TD), np.abs(neurons.h_TEM[..., 0])
    kept_TD, kept_TF = x_TD > np.quantile(x_TD, 0.75), h_TF > np.quantile(h_TF, 0.75)
    for matrix in ("gate", "up"):
        np.testing.assert_array_equal(how.inputs(seen, matrix), np.where(kept_TD, neurons.x_TD, 0))
    found = how.choose(seen, 0.5)
    np.testing.assert_array_equal(found.gates, kept_TF)
    shares = np.stack([kept_TD.mean(axis=1), kept_TD.mean(axis=1), kept_TF.mean(axis=1)], axis=1)
    np.testing.assert_allclose(found.active, shares, rtol=1e-6)


def test_wina_weighs_inputs_by_the_columns_they_meet(neurons):
    how, _ = routing("wina", expert_size=1)
    seen = view(neurons)
    for matrix in ("gate", "up"):
        column_D = np.linalg.norm(neurons.weights[matrix][:, 0], axis=0)
        expected = np.where(top(np.abs(neurons.x_TD) * column_D, 4), neurons.x_TD, 0)
        np.testing.assert_array_equal(how.inputs(seen, matrix), expected)
    row_F = np.linalg.norm(neurons.weights["down"][:, 0], axis=1)
    expected = top(np.abs(neurons.h_TEM[..., 0]) * row_F, 6)
    np.testing.assert_array_equal(how.choose(seen, 0.5).gates, expected)


def test_cmoe_groups_by_marks_and_asks_a_neuron_of_each_expert(layer, monkeypatch):
    monkeypatch.setattr(cmoe, "MARKED", 5)
    lte = LTEConfig(target_sparsity=0.3, expert_size=M, grouping="cmoe", router="glu")
    dense = layer._replace(
        weights={name: w.reshape(1, F, D) for name, w in layer.weights.items()},
        h_TEM=layer.h_TEM.reshape(T, 1, F),
    )
    x, gate, up = unit(layer.x_TD), *(unit(layer.weights[n].reshape(F, D)) for n in ("gate", "up"))
    mark_TF = top(np.abs(silu(x @ gate.T) * (x @ up.T)), 5).astype(int)
    np.testing.assert_array_equal(cmoe.marks(dense), mark_TF)
    order_EM = cmoe.group(lte, dense)
    assert sorted(order_EM.ravel()) == list(range(F))
    shared = order_EM[:2].ravel()  # 4 of 6 experts run, two of them always
    busy = mark_TF.sum(axis=0)
    assert busy[shared].min() >= np.delete(busy, shared).max()
    rest = np.sort(order_EM[2:].ravel())
    centers = np.argsort(-busy, kind="stable")[8:12]
    distance = np.abs(mark_TF[:, rest][:, :, None] - mark_TF[:, centers][:, None]).sum(axis=0)
    cost = np.repeat(distance, M, axis=1)
    best = cost[linear_sum_assignment(cost)].sum()
    place = {neuron: e for e, members in enumerate(order_EM[2:]) for neuron in members}
    assert sum(distance[i, place[neuron]] for i, neuron in enumerate(rest)) == best

    grouped = layer._replace(
        weights={name: w.reshape(F, D)[order_EM] for name, w in layer.weights.items()}
    )
    router = cmoe.start(lte, grouped, None)
    np.testing.assert_array_equal(router["bias"] > 0, [True, True] + [False] * 4)
    mark_TEM = mark_TF[:, order_EM]
    apart_EM = np.abs(mark_TEM - mark_TEM.mean(axis=2, keepdims=True)).sum(axis=0)
    chosen = unit(grouped.weights["up"])[np.arange(E), apart_EM.argmin(axis=1)]
    np.testing.assert_allclose(router["up"]["kernel"].T, chosen, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [None, (2, 4), (4, 8)])
def test_wanda_removes_small_weights_times_input_norms(layer, group):
    lte = LTEConfig(target_sparsity=0.5, expert_size=F)
    pruned = wanda.pruner(group)(lte, layer)
    norms = {"gate": layer.x_TD, "up": layer.x_TD, "down": layer.h_TEM.reshape(T, F)}
    for name, inputs in norms.items():
        w = layer.weights[name].reshape(F, D)
        w_OI = w.T if name == "down" else w
        score = np.abs(w_OI) * np.sqrt((inputs**2).sum(axis=0))
        for o, row in enumerate(score):
            size = row.size if group is None else group[1]
            for first in range(0, row.size, size):
                part = row[first : first + size]
                expected = part >= np.sort(part)[size // 2]
                found = pruned[name].reshape(F, D)
                found = (found.T if name == "down" else found)[o, first : first + size]
                np.testing.assert_array_equal(found, w_OI[o, first : first + size] * expected)


@functools.cache
def moefied_model(name):
    settings = {
        key.removeprefix("lte."): value
        for key, value in baselines.METHODS[name].settings.items()
        if key.startswith("lte.")
    }
    settings = {"expert_size": 8} | settings | {"target_sparsity": 0.5}
    if "router_rank" in settings:
        settings["router_rank"] = 6
    dense, params = tiny.model_and_params(None)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 32)).astype(np.int32)
    return *lte_jax.moefy(dense, params, tokens, **settings), tokens


# One for each kind of router, and for what a routing may do besides choosing experts.
KINDS = ("static", "deja_vu", "softmax", "cmoe", "teal", "wanda", "oracle_experts")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_method_is_prepared_runs_and_is_stored(name, tmp_path):
    model, params, tokens = moefied_model(name)
    out = jax.jit(model.apply)({"params": params}, tokens)
    assert np.isfinite(out.logits).all()
    assert float(out.sparsity) == pytest.approx(0.5, abs=0.03)
    lte_jax.save(tmp_path / "model", model, params)
    again, stored = lte_jax.load(tmp_path / "model")
    assert again.lte == model.lte
    jax.tree.map(np.testing.assert_array_equal, stored, params)


def test_selecting_is_paid_for():
    config = tiny.CONFIG
    ffn, attention = 3 * 32 * 64, 2 * 32 * 8 * 6
    for name, ffn_read, router in (
        ("static", 0.5 * ffn, 0),
        ("oracle_neurons", ffn, 0),
        ("cats", ffn * 2 / 3, 0),
        ("deja_vu", 0.5 * ffn, 6 * (32 + 64)),
        ("cmoe", 0.5 * ffn, 2 * 32 * 8),
        ("random", 0.5 * ffn, 32 * 8),
    ):
        settings = {k.removeprefix("lte."): v for k, v in baselines.METHODS[name].settings.items()}
        settings = {"expert_size": 8} | settings
        if "router_rank" in settings:
            settings["router_rank"] = 6
        lte = LTEConfig(**settings)
        expected = 2 * config.num_layers * (attention + ffn_read + router)
        assert flops_per_token(config, lte, 0.5) == pytest.approx(expected), name


def test_a_low_rank_router_is_the_nearest_of_that_rank():
    lte = LTEConfig(expert_size=8, router="two_layer", router_rank=3, router_init="ridge")
    dense, params = tiny.model_and_params(None)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 32)).astype(np.int32)
    model, grouped, _ = moefication.to_experts(dense, params, lte, tokens)
    full = model.clone(lte=dataclasses.replace(lte, router="linear"))
    linear = moefication.add_routers(full, grouped, tokens)["layers"]["ffn"]["router"]
    low = moefication.add_routers(model, grouped, tokens)["layers"]["ffn"]["router"]
    product = np.asarray(low["inner"]["kernel"] @ low["outer"]["kernel"])
    for layer, found in enumerate(product):
        u, s, v = np.linalg.svd(np.asarray(linear["kernel"][layer]), full_matrices=False)
        np.testing.assert_allclose(found, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)
    np.testing.assert_array_equal(low["outer"]["bias"], linear["bias"])


def test_bad_input_start_and_router_that_do_not_go_together():
    dense, params = tiny.model_and_params(None)
    tokens = np.zeros((2, 8), np.int32)
    settings = {"expert_size": 8, "router": "constant", "router_init": "ridge"}
    with pytest.raises(
        UserError, match="router_init='ridge' makes .*kernel.*lte.router='constant'"
    ):
        lte_jax.moefy(dense, params, tokens, **settings)


def test_every_name_of_a_method_is_one_of_the_config():
    for method in baselines.METHODS.values():
        lte = {k.removeprefix("lte."): v for k, v in method.settings.items() if k[:4] == "lte."}
        assert num_experts(tiny.CONFIG, LTEConfig(**{"expert_size": 8} | lte)) in (8, 64)


@pytest.mark.slow
def test_a_pruned_model_learns_from_the_one_that_is_not(tmp_path):
    lte = LTEConfig(expert_size=8, calibration_records=4, router="none", router_init="wanda")
    lte = dataclasses.replace(lte, routing="pruned")
    none = StageConfig(steps=0)
    two = StageConfig(steps=2, learning_rate=1e-3)
    stages = StagesConfig(two, none, two)
    _, params = lte_jax.train(
        tiny.experiment(tmp_path / "data", lte=lte, stages=stages), tmp_path / "run"
    )
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    adapt = [line for line in map(json.loads, lines) if line["stage"] == "adapt"]
    assert adapt[0]["distill"] > 1e-5, "from itself it learns nothing"
    for name in ("gate", "up", "down"):
        zeros = np.mean(np.asarray(params["layers"]["ffn"][name]) == 0)
        assert zeros == pytest.approx(0.5, abs=0.02)
