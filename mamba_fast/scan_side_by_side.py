"""
The recurrence of the selective scan on a GPU without Triton, and on Apple's.

As in_tiles of mamba.py, but a call costs more than its arithmetic there. So the sequence is cut
into stretches of K tiles, and each step of all K tiles is done by one call:

    1. every tile but the first of its stretch begins with a zero state
    2. K short calls pass the state from the end of each tile to the end of the next
    3. each step of a tile gets what is left there of the state in which the tile before ended

The backward pass does the same from the end.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .operators import differentiable_once

STEPS = 32              # of a tile, at most
NUMBERS = 2 ** 26       # in a buffer, at most, unless one tile has more: 256 MB


def recurrence(u, delta, A, B, C, state):
    """What one_by_one of mamba.py computes, with its shapes: y (B, L, D), last state (B, D, N)."""
    length = u.shape[1]
    tiles = math.ceil(length / STEPS)
    steps = math.ceil(length / tiles)
    if pad := tiles * steps - length:       # steps with delta = 0 change nothing
        u, delta, B, C = (F.pad(t, (0, 0, 0, pad)) for t in (u, delta, B, C))
    y, h = ScanSideBySide.apply(u, delta, A, B, C, state, steps)
    return y[:, :length], h


class ScanSideBySide(torch.autograd.Function):
    """The formulas are those of the tiles in mamba.py. L must be a multiple of steps."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, state, steps):
        tiles = Tiles(u, A, steps, "ah")
        y, h, starts = torch.empty_like(u), state.transpose(1, 2), []           # (B, N, D)
        for delta_s, u_s, B_s, C_s, y_s in tiles.cut(delta, u, B, C, y):        # (B, K, T, X) each
            starts.append(h)
            h_s = tiles.states(delta_s, delta_s * u_s, B_s, h)                  # (B, K, T, N, D)
            y_s.copy_(dot(C_s, h_s))
            h = h_s[:, -1, -1].clone()
        ctx.steps = steps
        ctx.save_for_backward(u, delta, A, B, C, *starts)
        return y, h.transpose(1, 2).contiguous()

    @staticmethod
    @differentiable_once
    def backward(ctx, gy, glast):
        u, delta, A, B, C, *starts = ctx.saved_tensors
        tiles = Tiles(u, A, ctx.steps, "ahg")
        gu, gdelta, gB, gC = (torch.empty_like(t) for t in (u, delta, B, C))
        carry = glast.transpose(1, 2)                   # a_{t+1} g_{t+1} of the step after
        gdelta_A, ones = torch.zeros_like(tiles.a), torch.ones_like(tiles.a[..., 0])
        with torch.autocast(u.device.type, enabled=False):
            pieces = tiles.cut(delta, u, B, C, gy.contiguous(), gdelta, gu, gB, gC)
            for start, piece in [*zip(starts, pieces)][::-1]:
                delta_s, u_s, B_s, C_s, gy_s, gdelta_s, gu_s, gB_s, gC_s = piece
                x_s = delta_s * u_s
                h = tiles.states(delta_s, x_s, B_s, start)                      # (B, K, T, N, D)
                a, g = tiles.adjoints(delta_s, gy_s, C_s, carry)
                gx_s = dot(B_s, g)
                gC_s.copy_(dot(gy_s, h.transpose(3, 4)))
                gB_s.copy_(dot(x_s, g.transpose(3, 4)))
                ag = a.mul_(g)
                carry = ag[:, 0, 0].clone()
                # times the state before each step; before a tile it is the last of another tile
                ag[:, 0, 0].mul_(start)
                ag[:, 1:, 0].mul_(h[:, :-1, -1])
                ag[:, :, 1:].mul_(h[:, :, :-1])         # now dLoss/d(delta A)
                K = ag.shape[1]
                gdelta_A[:, :K].addcmul_(ag, delta_s[..., None, :])
                gdelta_s.copy_(dot(ones[:, :K], ag.mul_(tiles.A))).addcmul_(gx_s, u_s)
                torch.mul(gx_s, delta_s, out=gu_s)
        gA = gdelta_A.flatten(0, 2).sum(0).t()
        return gu, gdelta, gA, gB, gC, carry.transpose(1, 2), None


class Tiles:
    """How a sequence is cut, and the buffers of a stretch of K tiles, (B, K, T, N, D)."""

    def __init__(self, u, A, steps, buffers):
        self.A, self.steps = A.t().contiguous(), steps                          # (N, D), T
        most = max(1, NUMBERS // (len(u) * A.numel() * steps))
        self.K = min(u.shape[1] // steps, most)         # the last stretch may have fewer tiles
        for name in buffers:
            setattr(self, name, A.new_empty(len(u), self.K, steps, *self.A.shape))

    def cut(self, *tensors):
        """The tensors (B, L, X) as a list of stretches, which have a view (B, K, T, X) of each."""
        parts = (t.split(self.K * self.steps, dim=1) for t in tensors)
        return [[t.unflatten(1, (-1, self.steps)) for t in stretch] for stretch in zip(*parts)]

    def states(self, delta, x, B, start):
        """h, the states of a stretch, and their decays in a. start, (B, N, D), enters it."""
        K = delta.shape[1]
        a, h = self.a[:, :K], self.h[:, :K]
        torch.mul(delta[..., None, :], self.A, out=a).exp_()
        torch.mul(x[..., None, :], B[..., None], out=h)
        h[:, 0, 0].addcmul_(a[:, 0, 0], start)
        h_steps = h.unbind(2)
        for a_t, h_t, before in zip(a.unbind(2)[1:], h_steps[1:], h_steps):
            h_t.addcmul_(a_t, before)
        if K > 1:
            # what is left at each step of what entered its tile
            left = torch.mul(delta[:, 1:].cumsum(2)[..., None, :], self.A).exp_()
            for k in range(1, K):
                h[:, k, -1].addcmul_(left[:, k - 1, -1], h[:, k - 1, -1])
            h[:, 1:, :-1].addcmul_(left[:, :, :-1], h[:, :-1, -1:])
        return h

    def adjoints(self, delta, gy, C, carry):
        """a, and g = dLoss/dh of a stretch. carry, (B, N, D), comes from the stretch after."""
        K = delta.shape[1]
        a, g = self.a[:, :K], self.g[:, :K]
        torch.mul(gy[..., None, :], C[..., None], out=g)
        g[:, -1, -1].add_(carry)
        g_steps = g.unbind(2)
        for a_later, later, g_t in zip(a.unbind(2)[:0:-1], g_steps[:0:-1], g_steps[-2::-1]):
            g_t.addcmul_(a_later, later)
        if K > 1:
            # what reaches each step of what enters its tile at the end
            after = F.pad(delta[:, :-1, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2)
            left = torch.mul(after[..., None, :], self.A).exp_()
            for k in reversed(range(K - 1)):
                g[:, k, 0].addcmul_(left[:, k, 0], a[:, k + 1, 0] * g[:, k + 1, 0])
            g[:, :-1, 1:].addcmul_(left[:, :, 1:], a[:, 1:, :1] * g[:, 1:, :1])
        return a, g


def dot(weights, x):
    """(B, K, T, N) . (B, K, T, N, D) -> (B, K, T, D), as one batch of products."""
    y = torch.bmm(weights.reshape(-1, 1, weights.shape[3]), x.flatten(0, 2))
    return y.view(*weights.shape[:3], -1)
