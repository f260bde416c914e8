"""The kernels for NVIDIA GPUs: Triton, called through jax-triton.

The sparse FFN is two launches. `hidden` has a program for each few neurons of each expert; programs
of idle experts end after one load, the others write hidden activations and, together, the list of
used experts and its count. `combine` multiplies by the down projection; its programs take equal
shares of that list, and XLA adds their partial sums in a fixed order. Nothing waits for the host.
Attention is two as well: shares of the places so far, and their sum. The kernels are in
triton_kernels.py, of weights of 8, 6 and 4 bits in triton_codes.py (launched by gpu_codes.py);
triton_blocks.py chooses block sizes.

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers  H heads
               K inputs (of attention: kv heads)  O outputs  C head width  T places of the cache
               S splits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from .gpu_codes import combine as combine_codes
from .gpu_codes import combine_three as combine_three_codes
from .gpu_codes import hidden as hidden_codes
from .gpu_codes import hidden_shapes, ordered
from .quantized import GROUP, Quantized, Weight
from .reference import Unsupported
from .triton_blocks import TYPES, Blocks, blocks, padded, power
from .triton_call import call, jax_triton
from .xla import attend_many, embed, put  # a few microseconds of a step

__all__ = ["attend", "attend_many", "embed", "linear", "linears", "sparse_ffn", "unavailable"]

UNROLL = 4  # layers a turn: a turn is a CUDA graph to launch, and has launches of its own
_SHARES = 264  # programs of `attend`: two


def sparse_ffn(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, Weight],
    layer: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """Output [B, D] of x's type, accumulated in float32; weights are stacked [N, E, M, D].

    Raises:
      Unsupported: on types other than float32 and bfloat16, more than 64 rows, or no jax-triton.
    """
    e, m, d = weights["up"].shape[1:]
    b, dtype, up = x_BD.shape[0], x_BD.dtype.name, weights["up"]
    if isinstance(up, Quantized):
        if m % GROUP:
            raise Unsupported(f"experts of {m} neurons in {up.format}: multiples of {GROUP}")
        cut = blocks(f"hidden {up.format}", b, m, d, dtype)
        how = {"activation": activation, "cut": cut}
        h_EBM, *used = hidden_codes(x_BD, active_BE, weights, layer, **how)
        cut = blocks(f"combine {up.format}", b, d, m, dtype, experts=e)
        y_BD = combine_codes(h_EBM, weights["down"], layer, *used, cut=cut)
        return y_BD.astype(x_BD.dtype)
    cut = blocks("hidden", b, m, d, dtype)
    h_EBM, ids_E, count = hidden(x_BD, active_BE, weights, layer, activation=activation, cut=cut)
    cut = blocks("combine", b, m, d, dtype, experts=e)
    return combine(h_EBM, weights["down"], layer, ids_E, count, cut=cut).astype(x_BD.dtype)


def linear(x_BK: jax.Array, w: Weight, layer: jax.Array, *, transposed: bool) -> jax.Array:
    """x w[layer], float32 [B, O]; w is stacked [N, K, O] or, transposed, [N, O, K].

    Raises: as sparse_ffn.
    """
    if isinstance(w, Quantized):
        shape = (f"combine {w.format}", x_BK.shape[0], w.outputs, w.inputs, x_BK.dtype.name)
        return combine_codes(ordered(x_BK)[None], w, layer, cut=blocks(*shape))
    kernel = "project" if transposed else "combine"
    cut = blocks(kernel, x_BK.shape[0], w.shape[1], w.shape[2], x_BK.dtype.name)
    if transposed:
        return project(x_BK, w, layer, cut=cut)
    # A weighted sum of K rows, like a down projection with a single expert.
    return combine(x_BK[None], w[:, None], layer, cut=cut)


def linears(x_BK: jax.Array, ws: Sequence[Weight], layer: jax.Array) -> list[jax.Array]:
    """x w[layer] of each w, float32 [B, O]; they are stacked [N, K, O]. Three are one launch.

    Raises: as sparse_ffn.
    """
    formats = {w.format if isinstance(w, Quantized) else "" for w in ws}
    if len(ws) != 3 or len(formats) > 1:
        return [linear(x_BK, w, layer, transposed=False) for w in ws]
    (b, k), widths, dtype = x_BK.shape, [w.shape[2] for w in ws], x_BK.dtype.name
    ends = [widths[0], sum(widths[:2])]
    if form := formats.pop():
        cut = blocks(f"combine {form}", b, sum(widths), k, dtype)
        return jnp.split(combine_three_codes(x_BK, ws, layer, cut=cut), ends, axis=1)
    cut = blocks("combine", b, k, sum(widths), dtype)
    partial_SBO = call(
        "combine_three",
        (x_BK, *ws, layer),
        jax.ShapeDtypeStruct((cut.splits, b, sum(widths)), jnp.float32),
        (sum(-(-o // cut.d) for o in widths), cut.splits),
        cut,
        **three_constants(b, k, widths, cut),
    )
    return jnp.split(partial_SBO.sum(axis=0), ends, axis=1)


def attend(
    q_BHC: jax.Array,
    k_BKC: jax.Array,
    v_BKC: jax.Array,
    k_NBTKC: jax.Array,
    v_NBTKC: jax.Array,
    visible_BT: jax.Array,
    layer: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new token per row, [B, H, C], and the caches with it at `layer`, `index`.

    Raises: as sparse_ffn.
    """
    (b, h, c), (t, k), dtype = q_BHC.shape, k_NBTKC.shape[2:4], q_BHC.dtype.name
    if dtype not in TYPES:
        raise Unsupported(f"type {dtype}: the Triton kernels take {' and '.join(TYPES)}")
    k_NBTKC, v_NBTKC = put(k_NBTKC, k_BKC, layer, index), put(v_NBTKC, v_BKC, layer, index)
    constants = attend_constants(b, t, k, h // k, c, dtype)
    splits = constants["SPLITS"]
    sizes = (constants[name] for name in ("BLOCK_T", "BLOCK_C"))
    cut = Blocks(*sizes, warps=attend_warps(h // k), stages=3, splits=splits)
    shares = call(
        "attend",
        (q_BHC, k_NBTKC, v_NBTKC, visible_BT, layer, index),
        tuple(jax.ShapeDtypeStruct((splits, b, h, n), jnp.float32) for n in (c, 2)),
        (b * k, splits),
        cut,
        **constants,
    )
    y_BHC = call(
        "merge",
        tuple(shares),
        jax.ShapeDtypeStruct(q_BHC.shape, q_BHC.dtype),
        (b * h,),
        cut,
        **merge_constants(b * h, c, splits),
    )
    return y_BHC, k_NBTKC, v_NBTKC


def unavailable() -> str | None:
    """Why these kernels cannot run here; None if they can."""
    if jax.default_backend() != "gpu":
        return f"it is for NVIDIA GPUs, and jax runs on {jax.default_backend()}"
    device = jax.devices()[0]
    if "rocm" in device.client.platform_version.lower():
        return f"it is for NVIDIA GPUs, and this is {device.device_kind}"
    if float(device.compute_capability) < 8.0:
        return f"{device.device_kind} has compute capability {device.compute_capability} (8.0 on)"
    try:
        jax_triton()
    except Unsupported as reason:
        return str(reason)
    return None


# ------------------------------------------------------------------------------------ launches


def hidden(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: jax.Array,
    *,
    activation: str,
    cut: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden activations of the used experts, and the list of these experts.

    Returns:
      h_EBM: of x's type, zero where a row does not use an expert; undefined where no row does.
      ids_E: int32, the used experts, ascending; undefined from count on.
      count: int32 [1].
    """
    b, d = x_BD.shape
    e, m = weights["up"].shape[1:3]
    up = weights["up"]
    return call(
        "hidden",
        (x_BD, active_BE, layer, up)
        # A kernel takes a fixed number of arrays: `up` stands in for absent ones and is not read.
        + tuple(weights.get(name, up) for name in ("gate", "up_bias", "gate_bias")),
        hidden_shapes(b, e, m, x_BD.dtype),
        (e, -(-m // cut.m)),
        cut,
        **hidden_constants(b, e, m, d, cut),
        ACTIVATION=activation,
        GATED="gate" in weights,
        UP_BIAS="up_bias" in weights,
        GATE_BIAS="gate_bias" in weights,
    )


def combine(
    h_EBM: jax.Array,
    w: jax.Array,
    layer: jax.Array,
    ids_E: jax.Array | None = None,
    count: jax.Array | None = None,
    *,
    cut: Blocks,
) -> jax.Array:
    """Sum of h w[layer] over the listed experts (without a list, all): float32 [B, D]."""
    (e, b, m), d = h_EBM.shape, w.shape[-1]
    listed = ids_E is not None
    partial_SBD = call(
        "combine",
        (h_EBM, w, layer) + ((ids_E, count) if listed else (layer, layer)),
        jax.ShapeDtypeStruct((cut.splits, b, d), jnp.float32),
        (-(-d // cut.d), cut.splits),
        cut,
        **combine_constants(b, e, m, d, cut),
        GATHER=listed,
    )
    return partial_SBD.sum(axis=0)


def project(x_BK: jax.Array, w: jax.Array, layer: jax.Array, *, cut: Blocks) -> jax.Array:
    """x times the transposed w[layer]: float32 [B, O], for w stacked [N, O, K]."""
    (b, k), o = x_BK.shape, w.shape[1]
    out = jax.ShapeDtypeStruct((b, o), jnp.float32)
    grid = (-(-o // cut.m),)
    return call("project", (x_BK, w, layer), out, grid, cut, **project_constants(b, o, k, cut))


def hidden_constants(b: int, e: int, m: int, d: int, cut: Blocks) -> dict[str, int]:
    """The compile-time constants of `hidden`, except the flags that describe the FFN."""
    return {"E": e, "BLOCK_E": power(e)} | project_constants(b, m, d, cut)


def combine_constants(b: int, e: int, m: int, d: int, cut: Blocks) -> dict[str, int]:
    """The compile-time constants of `combine`, except GATHER; h is [E, B, M]."""
    lengths = project_constants(b, m, d, cut)
    lengths["ROWS"] = padded(b) if b == 1 else max(16, padded(b))  # rows are the mma's longer side
    return lengths | {"E": e, "SPLITS": cut.splits, "H_EXPERT": b * m, "H_ROW": m}


def three_constants(b: int, m: int, widths: Sequence[int], cut: Blocks) -> dict[str, int]:
    """The compile-time constants of `combine_three`."""
    names = ("B", "M", "ROWS", "BLOCK_M", "BLOCK_D", "SPLITS", "STAGES")
    one = combine_constants(b, 1, m, sum(widths), cut)
    outputs = dict(zip(("D_ONE", "D_TWO", "D_THREE"), widths, strict=True))
    return {name: one[name] for name in names} | outputs


def attend_constants(
    b: int, t: int, k: int, group: int, c: int, dtype: str
) -> dict[str, int | float]:
    """The compile-time constants of `attend`, for `group` queries a kv head.

    Two programs a multiprocessor, each with three blocks of keys and of values in flight; no
    program has less than two blocks of a full cache.
    """
    rows, columns = (max(16, power(n)) for n in (group, c))  # as tl.dot wants
    size = jnp.dtype(dtype).itemsize
    places = 16384 // (columns * size)  # 16 KiB a block
    places = max(16, min(places, 8192 // (rows * size)))  # scores are in registers
    splits = max(1, min(-(-_SHARES // (b * k)), t // (2 * places)))
    sizes = {"B": b, "T": t, "K": k, "GROUP": group, "C": c, "SCALE": c**-0.5, "ROWS": rows}
    return sizes | {"BLOCK_T": places, "BLOCK_C": columns, "SPLITS": splits, "STAGES": 3}


def attend_warps(group: int) -> int:
    """The warps of a program of `attend`: of many queries, four would run out of registers."""
    return 4 if group <= 32 else 8


def merge_constants(heads: int, c: int, splits: int) -> dict[str, int]:
    """The compile-time constants of `merge`."""
    return {"HEADS": heads, "C": c, "BLOCK_S": 16, "BLOCK_C": power(c), "SPLITS": splits}


def project_constants(b: int, m: int, d: int, cut: Blocks) -> dict[str, int]:
    """The compile-time constants of `project`."""
    lengths = {"B": b, "M": m, "D": d, "ROWS": padded(b)}
    return lengths | {"BLOCK_M": cut.m, "BLOCK_D": cut.d, "STAGES": cut.stages}
