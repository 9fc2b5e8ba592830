"""The angles, keys and queries of Mamba-3 on a CPU by turn_cpu.cpp, for numbers in float32."""
from __future__ import annotations

import torch

from . import cpp
from .operators import differentiable_once, is_traced

NAME = "turn_cpu"
ROWS = 64       # tokens of a task, as in turn_cpu.cpp


def keys_and_queries(B, C, B_bias, C_bias, theta):
    """As in turn_triton.py, in float32; None where it cannot run."""
    if torch.compiler.is_compiling() or is_traced():
        return None
    inputs, (*of_tokens, H, S), N = (B, C, B_bias, C_bias, theta), theta.shape, B.shape[3]
    fits = (N % (2 * cpp.WIDTH) == 0 and S % cpp.WIDTH == 0 and 2 * S <= N and C.shape == B.shape
            and [*B.shape[:2]] == of_tokens and B_bias.shape == C_bias.shape == (H, N))
    return NativeTurn.apply(*inputs) if fits and cpp.runs(NAME, *inputs) else None


def angles_since(turns, first):
    """That of mamba3.py for one document; None where it cannot run."""
    if torch.compiler.is_compiling() or is_traced():
        return None
    batch, _, H, S = turns.shape
    fits = H * S > 0 and H * S % cpp.WIDTH == 0 and first.shape == (batch, H, S)
    return NativeAngles.apply(turns, first) if fits and cpp.runs(NAME, turns, first) else None


class NativeAngles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, turns, first):
        since = turns.new_empty(turns.shape)
        cpp.call(cpp.compiled(NAME).angles, *turns.shape[:2], first[0].numel(), turns.contiguous(),
                 first.contiguous(), since)
        return since

    @staticmethod
    def backward(ctx, gsince):
        if torch.is_grad_enabled():     # it may be differentiated again
            return gsince.flip(1).cumsum(1).flip(1), gsince.sum(1)
        gturns, gfirst = gsince.new_empty(gsince.shape), gsince[:, 0].new_empty(gsince[:, 0].shape)
        cpp.call(cpp.compiled(NAME).angles_backward, *gsince.shape[:2], gfirst[0].numel(),
                 gsince.contiguous(), gturns, gfirst)
        return gturns, gfirst


class NativeTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, B, C, B_bias, C_bias, theta):
        inputs = [t.contiguous() for t in (B, C, B_bias, C_bias, theta)]
        k, q = (theta.new_empty(*theta.shape[:3], B.shape[3]) for _ in range(2))
        dots, ctx.groups = theta.new_empty(theta.shape[:3]), B.shape[2]
        cpp.call(cpp.compiled(NAME).forward, *sizes(k, theta, ctx.groups), *inputs, k, q, dots)
        ctx.save_for_backward(inputs[-1], k, q)
        return k, q, dots

    @staticmethod
    @differentiable_once
    def backward(ctx, *gradients):
        theta, k, q = ctx.saved_tensors
        batch, length, H, N = k.shape
        gB, gC = (k.new_zeros(batch, length, ctx.groups, N) for _ in range(2))
        gtheta = torch.empty_like(theta)
        tasks = -(-batch * length // ROWS)      # each has sums of its own
        of_biases = k.new_zeros(2, tasks, H, N)
        cpp.call(cpp.compiled(NAME).backward, *sizes(k, theta, ctx.groups), theta, k, q,
                 *(g.contiguous() for g in gradients), gB, gC, *of_biases, gtheta)
        return gB, gC, *of_biases.sum(1), gtheta


def sizes(k, theta, groups):
    batch, length, H, N = k.shape
    return batch * length, H, groups, N, theta.shape[3]
