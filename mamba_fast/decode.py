"""
The step of a token, for generation. What is the same for all tokens is made ready once, and the
state is updated in place, in buffers of its own. On a CPU each weight is read once, in its own
type and by all cores. On CUDA the whole step is a CUDA graph, mostly of fused kernels, and then the
reading of a short prompt is one too; by `replayed` a step of training can be one.
"""
from __future__ import annotations

import functools
import itertools
import math
import sys
import weakref
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from . import step_cpu
from .int8 import Int8Embedding, Int8Linear
from .kernels import scan_triton, step_triton
from .layers import Linear, at_least_float32
from .norm_cpu import RMSNorm

# what may stand in which place of a model, by the last part of its name
LINEARS = ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2", "lm_head")
PLACES = {
    "backbone": (nn.ModuleDict,),
    "layers": (nn.ModuleList,),
    "embedding": (nn.Embedding, Int8Embedding),
    "conv1d": (nn.Conv1d,),
    "dropout": (nn.Dropout,),
    **dict.fromkeys(("norm", "norm2", "norm_f", "B_norm", "C_norm"), (RMSNorm, nn.RMSNorm)),
    **dict.fromkeys(LINEARS, (Linear, nn.Linear, Int8Linear)),
}


def decoder(model, prompts, state, compile, plain):
    """
    What Mamba.decoder returns: step(token) -> logits, (B,) -> (B, vocab_size), that has read all
    but the last token of each of the B prompts, and step.state. None if anything in the model is
    not just as mamba.py, mamba2.py or mamba3.py made it.
    state: a list with that of each layer before the prompts; it is not changed.
    plain: the classes of mamba.py, mamba2.py, mamba3.py, each with its forward and its mix.
    compile: on a CPU, by torch.compile; if it does not work here, one line says so.
    """
    if not is_plain(model, plain):
        return None
    if model.device.type == "cuda":
        return GraphDecoder(model, prompts, state)
    return EagerDecoder(model, model.prefill(prompts, state), compile)


def is_plain(model, plain):
    """Whether every module is of the class that belongs in its place, without hooks, and has plain
    parameters."""
    of_all, norm_eps = nn.modules.module, model.config.norm_eps
    if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
        return False
    for name, module in parts_of(model):
        kind, own = type(module), vars(module)
        belongs = kind in PLACES.get(name, ()) or plain.get(kind) == (
            getattr(kind, "forward", None), getattr(kind, "mix", None))
        if not belongs or "forward" in own or "mix" in own:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if kind is nn.Dropout and module.training and module.p > 0:
            return False
        if own.get("eps", norm_eps) != norm_eps:
            return False
        if isinstance(module, nn.RMSNorm) and module.weight is None:
            return False
        if name == "dt_proj" and (kind is not nn.Linear or module.bias is None):
            return False
        if any(type(p) is not nn.Parameter for p in own["_parameters"].values() if p is not None):
            return False
    return True


def parts_of(model):
    """All its modules, each with the last part of its name; in half the time of named_modules."""
    found = [("", model)]
    for _, module in found:     # which grows as it goes
        found += [(name, m) for name, m in module._modules.items() if m is not None]
    return found


def copies(state):
    clone = functools.partial(torch.clone, memory_format=torch.contiguous_format)
    return [type(layer)(*map(clone, layer)) for layer in state]


# ------------------------------------------------------------------------------------------------
# Call by call


class EagerDecoder:
    """The step of a token by a call for each operation, or compiled; see decoder."""

    # whether torch.compile works: {model: {number of prompts: bool}}
    COMPILES: ClassVar = weakref.WeakKeyDictionary()

    def __init__(self, model, state, compile):
        rows = len(state[0].h)
        self._state = copies(state)
        compile = compile and model.device.type == "cpu"
        if compile:
            known = self.COMPILES.setdefault(model, {})
            if rows not in known:
                known[rows] = compile_works(model, rows)
            compile = known[rows]
        self._step = make_step(model, self._state, compile)

    def __call__(self, token):
        return self._step(token)

    @property
    def state(self):
        return copies(self._state)


