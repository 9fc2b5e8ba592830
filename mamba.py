"""
Mamba, the selective state space language model (S6, arXiv 2312.00752), in one file. Needs torch and nothing else.

What is notable here:
- the selective scan twice: as the paper's plain loop, and chunked, which trains fast on any device and keeps memory small
  (and a third time, short, for torch.compile on a CPU)
- the decay over a stretch is always exp(A * sum of delta), never a quotient of products: nothing overflows at any length
- activations stay (batch, length, channels) from the embedding to the logits: no tensor is transposed in memory
- a state makes every call continue where the last one ended: constant time and memory per generated token
- parameter names are those of the released state-spaces/mamba-* weights, which Mamba.from_pretrained loads (a download
  needs the packages requests and tqdm, nothing else does) and save_pretrained writes

Glossary, with the paper's names:
    B (size)      batch                                L       length of the sequence
    d_model       width of the residual stream         D       d_inner = expand * d_model, channels of the scan
    N             d_state, numbers remembered for each channel
    dt_rank       rank of the projection that makes delta
    u             input of the scan, (B, L, D)         z       gate, (B, L, D)
    delta         step size, (B, L, D): large = take in this token and forget, near 0 = skip it
    A             (D, N), negative: rate of forgetting; the decay of one step is exp(delta * A)
    B, C          (B, L, N): what each token writes to the state, and what it reads from it
    D             (D,): weight of the direct path from u to y
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import re
import struct
import sys
import tempfile
import time
import weakref
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

try:
    import scan_triton as _scan_triton
except ImportError:     # this file works alone; the kernels beside it, where there is Triton, make it faster on CUDA
    _scan_triton = None

# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class MambaConfig:
    """Shape of a model; the defaults are mamba-130m. A bad value is a ValueError at construction."""
    vocab_size: int = 50277
    d_model: int = 768
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4                     # width of the causal convolution in front of the scan
    expand: int = 2                     # d_inner = expand * d_model
    dt_rank: int | str = "auto"         # "auto" is ceil(d_model / 16)
    dt_min: float = 0.001               # at initialisation delta lies in [dt_min, dt_max] ...
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4         # ... and never below this
    conv_bias: bool = True
    bias: bool = False                  # biases in in_proj and out_proj
    dropout: float = 0.0                # on the embedding, and on what enters and leaves each mixer
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8    # rows of the embedding are rounded up to this, for the matrix units
    d_intermediate: int = 0             # > 0 adds a gated MLP of this width after each mixer
    scan: str = "auto"                  # method of selective_scan

    def __post_init__(self):
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)
        for name in ("vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand", "dt_rank", "pad_vocab_size_multiple"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.d_intermediate, int) or self.d_intermediate < 0:
            raise ValueError(f"d_intermediate must be a whole number of at least 0, not {self.d_intermediate!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"need 0 < dt_min <= dt_max, not {self.dt_min!r} and {self.dt_max!r}")
        if not (self.dt_init_floor > 0 and self.norm_eps > 0):
            raise ValueError("dt_init_floor and norm_eps must be above 0")
        if self.scan not in SCAN_METHODS:
            raise ValueError(f"scan must be one of {', '.join(SCAN_METHODS)}, not {self.scan!r}")

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def padded_vocab_size(self):
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


# ---------------------------------------------------------------------------------------------------------------------
# The selective scan


SCAN_METHODS = ("auto", "sequential", "chunked", "triton")


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None,
                   return_last_state=False, method="auto"):
    """
    The recurrence at the heart of Mamba (paper, section 3.2 and Algorithm 2; zero-order hold for A, Euler for B):

        delta_t = softplus(delta_t + delta_bias)                  if delta_softplus
        h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t        h_0 = state, or zeros
        y_t     = (C_t . h_t + D u_t) * silu(z_t)                 D and z are optional

    u, delta, z: (B, L, D).  A: (D, N).  B, C: (B, L, N).  D, delta_bias: (D,).  state: (B, D, N).
    Returns y (B, L, D) in the type of u, or (y, last_state) with last_state (B, D, N) in float32, so that
    scan(x) equals scan(x[:, :k]) followed by scan(x[:, k:]) with that state. Computes in float32 (float64 if u is
    float64) whatever the inputs are. Differentiable in every tensor, once.
    method: "sequential" | "chunked" | "triton" (scan_triton.py, on CUDA) | "auto": triton where it runs, else chunked; a
    single step is one step. In what torch.compile compiles, chunked is compiled too where compiles_well.
    ValueError on shapes that do not fit, and for a method that cannot run.
    Names and meaning follow mamba_ssm's selective_scan_fn; the layout is (B, L, D) throughout.
    """
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"u must be (B, L, D) and A (D, N), not {tuple(u.shape)} and {tuple(A.shape)}")
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    for name, tensor, shape in (("delta", delta, (batch, length, d_inner)), ("A", A, (d_inner, d_state)),
                                ("B", B, (batch, length, d_state)), ("C", C, (batch, length, d_state)),
                                ("D", D, (d_inner,)), ("z", z, (batch, length, d_inner)),
                                ("delta_bias", delta_bias, (d_inner,)), ("state", state, (batch, d_inner, d_state))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit u {tuple(u.shape)}, not {tuple(tensor.shape)}")
    if length == 0:
        raise ValueError("the sequence is empty: u must have at least one step")
    if method not in SCAN_METHODS:
        raise ValueError(f"method must be one of {', '.join(SCAN_METHODS)}, not {method!r}")

    if state is None:
        state = u.new_zeros(batch, d_inner, d_state, dtype=_at_least_float32(u))
    method = "sequential" if method == "auto" and length == 1 else scan_method(method, u, d_state)
    scan = {"sequential": selective_scan_sequential, "chunked": selective_scan_chunked, "triton": _selective_scan_triton}[method]
    if method == "chunked" and torch.compiler.is_compiling() and compiles_well(u.device, d_state):
        scan = functools.partial(selective_scan_sequential, recurrence=_recurrence_compiled)
    with torch.autocast(u.device.type, enabled=False):  # autocast would run the products below in 16 bits
        y, last_state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state)
    return (y, last_state) if return_last_state else y


def scan_method(method, u, d_state):
    """The method that selective_scan uses for a sequence on the device and of the type of u: what "auto" stands for."""
    able = (_scan_triton is not None and u.device.type == "cuda" and _scan_triton.runs_on(u.device)
            and u.dtype != torch.float64 and d_state <= 256)
    if method == "triton" and not able:
        raise ValueError("scan 'triton' needs CUDA on Ampere or later, Triton 3.6 (it comes with torch 2.11), scan_triton.py "
                         "beside mamba.py, a d_state of at most 256 and no float64; 'auto' takes the best there is")
    return method if method != "auto" else "triton" if able else "chunked"


def _selective_scan_triton(*inputs):
    return _scan_triton.selective_scan_triton(*inputs)


def _at_least_float32(x):
    return torch.promote_types(x.dtype, torch.float32)


def _recurrence(u, delta, A, B, C, h):
    ys = []
    # unbind, not x[:, t]: each indexing would make a full-size gradient, and the backward pass quadratic in L
    for u_t, delta_t, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(delta_t[:, :, None] * A)                              # (B, D, N)
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]           # (B, D, N)
        ys.append((h * C_t[:, None, :]).sum(-1))                                # (B, D)
    return torch.stack(ys, dim=1), h                                            # (B, L, D), (B, D, N)


def selective_scan_sequential(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, recurrence=_recurrence):
    """Algorithm 2 as written: one step after the other. The reference; arguments as in selective_scan."""
    dtype_in = u.dtype
    u, delta, A, B, C, h = (t.to(_at_least_float32(u)) for t in (u, delta, A, B, C, state))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    y, h = recurrence(u, delta, A, B, C, h)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(dtype_in), h


@torch.compiler.disable
def selective_scan_chunked(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state):
    """The same function as selective_scan_sequential, in tiles that fit the cache and with a backward of its own."""
    (batch, _, d_inner), d_state = u.shape, A.shape[1]
    if u.device.type == "cpu" and 2 / 3 * 2 ** 15 < batch * d_inner * d_state <= 2 ** 15:
        # PyTorch runs a call of up to 2^15 numbers on one thread; one more row in each state, all zero, wakes the others
        more = 2 ** 15 // (batch * d_inner) + 1 - d_state
        A, B, C, state = (F.pad(t, (0, more)) for t in (A, B, C, state))
    inputs = (u, delta, A, B, C, D, z, delta_bias, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, last_state = ChunkedScan.apply(keep, delta_softplus, *inputs)
    return y, last_state[:, :, :d_state]


class ChunkedScan(torch.autograd.Function):
    """
    The scan tile by tile. The states of all steps, (B, L, N, D), are 2N times larger than the input and are never in
    memory at once: the buffers a, h and g hold the steps of one tile and are used again for the next, so they stay in
    the cache. Only the state at the start of each tile is kept; the backward pass computes those inside it again.

        forward, per tile      a_t = exp(delta_t A)        h_t = a_t h_{t-1} + x_t B_t      y_t = C_t . h_t
        backward, in reverse   g_t = C_t gy_t + a_{t+1} g_{t+1}                             (g_t is dLoss/dh_t)
                               gC_t = h_t . gy_t    gB_t = g_t . x_t    gx_t = B_t . g_t    (x = delta u)
                               dLoss/d(delta_t A) = g_t a_t h_{t-1}, which gives delta's gradient and A's

    The state is (N, D) inside, channels innermost: both outer products and both sums over N read it in order.
    What costs N times less (softplus, gate, D) is done for a stretch of many tiles at once, so that it costs few calls.
    On a GPU a call costs more than its arithmetic, so there the tiles of a stretch are rows of one batch: a first pass
    from zero states finds what each tile adds, _carried what enters each, and the second pass starts from that.
    """

    @staticmethod
    def forward(ctx, keep, softplus, u, delta, A, B, C, D, z, delta_bias, state):
        A_t = A.t().to(_at_least_float32(u)).contiguous()                       # (N, D)
        batch, y, starts = len(u), torch.empty_like(u, memory_format=torch.contiguous_format), []
        state = state.transpose(1, 2).to(A_t.dtype)                             # (B, N, D), before the next tile
        with torch.inference_mode():    # a call costs a fifth less than without gradients alone
            for steps, tile in _stretches(u, A_t, "ah"):
                s = _inputs_of(steps, tile, u, delta, A_t, B, C, z, delta_bias, softplus)
                y_s = torch.empty_like(s.x)                                     # (tiles, B, T, D)
                for delta_n, x_n, B_n, C_n, y_n in _passes(tile, s.delta, s.x, s.B, s.C, y_s):
                    start = state
                    if tile.at_once > 1:
                        _states(tile, s, delta_n, x_n, B_n, torch.zeros_like(tile.h_steps[0]))
                        start = _carried(state, _decay(tile, delta_n, A_t), tile.h_steps[-1])
                    _states(tile, s, delta_n, x_n, B_n, start)
                    torch.bmm(C_n, tile.h, out=y_n)
                    state = tile.h_steps[-1][-batch:].clone()
                    if keep:
                        starts.append(start)
                if D is not None:
                    y_s.addcmul_(s.u, D.to(y_s.dtype))
                torch.mul(y_s, 1 if z is None else F.silu(s.z), out=_in_tiles(y, steps, tile))
        ctx.softplus, ctx.starts = softplus, starts
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias)
        return y, state.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):
        # made out here: what is made in inference mode can never be changed outside, as a gradient may be
        grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
                 for t in (*ctx.saved_tensors, glast)]
        with torch.autocast(gy.device.type, enabled=False), torch.inference_mode():
            ChunkedScan._backward(ctx, gy, glast, *grads)
        return None, None, *grads

    @staticmethod
    def _backward(ctx, gy, glast, gu, gdelta, gA, gB, gC, gD, gz, gbias, gstate):
        u, delta, A, B, C, D, z, delta_bias = ctx.saved_tensors
        A_t, batch = A.t().to(_at_least_float32(u)).contiguous(), len(u)        # (N, D)
        stretches, starts = _stretches(u, A_t, "ahg"), list(ctx.starts)
        sum_A = torch.zeros_like(stretches[0][1].a)         # (rows * T, N, D), summed at the end
        sum_D, sum_bias = A_t.new_zeros(2, len(A))
        carry = glast.transpose(1, 2).to(A_t.dtype)         # (B, N, D): a_{t+1} g_{t+1} for the last step of the next tile
        for steps, tile in reversed(stretches):
            s = _inputs_of(steps, tile, u, delta, A_t, B, C, z, delta_bias, ctx.softplus)
            gout = _in_tiles(gy, steps, tile).to(A_t.dtype)
            gy_s, y_s, gx, gd, gB_s, gC_s = (torch.empty_like(t) for t in (s.x, s.x, s.x, s.x, s.B, s.C))
            torch.mul(gout, 1 if z is None else F.silu(s.z), out=gy_s)          # (tiles, B, T, D)
            a, h, g, first = tile.a, tile.h, tile.g, tile.a_steps[0]            # (rows * T, N, D), and (rows, N, D)
            a_later, h_earlier = (t.unflatten(0, (-1, tile.steps)) for t in (a, h))
            a_later, h_earlier, ones = a_later[:, 1:], h_earlier[:, :-1], A_t.new_ones(len(a), 1, len(A_t))
            for delta_n, x_n, B_n, C_n, gy_n, y_n, gx_n, gd_n, gB_n, gC_n in reversed(_passes(
                    tile, s.delta, s.x, s.B, s.C, gy_s, y_s, gx, gd, gB_s, gC_s)):
                start, entering = starts.pop(), carry
                _states(tile, s, delta_n, x_n, B_n, start)
                if tile.at_once > 1:
                    _adjoints(tile, gy_n, C_n, torch.zeros_like(start))
                    entering = _carried(carry, _decay(tile, delta_n, A_t), first * tile.g_steps[0], backward=True)
                _adjoints(tile, gy_n, C_n, entering)
                if z is not None:
                    torch.bmm(C_n, h, out=y_n)
                torch.bmm(B_n, g, out=gx_n)
                # a row times a transposed matrix: a third of the time of the matrix times a column
                torch.bmm(gy_n, h.transpose(1, 2), out=gC_n)
                torch.bmm(x_n, g.transpose(1, 2), out=gB_n)
                a.mul_(g)
                carry = first[:batch].clone()
                first.mul_(start)
                a_later.mul_(h_earlier)                                         # now a is dLoss/d(delta A)
                sum_A[:len(a)].addcmul_(a, delta_n)
                torch.bmm(ones, a.mul_(A_t), out=gd_n)
            gd.addcmul_(gx, s.u)
            if ctx.softplus:
                gd.mul_(torch.expm1(-s.delta).neg_())                           # sigmoid, from the softplus itself
            if delta_bias is not None:
                sum_bias += gd.sum((0, 1, 2))
            gu_s, gz_s = gx.mul_(s.delta), None
            if D is not None:
                sum_D += (gy_s * s.u).sum((0, 1, 2))
                gu_s.addcmul_(gy_s, D.to(A_t.dtype))
            if z is not None:
                if D is not None:
                    y_s.addcmul_(s.u, D.to(A_t.dtype))
                gz_s = torch.ops.aten.silu_backward(y_s.mul_(gout), s.z)
            for grad, grad_s in ((gu, gu_s), (gdelta, gd), (gB, gB_s), (gC, gC_s), (gz, gz_s)):
                if grad is not None:
                    _in_tiles(grad, steps, tile).copy_(grad_s)
        for grad, total in ((gA, sum_A.sum(0).t()), (gD, sum_D), (gbias, sum_bias), (gstate, carry.transpose(1, 2))):
            if grad is not None:
                grad.copy_(total)


def _tile_shape(u, A_t):
    """Steps in a tile, tiles in a stretch, and tiles computed at once, as suits the device and the sizes."""
    length, size = u.shape[1], len(u) * A_t.numel()         # size: numbers in the states of one step
    if u.device.type == "cpu":
        # 2 MB a buffer, which stays in the cache; of a length that is a power of two too, nothing is left over
        steps = min(2 ** max(2, min(6, round(math.log2(2 ** 19 / size)))), length)
        return SimpleNamespace(steps=steps, in_stretch=8, at_once=1)
    steps = min(32, length)                                 # at most 256 MB a buffer
    tiles = max(1, min(2 ** 26 // (size * steps), length // steps))
    return SimpleNamespace(steps=steps, in_stretch=tiles, at_once=tiles)


def _stretches(u, A_t, names):
    """
    How the sequence is cut: a list of (steps, tile), a slice of whole tiles each. What is left over is one shorter tile.
    A tile holds buffers of these names, (rows * T, N, D), and their views step by step, (rows, N, D); rows = B * the tiles
    at once.
    """
    (batch, length, _), shape, stretches, tile = u.shape, _tile_shape(u, A_t), [], None
    whole = length - length % shape.steps
    most = shape.steps * (shape.in_stretch if shape.at_once == 1 else shape.at_once)
    cuts = [(start, min(start + most, whole), shape.steps) for start in range(0, whole, most)]
    if whole < length:
        cuts.append((whole, length, length - whole))
    buffers = A_t.new_empty(len(names), batch * shape.at_once * shape.steps * A_t.numel())
    for start, stop, steps in cuts:
        at_once = min(shape.at_once, (stop - start) // steps)
        if tile is None or (tile.steps, tile.at_once) != (steps, at_once):
            tile = SimpleNamespace(steps=steps, at_once=at_once)
            for name, buffer in zip(names, buffers):
                x = buffer[:batch * at_once * steps * A_t.numel()].view(-1, *A_t.shape)
                vars(tile).update({name: x, f"{name}_steps": x.unflatten(0, (-1, steps)).unbind(1)})
        stretches.append((slice(start, stop), tile))
    return stretches


def _in_tiles(x, steps, tile):
    """These steps of x (B, L, X), as a view (tiles, B, T, X)."""
    return x[:, steps].unflatten(1, (-1, tile.steps)).transpose(0, 1)


def _passes(tile, *tensors):
    """(tiles, B, T, X) each -> a list that has (rows * T, 1, X) of each, for the tiles that are computed at once."""
    return list(zip(*(t.view(-1, len(tile.a), 1, t.shape[3]).unbind() for t in tensors)))


def _inputs_of(steps, tile, u, delta, A_t, B, C, z, delta_bias, softplus):
    """The inputs of one stretch in the scan's own type, (tiles, B, T, X), with delta finished and x = delta u."""
    u, *inputs = (_in_tiles(t, steps, tile).to(A_t.dtype) for t in (u, delta, B, C))
    delta, B, C = (t.contiguous() for t in inputs)
    if delta_bias is not None:
        delta = delta + delta_bias.to(A_t.dtype)
    if softplus:
        delta = F.softplus(delta)
    # On a CPU exp is some 100 times slower where the result is denormal (below -87), and so are products with it.
    # exp(-64) is 0 to any sum in float32, and its products with numbers of usual size are not denormal.
    clamp = u.device.type == "cpu" and bool(delta.amax() * A_t.amin() < -64)
    z = None if z is None else _in_tiles(z, steps, tile).to(A_t.dtype)
    # exp(delta A) is computed as 2^(delta A / ln 2): exp2 is up to 4 times faster than exp
    return SimpleNamespace(u=u, z=z, delta=delta, x=delta * u, B=B, C=C, clamp=clamp, A_2=A_t / math.log(2))


