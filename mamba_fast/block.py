"""
The mixers in training, each as one autograd.Function: what mix of MambaBlock, Mamba2Block or, on a
GPU, Mamba3Block does, one part after the other, without what autograd costs between them. On a GPU
the host takes longer to ask for the parts of a small block than the GPU to compute them. And the
gradients of what was one projection, as u and z, are written side by side: no pass joins them. On
a GPU launch.py makes all the calls of forward, or of backward, at once; torch.compile takes the
block of Mamba-1 as one operator.
"""
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import cpp, layers, norm_cpu, scan_cpu, ssd_cpu
from .kernels import (
    can_run,
    heads_triton,
    launch,
    rows_triton,
    scan_triton,
    ssd_triton,
    turn_triton,
)
from .operators import (
    COMPILES,
    AtOnce,
    differentiable_once,
    is_exporting,
    is_traced,
    without_autocast,
)

CASTS = {torch.float32, torch.bfloat16, torch.float16}      # what autocast makes 16 bits of
OPTIONAL = {"in_proj.bias", "conv1d.bias", "out_proj.bias"}
PLANS = {}      # of blocks on a GPU, by launch.Plan
# the parameters of products, which autocast takes in 16 bits
OF_PRODUCTS = {"in_proj.weight", "in_proj.bias", "x_proj.weight", "dt_proj.weight",
               "out_proj.weight", "out_proj.bias"}
# all parameters of the blocks, in the order in which the functions take them
OF_MAMBA = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "x_proj.weight",
            "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight", "out_proj.bias")
OF_MAMBA2 = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log",
             "D", "norm.weight", "out_proj.weight", "out_proj.bias")
OF_MAMBA3 = ("in_proj.weight", "in_proj.bias", "dt_bias", "B_bias", "C_bias", "B_norm.weight",
             "C_norm.weight", "D", "out_proj.weight", "out_proj.bias")
PLACES = {name: name.rpartition(".")[::2]       # module and key
          for name in OF_MAMBA + OF_MAMBA2 + OF_MAMBA3}