def compile_works(model, rows):
    """Whether a first compiled step works on this machine; if not, one line says so."""
    try:
        token = torch.zeros(rows, dtype=torch.long, device=model.device)
        make_step(model, model.init_state(rows), True)(token)
        return True
    except (RuntimeError, ImportError, OSError) as error:   # no compiler, an unknown device, ...
        print(f"torch.compile does not work here ({type(error).__name__}); going on without it",
              file=sys.stderr)
        return False


def make_step(model, state, compile=False):
    """step(token) -> logits, (B,) -> (B, vocab_size). It updates in place state, which is like that
    of Mamba.init_state(B)."""
    embedding, config = model.backbone["embedding"], model.config
    rows_of_token = state[0].h.shape[:1]
    ready = functools.partial(made_ready, rows=len(state[0].h), compile=compile)
    at_once = None if compile else step_cpu.layers(model, state)
    layers = [at_once] if at_once else [
        layer_step(*both, ready) for both in zip(model.backbone["layers"], state)]
    norm, head = ready(model.backbone["norm_f"]), ready(model.lm_head)

    def step(token):
        if token.shape != rows_of_token:    # C++ would not notice
            raise ValueError(f"tokens must be {[*rows_of_token]}, not {[*token.shape]}")
        x = embedding(token)                                                    # (B, d_model)
        x = x.to(at_least_float32(x)) if config.residual_in_fp32 else x
        for layer in layers:
            x = layer(x)
        return head(norm(x))[:, :config.vocab_size]                             # no padding rows

    if not compile:
        return torch.inference_mode()(step)     # calls cost less than without gradients alone
    # what the first call has checked, shapes and types above all, stays as it is: from torch 2.8 on
    # the others do not check it again
    always = not hasattr(torch.compiler, "nested_compile_region")
    checks = itertools.chain([True], itertools.repeat(always))

    def compiled_step(token):
        unchecked = functools.partial(torch.compiler.set_stance, skip_guard_eval_unsafe=True)
        with any_number_of_models() if next(checks) else unchecked():
            return compiled_call()(step, token)
    return torch.inference_mode()(compiled_step)


