"""
Mamba, the selective state space language model (S6, arXiv 2312.00752), in one file that needs
torch alone. What is notable here:
- the selective scan twice: as the paper's plain loop, and in tiles, the same function made fast
- decays are multiplied step by step, never divided by each other, which overflows
- activations are (batch, length, channels) throughout: none is transposed in memory
- a state is a value: a call with a state returns the next one and leaves the given one as it is
- parameters have the names of the released state-spaces/mamba-* weights
Optional: mamba_fast/ (the same sooner), mamba_files.py (more layouts), mamba2.py and mamba3.py.

Glossary, with the paper's names. In shapes alone: B batch, L length, D d_inner = expand * d_model,
the channels of the scan, N d_state, the numbers that each of them remembers. Elsewhere:
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from numbers import Real
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

fast = files = None
with suppress(ImportError):
    import mamba_fast as fast  # its first page says which of its answers may be None
with suppress(ImportError):
    import mamba_files as files  # released weights: names on Hugging Face, other layouts

__all__ = ["Mamba", "MambaBlock", "MambaConfig", "MambaState", "conv_silu", "sample",
           "selective_scan"]
SCAN_METHODS = ("auto", "sequential", "chunked", "triton")
Maybe = Tensor | None
FOREVER = 1e12      # a delta after which nothing is left of a state
Linear, RMSNorm = attrgetter("Linear", "RMSNorm")(fast or nn)   # the same, sooner on some CPUs

@dataclass
class MambaConfig:
    """Shape of a model; the defaults are mamba-130m. A bad value is a ValueError."""
    vocab_size: int = 50277
    d_model: int = 768
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4                     # width of the causal convolution in front of the scan
    expand: int = 2                     # d_inner = expand * d_model
    dt_rank: int | str = "auto"         # of the projection that makes delta; auto: d_model / 16
    dt_min: float = 0.001               # the first delta is drawn from [dt_min, dt_max] ...
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4         # ... and never below this
    conv_bias: bool = True
    bias: bool = False                  # biases in in_proj and out_proj
    dropout: float = 0.0                # after the embedding and MLPs, before and after mixers
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8    # rows of the embedding are rounded up, for matrix units
    d_intermediate: int = 0             # > 0 adds a gated MLP of this width after each mixer
    residual_in_fp32: bool = False      # of a 16 bit model; the released ones were trained so
    scan: str = "auto"                  # method of selective_scan
    mixer_rms_eps: float = 0.0          # > 0 normalizes dt, B and C, as Falcon-Mamba does
    layer: str = "mamba"                # "mamba2", "mamba3" make it a Mamba2Config, Mamba3Config

    def __new__(cls, *_, layer="mamba", **__):
        if cls is MambaConfig and layer != "mamba":
            if layer not in ("mamba2", "mamba3"):
                raise ValueError(f"layer must be mamba, mamba2 or mamba3, not {layer!r}")
            try:
                return object.__new__(getattr(import_module(layer), f"{layer.capitalize()}Config"))
            except ModuleNotFoundError as error:
                raise ValueError(f"layer {layer!r} needs {error.name}.py beside mamba.py") from None
        return object.__new__(cls)

    def __post_init__(self):
        if self.layer == "mamba" and self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name == "d_intermediate" else 1
            if f.type.startswith("int") and (type(value) is not int or value < least):
                raise ValueError(f"{f.name} must be a whole number from {least} on, not {value!r}")
            if f.type == "float" and not (isinstance(value, Real) and abs(value) < math.inf):
                raise ValueError(f"{f.name} must be a finite number, not {value!r}")
        for name, right, need in (
                ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
                ("dt_min", 0 < self.dt_min <= self.dt_max, f"above 0 and up to {self.dt_max}"),
                ("dt_init_floor", self.dt_init_floor > 0, "above 0"),
                ("norm_eps", self.norm_eps > 0, "above 0"),
                ("mixer_rms_eps", self.mixer_rms_eps >= 0, "above 0, or 0 for none"),
                ("scan", self.scan in SCAN_METHODS, f"one of {', '.join(SCAN_METHODS)}")):
            if not right:
                raise ValueError(f"{name} must be {need}, not {getattr(self, name)!r}")

    d_inner = property(lambda self: self.expand * self.d_model)
    padded_vocab_size = property(lambda c: c.vocab_size + -c.vocab_size % c.pad_vocab_size_multiple)

# ---- The selective scan --------------------------------------------------------------------------

def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None,
                   z: Maybe = None, delta_bias: Maybe = None, delta_softplus=False,
                   state: Maybe = None, return_last_state=False, method="auto", mask: Maybe = None,
                   seq_idx: Maybe = None) -> Tensor | tuple[Tensor, Tensor]:
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
    CUDA) | "auto", the fastest that can run.  mask: (B, L) bool, False is padding, which leaves the
    state as it is.  seq_idx: (B, L) int; where it differs from that of the real token before, the
    state begins anew.  ValueError: what does not fit, or cannot run here. Names as in mamba_ssm."""
    if u.dim() != 3 or A.dim() != 2 or u.shape[1] == 0:
        raise ValueError(f"u must be (B, L, D), L > 0, A (D, N), not {[*u.shape]}, {[*A.shape]}")
    wide, (batch, length, d_inner), d_state = tuple(u.shape), u.shape, A.shape[1]
    narrow, flat = (batch, length, d_state), (batch, length)
    for name, tensor, shape in (
            ("u", u, wide), ("delta", delta, wide), ("z", z, wide), ("A", A, (d_inner, d_state)),
            ("B", B, narrow), ("C", C, narrow), ("state", state, (batch, d_inner, d_state)),
            ("D", D, (d_inner,)), ("delta_bias", delta_bias, (d_inner,)),
            ("mask", mask, flat), ("seq_idx", seq_idx, flat)):
        if tensor is not None and (tensor.shape != shape or tensor.is_complex()):
            raise ValueError(f"{name} must be {shape} to fit u {wide}, and real, not "
                             f"{tuple(tensor.shape)} {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")
    tiny = method == "auto" and length == 1
    method = "sequential" if tiny else scan_method(method, u, d_state)
    method = method if batch > 0 else "sequential"      # of no texts there are no tiles
    if fast and mask is None and seq_idx is None and (all_at_once := fast.scan(
            method, u, delta, A, B, C, state, D, z, delta_bias, delta_softplus,
            return_last_state)) is not None:
        return all_at_once
    if state is None:
        number = torch.promote_types(u.dtype, torch.float32)
        state = u.new_zeros(batch, d_inner, d_state, dtype=number)
    begins = None if seq_idx is None else beginnings(seq_idx, mask)
    part = 2048 if u.device.type == "cpu" else 2 ** 15
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or length <= part
    of_steps, others = (u, delta, B, C, z, mask, begins), (A, D, delta_bias, delta_softplus)
    if method == "chunked" and not whole:
        y = torch.empty_like(u)     # part by part, so that memory does not grow with the length
        for i in range(0, length, part):
            of_part = (None if t is None else t[:, i:i + part] for t in of_steps)
            y[:, i:i + part], state = scan_of_part(method, state, *others, *of_part)
    else:
        y, state = scan_of_part(method, state, *others, *of_steps)
    return (y, state) if return_last_state else y

