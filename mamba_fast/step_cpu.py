"""The step of a token on a CPU by step_cpu.cpp."""
from __future__ import annotations

import ctypes
import math

import torch

from . import cpp

NAME = "step_cpu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}    # as in step_cpu.cpp
MOST = 8        # rows: of more of them PyTorch's products are as fast


class Matrix(ctypes.Structure):
    """Of a linear layer, as C++ takes it; `kept` holds the tensors that it points to."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("w", "scale", "bias")),
                *((name, ctypes.c_long) for name in ("N", "K", "type")))

    @classmethod
    def of(cls, linear, kept):
        weight = linear.weight.contiguous()
        scale, bias = (getattr(linear, name, None) for name in ("scale", "bias"))
        given = [weight, *(None if t is None else t.float().contiguous() for t in (scale, bias))]
        kept += given
        return cls(*map(address, given), *weight.shape, TYPES[weight.dtype])


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "d_model", "D", "N", "rank", "width")),
        ("eps", ctypes.c_double), ("conv_type", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("norm", "taps", "conv_bias", "A2", "D_u")),
        *((name, Matrix) for name in ("in_", "x", "dt", "out")),
        *((name, ctypes.c_void_p) for name in (
            "conv", "h", "hidden", "normed", "xz", "u", "dtBC", "delta", "y")))


def address(t):
    return None if t is None else t.data_ptr()


def product(linear, rows):
    """A linear layer as a function (rows, in) -> (rows, out), or None where C++ cannot run."""
    if rows > MOST or not fits(linear):
        return None
    kept = []
    matrix, call = Matrix.of(linear, kept), cpp.compiled(NAME).few_rows

    def function(x):
        given, y = x.float().contiguous(), x.new_empty(rows, matrix.N, dtype=torch.float32)
        call(torch.get_num_threads(), ctypes.byref(matrix), ctypes.c_long(rows),
             *(ctypes.c_void_p(t.data_ptr()) for t in (given, y)))
        return y.to(x.dtype)
    function.kept = kept
    return function


def fits(linear):
    weight = linear.weight
    return (weight.device.type == "cpu" and weight.dtype in TYPES
            and cpp.runs(NAME, torch.empty(0, dtype=torch.float32, device="cpu")))


def layers(model, state):
    """
    All layers of a Mamba-1 as a function x -> x, (rows, d_model), in float32, that updates state in
    place; or None where C++ cannot run, or a layer has parts that are not in it.
    """
    blocks = [layer.mixer for layer in model.backbone["layers"]]
    config, rows = model.config, len(state[0].h)
    if (config.layer != "mamba" or config.d_intermediate or config.mixer_rms_eps or rows > MOST
            or config.d_inner % cpp.WIDTH or any(b.config != config for b in blocks)):
        return None
    linears = [m for b in blocks for m in (b.in_proj, b.x_proj, b.dt_proj, b.out_proj)]
    if not all(map(fits, linears)) or any(
            own.conv.dtype not in (torch.float32, torch.bfloat16) or own.h.dtype != torch.float32
            for own in state):
        return None
    kept, D, N, rank = [], config.d_inner, config.d_state, config.dt_rank
    sizes = config.d_model, config.d_model, 2 * D, D, rank + 2 * N, D, D
    buffers = [torch.empty(rows, size, dtype=torch.float32, device="cpu") for size in sizes]

    def number(t):
        """Its address in float32."""
        kept.append(None if t is None else t.float().contiguous())
        return address(kept[-1])
    made = [Layer(
        rows, config.d_model, D, N, rank, config.d_conv, layer.norm.eps, TYPES[own.conv.dtype],
        *map(number, (layer.norm.weight, b.conv1d.weight[:, 0].t(), b.conv1d.bias,
                      -torch.exp(b.A_log.float()) / math.log(2), b.D)),
        *(Matrix.of(m, kept) for m in (b.in_proj, b.x_proj, b.dt_proj, b.out_proj)),
        own.conv.data_ptr(), own.h.data_ptr(), *map(address, buffers))
        for layer, b, own in zip(model.backbone["layers"], blocks, state)]
    all_layers, call = (Layer * len(made))(*made), cpp.compiled(NAME).layers

    def function(x):
        buffers[0].copy_(x)
        call(torch.get_num_threads(), ctypes.c_long(len(made)), all_layers)
        return buffers[0]
    function.kept = kept, state
    return function
