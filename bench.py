"""
What costs what: the selective scan in many ways, a training step and generation, next to others.
And what is learned: beside Transformers on a text, and on the paper's tasks (bench_compare.py).

python bench.py                                 # scan, train and generate, some minutes
python bench.py --suite=scan --shapes=4x1024x512x16,1x4096x1536x16      # each shape is BxLxDxN
python bench.py --suite=scan --lengths=256,1024,4096 --plot=scan.png
python bench.py --suite=train --compile
python bench.py --suite=block --d_model=768 --block_size=2048           # a block in eager calls
python bench.py --suite=generate --size=small --device=cuda
python bench.py --suite=compare --dataset=pydoc --seconds=60            # or --max_iters=500
python bench.py --suite=tasks

The variants of a table take turns, so that a busy machine slows all of them; times are medians of
whole calls, with quartiles, after a warm-up. On CUDA the scans run as CUDA graphs: what the GPU
does is timed, not how long Python takes to ask for it; and a training step follows another without
a wait in between, as in training. Peers that are installed join in: pip install mambapy
transformers (mamba_ssm on CUDA).
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))   # python -P leaves it out
    # As in train.py: torch reads these once. Large pages, on Linux: fresh memory costs less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")    # a thread that waits soon sleeps
    # Without such a workspace PyTorch does not trust cuBLAS to repeat itself; see set_up.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

from bench_compare import HEADS, MODELS, compare, compare_what, gpt_of_size, options_of_heads, tasks
from common import (
    Problem,
    autocast,
    compiled,
    flag,
    nearest,
    pick_device,
    pick_dtype,
    run,
    set_up,
)
from mamba import Mamba, MambaConfig, selective_scan

try:
    import mamba_fast as fast
except ImportError:     # what needs it is left out
    fast = None


@dataclass
class Config:
    suite: str = flag("all", "scan, train, generate, or all of these; or block; or compare; or "
                      "tasks")
    seconds: float = flag(3.0, "time for each variant; two calls at least, unless one takes longer;"
                          " of compare, for training each model, 60 by default")
    out: str = flag("results.json", "file for all results, raw times included")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float16; by default bfloat16 on CUDA, else "
                      "float32")
    compile: bool = flag(False, "also what needs torch.compile: chunked and PyTorch's "
                         "associative_scan, training and generation compiled")
    # scan
    shapes: str = flag("4x1024x512x16", "BxLxDxN,...: batch, length, channels, numbers remembered "
                       "by each channel")
    lengths: str = flag("", "L,...: also these lengths, with B, D and N of the first shape")
    plot: str = flag("", "picture of time and memory over --lengths (256,1024,4096 without); or of "
                     "compare's losses, by default beside --out, and a second one, of writing")
    longest: int = flag(65536, "cost per token from L = 256 to here, below 256 it is left out; and "
                        "the longest text of compare and tasks")
    memory_gb: float = flag(8.0, "a scan that would take more is left out")
    # train, block, generate and compare
    d_model: int = flag(256, "width of the small model")
    n_layer: int = flag(4, "its layers")
    layer: str = flag("mamba", "kind of our layers in train, block and generate: mamba, mamba2 or "
                      "mamba3")
    vocab_size: int = flag(65, "its vocabulary")
    batch_size: int = flag(8, "sequences in a training step")
    block_size: int = flag(256, "tokens in a sequence")
    size: str = flag("both", "the models that generate: small, 130m or both")
    texts: int = flag(1, "texts that are generated at once")
    start: int = flag(1, "tokens that each of them begins with; they are read within the time")
    new_tokens: int = flag(32, "tokens that one call generates for each")
    prompt: int = flag(1000, "tokens of the prompt that is read, and after which a token is timed")
    # compare and tasks
    dataset: str = flag("pydoc", "as for train.py")
    data_dir: str = flag("data", "folder of the prepared data")
    models: str = flag(",".join(MODELS), "which to compare; =1e-3 behind one is its learning "
                       "rate, 3e-3 without")
    max_iters: int = flag(0, "steps of each model, in place of --seconds", 0)
    dropout: float = flag(0.1, "of each model", 0, 1)
    seed: int = flag(1337, "of weights, batches and dropout", 0, 2 ** 31)
    task_steps: int = flag(0, "steps of each model of tasks; 0: as many as each task needs", 0)


PEERS = ("mambapy", "transformers", "mamba_ssm")

# ----------------------------------------------------------------------------------------------
# Measuring


def clock(call, device):
    """(seconds that a call takes until the device has done it, what it returns)"""
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    wait = waits.get(device.type, lambda: None)
    wait()
    start, result = time.perf_counter(), call()
    wait()
    return time.perf_counter() - start, result


def clock_on_gpu(call, device):
    """The same on CUDA for a call that is asked for while the one before it is still running."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def clock_and_memory(call, device):
    """As clock, and the MB that it takes on top of what was there: None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return *clock(call, device), (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        if device.type != "cpu" or sys.platform != "linux":
            raise OSError
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)    # glibc: memory kept for reuse hides what is taken
        Path("/proc/self/clear_refs").write_text("5")   # the high-water mark starts from here
    except OSError:
        return *clock(call, device), None
    before = resident_kb("VmRSS")
    return *clock(call, device), max(0, resident_kb("VmHWM") - before) / 1e3


def resident_kb(key):
    """Memory of this process, by Linux: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1.024


