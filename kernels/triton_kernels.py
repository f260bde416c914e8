"""The Triton kernels of the sparse expert FFN and of plain linear maps.

A decode step reads every weight once and computes little with it: all that counts is that 16-byte
loads are always in flight. Each kernel streams tiles of weight rows, contiguous along D, through a
loop that the compiler pipelines over STAGES. One row of x is multiplied on ordinary cores; several
rows, padded to ROWS, on tensor cores. Sums are float32 and never atomic: the same input gives the
same bits.

gpu_triton.py launches them from jax and chooses block sizes.

Dimension key: B rows of x  D model width  E experts  M neurons per expert  N layers
"""

from typing import no_type_check  # type checkers wrap functions, which Triton does not expect

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(z, 0.0)


@triton.jit
@no_type_check
def _project(
    x,
    first,
    second,
    m,
    B: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Products of the weight rows m of two matrices with x, each [BLOCK_M, ROWS].

    Both are read in one loop, so that their loads overlap; without BOTH, only the first.
    """
    d = tl.arange(0, BLOCK_D)
    b = tl.arange(0, ROWS)
    # One row is summed along D only at the end: no reduction between the loads.
    COLUMNS: tl.constexpr = BLOCK_D if ROWS == 1 else ROWS
    one = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    two = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        column = start + d
        tile = m[:, None] * D + column[None, :]
        inside = (m[:, None] < M) & (column[None, :] < D)
        w = tl.load(first + tile, mask=inside, other=0.0, eviction_policy="evict_first")
        if BOTH:
            v = tl.load(second + tile, mask=inside, other=0.0, eviction_policy="evict_first")
        if ROWS == 1:
            row = tl.load(x + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
            one += w.to(tl.float32) * row
            if BOTH:
                two += v.to(tl.float32) * row
        else:
            inside = (b[None, :] < B) & (column[:, None] < D)
            rows = tl.load(x + b[None, :] * D + column[:, None], mask=inside, other=0.0)
            one = tl.dot(w, rows, one, input_precision="ieee")
            if BOTH:
                two = tl.dot(v, rows, two, input_precision="ieee")
    if ROWS == 1:
        return tl.sum(one, 1)[:, None], tl.sum(two, 1)[:, None]
    else:
        return one, two


@triton.jit
@no_type_check
def hidden(
    x,  # [B, D]
    active,  # [B, E], bool
    layer,  # [], int32
    up,  # [N, E, M, D]
    gate,  # likewise; anything without GATED
    up_bias,  # [N, E, M]; anything without UP_BIAS
    gate_bias,  # likewise
    h,  # out: [E, B, M]: hidden activations, undefined for idle experts
    ids,  # out: [E], int32: the used experts, ascending; undefined from count on
    count,  # out: [1], int32
    B: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
):
    """Program (e, i): neurons [i BLOCK_M, (i + 1) BLOCK_M) of expert e, if a row uses it.

    An idle program ends after one load. The first program of each used expert also writes it to the
    list for `combine`, at the number of used experts before it.
    """
    e = tl.program_id(0)
    i = tl.program_id(1)
    b = tl.arange(0, ROWS)
    own = tl.load(active + b * E + e, mask=b < B, other=0)
    busy = tl.max(own.to(tl.int32), 0) > 0
    if i == 0:
        if busy | (e == 0):
            expert = tl.arange(0, BLOCK_E)
            used = tl.zeros([BLOCK_E], tl.int32)
            for start in tl.range(0, B, 8):  # eight rows at once; more would cost registers
                row = start + tl.arange(0, min(8, ROWS))
                inside = (row[:, None] < B) & (expert[None, :] < E)
                flags = tl.load(active + row[:, None] * E + expert[None, :], mask=inside, other=0)
                used |= tl.max(flags.to(tl.int32), 0)
            if busy:
                tl.store(ids + tl.sum(tl.where(expert < e, used, 0)), e)
            if e == 0:
                tl.store(count, tl.sum(used))
    if busy:
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        first = (tl.load(layer).to(tl.int64) * E + e) * M  # row of the weights; 7B overflows int32
        z, g = _project(
            x, up + first * D, gate + first * D, m, B, M, D, ROWS, BLOCK_M, BLOCK_D, STAGES, GATED
        )
        if UP_BIAS:
            z += tl.load(up_bias + first + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        if GATE_BIAS:
            g += tl.load(gate_bias + first + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        if GATED:
            z = _activate(g, ACTIVATION) * z
        else:
            z = _activate(z, ACTIVATION)
        z = tl.where(own[None, :], z, 0.0)
        place = h + (e * B + b[None, :]) * M + m[:, None]
        tl.store(place, z.to(h.dtype.element_ty), mask=(b[None, :] < B) & (m[:, None] < M))


@triton.jit
@no_type_check
def combine(
    h,  # element (b, m) of expert e lies at e H_EXPERT + b H_ROW + m
    w,  # [N, E, M, D]
    layer,  # [], int32
    ids,  # [E], int32, and
    count,  # [1], int32: the experts to sum over; anything without GATHER: all
    partial,  # out: [SPLITS, B, D], float32
    B: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    H_EXPERT: tl.constexpr,
    H_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Program (j, s): columns [j BLOCK_D, (j + 1) BLOCK_D) of the sum of h times rows of w.

    The rows are taken in panels of BLOCK_M that never cross experts; split s sums an equal,
    contiguous share of the panels, in ascending order.
    """
    PANELS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M  # of an expert
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.program_id(1)
    b = tl.arange(0, ROWS)
    if GATHER:
        panels = tl.load(count) * PANELS
    else:
        panels = E * PANELS
    w += tl.load(layer).to(tl.int64) * E * M * D
    if ROWS == 1:  # summed along M only at the end: no reduction between the loads
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for p in tl.range(s * panels // SPLITS, (s + 1) * panels // SPLITS, num_stages=STAGES):
        e = p // PANELS
        m = p % PANELS * BLOCK_M + tl.arange(0, BLOCK_M)
        if GATHER:
            e = tl.load(ids + e)
        tile = w + e.to(tl.int64) * M * D + (m[:, None] * D + d[None, :])
        inside = (m[:, None] < M) & (d[None, :] < D)
        rows = tl.load(tile, mask=inside, other=0.0, eviction_policy="evict_first")
        if ROWS == 1:
            weight = tl.load(h + e * H_EXPERT + m, mask=m < M, other=0.0)
            total += rows.to(tl.float32) * weight.to(tl.float32)[:, None]
        else:
            inside = (b[:, None] < B) & (m[None, :] < M)
            weight = h + e * H_EXPERT + b[:, None] * H_ROW + m[None, :]
            weight = tl.load(weight, mask=inside, other=0.0)
            total = tl.dot(weight, rows, total, input_precision="ieee")
    if ROWS == 1:
        total = tl.sum(total, 0)[None, :]
    place = partial + (s * B + b[:, None]) * D + d[None, :]
    tl.store(place, total, mask=(b[:, None] < B) & (d[None, :] < D))


@triton.jit
@no_type_check
def project(
    x,  # [B, D]
    w,  # [N, M, D]
    layer,  # [], int32
    y,  # out: [B, M], float32
    B: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program i: columns [i BLOCK_M, (i + 1) BLOCK_M) of x times the transposed w."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.arange(0, ROWS)
    w += tl.load(layer).to(tl.int64) * M * D
    z, _ = _project(x, w, w, m, B, M, D, ROWS, BLOCK_M, BLOCK_D, STAGES, False)
    inside = (b[None, :] < B) & (m[:, None] < M)
    tl.store(y + b[None, :] * M + m[:, None], z, mask=inside)
