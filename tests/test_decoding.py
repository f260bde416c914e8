"""The steps of decoding: the model's logits, sampling by the softmax, rows that end alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import PROMPTS, make

from lte_jax.errors import UserError
from lte_jax.generation import decoding, generate
from lte_jax.generation.decoding import Decoder
from lte_jax.kernels import unavailable
from lte_jax.model import Transformer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_step_gives_the_logits_of_the_model(dtype):
    """With every implementation that takes so small a width."""
    names = [n for n in ("reference", "xla", "cpu", "triton") if not unavailable(n)]
    model, params = make("biases", dtype=dtype)
    decoder, step = Decoder.of(model, params, eos_ids=()), jax.jit(Decoder.step)
    start = decoder.prefill([np.array(p) for p in PROMPTS], room=8)
    stacked = dict.fromkeys(names, decoder.stack())
    logits = {}
    for name, weights in (stacked | {"apply": None}).items():
        state = start
        for _ in range(3):  # some steps, on the same tokens
            logits[name], cache, _ = step(decoder.replace(implementation=name), weights, state)
            state = state.replace(cache=cache, tokens_B=jnp.array([5, 17, 40], jnp.int32))
    for name in names:
        error = jnp.abs(logits[name] - logits["apply"]).max() / jnp.abs(logits["apply"]).max()
        assert error < (2e-5 if dtype == "float32" else 5e-2), name


def test_rows_that_have_ended_read_nothing():
    """The share of experts read is that of the rows still under way, of all layers."""
    decoder = Decoder.of(*make(), "hard", eos_ids=())
    stack, step = decoder.stack(), jax.jit(Decoder.step)

    def read(prompts, done):
        state = decoder.prefill([np.array(p) for p in prompts], room=8)
        return float(step(decoder, stack, state.replace(done_B=done))[2])

    alone = read(PROMPTS[:1], jnp.array([False]))
    assert 0.2 < alone < 0.8
    assert read(PROMPTS, jnp.array([False, True, True])) == pytest.approx(alone, abs=1e-6)
    assert read(PROMPTS, jnp.array([True, True, True])) == 0.0


def test_decoding_reads_active_experts_only():
    """Experts that no token uses may be anything: NaN in them leaves no trace."""
    model, params = make()
    bias_NE = params["layers"]["ffn"]["router"]["bias"].at[:, ::2].set(-100.0)
    params = jax.tree.map(lambda p: p, params)
    params["layers"]["ffn"]["router"]["bias"] = bias_NE
    poisoned = jax.tree.map(lambda p: p, params)
    for name in ("gate", "up", "down"):
        poisoned["layers"]["ffn"][name] = poisoned["layers"]["ffn"][name].at[:, ::2].set(jnp.nan)
    decoder = Decoder.of(model, params, "hard", eos_ids=())
    state = decoder.prefill([np.array(p) for p in PROMPTS], room=32)
    clean, _ = decoder.extend(state, jnp.int32(16), 32)
    dirty, _ = decoder.replace(params=poisoned).extend(state, jnp.int32(16), 32)
    np.testing.assert_array_equal(clean, dirty)
    assert np.asarray(clean)[:, :16].min() >= 0


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_sampling_frequencies_follow_the_softmax(temperature):
    model, params = make()
    rows = 2000
    logits_V = model.apply({"params": params}, jnp.asarray([PROMPTS[0]])).logits[0, -1]
    expected_V = np.asarray(jax.nn.softmax(logits_V / temperature))
    noise_V = np.sqrt(expected_V * (1 - expected_V) / rows)
    untempered_V = np.asarray(jax.nn.softmax(logits_V))
    assert (np.abs(untempered_V - expected_V) > 20 * noise_V + 1 / rows).any()
    new = generate(
        model, params, [PROMPTS[0]] * rows, max_new_tokens=1, temperature=temperature, seed=3
    )
    frequency_V = np.bincount(np.array(new)[:, 0], minlength=expected_V.size) / rows
    assert (np.abs(frequency_V - expected_V) < 4.5 * noise_V + 1 / rows).all()


@pytest.mark.parametrize("limit", [{"top_k": 1, "top_p": 0.9}, {"top_p": 1e-6}])
def test_the_narrowest_sampling_is_greedy(limit):
    model, params = make()
    greedy = generate(model, params, PROMPTS, max_new_tokens=20)
    assert greedy == generate(model, params, PROMPTS, max_new_tokens=20, temperature=1.5, **limit)


def test_top_k_and_top_p_keep_what_they_say():
    logits_V = jnp.log(jnp.asarray([[0.1, 0.4, 0.05, 0.3, 0.15]], jnp.float32))

    def kept(**settings):
        allowed = Decoder.of(*make(), temperature=1.0, **settings).allowed_logits(logits_V)
        return set(np.flatnonzero(np.isfinite(allowed[0])).tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {1, 3}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}
    assert kept(top_p=0.75) == {1, 3, 4}  # 0.4 + 0.3 < 0.75
    assert kept(top_p=0.75, top_k=4) == {1, 3, 4}  # 0.7 / 0.95 < 0.75
    assert kept(top_p=0.75, top_k=3) == {1, 3}  # 0.7 / 0.85 > 0.75


@pytest.mark.parametrize("spread", [3.0, 0.1])  # some hundred tokens have 0.9, or nearly all
def test_top_p_of_a_large_vocabulary_is_the_fewest_tokens(spread):
    """By NumPy; ties, of which the lowest ids stay, are there as well."""
    rng = np.random.default_rng(0)
    logits_BV = (spread * rng.normal(size=(2, 5000))).round(2).astype(np.float32)
    allowed = Decoder.of(*make(), temperature=1.0, top_p=0.9).allowed_logits(jnp.asarray(logits_BV))
    numbers = []
    for row_V, got_V in zip(logits_BV.astype(np.float64), np.isfinite(allowed), strict=True):
        order_V = np.argsort(-row_V, kind="stable")
        probs_V = np.exp(row_V[order_V]) / np.exp(row_V).sum()
        numbers.append(1 + np.searchsorted(np.cumsum(probs_V), 0.9))
        assert set(np.flatnonzero(got_V)) == set(order_V[: numbers[-1]])
    assert (max(numbers) < decoding.LIKELIEST) == (spread > 1) and min(numbers) > 100


def test_a_large_vocabulary_is_not_sorted():
    logits_BV = jax.ShapeDtypeStruct((1, 50_000), jnp.float32)
    for limit, sorts in ({"top_k": 50}, 0), ({"top_p": 0.9}, 1):
        allowed = jax.jit(Decoder.of(*make(), temperature=1.0, **limit).allowed_logits)
        text = allowed.lower(logits_BV).compile().as_text()
        main = text[text.index("\nENTRY") :]
        assert text.count(" sort(") == sorts and " sort(" not in main and "TopK" in main


def test_seed_and_place_decide_a_sampled_text():
    model, params = make()
    sample = functools.partial(generate, model, params, max_new_tokens=20, temperature=1.0)
    first = sample(PROMPTS, seed=1)
    assert first == sample(PROMPTS, seed=1)
    assert first != sample(PROMPTS, seed=2)
    assert first[0] == sample([PROMPTS[0], PROMPTS[2], PROMPTS[1]], seed=1)[0]
    thrice = sample([PROMPTS[0]] * 3, seed=1)
    assert thrice[0] == first[0] and thrice[0] != thrice[1] != thrice[2]
    assert first == sample(PROMPTS, seed=1, stream=lambda fresh: None)
    cold = generate(model, params, PROMPTS, max_new_tokens=20, temperature=1e-4)
    assert cold == generate(model, params, PROMPTS, max_new_tokens=20)


def test_the_steps_of_a_text_are_sampled_apart():
    """All 61 tokens equally likely, always: 40 draws have 29 different ones, give or take 3."""
    model, params = make()
    flat = params | {"lm_head": jax.tree.map(jnp.zeros_like, params["lm_head"])}
    for row in generate(model, flat, PROMPTS, max_new_tokens=40, temperature=1.0):
        assert 18 < len(set(row)) <= 40


def test_eos_ends_a_row_and_no_other():
    model, params = make()
    free = generate(model, params, PROMPTS, max_new_tokens=20, eos_ids=())
    # One that ends the first row alone, and one that ends the second alone.
    first, second = ([t for t in free[i] if t not in free[1 - i]] for i in (0, 1))
    eos_ids = (first[0], second[0])
    ended = generate(model, params, PROMPTS, max_new_tokens=20, eos_ids=eos_ids)
    for row, whole in zip(ended, free, strict=True):
        stops = [i for i, token in enumerate(whole) if token in eos_ids]
        assert row == whole[: stops[0] + 1 if stops else None]
    assert ended[0][-1] == eos_ids[0] and ended[1][-1] == eos_ids[1]
    # All rows at their end: the loop stops.
    decoder = Decoder.of(model, params, "hard", eos_ids=eos_ids)
    state = decoder.prefill([np.array(PROMPTS[0])] * 3, room=20)
    _, state = decoder.extend(state, jnp.int32(20), 32)
    assert int(state.step) == len(ended[0])


def test_eos_of_the_model():
    model, params = make()
    model = model.clone(config=dataclasses.replace(model.config, eos_ids=(2, 7)))
    assert Decoder.of(model, params).eos_ids == (2, 7)
    assert Decoder.of(model, params, eos_ids=()).eos_ids == ()


def test_repeated_calls_compile_nothing():
    model, params = make()
    run = functools.partial(generate, model, params)
    run(PROMPTS, max_new_tokens=10, temperature=0.5, top_p=0.9)
    before = Decoder.extend._cache_size(), Decoder._prefill._cache_size()
    other = [p[::-1] + [1, 2] for p in PROMPTS]
    same = Transformer(model.config, model.lte)  # another object
    run = functools.partial(generate, same, params)
    run(other, max_new_tokens=20, temperature=0.9, top_p=0.5, seed=4, threshold=0.6)
    assert before == (Decoder.extend._cache_size(), Decoder._prefill._cache_size())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("token", [PROMPTS[0][0], None])
def test_logits_that_are_not_finite_are_named_and_not_chosen_from(temperature, token):
    """From the first token on, or once the model has written the token whose embedding is NaN."""
    model, params = make()
    settings = {"max_new_tokens": 20, "temperature": temperature, "eos_ids": ()}
    if token is None:
        token = generate(model, params, PROMPTS[:1], **settings)[0][12]
    table = params["embed"]["embedding"]
    broken = params | {"embed": {"embedding": table.at[token].set(jnp.nan)}}
    streamed = []
    with pytest.raises(UserError, match=r"logits are not finite after \d+ new tokens"):
        generate(model, broken, PROMPTS[:1], stream=streamed.append, **settings)
    whole = generate(model, params, PROMPTS[:1], **settings)[0]
    shown = [t for chunk in streamed for t in chunk[0]]
    assert shown == whole[: len(shown)] and (len(shown) == 0) == (token == PROMPTS[0][0])


def test_going_on_does_not_copy_the_cache():
    """Its memory is that of the state before, and the tokens are the same."""
    decoder = Decoder.of(*make(), eos_ids=())
    start = decoder.prefill([np.array(p) for p in PROMPTS], room=32)
    expected, _ = decoder.extend(start, jnp.int32(9), 32)
    place = start.cache["k"].unsafe_buffer_pointer()
    tokens, state = decoder.go_on(start, jnp.int32(9), 32)
    np.testing.assert_array_equal(tokens, expected)
    assert state.cache["k"].unsafe_buffer_pointer() == place
    assert start.cache["k"].is_deleted()


def test_memory_of_a_long_prompt_grows_with_its_length():
    """And not with its square; a step needs none beside its cache."""
    model, params = make(max_length=1 << 13)
    decoder, taken = Decoder.of(model, params, eos_ids=()), []
    for length in (1000, 4000):
        laid = decoding.laid_out([np.ones(length, np.int32)], 40)
        how = {"turn": laid[3]}
        first = Decoder._prefill.lower(decoder, *laid[:3], jax.random.key(0), **how)
        taken.append(first.compile().memory_analysis().temp_size_in_bytes)
        state = decoder._prefill(*laid[:3], jax.random.key(0), **how)
        step = Decoder.go_on.lower(decoder, state, jnp.int32(3), 32)
        step = step.compile().memory_analysis()
        cache = sum(state.cache[name].size * 4 for name in ("k", "v"))
        assert step.temp_size_in_bytes < cache / 20 and step.alias_size_in_bytes >= cache
    assert taken[1] < 4.5 * taken[0]