def warm_up(name, call, device, seconds, error_of):
    """The row of a variant before it is timed: its first calls, their memory, and its error."""
    row = {"variant": name, "times_s": [], "warmup_s": []}
    while len(row["warmup_s"]) < 2:     # the first sets up what stays, the second shows the usual
        took, result, row["memory_mb"] = clock_and_memory(call, device)
        row["warmup_s"].append(took)
        if took > seconds and "compiled" not in name:
            break
    row["error"] = error_of(name, result) if error_of else None
    if error_of and row["memory_mb"] is not None:
        made = sum(t.nbytes for t in result) / 1e6  # outputs and gradients, which every way makes
        row["memory_mb"] = max(0, row["memory_mb"] - made)
    return row


def measure(variants, device, seconds, error_of, replay=False, queue=False):
    """
    A row for each of the variants that works, and remarks. variants: {name: make}, make() -> call.
    All are warmed up, then run in turns until their time is up. On CUDA with replay as CUDA graphs,
    so that launches take no time; with queue as in a loop that never waits for the GPU.
    """
    gc.collect()    # the models of the table before
    rows, calls, remarks = [], {}, []
    on_cuda = device.type == "cuda"
    timed = clock_on_gpu if on_cuda and (replay or queue) else clock
    if on_cuda and replay and not fast:
        remarks.append("the times include launches: CUDA graphs need mamba_fast/")
    for name, make in variants.items():
        try:
            made_s, calls[name] = clock(make, device)
            row = warm_up(name, calls[name], device, seconds, error_of)
            row["ready_s"] = made_s + row["warmup_s"][0]    # CUDA graphs are made before a call
            if on_cuda and replay and fast:
                calls[name] = fast.recorded(calls[name], torch.empty(0, device=device))[0].replay
            rows.append(row)
        except Exception as error:  # noqa: BLE001 (other people's code may fail in any way)
            calls.pop(name, None)   # and the memory that it holds
            reason = (str(error).strip().splitlines() or [""])[0][:150]
            remarks.append(f"{name} failed: {type(error).__name__}: {reason}")
        if on_cuda:     # a failed one has left the GPU full
            gc.collect()
            torch.cuda.empty_cache()
    waiting = rows
    while waiting:
        for row in waiting:
            row["times_s"].append(timed(calls[row["variant"]], device)[0])
        waiting = [row for row in waiting if (t := row["times_s"])[0] < seconds
                   and (len(t) < 2 or (sum(t) < seconds and len(t) < 100))]
    remarks += [f"{row['variant']}: {row['ready_s']:.1f} s until its first call had ended"
                for row in rows if "compiled" in row["variant"]]
    if once := "; ".join(row["variant"] for row in rows if len(row["times_s"]) == 1):
        remarks.append(f"measured once, a call takes longer than --seconds: {once}")
    return rows, remarks


def table(bench, title, variants, tokens, error_of=None, floor=None, remarks=(), replay=False,
          queue=False, **about):
    """
    Measures, prints and writes one table. variants, error_of, replay, queue: as measure takes them.
    tokens: {name: how many a call makes}.  floor: {name: least seconds it can take}.
    """
    rows, more = measure(variants, bench.device, bench.cfg.seconds, error_of, replay, queue)
    remarks = [*remarks, *more]
    for row in rows:
        name, quartiles = row["variant"], np.percentile(row["times_s"], (25, 50, 75))
        row["low_s"], row["median_s"], row["high_s"] = quartiles.tolist()
        row["tokens_per_s"] = tokens[name] / row["median_s"]
        row["of_floor"] = floor[name] / row["median_s"] if floor else None
    peers = [row["median_s"] for row in rows if row["variant"] in PEERS]
    for row in rows:
        row["vs_peer"] = min(peers) / row["median_s"] if peers else None
    speeds, memory = ([row[key] for row in rows] for key in ("tokens_per_s", "memory_mb"))
    columns = {
        "variant": [row["variant"] for row in rows],
        "median ms": [f"{row['median_s'] * 1e3:.4g}" for row in rows],
        "quartiles": [f"{row['low_s'] * 1e3:.4g}..{row['high_s'] * 1e3:.4g}" for row in rows],
        "calls": [f"{len(row['times_s'])}" for row in rows],
        "tokens/s": [f"{x:,.1f}" if x < 1000 else f"{x:,.0f}" for x in speeds],
        "us/token": [f"{1e6 / x:.3f}" for x in speeds],
        "extra MB": ["n/a" if mb is None else f"{mb:,.0f}" for mb in memory],
        "error": [f"{row['error']:.1e}" for row in rows if error_of],
        "x best peer": [f"{row['vs_peer']:.2f}" for row in rows if peers],
        "of floor": [f"{row['of_floor']:.0%}" for row in rows if floor],
    }
    show(title, columns, remarks)
    bench.results["tables"].append({"title": title, **about, "rows": rows, "remarks": remarks})
    write(bench)    # after every table, so that Ctrl-C loses only the one it interrupts


