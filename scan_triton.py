"""
The selective scan as fused GPU kernels in Triton: the same function as selective_scan in mamba.py, which uses it on CUDA
where this file lies beside it. Optional: without this file or without Triton everything works, slower.

How the work is divided. The sequence is cut into chunks, and a program takes one chunk of one sequence for a few channels,
with their states, (channels, N), in registers, and walks over its steps in a plain loop. All chunks run at the same time:

    forward    ends       from a zero state, what each chunk adds to the state; only where a sequence needs several chunks
               carry      the state that enters each chunk: a short loop over chunks, start' = exp(A sum(delta)) start + end
               outputs    the chunk again from its true start, y; keeps a state every STEPS steps for the backward pass
    backward   rising     chunks of STEPS from the kept states: h again, gC, gz, and what each chunk adds to the adjoint
               carry      the adjoint that enters each chunk from behind
               falling    the chunk in reverse: g, gB, gu, gdelta, and the rest of gA

The gradient of the decays, w_t = g_t a_t h_{t-1} for each state, needs h, which is known going up, and g, which is known
going down. Neither is stored for every step, because both recurrences give w as a sum of terms that need only one of them:

    w_t = w_{t+1} + (C_t gy_t) h_t - (x_t B_t) g_t          and at the end of a chunk  w = (what enters from behind) h_end

so the rising kernel leaves q_t = sum_n A C_t h_t for each channel, the falling one has r_t = sum_n A B_t g_t, and
sum_n A w_t, delta's gradient, is a running sum of gy q - x r, begun anew in every chunk so that no rounding adds up.
sum_t delta_t w_t, A's gradient, splits in the same way. q waits where gu and gdelta will be, in two parts of their type.

What bounds it: one exp2 for each number of the states and pass, 16 a clock on each multiprocessor, two passes forward and
two backward; and in practice the instructions around them, four to eight for each number: an H200 issues one in 68 to 74 % of
its cycles, with as many warps as the registers allow (12 rising, 16 to 28 elsewhere, on a multiprocessor). With a channel and
all its numbers in one thread there are no shuffles and a fifth fewer instructions, but B and C fill the registers, a step
ahead of time too: the forward pass took 10 to 90 % longer, the backward pass about as long. Nothing is added up by atomics:
sums over channels (gB, gC) and over chunks (gA, gD) are written in parts and summed by PyTorch, so that the same input gives
the same bits.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

STEPS = 64          # steps of a chunk in the backward pass; the forward pass takes a multiple
CARRY = 64          # numbers of a state that a program carries from chunk to chunk
PROGRAMS = 8192     # as many programs as keep the chip busy: the forward pass makes chunks until there are so many

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = 2 atanh(e / (2 + e)): exact for small e."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    v = s * s                                                                   # at most 1/9
    p = 1 / 9 + v * (1 / 11 + v * (1 / 13 + v * (1 / 15)))
    return tl.maximum(x, 0) + 2 * s * (1 + v * (1 / 3 + v * (1 / 5 + v * (1 / 7 + v * p))))


@triton.jit
def _finished(raw, SOFTPLUS: tl.constexpr):
    return _softplus(raw) if SOFTPLUS else raw


@triton.jit
def _wide(u, delta, B, C, z, gout):
    return u.to(tl.float32), delta.to(tl.float32), B.to(tl.float32), C.to(tl.float32), z.to(tl.float32), gout.to(tl.float32)


@triton.jit
def _step(u, delta, B, C, z, gout, in_d, in_n, HAS_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_G: tl.constexpr):
    """Loads of one step. They come a step ahead: a load has to be under way long before it is needed."""
    u_t, delta_t = tl.load(u, mask=in_d, other=0), tl.load(delta, mask=in_d, other=0)
    B_t = tl.load(B, mask=in_n, other=0)
    C_t = tl.load(C, mask=in_n, other=0) if HAS_C else B_t
    z_t = tl.load(z, mask=in_d, other=0) if HAS_Z else u_t
    g_t = tl.load(gout, mask=in_d, other=0) if HAS_G else u_t
    return u_t, delta_t, B_t, C_t, z_t, g_t


@triton.jit
def _place(A, bias, D, N, HAS_BIAS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """What this program works on: its block of channels, chunk and sequence; the channels d and numbers n, where they and
    the states (BD, BN) lie inside, and where in (D, N) a state is; A as powers of 2, and delta_bias, of these channels."""
    block, chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    in_d, in_n = d < D, n < N
    in_h = in_d[:, None] & in_n[None, :]
    of_h = d[:, None] * N + n[None, :]
    A2 = tl.load(A + of_h, mask=in_h, other=0) * LOG2E
    bias_d = tl.load(bias + d, mask=in_d, other=0) if HAS_BIAS else 0.0
    return block, chunk, b, d, n, in_d, in_n, in_h, of_h, A2, bias_d


@triton.jit
def _ends(u, delta, A, B, bias, ends, sums, D, N, steps, chunks, u_b, u_l, delta_b, delta_l, B_b, B_l,
          HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    _block, chunk, b, d, n, in_d, in_n, in_h, _of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    u += b * u_b + chunk * steps * u_l + d
    delta += b * delta_b + chunk * steps * delta_l + d
    B += b * B_b + chunk * steps * B_l + n
    h = tl.zeros((BD, BN), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    u_n, delta_n, B_n, _C, _z, _g = _step(u, delta, B, B, u, u, in_d, in_n, False, False, False)
    for t in range(1, steps + 1):
        u_t, delta_t, B_t, _C, _z, _g = _wide(u_n, delta_n, B_n, _C, _z, _g)
        u += u_l
        delta += delta_l
        B += B_l
        more_d, more_n = tl.where(t < steps, in_d, False), tl.where(t < steps, in_n, False)
        u_n, delta_n, B_n, _C, _z, _g = _step(u, delta, B, B, u, u, more_d, more_n, False, False, False)
        delta_t = tl.where(in_d, _finished(delta_t + bias_d, SOFTPLUS), 0)
        h = tl.exp2(delta_t[:, None] * A2) * h + (delta_t * u_t)[:, None] * B_t[None, :]
        total += delta_t
    at = (b * chunks + chunk) * D + d
    tl.store(ends + at[:, None] * N + n[None, :], h, mask=in_h)
    tl.store(sums + at, total, mask=in_d)


@triton.jit
def _carry(first, A, ends, sums, last, D, N, chunks, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
           REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """ends (B, chunks, D, N) becomes what enters each chunk; last is what leaves the last one."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)                          # in (D, N)
    mask = i < D * N
    A2 = tl.load(A + i, mask=mask, other=0) * LOG2E
    h = tl.load(first + b * D * N + i, mask=mask, other=0) if HAS_FIRST else tl.zeros((BLOCK,), tl.float32)
    at = b * chunks + (chunks - 1 if REVERSE else 0)
    to_next = -1 if REVERSE else 1
    ends += at * D * N + i
    sums += at * D + i // N
    next_end, next_sum = tl.load(ends, mask=mask, other=0), tl.load(sums, mask=mask, other=0)
    for k in range(1, chunks + 1):
        end, total = next_end, next_sum
        sums += to_next * D
        next_end = tl.load(ends + to_next * D * N, mask=tl.where(k < chunks, mask, False), other=0)
        next_sum = tl.load(sums, mask=tl.where(k < chunks, mask, False), other=0)
        tl.store(ends, h, mask=mask)
        h = tl.exp2(total * A2) * h + end
        ends += to_next * D * N
    if HAS_LAST:
        tl.store(last + b * D * N + i, h, mask=mask)


