"""Weights in 8 bits, for generation: a quarter of float32's memory, and the fastest on a CPU."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Int8Linear(nn.Module):
    """
    A linear layer for inference. Its weights are whole numbers from -127 to 127, times one scale
    for each output.

    Int8Linear(linear)(x), x (..., in) -> (..., out) in the type of x. On a CPU the product is
    computed in bfloat16, but token by token in C++ in float32. In generation by a GPU the x of a
    single text is rounded to 16 bits, with one scale.
    weight: (out, in) int8.  scale: (out,), bfloat16 numbers in the type of the layer they are from.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).bfloat16().to(linear.weight.dtype)
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)      # a row may be zero
        self.register_buffer("scale", scale)
        weight = (weight / scale.float()[:, None]).round_().clamp_(-127, 127)
        self.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
        self.bias = getattr(linear, "bias", None)       # an embedding has none

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, on_cpu = x.flatten(0, -2), x.device.type == "cpu"
        if on_cpu:
            rows = rows.bfloat16()
        # For few rows the time is that of reading the weights, which this kernel reads as int8.
        # It is wrong where `in` is not a multiple of 16.
        if on_cpu and len(rows) <= 8 and rows.shape[1] % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale.bfloat16())
        else:
            y = F.linear(rows, self.weight.to(rows.dtype)) * self.scale.to(rows.dtype)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """The embedding with the table of an Int8Linear: that of the head, where they are tied.
    idx (B, L) -> (B, L, d_model)."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight
        self.register_buffer("scale", head.scale)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.weight[idx] * self.scale[idx][..., None]                    # (B, L, d_model)


def quantize_int8(model: nn.Module) -> nn.Module:
    """
    Turns the weights of a Mamba into int8, in place, and returns it: a quarter of float32's memory,
    half of bfloat16's. What is small or delicate (convolution, dt_proj, A_log, norms) stays as it
    is. The model can no longer be trained.
    """
    embedding = model.backbone["embedding"]
    tied = model.lm_head.weight is embedding.weight
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "dt_proj":
                setattr(module, name, Int8Linear(child))
    table = model.lm_head if tied else Int8Linear(embedding)
    model.backbone["embedding"] = Int8Embedding(table)
    return model
