"""
Two suites of bench.py: Mamba beside Transformers on the same text, and the paper's own tasks.

--suite=compare trains, on the text of --dataset:
    mamba   the model of mamba.py, of --d_model and --n_layer; mamba2 and mamba3 are the same with
            layers of these kinds, whose heads have states of 64 numbers
    gpt     nanoGPT's Transformer of the same width. One of its layers has about as many parameters
            as two of Mamba's: it has half as many layers, and MLPs (some 4 d_model wide) of the
            width that makes the two models equal in parameters
    moe     the same with 8 MLPs of half that width in each layer, of which a router gives each
            token 2: as many active parameters, and more to choose from
What is fair: all see the same batches in the same order, and are judged by the same windows of the
validation text. All have AdamW with the same settings, the same rate of dropout, and a warm-up and
a cosine over the same budget of steps or of seconds, in which evaluations do not count. The
learning rate is the same unless --models says otherwise; in what the README shows it is the one, of
four that were tried, that is best for the GPT. --compile compiles all but the mixture, whose shapes
change. They take turns, so that a busy machine slows them all. The GPT's attention is PyTorch's
fast one, therefore without dropout of its weights. Its positions are rotary, for nanoGPT's learned
ones end at block_size: so it can write on after any text, from a cache of all keys and values, as
Mamba does from its state. That is timed; what it writes far beyond the length that it learned is
not judged. Mamba writes by `stream`, with mamba_fast/ if that is there, the others in plain
PyTorch.
What it does not tell: this is one seed and one size, and nothing else is tuned.

--suite=tasks trains Mambas of two layers on the tasks of the paper's section 4.1, which show what
selection is for, and Mambas of one layer on parity. The same model with delta, B and C constant
over time has to fail where the paper says so. All is smaller than in the paper, as the table says;
so short that without the gate it does better than with it, other than there.
"""
from __future__ import annotations

import functools
import gc
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from common import (
    Problem,
    autocast,
    compiled,
    nearest,
    say,
    seed_of,
    set_up,
    usual_headdim,
)
from mamba import Mamba, MambaBlock, MambaConfig
from prepare_data import open_data

try:
    import mamba_fast as fast
except ImportError:     # all works without it, slower
    fast = None

# ---- Transformers --------------------------------------------------------------------------------

class MLP(nn.Module):
    """(..., d_model) -> the same."""

    def __init__(self, d_model, hidden):
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))

class Experts(nn.Module):
    """A sparse mixture of MLPs (arXiv 1701.06538): a router chooses the `top` of them that suit a
    token best; the token gets what these say, weighted by how well they suit."""

    def __init__(self, d_model, hidden, count=8, top=2):
        super().__init__()
        self.top, self.router = top, nn.Linear(d_model, count, bias=False)
        self.experts = nn.ModuleList(MLP(d_model, hidden) for _ in range(count))

    def forward(self, x):
        """(B, L, d_model) -> the same, and the balance loss."""
        tokens = x.flatten(0, 1)                                            # (T, d_model)
        weights, chosen, balance = self.route(tokens)
        order = chosen.flatten().argsort(stable=True)       # T * top choices, by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = tokens[order // self.top].split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        y = y[order.argsort()].unflatten(0, chosen.shape)                   # (T, top, d_model)
        return (weights[..., None] * y).sum(1).type_as(x).view_as(x), balance

    def route(self, tokens):
        """weights and chosen, (T, top) each: the experts of each token, and what each of them
        counts. And the loss of the Switch Transformer (arXiv 2101.03961), least where all experts
        are equally busy, where it is 1: without it a few would do all the work."""
        fit = self.router(tokens).float().softmax(-1)                       # (T, experts)
        weights, chosen = fit.topk(self.top)
        share = F.one_hot(chosen, len(self.experts)).float().mean((0, 1))   # of the work
        balance = len(self.experts) * (share * fit.mean(0)).sum()
        return weights / weights.sum(-1, keepdim=True), chosen, balance

