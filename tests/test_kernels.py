"""Every implementation behind the dispatch keeps the contract of kernels/README.md."""

import functools
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lte_jax import kernels
from lte_jax.config import UserError
from lte_jax.kernels import reference, triton_call

E = 10
# Neurons of an expert and model width: odd ones, where the hardware has no say.
SIZES = {"triton": (6, 48), "pallas": (16, 128)}
# Accumulation is float32 in both, so what remains is rounding of the inputs of the down projection
# (hidden activations) and of the output: a few units in the last place of the type.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


@pytest.fixture(params=kernels.IMPLEMENTATIONS)
def implementation(request):
    if reason := kernels.unavailable(request.param):
        pytest.skip(reason)
    return request.param


def make(rows, dtype="float32", gated=True, biases=(), layers=None, seed=0, implementation="xla"):
    rng = np.random.default_rng(seed)
    lead = () if layers is None else (layers,)
    m, d = SIZES.get(implementation, (6, 20))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape, scale=0.5), dtype)

    names = ("gate", "up", "down") if gated else ("up", "down")
    weights = {name: normal(*lead, E, m, d) for name in names}
    weights |= {f"{name}_bias": normal(*lead, E, m) for name in biases}
    return normal(rows, d), weights


def mask(rows, kind, seed=0):
    active_BE = np.zeros((rows, E), bool)
    if kind == "all":
        active_BE[:] = True
    elif kind == "one":
        active_BE[:, E - 1] = True
    elif kind == "disjoint":
        for expert in range(E):
            active_BE[expert % rows, expert] = True
    elif kind == "some":
        active_BE = np.random.default_rng(seed).random((rows, E)) < 0.4
    return jnp.asarray(active_BE)


def by_hand(x_BD, active_BE, weights, activation):
    """The formula of the contract in float64, one row, expert and neuron at a time."""
    act = {
        "silu": lambda z: z / (1 + math.exp(-z)),
        "relu": lambda z: max(z, 0.0),
        "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
        "gelu_tanh": lambda z: (
            0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        ),
    }[activation]
    x_BD, active_BE = np.asarray(x_BD, np.float64), np.asarray(active_BE)
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    y_BD = np.zeros_like(x_BD)
    for b, e in zip(*np.nonzero(active_BE), strict=True):
        for m in range(w["up"].shape[1]):

            def neuron(name, b=b, e=e, m=m):
                bias = w[f"{name}_bias"][e, m] if f"{name}_bias" in w else 0.0
                return float(w[name][e, m] @ x_BD[b] + bias)

            h = act(neuron("gate")) * neuron("up") if "gate" in w else act(neuron("up"))
            y_BD[b] += h * w["down"][e, m]
    return y_BD


def error(y, expected):
    scale = np.abs(np.asarray(expected, np.float64)).max() or 1.0
    return np.abs(np.asarray(y, np.float64) - np.asarray(expected, np.float64)).max() / scale


@functools.cache
def compiled(implementation, activation="silu"):
    """The dispatch under jit, so that shapes met before are not compiled again."""
    return jax.jit(
        lambda x, active, weights, layer=None: kernels.sparse_ffn(
            x, active, weights, activation=activation, layer=layer, implementation=implementation
        )
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(
    ("gated", "biases"), [(True, ()), (True, ("gate", "up")), (False, ("up",))]
)
def test_formula(implementation, activation, gated, biases):
    x_BD, weights = make(3, gated=gated, biases=biases, implementation=implementation)
    active_BE = mask(3, "some")
    y_BD = compiled(implementation, activation)(x_BD, active_BE, weights)
    assert error(y_BD, by_hand(x_BD, active_BE, weights, activation)) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
def test_masks(implementation, dtype, rows):
    x_BD, weights = make(rows, dtype, implementation=implementation)
    exact = {name: w.astype(jnp.float32) for name, w in weights.items()}
    for kind in ("none", "one", "some", "disjoint", "all"):
        active_BE = mask(rows, kind)
        y_BD = compiled(implementation)(x_BD, active_BE, weights)
        assert y_BD.dtype == x_BD.dtype
        expected = compiled("reference")(x_BD.astype(jnp.float32), active_BE, exact)
        assert error(y_BD, expected) < TOLERANCE[dtype], kind
        idle = ~np.asarray(active_BE).any(axis=1)
        assert not np.asarray(y_BD)[idle].any(), kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 26])
