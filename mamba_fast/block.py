"""
The mixer of Mamba-1 in training as one autograd.Function: what MambaBlock.mix does, one part after
the other, without what autograd costs between them. On a GPU the host takes longer to ask for the
parts of a small block than the GPU to compute them. And the gradients of u and z, which were one
projection, are written side by side, as are those of dt, B and C: no pass joins them.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import cpp, layers, scan_cpu
from .kernels import can_run, scan_triton
from .operators import differentiable_once, is_traced

PARTS = "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"
CASTS = {torch.float32, torch.bfloat16, torch.float16}      # what autocast makes 16 bits of


def mix(block, x, state, mask, seq_idx, is_plain):
    """
    block.mix(x, state, mask, seq_idx) of a MambaBlock: (y, None). Or None: where there is a state
    or a mask, where no gradients are asked for, where a part is not just as MambaBlock made it, and
    where neither Triton's kernels nor C++ can run.
    is_plain: that of mamba.py.
    """
    if (not torch.is_grad_enabled() or torch.compiler.is_compiling() or block.config.mixer_rms_eps
            or not state is mask is seq_idx is None or nn.modules.module._has_any_global_hook()):
        return None
    # from where modules keep them, which takes less time than by their names, and finds no stand-in
    modules = [block._modules.get(name) for name in PARTS]
    if (None in modules or not all(map(is_plain, modules[:1] + modules[2:]))
            or type(modules[1]) is not nn.Conv1d or is_traced()):
        return None
    (w_in, b_in), (w_conv, b_conv), (w_x, b_x), (w_dt, b_dt), (w_out, b_out) = (
        map(m._parameters.get, ("weight", "bias")) for m in modules)
    needed = w_in, w_conv, w_x, w_dt, b_dt, w_out, *map(block._parameters.get, ("A_log", "D"))
    given = *needed, *(t for t in (b_in, b_conv, b_out) if t is not None)
    if b_x is not None or any(type(t) is not nn.Parameter for t in given):
        return None
    dtype = x.dtype
    dtypes = {dtype, *(t.dtype for t in (w_in, b_in, w_x, w_dt, w_out, b_out) if t is not None)}
    if torch.is_autocast_enabled(x.device.type):
        dtype, fit = torch.get_autocast_dtype(x.device.type), dtypes <= CASTS
    else:
        fit = len(dtypes) == 1
    if not fit or type(x) is not torch.Tensor or x.numel() == 0:
        return None
    parts = next((p for p in (OnGPU, OnCPU) if p.runs(block, x, dtype)), None)
    if parts is None or not any(t.requires_grad for t in (x, *given)):
        return None
    *_, A_log, D = needed
    return Mix.apply(x, w_in, b_in, w_conv, b_conv, w_x, w_dt, b_dt, A_log, D, w_out, b_out, dtype,
                     parts), None


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, b_in, w_conv, b_conv, w_x, w_dt, b_dt, A_log, D, w_out, b_out, dtype,
                parts):
        (batch, length, _), rank, kept_as = x.shape, w_dt.shape[1], w_in.dtype
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
        ctx.parts, ctx.kept_as, ctx.has_bias = parts, kept_as, (b_in is not None, b_out is not None)
        ctx.save_for_backward(rows, xz, u, dtBC, delta, kept, y, w_in, w_conv, b_conv, w_x, w_dt,
                              b_dt, A_log, D, w_out)
        return out.view(batch, length, -1)

    @staticmethod
    @differentiable_once
    def backward(ctx, gout):
        (rows, xz, u, dtBC, delta, kept, y, w_in, w_conv, b_conv, w_x, w_dt, b_dt, A_log, D,
         w_out) = ctx.saved_tensors
        (needs_x, needs_in, _, _, _, needs_w_x, needs_dt, _, _, _, needs_out, *_) = (
            ctx.needs_input_grad)
        (batch, length, _), rank, parts, kept_as = u.shape, w_dt.shape[1], ctx.parts, ctx.kept_as
        gout = gout.to(rows.dtype).reshape(len(rows), -1)                   # (B L, d_model)
        gy, gw_out = parts.product_back(gout, y.flatten(0, 1), w_out, True, needs_out, kept_as)
        gxz, gdtBC = torch.empty_like(xz), torch.empty_like(dtBC)
        (u_in, z), (gu_in, gz) = (t.view(batch, length, -1).chunk(2, dim=-1) for t in (xz, gxz))
        (B, C), gBC = (Mix.B_and_C(t, u, A_log) for t in (dtBC, gdtBC))
        gu, gdelta, gA_log, gD, gb_dt = parts.scan_back(gy.view(u.shape), kept, u, delta, A_log, B,
                                                        C, D, z, b_dt, gz, *gBC)
        gdelta, u_rows = gdelta.flatten(0, 1), u.flatten(0, 1)
        torch.mm(gdelta, w_dt, out=gdtBC[:, :rank])
        gw_dt = parts.of_weight(gdelta, dtBC[:, :rank], kept_as) if needs_dt else None
        gw_x = parts.of_weight(gdtBC, u_rows, kept_as) if needs_w_x else None
        gu.view(u_rows.shape).addmm_(gdtBC, w_x)
        gw_conv, gb_conv = parts.conv_back(gu, u_in, w_conv, b_conv, gu_in)
        gx, gw_in = parts.product_back(gxz, rows, w_in, needs_x, needs_in, kept_as)
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


class OnGPU:
    """The parts by Triton's kernels."""

    product = staticmethod(F.linear)

    @staticmethod
    def runs(block, x, dtype):
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
        _, gweight, gbias, _ = scan_triton._run_conv_back(gy, x, weight, bias, None, gx)
        return gweight, None if bias is None else gbias

    @staticmethod
    def exact(u, delta, A_log, B, C, D, z, bias):
        return u, delta, A_log.float(), B, C, D.float(), z, bias.float()

    @staticmethod
    def scan(*inputs):
        y, _, kept = scan_triton._run(*OnGPU.exact(*inputs), None, True, True, log_A=True)
        return y, kept

    @staticmethod
    def scan_back(gy, kept, u, delta, A_log, B, C, D, z, bias, *into):
        _, _, _, _, _, D, z, bias = OnGPU.exact(u, delta, A_log, B, C, D, z, bias)
        gu, gdelta, _, _, _, gA_log, (gD, gbias), _ = scan_triton._run_back(
            gy, None, kept, u, delta, D, z, bias, A_log.shape[1], True, False, None, *into, True)
        return gu, gdelta, gA_log, gD, gbias


class OnCPU:
    """The parts by C++ and oneDNN, in float32."""

    @staticmethod
    def runs(block, x, dtype):
        taps = block.conv1d.weight.shape[2]
        return (block.scan in ("auto", "chunked") and dtype == torch.float32
                and all(p.dtype == torch.float32 for p in block.parameters(recurse=False))
                and block.conv1d.weight.dtype == torch.float32
                and len(block.D) % cpp.WIDTH == 0 and x.shape[1] > 1 and taps in (2, 3, 4)
                and cpp.runs(scan_cpu.NAME, x) and cpp.runs("conv_cpu", x))

    @staticmethod
    def product(x, weight, bias):
        by_convolution = layers.Linear is layers.LinearByConvolution and len(x) >= 512
        return (layers.by_convolution if by_convolution else F.linear)(x, weight, bias)

    @staticmethod
    def of_weight(gy, x, _dtype):
        return gy.t() @ x

    @staticmethod
    def product_back(gy, x, weight, needs_x, needs_weight, _dtype):
        if layers.Linear is layers.LinearByConvolution and len(x) >= 512:
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
