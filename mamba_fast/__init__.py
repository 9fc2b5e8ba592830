"""
What makes mamba.py faster: the same numbers, sooner. Optional: without this folder everything works.

This file is the one door. mamba.py asks here, and each answer is None where there is nothing to offer:
for another device, another dtype, or where a module is not exactly the one that would be replaced.
"""
from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .decode import decoder, recorded, replayed
from .int8 import quantize_int8
from .layers import Linear, causal_conv, cross_entropy

try:
    from . import scan_triton
except ImportError:         # no Triton, as on a CPU or a Mac
    scan_triton = None

__all__ = ["Linear", "compiles_well", "conv_silu", "cross_entropy", "decoder", "has_triton", "quantize_int8",
           "recorded", "recurrence", "replayed", "scan"]

COMPILES = hasattr(torch.compiler, "nested_compile_region")     # torch 2.8


def has_triton(u, d_state):
    """Whether the fused kernels can run for a sequence like u (device and dtype) and this d_state."""
    return (scan_triton is not None and u.device.type == "cuda" and scan_triton.runs_on(u.device)
            and u.dtype != torch.float64 and d_state <= 256)


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state):
    """The whole of selective_scan by the fused kernels, where has_triton: y and the last state."""
    return scan_triton.selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state)


def compiles_well(device, d_state):
    """Whether torch.compile on a model also compiles its scan: on a CPU, if a state fills whole vectors."""
    return device.type == "cpu" and d_state % 8 == 0 and COMPILES


def recurrence(u, A, in_tiles):
    """A better way to use in_tiles, or another recurrence: (u, delta, A, B, C, state) -> (y, last state)."""
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    if torch.compiler.is_compiling():
        if compiles_well(u.device, d_state):
            from . import scan_compiled
            return scan_compiled.recurrence
        return None
    if u.device.type != "cpu":
        return functools.partial(side_by_side, in_tiles)
    size = batch * d_inner * d_state
    if 2 / 3 * 2 ** 15 < size <= 2 ** 15:
        return functools.partial(on_all_cores, in_tiles, 2 ** 15 // (batch * d_inner) + 1 - d_state)
    return None


def on_all_cores(in_tiles, more, u, delta, A, B, C, state):
    """PyTorch runs a call of up to 2^15 numbers on one thread; `more` zeros in each state wake the others."""
    y, h = in_tiles(u, delta, *(F.pad(t, (0, more)) for t in (A, B, C, state)))
    return y, h[..., :A.shape[1]]


def side_by_side(in_tiles, u, delta, A, B, C, state):
    """
    For a GPU without Triton, where a call costs more than its arithmetic: the sequence is cut into K parts
    that become rows of one batch. (1) What each adds to a zero state; (2) what enters each of them, for
    which a short loop passes the state on; (3) the outputs of each from there.
    """
    length, size = u.shape[1], len(u) * A.numel()           # size: numbers in the states of one step
    K = max(1, min(length // 32, 2 ** 26 // (8 * size)))    # a buffer of in_tiles has at most 256 MB
    pad = -length % K                                       # steps with delta = 0 change nothing
    rows = lambda t: F.pad(t, (0, 0, 0, pad)).unflatten(1, (K, -1)).flatten(0, 1)   # (B K, L / K, X)
    u, delta, B, C = (rows(t) for t in (u, delta, B, C))
    _, ends = in_tiles(u, delta, A, B, C, u.new_zeros(len(u), *A.shape))
    decay = torch.exp(delta.sum(1)[..., None] * A)                              # (B K, D, N)
    starts = [state]
    for decay_k, end_k in zip(*(t.unflatten(0, (-1, K)).unbind(1) for t in (decay, ends))):
        starts.append(decay_k * starts[-1] + end_k)
    y, _ = in_tiles(u, delta, A, B, C, torch.stack(starts[:-1], 1).flatten(0, 1))
    return y.unflatten(0, (-1, K)).flatten(1, 2)[:, :length], starts[-1]


def conv_silu(x, weight, bias, state, scan):
    """silu of the causal convolution of x, (B, L, D), after the inputs in state. scan: the method of the scan."""
    if scan in ("auto", "triton") and has_triton(x, 1):
        return scan_triton.conv_silu_triton(x, weight, bias, state)
    y = causal_conv(x, weight, bias, state)
    return None if y is None else F.silu(y)