def _states(tile, s, delta, x, B, start):
    """The decays and the states of some tiles into the buffers a and h; start (rows, N, D) enters them."""
    torch.mul(delta, s.A_2, out=tile.a)
    if s.clamp:
        tile.a.clamp_(min=-64 / math.log(2))
    tile.a.exp2_()
    torch.mul(x, B.transpose(1, 2), out=tile.h)
    for a_t, h_t in zip(tile.a_steps, tile.h_steps):
        start = h_t.addcmul_(a_t, start)


def _adjoints(tile, gy, C, entering):
    """dLoss/dh of some tiles into the buffer g; entering (rows, N, D) comes from the tiles after them."""
    torch.mul(gy, C.transpose(1, 2), out=tile.g)
    later = tile.g_steps[-1].add_(entering)
    for a_t, g_t in zip(tile.a_steps[:0:-1], tile.g_steps[-2::-1]):
        later = g_t.addcmul_(a_t, later)


def _decay(tile, delta, A_t):
    """How much of a state is left after each tile, (rows, N, D): exp of a sum, never a product or a quotient."""
    return torch.exp(delta.unflatten(0, (-1, tile.steps)).sum(1) * A_t)


def _carried(first, decay, ends, backward=False):
    """What enters each of the tiles, (rows, N, D), if `first` (B, N, D) enters the first and each adds what is in ends."""
    decay, ends = (t.unflatten(0, (-1, len(first))) for t in (decay, ends))
    entering, order = [first], list(range(len(ends)))
    for k in order[:0:-1] if backward else order[:-1]:
        entering.append(torch.addcmul(ends[k], decay[k], entering[-1]))
    return torch.cat(entering[::-1] if backward else entering)


