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
import csv
import io
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C ends the long import of torch without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # torch reads these two once. Large pages, on Linux: fresh memory costs a CPU less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Without such a workspace PyTorch does not trust cuBLAS to repeat itself; see repeatable.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import (
    Problem,
    autocast,
    dataset_name,
    flag,
    load_checkpoint,
    load_model,
    lock,
    pick_device,
    pick_dtype,
    pick_scan,
    repeatable,
    run,
    say,
    works_here,
    write_whole,
)
from mamba import Mamba, MambaConfig
from mamba_files import ON_HUB, hub_file, read_options
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
# what belongs to the machine, not to the run: never taken from a checkpoint
MACHINE = ("cache_dir", "device", "dtype", "compile", "scan")
START_OVER = "start over with --init_from=scratch, or use another --out_dir"


@dataclass
class Config:
    # what to learn from, and where to keep what was learned
    dataset: str = flag("pydoc", "what prepare_data.py takes as --dataset, or the name of a folder "
                        "in data_dir")
    data_dir: str = flag("data", "folder of the prepared data")
    out_dir: str = flag("", "folder of the checkpoints; out/<dataset> by default")
    init_from: str = flag("resume", "resume: go on if out_dir has a checkpoint; scratch: start "
                          "over and replace it; a folder or name of released weights, such as "
                          "state-spaces/mamba-130m: begin with those")
    eval_only: bool = flag(False, "print the validation loss of the checkpoint, train nothing")
    # the model; None, here and below: by device
    presets = PRESETS   # for --help
    d_model: int | None = flag(None, "width of the model")
    n_layer: int | None = flag(None, "layers")
    d_state: int | None = flag(None, "numbers that each channel remembers")
    d_conv: int = flag(4, "width of the convolution")
    expand: int = flag(2, "channels of the scan, in units of d_model")
    d_intermediate: int = flag(0, "width of a gated MLP after each mixer; 0 is none")
    dropout: float | None = flag(None, "for data so small that the model sees it many times")
    # the schedule
    batch_size: int | None = flag(None, "sequences in a batch, over all processes")
    block_size: int | None = flag(None, "tokens in a sequence")
    gradient_accumulation_steps: int = flag(1, "batches whose gradients make one step")
    max_iters: int | None = flag(None, "steps in all")
    learning_rate: float | None = flag(None, "its highest value")
    min_lr: float | None = flag(None, "its last value; learning_rate / 10 by default")
    warmup_iters: int = flag(100, "steps until the learning rate has risen")
    lr_decay_iters: int | None = flag(None, "steps until it has fallen; max_iters by default")
    weight_decay: float = flag(0.1, "on matrices only")
    beta1: float = flag(0.9, "of AdamW")
    beta2: float = flag(0.99, "of AdamW")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip")
    seed: int = flag(1337, "of the weights, the batches, the dropout and the samples")
    # what is told and kept on the way
    eval_interval: int = flag(250, "steps between evaluations; each saves a checkpoint")
    eval_iters: int = flag(50, "batches in an evaluation, at most the whole validation data")
    log_interval: int = flag(10, "steps between rows of log.csv")
    sample_tokens: int = flag(200, "tokens of the sample shown at an evaluation")
    # the machine
    cache_dir: str = flag("", "folder for downloaded weights; Hugging Face's cache by default")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float16 (mixed precision); by default bfloat16 "
                      "on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile, up to a minute; by default on CUDA from 5000 "
                                "steps on, on a CPU from 1000")
    scan: str = flag("auto", "method of the selective scan: auto, triton (fused kernels, on CUDA), "
                     "chunked or sequential")


# Settings: the flags, over what the checkpoint says, over the defaults


def folder_of(cfg):
    """The folder of the run, which need not be there yet. Problem: it cannot be written into."""
    out_dir = Path(cfg.out_dir or Path("out", dataset_name(cfg.dataset)))
    there = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise Problem(f"cannot write into {there}; choose another --out_dir")
    return out_dir


