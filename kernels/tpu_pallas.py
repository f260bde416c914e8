"""The sparse expert feed-forward network as a Pallas kernel for TPUs (Mosaic).

One grid step per active expert: the grid is as long as the list of active experts, which the
device alone knows, and the block of an expert is found by (layer, ids[step]), scalars that are
there before the step begins. So the next expert is on its way from HBM while one is computed,
idle experts cost nothing, and the stacked weights go in as they lie, without a copy.

Off a TPU the kernel runs in interpret mode, for tests: right, and very slow.

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .reference import ACTIVATIONS, Unsupported, compact
from .xla import attend, embed, linear  # XLA's own do on a TPU

__all__ = ["attend", "embed", "linear", "sparse_ffn"]

# Of the fast memory of a TPU, VMEM: for the operands, and with what the compiler adds to them for
# float32 products. A TPU has 64 MiB or more from v5 on; unless it asks, a kernel gets 16.
OPERAND_BYTES, VMEM_BYTES = 16 * 2**20, 32 * 2**20

# erfc, with which jax.nn.gelu is exact, has no lowering in Mosaic; erf has one.
_ACTIVATIONS = ACTIVATIONS | {"gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))}


def sparse_ffn(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: jax.Array,
    *,
    activation: str,
    interpret: bool | None = None,
) -> jax.Array:
    """Output [B, D] of x's type, accumulated in float32; weights are stacked [N, E, M, D].

    `interpret` runs the kernel step by step on any device; None: wherever there is no TPU. The
    other arguments are those of the contract, README.md beside this file.

    Raises:
      Unsupported: on a type or shape that a TPU does not take, in interpret mode too.
    """
    _check(x_BD, active_BE, weights)
    if interpret is None:
        interpret = jax.default_backend() != "tpu"
    names = [name for name in ("gate", "up", "down") if name in weights]
    biases = [f"{name}_bias" for name in names if f"{name}_bias" in weights]
    layer = layer.astype(jnp.int32)
    ids_E, count = compact(active_BE)
    # In one list: by themselves, scalars become temporaries in HBM, of 32 KB each.
    plan = jnp.concatenate([jnp.stack([layer, count]), ids_E])
    # One row of [N, E, M] is no block that a TPU fetches, so this layer's biases come as a whole.
    bias_EM = [jax.lax.dynamic_index_in_dim(weights[b], layer, keepdims=False) for b in biases]

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda step, plan: (0, 0))

    expert = pl.BlockSpec(
        (1, 1, *weights["up"].shape[2:]), lambda step, plan: (plan[0], plan[2 + step], 0, 0)
    )
    return pl.pallas_call(
        functools.partial(_add_expert, names + biases, _ACTIVATIONS[activation]),
        out_shape=jax.ShapeDtypeStruct(x_BD.shape, x_BD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.maximum(count, 1),),  # with no expert active one step is left, for the zeros
            in_specs=[
                whole(x_BD.shape),
                whole(active_BE.shape),
                *(expert for _ in names),
                *(whole(b_EM.shape) for b_EM in bias_EM),
            ],
            out_specs=whole(x_BD.shape),
            scratch_shapes=[pltpu.VMEM(x_BD.shape, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="sparse_ffn",
    )(plan, x_BD, active_BE.astype(jnp.float32), *(weights[name] for name in names), *bias_EM)


def _add_expert(names, act, plan_ref, x_ref, active_ref, *refs):
    """One grid step: the active rows' part of expert ids[step] goes into the accumulator."""
    *weight_refs, y_ref, sum_ref = refs
    w = dict(zip(names, weight_refs, strict=True))
    step = pl.program_id(0)
    count, expert = plan_ref[1], plan_ref[2 + step]
    # One pass of bfloat16 is what the matrix unit gives a float32 product unless told otherwise.
    precision = "highest" if x_ref.dtype == jnp.float32 else "default"
    dot = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )

    def project(name: str) -> jax.Array:
        h_BM = dot(x_ref[...], w[name][0, 0], (((1,), (1,)), ((), ())))
        if f"{name}_bias" in w:
            h_BM += _pick(w[f"{name}_bias"][...].astype(jnp.float32), expert, axis=0)
        return h_BM

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(count > 0)
    def _():
        h_BM = act(project("gate")) * project("up") if "gate" in w else act(project("up"))
        mine_B1 = _pick(active_ref[...], expert, axis=1) > 0.0
        h_BM = jnp.where(mine_B1, h_BM, 0.0).astype(x_ref.dtype)
        sum_ref[...] += dot(h_BM, w["down"][0, 0], (((1,), (0,)), ((), ())))

    @pl.when(step == pl.num_programs(0) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _pick(a: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """Row or column `index` of a matrix, kept 2-D: registers cannot be indexed, only compared."""
    at = jax.lax.broadcasted_iota(jnp.int32, a.shape, axis)
    return jnp.where(at == index, a, 0.0).sum(axis=axis, keepdims=True)


def vmem_bytes(x_BD, active_BE, weights) -> int:
    """Bytes of VMEM that operands of these shapes take.

    Experts count twice, as one is fetched while one is computed; what stays counts once.
    """
    experts = sum(2 * _tiled(w.shape[2:], w.dtype) for w in weights.values() if w.ndim == 4)
    biases = sum(_tiled(w.shape[1:], w.dtype) for w in weights.values() if w.ndim == 3)
    rows = 2 * _tiled(x_BD.shape, x_BD.dtype) + _tiled(x_BD.shape, jnp.float32)  # x, y, their sum
    return experts + biases + rows + _tiled(active_BE.shape, jnp.float32)


def _tiled(shape: tuple[int, int], dtype) -> int:
    """Bytes of a matrix in VMEM, which is made of tiles of 128 columns and 32 bytes a column."""
    size = jnp.dtype(dtype).itemsize
    return math.ceil(shape[0] * size / 32) * 32 * math.ceil(shape[1] / 128) * 128


def _check(x_BD, active_BE, weights) -> None:
    if x_BD.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"x is {x_BD.dtype}, the kernel has float32 and bfloat16")
    neurons, width = weights["up"].shape[2:]
    if neurons % 8 or width % 128:
        raise Unsupported(
            f"experts of {neurons} neurons at width {width} would be copied at every "
            "call: a TPU takes them as they lie in multiples of 8 neurons and of 128 in width"
        )
    needed = vmem_bytes(x_BD, active_BE, weights)
    if needed > OPERAND_BYTES:
        raise Unsupported(
            f"{x_BD.shape[0]} rows and experts of {neurons} neurons at width {width} "
            f"take {needed / 2**20:.1f} MiB of VMEM, {OPERAND_BYTES >> 20} can be had: run fewer "
            "rows at a time, or experts of fewer neurons"
        )
