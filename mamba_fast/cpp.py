"""
C++ for the CPU. A file of this folder is compiled when it is first asked for, which takes a second
or two, and what comes out is kept for the next process. Where that cannot be done, PyTorch's own
operations do the work.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from .operators import is_traced

WIDTH = 16      # numbers of the widest vector: a multiple of it has no rest
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast")
NARROW = 4      # numbers of a vector that any CPU has
CPUS = {    # by what PyTorch itself uses: numbers of a vector, and what the compiler may use
    "AVX512": (16, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")),
    "AVX2": (8, ("-mavx2", "-mfma")),
}


@functools.cache
def compiled(name):
    """The functions of {name}.cpp, or None where there is no compiler. If one fails, it is said."""
    # Apple's compiler has no OpenMP, by which the threads of PyTorch itself do the work
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    width, flags = CPUS.get(torch.backends.cpu.get_cpu_capability(), (NARROW, ()))
    command = [*compiler.split(), *FLAGS, *flags, f"-DW={width}", str(source)]
    try:
        made_of = repr((command, platform.machine(), platform.libc_ver())).encode()
        for file in (source, *sorted(source.parent.glob("*.h"))):
            made_of += file.read_bytes()
        path = folder() / f"{name}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
        if not path.exists():
            compile_to(path, command)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in said if "error" in line), said[0] if said else error)
        warnings.warn(f"{source} cannot be compiled or loaded; what it does takes longer: {reason}",
                      stacklevel=2)
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


def compile_to(path, command):
    """Compiles under another name first: two processes may do so at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
        try:
            # in a session of its own: Ctrl-C is for the program that waits
            subprocess.run([*command, "-o", file.name], check=True, timeout=120, text=True,
                           errors="replace", capture_output=True, start_new_session=True)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


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
