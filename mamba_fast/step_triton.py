"""
The step of a token, for generation, as Triton kernels: one token more for each text, the states
updated in place. Of models whose layers are all of one kind; decode.py makes a CUDA graph of it.

With few texts a step takes as long as reading the weights once, and the start of every kernel.
There are four a layer, three in Mamba-2 and 3, which have no x_proj:
    enter      in_proj and the convolution; in Mamba-3, which has none, project
    project    x_proj; for several texts in parts, which are sums over some channels each
    advance    the step of the scan, and the gate; in Mamba-1 dt_proj before it. In groups_triton.py
               one kernel does x_proj and this, for several texts
    project    out_proj, added to the residual stream; and once, at the end, the head
The norm before a product is done in two halves: the kernel before multiplies by the norm's weight
and sums up squares, the product is divided by their root. Nothing that is derived from the weights
outlives a step, so nothing can become outdated. For one text and weights in 8 bits bytes_triton.py
has enter and project.

Where PDL (programmatic dependent launch) is set, a kernel starts while the one before it still
runs. It fetches its weights and states, which no other kernel of the step writes, and only then
waits for it. After in_proj, out_proj or the head of several texts it starts later, after advance of
Mamba-2 and 3 at its end: a kernel that waits takes room from one that works. Sums are in float32
and in a fixed order.
"""
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language import constexpr

from . import bytes_triton, groups_triton
from .bytes_triton import DIVISOR  # by which x is divided before its length is known: see _keep
from .scan_triton import LOG2E, _silu

CIRCLE = constexpr(6.283185307179586)       # a whole turn, in radians
PDL = torch.version.hip is None     # on NVIDIA's GPUs: this launch, and PTX


@triton.jit
def _softplus(x):
    """log(1 + e^x), accurate for large negative x too: 2 artanh(e / (2 + e)) of e = e^-|x|."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    f = e / (2 + e)
    v = f * f
    series = 0.3333332 + v * (0.20003835 + v * (0.14116978 + v * 0.13433774))
    return tl.maximum(x, 0) + 2 * f * (1 + v * series)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _rate(raw):
    """-A of Mamba-3, of what in_proj gives, before its floor."""
    return tl.where(raw >= 0, 1 + raw, 1 / (1 + tl.abs(raw)))


# ------------------------------------------------------------------------------------------------
# Products


@triton.jit
def _wait(residual, squares, r, n, in_r, in_y, N: constexpr, BLOCKS: constexpr, PDL: constexpr):
    """Until what the kernels before have written is there; then the first things of it that are
    needed, and take long: of the residual, and the squares of each row of x."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    first, square = 0.0, 0.0
    if residual is not None:
        first = tl.load(residual + r[:, None] * N + n[None, :], mask=in_y, other=0)
    if squares is not None:
        i = tl.arange(0, triton.next_power_of_2(BLOCKS))
        in_i = in_r[:, None] & (i < BLOCKS)[None, :]
        square = tl.load(squares + r[:, None] * BLOCKS + i[None, :], mask=in_i, other=0)
    return first, square


@triton.jit
def _load(of, row, in_row, start, K: constexpr, BK: constexpr):
    """Columns start to start + BK of some rows of a matrix of K columns."""
    k = start + tl.arange(0, BK)
    mask = in_row[:, None] if K % BK == 0 else in_row[:, None] & (k < K)[None, :]
    return tl.load(of + row[:, None] * K + k[None, :], mask=mask, other=0)


@triton.jit
def _of_outputs(weight, n, N):
    """weight (N,) for the outputs n: (1, BN). It is asked for before the wait."""
    return tl.load(weight + n, mask=n < N, other=0).to(tl.float32)[None, :]


