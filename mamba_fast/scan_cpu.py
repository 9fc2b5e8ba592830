"""
The selective scan on a CPU: by scan_cpu.cpp, where that can be compiled, for numbers in float32;
else its recurrence by scan_tiles.py.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import cpp, scan_tiles
from .operators import Context, as_operator, differentiable_once

NAME = "scan_cpu"
TILE, GROUP = 16, 128   # steps of a tile and channels of a task, as in scan_cpu.cpp
PART = 2048             # steps of a long scan for whose inputs memory is filled up at once


def scan(u, delta, A, B, C, state, D=None, z=None, delta_bias=None, delta_softplus=False):
    """All of selective_scan of mamba.py, with its shapes: y and the last state; or None where it
    cannot run."""
    tensors = [t for t in (u, delta, A, B, C, state, D, z, delta_bias) if t is not None]
    compiling = torch.compiler.is_compiling()
    if not (all(map(cpp.is_float32_on_cpu, tensors)) and (compiling or cpp.runs(NAME, *tensors))):
        return None
    if state is None:
        state = u.new_zeros(u.shape[0], *A.shape)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not (torch.is_grad_enabled() or compiling) and u.shape[2] % cpp.WIDTH and u.shape[1] > PART:
        y = torch.empty_like(u)     # filled up in whole the inputs would take much memory
        for i in range(0, u.shape[1], PART):
            u_p, delta_p, B_p, C_p, z_p = (
                None if t is None else t[:, i:i + PART] for t in (u, delta, B, C, z))
            y[:, i:i + PART], state = scan(u_p, delta_p, A, B_p, C_p, state, D, z_p, delta_bias,
                                           delta_softplus)
        return y, state
    inputs = u, delta, A, B, C, state, keep, D, z, delta_bias, delta_softplus
    return operator(*inputs) if compiling else NativeScan.apply(*inputs)


def recurrence(u, delta, A, B, C, state):
    """What one_by_one of mamba.py computes, with its shapes: y (B, L, D), last state (B, D, N). In
    what torch.compile compiles on any device."""
    inputs = u, delta, A, B, C, state
    if torch.compiler.is_compiling():
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        return operator(*inputs, keep, None, None, None, False)
    return scan(*inputs) or scan_tiles.recurrence(*inputs)


class NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, state, keep, D, z, delta_bias, delta_softplus):
        d_inner = u.shape[2]
        inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        h = filled_up(state.transpose(1, 2)).clone()        # it becomes the last state
        out, kept = inputs.forward(h, keep)
        ctx.delta_softplus = delta_softplus
        ctx.save_for_backward(kept, u, delta, A, B, C, D, z, delta_bias)
        return out[..., :d_inner].contiguous(), h[..., :d_inner].transpose(1, 2).contiguous()

    @staticmethod
    @differentiable_once
    def backward(ctx, gout, glast):
        kept, u, delta, A, B, C, D, z, delta_bias = ctx.saved_tensors
        cpp.check_kept(kept)
        inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus)
        carry = filled_up(glast.transpose(1, 2)).clone()                    # (B, N, D)
        gz, gB, gC = torch.empty_like(inputs.u), torch.empty_like(B), torch.empty_like(C)
        gu, gdelta, gA, gD, gbias = inputs.backward(kept, filled_up(gout), carry, gz, gB, gC)
        gu, gdelta, gz, gA, gstate, gD, gbias = (t[..., :u.shape[2]].contiguous() for t in (
            gu, gdelta, gz, gA, carry, gD, gbias))
        gA, gstate = gA.t().contiguous(), gstate.transpose(1, 2).contiguous()
        of_options = (None if t is None else g
                      for t, g in zip((D, z, delta_bias), (gD, gz, gbias)))
        return gu, gdelta, gA, gB, gC, gstate, None, *of_options, None


class Inputs:
    """What both passes read, as C++ takes it: sizes, then tensors with D filled up."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        z_row = 0
        if z is not None:       # often it is half of a projection: a row has the other half too
            z = cpp.rows_of(filled_up(z) if z.shape[2] % cpp.WIDTH else z)
            z_row = z.stride(0)
        self.u, A = filled_up(u), filled_up(A.t() / math.log(2))
        self.all = (*self.u.shape, len(A), self.u, filled_up(delta), A, B.contiguous(),
                    C.contiguous(), filled_up(D), z, filled_up(delta_bias), int(delta_softplus),
                    z_row)

    def forward(self, h, keep):
        """y, and with keep what backward needs. h (B, N, D) becomes the last state."""
        tiles, out = math.ceil(self.u.shape[1] / TILE) if keep else 0, torch.empty_like(self.u)
        kept = h.new_empty(tiles, *h.shape)                                 # (tiles, B, N, D)
        cpp.call(cpp.compiled(NAME).forward, *self.all, h, out, kept if keep else None)
        return out, kept

    def backward(self, kept, gout, carry, gz, gB, gC):
        """gu, gdelta, gA (N, D), gD and gbias. carry (B, N, D), the gradient of the last state,
        becomes that of the first. gz, gB, gC: where to write these; their rows may be apart."""
        gu, gdelta = torch.empty_like(self.u), torch.empty_like(self.u)
        gA, (gD, gbias) = torch.zeros_like(carry), carry.new_zeros(2, len(carry), carry.shape[2])
        sums = carry.new_empty(2, math.ceil(carry.shape[2] / GROUP), *gB.shape)
        cpp.call(cpp.compiled(NAME).backward, *self.all, gz.stride(1), kept, gout, carry, gu,
                 gdelta, gA, *sums, gD, gz, gbias)
        for g, sums_g in zip((gB, gC), sums):
            torch.sum(sums_g, 0, out=g)
        return gu, gdelta, gA.sum(0), gD.sum(0), gbias.sum(0)