def go_on_as(cfg, given, checkpoint, out_dir):
    """
    The Config of a run that goes on: as in its checkpoint, but for the flags that were given, of
    which those that change something are named. Problem: a flag that would make it another run.
    """
    if "optimizer" not in checkpoint:
        raise Problem(f"{out_dir / 'ckpt.pt'} holds a model but no optimizer, so training cannot "
                      "go on from it")
    before = {k: v for k, v in checkpoint["config"].items() if k not in MACHINE}
    now = {k: v for k, v in given.items() if (k, v) != ("init_from", "resume")}
    changed = [k for k in now if k in before and before[k] != now[k]]
    if "init_from" in changed:
        begun_with, asked_for = (os.path.abspath(flags["init_from"]) for flags in (before, now))
        if begun_with != asked_for:
            raise Problem(f"{out_dir} holds a run that did not begin with {cfg.init_from}; use "
                          "another --out_dir")
    if shape := [k for k in changed if k in SHAPE]:
        is_there = ", ".join(f"{k} {before[k]}" for k in shape)
        asked_for = ", ".join(str(now[k]) for k in shape)
        raise Problem(f"{out_dir} holds a model with {is_there}, not {asked_for}; {START_OVER}")
    if "dataset" in changed and dataset_name(cfg.dataset) != dataset_name(before["dataset"]):
        raise Problem(f"{out_dir} was trained on {before['dataset']}, not {cfg.dataset}; "
                      f"{START_OVER}")
    for k in changed:
        say(f"{k}: {before[k]} -> {now[k]}")
    return Config(**{**before, **now})


def check_weights(cfg, given, master):
    """Problem if cfg cannot begin with the weights of --init_from, as far as that costs little."""
    if not (Path(cfg.init_from).is_dir() or ON_HUB.fullmatch(cfg.init_from)):
        raise Problem("--init_from takes resume, scratch, a folder, or a name such as "
                      f"state-spaces/mamba-130m, not '{cfg.init_from}'")
    if shape := [k for k in SHAPE if k in given]:
        raise Problem(f"--{shape[0]} cannot be chosen: the weights of {cfg.init_from} have a shape "
                      "of their own")
    if master:
        try:
            read_options(hub_file(cfg.init_from, "config.json", cfg.cache_dir or None))
        except ValueError as error:
            raise Problem(f"--init_from={cfg.init_from}: {error}") from None


def fill_in(cfg, device, pretrained):
    """Replaces each None whose default depends on the device."""
    for k, v in {**PRESETS[device.type], **(FINE_TUNING if pretrained else {})}.items():
        if getattr(cfg, k) is None:
            setattr(cfg, k, v)
    if cfg.compile is None:     # it takes up to a minute, which only many steps bring back
        pays_from = math.inf
        if device.type == "cuda":
            pays_from = 5000
        elif fast and fast.compiles_well(device, cfg.d_state) and cfg.scan != "sequential":
            pays_from = 1000
        cfg.compile = cfg.max_iters >= pays_from and not cfg.eval_only


def check(cfg):
    """Problem for values without a meaning."""
    for k in ("batch_size", "block_size", "gradient_accumulation_steps", "max_iters",
              "eval_interval", "eval_iters", "log_interval"):
        if getattr(cfg, k) < 1:
            raise Problem(f"--{k} must be at least 1, not {getattr(cfg, k)}")
    for k in ("learning_rate", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "seed",
              "sample_tokens"):
        if (getattr(cfg, k) or 0) < 0:
            raise Problem(f"--{k} must not be negative: {getattr(cfg, k)}")
    if cfg.seed >= 2 ** 31:
        raise Problem(f"--seed must be below {2 ** 31}, not {cfg.seed}")
    for k in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, k) < 1:
            raise Problem(f"--{k} must be at least 0 and below 1, not {getattr(cfg, k)}")
    model_config(cfg)