class GPT(nn.Module):
    """nanoGPT's Transformer with rotary positions: norms before, causal attention, then an MLP, or
    Experts if sparse. Called as Mamba is; its state is a cache, of init_state."""

    def __init__(self, vocab_size, d_model, n_layer, hidden, dropout=0.0, sparse=False):
        super().__init__()
        self.head_size, self.sparse = math.gcd(d_model, 64), sparse
        self.tokens, self.dropout = nn.Embedding(vocab_size, d_model), nn.Dropout(dropout)
        norm, linear = (functools.partial(of, bias=False) for of in (nn.LayerNorm, nn.Linear))
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm1": norm(d_model),
            "qkv": linear(d_model, 3 * d_model), "out": linear(d_model, d_model),
            "norm2": norm(d_model),
            "mlp": (Experts if sparse else MLP)(d_model, hidden),
        }) for _ in range(n_layer))
        self.norm, self.lm_head = norm(d_model), linear(d_model, vocab_size)
        self.lm_head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.dim() > 1:    # as in nanoGPT: what layers add is smaller, the more there are
                is_added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layer if is_added else 1))

    def forward(self, idx, targets=None, state=None):
        """As Mamba.forward. In training the loss has 0.01 of each layer's balance loss on top."""
        cache, past = (None, 0) if state is None else state
        length, balances = idx.shape[1], []
        x = self.dropout(self.tokens(idx))                                  # (B, L, d_model)
        angles = rotations(past, length, self.head_size, idx.device)
        sees = None     # which tokens each one attends to, where is_causal cannot say it
        if past > 0 and length > 1:
            sees = torch.ones(length, past + length, dtype=torch.bool, device=idx.device).tril(past)
        for i, layer in enumerate(self.layers):
            qkv = layer["qkv"](layer["norm1"](x)).unflatten(2, (3, -1, self.head_size))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, L, d) each
            q, k = rotated(q, angles), rotated(k, angles)
            if state is not None:
                cache[i, :, :, :, past:past + length] = torch.stack([k, v])
                k, v = cache[i, :, :, :, :past + length]
            y = F.scaled_dot_product_attention(q, k, v, sees, is_causal=past == 0)
            x = x + self.dropout(layer["out"](y.transpose(1, 2).flatten(2)))
            y = layer["mlp"](layer["norm2"](x))
            if self.sparse:
                y, balance = y
                balances.append(balance)
            x = x + self.dropout(y)
        after = () if state is None else ((cache, past + length),)
        logits = self.lm_head(self.norm(x))                                 # (B, L, vocab_size)
        if targets is None:
            return logits, None, *after
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return None, loss + 0.01 * sum(balances) if self.training else loss, *after

    def init_state(self, batch, most, read=0):
        """(cache, number of tokens read). The cache holds keys and values for up to `most` tokens,
        (n_layer, 2, B, heads, most, d). read: as if so many had been; any numbers take as long."""
        weight, size = self.tokens.weight, self.head_size
        heads = weight.shape[1] // size
        return weight.new_ones(len(self.layers), 2, batch, heads, most, size), read

    configure_optimizers = Mamba.configure_optimizers   # all its matrices are those of an nn.Linear

def rotations(past, length, size, device):
    """cos and sin, (length, size / 2) each, of the angles by which keys and queries are turned
    after `past` tokens, so that their products tell distances (arXiv 2104.09864)."""
    speed = 10_000 ** -torch.arange(0, 1, 2 / size, device=device)
    angles = torch.arange(past, past + length, device=device)[:, None] * speed
    return angles.cos(), angles.sin()

def rotated(x, angles):
    """x (B, heads, L, d), each pair of numbers (x_i, x_{i + d/2}) turned by its angle."""
    (a, b), (cos, sin) = x.chunk(2, -1), angles
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).type_as(x)

# ---- Training ------------------------------------------------------------------------------------

