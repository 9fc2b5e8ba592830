"""
Mamba-3 (arXiv 2603.15569): the block of Mamba-2 with three main changes. It imports what it shares
from mamba.py and mamba2.py. Parameters have the names of the released mamba3-* weights.

How it differs from Mamba-2
- A better rule for the step. Mamba-2 adds delta_t u_t B_t at step t, which is Euler's rule. Mamba-3
  takes the trapezoidal rule: of what step t adds, a part is that of step t - 1. How large the part
  is, the model chooses for each step, by lambda. This is a convolution of width 2 within the
  recurrence, and the short convolution of Mamba-1 and 2 is gone.
- States that turn. B and C (here k and q) are rotated by an angle that grows with each step by
  what the model chooses, as rotary positions in attention, but as the text demands. So a state can
  count: parity is half a turn for each 1. Decays alone cannot do that.
- MIMO: R keys and queries at once read and write the state, R times as many products with the
  same state in memory. Generation, which waits for memory, gains from it; SISO is R = 1.

As in Mamba-2 the parallel form is matrix products. In the recurrence

    h_t = alpha_t h_{t-1} + beta_t x_{t-1} k_{t-1} + gamma_t x_t k_t
    alpha = exp(delta A),  beta = (1 - lambda) delta alpha,  gamma = lambda delta

x_s k_s comes in twice: at step s with gamma_s, and one step later with beta_{s+1}, whose alpha is
what decays all else in that step. So for the steps after s it is as if it had come in at s with

    w_s = gamma_s + (1 - lambda_{s+1}) delta_{s+1}

and one call of mamba2.py's scan does it all. Only step s itself reads it with gamma_s alone.

Glossary: that of mamba2.py, and R = mimo_rank, S angles of a head. x are the values (B, L, H, P), k
and q the keys and queries (B, L, R, H, N), which are B and C after norm, bias and rotation.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import mamba
from mamba import PLAIN, Linear, Mixer, RMSNorm, beginnings, scan_method
from mamba2 import FORGET, Mamba2Config, in_chunks, of_heads

__all__ = ["Mamba3Block", "Mamba3Config", "Mamba3State"]


@dataclass
class Mamba3Config(Mamba2Config):
    """What Mamba-3 has besides; the defaults are the mixers of mamba3-siso-187m. It has no
    convolution, no norm behind the gate, and makes A from its input."""
    absent = (*Mamba2Config.absent, "d_conv", "conv_bias", "A_init_range", "rmsnorm",
              "norm_before_gate")

    layer: str = "mamba3"
    mimo_rank: int = 1                  # R: keys, values and queries of a step
    rope_fraction: float = 0.5          # of the d_state numbers, how many are rotated
    A_floor: float = 1e-4               # the least rate of forgetting

    def __post_init__(self):
        super().__post_init__()
        for name, right, need in (
                ("rope_fraction", 0 < self.rope_fraction <= 1, "above 0 and at most 1"),
                ("A_floor", self.A_floor > 0, "above 0"),
                ("d_state", self.d_state % 2 == 0, "even")):
            if not right:
                raise ValueError(f"{name} must be {need}, not {getattr(self, name)!r}")

    n_angles = property(lambda self: int(self.d_state * self.rope_fraction) // 2)

# ---- The scan ------------------------------------------------------------------------------------
# x: (B, L, R, H, P).  k, q: (B, L, R, H, N), rotated.  And (B, L, H) each: a = delta * A; gamma =
# lambda delta, what is added at once; late = (1 - lambda) delta, what is added one step later.

def one_by_one(x, k, q, gamma, late, a, h, x_before, k_before):
    """The recurrence as written. Returns y (B, L, R, H, P) and the last h (B, H, P, N)."""
    ys = []
    for x_t, k_t, q_t, *factors in zip(*(t.unbind(1) for t in (x, k, q, gamma, late, a))):
        gamma_t, late_t, a_t = (t[..., None, None] for t in factors)        # (B, H, 1, 1)
        h = torch.exp(a_t) * (h + late_t * outer(x_before, k_before)) + gamma_t * outer(x_t, k_t)
        ys.append(torch.einsum("bhpn,brhn->brhp", h, q_t))
        x_before, k_before = x_t, k_t
    return torch.stack(ys, dim=1), h

def outer(x, k):
    """(B, R, H, P), (B, R, H, N) -> (B, H, P, N), the sum over R."""
    return torch.einsum("brhp,brhn->bhpn", x, k)

def chunked(x, k, q, gamma, late, a, h, x_before, k_before, kq, scan):
    """What one_by_one computes, by the scan of Mamba-2, of R steps for each one.  kq: k . q,
    (B, L, R, H).  scan: (u, delta, a, B, C, h, own) -> y, last h, as in_chunks of mamba2.py."""
    rank = x.shape[2]
    weight = gamma + F.pad(late[:, 1:], (0, 0, 0, 1))                       # (B, L, H)
    # what the step before the first one adds late decays with the first
    h = h + late[:, 0, :, None, None] * outer(x_before, k_before)
    # The R ranks of a step are R steps here. The first alone decays; each reads those before it,
    # by their weights.
    a = F.pad(a[:, :, None], (0, 0, 0, rank - 1))                           # (B, L, R, H)
    weights = weight[:, :, None].expand(a.shape)
    own = gamma[:, :, None] * kq                                            # (B, L, R, H)
    u, weights, a, k_all, q_all, own = (t.flatten(1, 2) for t in (x, weights, a, k, q, own))
    y, h = scan(u, weights, a, k_all, q_all, h, own)
    y = y.view(x.shape)
    if rank > 1:    # of the same step each is to read all R, with gamma
        ones = torch.ones(rank, rank, device=x.device, dtype=x.dtype)
        factor = gamma[..., None, None] * (ones - ones.diag().diag())       # (B, L, H, R, R)
        factor = factor - weight[..., None, None] * ones.tril(-1)
        factor = factor * torch.einsum("blrhn,blshn->blhrs", q, k)
        y = y + torch.einsum("blhrs,blshp->blrhp", factor, x)
    return y, h

def turned(t, theta, pairs_apart):
    """t (B, L, R, H, N) with pairs of its numbers rotated by theta (B, L, H, S): numbers i and
    i + N / 2 if pairs_apart, else 2 i and 2 i + 1; i < S."""
    n, pairs = theta.shape[-1], t.shape[-1] // 2
    theta = F.pad(theta, (0, pairs - n))[:, :, None]                        # (B, L, 1, H, N / 2)
    one, other = torch.unflatten(t, -1, (2, pairs) if pairs_apart else (pairs, 2)).unbind(
        -2 if pairs_apart else -1)                                          # (B, L, R, H, N / 2)
    cos, sin = torch.cos(theta), torch.sin(theta)
    return torch.stack([one * cos - other * sin, one * sin + other * cos],
                       dim=-2 if pairs_apart else -1).flatten(-2)

def angles_since(begins, turns, entering):
    """Sums of turns (B, L, H, S) since the document began, in [0, 1). entering: (B, H, S), the sum
    over the tokens before. Split as in mamba2.py: sums of multiples of 1/1024 are exact, also
    without their whole turns, so that long sums stay precise."""
    coarse = (turns.detach() * 1024).round() / 1024
    rest, coarse = (turns - coarse).cumsum(1), coarse.cumsum(1).remainder(1)
    if begins is None:
        return (entering[:, None] + coarse + rest).remainder(1)
    steps = torch.arange(turns.shape[1], device=turns.device)
    start = torch.where(begins, steps, 0).cummax(1).values[..., None, None]         # (B, L, 1, 1)
    before = [F.pad(t, (0, 0, 0, 0, 1, 0)).take_along_dim(start, 1) for t in (rest, coarse)]
    entering = torch.where(start > 0, 0, entering[:, None])
    return (entering + (coarse - before[1]) + (rest - before[0])).remainder(1)

# ---- The block -----------------------------------------------------------------------------------

class Mamba3State(NamedTuple):
    """What a block remembers of the tokens before; all in float32."""
    theta: torch.Tensor     # (B, H, S), the angles
    h: torch.Tensor         # (B, H, P, N), the state of the scan
    k: torch.Tensor         # (B, R, H, N), the last key, rotated
    x: torch.Tensor         # (B, H, P), the last value

class Mamba3Block(Mixer):
    """The mixer (paper, figure 2): project, norms of B and C, rotation, scan, gate, project back.
    """
    exact = ("dt_bias", "D")
    def __init__(self, config: Mamba3Config):
        super().__init__()
        if config.layer != "mamba3":
            raise ValueError(f"a block of layer {config.layer!r} is a {config.block.__name__}")
        self.config, self.scan = config, config.scan
        heads, rank = config.nheads, config.mimo_rank
        shared = config.d_state * config.ngroups * rank
        self.sizes = (config.d_inner, config.d_inner, shared, shared, heads, heads, heads,
                      config.n_angles)
        self.in_proj = Linear(config.d_model, sum(self.sizes), bias=config.bias)
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.B_bias = nn.Parameter(torch.empty(heads, rank, config.d_state))
        self.C_bias = nn.Parameter(torch.empty(heads, rank, config.d_state))
        self.B_norm = RMSNorm(config.d_state, eps=config.norm_eps)
        self.C_norm = RMSNorm(config.d_state, eps=config.norm_eps)
        self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        if rank > 1:
            for name in ("mimo_x", "mimo_z", "mimo_o"):
                empty = torch.empty(heads, rank, config.headdim)
                self.register_parameter(name, nn.Parameter(empty))
        self.out_proj = Linear(config.d_inner, config.d_model, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What is special about the first weights; call it after a host network's apply(init)."""
        for ones in (self.D, self.B_bias, self.C_bias, self.B_norm.weight, self.C_norm.weight):
            ones.fill_(1)
        if self.config.mimo_rank > 1:
            self.mimo_x.fill_(1 / self.config.mimo_rank)
            self.mimo_z.fill_(1)
            self.mimo_o.fill_(1 / self.config.mimo_rank)
        self.reset_steps(self.dt_bias)

    def init_state(self, batch: int) -> Mamba3State:
        """The state before the first token: zeros."""
        c = self.config
        zeros = functools.partial(torch.zeros, dtype=self.D.dtype, device=self.D.device)
        return Mamba3State(zeros(batch, c.nheads, c.n_angles),
                           zeros(batch, c.nheads, c.headdim, c.d_state),
                           zeros(batch, c.mimo_rank, c.nheads, c.d_state),
                           zeros(batch, c.nheads, c.headdim))

    def mix(self, x, state, mask, seq_idx):
        fast, others = mamba.fast, (state, mask, seq_idx)
        if fast and (at_once := fast.mix3(self, x, others, mamba.is_plain, PLAIN)):
            return at_once      # what follows, sooner; not if it has been edited
        batch = x.shape[0]      # not len(x), which torch.export would take for a constant
        before = self.init_state(batch) if state is None else state
        c = self.config
        if before.h.shape != (batch, c.nheads, c.headdim, c.d_state):
            raise ValueError(f"the state must be of batch {batch}, not {[*before.h.shape]}")
        parts = self.in_proj(x).split(self.sizes, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            y, after = self.mix_parts(parts, before, mask, seq_idx)
        return self.out_proj(y.to(parts[0].dtype)), after

    def mix_parts(self, parts, state, mask, seq_idx):
        """All between the two projections, in float32: (B, L, D) and the state after it."""
        c = self.config
        number = torch.promote_types(parts[0].dtype, torch.float32)
        z, x, B, C, delta, A, lam, angles = (t.to(number) for t in parts)
        state = Mamba3State(*(t.to(number) for t in state))
        delta = F.softplus(delta + self.dt_bias).clamp(*c.dt_limit)         # (B, L, H)
        if mask is not None:
            delta = delta.masked_fill(~mask[..., None], 0)
        # mamba_ssm 2.3.2 still has softplus(A) here; the released weights need this
        A = -torch.where(A >= 0, 1 + A, 1 / (1 + A.abs())).clamp(min=c.A_floor)
        lam, a, begins = torch.sigmoid(lam), delta * A, None
        gamma, late = lam * delta, (1 - lam) * delta
        if seq_idx is not None:     # nothing is left of the document before, nor comes in late
            begins = beginnings(seq_idx, mask)
            a = a.masked_fill(begins[..., None], FORGET)
            late = late.masked_fill(begins[..., None], 0)
        # A step turns each angle by at most delta / 2 of a whole turn.
        turns = torch.tanh(angles)[:, :, None] * delta[..., None] / 2       # (B, L, H, S)
        tiny = x.shape[0] == 0 or (self.scan == "auto" and x.shape[1] == 1)
        method = "sequential" if tiny else scan_method(self.scan, parts[0], c.d_state, c.headdim)
        entering, sums = state.theta / (2 * math.pi), None
        # where mamba.fast has no faster way it returns None, here as in _keys_and_queries
        if mamba.fast and method != "sequential" and begins is None:
            sums = mamba.fast.angles_since(method, turns, entering)
        theta = (angles_since(begins, turns, entering) if sums is None else sums) * (2 * math.pi)
        k, q, kq = self._keys_and_queries(B, C, theta, method, parts[0].dtype)
        x = torch.unflatten(x, -1, (c.nheads, -1))                          # (B, L, H, P)
        z = torch.unflatten(z, -1, (c.nheads, -1))
        ranks = lambda t, name: (t[:, :, None] if c.mimo_rank == 1 else
                                 t[:, :, None] * getattr(self, name).transpose(0, 1).to(number))
        xs = ranks(x, "mimo_x")                                             # (B, L, R, H, P)
        x_before = ranks(state.x[:, None], "mimo_x")[:, 0]                  # (B, R, H, P)
        inputs = xs, k, q, gamma, late, a, state.h, x_before, state.k
        if method == "sequential":
            y, h = one_by_one(*inputs)
        elif method == "triton":
            y, h = chunked(*inputs, kq, functools.partial(mamba.fast.ssd, dtype=parts[0].dtype))
        else:
            y, h = chunked(*inputs, kq, functools.partial(in_chunks, steps=c.chunk_size))
        y = y + xs * self.D[:, None]
        y = y * F.silu(ranks(z, "mimo_z"))
        y = y[:, :, 0] if c.mimo_rank == 1 else (y * self.mimo_o.transpose(0, 1).to(number)).sum(2)
        # the last real token of each row, or what was before
        last = None if mask is None else mask.sum(1)
        keep = lambda t, before: (t[:, -1].clone() if last is None else torch.cat(
            [before[:, None], t], 1).take_along_dim(last.view(-1, *[1] * (t.dim() - 1)), 1)[:, 0])
        k = keep(k, state.k).to(number)     # of kernels it may have 16 bits
        after = Mamba3State(keep(theta, state.theta), h, k, keep(x, state.x))
        return y.flatten(2), after

    def _keys_and_queries(self, B, C, theta, method, dtype):
        """k, q (B, L, R, H, N): B and C (B, L, R * G * N) normed, for each head with its bias, and
        turned by theta; and k . q for chunked.  dtype: of k and q if kernels make them."""
        heads, rank = self.config.nheads, self.config.mimo_rank
        B, C = (torch.unflatten(t, -1, (rank, self.config.ngroups, -1)) for t in (B, C))
        B, C = (F.rms_norm(t, t.shape[-1:], norm.weight.to(t.dtype), norm.eps)
                for t, norm in ((B, self.B_norm), (C, self.C_norm)))        # (B, L, R, G, N)
        biases = [bias.transpose(0, 1).to(B.dtype) for bias in (self.B_bias, self.C_bias)]
        if mamba.fast and method != "sequential" and rank == 1:
            of_one = (t.squeeze(-3) for t in (B, C, *biases))
            if made := mamba.fast.keys_and_queries(method, *of_one, theta, dtype):
                return [t[:, :, None] for t in made]
        k, q = (torch.unflatten(of_heads(t.flatten(0, 1), heads), 0, t.shape[:2]) + bias
                for t, bias in zip((B, C), biases))                         # bias: (R, H, N)
        k, q = (turned(t, theta, rank > 1) for t in (k, q))
        return k, q, None if method == "sequential" else (k * q).sum(-1)

Mamba3Config.block = Mamba3Block
PLAIN[Mamba3Block] = Mamba3Block.forward, Mamba3Block.mix
mamba.fast = mamba.fast and mamba.fast.unedited("mamba3", globals())
