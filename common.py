"""
What the scripts share: flags, errors of one line, device and dtype, whole files, checkpoints.

torch and mamba.py are imported only in the functions that need them: prepare_data.py does without.
"""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import math
import os
import pickle
import signal
import sys
import urllib.parse
import zipfile
from pathlib import Path

from tqdm import tqdm

# Running a script


class Problem(Exception):
    """Something the person can put right: shown as one line, without a traceback."""


def run(main, Config):
    """
    Calls main(cfg, given): the Config that the command line says, and a dict of the flags in it.

    What the person can put right (a Problem, a full disk, too little memory) ends the script with
    one line on stderr and status 2. Ctrl-C ends it with status 130.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        # a console without a character still shows the others; what a pipe does not take fails
        # where it is printed
        getattr(sys, name).reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # set aside while torch was imported
    # or huggingface_hub tells of each attempt without a network, before one line here says it all
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Under torchrun what is wrong with the flags or the data is so in every process, and one of
    # each machine says it.
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return main(*parse_flags(Config))
    except Problem as problem:
        message, status = first_here and str(problem), 2
    except (MemoryError, RuntimeError) as error:
        if "by peer" in str(error):  # gloo's words for a process at the other end that is gone
            message, status = first_here and "another process of this run has ended", 2
        elif isinstance(error, MemoryError) or "memory" in str(error):  # torch's words for it
            message = "not enough memory; try a smaller model, --batch_size or --block_size"
            status = 2
        else:
            raise
    except OSError as error:  # disk full, no permission, ...
        parts = [str(part) for part in (error.filename, error.strerror or error) if part]
        message, status = ": ".join(parts), 2
        if nobody_reads(error):
            message, status = None, 141  # as a program that SIGPIPE ends
    except ModuleNotFoundError as error:
        message, status = f"this needs a package: pip install {error.name}", 2
    except KeyboardInterrupt:
        message, status = first_here and "interrupted", 130
    finally:
        # from here on Ctrl-C ends Python at once, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if message:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def nobody_reads(error):
    """
    Whether this OSError is that of a pipe with nobody at its end, as in `train.py | head -1`.
    If so, what is still written to stdout gets lost, without another error.
    """
    on_windows = (os.name, error.errno, error.filename) == ("nt", errno.EINVAL, None)
    if not (isinstance(error, BrokenPipeError) or on_windows):
        return False
    # or Python fails again where it flushes at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def say(*words):
    """
    Prints a line, above a progress bar if there is one. Under torchrun only the first process does.
    A line that nobody reads is lost, and say.unread is True from then on.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        tqdm.write(" ".join(str(word) for word in words))
        sys.stdout.flush()
    except OSError as error:
        if not nobody_reads(error):
            raise
        say.unread = True


say.unread = False


def progress(total, what, done=0):
    """A bar over bytes, on a terminal, for what takes long enough to look at."""
    quick = total is not None and total <= 4e6
    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, leave=False,
                disable=True if quick else None)


def works_here(what, attempt):
    """Whether attempt(), which needs `what`, works on this machine. If not, one line says so."""
    try:
        attempt()
        return True
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, an unknown device, ...
        say(f"{what} does not work here ({type(error).__name__}); going on without it")
        return False


# Flags: each field of a script's Config dataclass is one


def flag(default, help):
    """A field of a Config: its default and its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help})


KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "text"}
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_flags(Config, argv=None):
    """
    Reads --key=value, --key value and, for a bool, --key alone; by default from the command line.

    Returns (Config, dict of the flags that were given). Problem: an unknown flag, a value that does
    not fit its type. --help prints all flags and ends the script.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if "--help" in words or "-h" in words:
        show_help(Config)
        sys.exit(0)
    given = {}
    while words:
        word, equals, text = words.pop(0).partition("=")
        if not word.startswith("--"):
            hint = f", as --{next(iter(fields))}={word}" if word[:1] != "-" else ""
            raise Problem(f"unexpected argument '{word}'; flags are written --name=value{hint}")
        name = word[2:]
        if name not in fields:
            hint = nearest(name, fields, "--") or "; --help lists those there are"
            raise Problem(f"unknown flag {word}{hint}")
        kind, *optional = fields[name].type.split(" | ")  # "int | None" -> "int", ["None"]
        if not equals:
            if kind == "bool" and not (words and words[0].lower() in BOOLS):
                text = "True"
            elif not words or words[0].startswith("--"):
                raise Problem(f"{word} needs a value: {KINDS[kind]}")
            else:
                text = words.pop(0)
        given[name] = None if optional and text.lower() == "none" else read_value(word, kind, text)
    return Config(**given), given