# ---------------------------------------------------------------------------------------------------------------------
# The scan in a model that torch.compile compiles, on a CPU


STRETCH, TILE = 64, 8   # steps that are one call, and those of them that are one loop
SINCE_2_8 = hasattr(torch.compiler, "nested_compile_region")    # the version of torch


def compiles_well(device, d_state):
    """Whether torch.compile on a model also compiles its scan: on a CPU, from torch 2.8 on, if a state fills whole vectors."""
    return device.type == "cpu" and d_state % 8 == 0 and SINCE_2_8


def _recurrence_compiled(u, delta, A, B, C, h):
    """What _recurrence computes. The rest of selective_scan_sequential, gradients too, is left to the compiler of the model."""
    length = u.shape[1]
    # B and C may be parts of one tensor, which the compiler does not take; a step with delta 0 leaves the state as it is
    inputs = [delta.contiguous(), u.contiguous(), *(t.clone(memory_format=torch.contiguous_format) for t in (B, C))]
    if length % STRETCH:
        inputs = [F.pad(t, (0, 0, 0, -length % STRETCH)) for t in inputs]
    y, h = _in_stretches(*inputs, A, h)
    return y[:, :length], h


@torch.compiler.disable
def _in_stretches(*inputs):
    return CompiledScan.apply(*inputs)


class CompiledScan(torch.autograd.Function):
    """
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t . h_t, with tiles as in ChunkedScan, but in the forward pass the
    states of a tile are never in memory: its steps are written out one after the other, and the compiler makes one loop over
    batch and channels of them, with the state in registers. It is (D, N) here, for the sum over n to be in that loop.
    delta, u: (B, L, D), L a multiple of STRETCH.  B, C: (B, L, N).  A: (D, N).  state: (B, D, N).
    """

    @staticmethod
    def forward(ctx, delta, u, B, C, A, state):
        y, ctx.starts = torch.empty_like(u), []
        A, state = A.detach(), state.detach()   # without the marks of a graph before that their sizes may change
        for *inputs, y_s in zip(*(t.split(STRETCH, dim=1) for t in (delta, u, B, C, y))):
            result, state, starts = _compiled(_stretch)(*inputs, A, state)
            y_s.copy_(result)
            if any(ctx.needs_input_grad):
                ctx.starts.append(starts)
        ctx.save_for_backward(delta, u, B, C, A)
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, g):
        *inputs, A = ctx.saved_tensors
        g = g.detach().contiguous()
        grads, gA = [torch.empty_like(t) for t in inputs], torch.zeros_like(g)
        stretches = zip(*(t.split(STRETCH, dim=1) for t in (*inputs, gy.contiguous(), *grads)), ctx.starts)
        for *inputs_s, gdelta, gu, gB, gC, starts in reversed(list(stretches)):
            *results, g, gA = _compiled(_stretch_backward)(*inputs_s, starts, A, g, gA)
            torch._foreach_copy_([gdelta, gu, gB, gC], results)
        return *grads, gA.sum(0), g


@functools.cache
def _compiled(function):
    # the usual limit of the size of a loop would cut the steps of a tile apart
    return torch.compile(function, dynamic=False, options={"max_fusion_size": 4096, "size_asserts": False})


def _stretch(delta, u, B, C, A, h):
    """y of a stretch, the state after it, and the state before every second of its tiles."""
    ys, starts = [], []
    for i, tile in enumerate(zip(*(t.split(TILE, dim=1) for t in (delta, u, B, C)))):
        if i % 2 == 0:
            starts.append(h)
        y, h = _tile(*tile, A, h)
        ys.append(y)
    return torch.cat(ys, dim=1), h, starts


def _stretch_backward(delta, u, B, C, gy, starts, A, g, gA):
    """The gradients of delta, u, B and C, what of dLoss/dh goes to the stretch before, and the gradient of A so far."""
    tiles, results = list(zip(*(t.split(TILE, dim=1) for t in (delta, u, B, C, gy)))), []
    for first, second, h in reversed(list(zip(tiles[::2], tiles[1::2], starts))):
        for tile, start in ((second, _tile_end(*first[:3], A, h)), (first, h)):
            *result, g, gA = _tile_backward(*tile, A, start, g, gA)
            results.insert(0, result)
    gdelta, gx, gB, gC = (torch.cat(t, dim=1) for t in zip(*results))
    return gdelta + gx * u, gx * delta, gB, gC, g, gA


def _step(delta_t, u_t, B_t, A, h):
    """The decay of a step, and the state after it. The clamp: see _inputs_of."""
    decay = torch.exp2((delta_t[:, :, None] * (A / math.log(2))).clamp(min=-64 / math.log(2)))     # (B, D, N)
    return decay, decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None]


def _steps(*tensors):
    return list(zip(*(t.unbind(1) for t in tensors)))


# what it decorates is compiled once, however often it is called
_nested = torch.compiler.nested_compile_region if SINCE_2_8 else lambda function: function


@_nested
def _tile(delta, u, B, C, A, h):
    """y (B, TILE, D) of a tile, and the state after it."""
    ys = []
    for *inputs, C_t in _steps(delta, u, B, C):
        h = _step(*inputs, A, h)[1]
        ys.append((h * C_t[:, None]).sum(-1))
    return torch.stack(ys, dim=1), h


@_nested
def _tile_end(delta, u, B, A, h):
    """The state after a tile alone, for the backward pass."""
    for inputs in _steps(delta, u, B):
        h = _step(*inputs, A, h)[1]
    return h


@_nested
def _tile_backward(delta, u, B, C, gy, A, h, g, gA):
    """As _stretch_backward, but with gx for gu, and only what goes through A for gdelta. The names are ChunkedScan's."""
    before, decays, grads, gA_here = [], [], [], 0
    for inputs in _steps(delta, u, B):
        before.append(h)
        decay, h = _step(*inputs, A, h)
        decays.append(decay)
    after = [*before[1:], h]
    for (delta_t, u_t, B_t, C_t, gy_t), decay, h0, h in reversed(list(zip(_steps(delta, u, B, C, gy), decays, before, after))):
        g = g + gy_t[:, :, None] * C_t[:, None]                                 # dLoss/dh_t
        gx, gB, gC = (g * B_t[:, None]).sum(-1), (g * (delta_t * u_t)[:, :, None]).sum(1), (h * gy_t[:, :, None]).sum(1)
        g = g * decay
        gdelta_A = g * h0
        gA_here = gA_here + gdelta_A * delta_t[:, :, None]
        grads.insert(0, ((gdelta_A * A).sum(-1), gx, gB, gC))
    return *(torch.stack(t, dim=1) for t in zip(*grads)), g, gA + gA_here


# ---------------------------------------------------------------------------------------------------------------------
# The block


