"""
The mixers of Mamba-1 and Mamba-2 in training, each as one autograd.Function: what mix of MambaBlock
or Mamba2Block does, one part after the other, without what autograd costs between them. On a GPU
the host takes longer to ask for the parts of a small block than the GPU to compute them. And the
gradients of what was one projection, as u and z, are written side by side: no pass joins them.
"""
from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from . import cpp, layers, norm_cpu, scan_cpu, ssd_cpu
from .kernels import can_run, scan_triton
from .operators import Context, differentiable_once, is_traced

CASTS = {torch.float32, torch.bfloat16, torch.float16}      # what autocast makes 16 bits of
OPTIONAL = {"in_proj.bias", "conv1d.bias", "out_proj.bias"}
# the parameters of the blocks, in the order in which the functions take them
OF_MAMBA = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "x_proj.weight",
            "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight", "out_proj.bias")
OF_MAMBA2 = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log",
             "D", "norm.weight", "out_proj.weight", "out_proj.bias")


def mix(block, x, others, is_plain, plain):
    """
    block.mix(x, *others) of a MambaBlock: (y, None). Or None: where there is a state or a mask,
    where no gradients are asked for, where a part is not just as the block made it, and where
    neither Triton's kernels nor C++ can run.
    is_plain: that of mamba.py.  plain: its PLAIN.
    """
    linears = "in_proj", "x_proj", "dt_proj", "out_proj"
    ready = prepared(block, x, others, shapes_of(block.config), linears, is_plain, plain)
    if not ready or block.config.mixer_rms_eps > 0:
        return None
    dtype, parameters = ready
    parts = next((p for p in (OnGPU, OnCPU) if p.runs(block, x, dtype, parameters)), None)
    if parts is None:
        return None
    inputs = x, *parameters, dtype, parts
    if x.is_cuda:
        key = x.device, dtype, *(None if t is None else t.shape for t in parameters)
        scan_triton.compile_ahead(key, lambda: rehearse(*inputs))
    return Mix.apply(*inputs), None


def shapes_of(c):
    """{name: shape} of the parameters of a MambaBlock with this config."""
    D, N, rank = c.d_inner, c.d_state, c.dt_rank
    return dict(zip(OF_MAMBA, (
        (2 * D, c.d_model), (2 * D,), (D, 1, c.d_conv), (D,), (rank + 2 * N, D), (D, rank), (D,),
        (D, N), (D,), (c.d_model, D), (c.d_model,))))


def rehearse(*inputs):
    """Forward and backward, for compile_ahead."""
    context = Context(needs_input_grad=[True] * len(inputs))
    Mix.backward(context, Mix.forward(context, *inputs))


def mix2(block, x, others, is_plain, plain, gated_norm):
    """
    block.mix(x, *others) of a Mamba2Block, as mix, but only where C++ can run.
    gated_norm: the class of its norm.
    """
    c, linears = block.config, ("in_proj", "out_proj")
    if (not c.rmsnorm or not is_plain(block.norm, gated_norm) or block.norm.norm_before_gate
            or c.d_inner % (block.norm.groups * cpp.WIDTH) > 0):
        return None
    ready = prepared(block, x, others, shapes_of2(c), linears, is_plain, plain)
    if not ready or not OnCPU.runs2(block, x, *ready):
        return None
    return Mix2.apply(x, *ready[1], block), None


def shapes_of2(c):
    """{name: shape} of the parameters of a Mamba2Block with this config."""
    D, H, channels = c.d_inner, c.nheads, c.d_inner + 2 * c.ngroups * c.d_state
    shapes = dict(zip(OF_MAMBA2, (
        (D + channels + H, c.d_model), (D + channels + H,), (channels, 1, c.d_conv), (channels,),
        (H,), (H,), (H,), (D,), (c.d_model, D), (c.d_model,))))
    if not c.rmsnorm:
        del shapes["norm.weight"]
    return shapes


