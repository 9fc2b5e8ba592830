"""The step of a token on a CPU by step_cpu.cpp."""
from __future__ import annotations

import ctypes
import math

import torch

from . import cpp
from .block import shapes_of
from .int8 import Int8Linear

NAME = "step_cpu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}    # as in step_cpu.cpp
MOST = 8        # rows: of more of them PyTorch's products are as fast


class Matrix(ctypes.Structure):
    """Of a linear layer, as C++ takes it; `kept` holds the tensors that it points to."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("w", "scale", "bias")),
                *((name, ctypes.c_long) for name in ("N", "K", "type")))

    @classmethod
    def of(cls, linear, kept):
        weight, bias = linear.weight.detach().contiguous(), linear.bias
        scale = linear.scale if weight.dtype == torch.int8 else None
        # detached: a parameter that is given another memory would let go of this one
        given = [weight, *(None if t is None else t.detach().float().contiguous()
                           for t in (scale, bias))]
        kept += given
        return cls(*map(address, given), *weight.shape, TYPES[weight.dtype])


class Layer(ctypes.Structure):
    """A layer, its state and buffers, as C++ takes it."""

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
    weight, others = linear.weight, [linear.bias]
    if isinstance(linear, Int8Linear):
        others.append(linear.scale)
    elif weight.dtype == torch.int8:
        return False
    return (weight.device.type == "cpu" and weight.dtype in TYPES and weight.layout is torch.strided
            and type(weight) in (torch.Tensor, torch.nn.Parameter)
            and all(t is None or t.shape == weight.shape[:1] for t in others)
            and cpp.runs(NAME, torch.empty(0, dtype=torch.float32, device="cpu")))


def layers(model, state):
    """
    All layers of a Mamba-1 as a function x -> x, (rows, d_model), in float32, that updates state in
    place; or None where C++ cannot run, or a layer has parts that are not in it.
    """
    blocks = [layer.mixer for layer in model.backbone["layers"]]
    config, rows, kept = model.config, len(state[0].h), []
    if (config.layer != "mamba" or config.mixer_rms_eps > 0 or config.d_inner % cpp.WIDTH > 0
            or rows > MOST or any(b.config != config for b in blocks)
            or any(layer.mlp is not None for layer in model.backbone["layers"])):
        return None
    D, N, rank, shapes = config.d_inner, config.d_state, config.dt_rank, shapes_of(config)
    of_state = (rows, config.d_conv - 1, D), (rows, D, N)
    for layer, own in zip(model.backbone["layers"], state, strict=True):
        b, there = layer.mixer, dict(layer.mixer.named_parameters())
        if (any(t.shape != shapes.get(name) or t.device.type != "cpu" for name, t in there.items())
                or not all(map(fits, (b.in_proj, b.x_proj, b.dt_proj, b.out_proj)))
                or layer.norm.weight.shape != (config.d_model,)
                or any(t.shape != shape or t.device.type != "cpu"
                       for t, shape in zip(own, of_state))
                or own.conv.dtype not in (torch.float32, torch.bfloat16)
                or own.h.dtype != torch.float32):
            return None
    sizes = config.d_model, config.d_model, 2 * D, D, rank + 2 * N, D, D
    buffers = [torch.empty(rows, size, dtype=torch.float32, device="cpu") for size in sizes]

    def number(t):
        """Its address in float32."""
        kept.append(None if t is None else t.detach().float().contiguous())
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
