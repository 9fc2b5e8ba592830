"""The gated norm of Mamba-2 on a CPU by norm_cpu.cpp, for numbers in float32."""
from __future__ import annotations

import torch

from . import cpp
from .operators import as_operator, differentiable_once, is_exporting

NAME = "norm_cpu"
ROWS = 64       # of a task, as in norm_cpu.cpp


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
        ctx.groups, ctx.eps, out = groups, eps, y.new_empty(y.shape)
        cpp.call(cpp.compiled(NAME).forward, *given(y, z, weight, groups, eps), out)
        ctx.save_for_backward(y.new_empty(0), y, z, weight)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, gout):
        _, y, z, weight = ctx.saved_tensors
        rows = y.shape[0] * y.shape[1]
        gy, gz = y.new_empty(y.shape), y.new_empty(y.shape)
        gweight = y.new_zeros((rows + ROWS - 1) // ROWS, y.shape[2])
        cpp.call(cpp.compiled(NAME).backward, *given(y, z, weight, ctx.groups, ctx.eps),
                 gout.contiguous(), gy, gz, gweight)
        return gy, gz, gweight.sum(0), None, None


def given(y, z, weight, groups, eps):
    """What both passes read, as C++ takes it."""
    z = cpp.rows_of(z)
    return (len(z), groups, y.shape[2] // groups, z.stride(0), y.contiguous(), z,
            weight.contiguous(), float(eps))


# for torch.compile
operator = as_operator("mamba_py::gated_norm", NativeNorm, (
    "Tensor y, Tensor z, Tensor weight, int groups, float eps"), results=("y",))
