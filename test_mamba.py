"""
The tests: python -m pytest. They need no network and no data but what they make.

Numbers are compared with a float64 loop written here, with transformers' Mamba and with mambapy; training and resuming
run as real processes with real signals; downloads come from a small server here that can also misbehave.
-m "not fast" leaves out what tests mamba_fast/; where that folder was deleted, those tests are skipped.
"""
from __future__ import annotations

import os

# All is small here: several threads would mostly wait for each other. The scripts that are started inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ast
import collections
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import html.parser
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import typing
import unicodedata
import weakref
import xml.etree.ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import bench
import bench_compare
import common
import mamba
import mamba2
import prepare_data
import runs
import sample
import show
import texts
import train
from mamba import Mamba, MambaBlock, MambaConfig, MambaState, selective_scan
from mamba2 import GatedRMSNorm, Mamba2Block, Mamba2Config, of_heads, ssd
from mamba3 import Mamba3Block, Mamba3Config, turned
from mamba3 import angles_since as sums_of_angles
from mamba_files import read_whole
from tokens import (
    BPETokenizer,
    CharTokenizer,
    cut_between_words,
    load_tokenizer,
    open_tokenizer,
    pieces_to_learn_from,
)

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# What the tests share


def fast(test):
    """A test of mamba_fast/."""
    return pytest.mark.fast(pytest.mark.skipif(mamba.fast is None, reason="mamba_fast/ was deleted")(test))


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def on_gpu(test):
    return NEEDS_CUDA(fast(test))


WITHOUT_COMPILER = pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
                                      reason="no C++ compiler")


def in_cpp(test):
    return WITHOUT_COMPILER(fast(test))


def small(**changes):
    torch.manual_seed(0)
    return Mamba(MambaConfig(**{"vocab_size": 70, "d_model": 32, "n_layer": 3, **changes}))


def lively(**changes):
    """A model whose every weight matters."""
    model = small(**changes).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else nn.init.uniform_(p, -2, 0.5)
    return model


def tokens(*shape, vocab=70, seed=0):
    return at_random(torch.randint, vocab, shape, seed=seed)


def at_random(draw, *args, seed=0):
    """The same numbers on every device."""
    return draw(*args, generator=torch.Generator().manual_seed(seed), device="cpu").to(torch.empty(0).device)


def on(device):
    """What is made within it, without a word of where, is on this device."""
    torch.set_default_device(device if device != "cpu" else None)
    yield device
    torch.set_default_device(None)


TRITON = pytest.param("triton", marks=NEEDS_CUDA)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def anywhere(request):
    yield from on(request.param)


@pytest.fixture(params=["sequential", "chunked", TRITON])
def scan(request):
    """Each method, where it runs."""
    for _ in on("cuda" if request.param == "triton" else "cpu"):
        yield request.param


@pytest.fixture(params=["mamba", "mamba2", *(pytest.param(name, marks=pytest.mark.long) for name in ("mamba3", "mamba3, MIMO"))])
def layer(request, monkeypatch):
    """Each kind of layer: within a test MambaBlock, MambaConfig and what a model is made of are those of this kind."""
    if request.param != "mamba":
        kind, mimo = request.param[:6], {"mimo_rank": 3} if "MIMO" in request.param else {}
        defaults, config = {"layer": kind, "headdim": 8, "d_state": 16, "chunk_size": 8, **mimo}, MambaConfig
        absent, even = type(MambaConfig(layer=kind)).absent, lambda name, n: n // 2 * 2 if name == "d_state" else n     # as Mamba-3 needs it
        known = lambda options: {k: even(k, v) for k, v in options.items() if k not in absent}
        monkeypatch.setitem(globals(), "MambaBlock", type(MambaConfig(layer=kind)).block)
        monkeypatch.setitem(globals(), "MambaConfig", lambda **options: config(**{**defaults, **known(options)}))
    return request.param


OF_EACH_LAYER = pytest.mark.usefixtures("layer")


def relative(x, reference, scale=0.0):
    """Error over the size of the reference; what is smaller than 1e-12 counts as 0."""
    return (x.double() - reference.double()).norm().item() / max(reference.double().norm().item(), scale, 1e-12)


def same(one, other, tolerance=None):
    """Whether two states, or other trees of tensors, have the same numbers, to the bit or to a relative error."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return all(torch.equal(a, b) if tolerance is None else relative(a, b) < tolerance for a, b in pairs if a.numel() > 0)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def load(path):
    return torch.load(path, weights_only=True)


class Recorder(TorchDispatchMode):
    """Every operator called, the types of all its tensors, and the most bytes that tensors made inside owned at a time."""

    def __init__(self):
        super().__init__()
        self.operators, self.dtypes, self.bytes, self.most_bytes, self._known = set(), set(), 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mamba_py":        # an operator of ours: what it calls is of interest
            with self:
                result = getattr(mamba, func.name().partition("::")[2])._init_fn(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.operators.add(func.name().removeprefix("aten::"))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.dtypes |= {t.dtype for t in given + made}
        there = {t.untyped_storage()._cdata for t in given} | self._known
        for storage in (t.untyped_storage() for t in made if not t.is_meta):
            if storage._cdata not in there:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most_bytes = max(self.most_bytes, self.bytes)
        return result

    def _gone(self, storage, size):
        self._known.discard(storage)
        self.bytes -= size


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


# files of released weights

NAME = "state-spaces/mamba-tiny"


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
        part = {key: nn.Parameter(weights[key]) for key in keys}
        if suffix == "bin":
            torch.save(part, data := io.BytesIO())
            files[name] = data.getvalue()
        else:
            files[name] = pytest.importorskip("safetensors.torch").save(part, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        files[f"{kind}.index.json"] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return {"config.json": json.dumps(config).encode(), **files}


# downloads, from a server on this machine

BODY = bytes(random.Random(1).choices(b"abcdefghij klmnopqrstuvwxyz\n", k=300_000))
SHA = hashlib.sha256(BODY).hexdigest()
ON_HUB = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/(\w+)/(.+)")


class Server(http.server.ThreadingHTTPServer):
    """
    Answers /<behaviour>/anything with BODY: plain, norange (knows no Range), toolong (promises more than it sends), missing.
    As Hugging Face (see the fixture hub) it has what is in .files, by the path /owner/name/resolve/main/file.
    .drops: answers that it still breaks off.  .statuses: {owner/name: the status that it has instead}.
    .log: (path, Range, Authorization) of each request.
    """
    daemon_threads = True

    def __init__(self):
        self.log, self.drops, self.files, self.statuses = [], 0, {}, {}
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def offer(self, files, name=NAME):
        self.files.update({f"/{name}/resolve/main/{file}": data for file, data in files.items()})

    def commit(self, repository):
        files = sorted(item for item in self.files.items() if item[0].startswith(f"/{repository}/resolve/"))
        return hashlib.sha1(repr(files).encode()).hexdigest() if files else None

    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        behaviour = self.path.split("/")[1]
        if behaviour == "api":      # huggingface_hub asks for more than files
            return self.send_error(404)
        server.log.append((self.path, wanted, self.headers.get("Authorization")))
        start, status, headers, body = 0, 200, {}, server.files.get(self.path, BODY)
        if on_hub := ON_HUB.fullmatch(self.path):
            repository, revision, file = on_hub.groups()
            commit, body = server.commit(repository), server.files.get(f"/{repository}/resolve/main/{file}", b"")
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            if repository in server.statuses:
                status = server.statuses[repository]
                headers = {"X-Error-Code": "GatedRepo"} if status == 403 else {}
            elif commit is None or revision not in ("main", commit):
                status, headers = 401, {"X-Error-Code": "RepoNotFound"}
            elif f"/{repository}/resolve/main/{file}" not in server.files:
                status, headers["X-Error-Code"] = 404, "EntryNotFound"
        elif behaviour == "missing":
            status = 404
        if wanted and status == 200 and behaviour != "norange":
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
            if start >= len(body):
                status, headers["Content-Range"] = 416, f"bytes */{len(body)}"
        data = body[start:] if status < 300 else b""
        end = len(data) if self.command == "GET" else 0
        if server.drops > 0 and end > 0:
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
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def set_hub(monkeypatch, endpoint=None, cache=None, offline=None):
    """As the variables HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE, which huggingface_hub reads once, when it is imported."""
    from huggingface_hub import constants
    if endpoint is not None:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    if cache is not None:
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    if offline is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server as Hugging Face, and a machine that has never loaded anything. hub.offer(files, name) uploads them."""
    from huggingface_hub import constants
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    set_hub(monkeypatch, server.url, tmp_path / "hub", offline=False)
    return server


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: config


@pytest.mark.parametrize("bad", [{"d_model": 0}, {"n_layer": -1}, {"d_state": 1.5}, {"vocab_size": "many"}, {"dropout": 1.0},
                                 {"dt_min": 0.2}, {"scan": "fast"}, {"dt_rank": "big"}, {"norm_eps": 0.0}, {"expand": True},
                                 {"d_intermediate": -1}, {"d_conv": 0}, {"dt_init_floor": 0.0}, {"dropout": "0.1"},
                                 {"dt_max": math.inf}, {"norm_eps": math.nan}, {"mixer_rms_eps": None}])
def test_bad_config(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MambaConfig(**bad)


KINDS = ({"layer": "mamba"}, {"layer": "mamba2", "headdim": 8, "d_state": 16, "chunk_size": 8},
         {"layer": "mamba3", "headdim": 8, "d_state": 16, "chunk_size": 8, "mimo_rank": 3})


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["layer"])
def test_configs_of_each_layer(options, monkeypatch):
    """They are copied, kept and changed as any dataclass; what a layer has not is an error, and so is a file that is not there."""
    config, layer = MambaConfig(vocab_size=70, d_model=32, n_layer=1, **options), options["layer"]
    assert type(config) is {"mamba": MambaConfig, "mamba2": Mamba2Config, "mamba3": Mamba3Config}[layer] and config.layer == layer
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config),
                  MambaConfig(**dataclasses.asdict(config)), type(config)(**dataclasses.asdict(config)),
                  MambaConfig(**json.loads(json.dumps(dataclasses.asdict(config))))):
        assert type(again) is type(config) and again == config
    assert dataclasses.replace(config, d_model=64).d_inner == 128
    assert isinstance(Mamba(config).backbone["layers"][0].mixer, type(config).block)
    for other in {MambaBlock, Mamba2Config.block, Mamba3Config.block} - {config.block}:
        with pytest.raises(ValueError, match=f"^a block of layer '{layer}' is a {config.block.__name__}$"):
            other(config)
    wrong = {"mamba": {"headdim": 8}, "mamba2": {"mimo_rank": 2, "dt_rank": 3, "mixer_rms_eps": 1e-6, "dt_limit": 3, "A_init_range": (1, 2, 3)},
             "mamba3": {"d_conv": 2, "rmsnorm": False, "dt_rank": 3}}[layer]
    for name, value in wrong.items():
        with pytest.raises((TypeError, ValueError), match=rf"^[^\n]*\b{name}\b[^\n]*$"):
            MambaConfig(**{**options, name: value})
    for other in ("Mamba2", "transformer", ["mamba2"], None):
        with pytest.raises(ValueError, match="^layer must be mamba, mamba2 or mamba3, not"):
            MambaConfig(**{**options, "layer": other})
    if layer != "mamba":
        with pytest.raises(ValueError, match=f"^layer must be {layer}"):
            type(config)(layer="mamba")
        monkeypatch.setitem(sys.modules, layer, None)
        with pytest.raises(ValueError, match=f"^layer '{layer}' needs {layer}.py beside mamba.py$"):
            MambaConfig(**options)


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: the scan

LENGTHS, STATES, BATCHES, WIDTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65, 127, 257), (1, 4, 16, 64), (1, 3), (1, 5, 64)
OPTIONS = ("D", "z", "delta_bias", "state")
PLAIN = ("sequential", "chunked")


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
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.device) for t in (y, last_state)]
    loss = (y.double() * weights[0]).sum() + (last_state.double() * weights[1]).sum()
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()))))


def check_scan(inputs, methods=PLAIN, softplus=True, tolerance=1e-5):
    """Outputs and all gradients of each method against loop64, relative to the norm of each."""
    if not softplus:    # a negative step would let the state grow without bound
        inputs = {k: v.detach().abs().requires_grad_() if k in ("delta", "delta_bias") else v for k, v in inputs.items()}
    expected, expected_last = loop64(**inputs, delta_softplus=softplus)
    reference = gradients(expected, expected_last, inputs)
    # the gradient of delta_bias is a sum of delta's, which may cancel: its error is as large as that of its terms
    scales = {"delta_bias": reference["delta"].norm().item()}
    for method in methods:
        y, last = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, method=method)
        assert y.dtype == inputs["u"].dtype and last.dtype in (torch.float32, torch.float64)
        errors = {"y": relative(y, expected), "last_state": relative(last, expected_last)}
        got = gradients(y, last, inputs)
        errors.update({f"d{name}": relative(got[name], reference[name], scales.get(name, 0)) for name in inputs})
        bad = {name: error for name, error in errors.items() if not error < tolerance}
        assert not bad, (method, bad)


@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_float64(length):
    rng = random.Random(length)
    shapes = list(itertools.product(BATCHES, WIDTHS, STATES))
    for batch, d_inner, d_state in shapes if length < 30 else rng.sample(shapes, 10 if length < 100 else 6):
        check_scan(scan_inputs(batch, length, d_inner, d_state))
        some = [name for name in OPTIONS if rng.random() < 0.5]
        check_scan(scan_inputs(batch, length, d_inner, d_state, some), softplus=rng.random() < 0.5)


@pytest.mark.parametrize("softplus", [False, True])
def test_scan_options(softplus):
    for count in range(len(OPTIONS) + 1):
        for options in itertools.combinations(OPTIONS, count):
            check_scan(scan_inputs(3, 65, 5, 4, options), softplus=softplus)


@pytest.mark.parametrize("padded", [False, True])
def test_documents_of_a_long_scan_without_gradients(padded):
    """It is done in parts of 2,048 steps: a document may begin with a part, and padding too."""
    inputs = scan_inputs(2, 4200, 3, 4)
    seq_idx = (torch.arange(4200) // 512).expand(2, -1).clone()         # begins anew at 2048 and 4096
    mask = torch.ones(2, 4200, dtype=torch.bool)
    if padded:
        mask[0, 2048:2060] = mask[1, 4090:] = False
        seq_idx[0, 2048:2060], seq_idx[1, 4096:] = 3, 9
    run = functools.partial(selective_scan, **inputs, delta_softplus=True, return_last_state=True, method="chunked", mask=mask, seq_idx=seq_idx)
    with torch.no_grad():
        in_parts = run()
    assert same(in_parts, run(), 1e-5)


@pytest.mark.parametrize("method", PLAIN)
def test_a_document_begins_with_its_first_token(method):
    """Also if seq_idx becomes another in the padding before it; and what padding has of its own says nothing."""
    mask = at_random(torch.rand, (2, 4200), seed=5) < 0.6
    mask[:, 2030:2060] = False      # where the second part of a long scan begins
    seq_idx = (torch.arange(4200) // 700 * 2).expand(2, -1).clone()
    seq_idx[:, 2040:2100] = 5       # a document that begins in this padding, and ends after it
    before = torch.where(mask, seq_idx, at_random(torch.randint, 9, (2, 4200), seed=6))
    inputs = scan_inputs(2, 4200, 3, 4, ("D", "state"))
    of_heads = ssd_inputs(2, 300, 4, 3, 2, 5)
    more = {"delta_softplus": True, "return_last_state": True, "method": method}
    scan, heads = functools.partial(selective_scan, **inputs, **more), functools.partial(ssd, **of_heads, **more)
    for run, first, last in ((scan, 0, 4200), (heads, 1950, 2250)):
        m, s = mask[:, first:last], seq_idx[:, first:last]
        y, h = run(mask=m, seq_idx=before[:, first:last])
        for row in range(2):        # each document alone
            state = run.keywords["state"][row:row + 1]
            for number in s[row, m[row]].unique_consecutive():
                at = (m[row] & (s[row] == number)).nonzero()[:, 0]
                alone = {k: t[row:row + 1, at] if t.shape[:2] == y.shape[:2] else t for k, t in run.keywords.items() if torch.is_tensor(t)}
                own, state_after = run(**{**alone, "state": state})
                assert relative(y[row:row + 1, at], own) < 1e-5
                state = torch.zeros_like(state)
            assert relative(h[row:row + 1], state_after) < 1e-5
        if run is scan:     # without gradients it is done in parts
            with torch.no_grad():
                assert same(run(mask=m, seq_idx=before[:, first:last]), (y, h), 1e-5)


@pytest.fixture
def alone(monkeypatch):
    """mamba.py as where no mamba_fast/ lies beside it."""
    monkeypatch.setattr(mamba, "fast", None)
    monkeypatch.setattr(mamba, "Linear", nn.Linear)


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 63, 5, 4), (2, 64, 5, 4), (2, 65, 5, 4), (1, 1000, 3, 4), (4, 40, 512, 16),
                                   (7, 20, 300, 15)])
def test_scan_in_tiles_equals_float64(alone, shape):
    """Every way in which a sequence can end inside or at the end of a tile of 64 steps; tiles of 16."""
    check_scan(scan_inputs(*shape), ["chunked"])


def test_scan_in_tiles_of_all_else_that_there_is(alone):
    check_the_rest("chunked")


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("length", [1, 2, 9, 65])
def test_scan_gradcheck(alone, method, length):
    check_gradients(length, method)


def check_gradients(length, method):
    inputs = scan_inputs(2, length, 3, 2, dtype=torch.float64)

    def scan(*values):
        return selective_scan(**dict(zip(inputs, values)), delta_softplus=True, return_last_state=True, method=method)
    assert torch.autograd.gradcheck(scan, tuple(inputs.values()), fast_mode=True)


def extreme_inputs(length, size):
    """delta A from 0 (nothing is forgotten) to -size (everything is, at once, if it is large)."""
    inputs = scan_inputs(2, length, 5, 4)
    inputs["delta"] = (torch.rand(2, length, 5, generator=torch.Generator().manual_seed(2)) * size).requires_grad_()
    inputs["A"] = (-torch.ones(5, 4)).requires_grad_()
    inputs.pop("delta_bias")
    return inputs


def check_documents(method, device="cpu", tolerance=1e-5):
    """Padding anywhere, and several documents in a row, give what each document gives alone: outputs, states, gradients."""
    inputs = {k: v.detach().to(device).requires_grad_() for k, v in scan_inputs(2, 150, 5, 4).items()}
    run = functools.partial(selective_scan, delta_softplus=True, return_last_state=True, method=method)
    each_step = ("u", "delta", "B", "C", "z")
    lengths = [[1, 2, 9, 40, 3, 75, 20], [64, 1, 1, 84]]
    seq_idx = torch.stack([torch.cat([torch.full((n,), i % 3) for i, n in enumerate(row)]) for row in lengths]).to(device)
    ys, lasts = [], []
    for row, row_lengths in enumerate(lengths):
        parts = []
        for i, (start, n) in enumerate(zip(itertools.accumulate([0, *row_lengths]), row_lengths)):
            one = {k: v[row:row + 1] if k in (*each_step, "state") else v for k, v in inputs.items()}
            one.update({k: one[k][:, start:start + n] for k in each_step})
            if i > 0:
                one.pop("state")
            y, last = run(**one)
            parts.append(y)
        ys.append(torch.cat(parts, 1))
        lasts.append(last)
    compare_scans(run(**inputs, seq_idx=seq_idx), (torch.cat(ys), torch.cat(lasts)), inputs, tolerance)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[0, :9], mask[1, 130:] = False, False
    mask = mask.to(device)
    ys, lasts = torch.zeros_like(inputs["u"]), []
    for row in range(2):
        one = {k: v[row:row + 1] if k in (*each_step, "state") else v for k, v in inputs.items()}
        y, last = run(**{k: v[:, mask[row]] if k in each_step else v for k, v in one.items()})
        ys = ys.index_put((torch.tensor(row, device=device), mask[row].nonzero()[:, 0]), y[0])
        lasts.append(last)
    y, last = run(**inputs, mask=mask)
    compare_scans((y * mask[..., None], last), (ys, torch.cat(lasts)), inputs, tolerance)


def compare_scans(got, expected, inputs, tolerance):
    assert relative(got[0], expected[0]) < tolerance and relative(got[1], expected[1]) < tolerance
    got, expected = gradients(*got, inputs), gradients(*expected, inputs)
    for name in inputs:
        assert relative(got[name], expected[name], expected["delta"].norm().item() if name == "delta_bias" else 0) < tolerance, name


def check_the_rest(method):
    """Extreme decay, inputs of 16 bits, autocast, any split, views, padding and documents."""
    for size in (0.0, 1e-6, 1.0, 100.0, 1000.0):
        for length in (9, 130):
            check_scan(extreme_inputs(length, size), [method], softplus=False)
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        check_16_bit_scan(method, dtype, tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        check_scan(scan_inputs(2, 65, 5, 4), [method])
    check_any_split(method)
    check_scan(views(), [method])
    check_documents(method)


def check_16_bit_scan(method, dtype, tolerance):
    """float32 inside: the only error is the rounding of what comes out. The state stays float32."""
    inputs = scan_inputs(3, 130, 5, 16)
    exact = ("A", "D", "delta_bias", "state")
    inputs = {k: v.detach().to(torch.float32 if k in exact else dtype).requires_grad_() for k, v in inputs.items()}
    check_scan(inputs, [method], tolerance=tolerance)
    y, last = selective_scan(**inputs, return_last_state=True, method=method)
    assert y.dtype == dtype and last.dtype == torch.float32


def check_any_split(method):
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


def views():
    """Inputs that are not contiguous, as chunk(), split() and expand() give them."""
    wide = {k: v.detach() for k, v in scan_inputs(3, 33, 10, 8).items()}
    inputs = scan_inputs(3, 33, 5, 4)
    views = {**inputs, "u": wide["u"].chunk(2, -1)[1], "z": wide["z"].chunk(2, -1)[0], "B": wide["B"].split(4, -1)[1],
             "C": wide["C"][:, :, ::2], "delta": wide["delta"][:, :, :1].expand(3, 33, 5), "A": wide["A"].t()[:5, :4]}
    return {k: v.detach().requires_grad_() for k, v in views.items()}


@pytest.mark.parametrize("method", PLAIN)
def test_scan_of_all_else_that_there_is(method):
    """Extreme decay, inputs of 16 bits, autocast, any split, views."""
    check_the_rest(method)
    check_any_split("auto")


def test_scan_refuses_what_does_not_fit():
    inputs = {k: v.detach() for k, v in scan_inputs(2, 8, 5, 4).items()}
    for name, value, words in [("B", torch.zeros(2, 8, 3), "B must be"), ("u", torch.zeros(2, 8), "u must be"),
                               ("z", torch.zeros(2, 7, 5), "z must be"), ("state", torch.zeros(2, 4, 5), "state must be"),
                               ("D", torch.zeros(4), "D must be"), ("method", "triton2", "method must be"),
                               ("mask", torch.ones(2, 9).bool(), "mask must be"), ("mask", torch.ones(2, 8), "mask must be bool"), ("seq_idx", torch.zeros(8), "seq_idx must be"),
                               ("A", torch.zeros(5, 4, dtype=torch.complex64), "A must be .* real")]:
        with pytest.raises(ValueError, match=words):
            selective_scan(**{**inputs, name: value})
    with pytest.raises(ValueError, match="L > 0"):
        selective_scan(torch.zeros(1, 0, 5), torch.zeros(1, 0, 5), inputs["A"], torch.zeros(1, 0, 4), torch.zeros(1, 0, 4))
    check_no_texts(selective_scan, inputs)


def check_no_texts(scan, inputs):
    """A batch of none is scanned by each method, but not by one that does not exist."""
    inputs = {k: v[:0] if k in ("u", "delta", "B", "C", "z", "state") else v for k, v in inputs.items()}
    for method in PLAIN:
        y, last = scan(**inputs, method=method, return_last_state=True)
        assert y.shape == inputs["u"].shape and last.shape == inputs["state"].shape
    with pytest.raises(ValueError, match="method must be"):
        scan(**inputs, method="fast")


def test_triton_that_cannot_run_is_an_error():
    inputs = {k: v.detach() for k, v in scan_inputs(2, 8, 5, 4).items()}
    with pytest.raises(ValueError, match="needs .*CUDA"):
        selective_scan(**inputs, method="triton")
    assert mamba.scan_method("auto", torch.zeros(1), 16) == "chunked"


def memory_of_scan(batch, length, d_inner, d_state, backward):
    """The most bytes that it needs at a time beyond inputs, output and gradients."""
    inputs = scan_inputs(batch, length, d_inner, d_state)
    with Recorder() as recorded, torch.set_grad_enabled(backward):
        y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, method="chunked")
        if backward:
            y.backward(gy := torch.ones_like(y))
    results = [y, last, *((gy, *(t.grad for t in inputs.values() if t.grad is not None)) if backward else ())]
    assert all(bool(torch.isfinite(t).all()) for t in results)
    return recorded.most_bytes - sum(t.nbytes for t in results)


def test_memory_of_the_scan_in_training():
    """The states of all steps would take 134 MB here."""
    assert memory_of_scan(2, 2048, 512, 16, backward=True) < 50e6


def test_memory_of_the_scan_does_not_grow_with_the_length():
    """Without gradients: 16 times the steps, and beyond what goes in and comes out to the byte the same for each option."""
    short, long = (memory_of_scan(1, length, 8, 16, backward=False) for length in (4096, 65536))
    assert long == short


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: the convolution


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_conv_equals_that_of_torch(length, width):
    """With and without a bias and a state before it; outputs, last inputs and gradients, at once and cut in two."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    x, weight, bias, state = rand(2, length, 5), rand(5, 1, width), rand(5), rand(2, width - 1, 5)
    for b, s in ((bias, state), (None, state), (bias, None), (None, None)):
        seen = torch.cat([torch.zeros_like(state) if s is None else s, x], 1)
        expected = F.silu(F.conv1d(seen.transpose(1, 2), weight, b, groups=5).transpose(1, 2))
        y, last = mamba.conv_silu(x, weight, b, s)
        assert relative(y, expected) < 1e-12 and torch.equal(last, seen[:, length:])
        inputs = [t for t in (x, weight, b, s) if t is not None and t.numel() > 0]
        got, reference = (torch.autograd.grad(t.sin().sum(), inputs) for t in (y, expected))
        assert same(got, reference, 1e-12)
        if (half := length // 2) > 0:
            first, middle = mamba.conv_silu(x[:, :half], weight, b, s)
            second, end = mamba.conv_silu(x[:, half:], weight, b, middle)
            parts = torch.cat([first, second], 1)
            assert relative(parts, expected) < 1e-12 and torch.equal(end, last)
            assert same(torch.autograd.grad(parts.sin().sum(), inputs), reference, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: the block


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


BLOCKS = ({}, {"d_conv": 1, "conv_bias": False}, {"scan": "sequential", "bias": True}, {"d_state": 5, "expand": 3, "d_conv": 2})


def some_state(module, batch):
    """Of a block or of a model: what it could have read."""
    random_like = lambda s: type(s)(*(at_random(torch.randn, t.shape, seed=7 + i).to(t.dtype) for i, t in enumerate(s)))
    state = module.init_state(batch)
    return random_like(state) if isinstance(state, tuple) else [random_like(layer) for layer in state]


@pytest.mark.parametrize("changes", BLOCKS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@OF_EACH_LAYER
def test_a_state_is_never_changed(monkeypatch, changes, grad, alone):
    """A block and a model return another one, which shares no memory with it and keeps no other memory alive."""
    if alone:       # without mamba_fast/
        monkeypatch.setattr(mamba, "fast", None)
    model = small(**changes)
    block = model.backbone["layers"][0].mixer
    for length in (1, 2, 40):
        for module, given in ((block, torch.randn(2, length, 32)), (model, tokens(2, length))):
            state = some_state(module, 2)
            before = copy.deepcopy(state)
            with torch.set_grad_enabled(grad):
                after = module(given, state=state)[-1]
            assert same(state, before)
            assert not {t.data_ptr() for t in tree_leaves(after)} & {t.data_ptr() for t in tree_leaves(state) if t.numel() > 0}
            assert type(after) is type(state) and not any(t.is_inference() for t in tree_leaves(after))
            for new, old in zip(tree_leaves(after), tree_leaves(before)):
                assert new.shape == old.shape and new.dtype == old.dtype
                assert grad or new.untyped_storage().nbytes() <= 4 * new.nbytes


@pytest.mark.parametrize("changes", BLOCKS)
@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_gradients_flow_through_a_state(changes):
    """Outputs, last state and gradients of a block, of the state that it begins with too, do not depend on how x is cut."""
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(d_model=16, **changes))
    x, first = torch.randn(2, 50, 16).requires_grad_(), some_state(block, 2)
    leaves = [x, *(t.requires_grad_() for t in first if t.numel() > 0), *block.parameters()]

    def run(*sizes):
        ys, state = [], first
        for part in x.split(sizes, 1):
            y, state = block(part, state)
            ys.append(y)
        y = torch.cat(ys, 1)
        return [y, *state, *torch.autograd.grad(y.sin().sum() + sum(t.cos().sum() for t in state), leaves)]
    whole = run(50)
    for sizes in ((1, 49), (20, 30), (47, 3), (25, 1, 1, 23)):
        assert same(run(*sizes), whole, 1e-5), sizes


PADDING = [[(0, 7), (3, 4)], [(5, 2), (0, 7)], [(0, 1), (2, 0)], [(1, 6), (7, 0)]]      # (left, right) of two rows of 7 steps


def masks():
    """(B, L) masks with padding on the left, on the right, on both sides, in holes, and a row that is nothing else."""
    for rows in PADDING:
        yield torch.stack([(torch.arange(7) >= left) & (torch.arange(7) < 7 - right) for left, right in rows])
    yield torch.ones(2, 7, dtype=torch.bool)
    yield at_random(torch.rand, 3, 70) < 0.6


def without_padding(run, x, mask, state, width=16):
    """run(x, state) -> (y (B, L, width), state) for each row without its padding: (y, 0 at the padding, and the states as one)."""
    y, states = torch.zeros(*mask.shape, width), []
    for i, (row, row_mask) in enumerate(zip(x, mask)):
        before = tree_map(lambda t, i=i: t[i:i + 1], state)
        if not row_mask.any():
            states.append(before)
            continue
        y_row, after = run(row[None, row_mask], before)
        states.append(after)
        y = y.index_put((torch.tensor(i), row_mask.nonzero()[:, 0]), y_row[0])
    return y, tree_map(lambda *ts: torch.cat(ts), *states)


@pytest.mark.parametrize("changes", [{}, {"d_conv": 1}, {"conv_bias": False, "d_conv": 6}])
@OF_EACH_LAYER
def test_padding_of_a_block(scan, changes):
    """Outputs, states and all gradients are those of each row without its padding, whatever the padding is."""
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(d_model=16, scan=scan, **changes))
    for mask in masks():
        x, state = torch.randn(*mask.shape, 16).requires_grad_(), some_state(block, len(mask))
        leaves = [x, *(t.requires_grad_() for t in state if t.numel() > 0), *block.parameters()]
        results = []
        for y, after in (block(x, state, mask=mask), without_padding(block, x, mask, state)):
            y = y * mask[..., None]
            loss = y.sin().sum() + sum(t.cos().sum() for t in after)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            results.append([y, *after, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads))])
        assert same(*results, 1e-5)
        with torch.no_grad():
            nothing = torch.where(mask[..., None], x, torch.nan)        # 0 times that would not be 0
            assert same((block(nothing, mask=mask) * mask[..., None]).nan_to_num(9), block(x, mask=mask) * mask[..., None], 1e-6)


@pytest.mark.parametrize("padding", [False, True])
@OF_EACH_LAYER
def test_documents_in_a_row(scan, padding):
    """Documents one after the other, of any lengths, with padding between them or not, see nothing of each other."""
    torch.manual_seed(0)
    block, lengths = MambaBlock(MambaConfig(d_model=16, scan=scan)), [1, 2, 9, 40, 3, 70]
    seq_idx = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)      # two numbers are enough
    x, state = torch.randn(1, sum(lengths), 16).requires_grad_(), some_state(block, 1)
    mask = at_random(torch.rand, seq_idx.shape, seed=1) < 0.7 if padding else torch.ones_like(seq_idx) > 0
    mask[:, 0] = mask[:, -1] = True
    mask[:, 13:50] |= ~mask[:, 13:50].any()
    ys, before = [], state
    for part, part_mask in zip(x.split(lengths, 1), mask.split(lengths, 1)):
        if part_mask.any():
            y, after = without_padding(block, part, part_mask, before)
            ys.append(y)
        else:
            ys.append(torch.zeros_like(part))
        before = block.init_state(1)
    expected = [torch.cat(ys, 1), *after]
    if padding:
        seq_idx = torch.where(mask, seq_idx, 7)     # of what is padding, it says nothing
    y, after = block(x, state, mask=mask if padding else None, seq_idx=seq_idx)
    got = [y * mask[..., None], *after]
    leaves = [x, *block.parameters()]
    for results in (expected, got):
        results += torch.autograd.grad(results[0].sin().sum() + results[2].cos().sum(), leaves)
    assert same(got, expected, 1e-5)


@OF_EACH_LAYER
def test_what_a_block_refuses():
    block, x = MambaBlock(MambaConfig(d_model=16)), torch.randn(2, 9, 16)
    for wrong, words in (((x[0],), "x must be"), ((x, block.init_state(3)), "must be"), ((x, None, torch.ones(2, 8) > 0), "mask and seq_idx"),
                         ((x, None, None, torch.zeros(9)), "mask and seq_idx"), ((x.to(torch.complex64),), "real"),
                         ((x, None, torch.ones(2, 9, dtype=torch.long)), "mask bool"), ((x[:, :0],), r"d_model\), L > 0")):
        with pytest.raises(ValueError, match=words):
            block(*wrong)
    assert block(torch.empty(0, 9, 16)).shape == (0, 9, 16)


@OF_EACH_LAYER
def test_checkpointing_keeps_little(scan):
    """Non-reentrant checkpointing of a block gives the same gradients and keeps its input alone."""
    torch.manual_seed(0)
    block, x = MambaBlock(MambaConfig(d_model=32, scan=scan)), torch.randn(2, 70, 32, requires_grad=True)
    results = []
    for run in (block, functools.partial(torch.utils.checkpoint.checkpoint, block, use_reentrant=False)):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            y = run(x)
        results.append([sum(kept.values()), y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    assert all(torch.equal(*pair) for pair in zip(results[0][1:], results[1][1:]))
    assert results[1][0] < 0.1 * results[0][0]


def test_a_block_without_a_state_returns_its_output_alone():
    torch.manual_seed(0)
    block, x = MambaBlock(MambaConfig(d_model=16)), torch.randn(2, 9, 16)
    y, _ = block(x, block.init_state(2))
    assert relative(block(x), y) < 1e-6
    assert block.init_state(5).conv.shape == (5, 3, 32) and block.init_state(5).h.shape == (5, 32, 16)


def test_a_module_gives_one_tensor_in_training_and_in_evaluation():
    """What a hook sees of in_proj, and what may be put in its place."""
    block, x, seen = MambaBlock(MambaConfig(d_model=16)), torch.randn(2, 9, 16), []
    expected = block.eval()(x)
    block.in_proj.register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    torch.testing.assert_close(block.train()(x), expected)
    block.in_proj = nn.Sequential(block.in_proj)
    torch.testing.assert_close(block(x), expected)
    assert seen == [(2, 9, 64)] * 2


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
        expected = torch.tensor([0.75 * low + 0.25 * high, (low + high) / 2, 0.25 * low + 0.75 * high])
        assert (quartiles - expected).abs().max() < 0.3
        assert torch.allclose(mixer.A_log, torch.log(torch.arange(1.0, 17)).expand(512, 16))
        assert torch.equal(mixer.D, torch.ones(512)) and torch.equal(layer.norm.weight, torch.ones(256))
        bound = 16 ** -0.5
        assert 0.95 * bound < mixer.dt_proj.weight.abs().max() <= bound
        bound = 512 ** -0.5 / 8 ** 0.5      # of nn.Linear, divided by the square root of the number of layers
        assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound * 1.001


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba3"])
def test_flags_for_other_code_bases_stay(kind):
    """On the parameters that a block makes, and on those that take their place."""
    config = MambaConfig(layer=kind, d_model=32, **({} if kind == "mamba" else {"headdim": 16}))
    with torch.device("meta"):
        first = config.block(config)
    for block in (first, first.to_empty(device="cpu"), copy.deepcopy(first).bfloat16()):
        for name in block.exact:
            parameter = block.get_parameter(name)
            assert parameter._no_reinit and parameter._no_weight_decay and parameter.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: the model


@pytest.mark.parametrize("changes", [{}, {"d_state": 5, "expand": 3, "d_conv": 3}, {"bias": True, "conv_bias": False}, {"mixer_rms_eps": 1e-2},
                                     {"mixer_rms_eps": 1e-6, "scan": "sequential", "d_state": 5}])
def test_model_equals_transformers(changes):
    """With mixer_rms_eps it is a Falcon-Mamba."""
    transformers = pytest.importorskip("transformers")
    model = lively(vocab_size=72, **changes)
    c = model.config
    kind, more = ("FalconMamba", {"mixer_rms_eps": c.mixer_rms_eps}) if c.mixer_rms_eps else ("Mamba", {})
    peer = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab_size, hidden_size=c.d_model, state_size=c.d_state, num_hidden_layers=c.n_layer, expand=c.expand,
        conv_kernel=c.d_conv, use_bias=c.bias, use_conv_bias=c.conv_bias, time_step_rank=c.dt_rank,
        layer_norm_epsilon=c.norm_eps, use_cache=False, eos_token_id=None, pad_token_id=None, **more))
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
    if more:    # generated, by what mamba_fast/ has for the step of a token too
        expected = peer.generate(idx, max_new_tokens=12, do_sample=False)
        assert torch.equal(model.generate(idx, 12, temperature=0), expected) and torch.equal(greedy(model, idx, 12), expected[:, 37:])


@pytest.mark.parametrize("changes", [{}, {"d_intermediate": 48}, {"d_conv": 1}, {"scan": "sequential"},
                                     {"tie_embeddings": False, "d_conv": 2}])
@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_any_split_gives_the_same_logits(changes):
    model = small(**changes)
    idx = tokens(2, 40)
    with torch.no_grad():
        full, nothing, last = model(idx, state=model.init_state(2))
        assert full.shape == (2, 40, 70) and nothing is None and same(model(idx)[0], full, 1e-6)
        for sizes in ([40], [1] * 40, [3, 37], [1, 2, 1, 36], [17, 1, 22]):
            state, parts = model.init_state(2), []
            for part in idx.split(sizes, dim=1):
                logits, _, state = model(part, state=state)
                parts.append(logits)
            assert relative(torch.cat(parts, 1), full) < 1e-5 and same(state, last, 1e-5), sizes
        assert relative(model(idx, num_last_tokens=3)[0], full[:, -3:]) < 1e-6
        for part in (1, 7, 40, 100):
            read = list(model.read(idx, num_last_tokens=0, part=part))
            assert relative(torch.cat([logits for logits, _ in read], 1), full) < 1e-5
            assert same(read[-1][1], last, 1e-5)
            ends = [logits for logits, _ in model.read(idx, part=part)]
            assert len(ends) == len(read) == math.ceil(40 / part)
            assert relative(ends[-1], full[:, -1:]) < 1e-5 and all(logits.shape == (2, 1, 70) for logits in ends)


@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_gradients_flow_through_the_state_of_a_model():
    """Truncated backpropagation without the truncation: a loss cut in two has the gradients of one call."""
    model, idx = lively(d_intermediate=24), tokens(2, 40)
    targets, results = idx.roll(-1, 1), []
    for sizes in ((40,), (13, 27), (39, 1)):
        model.zero_grad()
        state, loss = some_state(model, 2), 0
        first = [t.requires_grad_() for t in tree_leaves(state)]
        for part, target in zip(idx.split(sizes, 1), targets.split(sizes, 1)):
            logits, part_loss, state = model(part, target, state)
            assert logits is None
            loss = loss + part_loss * part.shape[1] / 40
        loss.backward()
        results.append([loss.detach(), *state, *(t.grad for t in first), *(p.grad for p in model.parameters())])
    assert same(results[1], results[0], 1e-5) and same(results[2], results[0], 1e-5)


@OF_EACH_LAYER
def test_padding_and_documents_of_a_model(scan):
    """Logits, loss, states and gradients; the loss of what is padding is not asked for."""
    model = small(scan=scan)
    for mask in masks():
        idx = tokens(*mask.shape, seed=2)
        state = some_state(model, len(mask))
        logits, _, after = model(idx, state=state, mask=mask)
        run = lambda ids, state: model(ids, state=state)[::2]
        expected, expected_after = without_padding(run, idx, mask, state, 70)
        assert same([logits * mask[..., None], *tree_leaves(after)], [expected, *tree_leaves(expected_after)], 1e-5)
    lengths = [5, 1, 30, 14]
    idx, seq_idx = tokens(2, 50), torch.cat([torch.full((2, n), i) for i, n in enumerate(lengths)], 1)
    alone = torch.cat([model(part)[0] for part in idx.split(lengths, 1)], 1)
    assert same(model(idx, seq_idx=seq_idx)[0], alone, 1e-5)
    loss = model(idx, idx, seq_idx=seq_idx)[1]
    assert same(torch.autograd.grad(loss, list(model.parameters())),
                torch.autograd.grad(F.cross_entropy(alone.flatten(0, 1), idx.flatten()), list(model.parameters())), 1e-4)


@pytest.mark.usefixtures("anywhere")
def test_a_state_can_be_learned():
    """The first state as parameters of one's own."""
    model, idx = lively(n_layer=2), tokens(1, 20)
    model.requires_grad_(False)
    state = [MambaState(*(nn.Parameter(t) for t in layer)) for layer in model.init_state(1)]
    optimizer, losses = torch.optim.Adam(tree_leaves(state), 0.1), []
    for _ in range(10):
        _, loss, _ = model(idx[:, :-1], idx[:, 1:], state)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("changes", [{}, {"d_conv": 1, "conv_bias": False}, {"bias": True, "d_state": 5, "d_intermediate": 24}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_single_tokens_equal_one_call(changes, dtype):
    """With gradients and without, in logits and in the state."""
    model, idx = small(**changes).eval().to(dtype), tokens(3, 40)
    whole, _, last = model(idx, state=model.init_state(3))
    state, parts = model.init_state(3), []
    with torch.no_grad():
        for token in idx.split(1, 1):
            logits, _, state = model(token, state=state)
            parts.append(logits)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative(torch.cat(parts, 1), whole) < tolerance and same(state, last, tolerance)


@OF_EACH_LAYER
def test_single_tokens_under_autocast():
    model, idx, results = small().eval(), tokens(2, 12), []
    for step in (12, 1):
        state, parts = model.init_state(2), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in idx.split(step, 1):
                logits, _, state = model(part, state=state)
                parts.append(logits)
        results.append(torch.cat(parts, 1))
        assert state[0].h.dtype == torch.float32
    assert relative(results[1], results[0]) < 3e-2


@OF_EACH_LAYER
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
    loss = model.double()(idx, targets)[1]
    expected = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.masked_fill(targets < 0, -100).flatten())
    assert loss.dtype == torch.float64 and abs(loss.item() - expected.item()) < 1e-12


def test_padding_of_the_vocabulary_is_never_seen():
    model = small(vocab_size=65)
    assert model.lm_head.weight.shape[0] == 72 and model(tokens(1, 4, vocab=65))[0].shape[-1] == 65


def test_weight_decay_is_on_projections_only(layer):
    model = small(d_intermediate=16, bias=True, tie_embeddings=False)
    decayed, rest = model.configure_optimizers(1e-3, weight_decay=0.3).param_groups
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".", 3)[-1] for p in decayed["params"]} == {
        f"{part}.weight" for part in ("mixer.in_proj", *(["mixer.x_proj", "mixer.dt_proj"] if layer == "mamba" else []), "mixer.out_proj",
                                      "mlp.fc1", "mlp.fc2")}
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
    logits, _, state = model(idx, state=model.init_state(2))
    assert all(layer.h.dtype == torch.float32 and layer.conv.dtype == torch.bfloat16 for layer in state)
    assert logits.dtype == torch.bfloat16 and relative(logits, expected) < 0.03
    assert model.double().backbone["layers"][0].mixer.A_log.dtype == torch.float64
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)[1]
        loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())


@OF_EACH_LAYER
def test_dropout():
    model, idx = small(dropout=0.5), tokens(2, 30)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_what_a_model_says_of_itself():
    model = small()
    assert model.num_params() == sum(p.numel() for p in model.parameters())
    assert model.num_params(embedding=False) == model.num_params() - 72 * 32
    assert model.device == torch.device("cpu")
    hidden = model.hidden(tokens(2, 9))
    assert hidden.shape == (2, 9, 32) and same(model.lm_head(hidden)[..., :70], model(tokens(2, 9))[0], 1e-6)
    with torch.device("meta"):      # the released 130M: 129,135,360 parameters
        assert Mamba(MambaConfig()).num_params() == 129_135_360
        assert Mamba(MambaConfig(n_layer=1)).device == torch.device("meta")


def test_traced_as_torch_compile_does_it():
    """Loss and gradients (torch 2.11 loses those of a Function whose forward pass works in place); single tokens, one graph."""
    torch.compiler.reset()
    model, idx, results = small(n_layer=1).eval(), tokens(2, 20), []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = run(idx, idx.roll(-1, 1))[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert same(*results, 1e-6)
    traced, states = torch.compile(model, backend="eager", fullgraph=True), [model.init_state(2)] * 2
    with torch.no_grad():
        for token in idx[:, :3].split(1, 1):
            (logits, _, states[0]), (expected, _, states[1]) = (run(token, state=s) for run, s in zip((traced, model), states))
            assert relative(logits, expected) < 1e-6
    assert same(*states, 1e-6)


@pytest.mark.parametrize("changes", [{}, {"d_intermediate": 16, "dropout": 0.1, "bias": True, "scan": "sequential"}])
@OF_EACH_LAYER
def test_all_operators_have_an_mps_kernel(changes, monkeypatch):
    """Apple's GPU: no Mac is needed to see that every operation has a kernel there."""
    if mamba.fast is not None:      # what runs there
        from mamba_fast import cpp, scan_side_by_side
        monkeypatch.setattr(cpp, "compiled", lambda name: None)
        monkeypatch.setattr(mamba.fast, "recurrence", lambda *inputs: scan_side_by_side.recurrence)
    available = mps_operators()
    assert len(available) > 1000 and "linalg_eig" not in available and "mm" in available
    model, idx = small(**changes), tokens(2, 70)
    optimizer = model.configure_optimizers(1e-3)
    with Recorder() as recorded:
        for _ in range(2):
            model(idx, idx)[1].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model(idx, idx, mask=idx > 3, seq_idx=idx // 40)[1].backward()
        model.generate([idx[0, :5], idx[1, :9]], 4, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(0))
        model.generate([[1, 2], [3]], 4, repetition_penalty=1.2, min_p=0.1, stop=[5])
    assert {"mm", "_fused_adamw_", "exponential_"} <= recorded.operators
    missing = recorded.operators - available
    assert not missing, missing
    assert not recorded.dtypes & {torch.float64, torch.complex64, torch.complex128}


ALONE = """
import json, sys
for name in ("mamba_fast", "numpy", "requests", "tqdm", "safetensors", "huggingface_hub", "tokenizers"):
    sys.modules[name] = None
import torch, mamba
torch.manual_seed(0)
model, x = mamba.Mamba(mamba.MambaConfig(vocab_size=70, d_model=32, n_layer=2)), torch.arange(60).view(2, 30)
optimizer, losses = model.configure_optimizers(1e-2), []
for _ in range(3):
    loss = model(x[:, :-1], x[:, 1:])[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
made = model.generate(x[:, :5], 8, temperature=0)
model.save_pretrained("saved")
again = mamba.Mamba.from_pretrained("saved")
other = mamba.Mamba.from_pretrained("weights")(x)[0].double().sum().item()
print(json.dumps({"fast": mamba.fast is None, "losses": losses, "made": made.tolist(), "other": other,
                  "again": again.generate(x[:, :5], 8, temperature=0).tolist(),
                  "block": list(mamba.MambaBlock(mamba.MambaConfig(d_model=16))(torch.zeros(1, 3, 16)).shape)}))
"""


def test_mamba_works_as_the_only_file_copied(tmp_path):
    """Alone in a folder, with no package but torch: it trains, generates, saves and loads, released weights too."""
    (tmp_path / "mamba.py").write_bytes((ROOT / "mamba.py").read_bytes())
    model, x = lively(), torch.arange(60).view(2, 30)
    write(tmp_path / "weights", released(model))
    result = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True, capture_output=True, text=True)
    said = json.loads(result.stdout)
    assert said["fast"] and said["block"] == [1, 3, 16] and said["made"] == said["again"]
    assert said["losses"][0] > said["losses"][2] + 0.05
    assert said["other"] == pytest.approx(model(x)[0].double().sum().item(), rel=1e-4)
    imports = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / "mamba.py").read_text(), re.MULTILINE))
    assert imports - set(sys.stdlib_module_names) == {"torch"}


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: generation


def greedy(model, prompts, count):
    """The plain way, by the whole text through forward for every token: (B, L) -> the count tokens after it."""
    text = prompts
    with torch.no_grad():
        for _ in range(count):
            text = torch.cat([text, model(text)[0][:, -1:].argmax(-1)], 1)
    return text[:, prompts.shape[1]:]


def greedy_by_steps(model, prompts, count):
    """The same by single tokens through forward, with a state."""
    state, new = model.init_state(len(prompts)), []
    with torch.no_grad():
        for token in prompts.split(1, 1):
            logits, _, state = model(token, state=state)
        for _ in range(count):
            new.append(logits[:, -1].argmax(-1, keepdim=True))
            logits, _, state = model(new[-1], state=state)
    return torch.cat(new, 1)


@OF_EACH_LAYER
def test_generate_greedy_is_argmax_of_the_full_forward():
    model, idx = small(), tokens(2, 11)
    out = model.generate(idx, 20, temperature=0)
    assert out.shape == (2, 31) and torch.equal(out[:, :11], idx)
    assert torch.equal(out[:, 11:], greedy(model, idx, 20)) and torch.equal(out[:, 11:], greedy_by_steps(model, idx, 20))


@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_generate_prompts_of_different_lengths():
    model = small().eval()
    prompts = [tokens(n, seed=n) for n in (5, 1, 12, 5, 3)]
    alone = [model.generate(p[None], 15, temperature=0)[0] for p in prompts]
    for together in (prompts, [p.tolist() for p in prompts]):
        assert same(alone, model.generate(together, 15, temperature=0))


def test_generate_settings():
    model, idx = small().train(), tokens(4, 6)
    again = [model.generate(idx, 30, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again) and model.training
    assert not torch.equal(again[0], model.generate(idx, 30, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(model.generate(idx, 30, top_k=1), model.generate(idx, 30, temperature=0))
    assert torch.equal(model.generate(idx, 30, top_p=1e-6), model.generate(idx, 30, temperature=0))
    assert torch.equal(model.generate(idx, 0), idx) and model.generate([[1, 2]], 0)[0].tolist() == [1, 2]
    for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.1},
                {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.inf}, {"repetition_penalty": math.nan}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.generate(idx, 1, **bad)
    for bad in ([70], [-1], [3, 1000]):
        with pytest.raises(ValueError, match="stop .*"):
            model.generate(idx, 3, stop=bad)
    for nothing in ([[]], [[1], []], []):
        with pytest.raises(ValueError, match="at least one token"):
            model.generate(nothing, 1)
    for flat in ([1, 2], torch.arange(2), [[[1]]]):
        with pytest.raises(ValueError, match="one prompt in a list"):
            model.generate(flat, 1)


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
    # in two streams with one seen, which is updated in place, as in one
    seen, settings = torch.zeros(1, 70, dtype=torch.bool), {"temperature": 0, "repetition_penalty": 1.7}
    stream = model.stream([prompts[0]], 7, seen=seen, **settings)
    first = [token.item() for token in stream]
    second = [token.item() for token in model.stream([first[-1:]], 23, state=stream.state, seen=seen, **settings)]
    assert prompts[0] + first + second == model.generate(prompts[:1], 30, **settings)[0].tolist()
    assert set(seen[0].nonzero()[:, 0].tolist()) == {*prompts[0], *first, *second}


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
    stops = [*stop, free[3][15]]        # now each row stops, and the stream with the last of them
    new = torch.stack(list(model.stream(prompts, 40, stop=stops, generator=torch.Generator().manual_seed(0))), 1).tolist()
    ends = [next(i + 1 for i, token in enumerate(row) if token in stops) for row in new]
    assert max(ends) == len(new[0]) < 40
    assert all(set(row[end - 1:]) == {row[end - 1]} for row, end in zip(new, ends))

    # a tensor is as long as the longest row; a prompt may hold stop tokens, and end with one
    idx = torch.stack([prompts[0], prompts[3].roll(1)])
    free = again(idx)
    stop = [free[0, 7].item(), free[1, 11].item(), idx[0, 4].item()]
    ends = [next(i for i in range(5, 45) if row[i] in stop) + 1 for row in free.tolist()]
    out = again(idx, stop=stop)
    assert out.shape == (2, max(ends)) and ends[0] != ends[1]
    for row, expected, end in zip(out.tolist(), free.tolist(), ends):
        assert row == expected[:end] + [expected[end - 1]] * (max(ends) - end)


@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_one_prefix_and_three_continuations():
    model, prefix = lively(), tokens(1, 9)
    with torch.no_grad():
        *_, state = model(prefix, state=model.init_state(1))
    before = copy.deepcopy(state)
    for more in ([1, 2], [3, 4, 5], [6]):
        stream = model.stream([more], 8, temperature=0, state=state)
        expected = greedy(model, torch.cat([prefix, torch.tensor([more])], 1), 8)
        assert torch.equal(torch.stack(list(stream), 1), expected)
        assert same(state, before)
    # rows in another order, as a beam search wants them
    both = [type(layer)(*(torch.cat([t, torch.zeros_like(t)])[[1, 0, 0]] for t in layer)) for layer in state]
    texts = torch.stack(list(model.stream([[1], [1], [6]], 8, temperature=0, state=both)), 1)
    expected = [greedy(model, torch.tensor([text]), 8) for text in ([1], [*prefix[0], 1], [*prefix[0], 6])]
    assert torch.equal(texts, torch.cat(expected))


@pytest.mark.parametrize("lengths", [(7,), (7, 7), (7, 1, 3)])
@OF_EACH_LAYER
def test_the_state_of_a_stream(lengths):
    """It is all that has been read, which is all but the token given last; and it stays what it is when the stream goes on."""
    model, prompts = small().eval(), [tokens(n, seed=n) for n in lengths]
    stream, read, states = model.stream(prompts, 6, temperature=0), prompts, []
    for token in stream:
        states.append((stream.state, copy.deepcopy(stream.state)))
        for row, text in enumerate(read):
            with torch.no_grad():
                *_, expected = model(text[None], state=model.init_state(1))
            assert same([type(layer)(*(t[row:row + 1] for t in layer)) for layer in stream.state], expected, 1e-5)
        read = [torch.cat([text, token[row:row + 1]]) for row, text in enumerate(read)]
    assert len(states) == 6 and all(same(state, copied) for state, copied in states)
    assert same(stream.state, states[-1][0])
    # back to the third token, and on from there
    again = model.stream([text[n + 2:n + 3] for text, n in zip(read, lengths)], 3, temperature=0, state=states[2][0])
    assert torch.equal(torch.stack(list(again), 1), torch.stack([text[n + 3:] for text, n in zip(read, lengths)]))


@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_generated_tokens_and_states_can_be_trained_on():
    """The steps may run in inference mode, what they leave behind is not of it."""
    model, idx = small(), tokens(2, 5)
    stream = model.stream(idx, 6, repetition_penalty=1.1, temperature=0)
    new = torch.stack(list(stream), 1)
    assert not any(t.is_inference() for t in (new, *tree_leaves(stream.state)))
    model(new, new, stream.state)[1].backward()


class Wrapper(nn.Module):
    """Something in the place of a module, which it calls."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args, **more):
        return self.change(self.inner(*args, **more))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


class Changed(nn.Module):
    """A parametrisation of a weight."""

    def forward(self, weight):
        return weight.flip(0) * 1.1


def steered(out):
    """What a module returned, with other numbers in its first tensor."""
    first, *rest = out if isinstance(out, tuple) else (out,)
    if first is not None:
        first = first + (torch.linspace(-3, 3, first.shape[-1]) * (1 + torch.arange(first.shape[-1]) % 3)).to(first.device)
    return type(out)((first, *rest)) if isinstance(out, tuple) else first


def put_in(model, name, how):
    """Changes what the submodule of this name does, in one of the ways in which people do that."""
    module = model.get_submodule(name)
    if how == "hook":
        module.register_forward_hook(lambda module, inputs, out: steered(out))
    elif how == "hook before":
        module.register_forward_pre_hook(
            lambda module, inputs: inputs if inputs[0].dtype == torch.long else (inputs[0] * 1.5 + 0.1, *inputs[1:]))
    elif how == "subclass":
        kind = type(module)
        forward = lambda self, *args, **more: steered(kind.forward(self, *args, **more))
        module.__class__ = type("Mine", (kind,), {"forward": forward})
    elif how == "wrapper":
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Wrapper(module, steered))
    elif how == "parametrisation":
        nn.utils.parametrize.register_parametrization(module, "weight", Changed())


NAMES = ["", "dropout", "lm_head", "backbone.embedding", "backbone.norm_f", *(f"backbone.layers.1{name}" for name in (
    "", ".norm", ".norm2", ".dropout", ".mlp", ".mlp.fc1", ".mlp.fc2", ".mixer", ".mixer.in_proj", ".mixer.conv1d",
    ".mixer.x_proj", ".mixer.dt_proj", ".mixer.out_proj"))]
CALLED = [name for name in NAMES if "conv1d" not in name and "dt_proj" not in name]     # of those only the numbers are used


def check_what_runs(untouched, names, how):
    """That generate gives what forward gives, for whole texts and token by token, with the change and not without."""
    prompts = tokens(2, 4).to(untouched.device)
    before = untouched.generate(prompts, 5, temperature=0)[:, 4:]
    for name in names:
        model = copy.deepcopy(untouched)
        list(model.stream(prompts, 2))          # what a stream keeps for the next is not kept over a change
        put_in(model, name, how)
        expected = greedy(model, prompts, 5)
        assert torch.equal(greedy_by_steps(model, prompts, 5), expected), name
        assert torch.equal(model.generate(prompts, 5, temperature=0)[:, 4:], expected), name
        if name in CALLED and how != "hook before":
            assert not torch.equal(expected, before), name


WAYS = ("hook", "hook before", "subclass", "wrapper", "parametrisation")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.usefixtures("anywhere")
def test_what_runs_is_what_is_there(layer, how):
    """Whatever people put into a model acts in generate as it does in a plain forward, for every submodule that there is."""
    model = lively(n_layer=2, d_intermediate=24, tie_embeddings=False)
    names = [name for name, module in model.named_modules() if not isinstance(module, (nn.ModuleDict, nn.ModuleList))]
    without = {"mamba": (), "mamba2": ("x_proj", "dt_proj")}.get(layer, ("x_proj", "dt_proj", "conv1d"))
    assert set(NAMES) - set(names) == {f"backbone.layers.1.mixer.{name}" for name in without}
    if how in ("wrapper", "parametrisation"):
        names = [name for name in names if name and (how == "wrapper" or hasattr(model.get_submodule(name), "weight"))]
    check_what_runs(model, names, how)


@pytest.mark.parametrize("name, module", [
    ("backbone.layers.1.norm", nn.RMSNorm(32)), ("backbone.norm_f", nn.RMSNorm(32, eps=0.5)),
    ("backbone.layers.0.norm", nn.RMSNorm(32, eps=1e-5, elementwise_affine=False)), ("backbone.norm_f", nn.LayerNorm(32)),
    ("backbone.layers.0.mixer.dt_proj", nn.Linear(2, 64, bias=False)), ("backbone.layers.0.mixer.out_proj", nn.Linear(64, 32)),
    ("backbone.layers.1.mixer.conv1d", nn.Conv1d(64, 64, 4, groups=64, bias=False)), ("lm_head", nn.Linear(32, 100)),
    ("lm_head", nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 72))), ("backbone.layers.1", None)])
@pytest.mark.usefixtures("anywhere")
def test_replaced_modules(name, module):
    """Of the same class with other options, or of another; or a layer taken out."""
    model, prompts = lively(n_layer=3), tokens(2, 7)
    model.generate(prompts, 2)
    if module is None:
        del model.backbone["layers"][1]
    else:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.to(model.device))
    assert torch.equal(model.generate(prompts, 6, temperature=0)[:, 7:], greedy(model, prompts, 6))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_a_scripted_module():
    model, prompts = lively(n_layer=2), tokens(2, 7)
    model.backbone["norm_f"] = torch.jit.script(nn.RMSNorm(32, eps=1e-5))
    assert torch.equal(model.generate(prompts, 6, temperature=0)[:, 7:], greedy(model, prompts, 6))


def test_a_compiled_step_is_not_for_what_was_changed():
    model, prompts = lively(n_layer=2), tokens(2, 7)
    put_in(model, "backbone.layers.1.mixer.x_proj", "hook")
    assert torch.equal(model.generate(prompts, 6, temperature=0, compile=True)[:, 7:], greedy(model, prompts, 6))


def test_a_change_of_the_weights_is_seen_by_the_next_stream():
    model, prompts = lively(), tokens(2, 7)
    model.generate(prompts, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert torch.equal(model.generate(prompts, 6, temperature=0)[:, 7:], greedy(model, prompts, 6))


@pytest.mark.parametrize("without", [False, True])
def test_every_module_keeps_its_mode(without, request):
    if without:
        request.getfixturevalue("alone")
    model, prompts = small(dropout=0.5).train(), tokens(2, 5)
    model.backbone["layers"][0].eval()
    model.backbone["layers"][2].mixer.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    generated = model.generate(prompts, 8, temperature=0)
    assert modes == {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ValueError):
        model.generate(prompts, 8, top_k=0)
    stream = model.stream(prompts, 8)
    next(stream)
    assert modes == {name: module.training for name, module in model.named_modules()}     # also between two tokens
    other = torch.stack([*model.stream(prompts, 3, temperature=0)], 1)      # which ends before the first one
    assert torch.equal(other, generated[:, 5:8])
    del stream
    gc.collect()
    assert modes == {name: module.training for name, module in model.named_modules()}
    both = [model.stream(prompts, n, temperature=0) for n in (3, 8)]
    both = [*itertools.zip_longest(*both)]
    assert torch.equal(torch.stack([b for _, b in both], 1), generated[:, 5:])
    stream = model.stream(prompts, 8)
    next(stream)
    model.eval()        # also between two tokens
    next(stream)
    stream.close() if hasattr(stream, "close") else None
    del stream
    gc.collect()
    assert not any(module.training for module in model.modules())
    assert torch.equal(generated, model.eval().generate(prompts, 8, temperature=0))      # without dropout in any case


def test_drawing_a_token_never_waits_for_the_gpu():
    """What makes the host wait reads a number (_local_scalar_dense) or has a result whose size is a number (nonzero)."""
    logits, seen = torch.randn(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    with Recorder() as recorded:
        mamba.sample(logits, 0.7, 5, 0.9, None, 0.1, 1.2, seen)
        mamba.sample(logits, 0, repetition_penalty=1.2, seen=seen)
    assert {"where.self", "masked_fill.Scalar", "sort"} <= recorded.operators
    assert not [op for op in recorded.operators if re.match("_local_scalar|nonzero|multinomial|_?unique|_to_copy|is_nonzero", op)]
    with Recorder() as plain:
        mamba.sample(logits)
    assert not {"where.self", "scatter_.value", "masked_fill.Scalar", "sort"} & plain.operators


def memory_of_generation(prompt, new):
    """The most bytes that it needs at a time beyond the model, the tokens and a copy of them."""
    model, prompts = small(d_state=8, n_layer=2).eval(), tokens(1, prompt)
    with Recorder() as recorded:
        for _ in model.stream(prompts, new):
            pass
    return recorded.most_bytes - 2 * prompts.nbytes


def test_memory_of_a_long_text():
    """It grows neither with the length of the prompt nor with that of the answer."""
    short = memory_of_generation(2100, 20)
    assert memory_of_generation(2100 + 2 * 2048, 20) < 1.01 * short and memory_of_generation(2100, 200) < 1.01 * short


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: in the tools of others


@pytest.mark.parametrize("targets", [["in_proj"], ["out_proj"], ["in_proj", "x_proj", "out_proj", "lm_head"], "all-linear"])
@pytest.mark.usefixtures("anywhere", "layer")
def test_lora(targets):
    """An adapter acts in a forward call, in training, in generation, and as much after it is merged."""
    check_lora(targets)


@pytest.mark.parametrize("targets", [["x_proj"], ["dt_proj"]])
@pytest.mark.usefixtures("anywhere")
def test_lora_of_what_mamba_1_alone_has(targets):
    check_lora(targets)


def check_lora(targets):
    peft = pytest.importorskip("peft")
    model, prompts = lively(tie_embeddings=False), tokens(2, 9)
    before = model(prompts)[0]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=64, target_modules=targets, init_lora_weights=False)).eval()
    adapted = model(prompts)[0]
    assert relative(adapted, before) > 1e-3
    expected = greedy(model, prompts, 8)
    assert torch.equal(model.generate(prompts, 8, temperature=0)[:, 9:], expected)
    model.train()(prompts, prompts)[1].backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
    merged = lora.eval().merge_and_unload()
    assert relative(merged(prompts)[0], adapted) < 1e-4
    assert torch.equal(merged.generate(prompts, 8, temperature=0)[:, 9:], expected)


def quantized_by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def quantized_dynamically(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("quantize", [quantized_by_torchao, quantized_dynamically])
def test_quantizers_of_others(quantize, anywhere):
    if (quantize, anywhere) == (quantized_dynamically, "cuda"):
        return      # PyTorch has it for a CPU alone
    model, prompts = quantize(lively(d_model=64, tie_embeddings=False)), tokens(1, 7)
    assert torch.equal(model.generate(prompts, 6, temperature=0)[:, 7:], greedy(model, prompts, 6))


SHARDED = """
import os
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from mamba import Mamba, MambaConfig

torch.set_num_threads(1)
dist.init_process_group("gloo")
models = []
for _ in range(2):
    torch.manual_seed(0)
    models.append(Mamba(MambaConfig(vocab_size=50, d_model=32, n_layer=2)))
plain, sharded = models
for layer in sharded.backbone["layers"]:
    fully_shard(layer)
fully_shard(sharded)
idx = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))
for model in models:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model(idx, idx)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.loss = loss.item()
assert abs(plain.loss - sharded.loss) < 1e-5, (plain.loss, sharded.loss)
assert type(sharded.lm_head.weight).__name__ == "DTensor"
assert torch.equal(*(model.eval().generate(idx[:, :5], 10, temperature=0) for model in models))
dist.barrier()
os._exit(0)     # a thread of gloo that still holds a tensor of Python's when Python ends is an abort
"""


def test_sharded_over_two_processes(tmp_path):
    """FSDP2: training, and generation, as on one."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "sharded.py"],
                            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
                            check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@fast
@pytest.mark.parametrize("scan", ["chunked", TRITON], indirect=True)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", ["scan", "block", "model"])
def test_one_graph_for_all_lengths(what, training, scan):
    """torch.compile(fullgraph=True), and at most three compilations for eight lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    torch.manual_seed(0)
    model, counter = small(n_layer=2, d_state=8), CompileCounterWithBackend("aot_eager")
    module = {"scan": selective_scan, "block": model.backbone["layers"][0].mixer, "model": model}[what]
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (5, 9, 20, 33, 64, 65, 100, 257):
        leaves = list(model.parameters()) if what == "model" else [torch.randn(2, length, 32, requires_grad=training)]
        with torch.set_grad_enabled(training):
            results = []
            for run in (module, compiled):
                if what == "model":
                    y = run(*(tokens(2, length),) * 2)[1]
                elif what == "block":
                    y = run(*leaves)
                else:
                    y = run(leaves[0], leaves[0].abs(), -torch.ones(32, 8), *torch.ones(2, 2, length, 8))
                results.append([y, *(torch.autograd.grad(y.square().sum(), leaves) if training else ())])
        assert same(*results, 1e-5)
    assert counter.frame_count <= 3


@fast
def test_export_of_any_batch_and_length():
    """torch.export of the block, of the model, and of the step of a token, which takes and returns states."""
    model = small(n_layer=2).eval()
    block, batch, length = model.backbone["layers"][0].mixer, torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, token, state):
            logits, _, after = self.model(token[:, None], state=state)
            return logits[:, 0], after
    for module, inputs in ((block, lambda b, n: (torch.randn(b, n, 32),)), (model, lambda b, n: (tokens(b, n),))):
        exported = torch.export.export(module, inputs(3, 20), dynamic_shapes=({0: batch, 1: length},)
                                       if module is block else {"idx": {0: batch, 1: length}}).module()
        for sizes in ((2, 2), (5, 9), (2, 64), (3, 300)):
            x = inputs(*sizes)
            assert same([t for t in tree_leaves(exported(*x)) if t is not None],
                        [t for t in tree_leaves(module(*x)) if t is not None], 1e-5)
    step, state = Step(), some_state(model, 3)
    exported = torch.export.export(step, (tokens(3, 1)[:, 0], state), dynamic_shapes=({0: batch}, tree_map(lambda t: {0: batch}, state)))
    for rows in (2, 5):
        inputs = (tokens(rows, 1)[:, 0], some_state(model, rows))
        assert same(exported.module()(*inputs), step(*inputs), 1e-5)


@pytest.mark.usefixtures("anywhere")
@OF_EACH_LAYER
def test_checkpointing_of_the_layers():
    """By PyTorch's own wrapper: equal gradients, and of all that a layer keeps its input alone."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )
    idx, results = tokens(2, 70), []
    for wrapped in (False, True):
        model, kept = small(), {}
        if wrapped:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, mamba.Layer))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            loss = model(idx, idx)[1]
        results.append([sum(kept.values()), loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(*pair) for pair in zip(results[0][1:], results[1][1:]))
    assert results[1][0] < 0.4 * results[0][0]


@pytest.mark.parametrize("at_once", [True, False])
def test_residual_in_float32(at_once):
    """In bfloat16 the model with it is as near to float32 as transformers with the same weights, and nearer than without."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=72, hidden_size=32, num_hidden_layers=12, state_size=8, residual_in_fp32=True,
                                      use_mambapy=False, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    theirs = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    ours, idx = {}, tokens(4, 30)
    for residual in (False, True):
        model = Mamba(MambaConfig(vocab_size=72, d_model=32, n_layer=12, d_state=8, residual_in_fp32=residual)).eval()
        model.load_state_dict({k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()})
        exact, ours[residual] = model(idx)[0], model.bfloat16()
    error = lambda logits: relative(logits, exact)
    assert relative(theirs(idx).logits, exact) < 1e-5
    with torch.no_grad():
        logits = {}
        for residual, model in ours.items():
            if at_once:
                logits[residual] = model(idx)[0]
            else:
                step = model.decoder([row[:1] for row in idx], model.init_state(4))
                logits[residual] = torch.stack([step(token).clone() for token in idx.unbind(1)], 1)
        assert error(logits[True]) < 1.02 * error(theirs.bfloat16()(idx).logits)
        # the step in C++ keeps it in float32 in any case
        assert error(logits[True]) < error(logits[False]) or not at_once and torch.equal(*logits.values())


def test_what_an_import_costs():
    """Nothing that takes long is imported with mamba.py: neither a compiler nor, without a GPU, Triton."""
    code = "import sys, torch, mamba; print([name for name in ('torch._dynamo', 'torch._inductor', 'triton', 'transformers') if name in sys.modules])"
    expected = "['triton']" if torch.cuda.is_available() else "[]"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() == expected


def test_all_that_is_public_says_what_it_does():
    """Docstrings with shapes for each public forward, and __all__."""
    assert set(mamba.__all__) >= {"Mamba", "MambaBlock", "MambaConfig", "selective_scan"}
    for thing in (*map(mamba.__dict__.get, mamba.__all__), MambaBlock.forward, Mamba.forward, Mamba.hidden, Mamba.generate, mamba.Layer.forward):
        assert thing.__doc__ and (not callable(thing) or "B" in thing.__doc__ or isinstance(thing, type)), thing


def test_what_is_public_is_annotated():
    """Each tensor of a public function, and what it returns, with names that there are."""
    for module in map(importlib.import_module, ("mamba", "mamba2", "mamba3")):
        public = [getattr(module, name) for name in module.__all__]
        methods = [f for thing in public if isinstance(thing, type) and issubclass(thing, nn.Module)
                   for name, f in inspect.getmembers(thing, inspect.isroutine)
                   if not name.startswith("_") and getattr(f, "__module__", "") == module.__name__
                   and not name.startswith("mix")]
        for function in (*(thing for thing in public if inspect.isfunction(thing)), *methods):
            hints = typing.get_type_hints(function)
            assert "return" in hints, function
            for name in {"u", "x", "delta", "A", "B", "C", "D", "z", "idx", "mask", "seq_idx"} & inspect.signature(function).parameters.keys():
                assert torch.Tensor in (hints[name], *typing.get_args(hints[name])), (function, name)


# ---------------------------------------------------------------------------------------------------------------------
# mamba.py: load and save

LAYOUTS = ("mamba_ssm", "mamba_ssm, padded", "hf", "hf, shards", "hf, .bin shards")


def logits(model, length=20):
    with torch.no_grad():
        return model(tokens(2, length))[0][..., :70]


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
               "scan": "sequential", "residual_in_fp32": True}
    changes["mixer_rms_eps"] = 1e-3
    assert all(getattr(MambaConfig(), name) != changes[name] for name in MambaConfig.__dataclass_fields__ if name != "layer")
    both = {k: v for k, v in changes.items() if k not in ("dt_rank", "mixer_rms_eps", "d_state")}
    heads = {**both, "d_state": 6, "headdim": 12, "ngroups": 3, "chunk_size": 32, "dt_limit": (0.1, 7.0)}
    of_two = {**heads, "layer": "mamba2", "A_init_range": (2, 3.5), "rmsnorm": False, "norm_before_gate": True}
    of_three = {**heads, "layer": "mamba3", "mimo_rank": 2, "rope_fraction": 0.75, "A_floor": 1e-3}
    of_three = {k: v for k, v in of_three.items() if k not in Mamba3Config.absent}
    for options in (of_two, of_three):
        assert [f.name for f in dataclasses.fields(MambaConfig(**options)) if getattr(MambaConfig(**options), f.name) == f.default
                and f.name not in (*type(MambaConfig(**options)).absent, "layer")] == []
    for model in (small(), small(**changes), lively(**changes).bfloat16(), small(d_model=24).half(), small().double(), small(**of_two),
                  lively(**of_two).half(), lively(**of_three).bfloat16(), small(**of_three), small(**KINDS[1]), small(**KINDS[2])):
        model.save_pretrained(tmp_path)
        again = Mamba.from_pretrained(tmp_path)
        assert again.config == model.config and not again.training
        assert (again.lm_head.weight is again.backbone["embedding"].weight) == model.config.tie_embeddings
        assert again.num_params() == model.num_params() and all(p.requires_grad for p in again.parameters())
        for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters()):
            assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]   # no leftovers
    assert Mamba.from_pretrained(tmp_path, dropout=0.5, scan="chunked").config.dropout == 0.5
    with pytest.raises((TypeError, ValueError), match="dropuot"):
        Mamba.from_pretrained(tmp_path, dropuot=0.5)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["layer"])
def test_saved_without_mamba_files(tmp_path, monkeypatch, options):
    """Each layer, read back by mamba.py alone and beside it."""
    model, files = lively(**options), mamba.files
    for here in (None, files):
        monkeypatch.setattr(mamba, "files", here)
        if here is None:
            model.save_pretrained(tmp_path)
        again = Mamba.from_pretrained(tmp_path)
        assert again.config == model.config and torch.equal(logits(again), logits(model))


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("layout", ["mamba_ssm", "transformers"])
def test_a_full_disk_while_saving_weights(tmp_path, layout):
    import resource
    import signal
    small().save_pretrained(tmp_path, layout=layout)
    before, larger = tree(tmp_path), Mamba(MambaConfig(vocab_size=99, d_model=64, n_layer=2))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
        with pytest.raises(OSError):
            larger.save_pretrained(tmp_path, layout=layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert tree(tmp_path) == before


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
    nn.init.normal_(peer.backbone.embeddings.weight)
    expected = peer(tokens(2, 20)).logits[..., :70]
    assert relative(expected, logits(model)) > 0.1
    for name, more in (("one", {}), ("shards", {"max_shard_size": "20KB"})):
        peer.save_pretrained(tmp_path / name, **more)
        again = Mamba.from_pretrained(tmp_path / name)
        assert relative(logits(again), expected) < 1e-5 and again.config.norm_eps == 1e-4
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_layouts(tmp_path, hub, monkeypatch, layout):
    """Downloaded once into Hugging Face's cache, then found there; in a folder. No type but the one asked for."""
    model = lively()
    files = released(model, layout)
    hub.offer(files)
    loaded = Mamba.from_pretrained(NAME)
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.padded_vocab_size == 72
    assert loaded.config.vocab_size == (70 if layout == "mamba_ssm" else 72)
    snapshot = Path(mamba.files.hub_file(NAME, "config.json")).parent
    assert snapshot.parent.parent == tmp_path / "hub" / "models--state-spaces--mamba-tiny" and tree(snapshot) == files
    half = Mamba.from_pretrained(NAME, dtype=torch.bfloat16)
    for (name, p), expected in zip(half.named_parameters(), lively().bfloat16().parameters()):
        assert p.dtype == expected.dtype and torch.equal(p, expected), name
    Mamba.from_pretrained(NAME, cache_dir=tmp_path / "elsewhere")
    assert tree(tmp_path / "elsewhere").keys() >= {str(snapshot.relative_to(tmp_path / "hub") / name) for name in files}

    # without a network, without Hugging Face's cache, and where it may not be asked
    requests = len(hub.log)
    set_hub(monkeypatch, "http://127.0.0.1:1", offline=True)
    assert torch.equal(logits(Mamba.from_pretrained(NAME)), logits(model))
    set_hub(monkeypatch, cache=tmp_path / "empty")
    assert torch.equal(logits(Mamba.from_pretrained(NAME, cache_dir=tmp_path / "elsewhere")), logits(model))
    assert torch.equal(logits(Mamba.from_pretrained(snapshot)), logits(model))
    with pytest.raises(ConnectionError, match=f"{NAME}.*HF_HUB_OFFLINE"):
        Mamba.from_pretrained(NAME)
    assert len(hub.log) == requests


def test_files_that_cannot_be_found(tmp_path, hub, monkeypatch):
    hub.offer({"config.json": released(small())["config.json"]})
    (tmp_path / "folder").mkdir()
    for name, error, words in [(NAME, FileNotFoundError, "has no weights: none of pytorch_model.bin, model.safetensors"),
                               ("state-spaces/none", PermissionError, "state-spaces/none: .* no such model, or it needs a login"),
                               (tmp_path / "folder", FileNotFoundError, "config.json is missing"),
                               ("nothing", FileNotFoundError, "no folder nothing, and a name .* state-spaces/mamba-130m"),
                               ("../x", FileNotFoundError, "there is no folder ../x")]:
        with pytest.raises(error, match=words):
            Mamba.from_pretrained(name)
    for status in (401, 403):
        hub.statuses["someone/secret"] = status
        with pytest.raises(PermissionError, match="someone/secret.*HF_TOKEN"):
            Mamba.from_pretrained("someone/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    with pytest.raises(PermissionError, match="someone/secret"):
        Mamba.from_pretrained("someone/secret")
    assert hub.log[-1][2] == "Bearer hf_abc"
    hub.offer({"config.json": b"<html>Please log in</html>"}, "someone/page")
    with pytest.raises(ValueError, match="config.json is damaged"):
        Mamba.from_pretrained("someone/page")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)    # huggingface_hub tries it again after pauses
    set_hub(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match="state-spaces/none"):
        Mamba.from_pretrained("state-spaces/none")


@pytest.mark.parametrize("layout, changes, words", [
    ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba4"}}, "layer is 'Mamba4'; this model can only do 'Mamba1' or 'Mamba2' or 'Mamba3'"),
    ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba2"}}, r"pytorch_model.bin: .*mixer\..* is .*, and by its config.json"),
    ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba2", "dt_rank": 8}}, "option dt_rank in ssm_cfg"),
    ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "headdim must be a divisor of 64"),
    ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba3", "is_outproj_norm": True}}, "is_outproj_norm is True"),
    ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba3", "is_mimo": True, "mimo_rank": 1}}, "is_mimo is True and mimo_rank 1"),
    ("mamba_ssm", {"attn_layer_idx": [1]}, "attn_layer_idx is .1."), ("mamba_ssm", {"rms_norm": False}, "rms_norm is False"),
    ("mamba_ssm", {"ssm_cfg": {"headdim": 64}}, "option headdim in ssm_cfg"), ("mamba_ssm", {"d_model": 0}, "d_model must be"),
    ("mamba_ssm", {"d_model": 10 ** 12}, "no memory could hold"), ("mamba_ssm", {"d_model": 10 ** 30}, "no memory could hold"),
    ("mamba_ssm", {"ssm_cfg": {"d_state": 10 ** 12}}, r"A_log is \(64, 16\), and by its config.json \(64, 1000000000000\)"),
    ("mamba_ssm", {"d_model": None}, "config.json"), ("mamba_ssm", {"norm_eps": "x"}, "config.json"),
    ("hf", {"model_type": "jamba"}, "model_type is 'jamba'"), ("hf", {"model_type": "mamba2"}, "by its config.json|headdim must|ngroups must"),
    ("hf", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("mamba_ssm", {"n_layer": 2}, "pytorch_model.bin: backbone.layers.2.norm.weight is .*does not have it"),
    ("hf", {"num_hidden_layers": 4}, "lacks 10 of this model's tensors: .*, .*, .*, ...$"),
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
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                Mamba.from_pretrained(write(tmp_path / f"{layout}{i}", {**files, name: data}))
    for config in (b"[]", b"{", b"\xff", b'{"d_model": 8}', b'{"d_model":' * 100_000, b'{"d_model": 8, "dropout": "x"}'):
        with pytest.raises(ValueError, match="config.json"):
            Mamba.from_pretrained(write(tmp_path / "config", {**files, "config.json": config}))
    index, files = "model.safetensors.index.json", released(model, "hf, shards")
    for data in (b"{}", b"[" * 100_000, b'{"weight_map": ["a"]}'):
        with pytest.raises(ValueError, match="index.json is damaged"):
            Mamba.from_pretrained(write(tmp_path / "shards", {**files, index: data}))
    write(tmp_path, {"b.safetensors": files["model-00001-of-00003.safetensors"]})
    with pytest.raises((ValueError, FileNotFoundError)):    # no file of another folder is read
        Mamba.from_pretrained(write(tmp_path / "shards", {**files, index: b'{"weight_map": {"a": "../b.safetensors"}}'}))
    del files["model-00002-of-00003.safetensors"]
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors is missing"):
        Mamba.from_pretrained(write(tmp_path / "less", files))
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):    # its config says nothing of two tables
        Mamba.from_pretrained(write(tmp_path / "untied", released(model)))
    for key, tensor, words in (("norm_f.weight", torch.ones(32, dtype=torch.int8), "norm_f.weight is torch.int8"),
                               ("norm_f.weight", torch.ones(32).to(torch.float8_e5m2), "norm_f.weight is torch.float8_e5m2"),
                               ("norm_f.weight", torch.ones(32).to_sparse(), "norm_f.weight is torch.float32, torch.sparse_coo"),
                               ("norm_f.weight", torch.ones(32, device="meta"), "norm_f.weight is .*, on meta"),
                               ("norm_f.weight", torch.ones(1).expand(32), "norm_f.weight is .32,., but not all of it is there"),
                               ("norm_f.weight", 1.0, "'float' object has no attribute"), (7, torch.ones(3), "7|int")):
        weights = {**small().state_dict(), key if key == 7 else f"backbone.{key}": tensor}
        torch.save(weights, tmp_path / "untied" / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"pytorch_model.bin is damaged.*({words})"):
            Mamba.from_pretrained(tmp_path / "untied")
    torch.save(small().state_dict(), tmp_path / "untied" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        Mamba.from_pretrained(tmp_path / "untied")
    torch.save(model, tmp_path / "untied" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged.*holds something else than tensors.; if it was"):
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """From float32 to bfloat16. Of tensors there are the weights and no more; of the mapped file never all pages."""
    with torch.device("meta"):
        model = Mamba(MambaConfig(vocab_size=50277, d_model=512, n_layer=20))
    model.to_empty(device="cpu")
    model.lm_head.weight = model.backbone["embedding"].weight
    nn.init.constant_(model.lm_head.weight, math.nan)       # is saved as well
    model.save_pretrained(tmp_path)
    del model
    with Recorder() as recorded:
        model = Mamba.from_pretrained(tmp_path, dtype=torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    assert recorded.most_bytes < 1.01 * size
    del model, recorded
    gc.collect()
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    Mamba.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert peak() - before < size + 2 ** 27 + 40e6 < 3.1 * size


# ---------------------------------------------------------------------------------------------------------------------
# mamba2.py


def ssd_loop64(u, delta, A, B, C, D=None, delta_bias=None, state=None):
    """Mamba-2's recurrence once more, in float64 and by other means than mamba2.py: (y, last_state)."""
    u, delta, A, B, C, D, delta_bias, state = (None if t is None else t.double() for t in (u, delta, A, B, C, D, delta_bias, state))
    delta = delta if delta_bias is None else delta + delta_bias
    delta = torch.logaddexp(delta, torch.zeros_like(delta))
    h, ys, per_group = 0 if state is None else state, [], u.shape[2] // B.shape[2]
    groups = [head // per_group for head in range(u.shape[2])]
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t] * A)[:, :, None, None] * h
        h = h + torch.einsum("bh,bhp,bhn->bhpn", delta[:, t], u[:, t], B[:, t, groups])
        y = torch.einsum("bhpn,bhn->bhp", h, C[:, t, groups])
        ys.append(y if D is None else y + torch.einsum("h,bhp->bhp", D, u[:, t]))
    return torch.stack(ys, 1), h


def ssd_inputs(batch, length, heads, headdim, groups, d_state, dtype=torch.float32, seed=0):
    rand = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = {"u": rand(batch, length, heads, headdim), "delta": rand(batch, length, heads) - 2, "A": -torch.exp(rand(heads)),
              "B": rand(batch, length, groups, d_state), "C": rand(batch, length, groups, d_state), "D": rand(heads),
              "delta_bias": rand(heads), "state": rand(batch, heads, headdim, d_state)}
    return {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}


def check_ssd(inputs, tolerance=1e-5, **settings):
    """Outputs, last state and all gradients against the loop."""
    expected = ssd_loop64(**inputs)
    reference = gradients(*expected, inputs)
    for method in PLAIN:
        y, last = ssd(**inputs, delta_softplus=True, return_last_state=True, method=method, **settings)
        assert y.dtype == inputs["u"].dtype and last.dtype in (torch.float32, torch.float64)
        got = gradients(y, last, inputs)
        errors = {"y": relative(y, expected[0]), "last_state": relative(last, expected[1])}
        # these are sums of what may cancel: that of delta_bias of delta's, and those of A and delta where all is forgotten
        scales = {"delta_bias": reference["delta"].norm().item(), **dict.fromkeys(("A", "delta"), reference["u"].norm().item())}
        errors.update({name: relative(got[name], reference[name], scales.get(name, 0)) for name in inputs})
        bad = {name: error for name, error in errors.items() if not error < tolerance}
        assert not bad, (method, bad)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 64, 65, 130])
def test_ssd_equals_float64(length):
    for heads, headdim, groups, d_state, chunk_size in ((1, 1, 1, 1, 8), (4, 5, 1, 3, 8), (4, 3, 2, 16, 5), (3, 8, 3, 4, 64), (6, 2, 2, 3, 1)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            inputs = ssd_inputs(2, length, heads, headdim, groups, d_state, dtype)
            check_ssd(inputs, tolerance, chunk_size=chunk_size)
        for option in ("D", "delta_bias", "state"):
            check_ssd({k: v for k, v in inputs.items() if k != option}, 1e-12, chunk_size=chunk_size)


@pytest.mark.parametrize("method", PLAIN)
def test_ssd_gradcheck(method):
    """First and second derivatives."""
    inputs = ssd_inputs(2, 7, 2, 2, 1, 2, torch.float64)

    def run(*values):
        return ssd(**dict(zip(inputs, values)), delta_softplus=True, return_last_state=True, method=method, chunk_size=3)
    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 100.0, 1e5])
def test_ssd_of_extreme_decay(size, rare, chunk_size):
    """Steps that forget nothing or all, and rare ones that forget all amid those that forget little: no difference of sums
    loses what is small."""
    inputs = ssd_inputs(2, 300, 2, 3, 1, 4)
    steps = torch.rand(2, 300, 2, generator=torch.Generator().manual_seed(2)) * size
    if rare:
        steps = torch.where(torch.arange(300)[:, None] % 7 == 3, steps, 1e-3)
    inputs["delta"] = torch.where(steps > 15, steps, torch.log(torch.expm1(steps.clamp(max=15)) + 1e-38)).requires_grad_()
    inputs["A"] = torch.tensor([-1.0, -16.0]).requires_grad_()
    inputs.pop("delta_bias")
    check_ssd(inputs, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [8, 32])
def test_ssd_in_parts_of_any_length(chunk_size):
    """Any split; and by itself it goes over 64 chunks at a time."""
    inputs, each_step = ssd_inputs(2, 600, 2, 3, 1, 4), ("u", "delta", "B", "C")
    settings = {"delta_softplus": True, "return_last_state": True, "method": "chunked", "chunk_size": chunk_size}
    check_ssd(inputs, chunk_size=chunk_size)
    whole = ssd(**inputs, **settings)
    expected = gradients(*whole, inputs)
    for cuts in ((1,), (599,), (64, 65), (3, 260, 511)):
        ys, state = [], inputs["state"]
        for start, end in zip((0, *cuts), (*cuts, 600)):
            part = {k: v[:, start:end] if k in each_step else v for k, v in inputs.items()}
            y, state = ssd(**{**part, "state": state}, **settings)
            ys.append(y)
        y = torch.cat(ys, 1)
        assert relative(y, whole[0]) < 2e-6 and relative(state, whole[1]) < 2e-6
        got = gradients(y, state, inputs)
        assert all(relative(got[k], expected[k], expected["delta"].norm().item() if k == "delta_bias" else 0) < 1e-5 for k in inputs)


@pytest.mark.parametrize("method", PLAIN)
def test_ssd_of_16_bits(method):
    """float32 inside, under autocast too: the only error is the rounding of what comes out. The state stays float32."""
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        exact = ("A", "D", "delta_bias", "state")
        inputs = {k: v.detach().to(torch.float32 if k in exact else dtype) for k, v in ssd_inputs(2, 130, 4, 3, 2, 8).items()}
        expected = ssd_loop64(**inputs)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, last = ssd(**inputs, delta_softplus=True, return_last_state=True, method=method)
            assert y.dtype == dtype and last.dtype == torch.float32
            assert relative(y, expected[0]) < tolerance and relative(last, expected[1]) < 1e-5


def test_ssd_clamps_delta():
    inputs = ssd_inputs(1, 20, 2, 3, 1, 4)
    clamped = {**inputs, "delta": F.softplus(inputs["delta"] + inputs["delta_bias"]).clamp(0.1, 0.2), "delta_bias": None}
    for method in PLAIN:
        expected = ssd(**clamped, method=method)
        assert relative(ssd(**inputs, delta_softplus=True, dt_limit=(0.1, 0.2), method=method), expected) < 1e-6


def test_what_ssd_refuses():
    inputs = {k: v.detach() for k, v in ssd_inputs(2, 9, 4, 3, 2, 5).items()}
    for name, wrong in (("u", torch.ones(2, 9, 12)), ("delta", torch.ones(2, 9, 12)), ("A", torch.ones(4, 5)), ("B", torch.ones(2, 9, 3, 5)),
                        ("C", torch.ones(2, 9, 2, 4)), ("D", torch.ones(12)), ("state", torch.ones(2, 4, 5, 3)), ("mask", torch.ones(2, 8)),
                        ("mask", torch.ones(2, 9)), ("seq_idx", torch.ones(9)), ("C", torch.ones(2, 9, 2, 5) * 1j), ("method", "fast"), ("chunk_size", 257)):
        with pytest.raises(ValueError, match=rf"\b{name} "):
            ssd(**{**inputs, name: wrong})
    check_no_texts(ssd, inputs)
    for changes in ({"headdim": 7}, {"ngroups": 3}, {"chunk_size": 500}, {"scan": "fast"}, {"A_init_range": (0, 1)}, {"dt_limit": (1, 0.5)}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
            Mamba2Config(d_model=32, **changes)


TWO = ({}, {"ngroups": 2, "d_state": 5, "expand": 3, "headdim": 12, "d_conv": 3}, {"bias": True, "conv_bias": False, "chunk_size": 64},
       {"dt_limit": (0.1, 0.3), "headdim": 16, "scan": "sequential"})


def second(**changes):
    return Mamba2Config(**{"vocab_size": 70, "d_model": 32, "n_layer": 2, "headdim": 8, "d_state": 16, "chunk_size": 8, **changes})


def mamba2_model(**changes):
    """A model of Mamba-2 whose every weight matters."""
    torch.manual_seed(0)
    model = Mamba(second(**changes)).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else nn.init.uniform_(p, -2, 0.5)
    return model


def mamba2_of_transformers(config):
    transformers = pytest.importorskip("transformers")
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        vocab_size=config.padded_vocab_size, hidden_size=config.d_model, state_size=config.d_state, num_hidden_layers=config.n_layer,
        expand=config.expand, head_dim=config.headdim, num_heads=config.nheads, n_groups=config.ngroups, conv_kernel=config.d_conv,
        use_bias=config.bias, use_conv_bias=config.conv_bias, time_step_limit=config.dt_limit, chunk_size=16,
        layer_norm_epsilon=config.norm_eps, tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None)).eval()


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("changes", TWO)
def test_mamba2_equals_transformers(changes, length):
    """A block and a model: outputs, logits, loss and all gradients."""
    model = mamba2_model(**changes)
    peer, theirs = mamba2_of_transformers(model.config), lambda name: name.replace("embedding.", "embeddings.")
    peer.load_state_dict({theirs(name): p for name, p in model.state_dict().items()})
    block, peer_block, x = model.backbone["layers"][1].mixer, peer.backbone.layers[1].mixer, torch.randn(2, length, 32, requires_grad=True)
    results = []
    for one, own in ((block, block), (peer_block, block)):
        y, parameters = one(x), dict(one.named_parameters())
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *(parameters[name] for name, _ in own.named_parameters())])])
    assert same(*results, 1e-4)
    idx = tokens(3, length)
    assert relative(model(idx)[0], peer(idx).logits[..., :70]) < 1e-5
    model(idx, idx.roll(-1, 1))[1].backward()
    F.cross_entropy(peer(idx).logits[..., :70].flatten(0, 1), idx.roll(-1, 1).flatten()).backward()
    grads = {name: p.grad for name, p in peer.named_parameters()}
    for name, p in model.named_parameters():
        assert relative(p.grad, grads[theirs(name)], 1e-4 * grads[theirs("backbone.embedding.weight")].norm().item()) < 1e-4, name


@pytest.mark.parametrize("changes", TWO[:3])      # its step of a token forgets dt_limit
def test_mamba2_generates_as_transformers(changes):
    model = mamba2_model(vocab_size=80, **changes)
    peer, prompt = mamba2_of_transformers(model.config), tokens(2, 9)
    peer.load_state_dict({name.replace("embedding.", "embeddings."): p for name, p in model.state_dict().items()})
    expected = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    assert torch.equal(model.generate(list(prompt), 20, temperature=0)[1], expected[1])


def test_mamba2_initialisation():
    torch.manual_seed(0)
    block = Mamba2Block(Mamba2Config(d_model=2048, headdim=4, d_state=1, dt_min=0.002, dt_max=0.05))
    for _ in range(2):
        A, dt = torch.exp(block.A_log), F.softplus(block.dt_bias).log()
        quarter = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
        assert (A.quantile(quarter) - (1 + 15 * quarter)).abs().max() < 1
        low, high = math.log(0.002), math.log(0.05)
        assert (dt.quantile(quarter) - (low + (high - low) * quarter)).abs().max() < 0.2
        assert torch.equal(block.D, torch.ones(1024)) and torch.equal(block.norm.weight, torch.ones(4096))
        assert block.dt_bias._no_reinit and all(p._no_weight_decay for p in (block.A_log, block.D, block.dt_bias))
        for p in block.parameters():
            nn.init.zeros_(p)
        block.reset_parameters()


@pytest.mark.parametrize("changes", [{}, {"ngroups": 2}, {"norm_before_gate": True}, {"norm_before_gate": True, "ngroups": 4},
                                     {"rmsnorm": False}])
def test_gate_and_norm_of_mamba2(changes):
    """As mamba_ssm's RMSNormGated computes it, group by group, and after the gate or before it."""
    block, x = mamba2_model(**changes).backbone["layers"][0].mixer, torch.randn(2, 9, 32)
    seen = {}
    block.in_proj.register_forward_hook(lambda module, given, y: seen.update(z=y[..., :64]))
    block.out_proj.register_forward_pre_hook(lambda module, given: seen.update(normed=given[0]))
    norm = block.norm if block.config.rmsnorm else None
    if norm is not None:
        norm.register_forward_pre_hook(lambda module, given: seen.update(y=given[0]))
    block(x)
    gate = seen["z"] * torch.sigmoid(seen["z"])
    if norm is None:
        plain = copy.deepcopy(block)
        plain.out_proj = nn.Identity()
        assert "norm.weight" not in block.state_dict() and same(seen["normed"], plain(x), 1e-6)
        return
    y = seen["y"] if norm.norm_before_gate else seen["y"] * gate
    groups = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in y.chunk(norm.groups, -1)]
    expected = torch.cat(groups, -1) * norm.weight * (gate if norm.norm_before_gate else 1)
    assert relative(seen["normed"], expected) < 1e-5


def test_what_stays_float32_in_mamba2():
    model, idx = mamba2_model(), tokens(2, 30)
    expected = model(idx)[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.bfloat16()
    for name, p in model.named_parameters():
        exact = name.endswith(("A_log", ".D", "dt_bias"))
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert not exact or torch.equal(p, before[name])
    logits, _, state = model(idx, state=model.init_state(2))
    assert all(layer.h.dtype == torch.float32 and layer.conv.dtype == torch.bfloat16 for layer in state)
    assert logits.dtype == torch.bfloat16 and relative(logits, expected) < 0.05
    assert model.backbone["layers"][0].mixer.dt_bias._no_reinit
    assert model.double().backbone["layers"][0].mixer.A_log.dtype == torch.float64


def test_one_graph_of_mamba2_for_all_lengths():
    """torch.compile(fullgraph=True), and few compilations for many lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch.compiler.reset()
    block, counter = mamba2_model().backbone["layers"][0].mixer, CompileCounterWithBackend("eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in (5, 20, 64, 100, 257):
        x = torch.randn(2, length, 32, requires_grad=True)
        results = [[y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])] for y in (block(x), compiled(x))]
        assert same(*results, 1e-5)
    assert counter.frame_count <= 3


def test_export_of_mamba2():
    """torch.export with any batch: of a sequence, and of the step of a token, which takes and returns states."""
    block, batch = mamba2_model().backbone["layers"][0].mixer, torch.export.Dim("batch", min=2)
    for length in (1, 20):
        state = some_state(block, 3)
        exported = torch.export.export(block, (torch.randn(3, length, 32), state),
                                       dynamic_shapes=({0: batch}, tree_map(lambda t: {0: batch}, state))).module()
        for rows in (2, 5):
            inputs = torch.randn(rows, length, 32), some_state(block, rows)
            assert same(exported(*inputs), block(*inputs), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# mamba3.py


def mamba3_loop64(block, x, state):
    """Mamba-3 step by step, in float64, from the formulas of the paper and by other means than mamba3.py: (y, state)."""
    c, p = block.config, {name: p.double() for name, p in block.named_parameters()}
    R, G, N, H, P, S = c.mimo_rank, c.ngroups, c.d_state, c.nheads, c.headdim, int(c.d_state * c.rope_fraction) // 2
    (theta, h, k_before, x_before), groups, ys = (t.double() for t in state), [head // (H // G) for head in range(H)], []
    ones = torch.ones(H, 1, P, dtype=torch.float64)
    mimo_x, mimo_z, mimo_o = (p.get(name, ones) for name in ("mimo_x", "mimo_z", "mimo_o"))
    ranks = lambda t, mimo: torch.einsum("bhp,hrp->brhp", t, mimo)
    outer = lambda x, k: torch.einsum("brhp,brhn->bhpn", x, k)

    def key(t, name):
        t = t.view(-1, R, G, N)
        t = t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-5) * p[f"{name}_norm.weight"]
        columns = list((t[:, :, groups] + p[f"{name}_bias"].transpose(0, 1)).unbind(-1))
        for i in range(S):
            one, other = (2 * i, 2 * i + 1) if R == 1 else (i, i + N // 2)
            cos, sin = torch.cos(theta[:, None, :, i]), torch.sin(theta[:, None, :, i])
            columns[one], columns[other] = columns[one] * cos - columns[other] * sin, columns[one] * sin + columns[other] * cos
        return torch.stack(columns, -1)
    for x_t in x.double().unbind(1):
        parts = (x_t @ p["in_proj.weight"].T).split([H * P, H * P, R * G * N, R * G * N, H, H, H, S], -1)
        z, u, B, C, dt, A, trap, angles = parts
        delta, lam = torch.logaddexp(dt + p["dt_bias"], torch.zeros(())), torch.sigmoid(trap)
        A = torch.minimum(-torch.where(A >= 0, 1 + A, 1 / (1 - A.clamp(max=0))), torch.tensor(-c.A_floor, dtype=torch.float64))
        alpha = torch.exp(delta * A)
        beta, gamma = (1 - lam) * delta * alpha, lam * delta
        theta = (theta + math.pi * torch.tanh(angles)[:, None] * delta[..., None]) % (2 * math.pi)
        k, q, u, z = key(B, "B"), key(C, "C"), u.view(-1, H, P), z.view(-1, H, P)
        x_r, z_r = ranks(u, mimo_x), ranks(z, mimo_z)
        h = alpha[..., None, None] * h + beta[..., None, None] * outer(ranks(x_before, mimo_x), k_before)
        h = h + gamma[..., None, None] * outer(x_r, k)
        y = torch.einsum("bhpn,brhn->brhp", h, q) + p["D"][:, None] * x_r
        ys.append(torch.einsum("brhp,hrp->bhp", y * z_r * torch.sigmoid(z_r), mimo_o).flatten(1) @ p["out_proj.weight"].T)
        x_before, k_before = u, k
    return torch.stack(ys, 1), (theta, h, k_before, x_before)


def mamba3_block(**changes):
    torch.manual_seed(0)
    block = Mamba3Block(Mamba3Config(**{"d_model": 16, "headdim": 8, "d_state": 12, "chunk_size": 16, **changes}))
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return block


@pytest.mark.parametrize("length", [1, 2, 37, 100])
@pytest.mark.parametrize("scan", PLAIN)
@pytest.mark.parametrize("changes", [{}, {"ngroups": 2, "rope_fraction": 1.0}, {"mimo_rank": 4}, {"mimo_rank": 3, "ngroups": 2, "chunk_size": 5}])
def test_mamba3_equals_float64(changes, scan, length):
    """Outputs, states and all gradients, of the state too."""
    block = mamba3_block(scan=scan, **changes)
    x, state = torch.randn(2, length, 16, requires_grad=True), type(block.init_state(2))(*(t.requires_grad_() for t in some_state(block, 2)))
    leaves, results = [x, *state, *block.parameters()], []
    for y, after in (block(x, state), mamba3_loop64(block, x, state)):
        y, after = y.double(), [t.double() for t in after]
        loss = sum((t * at_random(torch.randn, t.shape)).sum() for t in (y, *after[1:]))
        results.append([y, *after, *torch.autograd.grad(loss, leaves)])
    assert same(*results, 1e-5)


@pytest.mark.parametrize("changes", [{}, {"mimo_rank": 2}])
def test_mamba3_gradcheck(changes):
    block = mamba3_block(d_state=4, headdim=16, chunk_size=3, **changes).double()
    x, state = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True), some_state(block, 1)
    run = lambda x, h: block(x, state._replace(h=h))[0]
    assert torch.autograd.gradcheck(run, (x, state.h.requires_grad_()), fast_mode=True)


def test_angles_of_a_long_text_stay_exact():
    block, x = mamba3_block(n_layer=1), torch.randn(1, 6000, 16) * 3
    with torch.no_grad():
        state, exact = block.init_state(1), copy.deepcopy(block).double()
        _, after = block(x, state)
        _, expected = exact(x.double(), exact.init_state(1))
    turn = torch.exp(1j * after.theta.double()) - torch.exp(1j * expected.theta)
    assert turn.abs().max() < 1e-3      # delta itself has an error of 1e-7 at each step


def test_mamba3_in_16_bits():
    """delta's bias, D and the state stay float32."""
    for rank in (1, 3):
        block, x = mamba3_block(mimo_rank=rank), torch.randn(2, 50, 16)
        expected = block(x)
        block.bfloat16()
        y, after = block(x.bfloat16(), block.init_state(2))
        assert block.dt_bias.dtype == block.D.dtype == torch.float32 and block.B_bias.dtype == torch.bfloat16
        assert y.dtype == torch.bfloat16 and relative(y, expected) < 0.05 and all(t.dtype == torch.float32 for t in after)


# ---------------------------------------------------------------------------------------------------------------------
# mamba_files.py: what transformers reads, runs of train.py, damage

def test_mamba_files_saves_with_mamba_alone(tmp_path):
    for name in ("mamba.py", "mamba_files.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = """
from mamba import Mamba, MambaConfig
model = Mamba(MambaConfig(vocab_size=10, d_model=16, n_layer=1))
model.save_pretrained("saved")
read = Mamba.from_pretrained("saved").state_dict()
assert all((read[k] == v).all() for k, v in model.state_dict().items())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True, env=environment())
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("changes", [
    {}, {"tie_embeddings": False}, {"bias": True, "conv_bias": False, "pad_vocab_size_multiple": 16},
    {"d_state": 3, "d_conv": 2, "expand": 3, "dt_rank": 5, "norm_eps": 1e-3, "dropout": 0.2, "scan": "sequential"},
    {"mixer_rms_eps": 1e-2, "d_state": 5}, KINDS[1],
    {**KINDS[1], "ngroups": 2, "expand": 3, "headdim": 12, "bias": True, "tie_embeddings": False, "A_init_range": (2, 3), "norm_eps": 1e-3}])
def test_transformers_loads_what_is_saved_for_it(tmp_path, changes):
    """By the folder alone: its config.json says all that the model is, and token 0 does not end its texts. And back."""
    transformers = pytest.importorskip("transformers")
    model = lively(n_layer=2, **changes)
    model.save_pretrained(tmp_path / "a" / "b", layout="transformers")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert len({p.stat().st_mode for p in (tmp_path / "a" / "b").iterdir()}) == 1
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "b", output_loading_info=True)
    assert not any(info.values()) and theirs.dtype == torch.float32
    assert theirs.lm_head.weight.shape == (70, 32)      # no padding rows
    idx, (ours, _) = tokens(2, 30), model(tokens(2, 30))
    assert torch.allclose(theirs.eval()(idx).logits, ours, atol=1e-4)
    assert torch.equal(theirs.generate(idx, max_new_tokens=20, do_sample=False), model.generate(idx, 20, temperature=0))
    again = Mamba.from_pretrained(tmp_path / "a" / "b")
    assert again.config == dataclasses.replace(model.config, pad_vocab_size_multiple=1)
    assert torch.equal(again(idx)[0], ours)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert torch.equal(Mamba.from_pretrained(tmp_path / "theirs")(idx)[0], ours)
    with safetensors_file(tmp_path / "a" / "b" / "model.safetensors") as file:
        assert file.metadata() == {"format": "pt"}
        keys = list(file.keys())
    assert ("lm_head.weight" in keys) == (not model.config.tie_embeddings)


# config.json of state-spaces/mamba2-130m, mamba3-siso-187m and mamba3-mimo-187m
OF_ALL = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
          "attn_layer_idx": [], "attn_cfg": {}}
OF_THREE = {"layer": "Mamba3", "d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1, "rope_fraction": 0.5, "dt_min": 0.001, "dt_max": 0.1,
            "dt_init_floor": 1e-4, "A_floor": 1e-4, "chunk_size": 64, "is_mimo": False, "is_outproj_norm": False}
SUCCESSORS = {
    "mamba2-130m": {"d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}, **OF_ALL},
    "mamba3-siso-187m": {"d_model": 768, "d_intermediate": 1536, "n_layer": 12, "vocab_size": 128256, "ssm_cfg": OF_THREE, **OF_ALL},
    "mamba3-mimo-187m": {"d_model": 768, "d_intermediate": 1264, "n_layer": 12, "vocab_size": 128256, **OF_ALL,
                         "ssm_cfg": {**OF_THREE, "is_mimo": True, "mimo_rank": 4, "chunk_size": 16}}}
# shapes of a layer at these sizes, and the number of all parameters
IN_ALL = {"norm.weight": (768,), "mixer.out_proj.weight": (768, 1536), "mixer.dt_bias": (24,), "mixer.D": (24,)}
IN_THREE = {**IN_ALL, "norm2.weight": (768,), "mixer.B_norm.weight": (128,), "mixer.C_norm.weight": (128,)}
AT_FULL_SIZE = {
    "mamba2-130m": (128_989_632, {**IN_ALL, "mixer.in_proj.weight": (3352, 768), "mixer.conv1d.weight": (1792, 1, 4), "mixer.conv1d.bias": (1792,),
                                  "mixer.A_log": (24,), "mixer.norm.weight": (1536,)}),
    "mamba3-siso-187m": (186_849_600, {**IN_THREE, "mixer.in_proj.weight": (3432, 768), **dict.fromkeys(("mixer.B_bias", "mixer.C_bias"), (24, 1, 128)),
                                       "mlp.fc1.weight": (3072, 768), "mlp.fc2.weight": (768, 1536)}),
    "mamba3-mimo-187m": (187_291_968, {**IN_THREE, "mixer.in_proj.weight": (4200, 768), **dict.fromkeys(("mixer.B_bias", "mixer.C_bias"), (24, 4, 128)),
                                       **dict.fromkeys(("mixer.mimo_x", "mixer.mimo_z", "mixer.mimo_o"), (24, 4, 64)),
                                       "mlp.fc1.weight": (2560, 768), "mlp.fc2.weight": (768, 1280)})}


@pytest.mark.parametrize("name", SUCCESSORS)
def test_released_successors(tmp_path, name):
    """Keys and shapes at full size; and small weights in exactly such files, in 16 bits, where what is exact is float32 or is not."""
    (tmp_path / "config.json").write_text(json.dumps(SUCCESSORS[name]))
    options = mamba.files.read_options(tmp_path / "config.json")
    width = options.pop("d_intermediate")
    with torch.device("meta"):
        model = Mamba(MambaConfig(**options, d_intermediate=width + -width % 128))
    number, shapes = AT_FULL_SIZE[name]
    rows, d_model, n_layer = model.config.padded_vocab_size, 768, SUCCESSORS[name]["n_layer"]
    assert {k: tuple(t.shape) for k, t in model.state_dict().items()} == {
        "backbone.embedding.weight": (rows, d_model), "lm_head.weight": (rows, d_model), "backbone.norm_f.weight": (d_model,),
        **{f"backbone.layers.{i}.{k}": shape for i in range(n_layer) for k, shape in shapes.items()}}
    assert model.num_params() == number and rows == {50277: 50288, 128256: 128256}[options["vocab_size"]]

    config = {**SUCCESSORS[name], "d_model": 64, "n_layer": 2, "vocab_size": 70, "d_intermediate": width and 40}
    given = {**options, "d_model": 64, "n_layer": 2, "vocab_size": 70, "d_intermediate": width and 128}
    for p in (model := Mamba(MambaConfig(**given)).eval()).parameters():
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else nn.init.uniform_(p, -2, 0.5)
    weights = model.bfloat16().state_dict()
    exact = {k: t.float() if k.endswith(("A_log", "dt_bias", ".D")) else t for k, t in weights.items()}
    for saved in (exact, {k: t.bfloat16() for k, t in weights.items()}):
        torch.save(saved, data := io.BytesIO())
        loaded = Mamba.from_pretrained(write(tmp_path / "small", {"config.json": json.dumps(config).encode(), "pytorch_model.bin": data.getvalue()}))
        assert loaded.config == model.config and loaded.config.residual_in_fp32
        for key, t in loaded.state_dict().items():
            assert t.dtype == exact[key].dtype and torch.equal(t, saved[key].to(t.dtype)), key
    assert relative(loaded(tokens(2, 20))[0].float(), model(tokens(2, 20))[0].float()) < 0.03
    if name.startswith("mamba3"):
        (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "vocab_size": 128256}))
        with pytest.raises(FileNotFoundError, match="no tokenizer.json, and its vocabulary of 128,256 is not GPT-NeoX's: .*Llama-3.1's"):
            mamba.files.read_tokenizer(tmp_path / "small")


def test_falcon_mamba_as_released(tmp_path):
    """In several files, and with an expand that is not the one of its weights; what is left out is as in transformers."""
    model = lively(vocab_size=72, mixer_rms_eps=1e-6, tie_embeddings=False, residual_in_fp32=True)
    files = released(model, "hf, shards")
    config = {**json.loads(files["config.json"]), "model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"], "expand": 16}
    config = {k: v for k, v in config.items() if k not in ("d_model", "n_layer", "d_inner", "ssm_cfg", "pad_vocab_size_multiple")}
    with pytest.raises(ValueError, match="lacks 1 of this model's tensors: lm_head.weight"):      # released() leaves it out
        Mamba.from_pretrained(write(tmp_path, {**files, "config.json": json.dumps({**config, "tie_word_embeddings": False}).encode()}))
    model.lm_head.weight = model.backbone["embedding"].weight
    loaded = Mamba.from_pretrained(write(tmp_path, {**files, "config.json": json.dumps(config).encode()}))
    assert loaded.config.mixer_rms_eps == 1e-6 and loaded.config.expand == 2 and torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="intermediate_size is not a multiple"):
        Mamba.from_pretrained(write(tmp_path, {**files, "config.json": json.dumps({**config, "intermediate_size": 65}).encode()}))


def test_mamba2_of_transformers_as_others_write_it(tmp_path):
    """With a bare Infinity; and what its config.json leaves out is as there, but nothing of that is in the layout of mamba_ssm."""
    model = lively(**KINDS[1], n_layer=1)
    model.save_pretrained(tmp_path, layout="transformers")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, math.inf] and '"num_heads": 8' in (tmp_path / "config.json").read_text()
    for change, right in (({}, True), ({"chunk_size": 256, "rms_norm": True}, True), ({"time_step_limit": None}, True), ({"n_groups": None}, False),
                          ({"tie_word_embeddings": None}, False)):
        changed = {k: v for k, v in {**config, **change}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        if right:
            assert relative(Mamba.from_pretrained(tmp_path)(tokens(2, 20))[0], model(tokens(2, 20))[0]) < 1e-5
        else:
            with pytest.raises(ValueError, match="ngroups must be a divisor of 8|by its config.json|lacks 1 of"):
                Mamba.from_pretrained(tmp_path)


def safetensors_file(path):
    return pytest.importorskip("safetensors").safe_open(path, framework="pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_for_transformers(tmp_path, dtype):
    """What is float32 in a model of 16 bits stays so in the file."""
    transformers = pytest.importorskip("transformers")
    model = lively(n_layer=1).to(dtype)
    model.save_pretrained(tmp_path, layout="transformers")
    again = Mamba.from_pretrained(tmp_path)
    for (name, p), expected in zip(again.backbone["layers"].named_parameters(), model.backbone["layers"].parameters()):
        assert p.dtype == expected.dtype and torch.equal(p, expected), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype and relative(theirs(tokens(2, 20)).logits, model(tokens(2, 20))[0]) < 0.05


@pytest.mark.parametrize("layout", ["mamba_ssm", "transformers"])
@pytest.mark.parametrize("change, words", [
    (lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.randn(72, 32))), "the head is not the embedding"),
    (lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), "has lm_head.0.weight|lacks lm_head.weight"),
    (lambda model: setattr(model, "lm_head", nn.Identity()), "lacks lm_head.weight"),
    (lambda model: setattr(model.backbone["layers"][1], "norm", nn.LayerNorm(32)), "has backbone.layers.1.norm.bias"),
    (lambda model: setattr(model.backbone["layers"][0].mixer, "out_proj", nn.Linear(64, 32)),
     "has backbone.layers.0.mixer.out_proj.bias"),
    (lambda model: nn.utils.parametrizations.weight_norm(model.backbone["layers"][0].mixer.in_proj),
     "has backbone.layers.0.mixer.in_proj.param")])
def test_only_what_readers_know_is_saved(tmp_path, change, words, layout):
    """Nothing of the model is left out in silence."""
    model = lively()
    change(model)
    with pytest.raises(ValueError, match=f"^[^\n]*({words})[^\n]*$"):
        model.save_pretrained(tmp_path / "new", layout=layout)
    assert not (tmp_path / "new").exists()


def test_layouts_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="^the Mamba of transformers has no MLP, but d_intermediate is 40$"):
        lively(d_intermediate=40).save_pretrained(tmp_path / "new", layout="transformers")
    for changes, words in (({"norm_before_gate": True}, "its norm behind"), ({"rmsnorm": False}, "its norm behind"), (KINDS[2], "no Mamba-3")):
        with pytest.raises(ValueError, match=f"^[^\n]*transformers has {words}|^[^\n]*of transformers has {words}"):
            lively(**{**KINDS[1], **changes}).save_pretrained(tmp_path / "new", layout="transformers")
    with pytest.raises(ValueError, match="^layout must be 'mamba_ssm' or 'transformers', not 'gguf'$"):
        lively().save_pretrained(tmp_path / "new", layout="gguf")
    assert not (tmp_path / "new").exists()
    for one, other, holds in (("mamba_ssm", "transformers", "pytorch_model.bin"),
                              ("transformers", "mamba_ssm", "model.safetensors")):
        lively().save_pretrained(tmp_path / one, layout=one)
        before = tree(tmp_path / one)
        with pytest.raises(FileExistsError, match=f"holds {holds}, .*choose another folder"):
            small().save_pretrained(tmp_path / one, layout=other)
        assert tree(tmp_path / one) == before
        small().save_pretrained(tmp_path / one, layout=one)     # in its own place it is written again
        assert tree(tmp_path / one).keys() == before.keys() and tree(tmp_path / one) != before


def test_a_head_untied_by_hand_is_saved_if_the_config_says_so(tmp_path):
    for layout in ("mamba_ssm", "transformers"):
        model = lively()
        model.lm_head.weight = nn.Parameter(torch.randn(72, 32))
        model.config.tie_embeddings = False
        model.save_pretrained(tmp_path / layout, layout=layout)
        assert torch.equal(logits(Mamba.from_pretrained(tmp_path / layout)), logits(model))


def test_residual_in_fp32_of_files(tmp_path):
    """On for released weights that say nothing of it, else as the file says."""
    for layout in LAYOUTS:
        files = released(lively(), layout)
        config = json.loads(files["config.json"])
        for said, expected in ((None, True), (True, True), (False, False)):
            config["residual_in_fp32"] = said
            files["config.json"] = json.dumps({k: v for k, v in config.items() if v is not None}).encode()
            assert Mamba.from_pretrained(write(tmp_path / layout, files)).config.residual_in_fp32 is expected
    for layout, value in itertools.product(("mamba_ssm", "transformers"), (True, False)):
        folder = tmp_path / f"{layout}, {value}"
        lively(residual_in_fp32=value).save_pretrained(folder, layout=layout)
        assert Mamba.from_pretrained(folder).config.residual_in_fp32 is value


def test_a_run_is_loaded_as_a_model(finished, tmp_path):
    """The best checkpoint of a run's folder, else the last; or the one that is named."""
    run = finished / "run"
    later = load(run / "ckpt.pt")
    later["model"]["backbone.norm_f.weight"] += 1
    torch.save(later, run / "ckpt.pt")
    best, last = (runs.load_model(load(run / name)).eval() for name in ("best.pt", "ckpt.pt"))
    idx = tokens(2, 20, vocab=best.config.vocab_size)
    for name, expected in ((run, best), (str(run), best), (run / "best.pt", best), (run / "ckpt.pt", last)):
        loaded = Mamba.from_pretrained(name)
        assert loaded.config == expected.config and not loaded.training
        assert torch.equal(loaded(idx)[0], expected(idx)[0])
    assert loaded.lm_head.weight is loaded.backbone["embedding"].weight
    assert not torch.equal(best(idx)[0], last(idx)[0])
    (run / "best.pt").unlink()
    assert torch.equal(Mamba.from_pretrained(run)(idx)[0], last(idx)[0])
    (run / "ckpt.pt").rename(run / "ckpt.prev.pt")      # all that is left by a crash at the wrong moment
    assert torch.equal(Mamba.from_pretrained(run)(idx)[0], last(idx)[0])
    last.save_pretrained(run)
    shutil.copy(run / "ckpt.prev.pt", run / "best.pt")
    (run / "best.pt").write_bytes(b"")
    assert torch.equal(Mamba.from_pretrained(run)(idx)[0], last(idx)[0])    # a folder of weights before all


def test_damaged_runs(tmp_path):
    model = small(n_layer=1)
    config = dataclasses.asdict(model.config)
    checkpoint = {"model": model.state_dict(), "model_config": config}
    for i, (data, words) in enumerate([
            (b"", "EOFError|mmap"), (b"text", "mmap"), ([1], "TypeError"), ({"model": checkpoint["model"]}, "model_config"),
            ({**checkpoint, "model": {}}, "lacks"), ({**checkpoint, "model_config": {}}, "and by its config"),
            ({**checkpoint, "model_config": {**config, "d_model": True}}, "d_model is True"),
            ({**checkpoint, "model_config": {**config, "d_model": 16}}, "and by its config"),
            ({**checkpoint, "model_config": {**config, "heads": 8}}, "heads"),
            ({**checkpoint, "model_config": {**config, "n_layer": 10 ** 6}}, "n_layer is 1000000, but the weights have 1 layers")]):
        run = tmp_path / str(i)
        run.mkdir()
        if isinstance(data, bytes):
            (run / "best.pt").write_bytes(data)
        else:
            torch.save(data, run / "best.pt")
        with pytest.raises(ValueError, match=f"^[^\n]*({words})[^\n]*$"):
            Mamba.from_pretrained(run)
    torch.save(checkpoint, tmp_path / "best.pt")
    data = bytearray((tmp_path / "best.pt").read_bytes())
    data[data.index(model.lm_head.weight.detach().numpy().tobytes()) + 50] ^= 4
    (tmp_path / "best.pt").write_bytes(data)
    with pytest.raises(ValueError, match="best.pt is damaged"):
        Mamba.from_pretrained(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path):
    """All that is used of pytorch_model.bin is under a checksum; the rest (padding, dates) does not matter."""
    model = small(n_layer=1, d_model=8, d_state=2, vocab_size=9)
    model.save_pretrained(tmp_path)
    path, expected = tmp_path / "pytorch_model.bin", model.state_dict()
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        # a record begins where its header of 30 bytes, its name and its padding end
        starts = {info.header_offset: info for info in archive.infolist()}
        used = {}
        for start, info in starts.items():
            begin = start + 30 + sum(struct.unpack_from("<HH", data, start + 26))
            used.update(dict.fromkeys(range(begin, begin + info.file_size), info.filename))
    rng, noticed = random.Random(0), 0
    for position in sorted(rng.sample(sorted(used), 150) + rng.sample(sorted(set(range(len(data))) - used.keys()), 150)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = Mamba.from_pretrained(tmp_path).state_dict()
        except ValueError as error:
            assert "pytorch_model.bin is damaged" in str(error) and "\n" not in str(error)
            noticed += 1
        else:
            assert position not in used, f"{used[position]} at {position}"
            assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert noticed > 200


def test_what_pytorch_reads_otherwise_than_zipfile(tmp_path):
    """What is marked as a folder it does not read, so that its numbers are any; what is compressed it maps as it is; of two names it takes one."""
    small(n_layer=1, d_model=8, d_state=2, vocab_size=9).save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts, at = {part.filename: archive.read(part) for part in archive.infolist()}, archive.start_dir

    def assert_refused(words):
        for load in (read_whole, lambda path: Mamba.from_pretrained(path.parent)):
            with pytest.raises(ValueError, match=words):
                load(path)
    for name in parts:
        path.write_bytes(data[:at + 38] + b"\x10" + data[at + 39:])     # of 46 bytes about this part, and its name
        assert_refused("a part is marked as a folder: " + name)
        at += 46 + len(name)
    one = "pytorch_model/data/0"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == one else zipfile.ZIP_STORED)
    assert_refused("a part is compressed: " + one)
    path.write_bytes(data.replace(parts[one], bytes(len(parts[one]))))
    assert_refused("a part is damaged: Bad CRC-32")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(one, parts[one])
    assert_refused("a part is damaged: Bad CRC-32")


@pytest.mark.parametrize("kind, change", [
    ("data after the last tensor", lambda header, data: (header, data + b"\0" * 4)),
    ("a hole", lambda header, data: ({**header, "z": entry(len(data) + 4)}, data + b"\0" * 8)),
    ("two tensors in one place", lambda header, data: ({**header, "z": entry(len(data) - 4)}, data)),
    ("an end before the last tensor's", lambda header, data: (header, data[:-4])),
    ("more than the format has", lambda header, data: ({k: {**v, "scale": 2} for k, v in header.items()}, data)),
    ("less", lambda header, data: ({k: {"shape": v["shape"], "dtype": v["dtype"]} for k, v in header.items()}, data)),
    ("another type", lambda header, data: ({k: {**v, "dtype": "F7"} for k, v in header.items()}, data)),
    ("a shape that does not fit", lambda header, data: ({k: {**v, "shape": [1]} for k, v in header.items()}, data)),
    ("a name twice", lambda header, data: (json.dumps(header)[:-1] + "," + json.dumps(header)[1:], data)),
    ("a key twice", lambda header, data: (json.dumps(header).replace('"dtype": ', '"dtype": "I8", "dtype": '), data)),
    ("no JSON", lambda header, data: (json.dumps(header) + "\0", data)),
    ("a list", lambda header, data: (json.dumps([header]), data)), ("a number", lambda header, data: ("7", data))])
def test_odd_headers_of_safetensors(tmp_path, kind, change):
    files = released(small(n_layer=1), "hf")
    size = int.from_bytes(files["model.safetensors"][:8], "little")
    header, data = json.loads(files["model.safetensors"][8:8 + size]), files["model.safetensors"][8 + size:]
    metadata = {"__metadata__": header.pop("__metadata__")}

    def load_changed(header, data):
        header = (header if isinstance(header, str) else json.dumps({**metadata, **header})).encode()
        files["model.safetensors"] = struct.pack("<Q", len(header)) + header + data
        return Mamba.from_pretrained(write(tmp_path, files))
    load_changed(header, data)
    with pytest.raises(ValueError, match="^[^\n]*model.safetensors is damaged[^\n]*$"):
        load_changed(*change(header, data))


def entry(start):
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, start + 4]}


ABSURD = [{"n_layer": 10 ** 6}, {"vocab_size": 10 ** 400}, {"n_layer": 10 ** 400}, {"d_model": 10 ** 400},
          {"ssm_cfg": {"expand": 10 ** 400}}, {"ssm_cfg": {"d_state": 10 ** 18}}, {"vocab_size": -10 ** 30}, {"vocab_size": 2 ** 62},
          {"d_model": 2 ** 40, "ssm_cfg": {"expand": 2 ** 40}}, {"vocab_size": float("nan")}, {"d_model": float("inf")},
          {"norm_eps": float("nan")}, {"norm_eps": float("inf")}, {"norm_eps": True}, {"norm_eps": 10 ** 400},
          {"d_model": 32.0}, {"n_layer": True}, {"n_layer": "3"}, {"n_layer": [3]}, {"tie_embeddings": "yes"},
          {"tie_embeddings": 1}, {"ssm_cfg": {"conv_bias": "no"}}, {"ssm_cfg": {"dt_rank": "many"}}, {"ssm_cfg": {"dt_max": None}},
          {"ssm_cfg": {"dt_init_floor": 1e300}}, {"pad_vocab_size_multiple": 10 ** 15}, {"scan": 7}, {"dropout": "0"},
          *({"ssm_cfg": {"layer": "Mamba2", **wrong}} for wrong in (
              {"headdim": 10 ** 400}, {"d_state": 10 ** 17}, {"dt_limit": "x"}, {"dt_limit": [0, float("nan")]}, {"A_init_range": [1, 10 ** 400]},
              {"A_init_range": [1, float("inf")]}, {"A_init_range": 3}, {"chunk_size": 10 ** 6}, {"rmsnorm": "no"}, {"layer": ["Mamba2"]})),
          {"ssm_cfg": {"layer": "Mamba3", "is_mimo": True, "mimo_rank": 10 ** 17}}]


@pytest.mark.parametrize("changes", ABSURD, ids=lambda changes: json.dumps(changes)[:40])
def test_absurd_configs_end_soon_and_in_one_line(tmp_path, call, changes):
    files = released(small())
    config = json.loads(files["config.json"])
    files["config.json"] = json.dumps({**config, **changes}).encode()
    folder = write(tmp_path / "weights", files)
    began = time.monotonic()
    with pytest.raises(ValueError, match="^[^\n]*$") as raised:
        Mamba.from_pretrained(folder)
    assert len(str(raised.value)) < 600
    one_line_error(call("sample.py", "--pretrained=weights", "--device=cpu", cwd=tmp_path), "weights")
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------------------------------------------------------------
# mamba_export.py: ONNX, and the tokenizer for transformers

# what a tokenizer may lose: spaces at the ends, twice and before a comma, kinds of newlines, accents, names of special tokens
ODD_TEXT = "Hello  world ,\n\n\tit 's\r\n n't é e\u0301 日本 🎉 \u200b\u2028\x0b\x00 <unk> </s> [UNK] ##a  "


def tokenizers_of_both_kinds():
    pytest.importorskip("tokenizers")
    return (CharTokenizer("".join(sorted(set(ODD_TEXT + "<|endoftext|>")))),
            BPETokenizer.train([ODD_TEXT * 20 + "and a few words more"], 300))


@pytest.fixture(scope="module")
def in_onnx(tmp_path_factory):
    """For each kind of tokenizer: a model with a hook in it, its tokenizer, and the folder that write_onnx made."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import mamba_export
    written = {}
    for tokenizer in tokenizers_of_both_kinds():
        kind = tokenizer.to_dict()["type"]
        model = lively(vocab_size=tokenizer.vocab_size, n_layer={"char": 2, "bpe": 1}[kind], scan="chunked")
        model.backbone["layers"][-1].mixer.out_proj.register_forward_hook(lambda module, args, out: out * 1.5 + 0.1)
        folder, before = tmp_path_factory.mktemp("onnx") / "new", copy.deepcopy(model.state_dict())
        mamba_export.write_onnx(model, folder, tokenizer)
        assert same(model.state_dict(), before) and model.backbone["layers"][0].mixer.scan == "chunked"
        written[kind] = model, tokenizer, folder
    return written


def test_onnx_computes_what_the_model_does(in_onnx):
    """Prompts of any length, batches of any size, and a token after them."""
    import onnxruntime
    model, _, folder = in_onnx["char"]
    assert sorted(path.name for path in folder.iterdir()) == ["alphabet.json", "generate.py", "read.onnx", "step.onnx"]
    assert sorted(path.name for path in in_onnx["bpe"][2].iterdir()) == ["generate.py", "read.onnx", "step.onnx", "tokenizer.json"]
    read, step = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("read", "step"))
    names = [value.name for value in step.get_inputs()]
    assert names == ["token", "conv_0", "h_0", "conv_1", "h_1"] and [value.name for value in read.get_inputs()] == ["tokens"]
    for length, batch in itertools.product((1, 2, 3, 4, 5, 16, 17, 64, 65, 255, 300), (1, 3)):
        idx = tokens(batch, length + 1, vocab=model.config.vocab_size, seed=length)
        logits, *state = read.run(None, {"tokens": idx[:, :-1].numpy()})
        for got_logits, got_state, so_far in ((logits, state, idx[:, :-1]), (*run_step(step, names, idx[:, -1], state), idx)):
            with torch.no_grad():
                expected, _, expected_state = model(so_far, state=model.init_state(batch), num_last_tokens=1)
            for got, want in zip((got_logits, *got_state), (expected[:, 0], *tree_leaves(expected_state)), strict=True):
                assert got.shape == want.shape and np.abs(got - want.numpy()).max() < 1e-4, (length, batch)


def run_step(step, names, token, state):
    logits, *state = step.run(None, dict(zip(names, [token.numpy(), *state], strict=True)))
    return logits, state


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_generate_needs_no_torch(in_onnx, kind, tmp_path):
    """The fifteen lines write, greedily, what the model does, in a process that has neither torch nor this project."""
    model, tokenizer, folder = in_onnx[kind]
    start = "it 's\n\n日本 "
    expected = model.generate(torch.tensor([tokenizer.encode(start)]), 100, temperature=0)[0].tolist()
    assert len(set(expected[-100:])) > 10       # not a loop that anything would write
    lines = [line for line in (folder / "generate.py").read_text().splitlines() if line]
    assert len(lines) == 15
    for name in ("torch", "mamba", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('must do without')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run([sys.executable, folder / "generate.py", start, "100", "0"], cwd=tmp_path, env=env, check=False,
                            capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode().rstrip("\r\n") == tokenizer.decode(expected).rstrip("\r\n")


@pytest.mark.parametrize("options", [KINDS[1], pytest.param(KINDS[2], marks=pytest.mark.long)], ids=lambda options: options["layer"])
def test_onnx_of_other_layers(tmp_path, options):
    """The step of a token, for any number of rows, by which the prompt is read too."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import mamba_export
    model, alphabet = lively(n_layer=1, vocab_size=8, **options), CharTokenizer("abcdefgh")
    mamba_export.write_onnx(model, tmp_path, alphabet)
    assert sorted(os.listdir(tmp_path)) == ["alphabet.json", "generate.py", "step.onnx"]
    step, state = runtime.InferenceSession(tmp_path / "step.onnx"), some_state(model, 3)
    for token in tokens(3, 3, vocab=8).split(1, 1):
        given = [token[:, 0].numpy(), *(t.numpy() for t in tree_leaves(state))]
        got = step.run(None, dict(zip((i.name for i in step.get_inputs()), given)))
        logits, _, state = model(token, state=state)
        state = tree_map(torch.Tensor.detach, state)
        assert same([torch.tensor(t) for t in got], [logits[:, 0].detach(), *tree_leaves(state)], 1e-4)
    result = subprocess.run([sys.executable, tmp_path / "generate.py", "abc", "12", "0"], capture_output=True, text=True, check=True)
    expected = model.generate(torch.tensor([[0, 1, 2]]), 12, temperature=0)[0].tolist()
    assert result.stdout == alphabet.decode(expected) + "\n"


def test_what_cannot_be_written_as_onnx(tmp_path, monkeypatch, capfd):
    pytest.importorskip("onnxscript")
    import mamba_export
    tokenizer, model = CharTokenizer("abc"), lively(n_layer=1, vocab_size=3)
    model.lm_head.register_forward_hook(lambda module, args, out: out if out.sum().item() > 0 else -out)
    with pytest.raises(ValueError, match="^this model cannot be written as ONNX: [^\n]*data-dependent[^\n]*$"):
        mamba_export.write_onnx(model, tmp_path / "new", tokenizer)
    assert capfd.readouterr() == ("", "") and mamba.one_by_one is not mamba_export.any_steps
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="onnxscript"):
        mamba_export.write_onnx(small(), tmp_path / "new", tokenizer)
    assert not (tmp_path / "new").exists()


def test_files_are_written_all_or_none(tmp_path):
    """Of a larger model ONNX has a second file, which whoever writes the first one puts beside it."""
    def write_two(path):
        path.write_text("graph")
        path.with_name("step.onnx.data").write_text("weights")

    def fail(path):
        path.write_text("half")
        raise RuntimeError("no space left")
    mamba.files.write_files(tmp_path / "new", {"step.onnx": write_two, "generate.py": "x"})
    before = tree(tmp_path / "new")
    assert before == {"step.onnx": b"graph", "step.onnx.data": b"weights", "generate.py": b"x"}
    with pytest.raises(OSError, match="could not write .*generate.py: no space left"):
        mamba.files.write_files(tmp_path / "new", {"step.onnx": lambda path: path.write_text("new"), "generate.py": fail})
    assert tree(tmp_path / "new") == before


@pytest.mark.parametrize("kind", [0, 1], ids=["char", "bpe"])
@pytest.mark.parametrize("with_weights", [False, True])
def test_transformers_reads_the_tokenizer(tmp_path, kind, with_weights):
    """AutoTokenizer encodes and decodes as ours does; with the weights beside it, which would name another class, too."""
    transformers = pytest.importorskip("transformers")
    import mamba_export
    tokenizer = tokenizers_of_both_kinds()[kind]
    model = lively(vocab_size=tokenizer.vocab_size, n_layer=1)
    if with_weights:
        model.save_pretrained(tmp_path, layout="transformers")
    mamba_export.write_tokenizer(tmp_path, tokenizer, model)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    for text in (ODD_TEXT, " a", "a ", "\n", "", ODD_TEXT + "<|endoftext|>" + ODD_TEXT):
        ids = tokenizer.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text == tokenizer.decode(ids)
    if kind == 0:
        with pytest.raises(Exception, match="Missing .UNK. token"):     # not left out in silence
            theirs.encode("ß")
    end = [None, 0][kind]
    assert theirs.eos_token_id == tokenizer.end_of_text == end
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": end}
    if with_weights:
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert peer.generation_config.eos_token_id == end
        prompt = theirs("it 's", return_tensors="pt")["input_ids"]
        stop = () if end is None else (end,)
        assert torch.equal(peer.generate(prompt, max_new_tokens=30, do_sample=False),
                           model.generate(prompt, 30, temperature=0, stop=stop))


@pytest.mark.parametrize("kind", [0, 1], ids=["char", "bpe"])
@pytest.mark.parametrize("layout", ["mamba_ssm", "transformers"])
def test_a_tokenizer_is_read_back(tmp_path, kind, layout):
    """That beside the weights, or of a run; a loaded model keeps it, to be written again with it."""
    tokenizer = tokenizers_of_both_kinds()[kind]
    model, saved, files = small(vocab_size=tokenizer.vocab_size, n_layer=1), tokenizer.to_dict(), mamba.files
    run = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config), "meta": {"tokenizer": saved}}
    torch.save(run, tmp_path / "best.pt")
    assert files.read_tokenizer(tmp_path) == files.read_tokenizer(tmp_path / "best.pt") == saved
    for before, after in (("best.pt", "one"), ("one", "two")):      # what was written is read, and written again
        again = Mamba.from_pretrained(tmp_path / before)
        files.write(tmp_path / after, dataclasses.asdict(again.config), again.state_dict(), layout, again.tokenizer)
        found = load_tokenizer(files.read_tokenizer(tmp_path / after))
        assert type(found) is type(tokenizer) and found.vocab_size == tokenizer.vocab_size
        assert found.encode(ODD_TEXT) == tokenizer.encode(ODD_TEXT)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    again.config.vocab_size -= 1
    with pytest.raises(ValueError, match="the tokenizer has [0-9]+ tokens, and the model knows"):
        files.write(tmp_path / "three", dataclasses.asdict(again.config), again.state_dict(), layout, again.tokenizer)
    assert not (tmp_path / "three").exists()


def test_a_folder_without_its_tokenizer(tmp_path):
    """It says what to do, instead of taking letters for others. Only as many tokens as GPT-NeoX's may be those."""
    small().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json, and its vocabulary of 70 is not GPT-NeoX's: put .*--export"):
        mamba.files.read_tokenizer(tmp_path)
    for text in ("", "[]", "{}", '{"model": []}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json is damaged"):
            mamba.files.read_tokenizer(tmp_path)
    for meta in ([], {}, {"tokenizer": {}}, {"tokenizer": {"type": "char", "chars": 5}}, {"tokenizer": {"type": [], "chars": ""}}):
        torch.save({"model": {}, "meta": meta}, tmp_path / "run.pt")
        with pytest.raises(ValueError, match="run.pt is damaged"):
            mamba.files.read_tokenizer(tmp_path / "run.pt")


def test_special_tokens_are_not_added(tmp_path):
    """A tokenizer.json may ask for tokens before and after a text, which prepare_data.py leaves out."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    import mamba_export
    tokenizer = tokenizers_of_both_kinds()[1]
    inner = tokenizer.tokenizer
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer = BPETokenizer(inner.to_str())
    mamba_export.write_tokenizer(tmp_path, tokenizer, small(vocab_size=tokenizer.vocab_size))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("it 's")["input_ids"] == tokenizer.encode("it 's")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="^the tokenizer has [0-9]+ tokens, and the model knows 70$"):
        mamba_export.write_tokenizer(tmp_path, tokenizer, small())
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: the same numbers, sooner


def everything(scan, compute):
    """Outputs, states and gradients of all that mamba_fast/ may take over on a CPU."""
    results, inputs = {}, scan_inputs(2, 70, 5, 8)
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, method=scan)
    results["scan"] = [y, last, *gradients(y, last, inputs).values()]
    model = lively(d_model=48, n_layer=2, d_intermediate=24, bias=True, scan=scan)
    mixer, idx = model.backbone["layers"][0].mixer, tokens(3, 240)      # of more than 512 tokens in all
    x, first = torch.randn(3, 240, 48, generator=torch.Generator().manual_seed(0)).requires_grad_(), some_state(mixer, 3)
    conv = mamba.conv_silu(x.tile(1, 1, 2), mixer.conv1d.weight, mixer.conv1d.bias, first.conv, scan)
    results["conv"] = [*conv, *torch.autograd.grad(conv[0].sin().sum(), [x, mixer.conv1d.weight, mixer.conv1d.bias])]
    y, state = mixer(x, first)
    results["block"] = [y, *state, *torch.autograd.grad(y.sin().sum() + state.h.sin().sum(), [x, *mixer.parameters()])]
    targets = idx.roll(-1, 1)
    targets[0, :100] = -1
    loss = compute(model)(idx, targets)[1]
    results["loss"] = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    logits, _, state = model(idx, state=some_state(model, 3))
    results["model"] = [logits, *tree_leaves(state)]
    return results, model.generate([idx[0, :9], idx[1, :9], idx[2, :3]], 20, temperature=0)


@fast
@pytest.mark.parametrize("scan", PLAIN)
def test_with_and_without_mamba_fast(monkeypatch, scan):
    """The same numbers to 1e-5, gradients too, and the same tokens; the loss is computed in parts."""
    from mamba_fast import layers
    monkeypatch.setattr(layers, "LOGITS", 100 * 70)
    monkeypatch.setattr(mamba, "Linear", layers.LinearByConvolution)    # as on an AMD CPU
    monkeypatch.setattr(layers, "Linear", layers.LinearByConvolution)
    there, there_tokens = everything(scan, lambda model: model)
    monkeypatch.setattr(mamba, "fast", None)
    monkeypatch.setattr(mamba, "Linear", nn.Linear)
    gone, gone_tokens = everything(scan, lambda model: model)
    for name in there:
        assert same(there[name], gone[name], 1e-5), name
    assert same(there_tokens, gone_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: scan_triton. Without a GPU, Triton's interpreter runs the kernels, in a process of its own


def all_of_scan(inputs, method, softplus, kind):
    """{name: y, last state and the gradient of each input}, for a loss of y, and of the last state where a first one is given."""
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y, last = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, method=method)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(kind).to(t) for t in (y, last)]     # the same numbers in every type
    n = 2 if "state" in inputs else 1
    return {"y": y, "last": last, **dict(zip(inputs, torch.autograd.grad((y, last)[:n], list(inputs.values()), weights[:n])))}


def check_triton(inputs, softplus=True, device="cuda"):
    """Against float64, no result is further off than twice a float32 scan whose results are rounded to u's type, or 1e-5.
    The gradient of delta_bias is a sum that may cancel, so its error is measured against what it is a sum of."""
    kind = inputs["u"].dtype
    inputs = {k: v.abs() if not softplus and k in ("delta", "delta_bias") else v for k, v in inputs.items()}
    inputs = {k: v.to(device) for k, v in inputs.items()}
    method = "chunked" if device == "cuda" else "sequential"        # of calls for single steps a GPU would take thousands
    exact = all_of_scan({k: v.double() for k, v in inputs.items()}, method, softplus, kind)
    plain = all_of_scan({k: v.float() for k, v in inputs.items()}, method, softplus, kind)
    ours = all_of_scan(inputs, "triton", softplus, kind)
    again = all_of_scan(inputs, "triton", softplus, kind) if device == "cuda" else ours
    scales = {"delta_bias": exact["delta"].abs().sum((0, 1)).norm().item()}
    for name, expected in exact.items():
        scale = scales.get(name, 0)
        error, allowed = (relative(t, expected, scale) for t in (ours[name], plain[name].to(kind)))
        assert error <= 2 * allowed + 1e-5, (name, error, allowed)
        assert torch.equal(ours[name], again[name]), f"{name} is not the same bits again"


OF_CONV = ((), ("bias",), ("bias", "state"))


def check_conv(batch, length, d_inner, width, dtype=torch.float32, device="cuda", some=OF_CONV):
    """The fused convolution and its silu against float64: of a view, with and without bias and state, gradients included."""
    from mamba_fast.scan_triton import conv_silu_triton
    wide, gy = (torch.randn(batch, length, n, device=device).to(dtype) for n in (2 * d_inner, d_inner))
    weight, bias = torch.randn(d_inner, 1, width, device=device), torch.randn(d_inner, device=device)
    state, limit = torch.randn(batch, width - 1, d_inner, device=device).to(dtype), 2e-6 if dtype == torch.float32 else 1e-2
    for options in some:
        results = []
        for kind in (None, torch.float64):
            x, w, b, s = (t.detach().to(kind or t.dtype).requires_grad_() for t in (wide, weight, bias, state))
            given = [t if name in options else None for name, t in (("bias", b), ("state", s))]
            if kind is None:
                y = conv_silu_triton(x[..., d_inner:], w, *given)
                with torch.no_grad():
                    assert device == "cpu" or torch.equal(conv_silu_triton(x[..., d_inner:], w, *given), y)
            else:
                y = mamba.conv_silu(x[..., d_inner:], w, *given)[0]
            grads = torch.autograd.grad(y, [x, w, *(t for t in given if t is not None and t.numel() > 0)], gy.to(y.dtype))
            results.append([y, *grads])
        for ours, exact in zip(*results):
            assert (ours - exact).norm() <= limit * exact.norm(), (options, relative(ours, exact))


def inputs_of_ssd(*shape, dtype=torch.float32, device="cuda", strong=False):
    """Those of ssd_inputs; strong: all heads but one forget nearly all in a step."""
    inputs = {k: v.detach().to(device, dtype if k in "uBC" else torch.float32) for k, v in ssd_inputs(*shape).items()}
    inputs["A"][1:] *= 40 if strong else 1
    return inputs


def all_of_ssd(inputs, method, seq_idx=None):
    """[y, last state and the gradient of each input], for a loss that depends on all of them."""
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y, last = ssd(**inputs, delta_softplus=True, return_last_state=True, method=method, seq_idx=seq_idx)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(inputs["u"].dtype).to(t) for t in (y, last)]
    return [y, last, *torch.autograd.grad((y, last), list(inputs.values()), weights)]


def check_kernels_of_ssd(inputs, documents=False):
    """The kernels against float64, by the size of the type in which they multiply; and the same bits again."""
    u = inputs["u"]
    seq_idx = (at_random(torch.rand, u.shape[:2]).to(u.device) < 0.1).cumsum(1) if documents else None
    exact = all_of_ssd({k: v.double() for k, v in inputs.items()}, "sequential", seq_idx)
    ours, again = (all_of_ssd(inputs, "triton", seq_idx) for _ in range(2))
    limit = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[u.dtype]
    # what the gradients of A and of the bias are sums of, in which it may cancel
    gdelta = exact[2 + list(inputs).index("delta")]
    scales = {"A": (gdelta * F.softplus(inputs["delta"] + inputs["delta_bias"])).norm().item(),
              "delta_bias": gdelta.abs().sum((0, 1)).norm().item()}
    for name, *results in zip(("y", "last", *inputs), ours, again, exact):
        error = relative(results[0], results[2], scales.get(name, 0))
        assert error < limit, (name, error)
        assert torch.equal(*results[:2]), f"{name} is not the same bits again"


def check_keys(keys_and_queries, batch, length, groups, heads, d_state, angles, dtype=torch.float32, device="cuda"):
    """Keys, queries and their products against float64, gradients included, and the same bits again."""
    draw = lambda *shape: torch.randn(*shape, device=device)
    inputs = [draw(batch, length, 2 * groups, d_state)[:, :, ::2], draw(batch, length, groups, d_state), draw(heads, d_state),
              draw(heads, d_state), 6 * draw(batch, length, heads, angles).abs()]
    cotangents = [draw(batch, length, heads, d_state).to(dtype), draw(batch, length, heads, d_state).to(dtype), draw(batch, length, heads)]

    def plain(B, C, B_bias, C_bias, theta, dtype):
        k, q = (turned((of_heads(t, heads) + bias)[:, :, None], theta, False)[:, :, 0]
                for t, bias in ((B, B_bias), (C, C_bias)))
        return k, q, (k * q).sum(-1)
    results = []
    for run, kind in ((keys_and_queries, torch.float32), (keys_and_queries, torch.float32), (plain, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        out = run(*leaves, dtype)
        results.append([*out, *torch.autograd.grad(out, leaves, [g.to(o) for g, o in zip(cotangents, out)])])
    assert results[0][0].dtype == dtype and results[0][2].dtype == torch.float32
    for got, again, expected in zip(*results):      # in 16 bits are the keys and the queries alone
        assert torch.equal(got, again) and relative(got, expected) < (1e-5 if got.dtype == torch.float32 else 1e-2)


def check_angles(angles_since, batch, length, heads, angles, device="cuda"):
    """Their sums against float64, gradients included; in a circle 0 and 1 are the same."""
    turns, first = torch.rand(length, batch, heads, angles, device=device).transpose(0, 1) - 0.3, torch.rand(batch, heads, angles, device=device)
    g, results = torch.randn_like(turns), []
    for run, kind in ((angles_since, torch.float32), (angles_since, torch.float32), (lambda *inputs: sums_of_angles(None, *inputs), torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (turns, first)]
        since = run(*leaves)
        results.append([torch.view_as_real(torch.exp(2j * math.pi * since)), *torch.autograd.grad(since, leaves, g.to(kind))])
    for got, again, expected in zip(*results):
        assert torch.equal(got, again) and relative(got, expected) < 3e-5


def check_gated_norm(batch, length, d_inner, groups, dtype=torch.float32, device="cuda"):
    """The fused norm against the plain one in float64: of a view, gradients included."""
    from mamba_fast.rows_triton import gated_norm
    y, wide, gout = (torch.randn(length, batch, n, device=device).to(dtype).transpose(0, 1) for n in (d_inner, 2 * d_inner + 4, d_inner))
    weight, results = torch.randn(2 * d_inner, device=device)[::2], []
    for kind in (None, torch.float64):
        y_, wide_, w = (t.detach().to(kind or t.dtype).requires_grad_() for t in (y, wide, weight))
        norm = GatedRMSNorm(d_inner, groups, 1e-5, False)
        norm.weight = torch.nn.Parameter(w)
        z = wide_[..., 3:3 + d_inner]
        out = gated_norm(y_, z, norm.weight, groups, 1e-5) if kind is None else norm(y_, z, "sequential")
        results.append([out, *torch.autograd.grad(out, [y_, wide_, norm.weight], gout.to(out.dtype))])
    for ours, exact in zip(*results):
        assert relative(ours, exact) < {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def check_softmax_gradient(vocab_size, padded, dtype=torch.float32, device="cuda"):
    """Loss and gradient of logits with padding at the end of a row, and with a target that is to be ignored."""
    from mamba_fast.rows_triton import softmax_gradient
    logits = (torch.randn(7, padded, device=device) * 5).to(dtype)
    targets = torch.tensor([3, -100, vocab_size - 1, 0, 7, -100, 11], device=device)
    exact = logits[:, :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    loss, gradient = softmax_gradient(logits.clone(), targets, vocab_size)
    assert abs(loss.item() / expected.item() - 1) < 1e-5 and not gradient[:, vocab_size:].any()
    assert softmax_gradient(logits.clone(), targets + vocab_size, vocab_size)[0].isnan()    # there are no such tokens
    assert relative(gradient[:, :vocab_size], exact.grad) < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def awkward(changes, dtype=torch.float32, device=None, wide=torch.float32):
    """A small model none of whose sizes is a power of two, with weights that are nowhere 0 or 1; int8: quantized, of those of
    the type `wide`."""
    model = small(**{"d_model": 40, "vocab_size": 71, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = model.to(device, wide if dtype == torch.int8 else dtype)
    return mamba.fast.quantize_int8(model) if dtype == torch.int8 else model


SHAPES = ({}, {"d_state": 5, "dt_rank": 7, "conv_bias": False, "bias": True, "d_conv": 1},
          {"d_model": 33, "d_conv": 3, "tie_embeddings": False, "residual_in_fp32": True},
          {"layer": "mamba2", "headdim": 20, "d_state": 12},
          {"layer": "mamba2", "headdim": 8, "d_state": 16, "ngroups": 2, "rmsnorm": False, "dt_limit": (0.01, 0.1), "bias": True,
           "d_conv": 2, "conv_bias": False},
          {"d_model": 768, "d_state": 4, "dt_rank": 47, "vocab_size": 60, "n_layer": 1},  # fewer logits than x_proj has outputs
          {"layer": "mamba3", "headdim": 20, "d_state": 12, "A_floor": 0.9},
          {"layer": "mamba3", "headdim": 8, "d_state": 16, "ngroups": 2, "rope_fraction": 1.0, "dt_limit": (0.01, 0.1), "bias": True})


# for groups_triton.py: 3 programs a group, the last one with 8 channels; and one
OF_GROUPS = ({"d_model": 132, "d_state": 5, "dt_rank": 8}, {"d_model": 64, "d_state": 16, "dt_rank": 24, "conv_bias": False})


def of_states(state):
    """The tensors of a state, of angles their sines and cosines: 0 and a whole turn are the same."""
    return [torch.stack([t.sin(), t.cos()]) if name == "theta" else t for layer in state for name, t in zip(layer._fields, layer)]


@torch.no_grad()
def check_fused_step(changes, dtype, rows, device, length=20, wide=torch.float32, groups=False):
    """Tokens read by the kernels give the logits and states of one call in float32 of the same weights."""
    from mamba_fast import groups_triton, step_triton
    model = awkward(changes, dtype, device, wide)
    y = torch.empty(rows, model.config.d_inner, dtype=wide if dtype == torch.int8 else dtype, device=device)
    assert groups == (groups_triton.split(model.config, model.backbone["layers"], y) is not None)
    exact = awkward(changes) if dtype == torch.int8 else awkward(changes, dtype).float()
    state, idx = model.init_state(rows), tokens(rows, length) % model.config.vocab_size
    whole, _, last = exact(idx, state=exact.init_state(rows))
    chosen = [token.clone() for token in idx.to(device).unbind(1)]
    got = torch.stack([step_triton.decode(model.backbone, model.lm_head, model.config, state, token).clone()
                       for token in chosen], 1)
    assert torch.equal(got.argmax(-1), torch.stack(chosen, 1))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.int8: 3e-2}[dtype]
    assert got.shape == whole.shape and got.dtype == torch.float32 and relative(got.cpu(), whole) < tolerance
    for one, expected in zip(of_states(state), of_states(last), strict=True):
        assert one.numel() == 0 or relative(one.cpu(), expected) < tolerance


@torch.no_grad()
def check_products_of_bytes(K, N, BN, W, dtype, device):
    """By the tensor cores, of x in whole numbers of 16 bits."""
    from mamba_fast import bytes_triton
    from mamba_fast.int8 import Int8Linear
    layer = Int8Linear(nn.Linear(K, N)).to(device, dtype)

    def product(x):
        y = x.new_empty(N, dtype=torch.float32)
        bytes_triton.project[(-(-N // BN),)](x, None, layer.weight, layer.scale, layer.bias, None, None, y, None, None, 1, 0.0,
                                             K, N, 1, BN=BN, W=W, PDL=False, num_warps=W)
        return y
    x = torch.randn(K).to(device, dtype)
    expected = (layer.weight.double() @ x.double()) * layer.scale + layer.bias
    assert relative(product(x), expected) < 1e-4
    assert torch.equal(product(x * 0), layer.bias.float()) and torch.equal(product(x * 1e-36), layer.bias.float())
    for bad in (float("nan"), float("inf")):
        x[K // 2] = bad
        assert not product(x).isfinite().any()


@torch.no_grad()
def check_prompt_in_8_bits(rows, K, N, dtype, device):
    """A linear layer with weights in 8 bits for the tokens of a prompt."""
    from mamba_fast import step_triton
    from mamba_fast.int8 import Int8Linear
    layer, x = Int8Linear(nn.Linear(K, N)).to(device, dtype), torch.randn(1, rows, K).to(device, dtype)
    expected = (x.double() @ layer.weight.double().t()) * layer.scale + layer.bias
    assert relative(step_triton.linear(x, layer), expected) < {torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


@torch.no_grad()
def check_padded_reading(changes, length, size, device, dtype=torch.float32):
    """The first of some tokens, read by kernels, continue a state as they do in the model; d_conv - 1 at least."""
    from mamba_fast import decode
    model, idx = awkward(changes, dtype, device), tokens(2, 5 + size).to(device)
    state = decode.copies(model(idx[:, :5], state=model.init_state(2))[2])      # contiguous, as that of a graph
    expected = model(idx[:, 5:5 + length], state=state)[2]
    decode.read_padded(model, idx[:, 5:], torch.tensor(length, device=device), state)
    assert same(state, expected, {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.int8: 1e-5}[dtype])


INTERPRETED = """
import numpy as np
import functools, importlib, sys, types
import triton, triton.language as tl
import triton.experimental.gluon as gluon, triton.experimental.gluon.language.nvidia.ampere as ampere
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

class Patched:
    # The interpreter replaces all of triton.language in each call of each function, a third of the time; here once per kernel
    # and file.
    replace, files = staticmethod(interpreter._patch_lang), set()
    def __init__(self, fn):
        self.scope = None if id(fn.__globals__) in self.files else Patched.replace(fn)
        self.files.add(id(fn.__globals__))
    def restore(self):
        self.files.clear()
        self.scope.restore()

interpreter._patch_lang = Patched
# it would ask after each sum of whole numbers if 32 bits are enough, a third of the rest; for tensors this small they are
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

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

gl.DistributedLinearLayout = gl.DotOperandLayout = lambda *args: None
gl.NVMMADistributedLayout = gl.NVMMASharedLayout = lambda *args: None

class Shared:
    def __init__(self, data, dtype): self.data, self.dtype = data, dtype
    def slice(self, start, length, dim): return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)
    def index(self, i):
        i = getattr(i, "value", i)
        return Shared(self.data[int(i.handle.data.item() if hasattr(i, "handle") else i)], self.dtype)
    def permute(self, order): return Shared(self.data.transpose(order), self.dtype)
    def store(self, x): self.data[...] = x.handle.data
    def load(self, layout):
        return tl.tensor(TensorHandle(self.data.copy(), self.dtype), tl.block_type(self.dtype, list(self.data.shape)))
    @staticmethod
    def reinterpret(shared, dtype, shape, layout):
        return Shared(shared.data.view(_get_np_dtype(dtype)).reshape([int(n) for n in shape]), dtype)

def allocate(dtype, shape, layout, value=None):
    shared = Shared(np.full([int(n) for n in shape], 77, _get_np_dtype(dtype)), dtype)
    if value is not None:
        shared.store(value)
    return shared

def ptx(asm, constraints, inputs, *_):
    asm = getattr(asm, "value", asm)
    if "rcp" in asm:
        return 1 / inputs[0]
    if "red.release" in asm:
        return      # who runs alone cannot wait for others: see Twice
    # m16n8k32 of each warp and each 8 outputs: in PTX, lane 4 g + t has of a row g or g + 8 the numbers from 4 t or 16 + 4 t
    # on, of column g of the other matrix the same, and of the sums in row g or g + 8 those of columns 2 t and 2 t + 1
    w0, w1, w2, w3, b0, b1, *sums = (t.handle.data for t in inputs)
    groups, warps = len(w0) // 2, w0.shape[-1] // 4
    in_lanes = lambda x: np.ascontiguousarray(x).view(np.int8).reshape(-1, 8, warps, 16).astype(np.int64)
    of_x = np.concatenate([in_lanes(np.broadcast_to(b, (2, *b.shape[1:]))) for b in (b0, b1)], -1)[0]
    for i, (front, back) in enumerate(((w0, w2), (w1, w3))):
        products = np.einsum("rgwk,cwk->rgwc", np.concatenate([in_lanes(front), in_lanes(back)], -1), of_x)
        for j in range(2):
            sums[2 * i + j] = sums[2 * i + j] + products[..., j::2].reshape(w0.shape).astype(np.int32)
    return tuple(tl.tensor(TensorHandle(x, tl.int32), inputs[0].type) for x in sums)

def mma(a, b, c):
    product = a.handle.data.astype(np.float32) @ b.handle.data.astype(np.float32)
    return tl.tensor(TensorHandle(c.handle.data + product, tl.float32), c.type)

gl.shared_memory_descriptor, gl.allocate_shared_memory, gl.inline_asm_elementwise = Shared, allocate, ptx
ampere.mma_v2 = mma
ampere.async_copy = types.SimpleNamespace(
    async_load=lambda shared, pointer, mask: shared.store(tl.load(pointer, mask, other=0)),
    commit_group=lambda: None, wait_group=lambda n: None)
gluon.jit, gluon.language = triton.jit, gl

import mamba, mamba_fast, torch
# so that it is seen what is read before it has been written, and what is written beside it
new_empty, around = torch.Tensor.new_empty, []
def full_of_nan(like, *sizes, **options):
    memory = new_empty(like, *sizes, **options)
    if not memory.is_floating_point(): return memory
    more = new_empty(like, memory.numel() + 256, **options).fill_(float("nan"))
    around.extend((more[:128], more[-128:]))
    return more[128:-128].view(memory.shape)
torch.Tensor.new_empty = full_of_nan

scan_triton = importlib.import_module("mamba_fast.scan_triton")     # which mamba_fast imports on CUDA alone
mamba_fast.decode.scan_triton = scan_triton
mamba_fast.decode.step_triton = importlib.import_module("mamba_fast.step_triton")
tests = importlib.import_module(sys.argv[1])

# the step of a token; the interpreter cannot do tl.dot of bfloat16
for rows, dtype, shape in ((1, torch.float32, 0), (1, torch.bfloat16, 1), (1, torch.int8, 2), (3, torch.float16, 1),
                           (3, torch.int8, 0), (17, torch.float32, 2), (1, torch.float32, 3), (3, torch.float32, 4),
                           (1, torch.bfloat16, 3), (17, torch.float16, 3), (1, torch.bfloat16, 6), (3, torch.float32, 7)):
    tests.check_fused_step({"n_layer": 1, **tests.SHAPES[shape]}, dtype, rows, "cpu", length=2)

from mamba_fast import bytes_triton, step_triton
step_triton.takes_bytes = lambda layers, head, token: len(token) == 1 and head.weight.dtype == torch.int8
for wide, shape in ((torch.float16, 1), (torch.float32, 4), (torch.float32, 7)):
    tests.check_fused_step({**tests.SHAPES[shape], "n_layer": 1, "d_model": 48}, torch.int8, 1, "cpu", length=2, wide=wide)

class Twice:
    # In a first run all programs write what they wait for; it must change no state.
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return functools.partial(self.run, grid)
    def run(self, grid, *inputs, **options):
        h, before = inputs[7], inputs[7].clone()
        self.kernel[grid](*inputs, **options)
        h.copy_(before)
        self.kernel[grid](*inputs, **options)

from mamba_fast import groups_triton
groups_triton._advance, groups_triton.multiprocessors = Twice(groups_triton._advance), lambda device: 9
for rows, shape in ((19, tests.OF_GROUPS[0]), (40, tests.OF_GROUPS[1])):
    tests.check_fused_step({**shape, "n_layer": 2}, torch.float16, rows, "cpu", length=2, groups=True)
tests.check_products_of_bytes(400, 21, 16, 2, torch.float32, "cpu")
tests.check_products_of_bytes(176, 5, 8, 1, torch.float16, "cpu")
tests.check_prompt_in_8_bits(70, 80, 1100, torch.float16, "cpu")

from mamba_fast.step_triton import _tiles
few = torch.zeros(3, 1536, dtype=torch.float16)     # only x_proj's sums may be cut, not those of a head of few outputs
assert _tiles(few, 3, 1536, 60)["PARTS"] == 1 < _tiles(few, 3, 1536, 60, cut=True)["PARTS"]

def over_channels(p, q, row, EXACT):
    sums = np.stack([t.handle.data for t in (*p, *q)]).reshape(2, 8, 4, -1, 8).sum(-1)       # (p or q, step, segment, warp)
    s, d = np.arange(4)[:, None], np.arange(32)[None]
    picked = (sums[d % 4 // 2, d % 2 * 4 + d % 8 // 4 * 2 + i, s, d // 8] for i in range(2))
    return tuple(tl.tensor(TensorHandle(x, tl.float32), p[0].type) for x in picked)

def next_states(a, b, h):
    hs, h = [], h.handle.data[..., -1]
    for k in range(4):
        h = a.handle.data[..., k] * h + b.handle.data[..., k]
        hs.append(h)
    return tl.tensor(TensorHandle(np.stack(hs, -1), tl.float32), b.type)

ssd_triton = importlib.import_module("mamba_fast.ssd_triton")
ssd_triton.shared_memory = lambda device: 2 ** 17
sys.modules["mamba2"].scan_method = lambda method, *others: method       # it would refuse a CPU
for shape, dtype in (((1, 70, 2, 16, 1, 16), torch.float32), ((2, 37, 4, 20, 2, 5), torch.float32), ((1, 33, 3, 70, 3, 12), torch.float16)):
    tests.check_kernels_of_ssd(tests.inputs_of_ssd(*shape, dtype=dtype, device="cpu", strong=True), documents=True)
turn_triton = importlib.import_module("mamba_fast.turn_triton")
tests.check_keys(turn_triton.keys_and_queries, 2, 37, 1, 4, 12, 3, device="cpu")
tests.check_keys(turn_triton.keys_and_queries, 1, 16, 2, 4, 10, 5, device="cpu")
tests.check_keys(turn_triton.keys_and_queries, 1, 1, 1, 2, 16, 4, dtype=torch.bfloat16, device="cpu")
tests.check_angles(turn_triton.angles_since, 2, 300, 3, 5, device="cpu")
tests.check_angles(turn_triton.angles_since, 1, 128, 2, 16, device="cpu")
tests.check_gated_norm(2, 5, 40, 2, device="cpu")
tests.check_gated_norm(1, 600, 20, 1, device="cpu")
tests.check_gated_norm(3, 1, 20, 1, device="cpu")
tests.check_softmax_gradient(5001, 5008, device="cpu")

scan_triton._over_channels, scan_triton._next_states = over_channels, next_states
scan_triton.gather, scan_triton.tl = lambda *args: tl.gather(*args), tl
mamba.scan_method = lambda method, *others: method     # it would refuse a CPU
scan_triton.SHORTEST = 1
set_program = interpreter.interpreter_builder.set_grid_idx        # what depends on the order of programs is a race
interpreter.interpreter_builder.set_grid_idx = lambda *at: set_program(
    *(n - 1 - i for i, n in zip(at, interpreter.interpreter_builder.grid_dim)))
for scan_triton.FILL, scan_triton.FILL_BACK, *shape in ((1, 1, 1, 1, 64, 1), (1, 1, 2, 66, 5, 3), (100, 100, 1, 66, 10, 17),
                                                        (8, 4, 1, 200, 8, 9), (4, 8, 1, 200, 8, 9), (1, 1, 1, 33, 72, 2)):
    inputs = tests.scan_inputs(*shape)
    inputs["A"].data[:, 4:8] *= 30      # of a chunk of two tiles nearly all is forgotten,
    inputs["A"].data[:, 8:] *= 300      # and all: the other tile is passed over
    tests.check_triton(inputs, device="cpu")
tests.check_triton(tests.scan_inputs(1, 65, 3, 4, ("z",)), softplus=False, device="cpu")
tests.check_triton(tests.scan_inputs(1, 65, 32, 2, dtype=torch.float16), device="cpu")
for d_state, scan_triton.FILL, options in ((24, 100, ()), (4, 1, tests.OPTIONS)):
    inputs = {k: v.detach() for k, v in tests.scan_inputs(1, 65, 8, d_state, options).items()}
    given = (inputs.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state"))
    y, last, kept = scan_triton._run(*given, True, True)
    assert all(t.isfinite().all() for t in (y, last, kept))     # an operator leaves out nothing of its results
    results = mamba.selective_scan(**inputs, delta_softplus=True, return_last_state=True, method="triton")
    assert torch.equal(results[0], y) and torch.equal(results[1], last.transpose(1, 2))
assert torch.equal(mamba.selective_scan(**inputs, delta_softplus=True, method="triton"), y)
x, one, A = torch.linspace(-4, 20, 480)[None, None], torch.ones(1, 1, 1), -torch.ones(480, 1)
_, last = mamba.selective_scan(torch.ones_like(x), x, A, one, one, delta_softplus=True, return_last_state=True, method="triton")
assert (last[0, :, 0] / torch.nn.functional.softplus(x[0, 0].double()) - 1).abs().max() < 1e-6
assert all(memory.isnan().all() for memory in around)
tests.check_padded_reading({"n_layer": 2}, 5, 8, "cpu")
tests.check_padded_reading({"n_layer": 1, **tests.SHAPES[2]}, 8, 8, "cpu")
tests.check_conv(1, 17, 5, 4, device="cpu")
for shape in ((2, 1, 131, 4), (1, 17, 5, 1), (1, 70, 5, 2)):
    tests.check_conv(*shape, device="cpu", some=tests.OF_CONV[2:])

from mamba_fast import block, launch, rows_triton
block.OnGPU.runs, block.OnCPU.runs = (lambda block, x, dtype, _: dtype == torch.float32), (lambda *_: False)
block.launch, block.rows_triton, block.scan_triton = launch, rows_triton, scan_triton
tests.check_block(tests.OF_BLOCK[1], 3)
tests.check_block({"expand": 1, "d_state": 2}, 70, frozen=tests.FROZEN[0])

block.OnGPU.runs2, block.OnCPU.runs2 = (lambda block, x, dtype, _: dtype == torch.float32), (lambda *_: False)
block.heads_triton, block.ssd_triton = importlib.import_module("mamba_fast.heads_triton"), ssd_triton
one, BC = torch.zeros(2), torch.ones(1, 3, 1, 4)
delta, a, own = block.heads_triton.prepare(torch.tensor([-90.0, float("nan"), 30.0])[None, :, None].expand(1, 3, 2).contiguous(), one, one,
                                           one, BC, BC, (0.0, 20.0))
assert delta[0, :, 0].isnan().tolist() == own[0, :, 1].isnan().tolist() == [False, True, False]
assert 0 < delta[0, 0, 0] < 1e-38 and delta[0, 2].tolist() == [20, 20] and a[0, 2].tolist() == [-20, -20] and own[0, 2].tolist() == [80, 80]
tests.AT_ONCE["mamba2"] = "AtOnceBackward"
tests.check_block(tests.OF_BLOCK2[1], 37)
tests.check_block(tests.OF_BLOCK2[2], 17)
tests.check_block({**tests.OF_BLOCK2[3], "expand": 3, "ngroups": 3, "d_state": 20}, 5, frozen=tests.FROZEN[1])
block.turn_triton = turn_triton
tests.check_block(tests.OF_BLOCK3[0], 37)
tests.check_block(tests.OF_BLOCK3[1], 2)
tests.check_block(tests.OF_BLOCK3[2], 17)
tests.check_block(tests.OF_BLOCK3[3], 18, frozen=tests.FROZEN[1])
"""


@fast
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA runs the kernels themselves")
def test_kernels_in_the_interpreter_of_triton():
    pytest.importorskip("triton", minversion="3.7")     # the interpreter of 3.6 fails with NumPy 2.4
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED, Path(__file__).stem], cwd=ROOT, text=True,
                             env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             check=False)
    assert process.returncode == 0, process.stdout


# A kernel is compiled anew for other channels, strides, types and options, and that takes longer than the tests: nearly all of
# them have 80 channels, to which the scan pads 73, and the models have twice 40


@on_gpu
@torch.no_grad()
def test_documents_on_a_gpu():
    """Padding and documents, in every method; and prompts of any lengths in a half-precision model, each as it is alone."""
    with torch.enable_grad():
        for method in (*PLAIN, "triton"):
            check_documents(method, "cuda")
    model = awkward({"d_model": 40}, torch.float32, "cuda")
    prompts = [tokens(1, n)[0].cuda() for n in (3, 70, 1, 9)]
    for prompt, result in zip(prompts, model.generate(prompts, 8, temperature=0)):
        assert torch.equal(result[:len(prompt)], prompt)
        logits = model(result[None, :-1])[0][0, len(prompt) - 1:]
        chosen = logits.gather(1, result[len(prompt):, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 1e-3       # the greedy token, or one as likely


@on_gpu
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 541])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_float64(length, dtype):
    for batch, d_inner, d_state in ((2, 80, 16), (3, 73, 3), (1, 64, 64), (1, 75, 256)):
        check_triton(scan_inputs(batch, length, d_inner, d_state, dtype=dtype))
    if dtype == torch.float32:
        check_triton(scan_inputs(1, length, 1, 1))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_conv_equals_float64(dtype):
    check_conv(2, 200, 131, 4, dtype)
    if dtype == torch.float32:
        for shape in ((1, 1, 3, 4), (1, 17, 5, 1), (3, 1031, 64, 2), (2, 200, 256, 7)):
            check_conv(*shape, some=OF_CONV[2:])


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ssd_by_kernels_equals_float64(dtype):
    for i, shape in enumerate(((2, 300, 4, 64, 1, 128), (1, 77, 6, 20, 3, 12), (1, 200, 2, 128, 1, 16), (2, 1, 3, 5, 1, 7), (1, 64, 2, 64, 2, 64),
                               (1, 45, 2, 16, 1, 100))):
        check_kernels_of_ssd(inputs_of_ssd(*shape, dtype=dtype, strong=i % 2 > 0), documents=i % 3 > 0)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_by_kernels_equal_float64(dtype):
    from mamba_fast import turn_triton
    for shape in ((2, 300, 3, 5), (1, 128, 2, 16), (3, 1, 2, 7), (1, 5000, 4, 32)):
        check_angles(turn_triton.angles_since, *shape)
    for shape in ((2, 300, 1, 4, 128, 32), (1, 77, 3, 6, 12, 3), (1, 1, 1, 2, 16, 8), (1, 33, 2, 2, 100, 1)):
        check_keys(turn_triton.keys_and_queries, *shape, dtype=dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssd_by_kernels_takes_views_and_any_split(dtype):
    inputs = inputs_of_ssd(2, 150, 4, 24, 2, 16, dtype=dtype)
    wide = torch.cat([inputs[name].flatten(2) for name in ("u", "B", "C")], -1)
    views = dict(zip("uBC", (t.unflatten(-1, inputs[name].shape[2:]) for name, t in zip("uBC", wide.split([96, 32, 32], -1)))))
    turned = {k: inputs[k].transpose(-1, -2).contiguous().transpose(-1, -2) for k in "uBC"}
    shifted = {k: torch.cat([v.new_zeros(1), v.flatten()])[1:].view_as(v) for k, v in inputs.items()}
    expected, limit = all_of_ssd(inputs, "triton"), 1e-5 if dtype == torch.float32 else 3e-2
    for others in (views, turned, shifted, {}):
        for one, other in zip(all_of_ssd({**inputs, **others}, "triton"), expected):
            assert relative(one, other) < limit
    settings = {"delta_softplus": True, "return_last_state": True}
    state, ys = inputs["state"], []
    for k in range(0, 150, 31):
        part = {n: v[:, k:k + 31] if n in ("u", "delta", "B", "C") else v for n, v in inputs.items()}
        y, state = ssd(**{**part, "state": state}, **settings)
        ys.append(y)
    assert relative(torch.cat(ys, 1), expected[0]) < limit and relative(state, expected[1]) < limit


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_loss_by_kernels_equal_float64(dtype):
    for shape in ((2, 40, 1536, 1), (3, 5, 60, 4), (1, 1, 33, 1), (5, 1, 33, 1)):
        check_gated_norm(*shape, dtype)
    for sizes in ((50277, 50288), (50280, 50280), (65, 65)):
        check_softmax_gradient(*sizes, dtype)


@on_gpu
def test_ssd_is_a_well_made_operator():
    inputs = inputs_of_ssd(2, 50, 4, 16, 2, 16)
    u, delta, A, B, C = (inputs[name].requires_grad_() for name in ("u", "delta", "A", "B", "C"))
    own, a = torch.randn_like(delta).requires_grad_(), (delta.abs() * A).detach().requires_grad_()
    torch.library.opcheck(torch.ops.ssd.forward.default, (u, delta, a, B, C, own, inputs["state"].requires_grad_(), True))


@on_gpu
@pytest.mark.parametrize("D", [False, True])
@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("delta_bias", [False, True])
def test_triton_options(D, z, delta_bias):
    """Every three of D, z, delta_bias and softplus in every combination; a state, or none, with each."""
    for state in (False, True):
        options = [name for name, there in zip(OPTIONS, (D, z, delta_bias, state)) if there]
        check_triton(scan_inputs(3, 130, 73, 4, options), softplus=D ^ z ^ delta_bias)


@on_gpu
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 100.0])
def test_triton_extreme_decay(size):
    """Where a state is gone within a step, A's gradient is the rounding of far larger terms: only bounded, not exact."""
    inputs = {k: v.detach().cuda() for k, v in scan_inputs(2, 200, 73, 16).items() if k != "delta_bias"}
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
    inputs = {k: v.detach() for k, v in scan_inputs(2, 2500, 73, 20, ("D", "z", "state"), dtype).items()}
    inputs["delta"] = torch.exp(torch.rand_like(inputs["delta"]) * 4.6 - 6.9)
    g = torch.Generator().manual_seed(0)
    inputs["A"] = -torch.exp(torch.rand(inputs["A"].shape, generator=g) * 5 - 1)
    inputs["A"][3, 5:9], inputs["A"][50:, 17], inputs["A"][60] = -1e-3, 0, -30
    check_triton({k: v.requires_grad_() for k, v in inputs.items()}, softplus=False)


@on_gpu
def test_triton_takes_views_and_any_split():
    inputs = {k: v.detach().cuda() for k, v in scan_inputs(2, 300, 80, 16).items()}
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_takes_any_address_and_any_order_in_memory(dtype):
    """One call after the other, so that a version of a kernel made for one of them must not be taken for the next."""
    inputs = {k: v.detach().cuda() for k, v in scan_inputs(2, 70, 16, 16, dtype=dtype).items()}
    first = {k: v.clone().requires_grad_() for k, v in inputs.items()}

    def results(inputs):
        inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, method="triton")
        return [y, last, *torch.autograd.grad((y, last), list(inputs.values()), (torch.ones_like(y), torch.ones_like(last)))]
    expected = results(first)
    shifted = {k: torch.cat([v.new_zeros(1), v.flatten()])[1:].view_as(v) for k, v in inputs.items()}
    last_first = {k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.dim() > 1 else v for k, v in inputs.items()}
    batch_last = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.dim() > 2 else v for k, v in inputs.items()}
    for others in (shifted, last_first, batch_last, {**inputs, "C": last_first["C"]}, inputs):
        for name in (*inputs, None):
            for one, other in zip(results({**inputs, name: others[name]} if name else others), expected):
                assert torch.equal(one, other), name


@on_gpu
def test_triton_conv_takes_any_address_and_any_order_in_memory():
    from mamba_fast.scan_triton import conv_silu_triton
    inputs = [torch.randn(*shape, device="cuda") for shape in ((2, 70, 32), (32, 1, 4), (32,), (2, 3, 32), (2, 70, 32))]

    def results(*inputs):
        *inputs, gy = (t.detach().requires_grad_() for t in inputs)
        y = conv_silu_triton(*inputs)
        return [y, *torch.autograd.grad(y, inputs, gy)]
    expected = results(*inputs)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in inputs]
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t for t in inputs]
    for others in (shifted, turned, inputs):
        for i in range(len(inputs)):
            for one, other in zip(results(*inputs[:i], others[i], *inputs[i + 1:]), expected):
                assert torch.equal(one, other), i


@on_gpu
def test_triton_beyond_2_to_31_elements():
    length, half = 1_500_000, 1_499_000
    u = torch.randn(2, length, 1536, device="cuda", dtype=torch.bfloat16)      # so many in each of two rows
    A, B = -torch.rand(1536, 4, device="cuda") - 0.5, torch.randn(2, length, 4, device="cuda", dtype=torch.bfloat16)
    settings = {"delta_softplus": True, "return_last_state": True}
    with torch.no_grad():
        whole, last = selective_scan(u, u, A, B, B, **settings)
        _, state = selective_scan(u[:, :half], u[:, :half], A, B[:, :half], B[:, :half], **settings)
        u, B = u[:, half:].float(), B[:, half:].float()
        rest, end = selective_scan(u, u, A, B, B, state=state, method="chunked", **settings)
    assert relative(whole[:, half:].float(), rest) < 5e-3 and relative(last, end) < 1e-5


@on_gpu
def test_triton_is_a_well_made_operator():
    inputs = {k: v.detach().cuda().requires_grad_() for k, v in scan_inputs(2, 100, 80, 16).items()}
    args = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")]
    torch.library.opcheck(torch.ops.selective_scan.forward.default, (*args, True, True))
    x = torch.randn(2, 20, 16, device="cuda", requires_grad=True)
    others = (torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((8, 1, 4), (8,), (2, 3, 8)))
    torch.library.opcheck(torch.ops.selective_scan.conv.default, (x[..., 8:], *others))


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_model_with_triton_equals_chunked(compiled):
    """Loss and gradients of a model in float32, and the compiled model is one graph."""
    model = small(d_model=40, n_layer=2).cuda()
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


@on_gpu
@torch.no_grad()
def test_fused_step_equals_one_call():
    for rows, dtype, shape in ((1, torch.float32, 0), (1, torch.bfloat16, 1), (1, torch.int8, 2), (2, torch.int8, 0),
                               (17, torch.float16, 0), (40, torch.float32, 2), (100, torch.bfloat16, 1), (1, torch.float32, 3),
                               (1, torch.bfloat16, 4), (3, torch.int8, 3), (40, torch.bfloat16, 3), (3, torch.bfloat16, 5),
                               (1, torch.float32, 6), (3, torch.bfloat16, 6), (40, torch.float16, 7), (1, torch.int8, 7)):
        check_fused_step(SHAPES[shape], dtype, rows, "cuda")
    for rows, dtype, shape in ((2, torch.bfloat16, 0), (300, torch.float16, 0), (17, torch.float16, 1), (1000, torch.bfloat16, 1)):
        check_fused_step(OF_GROUPS[shape], dtype, rows, "cuda", groups=True)
    for wide, shape in ((torch.bfloat16, 0), (torch.float16, 1), (torch.float32, 4), (torch.float16, 7)):   # by bytes_triton.py
        check_fused_step({**SHAPES[shape], "d_model": 48}, torch.int8, 1, "cuda", wide=wide)
    for dtype, shape in ((torch.float32, 0), (torch.bfloat16, 1), (torch.int8, 2)):
        for length, size in ((70, 80), (56, 64), (3, 8)):
            check_padded_reading(SHAPES[shape], length, size, "cuda", dtype)


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: scan_tiles, for a CPU


@fast
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 31, 47, 70])
def test_tiles_equal_float64(monkeypatch, length, steps):
    """Every way in which a sequence can end inside or at the end of a tile, and of a few tiles at once."""
    from mamba_fast import cpp, scan_tiles
    monkeypatch.setattr(cpp, "compiled", lambda name: None)
    monkeypatch.setattr(scan_tiles, "steps_of_a_tile", lambda *sizes: steps)
    check_scan(scan_inputs(2, length, 5, 4), ["chunked"])
    check_gradients(length, "chunked")


@fast
@pytest.mark.parametrize("shape", [(1, 2500, 3, 4), (4, 40, 512, 16), (7, 20, 300, 15)])
def test_many_tiles_and_padded_states(shape, monkeypatch):
    from mamba_fast import cpp
    monkeypatch.setattr(cpp, "compiled", lambda name: None)
    check_scan(scan_inputs(*shape), ["chunked"])


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: scan_side_by_side, for a GPU without Triton


def side_by_side(monkeypatch, steps, at_once, shape):
    """Tiles of so many steps, so many of them at once for this shape (B, L, D, N), on a CPU."""
    from mamba_fast import scan_side_by_side
    batch, _, d_inner, d_state = shape
    monkeypatch.setattr(scan_side_by_side, "STEPS", steps)
    monkeypatch.setattr(scan_side_by_side, "NUMBERS", batch * d_inner * d_state * steps * at_once)
    monkeypatch.setattr(mamba.fast, "recurrence", lambda *inputs: scan_side_by_side.recurrence)


@fast
@pytest.mark.parametrize("steps, at_once", [(8, 1), (1, 5), (4, 2), (3, 4), (8, 3)])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 31, 47])
def test_tiles_side_by_side_equal_float64(monkeypatch, length, steps, at_once):
    side_by_side(monkeypatch, steps, at_once, shape := (2, length, 5, 4))
    check_scan(scan_inputs(*shape), ["chunked"])


@fast
def test_tiles_side_by_side_of_all_that_the_others_take(monkeypatch):
    """Long ones, extreme decay, 16 bits, autocast, any split, views."""
    side_by_side(monkeypatch, 32, 5, (2, 257, 5, 4))
    check_scan(scan_inputs(2, 700, 5, 4), ["chunked"])
    check_the_rest("chunked")


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: block

OF_BLOCK = ({}, {"bias": True, "conv_bias": False, "d_conv": 3, "d_state": 5}, {"d_conv": 2, "dt_rank": 1, "expand": 1})
OF_BLOCK2 = tuple({"layer": "mamba2", "headdim": 16, "d_state": 32, **changes} for changes in (
    {}, {"bias": True, "conv_bias": False, "d_conv": 3, "ngroups": 2, "d_state": 16}, {"d_conv": 2, "headdim": 64, "dt_limit": (0.02, 0.05)},
    {"expand": 5}))     # 10 heads: more than C++ takes together
OF_BLOCK3 = tuple({"layer": "mamba3", "headdim": 16, "d_state": 32, **changes} for changes in (
    {}, {"bias": True, "ngroups": 2, "d_state": 16, "rope_fraction": 1.0}, {"headdim": 64, "dt_limit": (0.02, 0.05), "A_floor": 1.05},
    {"expand": 3, "d_state": 20, "ngroups": 3}))


def results_of_block(block, x, gy):
    """y and the gradients of x and of the block's parameters, None for those that get none; and what has made y."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    y = block(x)
    y.backward(gy.to(y.dtype))
    return [y, x.grad, *(p.grad for p in block.parameters())], made_by(y)


def made_by(y):
    """The autograd.Function, here or in C++, that y comes from."""
    return "ByPlan" if "ByPlan" in y.grad_fn.name() else type(y.grad_fn).__name__


@pytest.fixture(params=[False, True], ids=["in Python", "in C++"])
def nodes(request, monkeypatch):
    """Whether plans are nodes of autograd in Python or in C++, for which it waits."""
    launch = importlib.import_module("mamba_fast.launch")
    if not request.param:
        monkeypatch.setattr(launch, "NODE", {"module": None})
        return
    launch.begin_node()
    wait_for(launch.node)


def wait_for(condition, seconds=200):
    while not condition():
        assert seconds > 0
        seconds -= 0.1
        time.sleep(0.1)


def block_of(changes):
    config = MambaConfig(d_model=32, **changes)
    return config.block(config)


def check_block(changes, length=70, dtype=torch.float32, cast=None, frozen=(), device="cpu"):
    """A block at once is not further from float64 than twice what its parts are, one by one, and gives gradients to the
    same tensors, in their types. And a little: what a sum loses that is nearly 0, as the gradient of a single D, for which
    Mamba-3's parts take gradients in float32. x is a view. cast: of autocast."""
    torch.manual_seed(0)
    block = block_of(changes).to(device)
    for name, p in block.named_parameters():
        p.data += 0.1 * torch.randn_like(p)
        p.requires_grad = name not in frozen
    x, gy = torch.randn(3, length, 40, device=device)[..., 4:36], torch.randn(3, length, 32, device=device)
    exact = copy.deepcopy(block).double()
    exact.scan = "sequential"
    exact, _ = results_of_block(exact, x.double(), gy.double())
    block, x = block.to(dtype), x.to(dtype)
    with torch.autocast(device, cast, enabled=cast is not None):
        ours, made = results_of_block(block, x, gy)
        again, _ = results_of_block(block, x, gy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mamba.fast, "mix", lambda *_: None)
            patch.setattr(mamba.fast, "mix2", lambda *_: None)
            patch.setattr(mamba.fast, "mix3", lambda *_: None)
            parts, other = results_of_block(block, x, gy)
    if device == "cuda":        # with a bias, whose gradient PyTorch sums up, there is no plan
        expected = "AtOnceBackward" if changes.get("bias") else "ByPlan"
    else:
        expected = AT_ONCE[changes.get("layer", "mamba")]
    assert made == expected != other and same([t for t in ours if t is not None], [t for t in again if t is not None])
    for one, part, expected, name in zip(ours, parts, exact, ["y", "x", *dict(block.named_parameters())], strict=True):
        if expected is None:
            assert one is part is None
            continue
        assert one.dtype == part.dtype and one.shape == part.shape
        little = 5e-3 if one.numel() == 1 and (cast or dtype) != torch.float32 else 1e-5
        assert relative(one, expected) < 2 * relative(part, expected) + little, (name, relative(one, expected), relative(part, expected))


AT_ONCE = {"mamba": "AtOnceBackward", "mamba2": "Mix2Backward", "mamba3": "AtOnceBackward"}


@in_cpp
@pytest.mark.parametrize("changes", OF_BLOCK + OF_BLOCK2)
@pytest.mark.parametrize("length", [2, 3, 65, 66, 70, 300])      # C++ keeps a state after each 64
def test_block_at_once_equals_its_parts(changes, length):
    check_block(changes, length)


FROZEN = (("in_proj.weight", "A_log", "dt_bias"),
          ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "out_proj.weight", "D", "norm.weight"))


@in_cpp
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("changes", [OF_BLOCK[0], OF_BLOCK2[0]])
def test_block_at_once_with_frozen_parameters(frozen, changes):
    check_block(changes, frozen=frozen)


@on_gpu
@pytest.mark.parametrize("dtype, cast", [
    (torch.float32, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, None), (torch.float16, None)])
def test_block_at_once_on_a_gpu(dtype, cast, nodes):
    for changes in (*OF_BLOCK, *OF_BLOCK2, *OF_BLOCK3):
        check_block(changes, dtype=dtype, cast=cast, device="cuda")
    check_block({}, 1, dtype, cast, device="cuda")
    for changes in (OF_BLOCK2[1], OF_BLOCK3[1]):
        check_block({**changes, "bias": False}, 33, dtype, cast, device="cuda")
    for frozen in FROZEN:
        for changes in ({}, OF_BLOCK2[0], OF_BLOCK3[0]):
            check_block(changes, 300, dtype, cast, frozen, "cuda")


@on_gpu
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("changes", [{"d_state": 5}, {"bias": True, "conv_bias": False}])
def test_compiled_block_is_the_block_at_once(monkeypatch, cast, changes):
    """It goes through as one operator, with the same numbers; and no longer where a part has become another."""
    module, calls = importlib.import_module("mamba_fast.block"), []
    block, x = MambaBlock(MambaConfig(d_model=72, **changes)).cuda(), torch.randn(3, 65, 72, device="cuda", requires_grad=True)

    def results(f):
        with torch.autocast("cuda", cast, enabled=cast is not None):
            y = f(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])]
    expected, mixed = results(block), module.mixed
    monkeypatch.setattr(module, "mixed", lambda *inputs: calls.append(1) or mixed(*inputs))
    compiled = torch.compile(block, fullgraph=True)
    for one, other in zip(results(compiled), expected):
        assert one.dtype == other.dtype and relative(one, other) < (1e-5 if cast is None else 1e-2)
    assert calls == [1]
    block.x_proj.register_forward_hook(lambda *_: None)
    torch.compiler.reset()
    results(compiled)
    assert calls == [1]
    inputs = [dict(block.named_parameters()).get(name) for name in module.OF_MAMBA]
    torch.library.opcheck(torch.ops.mamba_py.block.default, (x.detach().requires_grad_(), *inputs))


@contextlib.contextmanager
def products(name, value):
    """A setting of PyTorch's products on a GPU. pytest's own way would delete it afterwards."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@on_gpu
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("changes", [{"d_state": 5}, OF_BLOCK2[0], OF_BLOCK3[0]])
def test_block_by_plan_is_the_block_at_once(monkeypatch, nodes, cast, changes):
    """The same bits: whatever is asked for, again and again, twice before backward, in a checkpoint, in a graph that is
    captured, on another stream, with parameters that begin anywhere; and where plans cannot be used it goes without."""
    launch, config = importlib.import_module("mamba_fast.launch"), MambaConfig(d_model=72, **{"expand": 4, **changes})
    block, x = config.block(config).cuda(), torch.randn(3, 65, 72, device="cuda", requires_grad=True)

    def results(f, *wanted):
        with torch.autocast("cuda", cast, enabled=cast is not None):
            y = f(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), wanted or [x, *block.parameters()])]
    twice = lambda x: block(block(x))
    made = lambda: made_by(block(x))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "can_repeat", lambda: False)
        expected, expected_twice = results(block), results(twice)
        assert made() != "ByPlan"
    assert made() == "ByPlan"
    for _ in range(3):
        assert same(results(block), expected) and same(results(twice), expected_twice)
    with monkeypatch.context() as patch:        # none is missing: it would only take longer
        patch.setattr(launch.Plan, "all_kept", None)
        patch.setattr(launch.ByPlan, "backward", None if launch.node() else launch.ByPlan.backward)
        assert same(results(block), expected)
    name = "dt_bias" if config.layer == "mamba3" else "A_log"
    assert same(results(block, x, getattr(block, name)), [*expected[:2], expected[2 + [*dict(block.named_parameters())].index(name)]])
    checkpointed = lambda x: block(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))
    assert same(results(checkpointed), expected_twice)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert same(results(block), expected)
        x_here, graph = x.detach().clone().requires_grad_(), torch.cuda.CUDAGraph()
        results(lambda _: block(x_here), x_here)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = results(lambda _: block(x_here), x_here)
        for t in captured:
            t.detach().zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected[:2])
    with torch.no_grad():
        for p in block.parameters():
            p.data = torch.cat([p.new_zeros(1), p.flatten()])[1:].view(p.shape)
    assert all(relative(one, other) < 1e-2 for one, other in zip(results(block), expected)) and made() == "ByPlan"
    expected = results(block)
    block.D.data = torch.stack([block.D.data, -block.D.data], dim=1)[:, 0]
    assert all(relative(one, other) < 5e-2 for one, other in zip(results(block), expected))
    block.D.data = block.D.data.contiguous()
    assert made() == "ByPlan"
    with products("allow_bf16_reduced_precision_reduction", False):
        assert made() != "ByPlan"


@on_gpu
def test_scan_by_plan_is_the_scan(monkeypatch, nodes):
    launch, inputs = importlib.import_module("mamba_fast.launch"), scan_inputs(2, 300, 16, 5)
    inputs = {k: t.detach().cuda().requires_grad_() for k, t in inputs.items()}

    def results(last):
        y, h = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
        return [y, h, *torch.autograd.grad(y.square().sum() + (h.sum() if last else 0), list(inputs.values()))]
    for last in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(launch, "can_repeat", lambda: False)
            expected = results(last)
        assert same(results(last), expected) and same(results(last), expected)
        assert made_by(results(last)[0]) == "ByPlan"


EDITS = (   # file, what is there, what a student writes, in which function
    ("mamba", "# The states of all steps", "# All the states", ""),
    ("mamba", "return (C[..., None] *", "return (2 * C[..., None] *", "one_tile"),
    ("mamba", "h = decay * h + (", "h = 0.5 * decay * h + (", "one_by_one"),
    ("mamba", "        if D is not None:\n            y = y + D * u", "        if D is not None:\n            y = y - D * u", "scan_of_part"),
    ("mamba", "y = F.silu(y.to(x.dtype))", "y = F.relu(y.to(x.dtype))", "conv_silu"),
    ("mamba", "return self.out_proj(y), MambaState", "return self.out_proj(y.tanh()), MambaState", "MambaBlock.mix"),
    ("mamba", "        x = x + self.dropout(y)\n", "        x = x + 2 * self.dropout(y)\n", "Layer.forward"),
    ("mamba", "value * F.silu(gate)", "value * F.gelu(gate)", "GatedMLP.forward"),
    ("mamba", "x = normed(self.backbone[\"norm_f\"], x)", "x = 2 * normed(self.backbone[\"norm_f\"], x)", "Mamba.hidden"),
    ("mamba", 'targets, reduction="sum")', 'targets, reduction="sum", label_smoothing=0.1)', "Mamba._loss"),
    ("mamba", "logits, _, state = self(idx[:, i:i + part]", "logits, _, state = self(idx[:, i:i + part] // 2", "Mamba.read"),
    ("mamba2", "return self.out_proj(y), Mamba", "return self.out_proj(y), Mamba", ""),
    ("mamba2", "y, Mamba2State(conv, h)", "y.tanh(), Mamba2State(conv, h)", "Mamba2Block.mix"),
    ("mamba2", "return y + u * own[..., None], h", "return y - u * own[..., None], h", "in_chunks"),
    ("mamba2", "h = torch.exp(a_t)", "h = 0.5 * torch.exp(a_t)", "one_by_one"),
    ("mamba2", "delta = F.softplus(delta)", "delta = F.relu(delta)", "ssd"),
    ("mamba3", "A = -torch.where(", "A = -2 * torch.where(", "Mamba3Block.mix_parts"),
    ("mamba3", "return y.flatten(2), after", "return y.flatten(2).tanh(), after", "Mamba3Block.mix_parts"),
)
OF_EDITED = """
import json, re, sys, warnings
sys.path[:0] = sys.argv[1:]
import torch
results = []
for file, old, new, _ in [("mamba", "", "", ""), *json.load(sys.stdin)]:
    for name in ("mamba", "mamba2", "mamba3"):
        text = open(f"{sys.argv[-1]}/{name}.py.txt").read()
        if file == name and old:
            assert text.count(old) == 1 or old == new, (file, old, text.count(old))
            text = text.replace(old, new)
        open(f"{name}.py", "w").write(text)
        sys.modules.pop(name, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        from mamba import Mamba, MambaConfig
        results.append([])
        for layer in ("mamba", "mamba2", "mamba3"):
            if layer >= file:       # each uses those before
                torch.manual_seed(0)
                model = Mamba(MambaConfig(50, 64, 2, 16, layer=layer, d_intermediate=32))
                idx = torch.randint(50, (2, 81))
                loss = model(idx[:, :-1], idx[:, 1:])[1]
                loss.backward()
                made = [loss, *(p.grad for p in model.parameters())]
                with torch.no_grad():
                    step = model.decoder([*idx], model.init_state(2))
                    made += [model(idx)[0], *(step(t) for t in idx[:, -3:].t())]
                results[-1].append((layer, [t.detach() for t in made]))
    results[-1].append([str(w.message) for w in said if "edited" in str(w.message)])
torch.save(results, "results.pt")
"""


@in_cpp
def test_what_is_edited_is_what_runs(tmp_path):
    """Each edit gives what it gives without mamba_fast/, which says so, and knows our files."""
    edits = importlib.import_module("mamba_fast.edits")
    for name in ("mamba", "mamba2", "mamba3"):
        assert edits.digests(name, vars(importlib.import_module(name))) == edits.KNOWN[name], "write these into edits.py"
    texts = []
    for i, body in enumerate(("    for x in y:\n        z = x\n        return z", "    for x in y:\n        z = x\n    return z",
                              "    # words\n    for x in y:\n\n        z = x   # more\n    return z")):
        (tmp_path / f"text{i}.py").write_text(f"def f(y):\n{body}\n\ndef g():\n    pass\n")
        texts.append(edits.text_of(runpy.run_path(str(tmp_path / f"text{i}.py"))["f"]))
    assert texts[0] != texts[1] == texts[2] == "def f(y):\n    for x in y:\n        z = x\n    return z"
    results = []
    for fast in (True, False):
        work = tmp_path / str(fast)
        work.mkdir()
        for name in ("mamba", "mamba2", "mamba3"):
            shutil.copy(ROOT / f"{name}.py", work / f"{name}.py.txt")
        if fast:
            os.symlink(ROOT / "mamba_fast", work / "mamba_fast")
        subprocess.run([sys.executable, "-c", OF_EDITED, str(work)], check=True, cwd=work, text=True, input=json.dumps(EDITS),
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        results.append(torch.load(work / "results.pt"))
    (as_it_is, *ours), (_, *plain) = results
    before, ever = dict(as_it_is[:-1]), set()
    assert as_it_is[-1] == []
    for (file, _, _, function), one, other in zip(EDITS, ours, plain, strict=True):
        said, without = one[-1], other[-1]
        assert not without and len(said) == (function != ""), (function, said)
        for (layer, made), (_, expected) in zip(one[:-1], other[:-1], strict=True):
            assert same(made, expected, 2e-4), (function, layer)
            ever.add((function, same(made, before[layer], 1e-3)))
        if function:
            assert f"{file}.py has been edited: {function}." in said[0] and (function, False) in ever
    assert ("", True) in ever and ("", False) not in ever


class StandIn:
    """What a Plan asks of a kernel that Triton has compiled; function: its number."""

    def __init__(self, function, **signature):
        self.function, self.run, self.packed_metadata = function, None, None
        self.src = SimpleNamespace(signature=signature)
        self.metadata = SimpleNamespace(num_ctas=1, num_warps=2, shared=7, launch_cooperative_grid=False,
                                        launch_pdl=False, global_scratch_size=0)


def on_a_cpu(monkeypatch, launch, start, multiply):
    """Puts these two in the places of cuLaunchKernel and cublasGemmEx; the stream is 5, the handle of cuBLAS 6."""
    address = ctypes.c_void_p

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(address))
    def stream_of(device, stream):
        stream[0] = 5
        return 0
    repeat, places = importlib.import_module("mamba_fast.cpp").compiled("repeat").repeat, (start, multiply, stream_of)
    repeat.argtypes = (address, ctypes.c_int64, *[address] * 5)
    monkeypatch.setattr(launch, "entry_points", lambda: (repeat, *(ctypes.cast(f, address) for f in places)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 6)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    monkeypatch.setattr(on_a_cpu, "places", places, raising=False)      # as long as C++ may call them


@in_cpp
def test_plan_as_a_node_of_autograd(monkeypatch):
    """node.cpp, with a CPU in the place of the GPU: what ByPlan of launch.py does, in a pass like one before without Python."""
    pytest.importorskip("triton")
    launch, number, address = importlib.import_module("mamba_fast.launch"), ctypes.c_int, ctypes.c_void_p
    refused = []

    def memory(at, count):
        return torch.frombuffer((ctypes.c_float * count).from_address(at), dtype=torch.float32)

    def scale(x, y, n, factor):
        with torch.no_grad():
            memory(y, n)[:] = memory(x, n) * factor
        return 0

    @ctypes.CFUNCTYPE(number, ctypes.c_int64, *[ctypes.c_uint] * 7, address, ctypes.POINTER(address), address)
    def start(function, *others):
        *_, stream, arguments, _ = others
        x, y, n, factor = (ctypes.c_int64.from_address(arguments[i]).value for i in range(4))
        if refused or stream != 5 or x % 16:
            return 700
        return scale(x, y, n, factor)

    @ctypes.CFUNCTYPE(number, address, *[number] * 5, address, address, number, number, address, number, number, address,
                      address, *[number] * 4)
    def multiply(blas, turned_a, turned_b, m, n, k, one, a, a_type, a_step, b, b_type, b_step, beta, c, c_type, c_step, _, __):
        assert (blas, turned_a, turned_b) == (6, 0, 0)
        columns = lambda t, rows, columns, step: memory(t, (columns - 1) * step + rows).as_strided((rows, columns), (1, step))
        with torch.no_grad():
            columns(c, m, n, c_step)[:] = columns(a, m, k, a_step) @ columns(b, k, n, b_step)
        return 0

    on_a_cpu(monkeypatch, launch, start, multiply)
    monkeypatch.setattr(launch, "parameters_of", lambda function: 4)
    monkeypatch.setattr(launch, "NODE", {})
    launch.begin_node()
    wait_for(launch.node)
    kernel, compiled = launch.Kernel(None), StandIn(4, x="*fp32", y="*fp32", n="i32", factor="i32")
    compiled.run = lambda *arguments: scale(*arguments[-4:])
    kernel.add("version", compiled)

    def scaled(x, factor):
        y = x.new_empty(x.shape)
        kernel((1, 1, 1), "version", (x, y), x.numel(), factor)
        return y

    def function(a, absent, b, w):
        pair = a.new_empty(2, *a.shape)     # of which a part is kept
        kernel((1, 1, 1), "version", (a, pair[1]), a.numel(), 3)
        fives = b.new_empty(2, *b.shape)    # and one a result
        kernel((1, 1, 1), "version", (b, fives[1]), b.numel(), 5)
        return (launch.product(pair[1], w), fives[1]), (pair[1], w)

    passes = []

    def back(needs, gradients, a3, w):      # the gradients of a and b
        passes.append(needs)
        g, gb = gradients
        if needs[3]:
            raise KeyError("w")
        if g is None and needs[0]:
            g = torch.zeros_like(a3)        # a plan cannot do that
        gb = torch.zeros_like(a3) if gb is None and needs[2] else gb
        return launch.product(scaled(g, 3), w) if needs[0] else None, None, scaled(gb, 5) if needs[2] else None, None

    plans = {}

    def run(*inputs):
        def make():
            plan = launch.Plan(lambda: function(*inputs), inputs)
            plan.back = back
            return plan.as_node()
        return launch.node().run(launch.found(plans, "key", inputs, make), inputs)
    a, b, w = (torch.randn(4, 4).round().requires_grad_() for _ in range(3))
    wide = torch.randn(4, 8).round()
    w.data = (wide[:, 4:] + wide[:, 4:].t()).detach()       # so that w^T is w, for back

    def losses(y, z):
        return {"both": y.square().sum() + z.sum(), "y": y.square().sum(), "z": z.sum(), "same": (y + z).square().sum()}

    def check(*wanted, loss="both", f=run, **settings):
        made = f(a, None, b, w)
        expected = 3 * a @ w + 0 * b.sum(), 5 * b + 0 * a.sum()
        assert same(made, expected)
        ours = losses(*made)[loss]
        assert same(torch.autograd.grad(ours, wanted, **settings),
                    torch.autograd.grad(losses(*expected)[loss], wanted))
        return ours

    def known(*wanted, **settings):
        """How often Python is asked in two passes."""
        del passes[:]
        check(*wanted, **settings)
        check(*wanted, **settings)
        return len(passes)
    assert known(a, b) == 1 and known(a, b) == 0 and len(plans) == 1
    assert known(a) == known(b) == 1 and known(a) == known(b) == 0      # others are asked for
    assert known(b, loss="z") == 1 and known(b, loss="z") == 0          # others are given
    assert known(a, b, loss="y") == 3   # zeros are not for plans: the first time they are tried, too
    assert known(a, b, loss="same") == 1 and known(a, b) == 0           # given twice in one memory
    gy = a.detach()                     # of which a kernel of forward has read
    for grads in ((gy, gy + 1), (gy + 1, gy), (gy + 2, gy + 3)):
        assert same(torch.autograd.grad(run(a, None, b, w), (a, b), grads), (3 * grads[0] @ w, 5 * grads[1]))
    shared = torch.randn(8, 4).round()  # gradient and w in one memory: another plan
    w.data, gy = (shared[:4] + shared[:4].t()), torch.ones(4, 4)
    for g in (w.detach(), gy, w.detach(), gy):
        y, _ = run(a, None, b, w)
        assert same(torch.autograd.grad(y, [a], g), [3 * g @ w])
    # what is saved comes back in other strides, or anywhere
    narrow = torch.randn(4, 8).round()[:, 4:]
    narrow = (narrow + narrow.t()).detach()
    w.data = F.pad(narrow, (0, 4))[:, :4]
    assert w.stride() == (8, 1)
    anywhere = lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    for change in (torch.clone, lambda t: t, anywhere, lambda t: t.contiguous()):
        pack = lambda t, change=change: t if t.dtype == torch.uint8 else change(t)      # not the memory of what is kept
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            check(a, b)
        check(a, b)
    loss = check(a, b, retain_graph=True)
    torch.autograd.grad(loss, [a])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [a])
    assert known(a, loss="y") < 2 and known(a, loss="y") == 0
    g, = torch.autograd.grad(run(a, None, b, w)[0].square().sum(), [a], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()
    y, _ = run(a, None, b, w)
    with pytest.raises(KeyError, match="w"):
        y.sum().backward()
    check(a, b, f=functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        check(a, b)
    # where plans cannot be used any more
    assert known(a, b) == 0

    def gradients(results=None):        # that of b takes no product
        results = results or run(a, None, b, w)
        return [*torch.autograd.grad(results[0], [a], torch.ones(4, 4), retain_graph=True),
                *torch.autograd.grad(results[1], [b], torch.ones(4, 4))]
    gradients()
    del passes[:]
    expected = gradients()
    assert not passes
    results = run(a, None, b, w)
    torch.use_deterministic_algorithms(True)
    try:
        assert same(gradients(results), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    results = run(a, None, b, w)
    with importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False):
        assert same(gradients(results), expected)
    results = run(a, None, b, w)
    with monkeypatch.context() as patch:        # as where PyTorch is asked for other products
        patch.setattr(launch, "can_repeat", lambda: False)
        assert same(gradients(results), expected)
    assert len(passes) == 5
    refused.append(True)
    with pytest.raises(RuntimeError, match="error 700 of CUDA"):
        run(a, None, b, w)
    refused.clear()
    y, _ = run(a, None, b, w)
    refused.append(True)
    with pytest.raises(RuntimeError, match="error 700 of CUDA"):
        torch.autograd.grad(y, [a], torch.ones(4, 4))
    refused.clear()
    y, _ = run(a, None, b, w)
    with torch.no_grad():
        w.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), [a])
    # a gradient that lies otherwise, or begins anywhere
    for gy in (torch.randn(4, 8).round()[:, 1:5], anywhere(torch.randn(4, 4).round()), torch.ones(1, 1).expand(4, 4)):
        y, _ = run(a, None, b, w)
        assert same(torch.autograd.grad(y, [a], gy), [3 * gy @ w])
    assert run(a.detach(), None, b.detach(), w.detach())[0].grad_fn is None
    # threads that run a node themselves, and find and add plans at once
    def in_a_thread(_):
        with torch.autograd.set_multithreading_enabled(False):
            for wanted in ([a], [b], [a, b]) * 5:
                y, z = run(a, None, b, w)
                assert len(torch.autograd.grad(y.sum() + z.sum(), wanted)) == len(wanted)
        return True
    plans.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert all(threads.map(in_a_thread, range(4)))
    # nothing is left of a plan whose nodes are gone
    plan = weakref.ref(next(iter(plans.values())))
    del loss, y, g, results
    plans.clear()
    gc.collect()
    assert plan() is None
    form = launch.node().form
    assert form((a, None, a)) == form((b, None, b)) != form((a, None, b))
    for other in (a.double(), a[:2], a.t(), anywhere(a.detach()), None):
        assert form((a,)) != form((other,))


@fast
def test_no_plan_for_products_of_other_settings():
    """cuBLAS is called with those that PyTorch has by default."""
    pytest.importorskip("triton")
    launch = importlib.import_module("mamba_fast.launch")
    for name, value in (("allow_bf16_reduced_precision_reduction", False), ("allow_fp16_reduced_precision_reduction", False),
                        *[("allow_fp16_accumulation", True)] * hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation")):
        assert launch.can_repeat()
        with products(name, value):
            assert not launch.can_repeat(), name


@fast
def test_python_makes_one_kernel_at_a_time(monkeypatch):
    pytest.importorskip("triton")
    launch = importlib.import_module("mamba_fast.launch")
    monkeypatch.setattr(launch, "LAUNCHERS_ARE_C", False)
    inside, seen = [], []

    class Source:
        def make_ir(self, n):
            inside.append(n)
            time.sleep(0.01)
            seen.append(list(inside))
            inside.remove(n)
            return 2 * n

    def compiler(n):
        src = Source()
        return lambda: src.make_ir(n)       # by the name of src Triton's own closure is known

    with launch.Threads() as threads:
        made = [threads.submit(compiler(n)) for n in range(8)]
        other = threads.submit(len, "no kernel")
    assert [future.result() for future in made] == list(range(0, 16, 2)) and other.result() == 9
    assert sorted(seen) == [[n] for n in range(8)]


@fast
def test_a_kernel_that_does_not_compile_leaves_others_alone(monkeypatch):
    pytest.importorskip("triton")
    launch = importlib.import_module("mamba_fast.launch")
    triton = importlib.import_module("triton.runtime._async_compile")
    cleanup = [lambda future: None] * ("cleanup_fn" in inspect.signature(triton.AsyncCompileMode.submit).parameters)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    done = []

    def fails():
        raise ValueError("no kernel")

    def call(key):
        for work in (fails, lambda: key):
            triton.active_mode.get().submit(work, work, done.append, *cleanup)
    for key in ("first", "second"):
        launch.compile_ahead(key, functools.partial(call, key))
        assert triton.active_mode.get() is None and launch.taker.get() is None
    assert done == ["first", "second"]


@in_cpp
def test_plan_repeats_its_calls_with_other_memory(monkeypatch):
    """With a CPU in the place of the GPU, which reads what repeat.cpp gives to CUDA and to cuBLAS."""
    pytest.importorskip("triton")
    launch = importlib.import_module("mamba_fast.launch")
    started = []

    def memory(address, count):
        return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)

    number, address = ctypes.c_int, ctypes.c_void_p

    @ctypes.CFUNCTYPE(number, ctypes.c_int64, *[ctypes.c_uint] * 7, address, ctypes.POINTER(address), address)
    def start(function, *others):
        *sizes, stream, arguments, _ = others
        x, y, n, shift, large, more = (ctypes.c_int64.from_address(arguments[i]).value for i in range(6))
        started.append((function, *sizes, stream, large, more))
        memory(y, n)[:] = memory(x, n) + shift
        return 0

    @ctypes.CFUNCTYPE(number, address, *[number] * 5, address, address, number, number, address, number, number, address,
                      address, number, number, number, number)
    def multiply(blas, turned_a, turned_b, m, n, k, one, a, a_type, a_step, b, b_type, b_step, beta, c, c_type, c_step, _, __):
        assert blas == 6 and a_type == b_type == c_type == 0 and min(a_step, b_step, c_step) >= 1
        columns = lambda t, rows, columns, step: memory(t, (columns - 1) * step + rows).as_strided((rows, columns), (1, step))
        a = columns(a, k, m, a_step).t() if turned_a else columns(a, m, k, a_step)
        b = columns(b, n, k, b_step).t() if turned_b else columns(b, k, n, b_step)
        c = columns(c, m, n, c_step)
        c[:] = a @ b + (c if ctypes.c_float.from_address(beta).value else 0)
        return 0

    on_a_cpu(monkeypatch, launch, start, multiply)
    monkeypatch.setattr(launch, "parameters_of", lambda function: 6)
    kernel = launch.Kernel(None)
    kernel.add("version", StandIn(4, x="*fp32", y="*fp32", none="constexpr", n="i32", shift="i32", large="i64", SIZE="constexpr"))

    def shifted(x, shift):
        y = x.new_empty(x.shape)
        kernel((1, 2, 3), "version", (x, y, None), x.numel(), shift, 2 ** 40, 64)
        return y

    def call(a, w, absent):
        p = launch.product(a, w.t())                                # kept
        q = shifted(p, 100)                                         # not kept
        wide = a.new_empty(len(a), 9)
        launch.product(shifted(q, -99), w, wide[:, 1:5])
        launch.product(p, w, wide[:, 1:5], add=True)
        launch.product(p[:, :1], w[:1], wide[:, 5:9])
        pair = a.new_empty(2, 5)
        launch.product(p.t()[:2, :1], p[:1], pair)
        return (wide, *pair.unbind(), None, launch.product(p.t(), p[:, :1])), (p, a, None)

    def expected(a, w):
        p = a @ w.t()
        return p, (torch.cat([(p + 1) @ w + p @ w, p[:, :1] @ w[:1]], dim=1), *(p.t()[:2, :1] @ p[:1]), p.t() @ p[:, :1])

    plans = {}
    for i, (rows, left) in enumerate(((3, 0), (3, 0), (3, 8), (2, 8))):
        a, w = (torch.randn(n, 4 + left).round()[:, left:] for n in (rows, 5))
        plan = launch.Plan.of(plans, "key", functools.partial(call, a, w, None), (a, w, None))
        assert len(plans) == max(1, i) and plan.kept_inputs == [0]
        del started[:]
        (wide, first, second, none, last), kept = plan.repeat((a, w, None))
        p, (wide_expected, *others) = expected(a, w)
        assert none is None and same([wide[:, 1:], first, second, last], [wide_expected, *others])
        p_kept, a_kept, nothing = plan.all_kept(kept, a)
        assert same([p_kept], [p]) and a_kept is a and nothing is None
        assert started == [(4, 1, 2, 3, 64, 1, 1, 7, 5, 2 ** 40, 0)] * 2
    # inputs that lie between each other's rows, in any order, far apart, and the same one twice
    plans, (b, c), far = {}, torch.randn(5, 8).round().split(4, dim=1), torch.randn(5, 8).round()[:, :4]
    for one, other, count in ((b, c, 1), (c, b, 1), (b, far, 1), (b, b, 2), (far, far, 2), (far, c, 2)):
        plan = launch.Plan.of(plans, "key", lambda one=one, other=other: ((launch.product(one, other.t()),), (other,)), (one, other))
        (result,), kept = plan.repeat((one, other))
        assert len(plans) == count and kept is None and same([result], [one @ other.t()])
        assert plan.kept_inputs == [0 if one is other else 1] and plan.all_kept(None, other)[0] is other
    # scratch is used again, but not by two who need it at once
    a = torch.randn(64, 32).round()

    def long():
        x, early = shifted(a, 1), shifted(a, 2)
        for i in range(6):
            x = shifted(launch.product(x, a[:32].t()), i) if i % 2 else shifted(x, i)
        return (launch.product(x, early.t()),), ()
    plan, x = launch.Plan(long, (a,)), a + 1
    for i in range(6):
        x = x @ a[:32].t() + i if i % 2 else x + i
    assert relative(plan.repeat((a,))[0][0], x @ (a + 2).t()) < 1e-6
    assert plan.to_allocate[0].shape == (64, 64) and plan.to_allocate[2].shape == (3 * 64 * 32 * 4,)
    part = torch.randn(5, 8)[:, :4]
    for wrong in (lambda: ((part + 1,), ()), lambda: ((part,), ()), lambda: ((p := part.new_empty(3),), (p,)),
                  lambda: ((part.contiguous(),), ()), lambda: ((launch.product(part[::2, ::2], part[:2]),), ()),
                  lambda: ((launch.product(part.double(), part),), ()), lambda: ((), (part[1:],)), lambda: ((), (part.t(),)),
                  lambda: ((p := part.new_empty(4), p.view(torch.int32)), ())):
        assert launch.Plan.of({}, "key", wrong, (part,)) is None
    assert launch.Plan.of({}, "key", lambda: ((launch.product(c[1:], c[:4]),), ()), (b, c)) is None    # c[1:] may be of b
    assert launch.taker.get() is None


def with_hook(block):
    block.out_proj.register_forward_hook(lambda module, inputs, output: output * 1)


def with_global_hook(block):
    return nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output * 1 if isinstance(output, torch.Tensor) else None)


def with_adapter(block):
    block.in_proj = nn.Sequential(block.in_proj)


def with_parametrization(block):
    nn.utils.parametrizations.weight_norm(block.out_proj)


def with_normed_convolution(block):
    nn.utils.parametrizations.weight_norm(block.conv1d)


def with_a_bias_that_is_no_parameter(block):
    for linear in (block.in_proj, block.conv1d, block.out_proj):
        bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach()
        del linear.bias
        linear.register_buffer("bias", bias)


def with_an_empty_place(block):
    block.register_module("adapter", None)
    with_hook(block)


def with_another_mix(block):
    mix = block.mix
    block.mix = lambda *inputs: mix(*inputs)


def with_another_class(block):
    block.__class__ = type("Edited", (type(block),), {})


def with_another_parameter(block):
    block.out_proj.register_parameter("scale", nn.Parameter(torch.ones(())))


def with_gradients_twice(block):
    block.scan = "sequential"


@in_cpp
def test_an_edited_norm_acts_in_training(monkeypatch):
    torch.manual_seed(0)
    block, x = block_of(OF_BLOCK2[0]), torch.randn(2, 20, 32)
    expected, forward = block(x), mamba2.GatedRMSNorm.forward
    monkeypatch.setattr(mamba2.GatedRMSNorm, "forward", lambda *inputs: forward(*inputs) * 2)
    monkeypatch.delitem(mamba.PLAIN, mamba2.GatedRMSNorm)
    assert relative(block(x), 2 * expected) < 1e-5


@in_cpp
def test_settings_of_a_block_that_change_before_the_backward_pass():
    torch.manual_seed(0)
    block, x, grads = block_of(OF_BLOCK2[0]), torch.randn(2, 20, 32), []
    for change in (False, True):
        block.zero_grad()
        y = block(x)
        if change:
            block.norm.eps, block.config.dt_limit = 1.0, (0.0, 0.01)
        y.square().sum().backward()
        grads.append([p.grad for p in block.parameters()])
    assert same(*grads)


@in_cpp
@pytest.mark.parametrize("change", [with_hook, with_global_hook, with_adapter, with_parametrization, with_normed_convolution,
                                    with_gradients_twice, with_another_parameter, with_a_bias_that_is_no_parameter,
                                    with_an_empty_place, with_another_mix, with_another_class])
@pytest.mark.parametrize("changes", [OF_BLOCK[0], OF_BLOCK2[0]])
def test_what_is_on_a_part_of_a_block_acts(change, changes):
    """Then the block runs part by part, with the same results."""
    torch.manual_seed(0)
    block, x = block_of(changes), torch.randn(2, 20, 32)
    expected, at_once = block(x), AT_ONCE[block.config.layer]
    assert type(expected.grad_fn).__name__ == at_once
    handle = change(block)
    y = block(x)
    if handle is not None:
        handle.remove()
    assert type(y.grad_fn).__name__ != at_once and relative(y, expected) < 1e-5


@in_cpp
def test_a_norm_of_another_kind_in_a_block_acts():
    torch.manual_seed(0)
    block, x = block_of(OF_BLOCK2[0]), torch.randn(2, 20, 32)
    expected = block(x)
    block.norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    assert relative(block(x), 3 * expected) < 1e-5


@in_cpp
def test_another_norm_in_a_block_acts():
    torch.manual_seed(0)
    for norm in (GatedRMSNorm(64, 8, 1e-5, False), GatedRMSNorm(64, 1, 1e-5, True), GatedRMSNorm(64, 4, 1e-3, False)):
        block, x = block_of(OF_BLOCK2[0]), torch.randn(2, 20, 32)
        block.norm = norm
        y = block(x)
        block.scan = "sequential"
        assert relative(y, block(x)) < 1e-5


@in_cpp
@pytest.mark.parametrize("name", ["D", "A_log", "dt_proj.bias", "dt_bias", "norm.weight", "out_proj.bias"])
@pytest.mark.parametrize("changes", [OF_BLOCK[1], OF_BLOCK2[0]])
def test_a_parameter_of_another_shape_or_place_is_never_read_by_cpp(name, changes):
    """What PyTorch makes of it happens, an error or not; C++ would read beyond it."""
    block, x = block_of(changes), torch.randn(2, 20, 32)
    if name not in dict(block.named_parameters()):
        return
    of, _, last = name.rpartition(".")
    module, p = block.get_submodule(of), block.get_parameter(name)
    for other in (p.detach()[:1].clone(), p.detach().to("meta")):
        setattr(module, last, nn.Parameter(other))
        try:
            made = type(block(x).grad_fn).__name__
        except (RuntimeError, ValueError, NotImplementedError):
            continue
        assert made not in AT_ONCE.values()


@in_cpp
@pytest.mark.parametrize("changes", [OF_BLOCK[0], OF_BLOCK2[0]])
@pytest.mark.parametrize("length", [20, 300])
def test_backward_of_a_block_within_autocast(changes, length):
    """The types are those of forward, wherever backward is called; twice, too."""
    torch.manual_seed(0)
    block, x, gy = block_of(changes), torch.randn(2, length, 32), torch.randn(2, length, 32)
    expected, _ = results_of_block(block, x, gy)
    block.zero_grad()
    x = x.requires_grad_()
    y = block(x)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y.backward(gy, retain_graph=True)
    assert same([x.grad / 2, *(p.grad / 2 for p in block.parameters())], expected[1:], 1e-6)


@in_cpp
@pytest.mark.parametrize("changes", [OF_BLOCK[0], OF_BLOCK2[0]])
def test_weights_in_any_order_in_memory(changes):
    torch.manual_seed(0)
    block, x, gy = block_of(changes), torch.randn(2, 20, 32), torch.randn(2, 20, 32)
    expected, _ = results_of_block(block, x, gy)
    for module in (block.in_proj, block.conv1d, block.out_proj):
        turned = module.weight.detach().transpose(0, -1).contiguous().transpose(0, -1)
        module.weight = nn.Parameter(turned)
    block.A_log.data = block.A_log.detach().t().contiguous().t()
    got, made = results_of_block(block, x, gy)
    assert made in AT_ONCE.values()
    in_order = dict(zip(["y", "x", *dict(block_of(changes).named_parameters())], expected))
    for one, name in zip(got, ["y", "x", *dict(block.named_parameters())]):
        assert relative(one, in_order[name]) < 1e-5, name


@in_cpp
@pytest.mark.parametrize("changes", [OF_BLOCK[0], OF_BLOCK2[0]])
def test_frozen_parameters_and_many_rows(changes):
    check_block(changes, 300, frozen=("in_proj.weight", "out_proj.weight", "x_proj.weight"))


@in_cpp
@pytest.mark.parametrize("changes", [OF_BLOCK[0], OF_BLOCK2[0]])
def test_a_block_at_once_under_checkpoint(changes):
    torch.manual_seed(0)
    block, x, gy = block_of(changes), torch.randn(2, 20, 32), torch.randn(2, 20, 32)
    expected, _ = results_of_block(block, x, gy)
    block.zero_grad()
    x = x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    y.backward(gy)
    assert same([y, x.grad, *(p.grad for p in block.parameters())], expected)


@in_cpp
@pytest.mark.parametrize("shape", [(4, 70, 32), (130, 64), (40, 4, 4, 16), (20, 30, 20), (3, 64)])
def test_norm_equals_that_of_torch(shape):
    """In C++ where the width is a multiple of that of a vector, with first and second derivatives, and what torch.func does."""
    torch.manual_seed(0)
    ours, theirs = (kind(shape[-1], eps=1e-5) for kind in (mamba.RMSNorm, nn.RMSNorm))
    ours.weight.data.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x, gy, results = torch.randn(shape, requires_grad=True), torch.randn(shape), []
    for norm, x_of, gy_of in ((ours, x, gy), (theirs.double(), x.detach().double().requires_grad_(), gy.double())):
        y = norm(x_of)
        first = torch.autograd.grad(y, (x_of, norm.weight), gy_of, retain_graph=True)
        again = torch.autograd.grad(y, (x_of, norm.weight), gy_of, create_graph=True)
        second = torch.autograd.grad(again[0].square().sum(), (x_of, norm.weight))
        results.append([y, *first, *again, *second])
    made = type(results[0][0].grad_fn).__name__
    assert (made == "TwiceDifferentiableBackward") == (shape[-1] % 16 == 0 and x.numel() > 5000), made
    assert same([t.double() for t in results[0]], results[1], 1e-6)
    assert same(torch.func.vmap(ours)(x), results[0][0], 1e-6)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(ours(torch.autograd.forward_ad.make_dual(x, gy))).tangent
    assert relative(tangent, torch.func.jvp(ours, (x,), (gy,))[1]) < 1e-6
    rows = torch.stack([gy, 2 * gy])
    batched, = torch.autograd.grad(ours(x), x, rows, is_grads_batched=True)
    assert same(batched, torch.stack([results[0][1], 2 * results[0][1]]), 1e-6)


@in_cpp
def test_block_at_once_has_no_second_derivative():
    torch.manual_seed(0)
    for changes in (OF_BLOCK[0], OF_BLOCK2[0]):
        block, x = block_of(changes), torch.randn(2, 20, 32, requires_grad=True)
        (gx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gx.sum().backward()
        (gx,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)     # also if the loss is linear
        with pytest.raises(RuntimeError, match="no second derivative"):
            gx.square().sum().backward(inputs=[x])


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: scan_cpu, and C++

@pytest.fixture(params=[pytest.param("C++", marks=WITHOUT_COMPILER), "PyTorch"])
def scan_of_a_cpu(request, monkeypatch):
    """With what scan_cpu.cpp compiles to, and without."""
    from mamba_fast import cpp
    if request.param == "PyTorch":
        monkeypatch.setattr(cpp, "compiled", lambda name: None)
    else:
        assert cpp.compiled("scan_cpu") is not None
    return request.param


@pytest.fixture
def as_compiled(scan_of_a_cpu, monkeypatch):
    """selective_scan as it is in what torch.compile compiles: by an operator."""
    from mamba_fast import scan_cpu
    monkeypatch.setattr(scan_cpu.torch.compiler, "is_compiling", lambda: True)


@fast
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 34, 70])
def test_scan_of_a_cpu_equals_float64(scan_of_a_cpu, length):
    """Any rest of a tile of 16 steps, of a vector of 16 channels, of a group of 128 and of 8 states."""
    rng = random.Random(length)
    for shape in ((1, 1, 1), (3, 5, 4), (1, 64, 16), (2, 130, 9), (2, 300, 8)):
        check_scan(scan_inputs(shape[0], length, *shape[1:]), ["chunked"])
        some = [name for name in OPTIONS if rng.random() < 0.5]
        check_scan(scan_inputs(shape[0], length, *shape[1:], some), ["chunked"], softplus=rng.random() < 0.5)


@fast
def test_scan_of_a_cpu_with_all_that_the_others_take(scan_of_a_cpu):
    """Options, extreme decay, 16 bits, autocast, any split, views."""
    for count in range(len(OPTIONS) + 1):
        for options in itertools.combinations(OPTIONS, count):
            check_scan(scan_inputs(3, 37, 20, 4, options), ["chunked"], softplus=count % 2 == 0)
    check_the_rest("chunked")


@fast
def test_operator_of_the_scan(as_compiled):
    for length in (1, 17, 65):
        check_scan(scan_inputs(3, length, 20, 4), ["chunked"])
        for count in range(len(OPTIONS) + 1):
            for options in itertools.combinations(OPTIONS, count):
                check_scan(scan_inputs(3, length, 5, 4, options), ["chunked"], softplus=count % 2 == 0)


@fast
@WITHOUT_COMPILER
@pytest.mark.parametrize("changes", [{}, {"bias": True, "conv_bias": False}])
def test_operator_of_the_block(monkeypatch, changes):
    """What torch.compile gets for a GPU, with the parts of a CPU in it: the same result and gradients."""
    module = importlib.import_module("mamba_fast.block")
    block, x = MambaBlock(MambaConfig(d_model=32, **changes)), torch.randn(2, 40, 32, requires_grad=True)
    expected, parameters = block(x), dict(block.named_parameters())
    shape = module.OnCPU.scan(*(torch.zeros(2, 40, 64) for _ in range(2)), block.A_log.detach(),
                              *(torch.zeros(2, 40, 16) for _ in range(2)), *map(torch.zeros, (64, (2, 40, 64), 64)))[1].shape

    class Parts(module.OnCPU):
        @staticmethod
        def scan(*inputs):
            y, kept = module.OnCPU.scan(*inputs)
            return y, kept.flatten()

        @staticmethod
        def scan_back(gy, kept, *others):
            return module.OnCPU.scan_back(gy, kept.view(shape), *others)
    monkeypatch.setattr(module, "OnGPU", Parts)
    monkeypatch.setattr(module, "scan_triton", SimpleNamespace(_sizes_kept=lambda *sizes: [shape.numel()]))
    inputs = [x, *map(parameters.get, module.OF_MAMBA)]
    wanted = [t for t in inputs if t is not None]
    y = torch.ops.mamba_py.block(*inputs)[0]
    gout = torch.randn_like(y)
    assert torch.equal(y, expected)
    for one, other in zip(torch.autograd.grad(y, wanted, gout), torch.autograd.grad(expected, wanted, gout)):
        assert torch.equal(one, other)
    torch.library.opcheck(torch.ops.mamba_py.block.default, inputs)


@fast
@WITHOUT_COMPILER
@torch.no_grad()
def test_step_sizes_of_cpp():
    """softplus to float32's precision, also where it is tiny; nothing passes by a delta of 0, NaN does not vanish."""
    from mamba_fast import scan_cpu
    raw = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([0.0, -0.0, 1e-8, -1e-8, 1e4])])
    channels = len(raw)
    u, zeros = torch.ones(1, 1, channels), torch.zeros(1, channels, 1)      # with A = 0, B = C = 1: y = softplus
    y, _ = scan_cpu.scan(u, raw[None, None], zeros[0], torch.ones(1, 1, 1), torch.ones(1, 1, 1), zeros, None, None, None, True)
    expected = F.softplus(raw.double(), threshold=1000)
    assert ((y[0, 0] - expected).abs() <= (4e-7 + 8e-8 * raw.abs()) * expected).all()   # as exact as raw is
    h = torch.randn(1, 16, 5)
    inputs = torch.randn(1, 40, 16), torch.zeros(1, 40, 16), -torch.rand(16, 5), torch.randn(1, 40, 5), torch.randn(1, 40, 5)
    assert torch.equal(scan_cpu.scan(*inputs, h)[1], h)
    inputs[1][0, 3, 2] = math.nan
    y, last = scan_cpu.scan(*inputs, h)
    assert last[0, 2].isnan().all() and not last[0, 3].isnan().any() and y[0, 3:, 2].isnan().all() and not y[0, :3].isnan().any()


def inputs_of_chunks(batch, length, heads, headdim, d_state, groups, decay):
    """Of in_chunks of mamba2.py: u, delta, a, B, C, state, own."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    delta = F.softplus(rand(batch, length, heads) - 2)
    a, chance = -delta * torch.exp(rand(heads) + 1), torch.rand(batch, length, heads, generator=g)
    a = {"usual": a, "none": a * 0, "strong": a * 0 - 30,
         "documents": a.masked_fill(chance < 0.1, -1024).masked_fill(chance > 0.9, 0).masked_fill(chance.sub(0.5).abs() < 0.05, 0.01)}[decay]
    inputs = (rand(batch, length, heads, headdim), delta, a, rand(batch, length, groups, d_state), rand(batch, length, groups, d_state),
              rand(batch, heads, headdim, d_state), rand(batch, length, heads))
    return [t.requires_grad_() for t in inputs]


@fast
@WITHOUT_COMPILER
@pytest.mark.parametrize("by_operator", [False, True])
@pytest.mark.parametrize("decay", ["usual", "none", "strong", "documents"])
@pytest.mark.parametrize("shape", [(2, 1, 2, 16, 16, 1), (2, 100, 8, 64, 64, 1), (2, 33, 4, 32, 128, 2), (1, 200, 5, 64, 16, 1),
                                   (2, 65, 8, 16, 64, 8), (1, 16, 1, 16, 16, 1)])
def test_ssd_of_a_cpu_equals_float64(shape, decay, by_operator):
    """Any rest of a chunk of 16 steps, of 4 chunks and of 4 heads; groups; documents that begin anywhere."""
    check_ssd_of_a_cpu(shape, decay, by_operator)


def check_ssd_of_a_cpu(shape, decay, by_operator=False):
    from mamba_fast import ssd_cpu
    inputs = inputs_of_chunks(*shape, decay)
    if by_operator:
        y, last = ssd_cpu.operator(*inputs[:5], inputs[6], inputs[5], True)
    else:
        y, last = ssd_cpu.ssd(*inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    u, delta, a, B, C, state, own = wide
    read_at_once = of_heads((B * C).sum(-1), shape[2]) * delta      # in one_by_one, where in_chunks has own
    expected, expected_last = mamba2.one_by_one(u, delta, a, B, C, state)
    expected = expected + u * (own - read_at_once)[..., None]
    got, reference = (gradients(*results, dict(enumerate(leaves))) for results, leaves in (((y, last), inputs), ((expected, expected_last), wide)))
    assert relative(y, expected) < 2e-6 and relative(last, expected_last, 1e-3) < 2e-6
    assert all(relative(got[i], reference[i], 1e-3) < 4e-6 for i in reference)


@fast
@WITHOUT_COMPILER
@pytest.mark.parametrize("shape", [(2, 37, 1, 8, 128, 32), (1, 130, 2, 4, 64, 16), (3, 5, 3, 6, 32, 16), (1, 1, 2, 2, 128, 64)])
def test_keys_and_queries_of_a_cpu_equal_float64(shape):
    from mamba_fast import turn_cpu
    check_angles(turn_cpu.angles_since, *shape[:2], *shape[3::2], device="cpu")
    check_keys(lambda *inputs: turn_cpu.keys_and_queries(*inputs[:-1]), *shape, device="cpu")


@fast
@WITHOUT_COMPILER
def test_what_turn_cpu_leaves_to_pytorch():
    """Other shapes than its own, as a state of another block or a bias for all heads; and second derivatives of the angles."""
    from mamba_fast import turn_cpu
    turns, x, bias = torch.rand(2, 5, 4, 16, requires_grad=True), torch.randn(2, 5, 1, 64), torch.randn(4, 64)
    first = torch.rand(2, 4, 16, requires_grad=True)
    for wrong in (first[:1], first[:, :1], first[..., :8], torch.rand(2, 4, 0)):
        assert turn_cpu.angles_since(turns, wrong) is None
    assert turn_cpu.angles_since(turns[..., :0], torch.rand(2, 4, 0)) is None
    for given in ((x, x, bias[:1], bias[:1], turns), (x, x[:1], bias, bias, turns), (x[:, :4], x[:, :4], bias, bias, turns),
                  (x, x, bias, bias[:, :32], turns), (x, x, bias, bias, turns[..., :3])):
        assert turn_cpu.keys_and_queries(*given) is None
    g = torch.randn(2, 5, 4, 16, requires_grad=True)
    once = torch.autograd.grad(turn_cpu.angles_since(turns, first), (turns, first), g)
    kept = torch.autograd.grad(turn_cpu.angles_since(turns, first), (turns, first), g, create_graph=True)
    assert same(once, [t.detach() for t in kept], 1e-6)
    again, = torch.autograd.grad(kept[0].square().sum(), g)
    assert same(again, 2 * kept[0].cumsum(1).detach(), 1e-5)


@fast
@WITHOUT_COMPILER
@pytest.mark.parametrize("headdim, d_state, rope_fraction", [(32, 128, 0.5), (32, 64, 1.0), (32, 24, 0.5), (32, 128, 0.3)])
def test_mamba3_with_and_without_cpp(headdim, d_state, rope_fraction, monkeypatch):
    """Sizes that vectors fit and others: the same outputs and gradients as by PyTorch alone."""
    config = Mamba3Config(d_model=64, headdim=headdim, d_state=d_state, rope_fraction=rope_fraction, scan="chunked")
    block, x, results = Mamba3Block(config), torch.randn(2, 70, 64), []
    for step in range(2):
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])])
        monkeypatch.setattr(mamba, "fast", None)
    assert same(*results, 2e-5)


@fast
@WITHOUT_COMPILER
@pytest.mark.parametrize("by_operator", [False, True])
@pytest.mark.parametrize("batch, length, channels, groups", [(2, 9, 32, 1), (1, 1, 16, 1), (3, 70, 128, 4), (2, 65, 48, 3)])
def test_gated_norm_of_a_cpu(batch, length, channels, groups, by_operator):
    """z is a part of a wider projection, as in the block."""
    from mamba_fast import norm_cpu
    norm, results = GatedRMSNorm(channels, groups, 1e-5, False), []
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    y, wide = (at_random(torch.randn, batch, length, n).requires_grad_() for n in (channels, 3 * channels))
    for exact in (False, True):
        inputs = [t.detach().to(torch.float64 if exact else torch.float32).requires_grad_() for t in (y, wide, norm.weight)]
        z = inputs[1][..., channels:2 * channels]
        if exact:
            out = norm.double()(inputs[0], z, "sequential")
            inputs[2] = norm.weight
        else:
            out = (norm_cpu.operator if by_operator else norm_cpu.gated_norm)(inputs[0], z, inputs[2], groups, 1e-5)
        g = at_random(torch.randn, batch, length, channels, seed=2).to(out.dtype)
        results.append([t.double() for t in (out, *torch.autograd.grad(out, inputs, g))])
    assert same(*results, 1e-6)


@fast
@WITHOUT_COMPILER
@pytest.mark.parametrize("by_operator", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 66])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution_of_a_cpu(length, width, by_operator):
    """Sequences shorter than the convolution, any rest of 32 steps and of 128 channels; x is half of a projection."""
    from mamba_fast import layers
    results = []
    for exact in (False, True):
        inputs = [at_random(torch.randn, *shape, seed=i).to(torch.float64 if exact else torch.float32).requires_grad_()
                  for i, shape in enumerate([(2, length, 288), (144, 1, width), (144,), (2, width - 1, 144)])]
        x, weight, bias, state = inputs[0].chunk(2, -1)[0], *inputs[1:]
        if exact:
            out = mamba.conv_silu(x, weight, bias, state, "sequential")[0]
        elif by_operator:
            if not layers.ConvSilu.fits(x, weight[:, 0].t(), bias, state):
                return
            out = layers.conv_operator(x, weight[:, 0].t(), bias, state)
        else:
            out = layers.conv_silu(x, weight, bias, state)
        g = at_random(torch.randn, 2, length, 144, seed=9).to(out.dtype)
        results.append([t.double() for t in (out, *torch.autograd.grad(out, inputs, g))])
    assert same(*results, 1e-6)


def check_extremes(raw):
    """softplus and silu of these, each in a channel of its own, as PyTorch has them: delta = -inf is no step at all."""
    from mamba_fast import layers, scan_cpu
    channels = 16
    raw, zeros, one = torch.cat([raw, torch.zeros(channels - len(raw))]), torch.zeros(1, channels, 1), torch.ones(1, 1, 1)
    y, _ = scan_cpu.scan(torch.ones(1, 1, channels), raw[None, None], zeros[0], one, one, zeros, None, None, None, True)
    known = raw < math.inf              # infinity times A = 0 is NaN everywhere
    assert torch.allclose(y[0, 0][known], F.softplus(raw)[known]) and y[0, 0][raw.isnan()].isnan().all()
    out = layers.conv_silu(raw.repeat(1, 3, 1), torch.tensor([0.0, 1.0]).repeat(channels, 1, 1), None, None)
    expected = mamba.conv_silu(raw.repeat(1, 3, 1), torch.tensor([0.0, 1.0]).repeat(channels, 1, 1), None, None, "sequential")[0]
    known = expected.isfinite()         # 0 times infinity, and silu(-inf), are NaN for some and not for others
    assert torch.allclose(out[known], expected[known])


@fast
@WITHOUT_COMPILER
def test_infinite_steps():
    check_extremes(torch.tensor([math.inf, -math.inf, math.nan, 200.0, -200.0]))
    inputs = {k: v.detach() for k, v in scan_inputs(2, 20, 16, 4).items()}
    inputs["delta"][:, 5:9] = -math.inf      # padding, as some write it
    y, last = (selective_scan(**inputs, delta_softplus=True, return_last_state=True, method=method) for method in ("chunked", "sequential"))
    assert same(y, last, 1e-6)
    inputs["A"][3] = -math.inf               # a channel without memory
    y, last = (selective_scan(**inputs, delta_softplus=True, method=method)[:, :5] for method in ("chunked", "sequential"))
    assert same(y, last, 1e-6)


@fast
@WITHOUT_COMPILER
def test_shapes_that_do_not_fit_do_not_reach_cpp():
    """What broadcasts does so, and what does not is PyTorch's error, as without mamba_fast/."""
    x = at_random(torch.randn, 2, 8, 32)
    one_filter = at_random(torch.randn, 1, 1, 4)
    assert same(mamba.conv_silu(x, one_filter)[0], mamba.conv_silu(x, one_filter.expand(32, 1, 4))[0], 1e-6)
    for channels in (16, 64):
        with pytest.raises(RuntimeError):
            mamba.conv_silu(x, torch.randn(channels, 1, 4))
    norm = GatedRMSNorm(32, 1, 1e-5, False)
    assert same(norm(x, x[:, :1]), norm(x, x[:, :1].expand(2, 8, 32)), 1e-6)
    for wrong, size in ((norm, 64), (GatedRMSNorm(65, 2, 1e-5, False), 65)):
        with pytest.raises(RuntimeError):
            wrong(torch.randn(2, 8, size), torch.randn(2, 8, size))
    y, z = at_random(torch.randn, 4, 1, 32), at_random(torch.randn, 1, 4, 32, seed=1).transpose(0, 1)   # one step: any distance of rows
    assert same(norm(y, z), norm(y, z.clone(memory_format=torch.contiguous_format)), 1e-6)
    inputs = {k: v.detach() for k, v in scan_inputs(4, 1, 16, 4).items()}
    expected = selective_scan(**inputs, method="sequential")
    inputs["z"] = inputs["z"].transpose(0, 1).contiguous().transpose(0, 1)
    assert same(selective_scan(**inputs, method="chunked"), expected, 1e-6)


@fast
@WITHOUT_COMPILER
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_has_no_cpp_in_it():
    """What writes down PyTorch's calls does not see what C++ does."""
    from torch.fx.experimental.proxy_tensor import make_fx
    weight, norm = at_random(torch.randn, 32, 1, 4), GatedRMSNorm(32, 1, 1e-5, False).requires_grad_(False)
    x, other = at_random(torch.randn, 2, 2, 9, 32)
    for function in (lambda x: mamba.conv_silu(x, weight)[0], lambda x: norm(x, x)):
        for traced in (make_fx(function)(x), torch.jit.trace(function, x)):
            assert same(traced(other), function(other), 1e-6)


@fast
@WITHOUT_COMPILER
def test_cpp_gives_the_same_bits_on_any_number_of_threads(monkeypatch):
    from mamba_fast import scan_cpu, ssd_cpu, turn_cpu
    results, inputs = [], {k: v.detach().requires_grad_() for k, v in scan_inputs(2, 50, 300, 8).items()}
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, h = scan_cpu.scan(*[inputs[k] for k in ("u", "delta", "A", "B", "C", "state", "D", "z", "delta_bias")], True)
        results.append([y, h, *torch.autograd.grad(y.sum() + h.sum(), list(inputs.values()))])
        y, h = ssd_cpu.ssd(*(of_heads := inputs_of_chunks(2, 100, 10, 16, 32, 1, "usual")))
        results[-1] += [y, h, *torch.autograd.grad(y.sum() + h.sum(), of_heads)]
        leaves = [at_random(torch.randn, *shape).requires_grad_() for shape in
                  ((2, 90, 2, 64), (2, 90, 2, 64), (4, 64), (4, 64), (2, 90, 4, 32))]
        angles = turn_cpu.angles_since(leaves[-1], leaves[-1][:, 0])
        made = turn_cpu.keys_and_queries(*leaves[:-1], angles)
        results[-1] += [*made, *torch.autograd.grad(sum(t.square().sum() for t in made), leaves)]
    assert same(results[0], results[1]) and same(results[0], results[2])


@fast
def test_what_has_no_memory_of_its_own_is_not_given_to_cpp():
    """Subclasses of tensors: they may be anything."""
    class Wrapper(torch.Tensor):
        pass
    inputs = {k: v.detach() for k, v in scan_inputs(2, 20, 16, 4).items()}
    y = selective_scan(**{**inputs, "u": inputs["u"].as_subclass(Wrapper)}, delta_softplus=True)
    assert isinstance(y, Wrapper) and same(y.as_subclass(torch.Tensor), selective_scan(**inputs, delta_softplus=True), 1e-6)


@fast
@pytest.mark.parametrize("trouble", ["no compiler", "no C++", "a full home", "a home of others", "another system"])
def test_where_cpp_cannot_be_compiled(trouble, tmp_path, monkeypatch, recwarn):
    """PyTorch does the work then. A compiler that fails is heard of, once."""
    from mamba_fast import cpp
    inputs = {k: v.detach() for k, v in scan_inputs(2, 20, 16, 4).items()}
    expected = selective_scan(**inputs, delta_softplus=True, method="sequential")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp, "compiled", functools.cache(cpp.compiled.__wrapped__))
    if trouble == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(cpp.shutil, "which", lambda name: None)
    elif trouble == "no C++":
        (tmp_path / "broken").write_text("#!/bin/sh\necho nothing works here >&2\nexit 1\n")
        (tmp_path / "broken").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "broken"))
    elif trouble == "a full home":
        (tmp_path / "cache").write_text("a file where a folder should be")
    elif trouble == "a home of others":
        (tmp_path / "cache" / "mamba_fast").mkdir(parents=True)
        (tmp_path / "cache" / "mamba_fast").chmod(0o777)
    else:
        monkeypatch.setattr(cpp.sys, "platform", "darwin")
    for _ in range(2):
        assert same(selective_scan(**inputs, delta_softplus=True), expected, 1e-6)
    said = [str(w.message) for w in recwarn if "compiled" in str(w.message)]
    assert len(said) == (trouble == "no C++") and all("nothing works here" in words for words in said)
    if trouble in ("a full home", "a home of others"):
        assert (cpp.compiled("scan_cpu") is not None) == bool(shutil.which("g++") or shutil.which("clang++"))
        assert not list((tmp_path / "cache").glob("mamba_fast/*"))


@fast
@WITHOUT_COMPILER
def test_what_is_compiled_is_kept(tmp_path, monkeypatch):
    """For the next process, and, where the source or the flags are others, not taken for the other."""
    from mamba_fast import cpp
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands, compile_to = [], cpp.compile_to
    monkeypatch.setattr(cpp, "compile_to", lambda path, command, lock=None: commands.append(command) or compile_to(path, command))
    for flags in (cpp.FLAGS, cpp.FLAGS, (*cpp.FLAGS, "-DANOTHER")):
        monkeypatch.setattr(cpp, "FLAGS", flags)
        assert cpp.compiled.__wrapped__("scan_cpu") is not None
    assert len(commands) == len(list((tmp_path / "mamba_fast").iterdir())) == 2


@fast
@WITHOUT_COMPILER
@pytest.mark.parametrize("width", [4, 8])
def test_narrower_vectors(width, monkeypatch):
    """As on a CPU without AVX-512."""
    from mamba_fast import cpp
    monkeypatch.setattr(cpp, "CPUS", {})
    monkeypatch.setattr(cpp, "NARROW", width)
    monkeypatch.setattr(cpp, "compiled", functools.cache(cpp.compiled.__wrapped__))
    check_scan(scan_inputs(2, 37, 140, 9), ["chunked"])
    check_ssd_of_a_cpu((2, 33, 6, 32, 48, 2), "documents")
    for layer in ("mamba", "mamba2"):
        results = []
        for scan in ("auto", "sequential"):
            model, idx = small(layer=layer, scan=scan), tokens(2, 40)
            results.append(torch.autograd.grad(model(idx, idx)[1], list(model.parameters())))
        assert same(*results, 1e-4)
    extremes = torch.tensor([math.inf, -math.inf, math.nan, 200.0, -200.0])
    check_extremes(extremes)
    for changes in ONE_CALL_SHAPES:
        check_step_in_cpp(changes, 3, torch.bfloat16, 2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: decode, the step of a token


@fast
@pytest.mark.parametrize("changes", [{"d_model": 256, "n_layer": 1},
                                     {"bias": True, "d_conv": 1, "conv_bias": False, "d_intermediate": 24}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_decoder_equals_one_call(changes, dtype, batch):
    """The step that is made ready once gives the logits and the states of a single call."""
    from mamba_fast import decode
    model, idx = small(**changes).eval().to(torch.float32 if dtype == torch.int8 else dtype), tokens(batch, 20)
    if dtype == torch.int8:
        mamba.fast.quantize_int8(model)
    given = some_state(model, batch)
    step, before = model.decoder(list(idx[:, :1]), given), copy.deepcopy(given)
    assert isinstance(step, decode.EagerDecoder)
    whole, _, last = model(idx, state=given)
    got = [step(token) for token in idx.unbind(1)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.int8: 3e-2}[dtype]
    assert got[0].shape == whole[:, 0].shape and relative(torch.stack(got, 1), whole) < tolerance
    assert same(step.state, last, tolerance) and same(given, before)


@fast
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16, 48])
def test_product_with_one_row_on_any_number_of_threads(threads, monkeypatch):
    from mamba_fast import decode
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for n_in, n_out, bias in ((512, 288, True), (700, 211, False), (5, 96, True)):
        linear, x = nn.Linear(n_in, n_out, bias=bias), torch.randn(1, n_in)
        with torch.no_grad():
            y = decode.made_ready(linear, 1, compile=False)(x)
        assert y.shape == (1, n_out) and relative(y, F.linear(x, linear.weight, linear.bias)) < 1e-6


def unlike_eager(model, prompts, **more):
    """Rows that differ between the compiled and the plain generation."""
    rows = [model.generate(prompts, 12, generator=torch.Generator().manual_seed(1), compile=compile, **more)
            for compile in (False, True)]
    return [i for i, pair in enumerate(zip(*rows)) if not torch.equal(*pair)]


@pytest.fixture
def only_one_is_compiled():
    """Behind this limit, of 8 as a rule, torch.compile gives up."""
    config = torch._dynamo.config
    with config.patch({"recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": 1}):
        yield


@fast
@WITHOUT_COMPILER
@pytest.mark.usefixtures("only_one_is_compiled")
def test_compiled_step(capsys):
    """Also of streams side by side: after its first token none checks again which code is for it, and finds its own. And
    of any number of models."""
    from mamba_fast import decode
    torch.compiler.reset()
    models = [small(n_layer=n).eval() for n in (2, 1)]
    prompts = [tokens(n, seed=n) for n in (5, 1)]
    assert not unlike_eager(models[0], prompts[:1], temperature=0)
    assert not unlike_eager(models[0], prompts, stop=[7, 9], repetition_penalty=1.3, top_k=8)
    assert not unlike_eager(small(layer="mamba2", headdim=8, d_state=16, n_layer=1).eval(), prompts[:1], temperature=0)
    assert decode.EagerDecoder.COMPILES[models[0]] == {1: True, 2: True}
    streams = [[model.stream(tokens(rows, 3, seed=rows), 9, temperature=0, compile=compile) for model, rows in
                ((models[0], 1), (models[1], 1), (models[0], 2))] for compile in (False, True)]
    order = [0, 1, 0, 0, 2, 1, 2, 0, 1, 1, 2, 0, 0, 2, 2, 1]
    plain, compiled = ([next(some[i]).tolist() for i in order] for some in streams)
    assert plain == compiled
    for quantize, tolerance in ((False, 1e-5), (True, 2e-2)):
        model = mamba.fast.quantize_int8(models[0]) if quantize else models[0]
        with torch.no_grad():
            steps = [model.decoder([tokens(1)], model.init_state(1), compile=compile) for compile in (False, True)]
            for token in tokens(6, 1):
                assert relative(*(step(token) for step in steps)) < tolerance
        assert same(*(step.state for step in steps), tolerance)
    assert capsys.readouterr() == ("", "")


@fast
def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    from mamba_fast import decode

    def fails(*inputs):
        raise RuntimeError("no compiler\nand a long story")
    monkeypatch.setattr(decode, "compiled_call", lambda: fails)
    assert not unlike_eager(small().eval(), tokens(2, 4))
    assert capsys.readouterr() == ("", "torch.compile does not work here (RuntimeError); going on without it\n")


# models of which C++ takes all layers
IN_ONE_CALL = [{}, *({"layer": layer, "headdim": 16, "d_state": 16, "ngroups": 2} for layer in ("mamba2", "mamba3"))]
ONE_CALL_SHAPES = [*(SHAPES[i] for i in (0, 1, 5)), *({"layer": "mamba2", "headdim": 16, **options} for options in (
    {"d_state": 24, "residual_in_fp32": True},
    {"d_state": 12, "d_model": 64, "ngroups": 2, "rmsnorm": False, "dt_limit": (0.01, 0.03), "bias": True, "d_conv": 2, "conv_bias": False},
    {"d_state": 16, "d_model": 48, "ngroups": 3, "d_conv": 1, "tie_embeddings": False},
    {"d_state": 8, "headdim": 32, "d_model": 64, "ngroups": 2, "norm_before_gate": True}, {"d_model": 256, "headdim": 64, "n_layer": 1})),
    *({"layer": "mamba3", "d_state": 16, "d_model": 48, **options} for options in (
        {"headdim": 12, "A_floor": 0.9}, {"headdim": 8, "ngroups": 2, "rope_fraction": 1.0, "dt_limit": (0.01, 0.1), "bias": True},
        {"headdim": 64, "d_model": 256, "d_state": 64, "n_layer": 1}))]


@in_cpp
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.int8, 5e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("changes", ONE_CALL_SHAPES)
def test_the_step_in_cpp(changes, rows, dtype, tolerance):
    check_step_in_cpp(changes, rows, dtype, tolerance)


@torch.no_grad()
def check_step_in_cpp(changes, rows, dtype, tolerance):
    """All layers in C++ give the logits and states of one call in float64 of the same weights."""
    from mamba_fast import decode, step_cpu
    model = awkward(changes, dtype)
    exact = (awkward(changes) if dtype == torch.int8 else awkward(changes, dtype)).double()
    assert step_cpu.layers(model, model.init_state(rows)) is not None
    idx = tokens(rows, 20) % model.config.vocab_size
    whole, _, last = exact(idx, state=exact.init_state(rows))
    step = decode.EagerDecoder(model, model.init_state(rows), False)
    got = torch.stack([step(token) for token in idx.unbind(1)], dim=1)
    assert got.shape == whole.shape and relative(got.float(), whole) < tolerance
    assert all(one.dtype == before.dtype for one, before in zip(tree_leaves(step.state), tree_leaves(model.init_state(rows))))
    for one, expected in zip(of_states(step.state), of_states(last), strict=True):
        assert one.numel() == 0 or relative(one.float(), expected) < tolerance


def with_an_mlp(model):
    model.backbone["layers"][1].mlp = lively(d_intermediate=24).backbone["layers"][1].mlp
    model.backbone["layers"][1].norm2 = nn.RMSNorm(32, eps=1e-5)


def with_a_narrow_parameter(model):
    model.backbone["layers"][2].mixer.conv1d.bias = nn.Parameter(torch.ones(1))


def with_a_narrow_bias(model):
    model.backbone["layers"][2].mixer.B_bias = nn.Parameter(torch.full((1, 1, 1), 0.5))


def with_a_scale(model):
    model.lm_head.scale = 0.5


def with_another_kind_of_layer(model):
    other = IN_ONE_CALL[model.config.layer == "mamba"]
    model.backbone["layers"][1] = lively(**other).backbone["layers"][1]


def with_another_limit(model):
    changes = {**IN_ONE_CALL[1], "dt_limit": (0.3, 0.4)}
    model.backbone["layers"][1] = lively(**changes).backbone["layers"][1]


def with_a_norm_of_one_group(model):
    model.backbone["layers"][1].mixer.norm.groups = 1


def with_a_norm_before_the_gate(model):
    model.backbone["layers"][1].mixer.norm.norm_before_gate = True


@in_cpp
@pytest.mark.parametrize("kind, change", [
    *itertools.product((0, 1), (with_an_mlp, with_a_narrow_parameter, with_a_scale, with_another_kind_of_layer)),
    *itertools.product((2,), (with_an_mlp, with_a_narrow_bias, with_a_scale, with_another_kind_of_layer)),
    (1, with_another_limit), (1, with_a_norm_of_one_group), (1, with_a_norm_before_the_gate)])
@torch.no_grad()
def test_the_step_of_a_changed_model(kind, change):
    """C++ does not take over what it would get wrong."""
    model = lively(**IN_ONE_CALL[kind])
    change(model)
    step, state = model.decoder([tokens(1)], model.init_state(1)), model.init_state(1)
    for i, token in enumerate(tokens(6, 1)):
        logits, _, state = model(token[:, None], state=state)
        assert relative(step(token), logits[:, 0]) < 1e-5, i


@in_cpp
@pytest.mark.parametrize("changes", [
    {"d_intermediate": 24}, {"mixer_rms_eps": 1e-5}, {"d_model": 36}, {**IN_ONE_CALL[2], "d_state": 12}, {**IN_ONE_CALL[2], "mimo_rank": 2},
    *({**IN_ONE_CALL[1], **options} for options in ({"d_intermediate": 24}, {"headdim": 8}, {"d_state": 4, "ngroups": 1}))])
def test_what_the_step_in_cpp_leaves_to_others(changes):
    from mamba_fast import step_cpu
    model = lively(**changes)
    assert step_cpu.layers(model, model.init_state(1)) is None


@in_cpp
@pytest.mark.parametrize("changes", IN_ONE_CALL)
@pytest.mark.parametrize("how", WAYS)
def test_what_runs_is_what_is_there_where_all_layers_are_one_call(changes, how):
    from mamba_fast import step_cpu
    model = lively(n_layer=2, tie_embeddings=False, **changes)
    assert step_cpu.layers(model, model.init_state(2)) is not None
    names = [name for name, module in model.named_modules() if name and not isinstance(module, (nn.ModuleDict, nn.ModuleList))]
    if how == "parametrisation":
        names = [name for name in names if hasattr(model.get_submodule(name), "weight")]
    check_what_runs(model, names, how)


@in_cpp
@pytest.mark.parametrize("changes", IN_ONE_CALL)
@torch.no_grad()
def test_the_step_in_cpp_with_states_and_tokens_that_do_not_fit(changes):
    model, like_it = lively(**changes), lambda **more: lively(**{**changes, **more})
    wider = {"rope_fraction": 1.0} if changes.get("layer") == "mamba3" else {"d_conv": 2}
    for other in (like_it(d_state=8), like_it(**wider), like_it(n_layer=2), lively(**IN_ONE_CALL[not changes])):
        with pytest.raises((ValueError, RuntimeError)):
            model.decoder([tokens(1)], other.init_state(1))(tokens(1))
    for rows, given in ((2, 1), (1, 2), (3, 1)):
        with pytest.raises(ValueError, match="tokens must be"):
            model.decoder([tokens(1)] * rows, model.init_state(rows))(tokens(given))
    from mamba_fast import step_cpu
    linear, x = nn.Linear(64, 1000), torch.randn(1, 64)
    product, expected = step_cpu.product(linear, 1), linear(x)
    linear.weight.data, linear.bias.data = torch.zeros(1000, 64), torch.zeros(1000)
    others = [torch.zeros(64000) for _ in range(8)]     # in the memory that would be free
    assert relative(product(x), expected) < 1e-6 and len(others) == 8


@in_cpp
@pytest.mark.parametrize("changes", IN_ONE_CALL)
@torch.no_grad()
def test_the_step_has_the_same_bits_on_any_number_of_threads(changes, monkeypatch):
    model, results = lively(d_model=128, **changes), []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        step = model.decoder([tokens(1)] * 3, model.init_state(3))
        results.append([*(step(token) for token in tokens(4, 3)), step.state])
    assert all(same(result, results[0]) for result in results)


@in_cpp
@pytest.mark.parametrize("changes", IN_ONE_CALL)
@torch.no_grad()
def test_a_row_gets_the_same_bits_in_any_company(changes):
    model = lively(**changes)
    results = [model.decoder([tokens(1)] * n, model.init_state(n))(tokens(1).expand(n)) for n in (1, 2, 3, 5, 8)]
    assert all(torch.equal(row, results[0][0]) for result in results for row in result)


@in_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@torch.no_grad()
def test_products_of_few_rows_in_cpp(dtype):
    from mamba_fast import int8, step_cpu
    for n_in, n_out, bias in ((64, 3, True), (70, 211, False), (5, 1, True), (1536, 80, False)):
        linear = nn.Linear(n_in, n_out, bias).to(dtype if dtype != torch.int8 else torch.float32)
        linear = linear if dtype != torch.int8 else int8.Int8Linear(linear)
        weight = linear.weight.double() * (linear.scale.double()[:, None] if dtype == torch.int8 else 1)
        for rows in (1, 2, 3, 4, 7, 8):
            x = torch.randn(rows, n_in)
            expected = F.linear(x.double(), weight, None if linear.bias is None else linear.bias.double())
            usual = (x.double().abs() @ weight.abs().t()).norm().item() / math.sqrt(n_in)   # a single sum may be next to 0
            assert relative(step_cpu.product(linear, rows)(x), expected, usual) < 1e-6
        assert step_cpu.product(linear, 9) is None


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("changes", [
    {"layer": "mamba2"}, {"layer": "mamba2", "ngroups": 2, "d_intermediate": 24}, {"layer": "mamba2", "norm_before_gate": True},
    {"layer": "mamba2", "rmsnorm": False, "dt_limit": (0.01, 0.1)}, {"layer": "mamba3"}, {"layer": "mamba3", "mimo_rank": 2},
    {"layer": "mamba2", "beside": "mamba"}, {"layer": "mamba", "beside": "mamba3"}])
@pytest.mark.usefixtures("anywhere")
@torch.no_grad()
def test_the_step_of_other_layers(changes, rows, dtype):
    """Also where another kind takes the place of one layer."""
    from mamba_fast import decode
    heads = lambda layer: {} if layer == "mamba" else {"headdim": 8}
    beside, changes = changes.get("beside"), {k: v for k, v in changes.items() if k != "beside"}
    model = lively(d_state=16, **heads(changes["layer"]), **changes)
    if beside:
        model.backbone["layers"][1] = lively(d_state=16, layer=beside, **heads(beside)).backbone["layers"][1]
    model = model.to(dtype)
    state, given = model.init_state(rows), [tokens(1)] * rows
    step = model.decoder(given, state)
    assert isinstance(step, (decode.EagerDecoder, decode.GraphDecoder))
    exact = copy.deepcopy(model).double()
    of_exact, little = exact.init_state(rows), 1e-5 if dtype == torch.float32 else 3e-2

    def fits(got, plain, expected):     # C++ and kernels round less than a model in 16 bits
        return all(a.shape == b.shape and a.dtype == b.dtype and relative(a, c) < 2 * relative(b, c) + little
                   for a, b, c in zip(got, plain, expected, strict=True) if c.numel() > 0)
    for token in tokens(6, rows):
        logits, _, state = model(token[:, None], state=state)
        expected, _, of_exact = exact(token[:, None], state=of_exact)
        got = step(token)
        assert fits([got.to(logits.dtype)], [logits[:, 0]], [expected[:, 0]])
    assert fits(*map(of_states, (step.state, state, of_exact)))


@on_gpu
@pytest.mark.parametrize("BN, W", [(8, 1), (16, 4), (32, 8)])
@pytest.mark.parametrize("K, N", [(16, 5), (80, 700), (768, 96), (1040, 40), (5120, 72)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_weights_in_8_bits(K, N, BN, W, dtype):
    check_products_of_bytes(K, N, BN, W, dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("rows, K, N", [(9, 33, 70), (70, 80, 1100), (200, 1040, 4200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_with_weights_in_8_bits(rows, K, N, dtype):
    check_prompt_in_8_bits(rows, K, N, dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("kind", ["fused", "int8", "Mamba-2", "Mamba-3", "float64", "with an MLP"])
@torch.no_grad()
def test_generation_by_a_cuda_graph(kind):
    """The texts that forward gives, and the states; also where prompts go on from one."""
    from mamba_fast import decode
    changes = {"n_layer": 2, **{"with an MLP": {"d_intermediate": 24}, "Mamba-2": SHAPES[3], "Mamba-3": SHAPES[6],
                                "int8": {"d_model": 48}}.get(kind, {})}     # a multiple of 16, by bytes_triton.py
    model = awkward(changes, torch.int8 if kind == "int8" else torch.float32, "cuda")
    model = model.double() if kind == "float64" else model
    prompts = [tokens(n, seed=n).cuda() for n in (5, 1, 1500)]
    tolerance = {"int8": 2e-2, "float64": 1e-6}.get(kind, 1e-5)
    long = [tokens(70, seed=70).cuda()]     # parts of it are read by a graph of their own
    for some in (prompts[:1], prompts, prompts[:1], long, long):
        step = model.decoder([p[:1] for p in some], model.init_state(len(some)))
        assert isinstance(step, decode.GraphDecoder)
        plain, state = decode.make_step(model, own := model.init_state(len(some))), own
        for token in tokens(6, len(some)).cuda():
            assert relative(step(token), plain(token)) < tolerance
        assert same(of_states(step.state), of_states(state), tolerance)
        texts = model.generate(some, 20, temperature=0)
        for prompt, text in zip(some, texts):
            logits = model(text[None, :-1])[0][0, len(prompt) - 1:]
            likeliest, chosen = logits.amax(-1), logits.gather(-1, text[len(prompt):, None])[:, 0]
            assert torch.equal(text[:len(prompt)], prompt) and (likeliest - chosen).max() < (0.05 if kind == "int8" else 1e-4)
    assert (model in decode.GRAPHS) == (kind in ("fused", "int8", "Mamba-2", "Mamba-3"))
    stream = model.stream(prompts, 9, temperature=0)
    read = [next(stream) for _ in range(4)]
    state, whole = stream.state, model.stream(prompts, 4, temperature=0)
    assert same(list(whole), read) and same(state, whole.state)
    before = copy.deepcopy(state)
    rest = list(model.stream(read[-1][:, None], 5, temperature=0, state=state))
    assert same(rest, list(stream)) and same(state, before)


@on_gpu
def test_models_that_write_at_the_same_time_on_a_gpu():
    """In kernels whose programs wait for each other (groups_triton.py), with others that take up room."""
    models = [awkward({"d_model": 768, "n_layer": 2}, torch.bfloat16, "cuda") for _ in range(3)]
    prompts = [tokens(5, seed=n).cuda() for n in range(64)]
    alone = [model.generate(prompts, 100, temperature=0) for model in models]
    together = {}

    def write(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            together[i] = models[i].generate(prompts, 100, temperature=0)
            torch.cuda.current_stream().synchronize()
    threads = [threading.Thread(target=write, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(together) == [0, 1, 2] and all(same(alone[i], together[i]) for i in together)


@fast
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA runs the graphs themselves")
def test_streams_of_a_graph_without_a_gpu(monkeypatch):
    """What is around the graph of a token, which is replayed by calls here: tokens that are changed, and both modes without
    gradients, in turns."""
    from mamba_fast import decode

    def recorded(call, where, pool=None):
        result = call()

        @torch.inference_mode()
        def replay():
            result.copy_(call())
        return SimpleNamespace(replay=replay), result

    def of_stream(change):
        texts = []
        for token in model.stream([tokens(5)], 8, temperature=0):
            texts += token.tolist()
            if change:
                token.copy_((token + 7) % 71)
        return texts

    def of_both_modes():
        with torch.inference_mode():
            step = model.decoder([tokens(5)], model.init_state(1))
            first = step(torch.tensor([3])).clone()
        return [first, step(torch.tensor([4])).clone(), model.decoder([tokens(9)], model.init_state(1))(torch.tensor([4])).clone()]
    model = awkward({"n_layer": 2})
    with torch.no_grad():
        expected = of_stream(False), of_stream(True), of_both_modes()
        monkeypatch.setattr(decode, "recorded", recorded)
        monkeypatch.setattr(mamba.fast, "decoder", lambda model, prompts, state, *_: decode.GraphDecoder(model, prompts, state))
        assert expected[:2] == (of_stream(False), of_stream(True)) and expected[0] != expected[1]
        assert same(of_both_modes(), expected[2], 1e-5)


@on_gpu
def test_a_cuda_graph_that_is_kept():
    """It is used again, by one stream at a time, sees new weights, and belongs to nobody but the model."""
    from mamba_fast import decode
    model, prompts = awkward({"n_layer": 2}, device="cuda"), [tokens(n, seed=n).cuda() for n in (5, 9, 3)]

    def fresh(model, **more):
        return copy.deepcopy(model).generate(prompts, 12, **{"temperature": 0, **more})
    seed = lambda: torch.Generator("cuda").manual_seed(3)
    expected = fresh(model)
    assert same(model.generate(prompts, 12, temperature=0), expected)
    graph = decode.GRAPHS[model]
    drawn = fresh(model, temperature=1, generator=seed())
    assert same(model.generate(prompts, 12, generator=seed()), drawn) and decode.GRAPHS[model] is graph
    streams = [model.stream(prompts, 12, temperature=0) for _ in range(3)]
    for three in zip(*streams, strict=True):        # they take turns with one graph
        assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])
    assert same(*(stream.state for stream in streams[:2])) and same(*(stream.state for stream in streams[1:]))
    assert same(model.generate(prompts, 12, temperature=0), expected)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(tokens(2, 30).cuda(), tokens(2, 30).cuda())[1].backward()
    optimizer.step()
    changed, graph = fresh(model), decode.GRAPHS[model]
    assert same(model.generate(prompts, 12, temperature=0), changed) and decode.GRAPHS[model] is graph
    assert not same(changed, expected)
    with torch.no_grad():
        model.backbone["layers"][0].mixer.A_log = nn.Parameter(model.backbone["layers"][0].mixer.A_log * 3)
    assert same(model.generate(prompts, 12, temperature=0), fresh(model)) and decode.GRAPHS[model] is not graph
    assert not any("raph" in key for key in (*model.state_dict(), *vars(model)))
    pickle.loads(pickle.dumps(model))
    kept = len(decode.GRAPHS)
    del model, optimizer, streams
    gc.collect()
    assert len(decode.GRAPHS) < kept


@on_gpu
def test_recorded_gradients_equal_those_launched_one_by_one(request):
    """Bit for bit, of any batch, whatever the weights have become; and with dropout that only the seed decides."""
    import common
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    common.set_up(torch.device("cuda"))
    model = Mamba(MambaConfig(vocab_size=70, d_model=40, n_layer=2, dropout=0.2)).cuda().train()
    batches = [(tokens(40, 100, seed=s).cuda(), tokens(40, 100, seed=s + 1).cuda()) for s in range(3)]

    def gradients(x, y):
        model.zero_grad(set_to_none=True)
        return more(x, y)

    def more(x, y):
        with common.autocast(torch.device("cuda"), "bfloat16"):
            loss = model(x, y)[1]
        loss.backward()
        return loss.detach()

    def result(function, batch, seed):
        torch.manual_seed(seed)
        return [function(*batch).clone(), *(p.grad.clone() for p in model.parameters())]

    def after(first, second):
        return lambda *batch: (first(*batch), second(*batch))[1]
    held, held_more = mamba.fast.replayed([gradients, more], *batches[0])
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


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: layers


@fast
def test_a_second_derivative_is_right_or_an_error(monkeypatch):
    """Also of what the incoming gradients do not depend on: then PyTorch's once_differentiable lets zeros pass for it."""
    from mamba_fast import layers, scan_cpu, scan_side_by_side, scan_tiles
    inputs = {k: v.double().detach() for k, v in scan_inputs(2, 11, 6, 4).items() if k not in ("z", "delta_bias")}
    weight, x, targets = torch.randn(6, 6).double(), torch.randn(2, 11, 6).double(), torch.randint(6, (22,))

    def second(function):
        leaf = x.clone().requires_grad_()
        g, = torch.autograd.grad(function(leaf.sin() @ weight).sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]
    scan = lambda u, method="chunked": selective_scan(u, F.softplus(u), *[inputs[k] for k in "ABC"], method=method)
    assert same(second(lambda u: scan(u, "sequential")), second(lambda u: mamba.one_by_one(u, F.softplus(u), *[inputs[k] for k in "ABC"], u.new_zeros(2, 6, 4))[0]), 1e-9)
    head, conv = nn.Linear(6, 6, bias=False).double(), torch.randn(6, 1, 4).double()
    calls = {"softplus": layers.softplus, "gate": lambda u: layers.gated(u, u.cos()), "convolution": lambda u: layers.conv_silu(u.sin(), conv, None, None),
             "loss": lambda u: layers.LinearCrossEntropy.apply(u.flatten(0, 1), head.weight, targets, 5, 6, False), "scan": scan}
    in_float32 = lambda u: torch.cat([u, u, u, u[..., :2] * u[..., 2:4], u[..., 4:]], -1)[..., :16].float()     # 16 channels
    calls["C++"] = lambda u: scan_cpu.recurrence(x16 := in_float32(u), x16.exp(), -torch.ones(16, 4), *torch.ones(2, 2, 11, 4), torch.zeros(2, 16, 4))[0].double()
    calls["C++ of the convolution"] = lambda u: layers.conv_silu(in_float32(u), torch.ones(16, 1, 4), None, None).double()
    for recurrence in (scan_tiles.recurrence, scan_side_by_side.recurrence):
        monkeypatch.setattr(mamba.fast, "recurrence", lambda *_, recurrence=recurrence: recurrence)
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match="no second derivative"):
                pytest.fail(f"{name}: {second(call)}")


@fast
@pytest.mark.parametrize("rows", [(512,), (2, 300), (1, 1, 1000), (511,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_many_rows_by_convolution(rows, bias, monkeypatch):
    from mamba_fast import layers
    called, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *inputs: called.append(1) or conv2d(*inputs))
    torch.manual_seed(0)
    linear, wide = layers.LinearByConvolution(16, 30, bias=bias), torch.randn(*rows, 48).requires_grad_()
    x, inputs = wide[..., 8:24], [wide, *linear.parameters()]
    y, exact = linear(x), F.linear(*(t if t is None else t.double() for t in (x, linear.weight, linear.bias)))
    results = [[t, *torch.autograd.grad(t.sin().sum(), inputs)] for t in (y, exact)]
    assert len(called) == (math.prod(rows) >= 512)
    for got, expected in zip(*results):
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):     # its type is for F.linear to choose
        assert linear(x).dtype == torch.bfloat16
    assert len(called) == (math.prod(rows) >= 512)


@fast
def test_loss_in_parts_equals_the_loss_at_once(monkeypatch):
    """And so do its gradients, with targets to ignore in some parts and nothing else in one."""
    from mamba_fast import layers
    model, idx = small(), tokens(3, 20)
    targets = idx.roll(-1, 1)
    targets[0, 3:] = targets[1, :9] = -1
    results = []
    for most in (2 ** 28, 7 * 70):
        monkeypatch.setattr(layers, "LOGITS", most)
        model.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert same(results[1], results[0], 1e-6)
    mamba.fast.quantize_int8(model)     # has no gradients of the head, and a loss all the same
    monkeypatch.setattr(layers, "LOGITS", 20 * 70)      # up to 8 rows would be multiplied by another kernel
    in_parts = model(idx, targets)[1]
    monkeypatch.undo()
    assert relative(in_parts, model(idx, targets)[1]) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# mamba_fast: int8


@fast
@pytest.mark.parametrize("n_in", [5, 16, 24, 40, 64, 96])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 4), (3, 30)])
def test_int8_linear(n_in, rows):
    """Weights are off by half a step at most, and the product is that of the dequantised weights in bfloat16."""
    from mamba_fast.int8 import Int8Linear
    linear = nn.Linear(n_in, 71)
    with torch.no_grad():
        linear.weight[3], linear.weight[4] = 0, linear.weight[4] * 100
    layer, x = Int8Linear(linear), torch.randn(*rows, n_in)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    assert layer.weight.dtype == torch.int8 and not weight[3].any()
    assert ((weight - linear.weight).abs() <= 0.501 * layer.scale[:, None]).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = layer.to(dtype)(x.to(dtype))
        assert y.dtype == dtype and y.shape == (*rows, 71)
        off = y.double() - F.linear(x.double(), weight, linear.bias.double())
        assert (off.abs() <= 0.01 * F.linear(x.double().abs(), weight.abs(), linear.bias.double().abs())).all()


@fast
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_model(tied):
    """A quarter of float32's memory, a loss within 1 % of the trained model's, whole or token by token."""
    from mamba_fast.int8 import Int8Linear
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
        was = [m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and "dt_proj" not in name]
        was_embedding = model.backbone["embedding"].weight.clone()
        assert loss < 3.5 and mamba.fast.quantize_int8(model) is model
        assert abs(model(x, y)[1].item() / loss - 1) < 0.01
        step = model.decoder([x[0, :1]], model.init_state(1))
        logits = torch.cat([step(token) for token in x[0].split(1)])
        assert abs(F.cross_entropy(logits, y[0]).item() / loss - 1) < 0.01
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 2 * 3 + 1 and model.num_params() == params
    assert sum(m.weight.nbytes for m in layers) == sum(was)
    embedding = model.backbone["embedding"]
    assert (embedding.weight is model.lm_head.weight) == tied and embedding.weight.dtype == torch.int8
    assert embedding(x).dtype == torch.float32
    off = embedding(x) - was_embedding[x]
    assert 0 < off.abs().max() and (off.abs() <= 0.501 * embedding.scale[x][..., None]).all()


@fast
@pytest.mark.parametrize("how", ["hook", "hook before", "subclass", "wrapper"])
def test_what_runs_is_what_is_there_in_int8(how):
    for name in ("lm_head", "backbone.layers.1.mixer.x_proj", "backbone.layers.0.norm"):
        model, prompts = mamba.fast.quantize_int8(lively(n_layer=2, tie_embeddings=False)), tokens(2, 7)
        put_in(model, name, how)
        assert torch.equal(model.generate(prompts, 6, temperature=0)[:, 7:], greedy_by_steps(model, prompts, 6)), name


@fast
def test_int8_weights_are_not_saved_as_released_ones(tmp_path):
    with pytest.raises(ValueError, match="int8"):
        mamba.fast.quantize_int8(small()).save_pretrained(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Scripts are run in this process, which has torch already, or as processes of their own: where a signal, a pipe or what
# Python does at its start and end is the point.


PATIENCE = 300      # seconds, for what takes a few of them: only a process that hangs needs more, on however busy a machine


def environment(**more):
    """That of a machine without a GPU, on which a pipe is buffered as usual."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **more}


def script(name, *flags, cwd, env=None, **more):
    """python name *flags, to its end."""
    command = [sys.executable, str(ROOT / name), *flags]
    return subprocess.run(command, cwd=cwd, env=environment(**(env or {})), capture_output=True, text=True, check=False,
                          timeout=PATIENCE, **more)


def start(*words, **more):
    """python *words as a process that a test goes on to talk to, read and signal."""
    usual = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    return subprocess.Popen([sys.executable, *map(str, words)], text=True, **{**usual, **more})


@pytest.fixture
def call(monkeypatch, capsys):
    """script() in this process: call(name, *flags, cwd=folder), and stdin=bytes to type, or None where there is none."""
    def call(name, *flags, cwd, stdin=b""):
        module, status = importlib.import_module(Path(name).stem), 0
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(ROOT / name), *flags])
        keyboard = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", keyboard)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            common.run(module.main, module.Config)
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess(["python", name], status, *capsys.readouterr())
    return call


def succeeded(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def one_line_error(result, *words):
    """Exit status 2 and one line on stderr: no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{Path(result.args[1]).name}: "), result.stderr
    for word in words:
        assert word in result.stderr
    return result.stderr


HELD = '''
import importlib, os, runpy, signal, sys
where, call, signals, *sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
module, name = where.rsplit(".", 1)
module = importlib.import_module(module)
real, (ours, theirs), calls = getattr(module, name), os.pipe(), []
os.set_blocking(theirs, False)
signal.set_wakeup_fd(theirs)

def held(*args, **more):
    calls.append(1)
    if len(calls) == int(call):
        os.write(1, b"held\\n")      # not print: a signal may come before it returns
        for _ in range(int(signals)):
            os.read(ours, 1)
    return real(*args, **more)

setattr(module, name, held)
runpy.run_path(sys.argv[0], run_name="__main__")
'''
STEP = "torch.nn.utils.clip_grad_norm_"     # which a training step calls once


def hold(folder, where, call, name, *flags, signals=1, launcher=(), **more):
    """
    The script as a process that stands still in the so-manieth call of a function, and goes on when so many signals have
    come: what a signal meets is no matter of luck, on however busy a machine. Returns it when it stands there.
    """
    file = folder / "held.py"
    file.write_text(HELD)
    process = start(*launcher, file, where, call, signals, ROOT / name, *flags, cwd=folder, **more)
    read = [process.stdout.readline()]
    while read[-1] != "held\n":
        assert read[-1], "".join(read)      # it has ended
        read.append(process.stdout.readline())
    file.unlink()
    return process


ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows cannot send these signals to another process")


@contextlib.contextmanager
def small_disk(size):
    """No file grows beyond this size: what a full disk does to whoever writes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


TINY = ("--device=cpu", "--threads=1", "--d_model=16", "--n_layer=2", "--batch_size=4", "--block_size=64", "--dropout=0.1",
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
    return int(losses(folder)[-1][0])


def assert_same_run(folder, expected):
    """The same losses, weights and optimizer, to the bit."""
    assert losses(folder) == losses(expected)
    for name in ("ckpt.pt", "best.pt"):
        a, b = load(folder / "run" / name), load(expected / "run" / name)
        assert a["step"] == b["step"] and a["best_loss"] == b["best_loss"]
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        if name == "ckpt.pt":
            states = [c["optimizer"]["state"] for c in (a, b)]
            assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


def of_run(folder):
    """What a run has kept, without the log and the lock."""
    return {name: data for name, data in tree(folder).items() if name.startswith("run") and name.endswith(".pt")}


# ---------------------------------------------------------------------------------------------------------------------
# common.py


@dataclass
class Flags:
    count: int = common.flag(3, "how many")
    rate: float = common.flag(0.5, "how fast")
    compile: bool = common.flag(True, "whether")
    title: str = common.flag("", "what")
    top_k: int | None = common.flag(None, "at most")


@pytest.mark.parametrize("argv, given", [
    ("", {}), ("--count=1_000", {"count": 1000}), ("--count -4", {"count": -4}), ("--rate=1e-3", {"rate": 1e-3}),
    ("--compile", {"compile": True}), ("--compile --count 2", {"compile": True, "count": 2}),
    ("--compile=False", {"compile": False}), ("--compile no", {"compile": False}), ("--compile=0", {"compile": False}),
    ("--top_k=5", {"top_k": 5}), ("--top_k None", {"top_k": None}), ("--title=a=b", {"title": "a=b"}),
    ("--title=", {"title": ""}), ("--count=1 --count=2", {"count": 2})])
def test_flags(argv, given):
    assert common.parse_flags(Flags, argv.split()) == (Flags(**given), given)


@pytest.mark.parametrize("argv, words", [
    ("--cuont=3", "unknown flag --cuont; did you mean --count?"), ("--coun=3", "unknown flag --coun"),
    ("--zzz", "unknown flag --zzz"), ("--count=abc", "--count takes a whole number, not 'abc'"),
    ("--count=1e4", "whole number"), ("--count", "--count needs a value"), ("--count --rate=1", "--count needs"),
    ("--rate=nan", "--rate takes a number"), ("--rate=-inf", "takes a number"), ("--compile=maybe", "True or False"),
    ("--top_k=x", "whole number"), ("book.txt", "unexpected argument 'book.txt'"), ("-count=3", "unexpected"),
    ("--count=none", "whole number")])
def test_bad_flags(argv, words):
    with pytest.raises(common.Problem) as problem:
        common.parse_flags(Flags, argv.split())
    assert words in str(problem.value)


# every flag of a script with its default; one without "=" has another default on each device
FLAGS = {
    "prepare_data.py": "dataset=pydoc tokenizer=char vocab_size=4096 data_dir=data cache_dir= name=",
    "train.py": "dataset=pydoc data_dir=data out_dir= init_from=resume eval_only=False d_model n_layer d_state d_conv=4 "
                "expand=2 d_intermediate=0 dropout=None batch_size block_size gradient_accumulation_steps=1 max_iters "
                "learning_rate min_lr=0.0 warmup_iters=100 lr_decay_iters=None weight_decay=0.1 beta1=0.9 beta2=0.99 "
                "grad_clip=1.0 seed=1337 reset_at_eot=None carry_state=False bptt=1 eval_interval=250 eval_iters=50 patience=0 log_interval=10 sample_tokens=200 cache_dir= "
                "device=auto dtype=auto compile=None scan=auto threads=None checkpointing=False fsdp=False",
    "sample.py": "out_dir= pretrained= start= num_samples=1 max_new_tokens=500 temperature=0.8 top_k=None top_p=None "
                 "min_p=None repetition_penalty=None stop= ignore_eos=False seed=None interactive=False show= layer=None channel=None "
                 "html= export= format=mamba_ssm cache_dir= device=auto dtype=auto scan=auto compile=False quantize=",
    "bench.py": "suite=all seconds=3.0 out=results.json device=auto dtype=auto compile=False shapes=4x1024x512x16 lengths= "
                "plot= longest=65536 memory_gb=8.0 d_model=256 n_layer=4 layer=mamba vocab_size=65 batch_size=8 block_size=256 size=both "
                "texts=1 start=1 new_tokens=32 prompt=1000 dataset=pydoc data_dir=data models=mamba,gpt,moe,mamba2,mamba3 max_iters=0 dropout=0.1 "
                "seed=1337 task_steps=0",
}
BY_DEVICE = {   # on a CPU, on MPS, on CUDA
    "d_model": (160, 256, 320), "n_layer": (3, 6, 12), "d_state": (8, 16, 16),
    "batch_size": (8, 32, 64), "block_size": (128, 256, 256), "max_iters": (1700, 2000, 1200),
    "learning_rate": (0.004, 0.002, 0.003)}


@pytest.mark.parametrize("name", FLAGS)
def test_help(call, tmp_path, name):
    """It names every flag, its default, and what it is for; where the default depends on the device, all of them."""
    result = succeeded(call(name, "--help", cwd=tmp_path))
    module = importlib.import_module(Path(name).stem)
    assert result.stdout.startswith(module.__doc__.strip()) and not os.listdir(tmp_path)
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("  --")]
    shown = {words[0].removeprefix("--").partition("=")[0]: words for words in lines}
    config, _ = common.parse_flags(module.Config, [])
    for flag in FLAGS[name].split():
        flag, has_one, default = flag.partition("=")
        assert len(shown[flag]) > 3, flag
        if has_one:
            assert str(getattr(config, flag)) == default and shown[flag][0] == f"--{flag}={default}"
        else:
            line = " ".join(shown[flag])
            values = "|".join(map(str, BY_DEVICE[flag]))
            assert getattr(config, flag) is None and "None" not in line and values in line and "cpu|mps|cuda" in line


@pytest.mark.parametrize("args, name", [
    (("pydoc",), "pydoc"), (("shakespeare", "bpe"), "shakespeare-bpe"), (("pydoc", "gpt-neox"), "pydoc-gpt-neox"),
    (("some/book.txt", "my/own.json"), "book-own"), (("folder.d/",), "folder.d"), (("x", "bpe", "mine"), "mine"),
    (("https://a.org/b/text.txt?download=1",), "text"), (("http://a.org:80/",), "a.org-80"),
    (("shakespeare-bpe",), "shakespeare-bpe")])
def test_dataset_name(args, name):
    assert common.dataset_name(*args) == name


def test_one_process_of_a_machine_tells(tmp_path, call, monkeypatch, capsys):
    """Under torchrun, what all processes find wrong; what only one of them meets is told by that one."""
    def fails(error):
        raise error
    monkeypatch.setenv("RANK", "3")
    for local, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local)
        result = call("train.py", "--bach_size=3", cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == lines
        for error, told in ((RuntimeError("Connection closed by peer"), lines), (KeyboardInterrupt(), lines),
                            (MemoryError(), 1), (OSError(28, "No space left on device"), 1),
                            (RuntimeError("CUDA out of memory. Tried to allocate"), 1),
                            (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate"), 1),
                            (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"), 1)):
            monkeypatch.setattr(train, "main", lambda *_, error=error: fails(error))
            result = call("train.py", cwd=tmp_path)
            assert result.returncode in (2, 130) and result.stderr.count("\n") == told, error
        monkeypatch.setattr(train, "main", lambda *_: torch.zeros(1).expand(3).add_(1))
        with pytest.raises(RuntimeError, match="memory"):   # which is no lack of it
            common.run(train.main, train.Config)
        monkeypatch.undo()
        monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    common.say("only the first process says this")
    assert capsys.readouterr().out == ""


def test_home_in_paths(monkeypatch, tmp_path):
    """~ is the home folder in every flag of a script that is a path, and after FILE:, and nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    paths = {"train": "dataset data_dir out_dir init_from cache_dir", "prepare_data": "dataset tokenizer data_dir cache_dir",
             "sample": "out_dir pretrained html export cache_dir", "bench": "out plot"}
    for name, flags in paths.items():
        given = common.parse_flags(importlib.import_module(name).Config, [f"--{flag}=~/a b" for flag in flags.split()])[1]
        assert given == dict.fromkeys(flags.split(), f"{tmp_path}/a b")
    for text, meant in (("FILE:~/a\nb", f"FILE:{tmp_path}/a\nb"), ("~/a", "~/a"), ("a ~/b", "a ~/b")):
        assert common.parse_flags(sample.Config, ["--start=" + text, "--stop=~"])[1] == {"start": meant, "stop": "~"}


def test_a_flag_is_shown_as_a_shell_needs_it(tmp_path, call):
    assert common.as_flag("out_dir", Path("my runs/a")) == "--out_dir='my runs/a'"
    message = one_line_error(call("train.py", "my novel.txt", cwd=tmp_path), "as --dataset='my novel.txt'")
    assert shlex.split(message)[-1] == "--dataset=my novel.txt"


def test_files_and_pipes_get_utf8(tmp_path):
    code = "import common; common.run(lambda *_: print('\u4e2d'), common.Problem)"
    code = code.replace("common.Problem", "type('Config', (), {})").replace("import common;", "import common, dataclasses;")
    code = code.replace("type('Config', (), {})", "dataclasses.make_dataclass('Config', [])")
    env = environment(PYTHONPATH=str(ROOT), PYTHONUTF8="0", PYTHONIOENCODING="cp1252")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env, cwd=tmp_path)
    assert result.stdout.decode("utf-8").strip() == "\u4e2d"


class Plain(io.StringIO):
    """What a notebook has for stdout: no reconfigure, no fileno."""
    reconfigure = property()


def test_a_script_in_a_notebook(tmp_path, monkeypatch):
    """The process goes on after it, with the handler of Ctrl-C that it had, whatever came of the script."""
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--nonsense"])
    out, err = Plain(), Plain()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    before = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    with pytest.raises(SystemExit) as end:
        common.run(train.main, train.Config, interrupt=common.end_at_once)
    assert end.value.code == 2 and err.getvalue().startswith("train.py: unknown flag --nonsense")
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        common.run(train.main, train.Config, interrupt=common.end_at_once)
    assert out.getvalue().startswith(train.__doc__.strip())
    assert before == [signal.getsignal(number) for number in sorted(signal.valid_signals())]


def test_ipykernel_runs_the_scripts(tmp_path):
    """%run in a real kernel, which works on afterwards."""
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client").manager
    (tmp_path / "words.txt").write_text("some words to learn from\n" * 400)
    env = environment(JUPYTER_RUNTIME_DIR=str(tmp_path), IPYTHONDIR=str(tmp_path))
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(tmp_path), env=env)
    try:
        said = []
        cells = [f"%run {shlex.quote(str(ROOT / 'prepare_data.py'))} --dataset=words.txt",
                 f"%run {shlex.quote(str(ROOT / 'train.py'))} " + " ".join([*TINY, "--max_iters=3"]),
                 f"%run {shlex.quote(str(ROOT / 'sample.py'))} --out_dir=run --device=cpu --max_new_tokens=5",
                 "import signal; print(signal.getsignal(signal.SIGINT))"]
        for cell in cells:
            show = lambda message: said.append(str(message["content"]))
            reply = client.execute_interactive(cell, timeout=PATIENCE, output_hook=show)
            assert reply["content"]["status"] == "ok", said
        text = "".join(said)
        assert "wrote" in text and "done: best val loss" in text and "tokens/s" in text and "default_int_handler" in text
    finally:
        kernel.shutdown_kernel(now=True)


def test_the_check_against_the_cpu_notices_a_wrong_device(monkeypatch):
    common.check_against_cpu(torch.device("cpu"))
    right = torch.Tensor.to

    def wrong(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        return result + 1 if args and args[0] == torch.device("cpu") and result.dtype == torch.long else result
    monkeypatch.setattr(torch.Tensor, "to", wrong)
    monkeypatch.setattr(torch, "randint", lambda n, shape, old=torch.randint: old(n - 1, shape))
    with pytest.raises(common.Problem, match="computes wrong"):
        common.check_against_cpu(torch.device("cpu"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fails(error):
        def write(file):
            file.write(b"half of what")
            raise error
        return write
    path = tmp_path / "file"
    common.write_whole(path, lambda file: file.write(b"before"))
    errors = [(OSError(errno.ENOSPC, "No space left on device"), "file: No space left"), (ValueError("odd"), "file: odd"),
              (RuntimeError("PytorchStreamWriter failed"), "file: PytorchStreamWriter")]     # as torch.save says it
    for error, words in errors:
        with pytest.raises(common.Problem, match=f"could not write .*{words}"):
            common.write_whole(path, fails(error))
    with pytest.raises(KeyboardInterrupt):
        common.write_whole(path, fails(KeyboardInterrupt()))
    assert tree(tmp_path) == {"file": b"before"}
    for bad in (os.devnull, tmp_path, tmp_path / "no" / "folder", f"{path}\0"):
        with pytest.raises(common.Problem, match="could not write"):
            common.write_whole(bad, lambda file: file.write(b"x"))
    assert tree(tmp_path) == {"file": b"before"}
    # on the disk before it gets its name
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    common.write_whole(path, lambda file: file.write(b"after"))
    assert done == ["fsync", "replace"] and tree(tmp_path) == {"file": b"after"}
    if os.name == "posix":      # a link is followed, not replaced
        (tmp_path / "link").symlink_to("file")
        common.write_whole(tmp_path / "link", lambda file: file.write(b"through the link"))
        assert (tmp_path / "link").is_symlink() and path.read_bytes() == b"through the link"


# ---------------------------------------------------------------------------------------------------------------------
# tokens.py, texts.py and prepare_data.py: a text becomes tokens in files


AWKWARD = ("Hello  world!\r\n\r\n  It's  the \t tab,\n\n\n\nthree   spaces   \n \n x\n日本語の文\nです。\n"
           "emoji 👩‍👩‍👧 🏳️‍🌈 e\u0301\u0323 \u0301 \u00a0\u2003wide\u3000x\n\u0301y 12 345's I'll\x1c don't...!\n?? a\nb")


def prepared(tmp_path, text, name="x", **flags):
    """prepare() on a text: (meta, train ids, val ids, tokenizer)."""
    (tmp_path / "x.txt").write_bytes(text.encode())
    flags = {"dataset": str(tmp_path / "x.txt"), "data_dir": str(tmp_path / "data"), "name": name, **flags}
    return opened(prepare_data.prepare(prepare_data.Config(**flags)))


def opened(folder):
    """What stands in the files, read here: (meta, train ids, val ids, tokenizer)."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    del meta["here"]    # what does not belong to the text
    train, val = (np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    return meta, train.tolist(), val.tolist(), load_tokenizer(meta["tokenizer"])


def stored(folder, tokens):
    """The Tokens of an array, in a file."""
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    tokens.tofile(path)
    return prepare_data.Tokens(path, tokens.dtype, len(tokens))


def one_token_a_byte():
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(["abc"], 257)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_round_trip(tmp_path, tokenizer):
    given, text = AWKWARD * 7, AWKWARD.replace("\r\n", "\n") * 7
    meta, train, val, t = prepared(tmp_path, given, tokenizer=tokenizer, vocab_size=300)
    cut = int(len(text) * 0.9)
    assert t.decode(train) == text[:cut] and t.decode(val) == text[cut:]
    assert (meta["train_chars"], meta["val_chars"]) == (cut, len(text) - cut)
    assert meta["val_bytes"] == len(text[cut:].encode())
    assert meta["sha256"] == hashlib.sha256(given.encode()).hexdigest()
    assert meta["vocab_size"] == t.vocab_size == (300 if tokenizer == "bpe" else len(set(text)))
    assert meta["dtype"] == "uint16" and meta["name"] == "x" and max(train + val) < t.vocab_size
    assert t.encode(text[:cut]) == train
    assert load_tokenizer(t.to_dict()).encode("the") == t.encode("the")
    assert t.encode("") == [] and all(type(i) is int for i in t.encode("the"))


def test_char_outside_the_vocabulary():
    t = CharTokenizer("\nabc")
    assert t.encode("cab\n") == [3, 1, 2, 0]
    with pytest.raises(common.Problem, match="character 'é' is not in this model's vocabulary .4 characters"):
        t.encode("abcé!")
    with pytest.raises(common.Problem):
        t.encode("\udc80")      # what a terminal may pass on


def test_bpe_says_when_the_text_is_too_small(tmp_path, capsys):
    meta, *_ = prepared(tmp_path, "abc abc abc abc", tokenizer="bpe", vocab_size=1000)
    assert 257 <= meta["vocab_size"] < 300
    assert "too small for 1,000 tokens" in capsys.readouterr().out


def test_bpe_of_what_is_not_unicode():
    with pytest.raises(common.Problem, match="has no tokens for the text, or that is not valid Unicode"):
        one_token_a_byte().encode("the \udc80")     # what a terminal may pass on


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
    t.enable_truncation(20)     # which prepare_data has to switch off
    return BPETokenizer(t.to_str())


@pytest.mark.parametrize("kind", ["gpt2", "gpt4"])
def test_streaming_gives_the_tokens_of_the_whole_text(tmp_path, monkeypatch, kind):
    rng = random.Random(0)
    bits = ["a", "word", " ", " ", "  ", "\n", "\n", "\r\n", "\t", ".", "!", "'s", "👍", "é", "e\u0301", "\u0301",
            "日本", "12", "\u00a0", "\u3000", "\x1c", "\x85", "<|endoftext|>"]
    given = AWKWARD + "".join(rng.choices(bits, k=6000))
    text = given.replace("\r\n", "\n")
    tokenizer = gpt4_like() if kind == "gpt4" else BPETokenizer.train([AWKWARD * 50], 400)
    (tmp_path / "t.json").write_text(tokenizer.to_dict()["json"], encoding="utf-8")
    monkeypatch.setattr(texts, "BLOCK", 37)
    monkeypatch.setattr("tokens.PIECE", 11)
    pieces = list(cut_between_words(texts.read([given.encode()])))
    assert "".join(pieces) == text and len(pieces) > 300
    for special in (False, True):
        _, train, val, _ = prepared(tmp_path, given, tokenizer=str(tmp_path / "t.json"), allow_special=special)
        cut = int(len(text) * 0.9)
        assert train == tokenizer.encode(text[:cut], special) and val == tokenizer.encode(text[cut:], special)


def test_no_place_to_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 100)
    monkeypatch.setattr("tokens.PIECE", 20)
    monkeypatch.setattr("tokens.LONGEST", 300)
    text = "日本" * 2000 + " " * 3000
    assert max(map(len, cut_between_words(texts.read([text.encode()])))) <= 300
    _, train, val, t = prepared(tmp_path, text, tokenizer="bpe", vocab_size=300)
    assert t.decode(train) + t.decode(val) == text


AWKWARD_BITS = ["a", "word", " ", "  ", "   ", " " * 7, " " * 40, "\n", "\n\n\n", "\r\n", "\r\n\r\n", "\t\t", "\x0b", "...",
                "'s", "👩‍👩‍👧", "🏳️‍🌈", "é", "e\u0301", "\u0301", "\u0323\u0301", "\u1100\u1161", "日本語", "3.14",
                "\u00a0", "\u3000", "\u200d", "\x1c", "\x85", "\ufeff", "def f(x):\n    return x\n", "<|endoftext|>",
                "<|padding|>", "\u212b", "\ufb01"]


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
    tokenizer = BPETokenizer((tmp_path / "t.json").read_text(encoding="utf-8"))
    rng, code = random.Random(0), (ROOT / "sample.py").read_text(encoding="utf-8")
    several = [AWKWARD * 3, "word " * 9000 + "\n", code.replace("\n", "\r\n"),
             *("".join(rng.choices(AWKWARD_BITS, k=400)) for _ in range(20)),
             *("x" + bit + "y" for bit in AWKWARD_BITS)]
    for text in several:
        assert tokenizer.encode(text, True) == reference(text, add_special_tokens=False)["input_ids"]
        with_nul = f"{text[:50]}\0 \0\0{text[-50:]}"
        assert tokenizer.encode(with_nul, True) == reference(with_nul, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(with_nul)) == unicodedata.normalize("NFC", with_nul)
        for block, piece in ((1 << 20, 1 << 15), (37, 11), (1000, 200)):
            monkeypatch.setattr(texts, "BLOCK", block)
            monkeypatch.setattr("tokens.PIECE", piece)
            streamed = tokenizer.encode_stream(texts.read([text.encode()]), True)
            expected = tokenizer.encode(text.removeprefix("\ufeff").replace("\r\n", "\n"), True)
            assert [i for ids in streamed for i in ids.tolist()] == expected, (block, text[:40])


def test_bpe_of_a_large_text_is_trained_on_a_sample(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr("tokens.PIECE", 100)
    (tmp_path / "folder").mkdir()
    story = "".join(f"once word{i // 10} upon\n<|endoftext|>\n" for i in range(3000))
    for name in "ab":
        (tmp_path / "folder" / f"{name}.txt").write_text(story)
    cfg = prepare_data.Config(str(tmp_path / "folder"), "bpe", 400, str(tmp_path / "data"), allow_special=True)
    prepare_data.prepare(cfg)
    assert "one in" not in capsys.readouterr().out
    read, train_bpe = [], BPETokenizer.train

    def train(texts, *more, **settings):
        return train_bpe((read.append(text) or text for text in texts), *more, **settings)
    monkeypatch.setattr(BPETokenizer, "train", train)
    monkeypatch.setattr("tokens.TRAIN_BPE_ON", 20_000)
    meta, train, val, tokenizer = opened(prepare_data.prepare(cfg))
    every = int(re.search(r"bpe: trained on one in (\d+) stretches", capsys.readouterr().out)[1])
    assert every == math.ceil(2 * len(story) * 0.9 / 20_000) and 15_000 < sum(map(len, read)) < 22_000
    places = [int(n) for n in re.findall(r"word(\d+)", "".join(read))]
    second = next(i for i in range(1, len(places)) if places[i] < places[i - 1])    # where the other file begins
    assert all(min(part) < 10 for part in (places[:second], places[second:]))
    assert places[second - 1] > 290 and places[-1] > 220
    # what stands between documents is one token, and no pair was spent on its spelling
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert tokenizer.end_of_text == 0 and not [t for t in vocabulary if "|>" in t and t != "<|endoftext|>"]
    assert tokenizer.decode(train) + tokenizer.decode(val) == story + "<|endoftext|>" + story and train.count(0) > 5000
    # the tokenizer travels whole in meta.json, and in the checkpoint, which takes it from there
    torch.save({"meta": meta}, tmp_path / "ckpt.pt")
    again = load_tokenizer(load(tmp_path / "ckpt.pt")["meta"]["tokenizer"])
    assert again.encode(story, True) == tokenizer.encode(story, True) and again.decode(again.encode(story)) == story


def test_ordinary_text_trains_the_same_bpe_as_without_precautions():
    tokenizers = pytest.importorskip("tokenizers")
    from pydoc_data.topics import topics
    text = "\n\n".join(topics[key] for key in sorted(topics))[:200_000] + AWKWARD
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    plain.pre_tokenizer = level(add_prefix_space=False)
    plain.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=level.alphabet()))
    pieces, n = pieces_to_learn_from([text], 1)
    assert n == 1 and len(pieces) > 5 and "".join(pieces) == text
    model = json.loads(BPETokenizer.train(pieces, 1000).to_dict()["json"])["model"]
    assert model == json.loads(plain.to_str())["model"] and len(model["merges"]) > 700


def test_bpe_learns_from_few_enough_different_words(monkeypatch):
    """Which bounds its memory: training keeps each of them, in a hundred times its size."""
    monkeypatch.setattr("tokens.DIFFERENT", 3000)
    monkeypatch.setattr("tokens.PIECE", 200)
    monkeypatch.setattr("tokens.LONGEST", 400)
    rng = random.Random(0)
    chinese = "".join(map(chr, range(0x4e00, 0x4e00 + 500)))
    for text, thinned in (("the same words again and again " * 20_000, False),
                          ("".join(rng.choices("abcdefgh", k=600_000)), True),
                          ("".join(rng.choices(chinese, k=100_000)), True),
                          (" ".join(str(rng.random()) for _ in range(30_000)), True)):
        pieces, n = pieces_to_learn_from([text], 3)
        assert pieces == list(cut_between_words([text]))[::n] and (n > 3) == thinned
        words = set(re.findall(r"[^\W\d]+|\d+|\.", " ".join(pieces)))
        size = sum(len(word.encode()) for word in words)
        assert size <= 3000 and (not thinned or size > 1000), n


def test_bpe_cuts_what_has_no_spaces(monkeypatch):
    """To merge pairs takes a time and a memory that are quadratic in the length of a word: none is longer than 100."""
    tokenizers = pytest.importorskip("tokenizers")
    given, real = [], tokenizers.Tokenizer

    class Spy:
        """The tokenizer, of which what it is trained on is written down."""

        def __init__(self, *args):
            vars(self)["real"] = real(*args)

        def train_from_iterator(self, texts, *more, **settings):
            self.real.train_from_iterator((given.append(text) or text for text in texts), *more, **settings)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __setattr__(self, name, value):
            setattr(self.real, name, value)
        from_str = real.from_str
    monkeypatch.setattr(tokenizers, "Tokenizer", Spy)
    text = "日本" * 5000 + "<|endoftext|>" + "word " * 100 + "x" * 1001
    BPETokenizer.train([text], 300)
    assert "".join(given) == text.replace("<|endoftext|>", "")
    assert max(len(word) for stretch in given for word in stretch.split()) <= 100


def test_a_large_vocabulary_is_uint32(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 65537)))
    meta, train, val, t = prepared(tmp_path, text)
    assert meta["dtype"] == "uint32" and train + val == list(range(65537)) and t.decode(val) == text[-len(val):]
    assert prepared(tmp_path, text[:65536])[0]["dtype"] == "uint16"


def test_a_folder(tmp_path):
    texts = {"a.txt": "first\n" * 10, "b.txt": "", "sub/c.txt": "second é\n" * 10, "sub/d.txt": "third\n" * 30}
    for name, text in texts.items():
        (tmp_path / "books.old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books.old" / name).write_bytes(text.encode())
    (tmp_path / "books.old" / "no.html").write_text("not this")
    everything = "".join(texts.values())
    flags = {"dataset": str(tmp_path / "books.old"), "data_dir": str(tmp_path)}     # prepared beside its own sources
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


def test_open_data(tmp_path, monkeypatch, capsys):
    """It prepares what is missing or has changed, and reads the tokens only where they are wanted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text " * 50)
    for text, said in (("", "wrote data/x\n"), ("", None), ("another text " * 50, "replaced data/x\n"), ("", None)):
        if text:
            (tmp_path / "x.txt").write_text(text)
        data = prepare_data.open_data("x.txt", "data", 20)
        printed = capsys.readouterr().out
        assert said.replace("/", os.sep) in printed if said else printed == ""
        assert "next:" not in printed and data.folder == Path("data", "x")
        assert data.meta == opened(data.folder)[0] and [len(data.train), len(data.val)] == [
            data.meta["train_tokens"], data.meta["val_tokens"]]
        whole = data.tokenizer.decode(data.train[:].tolist() + data.val[:].tolist())
        assert whole == (tmp_path / "x.txt").read_text()
    assert prepare_data.open_data("x", "data").meta == data.meta       # by the name of its folder
    prepare_data.prepare(prepare_data.Config("x.txt", tokenizer="bpe", vocab_size=300, name="x"))
    (tmp_path / "x.txt").write_text(whole + "more")     # tokens of another kind are not replaced by characters
    with pytest.raises(common.Problem, match="x.txt is not the text .* --tokenizer=bpe --vocab_size=300 --name=x"):
        prepare_data.open_data("x.txt", "data", 20)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "x.txt").write_text("other " * 99)
    with pytest.raises(common.Problem, match="o.x.txt is not the text .* --dataset=o.x.txt --tokenizer=bpe --vocab_size=300 --name=x"):
        prepare_data.open_data(os.path.join("o", "x.txt"), "data", 20)
    prepare_data.prepare(prepare_data.Config("x.txt"))
    (tmp_path / "x.txt").write_text(whole)
    assert prepare_data.open_data("x.txt", "data").meta["vocab_size"] == data.meta["vocab_size"]
    capsys.readouterr()
    with pytest.raises(common.Problem, match="too few for --block_size=65"):
        prepare_data.open_data("x.txt", "data", 65)
    with pytest.raises(common.Problem, match="No such file or directory; make it with: python prepare_data.py "
                                             "--dataset='<name, file, folder or URL>' --name=y --data_dir=data$"):
        prepare_data.open_data("y", "data", may_prepare=False)


def text_of(folder):
    """The text whose tokens stand in folder, the two parts one after the other."""
    _, train, val, t = opened(folder)
    return t.decode(train) + t.decode(val)


def lay_out(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


def test_a_folder_as_people_have_them(tmp_path, call):
    """Any case of .txt and .md, links followed once, nothing hidden, and a break between two files."""
    lay_out(tmp_path / "my notes", {"B.TXT": "SECOND\n", "a.txt": "no newline", "c.md": "# third é", "picture.png": "no text",
                                  ".ipynb_checkpoints/x.txt": "a draft", ".d.txt": "hidden", "e.jsonl": '{"text": "from JSON"}'})
    lay_out(tmp_path / "elsewhere", {"deep/f.txt": "linked"})
    with gzip.open(tmp_path / "my notes" / "g.TXT.gz", "wb") as file:
        file.write(b"packed")
    for name, target in (("link", "../elsewhere"), ("loop", "."), ("again.txt", "a.txt"), ("gone.txt", "nowhere")):
        try:
            os.symlink(target, tmp_path / "my notes" / name)
        except OSError:
            pytest.skip("no links on this system")
    printed = succeeded(call("prepare_data.py", "--dataset=my notes", cwd=tmp_path)).stdout
    assert "my notes: 6 files, 4 skipped\n" in printed
    assert text_of(tmp_path / "data" / "my notes") == "SECOND\nno newline\n# third é\nfrom JSON\npacked\nlinked"
    # what it prints can be pasted into a shell
    command = shlex.split(printed.splitlines()[-1].removeprefix("next: python "))
    assert command == ["train.py", "--dataset=my notes"]
    prepare_data.prepare(prepare_data.Config("my notes", "bpe", 300, "data"))
    end = "<|endoftext|>"
    files = ["SECOND\n", "no newline", "# third é", "from JSON", "packed", "linked"]
    assert text_of(tmp_path / "data" / "my notes-bpe") == end.join(files)


def test_a_folder_prepared_by_an_earlier_version_stays_valid(tmp_path, monkeypatch):
    """Which read .txt alone, and hidden ones too, and wrote neither hashes nor flags."""
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "notes", {"a.txt": "first text " * 9, "b.md": "other", ".old/c.txt": "third"})
    sources = sorted(Path("notes").rglob("*.txt"))
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    text = "first text " * 9 + "third"
    chars = "".join(sorted(set(text)))
    ids = np.array(CharTokenizer(chars).encode(text), np.uint16)
    (tmp_path / "data" / "notes").mkdir(parents=True)
    ids[:90].tofile("data/notes/train.bin")
    ids[90:].tofile("data/notes/val.bin")
    meta = {"name": "notes", "source": "notes", "sha256": sha256, "dtype": "uint16", "vocab_size": len(chars), "train_tokens": 90,
            "val_tokens": len(ids) - 90, "train_chars": 90, "val_chars": len(ids) - 90, "val_bytes": len(ids) - 90,
            "tokenizer": {"type": "char", "chars": chars}}
    (tmp_path / "data" / "notes" / "meta.json").write_text(json.dumps(meta))
    for _ in range(2):
        data = prepare_data.open_data("notes", "data")
        assert data.meta == meta and data.tokenizer.decode([*data.train[:], *data.val[:]]) == text
    ids[0] = len(chars)
    ids[:90].tofile("data/notes/train.bin")
    with pytest.raises(common.Problem, match="has a token 10, and the vocabulary is of 10; make it with: python prepare_data.py --dataset=notes"):
        prepare_data.open_data("notes", "data")


@pytest.mark.parametrize("packed", [False, True])
def test_newlines_of_windows_and_of_old_macs(tmp_path, monkeypatch, capsys, packed):
    """Also where the border of a block cuts one in two, and with the mark that Windows begins a file with."""
    text = "one\n\ntwo\n three é\n" * 20 + "\n"
    for block in (1, 2, 3, 1 << 20):
        monkeypatch.setattr(texts, "BLOCK", block)
        for newline, mark in (("\r\n", "\ufeff"), ("\r", ""), ("\n", "")):
            content = (mark + text.replace("\n", newline)).encode()
            (tmp_path / "x.txt").write_bytes(gzip.compress(content) if packed else content)
            folder = prepare_data.prepare(prepare_data.Config(str(tmp_path / "x.txt"), data_dir=str(tmp_path / "data")))
            assert text_of(folder) == text
            assert capsys.readouterr().out.count("became a newline") == (newline != "\n")
            assert opened(folder)[0]["val_bytes"] == len(text[int(len(text) * 0.9):].encode())


def test_lines_of_json(tmp_path, monkeypatch, capsys):
    """Their texts, with a break between two; other JSON is markup."""
    written = ["a\n\"b\" {é}", "", "c\r\nd", "half \ud83d", "x" * 500, "\U0001f40d"]
    expected = ["a\n\"b\" {é}", "c\nd", "half \ufffd", "x" * 500, "\U0001f40d"]
    lines = "\n".join(json.dumps({"id": 1, "text": text}) + "\n" for text in written)
    for block in (7, 1 << 20):
        monkeypatch.setattr(texts, "BLOCK", block)
        meta, train, val, t = prepared(tmp_path, lines)
        assert t.decode(train + val) == "\n".join(expected)
        meta, train, val, t = prepared(tmp_path, lines, tokenizer="bpe", vocab_size=300)
        assert t.decode(train + val) == "<|endoftext|>".join(expected) and (train + val).count(t.end_of_text) == 4
        assert meta["val_bytes"] == len(t.decode(val).replace("<|endoftext|>", "").encode())
        assert "warning" not in capsys.readouterr().out
    with pytest.raises(common.Problem, match="in its first line, but not in line 12"):
        prepared(tmp_path, lines + '{"txt": "x"}')
    # how the lines end is not of the texts
    prepared(tmp_path, '{"text": "one text"}\r\n' * 9)
    assert "became a newline" not in capsys.readouterr().out


@pytest.mark.parametrize("text, is_markup", [
    ('{"a": 1}\n' * 9, True), ("\n<!DOCTYPE html><p>text", True), ('<?xml version="1.0"?><a>text</a>', True), ("<p>text</p>" * 3, True),
    ('[{"text": "a text"}]', True), ("[" * 100_000 + '"', False), ('{"text": 5} and more', True), ('{\n  "text": "a text"\n}', True),
    ("[Illustration] a text", False), ("{curly} text of mine", False), ("a < b and more", False), ("<|endoftext|>text", False)])
def test_markup_is_said_and_learned(tmp_path, capsys, text, is_markup):
    _, train, val, t = prepared(tmp_path, text)
    assert t.decode(train + val) == text
    assert capsys.readouterr().out.count("warning: ") == is_markup


def lossy(tokenizers, kind, text):
    """The tokenizer.json of one that cannot spell the text."""
    models, trainers = tokenizers.models, tokenizers.trainers
    if kind == "words":
        t = tokenizers.Tokenizer(models.WordLevel({"the": 0, "cat": 1, "[UNK]": 2}, "[UNK]"))
        t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    elif kind == "pieces":
        t = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.BertPreTokenizer(), tokenizers.decoders.WordPiece()
        t.train_from_iterator([text], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))
    else:
        t = tokenizers.Tokenizer(models.Unigram())
        t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
        t.train_from_iterator([text if kind == "whole" else text.replace("\n", " ")], trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False))
    return t.to_str()


@pytest.mark.parametrize("kind, share", [("words", "7,002 of its 11,000 characters (63.65%)"), ("pieces", "1,000 of its 11,000 characters (9.09%)"),
                                         ("unigram", "1,000 of its 11,000 characters (9.09%)"), ("whole", None)])
def test_a_tokenizer_that_cannot_spell_the_text(tmp_path, call, kind, share):
    tokenizers = pytest.importorskip("tokenizers")
    text = "the bigcat\n" * 1000
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "t.json").write_text(lossy(tokenizers, kind, text))
    result = call("prepare_data.py", "--dataset=x.txt", "--tokenizer=t.json", cwd=tmp_path)
    if share is None:
        assert text_of(succeeded(result) and tmp_path / "data" / "x-t") == text
    else:
        one_line_error(result, f"--tokenizer=t.json cannot spell x.txt: {share}")
        assert not (tmp_path / "data" / "x-t").exists()


def test_special_tokens_that_stand_in_a_text_are_text(tmp_path):
    text = "one story<|endoftext|>another<|padding|>"
    for t in (one_token_a_byte(), BPETokenizer(neox_like())):
        saved = t.to_dict()
        assert t.end_of_text not in t.encode(text) and t.decode(t.encode(text)) == text
        assert t.encode(text, allow_special=True).count(t.end_of_text) == 1
        assert t.end_of_text not in t.encode(text) and t.to_dict() == saved
    for special in (False, True):
        _, train, val, t = prepared(tmp_path, text * 9, tokenizer="bpe", vocab_size=300, allow_special=special)
        assert (train + val).count(t.end_of_text) == 9 * special and t.decode(train + val) == text * 9


@pytest.mark.parametrize("content, words", [
    ("é right\n".encode() * 40 + b"caf\xe9\n" + "é right\n".encode() + b"\xe9\n", ["not UTF-8 in 2 lines, the first is line 41 ", "garble"]),
    ("é right and ".encode() + b"caf\xe9", ["not UTF-8 in 1 line, the first is line 1 ", "garble"]),
    (b"caf\xe9 au lait\n" * 9, ["iconv -f latin1 -t utf-8 'my text.txt' >"]),
    ("a café “quoted”\n".encode("cp1252") * 9, ["iconv -f cp1252 -t utf-8 'my text.txt' >"]),
    ("ordinary text".encode("utf-16"), ["iconv -f utf-16", " -t utf-8 'my text.txt' >"]),
    ("中文字句子".encode("utf-16") * 9, ["iconv -f utf-16 -t utf-8 'my text.txt' >"]),
    ("中文字句子很长的一句\n".encode("gbk") * 9, ["iconv -f ITS_ENCODING -t utf-8 'my text.txt' >"])])
def test_advice_on_other_encodings_does_not_make_it_worse(tmp_path, call, monkeypatch, content, words):
    for block in (3, 1 << 20):
        monkeypatch.setattr(texts, "BLOCK", block)
        (tmp_path / "my text.txt").write_bytes(content)
        line = one_line_error(call("prepare_data.py", "--dataset=my text.txt", cwd=tmp_path), *words)
        assert ("iconv" in line) == ("garble" not in line)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(content))
    line = one_line_error(call("prepare_data.py", "--dataset=x.txt.gz", cwd=tmp_path))
    assert "garble" in line or "gunzip -c x.txt.gz | iconv" in line


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_the_encoding_of_a_text_with_nul_bytes(tmp_path, encoding):
    """With a byte order mark or without: what the command reads in it is the text."""
    text = "Ein Wort, ein \u0100\u0101 und \u4e00\u4e01.\n" * 9
    for name, content in (("x.txt", text.encode(encoding)), ("x.gz", gzip.compress(text.encode(encoding)))):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(common.Problem, match="has a NUL byte at offset .*, or UTF-16 text") as problem:
            list(texts.read([path]))
        advised = re.search(r"iconv -f (\S+) -t utf-8", str(problem.value))[1]
        assert text.encode(encoding).decode(advised).removeprefix("\ufeff") == text


def test_a_damaged_gz(tmp_path, call):
    whole = gzip.compress(AWKWARD.encode() * 100, mtime=0)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[:-20], bytes(flipped), b"no gzip at all", whole + b"more"):
        (tmp_path / "x.gz").write_bytes(content)
        one_line_error(call("prepare_data.py", "--dataset=x.gz", cwd=tmp_path), "x.gz is damaged or not a text")
    assert not list((tmp_path / "data").glob("*"))


def test_tokens_in_a_file(tmp_path, monkeypatch):
    """They are those of an array, where a system has pread and where it has not; a file that gets shorter is a Problem."""
    for dtype in (np.uint16, np.uint32):
        array = np.random.default_rng(0).integers(0, 65536, 1000).astype(dtype)
        for has_pread in (True, False):
            if not has_pread:
                monkeypatch.delattr(os, "pread", raising=False)
            tokens = stored(tmp_path, array)
            assert len(tokens) == 1000 and tokens[:].dtype == dtype
            for part in (slice(None), slice(1), slice(-5, None), slice(990, 2000), slice(5, 5), slice(7, 3), slice(2, 90, 7)):
                assert np.array_equal(tokens[part], array[part])
            for starts, length in (([0, 999, 500], 10), (np.array([3]), 2500), ([5000], 1)):
                places = np.asarray(starts)[:, None] + np.arange(length)
                assert np.array_equal(tokens.windows(starts, length), np.take(array, places, mode="wrap"))
        monkeypatch.undo()
        os.truncate(tokens.path, 100)
        assert np.array_equal(tokens.windows([0], 10)[0], array[:10])
        with pytest.raises(common.Problem, match=r"\.bin is damaged .*it has become shorter since this run began"):
            tokens.windows([0, 500], 10)


def damage(folder, **changes):
    meta = {**json.loads((folder / "meta.json").read_text()), **changes}
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


@pytest.mark.parametrize("changes", [
    {"vocab_size": None}, {"vocab_size": 5}, {"vocab_size": 10 ** 12}, {"vocab_size": "9"}, {"vocab_size": True}, {"dtype": "float16"}, {"dtype": 7},
    {"tokenizer": {}}, {"tokenizer": []}, {"tokenizer": {"type": "char", "chars": 5}}, {"tokenizer": {"type": "char", "chars": "aabcdefg"}},
    {"tokenizer": {"type": "char", "chars": ["a"]}}, {"tokenizer": {"type": "bpe", "json": "{}"}}, {"tokenizer": {"type": "magic"}},
    {"train_tokens": -1}, {"train_tokens": 1e9}, {"val_bytes": None}, {"source": 5}, {"sha256": None}, {"here": []}, {"here": {"flags": "x"}},
    "{", "[]", "null", "[" * 100_000, '"\udc80"', b"\xff\xfe", b""])
def test_damaged_meta(tmp_path, monkeypatch, changes):
    """One line about that file, with the command that makes it anew."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text " * 50)
    folder = prepare_data.open_data("x.txt", "data").folder
    if isinstance(changes, dict):
        damage(folder, **changes)
    else:
        (folder / "meta.json").write_bytes(changes if isinstance(changes, bytes) else changes.encode("utf-8", "surrogatepass"))
    with pytest.raises(common.Problem) as problem:
        prepare_data.open_data("x.txt", "data")
    assert re.fullmatch(r"data.x.meta.json is damaged [^;]*; make it with: python prepare_data.py --dataset=x.txt( --name=x --data_dir=data)?", str(problem.value))
    prepare_data.prepare(prepare_data.Config("x.txt"))
    assert prepare_data.open_data("x.txt", "data").meta["vocab_size"] == 7


def test_damaged_tokens(tmp_path, monkeypatch):
    """What is not what was written is noticed, and what is known by its size and time is not read again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_text("some text " * 50)
    flags = prepare_data.Config("my text.txt", "bpe", 300, "my data", name="x")
    advice = "make it with: python prepare_data.py --dataset='my text.txt' --tokenizer=bpe --vocab_size=300 --data_dir='my data' --name=x"
    path = prepare_data.prepare(flags) / "val.bin"
    whole = path.read_bytes()
    for content, words in ((whole[:-2], f"has {len(whole) - 2} bytes, not {len(whole)}"), (whole + b"xx", "bytes, not"), (b"", "has 0 bytes"),
                           (b"\xff\xff" + whole[2:], "has a token 65,535, and the vocabulary is of"),
                           (whole[2:] + whole[:2], "holds other tokens than were written into it"), (None, "cannot read")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(common.Problem, match=re.escape(words)) as problem:
            prepare_data.open_data("x", "my data")
        assert str(problem.value).startswith(("my data/x/val.bin", "cannot read my data/x/val.bin")) and str(problem.value).endswith(advice)
    # where it has been moved or copied to, not where it was made
    shutil.copytree("my data", "copy")
    with pytest.raises(common.Problem, match=re.escape(advice.replace("'my data'", "copy"))):
        prepare_data.open_data("x", "copy")
    path.write_bytes(whole)
    checked, check = [], prepare_data.Tokens.check
    monkeypatch.setattr(prepare_data.Tokens, "check", lambda tokens, *more: checked.append(tokens.path.name) or check(tokens, *more))
    for _ in range(2):
        prepare_data.open_data("x", "my data")
    assert checked == ["train.bin", "val.bin"]
    # a folder that cannot be written into is read each time
    os.utime(path)

    def refuse(*args):
        raise common.Problem("read-only")
    monkeypatch.setattr(common, "write_whole", refuse)
    for _ in range(2):
        prepare_data.open_data("x", "my data")
    assert len(checked) == 6


def test_what_killed_runs_left_behind(tmp_path, monkeypatch):
    """It goes at the next start; what is a person's own, or of a run that prepares right now, stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text " * 50)
    left = {"x/tmp_prepare": ["lock", "train.bin"], "x/tmpabcd_123": ["train.bin", "val.bin", "meta.json"], "tmp00000000": ["train.bin"]}
    own = {"x/tmpmy_notes": ["a.txt"], "tmpcorpus01": ["train.bin", "val.bin", "meta.json"], "x/tmp": ["train.bin"], "tmp_of_mine": []}
    (tmp_path / "data" / "tmp_of_mine").mkdir(parents=True)
    for again in (False, True):
        for folder, names in {**left, **own}.items():
            lay_out(tmp_path / "data" / folder, dict.fromkeys(names, "x"))
        assert len(prepare_data.open_data("x.txt", "data").train) == 450
        for folder, names in left.items():
            assert not (tmp_path / "data" / folder).exists(), (folder, again)
        for folder, names in own.items():
            assert sorted(os.listdir(tmp_path / "data" / folder)) == sorted(names)


@ON_POSIX
def test_two_that_prepare_the_same(tmp_path):
    """The second waits, takes what the first has made, and nothing stays behind."""
    (tmp_path / "x.txt").write_text("some text " * 50)
    code = """
import sys, prepare_data
real = prepare_data.write_tokens
def held(*args):
    print("held", flush=True)
    sys.stdin.readline()
    return real(*args)
if sys.argv[1:]:
    prepare_data.write_tokens = held
prepare_data.open_data("x.txt", "data")
"""
    env = environment(PYTHONPATH=str(ROOT))
    for killed in (False, True):
        first = start("-c", code, "held", cwd=tmp_path, env=env, stdin=subprocess.PIPE)
        assert first.stdout.readline() == "held\n"
        second = start("-c", code, cwd=tmp_path, env=env)
        assert second.stdout.readline() == f"another process is preparing {Path('data', 'x')}; waiting for it\n"
        if killed:
            first.kill()
        first.communicate("\n", timeout=PATIENCE)
        assert ("wrote" in second.communicate(timeout=PATIENCE)[0]) == killed and second.returncode == 0
        assert sorted(os.listdir(tmp_path / "data" / "x")) == ["meta.json", "train.bin", "val.bin"]
        shutil.rmtree(tmp_path / "data")


def test_prepared_with_a_given_tokenizer(tmp_path, monkeypatch, capsys):
    """In a folder of its own; what the tokenizer does not know is left out and said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.txt").write_text("an old text\n" * 20)
    (tmp_path / "new.txt").write_text("one new text é\n" * 19 + "a tool é é\n")
    old = prepare_data.open_data("old.txt", "data")
    capsys.readouterr()
    for expected in ("not in it: 'w' (19)", None):
        data = prepare_data.open_data("new.txt", "data", 4, tokenizer=old.tokenizer)
        printed = capsys.readouterr().out
        assert ("'é' (21), 'w' (19). 40 of its 296 characters (13.51%) are left out" in printed) if expected else printed == ""
        assert re.fullmatch("new-as-[0-9a-f]{8}", data.folder.name) and data.meta["tokenizer"] == old.meta["tokenizer"]
        text = data.tokenizer.decode([*data.train[:], *data.val[:]])
        assert text == ("one ne text \n" * 19 + "a tool  \n") and data.meta["val_bytes"] == len(data.val)
    assert prepare_data.open_data("old.txt", "data", tokenizer=old.tokenizer).folder == old.folder     # it has these tokens already
    # who names a folder of tokens gets these, whatever they are
    prepare_data.prepare(prepare_data.Config("new.txt", data_dir="data", name="other"))
    again = prepare_data.open_data("other", "data", tokenizer=old.tokenizer)
    assert again.folder.name == "other" and again.meta["tokenizer"] != old.meta["tokenizer"]
    bpe = one_token_a_byte()
    assert prepare_data.open_data("new.txt", "data", tokenizer=bpe).tokenizer.decode(
        prepare_data.open_data("new.txt", "data", may_prepare=False, tokenizer=bpe).train[:]) == (tmp_path / "new.txt").read_text()[:266]
    (tmp_path / "data" / data.folder.name / "train.bin").unlink()
    with pytest.raises(common.Problem, match=f"delete data.{data.folder.name}, and the same command prepares it"):
        prepare_data.open_data("new.txt", "data", tokenizer=old.tokenizer)
    (tmp_path / "zh.txt").write_text("中文字句子" * 20)
    with pytest.raises(common.Problem, match="100 of its 100 characters .100.00%. are not in it: '中' .20., "):
        prepare_data.open_data("zh.txt", "data", tokenizer=old.tokenizer)
    assert not list((tmp_path / "data").glob("zh*"))


# problems: one line, status 2, nothing written

@pytest.mark.parametrize("flags, words", [
    (["--dataset=none.txt"], ["unknown dataset 'none.txt', and no such file or folder"]),
    (["--dataset=empty.txt"], ["empty.txt is empty"]),
    (["--dataset=short.txt"], ["only 9 characters"]),
    (["--dataset=binary.txt"], ["binary.txt", "NUL byte at offset 4"]),
    (["--dataset=latin.txt"], ["latin.txt is not UTF-8", "0xe9 at offset 2000003", "iconv -f latin1 -t utf-8 latin.txt >"]),
    (["--dataset=cut.txt"], ["cut.txt is not UTF-8", "0xe2 at offset 20"]),
    (["--dataset=folder"], ["folder is a folder without .txt, .md or .jsonl files"]),
    (["--dataset=shakespear"], ["unknown dataset", "tinystories", "did you mean shakespeare?"]),
    (["--dataset="], ["unknown dataset ''"]),
    (["--tokenizer=bep"], ["unknown tokenizer 'bep'", "gpt-neox", "did you mean bpe?"]),
    (["--tokenizer=bad.json"], ["bad.json is not a tokenizer.json"]),
    (["--tokenizer=latin.txt"], ["latin.txt is not a tokenizer.json"]),
    (["--dataset=good.txt", "--tokenizer=none.json"], ["none.json is a tokenizer.json without tokens"]),
    (["--dataset=good.txt", "--tokenizer=words.json"], ["the tokenizer.json has no tokens for the text", "UNK"]),
    (["--dataset=good.txt", "--tokenizer=ab.json"], ["--tokenizer=ab.json cannot spell good.txt: 107 of its 108 characters (99.07%)"]),
    (["--tokenizer=bpe", "--vocab_size=256"], ["--vocab_size=256 must be at least 257"]),
    (["--tokenizer=bpe", "--vocab_size=2000000000"], ["--vocab_size=2000000000 must be", "at most 16,777,216"]),
    (["--dataset=good.txt", "--vocab_size=300"], ["--vocab_size goes with --tokenizer=bpe"]),
    (["--dataset=good.txt", "--name=../x"], ["--name takes the name of a folder"]),
    (["--dataset=good.txt", "--name=.."], ["--name"]),
    (["--dataset=http://127.0.0.1:9/a.txt"], ["cannot download", "python train.py", "without network"]),
    (["--datset=pydoc"], ["did you mean --dataset?"]),
])
def test_problems(tmp_path, call, flags, words):
    (tmp_path / "folder").mkdir()
    for name, data in {"empty.txt": b"", "short.txt": "ninechäré".encode(), "good.txt": b"good enough " * 9,
                       "binary.txt": b"text\0more text", "latin.txt": b"a" * 2000000 + b"caf\xe9 au lait",
                       "cut.txt": b"01234567890123456789\xe2\x82", "bad.json": b'{"version": "1.0"}'}.items():
        (tmp_path / name).write_bytes(data)
    tokenizers = pytest.importorskip("tokenizers")
    models = {"none": tokenizers.models.BPE(), "words": tokenizers.models.WordLevel({"a": 0}, "[UNK]"),
              "ab": tokenizers.models.BPE({"b": 0}, [])}
    for name, model in models.items():
        tokenizers.Tokenizer(model).save(str(tmp_path / f"{name}.json"))
    before = tree(tmp_path)
    one_line_error(call("prepare_data.py", *flags, cwd=tmp_path), *words)
    assert tree(tmp_path) == before and not list(tmp_path.glob("data/*/*"))


def test_a_python_without_pydoc_data_or_tokenizers(tmp_path, call, monkeypatch):
    for module in ("pydoc_data", "pydoc_data.topics", "tokenizers"):
        monkeypatch.setitem(sys.modules, module, None)
    one_line_error(call("prepare_data.py", cwd=tmp_path), "without pydoc_data")
    one_line_error(call("prepare_data.py", "--tokenizer=bpe", cwd=tmp_path), "pip install tokenizers")
    assert not (tmp_path / "data").exists()
    model = small(vocab_size=5)
    checkpoint = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config), "step": 1, "best_loss": 1.0,
                  "meta": {"tokenizer": {"type": "bpe", "json": "{}"}}}
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run" / "best.pt")
    one_line_error(call("sample.py", "--out_dir=run", cwd=tmp_path), "pip install tokenizers")     # not: the file is damaged


# failures in the middle leave what was there

def test_disk_full(tmp_path, call):
    prepared(tmp_path, "what was there before")
    (tmp_path / "big.txt").write_text("text " * 200_000)
    before = tree(tmp_path)
    for name in ("x", "new"):
        with small_disk(1_000_000):
            result = call("prepare_data.py", "--dataset=big.txt", f"--name={name}", cwd=tmp_path)
        one_line_error(result, "too large")
        assert tree(tmp_path) == before and os.listdir(tmp_path / "data") == ["x"]
    assert "replaced" in call("prepare_data.py", "--dataset=big.txt", "--name=x", cwd=tmp_path).stdout


def test_interrupted_from_inside(tmp_path, monkeypatch):
    """At the last moment, when all files but one are written."""
    def interrupted(*_):
        raise KeyboardInterrupt
    prepared(tmp_path, "what was there before")
    before = tree(tmp_path / "data")
    monkeypatch.setattr(prepare_data, "write_meta", interrupted)
    for name in ("x", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path, "something new altogether", name=name)
        assert tree(tmp_path / "data") == before and os.listdir(tmp_path / "data") == ["x"]


@ON_POSIX
def test_ctrl_c_while_a_text_is_prepared(tmp_path):
    prepared(tmp_path, "what was there before")
    before = tree(tmp_path / "data")
    process = hold(tmp_path, "os.fsync", 1, "prepare_data.py", "--dataset=x.txt", "--name=x", "--tokenizer=bpe",
                   "--vocab_size=300")
    assert len(os.listdir(tmp_path / "data" / "x")) > 3     # it has begun
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE)[1] == "prepare_data.py: interrupted\n" and process.returncode == 130
    assert tree(tmp_path / "data") == before


@pytest.mark.parametrize("tokenizer, kind", [("char", "txt"), ("bpe", "txt"), ("tokenizer.json", "txt"), ("char", "jsonl"), ("char", "gz")])
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch, tokenizer, kind):
    """What Python and numpy ask for, which tracemalloc counts to the byte: of four times the text no more than of one."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("texts.BLOCK", 1 << 14), ("tokens.PIECE", 1 << 10), ("tokens.TRAIN_BPE_ON", 1 << 16)):
        monkeypatch.setattr(name, value)
    words = " ".join(random.Random(0).choices([f"wörd{i}" for i in range(500)], k=2000)) + "\n"
    if tokenizer != "char":
        (tmp_path / "tokenizer.json").write_text(BPETokenizer.train([words], 600).to_dict()["json"])
    peaks, sizes = [], []
    for name, lines in (("warm", 1), ("short", 10), ("long", 40)):
        text = words if kind != "jsonl" else json.dumps({"text": words}) + "\n"
        content = (text * lines).encode()
        sizes.append(len(content))
        (tmp_path / f"{name}.{kind}").write_bytes(gzip.compress(content) if kind == "gz" else content)
        del content
        gc.collect()
        tracemalloc.start()
        prepare_data.prepare(prepare_data.Config(f"{name}.{kind}", tokenizer, 400, "data", name=name))
        prepare_data.open_data(name, "data")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < (sizes[2] - sizes[1]) / 5, (peaks, sizes)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_training_a_bpe_shows_progress(tmp_path):
    """On a terminal, while the text is read and while pairs are merged; in a log there is none of it."""
    pytest.importorskip("tokenizers")
    import fcntl
    import termios
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(10, 60))) for _ in range(300)]
    (tmp_path / "t.txt").write_text(" ".join(rng.choices(words, k=130_000)))
    assert (tmp_path / "t.txt").stat().st_size * 0.9 > 4e6     # what is done sooner has no bar
    command = [str(ROOT / "prepare_data.py"), "--dataset=t.txt", "--tokenizer=bpe", "--vocab_size=2000"]
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(ours, "rb", buffering=0) as screen, start(*command, cwd=tmp_path, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):      # how a terminal ends
            while data := screen.read(10_000):
                shown += data
    assert process.returncode == 0
    assert all(what in shown for what in (b"reading: ", b"training bpe: ", b"encoding: ", b"Compute merges"))
    assert succeeded(script("prepare_data.py", *command[1:], cwd=tmp_path)).stderr == ""


# downloads, from a server on this machine

@pytest.fixture
def web(server, monkeypatch):
    """The server, and no pause before a download that broke off goes on."""
    monkeypatch.setattr(texts, "PAUSES", (0, 0, 0))
    return server


def test_download(tmp_path, web):
    path = texts.download(web.url + "/plain", tmp_path / "d" / "f.txt", SHA)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ["f.txt"]
    texts.download(web.url + "/plain", path, SHA)
    assert len(web.log) == 1     # it was there
    path.write_bytes(b"damaged")
    assert texts.download(web.url + "/plain", path, SHA).read_bytes() == BODY


@pytest.mark.parametrize("behaviour, ranges", [("plain", [None, "bytes=131072-", "bytes=262144-"]),
                                               ("norange", [None, "bytes=131072-", "bytes=131072-"])])
def test_download_goes_on_after_a_drop(tmp_path, web, behaviour, ranges):
    web.drops = 2
    assert texts.download(f"{web.url}/{behaviour}", tmp_path / "f").read_bytes() == BODY
    assert [wanted for _, wanted, _ in web.log] == ranges


def test_download_goes_on_in_a_later_run(tmp_path, web):
    web.drops = 9
    with pytest.raises(common.Problem, match="the same command goes on"):
        texts.download(web.url + "/norange", tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["f.part"]
    web.drops = 0
    assert texts.download(web.url + "/plain", tmp_path / "f", sha256=SHA).read_bytes() == BODY
    assert web.log[-1][1] == "bytes=131072-"


@pytest.mark.parametrize("part", [BODY, BODY + b"of another, longer file"])
def test_download_with_a_part_of_full_length(tmp_path, web, part):
    (tmp_path / "f.part").write_bytes(part)
    assert texts.download(web.url + "/plain", tmp_path / "f").read_bytes() == BODY


def test_download_problems(tmp_path, web):
    for behaviour, more, words in [
            ("missing", {}, "status 404"), ("toolong", {}, "cannot download"),
            ("plain", {"sha256": "0" * 64}, "sha256 differs")]:
        path = tmp_path / behaviour
        with pytest.raises(common.Problem, match=words):
            texts.download(f"{web.url}/{behaviour}", path, **more)
        assert not path.exists()
    assert sorted(os.listdir(tmp_path)) == ["toolong.part"]     # garbage is gone, a drop can go on


def test_what_keeps_from_downloading(tmp_path, web, call, monkeypatch):
    """At once, and nothing is left of it."""
    monkeypatch.setattr(texts, "PAUSES", (1000,))
    with pytest.raises(common.Problem, match="cannot download http://127.0.0.1:1/a/b .*without network,"):
        texts.download("http://127.0.0.1:1/a/b", tmp_path / "new" / "b")
    with pytest.raises(common.Problem, match="cannot download http://: Invalid URL"):
        texts.download("http://", tmp_path / "new" / "b")
    monkeypatch.setitem(sys.modules, "requests", None)
    one_line_error(call("prepare_data.py", f"--dataset={web.url}/plain", cwd=tmp_path), "pip install requests\n")
    assert not web.log and not os.listdir(tmp_path)


def test_texts_from_the_network(tmp_path, web, monkeypatch):
    flags = {"data_dir": str(tmp_path)}
    monkeypatch.setattr(texts, "ALICE", web.url + "/plain/alice")
    web.files = {"/plain/alice": "\ufefflicence\r\n*** START OF THE X ***\r\n\r\nAlice was\r\nbored.\r\n\r\n"
                                    "*** END OF THE X ***\r\nmore licence".encode()}
    _, train, val, t = opened(prepare_data.prepare(prepare_data.Config(dataset="alice", **flags)))
    assert t.decode(train + val) == "Alice was\nbored.\n"
    meta, train, val, t = opened(prepare_data.prepare(prepare_data.Config(dataset=web.url + "/plain/text.txt", **flags)))
    assert meta["name"] == "text" and t.decode(train + val).encode() == BODY
    monkeypatch.setattr(texts, "ALICE", web.url + "/plain")
    (tmp_path / "downloads" / "alice.txt").unlink()
    with pytest.raises(common.Problem, match="something else than the book"):
        prepare_data.prepare(prepare_data.Config(dataset="alice", **flags))
    assert not (tmp_path / "downloads" / "alice.txt").exists()


def test_tinystories(tmp_path, hub, call, monkeypatch):
    """It has a validation part of its own, and comes through Hugging Face's cache."""
    parts = {"train": b"One day.\n<|endoftext|>\nA dog. " * 9, "valid": b"Val story.\n"}
    hub.offer({f"TinyStories-{part}.txt": text for part, text in parts.items()}, "datasets/roneneldan/TinyStories")
    for tokenizer in ("char", "bpe"):
        config = prepare_data.Config("tinystories", tokenizer, 270, str(tmp_path / "data"))
        meta, train, val, t = opened(prepare_data.prepare(config))
        assert t.decode(train).encode() == parts["train"] and t.decode(val).encode() == parts["valid"]
    assert train.count(t.end_of_text) == 9 and meta["name"] == "tinystories-bpe"
    set_hub(monkeypatch, offline=True)
    asked = len(hub.log)
    assert opened(prepare_data.prepare(config))[0] == meta
    set_hub(monkeypatch, cache=tmp_path / "empty")
    one_line_error(call("prepare_data.py", "--dataset=tinystories", cwd=tmp_path), "TinyStories", "python train.py")
    assert len(hub.log) == asked and not (tmp_path / "data" / "tinystories" / "downloads").exists()


def test_gpt_neox(tmp_path, hub, call, monkeypatch):
    """Downloaded into --cache_dir, or found in Hugging Face's cache."""
    flags = ["--tokenizer=gpt-neox", "--dataset=t.txt"]
    (tmp_path / "t.txt").write_text(AWKWARD)
    hub.offer({"tokenizer.json": b"{}"}, "EleutherAI/gpt-neox-20b")
    one_line_error(call("prepare_data.py", *flags, "--cache_dir=bad", cwd=tmp_path), "tokenizer.json is not a tokenizer.json")
    assert not (tmp_path / "data").exists()
    data = BPETokenizer.train([AWKWARD], 300).to_dict()["json"].encode()
    hub.offer({"tokenizer.json": data}, "EleutherAI/gpt-neox-20b")
    succeeded(call("prepare_data.py", *flags, "--cache_dir=here", cwd=tmp_path))
    assert opened(tmp_path / "data" / "t-gpt-neox")[0]["vocab_size"] == 300
    assert any(path.read_bytes() == data for path in (tmp_path / "here").rglob("tokenizer.json"))
    succeeded(call("prepare_data.py", *flags, cwd=tmp_path))
    asked = len(hub.log)
    set_hub(monkeypatch, offline=True)
    succeeded(call("prepare_data.py", *flags, cwd=tmp_path))
    one_line_error(call("prepare_data.py", *flags, "--cache_dir=empty", cwd=tmp_path), "tokenizer.json")
    assert len(hub.log) == asked


def spoiled(checkpoint, what):
    """The checkpoint with one thing changed, by its path as in "optimizer.state.0.exp_avg"."""
    *way, last = (int(name) if name.isdecimal() else name for name in what[0].split("."))
    inner = checkpoint
    for name in way:
        inner = inner[name]
    if what[1] is None:
        del inner[last]
    else:
        inner[last] = what[1](inner.get(last)) if callable(what[1]) else what[1]
    return checkpoint


def laughs(_):
    """Two times what was there, 60 times over: to look at all of it takes forever."""
    text = ["ha"]
    for _ in range(60):
        text = [text, text]
    return text


FIRST = "optimizer.state.0"


@pytest.mark.parametrize("what, words", [
    (("step", "3"), "its step is a str"), (("meta", [1]), "its meta is a list"), (("meta.tokenizer", {}), "it has no type"),
    (("meta.tokenizer", {"type": "char"}), "it has no chars"), (("meta.tokenizer.chars", "ab"), "alphabet and vocabulary"),
    (("model_config.n_layer", 10 ** 6), "n_layer is 1000000"), (("model_config.d_state", 10 ** 9), "size mismatch for d_state"),
    (("model_config.d_modal", 3), "d_modal"), (("model_config.scan", laughs), "its scan is a list"), (("model", {}), "n_layer is 2"),
    (("model.backbone", 3), "backbone is no ordinary tensor"),
    (("model.lm_head", lambda _: torch.zeros(1).expand(9 ** 9)), "lm_head is no ordinary tensor"),
    (("model.lm_head", lambda _: torch.full((2,), math.nan)), "lm_head has numbers that are not finite"),
    (("evaluated", None), "it has no evaluated"), (("best_loss", laughs), "its best_loss is a list"), (("since_best", laughs), "since_best"),
    (("threads", 1.5), "its threads"), (("threads", -3), "its threads"), (("step", -1), "its step"), (("meta.sha256", None), "it has no sha256"), (("optimizer", {}), "it has no state"),
    (("config.newer", 1), "of a newer version: the option newer"), (("config.max_iters", laughs), "its max_iters"),
    (("config.batch_size", -1), "its batch_size"), (("config.device", 3), "its device"), (("scaler", {"scale": []}), "its scale"),
    (("carried", laughs), "damaged"), (("carried", [(torch.ones(2, 3), torch.ones(2))]), "the carried state"),
    ((FIRST, None), "damaged"), ((f"{FIRST}.exp_avg", laughs), "exp_avg of parameter 0 is no ordinary tensor"),
    ((f"{FIRST}.exp_avg", lambda t: torch.zeros(1).expand(t.shape)), "no ordinary tensor"),
    ((f"{FIRST}.exp_avg", lambda t: torch.zeros(1)), "has the shape (1,), not (64, 16)"),
    ((f"{FIRST}.exp_avg_sq", lambda t: t * math.inf), "not finite"), ((f"{FIRST}.step", lambda t: torch.ones(3)), "the shape (3,), not ()")])
def test_what_a_checkpoint_is_checked_for(finished, monkeypatch, capsys, what, words):
    """By training and, as far as it reads it, by sample.py; in time; and the one before is used."""
    newest, previous = (finished / "run" / name for name in ("ckpt.pt", "ckpt.prev.pt"))
    torch.save(spoiled(load(newest), what), newest)
    began = time.perf_counter()
    with pytest.raises(common.Problem) as problem:
        runs.load_checkpoint(newest, Config=train.Config)
    assert f"{newest} is damaged or not a checkpoint (" in str(problem.value) and words in str(problem.value)
    assert len(str(problem.value)) < 400 and time.perf_counter() - began < 60     # on however busy a machine
    assert runs.load_checkpoint(newest, previous, Config=train.Config)["step"] == 120
    assert capsys.readouterr().err.count("\n") == 1
    if what[0].split(".")[0] in ("step", "meta", "model", "model_config") and "sha256" not in what[0]:
        assert runs.load_checkpoint(newest, previous)["step"] == 120


def test_a_checkpoint_that_unpacks_to_more_than_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 ** 7))
    with pytest.raises(common.Problem, match="it holds more than its size"):
        runs.load_checkpoint(tmp_path / "bomb.pt")


def test_a_folder_is_held_by_one_run(tmp_path):
    """It is gone afterwards if nothing was put into it, and what killed runs left is removed."""
    for _ in range(2):
        with runs.RunFolder(tmp_path / "out" / "a"):
            assert os.listdir(tmp_path / "out" / "a") == ["lock"]
        assert not os.listdir(tmp_path)
    with runs.RunFolder(tmp_path / "b") as folder:
        (folder.path / "best.tmp").mkdir()
        for name in ("ckpt.tmp", "log.csv.tmp", "mine.tmp"):
            (folder.path / name).write_text("half")
    with runs.RunFolder(tmp_path / "b"):
        assert {*os.listdir(tmp_path / "b")} == {"lock", "mine.tmp"}
    (tmp_path / "file").write_text("")
    with pytest.raises(common.Problem, match="cannot write into .*file"), runs.RunFolder(tmp_path / "file" / "x"):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# train.py


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
    assert best["meta"] == opened(corpus / "finished" / "data" / "words")[0]


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    data, cfg = stored(tmp_path, np.arange(1000, dtype=np.uint16)), train.Config(batch_size=6, block_size=9)
    batch = lambda step, micro=0, rank=0, world=1: train.get_batch(data, cfg, step, micro, rank, world, torch.device("cpu"))
    x, y = batch(3)
    assert x.shape == y.shape == (6, 9) and torch.equal(y, x + 1) and torch.equal(batch(3)[0], x)
    assert not torch.equal(batch(4)[0], x) and not torch.equal(batch(3, 1)[0], x)
    shares = [batch(3, 0, rank, 3)[0] for rank in range(3)]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == sorted(x[:, 0].tolist())
    reached = {int(i) for step in range(3000) for x, y in [batch(step)] for i in (x.min(), y.max())}
    assert {0, 999} <= reached      # the first and the last window are drawn too


def test_learning_rate():
    cfg = train.Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(step, cfg) for step in range(120)]
    assert rates[:10] == [pytest.approx((i + 1) / 11) for i in range(10)] and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == rates[119] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_accumulated_gradients_are_those_of_the_large_batch():
    torch.manual_seed(0)
    model, idx = small(), tokens(8, 20)

    def grads(parts):
        model.zero_grad()
        for part in idx.split(8 // parts):
            (model(part, part)[1] / parts).backward()
        return [p.grad.clone() for p in model.parameters()]
    assert all(relative(a, b) < 1e-5 for a, b in zip(grads(4), grads(1)))


# stopping, and going on

@ON_POSIX
def test_an_interrupted_run_equals_one_that_was_not(work, corpus, call):
    """By Ctrl-C and SIGTERM in the middle of a step, and killed while a checkpoint is being written."""
    stops = ((STEP, 12, signal.SIGINT, 130), (STEP, 9, signal.SIGTERM, 143),
             ("os.fsync", 3, signal.SIGKILL, -9))       # of ckpt.pt, after log.csv and best.pt
    for where, count, number, status in stops:
        process = hold(work, where, count, "train.py", *TINY)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == status and "Traceback" not in errors, output + errors
        if number != signal.SIGKILL:
            assert "the same command goes on from there" in output
            assert load(work / "run" / "ckpt.pt")["step"] == steps_done(work)
            assert not list((work / "run").glob("*.tmp"))
    result = succeeded(call("train.py", *TINY, cwd=work))
    assert "going on from step" in result.stdout and "->" not in result.stdout
    assert_same_run(work, corpus / "finished")


@ON_POSIX
def test_a_second_ctrl_c_stops_at_once(work, corpus, call):
    """In a step, and in a save, after log.csv and best.pt: what was saved before is whole."""
    for where, count in ((STEP, 45), ("os.fsync", 3)):
        process = hold(work, where, count, "train.py", *TINY, signals=99)
        while process.poll() is None:   # two that come at once may be one
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130 and errors == "train.py: interrupted\n", output + errors
        assert load(work / "run" / "ckpt.pt")["step"] == 40     # the last one that was saved
    assert (work / "run" / "ckpt.tmp").exists()
    succeeded(call("train.py", *TINY, cwd=work))
    assert_same_run(work, corpus / "finished")
    assert not list((work / "run").glob("*.tmp"))


@ON_POSIX
@pytest.mark.parametrize("number, step", [(signal.SIGINT, 1), (signal.SIGTERM, 41)])
def test_best_is_only_what_was_evaluated(work, corpus, call, monkeypatch, number, step):
    """A stop in the first step after an evaluation that was the best so far: best.pt keeps the weights of that one."""
    interrupt(monkeypatch, step, number)
    result = call("train.py", *TINY, cwd=work)
    assert result.returncode == 128 + number and f"stopped after step {step} of 150" in result.stdout
    assert f"step {step - 1}: val loss" in result.stdout and ", best" in result.stdout
    best, newest = (load(work / "run" / name) for name in ("best.pt", "ckpt.pt"))
    assert best["step"] == step - 1 and newest["step"] == step and best["best_loss"] == newest["best_loss"]
    succeeded(call("train.py", *TINY, cwd=work))
    assert_same_run(work, corpus / "finished")


class Screen(io.RawIOBase):
    """A terminal on which the person presses Ctrl-C while a certain line is being written."""

    def __init__(self, line):
        self.line, self.shown = line, b""

    def writable(self):
        return True

    def write(self, data):
        self.shown += bytes(data)
        if self.line and self.line in self.shown:
            self.line = None
            signal.raise_signal(signal.SIGINT)
        return len(data)


def test_ctrl_c_in_the_middle_of_a_printed_line(work, call, monkeypatch):
    """Where Python does not let the handler print: the run is saved all the same."""
    screen = Screen(b"step 0: val loss")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(screen), encoding="utf-8"))
    result = call("train.py", *TINY, cwd=work)
    assert result.returncode == 130 and result.stderr == "" and b"the same command goes on from there" in screen.shown
    assert b"stopping after this step; once more to stop at once" in screen.shown
    assert load(work / "run" / "ckpt.pt")["step"] <= 1


@ON_POSIX
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1] if os.name == "posix" else [])
def test_other_signals_save_too(work, call, monkeypatch, number):
    """And the handlers of before are back, whether train.main returns or raises."""
    before = [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGUSR1)]
    try:
        with monkeypatch.context() as patch:
            interrupt(patch, 3, number)
            result = call("train.py", *TINY, cwd=work)
        assert result.returncode == 128 + number and "stopped after step 3 of 150, saved in run" in result.stdout
        assert load(work / "run" / "ckpt.pt")["step"] == 3
        with monkeypatch.context() as patch:
            patch.setattr(train, "learning_rate", lambda *_: signal.getsignal(number)())    # no such call
            with pytest.raises(TypeError):
                call("train.py", *TINY, cwd=work)
        assert signal.getsignal(number) is signal.SIG_DFL
        if number == signal.SIGHUP:     # as nohup starts it
            signal.signal(number, signal.SIG_IGN)
            interrupt(monkeypatch, 2, number)
            assert "done" in succeeded(call("train.py", *TINY, "--max_iters=6", cwd=work)).stdout
    finally:
        for n, handler in zip((signal.SIGHUP, signal.SIGUSR1), before):
            signal.signal(n, handler)


def test_training_in_a_thread(work, monkeypatch):
    """Where no handlers can be set; it returns the status, and leaves the number of threads as it was."""
    monkeypatch.chdir(work)
    cfg, given = common.parse_flags(train.Config, [*TINY, "--max_iters=3"])
    statuses, threads = [], torch.get_num_threads()
    thread = threading.Thread(target=lambda: statuses.append(train.main(cfg, given)))
    thread.start()
    thread.join(PATIENCE)
    assert statuses == [0] and load(work / "run" / "ckpt.pt")["step"] == 3 and torch.get_num_threads() == threads
    with runs.RunFolder(Path("run")):     # it was given back
        pass


def test_a_signal_that_comes_while_processes_agree(monkeypatch, capsys):
    """It is not lost: they agree on it the next time."""
    stop, come = runs.Stop(2), [signal.SIGTERM]

    def all_reduce(tensor, op):     # that of the other process is 0
        if come:
            stop.receive(come.pop(), None)
    monkeypatch.setattr(runs.dist, "all_reduce", all_reduce)
    assert [stop.agreed("cpu"), stop.agreed("cpu"), stop.signal] == [False, True, signal.SIGTERM]
    assert capsys.readouterr().out == "stopping after this step\n"


@ON_POSIX
def test_a_terminal_that_is_closed(work):
    """SIGHUP comes, and every write fails: it is saved all the same, without a word."""
    import pty
    ours, theirs = pty.openpty()
    process = start(ROOT / "train.py", *TINY, "--max_iters=100000", "--compile=False", cwd=work, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"step 40: val" not in shown:
        shown += os.read(ours, 10000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) in (128 + signal.SIGHUP, 128 + 13)
    assert load(work / "run" / "ckpt.pt")["step"] == steps_done(work) >= 40


def test_a_finished_run_says_so(finished, call):
    before = tree(finished)
    result = succeeded(call("train.py", *TINY, cwd=finished))
    assert "finished" in result.stdout and "--max_iters=300" in result.stdout and "--init_from=scratch" in result.stdout
    assert tree(finished) == before
    result = succeeded(call("train.py", *TINY, "--eval_only", cwd=finished))
    assert f"val loss {load(finished / 'run' / 'ckpt.pt')['best_loss']:.4f}" in result.stdout and tree(finished) == before


def test_going_on_with_other_flags(finished, call):
    """Flags not given come from the checkpoint; those that changed are named; scratch starts over."""
    result = succeeded(call("train.py", "--out_dir=run", "--device=cpu", "--max_iters=153", "--weight_decay=0.2",
                            "--learning_rate=1e-3", cwd=finished))
    for line in ("max_iters: 150 -> 153", "weight_decay: 0.1 -> 0.2", "learning_rate: 0.003 -> 0.001", "step 150 of 153"):
        assert line in result.stdout
    saved = load(finished / "run" / "ckpt.pt")
    assert saved["step"] == 153 and saved["config"]["block_size"] == 64
    assert [g["weight_decay"] for g in saved["optimizer"]["param_groups"]] == [0.2, 0.0]
    succeeded(call("train.py", *TINY, "--init_from=scratch", "--max_iters=3", "--d_model=8", cwd=finished))
    saved = load(finished / "run" / "ckpt.pt")
    assert saved["step"] == 3 and saved["model_config"]["d_model"] == 8 and steps_done(finished) == 3


@pytest.mark.parametrize("layer", ["mamba2", "mamba3"])
def test_runs_of_other_layers(work, call, monkeypatch, layer):
    """Interrupted and resumed to the bit, with a state that is carried on; loaded, shown, quantized and exported; as weights to begin with."""
    flags = [*TINY, f"--layer={layer}", "--max_iters=12", "--eval_interval=6", "--carry_state"]
    succeeded(call("train.py", *flags, "--out_dir=whole", cwd=work))
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        assert call("train.py", *flags, cwd=work).returncode == 130
    succeeded(call("train.py", *flags, cwd=work))
    saved, whole = load(work / "run" / "ckpt.pt"), load(work / "whole" / "ckpt.pt")
    assert saved["step"] == 12 and saved["model_config"] == whole["model_config"] and saved["model_config"]["layer"] == layer
    assert all(torch.equal(*pair) for pair in zip(tree_leaves((saved["model"], saved["carried"])), tree_leaves((whole["model"], whole["carried"]))))
    assert saved["config"]["headdim"] == 32 and saved["config"]["d_state"] == 64
    before = tree(work)
    one_line_error(call("train.py", *TINY, "--layer=mamba", cwd=work), f"holds a run with --layer={layer}, not --layer=mamba")
    one_line_error(call("train.py", *TINY, "--headdim=8", cwd=work), "holds a run with --headdim=32, not --headdim=8")
    one_line_error(call("train.py", *TINY, "--layer=mamba4", cwd=work), "--layer takes mamba, mamba2 or mamba3, not 'mamba4'")
    assert tree(work) == before

    model, device = Mamba.from_pretrained(work / "run"), "--device=cpu"
    assert model.config.layer == layer and torch.equal(model.lm_head.weight, load(work / "run" / "best.pt")["model"]["lm_head.weight"])
    asked = ["--start=abc ", "--temperature=0", "--max_new_tokens=20", device]
    expected = succeeded(call("sample.py", "--out_dir=run", *asked, cwd=work)).stdout
    for more in (*[["--quantize=int8"]] * (sample.fast is not None), ["--show=loss"], ["--show=delta"]):
        succeeded(call("sample.py", "--out_dir=run", *asked, *more, cwd=work))
    chat = b"abc\n/save kept.pt\ndef\n/load kept.pt\ndef\n"
    said = succeeded(call("sample.py", "--out_dir=run", "--interactive", *asked[1:], cwd=work, stdin=chat)).stdout.split("> ")
    assert len(said) == 7 and said[3] == said[5] != ""
    for layout in ("mamba_ssm", "transformers"):
        result = call("sample.py", "--out_dir=run", f"--export={layout}", f"--format={layout}", device, cwd=work)
        if (layout, layer) == ("transformers", "mamba3"):
            one_line_error(result, "transformers has no Mamba-3")
            assert not (work / layout).exists() or not os.listdir(work / layout)
        else:
            assert succeeded(result) and succeeded(call("sample.py", f"--pretrained={layout}", *asked, cwd=work)).stdout == expected
    small_steps = [device, "--dataset=words.txt", "--max_iters=2", "--batch_size=2", "--block_size=16", "--eval_iters=1", "--sample_tokens=0"]
    tuned = succeeded(call("train.py", "--init_from=run", "--out_dir=tuned", *small_steps, cwd=work))
    assert "; into tuned\n" in tuned.stdout and load(work / "tuned" / "ckpt.pt")["config"]["layer"] == layer
    one_line_error(call("train.py", "--init_from=run", "--out_dir=other", "--layer=mamba", *small_steps, cwd=work), "--layer cannot be chosen")


def interrupt(monkeypatch, step, number=signal.SIGINT):
    """From now on the signal comes in the so-manieth step of training."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(number)
        return clip(*args, **more)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)


def test_fewer_steps_than_are_done(finished, call, monkeypatch):
    """An error; as many as are done: the run is evaluated where it stands."""
    interrupt(monkeypatch, 5)
    result = call("train.py", *TINY, "--max_iters=190", cwd=finished)
    assert result.returncode == 130 and "stopped after step 155 of 190" in result.stdout
    before = of_run(finished)
    one_line_error(call("train.py", *TINY, "--max_iters=152", cwd=finished), "has done 155 steps already, more than --max_iters=152")
    assert "step 155: val loss" in succeeded(call("train.py", *TINY, "--max_iters=152", "--eval_only", cwd=finished)).stdout
    one_line_error(call("train.py", *TINY, "--lr_decay_iters=-5", cwd=finished), "--lr_decay_iters takes a whole number from 1 on")
    assert of_run(finished) == before
    weights = load(finished / "run" / "ckpt.pt")["model"]
    assert "max_iters: 190 -> None" in succeeded(call("train.py", *TINY, "--max_iters=none", "--eval_only", cwd=finished)).stdout
    result = succeeded(call("train.py", *TINY, "--max_iters=155", cwd=finished))
    assert "step 155: val loss" in result.stdout and "done: best val loss" in result.stdout
    last, saved = losses(finished)[-1], load(finished / "run" / "ckpt.pt")
    assert last[0] == "155" and float(last[3]) < 2.1 and saved["evaluated"] == saved["step"] == 155
    assert all(torch.equal(weights[name], saved["model"][name]) for name in weights)
    assert "is finished: 155 steps" in succeeded(call("train.py", *TINY, "--max_iters=155", cwd=finished)).stdout


def test_more_steps_change_the_learning_rate(finished, call):
    """Which is said, and can be chosen."""
    output = succeeded(call("train.py", *TINY, "--max_iters=160", cwd=finished)).stdout
    rate = train.learning_rate(150, train.Config(learning_rate=3e-3, warmup_iters=5, max_iters=160))
    assert f"learning rate: {rate:.3g} from step 150 on, where it would have been 0; 0 at step 160; " in output and rate > 1e-5
    more = ["--max_iters=164", "--learning_rate=0.0002", "--min_lr=0.0002"]
    assert "learning rate: 0.0002 from step 160 on, where it would have been 0; 0.0002 at step 164" in succeeded(call("train.py", *TINY, *more, cwd=finished)).stdout
    assert [row[4] for row in losses(finished)[-2:]] == ["0.0002", "0.0002"]
    assert "learning rate" not in succeeded(call("train.py", *TINY, *more, "--max_iters=164", cwd=finished)).stdout


def test_patience_and_overfitting(work, call, monkeypatch):
    """One line when validation stays worse than it was, and with --patience an end, which the same command knows of."""
    values = iter([9.0, 8.0, 8.5, 8.6, 8.7, 8.8, 1.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: next(values))
    flags = [*TINY, "--max_iters=7", "--eval_interval=1", "--patience=4"]
    output = succeeded(call("train.py", *flags, cwd=work)).stdout
    assert "no better for 4 evaluations: --patience ends the run" in output and "step 6" not in output
    assert output.count("by heart") == 1 and output.index("step 4: val") < output.index("by heart") < output.index("step 5: val")
    saved = load(work / "run" / "ckpt.pt")
    assert (saved["step"], saved["since_best"], saved["best_loss"]) == (5, 4, 8.0)
    output = succeeded(call("train.py", *flags, cwd=work)).stdout
    assert "is finished: 5 steps" in output and "--patience=0" in output
    output = succeeded(call("train.py", *flags, "--patience=0", cwd=work)).stdout
    assert "step 6: val loss 1.0000 nats per token" in output and "done: best val loss 1.0000 nats per token, " in output


def test_a_run_that_starts_over_leaves_nothing_of_the_one_before(finished, corpus, call, monkeypatch):
    """Not even stopped in its first evaluation, when there is no best.pt of its own yet."""
    evaluate = train.evaluate

    def interrupted(*args, **more):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args, **more)
    monkeypatch.setattr(train, "evaluate", interrupted)
    result = call("train.py", *TINY, "--init_from=scratch", cwd=finished)
    assert result.returncode == 130 and "stopped after step 0 of 150" in result.stdout
    assert of_run(finished).keys() == {"run/ckpt.pt"} and load(finished / "run" / "ckpt.pt")["step"] == 0
    monkeypatch.setattr(train, "evaluate", evaluate)
    succeeded(call("train.py", *TINY, cwd=finished))
    assert_same_run(finished, corpus / "finished")


@pytest.mark.parametrize("damage", ["cut off", "garbled", "gone", "empty"])
def test_the_previous_checkpoint_is_used_if_the_newest_is_damaged(finished, corpus, call, damage):
    path = finished / "run" / "ckpt.pt"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut off": data[:len(data) // 2], "garbled": os.urandom(len(data)), "empty": b""}[damage])
    result = succeeded(call("train.py", *TINY, cwd=finished))
    assert "going on from step 120" in result.stdout
    assert ("ckpt.pt is damaged" in result.stderr) == (damage != "gone")
    assert_same_run(finished, corpus / "finished")


def test_flipped_bytes_are_noticed(finished, call):
    path = finished / "run" / "ckpt.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) // 2 + 64] = b"A" * 64
    path.write_bytes(data)
    whole = (finished / "run" / "ckpt.prev.pt").read_bytes()
    assert "damaged" in succeeded(call("train.py", *TINY, "--eval_only", cwd=finished)).stderr
    result = succeeded(call("train.py", *TINY, "--max_iters=121", "--eval_interval=1000", cwd=finished))
    assert "going on from step 120" in result.stdout
    assert (finished / "run" / "ckpt.prev.pt").read_bytes() == whole    # the damaged one did not take its place


OLD_CONFIG = {  # a MambaConfig as it was saved before mamba_fast/ was there
    "vocab_size": 10, "d_model": 16, "n_layer": 2, "d_state": 8, "d_conv": 4, "expand": 2, "dt_rank": 1, "dt_min": 0.001,
    "dt_max": 0.1, "dt_init_floor": 0.0001, "conv_bias": True, "bias": False, "dropout": 0.1, "norm_eps": 1e-05,
    "tie_embeddings": True, "pad_vocab_size_multiple": 8, "d_intermediate": 0, "scan": "auto"}
OLD_LAYER = ("norm.weight", "mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias",
             "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.out_proj.weight")
NEW_FLAGS = {"reset_at_eot", "carry_state", "bptt", "checkpointing", "patience"}


def as_before(checkpoint):
    """A checkpoint in the form, and the order, in which it was saved before mamba_fast/ was there."""
    names = ["backbone.embedding.weight", *(f"backbone.layers.{i}.{name}" for i in range(2) for name in OLD_LAYER),
             "backbone.norm_f.weight", "lm_head.weight"]
    old = {"model": {name: checkpoint["model"][name] for name in names}, "model_config": OLD_CONFIG,
           "meta": checkpoint["meta"], "step": checkpoint["step"], "best_loss": checkpoint["best_loss"]}
    if "optimizer" not in checkpoint:
        return old
    given = dict(words.removeprefix("--").split("=") for words in TINY)
    names = {flag.split("=")[0] for flag in FLAGS["train.py"].split()} - NEW_FLAGS
    defaults = {name: getattr(train.Config, name) for name in names}
    config = {**defaults, "d_state": 8, "compile": False}
    config.update({name: type(checkpoint["config"][name])(value) for name, value in given.items()})
    return {**old, "evaluated": checkpoint["evaluated"], "train_loss": checkpoint["train_loss"], "config": config,
            "optimizer": checkpoint["optimizer"], "scaler": {}}


def test_checkpoints_of_the_version_before(finished, corpus, call):
    """Training goes on from one to the same bits, and sample.py writes with one."""
    newest, previous, best = (finished / "run" / name for name in ("ckpt.pt", "ckpt.prev.pt", "best.pt"))
    sampling = ["--out_dir=run", "--device=cpu", "--start=abc ", "--temperature=0", "--max_new_tokens=30"]
    expected = succeeded(call("sample.py", *sampling, cwd=finished)).stdout
    old = as_before(load(previous))
    assert old["config"].keys() == {flag.split("=")[0] for flag in FLAGS["train.py"].split()} - NEW_FLAGS
    torch.save(old, newest)
    torch.save(as_before(load(best)), best)
    previous.unlink()
    assert succeeded(call("sample.py", *sampling, cwd=finished)).stdout == expected
    result = succeeded(call("train.py", *TINY, cwd=finished))
    assert "going on from step 120" in result.stdout and "->" not in result.stdout
    assert_same_run(finished, corpus / "finished")


def test_a_changed_text_is_prepared_again(work, call):
    train_it = functools.partial(call, "train.py", *TINY, "--max_iters=1", "--init_from=scratch", cwd=work)
    assert "wrote" in succeeded(train_it()).stdout
    assert "wrote" not in succeeded(train_it()).stdout
    (work / "words.txt").write_text("other words\n" * 500)
    os.utime(work / "words.txt", (0, 0))
    assert "replaced" in succeeded(train_it()).stdout


def test_going_on_in_another_dtype(finished, call):
    for steps, dtype in ((151, "bfloat16"), (152, "float16"), (153, "float32"), (154, "float16")):
        succeeded(call("train.py", *TINY, f"--max_iters={steps}", f"--dtype={dtype}", cwd=finished))
    assert steps_done(finished) == 154


def test_divergence_keeps_the_last_good_checkpoint(finished, call):
    before = of_run(finished)
    flags = [*TINY, "--max_iters=400", "--learning_rate=1e18", "--grad_clip=0"]
    message = one_line_error(call("train.py", *flags, cwd=finished), "diverged", "checkpoint of step 150 is kept")
    assert "learning_rate" in message and of_run(finished) == before


def test_a_full_disk_while_saving(finished, call):
    """What was saved before stays, and nothing half-written does."""
    before = of_run(finished)
    with small_disk((finished / "run" / "best.pt").stat().st_size // 2):
        result = call("train.py", *TINY, "--max_iters=151", cwd=finished)
    one_line_error(result, "could not write run", "too large")
    assert of_run(finished) == before and {*os.listdir(finished / "run")} <= {"best.pt", "ckpt.pt", "ckpt.prev.pt", "log.csv",
                                                                             "lock"}


LOCKED = """
import sys
from pathlib import Path
import common
file = common.lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked(folder):
    """As if another run were training in there."""
    with start("-c", LOCKED, folder, env=environment(PYTHONPATH=str(ROOT)), stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "locked\n"
        yield
        process.communicate("")
    assert process.returncode == 0


def test_two_runs_in_one_folder(finished, call, monkeypatch, capsys):
    before = tree(finished)
    with locked(finished / "run"):
        one_line_error(call("train.py", *TINY, "--init_from=scratch", cwd=finished), "another run is training in run")
        assert "step 150: val loss" in succeeded(call("train.py", *TINY, "--eval_only", cwd=finished)).stdout    # reads alone
    assert tree(finished) == before
    (finished / "new").mkdir()
    with locked(finished / "new"):      # by a run that has not saved anything yet
        one_line_error(call("train.py", *TINY, "--out_dir=new", cwd=finished), "another run is training in new")
        assert os.listdir(finished / "new") == ["lock"]
    succeeded(call("train.py", *TINY, "--max_iters=151", cwd=finished))     # the system gave it back
    if os.name == "posix":      # a file system without locks
        def unlocked(*_):
            raise OSError(37, "No locks available")
        monkeypatch.setattr("fcntl.lockf", unlocked)
        common.lock(finished / "run").close()
        assert "cannot lock" in capsys.readouterr().out


def test_a_run_that_comes_late(work, call, monkeypatch):
    """Between its first look and its lock another run has trained in there."""
    hold_it = runs.RunFolder.hold

    def late(folder, path):
        monkeypatch.setattr(runs.RunFolder, "hold", hold_it)
        with contextlib.redirect_stdout(io.StringIO()):
            assert train.main(*common.parse_flags(train.Config, [*TINY, "--max_iters=2"])) == 0
        hold_it(folder, path)
    for more in ((), ("--init_from=scratch",)):
        shutil.rmtree(work / "run", ignore_errors=True)
        monkeypatch.setattr(runs.RunFolder, "hold", late)
        one_line_error(call("train.py", *TINY, *more, cwd=work), "another run has just saved in run")
        assert load(work / "run" / "ckpt.pt")["step"] == 2


def test_eval_only_needs_no_permission_to_write(finished, call, monkeypatch):
    before = tree(finished)
    one_line_error(call("train.py", *TINY, "--eval_only", "--init_from=scratch", cwd=finished), "give one of the two")
    monkeypatch.setattr(os, "access", lambda *_: False)
    one_line_error(call("train.py", *TINY, cwd=finished), "cannot write into run; choose another --out_dir")
    (finished / "run" / "lock").unlink()
    (finished / "run" / "lock").mkdir()
    assert "step 150: val loss" in succeeded(call("train.py", *TINY, "--eval_only", cwd=finished)).stdout
    (finished / "run" / "lock").rmdir()
    assert tree(finished).keys() == before.keys() - {"run/lock"}


@pytest.mark.parametrize("how, where", [("deleted", "run"), ("renamed", "run"), ("replaced", "run-2"), ("log.csv", "run")])
def test_a_folder_that_is_taken_away(work, call, monkeypatch, how, where):
    """While training: saved in a new one, with all rows of log.csv; another's of that name is left alone."""
    def act():
        if how == "log.csv":
            return (work / "run" / "log.csv").unlink()
        (work / "run").rename(work / "other")
        if how == "deleted":
            shutil.rmtree(work / "other")
        if how == "replaced":
            (work / "run").mkdir()
            (work / "run" / "ckpt.pt").write_text("of another run")
    clip, calls = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: calls.append(1) or (len(calls) == 5 and act()) or clip(*args))
    output = succeeded(call("train.py", *TINY, "--max_iters=8", cwd=work)).stdout
    assert ("was renamed or deleted" in output) == (how != "log.csv") and f"in {where}. To write" in output
    assert load(work / where / "ckpt.pt")["step"] == 8
    assert [row[0] for row in losses(work, where)[1:]] == ["0", *map(str, range(1, 9)), "8"]
    assert how != "replaced" or [path.name for path in (work / "run").iterdir()] == ["ckpt.pt"]


ROWS = ["0,0,,4.0,0.001,0", "1,256,3.5,,4e-05,900", "2,512,3.1,,0.001,900", "2,512,3.1,2.5,0.001,900", "3,768,2.5,,0.001,901"]


@pytest.mark.parametrize("damage, left_out, kept", [
    (b"", 0, 4), (b"\xff\xfe\x00\x01" * 20, 1, 4), ("\u00b2,1,2,,3,4\n".encode(), 1, 4), (b'"' + b"x" * 200000, 1, 4),
    (b"1" * 5000 + b",1,2,,3,4\n", 1, 4), (b'"1,2,3,,4,5\n6,7\n', 2, 4), (b"# L\xe4uft\n", 1, 4), (b"3,7", 1, 4),
    (b"2,512,nan,,0.1,1\r\n", 1, 4), (b"2,512,3.1,,0.1,1\r\n", 0, 5), (b"\n\n", 0, 4)])
def test_a_damaged_log(tmp_path, capsys, damage, left_out, kept):
    """Rows that are none are left out, and that is said; the file itself waits for the first new row."""
    header, path = ",".join(runs.COLUMNS), tmp_path / "log.csv"
    path.write_bytes("\n".join([header, *ROWS, ""]).encode() + damage)
    before, run = path.read_bytes(), runs.Run(step=2, evaluated=2)
    with runs.RunFolder(tmp_path) as folder:
        log = runs.Log(folder, run, 256)
        assert path.read_bytes() == before
        log.speed, run.step = 7, 3
        log.add(run, 1e-3, 2.25)
    assert path.read_text().splitlines()[:5] == [header, *ROWS[:4]]
    assert len(path.read_text().splitlines()) == 1 + kept + 1 and path.read_text().endswith("\n3,768,,2.25,0.001,7\n")
    assert (f"{left_out} damaged row" in capsys.readouterr().out) == (left_out > 0)


def test_a_folder_in_the_place_of_a_file(finished, corpus, call):
    (finished / "run" / "log.csv").unlink()
    (finished / "run" / "log.csv").mkdir()
    one_line_error(call("train.py", *TINY, "--max_iters=151", cwd=finished), "cannot read run/log.csv: Is a directory")
    shutil.rmtree(finished)
    shutil.copytree(corpus / "finished", finished)
    (finished / "run" / "ckpt.pt").unlink()
    (finished / "run" / "ckpt.pt").mkdir()
    result = succeeded(call("train.py", *TINY, cwd=finished))
    assert "cannot read run/ckpt.pt" in result.stderr and "going on from step 120" in result.stdout
    assert_same_run(finished, corpus / "finished")


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "4"}, {"RANK": "3"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
                                 {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}])
def test_what_others_left_in_the_environment(work, call, monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    one_line_error(call("train.py", *TINY, cwd=work), "torchrun sets all of RANK", "or unset these")
    assert os.listdir(work) == ["words.txt"]
    for name in env:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    assert "wrote" in succeeded(call("prepare_data.py", "--dataset=words.txt", cwd=work)).stdout
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "0")
    assert "done" in succeeded(call("train.py", *TINY, "--max_iters=1", cwd=work)).stdout


@pytest.mark.parametrize("cores, said", [(64, "threads: 3, not 1, as before"), (2, "threads: 1, not 3, the cores are free")])
def test_threads_are_those_of_before(finished, call, monkeypatch, cores, said):
    path, used = finished / "run" / "ckpt.pt", []
    torch.save({**load(path), "threads": 3}, path)
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1] if used else 1)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    flags = [flag for flag in TINY if "threads" not in flag]
    output = succeeded(call("train.py", *flags, "--max_iters=151", cwd=finished)).stdout
    assert said in output and "The last bits of all sums" in output
    assert used[0] == (3 if cores == 64 else 1) and used[-1] == 1       # and in the end as it was


@pytest.mark.parametrize("speeds, expected", [
    ({4: 10, 2: 9, 1: 5}, 4), ({4: 1, 2: 2, 1: 2.9}, 4), ({4: 1, 2: 20, 1: 10}, 2), ({4: 1, 2: 2, 1: 100}, 1)])
def test_fewer_threads_where_other_programs_use_the_cores(work, call, monkeypatch, speeds, expected):
    """Only if that is far faster, and not for a moment's load; --threads takes what it is told."""
    for looks, number in ((20, expected), (3, expected), (2, 4)):
        left = {count: [speeds[count]] * looks + [1000] * (20 - looks) for count in speeds}
        monkeypatch.setattr(common, "additions_per_second", lambda count, left=left: left[count].pop())
        assert common.pick_threads(4) == number
    monkeypatch.setattr(common, "pick_threads", lambda most: expected)
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    flags = [*(flag for flag in TINY if "threads" not in flag), "--max_iters=1"]
    output = succeeded(call("train.py", *flags, cwd=work)).stdout
    assert {*used[:-1]} == {expected} and used[-1] == 4 and ("threads: " in output) == (expected != 4)
    used.clear()
    succeeded(call("train.py", *flags, "--threads=3", "--init_from=scratch", cwd=work))
    assert {*used[:-1]} == {3} and used[-1] == 4


def test_other_programs_come_and_go_while_it_trains(work, call, monkeypatch):
    """The number of threads is chosen anew at each evaluation, said where it changes, and saved."""
    fastest, now = iter([4, 4, 1, 1, 4, 4]), [4]
    monkeypatch.setattr(common, "pick_threads", lambda most: next(fastest))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    flags = [flag for flag in TINY if "threads" not in flag and "max_iters" not in flag and "eval_interval" not in flag]
    output = succeeded(call("train.py", *flags, "--eval_interval=2", "--max_iters=6", cwd=work)).stdout
    said = [line for line in output.splitlines() if line.startswith("threads: ")]
    assert ["threads: 1, not 4, other programs" in said[0], "threads: 4, not 1, the cores are free" in said[1], len(said)] == [True, True, 2]
    assert load(work / "run" / "ckpt.pt")["threads"] == 4 and load(work / "run" / "ckpt.prev.pt")["threads"] == 1


def test_additions_are_counted_on_so_many_threads(monkeypatch):
    before = torch.get_num_threads()
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: 7.0)      # a clock that stands still
        assert common.additions_per_second(1) > 0
    assert common.additions_per_second(1, 0.01) > 100 and torch.get_num_threads() == before


def test_what_is_told_on_the_way(work, call, monkeypatch):
    """Where no terminal shows a bar a line every few seconds; that it compiles; samples, another one each time."""
    monkeypatch.setattr(runs, "TELL", 0)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    flags = [*TINY, "--max_iters=4", "--log_interval=2", "--eval_interval=2", "--sample_tokens=40", "--compile"]
    output = succeeded(call("train.py", *flags, cwd=work)).stdout
    assert re.search(r"compiling, up to a minute \.\.\.\ncompiled in \d+ s\n", output)
    told = re.findall(r"step (\d) of 4: loss \d\.\d{4} nats per token, \d\.\d{3} bits per byte, [\d,]+ tokens/s, 00:0\d left", output)
    assert told == ["2", "4"]
    samples = re.findall(r"(?s)---\n(.*?)\n---\n", output)
    assert len(samples) == len({*samples}) == 3
    again = succeeded(call("train.py", *flags, "--out_dir=again", cwd=work)).stdout
    assert re.findall(r"(?s)---\n(.*?)\n---\n", again) == samples
    assert "---" not in succeeded(call("train.py", *flags, "--out_dir=none", "--sample_tokens=0", cwd=work)).stdout


def test_a_seed_of_several_numbers(corpus):
    """Each of them counts, and the samples of a run are of its --seed."""
    draws = [torch.rand((), generator=torch.Generator().manual_seed(common.seed_of(*numbers))).item()
             for numbers in itertools.product(range(3), range(3), (0, 2 ** 32))]
    assert len({*draws}) == 18
    best = load(corpus / "finished" / "run" / "best.pt")
    told = [train.a_sample(runs.load_model(best), load_tokenizer(best["meta"]["tokenizer"]), [0],
                           train.Config(seed=seed, sample_tokens=40), "float32", step=0) for seed in (1, 2, 1)]
    assert told[0] == told[2] != told[1]


def test_the_scan_and_the_compiler_are_for_the_shape_of_the_weights(work, call, monkeypatch):
    small(d_state=4, d_model=16).save_pretrained(work / "weights")
    seen = []
    monkeypatch.setattr(common, "pick_scan", lambda *args: seen.append(args[3]) or "chunked")
    monkeypatch.setattr(common, "pick_compile", lambda cfg, device: seen.append(cfg.d_state))
    flags = [flag for flag in TINY if not re.search("d_model|n_layer", flag)]
    succeeded(call("train.py", *flags, "--init_from=weights", "--new_vocabulary", "--max_iters=1", cwd=work))
    assert seen == [4, 4]
    one_line_error(call("train.py", *flags, "--init_from=scratch/other", "--max_iters=2", cwd=work),
                   "not --init_from=scratch/other; use another --out_dir")


# what a person may give

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
    (["--batch_size=many"], ["--batch_size takes a whole number from 1 on, not 'many'"]),
    (["--batch_size=0"], ["--batch_size takes a whole number from 1 on, not '0'"]),
    (["--learning_rate=nan"], ["--learning_rate takes a number from 0 on, not 'nan'"]),
    (["--learning_rate=-1"], ["--learning_rate takes a number from 0 on, not '-1'"]),
    (["--beta2=1"], ["--beta2 takes a number from 0 on and below 1, not '1'"]),
    (["--seed=2147483648"], ["--seed takes a whole number from 0 on and below 2147483648, not"]),
    (["--dropout=1.5"], ["--dropout takes a number from 0 on and below 1"]),
    (["--d_model=0"], ["--d_model takes a whole number from 1 on"]),
    (["--device=cuda"], ["--device=cuda", "--device=cpu"]),
    (["--device=gpu"], ["--device takes cpu, cuda, cuda:1, mps or auto, not 'gpu'"]),
    (["--device=meta"], ["not 'meta'"]),
    (["--dtype=float8"], ["--dtype takes float32, bfloat16"]),
    (["--scan=fast"], ["--scan=fast: method must be one of auto,"]),
    (["--layer=mamba4"], ["--layer takes mamba, mamba2 or mamba3, not 'mamba4'"]),
    (["--headdim=8"], ["--headdim goes with --layer=mamba2 or mamba3"]),
    (["--layer=mamba2", "--d_model=16", "--headdim=7"], ["--layer=mamba2: headdim must be a divisor of 32, not 7"]),
    (["--layer=mamba3", "--d_conv=3"], ["d_conv means nothing for the layer 'mamba3'"]),
    (["--layer=mamba3", "--d_state=5"], ["d_state must be even, not 5"]),
    (["--layer=mamba2", "--scan=triton"], ["--scan=triton: scan 'triton' needs mamba_fast"]),
    (["--init_from=nothing"], ["--init_from takes"]),
    (["--init_from=/no/such/folder"], ["--init_from takes"]),
    (["--eval_only"], ["--eval_only needs a checkpoint"]),
    (["--out_dir=good.txt"], ["cannot write into good.txt"]),
    (["train"], ["unexpected argument 'train'"]),
    (["novel.txt"], ["flags are written --name=value, as --dataset=novel.txt"]),
    (["--tokenizer=bpe"], ["unknown flag --tokenizer; --help"]),
])
def test_bad_input_to_train(tmp_path, call, flags, words):
    for name, data in BAD_TEXTS.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("some words to learn from\n" * 400)
    dataset = [] if "--dataset" in flags[0] else ["--dataset=good.txt"]
    one_line_error(call("train.py", *dataset, *flags, cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()
    if not dataset:
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


@pytest.mark.parametrize("how, words", [
    ("truncated", "damaged or not a checkpoint"), ("text", "damaged or not a checkpoint"),
    ("other tensors", "damaged or not a checkpoint"), ("other shape", "do not fit: size mismatch for"),
    ("other config", "do not fit: MambaConfig.__init__() got an unexpected keyword argument 'd_modal'")])
@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_bad_checkpoints(finished, call, name, how, words):
    break_checkpoint(finished / "run", how)
    before = tree(finished)
    one_line_error(call(name, *(TINY if name == "train.py" else ["--out_dir=run"]), cwd=finished), words)
    assert tree(finished) == before


def test_a_checkpoint_that_does_not_fit(finished, call):
    """Of another shape, of other data, of another vocabulary: an error that names what differs, and nothing is lost."""
    (finished / "other.txt").write_text("some words to learn from\n" * 400)
    before = tree(finished)
    rest = [flag for flag in TINY if "d_model" not in flag]
    one_line_error(call("train.py", *rest, "--d_model=32", "--n_layer=3", "--max_iters=200", cwd=finished),
                   "holds a run with --n_layer=2 --d_model=16, not --n_layer=3 --d_model=32; start over with --init_from=scratch")
    one_line_error(call("train.py", *TINY, "--dataset=other.txt", "--max_iters=200", cwd=finished),
                   "run with --dataset=words.txt, not --dataset=other.txt")
    assert tree(finished) == before
    for text, words in (("zyx\n" * 1000, "another vocabulary"), ((finished / "words.txt").read_text()[::-1], "another text")):
        (finished / "words.txt").write_text(text)
        one_line_error(call("train.py", *TINY, "--max_iters=200", cwd=finished), words)
        assert of_run(finished) == {k: v for k, v in before.items() if k.startswith("run") and k.endswith(".pt")}
    torch.save(load(finished / "run" / "best.pt"), finished / "run" / "ckpt.pt")
    one_line_error(call("train.py", *TINY, cwd=finished), "holds a model but no optimizer")


# released weights

def test_training_begins_with_weights_and_goes_on_from_its_checkpoint(work, call):
    model = lively(d_model=16)      # of 70 tokens; the data has 10
    model.save_pretrained(work / "weights")
    write(work / "weights", of_letters(model, "\n abcdefgh"))
    flags = [flag for flag in TINY if not re.search("d_model|n_layer", flag)] + ["--lr_decay_iters=8", "--init_from=weights"]
    result = succeeded(call("train.py", *flags, "--max_iters=4", cwd=work))
    assert "weights of weights, whose vocabulary is 70; the data has a char tokenizer of 10" in result.stdout
    model.config.vocab_size = 10    # the others are never predicted
    val = prepare_data.load_data(*(work / "data").glob("words*")).val
    expected = train.evaluate(model, val, 4, 64, "float32", None, most=3)
    assert float(losses(work)[1][3]) == pytest.approx(expected, rel=1e-5)
    config = load(work / "run" / "ckpt.pt")["model_config"]
    assert (config["d_model"], config["n_layer"], config["vocab_size"], config["dropout"]) == (16, 3, 10, 0.1)
    before = tree(work)
    one_line_error(call("train.py", *flags, "--init_from=other/weights", cwd=work), "not --init_from=other/weights")
    one_line_error(call("train.py", *flags, "--d_model=32", cwd=work), "holds a run with --d_model=16, not --d_model=32")
    assert tree(work) == before
    shutil.rmtree(work / "weights")
    again = succeeded(call("train.py", *flags, "--init_from=./weights/", "--max_iters=8", cwd=work)).stdout
    assert "going on from step 4 of 8" in again and "weights of" not in again
    text = runs.load_model(load(work / "run" / "best.pt")).generate([[0]], 50)[0]
    assert text.max() < 10


def of_letters(model, chars):
    """The files of released weights with a tokenizer of these characters."""
    import mamba_export
    files = mamba_export.tokenizer_files(CharTokenizer(chars).to_dict(), model.config.vocab_size)
    return {**released(model), **{name: text.encode() for name, text in files.items()}}


FINE = [flag for flag in TINY if not re.search("d_model|n_layer|dataset|out_dir|init_from|max_iters", flag)]


def val_loss(folder, run, step=0):
    return next(row[3] for row in losses(folder, run)[1:] if row[0] == str(step) and row[3])


def test_fine_tuning_a_run(finished, call):
    """It begins with the best weights of a run, or those of one file of it, or a folder that it was written into; the new text
    is prepared with its alphabet, and what is not in that is said."""
    (finished / "new.txt").write_text((finished / "words.txt").read_text()[::-1].replace("a", "A", 7) + "zz\n")
    best = load(finished / "run" / "best.pt")
    succeeded(call("sample.py", "--out_dir=run", "--export=w", cwd=finished))
    seen = set()
    for name in ("run", "run/best.pt", "w"):
        out = f"new-{len(seen)}-{name.replace('/', '-')}"
        flags = [*FINE, "--dataset=new.txt", f"--out_dir={out}", f"--init_from={name}"]
        said = succeeded(call("train.py", *flags, "--max_iters=2", cwd=finished)).stdout
        assert f"weights of {name}, whose vocabulary is 10; the data has a char tokenizer of 10" in said
        assert not seen or "not in it" not in said      # it is prepared once
        assert seen or re.search(r"not in it: 'A' \(7\), 'z' \(2\)", said)
        kept = load(finished / out / "ckpt.pt")
        assert kept["meta"]["tokenizer"] == best["meta"]["tokenizer"]
        seen.add(val_loss(finished, out))
        assert "going on from step 2 of 3" in succeeded(call("train.py", *flags, "--max_iters=3", cwd=finished)).stdout
    model = runs.load_model(best, dropout=0.1)
    val = prepare_data.load_data(*(finished / "data").glob("new*")).val
    expected = train.evaluate(model, val, 4, 64, "float32", None, most=3)
    assert len(seen) == 1 and float(seen.pop()) == pytest.approx(expected, rel=1e-5)


def test_weights_of_other_tokens(finished, call):
    """Refused, as long as their embedding is not learned anew: letters would be taken for others."""
    (finished / "new.txt").write_text((finished / "words.txt").read_text().upper() * 2)
    best = load(finished / "run" / "best.pt")
    Mamba.from_pretrained(finished / "run").save_pretrained(finished / "w")
    for file in (finished / "w").glob("*token*"):
        file.unlink()
    flags = [*FINE, "--dataset=new.txt", "--out_dir=new", "--max_iters=2", "--learning_rate=0"]
    before = tree(finished)
    one_line_error(call("train.py", *flags, "--init_from=w", cwd=finished), "w has no tokenizer.json", "--new_vocabulary")
    one_line_error(call("train.py", *flags, "--new_vocabulary", cwd=finished), "--new_vocabulary goes with weights")
    assert tree(finished) == before
    for name in ("w", "run"):
        out = ["--init_from=" + name, f"--out_dir=new-{name}", "--new_vocabulary"]
        said = succeeded(call("train.py", *flags, *out, cwd=finished)).stdout
        assert "the data has a char tokenizer of 10, whose embedding is learned anew" in said
        made = load(finished / f"new-{name}" / "ckpt.pt")
        assert made["meta"]["tokenizer"]["chars"] == "\n ABCDEFGH" and made["model_config"]["vocab_size"] == 10
        kept = [key for key in made["model"] if torch.equal(made["model"][key], best["model"][key])]
        assert made["model"].keys() - kept == {"backbone.embedding.weight", "lm_head.weight"}
        assert 0.01 < made["model"]["lm_head.weight"].std() < 0.03
        assert len(made["model"]["lm_head.weight"]) == 16      # not padded as the other vocabulary was
        assert "going on from step 2 of 3" in succeeded(call("train.py", *flags, *out, "--max_iters=3", cwd=finished)).stdout
        one_line_error(call("train.py", *flags, *out[:2], "--new_vocabulary=False", cwd=finished), "not --new_vocabulary=False")


def test_the_tokens_of_weights_and_data_are_compared(monkeypatch):
    """By their ids, whatever kinds of tokenizer they come from: what the data has must be the same in the weights."""
    abc, more = CharTokenizer("abc"), CharTokenizer("abcd")
    words = BPETokenizer(json.dumps(mamba.files.of_characters("abc")))
    bpe = BPETokenizer.train(["abc"], 257)
    for theirs, ours, fits in ((abc, abc, True), (more, abc, True), (words, abc, True), (abc, words, True), (bpe, bpe, True),
                               (abc, more, False), (abc, CharTokenizer("acb"), False), (abc, bpe, False),
                               (bpe, abc, False), (bpe, BPETokenizer.train(["aabaab"], 258), False)):
        model = small(vocab_size=300)
        data = SimpleNamespace(folder="data/x", tokenizer=ours, meta={"tokenizer": ours.to_dict()})
        if fits:
            runs.fit_vocabulary(model, theirs, data, SimpleNamespace(init_from="w"))
            assert model(tokens(1, 3, vocab=3))[0].shape == (1, 3, ours.vocab_size)
        else:
            with pytest.raises(common.Problem, match="data/x has other tokens than w .* for one.*--new_vocabulary"):
                runs.fit_vocabulary(model, theirs, data, SimpleNamespace(init_from="w"))


def test_training_begins_with_weights_by_name(work, call, hub):
    model = lively(d_model=16)
    hub.offer(released(model))
    hub.offer({"tokenizer.json": of_letters(model, "\n abcdefgh")["tokenizer.json"]}, "EleutherAI/gpt-neox-20b")
    flags = [flag for flag in TINY if not re.search("d_model|n_layer", flag)] + [f"--init_from={NAME}", "--max_iters=1"]
    result = succeeded(call("train.py", *flags, "--cache_dir=here", cwd=work))
    assert f"weights of {NAME}, whose vocabulary is 70" in result.stdout
    assert list((work / "here").rglob("pytorch_model.bin")) and not (work / "hub").exists()


@pytest.mark.parametrize("flags, words", [
    (["--init_from=weights", "--d_model=64"], ["--d_model cannot be chosen: the weights of weights have a shape"]),
    (["--init_from=weights"], ["weights has no tokenizer.json", "vocabulary of 70", "--new_vocabulary"]),
    (["--init_from=lettered"], ["--init_from=lettered: the tokenizer of lettered has 100 tokens, and the weights know 70"]),
    (["--init_from=weights", "--dropout=2"], ["--dropout takes"]),
    (["--init_from=broken"], ["--init_from=broken: broken", "config.json", "rms_norm is False"]),
    (["--init_from=state-spaces/none"], ["state-spaces/none"]),
    (["--init_from=someone/broken"], ["--init_from=someone/broken", "config.json", "rms_norm is False"]),
])
def test_bad_weights_to_train_from(tmp_path, call, hub, flags, words):
    small().save_pretrained(tmp_path / "weights")
    broken = {**released(small()), "config.json": b'{"rms_norm": false}'}
    write(tmp_path / "broken", broken)
    hub.offer(broken, "someone/broken")
    write(tmp_path / "lettered", {**of_letters(small(vocab_size=100), "".join(map(chr, range(100)))), **released(small())})
    (tmp_path / "good.txt").write_text("some words to learn from\n" * 400)
    one_line_error(call("train.py", "--dataset=good.txt", "--device=cpu", *flags, cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "data").exists() or "--init_from=weights" in flags


# what a sequence begins with, and what is kept of it: --reset_at_eot, --carry_state, --checkpointing; --eval_only

@pytest.mark.parametrize("length", [30, 10, 7])
@OF_EACH_LAYER
def test_the_state_is_reset_at_the_end_of_a_text(length):
    """The losses are those of the texts one by one; in parts with a state too, of which one ends where its text does."""
    model, idx, eot = lively(), tokens(3, 31, vocab=69), 69
    idx[1, [9, 19, 29]] = idx[2, [0, 1, 15]] = eot
    x, y = idx[:, :-1], idx[:, 1:]
    texts = [text[None] for row in x for text in row.tensor_split((row == eot).nonzero()[:, 0] + 1) if len(text) > 0]
    assert len(texts) == 1 + 3 + 4
    expected = F.cross_entropy(torch.cat([model(text)[0][0] for text in texts]), y.flatten())
    state, total = model.init_state(3), 0
    for x_part, y_part in zip(x.split(length, 1), y.split(length, 1)):
        loss, state = train.loss_of(model, x_part, y_part, "float32", eot, state)
        assert [*map(type, state)] == [*map(type, model.init_state(3))]
        total += loss * x_part.numel()
    assert relative(total / x.numel(), expected) < 1e-5
    assert relative(train.loss_of(model, x, y, "float32", eot)[0], expected) < 1e-5
    assert relative(train.loss_of(model, x, y, "float32", None)[0], expected) > 1e-4


def test_reset_at_eot(work, call):
    """By default where the tokenizer has an end-of-text token; a run from before there was this flag goes on without."""
    texts = [words.encode() for words in re.findall(r"(?s).{1500}", (work / "words.txt").read_text())]
    write(work / "texts", {f"{i}.txt": text for i, text in enumerate(texts)})
    succeeded(call("prepare_data.py", "--dataset=texts", "--tokenizer=bpe", "--vocab_size=300", cwd=work))
    flags = [*TINY, "--max_iters=2", "--log_interval=1"]
    resets = {}
    for name, more in (("usual", []), ("asked", ["--reset_at_eot"]), ("never", ["--reset_at_eot=False"])):
        succeeded(call("train.py", *flags, "--dataset=texts-bpe", f"--out_dir={name}", *more, cwd=work))
        resets[name] = load(work / name / "ckpt.pt")["config"]["reset_at_eot"]
    assert resets == {"usual": True, "asked": True, "never": False}
    assert losses(work, "usual") == losses(work, "asked") != losses(work, "never")
    one_line_error(call("train.py", *flags, "--reset_at_eot", cwd=work), "--reset_at_eot needs a token that ends a text")
    assert not (work / "run").exists()
    old = {"optimizer": {}, "config": {"max_iters": 3}}
    assert runs.go_on_as({}, old, Path("run"), train.Config).reset_at_eot is False


@pytest.mark.parametrize("length", [1, 99])
def test_a_token_that_never_occurs_costs_nothing(tmp_path, length):
    tokenizer = SimpleNamespace(end_of_text=7)
    zeros, ones, with_one = (stored(tmp_path, t.astype(np.uint16)) for t in (np.zeros(length), np.ones(3), np.arange(length + 7)))
    for train_part, val_part, token in ((zeros, ones, None), (with_one, ones, 7), (ones, with_one, 7)):
        cfg = train.Config()
        assert runs.end_of_text(cfg, SimpleNamespace(tokenizer=tokenizer, train=train_part, val=val_part)) == token
        assert cfg.reset_at_eot is True


CARRY = ("--carry_state", "--bptt=2", "--gradient_accumulation_steps=2", "--block_size=16")


def test_rows_walk_through_the_text(tmp_path):
    data = stored(tmp_path, np.arange(100, dtype=np.uint16))
    cfg = train.Config(batch_size=4, block_size=6, carry_state=True, bptt=2, gradient_accumulation_steps=3)
    batch = lambda step, micro, rank=0, world=1: train.get_batch(data, cfg, step, micro, rank, world, torch.device("cpu"))
    x, y = (torch.cat(parts, 1) for parts in zip(*(batch(step, micro) for step in range(4) for micro in range(3))))
    assert torch.equal(x, (torch.tensor([[0], [25], [50], [75]]) + torch.arange(144)) % 100) and torch.equal(y, (x + 1) % 100)
    assert torch.equal(batch(2, 1, 1, 2)[0], batch(2, 1)[0][1::2])


def test_the_state_is_carried_on(work, call):
    """With weights that stay as they are, the loss of each step is that of its piece of a text which is read in one go."""
    flags = [*TINY, *CARRY, "--dropout=0", "--learning_rate=0", "--max_iters=6", "--eval_interval=4"]
    succeeded(call("train.py", *flags, cwd=work))
    model, text = runs.load_model(load(work / "run" / "ckpt.pt")), np.fromfile(work / "data/words/train.bin", np.uint16)
    places = np.arange(4)[:, None] * len(text) // 4 + np.arange(6 * 64 + 1)
    idx = torch.from_numpy(text[places].astype(np.int64))
    with torch.no_grad():
        logits, _, state = model(idx[:, :-1], state=model.init_state(4))
    expected = F.cross_entropy(logits.transpose(1, 2), idx[:, 1:], reduction="none").unflatten(1, (6, 64)).mean((0, 2))
    got = [float(row[2]) for row in losses(work)[1:] if not row[3]]
    assert got == pytest.approx(expected.tolist(), rel=1e-5) and int(losses(work)[-1][1]) == 6 * 64 * 4
    assert same([tuple(layer) for layer in state], load(work / "run" / "ckpt.pt")["carried"], 1e-4)


def test_gradients_go_back_over_the_pieces_of_a_step():
    """And not beyond: the state before is a constant."""
    model, idx = lively(), tokens(2, 21)
    cfg = train.Config(block_size=10, bptt=2, carry_state=True)
    with torch.no_grad():
        before = model(tokens(2, 5, seed=1), state=model.init_state(2))[2]
    pieces, state, loss = [slice(0, 10), slice(10, 20)], before, 0
    for piece in pieces:
        _, piece_loss, state = model(idx[:, :-1][:, piece], idx[:, 1:][:, piece], state=state)
        loss = loss + piece_loss / 2
    expected = torch.autograd.grad(loss, list(model.parameters()))
    carried = [MambaState(*(t.clone() for t in layer)) for layer in before]
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    first, = train.gradients_by(model, optimizer, scaler, cfg, "float32", None, carried)
    assert relative(first(idx[:, :-1], idx[:, 1:]), loss) < 1e-6
    assert all(relative(p.grad, gradient) < 1e-4 for p, gradient in zip(model.parameters(), expected))
    assert same(carried, state, 1e-5) and not any(t.requires_grad for t in tree_leaves(carried))


def test_a_carried_state_is_resumed_exactly(work, call, monkeypatch):
    flags = [*TINY, *CARRY, "--max_iters=12", "--eval_interval=5"]
    succeeded(call("train.py", *flags, "--out_dir=whole", cwd=work))
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert call("train.py", *flags, cwd=work).returncode == 130
    assert "going on from step 7 of 12" in succeeded(call("train.py", *flags, cwd=work)).stdout
    assert losses(work) == losses(work, "whole")
    parts, whole = (load(work / name / "ckpt.pt") for name in ("run", "whole"))
    assert same(parts["model"], whole["model"]) and same(parts["carried"], whole["carried"])
    # other rows are at other places of the text, and begin anew
    succeeded(call("train.py", *flags, "--max_iters=13", "--batch_size=2", cwd=work))
    assert load(work / "run" / "ckpt.pt")["carried"][0][1].shape[0] == 2
    one_line_error(call("train.py", *TINY, "--bptt=2", "--out_dir=new", cwd=work), "--bptt goes with --carry_state")


def test_checkpointing_takes_less_memory_for_the_same_bits(work, call):
    flags = [*TINY, "--n_layer=8", "--batch_size=8", "--max_iters=2", "--eval_iters=1", "--sample_tokens=0", "--carry_state"]
    most = {}
    for name, more in (("usual", []), ("less", ["--checkpointing"])):
        with Recorder() as recorded:
            succeeded(call("train.py", *flags, f"--out_dir={name}", *more, cwd=work))
        most[name] = recorded.most_bytes
    assert losses(work, "less") == losses(work, "usual") and most["less"] < most["usual"] / 2, most
    less, usual = (load(work / name / "ckpt.pt")["model"] for name in ("less", "usual"))
    assert same(less, usual)


def test_eval_only_reads_the_whole_validation_text(finished, call):
    lines = succeeded(call("train.py", *TINY, "--eval_only", cwd=finished)).stdout.splitlines()
    model, meta = runs.load_model(load(finished / "run" / "ckpt.pt")).eval(), opened(finished / "data" / "words")[0]
    text = np.fromfile(finished / "data" / "words" / "val.bin", np.uint16)
    ids = torch.from_numpy(text.astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:]).item()
    bits = expected / math.log(2) * len(text) / meta["val_bytes"]
    assert lines[-1] == f"the whole validation text, read once: {expected:.4f} nats per token, {bits:.3f} bits per byte"
    most = []
    for length in (300, 1200):
        with Recorder() as recorded:
            train.evaluate(model, stored(finished, text[:length]), 1, 100, "float32", None)
        most.append(recorded.most_bytes)
    assert most[0] == most[1]
    assert train.evaluate(model, stored(finished, text), 1, 333, "float32", None) == pytest.approx(expected, rel=1e-5)


def test_dropout_is_for_how_often_a_text_is_seen(work, call):
    cfg = train.Config(batch_size=10, block_size=20, bptt=2, gradient_accumulation_steps=5, max_iters=100)
    usual = {tokens: runs.usual_dropout(cfg, tokens) for tokens in (10 ** 9, 10 ** 5, 50_000, 30_000, 1000)}
    assert usual == {10 ** 9: (0, 0.0002), 10 ** 5: (0, 2), 50_000: (0.1, 4), 30_000: (0.23, 200 / 30), 1000: (0.35, 200)}
    flags = [flag for flag in TINY if "dropout" not in flag]
    for more, dropout in (([], 0.05), (["--dropout=0.2"], 0.2)):
        output = succeeded(call("train.py", *flags, "--batch_size=64", *more, f"--out_dir={dropout}", "--max_iters=2", "--eval_iters=1", "--block_size=512", cwd=work)).stdout
        assert re.search(rf"2 steps, which see the text \d+\.\d times; dropout {dropout}; into {dropout}\n", output)
        assert load(work / str(dropout) / "ckpt.pt")["model_config"]["dropout"] == load(work / str(dropout) / "ckpt.pt")["config"]["dropout"] == dropout


@pytest.mark.parametrize("rows, part, most", [(3, 50, math.inf), (3, 50, 2), (1000, 64, math.inf), (2, 10 ** 6, 1)])
def test_evaluation_reads_rows_with_their_state(finished, rows, part, most):
    """As many as were asked for if each has a part, and of each as many parts as were asked for."""
    model = runs.load_model(load(finished / "run" / "ckpt.pt"))
    text = np.fromfile(finished / "data" / "words" / "val.bin", np.uint16)[:700]
    rows_read = max(1, min(rows, 699 // part))
    length = 699 // rows_read
    read = min(length, most * part)
    ids = torch.from_numpy(text.astype(np.int64))
    x = torch.stack([ids[i * length:i * length + read] for i in range(rows_read)])
    y = torch.stack([ids[i * length + 1:i * length + read + 1] for i in range(rows_read)])
    with torch.no_grad():
        expected = model.eval()(x, y)[1].item()
    assert train.evaluate(model.train(), stored(finished, text), rows, part, "float32", None, most) == pytest.approx(expected, rel=1e-5)
    assert model.training and train.evaluate(model, stored(finished, text), rows, part, "float32", None, stop=True) is None


def test_a_loss_in_bits_is_for_a_byte():
    meta = {"val_tokens": 30, "val_bytes": 90}
    assert runs.in_words(3 * math.log(2), meta) == "2.0794 nats per token, 1.000 bits per byte"


# sooner: the compiler, CUDA graphs, several processes

@WITHOUT_COMPILER
@fast
def test_training_compiled(work, call):
    """The same run but for rounding; and where it was stopped and went on, the same bits, dropout included."""
    def train_it(*more):
        result = succeeded(call("train.py", *TINY, "--lr_decay_iters=150", *more, cwd=work))
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


@pytest.mark.parametrize("changes, device, compiled", [
    ({"max_iters": 5000}, "cpu", False), ({"max_iters": 4999}, "cuda", False), ({"max_iters": 5000}, "cuda", True),
    ({"max_iters": 5000, "eval_only": True}, "cuda", False), ({"max_iters": 5000, "compile": False}, "cuda", False),
    ({"max_iters": 5000, "fsdp": True}, "cuda", False), ({"max_iters": 5000, "layer": "mamba3"}, "cuda", mamba.fast is None),
    ({"compile": True}, "cpu", True), ({"max_iters": 5000}, "mps", False)])
def test_a_run_is_compiled_where_it_pays(changes, device, compiled):
    cfg = train.Config(**changes)
    runs.fill_in(cfg, torch.device(device), pretrained=False)
    assert common.pick_compile(cfg, torch.device(device)) == compiled


def test_compiled_for_a_gpu_layer_by_layer(monkeypatch):
    """A twin with the very parameters of the model, to which the gradients come; the model itself stays as it was."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(Mamba, "device", torch.device("cuda"))
    model = small(n_layer=3, dropout=0.1)
    twin = common.compiled(model)
    assert compiled == [*twin.backbone["layers"]] and not set(compiled) & set(model.modules())
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert twin.lm_head.weight is twin.backbone["embedding"].weight


@pytest.mark.parametrize("device", train.PRESETS)
def test_without_mamba_fast_a_cpu_does_not_compile_by_default(monkeypatch, device):
    monkeypatch.setattr(mamba, "fast", None)
    cfg = train.Config(max_iters=5000)
    runs.fill_in(cfg, torch.device(device), pretrained=False)
    assert common.pick_compile(cfg, torch.device(device)) == (device == "cuda")


@fast
def test_without_cuda_graphs_one_line_says_so(work, call, monkeypatch):
    def replayed(calls, x, y):
        calls[0](x, y)
        raise RuntimeError("operation not permitted")
    flags = [*TINY, "--max_iters=3"]
    succeeded(call("train.py", *flags, "--out_dir=usual", cwd=work))
    monkeypatch.setattr(mamba.fast, "replayed", replayed)
    monkeypatch.setattr(common, "pick_scan", lambda *settings: "triton")
    output = succeeded(call("train.py", *flags, "--out_dir=eager", cwd=work)).stdout
    assert "a CUDA graph does not work here (RuntimeError); going on without it\n" in output
    eager, usual = (load(work / name / "ckpt.pt")["model"] for name in ("eager", "usual"))
    assert all(torch.equal(eager[k], usual[k]) for k in usual)


def together(*flags, cwd):
    """
    train.py as the two processes that `torchrun --nproc_per_node=2` starts, or that two machines start if cwd are two folders:
    (what they say, their exit statuses).
    """
    folders = cwd if isinstance(cwd, list) else [cwd, cwd]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in "01":
        env = environment(RANK=rank, LOCAL_RANK="0" if folders is cwd else rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        processes.append(start(ROOT / "train.py", *flags, cwd=folders[int(rank)], env=env, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return "".join(said), [process.returncode for process in processes]


@ON_POSIX
def test_two_processes_train_as_one(work, call):
    """
    With gloo: data that one process finds bad ends all of them; Ctrl-C reaches all, and one saves and says how to go on;
    that goes on exactly, with the losses of one process that has the same batches.
    """
    (work / "short.txt").write_text("only a few characters\n" * 5)
    flags = [flag for flag in TINY if not flag.startswith("--dropout")]
    flags += ["--dropout=0", "--gradient_accumulation_steps=2", "--max_iters=24"]
    output, statuses = together(*flags, "--dataset=short.txt", cwd=work)
    assert statuses == [2, 2] and len(re.findall("^train.py: ", output, re.MULTILINE)) == 1 and "[rank" not in output, output
    assert "too few for --block_size=64" in output and not (work / "run").exists()

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = hold(work, STEP, 12, "train.py", *flags, launcher=torchrun, stderr=subprocess.STDOUT)
    assert "held\n" in iter(process.stdout.readline, "")    # the other process too
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=PATIENCE)[0]
    assert output.count("the same command goes on from there") == 1 and "[rank" not in output, output
    assert load(work / "run" / "ckpt.pt")["step"] == steps_done(work) == 12

    output, statuses = together(*flags, cwd=work)
    assert statuses == [0, 0] and output.count("going on from step 12 of 24") == 1, output
    succeeded(call("train.py", *flags, "--out_dir=one", cwd=work))
    got, expected = ({int(r[0]): float(r[2]) for r in losses(work, name)[1:] if not r[3]} for name in ("run", "one"))
    assert got.keys() == expected.keys() == set(range(1, 25))
    assert all(abs(got[step] - expected[step]) < 1e-4 for step in got)


@ON_POSIX
def test_two_processes_share_a_model(work, call):
    """--fsdp: the losses and weights of one process, which can go on with what the two have saved."""
    flags = [flag for flag in TINY if not flag.startswith("--dropout")]
    flags += ["--n_layer=9", "--sample_tokens=1", "--dropout=0", "--lr_decay_iters=9", "--checkpointing"]     # so many that they are shared in twos
    for steps in (3, 6):
        output, statuses = together(*flags, f"--max_iters={steps}", "--fsdp", cwd=work)
        assert statuses == [0, 0] and "[rank" not in output and "Warning" not in output, output
    one_line_error(call("train.py", *flags, "--max_iters=9", cwd=work), "--fsdp", "several processes")
    succeeded(call("train.py", *flags, "--max_iters=9", "--fsdp=False", cwd=work))
    succeeded(call("train.py", *flags, "--max_iters=9", "--out_dir=one", cwd=work))
    got, expected = ({int(r[0]): float(r[2]) for r in losses(work, name)[1:] if not r[3]} for name in ("run", "one"))
    assert got == pytest.approx(expected, abs=1e-4) and len(got) == 9
    got, expected = (load(work / name / "ckpt.pt") for name in ("run", "one"))
    assert same([got["model"], got["optimizer"]["state"]], [expected["model"], expected["optimizer"]["state"]], 1e-3)
    assert got["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()


@ON_POSIX
def test_two_machines_without_a_shared_disk(finished, work):
    """Each prepares the text; where the run goes on, the first one says; another text is an error."""
    machines = [finished, work]
    output, statuses = together(*TINY, "--max_iters=152", cwd=machines)
    assert statuses == [0, 0] and output.count("going on from step 150 of 152") == 1, output
    assert (work / "data" / "words" / "meta.json").exists() and not (work / "run").exists()
    assert load(finished / "run" / "ckpt.pt")["step"] == steps_done(finished) == 152
    (work / "words.txt").write_text((work / "words.txt").read_text()[::-1])
    output, statuses = together(*TINY, "--max_iters=153", cwd=machines)
    assert statuses == [2, 2] and "data/words of this machine has another text than that of the first one" in output, output


@ON_POSIX
def test_two_processes_carry_a_state_as_one(work, call):
    """Each that of its own rows; one process can go on with what two have saved."""
    flags = [*TINY, *CARRY, "--dropout=0", "--lr_decay_iters=12", "--eval_interval=4", "--reset_at_eot=False"]
    output, statuses = together(*flags, "--max_iters=8", cwd=work)
    assert statuses == [0, 0] and "[rank" not in output, output
    assert "going on from step 8 of 12" in succeeded(call("train.py", *flags, "--max_iters=12", cwd=work)).stdout
    succeeded(call("train.py", *flags, "--max_iters=12", "--out_dir=one", cwd=work))
    got, expected = ([float(row[2]) for row in losses(work, name)[1:] if not row[3]] for name in ("run", "one"))
    assert len(got) == 12 and got == pytest.approx(expected, abs=1e-4)
    got, expected = (load(work / name / "ckpt.pt")["carried"] for name in ("run", "one"))
    swapped = [[t[[1, 0, 3, 2]] for t in layer] for layer in expected]     # the rows of the one process for those of the other
    assert same(got, expected, 1e-3) and not same(got, swapped, 1e-1)


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def best_of(folder):
    """(model, tokenizer) of the best checkpoint of a run."""
    best = load(folder / "best.pt")
    return runs.load_model(best).eval(), load_tokenizer(best["meta"]["tokenizer"])


def test_sample(finished, call):
    """It needs the checkpoint alone: the data folder is gone. The newest run is found; a seed gives the same text."""
    (finished / "out").mkdir()
    shutil.move(finished / "run", finished / "out" / "run")
    shutil.rmtree(finished / "data")
    (finished / "prompt.txt").write_bytes("\ufeffabc ".encode())        # some editors put a mark in front
    flags = ["--max_new_tokens=40", "--device=cpu", "--seed=7"]
    results = [succeeded(call("sample.py", *flags, f"--start={start}", cwd=finished))
               for start in ("abc ", "FILE:prompt.txt", "abc ")]
    assert len({result.stdout for result in results}) == 1 and results[0].stdout.startswith("abc ")
    assert len(results[0].stdout) == len("abc ") + 40 + 1
    assert "40 tokens in" in results[0].stderr and "tokens/s" in results[0].stderr
    model, tokenizer = best_of(finished / "out" / "run")
    result = succeeded(call("sample.py", *flags, "--start=abc ", "--temperature=0", cwd=finished))
    expected = model.generate([tokenizer.encode("abc ")], 40, temperature=0)[0].tolist()
    assert result.stdout == tokenizer.decode(expected) + "\n"
    result = succeeded(call("sample.py", "--num_samples=2", "--max_new_tokens=10", "--top_k=3", "--top_p=0.9", cwd=finished))
    assert result.stdout.count("---------------") == 2
    os.unlink(finished / "out" / "run" / "best.pt")
    assert "step 150" in succeeded(call("sample.py", *flags, cwd=finished)).stderr


@pytest.mark.parametrize("flags, words", [
    (["--start=abcZ"], ["character 'Z' is not in this model's vocabulary (10 characters)"]),
    (["--start=FILE:missing"], ["missing"]),
    (["--start=FILE:latin.txt"], ["not UTF-8"]),
    (["--out_dir=nowhere"], ["no checkpoint at nowhere", "train.py"]),
    (["--out_dir=run/best.pt"], ["takes the folder of a run, run, not a file"]),
    ([], ["there is no model under out/"]),
    (["--temperature=-1"], ["temperature"]),
    (["--top_k=0"], ["top_k"]),
    (["--min_p=2"], ["min_p"]),
    (["--repetition_penalty=0"], ["repetition_penalty"]),
    (["--num_samples=0"], ["--num_samples"]),
    (["--scan=fast"], ["--scan takes", "'fast'"]),
    (["--quantize=int4"], ["--quantize takes int8, not 'int4'"]),
    (["--seed=-1"], ["--seed takes a whole number from 0 on"]),
    (["--device=cuda"], ["--device=cpu"]),
    (["--stat=x"], ["did you mean --start?"]),
    (["--show=gamma", "--start=abc"], ["--show takes delta or loss or attention, not 'gamma'"]),
    (["--show=loss"], ["give it as --start"]),
    (["--show=loss", "--start=abc", "--interactive"], ["without --interactive"]),
    (["--show=loss", "--start=abc", "--layer=1"], ["--layer with --show=delta"]),
    (["--show=loss", "--start=abc", "--channel=1"], ["--channel and --layer with --show=delta or attention"]),
    (["--show=attention", "--start=abc", "--channel=9999"], ["--channel must be from 0 to", "not 9999"]),
    (["--show=attention", "--start=abc", "--layer=-1"], ["--layer must be from 0 to 1, not -1"]),
    (["--show=attention", "--start=FILE:empty.txt"], ["empty"]),
    (["--show=attention", f"--start={'abc' * 1366}"], ["takes 4,096 tokens", "has 4,098"]),
    (["--show=attention", f"--start={'abc' * 25}", "--html=x.svg"], ["a picture of it 72", "has 75"]),
    (["--html=x.html", "--start=abc"], ["--html goes with --show"]),
    (["--show=delta", "--start=abc", "--layer=2"], ["--layer must be from 0 to 1, not 2"]),
    (["--show=delta", "--start=FILE:empty.txt"], ["empty"]),
    (["--show=delta", "--start=abc", "--html=no/where.html"], ["--html takes a file in a folder that there is, not 'no/where"]),
    (["--show=delta", "--start=abc", "--html=."], ["--html takes a file"]),
    (["--show=delta", "--start=abc", f"--html={os.devnull}"], ["--html takes a file"]),
    (["--export=x", "--format=gguf"], ["--format takes mamba_ssm or transformers or onnx, not 'gguf'"]),
    (["--format=onnx"], ["--format goes with --export"]),
    pytest.param(["--export=x", "--quantize=int8"], ["--export has no int8 weights"], marks=pytest.mark.fast),
    (["--export=x", "--start=abc"], ["--export writes no text"]),
    (["--export=run"], ["--export takes a new or an empty folder, not 'run'"]),
    (["--export=words.txt"], ["--export takes a new or an empty folder, not 'words.txt'"]),
])
def test_bad_input_to_sample(finished, call, flags, words):
    (finished / "latin.txt").write_bytes(BAD_TEXTS["latin.txt"])
    (finished / "empty.txt").touch()
    before = tree(finished)
    where = [] if not flags or "--out_dir" in flags[0] else ["--out_dir=run"]
    one_line_error(call("sample.py", *where, *flags, cwd=finished), *words)
    assert tree(finished) == before


def test_sample_stops_at_a_string(finished, call):
    flags = ["--out_dir=run", "--start=abc ", "--temperature=0", "--max_new_tokens=60", "--device=cpu", "--seed=1"]
    text = succeeded(call("sample.py", *flags, cwd=finished)).stdout.rstrip("\n")[4:]
    result = succeeded(call("sample.py", *flags, f"--stop=##|{text[7:10]}", cwd=finished))
    end = text.index(text[7:10])
    assert result.stdout == f"abc {text[:end]}\n" and f"\n{end + 3} tokens in" in result.stderr


@fast
def test_sample_with_int8(finished, call):
    flags = ["--out_dir=run", "--device=cpu", "--start=abc", "--max_new_tokens=20", "--temperature=0"]
    for more in (["--quantize=int8"], ["--quantize=int8", "--show=delta"], []):
        result = succeeded(call("sample.py", *flags, *more, cwd=finished))
        assert ("int8 weights" in result.stderr) == ("--quantize=int8" in more)
        if "--show=delta" in more:
            lines = result.stdout.splitlines()
            assert len(lines) == 3 and all(float(line.split()[0]) > 0 for line in lines)
        else:
            assert result.stdout.startswith("abc") and len(result.stdout) == 3 + 20 + 1


def test_sample_from_released_weights(tmp_path, hub, monkeypatch, call):
    """With the tokenizer.json beside them, else with GPT-NeoX's; the text alone goes to stdout."""
    tokenizers = [BPETokenizer.train([AWKWARD * i], 300) for i in (1, 2)]
    neox, own = ({"tokenizer.json": tokenizer.to_dict()["json"].encode()} for tokenizer in tokenizers)
    model = lively(vocab_size=300)
    hub.offer(released(model))
    hub.offer(released(model, "hf"), "someone/none")    # a config.json that counts the rows of padding, 304
    hub.offer({**released(model), **own}, "someone/own")
    hub.offer(neox, "EleutherAI/gpt-neox-20b")
    write(tmp_path / "w", {**released(model), **own})
    flags = ["--start=the tab", "--temperature=0", "--max_new_tokens=9", "--device=cpu"]
    for name, tokenizer in ((NAME, tokenizers[0]), ("someone/none", tokenizers[0]), ("someone/own", tokenizers[1]),
                            ("w", tokenizers[1])):
        result = succeeded(call("sample.py", *flags, f"--pretrained={name}", "--cache_dir=c", cwd=tmp_path))
        expected = tokenizer.decode(model.generate([tokenizer.encode("the tab")], 9, temperature=0)[0].tolist())
        assert result.stdout == expected.rstrip("\ufffd") + "\n"
        assert f"{name}: 0.0" in result.stderr and "9 tokens in" in result.stderr
        again, _ = sample.load_pretrained(name, torch.device("cpu"), torch.float32, "auto", "c")
        assert again(tokens(1, 5, vocab=300))[0].shape == (1, 5, 300)
    assert not (tmp_path / "hub").exists()
    asked = len(hub.log)
    set_hub(monkeypatch, offline=True)
    for name, tokenizer in ((NAME, tokenizers[0]), ("someone/none", tokenizers[0]), ("someone/own", tokenizers[1])):
        result = succeeded(call("sample.py", *flags, f"--pretrained={name}", "--cache_dir=c", cwd=tmp_path))
        expected = tokenizer.decode(model.generate([tokenizer.encode("the tab")], 9, temperature=0)[0].tolist())
        assert result.stdout == expected.rstrip("\ufffd") + "\n", name
    assert len(hub.log) == asked
    small().save_pretrained(tmp_path / "w")
    for flags, words in ((["--pretrained=w"], ["tokenizer of w has 300 tokens, and the weights know 70", "put their own tokenizer.json beside them"]),
                         (["--pretrained=w", "--out_dir=x"], ["--out_dir and --pretrained"]),
                         (["--pretrained=w/tokenizer.json"], ["there is no folder w/tokenizer.json"]),
                         (["--pretrained=nothing"], ["there is no folder nothing"]),
                         (["--pretrained=someone/gone"], ["someone/gone"])):
        one_line_error(call("sample.py", *flags, cwd=tmp_path), *words)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(finished, call, value):
    succeeded(call("sample.py", "--out_dir=run", "--export=w", cwd=finished))
    weights = load(finished / "w" / "pytorch_model.bin")
    weights["backbone.layers.1.mixer.D"][3] = value
    torch.save(weights, finished / "w" / "pytorch_model.bin")
    words = "backbone.layers.1.mixer.D of w has values that are not finite numbers"
    one_line_error(call("sample.py", "--pretrained=w", cwd=finished), f"--pretrained=w: {words}")
    flags = [flag for flag in TINY if not re.search("d_model|n_layer|out_dir", flag)]
    one_line_error(call("train.py", *flags, "--out_dir=new", "--init_from=w", cwd=finished), f"--init_from=w: {words}")
    assert not (finished / "new").exists()


def test_a_run_by_its_folder(finished, call):
    """--pretrained takes a run, or a checkpoint of one, with its alphabet."""
    asked = ["--start=abc ", "--temperature=0", "--max_new_tokens=20", "--device=cpu"]
    expected = succeeded(call("sample.py", "--out_dir=run", *asked, cwd=finished)).stdout
    for name in ("run", "run/best.pt"):
        assert succeeded(call("sample.py", f"--pretrained={name}", *asked, cwd=finished)).stdout == expected


@pytest.mark.parametrize("changes", [{"tokenizer": {}}, {"tokenizer": {"type": "char", "chars": "ab"}}, {"tokenizer": 5},
                                     {"tokenizer": {"type": "bpe", "json": "{}"}}, []])
def test_a_checkpoint_with_another_tokenizer(finished, call, changes):
    best = load(finished / "run" / "best.pt")
    for file in (finished / "run").glob("ckpt*.pt"):
        file.unlink()
    meta = {**best["meta"], **changes} if changes else changes
    torch.save({**best, "meta": meta}, finished / "run" / "best.pt")
    one_line_error(call("sample.py", "--out_dir=run", cwd=finished), str(Path("run", "best.pt")), "damaged or not a checkpoint")


def test_what_a_prompt_may_be(finished, call, monkeypatch):
    r"""\n, \t and \\ as in --stop, the home folder, and newlines of every kind."""
    assert sample.text_of(r"a\nb\tc\\nd\x\e") == "a\nb\tc\\nd\\x\\e" and sample.text_of("a\r\nb\rc\n") == "a\nb\nc\n"
    assert sample.stop_strings(r"\d|\\d") == ["\\d", "\\d"]
    monkeypatch.setenv("HOME", str(finished))
    monkeypatch.setenv("USERPROFILE", str(finished))
    (finished / "my prompt.txt").write_bytes(b"a\\nb\r\ncd\rab")
    assert sample.text_of(f"FILE:{finished / 'my prompt.txt'}") == "a\\nb\ncd\nab"     # as it stands there
    (finished / "my prompt.txt").write_bytes(b"ab\r\ncd ")
    flags = ["--out_dir=run", "--temperature=0", "--max_new_tokens=9"]
    results = [succeeded(call("sample.py", *flags, f"--start={start}", cwd=finished)).stdout
               for start in (r"ab\ncd ", "ab\ncd ", "ab\r\ncd ", "FILE:~/my prompt.txt")]
    assert len(set(results)) == 1 and results[0].startswith("ab\ncd ")


def test_special_tokens_that_a_person_types(tmp_path, call, monkeypatch, capsys):
    """They are text, in --start and in a chat; with --allow_special they are tokens."""
    tokenizer, typed = one_token_a_byte(), "a<|endoftext|>b"
    model = lively(vocab_size=257, n_layer=1)
    mamba.files.write(tmp_path / "w", dataclasses.asdict(model.config), model.state_dict(), "mamba_ssm", tokenizer.to_dict())
    flags = ["--pretrained=w", f"--start={typed}", "--temperature=0", "--max_new_tokens=9", "--ignore_eos", "--device=cpu"]
    for special, length in ((False, 15), (True, 3)):
        ids = tokenizer.encode(typed, special)
        assert len(ids) == length and tokenizer.decode(ids) == typed
        result = succeeded(call("sample.py", *flags, *["--allow_special"] * special, cwd=tmp_path))
        expected = tokenizer.decode(model.generate([ids], 9, temperature=0)[0].tolist())
        assert result.stdout == expected.rstrip("\ufffd") + "\n"
        talk, cfg = sample.Conversation(model, tokenizer, []), dataclasses.replace(GREEDY, ignore_eos=True)
        answers, _ = turns(talk, monkeypatch, capsys, f"/set allow_special {special}", typed, cfg=cfg)
        ids = [0, *ids, *tokenizer.encode("\n")]
        expected = tokenizer.decode(model.generate([ids], 20, temperature=0)[0].tolist()[len(ids):])
        assert answers[1] == expected.rstrip("\ufffd") + "\n"


@pytest.mark.fast
def test_the_time_of_compiling_is_apart(finished, call, monkeypatch):
    """It is announced before the silence, and not counted in tokens/s."""
    compiled, clock, stream = [], [0.0], Mamba.stream

    def slow(model, prompts, count, compile=False, **more):
        if compile and not compiled:
            clock[0] += 50
            compiled.append(count)
        return stream(model, prompts, count, **more)
    monkeypatch.setattr(Mamba, "stream", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.append(clock[0]) or clock[0])
    for more in (["--compile"], ["--compile", "--interactive"]):
        compiled.clear()
        said = succeeded(call("sample.py", "--out_dir=run", "--device=cpu", "--max_new_tokens=5", *more, cwd=finished,
                              stdin=b"")).stderr if "--interactive" in more else None
        if said is None:
            monkeypatch.setattr(time, "perf_counter", lambda: clock.__setitem__(0, clock[0] + 0.5) or clock[0])
            said = succeeded(call("sample.py", "--out_dir=run", "--device=cpu", "--max_new_tokens=5", *more, cwd=finished)).stderr
            assert "5 tokens in 0.5 s, 10 tokens/s" in said
        assert "\ncompiling ...\ncompiling took 50" in said and compiled == [1]
    assert "compiling" not in succeeded(call("sample.py", "--out_dir=run", "--max_new_tokens=5", cwd=finished)).stderr


@pytest.mark.parametrize("layout", ["mamba_ssm", "transformers", "onnx"])
def test_export(finished, call, layout):
    """What is in the folder writes the text that the run writes."""
    for needed in {"transformers": ["safetensors"], "onnx": ["onnxscript", "onnxruntime"]}.get(layout, []):
        pytest.importorskip(needed)
    asked = ["--start=abc ", "--temperature=0", "--max_new_tokens=20", "--device=cpu"]
    expected = succeeded(call("sample.py", "--out_dir=run", *asked, cwd=finished)).stdout
    export = ["--out_dir=run", "--export=new/folder", *([] if layout == "mamba_ssm" else [f"--format={layout}"])]
    result, folder = succeeded(call("sample.py", *export, cwd=finished)), finished / "new" / "folder"
    files = sorted(os.listdir(folder))
    assert result.stdout == "" and result.stderr.splitlines()[-1] == f"wrote {', '.join(files)} into {Path('new/folder')}"
    if layout == "onnx":
        words = [folder / "generate.py", "abc ", "20", "0"]
        result = subprocess.run([sys.executable, *words], cwd=finished, capture_output=True, text=True, check=True)
    else:
        assert {"mamba_ssm": "pytorch_model.bin", "transformers": "model.safetensors"}[layout] in files
        result = succeeded(call("sample.py", "--pretrained=new/folder", *asked, cwd=finished))
    assert result.stdout == expected
    before = tree(finished)
    one_line_error(call("sample.py", *export, cwd=finished), "--export takes a new or an empty folder")
    assert tree(finished) == before


def test_what_cannot_be_exported(finished, call, monkeypatch):
    best, (model, _) = load(finished / "run" / "best.pt"), best_of(finished / "run")
    gated = Mamba(dataclasses.replace(model.config, d_intermediate=8))      # which transformers does not have
    torch.save({**best, "model": gated.state_dict(), "model_config": dataclasses.asdict(gated.config)},
               finished / "run" / "best.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    before = tree(finished)
    for flags, words in ((["--export=x", "--format=transformers"], ["--format=transformers: ", "d_intermediate"]),
                         (["--export=x", "--format=onnx"], ["pip install onnxscript"]),
                         (["--export=words.txt/x"], ["words.txt"])):
        one_line_error(call("sample.py", "--out_dir=run", *flags, cwd=finished), *words)
    assert tree(finished) == before and not (finished / "x").exists()


# tokens to text

def test_text_is_never_shown_in_the_middle_of_a_character():
    text = "añ日👩‍👩‍👧 e\u0301 x"
    tokenizer = one_token_a_byte()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    pieces = list(sample.as_text(tokenizer, torch.tensor(ids)[:, None]))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and len(pieces) > len(text)
    cut = list(sample.as_text(tokenizer, torch.tensor(ids[:-5])[:, None]))
    assert "".join(cut) == tokenizer.decode(ids[:-5])
    for end in range(len(ids)):     # an answer ends where it is told to: half a character there is not shown
        shown = "".join(sample.as_text(tokenizer, ids[:end], cut_off=True))
        assert text.startswith(shown) and tokenizer.decode(ids[:end]).rstrip("\ufffd") == shown


def test_invalid_bytes_neither_stall_nor_change_the_text():
    tokenizer, rng = one_token_a_byte(), random.Random(0)
    smile = tokenizer.encode("🙂")
    assert len(smile) == 4 and len(set(smile)) == 4 and tokenizer.decode([0]) == "<|endoftext|>"
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
    tokenizer, text = BPETokenizer(t.to_str()), "a🙂🙂é日b\u2581é🙂a\u2581b"
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


# a text in turns

def test_chat(finished, call):
    """The state goes on from turn to turn: greedy answers are those of the whole conversation read at once."""
    typed = b"abc\nZ\nb\xff\ndef\n/quit\n"       # of which one byte is not UTF-8
    result = succeeded(call("sample.py", "--out_dir=run", "--interactive", "--temperature=0", "--max_new_tokens=12",
                            "--device=cpu", cwd=finished, stdin=typed))
    assert "character 'Z'" in result.stderr and "character '\\udcff'" in result.stderr
    model, tokenizer = best_of(finished / "run")
    history, answers = [0], []
    for line in ("abc\n", "def\n"):
        history = model.generate([history + tokenizer.encode(line)], 12, temperature=0)[0].tolist()
        answers.append(tokenizer.decode(history[-12:]))
    assert result.stdout == f"> {answers[0]}\n> > > {answers[1]}\n> "


@ON_POSIX
def test_ctrl_c_in_a_chat(finished):
    chat = start(ROOT / "sample.py", "--out_dir=run", "--interactive", "--device=cpu", "--max_new_tokens=1000000", cwd=finished,
                 stdin=subprocess.PIPE)
    chat.stdin.write("abc\n")
    chat.stdin.flush()
    assert len(chat.stdout.read(50)) == 50      # in the middle of an answer
    chat.send_signal(signal.SIGINT)
    chat.stdin.write("/set max_new_tokens 7\ndef\n")
    chat.stdin.flush()
    while chat.stdout.read(1) != ">":           # it was stopped
        pass
    chat.stdin.close()
    out, err = chat.stdout.read(), chat.stderr.read()       # communicate() would lose what read(1) has buffered
    assert chat.wait(PATIENCE) == 0 and len(re.search("> (.{7})\n> $", out, re.DOTALL)[1]) == 7 and "Traceback" not in err


def test_a_chat_without_a_keyboard(finished, call):
    """`sample.py <&-`, or a service: Python has no stdin then."""
    result = succeeded(call("sample.py", "--out_dir=run", "--interactive", "--device=cpu", cwd=finished, stdin=None))
    assert result.stdout == "> "


def test_sample_in_a_notebook(finished, monkeypatch, capsys):
    """Its streams have no reconfigure, fileno or buffer."""
    class Stream:
        def __init__(self, lines):
            self.lines, self.text = iter(lines), ""
            self.readline = lambda *_: next(self.lines, "")

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return False
    monkeypatch.chdir(finished)
    for flags, shown in ((["--start=abc"], "abc"), (["--interactive"], "> "), (["--start=abc", "--show=loss"], "'a'")):
        streams = {name: Stream(["ab\n", "/quit\n"]) for name in ("stdin", "stdout", "stderr")}
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            patch.setattr(sys, "argv", ["sample.py", "--out_dir=run", "--device=cpu", "--max_new_tokens=5", *flags])
            common.run(sample.main, sample.Config)
        assert shown in streams["stdout"].text and "run, step" in streams["stderr"].text


LETTERS = "\n abcdefghijklmnopqrstuvwxyz<&>\"'é"


def conversation(prompt="", seed=0, **changes):
    torch.manual_seed(seed)
    tokenizer = CharTokenizer(LETTERS)
    # an untrained model with one table for both would repeat what it has just read
    model = Mamba(MambaConfig(vocab_size=len(LETTERS), d_model=32, n_layer=3, tie_embeddings=False, **changes)).eval()
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


@OF_EACH_LAYER
def test_a_kept_conversation_goes_on_with_the_same_tokens(tmp_path, monkeypatch, capsys):
    file = tmp_path / "our talk.pt"
    settings = dataclasses.replace(GREEDY, repetition_penalty=1.2)
    unsaved, _ = turns(conversation("so"), monkeypatch, capsys, "hello", "and then", "why", cfg=settings)
    first, said = turns(conversation("so"), monkeypatch, capsys, "hello", f"/save {file}", "and now for", "/quit", cfg=settings)
    assert first[0] == unsaved[0] and said == [f"saved {file}"] and len({*unsaved[:3]}) == 3
    then, said = turns(conversation("x"), monkeypatch, capsys, "other", f"/load {file}", "and then", "why", cfg=settings)
    assert then[2:4] == unsaved[1:3] and said == [f"loaded {file}"]
    reset, said = turns(conversation("so"), monkeypatch, capsys, "abc", "/reset", "hello", cfg=settings)
    assert reset[2] == unsaved[0] and said == ["the conversation is forgotten"]
    assert os.listdir(tmp_path) == [file.name]


def test_a_conversation_of_the_version_before(tmp_path, monkeypatch, capsys):
    """A file written here as it was before mamba_fast/ was there: its answer is that of the whole text read at once."""
    talk = conversation()
    model, tokenizer = talk.model, talk.tokenizer
    config = {**OLD_CONFIG, "vocab_size": 34, "d_model": 32, "n_layer": 3, "d_state": 16, "dt_rank": 2, "tie_embeddings": False}
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in config.items() if k not in ("scan", "dropout"))).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    read = tokenizer.encode("hello there")
    with torch.no_grad():
        state = model(torch.tensor([read[:-1]]), state=model.init_state(1))[2]
    state = [(conv.clone(), h.clone()) for conv, h in state]
    assert [tuple(t.shape) for t in state[0]] == [(1, 3, 64), (1, 64, 16)]
    torch.save({"fingerprint": digest.hexdigest(), "state": state, "unread": read[-1:], "seen": sorted({*read[:-1]})},
               tmp_path / "old.pt")
    answers, said = turns(talk, monkeypatch, capsys, f"/load {tmp_path / 'old.pt'}", "why")
    whole = model.generate([read + tokenizer.encode("why\n")], 20, temperature=0)[0].tolist()
    assert said == [f"loaded {tmp_path / 'old.pt'}"] and answers[1] == tokenizer.decode(whole[-20:]) + "\n"


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
    good = load(tmp_path / "good.pt")
    (conv, h), *others = good["state"]
    odd = {"print": {"fingerprint": 5}, "seen": {"seen": 5}, "seen2": {"seen": [len(LETTERS)]},
           "unread": {"unread": [10 ** 6]}, "unread2": {"unread": []}, "unread3": {"unread": [True]}, "unread4": {"unread": [-1]},
           "unread5": {"unread": "ab"}, "unread6": {"unread": [[1], [2]]}, "layers": {"state": []}, "none": {"state": None},
           "one": {"state": [(conv,), *others]}, "three": {"state": [(conv, h, h), *others]},
           "shape": {"state": [(conv, h[:, :5]), *others]}, "dtype": {"state": [(conv, h.int()), *others]},
           "expanded": {"state": [(conv, torch.ones(1).expand(h.shape)), *others]}, "nan": {"state": [(conv, h / 0), *others]},
           "sparse": {"state": [(conv, h.to_sparse()), *others]}, "numbers": {"state": [(1, 2), *others]},
           "endless": {"unread": torch.zeros(1).expand(10 ** 12)}, "endless2": {"state": torch.zeros(1).expand(10 ** 12)},
           "endless3": {"state": [torch.zeros(1).expand(10 ** 12), *others]},
           "meta": {"state": [(conv, h.to("meta")), *others]}}
    for name, changes in odd.items():
        torch.save({**good, **changes}, tmp_path / f"{name}.pt")
    for name, words in (("other.pt", "another model"), ("eps.pt", "another model"), ("16.pt", "another --dtype"),
                        ("cut.pt", "damaged"), ("flipped.pt", "damaged"), ("text.pt", "damaged"), (".", "cannot read"),
                        ("list.pt", "not a conversation"), ("pickle.pt", "not a conversation"), ("gone.pt", "cannot read"),
                        *((f"{name}.pt", "not a conversation") for name in odd)):
        answers, said = turns(conversation(), monkeypatch, capsys, "hello", f"/load {tmp_path / name}", "why")
        assert len(said) == 1 and words in said[0], (name, said)
        assert (answers[0], answers[2]) == (expected[0], expected[1]), name


def test_a_conversation_that_cannot_be_kept(tmp_path, monkeypatch, capsys):
    """A failure while it is written leaves the one that was kept, and the chat goes on."""
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    conversation().save(tmp_path / "good.pt")
    (tmp_path / "text.pt").write_text("hello")
    before = tree(tmp_path)
    monkeypatch.setattr(os, "fsync", fails)
    files = ("good.pt", "no/where.pt", "text.pt/x")
    _, said = turns(conversation(), monkeypatch, capsys, *(f"/save {tmp_path / file}" for file in files), "/save")
    assert ["could not write" in line for line in said] == [True, True, True, False] and "name of a file" in said[3]
    assert tree(tmp_path) == before
    monkeypatch.undo()
    for path in (os.devnull, tmp_path):
        with pytest.raises(common.Problem, match="could not write .* not a file"):
            conversation().save(path)


def test_commands_of_a_chat(monkeypatch, capsys):
    assert turns(conversation(), monkeypatch, capsys, "hello\r", "/reset\r", "/quit\r", "no") \
        == turns(conversation(), monkeypatch, capsys, "hello", "/reset", "/quit")
    free, _ = turns(conversation(), monkeypatch, capsys, "hello", "why")
    stop = free[0].strip("\n")[4:6]
    answers, said = turns(conversation(), monkeypatch, capsys, "/set max_new_tokens 3", "hello", "/sett x", "/set",
                          f"/set stop={stop}", "/set max_new_tokens 20", "hello", "/set temperatur 1", "/set temperature cold",
                          "/set temperature -1", "/set top_k", "/help", KeyboardInterrupt, "/set seed 5", "/set min_p=0.2")
    assert answers[1] == free[0][:3] + "\n"
    assert "max_new_tokens=3 " in said[0] and said[2] == said[0] and "unknown command /sett" in said[1]
    assert f"stop={stop} " in said[3] and "max_new_tokens=20" in said[4]
    expected = ("no setting 'temperatur'; did you mean temperature?", "/set temperature takes a number, not 'cold'",
                "sampling needs temperature at least 0, not -1.0", "/set top_k takes a whole number, not ''")
    assert said[5:9] == list(expected)
    assert said[9].startswith("/reset") and "seed=5" in said[-2] and "min_p=0.2" in said[-1]
    assert len(said) == 9 + len(sample.COMMANDS.splitlines()) + 2
    # the same seed again, the same answer again
    cfg = sample.Config(max_new_tokens=9)
    answers, _ = turns(conversation(), monkeypatch, capsys, *["/set seed 5", "hello", "/reset"] * 2, cfg=cfg)
    assert answers[1] == answers[4] != free[0]


class Interrupted:
    """A stream of tokens in which Ctrl-C comes before the sixth."""

    def __init__(self, stream):
        self.stream, self.made = stream, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.made == 5:
            signal.raise_signal(signal.SIGINT)
        self.made += 1
        return next(self.stream)

    @property
    def state(self):
        return self.stream.state


def test_ctrl_c_stops_the_answer_alone(monkeypatch, capsys):
    expected, _ = turns(conversation(), monkeypatch, capsys, "hello", "why", cfg=dataclasses.replace(GREEDY, max_new_tokens=6))
    talk, cfg = conversation(), dataclasses.replace(GREEDY, max_new_tokens=1000)
    stream = talk.model.stream
    monkeypatch.setattr(talk.model, "stream", lambda *args, **more: Interrupted(stream(*args, **more)))
    handler = signal.getsignal(signal.SIGINT)
    answers, said = turns(talk, monkeypatch, capsys, "hello", KeyboardInterrupt, "why", cfg=cfg)
    assert (answers[0], answers[2]) == tuple(expected[:2]) and not said and signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_a_long_text_is_read(monkeypatch, capsys):
    """What is not read yet is read with the next line."""
    monkeypatch.setattr(sample, "PART", 16)
    settings = dataclasses.replace(GREEDY, interactive=True, repetition_penalty=1.2)
    talk, parts = conversation(), []
    whole = [0] + talk.tokenizer.encode("some long text " * 9 + "\nwhy\n")
    whole = talk.model.generate([whole], 20, temperature=0, repetition_penalty=1.2)[0].tolist()
    expected = talk.tokenizer.decode(whole[-20:])
    forward = talk.model.forward

    def interrupted(*args, **more):
        parts.append(args[0].shape[1])
        if len(parts) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **more)
    monkeypatch.setattr(talk.model, "forward", interrupted)
    answers, said = turns(talk, monkeypatch, capsys, "some long text " * 9, "why", cfg=settings)
    assert answers[:2] == ["\n", expected + "\n"] and not said
    assert parts[:8] == [16] * 8 and len([length for length in parts if length > 1]) < 12


def test_an_alphabet_without_a_newline(monkeypatch, capsys):
    model = Mamba(MambaConfig(3, 16, 1)).eval()
    talk = sample.Conversation(model, CharTokenizer("abc"), [])
    answers, said = turns(talk, monkeypatch, capsys, "abcab", "abd", "")
    assert len(answers[0]) == len(answers[2]) == 21 and len(said) == 1 and "character 'd'" in said[0]


class Made:
    """In place of the model's stream: these tokens."""

    def __init__(self, ids, state):
        self.tokens, self.state = iter(torch.tensor(ids)[:, None]), state

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.tokens)


def test_an_answer_ends_with_its_text(monkeypatch):
    tokenizer, model = one_token_a_byte(), small(vocab_size=257)
    ids = tokenizer.encode("one two") + [0] + tokenizer.encode("three")
    given, made = [], ids
    state = model.init_state(1)
    monkeypatch.setattr(model, "stream", lambda prompts, *args, **more: given.append(prompts) or Made(made, state))
    talk = sample.Conversation(model, tokenizer, [])
    assert "".join(talk.answer(sample.Config(), None)) == "one two" and talk.unread == [0] and talk.tokens_made == 8
    assert "".join(talk.answer(sample.Config(ignore_eos=True), None)) == "one two<|endoftext|>three"
    assert "".join(talk.answer(sample.Config(stop="x|e t"), None)) == "on" and talk.unread == tokenizer.encode("t")
    assert given == [[[0]], [[0]], [ids[-1:]]] and talk.seen == {*ids}
    made = tokenizer.encode("aé")[:2]
    assert "".join(talk.answer(sample.Config(), None)) == "a"


# ---------------------------------------------------------------------------------------------------------------------
# show.py: looking inside

def show_text(cfg, model, tokenizer, text):
    ids = tokenizer.encode(text)
    show.show(cfg, model, ids, sample.as_text(tokenizer, ids))


def by_hand(model, ids, layer):
    """delta and surprise, from one forward pass in other words."""
    with torch.no_grad():
        x = model.backbone["embedding"](ids[None])
        *before, last = model.backbone["layers"][:layer + 1]
        for one in before:
            x = x + one.mixer(one.norm(x))
        m, d = last.mixer, model.config.d_inner
        x = m.in_proj(last.norm(x))[..., :d].transpose(1, 2)
        x = F.conv1d(F.pad(x, (m.conv1d.weight.shape[2] - 1, 0)), m.conv1d.weight, m.conv1d.bias, groups=d).transpose(1, 2)
        dt = F.silu(x) @ m.x_proj.weight[:model.config.dt_rank].T
        delta = torch.log1p(torch.exp(m.dt_proj(dt)))
        logp = model(ids[None])[0][0].log_softmax(-1)
        return delta[0].mean(-1), -logp[torch.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("part", [1, 7, 512])
def test_what_show_measures(monkeypatch, part):
    model, ids = small(n_layer=3).eval(), tokens(40)
    monkeypatch.setattr(show, "PART", part)
    for layer in range(3):
        delta, surprise = by_hand(model, ids, layer)
        assert torch.allclose(show.opening(model, ids.tolist(), layer), delta, atol=1e-6)
    first, *rest = show.surprise(model, ids.tolist())
    assert first.isnan() and torch.allclose(torch.tensor(rest), surprise, atol=1e-5)
    assert len(show.opening(model, [5], 1)) == 1 and show.surprise(model, [5]).isnan().tolist() == [True]
    assert not model.backbone["layers"][1].mixer.x_proj._forward_hooks


def test_delta_of_one_channel():
    model, ids = small(n_layer=1, d_model=8).eval(), tokens(40)
    channels = torch.stack([show.opening(model, ids.tolist(), 0, channel) for channel in range(model.config.d_inner)])
    assert torch.allclose(channels.mean(0), by_hand(model, ids, 0)[0], atol=1e-6) and channels.std(0).min() > 0


class Doubled(nn.Module):
    """An adapter, as LoRA is one: it has a weight and a bias, and what it gives is something else."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x):
        return 2 * self.linear(x)


@pytest.mark.parametrize("change", ["none", "adapter", "hook", "extreme", "norms"])
def test_attention_is_the_scan_as_a_matrix(monkeypatch, change):
    """Times u, and with D u, it gives what the scan of the layer gives, in the model as it is."""
    ids, length = tokens(131), 131      # two blocks of rows, and some more
    model = small(n_layer=3, d_model=8, mixer_rms_eps=1e-5 * (change == "norms")).double().eval()
    mixer, seen, scan = model.backbone["layers"][1].mixer, [], mamba.selective_scan
    if change == "adapter":
        mixer.dt_proj = Doubled(mixer.dt_proj)
    if change == "hook":
        mixer.x_proj.register_forward_hook(lambda module, inputs, output: output + 0.3)
    if change == "extreme":     # tokens that pass, and such that nothing is left of those before
        with torch.no_grad():
            mixer.dt_proj.bias += torch.linspace(-30, 60, len(mixer.D))
            mixer.x_proj.weight *= 20

    def watched(u, delta, A, B, C, D, z, *rest):
        seen.append((u[0], scan(u, delta, A, B, C, D, None, *rest)[0][0]))
        return scan(u, delta, A, B, C, D, z, *rest)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(mamba, "selective_scan", watched)
        model(ids[None])
    u, y = seen[1]
    monkeypatch.setattr(show, "PART", 50)
    total = 0
    for channel in range(len(mixer.D)):
        M = show.attention(model, ids.tolist(), 1, channel)
        assert M.shape == (length, length) and torch.equal(M, M.tril())
        assert torch.allclose(M @ u[:, channel] + mixer.D[channel] * u[:, channel], y[:, channel], atol=1e-10), channel
        total = total + M.abs()
    mean = show.attention(model, ids.tolist(), 1)
    assert torch.allclose(mean, total / len(mixer.D), atol=1e-12)
    assert torch.allclose(show.attention(model, ids.tolist(), 1, first=length - 1), mean[-1:], atol=1e-12)
    single = show.attention(model.float(), ids.tolist(), 1)
    assert torch.allclose(single.double(), mean, rtol=1e-3, atol=1e-4 * mean.max())
    assert show.attention(model.bfloat16(), ids.tolist(), 1).isfinite().all()
    assert len(mixer.x_proj._forward_hooks) == (change == "hook")


@pytest.mark.parametrize("layer", ["mamba2", "mamba3"])
def test_delta_of_heads(monkeypatch, layer):
    """The delta with which the scan of a layer runs, as small as its limit says; and no attention."""
    config = MambaConfig(layer=layer, vocab_size=257, d_model=32, n_layer=2, headdim=16, d_state=16, dt_limit=(0.01, 0.05))
    torch.manual_seed(0)
    model, ids, seen, module = Mamba(config).eval(), tokens(70), [], importlib.import_module(layer)
    model.backbone["layers"][1].mixer.in_proj.register_forward_hook(lambda module, inputs, output: 3 * output)
    with monkeypatch.context() as patch, torch.no_grad():
        if layer == "mamba2":
            def scan(u, delta, A, B, C, D, bias, *rest, whole=module.ssd):
                seen.append(F.softplus(delta[0] + bias).clamp(0.01, 0.05))
                return whole(u, delta, A, B, C, D, bias, *rest)
            patch.setattr(module, "ssd", scan)
        else:
            def scan(x, k, q, gamma, late, *rest, whole=module.chunked):    # lambda delta, (1 - lambda) delta
                seen.append((gamma + late)[0])
                return whole(x, k, q, gamma, late, *rest)
            patch.setattr(module, "chunked", scan)
        model(ids[None])
    assert 0.01 == pytest.approx(seen[1].min().item()) and seen[1].std() > 1e-3
    monkeypatch.setattr(show, "PART", 30)
    assert torch.allclose(show.opening(model, ids.tolist(), 1), seen[1].mean(1), atol=1e-6)
    for head in range(4):
        assert torch.allclose(show.opening(model, ids.tolist(), 1, head), seen[1][:, head], atol=1e-6)
    what, values = show.measured(sample.Config(show="delta", channel=2), model, ids.tolist())
    assert what == "delta in layer 1 of 0 to 1, head 2" and values.shape == (1, 70)
    model.backbone["layers"][0].mixer = nn.Identity()
    for flags, message in (({"show": "delta", "channel": 4}, "--channel must be from 0 to 3, not 4"),
                           ({"show": "delta", "layer": 0}, "--show=delta cannot look into layer 0 .Identity"),
                           ({"show": "attention"}, f"--show=attention cannot look into layer 1 .{layer.capitalize()}Block")):
        with pytest.raises(common.Problem, match=message):
            show.check(sample.Config(**flags), model, [1])


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
def test_show_as_html_gives_the_text_back(tmp_path, what):
    tokenizer, model = one_token_a_byte(), small(vocab_size=257).eval()
    text = "\n a <b> & \"q\" 'r' &amp; </main>\t日本🙂\r\n\r  two  spaces\n\n"
    cfg = sample.Config(show=what, html=str(tmp_path / "out.html"), start="x")
    show_text(cfg, model, tokenizer, text)
    page = Page((tmp_path / "out.html").read_bytes().decode())
    data = (tmp_path / "out.html").read_bytes().decode()
    assert "\r" not in data and data.count("<i></i>\n") == text.count("\n")      # each newline is seen
    assert page.text == text and not page.stack and not page.outside and os.listdir(tmp_path) == ["out.html"]
    assert "script" not in data
    # no colour without a value, and some for the least; a bar of spaces that no line end swallows
    colours = re.findall(r'<span(?: style="--a:([0-9.]+)")? title', data)
    assert (colours[0] == "") == (what == "loss") and all(colours[1:]) and float(min(colours[1:])) >= 0.1
    assert re.findall(r'<span style="--a:([0-9.]+)">\u00a0</span>', data) == [f"{0.1 + i / 40:.2f}" for i in range(21)]
    ids = torch.tensor(tokenizer.encode(text))
    delta, surprise = by_hand(model, ids, 1)
    expected = delta.tolist() if what == "delta" else [math.nan, *surprise.tolist()]
    assert len(page.values) == len(text) and len(ids) == len(text.encode())     # bytes of a character together
    smile = len(text[:text.index("🙂")].encode())
    assert abs(float(page.values[text.index("🙂")]) - sum(expected[smile:smile + 4]) / 4) < 1e-3
    assert abs(float(page.values[-1]) - expected[-1]) < 1e-3 and (page.values[0] == "") == (what == "loss")


@pytest.mark.parametrize("what", ["delta", "loss"])
def test_show_as_svg_gives_the_text_back(tmp_path, what):
    """A picture that stands alone: well-formed, nothing in it comes from elsewhere, and its lines are those of the text."""
    tokenizer, model = one_token_a_byte(), small(vocab_size=257).eval()
    text = " a <b> & \"q\" 'r' &amp; </svg>\t日本🙂\n\n  two  spaces\r\n"
    text += "many words make several rows of it, " * 9 + "\x1b\0\ufffe"
    show_text(sample.Config(show=what, html=str(tmp_path / "out.svg"), start="x"), model, tokenizer, text)
    data = (tmp_path / "out.svg").read_bytes().decode()
    picture, svg = xml.etree.ElementTree.fromstring(data), "{http://www.w3.org/2000/svg}"
    width, height = float(picture.get("width")), float(picture.get("height"))
    assert picture.tag == svg + "svg" and picture.get("viewBox") == f"0 0 {picture.get('width')} {picture.get('height')}"
    assert "script" not in data and not re.search(r"(href|src)\s*=|url\(", data) and os.listdir(tmp_path) == ["out.svg"]
    words = picture.findall(svg + "text")
    shown = re.sub(r"\s", "", "".join(word.text for word in words))
    expected = re.sub(r"[ \t]", "", text).translate(str.maketrans("\n\r\x1b\0\ufffe", "↵␍␛␀\ufffd"))
    legend = shown.removesuffix(expected)
    assert shown.endswith(expected) and legend.startswith("surpriseinnats" if what == "loss" else "deltainlayer1of0to2")
    # each has its place, left to right and from row to row, and on the page
    places = [tuple(float(word.get(name)) for name in ("y", "x", "textLength")) for word in words]
    assert places == sorted(places) and len({y for y, *_ in places}) > 8
    ends = {}
    for y, x, length in places:
        assert x >= ends.get(y, 0)
        ends[y] = x + length
    for rect in picture.findall(svg + "rect"):
        x, y, right, down = (float(rect.get(name, 0)) for name in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + right <= width and y + down <= height


def test_attention_as_html(tmp_path):
    """Each token has a row: a digit of colour for itself and each before it, and those from which most comes."""
    tokenizer, model = one_token_a_byte(), small(vocab_size=257, n_layer=3).eval()
    text = "\n a <b> & \"q\" 'r' &amp; </main>\t日本🙂\r\n\r </script> two  spaces\n\n"
    show_text(sample.Config(show="attention", html=str(tmp_path / "out.html"), start="x", layer=0), model, tokenizer, text)
    data = (tmp_path / "out.html").read_bytes().decode()
    page = Page(data)
    assert page.text == text and not page.stack and page.outside == ["script"] and data.count("<script>") == 1
    assert not page.values and "http" not in data and "url(" not in data and "import" not in data
    rows = json.loads(re.search(r"const rows = (\[.*\]), digits = ", data)[1])
    assert [len(colours) for colours, _ in rows] == [*range(1, len(text) + 1)]
    expected = show.attention(model, tokenizer.encode(text), 0)
    end = text.index("日")      # up to there a character is a token
    for t, (colours, most) in enumerate(rows[:end]):
        values = expected[t, :t + 1]
        percent = 100 * values / values.sum()
        assert [s for s, _ in most] == percent.argsort(descending=True)[:5].tolist()
        assert [float(value) for _, value in most] == pytest.approx([percent[s].item() for s, _ in most], rel=1e-2)
        levels = [show.DIGITS.index(colour) for colour in colours]
        assert all(levels[a] <= levels[b] for a in range(t + 1) for b in range(t + 1) if values[a] < values[b])
    # the last row is that of the last token, which colours the page before anyone points at another
    shown = [float(a) for a in re.findall(r'<span style="--a:([0-9.]+)">', data.partition("<main>")[2])]
    assert shown == pytest.approx([0.1 + 0.5 * show.DIGITS.index(c) / 61 for c in rows[-1][0]], abs=0.01)


def test_attention_as_svg(tmp_path):
    """A triangle of cells, in which more of it is a darker one, and each token at the end of its row."""
    tokenizer, model, text = one_token_a_byte(), small(vocab_size=257).eval(), "a <b> &\n\té🙂\x1b\0\ufffe yes, so it is"
    show_text(sample.Config(show="attention", html=str(tmp_path / "out.svg"), start="x"), model, tokenizer, text)
    picture, svg = xml.etree.ElementTree.parse(tmp_path / "out.svg").getroot(), "{http://www.w3.org/2000/svg}"
    width, height, n = float(picture.get("width")), float(picture.get("height")), len(text)
    labels = [label for label in picture.findall(svg + "text") if not label.get("textLength")]
    assert "".join(label.text for label in labels) == text.translate(str.maketrans(" \n\t\x1b\0\ufffe", "␣↵⇥␛␀\ufffd"))
    rects = [tuple(float(rect.get(name, 0)) for name in ("x", "y", "width", "height", "fill-opacity"))
             for rect in picture.findall(svg + "rect")]
    assert len(rects) == 1 + 21 + n * (n + 1) // 2      # the page, the legend, and the cells
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h, _ in rects)
    cells = collections.defaultdict(list)
    for x, y, w, _, opacity in rects[22:]:
        cells[y].append(opacity)
        assert x == rects[22][0] + w * (len(cells[y]) - 1)      # side by side
    assert [len(cells[y]) for y in sorted(cells)] == [*range(1, n + 1)]
    values = show.attention(model, tokenizer.encode(text), 1)[:8, :8]
    for row, opacities in zip(values, cells.values()):
        assert [opacities[s] for s in row[:len(opacities)].argsort()] == sorted(opacities)
    for label, y in zip(labels, sorted(cells)):
        assert y < float(label.get("y")) < y + rects[22][3] and float(label.get("x")) > rects[22][0]


def test_attention_in_a_pipe_and_in_a_terminal(monkeypatch, capsys):
    """That of the last token: its percents, or its colours."""
    tokenizer, model, text = one_token_a_byte(), small(vocab_size=257).eval(), "ab\n<c> é"
    for channel in (None, 3):
        show_text(sample.Config(show="attention", start=text, channel=channel), model, tokenizer, text)
        listed = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
        assert [shown for _, shown in listed] == [repr(c) for c in text]
        values = show.attention(model, tokenizer.encode(text), 1, channel)[-1].abs()
        values = torch.cat([values[:7], values[7:].mean(0, keepdim=True)])      # é has two bytes
        assert [float(value) for value, _ in listed] == pytest.approx((100 * values / values.sum()).tolist(), abs=1e-3)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_text(sample.Config(show="attention", start=text), model, tokenizer, text)
    legend, shown = capsys.readouterr().out.split("\n", 1)
    assert legend.startswith("attention in layer 1 of 0 to 2, mean over channels, percent of what the last token takes in: ")
    assert re.sub("\x1b\\[[0-9;]*m", "", shown) == text.replace("\n", "↵\n") + "\n"


def test_show_in_a_terminal_and_in_a_pipe(monkeypatch, capsys):
    talk, text = conversation(), "ab\n<c> é"
    ids, cfg = talk.tokenizer.encode(text), sample.Config(show="loss", start=text)
    show_text(cfg, talk.model, talk.tokenizer, text)
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[1] for line in listed] == [repr(c) for c in text] and listed[0].split()[0] == "-"
    assert abs(float(listed[4].split()[0]) - show.surprise(talk.model, ids)[4]) < 1e-4
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    show_text(cfg, talk.model, talk.tokenizer, text)
    assert capsys.readouterr().out.splitlines() == listed
    monkeypatch.delenv("NO_COLOR")
    show_text(cfg, talk.model, talk.tokenizer, text)
    legend, shown = capsys.readouterr().out.split("\n", 1)
    grounds = [int(g) for g in re.findall(r"48;2;(\d+);", shown)]
    assert legend.startswith("surprise in nats: ")
    assert re.sub("\x1b\\[[0-9;]*m", "", shown) == text.replace("\n", "↵\n") + "\n"
    assert shown.startswith("a\x1b")     # the first token has no value, and no colour
    del grounds[2]      # a newline is painted on both lines
    values = show.surprise(talk.model, ids)[1:]
    assert len(grounds) == len(values) == 7 and min(grounds) == 48
    assert all(grounds[i] <= grounds[j] for i in range(7) for j in range(7) if values[i] < values[j])
    assert "\x1b" not in show.painted("\x1b[2J", 0.3).removeprefix("\x1b[38").removesuffix("\x1b[0m")


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


def test_bench_measures_every_suite(tmp_path, call):
    flags = ["--suite=all", "--device=cpu", "--seconds=0.003", "--shapes=1x9x4x2", "--lengths=1", "--longest=256",
             "--d_model=16", "--n_layer=2", "--batch_size=2", "--block_size=8", "--size=small", "--new_tokens=2", "--prompt=5"]
    done = succeeded(call("bench.py", *flags, "--out=r/bench.json", cwd=tmp_path))
    results = json.loads((tmp_path / "r" / "bench.json").read_text())
    assert results["machine"]["threads"] == torch.get_num_threads() and results["flags"]["prompt"] == 5
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


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_bench_measures_a_block(tmp_path, call, layer):
    done = succeeded(call("bench.py", "--suite=block", "--device=cpu", "--seconds=0.003", f"--layer={layer}", "--d_model=32", "--batch_size=2",
                          "--block_size=8", "--out=bench.json", cwd=tmp_path))
    [table] = json.loads((tmp_path / "bench.json").read_text())["tables"]
    assert [row["variant"] for row in table["rows"]] == ["ours"] and table["rows"][0]["median_s"] > 0 and "failed" not in str(table["remarks"])
    assert f"a block of {layer} and its AdamW: d_model 32, B=2 L=8" in done.stdout


def test_bench_goes_on_without_a_variant_that_fails():
    def broken():
        raise ImportError("no such kernel\nand a long story")
    rows, remarks = bench.measure({"good": lambda: lambda: None, "bad": lambda: broken}, torch.device("cpu"), 0.01, None, False)
    assert [row["variant"] for row in rows] == ["good"] and remarks == ["bad failed: ImportError: no such kernel"]


@pytest.mark.parametrize("flag", ("--suite=scam", "--shapes=4x1024x512", "--shapes=4x0x5x1", "--shapes=", "--lengths=1,,2",
                                  "--size=2.8b", "--layer=mamba4", "--seconds=0", "--n_layer=-1", "--dtype=int8", "--device=abacus"))
def test_bench_refuses_bad_flags_in_one_line(tmp_path, call, flag):
    result = call("bench.py", "--out=bench.json", flag, cwd=tmp_path)
    one_line_error(result, flag.split("=")[0])
    assert result.stdout == ""


@pytest.mark.parametrize("flags", (["--models=bert"], ["--models=gpt=fast"], ["--d_model=33"], ["--dataset=nowhere.txt"],
                                   ["--max_iters=-1"], ["--max_iters=2", "--seconds=1"], ["--block_size=60000"]))
def test_compare_refuses_bad_flags_and_keeps_old_results(tmp_path, call, flags):
    (tmp_path / "results.json").write_text("of yesterday")
    one_line_error(call("bench.py", "--suite=compare", *flags, cwd=tmp_path), flags[0].split("=")[flags[0].startswith("--dataset")])
    assert (tmp_path / "results.json").read_text() == "of yesterday"


def test_each_token_goes_to_the_experts_that_suit_it_best():
    torch.manual_seed(0)
    layer = bench_compare.Experts(12, 20)
    x = torch.randn(3, 7, 12)
    y, _ = layer(x)
    weights, chosen, _ = layer.route(x.flatten(0, 1))
    torch.testing.assert_close(weights.sum(1), torch.ones(21))
    for i, token in enumerate(x.flatten(0, 1)):
        likes = [(weight @ token).exp().item() for weight in layer.router.weight]
        best = sorted(range(8), key=likes.__getitem__)[-2:]
        assert set(chosen[i].tolist()) == set(best)
        expected = sum(likes[e] / sum(likes[e] for e in best) * layer.experts[e](token) for e in best)
        torch.testing.assert_close(y.flatten(0, 1)[i], expected)
    y.square().sum().backward()
    used = set(chosen.flatten().tolist())
    assert layer.router.weight.grad.any() and all(layer.experts[e].up.weight.grad.any() for e in used)


def test_balance_loss_is_least_where_the_experts_are_equally_busy():
    layer = bench_compare.Experts(8, 4)
    with torch.no_grad():       # token i likes experts i and i + 1 best, and all of them are equally many
        layer.router.weight.copy_(5 * (torch.eye(8) + torch.eye(8).roll(1, 0)))
    assert layer.route(torch.eye(8).repeat(3, 1))[2].item() == pytest.approx(1)
    assert layer.route(torch.eye(8)[:1].repeat(24, 1))[2].item() > 3    # all like the same two

    torch.manual_seed(0)
    tokens, busiest = torch.randn(400, 8) + 1, lambda: layer.route(tokens)[1].flatten().bincount(minlength=8).max() / 1200
    nn.init.normal_(layer.router.weight)
    before, optimizer = busiest(), torch.optim.Adam(layer.router.parameters(), 0.03)
    for _ in range(40):
        optimizer.zero_grad()
        layer.route(tokens)[2].backward()
        optimizer.step()
    assert before > 0.25 and busiest() < 0.17


@pytest.mark.parametrize("shape", ((256, 4, 65), (160, 3, 103), (64, 2, 1000)))
def test_models_to_compare_have_equally_many_active_parameters(shape):
    cfg = SimpleNamespace(**dict(zip(("d_model", "n_layer"), shape)), dropout=0.1)
    with torch.device("meta"):
        mamba, gpt, moe, *heads = (build(cfg, shape[2]) for build in bench_compare.MODELS.values())
    (active, total), (active_moe, total_moe) = map(bench_compare.count_parameters, (gpt, moe))
    assert active == total == sum(p.numel() for p in gpt.parameters())
    assert active == pytest.approx(mamba.num_params(), rel=0.02) and active_moe == pytest.approx(active, rel=0.01)
    assert all(part.top == 2 and len(part.experts) == 8 for part in moe.modules() if isinstance(part, bench_compare.Experts))
    assert total_moe == sum(p.numel() for p in moe.parameters()) > 2 * active_moe - 2 * shape[2] * shape[0]
    wide, half = (next(m for m in of.modules() if isinstance(m, bench_compare.MLP)).up.out_features for of in (gpt, moe))
    assert wide == 2 * half
    for model, block in zip(heads, (Mamba2Block, Mamba3Block)):     # which nothing is fitted for
        assert isinstance(model.backbone["layers"][0].mixer, block) and model.num_params() == pytest.approx(mamba.num_params(), rel=0.2)


@pytest.mark.parametrize("sparse", (False, True))
def test_gpt_writes_the_same_with_its_cache_as_without(sparse):
    torch.manual_seed(0)
    gpt = bench_compare.GPT(20, 32, 2, 48, dropout=0.1, sparse=sparse)
    for name, p in gpt.named_parameters():
        nn.init.normal_(p, std=1.0 if name.startswith("layers") else 0.3)
    gpt, text = gpt.eval(), tokens(3, 9, vocab=20)
    expected = text
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, gpt(expected)[0][:, -1:].argmax(-1)], 1)
        state = gpt.init_state(3, 30)
        parts = []
        for part in text.split([3, 1, 5], dim=1):     # with nothing before, one token, and some
            logits, _, state = gpt(part, state=state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), gpt(text)[0])
        assert state[1] == 9
        state = gpt(text[:, :-1], state=gpt.init_state(3, 30))[2]
        new = torch.stack(bench_compare.continued(gpt, text[:, -1:], 12, state), 1)
        assert len(expected[:, 9:].unique()) > 3 and torch.equal(new, expected[:, 9:])
        there = gpt(text)[0][:, :4], gpt(text[:, :4])[0]
    torch.testing.assert_close(*there)      # no token sees one after it


@pytest.mark.parametrize("gate", (True, False))
def test_time_invariant_block_is_the_scan_with_constants(gate):
    torch.manual_seed(0)
    config = MambaConfig(d_model=12, d_state=5)
    block = bench_compare.TimeInvariantBlock(config, gate)
    x = torch.randn(2, 11, 12)
    y = block(x)
    u = F.linear(x, block.in_proj.weight)
    u, z = u.chunk(2, -1) if gate else (u, None)
    u = mamba.conv_silu(u, block.conv1d.weight, block.conv1d.bias)[0]
    dt, B, C = block.x_proj.value.split([config.dt_rank, 5, 5])
    delta = F.softplus(block.dt_proj(dt)).expand_as(u)
    expected = selective_scan(u, delta, -block.A_log.exp(), B.expand(2, 11, 5), C.expand(2, 11, 5), block.D, z, method="sequential")
    torch.testing.assert_close(y, block.out_proj(expected), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())
    first, state = block(x[:, :4], block.init_state(2))
    torch.testing.assert_close(torch.cat([first, block(x[:, 4:], state)[0]], 1), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", (False, True))
def test_answers_of_the_tasks_are_right(train):
    for name, task in bench_compare.TASKS.items():
        x, y = task.make(np.random.default_rng(3), 40, 24, train)
        assert x.shape == y.shape and x.min() >= 0 and x.max() < 16
        for tokens_, answers in zip(x.tolist(), y.tolist()):
            asked = [i for i, answer in enumerate(answers) if answer >= 0]
            if name == "selective copying":
                seen = [token for token in tokens_[:24] if token]
                assert len(seen) == 4 and tokens_[24:] == [15] * 4 and answers == [-1] * 24 + seen
            elif name == "induction heads":
                places = [i for i, token in enumerate(tokens_) if token == 15]
                assert asked == places[1:] and places[-1] == 23 and len(places) == (9 if train else 2)
                assert {answers[i] for i in asked} == {tokens_[i + 1] for i in places[:-1]}
            else:
                assert asked == (list(range(24)) if train else [23])
                assert all(answers[i] == tokens_[:i + 1].count(1) % 2 for i in asked)
        firsts = {row.index(15) for row in x.tolist()} if "induction" in name and not train else range(24)
        assert len(firsts) > 8      # not always in the same place


def compare_tiny(call, folder, *flags):
    (folder / "words.txt").write_text(" ".join(map(str, range(1000))))
    return call("bench.py", "--suite=compare", "--device=cpu", "--dataset=words.txt", "--d_model=16", "--n_layer=2", "--batch_size=2",
                "--block_size=16", "--new_tokens=3", *flags, cwd=folder)


def of_results(folder):
    return [table["rows"] for table in json.loads((folder / "results.json").read_text())["tables"]]


def test_compare(tmp_path, call, monkeypatch):
    """All models see the same batches in the same order; none learns otherwise because of the others."""
    monkeypatch.setattr(bench_compare, "EVALUATIONS", 2)
    batches, draw = {}, bench_compare.random_windows

    def watched(bench, tokens, step):
        x, y = draw(bench, tokens, step)
        assert torch.equal(x[:, 1:], y[:, :-1])
        batches.setdefault(step, []).append(x)
        return x, y
    monkeypatch.setattr(bench_compare, "random_windows", watched)
    done = succeeded(compare_tiny(call, tmp_path, "--max_iters=4", "--longest=4096"))
    assert all(torch.equal(x, of[0]) for of in batches.values() for x in of) and {len(batches[i]) for i in (1, 2, 3)} == {5}
    assert len({tuple(of[0].flatten().tolist()) for of in batches.values()}) == 4
    rows, speeds = of_results(tmp_path)
    assert [row["model"] for row in rows] == ["mamba", "gpt", "moe", "mamba2", "mamba3"]
    for row in rows:
        assert [point["step"] for point in row["curve"]] == [2, 4] and [point["tokens"] for point in row["curve"]] == [64, 128]
        assert row["loss"] == row["curve"][-1]["loss"] != row["curve"][0]["loss"] and row["tokens_per_s"] > 0
        assert f"{row['loss']:.4f}" in done.stdout and f"{row['parameters']:,}" in done.stdout
    memory = {(row["model"], row["after"]): row["state_mb"] for row in speeds}
    assert memory["mamba", 256] == memory["mamba", 4096] < memory["gpt", 256] == memory["gpt", 4096] / 16
    assert all(row["tokens_per_s"] > 0 for row in speeds) and len(speeds) == 10
    has_matplotlib = importlib.util.find_spec("matplotlib")
    pictures = [tmp_path / name for name in ("results.png", "results-writing.png")]
    assert all(p.exists() for p in pictures) if has_matplotlib else "matplotlib is not installed" in done.stdout

    monkeypatch.setattr(bench, "draw", lambda *_, **__: None)
    succeeded(compare_tiny(call, tmp_path, "--max_iters=4", "--longest=1", "--models=moe"))
    (alone,), none = of_results(tmp_path)
    assert [point["loss"] for point in alone["curve"]] == [point["loss"] for point in rows[2]["curve"]] and none == []
    succeeded(compare_tiny(call, tmp_path, "--seconds=0.05", "--longest=1", "--models=gpt=3e-2"))
    (quick,), _ = of_results(tmp_path)
    assert quick["seconds"] >= 0.05 and quick["learning_rate"] == 3e-2


def test_ctrl_c_keeps_what_compare_has_done(tmp_path, call, monkeypatch):
    evaluate, calls = bench_compare.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return evaluate(*args)
    monkeypatch.setattr(bench_compare, "evaluate", interrupted)
    result = compare_tiny(call, tmp_path, "--max_iters=32", "--plot=curves.png")
    assert result.returncode == 130 and "interrupted" in result.stderr
    rows, speeds = of_results(tmp_path)
    assert [len(row["curve"]) for row in rows] == [2, 1, 1, 1, 1] and speeds == []
    assert all(f"{row['loss']:.4f}" in result.stdout.split("peak MB")[1] for row in rows)
    assert (tmp_path / "curves.png").exists() == bool(importlib.util.find_spec("matplotlib"))


def test_tasks(tmp_path, call, monkeypatch):
    monkeypatch.setattr(bench_compare, "TASKS", {
        name: dataclasses.replace(task, length=16, tests=(16, 64, 2 ** 20), batch=2) for name, task in bench_compare.TASKS.items()})
    monkeypatch.setattr(bench_compare, "JUDGED", 64)
    done = succeeded(call("bench.py", "--suite=tasks", "--device=cpu", "--task_steps=1", "--longest=64", cwd=tmp_path))
    rows, = of_results(tmp_path)
    kinds = ["mamba", "time-invariant", "time-invariant, no gate"]
    expected = [*(("selective copying", kind) for kind in kinds), *(("induction heads", kind) for kind in kinds[:2]),
                *(("parity", kind) for kind in ("mamba", "mamba2", "mamba3"))]
    assert [(row["task"], row["model"], row["tested"]) for row in rows] == [(*of, n) for of in expected for n in (16, 64)]
    assert all(0 <= row["accuracy"] <= 100 and row["steps"] == 1 for row in rows)
    assert "99.8" in done.stdout and "56.4" in done.stdout and done.stdout.count("in the paper (table") == 2


def test_a_task_is_learned_and_then_counted_right():
    """Parity of two bits, which needs no recurrence; and a model that is always right has 100 %."""
    class Right:
        eval = lambda self: self

        def read(self, x, num_last_tokens):
            for part in F.one_hot(y.clamp(min=0), 16).split(5, dim=1):
                yield part, None
    task = dataclasses.replace(bench_compare.TASKS["parity"], length=2)
    machine = SimpleNamespace(cfg=SimpleNamespace(seed=1, compile=False), device=torch.device("cpu"), dtype="float32", clock=bench.clock)
    batch = functools.partial(bench_compare.examples, machine, task, 2, 64, True)
    torch.manual_seed(0)
    run = bench_compare.Training(machine, "", bench_compare.build_small("mamba"), 5e-3, batch, 25)
    x, y = batch(10 ** 6)
    assert bench_compare.accuracy(Right(), x, y) == 100
    told = []
    run.train(1, lambda run: told.append(run.step))
    assert told == list(range(1, 26)) and bench_compare.accuracy(run.model, x, y) == 100
    y[:, 0] = 1 - y[:, 0]
    assert bench_compare.accuracy(run.model, x, y) == 50


# ---------------------------------------------------------------------------------------------------------------------
# What a newcomer meets: files to read, flags, Ctrl-C at any time, pipes, and all of it without mamba_fast/

SCRIPTS = ("train.py", "sample.py", "prepare_data.py", "bench.py")
BESIDE = ("mamba.py", "mamba2.py", "mamba3.py", "mamba_files.py", "mamba_export.py", "common.py", "runs.py", "processes.py", "texts.py", "tokens.py",
          "bench_compare.py", "show.py", *SCRIPTS)
FILES = [*(ROOT / name for name in BESIDE), *sorted((ROOT / "mamba_fast").glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_are_short_enough_to_read(path):
    if path.name != "scan_triton.py":
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [f"line {n}: {len(line)}" for n, line in enumerate(lines, 1) if len(line) > 100] == []


def imports(path):
    """(module, names imported from it, whether in a function, whether within a try or a suppress) of each import."""
    def walk(node, in_function=False, in_try=False):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, (), in_function, in_try) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                yield module, tuple(alias.name for alias in child.names), in_function, in_try
            function = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            suppressed = isinstance(child, ast.With) and "suppress" in ast.unparse(child.items[0])
            yield from walk(child, function, in_try or isinstance(child, ast.Try) or suppressed)
    return list(walk(ast.parse(path.read_text(encoding="utf-8"))))


OURS = {"mamba_fast", *(Path(name).stem for name in BESIDE)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_who_imports_whom(path):
    """What may be copied or deleted alone stays so: mamba.py does without all others, and no script needs another one."""
    for module, names, in_function, in_try in imports(path):
        top = module.split(".")[0]
        what = f"{path.name}: {module}"
        if path.parent.name == "mamba_fast":
            assert top not in OURS - {"mamba_fast"}, what
        elif path.name == "mamba_files.py":
            assert top not in OURS or (top in ("mamba", "mamba_export") and in_function), what
        elif path.name == "mamba_export.py":
            assert top not in OURS - {"mamba", "mamba_files"}, what
        elif path.name == "mamba.py":
            assert top not in OURS - {"mamba_fast", "mamba_files"} and (in_try or top not in OURS), what
            assert in_function or top in {"torch", "mamba_fast", "mamba_files"} | sys.stdlib_module_names, what
        elif path.name == "texts.py":
            assert top not in OURS - {"common"}, what
        elif path.name == "common.py":
            assert top not in OURS - {"mamba"} and (in_function or top not in {"mamba", "torch"}), what
        elif path.name == "processes.py":
            assert top not in OURS - {"common"}, what
        elif path.name == "runs.py":
            assert top not in OURS - {"common", "mamba", "mamba_files", "tokens"}, what
        elif path.name == "tokens.py":    # which starts without torch, as prepare_data.py does
            assert top not in OURS - {"mamba_files", "common", "texts"} and (in_function or top not in {"mamba_files", "torch"}), what
        elif path.name == "prepare_data.py":
            assert top not in OURS - {"common", "texts", "tokens"} and top != "torch", what
        else:
            assert top not in {"train", "sample", "bench"}, what
            assert top != "prepare_data" or names == ("open_data",), what
        if top == "mamba_fast" and path.parent.name != "mamba_fast":    # which may be deleted
            assert in_try or in_function, what


def test_importing_a_file_changes_nothing(tmp_path):
    """No environment variable, signal handler or number of threads; and prepare_data.py starts without torch."""
    code = """
import os, signal, sys
def look():
    import torch
    return dict(os.environ), [signal.getsignal(n) for n in sorted(signal.valid_signals())], torch.get_num_threads()
environ, handlers = dict(os.environ), [signal.getsignal(n) for n in sorted(signal.valid_signals())]
import prepare_data, common
assert "torch" not in sys.modules and environ == dict(os.environ)
assert handlers == [signal.getsignal(n) for n in sorted(signal.valid_signals())]
before = look()
for name in ("mamba", "mamba_files", "mamba_export", "train", "runs", "processes", "sample", "show", "bench", "bench_compare", "mamba_fast"):
    try:
        __import__(name)
    except ImportError:
        assert name == "mamba_fast"
    assert look() == before, name
"""
    kept = ("PATH", "HOME", "SYSTEMROOT", "OMP_NUM_THREADS")    # not what an import has put into this process already
    env = {"PYTHONPATH": str(ROOT), **{name: os.environ[name] for name in kept if name in os.environ}}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not os.listdir(tmp_path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 has -P")
@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare_data.py", "bench.py"])
def test_a_script_without_its_folder_on_the_path(tmp_path, name):
    result = succeeded(subprocess.run([sys.executable, "-P", ROOT / name, "--help"], cwd=tmp_path, capture_output=True, text=True,
                                      check=False, env=environment()))
    assert "--device" in result.stdout or "--dataset" in result.stdout


@ON_POSIX
@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported(tmp_path, name):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = start(ROOT / name, env=environment(PYTHONPATH=str(tmp_path)))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE)[1] == "" and process.returncode == -signal.SIGINT    # 130 in a shell


def test_a_pipe_that_nobody_reads(work, corpus, call):
    """As in `| head -1`: no word on stderr, and a training run is saved so that the same command goes on exactly."""
    def head(name, *flags):
        process = start(ROOT / name, *flags, cwd=work)
        for line in process.stdout if name != "prepare_data.py" else ():    # that prints all it has to say at its end
            if name == "sample.py" or line.startswith("step 0"):            # training has begun
                break
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(PATIENCE) == 141, err
        return err
    assert head("train.py", *TINY) == "" and load(work / "run" / "ckpt.pt")["step"] < 150
    succeeded(call("train.py", *TINY, cwd=work))
    assert_same_run(work, corpus / "finished")
    assert head("sample.py", "--out_dir=run", "--device=cpu", "--max_new_tokens=3000").count("\n") == 1     # the model
    assert head("prepare_data.py", "--dataset=words.txt") == ""


@ON_POSIX
def test_ctrl_c_in_a_pipeline(work):
    """`train.py | tee log`: tee goes first, so that even the message about stopping finds nobody."""
    process = hold(work, STEP, 10, "train.py", *TINY)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == "" and process.wait(PATIENCE) == 130
    process.stderr.close()
    assert load(work / "run" / "ckpt.pt")["step"] == steps_done(work) == 10


@pytest.mark.parametrize("path", ["README.md", pytest.param("mamba_fast/README.md", marks=pytest.mark.fast)])
def test_commands_of_the_readme(path):
    """Each has a script and flags that there are."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.findall(r"(?:python|torchrun --nproc_per_node=\d+) (\w+)\.py([^\n`#]*)", text)
    assert len(found) > 8
    for name, flags in found:
        common.parse_flags(importlib.import_module(name).Config, shlex.split(flags))


def test_python_of_the_readme(tmp_path, monkeypatch, capsys):
    """The loop computes the scan, and the rest runs, on a small model in the place of a trained one."""
    loop, own_code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    u, delta, A, B, C = (torch.rand(shape) for shape in ((2, 5, 3), (2, 5, 3), (3, 4), (2, 5, 4), (2, 5, 4)))
    names = {"torch": torch, "u": u, "delta": delta, "A": -A, "B": B, "C": C, "h": torch.zeros(2, 3, 4), "ys": []}
    exec(loop, names)  # noqa: S102 (it is ours)
    assert torch.allclose(torch.stack(names["ys"], 1), mamba.selective_scan(u, delta, -A, B, C, method="sequential"))

    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer("".join(sorted(set("The quick brown fox"))))
    model = Mamba(MambaConfig(tokenizer.vocab_size, d_model=16, n_layer=2))
    model.tokenizer = tokenizer.to_dict()
    model.save_pretrained("out/pydoc")
    capsys.readouterr()
    names = {}
    exec(own_code, names)  # noqa: S102
    assert names["y"].shape == (4, 1000, 256)
    assert torch.allclose(torch.cat([names["y1"], names["y2"]], 1), names["y"], atol=1e-5)
    text = capsys.readouterr().out
    assert text.startswith("The ") and len(text) == len("The ") + 200 + 1


ONE_BY_ONE = """
import importlib, io, json, sys
import common
for name, flags, typed in json.loads(sys.argv[1]):
    module, sys.argv = importlib.import_module(name), [name + ".py", *flags]
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8")
    print(end="\\0", flush=True)
    common.run(module.main, module.Config)
assert "mamba_fast" not in sys.modules
for flag in ("--compile", "--quantize=int8"):
    try:
        sys.argv = ["sample.py", "--out_dir=run", flag]
        common.run(module.main, module.Config)
    except SystemExit as end:
        print(end=f"\\0{end.code}")
"""


def test_all_of_it_without_mamba_fast(corpus, work, call):
    """train, resume, sample and chat in a copy of the project without that folder, and the same numbers."""
    copy = work / "project"
    copy.mkdir()
    for name in BESIDE:
        shutil.copy(ROOT / name, copy)
    sampling = ["--out_dir=run", "--device=cpu", "--temperature=0", "--max_new_tokens=40"]
    calls = [("train", [*TINY, "--max_iters=20", "--eval_interval=10"], ""),
             ("train", [*TINY, "--max_iters=30", "--eval_interval=10"], ""),
             ("sample", [*sampling, "--start=abc "], ""), ("sample", [*sampling, "--interactive"], "abc\ndef\n"),
             ("sample", ["--out_dir=run", "--device=cpu", "--start=abc def", "--show=delta"], "")]
    result = subprocess.run([sys.executable, "-c", ONE_BY_ONE, json.dumps(calls)], cwd=work, capture_output=True, text=True,
                            check=False, env=environment(PYTHONPATH=str(copy)))
    assert result.returncode == 0, result.stdout + result.stderr
    *without, compiled, quantized = result.stdout.split("\0")[1:]
    assert compiled == quantized == "2" and [line.partition(": ")[2] for line in result.stderr.splitlines()[-2:]] == [
        "--compile needs the folder mamba_fast/", "--quantize=int8 needs the folder mamba_fast/"]
    (work / "run").rename(work / "without")
    shown = [succeeded(call(f"{name}.py", *flags, cwd=work, stdin=typed.encode())).stdout for name, flags, typed in calls]
    assert without[2:4] == shown[2:4]       # the greedy text
    got, expected = ([float(line.split()[0]) for line in text.splitlines()] for text in (without[4], shown[4]))     # --show
    assert len(got) == len("abc def") and got == pytest.approx(expected, abs=2e-4)
    rows = (losses(work, name)[1:] for name in ("without", "run"))
    got, expected = ([float(value) for row in run for value in row[2:4] if value] for run in rows)
    assert len(got) == len(expected) > 30 and got == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What takes minutes: python -m pytest -m long

FORKS = """
import json, os, runpy, signal, sys
root, log = sys.argv[1:]
sys.path.insert(0, root)
import numpy, torch, torch._dynamo, train
for line in sys.stdin:      # ["start", flags] or ["wait", pid]
    what, value = json.loads(line)
    if what == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(value, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid > 0:
        print(pid, flush=True)
        continue
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # as train.py has it from its first lines on
    for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, log)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    sys.argv, status = [os.path.join(root, "train.py"), *value], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stderr.flush()
    os._exit(status)
"""


class Forks:
    """Runs of train.py that need not wait for torch to be imported."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "stderr.txt"
        self.server = subprocess.Popen([sys.executable, "-c", FORKS, str(ROOT), str(self.log)], cwd=folder, text=True, bufsize=1,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def ask(self, *question):
        print(json.dumps(question), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def run(self, *flags, signals=(), delay=0.0, rng=None):
        """(status, seconds that it took after the last signal, stderr) of a run that gets these signals, the first one after a delay."""
        pid = self.ask("start", flags)
        for number in signals:
            time.sleep(delay)
            os.kill(pid, number)    # what has ended waits to be asked for its status, so that the pid is still its own
            delay = rng.uniform(0, 0.05)
        last = time.perf_counter()
        status = self.ask("wait", pid)
        return status, time.perf_counter() - last, self.log.read_text()


def bits_of_run(folder):
    """All that a run has made, but for the speeds and the machine's part of it."""
    rows = [row[:5] for row in csv.reader((folder / "log.csv").open(newline=""))]
    saved = [torch.load(folder / name, weights_only=True) for name in ("ckpt.pt", "best.pt")]
    for of in saved:
        of.pop("config", None)
        of.get("optimizer", {}).pop("param_groups", None)       # the learning rate of each step is computed anew
    return rows, saved


def different(one, other):
    """Where two trees of tensors and other values differ, to the bit; nothing is as it should be."""
    leaves = [torch.utils._pytree.tree_flatten_with_path(of)[0] for of in (one, other)]
    same_value = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)     # nan too
    return [path for (path, a), (other_path, b) in itertools.zip_longest(*leaves, fillvalue=(None, None))
            if path != other_path or type(a) is not type(b) or not same_value(a, b)][:5]


POLITE = [(signal.SIGINT,), (signal.SIGTERM,), *((number,) for name in ("SIGHUP", "SIGUSR1") if (number := getattr(signal, name, None)))]
RUDE = [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM),
        *([(signal.SIGKILL,)] * 3 + [(signal.SIGINT, signal.SIGKILL)] if sys.platform != "win32" else [])]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("steps, interruptions", [(60, 500), (5000, 20)])
def test_random_kills_and_signals(tmp_path, steps, interruptions):
    """Whenever and however a run is interrupted, it goes on to the same bits, and what is asked to stop saves what it has done."""
    (tmp_path / "words.txt").write_text("".join(random.Random(0).choices("abcde fghij\n", k=20000)))
    forks, rng, done = Forks(tmp_path), random.Random(0), 0
    flags = ["--device=cpu", "--dataset=words.txt", "--compile=False", "--d_model=16", "--n_layer=1", "--d_state=4", "--block_size=32", "--batch_size=4",
             "--dropout=0.1", "--eval_iters=2", "--log_interval=1", "--sample_tokens=3", "--warmup_iters=5", f"--max_iters={steps}",
             f"--eval_interval={steps // 6}"]
    status, took, err = forks.run(*flags, "--out_dir=whole")
    assert status == 0, err
    expected, counts = bits_of_run(tmp_path / "whole"), collections.Counter()
    folder = tmp_path / "run"
    while done < interruptions:
        signals = rng.choice(rng.choice([POLITE, RUDE]))
        delay = rng.uniform(0, took if steps < 1000 else 1.5 * took / interruptions)
        status, late, err = forks.run(*flags, "--out_dir=run", signals=signals, delay=delay, rng=rng)
        done, counts[status] = done + 1, counts[status] + 1
        assert "Traceback" not in err and late < 5, (done, signals, status, late, err)
        assert status in (0, 130, 129, 143, 138, -2, -15, -9, -1, -10), (done, signals, status, err)
        if signals in POLITE and status > 0 and (folder / "log.csv").exists():     # nothing of what was logged is lost
            rows = list(csv.reader((folder / "log.csv").open(newline="")))
            saved = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
            assert len(rows) == 1 or saved >= int(rows[-1][0]), (done, saved, rows[-1])
        if status == 0 or done == interruptions:
            status, _, err = forks.run(*flags, "--out_dir=run")
            assert status == 0, err
            assert not different(bits_of_run(folder), expected), done
            assert not [name for name in os.listdir(folder) if "tmp" in name]
            shutil.rmtree(folder)
    print(dict(counts))


def damaged(data, rng):
    """The bytes of a file, with a random damage."""
    data, at, size = bytearray(data), rng.randrange(1, len(data)), rng.choice((1, 4, 100, 5000))
    how = rng.randrange(8)
    if how == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        data[at] = rng.randrange(256)
    elif how == 2:
        data[at:at + size] = bytes(len(data[at:at + size]))
    elif how == 3:
        data[at:at + size] = rng.randbytes(len(data[at:at + size]))
    elif how == 4:
        del data[at:]       # at is above 0: an empty file is a text, too
    elif how == 5:
        del data[at:at + size]
    elif how == 6:
        data[at:at] = rng.randbytes(size)
    else:
        data[at:at] = data[rng.randrange(len(data)):][:size]
    return bytes(data)


def damage_cases(folder, finished):
    """{kind of file: (path, what reads it)}. What reads it returns what it found: of a file with a checksum, the same or nothing."""
    run, model = finished / "run", small(n_layer=1, d_model=16, d_state=4, vocab_size=11).eval()
    model.save_pretrained(folder / "bin")
    model.save_pretrained(folder / "safetensors", layout="transformers")
    (folder / "t.json").write_text(neox_like(), encoding="utf-8")
    (folder / "a.jsonl").write_text('{"text": "one text"}\n{"text": "another one"}\n' * 300)
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a compressed text\n" * 300))
    (folder / "w.txt").write_text("words to prepare, once and again\n" * 300)
    data = prepare_data.open_data(str(folder / "w.txt"), str(folder / "data")).folder
    talk = sample.Conversation(model, CharTokenizer("abcdefghij\n"), [1, 2, 3])
    talk.save(folder / "talk.pt")

    def text(path):
        return "".join(block or "" for block in texts.read([path]))

    def read_data(path):
        return [tokens[:].tolist() for tokens in prepare_data.load_data(data)[2:4]]

    def read_talk(path):
        talk.load(path)
        return [*tree_leaves(talk.state), talk.unread, sorted(talk.seen)]
    model_of = lambda path: Mamba.from_pretrained(path.parent).state_dict()
    checkpoint = lambda path: {k: v for k, v in runs.load_checkpoint(path, Config=train.Config).items() if k != "path"}
    log = lambda path: runs.Log(SimpleNamespace(path=path.parent), runs.Run(step=10 ** 9, evaluated=10 ** 9), 1).rows
    return {
        "ckpt.pt": (run / "ckpt.pt", checkpoint), "best.pt": (run / "best.pt", checkpoint), "log.csv": (run / "log.csv", log),
        "pytorch_model.bin": (folder / "bin" / "pytorch_model.bin", model_of), "config.json": (folder / "bin" / "config.json", model_of),
        "model.safetensors": (folder / "safetensors" / "model.safetensors", model_of), "talk.pt": (folder / "talk.pt", read_talk),
        "train.bin": (data / "train.bin", read_data), "val.bin": (data / "val.bin", read_data), "meta.json": (data / "meta.json", read_data),
        "tokenizer.json": (folder / "t.json", lambda path: open_tokenizer(str(path)).vocab_size),
        "a.jsonl": (folder / "a.jsonl", text), "a.txt.gz": (folder / "a.txt.gz", text)}


CHECKSUMS = {"ckpt.pt", "best.pt", "pytorch_model.bin", "talk.pt", "train.bin", "val.bin", "a.txt.gz"}


@pytest.mark.long
def test_a_thousand_damaged_files_of_each_kind(tmp_path, finished, capsys):
    """One line or the file as it is; never another error, more than five seconds, or other numbers from a file that has a checksum."""
    rng, counts = random.Random(0), {}
    for kind, (path, read) in damage_cases(tmp_path, finished).items():
        whole, expected, longest, refused = path.read_bytes(), read(path), 0.0, 0
        for number in range(1000):
            path.write_bytes(damaged(whole, rng))
            began = time.perf_counter()
            try:
                found = read(path)
            except (common.Problem, ValueError, OSError) as error:
                assert str(error).strip() and "\n" not in str(error).strip(), (kind, number, error)
                refused += 1
            else:
                assert kind not in CHECKSUMS or not different(found, expected), (kind, number)
            longest = max(longest, time.perf_counter() - began)
        path.write_bytes(whole)
        assert not different(read(path), expected) and longest < 5, (kind, longest)
        counts[kind] = refused
        capsys.readouterr()
    with capsys.disabled():
        print(f"\nrefused of 1000: {counts}")