def any_number_of_models():
    """A context without the usual limit of 8, after which all that is new runs uncompiled."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return config.patch({name: sys.maxsize, f"accumulated_{name}": sys.maxsize})


@functools.cache
def compiled_call():
    """(step, token) -> step(token), compiled: one function for all streams, so that the code for
    the same model is found again."""
    # the usual limit of the size of a loop would cut it apart
    return torch.compile(lambda step, token: step(token), dynamic=False,
                         options={"max_fusion_size": 4096, "size_asserts": False})


def layer_step(layer, state, ready):
    """step(x) -> x, both (B, d_model): a Layer for the next token, without dropout. It updates
    state, that of its mixer, in place."""
    mixer_step = {"mamba": channels_step, "mamba2": heads_step}.get(layer.mixer.config.layer)
    if mixer_step:
        mixer = mixer_step(layer.mixer, *state, ready)
    else:
        mixer = functools.partial(step_of_itself, layer.mixer, state)
    norm, mlp = ready(layer.norm), layer.mlp
    norm2 = mlp and ready(layer.norm2)

    def step(x):
        x = x + mixer(norm(x))
        return x if mlp is None else x + mlp(norm2(x))
    return step


def step_of_itself(block, state, x):
    """y (B, d_model), what any block makes of x (B, d_model) as one token; it updates state."""
    y, after = block(x[:, None], state)
    torch._foreach_copy_([*state], [*after])
    return y[:, 0]


def conv_step(state, x, taps, bias):
    """silu of the convolution at its next input x, (B, X); taps: (d_conv, X). It updates state, the
    inputs before, (B, d_conv - 1, X), in place."""
    window = torch.cat([state.to(x.dtype), x[:, None]], dim=1)                  # (B, d_conv, X)
    state.copy_(window[:, 1:])
    y = (window * taps).sum(1)
    return F.silu(y if bias is None else y + bias)


def channels_step(block, conv_state, h, ready):
    """
    step(x) -> y, both (B, d_model): a MambaBlock for the next token. It updates in place
    conv_state, (B, d_conv - 1, D), and h, (B, D, N).
    """
    in_proj, x_proj, out_proj = (ready(m) for m in (block.in_proj, block.x_proj, block.out_proj))
    taps, bias = block.conv1d.weight[:, 0].t().contiguous(), block.conv1d.bias  # (d_conv, D)
    # exp(delta A) = 2^(delta A / ln 2), in a sixth of the time
    A_log2 = -torch.exp(block.A_log) / math.log(2)
    dt_weight, dt_bias, D = block.dt_proj.weight, block.dt_proj.bias, block.D
    sizes, eps = (block.dt_rank, block.d_state, block.d_state), block.config.mixer_rms_eps

    def step(x):
        x, z = in_proj(x).chunk(2, dim=-1)                                      # (B, D) each
        x = conv_step(conv_state, x, taps, bias)
        parts = x_proj(x).split(sizes, dim=-1)
        if eps > 0:
            parts = [F.rms_norm(part, part.shape[-1:], eps=eps) for part in parts]
        dt, B, C = parts
        if torch.compiler.is_compiling():       # so small a product can be part of a loop
            delta = (dt[:, None] * dt_weight).sum(-1)
        else:
            delta = F.linear(dt, dt_weight)
        delta = F.softplus(delta + dt_bias)             # (B, D), float32 from here on, by dt_bias
        decay = (delta[..., None] * A_log2).exp2_()                             # (B, D, N)
        h.mul_(decay).addcmul_((delta * x)[..., None], B[:, None])              # (B, D, N)
        y = torch.bmm(h, C[..., None].to(h.dtype))[..., 0]                      # (B, D)
        y = torch.addcmul(y, D, x) * F.silu(z.to(h.dtype))
        return out_proj(y.to(x.dtype))
    return step


def heads_step(block, conv_state, h, ready):
    """
    step(x) -> y, both (B, d_model): a Mamba2Block for the next token. It updates in place
    conv_state, (B, d_conv - 1, D + 2 G N), and h, (B, H, P, N).
    """
    c, batch = block.config, len(h)
    in_proj, out_proj = ready(block.in_proj), ready(block.out_proj)
    taps, bias = block.conv1d.weight[:, 0].t().contiguous(), block.conv1d.bias  # (d_conv, ...)
    A_log2 = -torch.exp(block.A_log) / math.log(2)
    dt_bias, D, limits = block.dt_bias, block.D[:, None], c.dt_limit
    shared = c.ngroups * c.d_state
    if not c.rmsnorm:
        gated = lambda y, z: y * F.silu(z.to(y.dtype))
    elif block.norm.groups > 1 or block.norm.norm_before_gate:
        gated = lambda y, z: block.norm(y[:, None], z[:, None])[:, 0]
    else:
        norm = norm_made_ready(block.norm, compile=False)
        gated = lambda y, z: norm(y * F.silu(z.to(y.dtype)))

    def step(x):
        z, u, delta = in_proj(x).split((c.d_inner, c.d_inner + 2 * shared, c.nheads), dim=-1)
        u = conv_step(conv_state, u, taps, bias)
        u, B, C = u.to(h.dtype).split((c.d_inner, shared, shared), dim=-1)
        of_groups = h.view(batch * c.ngroups, -1, c.d_state)                    # (B G, D / G, N)
        u, B, C = u.view(batch, c.nheads, -1), *(t.reshape(len(of_groups), -1) for t in (B, C))
        delta = F.softplus(delta + dt_bias)                                     # (B, H)
        delta = delta if limits == (0, math.inf) else delta.clamp(*limits)
        h.mul_((delta * A_log2).exp2_()[..., None, None])
        new = (u * delta[..., None]).view(len(of_groups), -1, 1)
        of_groups.addcmul_(new, B[:, None])                                     # delta u (outer) B
        y = torch.bmm(of_groups, C[..., None]).view(u.shape)                    # (B, H, P)
        y = gated(torch.addcmul(y, D, u).flatten(1), z)                         # (B, D)
        return out_proj(y.to(x.dtype))
    return step


@functools.cache
def has_amx():
    """Whether this CPU has Intel's matrix unit; False before torch 2.13, which cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


