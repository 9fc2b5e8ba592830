"""
The tests: python -m pytest. They need no network and no data but what they make.

Numbers are compared with a float64 loop written here, with transformers' Mamba and with mambapy; training and resuming
run as real processes with real signals; downloads come from a small server here that can also misbehave.
"""
from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import hashlib
import html.parser
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import mamba
import prepare_data
import sample
import train
from mamba import Mamba, MambaBlock, MambaConfig, quantize_int8, selective_scan

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# The scan

LENGTHS, STATES, BATCHES, WIDTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65, 127, 257), (1, 4, 16, 64), (1, 3), (1, 5, 64)
OPTIONS = ("D", "z", "delta_bias", "state")


def loop64(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):
    """The recurrence once more, in float64 and by other means than mamba.py: (y, last_state)."""
    u, delta, A, B, C, D, z, delta_bias, state = (
        None if t is None else t.double() for t in (u, delta, A, B, C, D, z, delta_bias, state))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    h = torch.zeros(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float64) if state is None else state
    columns = list(zip(*(t.unbind(1) for t in (u, delta, B, C))))
    ys = []
    for u_t, delta_t, B_t, C_t in columns:
        h = torch.exp(torch.einsum("bd,dn->bdn", delta_t, A)) * h + torch.einsum("bd,bn,bd->bdn", delta_t, B_t, u_t)
        ys.append(torch.einsum("bdn,bn->bd", h, C_t))
    y = torch.stack(ys, 1)
    y = y if D is None else y + u * D
    return (y if z is None else y * z * torch.sigmoid(z)), h


def scan_inputs(batch, length, d_inner, d_state, options=OPTIONS, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    inputs = {"u": rand(batch, length, d_inner), "delta": rand(batch, length, d_inner) - 2,
              "A": -torch.exp(rand(d_inner, d_state)), "B": rand(batch, length, d_state),
              "C": rand(batch, length, d_state), "D": rand(d_inner), "z": rand(batch, length, d_inner),
              "delta_bias": rand(d_inner), "state": rand(batch, d_inner, d_state)}
    return {k: v.to(dtype).requires_grad_() for k, v in inputs.items() if k in options or k not in OPTIONS}


def gradients(y, last_state, inputs):
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, last_state)]
    loss = (y.double() * weights[0]).sum() + (last_state.double() * weights[1]).sum()
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()))))


def relative(x, reference, scale=0.0):
    """Error over the size of the reference; what is smaller than 1e-12 counts as 0."""
    return (x.double() - reference.double()).norm().item() / max(reference.double().norm().item(), scale, 1e-12)


COMPILED = mamba._compiled


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """What the compiled scan gives torch.compile runs as it is, but where a test asks for the compiler."""
    monkeypatch.setattr(mamba, "_compiled", lambda function: function)


def run_scan(method, D=None, z=None, delta_bias=None, delta_softplus=False, state=None, **inputs):
    """(y, last_state) by selective_scan, or as it runs in a compiled model."""
    more = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
    if method != "compiled":
        return selective_scan(**inputs, **more, state=state, return_last_state=True, method=method)
    state = torch.zeros(len(inputs["u"]), *inputs["A"].shape) if state is None else state
    with torch.autocast("cpu", enabled=False):
        return mamba.selective_scan_sequential(**inputs, **more, state=state, recurrence=mamba._recurrence_compiled)


def check_scan(inputs, method, softplus=True, tolerance=1e-5):
    """Outputs and all gradients against loop64, relative to the norm of each."""
    if not softplus:    # a negative step would let the state grow without bound
        inputs = {k: v.detach().abs().requires_grad_() if k in ("delta", "delta_bias") else v for k, v in inputs.items()}
    y, last = run_scan(method, **inputs, delta_softplus=softplus)
    expected, expected_last = loop64(**inputs, delta_softplus=softplus)
    assert y.dtype == inputs["u"].dtype and last.dtype in (torch.float32, torch.float64)
    errors = {"y": relative(y, expected), "last_state": relative(last, expected_last)}
    got, reference = gradients(y, last, inputs), gradients(expected, expected_last, inputs)
    # the gradient of delta_bias is a sum of delta's, which may cancel: its error is as large as that of its terms
    scales = {"delta_bias": reference["delta"].norm().item()}
    errors.update({f"d{name}": relative(got[name], reference[name], scales.get(name, 0)) for name in inputs})
    bad = {name: error for name, error in errors.items() if not error < tolerance}
    assert not bad, bad


@pytest.mark.parametrize("method", ["sequential", "chunked", "compiled"])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_float64(length, method):
    rng = random.Random(length)
    for batch, d_inner, d_state in itertools.product(BATCHES, WIDTHS, STATES):
        check_scan(scan_inputs(batch, length, d_inner, d_state), method)
        some = [name for name in OPTIONS if rng.random() < 0.5]
        check_scan(scan_inputs(batch, length, d_inner, d_state, some), method, softplus=rng.random() < 0.5)


@pytest.mark.parametrize("method", ["sequential", "chunked", "compiled"])
@pytest.mark.parametrize("softplus", [False, True])
def test_scan_options(method, softplus):
    for count in range(len(OPTIONS) + 1):
        for options in itertools.combinations(OPTIONS, count):
            check_scan(scan_inputs(3, 65, 5, 4, options), method, softplus)


def set_tiles(monkeypatch, steps, in_stretch, at_once):
    shape = SimpleNamespace(steps=steps, in_stretch=in_stretch, at_once=at_once)
    monkeypatch.setattr(mamba, "_tile_shape", lambda u, A_t: shape)


@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 2, 1), (3, 4, 1), (1, 1, 1), (4, 2, 2), (3, 4, 4), (8, 4, 3)])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 31, 47])
def test_scan_tiles(monkeypatch, length, shape):
    """Every way in which a sequence can end inside or at the end of a tile and of a stretch, tiles one by one (as on a
    CPU) or at once (as on a GPU without Triton)."""
    set_tiles(monkeypatch, *shape)
    check_scan(scan_inputs(2, length, 5, 4), "chunked")


@pytest.mark.parametrize("shape", [(1, 2500, 3, 4), (4, 40, 512, 16), (7, 20, 300, 15)])
def test_scan_of_many_stretches_and_of_padded_states(shape):
    check_scan(scan_inputs(*shape), "chunked")


@pytest.mark.parametrize("method", ["sequential", "chunked", "compiled"])
@pytest.mark.parametrize("length", [1, 2, 9, 17])
def test_scan_gradcheck(monkeypatch, method, length):
    set_tiles(monkeypatch, 4, 2, 1)
    inputs = scan_inputs(2, length, 3, 2, dtype=torch.float64)

    def scan(*values):
        return run_scan(method, **dict(zip(inputs, values)), delta_softplus=True)
    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("method", ["sequential", "chunked", "compiled"])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 100.0, 1000.0])
def test_scan_extreme_decay(method, size):
    """delta A from 0 (nothing is forgotten) to -1000 (everything is, at once)."""
    for length in (9, 257):
        inputs = scan_inputs(2, length, 5, 4)
        inputs["delta"] = (torch.rand(2, length, 5, generator=torch.Generator().manual_seed(2)) * size).requires_grad_()
        inputs["A"] = (-torch.ones(5, 4)).requires_grad_()
        inputs.pop("delta_bias")
        check_scan(inputs, method, softplus=False)


@pytest.mark.parametrize("method", ["sequential", "chunked", "compiled"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_scan_16_bit_inputs(method, dtype, tolerance):
    """float32 inside: the only error is the rounding of what comes out. The state stays float32."""
    inputs = scan_inputs(3, 257, 5, 16)
    exact = ("A", "D", "delta_bias", "state")
    inputs = {k: v.detach().to(torch.float32 if k in exact else dtype).requires_grad_() for k, v in inputs.items()}
    check_scan(inputs, method, tolerance=tolerance)
    y, last = run_scan(method, **inputs)
    assert y.dtype == dtype and last.dtype == torch.float32


@pytest.mark.parametrize("method", ["sequential", "chunked", "compiled"])
def test_scan_under_autocast(method):
    inputs = scan_inputs(2, 65, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        check_scan(inputs, method)


@pytest.mark.parametrize("method", ["sequential", "chunked", "compiled", "auto"])
def test_scan_of_any_split(method):
    """Outputs, last state and gradients of a sequence do not depend on how it is cut, with the state carried over."""
    rng = random.Random(0)
    inputs = scan_inputs(2, 130, 5, 4)
    settings = {"delta_softplus": True, "method": method}
    whole = run_scan(**inputs, **settings)
    expected = gradients(*whole, inputs)
    for cuts in [(1,), (129,), (64, 65)] + [sorted(rng.sample(range(1, 130), 3)) for _ in range(4)]:
        ys, state = [], inputs["state"]
        for start, end in zip((0, *cuts), (*cuts, 130)):
            part = {k: v[:, start:end] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
            y, state = run_scan(**{**part, "state": state}, **settings)
            ys.append(y)
        y = torch.cat(ys, 1)
        assert relative(y, whole[0]) < 1e-6 and relative(state, whole[1]) < 1e-6
        got = gradients(y, state, inputs)
        for name in inputs:
            assert relative(got[name], expected[name]) < 1e-5, (cuts, name)


@pytest.mark.parametrize("method", ["chunked", "compiled"])
def test_scan_of_views(method):
    """Inputs that are not contiguous, as chunk(), split() and expand() give them."""
    wide = {k: v.detach() for k, v in scan_inputs(3, 33, 10, 8).items()}
    inputs = scan_inputs(3, 33, 5, 4)
    views = {**inputs, "u": wide["u"].chunk(2, -1)[1], "z": wide["z"].chunk(2, -1)[0], "B": wide["B"].split(4, -1)[1],
             "C": wide["C"][:, :, ::2], "delta": wide["delta"][:, :, :1].expand(3, 33, 5), "A": wide["A"].t()[:5, :4]}
    check_scan({k: v.detach().requires_grad_() for k, v in views.items()}, method)


WITHOUT_COMPILER = pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
                                      reason="no C++ compiler")


@WITHOUT_COMPILER
def test_scan_by_the_compiler(monkeypatch):
    """selective_scan in what is compiled: two stretches and a rest, B and C of one tensor; all options, and none."""
    monkeypatch.setattr(mamba, "_compiled", COMPILED)
    torch.compiler.reset()
    compiled, calls = torch.compile(selective_scan), []
    apply = mamba.CompiledScan.apply
    monkeypatch.setattr(mamba.CompiledScan, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    for options, shape in ((OPTIONS, (2, 150, 20, 16)), ((), (1, 64, 70, 8))):
        inputs = scan_inputs(*shape, options)
        both = torch.cat([inputs["B"], inputs["C"]], -1).detach().requires_grad_()
        inputs["B"], inputs["C"] = both.chunk(2, -1)
        y, last = compiled(**inputs, delta_softplus=True, return_last_state=True)
        expected, expected_last = loop64(**inputs, delta_softplus=True)
        leaves = {**{k: v for k, v in inputs.items() if v.is_leaf}, "both": both}
        got, reference = gradients(y, last, leaves), gradients(expected, expected_last, leaves)
        assert relative(y, expected) < 1e-6 and relative(last, expected_last) < 1e-6
        assert all(relative(got[name], reference[name]) < 1e-5 for name in leaves)
    assert len(calls) == 2


def test_scan_refuses_what_does_not_fit():
    inputs = {k: v.detach() for k, v in scan_inputs(2, 8, 5, 4).items()}
    for name, value, words in [("B", torch.zeros(2, 8, 3), "B must be"), ("u", torch.zeros(2, 8), "u must be"),
                               ("z", torch.zeros(2, 7, 5), "z must be"), ("state", torch.zeros(2, 4, 5), "state must be"),
                               ("D", torch.zeros(4), "D must be"), ("method", "triton2", "method must be")]:
        with pytest.raises(ValueError, match=words):
            selective_scan(**{**inputs, name: value})
    with pytest.raises(ValueError, match="empty"):
        selective_scan(torch.zeros(1, 0, 5), torch.zeros(1, 0, 5), inputs["A"], torch.zeros(1, 0, 4), torch.zeros(1, 0, 4))


PEAK = '''
import resource, sys, torch
sys.path.insert(0, {root!r})
from mamba import selective_scan
def reset():    # the high-water mark of this process alone: a child's ru_maxrss would start at its parent's
    if sys.platform == "linux": open("/proc/self/clear_refs", "w").write("5")
def peak():
    if sys.platform == "linux":
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
def run(B, L, D, N, backward):
    u, delta, z = (torch.randn(B, L, D).requires_grad_(backward) for _ in range(3))
    A, Bs, Cs = -torch.rand(D, N) - 0.1, torch.randn(B, L, N), torch.randn(B, L, N)
    bias, Dw = torch.randn(D), torch.randn(D)
    extra = [t.requires_grad_(backward) for t in (A, Bs, Cs, bias, Dw)]
    gy = torch.randn(B, L, D) if backward else None
    reset(); before = peak()
    with torch.set_grad_enabled(backward):
        y = selective_scan(u, delta, A, Bs, Cs, Dw, z, bias, True, method="chunked")
    if backward: y.backward(gy)
    results = [y] + [t.grad for t in (u, delta, z, *extra) if t.grad is not None]
    extra = peak() - before - sum(t.numel() * 4 for t in results) / 1e6
    assert all(bool(torch.isfinite(t).all()) for t in results)
    return extra
run(1, 64, 8, 16, backward={backward})
print(*[run(*shape, backward={backward}) for shape in {shapes}])
'''


def scan_memory(backward, *shapes):
    """Megabytes that the scan takes beyond its inputs, outputs and gradients, for each (B, L, D, N)."""
    if sys.platform == "win32":
        pytest.skip("no way to read the peak memory")
    code = PEAK.format(root=str(ROOT), backward=backward, shapes=shapes)
    return [float(v) for v in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            .stdout.split()]


def test_scan_memory_of_training():
    extra, = scan_memory(True, (4, 4096, 512, 16))
    assert extra < 200, extra


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_long_text(tmp_path):
    """It grows neither with the length of the prompt nor with that of the answer."""
    code = PEAK.split("def run")[0].format(root=str(ROOT)) + """
from mamba import Mamba, MambaConfig
model = Mamba(MambaConfig(65, 64, 2)).eval()
for prompt, new in ((6000, 20), (6000, 20), (48000, 20), (6000, 2000)):
    prompts = torch.randint(65, (1, prompt))
    reset(); before = peak()
    for token in model.stream(prompts, new): pass
    print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    _, short, *longer = map(float, result.stdout.split())
    assert max(longer) < short + 4, (short, longer)


def test_scan_memory_of_a_million_steps():
    """Extra memory does not grow with L: 16 times the steps, and within 20 MB of the same."""
    short, long = scan_memory(False, (1, 62_500, 8, 16), (1, 1_000_000, 8, 16))
    assert long < short + 20, (short, long)


# ---------------------------------------------------------------------------------------------------------------------
# The block and the model


def small(**changes):
    torch.manual_seed(0)
    return Mamba(MambaConfig(**{"vocab_size": 70, "d_model": 32, "n_layer": 3, **changes}))


def tokens(*shape, vocab=70, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, {"d_state": 5, "expand": 3, "d_conv": 3}, {"bias": True, "conv_bias": False}])
def test_model_equals_transformers(changes):
    transformers = pytest.importorskip("transformers")
    model = small(vocab_size=72, **changes)
    c = model.config
    peer = transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, state_size=c.d_state, num_hidden_layers=c.n_layer, expand=c.expand,
        conv_kernel=c.d_conv, use_bias=c.bias, use_conv_bias=c.conv_bias, time_step_rank=c.dt_rank,
        layer_norm_epsilon=c.norm_eps, use_cache=False))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else torch.nn.init.uniform_(p, -2, 0.5)
    theirs = lambda name: name.replace("embedding.", "embeddings.")
    result = peer.load_state_dict({theirs(name): p for name, p in model.state_dict().items()}, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    idx = tokens(3, 37)
    logits, expected = model(idx)[0], peer(idx).logits
    assert relative(logits, expected) < 1e-4 and (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    model(idx, idx.roll(-1, 1))[1].backward()
    F.cross_entropy(expected.flatten(0, 1), idx.roll(-1, 1).flatten()).backward()
    grads = {name: p.grad for name, p in peer.named_parameters()}
    for name, p in model.named_parameters():
        assert relative(p.grad, grads[theirs(name)]) < 1e-4, name


def test_block_equals_mambapy():
    peer_module = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(d_model=24))
    peer = peer_module.MambaBlock(peer_module.MambaConfig(d_model=24, n_layers=1))
    peer.load_state_dict(block.state_dict())
    x = torch.randn(2, 50, 24, requires_grad=True)
    y, expected = block(x), peer(x)
    assert relative(y, expected) < 1e-5
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])
    reference = torch.autograd.grad((expected * weights).sum(), [x, *(dict(peer.named_parameters())[n] for n, _ in
                                                                      block.named_parameters())])
    for a, b in zip(got, reference):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"d_intermediate": 48}, {"d_conv": 1}, {"scan": "sequential"},
                                     {"tie_embeddings": False, "d_conv": 2}])
def test_any_split_gives_the_same_logits(changes):
    model = small(**changes)
    idx = tokens(2, 40)
    with torch.no_grad():
        full, _ = model(idx)
        assert full.shape == (2, 40, 70)
        for sizes in ([40], [1] * 40, [3, 37], [1, 2, 1, 36], [17, 1, 22]):
            state = model.init_state(2)
            logits = torch.cat([model(part, state=state)[0] for part in idx.split(sizes, dim=1)], 1)
            assert relative(logits, full) < 1e-5, sizes
        assert relative(model(idx, num_last_tokens=3)[0], full[:, -3:]) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_in_proj_by_halves(bias):
    """In training it is two products, which a hook sees; what is put in its place is called like any module."""
    block, x, seen = mamba.MambaBlock(MambaConfig(d_model=16, bias=bias)).eval(), torch.randn(2, 9, 16), []
    if bias:
        torch.nn.init.normal_(block.in_proj.bias)
    expected = block(x)
    block.in_proj.register_forward_hook(lambda module, inputs, y: seen.append(type(y)))
    torch.testing.assert_close(block.train()(x), expected)
    block.in_proj = torch.nn.Sequential(block.in_proj)
    torch.testing.assert_close(block(x), expected)
    assert seen == [list, torch.Tensor]


def test_block_with_state():
    torch.manual_seed(0)
    block, x = MambaBlock(MambaConfig(d_model=16)), torch.randn(2, 9, 16)
    state = block.init_state(2)
    parts = torch.cat([block(x[:, :4], state), block(x[:, 4:], state)], 1)
    assert relative(parts, block(x)) < 1e-5
    parts.sum().backward()      # a state that is updated in place does not break the gradients of the calls before
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


def test_loss():
    model, idx = small(), tokens(2, 20)
    targets = tokens(2, 20, seed=1)
    targets[0, :7] = -1
    logits, none = model(idx)
    assert none is None
    nothing, loss = model(idx, targets)
    assert nothing is None
    expected = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets >= 0].mean()
    assert abs(loss.item() - expected.item()) < 1e-5


def test_generate_greedy_is_argmax_of_the_full_forward():
    model, idx = small(), tokens(2, 11)
    out = model.generate(idx, 20, temperature=0)
    assert out.shape == (2, 31) and torch.equal(out[:, :11], idx)
    for t in range(11, 31):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1)), t


def test_generate_prompts_of_different_lengths(monkeypatch):
    model = small().eval()
    prompts = [tokens(n, seed=n) for n in (5, 1, 12, 5, 3)]
    alone = [model.generate(p[None], 15, temperature=0)[0] for p in prompts]
    for together in (model.generate(prompts, 15, temperature=0), model.generate([p.tolist() for p in prompts], 15, temperature=0)):
        assert all(torch.equal(a, b) for a, b in zip(alone, together))
    monkeypatch.setattr(mamba, "PREFILL", 4)    # a long prompt is read in parts
    assert all(torch.equal(a, b) for a, b in zip(alone, model.generate(prompts, 15, temperature=0)))


def test_generate_settings():
    model, idx = small().train(), tokens(4, 6)
    again = [model.generate(idx, 30, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again) and model.training
    assert not torch.equal(again[0], model.generate(idx, 30, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(model.generate(idx, 30, top_k=1), model.generate(idx, 30, temperature=0))
    assert torch.equal(model.generate(idx, 30, top_p=1e-6), model.generate(idx, 30, temperature=0))
    assert torch.equal(model.generate(idx, 0), idx) and model.generate([[1, 2]], 0)[0].tolist() == [1, 2]
    for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="temperature"):
            model.generate(idx, 1, **bad)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[]], 1)


def test_sampling_follows_the_probabilities():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    g = torch.Generator().manual_seed(0)

    def frequencies(**settings):
        draws = mamba.sample(probs.log().repeat(40_000, 1), generator=g, **settings)
        return torch.bincount(draws, minlength=4) / 40_000
    for settings, expected in [({}, probs), ({"top_k": 2}, torch.tensor([2 / 3, 1 / 3, 0, 0])),
                               ({"top_p": 0.75}, torch.tensor([2 / 3, 1 / 3, 0, 0])),
                               ({"top_p": 0.76}, torch.tensor([0.5, 0.25, 0.15, 0]) / 0.9),
                               ({"temperature": 0.5}, probs ** 2 / (probs ** 2).sum()),
                               ({"temperature": 0}, torch.tensor([1.0, 0, 0, 0]))]:
        got = frequencies(**settings)
        assert (got - expected).abs().max() < 0.015, settings
        assert torch.equal(got > 0, expected > 0), settings


def test_padding_of_the_vocabulary_is_never_seen():
    model = small(vocab_size=65)
    assert model.lm_head.weight.shape[0] == 72 and model(tokens(1, 4, vocab=65))[0].shape[-1] == 65


def test_initialisation():
    """The official one, and nothing that comes later wipes it."""
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=512, d_model=256, n_layer=8, dt_min=0.002, dt_max=0.05))
    assert abs(model.backbone["embedding"].weight.std().item() - 0.02) < 1e-3
    for layer in model.backbone["layers"]:
        mixer = layer.mixer
        dt = F.softplus(mixer.dt_proj.bias)
        assert 0.002 * 0.999 <= dt.min() and dt.max() <= 0.05 * 1.001
        quartiles = torch.log(dt).quantile(torch.tensor([0.25, 0.5, 0.75]))     # log-uniform
        low, high = math.log(0.002), math.log(0.05)
        assert (quartiles - torch.tensor([0.75 * low + 0.25 * high, (low + high) / 2, 0.25 * low + 0.75 * high])).abs().max() < 0.3
        assert torch.allclose(mixer.A_log, torch.log(torch.arange(1.0, 17)).expand(512, 16))
        assert torch.equal(mixer.D, torch.ones(512)) and torch.equal(layer.norm.weight, torch.ones(256))
        bound = 16 ** -0.5
        assert 0.95 * bound < mixer.dt_proj.weight.abs().max() <= bound
        bound = 512 ** -0.5 / 8 ** 0.5      # of nn.Linear, divided by the square root of the number of layers
        assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound * 1.001


def test_weight_decay_is_on_projections_only():
    model = small(d_intermediate=16, bias=True, tie_embeddings=False)
    decayed, rest = model.configure_optimizers(1e-3, weight_decay=0.3).param_groups
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".", 3)[-1] for p in decayed["params"]} == {
        f"{part}.weight" for part in ("mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj", "mlp.fc1", "mlp.fc2")}
    both = [names[id(p)] for p in decayed["params"] + rest["params"]]
    assert sorted(both) == sorted(names.values()) and len(set(both)) == len(both)


def test_what_stays_float32():
    """A_log, D, the bias of delta and the state, in a 16-bit model and under autocast; float64 is left alone."""
    model, idx = small(), tokens(2, 30)
    expected = model(idx)[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.bfloat16()
    for name, p in model.named_parameters():
        exact = name.endswith(("A_log", ".D", "dt_proj.bias"))
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert not exact or torch.equal(p, before[name])
    state = model.init_state(2)
    assert all(h.dtype == torch.float32 for _, h in state)
    logits = model(idx, state=state)[0]
    assert logits.dtype == torch.bfloat16 and relative(logits, expected) < 0.03
    assert model.double().backbone["layers"][0].mixer.A_log.dtype == torch.float64
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)[1]
        loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_dropout():
    model, idx = small(dropout=0.5), tokens(2, 30)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("bad", [{"d_model": 0}, {"n_layer": -1}, {"d_state": 1.5}, {"vocab_size": "many"}, {"dropout": 1.0},
                                 {"dt_min": 0.2}, {"scan": "fast"}, {"dt_rank": "big"}, {"norm_eps": 0.0},
                                 {"d_intermediate": -1}, {"d_conv": 0}, {"dt_init_floor": 0.0}])
def test_bad_config(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MambaConfig(**bad)


def test_num_params():
    model = small()
    assert model.num_params() == sum(p.numel() for p in model.parameters())
    assert model.num_params(embedding=False) == model.num_params() - 72 * 32
    with torch.device("meta"):      # the released 130M: 129,135,360 parameters
        assert Mamba(MambaConfig()).num_params() == 129_135_360


def test_mamba_works_as_the_only_file_copied(tmp_path):
    (tmp_path / "mamba.py").write_bytes((ROOT / "mamba.py").read_bytes())
    code = "import mamba, torch; print(mamba.MambaBlock(mamba.MambaConfig(d_model=16))(torch.zeros(1, 3, 16)).shape)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "[1, 3, 16]" in result.stdout
    imports = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / "mamba.py").read_text(), re.MULTILINE))
    assert imports - set(sys.stdlib_module_names) == {"torch"}


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling, as real processes


def script(name, *flags, cwd, **more):
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", **more.pop("env", {})}
    return subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=cwd, capture_output=True, text=True, check=False,
                          env=env, **more)


@pytest.fixture
def call(monkeypatch, capsys):
    """script() without the seconds that a new process takes to import torch."""
    def call(name, *flags, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(ROOT / name), *flags])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        module = {"prepare_data.py": prepare_data, "train.py": train, "sample.py": sample}[name]
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            prepare_data.run(module.main, module.Config)
        return subprocess.CompletedProcess(["python", name], end.value.code, *capsys.readouterr())
    return call


def succeeded(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def one_line_error(result, *words):
    """Exit status 2 and one line on stderr: no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"{Path(result.args[1]).name}: "), result.stderr
    for word in words:
        assert word in result.stderr
    return result.stderr


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


TINY = ("--device=cpu", "--d_model=16", "--n_layer=2", "--batch_size=4", "--block_size=64", "--dropout=0.1",
        "--max_iters=150", "--eval_interval=40", "--eval_iters=3", "--log_interval=1", "--warmup_iters=5",
        "--learning_rate=3e-3", "--sample_tokens=5", "--dataset=words.txt", "--out_dir=run")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with words.txt in it, and in finished/ the same with a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(30)]
    (folder / "words.txt").write_text("".join(rng.choice(words) + rng.choice("  \n") for _ in range(6000)))
    (folder / "finished").mkdir()
    shutil.copy(folder / "words.txt", folder / "finished")
    succeeded(script("train.py", *TINY, cwd=folder / "finished"))
    return folder


@pytest.fixture
def work(corpus, tmp_path):
    """A folder of its own with words.txt in it."""
    shutil.copy(corpus / "words.txt", tmp_path)
    return tmp_path


@pytest.fixture
def finished(corpus, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(corpus / "finished", tmp_path / "copy")


def losses(folder, run="run"):
    """The rows of log.csv without the speed."""
    with open(folder / run / "log.csv") as file:
        return [row[:-1] for row in csv.reader(file)]


def steps_done(folder):
    rows = losses(folder) if (folder / "run" / "log.csv").exists() else []
    return int(rows[-1][0]) if len(rows) > 1 else 0


def wait_for_step(folder, step):
    until(lambda: steps_done(folder) >= step)


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_run(folder, expected):
    assert losses(folder) == losses(expected)
    for name in ("ckpt.pt", "best.pt"):
        a, b = load(folder / "run" / name), load(expected / "run" / name)
        assert a["step"] == b["step"] and a["best_loss"] == b["best_loss"]
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        if name == "ckpt.pt":
            states = [c["optimizer"]["state"] for c in (a, b)]
            assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


def test_training_learns(corpus):
    rows = losses(corpus / "finished")
    assert rows[0] == ["step", "tokens", "train_loss", "val_loss", "learning_rate"]
    assert [int(r[0]) for r in rows[1:] if not r[3]] == list(range(1, 151))
    evaluations = [(int(r[0]), float(r[3])) for r in rows[1:] if r[3]]
    assert [step for step, _ in evaluations] == [0, 40, 80, 120, 150]
    assert abs(evaluations[0][1] - math.log(10)) < 0.2 and evaluations[-1][1] < 2.1
    assert int(rows[-1][1]) == 150 * 4 * 64
    best = load(corpus / "finished" / "run" / "best.pt")
    assert best["best_loss"] == min(loss for _, loss in evaluations)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send these signals to another process")
def test_an_interrupted_run_equals_one_that_was_not(work, corpus):
    rng = random.Random()
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, 130)):
        before = steps_done(work)
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY], cwd=work, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        wait_for_step(work, before + rng.randint(1, 25))
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == status, output
        if number != signal.SIGKILL:
            assert "the same command goes on from there" in output
            assert load(work / "run" / "ckpt.pt")["step"] == steps_done(work)
        assert not list((work / "run").glob("*.tmp")) or number == signal.SIGKILL
    result = succeeded(script("train.py", *TINY, cwd=work))
    assert "going on from step" in result.stdout and "->" not in result.stdout
    assert_same_run(work, corpus / "finished")


