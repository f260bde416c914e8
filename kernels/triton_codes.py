"""The Triton kernels for weights of 8, 6 or 4 bits: they read codes as quantized.py lays them out.

Tiles are streamed as in triton_kernels.py, and x stays as it is. A word has the same four inputs of
one output (int6 and int4: and four more, 16 inputs on), and 16 outputs lie side by side, so threads
load 16 bytes, as of floats. Inputs of x that have the same place in a word lie together, too.

Dimension key: B rows of x  K inputs  G = K/32 groups  T tiles of 16 outputs  E experts
               M neurons per expert  N layers  O outputs
"""

from typing import no_type_check  # type checkers wrap functions, which Triton does not expect

import triton
import triton.language as tl

from .triton_kernels import activate, list_used


@triton.jit
@no_type_check
def _words(codes, place, load, inside, FORMAT: tl.constexpr):
    """Four words of each tile and output, of the inputs 0 to 15.

    Also what inputs 16 to 31 have beside their share of these: int8 four words of their own, int6
    the upper bits of all, shifted as the lower are.
    """
    word = tl.load(codes + place + load * 16, mask=inside, other=0, eviction_policy="evict_first")
    more = word
    if FORMAT == "int8":
        at = codes + place + (load + 4) * 16
        more = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    elif FORMAT == "int6":
        at = codes + place + (64 + load % 2 * 16)
        more = tl.load(at, mask=inside, other=0) >> (load // 2 * 2)
    return word, more


@triton.jit
@no_type_check
def _steps(word, more, PLACE: tl.constexpr, HALF: tl.constexpr, FORMAT: tl.constexpr):
    """Weights over their scales, whole numbers: of a place in the words, a half of the inputs."""
    if FORMAT == "int8":
        if HALF == 1:
            word = more
        return ((word >> (8 * PLACE)) & 255).to(tl.float32) - 128.0
    elif FORMAT == "int6":
        code = (word >> (8 * PLACE + 4 * HALF)) & 15
        code |= ((more >> (8 * PLACE + 4 * HALF)) & 3) << 4
        return code.to(tl.float32) - 32.0
    else:
        tl.static_assert(FORMAT == "int4")
        return ((word >> (8 * PLACE + 4 * HALF)) & 15).to(tl.float32) - 8.0


@triton.jit
@no_type_check
def _sum_groups(
    x,  # input 4 i + j of row b lies at b K + j K/4 + i; of expert e, e X_EXPERT behind
    codes,  # of the layer: [E, T, G, 512, 384 or 256]
    scales,  # [E, T, G, 16]
    second_codes,  # likewise of a second matrix; anything without BOTH
    second_scales,
    ids,
    t,
    begin,
    end,
    tiles,
    B: tl.constexpr,
    G: tl.constexpr,
    X_EXPERT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    GATHER: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Sums over groups `begin` to `end` for outputs [t BLOCK_O, (t + 1) BLOCK_O): [BLOCK_O, ROWS].

    Groups are counted through all experts; with GATHER, the i-th of these is ids[i].
    """
    LOADS: tl.constexpr = 4
    WORDS: tl.constexpr = TILE // 4
    INPUTS: tl.constexpr = BLOCK_G * LOADS  # at one place of the words
    codes = codes.to(tl.pointer_type(tl.int32))
    second_codes = second_codes.to(tl.pointer_type(tl.int32))
    load = tl.arange(0, LOADS)[None, :, None]
    o = tl.arange(0, BLOCK_O)[None, None, :]
    b = tl.arange(0, ROWS)
    tile = t * (BLOCK_O // 16) + o // 16
    lane = o % 16
    if ROWS == 1:  # summed over inputs only at the end: no reduction between the loads
        one = tl.zeros([BLOCK_G, LOADS, BLOCK_O], tl.float32)
        two = tl.zeros([BLOCK_G, LOADS, BLOCK_O], tl.float32)
    else:
        one = tl.zeros([BLOCK_O, ROWS], tl.float32)
        two = tl.zeros([BLOCK_O, ROWS], tl.float32)
    for p in tl.range(begin, end, BLOCK_G, num_stages=STAGES):
        group = p + tl.arange(0, BLOCK_G)
        here = group < end
        e = group // G
        if GATHER:
            e = tl.load(ids + e, mask=here, other=0)
        block = (e * tiles * G + group % G)[:, None, None] + tile * G
        inside = here[:, None, None] & (tile < tiles)
        place = block * WORDS + lane
        word, more = _words(codes, place, load, inside, FORMAT)
        scale = tl.load(scales + block * 16 + lane, mask=inside, other=0.0).to(tl.float32)
        if BOTH:
            second, second_more = _words(second_codes, place, load, inside, FORMAT)
            second_scale = tl.load(second_scales + block * 16 + lane, mask=inside, other=0.0)
            second_scale = second_scale.to(tl.float32)
        first = x + (e * X_EXPERT + group % G * 8)[:, None] + tl.arange(0, LOADS)[None, :]
        seen = tl.broadcast_to(here[:, None], [BLOCK_G, LOADS])
        sum_one = tl.zeros([BLOCK_G, LOADS, BLOCK_O], tl.float32)
        sum_two = tl.zeros([BLOCK_G, LOADS, BLOCK_O], tl.float32)
        for j in tl.static_range(4):
            for half in tl.static_range(2):
                inputs = first + (j * G * 8 + 4 * half)
                steps = _steps(word, more, j, half, FORMAT)
                if ROWS == 1:
                    value = tl.load(inputs, mask=seen, other=0.0).to(tl.float32)[:, :, None]
                    sum_one += steps * value
                    if BOTH:
                        sum_two += _steps(second, second_more, j, half, FORMAT) * value
                else:
                    at = tl.reshape(inputs, [INPUTS])[:, None] + b[None, :] * (G * 32)
                    within = tl.reshape(seen, [INPUTS])[:, None] & (b[None, :] < B)
                    rows = tl.load(at, mask=within, other=0.0)
                    w = tl.reshape((steps * scale).to(rows.dtype), [INPUTS, BLOCK_O])
                    one = tl.dot(tl.trans(w), rows, one, input_precision="ieee")
                    if BOTH:
                        w = _steps(second, second_more, j, half, FORMAT) * second_scale
                        w = tl.reshape(w.to(rows.dtype), [INPUTS, BLOCK_O])
                        two = tl.dot(tl.trans(w), rows, two, input_precision="ieee")
        if ROWS == 1:
            one += sum_one * scale
            if BOTH:
                two += sum_two * second_scale
    if ROWS == 1:
        return tl.sum(tl.sum(one, 0), 0)[:, None], tl.sum(tl.sum(two, 0), 0)[:, None]
    else:
        return one, two


@triton.jit
@no_type_check
def hidden_codes(
    x,  # [B, 4, K/4]
    active,  # [B, E], bool
    layer,  # [], int32
    up,  # codes, [N, E, T, G, 512, 384 or 256]
    up_scales,  # [N, E, T, G, 16]
    gate,  # likewise; anything without GATED
    gate_scales,
    up_bias,  # [N, E, M]; anything without UP_BIAS
    gate_bias,  # likewise
    h,  # out: [E, B, 4, M/4]: hidden activations, undefined for idle experts
    ids,  # out: [E], int32: the used experts, ascending; undefined from count on
    count,  # out: [1], int32
    B: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
):
    """Program (e, i): neurons [i BLOCK_O, (i + 1) BLOCK_O) of expert e, as `hidden`."""
    e = tl.program_id(0)
    i = tl.program_id(1)
    b = tl.arange(0, ROWS)
    own = tl.load(active + b * E + e, mask=b < B, other=0)
    busy = tl.max(own.to(tl.int32), 0) > 0
    if i == 0:
        list_used(active, ids, count, e, busy, B, E, ROWS, BLOCK_E)
    if busy:
        T: tl.constexpr = M // 16
        expert = tl.load(layer).to(tl.int64) * E + e
        first = expert * T * G
        z, g = _sum_groups(
            x, up + first * TILE, up_scales + first * 16, gate + first * TILE,
            gate_scales + first * 16, layer, i, 0, G, T, B, G, 0, ROWS, BLOCK_O, BLOCK_G, STAGES,
            TILE, FORMAT, False, GATED,
        )  # fmt: skip
        m = i * BLOCK_O + tl.arange(0, BLOCK_O)
        if UP_BIAS:
            z += tl.load(up_bias + expert * M + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        if GATE_BIAS:
            g += tl.load(gate_bias + expert * M + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        if GATED:
            z = activate(g, ACTIVATION) * z
        else:
            z = activate(z, ACTIVATION)
        z = tl.where(own[None, :], z, 0.0)
        place = h + (e * B + b[None, :]) * M + (m % 4 * (M // 4) + m // 4)[:, None]
        tl.store(place, z.to(h.dtype.element_ty), mask=(b[None, :] < B) & (m[:, None] < M))


@triton.jit
@no_type_check
def _sum_share(
    x,
    codes,
    scales,
    layer,
    ids,
    count,
    partial,
    t,
    outputs,
    place,
    WIDTH: tl.constexpr,
    B: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
    X_EXPERT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Outputs [t BLOCK_O, (t + 1) BLOCK_O) of this split's sum.

    They go to the columns from `place` on of `partial`, which has WIDTH.
    """
    tiles = (outputs + 15) // 16
    s = tl.program_id(1)
    if GATHER:
        groups = tl.load(count) * G
    else:
        groups = E * G
    panels = (groups + BLOCK_G - 1) // BLOCK_G
    begin = s * panels // SPLITS * BLOCK_G
    end = tl.minimum((s + 1) * panels // SPLITS * BLOCK_G, groups)
    first = tl.load(layer).to(tl.int64) * E * tiles * G
    codes += first * TILE
    scales += first * 16
    total, _ = _sum_groups(
        x, codes, scales, codes, scales, ids, t, begin, end, tiles, B, G, X_EXPERT, ROWS,
        BLOCK_O, BLOCK_G, STAGES, TILE, FORMAT, GATHER, False,
    )  # fmt: skip
    b = tl.arange(0, ROWS)
    o = t * BLOCK_O + tl.arange(0, BLOCK_O)
    out = partial + (s * B + b[None, :]) * WIDTH + place + o[:, None]
    tl.store(out, total, mask=(b[None, :] < B) & (o[:, None] < outputs))


@triton.jit
@no_type_check
def combine_codes(
    x,  # input 4 i + j of row b of expert e lies at e X_EXPERT + b K + j K/4 + i
    codes,  # [N, E, T, G, 512, 384 or 256]
    scales,  # [N, E, T, G, 16]
    layer,  # [], int32
    ids,  # [E], int32, and
    count,  # [1], int32: the experts to sum over; anything without GATHER: all
    partial,  # out: [SPLITS, B, O], float32
    B: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
    OUTPUTS: tl.constexpr,
    X_EXPERT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Program (t, s): outputs [t BLOCK_O, (t + 1) BLOCK_O), summed over share s of all groups."""
    _sum_share(
        x, codes, scales, layer, ids, count, partial, tl.program_id(0), OUTPUTS, 0, OUTPUTS, B, E,
        G, X_EXPERT, ROWS, BLOCK_O, BLOCK_G, SPLITS, STAGES, TILE, FORMAT, GATHER,
    )  # fmt: skip


@triton.jit
@no_type_check
def combine_three_codes(
    x,  # [B, 4, K/4]
    one,  # codes, [N, T, G, 512, 384 or 256]
    one_scales,  # [N, T, G, 16]
    two,
    two_scales,
    three,
    three_scales,
    layer,  # [], int32
    partial,  # out: [SPLITS, B, O_ONE + O_TWO + O_THREE], float32
    B: tl.constexpr,
    G: tl.constexpr,
    O_ONE: tl.constexpr,
    O_TWO: tl.constexpr,
    O_THREE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """As `combine_codes` with one expert, for three matrices that are multiplied by one x."""
    FIRST: tl.constexpr = (O_ONE + BLOCK_O - 1) // BLOCK_O
    SECOND: tl.constexpr = FIRST + (O_TWO + BLOCK_O - 1) // BLOCK_O
    t = tl.program_id(0)
    codes = one
    scales = one_scales
    outputs = O_ONE
    place = 0
    if t >= SECOND:
        codes = three
        scales = three_scales
        outputs = O_THREE
        place = O_ONE + O_TWO
        t -= SECOND
    elif t >= FIRST:
        codes = two
        scales = two_scales
        outputs = O_TWO
        place = O_ONE
        t -= FIRST
    _sum_share(
        x, codes, scales, layer, layer, layer, partial, t, outputs, place, O_ONE + O_TWO + O_THREE,
        B, 1, G, 0, ROWS, BLOCK_O, BLOCK_G, SPLITS, STAGES, TILE, FORMAT, False,
    )  # fmt: skip
