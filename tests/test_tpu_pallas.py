"""The Pallas kernel for TPUs: its numbers in interpret mode, and its executable for a v5e.

No TPU is needed. Where libtpu is installed, the kernel is compiled ahead of time for a v5e at the
shapes of LLaMA2-7B; with -s the figures of docs/kernels.md are printed.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from lte_jax.kernels import reference, tpu_pallas

N, E, M, D = 2, 8, 16, 128
KINDS = ("none", "one", "some", "disjoint", "all")
# Relative to the largest output. In bfloat16 the hidden activations and the output are rounded.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def make(rows, dtype="float32", gated=True, bias=False):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape, scale=0.3), dtype)

    names = ("gate", "up", "down") if gated else ("up", "down")
    weights = {name: normal(N, E, M, D) for name in names}
    if bias:
        weights |= {f"{name}_bias": normal(N, E, M) for name in names[:-1]}
    return normal(rows, D), weights


def mask(rows, kind):
    active_BE = np.zeros((rows, E), bool)
    if kind == "all":
        active_BE[:] = True
    elif kind == "one":
        active_BE[:, E - 1] = True
    elif kind == "disjoint":
        active_BE[np.arange(E) % rows, np.arange(E)] = True
    elif kind == "some":
        active_BE = np.random.default_rng(rows).random((rows, E)) < 0.4
    return jnp.asarray(active_BE)


@functools.cache
def compiled(module, activation="silu"):
    return jax.jit(functools.partial(module.sparse_ffn, activation=activation))


def error(x_BD, active_BE, weights, layer, activation="silu"):
    """How far the kernel is from the reference, as a part of the largest output."""
    y_BD = compiled(tpu_pallas, activation)(x_BD, active_BE, weights, jnp.int32(layer))
    assert (y_BD.shape, y_BD.dtype) == (x_BD.shape, x_BD.dtype)
    x_BD, weights = jax.tree.map(lambda a: a.astype(jnp.float32), (x_BD, weights))
    expected = compiled(reference, activation)(x_BD, active_BE, weights, jnp.int32(layer))
    idle = ~np.asarray(active_BE).any(axis=1)
    assert not np.asarray(y_BD)[idle].any()
    return float(
        jnp.abs(y_BD.astype(jnp.float32) - expected).max() / (jnp.abs(expected).max() or 1)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
def test_masks(rows, dtype):
    x_BD, weights = make(rows, dtype, bias=True)
    for kind in KINDS:
        assert error(x_BD, mask(rows, kind), weights, 1) < TOLERANCE[dtype], kind


@pytest.mark.parametrize(
    ("dtype", "activation", "gated", "bias"),
    [
        ("float32", "silu", True, False),
        ("bfloat16", "silu", True, False),
        ("float32", "gelu", False, True),
        ("bfloat16", "gelu", False, True),
        ("float32", "gelu_tanh", False, True),
        ("float32", "gelu", True, True),
        ("float32", "relu", False, False),
        ("bfloat16", "relu", False, False),
    ],
)
def test_variants(dtype, activation, gated, bias):
    x_BD, weights = make(3, dtype, gated, bias)
    for layer in range(N):
        assert error(x_BD, mask(3, "some"), weights, layer, activation) < TOLERANCE[dtype]


def test_only_active_experts_of_the_layer_are_read():
    """All the rest full of NaN leaves no trace, neither in the numbers nor, with none, in zeros."""
    x_BD, weights = make(2, bias=True)
    poisoned = {
        name: jnp.full_like(w, jnp.nan).at[1, E - 1].set(w[1, E - 1]) for name, w in weights.items()
    }
    ffn = compiled(tpu_pallas)
    for kind in ("one", "none"):
        y_BD = ffn(x_BD, mask(2, kind), poisoned, jnp.int32(1))
        expected = ffn(x_BD, mask(2, kind), weights, jnp.int32(1))
        np.testing.assert_array_equal(y_BD, expected)
        assert kind == "one" or not y_BD.any()


def test_a_row_alone_gives_what_it_gives_among_others():
    x_BD, weights = make(8, bias=True)
    active_BE = mask(8, "some")
    ffn = compiled(tpu_pallas)
    together = ffn(x_BD, active_BE, weights, jnp.int32(0))
    alone = [ffn(x_BD[b : b + 1], active_BE[b : b + 1], weights, jnp.int32(0)) for b in range(8)]
    scale = jnp.abs(together).max()
    assert jnp.abs(together - jnp.concatenate(alone)).max() < TOLERANCE["float32"] * scale


def test_ten_runs_give_the_same_bits():
    x_BD, weights = make(3, "bfloat16", bias=True)
    ffn = compiled(tpu_pallas)
    runs = [np.asarray(ffn(x_BD, mask(3, "some"), weights, jnp.int32(0))) for _ in range(10)]
    assert len({run.tobytes() for run in runs}) == 1


@pytest.mark.parametrize("interpret", [None, True, False])
@pytest.mark.parametrize(
    ("rows", "neurons", "width", "dtype", "match"),
    [
        (1, 32, 4096, "float16", "x is float16, the kernel has float32 and bfloat16"),
        (1, 12, 4096, "float32", "12 neurons at width 4096 .* multiples of 8 neurons and of 128"),
        (1, 32, 288, "bfloat16", "32 neurons at width 288 .* multiples of 8 neurons and of 128"),
        (8, 11008, 4096, "bfloat16", "11008 neurons .* MiB of VMEM, 16 can be had: run fewer"),
        (1024, 32, 4096, "bfloat16", "1024 rows .* MiB of VMEM, 16 can be had: run fewer"),
    ],
)
def test_refusals(rows, neurons, width, dtype, match, interpret):
    operands = shapes(rows, dtype, width=width, experts=4, neurons=neurons)
    ffn = functools.partial(tpu_pallas.sparse_ffn, activation="silu", interpret=interpret)
    with pytest.raises(reference.Unsupported, match=match) as raised:
        jax.eval_shape(ffn, *operands)
    assert "\n" not in str(raised.value)


def shapes(rows, dtype, gated=True, bias=False, *, width, experts, neurons, sharding=None):
    """The operands of sparse_ffn without contents."""
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    names = ("gate", "up", "down") if gated else ("up", "down")
    weights = {name: struct((N, experts, neurons, width), dtype) for name in names}
    if bias:
        weights |= {f"{name}_bias": struct((N, experts, neurons), dtype) for name in names[:-1]}
    x_BD, active_BE = struct((rows, width), dtype), struct((rows, experts), bool)
    return x_BD, active_BE, weights, struct((), "int32")


@pytest.fixture(scope="module")
def v5e():
    """Puts an array on one chip of a v5e that needs not be there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which is not installed, to compile for a v5e")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
        mesh = jax.sharding.Mesh(devices[:1], ("x",))
        yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.mark.parametrize(
    ("dtype", "rows", "gated", "bias", "activation", "neurons"),
    [
        *((d, b, g, False, "silu", 32) for d in TOLERANCE for b in (1, 8) for g in (True, False)),
        ("float32", 8, True, True, "gelu", 32),
        ("bfloat16", 3, True, True, "gelu", 32),
        ("bfloat16", 16, False, True, "gelu_tanh", 32),
        ("bfloat16", 64, True, False, "relu", 8),
        ("float32", 8, True, True, "silu", 128),
    ],
)
def test_v5e_takes_the_weights_as_they_lie(v5e, dtype, rows, gated, bias, activation, neurons):
    kwargs = {"width": 4096, "experts": 11008 // neurons, "neurons": neurons, "sharding": v5e}
    operands = shapes(rows, dtype, gated, bias, **kwargs)
    ffn = functools.partial(tpu_pallas.sparse_ffn, activation=activation, interpret=False)
    memory = jax.jit(ffn).trace(*operands).lower().compile().memory_analysis()
    weights = sum(w.size * w.dtype.itemsize for w in operands[2].values())
    vmem = tpu_pallas.vmem_bytes(*operands[:3]) / 2**20
    print(
        f"\n{dtype} B {rows} M {neurons} gated {gated} bias {bias} {activation}: "
        f"temp {memory.temp_size_in_bytes}, arguments {memory.argument_size_in_bytes} bytes, "
        f"operands in VMEM {vmem:.2f} MiB"
    )
    # No weight is copied. What libtpu 0.0.48 still has are scalars on their way: 32,256 bytes each.
    assert memory.temp_size_in_bytes < 5 * 32256
    assert weights <= memory.argument_size_in_bytes < 1.01 * weights + 2**20