def linear(x, weight, bias=None):
    """
    F.linear, and for many float32 rows on an AMD CPU with AVX-512 the same at twice the speed: as a convolution of width 1, which
    PyTorch leaves to oneDNN. It leaves matrix products to MKL, which does without AVX-512 on CPUs that are not Intel's.
    """
    rows = x.numel() // x.shape[-1]
    if not MKL_IS_SLOW or rows < 512 or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    image = x.reshape(1, 1, rows, -1).permute(0, 3, 1, 2)                       # (1, in, 1, rows), still row by row in memory
    return F.conv2d(image, weight[..., None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _mkl_is_slow():
    about, cpuinfo = platform.processor(), Path("/proc/cpuinfo")    # Windows names the maker in the one, Linux in the other
    if cpuinfo.exists():
        with open(cpuinfo) as file:
            about += file.read(1024)
    return ("AuthenticAMD" in about and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available())


MKL_IS_SLOW = _mkl_is_slow()


@functools.cache
def _has_amx():
    return getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)    # of torch 2.13


class Linear(nn.Linear):
    """nn.Linear, by the function above."""

    def forward(self, x, halves=False):
        """With halves: y.chunk(2, dim=-1) as two products, whose gradients need not be put together in memory."""
        if not halves:
            return linear(x, self.weight, self.bias)
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        return [linear(x, weight, bias) for weight, bias in zip(self.weight.chunk(2), biases)]


class MambaBlock(nn.Module):
    """
    The mixer (paper, figure 3): project up, short causal convolution, selective scan, gate, project down.

    block(x) -> y, both (B, L, d_model). Stands alone: put it where a Transformer has attention.
    With state = block.init_state(batch), block(x, state) continues where the last call ended and updates the state in
    place; gradients do not flow through a state from one call to the next.
    """

    def __init__(self, config: MambaConfig):
        super().__init__()
        d_inner, self.dt_rank, self.d_state, self.scan = config.d_inner, config.dt_rank, config.d_state, config.scan
        self.in_proj = Linear(config.d_model, 2 * d_inner, bias=config.bias)
        # holds the weights under their released names; the convolution itself is in causal_conv
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias)
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, self.d_state + 1, dtype=torch.float32)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = Linear(d_inner, config.d_model, bias=config.bias)

        # the steps delta start log-uniform in [dt_min, dt_max]: the bias is the inverse of softplus at such a draw
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank ** -0.5, self.dt_rank ** -0.5)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(d_inner) * (high - low) + low).clamp(min=config.dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def init_state(self, batch):
        """The state before the first token: the convolution's last inputs (batch, d_conv - 1, D), and h (batch, D, N)."""
        weight, d_inner = self.conv1d.weight, self.conv1d.weight.shape[0]
        return (torch.zeros(batch, weight.shape[2] - 1, d_inner, dtype=weight.dtype, device=weight.device),
                torch.zeros(batch, d_inner, self.d_state, dtype=self.A_log.dtype, device=weight.device))

    def forward(self, x, state=None):
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            return self.decoder(*state)(x[:, 0])[:, None]
        conv_state, h = (None, None) if state is None else (t.clone() if torch.is_grad_enabled() else t for t in state)
        halves = self.training and type(self.in_proj) is Linear         # and nothing that was put in its place
        x, z = self.in_proj(x, halves=True) if halves else self.in_proj(x).chunk(2, dim=-1)     # (B, L, D) each
        x, conv_state = conv_silu(x, self.conv1d.weight, self.conv1d.bias, conv_state, self.scan)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = linear(dt, self.dt_proj.weight)             # (B, L, D); its bias is added inside the scan, in float32
        A = -torch.exp(self.A_log)                                              # (D, N)
        y, h = selective_scan(x, delta, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True, state=h,
                              return_last_state=True, method=self.scan)
        if state is not None:
            state[0].copy_(conv_state.detach())
            state[1].copy_(h.detach())
        return self.out_proj(y)

    def decoder(self, conv_state, h, ready=lambda module: module):
        """
        step(x) -> y, both (B, d_model): forward for the next token, in few calls, which is what a generated token costs.
        It updates conv_state and h; what is the same for all tokens is computed here, once. ready: see the function _ready.
        """
        in_proj, x_proj, out_proj = ready(self.in_proj), ready(self.x_proj), ready(self.out_proj)
        taps, bias = self.conv1d.weight[:, 0].t().contiguous(), self.conv1d.bias    # (d_conv, D)
        A_2 = -torch.exp(self.A_log) / math.log(2)      # exp(delta A) = 2^(delta A_2): exp2 takes a sixth of the time
        dt_weight, dt_bias, D, sizes = self.dt_proj.weight, self.dt_proj.bias, self.D, (self.dt_rank, self.d_state, self.d_state)

        def step(x):
            x, z = in_proj(x).chunk(2, dim=-1)                                  # (B, D) each
            window = torch.cat([conv_state.to(x.dtype), x[:, None]], dim=1)     # (B, d_conv, D)
            conv_state.copy_(window[:, 1:])
            x = (window * taps).sum(1)
            x = F.silu(x if bias is None else x + bias)
            dt, B, C = x_proj(x).split(sizes, dim=-1)
            # a small product: in the compiler's loop, if that is what there is
            delta = (dt[:, None] * dt_weight).sum(-1) if torch.compiler.is_compiling() else F.linear(dt, dt_weight)
            delta = F.softplus(delta + dt_bias)                                 # (B, D), float32 from here on, by dt_bias
            decay = (delta[..., None] * A_2).exp2_()                            # (B, D, N)
            h.mul_(decay).addcmul_((delta * x)[..., None], B[:, None])          # (B, D, N) += (B, D, 1) (B, 1, N)
            y = torch.bmm(h, C[..., None].to(h.dtype))[..., 0]                  # (B, D)
            y = torch.addcmul(y, D, x) * F.silu(z.to(h.dtype))
            return out_proj(y.to(x.dtype))
        return step

    def _apply(self, fn, recurse=True):
        # model.bfloat16() and .half() leave these in float32: rounding A or delta's bias changes how long the model
        # remembers by up to 1 %, at every step again
        exact = [t for p in (self.A_log, self.D, self.dt_proj.bias) for t in (p, p.grad) if t is not None]

        def keep_exact(tensor):
            result = fn(tensor)
            rounded = result.dtype in (torch.float16, torch.bfloat16) and any(tensor is t for t in exact)
            return tensor.to(result.device) if rounded else result
        return super()._apply(keep_exact, recurse)


def causal_conv(x, weight, bias=None, state=None):
    """
    Depthwise causal convolution as d_conv shifted multiply-adds: y_t = bias + sum_k weight[:, 0, k] x_{t - (d_conv - 1) + k}.

    x: (B, L, D).  weight: (D, 1, d_conv).  bias: (D,).  state: (B, d_conv - 1, D), the inputs before x, or None for zeros.
    Returns y (B, L, D) and the last d_conv - 1 inputs. Not F.conv1d: that wants (B, D, L), and on MPS it is wrong for views.
    """
    state, last = _around(x, weight, state)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    taps = torch.stack(weight[:, 0].unbind(1))      # (d_conv, D); of a transposed view the compiler makes no vector code
    if torch.compiler.is_compiling():   # it fuses this; of a Function that works in place torch 2.11 would lose gradients
        shifted = (*CausalConv.shifted(x, taps, state), x)
        return (bias + sum(x_k * tap for x_k, tap in zip(shifted, taps))).to(x.dtype), last
    return CausalConv.apply(x, taps, bias, state), last


def _around(x, weight, state):
    """What comes before x in the convolution, (B, d_conv - 1, D), and what will come before the next x."""
    before = weight.shape[2] - 1
    state = x.new_zeros(len(x), before, x.shape[2]) if state is None else state.to(x.dtype)
    last = torch.cat([state, x[:, max(0, x.shape[1] - before):]], dim=1)
    return state, last[:, last.shape[1] - before:]


def conv_silu(x, weight, bias=None, state=None, scan="auto"):
    """silu of causal_conv, and the last d_conv - 1 inputs, or None without a state. Where the scan is triton, by one kernel."""
    if scan_method(scan, x, 1) == "triton":
        return _scan_triton.conv_silu_triton(x, weight, bias, state), None if state is None else _around(x, weight, state)[1]
    y, last = causal_conv(x, weight, bias, state)
    return F.silu(y), last


class CausalConv(torch.autograd.Function):
    """The convolution with a backward of its own: autograd would make a full-size gradient for each of the shifted x."""

    @staticmethod
    def forward(ctx, x, taps, bias, state):
        ctx.save_for_backward(x, taps, state)
        y = torch.addcmul(bias, x, taps[-1])                                    # (B, L, D)
        for tap, x_k in zip(taps[:-1], CausalConv.shifted(x, taps, state)):
            y.addcmul_(x_k, tap)
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        (x, taps, state), gy = ctx.saved_tensors, gy.to(_at_least_float32(gy))
        before, length = state.shape[1], x.shape[1]
        later = F.pad(gy, (0, 0, before, before))
        gseen = later[:, before:] * taps[0]                                     # of state and x: tap k meets gy k steps later
        for k, tap in enumerate(taps[1:], 1):
            gseen.addcmul_(later[:, before - k:][:, :before + length], tap)
        gtaps = [(gy * x_k).sum((0, 1)) for x_k in (*CausalConv.shifted(x, taps, state), x)]
        gx, gstate = gseen[:, before:], gseen[:, :before]
        return gx.to(x.dtype), torch.stack(gtaps).to(taps.dtype), gy.sum((0, 1)).to(taps.dtype), gstate.to(state.dtype)

    @staticmethod
    def shifted(x, taps, state):
        """What each tap but the last, which meets x, meets: state and x, d_conv - 1, ... 1 steps back."""
        seen = torch.cat([state, x], dim=1)
        return [seen[:, k:k + x.shape[1]] for k in range(len(taps) - 1)]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 inside."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GatedMLP(nn.Module):
    """fc2(value * silu(gate)), the MLP that mamba_ssm has under this name."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.fc1 = Linear(config.d_model, 2 * config.d_intermediate, bias=config.bias)
        self.fc2 = Linear(config.d_intermediate, config.d_model, bias=config.bias)

    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class Layer(nn.Module):
    """x + mixer(norm(x)), and the same with the MLP if there is one."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm, self.mixer = RMSNorm(config.d_model, config.norm_eps), MambaBlock(config)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = None
        if config.d_intermediate > 0:
            self.norm2, self.mlp = RMSNorm(config.d_model, config.norm_eps), GatedMLP(config)

    def forward(self, x, state=None):
        x = x + self.dropout(self.mixer(self.dropout(self.norm(x)), state))
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.norm2(x)))
        return x

    def decoder(self, state, ready):
        """step(x) -> x, both (B, d_model): forward for the next token, without dropout. See MambaBlock.decoder."""
        norm, mixer, mlp = ready(self.norm), self.mixer.decoder(*state, ready), self.mlp
        norm2 = mlp and ready(self.norm2)

        def step(x):
            x = x + mixer(norm(x))
            return x if mlp is None else x + mlp(norm2(x))
        return step


