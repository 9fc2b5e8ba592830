"""
Trains a Mamba language model on the text of prepare_data.py.

python train.py                                           # built-in text, no network; minutes on a laptop
python train.py --dataset=shakespeare --device=mps
python train.py --dataset=novel.txt --d_model=256 --n_layer=6
python train.py --dataset=novel-gpt-neox --init_from=state-spaces/mamba-130m      # go on from released weights
torchrun --nproc_per_node=2 train.py --dataset=shakespeare

Ctrl-C finishes the step and saves; the same command again goes on exactly where it stopped. In out/<dataset>:
ckpt.pt (the latest state), best.pt (lowest validation loss, what sample.py uses), log.csv.
"""
from __future__ import annotations

import csv
import math
import os
import pickle
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends the long import of torch without a traceback
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, on Linux: fresh memory costs a CPU less
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # without it PyTorch does not trust cuBLAS; see repeatable
import torch
import torch.distributed as dist
from tqdm import tqdm

from mamba import (
    ON_HUB,
    Mamba,
    MambaConfig,
    compiles_well,
    get_file,
    read_config,
    recorded,
    scan_method,
    works_here,
)
from prepare_data import Config as DataConfig
from prepare_data import (
    Problem,
    check_length,
    dataset_name,
    flag,
    is_prepared,
    load_meta,
    load_tokenizer,
    nobody_reads,
    prepare,
    run,
)


@dataclass
class Config:
    # what to learn from, and where to keep what was learned
    dataset: str = flag("pydoc", "what prepare_data.py takes as --dataset, or the name of a folder in data_dir")
    data_dir: str = flag("data", "folder of the prepared data")
    out_dir: str = flag("", "folder of the checkpoints; out/<dataset> by default")
    init_from: str = flag("resume", "resume: go on if out_dir has a checkpoint; scratch: start over and replace it; "
                          "a folder or name of released weights, such as state-spaces/mamba-130m: begin with those")
    eval_only: bool = flag(False, "print the validation loss of the checkpoint, train nothing")
    # the model (None: by device, see PRESETS)
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
    cache_dir: str = flag("", "folder for downloaded weights, if Hugging Face's cache lacks them; default ~/.cache/mamba.py")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float16 (mixed precision); by default bfloat16 on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile, up to a minute; by default on CUDA from 5000 steps on, on a CPU from 1000")
    scan: str = flag("auto", "method of the selective scan: auto, triton (fused kernels, on CUDA), chunked or sequential")


PRESETS = {  # what trains in minutes on such a device
    "cpu": {"d_model": 160, "n_layer": 3, "d_state": 8, "dropout": 0.15, "batch_size": 12, "block_size": 128,
            "max_iters": 2000, "learning_rate": 4e-3},
    "mps": {"d_model": 256, "n_layer": 6, "d_state": 16, "dropout": 0.1, "batch_size": 32, "block_size": 256,
            "max_iters": 2000, "learning_rate": 2e-3},
    "cuda": {"d_model": 320, "n_layer": 12, "d_state": 16, "dropout": 0.35, "batch_size": 64, "block_size": 256,
             "max_iters": 800, "learning_rate": 3e-3, "weight_decay": 0.5},
}
FINE_TUNING = {"dropout": 0.0, "learning_rate": 1e-4}     # for weights that are already good
SHAPE = ("d_model", "n_layer", "d_state", "d_conv", "expand", "d_intermediate")
MACHINE = ("cache_dir", "device", "dtype", "compile", "scan")   # belong to the machine, not to the run: never taken from a checkpoint


