"""
The scan of Mamba-2 and Mamba-3 on CUDA, as Triton kernels: what `in_chunks` of mamba2.py computes,
by the same matrix products, but without its large tensors in memory.

    forward     _pack adds up the decays of each chunk. A program of _forward has some channels of a
                head. It goes from chunk to chunk with their state in registers; where there will be
                gradients it keeps the state before each chunk.
    backward    _adjoint goes the other way, for the gradient of the state after each chunk. With
                both at hand chunks are independent: _of_heads has a chunk of one head, _of_groups a
                chunk of a group of heads, whose gradients of B or of C it adds up, always in the
                same order.

bfloat16 is multiplied as bfloat16; other types as float32 on the tensor cores, float16 by tf32,
which keeps its 10 bits. Sums are in float32. A chunk has 64 steps only where every product has at
least 64 columns: with fewer, what Triton 3.6 makes for Hopper's tensor cores reads beyond the
shared memory. All kernels have 4 warps for the same reason.
"""
from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import library
from triton.language import constexpr

from .launch import Kernel
from .scan_triton import CAPABLE, _as_function, _facts, _kinds, _wants_gradients

LOG2E = constexpr(1.4426950408889634)
SMALLEST = constexpr(-1500.0)   # of delta A log2(e): the exp2 of it is 0
SIZES = ("L", "K")              # for which no kernel is compiled anew


@triton.jit(do_not_specialize=SIZES)
def _pack(delta, a, packed, L, K, H: constexpr, T: constexpr, HB: constexpr):
    """
    packed (3, B, H, K T): delta, then the sums of a from each chunk's start through each step, over
    log 2, so that exp2 of a sum is a decay. A sum is kept as two, of multiples of 1/32, which add
    up exactly, and of the small rest: differences of large sums would be inexact.
    """
    k, b, batch = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
    t, head = k * T + tl.arange(0, T)[:, None], tl.program_id(1) * HB + tl.arange(0, HB)[None, :]
    there, at = (t < L) & (head < H), (b * L + t) * H + head
    each = tl.load(a + at, mask=there, other=0) * LOG2E
    each = tl.where(each < SMALLEST, SMALLEST, each)        # which keeps NaN
    coarse = tl.floor(each * 32 + 0.5) / 32
    to, apart = packed + (b * H + head) * K * T + t, batch * H * K * T
    tl.store(to, tl.load(delta + at, mask=there, other=0), mask=head < H)
    tl.store(to + apart, tl.cumsum(coarse, 0), mask=head < H)
    tl.store(to + 2 * apart, tl.cumsum(each - coarse, 0), mask=head < H)


@triton.jit
def _decays(packed, of_head, apart, k, K, T: constexpr):
    """Of a chunk: delta; the sums, in two parts; the decay since its start to each step, through
    all of it, and from each step until its end."""
    chunk = packed + of_head * K * T + k * T
    t = tl.arange(0, T)
    coarse, rest = tl.load(chunk + apart + t), tl.load(chunk + 2 * apart + t)
    coarse_all, rest_all = tl.load(chunk + apart + T - 1), tl.load(chunk + 2 * apart + T - 1)
    until = tl.exp2((coarse_all - coarse) + (rest_all - rest))
    since, through = tl.exp2(coarse + rest), tl.exp2(coarse_all + rest_all)
    return tl.load(chunk + t), coarse, rest, since, through, until