class Training:
    """A model on its way through a budget of max_iters steps or, if that is 0, of cfg.seconds.
    batch: a function that gives x and y, (B, L) each, for the number of a step."""

    def __init__(self, bench, name, model, learning_rate, batch, max_iters):
        self.bench, self.name, self.batch = bench, name, batch
        self.model = model.to(bench.device).train()
        self.learning_rate, self.max_iters = learning_rate, max_iters
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.optimizer = self.model.configure_optimizers(learning_rate, betas=(0.9, 0.99))
        self.scaler = torch.amp.GradScaler(bench.device.type, enabled=bench.dtype == "float16")
        # an expert gets another number of tokens each time, which a recorded graph cannot give it
        one_shape = not getattr(model, "sparse", False)
        self.network = compiled(self.model) if bench.cfg.compile and one_shape else self.model
        if fast and one_shape and bench.device.type == "cuda" and bench.dtype != "float16":
            self.gradients = fast.replayed([self.gradients], *batch(0))[0]  # as train.py does it
        self.gradients(*batch(0))   # what the first time takes longer is no time of training

    @property
    def progress(self):
        """The part of the budget that is used."""
        return (self.step / self.max_iters if self.max_iters else
                self.seconds / self.bench.cfg.seconds)

    def gradients(self, x, y):
        """The loss, whose gradients the parameters have then."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.bench.device, self.bench.dtype):
            loss = self.network(x, y)[1]
        self.scaler.scale(loss).backward()
        return loss.detach()

    def do_step(self):
        # dropout, too, depends on seed and step alone, whoever had a turn in between
        torch.manual_seed(seed_of(self.bench.cfg.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule(self.progress)
        loss = self.gradients(*self.batch(self.step))
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def train(self, until, tell):
        """Goes on until this part of the budget is used, with tell(self) after each step."""
        self.model.train()
        while self.progress < until:
            seconds, self.loss = self.bench.clock(self.do_step, self.bench.device)
            self.seconds, self.step = self.seconds + seconds, self.step + 1
            tell(self)

def schedule(progress):
    """The part of the learning rate: it rises for a twentieth of the budget, then falls to 0.1."""
    if progress < 0.05:
        return progress / 0.05
    return 0.55 + 0.45 * math.cos(math.pi * min(1, (progress - 0.05) / 0.95))

class Progress(tqdm):
    """A bar over the training of so many models on a terminal; elsewhere a line every 5 seconds."""

    def __init__(self, models):
        form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}"
        super().__init__(total=models, bar_format=form, leave=False, disable=None)
        self.parts, self.told = {}, time.monotonic()

    def tell(self, run):
        self.parts[run.name] = run.progress
        words = f"{run.name}: step {run.step}, {run.seconds:.0f} s, training loss {run.loss:.3f}"
        if not self.disable:
            self.set_description_str(words, refresh=False)
            self.update(sum(self.parts.values()) - self.n)
        elif time.monotonic() - self.told > 5:
            say(words)
            self.told = time.monotonic()

def publish(bench, title, rows, columns, remarks=()):
    """Writes what is done, and prints it as a table. columns: {header: str.format of a row}."""
    bench.write(bench)
    known = [{key: math.nan if value is None else value for key, value in row.items()}
             for row in rows]
    if rows:
        bench.show(title, {header: [form.format(**row).replace("nan", "n/a") for row in known]
                           for header, form in columns.items()}, remarks)

# ---- Models on the same text ---------------------------------------------------------------------

def options_of_heads(layer, d_model):
    """Of a layer with heads; from a width of 768 on as released, below with smaller states."""
    d_state = {} if d_model >= 768 else {"d_state": 64}
    return {"headdim": usual_headdim(2 * d_model), **d_state} if layer in HEADS else {}

def build_mamba(cfg, vocab_size, layer="mamba"):
    return Mamba(MambaConfig(vocab_size=vocab_size, d_model=cfg.d_model, n_layer=cfg.n_layer,
                             dropout=cfg.dropout, layer=layer,
                             **options_of_heads(layer, cfg.d_model)))

def build_gpt(cfg, vocab_size, sparse=False):
    """One with as many active parameters as build_mamba's."""
    with torch.device("meta"):
        wanted = build_mamba(cfg, vocab_size).num_params()
    return gpt_of_size(wanted, vocab_size, cfg.d_model, cfg.n_layer, cfg.dropout, sparse)

