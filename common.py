"""
What the scripts share: flags, errors of one line, device and dtype, files whole or not at all.

torch and mamba.py are imported only in the functions that need them: prepare_data.py does without.
"""
from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import math
import os
import platform
import re
import select
import shlex
import signal
import sys
import threading
import time
import urllib.parse
from pathlib import Path

from tqdm import tqdm

# ---- Running a script ----------------------------------------------------------------------------

class Problem(Exception):
    """Something the person can put right: shown as one line, without a traceback."""

def run(main, Config, interrupt=signal.default_int_handler):
    """Calls main(cfg, given): the Config that the command line says, and a dict of the flags in it.
    What the person can put right (a Problem, a full disk, too little memory) ends the script with
    one line on stderr and status 2, Ctrl-C with status 130; main may return a status of its own.
    interrupt: the handler of Ctrl-C. In a notebook handlers are left as they are."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # those of a notebook have no such thing
            # Files and pipes get UTF-8; a console without a character shows the others.
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace", line_buffering=True)
    # Whoever sits at a prompt goes on in this process: IPython, a notebook, python -i.
    ours = not hasattr(sys, "ps1") and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)  # set aside while torch was imported
    # or huggingface_hub tells of each attempt without a network, before one line here says it all
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    message, status, say.unread = None, 2, False
    try:
        status = main(*parse_flags(Config)) or (141 if say.unread else 0)
    except Problem as problem:  # the same in all processes of torchrun: one of a machine says it
        message = is_first_here() and str(problem)
    except KeyboardInterrupt:
        message, status = is_first_here() and "interrupted", 130
    except ModuleNotFoundError as error:
        message = f"this needs a package: pip install {error.name}"
    except OSError as error:  # disk full, no permission, ...
        message = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        if nobody_reads(error):
            message, status = None, 141  # as a program that SIGPIPE ends
    except (MemoryError, RuntimeError) as error:
        lack = "out of memory", "not enough memory", "allocate memory"  # torch's words for it
        if isinstance(error, MemoryError) or any(words in str(error) for words in lack):
            message = "not enough memory; try a smaller model, --batch_size or --block_size"
        elif "by peer" in str(error):  # gloo's words for a process at the other end that is gone
            message = is_first_here() and "another process of this run has ended"
        else:
            raise
    finally:
        if ours:    # from here on Ctrl-C ends Python at once, without a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    if message:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    if ours and getattr(sys.modules.get("processes"), "joined", False):
        sys.stdout.flush()
        os._exit(status)    # the threads of a group of processes may abort Python's end
    if status:
        sys.exit(status)

def is_first_here():
    """Whether no other process of torchrun on this machine comes before this one."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"

def end_at_once(number, frame):
    """A handler of Ctrl-C that ends the process, whatever it was doing: an exception raised there
    may get lost, or come out as another one. What write_whole has begun stays as a .tmp file."""
    with contextlib.suppress(OSError):
        # A terminal that Ctrl-S has stopped must not hold this up.
        if is_first_here() and select.select([], [2], [], 0)[1]:
            os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)

def nobody_reads(error, of_stdout=False):
    """Whether this OSError is that of a pipe with nobody at its end, as in `train.py | head -1`,
    or, of_stdout, of a terminal that is closed. If so, what is still written there gets lost,
    without another error."""
    on_windows = (os.name, error.errno, error.filename) == ("nt", errno.EINVAL, None)
    closed = of_stdout and error.errno == errno.EIO
    if not (isinstance(error, BrokenPipeError) or on_windows or closed):
        return False
    # or Python fails again where it flushes at its end
    out, err, null = sys.stdout.fileno(), sys.stderr.fileno(), os.open(os.devnull, os.O_WRONLY)
    for stream in (out, err) if os.path.samestat(os.fstat(out), os.fstat(err)) else (out,):
        os.dup2(null, stream)
    return True

def say(line):
    """Prints a line, above a progress bar if there is one; under torchrun only the first process
    does. A line that nobody reads is lost, and say.unread is True from then on."""
    if os.environ.get("RANK", "0") != "0" and "LOCAL_RANK" in os.environ:
        return
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError as error:
        if not nobody_reads(error, of_stdout=True):
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
        if isinstance(behind(error), KeyboardInterrupt):
            raise KeyboardInterrupt from None
        say(f"{what} does not work here ({type(error).__name__}); going on without it")
        return False

def behind(error):
    """What torch has made another error of: an OSError or KeyboardInterrupt, else error itself."""
    cause = error
    while cause and not isinstance(cause, (OSError, KeyboardInterrupt)):
        cause = cause.__cause__ or cause.__context__
    return cause or error

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