# ---------------------------------------------------------------------------------------------------------------------
# The model


class LinearCrossEntropy(torch.autograd.Function):
    """
    The sum of the cross-entropies of logits = x @ weight.T, for some rows at a time. The gradients are computed with them, so
    that logits are neither kept nor computed twice.  x: (R, d_model).  weight: (V, d_model).  targets: (R,), -1 is ignored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows):
        losses, gx, gweight = [], [], 0
        for x_p, targets_p in zip(x.split(rows), targets.split(rows)):
            logits, target = F.linear(x_p, weight), targets_p[:, None]          # (rows, V), (rows, 1)
            there, target = target >= 0, target.clamp(min=0)
            logp = F.log_softmax(logits, dim=-1, dtype=_at_least_float32(logits))
            right = logp.gather(1, target)
            losses.append((right * there).sum())
            glogits = logp.exp_().to(logits.dtype).scatter_(1, target, (right.exp() - 1).to(logits.dtype))
            gx.append((glogits @ weight) * there)
            gweight = gweight + (glogits.t() @ (x_p * there)).to(weight.dtype)
        ctx.save_for_backward(torch.cat(gx).to(x.dtype), gweight)
        return -torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gloss):
        gx, gweight = ctx.saved_tensors
        return gx * gloss, gweight * gloss, None, None


class Mamba(nn.Module):
    """
    embedding -> n_layer x Layer -> RMSNorm -> head, tied to the embedding.

    model(idx) -> (logits, None);  model(idx, targets) -> (None, loss);  model.generate(idx, 100) -> idx and 100 more.
    """

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.compiles = {}      # for a number of texts, whether torch.compile works here
        self.backbone = nn.ModuleDict({
            "embedding": nn.Embedding(config.padded_vocab_size, config.d_model),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.n_layer)),
            "norm_f": RMSNorm(config.d_model, config.norm_eps),
        })
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False)
        nn.init.normal_(self.backbone["embedding"].weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone["embedding"].weight
        # what each layer adds to the residual stream is scaled so that the sum does not grow with the depth
        residuals = config.n_layer * (2 if config.d_intermediate > 0 else 1)
        with torch.no_grad():
            for layer in self.backbone["layers"]:
                layer.mixer.out_proj.weight /= math.sqrt(residuals)
                if layer.mlp is not None:
                    layer.mlp.fc2.weight /= math.sqrt(residuals)

    def forward(self, idx, targets=None, state=None, num_last_tokens=0):
        """
        idx: (B, L) token ids.  targets: (B, L), -1 is ignored.  state: from init_state, updated in place.
        Without targets: logits (B, L, vocab_size), or of the last num_last_tokens positions, and None.
        With targets: None, and the mean cross-entropy in nats.
        With a state the call continues where the last one ended: any split of a text gives the logits of one call.
        """
        x = self.dropout(self.backbone["embedding"](idx))                       # (B, L, d_model)
        for layer, layer_state in zip(self.backbone["layers"], state or [None] * self.config.n_layer):
            x = layer(x, layer_state)
        x = self.backbone["norm_f"](x[:, -num_last_tokens:])
        if targets is None:
            return self._logits(x), None
        # logits of a large vocabulary take more memory than the rest of the model: there are never more than LOGITS at once
        x, targets = x.flatten(0, 1), targets.flatten()
        parts = math.ceil(len(x) * self.config.padded_vocab_size / LOGITS)
        rows = math.ceil(len(x) / parts)
        if parts > 1 and torch.is_grad_enabled() and isinstance(self.lm_head, nn.Linear):    # not int8
            loss = LinearCrossEntropy.apply(x, self.lm_head.weight[:self.config.vocab_size], targets, rows)
        else:
            loss = sum(F.cross_entropy(self._logits(x_p).float(), targets_p, ignore_index=-1, reduction="sum")
                       for x_p, targets_p in zip(x.split(rows), targets.split(rows)))
        return None, loss / (targets >= 0).sum()

    def _logits(self, x):
        return self.lm_head(x)[..., :self.config.vocab_size]                    # without the padding rows

    def init_state(self, batch):
        """What the model remembers before the first token: for each layer (conv state, h). Its size never grows."""
        return [layer.mixer.init_state(batch) for layer in self.backbone["layers"]]

    def num_params(self, embedding=True):
        """Number of parameters; with embedding=False without the embedding table (and an untied head)."""
        tables = {id(self.backbone["embedding"].weight), id(self.lm_head.weight)}
        return sum(p.numel() for p in self.parameters() if embedding or id(p) not in tables)

    def configure_optimizers(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95)):
        """AdamW with decay on the projection matrices alone: decay would pull A_log, D, delta's bias and the norms to a
        wrong place (A to -1 for every state, D to 0), and an embedding row that is rarely used would just fade."""
        decay = [m.weight for m in self.modules() if isinstance(m, nn.Linear) and m is not self.lm_head]
        decayed = {id(p) for p in decay}
        rest = [p for p in self.parameters() if id(p) not in decayed]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, name_or_folder, device=None, dtype=None, cache_dir=None, **config_changes):
        """
        A trained model, in eval mode: from a folder (of save_pretrained, say) or by its name on Hugging Face, such as
        state-spaces/mamba-130m or state-spaces/mamba-130m-hf, in the layout of mamba_ssm or of transformers.
        A name is looked up in Hugging Face's cache on this machine and in cache_dir, by default ~/.cache/mamba.py, into
        which it is downloaded otherwise (see get_file, which names the variables of the environment that matter).
        dtype: of the weights, by default as in the file; what MambaBlock keeps in float32 is float32 in any case.
        config_changes: options of MambaConfig that leave the shapes alone: dropout=0.1, scan="sequential", ...
        Takes little more memory than the weights in their final type: they are read one by one.
        ValueError: the config or the weights are not of such a model, or damaged. OSError: not found, or no download.
        """
        name = os.fspath(name_or_folder)
        config = replace(read_config(get_file(name, "config.json", cache_dir)), **config_changes)
        try:
            with torch.device("meta"):
                model = cls(config)
        except (RuntimeError, TypeError):       # a size beyond 64 bits
            raise ValueError(f"{name}: no memory could hold a model of the size in its config.json") from None
        expected, weights = model.state_dict(), {}
        for path in _weight_files(name, cache_dir):
            for key, tensor in _read_weights(path, config.tie_embeddings):
                key = key.replace("backbone.embeddings.", "backbone.embedding.")    # as transformers calls it
                if key not in expected:
                    raise ValueError(f"{path} has a tensor {key}, which this model does not have")
                if tensor.shape != expected[key].shape:
                    raise ValueError(f"{path}: {key} is {tuple(tensor.shape)}, and by its config.json "
                                     f"{tuple(expected[key].shape)}")
                kind = dtype or tensor.dtype
                if key.endswith((".A_log", ".D", ".dt_proj.bias")):     # as in MambaBlock._apply
                    kind = torch.promote_types(kind, torch.float32)
                weights[key] = torch.empty(tensor.shape, dtype=kind, device=device).copy_(tensor)
        embedding = weights.get("backbone.embedding.weight")
        tied = config.tie_embeddings and embedding is not None
        if tied and not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding):
            raise ValueError(f"{name}: lm_head.weight is not the embedding, but by config.json they are tied")
        if missing := sorted(expected.keys() - weights.keys()):
            raise ValueError(f"{name} lacks {len(missing)} of this model's tensors: {', '.join(missing[:3])}"
                             + ", ..." * (len(missing) > 3))
        model.load_state_dict(weights, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.backbone["embedding"].weight
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write config.json and pytorch_model.bin into folder, both whole or none, in the layout of the released weights:
        from_pretrained and mamba_ssm read it, and transformers if it is given its config and the embedding is tied (it has
        another name for one that is not). Tensors keep their types, the config keeps all options; mamba_ssm refuses those
        it does not know (norm_eps, dropout, scan), so they are written only where they are not the default.
        OSError: the disk is full, ...; folder holds weights under another name.  ValueError: the weights are int8.
        """
        if self.lm_head.weight.dtype == torch.int8:
            raise ValueError("the layout of the released weights has no int8; save the model before quantize_int8")
        options, defaults = asdict(self.config), asdict(MambaConfig())
        config = {k: v for k, v in options.items() if k not in SSM_CFG and (k in ALWAYS_SAVED or v != defaults[k])}
        config["ssm_cfg"] = {k: options[k] for k in SSM_CFG}
        config.update(rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
        weights = {key: tensor.cpu() for key, tensor in self.state_dict().items()}
        if self.config.tie_embeddings:      # one tensor in the file, wherever the model is
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if other := [name for name in WEIGHTS if name != "pytorch_model.bin" and (folder / name).exists()]:
            raise FileExistsError(f"{folder} holds {other[0]}, which others would read instead; choose another folder")
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            Path(unfinished, "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            with open(Path(unfinished, "pytorch_model.bin"), "wb") as file:
                try:
                    torch.save(weights, file)
                except RuntimeError as error:       # torch's way to report a full disk
                    raise OSError(f"could not write {folder / 'pytorch_model.bin'}: {error}") from None
                file.flush()
                os.fsync(file.fileno())
            for name in ("pytorch_model.bin", "config.json"):
                os.replace(Path(unfinished, name), folder / name)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, state=None,
               min_p=None, repetition_penalty=None, stop=(), seen=None, compile=False):
        """
        Yield the next tokens, (B,) each, as they are made: constant time and memory per token. Arguments as in generate.
        A row that has made a stop token repeats it until all rows have; then the stream ends, on a GPU up to ASK tokens
        later, because asking makes it wait.
        With a state (from init_state), the prompts continue what it has read; it is updated in place, and when the stream
        ends, or is closed, it has not yet read the last token. seen, (B, vocab_size) bool, are more tokens for
        repetition_penalty to know; it is updated in place, with the prompts' tokens and the new ones.
        compile: on a CPU, the step of a token by torch.compile; the first stream for a number of prompts then waits some ten
        seconds. On CUDA the step is a CUDA graph; the first stream for a number of prompts waits for its kernels.
        """
        device, training, vocab_size = self.lm_head.weight.device, self.training, self.config.vocab_size
        settings = (temperature, top_k, top_p, min_p, repetition_penalty)
        check_sampling(*settings)
        if not all(0 <= token < vocab_size for token in stop):
            raise ValueError(f"the stop tokens must be ids from 0 to {vocab_size - 1}, not {list(stop)}")
        prompts = [torch.as_tensor(p, dtype=torch.long, device=device) for p in prompts]
        if min((len(p) for p in prompts), default=0) == 0:
            raise ValueError("each prompt needs at least one token")
        state = self.init_state(len(prompts)) if state is None else state
        stop = torch.tensor(stop, dtype=torch.long, device=device) if len(stop) > 0 else None
        if repetition_penalty is None:
            seen = None
        else:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device) if seen is None else seen
            for row, prompt in zip(seen, prompts):
                row.scatter_(0, prompt, True)
        token = None
        if training:    # else this would take as long as half a token
            self.eval()
        try:
            # by the graph where launches would take longer than what they launch
            by_graph = (device.type == "cuda" and len({len(p) for p in prompts}) == 1 and len(prompts[0]) <= SHORT
                        and len(prompts) <= FEW and self._fuses(state))
            if not by_graph:
                self._prefill(prompts, state)
            last = torch.stack([p[-1] for p in prompts])
            with self._decoder(state, compile) as step:
                if by_graph:
                    step.read(self, torch.stack(prompts)[:, :-1])
                for left in reversed(range(max_new_tokens)):
                    token = next_token(step(last if token is None else token), token, stop, seen, generator, settings)
                    yield token
                    asks = stop is not None and (device.type == "cpu" or left % ASK == 0)
                    if left == 0 or (asks and stopped(token, stop).all()):
                        return
        finally:
            if training:
                self.train()

    @contextlib.contextmanager
    def _decoder(self, state, compile=False):
        """
        with self._decoder(state) as step: step(token) -> logits, (B,) -> (B, vocab_size): the model for the next token of each
        text. It updates state in place; on CUDA, where it is a CUDA graph with a state of its own, at the end of the with.
        compile: by torch.compile, on a CPU, unless one line has said that it does not work here.
        """
        (rows, *_), device = state[0][1].shape, state[0][1].device
        if device.type != "cuda":
            compile = compile and device.type == "cpu"
            if compile and rows not in self.compiles:
                token = torch.zeros(rows, dtype=torch.long, device=device)
                self.compiles[rows] = works_here("torch.compile", lambda: self._step(self.init_state(rows), True)(token))
            yield self._step(state, compile and self.compiles[rows])
            return
        fused = self._fuses(state)
        reads = [rows, *((t.data_ptr(), t.dtype) for t in (*self.parameters(), *self.buffers()))]
        graph = GRAPHS.pop(self, None)      # while this stream has it, another one makes its own
        if not fused or graph is None or graph.reads != reads:
            graph = None                    # its memory may be needed
            graph = Graph(self._step, self.init_state(rows), reads, fused)
        own, given = ([t for layer in of for t in layer] for of in (graph.state, state))
        torch._foreach_copy_(own, given)
        try:
            yield graph
        finally:
            torch._foreach_copy_(given, own)
            if fused:       # the other step has constants made from the weights, which may change until the next stream
                GRAPHS[self] = graph

    def _fuses(self, state):
        """Whether the step of a token runs by the kernels of scan_triton.py."""
        return (scan_method(self.config.scan, state[0][1], self.config.d_state) == "triton"
                and _scan_triton.decodes(self.config) and all(p.is_contiguous() for p in self.parameters()))

    def _step(self, state, compile=False, fused=False):
        embedding, vocab_size = self.backbone["embedding"], self.config.vocab_size
        if fused:
            return torch.inference_mode()(
                functools.partial(_scan_triton.decode, self.backbone, self.lm_head, vocab_size, state))
        ready = functools.partial(_ready, rows=len(state[0][1]), compile=compile)
        layers = [layer.decoder(s, ready) for layer, s in zip(self.backbone["layers"], state)]
        norm, linear = ready(self.backbone["norm_f"]), ready(self.lm_head)

        def step(token):
            x = embedding(token)                                                # (B, d_model)
            for layer in layers:
                x = layer(x)
            return linear(norm(x))[:, :vocab_size]                              # without the padding rows
        if compile:
            checks = itertools.chain([True], itertools.repeat(not SINCE_2_8))

            def compiled(token):    # what the first call has checked, shapes and types above all, stays as it is
                with contextlib.nullcontext() if next(checks) else torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                    return _compiled(_call)(step, token)
            return torch.inference_mode()(compiled)
        return torch.inference_mode()(step)     # calls cost less than without gradients alone

    @torch.inference_mode()
    def _prefill(self, prompts, state):
        """Read the prompts but their last tokens into the state with the scan, those of one length together."""
        for length in {len(p) - 1 for p in prompts} - {0}:
            rows = [i for i, p in enumerate(prompts) if len(p) - 1 == length]
            some = len(rows) < len(prompts)
            rows_state = [(conv[rows], h[rows]) for conv, h in state] if some else state
            for part in torch.stack([prompts[i][:-1] for i in rows]).split(PREFILL, dim=1):
                self(part, state=rows_state, num_last_tokens=1)
            for (conv, h), (rows_conv, rows_h) in zip(state, rows_state if some else ()):
                conv[rows], h[rows] = rows_conv, rows_h

    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=None,
                 repetition_penalty=None, stop=(), compile=False):
        """
        prompts: (B, L) token ids, or a list of B prompts of any lengths. Returns them with max_new_tokens more each, as one
        (B, L + max_new_tokens) tensor, or as a list of tensors; at temperature 0 every prompt gives what it gives alone.
        temperature: 0 takes the likeliest token.  top_k: only among the k likeliest.  top_p: only among the fewest that
        together have this probability.  min_p: only among those at least min_p times as likely as the likeliest.
        repetition_penalty: above 1 makes the tokens of the prompt and of the answer so far less likely: their logits are
        divided by it where positive, multiplied where negative (CTRL, arXiv 1909.05858).
        compile: on a CPU, the step of a token by torch.compile; see stream.
        stop: ids that end a row. In the list each row ends with its stop token; in the tensor, which is then as long as
        the longest row, a shorter row repeats its stop token to the end.
        generator: a torch.Generator, to get the same text again; one on the CPU makes a GPU wait for its numbers.
        ValueError for settings without a meaning.
        """
        new = list(self.stream(prompts, max_new_tokens, temperature, top_k, top_p, generator, None, min_p,
                               repetition_penalty, stop, compile=compile))
        new = torch.stack(new, dim=1) if new else torch.empty(len(prompts), 0, dtype=torch.long)    # (B, new tokens)
        ends = [new.shape[1]] * len(prompts)
        if len(stop) > 0:
            repeats = stopped(new, torch.tensor(stop, device=new.device)).sum(1) - 1    # one stop token is enough
            ends = (new.shape[1] - repeats.clamp(min=0)).tolist()
        if isinstance(prompts, torch.Tensor):
            return torch.cat([prompts.to(new.device), new[:, :max(ends)]], dim=1)
        return [torch.cat([torch.as_tensor(p, device=n.device), n[:end]]) for p, n, end in zip(prompts, new, ends)]


