"""The scan of Mamba-2 and 3 on a CPU by ssd_cpu.cpp, for numbers in float32."""
from __future__ import annotations

import ctypes
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


class BeforeScan(ctypes.Structure):
    """What a block of Mamba-2 has for C++ to do before the scan, too; said in ssd_cpu.cpp."""

    _fields_ = (*((name, ctypes.c_void_p) for name in (
        "A", "D", "dt_bias", "taps", "bias", "grads")),
        ("K", ctypes.c_long), ("least", ctypes.c_float), ("most", ctypes.c_float))

    @classmethod
    def of(cls, A, D, dt_bias, taps, bias, limits, grads=None):
        """limits: of delta.  grads: zeros, a row for each sequence, with place for those of all
        five."""
        given = [t.contiguous() for t in (A, D, dt_bias, taps, bias)]
        pointers = [None if t is None else t.data_ptr() for t in (*given, grads)]
        made = cls(*pointers, len(taps), *limits)
        made.kept = given, grads        # they have to live as long
        return made


class NativeSSD(torch.autograd.Function):
    saved = "u", "delta", "a", "B", "C", "own"

    @staticmethod
    def forward(ctx, u, delta, a, B, C, own, state, keep):
        last = state.clone(memory_format=torch.contiguous_format)
        y, kept = scanned(None, u, delta, a, B, C, own, last, keep)
        ctx.save_for_backward(kept, u, delta, a, B, C, own)
        return y, last

    @staticmethod
    @differentiable_once
    def backward(ctx, gy, glast):
        kept, *inputs = ctx.saved_tensors
        cpp.check_kept(kept)
        gstate = glast.clone(memory_format=torch.contiguous_format)
        gu, gB, gC = (t.new_empty(t.shape) for t in (inputs[0], inputs[3], inputs[4]))
        gdelta, ga, gown = (t.new_empty(t.shape) for t in (inputs[1], inputs[2], inputs[5]))
        gradients(gy.contiguous(), gstate, kept, None, *inputs, gu, gdelta, ga, gB, gC, gown)
        return gu, gdelta, ga, gB, gC, gown, gstate, None


def scanned(before, u, delta, a, B, C, own, state, keep):
    """y, and with keep what backward needs. state becomes the last one; None: it begins with zeros.
    before: None, or a BeforeScan, with which a and own are None."""
    kept = u.new_empty(math.ceil(u.shape[1] / STEPS) if keep else 0, len(u), *u.shape[2:],
                       B.shape[3])
    y = u.new_empty(u.shape)
    cpp.call(cpp.compiled(NAME).forward, *given(before, u, delta, a, B, C, own), state, y,
             kept if keep else None)
    return y, kept


def gradients(gy, gstate, kept, before, u, delta, a, B, C, own, gu, gdelta, ga, gB, gC, gown):
    """gu, ...: where to write these; the steps of gu and gdelta may be apart. gstate, that of the
    last state, becomes that of the first; None: it is zeros, and that of the first is not asked
    for."""
    parts = math.ceil(u.shape[2] // B.shape[2] / HEADS)     # of the heads that share B and C
    without_sums = parts == 1 and gB.is_contiguous() and gC.is_contiguous()
    sums = (gB, gC) if without_sums else B.new_empty(2, parts, *B.shape)
    cpp.call(cpp.compiled(NAME).backward, *given(before, u, delta, a, B, C, own), kept, gy, gstate,
             gu.stride(1), gdelta.stride(1), gu, gdelta, ga, *sums, gown)
    if not without_sums:
        for g, sums_g in zip((gB, gC), sums):
            torch.sum(sums_g, 0, out=g)


def given(before, u, delta, a, B, C, own):
    """What both passes read, as C++ takes it: the steps of u, of delta, and of B and C, may be
    apart."""
    u, B, C = (t if has_even_steps(t) else t.contiguous() for t in (u, B, C))
    if B.stride(1) != C.stride(1):
        B, C = B.contiguous(), C.contiguous()
    if before is None:
        delta, a, own = (t.contiguous() for t in (delta, a, own))
    return (before, *u.shape, *B.shape[2:], u.stride(1), B.stride(1), delta.stride(1), u, delta, a,
            B, C, own)


def has_even_steps(t):
    """Whether t (B, L, X, Y) lies in memory as part of a (B, L, Z) that is contiguous."""
    _, length, _, last = t.shape
    return t.stride()[2:] == (last, 1) and t.stride(0) == length * t.stride(1)


# for torch.compile
operator = as_operator("mamba_py::ssd", NativeSSD, (
    "Tensor u, Tensor delta, Tensor a, Tensor B, Tensor C, Tensor own, Tensor state, bool keep"),
    results=("u", "state"))
