"""
Mamba, the selective state space language model (S6, arXiv 2312.00752), in one file that needs
torch alone. What is notable here:
- the selective scan twice: as the paper's plain loop, and in tiles, the same function made fast
- the decay over a stretch of time is exp(A * sum of delta), never a quotient, which overflows
- activations are (batch, length, channels) throughout: none is transposed in memory
- a state is a value: a call with a state returns the next one and leaves the given one as it is
- parameters have the names of the released state-spaces/mamba-* weights
Optional beside it: mamba_fast/ computes the same numbers sooner, mamba_files.py reads more layouts.

Glossary, with the paper's names:
    B (size)    batch                             L    length of the sequence
    d_model     width of the residual stream      D    d_inner = expand * d_model, scan's channels
    N           d_state, numbers remembered for each channel
    dt_rank     rank of the projection that makes delta
    u           input of the scan, (B, L, D)      z    gate, (B, L, D)
    delta       step size, (B, L, D): large = take in this token and forget, near 0 = skip it
    A           (D, N), negative: rate of forgetting; the decay of one step is exp(delta * A)
    B, C        (B, L, N): what each token writes to the state, and what it reads from it
    D           (D,): weight of the direct path from u to y
    h           (B, D, N): the state, all that the scan remembers of the tokens before
"""
from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

fast = files = None
with suppress(ImportError):
    import mamba_fast as fast  # each of its answers is None where it has nothing faster
with suppress(ImportError):
    import mamba_files as files  # released weights: names on Hugging Face, other layouts

SCAN_METHODS = ("auto", "sequential", "chunked", "triton")
LOGITS = 2 ** 28    # numbers that are computed at once for a loss; as float32, 1 GB
Linear = fast.Linear if fast else nn.Linear     # the same, but where a CPU has a faster way

@dataclass
class MambaConfig:
    """Shape of a model; the defaults are mamba-130m. A bad value is a ValueError."""
    vocab_size: int = 50277
    d_model: int = 768
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4                     # width of the causal convolution in front of the scan
    expand: int = 2                     # d_inner = expand * d_model
    dt_rank: int | str = "auto"         # "auto" is ceil(d_model / 16)
    dt_min: float = 0.001               # at initialisation delta lies in [dt_min, dt_max] ...
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4         # ... and never below this
    conv_bias: bool = True
    bias: bool = False                  # biases in in_proj and out_proj
    dropout: float = 0.0                # on the embedding, and on what enters and leaves each mixer
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8    # rows of the embedding are rounded up, for matrix units
    d_intermediate: int = 0             # > 0 adds a gated MLP of this width after each mixer
    scan: str = "auto"                  # method of selective_scan

    def __post_init__(self):
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name == "d_intermediate" else 1
            if f.type.startswith("int") and (type(value) is not int or value < least):
                raise ValueError(f"{f.name} must be a whole number from {least} on, not {value!r}")
        for name, right, need in (
                ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
                ("dt_min", 0 < self.dt_min <= self.dt_max, f"above 0 and up to {self.dt_max}"),
                ("dt_init_floor", self.dt_init_floor > 0, "above 0"),
                ("norm_eps", self.norm_eps > 0, "above 0"),
                ("scan", self.scan in SCAN_METHODS, f"one of {', '.join(SCAN_METHODS)}")):
            if not right:
                raise ValueError(f"{name} must be {need}, not {getattr(self, name)!r}")

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def padded_vocab_size(self):
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

# ---- The selective scan --------------------------------------------------------------------------