def made_ready(module, rows, compile):
    """
    A linear layer or RMSNorm as a function (rows, in) -> (rows, out), made ready for being called
    for token after token. A product with one row is bound by memory: each weight should be read
    once, in its own type, and on a CPU by all cores.
    """
    if isinstance(module, nn.RMSNorm):
        return norm_made_ready(module, compile)
    weight, bias = module.weight, getattr(module, "bias", None)
    on_cpu, int8 = weight.device.type == "cpu", weight.dtype == torch.int8
    plus_bias = (lambda y: y) if bias is None else (lambda y: y + bias)
    if on_cpu and not compile and (product := step_cpu.product(module, rows)):
        return product
    if compile and rows <= (8 if int8 else 1):
        def product(x):         # becomes one loop over the weights
            wide = at_least_float32(x)
            y = (x[:, None].to(wide) * weight.to(wide)).sum(-1)
            y = y * module.scale if int8 else y
            return plus_bias(y).to(x.dtype)
    elif on_cpu and rows == 1 and weight.dtype == torch.float32 and weight.numel() >= 2 ** 17:
        blocks = math.gcd(len(weight), torch.get_num_threads())
        parts = weight.unflatten(0, (blocks, -1)).transpose(1, 2)       # (blocks, in, out / blocks)

        def product(x):         # a block for each core; a smaller product is faster on one core
            return plus_bias(torch.bmm(x.expand(blocks, 1, -1), parts).view(1, -1))
    elif on_cpu and rows == 1 and weight.dtype == torch.bfloat16 and has_amx():
        def product(x):         # F.linear takes 1.6 times as long there
            return plus_bias(torch.mv(weight, x[0])[None])
    elif on_cpu and int8 and rows <= 8 and weight.shape[1] % 32 == 0:
        scale = module.scale.bfloat16()

        def product(x):         # what Int8Linear computes, with the scale made ready
            return plus_bias(torch._weight_int8pack_mm(x.bfloat16(), weight, scale).to(x.dtype))
    elif int8:
        return module
    else:
        return lambda x: F.linear(x, weight, bias)
    return product


def norm_made_ready(norm, compile):
    """The norm, in the type of its weights. Unless compiled, with half the calls, as
    weight sqrt(d) x / sqrt(|x|^2 + d eps)."""
    dtype = norm.weight.dtype
    if compile:
        return lambda x: norm(x.to(dtype))
    weight = norm.weight.to(at_least_float32(norm.weight)) * math.sqrt(len(norm.weight))
    d_eps = weight.new_tensor(len(weight) * norm.eps)

    def function(x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype)
        return (x * weight * torch.addcmul(d_eps, length, length).rsqrt_()).to(dtype)
    return function


# ------------------------------------------------------------------------------------------------
# As a CUDA graph

# Tokens of prompts that are read by a graph, at most; with more of them launches do not take longer
# than what they launch
MOST_TOKENS = 2 ** 15
SHORTEST_PART = 8       # tokens of each text that one graph reads, at least
# with more rows cuBLAS computes the products, after a pass that makes 16 bits of the weights
ROWS_IN_8_BITS = 256
NEVER = -1e4            # as delta before its softplus: a step that leaves the state as it is
GRAPHS = weakref.WeakKeyDictionary()    # {model: the Graph of its last stream}


