"""Texts that come and go: each gets what `generate` gives it alone, whatever stands beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import VARIANTS, make

import lte_jax
from lte_jax.config import UserError
from lte_jax.generation import engine as rooms
from lte_jax.generation.engine import Engine

RNG = np.random.default_rng(0)


def prompt(length):
    return RNG.integers(1, 60, length).tolist()


def alone(model, params, prompt, **settings):
    return lte_jax.generate(model, params, [prompt], **settings)[0]


def finish(engine):
    while engine.step():
        pass


@pytest.mark.parametrize(
    ("variant", "routing"), [*((variant, "hard") for variant in VARIANTS), ("llama", "dense")]
)
def test_each_text_is_what_it_would_be_alone(variant, routing):
    """They join at different times, in another order than they leave, longer ones after shorter."""
    model, params = make(variant, max_length=256)
    engine, asked = Engine(model, params, rows=4, routing=routing), []
    lengths = [(5, 40), (60, 9), (3, 1), (17, 25), (90, 20), (2, 60), (30, 30), (8, 8)]
    for i, (length, count) in enumerate(lengths):
        how = {"max_new_tokens": count, "eos_ids": (7, 11) if i % 2 else ()}
        if i % 3 == 1:
            how |= {"temperature": 0.9, "seed": 2**32 - 1 - i, "top_p": 0.8 if i > 4 else None}
        ids = prompt(length)
        asked.append((ids, how, engine.add(ids, **how)))
        for _ in range(i):
            engine.step()
        assert len(engine.running) <= 4 and engine.shape[0] <= 4
    finish(engine)
    for ids, how, text in asked:
        expected = alone(model, params, ids, routing=routing, **how)
        assert text.new == expected, (len(ids), how)
        assert text.end == ("stop" if expected[-1] in how["eos_ids"] else "length")
    assert engine.shape == (0, 0) and not engine.running and not engine.waiting


def test_rows_and_places_are_as_few_as_the_texts_need():
    model, params = make(max_length=256)
    engine = Engine(model, params, rows=8)
    long = engine.add(prompt(70), max_new_tokens=50)
    engine.step()
    assert engine.shape == (1, 128)
    short = [engine.add(prompt(4), max_new_tokens=5) for _ in range(5)]
    for _ in range(3):
        engine.step()
    assert engine.shape == (4, 128) and len(engine.running) == 4
    while not all(text.end for text in short):
        engine.step()
    assert engine.shape in [(1, 128), (2, 128)] and engine.running == [long]
    engine.add(prompt(100), max_new_tokens=100)
    engine.step()
    assert engine.shape == (2, 256)


def test_a_text_waits_until_there_is_place():
    """And what comes after it waits behind it."""
    model, params = make(max_length=512)
    engine = Engine(model, params, rows=4, places=256)
    first = engine.add(prompt(5), max_new_tokens=40)  # 64 places
    engine.step()
    wide = engine.add(prompt(60), max_new_tokens=100)  # 256 places: not beside another
    last = engine.add(prompt(5), max_new_tokens=4)
    engine.step()
    assert engine.running == [first] and list(engine.waiting) == [wide, last]
    while not first.end:
        engine.step()
    engine.step()
    assert engine.running == [wide]
    finish(engine)
    assert wide.end == last.end == "length"
    with pytest.raises(UserError, match="need 512 places: expected at most places=256"):
        engine.add(prompt(156), max_new_tokens=101)


def test_a_text_that_is_dropped_frees_its_row_before_the_next_step():
    model, params = make(max_length=256)
    engine = Engine(model, params, rows=2)
    texts = [engine.add(prompt(5), max_new_tokens=30) for _ in range(3)]
    engine.step(), engine.step()
    assert engine.running == texts[:2]
    engine.drop(texts[0])
    engine.drop(texts[0])
    assert texts[0].end == "dropped" and engine.running == [texts[1]]
    count = len(texts[0].new)
    engine.step()
    assert set(engine.running) == set(texts[1:]) and len(texts[0].new) == count
    engine.drop(texts[2])
    finish(engine)
    assert texts[1].new == alone(model, params, texts[1].prompt.tolist(), max_new_tokens=30)
    waiting = engine.add(prompt(5), max_new_tokens=3)
    engine.drop(waiting)
    assert engine.step() == [] and waiting.new == []


def test_one_text_without_numbers_leaves_the_others_alone():
    """A token whose embedding is NaN, written by one of them; its row is then another's."""
    model, params = make(max_length=256)
    while True:  # a prompt whose text has a token that the other's has not
        ids, other = prompt(9), prompt(7)
        good, bad = (alone(model, params, p, max_new_tokens=20) for p in (ids, other))
        if wrong := [t for t in bad[1:9] if t not in {*ids, *good, *other, bad[0]}]:
            break
    table = params["embed"]["embedding"].at[wrong[0]].set(jnp.nan)
    broken = params | {"embed": params["embed"] | {"embedding": table}}
    engine = Engine(model, broken, rows=2)
    texts = [engine.add(p, max_new_tokens=20) for p in (ids, other, ids[:4])]
    finish(engine)
    assert [text.end for text in texts] == ["length", "not finite", "length"]
    assert texts[1].new == bad[: bad.index(wrong[0]) + 1]
    assert texts[0].new == good
    unbroken = alone(model, broken, ids[:4], max_new_tokens=20)
    assert texts[2].new == unbroken


def test_the_cache_is_not_copied_by_a_step():
    """Its memory is that of the step before."""
    model, params = make(max_length=256)
    engine = Engine(model, params, rows=2)
    engine.add(prompt(5), max_new_tokens=30)
    engine.step(), engine.step()
    before = engine._cache["k"].unsafe_buffer_pointer()
    engine.step()
    assert engine._cache["k"].unsafe_buffer_pointer() == before


def test_few_programs_are_compiled():
    """Sixty texts of sixty lengths: one step each of so many rows and places as there are."""
    model, params = make(max_length=256)
    engine, shapes = Engine(model, params, rows=4), set()
    before = rooms._step._cache_size()
    for length in range(1, 61):
        engine.add(prompt(length), max_new_tokens=3 + length % 5)
    while engine.step():
        shapes.add(engine.shape)
    assert rooms._step._cache_size() - before <= len(shapes) + 1 <= 8


def test_bad_settings():
    model, params = make(max_length=256)
    for how, message in (
        ({"rows": 0}, "rows=0"),
        ({"places": 3}, "places=3"),
        ({"threshold": 2.0}, "threshold"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(model, params, **how)
    engine = Engine(model, params)
    for ids, how, message in (
        ([], {}, "prompt 0 is empty"),
        ([99999], {}, "prompt 0"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"temperature": -1}, "temperature=-1"),
        ([1], {"top_p": 0}, "top_p=0"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1] * 300, {}, "max_length"),
    ):
        with pytest.raises(UserError, match=message):
            engine.add(ids, **({"max_new_tokens": 5} | how))
    assert not engine.waiting
    assert jax.tree.leaves(params)  # left alone
