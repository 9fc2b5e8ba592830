"""
Mamba-2 (arXiv 2405.21060): the block of mamba.py, rebuilt so that its scan is matrix products. It
imports from mamba.py what both share. Parameters have the names of the released mamba2-* weights.

How it differs from Mamba-1
- The channels form heads, as in attention. A channel of Mamba-1 has its own step size delta and N
  rates of forgetting. A head of Mamba-2 has one delta and one rate for all of its P channels and
  all their N numbers: the decay of one step is one number, exp(delta * A).
- B and C are shared by all heads of a group, mostly by all there are, as keys and queries are in
  multi-query attention. What a head remembers is a matrix (P, N), and N can be larger: 128, not 16.
- One projection of the input makes all: z, u, B, C and delta. In Mamba-1 delta, B and C come from a
  second projection, behind the convolution; here the convolution goes over u, B and C.
- The gate is followed by an RMSNorm, which keeps large models stable.

Why it is faster
With one decay for a head, the recurrence written out is, with a = delta * A,

    y_t = sum over s <= t of  (C_t . B_s) * exp(a_{s+1} + ... + a_t) * delta_s u_s

This is attention without its softmax: C are the queries, B the keys, u the values, and decays take
the place of positions. So there are two ways to compute the same, and the paper calls that state
space duality: as attention, which is matrix products but quadratic in the length, or as a
recurrence, which is linear but works on single numbers. `chunked` takes the best of both: attention
within chunks of some 64 steps, and from chunk to chunk the state. All that is large in it is done
by matrix products, for which CPUs and GPUs are built. In Mamba-1 each channel and each of its N
numbers has another decay, so that no matrix of decays could serve more than one of them.

Glossary: that of mamba.py, and in shapes H heads of P = headdim channels, D = H * P, G = ngroups
groups of heads, T steps of a chunk, K chunks. The state h is (B, H, P, N).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamba
from mamba import PLAIN, Linear, MambaConfig, Maybe, Mixer, beginnings, conv_silu, scan_method

__all__ = ["Mamba2Block", "Mamba2Config", "Mamba2State", "ssd"]
FORGET = -1024.0    # a delta * A after which nothing is left: its exp is 0, in float64 too


@dataclass
class Mamba2Config(MambaConfig):
    """What Mamba-2 has besides; the defaults are mamba2-130m. A bad value is a ValueError."""
    absent = ("dt_rank", "mixer_rms_eps")   # options of MambaConfig that mean nothing here

    layer: str = "mamba2"
    dt_rank: str = "auto"
    d_state: int = 128
    pad_vocab_size_multiple: int = 16
    headdim: int = 64                   # channels of a head
    ngroups: int = 1                    # groups of heads that share B and C
    chunk_size: int = 64                # steps of a chunk; changes the speed alone
    A_init_range: tuple = (1, 16)       # at initialisation -A is uniform in it
    dt_limit: tuple = (0.0, math.inf)   # delta is clamped to it
    rmsnorm: bool = True                # a norm behind the gate ...
    norm_before_gate: bool = False      # ... or before it

    def __post_init__(self):
        for name in ("A_init_range", "dt_limit"):
            pair = getattr(self, name)
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise ValueError(f"{name} must be two numbers, not {pair!r}")
            setattr(self, name, tuple(pair))        # JSON has lists
        for f in fields(self):
            if f.name in self.absent and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} means nothing for the layer {type(self).layer!r}")
        super().__post_init__()
        (low, high), (least, most) = self.A_init_range, self.dt_limit
        for name, right, need in (
                ("headdim", self.d_inner % self.headdim == 0, f"a divisor of {self.d_inner}"),
                ("ngroups", self.nheads % self.ngroups == 0, f"a divisor of {self.nheads} heads"),
                ("chunk_size", self.chunk_size <= 256, "at most 256"),
                ("layer", self.layer == type(self).layer, f"{type(self).layer} for this class"),
                ("A_init_range", 0 < low <= high < math.inf, "two numbers above 0, in order"),
                ("dt_limit", 0 <= least <= most, "two numbers from 0 on, in order")):
            if not right:
                raise ValueError(f"{name} must be {need}, not {getattr(self, name)!r}")

    nheads = property(lambda self: self.d_inner // self.headdim)

# ---- The scan ------------------------------------------------------------------------------------

def ssd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None,
        delta_bias: Maybe = None, delta_softplus=False, state: Maybe = None,
        return_last_state=False, method="auto", mask: Maybe = None, seq_idx: Maybe = None,
        dt_limit=(0.0, math.inf), chunk_size=64) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2 (paper, section 6), of each head and step:

        delta_t = softplus(delta_t + delta_bias), clamped to dt_limit     softplus: delta_softplus
        h_t     = exp(delta_t A) h_{t-1} + delta_t u_t (outer) B_t        h_0 = state, or zeros
        y_t     = h_t C_t + D u_t                                         D is optional

    u: (B, L, H, P).  delta: (B, L, H).  A: (H,), negative.  B, C: (B, L, G, N), of which each of
    the G groups serves H / G heads.  D, delta_bias: (H,).  state: (B, H, P, N).
    Returns y (B, L, H, P) in the type of u, or (y, last_state), which is (B, H, P, N) in float32,
    and from which a later call goes on. Computes in float32 (float64 if u is float64) whatever the
    inputs are. Differentiable in every tensor, and twice by "sequential".
    method: "sequential" (the loop) | "chunked" (matrix products, in chunks of chunk_size steps, up
    to 256) | "triton" (the same as kernels of mamba_fast/, on CUDA, which multiply in the type of
    u) | "auto", the fastest that can run.  mask, seq_idx: (B, L), as in selective_scan of mamba.py.
    ValueError: inputs that do not fit; a method that cannot run here."""
    if u.dim() != 4 or B.dim() != 4 or u.shape[1] == 0 or u.shape[2] % B.shape[2] != 0:
        raise ValueError("u must be (B, L, H, P) and B (B, L, G, N), L > 0, G a divisor of H, not "
                         f"{[*u.shape]} and {[*B.shape]}")
    (batch, length, heads, headdim), (groups, d_state) = u.shape, B.shape[2:]
    for name, tensor, shape in (
            ("u", u, u.shape), ("delta", delta, u.shape[:3]), ("A", A, (heads,)),
            ("B", B, (batch, length, groups, d_state)), ("C", C, (batch, length, groups, d_state)),
            ("D", D, (heads,)), ("delta_bias", delta_bias, (heads,)),
            ("state", state, (batch, heads, headdim, d_state)), ("mask", mask, u.shape[:2]),
            ("seq_idx", seq_idx, u.shape[:2])):
        if tensor is not None and (tensor.shape != shape or tensor.is_complex()):
            raise ValueError(f"{name} must be {tuple(shape)} to fit u {tuple(u.shape)}, and real, "
                             f"not {tuple(tensor.shape)} {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")
    if not 1 <= chunk_size <= 256:
        raise ValueError(f"chunk_size must be 1 to 256, not {chunk_size}")
    tiny = method == "auto" and length == 1
    method = "sequential" if tiny else scan_method(method, u, d_state, headdim)
    method = method if batch > 0 else "sequential"      # of no texts there are no chunks
    dtype, number = u.dtype, torch.promote_types(u.dtype, torch.float32)
    if state is None:
        state = u.new_zeros(batch, heads, headdim, d_state, dtype=number)
    with torch.autocast(u.device.type, enabled=False):      # it would run the products in 16 bits
        delta, A, h = (t.to(number) for t in (delta, A, state))
        if method != "triton":      # kernels read what there is
            u, B, C = (t.to(number) for t in (u, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias
        if delta_softplus:
            delta = F.softplus(delta)
        delta = delta.clamp(*dt_limit)
        if mask is not None:
            delta = delta.masked_fill(~mask[..., None], 0)
        a = delta * A                                                       # (B, L, H)
        if seq_idx is not None:     # nothing is left of the document before
            a = a.masked_fill(beginnings(seq_idx, mask)[..., None], FORGET)
        if method == "sequential":
            y, h = one_by_one(u, delta, a, B, C, h)
            y = y if D is None else y + u * D[:, None]
        else:
            own = of_heads((B.to(number) * C).sum(-1), heads) * delta       # step t itself
            own = own if D is None else own + D                             # (B, L, H)
            if method == "triton":
                y, h = mamba.fast.ssd(u, delta, a, B, C, h, own)
            else:
                y, h = in_chunks(u, delta, a, B, C, h, own, chunk_size)
    return (y.to(dtype), h) if return_last_state else y.to(dtype)

def of_heads(t, heads):
    """(B, L, G, ...) of the groups -> (B, L, H, ...), that of its group for each head."""
    return t.repeat_interleave(heads // t.shape[2], dim=2)

def one_by_one(u, delta, a, B, C, h):
    """The recurrence as written: one step after the other. a: (B, L, H), delta * A."""
    B, C, ys = of_heads(B, u.shape[2]), of_heads(C, u.shape[2]), []         # (B, L, H, N)
    for u_t, delta_t, a_t, B_t, C_t in zip(*(t.unbind(1) for t in (u, delta, a, B, C))):
        new = (delta_t[..., None] * u_t)[..., None] * B_t[:, :, None]       # (B, H, P, N)
        h = torch.exp(a_t)[..., None, None] * h + new
        ys.append((h @ C_t[..., None]).squeeze(-1))                         # (B, H, P)
    return torch.stack(ys, dim=1), h                            # (B, L, H, P), (B, H, P, N)

def in_chunks(u, delta, a, B, C, h, own, steps):
    """What one_by_one computes, by matrix products, but with own_t u_t, (B, L, H), in place of
    u_t's own part: y_t = C_t . exp(a_t) h_{t-1} + own_t u_t. Memory: 64 chunks at a time."""
    if mamba.fast and (sooner := mamba.fast.in_chunks(u, delta, a, B, C, h, own)):
        return sooner
    if torch.compiler.is_compiling() or u.shape[1] <= 64 * steps:
        y, h = chunked(u, delta, a, B, C, h, steps)
        return y + u * own[..., None], h
    ys = []
    for *part, own_part in zip(*(t.split(64 * steps, dim=1) for t in (u, delta, a, B, C, own))):
        y, h = in_chunks(*part, h, own_part, steps)
        ys.append(y)
    return torch.cat(ys, dim=1), h

def chunked(u, delta, a, B, C, h, steps):
    """in_chunks for some chunks at once, in the four steps of the paper's listing 1, and without
    own."""
    (batch, length, heads, headdim), (groups, d_state) = u.shape, B.shape[2:]
    any_length = torch.compiler.is_compiling()      # what it compiles is to serve all of them
    steps = steps if any_length else min(steps, length)
    chunks = (length + steps - 1) // steps
    padding = chunks * steps - length       # steps with delta 0, which change nothing
    a = a.masked_fill(a < -32, FORGET)      # 1e-14 is as good as 0, and needs no gradient
    a = a / math.log(2)     # exp2 from here on: of such numbers CPUs take exp much more slowly
    parts = u, delta, a, B, C
    if any_length or padding > 0:
        parts = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) for t in parts]
    u, delta, a, B, C = (torch.unflatten(t, 1, (chunks, steps)) for t in parts)  # (B, K, T, ...)
    B, C = B.transpose(2, 3), C.transpose(2, 3)                             # (B, K, G, T, N)
    since = a.cumsum(2)             # (B, K, T, H): the sum of a from the chunk's start through t
    until = F.pad(a[:, :, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2)      # after t to its end

    # 1. Within a chunk: attention. The decay from s to t is exp2 of a difference of two sums of a,
    # not a quotient of two exp2, which would be 0 / 0. But a small difference of large sums is
    # inexact. So a is split: multiples of 1/32, whose sums are exact, and a rest of at most 1/64.
    # That is so small that exp2(rest_t - rest_s) may be taken apart: exp2(rest_t) scales row t of
    # y, exp2(-rest_s) row s of u. They alone carry gradients to a.
    coarse = (a.detach() * 32).round() / 32
    rest = (a - coarse).cumsum(2)[..., None]                                # (B, K, T, H, 1)
    coarse = coarse.cumsum(2).transpose(2, 3)                               # (B, K, H, T)
    decay = torch.exp2((coarse[..., None] - coarse[..., None, :]).clamp_(max=0))  # (B, K, H, T, T)
    scores = (C @ B.mT).tril(-1)                                            # (B, K, G, T, T)
    scores = (torch.unflatten(decay, 2, (groups, -1)) * scores[:, :, :, None]).flatten(2, 3)
    u_in = u * (delta[..., None] * torch.exp2(-rest))                       # (B, K, T, H, P)
    y = (scores @ u_in.transpose(2, 3)).transpose(2, 3)     # still without exp2(rest)

    # 2. What each chunk alone leaves at its end, decayed until there
    u_out = u * (delta * torch.exp2(until))[..., None]                      # (B, K, T, H, P)
    u_out = torch.unflatten(u_out.flatten(3), 3, (groups, -1))              # (B, K, T, G, D / G)
    h_new = u_out.permute(0, 1, 3, 4, 2) @ B                                # (B, K, G, D / G, N)

    # 3. From chunk to chunk: the state before each chunk, and the last one
    h_new = h_new.reshape(batch, chunks, heads, headdim * d_state)
    hs = torch.cat([h.flatten(2)[:, None], h_new], dim=1)                   # (B, K + 1, H, P * N)
    total = F.pad(since[:, :, -1].transpose(1, 2), (1, 0))                  # (B, H, K + 1)
    total = total[..., None].expand(*total.shape, total.shape[-1])          # (B, H, K + 1, K + 1)
    decay = torch.exp2(total.tril(-1).cumsum(2)).tril()     # from one chunk's end to another's
    hs = (decay @ hs.transpose(1, 2)).transpose(1, 2)                       # (B, K + 1, H, P * N)
    h = hs[:, -1].clone().reshape(h.shape)      # a view would keep all of hs alive
    hs = hs[:, :-1]

    # 4. What each step reads of the state before its chunk
    read = C @ hs.reshape(batch, chunks, groups, heads // groups * headdim, d_state).mT
    read = read.transpose(2, 3).reshape(y.shape)                            # (B, K, T, H, P)
    y = (y + read * torch.exp2(coarse).transpose(2, 3)[..., None]) * torch.exp2(rest)
    return y.flatten(1, 2)[:, :length], h

# ---- The block -----------------------------------------------------------------------------------

class Mamba2State(NamedTuple):
    """What a block remembers of the tokens before."""
    conv: torch.Tensor      # (B, d_conv - 1, D + 2 G N), the last inputs of the convolution
    h: torch.Tensor         # (B, H, P, N), the state of the scan, in float32

class GatedRMSNorm(nn.Module):
    """RMSNorm of y * silu(z), or RMSNorm of y, times silu(z); both (B, L, D). In float32, and for
    each of the groups of channels by itself.  scan: the method, by which there may be kernels."""
    def __init__(self, d_inner, groups, eps, norm_before_gate):
        super().__init__()
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.ones(d_inner))

    def forward(self, y: Tensor, z: Tensor, scan="auto") -> Tensor:
        if mamba.fast and not self.norm_before_gate:
            fused = mamba.fast.gated_norm(y, z, self.weight, self.groups, self.eps, scan)
            if fused is not None:
                return fused
        dtype, number = y.dtype, torch.promote_types(y.dtype, torch.float32)
        y, gate = y.to(number), F.silu(z.to(number))
        y = y if self.norm_before_gate else y * gate
        y = torch.unflatten(y, -1, (self.groups, -1))                       # (B, L, G, D / G)
        size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y = (y * torch.rsqrt(size.square() / y.shape[-1] + self.eps)).flatten(2) * self.weight
        return (y * gate if self.norm_before_gate else y).to(dtype)

class Mamba2Block(Mixer):
    """The mixer (paper, figure 6): project, convolution, ssd, gate and norm, project back."""
    exact = ("dt_bias", "A_log", "D")
    def __init__(self, config: Mamba2Config):
        super().__init__()
        if config.layer != "mamba2":
            raise ValueError(f"a block of layer {config.layer!r} is a {config.block.__name__}")
        self.config, self.scan = config, config.scan
        d_inner, shared = config.d_inner, config.ngroups * config.d_state
        channels = d_inner + 2 * shared
        self.in_proj = Linear(config.d_model, d_inner + channels + config.nheads, bias=config.bias)
        # holds the weights under their released names; the convolution itself is in conv_silu
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels,
                                bias=config.conv_bias)
        for name in ("dt_bias", "A_log", "D"):
            empty = torch.empty(config.nheads, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(empty))
        if config.rmsnorm:
            self.norm = GatedRMSNorm(d_inner, config.ngroups, config.norm_eps,
                                     config.norm_before_gate)
        self.out_proj = Linear(d_inner, config.d_model, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What is special about the first weights; call it after a host network's apply(init)."""
        config = self.config
        self.A_log.uniform_(*config.A_init_range).log_()
        self.D.fill_(1)
        if config.rmsnorm:
            self.norm.weight.fill_(1)
        self.reset_steps(self.dt_bias)

    def init_state(self, batch: int) -> Mamba2State:
        """The state before the first token: zeros."""
        config, weight, A_log = self.config, self.conv1d.weight, self.A_log
        return Mamba2State(
            torch.zeros(batch, config.d_conv - 1, len(weight), dtype=weight.dtype,
                        device=weight.device),
            torch.zeros(batch, config.nheads, config.headdim, config.d_state, dtype=A_log.dtype,
                        device=A_log.device))

    def mix(self, x, state, mask, seq_idx):
        fast, others = mamba.fast, (state, mask, seq_idx)
        if fast and (at_once := fast.mix2(self, x, others, mamba.is_plain, PLAIN, GatedRMSNorm)):
            return at_once      # what follows, sooner; not if it has been edited
        config, (conv, h) = self.config, (None, None) if state is None else state
        d_inner, shared = config.d_inner, config.ngroups * config.d_state
        z, u, delta = self.in_proj(x).split((d_inner, d_inner + 2 * shared, config.nheads), dim=-1)
        u, conv = conv_silu(u, self.conv1d.weight, self.conv1d.bias, conv, self.scan, mask, seq_idx)
        u, B, C = u.split((d_inner, shared, shared), dim=-1)
        u = torch.unflatten(u, -1, (config.nheads, -1))                     # (B, L, H, P)
        B, C = (torch.unflatten(t, -1, (config.ngroups, -1)) for t in (B, C))  # (B, L, G, N)
        y, h = ssd(u, delta, -torch.exp(self.A_log), B, C, self.D, self.dt_bias, True, h, True,
                   self.scan, mask, seq_idx, config.dt_limit, config.chunk_size)
        y = y.flatten(2)                                                    # (B, L, D)
        y = self.out_proj(self.norm(y, z, self.scan) if config.rmsnorm else y * F.silu(z))
        return y, Mamba2State(conv, h)

Mamba2Config.block = Mamba2Block
PLAIN.update({c: (c.forward, getattr(c, "mix", None)) for c in (Mamba2Block, GatedRMSNorm)})
mamba.fast = mamba.fast and mamba.fast.unedited("mamba2", globals())
