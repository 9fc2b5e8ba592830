"""
Products of weights in 8 bits with the x of one text, on the matrix units; for step_triton.py.

In floating point a byte takes some four instructions of a thread, to convert and to multiply. The
matrix units multiply whole numbers of 8 bits, and the bytes go to them as they come from memory.
So x becomes whole numbers as well, of 16 bits, with one scale for all of them: an upper byte and a
lower one.

A program has BN outputs, and its W warps share the inputs. A lane loads 16 weights of an output at
once, four words, and they are its operand of the instruction mma.m16n8k32 as they are. But that
takes words 0 and 2 for a row of weights, and words 1 and 3 for the row 8 below, both for the same
x. So there are columns of x for words 0 and 2 (its upper bytes, its lower bytes) and for words 1
and 3 (the same), twice as there are eight; and of each row a lane has the sums of two columns.
"""
from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import constexpr

from .scan_triton import _sigmoid, reinterpret

SMALL = constexpr(64.0)         # as in step_triton.py, whose _keep says why
LONGEST = constexpr(32639.0)    # a whole number whose upper byte, rounded, is 127
PLAIN_2, PLAIN_4 = (
    constexpr(gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])) for rank in (2, 4))
MMA = constexpr("""mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
    {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$0, $1, $2, $3};""")


@triton.constexpr_function
def of_words(W):
    """The layout of words of weights, (BN / 4, 2, 2, 16 W): a lane has four."""
    return gl.BlockedLayout([1, 1, 1, 4], [2, 2, 2, 4], [1, 1, 1, W], [3, 2, 1, 0])


@triton.constexpr_function
def of_sums(W):
    """The layout of a number for each such four words: (BN / 4, 2, 2, 4 W)."""
    return gl.BlockedLayout([1, 1, 1, 1], [2, 2, 2, 4], [1, 1, 1, W], [3, 2, 1, 0])


@triton.constexpr_function
def of_x(W):
    """The layout in which x is loaded and becomes bytes, 128 W at once."""
    return gl.BlockedLayout([4], [32], [W], [0])


@triton.constexpr_function
def of_bytes(W):
    """The layout of bytes of x as the matrix units want them, in words: upper or lower bytes, which
    16 numbers, words 0 and 1 or 2 and 3 of them, and which of the two: (2, 4 W, 2, 2)."""
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    warps = [[0, 4 << i, 0, 0] for i in range(W.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 0, 1, 0]], lanes, warps, [], [2, 4 * W, 2, 2])


@gluon.jit
def _wait():
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _let_next_start():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [],
                              gl.int32, False, 1)


@gluon.jit
def _greater(a, b):
    return gl.maximum(a, b, propagate_nan=triton.language.PropagateNan.ALL)