# flags of the scripts that are paths: in them ~ is the home folder, as in FILE:~/prompt.txt
PATHS = {"dataset", "data_dir", "out_dir", "init_from", "cache_dir", "pretrained", "tokenizer",
         "html", "export", "out", "plot"}
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
KINDS = {   # how the text of a flag is read, and what is said where that cannot be
    "int": (int, "a whole number"), "float": (finite, "a number"), "str": (str, "text"),
    "bool": (lambda text: BOOLS[text.lower()], "True or False")}

def as_flag(name, value):
    """A flag as one types it into a shell."""
    return f"--{name}={shlex.quote(str(value))}"

def fits(field, value):
    """Whether a value, as from a file, is one that this flag can have."""
    kind, *optional = field.type.split(" | ")  # "int | None" -> "int", ["None"]
    least, below = field.metadata["bounds"] or (-math.inf, math.inf)
    if value is None:
        return bool(optional)
    if kind in ("int", "float"):
        return type(value).__name__ in ("int", kind) and least <= value < below
    return type(value).__name__ == kind

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
            hint = f", as {as_flag(next(iter(fields)), word)}" if word[:1] != "-" else ""
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
            if not fits(fields[name], value):
                raise ValueError
        except (KeyError, ValueError):
            raise Problem(f"{word} takes {what}, not '{text}'") from None
        path = re.fullmatch("(FILE:)?(~.*)", text, re.DOTALL)
        if path and (name in PATHS or path[1]):
            value = (path[1] or "") + os.path.expanduser(path[2])
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

def compiled(model):
    """The model by torch.compile: on a GPU a twin with the same parameters, compiled layer by
    layer, for the code of one serves all; on a CPU as one, which takes longer and runs faster."""
    import torch
    if not hasattr(model, "backbone") or model.device.type != "cuda":
        return torch.compile(model)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for layer in twin.backbone["layers"]:
        layer.compile()
    return twin

def pick_compile(cfg, device):
    """Whether a run of train.py is compiled. If --compile leaves it open, it is on a GPU: it takes
    up to a minute, which only many steps bring back, and on a CPU it makes nothing faster. Nor
    does it where the kernels of mamba_fast/ run, but for Mamba-1."""
    from mamba import fast
    if cfg.compile is not None:
        return cfg.compile
    kernels = fast and cfg.layer != "mamba" and cfg.scan in ("auto", "triton")
    return (device.type == "cuda" and cfg.max_iters >= 5000 and not kernels
            and not (cfg.eval_only or cfg.fsdp))

def fastest(make, model, batch, compile, graphs):
    """make(model), a list of functions (x, y) -> loss. If a trial with this batch, (x, y), shows
    that it works here, they are those of the compiled model, where compile says so, and replayed
    as CUDA graphs, where graphs does."""
    from mamba import fast
    calls = make(model)
    if compile:
        say("compiling, up to a minute ...")
        of_compiled, began = make(compiled(model)), time.perf_counter()
        if works_here("torch.compile", lambda: of_compiled[0](*batch)):
            say(f"compiled in {time.perf_counter() - began:.0f} s")
            calls = of_compiled
    replayed = []
    if graphs and works_here("a CUDA graph", lambda: replayed.extend(fast.replayed(calls, *batch))):
        calls = replayed
    return calls

def pick_scan(name, device, dtype, d_state, headdim=0):
    """The scan that runs there for this --scan; headdim: of layers with heads. Problem: one that
    cannot run."""
    import torch

    from mamba import scan_method
    try:
        example = torch.empty(0, device=device, dtype=getattr(torch, dtype))
        return scan_method(name, example, d_state, headdim)
    except ValueError as error:
        raise Problem(f"--scan={name}: {error}") from None

def usual_headdim(channels):
    """Channels of a head of Mamba-2 and 3, of so many in all: up to 64, as divides them."""
    return max(n for n in range(1, 65) if channels % n == 0)

