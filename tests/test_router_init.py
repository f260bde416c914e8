"""Routers that start from data: the right ones, from any number of tokens, in bounded memory."""

import dataclasses
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import moefication, router_init
from lte_jax.config import LTEConfig
from lte_jax.errors import UserError
from lte_jax.model import Transformer
from lte_jax.reading import Slice
from lte_jax.router_init import contribution

D, E = tiny.CONFIG.d_model, tiny.CONFIG.d_ff // tiny.LTE.expert_size


def batches(count, **kwargs):
    return [tiny.batch(2, seed=seed, **kwargs) for seed in range(count)]


def inputs(model, params, data):
    """FFN inputs [N, T, D] of the real tokens."""
    found = [router_init.ffn_intermediates(model, params, batch) for batch in data]
    return np.concatenate([np.asarray(x)[:, np.asarray(real)] for x, _, real in found], axis=1)


def logits_of(router, x_NTD):
    rows = [
        Slice({"router": {k: v[n] for k, v in router.items()}}, jnp.float32).linear(
            "router", jnp.asarray(x_TD)[None], exact=True
        )[0]
        for n, x_TD in enumerate(x_NTD)
    ]
    return np.stack(rows)


def test_scale_and_quantiles_are_those_of_all_logits_at_once():
    """Against NumPy's quantiles of the logits themselves; padding counts for nothing."""
    model, params = tiny.model_and_params()
    data = batches(12)
    router = router_init.ridge_router(model, params, data, tiny.LTE)
    x_NTD = inputs(model, params, data)
    z_NTE = logits_of({"kernel": router["kernel"]}, x_NTD)
    std_N = np.sqrt(np.mean(np.var(z_NTE, axis=1), axis=-1))
    np.testing.assert_allclose(std_N, tiny.LTE.router_init_std, rtol=1e-4)

    found = [router_init.ffn_intermediates(model, params, batch) for batch in data]
    down = params["layers"]["ffn"]["down"]
    chosen = np.zeros((x_NTD.shape[0], E))
    for _, h_NTEM, real_T in found:
        importance_NTE = np.asarray(jax.vmap(contribution)(h_NTEM, down))[:, np.asarray(real_T)]
        order_NTE = np.argsort(-importance_NTE, axis=-1, kind="stable")
        for n, e in ((n, e) for n in range(len(chosen)) for e in range(E)):
            chosen[n, e] += np.sum(order_NTE[n, :, : E // 2] == e)
    for n, e in ((n, e) for n in range(len(chosen)) for e in range(E)):
        q = 1 - chosen[n, e] / z_NTE.shape[1]
        exact = np.quantile(z_NTE[n, :, e].astype(np.float64), q)
        bin_width = 2 * router_init.REACH / router_init.BINS * float(np.std(z_NTE[n, :, e]))
        assert -router["bias"][n, e] == pytest.approx(exact, abs=1.1 * bin_width), (n, e)


def test_memory_does_not_grow_with_the_tokens():
    """Live bytes, whenever a batch is asked for."""
    model, params = tiny.model_and_params()
    data = batches(40)
    live = []

    class Watched(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                live.append(sum(array.nbytes for array in jax.live_arrays()))
                yield batch

    router_init.ridge_router(model, params, Watched(data), tiny.LTE)
    assert len(live) == 80, "two passes"
    gram = 4 * tiny.CONFIG.num_layers * (D + 1) ** 2
    assert max(live) - live[0] < 8 * gram, "sums of products and of histograms"
    assert max(live[60:]) <= max(live[42:50]), "and no more, however many batches came before"


INPUTS_VD = np.random.default_rng(0).standard_normal((4000, 48)).astype(np.float32)
PLANE_D = np.random.default_rng(1).standard_normal(48).astype(np.float32)


class Planted(Transformer):
    """A stand-in for a model: FFN inputs are the tokens' rows of a table, as is what is hidden."""

    @nn.nowrap
    def apply(self, variables, tokens, **kwargs):
        x_BLD = jnp.asarray(INPUTS_VD)[tokens]
        logit_BL = x_BLD @ jnp.asarray(PLANE_D)
        h_BLE = jnp.stack([jax.nn.sigmoid(logit_BL), jax.nn.sigmoid(-logit_BL)], axis=-1)
        sown = {"ffn_input": (x_BLD[None],), "hidden": (h_BLE[None, ..., None],)}
        return None, {"intermediates": {"layers": {"ffn": sown}}}


def agreement(per_unknown: int) -> float:
    """With how much of 2,000 other tokens' choices of a linear oracle a router agrees."""
    config = dataclasses.replace(tiny.CONFIG, d_model=48, d_ff=2, num_layers=1)
    model = Planted(config)
    params = {"layers": {"ffn": {"down": jnp.ones((1, 2, 1, 48))}}}
    tokens = np.arange(per_unknown * 49, dtype=np.int32)[None]
    batch = {"tokens": tokens, "segments": np.ones_like(tokens)}
    lte = LTEConfig(expert_size=1, target_sparsity=0.5)
    router = router_init.ridge_router(model, params, [batch], lte)
    oracle_T = INPUTS_VD[2000:] @ PLANE_D > 0
    chosen_T = logits_of(router, INPUTS_VD[2000:][None])[0][:, 0] > 0
    return float(np.mean(chosen_T == oracle_T))


def test_32_tokens_per_unknown_recover_a_linear_oracle():
    """Regression of a sign on D inputs from T tokens is off by a share D / T of their variance."""
    few, enough = agreement(2), agreement(32)
    assert few < 0.87
    assert enough > 0.93


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_ridge_keeps_the_wanted_share_at_any_threshold(threshold):
    """In the first layer, whose input no router has a part in; on the calibration tokens."""
    dense, params = tiny.model_and_params(None)
    tokens = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (48, 24))
    lte = {"expert_size": 8, "target_sparsity": 0.75, "threshold": threshold}
    model, params = lte_jax.moefy(dense, params, tokens, grouping="random", **lte)
    out = jax.jit(model.apply)({"params": params}, tokens)
    assert float(np.mean(out.active[0])) == pytest.approx(0.25, abs=0.01)


def test_random_routers_start_as_they_say():
    """Normal ones with logits of a standard deviation of 2 about zero; open ones with all on."""
    dense, params = tiny.model_and_params(None)
    tokens = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (8, 24))
    found = {}
    for init in ("normal", "open"):
        lte = {"expert_size": 8, "router_init": init, "router_init_std": 2.0}
        model, sparse = lte_jax.moefy(dense, params, grouping="random", **lte)
        scores = np.asarray(jax.jit(model.apply)({"params": sparse}, tokens).scores, np.float64)
        found[init] = np.log(scores / (1 - scores))
    assert np.std(found["normal"]) == pytest.approx(2.0, rel=0.15)
    assert abs(np.mean(found["normal"])) < 0.3
    assert np.std(found["open"]) == pytest.approx(0.2, rel=0.15)
    assert np.mean(found["open"]) == pytest.approx(2.0, rel=0.05)


def test_top_equal_contributions_choose_exactly_k():
    """Eight experts that all contribute nothing: the oracle keeps the first four."""
    model, params = tiny.model_and_params()
    ffn = params["layers"]["ffn"]
    params["layers"]["ffn"] = ffn | {"down": jnp.zeros_like(ffn["down"])}
    batch = tiny.batch(2)
    sums = router_init._moments(model, E // 2, params, batch)
    tokens = int(np.sum(np.asarray(batch["segments"]) > 0))
    expected_E = np.where(np.arange(E) < E // 2, tokens, 0)
    np.testing.assert_array_equal(sums["cross"][:, -1], np.tile(expected_E, (2, 1)))


@pytest.mark.parametrize("sparsity, kept", [(0.01, E), (0.999, 1)])
def test_all_experts_or_one(sparsity, kept):
    """k = E: what is always chosen always runs, though its logit is rounding around a constant."""
    lte = LTEConfig(expert_size=8, target_sparsity=sparsity)
    model, params = tiny.model_and_params(lte)
    data = batches(8)
    router = router_init.ridge_router(model, params, data, lte)
    z_NTE = logits_of(router, inputs(model, params, data))
    assert np.isfinite(z_NTE).all()
    assert np.mean(z_NTE > 0) == pytest.approx(kept / E, abs=0.02)
    if kept == E:
        assert (z_NTE > 0).all()


def test_rows_of_padding_alone_change_nothing():
    model, params = tiny.model_and_params()
    data = batches(4)
    empty = {"tokens": data[0]["tokens"], "segments": jnp.zeros_like(data[0]["segments"])}
    plain, padded = (
        router_init.ridge_router(model, params, rows, tiny.LTE)
        for rows in (data, [empty, *data, empty])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), plain, padded)


def test_bad_input_calibration_of_padding_alone():
    model, params = tiny.model_and_params()
    tokens = np.zeros((2, 9), np.int32)
    with pytest.raises(UserError, match="all calibration tokens are padding") as error:
        moefication.add_routers(model, params, tokens, np.zeros((2, 9), bool))
    assert "\n" not in str(error.value)


def test_bad_input_activations_that_are_not_finite():
    model, params = tiny.model_and_params()
    ffn = params["layers"]["ffn"]
    params["layers"]["ffn"] = ffn | {"up": ffn["up"].at[0].set(jnp.nan)}
    with pytest.raises(UserError, match="activations of layer 1 are not finite"):
        router_init.ridge_router(model, params, batches(1), tiny.LTE)


def test_products_of_routers_are_never_rounded():
    """Unless told otherwise, TPUs and recent GPUs round the operands of float32 products."""
    model, params = tiny.model_and_params()
    batch = tiny.batch(2)
    place = (jnp.zeros((2, E), jnp.float32), jnp.ones((2, E), jnp.float32))
    kernel = params["layers"]["ffn"]["router"]["kernel"]
    moments = router_init._moments.lower(model, 4, params, batch).as_text()
    histogram = router_init._histogram.lower(model, params, batch, kernel, *place).as_text()
    assert moments.count("precision = [HIGHEST, HIGHEST]") == 5  # contribution 3, gram, cross
    assert histogram.count("precision = [HIGHEST, HIGHEST]") == 1


# -------------------------------------------------------------------------------- how many tokens


def test_rows_for_the_width_of_the_model():
    """32 tokens for each of D + 1 unknowns; at least 32 rows, at most all; or what is asked for."""
    segments_RL = np.ones((400, 64), np.int32)
    segments_RL[:, 48:] = 0  # 48 real tokens a row

    def choose(d_model, asked):
        return router_init.enough_records(segments_RL, d_model, asked, np.random.default_rng(0))

    assert len(choose(127, None)) == 86  # 32 * 128 / 48 = 85.3
    assert len(choose(15, None)) == 32
    assert len(choose(127, 5)) == 5
    rows = choose(127, None)
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, choose(127, None))


def test_too_little_training_text_is_all_taken_and_said(caplog):
    segments_RL = np.ones((40, 64), np.int32)
    rng = np.random.default_rng(0)
    assert len(router_init.enough_records(segments_RL, 127, None, rng)) == 40
    assert "all 2560 tokens of the training text, fewer than the 4096 wanted" in caplog.text


def test_few_tokens_are_warned_of_once(caplog):
    model, params = tiny.model_and_params()
    tokens = np.asarray(tiny.batch(8)["tokens"])
    moefication.add_routers(model, params, tokens)
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage().startswith("calibration: 128 tokens are 3.9 for each of the")
    assert "use 1056 tokens" in record.getMessage()
    caplog.clear()
    moefication.add_routers(model, params, np.tile(tokens, (9, 1)))
    assert not caplog.records
