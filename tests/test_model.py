"""The forward pass: positions, stored types, what routers are computed in, exactly k experts."""

import dataclasses
import functools
import re

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import data, kernels
from lte_jax.config import LTEConfig, RopeScaling, UserError
from lte_jax.generation.decoding import Decoder, DecodeState, computed
from lte_jax.model import Transformer, init_cache
from lte_jax.routing import TopK

APPLY = jax.jit(lte_jax.apply, static_argnums=0, static_argnames="routing")
SLIDING = {"sliding_window": 4, "sliding_layers": (True, False)}


# --------------------------------------------------------------------------------------- by hand

PLAIN = dataclasses.replace(tiny.CONFIG, d_ff=40)
VARIANTS = {
    "plain": PLAIN,
    "everything": dataclasses.replace(
        PLAIN, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=True,
        sliding_window=3, sliding_layers=(True, False), norm_eps=0.3, activation="relu",
        rope_theta=100.0, rope_scaling=RopeScaling("linear", 2.0),
    ),
    "without gates": dataclasses.replace(PLAIN, gated=False, mlp_bias=True, sliding_window=4),
}  # fmt: skip
SEGMENTS = np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 0])  # one text in another, and padding


def drawn(config, lte):
    """A model all of whose parameters are random, norms and biases too."""
    model, params = tiny.model_and_params(lte, config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        std = 0.3 if path[-1].key == "scale" or path[-1].key.endswith("bias") else 0.25
        return jnp.asarray(mean + std * rng.standard_normal(leaf.shape), leaf.dtype)

    return model, jax.tree.map_with_path(draw, params)


def by_hand(config, lte, params, tokens_L, routing, threshold):
    """Logits [L, V], scores and active experts [N, L, E] in float64, a query at a time."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    layers, length = params["layers"], len(tokens_L)
    place_L = [np.sum(SEGMENTS[:i] == SEGMENTS[i]) for i in range(length)]
    pairs = config.head_dim // 2
    stretch = config.rope_scaling.factor if config.rope_scaling else 1.0
    angles_LC = np.outer(place_L, config.rope_theta ** (-np.arange(pairs) / pairs) / stretch)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def heads(name, x_LD, n):
        attn = layers["attn"]
        y_LHC = np.einsum("LD,DHC->LHC", x_LD, attn[name]["kernel"][n])
        y_LHC += attn[name]["bias"][n] if config.qkv_bias else 0.0
        if name == "v":
            return y_LHC
        if config.qk_norm:
            y_LHC = norm(y_LHC, attn[f"{name}_norm"]["scale"][n])
        turn_L1C = np.exp(1j * angles_LC)[:, None]  # number c of a head and c + C/2 are a plane
        turned = (y_LHC[..., :pairs] + 1j * y_LHC[..., pairs:]) * turn_L1C
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(x_LD, n):
        q_LHC, k_LKC, v_LKC = (heads(name, x_LD, n) for name in "qkv")
        slides = config.sliding_layers[n] if config.sliding_layers else config.sliding_window
        y_LHC = np.zeros_like(q_LHC)
        for i, h in np.ndindex(length, config.num_heads):
            k = h // (config.num_heads // config.num_kv_heads)
            seen = [j for j in range(i + 1) if SEGMENTS[j] == SEGMENTS[i]]
            seen = seen[-config.sliding_window :] if slides else seen
            weight = np.exp(k_LKC[seen, k] @ q_LHC[i, h] / config.head_dim**0.5)
            y_LHC[i, h] = weight @ v_LKC[seen, k] / weight.sum()
        out = layers["attn"]["o"]
        y_LD = np.einsum("LHC,HCD->LD", y_LHC, out["kernel"][n])
        return y_LD + (out["bias"][n] if config.out_bias else 0.0)

    def ffn(x_LD, n):
        w = {name: p[n] for name, p in layers["ffn"].items() if name != "router"}

        def project(name):
            y_LEM = np.einsum("LD,EMD->LEM", x_LD, w[name])
            return y_LEM + w[f"{name}_bias"] if config.mlp_bias else y_LEM

        act = {"relu": lambda z: np.maximum(z, 0), "silu": lambda z: z / (1 + np.exp(-z))}
        act = act[config.activation]
        h_LEM = act(project("gate")) * project("up") if config.gated else act(project("up"))
        router = {name: p[n] for name, p in layers["ffn"]["router"].items()}
        score_LE = 1 / (1 + np.exp(-(x_LD @ router["kernel"] + router["bias"])))
        active_LE = score_LE > threshold
        if routing == "top_k":  # two of five
            active_LE = score_LE >= np.sort(score_LE)[:, -2:-1]
        factor_LE = {"dense": np.ones_like(score_LE), "soft": score_LE}.get(routing, active_LE)
        y_LD = np.einsum("LEM,LE,EMD->LD", h_LEM, factor_LE, w["down"])
        return y_LD + (w["down_bias"] if config.mlp_bias else 0.0), score_LE, active_LE

    x_LD, scores, active = params["embed"]["embedding"][tokens_L], [], []
    for n in range(config.num_layers):
        x_LD = x_LD + attention(norm(x_LD, layers["attn_norm"]["scale"][n]), n)
        y_LD, score_LE, active_LE = ffn(norm(x_LD, layers["ffn_norm"]["scale"][n]), n)
        x_LD, scores, active = x_LD + y_LD, [*scores, score_LE], [*active, active_LE]
    tied = config.tie_embeddings
    head_DV = params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"]
    logits_LV = norm(x_LD, params["final_norm"]["scale"]) @ head_DV
    return logits_LV, np.stack(scores), np.stack(active)


@pytest.mark.parametrize(
    ("variant", "routing"),
    [
        *((variant, "hard") for variant in VARIANTS),
        *(("plain", routing) for routing in ("dense", "soft", "straight_through", "top_k")),
    ],
)
def test_a_forward_pass_by_hand(variant, routing):
    """Every part of a block, for each kind of model and of routing, in float64 and plain loops."""
    config, lte = VARIANTS[variant], LTEConfig(expert_size=8, target_sparsity=0.6)
    model, params = drawn(config, lte)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, len(SEGMENTS))
    out = APPLY(model, params, tokens[None], mask=SEGMENTS[None], routing=routing, threshold=0.45)
    real = SEGMENTS > 0
    logits, scores, active = by_hand(config, lte, params, tokens, routing, 0.45)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(out.logits[0, real], logits[real], atol=2e-4)
    if routing == "dense":
        assert out.scores is None and out.active is None and out.sparsity == 0
        return
    np.testing.assert_allclose(out.scores[:, 0, real], scores[:, real], atol=1e-5)
    np.testing.assert_array_equal(out.active[:, 0, real], active[:, real])
    assert 0.2 < active.mean() < 0.8 and out.sparsity == pytest.approx(1 - active[:, real].mean())


def test_a_score_on_the_threshold_is_not_above_it():
    """Eq. 2: all scores are one half, so at one half no expert runs, and just below all do."""
    model, params = drawn(PLAIN, tiny.LTE)
    router = jax.tree.map(jnp.zeros_like, params["layers"]["ffn"]["router"])
    params["layers"]["ffn"] = params["layers"]["ffn"] | {"router": router}
    tokens = np.arange(6)[None]
    for threshold, expected in ((0.5, 1.0), (0.4999, 0.0)):
        out = APPLY(model, params, tokens, routing="hard", threshold=threshold)
        assert float(out.sparsity) == pytest.approx(expected, abs=1e-6)


@jax.numpy_dtype_promotion("standard")  # jax.nn.dot_product_attention promotes bfloat16
def test_norms_are_computed_in_float32():
    """Blocks that add nothing and a head that changes nothing: logits are the last norm alone.

    In bfloat16 they are the exact values, rounded once.
    """
    config = dataclasses.replace(tiny.CONFIG, vocab_size=tiny.CONFIG.d_model)
    model, params = tiny.model_and_params(None, config, dtype="bfloat16")
    layers = params["layers"]
    layers["attn"]["o"]["kernel"] = jnp.zeros_like(layers["attn"]["o"]["kernel"])
    layers["ffn"]["down"] = jnp.zeros_like(layers["ffn"]["down"])
    params["lm_head"]["kernel"] = jnp.eye(config.d_model)
    x_VD = np.asarray(3.0 * params["embed"]["embedding"].astype(jnp.bfloat16))
    params["embed"]["embedding"] = jnp.asarray(x_VD, jnp.float32)
    logits_VD = APPLY(model, params, np.arange(32)[None]).logits[0]
    x_VD = x_VD.astype(np.float64)
    exact_VD = x_VD / np.sqrt(np.mean(x_VD**2, axis=-1, keepdims=True) + config.norm_eps)
    rounded_VD = exact_VD.astype(jnp.bfloat16).astype(np.float32)
    assert np.mean(np.asarray(logits_VD) == rounded_VD) > 0.99


# ------------------------------------------------------------------------------------- positions


def lay(text, slots, length):
    """A row with the text in the given slots, and its mask."""
    tokens, mask = np.full((1, length), 63), np.zeros((1, length), bool)
    tokens[0, slots], mask[0, slots] = text, True
    return tokens, mask


@pytest.mark.parametrize("changes", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize(
    "slots",
    [
        [*range(6), *range(8, 14)],
        [*range(12)],
        [*range(4, 16)],
        [0, 1, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15],
    ],
    ids=["hole", "right", "left", "holes"],
)
def test_a_text_is_the_same_wherever_its_padding_lies(slots, changes):
    config = dataclasses.replace(tiny.CONFIG, **changes)
    model, params = tiny.model_and_params(config=config)
    text = np.random.default_rng(0).integers(0, 64, 12)
    expected = APPLY(model, params, text[None]).logits[0]
    assert np.abs(expected).max() > 0.5
    tokens, mask = lay(text, slots, 16)
    out = APPLY(model, params, tokens, mask=mask)
    np.testing.assert_allclose(out.logits[0, slots], expected, atol=1e-4)
    # In pieces, through the cache.
    apply = jax.jit(model.apply)
    cache, logits = init_cache(model, 1, 16), []
    for start in range(0, 16, 4):
        part = slice(start, start + 4)
        out = apply({"params": params}, tokens[:, part], mask=mask[:, part], cache=cache)
        cache, logits = out.cache, [*logits, out.logits[0]]
    np.testing.assert_allclose(np.concatenate(logits)[slots], expected, atol=1e-4)
    # And one by one as `generate` does, after a prefill of the padded prompt.
    size = int(mask[0, :8].sum())
    out = apply({"params": params}, tokens[:, :8], mask=mask[:, :8], cache=init_cache(model, 1, 24))
    decoder, state = Decoder.of(model, params), DecodeState.start(out.cache, jax.random.key(0))
    stack, step = decoder.stack(), jax.jit(Decoder.step)
    for i in range(size, 12):
        state = state.replace(tokens_B=jnp.asarray(text[i : i + 1], jnp.int32))
        logits_BV, cache, _ = step(decoder, stack, state)
        state = state.replace(cache=cache)
        np.testing.assert_allclose(logits_BV[0], expected[i], atol=1e-4)


def test_segments_count_for_themselves():
    model, params = tiny.model_and_params()
    tokens = np.random.default_rng(0).integers(0, 64, (1, 10))
    mask = np.array([[1, 2, 1, 0, 2, 2, 1, 0, 1, 2]])  # two texts, one in the other
    out = APPLY(model, params, tokens, mask=mask)
    for segment in (1, 2):
        [at] = np.nonzero(mask[0] == segment)
        alone = APPLY(model, params, tokens[:, at])
        np.testing.assert_allclose(out.logits[0, at], alone.logits[0], atol=1e-4)


# ---------------------------------------------------------------------------------- stored types


@pytest.mark.parametrize("stored", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_stored_type_runs_as_it_loads(stored, tmp_path):
    raw = hf_models.config_json("llama", torch_dtype=stored, num_hidden_layers=2)
    folder = hf_models.write_folder(tmp_path / "dense", raw, dtype=stored)
    dense, params = lte_jax.load(folder)
    assert dense.dtype == ("float32" if stored == "float16" else stored)  # on a CPU
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {stored}
    tokens = np.random.default_rng(0).integers(0, 97, (4, 24))
    exact, masters = lte_jax.load(folder, "float32")
    expected = lte_jax.apply(exact, masters, tokens).logits
    for apply in (lte_jax.apply, jax.jit(lte_jax.apply, static_argnums=0)):
        atol = 0.15 if stored == "bfloat16" else 1e-5
        np.testing.assert_allclose(apply(dense, params, tokens).logits, expected, atol=atol)
    for grouping in ("coactivation", "kmeans"):
        model, sparse = lte_jax.moefy(dense, params, tokens, expert_size=8, grouping=grouping)
    lte_jax.save(tmp_path / "lte", model, sparse, source=folder)
    model, sparse = lte_jax.load(tmp_path / "lte")
    assert sparse["layers"]["ffn"]["down"].dtype == stored
    texts = [
        lte_jax.generate(model, sparse, tokens[:2], max_new_tokens=3, implementation=name)
        for name in ("xla", "cpu", "reference")
        if not kernels.unavailable(name)
    ]
    assert all(text == texts[0] for text in texts)
    rows = data.pad(list(tokens), 24)
    assert lte_jax.evaluate(model, sparse, rows, baseline=(dense, params), latency_rounds=1)


def test_float16_is_said_once_and_no_type_to_compute_in(caplog):
    lte_jax._compute_dtype.cache_clear()
    assert [lte_jax._compute_dtype("float16") for _ in range(2)] == ["float32"] * 2
    assert [r.getMessage() for r in caplog.records] == [
        "weights are stored in float16; computing in float32 on cpu"
    ]
    for make in (
        functools.partial(Transformer, tiny.CONFIG),
        functools.partial(lte_jax.load, "no"),
    ):
        with pytest.raises(UserError, match="computes in float32 or bfloat16"):
            make(dtype="float16")


def test_float16_is_computed_in_bfloat16_on_an_accelerator(monkeypatch, caplog):
    lte_jax._compute_dtype.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lte_jax._compute_dtype("float16") == "bfloat16"
    assert "computing in bfloat16 on gpu" in caplog.text
    lte_jax._compute_dtype.cache_clear()


def test_weights_are_converted_once():
    model, params = tiny.model_and_params(dtype="bfloat16")
    used = computed(model, params)
    assert used["layers"]["ffn"]["up"].dtype == "bfloat16"
    assert used["layers"]["ffn"]["router"]["kernel"].dtype == "float32"
    assert computed(model, used)["layers"]["ffn"]["up"] is used["layers"]["ffn"]["up"]


# --------------------------------------------------------------------------------------- routers


def products(text, experts):
    """The products whose result ends in so many experts, as they are lowered."""
    found = re.findall(r"stablehlo\.dot_general .*", text)
    return [line for line in found if re.search(rf"-> tensor<[0-9x]*x{experts}xf32>", line)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routers_are_float32_products(dtype):
    """Everywhere: other rounding chooses other experts. 8 experts; no other width is 8 or 5."""
    config = dataclasses.replace(tiny.CONFIG, head_dim=16, num_heads=2, d_ff=40)
    model, params = tiny.model_and_params(config=config, dtype=dtype)
    decoder = Decoder.of(model, params)
    tokens = np.ones((3, 7), np.int32)
    apply = jax.jit(lambda p, t: model.apply({"params": p}, t).logits)
    lowered = [apply.lower(decoder.params, tokens).as_text()]
    stack, state = decoder.stack(), decoder.prefill([np.ones(3, int)] * 3, room=8)
    for name in ("xla", "reference"):
        step = jax.jit(lambda d, s: d.step(s, state)[0])
        lowered.append(step.lower(decoder.replace(implementation=name), stack).as_text())
    for text in lowered:
        lines = products(text, 5)
        assert lines
        for line in lines:
            assert "precision = [HIGHEST, HIGHEST]" in line, line
            assert re.search(r"\(tensor<[0-9x]*xf32>, tensor<[0-9x]*xf32>\)", line), line


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_exactly_k_experts(k):
    rng = np.random.default_rng(0)
    scores = np.stack([np.full(8, 0.5), np.ones(8), np.zeros(8), rng.random(8).round(1)])
    scores = scores.astype(np.float32)
    active = np.asarray(TopK(k).active(jnp.asarray(scores), 0.5))
    expected = np.zeros_like(active)
    for row, values in enumerate(scores):
        expected[row, sorted(range(8), key=lambda i: (-values[i], i))[:k]] = True
    np.testing.assert_array_equal(active, expected)


def test_exactly_k_tokens():
    logits = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]], jnp.float32)

    def kept(**settings):
        decoder = Decoder.of(*tiny.model_and_params(), temperature=1.0, **settings)
        return np.isfinite(decoder.allowed_logits(logits))

    assert kept(top_k=2).tolist() == [[False, True, True, False, False]]
    assert kept(top_p=0.5).tolist() == [[False, True, True, False, False]]  # 0.29 each