def scan_of_part(method, state, A, D, delta_bias, delta_softplus, u, delta, B, C, z, mask, begins):
    """selective_scan once all is checked; begins as of beginnings. Returns y, the last state."""
    dtype, number = u.dtype, torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):      # it would run the products in 16 bits
        u, delta, A, B, C, state = (t.to(number) for t in (u, delta, A, B, C, state))
        if delta_bias is not None:
            delta = delta + delta_bias
        ours = fast if method == "chunked" else None    # functions that keep less for backward
        if delta_softplus:
            delta = (ours or F).softplus(delta)
        if mask is not None:
            delta = delta.masked_fill(~mask[..., None], 0)
        x = u
        if begins is not None:      # FOREVER forgets the state; x shrinks, so delta x is as before
            begins = begins[..., None]                                      # (B, L, 1)
            x = torch.where(begins, delta * u / FOREVER, u)
            delta = delta.masked_fill(begins, FOREVER)
        recurrence = one_by_one         # or a function that does the same sooner
        if method != "sequential":
            recurrence = (fast and fast.recurrence(method, u, A)) or in_tiles
        y, h = recurrence(x, delta, A, B, C, state)
        if D is not None:
            y = y + D * u
        if z is not None:
            y = ours.gated(y, z.to(number)) if ours else y * F.silu(z.to(number))
    return y.to(dtype), h

def beginnings(seq_idx: Tensor, mask: Maybe) -> Tensor:
    """(B, L) bool: real tokens whose seq_idx (B, L) differs from that of the real token before."""
    if mask is not None:        # padding goes to the end of each row, and back
        order = (~mask).byte().argsort(dim=1, stable=True)
        seq_idx = seq_idx.take_along_dim(order, 1)
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return begins if mask is None else begins.take_along_dim(order.argsort(1), 1) & mask