LOGITS = 2 ** 28    # as float32, 1 GB
SHORT = 512         # tokens of a prompt that CUDA graphs read, at least READ at a time, and the rest one by one
FEW = 64            # prompts that they read at once
READ = 8
PREFILL = 2048      # a prompt is read in parts of this many tokens: the memory it takes does not grow with its length
ASK = 16            # tokens between two questions to a GPU whether all rows have stopped


def _call(step, token):     # one function to compile for all streams: code for the same model is found again
    return step(token)


def _ready(module, rows, compile):
    """
    A Linear, Int8Linear or RMSNorm as a function of x (rows, in), made ready for being called for token after token.
    A product with one row is bound by memory: each weight should be read once, in its own type, and on a CPU by all cores.
    """
    weight, bias = module.weight, getattr(module, "bias", None)
    on_cpu, int8 = weight.device.type == "cpu", weight.dtype == torch.int8
    if isinstance(module, RMSNorm):
        wide = weight.to(_at_least_float32(weight)) * math.sqrt(len(weight))
        d_eps = wide.new_tensor(len(weight) * module.eps)

        def function(x):    # weight sqrt(d) x / sqrt(|x|^2 + d eps): half the calls
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide.dtype)
            return (x * wide * torch.addcmul(d_eps, length, length).rsqrt_()).to(x.dtype)
        return module if compile else function
    if compile and rows <= (8 if int8 else 1):              # becomes one loop over the weights
        def function(x):
            wide = _at_least_float32(x)
            y = (x[:, None].to(wide) * weight.to(wide)).sum(-1)
            y = y * module.scale if int8 else y
            return (y if bias is None else y + bias).to(x.dtype)
    elif on_cpu and rows == 1 and weight.dtype == torch.float32 and weight.numel() >= 2 ** 17:  # smaller is faster on one core
        blocks = math.gcd(len(weight), torch.get_num_threads())
        parts = weight.unflatten(0, (blocks, -1)).transpose(1, 2)               # (blocks, in, out / blocks)

        def function(x):
            y = torch.bmm(x.expand(blocks, 1, -1), parts).view(1, -1)
            return y if bias is None else y + bias
    elif on_cpu and rows == 1 and weight.dtype == torch.bfloat16 and _has_amx():    # F.linear takes 1.6 times as long there
        def function(x):
            y = torch.mv(weight, x[0])[None]
            return y if bias is None else y + bias
    elif on_cpu and int8 and rows <= 8 and weight.shape[1] % 32 == 0:   # what Int8Linear computes, with the scale made ready
        scale = module.scale.bfloat16()

        def function(x):
            y = torch._weight_int8pack_mm(x.bfloat16(), weight, scale).to(x.dtype)
            return y if bias is None else y + bias
    else:
        return module if int8 else lambda x: F.linear(x, weight, bias)
    return function


