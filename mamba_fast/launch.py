"""
How the kernels start. Kernel starts one of them within a few microseconds. Plan makes all the calls
of a function at once, kernels and products of matrices: the first time that it is called with such
tensors, what it asks of the GPU is written down, and from then on repeat.cpp does that for other
memory. For a small block the host takes longer to ask than the GPU to compute.
"""
from __future__ import annotations

import ctypes
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from . import cpp

writer = ContextVar("writer", default=None)     # if there is one, kernels are not started
REHEARSED = set()
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}    # of cuBLAS
ALIGNED = 512       # bytes, as PyTorch's own allocator has it
MOST_PLANS = 1000   # of a function: one for each shape
EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default,
         torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty.default}


class Kernel:
    """
    A kernel that starts within a few microseconds: kernel(grid, version, tensors, *numbers), its
    arguments in their order; a tensor may be None. Triton looks at all arguments of each call, to
    see which of the versions that it compiled they need. Here `version` says it: the GPU, then all
    on which that depends.
    """

    def __init__(self, function, **options):
        self.function, self.options, self.compiled = function, options, {}

    def __call__(self, grid, version, tensors, *numbers):
        compiled, instead = self.compiled.get(version), writer.get()
        if instead is not None:
            return instead.write(self, grid, version, tensors, numbers)
        if compiled is None:
            return self.keep(version, self.function[grid](*tensors, *numbers, **self.options))
        run, function, metadata, _ = compiled
        # of a tensor itself the launcher would ask the driver whose it is
        addresses = [t if t is None else t.data_ptr() for t in tensors]
        run(*grid, torch._C._cuda_getCurrentRawStream(version[0]), function, metadata, None, None,
            None, *addresses, *numbers)

    def compiled_for(self, grid, version, tensors, numbers):
        """The kernel for these arguments, as Triton has it. It is not started."""
        if version not in self.compiled:
            made = self.function.warmup(*tensors, *numbers, grid=grid, **self.options)
            self.keep(version, made)
        return self.compiled[version][3]

    def keep(self, version, kernel):
        if kernel is not None:      # Triton's interpreter has none
            # run first: it loads the kernel
            self.compiled[version] = kernel.run, kernel.function, kernel.packed_metadata, kernel


class Rehearsal:
    """Kernels are compiled, side by side."""

    @staticmethod
    def write(kernel, grid, version, tensors, numbers):
        if version not in kernel.compiled:
            kernel.function.warmup(*tensors, *numbers, grid=grid, **kernel.options)


def compile_ahead(key, call):
    """Before the first call of this key: its kernels are compiled side by side, as one after the
    other they take seconds."""
    if key in REHEARSED or writer.get() is not None:
        return
    if torch._C._len_torch_dispatch_stack() > 0 or torch.cuda.is_current_stream_capturing():
        return      # who looks on, or records, is not to see it
    REHEARSED.add(key)
    before = writer.set(Rehearsal)
    try:
        with torch.no_grad(), ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
            threads.submit(functions)       # which compiles repeat.cpp
            call()
    finally:
        writer.reset(before)


def product(a, b, out=None, dtype=None, add=False):
    """
    a @ b of two matrices, of which each has neighbours side by side, in rows or in columns.
    out: where to write it, or with add to add it.  dtype: of the result, if this is float32, and
    else that of a.
    """
    dtype = dtype if dtype == torch.float32 else a.dtype
    plan = writer.get()
    if isinstance(plan, Plan):
        out = a.new_empty(len(a), b.shape[1], dtype=dtype) if out is None else out
        plan.write_product(out, a, b, add)
        return out
    if add:
        return out.addmm_(a, b)
    if dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype)


class CannotBeWritten(Exception):
    """The function does more than to start kernels and products."""


