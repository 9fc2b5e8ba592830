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
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

WIDTH = 16      # numbers of the widest vector: a multiple of it has no rest
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast")
NARROW = 4      # numbers of a vector that any CPU has
CPUS = {    # by what PyTorch itself uses: numbers of a vector, and what the compiler may use
    "AVX512": (16, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")),
    "AVX2": (8, ("-mavx2", "-mfma")),
}


@functools.cache
def library(name):
    """The functions of {name}.cpp, or None where there is no compiler, or it fails, which is said
    once."""
    # Apple's compiler has no OpenMP, by which the threads of PyTorch itself do the work
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    width, flags = CPUS.get(torch.backends.cpu.get_cpu_capability(), (NARROW, ()))
    command = [*compiler.split(), *FLAGS, *flags, f"-DW={width}", str(source)]
    parts = source.read_bytes(), source.with_name("vectors.h").read_bytes(), repr(command).encode()
    key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    try:
        path = folder() / f"{name}-{key}.so"
        if not path.exists():
            compile_to(path, command)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(f"{source} could not be compiled, what it does takes longer: "
                      f"{said[0] if said else error}", stacklevel=2)
        return None


def folder():
    """Where compiled files are kept: in a place that others cannot put their own code into."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mamba_fast")
    try:
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
            subprocess.run([*command, "-o", file.name], check=True, timeout=120, text=True,
                           capture_output=True)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def is_float32_on_cpu(t):
    return t.dtype == torch.float32 and t.device.type == "cpu"


def runs(name, *tensors):
    """Whether {name}.cpp can be called with these: float32, and with memory of their own."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return (all(is_float32_on_cpu(t) and type(t) in plain for t in tensors)
            and library(name) is not None)


def exists(name):
    """Whether there is such a library, for what torch.compile compiles, which asks once."""
    return library(name) is not None


# what torch.compiler.assume_constant_result does, which would take a second to import
exists._dynamo_marked_constant = True


def rows_apart(x):
    """x (B, L, D), with one row after the other at even distances, as half of a projection is."""
    even = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()


def call(function, *arguments):
    """Calls a C++ function with tensors, of which it gets the addresses, None, and numbers; first
    of all comes the number of threads."""
    function(ctypes.c_int(torch.get_num_threads()), *map(as_c, arguments))


def as_c(argument):
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)