def mix(block, x, others, is_plain, plain):
    """
    block.mix(x, *others) of a MambaBlock: (y, None). Or None: where there is a state or a mask,
    where no gradients are asked for, where a part is not just as the block made it, and where
    neither Triton's kernels nor C++ can run.
    is_plain: that of mamba.py.  plain: its PLAIN.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and (not COMPILES or not x.is_cuda or is_exporting()):
        return None
    linears = "in_proj", "x_proj", "dt_proj", "out_proj"
    ready = prepared(block, x, others, shapes_of(block.config), linears, is_plain, plain)
    if not ready or block.config.mixer_rms_eps > 0:
        return None
    dtype, parameters = ready
    if compiling:
        if not OnGPU.runs(block, x, dtype, parameters):
            return None
        return torch.ops.mamba_py.block(x.to(dtype).contiguous(), *parameters)[0], None
    parts = next((p for p in (OnGPU, OnCPU) if p.runs(block, x, dtype, parameters)), None)
    if parts is None:
        return None
    return at_once(functools.partial(mixed, parts), functools.partial(gradients, parts), dtype, x,
                   parameters), None


def at_once(forward, back, dtype, x, parameters, *settings):
    """
    The result of a block as one operation, on a GPU by a plan if there can be one.
    forward(dtype, x, *parameters) returns it, and a list of what back needs, first of all x in its
    type. back(needs, type of x, type of weights, gout, *that list) returns the gradients of x and
    parameters, or None for those of which needs says False.
    settings: all else on which forward and back depend.
    """
    dtypes = x.dtype, parameters[0].dtype
    key = dtype, *dtypes, len(parameters), *settings    # which tells what block it is

    def prepare():
        def function(*inputs):
            out, saved = forward(dtype, *inputs)
            return (out,), saved

        def gradients_of(needs, gradients, x, *saved):
            (gout,) = gradients     # out and x are of one shape
            gout = torch.zeros_like(x) if gout is None else gout
            return back(needs, *dtypes, gout, x, *saved)
        shapes = tuple(None if t is None else t.shape for t in parameters)
        return function, gradients_of, (key, shapes)
    if not x.is_cuda:
        return AtOnce.apply(*prepare()[:2], x, *parameters)[0]
    return launch.at_once(PLANS, key, (x.contiguous(), *parameters), prepare)[0]


def shapes_of(c):
    """{name: shape} of the parameters of a MambaBlock with this config."""
    D, N, rank = c.d_inner, c.d_state, c.dt_rank
    return dict(zip(OF_MAMBA, (
        (2 * D, c.d_model), (2 * D,), (D, 1, c.d_conv), (D,), (rank + 2 * N, D), (D, rank), (D,),
        (D, N), (D,), (c.d_model, D), (c.d_model,))))


def mix2(block, x, others, is_plain, plain, gated_norm):
    """block.mix(x, *others) of a Mamba2Block, as mix.  gated_norm: the class of its norm."""
    c, linears = block.config, ("in_proj", "out_proj")
    if (torch.compiler.is_compiling() or not c.rmsnorm or block.norm.norm_before_gate
            or not is_plain(block.norm, gated_norm)
            or plain.get(gated_norm) != (gated_norm.forward, None)):
        return None
    ready = prepared(block, x, others, shapes_of2(c), linears, is_plain, plain)
    if ready and OnCPU.runs2(block, x, *ready):
        return Mix2.apply(x, *ready[1], block), None
    exact = block.A_log, block.D, block.dt_bias
    if not ready or not OnGPU.runs2(block, x, ready[0], exact):
        return None
    sizes = Sizes(c.headdim, c.ngroups, tuple(c.dt_limit), block.norm.groups, block.norm.eps)
    return at_once(functools.partial(mixed2, sizes), functools.partial(gradients2, sizes), ready[0],
                   x, ready[1], sizes), None


def shapes_of2(c):
    """{name: shape} of the parameters of a Mamba2Block with this config."""
    D, H, channels = c.d_inner, c.nheads, c.d_inner + 2 * c.ngroups * c.d_state
    shapes = dict(zip(OF_MAMBA2, (
        (D + channels + H, c.d_model), (D + channels + H,), (channels, 1, c.d_conv), (channels,),
        (H,), (H,), (H,), (D,), (c.d_model, D), (c.d_model,))))
    if not c.rmsnorm:
        del shapes["norm.weight"]
    return shapes


def mix3(block, x, others, is_plain, plain):
    """block.mix(x, *others) of a Mamba3Block with one step for each token, on a GPU, as mix2."""
    c, linears, eps = block.config, ("in_proj", "out_proj"), (block.B_norm.eps, block.C_norm.eps)
    if torch.compiler.is_compiling() or c.mimo_rank > 1 or c.n_angles == 0 or None in eps:
        return None
    ready = prepared(block, x, others, shapes_of3(c), linears, is_plain, plain)
    if not ready or not OnGPU.runs2(block, x, ready[0], (block.dt_bias, block.D)):
        return None
    sizes = Sizes3(tuple(block.sizes), c.headdim, c.ngroups, tuple(c.dt_limit), c.A_floor, eps)
    return at_once(functools.partial(mixed3, sizes), functools.partial(gradients3, sizes), ready[0],
                   x, ready[1], sizes), None


def shapes_of3(c):
    """{name: shape} of the parameters of a Mamba3Block with this config and one step a token."""
    D, H, N = c.d_inner, c.nheads, c.d_state
    made = 2 * D + 2 * c.ngroups * N + 3 * H + c.n_angles
    return dict(zip(OF_MAMBA3, (
        (made, c.d_model), (made,), (H,), (H, 1, N), (H, 1, N), (N,), (N,), (H,), (c.d_model, D),
        (c.d_model,))))


def prepared(block, x, others, shapes, linears, is_plain, plain):
    """
    (the dtype to compute in, the parameters in the order of shapes), or None where the block has to
    run part by part.
    shapes: {name: shape} of all parameters.  linears: the names of the layers that are products.
    """
    kind, of_all = type(block), nn.modules.module
    global_hooks = (of_all._global_forward_hooks, of_all._global_forward_pre_hooks,
                    of_all._global_backward_hooks, of_all._global_backward_pre_hooks)
    if (not torch.is_grad_enabled() or (not torch.compiler.is_compiling() and is_traced())
            or type(x) is not torch.Tensor or any(t is not None for t in others)
            or any(global_hooks)
            or plain.get(kind) != (kind.forward, kind.mix) or "mix" in vars(block)):
        return None
    # from where modules keep them, which takes less time than by their names, and finds no stand-in
    modules, device, dtype = block._modules, x.device, x.dtype
    convolutions = [name for name in ("conv1d",) if "conv1d.weight" in shapes]
    if (not all(name in modules and is_plain(modules[name]) for name in linears)
            or not all(type(modules.get(name)) is nn.Conv1d for name in convolutions)):
        return None
    for name in (*linears, *convolutions):  # a bias may have become something else
        m = modules[name]
        if "bias" in m.__dict__ or "bias" in m._buffers or "bias" in m._modules:
            return None
    parameters, dtypes, found, wanted = [], {dtype}, 0, x.requires_grad
    for name, shape in shapes.items():
        of, key = PLACES[name]
        t = (modules[of] if of else block)._parameters.get(key)
        parameters.append(t)
        if t is None and name in OPTIONAL:
            continue
        if type(t) is not nn.Parameter or t.shape != shape or t.device != device:
            return None
        found, wanted = found + 1, wanted or t.requires_grad
        if name in OF_PRODUCTS:
            dtypes.add(t.dtype)
    # another parameter, as an adapter's, may mean another function
    there = [t for m in (block, *modules.values()) if m for t in m._parameters.values()
             if t is not None]
    if len(there) != found or x.shape[2] != block.config.d_model:
        return None
    cast = torch.is_autocast_enabled(device.type)
    fit = x.numel() > 0 and (dtypes <= CASTS if cast else len(dtypes) == 1)
    if not fit or not wanted:
        return None
    return torch.get_autocast_dtype(device.type) if cast else dtype, parameters


def mixed(parts, dtype, x, w_in, b_in, w_conv, b_conv, w_x, w_dt, b_dt, A_log, D, w_out, b_out):
    """The result of a MambaBlock, and what gradients needs."""
    D_inner, N = A_log.shape
    # x itself if it has this type: differentiable_once asks if what is saved needs gradients
    x, w_in, b_in, w_x, w_dt, w_out, b_out = parts.cast(dtype, (x, w_in, b_in, w_x, w_dt, w_out,
                                                                b_out))
    xz = parts.product(x, w_in, b_in)                                       # (B, L, 2 D)
    u, z = xz.split_with_sizes((D_inner, D_inner), -1)                      # (B, L, D) each
    u = parts.conv(u, w_conv, b_conv)
    dtBC = parts.product(u, w_x, None)                                      # (B, L, rank + 2 N)
    dt, B, C = dtBC.split_with_sizes((w_dt.shape[1], N, N), -1)
    delta = parts.linear(dt, w_dt)                                          # (B, L, D)
    y, kept = parts.scan(u, delta, A_log, B, C, D, z, b_dt)
    return parts.product(y, w_out, b_out), (x, xz, u, dtBC, delta, kept, y, w_in, w_conv, b_conv,
                                            w_x, w_dt, b_dt, A_log, D, w_out)


def gradients(parts, needs, x_dtype, weight_dtype, gout, x, xz, u, dtBC, delta, kept, y, w_in,
              w_conv, b_conv, w_x, w_dt, b_dt, A_log, D, w_out):
    """Those of x and of all parameters of a MambaBlock. needs: which of these are asked for.
    x_dtype, weight_dtype: of the gradients of x and of the weights of products."""
    (needs_x, needs_in, needs_b_in, _, _, needs_w_x, needs_dt, _, _, _, needs_out,
     needs_b_out) = needs
    D_inner, N = A_log.shape
    gout = gout.flatten(0, 1)                                               # (B L, d_model)
    gy, gw_out = parts.product_back(gout, y.flatten(0, 1), w_out, True, needs_out, y.dtype,
                                    weight_dtype)
    # written part by part below: gz, gB, gC by the scan, gdt by a product, gu_in by conv_back
    gxz, gdtBC = torch.empty_like(xz), torch.empty_like(dtBC)
    halves, sizes = (D_inner, D_inner), (w_dt.shape[1], N, N)
    (u_in, z), (gu_in, gz) = (t.split_with_sizes(halves, -1) for t in (xz, gxz))
    (dt, B, C), (gdt, *gBC) = (t.split_with_sizes(sizes, -1) for t in (dtBC, gdtBC))
    gu, gdelta, gA_log, gD, gb_dt = parts.scan_back(gy.view(u.shape), kept, u, delta, A_log, B, C,
                                                    D, z, b_dt, gz, *gBC)
    gdelta, gdtBC, u = (t.flatten(0, 1) for t in (gdelta, gdtBC, u))
    parts.matmul(gdelta, w_dt, gdt.flatten(0, 1))
    gw_dt = parts.of_weight(gdelta, dt.flatten(0, 1), weight_dtype) if needs_dt else None
    gw_x = parts.of_weight(gdtBC, u, weight_dtype) if needs_w_x else None
    parts.matmul(gdtBC, w_x, gu.view(u.shape), add=True)    # u is what x_proj has read, too
    gw_conv, gb_conv = parts.conv_back(gu, u_in, w_conv, b_conv, gu_in)
    gxz = gxz.flatten(0, 1)
    gx, gw_in = parts.product_back(gxz, x.flatten(0, 1), w_in, needs_x, needs_in, x_dtype,
                                   weight_dtype)
    return (gx.view(x.shape) if needs_x else None, gw_in, gxz.sum(0) if needs_b_in else None,
            gw_conv, gb_conv, gw_x, gw_dt, gb_dt, gA_log, gD, gw_out,
            gout.sum(0) if needs_b_out else None)


class Sizes(NamedTuple):
    """What mixed2 has to know of a Mamba2Block."""
    headdim: int
    ngroups: int
    dt_limit: tuple
    groups_of_norm: int
    eps: float


def parts_of2(sizes, d_inner, projected, uBC):
    """z (B, L, D), uBC (B, L, D + 2 G N) and dt (B, L, H) of what in_proj gives, and of uBC u (B,
    L, H, P), B and C (B, L, G, N)."""
    channels, heads = uBC.shape[2], d_inner // sizes.headdim
    shared = (channels - d_inner) // 2
    z, uBC_in, dt = projected.split_with_sizes((d_inner, channels, heads), -1)
    u, B, C = uBC.split_with_sizes((d_inner, shared, shared), -1)
    B, C = (t.unflatten(-1, (sizes.ngroups, -1)) for t in (B, C))
    return z, uBC_in, dt, u.unflatten(-1, (heads, -1)), B, C


def mixed2(sizes, dtype, x, w_in, b_in, w_conv, b_conv, dt_bias, A_log, D, w_norm, w_out, b_out):
    """The result of a Mamba2Block on a GPU, and what gradients2 needs."""
    x, w_in, b_in, w_out, b_out = OnGPU.cast(dtype, (x, w_in, b_in, w_out, b_out))
    dt_bias, A_log, D, w_norm = scan_triton._whole(dt_bias, A_log, D, w_norm)
    projected, d_inner = OnGPU.product(x, w_in, b_in), len(w_norm)
    uBC_in = projected.narrow(2, d_inner, len(w_conv))
    uBC = OnGPU.conv(uBC_in, w_conv, b_conv)
    z, _, dt, u, B, C = parts_of2(sizes, d_inner, projected, uBC)
    delta, a, own = heads_triton.prepare(dt, dt_bias, A_log, D, B, C, sizes.dt_limit)
    y, _, packed, states = ssd_triton._run(u, delta, a, B, C, own, None, True)
    y = y.flatten(2)                                                        # (B, L, D)
    normed = rows_triton.run_norm(y, z, w_norm, sizes.groups_of_norm, sizes.eps)
    return OnGPU.product(normed, w_out, b_out), (
        x, projected, uBC, own, packed, states, y, normed, w_in, w_conv, b_conv, dt_bias, A_log,
        w_norm, w_out)


def gradients2(sizes, needs, x_dtype, weight_dtype, gout, x, projected, uBC, own, packed, states, y,
               normed, w_in, w_conv, b_conv, dt_bias, A_log, w_norm, w_out):
    """As gradients, of a Mamba2Block on a GPU."""
    gprojected, guBC, d_inner = torch.empty_like(projected), torch.empty_like(uBC), len(w_norm)
    z, uBC_in, dt, u, B, C = parts_of2(sizes, d_inner, projected, uBC)
    gz, guBC_in, gdt, gu, gB, gC = parts_of2(sizes, d_inner, gprojected, guBC)
    gout = gout.flatten(0, 1)                                               # (B L, d_model)
    gnormed, gw_out = OnGPU.product_back(gout, normed.flatten(0, 1), w_out, True, needs[9], y.dtype,
                                         weight_dtype)
    gy, gw_norm = rows_triton.run_norm_back(gnormed.view(y.shape), y, z, w_norm,
                                            sizes.groups_of_norm, sizes.eps, gz)
    gdelta, ga, gown, of_BC, _ = ssd_triton.back_in_parts(gy.view(u.shape), None, u, packed, B, C,
                                                          own, states, gu)
    of_heads = heads_triton.prepare_back(dt, dt_bias, A_log, B, C, gdelta, ga, gown, *of_BC, gdt,
                                         gB, gC, sizes.dt_limit)
    gw_conv, gb_conv = OnGPU.conv_back(guBC, uBC_in, w_conv, b_conv, guBC_in)
    gprojected = gprojected.flatten(0, 1)
    gx, gw_in = OnGPU.product_back(gprojected, x.flatten(0, 1), w_in, needs[0], needs[1], x_dtype,
                                   weight_dtype)
    return (gx.view(x.shape) if needs[0] else None, gw_in, gprojected.sum(0) if needs[2] else None,
            gw_conv, gb_conv, *of_heads, gw_norm, gw_out, gout.sum(0) if needs[10] else None)


class Sizes3(NamedTuple):
    """What mixed3 has to know of a Mamba3Block."""
    of_parts: tuple
    headdim: int
    ngroups: int
    dt_limit: tuple
    A_floor: float
    eps: tuple      # of the norms of B and C


def parts_of3(sizes, projected):
    """z (B, L, D), u (B, L, H, P), B and C (B, L, G, N), and dt, A, lam (B, L, H), angles (B, L, S)
    of what in_proj gives."""
    z, u, B, C, *of_heads = projected.split_with_sizes(sizes.of_parts, -1)
    B, C = (t.unflatten(-1, (sizes.ngroups, -1)) for t in (B, C))
    return z, u.unflatten(-1, (-1, sizes.headdim)), B, C, of_heads


def mixed3(sizes, dtype, x, w_in, b_in, dt_bias, B_bias, C_bias, w_B, w_C, D, w_out, b_out):
    """The result of a Mamba3Block on a GPU, and what gradients3 needs. As in mamba3.py, what a step
    adds of itself, gamma (k . q), and its D are one factor: own."""
    x, w_in, b_in, w_out, b_out = OnGPU.cast(dtype, (x, w_in, b_in, w_out, b_out))
    dt_bias, B_bias, C_bias, w_B, w_C, D = small = scan_triton._whole(dt_bias, B_bias, C_bias, w_B,
                                                                     w_C, D)
    projected = OnGPU.product(x, w_in, b_in)
    z, u, B, C, of_heads = parts_of3(sizes, projected)
    a, gamma, weight, turns = heads_triton.prepare3(*of_heads, dt_bias, sizes.dt_limit,
                                                    sizes.A_floor)
    since = turn_triton.run_sums(turns)                                     # (B, L, H, S)
    k, q, own = turn_triton.run(B, C, (w_B, w_C), (B_bias, C_bias), since, dtype, gamma, D,
                                sizes.eps, 2 * math.pi)
    y, _, packed, states = ssd_triton._run(u, weight, a, k, q, own, None, True)
    y = y.flatten(2)                                                        # (B, L, D)
    gated = rows_triton.run_norm(y, z, None, 1, 0.0)
    return OnGPU.product(gated, w_out, b_out), (x, projected, since, gamma, k, q, own, packed,
                                                states, y, gated, w_in, *small[:-1], w_out)


def gradients3(sizes, needs, x_dtype, weight_dtype, gout, x, projected, since, gamma, k, q, own,
               packed, states, y, gated, w_in, dt_bias, B_bias, C_bias, w_B, w_C, w_out):
    """As gradients, of a Mamba3Block on a GPU."""
    gprojected = torch.empty_like(projected)
    z, u, B, C, of_heads = parts_of3(sizes, projected)
    gz, gu, gB, gC, gof_heads = parts_of3(sizes, gprojected)
    gout = gout.flatten(0, 1)                                               # (B L, d_model)
    ggated, gw_out = OnGPU.product_back(gout, gated.flatten(0, 1), w_out, True, needs[9], y.dtype,
                                        weight_dtype)
    gy, _ = rows_triton.run_norm_back(ggated.view(y.shape), y, z, None, 1, 0.0, gz)
    # each head is a group of its own: these sums have one part
    gweight, ga, gown, ((gk,), (gq,)), _ = ssd_triton.back_in_parts(
        gy.view(u.shape), None, u, packed, k, q, own, states, gu)
    (gB_bias, gC_bias), gsince, (gw_B, gw_C), ggamma = turn_triton.run_back(
        gk, gq, gown, B, C, (w_B, w_C), (B_bias, C_bias), since, gB, gC, gamma, sizes.eps,
        2 * math.pi)
    gturns = turn_triton.run_sums_back(gsince)
    gdt_bias, gD = heads_triton.prepare3_back(*of_heads, dt_bias, ga, ggamma, gweight, gturns, gown,
                                              *gof_heads, sizes.dt_limit, sizes.A_floor)
    gprojected = gprojected.flatten(0, 1)
    gx, gw_in = OnGPU.product_back(gprojected, x.flatten(0, 1), w_in, needs[0], needs[1], x_dtype,
                                   weight_dtype)
    return (gx.view(x.shape) if needs[0] else None, gw_in, gprojected.sum(0) if needs[2] else None,
            gdt_bias, gB_bias, gC_bias, gw_B, gw_C, gD, gw_out,
            gout.sum(0) if needs[10] else None)


class Mix2(torch.autograd.Function):
    """On a CPU."""

    @staticmethod
    def forward(ctx, x, w_in, b_in, w_conv, b_conv, dt_bias, A_log, D, w_norm, w_out, b_out, block):
        parts, norm, limits = OnCPU, block.norm, block.config.dt_limit
        ctx.block, ctx.of_norm, ctx.limits = block, (norm.groups, norm.eps), limits
        projected = parts.product(x, w_in, b_in)
        z, u, BC, dt = Mix2.split(projected, block)
        of_u, of_BC = Mix2.convolutions(w_conv, b_conv, block)
        B, C = Mix2.B_and_C(parts.conv(BC, *of_BC), block)
        # delta and what the convolution makes of u are not kept: the scan makes them as it goes.
        # Nor is what out_proj reads: memory takes longer than to compute it again.
        before = ssd_cpu.BeforeScan.of(*Mix2.arrays(A_log, D, dt_bias, *of_u), limits)
        y, kept = ssd_cpu.scanned(before, u, dt, None, B, C, None, None, True)
        y = y.flatten(2)                                                    # (B, L, D)
        normed = norm_cpu.normed(y, z, w_norm, *ctx.of_norm)
        ctx.save_for_backward(x, projected, B, C, kept, y, w_in, w_conv, b_conv, dt_bias, A_log, D,
                              w_norm, w_out)
        return parts.product(normed, w_out, b_out)

    @staticmethod
    @differentiable_once
    @without_autocast
    def backward(ctx, gout):
        (x, projected, B, C, kept, y, w_in, w_conv, b_conv, dt_bias, A_log, D, w_norm,
         w_out) = ctx.saved_tensors
        rows = x.flatten(0, 1)
        parts, block, needs = OnCPU, ctx.block, ctx.needs_input_grad
        gout = gout.reshape(len(rows), -1)                                  # (B L, d_model)
        y_rows = y.flatten(0, 1)
        gnormed, _ = parts.product_back(gout, y_rows, w_out, True, False)
        gprojected = torch.empty_like(projected)        # written part by part below
        (z, u, BC_in, dt), (gz, gu, gBC_in, gdt) = (Mix2.split(t, block)
                                                    for t in (projected, gprojected))
        normed = torch.empty_like(y_rows)
        gy, gw_norm = norm_cpu.gradients(gnormed.view(y.shape), y, z, w_norm, *ctx.of_norm, gz,
                                         normed)
        _, gw_out = parts.product_back(gout, normed, w_out, False, needs[9])
        of_u, of_BC = Mix2.convolutions(w_conv, b_conv, block)
        arrays = Mix2.arrays(A_log, D, dt_bias, *of_u)
        grads = x.new_zeros(len(x), sum(t.numel() for t in arrays))
        before = ssd_cpu.BeforeScan.of(*arrays, ctx.limits, grads)
        gBC = BC_in.new_empty(BC_in.shape)
        ssd_cpu.gradients(gy.view(u.shape), None, kept, before, u, dt, None, B, C, None, gu, gdt,
                          None, *Mix2.B_and_C(gBC, block), None)
        sums = grads.sum(0).split([t.numel() for t in arrays])
        gA, gD, gdt_bias, gtaps, gbias = (g.view(t.shape) for g, t in zip(sums, arrays))
        gw_BC, gb_BC = parts.conv_back(gBC, BC_in, *of_BC, gBC_in)
        gw_conv = torch.cat([gtaps.t()[:, None], gw_BC])                    # (D + 2 G N, 1, d_conv)
        gb_conv = None if b_conv is None else torch.cat([gbias, gb_BC])
        gprojected = gprojected.flatten(0, 1)
        gx, gw_in = parts.product_back(gprojected, rows, w_in, needs[0], needs[1])
        gb_in, gb_out = (g.sum(0) if n else None
                         for g, n in zip((gprojected, gout), (needs[2], needs[10])))
        gx = None if gx is None else gx.view(*y.shape[:2], -1)
        return (gx, gw_in, gb_in, gw_conv, gb_conv, gdt_bias, gA * arrays[0], gD, gw_norm, gw_out,
                gb_out, None)

    @staticmethod
    def split(t, block):
        """z (B, L, D), u (B, L, H, P), B with C (B, L, 2 G N), dt (B, L, H), of what in_proj
        gives."""
        c = block.config
        z, u, BC, dt = t.split((c.d_inner, c.d_inner, 2 * c.ngroups * c.d_state, c.nheads), dim=-1)
        return z, u.unflatten(-1, (c.nheads, -1)), BC, dt

    @staticmethod
    def B_and_C(BC, block):
        """(B, L, G, N) each."""
        return (t.unflatten(-1, (block.config.ngroups, -1)) for t in BC.chunk(2, dim=-1))

    @staticmethod
    def convolutions(weight, bias, block):
        """Weight and bias, or None, of that of u, and of that of B with C."""
        D = block.config.d_inner
        return zip((weight[:D], weight[D:]), (None, None) if bias is None else (bias[:D], bias[D:]))

    @staticmethod
    def arrays(A_log, D, dt_bias, weight, bias):
        """A, D, dt_bias, and of the convolution of u its taps (d_conv, D) and bias."""
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return -torch.exp(A_log), D, dt_bias, weight[:, 0].t(), bias


class OnGPU:
    """The parts by Triton's kernels."""

    @staticmethod
    def runs(block, x, _dtype, _parameters):
        d_inner, d_state = block.A_log.shape
        return (block.scan in ("auto", "triton") and can_run(x) and d_inner % 8 == 0
                and d_state <= 256)

    @staticmethod
    def runs2(block, x, dtype, exact):
        """Whether mixed2 and mixed3 can run. exact: parameters that have to be float32."""
        c = block.config
        return (block.scan in ("auto", "triton") and can_run(x) and x.shape[1] > 1
                and all(t.dtype == torch.float32 for t in exact)
                and ssd_triton.fits(x.device, dtype, c.headdim, c.d_state))

    @staticmethod
    def cast(dtype, tensors):
        return rows_triton.cast(dtype, tensors)

    @staticmethod
    def matmul(*inputs, **settings):
        return launch.product(*inputs, **settings)

    @staticmethod
    def product(x, weight, bias):
        if bias is not None:
            return F.linear(x, weight, bias)
        return OnGPU.linear(x, weight)

    @staticmethod
    def linear(x, weight):
        return launch.product(x.flatten(0, 1), weight.t()).view(*x.shape[:2], -1)

    @staticmethod
    def of_weight(gy, x, dtype):
        """gy^T x, the gradient of a weight of this dtype. If that is float32, so is it, even where
        autocast made 16 bits of the others."""
        return launch.product(gy.t(), x, dtype=dtype)

    @staticmethod
    def product_back(gy, x, weight, needs_x, needs_weight, x_dtype, dtype):
        return (launch.product(gy, weight, dtype=x_dtype) if needs_x else None,
                OnGPU.of_weight(gy, x, dtype) if needs_weight else None)

    @staticmethod
    def conv(x, weight, bias):
        return scan_triton._run_conv(x, *scan_triton._whole(weight, bias), None)

    @staticmethod
    def conv_back(gy, x, weight, bias, gx):
        weight, bias = scan_triton._whole(weight, bias)
        _, gweight, gbias, _ = scan_triton._run_conv_back(gy, x, weight, bias, None, gx)
        return gweight, None if bias is None else gbias

    @staticmethod
    def scan(u, delta, A_log, B, C, D, z, bias):
        y, _, kept = scan_triton._run(u, delta, A_log.float(), B, C, D.float(), z, bias.float(),
                                      state=None, softplus=True, keep=True, log_A=True)
        return y, kept

    @staticmethod
    def scan_back(gy, kept, u, delta, A_log, _B, _C, D, z, bias, gz, gB, gC):
        gu, gdelta, _, _, _, gA_log, (gD, gbias), _ = scan_triton._run_back(
            gy, None, kept, u, delta, D.float(), z, bias.float(), A_log.shape[1], softplus=True,
            has_state=False, BC_dtype=None, gz=gz, gB=gB, gC=gC, log_A=True)
        return gu, gdelta, gA_log, gD, gbias