def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                   state=None, return_last_state=False, method="auto"):
    """The recurrence at the heart of Mamba (paper, section 3.2 and Algorithm 2; zero-order hold for
    A, Euler for B):

        delta_t = softplus(delta_t + delta_bias)                  if delta_softplus
        h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t        h_0 = state, or zeros
        y_t     = (C_t . h_t + D u_t) * silu(z_t)                 D and z are optional

    u, delta, z: (B, L, D).  A: (D, N).  B, C: (B, L, N).  D, delta_bias: (D,).  state: (B, D, N).
    Returns y (B, L, D) in the type of u, or (y, last_state) with last_state (B, D, N) in float32,
    so that scan(x) equals scan(x[:, :k]) followed by scan(x[:, k:]) with that state. Computes in
    float32 (float64 if u is float64) whatever the inputs are. Differentiable in every tensor.
    method: "sequential" (the loop) | "chunked" (tiles) | "triton" (kernels of mamba_fast/, on
    CUDA) | "auto", the best there is. ValueError: shapes that do not fit; it cannot run here.
    Names and meaning are those of mamba_ssm's selective_scan_fn; the layout is (B, L, D)."""
    if u.dim() != 3 or A.dim() != 2 or u.shape[1] == 0:
        raise ValueError("u must be (B, L, D) with L > 0, and A (D, N), not "
                         f"{tuple(u.shape)} and {tuple(A.shape)}")
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    wide, narrow = (batch, length, d_inner), (batch, length, d_state)
    for name, tensor, shape in (
            ("delta", delta, wide), ("z", z, wide), ("B", B, narrow), ("C", C, narrow),
            ("A", A, (d_inner, d_state)), ("state", state, (batch, d_inner, d_state)),
            ("D", D, (d_inner,)), ("delta_bias", delta_bias, (d_inner,))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit u {wide}, not {tuple(tensor.shape)}")

    dtype, number = u.dtype, torch.promote_types(u.dtype, torch.float32)
    if state is None:
        state = u.new_zeros(batch, d_inner, d_state, dtype=number)
    one_step = method == "auto" and length == 1
    method = "sequential" if one_step else scan_method(method, u, d_state)
    part = 2048 if u.device.type == "cpu" else 2 ** 15
    if method == "chunked" and length > part and not torch.is_grad_enabled():
        y = torch.empty_like(u)     # part by part, so that memory does not grow with the length
        for i in range(0, length, part):
            u_p, delta_p, B_p, C_p, z_p = (None if t is None else t[:, i:i + part]
                                           for t in (u, delta, B, C, z))
            y[:, i:i + part], state = selective_scan(u_p, delta_p, A, B_p, C_p, D, z_p, delta_bias,
                                                     delta_softplus, state, True, method)
        return (y, state) if return_last_state else y
    with torch.autocast(u.device.type, enabled=False):      # it would run the products in 16 bits
        if method == "triton":
            y, h = fast.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state)
            return (y, h) if return_last_state else y
        u, delta, A, B, C, state = (t.to(number) for t in (u, delta, A, B, C, state))
        if delta_bias is not None:
            delta = delta + delta_bias
        if delta_softplus:
            delta = F.softplus(delta)
        recurrence = one_by_one
        if method == "chunked":
            # fast answers with a function like in_tiles, or None; so do its other questions
            recurrence = (fast and fast.recurrence(u, A, in_tiles)) or in_tiles
        y, h = recurrence(u, delta, A, B, C, state)
        if D is not None:
            y = y + D * u
        if z is not None:
            y = y * F.silu(z.to(number))
    return (y.to(dtype), h) if return_last_state else y.to(dtype)

def scan_method(method, u, d_state):
    """What selective_scan does for a sequence like u: what "auto" is. ValueError: it cannot run."""
    if method not in SCAN_METHODS:
        raise ValueError(f"method must be one of {', '.join(SCAN_METHODS)}, not {method!r}")
    able = method in ("auto", "triton") and fast is not None and fast.has_triton(u, d_state)
    if method == "triton" and not able:
        raise ValueError("scan 'triton' needs mamba_fast/, CUDA on Ampere or later, Triton 3.6 (of "
                         "torch 2.11), d_state <= 256, no float64; 'auto' takes the best there is")
    return method if method != "auto" else "triton" if able else "chunked"

def one_by_one(u, delta, A, B, C, h):
    """Algorithm 2 as written: one step after the other. All other ways are tested against it."""
    ys = []
    # unbind, not u[:, t]: each indexing would make a full-size gradient, so backward quadratic in L
    for u_t, delta_t, B_t, C_t in zip(*(t.unbind(1) for t in (u, delta, B, C))):
        decay = torch.exp(delta_t[:, :, None] * A)                          # (B, D, N)
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]       # (B, D, N)
        ys.append((h * C_t[:, None, :]).sum(-1))                            # (B, D)
    return torch.stack(ys, dim=1), h                                        # (B, L, D), (B, D, N)

# ---- The same recurrence in tiles of T steps -----------------------------------------------------
#
# The states of all steps, (B, L, N, D), are 2N times larger than the input and never in memory at
# once: the buffers a, h and g hold the steps of one tile and are used again for the next, so that
# they stay in the cache. Kept is the state that enters each tile; backward makes the others again.
#
#     forward, per tile     a_t = exp(delta_t A)    h_t = a_t h_{t-1} + x_t B_t    y_t = C_t . h_t
#     backward, in reverse  g_t = C_t gy_t + a_{t+1} g_{t+1}                       g_t is dLoss/dh_t
#                           gC_t = h_t . gy_t   gB_t = g_t . x_t   gx_t = B_t . g_t    x = delta u
#                           dLoss/d(delta_t A) = g_t a_t h_{t-1}: for the gradients of delta and A
#
# The state is (N, D) inside, channels innermost: products and sums over N read it in order.

