"""
Layers and the loss, with the work done in a better way than PyTorch or autograd would: products of
many rows on some CPUs, the short convolution, the loss of a large vocabulary.
"""
from __future__ import annotations

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import cpp
from .kernels import can_run, rows_triton
from .operators import COMPILES, as_operator, differentiable_once, is_exporting

LOGITS = 2 ** 28    # numbers that are computed at once for a loss; as float32, 1 GB


def at_least_float32(x):
    """The dtype to compute in for x: its own, or float32 for 16 bits."""
    return torch.promote_types(x.dtype, torch.float32)


# ------------------------------------------------------------------------------------------------
# Products of many rows on AMD CPUs with AVX-512


def mkl_is_slow():
    """Whether products go to MKL on a CPU that is not Intel's, where MKL does without AVX-512."""
    cpuinfo = Path("/proc/cpuinfo")     # names the maker on Linux; on Windows platform does
    about = cpuinfo.read_text()[:1024] if cpuinfo.exists() else platform.processor()
    return ("AuthenticAMD" in about and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available())


def are_many(rows):
    """Whether there are enough of them. Of what is compiled or exported for any number that is not
    known: to ask would tie it to what is so now."""
    if torch.compiler.is_compiling() and COMPILES:
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes a while
        return statically_known_true(rows >= 512)
    return rows >= 512


class LinearByConvolution(nn.Linear):
    """nn.Linear, but many float32 rows on a CPU go through a convolution of width 1: PyTorch leaves
    it to oneDNN, which is twice as fast where mkl_is_slow."""

    def forward(self, x):
        weight, rows = self.weight, x.numel() // x.shape[-1]
        if (not are_many(rows) or x.device.type != "cpu" or x.dtype != torch.float32
                or type(weight) is not nn.Parameter or torch.is_autocast_enabled("cpu")):
            return F.linear(x, weight, self.bias)
        return by_convolution(x.reshape(rows, -1), weight, self.bias).reshape(*x.shape[:-1], -1)


def by_convolution(x, weight, bias):
    """x (rows, in) weight^T + bias -> (rows, out)."""
    y = F.conv2d(as_image(x), weight[..., None, None], bias)                    # (1, out, 1, rows)
    return y.permute(0, 2, 3, 1).view(len(x), -1)


def by_convolution_back(gy, x, weight, needs_x, needs_weight):
    """Its gradients gx and gweight, those that are needed."""
    gx, gweight, _ = torch.ops.aten.convolution_backward(
        as_image(gy), as_image(x), weight[..., None, None], None, (1, 1), (0, 0), (1, 1), False,
        (0, 0), 1, (needs_x, needs_weight, False))
    gx = gx.permute(0, 2, 3, 1).view(x.shape) if needs_x else None
    return gx, gweight.view(weight.shape) if needs_weight else None


def as_image(x):
    """(rows, X) as (1, X, 1, rows), still row by row in memory."""
    return x.reshape(1, 1, len(x), -1).permute(0, 3, 1, 2)


Linear = LinearByConvolution if mkl_is_slow() else nn.Linear

# ------------------------------------------------------------------------------------------------
# The convolution


def conv_silu(x, weight, bias, state):
    """
    silu of the causal convolution, as in conv_silu of mamba.py: x (B, L, D), weight (D, 1, d_conv),
    bias (D,) or None, state (B, d_conv - 1, D) or None -> (B, L, D).
    None in what torch.compile compiles for other than float32 on a CPU, for it fuses the plain way,
    and in what torch.export exports.
    """
    if is_exporting():
        return None
    taps = torch.stack(weight[:, 0].unbind(1))                                  # (d_conv, D)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if state is None:
        state = x.new_zeros(x.shape[0], len(taps) - 1, x.shape[2])
    inputs = x, taps, bias, state.to(x.dtype)
    if not torch.compiler.is_compiling():
        return ConvSilu.apply(*inputs)
    fits = ConvSilu.fits(*inputs) and all(map(cpp.is_float32_on_cpu, inputs))
    return conv_operator(*inputs) if fits and cpp.exists("conv_cpu") else None


