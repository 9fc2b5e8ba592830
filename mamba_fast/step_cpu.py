"""The step of a token on a CPU by step_cpu.cpp."""
from __future__ import annotations

import ctypes
import math
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import cpp
from .block import OPTIONAL, shapes_of, shapes_of2, shapes_of3
from .int8 import Int8Linear

NAME = "step_cpu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}    # as in step_cpu.cpp
MOST = 8        # rows, one for each text: of more of them PyTorch's products are as fast


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


class Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_double), ("groups", ctypes.c_long))


class Turning(ctypes.Structure):
    _fields_ = (("angles", ctypes.c_long), ("A_floor", ctypes.c_double),
                ("B_norm", Norm), ("C_norm", Norm),
                *((name, ctypes.c_void_p) for name in ("B_bias", "C_bias", "theta", "k", "x")))


class Layer(ctypes.Structure):
    """A layer, its state and buffers, as C++ takes it: all arrays by their addresses."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "d_model", "D", "N", "width", "channels",
                                             "rank", "headdim", "groups")),
        ("norm", Norm), ("gated_norm", Norm), ("norm_before_gate", ctypes.c_long),
        ("dt_least", ctypes.c_double), ("dt_most", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("taps", "conv_bias", "A2", "D_u", "dt_bias")),
        *((name, Matrix) for name in ("in_", "x", "dt", "out")), ("turning", Turning),
        ("conv_type", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in (
            "conv", "h", "hidden", "normed", "projected", "u", "dtBC", "delta", "y")))


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


class Sizes(NamedTuple):
    """Of the layers of a model, for some rows."""

    shapes: dict            # {name: shape} of the parameters of a mixer
    of_state: tuple         # the shapes of its state
    in_vectors: tuple       # numbers that have to fill whole vectors in C++
    channels: int           # of the convolution
    of_u: int               # numbers of a row in the buffer u, and in dtBC
    of_dtBC: int

    @classmethod
    def of(cls, config, rows):
        D, N, R = config.d_inner, config.d_state, config.dt_rank
        if config.layer == "mamba":
            of_state = (rows, config.d_conv - 1, D), (rows, D, N)
            return cls(shapes_of(config), of_state, (D,), D, D, R + 2 * N)
        (H, P), G = (config.nheads, config.headdim), config.ngroups
        if config.layer == "mamba2":
            channels = D + 2 * G * N
            of_state = (rows, config.d_conv - 1, channels), (rows, H, P, N)
            return cls(shapes_of2(config), of_state, (D, P, channels), channels, channels, 2 * N)
        of_state = (rows, H, config.n_angles), (rows, H, P, N), (rows, 1, H, N), (rows, H, P)
        return cls(shapes_of3(config), of_state, (D, N), 0, H * N, 2 * H * N)


def layers(model, state):
    """
    All layers of a model as a function x -> x, (rows, d_model), in float32, that updates state in
    place; or None where C++ cannot run, or a layer has parts that are not in it.
    """
    every, config, rows = model.backbone["layers"], model.config, len(state[0].h)
    if (config.mixer_rms_eps > 0 or rows > MOST
            or any(layer.mixer.config != config or layer.mlp is not None for layer in every)
            or (config.layer == "mamba3" and (config.mimo_rank > 1 or config.n_angles == 0))):
        return None
    sizes = Sizes.of(config, rows)
    if (any(size % cpp.WIDTH > 0 for size in sizes.in_vectors)
            or not all(takes(*both, sizes) for both in zip(every, state, strict=True))):
        return None
    of_buffers = (config.d_model, config.d_model, *sizes.shapes["in_proj.bias"], sizes.of_u,
                  sizes.of_dtBC, config.d_inner, config.d_inner)
    buffers = [torch.empty(rows, n, dtype=torch.float32, device="cpu") for n in of_buffers]
    made, kept = (Layer * len(every))(), []
    for i, both in enumerate(zip(every, state)):
        made[i] = as_c(*both, sizes, buffers, kept)
    call = cpp.compiled(NAME).layers

    def function(x):
        buffers[0].copy_(x)
        call(torch.get_num_threads(), ctypes.c_long(len(made)), made)
        return buffers[0]
    function.kept = kept, state
    return function


def as_c(layer, state, sizes, buffers, kept):
    """A layer with its state as a Layer; `kept` holds the tensors that are made for it."""
    b, config, gated, turning = layer.mixer, layer.mixer.config, Norm(), Turning()
    of_heads, is_mamba3 = config.layer != "mamba", config.layer == "mamba3"

    def number(t):
        """Its address in float32."""
        kept.append(None if t is None else t.detach().float().contiguous())
        return address(kept[-1])

    def norm(module, groups=1):
        return Norm(number(module.weight), module.eps, groups)

    has_norm = "norm.weight" in sizes.shapes
    if has_norm:
        gated = norm(b.norm, b.norm.groups)
    convolution, conv, width = [None] * 3, None, 0
    if is_mamba3:
        turning = Turning(config.n_angles, config.A_floor, norm(b.B_norm), norm(b.C_norm),
                          number(b.B_bias), number(b.C_bias),
                          *map(address, (state.theta, state.k, state.x)))
    else:
        A2 = -torch.exp(b.A_log.float()) / math.log(2)
        convolution = (b.conv1d.weight[:, 0].t(), b.conv1d.bias,
                       F.pad(A2.flatten(), (0, cpp.WIDTH)))
        conv, width = state.conv, config.d_conv
    of_kind = config.dt_rank, 0, 1
    if of_heads:
        of_kind = 0, config.headdim, config.ngroups
    matrices = (Matrix.of(getattr(b, name), kept) if f"{name}.weight" in sizes.shapes else Matrix()
                for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))
    return Layer(
        len(state.h), config.d_model, config.d_inner, config.d_state, width, sizes.channels,
        *of_kind, norm(layer.norm), gated, has_norm and bool(b.norm.norm_before_gate),
        *(config.dt_limit if of_heads else (0, math.inf)),
        *map(number, (*convolution, b.D, b.dt_bias if of_heads else None)), *matrices, turning,
        0 if conv is None else TYPES[conv.dtype], *map(address, (conv, state.h, *buffers)))


def takes(layer, state, sizes):
    """Whether C++ takes over a layer with its state: all has to have the shapes that it reads."""
    b, conv, shapes = layer.mixer, getattr(state, "conv", None), sizes.shapes
    there = {name: attrgetter(name)(b) for name in shapes}
    there = {name: t for name, t in there.items() if t is not None or name not in OPTIONAL}
    linears = (getattr(b, name.partition(".")[0]) for name in shapes if "proj.weight" in name)
    return (all(t is not None and t.shape == shapes[name] and t.device.type == "cpu"
                for name, t in there.items())
            and all(map(fits, linears)) and layer.norm.weight.shape == shapes["in_proj.weight"][1:]
            and ("norm.weight" not in shapes or b.config.d_inner % b.norm.groups == 0)
            and all(t.shape == shape and t.device.type == "cpu" and t.is_contiguous()
                    and (t.dtype == torch.float32 or (t is conv and t.dtype == torch.bfloat16))
                for t, shape in zip(state, sizes.of_state)))
