"""
What you edit in mamba.py, mamba2.py or mamba3.py is what runs. A door is a function of __init__.py
that does the work of some functions there. Their text is known here, but for comments, docstrings
and blank lines. If one of them has been edited its doors are closed: they return None, and the
caller goes on with its own code.
"""
from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
import re
import warnings
from operator import attrgetter
from types import SimpleNamespace

TILES = "in_tiles one_tile"
SCAN = f"selective_scan scan_of_part {TILES}"
BLOCK = f"MambaBlock.mix conv_silu {SCAN}"
CHUNKS = "in_chunks chunked of_heads"
BLOCK2 = f"Mamba2Block.mix GatedRMSNorm.forward ssd {CHUNKS}"
BLOCK3 = ("Mamba3Block.mix Mamba3Block.mix_parts Mamba3Block._keys_and_queries angles_since turned "
          "chunked outer")
# {file: {door: what it does the work of}}; kernels, kernels_with_heads: where has_triton says no
DOORS = {
    "mamba": {
        "scan": SCAN, "recurrence": TILES, "kernels": TILES, "conv_silu": "conv_silu", "mix": BLOCK,
        "mix2": "conv_silu", "cross_entropy": "Mamba._loss",
        "decoder": f"{BLOCK} Mamba.forward Mamba.hidden Mamba.read Mamba.prefill Mamba.decoder "
                   "Layer.forward Mixer.forward GatedMLP.forward normed one_by_one"},
    "mamba2": {
        "in_chunks": CHUNKS, "kernels_with_heads": CHUNKS, "mix2": BLOCK2,
        "mix3": CHUNKS, "keys_and_queries": "of_heads", "gated_norm": "GatedRMSNorm.forward",
        "decoder": f"{BLOCK2} one_by_one"},
    "mamba3": {
        "angles_since": "angles_since", "keys_and_queries": "Mamba3Block._keys_and_queries turned",
        "mix3": BLOCK3, "decoder": f"{BLOCK3} one_by_one"},
}
KNOWN = {      # {file: {function: digest of its text}}; a test prints them after a change
    "mamba": {
        "GatedMLP.forward": "1df436fbf406428a",
        "Layer.forward": "fce79f1c7c330c1c",
        "Mamba._loss": "e5d6b128cab3cafc",
        "Mamba.decoder": "2aea48738378b36c",
        "Mamba.forward": "c5e2d2fcc169bce8",
        "Mamba.hidden": "f350cca4411c06b2",
        "Mamba.prefill": "99f38c553ba0bcfd",
        "Mamba.read": "fe76abce613d5ee9",
        "MambaBlock.mix": "ae0790d154fcdc2a",
        "Mixer.forward": "5792340875d6fba8",
        "conv_silu": "561e52ca50af605b",
        "in_tiles": "3fce06349fa739be",
        "normed": "ee886b35836d6214",
        "one_by_one": "d5f402fbfbef5081",
        "one_tile": "6a3e141f62f700ec",
        "scan_of_part": "ee2af641b103d788",
        "selective_scan": "d37f971a0acad8b0",
    },
    "mamba2": {
        "GatedRMSNorm.forward": "4d66e47c1805b803",
        "Mamba2Block.mix": "940222e5c9da7cfb",
        "chunked": "6e9a923e099922f0",
        "in_chunks": "ded2cf724be1fbed",
        "of_heads": "5f1da92ae4b93afa",
        "one_by_one": "1321371f1a6c3c91",
        "ssd": "15fb284a273c90ec",
    },
    "mamba3": {
        "Mamba3Block._keys_and_queries": "ae222b76aaf7c7f4",
        "Mamba3Block.mix": "91d46b2a4cdf8e7e",
        "Mamba3Block.mix_parts": "c53a642f8b4d8a72",
        "angles_since": "0c25fa4a2b84b0e7",
        "chunked": "c3219bafa9115b57",
        "one_by_one": "17dd55354c33ffb9",
        "outer": "44e5ca3a4368aab8",
        "turned": "5f650a8aca852080",
    },
}


def left_of(doors, file, place):
    """
    Of doors what is left where functions were edited. doors: this package, or what this function
    has returned.  file: a key of DOORS.  place: its globals().
    """
    now = digests(file, place)
    edited = {name for name, digest in KNOWN[file].items() if now.get(name, digest) != digest}
    if not edited:
        return doors
    warnings.warn(f"{file}.py has been edited: {', '.join(sorted(edited))}. What is there runs; "
                  "mamba_fast/ makes less of it faster", stacklevel=3)
    closed = {door for door, names in DOORS[file].items() if edited & set(names.split())}
    left = SimpleNamespace(__all__=doors.__all__, **{k: getattr(doors, k) for k in doors.__all__})
    for door in closed & set(doors.__all__):
        setattr(left, door, closed_door)
    left.unedited = functools.partial(left_of, left)

    def has_triton(u, d_state, headdim=0):
        kernels = "kernels" if headdim == 0 else "kernels_with_heads"
        return kernels not in closed and doors.has_triton(u, d_state, headdim)
    left.has_triton = has_triton
    return left


def closed_door(*_, **__):
    return None


def digests(file, place):
    """{name: digest} of those functions in DOORS whose text can be read, None for what is no
    function any more."""
    found = {}
    for name in sorted({name for names in DOORS[file].values() for name in names.split()}):
        try:
            function = inspect.unwrap(attrgetter(name)(SimpleNamespace(**place)))
        except AttributeError:      # it has not been copied
            continue
        if not hasattr(function, "__code__"):
            found[name] = None
        elif text := text_of(function):
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def text_of(function):
    """The text of a function but for comments, docstrings and blank lines; "" if it is not
    there."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1:]
    if not lines:
        return ""
    # decorators, "def" and all lines further right; inspect.getsource would take 1 ms for each
    begin = next((i for i, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
    inside = re.compile(re.match(" *", lines[begin]).group() + r"\s|\s*$")
    end = next((i for i in range(begin + 1, len(lines)) if not inside.match(lines[i])), len(lines))
    text = re.sub(r'"""[\s\S]*?"""|#[^\n]*', "", "".join(lines[:end]))
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
