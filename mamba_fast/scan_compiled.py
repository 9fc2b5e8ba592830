"""
The recurrence of the selective scan in what torch.compile compiles on a CPU.

The steps of a tile are written out one after the other. The compiler makes one loop over batch and channels of them, in
which decays and states stay in registers: each input is read once.
"""
from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

STRETCH, TILE = 64, 8   # steps that are one call, and those of them that are one loop


def recurrence(u, delta, A, B, C, h):
    """What one_by_one of mamba.py computes. The rest of the scan is left to the compiler of the model."""
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
_nested = torch.compiler.nested_compile_region


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
