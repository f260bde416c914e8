"""The Triton kernels of the sparse expert FFN and of plain linear maps.

A decode step reads every weight once and computes little with it: all that counts is that 16-byte
loads are always in flight. Each kernel streams tiles of weight rows, contiguous along D, through a
loop that the compiler pipelines over STAGES. One row of x is multiplied on ordinary cores; several
rows, padded to ROWS, on tensor cores. Sums are float32 and never atomic: the same input gives the
same bits.

gpu_triton.py launches them from jax, triton_blocks.py chooses block sizes.

Dimension key: B rows of x  D model width  E experts  M neurons per expert  N layers
"""

from typing import no_type_check  # type checkers wrap functions, which Triton does not expect

import triton
import triton.language as tl


@triton.jit
@no_type_check
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of float32 values."""
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
def list_used(
    active,
    ids,
    count,
    e,
    busy,
    B: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Writes expert e, if it is `busy`, to the list, at the number of used experts before it.

    That of expert 0 also writes the count.
    """
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
    list for `combine`.
    """
    e = tl.program_id(0)
    i = tl.program_id(1)
    b = tl.arange(0, ROWS)
    own = tl.load(active + b * E + e, mask=b < B, other=0)
    busy = tl.max(own.to(tl.int32), 0) > 0
    if i == 0:
        list_used(active, ids, count, e, busy, B, E, ROWS, BLOCK_E)
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
            z = activate(g, ACTIVATION) * z
        else:
            z = activate(z, ACTIVATION)
        z = tl.where(own[None, :], z, 0.0)
        place = h + (e * B + b[None, :]) * M + m[:, None]
        tl.store(place, z.to(h.dtype.element_ty), mask=(b[None, :] < B) & (m[:, None] < M))


@triton.jit
@no_type_check
def _sum_rows(
    h,
    w,
    layer,
    ids,
    count,
    partial,
    j,
    D,
    place,
    WIDTH: tl.constexpr,
    B: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    H_EXPERT: tl.constexpr,
    H_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Columns [j BLOCK_D, (j + 1) BLOCK_D) of this split's sum of h times rows of w.

    They go to the columns from `place` on of `partial`, which has WIDTH.
    """
    PANELS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M  # of an expert
    d = j * BLOCK_D + tl.arange(0, BLOCK_D)
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
    out = partial + (s * B + b[:, None]) * WIDTH + place + d[None, :]
    tl.store(out, total, mask=(b[:, None] < B) & (d[None, :] < D))


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
    _sum_rows(
        h, w, layer, ids, count, partial, tl.program_id(0), D, 0, D, B, E, M, H_EXPERT, H_ROW,
        ROWS, BLOCK_M, BLOCK_D, SPLITS, STAGES, GATHER,
    )  # fmt: skip


