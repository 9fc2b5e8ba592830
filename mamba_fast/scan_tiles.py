"""
The recurrence of the selective scan on a CPU, in tiles of T steps as in mamba.py, in half the time.

The buffers a, h and g hold the steps of one tile, (B, T, N, D), and are used again for the next, so
that they stay in the cache. Kept is the state that enters each tile; backward makes the others
again. What is not the recurrence is cut out for a few tiles at once.

    forward, per tile     a_t = exp(delta_t A)    h_t = a_t h_{t-1} + x_t B_t    y_t = C_t . h_t
    backward, in reverse  g_t = C_t gy_t + a_{t+1} g_{t+1}                       g_t is dLoss/dh_t
                          gC_t = h_t . gy_t   gB_t = g_t . x_t   gx_t = B_t . g_t    x = delta u
                          dLoss/d(delta_t A) = g_t a_t h_{t-1}: for the gradients of delta and A

The state is (N, D) inside, channels innermost: products and sums over N read it in order.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .operators import as_operator

ONE_THREAD = 2 ** 15    # numbers up to which PyTorch runs a call on one thread


def recurrence(u, delta, A, B, C, state):
    """What one_by_one of mamba.py computes, with its shapes: y (B, L, D), last state (B, D, N)."""
    (batch, _, d_inner), d_state = u.shape, A.shape[1]
    size = batch * d_inner * d_state        # numbers in the states of one step
    if u.device.type == "cpu" and 2 / 3 * ONE_THREAD < size <= ONE_THREAD:
        # as few zeros in each state as it takes for a step to be run on all threads
        more = ONE_THREAD // (batch * d_inner) + 1 - d_state
        A, B, C, state = (F.pad(t, (0, more)) for t in (A, B, C, state))
    inputs = (u, delta, A, B, C, state)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, h = TiledScan.apply(*inputs, keep)
    return y, h[..., :d_state]


class TiledScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, state, keep):
        tiles, i = Tiles(u, delta, A, 2), 0
        y, last_state = torch.empty_like(u), torch.empty_like(state)
        # the states (B, N, D) between tiles; not to keep them, one place is used again and again
        kept = A.new_empty(tiles.count + 1 if keep else 1, len(u), *tiles.A.shape)
        with torch.inference_mode():    # a call costs a fifth less than without gradients alone
            kept[0] = state.transpose(1, 2)
            for delta_s, u_s, B_s, C_s, y_s in tiles.cut((delta, u, B, C), (y,)):
                _, h = tiles.states(delta_s, delta_s * u_s, B_s, kept[i])   # (B, T, N, D)
                put(dot(C_s, h), y_s)                                       # (B, T, D)
                i += keep
                kept[i] = h[:, -1]
            last_state.copy_(kept[i].transpose(1, 2))
        ctx.save_for_backward(u, delta, A, B, C, kept)
        return y, last_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):
        u, delta, A, B, C, kept = ctx.saved_tensors
        tiles, carry, i = Tiles(u, delta, A, 3), glast.transpose(1, 2), -1
        gu, gdelta, gA, gB, gC, gstate = map(torch.empty_like, (u, delta, A, B, C, glast))
        with torch.autocast(u.device.type, enabled=False), torch.inference_mode():
            gdelta_A = torch.zeros_like(tiles.buffers[0])
            ones = torch.ones_like(gdelta_A[..., 0])
            inputs, outputs = (delta, u, B, C, gy), (gdelta, gu, gB, gC)
            for delta_s, u_s, B_s, C_s, gy_s, *places in tiles.cut(inputs, outputs, from_end=True):
                i, x_s = i - 1, delta_s * u_s
                a, h = tiles.states(delta_s, x_s, B_s, kept[i])             # (B, T, N, D)
                g = tiles.adjoints(gy_s, C_s, carry)
                gx_s = dot(B_s, g)
                gB_s, gC_s = dot(x_s, g.transpose(2, 3)), dot(gy_s, h.transpose(2, 3))
                a.mul_(g)
                carry = a[:, 0].clone()         # for the tile before
                a[:, 0].mul_(kept[i])
                a[:, 1:].mul_(h[:, :-1])        # now a has dLoss/d(delta A)
                gdelta_A.addcmul_(a, delta_s[:, :, None])
                gdelta_s = dot(ones, a.mul_(tiles.A)).addcmul_(gx_s, u_s)
                for grad, place in zip((gdelta_s, gx_s.mul_(delta_s), gB_s, gC_s), places):
                    put(grad, place)
            gA.copy_(gdelta_A.flatten(0, 1).sum(0).t())
            gstate.copy_(carry.transpose(1, 2))
        return gu, gdelta, gA, gB, gC, gstate, None


class Tiles:
    """How a sequence is cut into tiles of T steps, and the buffers of one tile, (B, T, N, D)."""

    def __init__(self, u, delta, A, buffers):
        (batch, self.length, _), on_cpu = u.shape, u.device.type == "cpu"
        self.T = steps_of_a_tile(self.length, batch * A.numel(), on_cpu)
        self.count = math.ceil(self.length / self.T)
        self.A = A.t().contiguous()                                         # (N, D)
        self.A_log2 = self.A / math.log(2)      # exp(delta A) as 2^(delta A / ln 2): exp2 is faster
        # On a CPU exp is some 100 times slower where the result is denormal (below -87), and so
        # are products with it. exp(-64) is 0 to any sum in float32 and has normal products.
        self.clamp = on_cpu and bool(delta.amax() * A.amin() < -64)
        self.buffers = A.new_empty(buffers, batch, self.T, *self.A.shape)
        self.each_step = [buffer.unbind(1) for buffer in self.buffers]      # T times (B, N, D)

    def cut(self, inputs, outputs, from_end=False):
        """Tile after tile of tensors (B, L, X): of inputs copies (B, T, X), the last one filled up
        with steps of delta 0, which change nothing; of outputs views, the last one shorter."""
        order, some = -1 if from_end else 1, 8 * self.T     # a few tiles at once: fewer calls
        for i in range(0, self.length, some)[::order]:
            missing = -min(some, self.length - i) % self.T
            tiles = [F.pad(t[:, i:i + some], (0, 0, 0, missing)).unflatten(1, (-1, self.T))
                     .transpose(0, 1).contiguous() for t in inputs]         # (8, B, T, X)
            tiles += [t[:, i:i + some].split(self.T, dim=1) for t in outputs]
            yield from [*zip(*tiles)][::order]

    def states(self, delta, x, B, h):
        """The decays a and the states h of a tile, (B, T, N, D) each; h (B, N, D) enters it."""
        a, hs = self.buffers[:2]
        torch.mul(delta[:, :, None], self.A_log2, out=a)
        if self.clamp:
            a.clamp_(min=-64 / math.log(2))
        a.exp2_()
        torch.mul(x[:, :, None], B[..., None], out=hs)
        for a_t, h_t in zip(*self.each_step[:2]):
            h = h_t.addcmul_(a_t, h)
        return a, hs

    def adjoints(self, gy, C, carry):
        """g of a tile; carry, a_{t+1} g_{t+1} of its last step, comes from the tile after."""
        gs, (a_steps, _, g_steps) = self.buffers[2], self.each_step
        torch.mul(gy[:, :, None], C[..., None], out=gs)
        g = g_steps[-1].add_(carry)
        for a_later, g_t in zip(a_steps[:0:-1], g_steps[-2::-1]):
            g = g_t.addcmul_(a_later, g)
        return gs


def steps_of_a_tile(length, size, on_cpu):
    """T, for size = B N D: on a CPU a buffer has about 2^19 numbers, 2 MB, to stay in the cache."""
    most = 2 ** max(2, min(6, round(math.log2((2 ** 19 if on_cpu else 2 ** 26) / size))))
    return math.ceil(length / math.ceil(length / most))


def dot(weights, x):
    """(B, T, N) . (B, T, N, D) -> (B, T, D), as one batch of products."""
    y = torch.bmm(weights.view(-1, 1, weights.shape[2]), x.flatten(0, 1))
    return y.view(*weights.shape[:2], -1)


def put(tile, place):
    """Copies a tile, (B, T, X), to its place in a whole sequence; that of the last is shorter."""
    place.copy_(tile[:, :place.shape[1]])


# the same for torch.compile and torch.export
operator = as_operator("mamba_py::tiles", TiledScan)