def model_config(cfg, **more):
    """The MambaConfig that the fields of the same names say. Problem: a bad value."""
    known = {f.name: getattr(cfg, f.name) for f in fields(MambaConfig) if hasattr(cfg, f.name)}
    try:
        return MambaConfig(**known, **more)
    except ValueError as error:
        raise Problem(str(error)) from None


def load_pretrained(cfg, meta, device):
    """
    The model of --init_from, for the data that meta describes; cfg takes over its shape.
    Problem: there is none, or the data does not fit.
    """
    try:
        model = Mamba.from_pretrained(cfg.init_from, device, torch.float32, cfg.cache_dir or None,
                                      dropout=cfg.dropout, scan=cfg.scan)
    except ValueError as error:
        raise Problem(f"--init_from={cfg.init_from}: {error}") from None
    config, vocab_size = model.config, meta["vocab_size"]
    tokenizer = f"{meta['tokenizer']['type']} tokenizer of {vocab_size:,}"
    if vocab_size > config.vocab_size:
        raise Problem(f"{cfg.init_from} has a vocabulary of {config.vocab_size:,}, too small for "
                      f"{meta['name']} with its {tokenizer}; released weights want data prepared "
                      "with --tokenizer=gpt-neox")
    say(f"weights of {cfg.init_from}, whose vocabulary is {config.vocab_size:,}; the data has a "
        f"{tokenizer}")
    if vocab_size < config.vocab_size:
        # The weights of the other tokens stay, but what the data does not know is never predicted.
        config.vocab_size, config.pad_vocab_size_multiple = vocab_size, len(model.lm_head.weight)
    for k in SHAPE:
        setattr(cfg, k, getattr(config, k))
    return model.train()


# The pieces of the loop


def get_batch(data, cfg, step, micro, rank, world, device):
    """
    Windows at random places: x (B, L) and y, the same one token later. A pure function of seed and
    step: a resumed run draws what it would have drawn, and several processes draw together what one
    would draw. micro: the number of the batch within the step.
    """
    rng = np.random.default_rng((cfg.seed, step, micro))
    starts = rng.integers(len(data) - cfg.block_size, size=cfg.batch_size)[rank::world]
    return windows(data, starts, cfg.block_size, device)


def windows(data, starts, length, device):
    """x and y, each (len(starts), length): the tokens from each start on, and one later."""
    tokens = np.stack([data[start:start + length + 1] for start in starts])
    tokens = torch.from_numpy(tokens.astype(np.int64))
    if device.type == "cuda":   # from pinned memory the copy does not wait for the work in flight
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradients_by(forward, optimizer, scaler, cfg, device, dtype):
    """
    Two functions (x, y) -> loss that leave gradients in the parameters: those of the first batch of
    a step, and those of a further batch on top. forward: the model, compiled or not.
    """
    def more_gradients(x, y):
        with autocast(device, dtype):
            loss = forward(x, y)[1] / cfg.gradient_accumulation_steps
        scaler.scale(loss).backward()
        return loss.detach()

    def first_gradients(x, y):
        optimizer.zero_grad(set_to_none=True)
        return more_gradients(x, y)
    return first_gradients, more_gradients


def average(grads, world):
    """
    The mean over the processes, in place, by one call after the last batch of a step.
    DistributedDataParallel would begin during the backward pass, which then could not be a CUDA
    graph: that costs more than the wait.
    """
    flat = torch.cat([grad.flatten() for grad in grads]).div_(world)
    dist.all_reduce(flat)
    means = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads)])


