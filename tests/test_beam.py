"""Beam search: the tokens of transformers' own, with padding, LTE models and bad arguments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import config_json, reference, write_folder
from random_models import PROMPTS, make

import lte_jax
from lte_jax.errors import UserError
from lte_jax.generation import beam, generate

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"beams": 3},
    "as E2E": {"beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4},
    "as XSum": {"beams": 6, "length_penalty": 1.0, "no_repeat_ngram": 3, "min_new_tokens": 10},
    "long": {"beams": 4, "length_penalty": 2.0, "no_repeat_ngram": 2},
    "short": {"beams": 2, "length_penalty": -1.0, "no_repeat_ngram": 1},
}
RENAMED = {"beams": "num_beams", "no_repeat_ngram": "no_repeat_ngram_size"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    """A tiny model, its parameters, and the same model in transformers."""
    folder = tmp_path_factory.mktemp("beam") / request.param
    write_folder(folder, config_json(request.param))
    return *lte_jax.load(folder, "float32"), reference(folder)


@pytest.mark.parametrize("case", SETTINGS)
def test_parity_of_beam_search(case, pair):
    import torch

    model, params, other = pair
    eos_ids = (2,) if case == "plain" else (5, 11, 60)
    prompts = [[p % 97 for p in prompt] for prompt in PROMPTS]
    found = generate(model, params, prompts, max_new_tokens=20, eos_ids=eos_ids, **SETTINGS[case])
    settings = {RENAMED.get(name, name): value for name, value in SETTINGS[case].items()}
    for prompt, mine in zip(prompts, found, strict=True):
        inputs = torch.tensor([prompt])
        theirs = other.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=20, do_sample=False,
            pad_token_id=0, eos_token_id=list(eos_ids), **settings,
        )  # fmt: skip
        assert mine == theirs[0, len(prompt) :].tolist()
    assert len({tuple(row) for row in found}) == 3  # else anything would pass


def test_padded_prompts_continue_as_they_do_alone():
    """An LTE model, through the sparse kernels; texts end at different steps."""
    model, params = make()
    settings = {"max_new_tokens": 20, "beams": 4, "no_repeat_ngram": 3, "eos_ids": (2, 7)}
    together = generate(model, params, PROMPTS, **settings)
    assert together == [generate(model, params, [p], **settings)[0] for p in PROMPTS]
    assert together != generate(model, params, PROMPTS, routing="dense", **settings)


def test_a_beam_finds_what_is_likelier_than_greedy():
    model, params = make()

    def logp(prompt, new):
        tokens = jnp.asarray([prompt + new])
        logp_LV = np.asarray(jax.nn.log_softmax(lte_jax.apply(model, params, tokens).logits[0]))
        at = np.arange(len(prompt) - 1, len(prompt) + len(new) - 1)
        return logp_LV[at, new].sum()

    settings = {"max_new_tokens": 8, "eos_ids": ()}
    greedy = generate(model, params, PROMPTS, **settings)
    best = generate(model, params, PROMPTS, beams=8, **settings)
    gains = [logp(p, b) - logp(p, g) for p, b, g in zip(PROMPTS, best, greedy, strict=True)]
    assert min(gains) > -1e-4 and max(gains) > 0.1


def test_no_ngram_occurs_twice_and_min_new_tokens_holds():
    model, params = make()
    first = generate(model, params, PROMPTS, max_new_tokens=1, beams=2, eos_ids=())
    ends = tuple({row[0] for row in first})
    settings = {"beams": 3, "max_new_tokens": 40, "no_repeat_ngram": 2}
    for prompt, new in zip(
        PROMPTS,
        generate(model, params, PROMPTS, eos_ids=ends, min_new_tokens=6, **settings),
        strict=True,
    ):
        assert len(new) > 6 and not set(new[:6]) & set(ends)
        text = prompt + new
        pairs = list(zip(text[len(prompt) - 1 :], text[len(prompt) :], strict=False))
        known = set(zip(prompt, prompt[1:], strict=False))
        assert len(set(pairs)) == len(pairs) and not set(pairs) & known


def test_min_new_tokens_is_exact():
    """What would end each text at once may not, up to that many tokens."""
    model, params = make()
    settings: dict[str, Any] = {"max_new_tokens": 12, "beams": 2}
    free = generate(model, params, PROMPTS, eos_ids=(), **settings)
    ends = tuple({token for row in free for token in row[:6]})
    lengths = set()
    for least in range(1, 7):
        new = generate(model, params, PROMPTS, eos_ids=ends, min_new_tokens=least, **settings)
        assert all(not set(row[:least]) & {*ends} for row in new)
        lengths |= {len(row) - least for row in new}
    assert 1 in lengths  # the end comes as soon as it may


def test_repeats_by_hand():
    """Places of padding and of tokens not yet written, -1, are in no n-gram."""
    rng = np.random.default_rng(0)
    for ngram in 1, 2, 3:
        history = rng.integers(0, 5, (40, 14)).astype(np.int32)
        for row, pads in zip(history, rng.integers(ngram, 9, 40), strict=True):
            row[:pads], row[11:] = -1, -1
        found = np.asarray(beam._repeats(jnp.asarray(history), 11, ngram, 5))
        for row, banned in zip(history.tolist(), found, strict=True):
            text = [token for token in row if token >= 0]
            known = {tuple(text[i : i + ngram]) for i in range(len(text) - ngram + 1)}
            suffix = text[len(text) - ngram + 1 :]
            short = len(suffix) < ngram - 1
            expected = [not short and (*suffix, token) in known for token in range(5)]
            assert banned.tolist() == expected


def test_logits_that_are_not_finite_are_named():
    model, params = make()
    broken = params | {"embed": {"embedding": params["embed"]["embedding"] * jnp.nan}}
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, broken, PROMPTS, max_new_tokens=4, beams=2)


BAD = {
    "beams": ({"beams": 0}, "beams=0: expected an integer from 1 to 30"),
    "too many": ({"beams": 31}, "beams=31: expected an integer from 1 to 30"),
    "fraction": ({"beams": 2.5}, "beams=2.5"),
    "penalty": ({"beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
    "ngram": ({"beams": 2, "no_repeat_ngram": -1}, "no_repeat_ngram=-1"),
    "least": ({"beams": 2, "min_new_tokens": 9}, "min_new_tokens=9: expected .* 0 to 8"),
    "alone": ({"no_repeat_ngram": 3}, "are of beam search"),
    "sampled": ({"beams": 2, "temperature": 0.5}, "beams=2 with a temperature"),
    "streamed": ({"beams": 2, "stream": print}, "no text before its end"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_beam_search(case):
    settings, message = BAD[case]
    model, params = make()
    model = model.clone(config=dataclasses.replace(model.config, eos_ids=(2,)))
    with pytest.raises(UserError, match=message):
        generate(model, params, PROMPTS, max_new_tokens=8, **settings)
