"""Refitting the down projections: against least squares by NumPy, and what it is for."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import baselines, hf, refit, router_init, trainer
from lte_jax.errors import UserError

TOKENS = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (12, 24))
SETTINGS = {"expert_size": 8, "grouping": "random", "target_sparsity": 0.5}


def made(**settings):
    """The dense model, its parameters, and those with experts."""
    dense, params = tiny.model_and_params(None)
    return dense, params, *lte_jax.moefy(dense, params, TOKENS, **SETTINGS | settings)


def seen(dense, params, model, sparse):
    """Of each layer, as the dense model runs: activations [T, E, M] and the experts that run."""
    _, sown = dense.apply({"params": params}, TOKENS, routing="dense", mutable="intermediates")
    ffn = sown["intermediates"]["layers"]["ffn"]
    router = jax.tree.map(lambda x: np.asarray(x, np.float64), sparse["layers"]["ffn"]["router"])
    for layer in range(tiny.CONFIG.num_layers):
        x_TD = np.asarray(ffn["ffn_input"][0][layer], np.float64).reshape(-1, tiny.CONFIG.d_model)
        weights = {k: np.asarray(w[layer], np.float64) for k, w in sparse["layers"]["ffn"].items()
                   if k != "router"}  # fmt: skip
        gate_TEM, up_TEM = (
            np.einsum("td,emd->tem", x_TD, weights[name]) for name in ("gate", "up")
        )
        h_TEM = gate_TEM / (1 + np.exp(-gate_TEM)) * up_TEM
        runs_TE = x_TD @ router["kernel"][layer] + router["bias"][layer] > 0
        yield h_TEM, runs_TE


def test_it_is_least_squares():
    """With the penalty as F more rows of the system."""
    plain, fitted = made(), made(refit=True)
    for layer, (h_TEM, runs_TE) in enumerate(seen(*plain)):
        down_FD, got_FD = (
            np.asarray(sparse["layers"]["ffn"]["down"][layer], np.float64).reshape(64, -1)
            for sparse in (plain[3], fitted[3])
        )
        left_TF = (h_TEM * runs_TE[..., None]).reshape(len(h_TEM), -1)
        missing_TD = (h_TEM * ~runs_TE[..., None]).reshape(len(h_TEM), -1) @ down_FD
        root = np.sqrt(refit.PENALTY * np.mean(np.sum(left_TF**2, axis=0)))
        rows = np.concatenate([left_TF, root * np.eye(64)])
        wanted = np.concatenate([missing_TD, np.zeros((64, missing_TD.shape[1]))])
        change_FD = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        assert np.abs(change_FD).max() > 0.05
        np.testing.assert_allclose(got_FD, down_FD + change_FD, atol=2e-4)
        before, after = (
            np.sum((missing_TD - left_TF @ d) ** 2) for d in (0 * change_FD, change_FD)
        )
        assert after < 0.8 * before


def test_padding_counts_nowhere():
    mask = np.ones(TOKENS.shape, bool)
    mask[:, 20:] = False
    dense, params = tiny.model_and_params(None)
    twice = []
    for filler in (0, 1):
        tokens = np.where(mask, TOKENS, filler)
        _, sparse = lte_jax.moefy(dense, params, tokens, mask, refit=True, **SETTINGS)
        twice.append(sparse["layers"]["ffn"]["down"])
    np.testing.assert_allclose(*twice, atol=1e-5)


def test_nothing_changes_where_nothing_is_skipped():
    lte = {"router_init": "open", "target_sparsity": None}
    (*_, plain), (*_, fitted) = made(**lte), made(refit=True, **lte)
    np.testing.assert_array_equal(fitted["layers"]["ffn"]["down"], plain["layers"]["ffn"]["down"])


def test_layers_in_turn_are_layers_at_once(monkeypatch):
    *_, at_once = made(refit=True)
    monkeypatch.setattr(router_init, "PASS_BYTES", 1)  # a layer at a time
    *_, in_turn = made(refit=True)
    np.testing.assert_allclose(*(p["layers"]["ffn"]["down"] for p in (at_once, in_turn)), atol=1e-6)


def test_choices_without_a_router():
    lte = {"router": "none", "routing": "oracle_experts", "router_init": "normal"}
    dense, params, _, plain = made(**lte)
    model, fitted = made(refit=True, **lte)[2:]
    logits, before, after = (
        np.asarray(lte_jax.apply(m, p, TOKENS).logits)
        for m, p in ((dense, params), (model, plain), (model, fitted))
    )
    assert np.mean((after - logits) ** 2) < 0.9 * np.mean((before - logits) ** 2)


def test_bad_input():
    with pytest.raises(UserError, match=r"lte\.refit=True: lte\.router_init='wanda' prunes"):
        wanda = {k[4:]: v for k, v in baselines.METHODS["wanda"].settings.items()}
        made(**wanda | {"refit": True})
    with pytest.raises(UserError, match=r"lte\.refit: no expert of layer 0 runs for any"):
        made(refit=True, router_init="normal", router_init_std=0.0, threshold=0.6)
    with pytest.raises(UserError, match=r"lte\.refit=True fits weights to data"):
        dense, params = tiny.model_and_params(None)
        lte_jax.moefy(dense, params, refit=True, router_init="normal", grouping="random")


def test_the_teacher_of_a_run_is_the_dense_model(tmp_path, monkeypatch):
    taught = []
    fit = trainer.fit

    def spy(model, stage, params, *args, teacher=None, **kwargs):
        if stage.name == "router":
            ffns = (tree["layers"]["ffn"]["down"] for tree in (params, teacher))
            taught.append([np.asarray(down) for down in ffns])
        return fit(model, stage, params, *args, teacher=teacher, **kwargs)

    monkeypatch.setattr(trainer, "fit", spy)
    experiment = tiny.experiment(tmp_path)
    lte = dataclasses.replace(experiment.lte, refit=True)
    lte_jax.train(dataclasses.replace(experiment, lte=lte, report=False), tmp_path / "run")
    model, dense = lte_jax.load(tmp_path / "run/dense")
    [(start, teacher)] = taught
    order_NEM = hf.load_expert_order(tmp_path / "run/experts")
    for layer, order_EM in enumerate(order_NEM):
        down_EMD = np.asarray(dense["layers"]["ffn"]["down"][layer, 0])[order_EM]
        np.testing.assert_array_equal(teacher[layer], down_EMD.astype(teacher.dtype))
    assert np.abs(start - teacher.astype(np.float32)).max() > 1e-2  # of 0.1; rounding is 4e-4
