"""
The recurrence of the selective scan in what torch.compile compiles on a CPU.

As in_tiles of mamba.py, but in the forward pass the states of a tile are never in memory: its steps
are written out one after the other, and the compiler makes one loop over batch and channels of
them, in which decays and states stay in registers. Each input is read once.
"""
from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from .operators import as_operator

STRETCH, TILE = 64, 8   # steps of one call, and of one loop in it


class CompiledScan(torch.autograd.Function):
    """
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t . h_t, a stretch at a time.

    The state is (D, N) inside too, not (N, D) as in mamba.py: the sum over N is within the loop
    over channels. Kept are the states before every second tile.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, state, keep):
        """y (B, L, D) and the last state (B, D, N); keep: whether there will be a backward pass."""
        inputs, y, kept = in_stretches(delta, u, B, C), torch.empty_like(u), []
        h = state.contiguous()
        for *inputs_s, y_s in zip(*(t.split(STRETCH, dim=1) for t in (*inputs, y))):
            result, h, kept_s = _compiled(stretch_forward)(*inputs_s, A, h)
            y_s.copy_(result[:, :y_s.shape[1]])
            kept += kept_s if keep else []
        ctx.save_for_backward(u, delta, A, B, C, *(kept or [h]))    # an operator returns some
        return y, h

    @staticmethod
    def backward(ctx, gy, glast):
        u, delta, A, B, C, *kept = ctx.saved_tensors
        inputs, carry = in_stretches(delta, u, B, C, gy), glast.contiguous()
        some = STRETCH // TILE // 2                     # states of a stretch
        kept = [kept[i:i + some] for i in range(0, len(kept), some)]
        grads, gA = [*map(torch.empty_like, (delta, u, B, C))], torch.zeros_like(carry)
        pieces = zip(*(t.split(STRETCH, dim=1) for t in (*inputs, *grads)), kept)
        for *inputs_s, gdelta_s, gu_s, gB_s, gC_s, kept_s in [*pieces][::-1]:
            *results, carry, gA = _compiled(stretch_backward)(*inputs_s, kept_s, A, carry, gA)
            for grad_s, result in zip((gdelta_s, gu_s, gB_s, gC_s), results):
                grad_s.copy_(result[:, :grad_s.shape[1]])
        gdelta, gu, gB, gC = grads
        return gu, gdelta, gA.sum(0), gB, gC, carry, None


def in_stretches(*tensors):
    """Tensors (B, L, X) as long as whole stretches: steps with delta = 0 change nothing."""
    # always the same strides, for which the code is compiled
    pad = -tensors[0].shape[1] % STRETCH
    return [F.pad(t, (0, 0, 0, pad)) if pad else t.contiguous() for t in tensors]


@functools.cache
def _compiled(function):
    # the usual limit of the size of a loop would cut the steps of a tile apart
    return torch.compile(function, dynamic=False,
                         options={"max_fusion_size": 4096, "size_asserts": False})


def stretch_forward(delta, u, B, C, A, h):
    """y (B, STRETCH, D), the state after the stretch, and a list of those before tiles 0, 2, ..."""
    ys, starts = [], []
    for i, tile in enumerate(zip(*(t.split(TILE, dim=1) for t in (delta, u, B, C)))):
        if i % 2 == 0:
            starts.append(h)
        y, h = tile_forward(*tile, A, h)
        ys.append(y)
    return torch.cat(ys, dim=1), h, starts


def stretch_backward(delta, u, B, C, gy, starts, A, carry, gA):
    """
    The gradients of delta, u, B and C; the carry for the stretch before; the gradient of A so far.
    carry: (B, D, N), a_{t+1} g_{t+1} of the step after, where g is dLoss/dh as in mamba.py.
    """
    tiles = [*zip(*(t.split(TILE, dim=1) for t in (delta, u, B, C, gy)))]
    results = []
    for first, second, h in [*zip(tiles[::2], tiles[1::2], starts)][::-1]:
        for tile, start in ((second, tile_end(*first[:3], A, h)), (first, h)):
            *result, carry, gA = tile_backward(*tile, A, start, carry, gA)
            results.insert(0, result)
    gdelta, gx, gB, gC = (torch.cat(t, dim=1) for t in zip(*results))
    return gdelta + gx * u, gx * delta, gB, gC, carry, gA


def one_step(delta_t, u_t, B_t, A, h):
    """The decay of a step, and the state after it. exp2 and clamp: see Tiles in mamba.py."""
    delta_A_log2 = delta_t[:, :, None] * (A / math.log(2))
    decay = torch.exp2(delta_A_log2.clamp(min=-64 / math.log(2)))
    return decay, decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None]


def steps_of(*tensors):
    """The tensors (B, T, X) of a tile, step by step: (B, X) of each."""
    return list(zip(*(t.unbind(1) for t in tensors)))


# what it decorates is compiled once, however often it is called
_nested = torch.compiler.nested_compile_region


@_nested
def tile_forward(delta, u, B, C, A, h):
    """y (B, TILE, D) of a tile, and the state after it."""
    ys = []
    for *inputs_t, C_t in steps_of(delta, u, B, C):
        h = one_step(*inputs_t, A, h)[1]
        ys.append((h * C_t[:, None]).sum(-1))                                   # (B, D)
    return torch.stack(ys, dim=1), h


@_nested
def tile_end(delta, u, B, A, h):
    """The state after a tile alone, for the backward pass."""
    for inputs_t in steps_of(delta, u, B):
        h = one_step(*inputs_t, A, h)[1]
    return h


@_nested
def tile_backward(delta, u, B, C, gy, A, h, carry, gA):
    """As stretch_backward, but delta's through A alone, and gx, that of x = delta u, for gu."""
    before, decays = [], []
    for inputs_t in steps_of(delta, u, B):
        before.append(h)
        decay, h = one_step(*inputs_t, A, h)
        decays.append(decay)
    after = [*before[1:], h]
    steps = [*zip(steps_of(delta, u, B, C, gy), decays, before, after)]
    grads, gA_here = [], 0
    for (delta_t, u_t, B_t, C_t, gy_t), decay, h_before, h_after in steps[::-1]:
        g = carry + gy_t[:, :, None] * C_t[:, None]                             # dLoss/dh_t
        gx = (g * B_t[:, None]).sum(-1)                                         # (B, D)
        gB = (g * (delta_t * u_t)[:, :, None]).sum(1)                           # (B, N)
        gC = (h_after * gy_t[:, :, None]).sum(1)                                # (B, N)
        carry = g * decay
        gdelta_A = carry * h_before                                     # dLoss/d(delta_t A)
        gA_here = gA_here + gdelta_A * delta_t[:, :, None]
        grads.insert(0, ((gdelta_A * A).sum(-1), gx, gB, gC))
    return *(torch.stack(t, dim=1) for t in zip(*grads)), carry, gA + gA_here


# (u, delta, A, B, C, state) -> y (B, L, D), last state (B, D, N): what one_by_one of mamba.py does
recurrence = as_operator("mamba_py::compiled_scan", CompiledScan, channels_first=True)