@pytest.mark.parametrize("implementation", ["xla", "cpu"], indirect=True)
def test_experts_of_all_rows_and_of_some(implementation, dtype, rows):
    """Of more outputs and experts than are computed together, and of sizes that are not whole."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape, scale=0.2), dtype)  # noqa: E731
    weights = {name: draw(24, 40, 300) for name in ("gate", "up", "down")}
    active_BE = rng.random((rows, 24)) < 0.5
    active_BE[:, :11] = active_BE[:, 13:17] = True
    active_BE[:, 14] = False
    x_BD = draw(rows, 300)
    y_BD = compiled(implementation)(x_BD, active_BE, weights)
    exact = {name: w.astype(jnp.float32) for name, w in weights.items()}
    expected = compiled("reference")(x_BD.astype(jnp.float32), active_BE, exact)
    assert error(y_BD, expected) < 2 * TOLERANCE[dtype]  # thousands of terms


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("implementation", ["xla", "cpu"], indirect=True)
def test_activations_far_from_zero(implementation, activation):
    """Each by itself, to a few units in the last place, also beyond the range of exponentials."""
    z = np.concatenate([np.linspace(-12, 12, 477), [-1e30, -300, -95, -88, -87, 88, 89, 300, 1e30]])
    z = np.concatenate([z, np.zeros(-len(z) % 6)]).astype(np.float32)
    up = jnp.eye(len(z)).reshape(-1, 6, len(z))
    ones = jnp.ones((1, len(up)), bool)
    y_D = compiled(implementation, activation)(z[None], ones, {"up": up, "down": up})[0]
    with np.errstate(over="ignore"):
        exact = {
            "silu": lambda z: z / (1 + np.exp(-z)),
            "relu": lambda z: np.maximum(z, 0),
            "gelu": lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
            "gelu_tanh": lambda z: (
                0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            ),
        }[activation](z.astype(np.float64))
    near = 2e-6 if activation == "silu" else 5e-5  # far from 0, the others' 1 + tanh cancels
    np.testing.assert_allclose(y_D, exact, rtol=near, atol=1e-6)


def test_rows_keep_to_their_own_experts(implementation):
    x_BD, weights = make(8, implementation=implementation)
    active_BE = mask(8, "some")
    ffn = compiled(implementation)
    together = ffn(x_BD, active_BE, weights)
    alone = [ffn(x_BD[b : b + 1], active_BE[b : b + 1], weights) for b in range(8)]
    assert error(together, jnp.concatenate(alone)) < TOLERANCE["float32"]


@pytest.mark.parametrize("biases", [(), ("up",), ("gate",), ("gate", "up")])
def test_stacked_layers(implementation, biases):
    x_BD, stacked = make(2, layers=4, biases=biases, implementation=implementation)
    active_BE = mask(2, "some")
    for layer in range(4):
        y_BD = compiled(implementation, "gelu")(x_BD, active_BE, stacked, jnp.int32(layer))
        weights = {name: w[layer] for name, w in stacked.items()}
        assert error(y_BD, by_hand(x_BD, active_BE, weights, "gelu")) < TOLERANCE["float32"]


def test_ten_runs_give_the_same_bits(implementation):
    x_BD, weights = make(3, "bfloat16", implementation=implementation)
    ffn = compiled(implementation)
    runs = [np.asarray(ffn(x_BD, mask(3, "some"), weights)) for _ in range(10)]
    assert len({run.view(np.uint16).tobytes() for run in runs}) == 1


@pytest.mark.parametrize("implementation", ["xla", "cpu", "triton", "pallas"], indirect=True)
def test_idle_experts_are_not_read(implementation):
    """Idle experts full of NaN leave no trace, as they would if a masked product read them."""
    x_BD, stacked = make(2, layers=2, implementation=implementation)
    active_BE = mask(2, "one")
    poisoned = {
        name: jnp.full_like(w, jnp.nan).at[1, E - 1].set(w[1, E - 1]) for name, w in stacked.items()
    }
    y_BD = compiled(implementation)(x_BD, active_BE, poisoned, jnp.int32(1))
    weights = {name: w[1] for name, w in stacked.items()}
    assert error(y_BD, by_hand(x_BD, active_BE, weights, "silu")) < TOLERANCE["float32"]


def test_the_xla_loop_copies_no_layer():
    weights = {
        name: jax.ShapeDtypeStruct((4, 64, 32, 128), jnp.float32) for name in ("gate", "up", "down")
    }
    x_BD = jax.ShapeDtypeStruct((1, 128), jnp.float32)
    active_BE = jax.ShapeDtypeStruct((1, 64), bool)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    made = compiled("xla").lower(x_BD, active_BE, weights, layer).compile()
    one_layer = 64 * 32 * 128 * 4
    assert made.memory_analysis().temp_size_in_bytes < one_layer / 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear(implementation, dtype, transposed):
    rng = np.random.default_rng(0)
    for rows, k, o in ((1, 20, 33), (3, 130, 8), (8, 64, 256), (13, 1100, 300), (1, 1100, 40)):
        x_BK = jnp.asarray(rng.normal(size=(rows, k)), dtype)
        w = jnp.asarray(rng.normal(size=(2, o, k) if transposed else (2, k, o)), dtype)
        product = functools.partial(
            kernels.linear, transposed=transposed, implementation=implementation
        )
        exact = np.asarray(w, np.float64)
        for y_BO, layer in (
            (product(x_BK, w, layer=jnp.int32(1)), exact[1]),
            (product(x_BK, w[0]), exact[0]),
        ):
            assert y_BO.dtype == jnp.float32
            expected = np.asarray(x_BK, np.float64) @ (layer.T if transposed else layer)
            assert error(y_BO, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_matrices_at_once(implementation, dtype):
    """Each product is the one that `linear` has: of q, k and v alike, of shared heads, of two."""
    rng = np.random.default_rng(0)
    for rows, k, widths in ((1, 64, (64, 64, 64)), (3, 130, (300, 20, 36)), (2, 20, (8, 24))):
        x_BK = jnp.asarray(rng.normal(size=(rows, k)), dtype)
        ws = [jnp.asarray(rng.normal(size=(2, k, o)), dtype) for o in widths]
        ys = kernels.linears(x_BK, ws, layer=1, implementation=implementation)
        for y_BO, w in zip(ys, ws, strict=True):
            assert y_BO.dtype == jnp.float32 and y_BO.shape == (rows, w.shape[2])
            expected = np.asarray(x_BK, np.float64) @ np.asarray(w[1], np.float64)
            assert error(y_BO, expected) < TOLERANCE["float32"]
    with pytest.raises(UserError, match=r"linear: x .* and w .*: expected \[B, K\] and \[K, O\]"):
        kernels.linears(x_BK[:, 1:], ws, layer=0, implementation=implementation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attend(implementation, dtype):
    """Records see different keys, some with gaps; some query heads share a kv head; long texts."""
    rng = np.random.default_rng(0)
    for rows, h, k, c, length, index in (
        (1, 4, 4, 16, 9, 4),
        (3, 8, 2, 24, 33, 32),
        (2, 3, 3, 40, 12, 4),
        (2, 4, 2, 16, 2100, 2000),
    ):
        q_BHC, keys, values = (
            jnp.asarray(rng.normal(size=shape), dtype)
            for shape in ((rows, h, c), *[(3, rows, length, k, c)] * 2)
        )
        visible_BT = rng.random((rows, length)) < 0.6
        visible_BT[-1, : index // 2] = False
        visible_BT[:, index] = True
        visible_BT[:, index + 1 :] = False
        hidden = ~visible_BT[None, :, :, None, None]
        values = jnp.where(hidden, jnp.asarray(1e3, dtype), values)  # would be noticed
        exact = [np.asarray(a, np.float64) for a in (q_BHC, keys[2], values[2])]
        new = keys[2, :, index], values[2, :, index]
        empty = (keys.at[2, :, index].set(0.0), values.at[2, :, index].set(0.0))
        q_BKGC = exact[0].reshape(rows, k, -1, c)
        scores = np.einsum("BKGC,BTKC->BKGT", q_BKGC, exact[1]) / math.sqrt(c)
        weights = np.exp(scores) * visible_BT[:, None, None]
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("BKGT,BTKC->BKGC", weights, exact[2]).reshape(rows, h, c)
        y_BHC, *caches = kernels.attend(
            q_BHC,
            *new,
            *empty,
            jnp.asarray(visible_BT),
            layer=2,
            index=jnp.int32(index),
            implementation=implementation,
        )
        for cache, before, after in zip(caches, empty, (keys, values), strict=True):
            np.testing.assert_array_equal(cache, after)
            assert not np.asarray(before[2, :, index]).any()  # what went in is as it was
        assert y_BHC.dtype == q_BHC.dtype
        assert error(y_BHC, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attend_many(implementation, dtype):
    """Padding, windows, shared heads, odd widths, queries beyond a block; nothing seen gives 0."""
    rng = np.random.default_rng(0)
    for rows, length, h, k, c, t, end, first, window in (
        (1, 5, 2, 2, 16, 32, 5, 0, 99),
        (2, 130, 6, 3, 24, 400, 380, 7, 999),
        (1, 70, 4, 1, 80, 300, 299, 0, 50),
        (2, 9, 2, 1, 8, 64, 64, 58, 99),
    ):
        q_BLHC = jnp.asarray(rng.normal(size=(rows, length, h, c)), dtype)
        caches = [np.asarray(rng.normal(size=(2, rows, t, k, c))) for _ in "kv"]
        for cache in caches:
            cache[:, :, end:] = np.nan  # as nothing may look there
        place_L1, place_1T = end - length + np.arange(length)[:, None], np.arange(t)[None]
        seen_LT = (place_1T <= place_L1) & (place_1T > place_L1 - window)
        first_B11 = first + 2 * np.arange(rows)[:, None, None]  # texts begin at different places
        seen_BLT = seen_LT & (place_1T >= first_B11)
        typed = [jnp.asarray(cache, dtype) for cache in caches]
        how = {"layer": jnp.int32(1), "end": jnp.int32(end), "implementation": implementation}
        y_BLHC = kernels.attend_many(q_BLHC, *typed, jnp.asarray(seen_BLT), **how)
        keys, values = (
            np.nan_to_num(np.asarray(x[1], np.float64)).repeat(h // k, 2) for x in typed
        )
        scores = np.einsum("blhc,bthc->bhlt", np.asarray(q_BLHC, np.float64), keys) / np.sqrt(c)
        shares = np.exp(scores) * seen_BLT[:, None]
        shares /= np.maximum(shares.sum(-1, keepdims=True), 1e-9)
        expected = np.einsum("bhlt,bthc->blhc", shares, values)
        assert y_BLHC.dtype == q_BLHC.dtype
        assert not np.asarray(y_BLHC)[~seen_BLT.any(2)].any()
        assert error(y_BLHC, expected) < TOLERANCE[dtype]
    with pytest.raises(UserError, match=r"attend_many: visible is bool\[2, 9, 63\], expected bool"):
        kernels.attend_many(q_BLHC, *typed, jnp.asarray(seen_BLT[..., 1:]), **how)
    with pytest.raises(UserError, match="attend_many: end is 65, expected 0 to 64"):
        kernels.attend_many(q_BLHC, *typed, jnp.asarray(seen_BLT), **how | {"end": 65})
    if implementation == "cpu":  # "auto" goes on without what refuses a type
        half = [a.astype(jnp.float16) for a in (q_BLHC, *typed)]
        y_BLHC = kernels.attend_many(*half, jnp.asarray(seen_BLT), layer=1, end=end)
        assert error(y_BLHC, expected) < TOLERANCE["bfloat16"]
        kernels._warn_once.cache_clear()  # what it has said may be said again


def test_compact():
    active_BE = jnp.asarray([[0, 1, 0, 0, 1], [0, 0, 0, 1, 1]], bool)
    ids_E, count = jax.jit(reference.compact)(active_BE)
    assert int(count) == 3
    assert ids_E.dtype == count.dtype == jnp.int32
    np.testing.assert_array_equal(ids_E[:3], [1, 3, 4])
    assert ((ids_E >= 0) & (ids_E < 5)).all()


@pytest.mark.parametrize("transform", [jax.grad, jax.jit, jax.linearize])
def test_differentiation_names_the_training_path(implementation, transform):
    x_BD, weights = make(2, implementation=implementation)

    def loss(x):
        return jnp.sum(compiled(implementation)(x, mask(2, "some"), weights))

    if transform is jax.jit:
        transform = lambda f: jax.jit(jax.grad(f))  # noqa: E731
    with pytest.raises(UserError, match="lte_jax.apply"):
        transform(loss, x_BD) if transform is jax.linearize else transform(loss)(x_BD)


def test_auto_says_what_it_chose_once(caplog):
    kernels._choose.cache_clear()
    x_BD, weights = make(1)
    with caplog.at_level("INFO", logger="lte_jax.kernels"):
        for _ in range(3):
            kernels.sparse_ffn(x_BD, mask(1, "some"), weights, activation="silu")
    assert len(caplog.records) == 1
    assert caplog.records[0].args[0] in kernels.IMPLEMENTATIONS


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ({"compute_capability": "9.0", "device_kind": "NVIDIA H200"}, "no jax-triton"),
        ({"compute_capability": "7.5", "device_kind": "Tesla T4"}, "capability 7.5"),
    ],
)
def test_bad_input_a_gpu_without_its_kernels(monkeypatch, caplog, device, reason):
    """A pretended GPU: "auto" says why it takes the loop, the name alone is an error."""
    client = types.SimpleNamespace(platform_version="cuda 13000")
    fake = types.SimpleNamespace(client=client, **device)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [fake])
    monkeypatch.setitem(sys.modules, "jax_triton", None)  # as if it were not installed
    triton_call.jax_triton.cache_clear()
    kernels._choose.cache_clear()
    with caplog.at_level("WARNING", logger="lte_jax.kernels"):
        assert kernels.resolve("auto") == "xla"
    assert "slower XLA loop" in caplog.text and reason in caplog.text
    kernels._choose.cache_clear()


def test_bad_input_at_the_door():
    x_BD, weights = make(2)
    active_BE = mask(2, "some")

    def refused(match, x=x_BD, active=active_BE, w=weights, activation="silu", **kwargs):
        with pytest.raises(UserError, match=match) as raised:
            kernels.sparse_ffn(x, active, w, activation=activation, **kwargs)
        assert "\n" not in str(raised.value)

    refused("'cuda'.*auto, reference, xla", implementation="cuda")
    refused("'sillu'.*'silu'", activation="sillu")
    refused("expected \\[B, D\\]", x=x_BD[None])
    refused("expected \\[B, D\\]", active=active_BE[:1])
    refused("bool", active=active_BE.astype(jnp.float32))
    refused("up and down", w={"up": weights["up"]})
    refused("up and down", w=weights | {"router": weights["up"]})
    refused("down is .*expected", w=weights | {"down": weights["down"].swapaxes(1, 2)})
    refused("gate is bfloat16", w=weights | {"gate": weights["gate"].astype(ml_dtypes.bfloat16)})
    refused("gate is .*expected", layer=0)  # weights without a layer axis
    for x, w in ((x_BD, jnp.ones((7, 7))), (x_BD[0], jnp.ones((20, 7)))):
        with pytest.raises(UserError, match="expected \\[B, K\\] and \\[K, O\\]"):
            kernels.linear(x, w)
    with pytest.raises(UserError, match="one type"):
        kernels.linear(x_BD, jnp.ones((20, 7), jnp.bfloat16))
    with pytest.raises(UserError, match="expected \\[B\\] and \\[V, D\\]"):
        kernels.embed(jnp.zeros((1, 1), jnp.int32), x_BD)
    cache = jnp.ones((1, 2, 5, 3, 8))
    new, seen = jnp.ones((2, 3, 8)), jnp.ones((2, 5), bool)
    attend = functools.partial(kernels.attend, layer=0, index=0)
    for q in (jnp.ones((2, 4, 8)), jnp.ones((2, 3, 7)), jnp.ones((1, 3, 8))):
        with pytest.raises(UserError, match="H a multiple of K"):
            attend(q, new, new, cache, cache, seen)
    with pytest.raises(UserError, match="differ in type"):
        attend(new.astype(jnp.bfloat16), new, new, cache, cache, seen)
    for wrong in (seen[:1], seen[:, :2], seen.astype(jnp.int32)):
        with pytest.raises(UserError, match=r"visible is .*, expected bool\[2, 5\]"):
            attend(new, new, new, cache, cache, wrong)
    with pytest.raises(UserError, match="index is 5, expected 0 to 4"):
        attend(new, new, new, cache, cache, seen, index=5)
    with pytest.raises(UserError, match="layer is -1, expected 0 to 0"):
        attend(new, new, new, cache, cache, seen, layer=-1)
    with pytest.raises(UserError, match=r"layer is float32\[\], expected an integer"):
        kernels.linear(x_BD, jnp.ones((2, 20, 7)), layer=jnp.float32(1))
    stacked = {name: w[None] for name, w in weights.items()}
    refused("layer is 1, expected 0 to 0", w=stacked, layer=1)
    with pytest.raises(UserError, match="tokens are float32, expected integers"):
        kernels.embed(jnp.zeros(1), x_BD)


def test_embed(implementation):
    for dtype in ("float32", "bfloat16"):
        table_VD = jnp.asarray(np.random.default_rng(0).normal(size=(11, 6)), dtype)
        tokens_B = jnp.asarray([3, 0, 10, 3], jnp.int32)
        x_BD = kernels.embed(tokens_B, table_VD, implementation=implementation)
        np.testing.assert_array_equal(x_BD, table_VD[tokens_B])


@pytest.mark.parametrize("implementation", ["cpu", "triton", "pallas"], indirect=True)
def test_bad_input_that_one_implementation_refuses(implementation, caplog):
    """Named, it says why; under "auto" the loop takes over and says so once."""
    x_BD, weights = make(2, implementation=implementation)
    half = {name: w.astype(jnp.float16) for name, w in weights.items()}
    call = functools.partial(
        kernels.sparse_ffn, x_BD.astype(jnp.float16), mask(2, "some"), half, activation="silu"
    )
    with pytest.raises(UserError, match=f"implementation='{implementation}' cannot run: .*float16"):
        call(implementation=implementation)
    if kernels.resolve("auto") == implementation:
        with caplog.at_level("WARNING", logger="lte_jax.kernels"):
            y_BD = call()
        assert "XLA loop" in caplog.text and "float16" in caplog.text
        assert error(y_BD, call(implementation="xla")) == 0


def test_the_folder_is_no_package():
    """`import kernels` must not find ours: another distribution has that name."""
    root = kernels._HERE.parents[1]
    assert not (root / "kernels" / "__init__.py").exists()
    code = "import lte_jax.kernels, sys; print('kernels' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr
