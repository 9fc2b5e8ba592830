"""
How the kernels start. For a small block the host takes longer to ask in Python than the GPU to
compute. So Kernel starts a kernel within a few microseconds, and Plan is for functions that ask the
GPU for many things: the first time, the function runs without starting anything, and the kernels
and products of matrices that it would ask for are written down; now and from then on, repeat.cpp
asks for the same with other tensors. at_once makes an operation of autograd of such a function:
ByPlan, and once node.cpp is compiled the one there, whose backward pass does not wait for Python.
"""
from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from inspect import getclosurevars
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from . import cpp
from .operators import AtOnce, Context, differentiable_once, is_traced, without_autocast

# what gets kernels instead of the GPU, by its take(kernel, grid, version, tensors, numbers)
taker = ContextVar("taker", default=None)
of_thread = threading.local()   # in gpus those on which this thread has repeated a plan
NODE = {}       # the module of node.cpp or None, from begin_node on
REHEARSED = set()       # keys of what has been compiled ahead
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}    # their numbers in cuBLAS
ALIGNED = 512           # bytes, as PyTorch's own allocator has it
MOST_PLANS = 1000       # in a dict of plans, which then starts anew
NOT_TRIED = object()    # no plan yet; None says that there can be none
MOST_ARGUMENTS = 64     # of a kernel, as in repeat.cpp
NUMBER = -1             # (NUMBER, n) is the number n and no address
LAUNCHERS_ARE_C = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
# what is not known of a kernel before it is compiled
OF_A_LAUNCHER = ("global_scratch_size", "global_scratch_align", "profile_scratch_size",
                 "profile_scratch_align", "launch_cooperative_grid", "launch_pdl")
# what a plan may ask of PyTorch besides views
EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default,
         torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty.default}


class Kernel:
    """
    A kernel that starts within a few microseconds: kernel(grid, version, tensors, *numbers), grid
    of three numbers, then its arguments, all tensors first; one may be None. Triton looks at all
    arguments of each call, to see which of the versions that it compiled they need. Here the caller
    says it: version is the index of the GPU and then everything on which that choice depends.
    """

    def __init__(self, function, **options):
        self.function, self.options, self.versions = function, options, {}

    def __call__(self, grid, version, tensors, *numbers):
        if (other := taker.get()) is not None:
            other.take(self, grid, version, tensors, numbers)
        elif version not in self.versions:
            wait_for_triton()
            self.add(version, self.function[grid](*tensors, *numbers, **self.options))
        else:
            run, handle, metadata, _ = self.versions[version]
            # of a tensor itself the launcher would ask the driver whose it is
            addresses = [t if t is None else t.data_ptr() for t in tensors]
            stream = torch._C._cuda_getCurrentRawStream(version[0])
            # three times None: no metadata of this launch, and no hooks
            run(*grid, stream, handle, metadata, None, None, None, *addresses, *numbers)

    def compiled_for(self, grid, version, tensors, numbers):
        """The kernel for these arguments, as Triton has it. It is not started."""
        if version not in self.versions:
            made = self.function.warmup(*tensors, *numbers, grid=grid, **self.options)
            self.add(version, made)
        return self.versions[version][3]

    def add(self, version, kernel):
        if kernel is not None:      # Triton's interpreter has none
            # run comes first: it loads the kernel, which has a handle only then
            self.versions[version] = kernel.run, kernel.function, kernel.packed_metadata, kernel


class Threads(ThreadPoolExecutor):
    """
    Where Triton compiles kernels side by side. The first step, make_ir, is Python, of which one
    thread runs at a time: if all shared it, the first would end as late as the last, so they take
    turns. Up to Triton 3.6, that too, a kernel also needs a launcher in C; it is compiled beside
    the kernel, and Triton finds it on the disk.
    """

    def __init__(self):
        super().__init__()
        self.turn = threading.Lock()

    def submit(self, work, *inputs):
        # where work compiles a kernel, src is what Triton compiles
        source = getattr(work, "__closure__", None) and getclosurevars(work).nonlocals.get("src")
        if make_ir := getattr(source, "make_ir", None):
            source.make_ir = functools.partial(with_lock, self.turn, make_ir)
        if LAUNCHERS_ARE_C and source:
            unknown = SimpleNamespace(**dict.fromkeys(OF_A_LAUNCHER))   # asked for, not used in C
            super().submit(triton.runtime.driver.active.launcher_cls, source, unknown)
        return super().submit(work, *inputs)


def with_lock(lock, work, *inputs):
    with lock:
        return work(*inputs)


@functools.cache
def preparing():
    """
    Two threads that do, while the program goes on, what Triton otherwise does for a second before
    its first kernel. One compiles the functions by which Triton calls the GPU; a program waits for
    it at its end, or the compiler would print an error there. The other computes the hash of all of
    Triton's own code, a part of each name in its folder on the disk.
    """
    def run(work):
        with suppress(Exception):   # where it is needed Triton tries again, and says what is wrong
            work()
    works = ((lambda: triton.runtime.driver.default, False),
             (lambda: triton.runtime.cache.triton_key(), True))
    threads = [threading.Thread(target=run, args=(work,), daemon=daemon) for work, daemon in works]
    for thread in threads:
        thread.start()
    return threads


def wait_for_triton():
    """So that this thread does not do the same beside them."""
    for thread in preparing():
        thread.join()


@contextmanager
def kernels_go_to(other):
    """Within it kernels are not started, but other takes them."""
    before = taker.set(other)
    try:
        yield
    finally:
        taker.reset(before)


class Nobody:
    """Takes kernels where only the shapes of their results are wanted."""

    @staticmethod
    def take(*_):
        pass


class Rehearsal:
    """Takes kernels to compile them, which Triton does in the threads of compile_ahead."""

    @staticmethod
    def take(kernel, grid, version, tensors, numbers):
        if version not in kernel.versions:
            kernel.function.warmup(*tensors, *numbers, grid=grid, **kernel.options)


def compile_ahead(key, call):
    """
    The first time that this key is seen, call() runs as a rehearsal: its kernels are not started
    but compiled side by side, for one after the other they take seconds. What else it asks of
    PyTorch is done, and its results are dropped. Triton then has the kernels in memory.
    key: all on which it depends which kernels these are.
    """
    if key in REHEARSED or taker.get() is not None:
        return
    if torch._C._len_torch_dispatch_stack() > 0 or torch.cuda.is_current_stream_capturing():
        return      # neither a dispatch mode nor a CUDA graph is to see the rehearsal
    REHEARSED.add(key)
    wait_for_triton()
    # ignore_errors: a kernel that fails here fails again when it is started, and says why
    with (kernels_go_to(Rehearsal), torch.no_grad(), Threads() as threads,
          triton.AsyncCompileMode(threads, ignore_errors=True)):
        threads.submit(entry_points)    # which compiles repeat.cpp
        call()


def product(a, b, out=None, dtype=None, add=False):
    """
    a @ b of two matrices that lie row by row or column by column, in the dtype of a, or float32 if
    that is asked for.
    out: where it is written, or with add added to what is there.
    """
    dtype = dtype if dtype == torch.float32 else a.dtype
    if isinstance(plan := taker.get(), Plan):
        out = a.new_empty(len(a), b.shape[1], dtype=dtype) if out is None else out
        plan.take_product(out, a, b, add)
        return out
    if add:
        return out.addmm_(a, b)
    if dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype)


class CannotBeWritten(Exception):
    """The function does something that a plan cannot repeat."""


