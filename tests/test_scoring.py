"""Log-likelihoods of continuations, against the logits of each text alone."""

import jax
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import scoring


@pytest.fixture(scope="module")
def lte():
    return tiny.model_and_params()


def by_hand(model, params, context, new):
    """The log-likelihood of `new`, and the tokens that greedy decoding would write in its place."""
    ids = np.array([[*context, *new]])
    scores_LV = np.asarray(jax.nn.log_softmax(lte_jax.apply(model, params, ids).logits[0]))
    before = range(len(context) - 1, ids.shape[1] - 1)
    nats = sum(scores_LV[place, token] for place, token in zip(before, new, strict=True))
    return nats, [int(scores_LV[place].argmax()) for place in before]


def test_likelihoods_by_hand(lte):
    model, params = lte
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(1, 60, 3 + i), rng.integers(1, 60, 1 + i % 4)) for i in range(12)]
    # What greedy decoding writes, and the same with another first, or another last token.
    context = [5, 9, 2]
    written = lte_jax.generate(model, params, [context], max_new_tokens=3, eos_ids=())[0]
    first, last = [(written[0] + 1) % 60, *written[1:]], [*written[:-1], (written[-1] + 1) % 60]
    pairs += [(context, written), (context, first), (context, last), (context, written[:1])]
    found, sparsity = scoring.loglikelihoods(model, params, pairs, batch_size=5)
    for (given, new), score in zip(pairs, found, strict=True):
        nats, best = by_hand(model, params, given, new)
        assert score.nats == pytest.approx(nats, abs=1e-4)
        assert score.greedy == (best == list(new))
    assert [score.greedy for score in found[-4:]] == [True, False, False, True]
    assert 0 < sparsity < 1
    # A last token that is the likeliest, after one that is not: not greedy.
    wrong = (written[0] + 1) % 60
    _, [_, second] = by_hand(model, params, context, [wrong, 0])
    [score], _ = scoring.loglikelihoods(model, params, [(context, [wrong, second])])
    assert not score.greedy


def test_long_pairs_lose_their_start(lte):
    model, params = lte
    most = model.config.max_length
    ids = np.random.default_rng(1).integers(1, 60, most + 9)
    [long], _ = scoring.loglikelihoods(model, params, [(ids[:-4], ids[-4:])])
    [cut], _ = scoring.loglikelihoods(model, params, [(ids[8:-4], ids[-4:])])
    assert long == cut