class Plan(TorchDispatchMode):
    """
    What call(), a function of some tensors, asks of the GPU. call returns two lists of tensors or
    None: its results, each of which gets memory of its own each time, and what else is kept, which
    lies in one piece of memory.
    """

    @classmethod
    def of(cls, plans, key, call, tensors):
        """The plan in the dict plans for this key and for tensors like these, or None where there
        can be none."""
        like = [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16)
                for t in tensors]
        key = key, tensors[0].device, *like
        if key not in plans:
            if len(plans) >= MOST_PLANS:
                plans.clear()
            try:
                plans[key] = cls(call, tensors)
            except CannotBeWritten:
                plans[key] = None
        return plans[key]

    def __init__(self, call, tensors):
        super().__init__()
        self.inputs = [range(0) if t is None else range(t.data_ptr(), t.data_ptr() + bytes_of(t))
                       for t in tensors]
        # what was made, by its address, and the kernels: so that they stay
        self.made, self.calls, self.kernels, self.plans_back = {}, [], [], {}
        before = writer.set(self)
        try:
            with torch.no_grad(), self:
                results, kept = call()
        finally:
            writer.reset(before)
        self.place(results, kept)
        numbers = [self.numbers_of(call) for call in self.calls]
        self.count, self.multiplies = len(numbers), any(call[0] == 1 for call in numbers)
        self.list = as_int64([n for call in numbers for n in (len(call) - 1, *call)])
        del self.inputs, self.made, self.calls, self.places

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if function in EMPTY or function.is_view:
            return function(*arguments, **(settings or {}))
        raise CannotBeWritten(function)

    def write(self, kernel, grid, version, tensors, numbers):
        made = kernel.compiled_for(grid, version, tensors, numbers)
        about, arguments = made.metadata, []
        for kind, argument in zip(made.src.signature.values(), (*tensors, *numbers)):
            if kind.startswith("*"):
                arguments.append(self.where(argument))
            elif kind[0] in "iu":
                arguments.append((-1, int(argument)))
            elif kind != "constexpr":
                raise CannotBeWritten(kind)
        # the last ones are memory that Triton gives to some kernels, and not to these
        more = parameters_of(made.function) - len(arguments)
        special = about.num_ctas > 1 or about.launch_cooperative_grid or about.launch_pdl
        if special or about.global_scratch_size > 0 or not 0 <= more <= 2:
            raise CannotBeWritten(kernel)
        self.kernels.append(made)
        self.calls.append((0, made.function, *grid, 32 * about.num_warps, about.shared, *arguments,
                           *[(-1, 0)] * more))

    def write_product(self, out, a, b, add):
        # cuBLAS counts along columns: it is asked for the turned matrices, out^T = b^T a^T
        (rows, inner), columns = a.shape, b.shape[1]
        (turned_a, step_a), (turned_b, step_b) = order_of(a), order_of(b)
        self.calls.append((1, turned_b, turned_a, columns, rows, inner,
                           self.where(b), TYPES[b.dtype], step_b,
                           self.where(a), TYPES[a.dtype], step_a,
                           self.where(out), TYPES[out.dtype], max(out.stride(0), columns), add))

    def where(self, t):
        """Where t begins: the number of an input, or the address of what was made, or -1 if there
        is nothing; and the distance from the start of that."""
        address = t.data_ptr()
        for i, memory in enumerate(self.inputs):
            if address in memory:
                return i, address - memory.start
        storage = t.untyped_storage()
        if storage.nbytes() == 0:
            return -1, 0
        self.made[storage.data_ptr()] = storage
        return storage.data_ptr(), address - storage.data_ptr()

    def place(self, results, kept):
        """Decides where all that was made will lie: as a result, in the memory that is kept, or in
        other memory. In this order they follow the inputs in what repeat.cpp gets."""
        first, own = len(self.inputs), {}
        self.places = {i: (i, 0) for i in range(-1, first)}
        self.memories, self.results, self.kept, sizes = [], [], [], [0, 0]
        for t in results:
            if t is None:
                self.results.append(None)
                continue
            of, distance = self.where(t)
            if 0 <= of < first:
                raise CannotBeWritten("a result is an input")
            size = t.untyped_storage().nbytes()
            whole = t.is_contiguous() and bytes_of(t) == size
            if of < 0 or of not in own:
                own[of] = len(self.memories)
                self.memories.append((t.shape if whole else (size // t.element_size(),), t.dtype))
                self.places.setdefault(of, (first + own[of], 0))
            part = None if whole else (t.shape, t.stride(), distance // t.element_size())
            self.results.append((own[of], part))

        def put(of, memory):
            self.places[of] = first + len(self.memories) + memory, sizes[memory]
            sizes[memory] += -(-self.made[of].nbytes() // ALIGNED) * ALIGNED

        for t in kept:
            of, distance = (-1, 0) if t is None else self.where(t)
            if of >= first:
                if of in own:
                    raise CannotBeWritten("what is kept is a result")
                if of not in self.places:
                    put(of, 0)
                self.kept.append((self.places[of][1] + distance, t.shape, t.stride(), t.dtype))
            else:
                self.kept.append(None if t is None else of)
        for of in self.made.keys() - self.places.keys():
            put(of, 1)
        self.used = [i for i in range(first) if i in self.kept]
        self.memories += [((size,), torch.uint8) if size > 0 else None for size in sizes]

    def numbers_of(self, call):
        """All numbers of a call, of which pairs are where memory was, by where it will be."""
        numbers = []
        for n in call:
            if isinstance(n, tuple):
                of, start = self.places[n[0]]
                numbers += of, start + n[1]
            else:
                numbers.append(int(n))
        return numbers

    def repeat(self, tensors):
        """The results for tensors like those of the plan, and the memory of what is kept."""
        like = tensors[0]
        if like.device.index != torch.cuda.current_device():
            with torch.cuda.device_of(like):
                return self.repeat(tensors)
        made = [None if m is None else like.new_empty(m[0], dtype=m[1]) for m in self.memories]
        bases = as_int64([0 if t is None else t.data_ptr() for t in (*tensors, *made)])
        repeat, launch, multiply = functions()
        stream, blas = torch._C._cuda_getCurrentRawStream(like.device.index), None
        if self.multiplies:
            blas = torch.cuda.current_blas_handle()
        error = repeat(self.list, self.count, bases, stream, blas, launch, multiply)
        if error:
            raise RuntimeError(f"the GPU has refused a call: error {error} of CUDA or cuBLAS")
        results = [None if r is None else made[r[0]] if r[1] is None else
                   made[r[0]].as_strided(*r[1]) for r in self.results]
        return results, made[-2]

    def all_kept(self, memory, *inputs):
        """The tensors that call kept. memory: as repeat returns it.  inputs: those in used."""
        inputs, tensors = dict(zip(self.used, inputs)), []
        for kept in self.kept:
            if kept is None or isinstance(kept, int):
                tensors.append(inputs.get(kept))
            else:
                start, shape, stride, dtype = kept
                tensors.append(memory[start:].view(dtype).as_strided(shape, stride))
        return tensors


def by_plan(function, count):
    """function, whose first inputs are so many tensors, and which returns some, by plans."""
    plans = {}

    @functools.wraps(function)
    def run(*inputs):
        if not can_repeat():
            return function(*inputs)
        tensors, settings = inputs[:count], inputs[count:]
        plan = Plan.of(plans, settings, lambda: (function(*inputs), ()), tensors)
        return function(*inputs) if plan is None else tuple(plan.repeat(tensors)[0])
    return run


def order_of(matrix):
    """Whether its columns lie side by side, and not its rows, and how far they are apart."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    if right == 1 or columns == 1:
        return False, max(down, columns)
    if down == 1 or rows == 1:
        return True, max(right, rows)
    raise CannotBeWritten("neither rows nor columns lie side by side")


def as_int64(numbers):
    return (ctypes.c_int64 * len(numbers))(*numbers)


def bytes_of(t):
    """How far the numbers of a tensor reach in memory."""
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * step for n, step in zip(t.shape, t.stride())) + 1) * t.element_size()


def can_repeat():
    """Whether plans can be used now, when nobody looks on or has asked PyTorch for special
    products."""
    of_products = torch.backends.cuda.matmul
    return (writer.get() is None and torch._C._len_torch_dispatch_stack() == 0
            and not torch.are_deterministic_algorithms_enabled()
            and of_products.allow_bf16_reduced_precision_reduction
            and of_products.allow_fp16_reduced_precision_reduction
            and functions() is not None)


@functools.cache
def functions():
    """That of repeat.cpp, and the addresses of what it calls; or None where it cannot be."""
    compiled = cpp.compiled("repeat")
    blas = re.search(r"/\S*/libcublas\.so\S*", Path("/proc/self/maps").read_text())
    if compiled is None or blas is None:
        return None
    address = ctypes.c_void_p
    compiled.repeat.argtypes = (address, ctypes.c_int64, *[address] * 5)
    return (compiled.repeat, ctypes.cast(driver().cuLaunchKernel, address),
            ctypes.cast(ctypes.CDLL(blas[0]).cublasGemmEx, address))


@functools.cache
def driver():
    return ctypes.CDLL("libcuda.so.1")


def parameters_of(function):
    """How many a kernel has."""
    count, at, size = 0, ctypes.c_size_t(), ctypes.c_size_t()
    while driver().cuFuncGetParamInfo(ctypes.c_void_p(function), ctypes.c_size_t(count),
                                      ctypes.byref(at), ctypes.byref(size)) == 0:
        count += 1
    return count