def pick_device(name):
    """The torch.device of this name, "auto" being the best there is. A device that is not there is a Problem."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Problem(f"--device={name} is not a device; use cpu, cuda, mps or auto") from None
    if device.type not in PRESETS:
        raise Problem(f"--device={name} is not supported; use cpu, cuda, mps or auto")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= count:
        raise Problem(f"--device={name}: torch {torch.__version__} finds {count} such devices; use --device=cpu")
    if device.type == "mps":
        check_against_cpu(device)
    return device


def check_against_cpu(device):
    """One small forward and backward there and on the CPU: some releases of PyTorch compute wrong on MPS, in silence."""
    torch.manual_seed(0)
    model, idx = Mamba(MambaConfig(vocab_size=64, d_model=32, n_layer=2)), torch.randint(64, (3, 40))
    results = []
    for where in ("cpu", device):
        model.to(where).zero_grad()
        loss = model(idx.to(where), idx.to(where).roll(-1, 1))[1]
        loss.backward()
        results.append(torch.cat([loss.reshape(1), *(p.grad.flatten() for p in model.parameters())]).detach().cpu())
    error = ((results[1] - results[0]).norm() / results[0].norm()).item()
    if not error < 1e-3:
        raise Problem(f"torch {torch.__version__} computes wrong on {device} (gradients are off by {error:.1e}); "
                      "update torch, or use --device=cpu")


def pick_scan(name, device, dtype, d_state):
    """The scan that runs there for this --scan. One that cannot run is a Problem."""
    try:
        return scan_method(name, torch.empty(0, device=device, dtype=getattr(torch, dtype)), d_state)
    except (ValueError, KeyError) as error:
        raise Problem(str(error)) from None


def pick_dtype(name, device):
    if name == "auto":
        return "float32" if device.type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if name not in ("float32", "bfloat16", "float16"):
        raise Problem(f"--dtype takes float32, bfloat16, float16 or auto, not '{name}'")
    return name


def autocast(device, dtype):
    """Without copies of weights kept for a second use: there is none, and a recorded graph would find them outdated."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=False)


def repeatable():
    """The same bits from the same input on CUDA too, where the gradient of an embedding is else summed in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # that finds mistakes, and takes time


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(checkpoint, path, previous=None):
    """Write all of it, then rename: a crash, a full disk or a kill at any moment leaves a whole checkpoint behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:    # torch's writer reports a full disk as a RuntimeError
        raise Problem(f"could not write {path}: {error}; what was saved before is untouched") from None
    finally:
        unfinished.unlink(missing_ok=True)


# what torch.load raises for a file that is cut off, garbled or something else altogether
UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, EOFError, AttributeError, pickle.UnpicklingError,
              zipfile.BadZipFile)


def load_checkpoint(*paths):
    """The first of these files that is a whole checkpoint, on the CPU; says so if one before it is damaged."""
    reasons = []
    for path in paths:
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(checkpoint, dict) or not {"model", "model_config", "meta", "step"} <= checkpoint.keys():
                raise ValueError("it holds something else")
        except UNREADABLE as error:
            reasons.append(f"{path} is damaged or not a checkpoint ({type(error).__name__})")
            continue
        for reason in reasons:
            print(f"{reason}; using {path}, of step {checkpoint['step']}", file=sys.stderr)
        return {**checkpoint, "path": path}
    raise Problem("; ".join(reasons) or f"no checkpoint at {paths[0]}; train one with: python train.py")


def load_model(checkpoint, **changes):
    """The model of a checkpoint, on the CPU; changes to its config that leave its weights alone are scan and dropout."""
    try:
        model = Mamba(MambaConfig(**{**checkpoint["model_config"], **changes}))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError) as error:
        raise Problem(f"the checkpoint does not describe a model: {error}") from None
    except RuntimeError:
        raise Problem("the weights in the checkpoint are not of the shape that its config says") from None
    return model