@triton.jit
@no_type_check
def combine_three(
    x,  # [B, M]
    one,  # [N, M, D_ONE]
    two,  # [N, M, D_TWO]
    three,  # [N, M, D_THREE]
    layer,  # [], int32
    partial,  # out: [SPLITS, B, D_ONE + D_TWO + D_THREE], float32
    B: tl.constexpr,
    M: tl.constexpr,
    D_ONE: tl.constexpr,
    D_TWO: tl.constexpr,
    D_THREE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `combine` with one expert, for three matrices that are multiplied by one x."""
    FIRST: tl.constexpr = (D_ONE + BLOCK_D - 1) // BLOCK_D
    SECOND: tl.constexpr = FIRST + (D_TWO + BLOCK_D - 1) // BLOCK_D
    j = tl.program_id(0)
    w = one
    d = D_ONE
    place = 0
    if j >= SECOND:
        w = three
        d = D_THREE
        place = D_ONE + D_TWO
        j -= SECOND
    elif j >= FIRST:
        w = two
        d = D_TWO
        place = D_ONE
        j -= FIRST
    _sum_rows(
        x, w, layer, layer, layer, partial, j, d, place, D_ONE + D_TWO + D_THREE, B, 1, M, 0, M,
        ROWS, BLOCK_M, BLOCK_D, SPLITS, STAGES, False,
    )  # fmt: skip


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


@triton.jit
@no_type_check
def attend(
    q,  # [B, K GROUP, C]
    keys,  # [N, B, T, K, C]
    values,  # likewise
    visible,  # [B, T], bool
    layer,  # [], int32
    index,  # [], int32: the last place in use
    partial,  # out: [SPLITS, B, K GROUP, C], float32: not yet divided by their weights' sums
    sums,  # out: [SPLITS, B, K GROUP, 2], float32: the largest logit, the sum of the weights
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (b K + k, s): the queries of row b that share head k, over a share of the places.

    Keys and values at places that the row does not see are not read.
    """
    row = tl.program_id(0) // K
    head = tl.program_id(0) % K
    s = tl.program_id(1)
    g = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    own = (row * K + head) * GROUP + g  # of all queries
    inside = (g[:, None] < GROUP) & (c[None, :] < C)
    query = tl.load(q + own[:, None] * C + c[None, :], mask=inside, other=0.0)
    first = ((tl.load(layer).to(tl.int64) * B + row) * T * K + head) * C  # may overflow int32
    keys += first
    values += first
    blocks = tl.load(index) // BLOCK_T + 1
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i in tl.range(s * blocks // SPLITS, (s + 1) * blocks // SPLITS, num_stages=STAGES):
        t = i * BLOCK_T + tl.arange(0, BLOCK_T)
        seen = tl.load(visible + row * T + t, mask=t < T, other=0) != 0
        place = t.to(tl.int64) * K * C
        read = seen[None, :] & (c[:, None] < C)
        key = tl.load(keys + place[None, :] + c[:, None], mask=read, other=0.0)
        read = seen[:, None] & (c[None, :] < C)
        value = tl.load(values + place[:, None] + c[None, :], mask=read, other=0.0)
        logits = tl.dot(query, key, input_precision="ieee") * SCALE
        logits = tl.where(seen[None, :], logits, -1e30)
        larger = tl.maximum(best, tl.max(logits, 1))
        weight = tl.where(seen[None, :], tl.exp(logits - larger[:, None]), 0.0)
        fade = tl.exp(best - larger)
        total = total * fade + tl.sum(weight, 1)
        weight = weight.to(value.dtype)
        out = tl.dot(weight, value, out * fade[:, None], input_precision="ieee")
        best = larger
    mine = s * B * K * GROUP + own
    tl.store(partial + mine[:, None] * C + c[None, :], out, mask=inside)
    tl.store(sums + mine * 2, best, mask=g < GROUP)
    tl.store(sums + mine * 2 + 1, total, mask=g < GROUP)


@triton.jit
@no_type_check
def merge(
    partial,  # as `attend` writes them
    sums,
    y,  # out: [HEADS, C], of all rows
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program h: the shares of one query's attention, added up BLOCK_S at a time."""
    h = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    most = -1e30
    total = 0.0
    out = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(0, SPLITS, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        here = (s * HEADS + h) * 2
        best = tl.load(sums + here, mask=s < SPLITS, other=-1e30)
        weights = tl.load(sums + here + 1, mask=s < SPLITS, other=0.0)
        inside = (s[:, None] < SPLITS) & (c[None, :] < C)
        part = tl.load(partial + (s * HEADS + h)[:, None] * C + c[None, :], mask=inside, other=0.0)
        larger = tl.maximum(most, tl.max(best, 0))
        fade = tl.exp(best - larger)
        total = total * tl.exp(most - larger) + tl.sum(weights * fade, 0)
        out = out * tl.exp(most - larger) + tl.sum(part * fade[:, None], 0)
        most = larger
    tl.store(y + h * C + c, (out / total).to(y.dtype.element_ty), mask=c < C)