def in_tiles(u, delta, A, B, C, state):
    """What one_by_one computes, with memory for one tile alone and a backward pass of its own."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C, state))
    scan = tiles_operator if torch.compiler.is_compiling() else TiledScan.apply
    return scan(u, delta, A, B, C, state, keep)[:2]

class TiledScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, last_state, starts = tiles_forward(*inputs)
        ctx.save_for_backward(*inputs[:5], starts)
        return y, last_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):
        return *tiles_backward(gy, glast, *ctx.saved_tensors), None

def tiles_forward(u, delta, A, B, C, state, keep):
    """y, the last state and, if keep, the states (B, N, D) that enter the tiles, and the last."""
    tiles = Tiles(u, delta, A, 2)
    y, last = torch.empty_like(u), torch.empty_like(state)
    starts = A.new_empty(tiles.count + 1 if keep else 1, len(u), *tiles.A.shape)
    with torch.inference_mode():        # a call costs a fifth less than without gradients alone
        starts[0] = state.transpose(1, 2)   # not to keep, this one place is used again
        for i, (delta_s, u_s, B_s, C_s, y_s) in enumerate(tiles.cut(delta, u, B, C, y)):
            _, h = tiles.states(delta_s, delta_s * u_s, B_s, starts[i if keep else 0])
            y_s.copy_(dot(C_s, h))                                          # (B, T, D)
            starts[i + 1 if keep else 0] = h[:, -1]
        last.copy_(starts[-1].transpose(1, 2))
    return y, last, starts

def tiles_backward(gy, glast, u, delta, A, B, C, starts):
    """The gradients of u, delta, A, B, C and state."""
    tiles = Tiles(u, delta, A, 3)
    gu, gdelta, gA, gB, gC, gstate = map(torch.empty_like, (u, delta, A, B, C, glast))
    carry = glast.transpose(1, 2)
    with torch.autocast(u.device.type, enabled=False), torch.inference_mode():
        gdelta_A = torch.zeros_like(tiles.buffers[0])
        ones = torch.ones_like(gdelta_A[..., 0])
        pieces = zip(starts, tiles.cut(delta, u, B, C, gy, gdelta, gu, gB, gC))
        for start, (delta_s, u_s, B_s, C_s, gy_s, gdelta_s, gu_s, gB_s, gC_s) in [*pieces][::-1]:
            x_s, T = delta_s * u_s, u_s.shape[1]
            a, h = tiles.states(delta_s, x_s, B_s, start)                   # (B, T, N, D)
            g = tiles.adjoints(gy_s, C_s, carry)
            gx_s = dot(B_s, g)
            gC_s.copy_(dot(gy_s, h.transpose(2, 3)))
            gB_s.copy_(dot(x_s, g.transpose(2, 3)))
            a.mul_(g)
            carry = a[:, 0].clone()             # for the tile before
            a[:, 0].mul_(start)
            a[:, 1:].mul_(h[:, :-1])            # now a has dLoss/d(delta A)
            gdelta_A[:, :T].addcmul_(a, delta_s[:, :, None])
            gdelta_s.copy_(dot(ones[:, :T], a.mul_(tiles.A))).addcmul_(gx_s, u_s)
            torch.mul(gx_s, delta_s, out=gu_s)
        gA.copy_(gdelta_A.flatten(0, 1).sum(0).t())
        gstate.copy_(carry.transpose(1, 2))
    return gu, gdelta, gA, gB, gC, gstate

# The same for torch.compile and torch.export: an operator that they take as it is, for which they
# are told the shapes of what comes out
OPERATOR = functools.partial(torch.library.custom_op, mutates_args=())
INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C"
tiles_operator = OPERATOR("mamba_py::tiles", tiles_forward, schema=(
    f"({INPUTS}, Tensor state, bool keep) -> (Tensor, Tensor, Tensor)"))
gradients_operator = OPERATOR("mamba_py::tiles_backward", tiles_backward, schema=(
    f"(Tensor gy, Tensor glast, {INPUTS}, Tensor starts) -> ({', '.join(['Tensor'] * 6)})"))
tiles_operator.register_fake(lambda u, delta, A, B, C, state, keep: (
    torch.empty_like(u), torch.empty_like(state),
    A.new_empty(torch.library.get_ctx().new_dynamic_size(), len(u), *A.t().shape)))
gradients_operator.register_fake(lambda gy, glast, *inputs: (
    *map(torch.empty_like, inputs[:5]), torch.empty_like(glast)))
tiles_operator.register_autograd(
    lambda ctx, gy, glast, _: (*gradients_operator(gy, glast, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5], output[2]))

class Tiles:
    """The number T of steps in a tile, and the buffers of one tile, (B, T, N, D)."""

    def __init__(self, u, delta, A, buffers):
        (batch, length, _), on_cpu = u.shape, u.device.type == "cpu"
        self.A = A.t().contiguous()                                         # (N, D)
        self.A_log2 = self.A / math.log(2)      # exp(delta A) as 2^(delta A / ln 2): exp2 is faster
        # on a CPU a buffer has 2 MB, to stay in the cache
        steps = (2 ** 19 if on_cpu else 2 ** 26) / max(1, batch * A.numel())
        self.count = math.ceil(length / 2 ** max(2, min(6, round(math.log2(steps)))))
        self.steps = math.ceil(length / self.count)                         # T
        # On a CPU exp is some 100 times slower where the result is denormal (below -87), and so
        # are products with it. exp(-64) is 0 to any sum in float32 and has normal products.
        self.clamp = on_cpu and bool(delta.amax() * A.amin() < -64)
        self.buffers = A.new_empty(buffers, batch, self.steps, *self.A.shape)
        self.each_step = [buffer.unbind(1) for buffer in self.buffers]      # T times (B, N, D)

    def cut(self, *tensors):
        """The tensors (B, L, X) in tiles, views (B, T, X); the last tile may be shorter."""
        return zip(*(t.split(self.steps, dim=1) for t in tensors))

    def states(self, delta, x, B, h):
        """The decays a and the states h of a tile, (B, T, N, D) each; h (B, N, D) enters it."""
        a, hs = self.buffers[:2, :, :x.shape[1]]
        torch.mul(delta[:, :, None], self.A_log2, out=a)
        if self.clamp:
            a.clamp_(min=-64 / math.log(2))
        a.exp2_()
        torch.mul(x[:, :, None], B[..., None], out=hs)
        for a_t, h_t, _ in zip(*self.each_step[:2], range(x.shape[1])):
            h = h_t.addcmul_(a_t, h)
        return a, hs

    def adjoints(self, gy, C, carry):
        """g of a tile; carry, a_{t+1} g_{t+1} of its last step, comes from the tile after."""
        gs, last = self.buffers[2, :, :C.shape[1]], C.shape[1] - 1
        torch.mul(gy[:, :, None], C[..., None], out=gs)
        a_steps, _, g_steps = self.each_step
        g = g_steps[last].add_(carry)
        for t in reversed(range(last)):
            g = g_steps[t].addcmul_(a_steps[t + 1], g)
        return gs

def dot(weights, x):
    """(B, T, N) . (B, T, N, D) -> (B, T, D), as one batch of products."""
    y = torch.bmm(weights.reshape(-1, 1, weights.shape[2]), x.flatten(0, 1))
    return y.view(*weights.shape[:2], -1)

# ---- The convolution and the block ---------------------------------------------------------------

def conv_silu(x, weight, bias=None, state=None, scan="auto"):
    """silu of a causal convolution, silu(bias + sum_k weight[:, 0, k] x_{t - (d_conv - 1) + k}).
    x: (B, L, D).  weight: (D, 1, d_conv).  bias: (D,).  state: (B, d_conv - 1, D), the inputs
    before x, or None for zeros.  scan: the method of the scan, whose kernels there may be.
    Returns (B, L, D) and the last d_conv - 1 inputs. Not F.conv1d, which wants (B, D, L)."""
    length, before = x.shape[1], weight.shape[2] - 1
    y = fast and fast.conv_silu(x, weight, bias, state, scan)
    state = x.new_zeros(len(x), before, x.shape[2]) if state is None else state.to(x.dtype)
    seen = torch.cat([state, x if y is None else x[:, max(0, length - before):]], dim=1)
    if y is None:
        taps = torch.stack(weight[:, 0].unbind(1))                          # (d_conv, D)
        y = sum(seen[:, k:k + length] * tap for k, tap in enumerate(taps))
        y = F.silu((y if bias is None else y + bias).to(x.dtype))
    return y, seen[:, seen.shape[1] - before:].clone()      # a view would keep all of seen alive

def is_plain(linear):
    """Whether it is F.linear with its weight and bias: no adapter, hook or quantiser is on it."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks,
             linear._backward_pre_hooks)
    ours = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return ours and not any(hooks) and "forward" not in vars(linear)

