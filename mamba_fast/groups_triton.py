"""
x_proj and the step of the scan as one kernel, for several texts of a Mamba-1; for step_triton.py,
which explains PDL.

dt, B and C are sums over all D channels. A group of programs has a few texts, and each program of
it 128 channels. First it multiplies these by their weights of x_proj, which gives its part of the
sums. Then it waits for the others of its group, adds up their parts, and makes the step of the scan
for its channels. Of two kernels the second one could fetch the states only while the first one is
at work, which is short. This kernel fetches them while in_proj is at work, which is long.

Programs that wait for each other must all have been started, so there are no more of them than the
GPU has multiprocessors. If other work takes up some of these, they start one by one as room comes.
A GPU starts those of one kernel in the order of their numbers, and then those of the next kernel,
although CUDA does not promise that. So only the last group that has begun to start can be
incomplete; the others end and make room for the rest of it.
"""
from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import constexpr
from triton.experimental.gluon.language.nvidia import ampere

from .bytes_triton import _let_next_start, _wait
from .scan_triton import LOG2E, PLAIN, _softplus, async_copy, async_load, barrier

W = constexpr(8)        # warps of a program
BD = constexpr(128)     # its channels
BS = constexpr(128)     # outputs of x_proj, at most
BM = constexpr(8)       # texts of a group, at most: the columns of a product on the tensor cores
MOST_STATES = 128       # for each channel: texts x numbers of a state that fit in registers
REGISTERS = 152         # of a thread, at most: programs of in_proj then fit beside this one

# products (BD or BS, BM), and their operands
MMA = constexpr(gl.NVMMADistributedLayout([2, 0], [W.value, 1], [16, 8]))
LEFT = constexpr(gl.DotOperandLayout(0, MMA.value, 2))
RIGHT = constexpr(gl.DotOperandLayout(1, MMA.value, 2))
# the sums of x_proj, (BM, outputs)
SUMS = constexpr(gl.BlockedLayout([1, 4], [1, 32], [W.value, 1], [1, 0]))

# thread 0 says that its program is here, and waits until all of them are
MEET = constexpr("""{
    .reg .pred p;
    .reg .b32 n;
    mov.u32 n, %tid.x;
    setp.ne.u32 p, n, 0;
    @p bra done;
    red.release.gpu.global.add.s32 [$1], 1;
    again: ld.acquire.gpu.global.s32 n, [$1];
    setp.lt.s32 p, n, $2;
    @p bra again;
    done: mov.b32 $0, 0;
    }""")


@gluon.jit
def _meet(count, PROGRAMS: constexpr):
    """Waits until all programs of the group are here. Then every thread sees what they have
    written."""
    barrier()
    gl.inline_asm_elementwise(MEET, "=r,l,r", [count.to(gl.int64), PROGRAMS], gl.int32, False, 1)
    barrier()


@triton.constexpr_function
def of_copies(COLUMNS):
    """The layout in which rows of so many numbers of 16 bits are copied."""
    return gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [W.value, 1], [1, 0])


@gluon.jit
def _copied(matrix, r0, end_r, c0, end_c, STRIDE: constexpr, ROWS: constexpr, COLUMNS: constexpr):
    """ROWS rows from r0 on and COLUMNS columns from c0 on of a matrix, as the tensor cores want
    them in shared memory, and 0 from the rows end_r and the columns end_c on. They are on their way
    when this returns."""
    LAYOUT: constexpr = of_copies(COLUMNS)
    SHARED: constexpr = gl.NVMMASharedLayout(min(128, 2 * COLUMNS), 16, 2)
    r = r0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    c = c0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))[None, :]
    buffer = gl.allocate_shared_memory(matrix.dtype.element_ty, [ROWS, COLUMNS], SHARED)
    async_load(buffer, matrix + r * STRIDE + c, mask=(r < end_r) & (c < end_c))
    return buffer