@WITHOUT_COMPILER
def test_training_compiled(work):
    """The same run but for rounding; and where it was stopped and went on, the same bits, dropout included."""
    def train_it(*more):
        result = succeeded(script("train.py", *TINY, "--lr_decay_iters=150", *more, cwd=work))
        assert (", compiled; " in result.stdout) == ("--compile" in more)
        assert "does not work here" not in result.stdout + result.stderr
    train_it("--max_iters=12", "--dropout=0", "--out_dir=plain")
    train_it("--max_iters=12", "--dropout=0", "--out_dir=compiled", "--compile")
    plain, compiled = ([float(row[2]) for row in losses(work, name)[1:] if row[2]] for name in ("plain", "compiled"))
    assert len(plain) >= 12 and max(abs(a - b) for a, b in zip(plain, compiled)) < 1e-3, (plain, compiled)
    for steps in (7, 12):
        train_it(f"--max_iters={steps}", "--out_dir=parts", "--compile")
    train_it("--max_iters=12", "--compile")
    parts, whole = (load(work / name / "ckpt.pt")["model"] for name in ("parts", "run"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("changes, compiled", [
    ({"max_iters": 999}, False), ({"max_iters": 1000}, True), ({"max_iters": 1000, "d_state": 12}, False), ({}, True),
    ({"scan": "sequential"}, False), ({"eval_only": True, "init_from": str(ROOT)}, False), ({"compile": False}, False)])
def test_a_run_on_a_cpu_is_compiled_where_it_pays(tmp_path, monkeypatch, changes, compiled):
    monkeypatch.setattr(mamba, "SINCE_2_8", True)
    monkeypatch.setattr(train, "get_file", lambda *inputs: None)
    monkeypatch.setattr(train, "read_config", lambda path: None)
    cfg = train.Config(dataset="pydoc", out_dir=str(tmp_path / "run"), **changes)
    assert train.settle(cfg, {}, torch.device("cpu"), True)[2].compile == compiled


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send these signals to another process")
def test_a_second_ctrl_c_stops_at_once(work, corpus):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY], cwd=work, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    wait_for_step(work, 45)
    process.send_signal(signal.SIGINT)
    until(lambda: "stopping" in process.stdout.readline())
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in output, output    # -SIGINT: just at its end
    succeeded(script("train.py", *TINY, cwd=work))
    assert_same_run(work, corpus / "finished")


def test_a_finished_run_says_so(finished):
    before = tree(finished)
    result = succeeded(script("train.py", *TINY, cwd=finished))
    assert "finished" in result.stdout and "--max_iters=300" in result.stdout and "--init_from=scratch" in result.stdout
    assert tree(finished) == before
    result = succeeded(script("train.py", *TINY, "--eval_only", cwd=finished))
    assert f"val loss {load(finished / 'run' / 'ckpt.pt')['best_loss']:.4f}" in result.stdout and tree(finished) == before


def test_going_on_with_other_flags(finished):
    """Flags not given come from the checkpoint; those that changed are named; scratch starts over."""
    result = succeeded(script("train.py", "--out_dir=run", "--device=cpu", "--max_iters=153", "--weight_decay=0.2",
                              "--learning_rate=1e-3", cwd=finished))
    for line in ("max_iters: 150 -> 153", "weight_decay: 0.1 -> 0.2", "learning_rate: 0.003 -> 0.001", "step 150 of 153"):
        assert line in result.stdout
    saved = load(finished / "run" / "ckpt.pt")
    assert saved["step"] == 153 and saved["config"]["block_size"] == 64
    assert [g["weight_decay"] for g in saved["optimizer"]["param_groups"]] == [0.2, 0.0]
    succeeded(script("train.py", *TINY, "--init_from=scratch", "--max_iters=3", "--d_model=8", cwd=finished))
    saved = load(finished / "run" / "ckpt.pt")
    assert saved["step"] == 3 and saved["model_config"]["d_model"] == 8 and steps_done(finished) == 3


@pytest.mark.parametrize("damage", ["cut off", "garbled", "gone", "empty"])
def test_the_previous_checkpoint_is_used_if_the_newest_is_damaged(finished, corpus, damage):
    path = finished / "run" / "ckpt.pt"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut off": data[:len(data) // 2], "garbled": os.urandom(len(data)), "empty": b""}[damage])
    result = succeeded(script("train.py", *TINY, cwd=finished))
    assert "going on from step 120" in result.stdout
    assert ("ckpt.pt is damaged" in result.stderr) == (damage != "gone")
    assert_same_run(finished, corpus / "finished")


def test_flipped_bytes_are_noticed(finished, corpus):
    path = finished / "run" / "ckpt.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) // 2 + 64] = b"A" * 64
    path.write_bytes(data)
    whole = (finished / "run" / "ckpt.prev.pt").read_bytes()
    assert "damaged" in succeeded(script("train.py", *TINY, "--eval_only", cwd=finished)).stderr
    result = succeeded(script("train.py", *TINY, "--max_iters=121", "--eval_interval=1000", cwd=finished))
    assert "going on from step 120" in result.stdout
    assert (finished / "run" / "ckpt.prev.pt").read_bytes() == whole    # the damaged one did not take its place


def test_a_changed_text_is_prepared_again(work):
    train_it = functools.partial(script, "train.py", *TINY, "--max_iters=1", "--init_from=scratch", cwd=work)
    assert "wrote" in succeeded(train_it()).stdout
    assert "wrote" not in succeeded(train_it()).stdout
    (work / "words.txt").write_text("other words\n" * 500)
    os.utime(work / "words.txt", (0, 0))
    assert "replaced" in succeeded(train_it()).stdout


def test_going_on_in_another_dtype(finished):
    for steps, dtype in ((151, "bfloat16"), (152, "float16"), (153, "float32"), (154, "float16")):
        succeeded(script("train.py", *TINY, f"--max_iters={steps}", f"--dtype={dtype}", cwd=finished))
    assert steps_done(finished) == 154


def test_accumulated_gradients_are_those_of_the_large_batch():
    torch.manual_seed(0)
    model, idx = small(), tokens(8, 20)
    def grads(parts):
        model.zero_grad()
        for part in idx.split(8 // parts):
            (model(part, part)[1] / parts).backward()
        return [p.grad.clone() for p in model.parameters()]
    assert all(relative(a, b) < 1e-5 for a, b in zip(grads(4), grads(1)))


def test_batches_are_a_function_of_seed_and_step():
    data, cfg = np.arange(1000, dtype=np.uint16), train.Config(batch_size=6, block_size=9)
    batch = lambda step, micro=0, rank=0, world=1: train.get_batch(data, cfg, step, micro, rank, world, torch.device("cpu"))
    x, y = batch(3)
    assert x.shape == y.shape == (6, 9) and torch.equal(y, x + 1) and torch.equal(batch(3)[0], x)
    assert not torch.equal(batch(4)[0], x) and not torch.equal(batch(3, 1)[0], x)
    shares = [batch(3, 0, rank, 3)[0] for rank in range(3)]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == sorted(x[:, 0].tolist())
    reached = {int(i) for step in range(3000) for i in (batch(step)[0][:, 0].min(), batch(step)[1][:, -1].max())}
    assert {0, 999} <= reached      # the first and the last window are drawn too


def test_learning_rate():
    cfg = train.Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(step, cfg) for step in range(120)]
    assert rates[:10] == [pytest.approx((i + 1) / 11) for i in range(10)] and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == rates[119] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_two_processes_train_as_one(work, corpus):
    """torchrun with gloo: the losses of one process with the same batch, and a resumed run goes on exactly."""
    flags = [flag for flag in TINY if not flag.startswith(("--dropout", "--max_iters"))]
    flags += ["--dropout=0", "--gradient_accumulation_steps=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={random.randint(20000, 40000)}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def two(*more):
        result = subprocess.run([*torchrun, str(ROOT / "train.py"), *flags, *more], cwd=work, env=env, capture_output=True,
                                text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    two("--max_iters=12", "--lr_decay_iters=24")
    two("--max_iters=24", "--lr_decay_iters=24")
    succeeded(script("train.py", *flags, "--max_iters=24", "--out_dir=one", cwd=work))
    got, expected = ({int(r[0]): float(r[2]) for r in losses(work, name)[1:] if not r[3]} for name in ("run", "one"))
    assert got.keys() == expected.keys() == set(range(1, 25))
    assert all(abs(got[step] - expected[step]) < 1e-4 for step in got)


def test_divergence_keeps_the_last_good_checkpoint(finished):
    before = (finished / "run" / "ckpt.pt").read_bytes()
    message = one_line_error(script("train.py", *TINY, "--max_iters=400", "--learning_rate=1e18", "--grad_clip=0",
                                    cwd=finished), "diverged", "checkpoint of step 150 is kept")
    assert "learning_rate" in message and (finished / "run" / "ckpt.pt").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_full_disk_while_saving(finished):
    """A limit on the size of a file stands for the disk: what was saved before stays, nothing half-written does."""
    import resource
    before = {k: v for k, v in tree(finished).items() if k.endswith(".pt")}
    size = (finished / "run" / "best.pt").stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    one_line_error(script("train.py", *TINY, "--max_iters=151", cwd=finished, preexec_fn=limit),
                   "could not write run/", "too large")
    assert {k: v for k, v in tree(finished).items() if "run/" in k and "log" not in k and k != "run/lock"} == before


BAD_TEXTS = {"empty.txt": b"", "binary.txt": bytes(range(256)) * 20, "latin.txt": "caf\xe9 ".encode("latin-1") * 400,
             "short.txt": b"only a few characters\n" * 5}


@pytest.mark.parametrize("flags, words", [
    (["--dataset=empty.txt"], ["empty.txt is empty"]),
    (["--dataset=binary.txt"], ["NUL byte at offset 0", "binary"]),
    (["--dataset=latin.txt"], ["not UTF-8", "0xe9 at offset 3", "iconv"]),
    (["--dataset=short.txt", "--block_size=64"], ["too few for --block_size=64", "longer text"]),
    (["--dataset=missing.txt"], ["no such file", "missing.txt"]),
    (["--dataset=shakespear"], ["unknown dataset", "did you mean shakespeare"]),
    (["--bach_size=3"], ["unknown flag --bach_size; did you mean --batch_size?"]),
    (["--batch_size=many"], ["--batch_size takes a whole number, not 'many'"]),
    (["--batch_size=0"], ["--batch_size must be at least 1"]),
    (["--learning_rate=nan"], ["--learning_rate takes a number, not 'nan'"]),
    (["--learning_rate=-1"], ["--learning_rate must not be negative"]),
    (["--beta2=1"], ["--beta2 must be"]),
    (["--dropout=1.5"], ["dropout must be"]),
    (["--d_model=0"], ["d_model must be"]),
    (["--device=cuda"], ["--device=cuda", "--device=cpu"]),
    (["--device=gpu"], ["--device=gpu is not a device"]),
    (["--device=meta"], ["--device=meta is not supported"]),
    (["--dtype=float8"], ["--dtype takes float32, bfloat16"]),
    (["--scan=fast"], ["scan must be one of"]),
    (["--init_from=nothing"], ["--init_from takes"]),
    (["--init_from=/no/such/folder"], ["--init_from takes"]),
    (["train"], ["unexpected argument 'train'"]),
])
def test_bad_input_to_train(tmp_path, call, flags, words):
    for name, data in BAD_TEXTS.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("some words to learn from\n" * 400)
    one_line_error(call("train.py", *([] if "--dataset" in flags[0] else ["--dataset=good.txt"]), *flags, cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()
    if "--dataset" in flags[0]:
        assert tree(tmp_path).keys() == {*BAD_TEXTS, "good.txt"}


def break_checkpoint(run, how):
    for path in run.glob("*.pt"):
        data = path.read_bytes()
        if how == "truncated":
            path.write_bytes(data[:1000])
        elif how == "text":
            path.write_text("this is not a checkpoint")
        elif how == "other tensors":
            torch.save({"weights": torch.zeros(3)}, path)
        elif how == "other shape":
            checkpoint = load(path)
            torch.save({**checkpoint, "model_config": {**checkpoint["model_config"], "d_model": 32}}, path)
        elif how == "other config":
            checkpoint = load(path)
            torch.save({**checkpoint, "model_config": {**checkpoint["model_config"], "d_modal": 32}}, path)


@pytest.mark.parametrize("how, words", [("truncated", ["damaged or not a checkpoint"]), ("text", ["damaged or not a checkpoint"]),
                                        ("other tensors", ["damaged or not a checkpoint"]), ("other shape", ["not of the shape"]),
                                        ("other config", ["does not describe a model"])])
@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_bad_checkpoints(finished, call, name, how, words):
    break_checkpoint(finished / "run", how)
    before = tree(finished)
    one_line_error(call(name, *(TINY if name == "train.py" else ["--out_dir=run"]), cwd=finished), *words)
    assert tree(finished) == before


def test_a_checkpoint_that_does_not_fit(finished):
    """Of another shape, of other data, of another vocabulary: an error that names what differs, and nothing is lost."""
    (finished / "other.txt").write_text("some words to learn from\n" * 400)
    before = tree(finished)
    rest = [flag for flag in TINY if "d_model" not in flag]
    one_line_error(script("train.py", *rest, "--d_model=32", "--n_layer=3", "--max_iters=200", cwd=finished),
                   "n_layer 2", "d_model 16", "not 3, 32", "--init_from=scratch")
    one_line_error(script("train.py", *TINY, "--dataset=other.txt", "--max_iters=200", cwd=finished),
                   "trained on words.txt, not other.txt")
    assert tree(finished) == before
    (finished / "words.txt").write_text("zyx\n" * 1000)
    one_line_error(script("train.py", *TINY, "--max_iters=200", cwd=finished), "another vocabulary")
    assert {k: v for k, v in tree(finished).items() if k.startswith("run")} == {
        k: v for k, v in before.items() if k.startswith("run")}


def test_sample(finished):
    """It needs the checkpoint alone: the data folder is gone. The newest run is found; a seed gives the same text."""
    (finished / "out").mkdir()
    shutil.move(finished / "run", finished / "out" / "run")
    shutil.rmtree(finished / "data")
    (finished / "prompt.txt").write_text("abc ")
    flags = ["--max_new_tokens=40", "--device=cpu", "--seed=7"]
    results = [succeeded(script("sample.py", *flags, f"--start={start}", cwd=finished))
               for start in ("abc ", "FILE:prompt.txt", "abc ")]
    assert len({r.stdout for r in results}) == 1 and results[0].stdout.startswith("abc ")
    assert len(results[0].stdout) == len("abc ") + 40 + 1
    assert "40 tokens in" in results[0].stderr and "tokens/s" in results[0].stderr
    best = load(finished / "out" / "run" / "best.pt")
    tokenizer, model = prepare_data.load_tokenizer(best["meta"]["tokenizer"]), train.load_model(best)
    result = succeeded(script("sample.py", *flags, "--start=abc ", "--temperature=0", cwd=finished))
    expected = model.generate([tokenizer.encode("abc ")], 40, temperature=0)[0].tolist()
    assert result.stdout == tokenizer.decode(expected) + "\n"
    result = succeeded(script("sample.py", "--num_samples=2", "--max_new_tokens=10", "--top_k=3", "--top_p=0.9", cwd=finished))
    assert result.stdout.count("---------------") == 2
    os.unlink(finished / "out" / "run" / "best.pt")
    assert "step 150" in succeeded(script("sample.py", *flags, cwd=finished)).stderr


@pytest.mark.parametrize("flags, words", [
    (["--start=abcZ"], ["character 'Z' is not in this model's vocabulary (10 characters)"]),
    (["--start=FILE:missing"], ["missing"]),
    (["--start=FILE:latin.txt"], ["not UTF-8"]),
    (["--out_dir=nowhere"], ["no checkpoint at nowhere", "train.py"]),
    ([], ["there is no model under out/"]),
    (["--temperature=-1"], ["temperature"]),
    (["--top_k=0"], ["top_k"]),
    (["--num_samples=0"], ["--num_samples"]),
    (["--device=cuda"], ["--device=cpu"]),
    (["--stat=x"], ["did you mean --start?"]),
])
def test_bad_input_to_sample(finished, call, flags, words):
    (finished / "latin.txt").write_bytes(BAD_TEXTS["latin.txt"])
    before = tree(finished)
    where = [] if not flags or "--out_dir" in flags[0] else ["--out_dir=run"]
    one_line_error(call("sample.py", *where, *flags, cwd=finished), *words)
    assert tree(finished) == before


def test_chat(finished):
    """The state goes on from turn to turn: greedy answers are those of the whole conversation read at once."""
    result = succeeded(script("sample.py", "--out_dir=run", "--interactive", "--temperature=0", "--max_new_tokens=12",
                              "--device=cpu", cwd=finished, input="abc\nZ\nb\udcff\ndef\n/quit\n", errors="surrogateescape"))
    assert "character 'Z'" in result.stderr and "character '\\udcff'" in result.stderr   # a byte that is not UTF-8
    best = load(finished / "run" / "best.pt")
    tokenizer, model = prepare_data.load_tokenizer(best["meta"]["tokenizer"]), train.load_model(best)
    history = [0]
    answers = []
    for line in ("abc\n", "def\n"):
        history = model.generate([history + tokenizer.encode(line)], 12, temperature=0)[0].tolist()
        answers.append(tokenizer.decode(history[-12:]))
    assert result.stdout == f"> {answers[0]}\n> > > {answers[1]}\n> "
    if os.name == "posix":
        command = [sys.executable, str(ROOT / "sample.py"), "--out_dir=run", "--interactive", "--device=cpu"]
        closed = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], cwd=finished, stdout=subprocess.PIPE, check=True)
        assert closed.stdout == b"> "


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_ctrl_c_in_a_chat(finished):
    chat = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), "--out_dir=run", "--interactive", "--device=cpu",
                             "--max_new_tokens=1000000"], cwd=finished, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)
    chat.stdin.write("abc\n")
    chat.stdin.flush()
    assert len(chat.stdout.read(50)) == 50      # in the middle of an answer
    chat.send_signal(signal.SIGINT)
    chat.stdin.write("/set max_new_tokens 7\ndef\n")
    chat.stdin.flush()
    while chat.stdout.read(1) != ">":           # it was stopped
        pass
    out, err = chat.communicate()
    assert chat.returncode == 0 and len(re.search("> (.{7})\n> $", out, re.DOTALL)[1]) == 7 and "Traceback" not in err


