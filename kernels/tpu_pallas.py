"""The sparse expert FFN as a Pallas kernel for TPUs (Mosaic).

One grid step per active expert. The grid is as long as the list of active experts, known only on
the device; an expert's block is found by (layer, ids[step]), prefetched scalars. So the next expert
is fetched from HBM while one is computed, idle experts cost nothing, and the stacked weights are
read in place, without a copy.

Off a TPU the kernel runs in interpret mode, for tests: correct, but very slow.

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

from .quantized import Quantized, Weight
from .reference import ACTIVATIONS, Unsupported, compact
from .xla import attend, attend_many, embed, linear, linears  # good enough on a TPU

__all__ = ["attend", "attend_many", "embed", "linear", "linears", "sparse_ffn"]

# Of VMEM, a TPU's fast memory: for the operands, and in total, with what the compiler adds for
# float32 products. From v5 on a TPU has 64 MiB or more; a kernel gets 16 unless it asks for more.
OPERAND_BYTES, VMEM_BYTES = 16 * 2**20, 32 * 2**20

# Mosaic has no lowering of erfc, which the exact jax.nn.gelu uses; it has one of erf.
_ACTIVATIONS = ACTIVATIONS | {"gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))}


def sparse_ffn(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, Weight],
    layer: jax.Array,
    *,
    activation: str,
    interpret: bool | None = None,
) -> jax.Array:
    """Output [B, D] of x's type, accumulated in float32; weights are stacked [N, E, M, D].

    `interpret` runs the kernel step by step on any device; None: if there is no TPU. README.md
    beside this file describes the other arguments.

    Raises:
      Unsupported: on a type or shape that a TPU does not take, in interpret mode too.
    """
    for w in weights.values():
        if isinstance(w, Quantized):
            raise Unsupported(f"weights in {w.format}: the kernel for TPUs takes floats")
    _check(x_BD, active_BE, weights)
    if interpret is None:
        interpret = jax.default_backend() != "tpu"
    names = [name for name in ("gate", "up", "down") if name in weights]
    biases = [f"{name}_bias" for name in names if f"{name}_bias" in weights]
    layer = layer.astype(jnp.int32)
    ids_E, count = compact(active_BE)
    # In one list: separate scalars would each become a temporary of 32 KB in HBM.
    plan = jnp.concatenate([jnp.stack([layer, count]), ids_E])
    # A TPU cannot fetch one row of [N, E, M] as a block, so all of this layer's biases are passed.
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
            grid=(jnp.maximum(count, 1),),  # with no active expert, one step writes zeros
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
    """One grid step: adds the output of expert ids[step] for the rows that use it."""
    *weight_refs, y_ref, sum_ref = refs
    w = dict(zip(names, weight_refs, strict=True))
    step = pl.program_id(0)
    count, expert = plan_ref[1], plan_ref[2 + step]
    # By default the matrix unit computes float32 products in one bfloat16 pass.
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
    """Row or column `index` of a matrix, kept 2-D; by a mask, as registers cannot be indexed."""
    at = jax.lax.broadcasted_iota(jnp.int32, a.shape, axis)
    return jnp.where(at == index, a, 0.0).sum(axis=axis, keepdims=True)


def vmem_bytes(x_BD, active_BE, weights) -> int:
    """Bytes of VMEM that these operands take; experts count twice, as they are double-buffered."""
    experts = sum(2 * _tiled(w.shape[2:], w.dtype) for w in weights.values() if w.ndim == 4)
    biases = sum(_tiled(w.shape[1:], w.dtype) for w in weights.values() if w.ndim == 3)
    rows = 2 * _tiled(x_BD.shape, x_BD.dtype) + _tiled(x_BD.shape, jnp.float32)  # x, y, their sum
    return experts + biases + rows + _tiled(active_BE.shape, jnp.float32)


def _tiled(shape: tuple[int, int], dtype) -> int:
    """Bytes of a matrix in VMEM, in tiles of 128 columns and 32 bytes per column."""
    size = jnp.dtype(dtype).itemsize
    return math.ceil(shape[0] * size / 32) * 32 * math.ceil(shape[1] / 128) * 128


def _check(x_BD, active_BE, weights) -> None:
    if x_BD.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"x is {x_BD.dtype}: the kernel takes float32 and bfloat16")
    neurons, width = weights["up"].shape[2:]
    if neurons % 8 or width % 128:
        raise Unsupported(
            f"experts of {neurons} neurons at width {width} would be copied at every "
            "call: a TPU reads them in place in multiples of 8 neurons and of 128 in width"
        )
    needed = vmem_bytes(x_BD, active_BE, weights)
    if needed > OPERAND_BYTES:
        raise Unsupported(
            f"{x_BD.shape[0]} rows and experts of {neurons} neurons at width {width} "
            f"take {needed / 2**20:.1f} MiB of VMEM, {OPERAND_BYTES >> 20} are available: run "
            "fewer rows at a time, or use smaller experts"
        )
