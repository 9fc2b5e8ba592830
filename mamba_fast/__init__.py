"""
What makes mamba.py faster: the same numbers, sooner. Optional: without this folder all of it works.

This file is the one door. What mamba.py asks here, and where the answer is None, which means that
mamba.py does it in its own way:

    Linear             a class, never None: nn.Linear, but on some CPUs a faster one
    has_triton(...)    True or False: whether the kernels of scan can run here
    scan, ssd, keys_and_queries     never None, and asked only where has_triton says True
    angles_since       the same, but None in what torch.compile compiles, for it fuses the plain way
    recurrence(...)    a function, never None
    softplus, gated    never None: the same with backward passes that keep less
    conv_silu(...)     None for the sequential scan, which can be differentiated twice, and in what
                       torch.compile compiles, unless has_triton
    cross_entropy(...) None if all logits fit at once
    gated_norm(...)    None for the sequential scan, in what torch.compile compiles, and where its
                       kernels cannot run
    decoder(...)       None if a module of the model is not just as our files made it

What scripts use: quantize_int8 (of int8.py), recorded and replayed (CUDA graphs, of decode.py),
and compiles_well.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from . import scan_side_by_side, scan_tiles
from .decode import decoder, recorded, replayed
from .int8 import quantize_int8
from .kernels import can_run, rows_triton, scan_triton, ssd_triton, turn_triton
from .layers import Linear, causal_conv, cross_entropy, gated, softplus
from .operators import COMPILES

__all__ = ["Linear", "angles_since", "compiles_well", "conv_silu", "cross_entropy", "decoder",
           "gated", "gated_norm", "has_triton", "keys_and_queries", "quantize_int8", "recorded",
           "recurrence", "replayed", "scan", "softplus", "ssd"]


def has_triton(u, d_state, headdim=0):
    """Whether scan, or with a headdim ssd, can run for tensors like u, by its device and dtype, and
    for this d_state."""
    if not can_run(u) or d_state > 256:
        return False
    # int: what torch.compile knows by a symbol becomes a number
    return headdim == 0 or ssd_triton.fits(u.device, u.dtype, int(headdim), int(d_state))


def scan(u, delta, A, B, C, state, D=None, z=None, delta_bias=None, delta_softplus=False):
    """
    All of selective_scan by the fused kernels, where has_triton; arguments and shapes as there.
    Returns y (B, L, D) and the last state (B, D, N).
    """
    return scan_triton.selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                             state)


def ssd(u, delta, a, B, C, state, own, dtype=None):
    """
    in_chunks of mamba2.py by kernels, where has_triton; arguments and shapes as there.
    dtype: to multiply in, that of u by default.  Returns y (B, L, H, P), in the type of u, and the
    last state (B, H, P, N).
    """
    y, last = ssd_triton.scan(u if dtype is None else u.to(dtype), delta, a, B, C, own, state)
    return y.to(u.dtype), last


def angles_since(turns, first):
    """That of mamba3.py by kernels, for one document."""
    if torch.compiler.is_compiling() or turns.numel() == 0:
        return None
    return turn_triton.angles_since(turns, first)


def keys_and_queries(B, C, B_bias, C_bias, theta, dtype):
    """
    Those of Mamba-3 with one step for each token, by kernels: B, C (B, L, G, N) normed, biases (H,
    N), theta (B, L, H, S). Returns k, q (B, L, H, N) in this dtype, and their scalar products.
    """
    return turn_triton.keys_and_queries(B, C, B_bias, C_bias, theta, dtype)


def gated_norm(y, z, weight, groups, eps, scan):
    """RMSNorm of y silu(z), both (B, L, D), as in GatedRMSNorm of mamba2.py; scan: the method."""
    if (scan not in ("auto", "triton") or torch.compiler.is_compiling() or y.numel() == 0
            or not can_run(y)):
        return None
    return rows_triton.gated_norm(y, z, weight, groups, eps)


def compiles_well(device, d_state):
    """Whether torch.compile of a model compiles its scan too: on a CPU, and if the d_state numbers
    of a channel fill whole vectors."""
    return device.type == "cpu" and d_state % 8 == 0 and COMPILES


def recurrence(method, u, A):
    """
    What is best for u (B, L, D) and A (D, N), instead of in_tiles of mamba.py: a function
    (u, delta, A, B, C, state) -> y (B, L, D), last state (B, D, N).
    """
    if method == "triton":
        return scan
    if torch.compiler.is_compiling():
        if not compiles_well(u.device, A.shape[1]) or torch.compiler.is_exporting():
            return scan_tiles.operator
        from . import scan_compiled  # only here, for it takes a while
        return scan_compiled.recurrence
    return (scan_tiles if u.device.type == "cpu" else scan_side_by_side).recurrence


def conv_silu(x, weight, bias, state, scan):
    """
    silu of the causal convolution of x, (B, L, D), after the inputs in state, or None; arguments as
    in conv_silu of mamba.py. scan: the method of the scan, whose kernels there may be.
    """
    if scan == "sequential":    # plain, so that it can be differentiated twice
        return None
    if scan in ("auto", "triton") and can_run(x):
        return scan_triton.conv_silu_triton(x, weight, bias, state)
    y = causal_conv(x, weight, bias, state)
    return None if y is None else F.silu(y)
