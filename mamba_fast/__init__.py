"""
What makes mamba.py faster: the same numbers, sooner. Optional: without this folder all of it works.

This file is the one door. What mamba.py asks here, and where the answer is None, which means that
mamba.py does it in its own way:

    Linear, RMSNorm    classes, never None: those of torch.nn, but on some CPUs faster ones
    has_triton(...)    True or False: whether the Triton kernels can run here
    scan(...)          None where neither Triton's kernels nor the C++ of scan_cpu.cpp can run
    mix, mix2, mix3    None where no gradients are asked for, where the block has an adapter, a hook
                       or the like, and where its kernels cannot run
    in_chunks(...)     None where the C++ of ssd_cpu.cpp cannot run
    ssd                never None, and asked only where has_triton says True
    angles_since, keys_and_queries  None where neither Triton's kernels nor C++ can run, and in what
                       torch.compile compiles, for it fuses the plain way: keys_and_queries only
                       without Triton
    recurrence(...)    a function; None only where in_tiles has been edited
    softplus, gated    never None: the same with backward passes that keep less
    conv_silu(...)     None for the sequential scan, which can be differentiated twice, in what
                       torch.export exports, and in what torch.compile compiles where there are
                       neither Triton's kernels nor C++
    cross_entropy(...) None if all logits fit at once
    gated_norm(...)    None for the sequential scan, and where its kernels cannot run, which they
                       do not in what torch.compile compiles for a GPU
    decoder(...)       None if a module of the model is not just as our files made it
    unedited(...)      the same doors, but None behind those whose functions have been edited

What scripts use: quantize_int8 (of int8.py), recorded and replayed (CUDA graphs, of decode.py).
"""
from __future__ import annotations

import functools
import sys

import torch

from . import layers, norm_cpu, scan_cpu, scan_side_by_side, ssd_cpu, turn_cpu
from .block import mix, mix2, mix3
from .decode import decoder, recorded, replayed
from .edits import left_of
from .int8 import quantize_int8
from .kernels import can_run, rows_triton, scan_triton, ssd_triton, turn_triton
from .layers import Linear, cross_entropy, gated, softplus
from .norm_cpu import RMSNorm

__all__ = ["Linear", "RMSNorm", "angles_since", "conv_silu", "cross_entropy", "decoder", "gated",
           "gated_norm", "has_triton", "in_chunks", "keys_and_queries", "mix", "mix2", "mix3",
           "quantize_int8", "recorded", "recurrence", "replayed", "scan", "softplus", "ssd",
           "unedited"]


def unedited(file, place):
    """
    These doors, but closed where what they do the work of has been edited.
    file: "mamba", "mamba2" or "mamba3".  place: its globals().
    """
    return left_of(sys.modules[__name__], file, place)


def has_triton(u, d_state, headdim=0):
    """Whether scan, or with a headdim ssd, can run for tensors like u, by its device and dtype, and
    for this d_state."""
    if not can_run(u) or d_state > 256:
        return False
    # int: what torch.compile knows by a symbol becomes a number
    return headdim == 0 or ssd_triton.fits(u.device, u.dtype, int(headdim), int(d_state))


def scan(method, u, delta, A, B, C, state, D=None, z=None, delta_bias=None, delta_softplus=False,
         return_last_state=True):
    """All of selective_scan at once; arguments and shapes as there. Returns y (B, L, D) and the
    last state (B, D, N), or y alone; None where neither Triton's kernels nor C++ can run."""
    options = D, z, delta_bias, delta_softplus
    if method == "triton":
        return scan_triton.selective_scan_triton(u, delta, A, B, C, *options, state,
                                                 return_last_state)
    results = scan_cpu.scan(u, delta, A, B, C, state, *options) if method == "chunked" else None
    return results if return_last_state or results is None else results[0]


def ssd(u, delta, a, B, C, state, own, dtype=None):
    """
    in_chunks of mamba2.py by kernels, where has_triton; arguments and shapes as there.
    dtype: to multiply in, that of u by default.  Returns y (B, L, H, P), in the type of u, and the
    last state (B, H, P, N).
    """
    y, last = ssd_triton.scan(u if dtype is None else u.to(dtype), delta, a, B, C, own, state)
    return y.to(u.dtype), last


def in_chunks(u, delta, a, B, C, state, own):
    """That of mamba2.py in C++; arguments and shapes as there."""
    return ssd_cpu.ssd(u, delta, a, B, C, state, own)


def angles_since(method, turns, entering):
    """That of mamba3.py for one document."""
    if torch.compiler.is_compiling() or turns.numel() == 0:
        return None
    return (turn_triton if method == "triton" else turn_cpu).angles_since(turns, entering)


def keys_and_queries(method, B, C, B_bias, C_bias, theta, dtype):
    """
    Those of Mamba-3 with one step for each token: B, C (B, L, G, N) normed, biases (H, N), theta
    (B, L, H, S). Returns k, q (B, L, H, N) and their scalar products; of Triton's kernels k and q
    have this dtype.
    """
    if method == "triton":
        return turn_triton.keys_and_queries(B, C, B_bias, C_bias, theta, dtype)
    return turn_cpu.keys_and_queries(B, C, B_bias, C_bias, theta)


def gated_norm(y, z, weight, groups, eps, scan):
    """RMSNorm of y silu(z), both (B, L, D), as in GatedRMSNorm of mamba2.py; scan: the method."""
    if scan == "sequential" or y.numel() == 0:
        return None
    if y.device.type == "cpu":
        return norm_cpu.gated_norm(y, z, weight, groups, eps)
    if scan == "chunked" or torch.compiler.is_compiling() or not can_run(y):
        return None
    return rows_triton.gated_norm(y, z, weight, groups, eps)


def recurrence(method, u, A):
    """
    What is best for u (B, L, D) and A (D, N), instead of in_tiles of mamba.py: a function
    (u, delta, A, B, C, state) -> y (B, L, D), last state (B, D, N).
    """
    if method == "triton":
        return functools.partial(scan, method)
    on_cpu_or_compiled = u.device.type == "cpu" or torch.compiler.is_compiling()
    return (scan_cpu if on_cpu_or_compiled else scan_side_by_side).recurrence


def conv_silu(x, weight, bias, state, scan):
    """
    silu of the causal convolution of x, (B, L, D), after the inputs in state, or None; arguments as
    in conv_silu of mamba.py. scan: the method of the scan, whose kernels there may be.
    """
    if scan == "sequential":    # plain, so that it can be differentiated twice
        return None
    if scan in ("auto", "triton") and can_run(x):
        return scan_triton.conv_silu_triton(x, weight, bias, state)
    return layers.conv_silu(x, weight, bias, state)
