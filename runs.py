"""
A run of train.py: how it begins or goes on, its folder, its checkpoints and their checks, its log,
and how it stops.
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from common import Problem, as_flag, check_kinds, check_tensor, reading, say, write_whole
from mamba import Mamba, MambaConfig
from mamba_files import ON_HUB, check_usable, checkpoint_of, read_tokenizer, read_whole
from tokens import load_tokenizer

# what the shapes of the weights depend on
SHAPE = ("layer", "d_model", "n_layer", "d_state", "headdim", "d_conv", "expand", "d_intermediate")
# what a run cannot change, each with a function that makes its values comparable
FIXED = {**dict.fromkeys(SHAPE, str), "dataset": common.dataset_name, "init_from": os.path.abspath,
         "new_vocabulary": bool}
# what belongs to the command or the machine, not to the run: never taken from a checkpoint
ONE_OFF = ("eval_only", "out_dir", "cache_dir", "device", "dtype", "compile", "scan",
           "checkpointing", "threads")
# where in the text a step is with --carry_state: if one of these changes, the state begins anew
PLACE = ("carry_state", "bptt", "batch_size", "block_size", "gradient_accumulation_steps")
HEADS = {"d_state": 64}     # for layers with heads, mamba2 and mamba3: their states can be larger
LOWER_RATE = {("cuda", "mamba2"): {"learning_rate": 2e-3}}      # than the others train best with
FINE_TUNING = {"dropout": 0.0, "learning_rate": 1e-4}   # for weights that are already good
START_OVER = "start over with --init_from=scratch, or use another --out_dir"

# ---- How it begins -------------------------------------------------------------------------------

def settings(cfg, given, out_dir):
    """(the Config of the run, the checkpoint that it goes on from or None). Problem: the checkpoint
    is damaged, or one of another run than the flags say."""
    if cfg.layer not in ("mamba", "mamba2", "mamba3"):
        raise Problem(f"--layer takes mamba, mamba2 or mamba3, not '{cfg.layer}'")
    begun = [path for path in (out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt") if path.exists()]
    if cfg.eval_only and cfg.init_from == "scratch":
        raise Problem("--eval_only looks at what was trained, and --init_from=scratch begins anew: "
                      "give one of the two")
    if cfg.eval_only and cfg.init_from == "resume" and not begun:
        raise Problem(f"--eval_only needs a checkpoint, and {out_dir} has none; train first, or "
                      "give its --out_dir")
    # torchrun, which starts all anew after a failure, has begun it already
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    checkpoint = None
    if begun and (cfg.init_from != "scratch" or again):
        checkpoint = load_checkpoint(*begun, Config=type(cfg))
        cfg = go_on_as(given, checkpoint, out_dir, type(cfg))
    check_together(cfg)
    return cfg, checkpoint

def check_together(cfg):
    """Problem: flags of which one needs the other."""
    if cfg.new_vocabulary and cfg.init_from in ("resume", "scratch"):
        raise Problem("--new_vocabulary goes with weights to begin with: --init_from=<folder>")
    if cfg.bptt > 1 and not cfg.carry_state:
        raise Problem("--bptt goes with --carry_state; without it take a longer --block_size")
    if cfg.headdim is not None and cfg.layer == "mamba":
        raise Problem("--headdim goes with --layer=mamba2 or mamba3; Mamba-1 has no heads")

def go_on_as(given, checkpoint, out_dir, Config):
    """The Config of a run that goes on: as in its checkpoint, but for the flags that were given, of
    which those that change something are named. Problem: one of them would make it another run."""
    if "optimizer" not in checkpoint:
        raise Problem(f"{out_dir / 'ckpt.pt'} holds a model but no optimizer, so training cannot "
                      "go on from it")
    before = {k: v for k, v in checkpoint["config"].items() if k not in ONE_OFF}
    before = {"reset_at_eot": False, "layer": "mamba", **before}    # as before there were these
    # "resume" is no wish to change how the run began
    given = {k: v for k, v in given.items() if (k, v) != ("init_from", "resume")}
    changed = [k for k in given if k in before and given[k] != before[k]]
    if wrong := [k for k in changed if k in FIXED and FIXED[k](given[k]) != FIXED[k](before[k])]:
        holds, asked = (" ".join(as_flag(k, flags[k]) for k in wrong) for flags in (before, given))
        advice = "use another --out_dir" if "init_from" in wrong else START_OVER
        raise Problem(f"{out_dir} holds a run with {holds}, not {asked}; {advice}")
    steps = given.get("max_iters")
    if steps and steps < checkpoint["step"] and not given.get("eval_only"):
        raise Problem(f"{out_dir} has done {checkpoint['step']} steps already, more than "
                      f"--max_iters={steps}; {START_OVER}")
    for k in changed:
        say(f"{k}: {before[k]} -> {given[k]}")
    return Config(**{**before, **given})

# ---- What its flags leave open -------------------------------------------------------------------

def fill_in(cfg, device, pretrained):
    """Replaces each None whose default depends on the device. pretrained: whether the run begins
    with weights that are good already; load_pretrained then replaces the shape of the model too."""
    has_heads = cfg.layer != "mamba"
    usual = {**cfg.presets[device.type], **(HEADS if has_heads else {}),
             **LOWER_RATE.get((device.type, cfg.layer), {}),
             **(FINE_TUNING if pretrained else {})}
    for name, value in usual.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if has_heads and cfg.headdim is None:
        cfg.headdim = common.usual_headdim(cfg.expand * cfg.d_model)

def tokens_per_step(cfg):
    return cfg.batch_size * cfg.block_size * cfg.bptt * cfg.gradient_accumulation_steps

def usual_dropout(cfg, tokens):
    """(the dropout for a training text of so many tokens, how many times the run sees them all):
    what is seen often is learned by heart, and for what is seen rarely dropout is a loss."""
    times = cfg.max_iters * tokens_per_step(cfg) / tokens
    return round(min(0.35, max(0.0, 0.05 * (times - 2))), 2), times

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
    return token if cfg.reset_at_eot and (token in data.train or token in data.val) else None

def config_of(cfg, vocab_size):
    """The MambaConfig of a new model. Problem: the flags fit no such model."""
    names = [field.name for field in dataclasses.fields(MambaConfig)]
    options = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
    options["dropout"] = cfg.dropout or 0.0     # None before the data is known
    if cfg.headdim is not None:
        options["headdim"] = cfg.headdim
    try:
        return MambaConfig(vocab_size=vocab_size, **options)
    except ValueError as error:
        raise Problem(f"--layer={cfg.layer}: {error}") from None

# ---- With weights to begin with ------------------------------------------------------------------

def load_pretrained(cfg, given, device):
    """(model, tokenizer) of --init_from; cfg takes over the shape of the model. With
    --new_vocabulary the tokenizer does not matter, and is None. Problem: there is no such model."""
    name, cache_dir = cfg.init_from, cfg.cache_dir or None
    if not (Path(name).is_dir() or checkpoint_of(name) or ON_HUB.fullmatch(name)):
        raise Problem("--init_from takes resume, scratch, a folder (of weights or of a run), or a "
                      f"name such as state-spaces/mamba-130m, not '{name}'")
    if shape := [k for k in SHAPE if k in given]:
        raise Problem(f"--{shape[0]} cannot be chosen: the weights of {name} have a shape of their "
                      "own")
    try:
        model = Mamba.from_pretrained(name, device, torch.float32, cache_dir, dropout=cfg.dropout,
                                      scan=cfg.scan)
        tokenizer = None if cfg.new_vocabulary else load_tokenizer(read_tokenizer(name, cache_dir))
        check_usable(model, tokenizer, name)
    except (ValueError, Problem) as error:
        raise Problem(f"--init_from={name}: {error}") from None
    for k in SHAPE:
        setattr(cfg, k, getattr(model.config, k, None))     # Mamba-1 has no headdim
    return model.train(), tokenizer

def fit_vocabulary(model, tokenizer, data, cfg):
    """Makes the model of --init_from one for the tokens of the data. tokenizer: that of its
    weights; if there is none, the embedding begins anew. Problem: the tokens are not the same."""
    config, needed = model.config, data.tokenizer.vocab_size
    kind = f"{data.meta['tokenizer']['type']} tokenizer of {needed:,}"
    said = f"weights of {cfg.init_from}, whose vocabulary is {config.vocab_size:,}; the data has a"
    if tokenizer is None:
        torch.manual_seed(cfg.seed)
        # not the multiple to which another vocabulary was padded
        padding = MambaConfig.pad_vocab_size_multiple
        model.config = dataclasses.replace(config, vocab_size=needed,
                                           pad_vocab_size_multiple=padding)
        fresh = Mamba(dataclasses.replace(model.config, n_layer=1)).to(model.device)
        model.backbone["embedding"], model.lm_head = fresh.backbone["embedding"], fresh.lm_head
        return say(f"{said} {kind}, whose embedding is learned anew")
    theirs, ours = tokenizer.ids(), data.tokenizer.ids()
    if others := [token for token, i in ours.items() if theirs.get(token) != i]:
        first = min(others, key=ours.get)
        raise Problem(f"{data.folder} has other tokens than {cfg.init_from} ({first!r} for one): "
                      "give --dataset the text itself, which is then prepared in theirs, or learn "
                      "an embedding of these tokens anew by --new_vocabulary")
    say(f"{said} {kind}")
    if needed < config.vocab_size:
        # The weights of the other tokens stay, but what the data does not know is never predicted.
        config.pad_vocab_size_multiple, config.vocab_size = config.padded_vocab_size, needed

# ---- Its folder ----------------------------------------------------------------------------------

class RunFolder:
    """`with RunFolder(path) as folder` makes it and keeps every other run out. If nothing has been
    put into it in the end, it is gone again. folder.path is where it is.
    Problem: another run is in there, or was until just now; it cannot be written into."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        way = (self.path, *self.path.absolute().parents)
        there = next(path for path in way if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise Problem(f"cannot write into {there}; choose another --out_dir")
        self.made, before = way[:way.index(there)], self.saved()
        self.hold(self.path)
        if self.saved() != before:
            raise Problem(f"another run has just saved in {self.path}; the same command goes on "
                          "from there")
        for name in ("ckpt.tmp", "best.tmp", "log.csv.tmp"):    # of a run that was killed
            unfinished = self.path / name
            remove = unfinished.rmdir if unfinished.is_dir() else unfinished.unlink
            with contextlib.suppress(OSError):
                remove()
        return self

    def saved(self):
        return {path: path.stat().st_mtime_ns for path in self.path.glob("*.pt")}

    def hold(self, path):
        self.path, self.lock, self.stat = path, common.lock(path), os.stat(path)

    def go_on_from(self, path):
        """If path is ckpt.prev.pt, the newest is damaged, and must not become the previous one."""
        newest = self.path / "ckpt.pt"
        if path.name == "ckpt.prev.pt":
            if newest.is_dir():
                newest.rmdir()
            os.replace(path, newest)

    def make_again(self):
        """To be called before something is saved: if the folder was renamed or deleted, a new one
        is made, beside what has its name by now."""
        locked = os.fstat(self.lock.fileno())
        if common.is_same(self.path / "lock", locked) or common.is_same(self.path, self.stat):
            return
        before, number = self.path, 2
        while self.path.exists():
            self.path, number = before.with_name(f"{before.name}-{number}"), number + 1
        say(f"{before} was renamed or deleted: from here on this run is saved in {self.path}")
        self.hold(self.path)

    def __exit__(self, *error):
        self.lock.close()
        with contextlib.suppress(OSError):
            if self.made and os.listdir(self.path) == ["lock"]:
                os.unlink(self.path / "lock")
            for path in self.made:
                path.rmdir()    # which removes nothing that is not empty

# ---- Its checkpoints -----------------------------------------------------------------------------

def load_checkpoint(*paths, Config=None):
    """The first of these files that is a whole checkpoint, on the CPU: a dict, its file under
    "path". Those before it that are damaged are named on stderr. Problem: there is none.
    Config: that of train.py, if training shall go on from it."""
    problems = []
    for path in filter(Path.exists, paths):
        try:
            with reading(path, "a checkpoint"):
                checkpoint = {**read_whole(path), "path": path}
                model = check_model(checkpoint)
                if Config and "optimizer" in checkpoint:
                    check_training(checkpoint, model, Config)
        except Problem as problem:
            problems.append(str(problem))
            continue
        for problem in problems:
            print(f"{problem}; using {path}, of step {checkpoint['step']}", file=sys.stderr)
        return checkpoint
    missing = f"no checkpoint at {paths[0]}; train one with: python train.py"
    raise Problem("; ".join(problems) or missing)

def load_model(checkpoint, **changes):
    """The model of a checkpoint, on the CPU. changes: to its config, of what leaves the weights
    alone (scan, dropout). Problem: config and weights do not fit each other."""
    try:
        model = Mamba(MambaConfig(**{**checkpoint["model_config"], **changes}))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:  # the last in a line for each tensor
        reason = str(error).split("\n\t")[-1]
        raise Problem(f"config and weights of the checkpoint do not fit: {reason}") from None
    return model

def check_model(checkpoint):
    """The model of a checkpoint. ValueError or Problem: it does not hold a whole one."""
    check_kinds(checkpoint, model=dict, model_config=dict, meta=dict, step=int)
    if checkpoint["step"] < 0:
        raise ValueError("its step is below 0")
    options, weights = checkpoint["model_config"], checkpoint["model"]
    check_kinds(options, **dict.fromkeys(options, (int, float, str, tuple)))
    check_kinds(options, n_layer=int, vocab_size=int)
    for name, tensor in weights.items():
        check_tensor(name, tensor)
    layers = sum(name.endswith(".mixer.D") for name in weights)
    longest = max((side for tensor in weights.values() for side in tensor.shape), default=0)
    if options["n_layer"] != layers:
        raise ValueError(f"n_layer is {options['n_layer']}, and it has the weights of {layers}")
    for name, value in options.items():
        of_weights = name not in ("n_layer", "chunk_size") and isinstance(value, int)
        if of_weights and value > longest:
            raise ValueError(f"config and weights do not fit: size mismatch for {name}")
    check_kinds(checkpoint["meta"], tokenizer=dict)
    tokenizer = checkpoint["meta"]["tokenizer"]
    check_kinds(tokenizer, type=str)
    check_kinds(tokenizer, **{"chars" if tokenizer["type"] == "char" else "json": str})
    if len(tokenizer.get("chars", "")) not in (0, options["vocab_size"]):
        raise ValueError("alphabet and vocabulary do not fit")
    return load_model(checkpoint)

def check_training(checkpoint, model, Config):
    """ValueError: training cannot go on from what the checkpoint of this model holds."""
    check_kinds(checkpoint, config=dict, optimizer=dict, scaler=dict, best_loss=(int, float),
                evaluated=int, train_loss=(int, float, type(None)))
    check_kinds(checkpoint["meta"], sha256=str)
    check_kinds(checkpoint["optimizer"], state=dict)
    check_kinds(checkpoint["scaler"], **dict.fromkeys(checkpoint["scaler"], (int, float)))
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name, value in checkpoint["config"].items():
        if name not in fields:
            raise ValueError(f"of a newer version: the option {name} is unknown to this one")
        if not common.fits(fields[name], value):
            raise ValueError(f"its {name} is not one that --{name} takes")
    for name in ("since_best", "threads"):  # which older versions do not keep
        if type(count := checkpoint.get(name, 1)) is not int or count < 0:
            raise ValueError(f"its {name} is not a whole number from 0 on")
    groups, moments = model.configure_optimizers(1.0).param_groups, checkpoint["optimizer"]["state"]
    parameters = dict(enumerate(p for group in groups for p in group["params"]))
    if moments and moments.keys() != parameters.keys():
        raise ValueError("its optimizer is one of other parameters")
    for i, of_one in moments.items():
        check_kinds(of_one, step=object, exp_avg=object, exp_avg_sq=object)
        for name, tensor in of_one.items():
            shape = () if name == "step" else parameters[i].shape
            check_tensor(f"{name} of parameter {i}", tensor, shape)
            of_one[name] = tensor.contiguous()      # as the fused step of AdamW takes it
    if (carried := checkpoint.get("carried")) is not None:
        for tensor in (tensor for layer in carried for tensor in layer):
            check_tensor("the carried state", tensor)
        shapes = [[[t.shape for t in layer] for layer in state]
                  for state in (carried, model.init_state(len(carried[0][0])))]
        if shapes[0] != shapes[1]:
            raise ValueError("the carried state has other shapes")

def tokenizer_of(checkpoint):
    """Its tokenizer. Problem: it is damaged."""
    with reading(checkpoint["path"], "a checkpoint"):
        return load_tokenizer(checkpoint["meta"]["tokenizer"])

def check_data(data, meta_of_first, checkpoint, out_dir):
    """Problem: the data are not those of the first process, or not those of the checkpoint."""
    for key, what in (("tokenizer", "another vocabulary"), ("sha256", "another text")):
        if data.meta[key] != meta_of_first[key]:
            raise Problem(f"{data.folder} of this machine has {what} than that of the first one")
        if checkpoint and data.meta[key] != checkpoint["meta"][key]:
            raise Problem(f"the checkpoint in {out_dir} learns {what} than {data.folder}; "
                          f"{START_OVER}")

def carried_before(checkpoint, cfg, model):
    """The state that each row of a batch begins with, where it is carried on: that of the
    checkpoint, if the rows still are at its places in the text."""
    if checkpoint and all(checkpoint["config"].get(k) == getattr(cfg, k) for k in PLACE):
        return checkpoint["carried"]
    return model.init_state(cfg.batch_size)

@torch.no_grad()
def put(state, other):
    """Copies the numbers of another state into this one, which stays where it is in memory."""
    for layer, other_layer in zip(state, other):
        for t, new in zip(layer, other_layer):
            t.copy_(new)

# ---- What changes as it goes ---------------------------------------------------------------------

@dataclasses.dataclass
class Run:
    """How far a run has come, as it stands in its checkpoint."""
    step: int = 0                   # how many are done
    best_loss: float = math.inf     # of the evaluations
    evaluated: int = -1             # the step of the last one
    since_best: int = 0             # how many there were after the best one
    train_loss: float | None = None     # of the last step that was logged

    @classmethod
    def of(cls, checkpoint):
        """As it stands in a checkpoint, where older versions do not keep all of it, or in {}."""
        return cls(**{f.name: checkpoint.get(f.name, f.default) for f in dataclasses.fields(cls)})

    def evaluation_is_due(self, cfg):
        at_one = self.step % cfg.eval_interval == 0 or self.step >= cfg.max_iters
        return at_one and self.step != self.evaluated

    def note(self, val_loss):
        """Notes an evaluation of now. Returns whether it is the best so far."""
        best = val_loss < self.best_loss
        self.evaluated, self.best_loss = self.step, min(val_loss, self.best_loss)
        self.since_best = 0 if best else self.since_best + 1
        return best

    def is_finished(self, cfg):
        ends = self.step >= cfg.max_iters or 0 < cfg.patience <= self.since_best
        return ends and self.step == self.evaluated

def save(folder, checkpoint, best):
    """Writes ckpt.pt, the one before becoming ckpt.prev.pt, and if these weights are the best so
    far, what sample.py needs of them as best.pt. At step 0 nothing stays of a run before."""
    folder.make_again()
    begins, previous = checkpoint["step"] == 0, folder.path / "ckpt.prev.pt"
    if best:
        needed = ("model", "model_config", "meta", "step", "best_loss")
        without_optimizer = {k: checkpoint[k] for k in needed}
        write_whole(folder.path / "best.pt", lambda file: torch.save(without_optimizer, file))
    write_whole(folder.path / "ckpt.pt", lambda file: torch.save(checkpoint, file),
                previous=None if begins else previous)
    if begins:
        previous.unlink(missing_ok=True)
        if not best:
            (folder.path / "best.pt").unlink(missing_ok=True)

TELL = 3    # seconds between two lines on the progress, where no terminal shows a bar
COLUMNS = ("step", "tokens", "train_loss", "val_loss", "learning_rate", "tokens_per_s")
NUMBER = r"\d{1,20}(?:\.\d+)?(?:e[-+]\d+)?"
ROW = re.compile(rf"(\d{{1,20}}),{NUMBER},(?:{NUMBER})?,({NUMBER})?,{NUMBER},{NUMBER}", re.ASCII)

class Log:
    """The rows of log.csv. Of those that are there already, those that run, as its checkpoint has
    it, does not know go when the first new one comes: these steps are done again. writes: whether
    it is kept here, for of several processes one keeps it."""

    def __init__(self, folder, run, tokens_per_step, writes=True):
        self.folder, self.rows, self.whole, damaged = folder, [",".join(COLUMNS)], False, 0
        path, lines, self.writes = folder.path / "log.csv", [], writes
        with reading(path, "a log"):
            if writes and path.exists():
                lines = path.read_bytes().decode(errors="replace").split("\n")
        for line in (line.rstrip("\r") for line in lines):
            row = ROW.fullmatch(line)
            if row and int(row[1]) <= (run.evaluated if row[2] else run.step):
                self.rows.append(row[0])
            damaged += not row and line not in ("", self.rows[0])
        if damaged:
            say(f"{path}: {damaged} damaged {'row' if damaged == 1 else 'rows'} left out")
        self.tokens_per_step, self.speed, self.told = tokens_per_step, 0, time.perf_counter()
        self.go_on(run.step)

    def go_on(self, step):
        """From here on the next speed is measured, and not over what came before."""
        self.clock, self.clock_step = time.perf_counter(), step

    def add(self, run, rate, val_loss=""):
        """A row. rate: the learning rate of the last step."""
        if not self.writes:
            return
        values = run.step, run.step * self.tokens_per_step, run.train_loss, val_loss, rate
        self.folder.make_again()
        path = self.folder.path / "log.csv"
        self.rows.append(",".join("" if v is None else str(v) for v in (*values, self.speed)))
        if self.whole and path.exists():
            with open(path, "a", newline="\n") as file:
                print(self.rows[-1], file=file)
        else:
            text = "\n".join([*self.rows, ""])
            write_whole(path, lambda file: file.write(text.encode()))
            self.whole = True

    def tell(self, run, rate, cfg, meta, bar):
        """A row, with the speed since the last one. A terminal shows it beside the bar; where there
        is none, every few seconds a line does."""
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        self.speed = round((run.step - self.clock_step) * self.tokens_per_step / seconds)
        self.go_on(run.step)
        self.add(run, rate)
        if not sys.stdout.isatty() and self.clock > self.told + TELL:
            left = (cfg.max_iters - run.step) * self.tokens_per_step / max(self.speed, 1)
            say(f"step {run.step} of {cfg.max_iters}: loss {in_words(run.train_loss, meta)}, "
                f"{self.speed:,} tokens/s, {tqdm.format_interval(left)} left")
            self.told = self.clock
        bar.set_postfix(loss=f"{run.train_loss:.3f}", tok_s=f"{self.speed:,}")

class Stop:
    """Within `with Stop(world) as stop`, stop is true once one of SIGNALS came, or nobody reads
    what is printed. The handlers only note it: to print, lock or raise in the middle of anything
    may fail. After the first signal one more Ctrl-C does what it did before, which in a script is
    to stop at once; not under torchrun, which passes on what the processes may have got already."""
    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")    # Windows lacks two of them

    def __init__(self, world):
        self.signal, self.told, self.alone, self.before = 0, False, world == 1, {}

    def __enter__(self):
        in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
        for name in filter(vars(signal).get, self.SIGNALS) if in_main else ():
            number = getattr(signal, name)
            handler = signal.getsignal(number)
            by_nohup = name == "SIGHUP" and handler is signal.SIG_IGN
            if handler is not None and not by_nohup:    # None: one of C, which cannot be put back
                self.before[number] = handler
                signal.signal(number, self.receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        self.signal = self.signal or number
        if self.alone and signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __bool__(self):
        if say.unread and not self.signal:
            self.signal = 13    # SIGPIPE, which Windows does not have
        return self.signal != 0

    def agreed(self, device):
        """True on all processes at the same step once one of them was told to stop."""
        number = self.signal if self else 0
        if not self.alone:
            first = torch.tensor(number, device=device)
            dist.all_reduce(first, dist.ReduceOp.MAX)
            number = int(first)
            self.signal = self.signal or number     # one that came meanwhile is for the next time
        if number and not self.told:
            say(f"stopping after this step{'; once more to stop at once' * self.alone}")
            self.told = True
        return number != 0

# ---- What it tells -------------------------------------------------------------------------------

def in_words(loss, meta):
    """A loss. Bits for a piece of text compare between tokenizers; how many bytes a token has is
    that of the validation text."""
    bits = loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
    return f"{loss:.4f} nats per token, {bits:.3f} bits per byte"

def best_of(run, meta, out_dir):
    return (f"best val loss {in_words(run.best_loss, meta)}, in {out_dir}. To write with it: "
            f"python sample.py {as_flag('out_dir', out_dir)}")

def tell_finished(run, cfg, meta, out_dir):
    """Says how a run goes on that had come to its end before."""
    more = f"--max_iters={2 * run.step}" if run.step >= cfg.max_iters else "--patience=0"
    say(f"{out_dir} is finished: {run.step} steps, {best_of(run, meta, out_dir)}\n"
        f"Go on with {more}, or start over with --init_from=scratch")

def check_finite(step, saved_step, **values):
    """Problem if one of the values is not a finite number: the run is lost from here on."""
    if not all(map(math.isfinite, values.values())):
        seen = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        kept = "" if saved_step is None else f"the checkpoint of step {saved_step} is kept. "
        raise Problem(f"training diverged at step {step}: {seen}; {kept}"
                      "Try a lower --learning_rate")

def tell_new_schedule(step, before, cfg, learning_rate):
    """Says what the learning rate does where the flags of a run that goes on changed its course."""
    old, new, last = (learning_rate(at, c) for at, c in ((step, before), (step, cfg),
                                                         (cfg.max_iters, cfg)))
    if old != new:
        say(f"learning rate: {new:.3g} from step {step} on, where it would have been {old:.3g}; "
            f"{last:.3g} at step {cfg.max_iters}; --learning_rate and --min_lr can say otherwise")

def tell_overfitting(run, val_loss):
    """Says it once: some evaluations after the best one, while the loss in training is lower."""
    if run.since_best == 3 and run.train_loss < val_loss:
        say("for 3 evaluations validation was worse than its best, while the loss in training is "
            "lower: the model learns this text by heart. More text helps, a higher --dropout or a "
            "smaller model; best.pt is from before")
