"""
Trains a Mamba language model on the text of prepare_data.py.

python train.py                                     # built-in text, no network; minutes on a laptop
python train.py --dataset=shakespeare --device=mps
python train.py --dataset=novel.txt --d_model=256 --n_layer=6
python train.py --dataset=letters.txt --init_from=out/novel      # a run, or released weights
torchrun --nproc_per_node=2 train.py --dataset=shakespeare

Ctrl-C finishes the step and saves; the same command again goes on exactly where it stopped. In
out/<dataset>: ckpt.pt (the latest state), best.pt (lowest validation loss, what sample.py uses),
log.csv.
"""
from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    if not hasattr(sys, "ps1"):     # in a notebook Ctrl-C must not end the process
        # Until main begins Ctrl-C ends it, without a traceback: importing torch takes long.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))   # python -P leaves it out
    # Each of the three is read once. Large pages, on Linux, make fresh memory cost a CPU less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A thread that waits for others checks this many times whether they are done, then sleeps.
    # 300,000 are usual: where other programs use the cores too, threads would do little else.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # For common.set_up: cuBLAS repeats itself only with a workspace of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import contextlib
import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import common
import processes
import runs
from common import dataset_name, flag, say
from mamba import Mamba
from prepare_data import open_data

PRESETS = {     # what trains in minutes on such a device; runs.fill_in knows what else is usual
    "cpu": {"d_model": 160, "n_layer": 3, "d_state": 8, "batch_size": 8, "block_size": 128,
            "max_iters": 1700, "learning_rate": 4e-3},
    "mps": {"d_model": 256, "n_layer": 6, "d_state": 16, "batch_size": 32, "block_size": 256,
            "max_iters": 2000, "learning_rate": 2e-3},
    "cuda": {"d_model": 320, "n_layer": 12, "d_state": 16, "batch_size": 64, "block_size": 256,
             "max_iters": 1200, "learning_rate": 3e-3},
}

@dataclass
class Config:
    # what to learn from, and where to keep what was learned
    dataset: str = flag("pydoc", "what prepare_data.py takes, or the name of a folder in data_dir")
    data_dir: str = flag("data", "folder of the prepared data")
    out_dir: str = flag("", "folder of the checkpoints; out/<dataset> by default")
    init_from: str = flag("resume", "resume: go on if out_dir has a checkpoint; scratch: start "
                          "over and replace it; a folder or name of released weights, such as "
                          "state-spaces/mamba-130m, or of another run: begin with those")
    new_vocabulary: bool = flag(False, "with weights of other tokens: learn an embedding of those "
                                "of the data anew, and keep all other weights (a learning_rate "
                                "above 1e-4, the default with weights, helps)")
    eval_only: bool = flag(False, "train nothing; print the loss that training prints, and that of "
                           "the whole validation text, read once with the state carried on")
    # the model; None, here and below: see --help
    presets = PRESETS   # for --help, and for those that stay None
    layer: str = flag("mamba", "kind of the layers: mamba, mamba2 or mamba3")
    d_model: int | None = flag(None, "width of the model", 1)
    n_layer: int | None = flag(None, "layers", 1)
    d_state: int | None = flag(None, "numbers that each channel remembers; 64 with heads", 1)
    headdim: int | None = flag(None, "channels of a head of mamba2 and mamba3; by default as many "
                               "up to 64 as divide the channels", 1)
    d_conv: int = flag(4, "width of the convolution", 1)
    expand: int = flag(2, "channels of the scan, in units of d_model", 1)
    d_intermediate: int = flag(0, "width of a gated MLP after each mixer; 0 is none", 0)
    dropout: float | None = flag(None, "by default none for a text that is seen twice or less; for "
                                 "each time more 0.05, but at most 0.35", 0, 1)
    # the schedule
    batch_size: int | None = flag(None, "sequences in a batch, over all processes", 1)
    block_size: int | None = flag(None, "tokens in a sequence", 1)
    gradient_accumulation_steps: int = flag(1, "batches whose gradients make one step", 1)
    max_iters: int | None = flag(None, "steps in all", 1)
    learning_rate: float | None = flag(None, "the highest, reached after warmup_iters", 0)
    min_lr: float | None = flag(0.0, "the last learning rate; None is learning_rate / 10", 0)
    warmup_iters: int = flag(100, "steps until the learning rate has risen", 0)
    lr_decay_iters: int | None = flag(None, "steps until it has fallen; max_iters by default", 1)
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
    eval_iters: int = flag(50, "batches in an evaluation, at most the whole validation text; each "
                          "reads on where the one before ended", 1)
    patience: int = flag(0, "evaluations without an improvement that end the run; 0: none do", 0)
    log_interval: int = flag(10, "steps between rows of log.csv", 1)
    sample_tokens: int = flag(200, "tokens of the sample shown at an evaluation", 0)
    # the machine
    cache_dir: str = flag("", "folder for downloaded weights; Hugging Face's cache by default")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float16 (mixed precision); by default bfloat16 "
                      "on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile, up to a minute; by default from 5000 "
                                "steps on CUDA, for Mamba-1")
    scan: str = flag("auto", "auto, triton (fused kernels, on CUDA), chunked or sequential")
    threads: int | None = flag(None, "of a CPU; by default all, but fewer as long as other "
                               "programs use the cores: the threads would mostly wait for each "
                               "other", 1)
    checkpointing: bool = flag(False, "keep what enters each layer and compute the rest again for "
                               "the gradients: with 12 layers 0.4 of the memory, 1.4 times the "
                               "time")
    fsdp: bool = flag(False, "under torchrun, each process keeps a share of weights and optimizer, "
                      "for a model that one GPU does not hold")

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
    tokens = torch.from_numpy(data.windows(starts, length + 1).astype(np.int64))
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
        goes_on = x[:, -1] != eot                                           # (B,)
        after = [layer._make(t * goes_on.view(-1, *[1] * (t.dim() - 1)) for t in layer)
                 for layer in after]
    return loss, after