def filled_up(t):
    """t (..., D) or None, contiguous and with D filled up to whole vectors."""
    if t is None:
        return None
    missing = -t.shape[-1] % cpp.WIDTH
    return F.pad(t, (0, missing)) if missing else t.contiguous()


class PlainScan:
    """NativeScan by PyTorch's operations, without autograd, which does not look into operators."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, state, keep, D, z, delta_bias, delta_softplus):
        ctx.save_for_backward(state.clone(), u, delta, A, B, C, D, z, delta_bias)
        delta = step_sizes(delta, delta_bias, delta_softplus)
        y, h = scan_tiles.TiledScan.forward(Context(), u, delta, A, B, C, state, False)
        y = y if D is None else y + D * u
        return (y if z is None else y * F.silu(z)).contiguous(), h.contiguous()

    @staticmethod
    def backward(ctx, gout, glast):
        state, u, delta, A, B, C, D, z, delta_bias = ctx.saved_tensors
        before, delta = delta, step_sizes(delta, delta_bias, ctx.delta_softplus)
        tiles, gy = Context(), gout if z is None else gout * F.silu(z)
        inputs = u, delta, A, B, C, state.view(len(u), *A.shape), True
        y, _ = scan_tiles.TiledScan.forward(tiles, *inputs)     # once more, for what it keeps
        gu, gdelta, *others = scan_tiles.TiledScan.backward(tiles, gy, glast)
        gD = gz = gbias = None
        if D is not None:
            y, gu, gD = y + D * u, gu + D * gy, (gy * u).sum((0, 1))
        if z is not None:
            gz = torch.ops.aten.silu_backward(gout * y, z)
        if ctx.delta_softplus:
            gdelta = gdelta * torch.sigmoid(before if delta_bias is None else before + delta_bias)
        if delta_bias is not None:
            gbias = gdelta.sum((0, 1))
        grads = gu, gdelta, *others[:4]
        gz = None if gz is None else gz.contiguous()
        return *(t.contiguous() for t in grads), None, gD, gz, gbias, None


def step_sizes(delta, bias, is_softplus):
    """delta as the recurrence takes it."""
    delta = delta if bias is None else delta + bias
    return F.softplus(delta) if is_softplus else delta


class EitherScan:
    """What runs here. An operator is chosen before that is known: for torch.export it may be on
    another machine."""

    saved = "u", "delta", "A", "B", "C", "D", "z", "delta_bias"

    @staticmethod
    def forward(ctx, u, *inputs):
        return EitherScan.of(u).forward(ctx, u, *inputs)

    @staticmethod
    def backward(ctx, gout, *inputs):
        return EitherScan.of(gout).backward(ctx, gout, *inputs)

    @staticmethod
    def of(tensor):
        return NativeScan if cpp.runs(NAME, tensor) else PlainScan


# for torch.compile and torch.export
operator = as_operator("mamba_py::scan", EitherScan, (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor state, bool keep, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus"), results=("u", "state"))
