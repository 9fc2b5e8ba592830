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

from .operators import differentiable_once

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
        # The states between tiles; not to keep them, one place is used again and again. Many small
        # tensors: PyTorch gets one large one as fresh memory, which costs a CPU more.
        kept = [A.new_empty(u.shape[0], *tiles.A.shape) for _ in range(tiles.count * keep + 1)]
        with torch.inference_mode():    # a call costs a fifth less than without gradients alone
            kept[0].copy_(state.transpose(1, 2))
            for part in tiles.parts:
                u_s, *others = tiles.cut(part, u, delta, B, C)              # (K, B, T, X)
                delta_s, B_s, C_s = (t.contiguous() for t in others)
                y_s = torch.empty_like(delta_s)
                each = tiles.each(delta_s, delta_s * u_s, B_s, C_s, y_s)
                for delta_k, x_k, B_k, C_k, y_k in each:                    # (B T, 1, X)
                    _, h = tiles.states(delta_k, x_k, B_k, kept[i])         # (B T, N, D)
                    torch.bmm(C_k, h, out=y_k)
                    i += keep
                    kept[i].copy_(tiles.each_step[1][-1])
                tiles.join(part, y, y_s)
            last_state.copy_(kept[i].transpose(1, 2))
        ctx.save_for_backward(u, delta, A, B, C, *kept)
        return y, last_state

    @staticmethod
    @differentiable_once
    def backward(ctx, gy, glast):
        u, delta, A, B, C, *kept = ctx.saved_tensors
        tiles, carry, i = Tiles(u, delta, A, 3), glast.transpose(1, 2), -1
        gu, gdelta, gA, gB, gC, gstate = map(torch.empty_like, (u, delta, A, B, C, glast))
        with torch.autocast(u.device.type, enabled=False), torch.inference_mode():
            gdelta_A = torch.zeros_like(tiles.flat[0])
            ones = A.new_ones(len(gdelta_A), 1, A.shape[1])
            decays, states, _ = tiles.buffers                               # (B, T, N, D)
            first, later, earlier = decays[:, 0], decays[:, 1:], states[:, :-1]
            for part in tiles.parts[::-1]:
                u_s, *others = tiles.cut(part, u, delta, B, C, gy)
                delta_s, *others = (t.contiguous() for t in others)
                inputs = (delta_s, delta_s * u_s, *others)
                grads = gdelta_s, gx_s, gB_s, gC_s = [*map(torch.empty_like, inputs[:4])]
                for tile in tiles.each(*inputs, *grads)[::-1]:              # (B T, 1, X)
                    delta_k, x_k, B_k, C_k, gy_k, gdelta_k, gx_k, gB_k, gC_k = tile
                    i -= 1
                    a, h = tiles.states(delta_k, x_k, B_k, kept[i])         # (B T, N, D)
                    g = tiles.adjoints(gy_k, C_k, carry)
                    torch.bmm(B_k, g, out=gx_k)
                    torch.bmm(x_k, g.transpose(1, 2), out=gB_k)
                    torch.bmm(gy_k, h.transpose(1, 2), out=gC_k)
                    a.mul_(g)
                    carry = first.clone()       # for the tile before
                    first.mul_(kept[i])
                    later.mul_(earlier)         # now a has dLoss/d(delta A)
                    gdelta_A.addcmul_(a, delta_k)
                    torch.bmm(ones, a.mul_(tiles.A), out=gdelta_k)
                gdelta_s.addcmul_(gx_s, u_s)
                for whole, grad_s in ((gdelta, gdelta_s), (gu, gx_s.mul_(delta_s)), (gB, gB_s),
                                      (gC, gC_s)):
                    tiles.join(part, whole, grad_s)
            gA.copy_(gdelta_A.sum(0).t())
            gstate.copy_(carry.transpose(1, 2))
        return gu, gdelta, gA, gB, gC, gstate, None


class Tiles:
    """How a sequence is cut into tiles of T steps, and the buffers of one tile, (B, T, N, D)."""

    def __init__(self, u, delta, A, buffers):
        (batch, length, _), on_cpu = u.shape, u.device.type == "cpu"
        self.T = steps_of_a_tile(length, batch * A.numel(), on_cpu)
        self.count = math.ceil(length / self.T)
        # What is not the recurrence is done for a few tiles at once, in fewer and larger calls;
        # with more than 8 it leaves the cache in between.
        some = 8 * self.T
        self.parts = [slice(i, i + some) for i in range(0, length, some)]
        self.A = A.t().contiguous()                                         # (N, D)
        self.A_log2 = self.A / math.log(2)      # exp(delta A) as 2^(delta A / ln 2): exp2 is faster
        # On a CPU exp is some 100 times slower where the result is denormal (below -87), and so
        # are products with it. exp(-64) is 0 to any sum in float32 and has normal products.
        self.clamp = on_cpu and bool(delta.amax() * A.amin() < -64)
        self.buffers = A.new_empty(buffers, batch, self.T, *self.A.shape)
        self.flat = self.buffers.flatten(1, 2)                              # (B T, N, D) each
        self.each_step = [buffer.unbind(1) for buffer in self.buffers]      # T times (B, N, D)

    def cut(self, part, *tensors):
        """A part of each tensor (B, L, X) in tiles, (K, B, T, X); the last tile is filled up with
        steps of delta 0, which change nothing."""
        for t in tensors:
            t = t[:, part]
            if missing := -t.shape[1] % self.T:
                t = F.pad(t, (0, 0, 0, missing))
            yield t.unflatten(1, (-1, self.T)).transpose(0, 1)

    def each(self, *tensors):
        """For each of K tiles what these tensors (K, B, T, X) have of it, (B T, 1, X) each."""
        return [*zip(*(t.view(len(t), -1, 1, t.shape[3]).unbind() for t in tensors))]

    def join(self, part, whole, tiles):
        """Copies tiles (K, B, T, X) into their part of whole, (B, L, X)."""
        place = whole[:, part]
        if place.shape[1] % self.T == 0:
            place.unflatten(1, (-1, self.T)).transpose(0, 1).copy_(tiles)
        else:
            place.copy_(tiles.transpose(0, 1).flatten(1, 2)[:, :place.shape[1]])

    def states(self, delta, x, B, h):
        """The decays a and the states h of a tile, (B T, N, D) each; h (B, N, D) enters it."""
        a, hs = self.flat[:2]
        torch.mul(delta, self.A_log2, out=a)
        if self.clamp:
            a.clamp_(min=-64 / math.log(2))
        a.exp2_()
        torch.mul(x, B.transpose(1, 2), out=hs)
        for a_t, h_t in zip(*self.each_step[:2]):
            h = h_t.addcmul_(a_t, h)
        return a, hs

    def adjoints(self, gy, C, carry):
        """g of a tile; carry, a_{t+1} g_{t+1} of its last step, comes from the tile after."""
        gs, (a_steps, _, g_steps) = self.flat[2], self.each_step
        torch.mul(gy, C.transpose(1, 2), out=gs)
        g = g_steps[-1].add_(carry)
        for a_later, g_t in zip(a_steps[:0:-1], g_steps[-2::-1]):
            g = g_t.addcmul_(a_later, g)
        return gs


def steps_of_a_tile(length, size, on_cpu):
    """T, for size = B N D: on a CPU a buffer has about 2^19 numbers, 2 MB, to stay in the cache."""
    most = 2 ** max(2, min(6, round(math.log2((2 ** 19 if on_cpu else 2 ** 26) / size))))
    return math.ceil(length / math.ceil(length / most))

