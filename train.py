"""
Trains a Mamba language model on the text of prepare_data.py.

python train.py                                     # built-in text, no network; minutes on a laptop
python train.py --dataset=shakespeare --device=mps
python train.py --dataset=novel.txt --d_model=256 --n_layer=6
python train.py --dataset=novel-gpt-neox --init_from=state-spaces/mamba-130m    # released weights
torchrun --nproc_per_node=2 train.py --dataset=shakespeare

Ctrl-C finishes the step and saves; the same command again goes on exactly where it stopped. In
out/<dataset>: ckpt.pt (the latest state), best.pt (lowest validation loss, what sample.py uses),
log.csv.
"""
from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    # Until main begins, Ctrl-C ends the process without a traceback: importing torch takes long.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # torch reads both once. Large pages, on Linux, make fresh memory cost a CPU less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # For common.repeatable: cuBLAS repeats itself only with a workspace of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import common
from common import Problem, dataset_name, flag, say, write_whole
from mamba import Mamba, MambaConfig
from mamba_files import ON_HUB
from prepare_data import open_data

try:
    import mamba_fast as fast
except ImportError:     # everything works without it, slower
    fast = None

PRESETS = {     # what trains in minutes on such a device
    "cpu": {"d_model": 160, "n_layer": 3, "d_state": 8, "dropout": 0.15, "batch_size": 12,
            "block_size": 128, "max_iters": 2000, "learning_rate": 4e-3},
    "mps": {"d_model": 256, "n_layer": 6, "d_state": 16, "dropout": 0.1, "batch_size": 32,
            "block_size": 256, "max_iters": 2000, "learning_rate": 2e-3},
    "cuda": {"d_model": 320, "n_layer": 12, "d_state": 16, "dropout": 0.35, "batch_size": 64,
             "block_size": 256, "max_iters": 800, "learning_rate": 3e-3},
}
FINE_TUNING = {"dropout": 0.0, "learning_rate": 1e-4}   # for weights that are already good
# what the shapes of the weights depend on
SHAPE = ("d_model", "n_layer", "d_state", "d_conv", "expand", "d_intermediate")
# what a run cannot change, each with a function that makes its values comparable
FIXED = {**dict.fromkeys(SHAPE, str), "dataset": dataset_name, "init_from": os.path.abspath}
# what belongs to the command or the machine, not to the run: never taken from a checkpoint
ONE_OFF = ("eval_only", "cache_dir", "device", "dtype", "compile", "scan", "checkpointing")
# where in the text a step is with --carry_state: if one of these changes, the state begins anew
PLACE = ("carry_state", "bptt", "batch_size", "block_size", "gradient_accumulation_steps")
START_OVER = "start over with --init_from=scratch, or use another --out_dir"

@dataclass
class Config:
    # what to learn from, and where to keep what was learned
    dataset: str = flag("pydoc", "what prepare_data.py takes, or the name of a folder in data_dir")
    data_dir: str = flag("data", "folder of the prepared data")
    out_dir: str = flag("", "folder of the checkpoints; out/<dataset> by default")
    init_from: str = flag("resume", "resume: go on if out_dir has a checkpoint; scratch: start "
                          "over and replace it; a folder or name of released weights, such as "
                          "state-spaces/mamba-130m: begin with those")
    eval_only: bool = flag(False, "train nothing; print the loss that training prints, and that of "
                           "the whole validation text, read once with the state carried on")
    # the model; None, here and below: by device
    presets = PRESETS   # for --help
    d_model: int | None = flag(None, "width of the model", 1)
    n_layer: int | None = flag(None, "layers", 1)
    d_state: int | None = flag(None, "numbers that each channel remembers", 1)
    d_conv: int = flag(4, "width of the convolution", 1)
    expand: int = flag(2, "channels of the scan, in units of d_model", 1)
    d_intermediate: int = flag(0, "width of a gated MLP after each mixer; 0 is none", 0)
    dropout: float | None = flag(None, "for data so small that the model sees it many times", 0, 1)
    # the schedule
    batch_size: int | None = flag(None, "sequences in a batch, over all processes", 1)
    block_size: int | None = flag(None, "tokens in a sequence", 1)
    gradient_accumulation_steps: int = flag(1, "batches whose gradients make one step", 1)
    max_iters: int | None = flag(None, "steps in all", 1)
    learning_rate: float | None = flag(None, "its highest value", 0)
    min_lr: float | None = flag(None, "its last value; learning_rate / 10 by default", 0)
    warmup_iters: int = flag(100, "steps until the learning rate has risen", 0)
    lr_decay_iters: int | None = flag(None, "steps until it has fallen; max_iters by default")
    weight_decay: float = flag(0.1, "on matrices only", 0)
    beta1: float = flag(0.9, "of AdamW", 0, 1)
    beta2: float = flag(0.99, "of AdamW", 0, 1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip", 0)
    seed: int = flag(1337, "of the weights, the batches, the dropout and the samples", 0, 2 ** 31)
    # what a sequence begins with
    reset_at_eot: bool | None = flag(None, "forget the text before at each end-of-text token; by "
                                     "default if the tokenizer has one")
    carry_state: bool = flag(False, "each row of a batch reads on in the text where it was, and "
                             "keeps its state; else sequences are drawn anywhere, with none")
    bptt: int = flag(1, "with carry_state: a sequence is this many blocks long, and gradients go "
                     "over all of it", 1)
    # what is told and kept on the way
    eval_interval: int = flag(250, "steps between evaluations; each saves a checkpoint", 1)
    eval_iters: int = flag(50, "batches in an evaluation, at most the whole validation data", 1)
    log_interval: int = flag(10, "steps between rows of log.csv", 1)
    sample_tokens: int = flag(200, "tokens of the sample shown at an evaluation", 0)
    # the machine
    cache_dir: str = flag("", "folder for downloaded weights; Hugging Face's cache by default")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float16 (mixed precision); by default bfloat16 "
                      "on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile, up to a minute; by default on CUDA from 5000 "
                                "steps on, on a CPU from 1000")
    scan: str = flag("auto", "auto, triton (fused kernels, on CUDA), chunked or sequential")
    checkpointing: bool = flag(False, "keep what enters each layer and compute the rest again for "
                               "the gradients: with 12 layers 0.4 of the memory, 1.4 times the "
                               "time")

# ---- Settings: the flags, over what the checkpoint says, over the defaults -----------------------

def folder_of(cfg):
    """The folder of the run, which need not be there yet. Problem: it cannot be written into."""
    out_dir = Path(cfg.out_dir or Path("out", dataset_name(cfg.dataset)))
    there = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise Problem(f"cannot write into {there}; choose another --out_dir")
    return out_dir

def go_on_as(given, checkpoint, out_dir):
    """The Config of a run that goes on: as in its checkpoint, but for the flags that were given, of
    which those that change something are named. Problem: one of them would make it another run."""
    if "optimizer" not in checkpoint:
        raise Problem(f"{out_dir / 'ckpt.pt'} holds a model but no optimizer, so training cannot "
                      "go on from it")
    before = {k: v for k, v in checkpoint["config"].items() if k not in ONE_OFF}
    before.setdefault("reset_at_eot", False)    # of a run from before there was this flag
    changed = [k for k in given if k in before and given[k] != before[k]]
    if wrong := [k for k in changed if k in FIXED and FIXED[k](given[k]) != FIXED[k](before[k])]:
        holds, asked = (" ".join(f"--{k}={flags[k]}" for k in wrong) for flags in (before, given))
        raise Problem(f"{out_dir} holds a run with {holds}, not {asked}; {START_OVER}")
    for k in changed:
        say(f"{k}: {before[k]} -> {given[k]}")
    return Config(**{**before, **given})

def fill_in(cfg, device, pretrained):
    """Replaces each None whose default depends on the device."""
    for k, v in {**PRESETS[device.type], **(FINE_TUNING if pretrained else {})}.items():
        if getattr(cfg, k) is None:
            setattr(cfg, k, v)
    if cfg.compile is None:     # it takes up to a minute, which only many steps bring back
        compiles = fast and fast.compiles_well(device, cfg.d_state) and cfg.scan != "sequential"
        pays_from = 5000 if device.type == "cuda" else 1000 if compiles else math.inf
        cfg.compile = cfg.max_iters >= pays_from and not cfg.eval_only