def scan_method(method: str, u: Tensor, d_state: int, headdim=0) -> str:
    """The method for u, with "auto" resolved; headdim: of layers with heads. ValueError: none."""
    if method not in SCAN_METHODS:
        raise ValueError(f"method must be one of {', '.join(SCAN_METHODS)}, not {method!r}")
    able = method in ("auto", "triton") and fast and fast.has_triton(u, d_state, headdim)
    if method == "triton" and not able:
        raise ValueError("scan 'triton' needs mamba_fast/, CUDA on Ampere or later, Triton 3.6 (of "
                         "torch 2.11), d_state <= 256, no float64; 'auto' takes the best there is")
    return method if method != "auto" else "triton" if able else "chunked"

def one_by_one(u, delta, A, B, C, h):
    """Algorithm 2 as written: one step after the other. All other ways are tested against it."""
    ys = []
    # u[:, t] would make backward quadratic in L: each has a gradient of full size; unbind has one
    for u_t, delta_t, B_t, C_t in zip(*(t.unbind(1) for t in (u, delta, B, C))):
        decay = torch.exp(delta_t[:, :, None] * A)                          # (B, D, N)
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]       # (B, D, N)
        ys.append((h * C_t[:, None, :]).sum(-1))                            # (B, D)
    return torch.stack(ys, dim=1), h                                        # (B, L, D), (B, D, N)

# ---- The same recurrence in tiles of T steps -----------------------------------------------------
# The states of all steps, (B, L, N, D), are never in memory at once. Of a tile only what enters it
# is kept, by checkpoint, and the backward pass computes the rest again. All but the recurrence is
# done for its T steps together. The state is (N, D) here: sums over N read it in order.

def in_tiles(u, delta, A, B, C, state):
    """What one_by_one computes, sooner, and with memory for one tile alone."""
    # 4 to 64 steps, with about 2^19 numbers: 2 MB, which stay in the cache of a CPU
    steps = 2 ** max(2, min(6, round(math.log2(2 ** 19 / (len(u) * A.numel())))))
    A, h, ys = A.t().contiguous(), state.transpose(1, 2), []                # (N, D), (B, N, D)
    for tile in zip(*(t.split(steps, dim=1) for t in (u, delta, B, C))):    # (B, T, X) each
        y, h = checkpoint(one_tile, *tile, A, h, use_reentrant=False, preserve_rng_state=False)
        ys.append(y)
    return torch.cat(ys, dim=1), h.transpose(1, 2)                          # (B, L, D), (B, D, N)

def one_tile(u, delta, B, C, A, h):
    """one_by_one for the T steps of a tile, with A (N, D) and h (B, N, D)."""
    decays = torch.exp(delta[:, :, None] * A).unbind(1)                     # T x (B, N, D)
    news = ((delta * u)[:, :, None] * B[..., None]).unbind(1)               # T x (B, N, D)
    hs = [h]
    for decay, new in zip(decays, news):
        hs.append(torch.addcmul(new, decay, hs[-1]))    # decay * h + new
    return (C[..., None] * torch.stack(hs[1:], dim=1)).sum(2), hs[-1]

# ---- The convolution and the block ---------------------------------------------------------------

def conv_silu(x: Tensor, weight: Tensor, bias: Maybe = None, state: Maybe = None, scan="auto",
              mask: Maybe = None, seq_idx: Maybe = None) -> tuple[Tensor, Tensor]:
    """silu of a causal convolution, silu(bias + sum_k weight[:, 0, k] x_{t - (d_conv - 1) + k}).
    x: (B, L, D).  weight: (D, 1, d_conv).  bias: (D,).  state: (B, d_conv - 1, D), the inputs
    before x, or None for zeros.  mask, seq_idx: as in selective_scan, with all padding at the end.
    scan: the method of the scan behind it.  Returns (B, L, D), the last d_conv - 1 inputs."""
    (batch, length, d_inner), past, document = x.shape, weight.shape[2] - 1, None
    if state is not None and state.shape != (batch, past, d_inner):
        raise ValueError(f"the conv state must be {[batch, past, d_inner]}, not {[*state.shape]}")
    y = fast.conv_silu(x, weight, bias, state, scan) if fast and seq_idx is None else None
    state = x.new_zeros(batch, past, d_inner) if state is None else state.to(x.dtype)
    needed = x if y is None or mask is not None else x[:, max(0, length - past):]
    seen = torch.cat([state, needed], dim=1)                                # (B, past + L, D)
    if seq_idx is not None:     # the document of each input; the state belongs to the first
        document = F.pad(beginnings(seq_idx, mask).cumsum(1), (past, 0))[..., None]
    if y is None:
        y = 0 if bias is None else bias
        # each tap in one piece of memory: of others a compiler makes slow code
        for k, tap in enumerate(torch.stack(weight[:, 0].unbind(1))):       # (D,)
            seen_k = seen[:, k:k + length]
            if document is not None:
                seen_k = seen_k * (document[:, k:k + length] == document[:, past:])
            y = y + seen_k * tap
        y = F.silu(y.to(x.dtype))

    def last(t):                                            # (B, past + L, X) -> (B, past, X)
        if mask is None:
            return t[:, t.shape[1] - past:].clone()       # a view would keep all of t alive
        steps = mask.sum(1)[:, None, None] + torch.arange(past, device=x.device)[:, None]
        return t.take_along_dim(steps, dim=1)
    state = last(seen)
    if document is not None:
        state = state * (last(document) == document[:, -1:])
    return y, state