def load_pretrained(cfg, meta, device):
    """The model of --init_from, for the data that meta describes. Problem: there is none, or the data does not fit."""
    try:
        model = Mamba.from_pretrained(cfg.init_from, device, torch.float32, cfg.cache_dir, dropout=cfg.dropout, scan=cfg.scan)
    except ValueError as error:
        raise Problem(f"--init_from={cfg.init_from}: {error}") from None
    config, tokens = model.config, f"{meta['tokenizer']['type']} tokenizer of {meta['vocab_size']:,}"
    if meta["vocab_size"] > config.vocab_size:
        raise Problem(f"{cfg.init_from} has a vocabulary of {config.vocab_size:,}, too small for {meta['name']} with "
                      f"its {tokens}; released weights want data prepared with --tokenizer=gpt-neox")
    say(f"weights of {cfg.init_from}, whose vocabulary is {config.vocab_size:,}; the data has a {tokens}")
    if meta["vocab_size"] < config.vocab_size:  # the rows stay, but what this tokenizer cannot write is never predicted
        config.vocab_size, config.pad_vocab_size_multiple = meta["vocab_size"], len(model.lm_head.weight)
    return model.train()


def lock(folder):
    """
    An open file that keeps a second run out of folder as long as it is open: the system closes it however this process
    ends. Problem: another run is in there.
    """
    file = open(folder / "lock", "a")   # noqa: SIM115
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Problem(f"another run is training in {folder}; wait until it ends, or use another --out_dir") from None
    except OSError as error:    # a network file system without locks
        say(f"cannot lock {folder} ({error.strerror}): nothing will stop a second run in there from overwriting this one")
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Settings: the defaults, under what the checkpoint says, under what the command line says


def settle(cfg, given, device, master):
    """
    (out_dir, its lock, finished Config, checkpoint to go on from or None). Flags that a resumed run cannot take are a
    Problem. The lock is None where there is no checkpoint yet, or none will be written.
    """
    pretrained = cfg.init_from not in ("resume", "scratch")
    out_dir = Path(cfg.out_dir or Path("out", dataset_name(cfg.dataset)))
    here = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not (here.is_dir() and os.access(here, os.W_OK)):
        raise Problem(f"cannot write into {here}; choose another --out_dir")
    begun, checkpoint = any((out_dir / name).exists() for name in ("ckpt.pt", "ckpt.prev.pt")), None
    locked = lock(out_dir) if begun and master and not cfg.eval_only else None
    if begun and cfg.init_from != "scratch":
        checkpoint = load_checkpoint(out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt")
        if "optimizer" not in checkpoint:
            raise Problem(f"{out_dir / 'ckpt.pt'} holds a model but no optimizer, so training cannot go on from it")
        before = {k: v for k, v in checkpoint["config"].items() if k not in MACHINE}
        given = {k: v for k, v in given.items() if (k, v) != ("init_from", "resume")}
        changed = {k: (before[k], v) for k, v in given.items() if k in before and before[k] != v}
        if len({os.path.abspath(name) for name in changed.get("init_from", ())}) > 1:
            raise Problem(f"{out_dir} holds a run that did not begin with {cfg.init_from}; use another --out_dir")
        shape = [k for k in changed if k in SHAPE]
        if shape:
            raise Problem(f"{out_dir} holds a model with " + ", ".join(f"{k} {before[k]}" for k in shape) +
                          f", not {', '.join(str(given[k]) for k in shape)}; start over with --init_from=scratch, or use "
                          "another --out_dir")
        if "dataset" in changed and dataset_name(cfg.dataset) != dataset_name(before["dataset"]):
            raise Problem(f"{out_dir} was trained on {before['dataset']}, not {cfg.dataset}; start over with "
                          "--init_from=scratch, or use another --out_dir")
        for k, (old, new) in changed.items():
            say(f"{k}: {old} -> {new}")
        cfg = Config(**{**before, **given})
    elif pretrained:
        if not (Path(cfg.init_from).is_dir() or ON_HUB.fullmatch(cfg.init_from)):
            raise Problem("--init_from takes resume, scratch, a folder, or a name such as state-spaces/mamba-130m, not "
                          f"'{cfg.init_from}'")
        if shape := [k for k in SHAPE if k in given]:
            raise Problem(f"--{shape[0]} cannot be chosen: the weights of {cfg.init_from} have a shape of their own")
        if master:  # what is wrong with them is found, as far as it costs little, before a text is prepared
            try:
                read_config(get_file(cfg.init_from, "config.json", cfg.cache_dir))
            except ValueError as error:
                raise Problem(f"--init_from={cfg.init_from}: {error}") from None
    for k, v in {**PRESETS[device.type], **(FINE_TUNING if pretrained else {})}.items():
        if getattr(cfg, k) is None:
            setattr(cfg, k, v)
    if cfg.compile is None:
        on_cpu = compiles_well(device, cfg.d_state) and cfg.scan != "sequential"
        pays_from = 5000 if device.type == "cuda" else 1000 if on_cpu else math.inf
        cfg.compile = cfg.max_iters >= pays_from and not cfg.eval_only
    for k in ("batch_size", "block_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "eval_iters",
              "log_interval"):
        if getattr(cfg, k) < 1:
            raise Problem(f"--{k} must be at least 1, not {getattr(cfg, k)}")
    for k in ("learning_rate", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "seed", "sample_tokens"):
        if (getattr(cfg, k) or 0) < 0:
            raise Problem(f"--{k} must not be negative: {getattr(cfg, k)}")
    if cfg.seed >= 2 ** 31:
        raise Problem(f"--seed must be below {2 ** 31}, not {cfg.seed}")
    for k in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, k) < 1:
            raise Problem(f"--{k} must be at least 0 and below 1, not {getattr(cfg, k)}")
    model_config(cfg)
    if cfg.eval_only and not (checkpoint or pretrained):
        raise Problem(f"--eval_only needs a checkpoint, and {out_dir} has none; train first, or give its --out_dir")
    return out_dir, locked, cfg, checkpoint


