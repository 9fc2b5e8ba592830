"""
Products of weights in 8 bits with the x of one text, on the tensor cores; for step_triton.py.

In floating point a byte takes some four instructions of a thread, to convert and to multiply. The
tensor cores multiply whole numbers of 8 bits, and the bytes go to them as they come from memory. So
x becomes whole numbers too, (256 upper + lower) / to_whole, and its two bytes are columns that are
multiplied side by side.

A program has BN outputs, and its W warps share the inputs. A lane loads 16 weights of one output at
once, words 0 to 3, and they go into the instruction mma.m16n8k32 as they are. For lane 4 g + t this
takes words 0 and 2 as row g of the weights and words 1 and 3 as row g + 8, and both rows meet the
same x. Here all four words belong to one output. So x stands there twice: in columns 0 and 1 as
words 0 and 2 need it (upper bytes, lower bytes), in columns 2 and 3 as words 1 and 3 need it;
columns 4 to 7 repeat these. Row g met its own inputs in columns 0 and 1, row g + 8 in columns 2 and
3. The other sums are left out.

Both kernels take what their namesakes in step_triton.py take, also rows, which is 1. PDL is
explained there.
"""
from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import constexpr

from .scan_triton import _sigmoid, reinterpret

DIVISOR = constexpr(64.0)   # by which x is divided before its length is known: see step_triton.py
LARGEST = constexpr(256 * 127.0 + 127)      # of two bytes with a sign, upper and lower
PLAIN_2 = constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
PLAIN_4 = constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
MMA = constexpr("""mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
    {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$0, $1, $2, $3};""")


@triton.constexpr_function
def of_words(W):
    """The layout of words of weights, (BN / 4, 2, 2, 16 W): a lane has four."""
    return gl.BlockedLayout([1, 1, 1, 4], [2, 2, 2, 4], [1, 1, 1, W], [3, 2, 1, 0])


@triton.constexpr_function
def of_sums(W):
    """The layout of sums, one for each four words of a lane: (BN / 4, 2, 2, 4 W)."""
    return gl.BlockedLayout([1, 1, 1, 1], [2, 2, 2, 4], [1, 1, 1, W], [3, 2, 1, 0])


@triton.constexpr_function
def of_x(W):
    """The layout in which 128 W numbers of x are loaded and become bytes."""
    return gl.BlockedLayout([4], [32], [W], [0])


@triton.constexpr_function
def of_bytes(W):
    """The layout of words of x as the tensor cores want them: (upper or lower bytes, which 16
    inputs, words 0 and 1 or 2 and 3 of them, the first or the second of these two)."""
    # bits 0 and 1 of a lane: its 16 inputs; 2 and 3: its column; 4: columns 4 to 7
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    warps = [[0, 4 << i, 0, 0] for i in range(W.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 0, 1, 0]], lanes, warps, [], [2, 4 * W, 2, 2])


