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
import re
import signal
import sys
import urllib.parse
import zipfile
from pathlib import Path

from tqdm import tqdm

# ---- Running a script ----------------------------------------------------------------------------

class Problem(Exception):
    """Something the person can put right: shown as one line, without a traceback."""

def run(main, Config):
    """Calls main(cfg, given): the Config that the command line says, and a dict of the flags in it.
    What the person can put right (a Problem, a full disk, too little memory) ends the script with
    one line on stderr and status 2, Ctrl-C with status 130."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):     # a console without a character shows the others
        stream.reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # set aside while torch was imported
    # or huggingface_hub tells of each attempt without a network, before one line here says it all
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # What is wrong with flags or data is so in all processes of torchrun; one of a machine says it.
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    status = 2
    try:
        return main(*parse_flags(Config))
    except Problem as problem:
        message = first_here and str(problem)
    except KeyboardInterrupt:
        message, status = first_here and "interrupted", 130
    except ModuleNotFoundError as error:
        message = f"this needs a package: pip install {error.name}"
    except OSError as error:  # disk full, no permission, ...
        message = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        if nobody_reads(error):
            message, status = None, 141  # as a program that SIGPIPE ends
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # torch's words for it
            message = "not enough memory; try a smaller model, --batch_size or --block_size"
        elif "by peer" in str(error):  # gloo's words for a process at the other end that is gone
            message = first_here and "another process of this run has ended"
        else:
            raise
    finally:    # from here on Ctrl-C ends Python at once, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if message:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)

def nobody_reads(error):
    """Whether this OSError is that of a pipe with nobody at its end, as in `train.py | head -1`.
    If so, what is still written to stdout gets lost, without another error."""
    on_windows = (os.name, error.errno, error.filename) == ("nt", errno.EINVAL, None)
    if not (isinstance(error, BrokenPipeError) or on_windows):
        return False
    # or Python fails again where it flushes at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True

def say(line):
    """Prints a line, above a progress bar if there is one; under torchrun only the first process
    does. A line that nobody reads is lost, and say.unread is True from then on."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        tqdm.write(line)
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

# ---- Flags: each field of a script's Config dataclass is one -------------------------------------

def flag(default, help, least=None, below=math.inf):
    """A field of a Config: its default, its line in --help, and for a number that has bounds the
    least that it may be and what it must be below."""
    bounds = None if least is None else (least, below)
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})

def finite(text):
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
KINDS = {   # how the text of a flag is read, and what is said where that cannot be
    "int": (int, "a whole number"), "float": (finite, "a number"), "str": (str, "text"),
    "bool": (lambda text: BOOLS[text.lower()], "True or False")}

def parse_flags(Config, argv=None):
    """Reads --key=value, --key value and, for a bool, --key alone; by default from the command
    line. Returns (Config, dict of the flags that were given). --help prints all flags and ends.
    Problem: an unknown flag, a value that does not fit its type."""
    words = list(sys.argv[1:] if argv is None else argv)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if "--help" in words or "-h" in words:
        show_help(Config)
        sys.exit(0)
    given = {}
    while words:
        word, equals, text = words.pop(0).partition("=")
        name = word[2:]
        if not word.startswith("--"):
            hint = f", as --{next(iter(fields))}={word}" if word[:1] != "-" else ""
            raise Problem(f"unexpected argument '{word}'; flags are written --name=value{hint}")
        if name not in fields:
            hint = nearest(name, fields, "--") or "; --help lists those there are"
            raise Problem(f"unknown flag {word}{hint}")
        kind, *optional = fields[name].type.split(" | ")  # "int | None" -> "int", ["None"]
        (read, what), bounds = KINDS[kind], fields[name].metadata["bounds"]
        if not equals:
            if kind == "bool" and not (words and words[0].lower() in BOOLS):
                text = "True"
            elif not words or words[0].startswith("--"):
                raise Problem(f"{word} needs a value: {what}")
            else:
                text = words.pop(0)
        if bounds:
            what += f" from {bounds[0]} on" + f" and below {bounds[1]}" * (bounds[1] < math.inf)
        try:
            value = None if optional and text.lower() == "none" else read(text)
            if bounds and value is not None and not bounds[0] <= value < bounds[1]:
                raise ValueError
        except (KeyError, ValueError):
            raise Problem(f"{word} takes {what}, not '{text}'") from None
        given[name] = value
    return Config(**given), given

def show_help(Config):
    """Prints the docstring of the script and a line for each flag. Defaults that depend on the
    device stand in Config.presets, if it has any: {device: {name of a field: value}}."""
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
    last = Path(dataset).resolve().name
    if is_url(dataset):
        url = urllib.parse.urlparse(dataset)
        last = url.path.rstrip("/").split("/")[-1] or url.netloc.replace(":", "-")
    stem = last.removesuffix(".txt")
    if not stem:
        raise Problem(f"'{dataset}' does not make a name for a folder; prepare it with "
                      "prepare_data.py and a --name")
    return stem if tokenizer == "char" else f"{stem}-{Path(tokenizer).stem}"