@triton.jit
def _to_cache(weight, n, K: constexpr, N: constexpr):
    """Asks for the rows n of a matrix (N, K), and does not wait until they are in the L2 cache."""
    SIZE: constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    k = tl.arange(0, triton.next_power_of_2((K * SIZE + 127) // 128)) * (128 // SIZE)   # lines
    at = weight + tl.minimum(n, N - 1)[:, None] * K + tl.minimum(k, K - 1)[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                              [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _product(x, squares, weight, scale, bias, residual, rows, r, n, part, EPS: constexpr,
             K: constexpr, N: constexpr, BLOCKS: constexpr, PARTS: constexpr, BM: constexpr,
             BN: constexpr, BK: constexpr, SWAP: constexpr, PDL: constexpr):
    """
    residual + scale weight x + bias for the rows r and outputs n: (BM, BN); or, with PARTS, one of
    so many that make up this sum.  x: (rows, K).  weight: (N, K).  squares: None, or of the x whose
    norm is wanted, (rows, BLOCKS); x is then what _keep has made of it.
    """
    in_r, in_n = r < rows, n < N
    in_y = in_r[:, None] & in_n[None, :]
    scale_n, bias_n = 1.0, 0.0
    if scale is not None:
        scale_n = _of_outputs(scale, n, N)
    if bias is not None:
        bias_n = _of_outputs(bias, n, tl.where(part == 0, N, 0))
    if BM == 1:     # before the wait, and all of them at once: memory is far away
        weights = ()
        for start in tl.static_range(0, K, BK):
            weights = weights + (_load(weight, n, in_n, start, K, BK),)
        # x once for each output: else the weights would have to go to other threads
        y, row = tl.zeros((BN, BK), tl.float32), tl.zeros_like(n)
        first, square = _wait(residual, squares, r, n, in_r, in_y, N, BLOCKS, PDL)
        for start in tl.static_range(0, K, BK):
            x_k = _load(x, row, row < rows, start, K, BK)
            y += weights[start // BK].to(tl.float32) * x_k.to(tl.float32)
        y = tl.sum(y, 1)[None, :]
    else:
        first, square = _wait(residual, squares, r, n, in_r, in_y, N, BLOCKS, PDL)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        y = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        for start in range(part * (K // PARTS), (part + 1) * (K // PARTS), BK):
            w, x_k = _load(weight, n, in_n, start, K, BK), _load(x, r, in_r, start, K, BK)
            if SWAP:
                y = tl.dot(w.to(x_k.dtype), x_k.trans(), y, input_precision="ieee")
            else:
                y = tl.dot(x_k, w.to(x_k.dtype).trans(), y, input_precision="ieee")
        if SWAP:
            y = y.trans()
    if squares is not None:
        root = DIVISOR * tl.rsqrt(tl.sum(square, 1) / K + EPS)
        y *= root[:, None]
    if scale is not None:
        y *= scale_n
    if bias is not None:
        y += bias_n
    return y if residual is None else y + first.to(tl.float32)


@triton.jit
def _keep(y, norm_n, out, normed, squares, rows, r, n, N: constexpr, BN: constexpr):
    """y (BM, BN) goes into out (rows, N); with a norm, of which norm_n (1, BN) is the weight, also
    for the product after it: y norm_n into normed, and the sum of the squares of each row of this
    block into squares (rows, blocks)."""
    in_y, of_y = (r < rows)[:, None] & (n < N)[None, :], r[:, None] * N + n[None, :]
    y = y.to(out.dtype.element_ty)
    tl.store(out + of_y, y, mask=in_y)
    if norm_n is not None:  # divided, for what has not its length yet could overflow float16
        wide = y.to(tl.float32)
        weighted = wide * (norm_n / DIVISOR)
        tl.store(normed + of_y, weighted.to(normed.dtype.element_ty), mask=in_y)
        of_block = r * tl.cdiv(N, BN) + tl.program_id(0)
        tl.store(squares + of_block, tl.sum(wide * wide, 1), mask=r < rows)


@triton.jit
def _begin(token, table, scale, x, norm, normed, squares, counts, rows, N: constexpr,
           COUNTS: constexpr, BN: constexpr, PDL: constexpr):
    """The embedding x (rows, N) of each token (rows,); for the first product of all what _keep does
    after each of the others; and the counts of groups_triton.py, if it has them, become 0."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) + tl.arange(0, 1)
    norm_n, id = _of_outputs(norm, n, N), tl.load(token + r)
    y = tl.load(table + id[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0)
    if scale is not None:
        scales = tl.load(scale + id)
        y = (y.to(tl.float32) * scales.to(tl.float32)[:, None]).to(scales.dtype)
    _keep(y, norm_n, x, normed, squares, rows, r, n, N, BN)
    if counts is not None and tl.program_id(0) + tl.program_id(1) == 0:
        i = tl.arange(0, triton.next_power_of_2(COUNTS))
        tl.store(counts + i, tl.zeros_like(i), mask=i < COUNTS)


@triton.jit
def _choose(logits, token, N: constexpr, BN: constexpr, PDL: constexpr):
    """token (rows,): the likeliest of each row of logits (rows, N), the first of several;
    NaN is none."""
    row, n = logits + tl.program_id(0) * N, tl.arange(0, BN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    most, likeliest = tl.full((BN,), float("-inf"), tl.float32), n
    for start in tl.static_range(0, N, BN):
        logit = tl.load(row + start + n, mask=start + n < N, other=float("-inf"))
        likeliest = tl.where(logit > most, start + n, likeliest)
        most = tl.maximum(logit, most)
    first = tl.min(tl.where(most == tl.max(most, 0), likeliest, N - 1), 0)
    tl.store(token + tl.program_id(0), first.to(token.dtype.element_ty))


@triton.jit
def _turn(x, y, x_b, x_n, D: constexpr, N: constexpr, BD: constexpr, BN: constexpr):
    """y (B, D, N) = x (B, N, D), whose channels lie side by side."""
    b, n = tl.program_id(1).to(tl.int64), tl.arange(0, BN)[:, None]
    d = tl.program_id(0) * BD + tl.arange(0, BD)[None]
    there = (n < N) & (d < D)
    tile = tl.load(x + b * x_b + n * x_n + d, mask=there)
    tl.store(y + (b * D + d) * N + n, tile, mask=there)


def turn(x, y):
    """y, which is contiguous, becomes x; both (B, D, N), but in x the channels lie side by side.
    PyTorch's copy reads it a number here and a number there, which takes several times as long."""
    batch, D, N = x.shape
    of_batch, of_channel, of_number = x.stride()
    assert of_channel == 1 and y.is_contiguous()
    grid = triton.cdiv(D, 64), batch
    _turn[grid](x, y, of_batch, of_number, D, N, 64, triton.next_power_of_2(N))


@triton.jit
def _project(x, squares, weight, scale, bias, residual, norm, y, normed, y_squares, rows,
             EPS: constexpr, K: constexpr, N: constexpr, BLOCKS: constexpr, PARTS: constexpr,
             BM: constexpr, BN: constexpr, BK: constexpr, SWAP: constexpr, PDL: constexpr):
    """A product, and what _keep does with it; or PARTS of it, y (PARTS, rows, N)."""
    if PDL and (BM == 1 or 8 * N <= K):
        tl.extra.cuda.gdc_launch_dependents()
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    part, norm_n = tl.program_id(2), None
    if norm is not None:
        norm_n = _of_outputs(norm, n, N)
    if PDL and BM > 1 and 8 * N <= K:       # x_proj: few programs, which wait for memory
        _to_cache(weight, n, K, N)
    result = _product(x, squares, weight, scale, bias, residual, rows, r, n, part, EPS, K, N,
                      BLOCKS, PARTS, BM, BN, BK, SWAP, PDL)
    _keep(result, norm_n, y + part * rows * N, normed, y_squares, rows, r, n, N, BN)


# ------------------------------------------------------------------------------------------------
# The block


@triton.jit
def _enter(x, squares, weight, scale, bias, taps, conv_bias, window, u, gate, rows, EPS: constexpr,
           K: constexpr, X: constexpr, D: constexpr, H: constexpr, X_FIRST: constexpr,
           BEFORE: constexpr, BLOCKS: constexpr, PARTS: constexpr, BM: constexpr, BN: constexpr,
           BK: constexpr, SWAP: constexpr, PDL: constexpr):
    """
    x -> u (rows, X), what the convolution makes of X of the outputs of in_proj; and
    gate (rows, D + H), silu of D of them, and H as they are. In the weights X comes first, or D.
    window: (rows, BEFORE, X), the X of the tokens before, updated in place.
    """
    if PDL and BM == 1:
        tl.extra.cuda.gdc_launch_dependents()
    OF_U: constexpr = (X + BN - 1) // BN    # programs; after them those of the gate, and of H
    OF_GATE: constexpr = (D + BN - 1) // BN
    block = tl.program_id(0)
    to_u, to_gate = block < OF_U, block < OF_U + OF_GATE
    block -= tl.where(to_u, 0, tl.where(to_gate, OF_U, OF_U + OF_GATE))
    d, r = block * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    in_d, in_x = d < tl.where(to_u, X, tl.where(to_gate, D, H)), d < tl.where(to_u, X, 0)
    in_y, in_u = (r < rows)[:, None] & in_d[None, :], (r < rows)[:, None] & in_x[None, :]
    at, before, taps_d = window + r[:, None] * (BEFORE * X) + d[None, :], (), ()
    conv_bias_d = 0.0
    if conv_bias is not None:
        conv_bias_d = _of_outputs(conv_bias, d, tl.where(to_u, X, 0))
    for k in tl.static_range(BEFORE + 1):
        tap = tl.load(taps + d * (BEFORE + 1) + k, mask=in_x, other=0)
        taps_d = taps_d + (tap.to(tl.float32)[None, :],)
        if k < BEFORE:
            before = before + (tl.load(at + k * X, mask=in_u, other=0),)
    if X_FIRST:
        first = tl.where(to_u, 0, tl.where(to_gate, X, X + D))
    else:
        first = tl.where(to_u, D, tl.where(to_gate, 0, D + X))
    n = tl.where(in_d, first + d, X + D + H)
    y = _product(x, squares, weight, scale, bias, None, rows, r, n, 0, EPS, K, X + D + H, BLOCKS,
                 PARTS, BM, BN, BK, SWAP, PDL)
    of_gate = r[:, None] * (D + H) + (tl.where(to_gate, 0, D) + d)[None, :]
    in_gate = in_y & (d >= tl.where(to_u, X, 0))[None, :]
    tl.store(gate + of_gate, tl.where(to_gate, _silu(y), y), mask=in_gate)
    tl.debug_barrier()              # all threads have read what is overwritten now
    inputs = before + (y.to(window.dtype.element_ty),)
    for k in tl.static_range(BEFORE):
        tl.store(at + k * X, inputs[k + 1], mask=in_u)
    new = y * taps_d[BEFORE] + conv_bias_d
    for k in tl.static_range(BEFORE):
        new += before[k].to(tl.float32) * taps_d[k]
    tl.store(u + r[:, None] * X + d[None, :], _silu(new).to(u.dtype.element_ty), mask=in_u)


@triton.jit
def _advance(parts, dt_proj, dt_bias, A_log, Dw, u, gate, h, y, rows, D: constexpr, N: constexpr,
             R: constexpr, PARTS: constexpr, BM: constexpr, BD: constexpr, BN: constexpr,
             BR: constexpr, PDL: constexpr):
    """One step of the scan for BD channels of BM texts: h (rows, D, N) in place, y (rows, D).
    parts: (PARTS, rows, R + 2 N), of which the sum is dt, B and C.  u, gate: (rows, D)."""
    r, d = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BD + tl.arange(0, BD)
    n, q = tl.arange(0, BN), tl.arange(0, BR)
    if PDL and BM == 1:
        tl.extra.cuda.gdc_launch_dependents()
    in_r, in_d, in_n, in_q = r < rows, d < D, n < N, q < R
    in_y, of_y = in_r[:, None] & in_d[None, :], r[:, None] * D + d[None, :]
    in_h, in_A = in_y[:, :, None] & in_n[None, None, :], in_d[:, None] & in_n[None, :]
    A_log_d = tl.load(A_log + d[:, None] * N + n[None, :], mask=in_A, other=0)
    A_2 = -tl.exp2(A_log_d.to(tl.float32) * LOG2E) * LOG2E
    in_w = in_d[:, None] & in_q[None, :]
    w = tl.load(dt_proj + d[:, None] * R + q[None, :], mask=in_w, other=0)
    bias_d, D_d = tl.load(dt_bias + d, mask=in_d, other=0), tl.load(Dw + d, mask=in_d, other=0)
    h += of_y.to(tl.int64)[:, :, None] * N + n[None, None, :]
    h_d = tl.load(h, mask=in_h, other=0)                                        # (BM, BD, BN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    u_d = tl.load(u + of_y, mask=in_y, other=0).to(tl.float32)
    gate_d = tl.load(gate + of_y, mask=in_y, other=0)
    in_dt, in_B = in_r[:, None] & in_q[None, :], in_r[:, None] & in_n[None, :]
    dt, B = tl.zeros((BM, BR), tl.float32), tl.zeros((BM, BN), tl.float32)
    C = tl.zeros((BM, BN), tl.float32)
    for i in tl.static_range(PARTS):
        part = parts + (i * rows + r)[:, None] * (R + 2 * N)
        dt += tl.load(part + q[None, :], mask=in_dt, other=0)
        B += tl.load(part + R + n[None, :], mask=in_B, other=0)
        C += tl.load(part + R + N + n[None, :], mask=in_B, other=0)
    if PDL and BM > 1:
        tl.extra.cuda.gdc_launch_dependents()
    if BM < 16:
        raw = tl.sum(w.to(tl.float32)[None, :, :] * dt[:, None, :], 2)          # (BM, BD)
    else:
        raw = tl.dot(dt.to(w.dtype), w.trans(), input_precision="ieee")
    delta = _softplus(raw + bias_d[None, :])
    h_d = tl.exp2(delta[:, :, None] * A_2[None, :, :]) * h_d
    h_d += (delta * u_d)[:, :, None] * B[:, None, :]
    tl.debug_barrier()              # all threads have read h
    tl.store(h, h_d, mask=in_h)
    y_d = tl.sum(h_d * C[:, None, :], 2) + D_d[None, :] * u_d
    tl.store(y + of_y, y_d * gate_d, mask=in_y)


@triton.jit
def _advance_heads(u, gate, dt_bias, A_log, Dw, norm, h, y, squares, rows, H: constexpr,
                   P: constexpr, N: constexpr, G: constexpr, LEAST: constexpr, MOST: constexpr,
                   BP: constexpr, BN: constexpr, PDL: constexpr):
    """
    One step of the scan for BP of the P channels of a head of one text: h (rows, H, P, N) in place,
    y (rows, H P).  u: (rows, H P + 2 G N), with B and C.  gate: (rows, H P + H), with delta before
    its softplus.  norm, squares: as in _keep.
    """
    CUTS: constexpr = (P + BP - 1) // BP
    D: constexpr = H * P
    head, r = tl.program_id(0) // CUTS, tl.program_id(1)
    p, n = tl.program_id(0) % CUTS * BP + tl.arange(0, BP), tl.arange(0, BN)
    d, in_p, in_n = head * P + p, p < P, n < N
    in_h = in_p[:, None] & in_n[None, :]
    A_2 = -tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E) * LOG2E
    bias, D_h = tl.load(dt_bias + head), tl.load(Dw + head)
    h += (r.to(tl.int64) * D + d)[:, None] * N + n[None, :]
    h_d = tl.load(h, mask=in_h, other=0)                                        # (BP, BN)
    if norm is not None:
        norm_d = tl.load(norm + d, mask=in_p, other=0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    u += r * (D + 2 * G * N)
    gate += r * (D + H)
    of_group = u + D + head // (H // G) * N + n
    B = tl.load(of_group, mask=in_n, other=0).to(tl.float32)
    C = tl.load(of_group + G * N, mask=in_n, other=0).to(tl.float32)
    u_d = tl.load(u + d, mask=in_p, other=0).to(tl.float32)
    gate_d = tl.load(gate + d, mask=in_p, other=0)
    delta = _softplus(tl.load(gate + D + head) + bias)
    delta = tl.minimum(tl.maximum(delta, LEAST), MOST)
    h_d = tl.exp2(delta * A_2) * h_d + (delta * u_d)[:, None] * B[None, :]
    tl.debug_barrier()              # all threads have read h
    tl.store(h, h_d, mask=in_h)
    y_d = (tl.sum(h_d * C[None, :], 1) + D_h * u_d) * gate_d
    if norm is not None:
        tl.store(squares + r * (H * CUTS) + tl.program_id(0), tl.sum(y_d * y_d, 0))
        y_d *= norm_d / DIVISOR
    tl.store(y + r * D + d, y_d.to(y.dtype.element_ty), mask=in_p)


@triton.jit
def _normed_pairs(x, weight, bias, i, N: constexpr, EPS: constexpr):
    """The numbers 2 i and the numbers 2 i + 1 of the norm of x (N,), and its bias."""
    there = i < N // 2
    one = tl.load(x + 2 * i, mask=there, other=0)
    other = tl.load(x + 2 * i + 1, mask=there, other=0)
    size = tl.rsqrt(tl.sum(one * one + other * other, 0) / N + EPS)
    one *= size * tl.load(weight + 2 * i, mask=there, other=0).to(tl.float32)
    other *= size * tl.load(weight + 2 * i + 1, mask=there, other=0).to(tl.float32)
    one += tl.load(bias + 2 * i, mask=there, other=0).to(tl.float32)
    other += tl.load(bias + 2 * i + 1, mask=there, other=0).to(tl.float32)
    return one, other


@triton.jit
def _advance_turned(made, dt_bias, B_weight, C_weight, B_bias, C_bias, Dw, theta, h, k, x, y,
                    H: constexpr, P: constexpr, N: constexpr, G: constexpr, S: constexpr,
                    LEAST: constexpr, MOST: constexpr, FLOOR: constexpr, EPS: constexpr,
                    BP: constexpr, BH: constexpr, PDL: constexpr):
    """
    One step of the scan of Mamba-3 for a head of a text, with the names of mamba3.py: theta (rows,
    H, S), h (rows, H, P, N), k (rows, H, N) and x (rows, H, P) in place, y (rows, H P).
    made: (rows, 2 H P + 2 G N + 3 H + S), what in_proj gives: z, x, B, C, dt, A, lam, angles.
    """
    head, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, n, i, of_head = tl.arange(0, BP), tl.arange(0, 2 * BH), tl.arange(0, BH), r * H + head
    h += (of_head * P + p[:, None]) * N + n[None, :]
    in_h = (p < P)[:, None] & (n < N)[None, :]
    k += of_head * N + n
    x += of_head * P + p
    theta += of_head * S + i
    h_d = tl.load(h, mask=in_h, other=0)                                        # (BP, BN)
    k_before, x_before = tl.load(k, mask=n < N, other=0), tl.load(x, mask=p < P, other=0)
    turned = tl.load(theta, mask=i < S, other=0) / CIRCLE
    bias, D_h = tl.load(dt_bias + head), tl.load(Dw + head)
    if PDL:
        tl.extra.cuda.gdc_wait()
    made += r * (2 * H * P + 2 * G * N + 3 * H + S)
    z = tl.load(made + head * P + p, mask=p < P, other=0)
    x_d = tl.load(made + (H + head) * P + p, mask=p < P, other=0)
    made += 2 * H * P
    B = made + head // (H // G) * N
    B_one, B_other = _normed_pairs(B, B_weight, B_bias + head * N, i, N, EPS)
    C_one, C_other = _normed_pairs(B + G * N, C_weight, C_bias + head * N, i, N, EPS)
    made += 2 * G * N + head
    delta = _softplus(tl.load(made) + bias)
    delta = tl.minimum(tl.maximum(delta, LEAST), MOST)
    raw, open = tl.load(made + H), tl.sigmoid(tl.load(made + 2 * H))
    rate = tl.maximum(_rate(raw), FLOOR)
    angles = tl.load(made - head + 3 * H + i, mask=i < S, other=0)
    turned += _tanh(angles) * delta / 2
    turned = (turned - tl.floor(turned)) * CIRCLE
    cos, sin = tl.cos(turned), tl.sin(turned)
    k_d = tl.interleave(B_one * cos - B_other * sin, B_one * sin + B_other * cos)
    q_d = tl.interleave(C_one * cos - C_other * sin, C_one * sin + C_other * cos)
    h_d += ((1 - open) * delta * x_before)[:, None] * k_before[None, :]
    h_d = tl.exp2(-delta * rate * LOG2E) * h_d
    h_d += (open * delta * x_d)[:, None] * k_d[None, :]
    tl.debug_barrier()              # all threads have read the state
    tl.store(h, h_d, mask=in_h)
    tl.store(k, k_d, mask=n < N)
    tl.store(x, x_d, mask=p < P)
    tl.store(theta, turned, mask=i < S)
    y_d = (tl.sum(h_d * q_d[None, :], 1) + D_h * x_d) * _silu(z)
    tl.store(y + of_head * P + p, y_d.to(y.dtype.element_ty), mask=p < P)


# ------------------------------------------------------------------------------------------------
# The model


def decodes(config):
    """Whether decode can run layers of this shape."""
    if config.d_intermediate > 0 or config.mixer_rms_eps > 0 or config.d_state > 256:
        return False
    if config.layer == "mamba2":
        return not config.rmsnorm or (config.ngroups == 1 and not config.norm_before_gate)
    if config.layer == "mamba3":
        fits = config.headdim * config.d_state <= 2 ** 15       # one program has all of a head
        return config.mimo_rank == 1 and config.n_angles > 0 and fits
    return config.layer == "mamba" and config.dt_rank + 2 * config.d_state <= 512


def decode(backbone, head, config, state, token):
    """
    The Mamba of mamba.py for the next token of each text: token (B,) -> logits (B, vocab_size),
    float32. token, contiguous, becomes the likeliest next one of each text. state, from
    Mamba.init_state, is updated in place. Weights: contiguous, in float32, bfloat16, float16 or as
    Int8Linear has them.
    """
    table, rows, eps = backbone["embedding"], len(token), backbone["norm_f"].eps
    scale = getattr(table, "scale", None)       # with int8
    weight = table.weight if scale is None else scale       # of the type of what is computed
    d_model, vocab_size, D = config.d_model, config.vocab_size, config.d_inner
    of_type = weight.new_empty
    by_bytes = takes_bytes(backbone["layers"], head, token)
    tiles_of = _tiles_of_bytes if by_bytes else functools.partial(_tiles, weight, rows)
    leave, to_logits = tiles_of(D, d_model), tiles_of(d_model, vocab_size)
    blocks = triton.cdiv(d_model, leave["BN"])
    pdl = PDL and token.is_cuda and torch.cuda.get_device_capability(token.device)[0] >= 9
    pdl = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    with torch.cuda.device_of(token):
        y, normed = of_type(rows, D), of_type(rows, d_model)
        logits = of_type(rows, vocab_size, dtype=torch.float32)
        squares = logits.new_empty(rows, blocks)
        x = (logits if config.residual_in_fp32 else y).new_empty(rows, d_model)
        layers = backbone["layers"]
        norms = [*(layer.norm.weight for layer in layers), backbone["norm_f"].weight]

        def project(tiles, x, squares_of_x, linear, before, norm, y, K, N):
            of_x = 1 if squares_of_x is None else squares_of_x.shape[1]
            kernel = bytes_triton.project if "W" in tiles else _project
            kernel[_grid(triton.cdiv(N, tiles["BN"]), rows, tiles)](
                x, squares_of_x, *_weights(linear), before, norm, y, normed, squares, rows, eps,
                K, N, of_x, **tiles, **pdl)
        advances, counts = _heads if config.layer == "mamba2" else _channels, None
        if groups := groups_triton.split(config, layers, y):
            advances, counts = functools.partial(groups_triton.channels, *groups), groups[1]
        mix = (_turned if config.layer == "mamba3" else _convolved)(
            config, project, tiles_of, normed, squares, eps, y, pdl, advances)
        _begin[blocks, rows](token, table.weight, scale, x, norms[0], normed, squares, counts, rows,
                             d_model, 0 if counts is None else counts.numel(), leave["BN"],
                             PDL=pdl["PDL"], num_warps=1)
        for layer, norm, of_layer in zip(layers, norms[1:], state):
            squares_of_y = mix(layer.mixer, of_layer)
            before, x = x, torch.empty_like(x)
            project(leave, y, squares_of_y, layer.mixer.out_proj, before, norm, x, D, d_model)
        project(to_logits, normed, squares, head, None, None, logits, d_model, vocab_size)
        _choose[(rows,)](logits, token, vocab_size, 8192, num_warps=16, **pdl)
    return logits


def _convolved(config, project, tiles_of, normed, squares, eps, y, pdl, advances):
    """For blocks of Mamba-1 and 2: mix(block, its state), which fills y, and returns the squares of
    the norm that out_proj is to do, or None. advances: _channels, or _heads, or what takes the
    place of _channels."""
    (rows, d_model), D = normed.shape, config.d_inner
    X, H = D, 0         # what goes through the convolution; Mamba-2's delta
    if config.layer == "mamba2":
        X, H = D + 2 * config.ngroups * config.d_state, config.nheads
    tiles = tiles_of(d_model, X + D + H)
    programs = sum(triton.cdiv(n, tiles["BN"]) for n in (X, D, H))
    u, gate = y.new_empty(rows, X), squares.new_empty(rows, D + H)
    advance = advances(config, project, u, gate, y, pdl)

    def mix(block, state):
        (window, h), conv = state, block.conv1d
        kernel = bytes_triton.enter if "W" in tiles else _enter
        kernel[_grid(programs, rows, tiles)](
            normed, squares, *_weights(block.in_proj), conv.weight, conv.bias, window, u, gate,
            rows, eps, d_model, X, D, H, H == 0, window.shape[1], squares.shape[1], **tiles, **pdl)
        return advance(block, h)
    return mix


def _turned(config, project, tiles_of, normed, squares, eps, y, pdl, _advances):
    """As _convolved, for blocks of Mamba-3."""
    (rows, d_model), (H, P, N) = normed.shape, (config.nheads, config.headdim, config.d_state)
    G, S, power = config.ngroups, config.n_angles, triton.next_power_of_2
    made = squares.new_empty(rows, 2 * H * P + 2 * G * N + 3 * H + S)
    tiles = tiles_of(d_model, made.shape[1])

    def mix(block, state):
        project(tiles, normed, squares, block.in_proj, None, None, made, d_model, made.shape[1])
        _advance_turned[H, rows](
            made, block.dt_bias, block.B_norm.weight, block.C_norm.weight, block.B_bias,
            block.C_bias, block.D, *state, y, H, P, N, G, S, *map(float, config.dt_limit),
            config.A_floor, eps, power(P), power(N // 2), num_warps=8, **pdl)
    return mix


def _channels(config, project, u, gate, y, pdl):
    """For blocks of Mamba-1: advance(block, h), which fills y from u and gate, and returns None,
    for there is no norm."""
    (D, N, R), power = (config.d_inner, config.d_state, config.dt_rank), triton.next_power_of_2
    rows, BN, BR = len(u), power(N), max(16, power(R))
    select, tiles = _tiles(u, rows, D, R + 2 * N, cut=True), _tiles_of_advance(rows, D, BN, BR)
    selected = gate.new_empty(select["PARTS"], rows, R + 2 * N)

    def advance(block, h):
        project(select, u, None, block.x_proj, None, None, selected, D, R + 2 * N)
        _advance[triton.cdiv(D, tiles["BD"]), triton.cdiv(rows, tiles["BM"])](
            selected, block.dt_proj.weight, block.dt_proj.bias, block.A_log, block.D, u, gate, h, y,
            rows, D, N, R, len(selected), BN=BN, BR=BR, **tiles, **pdl)
    return advance


def _heads(config, _project, u, gate, y, pdl):
    """As _channels, for blocks of Mamba-2: advance(block, h) returns the squares of the norm, if
    there is one; there is no x_proj."""
    (H, P, N), rows = (config.nheads, config.headdim, config.d_state), len(u)
    BP = min(triton.next_power_of_2(P), 16 if rows * H < 512 else 32)
    cuts = triton.cdiv(P, BP)
    squares = gate.new_empty(rows, H * cuts) if config.rmsnorm else None

    def advance(block, h):
        norm = block.norm.weight if config.rmsnorm else None
        _advance_heads[H * cuts, rows](
            u, gate, block.dt_bias, block.A_log, block.D, norm, h, y, squares, rows, H, P, N,
            config.ngroups, *map(float, config.dt_limit), BP, triton.next_power_of_2(N),
            num_warps=4, **pdl)
        return squares
    return advance


def linear(x, layer):
    """layer(x), x (B, L, in), contiguous, of a linear layer as decode has them, also with int8."""
    (K, N), rows = layer.weight.t().shape, x.shape[0] * x.shape[1]
    y, tiles = x.new_empty(*x.shape[:2], N), _tiles(x, rows, K, N)
    # many rows for each program: it has to make 16 bits of its weights for all of them
    if rows > 64 and N > 1024 and x.element_size() == 2:
        BM = 64 if N <= 4096 else 128
        tiles = {"BM": BM, "BN": 64, "BK": 64, "PARTS": 1, "SWAP": True, "num_warps": 4,
                 "num_stages": 4}
    grid = triton.cdiv(N, tiles["BN"]), triton.cdiv(rows, tiles["BM"])
    with torch.cuda.device_of(x):
        _project[grid](x, None, *_weights(layer), None, None, y, None, None, rows, 0.0, K, N, 1,
                       **tiles, PDL=False)
    return y


def _weights(linear):
    return linear.weight, getattr(linear, "scale", None), linear.bias


def _grid(programs, rows, tiles):
    return programs, triton.cdiv(rows, tiles.get("BM", 1)), tiles.get("PARTS", 1)


def takes_bytes(layers, head, token):
    """Whether bytes_triton.py makes the products with in_proj, out_proj and the head. x_proj is not
    among them: it has too few outputs to keep the GPU busy in this way."""
    linears = [head, *(block for layer in layers
                       for block in (layer.mixer.in_proj, layer.mixer.out_proj))]
    return (len(token) == 1 and PDL and token.is_cuda
            and all(linear.weight.dtype == torch.int8 and linear.weight.shape[1] % 16 == 0
                    and linear.weight.data_ptr() % 16 == 0 for linear in linears))


def _tiles_of_bytes(K, N):
    """How a program of bytes_triton.py works that makes N numbers of K: BN outputs, W warps, which
    other tiles do not have. As measured on an H200, with the sizes of mamba-130m to mamba-2.8b."""
    if N > 16 * K:      # the head
        BN, W = 8, 4
    elif N > K:
        BN, W = (8, 1) if K <= 1024 else (16, 4) if K <= 2048 else (32, 4)
    else:
        BN, W = 16 if K <= 4096 else 32, 8
    while BN > 8 and BN * K > 20480 * W:        # 160 registers of a lane are all its weights
        BN //= 2
    return {"BN": BN, "W": W, "num_warps": W}


def _tiles_of_advance(rows, D, BN, BR):
    """How a program of _advance works: BM texts, BD channels."""
    if rows == 1:
        channels = triton.next_power_of_2(D // 128)
        BM, BD, warps = 1, min(256, max(32, channels), 4096 // BN, 16384 // BR), 8
    elif rows <= 64:
        BM, BD, warps = 4, 16, 4
    else:
        BM, BD, warps = 16, max(16, min(32, 512 // BN)), 4 if BN <= 32 else 8
    return {"BM": BM, "BD": BD, "num_warps": warps}


def _tiles(x, rows, K, N, cut=False):
    """
    How a program of _product works that makes N numbers of K: BM texts, BN outputs, BK inputs at
    once; and into how many PARTS the sums are cut, if they may be. SWAP: the outputs are the rows
    of the product on the tensor cores, which takes 64 of them at least. As measured on an H200,
    with the sizes of mamba-130m for 1, 64 and 256 texts, and those of mamba-2.8b for 1 and 16.
    """
    power, parts, is_head = triton.next_power_of_2, 1, N > 16 * K
    if rows == 1:
        least = {BK: triton.cdiv(K, BK) * BK for BK in (1024, 512, 256)}
        BM, BK = 1, min(least, key=least.get) if K > 128 else max(16, power(K))
        # a program has all its weights in registers; and each multiprocessor should have one
        BN = 8 if is_head else 4
        while BN > 1 and (BN * K * x.element_size() > 40 * 1024 or N < 128 * BN):
            BN //= 2
    elif x.dtype == torch.float32:      # not by the tensor cores
        BM, BN, BK = min(32, max(16, power(rows))), 32, 32
    else:
        programs = lambda: triton.cdiv(N, BN) * triton.cdiv(rows, BM)
        few = 16 if rows <= 64 else 32
        BM = min(128 if is_head else 64, max(16, power(rows)))
        BN = 128 if BM == 128 else 64
        if N < K // 4:
            BM, BN = min(BM, few), 16
        while BN == 64 and BM > few and programs() < 128:
            BM //= 2
        BN, BK = BN if programs() >= 40 else 16, 64 if N > K and BM > 16 else 128
        while cut and K >= 1536 * parts and K % (2 * parts * BK) == 0:
            parts *= 2
    stages = max(2, min(5, 100 * 1024 // ((BM + BN) * BK * x.element_size())))
    return {"BM": BM, "BN": BN, "BK": BK, "PARTS": parts, "SWAP": BN >= 64 and BM > 1,
            "num_warps": 8 if BM * BN > 64 * 64 else 4, "num_stages": stages}