@gluon.jit
def _sums_of(parts, r0, end, rows, R: constexpr, N: constexpr, BR: constexpr, BN: constexpr,
             PROGRAMS: constexpr):
    """The sums of all parts for the texts r0 to end, in shared memory: (BM, BR + 2 BN), padded with
    zeros to a power of two."""
    SIZE: constexpr = BR + 2 * BN
    r = r0 + gl.arange(0, BM, gl.SliceLayout(1, SUMS))[:, None]
    s = gl.arange(0, triton.next_power_of_2(SIZE), gl.SliceLayout(0, SUMS))[None, :]
    is_B_or_C = (s >= BR) & (s < SIZE) & ((s - BR) % BN < N)
    there = (r < end) & ((s < R) | is_B_or_C)
    each = ()       # all of them are on their way before the first is added
    for i in gl.static_range(PROGRAMS):
        each = each + (gl.load(parts + (i * rows + r) * SIZE + s, mask=there, other=0),)
    total = each[0]
    for i in gl.static_range(1, PROGRAMS):
        total += each[i]
    return gl.allocate_shared_memory(gl.float32, total.shape, PLAIN, total)


@gluon.jit
def _advance(x_proj, dt_proj, dt_bias, A_log, Dw, u, gate, h, y, parts, count, rows,
             D: constexpr, N: constexpr, R: constexpr, TEXTS: constexpr, BN: constexpr,
             BR: constexpr, PDL: constexpr):
    """
    One step of the scan for TEXTS texts and BD channels: h (rows, D, N) in place, y (rows, D).
    u, gate: (rows, D).  parts: (PROGRAMS, rows, BR + 2 BN), R numbers for dt from 0 on, N for B
    from BR and for C from BR + BN on.  count: (groups,), of zeros.  gate, h and parts in float32.
    """
    PROGRAMS: constexpr = (D + BD - 1) // BD    # of a group
    SIZE: constexpr = BR + 2 * BN
    STATE: constexpr = gl.BlockedLayout([1, BN // 4], [8, 4], [W, 1], [1, 0])   # (BD, BN)
    OF_D: constexpr = gl.SliceLayout(1, STATE)
    group, part = gl.program_id(0) // PROGRAMS, gl.program_id(0) % PROGRAMS
    r0, d0 = group * TEXTS, part * BD
    end = gl.minimum(r0 + TEXTS, rows)
    w = _copied(x_proj, 0, R + 2 * N, d0, D, D, BS, BD)
    dt_w = _copied(dt_proj, d0, D, 0, R, R, BD, BR)
    d, n = d0 + gl.arange(0, BD, OF_D), gl.arange(0, BN, gl.SliceLayout(0, STATE))[None, :]
    of_h, in_n = d[:, None] * N + n, n < N
    A = gl.load(A_log + of_h, mask=(d < D)[:, None] & in_n, other=0).to(gl.float32)
    A_2 = -gl.exp2(A * LOG2E) * LOG2E
    D_d = gl.load(Dw + d, mask=d < D, other=0)
    of_bias = d0 + gl.arange(0, BD, gl.SliceLayout(1, MMA))
    bias = gl.load(dt_bias + of_bias, mask=of_bias < D, other=0)[:, None]
    in_y, states, us, gates = (), (), (), ()
    for i in gl.static_range(TEXTS):
        in_y = in_y + (d < gl.where(r0 + i < end, D, 0),)
        at = h + (r0 + i) * (D * N) + of_h
        states = states + (gl.load(at, mask=in_y[i][:, None] & in_n, other=0),)
    if PDL:
        _wait()
        _let_next_start()
    x = _copied(u, r0, end, d0, D, D, BM, BD)
    async_copy.commit_group()
    for i in gl.static_range(TEXTS):    # needed last, but on its way while the product is made
        of_y = (r0 + i) * D + d
        us = us + (gl.load(u + of_y, mask=in_y[i], other=0).to(gl.float32),)
        gates = gates + (gl.load(gate + of_y, mask=in_y[i], other=0),)
    async_copy.wait_group(0)
    barrier()
    outputs = ampere.mma_v2(w.load(LEFT), x.permute((1, 0)).load(RIGHT),
                            gl.zeros([BS, BM], gl.float32, MMA))
    r = r0 + gl.arange(0, BM, gl.SliceLayout(0, MMA))[None, :]
    s = gl.arange(0, BS, gl.SliceLayout(1, MMA))[:, None]
    place = gl.where(s < R, s, gl.where(s < R + N, s + (BR - R), s + (BR + BN - R - N)))
    gl.store(parts + (part * rows + r) * SIZE + place, outputs, mask=(s < R + 2 * N) & (r < end))
    _meet(count + group, PROGRAMS)
    sums = _sums_of(parts, r0, end, rows, R, N, BR, BN, PROGRAMS)
    dt = sums.slice(0, BR, 1).permute((1, 0)).load(RIGHT).to(u.dtype.element_ty)
    raw = ampere.mma_v2(dt_w.load(LEFT), dt, gl.zeros([BD, BM], gl.float32, MMA))
    deltas = gl.allocate_shared_memory(gl.float32, [BD, BM], PLAIN, _softplus(raw + bias))
    for i in gl.static_range(TEXTS):
        delta, row = deltas.slice(i, 1, 1).load(STATE), sums.slice(i, 1, 0)    # (BD, 1)
        B, C = row.slice(BR, BN, 1).load(STATE), row.slice(BR + BN, BN, 1).load(STATE)
        h_i = gl.exp2(delta * A_2) * states[i] + delta * us[i][:, None] * B
        gl.store(h + (r0 + i) * (D * N) + of_h, h_i, mask=in_y[i][:, None] & in_n)
        y_i = (gl.sum(h_i * C, 1) + D_d * us[i]) * gates[i]
        gl.store(y + (r0 + i) * D + d, y_i.to(y.dtype.element_ty), mask=in_y[i])


def split(config, layers, y):
    """
    How many texts each group has in a step with y (rows, D), and memory for the counts of _meet,
    (n_layer, groups or a few more), which has to be set to 0 when a step begins. None where two
    kernels have to do it.
    """
    if config.layer != "mamba" or len(y) == 1:
        return None
    (rows, D), R, N = y.shape, config.dt_rank, config.d_state
    most = multiprocessors(y.device) // triton.cdiv(D, BD)      # groups
    most_texts = min(BM.value, MOST_STATES // triton.next_power_of_2(N))
    if rows > most * most_texts or R + 2 * N > BS:
        return None
    mixers = [layer.mixer for layer in layers]
    weights = [w for m in mixers for w in (m.x_proj.weight, m.dt_proj.weight)]
    # copies are of 16 bytes, which are 8 numbers
    if (y.element_size() != 2 or D % 8 > 0 or R % 8 > 0
            or any(w.dtype != y.dtype or w.data_ptr() % 16 > 0 for w in weights)
            or any(m.x_proj.bias is not None for m in mixers)):
        return None
    texts = triton.cdiv(rows, most)
    groups = 4 * triton.cdiv(rows, 4 * texts)       # of each layer: they begin 16 bytes apart
    return texts, torch.empty(len(layers), groups, dtype=torch.int32, device=y.device)


def channels(texts, counts, config, _project, u, gate, y, pdl):
    """As _channels in step_triton.py, with what split returns: advance(block, h), which is to be
    called once for each layer."""
    rows, D, N, R = len(u), config.d_inner, config.d_state, config.dt_rank
    programs, power = triton.cdiv(D, BD), triton.next_power_of_2
    BN, BR = max(4, power(N)), max(16, power(R))
    parts, of_layers = gate.new_empty(programs, rows, BR + 2 * BN), iter(counts)

    def advance(block, h):
        _advance[triton.cdiv(rows, texts) * programs,](
            block.x_proj.weight, block.dt_proj.weight, block.dt_proj.bias, block.A_log, block.D, u,
            gate, h, y, parts, next(of_layers), rows, D, N, R, texts, BN, BR, num_warps=W.value,
            maxnreg=REGISTERS, **pdl)
    return advance


def multiprocessors(device):
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