# ---- The machine: device, dtype and scan for what the flags say ----------------------------------

def pick_device(name):
    """The torch.device of this name, "auto" being the best there is. Problem: it is not there."""
    import torch
    counts = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
              "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    if not re.fullmatch(rf"({'|'.join(counts)})(:\d\d?)?", name):
        raise Problem(f"--device takes cpu, cuda, cuda:1, mps or auto, not '{name}'")
    device = torch.device(name)
    if (device.index or 0) >= (count := counts[device.type]):
        raise Problem(f"--device={name}: torch {torch.__version__} finds {count} such devices; "
                      "use --device=cpu")
    if device.type == "mps":
        check_against_cpu(device)
    return device

def check_against_cpu(device):
    """One small forward and backward pass there and on the CPU: some releases of PyTorch compute
    wrong on MPS, in silence. Problem: the two differ."""
    import torch

    from mamba import Mamba, MambaConfig
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=64, d_model=32, n_layer=2))
    idx = torch.randint(64, (3, 40))

    def results(where):
        model.to(where).zero_grad()
        loss = model(idx.to(where), idx.to(where).roll(-1, 1))[1]
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        return torch.cat([loss.detach()[None], *gradients]).cpu()
    expected, got = results("cpu"), results(device)
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 1e-3:
        raise Problem(f"torch {torch.__version__} computes wrong on {device} (gradients are off by "
                      f"{error:.1e}); update torch, or use --device=cpu")

def pick_dtype(name, device):
    """The name of a dtype for --dtype. Problem: an unknown one."""
    import torch
    if name not in ("float32", "bfloat16", "float16", "auto"):
        raise Problem(f"--dtype takes float32, bfloat16, float16 or auto, not '{name}'")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"

def pick_scan(name, device, dtype, d_state):
    """The scan that runs there for this --scan. Problem: one that cannot run."""
    import torch

    from mamba import scan_method
    try:
        example = torch.empty(0, device=device, dtype=getattr(torch, dtype))
        return scan_method(name, example, d_state)
    except ValueError as error:
        raise Problem(f"--scan={name}: {error}") from None

def autocast(device, dtype):
    """Mixed precision, if dtype is not float32. No copies of weights are kept for a second use:
    there is none, and a recorded CUDA graph would find them outdated."""
    import torch
    enabled = dtype != "float32"
    return torch.autocast(device.type, getattr(torch, dtype), enabled=enabled, cache_enabled=False)

def repeatable():
    """The same bits from the same input on CUDA too, where the gradient of an embedding is else
    summed in any order."""
    import torch
    torch.use_deterministic_algorithms(True, warn_only=True)
    # This one helps to find mistakes, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False

# ---- Files: written whole or not at all, and one run in a folder ---------------------------------

def write_whole(path, write, previous=None):
    """Calls write(file) for a file that gets this name only when all of it is on the disk: a crash,
    a full disk or a kill at any moment leaves what was there. A link stays a link.
    previous: where what was there is moved to, in the same folder; a link is then moved itself.
    Problem: it could not be written."""
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
    """An open file that keeps a second run out of folder as long as it is open: the system closes
    it however this process ends. Problem: another run is in there."""
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

# ---- Checkpoints ---------------------------------------------------------------------------------

@contextlib.contextmanager
def reading(path, kind):
    """Whatever is raised while a file of this kind, such as "a checkpoint", is read and checked
    becomes a Problem of one line about it: what is cut off or garbled may fail in any way."""
    try:
        yield
    except MemoryError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001
        raise Problem(f"{path} is damaged or not {kind} ({type(error).__name__})") from None

def read_whole(path, device="cpu"):
    """What torch.save wrote, after a look at the checksums, which torch.load does not take."""
    import torch
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location=device, weights_only=True)

def load_checkpoint(*paths):
    """The first of these files that is a whole checkpoint, on the CPU: a dict, its file under
    "path". Those before it that are damaged are named on stderr. Problem: there is none."""
    problems = []
    for path in filter(Path.exists, paths):
        try:
            with reading(path, "a checkpoint"):
                checkpoint = {**read_whole(path), "path": path}
                if not {"model", "model_config", "meta", "step"} <= checkpoint.keys():
                    raise ValueError
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
    from mamba import Mamba, MambaConfig
    try:
        model = Mamba(MambaConfig(**{**checkpoint["model_config"], **changes}))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:  # the last in a line for each tensor
        reason = str(error).split("\n\t")[-1]
        raise Problem(f"config and weights of the checkpoint do not fit: {reason}") from None
    return model
