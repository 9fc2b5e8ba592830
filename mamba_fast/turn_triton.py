"""
What Mamba-3 does before its scan on CUDA, as Triton kernels: the sums of the angles, and the keys
and queries. Those of all heads are made of B and C, which heads share, each with a bias and a
rotation of its own. In the steps of mamba3.py each is a tensor for itself, H times as large as B;
here they are written once.
"""
from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import library

from .heads_triton import sum_over_rows
from .launch import Kernel
from .operators import differentiable_once
from .scan_triton import _as_function, _facts, _kinds, _wants_gradients

# steps of a program, which has all heads of a group; backward it is one warp, so that its sums need
# no other, and has registers for half as many
STEPS, STEPS_BACK = 16, 8


@triton.jit(do_not_specialize=("L",))
def _sums(turns, first, since, L, M: tl.constexpr, T: tl.constexpr, BM: tl.constexpr):
    """since (B, L, M): the fraction of first (B, M), if there is one, and the sum of turns until
    each step. It is kept as two, of multiples of 1/1024, which add up exactly, and of the rest."""
    m, b = tl.program_id(0) * BM + tl.arange(0, BM)[None, :], tl.program_id(1).to(tl.int64)
    first_m = 0.0 if first is None else tl.load(first + b * M + m, mask=m < M, other=0)
    coarse, rest = tl.zeros((1, BM), tl.float32), tl.zeros((1, BM), tl.float32)
    for t0 in range(0, L, T):
        t = t0 + tl.arange(0, T)[:, None]
        at, there = (b * L + t) * M + m, (t < L) & (m < M)
        turns_t = tl.load(turns + at, mask=there, other=0)
        coarse_t = tl.floor(turns_t * 1024 + 0.5) / 1024
        turns_t -= coarse_t
        exact = coarse + tl.cumsum(coarse_t, 0)
        total = first_m + (exact - tl.floor(exact)) + (rest + tl.cumsum(turns_t, 0))
        tl.store(since + at, total - tl.floor(total), mask=there)
        coarse += tl.sum(coarse_t, 0)[None, :]
        coarse -= tl.floor(coarse)      # of what is exact only the fraction counts
        rest += tl.sum(turns_t, 0)[None, :]