def gradients_by(forward, optimizer, scaler, cfg, dtype, eot, carried):
    """Functions (x, y) -> loss that leave gradients in the parameters: those of the first batch of
    a step, and if it has several, those of a further batch on top. carried: the state that x
    continues, or None; the state after x takes its place in it, where a CUDA graph reads it."""
    def more_gradients(x, y):
        loss, after = loss_of(forward, x, y, dtype, eot, carried)
        loss = loss / cfg.gradient_accumulation_steps
        scaler.scale(loss).backward()
        if carried is not None:
            runs.put(carried, after)
        return loss.detach()

    def first_gradients(x, y):
        optimizer.zero_grad(set_to_none=True)
        return more_gradients(x, y)
    return [first_gradients, more_gradients][:cfg.gradient_accumulation_steps]

@torch.no_grad()
def evaluate(model, data, rows, part, dtype, eot, most=math.inf, stop=False):
    """Mean loss over the data, read in so many rows, part by part with the state carried on, as the
    model writes: memory does not grow with the length. Of each row it reads `most` parts at most.
    Returns None once stop, a runs.Stop, is true."""
    rows = max(1, min(rows, (len(data) - 1) // part))
    length = (len(data) - 1) // rows
    starts = np.arange(rows) * length
    model.eval()
    total, read, state = 0.0, 0, model.init_state(rows)
    while read < min(length, most * part) and not stop:
        n = min(part, length - read)
        x, y = windows(data, starts + read, n, model.device)
        loss, state = loss_of(model, x, y, dtype, eot, state)
        total, read = total + loss * n, read + n
    model.train()
    return None if stop else (total / read).item()

def a_sample(model, tokenizer, prompt, cfg, dtype, step):
    """A text of the model, another one at each step."""
    generator = torch.Generator().manual_seed(common.seed_of(cfg.seed, step))
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

def main(cfg, given):
    """Trains as cfg, a Config, says. given: {name: value} of the flags that the person gave. A run
    that goes on takes these, and all others from its checkpoint, but for those of the machine, as
    device and dtype. Returns the status to exit with: 0, or 128 and the number
    of the signal that stopped it."""
    with contextlib.ExitStack() as at_end:
        return train(cfg, given, at_end)

def train(cfg, given, at_end):
    """What main does. at_end: unlocks the folder and sets the number of threads back."""
    threads = torch.get_num_threads()
    at_end.callback(torch.set_num_threads, threads)
    # Who am I? Under torchrun one of several processes (world), each with a number (rank) and on a
    # GPU of its own.
    rank, world = processes.rank_and_world()
    master = rank == 0      # it prints and saves
    cfg.device = processes.own_device(cfg.device, world)
    device = common.pick_device(cfg.device)
    dtype = common.pick_dtype(cfg.dtype, device)
    common.set_up(device)
    if world > 1:
        processes.join_others(rank, world, device)

    # The settings, and the checkpoint that the run goes on from, if there is one. The folder is
    # this run's alone before anything in it is looked at.
    folder = runs.RunFolder(Path(cfg.out_dir or Path("out", dataset_name(cfg.dataset))))

    def open_run():
        if not cfg.eval_only:
            at_end.enter_context(folder)
        return runs.settings(cfg, given, folder.path)
    cfg, checkpoint = processes.of_first(open_run, rank, world, device)
    of_weights = cfg.init_from not in ("resume", "scratch")     # the run began with, or does now
    pretrained = of_weights and not checkpoint
    runs.fill_in(cfg, device, pretrained)
    if not of_weights:      # a problem with the model comes before a text is prepared
        common.pick_scan(cfg.scan, device, dtype, cfg.d_state, cfg.headdim or 0)
        runs.config_of(cfg, 1)
    processes.check_flags(cfg, world, dtype)

    # The data
    with processes.first_process_first(world) as first_here:
        tokenizer = None    # which open_data makes, if the text is not prepared
        if pretrained:
            model, tokenizer = runs.load_pretrained(cfg, given, device)
        elif of_weights and not cfg.new_vocabulary:
            tokenizer = runs.tokenizer_of(checkpoint)
        scan = common.pick_scan(cfg.scan, device, dtype, cfg.d_state, cfg.headdim or 0)
        data = open_data(cfg.dataset, cfg.data_dir, cfg.block_size, first_here, tokenizer)
    meta, eot = data.meta, runs.end_of_text(cfg, data)
    dropout, times = runs.usual_dropout(cfg, meta["train_tokens"])
    cfg.dropout = dropout if cfg.dropout is None else cfg.dropout
    cfg.compile = common.pick_compile(cfg, device)
    meta_of_first = processes.of_first(lambda: meta, rank, world, device)
    runs.check_data(data, meta_of_first, checkpoint, folder.path)

    # The model
    if checkpoint:
        model = runs.load_model(checkpoint, dropout=cfg.dropout, scan=cfg.scan).to(device)
    elif pretrained:
        runs.fit_vocabulary(model, tokenizer, data, cfg)
    else:
        torch.manual_seed(cfg.seed)
        model = Mamba(runs.config_of(cfg, meta["vocab_size"])).to(device)
    say(f"{device.type}, {dtype}, scan {scan}{', compiled' if cfg.compile else ''}; "
        f"{model.num_params() / 1e6:.2f}M parameters ({cfg.n_layer} layers of {cfg.d_model})")
    say(f"{data.folder}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to "
        f"validate, vocabulary of {meta['vocab_size']:,}")

    # The optimizer, and where the run stands
    if cfg.fsdp:
        processes.share(model)
    optimizer = model.configure_optimizers(cfg.learning_rate, cfg.weight_decay,
                                           (cfg.beta1, cfg.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    run = runs.Run.of(checkpoint or {})
    if checkpoint:
        processes.load_moments(optimizer, checkpoint["optimizer"]["state"])
        if scaler.is_enabled() and checkpoint["scaler"]:    # empty after steps in another dtype
            scaler.load_state_dict(checkpoint["scaler"])
    rows_and_part = cfg.batch_size, cfg.block_size      # of an evaluation
    if cfg.eval_only:
        val_loss = evaluate(model, data.val, *rows_and_part, dtype, eot, cfg.eval_iters)
        say(f"step {run.step}: val loss {runs.in_words(val_loss, meta)}")
        all_loss = evaluate(model, data.val, 1, 2048, dtype, eot)
        say(f"the whole validation text, read once: {runs.in_words(all_loss, meta)}")
    elif run.is_finished(cfg):
        runs.tell_finished(run, cfg, meta, folder.path)
    if cfg.eval_only or run.is_finished(cfg):
        processes.leave(world)
        return 0
    if checkpoint:
        say(f"going on from step {run.step} of {cfg.max_iters}")
        runs.tell_new_schedule(run.step, Config(**checkpoint["config"]), cfg, learning_rate)
    else:
        say(f"{cfg.max_iters} steps, which see the text {times:.1f} times; dropout {cfg.dropout}; "
            f"into {folder.path}")
    if device.type == "cpu":
        common.use_threads(cfg.threads, checkpoint and checkpoint.get("threads"), threads)

    # How gradients are computed: as the model stands there, compiled, or replayed as CUDA graphs
    if cfg.checkpointing:
        for layer in model.backbone["layers"]:
            layer.forward = functools.partial(recomputed, layer.forward, use_reentrant=False)
    carried = model.init_state(cfg.batch_size // world) if cfg.carry_state else None
    # A graph can hold neither float16's scale, which is made at the first loss, nor checkpointing,
    # which sets the random state.
    graphs = scan == "triton" and dtype != "float16" and not cfg.checkpointing and not cfg.fsdp
    batch = get_batch(data.train, cfg, 0, 0, rank, world, device)   # to try it with
    gradients = common.fastest(
        lambda forward: gradients_by(forward, optimizer, scaler, cfg, dtype, eot, carried),
        model, batch, cfg.compile, graphs)
    first_gradients, more_gradients = gradients[0], gradients[-1]
    if carried:     # undo what the trials left in it
        before = runs.carried_before(checkpoint, cfg, model)
        runs.put(carried, [[t[rank::world] for t in layer] for layer in before])

    def save(best):
        """Saves all that a run needs to go on from here; best: whether these weights are."""
        weights, moments = model.state_dict(), optimizer.state_dict()
        if cfg.fsdp:
            weights, moments = processes.whole((weights, moments), master)
        everything = {"model": weights, "model_config": asdict(model.config), "meta": meta,
                      **asdict(run), "threads": torch.get_num_threads(), "config": asdict(cfg),
                      "carried": carried and processes.gather(carried, world),
                      "optimizer": moments, "scaler": scaler.state_dict()}
        if master:
            runs.save(folder, everything, best)

    # The loop
    if master and checkpoint:
        folder.go_on_from(checkpoint["path"])
    log = runs.Log(folder, run, runs.tokens_per_step(cfg), writes=master)
    saved_step = run.step if checkpoint else None
    del checkpoint      # the run goes on from it: nothing asks for it again, and it is large
    bar = tqdm(total=cfg.max_iters, initial=run.step, unit="step", dynamic_ncols=True,
               disable=None if master else True)
    with runs.Stop(world) as stop, bar:
        while True:
            if run.evaluation_is_due(cfg):
                # with --fsdp all processes have to read all of it: a layer needs them all
                val_loss = evaluate(model, data.val, *rows_and_part, dtype, eot, cfg.eval_iters,
                                    not cfg.fsdp and stop)
                if stop.agreed(device):
                    break
                runs.check_finite(run.step, saved_step, val_loss=val_loss)
                best = run.note(val_loss)
                if device.type == "cpu":    # other programs come and go
                    common.use_threads(cfg.threads, None, threads)
                log.add(run, learning_rate(max(run.step - 1, 0), cfg), val_loss)
                save(best)
                saved_step = run.step
                say(f"step {run.step}: val loss {runs.in_words(val_loss, meta)}{', best' * best}")
                runs.tell_overfitting(run, val_loss)
                if cfg.sample_tokens and (master or cfg.fsdp):  # in which all must take part
                    prompt = data.val[:1].tolist()
                    say(a_sample(model, data.tokenizer, prompt, cfg, dtype, run.step))
                log.go_on(run.step)
                if run.is_finished(cfg) and run.step < cfg.max_iters:
                    say(f"no better for {run.since_best} evaluations: --patience ends the run")
            if run.is_finished(cfg):
                break

            # Dropout too is a function of seed, step and rank: no random state has to be kept.
            torch.manual_seed(common.seed_of(cfg.seed, run.step, rank))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.step, cfg)
            total = torch.zeros((), device=device)
            for micro in range(cfg.gradient_accumulation_steps):
                x, y = get_batch(data.train, cfg, run.step, micro, rank, world, device)
                total += more_gradients(x, y) if micro else first_gradients(x, y)
            if world > 1 and not cfg.fsdp:      # which averages them itself
                processes.average_gradients(model, world)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            run.step += 1
            bar.update()

            stopping, log_now = stop.agreed(device), run.step % cfg.log_interval == 0
            if stopping or log_now or run.evaluation_is_due(cfg):
                run.train_loss = processes.sum_over_all(total, world) / world
                # a scaler skips a step whose gradients are not finite
                norm = 0 if scaler.is_enabled() else processes.whole(norm).item()
                runs.check_finite(run.step, saved_step, loss=run.train_loss, gradient_norm=norm)
            if log_now:
                log.tell(run, learning_rate(run.step - 1, cfg), cfg, meta, bar)
            if stopping:
                break

        # Stopped between two evaluations. best.pt stays: nobody has evaluated these weights.
        if run.step != saved_step:
            save(best=False)
        processes.leave(world)

    # Goodbye
    if stop and not run.is_finished(cfg):
        again = " (without --init_from=scratch)" if given.get("init_from") == "scratch" else ""
        say(f"stopped after step {run.step} of {cfg.max_iters}, saved in {folder.path}; the same "
            f"command goes on from there{again}")
        return 128 + stop.signal
    say(f"done: {runs.best_of(run, meta, folder.path)}")
    return 0

if __name__ == "__main__":
    common.run(main, Config, interrupt=common.end_at_once)
