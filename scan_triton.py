"""
The selective scan as fused GPU kernels in Triton: the same function as selective_scan in mamba.py, which uses it on CUDA
where this file lies beside it. Optional: without this file or without Triton everything works, slower.

How the work is divided. The sequence is cut into chunks, and a program, which is one warp, takes one chunk of one sequence
for 32 channels and walks over its steps in a plain loop. A thread has one channel, with all numbers of its state in
registers: sums over them cost no exchange between threads. All chunks run at the same time:

    forward    ends       from a zero state, what each chunk adds to the state; only where a sequence needs several chunks
               carry      the state that enters each chunk: a short loop over chunks, start' = exp(A sum(delta)) start + end
               outputs    the chunk again from its true start, y; keeps a state every STEPS steps for the backward pass
    backward   rising     chunks of STEPS from the kept states: h again, gC, gz, and what each chunk adds to the adjoint
               carry      the adjoint that enters each chunk from behind
               falling    the chunk in reverse: g, gB, gu, gdelta, and the rest of gA

States, and A, are (N, D) inside, as in mamba.py: neighbouring threads find their channels side by side in memory.

The gradient of the decays, w_t = g_t a_t h_{t-1} for each state, needs h, which is known going up, and g, which is known
going down. Neither is stored for every step, because both recurrences give w as a sum of terms that need only one of them:

    w_t = w_{t+1} + (C_t gy_t) h_t - (x_t B_t) g_t          and at the end of a chunk  w = (what enters from behind) h_end

so the rising kernel leaves q_t = sum_n A C_t h_t for each channel, the falling one has r_t = sum_n A B_t g_t, and
sum_n A w_t, delta's gradient, is a running sum of gy q - x r, begun anew in every chunk so that no rounding adds up.
sum_t delta_t w_t, A's gradient, splits in the same way. q waits where gu and gdelta will be, in two parts of their type.

What bounds it: one exp2 for each number of the states and pass, 16 a clock on each multiprocessor, two passes forward and
two backward; and the instructions around them, for each number some 8 in ends, 11 in outputs, 23 rising and 21 falling.
Nothing is added up by atomics: sums over channels (gB, gC) and over chunks (gA, gD) are written in parts and summed by
PyTorch, so that the same input gives the same bits.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

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
def _over_channels(x, BN: tl.constexpr, BD: tl.constexpr):
    """The sum of x (BN, BD) over its channels, (BN,). Each thread has one channel, and tl.sum would take 5 shuffles for each
    number; by halves, Triton passes all of them once through shared memory."""
    if BD == 1:
        return tl.reshape(x, (BN,))
    else:
        one, other = tl.split(tl.reshape(x, (BN, BD // 2, 2)))
        return _over_channels(one + other, BN, BD // 2)


@triton.jit
def _place(A, bias, D, N: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """What this program works on: its block of channels, chunk and sequence; the channels d and numbers n, what of them is
    inside, and where in (N, D) its states (BN, BD) are; A as powers of 2, and delta_bias, of these channels."""
    block, chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    in_d = d < D
    in_h = (n < N)[:, None] & in_d[None, :]
    # told that channels lie side by side, Triton would give each thread four, and a quarter of their numbers
    of_h = n[:, None] * D + tl.multiple_of(d, 1)[None, :]
    A2 = tl.load(A + of_h, mask=in_h, other=0) * LOG2E
    bias_d = tl.load(bias + d, mask=in_d, other=0) if HAS_BIAS else 0.0
    return block, chunk, b, d, n, in_d, in_h, of_h, A2, bias_d


@triton.jit
def _numbers(B, N: tl.constexpr, BN: tl.constexpr):
    """A row of B or C, (BN,)."""
    return tl.load(B) if N == BN else tl.load(B, mask=tl.arange(0, BN) < N, other=0)


@triton.jit
def _step(u, delta, z, gout, mask, HAS_Z: tl.constexpr, HAS_G: tl.constexpr):
    """Loads of one step. They come a step ahead: a load has to be under way long before it is needed."""
    u_t, delta_t = tl.load(u, mask=mask, other=0), tl.load(delta, mask=mask, other=0)
    z_t = tl.load(z, mask=mask, other=0) if HAS_Z else u_t
    g_t = tl.load(gout, mask=mask, other=0) if HAS_G else u_t
    return u_t, delta_t, z_t, g_t


@triton.jit
def _ends(u, delta, A, B, bias, ends, sums, L, D, steps, chunks, u_b, u_l, delta_b, delta_l, N: tl.constexpr,
          HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    _block, chunk, b, d, n, in_d, in_h, of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    u += b * u_b + chunk * steps * u_l + d
    delta += b * delta_b + chunk * steps * delta_l + d
    B += (b * L + chunk * steps) * N + n
    h = tl.zeros((BN, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    u_n, delta_n, _z, _g = _step(u, delta, u, u, in_d, False, False)
    for t in range(1, steps + 1):
        u_t, delta_t, B_t = u_n.to(tl.float32), delta_n.to(tl.float32), _numbers(B, N, BN)
        u += u_l
        delta += delta_l
        B += N
        u_n, delta_n, _z, _g = _step(u, delta, u, u, tl.where(t < steps, in_d, False), False, False)
        delta_t = _finished(delta_t + bias_d, SOFTPLUS)
        h = tl.exp2(delta_t[None, :] * A2) * h + (delta_t * u_t)[None, :] * B_t[:, None]
        total += delta_t
    at = b * chunks + chunk
    tl.store(ends + at * N * D + of_h, h, mask=in_h)
    tl.store(sums + at * D + d, total, mask=in_d)


@triton.jit
def _carry(first, A, ends, sums, last, D, N, chunks, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
           REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """ends (B, chunks, N, D) becomes what enters each chunk; last is what leaves the last one."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)                          # in (N, D)
    mask = i < N * D
    A2 = tl.load(A + i, mask=mask, other=0) * LOG2E
    h = tl.load(first + b * N * D + i, mask=mask, other=0) if HAS_FIRST else tl.zeros((BLOCK,), tl.float32)
    at = b * chunks + (chunks - 1 if REVERSE else 0)
    to_next = -1 if REVERSE else 1
    ends += at * N * D + i
    sums += at * D + i % D
    next_end, next_sum = tl.load(ends, mask=mask, other=0), tl.load(sums, mask=mask, other=0)
    for k in range(1, chunks + 1):
        end, total = next_end, next_sum
        sums += to_next * D
        next_end = tl.load(ends + to_next * N * D, mask=tl.where(k < chunks, mask, False), other=0)
        next_sum = tl.load(sums, mask=tl.where(k < chunks, mask, False), other=0)
        tl.store(ends, h, mask=mask)
        h = tl.exp2(total * A2) * h + end
        ends += to_next * N * D
    if HAS_LAST:
        tl.store(last + b * N * D + i, h, mask=mask)