def read_value(flag, kind, text):
    """The value of this kind that the text says, for a flag. Problem: it says none."""
    try:
        if kind == "bool":
            return BOOLS[text.lower()]
        value = {"int": int, "float": float, "str": str}[kind](text)
        if kind == "float" and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        raise Problem(f"{flag} takes {KINDS[kind]}, not '{text}'") from None


def show_help(Config):
    """
    Prints the docstring of the script and a line for each flag. Defaults that depend on the device
    stand in Config.presets, {device: {name of a field: value}}, if there are any.
    """
    presets = getattr(Config, "presets", {})
    print(f"{(sys.modules[Config.__module__].__doc__ or '').strip()}\n")
    for field in dataclasses.fields(Config):
        default, help = field.default, field.metadata.get("help", "")
        by_device = [str(preset[field.name]) for preset in presets.values() if field.name in preset]
        if by_device:
            default = "|".join(by_device)
            help += f" (by default on {'|'.join(presets)})"
        print(f"  --{f'{field.name}={default}':<32} {field.type.split(' | ')[0]:<6} {help}")


def nearest(word, known, prefix=""):
    """"; did you mean ...?" with the word among those known that is most like this one, or ""."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{match[0]}?" if match else ""


def is_url(dataset):
    return dataset.startswith(("http://", "https://"))


def dataset_name(dataset, tokenizer="char", name=""):
    """The folder under data_dir: name if given, else from both others, as in shakespeare-bpe."""
    if name:
        return name
    if is_url(dataset):
        url = urllib.parse.urlparse(dataset)
        last = url.path.rstrip("/").split("/")[-1] or url.netloc.replace(":", "-")
    else:
        last = Path(dataset).resolve().name
    stem = last.removesuffix(".txt")
    if not stem:
        raise Problem(f"'{dataset}' does not make a name for a folder; prepare it with "
                      "prepare_data.py and a --name")
    return stem if tokenizer == "char" else f"{stem}-{Path(tokenizer).stem}"


# The machine: device, dtype and scan for what the flags say


def pick_device(name):
    """The torch.device of this name, "auto" being the best there is. Problem: it is not there."""
    import torch
    on_mac = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if on_mac else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Problem(f"--device={name} is not a device; use cpu, cuda, mps or auto") from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(on_mac)}
    if device.type not in counts:
        raise Problem(f"--device={name} is not supported; use cpu, cuda, mps or auto")
    if (device.index or 0) >= (count := counts[device.type]):
        raise Problem(f"--device={name}: torch {torch.__version__} finds {count} such devices; "
                      "use --device=cpu")
    if device.type == "mps":
        check_against_cpu(device)
    return device


def check_against_cpu(device):
    """
    One small forward and backward pass there and on the CPU: some releases of PyTorch compute wrong
    on MPS, in silence. Problem: the two differ.
    """
    import torch

    from mamba import Mamba, MambaConfig
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=64, d_model=32, n_layer=2))
    idx = torch.randint(64, (3, 40))
    results = []
    for where in ("cpu", device):
        model.to(where).zero_grad()
        loss = model(idx.to(where), idx.to(where).roll(-1, 1))[1]
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        results.append(torch.cat([loss.reshape(1), *gradients]).detach().cpu())
    expected, got = results
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 1e-3:
        raise Problem(f"torch {torch.__version__} computes wrong on {device} (gradients are off by "
                      f"{error:.1e}); update torch, or use --device=cpu")


def pick_dtype(name, device):
    """The name of a dtype for --dtype. Problem: an unknown one."""
    import torch
    if name == "auto":
        if device.type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if name not in ("float32", "bfloat16", "float16"):
        raise Problem(f"--dtype takes float32, bfloat16, float16 or auto, not '{name}'")
    return name


def pick_scan(name, device, dtype, d_state):
    """The scan that runs there for this --scan. Problem: one that cannot run."""
    import torch

    from mamba import scan_method
    example = torch.empty(0, device=device, dtype=getattr(torch, dtype))
    try:
        return scan_method(name, example, d_state)
    except (ValueError, KeyError) as error:
        raise Problem(str(error)) from None


def autocast(device, dtype):
    """
    Mixed precision, if dtype is not float32. No copies of weights are kept for a second use: there
    is none, and a recorded CUDA graph would find them outdated.
    """
    import torch
    enabled = dtype != "float32"
    return torch.autocast(device.type, getattr(torch, dtype), enabled=enabled, cache_enabled=False)


def repeatable():
    """
    The same bits from the same input on CUDA too, where the gradient of an embedding is else summed
    in any order.
    """
    import torch
    torch.use_deterministic_algorithms(True, warn_only=True)
    # This one helps to find mistakes, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False


# Files: written whole or not at all, and one run in a folder


def write_whole(path, write, previous=None):
    """
    Calls write(file) for a file that gets this name only when all of it is on the disk: a crash, a
    full disk or a kill at any moment leaves what was there. A link stays a link.
    previous: where what was there is moved to, in the same folder; a link is then moved itself.
    Problem: it could not be written.
    """
    unfinished = None
    try:
        target = path if previous else os.path.realpath(path)
        if os.path.exists(target) and not os.path.isfile(target):
            raise ValueError("it is there, and not a file")
        unfinished = f"{target}.tmp"
        with open(unfinished, "wb") as file:
            write(file)
            flush_to_disk(file)
        if previous and os.path.exists(target):
            os.replace(target, previous)
        os.replace(unfinished, target)
    except (OSError, RuntimeError, ValueError) as error:
        # torch.save hides what the disk said behind a RuntimeError; a NUL in a name is a ValueError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise Problem(f"could not write {path}: {reason}; "
                      "what was saved before is untouched") from None
    finally:
        if unfinished is not None:
            with contextlib.suppress(OSError, ValueError):  # in place, or it could not be opened
                os.unlink(unfinished)


def flush_to_disk(file):
    file.flush()
    os.fsync(file.fileno())


def lock(folder):
    """
    An open file that keeps a second run out of folder as long as it is open: the system closes it
    however this process ends. Problem: another run is in there.
    """
    file = open(folder / "lock", "a")  # noqa: SIM115
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Problem(f"another run is training in {folder}; wait until it ends, or use another "
                      "--out_dir") from None
    except OSError as error:  # a network file system without locks
        say(f"cannot lock {folder} ({error.strerror}): nothing will stop a second run in there "
            "from overwriting this one")
    return file


# Checkpoints


# what read_whole raises for a file that is cut off, garbled or something else altogether
UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, EOFError, AttributeError,
              pickle.UnpicklingError, zipfile.BadZipFile)


def read_whole(path, device="cpu"):
    """What torch.save wrote, after a look at the checksums, which torch.load does not take."""
    import torch
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location=device, weights_only=True)


def load_checkpoint(*paths):
    """
    The first of these files that is a whole checkpoint, on the CPU: a dict, its file under "path".
    Those before it that are damaged are named on stderr. Problem: there is none.
    """
    reasons = []
    for path in paths:
        if not path.exists():
            continue
        try:
            checkpoint = read_whole(path)
            needed = {"model", "model_config", "meta", "step"}
            if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
                raise ValueError("it holds something else")
        except UNREADABLE as error:
            reasons.append(f"{path} is damaged or not a checkpoint ({type(error).__name__})")
            continue
        for reason in reasons:
            print(f"{reason}; using {path}, of step {checkpoint['step']}", file=sys.stderr)
        return {**checkpoint, "path": path}
    missing = f"no checkpoint at {paths[0]}; train one with: python train.py"
    raise Problem("; ".join(reasons) or missing)


def load_model(checkpoint, **changes):
    """
    The model of a checkpoint, on the CPU. changes: to its config, of what leaves the weights alone
    (scan, dropout). Problem: config and weights do not fit each other.
    """
    from mamba import Mamba, MambaConfig
    try:
        model = Mamba(MambaConfig(**{**checkpoint["model_config"], **changes}))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError) as error:
        raise Problem(f"the checkpoint does not describe a model: {error}") from None
    except RuntimeError:
        raise Problem("the weights in the checkpoint are not of the shape that its config "
                      "says") from None
    return model