class MambaState(NamedTuple):
    """What a block remembers of the tokens before."""
    conv: torch.Tensor      # (B, d_conv - 1, D), the last inputs of the convolution
    h: torch.Tensor         # (B, D, N), the state of the scan, in float32

class MambaBlock(nn.Module):
    """
    The mixer (paper, figure 3): project up, short convolution, selective scan, gate, project down.

    block(x) -> y, both (B, L, d_model). Stands alone: put it where a Transformer has attention.
    block(x, state) -> (y, state after x) continues where the call ended that returned the state;
    block.init_state(batch) is the first one. Gradients flow through it."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        d_inner, self.dt_rank, self.d_state = config.d_inner, config.dt_rank, config.d_state
        self.scan, self.dt_range = config.scan, (config.dt_min, config.dt_max, config.dt_init_floor)
        self.in_proj = Linear(config.d_model, 2 * d_inner, bias=config.bias)
        # holds the weights under their released names; the convolution itself is in conv_silu
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner,
                                bias=config.conv_bias)
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(d_inner, self.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(d_inner, dtype=torch.float32))
        self.out_proj = Linear(d_inner, config.d_model, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """What is special about the first weights; call it after a host network's apply(init)."""
        self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1, dtype=torch.float32)))
        self.D.fill_(1)
        # the steps delta start log-uniform in [dt_min, dt_max]: the bias is the inverse of softplus
        # at such a draw, and a later init must not set it to zero
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank ** -0.5, self.dt_rank ** -0.5)
        dt_min, dt_max, floor = self.dt_range
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand(len(self.D)) * (high - low) + low).clamp(min=floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.mark_parameters()

    def mark_parameters(self):
        """Flags that other code bases honour, so that they leave these as they are."""
        self.dt_proj.bias._no_reinit = True
        self.A_log._no_weight_decay = self.D._no_weight_decay = True

    def init_state(self, batch):
        """The state before the first token: zeros."""
        conv = self.conv1d.weight.new_zeros(batch, self.conv1d.kernel_size[0] - 1, len(self.D))
        return MambaState(conv, self.A_log.new_zeros(batch, *self.A_log.shape))

    def forward(self, x, state=None):
        conv, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)                             # (B, L, D) each
        x, conv = conv_silu(x, self.conv1d.weight, self.conv1d.bias, conv, self.scan)
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if is_plain(self.dt_proj):      # then its bias is added inside the scan, in float32
            delta, bias = F.linear(dt, self.dt_proj.weight), self.dt_proj.bias      # (B, L, D)
        else:
            delta, bias = self.dt_proj(dt), None
        A = -torch.exp(self.A_log)                                          # (D, N)
        y, h = selective_scan(x, delta, A, B, C, self.D, z, bias, delta_softplus=True, state=h,
                              return_last_state=True, method=self.scan)
        y = self.out_proj(y)
        return y if state is None else (y, MambaState(conv, h))

    def _apply(self, fn, recurse=True):
        # model.bfloat16() and .half() leave these in float32: rounding A or delta's bias changes
        # how long the model remembers by up to 1 %, at every step again
        exact = {id(t) for p in (self.A_log, self.D, self.dt_proj.bias) for t in (p, p.grad)}

        def keep_exact(t):
            new = fn(t)
            rounded = id(t) in exact and new.dtype in (torch.float16, torch.bfloat16)
            return t.to(new.device) if rounded else new
        return super()._apply(keep_exact, recurse)