def test_text_is_never_shown_in_the_middle_of_a_character():
    pytest.importorskip("tokenizers")
    text = "añ日👩‍👩‍👧 e\u0301 x"
    tokenizer = prepare_data.BPETokenizer.train(["abc"], 257)     # one token a byte
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    pieces = list(sample.as_text(tokenizer, torch.tensor(ids)[:, None]))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and len(pieces) > len(text)
    cut = list(sample.as_text(tokenizer, torch.tensor(ids[:-5])[:, None]))
    assert "".join(cut) == tokenizer.decode(ids[:-5])
    for end in range(len(ids)):     # an answer ends where it is told to: half a character there is not shown
        shown = "".join(sample.as_text(tokenizer, ids[:end], cut_off=True))
        assert text.startswith(shown) and tokenizer.decode(ids[:end]).rstrip("\ufffd") == shown


# ---------------------------------------------------------------------------------------------------------------------
# Apple's GPU: no Mac is needed to see that every operation has a kernel there


def mps_operators():
    """Names of the aten operators that run on MPS, from the list that torch's own build is made of."""
    import torchgen
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = {entry.split("(", 1)[0].strip(): entry for entry in text.split("\n- func: ")[1:]}

    def runs(entry):
        delegate = re.search(r"structured_delegate: (\S+)", entry)
        if delegate:
            return runs(entries[delegate[1]])
        return "dispatch:" not in entry or re.search(r"\bMPS\b|CompositeExplicit|CompositeImplicit", entry)
    return {name for name, entry in entries.items() if runs(entry)}


class Recorder(TorchDispatchMode):
    """Every operator called, and the types of all its tensors."""

    def __init__(self):
        super().__init__()
        self.operators, self.dtypes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.operators.add(func.name().removeprefix("aten::"))
        self.dtypes |= {t.dtype for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        return result


@pytest.mark.parametrize("changes", [{}, {"d_intermediate": 16, "dropout": 0.1, "bias": True, "scan": "sequential"}])
def test_all_operators_have_an_mps_kernel(changes):
    available = mps_operators()
    assert len(available) > 1000 and "linalg_eig" not in available and "mm" in available
    model, idx = small(**changes), tokens(2, 70)
    optimizer = model.configure_optimizers(1e-3)
    with Recorder() as recorded:
        for _ in range(2):
            model(idx, idx)[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.generate([idx[0, :5], idx[1, :9]], 4, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(0))
    assert {"mm", "addcmul", "_fused_adamw_", "exponential_"} <= recorded.operators
    missing = recorded.operators - available
    assert not missing, missing
    assert not recorded.dtypes & {torch.float64, torch.complex64, torch.complex128}


def test_the_check_against_the_cpu_notices_a_wrong_device(monkeypatch):
    train.check_against_cpu(torch.device("cpu"))
    right = torch.Tensor.to

    def wrong(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        return result + 1 if args and args[0] == torch.device("cpu") and result.dtype == torch.long else result
    monkeypatch.setattr(torch.Tensor, "to", wrong)
    monkeypatch.setattr(torch, "randint", lambda n, shape, old=torch.randint: old(n - 1, shape))
    with pytest.raises(prepare_data.Problem, match="computes wrong"):
        train.check_against_cpu(torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# The data


prep = functools.partial(script, "prepare_data.py")
AWKWARD = ("Hello  world!\r\n\r\n  It's  the \t tab,\n\n\n\nthree   spaces   \n \n x\n日本語の文\nです。\n"
           "emoji 👩‍👩‍👧 🏳️‍🌈 e\u0301\u0323 \u0301 \u00a0\u2003wide\u3000x\n\u0301y 12 345's I'll\x1c don't...!\n?? a\nb")


def prepared(tmp_path, text, name="x", **flags):
    """prepare() on a text; returns (meta, train ids, val ids, tokenizer)."""
    (tmp_path / "x.txt").write_bytes(text.encode())
    folder = prepare_data.prepare(prepare_data.Config(**{"dataset": str(tmp_path / "x.txt"), "data_dir": str(tmp_path / "data"), "name": name,
                                   **flags}))
    return opened(folder)


def opened(folder):
    meta = prepare_data.load_meta(folder)
    train, val = (np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    return meta, train.tolist(), val.tolist(), prepare_data.load_tokenizer(meta["tokenizer"])


# tokenizers and the split

@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_round_trip(tmp_path, tokenizer):
    text = AWKWARD * 7
    meta, train, val, t = prepared(tmp_path, text, tokenizer=tokenizer, vocab_size=300)
    cut = int(len(text) * 0.9)
    assert t.decode(train) == text[:cut] and t.decode(val) == text[cut:]
    assert (meta["train_chars"], meta["val_chars"]) == (cut, len(text) - cut)
    assert meta["val_bytes"] == len(text[cut:].encode())
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert meta["vocab_size"] == t.vocab_size == (300 if tokenizer == "bpe" else len(set(text)))
    assert meta["dtype"] == "uint16" and meta["name"] == "x" and max(train + val) < t.vocab_size
    assert t.encode(text[:cut]) == train and prepare_data.load_tokenizer(t.to_dict()).encode("the") == t.encode("the")
    assert t.encode("") == [] and all(type(i) is int for i in t.encode("the"))


def test_char_outside_the_vocabulary():
    t = prepare_data.CharTokenizer("\nabc")
    assert t.encode("cab\n") == [3, 1, 2, 0]
    with pytest.raises(prepare_data.Problem, match="character 'é' is not in this model's vocabulary .4 characters"):
        t.encode("abcé!")
    with pytest.raises(prepare_data.Problem):
        t.encode("\udc80")  # what a terminal may pass on


def test_bpe_says_when_the_text_is_too_small(tmp_path, capsys):
    meta, *_ = prepared(tmp_path, "abc abc abc abc", tokenizer="bpe", vocab_size=1000)
    assert 257 <= meta["vocab_size"] < 300
    assert "too small for 1000 tokens" in capsys.readouterr().out


def gpt4_like():
    """The newer pattern, where punctuation takes the newline after it, and tokens for runs of spaces as in NeoX."""
    tokenizers = pytest.importorskip("tokenizers")
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        level(add_prefix_space=False, use_regex=False)])
    t.decoder = tokenizers.decoders.ByteLevel()
    t.normalizer = tokenizers.normalizers.NFC()
    t.train_from_iterator([AWKWARD * 50], tokenizers.trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=level.alphabet()))
    t.add_tokens([" " * k for k in range(2, 6)])
    t.enable_truncation(20)  # which prepare_data has to switch off
    return prepare_data.BPETokenizer(t.to_str())


@pytest.mark.parametrize("kind", ["gpt2", "gpt4"])
def test_streaming_gives_the_tokens_of_the_whole_text(tmp_path, monkeypatch, kind):
    rng = random.Random(0)
    bits = ["a", "word", " ", " ", "  ", "\n", "\n", "\r\n", "\t", ".", "!", "'s", "👍", "é", "e\u0301", "\u0301",
            "日本", "12", "\u00a0", "\u3000", "\x1c", "\x85", "<|endoftext|>"]
    text = AWKWARD + "".join(rng.choices(bits, k=6000))
    tokenizer = gpt4_like() if kind == "gpt4" else prepare_data.BPETokenizer.train([AWKWARD * 50], 400)
    (tmp_path / "t.json").write_text(tokenizer.to_dict()["json"], encoding="utf-8")
    monkeypatch.setattr(prepare_data, "BLOCK", 37)
    monkeypatch.setattr(prepare_data, "PIECE", 11)
    pieces = list(prepare_data.cut_between_words(prepare_data.read(text.encode())))
    assert "".join(pieces) == text and len(pieces) > 300
    _, train, val, _ = prepared(tmp_path, text, tokenizer=str(tmp_path / "t.json"))
    cut = int(len(text) * 0.9)
    assert train == tokenizer.encode(text[:cut]) and val == tokenizer.encode(text[cut:])


def test_no_place_to_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 100)
    monkeypatch.setattr(prepare_data, "PIECE", 20)
    monkeypatch.setattr(prepare_data, "LONGEST", 300)
    text = "日本" * 2000 + " " * 3000
    assert max(map(len, prepare_data.cut_between_words(prepare_data.read(text.encode())))) <= 300
    _, train, val, t = prepared(tmp_path, text, tokenizer="bpe", vocab_size=300)
    assert t.decode(train) + t.decode(val) == text


def test_a_large_vocabulary_is_uint32(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 65537)))
    meta, train, val, t = prepared(tmp_path, text)
    assert meta["dtype"] == "uint32" and train + val == list(range(65537)) and t.decode(val) == text[-len(val):]
    assert prepared(tmp_path, text[:65536])[0]["dtype"] == "uint16"


def test_a_folder(tmp_path):
    texts = {"a.txt": "first\r\n" * 10, "b.txt": "", "sub/c.txt": "second é\n" * 10, "sub/d.txt": "third\n" * 30}
    for name, text in texts.items():
        (tmp_path / "books.old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books.old" / name).write_bytes(text.encode())
    (tmp_path / "books.old" / "no.md").write_text("not this")
    everything = "".join(texts.values())
    flags = {"dataset": str(tmp_path / "books.old"), "data_dir": str(tmp_path)}  # prepared beside its own sources
    _, train, val, t = opened(prepare_data.prepare(prepare_data.Config(**flags)))
    assert t.decode(train + val) == everything and len(train) == int(len(everything) * 0.9)
    assert (tmp_path / "books.old" / "sub" / "c.txt").exists()
    meta, train, val, t = opened(prepare_data.prepare(prepare_data.Config(**flags, tokenizer="bpe", vocab_size=300)))
    assert meta["name"] == "books.old-bpe"
    joined = t.decode(train) + t.decode(val)
    assert joined.replace("<|endoftext|>", "") == everything and joined.count("<|endoftext|>") == 2
    assert train.count(t.end_of_text) == 2 and meta["val_bytes"] == len(t.decode(val).encode())


def test_pydoc(tmp_path):
    meta, train, val, t = opened(prepare_data.prepare(prepare_data.Config(data_dir=str(tmp_path))))
    from pydoc_data.topics import topics
    assert meta["name"] == "pydoc" and t.decode(train + val) == "\n\n".join(topics[k] for k in sorted(topics))


@pytest.mark.parametrize("args, name", [
    (("pydoc",), "pydoc"), (("shakespeare", "bpe"), "shakespeare-bpe"), (("pydoc", "gpt-neox"), "pydoc-gpt-neox"),
    (("some/book.txt", "my/own.json"), "book-own"), (("folder.d/",), "folder.d"), (("x", "bpe", "mine"), "mine"),
    (("https://a.org/b/text.txt?download=1",), "text"), (("http://a.org:80/",), "a.org-80"),
    (("shakespeare-bpe",), "shakespeare-bpe")])
def test_dataset_name(args, name):
    assert prepare_data.dataset_name(*args) == name


def test_load_meta(tmp_path):
    with pytest.raises(prepare_data.Problem, match="is missing; make it with: python prepare_data.py"):
        prepare_data.load_meta(tmp_path / "none")
    prepared(tmp_path, "0123456789" * 3)
    folder = tmp_path / "data" / "x"
    with open(folder / "val.bin", "ab") as f:
        f.write(b"xx")
    with pytest.raises(prepare_data.Problem, match="is damaged"):
        prepare_data.load_meta(folder)
    for damage in ("{", "[]", "{}"):
        (folder / "meta.json").write_text(damage)
        with pytest.raises(prepare_data.Problem, match="is damaged"):
            prepare_data.load_meta(folder)


# flags

@dataclass
class Flags:
    count: int = prepare_data.flag(3, "how many")
    rate: float = prepare_data.flag(0.5, "how fast")
    compile: bool = prepare_data.flag(True, "whether")
    title: str = prepare_data.flag("", "what")
    top_k: int | None = prepare_data.flag(None, "at most")


@pytest.mark.parametrize("argv, given", [
    ("", {}), ("--count=1_000", {"count": 1000}), ("--count -4", {"count": -4}), ("--rate=1e-3", {"rate": 1e-3}),
    ("--compile", {"compile": True}), ("--compile --count 2", {"compile": True, "count": 2}),
    ("--compile=False", {"compile": False}), ("--compile no", {"compile": False}), ("--compile=0", {"compile": False}),
    ("--top_k=5", {"top_k": 5}), ("--top_k None", {"top_k": None}), ("--title=a=b", {"title": "a=b"}),
    ("--title=", {"title": ""}), ("--count=1 --count=2", {"count": 2})])
def test_flags(argv, given):
    assert prepare_data.parse_flags(Flags, argv.split()) == (Flags(**given), given)


@pytest.mark.parametrize("argv, words", [
    ("--cuont=3", "unknown flag --cuont; did you mean --count?"), ("--coun=3", "unknown flag --coun"),
    ("--zzz", "unknown flag --zzz"), ("--count=abc", "--count takes a whole number, not 'abc'"),
    ("--count=1e4", "whole number"), ("--count", "--count needs a value"), ("--count --rate=1", "--count needs"),
    ("--rate=nan", "--rate takes a number"), ("--rate=-inf", "takes a number"), ("--compile=maybe", "True or False"),
    ("--top_k=x", "whole number"), ("book.txt", "unexpected argument 'book.txt'"), ("-count=3", "unexpected"),
    ("--count=none", "whole number")])
def test_bad_flags(argv, words):
    with pytest.raises(prepare_data.Problem) as problem:
        prepare_data.parse_flags(Flags, argv.split())
    assert words in str(problem.value)