def model_config(cfg, **more):
    try:
        return MambaConfig(**{f.name: getattr(cfg, f.name) for f in fields(MambaConfig) if hasattr(cfg, f.name)}, **more)
    except ValueError as error:
        raise Problem(str(error)) from None


def say(*words):
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            tqdm.write(" ".join(str(w) for w in words))
            sys.stdout.flush()
        except OSError as error:
            if not nobody_reads(error):
                raise
            Stop.signal = 13    # SIGPIPE: ends as after Ctrl-C, which in `train.py | tee log` reaches tee first


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of the loop


def get_batch(data, cfg, step, micro, rank, world, device):
    """
    Windows at random places: x (B, L) and y, the same one token later. A pure function of seed and step: a resumed run
    draws what it would have drawn, and several processes draw together what one would draw.
    """
    rng = np.random.default_rng((cfg.seed, step, micro))
    starts = rng.integers(len(data) - cfg.block_size, size=cfg.batch_size)[rank::world]
    return windows(data, starts, cfg.block_size, device)


def windows(data, starts, length, device):
    tokens = torch.from_numpy(np.stack([data[s:s + length + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":   # from pinned memory the copy does not wait for the work in flight
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def replayed(calls, x, y):
    """
    Each of calls, (x, y) -> loss, as a CUDA graph: the CPU asks for all of it at once, instead of kernel by kernel. They share
    the memory of what each of them needs for itself.
    """
    x, y, pool, replays = x.clone(), y.clone(), None, []
    for call in calls:
        graph, loss = recorded(lambda call=call: call(x, y), x, pool)
        pool = graph.pool()

        def replay(x_new, y_new, graph=graph, loss=loss):
            x.copy_(x_new)
            y.copy_(y_new)
            graph.replay()
            return loss
        replays.append(replay)
    return replays


def average(grads, world):
    """
    The mean over the processes, in place, by one call after the last batch of a step. DistributedDataParallel would begin
    during the backward pass, which then could not be a CUDA graph: that costs more than the wait.
    """
    flat = torch.cat([g.flatten() for g in grads]).div_(world)
    dist.all_reduce(flat)
    torch._foreach_copy_(grads, [new.view_as(g) for new, g in zip(flat.split([g.numel() for g in grads]), grads)])


@torch.no_grad()
def evaluate(model, data, cfg, device, dtype, stop):
    """Mean loss over windows spread evenly over the data, always the same ones; None if the person wants to stop."""
    length = min(cfg.block_size, len(data) - 1)
    count = (len(data) - 1) // length
    batch = min(cfg.batch_size, count)
    count = min(cfg.eval_iters, count // batch) * batch
    starts = np.linspace(0, len(data) - 1 - length, count).astype(int).reshape(-1, batch)
    model.eval()
    losses = []
    for row in starts:
        if stop:
            break
        with autocast(device, dtype):
            losses.append(model(*windows(data, row, length, device))[1])
    model.train()
    return None if stop else torch.stack(losses).mean().item()


def a_sample(model, tokenizer, prompt, cfg, dtype):
    with autocast(model.lm_head.weight.device, dtype):
        ids = model.generate([prompt], cfg.sample_tokens, temperature=0.8, generator=torch.Generator().manual_seed(cfg.seed))
    return f"---\n{tokenizer.decode(ids[0].tolist())}\n---"


def learning_rate(step, cfg):
    """Linear warm-up, then half a cosine down to min_lr."""
    low = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    end = cfg.lr_decay_iters or cfg.max_iters
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    progress = min(1, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    return low + (cfg.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))


class Log:
    """log.csv: one row every log_interval steps and one for each evaluation. What the checkpoint does not know is cut."""
    COLUMNS = ("step", "tokens", "train_loss", "val_loss", "learning_rate", "tokens_per_s")

    def __init__(self, path, step, evaluated):
        self.path = path
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:]
                        if len(row) == len(self.COLUMNS) and row[0].isdigit() and int(row[0]) <= (evaluated if row[3] else step)]
        unfinished = path.with_suffix(".csv.tmp")
        with open(unfinished, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([self.COLUMNS, *rows])
        os.replace(unfinished, path)

    def row(self, *values):
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


class Stop:
    """True once Ctrl-C or SIGTERM came, or nobody reads what is printed; the second Ctrl-C stops at once."""
    signal = 0

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self:
            raise KeyboardInterrupt
        self.signal = number
        say("stopping after this step; once more to stop at once")

    def __bool__(self):
        return self.signal != 0

    def agreed(self, world, device):
        """True on all processes at the same step once one of them was told to stop."""
        if world == 1:
            return bool(self)
        told = torch.tensor(self.signal, device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        self.signal = int(told)
        return bool(self)


# ---------------------------------------------------------------------------------------------------------------------


def main(cfg, given):
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
        if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > torch.cuda.device_count():
            raise Problem(f"{processes} processes need as many GPUs; torch {torch.__version__} finds {torch.cuda.device_count()}")
    device = pick_device(cfg.device)
    if device.type == "cuda":
        repeatable()
    dtype = pick_dtype(cfg.dtype, device)
    master = rank == 0
    out_dir, locked, cfg, checkpoint = settle(cfg, given, device, master)
    if cfg.batch_size % world:
        raise Problem(f"--batch_size={cfg.batch_size} cannot be shared evenly by {world} processes")
    if world > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)

    # the data
    folder = Path(cfg.data_dir, dataset_name(cfg.dataset))
    if master and not is_prepared(folder, cfg.dataset):
        prepare(DataConfig(dataset=cfg.dataset, data_dir=cfg.data_dir), cfg.block_size)
    if world > 1:
        dist.barrier()
    meta = load_meta(folder)
    check_length(meta, cfg.block_size)
    if checkpoint and checkpoint["meta"]["tokenizer"] != meta["tokenizer"]:
        raise Problem(f"the checkpoint in {out_dir} has another vocabulary than {folder}; start over with "
                      "--init_from=scratch, or use another --out_dir")
    if checkpoint and checkpoint["meta"]["sha256"] != meta["sha256"]:
        raise Problem(f"{folder} is not the text that the checkpoint in {out_dir} was trained on; start over with "
                      "--init_from=scratch, or use another --out_dir")
    train_data, val_data = (np.memmap(folder / f"{part}.bin", dtype=meta["dtype"], mode="r") for part in ("train", "val"))
    tokenizer = load_tokenizer(meta["tokenizer"])

    # the model
    torch.manual_seed(cfg.seed)
    if checkpoint:
        model = load_model(checkpoint, dropout=cfg.dropout, scan=cfg.scan).to(device)
    elif cfg.init_from not in ("resume", "scratch"):
        if world > 1 and not master:
            dist.barrier()  # until the first process has downloaded the weights
        model = load_pretrained(cfg, meta, device)
        if world > 1 and master:
            dist.barrier()
        for k in SHAPE:
            setattr(cfg, k, getattr(model.config, k))
    else:
        model = Mamba(model_config(cfg, vocab_size=meta["vocab_size"])).to(device)
    raw_model = model
    optimizer = model.configure_optimizers(cfg.learning_rate, cfg.weight_decay, (cfg.beta1, cfg.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    step, best_loss, evaluated, train_loss = 0, math.inf, -1, None
    if checkpoint:
        step, best_loss, evaluated, train_loss = (checkpoint[k] for k in ("step", "best_loss", "evaluated", "train_loss"))
        decay = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, value in zip(optimizer.param_groups, decay):     # the flags of today, not those in the checkpoint
            group.update(weight_decay=value, betas=(cfg.beta1, cfg.beta2))
        if scaler.is_enabled() and checkpoint["scaler"]:    # empty after steps in another dtype
            scaler.load_state_dict(checkpoint["scaler"])
    by_char = meta["tokenizer"]["type"] == "char"
    unit = "bits per character" if by_char else "bits per byte"
    per_unit = (1 if by_char else meta["val_tokens"] / meta["val_bytes"]) / math.log(2)
    scan = pick_scan(cfg.scan, device, dtype, raw_model.config.d_state)
    say(f"{device.type}, {dtype}, scan {scan}{', compiled' if cfg.compile else ''}; "
        f"{raw_model.num_params() / 1e6:.2f}M parameters ({cfg.n_layer} layers of {cfg.d_model})")
    say(f"{folder}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate, "
        f"vocabulary of {meta['vocab_size']:,}")

    if cfg.eval_only:
        val_loss = evaluate(model, val_data, cfg, device, dtype, stop=False)
        say(f"step {step}: val loss {val_loss:.4f} nats, {val_loss * per_unit:.3f} {unit}")
        return
    if evaluated >= cfg.max_iters:
        say(f"{out_dir} is finished: {step} steps, best val loss {best_loss:.4f}. Look with: python sample.py --out_dir={out_dir}"
            f"\nGo on with --max_iters={2 * step}, or start over with --init_from=scratch")
        return
    say(f"going on from step {step} of {cfg.max_iters}" if checkpoint else f"{cfg.max_iters} steps, into {out_dir}")

    def more_gradients(x, y):
        """Adds the gradients of a batch to those that are there."""
        with autocast(device, dtype):
            loss = model(x, y)[1] / cfg.gradient_accumulation_steps
        scaler.scale(loss).backward()
        return loss.detach()

    def gradients(x, y):
        optimizer.zero_grad(set_to_none=True)
        return more_gradients(x, y)

    batch = get_batch(train_data, cfg, 0, 0, rank, world, device)
    if cfg.compile:
        model = torch.compile(model)
        if not works_here("torch.compile", lambda: gradients(*batch), say):
            model = raw_model
    if scan == "triton" and dtype != "float16":      # whose scaler starts with the first loss
        calls, graphs = [gradients, more_gradients][:cfg.gradient_accumulation_steps], []
        if works_here("a CUDA graph", lambda: graphs.extend(replayed(calls, *batch)), say):
            gradients, more_gradients = graphs[0], graphs[-1]

    # the loop
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        locked = locked or lock(out_dir)
        log = Log(out_dir / "log.csv", step, evaluated)
    bar = tqdm(total=cfg.max_iters, initial=step, unit="step", dynamic_ncols=True, disable=None if master else True)
    tokens_per_step = cfg.batch_size * cfg.block_size * cfg.gradient_accumulation_steps
    saved, speed, clock, clock_step = step, 0, time.perf_counter(), step
    stop, newest = Stop(), checkpoint and checkpoint["path"] == out_dir / "ckpt.pt"

    def check(**values):
        if not all(math.isfinite(v) for v in values.values()):
            raise Problem(f"training diverged at step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()) +
                          f"; the checkpoint of step {saved} is kept. Try a lower --learning_rate")

    def save():
        if master:
            state = {"model": raw_model.state_dict(), "model_config": asdict(raw_model.config), "meta": meta, "step": step,
                     "best_loss": best_loss}
            if better:
                save_checkpoint(state, out_dir / "best.pt")
            state.update(evaluated=evaluated, train_loss=train_loss, config=asdict(cfg),
                         optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            # a damaged checkpoint, or one of the run that this one replaces, must not become the previous one
            save_checkpoint(state, out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt" if newest else None)
            if step == 0:
                (out_dir / "ckpt.prev.pt").unlink(missing_ok=True)
        return step

    while True:
        better = False
        if step != evaluated and (step % cfg.eval_interval == 0 or step == cfg.max_iters):
            val_loss = evaluate(raw_model, val_data, cfg, device, dtype, stop)
            if val_loss is not None:
                check(val_loss=val_loss)
                evaluated, better, best_loss = step, val_loss < best_loss, min(val_loss, best_loss)
                if master:
                    log.row(step, step * tokens_per_step, train_loss, val_loss, learning_rate(max(step - 1, 0), cfg), speed)
                saved, newest = save(), True
                if master:
                    say(f"step {step}: val loss {val_loss:.4f} nats, {val_loss * per_unit:.3f} {unit}{', best' * better}")
                    say(a_sample(raw_model, tokenizer, val_data[:1].tolist(), cfg, dtype))
                clock, clock_step = time.perf_counter(), step
            if stop.agreed(world, device):
                saved = save()
                break
        if step >= cfg.max_iters:
            break

        # dropout is a function of seed and step too, so that no random state has to be kept
        torch.manual_seed(((cfg.seed << 32) + step * world + rank) % 2 ** 63)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        total = torch.zeros((), device=device)
        for micro in range(cfg.gradient_accumulation_steps):
            x, y = get_batch(train_data, cfg, step, micro, rank, world, device)
            total += (more_gradients if micro else gradients)(x, y)
        if world > 1:
            average([p.grad for p in raw_model.parameters() if p.grad is not None], world)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        step += 1
        bar.update()

        stopping = stop.agreed(world, device)
        if stopping or step % cfg.log_interval == 0 or step % cfg.eval_interval == 0 or step == cfg.max_iters:
            if world > 1:
                dist.all_reduce(total)
            train_loss = total.item() / world                                   # waits for the device
            check(loss=train_loss, gradient_norm=0 if scaler.is_enabled() else norm.item())     # the scaler skips such a step
            if step % cfg.log_interval == 0 and master:
                speed = round((step - clock_step) * tokens_per_step / (time.perf_counter() - clock))
                clock, clock_step = time.perf_counter(), step
                log.row(step, step * tokens_per_step, train_loss, "", learning_rate(step - 1, cfg), speed)
                bar.set_postfix(loss=f"{train_loss:.3f}", tok_s=f"{speed:,}")
        if stopping:
            saved = save()
            break

    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if stop and evaluated < cfg.max_iters:
        say(f"stopped after step {step} of {cfg.max_iters}, saved in {out_dir}; the same command goes on from there"
            + " (without --init_from=scratch)" * (given.get("init_from") == "scratch"))
        sys.exit(128 + stop.signal)
    say(f"done: best val loss {best_loss:.4f}, in {out_dir}. Look with: python sample.py --out_dir={out_dir}")


if __name__ == "__main__":
    run(main, Config)