# ---- The model -----------------------------------------------------------------------------------

class GatedMLP(nn.Module):
    """fc2(value * silu(gate)), the MLP that mamba_ssm has: (B, L, d_model) -> the same."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.fc1 = Linear(config.d_model, 2 * config.d_intermediate, bias=config.bias)
        self.fc2 = Linear(config.d_intermediate, config.d_model, bias=config.bias)

    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))

class Layer(nn.Module):
    """layer(x, state) -> (x + mixer(norm(x)), state after x), and with an MLP the same for it."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        norm = functools.partial(nn.RMSNorm, config.d_model, eps=config.norm_eps)
        self.norm, self.mixer, self.dropout = norm(), MambaBlock(config), nn.Dropout(config.dropout)
        self.mlp = None
        if config.d_intermediate > 0:
            self.norm2, self.mlp = norm(), GatedMLP(config)

    def forward(self, x, state=None):
        y = self.mixer(self.dropout(self.norm(x)), state)
        y, state = (y, None) if state is None else y
        x = x + self.dropout(y)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.norm2(x)))
        return x, state

class Mamba(nn.Module):
    """embedding -> n_layer x Layer -> RMSNorm -> head, tied to the embedding.

    model(idx) -> (logits, None);  model(idx, targets) -> (None, loss);  with a state, which comes
    back as a third, after idx.  model.generate(idx, 100) -> idx and 100 more."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict({
            "embedding": nn.Embedding(config.padded_vocab_size, config.d_model),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.n_layer)),
            "norm_f": nn.RMSNorm(config.d_model, eps=config.norm_eps),
        })
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False)
        nn.init.normal_(self.backbone["embedding"].weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone["embedding"].weight
        # what each layer adds to the residual stream is scaled, or the sum would grow with depth
        residuals = config.n_layer * (2 if config.d_intermediate > 0 else 1)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    weight /= math.sqrt(residuals)

    def forward(self, idx, targets=None, state=None, num_last_tokens=0):
        """
        idx: (B, L) token ids.  targets: (B, L), negative ones are ignored.  state: from init_state,
        or what a call returned; any split of a text gives the logits of one call.
        Returns logits (B, L, vocab_size), or those of the last num_last_tokens, and None; with
        targets None, and the mean cross-entropy in nats; with a state the next state as a third."""
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must be {[*idx.shape]} as idx, not {[*targets.shape]}")
        x = self.hidden(idx, state)
        x, *after = (x,) if state is None else x
        if targets is not None:
            return None, self._loss(x, targets), *after
        return self._logits(x[:, -num_last_tokens:]), None, *after

    def hidden(self, idx, state=None):
        """(B, L, d_model) of token ids (B, L), for the head; with a state, (it, the next state)."""
        layers = self.backbone["layers"]
        states = [None] * len(layers) if state is None else state
        if len(states) != len(layers):
            raise ValueError(f"the state must have {len(layers)} layers, not {len(states)}")
        x, after = self.dropout(self.backbone["embedding"](idx)), []        # (B, L, d_model)
        for layer, layer_state in zip(layers, states):
            x, layer_state = layer(x, layer_state)
            after.append(layer_state)
        x = self.backbone["norm_f"](x)
        return x if state is None else (x, after)

    def _logits(self, x):
        return self.lm_head(x)[..., :self.config.vocab_size]                # without padding rows

    def _loss(self, x, targets):
        x, targets = x.flatten(0, 1), targets.flatten().clamp(min=-1)
        # logits of a large vocabulary take more memory than all the rest, so never all at once
        rows = max(1, LOGITS // self.config.padded_vocab_size)
        loss = fast and fast.cross_entropy(x, self.lm_head, targets, self.config.vocab_size, rows)
        if loss is None:
            loss = sum(F.cross_entropy(self._logits(x_p).float(), targets_p, ignore_index=-1,
                                       reduction="sum")
                       for x_p, targets_p in zip(x.split(rows), targets.split(rows)))
        return loss / (targets >= 0).sum().clamp(min=1)

    @property
    def device(self):
        return next(self.parameters()).device

    def init_state(self, batch):
        """The state before the first token: a MambaState for each layer. Its size never grows."""
        return [layer.mixer.init_state(batch) for layer in self.backbone["layers"]]

    def num_params(self, embedding=True):
        """Number of parameters; with embedding=False without its table (and an untied head)."""
        tables = {id(self.backbone["embedding"].weight), id(self.lm_head.weight)}
        return sum(p.numel() for p in self.parameters() if embedding or id(p) not in tables)

    def configure_optimizers(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95)):
        """AdamW with decay on the projection matrices alone: decay would pull A_log, D, delta's
        bias and the norms to a wrong place (A to -1 for every state, D to 0), and an embedding row
        that is rarely used would just fade."""
        decay = [m.weight for m in self.modules()
                 if isinstance(m, nn.Linear) and m is not self.lm_head]
        rest = [p for p in self.parameters() if all(p is not d for d in decay)]
        groups = [{"params": decay, "weight_decay": weight_decay},
                  {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    @torch.no_grad()
    def read(self, idx, state=None, num_last_tokens=1, part=2048):
        """Reads token ids (B, L) in parts, so that memory does not grow with L. Yields (logits,
        state) after each: of the part's last num_last_tokens (0: of all), and what it left."""
        state = self.init_state(len(idx)) if state is None else state
        for some in idx.split(part, dim=1):
            logits, _, state = self(some, state=state, num_last_tokens=num_last_tokens)
            yield logits, state

    def prefill(self, prompts, state):
        """The state after all but the last token of each prompt; those of one length together."""
        for length in {len(p) for p in prompts} - {1}:
            rows = [i for i, p in enumerate(prompts) if len(p) == length]
            idx = torch.stack([prompts[i][:-1] for i in rows])
            rows = torch.tensor(rows, device=idx.device)
            before = [MambaState(*(t[rows] for t in layer)) for layer in state]
            for _, after in self.read(idx, before):
                pass
            state = [MambaState(*(old.index_copy(0, rows, new) for old, new in zip(*layers)))
                     for layers in zip(state, after)]
        return state

    def decoder(self, prompts, state, compile=False):
        """step(token) -> logits, (B,) -> (B, vocab_size), for what follows the last tokens of the
        prompts, which it has not read yet; step.state is what it has read."""
        if step := fast and fast.decoder(self, prompts, state, compile, PLAIN):
            return step

        def step(token):        # by the model itself, so that hooks, adapters and all in it act
            logits, _, step.state = self(token[:, None], state=step.state)
            return logits[:, 0]                                             # (B, vocab_size)
        step.state = self.prefill(prompts, state)
        return step

    def stream(self, prompts, max_new_tokens, **settings):
        """The tokens of generate, (B,) each, as they are made: see Stream."""
        return Stream(self, prompts, max_new_tokens, **settings)

    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 generator=None, min_p=None, repetition_penalty=None, stop=(), compile=False):
        """prompts: (B, L) token ids, or a list of B prompts of any lengths. Returns them with
        max_new_tokens more each, as one tensor, or as a list; at temperature 0 each prompt gives
        what it gives alone.  temperature to repetition_penalty: see sample.
        stop: ids that end a row. In the list each row ends with its stop token; in the tensor,
        which is as long as the longest row, a shorter row repeats it.
        compile: on a CPU, the step of a token by torch.compile, some ten seconds the first time for
        a number of prompts.  ValueError: settings without a meaning."""
        new = list(self.stream(prompts, max_new_tokens, temperature=temperature, top_k=top_k,
                               top_p=top_p, generator=generator, min_p=min_p, stop=stop,
                               repetition_penalty=repetition_penalty, compile=compile))
        none = torch.empty(len(prompts), 0, dtype=torch.long, device=self.device)
        new = torch.stack(new, dim=1) if new else none
        stops = torch.tensor(stop, dtype=torch.long, device=new.device)
        repeats = (new[..., None] == stops).any(-1).sum(1)
        ends = [new.shape[1] - max(0, n - 1) for n in repeats.tolist()]     # one of them is enough
        if isinstance(prompts, torch.Tensor):
            return torch.cat([prompts.to(new.device), new[:, :max(ends)]], dim=1)
        prompts = [torch.as_tensor(p, device=new.device) for p in prompts]
        return [torch.cat([p, n[:end]]) for p, n, end in zip(prompts, new, ends)]

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, name_or_folder, device=None, dtype=None, cache_dir=None,
                        **config_changes):
        """A trained model, in eval mode: from a folder that save_pretrained wrote or, by
        mamba_files.py, from any in the layout of mamba_ssm or transformers, or by its name on
        Hugging Face, such as state-spaces/mamba-130m.  dtype: of the weights, by default as in the
        file; what MambaBlock keeps in float32 stays so.  cache_dir: for downloads.
        config_changes: options that leave the shapes alone, as dropout=0.1.
        ValueError: no such model, or damaged.  OSError: not found, no download."""
        options, tensors = (files.read if files else read_folder)(name_or_folder, cache_dir)
        try:
            config, weights = MambaConfig(**{**options, **config_changes}), {}
            with torch.device("meta"):
                model = cls(config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name_or_folder}: no model is as its config.json says, or no memory "
                             f"could hold it: {str(error).splitlines()[0]}") from None
        for key, tensor in tensors(model):      # one by one: memory for one model, not for two
            kind = dtype or tensor.dtype
            if key.endswith((".A_log", ".D", ".dt_proj.bias")):     # as in MambaBlock._apply
                kind = torch.promote_types(kind, torch.float32)
            weights[key] = tensor.to(device, kind, copy=True)
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        model.load_state_dict(weights, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.backbone["embedding"].weight
        for layer in model.backbone["layers"]:
            layer.mixer.mark_parameters()
        return model.eval()

    def save_pretrained(self, folder):
        """Writes config.json and pytorch_model.bin into folder, in the layout of released weights,
        which from_pretrained and mamba_ssm read; by mamba_files.py, both whole or none. mamba_ssm
        refuses options that it does not know (norm_eps, dropout, scan): they are left out if they
        are the default.  OSError: the disk is full, ...; the folder holds other weights.
        ValueError: int8 weights."""
        if self.lm_head.weight.dtype == torch.int8:
            raise ValueError("the layout of the released weights has no int8; save it before that")
        options, defaults = asdict(self.config), asdict(MambaConfig())
        config = {k: v for k, v in options.items()
                  if k not in SSM_CFG and (k in ALWAYS_SAVED or v != defaults[k])}
        config.update(ssm_cfg={k: options[k] for k in SSM_CFG}, rms_norm=True,
                      residual_in_fp32=True, fused_add_norm=True)
        weights = {key: tensor.cpu() for key, tensor in self.state_dict().items()}
        if self.config.tie_embeddings:      # one tensor in the file, wherever the model is
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        folder = Path(folder)
        if files:
            return files.write(folder, config, weights)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

# what mamba_fast/ may take over: objects of these very classes, as they are here
PLAIN = {cls: cls.forward for cls in (Mamba, Layer, MambaBlock, GatedMLP)}

SSM_CFG = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init_floor",
           "conv_bias", "bias")