def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether it is a plain nn.Linear, or of one of these kinds: no adapter or hook is on it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
             module._backward_pre_hooks, "forward" in vars(module))
    return (type(module) in (kinds or (nn.Linear, Linear)) and type(module.weight) is nn.Parameter
            and not any(hooks))

class MambaState(NamedTuple):
    """What a block remembers of the tokens before."""
    conv: torch.Tensor      # (B, d_conv - 1, D), the last inputs of the convolution
    h: torch.Tensor         # (B, D, N), the state of the scan, in float32

class Mixer(nn.Module):
    """What all kinds of blocks share. Each has its own mix, which gets x with the padding moved to
    the end of each row.
    block(x) -> y, both (B, L, d_model). Stands alone: put it where a Transformer has attention.
    block(x, state) -> (y, state after x) continues where the call ended that returned the state;
    block.init_state(batch) is the first one. Gradients flow through it.
    mask: (B, L) bool, False is padding, anywhere: real tokens get what they get without it.
    seq_idx: (B, L) int; where it differs from that of the real token before, a document begins. It
    sees nothing of those before."""
    exact = ()      # names of the parameters that stay float32 in a model of 16 bits
    def reset_steps(self, bias: Tensor) -> None:
        """The first values of delta's bias, and zeros for those of the projections."""
        # the steps delta start log-uniform in [dt_min, dt_max]: the bias is softplus^-1 of a draw
        low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
        dt = torch.exp(torch.rand(len(bias)) * (high - low) + low)
        dt = dt.clamp(min=self.config.dt_init_floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.exact_parameters()

    def exact_parameters(self) -> list[nn.Parameter]:
        """The parameters that `exact` names, flagged: other code is not to reset or decay them."""
        parameters = [attrgetter(name)(self) for name in self.exact]
        for parameter in parameters:
            parameter._no_reinit = parameter._no_weight_decay = True
        return parameters

    def forward(self, x: Tensor, state: tuple | None = None, mask: Maybe = None,
                seq_idx: Maybe = None) -> Tensor | tuple[Tensor, tuple]:
        """x (B, L, d_model) -> y, shaped as x; with a state (y, next state). ValueError: bad x."""
        given = [t for t in (x, mask, seq_idx) if t is not None]
        if (x.dim() != 3 or x.shape[1] == 0 or x.is_complex()
                or any(t.shape != x.shape[:2] for t in given[1:])
                or (mask is not None and mask.dtype != torch.bool)):
            raise ValueError("x must be (B, L, d_model), L > 0, and real, mask and seq_idx (B, L), "
                             "mask bool, not " + str([(t.dtype, *t.shape) for t in given]))
        if mask is not None:    # padding goes to the end of each row, and its content has no effect
            order = (~mask).byte().argsort(dim=1, stable=True)              # (B, L)
            mask, x = mask.take_along_dim(order, 1), x.take_along_dim(order[..., None], 1)
            x = x.masked_fill(~mask[..., None], 0)
            seq_idx = None if seq_idx is None else seq_idx.take_along_dim(order, 1)
        y, after = self.mix(x, state, mask, seq_idx)
        if mask is not None:
            y = y.take_along_dim(order.argsort(1)[..., None], 1)            # where they were
        return y if state is None else (y, after)

    def _apply(self, fn, recurse=True):
        # model.bfloat16() and .half() leave these in float32: rounding A or delta's bias changes
        # how long the model remembers by up to 1 %, at every step again
        exact = {id(t) for p in self.exact_parameters() for t in (p, p.grad)}

        def keep_exact(t):
            new = fn(t)
            return t.to(new.device) if id(t) in exact and new.element_size() == 2 else new
        super()._apply(keep_exact, recurse)
        self.exact_parameters()     # they may be other objects now
        return self

class MambaBlock(Mixer):
    """The mixer (paper, figure 3): project up, convolution, selective scan, gate, project down."""
    exact = ("A_log", "D", "dt_proj.bias")
    def __init__(self, config: MambaConfig):
        super().__init__()
        if config.layer != "mamba":
            raise ValueError(f"a block of layer {config.layer!r} is a {config.block.__name__}")
        self.config, self.scan = config, config.scan
        d_inner, self.dt_rank, self.d_state = config.d_inner, config.dt_rank, config.d_state
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
    def reset_parameters(self) -> None:
        """What is special about the first weights; call it after a host network's apply(init)."""
        self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1, dtype=torch.float32)))
        self.D.fill_(1)
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank ** -0.5, self.dt_rank ** -0.5)
        self.reset_steps(self.dt_proj.bias)

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token: zeros."""
        shapes = (self.conv1d.kernel_size[0] - 1, len(self.D)), self.A_log.shape
        return MambaState(*(torch.zeros(batch, *shape, dtype=weight.dtype, device=weight.device)
                            for shape, weight in zip(shapes, (self.conv1d.weight, self.A_log))))

    def mix(self, x, state, mask, seq_idx):
        if fast and (at_once := fast.mix(self, x, (state, mask, seq_idx), is_plain, PLAIN)):
            return at_once      # what follows, sooner; not if it has been edited
        conv, h = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, dim=-1)                             # (B, L, D) each
        u, conv = conv_silu(u, self.conv1d.weight, self.conv1d.bias, conv, self.scan, mask, seq_idx)
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if eps := self.config.mixer_rms_eps:
            dt, B, C = (F.rms_norm(t, t.shape[-1:], eps=eps) for t in (dt, B, C))
        if is_plain(self.dt_proj):      # then its bias is added in the scan, in float32
            delta, bias = F.linear(dt, self.dt_proj.weight), self.dt_proj.bias      # (B, L, D)
        else:       # its bias is in float32: with an input of 16 bits only autocast can take both
            with torch.autocast(dt.device.type, dt.dtype, enabled=dt.element_size() == 2):
                delta, bias = self.dt_proj(dt), None
        y, h = selective_scan(u, delta, -torch.exp(self.A_log), B, C, self.D, z, bias, True, h,
                              True, self.scan, mask, seq_idx)
        return self.out_proj(y), MambaState(conv, h)

MambaConfig.block = MambaBlock      # the mixer of a Layer; that of other layers is in their files

# ---- The model -----------------------------------------------------------------------------------

class GatedMLP(nn.Module):
    """fc2(value * silu(gate)), the MLP that mamba_ssm has: (B, L, d_model) -> the same."""
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.fc1 = Linear(config.d_model, 2 * config.d_intermediate, bias=config.bias)
        self.fc2 = Linear(config.d_intermediate, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))

def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), (B, L, d_model), in the norm's own type: x may be a residual stream in float32."""
    return norm(x.to(getattr(getattr(norm, "weight", None), "dtype", x.dtype)))