class OnCPU:
    """The parts by C++ and oneDNN, in float32."""

    @staticmethod
    def runs(block, x, dtype, parameters, *names):
        """names: of the C++ that is needed beside the convolution, by default the scan."""
        channels, _, taps = block.conv1d.weight.shape
        return (block.scan in ("auto", "chunked") and dtype == torch.float32
                and all(t is None or t.dtype == torch.float32 for t in parameters)
                and channels % cpp.WIDTH == 0 and x.shape[1] > 1 and taps in (2, 3, 4)
                and all(cpp.runs(name, x) for name in ("conv_cpu", *(names or (scan_cpu.NAME,)))))

    @staticmethod
    def runs2(block, x, dtype, parameters):
        """Whether Mix2 can run."""
        sizes = (block.config.headdim, block.config.d_state,
                 block.config.d_inner // block.norm.groups)
        return (not any(n % cpp.WIDTH for n in sizes)
                and OnCPU.runs(block, x, dtype, parameters, ssd_cpu.NAME, norm_cpu.NAME))

    @staticmethod
    def by_convolution(x):
        """Whether products with the rows x are sooner so."""
        return layers.Linear is layers.LinearByConvolution and layers.are_many(len(x))

    @staticmethod
    def product(x, weight, bias):
        rows = x.flatten(0, 1)
        product = layers.by_convolution if OnCPU.by_convolution(rows) else F.linear
        return product(rows, weight, bias).view(*x.shape[:2], -1)

    @staticmethod
    def cast(_dtype, tensors):
        return tensors

    linear = staticmethod(F.linear)

    @staticmethod
    def matmul(a, b, out, add=False):
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)

    @staticmethod
    def of_weight(gy, x, _dtype):
        return gy.t() @ x

    @staticmethod
    def product_back(gy, x, weight, needs_x, needs_weight, *_dtypes):
        if OnCPU.by_convolution(x):
            return layers.by_convolution_back(gy, x, weight, needs_x, needs_weight)
        return gy @ weight if needs_x else None, gy.t() @ x if needs_weight else None

    @staticmethod
    def inputs_of_conv(x, weight, bias):
        taps = weight[:, 0].t().contiguous()                                # (d_conv, D)
        return (x, taps, x.new_zeros(x.shape[2]) if bias is None else bias,
                x.new_zeros(x.shape[0], len(taps) - 1, x.shape[2]))

    @staticmethod
    def conv(*inputs):
        return layers.ConvSilu.in_cpp(*OnCPU.inputs_of_conv(*inputs))

    @staticmethod
    def conv_back(gy, x, weight, bias, gx):
        inputs = OnCPU.inputs_of_conv(x, weight, bias)
        gtaps, gbias, _ = layers.ConvSilu.gradients_in_cpp(gy, *inputs, gx)
        return gtaps.t()[:, None], None if bias is None else gbias

    @staticmethod
    def scan(u, delta, A_log, *others):
        inputs = scan_cpu.Inputs(u, delta, -torch.exp(A_log), *others, True)
        return inputs.forward(u.new_zeros(len(u), *A_log.t().shape), True)

    @staticmethod
    def scan_back(gy, kept, u, delta, A_log, *others):
        *others, gz, gB, gC = others
        A, carry = -torch.exp(A_log), u.new_zeros(len(u), *A_log.t().shape)
        inputs = scan_cpu.Inputs(u, delta, A, *others, True)
        gu, gdelta, gA, gD, gbias = inputs.backward(kept, gy, carry, gz, gB, gC)
        return gu, gdelta, A * gA.t(), gD, gbias


