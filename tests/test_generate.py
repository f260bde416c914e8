"""Generation: the cache changes nothing, sampling follows the distribution, streaming adds up."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lte_jax import hf
from lte_jax.__main__ import main
from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.data import byte_tokenizer, tokenize
from lte_jax.errors import UserError
from lte_jax.generate import decode, generate, generate_text
from lte_jax.generate.decoding import Decoder
from lte_jax.kernels import unavailable
from lte_jax.model import Transformer, abstract_params

LLAMA = ModelConfig(vocab_size=61, d_ff=96, max_length=128, num_kv_heads=2)
VARIANTS = {
    "llama": LLAMA,
    "sliding": dataclasses.replace(
        LLAMA, sliding_window=4, sliding_layers=(True, False), qk_norm=True, tie_embeddings=True
    ),
    "biases": dataclasses.replace(
        LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, activation="gelu"
    ),
}
PROMPTS = [[1, 7, 9, 30, 2, 2, 5], [4], [60, 3, 3, 18, 44, 12, 9, 9, 9, 23, 50]]


@functools.cache
def make(variant="llama", dtype="float32", **changes):
    """A random model whose routers keep about half of the experts and whose text is not a loop."""
    config = dataclasses.replace(VARIANTS[variant], **changes)
    model = Transformer(config, LTEConfig(expert_size=8), dtype=dtype)
    rng = np.random.default_rng(0)
    # A tied model needs lively blocks to say anything but its last token; others, a lively input.
    embed, block = (0.2, 4.0) if config.tie_embeddings else (3.0, 1.0)

    def draw(path, leaf):
        keys = {key.key for key in path}
        if "scale" in keys:
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = leaf.shape[-1] if keys & {"gate", "up", "down"} else math.prod(leaf.shape[1:-1])
        scale = 0.3 if path[-1].key.endswith("bias") else fan_in**-0.5
        scale *= block if keys & {"o", "down"} else 1.0
        scale = embed if "embed" in keys else scale
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return model, jax.tree.map_with_path(draw, abstract_params(model))


def by_full_forward(model, params, prompt, steps, routing=None):
    """Greedy decoding with no cache: the whole text anew for each token."""
    apply = jax.jit(
        lambda tokens, mask: model.apply({"params": params}, tokens, mask=mask, routing=routing)
    )
    ids = list(prompt)
    for _ in range(steps):
        tokens_1L = np.zeros((1, 64), np.int32)
        tokens_1L[0, : len(ids)] = ids
        logits_1LV = apply(tokens_1L, np.arange(64)[None] < len(ids)).logits
        ids.append(int(jnp.argmax(logits_1LV[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("variant", "routing"),
    [
        ("llama", "dense"),
        ("llama", "top_k"),
        ("llama", "hard"),
        ("sliding", "hard"),
    ],
)
def test_equals_repeated_full_forward(variant, routing):
    model, params = make(variant)
    new = generate(model, params, PROMPTS[:1], max_new_tokens=20, routing=routing)
    expected = by_full_forward(model, params, PROMPTS[0], 20, routing)
    assert new == [expected]
    assert len(set(expected)) >= 3  # else anything would pass


def test_routing_matters():
    """Hard and dense decoding differ, so the comparisons above compare something."""
    model, params = make()
    texts = [
        generate(model, params, PROMPTS, max_new_tokens=20, routing=r) for r in ("dense", "hard")
    ]
    assert texts[0] != texts[1]
    assert texts[0] == generate(
        model, params, PROMPTS, max_new_tokens=20, threshold=0.0, routing="hard"
    )


@pytest.mark.parametrize("routing", ["dense", "hard"])
def test_ragged_batch_equals_each_alone(routing):
    model, params = make()
    run = functools.partial(generate, model, params, max_new_tokens=25, routing=routing)
    together = run(PROMPTS)
    assert together == [run([prompt])[0] for prompt in PROMPTS]
    padded, mask = np.full((3, 12), 60), np.zeros((3, 12), bool)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    assert run(padded, mask=mask) == together


def test_dense_model_equals_lte_model_with_all_experts():
    model, params = make()
    dense = Transformer(model.config)
    ffn = {k: p for k, p in params["layers"]["ffn"].items() if k != "router"}
    one = {k: p.reshape(p.shape[0], 1, -1, p.shape[-1]) for k, p in ffn.items()}
    params_dense = params | {"layers": params["layers"] | {"ffn": one}}
    expected = generate(model, params, PROMPTS, max_new_tokens=25, routing="dense")
    assert generate(dense, params_dense, PROMPTS, max_new_tokens=25) == expected


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


def test_real_model(shared):
    folder = shared / "models" / "babyllama"
    config, lte = hf.read_config(folder)
    model = Transformer(config, lte)
    params = hf.load_params(folder, config, lte, dtype="float32")
    tokenizer = hf.load_tokenizer(folder)
    text = generate_text(model, params, tokenizer, "Once upon a time", max_new_tokens=40)
    prompt = tokenize(["Once upon a time"], tokenizer)[0].tolist()
    expected = by_full_forward(model, params, prompt, 40)
    assert "Once upon a time" + text == decode(tokenizer, prompt + expected)
    assert "there was a" in text


# -------------------------------------------------------------------------------------- sampling


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


# ------------------------------------------------------------------------- ending and streaming


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


@pytest.mark.parametrize("count", [1, 2, 8, 9, 30])
def test_streamed_tokens_add_up(count):
    model, params = make()
    chunks = []
    new = generate(model, params, PROMPTS, max_new_tokens=count, stream=chunks.append)
    assert [len(row) for row in new] == [count] * 3
    assert [sum((chunk[row] for chunk in chunks), []) for row in range(3)] == new
    assert new == generate(model, params, PROMPTS, max_new_tokens=count)


def test_streamed_text_adds_up():
    model, params = make(vocab_size=259)
    tokenizer = byte_tokenizer()
    for prompt in ("Zoë", "a", "1 + "):  # random bytes: mostly no valid UTF-8
        pieces = []
        run = functools.partial(generate_text, model, params, tokenizer, prompt, max_new_tokens=30)
        text = run(write=pieces.append)
        assert "".join(pieces) == text == run()
        assert len(pieces) > 1 and "\ufffd" in text


def test_no_half_character_is_streamed(monkeypatch):
    tokenizer, said = byte_tokenizer(), "naïve 日本 🎈 fin"

    def one_byte_at_a_time(model, params, prompts, *, stream):
        for byte in said.encode():
            stream([[byte]])
        return [list(said.encode())]

    monkeypatch.setattr(sys.modules[generate.__module__], "generate", one_byte_at_a_time)
    pieces = []
    assert generate_text(*make(), tokenizer, "Zoë ", write=pieces.append) == said
    assert "".join(pieces) == said
    assert len(pieces) == len(said)
    assert not any("\ufffd" in piece for piece in pieces)


def fallback_tokenizer():
    """A tokenizer of a few letters that spells whatever else there is as bytes, as Llama's does."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeZ"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    model = models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize("vocabulary", ["bytes", "fallback", "stories260k"])