class Layer(nn.Module):
    """layer(x, state) -> (x + mixer(norm(x)), state after x), and then + mlp(norm2(x)) if any."""
    def __init__(self, config: MambaConfig):
        super().__init__()
        c, norm = config, functools.partial(RMSNorm, config.d_model, eps=config.norm_eps)
        self.norm, self.mixer, self.dropout = norm(), c.block(c), nn.Dropout(c.dropout)
        self.norm2, self.mlp = (norm(), GatedMLP(c)) if c.d_intermediate > 0 else (None, None)

    def forward(self, x: Tensor, state: tuple | None = None, **masks) -> tuple:
        """(B, L, d_model), and as for Mixer -> ((B, L, d_model), its state or None)."""
        y = self.mixer(self.dropout(normed(self.norm, x)), state, **masks)
        y, state = (y, None) if state is None else y
        x = x + self.dropout(y)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(normed(self.norm2, x)))
        return x, state

class Mamba(nn.Module):
    """embedding -> n_layer x Layer -> RMSNorm -> head, tied to the embedding.
    model(idx) -> (logits, None);  model(idx, targets) -> (None, loss);  model(idx, state=state) ->
    (logits, None, the state after idx).  model.generate(idx, 100) -> idx and 100 more."""
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config, self.tokenizer = config, None      # that of weights which came with one
        self.backbone = nn.ModuleDict({
            "embedding": nn.Embedding(config.padded_vocab_size, config.d_model),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.n_layer)),
            "norm_f": RMSNorm(config.d_model, eps=config.norm_eps)})
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False)
        nn.init.normal_(self.backbone["embedding"].weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone["embedding"].weight
        # what each layer adds to the residual stream is scaled, or the sum would grow with depth
        added = config.n_layer * (2 if config.d_intermediate > 0 else 1)
        for name, weight in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                weight.data /= math.sqrt(added)

    def forward(self, idx: Tensor, targets: Maybe = None, state: list | None = None,
                num_last_tokens=0, mask: Maybe = None, seq_idx: Maybe = None) -> tuple:
        """idx: (B, L) token ids.  targets: (B, L), negative ones are ignored.  state: init_state's
        or what a call returned: any split of a text gives the same.  mask, seq_idx: as for Mixer.
        Returns (logits, None), logits (B, L, vocab_size) or of the last num_last_tokens, 0: of all;
        with targets (None, mean cross-entropy in nats); with a state the next one as a third."""
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must be {[*idx.shape]} as idx, not {[*targets.shape]}")
        x = self.hidden(idx, state, mask, seq_idx)
        x, *after = (x,) if state is None else x
        if targets is not None:
            return None, self._loss(x, targets), *after
        logits = self.lm_head(x[:, -num_last_tokens:])
        return logits[..., :self.config.vocab_size], None, *after           # without padding rows

    def hidden(self, idx: Tensor, state: list | None = None, mask: Maybe = None,
               seq_idx: Maybe = None) -> Tensor | tuple[Tensor, list]:
        """x (B, L, d_model) of token ids (B, L), for the head; with a state (x, the next state)."""
        layers = self.backbone["layers"]
        states = [None] * len(layers) if state is None else state
        if idx.dim() != 2 or len(states) != len(layers):
            raise ValueError(f"idx must be (B, L), not {[*idx.shape]}, and a state must have "
                             f"{len(layers)} layers, not {len(states)}")
        x, after = self.dropout(self.backbone["embedding"](idx)), []        # (B, L, d_model)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        # without those that are None: a layer of another kind may know neither
        masks = {k: t for k, t in {"mask": mask, "seq_idx": seq_idx}.items() if t is not None}
        for layer, layer_state in zip(layers, states):
            x, layer_state = layer(x, layer_state, **masks)
            after.append(layer_state)
        x = normed(self.backbone["norm_f"], x)
        return x if state is None else (x, after)

    def _loss(self, x, targets):
        x, targets = x.flatten(0, 1), targets.masked_fill(targets < 0, -100).flatten()
        plain, vocab_size = is_plain(self.lm_head), self.config.vocab_size
        loss = fast and fast.cross_entropy(x, self.lm_head, plain, targets, vocab_size)
        if loss is None:
            logits = self.lm_head(x)[:, :vocab_size]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss / (targets >= 0).sum().clamp(min=1)

    device = property(lambda self: next(self.parameters()).device)

    def init_state(self, batch: int) -> list[tuple]:
        """The state before the first token: that of each layer's mixer. Its size never grows."""
        return [layer.mixer.init_state(batch) for layer in self.backbone["layers"]]

    def num_params(self, embedding: bool = True) -> int:
        """Number of parameters; with embedding=False without its table (and an untied head)."""
        tables = {id(self.backbone["embedding"].weight), id(self.lm_head.weight)}
        return sum(p.numel() for p in self.parameters() if embedding or id(p) not in tables)

    def configure_optimizers(self, learning_rate: float, weight_decay=0.1, betas=(0.9, 0.95)
                             ) -> torch.optim.AdamW:
        """AdamW with decay on the projection matrices alone: it would pull A to -1 for every state,
        D, delta's bias and the norms to 0, and an embedding row that is rarely used would fade."""
        linear = [m for m in self.modules() if isinstance(m, nn.Linear) and m is not self.lm_head]
        rest = [p for p in self.parameters() if all(p is not m.weight for m in linear)]
        groups = [{"params": [m.weight for m in linear]}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, learning_rate, betas, 1e-8, weight_decay, fused=True)

    @torch.no_grad()
    def read(self, idx: Tensor, state: list | None = None, num_last_tokens=1, part=2048,
             mask: Maybe = None) -> Iterator[tuple[Tensor, list]]:
        """Reads token ids (B, L) in parts, so that memory does not grow with L. Yields (logits,
        state) after each part, logits of its last num_last_tokens, or with 0 of all its tokens."""
        state = self.init_state(len(idx)) if state is None else state
        for i in range(0, idx.shape[1], part):
            logits, _, state = self(idx[:, i:i + part], None, state, num_last_tokens,
                                    None if mask is None else mask[:, i:i + part])
            yield logits, state

    def prefill(self, prompts: list[Tensor], state: list) -> list:
        """The state after all but the last token of each prompt."""
        idx = nn.utils.rnn.pad_sequence([p[:-1] for p in prompts], True, padding_value=-1)
        mask = None if (idx >= 0).all() else idx >= 0                       # (B, L)
        for part in self.read(idx.clamp(min=0), state, mask=mask):
            state = part[1]
        return state

    def decoder(self, prompts: list[Tensor], state: list, compile=False) -> Callable:
        """step(token) -> logits, (B,) -> (B, vocab_size), to be called with the last tokens of the
        prompts first; step.state is what it has read."""
        with evaluating(self):
            if step := fast and fast.decoder(self, prompts, state, compile, PLAIN):
                return step
            state = self.prefill(prompts, state)

        def step(token):        # by the model itself, so that hooks, adapters and all in it act
            with evaluating(self):
                logits, _, step.state = self(token[:, None], state=step.state)
            return logits[:, 0]                                             # (B, vocab_size)
        step.state = state
        return step

    def stream(self, prompts: Tensor | list, max_new_tokens: int, **settings) -> Stream:
        """The tokens of generate, (B,) each, as they are made: see Stream."""
        return Stream(self, prompts, max_new_tokens, **settings)

    def generate(self, prompts: Tensor | list, max_new_tokens: int, temperature=1.0,
                 top_k: int | None = None, top_p: float | None = None,
                 generator: torch.Generator | None = None, stop=(), **settings) -> Tensor | list:
        """prompts: (B, L) token ids, or a list of B prompts of any lengths. Returns them with
        max_new_tokens more each, as one tensor, or as a list; at temperature 0 each prompt gives
        what it gives alone.  temperature, ..., generator: see sample.  stop: ids that end a row. In
        the list each row ends with its stop token; in the tensor a shorter row repeats it.
        compile=True: by torch.compile, on a CPU.  ValueError: settings without a meaning."""
        stream = self.stream(prompts, max_new_tokens, temperature=temperature, top_k=top_k,
                             top_p=top_p, generator=generator, stop=stop, **settings)
        first = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        new = torch.stack([first, *stream], dim=1)[:, 1:]                   # (B, max_new_tokens)
        repeats = torch.isin(new, torch.tensor(stop, device=new.device)).sum(1)
        ends = [new.shape[1] - max(0, n - 1) for n in repeats.tolist()]     # the first is kept
        if isinstance(prompts, torch.Tensor):
            return torch.cat([prompts.to(new.device), new[:, :max(ends)]], dim=1)
        prompts = [torch.as_tensor(p, device=new.device) for p in prompts]
        return [torch.cat([p, n[:end]]) for p, n, end in zip(prompts, new, ends)]

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, device=None,
                        dtype: torch.dtype | None = None, cache_dir=None, **changes) -> Mamba:
        """A trained model, in eval mode, from a folder that save_pretrained wrote; or by
        mamba_files.py a run of train.py, any layout of mamba_ssm or transformers, or a name on
        Hugging Face, as state-spaces/mamba-130m.  dtype: as in the file; what is exact stays so.
        changes: as dropout=0.1.  ValueError: no such model, or damaged.  OSError: not found."""
        options, tensors = (files.read if files else read_folder)(name_or_folder, cache_dir)
        with torch.device("meta"):
            model = cls(MambaConfig(**{**options, **changes}))
        model.load_state_dict(dict(tensors(model, device, dtype)), assign=True)
        if model.config.tie_embeddings:
            model.lm_head.weight = model.backbone["embedding"].weight
        return model.to(device, dtype).eval()

    def save_pretrained(self, folder: str | Path, layout: str = "mamba_ssm") -> None:
        """Writes config.json and weights into folder, for from_pretrained. By mamba_files.py all of
        it or nothing: pytorch_model.bin of mamba_ssm or, by layout="transformers", what its Auto
        classes load.  OSError: the disk is full, ...  ValueError: no place for this model."""
        options, weights = asdict(self.config), self.state_dict()
        if files:
            return files.write(Path(folder), options, weights, layout, self.tokenizer)
        if layout != "mamba_ssm":
            raise ValueError(f"layout {layout!r} needs mamba_files.py beside mamba.py")
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(weights, Path(folder, "pytorch_model.bin"))
        Path(folder, "config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")