@gluon.jit
def _wait():
    """Until what the kernels before have written is there. (Triton asks for a result.)"""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _let_next_start():
    """The next kernel may start as soon as there is room for it."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [],
                              gl.int32, False, 1)


@gluon.jit
def _maximum(a, b):
    """NaN if one of them is."""
    return gl.maximum(a, b, propagate_nan=triton.language.PropagateNan.ALL)


@gluon.jit
def _outputs(layout: constexpr, BN: constexpr):
    """0 to BN - 1 as (BN / 4, 2, 2): the last two dimensions are bits 3 and 2 of a lane, which also
    number its column of x."""
    OF_1: constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    OF_2: constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    OF_3: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
    first, second = gl.arange(0, BN // 4, OF_1), gl.arange(0, 2, OF_2)
    third = gl.arange(0, 2, OF_3)
    return 4 * first[:, None, None] + 2 * second[None, :, None] + third[None, None, :]


@gluon.jit
def _weights(weight, first, count, K: constexpr, BN: constexpr, W: constexpr):
    """Rows first to first + BN of weight (N, K), of which count are there: a tuple of tensors of
    words, (BN / 4, 2, 2, 16 W), each for 64 W inputs."""
    gl.static_assert(K % 16 == 0 and BN % 8 == 0)
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
    """(BN / 4, 2, 2, 16 W) -> words 0 of all lanes, 1, 2 and 3: (BN / 4, 2, 2, 4 W) each."""
    even, odd = gl.split(gl.reshape(x, [BN // 4, 2, 2, 4 * W, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    OF_SUMS: constexpr = of_sums(W)
    return (gl.convert_layout(first, OF_SUMS), gl.convert_layout(second, OF_SUMS),
            gl.convert_layout(third, OF_SUMS), gl.convert_layout(fourth, OF_SUMS))


@gluon.jit
def _product(x, weights, K: constexpr, BN: constexpr, W: constexpr):
    """weights @ x, of x (K,): (BN / 4, 2, 2)."""
    OF_SUMS: constexpr = of_sums(W)
    OF_X: constexpr = of_x(W)
    PASSES: constexpr = (K + 128 * W - 1) // (128 * W)
    xs, most = (), gl.zeros([128 * W], gl.float32, OF_X)
    for i in gl.static_range(PASSES):
        k = i * 128 * W + gl.arange(0, 128 * W, OF_X)
        xs = xs + (gl.load(x + k, mask=k < K, other=0).to(gl.float32),)
        most = _maximum(most, gl.abs(xs[i]))
    most = gl.reduce(most, 0, _maximum)
    # where this overflows, x is below 1e-34, and so is what comes of it
    to_whole = gl.where(most > 0, LARGEST / most, 0.0)
    bytes_of_x = ()
    for i in gl.static_range(PASSES):
        # A whole number that is added to 1.5 * 2^23 stands in the last bits of the sum. With 128
        # more its upper byte is rounded to the nearest, and its lower byte is 128 too large. That
        # is taken away by turning the lower byte's highest bit.
        bits = (xs[i] * to_whole + (1.5 * 2 ** 23 + 128)).to(gl.int32, bitcast=True)
        both = gl.permute(gl.join((bits >> 8).to(gl.int8), (bits ^ 128).to(gl.int8)), (1, 0))
        of_pass = gl.allocate_shared_memory(gl.int8, [2, 128 * W], PLAIN_2, both)
        words = reinterpret(of_pass, gl.int32, [2, 8 * W, 2, 2], PLAIN_4)
        bytes_of_x = bytes_of_x + (words,)
    sums = (gl.zeros([BN // 4, 2, 2, 4 * W], gl.int32, OF_SUMS),) * 4
    for i in gl.static_range(len(weights)):
        # a pass has 128 W inputs, which are two times 64 W
        x_k = bytes_of_x[i // 2].slice(i % 2 * 4 * W, 4 * W, 1).load(of_bytes(W))
        # x for words 0 and 1, and for words 2 and 3: (2, 2, 4 W)
        front, back = gl.split(gl.permute(x_k, (3, 0, 1, 2)))
        front = gl.convert_layout(front, gl.SliceLayout(0, OF_SUMS))[None]
        back = gl.convert_layout(back, gl.SliceLayout(0, OF_SUMS))[None]
        w = _four(weights[i], BN, W)
        sums = gl.inline_asm_elementwise(
            MMA, "=r,=r,=r,=r,r,r,r,r,r,r,0,1,2,3",
            [w[0], w[1], w[2], w[3], front, back, sums[0], sums[1], sums[2], sums[3]],
            (gl.int32, gl.int32, gl.int32, gl.int32), True, 1)
    # Of the four lanes of an output the first has in columns 0 and 1 what counts, the second in
    # columns 2 and 3. The third and fourth have the same again, so the sum is twice what it should
    # be.
    OF_LANE: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, OF_SUMS)))
    is_first = (gl.arange(0, 4 * W, OF_LANE) % 2 == 0)[None, None, None, :]
    upper, lower = gl.where(is_first, sums[0], sums[2]), gl.where(is_first, sums[1], sums[3])
    y = gl.sum(upper.to(gl.float32) * 256 + lower.to(gl.float32), 3)
    return y * (most / LARGEST / 2)


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
    """As _project in step_triton.py, for one text; by W warps."""
    if PDL:
        _let_next_start()
    first = gl.program_id(0) * BN
    weights = _weights(weight, first, N - first, K, BN, W)
    n = first + _outputs(gl.SliceLayout(3, of_sums(W)), BN)
    there = n < N
    scale_n = gl.load(scale + n, mask=there, other=0).to(gl.float32)
    bias_n = gl.load(bias + n, mask=there, other=0).to(gl.float32) if bias is not None else 0.0
    if norm is not None:
        norm_n = gl.load(norm + n, mask=there, other=0).to(gl.float32) / DIVISOR
    if PDL:
        _wait()
    if residual is not None:
        residual_n = gl.load(residual + n, mask=there, other=0).to(gl.float32)
    if squares is not None:
        scale_n *= DIVISOR * gl.rsqrt(_sum_of(squares, BLOCKS, W) / K + EPS)
    y_n = _product(x, weights, K, BN, W) * scale_n + bias_n
    if residual is not None:
        y_n += residual_n
    y_n = y_n.to(y.dtype.element_ty)
    gl.store(y + n, y_n, mask=there)
    if norm is not None:
        wide = y_n.to(gl.float32)
        gl.store(normed + n, (wide * norm_n).to(normed.dtype.element_ty), mask=there)
        gl.store(y_squares + gl.program_id(0), _total(wide * wide))


@gluon.jit
def enter(x, squares, weight, scale, bias, taps, conv_bias, window, u, gate, rows, EPS: constexpr,
          K: constexpr, X: constexpr, D: constexpr, H: constexpr, X_FIRST: constexpr,
          BEFORE: constexpr, BLOCKS: constexpr, BN: constexpr, W: constexpr, PDL: constexpr):
    """As _enter in step_triton.py, for one text; by W warps. No other kernel of a step writes its
    window, so that is read before the wait, too."""
    if PDL:
        _let_next_start()
    # the first programs make u, the next ones the gate, the others H outputs as they are, which
    # follow those of the gate
    OF_U: constexpr = (X + BN - 1) // BN
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
    bias_d, conv_bias_d = 0.0, 0.0
    if bias is not None:
        bias_d = gl.load(bias + first + d, mask=in_d, other=0).to(gl.float32)
    if conv_bias is not None:
        conv_bias_d = gl.load(conv_bias + d, mask=in_x, other=0).to(gl.float32)
    before, taps_d = (), ()
    for k in gl.static_range(BEFORE + 1):
        tap = gl.load(taps + d * (BEFORE + 1) + k, mask=in_x, other=0)
        taps_d = taps_d + (tap.to(gl.float32),)
        if k < BEFORE:
            before = before + (gl.load(window + k * X + d, mask=in_x, other=0),)
    if PDL:
        _wait()
    scale_d *= DIVISOR * gl.rsqrt(_sum_of(squares, BLOCKS, W) / K + EPS)
    y = _product(x, weights, K, BN, W) * scale_d + bias_d
    if to_u:
        inputs = before + (y.to(window.dtype.element_ty),)
        new = y * taps_d[BEFORE] + conv_bias_d
        # since they have read it all lanes have waited for each other, in the sums of _product
        for k in gl.static_range(BEFORE):
            new += before[k].to(gl.float32) * taps_d[k]
            gl.store(window + k * X + d, inputs[k + 1], mask=in_x)
        gl.store(u + d, (new * _sigmoid(new)).to(u.dtype.element_ty), mask=in_x)
    else:
        gated = gl.where(to_gate, y * _sigmoid(y), y)
        gl.store(gate + gl.where(to_gate, 0, D) + d, gated, mask=in_d)
