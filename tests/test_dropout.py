"""Dropout: where it acts, that it is off by default, and that a step's masks can be had again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from lte_jax import optim, training_step
from lte_jax.model import forward
from lte_jax.sparsity import SparsityController

KEY = jax.random.key(0)


def hidden(model, params, key=None):
    rngs = None if key is None else {"dropout": key}
    return np.asarray(forward(model, params, tiny.batch(), rngs=rngs).hidden)


def test_needs_a_key_and_a_rate():
    model, params = tiny.model_and_params()
    dropping = model.clone(dropout=0.5)
    np.testing.assert_array_equal(hidden(dropping, params), hidden(model, params))
    np.testing.assert_array_equal(hidden(model, params, KEY), hidden(model, params))
    dropped = hidden(dropping, params, KEY)
    assert not np.allclose(dropped, hidden(model, params))
    assert not np.allclose(dropped, hidden(dropping, params, jax.random.key(1)))


CONSTANT = dataclasses.replace(  # whose every part can put out the same number everywhere
    tiny.CONFIG, d_model=256, norm="layer", norm_bias=True, out_bias=True, mlp_bias=True
)


def ones_from(config, *paths):
    """Parameters that are all zero, but one at these paths and in the scale of the last norm."""
    model, params = tiny.model_and_params(None, config, dropout=0.25)
    leaves = {
        path: jnp.full_like(leaf, path in ("final_norm/scale", *paths))
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }
    return model, traverse_util.unflatten_dict(leaves, sep="/")


PARTS = {
    "embedding": "embed/embedding",
    "attention": "layers/attn/o/bias",
    "ffn": "layers/ffn/down_bias",
}


@pytest.mark.parametrize("path", PARTS.values(), ids=PARTS)
def test_acts_on_what_each_part_adds(path):
    model, params = ones_from(CONSTANT, path)
    assert not hidden(model, params).any()  # the norm of a constant
    assert hidden(model, params, KEY).any()


def test_acts_on_what_a_classifier_reads():
    config = dataclasses.replace(CONSTANT, head="classes")
    model, params = ones_from(config, "final_norm/bias", "classifier/kernel")
    logits = [
        forward(model, params, tiny.batch(), rngs=rngs).logits for rngs in (None, {"dropout": KEY})
    ]
    np.testing.assert_array_equal(logits[0], 256)
    assert len(np.unique(logits[1])) > 4
    np.testing.assert_allclose(np.mean(logits[1]), 256, rtol=0.1)


def test_each_layer_has_masks_of_its_own_and_keeps_the_mean():
    # Of RMSNorm, so that the ratios of the sums stay.
    config = dataclasses.replace(CONSTANT, norm="rms", norm_bias=False)
    model, params = ones_from(config, "layers/ffn/down_bias")  # two layers, each adds 1
    values = hidden(model, params, KEY)
    # With masks that the layers share, each sum would be 0 or 2 / 0.75.
    sums, counts = np.unique((values / values.max(-1, keepdims=True)).round(3), return_counts=True)
    assert sums.tolist() == [0, 0.5, 1]
    shares = counts / counts.sum()
    np.testing.assert_allclose(shares, [0.25**2, 2 * 0.25 * 0.75, 0.75**2], atol=0.01)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_draws_what_its_seed_and_number_say(microbatches):
    model, params = tiny.model_and_params(None)
    stage = tiny.stage("finetune")
    stage = dataclasses.replace(stage, config=dataclasses.replace(stage.config, dropout=0.3))
    optimizer = optim.make(tiny.OPTIM, stage.config, stage.rules)

    def loss(seed, number):
        step = training_step.make_train_step(model, stage, optimizer, microbatches, seed)
        state = training_step.TrainState(
            jnp.int32(number), params, optimizer.init(params), SparsityController.start(tiny.LTE)
        )
        return float(jax.jit(step)(state, tiny.batch(), None)[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3