@contextmanager
def evaluating(model):
    """All of the model is in eval mode in here; then each module is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

# what mamba_fast/ takes over, and what is left of it where you have edited this file
PLAIN = {c: (c.forward, getattr(c, "mix", None)) for c in (Mamba, Layer, MambaBlock, GatedMLP)}
fast = fast and fast.unedited("mamba", globals())

def read_folder(folder, _):
    """What save_pretrained wrote: options of a MambaConfig, and a function that gives tensors."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    config.update(config.get("ssm_cfg", {}))
    weights = torch.load(Path(folder, "pytorch_model.bin"), map_location="cpu", weights_only=True)
    known = fields(MambaConfig(layer=config.get("layer", "mamba")))
    return {f.name: config[f.name] for f in known if f.name in config}, lambda *_: weights

# ---- Generation: one token after the other -------------------------------------------------------

class Stream(Iterator):
    """An iterator over the next tokens of some prompts, (B,) each, in constant time and memory. Its
    state is what has been read so far, all but the last token. It ends when all rows have made a
    stop token, on a GPU up to 16 tokens later: asking makes it wait.  Arguments: as of generate;
    state, which the prompts continue; seen, (B, vocab_size) bool, as of sample: updated."""
    def __init__(self, model, prompts, max_new_tokens, state=None, stop=(), seen=None,
                 compile=False, **sampling):
        check_sampling(**sampling)
        vocab_size, device = model.config.vocab_size, model.device
        stop, *prompts = (torch.as_tensor(ids, dtype=torch.long, device=device)
                          for ids in (stop, *prompts))
        if any(p.dim() != 1 for p in prompts):
            raise ValueError("prompts must be (B, L), or a list: put one prompt in a list")
        if min(map(len, prompts), default=0) == 0:
            raise ValueError("each prompt needs at least one token")
        if (ids := torch.cat([stop, *prompts])).min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"prompts and stop must be token ids from 0 to {vocab_size - 1}")
        if seen is None and sampling.get("repetition_penalty") is not None:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(() if seen is None else seen, prompts):
            row.scatter_(0, prompt, True)
        draw = functools.partial(sample, seen=seen, **sampling)
        self._step = SimpleNamespace(state=state or model.init_state(len(prompts)))   # until next()
        self._tokens = self._make(model, prompts, max_new_tokens, draw, stop, seen, compile)

    __next__ = lambda self: next(self._tokens)
    state = property(lambda self: self._step.state)

    @torch.no_grad()
    def _make(self, model, prompts, max_new_tokens, draw, stop, seen, compile):
        self._step = model.decoder(prompts, self.state, compile)
        token, ended = torch.stack([p[-1] for p in prompts]), None
        greedy = draw.keywords.get("temperature") == 0 and seen is None
        likeliest = greedy and getattr(self._step, "likeliest", None)   # a GPU knows it already
        for left in reversed(range(max_new_tokens)):
            new = likeliest(token) if likeliest else draw(self._step(token))
            token = new if ended is None else torch.where(ended, token, new)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            yield token
            if len(stop) > 0:
                ended = (token[:, None] == stop).any(1)   # isin may wait for a GPU
                if (token.device.type == "cpu" or left % 16 == 0) and ended.all():
                    return