def gpt_of_size(wanted, vocab_size, width, n_layer, dropout=0.0, sparse=False):
    """One with as many active parameters as wanted, and half as many layers, as those of a Mamba
    have 6 d_model^2 parameters, and a Transformer's 12. The width of the MLPs makes up the rest."""
    n_layer = max(1, round(n_layer / 2))
    beside_mlps = vocab_size * width + n_layer * (4 * width ** 2 + 2 * width) + width
    hidden = max(1, round((wanted - beside_mlps) / (2 * width * n_layer) / 16)) * 16
    return GPT(vocab_size, width, n_layer, hidden // 2 if sparse else hidden, dropout, sparse)

build_moe = functools.partial(build_gpt, sparse=True)
HEADS = ("mamba2", "mamba3")    # layers of the kinds that have heads
MODELS = {"mamba": build_mamba, "gpt": build_gpt, "moe": build_moe,     # how each is built
          **{layer: functools.partial(build_mamba, layer=layer) for layer in HEADS}}
EVALUATIONS, WINDOWS = 16, 64   # of each model; of the validation text in each of them

def count_parameters(model):
    """(how many a token goes through, how many there are)"""
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for part in model.modules() if isinstance(part, Experts)
               for expert in part.experts[part.top:] for p in expert.parameters())
    return total - idle, total

def learning_rates(models):
    """{name: learning rate} of --models. Problem: there is no such model, or rate."""
    rates = {}
    for part in models.split(","):
        name, _, rate = part.partition("=")
        if name not in MODELS:
            raise Problem(f"--models takes {', '.join(MODELS)}, not '{name}'"
                          f"{nearest(name, MODELS)}")
        if not re.fullmatch(r"(\d+\.?\d*(e-?\d+)?)?", rate):
            raise Problem(f"--models takes {name}=1e-3 with a learning rate, not '{part}'")
        rates[name] = float(rate or 3e-3)
    return rates

def windows(bench, tokens, starts):
    """x and y, (len(starts), block_size) each: the tokens from each start on, and one later."""
    both = torch.from_numpy(tokens.windows(starts, bench.cfg.block_size + 1).astype(np.int64))
    both = both.to(bench.device)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()

def random_windows(bench, tokens, step):
    """The batch of a step: a function of seed and step alone, so the same for all models."""
    rng = np.random.default_rng((bench.cfg.seed, step))
    return windows(bench, tokens, rng.integers(len(tokens), size=bench.cfg.batch_size))

