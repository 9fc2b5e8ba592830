"""
The selective scan as fused GPU kernels: the same function as selective_scan in mamba.py, which uses
it on CUDA where this file lies beside it; then the convolution in front of the scan. Optional:
without this file or without Triton everything works, slower. The scan is written in Gluon, the part
of Triton in which one says which thread holds what.

How the work is divided. A warp takes 8 channels of one sequence and walks along it in tiles.

Forward, in _outputs, 4 threads share a channel: each has a quarter of the numbers of its state in
registers, and takes one step after the other, with x = delta u:

    h = exp(delta_k A) h + x_k B_k
    y_k += C_k h

More than 16 numbers a channel are too many, so they take turns in each tile, and wait in memory.

What all numbers of a channel have in common, softplus before and the gate after, is done for a
whole tile at once, by threads that have 4 steps of two channels. In between delta, x and what each
thread adds to y go through shared memory.

Backward, in _gradients, registers are too few for all steps of a tile. A thread has one channel and
the K steps of one of the tile's 4 segments, all its inputs and sums in registers, and goes over the
N numbers of the state, two a round:

    a_k = exp(delta_k A), x_k B_k           for its K steps: all exponentials but one a segment
    h from a zero state                     what the segment adds to the state
    what enters each segment                from what all of them add (_through)
    h again from there, y_k += C_k h        multiply-adds, for the exponentials are still there

Nothing crosses threads but what a segment adds. The state that enters a tile was kept in memory by
_outputs. In the same way, from the end of the sequence on, _gradients computes the adjoint
g_k = C_k gy_k + a_{k+1} g_{k+1}, of which a_k g_k is what is handed on. All gradients follow from h
and g of the same thread. Those of B and C are sums over channels: over the 8 of a warp the tensor
cores add them up (_over_channels), over the warps of a program they meet in shared memory, over
programs _finish adds them up. No two threads add to the same number in memory: the same input gives
the same bits.

What a program reads of a tile comes into shared memory ahead of time (_fetch...). Four warps share
a program, for whole lines of memory. If batch and channels are too few to fill the chip, the
sequence is cut into chunks, and first it is found what each of them adds (_ends, which has segments
too) and what enters it (_carry). The exponentials are then computed twice, but only as far back
from the end of a chunk as its channels remember. One kernel before all of them (_pack) brings the
small inputs into the order in which they are read.

What bounds it, by the counters of an H200, with all options. _outputs takes 9 instructions for each
of the (B, L, D, N) numbers: exponentials come at 67 % of their rate, shared memory is read and
written in 67 % of the cycles, and an instruction is issued in 63 %. _gradients takes 29; in 61 % of
the cycles one is issued, in the rest all warps, of which there is room for few, wait for their own
results. In _ends it is the exponentials, on an H100 at 69 % of their rate.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import library
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import constexpr, gather
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .launch import Kernel, at_once
from .operators import differentiable_once

S, LANES = constexpr(4), constexpr(8)       # a warp: segments or groups of numbers, and channels
WARPS, BD = constexpr(4), constexpr(32)     # a program: warps, and channels
NB = constexpr(16)      # for how many numbers of the states it has B and C at once; it is even
# steps of a tile of _ends; of one of _outputs and _gradients, before each of which a state is kept
TILE, HALF = constexpr(64), constexpr(32)
SHORTEST = 4            # tiles of a chunk, at least
# parts of a chunk, for _ends backward: more and smaller programs leave no multiprocessor idle
PARTS = constexpr(4)
# warps that an H100 holds at once: a sequence is cut into chunks until there are so many
FILL, FILL_BACK = 2112, 1584

# numbers that vary from call to call, for which no kernel is compiled anew
SIZES = ("L", "N", "whole", "tiles", "chunks", "slots", "apart", "u_b", "x_b", "delta_b", "z_b",
         "g_b", "Lp", "rows", "blocks", "batch", "B_n", "C_n", "gB_l")
ANYWHERE = ("Dw", "bias")   # they may begin at any address
LOG2E = constexpr(1.4426950408889634)


def _by_bits(axes, registers, lanes, warps):
    """A layout: the bits of each axis by their names, the lowest first, and which of them count the
    numbers of a thread, the lanes of a warp and the warps."""
    places, axes = {}, [bits.split() for bits in axes]
    for axis, bits in enumerate(axes):
        for i, bit in enumerate(bits):
            places[bit] = [0] * axis + [2 ** i] + [0] * (len(axes) - axis - 1)
    bases = ([places[bit] for bit in bits.split()] for bits in (registers, lanes, warps))
    return constexpr(gl.DistributedLinearLayout(*bases, [], [2 ** len(bits) for bits in axes]))


# which thread has what: one channel of one segment; 8 or 4 numbers side by side, as memory likes
# it; sums of all warps
LAYOUT = constexpr(gl.BlockedLayout([1, 1], [4, 8], [1, 4], [1, 0]))        # (S, BD)
WIDE = constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))          # tiles (T, BD)
# B and C (2 NB, T), states (NB, BD)
WIDE32 = constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
TO_SUM = constexpr(gl.BlockedLayout([2, 4, 1, 1, 2], [1, 1, 4, 8, 1], [4, 1, 1, 1, 1],
                                    [4, 3, 2, 1, 0]))
# of _outputs: 4 steps of two channels, in a tile (T, BD) or in fours of steps (T / 4, BD, 4);
# 4 steps of B and C (T / 4, 2 NB, 4)
PAIRS = constexpr(gl.BlockedLayout([4, 2], [2, 16], [4, 1], [1, 0]))
FOURS = constexpr(gl.BlockedLayout([1, 2, 4], [2, 16, 1], [4, 1, 1], [2, 1, 0]))
WIDE_BC = constexpr(gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0]))
# one channel d and one group g of numbers: g, g + 4, g + 8, g + 12. A lane has the channel of its
# neighbour and the group of the next but one: so reading both takes half as long
WHO = "g0 d0 d1 d2 g1", "d3 d4"
OF_FOUR = _by_bits(("g0 g1", "d0 d1 d2 d3 d4", "k0 k1"), "k0 k1", *WHO)     # 4 steps: (S, BD, 4)
OF_NUMBERS = constexpr(gl.SliceLayout(2, OF_FOUR))                          # (S, BD)
# the same as (S, 4, 32): a row of memory has 4 steps of 8 channels
X_OF_NUMBERS = _by_bits(("g0 g1", "d3 d4", "k0 k1 d0 d1 d2"), "k0 k1", *WHO)
# what all groups add, as FOURS has it: (T / 4, 2, 8, 32)
Y_OF_GROUPS = _by_bits(("c0 c1 c2", "g1", "d2 d3 d4", "k0 k1 g0 d0 d1"), "k0 k1 g0 g1 d0",
                       "d1 d2 d3 d4 c0", "c1 c2")
# index takes one place of the first axis, so what it gives has a rank less than what is allocated
LINE, PLAIN, RANK_3, RANK_4, RANK_5 = (
    constexpr(gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])) for rank in range(1, 6))
# rows of 32 words, in which who reads or writes every other channel meets no bank twice
ROWS, ROWS_OF_FOURS, ROWS_OF_Y = (
    constexpr(gl.SwizzledSharedLayout(4, 1, rows, list(range(rank))[::-1]))
    for rows, rank in ((2, 2), (2, 3), (4, 4)))

# Gluon is young: these three have changed their names
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
shared = gl.shared_memory_descriptor
reinterpret = getattr(shared, "reinterpret", None) or shared._reinterpret
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def _mma(exact):
    """
    PTX that adds up two sets of 8 numbers over the 8 channels of a warp, on the tensor cores. To
    mma.m16n8k8 four numbers of a lane, lanes in 8 x 4, are two of a row each in two 8 x 4 halves of
    the rows: it adds up 4 lanes. The other operand picks the columns 2 m and 2 m + 1 of the result
    for the m-th four of the 16 numbers; the lanes that have these are the m-th of each 4. What is
    left is to add the rows 2 s and 2 s + 1: lanes that are 4 apart exchange half of what they have.
    """
    mma = ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{c0, c1, c2, c3}}, {{{0}}}, "
           "{{{1}}}, {{c0, c1, c2, c3}};")
    lines = [("{ .reg .b32 x<4>; .reg .f32 r<4>, c<4>, give, have; .reg .pred odd; "
              "and.b32 x0, $2, 1; setp.ne.u32 odd, x0, 0;"),
             *(f"mov.f32 c{i}, 0f00000000;" for i in range(4))]
    for m in range(4):
        four, pick = [f"${11 + 4 * m + i}" for i in range(4)], f"${3 + 2 * m}, ${4 + 2 * m}"
        if exact:       # tf32 has 10 bits of the 23: what they leave goes through a second time
            for i, x in enumerate(four):
                lines.append(f"and.b32 x{i}, {x}, 0xffffe000; mov.b32 r{i}, x{i}; "
                             f"sub.f32 r{i}, {x}, r{i};")
            lines += [mma.format("x0, x1, x2, x3", pick),
                      *(f"mov.b32 x{i}, r{i};" for i in range(4))]
            four = ["x0", "x1", "x2", "x3"]
        lines.append(mma.format(", ".join(four), pick))
    for i in range(2):
        lines.append(f"selp.f32 give, c{2 * i}, c{2 * i + 1}, odd; "
                     f"selp.f32 have, c{2 * i + 1}, c{2 * i}, odd; "
                     "shfl.sync.bfly.b32 give, give, 4, 0x1f, 0xffffffff; "
                     f"add.f32 ${i}, have, give;")
    return constexpr("\n".join([*lines, "}"]))


MMA, MMA_EXACT = _mma(False), _mma(True)
MMA_OPERANDS = constexpr("=r,=r," + ",".join(["r"] * 25))


@gluon.jit
def _over_channels(p, q, row, EXACT: constexpr):
    """
    p, q: 8 tensors (S, BD) each -> their sums over the LANES channels of each warp, spread over it:
    the lane of (s, d) has, of p where d % 4 < 2 and of q elsewhere, those of the tensors
    k = 4 (d % 2) + 2 (d // 4) and k + 1, of segment s.
    """
    rows = ()
    for j in gl.static_range(8):
        rows = rows + (gl.where(row == j, 1.0, 0.0),)
    return gl.inline_asm_elementwise(
        MMA_EXACT if EXACT else MMA, MMA_OPERANDS,
        [row, rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7],
         p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7],
         q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]],
        (gl.float32, gl.float32), True, 1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _sigmoid(x):
    return _reciprocal(1 + gl.exp2(-x * LOG2E))


# log1p(e) / e as a polynomial, the factor of e ** 8 first: fitted for 0 to 1, off by less than 4e-8
# of its value
LOG1P = constexpr((0.0053648245, -0.030065794, 0.079204538, -0.13753803, 0.19153655, -0.24857164,
                   0.33321323, -0.49999648, 1.0))


@gluon.jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|). A small e keeps its digits, for
    log1p(e) / e is computed, which is 1 there."""
    e = gl.exp2(-gl.abs(x) * LOG2E)
    p = e * LOG1P[0] + LOG1P[1]
    for i in gl.static_range(2, 9):
        p = p * e + LOG1P[i]
    return gl.maximum(x, 0) + p * e


@gluon.jit
def _fetch(x, buffer, t0, block, L, D, x_l: constexpr, T: constexpr):
    """A tile of x (L, D), from step t0 on, is copied into shared memory while the program goes
    on."""
    t = t0 + gl.arange(0, T, gl.SliceLayout(1, WIDE))[:, None]
    d = block * BD + gl.arange(0, BD, gl.SliceLayout(0, WIDE))[None, :]
    async_load(buffer, x + t.to(gl.int64) * x_l + d, mask=(t >= 0) & (t < L) & (d < D))


@gluon.jit
def _fetch_all(inputs, strides, buffers, which, t0, block, L, D, T: constexpr):
    for j in gl.static_range(len(inputs)):
        _fetch(inputs[j], buffers[j].index(which), t0, block, L, D, strides[j], T)


@gluon.jit
def _fetch_BC(BC, buffers, which, t0, n0, N, Lp, T: constexpr):
    """The same for B and C of a tile, for NB numbers of the states from n0 on."""
    row = gl.arange(0, 2 * NB, gl.SliceLayout(1, WIDE32))[:, None]
    t = t0 + gl.arange(0, T, gl.SliceLayout(0, WIDE32))[None, :]
    n = n0 + row % NB
    rows = reinterpret(buffers, gl.float32, [2, 2 * NB, T], PLAIN).index(which)
    async_load(rows, BC + (row // NB * N + n) * Lp + t, mask=(n < N) & (t >= 0) & (t < Lp))


@gluon.jit
def _fetch_states(inputs, buffers, n0, block, N, D, there):
    """NB rows of each input (N, D), from n0 on, into a block of their own, as a group of copies
    that can be waited for.
    there: how many rows the last input has; what it does not have is 0."""
    n = n0 + gl.arange(0, NB, gl.SliceLayout(1, WIDE32))[:, None]
    d = block * BD + gl.arange(0, BD, gl.SliceLayout(0, WIDE32))[None, :]
    for j in gl.static_range(len(inputs)):
        async_load(reinterpret(buffers[j], gl.float32, [NB, BD], PLAIN), inputs[j] + n * D + d,
                   mask=(n < (there if j == len(inputs) - 1 else N)) & (d < D))
    async_copy.commit_group()


@gluon.jit
def _state(buffers, i):
    """A row of them: (1, BD)."""
    return buffers.index(i).load(gl.SliceLayout(0, LAYOUT))[None, :]


@triton.constexpr_function
def in_threads(K):
    """The layout of a tile (S, BD, K) in which a thread has the K steps of a segment."""
    return gl.BlockedLayout([1, 1, K], [S, LANES, 1], [1, WARPS, 1], [2, 1, 0])


@gluon.jit
def _tile(buffer, K: constexpr):
    """A tile (T, BD) in shared memory, as (S, BD, K)."""
    rows: constexpr = gl.BlockedLayout([K, 1], [S, LANES], [1, WARPS], [1, 0])
    x = gl.reshape(buffer.load(rows).to(gl.float32), [S, K, BD])
    return gl.convert_layout(gl.permute(x, (0, 2, 1)), in_threads(K))


@triton.constexpr_function
def log2(K):
    return K.bit_length() - 1


@gluon.jit
def _each_step(x, K: constexpr, layout: constexpr):
    """(X, Y, K) -> K tensors (X, Y) in layout."""
    X: constexpr = x.shape[0]
    Y: constexpr = x.shape[1]
    parts = (x,)
    for level in gl.static_range(log2(K)):
        halves = ()
        for i in gl.static_range(2 ** level):
            half = gl.reshape(parts[i], [X, Y, 2, K // 2 ** (level + 1)])
            first, second = gl.split(gl.permute(half, (0, 1, 3, 2)))
            halves = halves + (first, second)
        parts = halves
    steps = ()
    for k in gl.static_range(K):
        steps = steps + (gl.convert_layout(gl.reshape(parts[k], [X, Y]), layout),)
    return steps


@gluon.jit
def _joined(steps, K: constexpr):
    """K tensors (X, Y) -> (X, Y, K)."""
    X: constexpr = steps[0].shape[0]
    Y: constexpr = steps[0].shape[1]
    for level in gl.static_range(log2(K)):
        pairs = ()
        for i in gl.static_range(K // 2 ** (level + 1)):
            # first and second half side by side: undoes _each_step
            pair = gl.join(steps[2 * i], steps[2 * i + 1])
            if level > 0:
                pair = gl.permute(pair, (0, 1, 3, 2))
            pairs = pairs + (gl.reshape(pair, [X, Y, 2 ** (level + 1)]),)
        steps = pairs
    return steps[0]


@gluon.jit
def _all_steps(steps, K: constexpr):
    """The same in the layout of _tile."""
    return gl.convert_layout(_joined(steps, K), in_threads(K))


@gluon.jit
def _row(buffers, i, K: constexpr):
    """B or C of a tile for one number of the states -> K tensors (S, 1)."""
    steps = buffers.index(i).load(gl.SliceLayout(1, in_threads(K)))
    return _each_step(gl.reshape(steps, [S, 1, K]), K, LAYOUT)


@gluon.jit
def _store_tile(x, tile, t0, block, L, D, x_l: constexpr, T: constexpr, layout: constexpr):
    """(S, BD, K) or (T / 4, BD, 4) -> a tile of x (L, D), whose steps are x_l numbers apart."""
    tile = gl.reshape(gl.permute(tile, (0, 2, 1)), [T, BD]).to(x.dtype.element_ty)
    t = t0 + gl.arange(0, T, gl.SliceLayout(1, layout))[:, None]
    d = block * BD + gl.arange(0, BD, gl.SliceLayout(0, layout))[None, :]
    gl.store(x + t.to(gl.int64) * x_l + d, gl.convert_layout(tile, layout), mask=(t < L) & (d < D))


@gluon.jit
def _through(decay, adds, entering, s, REVERSE: constexpr):
    """What enters each of the segments of a tile. A thread gets decay and adds of the other
    segments, and walks through those that come before its own."""
    at = gl.full([S, BD], 0, gl.int32, LAYOUT)      # of the shape of what gather gives
    for j in gl.static_range(S - 1):
        of = S - 1 - j if REVERSE else j
        after = gather(decay, at + of, 0) * entering + gather(adds, at + of, 0)
        entering = gl.where(s < of if REVERSE else s > of, after, entering)
    return entering


@triton.constexpr_function
def only_whole_blocks(D):
    return D % BD.value == 0


@gluon.jit
def _place(L, D, tiles, block, chunk, T: constexpr, layout: constexpr):
    """The sequence of this program, where its chunk begins and how many tiles it has; segments or
    groups s (S, 1), channels d (1, BD) of its block, and which of them there are."""
    b = gl.program_id(2).to(gl.int64)
    s = gl.arange(0, S, gl.SliceLayout(1, layout))[:, None]
    d = (block * BD + gl.arange(0, BD, gl.SliceLayout(0, layout)))[None, :]
    # a mask of which the compiler knows that it is True takes no instructions
    in_d = gl.full([1, BD], True, gl.int1, layout) if only_whole_blocks(D) else d < D
    start = chunk * tiles * T
    return b, start, gl.minimum(tiles, (L - start + T - 1) // T), s, d, in_d


@gluon.jit
def _per_channel(x, block, D, THERE: constexpr, layout: constexpr):
    """x (D,) for the channels of a block: (1, BD, 1)."""
    OF_BD: constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    d = block * BD + gl.arange(0, BD, OF_BD)[None, :, None]
    return gl.load(x + d, mask=d < D, other=0) if THERE else 0.0


@gluon.jit
def _is_there(left, X: constexpr, K: constexpr, layout: constexpr):
    """Which steps of a tile there are, if so many are left: (X, 1, K)."""
    OF_STEPS: constexpr = gl.SliceLayout(1, layout)
    x = gl.arange(0, X, gl.SliceLayout(1, OF_STEPS))[:, None]
    k = gl.arange(0, K, gl.SliceLayout(0, OF_STEPS))[None, :]
    return (x * K + k < left)[:, None, :]


@gluon.jit
def _sum_of_steps(x):
    """(S, BD, K) -> (S, BD)."""
    return gl.convert_layout(gl.sum(x, 2), LAYOUT)


@gluon.jit
def _buffers(u, delta, z, HAS_Z: constexpr, K: constexpr):
    """Shared memory for two tiles of u, delta and z, in which the segments are in different banks,
    two blocks of B and C, and one of A, h and the adjoint."""
    tile: constexpr = gl.SwizzledSharedLayout(8, K, S, [1, 0])
    us = gl.allocate_shared_memory(u.dtype.element_ty, [2, S * K, BD], tile)
    deltas = gl.allocate_shared_memory(delta.dtype.element_ty, [2, S * K, BD], tile)
    zs = gl.allocate_shared_memory(z.dtype.element_ty, [2, S * K, BD], tile) if HAS_Z else us
    BCs = gl.allocate_shared_memory(gl.float32, [4 * NB, S, K], PLAIN)
    hs = ()
    for _ in gl.static_range(3):
        hs = hs + (gl.allocate_shared_memory(gl.float32, [NB, BD], LINE),)
    return us, deltas, zs, BCs, hs


@gluon.jit
def _fetch_next(BC, BCs, which, t0, t_next, n0, N, Lp, T: constexpr):
    """B and C for the next numbers of the states in this tile, or the first in the next; then wait
    for all but that."""
    _fetch_BC(BC, BCs, which, gl.where(N > n0 + NB, t0, t_next), gl.where(N > n0 + NB, n0 + NB, 0),
              N, Lp, T)
    async_copy.commit_group()
    async_copy.wait_group(1)
    barrier()


@gluon.jit
def _delta(raw, bias_d, is_there, SOFTPLUS: constexpr):
    """delta of a tile, finished, and 0 after the end of the sequence."""
    return gl.where(is_there, _softplus(raw + bias_d) if SOFTPLUS else raw + bias_d, 0)


@gluon.jit
def _or(a, b):
    return a | b


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _ends(x, delta, A, BC, z, bias, ends, decays, L, D: constexpr, N, whole, tiles, chunks, slots,
          apart, x_b, x_l: constexpr, delta_b, delta_l: constexpr, z_b, z_l: constexpr,
          HAS_Z: constexpr, HAS_BIAS: constexpr, SOFTPLUS: constexpr, REVERSE: constexpr,
          AT_ONCE: constexpr, PARTS: constexpr):
    """
    From a zero state, what each of the PARTS of a chunk adds to the state; in reverse, to the
    adjoint. x is u, or gout. A program has AT_ONCE numbers of the states in registers and walks
    from where its part is left to where it is entered. A few of them are done when all before is
    forgotten: when the decay over the way, exp2(way A), is 0 in float32.
    ends (B, slots, N, D): where it goes.  decays (B, chunks * PARTS, N, D): of what enters the
    part.
    """
    K: constexpr = 16
    T: constexpr = S * K
    Lp = whole * TILE
    # the last chunk adds to no other, in reverse the first
    part = gl.program_id(1) + (PARTS if REVERSE else 0)
    rows, of_part = (N + AT_ONCE - 1) // AT_ONCE, (tiles + PARTS - 1) // PARTS
    block, n0 = gl.program_id(0) // rows, gl.program_id(0) % rows * AT_ONCE
    before = part % PARTS * of_part
    chunk = part // PARTS
    b, start, tiles, s, d, in_d = _place(L, D, tiles, block, chunk, T, LAYOUT)
    bias_d = _per_channel(bias, block, D, HAS_BIAS, in_threads(K))
    start, tiles = start + before * T, gl.minimum(of_part, tiles - before)
    ends += (b * slots + (part - 1 if REVERSE else (part + 1) * apart)) * N * D
    decays += (b * chunks * PARTS + part) * N * D
    inputs, strides = (x + b * x_b * 8, delta + b * delta_b * 8), (x_l, delta_l)
    xs, deltas, zs, BCs, _ = _buffers(x, delta, z, HAS_Z, K)
    buffers = (xs, deltas)
    if HAS_Z:
        inputs, strides, buffers = inputs + (z + b * z_b * 8,), strides + (z_l,), buffers + (zs,)
    V = BC + (b * 2 + (1 if REVERSE else 0)) * N * Lp       # B, or C
    Vs = reinterpret(BCs, gl.float32, [4, NB, T], PLAIN)
    row = gl.arange(0, NB, gl.SliceLayout(1, WIDE32))[:, None]
    step = gl.arange(0, T, gl.SliceLayout(0, WIDE32))[None, :]
    FEW: constexpr = min(AT_ONCE, 4)
    A_n, h, slowest, zero = (), (), (), gl.zeros([S, BD], gl.float32, LAYOUT)
    for few in gl.static_range(AT_ONCE // FEW):
        slowest_n = zero - 1e30
        for n in gl.static_range(few * FEW, few * FEW + FEW):
            there = in_d & (s * 0 + n0 + n < N)
            A_n = A_n + (gl.load(A + (n0 + n) * D + d + s * 0, mask=there, other=-1e30),)
            h = h + (zero,)
            slowest_n = gl.maximum(slowest_n, A_n[n])
        slowest = slowest + (slowest_n,)
    way, i = zero, -1       # the sum of delta from here to where the part is left
    todo = 2 ** (AT_ONCE // FEW) - 1            # a bit for each few
    while (i < tiles) & (todo > 0):             # fetches one tile ahead
        t0 = start + (i + 1 if REVERSE else tiles - 2 - i) * T
        async_copy.wait_group(0)
        barrier()
        _fetch_all(inputs, strides, buffers, (i + 1) % 2, t0, block, L, D, T)
        in_V = (row < AT_ONCE) & (n0 + row < N) & (t0 + step >= 0) & (t0 + step < Lp)
        async_load(Vs.index((i + 1) % 2), V + (n0 + row) * Lp + t0 + step, mask=in_V)
        async_copy.commit_group()
        if i >= 0:
            left = L - (t0 - T if REVERSE else t0 + T)
            is_there = _is_there(left, S, K, in_threads(K))
            delta_t = _delta(_tile(deltas.index(i % 2), K), bias_d, is_there, SOFTPLUS)
            x_t, ways, next_h = _tile(xs.index(i % 2), K), (), ()
            if HAS_Z:
                z_t = _tile(zs.index(i % 2), K)
                x_t *= z_t * _sigmoid(z_t)
            delta_k = _each_step(delta_t, K, LAYOUT)
            add_k = _each_step(x_t if REVERSE else delta_t * x_t, K, LAYOUT)
            delta_s = _sum_of_steps(delta_t)
            # with decays of 1 it is the sum over the segments before
            way_of_t = _through(zero + 1, delta_s, way, s, not REVERSE)
            way += gl.sum(delta_s, 0)[None, :]
            for k in gl.static_range(K):
                if REVERSE:
                    way_of_t += delta_k[k]
                    ways = ways + (way_of_t,)
                else:
                    ways = (way_of_t,) + ways
                    way_of_t += delta_k[K - 1 - k]
            remembered = gl.zeros([S, BD], gl.int32, LAYOUT)
            for few in gl.static_range(AT_ONCE // FEW):
                of_few = h[few * FEW:few * FEW + FEW]
                if todo >> few & 1:
                    of_few = ()
                    for j in gl.static_range(few * FEW, few * FEW + FEW):
                        V_k, h_j = _row(BCs, i % 2 * NB + j, K), h[j]
                        for k in gl.static_range(K):
                            h_j += gl.exp2(ways[k] * A_n[j]) * (add_k[k] * V_k[k])
                        of_few = of_few + (h_j,)
                next_h = next_h + of_few
                # exp2 makes 0 of what is below -126: here it has no denormals
                remembered += gl.where(in_d & (way * slowest[few] > -127), 2 ** few, 0)
            h, todo = next_h, gl.reduce(gl.reduce(remembered, 1, _or), 0, _or)
        i += 1
    async_copy.wait_group(0)
    for n in gl.static_range(AT_ONCE):
        at, there = (n0 + n) * D + d + s * 0, in_d & (s == 0) & (s + n0 + n < N)
        gl.store(ends + at, gl.sum(h[n], 0)[None, :] + s * 0, mask=there)
        gl.store(decays + at, gl.exp2(way * A_n[n]), mask=there)


@gluon.jit(do_not_specialize=SIZES)
def _carry(states, decays, D: constexpr, N, chunks, slots, apart, REVERSE: constexpr,
           PARTS: constexpr, FROM_ZERO: constexpr):
    """
    What the PARTS of chunks add becomes what enters each chunk: entering' = decay entering + what
    this part adds.
    FROM_ZERO: the first of the states is 0, and nothing has been written there.
    """
    # in (N, D)
    i = gl.program_id(0) * 128 + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    b = gl.program_id(1).to(gl.int64)
    inside = i < N * D
    states += (b * slots + (slots - 1 if REVERSE else 0)) * N * D + i
    decays += (b * chunks * PARTS + (chunks * PARTS - 1 if REVERSE else 0)) * N * D + i
    h = gl.load(states, mask=inside & (not FROM_ZERO), other=0)
    for _ in range(1, chunks):
        for _ in gl.static_range(PARTS):
            h *= gl.load(decays, mask=inside, other=0)
            states += (-1 if REVERSE else apart) * N * D
            decays += (-1 if REVERSE else 1) * N * D
            h += gl.load(states, mask=inside, other=0)
        gl.store(states, h, mask=inside)


@gluon.jit
def _in_fours(tile):
    """A tile (T, BD) -> (T / 4, BD, 4)."""
    tile = gl.reshape(tile.to(gl.float32), [HALF // 4, 4, BD])
    return gl.convert_layout(gl.permute(tile, (0, 2, 1)), FOURS)


@gluon.jit
def _fetch_fours(BC, buffers, which, t0, n0, N, Lp):
    """B and C of a tile for NB numbers of the states from n0 on, in fours of steps as in memory."""
    OF_2: constexpr = gl.SliceLayout(2, WIDE_BC)
    four = t0 // 4 + gl.arange(0, HALF // 4, gl.SliceLayout(1, OF_2))[:, None, None]
    row = gl.arange(0, 2 * NB, gl.SliceLayout(0, OF_2))[None, :, None]
    k = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, WIDE_BC)))[None, None, :]
    n = n0 + row % NB
    async_load(buffers.index(which), BC + ((four * 2 + row // NB) * N + n) * 4 + k,
               mask=(n < N) & (four < Lp // 4))


@gluon.jit
def _load_numbers(x, n, d, in_d, N, D, EACH: constexpr):
    """EACH rows of x (N, D), S apart from row n on: (S, BD, 1). What it does not have is 0."""
    rows = ()
    for j in gl.static_range(EACH):
        row = gl.load(x + (n + S * j) * D + d, mask=in_d & (n + S * j < N), other=0)
        rows = rows + (row[:, :, None],)
    return rows


# PTX in which $0 to $3 are h, $4 to $7 a, $8 to $11 b, and $12 to $15 h of the four steps before.
# By & h is not in the place of an input. Triton gives it four numbers of a thread, in the order of
# its registers: by OF_FOUR these are four steps
CHAIN = constexpr(" ".join(f"fma.rn.f32 ${k}, ${4 + k}, ${k - 1 if k else 15}, ${8 + k};"
                           for k in range(4)))
CHAIN_OPERANDS = constexpr(",".join(["=&f"] * 4 + ["f"] * 12))


@gluon.jit
def _next_states(a, b, h):
    """
    h_k = a_k h_{k - 1} + b_k for four steps: (S, BD, 4) each. To Triton this is one operation;
    several for each step would take a second longer to compile.
    h: the states after the four steps before, of which the last counts, or that alone (S, BD, 1).
    """
    return gl.inline_asm_elementwise(CHAIN, CHAIN_OPERANDS, [a, b, h], gl.float32, True, 4)


@gluon.jit
def _four_steps(y, h, A_n, delta_c, x_c, BC, first, EACH: constexpr):
    """
    Four steps of EACH numbers of the states: y (S, BD, 4) with what they add, and h after each of
    them. Where there is no number, A, B, C and h are 0: it adds 0, or NaN if u or delta is
    infinite.
    delta_c, x_c: memory with delta and delta u of these steps.  BC: B and C, from place first on.
    """
    OF_X: constexpr = gl.SliceLayout(0, X_OF_NUMBERS)
    OF_BC: constexpr = gl.SliceLayout(1, OF_FOUR)
    delta = gl.convert_layout(gl.reshape(delta_c.load(OF_X), [1, BD, 4]), OF_FOUR)
    x = gl.convert_layout(gl.reshape(x_c.load(OF_X), [1, BD, 4]), OF_FOUR)
    hs = ()
    for j in gl.static_range(EACH):
        B, C = BC.index(first + j).load(OF_BC), BC.index(first + NB // S + j).load(OF_BC)
        h_j = _next_states(gl.exp2(delta * A_n[j]), x * B[:, None, :], h[j])
        y, hs = y + C[:, None, :] * h_j, hs + (h_j,)
    return y, hs


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _outputs(u, delta, A, BC, Dw, z, bias, y, states, last, L, D: constexpr, N, whole, tiles,
             chunks, slots, u_b, u_l: constexpr, delta_b, delta_l: constexpr, z_b, z_l: constexpr,
             HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr, SOFTPLUS: constexpr,
             KEEP: constexpr, EACH: constexpr, ALL: constexpr):
    """
    y and last (B, N, D), from states (B, slots, N, D), in which those that enter the chunks are
    there already. With KEEP the state after each tile goes there too, for the backward pass.
    A, BC: A2 and fours of _pack.  u_b, delta_b, z_b: in units of 8.
    EACH: how many numbers of the states a thread has at once.  ALL: these are all numbers, so they
    stay in registers; else they come from memory in each tile and go back.
    """
    T: constexpr = HALF
    SOME: constexpr = S * EACH
    Lp = whole * TILE
    chunk, per_chunk = gl.program_id(1), tiles
    block = gl.program_id(0)
    b, t0, tiles, g, d, in_d = _place(L, D, tiles, block, chunk, T, OF_NUMBERS)
    bias_d = _per_channel(bias, block, D, HAS_BIAS, FOURS)
    D_d = _per_channel(Dw, block, D, HAS_D, FOURS)
    inputs, strides = (u + b * u_b * 8, delta + b * delta_b * 8), (u_l, delta_l)
    y += b * L * D
    BC += b * 2 * N * Lp
    states += (b * slots + chunk * (per_chunk if KEEP else 1)) * N * D
    last += b * N * D
    us = gl.allocate_shared_memory(u.dtype.element_ty, [2, T, BD], PLAIN)
    deltas = gl.allocate_shared_memory(delta.dtype.element_ty, [2, T, BD], PLAIN)
    zs = gl.allocate_shared_memory(z.dtype.element_ty, [2, T, BD], PLAIN) if HAS_Z else us
    BCs = gl.allocate_shared_memory(gl.float32, [2, T // 4, 2 * NB, 4], RANK_3)
    BC_rows = reinterpret(BCs, gl.float32, [2 * T // 4 * 2 * NB // S, S, 4], PLAIN)
    # of a tile: delta, delta u and what each group of numbers adds to y
    of_delta = gl.allocate_shared_memory(gl.float32, [T // 4, BD // 8, 32], ROWS)
    of_x = gl.allocate_shared_memory(gl.float32, [T // 4, BD // 8, 32], ROWS)
    of_y = gl.allocate_shared_memory(gl.float32, [T // 4, 2, BD // 4, 32], ROWS_OF_Y)
    delta_rows = reinterpret(of_delta, gl.float32, [T // 4, BD // 8, 32], ROWS_OF_FOURS)
    x_rows = reinterpret(of_x, gl.float32, [T // 4, BD // 8, 32], ROWS_OF_FOURS)
    buffers = (us, deltas)
    if HAS_Z:
        inputs, strides, buffers = inputs + (z + b * z_b * 8,), strides + (z_l,), buffers + (zs,)
    _fetch_all(inputs, strides, buffers, 0, t0, block, L, D, T)
    _fetch_fours(BC, BCs, 0, t0, 0, N, Lp)
    async_copy.commit_group()
    # after how many tiles it writes the state: only the last chunk has the last one, and those that
    # enter the others are there already
    writes = tiles - gl.minimum(chunks - 1 - chunk, 1)
    A_n = _load_numbers(A, g, d, in_d, N, D, EACH)
    h = _load_numbers(states, g, d, in_d, N, D, EACH)
    which, zero = 0, gl.zeros([S, BD, 4], gl.float32, OF_FOUR)
    for i in range(tiles):
        async_copy.wait_group(0)
        barrier()
        u_i = us.index(i % 2).load(PAIRS)
        is_there = _is_there(L - t0, T // 4, 4, FOURS)
        delta_t = _delta(_in_fours(deltas.index(i % 2).load(PAIRS)), bias_d, is_there, SOFTPLUS)
        delta_rows.store(gl.reshape(delta_t, [T // 4, BD // 8, 32]))
        x_rows.store(gl.reshape(delta_t * _in_fours(u_i), [T // 4, BD // 8, 32]))
        to_next = gl.where(i + 1 == tiles, last, states + (N * D if KEEP else 0))
        kept = in_d & (g * 0 + i < writes)
        if ALL and not KEEP:
            kept &= g * 0 + i + 1 == tiles
        y_c = (zero,) * (T // 4)
        for n0 in range(0, SOME if ALL else N, SOME):
            if n0 > 0:
                async_copy.wait_group(0)
                barrier()
            more = N > n0 + SOME        # else the next tile comes next
            _fetch_fours(BC, BCs, 1 - which, gl.where(more, t0, t0 + T),
                         gl.where(more, n0 + SOME, 0), N, Lp)
            barrier()       # here, or Triton adds one of its own before each copy or read
            if n0 == 0:
                _fetch_all(inputs, strides, buffers, (i + 1) % 2, t0 + T, block, L, D, T)
            async_copy.commit_group()
            n = n0 + g
            if not ALL:
                A_n = _load_numbers(A, n, d, in_d, N, D, EACH)
                h = _load_numbers(states, n, d, in_d, N, D, EACH)
            hs, ys = h, ()
            for c in gl.static_range(T // 4):
                y_4, hs = _four_steps(y_c[c], hs, A_n, of_delta.index(c), of_x.index(c), BC_rows,
                                      (which * (T // 4) + c) * (2 * NB // S), EACH)
                ys = ys + (y_4,)
            y_c, h = ys, ()
            for j in gl.static_range(EACH):
                h_j = _each_step(hs[j], 4, OF_NUMBERS)[3]
                h = h + (h_j[:, :, None],)
                gl.store(to_next + (n + S * j) * D + d, h_j, mask=kept & (n + S * j < N))
            which = 1 - which
        ys = ()
        for c in gl.static_range(T // 4):
            ys = ys + (gl.reshape(y_c[c], [S, BD * 4]),)
        # g1, g0, d, k, c -> c, g1, d, g0, k; sums over g0 and g1 are y
        added = gl.permute(gl.reshape(_joined(ys, T // 4), [2, 2, BD, 4, T // 4]), (4, 0, 2, 1, 3))
        of_y.store(gl.reshape(added, [T // 4, 2, BD // 4, 32]))
        added = gl.reshape(of_y.load(Y_OF_GROUPS), [T // 4, 2, BD, 2, 4])
        y_t = gl.convert_layout(gl.sum(gl.sum(added, 3), 1), FOURS) + D_d * _in_fours(u_i)
        if HAS_Z:
            z_t = _in_fours(zs.index(i % 2).load(PAIRS))
            y_t *= z_t * _sigmoid(z_t)
        _store_tile(y, y_t, t0, block, L, D, D, T, PAIRS)
        t0 += T
        states = to_next


@gluon.jit
def _gradients_of_n(y_k, gx_k, gd_k, delta_k, x_k, gy_k, total, hs, i, BCs, at, s, row,
                    EXACT: constexpr, K: constexpr):
    """
    For one number of the states: y_k, gx_k and gd_k with what it adds, gA_n of these K steps alone,
    gB and gC as sums over the channels of each warp (WARPS, S, LANES, 2), and what of the adjoint
    leaves each segment.
    hs: A, the states that enter the tile and the adjoint from behind, this number's in row i.
    BCs: B of the K steps in place at, C NB places later.
    """
    A_n, h, q = _state(hs[0], i), _state(hs[1], i), _state(hs[2], i)
    B_k, C_k = _row(BCs, at, K), _row(BCs, at + NB, K)
    a_k, b_k = (), ()
    for k in gl.static_range(K):
        a_k, b_k = a_k + (gl.exp2(delta_k[k] * A_n),), b_k + (x_k[k] * B_k[k],)
    # q: a_t g_t, what the adjoint hands to the step before
    h_adds, q_adds = b_k[0], a_k[K - 1] * (gy_k[K - 1] * C_k[K - 1])
    for k in gl.static_range(1, K):
        h_adds = a_k[k] * h_adds + b_k[k]
        q_adds = a_k[K - 1 - k] * (gy_k[K - 1 - k] * C_k[K - 1 - k] + q_adds)
    decay = gl.exp2(total * A_n)
    h = _through(decay, h_adds, h, s, False)
    q = _through(decay, q_adds, q, s, True)
    h_k, gC_k, ys = (h,), (), ()                    # h_k[k] is the state before step k
    for k in gl.static_range(K):
        h = a_k[k] * h + b_k[k]
        h_k, gC_k, ys = h_k + (h,), gC_k + (gy_k[k] * h,), ys + (y_k[k] + C_k[k] * h,)
    gB_k, gxs, gds, gA_n = (), (), (), 0.0
    for k in gl.static_range(K - 1, -1, -1):
        g = gy_k[k] * C_k[k] + q
        q = a_k[k] * g
        w = q * h_k[k]                              # the gradient of delta_t A
        gA_n += delta_k[k] * w
        gB_k, gxs = (x_k[k] * g,) + gB_k, (gx_k[k] + B_k[k] * g,) + gxs
        gds = (gd_k[k] + A_n * w,) + gds
    gBC_n = gl.join(*_over_channels(gB_k, gC_k, row, EXACT))
    gBC_n = gl.permute(gl.reshape(gBC_n, [S, WARPS, LANES, 2]), (1, 0, 2, 3))
    return ys, gxs, gds, gA_n, gBC_n, q


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _gradients(u, delta, A, BC, Dw, z, bias, gout, states, adjoint, gu, gdelta, gz, gBC, sums, L,
               D: constexpr, N, whole, tiles, chunks, slots, u_b, u_l: constexpr, delta_b,
               delta_l: constexpr, z_b, z_l: constexpr, g_b, g_l: constexpr, gz_l: constexpr,
               HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr, SOFTPLUS: constexpr,
               EXACT: constexpr, FROM_ZERO: constexpr):
    """
    All gradients. adjoint (B, chunks, PARTS, N, D): what enters the last of each from behind; in
    the end, what leaves the chunk.
    gBC (blocks of channels, B, 2, N, Lp): gB, gC in parts.  sums (B, chunks, N + 2, S, D): gA, gD,
    gbias in parts.
    FROM_ZERO: 0 enters the sequence from behind, and nothing has been written there.
    """
    K: constexpr = 8
    T: constexpr = S * K
    Lp = whole * TILE
    chunk, per_chunk = gl.program_id(1), tiles
    block = gl.program_id(0)
    b, start, tiles, s, d, in_d = _place(L, D, tiles, block, chunk, T, LAYOUT)
    bias_d = _per_channel(bias, block, D, HAS_BIAS, in_threads(K))
    D_d = _per_channel(Dw, block, D, HAS_D, in_threads(K))
    at = b * chunks + chunk
    inputs = (u + b * u_b * 8, delta + b * delta_b * 8, gout + b * g_b * 8)
    strides = (u_l, delta_l, g_l)
    gu += b * L * D
    gdelta += b * L * D
    gz += b * L * gz_l
    BC += b * 2 * N * Lp
    states += (b * slots + chunk * per_chunk + tiles - 1) * N * D
    adjoint += (at * PARTS + PARTS - 1) * N * D
    sums += (at * (N + 2) * S + s) * D + d
    # of the 8 x 4 lanes of a warp
    row = s * 2 + gl.arange(0, BD, gl.SliceLayout(0, LAYOUT))[None, :] % LANES // 4
    # where the sums of _over_channels go: (NB // 2, S, LANES, 2), of even n or of odd ones
    OF_SUMS: constexpr = gl.SliceLayout(1, TO_SUM)
    FIRST_3: constexpr = gl.SliceLayout(3, OF_SUMS)
    FIRST_2: constexpr = gl.SliceLayout(2, FIRST_3)
    sum_n = 2 * gl.arange(0, NB // 2, gl.SliceLayout(1, FIRST_2))[:, None, None, None]
    sum_s = gl.arange(0, S, gl.SliceLayout(0, FIRST_2))[None, :, None, None]
    sum_d = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(1, FIRST_3)))[None, None, :, None]
    OF_TWO: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, OF_SUMS)))
    which_of_two = gl.arange(0, 2, OF_TWO)[None, None, None, :]
    gBC += (block * gl.num_programs(2).to(gl.int64) + b) * 2 * N * Lp
    gBC += (sum_d % 4 // 2 * N + sum_n) * Lp + sum_s * K
    gBC += sum_d % 2 * 4 + sum_d // 4 * 2 + which_of_two
    # of even n and of odd ones: all warps wait before Triton stores to the same memory again
    of_warps = ()
    for _ in gl.static_range(2):
        of_warps = of_warps + (
            gl.allocate_shared_memory(gl.float32, [NB // 2, WARPS, S, LANES, 2], RANK_4),)
    us, deltas, zs, BCs, hs = _buffers(u, delta, z, HAS_Z, K)
    gouts = gl.allocate_shared_memory(gout.dtype.element_ty, [2, T, BD],
                                      gl.SwizzledSharedLayout(8, K, S, [1, 0]))
    buffers = (us, deltas, gouts)
    if HAS_Z:
        inputs, strides, buffers = inputs + (z + b * z_b * 8,), strides + (z_l,), buffers + (zs,)
    t0 = start + (tiles - 1) * T
    _fetch_all(inputs, strides, buffers, 0, t0, block, L, D, T)
    _fetch_BC(BC, BCs, 0, t0, 0, N, Lp, T)
    async_copy.commit_group()
    zero, which = gl.zeros([S, BD], gl.float32, LAYOUT), 0
    gD_d, gbias_d = zero, zero
    for n in range(N + 1):      # gA, to which each tile adds; for odd N also to gD's place
        gl.store(sums + n * S * D, zero, mask=in_d)
    for i in range(tiles):
        async_copy.wait_group(0)
        barrier()
        # rows of adjoint that there are
        from_behind = gl.where((i == 0) & (chunk == chunks - 1), 0, N) if FROM_ZERO else N
        _fetch_states((A, states, adjoint), hs, 0, block, N, D, from_behind)
        _fetch_all(inputs, strides, buffers, (i + 1) % 2, t0 - T, block, L, D, T)
        u_t, gy_t = _tile(us.index(i % 2), K), _tile(gouts.index(i % 2), K)
        if HAS_Z:
            z_t = _tile(zs.index(i % 2), K)
            gy_t *= z_t * _sigmoid(z_t)
        is_there = _is_there(L - t0, S, K, in_threads(K))
        delta_t = _delta(_tile(deltas.index(i % 2), K), bias_d, is_there, SOFTPLUS)
        delta_k, x_k = _each_step(delta_t, K, LAYOUT), _each_step(delta_t * u_t, K, LAYOUT)
        gy_k, y_k = _each_step(gy_t, K, LAYOUT), _each_step(D_d * u_t, K, LAYOUT)
        total = _sum_of_steps(delta_t)
        gD_d += _sum_of_steps(gy_t * u_t)
        gx_k, gd_k = (zero,) * K, (zero,) * K
        to_adjoint, to_sums = adjoint + d + s * 0, sums
        for n0 in range(0, N, NB):
            if n0 > 0:
                async_copy.wait_group(0)
                barrier()
                _fetch_states((A, states, adjoint), hs, n0, block, N, D, from_behind)
            _fetch_next(BC, BCs, 1 - which, t0, t0 - T, n0, N, Lp, T)
            for pair in range(n0, gl.minimum(n0 + NB, N), 2):
                for odd in gl.static_range(2):
                    n = pair + odd      # where n = N, A, B, C and the states are 0
                    y_k, gx_k, gd_k, gA_n, gBC_n, leaving = _gradients_of_n(
                        y_k, gx_k, gd_k, delta_k, x_k, gy_k, total, hs, n - n0, BCs,
                        which * 2 * NB + n - n0, s, row, EXACT, K)
                    first = in_d & (s == 0)
                    gl.store(to_adjoint, leaving, mask=(first & (s + n < N)) if odd else first)
                    # no other thread adds there; so the addition need not wait for the old number
                    gl.atomic_add(to_sums, gA_n, mask=in_d, sem="relaxed")
                    to_adjoint, to_sums = to_adjoint + D, to_sums + S * D
                    of_warps[odd].index((pair - n0) // 2).store(gBC_n)
            for odd in gl.static_range(2):
                sums_n = reinterpret(of_warps[odd], gl.float32, [NB // 2, WARPS, S, LANES, 2],
                                     RANK_5)
                gl.store(gBC + (n0 + odd) * Lp + t0, gl.sum(sums_n.load(TO_SUM), 1),
                         mask=n0 + odd + sum_n + 0 * which_of_two < N)
            which = 1 - which
        # read again, for registers are too few to keep them
        u_t, raw_t = _tile(us.index(i % 2), K), _tile(deltas.index(i % 2), K)
        gx_t = _all_steps(gx_k, K)
        gdelta_t = _all_steps(gd_k, K) / LOG2E + gx_t * u_t
        if SOFTPLUS:
            gdelta_t *= _sigmoid(raw_t + bias_d)
        gbias_d += _sum_of_steps(gl.where(is_there, gdelta_t, 0))
        _store_tile(gdelta, gdelta_t, t0, block, L, D, D, T, WIDE)
        gu_t = gx_t * _all_steps(delta_k, K) + D_d * _all_steps(gy_k, K)
        _store_tile(gu, gu_t, t0, block, L, D, D, T, WIDE)
        if HAS_Z:
            z_t, gout_t = _tile(zs.index(i % 2), K), _tile(gouts.index(i % 2), K)
            open_t = _sigmoid(z_t)
            gz_t = gout_t * _all_steps(y_k, K) * open_t * (1 + z_t * (1 - open_t))
            _store_tile(gz, gz_t, t0, block, L, D, gz_l, T, WIDE)
        t0 -= T
        states -= N * D
    gl.store(sums + N * S * D, gD_d, mask=in_d)
    gl.store(sums + (N + 1) * S * D, gbias_d, mask=in_d)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("A", "state"))
def _pack(A, B, C, state, A2, BC, fours, states, L, D: tl.constexpr, N, Lp, slots, B_b, B_l, B_n,
          C_b, C_l, C_n, SIDE_BY_SIDE: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr):
    """
    Inputs as the other kernels want them: B and C (B, L, N) as BC (B, 2 N, Lp), float32, with 0
    after the end, and the same for _outputs as fours (B, Lp / 4, 2 N, 4); A (D, N) as A2 (N, D),
    exp(delta A) = 2^(delta A2); state (B, D, N) or zeros into the first slot of states (B, slots,
    N, D).
    SIDE_BY_SIDE: the N numbers of a step lie so in memory, as B_n and C_n say too, but the compiler
    should know.
    LOG: A is log(-A).
    """
    if SIDE_BY_SIDE:
        B_n, C_n = 1, 1
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    for n0 in range(0, N, 16):
        n = n0 + tl.arange(0, 16)[:, None]
        if i < Lp // T:
            t = i * T + tl.arange(0, T)[None, :]
            there, to = (n < N) & (t < L), BC + (b * 2 * N + n) * Lp + t
            B_n_t = tl.load(B + b * B_b + t.to(tl.int64) * B_l + n.to(tl.int64) * B_n, mask=there,
                            other=0)
            C_n_t = tl.load(C + b * C_b + t.to(tl.int64) * C_l + n.to(tl.int64) * C_n, mask=there,
                            other=0)
            tl.store(to, B_n_t.to(tl.float32), mask=n < N)
            tl.store(to + N * Lp, C_n_t.to(tl.float32), mask=n < N)
            to = fours + b * 2 * N * Lp + (t // 4 * 2 * N + n) * 4 + t % 4
            tl.store(to, B_n_t.to(tl.float32), mask=n < N)
            tl.store(to + N * 4, C_n_t.to(tl.float32), mask=n < N)
        else:
            d = (i - Lp // T) * T + tl.arange(0, T)[None, :]
            there = (n < N) & (d < D)
            h = tl.zeros((16, T), tl.float32)
            if state is not None:
                h = tl.load(state + (b * D + d) * N + n, mask=there, other=0)
            tl.store(states + (b * slots * N + n) * D + d, h, mask=there)
            once = (n < N) & (d < D * (1 - tl.minimum(b, 1)))
            A_n = tl.load(A + d * N + n, mask=once, other=0)
            if LOG:
                A_n = -tl.exp(A_n)
            tl.store(A2 + n * D + d, A_n * LOG2E, mask=once)


@triton.jit
def _sum_rows(x, first, second, A2, rows, N, M, D, i, R: tl.constexpr, BD: tl.constexpr):
    """
    The sum over all rows of x (rows / R, M, R, D), its first N into first (D, N), the others into
    second (M - N, D). A2: if there is one, first is the gradient of A, and that of log(-A) is asked
    for.
    """
    m, d = i % M, i // M * BD + tl.arange(0, BD)
    total = tl.zeros((16, BD), tl.float32)
    for row in tl.range(0, rows, 16, loop_unroll_factor=4):
        some = row + tl.arange(0, 16)[:, None]
        at = ((some // R).to(tl.int64) * M + m) * R + some % R
        total += tl.load(x + at * D + d, mask=(some < rows) & (d < D), other=0)
    if m < N:
        sum_d = tl.sum(total, 0)
        if A2 is not None:
            sum_d *= tl.load(A2 + m * D + d, mask=d < D, other=0) / LOG2E
        tl.store(first + d * N + m, sum_d, mask=d < D)
    else:
        tl.store(second + (m - N) * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def _finish(gBC, sums, gB, gC, gA, gDw, A2, L, D: tl.constexpr, N, whole, rows, blocks, batch,
            gB_l, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
    """
    What _gradients leaves in parts: gB and gC (B, L, N), whose steps are gB_l numbers apart, gA (D,
    N), or with A2 that of log(-A), and gD, gbias as gDw (2, D).
    """
    Lp = whole * TILE       # the compiler sees that rows begin at multiples of 16 bytes
    # the programs of gA, gD and gbias come first, for they take longest
    i, of_sums, pieces = tl.program_id(0), (N + 2) * tl.cdiv(D, BD), tl.cdiv(L, T)
    if i >= of_sums:
        i -= of_sums
        t, b = i % pieces * T + tl.arange(0, T), (i // pieces // 2).to(tl.int64)
        which = i // pieces % 2
        for n0 in range(0, N, 16):
            n = n0 + tl.arange(0, 16)[:, None]
            total = tl.zeros((8, 16, T), tl.float32)
            for block in tl.range(0, blocks, 8, loop_unroll_factor=2):
                some = block + tl.arange(0, 8)[:, None, None]
                of_block = gBC + ((some * batch + b) * 2 + which) * N * Lp
                total += tl.load(of_block + (n * Lp + t)[None],
                                 mask=(some < blocks) & (n[None] < N), other=0)
            at = (b * L + t) * gB_l + n
            if which == 0:
                tl.store(gB + at, tl.sum(total, 0), mask=(n < N) & (t < L))
            else:
                tl.store(gC + at, tl.sum(total, 0), mask=(n < N) & (t < L))
    else:
        _sum_rows(sums, gA, gDw, A2, rows, N, N + 2, D, i, R, BD)


_start_pack, _start_finish, _start_carry = Kernel(_pack), Kernel(_finish), Kernel(_carry)
_start_ends, _start_outputs = (
    Kernel(function, num_warps=WARPS.value, maxnreg=128) for function in (_ends, _outputs))
_start_gradients = Kernel(_gradients, num_warps=WARPS.value, maxnreg=168)


def _aligned(x):
    """
    x, or else a copy, and its strides: of batch, in units of 8, and of time. It is read 16 bytes at
    once: numbers of a step lie side by side, and begin at a multiple of 16 bytes.
    """
    of_batch, of_time, of_channel = x.stride()
    if of_channel != 1 or of_batch % 8 or of_time % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        of_batch, of_time, _ = x.stride()
    return x, of_batch // 8, of_time


def _whole(*tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def _wants_gradients(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _cuts(batch, L, d_inner, warps):
    """Tiles of a sequence, tiles of a chunk, chunks, and programs side by side."""
    tiles, blocks = -(-L // TILE.value), -(-d_inner // BD.value)
    per_chunk = max(SHORTEST, -(-tiles // max(1, warps // (batch * blocks * WARPS.value))))
    return tiles, per_chunk, -(-tiles // per_chunk), blocks


def _pieces(like, *sizes):
    """Memory for numbers in float32, which is asked for once, and its pieces of these sizes."""
    whole = like.new_empty(sum(sizes), dtype=torch.float32)
    return whole, whole.split_with_sizes(sizes)


def _kinds(*tensors):
    """What Triton's compiler is told of tensors: their types, and if 16 divides their addresses."""
    return [t if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors]


def _facts(*numbers):
    """What Triton's compiler is told of numbers and addresses: if they are 1, if 16 divides them,
    if 32 bits are too few."""
    return [-1 if n == 1 else (n % 16 == 0) + 2 * (n >= 2 ** 31) for n in numbers]


INPUTS = ("Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? delta_bias")
FORWARD = f"({INPUTS}, Tensor? state, bool softplus, bool keep) -> ({', '.join(['Tensor'] * 3)})"
BACKWARD = ("(Tensor gy, Tensor? glast, Tensor kept, Tensor u, Tensor delta, Tensor? D, Tensor? z, "
            "Tensor? delta_bias, int N, bool softplus, bool has_state, ScalarType BC_dtype) -> "
            f"({', '.join(['Tensor'] * 8)})")


def _tiles(L, steps):
    """How many tiles of so many steps there are. L may be a symbol."""
    return (L + steps.value - 1) // steps.value


def _sizes_kept(batch, L, d_inner, N):
    """Of the states before each tile of _outputs, of BC and of A2."""
    return (batch * _tiles(L, HALF) * N * d_inner, 2 * batch * N * _tiles(L, TILE) * TILE.value,
            N * d_inner)


def _run(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep, log_A=False):
    """
    y, last (B, N, D) and, with keep, what the backward pass needs: states, BC and A2, one after the
    other.
    log_A: A is log(-A).
    """
    inputs = u, delta, A, B, C, D, z, delta_bias, state
    if any(t is not None and t.device != u.device for t in inputs):
        raise ValueError(f"all inputs must be on {u.device}, as u is")
    (batch, L, d_inner), N = u.shape, A.shape[1]
    tiles, per_chunk, chunks, blocks = _cuts(batch, L, d_inner, FILL)
    (u, u_b, u_l), (delta, delta_b, delta_l) = _aligned(u), _aligned(delta)
    gate, z_b, z_l = (u, u_b, u_l) if z is None else _aligned(z)
    A, D, delta_bias, state = _whole(A, D, delta_bias, state)
    slots, apart = (_tiles(L, HALF), 2 * per_chunk) if keep else (chunks, 1)
    y, last = u.new_empty(u.shape), A.new_empty(batch, N, d_inner)
    fours = A.new_empty(batch * 2 * N * tiles * TILE.value)
    _, *others = sizes_kept = _sizes_kept(batch, L, d_inner, N)
    if not keep:
        sizes_kept = batch * slots * N * d_inner, *others
    kept, (states, BC, A2) = _pieces(A, *sizes_kept)
    of_B, of_C = B.stride(), C.stride()
    side_by_side = of_B[2] == of_C[2] == 1
    strides = u_b, u_l, delta_b, delta_l, z_b, z_l
    options = D is not None, z is not None, delta_bias is not None, softplus
    version = (u.device.index, d_inner, u_l, delta_l, z_l, *options, keep, state is None,
               side_by_side, log_A, *_kinds(u, delta, B, C, gate), *_facts(*of_B[:2], *of_C[:2]))
    with torch.cuda.device_of(u):
        _start_pack((tiles + -(-d_inner // TILE.value), batch, 1), version,
                    (A, B, C, state, A2, BC, fours, states), L, d_inner, N, tiles * TILE.value,
                    slots, *of_B, *of_C, side_by_side, log_A, TILE.value)
        if chunks > 1:
            decays = A.new_empty(batch, chunks, N, d_inner)
            at_once = min(NB.value, triton.next_power_of_2(N))
            _start_ends((blocks * -(-N // at_once), chunks - 1, batch), (*version, at_once),
                        (u, delta, A2, BC, u, delta_bias, states, decays), L, d_inner, N, tiles,
                        per_chunk, chunks, slots, apart, *strides, False, *options[2:], False,
                        at_once, 1)
            _start_carry((-(-d_inner * N // 128), batch, 1), version, (states, decays), d_inner, N,
                         chunks, slots, apart, False, 1, False)
        some = -(-N // -(-N // NB.value))       # numbers of the states, in equal parts
        numbers = -(-some // S.value), some == N    # each, all
        _start_outputs((blocks, chunks, batch), (*version, *numbers),
                       (u, delta, A2, fours, D, gate, delta_bias, y, states, last), L, d_inner, N,
                       tiles, 2 * per_chunk, chunks, slots, *strides, *options, keep, *numbers)
    return y, last, kept if keep else A.new_empty(0)


def _run_back(gy, glast, kept, u, delta, D, z, delta_bias, N, softplus, has_state, BC_dtype,
              gz=None, gB=None, gC=None, log_A=False):
    """
    gu, gdelta, gz, gB, gC; gA (D, N); gD and gbias as (2, D); gstate (B, N, D), if there is a
    state.
    gz, gB, gC: where to write these, if not into new memory; their steps may be apart.  log_A: as
    in _run, also for gA.
    """
    batch, L, d_inner = u.shape
    tiles, per_chunk, chunks, blocks = _cuts(batch, L, d_inner, FILL_BACK)
    (gy, g_b, g_l), (u, u_b, u_l), (delta, delta_b, delta_l) = map(_aligned, (gy, u, delta))
    gate, z_b, z_l = (u, u_b, u_l) if z is None else _aligned(z)
    D, delta_bias = _whole(D, delta_bias)
    states, BC, A2 = kept.split_with_sizes(_sizes_kept(batch, L, d_inner, N))
    gu, gdelta = u.new_empty(u.shape), delta.new_empty(u.shape)
    if gz is None:
        gz = u.new_empty(0 if z is None else z.shape)
    if gB is None:
        gB, gC = (u.new_empty(batch, L, N, dtype=BC_dtype) for _ in range(2))
    slots, Lp, rows = chunks * PARTS.value, tiles * TILE.value, batch * chunks * S.value
    states_of_all = batch * slots * N * d_inner
    _, (adjoint, decays, gBC, sums) = _pieces(
        kept, states_of_all, states_of_all if chunks > 1 else 0, blocks * batch * 2 * N * Lp,
        rows * (N + 2) * d_inner)
    if glast is not None:
        adjoint.view(batch, slots, N, d_inner)[:, -1] = glast
    gA, gDw = kept.new_empty(d_inner, N), kept.new_empty(2, d_inner)
    options, from_zero = [t is not None for t in (D, z, delta_bias)] + [softplus], glast is None
    exact, gB_l = u.dtype != torch.bfloat16, gB.stride(1)
    gz_l = d_inner if z is None else gz.stride(1)
    version = (u.device.index, d_inner, u_l, delta_l, z_l, g_l, gz_l, *options, from_zero, log_A,
               *_kinds(gy, u, delta, gate, gB, gC))
    with torch.cuda.device_of(u):
        if chunks > 1:
            at_once = min(NB.value, triton.next_power_of_2(N))
            _start_ends((blocks * -(-N // at_once), slots - PARTS.value, batch),
                        (*version, at_once), (gy, delta, A2, BC, gate, delta_bias, adjoint, decays),
                        L, d_inner, N, tiles, per_chunk, chunks, slots, 1, g_b, g_l, delta_b,
                        delta_l, z_b, z_l, *options[1:], True, at_once, PARTS.value)
            _start_carry((-(-d_inner * N // 128), batch, 1), version, (adjoint, decays), d_inner, N,
                         chunks, slots, 1, True, PARTS.value, from_zero)
        tensors = (u, delta, A2, BC, D, gate, delta_bias, gy, states, adjoint, gu, gdelta, gz,
                   gBC, sums)
        _start_gradients((blocks, chunks, batch), version, tensors, L, d_inner, N, tiles,
                         2 * per_chunk, chunks, _tiles(L, HALF), u_b, u_l, delta_b, delta_l, z_b,
                         z_l, g_b, g_l, gz_l, *options, exact, from_zero)
        programs = (N + 2) * -(-d_inner // 64) + 2 * batch * -(-L // 32)
        _start_finish((programs, 1, 1), version,
                      (gBC, sums, gB, gC, gA, gDw, A2 if log_A else None), L, d_inner, N,
                      tiles, rows, blocks, batch, gB_l, S.value, 32, 64)
    gstate = kept.new_empty(0)
    if has_state:
        gstate = adjoint.view(batch, slots, N, d_inner)[:, PARTS.value - 1].clone()
    return gu, gdelta, gz, gB, gC, gA, gDw, gstate


def _setup(ctx, inputs, output):
    u, delta, A, B, C, D, z, delta_bias, state, softplus, _keep = inputs
    ctx.settings = _settings(A, B, C, state, softplus)
    ctx.save_for_backward(output[2], u, delta, D, z, delta_bias)
    ctx.set_materialize_grads(False)


def _settings(A, B, C, state, softplus):
    """What _run_back has to know of them. Autograd makes gradients of the types of the inputs."""
    BC_dtype = B.dtype if B.dtype == C.dtype else torch.float32
    return A.shape[1], softplus, state is not None, BC_dtype


def _gradients_by(back, settings, _needs, gradients, *saved):
    """Those of all inputs of the scan. gradients: of y and of the last state, or None."""
    (gy, glast), (_, u, _, D, z, delta_bias) = gradients, saved
    gy = torch.zeros_like(u) if gy is None else gy
    gu, gdelta, gz, gB, gC, gA, gDw, gstate = back(gy, glast, *saved, *settings)
    gD, gbias = gDw.unbind()
    _, _, has_state, _ = settings
    return (gu, gdelta, gA, gB, gC, None if D is None else gD, None if z is None else gz,
            None if delta_bias is None else gbias, gstate.transpose(1, 2) if has_state else None)


def _gradients_of(ctx, gy, glast, _gkept):
    return *_gradients_by(torch.ops.selective_scan.backward, ctx.settings, None, (gy, glast),
                          *ctx.saved_tensors), None, None


def _as_function(run, setup, gradients, results=2):
    """What an operator with so many results does, without what an operator costs: where no compiler
    has to see one."""
    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = run(*inputs)
            setup(ctx, inputs, output)
            return output[:results]

        backward = staticmethod(differentiable_once(gradients))
    return Operator


PLANS = {}      # of the scan
_forward = library.custom_op("selective_scan::forward", _run, mutates_args=(), schema=FORWARD)
_backward = library.custom_op("selective_scan::backward", _run_back, mutates_args=(),
                              schema=BACKWARD)
_forward.register_autograd(_gradients_of, setup_context=_setup)


@_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep):
    (batch, L, d_inner), N = u.shape, A.shape[1]
    kept = A.new_empty(sum(_sizes_kept(batch, L, d_inner, N)) if keep else 0)
    return u.new_empty(u.shape), A.new_empty(batch, N, d_inner), kept


@_backward.register_fake
def _(gy, glast, kept, u, delta, D, z, delta_bias, N, softplus, has_state, BC_dtype):
    batch, L, d_inner = u.shape
    gu, gdelta, gz = (u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (u, delta, z))
    gB, gC = (u.new_empty(batch, L, N, dtype=BC_dtype) for _ in range(2))
    return (gu, gdelta, gz, gB, gC, kept.new_empty(d_inner, N), kept.new_empty(2, d_inner),
            kept.new_empty((batch, N, d_inner) if has_state else 0))


CAPABLE = {}    # {device: whether they can run there}, for asking takes longer than a launch


def runs_on(device):
    """Whether the kernels can run on this CUDA device: Ampere brought the asynchronous copies and
    the mma that they use."""
    if device not in CAPABLE:
        CAPABLE[device] = (torch.version.hip is None
                           and torch.cuda.get_device_capability(device) >= (8, 0))
    return CAPABLE[device]


# what torch.compiler.assume_constant_result does, but that imports the compiler
runs_on._dynamo_marked_constant = True


def _prepared(softplus, inputs):
    """The scan for launch.at_once."""
    _, _, A, B, C, _, _, _, state = inputs
    settings = _settings(A, B, C, state, softplus)

    def function(u, delta, A, B, C, D, z, delta_bias, state):
        y, last, kept = _run(u, delta, A, B, C, D, z, delta_bias, state, softplus, True)
        return (y, last), (kept, u, delta, D, z, delta_bias)
    return function, partial(_gradients_by, _run_back, settings), (settings, A.shape)


def selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state,
                          return_last_state=True, log_A=False):
    """
    The same function as selective_scan in mamba.py, arguments as there. u, delta, B, C, z: float32,
    bfloat16 or float16 on a GPU, d_state at most 256; computes in float32. Differentiable once; the
    gradients are the same bits each time.
    log_A: A is log(-A); only where no gradients are asked for.  Returns y and the last state, or y.
    """
    A, D, delta_bias, state = (t if t is None or t.dtype == torch.float32 else t.float()
                               for t in (A, D, delta_bias, state))
    d_inner = u.shape[2]
    if more := -d_inner % 8:        # the kernels copy 8 channels at once
        pad = lambda t, *last: t if t is None else F.pad(t, (*last, 0, more))
        u, delta, z, D, delta_bias = pad(u), pad(delta), pad(z), pad(D), pad(delta_bias)
        A, state = pad(A, 0, 0), pad(state, 0, 0)
    inputs = u, delta, A, B, C, D, z, delta_bias, state
    keep = _wants_gradients(*inputs)
    if torch.compiler.is_compiling():
        y, last, _ = torch.ops.selective_scan.forward(*inputs, delta_softplus, keep)
    elif keep:
        y, last = at_once(PLANS, delta_softplus, inputs, partial(_prepared, delta_softplus, inputs))
    else:
        y, last, _ = _run(*inputs, delta_softplus, keep, log_A)
    if more:
        y, last = y[..., :d_inner], last[..., :d_inner]
    # who does not want the state need not wait until the host has turned it, some 5 us
    return (y, last.transpose(1, 2)) if return_last_state else y


# ------------------------------------------------------------------------------------------------
# The convolution in front of the scan, and its silu. It is bound by memory, so everything is read
# and written once, but for a few steps before those of a program: a thread has one or two channels,
# and what it needs of the steps before in registers.


@triton.jit
def _of_channels(weight, bias, d, D, W: tl.constexpr):
    """The W taps and the bias of some channels."""
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + k, mask=d < D, other=0).to(tl.float32),)
    return taps, 0.0 if bias is None else tl.load(bias + d, mask=d < D, other=0).to(tl.float32)


@triton.jit
def _step(x, state, t, L, D, x_l, d, b, W: tl.constexpr):
    """One step of x (L, D); before the sequence that of state (B, W - 1, D), if there is one, and
    else 0."""
    there = d < tl.where((t >= 0) & (t < L), D, 0)
    row = tl.load(x + t.to(tl.int64) * x_l + d, mask=there, other=0).to(tl.float32)
    if state is not None:
        at = state + (b * (W - 1) + t + W - 1) * D + d
        row += tl.load(at, mask=d < tl.where((t < 0) & (t > -W), D, 0), other=0).to(tl.float32)
    return row


@triton.jit
def _silu(x):
    return x / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def _filtered(rows, taps, bias_d, i, W: tl.constexpr):
    y = bias_d
    for k in tl.static_range(W):
        y += taps[k] * rows[i + k]
    return y


@triton.jit(do_not_specialize=("L",))
def _conv(x, weight, bias, state, y, L, D: tl.constexpr, x_b, x_l: tl.constexpr, W: tl.constexpr,
          T: tl.constexpr, BD: tl.constexpr):
    """y (B, L, D) = silu(bias + sum_k weight_k x_{t - (W - 1) + k}), T steps of BD channels."""
    t0, d = tl.program_id(0) * T, tl.program_id(1) * BD + tl.arange(0, BD)
    b = tl.program_id(2).to(tl.int64)
    x, rows = x + b * x_b, ()
    for i in tl.static_range(T + W - 1):
        before = state if i < W - 1 else None
        rows = rows + (_step(x, before, t0 + i - (W - 1), L, D, x_l, d, b, W),)
    taps, bias_d = _of_channels(weight, bias, d, D, W)
    for i in tl.static_range(T):
        y_t = _filtered(rows, taps, bias_d, i, W)
        tl.store(y + (b * L + t0 + i) * D + d, _silu(y_t), mask=d < tl.where(t0 + i < L, D, 0))


@triton.jit
def _through_silu(gy, rows, taps, bias_d, i, W: tl.constexpr):
    y = _filtered(rows, taps, bias_d, i, W)
    open = 1 / (1 + tl.exp2(-y * LOG2E))
    return gy * open * (1 + y * (1 - open))


@triton.jit(do_not_specialize=("L",))
def _conv_gradients(x, weight, bias, state, gy, gx, gstate, sums, L, D: tl.constexpr, x_b,
                    x_l: tl.constexpr, g_b, g_l: tl.constexpr, gx_l: tl.constexpr, W: tl.constexpr,
                    STEPS: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
    """
    g, the gradient of what silu gets, for STEPS steps; gx (B, L, D) and gstate (B, W - 1, D), which
    follow W - 1 steps later;
    sums (B, chunks, W + 1, D): gradients of weight and bias, in parts.
    """
    t0, d = tl.program_id(0) * STEPS, tl.program_id(1) * BD + tl.arange(0, BD)
    b = tl.program_id(2).to(tl.int64)
    taps, bias_d = _of_channels(weight, bias, d, D, W)
    x, gy, rows, g, parts = x + b * x_b, gy + b * g_b, (), (), ()
    for i in tl.static_range(2 * (W - 1)):
        rows = rows + (_step(x, state, t0 + i - 2 * (W - 1), L, D, x_l, d, b, W),)
    for i in tl.static_range(W - 1):
        gy_t = _step(gy, None, t0 + i - (W - 1), L, D, g_l, d, b, W)
        g = g + (_through_silu(gy_t, rows, taps, bias_d, i, W),)
    before = ()                             # the last W - 1 steps, as g has them
    for i in tl.static_range(W - 1):
        before = before + (rows[W - 1 + i],)
    for k in tl.static_range(W + 1):
        parts = parts + (tl.zeros((BD,), tl.float32),)
    for j in range(STEPS // T):
        start, seen, gs, gys = t0 + j * T, before, g, ()
        for i in tl.static_range(T):
            seen = seen + (_step(x, None, start + i, L, D, x_l, d, b, W),)
            gys = gys + (_step(gy, None, start + i, L, D, g_l, d, b, W),)
        for i in tl.static_range(T):
            g_t = _through_silu(gys[i], seen, taps, bias_d, i, W)
            more, gx_t = (), tl.zeros((BD,), tl.float32)
            gs = gs + (g_t,)
            for k in tl.static_range(W):
                more = more + (parts[k] + g_t * seen[i + k],)
                gx_t += taps[k] * gs[W - 1 + i - k]
            parts = more + (parts[W] + g_t,)
            t = start + i - (W - 1)
            tl.store(gx + (b * L + t) * gx_l + d, gx_t, mask=d < tl.where((t >= 0) & (t < L), D, 0))
            if gstate is not None and i < W - 1:
                tl.store(gstate + (b * (W - 1) + t + W - 1) * D + d, gx_t,
                         mask=d < tl.where(t < 0, D, 0))
        before, g = (), ()
        for i in tl.static_range(W - 1):
            before, g = before + (seen[T + i],), g + (gs[T + i],)
    for k in tl.static_range(W + 1):
        tl.store(sums + ((b * tl.num_programs(0) + tl.program_id(0)) * (W + 1) + k) * D + d,
                 parts[k], mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def _finish_conv(sums, gweight, gbias, rows, D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr):
    """gweight (D, 1, W) and gbias (1, D) from what _conv_gradients leaves in parts."""
    _sum_rows(sums, gweight, gbias, None, rows, W, W + 1, D, tl.program_id(0), 1, BD)


_start_conv = Kernel(_conv, num_warps=2)
_start_conv_gradients = Kernel(_conv_gradients, num_warps=1)
_start_finish_conv = Kernel(_finish_conv)


def _version_of_conv(x, *tensors):
    """What _conv and _conv_gradients are compiled for: the GPU, channels, taps, strides, types and
    addresses."""
    of_batch, of_time, _ = x.stride()
    return (x.device.index, x.shape[2], tensors[0].shape[2], of_time, *_facts(of_batch),
            *_kinds(x, *tensors))


def _run_conv(x, weight, bias, state):
    (batch, L, d_inner), W, y = x.shape, weight.shape[2], x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        _start_conv((-(-L // 16), -(-d_inner // 128), batch),
                    _version_of_conv(x, weight, bias, state), (x, weight, bias, state, y), L,
                    d_inner, *x.stride()[:2], W, 16, 128)
    return y


def _cuts_of_conv(L, W):
    """Steps of a program in the backward pass, and programs side by side."""
    steps = max(64, 8 * -(-(W - 1) // 8))
    return steps, -(-(L + W - 1) // steps)


def _run_conv_back(gy, x, weight, bias, state, gx=None):
    """
    gx, gweight, gbias and gstate; of what there is not, an empty tensor.
    gx: where to write it, if not into new memory; its steps may be apart.
    """
    (batch, L, d_inner), W, gweight = x.shape, weight.shape[2], torch.empty_like(weight)
    gx = x.new_empty(x.shape) if gx is None else gx
    gbias = (weight if bias is None else bias).new_empty(d_inner)
    gstate = x.new_empty(0) if state is None else torch.empty_like(state)
    steps, chunks = _cuts_of_conv(L, W)
    sums = weight.new_empty(batch, chunks, W + 1, d_inner, dtype=torch.float32)
    (g_b, g_l, _), gx_l = gy.stride(), gx.stride(1)
    version = *_version_of_conv(x, weight, bias, state, gy, gx), g_l, gx_l, *_facts(g_b)
    with torch.cuda.device_of(x):
        tensors = x, weight, bias, state, gy, gx, None if state is None else gstate, sums
        _start_conv_gradients((chunks, -(-d_inner // 64), batch), version, tensors, L, d_inner,
                              *x.stride()[:2], g_b, g_l, gx_l, W, steps, 8, 64)
        _start_finish_conv(((W + 1) * -(-d_inner // 64), 1, 1), version, (sums, gweight, gbias),
                           batch * chunks, d_inner, W, 64)
    return gx, gweight, gbias, gstate


def _setup_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients_of_conv(back, ctx, gy):
    x, weight, bias, state = ctx.saved_tensors
    gy = gy if gy.stride(2) == 1 else gy.contiguous()
    gx, gweight, gbias, gstate = back(gy, x, weight, bias, state)
    return gx, gweight, None if bias is None else gbias, None if state is None else gstate


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return _run_conv(*inputs)

    backward = staticmethod(differentiable_once(partial(_gradients_of_conv, _run_conv_back)))


OF_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? state"
_conv_forward = library.custom_op("selective_scan::conv", _run_conv, mutates_args=(),
                                  schema=f"({OF_CONV}) -> Tensor")
_conv_backward = library.custom_op(
    "selective_scan::conv_backward", _run_conv_back, mutates_args=(),
    schema=f"(Tensor gy, {OF_CONV}) -> ({', '.join(['Tensor'] * 4)})")
_conv_forward.register_autograd(partial(_gradients_of_conv, torch.ops.selective_scan.conv_backward),
                                setup_context=_setup_conv)


@_conv_forward.register_fake
def _(x, weight, bias, state):
    return x.new_empty(x.shape)


@_conv_backward.register_fake
def _(gy, x, weight, bias, state):
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            (weight if bias is None else bias).new_empty(x.shape[2]),
            x.new_empty(0) if state is None else torch.empty_like(state))


def conv_silu_triton(x, weight, bias, state):
    """
    silu(y), y as in conv_silu of mamba.py, arguments as there; bias and state may be None. Computes
    in float32. Differentiable once; the gradients are the same bits each time.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, bias, state = _whole(weight, bias, state)
    inputs = x, weight, bias, state
    conv = _Conv.apply if _wants_gradients(*inputs) else _run_conv
    return (torch.ops.selective_scan.conv if torch.compiler.is_compiling() else conv)(*inputs)