# ------------------------------------------------------------------------------------------------
# A MambaBlock on a GPU as an operator, which torch.compile takes as it is

# x in the type to compute in, and the parameters
INPUTS = ("Tensor x, Tensor w_in, Tensor? b_in, Tensor w_conv, Tensor? b_conv, Tensor w_x, "
          "Tensor w_dt, Tensor b_dt, Tensor A_log, Tensor D, Tensor w_out, Tensor? b_out")
CAST = 1, 5, 6, 10      # of them w_in, w_x, w_dt, w_out: what has another type than x is cast
KEPT = ("Tensor xz, Tensor u, Tensor dtBC, Tensor delta, Tensor kept, Tensor y, "
        "Tensor w_in_cast, Tensor w_x_cast, Tensor w_dt_cast, Tensor w_out_cast")


def block_forward(*inputs):
    """The result, and KEPT; of weights that need no cast nothing."""
    x = inputs[0]
    out, (_, *kept, w_in, _, _, w_x, w_dt, _, _, _, w_out) = mixed(OnGPU, x.dtype, *inputs)
    cast = zip((w_in, w_x, w_dt, w_out), CAST)
    return out, *kept, *(x.new_empty(0) if w is inputs[i] else w for w, i in cast)


def block_backward(gout, *kept_and_inputs):
    """The gradient of each input, empty of those that are None."""
    kept, inputs = kept_and_inputs[:-12], kept_and_inputs[-12:]
    x, w_in, _, w_conv, b_conv, _, _, b_dt, A_log, D, _, _ = inputs
    kept, cast = kept[:6], kept[6:]
    needs, dtypes = [t is not None for t in inputs], (x.dtype, w_in.dtype)
    w_in, w_x, w_dt, w_out = (w if w.numel() > 0 else inputs[i] for w, i in zip(cast, CAST))
    grads = gradients(OnGPU, needs, *dtypes, gout.contiguous(), x, *kept, w_in, w_conv, b_conv, w_x,
                      w_dt, b_dt, A_log, D, w_out)
    grads = [x.new_empty(0) if t is None else g.to(t.dtype).contiguous()
             for t, g in zip(inputs, grads)]
    grads[9] = grads[9].clone()     # results must not share memory, as those of D and b_dt do
    return tuple(grads)


