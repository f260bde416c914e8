"""The arithmetic of a block stands once: what is added there trains, prefills and decodes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lte_jax import generate, layers, params
from lte_jax.config import RopeScaling
from lte_jax.generation.decoding import Decoder
from lte_jax.kernels import unavailable
from lte_jax.model import Transformer
from lte_jax.selection import Routing

IMPLEMENTATIONS = [n for n in ("reference", "xla", "cpu", "triton") if not unavailable(n)]
PROMPTS = [np.arange(5), np.arange(20, 31)]


# Each way in which blocks of the families differ, as data.
DIFFERENCES = {
    "gpt2": {"norm": "layer", "norm_bias": True, "positions": "learned", "gated": False}
    | {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "gemma": {"norm_offset": True, "norm_place": "sandwich", "embed_scale": 5.0, "qk_norm": True}
    | {"sliding_window": 4, "sliding_layers": (True, False), "sliding_rope_theta": 100.0}
    | {"attention_scale": 0.1, "rope_scaling": RopeScaling("yarn", 4.0, 1.0, 8.0, 16, 1.2)},
    "smollm3": {"rope_layers": (False, True)},
    "granite": {"attention_scale": 0.5, "residual_scale": 0.4, "logits_divisor": 3.0},
    "olmo2": {"norm_place": "output", "qk_full_norm": True},
    "gpt_neox": {"parallel": True, "rotary_dim": 4, "norm": "layer", "norm_bias": True},
    "embeddings": {"positions": "learned", "position_offset": 2, "token_types": 2}
    | {"embed_norm": True, "norm_place": "post"},
}


@pytest.fixture
def value_gain(monkeypatch):
    """A gain of each head's output, which no family has: a row of the table, a line of a layer."""
    row = params.Row("layers/attn/gain", "NH", "ones")
    monkeypatch.setattr(params, "ROWS", (*params.ROWS, row))
    monkeypatch.setitem(params.BY_PATH, row.path, row)
    attention = layers.attention

    def with_gain(config, w, x_BLD, **others):
        class Gained(type(w)):
            def attend(self, *operands, **options):
                y_BLHC, kv = super().attend(*operands, **options)
                return y_BLHC * w.vectors["gain"].astype(y_BLHC.dtype)[None, None, :, None], kv

        fields = {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}
        return attention(config, Gained(**fields), x_BLD, **others)

    monkeypatch.setattr(layers, "attention", with_gain)


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    abstract = params.abstract(model.config, model.lte)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), abstract)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_each_difference_trains_prefills_and_decodes(difference):
    check(dataclasses.replace(tiny.CONFIG, max_length=64, **DIFFERENCES[difference]))


def test_a_new_part_is_added_in_one_place(value_gain):
    gradients = check(dataclasses.replace(tiny.CONFIG, max_length=64))
    assert float(jnp.abs(gradients["layers"]["attn"]["gain"]).max()) > 0


def check(config):
    """Trains, prefills and decodes alike, with every kernel; returns the gradients."""
    model = Transformer(config, tiny.LTE)
    weights = random_params(model)
    batch = tiny.batch(2)

    def loss(weights):
        out = model.apply({"params": weights}, batch["tokens"], mask=batch["segments"])
        return jnp.sum(out.logits**2)

    gradients = jax.jit(jax.grad(loss))(weights)
    made = jax.eval_shape(model.init, jax.random.key(0), batch["tokens"])["params"]
    assert jax.tree.structure(made) == jax.tree.structure(gradients)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        idle = "router" in str(path)  # under hard routing
        assert idle or float(jnp.abs(gradient).max()) > 0, path

    decoder = Decoder.of(model, weights, eos_ids=())
    state, stack, step = decoder.prefill(PROMPTS, room=8), decoder.stack(), jax.jit(Decoder.step)
    expected, _, _ = step(decoder, None, state)
    for name in IMPLEMENTATIONS:
        found, _, _ = step(decoder.replace(implementation=name), stack, state)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    return gradients


class ByNeurons(Routing):
    """An expert runs where its neurons are large: a choice by activations, not by router."""

    reads_neurons = True

    def scores(self, view):
        """The mean magnitude, squashed; the router is never asked."""
        size_BLE = jnp.mean(jnp.abs(view.h_BLEM.astype(jnp.float32)), axis=-1)
        return size_BLE / (1 + size_BLE)


def test_a_routing_by_activations_fits():
    """It runs, chooses some experts and not others, and generation reads as the model does."""
    model = Transformer(tiny.CONFIG, tiny.LTE)
    weights, tokens = random_params(model), jnp.asarray(PROMPTS[1])[None]
    apply = jax.jit(functools.partial(model.apply, routing=ByNeurons()))
    threshold = float(jnp.median(apply({"params": weights}, tokens, threshold=0.0).scores))
    out = apply({"params": weights}, tokens, threshold=threshold)
    assert 0.1 < float(out.sparsity) < 0.9
    changed = jax.tree.map(lambda p: p, weights)
    changed["layers"]["ffn"]["router"] = jax.tree.map(
        jnp.zeros_like, weights["layers"]["ffn"]["router"]
    )
    again = apply({"params": changed}, tokens, threshold=threshold)
    np.testing.assert_array_equal(out.active, again.active)

    settings = {"routing": ByNeurons(), "threshold": threshold, "eos_ids": ()}
    [new] = generate(model, weights, [PROMPTS[1]], max_new_tokens=6, **settings)
    whole = jnp.asarray([[*PROMPTS[1].tolist(), *new]])  # each of them the likeliest, in one look
    out = apply({"params": weights}, whole, threshold=threshold)
    assert new == jnp.argmax(out.logits[0, -7:-1], axis=-1).tolist()


def test_top_k_says_that_it_needs_a_sparsity():
    lte = dataclasses.replace(tiny.LTE, target_sparsity=None)
    model = Transformer(tiny.CONFIG, lte)
    with pytest.raises(ValueError, match="routing='top_k' needs lte.target_sparsity.*found None"):
        model.apply({"params": {}}, jnp.ones((1, 3), jnp.int32), routing="top_k")