class ConvSilu(torch.autograd.Function):
    """silu(y), y_t = bias + sum_k taps[k] x_{t - (d_conv - 1) + k}, by conv_cpu.cpp where that runs
    for it. Else with a backward pass of its own, for autograd would make a full-size gradient for
    each of the shifted x."""

    saved = "x", "taps", "bias", "state"

    @staticmethod
    def forward(ctx, x, taps, bias, state):
        if ConvSilu.fits(x, taps, bias, state) and cpp.runs("conv_cpu", x, taps, bias, state):
            kept, out = x.new_empty(0), ConvSilu.in_cpp(x, taps, bias, state)
        else:
            kept = torch.addcmul(bias, x, taps[-1])                             # (B, L, D)
            for tap, x_k in zip(taps[:-1], ConvSilu.shifted(x, taps, state)):
                kept.addcmul_(x_k, tap)
            kept = kept.to(x.dtype)
            out = F.silu(kept)
        ctx.save_for_backward(kept, x, taps, bias, state)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, gout):
        y, x, taps, bias, state = ctx.saved_tensors
        length, before = x.shape[1], state.shape[1]
        if y.numel() < x.numel():       # C++ computes it again
            gx = x.new_empty(x.shape)
            return gx, *ConvSilu.gradients_in_cpp(gout.contiguous(), x, taps, bias, state, gx)
        gy = torch.ops.aten.silu_backward(gout, y)
        gy = gy.to(at_least_float32(gy))
        # the gradient of state and x, one after the other: tap k meets the gy of k steps later
        padded = F.pad(gy, (0, 0, before, before))
        gseen = padded[:, before:] * taps[0]
        for k, tap in enumerate(taps[1:], 1):
            gseen.addcmul_(padded[:, before - k:][:, :before + length], tap)
        gtaps = [(gy * x_k).sum((0, 1)) for x_k in (*ConvSilu.shifted(x, taps, state), x)]
        gx, gstate = gseen[:, before:], gseen[:, :before]
        return (gx.to(x.dtype), torch.stack(gtaps).to(taps.dtype), gy.sum((0, 1)).to(taps.dtype),
                gstate.to(state.dtype))

    @staticmethod
    def fits(x, taps, bias, state):
        return (len(taps) in (2, 3, 4) and x.shape[1] > 1 and x.shape[2] % cpp.WIDTH == 0
                and taps.shape[1:] == bias.shape == x.shape[2:] and x.numel() > 0)

    @staticmethod
    def in_cpp(x, taps, bias, state):
        rows, out = cpp.rows_of(x), x.new_empty(x.shape)
        cpp.call(cpp.compiled("conv_cpu").forward, *x.shape, len(taps), rows.stride(0), rows,
                 taps.contiguous(), bias.contiguous(), state.contiguous(), out)
        return out

    @staticmethod
    def gradients_in_cpp(gout, x, taps, bias, state, gx):
        """gtaps, gbias and gstate. gx: where to write that of x; its rows may be apart."""
        rows, (batch, _, d_inner) = cpp.rows_of(x), x.shape
        gtaps, gbias = x.new_empty(batch, *taps.shape), x.new_empty(batch, d_inner)
        gstate = x.new_empty(state.shape)
        cpp.call(cpp.compiled("conv_cpu").backward, *x.shape, len(taps), rows.stride(0),
                 gx.stride(1), rows, taps.contiguous(), bias.contiguous(), state.contiguous(),
                 gout, gx, gtaps, gbias, gstate)
        return gtaps.sum(0), gbias.sum(0), gstate

    @staticmethod
    def shifted(x, taps, state):
        """What each tap meets, (B, L, D): state and x, d_conv - 1, ... 1 steps back. Without the
        last tap, which meets x."""
        seen = torch.cat([state, x], dim=1)
        return [seen[:, k:k + x.shape[1]] for k in range(len(taps) - 1)]