@triton.jit
def _outputs(u, delta, A, B, C, Dw, z, bias, first, entering, y, kept, last, L, D, N, steps, chunks,
             u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, STEPS: tl.constexpr, HAS_D: tl.constexpr,
             HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, KEEP: tl.constexpr,
             SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    _block, chunk, b, d, n, in_d, in_n, in_h, of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    D_d = tl.load(Dw + d, mask=in_d, other=0) if HAS_D else 0.0
    start = chunk * steps
    u += b * u_b + start * u_l + d
    delta += b * delta_b + start * delta_l + d
    B += b * B_b + start * B_l + n
    C += b * C_b + start * C_l + n
    y += (b * L + start) * D + d
    if HAS_Z:
        z += b * z_b + start * z_l + d
    if chunks > 1:
        h = tl.load(entering + (b * chunks + chunk) * D * N + of_h, mask=in_h, other=0)
    elif HAS_FIRST:
        h = tl.load(first + b * D * N + of_h, mask=in_h, other=0)
    else:
        h = tl.zeros((BD, BN), tl.float32)
    kept += (b * ((L + STEPS - 1) // STEPS + 1) + start // STEPS) * D * N + of_h
    stop = tl.minimum(start + steps, L)
    u_n, delta_n, B_n, C_n, z_n, _g = _step(u, delta, B, C, z, u, in_d, in_n, True, HAS_Z, False)
    for begin in range(start, stop, STEPS):
        if KEEP:
            tl.store(kept, h, mask=in_h)
            kept += D * N
        for t in range(begin + 1, tl.minimum(begin + STEPS, stop) + 1):
            u_t, delta_t, B_t, C_t, z_t, _g = _wide(u_n, delta_n, B_n, C_n, z_n, _g)
            u += u_l
            delta += delta_l
            B += B_l
            C += C_l
            if HAS_Z:
                z += z_l
            more_d, more_n = tl.where(t < stop, in_d, False), tl.where(t < stop, in_n, False)
            u_n, delta_n, B_n, C_n, z_n, _g = _step(u, delta, B, C, z, u, more_d, more_n, True, HAS_Z, False)
            delta_t = _finished(delta_t + bias_d, SOFTPLUS)
            h = tl.exp2(delta_t[:, None] * A2) * h + (delta_t * u_t)[:, None] * B_t[None, :]
            y_t = tl.sum(h * C_t[None, :], 1)
            if HAS_D:
                y_t += D_d * u_t
            if HAS_Z:
                y_t *= z_t * _sigmoid(z_t)
            tl.store(y, y_t, mask=in_d)
            y += D
    if stop == L:
        tl.store(last + b * D * N + of_h, h, mask=in_h)
        if KEEP:
            tl.store(kept, h, mask=in_h)


@triton.jit
def _rising(u, delta, A, B, C, Dw, z, bias, gout, kept, gu, gdelta, gz, gC, ends, sums, gA, gD, L, D, N, chunks,
            u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, g_b, g_l, STEPS: tl.constexpr, HAS_D: tl.constexpr,
            HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    block, chunk, b, d, n, in_d, in_n, in_h, of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    D_d = tl.load(Dw + d, mask=in_d, other=0) if HAS_D else 0.0
    start = chunk * STEPS
    row = b * L + start
    u += b * u_b + start * u_l + d
    delta += b * delta_b + start * delta_l + d
    B += b * B_b + start * B_l + n
    C += b * C_b + start * C_l + n
    gout += b * g_b + start * g_l + d
    gu += row * D + d
    gdelta += row * D + d
    if HAS_Z:
        z += b * z_b + start * z_l + d
        gz += row * D + d
    gC += (block * tl.num_programs(2).to(tl.int64) * L + row) * N + n
    h = tl.load(kept + (b * (chunks + 1) + chunk) * D * N + of_h, mask=in_h, other=0)
    decay = tl.full((BD, BN), 1.0, tl.float32)          # from the start of the chunk until now
    adds = tl.zeros((BD, BN), tl.float32)               # to the adjoint
    gA_h = tl.zeros((BD, BN), tl.float32)
    total = tl.zeros((BD, 1), tl.float32)
    gD_d = tl.zeros((BD,), tl.float32)
    steps = tl.minimum(STEPS, L - start)
    u_n, delta_n, B_n, C_n, z_n, g_n = _step(u, delta, B, C, z, gout, in_d, in_n, True, HAS_Z, True)
    for t in range(1, steps + 1):
        u_t, delta_t, B_t, C_t, z_t, gout_t = _wide(u_n, delta_n, B_n, C_n, z_n, g_n)
        u += u_l
        delta += delta_l
        B += B_l
        C += C_l
        gout += g_l
        if HAS_Z:
            z += z_l
        more_d, more_n = tl.where(t < steps, in_d, False), tl.where(t < steps, in_n, False)
        u_n, delta_n, B_n, C_n, z_n, g_n = _step(u, delta, B, C, z, gout, more_d, more_n, True, HAS_Z, True)
        delta_t = _finished(delta_t + bias_d, SOFTPLUS)
        gy_t = gout_t
        if HAS_Z:
            open_t = _sigmoid(z_t)
            gy_t = gout_t * z_t * open_t
        total += delta_t[:, None]
        a = tl.exp2(delta_t[:, None] * A2)
        h = a * h + (delta_t * u_t)[:, None] * B_t[None, :]
        read = h * C_t[None, :]
        q_t = tl.sum(read * A2, 1)
        decay *= a
        adds += decay * (gy_t[:, None] * C_t[None, :])
        gA_h += total * gy_t[:, None] * read
        tl.store(gC, tl.sum(gy_t[:, None] * h, 0), mask=in_n)
        gD_d += gy_t * u_t
        if HAS_Z:
            y_t = tl.sum(read, 1) + D_d * u_t
            tl.store(gz, gout_t * y_t * open_t * (1 + z_t * (1 - open_t)), mask=in_d)
            gz += D
        high = q_t.to(gu.dtype.element_ty)
        tl.store(gu, high, mask=in_d)
        tl.store(gdelta, q_t - high.to(tl.float32), mask=in_d)
        gu += D
        gdelta += D
        gC += N
    at = (b * chunks + chunk) * D + d
    tl.store(ends + at[:, None] * N + n[None, :], adds, mask=in_h)
    tl.store(gA + at[:, None] * N + n[None, :], gA_h, mask=in_h)
    tl.store(sums + at[:, None], total, mask=in_d[:, None])
    if HAS_D:
        tl.store(gD + at, gD_d, mask=in_d)


@triton.jit
def _falling(u, delta, A, B, C, Dw, z, bias, gout, kept, entering, sums, gu, gdelta, gB, gA, gbias, L, D, N, chunks,
             u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, g_b, g_l, STEPS: tl.constexpr, HAS_D: tl.constexpr,
             HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    block, chunk, b, d, n, in_d, in_n, in_h, of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    D_d = tl.load(Dw + d, mask=in_d, other=0) if HAS_D else 0.0
    start = chunk * STEPS
    end = tl.minimum(start + STEPS, L) - 1
    row = b * L + end
    u += b * u_b + end * u_l + d
    delta += b * delta_b + end * delta_l + d
    B += b * B_b + end * B_l + n
    C += b * C_b + end * C_l + n
    gout += b * g_b + end * g_l + d
    gu += row * D + d
    gdelta += row * D + d
    if HAS_Z:
        z += b * z_b + end * z_l + d
    gB += (block * tl.num_programs(2).to(tl.int64) * L + row) * N + n
    at = (b * chunks + chunk) * D + d
    g = tl.load(entering + at[:, None] * N + n[None, :], mask=in_h, other=0)
    w = g * tl.load(kept + (b * (chunks + 1) + chunk + 1) * D * N + of_h, mask=in_h, other=0)
    total = tl.load(sums + at[:, None], mask=in_d[:, None], other=0)
    gA_h = tl.load(gA + at[:, None] * N + n[None, :], mask=in_h, other=0) + total * w
    gdecay = tl.sum(A2 * w, 1)
    gbias_d = tl.zeros((BD,), tl.float32)
    steps = end + 1 - start
    u_n, delta_n, B_n, C_n, z_n, g_n = _step(u, delta, B, C, z, gout, in_d, in_n, True, HAS_Z, True)
    high_n, low_n = tl.load(gu, mask=in_d, other=0), tl.load(gdelta, mask=in_d, other=0)
    for t in range(1, steps + 1):
        u_t, raw_t, B_t, C_t, z_t, gy_t = _wide(u_n, delta_n, B_n, C_n, z_n, g_n)
        raw_t += bias_d
        q_t = high_n.to(tl.float32) + low_n.to(tl.float32)
        u -= u_l
        delta -= delta_l
        B -= B_l
        C -= C_l
        gout -= g_l
        if HAS_Z:
            z -= z_l
        more_d, more_n = tl.where(t < steps, in_d, False), tl.where(t < steps, in_n, False)
        u_n, delta_n, B_n, C_n, z_n, g_n = _step(u, delta, B, C, z, gout, more_d, more_n, True, HAS_Z, True)
        high_n, low_n = tl.load(gu - D, mask=more_d, other=0), tl.load(gdelta - D, mask=more_d, other=0)
        delta_t = _finished(raw_t, SOFTPLUS)
        if HAS_Z:
            gy_t *= z_t * _sigmoid(z_t)
        x_t = delta_t * u_t
        g += gy_t[:, None] * C_t[None, :]
        wrote = g * B_t[None, :]
        gx_t = tl.sum(wrote, 1)
        r_t = tl.sum(wrote * A2, 1)
        gA_h -= total * x_t[:, None] * wrote
        tl.store(gB, tl.sum(x_t[:, None] * g, 0), mask=in_n)
        gdecay += gy_t * q_t - x_t * r_t
        gdelta_t = gdecay / LOG2E + gx_t * u_t
        if SOFTPLUS:
            gdelta_t *= _sigmoid(raw_t)
        gbias_d += gdelta_t
        tl.store(gu, gx_t * delta_t + D_d * gy_t, mask=in_d)
        tl.store(gdelta, gdelta_t, mask=in_d)
        g *= tl.exp2(delta_t[:, None] * A2)
        total -= delta_t[:, None]
        gu -= D
        gdelta -= D
        gB -= N
    tl.store(gA + at[:, None] * N + n[None, :], gA_h, mask=in_h)
    if HAS_BIAS:
        tl.store(gbias + at, gbias_d, mask=in_d)


def _blocks(d_state):
    """Channels and numbers of a state in a program, which is one warp: 16 numbers in each thread."""
    BN = max(4, triton.next_power_of_2(d_state))
    return max(1, min(64, 512 // BN)), BN


def _strides(*tensors):
    """Of batch and time. Within a step the numbers have to lie side by side."""
    return [stride for t in tensors for stride in ((0, 0) if t is None else t.stride()[:2])]


def _side_by_side(*tensors):
    return [t if t is None or t.stride(2) == 1 else t.contiguous() for t in tensors]


def _whole(*tensors):
    return [t if t is None else t.contiguous() for t in tensors]


INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
FORWARD = f"({INPUTS}, Tensor? state, bool softplus, bool keep) -> (Tensor, Tensor, Tensor)"
BACKWARD = f"(Tensor gy, Tensor? glast, Tensor kept, {INPUTS}, bool softplus) -> ({', '.join(['Tensor'] * 9)})"


@custom_op("selective_scan::forward", mutates_args=(), schema=FORWARD)
def _forward(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep):
    (batch, L, d_inner), N = u.shape, A.shape[1]
    BD, BN = _blocks(N)
    u, delta, B, C, z = _side_by_side(u, delta, B, C, z)
    A, D, delta_bias, state = _whole(A, D, delta_bias, state)
    y, last, kept = _forward_fake(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep)
    blocks = triton.cdiv(d_inner, BD)
    chunks = max(1, min(triton.cdiv(L, STEPS), triton.cdiv(PROGRAMS, blocks * batch)))
    steps = triton.cdiv(triton.cdiv(L, chunks), STEPS) * STEPS
    chunks = triton.cdiv(L, steps)
    entering = A.new_empty(batch, chunks, d_inner, N) if chunks > 1 else A
    options = {"HAS_BIAS": delta_bias is not None, "SOFTPLUS": softplus, "BD": BD, "BN": BN, "num_warps": 1}
    with torch.cuda.device_of(u):
        if chunks > 1:      # the last chunk adds to no other
            sums = A.new_empty(batch, chunks, d_inner)
            _ends[blocks, chunks - 1, batch](u, delta, A, B, delta_bias, entering, sums, d_inner, N, steps, chunks,
                                             *_strides(u, delta, B), **options)
            _carry[triton.cdiv(d_inner * N, CARRY), batch](
                state, A, entering, sums, None, d_inner, N, chunks,
                HAS_FIRST=state is not None, HAS_LAST=False, REVERSE=False, BLOCK=CARRY)
        _outputs[blocks, chunks, batch](
            u, delta, A, B, C, D, z, delta_bias, state, entering, y, kept, last, L, d_inner, N, steps, chunks,
            *_strides(u, delta, B, C, z), STEPS=STEPS, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_FIRST=state is not None, KEEP=keep, **options)
    return y, last, kept


@_forward.register_fake
def _forward_fake(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep):
    (batch, L, d_inner), N = u.shape, A.shape[1]
    chunks = (L + STEPS - 1) // STEPS + 1
    return u.new_empty(u.shape), A.new_empty(batch, d_inner, N), A.new_empty(batch, chunks if keep else 0, d_inner, N)


@custom_op("selective_scan::backward", mutates_args=(), schema=BACKWARD)
def _backward(gy, glast, kept, u, delta, A, B, C, D, z, delta_bias, softplus):
    (batch, L, d_inner), N = u.shape, A.shape[1]
    BD, BN = _blocks(N)
    blocks, chunks = triton.cdiv(d_inner, BD), triton.cdiv(L, STEPS)
    gy, u, delta, B, C, z = _side_by_side(gy, u, delta, B, C, z)
    A, D, delta_bias, glast = _whole(A, D, delta_bias, glast)
    gu, gdelta, _gA, gB, gC, gD, gz, gbias, gstate = _backward_fake(gy, glast, kept, u, delta, A, B, C, D, z, delta_bias,
                                                                    softplus)
    entering, gA_parts = A.new_empty(batch, chunks, d_inner, N), A.new_empty(batch, chunks, d_inner, N)
    sums, gD_parts, gbias_parts = A.new_empty(3, batch, chunks, d_inner)
    parts = A.new_empty(blocks, batch, L, N)
    strides = _strides(u, delta, B, C, z, gy)
    options = {"STEPS": STEPS, "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None,
               "SOFTPLUS": softplus, "BD": BD, "BN": BN, "num_warps": 1}
    with torch.cuda.device_of(u):
        _rising[blocks, chunks, batch](u, delta, A, B, C, D, z, delta_bias, gy, kept, gu, gdelta, gz, parts, entering, sums,
                                       gA_parts, gD_parts, L, d_inner, N, chunks, *strides, **options)
        gC.copy_(parts.sum(0))
        _carry[triton.cdiv(d_inner * N, CARRY), batch](
            glast, A, entering, sums, gstate, d_inner, N, chunks,
            HAS_FIRST=glast is not None, HAS_LAST=True, REVERSE=True, BLOCK=CARRY)
        _falling[blocks, chunks, batch](u, delta, A, B, C, D, z, delta_bias, gy, kept, entering, sums, gu, gdelta, parts,
                                        gA_parts, gbias_parts, L, d_inner, N, chunks, *strides, **options)
        gB.copy_(parts.sum(0))
    if D is not None:
        gD = gD_parts.sum((0, 1))
    if delta_bias is not None:
        gbias = gbias_parts.sum((0, 1))
    return gu, gdelta, gA_parts.sum((0, 1)), gB, gC, gD, gz, gbias, gstate


@_backward.register_fake
def _backward_fake(gy, glast, kept, u, delta, A, B, C, D, z, delta_bias, softplus):
    like = lambda t: u.new_empty(0) if t is None else t.new_empty(t.shape)
    return (*map(like, (u, delta, A, B, C, D, z, delta_bias)), A.new_empty(len(u), *A.shape))


def _setup(ctx, inputs, output):
    *tensors, ctx.softplus, _keep = inputs
    ctx.has_state = tensors[-1] is not None
    ctx.save_for_backward(output[2], *tensors[:-1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, gy, glast, _gkept):
    kept, u, *inputs = ctx.saved_tensors
    gy = torch.zeros_like(u) if gy is None else gy
    *grads, gstate = torch.ops.selective_scan.backward(gy, glast, kept, u, *inputs, ctx.softplus)
    grads = [None if t is None else grad for t, grad in zip((u, *inputs), grads)]
    return *grads, gstate if ctx.has_state else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state):
    """
    The same function as selective_scan_sequential in mamba.py, arguments as there. u, delta, B, C, z: float32, bfloat16 or
    float16 on a GPU, d_state at most 256; computes in float32. Differentiable once; the gradients are the same bits each time.
    """
    A, D, delta_bias, state = (t if t is None else t.float() for t in (A, D, delta_bias, state))
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (u, delta, A, B, C, D, z, delta_bias, state))
    y, last_state, _ = torch.ops.selective_scan.forward(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus, keep)
    return y, last_state


# ---------------------------------------------------------------------------------------------------------------------
# The step of a token, for generation
#
# With few texts a step takes as long as reading the weights once, and the start of every kernel. There are three a layer:
#     enter      norm, in_proj, convolution; and each block of channels times its columns of x_proj: parts of that sum
#     advance    the sum of the parts, which is dt, B and C, for each block of channels; dt_proj, the state, the gate
#     project    out_proj, added to the residual stream; and once, at the end, the last norm and the head
# Nothing that is derived from the weights outlives a step, so nothing can become outdated. Where PDL (programmatic dependent
# launch) is set, a kernel starts while the one before it still runs. It fetches its weights and states, which no other
# kernel of the step writes, and only then waits for it. Sums are in float32 and in a fixed order.


@triton.jit
def _wait(residual, r, n, in_y, N, PDL: tl.constexpr):
    """Until what the kernels before have written is there; then the first thing of it that is needed, and takes long."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    return 0.0 if residual is None else tl.load(residual + r[:, None] * N + n[None, :], mask=in_y, other=0).to(tl.float32)


@triton.jit
def _product(x, norm, weight, scale, bias, residual, rows, r, n, EPS: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    """residual + scale weight norm(x) + bias for the rows r and outputs n: (BM, BN).  x: (rows, K).  weight: (N, K)."""
    in_r, in_n = r < rows, n < N
    in_y = in_r[:, None] & in_n[None, :]
    if BM == 1:         # chunks of BK come first, so that a warp has whole outputs: the sum over its threads is what costs
        y = tl.zeros((BN, BK), tl.float32)
        squares = tl.zeros((TILE // BK, BK), tl.float32)
        for start in tl.static_range(0, K, TILE):
            k = start + tl.arange(0, TILE // BK)[:, None] * BK + tl.arange(0, BK)[None, :]
            w = tl.load(weight + n[:, None, None] * K + k[None, :, :], mask=in_n[:, None, None] & (k < K)[None, :, :], other=0)
            if norm is not None:
                norm_k = tl.load(norm + k, mask=k < K, other=0).to(tl.float32)
            if start == 0:
                first = _wait(residual, r, n, in_y, N, PDL)
            x_k = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
            if norm is not None:
                squares += x_k * x_k
                x_k *= norm_k
            y += tl.sum(w.to(tl.float32) * x_k[None, :, :], 1)
        y = tl.sum(y, 1)[None, :]
        if norm is not None:
            y *= tl.rsqrt(tl.sum(squares) / K + EPS)
    else:
        first = _wait(residual, r, n, in_y, N, PDL)
        y = tl.zeros((BM, BN), tl.float32)
        squares = tl.zeros((BM,), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            w = tl.load(weight + n[:, None] * K + k[None, :], mask=in_n[:, None] & (k < K)[None, :], other=0)
            x_k = tl.load(x + r[:, None] * K + k[None, :], mask=in_r[:, None] & (k < K)[None, :], other=0)
            if norm is not None:        # / 64: what is not yet divided by its length could overflow in float16
                wide = x_k.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
                x_k = (wide * (tl.load(norm + k, mask=k < K, other=0).to(tl.float32) / 64)[None, :]).to(x_k.dtype)
            y = tl.dot(x_k, w.to(x_k.dtype).trans(), y, input_precision="ieee")
        if norm is not None:
            y *= 64 * tl.rsqrt(squares / K + EPS)[:, None]
    if scale is not None:
        y *= tl.load(scale + n, mask=in_n, other=0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=in_n, other=0).to(tl.float32)[None, :]
    return y + first


@triton.jit
def _project(x, norm, weight, scale, bias, residual, y, rows, EPS: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    result = _product(x, norm, weight, scale, bias, residual, rows, r, n, EPS, K, N, BM, BN, BK, TILE, PDL)
    tl.store(y + r[:, None] * N + n[None, :], result, mask=(r < rows)[:, None] & (n < N)[None, :])


@triton.jit
def _enter(x, norm, weight, scale, bias, taps, conv_bias, window, x_proj, x_scale, u, gate, parts, rows, EPS: tl.constexpr,
           K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BEFORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           BP: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    """x -> u, the input of the scan, and gate (rows, D); parts (blocks, rows, P): what each block of u adds to dt, B and C."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = tl.cdiv(D, BN)           # the programs after these have the outputs that become the gate
    block, to_gate = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    d, r, p = block * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BP)
    in_d = d < D
    in_y = (r < rows)[:, None] & in_d[None, :]
    in_u = tl.where(to_gate == 0, in_y, False)
    in_w = tl.where(to_gate == 0, (p < P)[:, None] & in_d[None, :], False)
    w = tl.load(x_proj + p[:, None] * D + d[None, :], mask=in_w, other=0)
    old = tl.zeros((BM, BN), tl.float32)            # of the convolution: what comes from the tokens before
    if conv_bias is not None:
        old += tl.load(conv_bias + d, mask=in_d, other=0).to(tl.float32)[None, :]
    at = window + r[:, None] * (BEFORE * D) + d[None, :]
    for k in tl.static_range(BEFORE):
        x_k = tl.load(at + k * D, mask=in_u, other=0)
        old += x_k.to(tl.float32) * tl.load(taps + d * (BEFORE + 1) + k, mask=in_d, other=0).to(tl.float32)[None, :]
    tap = tl.load(taps + d * (BEFORE + 1) + BEFORE, mask=in_d, other=0).to(tl.float32)[None, :]
    n = tl.where(in_d, d + to_gate * D, 2 * D)
    y = _product(x, norm, weight, scale, bias, None, rows, r, n, EPS, K, 2 * D, BM, BN, BK, TILE, PDL)
    of_y = r[:, None] * D + d[None, :]
    if to_gate == 1:
        tl.store(gate + of_y, y * _sigmoid(y), mask=in_y)
    else:
        for k in tl.static_range(BEFORE):
            x_k = tl.load(at + (k + 1) * D, mask=in_y, other=0) if k + 1 < BEFORE else y.to(window.dtype.element_ty)
            tl.debug_barrier()      # all threads have read what is overwritten now
            tl.store(at + k * D, x_k, mask=in_y)
        new = old + y * tap
        new = (new * _sigmoid(new)).to(u.dtype.element_ty)
        tl.store(u + of_y, new, mask=in_y)
        if BM == 1:
            part = tl.sum(w.to(tl.float32) * new.to(tl.float32), 1)[None, :]
        else:
            part = tl.dot(new, w.to(new.dtype).trans(), input_precision="ieee")
        if x_scale is not None:
            part *= tl.load(x_scale + p, mask=p < P, other=0).to(tl.float32)[None, :]
        tl.store(parts + (block * rows + r)[:, None] * P + p[None, :], part, mask=(r < rows)[:, None] & (p < P)[None, :])


@triton.jit
def _advance(parts, dt_proj, dt_bias, A_log, Dw, u, gate, h, y, rows, D: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
             P: tl.constexpr, BLOCKS: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
             PDL: tl.constexpr):
    """One step of the scan for a block of channels of one text: h (rows, D, N) in place, y (rows, D)."""
    b, d, n, q = tl.program_id(1).to(tl.int64), tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, BR)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    in_d = d < D
    in_h = in_d[:, None] & (n < N)[None, :]
    of_h = d[:, None] * N + n[None, :]
    h += b * D * N + of_h
    h_d = tl.load(h, mask=in_h, other=0)
    A_2 = -tl.exp2(tl.load(A_log + of_h, mask=in_h, other=0) * LOG2E) * LOG2E
    w = tl.load(dt_proj + d[:, None] * R + q[None, :], mask=in_d[:, None] & (q < R)[None, :], other=0)
    bias_d, D_d = tl.load(dt_bias + d, mask=in_d, other=0), tl.load(Dw + d, mask=in_d, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    u_d = tl.load(u + b * D + d, mask=in_d, other=0).to(tl.float32)
    gate_d = tl.load(gate + b * D + d, mask=in_d, other=0)
    dt, B, C = tl.zeros((BB, BR), tl.float32), tl.zeros((BB, BN), tl.float32), tl.zeros((BB, BN), tl.float32)
    for start in tl.static_range(0, BLOCKS, BB):
        i = start + tl.arange(0, BB)
        of_parts, in_parts = parts + (i * rows + b)[:, None] * P, (i < BLOCKS)[:, None]
        dt += tl.load(of_parts + q[None, :], mask=in_parts & (q < R)[None, :], other=0)
        B += tl.load(of_parts + R + n[None, :], mask=in_parts & (n < N)[None, :], other=0)
        C += tl.load(of_parts + R + N + n[None, :], mask=in_parts & (n < N)[None, :], other=0)
    dt, B, C = tl.sum(dt, 0), tl.sum(B, 0), tl.sum(C, 0)
    delta = _softplus(tl.sum(w.to(tl.float32) * dt[None, :], 1) + bias_d)
    h_d = tl.exp2(delta[:, None] * A_2) * h_d + (delta * u_d)[:, None] * B[None, :]
    tl.debug_barrier()              # all threads have read h
    tl.store(h, h_d, mask=in_h)
    tl.store(y + b * D + d, (tl.sum(h_d * C[None, :], 1) + D_d * u_d) * gate_d, mask=in_d)


def decodes(config):
    """Whether decode can run a model of this shape."""
    return config.d_intermediate == 0 and config.dt_rank + 2 * config.d_state <= 512


def decode(backbone, head, vocab_size, state, token):
    """
    The Mamba of mamba.py for the next token of each text: token (B,) -> logits (B, vocab_size), float32. state, from
    Mamba.init_state, is updated in place. Weights: contiguous, in float32, bfloat16, float16 or as Int8Linear has them.
    """
    x = backbone["embedding"](token)                                            # (B, d_model)
    (rows, d_model), (D, N), eps = x.shape, state[0][1].shape[1:], backbone["norm_f"].eps
    layers = backbone["layers"]
    R = layers[0].mixer.dt_rank
    P = R + 2 * N
    BN, BR, BP = triton.next_power_of_2(N), triton.next_power_of_2(R), max(16, triton.next_power_of_2(P))
    BD = min(256, max(16, triton.next_power_of_2(rows * D // 128)), 4096 // BN, 16384 // BR)    # of advance
    enter, project, to_logits = (_tiles(x, *sizes) for sizes in ((d_model, 32, 32), (D, 8, 16), (d_model, 32, 128)))
    blocks = triton.cdiv(D, enter["BN"])
    pdl = PDL and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    options = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    with torch.cuda.device_of(x):
        u, y, logits = x.new_empty(rows, D), x.new_empty(rows, D), x.new_empty(rows, vocab_size, dtype=torch.float32)
        gate, parts = logits.new_empty(rows, D), logits.new_empty(blocks, rows, P)
        for layer, (window, h) in zip(layers, state):
            block, conv, dt_proj = layer.mixer, layer.mixer.conv1d, layer.mixer.dt_proj
            _enter[2 * blocks, triton.cdiv(rows, enter["BM"])](
                x, layer.norm.weight, *_weights(block.in_proj), conv.weight, conv.bias, window, *_weights(block.x_proj)[:2],
                u, gate, parts, rows, eps, d_model, D, P, BEFORE=window.shape[1], BP=BP, **enter, **options)
            _advance[triton.cdiv(D, BD), rows](
                parts, dt_proj.weight, dt_proj.bias, block.A_log, block.D, u, gate, h, y, rows, D, N, R, P, blocks,
                BB=min(triton.next_power_of_2(blocks), 4096 // BR), BD=BD, BN=BN, BR=BR,
                num_warps=max(4, BD * max(BN, BR // 4) // 256), **options)
            before, x = x, torch.empty_like(x)
            _project[triton.cdiv(d_model, project["BN"]), triton.cdiv(rows, project["BM"])](
                y, None, *_weights(block.out_proj), before, x, rows, eps, D, d_model, **project, **options)
        _project[triton.cdiv(vocab_size, to_logits["BN"]), triton.cdiv(rows, to_logits["BM"])](
            x, backbone["norm_f"].weight, *_weights(head), None, logits, rows, eps, d_model, vocab_size, **to_logits, **options)
    return logits


PDL = torch.version.hip is None


def _weights(linear):
    return linear.weight, getattr(linear, "scale", None), linear.bias


def _tiles(x, K, one, more):
    """How a program of _product works: BM rows and BN outputs, `one` or `more` of them by the number of rows of x."""
    rows = len(x)
    if rows == 1:
        tile = min(triton.next_power_of_2(K), 2 ** 15 // one)
        return {"BM": 1, "BN": one, "TILE": tile, "BK": min(256, tile), "num_warps": 8}
    BM = min(64, max(16, triton.next_power_of_2(rows)))
    if x.dtype == torch.float32:        # no matrix units
        return {"BM": min(BM, 32), "BN": 32, "TILE": 0, "BK": 32, "num_warps": 4, "num_stages": 3}
    return {"BM": BM, "BN": more, "TILE": 0, "BK": 64, "num_warps": 4, "num_stages": 4}