def prepared(block, x, others, shapes, linears, is_plain, plain):
    """
    (the dtype to compute in, the parameters in the order of shapes), or None where the block has to
    run part by part.
    shapes: {name: shape} of all parameters.  linears: the names of the layers that are products.
    """
    kind, of_all = type(block), nn.modules.module
    global_hooks = (of_all._global_forward_hooks, of_all._global_forward_pre_hooks,
                    of_all._global_backward_hooks, of_all._global_backward_pre_hooks)
    if (not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_traced()
            or any(t is not None for t in others) or any(global_hooks)
            or plain.get(kind) != (kind.forward, kind.mix) or "mix" in vars(block)):
        return None
    # from where modules keep them, which takes less time than by their names, and finds no stand-in
    modules = block._modules
    if (not all(name in modules and is_plain(modules[name]) for name in linears)
            or type(modules.get("conv1d")) is not nn.Conv1d):
        return None
    # a bias may have become something else than a parameter
    if any(getattr(m, "bias", None) is not m._parameters.get("bias")
           for m in map(modules.get, (*linears, "conv1d"))):
        return None
    there = {**block._parameters, **{f"{name}.{key}": t for name, m in modules.items() if m
                                     for key, t in m._parameters.items()}}
    there = {name: t for name, t in there.items() if t is not None}
    if not shapes.keys() - OPTIONAL <= there.keys() <= shapes.keys() or type(x) is not torch.Tensor:
        return None
    if any(type(t) is not nn.Parameter or t.shape != shapes[name] or t.device != x.device
           for name, t in there.items()) or x.shape[2] != block.config.d_model:
        return None
    dtype, cast = x.dtype, torch.is_autocast_enabled(x.device.type)
    dtypes = {dtype, *(t.dtype for name, t in there.items()
                       if name.partition(".")[0] in linears and name not in block.exact)}
    if cast:
        dtype = torch.get_autocast_dtype(x.device.type)
    fit = x.numel() > 0 and (dtypes <= CASTS if cast else len(dtypes) == 1)
    if not fit or not (x.requires_grad or any(t.requires_grad for t in there.values())):
        return None
    return dtype, [there.get(name) for name in shapes]


def without_autocast(backward):
    """Decorator of a backward pass that computes in the types of what was saved, wherever it is
    called."""
    @functools.wraps(backward)
    def run(ctx, gout):
        kind = gout.device.type
        if not torch.is_autocast_enabled(kind):
            return backward(ctx, gout)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, gout)
    return run


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, b_in, w_conv, b_conv, w_x, w_dt, b_dt, A_log, D, w_out, b_out, dtype,
                parts):
        (batch, length, _), rank, weight_dtype = x.shape, w_dt.shape[1], w_in.dtype
        w_in, b_in, w_x, w_dt, w_out, b_out = all_to(dtype, w_in, b_in, w_x, w_dt, w_out, b_out)
        rows = x.to(dtype).flatten(0, 1)                                    # (B L, d_model)
        xz = parts.product(rows, w_in, b_in)                                # (B L, 2 D)
        u, z = xz.view(batch, length, -1).chunk(2, dim=-1)                  # (B, L, D) each
        u = parts.conv(u, w_conv, b_conv)
        dtBC = parts.product(u.flatten(0, 1), w_x, None)                    # (B L, rank + 2 N)
        delta = F.linear(dtBC[:, :rank], w_dt).view(u.shape)
        B, C = Mix.B_and_C(dtBC, u, A_log)
        y, kept = parts.scan(u, delta, A_log, B, C, D, z, b_dt)
        out = parts.product(y.flatten(0, 1), w_out, b_out)
        ctx.parts, ctx.weight_dtype = parts, weight_dtype
        ctx.has_bias = b_in is not None, b_out is not None
        # x itself if it can be: to differentiate again is an error of what was saved, and a view
        # that is made here does not know that it comes from x
        ctx.save_for_backward(x if x.dtype == dtype else rows, xz, u, dtBC, delta, kept, y, w_in,
                              w_conv, b_conv, w_x, w_dt, b_dt, A_log, D, w_out)
        return out.view(batch, length, -1)

    @staticmethod
    @differentiable_once
    @without_autocast
    def backward(ctx, gout):
        (x, xz, u, dtBC, delta, kept, y, w_in, w_conv, b_conv, w_x, w_dt, b_dt, A_log, D,
         w_out) = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        (needs_x, needs_in, _, _, _, needs_w_x, needs_dt, _, _, _, needs_out, *_) = (
            ctx.needs_input_grad)
        (batch, length, _), rank = u.shape, w_dt.shape[1]
        parts, weight_dtype = ctx.parts, ctx.weight_dtype
        gout = gout.to(rows.dtype).reshape(len(rows), -1)                   # (B L, d_model)
        gy, gw_out = parts.product_back(gout, y.flatten(0, 1), w_out, True, needs_out, weight_dtype)
        # written part by part below: gz, gB, gC by the scan, dt's by a product, u's by conv_back
        gxz, gdtBC = torch.empty_like(xz), torch.empty_like(dtBC)
        (u_in, z), (gu_in, gz) = (t.view(batch, length, -1).chunk(2, dim=-1) for t in (xz, gxz))
        (B, C), gBC = (Mix.B_and_C(t, u, A_log) for t in (dtBC, gdtBC))
        gu, gdelta, gA_log, gD, gb_dt = parts.scan_back(gy.view(u.shape), kept, u, delta, A_log, B,
                                                        C, D, z, b_dt, gz, *gBC)
        gdelta, u_rows = gdelta.flatten(0, 1), u.flatten(0, 1)
        torch.mm(gdelta, w_dt, out=gdtBC[:, :rank])
        gw_dt = parts.of_weight(gdelta, dtBC[:, :rank], weight_dtype) if needs_dt else None
        gw_x = parts.of_weight(gdtBC, u_rows, weight_dtype) if needs_w_x else None
        gu.view(u_rows.shape).addmm_(gdtBC, w_x)        # u is what x_proj has read, too
        gw_conv, gb_conv = parts.conv_back(gu, u_in, w_conv, b_conv, gu_in)
        gx, gw_in = parts.product_back(gxz, rows, w_in, needs_x, needs_in, weight_dtype)
        gb_in, gb_out = (g.sum(0) if has else None for g, has in zip((gxz, gout), ctx.has_bias))
        gx = None if gx is None else gx.view(batch, length, -1)
        return (gx, gw_in, gb_in, gw_conv, gb_conv, gw_x, gw_dt, gb_dt, gA_log, gD, gw_out,
                gb_out, None, None)

    @staticmethod
    def B_and_C(dtBC, u, A_log):
        """Of what x_proj gives, or of its gradient: (B, L, N) each."""
        return dtBC.view(*u.shape[:2], -1)[..., -2 * A_log.shape[1]:].chunk(2, dim=-1)