def load_pretrained(cfg, given, device):
    """The model of --init_from, whose shape cfg takes over. Problem: there is none."""
    if not (Path(cfg.init_from).is_dir() or ON_HUB.fullmatch(cfg.init_from)):
        raise Problem("--init_from takes resume, scratch, a folder, or a name such as "
                      f"state-spaces/mamba-130m, not '{cfg.init_from}'")
    if shape := [k for k in SHAPE if k in given]:
        raise Problem(f"--{shape[0]} cannot be chosen: the weights of {cfg.init_from} have a shape "
                      "of their own")
    try:
        model = Mamba.from_pretrained(cfg.init_from, device, torch.float32, cfg.cache_dir or None,
                                      dropout=cfg.dropout, scan=cfg.scan)
    except ValueError as error:
        raise Problem(f"--init_from={cfg.init_from}: {error}") from None
    for k in SHAPE:
        setattr(cfg, k, getattr(model.config, k))
    return model.train()

def fit_vocabulary(config, meta, name):
    """Makes the config of the weights of this name that of a model for the data that meta
    describes. Problem: the data has tokens that they do not know."""
    needed, known = meta["vocab_size"], config.vocab_size
    tokenizer = f"{meta['tokenizer']['type']} tokenizer of {needed:,}"
    if needed > known:
        raise Problem(f"{name} has a vocabulary of {known:,}, too small for {meta['name']} with "
                      f"its {tokenizer}; released weights want data prepared with "
                      "--tokenizer=gpt-neox")
    say(f"weights of {name}, whose vocabulary is {known:,}; the data has a {tokenizer}")
    if needed < known:
        # The weights of the other tokens stay, but what the data does not know is never predicted.
        config.pad_vocab_size_multiple, config.vocab_size = config.padded_vocab_size, needed

def end_of_text(cfg, data):
    """The token at which --reset_at_eot resets, or None where there is nothing to reset.
    Problem: it is asked for, and the tokenizer has no such token."""
    token = data.tokenizer.end_of_text
    if cfg.reset_at_eot and token is None:
        raise Problem("--reset_at_eot needs a token that ends a text, which the tokenizer of "
                      f"{data.folder} has not")
    if cfg.reset_at_eot is None:
        cfg.reset_at_eot = token is not None
    # A step takes longer with it: not for a text that does not have the token.
    found = (np.any(part == token) for tokens in (data.train, data.val)
              for part in np.array_split(tokens, math.ceil(len(tokens) / 2 ** 24)))
    return token if cfg.reset_at_eot and any(found) else None

# ---- The pieces of the loop ----------------------------------------------------------------------

def get_batch(data, cfg, step, micro, rank, world, device):
    """x (B, L) and y, the same one token later: windows at random places; with carry_state those
    that follow the last ones, each row beginning in a stretch of the text of its own. A pure
    function of seed and step: a resumed run draws what it would have drawn, and several processes
    draw together what one would draw. micro: the number of the batch within the step."""
    length = cfg.block_size * cfg.bptt
    if cfg.carry_state:
        batches = step * cfg.gradient_accumulation_steps + micro    # that were before this one
        starts = np.arange(cfg.batch_size) * len(data) // cfg.batch_size + batches * length
    else:
        rng = np.random.default_rng((cfg.seed, step, micro))
        starts = rng.integers(len(data) - length, size=cfg.batch_size)
    return windows(data, starts[rank::world], length, device)

def windows(data, starts, length, device):
    """x and y, each (len(starts), length): the tokens from each start on, and one later. After the
    end of the data comes its beginning."""
    places = np.asarray(starts)[:, None] + np.arange(length + 1)
    tokens = torch.from_numpy(np.take(data, places, mode="wrap").astype(np.int64))
    if device.type == "cuda":   # from pinned memory the copy does not wait for the work in flight
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

def loss_of(forward, x, y, dtype, eot, state=None):
    """(mean loss of predicting y from x, the state after x, or None without a state). forward: the
    model, compiled or not.  eot: the token after which a text begins with an empty state, or None.
    """
    documents = None
    if eot is not None:
        ends = (x == eot).long()
        documents = ends.cumsum(1) - ends       # (B, L): how many have ended before this token
    with common.autocast(x.device, dtype):
        _, loss, *after = forward(x, y, state=state, seq_idx=documents)
    after = after[0] if after else None
    if after and eot is not None:       # nothing is left of a text that ends with x
        goes_on = (x[:, -1] != eot)[:, None, None]
        after = [tuple(t * goes_on for t in layer) for layer in after]
    return loss, after