@torch.no_grad()
def evaluate(model, data, cfg, device, dtype, stop):
    """Mean loss over windows spread evenly over the data, always the same; None if told to stop."""
    length = min(cfg.block_size, len(data) - 1)
    count = (len(data) - 1) // length
    batch = min(cfg.batch_size, count)
    count = min(cfg.eval_iters, count // batch) * batch
    starts = np.linspace(0, len(data) - 1 - length, count).astype(int)
    model.eval()
    losses = []
    for part in starts.reshape(-1, batch):
        if stop:
            break
        with autocast(device, dtype):
            losses.append(model(*windows(data, part, length, device))[1])
    model.train()
    return None if stop else torch.stack(losses).mean().item()


def loss_line(step, val_loss, meta):
    """What is said of a validation loss. Bits for a piece of text compare between tokenizers."""
    bits = val_loss / math.log(2)   # for a token
    if meta["tokenizer"]["type"] == "char":
        return f"step {step}: val loss {val_loss:.4f} nats, {bits:.3f} bits per character"
    bits *= meta["val_tokens"] / meta["val_bytes"]
    return f"step {step}: val loss {val_loss:.4f} nats, {bits:.3f} bits per byte"


def a_sample(model, tokenizer, prompt, cfg, dtype):
    generator = torch.Generator().manual_seed(cfg.seed)
    with autocast(model.device, dtype):
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


def check_finite(step, saved, **values):
    """Problem if one of the values is not a finite number: the run is lost from here on."""
    if not all(math.isfinite(value) for value in values.values()):
        seen = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        kept = "" if saved is None else f"the checkpoint of step {saved} is kept. "
        raise Problem(f"training diverged at step {step}: {seen}; {kept}"
                      "Try a lower --learning_rate")


def save(out_dir, checkpoint, best, keep):
    """
    Writes ckpt.pt, and if these weights are the best so far, what sample.py needs of it as best.pt.
    keep: whether what was in ckpt.pt becomes ckpt.prev.pt. A damaged checkpoint must not, nor one
    of a run that this one replaces.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if best:
        kept = ("model", "model_config", "meta", "step", "best_loss")
        without_optimizer = {k: checkpoint[k] for k in kept}
        write_whole(out_dir / "best.pt", lambda file: torch.save(without_optimizer, file))
    previous = out_dir / "ckpt.prev.pt"
    write_whole(out_dir / "ckpt.pt", lambda file: torch.save(checkpoint, file),
                previous=previous if keep else None)
    if checkpoint["step"] == 0:     # nothing of a run that this one replaces stays
        previous.unlink(missing_ok=True)
        if not best:
            (out_dir / "best.pt").unlink(missing_ok=True)


class Log:
    """log.csv: a line every log_interval steps and one for each evaluation."""
    COLUMNS = ("step", "tokens", "train_loss", "val_loss", "learning_rate", "tokens_per_s")

    def __init__(self, path, step, evaluated):
        """Goes on with the log of a run at this step, last evaluated at that one."""
        self.path = path
        lines = []
        if path.exists():
            with open(path, newline="") as file:
                lines = list(csv.reader(file))[1:]

        def is_known(line):     # to the checkpoint: what came after it is done again
            if len(line) != len(self.COLUMNS) or not line[0].isdigit():
                return False    # cut off, when the run was killed
            return int(line[0]) <= (evaluated if line[3] else step)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.COLUMNS, *filter(is_known, lines)])
        write_whole(path, lambda file: file.write(text.getvalue().encode()))

    def add(self, *values):
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


class Stop:
    """
    Within `with Stop() as stop`, stop is true once Ctrl-C or SIGTERM came, or nobody reads what is
    printed. The second Ctrl-C stops at once, by a KeyboardInterrupt.
    """
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


def main(cfg, given):
    """
    Trains as cfg, a Config, says. given: {name: value} of the flags that the person gave: these a
    run that goes on takes over, and all else is as in its checkpoint.
    """
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
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if device.type == "cuda":
        repeatable()

    # The settings, and the checkpoint that the run goes on from, if there is one
    out_dir = folder_of(cfg)
    newest, previous = out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt"
    begun = newest.exists() or previous.exists()
    pretrained = cfg.init_from not in ("resume", "scratch")
    locked = lock(out_dir) if begun and master and not cfg.eval_only else None
    checkpoint = None
    if begun and cfg.init_from != "scratch":
        checkpoint = load_checkpoint(newest, previous)
        cfg = go_on_as(cfg, given, checkpoint, out_dir)
    elif pretrained:
        check_weights(cfg, given, master)
    fill_in(cfg, device, pretrained)
    check(cfg)
    if cfg.eval_only and not (checkpoint or pretrained):
        raise Problem(f"--eval_only needs a checkpoint, and {out_dir} has none; train first, or "
                      "give its --out_dir")
    if cfg.batch_size % world:
        raise Problem(f"--batch_size={cfg.batch_size} cannot be shared evenly by {world} processes")

    # The data: the first process prepares it if it is not there
    if world > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    if master:
        data = open_data(cfg.dataset, cfg.data_dir, cfg.block_size)
    if world > 1:
        dist.barrier()
    if not master:
        data = open_data(cfg.dataset, cfg.data_dir, cfg.block_size, may_prepare=False)
    meta = data.meta
    if checkpoint and checkpoint["meta"]["tokenizer"] != meta["tokenizer"]:
        raise Problem(f"the checkpoint in {out_dir} has another vocabulary than {data.folder}; "
                      f"{START_OVER}")
    if checkpoint and checkpoint["meta"]["sha256"] != meta["sha256"]:
        raise Problem(f"{data.folder} is not the text that the checkpoint in {out_dir} was trained "
                      f"on; {START_OVER}")

    # The model
    torch.manual_seed(cfg.seed)
    if checkpoint:
        model = load_model(checkpoint, dropout=cfg.dropout, scan=cfg.scan).to(device)
    elif pretrained:
        if not master:
            dist.barrier()  # until the first process has downloaded the weights
        model = load_pretrained(cfg, meta, device)
        if master and world > 1:
            dist.barrier()
    else:
        model = Mamba(model_config(cfg, vocab_size=meta["vocab_size"])).to(device)
    scan = pick_scan(cfg.scan, device, dtype, model.config.d_state)
    say(f"{device.type}, {dtype}, scan {scan}{', compiled' if cfg.compile else ''}; "
        f"{model.num_params() / 1e6:.2f}M parameters ({cfg.n_layer} layers of {cfg.d_model})")
    say(f"{data.folder}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to "
        f"validate, vocabulary of {meta['vocab_size']:,}")

    # The optimizer, and where the run stands: step is how many steps are done
    optimizer = model.configure_optimizers(cfg.learning_rate, cfg.weight_decay,
                                           (cfg.beta1, cfg.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    step, best_loss, evaluated, train_loss = 0, math.inf, -1, None
    if checkpoint:
        step, best_loss = checkpoint["step"], checkpoint["best_loss"]
        evaluated, train_loss = checkpoint["evaluated"], checkpoint["train_loss"]
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, decay in zip(optimizer.param_groups, decays):    # the flags of now, not of then
            group.update(weight_decay=decay, betas=(cfg.beta1, cfg.beta2))
        if scaler.is_enabled() and checkpoint["scaler"]:    # empty after steps in another dtype
            scaler.load_state_dict(checkpoint["scaler"])
    if cfg.eval_only:
        val_loss = evaluate(model, data.val, cfg, device, dtype, stop=False)
        say(loss_line(step, val_loss, meta))
        return
    if evaluated >= cfg.max_iters:
        say(f"{out_dir} is finished: {step} steps, best val loss {best_loss:.4f}. "
            f"Look with: python sample.py --out_dir={out_dir}\n"
            f"Go on with --max_iters={2 * step}, or start over with --init_from=scratch")
        return
    say(f"going on from step {step} of {cfg.max_iters}" if checkpoint else
        f"{cfg.max_iters} steps, into {out_dir}")

    # How gradients are computed: as the model stands there, compiled, or replayed as CUDA graphs
    batch = get_batch(data.train, cfg, 0, 0, rank, world, device)   # to try it with
    calls = gradients_by(model, optimizer, scaler, cfg, device, dtype)
    if cfg.compile:
        compiled = gradients_by(torch.compile(model), optimizer, scaler, cfg, device, dtype)
        if works_here("torch.compile", lambda: compiled[0](*batch)):
            calls = compiled
    if scan == "triton" and dtype != "float16":     # whose scaler starts with the first loss
        needed, graphs = calls[:cfg.gradient_accumulation_steps], []
        if works_here("a CUDA graph", lambda: graphs.extend(fast.replayed(needed, *batch))):
            calls = graphs
    first_gradients, more_gradients = calls[0], calls[-1]

    def state():
        """All that a run needs to go on from here."""
        return {"model": model.state_dict(), "model_config": asdict(model.config), "meta": meta,
                "step": step, "best_loss": best_loss, "evaluated": evaluated,
                "train_loss": train_loss, "config": asdict(cfg),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}

    # The loop
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        locked = locked or lock(out_dir)    # until this process ends
        log = Log(out_dir / "log.csv", step, evaluated)
    tokens_per_step = cfg.batch_size * cfg.block_size * cfg.gradient_accumulation_steps
    saved = step if checkpoint else None    # the step of the last checkpoint
    keep = checkpoint is not None and checkpoint["path"] == newest      # whole, and of this run
    speed, clock, clock_step = 0, time.perf_counter(), step
    bar = tqdm(total=cfg.max_iters, initial=step, unit="step", dynamic_ncols=True,
               disable=None if master else True)
    with Stop() as stop, bar:
        while True:
            if step != evaluated and (step % cfg.eval_interval == 0 or step == cfg.max_iters):
                val_loss = evaluate(model, data.val, cfg, device, dtype, stop)
                if val_loss is not None:
                    check_finite(step, saved, val_loss=val_loss)
                    best = val_loss < best_loss
                    evaluated, best_loss = step, min(val_loss, best_loss)
                    if master:
                        log.add(step, step * tokens_per_step, train_loss, val_loss,
                                learning_rate(max(step - 1, 0), cfg), speed)
                        save(out_dir, state(), best, keep)
                        say(loss_line(step, val_loss, meta) + (", best" if best else ""))
                        say(a_sample(model, data.tokenizer, data.val[:1].tolist(), cfg, dtype))
                    saved, keep = step, True
                    clock, clock_step = time.perf_counter(), step
                if stop.agreed(world, device):
                    break
            if step >= cfg.max_iters:
                break

            # Dropout too is a function of seed and step: no random state has to be kept.
            torch.manual_seed(((cfg.seed << 32) + step * world + rank) % 2 ** 63)
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
            if stopping or log_now or step % cfg.eval_interval == 0 or step == cfg.max_iters:
                if world > 1:
                    dist.all_reduce(total)
                train_loss = total.item() / world   # waits for the device
                # a scaler skips a step whose gradients are not finite
                check_finite(step, saved, loss=train_loss,
                             gradient_norm=0 if scaler.is_enabled() else norm.item())
            if log_now and master:
                speed = round((step - clock_step) * tokens_per_step / (time.perf_counter() - clock))
                clock, clock_step = time.perf_counter(), step
                log.add(step, step * tokens_per_step, train_loss, "", learning_rate(step - 1, cfg),
                        speed)
                bar.set_postfix(loss=f"{train_loss:.3f}", tok_s=f"{speed:,}")
            if stopping:
                break

        # Stopped between two evaluations. best.pt stays: nobody has evaluated these weights.
        if master and not (keep and saved == step):
            save(out_dir, state(), best=False, keep=keep)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()

    # Goodbye
    if stop and evaluated < cfg.max_iters:
        again = " (without --init_from=scratch)" if given.get("init_from") == "scratch" else ""
        say(f"stopped after step {step} of {cfg.max_iters}, saved in {out_dir}; the same command "
            f"goes on from there{again}")
        sys.exit(128 + stop.signal)
    say(f"done: best val loss {best_loss:.4f}, in {out_dir}. Look with: python sample.py "
        f"--out_dir={out_dir}")


if __name__ == "__main__":
    run(main, Config)