def all_to(dtype, *tensors):
    """The tensors, which may be None, in this dtype; all by one call."""
    others = [t for t in tensors if t is not None and t.dtype != dtype]
    if not others:
        return tensors
    made = [torch.empty_like(t, dtype=dtype) for t in others]
    torch._foreach_copy_(made, others)
    made = iter(made)
    return [t if t is None or t.dtype == dtype else next(made) for t in tensors]


class Mix2(torch.autograd.Function):
    """On a CPU."""

    @staticmethod
    def forward(ctx, x, w_in, b_in, w_conv, b_conv, dt_bias, A_log, D, w_norm, w_out, b_out, block):
        parts, rows = OnCPU, x.flatten(0, 1)                                # (B L, d_model)
        ctx.block, ctx.has_bias = block, (b_in is not None, b_out is not None)
        projected = parts.product(rows, w_in, b_in).view(*x.shape[:2], -1)
        z, uBC, dt = Mix2.split(projected, block)
        uBC = parts.conv(uBC, w_conv, b_conv)
        u, B, C = Mix2.of_heads(uBC, block)
        delta, a, own = Mix2.steps(dt, dt_bias, A_log, D, B, C, block)
        state = u.new_zeros(len(u), *u.shape[2:], B.shape[3])               # (B, H, P, N)
        y, kept = ssd_cpu.scanned(u, delta, a, B, C, own, state, True)
        y = y.flatten(2)                                                    # (B, L, D)
        normed = norm_cpu.normed(y, z, w_norm, block.norm.groups, block.norm.eps)
        out = parts.product(normed.flatten(0, 1), w_out, b_out)
        ctx.save_for_backward(x, projected, uBC, kept, y, normed, w_in, w_conv, b_conv, dt_bias,
                              A_log, D, w_norm, w_out)
        return out.view(*x.shape[:2], -1)

    @staticmethod
    @differentiable_once
    @without_autocast
    def backward(ctx, gout):
        (x, projected, uBC, kept, y, normed, w_in, w_conv, b_conv, dt_bias, A_log, D, w_norm,
         w_out) = ctx.saved_tensors
        rows = x.flatten(0, 1)
        parts, block, dtype, needs = OnCPU, ctx.block, rows.dtype, ctx.needs_input_grad
        gout = gout.reshape(len(rows), -1)                                  # (B L, d_model)
        gy, gw_out = parts.product_back(gout, normed.flatten(0, 1), w_out, True, needs[9], dtype)
        gprojected, guBC = torch.empty_like(projected), torch.empty_like(uBC)
        (z, u_in, dt), (gz, gu_in, gdt) = (Mix2.split(t, block) for t in (projected, gprojected))
        (u, B, C), (gu, gB, gC) = (Mix2.of_heads(t, block) for t in (uBC, guBC))
        gy, gw_norm = norm_cpu.gradients(gy.view(y.shape), y, z, w_norm, block.norm.groups,
                                         block.norm.eps, gz)
        with torch.enable_grad():       # once more, for autograd: they are few beside the rest
            leaves = [t.detach().requires_grad_() for t in (dt, dt_bias, A_log, D, B, C)]
            steps = Mix2.steps(*leaves, block)
        delta, a, own = (t.detach() for t in steps)
        gstate = u.new_zeros(len(u), *u.shape[2:], B.shape[3])
        gsteps = ssd_cpu.gradients(gy.view(u.shape), gstate, kept, u, delta, a, B, C, own, gu, gB,
                                   gC)
        of_dt, gdt_bias, gA_log, gD, of_B, of_C = torch.autograd.grad(steps, leaves, gsteps)
        for g, more in ((gB, of_B), (gC, of_C)):
            g.add_(more)
        gdt.copy_(of_dt)
        gw_conv, gb_conv = parts.conv_back(guBC, u_in, w_conv, b_conv, gu_in)
        gprojected = gprojected.flatten(0, 1)
        gx, gw_in = parts.product_back(gprojected, rows, w_in, needs[0], needs[1], dtype)
        gb_in, gb_out = (g.sum(0) if has else None
                         for g, has in zip((gprojected, gout), ctx.has_bias))
        gx = None if gx is None else gx.view(*y.shape[:2], -1)
        return (gx, gw_in, gb_in, gw_conv, gb_conv, gdt_bias, gA_log, gD, gw_norm, gw_out, gb_out,
                None)

    @staticmethod
    def split(t, block):
        """z (B, L, D), u with B and C (B, L, D + 2 G N), dt (B, L, H), of what in_proj gives."""
        c = block.config
        return t.split((c.d_inner, c.d_inner + 2 * c.ngroups * c.d_state, c.nheads), dim=-1)

    @staticmethod
    def of_heads(uBC, block):
        """u (B, L, H, P), and B and C (B, L, G, N)."""
        c = block.config
        u, B, C = uBC.split((c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state), dim=-1)
        return (u.unflatten(-1, (c.nheads, -1)), B.unflatten(-1, (c.ngroups, -1)),
                C.unflatten(-1, (c.ngroups, -1)))

    @staticmethod
    def steps(dt, dt_bias, A_log, D, B, C, block):
        """delta, a = delta A, and own, what u_t counts for y_t, (B, L, H) each: as in ssd of
        mamba2.py."""
        c = block.config
        delta = F.softplus(dt + dt_bias).clamp(*c.dt_limit)
        own = (B * C).sum(-1).repeat_interleave(c.nheads // c.ngroups, dim=2) * delta + D
        return delta, delta * -torch.exp(A_log), own


class OnGPU:
    """The parts by Triton's kernels."""

    product = staticmethod(F.linear)

    @staticmethod
    def runs(block, x, _dtype, _parameters):
        d_inner, d_state = block.A_log.shape
        return (block.scan in ("auto", "triton") and can_run(x) and d_inner % 8 == 0
                and d_state <= 256)

    @staticmethod
    def of_weight(gy, x, dtype):
        """gy^T x, the gradient of a weight of this dtype. If that is float32, so is it, even where
        autocast made 16 bits of the others."""
        if dtype != torch.float32 or gy.dtype == torch.float32:
            return gy.t() @ x
        return torch.mm(gy.t(), x, out_dtype=dtype)

    @staticmethod
    def product_back(gy, x, weight, needs_x, needs_weight, dtype):
        return (gy @ weight if needs_x else None,
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
        sizes = block.config.headdim, block.config.d_state
        return (not any(n % cpp.WIDTH for n in sizes)
                and OnCPU.runs(block, x, dtype, parameters, ssd_cpu.NAME, norm_cpu.NAME))

    @staticmethod
    def by_convolution(x):
        """Whether products with the rows x are sooner so."""
        return layers.Linear is layers.LinearByConvolution and layers.are_many(len(x))

    @staticmethod
    def product(x, weight, bias):
        return (layers.by_convolution if OnCPU.by_convolution(x) else F.linear)(x, weight, bias)

    @staticmethod
    def of_weight(gy, x, _dtype):
        return gy.t() @ x

    @staticmethod
    def product_back(gy, x, weight, needs_x, needs_weight, _dtype):
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
