"""
What goes row by row on CUDA, as Triton kernels, so that each number is read and written once: the
gated norm behind the scan of Mamba-2, the loss and gradient of the logits, and numbers in another
type.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .heads_triton import sum_over_rows
from .launch import Kernel
from .operators import differentiable_once
from .scan_triton import _facts, _kinds, _wants_gradients

PROGRAMS = 528      # of the backward pass of the norm: 4 for each multiprocessor of an H100


@triton.jit
def _gate(y, z, row, z_row, d, D):
    """y silu(z), y, z and sigmoid(z) of a row, in float32."""
    y_d = tl.load(y + row * D + d, mask=d < D, other=0).to(tl.float32)
    z_d = tl.load(z + z_row + d, mask=d < D, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(z_d)
    return y_d * z_d * sigmoid, y_d, z_d, sigmoid


@triton.jit(do_not_specialize=("rows",))
def _norm(y, z, weight, out, rows, z_l, G: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr,
          BD: tl.constexpr):
    """out = gated / sqrt(mean of gated^2 + EPS) weight, of rows of G groups of D numbers. Without a
    weight there is no norm: out = gated."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    gated, _, _, _ = _gate(y, z, row, row // G * z_l + row % G * D, d, D)
    if weight is not None:
        gated *= tl.rsqrt(tl.sum(gated * gated, 0) / D + EPS)
        gated *= tl.load(weight + row % G * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(out + row * D + d, gated, mask=d < D)


@triton.jit(do_not_specialize=("rows",))
def _norm_gradients(y, z, weight, gout, gy, gz, gweight, rows, z_l, G: tl.constexpr,
                    D: tl.constexpr, EPS: tl.constexpr, BD: tl.constexpr, gz_l):
    """gy, gz, and gweight (programs, G D), to be added up: program i takes of its group the rows i,
    i + programs, ..."""
    group, d = tl.program_id(1), tl.arange(0, BD)
    if weight is not None:
        weight_d = tl.load(weight + group * D + d, mask=d < D, other=0).to(tl.float32)
        total = tl.zeros((BD,), tl.float32)
    for first in range(tl.program_id(0), rows // G, tl.num_programs(0)):
        place = tl.full((), 1, tl.int64) * first
        row = place * G + group
        gated, y_d, z_d, sigmoid = _gate(y, z, row, place * z_l + group * D, d, D)
        # the gradient of out, and of gated where that is the same
        ggated = tl.load(gout + row * D + d, mask=d < D, other=0).to(tl.float32)
        if weight is not None:
            size = tl.rsqrt(tl.sum(gated * gated, 0) / D + EPS)
            total += ggated * gated * size
            ggated *= weight_d
            ggated = size * (ggated - gated * (size * size * tl.sum(ggated * gated, 0) / D))
        tl.store(gy + row * D + d, ggated * z_d * sigmoid, mask=d < D)
        tl.store(gz + place * gz_l + group * D + d,
                 ggated * y_d * sigmoid * (1 + z_d * (1 - sigmoid)), mask=d < D)
    if weight is not None:
        tl.store(gweight + (tl.program_id(0) * G + group) * D + d, total, mask=d < D)


@triton.jit
def _softmax_gradient(logits, targets, losses, V: tl.constexpr, stride: tl.constexpr,
                      BV: tl.constexpr):
    """losses (R,) and, in place of logits (R, stride), of which the first V count, the gradients;
    both 0 without a target."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target >= 0
    # before the gradients take the place of the logits; of a target that there is not, NaN
    at_target = tl.load(logits + target, mask=counts & (target < V), other=float("nan"))
    most, total = tl.full((BV,), -1e30, tl.float32), tl.zeros((BV,), tl.float32)
    for first in range(0, V, BV):
        v = first + tl.arange(0, BV)
        # masked by stride, not V: an odd bound would keep Triton from reading 16 bytes at once
        x = tl.where(v < V, tl.load(logits + v, mask=v < stride, other=0).to(tl.float32), -1e30)
        more = tl.maximum(most, x)
        total = total * tl.exp(most - more) + tl.exp(x - more)
        most = more
    largest = tl.max(most, 0)
    log_sum = tl.log(tl.sum(total * tl.exp(most - largest), 0)) + largest
    tl.store(losses + row, tl.where(counts, log_sum - at_target.to(tl.float32), 0.0))
    for first in range(0, stride, BV):
        v = first + tl.arange(0, BV)
        x = tl.load(logits + v, mask=v < stride, other=0).to(tl.float32)
        gradient = tl.exp(x - log_sum) - tl.where(v == target, 1.0, 0.0)
        tl.store(logits + v, tl.where(counts & (v < V), gradient, 0.0), mask=v < stride)


@triton.jit
def _cast_one(x, y, n, program, SIZE: tl.constexpr):
    """This program's part of y = x, which is none if its number is below 0 or too large. Returns
    its number among those of the next tensors."""
    programs = tl.cdiv(n, SIZE)
    if (program >= 0) & (program < programs):
        at = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        tl.store(y + at, tl.load(x + at, mask=at < n).to(y.dtype.element_ty), mask=at < n)
    return program - programs


@triton.jit
def _cast(x0, x1, x2, x3, x4, y0, y1, y2, y3, y4, n0, n1, n2, n3, n4, SIZE: tl.constexpr):
    """y = x, in the type of y, for five tensors of n numbers."""
    program = _cast_one(x0, y0, n0, tl.program_id(0), SIZE)
    program = _cast_one(x1, y1, n1, program, SIZE)
    program = _cast_one(x2, y2, n2, program, SIZE)
    program = _cast_one(x3, y3, n3, program, SIZE)
    _cast_one(x4, y4, n4, program, SIZE)


_start_norm = Kernel(_norm, num_warps=4)
_start_norm_gradients, _start_softmax_gradient, _start_cast = (
    Kernel(function, num_warps=8) for function in (_norm_gradients, _softmax_gradient, _cast))


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        return run_norm(y, z, weight, groups, eps)

    @staticmethod
    @differentiable_once
    def backward(ctx, gout):
        _, z, _ = tensors = ctx.saved_tensors
        gz = torch.empty_like(z, memory_format=torch.contiguous_format)
        gy, gweight = run_norm_back(gout.contiguous(), *tensors, ctx.groups, ctx.eps, gz)
        return gy, gz, gweight, None, None


def _sizes(y, z, groups, eps):
    """rows, z_l, G, D, EPS, BD, as the kernels of the norm have them."""
    D = y.shape[-1] // groups
    return y.numel() // D, z.stride(1), groups, D, eps, triton.next_power_of_2(D)


def _version(sizes, *tensors):
    return tensors[0].device.index, *sizes[2:], *_facts(sizes[1]), *_kinds(*tensors)


def run_norm(y, z, weight, groups, eps):
    """The norm of y silu(z), or with None as its weight y silu(z)."""
    out, sizes = torch.empty_like(y), _sizes(y, z, groups, eps)
    with torch.cuda.device_of(y):
        _start_norm((sizes[0], 1, 1), _version(sizes, y, z, weight), (y, z, weight, out), *sizes)
    return out


def run_norm_back(gout, y, z, weight, groups, eps, gz):
    """The gradients of y and weight. gz: where to write that of z; its steps may be apart."""
    sizes, tensors, gy = _sizes(y, z, groups, eps), (y, z, weight, gout), torch.empty_like(y)
    programs, gz_l, gweight = min(PROGRAMS, y.shape[0] * y.shape[1]), gz.stride(1), None
    if weight is not None:
        gweight = weight.new_empty(programs, y.shape[-1], dtype=torch.float32)
    version = *_version(sizes, *tensors, gz), *_facts(gz_l)
    with torch.cuda.device_of(y):
        _start_norm_gradients((programs, groups, 1), version, (*tensors, gy, gz, gweight), *sizes,
                              gz_l)
    return gy, None if weight is None else sum_over_rows(gweight, weight.dtype)


def gated_norm(y, z, weight, groups, eps):
    """RMSNorm of y silu(z), each of the groups of channels by itself, as GatedRMSNorm of mamba2.py:
    y, z (B, L, D) -> (B, L, D)."""
    y, weight = y.contiguous(), weight.contiguous()
    if z.stride(2) != 1 or z.stride(0) != z.stride(1) * z.shape[1]:     # the rows are evenly apart
        z = z.clone(memory_format=torch.contiguous_format)
    norm = _GatedNorm.apply if _wants_gradients(y, z, weight) else run_norm
    return norm(y, z, weight, groups, eps)


def softmax_gradient(logits, targets, vocab_size):
    """
    The sum of the cross-entropies of logits (R, V), of which the first vocab_size count, for
    targets (R,), where a negative one is ignored, and the gradient of it, which takes the place of
    the logits.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    sizes = vocab_size, logits.shape[1], 4096
    version = logits.device.index, *sizes, *_kinds(logits, targets)
    with torch.cuda.device_of(logits):
        _start_softmax_gradient((len(logits), 1, 1), version, (logits, targets, losses), *sizes)
    return losses.sum(), logits


def cast(dtype, tensors):
    """The tensors, which may be None, in this dtype; by one kernel for five of them."""
    cast, size = list(tensors), 4096
    others = [i for i, t in enumerate(tensors) if t is not None and t.dtype != dtype]
    for five in (others[i:i + 5] for i in range(0, len(others), 5)):
        before = [tensors[i].contiguous() for i in five]
        after = [t.new_empty(t.shape, dtype=dtype) for t in before]
        for i, t in zip(five, after):
            cast[i] = t
        counts = [t.numel() for t in before] + [0] * (5 - len(five))
        before, after = (t + t[:1] * (5 - len(five)) for t in (before, after))
        version = before[0].device.index, *_kinds(*before, *after), *_facts(*counts)
        with torch.cuda.device_of(before[0]):
            _start_cast((sum(-(-n // size) for n in counts), 1, 1), version, (*before, *after),
                        *counts, size)
    return cast