def gradients_by(forward, optimizer, scaler, cfg, dtype, eot, carried):
    """Two functions (x, y) -> loss that leave gradients in the parameters: those of the first batch
    of a step, and those of a further batch on top. carried: the state that x continues, or None;
    the state after x takes its place in it, where a CUDA graph reads it."""
    def more_gradients(x, y):
        loss, after = loss_of(forward, x, y, dtype, eot, carried)
        loss = loss / cfg.gradient_accumulation_steps
        scaler.scale(loss).backward()
        if carried is not None:
            put(carried, after)
        return loss.detach()

    def first_gradients(x, y):
        optimizer.zero_grad(set_to_none=True)
        return more_gradients(x, y)
    return first_gradients, more_gradients

@torch.no_grad()
def put(state, other):
    """Copies the numbers of another state into this one."""
    for layer, other_layer in zip(state, other):
        for t, new in zip(layer, other_layer):
            t.copy_(new)

def gather(state, world):
    """A state of the rows of all processes, which each have every world-th one, to be saved."""
    def of_all(t):
        parts = [torch.empty_like(t) for _ in range(world)]
        dist.all_gather(parts, t)
        return torch.stack(parts, dim=1).flatten(0, 1)
    return [tuple(map(of_all, layer)) if world > 1 else tuple(layer) for layer in state]

def average(grads, world):
    """The mean over the processes, in place, by one call after the last batch of a step.
    DistributedDataParallel would begin during the backward pass, which then could not be a CUDA
    graph: that costs more than the wait."""
    flat = torch.cat([grad.flatten() for grad in grads]).div_(world)
    dist.all_reduce(flat)
    means = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads)])