@torch.no_grad()
def evaluate(bench, model, tokens):
    """Mean loss over windows spread evenly, always the same."""
    length, size, total = bench.cfg.block_size, bench.cfg.batch_size, 0.0
    count = min(WINDOWS, (len(tokens) - 1) // length)
    starts = np.linspace(0, len(tokens) - 1 - length, count).astype(int)
    model.eval()
    for part in (starts[i:i + size] for i in range(0, count, size)):
        with autocast(bench.device, bench.dtype):
            total += model(*windows(bench, tokens, part))[1].item() * len(part)
    return total / count

@torch.no_grad()
def continued(model, token, n, state):
    """The n likeliest tokens, (B,) each, after token (B, 1) and all that the state has read."""
    if not isinstance(model, GPT):
        return list(model.stream(token, n, temperature=0, state=state))
    new = []
    for _ in range(n):
        logits, _, state = model(token, state=state)
        token = logits[:, -1:].argmax(-1)
        new.append(token[:, 0])
    return new

def writing(bench, model, text):
    """How fast a model writes after text (1, L), and the memory of what it knows of that text."""
    n, length = bench.cfg.new_tokens, text.shape[1]
    if isinstance(model, GPT):      # reading takes the square of the length, and changes no time
        state = model.init_state(1, length + n, length)
        known = state[0][..., :length, :]
    else:
        *_, (_, state) = model.read(text)
        known = state
    call = functools.partial(continued, model, text[:, -1:], n, state)
    times = [bench.clock(call, bench.device)[0] for _ in range(4)][1:]  # the first sets up
    return {"tokens_per_s": n / float(np.median(times)),
            "state_mb": sum(t.nbytes for t in tree_leaves(known)) / 1e6}

def compare_what(cfg):
    """For compare: {name: learning rate} of --models, and the data. Problem: a flag is wrong."""
    rates = learning_rates(cfg.models)
    if cfg.d_model % 2:
        raise Problem(f"--d_model must be even for the positions of a GPT, not {cfg.d_model}")
    return rates, open_data(cfg.dataset, cfg.data_dir, cfg.block_size)

def compare(bench, rates, data):
    """Trains the models in turns, then lets them write. Ctrl-C keeps what is done."""
    cfg, device = bench.cfg, bench.device
    batch = functools.partial(random_windows, bench, data.train)
    set_up(device)

    def start(name):
        torch.manual_seed(cfg.seed)
        model = MODELS[name](cfg, data.tokenizer.vocab_size)
        return Training(bench, name, model, rates[name], batch, cfg.max_iters)

    def try_out(name):
        run = start(name)
        run.do_step()
        run.do_step()       # with what the optimizer keeps
    budget = f"{cfg.max_iters:,} steps" if cfg.max_iters else f"{cfg.seconds:g} s of training"
    title = (f"{cfg.dataset}, {budget} each: B={cfg.batch_size} L={cfg.block_size}, dropout "
             f"{cfg.dropout}, seed {cfg.seed}, {bench.dtype}{', compiled' * cfg.compile}")
    runs, rows, speeds = {}, [], []
    bench.results["tables"] += [{"title": title, "rows": rows},
                                {"title": f"writing: {title}", "rows": speeds}]
    try:
        with Progress(len(rates)) as bar:
            for name in rates:
                for _ in range(2):      # the first time loads what stays
                    gc.collect()
                    *_, mb = bench.clock_and_memory(functools.partial(try_out, name), device)
                runs[name] = start(name)
                active, total = count_parameters(runs[name].model)
                rows.append({"model": name, "active": active, "parameters": total, "curve": [],
                             "learning_rate": rates[name], "memory_mb": mb})
            for part in range(1, EVALUATIONS + 1):
                for row, (name, run) in zip(rows, runs.items()):
                    before = run.step
                    run.train(part / EVALUATIONS, bar.tell)
                    if run.step == before:
                        continue    # the step before took more than its part
                    tokens = run.step * cfg.batch_size * cfg.block_size
                    row["curve"].append({"step": run.step, "tokens": tokens, "seconds": run.seconds,
                                         "loss": evaluate(bench, run.model, data.val)})
                    row.update(row["curve"][-1], tokens_per_s=tokens / run.seconds)
                    bench.write(bench)
                    say(f"{name}: {tokens:,} tokens in {run.seconds:.1f} s, validation loss "
                        f"{row['loss']:.4f}")
        for n in (n for n in (256, 4096, 65536) if n <= cfg.longest):
            text = torch.from_numpy(data.train.windows([0], n).astype(np.int64)).to(device)
            for name, run in runs.items():
                model = run.model.to(getattr(torch, bench.dtype)).eval()
                speeds.append({"model": name, "after": n, **writing(bench, model, text)})
    finally:
        done = [row for row in rows if row["curve"]]
        publish(bench, title, done, {
            "model": "{model}", "active": "{active:,}", "parameters": "{parameters:,}",
            "highest rate": "{learning_rate:g}", "steps": "{step:,}", "tokens": "{tokens:,}",
            "seconds": "{seconds:.1f}", "val loss": "{loss:.4f}", "tokens/s": "{tokens_per_s:,.0f}",
            "peak MB": "{memory_mb:,.0f}"})
        publish(bench, f"writing {cfg.new_tokens} tokens after a text, {bench.dtype}", speeds, {
            "model": "{model}", "after": "{after:,}", "tokens/s": "{tokens_per_s:,.1f}",
            "MB of that text": "{state_mb:,.2f}"})
        if done:
            panels = [(f"{x} of training", "validation loss, nats per token", {
                row["model"]: [(point[x], point["loss"]) for point in row["curve"]]
                for row in done}) for x in ("tokens", "seconds")]
            path = Path(cfg.plot or Path(cfg.out).with_suffix(".png"))
            bench.draw(path, title, panels)
        if speeds:
            panels = [("tokens of the text before", label, {
                name: [(row["after"], row[key]) for row in speeds if row["model"] == name]
                for name in runs}) for key, label in (("tokens_per_s", "tokens written a second"),
                                                      ("state_mb", "MB to remember the text"))]
            path = path.with_stem(f"{path.stem}-writing")
            bench.draw(path, f"writing after a text, {bench.results['machine']['name']}", panels,
                       log=True)

# ---- The paper's tasks ---------------------------------------------------------------------------

class Constant(nn.Module):
    """The same learned numbers for every token: (..., any) -> (..., size)."""

    def __init__(self, size):
        super().__init__()
        self.value = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return self.value.expand(*x.shape[:-1], -1)

class OpenGate(nn.Linear):
    """Makes u, and a z whose silu, by which the block multiplies, is 1."""

    def forward(self, x):
        u = super().forward(x)
        return torch.cat([u, torch.full_like(u, 1.2784645)], dim=-1)

class TimeInvariantBlock(MambaBlock):
    """Mamba's block with a state space model as there were before it: delta, B and C are
    parameters, and not made from the input."""

    def __init__(self, config, gate=True):
        super().__init__(config)
        self.x_proj = Constant(self.dt_rank + 2 * self.d_state)
        if not gate:
            self.in_proj = OpenGate(config.d_model, config.d_inner, bias=config.bias)

def build_small(kind, n_layer=2):
    """A Mamba with layers of 64 for 16 tokens, with blocks of this kind."""
    if kind in HEADS:
        return Mamba(MambaConfig(vocab_size=16, d_model=64, n_layer=n_layer, layer=kind, d_state=64,
                                 headdim=32))
    model = Mamba(MambaConfig(vocab_size=16, d_model=64, n_layer=n_layer))
    if kind != "mamba":
        for layer in model.backbone["layers"]:
            block = TimeInvariantBlock(model.config, gate=kind != "time-invariant, no gate")
            block.out_proj = layer.mixer.out_proj       # which is scaled for this depth
            layer.mixer = block
    return model

# Each task is a function of (rng, batch, length, train) that gives x, tokens, and y, the answers,
# (batch, L) each; y is -1 where nothing is asked. train: not as a test, but as an exercise.

def selective_copying(rng, batch, length, train, count=4):
    """`count` tokens of 1 to 14 at any places among 0s; then 15 as often: which were they?"""
    places = np.sort(rng.random((batch, length)).argsort(axis=1)[:, :count], axis=1)
    told, x = rng.integers(1, 15, size=(batch, count)), np.zeros((batch, length), int)
    np.put_along_axis(x, places, told, axis=1)
    return np.hstack([x, np.full_like(told, 15)]), np.hstack([np.full_like(x, -1), told])

def induction_heads(rng, batch, length, train):
    """Tokens of 0 to 14, and 15 somewhere and at the end: what came after it before? In half of the
    exercises, at random, 15 comes eight times before, always followed by the same token."""
    count = rng.choice((1, 8)) if train else 1
    places = 2 * rng.random((batch, (length - 1) // 2)).argsort(axis=1)[:, :count]
    x, answer = rng.integers(15, size=(batch, length)), rng.integers(15, size=(batch, 1))
    y = np.full_like(x, -1)
    for at, token in ((places, 15), (places + 1, answer)):
        np.put_along_axis(x, at, token, axis=1)
    np.put_along_axis(y, places, answer, axis=1)
    y[range(batch), places.min(axis=1)] = -1
    x[:, -1], y[:, -1] = 15, answer[:, 0]
    return x, y

def parity(rng, batch, length, train):
    """Bits: is the number of 1s odd? In an exercise this is asked at each of them, and some rows
    have few 1s, some many: else a count beyond half of the length would be new in a test."""
    share = rng.random((batch, 1)) if train else 0.5
    x = (rng.random((batch, length)) < share).astype(int)
    y = x.cumsum(axis=1) % 2
    if not train:
        y[:, :-1] = -1
    return x, y

@dataclass
class Task:
    make: Callable
    chance: float
    length: int         # of the exercises
    tests: tuple        # lengths, of which those above --longest are left out
    batch: int
    steps: int
    layers: int
    paper: dict         # {kind of block: what the paper reaches with it, in %}
    remark: str         # what is other than in the paper

TASKS = {
    "selective copying": Task(
        selective_copying, 1 / 14, 32, (32,), 32, 800, 2,
        {"mamba": 99.8, "time-invariant": 56.4, "time-invariant, no gate": 18.3},
        "4 tokens out of 32; in the paper (table 1) 16 out of 4,096, and 400,000 steps"),
    "induction heads": Task(
        induction_heads, 1 / 15, 256, (256, 4096, 65536, 2 ** 20), 8, 1000, 2,
        {"mamba": 100.0, "time-invariant": None},
        "8 questions in half of the exercises; in the paper (table 2) one, and 204,800 steps"),
    "parity": Task(parity, 1 / 2, 40, (40, 64), 32, 1000, 1, dict.fromkeys(("mamba", *HEADS)),
                   "of the number of 1s, by one layer; not in the paper, but Mamba-3's has such "
                   "tasks"),
}

JUDGED = 2 ** 19    # tokens of a test, in rows of its length: from 16 to 512 of them

def examples(bench, task, length, batch, train, step):
    """x and y, (batch, L) each: those of a step, the same for each kind of model."""
    both = task.make(np.random.default_rng((bench.cfg.seed, step)), batch, length, train)
    return [torch.from_numpy(t).to(bench.device) for t in both]

def accuracy(model, x, y):
    """How many of the answers it gives are right, in %."""
    right, read = 0, 0
    for logits, _ in model.eval().read(x, num_last_tokens=0):
        part = y[:, read:read + logits.shape[1]]
        right, read = right + (logits.argmax(-1) == part).sum().item(), read + logits.shape[1]
    return 100 * right / (y >= 0).sum().item()

def tasks(bench):
    """Trains and tests small models on all TASKS. Ctrl-C keeps what is done."""
    cfg, rows = bench.cfg, []
    title = f"tasks, layers of 64, seed {cfg.seed}, {bench.dtype}"
    bench.results["tables"].append({"title": title, "rows": rows})
    try:
        with Progress(sum(len(task.paper) for task in TASKS.values())) as bar:
            for (name, task), kind in ((of, kind) for of in TASKS.items() for kind in of[1].paper):
                torch.manual_seed(cfg.seed)
                batch = functools.partial(examples, bench, task, task.length, task.batch, True)
                run = Training(bench, f"{name}, {kind}", build_small(kind, task.layers), 5e-3,
                               batch, cfg.task_steps or task.steps)
                run.train(1, bar.tell)
                for n in (n for n in task.tests if n <= max(cfg.longest, task.length)):
                    x, y = examples(bench, task, n, max(16, min(512, JUDGED // n)), False, 10 ** 9)
                    rows.append({"task": name, "model": kind, "steps": run.step, "tested": n,
                                 "trained": task.length, "accuracy": accuracy(run.model, x, y),
                                 "chance": 100 * task.chance, "paper": task.paper[kind]})
                    bench.write(bench)
                    say(f"{run.name}, length {n:,}: {rows[-1]['accuracy']:.1f} % right")
    finally:
        publish(bench, title, rows, {
            "task": "{task}", "model": "{model}", "steps": "{steps:,}", "trained at": "{trained:,}",
            "tested at": "{tested:,}", "accuracy %": "{accuracy:.1f}", "chance %": "{chance:.1f}",
            "paper %": "{paper:.1f}"}, [f"{name}: {task.remark}" for name, task in TASKS.items()])