class Plan(TorchDispatchMode):
    """
    What call(), a function of some tensors, asks of the GPU. call returns two lists of tensors or
    None: its results, and what it keeps for another function, which comes in one piece of memory.
    Of the memory of a GPU it may read only these tensors and what it makes itself. A plan is a
    dispatch mode while it is written, to refuse all that it cannot repeat.
    """

    @classmethod
    def _should_skip_dynamo(cls):
        return False    # PyTorch would import its compiler, for a second, to keep it away from here

    @classmethod
    def of(cls, plans, key, call, tensors):
        """The plan in the dict plans for this key and for tensors like these, or None where there
        can be none."""
        return found(plans, key, tensors, lambda: cls(call, tensors))

    def __init__(self, call, tensors):
        super().__init__()
        if tensors[0] is None or entry_points() is None:
            raise CannotBeWritten("nothing tells the GPU, or could repeat it there")
        self.inputs, self.ranges = tensors, [range_of(t) for t in tensors]
        # storages by their addresses, all of them until the end, so that no two have the same one;
        # and of each the first and the last request that it is in
        self.storages, self.spans, self.requests = {}, {}, []
        self.kernels, self.plans_back = [], {}      # kernels: so that they stay loaded
        with kernels_go_to(self), torch.no_grad(), self:
            results, kept = call()
        self.assign_memory(results, kept)
        requests = [self.numbers_of(request) for request in self.requests]
        self.count, self.multiplies = len(requests), any(r[0] == 1 for r in requests)
        self.numbers = packed([n for r in requests for n in (len(r) - 1, *r)])
        del self.inputs, self.ranges, self.storages, self.spans, self.requests, self.targets

    def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
        if operator in EMPTY or operator.is_view:
            return operator(*arguments, **(settings or {}))
        raise CannotBeWritten(operator)

    def take(self, kernel, grid, version, tensors, numbers):
        compiled = kernel.compiled_for(grid, version, tensors, numbers)
        metadata, arguments = compiled.metadata, []
        for kind, argument in zip(compiled.src.signature.values(), (*tensors, *numbers)):
            if kind.startswith("*"):
                arguments.append(self.source_of(argument))
            elif kind[0] in "iu":
                arguments.append((NUMBER, int(argument)))
            elif kind != "constexpr":       # a constexpr, as None is, is no argument
                raise CannotBeWritten(kind)
        # the last parameters are memory that Triton gives to some kernels, and not to these
        scratch = parameters_of(compiled.function) - len(arguments)
        special = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size",
                   "profile_scratch_size")
        if (not 0 <= scratch <= 2 or len(arguments) + scratch > MOST_ARGUMENTS
                or metadata.num_ctas > 1 or any(getattr(metadata, k, 0) for k in special)):
            raise CannotBeWritten(kernel)
        self.kernels.append(compiled)
        self.requests.append((0, compiled.function, *grid, 32 * metadata.num_warps, metadata.shared,
                              *arguments, *[(NUMBER, 0)] * scratch))

    def take_product(self, out, a, b, add):
        # cuBLAS takes matrices column by column, so it is to compute out^T = b^T a^T
        (rows, inner), columns = a.shape, b.shape[1]
        (turned_a, stride_a), (turned_b, stride_b), (turned, stride) = map(order_of, (a, b, out))
        if turned or not {a.dtype, b.dtype, out.dtype} <= TYPES.keys():
            raise CannotBeWritten("cuBLAS takes this product in another way, or not at all")
        self.requests.append((1, turned_b, turned_a, columns, rows, inner,
                              self.source_of(b), TYPES[b.dtype], stride_b,
                              self.source_of(a), TYPES[a.dtype], stride_a,
                              self.source_of(out), TYPES[out.dtype], stride, add))

    def source_of(self, t):
        """Where t lies: in which input, by its number, or in which storage, by its address; or
        NUMBER if it has no memory. And how far from the start of that."""
        if t.numel() == 0:
            return NUMBER, 0
        address = t.data_ptr()
        starts = [i for i, inside in enumerate(self.ranges) if inside and address == inside.start]
        around = starts[:1] or [i for i, inside in enumerate(self.ranges) if address in inside]
        if len(around) > 1:
            raise CannotBeWritten("a part of one input, or of another that lies between its rows")
        if around:
            return around[0], address - self.ranges[around[0]].start
        storage, now = t.untyped_storage(), len(self.requests)
        source = storage.data_ptr()
        self.storages[source], (first, _) = storage, self.spans.get(source, (now, now))
        self.spans[source] = first, now
        return source, address - source

    def assign_memory(self, results, kept):
        """Decides where all that was made will lie: as a result, in the memory that is kept, or in
        scratch. In this order they follow the inputs in the addresses that repeat.cpp gets."""
        inputs, self.bytes_kept = len(self.inputs), 0
        self.targets = {i: (i, 0) for i in (NUMBER, *range(inputs))}
        self.to_allocate, self.results, self.kept = [], [], []
        for t in results:
            self.results.append(None if t is None else self.result(t))
        for t in kept:
            self.kept.append(None if t is None else self.kept_as(t))
        self.kept_inputs = [i for i in range(inputs) if i in self.kept]
        sizes = self.bytes_kept, self.place_scratch()
        self.to_allocate += [self.template((size,), torch.uint8) if size > 0 else None
                             for size in sizes]

    def template(self, shape, dtype):
        """One number in this shape: empty_like makes memory of it in half the time of new_empty."""
        return self.inputs[0].new_empty((), dtype=dtype).expand(shape)

    def result(self, t):
        """(its memory's number in to_allocate, None if it is all of that, or how it lies there)."""
        source, distance = self.source_of(t)
        if 0 <= source < len(self.inputs):
            raise CannotBeWritten("a result is an input")
        size = t.untyped_storage().nbytes()
        if source == NUMBER or source not in self.targets:
            whole = t.is_contiguous() and len(range_of(t)) == size
            shape = t.shape if whole else (size // t.element_size(),)
            self.targets.setdefault(source, (len(self.inputs) + len(self.to_allocate), 0))
            self.to_allocate.append(self.template(shape, t.dtype))
            if whole:
                return len(self.to_allocate) - 1, None
        number = self.targets[source][0] - len(self.inputs)
        if self.to_allocate[number].dtype != t.dtype:
            raise CannotBeWritten("two results in one memory, with two types")
        return number, (t.shape, t.stride(), distance // t.element_size())

    def kept_as(self, t):
        """The number of an input, or how t lies in the memory that is kept."""
        source, distance = self.source_of(t)
        if 0 <= source < len(self.inputs):
            if form_of(t) != form_of(self.inputs[source]) or distance > 0:
                raise CannotBeWritten("a part of an input is kept")
            return source
        memory = len(self.inputs) + len(self.to_allocate)
        if source not in self.targets:
            self.targets[source] = memory, self.bytes_kept
            self.bytes_kept += self.size_of(source)
        target, start = self.targets[source]
        if target != memory:
            raise CannotBeWritten("what is kept is a result, or empty")
        return start + distance, *form_of(t)

    def place_scratch(self):
        """Places all other storages in one piece of memory, the largest first, each as far to its
        front as none lies that is in use at the same time. Returns the bytes of it."""
        placed, scratch = [], len(self.inputs) + len(self.to_allocate) + 1
        others = sorted(self.storages.keys() - self.targets.keys(),
                        key=lambda source: (-self.size_of(source), self.spans[source]))
        for source in others:
            (first, last), size, start = self.spans[source], self.size_of(source), 0
            for begin, end in sorted(ends for ends, span in placed
                                     if first <= span[1] and span[0] <= last):
                if start + size <= begin:
                    break
                start = max(start, end)
            placed.append(((start, start + size), (first, last)))
            self.targets[source] = scratch, start
        return max((end for (_, end), _ in placed), default=0)

    def size_of(self, source):
        return -(-self.storages[source].nbytes() // ALIGNED) * ALIGNED

    def numbers_of(self, request):
        """The numbers of a request, each (source, distance) as (number of an address, distance)."""
        numbers = []
        for n in request:
            if isinstance(n, tuple):
                target, start = self.targets[n[0]]
                numbers += target, start + n[1]
            else:
                numbers.append(int(n))
        return numbers

    def in_cpp(self, in_python):
        """The same in node.cpp. in_python: a function for backward passes that it does not know; of
        a plan of a backward pass the plan itself, which is to stay."""
        calls = tuple(address.value for address in entry_points()[1:])
        return NODE["module"].plan(self.numbers, self.count, self.multiplies, self.to_allocate,
                                   self.results, self.kept_inputs, calls, blas_handle, in_python)

    def as_node(self):
        """What node.cpp runs as ByPlan does."""
        def in_python(in_cpp, needs, gradients, saved):
            ctx = Context(plan=self, needs_input_grad=(None, *needs))
            ctx.save_for_backward(*saved)
            _, *results = ByPlan.backward(ctx, *gradients)
            if ctx.plan_back is not None:   # from now on C++ knows it
                in_cpp.add_back(needs, (*saved, *gradients), ctx.plan_back.in_cpp(ctx.plan_back))
            return results
        return self.in_cpp(in_python)

    def repeat(self, tensors):
        """The results for tensors like those of the plan, and the memory of what is kept."""
        first = tensors[0]
        if first.device.index != torch.cuda.current_device():
            with torch.cuda.device_of(first):
                return self.repeat(tensors)
        if first.device.index not in getattr(of_thread, "gpus", ()):
            first.new_zeros(1)      # so that CUDA knows this thread
            of_thread.gpus = {first.device.index, *getattr(of_thread, "gpus", ())}
        allocated = [None if of is None else
                     torch.empty_like(of, memory_format=torch.contiguous_format)
                     for of in self.to_allocate]
        addresses = packed([0 if t is None else t.data_ptr() for t in (*tensors, *allocated)])
        run_list, launch, multiply, _ = entry_points()
        stream, blas = torch._C._cuda_getCurrentRawStream(first.device.index), None
        if self.multiplies:     # asked for each time: PyTorch then sets its stream and precision
            blas = torch.cuda.current_blas_handle()
        error = run_list(self.numbers, self.count, addresses, stream, blas, launch, multiply)
        if error:
            raise RuntimeError(f"the GPU has refused a call: error {error} of CUDA or cuBLAS")
        results = [None if r is None else allocated[r[0]] if r[1] is None else
                   allocated[r[0]].as_strided(*r[1]) for r in self.results]
        return results, allocated[-2]

    def all_kept(self, memory, *inputs):
        """The tensors that call kept. memory: as repeat returns it.  inputs: the kept_inputs."""
        inputs, tensors = dict(zip(self.kept_inputs, inputs)), []
        for kept in self.kept:
            if kept is None or isinstance(kept, int):
                tensors.append(inputs.get(kept))
            else:
                start, shape, stride, dtype = kept
                tensors.append(memory[start:].view(dtype).as_strided(shape, stride))
        return tensors


def form_of(t):
    return t.shape, t.stride(), t.dtype


def range_of(t):
    """The addresses from a tensor's first number to the end of its last."""
    if t is None or t.numel() == 0:
        return range(0)
    numbers = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) + 1
    return range(t.data_ptr(), t.data_ptr() + numbers * t.element_size())


def order_of(matrix):
    """Whether it lies column by column, and the stride of its columns, or else of its rows."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    if (right == 1 or columns == 1) and (down >= columns or rows == 1):
        return False, max(down, columns)
    if (down == 1 or rows == 1) and (right >= rows or columns == 1):
        return True, max(right, rows)
    raise CannotBeWritten("neither rows nor columns have their numbers side by side")


def packed(numbers):
    """The bytes of whole numbers, as C++ has them."""
    return struct.pack(f"{len(numbers)}q", *numbers)


def found(plans, key, tensors, make):
    """What make returns for this key and for tensors like these, from the dict plans if it is
    there already; None where there can be no plan."""
    key = key, (node().form if node() else form_of_all)(tensors)
    if (plan := plans.get(key, NOT_TRIED)) is not NOT_TRIED:
        return plan
    try:
        plan = make()
    except CannotBeWritten:
        plan = None
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def setting_of_products(name):
    """What tells a setting of torch.backends.cuda.matmul. Each call asks for them, and C knows them
    in a tenth of the time."""
    by_python = functools.partial(getattr, torch.backends.cuda.matmul, name, False)
    return getattr(torch._C, f"_get_cublas_{name}", by_python)


REDUCED = True, (True, True)        # by default, in older versions of PyTorch and in newer ones
reduced_bf16 = setting_of_products("allow_bf16_reduced_precision_reduction")
reduced_fp16 = setting_of_products("allow_fp16_reduced_precision_reduction")
accumulated_fp16 = setting_of_products("allow_fp16_accumulation")


def can_repeat():
    """Whether plans can be used now: nobody looks on, and nobody has asked PyTorch for other
    products than it makes by default."""
    return (taker.get() is None and torch._C._len_torch_dispatch_stack() == 0 and not is_traced()
            and not torch.are_deterministic_algorithms_enabled()
            and reduced_bf16() in REDUCED and reduced_fp16() in REDUCED and not accumulated_fp16())


def form_of_all(tensors):
    """All of tensors on which a plan depends."""
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    # Triton compiles other versions for addresses that 16 does not divide
    like = [None if t is None else (t.shape, t.stride(), t.dtype, t.device, address % 16)
            for t, address in zip(tensors, addresses)]
    # which of them are the same: for a plan they would be the same always
    there, same = [address for address in addresses if address], None
    if len(set(there)) < len(there):
        same = tuple(map(addresses.index, addresses))
    return same, *like


def node():
    """The module of node.cpp, or None as long as it is not compiled, and for compiled autograd,
    which does not take it."""
    dynamo = sys.modules.get("torch._dynamo")
    return None if dynamo and dynamo.config.compiled_autograd else NODE.get("module")


def begin_node():
    """Lets it be compiled, unless that has begun. Until it is there ByPlan does the same."""
    if not NODE:
        NODE["module"] = None
        cpp.with_module("node", functools.partial(NODE.__setitem__, "module"))


def blas_handle():
    """For node.cpp: that of cuBLAS for this thread, or 0 if plans cannot be used now."""
    return torch.cuda.current_blas_handle() if can_repeat() else 0


def at_once(plans, key, inputs, prepare):
    """
    The results of a function of inputs as one operation of autograd, by a plan if there can be one.
    key: all on which it depends but inputs, in the dict plans.  prepare() returns function and
    back as in AtOnce of operators.py, and all that its kernels depend on but inputs' types.
    """
    def prepare_and_compile():
        function, back, of_kernels = prepare()

        def rehearse():
            with kernels_go_to(Nobody):
                results, saved = function(*inputs)
            with torch.autocast("cuda", enabled=False):     # a result is like its gradient
                back([True] * len(inputs), (results[0], *[None] * (len(results) - 1)), *saved)
            del results, saved
            function(*inputs)       # last, for kernels that go back take longer to compile
        if inputs[0].is_cuda:       # in Triton's interpreter it is not
            types = [None if t is None else t.dtype for t in inputs]
            compile_ahead((inputs[0].device, *types, of_kernels), rehearse)
        return function, back

    def make():
        function, back = prepare_and_compile()
        plan = Plan(lambda: function(*inputs), inputs)
        plan.back = back
        begin_node()
        return plan.as_node() if node() else plan
    plan = found(plans, key, inputs, make) if inputs[0].is_cuda and can_repeat() else None
    if plan is None:
        return AtOnce.apply(*prepare_and_compile(), *inputs)
    if type(plan) is Plan:
        return ByPlan.apply(plan, *inputs)
    return NODE["module"].run(plan, inputs)


class ByPlan(torch.autograd.Function):
    """AtOnce by a plan: all of forward and mostly all of backward by one call each."""

    @staticmethod
    def forward(ctx, plan, *inputs):
        results, memory = plan.repeat(inputs)
        ctx.plan = plan
        ctx.save_for_backward(memory, *(inputs[i] for i in plan.kept_inputs))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @differentiable_once
    @without_autocast
    def backward(ctx, *gradients):
        needs, saved, plan = ctx.needs_input_grad[1:], ctx.saved_tensors, ctx.plan
        gradients = [g if g is None else g.contiguous() for g in gradients]
        inputs = *saved, *gradients

        def compute():
            return plan.back(needs, gradients, *plan.all_kept(*saved)), ()
        ctx.plan_back = None
        if can_repeat():
            ctx.plan_back = Plan.of(plan.plans_back, needs, compute, inputs)
        results = compute()[0] if ctx.plan_back is None else ctx.plan_back.repeat(inputs)[0]
        return None, *results


@functools.cache
def entry_points():
    """repeat of repeat.cpp, the addresses of cuLaunchKernel and cublasGemmEx, which it calls, and
    that of what tells PyTorch's stream; or None if one of them is missing."""
    if (compiled := cpp.compiled("repeat")) is None:
        return None
    address = ctypes.c_void_p
    compiled.repeat.argtypes = (address, ctypes.c_int64, *[address] * 5)
    try:    # the cuBLAS that PyTorch is linked with; there may be others
        cuda = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cuda.so"))
        # the last one, which parameters_of calls, came with CUDA 12.4
        needed = (driver().cuLaunchKernel, cuda.cublasGemmEx,
                  cuda.aoti_torch_get_current_cuda_stream, driver().cuFuncGetParamInfo)
    except (OSError, AttributeError):
        return None
    return compiled.repeat, *(ctypes.cast(function, address) for function in needed[:3])


@functools.cache
def driver():
    return ctypes.CDLL("libcuda.so.1")


def parameters_of(handle):
    """How many parameters a kernel has."""
    count, at, size = 0, ctypes.c_size_t(), ctypes.c_size_t()
    while driver().cuFuncGetParamInfo(ctypes.c_void_p(handle), ctypes.c_size_t(count),
                                      ctypes.byref(at), ctypes.byref(size)) == 0:
        count += 1
    return count