def test_pieces_of_any_tokens_add_up(vocabulary, monkeypatch, request):
    """Byte fallback too, where one wrong byte turns the characters before it into replacements."""
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    encoded = list("né日🎈".encode())
    if vocabulary == "fallback":
        tokenizer = fallback_tokenizer()
    elif vocabulary != "bytes":
        shared = request.getfixturevalue("shared")
        tokenizer = hf.load_tokenizer(shared / "models" / vocabulary)
    if vocabulary != "bytes":
        encoded = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in encoded]
    prompt = tokenize(["Zoë "], tokenizer)[0].tolist()
    ends = 0
    for seed in range(200):
        ids = rng.integers(0, len(tokenizer), rng.integers(1, 12)).tolist()
        for _ in range(rng.integers(0, 3)):  # whole characters, and some cut in two
            ids += encoded[: rng.integers(1, len(encoded) + 1)]
        ids += rng.integers(0, len(tokenizer), rng.integers(0, 3)).tolist()

        def by_chunks(model, params, prompts, *, stream, ids=ids, size=1 + seed % 3):
            for start in range(0, len(ids), size):
                stream([ids[start : start + size]])
            return [ids]

        monkeypatch.setattr(sys.modules[generate.__module__], "generate", by_chunks)
        pieces = []
        text = generate_text(*make(), tokenizer, "Zoë ", write=pieces.append)
        assert "".join(pieces) == text
        assert decode(tokenizer, prompt) + text == decode(tokenizer, prompt + ids)
        ends += text.endswith("\ufffd")
    assert 10 < ends < 190


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


def test_command_line(tmp_path, capsys, monkeypatch):
    model, params = make(vocab_size=259)
    hf.save(tmp_path / "model", model.config, model.lte, params)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    flags = ["lte_jax", str(tmp_path / "model"), "Hello", "--max-new-tokens", "30"]
    monkeypatch.setattr(sys, "argv", flags)
    main()
    settings = {"write": lambda text: None, "max_new_tokens": 30}
    text = generate_text(model, params, byte_tokenizer(), "Hello", **settings)
    assert capsys.readouterr().out == f"Hello{text}\n"


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