@triton.jit
def _between(coarse, rest, T: constexpr):
    """The decay from step s to a later step t, (T, T); 0 where t is not later."""
    later = tl.arange(0, T)[:, None] > tl.arange(0, T)[None, :]
    exponent = (coarse[:, None] - coarse[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp2(tl.where(later, exponent, -1e30))


@triton.jit
def _rows(x, t, L, x_l, columns, width, TYPE: constexpr):
    """Rows t of x, (T, columns), as operands of products."""
    at = x + t.to(tl.int64)[:, None] * x_l + columns[None, :]
    return tl.load(at, mask=(t < L)[:, None] & (columns < width)[None, :], other=0).to(TYPE)


@triton.jit(do_not_specialize=SIZES)
def _forward(u, packed, B, C, own, state, y, states, last, L, K, H: constexpr, P: constexpr,
             N: constexpr, G: constexpr, u_b, u_l, u_h, B_b, B_l, B_g, C_b, C_l, C_g, T: constexpr,
             PB: constexpr, NB: constexpr, TYPE: constexpr, DOT: constexpr, KEEP: constexpr):
    """y (B, L, H, P), states (B, H, K, N, P), those before each chunk, and last (B, H, P, N)."""
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    of_head, apart = b * H + head, tl.num_programs(2).to(tl.int64) * H * K * T
    p, n = tl.program_id(0) * PB + tl.arange(0, PB)[None, :], tl.arange(0, NB)[:, None]
    there, turned = (n < N) & (p < P), of_head * P * N + p * N + n          # a state is (N, P) here
    u += b * u_b + head * u_h
    B += b * B_b + head // (H // G) * B_g
    C += b * C_b + head // (H // G) * C_g
    h = tl.zeros((NB, PB), tl.float32)
    if state is not None:
        h = tl.load(state + turned, mask=there, other=0)
    for k in range(K):
        t = k * T + tl.arange(0, T)
        delta_t, coarse, rest, since, through, until = _decays(packed, of_head, apart, k, K, T)
        B_t = _rows(B, t, L, B_l, tl.arange(0, NB), N, TYPE)
        C_t = _rows(C, t, L, C_l, tl.arange(0, NB), N, TYPE)
        u_t = _rows(u, t, L, u_l, tl.program_id(0) * PB + tl.arange(0, PB), P, TYPE)
        if KEEP:
            tl.store(states + (of_head * K + k) * N * P + n * P + p, h, mask=there)
        scores = tl.dot(C_t, tl.trans(B_t), input_precision=DOT)
        scores *= _between(coarse, rest, T) * delta_t[None, :]
        y_t = tl.dot(C_t, h.to(TYPE), input_precision=DOT) * since[:, None]
        y_t = tl.dot(scores.to(TYPE), u_t, y_t, input_precision=DOT)
        at = (b * L + t) * H + head
        y_t += u_t.to(tl.float32) * tl.load(own + at, mask=t < L, other=0)[:, None]
        tl.store(y + at[:, None] * P + p, y_t, mask=(t < L)[:, None] & (p < P))
        u_t = (u_t * (delta_t * until)[:, None]).to(TYPE)
        h = h * through + tl.dot(tl.trans(B_t), u_t, input_precision=DOT)
    tl.store(last + turned, h, mask=there)


@triton.jit(do_not_specialize=SIZES)
def _adjoint(gy, packed, C, glast, gstates, gstate, L, K, H: constexpr, P: constexpr, N: constexpr,
             G: constexpr, gy_b, gy_l, gy_h, C_b, C_l, C_g, T: constexpr, PB: constexpr,
             NB: constexpr, TYPE: constexpr, DOT: constexpr):
    """gstates (B, H, K, N, P), the gradients of the states after each chunk, and gstate (B, H, P,
    N), that of the first one."""
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    of_head, apart = b * H + head, tl.num_programs(2).to(tl.int64) * H * K * T
    p, n = tl.program_id(0) * PB + tl.arange(0, PB)[None, :], tl.arange(0, NB)[:, None]
    there, turned = (n < N) & (p < P), of_head * P * N + p * N + n
    gy += b * gy_b + head * gy_h
    C += b * C_b + head // (H // G) * C_g
    gh = tl.zeros((NB, PB), tl.float32)
    if glast is not None:
        gh = tl.load(glast + turned, mask=there, other=0)
    for i in range(K):
        k = K - 1 - i
        t = k * T + tl.arange(0, T)
        _, _, _, since, through, _ = _decays(packed, of_head, apart, k, K, T)
        C_t = _rows(C, t, L, C_l, tl.arange(0, NB), N, TYPE)
        gy_t = _rows(gy, t, L, gy_l, tl.program_id(0) * PB + tl.arange(0, PB), P, TYPE)
        tl.store(gstates + (of_head * K + k) * N * P + n * P + p, gh, mask=there)
        gy_t = (gy_t * since[:, None]).to(TYPE)
        gh = gh * through + tl.dot(tl.trans(C_t), gy_t, input_precision=DOT)
    tl.store(gstate + turned, gh, mask=there)


# The gradients of one chunk. With the decays S from its start, h_0, and gh, the gradient of the
# state at its end,
#
#     y_t   = sum over s < t of (C_t . B_s) exp(S_t - S_s) delta_s u_s
#             + exp(S_t) C_t h_0 + own_t u_t
#     h_end = exp(S_end) h_0 + sum over s of exp(S_end - S_s) delta_s u_s (outer) B_s


@triton.jit(do_not_specialize=SIZES)
def _of_heads(u, packed, B, C, own, gy, states, gstates, gu, gdelta, ga, gown, L, K, H: constexpr,
              P: constexpr, N: constexpr, G: constexpr, u_b, u_l, u_h, B_b, B_l, B_g, C_b, C_l, C_g,
              gy_b, gy_l, gy_h, gu_b, gu_l, T: constexpr, PB: constexpr, NB: constexpr,
              TYPE: constexpr, DOT: constexpr):
    """A chunk of one head: the gradients of u, delta, a and own."""
    k, head, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    of_head, apart = b * H + head, tl.num_programs(2).to(tl.int64) * H * K * T
    t, p, n = k * T + tl.arange(0, T), tl.arange(0, PB), tl.arange(0, NB)
    group, at, there = head // (H // G), (b * L + t) * H + head, t < L
    delta_t, coarse, rest, since, through, until = _decays(packed, of_head, apart, k, K, T)
    B_t = _rows(B + b * B_b + group * B_g, t, L, B_l, n, N, TYPE)
    C_t = _rows(C + b * C_b + group * C_g, t, L, C_l, n, N, TYPE)
    u_t = _rows(u + b * u_b + head * u_h, t, L, u_l, p, P, TYPE)
    gy_t = _rows(gy + b * gy_b + head * gy_h, t, L, gy_l, p, P, TYPE)
    # within the chunk
    decay = _between(coarse, rest, T)
    weights = tl.dot(C_t, tl.trans(B_t), input_precision=DOT) * decay       # (t, s)
    gv = tl.dot(tl.trans(weights.to(TYPE)), gy_t, input_precision=DOT)      # of delta_s u_s
    weights *= tl.dot(gy_t, tl.trans(u_t), input_precision=DOT)
    gdelta_t, gsum = tl.sum(weights, 0), tl.sum(weights * delta_t[None, :], 1)
    # to its end, and from its start
    of_chunk = (of_head * K + k) * N * P
    gh = _rows(gstates + of_chunk, n, N, P, p, P, TYPE)                     # (N, P)
    to_end = tl.dot(B_t, gh, input_precision=DOT) * until[:, None]
    gv += to_end
    to_end = tl.sum(to_end * u_t, 1)
    gdelta_t += to_end
    h = _rows(states + of_chunk, n, N, P, p, P, TYPE)
    gsum += tl.sum(tl.dot(C_t, h, input_precision=DOT) * gy_t, 1) * since - delta_t * gdelta_t
    # S_end is the last of the sums; h_end depends on it
    gend = tl.sum(to_end * delta_t) + through * tl.sum(gh.to(tl.float32) * h)
    tl.store(ga + at, tl.cumsum(gsum, 0, reverse=True) + gend, mask=there)
    tl.store(gdelta + at, gdelta_t, mask=there)
    tl.store(gown + at, tl.sum(gy_t.to(tl.float32) * u_t, 1), mask=there)
    gv *= delta_t[:, None]
    gv += gy_t.to(tl.float32) * tl.load(own + at, mask=there, other=0)[:, None]
    gu += b * gu_b + head * P
    tl.store(gu + t.to(tl.int64)[:, None] * gu_l + p[None, :], gv,
             mask=there[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _of_groups(u, packed, other, gy, states, sums, L, K, H: constexpr, P: constexpr, N: constexpr,
               G: constexpr, u_b, u_l, u_h, o_b, o_l, o_g, gy_b, gy_l, gy_h, PARTS: constexpr,
               OF_C: constexpr, T: constexpr, PB: constexpr, NB: constexpr, TYPE: constexpr,
               DOT: constexpr):
    """A chunk of one group: the gradient of C (OF_C) or of B, added up over 1 / PARTS of its heads,
    sums (PARTS, B, L, G, N). other: B, or else C.  states: those before each chunk, or else the
    gradients of those after it."""
    k, batch, b = tl.program_id(0), tl.num_programs(2).to(tl.int64), tl.program_id(2).to(tl.int64)
    group, part = tl.program_id(1).to(tl.int64) // PARTS, tl.program_id(1) % PARTS
    t, p, n = k * T + tl.arange(0, T), tl.arange(0, PB), tl.arange(0, NB)
    gscores, total = tl.zeros((T, T), tl.float32), tl.zeros((T, NB), tl.float32)
    for i in range(H // G // PARTS):
        head = (group * PARTS + part) * (H // G // PARTS) + i
        of_head = b * H + head
        apart = batch * H * K * T
        delta_t, coarse, rest, since, _, until = _decays(packed, of_head, apart, k, K, T)
        u_t = _rows(u + b * u_b + head * u_h, t, L, u_l, p, P, TYPE)
        gy_t = _rows(gy + b * gy_b + head * gy_h, t, L, gy_l, p, P, TYPE)
        through = tl.dot(gy_t, tl.trans(u_t), input_precision=DOT)          # (t, s)
        gscores += through * (_between(coarse, rest, T) * delta_t[None, :])
        h = _rows(states + (of_head * K + k) * N * P, n, N, P, p, P, TYPE)  # (N, P)
        if OF_C:
            weighted = gy_t * since[:, None]
        else:
            weighted = u_t * (delta_t * until)[:, None]
        total = tl.dot(weighted.to(TYPE), tl.trans(h), total, input_precision=DOT)
    other_t = _rows(other + b * o_b + group * o_g, t, L, o_l, n, N, TYPE)
    gscores = gscores.to(TYPE)
    if not OF_C:
        gscores = tl.trans(gscores)
    total = tl.dot(gscores, other_t, total, input_precision=DOT)
    to = ((part * batch + b) * L + t) * G + group
    tl.store(sums + to[:, None] * N + n[None, :], total, mask=(t < L)[:, None] & (n < N)[None, :])


_start_pack = Kernel(_pack)
_start_forward, _start_adjoint, _start_of_heads, _start_of_groups = (
    Kernel(function, num_warps=4, num_stages=2)
    for function in (_forward, _adjoint, _of_heads, _of_groups))


def _power_of_2(n):
    return max(16, triton.next_power_of_2(n))


def shared_memory(device):
    """Bytes of it that one program can use."""
    key = "shared memory", device
    if key not in CAPABLE:
        properties = torch.cuda.get_device_properties(device)
        CAPABLE[key] = properties.shared_memory_per_block_optin
    return CAPABLE[key]


def steps_of(device, dtype, headdim, d_state):
    """Steps of a chunk: as many as go into shared memory with all that is multiplied; 0 if these
    are too few."""
    P, N = _power_of_2(headdim), _power_of_2(d_state)
    numbers = shared_memory(device) // (2 if dtype == torch.bfloat16 else 4)
    wide = min(P, N) >= 64 and dtype == torch.bfloat16 and shared_memory(device) >= 2 ** 17
    part = 64 if N >= 64 else min(P, 64)        # of the channels, for _forward

    def needed(T):      # by _of_heads, _of_groups, _forward
        return 512 + max(2 * (T * N + T * P + N * P), 2 * (2 * T * P + N * P),
                         2 * N * part + T * N + T * part)
    return next((T for T in (64, 32, 16)[not wide:] if needed(T) <= numbers), 0)


def _sizes(u, B):
    """L, K, H, P, N, G, as the kernels have them."""
    (_, L, H, P), (G, N) = u.shape, B.shape[2:]
    return L, -(-L // steps_of(u.device, u.dtype, P, N)), H, P, N, G


def _tiles(u, P, N):
    """T, PB, NB, TYPE, DOT."""
    PB, NB = _power_of_2(P), _power_of_2(N)
    kind = tl.bfloat16 if _kept_as(u) == torch.bfloat16 else tl.float32
    precision = "tf32" if u.dtype == torch.float16 else "tf32x3"
    return steps_of(u.device, u.dtype, P, N), PB, NB, kind, precision


def _kept_as(u):
    """The dtype of the states that are kept, and of what is multiplied."""
    return torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32


def _tiles_of_states(u, P, N):
    """The same for programs that may have a part of a head's channels."""
    T, PB, NB, *kind = _tiles(u, P, N)
    return T, 64 if NB >= 64 else min(PB, 64), NB, *kind


def _by_rows(*tensors):
    """The numbers of a row lie side by side."""
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def _strides(*tensors):
    return [stride for t in tensors for stride in t.stride()[:3]]


def _version(sizes, tensors, *others):
    """All for which Triton would compile another kernel; see Kernel."""
    return tensors[0].device.index, *sizes[2:], *_kinds(*tensors), *others


INPUTS = "Tensor u, Tensor delta, Tensor a, Tensor B, Tensor C, Tensor own, Tensor? state"


def _run(u, delta, a, B, C, own, state, keep):
    """y, the last state and, for the backward pass, packed and the state before each chunk."""
    u, B, C = _by_rows(u, B, C)
    L, K, H, P, N, _ = sizes = _sizes(u, B)
    batch, tiles = len(u), _tiles_of_states(u, P, N)
    y, last = u.new_empty(u.shape), delta.new_empty(batch, H, P, N)
    packed = delta.new_empty(3, batch, H, K * tiles[0])
    states = u.new_empty((batch, H, K, N, P) if keep else 0, dtype=_kept_as(u))
    strides = _strides(u, B, C)
    with torch.cuda.device_of(u):
        _start_pack((K, -(-H // 32), batch), _version(sizes, (delta, a), tiles[0]),
                    (delta, a, packed), L, K, H, tiles[0], 32)
        tensors = u, packed, B, C, own, state
        _start_forward((-(-P // tiles[1]), H, batch),
                       _version(sizes, tensors, *_facts(*strides), keep),
                       (*tensors, y, states, last), *sizes, *strides, *tiles, keep)
    return y, last, packed, states


def _run_back(gy, glast, u, packed, B, C, own, states):
    """The gradients of u, delta, a, B, C, own and state."""
    u, B, C, gy = _by_rows(u, B, C, gy)
    glast, gu = None if glast is None else glast.contiguous(), u.new_empty(u.shape)
    gdelta, ga, gown, sums, gstate = back_in_parts(gy, glast, u, packed, B, C, own, states, gu)
    gB, gC = (t.sum(0) if len(t) > 1 else t[0] for t in sums)
    return gu, gdelta, ga, gB.to(B.dtype), gC.to(C.dtype), gown, gstate


def back_in_parts(gy, glast, u, packed, B, C, own, states, gu):
    """The gradients of delta, a and own; those of B and of C in parts (parts, B, L, G, N), which
    are to be added up; that of the state. gu: where to write that of u; its steps may be apart."""
    L, K, H, P, N, G = sizes = _sizes(u, B)
    batch, tiles, whole = len(u), _tiles_of_states(u, P, N), _tiles(u, P, N)
    gstates = torch.empty_like(states)
    gdelta, ga, gown = (packed.new_empty(batch, L, H) for _ in range(3))
    gstate = packed.new_empty(batch, H, P, N)
    # two programs for each multiprocessor of an H100
    shares = (n for n in range(1, H // G + 1) if H // G % n == 0 and n * batch * K * G >= 264)
    parts = next(shares, H // G)
    sums = [packed.new_empty(parts, batch, L, G, N) for _ in range(2)]
    with torch.cuda.device_of(u):
        tensors, strides = (gy, packed, C, glast), _strides(gy, C)
        _start_adjoint((-(-P // tiles[1]), H, batch), _version(sizes, tensors, *_facts(*strides)),
                       (*tensors, gstates, gstate), *sizes, *strides, *tiles)
        tensors, strides = (u, packed, B, C, own, gy, states), _strides(u, B, C, gy)
        gtensors, strides = (gstates, gu, gdelta, ga, gown), (*strides, *gu.stride()[:2])
        _start_of_heads((K, H, batch), _version(sizes, (*tensors, *gtensors), *_facts(*strides)),
                        (*tensors, *gtensors), *sizes, *strides, *whole)
        for of_C, other, of_chunks in ((False, C, gstates), (True, B, states)):
            tensors = u, packed, other, gy, of_chunks, sums[int(of_C)]
            strides = _strides(u, other, gy)
            _start_of_groups((K, G * parts, batch),
                             _version(sizes, tensors, *_facts(*strides), parts, of_C),
                             tensors, *sizes, *strides, parts, of_C, *whole)
    return gdelta, ga, gown, sums, gstate


def _setup(ctx, inputs, output):
    u, _, _, B, C, own, state, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(u, output[2], B, C, own, output[3])
    ctx.set_materialize_grads(False)


def _gradients_of(back, ctx, gy, glast, *_kept):
    saved = ctx.saved_tensors       # taken once: a checkpoint computes them for one taking
    gy = torch.zeros_like(saved[0]) if gy is None else gy
    *others, gstate = back(gy, glast, *saved)
    return *others, gstate if ctx.has_state else None, None


_Scan = _as_function(_run, _setup, partial(_gradients_of, _run_back))
_operator = library.custom_op(
    "ssd::forward", _run, mutates_args=(),
    schema=f"({INPUTS}, bool keep) -> ({', '.join(['Tensor'] * 4)})")
_backward = library.custom_op(
    "ssd::backward", _run_back, mutates_args=(),
    schema="(Tensor gy, Tensor? glast, Tensor u, Tensor packed, Tensor B, Tensor C, Tensor own, "
           f"Tensor states) -> ({', '.join(['Tensor'] * 7)})")
_operator.register_autograd(partial(_gradients_of, torch.ops.ssd.backward), setup_context=_setup)


@_operator.register_fake
def _(u, delta, a, B, C, own, state, keep):
    (batch, L, H, P), N = u.shape, B.shape[3]
    T = steps_of(u.device, u.dtype, P, N)
    K = (L + T - 1) // T
    return (u.new_empty(u.shape), delta.new_empty(batch, H, P, N),
            delta.new_empty(3, batch, H, K * T),
            u.new_empty((batch, H, K, N, P) if keep else 0, dtype=_kept_as(u)))


@_backward.register_fake
def _(gy, glast, u, packed, B, C, own, states):
    (batch, L, H, P), N = u.shape, B.shape[3]
    gdelta, ga, gown = (packed.new_empty(batch, L, H) for _ in range(3))
    return (u.new_empty(u.shape), gdelta, ga, B.new_empty(B.shape), C.new_empty(C.shape), gown,
            packed.new_empty(batch, H, P, N))


def fits(device, dtype, headdim, d_state):
    """Whether a program has the shared memory for these sizes."""
    return steps_of(device, dtype, headdim, d_state) > 0


fits._dynamo_marked_constant = True     # as runs_on of scan_triton.py


def scan(u, delta, a, B, C, own, state):
    """
    What in_chunks of mamba2.py computes, arguments as there. u may have 16 bits; B and C are taken
    in its type; the others must be float32. Differentiable once; the gradients are the same bits
    each time.
    """
    B, C = (t.to(u.dtype) for t in (B, C))
    delta, a, own = (t.contiguous() for t in (delta, a, own))
    state = None if state is None else state.contiguous()
    inputs = u, delta, a, B, C, own, state
    keep = _wants_gradients(*inputs)
    if torch.compiler.is_compiling():
        run = torch.ops.ssd.forward
    else:
        run = _Scan.apply if keep else _run
    return run(*inputs, keep)[:2]
