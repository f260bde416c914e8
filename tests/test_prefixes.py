"""What ended texts leave behind serves prompts that begin like them, and changes no token."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import VARIANTS, make

import lte_jax
from lte_jax.config import UserError
from lte_jax.generation.engine import Engine
from lte_jax.generation.prefixes import Prefix, Prefixes, shared

RNG = np.random.default_rng(0)


def prompt(length):
    return RNG.integers(1, 60, length).tolist()


def finished(engine, ids, count=10, **how):
    text = engine.add(ids, max_new_tokens=count, eos_ids=(), **how)
    while engine.step():
        pass
    return text


def alone(engine, ids, count=10):
    model, params = engine.decoder.model, engine.decoder.params
    return lte_jax.generate(model, params, [ids], max_new_tokens=count, eos_ids=())[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_turn_of_a_chat_is_read_from_where_it_is_new(variant):
    model, params = make(variant, max_length=256)
    engine = Engine(model, params, rows=4)
    ids = prompt(40)
    for known in (0, 49, 88, 127):  # all but the token that was chosen last
        text = finished(engine, ids)
        assert text.reused == known
        assert text.new == alone(engine, ids)
        ids = [*ids, *text.new, *prompt(29)]


def test_beginnings_in_common_beside_other_texts():
    """One begins like half of an earlier text, one in no way; both beside a third that runs."""
    model, params = make(max_length=256)
    engine = Engine(model, params, rows=4)
    first = prompt(60)
    finished(engine, first)
    running = engine.add(prompt(5), max_new_tokens=60, eos_ids=())
    engine.step()
    asked = [first[:33] + prompt(20), prompt(50), first, first[:40]]
    texts = [engine.add(ids, max_new_tokens=10, eos_ids=()) for ids in asked]
    while engine.step():
        pass
    assert [text.reused for text in texts] == [33, 0, 59, 39]
    assert [text.new for text in texts] == [alone(engine, ids) for ids in asked]
    assert running.new == alone(engine, running.prompt.tolist(), 60)


def test_texts_that_end_otherwise_leave_nothing():
    model, params = make(max_length=256)
    engine = Engine(model, params, rows=4)
    ids = prompt(40)
    text = engine.add(ids, max_new_tokens=20)
    engine.step()
    engine.drop(text)
    assert finished(engine, ids, count=1).reused == 0
    assert finished(engine, ids).reused == 39  # one of a single token never had a row
    assert finished(engine, ids[:20]).reused == 0  # too short: laid elsewhere
    none = Engine(model, params, rows=4, kept=0)
    broken = params | {"final_norm": {"scale": params["final_norm"]["scale"] * jnp.nan}}
    without_numbers = Engine(model, broken, rows=4)
    for _ in range(2):
        assert finished(none, ids).reused == 0
        text = finished(without_numbers, ids)
        assert text.end == "not finite" and text.reused == 0
    stopped = Engine(model, params, rows=4)
    finished(stopped, ids[:4], count=2)
    assert len(stopped._prefixes) == 0  # of five tokens, which serve nobody
    ends = alone(stopped, ids)[2:3]
    text = stopped.add(ids, max_new_tokens=10, eos_ids=ends)
    while stopped.step():
        pass
    assert text.end == "stop"
    assert finished(stopped, ids).reused == 39
    with pytest.raises(UserError, match="kept=-1"):
        Engine(model, params, kept=-1)


def test_those_used_longest_ago_go_first():
    kept = Prefixes(160)
    a, b, c = (np.arange(i, i + 40) for i in (100, 200, 300))

    def add(tokens, places=64):
        kept.add(Prefix(tokens, {"segments": jnp.zeros((1, places))}))

    assert kept.wants(100, 160) and not kept.wants(100, 161)
    assert kept.wants(16, 64) and not kept.wants(15, 64)
    add(a)
    add(b)
    assert kept.of(np.append(a, 1))[0] == 40 and kept.of(a)[0] == 39  # the last has to be read
    add(c)  # b was used longer ago than a
    assert [kept.of(np.append(x, 1))[0] for x in (a, b, c)] == [40, 0, 40]
    assert kept.of(np.append(a, 1))[0] == 40
    add(np.append(a, [1, 2, 3]))  # in place of a, so that there is room for c
    assert kept.of(np.append(c, 1))[0] == 40
    assert len(kept) == 2 and kept.of(np.append(a, [1, 2, 4]))[0] == 42
    add(b, places=128)
    assert len(kept) == 1
    assert kept.of(b[:16]) == (0, None)  # 15 in common with what would be read
    assert shared(a, a[:7]) == 7 and shared(a, b) == 0