conv_operator = as_operator("mamba_py::conv_silu", ConvSilu,
                            "Tensor x, Tensor taps, Tensor bias, Tensor state", results=("x",))


# ------------------------------------------------------------------------------------------------
# What is around the recurrence of the scan


def softplus(x):
    """F.softplus, which keeps the result alone for its backward pass, and not x."""
    return F.softplus(x) if torch.compiler.is_compiling() else Softplus.apply(x)


class Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.softplus(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return torch.expm1(-y).neg_().mul_(g)       # sigmoid(x) is 1 - exp(-softplus(x))


def gated(y, z):
    """y * silu(z) for any shape, which keeps y and z alone for its backward pass, not silu(z)."""
    return y * F.silu(z) if torch.compiler.is_compiling() else Gate.apply(y, z)


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z):
        ctx.save_for_backward(y, z)
        return F.silu(z).mul_(y)

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        y, z = ctx.saved_tensors
        gz = torch.ops.aten.silu_backward(g * y, z)
        return F.silu(z).mul_(g), gz


# ------------------------------------------------------------------------------------------------
# The loss


def cross_entropy(x, head, plain, targets, vocab_size):
    """
    The sum of the cross-entropies of head(x)[:, :vocab_size], a number. Logits of a large
    vocabulary take more memory than all the rest of a model, so they are never all there at once.
    None where they are few.
    x: (R, d_model).  targets: (R,), -100 is ignored.  plain: whether the head is its
    matrix and nothing more.
    """
    rows = max(1, LOGITS // vocab_size)
    if rows >= len(x):
        return None
    if plain and head.bias is None and torch.is_grad_enabled():
        fused = can_run(x) and not torch.compiler.is_compiling()
        # with the padding of the vocabulary, which the kernel leaves out of the loss: products with
        # an odd number of rows take a GPU three times as long
        weight = head.weight if fused else head.weight[:vocab_size]
        return LinearCrossEntropy.apply(x, weight, targets, rows, vocab_size, fused)

    def of_part(x, targets):
        logits = head(x)[:, :vocab_size].float()
        return F.cross_entropy(logits, targets, reduction="sum")
    return sum(of_part(*part) for part in zip(x.split(rows), targets.split(rows)))


def softmax_gradient(logits, targets, vocab_size):
    """The sum of the cross-entropies of logits (R, vocab_size) for targets (R,), where a negative
    one is ignored, and the gradient of it: the probabilities, less 1 at the target."""
    target = targets[:, None]                                                   # (R, 1)
    counts, target = target >= 0, target.clamp(min=0)
    logp = F.log_softmax(logits, dim=-1, dtype=at_least_float32(logits))
    logp_target = logp.gather(1, target)                                        # (R, 1)
    at_target = (logp_target.exp() - 1).to(logits.dtype)
    gradient = logp.exp_().to(logits.dtype).scatter_(1, target, at_target)
    return -(logp_target * counts).sum(), gradient.masked_fill_(~counts, 0)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the losses: logits are neither kept nor computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, rows, vocab_size, fused):
        loss_and_gradient = rows_triton.softmax_gradient if fused else softmax_gradient
        losses, gx, gweight = [], [], 0
        for x_p, targets_p in zip(x.split(rows), targets.split(rows)):
            logits = F.linear(x_p, weight)                                      # (rows, V)
            loss, glogits = loss_and_gradient(logits, targets_p, vocab_size)
            losses.append(loss)
            gx.append(glogits @ weight)
            gweight = gweight + (glogits.t() @ x_p).to(weight.dtype)
        ctx.save_for_backward(torch.cat(gx).to(x.dtype), gweight)
        return torch.stack(losses).sum()

    @staticmethod
    @differentiable_once
    def backward(ctx, gloss):
        gx, gweight = ctx.saved_tensors
        return gx * gloss, gweight * gloss, None, None, None, None
