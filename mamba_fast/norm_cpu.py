"""RMSNorm, and the gated norm of Mamba-2, on a CPU by norm_cpu.cpp, for numbers in float32."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import cpp
from .operators import as_operator, differentiable_once, is_exporting

NAME = "norm_cpu"
ROWS = 64       # of a task, as in norm_cpu.cpp
FEWEST = 2 ** 13    # numbers, of which RMSNorm takes longer by PyTorch


def gated_norm(y, z, weight, groups, eps):
    """RMSNorm of y silu(z), each of the groups of channels by itself, as GatedRMSNorm of mamba2.py:
    y, z (B, L, D) -> (B, L, D). None where it cannot run."""
    inputs = y, z, weight
    fits = (y.dim() == 3 and z.shape == y.shape and weight.shape == y.shape[2:]
            and y.shape[2] % (groups * cpp.WIDTH) == 0)
    if not (fits and all(map(cpp.is_float32_on_cpu, inputs))):
        return None
    if torch.compiler.is_compiling():
        runs = not is_exporting() and cpp.exists(NAME)
        return operator(*inputs, groups, eps) if runs else None
    return NativeNorm.apply(*inputs, groups, eps) if cpp.runs(NAME, *inputs) else None


class NativeNorm(torch.autograd.Function):
    saved = "y", "z", "weight"

    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(y.new_empty(0), y, z, weight)
        return normed(y, z, weight, groups, eps)

    @staticmethod
    @differentiable_once
    def backward(ctx, gout):
        _, y, z, weight = ctx.saved_tensors
        gz = None if z is None else y.new_empty(y.shape)
        gy, gweight = gradients(gout.contiguous(), y, z, weight, ctx.groups, ctx.eps, gz, None)
        return gy, gz, gweight, None, None


class RMSNorm(nn.RMSNorm):
    """That of PyTorch, but on a CPU in one pass."""

    def forward(self, x):
        weight, eps = self.weight, self.eps
        fits = (not torch.compiler.is_compiling() and weight is not None and eps is not None
                and weight.shape == x.shape[-1:] and x.numel() >= FEWEST
                and len(weight) % cpp.WIDTH == 0)
        if fits and cpp.runs(NAME, x, weight):
            return TwiceDifferentiable.apply(x, None, weight, 1, eps)
        return super().forward(x)


class TwiceDifferentiable(NativeNorm):
    """Of RMSNorm, which does not know whether the scan of the model is that, too."""

    @staticmethod
    def backward(ctx, gout):
        again = torch.is_grad_enabled()
        if not (again or torch._C._functorch.is_legacy_batchedtensor(gout)):
            return NativeNorm.backward(ctx, gout)
        _, x, _, weight = ctx.saved_tensors
        with torch.enable_grad():
            y = F.rms_norm(x, weight.shape, weight, ctx.eps)
        needed = [t for t in (x, weight) if t.requires_grad]
        grads = dict(zip(map(id, needed), torch.autograd.grad(y, needed, gout, create_graph=again)))
        return grads.get(id(x)), None, grads.get(id(weight)), None, None


def normed(y, z, weight, groups, eps):
    out = y.new_empty(y.shape)
    cpp.call(cpp.compiled(NAME).forward, *given(y, z, weight, groups, eps), out)
    return out


def gradients(gout, y, z, weight, groups, eps, gz, out):
    """gy and gweight. gz: where to write that of z, if there is one; its rows may be apart. out:
    None, or where to write what normed gave."""
    rows, gy = y.numel() // y.shape[-1], y.new_empty(y.shape)
    gweight = y.new_zeros((rows + ROWS - 1) // ROWS, y.shape[-1])
    cpp.call(cpp.compiled(NAME).backward, *given(y, z, weight, groups, eps), gout, gy,
             0 if gz is None else gz.stride(1), gz, gweight, out)
    return gy, gweight.sum(0)


def given(y, z, weight, groups, eps):
    """What both passes read, as C++ takes it."""
    rows, z = y.numel() // y.shape[-1], None if z is None else cpp.rows_of(z)
    return (rows, groups, y.shape[-1] // groups, 0 if z is None else z.stride(0), y.contiguous(), z,
            weight.contiguous(), float(eps))


# for torch.compile
operator = as_operator("mamba_py::gated_norm", NativeNorm, (
    "Tensor y, Tensor? z, Tensor weight, int groups, float eps"), results=("y",))