def block_autograd(ctx, gout, *_):
    inputs = ctx.saved_tensors[:12]
    grads = torch.ops.mamba_py.block_backward(gout, *ctx.saved_tensors[12:], *inputs)
    return tuple(None if t is None else g for t, g in zip(inputs, grads))


def keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


operator = torch.library.custom_op(
    "mamba_py::block", block_forward, mutates_args=(),
    schema=f"({INPUTS}) -> ({', '.join(['Tensor'] * 11)})")
operator_backward = torch.library.custom_op(
    "mamba_py::block_backward", block_backward, mutates_args=(),
    schema=f"(Tensor gout, {KEPT}, {INPUTS}) -> ({', '.join(['Tensor'] * 12)})")
operator.register_autograd(block_autograd, setup_context=keep)


@operator.register_fake
def _(*inputs):
    (batch, L, _), (D, N) = inputs[0].shape, inputs[8].shape
    x, weights = inputs[0], [inputs[i] for i in CAST]
    w_in, w_x, _, w_out = weights
    out, xz, u, dtBC, delta, y = (
        x.new_empty(batch, L, n) for n in (len(w_out), len(w_in), D, len(w_x), D, D))
    kept = x.new_empty(sum(scan_triton._sizes_kept(batch, L, D, N)), dtype=torch.float32)
    return out, xz, u, dtBC, delta, kept, y, *(
        x.new_empty(0 if w.dtype == x.dtype else w.shape) for w in weights)


@operator_backward.register_fake
def _(gout, *kept_and_inputs):
    return tuple(gout.new_empty(0) if t is None else t.new_empty(t.shape)
                 for t in kept_and_inputs[-12:])
