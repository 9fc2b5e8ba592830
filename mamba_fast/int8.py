"""Weights in 8 bits, for generation: a quarter of float32's memory, and the fastest on a CPU."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Int8Linear(nn.Module):
    """
    A linear layer for inference, of weights that are whole numbers from -127 to 127 times one scale for each output.

    Int8Linear(linear)(x), x (..., in) -> (..., out) in the type of x. On a CPU the product is computed in bfloat16.
    weight: (out, in) int8.  scale: (out,), bfloat16 numbers in the type of the layer they are from.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).bfloat16().to(linear.weight.dtype)
        self.register_buffer("scale", scale.clamp(min=torch.finfo(scale.dtype).tiny))       # a row may be zero
        weight = (weight / self.scale.float()[:, None]).round_().clamp_(-127, 127)
        self.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
        self.bias = getattr(linear, "bias", None)       # an embedding has none

    def forward(self, x):
        rows = x.flatten(0, -2)
        if x.device.type == "cpu":
            rows = rows.bfloat16()
        # few rows: never more than int8 is read from memory. PyTorch's kernel is wrong where `in` is not a multiple of 16
        if x.device.type == "cpu" and len(rows) <= 8 and rows.shape[1] % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale.bfloat16())
        else:
            y = F.linear(rows, self.weight.to(rows.dtype)) * self.scale.to(rows.dtype)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """The embedding that has the table of an Int8Linear: that of the head, where they are tied."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight
        self.register_buffer("scale", head.scale)

    def forward(self, idx):
        return self.weight[idx] * self.scale[idx][..., None]                    # (B, L, d_model)


def quantize_int8(model):
    """Turn the weights of a Mamba into int8, in place, and return it: a quarter of float32's memory, half of bfloat16's.
    What is small or delicate (convolution, dt_proj, A_log, norms) stays. It can no longer be trained."""
    tied = model.lm_head.weight is model.backbone["embedding"].weight
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "dt_proj":
                setattr(module, name, Int8Linear(child))
    model.backbone["embedding"] = Int8Embedding(model.lm_head if tied else Int8Linear(model.backbone["embedding"]))
    return model