GRAPHS = weakref.WeakKeyDictionary()    # for a model, the Graph of its last stream


class Graph:
    """
    The step of a token on CUDA as a CUDA graph: its launches are recorded once, and replayed for each token by one call. So is
    the reading of a part of a prompt, when the first one of its length comes.
    """

    def __init__(self, make_step, state, reads, fused):
        # reads: the rows, and the weights that it reads where they are. It also reads what step has computed once
        self.state, self.reads, self.readers, self.step = state, reads, {}, make_step(state, fused=fused)
        self.token = torch.zeros(reads[0], dtype=torch.long, device=state[0][1].device)
        self.graph, self.logits = recorded(lambda: self.step(self.token), self.token)

    def __call__(self, token):
        self.token.copy_(token)
        self.graph.replay()
        return self.logits

    def read(self, model, tokens):
        """model reads tokens (B, L) into the state, in parts whose lengths are powers of two, and the last few one by one."""
        while tokens.shape[1] >= READ:
            length = 1 << tokens.shape[1].bit_length() - 1
            part, tokens = tokens[:, :length], tokens[:, length:]
            if length in self.readers:
                held, graph = self.readers[length]
                held.copy_(part)
                graph.replay()
            else:           # what is done to get ready for the recording reads this part already
                held = part.clone()
                graph, _ = recorded(lambda held=held: model(held, state=self.state, num_last_tokens=1), held, self.graph.pool())
                self.readers[length] = held, graph
        for token in tokens.unbind(1):
            self(token)


def recorded(call, where, pool=None):
    """
    A CUDA graph of what call() launches on the GPU of the tensor `where`, and what it returns. It is called once before, for
    what the first call alone has to do cannot be recorded; while it is being recorded nothing is done. No autocast from outside,
    and what is inside keeps no copies of weights: they would be outdated, or gone, when the graph is replayed.
    pool: of another graph, to work in the same memory; the two must not run at the same time.
    """
    with torch.cuda.device_of(where), torch.autocast("cuda", enabled=False, cache_enabled=False):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool):
            result = call()
    return graph, result


def works_here(what, attempt, say=lambda line: print(line, file=sys.stderr)):
    """Whether attempt(), which needs `what`, works on this machine; if not, one line says so."""
    try:
        attempt()
        return True
    except (RuntimeError, ImportError, OSError) as error:   # no compiler, a device it does not know, ...
        say(f"{what} does not work here ({type(error).__name__}); going on without it")
        return False


def next_token(logits, before, stop, seen, generator, settings):
    """
    The next token of each row, (B,): a row whose token before was a stop token has that again, the others draw. seen, if
    there is one, is updated. settings: as check_sampling takes them.
    """
    temperature, top_k, top_p, min_p, repetition_penalty = settings
    token = sample(logits, temperature, top_k, top_p, generator, min_p, repetition_penalty, seen)
    if stop is not None and before is not None:
        token = torch.where(stopped(before, stop), before, token)
    if seen is not None:
        seen.scatter_(1, token[:, None], True)
    return token


def stopped(tokens, stop):
    """Which of the tokens (...) are among the ids in stop (K,). Not torch.isin, for which the host may wait for a GPU."""
    return (tokens[..., None] == stop).any(-1)


def check_sampling(temperature, top_k, top_p, min_p, repetition_penalty):
    """ValueError for settings of sample() that have no meaning."""
    if not (temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
            and (min_p is None or 0 <= min_p <= 1) and (repetition_penalty is None or 0 < repetition_penalty < math.inf)):
        raise ValueError("need temperature >= 0, top_k >= 1, 0 < top_p <= 1, 0 <= min_p <= 1 and repetition_penalty > 0, not "
                         f"temperature={temperature}, top_k={top_k}, top_p={top_p}, min_p={min_p}, "
                         f"repetition_penalty={repetition_penalty}")


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=None, repetition_penalty=None, seen=None):
    """
    Draw one token id for each row of logits (B, V); returns (B,), without waiting for a GPU. Settings as in Mamba.generate;
    seen, (B, V) bool: the tokens that repetition_penalty is for. ValueError for settings without a meaning.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if repetition_penalty is not None and seen is not None:
        logits = logits.float()
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits, temperature = logits.float(), min(temperature, 1e30)        # times the noise below it must not overflow
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None or min_p is not None:
        probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)    # at most 0: it never overflows
        if top_p is not None:
            ordered, order = probs.sort(descending=True)
            enough = ordered.cumsum(-1) - ordered >= top_p                      # those before it reach top_p already
            probs = probs.masked_fill(enough.scatter(-1, order, enough), 0)
        if min_p is not None:
            probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        logits = logits.masked_fill(probs == 0, -math.inf)
    # argmax of p / Exponential(1) is a draw from p, here as its logarithm times the temperature: no softmax, no
    # multinomial, which returns impossible indices on MPS, and no wait for the GPU. The noise comes from the generator's device
    noise = torch.empty(logits.shape, device=generator.device if generator else logits.device)
    noise = noise.exponential_(generator=generator).clamp_(min=1e-20).log_()
    return torch.sub(logits, noise.to(logits.device), alpha=temperature).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in int8


class Int8Linear(nn.Module):
    """
    A linear layer for inference, of weights that are whole numbers from -127 to 127 times one scale for each output.

    Int8Linear(linear)(x), x (..., in) -> (..., out) in the type of x. On a CPU the product is computed in bfloat16.
    weight: (out, in) int8.  scale: (out,), bfloat16 numbers in the type of the layer they are from.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).bfloat16().to(linear.weight.dtype)
        self.register_buffer("scale", scale.clamp(min=torch.finfo(scale.dtype).tiny))       # a row may be zero
        weight = (weight / self.scale.float()[:, None]).round_().clamp_(-127, 127)
        self.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
        self.bias = getattr(linear, "bias", None)       # an embedding has none

    def forward(self, x):
        rows = x.flatten(0, -2)
        if x.device.type == "cpu":
            rows = rows.bfloat16()
        # few rows: never more than int8 is read from memory. PyTorch's kernel is wrong where `in` is not a multiple of 16
        if x.device.type == "cpu" and len(rows) <= 8 and rows.shape[1] % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale.bfloat16())
        else:
            y = F.linear(rows, self.weight.to(rows.dtype)) * self.scale.to(rows.dtype)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """The embedding that has the table of an Int8Linear: that of the head, where they are tied."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight
        self.register_buffer("scale", head.scale)

    def forward(self, idx):
        return self.weight[idx] * self.scale[idx][..., None]                    # (B, L, d_model)


def quantize_int8(model):
    """Turn the weights of a Mamba into int8, in place, and return it: a quarter of float32's memory, half of bfloat16's.
    What is small or delicate (convolution, dt_proj, A_log, norms) stays. It can no longer be trained."""
    tied = model.lm_head.weight is model.backbone["embedding"].weight
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, Int8Linear(child))
    model.backbone["embedding"] = Int8Embedding(model.lm_head if tied else Int8Linear(model.backbone["embedding"]))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving: what from_pretrained and save_pretrained rest on


SSM_CFG = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init_floor", "conv_bias", "bias")
ALWAYS_SAVED = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings")
TRANSFORMERS = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layer", "expand": "expand",
                "state_size": "d_state", "conv_kernel": "d_conv", "time_step_rank": "dt_rank", "time_step_min": "dt_min",
                "time_step_max": "dt_max", "time_step_floor": "dt_init_floor", "use_conv_bias": "conv_bias",
                "use_bias": "bias", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings"}
# what a config.json may ask for, and the only answer that this model has
ONLY = {"model_type": "mamba", "hidden_act": "silu", "rms_norm": True, "attn_layer_idx": [], "layer": "Mamba1"}
WEIGHTS = ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json")
ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")     # a name on Hugging Face: owner/model
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_config(path):
    """The MambaConfig of a config.json in the layout of mamba_ssm or of transformers. ValueError: it is not one."""
    try:
        saved = _read_json(path)
        saved = saved if isinstance(saved, dict) else {}
        ssm_cfg = saved.get("ssm_cfg") or {}
        found = {**saved, **ssm_cfg}
        for key, only in ONLY.items():
            if found.get(key) not in (only, None):
                raise ValueError(f"{key} is {found[key]!r}; this model can only do {only!r}")
        if "hidden_size" in saved:      # transformers' embedding has a row for each token and no more
            found = {ours: saved[theirs] for theirs, ours in TRANSFORMERS.items() if theirs in saved}
            found["pad_vocab_size_multiple"] = 1
        elif unknown := ssm_cfg.keys() - {*SSM_CFG, "layer", "dt_init", "dt_scale", "use_fast_path"}:
            raise ValueError(f"this model does not know the option {unknown.pop()} in ssm_cfg")
        if missing := {"vocab_size", "d_model", "n_layer"} - found.keys():
            raise ValueError(f"not the config of a Mamba: it has no {', '.join(sorted(missing))}")
        return MambaConfig(**{field.name: found[field.name] for field in fields(MambaConfig) if field.name in found})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {'an option of the wrong type: ' * isinstance(error, TypeError)}{error}") from None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _weight_files(name, cache_dir):
    """Paths of the files that hold the weights of a model: those on this machine, else downloaded."""
    found = []
    for local, file in itertools.product((True, False), WEIGHTS):
        if local or not found:
            with contextlib.suppress(FileNotFoundError):    # a model has one of WEIGHTS
                found.append(get_file(name, file, cache_dir, local))
    if not found:
        raise FileNotFoundError(f"{name} has no weights: none of {', '.join(WEIGHTS)}")
    path = max(found, key=lambda path: path.stat().st_mtime)    # of several those written last
    if path.suffix != ".json":
        return [path]
    try:
        shards = {str(shard) for shard in _read_json(path)["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path} is not an index of weights") from None
    return [get_file(name, shard, cache_dir) for shard in sorted(shards)]


def _read_weights(path, tied):
    """Yield (key, tensor) one by one from a .bin or a .safetensors; without a tied head that the file has as the embedding."""
    try:
        for key, tensor in _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path, tied):
            plain = tensor.dtype in SAFETENSORS.values() and tensor.layout == torch.strided and not tensor.is_meta
            if not (plain and isinstance(key, str)):
                raise ValueError(f"{key} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
            yield key, tensor
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, struct.error,
            pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        if isinstance(error, pickle.UnpicklingError):   # torch would say how to load it all the same
            reason = "it holds something else than tensors"
        raise ValueError(f"{path} is damaged or not a file of weights ({type(error).__name__}: {reason}); if it was "
                         "downloaded, delete it, and the same command downloads it again") from None


def _read_bin(path, tied):
    if not zipfile.is_zipfile(path):
        raise ValueError("not the zip file that torch.save writes since PyTorch 1.6")
    load = lambda: torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    weights, read = load(), 0
    for key in list(weights):
        if read > 2 ** 27:      # what has been read of a mapping stays in memory as long as it: begin another one
            weights, read = load(), 0
        embedding = weights.get("backbone.embedding.weight") if tied and key == "lm_head.weight" else None
        if embedding is not None and embedding.data_ptr() == weights[key].data_ptr():
            continue
        yield key, weights[key]
        read += weights[key].nbytes


def _read_safetensors(path):
    """Its format: the length of the header in 8 bytes, the header in JSON, and the tensors, row by row."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        if start > size:
            raise ValueError("cut off")
        for key, about in json.loads(file.read(start - 8)).items():
            if key == "__metadata__":
                continue
            begin, end = about["data_offsets"]
            if not 0 <= begin < end <= size - start:
                raise ValueError("cut off")
            data = bytearray(end - begin)
            file.seek(start + begin)
            file.readinto(data)
            yield key, torch.frombuffer(data, dtype=SAFETENSORS[about["dtype"]]).reshape(about["shape"])