@triton.jit
def _outputs(u, delta, A, B, C, Dw, z, bias, first, entering, y, kept, last, L, D, steps, chunks,
             u_b, u_l, delta_b, delta_l, z_b, z_l, N: tl.constexpr, STEPS: tl.constexpr, HAS_D: tl.constexpr,
             HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, KEEP: tl.constexpr,
             SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    _block, chunk, b, d, n, in_d, in_h, of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    D_d = tl.load(Dw + d, mask=in_d, other=0) if HAS_D else 0.0
    start = chunk * steps
    u += b * u_b + start * u_l + d
    delta += b * delta_b + start * delta_l + d
    B += (b * L + start) * N
    C += (b * L + start) * N
    y += (b * L + start) * D + d
    if HAS_Z:
        z += b * z_b + start * z_l + d
    if chunks > 1:
        h = tl.load(entering + (b * chunks + chunk) * N * D + of_h, mask=in_h, other=0)
    elif HAS_FIRST:
        h = tl.load(first + b * N * D + of_h, mask=in_h, other=0)
    else:
        h = tl.zeros((BN, BD), tl.float32)
    kept += (b * ((L + STEPS - 1) // STEPS + 1) + start // STEPS) * N * D + of_h
    stop = tl.minimum(start + steps, L)
    u_n, delta_n, z_n, _g = _step(u, delta, z, u, in_d, HAS_Z, False)
    for begin in range(start, stop, STEPS):
        if KEEP:
            tl.store(kept, h, mask=in_h)
            kept += N * D
        B_row, C_row = B + n, C + n     # Triton finds their layout from here, but not through both loops
        for t in range(begin + 1, tl.minimum(begin + STEPS, stop) + 1):
            u_t, delta_t, z_t = u_n.to(tl.float32), delta_n.to(tl.float32), z_n.to(tl.float32)
            B_t, C_t = _numbers(B_row, N, BN), _numbers(C_row, N, BN)
            u += u_l
            delta += delta_l
            B_row += N
            C_row += N
            if HAS_Z:
                z += z_l
            u_n, delta_n, z_n, _g = _step(u, delta, z, u, tl.where(t < stop, in_d, False), HAS_Z, False)
            delta_t = _finished(delta_t + bias_d, SOFTPLUS)
            h = tl.exp2(delta_t[None, :] * A2) * h + (delta_t * u_t)[None, :] * B_t[:, None]
            y_t = tl.sum(h * C_t[:, None], 0)
            if HAS_D:
                y_t += D_d * u_t
            if HAS_Z:
                y_t *= z_t * _sigmoid(z_t)
            tl.store(y, y_t, mask=in_d)
            y += D
        B += STEPS * N
        C += STEPS * N
    if stop == L:
        tl.store(last + b * N * D + of_h, h, mask=in_h)
        if KEEP:
            tl.store(kept, h, mask=in_h)


@triton.jit
def _rising(u, delta, A, B, C, Dw, z, bias, gout, kept, gu, gdelta, gz, gC, ends, sums, gA, gD, L, D, chunks,
            u_b, u_l, delta_b, delta_l, z_b, z_l, g_b, g_l, N: tl.constexpr, STEPS: tl.constexpr, HAS_D: tl.constexpr,
            HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    block, chunk, b, d, n, in_d, in_h, of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    D_d = tl.load(Dw + d, mask=in_d, other=0) if HAS_D else 0.0
    start = chunk * STEPS
    row = b * L + start
    u += b * u_b + start * u_l + d
    delta += b * delta_b + start * delta_l + d
    B += row * N + n
    C += row * N + n
    gout += b * g_b + start * g_l + d
    gu += row * D + d
    gdelta += row * D + d
    if HAS_Z:
        z += b * z_b + start * z_l + d
        gz += row * D + d
    gC += (block * tl.num_programs(2).to(tl.int64) * L + row) * N + n
    h = tl.load(kept + (b * (chunks + 1) + chunk) * N * D + of_h, mask=in_h, other=0)
    decay = tl.full((BN, BD), 1.0, tl.float32)          # from the start of the chunk until now
    adds = tl.zeros((BN, BD), tl.float32)               # to the adjoint
    gA_h = tl.zeros((BN, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    gD_d = tl.zeros((BD,), tl.float32)
    steps = tl.minimum(STEPS, L - start)
    u_n, delta_n, z_n, g_n = _step(u, delta, z, gout, in_d, HAS_Z, True)
    for t in range(1, steps + 1):
        u_t, delta_t, B_t, C_t = u_n.to(tl.float32), delta_n.to(tl.float32), _numbers(B, N, BN), _numbers(C, N, BN)
        z_t, gout_t = z_n.to(tl.float32), g_n.to(tl.float32)
        u += u_l
        delta += delta_l
        B += N
        C += N
        gout += g_l
        if HAS_Z:
            z += z_l
        u_n, delta_n, z_n, g_n = _step(u, delta, z, gout, tl.where(t < steps, in_d, False), HAS_Z, True)
        delta_t = _finished(delta_t + bias_d, SOFTPLUS)
        gy_t = gout_t
        if HAS_Z:
            open_t = _sigmoid(z_t)
            gy_t = gout_t * z_t * open_t
        total += delta_t
        a = tl.exp2(delta_t[None, :] * A2)
        h = a * h + (delta_t * u_t)[None, :] * B_t[:, None]
        read = h * C_t[:, None]
        q_t = tl.sum(read * A2, 0)
        decay *= a
        adds += decay * (gy_t[None, :] * C_t[:, None])
        gA_h += (total * gy_t)[None, :] * read
        tl.store(gC, _over_channels(gy_t[None, :] * h, BN, BD), mask=n < N)
        gD_d += gy_t * u_t
        if HAS_Z:
            y_t = tl.sum(read, 0) + D_d * u_t
            tl.store(gz, gout_t * y_t * open_t * (1 + z_t * (1 - open_t)), mask=in_d)
            gz += D
        high = q_t.to(gu.dtype.element_ty)
        tl.store(gu, high, mask=in_d)
        tl.store(gdelta, q_t - high.to(tl.float32), mask=in_d)
        gu += D
        gdelta += D
        gC += N
    at = b * chunks + chunk
    tl.store(ends + at * N * D + of_h, adds, mask=in_h)
    tl.store(gA + at * N * D + of_h, gA_h, mask=in_h)
    tl.store(sums + at * D + d, total, mask=in_d)
    if HAS_D:
        tl.store(gD + at * D + d, gD_d, mask=in_d)


@triton.jit
def _falling(u, delta, A, B, C, Dw, z, bias, gout, kept, entering, sums, gu, gdelta, gB, gA, gbias, L, D, chunks,
             u_b, u_l, delta_b, delta_l, z_b, z_l, g_b, g_l, N: tl.constexpr, STEPS: tl.constexpr, HAS_D: tl.constexpr,
             HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    block, chunk, b, d, n, in_d, in_h, of_h, A2, bias_d = _place(A, bias, D, N, HAS_BIAS, BD, BN)
    D_d = tl.load(Dw + d, mask=in_d, other=0) if HAS_D else 0.0
    start = chunk * STEPS
    end = tl.minimum(start + STEPS, L) - 1
    row = b * L + end
    u += b * u_b + end * u_l + d
    delta += b * delta_b + end * delta_l + d
    B += row * N + n
    C += row * N + n
    gout += b * g_b + end * g_l + d
    gu += row * D + d
    gdelta += row * D + d
    if HAS_Z:
        z += b * z_b + end * z_l + d
    gB += (block * tl.num_programs(2).to(tl.int64) * L + row) * N + n
    at = b * chunks + chunk
    g = tl.load(entering + at * N * D + of_h, mask=in_h, other=0)
    w = g * tl.load(kept + (b * (chunks + 1) + chunk + 1) * N * D + of_h, mask=in_h, other=0)
    total = tl.load(sums + at * D + d, mask=in_d, other=0)
    gA_h = tl.load(gA + at * N * D + of_h, mask=in_h, other=0) + total[None, :] * w
    gdecay = tl.sum(A2 * w, 0)
    gbias_d = tl.zeros((BD,), tl.float32)
    steps = end + 1 - start
    u_n, delta_n, z_n, g_n = _step(u, delta, z, gout, in_d, HAS_Z, True)
    high_n, low_n = tl.load(gu, mask=in_d, other=0), tl.load(gdelta, mask=in_d, other=0)
    for t in range(1, steps + 1):
        u_t, raw_t, B_t, C_t = u_n.to(tl.float32), delta_n.to(tl.float32) + bias_d, _numbers(B, N, BN), _numbers(C, N, BN)
        z_t, gy_t, q_t = z_n.to(tl.float32), g_n.to(tl.float32), high_n.to(tl.float32) + low_n.to(tl.float32)
        u -= u_l
        delta -= delta_l
        B -= N
        C -= N
        gout -= g_l
        if HAS_Z:
            z -= z_l
        u_n, delta_n, z_n, g_n = _step(u, delta, z, gout, tl.where(t < steps, in_d, False), HAS_Z, True)
        more_d = tl.where(t < steps, in_d, False)
        high_n, low_n = tl.load(gu - D, mask=more_d, other=0), tl.load(gdelta - D, mask=more_d, other=0)
        delta_t = _finished(raw_t, SOFTPLUS)
        if HAS_Z:
            gy_t *= z_t * _sigmoid(z_t)
        x_t = delta_t * u_t
        g += gy_t[None, :] * C_t[:, None]
        wrote = g * B_t[:, None]
        gx_t = tl.sum(wrote, 0)
        r_t = tl.sum(wrote * A2, 0)
        gA_h -= (total * x_t)[None, :] * wrote
        tl.store(gB, _over_channels(x_t[None, :] * g, BN, BD), mask=n < N)
        gdecay += gy_t * q_t - x_t * r_t
        gdelta_t = gdecay / LOG2E + gx_t * u_t
        if SOFTPLUS:
            gdelta_t *= _sigmoid(raw_t)
        gbias_d += gdelta_t
        tl.store(gu, gx_t * delta_t + D_d * gy_t, mask=in_d)
        tl.store(gdelta, gdelta_t, mask=in_d)
        g *= tl.exp2(delta_t[None, :] * A2)
        total -= delta_t
        gu -= D
        gdelta -= D
        gB -= N
    tl.store(gA + at * N * D + of_h, gA_h, mask=in_h)
    if HAS_BIAS:
        tl.store(gbias + at * D + d, gbias_d, mask=in_d)


def _blocks(d_state):
    """Channels and numbers of a state in a program, which is one warp: a channel of up to 16 numbers in each thread."""
    BN = triton.next_power_of_2(d_state)
    return max(1, min(32, 512 // BN)), BN


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


@torch.library.custom_op("selective_scan::forward", mutates_args=(), schema=FORWARD)
def _forward(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep):
    (batch, L, d_inner), N = u.shape, len(A)
    BD, BN = _blocks(N)
    u, delta, z = _side_by_side(u, delta, z)
    A, B, C, D, delta_bias, state = _whole(A, B, C, D, delta_bias, state)
    y, last, kept = _forward_fake(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep)
    blocks = triton.cdiv(d_inner, BD)
    chunks = max(1, min(triton.cdiv(L, STEPS), triton.cdiv(PROGRAMS, blocks * batch)))
    steps = triton.cdiv(triton.cdiv(L, chunks), STEPS) * STEPS
    chunks = triton.cdiv(L, steps)
    entering = A.new_empty(batch, chunks, N, d_inner) if chunks > 1 else A
    options = {"N": N, "HAS_BIAS": delta_bias is not None, "SOFTPLUS": softplus, "BD": BD, "BN": BN, "num_warps": 1}
    with torch.cuda.device_of(u):
        if chunks > 1:      # the last chunk adds to no other
            sums = A.new_empty(batch, chunks, d_inner)
            _ends[blocks, chunks - 1, batch](u, delta, A, B, delta_bias, entering, sums, L, d_inner, steps, chunks,
                                             *_strides(u, delta), **options)
            _carry[triton.cdiv(d_inner * N, CARRY), batch](
                state, A, entering, sums, None, d_inner, N, chunks,
                HAS_FIRST=state is not None, HAS_LAST=False, REVERSE=False, BLOCK=CARRY)
        _outputs[blocks, chunks, batch](
            u, delta, A, B, C, D, z, delta_bias, state, entering, y, kept, last, L, d_inner, steps, chunks,
            *_strides(u, delta, z), STEPS=STEPS, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_FIRST=state is not None, KEEP=keep, **options)
    return y, last, kept


@_forward.register_fake
def _forward_fake(u, delta, A, B, C, D, z, delta_bias, state, softplus, keep):
    (batch, L, d_inner), N = u.shape, len(A)
    chunks = (L + STEPS - 1) // STEPS + 1
    return u.new_empty(u.shape), A.new_empty(batch, N, d_inner), A.new_empty(batch, chunks if keep else 0, N, d_inner)


@torch.library.custom_op("selective_scan::backward", mutates_args=(), schema=BACKWARD)
def _backward(gy, glast, kept, u, delta, A, B, C, D, z, delta_bias, softplus):
    (batch, L, d_inner), N = u.shape, len(A)
    BD, BN = _blocks(N)
    blocks, chunks = triton.cdiv(d_inner, BD), triton.cdiv(L, STEPS)
    gy, u, delta, z = _side_by_side(gy, u, delta, z)
    A, B, C, D, delta_bias, glast = _whole(A, B, C, D, delta_bias, glast)
    gu, gdelta, _gA, _gB, _gC, gD, gz, gbias, gstate = _backward_fake(gy, glast, kept, u, delta, A, B, C, D, z, delta_bias,
                                                                      softplus)
    entering, gA_parts = A.new_empty(2, batch, chunks, N, d_inner)
    sums, gD_parts, gbias_parts = A.new_empty(3, batch, chunks, d_inner)
    parts = A.new_empty(blocks, batch, L, N)
    strides = _strides(u, delta, z, gy)
    options = {"N": N, "STEPS": STEPS, "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None,
               "SOFTPLUS": softplus, "BD": BD, "BN": BN, "num_warps": 1}
    with torch.cuda.device_of(u):
        _rising[blocks, chunks, batch](u, delta, A, B, C, D, z, delta_bias, gy, kept, gu, gdelta, gz, parts, entering, sums,
                                       gA_parts, gD_parts, L, d_inner, chunks, *strides, **options)
        gC = parts.sum(0)
        _carry[triton.cdiv(d_inner * N, CARRY), batch](
            glast, A, entering, sums, gstate, d_inner, N, chunks,
            HAS_FIRST=glast is not None, HAS_LAST=True, REVERSE=True, BLOCK=CARRY)
        _falling[blocks, chunks, batch](u, delta, A, B, C, D, z, delta_bias, gy, kept, entering, sums, gu, gdelta, parts,
                                        gA_parts, gbias_parts, L, d_inner, chunks, *strides, **options)
        gB = parts.sum(0)
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
    wide = lambda t: None if t is None else t.float().contiguous()
    A, B, C, D, delta_bias, state = map(wide, (A.t(), B, C, D, delta_bias, state.transpose(1, 2)))
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (u, delta, A, B, C, D, z, delta_bias, state))
    y, last_state, _ = torch.ops.selective_scan.forward(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus, keep)
    return y, last_state.transpose(1, 2)