@torch.no_grad()
def evaluate(model, data, cfg, dtype, eot, stop):
    """Mean loss over windows spread evenly over the data, always the same; None if told to stop."""
    count = (len(data) - 1) // cfg.block_size
    batch = min(cfg.batch_size, count)
    count = min(cfg.eval_iters, count // batch) * batch
    starts = np.linspace(0, len(data) - 1 - cfg.block_size, count).astype(int)
    model.eval()
    losses = []
    for part in starts.reshape(-1, batch):
        if stop:
            break
        x, y = windows(data, part, cfg.block_size, model.device)
        losses.append(loss_of(model, x, y, dtype, eot)[0])
    model.train()
    return None if stop else torch.stack(losses).mean().item()

@torch.no_grad()
def evaluate_all(model, data, dtype, eot, part=2048):
    """Mean loss over all of the data, read once from its beginning, part by part with the state
    carried on: memory does not grow with its length."""
    model.eval()
    total, state = 0.0, model.init_state(1)
    for start in range(0, len(data) - 1, part):
        length = min(part, len(data) - 1 - start)
        x, y = windows(data, [start], length, model.device)
        loss, state = loss_of(model, x, y, dtype, eot, state)
        total += loss.item() * length
    return total / (len(data) - 1)

def in_words(loss, meta):
    """A validation loss. Bits for a piece of text compare between tokenizers."""
    bits = loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
    return f"{loss:.4f} nats per token, {bits:.3f} bits per byte"

def a_sample(model, tokenizer, prompt, cfg, dtype):
    generator = torch.Generator().manual_seed(cfg.seed)
    with common.autocast(model.device, dtype):
        ids = model.generate([prompt], cfg.sample_tokens, temperature=0.8, generator=generator)
    return f"---\n{tokenizer.decode(ids[0].tolist())}\n---"

def learning_rate(step, cfg):
    """Linear warm-up, then half a cosine down to min_lr."""
    low = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    end = cfg.lr_decay_iters or cfg.max_iters
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    progress = min(1, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    return low + (cfg.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))

def check_finite(step, saved_step, **values):
    """Problem if one of the values is not a finite number: the run is lost from here on."""
    if not all(map(math.isfinite, values.values())):
        seen = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        kept = "" if saved_step is None else f"the checkpoint of step {saved_step} is kept. "
        raise Problem(f"training diverged at step {step}: {seen}; {kept}"
                      "Try a lower --learning_rate")

def save(out_dir, checkpoint, best):
    """Writes ckpt.pt, the one before becoming ckpt.prev.pt, and if these weights are the best so
    far, what sample.py needs of them as best.pt. At step 0 nothing stays of a run before."""
    begins, previous = checkpoint["step"] == 0, out_dir / "ckpt.prev.pt"
    if best:
        needed = ("model", "model_config", "meta", "step", "best_loss")
        without_optimizer = {k: checkpoint[k] for k in needed}
        write_whole(out_dir / "best.pt", lambda file: torch.save(without_optimizer, file))
    write_whole(out_dir / "ckpt.pt", lambda file: torch.save(checkpoint, file),
                previous=None if begins else previous)
    if begins:
        previous.unlink(missing_ok=True)
        if not best:
            (out_dir / "best.pt").unlink(missing_ok=True)

COLUMNS = ("step", "tokens", "train_loss", "val_loss", "learning_rate", "tokens_per_s")

def open_log(path, step, evaluated_step):
    """A function that adds a row to log.csv. Of the rows there, those that the checkpoint of this
    step, last evaluated at that one, does not know go: they are done again."""
    def is_known(row):
        values = row.split(",")
        if len(values) != len(COLUMNS) or not values[0].isdigit():
            return False    # cut off, when the run was killed
        return int(values[0]) <= (evaluated_step if values[3] else step)
    rows = path.read_text(errors="replace").splitlines()[1:] if path.exists() else []
    text = "\n".join([",".join(COLUMNS), *filter(is_known, rows), ""])
    write_whole(path, lambda file: file.write(text.encode()))

    def add(*values):
        with open(path, "a", newline="\n") as file:
            print(*("" if value is None else value for value in values), sep=",", file=file)
    return add

class Stop:
    """Within `with Stop() as stop`, stop is true once Ctrl-C or SIGTERM came, or nobody reads what
    is printed. The second Ctrl-C stops at once, by a KeyboardInterrupt."""

    def __enter__(self):
        self.signal = 0
        in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self.handlers_before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(RuntimeError):  # Python cannot print in the middle of a print
            say("stopping after this step; once more to stop at once")

    def __bool__(self):
        if say.unread and not self.signal:
            self.signal = 13    # SIGPIPE, which Windows does not have
        return self.signal != 0

    def agreed(self, world, device):
        """True on all processes at the same step once one of them was told to stop."""
        if world > 1:
            told = torch.tensor(self.signal if self else 0, device=device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.signal = int(told)
        return bool(self)

@contextlib.contextmanager
def first_process_first(rank, world):
    """What one process prepares and downloads within it, the others then find."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()

def main(cfg, given):
    """Trains as cfg, a Config, says. given: {name: value} of the flags that the person gave: these
    a run that goes on takes over, and all else is as in its checkpoint."""
    # Who am I? Under torchrun one of several processes (world), each with a number (rank) and on a
    # GPU of its own.
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    master = rank == 0      # it prints and saves
    if world > 1 and cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise Problem(f"{here} processes need as many GPUs; torch {torch.__version__} finds "
                          f"{gpus}")
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = common.pick_device(cfg.device)
    dtype = common.pick_dtype(cfg.dtype, device)
    if device.type == "cuda":
        common.repeatable()

    # The settings, and the checkpoint that the run goes on from, if there is one
    out_dir = folder_of(cfg)
    newest, previous = out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt"
    begun = newest.exists() or previous.exists()
    pretrained = cfg.init_from not in ("resume", "scratch")
    locked = common.lock(out_dir) if begun and master and not cfg.eval_only else None
    checkpoint = None
    if begun and cfg.init_from != "scratch":
        checkpoint = common.load_checkpoint(newest, previous)
        if not pretrained:
            given.pop("init_from", None)    # "resume" is no wish to change how the run began
        cfg = go_on_as(given, checkpoint, out_dir)
    fill_in(cfg, device, pretrained)
    scan = common.pick_scan(cfg.scan, device, dtype, cfg.d_state)
    if cfg.eval_only and not (checkpoint or pretrained):
        raise Problem(f"--eval_only needs a checkpoint, and {out_dir} has none; train first, or "
                      "give its --out_dir")
    if cfg.bptt > 1 and not cfg.carry_state:
        raise Problem("--bptt goes with --carry_state; without it take a longer --block_size")
    if cfg.batch_size % world:
        raise Problem(f"--batch_size={cfg.batch_size} cannot be shared evenly by {world} processes")

    # The data
    if world > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    with first_process_first(rank, world):
        if pretrained and not checkpoint:
            model = load_pretrained(cfg, given, device)
        data = open_data(cfg.dataset, cfg.data_dir, cfg.block_size, may_prepare=master)
    meta, eot = data.meta, end_of_text(cfg, data)
    for key, what in (("tokenizer", "has another vocabulary"), ("sha256", "learns another text")):
        if checkpoint and checkpoint["meta"][key] != meta[key]:
            raise Problem(f"the checkpoint in {out_dir} {what} than {data.folder}; {START_OVER}")

    # The model
    if checkpoint:
        model = common.load_model(checkpoint, dropout=cfg.dropout, scan=cfg.scan).to(device)
    elif pretrained:
        fit_vocabulary(model.config, meta, cfg.init_from)
    else:
        torch.manual_seed(cfg.seed)
        both = {f.name: getattr(cfg, f.name) for f in fields(MambaConfig) if hasattr(cfg, f.name)}
        model = Mamba(MambaConfig(vocab_size=meta["vocab_size"], **both)).to(device)
    say(f"{device.type}, {dtype}, scan {scan}{', compiled' if cfg.compile else ''}; "
        f"{model.num_params() / 1e6:.2f}M parameters ({cfg.n_layer} layers of {cfg.d_model})")
    say(f"{data.folder}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to "
        f"validate, vocabulary of {meta['vocab_size']:,}")

    # The optimizer, and where the run stands: step is how many steps are done
    optimizer = model.configure_optimizers(cfg.learning_rate, cfg.weight_decay,
                                           (cfg.beta1, cfg.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    step, best_loss, evaluated_step, train_loss = 0, math.inf, -1, None
    if checkpoint:
        step, best_loss = checkpoint["step"], checkpoint["best_loss"]
        evaluated_step, train_loss = checkpoint["evaluated"], checkpoint["train_loss"]
        moments = checkpoint["optimizer"]["state"]      # its learning rate, ... come from the flags
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        if scaler.is_enabled() and checkpoint["scaler"]:    # empty after steps in another dtype
            scaler.load_state_dict(checkpoint["scaler"])
    if cfg.eval_only:
        val_loss = evaluate(model, data.val, cfg, dtype, eot, stop=False)
        say(f"step {step}: val loss {in_words(val_loss, meta)}")
        all_loss = evaluate_all(model, data.val, dtype, eot)
        say(f"the whole validation text, read once: {in_words(all_loss, meta)}")
        return
    if evaluated_step >= cfg.max_iters:
        say(f"{out_dir} is finished: {step} steps, best val loss {best_loss:.4f}. "
            f"Look with: python sample.py --out_dir={out_dir}\n"
            f"Go on with --max_iters={2 * step}, or start over with --init_from=scratch")
        return
    say(f"going on from step {step} of {cfg.max_iters}" if checkpoint else
        f"{cfg.max_iters} steps, into {out_dir}")

    # How gradients are computed: as the model stands there, compiled, or replayed as CUDA graphs
    if cfg.checkpointing:
        for layer in model.backbone["layers"]:
            layer.forward = functools.partial(recomputed, layer.forward, use_reentrant=False)
    carried = model.init_state(cfg.batch_size // world) if cfg.carry_state else None
    of_this_run = (optimizer, scaler, cfg, dtype, eot, carried)
    batch = get_batch(data.train, cfg, 0, 0, rank, world, device)   # to try it with
    calls = gradients_by(model, *of_this_run)
    if cfg.compile:
        compiled = gradients_by(torch.compile(model), *of_this_run)
        if common.works_here("torch.compile", lambda: compiled[0](*batch)):
            calls = compiled
    # A graph can hold neither the scaler of float16, which the first loss makes, nor checkpointing,
    # which sets the random state.
    if scan == "triton" and dtype != "float16" and not cfg.checkpointing:
        needed, graphs = calls[:cfg.gradient_accumulation_steps], []
        if common.works_here("a CUDA graph", lambda: graphs.extend(fast.replayed(needed, *batch))):
            calls = graphs
    first_gradients, more_gradients = calls[0], calls[-1]
    if carried:     # undo what the trials left in it
        before = model.init_state(cfg.batch_size)
        if checkpoint and all(checkpoint["config"].get(k) == getattr(cfg, k) for k in PLACE):
            before = checkpoint["carried"]
        put(carried, [[t[rank::world] for t in layer] for layer in before])

    def everything():
        """All that a run needs to go on from here."""
        return {"model": model.state_dict(), "model_config": asdict(model.config), "meta": meta,
                "step": step, "best_loss": best_loss, "evaluated": evaluated_step,
                "train_loss": train_loss, "config": asdict(cfg),
                "carried": carried and gather(carried, world),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}

    def evaluation_is_due():
        return step % cfg.eval_interval == 0 or step >= cfg.max_iters

    # The loop
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        locked = locked or common.lock(out_dir)     # until this process ends
        if checkpoint and checkpoint["path"] == previous:
            os.replace(previous, newest)    # which is damaged: it must not become the previous one
        log = open_log(out_dir / "log.csv", step, evaluated_step)
    tokens_per_step = batch[0].numel() * world * cfg.gradient_accumulation_steps
    saved_step = step if checkpoint else None
    speed, clock, clock_step = 0, time.perf_counter(), step
    bar = tqdm(total=cfg.max_iters, initial=step, unit="step", dynamic_ncols=True,
               disable=None if master else True)
    with Stop() as stop, bar:
        while True:
            if step != evaluated_step and evaluation_is_due():
                val_loss = evaluate(model, data.val, cfg, dtype, eot, stop)
                if stop.agreed(world, device):
                    break
                check_finite(step, saved_step, val_loss=val_loss)
                best = val_loss < best_loss
                evaluated_step, best_loss = step, min(val_loss, best_loss)
                checkpoint = everything()
                if master:
                    log(step, step * tokens_per_step, train_loss, val_loss,
                        learning_rate(max(step - 1, 0), cfg), speed)
                    save(out_dir, checkpoint, best)
                    say(f"step {step}: val loss {in_words(val_loss, meta)}{', best' * best}")
                    say(a_sample(model, data.tokenizer, data.val[:1].tolist(), cfg, dtype))
                saved_step = step
                clock, clock_step = time.perf_counter(), step
            if step >= cfg.max_iters:
                break

            # Dropout too is a function of seed, step and rank: no random state has to be kept.
            torch.manual_seed((cfg.seed << 32) + step * world + rank)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            total = torch.zeros((), device=device)
            for micro in range(cfg.gradient_accumulation_steps):
                x, y = get_batch(data.train, cfg, step, micro, rank, world, device)
                total += more_gradients(x, y) if micro else first_gradients(x, y)
            if world > 1:
                average([p.grad for p in model.parameters() if p.grad is not None], world)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            bar.update()

            stopping, log_now = stop.agreed(world, device), step % cfg.log_interval == 0
            if stopping or log_now or evaluation_is_due():
                if world > 1:
                    dist.all_reduce(total)
                train_loss = total.item() / world   # waits for the device
                # a scaler skips a step whose gradients are not finite
                check_finite(step, saved_step, loss=train_loss,
                             gradient_norm=0 if scaler.is_enabled() else norm.item())
            if log_now and master:
                speed = round((step - clock_step) * tokens_per_step / (time.perf_counter() - clock))
                clock, clock_step = time.perf_counter(), step
                log(step, step * tokens_per_step, train_loss, "", learning_rate(step - 1, cfg),
                    speed)
                bar.set_postfix(loss=f"{train_loss:.3f}", tok_s=f"{speed:,}")
            if stopping:
                break

        # Stopped between two evaluations. best.pt stays: nobody has evaluated these weights.
        if step != saved_step:
            checkpoint = everything()
            if master:
                save(out_dir, checkpoint, best=False)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()

    # Goodbye
    if stop and evaluated_step < cfg.max_iters:
        again = " (without --init_from=scratch)" if given.get("init_from") == "scratch" else ""
        say(f"stopped after step {step} of {cfg.max_iters}, saved in {out_dir}; the same command "
            f"goes on from there{again}")
        sys.exit(128 + stop.signal)
    say(f"done: best val loss {best_loss:.4f}, in {out_dir}. Look with: python sample.py "
        f"--out_dir={out_dir}")

if __name__ == "__main__":
    common.run(main, Config)