def get_file(name, file, cache_dir=None, local=False):
    """
    The path of a file of a model, which is a folder or a name on Hugging Face such as state-spaces/mamba-130m. A name is
    looked up in Hugging Face's cache (HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub) and in
    cache_dir/owner--name (~/.cache/mamba.py/owner--name); unless local, it is then downloaded into the latter.
    FileNotFoundError: there is no such file. Others are those of download.
    """
    if Path(file).name != file:     # it may stand in an index.json from anywhere
        raise ValueError(f"{name}: '{file}' is not the name of a file")
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not ON_HUB.fullmatch(name):
            raise FileNotFoundError(f"there is no folder {name}, and a name on Hugging Face is like state-spaces/mamba-130m")
        repo, cache = name.replace("/", "--"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME") or f"{cache}/huggingface", "hub")
        hub = Path(os.path.expanduser(hub), f"models--{repo}")  # Path's own raises an error for a ~name without a home
        if (hub / "refs" / "main").is_file():
            path = hub / "snapshots" / (hub / "refs" / "main").read_text(errors="replace").strip() / file
            if path.is_file():
                return path
        folder = Path(os.path.expanduser(cache_dir or f"{cache}/mamba.py"), repo)
        if not (local or (folder / file).is_file()):
            return download(f"{name}/resolve/main/{file}", folder / file)
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder / file} is missing")
    return folder / file


PAUSES = (1, 2, 4)  # seconds before a dropped download goes on


def download(url, path, size=None, sha256=None):
    """
    Fetch url to path, unless it is there already, and return path. It grows as path.part, from which a later call
    goes on, and gets its name only when size and sha256 are right, as far as they are known or the server tells them.
    url: with http(s)://, or a path on Hugging Face such as owner/name/resolve/main/file (see HF_ENDPOINT and HF_TOKEN).
    ConnectionError: no network, or it keeps dropping; HF_HUB_OFFLINE is set, and url is on Hugging Face.
    FileNotFoundError: status 404. PermissionError: 401 or 403. OSError: another status, an address or a token without a
    meaning, or contents that are not the expected (of a .json: JSON).
    """
    try:
        import requests  # here, because nothing else in this file needs them
        import tqdm  # noqa: F401
    except ImportError as error:
        raise OSError(f"{url} has to be downloaded, which needs a package: pip install {error.name}") from None
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/") + "/"
    url, path = url if "://" in url else hub + url, Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists() and sha256 in (None, _sha256_of(path)):
        return path
    headers = {"Accept-Encoding": "identity"}   # a compressed answer would fit neither the size nor the range
    if url.startswith(hub):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise ConnectionError(f"{path} is not there, and HF_HUB_OFFLINE forbids to download it: unset that, or give a "
                                  "folder that holds the files")
        if token := os.environ.get("HF_TOKEN", "").strip():
            if not re.fullmatch("[!-~]+", token):
                raise OSError("HF_TOKEN has characters that no token has")
            headers["Authorization"] = f"Bearer {token}"
    expected = {"size": size, "sha256": sha256}
    for pause in (*PAUSES, None):
        try:
            if _fetch(url, part, headers, expected):
                break
            reason = "the connection dropped"
        except ValueError as error:     # not an address; nonsense in what the server says about the file
            raise OSError(f"cannot download {url}: {error}") from None
        except requests.RequestException as error:
            reason = type(error).__name__
            if isinstance(error, requests.ConnectionError) and not part.exists():
                pause = None    # no network: waiting for it helps nobody
        if pause is None:
            raise ConnectionError(f"cannot download {url} ({reason}); " + (
                "the same command goes on where it stopped" if part.exists() else "is there a network?"))
        time.sleep(pause)
    wrong, size = "", part.stat().st_size
    if expected["size"] not in (None, size) or expected["sha256"] not in (None, _sha256_of(part)):
        wrong = "size or sha256 differs"
    elif path.suffix == ".json":    # not sent with a hash, and a login page of a network would stay in its place
        try:
            _read_json(part)
        except ValueError as error:
            wrong = str(error)
    if wrong:
        part.unlink()
        raise OSError(f"{url} is not what it should be ({wrong}; {size:,} bytes came); nothing was kept")
    os.replace(part, path)
    return path


def _fetch(url, part, headers, expected):
    """One attempt to get the rest of part. Returns whether it is whole; adds to expected what the server tells."""
    import requests
    from tqdm import tqdm
    have = part.stat().st_size if part.exists() else 0
    headers = {**headers, "Range": f"bytes={have}-"} if have else headers
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        for response in (*answer.history, answer):  # Hugging Face describes a large file where it redirects
            etag = re.fullmatch('"?([0-9a-f]{64})"?', response.headers.get("X-Linked-Etag", ""))
            expected["sha256"] = expected["sha256"] or (etag and etag[1])
            expected["size"] = expected["size"] or int(response.headers.get("X-Linked-Size", 0)) or None
        start, total = re.match(r"(?:bytes (?:(\d+)-\d+|\*)/(\d+))?", answer.headers.get("Content-Range", "")).groups()
        if answer.status_code == 416 and have:
            if int(total or 0) != have:
                part.unlink()   # what is there now is not the file that this part came from: start over
            return int(total or 0) == have
        if answer.status_code == 200:   # the whole file: this server may not know Range
            have, total = 0, answer.headers.get("Content-Length")
        elif answer.status_code != 206 or int(start or 0) != have:
            kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}.get(answer.status_code, OSError)
            raise kind(f"{url}: status {answer.status_code} {answer.reason}"
                       + " (a wrong name, or it needs a login: HF_TOKEN on Hugging Face)" * (kind is PermissionError))
        total = int(total) if total else None
        print(f"downloading {url}")
        part.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, leave=False,
                   disable=None if total is None or total > 4e6 else True)      # None: only if it is not a terminal
        with open(part, "ab" if have else "wb") as file, bar:
            for chunk in answer.iter_content(2 ** 16):
                bar.update(file.write(chunk))
    return total in (None, part.stat().st_size)


def _sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(2 ** 20):
            digest.update(data)
    return digest.hexdigest()