@triton.jit(do_not_specialize=("L",))
def _sums_back(gsince, gturns, gfirst, L, M: tl.constexpr, T: tl.constexpr, BM: tl.constexpr):
    """gturns: for each step the sum of gsince from there to the end; gfirst: the sum of all."""
    m, b = tl.program_id(0) * BM + tl.arange(0, BM)[None, :], tl.program_id(1).to(tl.int64)
    after = tl.zeros((1, BM), tl.float32)
    for i in range((L + T - 1) // T):
        t = ((L + T - 1) // T - 1 - i) * T + tl.arange(0, T)[:, None]
        at, there = (b * L + t) * M + m, (t < L) & (m < M)
        g_t = tl.load(gsince + at, mask=there, other=0)
        tl.store(gturns + at, after + tl.cumsum(g_t, 0, reverse=True), mask=there)
        after += tl.sum(g_t, 0)[None, :]
    if gfirst is not None:
        tl.store(gfirst + b * M + m, after, mask=m < M)


@triton.jit
def _angles(theta, at, S, BP: tl.constexpr, UNIT: tl.constexpr):
    """cos and sin, (T, BP), of the angles of a head, which are given in this unit; 1 and 0 from the
    S-th on."""
    s = tl.arange(0, BP)[None, :]
    angle = tl.load(theta + at[:, None] * S + s, mask=(at >= 0)[:, None] & (s < S), other=0) * UNIT
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _inverse_rms(x, weight, N: tl.constexpr, EPS: tl.constexpr):
    """What the norm of each row of x (T, N) multiplies it by, (T, 1); 1 without a norm."""
    if weight is None:
        size = 1.0
    else:
        size = tl.rsqrt(tl.sum(x * x, 1) / N + EPS)[:, None]
    return size


@triton.jit
def _rows(x, row, group, n, there, x_l, N: tl.constexpr):
    """Those of one group of x, whose steps are x_l numbers apart."""
    at = row.to(tl.int64)[:, None] * x_l + (group * N + n)[None, :]
    return tl.load(x + at, mask=there, other=0).to(tl.float32)


@triton.jit
def _weight(weight, n, N: tl.constexpr):
    """That of a norm (1, N), or 1 if there is none."""
    if weight is None:
        row = 1.0
    else:
        row = tl.load(weight + n, mask=n < N, other=0).to(tl.float32)[None, :]
    return row


@triton.jit
def _bias(bias, head, n, N: tl.constexpr):
    return tl.load(bias + head * N + n, mask=n < N, other=0).to(tl.float32)[None, :]


@triton.jit
def _pairs(x, T: tl.constexpr, BP: tl.constexpr):
    """(T, 2 BP) -> the first and the second of each two, (T, BP)."""
    return tl.split(tl.reshape(x, (T, BP, 2)))


@triton.jit
def _rotated(one, other, cos, sin):
    return one * cos - other * sin, one * sin + other * cos


@triton.jit(do_not_specialize=("L",))
def _turn(B, C, B_weight, C_weight, B_bias, C_bias, theta, gamma, D, k, q, dots, L, x_l,
          EPS_B: tl.constexpr, EPS_C: tl.constexpr, UNIT: tl.constexpr, G: tl.constexpr,
          H: tl.constexpr, N: tl.constexpr, S: tl.constexpr, T: tl.constexpr, BP: tl.constexpr):
    """
    k, q (B, L, H, N) and dots (B, L, H), their scalar products, or with a gamma of this shape and D
    (H,) dots gamma + D. With weights (N,), B and C get their norms first.
    """
    t, n = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, 2 * BP)
    row, group = tl.program_id(2).to(tl.int64) * L + t, tl.program_id(1)
    there = (t < L)[:, None] & (n < N)[None, :]
    B_t, C_t = _rows(B, row, group, n, there, x_l, N), _rows(C, row, group, n, there, x_l, N)
    B_t *= _inverse_rms(B_t, B_weight, N, EPS_B) * _weight(B_weight, n, N)
    C_t *= _inverse_rms(C_t, C_weight, N, EPS_C) * _weight(C_weight, n, N)
    for i in range(H // G):
        head = group * (H // G) + i
        k_t, q_t = B_t + _bias(B_bias, head, n, N), C_t + _bias(C_bias, head, n, N)
        at = tl.where(t < L, row * H + head, -1)
        dots_t = tl.sum(k_t * q_t, 1)
        if gamma is not None:
            dots_t = dots_t * tl.load(gamma + at, mask=t < L, other=0) + tl.load(D + head)
        tl.store(dots + at, dots_t, mask=t < L)
        cos, sin = _angles(theta, at, S, BP, UNIT)
        one, other = _pairs(k_t, T, BP)
        one, other = _rotated(one, other, cos, sin)
        tl.store(k + at[:, None] * N + n[None, :], tl.interleave(one, other), mask=there)
        one, other = _pairs(q_t, T, BP)
        one, other = _rotated(one, other, cos, sin)
        tl.store(q + at[:, None] * N + n[None, :], tl.interleave(one, other), mask=there)


@triton.jit(do_not_specialize=("L",))
def _turn_gradients(B, C, B_weight, C_weight, B_bias, C_bias, theta, gamma, gk, gq, gdots, gB, gC,
                    gtheta, ggamma, sums, sums_of_norms, L, x_l, gx_l, EPS_B: tl.constexpr,
                    EPS_C: tl.constexpr, UNIT: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
                    N: tl.constexpr, S: tl.constexpr, T: tl.constexpr, BP: tl.constexpr):
    """gB, gC (B, L, G, N), gtheta (B, L, H, S), and sums (2, programs, H, N), those of all texts,
    of which those of B_bias and C_bias are sums. Those of the weights are sums of sums_of_norms (2,
    programs, G, N). With a gamma gdots is the gradient of dots gamma + D, and ggamma (B, L, H) is
    written."""
    t, n, s = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, 2 * BP), tl.arange(0, BP)
    b, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row, there = b * L + t, (t < L)[:, None] & (n < N)[None, :]
    B_size = _inverse_rms(_rows(B, row, group, n, there, x_l, N), B_weight, N, EPS_B)
    C_size = _inverse_rms(_rows(C, row, group, n, there, x_l, N), C_weight, N, EPS_C)
    of_B, of_C = tl.zeros((T, 2 * BP), tl.float32), tl.zeros((T, 2 * BP), tl.float32)
    program = b * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(2).to(tl.int64) * tl.num_programs(0)
    for i in range(H // G):
        head = group * (H // G) + i
        # B and C are read again for each head: there are too few registers to keep them
        k_t = _rows(B, row, group, n, there, x_l, N) * B_size * _weight(B_weight, n, N)
        k_t += _bias(B_bias, head, n, N)
        q_t = _rows(C, row, group, n, there, x_l, N) * C_size * _weight(C_weight, n, N)
        q_t += _bias(C_bias, head, n, N)
        at = tl.where(t < L, row * H + head, -1)
        cos, sin = _angles(theta, at, S, BP, UNIT)
        to = at[:, None] * N + n[None, :]
        gdots_t = tl.load(gdots + at, mask=t < L, other=0)
        if gamma is not None:
            tl.store(ggamma + at, gdots_t * tl.sum(k_t * q_t, 1), mask=t < L)
            gdots_t *= tl.load(gamma + at, mask=t < L, other=0)
        gdots_t = gdots_t[:, None]
        # turned back, they are the gradients of what was not turned yet
        one, other = _pairs(tl.load(gk + to, mask=there, other=0).to(tl.float32), T, BP)
        gk_one, gk_other = _rotated(one, other, cos, -sin)
        one, other = _pairs(tl.load(gq + to, mask=there, other=0).to(tl.float32), T, BP)
        gq_one, gq_other = _rotated(one, other, cos, -sin)
        k_one, k_other = _pairs(k_t, T, BP)
        q_one, q_other = _pairs(q_t, T, BP)
        gangle = k_one * gk_other - k_other * gk_one + q_one * gq_other - q_other * gq_one
        tl.store(gtheta + at[:, None] * S + s[None, :], gangle * UNIT,
                 mask=(t < L)[:, None] & (s < S)[None, :])
        gk_t = tl.interleave(gk_one, gk_other) + gdots_t * q_t
        gq_t = tl.interleave(gq_one, gq_other) + gdots_t * k_t
        of_B += gk_t
        of_C += gq_t
        to_sum = sums + (program * H + head) * N + n
        tl.store(to_sum, tl.sum(tl.where(there, gk_t, 0), 0), mask=n < N)
        tl.store(to_sum + programs * H * N, tl.sum(tl.where(there, gq_t, 0), 0), mask=n < N)
    to = row.to(tl.int64)[:, None] * gx_l + (group * N + n)[None, :]
    to_norm = sums_of_norms
    if B_weight is not None:
        to_norm += (program * G + group) * N + n
    of_B = _through_norm(of_B, _rows(B, row, group, n, there, x_l, N) * B_size, B_size, B_weight,
                         to_norm, n, there, N)
    if B_weight is not None:
        to_norm += programs * G * N
    of_C = _through_norm(of_C, _rows(C, row, group, n, there, x_l, N) * C_size, C_size, C_weight,
                         to_norm, n, there, N)
    tl.store(gB + to, of_B, mask=there)
    tl.store(gC + to, of_C, mask=there)


@triton.jit
def _through_norm(g, normed, size, weight, to_norm, n, there, N: tl.constexpr):
    """The gradient of rows from that of their norm, weight * normed; into to_norm goes these rows'
    share of that of weight."""
    if weight is not None:
        tl.store(to_norm, tl.sum(tl.where(there, g * normed, 0), 0), mask=n < N)
        g *= _weight(weight, n, N)
        g = size * (g - normed * (tl.sum(tl.where(there, g * normed, 0), 1) / N)[:, None])
    return g


_start_sums, _start_sums_back = Kernel(_sums), Kernel(_sums_back)
_start_turn, _start_turn_gradients = (
    Kernel(_turn, num_warps=8), Kernel(_turn_gradients, num_warps=1))


def _sum_up(kernel, x, *tensors):
    (batch, L), M = x.shape[:2], x[0, 0].numel()
    version = x.device.index, M, *_kinds(x, *tensors)
    with torch.cuda.device_of(x):
        kernel((-(-M // 32), batch, 1), version, (x, *tensors), L, M, 128, 32)


def run_sums(turns, first=None):
    since = torch.empty_like(turns)
    _sum_up(_start_sums, turns, first, since)
    return since


def run_sums_back(gsince, gfirst=None):
    """The gradient of turns; gfirst: where to write that of first, if it is wanted."""
    gturns = torch.empty_like(gsince)
    _sum_up(_start_sums_back, gsince, gturns, gfirst)
    return gturns


class _Since(torch.autograd.Function):
    @staticmethod
    def forward(ctx, turns, first):
        return run_sums(turns, first)

    @staticmethod
    @differentiable_once
    def backward(ctx, gsince):
        gsince = gsince.contiguous()
        gfirst = torch.empty_like(gsince[:, 0])
        return run_sums_back(gsince, gfirst), gfirst


def angles_since(turns, first):
    """angles_since of mamba3.py for one document: turns (B, L, H, S), first (B, H, S), float32.
    Differentiable once; the gradients are the same bits each time."""
    return _Since.apply(turns.contiguous(), first.contiguous())


def _sizes(B, theta, steps):
    """G, H, N, S, T, BP, as the kernels have them."""
    (G, N), (H, S) = B.shape[2:], theta.shape[2:]
    return G, H, N, S, steps, triton.next_power_of_2(N // 2)


def _step_of(B):
    """From one step of B (B, L, G, N) to the next, as from one text to the next if L is 1."""
    return B.stride(1 if B.shape[1] > 1 else 0)


def _start(kernel, sizes, tensors, L, strides, options):
    G, *_, steps, _ = sizes
    version = (tensors[0].device.index, *sizes, *options, *_facts(*strides), *_kinds(*tensors))
    with torch.cuda.device_of(tensors[0]):
        kernel((-(-L // steps), G, len(tensors[0])), version, tensors, L, *strides, *options,
               *sizes)


def run(B, C, weights, biases, theta, dtype, gamma=None, D=None, eps=(0.0, 0.0), unit=1.0):
    """
    k, q and dots of _turn. B, C: (B, L, G, N), alike, whose steps may be apart.  weights: of their
    norms, (N,) or None.  biases: (H, N).  unit: of theta, in radians.
    """
    sizes, (batch, L, H, _) = _sizes(B, theta, STEPS), theta.shape
    k, q = (B.new_empty(batch, L, H, B.shape[3], dtype=dtype) for _ in range(2))
    dots = theta.new_empty(batch, L, H)
    tensors = B, C, *weights, *biases, theta, gamma, D, k, q, dots
    _start(_start_turn, sizes, tensors, L, (_step_of(B),), (*eps, unit))
    return k, q, dots


def run_back(gk, gq, gdots, B, C, weights, biases, theta, gB, gC, gamma=None, eps=(0.0, 0.0),
             unit=1.0):
    """
    The gradients of both biases, of theta, and, if they are there, of both weights and of gamma.
    gB, gC: where to write those of B and C; their steps may be apart.
    """
    sizes, (batch, L, H, _) = _sizes(B, theta, STEPS_BACK), theta.shape
    N, programs = B.shape[3], batch * -(-L // STEPS_BACK)
    gtheta, sums = torch.empty_like(theta), theta.new_empty(2, programs, H, N)
    normed, ggamma = weights[0] is not None, None if gamma is None else torch.empty_like(gamma)
    sums_of_norms = theta.new_empty(2, programs * sizes[0], N) if normed else None
    tensors = (B, C, *weights, *biases, theta, gamma, gk, gq, gdots, gB, gC, gtheta, ggamma, sums,
               sums_of_norms)
    _start(_start_turn_gradients, sizes, tensors, L, (_step_of(B), _step_of(gB)), (*eps, unit))
    of_biases, of_weights = (
        [None if t is None else sum_over_rows(part, t.dtype).view(t.shape)
         for part, t in zip(parts, like)]
        for parts, like in ((sums, biases), (sums_of_norms if normed else (None, None), weights)))
    return of_biases, gtheta, of_weights, ggamma


def _run(B, C, B_bias, C_bias, theta, dtype):
    """k, q and dots."""
    return run(B, C, (None, None), (B_bias, C_bias), theta, dtype)


def _run_back(gk, gq, gdots, B, C, B_bias, C_bias, theta):
    """The gradients of B, C, B_bias, C_bias and theta."""
    gB, gC = map(torch.empty_like, (B, C))
    gk, gq, gdots = (t.contiguous() for t in (gk, gq, gdots))
    of_biases, gtheta, _, _ = run_back(gk, gq, gdots, B, C, (None, None), (B_bias, C_bias), theta,
                                       gB, gC)
    return gB, gC, *of_biases, gtheta


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _gradients_of(back, ctx, *gradients):
    return *back(*gradients, *ctx.saved_tensors), None


_Turn = _as_function(_run, _setup, partial(_gradients_of, _run_back), results=3)
INPUTS = "Tensor B, Tensor C, Tensor B_bias, Tensor C_bias, Tensor theta"
_operator = library.custom_op(
    "turn::forward", _run, mutates_args=(),
    schema=f"({INPUTS}, ScalarType dtype) -> (Tensor, Tensor, Tensor)")
_backward = library.custom_op(
    "turn::backward", _run_back, mutates_args=(),
    schema=f"(Tensor gk, Tensor gq, Tensor gdots, {INPUTS}) -> ({', '.join(['Tensor'] * 5)})")
_operator.register_autograd(partial(_gradients_of, torch.ops.turn.backward), setup_context=_setup)


@_operator.register_fake
def _(B, C, B_bias, C_bias, theta, dtype):
    shape = *theta.shape[:3], B.shape[3]
    return (*(B.new_empty(shape, dtype=dtype) for _ in range(2)), B.new_empty(shape[:3]))


@_backward.register_fake
def _(gk, gq, gdots, B, C, B_bias, C_bias, theta):
    return *map(torch.empty_like, (B, C, B_bias, C_bias)), torch.empty_like(theta)


def keys_and_queries(B, C, B_bias, C_bias, theta, dtype):
    """
    B, C: (B, L, G, N).  B_bias, C_bias: (H, N).  theta: (B, L, H, S), all float32.
    Returns k and q (B, L, H, N), in this dtype: B and C of each head's group and its bias, where
    the numbers 2 i and 2 i + 1 are turned by theta_i; and their scalar products (B, L, H), float32.
    Differentiable once; the gradients are the same bits each time.
    """
    inputs = [t.contiguous() for t in (B, C, B_bias, C_bias, theta)]
    if torch.compiler.is_compiling():
        return torch.ops.turn.forward(*inputs, dtype)
    return (_Turn.apply if _wants_gradients(*inputs) else _run)(*inputs, dtype)
