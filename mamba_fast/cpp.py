"""
How the C++ of this folder is compiled: a file when it is first asked for, which takes a second or
two, and what comes out is kept for the next process. Where that cannot be done, PyTorch's own
operations do the work.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from .operators import is_traced

WIDTH = 16      # numbers of the widest vector: a multiple of it has no rest
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast")
FLAGS_OF_MODULES = ("-O2", "-w", "-std=c++2a", "-shared", "-fPIC", "-fvisibility=hidden")
NARROW = 4      # numbers of a vector that any CPU has
CPUS = {    # by what PyTorch itself uses: numbers of a vector, and what the compiler may use
    "AVX512": (16, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")),
    "AVX2": (8, ("-mavx2", "-mfma")),
}


@functools.cache
def compiled(name):
    """The functions of {name}.cpp, or None where there is no compiler. If one fails, it is said."""
    command = command_for(name, *FLAGS, *flags_for_cpu())
    return command and loaded(name, command, ctypes.CDLL)


def with_module(name, then):
    """Calls then with {name}.cpp as a module of Python: at once where it has been compiled before,
    or else in a thread when it is, for with PyTorch's headers that takes half a minute; not at all
    in the other processes that want it meanwhile."""
    if (command := command_for(name, *FLAGS_OF_MODULES, *flags_for_torch())) is None:
        return

    def load(lock=None):
        load_it = functools.partial(imported, name)
        if module := loaded(name, command, load_it, lock):
            then(module)

    def compile_if_first():
        import fcntl  # Windows has none, and does not come to here
        lock = os.open(folder(), os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            load(lock)
        except OSError:     # another compiles it, or there are no locks here
            pass
        finally:
            os.close(lock)
    if path_of(name, command).exists():
        load()
    else:
        threading.Thread(target=compile_if_first, daemon=True).start()


def imported(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_for(name, *flags):
    """What compiles {name}.cpp, or None."""
    # Apple's compiler has no OpenMP, by which the threads of PyTorch itself do the work
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        return None
    return [*compiler.split(), str(Path(__file__).with_name(f"{name}.cpp")), *flags]


def flags_for_cpu():
    width, flags = CPUS.get(torch.backends.cpu.get_cpu_capability(), (NARROW, ()))
    return *flags, f"-DW={width}"


def flags_for_torch():
    """To compile with the headers of PyTorch and Python, and to find their functions."""
    of_torch = Path(torch.__file__).parent
    headers = (of_torch / "include", of_torch / "include/torch/csrc/api/include",
               sysconfig.get_path("include"))
    return (*(f"-I{folder}" for folder in headers), f"-L{of_torch / 'lib'}",
            *(f"-l{name}" for name in ("torch", "torch_cpu", "torch_python", "c10")),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-DTORCH={torch.__version__}")     # nobody reads it: for path_of, another command


def path_of(name, command):
    """Where the file is that this command makes."""
    made_of = repr((command, platform.machine(), platform.libc_ver())).encode()
    around = Path(__file__).parent
    for file in (around / f"{name}.cpp", around / "repeat.cpp", *sorted(around.glob("*.h"))):
        made_of += file.read_bytes()
    return folder() / f"{name}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"


def loaded(name, command, load, lock=None):
    """load(path) of what the command makes, or None.  lock: as in compile_to."""
    try:
        path = path_of(name, command)
        if not path.exists():
            compile_to(path, command, lock)
        return load(path)
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in said if "error" in line), said[0] if said else error)
        warnings.warn(f"{name}.cpp cannot be compiled or loaded; what it does takes longer: "
                      f"{reason}", stacklevel=3)
        return None


def folder():
    """Where compiled files are kept: a folder that only this user can write into."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mamba_fast")
    try:
        if not kept.is_absolute():      # nobody knows where the home is
            raise FileNotFoundError(kept)
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = kept.stat()
        if os.access(kept, os.W_OK) and about.st_uid == os.getuid() and not about.st_mode & 0o022:
            return kept
    except OSError:         # no home, or one that cannot be written to
        pass
    return Path(of_this_process().name)


@functools.cache
def of_this_process():
    """A folder that goes with it."""
    return tempfile.TemporaryDirectory(prefix="mamba_fast-")


# under another name first, for two processes may do so at once
COMPILE = 'new=$0; to=$1; shift; "$@" -o "$new" && exec mv -f "$new" "$to"; rm -f "$new"; exit 1'


def compile_to(path, command, lock=None):
    """
    Where this process ends before the compiler, that goes on, and the next process finds its file.
    Ctrl-C is for the program that waits.
    lock: a file descriptor that stays open until the compiler has ended.
    """
    new, nothing = path.with_suffix(f".{os.urandom(8).hex()}"), subprocess.DEVNULL
    with subprocess.Popen(["sh", "-c", COMPILE, new, path, *command], stdin=nothing, stdout=nothing,
                          stderr=subprocess.PIPE, text=True, errors="replace",
                          start_new_session=True, pass_fds=[lock] if lock else []) as shell:
        try:
            _, said = shell.communicate(timeout=300)
        except BaseException:
            os.killpg(shell.pid, signal.SIGKILL)
            new.unlink(missing_ok=True)
            raise
    if shell.returncode:
        raise subprocess.CalledProcessError(shell.returncode, command, stderr=said)


def is_float32_on_cpu(t):
    return t.dtype == torch.float32 and t.device.type == "cpu"


def runs(name, *tensors):
    """Whether {name}.cpp can be called with these: float32, and with memory of their own."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return (all(is_float32_on_cpu(t) and type(t) in plain for t in tensors) and not is_traced()
            and compiled(name) is not None)


def exists(name):
    """Whether there is one, for what torch.compile compiles, which asks once."""
    return compiled(name) is not None


# what torch.compiler.assume_constant_result does, which would take a second to import
exists._dynamo_marked_constant = True


def check_kept(kept):
    """RuntimeError: forward kept no states for backward, as what was exported without gradients."""
    if kept.numel() == 0:
        raise RuntimeError("this scan was traced without gradients, and has none")


def rows_of(x):
    """x (B, L, D) as (B L, D), a copy only if the rows do not lie at even distances, as those of
    half of a projection do."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def call(function, *arguments):
    """Calls a C++ function with tensors and structures, of which it gets the addresses, None, and
    numbers; first of all comes the number of threads."""
    function(ctypes.c_int(torch.get_num_threads()), *map(as_c, arguments))


def as_c(argument):
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)