@gluon.jit
def _outputs(layout: constexpr, BN: constexpr):
    """0 to BN - 1, as the lanes have the outputs: (BN / 4, 2, 2)."""
    OF_1: constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    OF_2: constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    OF_3: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
    first, second = gl.arange(0, BN // 4, OF_1), gl.arange(0, 2, OF_2)
    third = gl.arange(0, 2, OF_3)
    return 4 * first[:, None, None] + 2 * second[None, :, None] + third[None, None, :]


@gluon.jit
def _weights(weight, first, count, K: constexpr, BN: constexpr, W: constexpr):
    """BN rows of weight (N, K) from the first on, but no more than count: tensors of words,
    (BN / 4, 2, 2, 16 W), each for 64 W inputs."""
    OF_K: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, of_words(W))))
    n = _outputs(gl.SliceLayout(3, of_words(W)), BN)[:, :, :, None]
    k = gl.arange(0, 16 * W, OF_K)[None, None, None, :]
    words = weight.to(gl.pointer_type(gl.int32)) + (first + n) * (K // 4) + k
    weights = ()
    for start in gl.static_range(0, K // 4, 16 * W):
        w = gl.load(words + start, mask=(n < count) & (start + k < K // 4), other=0)
        weights = weights + (w,)
    return weights


@gluon.jit
def _four(x, BN: constexpr, W: constexpr):
    """(BN / 4, 2, 2, 16 W) -> four tensors (BN / 4, 2, 2, 4 W)."""
    even, odd = gl.split(gl.reshape(x, [BN // 4, 2, 2, 4 * W, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    OF_SUMS: constexpr = of_sums(W)
    return (gl.convert_layout(first, OF_SUMS), gl.convert_layout(second, OF_SUMS),
            gl.convert_layout(third, OF_SUMS), gl.convert_layout(fourth, OF_SUMS))


@gluon.jit
def _product(x, weights, K: constexpr, BN: constexpr, W: constexpr):
    """weights x, of x (K,): (BN / 4, 2, 2)."""
    OF_SUMS: constexpr = of_sums(W)
    OF_X: constexpr = of_x(W)
    PASSES: constexpr = (K + 128 * W - 1) // (128 * W)
    xs, most = (), gl.zeros([128 * W], gl.float32, OF_X)
    for i in gl.static_range(PASSES):
        k = i * 128 * W + gl.arange(0, 128 * W, OF_X)
        xs = xs + (gl.load(x + k, mask=k < K, other=0).to(gl.float32),)
        most = _greater(most, gl.abs(xs[i]))
    most = gl.reduce(most, 0, _greater)
    scale, bytes = gl.where(most > 0, LONGEST / most, 0.0), ()
    for i in gl.static_range(PASSES):
        # Added to 1.5 * 2^23 a whole number is the last bits of the sum. 128 more round the upper
        # byte: so the lower one is from -128 to 127, once its first bit is turned.
        whole = (xs[i] * scale + (1.5 * 2 ** 23 + 128)).to(gl.int32, bitcast=True)
        both = gl.permute(gl.join((whole >> 8).to(gl.int8), (whole ^ 128).to(gl.int8)), (1, 0))
        of_pass = gl.allocate_shared_memory(gl.int8, [2, 128 * W], PLAIN_2, both)
        bytes = bytes + (reinterpret(of_pass, gl.int32, [2, 8 * W, 2, 2], PLAIN_4),)
    sums = (gl.zeros([BN // 4, 2, 2, 4 * W], gl.int32, OF_SUMS),) * 4
    for i in gl.static_range(len(weights)):
        x_k = bytes[i // 2].slice(i % 2 * 4 * W, 4 * W, 1).load(of_bytes(W))
        front, back = gl.split(gl.permute(x_k, (3, 0, 1, 2)))                   # (2, 2, 4 W)
        front = gl.convert_layout(front, gl.SliceLayout(0, OF_SUMS))[None]
        back = gl.convert_layout(back, gl.SliceLayout(0, OF_SUMS))[None]
        w = _four(weights[i], BN, W)
        sums = gl.inline_asm_elementwise(
            MMA, "=r,=r,=r,=r,r,r,r,r,r,r,0,1,2,3",
            [w[0], w[1], w[2], w[3], front, back, sums[0], sums[1], sums[2], sums[3]],
            (gl.int32, gl.int32, gl.int32, gl.int32), True, 1)
    # of the four lanes of an output the first has the sums for words 0 and 2, the second those for
    # words 1 and 3, and the third and fourth have the same again
    OF_LANE: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, OF_SUMS)))
    is_first = (gl.arange(0, 4 * W, OF_LANE) % 2 == 0)[None, None, None, :]
    upper, lower = gl.where(is_first, sums[0], sums[2]), gl.where(is_first, sums[1], sums[3])
    y = gl.sum(upper.to(gl.float32) * 256 + lower.to(gl.float32), 3)
    return y * (most / (2 * LONGEST))


@gluon.jit
def _sum_of(squares, BLOCKS: constexpr, W: constexpr):
    SIZE: constexpr = triton.next_power_of_2(BLOCKS)
    i = gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [W], [0]))
    return gl.sum(gl.load(squares + i, mask=i < BLOCKS, other=0), 0)


@gluon.jit
def _total(x):
    return gl.sum(gl.sum(gl.sum(x, 2), 1), 0)


@gluon.jit
def project(x, squares, weight, scale, bias, residual, norm, y, normed, y_squares, rows,
            EPS: constexpr, K: constexpr, N: constexpr, BLOCKS: constexpr, BN: constexpr,
            W: constexpr, PDL: constexpr):
    """As _project in step_triton.py, for one text."""
    if PDL:
        _let_next_start()
    first = gl.program_id(0) * BN
    weights = _weights(weight, first, N - first, K, BN, W)
    n = first + _outputs(gl.SliceLayout(3, of_sums(W)), BN)
    there = n < N
    scale_n = gl.load(scale + n, mask=there, other=0).to(gl.float32)
    if PDL:
        _wait()
    if residual is not None:
        before = gl.load(residual + n, mask=there, other=0).to(gl.float32)
    if squares is not None:
        scale_n *= SMALL * gl.rsqrt(_sum_of(squares, BLOCKS, W) / K + EPS)
    y_n = _product(x, weights, K, BN, W) * scale_n
    if bias is not None:
        y_n += gl.load(bias + n, mask=there, other=0).to(gl.float32)
    if residual is not None:
        y_n += before
    y_n = y_n.to(y.dtype.element_ty)
    gl.store(y + n, y_n, mask=there)
    if norm is not None:
        wide = gl.where(there, y_n.to(gl.float32), 0.0)
        weighted = wide * (gl.load(norm + n, mask=there, other=0).to(gl.float32) / SMALL)
        gl.store(normed + n, weighted.to(normed.dtype.element_ty), mask=there)
        gl.store(y_squares + gl.program_id(0), _total(wide * wide))


@gluon.jit
def enter(x, squares, weight, scale, bias, taps, conv_bias, window, u, gate, rows, EPS: constexpr,
          K: constexpr, X: constexpr, D: constexpr, H: constexpr, X_FIRST: constexpr,
          BEFORE: constexpr, BLOCKS: constexpr, BN: constexpr, W: constexpr, PDL: constexpr):
    """As _enter in step_triton.py, for one text."""
    if PDL:
        _let_next_start()
    OF_U: constexpr = (X + BN - 1) // BN    # programs; after them those of the gate, and of H
    OF_GATE: constexpr = (D + BN - 1) // BN
    block = gl.program_id(0)
    to_u, to_gate = block < OF_U, block < OF_U + OF_GATE
    block -= gl.where(to_u, 0, gl.where(to_gate, OF_U, OF_U + OF_GATE))
    if X_FIRST:
        first = gl.where(to_u, 0, gl.where(to_gate, X, X + D))
    else:
        first = gl.where(to_u, D, gl.where(to_gate, 0, D + X))
    size = gl.where(to_u, X, gl.where(to_gate, D, H))
    weights = _weights(weight, first + block * BN, size - block * BN, K, BN, W)
    d = block * BN + _outputs(gl.SliceLayout(3, of_sums(W)), BN)
    in_d, in_x = d < size, d < gl.where(to_u, X, 0)
    scale_d = gl.load(scale + first + d, mask=in_d, other=0).to(gl.float32)
    before, taps_d = (), ()
    for k in gl.static_range(BEFORE + 1):
        tap = gl.load(taps + d * (BEFORE + 1) + k, mask=in_x, other=0)
        taps_d = taps_d + (tap.to(gl.float32),)
        if k < BEFORE:
            before = before + (gl.load(window + k * X + d, mask=in_x, other=0),)
    if PDL:
        _wait()
    scale_d *= SMALL * gl.rsqrt(_sum_of(squares, BLOCKS, W) / K + EPS)
    y = _product(x, weights, K, BN, W) * scale_d
    if bias is not None:
        y += gl.load(bias + first + d, mask=in_d, other=0).to(gl.float32)
    if to_u:
        inputs = before + (y.to(window.dtype.element_ty),)
        new = y * taps_d[BEFORE]
        for k in gl.static_range(BEFORE):
            new += before[k].to(gl.float32) * taps_d[k]
            gl.store(window + k * X + d, inputs[k + 1], mask=in_x)
        if conv_bias is not None:
            new += gl.load(conv_bias + d, mask=in_x, other=0).to(gl.float32)
        gl.store(u + d, (new * _sigmoid(new)).to(u.dtype.element_ty), mask=in_x)
    else:
        gated = gl.where(to_gate, y * _sigmoid(y), y)
        gl.store(gate + gl.where(to_gate, 0, D) + d, gated, mask=in_d)
