"""The scan of Mamba-2 and 3 on a CPU by ssd_cpu.cpp, for numbers in float32."""
from __future__ import annotations

import math

import torch

from . import cpp
from .operators import as_operator, differentiable_once, is_exporting

NAME = "ssd_cpu"
STEPS, HEADS = 64, 4    # from one kept state to the next, and of a task, as in ssd_cpu.cpp


def ssd(u, delta, a, B, C, state, own):
    """in_chunks of mamba2.py, with its shapes; or None where it cannot run."""
    inputs = u, delta, a, B, C, own, state
    fits = u.shape[3] % cpp.WIDTH == 0 and B.shape[3] % cpp.WIDTH == 0
    if is_exporting() or not (fits and all(map(cpp.is_float32_on_cpu, inputs))):
        return None
    compiling = torch.compiler.is_compiling()
    if not (cpp.exists(NAME) if compiling else cpp.runs(NAME, *inputs)):
        return None
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return (operator if compiling else NativeSSD.apply)(*inputs, keep)


class NativeSSD(torch.autograd.Function):
    saved = "u", "delta", "a", "B", "C", "own"

    @staticmethod
    def forward(ctx, u, delta, a, B, C, own, state, keep):
        inputs = [t.contiguous() for t in (u, delta, a, B, C, own)]
        last, y = state.clone(memory_format=torch.contiguous_format), torch.empty_like(inputs[0])
        kept = last.new_empty(math.ceil(u.shape[1] / STEPS) if keep else 0, *last.shape)
        cpp.call(cpp.compiled(NAME).forward, *u.shape, *B.shape[2:], *inputs, last, y,
                 kept if keep else None)
        ctx.save_for_backward(kept, u, delta, a, B, C, own)
        return y, last

    @staticmethod
    @differentiable_once
    def backward(ctx, gy, glast):
        kept, *inputs = ctx.saved_tensors
        cpp.check_kept(kept)
        inputs = [t.contiguous() for t in inputs]
        u, B = inputs[0], inputs[3]
        gu, gdelta, ga, _, _, gown = map(torch.empty_like, inputs)
        gstate = glast.clone(memory_format=torch.contiguous_format)
        gB, gC = B.new_empty(2, math.ceil(u.shape[2] // B.shape[2] / HEADS), *B.shape)
        cpp.call(cpp.compiled(NAME).backward, *u.shape, *B.shape[2:], *inputs, kept,
                 gy.contiguous(), gstate, gu, gdelta, ga, gB, gC, gown)
        return gu, gdelta, ga, gB.sum(0), gC.sum(0), gown, gstate, None


# for torch.compile
operator = as_operator("mamba_py::ssd", NativeSSD, (
    "Tensor u, Tensor delta, Tensor a, Tensor B, Tensor C, Tensor own, Tensor state, bool keep"),
    results=("u", "state"))