ALWAYS_SAVED = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings")

def read_folder(folder, cache_dir=None):
    """What save_pretrained wrote: options of a MambaConfig, and a function that gives tensors."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    config.update(config["ssm_cfg"])
    weights = torch.load(Path(folder, "pytorch_model.bin"), map_location="cpu", weights_only=True)
    options = {f.name: config[f.name] for f in fields(MambaConfig) if f.name in config}
    return options, lambda model: weights.items()

# ---- Generation: one token after the other -------------------------------------------------------

class Stream(Iterator):
    """An iterator over the next tokens of some prompts, (B,) each, in constant time and memory. Its
    state is what has been read so far, all but the last token. A row that has made a stop token
    repeats it until all rows have; then the stream ends, on a GPU up to 16 tokens later, because
    asking makes it wait.  Arguments as in Mamba.generate.
    state: what the prompts continue, from init_state or another stream; it is not changed.
    seen: (B, vocab_size) bool, more tokens for repetition_penalty; the new ones are added to it."""

    def __init__(self, model, prompts, max_new_tokens, state=None, stop=(), seen=None,
                 compile=False, **sampling):
        check_sampling(**sampling)
        vocab_size, device = model.config.vocab_size, model.device
        if not all(0 <= token < vocab_size for token in stop):
            raise ValueError(f"stop must be token ids below {vocab_size}, not {list(stop)}")
        prompts = [torch.as_tensor(p, dtype=torch.long, device=device) for p in prompts]
        if min((len(p) for p in prompts), default=0) == 0:
            raise ValueError("each prompt needs at least one token")
        if seen is None and sampling.get("repetition_penalty") is not None:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        draw = functools.partial(sample, seen=seen, **sampling)
        self._state = model.init_state(len(prompts)) if state is None else state
        self._step = None
        stop = torch.tensor(stop, dtype=torch.long, device=device) if len(stop) > 0 else None
        self._tokens = self._make(model, prompts, max_new_tokens, draw, stop, seen, compile)

    def __next__(self):
        return next(self._tokens)

    @property
    def state(self):
        return self._state if self._step is None else self._step.state

    @torch.no_grad()
    def _make(self, model, prompts, max_new_tokens, draw, stop, seen, compile):
        for row, prompt in zip(() if seen is None else seen, prompts):
            row.scatter_(0, prompt, True)
        training = [m for m in model.modules() if m.training] if model.training else []
        for module in training:
            module.training = False
        try:
            self._step = model.decoder(prompts, self._state, compile)
            token, ended = torch.stack([p[-1] for p in prompts]), None
            for left in reversed(range(max_new_tokens)):
                new = draw(self._step(token))
                token = new if ended is None else torch.where(ended, token, new)
                if seen is not None:
                    seen.scatter_(1, token[:, None], True)
                yield token
                if stop is not None:
                    ended = (token[:, None] == stop).any(1)   # isin may wait for a GPU
                    if (token.device.type == "cpu" or left % 16 == 0) and ended.all():
                        return
        finally:
            for module in training:
                module.training = True

def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None,
                   generator=None):
    """ValueError for settings of sample that have no meaning."""
    for right, need in (
            (temperature >= 0, f"temperature at least 0, not {temperature}"),
            (top_k is None or top_k >= 1, f"top_k at least 1, not {top_k}"),
            (top_p is None or 0 < top_p <= 1, f"top_p above 0 and at most 1, not {top_p}"),
            (min_p is None or 0 <= min_p <= 1, f"min_p from 0 to 1, not {min_p}"),
            (repetition_penalty is None or 0 < repetition_penalty < math.inf,
             f"repetition_penalty above 0, not {repetition_penalty}")):
        if not right:
            raise ValueError(f"sampling needs {need}")

def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=None,
           repetition_penalty=None, seen=None):
    """Draws one token id for each row of logits (B, V); returns (B,), without waiting for a GPU.
    temperature: 0 takes the likeliest token.  top_k: only among the k likeliest.  top_p: only among
    the fewest that together have this probability.  min_p: only among those at least min_p times
    as likely as the likeliest.  repetition_penalty: above 1 makes the tokens in seen, (B, V) bool,
    less likely: their logits are divided by it where positive, else multiplied (CTRL, arXiv
    1909.05858).  generator: to draw the same again; one on the CPU makes a GPU wait."""
    if repetition_penalty is not None and seen is not None:
        logits, penalty = logits.float(), repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None or min_p is not None:
        # the logits less the largest are at most 0: this never overflows
        probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if top_p is not None:
            ordered, order = probs.sort(descending=True)
            enough = ordered.cumsum(-1) - ordered >= top_p      # those before it reach it already
            probs = probs.masked_fill(enough.scatter(-1, order, enough), 0)
        if min_p is not None:
            probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        logits = logits.masked_fill(probs == 0, -math.inf)
    # argmax of p / Exponential(1) is a draw from p; here logits - temperature * log(Exponential)
    # (at most 1e30, not to overflow). Not multinomial, which draws impossible indices on MPS
    noise = torch.empty(logits.shape, device=generator.device if generator else logits.device)
    noise = noise.exponential_(generator=generator).clamp_(min=1e-20).log_()
    return torch.sub(logits, noise.to(logits.device), alpha=min(temperature, 1e30)).argmax(-1)
