"""
What Mamba-2 makes of the step sizes of its heads before the scan, on CUDA, by one Triton kernel
forward and one backward. Of what in_proj gives, dt (B, L, H), and of B and C (B, L, G, N) it makes

    delta = softplus(dt + dt_bias), clamped
    a     = delta A,   A = -exp(A_log)
    own   = (B . C) delta + D,              what a step adds to y of its own u

all (B, L, H), in float32. What Mamba-3 makes of them is below. And the sum over rows that gradients
of parameters end with.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language import constexpr

from .launch import Kernel
from .scan_triton import _facts, _kinds
from .step_triton import _rate, _softplus, _tanh

STEPS = 16      # of a program of Mamba-2's, which has all heads of a group
NUMBERS = 4096  # steps x heads x angles of a program of Mamba-3's, which has all heads


@triton.jit
def _clamped(raw, LOW: constexpr, HIGH: constexpr):
    """delta = softplus(raw), clamped, and its derivative."""
    delta = _softplus(raw)
    slope = tl.where((delta < LOW) | (delta > HIGH), 0, tl.sigmoid(raw))
    # not tl.minimum, which forgets NaN
    return tl.where(delta < LOW, LOW, tl.where(delta > HIGH, HIGH, delta)), slope


@triton.jit
def _of_heads(dt, bias, A_log, L, dt_b, dt_l, H: constexpr, G: constexpr, LOW: constexpr,
              HIGH: constexpr, T: constexpr, HB: constexpr):
    """For the steps and heads of a program, (T, HB): where they lie in (B, L, H), which heads they
    are, whether they exist; and delta, its derivative and A."""
    t, b = tl.program_id(0) * T + tl.arange(0, T)[:, None], tl.program_id(2).to(tl.int64)
    h = tl.arange(0, HB)[None, :]
    head, there = tl.program_id(1) * (H // G) + h, (t < L) & (h < H // G)
    raw = tl.load(dt + b * dt_b + t.to(tl.int64) * dt_l + head, mask=there, other=0).to(tl.float32)
    raw += tl.load(bias + head, mask=h < H // G, other=0)
    delta, slope = _clamped(raw, LOW, HIGH)
    A = -tl.exp(tl.load(A_log + head, mask=h < H // G, other=0))
    return (b * L + t) * H + head, head, there, delta, slope, A


@triton.jit
def _of_states(B, C, L, B_b, B_l, N: constexpr, T: constexpr, NB: constexpr):
    """For the steps of a program and the numbers of a state, (T, NB): where they lie in B and C,
    whether they exist; and B, C and their scalar products (T, 1)."""
    t, b = tl.program_id(0) * T + tl.arange(0, T)[:, None], tl.program_id(2).to(tl.int64)
    n = tl.arange(0, NB)[None, :]
    at, there = b * B_b + t.to(tl.int64) * B_l + tl.program_id(1) * N + n, (t < L) & (n < N)
    B_t = tl.load(B + at, mask=there, other=0).to(tl.float32)
    C_t = tl.load(C + at, mask=there, other=0).to(tl.float32)
    return at, there, B_t, C_t, tl.sum(B_t * C_t, 1)[:, None]


@triton.jit(do_not_specialize=("L",))
def _prepare(dt, bias, A_log, D, B, C, delta, a, own, L, dt_b, dt_l, B_b, B_l, H: constexpr,
            G: constexpr, N: constexpr, LOW: constexpr, HIGH: constexpr, T: constexpr,
            HB: constexpr, NB: constexpr):
    at, head, there, delta_t, _, A = _of_heads(dt, bias, A_log, L, dt_b, dt_l, H, G, LOW, HIGH, T,
                                               HB)
    _, _, _, _, dots = _of_states(B, C, L, B_b, B_l, N, T, NB)
    tl.store(delta + at, delta_t, mask=there)
    tl.store(a + at, delta_t * A, mask=there)
    D_h = tl.load(D + head, mask=tl.arange(0, HB)[None, :] < H // G, other=0)
    tl.store(own + at, dots * delta_t + D_h, mask=there)


@triton.jit(do_not_specialize=("L",))
def _prepare_gradients(dt, bias, A_log, B, C, gdelta, ga, gown, of_B, of_C, gdt, gB, gC, sums, L,
                      dt_b, dt_l, B_b, B_l, gdt_b, gdt_l, PARTS: constexpr, H: constexpr,
                      G: constexpr, N: constexpr, LOW: constexpr, HIGH: constexpr, T: constexpr,
                      HB: constexpr, NB: constexpr):
    """
    Writes gdt (B, L, H), gB and gC (B, L, G, N), which lie as B and C do, and sums (programs, 3,
    H), each program's share of the gradients of dt_bias, A_log and D.
    of_B, of_C: (PARTS, B, L, G, N), what the scan has of the gradients of B and C, to be added up.
    """
    at, head, there, delta_t, slope, A = _of_heads(dt, bias, A_log, L, dt_b, dt_l, H, G, LOW, HIGH,
                                                   T, HB)
    at_n, there_n, B_t, C_t, dots = _of_states(B, C, L, B_b, B_l, N, T, NB)
    t, b = tl.program_id(0) * T + tl.arange(0, T)[:, None], tl.program_id(2).to(tl.int64)
    ga_t = tl.load(ga + at, mask=there, other=0)
    gown_t = tl.load(gown + at, mask=there, other=0)
    graw = (tl.load(gdelta + at, mask=there, other=0) + ga_t * A + gown_t * dots) * slope
    tl.store(gdt + b * gdt_b + t.to(tl.int64) * gdt_l + head, graw, mask=there)
    gdots = tl.sum(gown_t * delta_t, 1)[:, None]
    gB_t, gC_t = gdots * C_t, gdots * B_t
    n, batch = tl.arange(0, NB)[None, :], tl.num_programs(2).to(tl.int64)
    for part in range(PARTS):
        at_part = (((part * batch + b) * L + t) * G + tl.program_id(1)) * N + n
        gB_t += tl.load(of_B + at_part, mask=there_n, other=0)
        gC_t += tl.load(of_C + at_part, mask=there_n, other=0)
    tl.store(gB + at_n, gB_t, mask=there_n)
    tl.store(gC + at_n, gC_t, mask=there_n)
    heads = tl.arange(0, HB)
    to = sums + (b * tl.num_programs(0) + tl.program_id(0)) * 3 * H + tl.program_id(1) * (H // G)
    tl.store(to + heads, tl.sum(graw, 0), mask=heads < H // G)
    tl.store(to + H + heads, tl.sum(ga_t * delta_t * A, 0), mask=heads < H // G)
    tl.store(to + 2 * H + heads, tl.sum(gown_t, 0), mask=heads < H // G)


@triton.jit(do_not_specialize=("rows",))
def _sum(x, y, rows, M: constexpr, BM: constexpr):
    """y (M,), the sum over the rows of x (rows, M)."""
    m, total = tl.program_id(0) * BM + tl.arange(0, BM)[None, :], tl.zeros((64, BM), tl.float32)
    for first in range(0, rows, 64):
        row = first + tl.arange(0, 64)[:, None]
        total += tl.load(x + row.to(tl.int64) * M + m, mask=(row < rows) & (m < M), other=0)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    tl.store(y + m, tl.sum(total, 0), mask=m < M)


_start_prepare, _start_gradients, _start_sum = map(
    Kernel, (_prepare, _prepare_gradients, _sum))


def sum_over_rows(x, dtype):
    """The sum over the first dimension of x, which is contiguous and float32, in this dtype."""
    y, M = x.new_empty(x.shape[1:], dtype=dtype), x[0].numel()
    with torch.cuda.device_of(x):
        _start_sum((-(-M // 32), 1, 1), (x.device.index, M, *_kinds(x, y)), (x, y), len(x), M, 32)
    return y


def _sizes(dt, B, limits):
    """H, G, N, LOW, HIGH, T, HB, NB, as the kernels have them."""
    H, (G, N) = dt.shape[2], B.shape[2:]
    return (H, G, N, *map(float, limits), STEPS, triton.next_power_of_2(H // G),
            triton.next_power_of_2(N))


def prepare(dt, dt_bias, A_log, D, B, C, limits):
    """delta, a and own. The last dimension of dt, B and C has stride 1, and B and C lie alike."""
    (batch, L, H), sizes = dt.shape, _sizes(dt, B, limits)
    made = [A_log.new_empty(batch, L, H) for _ in range(3)]
    tensors, strides = (dt, dt_bias, A_log, D, B, C), (*dt.stride()[:2], *B.stride()[:2])
    version = dt.device.index, *sizes, *_kinds(*tensors), *_facts(*strides)
    with torch.cuda.device_of(dt):
        _start_prepare((-(-L // STEPS), B.shape[2], batch), version, (*tensors, *made), L, *strides,
                      *sizes)
    return made


def prepare_back(dt, dt_bias, A_log, B, C, gdelta, ga, gown, of_B, of_C, gdt, gB, gC, limits):
    """
    The gradients of dt_bias, A_log and D, (3, H); those of dt, B and C go into gdt, gB and gC. gB
    and gC lie as B and C do.
    of_B, of_C: (parts, B, L, G, N), of which the sum is what the scan adds to gB and gC.
    """
    (batch, L, H), sizes, programs = dt.shape, _sizes(dt, B, limits), -(-dt.shape[1] // STEPS)
    sums = A_log.new_empty(batch * programs, 3, H)
    tensors = dt, dt_bias, A_log, B, C, gdelta, ga, gown, of_B, of_C, gdt, gB, gC
    strides = (*dt.stride()[:2], *B.stride()[:2], *gdt.stride()[:2])
    version = dt.device.index, len(of_B), *sizes, *_kinds(*tensors), *_facts(*strides)
    with torch.cuda.device_of(dt):
        _start_gradients((programs, B.shape[2], batch), version, (*tensors, sums), L, *strides,
                         len(of_B), *sizes)
    return sum_over_rows(sums, torch.float32)


# ------------------------------------------------------------------------------------------------
# Mamba-3, with the names of mamba3.py. Of dt, A, lam (B, L, H) and angles (B, L, S), which in_proj
# gives, it makes with delta = softplus(dt + dt_bias), clamped, and lambda = sigmoid(lam)
#
#     a      = -delta max(floor, 1 + A if A >= 0 else 1 / (1 - A))
#     gamma  = lambda delta
#     weight = gamma, and (1 - lambda) delta of the next step
#     turns  = tanh(angles) delta / 2,            (B, L, H, S)


@triton.jit
def _of_steps(dt, A, lam, bias, row, h, there, x_l, H: constexpr, LOW: constexpr,
              HIGH: constexpr, FLOOR: constexpr):
    """Of some steps and heads delta, A and lam; and the derivatives of each by its raw number."""
    at = row * x_l + h
    raw = tl.load(dt + at, mask=there, other=0).to(tl.float32)
    raw += tl.load(bias + h, mask=h < H, other=0)
    delta, slope = _clamped(raw, LOW, HIGH)
    raw = tl.load(A + at, mask=there, other=0).to(tl.float32)
    rate = _rate(raw)
    slope_A = tl.where(rate < FLOOR, 0, tl.where(raw >= 0, -1, -rate * rate))
    rate = tl.where(rate < FLOOR, FLOOR, rate)
    lam_t = tl.sigmoid(tl.load(lam + at, mask=there, other=0).to(tl.float32))
    return delta, -rate, lam_t, slope, slope_A, lam_t * (1 - lam_t)


@triton.jit(do_not_specialize=("L",))
def _prepare3(dt, A, lam, angles, bias, a, gamma, weight, turns, L, x_l, H: constexpr,
              S: constexpr, LOW: constexpr, HIGH: constexpr, FLOOR: constexpr, T: constexpr,
              HB: constexpr, SB: constexpr):
    t, b = tl.program_id(0) * T + tl.arange(0, T)[:, None], tl.program_id(1).to(tl.int64)
    h, s, row = tl.arange(0, HB)[None, :], tl.arange(0, SB)[None, :], b * L + t
    there, later = (t < L) & (h < H), (t + 1 < L) & (h < H)
    delta, A_t, lam_t, _, _, _ = _of_steps(dt, A, lam, bias, row, h, there, x_l, H, LOW, HIGH,
                                           FLOOR)
    delta_next, _, lam_next, _, _, _ = _of_steps(dt, A, lam, bias, row + 1, h, later, x_l, H, LOW,
                                                  HIGH, FLOOR)
    at, late = row * H + h, tl.where(later, (1 - lam_next) * delta_next, 0)
    tl.store(a + at, delta * A_t, mask=there)
    tl.store(gamma + at, lam_t * delta, mask=there)
    tl.store(weight + at, lam_t * delta + late, mask=there)
    angle = tl.load(angles + row * x_l + s, mask=(t < L) & (s < S), other=0).to(tl.float32)
    turn = _tanh(angle)[:, None, :] * delta[:, :, None] / 2                 # (T, HB, SB)
    tl.store(turns + at[:, :, None] * S + s[None], turn, mask=there[:, :, None] & (s < S)[None])


@triton.jit(do_not_specialize=("L",))
def _prepare3_gradients(dt, A, lam, angles, bias, ga, ggamma, gweight, gturns, gown, gdt, gA, glam,
                        gangles, sums, L, x_l, gx_l, H: constexpr, S: constexpr, LOW: constexpr,
                        HIGH: constexpr, FLOOR: constexpr, T: constexpr, HB: constexpr,
                        SB: constexpr):
    """Writes gdt, gA, glam and gangles, which lie as dt, A, lam and angles do, and sums (programs,
    2, H), each program's share of the gradients of the bias and of D, which is in own: for it gown
    is added up."""
    t, b = tl.program_id(0) * T + tl.arange(0, T)[:, None], tl.program_id(1).to(tl.int64)
    h, s, row = tl.arange(0, HB)[None, :], tl.arange(0, SB)[None, :], b * L + t
    there, at = (t < L) & (h < H), row * H + h
    delta, A_t, lam_t, slope, slope_A, slope_lam = _of_steps(
        dt, A, lam, bias, row, h, there, x_l, H, LOW, HIGH, FLOOR)
    ga_t = tl.load(ga + at, mask=there, other=0)
    of_gamma = tl.load(ggamma + at, mask=there, other=0)
    of_gamma += tl.load(gweight + at, mask=there, other=0)
    of_late = tl.load(gweight + at - H, mask=there & (t > 0), other=0)      # of the step before
    angle = tl.load(angles + row * x_l + s, mask=(t < L) & (s < S), other=0).to(tl.float32)
    half = _tanh(angle) / 2             # of a turn, times delta
    gturn = tl.load(gturns + at[:, :, None] * S + s[None],
                    mask=there[:, :, None] & (s < S)[None], other=0)        # (T, HB, SB)
    gangle = tl.sum(gturn * delta[:, :, None], 1) * (0.5 - 2 * half * half)
    tl.store(gangles + row * gx_l + s, gangle, mask=(t < L) & (s < S))
    gdelta = lam_t * of_gamma + (1 - lam_t) * of_late + ga_t * A_t
    gdelta += tl.sum(gturn * half[:, None, :], 2)
    graw = gdelta * slope
    tl.store(gdt + row * gx_l + h, graw, mask=there)
    tl.store(gA + row * gx_l + h, ga_t * delta * slope_A, mask=there)
    tl.store(glam + row * gx_l + h, (of_gamma - of_late) * delta * slope_lam, mask=there)
    to = sums + (b * tl.num_programs(0) + tl.program_id(0)) * 2 * H + tl.arange(0, HB)
    tl.store(to, tl.sum(tl.where(there, graw, 0), 0), mask=tl.arange(0, HB) < H)
    tl.store(to + H, tl.sum(tl.load(gown + at, mask=there, other=0), 0),
             mask=tl.arange(0, HB) < H)


_start_prepare3, _start_gradients3 = Kernel(_prepare3), Kernel(_prepare3_gradients)


def prepare3(dt, A, lam, angles, bias, limits, floor):
    """a, gamma, weight and turns. dt, A, lam and angles lie in what in_proj gives."""
    (batch, L, H), S = dt.shape, angles.shape[2]
    made = [bias.new_empty(batch, L, H) for _ in range(3)] + [bias.new_empty(batch, L, H, S)]
    *_, T, _, _ = sizes = _sizes3(H, S, limits, floor)
    tensors, x_l = (dt, A, lam, angles, bias, *made), dt.stride(1)
    version = dt.device.index, *sizes, *_kinds(*tensors), *_facts(x_l)
    with torch.cuda.device_of(dt):
        _start_prepare3((-(-L // T), batch, 1), version, tensors, L, x_l, *sizes)
    return made


def _sizes3(H, S, limits, floor):
    """H, S, LOW, HIGH, FLOOR, T, HB, SB, as the kernels have them."""
    HB, SB = triton.next_power_of_2(H), triton.next_power_of_2(S)
    return H, S, *map(float, limits), floor, max(1, NUMBERS // (HB * SB)), HB, SB


def prepare3_back(dt, A, lam, angles, bias, ga, ggamma, gweight, gturns, gown, gdt, gA, glam,
                  gangles, limits, floor):
    """The gradients of bias and of D, (2, H); those of dt, A, lam and angles go into gdt, gA, glam
    and gangles, which lie in one memory, too."""
    batch, L, H = dt.shape
    *_, T, _, _ = sizes = _sizes3(H, angles.shape[2], limits, floor)
    programs, strides = -(-L // T), (dt.stride(1), gdt.stride(1))
    sums = bias.new_empty(batch * programs, 2, H)
    tensors = (dt, A, lam, angles, bias, ga, ggamma, gweight, gturns, gown, gdt, gA, glam, gangles,
               sums)
    version = dt.device.index, *sizes, *_kinds(*tensors), *_facts(*strides)
    with torch.cuda.device_of(dt):
        _start_gradients3((programs, batch, 1), version, tensors, L, *strides, *sizes)
    return sum_over_rows(sums, torch.float32)