def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None,
                   generator=None):
    """ValueError for settings of sample that have no meaning."""
    for need, value, right in (
            ("temperature at least 0", temperature, temperature >= 0),
            ("top_k at least 1", top_k, top_k is None or top_k >= 1),
            ("top_p above 0 and at most 1", top_p, top_p is None or 0 < top_p <= 1),
            ("min_p from 0 to 1", min_p, min_p is None or 0 <= min_p <= 1),
            ("repetition_penalty above 0", repetition_penalty,
             repetition_penalty is None or 0 < repetition_penalty < math.inf)):
        if not right:
            raise ValueError(f"sampling needs {need}, not {value}")

def sample(logits: Tensor, temperature=1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None, min_p: float | None = None,
           repetition_penalty: float | None = None, seen: Maybe = None) -> Tensor:
    """Draws one token id for each row of logits (B, V); returns (B,), without waiting for a GPU.
    temperature: 0 takes the likeliest.  top_k: among the k likeliest.  top_p: among the fewest that
    have this probability.  min_p: among those min_p times as likely as the likeliest, or more.
    repetition_penalty: above 1 makes tokens in seen, (B, V) bool, less likely (arXiv 1909.05858).
    generator: to draw the same again; on the CPU, a GPU waits."""
    if repetition_penalty is not None and seen is not None:
        logits, penalty = logits.float(), repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits, temperature = logits.float(), min(temperature, 1e30)        # not to overflow
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None or min_p is not None:
        # the logits less the largest are at most 0: this never overflows
        probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if top_p is not None:
            ordered, order = probs.sort(descending=True)
            enough = ordered.cumsum(-1) - ordered >= top_p      # those before already sum to it
            probs = probs.masked_fill(enough.scatter(-1, order, enough), 0)     # back in order
        if min_p is not None:
            probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        logits = logits.masked_fill(probs == 0, -math.inf)
    # argmax of p / Exponential(1) is a draw from p; here logits - temperature * log(Exponential).
    # Not multinomial, which draws impossible indices on MPS
    noise = torch.empty(logits.shape, device=generator.device if generator else logits.device)
    noise = noise.exponential_(generator=generator).clamp_(min=1e-20).log_()
    return torch.sub(logits, noise.to(logits.device), alpha=temperature).argmax(-1)