def test_help(tmp_path):
    result = prep("--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("Turns text into tokens")
    for name in prepare_data.Config.__dataclass_fields__:
        assert f"--{name}=" in result.stdout


# problems: one line, status 2, nothing written

@pytest.mark.parametrize("flags, words", [
    (["--dataset=none.txt"], ["no such file or folder: none.txt"]),
    (["--dataset=empty.txt"], ["empty.txt is empty"]),
    (["--dataset=short.txt"], ["only 9 characters"]),
    (["--dataset=binary.txt"], ["binary.txt", "NUL byte at offset 4"]),
    (["--dataset=latin.txt"], ["latin.txt is not UTF-8", "0xe9 at offset 2000003", "iconv"]),
    (["--dataset=cut.txt"], ["cut.txt is not UTF-8", "0xe2 at offset 20"]),
    (["--dataset=folder"], ["folder is a folder without .txt files"]),
    (["--dataset=shakespear"], ["unknown dataset", "tinystories", "did you mean shakespeare?"]),
    (["--dataset="], ["unknown dataset ''"]),
    (["--tokenizer=bep"], ["unknown tokenizer 'bep'", "gpt-neox", "did you mean bpe?"]),
    (["--tokenizer=bad.json"], ["bad.json is not a tokenizer.json"]),
    (["--tokenizer=latin.txt"], ["latin.txt is not a tokenizer.json"]),
    (["--dataset=good.txt", "--tokenizer=none.json"], ["none.json is a tokenizer.json without tokens"]),
    (["--dataset=good.txt", "--tokenizer=words.json"], ["the tokenizer.json has no tokens for the text", "UNK"]),
    (["--dataset=good.txt", "--tokenizer=ab.json"], ["good.txt has only 0 tokens in its train part; give a longer text\n"]),
    (["--tokenizer=bpe", "--vocab_size=256"], ["--vocab_size=256 must be at least 257"]),
    (["--tokenizer=bpe", "--vocab_size=2000000000"], ["--vocab_size=2000000000 must be", "at most 16777216"]),
    (["--dataset=good.txt", "--name=../x"], ["--name takes the name of a folder"]),
    (["--dataset=good.txt", "--name=.."], ["--name"]),
    (["--dataset=http://127.0.0.1:9/a.txt"], ["cannot download", "python train.py", "without network"]),
    (["--datset=pydoc"], ["did you mean --dataset?"]),
])
def test_problems(tmp_path, flags, words):
    (tmp_path / "folder").mkdir()
    for name, data in {"empty.txt": b"", "short.txt": "ninechäré".encode(), "good.txt": b"good enough " * 9,
                       "binary.txt": b"text\0more text", "latin.txt": b"a" * 2000000 + b"caf\xe9 au lait",
                       "cut.txt": b"01234567890123456789\xe2\x82", "bad.json": b'{"version": "1.0"}'}.items():
        (tmp_path / name).write_bytes(data)
    models = pytest.importorskip("tokenizers").models
    for name, model in {"none": models.BPE(), "words": models.WordLevel({"a": 0}, "[UNK]"), "ab": models.BPE({"b": 0}, [])}.items():
        pytest.importorskip("tokenizers").Tokenizer(model).save(str(tmp_path / f"{name}.json"))
    before = tree(tmp_path)
    one_line_error(prep(*flags, cwd=tmp_path), *words)
    assert tree(tmp_path) == before and not list(tmp_path.glob("data/*/*"))


def test_a_python_without_pydoc_data_or_tokenizers(tmp_path):
    (tmp_path / "lib").mkdir()
    for module in ("pydoc_data", "tokenizers"):
        (tmp_path / "lib" / f"{module}.py").write_text("raise ImportError")
    env = {"PYTHONPATH": str(tmp_path / "lib")}
    one_line_error(prep(cwd=tmp_path, env=env), "without pydoc_data")
    one_line_error(prep("--tokenizer=bpe", cwd=tmp_path, env=env), "pip install tokenizers")
    assert not (tmp_path / "data").exists()


def test_no_torch(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare_data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# failures in the middle leave what was there

@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_disk_full(tmp_path):
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    prepared(tmp_path, "what was there before")
    (tmp_path / "big.txt").write_text("text " * 200_000)
    before = tree(tmp_path)
    for name in ("x", "new"):
        result = prep("--dataset=big.txt", f"--name={name}", cwd=tmp_path, preexec_fn=limit)
        one_line_error(result, "too large")
        assert tree(tmp_path) == before and os.listdir(tmp_path / "data") == ["x"]
    assert "replaced" in prep("--dataset=big.txt", "--name=x", cwd=tmp_path).stdout


def test_interrupted_from_inside(tmp_path, monkeypatch):
    prepared(tmp_path, "what was there before")
    before = tree(tmp_path / "data")
    monkeypatch.setattr(prepare_data.json, "dump", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for name in ("x", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path, "something new altogether", name=name)
        assert tree(tmp_path / "data") == before and os.listdir(tmp_path / "data") == ["x"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_ctrl_c(tmp_path):
    prepared(tmp_path, "what was there before")
    (tmp_path / "big.txt").write_text("some text of many words " * 300_000)
    before = tree(tmp_path / "data")
    child = subprocess.Popen([sys.executable, str(ROOT / "prepare_data.py"), "--dataset=big.txt", "--name=x",
                              "--tokenizer=bpe", "--vocab_size=300"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(lambda: len(os.listdir(tmp_path / "data" / "x")) > 3)
    child.send_signal(signal.SIGINT)
    assert child.communicate()[1].splitlines() == ["prepare_data.py: interrupted"] and child.returncode == 130
    assert tree(tmp_path / "data") == before


PREPARE_PEAK = """
import sys
sys.path.insert(0, {root!r})
import prepare_data
prepare_data.prepare(prepare_data.Config(dataset=sys.argv[1], data_dir="data", tokenizer=sys.argv[2], name="x"))
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


# VmHWM, because the ru_maxrss of a child begins at what its parent used
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("tokenizer, size", [("char", 60), ("tokenizer.json", 12), ("bpe", 12)])
def test_memory_stays_flat(tmp_path, tokenizer, size):
    words = " ".join(random.Random(0).choices([f"wörd{i}" for i in range(5000)], k=2000)) + "\n"
    (tmp_path / "tokenizer.json").write_text(prepare_data.BPETokenizer.train([words], 2000).to_dict()["json"], encoding="utf-8")
    peaks = []
    code = PREPARE_PEAK.replace("prepare_data.prepare(", "prepare_data.TRAIN_BPE_ON = 1 << 20\nprepare_data.prepare(")
    for megabytes in (1, size):
        with open(tmp_path / "t.txt", "wb") as f:
            f.writelines([words.encode()] * (megabytes * 1_000_000 // len(words.encode())))
        result = subprocess.run([sys.executable, "-c", code.format(root=str(ROOT)), "t.txt", tokenizer], cwd=tmp_path,
                                capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.split()[-1]) // 1024)
    print(peaks)
    assert peaks[1] - peaks[0] < 60, peaks


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_training_a_bpe_shows_progress(tmp_path):
    """On a terminal, while the text is read and while pairs are merged; in a log there is none of it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(20_000)]
    (tmp_path / "t.txt").write_text(" ".join(rng.choices(words, k=900_000)))
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--dataset=t.txt", "--tokenizer=bpe", "--vocab_size=600"]
    import fcntl
    import termios
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(ours, "rb", buffering=0) as screen, subprocess.Popen(command, cwd=tmp_path, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):      # how a terminal ends
            while data := screen.read(10_000):
                shown += data
    assert process.returncode == 0
    assert all(what in shown for what in (b"reading: ", b"training bpe: ", b"encoding: ")) and shown.count(b"Compute merges") > 2
    assert prep(*command[2:], cwd=tmp_path).stderr == ""


# downloads, from a server on this machine

BODY = bytes(random.Random(1).choices(b"abcdefghij klmnopqrstuvwxyz\n", k=300_000))
SHA = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers /<behaviour>/anything, of state-spaces and someone only what is in .files; .log holds (path, Range, Authorization) of
    each request."""
    daemon_threads = True

    def __init__(self):
        self.log, self.drops, self.files, self.headers = [], 0, {}, {}
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.log.append((self.path, wanted, self.headers.get("Authorization")))
        behaviour = self.path.split("/")[1]
        body = server.files.get(self.path, BODY)
        start, status, headers = 0, 200, dict(server.headers)
        if behaviour == "missing" or behaviour in ("state-spaces", "someone") and self.path not in server.files:
            return self.send_error(404)
        if behaviour == "linked":  # as Hugging Face: size and hash stand on the redirect
            self.send_response(302)
            self.send_header("Location", "/plain/other-host")
            self.send_header("X-Linked-Size", str(len(BODY)))
            self.send_header("X-Linked-Etag", f'"{server.files.get("etag", SHA)}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if wanted and behaviour != "norange":
            start = int(wanted[6:-1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
            if start >= len(body):
                status, headers["Content-Range"] = 416, f"bytes */{len(body)}"
        data = body[start:]
        end = len(data)
        if server.drops > 0 and status < 300:
            server.drops, end = server.drops - 1, min(end, 2 << 16)
        self.send_response(status)
        headers["Content-Length"] = str(len(data) + (1000 if behaviour == "toolong" else 0))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[:end])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(mamba, "PAUSES", (0, 0, 0))
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def test_download(tmp_path, server):
    path = prepare_data.download(server.url + "/plain", tmp_path / "d" / "f.txt", len(BODY), SHA)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ["f.txt"]
    prepare_data.download(server.url + "/plain", path, len(BODY), SHA)
    assert len(server.log) == 1  # it was there
    path.write_bytes(b"damaged")
    assert prepare_data.download(server.url + "/plain", path, len(BODY), SHA).read_bytes() == BODY


@pytest.mark.parametrize("behaviour, ranges", [("plain", [None, "bytes=131072-", "bytes=262144-"]),
                                               ("norange", [None, "bytes=131072-", "bytes=131072-"])])
def test_download_goes_on_after_a_drop(tmp_path, server, behaviour, ranges):
    server.drops = 2
    assert prepare_data.download(f"{server.url}/{behaviour}", tmp_path / "f").read_bytes() == BODY
    assert [wanted for _, wanted, _ in server.log] == ranges


def test_download_goes_on_in_a_later_run(tmp_path, server):
    server.drops = 9
    with pytest.raises(prepare_data.Problem, match="the same command goes on"):
        prepare_data.download(server.url + "/norange", tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["f.part"]
    server.drops = 0
    assert prepare_data.download(server.url + "/plain", tmp_path / "f", sha256=SHA).read_bytes() == BODY
    assert server.log[-1][1] == "bytes=131072-"


@pytest.mark.parametrize("part", [BODY, BODY + b"of another, longer file"])
def test_download_with_a_part_of_full_length(tmp_path, server, part):
    (tmp_path / "f.part").write_bytes(part)
    assert prepare_data.download(server.url + "/plain", tmp_path / "f").read_bytes() == BODY


def test_download_problems(tmp_path, server):
    for behaviour, more, error, words in [
            ("missing", {}, FileNotFoundError, "status 404"), ("toolong", {}, prepare_data.Problem, "cannot download"),
            ("plain", {"sha256": "0" * 64}, OSError, "sha256 differs"), ("plain", {"size": 5}, OSError, "size")]:
        path = tmp_path / behaviour
        with pytest.raises(error, match=words):
            prepare_data.download(f"{server.url}/{behaviour}", path, **more)
        assert not path.exists()
    assert sorted(os.listdir(tmp_path)) == ["toolong.part"]  # garbage is gone, a drop can go on


@pytest.mark.parametrize("environment, error, words", [
    ({"HF_ENDPOINT": "notaurl"}, OSError, "cannot download notaurl/a/b: Invalid URL .*No scheme"),
    ({"HF_ENDPOINT": "nonsense://x"}, OSError, "cannot download nonsense://x/a/b: No connection adapters"),
    ({"HF_ENDPOINT": "http://127.0.0.1:1"}, ConnectionError, "cannot download http://127.0.0.1:1/a/b .*is there a network?"),
    ({"HF_TOKEN": "sécret"}, OSError, "HF_TOKEN has characters that no token has$"),
    ({"HF_TOKEN": "sec\nret"}, OSError, "HF_TOKEN has characters that no token has$"),
    ({"HF_HUB_OFFLINE": "1"}, ConnectionError, "there, and HF_HUB_OFFLINE forbids"),
])
def test_what_keeps_from_downloading(tmp_path, server, monkeypatch, environment, error, words):
    """At once, and nothing is left of it."""
    monkeypatch.setattr(mamba, "PAUSES", (1000,))
    for name, value in {"HF_ENDPOINT": server.url, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=words):
        mamba.download("a/b", tmp_path / "new" / "b")
    assert not server.log and not os.listdir(tmp_path)


@pytest.mark.parametrize("package", ["requests", "tqdm"])
def test_a_download_without_its_packages(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OSError, match=f"pip install {package}$"):
        mamba.download("a/b", tmp_path / "b")


def test_a_json_that_is_none_is_not_kept(tmp_path, server, monkeypatch):
    """The login page of a network, or what came until a drop if the server does not tell the size."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for data in (b"<html>Please log in</html>", b'{"d_model": 16, "n_la', b"[" * 100_000, b"\xff"):
        server.files["/a/b/resolve/main/config.json"] = data
        with pytest.raises(OSError, match=f"config.json is not what it should be .not JSON: .*{len(data):,} bytes came.*kept"):
            Mamba.from_pretrained("a/b")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    server.headers = {"X-Linked-Size": "many"}
    with pytest.raises(OSError, match="cannot download .*config.json: .*'many'"):
        Mamba.from_pretrained("a/b")


def test_hugging_face(tmp_path, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert prepare_data.download("linked", tmp_path / "good").read_bytes() == BODY
    assert server.log[0][2] == "Bearer secret"
    server.files["etag"] = "1" * 64
    with pytest.raises(OSError, match="sha256 differs"):
        prepare_data.download("linked", tmp_path / "bad")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    prepare_data.download(server.url + "/plain", tmp_path / "elsewhere")
    assert server.log[-1][2] is None and sorted(os.listdir(tmp_path)) == ["elsewhere", "good"]


def test_gpt_neox(tmp_path, hub, call):
    """Downloaded into --cache_dir, or found in Hugging Face's cache, where nothing is ever deleted."""
    flags, path = ["--tokenizer=gpt-neox", "--dataset=t.txt"], "/EleutherAI/gpt-neox-20b/resolve/main/tokenizer.json"
    (tmp_path / "t.txt").write_text(AWKWARD)
    one_line_error(call("prepare_data.py", *flags, cwd=tmp_path), "tokenizer.json is not what it should be (not JSON")
    hub.files[path] = b"{}"
    one_line_error(call("prepare_data.py", *flags, cwd=tmp_path), "gpt-neox-20b/tokenizer.json is not a tokenizer.json")
    assert not (tmp_path / "data").exists()
    data = hub.files[path] = prepare_data.BPETokenizer.train([AWKWARD], 300).to_dict()["json"].encode()
    config = functools.partial(prepare_data.Config, "t.txt", "gpt-neox")
    assert prepare_data.load_meta(prepare_data.prepare(config(cache_dir="here")))["vocab_size"] == 300
    assert (tmp_path / "here" / "EleutherAI--gpt-neox-20b" / "tokenizer.json").read_bytes() == data
    requests, repository = len(hub.log), tmp_path / "hf" / "hub" / "models--EleutherAI--gpt-neox-20b"
    shutil.rmtree(tmp_path / "cache")
    write(repository / "refs", {"main": b"0123abcd"})
    snapshot = write(repository / "snapshots" / "0123abcd", {"tokenizer.json": data})
    prepare_data.prepare(config())
    (snapshot / "tokenizer.json").write_text("{}")
    one_line_error(call("prepare_data.py", *flags, cwd=tmp_path), f"{snapshot / 'tokenizer.json'} is not a tokenizer.json")
    assert (snapshot / "tokenizer.json").exists() and len(hub.log) == requests
    write(repository / "refs", {"main": b"\xff"})       # damaged: as if it was not there
    prepare_data.prepare(config())
    assert len(hub.log) == requests + 1


def test_datasets_from_the_network(tmp_path, server, monkeypatch):
    flags = {"data_dir": str(tmp_path)}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(prepare_data, "ALICE", server.url + "/plain/alice")
    base = "/datasets/roneneldan/TinyStories/resolve/main/TinyStories-"
    server.files = {base + "train.txt": b"One day.\n<|endoftext|>\nA dog. " * 9, base + "valid.txt": b"Val story.\n",
                    "/plain/alice": "\ufefflicence\r\n*** START OF THE X ***\r\n\r\nAlice was\r\nbored.\r\n\r\n"
                                    "*** END OF THE X ***\r\nmore licence".encode()}
    _, train, val, t = opened(prepare_data.prepare(prepare_data.Config(dataset="alice", **flags)))
    assert t.decode(train + val) == "Alice was\nbored.\n"
    for tokenizer in ("char", "bpe"):
        config = prepare_data.Config(dataset="tinystories", tokenizer=tokenizer, vocab_size=270, **flags)
        meta, train, val, t = opened(prepare_data.prepare(config))
        assert t.decode(train).encode() == server.files[base + "train.txt"] and t.decode(val) == "Val story.\n"
    assert train.count(t.end_of_text) == 9 and meta["name"] == "tinystories-bpe"
    meta, train, val, t = opened(prepare_data.prepare(prepare_data.Config(dataset=server.url + "/plain/text.txt", **flags)))
    assert meta["name"] == "text" and t.decode(train + val).encode() == BODY
    monkeypatch.setattr(prepare_data, "ALICE", server.url + "/plain")
    (tmp_path / "downloads" / "alice.txt").unlink()
    with pytest.raises(prepare_data.Problem, match="something else than the book"):
        prepare_data.prepare(prepare_data.Config(dataset="alice", **flags))
    assert not (tmp_path / "downloads" / "alice.txt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


@pytest.mark.parametrize("length", (1, 2, 3, 7, 8, 9, 31))
@pytest.mark.parametrize("scan", (bench.hillis_steele, bench.blelloch), ids=lambda scan: scan.__name__)
def test_log_depth_scans_equal_selective_scan(scan, length):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    inputs = [rand(2, length, 5), rand(2, length, 5).exp(), -rand(5, 3).exp(), rand(2, length, 3), rand(2, length, 3)]
    inputs, gy = [t.requires_grad_() for t in inputs], rand(2, length, 5)
    ours, other = (bench.scan_call(f, inputs, gy, True)() for f in (selective_scan, bench.materialised(scan)))
    for a, b in zip(ours, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_exact_is_the_float64_loop():
    inputs, gy = bench.scan_inputs((2, 130, 4, 3), SimpleNamespace(device=torch.device("cpu"), dtype="float32"))
    exactly = bench.exact(inputs, gy)       # 130 steps: more than two of its pieces
    assert {t.dtype for t in exactly} == {torch.float64}
    call = bench.scan_call(lambda *i: selective_scan(*i, method="sequential"), [t.double() for t in inputs], gy.double(), True)
    assert bench.largest_error(call(), exactly) < 1e-12
    assert bench.largest_error([t * 1.01 for t in exactly], exactly) == pytest.approx(0.01)


def test_bench_measures_every_suite(tmp_path):
    flags = ["--suite=all", "--device=cpu", "--seconds=0.003", "--shapes=1x9x4x2", "--lengths=1", "--longest=256",
             "--d_model=16", "--n_layer=2", "--batch_size=2", "--block_size=8", "--size=small", "--new_tokens=2", "--prompt=5"]
    done = subprocess.run([sys.executable, ROOT / "bench.py", *flags, f"--out={tmp_path / 'r' / 'bench.json'}"], timeout=120,
                          check=False, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r" / "bench.json").read_text())
    assert results["machine"]["threads"] == 1 and results["flags"]["prompt"] == 5
    printed = re.findall(r"^(\S.*?) {2,}[\d.e+]+ +[\d.e+]+\.\.[\d.e+]+ ", done.stdout, re.MULTILINE)
    rows = [row for table in results["tables"] for row in table["rows"]]
    assert printed == [row["variant"] for row in rows]
    assert all(row["median_s"] > 0 and row["times_s"] and row["tokens_per_s"] > 0 for row in rows)
    assert all(row["error"] < 1e-5 for table in results["tables"] for row in table["rows"] if "direction" in table)
    assert [table["title"].split(":")[0] for table in results["tables"]] == [
        *["scan, forward", "scan, forward + backward"] * 2, "cost per token, forward", "cost per token, forward + backward",
        "training step", "generation, 1 x 2 tokens after 1", "reading a prompt of 5 tokens", "generation after a prompt"]
    for table in results["tables"]:
        assert table["title"] in done.stdout and not [remark for remark in table["remarks"] if "failed" in remark]


def test_bench_goes_on_without_a_variant_that_fails():
    def broken():
        raise ImportError("no such kernel\nand a long story")
    rows, remarks = bench.measure({"good": lambda: lambda: None, "bad": lambda: broken}, torch.device("cpu"), 0.01, None, False)
    assert [row["variant"] for row in rows] == ["good"] and remarks == ["bad failed: ImportError: no such kernel"]


@pytest.mark.parametrize("flag", ("--suite=scam", "--shapes=4x1024x512", "--shapes=4x0x5x1", "--shapes=", "--lengths=1,,2",
                                  "--size=2.8b", "--seconds=0", "--n_layer=-1", "--dtype=int8", "--device=abacus"))
def test_bench_refuses_bad_flags_in_one_line(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", f"--out={tmp_path / 'bench.json'}", flag])
    with pytest.raises(SystemExit) as stop:
        prepare_data.run(bench.main, bench.Config)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and flag.split("=")[0] in err


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained weights


LAYOUTS = ("mamba_ssm", "mamba_ssm, padded", "hf", "hf, shards", "hf, .bin shards")
NAME = "state-spaces/mamba-tiny"


def lively(**changes):
    """A model whose every weight matters."""
    model = small(**changes).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else torch.nn.init.uniform_(p, -2, 0.5)
    return model


def released(model, layout="mamba_ssm"):
    """{name: bytes} of the files that released weights of this model would have."""
    c, files = model.config, {}
    if layout.startswith("mamba_ssm"):
        vocab_size = c.padded_vocab_size if "padded" in layout else c.vocab_size
        config = {"d_model": c.d_model, "n_layer": c.n_layer, "vocab_size": vocab_size, "ssm_cfg": {}, "rms_norm": True,
                  "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
        torch.save(model.state_dict(), data := io.BytesIO())
        return {"config.json": json.dumps(config).encode(), "pytorch_model.bin": data.getvalue()}
    config = {"architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": c.d_inner,
              "d_model": c.d_model, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
              "hidden_size": c.d_model, "initializer_range": 0.1, "intermediate_size": c.d_inner,
              "layer_norm_epsilon": 1e-05, "model_type": "mamba", "n_layer": c.n_layer, "num_hidden_layers": c.n_layer,
              "pad_token_id": 0, "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False, "residual_in_fp32": True,
              "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001,
              "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
              "time_step_rank": c.dt_rank, "time_step_scale": 1.0, "torch_dtype": "float32", "use_bias": False,
              "use_cache": True, "use_conv_bias": True, "vocab_size": c.padded_vocab_size}
    weights = {k.replace("embedding.", "embeddings."): t for k, t in model.state_dict().items() if k != "lm_head.weight"}
    names, kind = list(weights), "pytorch_model.bin" if "bin" in layout else "model.safetensors"
    stem, suffix = kind.split(".")
    shards = {f"{stem}-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)} if "shards" in layout else {kind: names}
    for name, keys in shards.items():
        part = {key: torch.nn.Parameter(weights[key]) for key in keys}
        if suffix == "bin":
            torch.save(part, data := io.BytesIO())
            files[name] = data.getvalue()
        else:
            files[name] = pytest.importorskip("safetensors.torch").save(part, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        files[f"{kind}.index.json"] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return {"config.json": json.dumps(config).encode(), **files}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def logits(model, length=20):
    with torch.no_grad():
        return model(tokens(2, length))[0][..., :70]


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server as Hugging Face, and a machine that has never loaded anything. hub.offer(files) uploads them."""
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HF_ENDPOINT", server.url), ("HF_HOME", tmp_path / "hf"), ("XDG_CACHE_HOME", tmp_path / "cache")):
        monkeypatch.setenv(name, str(value))
    server.offer = lambda files, name=NAME: server.files.update({f"/{name}/resolve/main/{k}": v for k, v in files.items()})
    return server


def test_saved_weights_have_the_names_of_mamba_ssm(tmp_path):
    """Keys, shapes and config as mamba_ssm's MambaLMHeadModel.from_pretrained wants them, which refuses any other."""
    model = small(n_layer=2)
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "pytorch_model.bin"]
    weights = load(tmp_path / "a" / "b" / "pytorch_model.bin")
    mixer = {"A_log": (64, 16), "D": (64,), "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,),
             "x_proj.weight": (34, 64), "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "out_proj.weight": (32, 64)}
    layer = {"norm.weight": (32,), **{f"mixer.{k}": shape for k, shape in mixer.items()}}
    expected = {"backbone.embedding.weight": (72, 32), "backbone.norm_f.weight": (32,), "lm_head.weight": (72, 32),
                **{f"backbone.layers.{i}.{k}": shape for i in range(2) for k, shape in layer.items()}}
    assert {k: tuple(t.shape) for k, t in weights.items()} == expected
    assert weights["lm_head.weight"].data_ptr() == weights["backbone.embedding.weight"].data_ptr()  # once in the file
    config = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert config.keys() == {"d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm",
                             "pad_vocab_size_multiple", "tie_embeddings"}
    assert config["ssm_cfg"].keys() <= {"d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale",
                                        "dt_init_floor", "conv_bias", "bias", "use_fast_path"}


def test_every_option_and_type_survives_a_round_trip(tmp_path):
    changes = {"vocab_size": 75, "d_model": 24, "n_layer": 2, "d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4,
               "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 0.02, "conv_bias": False, "bias": True, "dropout": 0.25,
               "norm_eps": 1e-4, "tie_embeddings": False, "pad_vocab_size_multiple": 10, "d_intermediate": 40,
               "scan": "sequential"}
    assert all(getattr(MambaConfig(), name) != changes[name] for name in MambaConfig.__dataclass_fields__)
    for model in (small(), small(**changes), lively(**changes).bfloat16(), small(d_model=24).half(), small().double()):
        model.save_pretrained(tmp_path)
        again = Mamba.from_pretrained(tmp_path)
        assert again.config == model.config and not again.training
        assert (again.lm_head.weight is again.backbone["embedding"].weight) == model.config.tie_embeddings
        assert again.num_params() == model.num_params() and all(p.requires_grad for p in again.parameters())
        for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters()):
            assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]   # no leftovers
    assert Mamba.from_pretrained(tmp_path, dropout=0.5, scan="chunked").config.dropout == 0.5
    with pytest.raises(TypeError, match="dropuot"):
        Mamba.from_pretrained(tmp_path, dropuot=0.5)


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_full_disk_while_saving_weights(tmp_path):
    small().save_pretrained(tmp_path)
    before = tree(tmp_path)
    code = ("import resource, signal, mamba; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"mamba.Mamba(mamba.MambaConfig(vocab_size=99, d_model=64, n_layer=2)).save_pretrained({str(tmp_path)!r})")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "\nOSError: " in result.stderr and tree(tmp_path) == before


def test_weights_to_and_from_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = lively(vocab_size=72, d_state=5, norm_eps=1e-4)
    theirs = transformers.MambaConfig(vocab_size=72, hidden_size=32, num_hidden_layers=3, state_size=5, layer_norm_epsilon=1e-4)
    model.save_pretrained(tmp_path / "ours")
    peer = transformers.MambaForCausalLM(theirs)
    weights = load(tmp_path / "ours" / "pytorch_model.bin")
    peer.load_state_dict({k.replace("embedding.", "embeddings."): t for k, t in weights.items()})
    given_config = transformers.MambaForCausalLM.from_pretrained(tmp_path / "ours", config=theirs)
    for p in (peer, given_config):
        assert relative(p(tokens(2, 20)).logits[..., :70], logits(model)) < 1e-5
    torch.nn.init.normal_(peer.backbone.embeddings.weight)
    expected = peer(tokens(2, 20)).logits[..., :70]
    assert relative(expected, logits(model)) > 0.1
    for name, more in (("one", {}), ("shards", {"max_shard_size": "20KB"})):
        peer.save_pretrained(tmp_path / name, **more)
        again = Mamba.from_pretrained(tmp_path / name)
        assert relative(logits(again), expected) < 1e-5 and again.config.norm_eps == 1e-4
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_layouts(tmp_path, hub, monkeypatch, layout):
    """Downloaded once, then found; in Hugging Face's cache; in a folder. No type but the one asked for."""
    model = lively()
    files = released(model, layout)
    hub.offer(files)
    loaded = Mamba.from_pretrained(NAME)
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.padded_vocab_size == 72
    assert loaded.config.vocab_size == (70 if layout == "mamba_ssm" else 72)
    assert tree(tmp_path / "cache" / "mamba.py" / "state-spaces--mamba-tiny") == dict(sorted(files.items()))
    requests = len(hub.log)
    half = Mamba.from_pretrained(NAME, dtype=torch.bfloat16)
    for (name, p), expected in zip(half.named_parameters(), lively().bfloat16().parameters()):
        assert p.dtype == expected.dtype and torch.equal(p, expected), name
    Mamba.from_pretrained(NAME, cache_dir=tmp_path / "elsewhere")
    assert len(hub.log) == 2 * requests and (tmp_path / "elsewhere" / "state-spaces--mamba-tiny" / "config.json").is_file()

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    repository = tmp_path / "hf" / "hub" / "models--state-spaces--mamba-tiny"
    write(repository / "refs", {"main": b"0123abcd"})
    snapshot = write(repository / "snapshots" / "0123abcd", files)
    assert torch.equal(logits(Mamba.from_pretrained(NAME)), logits(model))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    assert torch.equal(logits(Mamba.from_pretrained(snapshot)), logits(model))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(logits(Mamba.from_pretrained(NAME)), logits(model))


def test_a_download_that_is_cut_off_goes_on(tmp_path, hub, monkeypatch):
    model = lively(d_model=96)
    hub.offer(released(model))
    weights = f"/{NAME}/resolve/main/pytorch_model.bin"
    folder = tmp_path / "cache" / "mamba.py" / "state-spaces--mamba-tiny"
    assert len(hub.files[weights]) > 5 << 17
    hub.drops = 2       # config.json is so small that it survives one
    assert torch.equal(logits(Mamba.from_pretrained(NAME)), logits(model))
    assert [wanted for path, wanted, _ in hub.log if path == weights] == [None, "bytes=131072-"]
    (folder / "pytorch_model.bin").unlink()
    hub.drops = 4
    with pytest.raises(ConnectionError, match="cannot download .*goes on where it stopped"):
        Mamba.from_pretrained(NAME)
    assert sorted(os.listdir(folder)) == ["config.json", "pytorch_model.bin.part"]
    assert torch.equal(logits(Mamba.from_pretrained(NAME)), logits(model)) and hub.log[-1][1] == f"bytes={4 << 17}-"
    (folder / "pytorch_model.bin").unlink()
    hub.headers = {"X-Linked-Size": "5"}
    with pytest.raises(OSError, match="is not what it should be"):
        Mamba.from_pretrained(NAME)
    assert os.listdir(folder) == ["config.json"]


def test_weights_that_cannot_be_found(tmp_path, hub, monkeypatch):
    hub.offer({"config.json": released(small())["config.json"]})
    (tmp_path / "folder").mkdir()
    for name, error, words in [(NAME, FileNotFoundError, "has no weights: none of pytorch_model.bin, model.safetensors"),
                               ("state-spaces/none", FileNotFoundError, "config.json: status 404"),
                               (tmp_path / "folder", FileNotFoundError, "config.json is missing"),
                               ("nothing", FileNotFoundError, "there is no folder nothing, and a name .* state-spaces/mamba-130m"),
                               ("../x", FileNotFoundError, "there is no folder ../x")]:
        with pytest.raises(error, match=words):
            Mamba.from_pretrained(name)
    requests = len(hub.log)
    assert os.listdir(tmp_path / "cache" / "mamba.py") == ["state-spaces--mamba-tiny"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    with pytest.raises(ConnectionError, match="state-spaces--none/config.json is not there, and HF_HUB_OFFLINE"):
        Mamba.from_pretrained("state-spaces/none")
    with pytest.raises(ConnectionError, match="pytorch_model.bin is not there, .*unset that, or give a folder"):
        Mamba.from_pretrained(NAME)
    assert len(hub.log) == requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HOME", "~nobody_of_this_name/hf")
    with pytest.raises(ConnectionError, match="cannot download http://127.0.0.1:1/state-spaces/none/resolve/main/config.json"):
        Mamba.from_pretrained("state-spaces/none")


@pytest.mark.parametrize("layout, changes, words", [
    ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2'; this model can only do 'Mamba1'"),
    ("mamba_ssm", {"attn_layer_idx": [1]}, "attn_layer_idx is .1."), ("mamba_ssm", {"rms_norm": False}, "rms_norm is False"),
    ("mamba_ssm", {"ssm_cfg": {"headdim": 64}}, "option headdim in ssm_cfg"), ("mamba_ssm", {"d_model": 0}, "d_model must be"),
    ("mamba_ssm", {"d_model": 10 ** 12}, "no memory could hold"), ("mamba_ssm", {"d_model": 10 ** 30}, "no memory could hold"),
    ("mamba_ssm", {"ssm_cfg": {"d_state": 10 ** 12}}, r"A_log is \(64, 16\), and by its config.json \(64, 1000000000000\)"),
    ("mamba_ssm", {"d_model": None}, "config.json: "), ("mamba_ssm", {"norm_eps": "x"}, "config.json: "),
    ("hf", {"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba'"), ("hf", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("mamba_ssm", {"n_layer": 2}, "pytorch_model.bin has a tensor backbone.layers.2.norm.weight, which this model does not"),
    ("hf", {"num_hidden_layers": 4}, "lacks 10 of this model's tensors: .*A_log, .*, .*, ...$"),
    ("mamba_ssm", {"vocab_size": 80}, r"embedding.weight is \(72, 32\), and by its config.json \(80, 32\)"),
    ("hf", {"tie_word_embeddings": False}, "lacks 1 of this model's tensors: lm_head.weight$")])
def test_weights_of_another_kind(tmp_path, layout, changes, words):
    files = released(small(), layout)
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
    with pytest.raises(ValueError, match=words):
        Mamba.from_pretrained(write(tmp_path, files))


def test_damaged_weights(tmp_path):
    model = small(tie_embeddings=False)
    for layout, name in (("mamba_ssm", "pytorch_model.bin"), ("hf", "model.safetensors")):
        files = released(model, layout)
        for i, data in enumerate((b"", b"some text", files[name][:2000], files[name][:-100], b"\xff" * 50, files[name][:50])):
            with pytest.raises(ValueError, match=f"{name} is damaged or not a file of weights"):
                Mamba.from_pretrained(write(tmp_path / f"{layout}{i}", {**files, name: data}))
    for config in (b"[]", b"{", b"\xff", b'{"d_model": 8}', b'{"d_model":' * 100_000, b'{"d_model": 8, "dropout": "x"}'):
        with pytest.raises(ValueError, match="config.json: "):
            Mamba.from_pretrained(write(tmp_path / "config", {**files, "config.json": config}))
    index, files = "model.safetensors.index.json", released(model, "hf, shards")
    for data, words in ((b"{}", "not an index of weights"), (b"[" * 100_000, "not an index of weights"),
                        (b'{"weight_map": {"a": "../b"}}', "'../b' is not the name of a file")):
        with pytest.raises(ValueError, match=words):
            Mamba.from_pretrained(write(tmp_path / "shards", {**files, index: data}))
    del files["model-00002-of-00003.safetensors"]
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors is missing"):
        Mamba.from_pretrained(write(tmp_path / "less", files))
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):    # its config says nothing of two tables
        Mamba.from_pretrained(write(tmp_path / "untied", released(model)))
    for key, tensor, words in (("norm_f.weight", torch.ones(32, dtype=torch.int8), "norm_f.weight is torch.int8"),
                               ("norm_f.weight", torch.ones(32).to(torch.float8_e5m2), "norm_f.weight is torch.float8_e5m2"),
                               ("norm_f.weight", torch.ones(32).to_sparse(), "norm_f.weight is torch.float32, torch.sparse_coo"),
                               ("norm_f.weight", torch.ones(32, device="meta"), "norm_f.weight is .*, on meta"),
                               ("norm_f.weight", 1.0, "'float' object has no attribute"), (7, torch.ones(3), ": 7 is")):
        weights = {**small().state_dict(), key if key == 7 else f"backbone.{key}": tensor}
        torch.save(weights, tmp_path / "untied" / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"pytorch_model.bin is damaged .*{words}"):
            Mamba.from_pretrained(tmp_path / "untied")
    torch.save(small().state_dict(), tmp_path / "untied" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not the zip file that torch.save writes"):
        Mamba.from_pretrained(tmp_path / "untied")
    torch.save(model, tmp_path / "untied" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged .*holds something else than tensors.; if it was"):
        Mamba.from_pretrained(tmp_path / "untied")


def test_two_kinds_of_weights_in_one_folder(tmp_path):
    """Those written last are read; ours are not written beside others, which transformers would go on to read."""
    old, new = lively(), small()
    write(tmp_path, released(old))
    write(tmp_path, {name: data for name, data in released(new, "hf, shards").items() if name != "config.json"})
    for file in tmp_path.iterdir():
        os.utime(file, (1e9, 1e9 + ("model" in file.name and "bin" not in file.name)))
    assert torch.equal(logits(Mamba.from_pretrained(tmp_path)), logits(new.eval()))
    os.utime(tmp_path / "pytorch_model.bin", (2e9, 2e9))
    assert torch.equal(logits(Mamba.from_pretrained(tmp_path)), logits(old))
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="holds model.safetensors.index.json, .*choose another folder"):
        new.save_pretrained(tmp_path)
    assert tree(tmp_path) == before


def test_mamba_alone_loads_a_folder(tmp_path):
    model = lively()
    write(tmp_path / "weights", released(model))
    (tmp_path / "mamba.py").write_bytes((ROOT / "mamba.py").read_bytes())
    code = ("import sys; sys.modules.update(requests=None, tqdm=None, numpy=None); import mamba, torch;"
            "print(mamba.Mamba.from_pretrained('weights')(torch.arange(9)[None])[0].double().sum().item())")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert float(result.stdout) == pytest.approx(model(torch.arange(9)[None])[0].double().sum().item(), rel=1e-4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """From float32 to bfloat16: a copy of the whole file, all its pages in memory, or a tied head read again would be more."""
    with torch.device("meta"):
        model = Mamba(MambaConfig(vocab_size=50277, d_model=512, n_layer=60))
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    code = """
import sys, torch, mamba
peak = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
model = mamba.Mamba.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert float(result.stdout) < 1.6


def test_training_begins_with_weights_and_goes_on_from_its_checkpoint(work, call):
    model = lively(d_model=16)      # of 70 tokens; the data has 10
    model.save_pretrained(work / "weights")
    flags = [flag for flag in TINY if not re.search("d_model|n_layer", flag)] + ["--lr_decay_iters=8", "--init_from=weights"]
    result = succeeded(script("train.py", *flags, "--max_iters=4", cwd=work))
    assert "weights of weights, whose vocabulary is 70; the data has a char tokenizer of 10" in result.stdout
    model.config.vocab_size = 10    # the others are never predicted
    val = np.fromfile(work / "data" / "words" / "val.bin", np.uint16)
    settings = SimpleNamespace(block_size=64, batch_size=4, eval_iters=3)
    expected = train.evaluate(model, val, settings, torch.device("cpu"), "float32", stop=False)
    assert float(losses(work)[1][3]) == pytest.approx(expected, rel=1e-5)
    config = load(work / "run" / "ckpt.pt")["model_config"]
    assert (config["d_model"], config["n_layer"], config["vocab_size"], config["dropout"]) == (16, 3, 10, 0.1)
    before = tree(work)
    one_line_error(call("train.py", *flags, "--init_from=other/weights", cwd=work), "did not begin with other/weights")
    one_line_error(call("train.py", *flags, "--d_model=32", cwd=work), "holds a model with d_model 16, not 32")
    assert tree(work) == before
    shutil.rmtree(work / "weights")
    again = succeeded(script("train.py", *flags, "--init_from=./weights/", "--max_iters=8", cwd=work)).stdout
    assert "going on from step 4 of 8" in again and "weights of" not in again
    text = train.load_model(load(work / "run" / "best.pt")).generate([[0]], 50)[0]
    assert text.max() < 10


@pytest.mark.parametrize("flags, words", [
    (["--init_from=weights", "--d_model=64"], ["--d_model cannot be chosen: the weights of weights have a shape"]),
    (["--init_from=weights", "--dataset=many.txt"], ["weights has a vocabulary of 70", "many with its char tokenizer of 100",
                                                     "--tokenizer=gpt-neox"]),
    (["--init_from=weights", "--dropout=2"], ["dropout must be"]),
    (["--init_from=broken"], ["--init_from=broken: broken", "config.json: rms_norm is False"]),
    (["--init_from=state-spaces/none"], ["state-spaces/none/resolve/main/config.json: status 404"]),
    (["--init_from=state-spaces/none", "--cache_dir=c"], ["c/state-spaces--none/config.json: rms_norm is False"]),
])
def test_bad_weights_to_train_from(tmp_path, call, hub, flags, words):
    small().save_pretrained(tmp_path / "weights")
    for name in ("broken", "c/state-spaces--none"):
        write(tmp_path / name, {**released(small()), "config.json": b'{"rms_norm": false}'})
    (tmp_path / "good.txt").write_text("some words to learn from\n" * 400)
    (tmp_path / "many.txt").write_text("".join(map(chr, range(200, 300))) * 200)
    one_line_error(call("train.py", "--dataset=good.txt", "--device=cpu", *flags, cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "data").exists() or "--init_from=weights" in flags


def test_sample_from_released_weights(tmp_path, hub, monkeypatch, capsys, call):
    """With the tokenizer.json beside them, else with GPT-NeoX's; the text alone goes to stdout."""
    tokenizers = [prepare_data.BPETokenizer.train([AWKWARD * i], 300) for i in (1, 2)]
    model = lively(vocab_size=300)
    hub.offer(released(model))
    hub.offer(released(model, "hf"), "someone/none")    # a config.json that counts the rows of padding, 304
    hub.offer({**released(model), "tokenizer.json": tokenizers[1].to_dict()["json"].encode()}, "someone/own")
    hub.files["/EleutherAI/gpt-neox-20b/resolve/main/tokenizer.json"] = tokenizers[0].to_dict()["json"].encode()
    write(tmp_path / "w", {**released(model), "tokenizer.json": tokenizers[1].to_dict()["json"].encode()})
    for name, tokenizer in ((NAME, tokenizers[0]), ("someone/none", tokenizers[0]), ("someone/own", tokenizers[1]),
                            (str(tmp_path / "w"), tokenizers[1])):
        flags = [f"--pretrained={name}", "--start=the tab", "--temperature=0", "--max_new_tokens=9", "--device=cpu",
                 f"--cache_dir={tmp_path / 'c'}"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        prepare_data.run(sample.main, sample.Config)
        out, err = capsys.readouterr()
        expected = tokenizer.decode(model.generate([tokenizer.encode("the tab")], 9, temperature=0)[0].tolist())
        assert out == expected.rstrip("\ufffd") + "\n"
        assert f"{name}: 0.0" in err and "9 tokens in" in err
        again, _ = sample.load_pretrained(name, torch.device("cpu"), torch.float32, "auto", tmp_path / "c")
        assert again(tokens(1, 5, vocab=300))[0].shape == (1, 5, 300)
    assert not (tmp_path / "cache").exists() and len(list((tmp_path / "c").rglob("tokenizer.json"))) == 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, said in ((NAME, ""), ("someone/none", "HF_HUB_OFFLINE"), ("someone/own", "")):
        _, tokenizer = sample.load_pretrained(name, torch.device("cpu"), torch.float32, "auto", tmp_path / "c")
        assert tokenizer.to_dict() == tokenizers["own" in name].to_dict()
        assert (said in capsys.readouterr().err) if said else (capsys.readouterr() == ("", ""))
    small().save_pretrained(tmp_path / "w")
    for flags, words in ((["--pretrained=w"], ["tokenizer.json has 300 tokens and w knows 70", "beside the weights"]),
                         (["--pretrained=w", "--out_dir=x"], ["--out_dir and --pretrained"]),
                         (["--pretrained=w/tokenizer.json"], ["there is no folder w/tokenizer.json"]),
                         (["--pretrained=nothing"], ["there is no folder nothing"])):
        one_line_error(call("sample.py", *flags, cwd=tmp_path), *words)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling settings, conversations, --show, BPE of large texts


@pytest.mark.parametrize("settings", [
    {"min_p": 0.2}, {"min_p": 0.0}, {"min_p": 1.0}, {"min_p": 0.1, "temperature": 2.0, "top_k": 6},
    {"min_p": 0.2, "top_p": 0.7},
    {"repetition_penalty": 1.5}, {"repetition_penalty": 0.7, "temperature": 0.7}, {"repetition_penalty": 3.0, "top_k": 1},
    {"repetition_penalty": 2.0, "temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.15}])
def test_sampling_settings_mean_what_they_mean_in_transformers(settings):
    transformers = pytest.importorskip("transformers")
    g = torch.Generator().manual_seed(5)
    logits, history = 2 * torch.randn(1, 12, generator=g) - 2, torch.tensor([[0, 3, 4, 4, 7, 11]])   # above and below 0
    seen, expected = torch.zeros(1, 12, dtype=torch.bool).scatter_(1, history, True), logits
    for kind, name in (("RepetitionPenaltyLogitsProcessor", "repetition_penalty"), ("TemperatureLogitsWarper", "temperature"),
                       ("TopKLogitsWarper", "top_k"), ("TopPLogitsWarper", "top_p"), ("MinPLogitsWarper", "min_p")):
        expected = getattr(transformers, kind)(settings[name])(history, expected) if name in settings else expected
    expected = expected.softmax(-1)[0]
    draws = mamba.sample(logits.repeat(40_000, 1), generator=g, seen=seen, **settings)
    got = torch.bincount(draws, minlength=12) / 40_000
    assert (got - expected).abs().max() < 0.012 and not got[expected == 0].any(), (got, expected)


def test_repetition_penalty_knows_the_prompt_and_the_answer():
    model, prompts = small(tie_embeddings=False).eval(), [tokens(n, seed=n).tolist() for n in (5, 60)]
    with torch.no_grad():
        for prompt, row in zip(prompts, model.generate(prompts, 30, temperature=0, repetition_penalty=1.7)):
            for t in range(len(prompt), len(prompt) + 30):
                logits = model(row[None, :t])[0][0, -1]
                for token in set(row[:t].tolist()):
                    logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
                assert logits.argmax() == row[t], t
    # in two streams with one state and one seen, as in one
    state, seen = model.init_state(1), torch.zeros(1, 70, dtype=torch.bool)
    settings = {"temperature": 0, "repetition_penalty": 1.7}
    first = [t.item() for t in model.stream([prompts[0]], 7, state=state, seen=seen, **settings)]
    second = [t.item() for t in model.stream([first[-1:]], 23, state=state, seen=seen, **settings)]
    assert prompts[0] + first + second == model.generate(prompts[:1], 30, **settings)[0].tolist()


def test_stop_tokens():
    model, prompts = small().eval(), [tokens(n, seed=n) for n in (5, 1, 12, 5)]
    free = [row.tolist() for row in model.generate(prompts, 40, temperature=1.0, generator=torch.Generator().manual_seed(0))]
    stop = [free[0][9], free[1][3], free[2][20]]

    def again(prompts, **more):
        return model.generate(prompts, 40, generator=torch.Generator().manual_seed(0), **more)
    ends = [next((i + 1 for i in range(len(p), len(row)) if row[i] in stop), len(row)) for p, row in zip(prompts, free)]
    got = again(prompts, stop=stop)
    assert [row.tolist() for row in got] == [row[:end] for row, end in zip(free, ends)] and min(ends) < max(ends)
    assert again(prompts, stop=())[3].tolist() == free[3]
    calls, make_step = [], model._step
    counted = lambda step: lambda token: calls.append(1) or step(token)
    model._step = lambda *given: counted(make_step(*given))
    stops = [*stop, free[3][15]]
    new = torch.stack(list(model.stream(prompts, 40, stop=stops, generator=torch.Generator().manual_seed(0))), 1).tolist()
    del model._step
    assert len(calls) == len(new[0]) and len(new[0]) < 40   # no step after the last row has stopped
    assert all(row[-1] in stops and len({*row[row.index(row[-1]):]}) == 1 for row in new)

    # a tensor is as long as the longest row; a prompt may hold stop tokens, and end with one
    idx = torch.stack([prompts[0], prompts[3].roll(1)])
    free = again(idx)
    stop = [free[0, 7].item(), free[1, 11].item(), idx[0, 4].item()]
    ends = [next(i for i in range(5, 45) if row[i] in stop) + 1 for row in free.tolist()]
    out = again(idx, stop=stop)
    assert out.shape == (2, max(ends)) and ends[0] != ends[1]
    for row, expected, end in zip(out.tolist(), free.tolist(), ends):
        assert row == expected[:end] + [expected[end - 1]] * (max(ends) - end)
    for bad in ([70], [-1], [3, 1000]):
        with pytest.raises(ValueError, match="stop tokens must be ids from 0 to 69"):
            model.generate(prompts, 3, stop=bad)
    for bad in ({"min_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.inf},
                {"repetition_penalty": math.nan}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.generate(prompts, 3, **bad)


def test_drawing_a_token_never_waits_for_the_gpu():
    """What makes the host wait reads a number (_local_scalar_dense) or has a result whose size is a number (nonzero)."""
    logits, seen = torch.randn(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    with Recorder() as recorded:
        before = mamba.next_token(logits, None, torch.tensor([4]), seen, None, (0.7, 5, 0.9, 0.1, 1.2))
        mamba.next_token(logits, before, torch.tensor([4]), seen, None, (0, None, None, None, 1.2))
    assert {"scatter_.value", "where.self", "masked_fill.Scalar"} <= recorded.operators
    assert not [op for op in recorded.operators if re.match("_local_scalar|nonzero|multinomial|_?unique|_to_copy|is_nonzero", op)]
    with Recorder() as plain:
        mamba.next_token(logits, before, None, None, None, (1.0, None, None, None, None))
    assert not {"where.self", "scatter_.value", "masked_fill.Scalar", "sort"} & plain.operators
    with Recorder() as recorded:
        small().generate([[1, 2], [3]], 4, repetition_penalty=1.2, min_p=0.1, stop=[5])
    assert not recorded.operators - mps_operators()


def one_token_a_byte():
    pytest.importorskip("tokenizers")
    return prepare_data.BPETokenizer.train(["abc"], 257)


def test_invalid_bytes_neither_stall_nor_change_the_text():
    tokenizer, rng = one_token_a_byte(), random.Random(0)
    byte = {i: tokenizer.tokenizer.id_to_token(i) for i in range(257)}
    smile = tokenizer.encode("🙂")
    assert len(smile) == 4 and len(set(smile)) == 4 and byte[0] == "<|endoftext|>"
    for case in range(300):
        pool = [*smile, *tokenizer.encode("é日a "), *range(257)] if case % 2 else smile + tokenizer.encode("a")
        ids = rng.choices(pool, k=60) if case else smile[1:2] * 60
        before = rng.choices(pool, k=case % 7)
        shown, pieces = "", sample.as_text(tokenizer, ids)
        for n in range(1, len(ids) + 1):
            shown += next(pieces)
            assert tokenizer.decode(ids[:n]).startswith(shown)
            assert shown.startswith(tokenizer.decode(ids[:max(n - 3, 0)]).removesuffix("\ufffd"))   # three tokens late at most
        assert shown + next(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in (text := tokenizer.decode(before)):
            assert text + "".join(sample.as_text(tokenizer, ids, before)) == tokenizer.decode(before + ids)


def test_characters_spelled_in_bytes_by_another_kind_of_tokenizer():
    """SentencePiece's kind decodes a run of bytes to as many U+FFFD as it has, until the last of them is there."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = [*(f"<0x{n:02X}>" for n in range(256)), "a", "b", "\u2581", "<unk>"]
    t = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True,
                                                   unk_token="<unk>"))
    t.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(),
                                              tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
    tokenizer, text = prepare_data.BPETokenizer(t.to_str()), "a🙂🙂é日b\u2581é🙂a\u2581b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ") and len(ids) == 25
    for begin in range(len(ids)):
        pieces = [*sample.as_text(tokenizer, ids[begin:], before=ids[:begin])]
        if not tokenizer.decode(ids[:begin]).endswith("\ufffd"):
            assert tokenizer.decode(ids[:begin]) + "".join(pieces) == text.replace("\u2581", " ")
            assert "\ufffd" not in "".join(pieces)


def test_stop_strings():
    assert sample.stop_strings("") == [] and sample.stop_strings(r"\nYou:|a\|b\\|\t") == ["\nYou:", "a|b\\", "\t"]
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=12))
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 5))) for _ in range(rng.randint(0, 3))]
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        pieces, rest = [], text
        while rest:
            n = rng.randint(0, 4)
            pieces, rest = [*pieces, rest[:n]], rest[n:]
        got = list(sample.until(stops, pieces))
        assert "".join(got) == text[:min(ends)[1] if ends else None]
        if ends:    # nothing is held back longer than it could still be a beginning
            for n in range(len(got) - 1):
                held = "".join(pieces[:n + 1])[len("".join(got[:n + 1])):]
                assert held == "" or any(stop.startswith(held) for stop in stops)


LETTERS = "\n abcdefghijklmnopqrstuvwxyz<&>\"'é"


def conversation(prompt="", seed=0, **changes):
    torch.manual_seed(seed)
    tokenizer = prepare_data.CharTokenizer(LETTERS)
    # an untrained model with one table for both would repeat what it has just read
    model = Mamba(MambaConfig(len(LETTERS), 32, 3, tie_embeddings=False, **changes)).eval()
    return sample.Conversation(model, tokenizer, tokenizer.encode(prompt))


GREEDY = sample.Config(temperature=0.0, max_new_tokens=20)


def turns(talk, monkeypatch, capsys, *lines, cfg=GREEDY):
    """What a chat with these lines from the person writes: (stdout between the prompts, stderr)."""
    lines = iter(lines)

    def typed(prompt):
        print(prompt, end="")
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", typed)
    capsys.readouterr()
    sample.chat(talk, cfg, torch.Generator().manual_seed(0))
    out, err = capsys.readouterr()
    return out.split("> ")[1:], err.splitlines()[1:]


def test_a_kept_conversation_goes_on_with_the_same_tokens(tmp_path, monkeypatch, capsys):
    file = tmp_path / "our talk.pt"
    settings = dataclasses.replace(GREEDY, repetition_penalty=1.2)
    unsaved, _ = turns(conversation("so"), monkeypatch, capsys, "hello", "and then", "why", cfg=settings)
    first, said = turns(conversation("so"), monkeypatch, capsys, "hello", f"/save {file}", "and now for", "/quit", cfg=settings)
    assert first[0] == unsaved[0] and said == [f"saved {file}"] and len({*unsaved[:3]}) == 3
    then, said = turns(conversation("x"), monkeypatch, capsys, "other", f"/load {file}", "and then", "why", cfg=settings)
    assert then[2:4] == unsaved[1:3] and said == [f"loaded {file}"]
    reset, said = turns(conversation("so"), monkeypatch, capsys, "abc", "/reset", "hello", cfg=settings)
    assert reset[2] == unsaved[0] and not said
    assert os.listdir(tmp_path) == [file.name]


def test_only_a_whole_conversation_with_this_model_is_loaded(tmp_path, monkeypatch, capsys):
    expected, _ = turns(conversation(), monkeypatch, capsys, "hello", "why")
    for name, changes in (("other.pt", {"seed": 1}), ("eps.pt", {"norm_eps": 1e-3}), ("good.pt", {})):
        conversation(**changes).save(tmp_path / name)
    talk = conversation()
    talk.model.bfloat16()
    talk.save(tmp_path / "16.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-100])
    half = len(data) // 2
    (tmp_path / "flipped.pt").write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1:])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"run": os.system}, tmp_path / "pickle.pt")
    for name, words in (("other.pt", "another model"), ("eps.pt", "another model"), ("16.pt", "another --dtype"),
                        ("cut.pt", "damaged"), ("flipped.pt", "damaged"), ("text.pt", "damaged"), (".", "cannot read"),
                        ("list.pt", "not a conversation"), ("pickle.pt", "not a conversation"), ("gone.pt", "cannot read")):
        answers, said = turns(conversation(), monkeypatch, capsys, "hello", f"/load {tmp_path / name}", "why")
        assert len(said) == 1 and words in said[0], (name, said)
        assert (answers[0], answers[2]) == (expected[0], expected[1]), name
    # a failure while writing leaves the kept one
    before = tree(tmp_path)
    monkeypatch.setattr(sample, "flush_to_disk", lambda f: os.fdopen(99))
    files = ("good.pt", "no/where.pt", "text.pt/x")
    _, said = turns(conversation(), monkeypatch, capsys, *(f"/save {tmp_path / file}" for file in files), "/save")
    assert ["could not write" in line for line in said] == [True, True, True, False] and "name of a file" in said[3]
    assert tree(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / "link.pt").symlink_to("text.pt")        # followed, not replaced
    conversation().save(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and zipfile.is_zipfile(tmp_path / "text.pt")
    for path in (os.devnull, tmp_path):
        with pytest.raises(prepare_data.Problem, match="could not write .* not a file"):
            conversation().save(path)


def test_commands_of_a_chat(monkeypatch, capsys):
    free, _ = turns(conversation(), monkeypatch, capsys, "hello", "why")
    stop = free[0].strip("\n")[4:6]
    answers, said = turns(conversation(), monkeypatch, capsys, "/set max_new_tokens 3", "hello", "/sett x", "/set",
                          f"/set stop={stop}", "/set max_new_tokens 20", "hello", "/set temperatur 1", "/set temperature cold",
                          "/set temperature -1", "/set top_k", "/help", KeyboardInterrupt, "/set seed 5", "/set min_p=0.2")
    assert answers[1] == free[0][:3] + "\n"
    assert "max_new_tokens=3 " in said[0] and said[2] == said[0] and "unknown command /sett" in said[1]
    assert f"stop={stop} " in said[3] and "max_new_tokens=20" in said[4]
    for words, line in zip(("mean temperature?", "takes a number, not 'cold'", "need temperature >= 0", "--top_k takes"), said[5:]):
        assert words in line
    assert said[9].startswith("/reset") and "seed=5" in said[-2] and "min_p=0.2" in said[-1]
    assert len(said) == 9 + len(sample.COMMANDS.splitlines()) + 2
    # the same seed again, the same answer again
    cfg = sample.Config(max_new_tokens=9)
    answers, _ = turns(conversation(), monkeypatch, capsys, *["/set seed 5", "hello", "/reset"] * 2, cfg=cfg)
    assert answers[1] == answers[4] != free[0]


def test_ctrl_c_stops_the_answer_alone(monkeypatch, capsys):
    expected, _ = turns(conversation(), monkeypatch, capsys, "hello", "why", cfg=dataclasses.replace(GREEDY, max_new_tokens=6))
    talk, cfg = conversation(), dataclasses.replace(GREEDY, max_new_tokens=1000)
    stream = talk.model.stream

    def interrupted(*args, **more):
        for i, token in enumerate(stream(*args, **more)):
            if i == 5:
                signal.raise_signal(signal.SIGINT)
            yield token
    monkeypatch.setattr(talk.model, "stream", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    answers, said = turns(talk, monkeypatch, capsys, "hello", KeyboardInterrupt, "why", cfg=cfg)
    assert (answers[0], answers[2]) == tuple(expected[:2]) and not said and signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_a_long_text_is_read(monkeypatch, capsys):
    """What is not read yet is read with the next line."""
    monkeypatch.setattr(sample, "PART", 16)
    settings = dataclasses.replace(GREEDY, interactive=True, repetition_penalty=1.2)
    expected = conversation()
    expected.unread += expected.tokenizer.encode("some long text " * 9 + "\nwhy\n")
    expected = "".join(expected.answer(dataclasses.replace(settings, interactive=False), None))
    talk, parts = conversation(), []
    forward = talk.model.forward

    def interrupted(*args, **more):
        parts.append(args[0].shape[1])
        if len(parts) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **more)
    monkeypatch.setattr(talk.model, "forward", interrupted)
    answers, said = turns(talk, monkeypatch, capsys, "some long text " * 9, "why", cfg=settings)
    assert answers[:2] == ["\n", expected + "\n"] and not said and parts[:8] == [16] * 8 and len(parts) < 12


def test_an_alphabet_without_a_newline(monkeypatch, capsys):
    model = Mamba(MambaConfig(3, 16, 1)).eval()
    talk = sample.Conversation(model, prepare_data.CharTokenizer("abc"), [])
    answers, said = turns(talk, monkeypatch, capsys, "abcab", "abd", "")
    assert len(answers[0]) == len(answers[2]) == 21 and len(said) == 1 and "character 'd'" in said[0]


def test_an_answer_ends_with_its_text(monkeypatch):
    tokenizer, model = one_token_a_byte(), small(vocab_size=257)
    ids = tokenizer.encode("one two") + [0] + tokenizer.encode("three")
    given, made = [], torch.tensor(ids)[:, None]
    monkeypatch.setattr(model, "stream", lambda prompts, *args, **more: given.append(prompts) or iter(made))    # made: the latest
    talk = sample.Conversation(model, tokenizer, [])
    assert "".join(talk.answer(sample.Config(), None)) == "one two" and talk.unread == [0] and talk.tokens_made == 8
    assert "".join(talk.answer(sample.Config(ignore_eos=True), None)) == "one two<|endoftext|>three"
    assert "".join(talk.answer(sample.Config(stop="x|e t"), None)) == "on" and talk.unread == tokenizer.encode("t")
    assert given == [[[0]], [[0]], [ids[-1:]]] and talk.seen == {*ids}
    made = torch.tensor(tokenizer.encode("aé")[:2])[:, None]
    assert "".join(talk.answer(sample.Config(), None)) == "a"


def test_sample_stops_at_a_string(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    flags = {"out_dir": "run", "start": "abc ", "temperature": 0.0, "max_new_tokens": 60, "device": "cpu", "seed": 1}
    sample.main(sample.Config(**flags), {})
    text = capsys.readouterr().out.rstrip("\n")[4:]
    sample.main(sample.Config(**flags, stop=f"##|{text[7:10]}"), {})
    out, err = capsys.readouterr()
    end = text.index(text[7:10])
    assert out == f"abc {text[:end]}\n" and f"\n{end + 3} tokens in" in err


def by_hand(model, ids, layer):
    """delta and surprise, from one forward pass in other words."""
    with torch.no_grad():
        x = model.backbone["embedding"](ids[None])
        for i in range(layer):
            x = model.backbone["layers"][i](x)
        m, d = model.backbone["layers"][layer].mixer, model.config.d_inner
        x = m.in_proj(model.backbone["layers"][layer].norm(x))[..., :d].transpose(1, 2)
        x = F.conv1d(F.pad(x, (m.conv1d.weight.shape[2] - 1, 0)), m.conv1d.weight, m.conv1d.bias, groups=d).transpose(1, 2)
        delta = torch.log1p(torch.exp(m.dt_proj(F.silu(x) @ m.x_proj.weight[:m.dt_rank].T)))
        logp = model(ids[None])[0][0].log_softmax(-1)
        return delta[0].mean(-1), -logp[torch.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("part", [1, 7, 512])
def test_what_show_measures(monkeypatch, part):
    model, ids = small(n_layer=3).eval(), tokens(40)
    monkeypatch.setattr(sample, "PART", part)
    for layer in range(3):
        delta, surprise = by_hand(model, ids, layer)
        assert torch.allclose(torch.tensor(sample.opening(model, ids.tolist(), layer)), delta, atol=1e-6)
    first, *rest = sample.surprise(model, ids.tolist())
    assert first is None and torch.allclose(torch.tensor(rest), surprise, atol=1e-5)
    assert len(sample.opening(model, [5], 1)) == 1 and sample.surprise(model, [5]) == [None]
    assert not model.backbone["layers"][1].mixer.x_proj._forward_hooks


class Page(html.parser.HTMLParser):
    """The text in <main>, the values in title=, and whatever a page could load from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.stack, self.text, self.values, self.outside = [], "", [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.stack += [] if tag == "meta" else [tag]
        self.values += [value for name, value in attributes if name == "title"]
        self.outside += [tag] * (tag in ("script", "link", "img")) + [n for n, _ in attributes if n in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data if "main" in self.stack else ""


@pytest.mark.parametrize("what", ["delta", "loss"])
def test_show_as_html_gives_the_text_back(tmp_path, capsys, what):
    tokenizer, model = one_token_a_byte(), small(vocab_size=257).eval()
    text = "\n a <b> & \"q\" 'r' &amp; </main>\t日本🙂\r\n\r  two  spaces\n\n"
    cfg = sample.Config(show=what, html=str(tmp_path / "out.html"), start="x")
    sample.show(cfg, model, tokenizer, tokenizer.encode(text))
    page = Page((tmp_path / "out.html").read_bytes().decode())
    assert "\r" not in (tmp_path / "out.html").read_bytes().decode()
    assert page.text == text and not page.stack and not page.outside and os.listdir(tmp_path) == ["out.html"]
    assert Page("".join(sample.as_html("x", 0, 1, [("<b>&lt;", 1.0)], [1]))).text == "<b>&lt;"
    ids = torch.tensor(tokenizer.encode(text))
    delta, surprise = by_hand(model, ids, 1)
    expected = delta.tolist() if what == "delta" else [math.nan, *surprise.tolist()]
    assert len(page.values) == len(text) and len(ids) == len(text.encode())     # bytes of a character together
    smile = len(text[:text.index("🙂")].encode())
    assert abs(float(page.values[text.index("🙂")]) - sum(expected[smile:smile + 4]) / 4) < 1e-3
    assert abs(float(page.values[-1]) - expected[-1]) < 1e-3 and (page.values[0] == "") == (what == "loss")


def test_show_in_a_terminal_and_in_a_pipe(monkeypatch, capsys):
    talk, text = conversation(), "ab\n<c> é"
    ids, cfg = talk.tokenizer.encode(text), sample.Config(show="loss", start=text)
    sample.show(cfg, talk.model, talk.tokenizer, ids)
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[1] for line in listed] == [repr(c) for c in text] and listed[0].split()[0] == "-"
    assert abs(float(listed[4].split()[0]) - sample.surprise(talk.model, ids)[4]) < 1e-4
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    sample.show(cfg, talk.model, talk.tokenizer, ids)
    assert capsys.readouterr().out.splitlines() == listed
    monkeypatch.delenv("NO_COLOR")
    sample.show(cfg, talk.model, talk.tokenizer, ids)
    legend, shown = capsys.readouterr().out.split("\n", 1)
    grounds = [int(g) for g in re.findall(r"48;2;(\d+);", shown)]
    assert legend.startswith("surprise in nats: ")
    assert re.sub("\x1b\\[[0-9;]*m", "", shown) == text.replace("\n", "↵\n") + "\n"
    del grounds[3]      # a newline is painted on both lines
    values = [-1, *sample.surprise(talk.model, ids)[1:]]
    assert grounds[0] == 48 and all((grounds[i] <= grounds[j]) for i in range(8) for j in range(8) if values[i] < values[j])
    assert "\x1b" not in sample.painted("\x1b[2J", 0.3).removeprefix("\x1b[38").removesuffix("\x1b[0m")


@pytest.mark.parametrize("flags, words", [
    (["--show=gamma", "--start=abc"], ["--show takes delta or loss, not 'gamma'"]),
    (["--show=loss"], ["give it as --start"]),
    (["--show=loss", "--start=abc", "--interactive"], ["without --interactive"]),
    (["--show=loss", "--start=abc", "--layer=1"], ["--layer with --show=delta"]),
    (["--html=x.html", "--start=abc"], ["--html goes with --show"]),
    (["--show=delta", "--start=abc", "--layer=2"], ["--layer must be from 0 to 1, not 2"]),
    (["--show=delta", "--start=FILE:empty.txt"], ["empty"]),
    (["--show=delta", "--start=abc", "--html=no/where.html"], ["--html takes a file in a folder that there is, not 'no/where.html'"]),
    (["--show=delta", "--start=abc", "--html=."], ["--html takes a file"]),
    (["--show=delta", "--start=abc", f"--html={os.devnull}"], ["--html takes a file"]),
    (["--min_p=2"], ["min_p"]), (["--repetition_penalty=0"], ["repetition_penalty"]),
])
def test_bad_flags_for_show_and_sampling(finished, call, flags, words):
    (finished / "empty.txt").touch()
    before = tree(finished)
    one_line_error(call("sample.py", "--out_dir=run", "--device=cpu", *flags, cwd=finished), *words)
    assert tree(finished) == before


AWKWARD_BITS = ["a", "word", " ", "  ", "   ", " " * 7, " " * 40, "\n", "\n\n\n", "\r\n", "\r\n\r\n", "\t\t", "\x0b", "...", "'s",
                "👩‍👩‍👧", "🏳️‍🌈", "é", "e\u0301", "\u0301", "\u0323\u0301", "\u1100\u1161", "日本語", "3.14",
                "\u00a0", "\u3000", "\u200d", "\x1c", "\x85", "\ufeff", "def f(x):\n    return x\n", "<|endoftext|>", "<|padding|>", "\u212b", "\ufb01"]


def neox_like():
    """tokenizer.json with the settings of GPT-NeoX's, and its tokens for runs of spaces."""
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.normalizer, t.pre_tokenizer = tokenizers.normalizers.NFC(), level(add_prefix_space=False, trim_offsets=True)
    t.decoder = tokenizers.decoders.ByteLevel(add_prefix_space=False, trim_offsets=True)
    t.post_processor = tokenizers.processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    t.train_from_iterator([AWKWARD * 20, (ROOT / "mamba.py").read_text(encoding="utf-8")], tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False,
        initial_alphabet=level.alphabet()))
    t.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return t.to_str()


def test_neox_tokens_equal_those_of_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "t.json").write_text(neox_like(), encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"))
    tokenizer, rng = prepare_data.BPETokenizer((tmp_path / "t.json").read_text(encoding="utf-8")), random.Random(0)
    texts = [AWKWARD * 3, "word " * 9000 + "\n", (ROOT / "sample.py").read_text(encoding="utf-8").replace("\n", "\r\n"),
             *("".join(rng.choices(AWKWARD_BITS, k=400)) for _ in range(20)), *("x" + bit + "y" for bit in AWKWARD_BITS)]
    for text in texts:
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == expected
        with_nul = f"{text[:50]}\0 \0\0{text[-50:]}"
        assert tokenizer.encode(with_nul) == reference(with_nul, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(with_nul)) == unicodedata.normalize("NFC", with_nul)
        for block, piece in ((1 << 20, 1 << 15), (37, 11), (1000, 200)):
            monkeypatch.setattr(prepare_data, "BLOCK", block)
            monkeypatch.setattr(prepare_data, "PIECE", piece)
            streamed = tokenizer.encode_stream(prepare_data.read(text.encode()))
            assert [i for ids in streamed for i in ids.tolist()] == expected, (block, text[:40])


def test_bpe_of_a_large_text_is_trained_on_a_sample(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(prepare_data, "PIECE", 100)
    (tmp_path / "folder").mkdir()
    story = "".join(f"once word{i // 10} upon\n<|endoftext|>\n" for i in range(3000))
    for name in "ab":
        (tmp_path / "folder" / f"{name}.txt").write_text(story)
    cfg = prepare_data.Config(str(tmp_path / "folder"), "bpe", 400, str(tmp_path / "data"))
    prepare_data.prepare(cfg)
    assert "one in" not in capsys.readouterr().out
    read, train_bpe = [], prepare_data.BPETokenizer.train
    monkeypatch.setattr(prepare_data.BPETokenizer, "train", lambda texts, *more, **kw: train_bpe((read.append(t) or t for t in texts), *more, **kw))
    monkeypatch.setattr(prepare_data, "TRAIN_BPE_ON", 20_000)
    meta, train, val, tokenizer = opened(prepare_data.prepare(cfg))
    every = int(re.search(r"bpe: trained on one in (\d+) stretches", capsys.readouterr().out)[1])
    assert every == math.ceil(2 * len(story) * 0.9 / 20_000) and 15_000 < sum(map(len, read)) < 22_000
    places = [int(n) for n in re.findall(r"word(\d+)", "".join(read))]
    second = next(i for i in range(1, len(places)) if places[i] < places[i - 1])    # where the other file begins
    assert all(min(part) < 10 for part in (places[:second], places[second:])) and places[second - 1] > 290 and places[-1] > 220
    # what stands between documents is one token, and no pair was spent on its spelling
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert tokenizer.end_of_text == 0 and not [t for t in vocabulary if "|>" in t and t != "<|endoftext|>"]
    assert tokenizer.decode(train) + tokenizer.decode(val) == story + "<|endoftext|>" + story and train.count(0) > 5000
    # the tokenizer travels whole in meta.json, and in the checkpoint, which takes it from there
    torch.save({"meta": meta}, tmp_path / "ckpt.pt")
    again = prepare_data.load_tokenizer(load(tmp_path / "ckpt.pt")["meta"]["tokenizer"])
    assert again.encode(story) == tokenizer.encode(story) and again.decode(again.encode(story)) == story


def test_a_checkpoint_carries_what_meta_json_says(finished):
    (folder,) = (finished / "data").iterdir()
    assert load(finished / "run" / "best.pt")["meta"] == prepare_data.load_meta(folder)


# ---------------------------------------------------------------------------------------------------------------------
# scan_triton.py, on a GPU


def on_gpu(f):
    return pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(f)


def all_of_scan(inputs, method, softplus, kind):
    """{name: y, last state and the gradient of each input}, for a loss that depends on all of them."""
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y, last = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, method=method)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(kind).to(t) for t in (y, last)]     # the same numbers in every type
    return {"y": y, "last": last, **dict(zip(inputs, torch.autograd.grad((y, last), list(inputs.values()), weights)))}


def check_triton(inputs, softplus=True, device="cuda"):
    """Against float64, no result is further off than twice a float32 scan whose results are rounded to u's type, or 1e-5.
    The gradient of delta_bias is a sum that may cancel, so its error is measured against what it is a sum of."""
    kind = inputs["u"].dtype
    inputs = {k: v.abs() if not softplus and k in ("delta", "delta_bias") else v for k, v in inputs.items()}
    inputs = {k: v.to(device) for k, v in inputs.items()}
    exact = all_of_scan({k: v.double() for k, v in inputs.items()}, "sequential", softplus, kind)
    plain = all_of_scan({k: v.float() for k, v in inputs.items()}, "sequential", softplus, kind)
    ours, again = (all_of_scan(inputs, "triton", softplus, kind) for _ in range(2))
    scales = {"delta_bias": exact["delta"].abs().sum((0, 1)).norm().item()}
    for name, expected in exact.items():
        scale = scales.get(name, 0)
        error, allowed = (relative(t, expected, scale) for t in (ours[name], plain[name].to(kind)))
        assert error <= 2 * allowed + 1e-5, (name, error, allowed)
        assert torch.equal(ours[name], again[name]), f"{name} is not the same bits again"


def test_triton_that_cannot_run_is_an_error():
    inputs = {k: v.detach() for k, v in scan_inputs(2, 8, 5, 4).items()}
    with pytest.raises(ValueError, match="needs CUDA"):
        selective_scan(**inputs, method="triton")
    assert mamba.scan_method("auto", torch.zeros(1), 16) == "chunked"


INTERPRETED = """
import numpy as np
import sys, types
import triton, triton.language as tl
import triton.experimental.gluon as gluon, triton.experimental.gluon.language.nvidia.ampere as ampere
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

# Gluon's functions are those of triton.language with a layout more, so Triton's interpreter can run them; shared memory is
# an array, a copy is made at once, and what is PTX in scan_triton.py is written out here
gl = types.ModuleType("gl")
gl.__getattr__ = lambda name: getattr(tl, name)     # at the time of the call: the interpreter replaces them
gl.BlockedLayout = gl.SliceLayout = gl.SwizzledSharedLayout = lambda *args: None
gl.arange = lambda start, end, layout: tl.arange(start, end)
gl.full = lambda shape, value, dtype, layout: tl.full([int(n) for n in shape], value, dtype)
gl.zeros = lambda shape, dtype, layout: tl.zeros([int(n) for n in shape], dtype)
gl.convert_layout = lambda x, layout: x
gl.barrier = lambda: None

class Shared:
    def __init__(self, data, dtype): self.data, self.dtype = data, dtype
    def index(self, i): return Shared(self.data[int(i.handle.data.item() if hasattr(i, "handle") else i)], self.dtype)
    def store(self, x): self.data[...] = x.handle.data
    def load(self, layout): return tl.tensor(TensorHandle(self.data.copy(), self.dtype), tl.block_type(self.dtype, list(self.data.shape)))
    @staticmethod
    def reinterpret(shared, dtype, shape, layout): return Shared(shared.data.reshape([int(n) for n in shape]), dtype)

gl.shared_memory_descriptor = Shared
gl.allocate_shared_memory = lambda dtype, shape, layout: Shared(np.full([int(n) for n in shape], 77, _get_np_dtype(dtype)), dtype)
ampere.async_copy = types.SimpleNamespace(
    async_load=lambda shared, pointer, mask: shared.store(tl.load(pointer, mask, other=0)), commit_group=lambda: None, wait_group=lambda n: None)
gluon.jit, gluon.language = triton.jit, gl

import mamba, scan_triton, test_mamba

def over_channels(p, q, row, EXACT):
    sums = np.stack([t.handle.data for t in (*p, *q)]).reshape(2, 8, 4, -1, 8).sum(-1)       # (p or q, step, segment, warp)
    s, d = np.arange(4)[:, None], np.arange(32)[None]
    picked = (sums[d % 4 // 2, d % 2 * 4 + d % 8 // 4 * 2 + i, s, d // 8] for i in range(2))
    return tuple(tl.tensor(TensorHandle(x, tl.float32), p[0].type) for x in picked)

scan_triton._over_channels, scan_triton._reciprocal = over_channels, lambda x: 1 / x
scan_triton.gather, scan_triton.tl = lambda *args: tl.gather(*args), tl
mamba.scan_method = lambda method, u, d_state: method       # it would refuse a CPU
scan_triton.SHORTEST = 1
for scan_triton.FILL, scan_triton.FILL_BACK, *shape in ((1, 1, 1, 1, 1, 1), (1, 1, 2, 66, 5, 3), (100, 100, 1, 66, 10, 17),
                                                        (16, 12, 1, 200, 40, 9), (12, 16, 1, 200, 40, 9)):
    inputs = test_mamba.scan_inputs(*shape)
    inputs["A"].data[:, 4:8] *= 30      # of a chunk of two tiles nearly all is forgotten,
    inputs["A"].data[:, 8:] *= 300      # and all: the other tile is passed over
    test_mamba.check_triton(inputs, device="cpu")
test_mamba.check_triton(test_mamba.scan_inputs(1, 65, 3, 4, ("z",)), softplus=False, device="cpu")
for shape in ((1, 1, 3, 4), (2, 35, 131, 4), (1, 17, 5, 1), (1, 33, 5, 2)):
    test_mamba.check_conv(*shape, device="cpu")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA runs the kernels themselves")
def test_triton_equals_float64_in_its_interpreter():
    pytest.importorskip("triton", minversion="3.7")     # the interpreter of 3.6 fails with NumPy 2.4
    subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], check=True, cwd=ROOT,
                   env={**os.environ, "TRITON_INTERPRET": "1"})


@on_gpu
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_float64(length, dtype):
    for batch, d_inner, d_state in ((1, 1, 1), (2, 5, 3), (3, 33, 16), (2, 100, 16), (1, 40, 64), (1, 7, 256)):
        check_triton(scan_inputs(batch, length, d_inner, d_state, dtype=dtype))


def check_conv(batch, length, d_inner, width, dtype=torch.float32, device="cuda"):
    """The fused convolution and its silu against float64: of a view, with and without bias and state, gradients included."""
    wide, gy = (torch.randn(batch, length, n, device=device).to(dtype) for n in (2 * d_inner, d_inner))
    weight, bias = torch.randn(d_inner, 1, width, device=device), torch.randn(d_inner, device=device)
    state, limit = torch.randn(batch, width - 1, d_inner, device=device).to(dtype), 2e-6 if dtype == torch.float32 else 1e-2
    for options in ((), ("bias",), ("bias", "state")):
        results = []
        for kind in (None, torch.float64):
            x, w, b, s = (t.detach().to(kind or t.dtype).requires_grad_() for t in (wide, weight, bias, state))
            given = [t if name in options else None for name, t in (("bias", b), ("state", s))]
            if kind is None:
                y = mamba._scan_triton.conv_silu_triton(x[..., d_inner:], w, *given)
                with torch.no_grad():
                    assert torch.equal(mamba._scan_triton.conv_silu_triton(x[..., d_inner:], w, *given), y)
            else:
                y = F.silu(mamba.causal_conv(x[..., d_inner:], w, *given)[0])
            grads = torch.autograd.grad(y, [x, w, *(t for t in given if t is not None and t.numel() > 0)], gy.to(y.dtype))
            results.append([y, *grads])
        for ours, exact in zip(*results):
            assert (ours - exact).norm() <= limit * exact.norm(), (options, relative(ours, exact))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_conv_equals_float64(dtype):
    for shape in ((1, 1, 3, 4), (2, 35, 131, 4), (1, 17, 5, 1), (3, 1031, 64, 2), (2, 200, 256, 7)):
        check_conv(*shape, dtype=dtype)


@on_gpu
@pytest.mark.parametrize("softplus", [False, True])
def test_triton_options(softplus):
    for count in range(len(OPTIONS) + 1):
        for options in itertools.combinations(OPTIONS, count):
            check_triton(scan_inputs(3, 130, 33, 4, options), softplus)


@on_gpu
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 100.0])
def test_triton_extreme_decay(size):
    """Where a state is gone within a step, A's gradient is the rounding of far larger terms: only bounded, not exact."""
    inputs = {k: v.detach().cuda() for k, v in scan_inputs(2, 200, 33, 16).items() if k != "delta_bias"}
    inputs["delta"] = torch.rand_like(inputs["delta"]) * size
    results = all_of_scan(inputs, "triton", False, torch.float32)
    exact = all_of_scan({k: v.double() for k, v in inputs.items()}, "sequential", False, torch.float32)
    scale = exact["u"].norm() * max(size, 1.0)
    for name, expected in exact.items():
        assert (results[name] - expected).norm() <= 1e-5 * max(expected.norm(), scale if name in ("A", "delta") else 0), name


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_forgets_only_what_is_forgotten(dtype):
    """Chunks of which some numbers of the states remember all, some the last few steps, in any order."""
    inputs = {k: v.detach() for k, v in scan_inputs(2, 8000, 70, 20, ("D", "z", "state"), dtype).items()}
    inputs["delta"] = torch.exp(torch.rand_like(inputs["delta"]) * 4.6 - 6.9)
    g = torch.Generator().manual_seed(0)
    inputs["A"] = -torch.exp(torch.rand(inputs["A"].shape, generator=g) * 5 - 1)
    inputs["A"][3, 5:9], inputs["A"][50:, 17], inputs["A"][60] = -1e-3, 0, -30
    check_triton({k: v.requires_grad_() for k, v in inputs.items()}, softplus=False)


@on_gpu
def test_triton_takes_views_and_any_split():
    inputs = {k: v.detach().cuda() for k, v in scan_inputs(2, 300, 40, 16).items()}
    wide = torch.cat([inputs["u"], inputs["z"]], -1)
    u, z = wide.chunk(2, -1)
    settings = {"delta_softplus": True, "return_last_state": True, "method": "triton"}
    whole, last = selective_scan(**{**inputs, "u": u, "z": z}, **settings)
    state, ys = inputs["state"], []
    for k in range(0, 300, 77):
        part = {n: v[:, k:k + 77] if n in ("u", "delta", "B", "C", "z") else v for n, v in inputs.items()}
        y, state = selective_scan(**{**part, "state": state}, **settings)
        ys.append(y)
    assert relative(torch.cat(ys, 1), whole) < 1e-6 and relative(state, last) < 1e-6


@on_gpu
def test_triton_beyond_2_to_31_elements():
    length, half = 1_500_000, 1_499_000
    u = torch.randn(1, length, 1536, device="cuda", dtype=torch.bfloat16)
    A, B = -torch.rand(1536, 4, device="cuda") - 0.5, torch.randn(1, length, 4, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        whole, last = selective_scan(u, u, A, B, B, delta_softplus=True, return_last_state=True)
        _, state = selective_scan(u[:, :half], u[:, :half], A, B[:, :half], B[:, :half], delta_softplus=True, return_last_state=True)
        rest, end = selective_scan(*(t[:, half:].float() for t in (u, u)), A, *(t[:, half:].float() for t in (B, B)), state=state,
                                   delta_softplus=True, return_last_state=True, method="chunked")
    assert relative(whole[:, half:].float(), rest) < 5e-3 and relative(last, end) < 1e-5


@on_gpu
def test_triton_is_a_well_made_operator():
    inputs = {k: v.detach().cuda().requires_grad_() for k, v in scan_inputs(2, 100, 33, 16).items()}
    args = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")]
    library.opcheck(torch.ops.selective_scan.forward.default, (*args, True, True))
    x = torch.randn(2, 20, 16, device="cuda", requires_grad=True)
    others = (torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((8, 1, 4), (8,), (2, 3, 8)))
    library.opcheck(torch.ops.selective_scan.conv.default, (x[..., 8:], *others))


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_model_with_triton_equals_chunked(compiled):
    """Loss and gradients of a model in float32, and the compiled model is one graph."""
    torch.manual_seed(0)
    model = small(d_model=64, n_layer=2).cuda()
    idx = torch.randint(70, (3, 200), device="cuda")
    results = {}
    for scan in ("chunked", "triton"):
        for layer in model.backbone["layers"]:
            layer.mixer.scan = scan
        model.zero_grad()
        run = torch.compile(model, fullgraph=True) if compiled and scan == "triton" else model
        loss = run(idx, idx.roll(-1, 1))[1]
        loss.backward()
        results[scan] = torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for p in model.parameters())])
    error = relative(results["triton"], results["chunked"])
    assert error < 1e-5, error


def test_gradients_of_the_compiled_model():
    """torch 2.11 loses those of a Function whose forward pass works in place."""
    model, idx = small(), tokens(3, 20)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(idx, idx.roll(-1, 1))[1].backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(results[1], results[0]) < 1e-6


def test_loss_in_parts_equals_the_loss_at_once(monkeypatch):
    """And so do its gradients, with targets to ignore in some parts and nothing else in one."""
    model, idx = small(), tokens(3, 20)
    targets = idx.roll(-1, 1)
    targets[0, 3:] = targets[1, :9] = -1
    results = []
    for most in (2 ** 28, 7 * 72):
        monkeypatch.setattr(mamba, "LOGITS", most)
        model.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        results.append(torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for p in model.parameters())]))
    assert relative(results[1], results[0]) < 1e-6
    quantize_int8(model)        # has no gradients of the head, and a loss all the same
    monkeypatch.setattr(mamba, "LOGITS", 20 * 72)       # up to 8 rows would be multiplied by another kernel
    in_parts = model(idx, targets)[1]
    monkeypatch.undo()
    assert relative(in_parts, model(idx, targets)[1]) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# One token at a time, weights in int8


@pytest.mark.parametrize("changes", [{}, {"d_conv": 1, "conv_bias": False}, {"bias": True, "d_state": 5, "d_intermediate": 24}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_single_tokens_equal_one_call(changes, dtype):
    """The step without gradients against the path with them; both update the state that they are given, to the same."""
    model, idx = small(**changes).eval().to(dtype), tokens(3, 40)
    states = model.init_state(3), model.init_state(3)
    whole = model(idx, state=states[0])[0]
    before = [tensor.data_ptr() for tensor in tree_leaves(states[1])]
    with torch.no_grad():
        parts = [model(token, state=states[1])[0] for token in idx.split(1, 1)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative(torch.cat(parts, 1), whole) < tolerance
    for got, expected in zip(tree_leaves(states[1]), tree_leaves(states[0])):
        assert got.dtype == expected.dtype and (got.numel() == 0 or relative(got, expected) < tolerance)
    assert before == [tensor.data_ptr() for tensor in tree_leaves(states[1])]


def test_single_tokens_under_autocast():
    model, idx, results = small().eval(), tokens(2, 12), []
    for step in (12, 1):
        state = model.init_state(2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results.append(torch.cat([model(part, state=state)[0] for part in idx.split(step, 1)], 1))
        assert state[0][1].dtype == torch.float32
    assert relative(results[1], results[0]) < 3e-2


def test_one_graph_with_and_without_gradients():
    """The steps of training and of generation, traced as torch.compile does it."""
    model, idx = small().eval(), tokens(1, 5)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    states = model.init_state(1), model.init_state(1)
    with torch.no_grad():
        for token in idx.split(1, 1):
            assert relative(traced(token, state=states[0])[0], model(token, state=states[1])[0]) < 1e-6
    assert relative(states[0][2][1], states[1][2][1]) < 1e-6
    linear = mamba.Linear(4, 6)
    for x in (torch.randn(1, 4), torch.randn(3, 4)):
        assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16, 48])
def test_product_with_one_row_on_any_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for n_in, n_out, bias in ((512, 288, True), (700, 211, False), (5, 96, True)):
        linear, x = mamba.Linear(n_in, n_out, bias=bias), torch.randn(1, n_in)
        with torch.no_grad():
            y = mamba._ready(linear, 1, compile=False)(x)
        assert y.shape == (1, n_out) and relative(y, F.linear(x, linear.weight, linear.bias)) < 1e-6


@pytest.mark.parametrize("n_in", [5, 16, 24, 40, 64, 96])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 4), (3, 30)])
def test_int8_linear(n_in, rows):
    """Weights are off by half a step at most, and the product is that of the dequantised weights in bfloat16."""
    linear = torch.nn.Linear(n_in, 71)
    with torch.no_grad():
        linear.weight[3], linear.weight[4] = 0, linear.weight[4] * 100
    layer, x = mamba.Int8Linear(linear), torch.randn(*rows, n_in)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    assert layer.weight.dtype == torch.int8 and not weight[3].any()
    assert ((weight - linear.weight).abs() <= 0.501 * layer.scale[:, None]).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = layer.to(dtype)(x.to(dtype))
        assert y.dtype == dtype and y.shape == (*rows, 71)
        off = y.double() - F.linear(x.double(), weight, linear.bias.double())
        assert (off.abs() <= 0.01 * F.linear(x.double().abs(), weight.abs(), linear.bias.double().abs())).all()


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_model(tied):
    """Half of bfloat16's memory, a loss within 1 % of the trained model's, whole or token by token."""
    text = torch.tensor(list((ROOT / "mamba.py").read_text(encoding="utf-8")[:20_000].encode("ascii", "replace")))
    model = small(vocab_size=128, d_model=64, n_layer=2, tie_embeddings=tied)
    optimizer = model.configure_optimizers(3e-3)
    for x in text[:8 * 64 * 30].view(30, 8, 64):
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = text[-1001:-1][None], text[-1000:][None]
    model.eval()
    with torch.no_grad():
        loss, params = model(x, y)[1].item(), model.num_params()
        was = [m.weight.numel() for m in model.modules() if isinstance(m, mamba.Linear)]
        was_embedding = model.backbone["embedding"].weight.clone()
        assert loss < 3.5 and mamba.quantize_int8(model) is model
        assert abs(model(x, y)[1].item() / loss - 1) < 0.01
        state = model.init_state(1)
        logits = torch.cat([model(token, state=state)[0] for token in x.split(1, 1)], 1)
        assert abs(F.cross_entropy(logits[0], y[0]).item() / loss - 1) < 0.01
    layers = [m for m in model.modules() if isinstance(m, mamba.Int8Linear)]
    assert len(layers) == 2 * 3 + 1 and model.num_params() == params
    assert sum(m.weight.nbytes for m in layers) == sum(was)
    embedding = model.backbone["embedding"]
    assert (embedding.weight is model.lm_head.weight) == tied and embedding.weight.dtype == torch.int8
    assert embedding(x).dtype == torch.float32
    off = embedding(x) - was_embedding[x]
    assert 0 < off.abs().max() and (off.abs() <= 0.501 * embedding.scale[x][..., None]).all()


def test_sample_with_int8(finished, call, capsys):
    one_line_error(call("sample.py", "--out_dir=run", "--quantize=int4", cwd=finished), "--quantize takes int8, not 'int4'")
    settings = {"out_dir": "run", "device": "cpu", "start": "abc", "max_new_tokens": 20, "temperature": 0.0}
    for more in ({"quantize": "int8"}, {"quantize": "int8", "show": "delta"}, {}):
        sample.main(sample.Config(**settings, **more), settings)
        out, err = capsys.readouterr()
        assert ("int8 weights" in err) == ("quantize" in more)
        if "show" in more:
            assert len(out.splitlines()) == 3 and all(float(line.split()[0]) > 0 for line in out.splitlines())
        else:
            assert out.startswith("abc") and len(out) == 3 + 20 + 1


def test_int8_weights_are_not_saved_as_released_ones(tmp_path):
    with pytest.raises(ValueError, match="before quantize_int8"):
        mamba.quantize_int8(small()).save_pretrained(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The step of a token: made ready once, and compiled


@pytest.mark.parametrize("changes", [{"d_model": 256, "n_layer": 1}, {"bias": True, "d_conv": 1, "conv_bias": False, "d_intermediate": 24}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoder_equals_one_call(changes, dtype, batch):
    """The step that is made ready once gives the logits and the states of a single call, and updates them in place."""
    model, idx = small(**changes).eval().to(torch.float32 if dtype == torch.int8 else dtype), tokens(batch, 20)
    if dtype == torch.int8:
        mamba.quantize_int8(model)
    states = model.init_state(batch), model.init_state(batch)
    with torch.no_grad(), model._decoder(states[1]) as step:
        whole = model(idx, state=states[0])[0]
        got = [step(token) for token in idx.unbind(1)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.int8: 3e-2}[dtype]
    assert got[0].shape == whole[:, 0].shape and relative(torch.stack(got, 1), whole) < tolerance
    for one, expected in zip(tree_leaves(states[1]), tree_leaves(states[0])):
        assert one.dtype == expected.dtype and (one.numel() == 0 or relative(one, expected) < tolerance)


def awkward(changes, dtype=torch.float32, device=None):
    """A small model none of whose sizes is a power of two, with weights that are nowhere 0 or 1; int8: quantized."""
    torch.manual_seed(0)
    model = small(**{"d_model": 40, "vocab_size": 71, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = model.to(device, torch.float32 if dtype == torch.int8 else dtype)
    return mamba.quantize_int8(model) if dtype == torch.int8 else model


SHAPES = ({}, {"d_state": 5, "dt_rank": 7, "conv_bias": False, "bias": True, "d_conv": 1},
          {"d_model": 33, "d_conv": 3, "tie_embeddings": False})


@torch.no_grad()
def check_fused_step(changes, dtype, rows, device, length=20):
    """Tokens read by the kernels give the logits and states of one call in float32 of the same weights."""
    model = awkward(changes, dtype, device)
    exact = awkward(changes) if dtype == torch.int8 else awkward(changes, dtype).float()
    states, idx = (model.init_state(rows), exact.init_state(rows)), tokens(rows, length)
    whole = exact(idx, state=states[1])[0]
    step = model._step(states[0], fused=True)
    got = torch.stack([step(token).clone() for token in idx.to(device).unbind(1)], 1)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.int8: 3e-2}[dtype]
    assert got.shape == whole.shape and got.dtype == torch.float32 and relative(got.cpu(), whole) < tolerance
    for one, expected in zip(*map(tree_leaves, states)):
        assert one.numel() == 0 or relative(one.cpu(), expected) < tolerance


FUSED = """
import torch, test_mamba
for rows, dtype, shape in ((1, torch.float32, 0), (1, torch.bfloat16, 1), (1, torch.int8, 2), (3, torch.float16, 1), (3, torch.int8, 0),
                           (17, torch.float32, 2)):     # it cannot do tl.dot of bfloat16
    test_mamba.check_fused_step({"n_layer": 1, **test_mamba.SHAPES[shape]}, dtype, rows, "cpu", length=4)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA runs the kernels themselves")
def test_fused_step_in_the_interpreter_of_triton():
    pytest.importorskip("triton", minversion="3.6")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FUSED], check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})


@on_gpu
@pytest.mark.parametrize("rows, dtype, shape", [
    (1, torch.float32, 0), (1, torch.bfloat16, 1), (1, torch.int8, 2), (2, torch.int8, 0), (3, torch.float32, 1),
    (17, torch.float16, 0), (17, torch.bfloat16, 2), (40, torch.float32, 2), (100, torch.bfloat16, 1)])
def test_fused_step_equals_one_call(rows, dtype, shape):
    check_fused_step(SHAPES[shape], dtype, rows, "cuda")


@on_gpu
@pytest.mark.parametrize("kind", ["fused", "int8", "float64", "with an MLP"])
@torch.no_grad()
def test_generation_by_a_cuda_graph(kind):
    """The texts that forward gives, and the state is the caller's at the end of the stream, also where it is closed."""
    model = awkward({"d_intermediate": 24} if kind == "with an MLP" else {}, torch.int8 if kind == "int8" else torch.float32, "cuda")
    model = model.double() if kind == "float64" else model
    prompts = [tokens(n, seed=n).cuda() for n in (5, 1, 1500)]
    tolerance = {"int8": 2e-2, "float64": 1e-6}.get(kind, 1e-5)
    long = [tokens(70, seed=70).cuda()]     # parts of it are read by a graph of their own
    for some in (prompts[:1], prompts, prompts[:1], long, long):
        states = model.init_state(len(some)), model.init_state(len(some))
        plain, new = model._step(states[1]), tokens(6, len(some)).cuda()
        with model._decoder(states[0]) as step:
            for token in new:
                assert relative(step(token), plain(token)) < tolerance
        for one, other in zip(*map(tree_leaves, states)):
            assert relative(one, other) < tolerance
        texts = model.generate(some, 20, temperature=0)
        for prompt, text in zip(some, texts):
            logits = model(text[None, :-1])[0][0, len(prompt) - 1:]
            likeliest, chosen = logits.amax(-1), logits.gather(-1, text[len(prompt):, None])[:, 0]
            assert torch.equal(text[:len(prompt)], prompt) and (likeliest - chosen).max() < (0.05 if kind == "int8" else 1e-4)
    assert (model in mamba.GRAPHS) == (kind in ("fused", "int8"))
    state, whole = model.init_state(3), model.init_state(3)
    stream = model.stream(prompts, 9, state=state, temperature=0)
    read = [next(stream) for _ in range(4)]
    stream.close()
    list(model.stream(prompts, 4, state=whole, temperature=0))
    assert all(torch.equal(*pair) for pair in zip(*map(tree_leaves, (state, whole)))) and len(read) == 4


@on_gpu
def test_recorded_gradients_equal_those_launched_one_by_one(request):
    """Bit for bit, of any batch, whatever the weights have become; and with dropout that only the seed decides."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    train.repeatable()
    model = mamba.Mamba(MambaConfig(vocab_size=70, d_model=64, n_layer=2, dropout=0.2)).cuda().train()
    batches = [(tokens(40, 100, seed=s).cuda(), tokens(40, 100, seed=s + 1).cuda()) for s in range(3)]

    def gradients(x, y):
        model.zero_grad(set_to_none=True)
        return more(x, y)

    def more(x, y):
        with train.autocast(torch.device("cuda"), "bfloat16"):
            loss = model(x, y)[1]
        loss.backward()
        return loss.detach()

    def result(function, batch, seed):
        torch.manual_seed(seed)
        return [function(*batch).clone(), *(p.grad.clone() for p in model.parameters())]

    def after(first, second):
        return lambda *batch: (first(*batch), second(*batch))[1]
    held, held_more = train.replayed([gradients, more], *batches[0])
    buffers = [p.grad for p in model.parameters()]
    for batch in batches:
        assert all(map(torch.equal, result(after(held, held_more), batch, 1), result(after(gradients, more), batch, 1)))
        for p, buffer in zip(model.parameters(), buffers):
            p.grad = buffer
        recorded, again, other = (result(held, batch, seed) for seed in (1, 1, 2))
        assert all(map(torch.equal, recorded, again)) and not torch.equal(recorded[0], other[0])
        launched = result(gradients, batch, 1)
        assert all(map(torch.equal, launched, recorded))
        for p, buffer, gradient in zip(model.parameters(), buffers, launched[1:]):
            p.grad = buffer
            p.data -= 0.1 * gradient


@on_gpu
def test_a_cuda_graph_that_is_kept():
    """It is used again, by one stream at a time, sees new weights, and belongs to nobody but the model."""
    model, prompts = awkward({}, device="cuda"), [tokens(n, seed=n).cuda() for n in (5, 9)]

    def fresh(model, **more):
        return copy.deepcopy(model).generate(prompts, 12, **{"temperature": 0, **more})

    def same(texts, expected):
        return all(torch.equal(*pair) for pair in zip(texts, expected, strict=True))
    seed = lambda: torch.Generator("cuda").manual_seed(3)
    expected = fresh(model)
    assert same(model.generate(prompts, 12, temperature=0), expected)
    graph = mamba.GRAPHS[model]
    drawn = fresh(model, temperature=1, generator=seed())
    assert same(model.generate(prompts, 12, generator=seed()), drawn) and mamba.GRAPHS[model] is graph
    streams = [model.stream(prompts, 12, temperature=0) for _ in range(2)]
    for pair in zip(*streams, strict=True):
        assert torch.equal(*pair)
    assert same(model.generate(prompts, 12, temperature=0), expected)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(tokens(2, 30).cuda(), tokens(2, 30).cuda())[1].backward()
    optimizer.step()
    changed, graph = fresh(model), mamba.GRAPHS[model]
    assert same(model.generate(prompts, 12, temperature=0), changed) and mamba.GRAPHS[model] is graph
    assert not same(changed, expected)
    with torch.no_grad():
        model.backbone["layers"][0].mixer.A_log = torch.nn.Parameter(model.backbone["layers"][0].mixer.A_log * 3)
    assert same(model.generate(prompts, 12, temperature=0), fresh(model)) and mamba.GRAPHS[model] is not graph
    model.bfloat16()
    assert same(model.generate(prompts, 12, temperature=0), fresh(model))
    assert not any("raph" in key for key in (*model.state_dict(), *vars(model)))
    pickle.loads(pickle.dumps(model))
    kept = len(mamba.GRAPHS)
    del model, optimizer
    gc.collect()
    assert len(mamba.GRAPHS) < kept


def test_generated_tokens_and_states_can_be_trained_on():
    """The step runs in inference mode, what it leaves behind is not of it."""
    model, idx = small(), tokens(2, 5)
    state = model.init_state(2)
    new = torch.stack(list(model.stream(idx, 6, state=state, repetition_penalty=1.1, temperature=0)), 1)
    assert not any(t.is_inference() for t in (new, *tree_leaves(state)))
    model(new, new, state=state)[1].backward()


def unlike_eager(model, prompts, **more):
    """Rows that differ between the compiled and the plain generation."""
    rows = [model.generate(prompts, 12, generator=torch.Generator().manual_seed(1), compile=compile, **more) for compile in (0, 1)]
    return [i for i, pair in enumerate(zip(*rows)) if not torch.equal(*pair)]


@WITHOUT_COMPILER
def test_compiled_step(capsys, monkeypatch):
    monkeypatch.setattr(mamba, "_compiled", COMPILED)
    torch.compiler.reset()
    model, prompts = small().eval(), [tokens(n, seed=n) for n in (5, 1)]
    assert not unlike_eager(model, prompts[:1], temperature=0)
    assert not unlike_eager(model, prompts, stop=[7, 9], repetition_penalty=1.3, top_k=8)
    states = model.init_state(1), model.init_state(1)
    for quantize in (False, True):
        model = mamba.quantize_int8(model) if quantize else model
        with torch.no_grad(), model._decoder(states[0]) as plain, model._decoder(states[1], True) as compiled:
            for token in tokens(6, 1):
                assert relative(compiled(token), plain(token)) < (2e-2 if quantize else 1e-5)
        for one, other in zip(*map(tree_leaves, states)):
            assert relative(one, other) < (2e-2 if quantize else 1e-5)
    assert model.compiles == {1: True, 2: True}
    assert capsys.readouterr() == ("", "")


@WITHOUT_COMPILER
def test_compiled_streams_side_by_side(monkeypatch):
    """After its first token a stream does not check again which code is for it: each finds its own all the same."""
    monkeypatch.setattr(mamba, "_compiled", COMPILED)
    torch.compiler.reset()
    models = [small().eval(), small(n_layer=2).eval(), small().eval().bfloat16()]
    models[0].requires_grad_(False)
    streams = [[model.stream(tokens(rows, 3, seed=rows), 9, temperature=0, compile=compile) for model, rows in
                ((models[0], 1), (models[1], 1), (models[0], 2), (models[2], 1))] for compile in (False, True)]
    order = [0, 1, 0, 0, 2, 1, 3, 2, 0, 3, 1, 1, 2, 0, 3, 0, 2, 2, 1, 3]
    plain, compiled = ([next(some[i]).tolist() for i in order] for some in streams)
    assert plain == compiled


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    def compile(function, **options):
        def fails(*inputs):
            raise RuntimeError("no compiler\nand a long story")
        return fails
    monkeypatch.setattr(mamba, "_compiled", compile)
    assert not unlike_eager(small().eval(), tokens(2, 4))
    assert capsys.readouterr() == ("", "torch.compile does not work here (RuntimeError); going on without it\n")


# ---------------------------------------------------------------------------------------------------------------------
# Products of many rows


@pytest.mark.parametrize("rows", [(512,), (2, 300), (1, 1, 1000), (511,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_many_rows_by_convolution(rows, bias, monkeypatch):
    monkeypatch.setattr(mamba, "MKL_IS_SLOW", True)     # as on an AMD CPU
    called, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *inputs: called.append(1) or conv2d(*inputs))
    torch.manual_seed(0)
    wide, weight, b = torch.randn(*rows, 48), torch.randn(30, 16), torch.randn(30) if bias else None
    inputs = [t.requires_grad_() for t in (wide, weight, b) if t is not None]
    results = []
    for function, dtype in ((mamba.linear, torch.float32), (F.linear, torch.float64)):
        x, w, *rest = (t.to(dtype) for t in inputs)
        y = function(x[..., 8:24], w, *rest)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    assert len(called) == (math.prod(rows) >= 512)
    for got, expected in zip(*results):
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):     # its type is for F.linear to choose
        assert mamba.linear(wide[..., 8:24], weight, b).dtype == torch.bfloat16
    assert len(called) == (math.prod(rows) >= 512)


# ---------------------------------------------------------------------------------------------------------------------
# Rough edges: Ctrl-C at any time, pipes, torchrun, two runs in one folder, text without spaces


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported(tmp_path, name):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, str(ROOT / name)], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT    # 130 in a shell


def test_a_pipe_that_nobody_reads(work, corpus):
    """As in `| head -1`: no word on stderr, and a training run is saved so that the same command goes on exactly."""
    def head(name, *flags):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        process = subprocess.Popen([sys.executable, str(ROOT / name), *flags], cwd=work, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, env=env)
        for line in process.stdout if name != "prepare_data.py" else ():     # that prints all it has to say at its end
            if name == "sample.py" or line.startswith("step 0"):            # training has begun
                break
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) == 141, err
        return err
    assert head("train.py", *TINY) == "" and load(work / "run" / "ckpt.pt")["step"] < 150
    succeeded(script("train.py", *TINY, cwd=work))
    assert_same_run(work, corpus / "finished")
    assert head("sample.py", "--out_dir=run", "--device=cpu", "--max_new_tokens=3000").count("\n") == 1     # the model
    assert head("prepare_data.py", "--dataset=words.txt") == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_ctrl_c_in_a_pipeline(work):
    """`train.py | tee log`: tee goes first, so that even the message about stopping finds nobody."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY, "--eval_interval=900", "--max_iters=900"],
                               cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(work, 10)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == "" and process.wait(60) == 130
    process.stderr.close()
    assert load(work / "run" / "ckpt.pt")["step"] == steps_done(work) >= 10


def test_one_process_of_a_machine_tells(tmp_path, call, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    for local, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local)
        result = call("train.py", "--bach_size=3", cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == lines
        monkeypatch.setattr(sys, "argv", ["train.py"])
        for error, told in ((RuntimeError("Connection closed by peer"), lines), (KeyboardInterrupt(), lines),
                            (MemoryError(), 1), (OSError(28, "No space left on device"), 1)):
            with pytest.raises(SystemExit):
                prepare_data.run(lambda *_, error=error: (_ for _ in ()).throw(error), train.Config)
            assert capsys.readouterr().err.count("\n") == told, error


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_torchrun_tells_once_and_saves(work):
    """Data that one process finds bad ends all of them; Ctrl-C reaches all, and one saves and says how to go on."""
    (work / "short.txt").write_text("only a few characters\n" * 5)
    flags = ["--nproc_per_node=2", f"--master_port={random.randint(20000, 40000)}", str(ROOT / "train.py"), *TINY]
    start = functools.partial(subprocess.Popen, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", "torch.distributed.run", *flags]
    output = start([*command, "--dataset=short.txt"]).communicate(timeout=120)[0]
    assert output.count("\ntrain.py: ") + output.startswith("train.py: ") == 1 and "[rank" not in output, output
    assert "too few for --block_size=64" in output and not (work / "run").exists()
    process = start([*command, "--eval_interval=10000", "--max_iters=10000", "--compile=False"])
    wait_for_step(work, 5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert output.count("the same command goes on from there") == 1 and "[rank" not in output, output
    assert load(work / "run" / "ckpt.pt")["step"] == steps_done(work)


def test_two_runs_in_one_folder(finished, monkeypatch, capsys):
    before = tree(finished)     # not inside: where a process closes a file, its locks on it are gone
    with train.lock(finished / "run"):
        one_line_error(script("train.py", *TINY, "--init_from=scratch", cwd=finished), "another run is training in run")
        monkeypatch.chdir(finished)
        flags = {"out_dir": "run", "dataset": "words.txt", "device": "cpu", "eval_only": True}
        train.main(train.Config(**flags), flags)    # reads alone
        assert "step 150: val loss" in capsys.readouterr().out
    assert tree(finished) == before
    (finished / "new").mkdir()
    with train.lock(finished / "new"):  # by a run that has not saved anything yet
        one_line_error(script("train.py", *TINY, "--out_dir=new", cwd=finished), "another run is training in new")
        assert os.listdir(finished / "new") == ["lock"]
    if os.name == "posix":  # a file system without locks
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
        train.lock(finished / "run").close()
        assert "cannot lock" in capsys.readouterr().out


def test_without_cuda_graphs_one_line_says_so(work):
    code = """if True:
        import train
        def replayed(calls, x, y):
            calls[0](x, y)
            raise RuntimeError("operation not permitted")
        train.replayed, train.pick_scan = replayed, lambda *settings: "triton"
        train.run(train.main, train.Config)"""
    flags = [*TINY, "--max_iters=3"]
    run = functools.partial(subprocess.run, cwd=work, capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
    output = run([sys.executable, "-c", code, *flags, "--out_dir=eager"]).stdout
    assert "a CUDA graph does not work here (RuntimeError); going on without it\n" in output
    run([sys.executable, str(ROOT / "train.py"), *flags, "--out_dir=usual"])
    eager, usual = (load(work / name / "ckpt.pt")["model"] for name in ("eager", "usual"))
    assert all(torch.equal(eager[k], usual[k]) for k in usual)


def test_ordinary_text_trains_the_same_bpe_as_without_precautions():
    tokenizers = pytest.importorskip("tokenizers")
    from pydoc_data.topics import topics
    text = "\n\n".join(topics[key] for key in sorted(topics))[:200_000] + AWKWARD
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    plain.pre_tokenizer = level(add_prefix_space=False)
    plain.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=level.alphabet()))
    pieces, n = prepare_data.pieces_to_learn_from([(text.encode(), 0, math.inf)], 1, prepare_data.progress(0, ""))
    assert n == 1 and len(pieces) > 5 and "".join(pieces) == text
    model = json.loads(prepare_data.BPETokenizer.train(pieces, 1000).to_dict()["json"])["model"]
    assert model == json.loads(plain.to_str())["model"] and len(model["merges"]) > 700


def test_bpe_learns_from_few_enough_different_words(monkeypatch):
    monkeypatch.setattr(prepare_data, "DIFFERENT", 3000)
    rng = random.Random(0)
    for text, thinned in (("the same words again and again " * 20_000, False),
                          ("".join(rng.choices("abcdefgh", k=600_000)), True),
                          (" ".join(str(rng.random()) for _ in range(30_000)), True)):
        monkeypatch.setattr(prepare_data, "PIECE", 200)
        monkeypatch.setattr(prepare_data, "LONGEST", 400)
        part = (text.encode(), 0, math.inf)
        pieces, n = prepare_data.pieces_to_learn_from([part], 3, prepare_data.progress(0, ""))
        assert pieces == list(prepare_data.cut_between_words(prepare_data.read(*part)))[::n] and (n > 3) == thinned
        words = set(re.findall(r"[a-z]+|\d+|\.", " ".join(pieces)))
        assert sum(map(len, words)) <= 3000 and (not thinned or sum(map(len, words)) > 1000), n


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_bpe_without_spaces(tmp_path):
    pytest.importorskip("tokenizers")
    letters = random.Random(0).choices("".join(map(chr, range(0x4e00, 0x4e00 + 500))), k=4_000_000)     # 12 MB of UTF-8
    (tmp_path / "t.txt").write_text("".join(letters), encoding="utf-8")
    result = subprocess.run([sys.executable, "-c", PREPARE_PEAK.format(root=str(ROOT)), "t.txt", "bpe"], cwd=tmp_path,
                            capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 600 * 1024, result.stdout


@pytest.mark.parametrize("name, flags, words", [
    ("train.py", ["novel.txt"], ["flags are written --name=value, as --dataset=novel.txt"]),
    ("train.py", ["--tokenizer=bpe"], ["unknown flag --tokenizer; --help"]),
    ("sample.py", ["--out_dir=run/best.pt"], ["takes the folder of a run, run, not a file"]),
])
def test_words_for_a_newcomer(finished, call, name, flags, words):
    one_line_error(call(name, *flags, cwd=finished), *words)


def test_flags_and_files_that_were_passed_over(tmp_path):
    (tmp_path / "good.txt").write_text("good enough " * 9)
    one_line_error(prep("--dataset=good.txt", "--vocab_size=300", cwd=tmp_path), "--vocab_size goes with --tokenizer=bpe")
    (tmp_path / "bom.txt").write_bytes("\ufeffabc".encode())
    assert sample.prompt_of(f"FILE:{tmp_path / 'bom.txt'}") == "abc"
