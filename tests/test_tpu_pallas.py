"""The Pallas kernel for TPUs: what it refuses, and its executable for a v5e.

Its numbers, in interpret mode, are held by test_kernels.py. Where libtpu is installed, the kernel
is compiled ahead of time for a v5e at the shapes of LLaMA2-7B; with -s the figures of
docs/kernels.md are printed.
"""

import functools
import importlib.util

import jax
import pytest
from jax.experimental import topologies

from lte_jax.kernels import reference, tpu_pallas

N = 2  # layers
TYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("interpret", [None, True, False])
@pytest.mark.parametrize(
    ("rows", "neurons", "width", "dtype", "match"),
    [
        (1, 32, 4096, "float16", "x is float16: the kernel takes float32 and bfloat16"),
        (1, 12, 4096, "float32", "12 neurons at width 4096 .* multiples of 8 neurons and of 128"),
        (1, 32, 288, "bfloat16", "32 neurons at width 288 .* multiples of 8 neurons and of 128"),
        (8, 11008, 4096, "bfloat16", "11008 neurons .* MiB of VMEM, 16 are available: run fewer"),
        (1024, 32, 4096, "bfloat16", "1024 rows .* MiB of VMEM, 16 are available: run fewer"),
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
        *(
            (d, b, g, False, "silu", 32)
            for d in ("float32", "bfloat16")
            for b in (1, 8)
            for g in (True, False)
        ),
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