def pick_threads(most):
    """How many threads of at most so many compute fastest on the CPU now. Threads wait for each
    other, and where other programs use the cores, they do little else, but not all the time: of
    20 short looks the third worst counts, and a moment's load changes nothing."""
    counts = {most // 2 ** i for i in range(most.bit_length())}
    looks = [{count: additions_per_second(count) for count in counts} for _ in range(20)]
    speeds = {count: sorted(look[count] for look in looks)[2] for count in counts}
    fastest = max(speeds, key=speeds.get)
    return fastest if speeds[fastest] >= 3 * speeds[most] else most

def use_threads(wanted, before, most):
    """Computes on as many threads as --threads wants, or as the run did before, or as are fastest
    now, of at most so many. It is said where that changes, because the last bits of sums do too."""
    import torch
    now, has_affinity = torch.get_num_threads(), hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    if wanted:
        number, why = wanted, "as asked for"
    elif before and before <= cores:
        number, why = before, "as before"
    else:
        number = pick_threads(most)
        why = "the cores are free" if number == most else "other programs use the cores"
    torch.set_num_threads(number)
    if others := {now, before or now} - {number}:
        say(f"threads: {number}, not {' or '.join(map(str, others))}, {why}; --threads={most} takes"
            f" {most}. The last bits of all sums depend on their number")

def additions_per_second(threads, seconds=0.005):
    import torch
    before, x = torch.get_num_threads(), torch.zeros(2 ** 19)   # enough for 16 threads
    torch.set_num_threads(threads)
    start, count, took = time.perf_counter(), 0, 0.0
    while took < seconds and count < 1000:  # a clock may stand still
        x.add_(1)
        count, took = count + 1, time.perf_counter() - start
    torch.set_num_threads(before)
    return count / max(took, 1e-9)

def autocast(device, dtype):
    """Mixed precision, if dtype is not float32. No copies of weights are kept for a second use:
    there is none, and a recorded CUDA graph would find them outdated."""
    import torch
    enabled = dtype != "float32"
    return torch.autocast(device.type, getattr(torch, dtype), enabled=enabled, cache_enabled=False)

def seed_of(*numbers):
    """A seed for torch made of several numbers: of a larger one its CPUs use 32 bits alone."""
    import numpy as np
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def set_up(device):
    """For training. On CUDA, where the gradient of an embedding is else summed in any order, the
    same bits from the same input. On a CPU this process keeps the memory that it has had: to get it
    from Linux again takes a tenth of a step's time."""
    import torch
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # This one helps to find mistakes, and takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    elif device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3     # as malloc.h numbers them
        mallopt(trim_threshold, 2 ** 31 - 1)
        mallopt(mmap_threshold, 2 ** 25)            # the largest that it takes

# ---- Files: written whole or not at all, and a lock on a folder ----------------------------------

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
        unfinished = f"{str(target).removesuffix('.pt')}.tmp"
        with open(unfinished, "wb") as file:
            write(file)
            flush_to_disk(file)
        if previous and os.path.exists(target):
            os.replace(target, previous)
        os.replace(unfinished, target)
    except (OSError, RuntimeError, ValueError) as error:  # a NUL in a name is a ValueError
        cause = behind(error)
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
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

def lock(folder, tries=5):
    """Makes the folder, and returns an open file that keeps a second run out of it as long as it is
    open: the system closes it however this process ends. Problem: another run is in there."""
    folder.mkdir(parents=True, exist_ok=True)
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
    if tries == 1 or is_same(folder / "lock", os.fstat(file.fileno())):
        return file
    file.close()    # of a run that has ended just now, and taken its empty folder along
    return lock(folder, tries - 1)

def is_same(path, stat):
    """Whether the file or folder that had this os.stat is at path."""
    try:
        return os.path.samestat(os.stat(path), stat)
    except OSError:
        return False

# ---- Files that are read: whole, or one line about them ------------------------------------------

@contextlib.contextmanager
def reading(path, kind):
    """Whatever is raised while a file of this kind, such as "a checkpoint", is read and checked
    becomes a Problem of one line about it: what is cut off or garbled may fail in any way."""
    try:
        yield
    except (MemoryError, ImportError):  # a package that is missing: not the file is to blame
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001
        told = isinstance(error, (Problem, ValueError)) and str(error).partition("\n")[0][:200]
        raise Problem(f"{path} is damaged or not {kind} ({told or type(error).__name__})") from None

# What a file may hold is checked before it is used: a crafted one must neither write beyond a
# tensor nor fill the memory. A value of an unknown kind is never shown: that might take forever.

def check_kinds(saved, **kinds):
    """ValueError: a dict lacks one of these names, or has another kind of value there."""
    for name, kind in kinds.items():
        if name not in saved:
            raise ValueError(f"it has no {name}")
        if not isinstance(saved[name], kind):
            raise ValueError(f"its {name} is a {type(saved[name]).__name__}")  # noqa: TRY004

def check_tensor(name, tensor, shape=None):
    """ValueError: not a tensor of this shape, with memory for all of it, of finite numbers."""
    import torch
    if not (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            and tensor.is_floating_point() and is_dense(tensor)):
        raise ValueError(f"{name} is no ordinary tensor")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has numbers that are not finite")

def is_dense(tensor):
    """Whether each number has a place of its own, and there are no gaps: transposed or not."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