class Graph:
    """
    The step of a token as a CUDA graph: its launches are recorded once, and replayed for each token
    by one call. So is the reading of a part of a prompt, when the first one of its length comes.

    Its state belongs to one decoder at a time, its owner; another one that wants it takes it over.
    made_for: the number of prompts and the weights, by their addresses.  fused: by the kernels of
    step_triton.py.  token: what a replay reads, and overwrites with the likeliest next ones.
    """

    @torch.inference_mode(False)    # what it keeps serves calls of both modes
    @torch.no_grad()
    def __init__(self, model, rows, made_for, fused):
        self.made_for, self.owner = made_for, lambda: None
        self.state = model.init_state(rows)
        if fused:
            step = functools.partial(step_triton.decode, model.backbone, model.lm_head,
                                     model.config, self.state)
        else:
            plain_step = make_step(model, self.state)

            def step(token):
                logits = plain_step(token)
                token.copy_(logits.argmax(-1))
                return logits
        self.step, self.given = torch.inference_mode()(step), None
        self.token = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.graph, self.logits = recorded(lambda: self.step(self.token), self.token)
        # {length: (tokens (B, length), how many of them a replay of the graph reads, the graph)}
        self.readers = {}

    def __call__(self, token):
        # the replay before has left it there, if it is the one that it gave, and nobody changed it
        if token is not self.given or token.is_inference() or token._version > 0:
            self.token.copy_(token)
        self.given = None
        self.graph.replay()
        return self.logits

    def likeliest(self, token):
        """The likeliest tokens (B,) after a call; the next one finds them where it reads them."""
        self(token)
        self.given = self.token.clone()
        return self.given

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, model, tokens):
        """model reads tokens (B, L) into the state: a Mamba-1 all of them at once, with up to an
        eighth more as padding, so that few lengths are recorded; others in parts whose lengths are
        powers of two. The last few one by one."""
        padded = model.config.layer == "mamba"
        taps = self.state[0].conv.shape[1] if hasattr(self.state[0], "conv") else 0
        while tokens.shape[1] >= max(SHORTEST_PART, taps):
            size = 1 << tokens.shape[1].bit_length() - 1
            if padded:
                step = max(SHORTEST_PART, size // 8)
                size = -(-tokens.shape[1] // step) * step
            part, tokens = tokens[:, :size], tokens[:, size:]
            if size not in self.readers:
                before = copies(self.state)     # `recorded` reads once already
                buffer, length = part.new_zeros(len(part), size), part.new_tensor(size)
                read = functools.partial(read_padded if padded else read_whole, model, buffer,
                                         length, self.state)
                graph, _ = recorded(read, buffer, self.graph.pool())
                self.readers[size] = buffer, length, graph
                self.set_state(before)
            buffer, length, graph = self.readers[size]
            buffer[:, :part.shape[1]] = part
            length.fill_(part.shape[1])
            graph.replay()
        for token in tokens.unbind(1):
            self(token)

    def disown(self):
        """The decoder that the state belongs to gets a copy of it, and is no longer its owner."""
        owner = self.owner()
        if owner is not None:
            owner.own = copies(self.state)
        self.owner = lambda: None

    def set_state(self, state):
        copy_state(self.state, state)


def copy_state(state, new):
    torch._foreach_copy_([*itertools.chain(*state)], [*itertools.chain(*new)])


@torch.no_grad()
def read_whole(model, tokens, _length, state):
    """model reads tokens (B, L) into state."""
    copy_state(state, model(tokens, state=state, num_last_tokens=1)[2])


@torch.no_grad()
def read_padded(model, tokens, length, state):
    """
    A Mamba-1 reads tokens (B, L) into state, of which the first `length` are real, a number on the
    GPU: at least d_conv - 1, and all but the last eighth. As MambaBlock does it, but with no copies
    of weights or inputs, and without the head.
    """
    rank, N = model.config.dt_rank, model.config.d_state
    eighth = torch.arange(-max(SHORTEST_PART, tokens.shape[1] // 8), 0, device=tokens.device)
    is_padding = (tokens.shape[1] + eighth >= length)[:, None]              # (L / 8, 1)
    last = length + torch.arange(-state[0].conv.shape[1], 0, device=tokens.device)
    x = model.backbone["embedding"](tokens)                                 # (B, L, d_model)
    x = x.to(at_least_float32(x)) if model.config.residual_in_fp32 else x
    for layer, (window, h) in zip(model.backbone["layers"], state):
        block, norm = layer.mixer, layer.norm
        xz = product(block.in_proj, norm(x.to(norm.weight.dtype)))
        u_in, z = xz.chunk(2, dim=-1)
        u = scan_triton.conv_silu_triton(u_in, block.conv1d.weight, block.conv1d.bias, window)
        window.copy_(u_in.index_select(1, last))
        dt, B, C = product(block.x_proj, u).split((rank, N, N), dim=-1)
        delta = F.linear(dt, block.dt_proj.weight)
        delta[:, -len(eighth):].masked_fill_(is_padding, NEVER)
        y, h_after = scan_triton.selective_scan_triton(
            u, delta, block.A_log, B, C, block.D, z, block.dt_proj.bias, True, h, log_A=True)
        step_triton.turn(h_after, h)
        x = x + product(block.out_proj, y)


def product(linear, x):
    """linear(x), x (B, L, in). For few rows by a kernel that reads weights in 8 bits as they are:
    as an Int8Linear does it, they are first written in the type of x, and read again."""
    if linear.weight.dtype == torch.int8 and x.shape[0] * x.shape[1] <= ROWS_IN_8_BITS:
        return step_triton.linear(x.contiguous(), linear)
    return linear(x)


class GraphDecoder:
    """
    A stream's use of the model's Graph; see decoder. The logits of a call are overwritten by the
    next one.
    own: the state of this decoder while it is not the owner of the graph's, else None.
    """

    def __init__(self, model, prompts, state):
        rows = len(prompts)
        weights = [t for _, module in parts_of(model)
                   for t in (*module._parameters.values(), *module._buffers.values())
                   if t is not None]
        made_for = [rows, *((t.data_ptr(), t.dtype) for t in weights)]
        fused = fuses(model) and all(t.is_contiguous() for t in weights)
        self.graph = GRAPHS.get(model)
        if self.graph is None or not fused or self.graph.made_for != made_for:
            if self.graph is not None:
                self.graph.disown()
            self.graph = None
            GRAPHS.pop(model, None)     # its memory may be needed
            self.graph = Graph(model, rows, made_for, fused)
            # not to keep: the other step has constants made from the weights, which may change
            if fused:
                GRAPHS[model] = self.graph
        lengths = {len(p) for p in prompts}
        by_graph = fused and len(lengths) == 1 and rows * max(lengths) <= MOST_TOKENS
        self.own = state if by_graph else model.prefill(prompts, state)
        self.take()
        if by_graph:
            self.graph.read(model, torch.stack(prompts)[:, :-1])

    def take(self):
        """Makes the graph's state this decoder's; the one that had it keeps a copy."""
        if self.graph.owner() is not self:
            self.graph.disown()
            self.graph.set_state(self.own)
            self.graph.owner, self.own = weakref.ref(self), None

    def __call__(self, token):
        self.take()
        return self.graph(token)

    def likeliest(self, token):
        """What step(token).argmax(-1) is, sooner."""
        self.take()
        return self.graph.likeliest(token)

    @property
    def state(self):
        return copies(self.graph.state if self.own is None else self.own)


def fuses(model):
    """Whether the step runs by the kernels of step_triton.py, if all weights are contiguous."""
    config, weight = model.config, model.lm_head.weight

    def is_as_configured(layer):
        norm = getattr(layer.mixer, "norm", None)
        return (layer.mixer.config == config and layer.mlp is None
                and (norm is None or (norm.groups, norm.norm_before_gate)
                     == (config.ngroups, config.norm_before_gate)))
    return (all(map(is_as_configured, model.backbone["layers"]))
            and config.scan in ("auto", "triton")
            and step_triton is not None and scan_triton.runs_on(weight.device)
            and weight.dtype != torch.float64 and step_triton.decodes(config))


def recorded(call, where, pool=None):
    """
    A CUDA graph of what call() launches on the GPU of the tensor `where`, and what call returns,
    which each replay of the graph fills anew.

    It is called once before, for what the first call alone has to do cannot be recorded; while it
    is being recorded nothing is done. An autocast around it is off, and one inside keeps no copies
    of weights: they would be outdated, or gone, when the graph is replayed.
    pool: of another graph, to work in the same memory; the two must not run at the same time.
    """
    with torch.cuda.device_of(where), torch.autocast("cuda", enabled=False, cache_enabled=False):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool):
            result = call()
    return graph, result


def replayed(calls, x, y):
    """
    Each of calls, (x, y) -> loss, as a CUDA graph: the CPU asks for all of it at once, instead of
    kernel by kernel. They share the memory of what each of them needs for itself. Returns functions
    like calls, for any x and y of these shapes; each call fills its loss anew.
    """
    x, y = x.clone(), y.clone()     # from here the graphs read their batch
    pool, replays = None, []

    def replay(graph, loss, new_x, new_y):
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        return loss
    for call in calls:
        graph, loss = recorded(functools.partial(call, x, y), x, pool)
        pool = graph.pool()
        replays.append(functools.partial(replay, graph, loss))
    return replays