def show(title, columns, remarks=()):
    """Prints a table. columns: {header: [what each row has]}; an empty one is left out."""
    shown = [[header, *column] for header, column in columns.items() if column]
    first, *widths = (max(11, *map(len, column)) for column in shown)
    print(f"\n{title}")
    for name, *rest in zip(*shown):
        print(f"{name:<{first}}", *(f"{x:>{n}}" for x, n in zip(rest, widths)), sep="  ")
    print(*(f"  {remark}\n" for remark in remarks), sep="", end="", flush=True)


def write(bench):
    Path(bench.cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(bench.cfg.out).write_text(json.dumps(bench.results, indent=1), encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# The scan. Here the other ways to compute it: log-depth scans over a and x, all decays and inputs,
# (B, L, D, N) each. Only products and sums of decays, so they are as stable as the loop; autograd
# makes their backward pass.


def hillis_steele(a, x):
    """Each takes in what is one step before it, then two, then four: log2(L) rounds over all."""
    step = 1
    while step < a.shape[1]:
        x = torch.cat([x[:, :step], torch.addcmul(x[:, step:], a[:, step:], x[:, :-step])], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    return x


def blelloch(a, x):
    """Join neighbours to pairs, scan the pairs, fill in what lies between: about 2 L joins."""
    length, pairs = a.shape[1], a.shape[1] // 2
    if length == 1:
        return x
    a_even, a_odd = a[:, :2 * pairs:2], a[:, 1::2]
    x_even, x_odd = x[:, :2 * pairs:2], x[:, 1::2]
    odd = blelloch(a_odd * a_even, torch.addcmul(x_odd, a_odd, x_even))     # h_1, h_3, ...
    later = torch.addcmul(x[:, 2::2], a[:, 2::2], odd[:, :(length - 1) // 2])
    even = torch.cat([x[:, :1], later], 1)                                  # h_0, h_2, ...
    return torch.cat([torch.stack([even[:, :pairs], odd], 2).flatten(1, 2), even[:, pairs:]], 1)


def materialised(scan):
    """The selective scan by way of h = scan(a, x), with all of (B, L, D, N) in memory."""
    def selective(u, delta, A, B, C):
        u, delta, B, C = (t.float() for t in (u, delta, B, C))
        a, x = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
        return (scan(a, x) @ C[..., None]).squeeze(-1)
    return selective


def mambapy_scan(*inputs):
    from mambapy.pscan import pscan
    return materialised(pscan)(*inputs)


def mamba_ssm_scan(u, delta, A, B, C):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    # (B, D, L) there: scan_inputs stores it like that
    u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
    return selective_scan_fn(u, delta, A, B, C).transpose(1, 2)


@functools.cache
def compiled_associative():
    from torch._higher_order_ops.associative_scan import associative_scan
    join = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    scan = lambda a, x: associative_scan(join, (a, x), dim=1, combine_mode="generic")[1]
    return torch.compile(materialised(scan), dynamic=False)


@functools.cache
def compiled_ours():
    return torch.compile(selective_scan, dynamic=False)


chunked, sequential, triton = (functools.partial(selective_scan, method=method)
                               for method in ("chunked", "sequential", "triton"))
chunked_compiled = lambda *inputs: compiled_ours()(*inputs, method="chunked")
# each scan, and how many tensors of (B, L, D, N) it holds at once in the forward pass and in
# forward + backward (measured)
SCANS = {
    "chunked": (chunked, 0, 0),
    "chunked, delta x 100": (chunked, 0, 0),
    "chunked, compiled": (chunked_compiled, 0, 0),
    "chunked, compiled, delta x 100": (chunked_compiled, 0, 0),
    "sequential": (sequential, 0, 5),
    "triton": (triton, 0, 0),
    "Hillis-Steele": (materialised(hillis_steele), 7, 45),
    "Blelloch": (materialised(blelloch), 7, 18),
    "associative_scan, compiled": (lambda *inputs: compiled_associative()(*inputs), 7, 18),
    "mambapy": (mambapy_scan, 6, 11),
    "mamba_ssm": (mamba_ssm_scan, 0, 0),
}


def scan_inputs(shape, bench, scale=1.0, channels_first=False):
    """u, delta, A, B, C as a fresh model has them, and a gradient for y. scale multiplies delta."""
    (batch, length, d_inner, d_state), g = shape, torch.Generator().manual_seed(0)
    u, gy = (torch.randn(batch, length, d_inner, generator=g) for _ in range(2))
    log_delta = torch.empty_like(u).uniform_(math.log(0.001), math.log(0.1), generator=g)
    delta = scale * torch.exp(log_delta)
    B, C = (torch.randn(batch, length, d_state, generator=g) for _ in range(2))
    A = -torch.arange(1.0, d_state + 1).repeat(d_inner, 1).to(bench.device)
    tensors = [t.to(bench.device, getattr(torch, bench.dtype)) for t in (u, delta, B, C, gy)]
    if channels_first:      # the same shapes and numbers, stored as (B, D, L)
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    u, delta, B, C, gy = tensors
    return [t.requires_grad_() for t in (u, delta, A, B, C)], gy


def scan_call(scan, inputs, gy, backward):
    """A call that returns [y], or [y and the gradients of all inputs]."""
    def call():
        with torch.set_grad_enabled(backward):
            y = scan(*inputs)
        if not backward:
            return [y.detach()]
        # one step does not depend on A: materialize_grads makes that gradient zero
        grads = torch.autograd.grad(y, inputs, gy.to(y.dtype), materialize_grads=True)
        return [y.detach(), *grads]
    return call


def exact(inputs, gy):
    """y and all gradients in float64 by the plain loop; in pieces, which take far less memory."""
    def scan(u, delta, A, B, C):
        state, ys = u.new_zeros(len(u), *A.shape), []
        for u_p, delta_p, B_p, C_p in zip(*(t.split(64, 1) for t in (u, delta, B, C))):
            y, state = checkpoint(sequential, u_p, delta_p, A, B_p, C_p, state=state,
                                  return_last_state=True, use_reentrant=False)
            ys.append(y)
        return torch.cat(ys, 1)
    where = "cpu" if gy.device.type == "mps" else gy.device     # MPS has no float64
    doubles = [t.detach().to(where).double().requires_grad_() for t in inputs]
    return scan_call(scan, doubles, gy.to(where).double(), True)()


def largest_error(results, expected):
    """The largest ||result - expected|| / ||expected||; of a forward pass alone only y is there."""
    pairs = [(result.to(e.device).double(), e) for result, e in zip(results, expected)]
    return max(((result - e).norm() / e.norm().clamp(min=1e-30)).item() for result, e in pairs)


# What the scan has to do with each of its (B, L, D, N) numbers. Forward: delta A, exp (as exp2,
# which is faster), x B, the recurrence, C . h. Backward: those again but C . h; gy C, the
# recurrence in reverse, the sums gx, gB and gC, two products to g a h, the sum into gA, and a
# product and a sum for gdelta.
FORWARD = {"mul": 2, "exp2": 1, "addcmul": 1, "sum over N": 1}
BACKWARD = {"mul": 2 + 1 + 2 + 1, "exp2": 1, "addcmul": 1 + 1 + 1, "sum over N": 2, "sum over D": 2}
OPERATIONS = {
    "copy": "out.copy_(a)", "exp": "torch.exp(a, out=out)", "exp2": "torch.exp2(a, out=out)",
    "mul": "torch.mul(a, b, out=out)", "addcmul": "torch.addcmul(a, b, c, out=out)",
    "sum over N": "torch.bmm(C, a)", "sum over D": "torch.bmm(gy, a.transpose(1, 2))"}


@functools.cache
def rates(device, d_inner, d_state):
    """ns per number of each operation, at the best of a few sizes: in the cache, and far larger."""
    best = dict.fromkeys(OPERATIONS, math.inf)
    for size in (2 ** 16, 2 ** 18, 2 ** 20, 2 ** 22):
        steps = max(1, size // (d_inner * d_state))
        numbers = steps * d_state * d_inner
        new = functools.partial(torch.rand, device=device)
        known = {name: new(steps, d_state, d_inner) for name in ("a", "b", "c", "out")}
        known.update(torch=torch, C=new(steps, 1, d_state), gy=new(steps, 1, d_inner))
        for name, operation in OPERATIONS.items():
            timer = Timer(operation, globals=known, num_threads=torch.get_num_threads())
            took = min(timer.timeit(max(1, 2 ** 22 // numbers)).mean for _ in range(5))
            best[name] = min(best[name], took * 1e9 / numbers)
    return best


def scan_tables(bench, shape):
    """Two tables for a shape, the forward pass and forward + backward."""
    batch, length, d_inner, d_state = shape
    large = [name for name in SCANS if name.endswith("delta x 100")]
    data = dict.fromkeys(SCANS, scan_inputs(shape, bench))
    data.update(dict.fromkeys(large, scan_inputs(shape, bench, scale=100.0)))
    exactly = dict.fromkeys(SCANS, exact(*data["chunked"]))
    exactly.update(dict.fromkeys(large, exact(*data[large[0]])))
    if "mamba_ssm" in bench.peers:
        data["mamba_ssm"] = scan_inputs(shape, bench, channels_first=True)
    ns, numbers, floor = rates(bench.device, d_inner, d_state), math.prod(shape), 0.0
    has_triton = fast and bench.device.type == "cuda"
    if bench.cfg.compile:
        torch.compiler.reset()      # it gives up after some number of shapes
    for backward, direction, part in ((False, "forward", FORWARD),
                                      (True, "forward + backward", BACKWARD)):
        floor += sum(count * ns[name] for name, count in part.items()) * numbers / 1e9
        remarks = [f"floor {floor * 1e3:.3g} ms: eager operations, each at its best (a fused "
                   "kernel may go below); ns: " + ", ".join(f"{op} {ns[op]:.3f}" for op in ns)]
        variants = {}
        for name, (scan, *held) in SCANS.items():
            gb = held[backward] * numbers * 4 / 1e9
            if "compiled" in name and not bench.cfg.compile:
                remarks.append(f"{name}: left out without --compile")
            elif gb > bench.cfg.memory_gb:
                remarks.append(f"{name}: left out, needs {gb:.0f} GB (--memory_gb)")
            elif name == "triton" and not has_triton:
                remarks.append("triton: left out, needs mamba_fast/ and CUDA")
            elif name in bench.peers or name not in PEERS:
                variants[name] = functools.partial(scan_call, scan, *data[name], backward)
        table(bench, f"scan, {direction}: B={batch} L={length} D={d_inner} N={d_state}, "
              f"{bench.dtype}", variants, dict.fromkeys(variants, batch * length),
              lambda name, got: largest_error(got, exactly[name]), dict.fromkeys(variants, floor),
              remarks, replay=True, shape=shape, direction=direction, rates_ns=ns)


def cost_per_token(bench, shape):
    """Does a token cost the same at every length?"""
    batch, _, d_inner, d_state = shape
    lengths = [256 * 4 ** i for i in range(10) if 256 * 4 ** i <= bench.cfg.longest]
    gb = 8 * 4 * batch * d_inner / 1e9  # for a step: inputs, y and gradients are 8 of (B, D)
    most = bench.cfg.memory_gb
    remarks = [f"L={n}: left out, needs {gb * n:.0f} GB (--memory_gb)"
               for n in lengths if gb * n > most]
    lengths = [n for n in lengths if gb * n <= most]
    for backward, direction in ((False, "forward"), (True, "forward + backward")):
        variants, tokens = {}, {}
        for n in lengths:
            name, inputs = f"chunked, L={n}", scan_inputs((batch, n, d_inner, d_state), bench)
            variants[name] = functools.partial(scan_call, chunked, *inputs, backward)
            tokens[name] = batch * n
        table(bench, f"cost per token, {direction}: B={batch} D={d_inner} N={d_state}, "
              f"{bench.dtype}", variants, tokens, remarks=remarks, replay=True)


def plot(bench, sweep):
    """Time and memory of forward + backward over L, as one picture."""
    rows = [(of["shape"][1], row) for of in bench.results["tables"]
            if of.get("shape") in sweep and of["direction"] != "forward" for row in of["rows"]]
    names = [name for name in dict.fromkeys(row["variant"] for _, row in rows)
             if "delta x" not in name]      # which lie upon those without
    panels = [("length, tokens", label, {name: sorted((length, row[key]) for length, row in rows
                                                      if row["variant"] == name and row[key])
                                         for name in names})
              for key, label in (("median_s", "seconds"), ("memory_mb", "MB on top of the inputs"))]
    batch, _, d_inner, d_state = sweep[0]
    draw(bench.cfg.plot, f"selective scan, forward + backward: B={batch} D={d_inner} N={d_state}, "
         f"{bench.results['machine']['name']}", panels, log=True)


def draw(path, title, panels, log=False):
    """A picture of panels, each (label of x, label of y, {name: [(x, y), ...]}), one above the
    other and in large letters, so that it can be read on a phone."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot: it may look for a display
    except ImportError:
        return print("no picture: matplotlib is not installed")
    with matplotlib.rc_context({"font.size": 14, "svg.hashsalt": "the same ids each time"}):
        figure = Figure(figsize=(7, 4.2 * len(panels)), layout="constrained")
        for axis, (xlabel, ylabel, curves) in zip(figure.subplots(len(panels)), panels):
            for name, points in curves.items():
                axis.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
            if log:
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
            axis.set(xlabel=xlabel, ylabel=ylabel)
            axis.grid(alpha=0.3)
        names = {name: line for axis in figure.axes
                 for line, name in zip(*axis.get_legend_handles_labels())}
        figure.legend(names.values(), names, loc="outside lower center", ncols=3, fontsize="small")
        figure.suptitle("\n".join(textwrap.wrap(title, 56)), fontsize="medium")
        figure.savefig(path, dpi=150)
    print(f"wrote {path}")


# ----------------------------------------------------------------------------------------------
# Whole models


class Mambapy(nn.Module):
    """mambapy's layers as a language model; its own one needs a package more."""

    def __init__(self, vocab_size, d_model, n_layer):
        super().__init__()
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = Mamba(MambaConfig(d_model=d_model, n_layers=n_layer))
        self.norm, self.head = RMSNorm(d_model), nn.Linear(d_model, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, idx):
        return self.head(self.norm(self.layers(self.embedding(idx))))

    def generate(self, start, n):
        c, tokens = self.layers.config, list(start.unbind(1))
        zeros = functools.partial(self.head.weight.new_zeros, len(start), c.d_inner, c.d_conv - 1)
        caches = [(None, zeros()) for _ in range(c.n_layers)]
        for i in range(len(tokens) + n - 1):
            x, caches = self.layers.step(self.embedding(tokens[i]), caches)
            if i + 1 >= len(tokens):
                tokens.append(self.head(self.norm(x)).argmax(-1))


def build(name, vocab_size, d_model, n_layer, layer):
    """The model of this package, of one size everywhere, with random weights."""
    torch.manual_seed(0)
    if name == "mambapy":
        return Mambapy(vocab_size, d_model, n_layer)
    if name == "transformers":
        import transformers
        transformers.logging.set_verbosity_error()
        config = transformers.MambaConfig(vocab_size=vocab_size, hidden_size=d_model,
                                          num_hidden_layers=n_layer)
        if hasattr(config, "use_mambapy"):      # its own loop takes 20 times longer to train
            config.use_mambapy = importlib.util.find_spec("mambapy") is not None
        return transformers.MambaForCausalLM(config)
    return Mamba(MambaConfig(vocab_size=vocab_size, d_model=d_model, n_layer=n_layer, layer=layer,
                             **options_of_heads(layer, d_model)))


def models_among(bench):
    """The peers that are language models, as mamba_ssm is not here; for Mamba-1 alone."""
    return [name for name in bench.peers if name != "mamba_ssm" and bench.cfg.layer == "mamba"]


def training_step(bench, name, x, y, remarks):
    """A call that does a whole step: forward, loss, backward, AdamW."""
    cfg = bench.cfg
    model = build(name, cfg.vocab_size, cfg.d_model, cfg.n_layer, cfg.layer)
    if name == "Transformer":
        model = gpt_of_size(model.num_params(), cfg.vocab_size, cfg.d_model, cfg.n_layer)
    parameters = sum(p.numel() for p in model.parameters())
    remarks.append(f"{name}: {parameters / 1e6:.2f}M parameters")
    model = model.to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    network = compiled(model) if name.endswith("compiled") else model

    def gradients(x, y):
        optimizer.zero_grad(set_to_none=True)
        with autocast(bench.device, bench.dtype):
            if name.startswith("ours") or name == "Transformer":
                loss = network(x, y)[1]
            else:
                logits = network(x).logits if name == "transformers" else network(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        loss.backward()
        return loss.detach()
    if name.startswith("ours") and fast and fast.has_triton(model.lm_head.weight, 16):
        gradients = fast.replayed([gradients], x, y)[0]     # as train.py does it

    def step():
        gradients(x, y)
        optimizer.step()
    return step


def train_suite(bench):
    cfg, remarks = bench.cfg, []
    set_up(bench.device)
    shape = (cfg.batch_size, cfg.block_size + 1)
    tokens = torch.randint(cfg.vocab_size, shape, device=bench.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    names = ["ours", *["ours, compiled"] * cfg.compile, *models_among(bench), "Transformer"]
    variants = {name: functools.partial(training_step, bench, name, x, y, remarks)
                for name in names}
    table(bench, f"training step: d_model {cfg.d_model}, {cfg.n_layer} layers of {cfg.layer}, "
          f"vocabulary {cfg.vocab_size}, B={cfg.batch_size} L={cfg.block_size}, {bench.dtype}",
          variants, dict.fromkeys(names, x.numel()), remarks=remarks, queue=True)


def block_step(bench, name, x):
    """A call of a single block, forward and backward, and of AdamW, as a network of one's own makes
    them."""
    cfg, layer = bench.cfg, bench.cfg.layer
    if name == "mamba_ssm":
        import mamba_ssm
        block = getattr(mamba_ssm, layer.capitalize())(cfg.d_model)
    else:
        config = MambaConfig(d_model=cfg.d_model, layer=layer)
        block = config.block(config)
    block = block.to(bench.device)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4, fused=True)

    def step():
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        with autocast(bench.device, bench.dtype):
            y = block(x)
        y.backward(y.detach())
        optimizer.step()
    return step


def block_suite(bench):
    cfg = bench.cfg
    shape = cfg.batch_size, cfg.block_size, cfg.d_model
    x = torch.randn(shape, device=bench.device, requires_grad=True)
    names = ["ours", *(name for name in bench.peers if name == "mamba_ssm")]
    table(bench, f"a block of {cfg.layer} and its AdamW: d_model {cfg.d_model}, B={cfg.batch_size} "
          f"L={cfg.block_size}, {bench.dtype}",
          {name: functools.partial(block_step, bench, name, x) for name in names},
          dict.fromkeys(names, cfg.batch_size * cfg.block_size), queue=True)


def generating(bench, name, shape, dtype, compiled):
    """A call that generates, greedily, cfg.new_tokens for each of cfg.texts of cfg.start tokens."""
    n, size = bench.cfg.new_tokens, (bench.cfg.texts, bench.cfg.start)
    start = torch.randint(shape[0], size, device=bench.device)
    weights = getattr(torch, bench.dtype if dtype == "int8" else dtype)
    model = build(name, *shape).to(bench.device, weights).eval()
    if dtype == "int8":
        fast.quantize_int8(model)
    if name == "transformers":
        model.generation_config.eos_token_id = None     # random weights would end it anywhere
        return lambda: model.generate(start, max_new_tokens=n, do_sample=False, pad_token_id=0)
    if name == "mambapy":
        return torch.no_grad()(lambda: model.generate(start, n))
    return lambda: model.generate(start, n, temperature=0, compile=compiled)


def reading(bench, shape, by_scan):
    """A call that reads a prompt, up to the next logits: by the scan, or by the step of a token."""
    model = build("ours", *shape).to(bench.device, getattr(torch, bench.dtype)).eval()
    prompt = torch.randint(shape[0], (1, bench.cfg.prompt), device=bench.device)

    @torch.no_grad()
    def call():
        if by_scan:
            for _ in model.read(prompt):
                pass
        else:       # the decoder has read all but the last token of its prompt: here nothing yet
            step = model.decoder([prompt[0, :1]], model.init_state(1))
            for token in prompt.unbind(1):
                step(token)
    return call


def going_on(bench, shape, position):
    """A call that generates cfg.new_tokens tokens, after `position` that were read before."""
    model = build("ours", *shape).to(bench.device, getattr(torch, bench.dtype)).eval()
    text, n = torch.randint(shape[0], (1, position), device=bench.device), bench.cfg.new_tokens
    *_, (_, state) = model.read(text)
    return lambda: list(model.stream(text[:, -1:], n, temperature=0, state=state))


def generate_suite(bench):
    memory = torch.ones(2 ** 26, device=bench.device)   # 256 MB: more than any cache holds
    bandwidth = memory.nbytes / min(clock(memory.sum, bench.device)[0] for _ in range(6))
    del memory
    small = (bench.cfg.vocab_size, bench.cfg.d_model, bench.cfg.n_layer)
    for size, shape in {"small": small, "130m": (50280, 768, 24)}.items():
        if bench.cfg.size in (size, "both"):
            generation_tables(bench, (*shape, bench.cfg.layer), bandwidth)


def generation_tables(bench, shape, bandwidth):
    """Three tables for a model of these sizes and kind, see build. bandwidth: bytes/s."""
    cfg, remarks = bench.cfg, []
    with torch.device("meta"):
        parameters = build("ours", *shape).num_params()
    what = (f"d_model {shape[1]}, {shape[2]} layers of {shape[3]}, vocabulary {shape[0]}, "
            f"{parameters / 1e6:.2f}M parameters, {bench.dtype}")

    # {variant: (package, dtype)}
    names = {name: (name, bench.dtype) for name in ("ours", *models_among(bench))}
    names.update({f"ours, {dtype}": ("ours", dtype) for dtype in ("bfloat16", "int8")})
    if cfg.compile and bench.device.type == "cpu":      # elsewhere there is one step
        torch.compiler.reset()
        names.update({f"{name}, compiled": names[name] for name in list(names)
                      if name.startswith("ours")})
    if not fast:
        needy = [name for name in names if "int8" in name or "compiled" in name]
        remarks = [f"{name}: left out, needs mamba_fast/" for name in needy]
        names = {name: of for name, of in names.items() if name not in needy}
    read_s = {name: parameters * getattr(torch, dtype).itemsize / bandwidth
              for name, (_, dtype) in names.items()}
    allowed = ", ".join(f"{1 / read_s[name]:,.0f} tokens/s as {names[name][1]}" for name in names
                        if name.startswith("ours") and not name.endswith("compiled"))
    remarks = [f"floor: {bandwidth / 1e9:.1f} GB/s read all weights once per token at {allowed} "
               + "(more if a cache holds them)", *remarks]
    variants = {name: functools.partial(generating, bench, package, shape, dtype,
                                        compiled=name.endswith("compiled"))
                for name, (package, dtype) in names.items()}
    table(bench, f"generation, {cfg.texts} x {cfg.new_tokens} tokens after {cfg.start}: {what}",
          variants, dict.fromkeys(names, cfg.texts * cfg.new_tokens),
          floor={name: cfg.new_tokens * s for name, s in read_s.items()}, remarks=remarks)

    variants = {"ours, by the scan": functools.partial(reading, bench, shape, True)}
    if cfg.prompt <= 10_000:    # else it would take minutes
        variants["ours, token by token"] = functools.partial(reading, bench, shape, False)
    table(bench, f"reading a prompt of {cfg.prompt:,} tokens: {what}", variants,
          dict.fromkeys(variants, cfg.prompt))
    variants = {f"ours, after {n:,}": functools.partial(going_on, bench, shape, n)
                for n in sorted({100, cfg.prompt})}
    table(bench, f"generation after a prompt: {what}", variants,
          dict.fromkeys(variants, cfg.new_tokens))


# ----------------------------------------------------------------------------------------------
# The flags, and the suites that they ask for


def parse_sizes(name, text, count, example):
    """4x1024x512x16,... as lists of `count` numbers."""
    one = "x".join([r"0*[1-9]\d*"] * count)
    if not re.fullmatch(f"{one}(,{one})*", text):
        raise Problem(f"--{name} takes {example}, not '{text}'")
    return [[int(number) for number in part.split("x")] for part in text.split(",")]


def machine_of(device):
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return {"name": torch.cuda.get_device_name() if device.type == "cuda" else cpu, "cpu": cpu,
            "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "system": platform.platform(),
            "date": time.strftime("%Y-%m-%d %H:%M")}


def main(cfg, given):
    for name, choices in (("suite", ("scan", "train", "block", "generate", "all", "compare",
                                     "tasks")),
                          ("size", ("small", "130m", "both")), ("layer", ("mamba", *HEADS))):
        if (value := getattr(cfg, name)) not in choices:
            hint = nearest(value, choices)
            raise Problem(f"--{name} takes {', '.join(choices)}, not '{value}'{hint}")
    for name in ("seconds", "memory_gb", "d_model", "n_layer", "vocab_size", "batch_size",
                 "block_size", "texts", "start", "new_tokens", "prompt"):
        if getattr(cfg, name) <= 0:
            raise Problem(f"--{name} must be above 0, not {getattr(cfg, name)}")
    if cfg.suite == "compare":
        if cfg.max_iters and "seconds" in given:
            raise Problem("--seconds and --max_iters are two ways to say how long; give one")
        cfg.seconds = given.get("seconds", 60.0)
        compared = compare_what(cfg)
    shapes = parse_sizes("shapes", cfg.shapes, 4, "BxLxDxN, as in 4x1024x512x16,1x4096x512x16")
    lengths = cfg.lengths or ("256,1024,4096" if cfg.plot else "")
    if lengths:
        lengths = parse_sizes("lengths", lengths, 1, "lengths, as in 256,1024,4096")
    sweep = [[shapes[0][0], length, *shapes[0][2:]] for length, in lengths]
    device = pick_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    peers = [name for name in PEERS if importlib.util.find_spec(name)
             and (name != "mamba_ssm" or device.type == "cuda")]
    machine = machine_of(device)
    for name in peers:      # a peer that was copied here has no version
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine[name] = importlib.metadata.version(name)
    results = {"machine": machine, "flags": asdict(cfg), "tables": []}
    bench = SimpleNamespace(cfg=cfg, device=device, dtype=pick_dtype(cfg.dtype, device),
                            peers=peers, results=results, clock=clock, show=show, draw=draw,
                            clock_and_memory=clock_and_memory, write=write)
    write(bench)    # now, not after minutes, it shows whether the file can be written
    print(", ".join(f"{key} {value}" for key, value in machine.items() if key != "name"))
    absent = ", ".join(name for name in PEERS if name not in peers)
    print(f"peers: {', '.join(peers) or 'none'}" + (f"; absent: {absent}" if absent else ""))

    if cfg.suite in ("scan", "all"):
        for shape in [*shapes, *(shape for shape in sweep if shape not in shapes)]:
            scan_tables(bench, shape)
        if cfg.longest >= 256:
            cost_per_token(bench, shapes[0])
        if cfg.plot:
            plot(bench, sweep)
    if cfg.suite in ("train", "all"):
        train_suite(bench)
    if cfg.suite == "block":
        block_suite(bench)
    if cfg.suite in ("generate", "all"):
        generate_suite(bench)
    if cfg.suite == "compare":
        compare(bench, *compared)
    if cfg.suite == "tasks":
        tasks(bench)
    print(f"\nwrote {cfg.out}")


if __name__ == "__main__":
    run(main, Config)
