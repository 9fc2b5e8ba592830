"""
The tests: python -m pytest. They need no network and no data but what they make.

Numbers are compared with a float64 loop written here, with transformers' Mamba and with mambapy; training and resuming
run as real processes with real signals; downloads come from a small server here that can also misbehave.
"""
from __future__ import annotations

import collections
import csv
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mamba
from mamba import Mamba, MambaBlock, MambaConfig, selective_scan

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


def check_scan(inputs, method, softplus=True, tolerance=1e-5):
    """Outputs and all gradients against loop64, relative to the norm of each."""
    if not softplus:    # a negative step would let the state grow without bound
        inputs = {k: v.detach().abs().requires_grad_() if k in ("delta", "delta_bias") else v for k, v in inputs.items()}
    y, last = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, method=method)
    expected, expected_last = loop64(**inputs, delta_softplus=softplus)
    assert y.dtype == inputs["u"].dtype and last.dtype in (torch.float32, torch.float64)
    errors = {"y": relative(y, expected), "last_state": relative(last, expected_last)}
    got, reference = gradients(y, last, inputs), gradients(expected, expected_last, inputs)
    # the gradient of delta_bias is a sum of delta's, which may cancel: its error is as large as that of its terms
    scales = {"delta_bias": reference["delta"].norm().item()}
    errors.update({f"d{name}": relative(got[name], reference[name], scales.get(name, 0)) for name in inputs})
    bad = {name: error for name, error in errors.items() if not error < tolerance}
    assert not bad, bad


@pytest.mark.parametrize("method", ["sequential", "chunked"])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_float64(length, method):
    rng = random.Random(length)
    for batch, d_inner, d_state in itertools.product(BATCHES, WIDTHS, STATES):
        check_scan(scan_inputs(batch, length, d_inner, d_state), method)
        some = [name for name in OPTIONS if rng.random() < 0.5]
        check_scan(scan_inputs(batch, length, d_inner, d_state, some), method, softplus=rng.random() < 0.5)


@pytest.mark.parametrize("method", ["sequential", "chunked"])
@pytest.mark.parametrize("softplus", [False, True])
def test_scan_options(method, softplus):
    for count in range(len(OPTIONS) + 1):
        for options in itertools.combinations(OPTIONS, count):
            check_scan(scan_inputs(3, 65, 5, 4, options), method, softplus)


@pytest.mark.parametrize("tile, tiles", [(8, 1), (8, 2), (3, 4), (1, 1)])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 31, 47])
def test_scan_tiles(monkeypatch, length, tile, tiles):
    """Every way in which a sequence can end inside or at the end of a tile and of a stretch."""
    monkeypatch.setattr(mamba, "_tile", lambda u, d_state: min(u.shape[1], tile))
    monkeypatch.setattr(mamba, "TILES_PER_STRETCH", tiles)
    check_scan(scan_inputs(2, length, 5, 4), "chunked")


def test_scan_over_several_stretches():
    check_scan(scan_inputs(1, 2500, 3, 4), "chunked")


@pytest.mark.parametrize("method", ["sequential", "chunked"])
@pytest.mark.parametrize("length", [1, 2, 9, 17])
def test_scan_gradcheck(monkeypatch, method, length):
    monkeypatch.setattr(mamba, "_tile", lambda u, d_state: min(u.shape[1], 4))
    monkeypatch.setattr(mamba, "TILES_PER_STRETCH", 2)
    inputs = scan_inputs(2, length, 3, 2, dtype=torch.float64)

    def scan(*values):
        return selective_scan(**dict(zip(inputs, values)), delta_softplus=True, return_last_state=True, method=method)
    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("method", ["sequential", "chunked"])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 100.0, 1000.0])
def test_scan_extreme_decay(method, size):
    """delta A from 0 (nothing is forgotten) to -1000 (everything is, at once)."""
    for length in (9, 257):
        inputs = scan_inputs(2, length, 5, 4)
        inputs["delta"] = (torch.rand(2, length, 5, generator=torch.Generator().manual_seed(2)) * size).requires_grad_()
        inputs["A"] = (-torch.ones(5, 4)).requires_grad_()
        inputs.pop("delta_bias")
        check_scan(inputs, method, softplus=False)


@pytest.mark.parametrize("method", ["sequential", "chunked"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_scan_16_bit_inputs(method, dtype, tolerance):
    """float32 inside: the only error is the rounding of what comes out. The state stays float32."""
    inputs = scan_inputs(3, 257, 5, 16)
    exact = ("A", "D", "delta_bias", "state")
    inputs = {k: v.detach().to(torch.float32 if k in exact else dtype).requires_grad_() for k, v in inputs.items()}
    check_scan(inputs, method, tolerance=tolerance)
    y, last = selective_scan(**inputs, return_last_state=True, method=method)
    assert y.dtype == dtype and last.dtype == torch.float32


@pytest.mark.parametrize("method", ["sequential", "chunked"])
def test_scan_under_autocast(method):
    inputs = scan_inputs(2, 65, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        check_scan(inputs, method)


@pytest.mark.parametrize("method", ["sequential", "chunked", "auto"])
def test_scan_of_any_split(method):
    """Outputs, last state and gradients of a sequence do not depend on how it is cut, with the state carried over."""
    rng = random.Random(0)
    inputs = scan_inputs(2, 130, 5, 4)
    settings = {"delta_softplus": True, "return_last_state": True, "method": method}
    whole = selective_scan(**inputs, **settings)
    expected = gradients(*whole, inputs)
    for cuts in [(1,), (129,), (64, 65)] + [sorted(rng.sample(range(1, 130), 3)) for _ in range(4)]:
        ys, state = [], inputs["state"]
        for start, end in zip((0, *cuts), (*cuts, 130)):
            part = {k: v[:, start:end] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
            y, state = selective_scan(**{**part, "state": state}, **settings)
            ys.append(y)
        y = torch.cat(ys, 1)
        assert relative(y, whole[0]) < 1e-6 and relative(state, whole[1]) < 1e-6
        got = gradients(y, state, inputs)
        for name in inputs:
            assert relative(got[name], expected[name]) < 1e-5, (cuts, name)


def test_scan_of_views():
    """Inputs that are not contiguous, as chunk(), split() and expand() give them."""
    wide = {k: v.detach() for k, v in scan_inputs(3, 33, 10, 8).items()}
    inputs = scan_inputs(3, 33, 5, 4)
    views = {**inputs, "u": wide["u"].chunk(2, -1)[1], "z": wide["z"].chunk(2, -1)[0], "B": wide["B"].split(4, -1)[1],
             "C": wide["C"][:, :, ::2], "delta": wide["delta"][:, :, :1].expand(3, 33, 5), "A": wide["A"].t()[:5, :4]}
    check_scan({k: v.detach().requires_grad_() for k, v in views.items()}, "chunked")


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
        assert torch.equal(model(idx, num_last_tokens=3)[0], full[:, -3:])


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
