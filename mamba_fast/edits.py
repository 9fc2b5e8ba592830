"""
What you edit in mamba.py, mamba2.py or mamba3.py is what runs. Each door of __init__.py does the
work of some functions there, whose text is known here but for comments, docstrings and spaces.
Where one of them says something else now, the doors that it stands behind are closed.
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
# {file: {door: what it does the work of}}; kernels: whether "auto" may be them
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
KNOWN = {      # {file: {function: digest of its text}}; a test tells them after a change
    "mamba": {
        "GatedMLP.forward": "3a3144b7e7338b6c",
        "Layer.forward": "3ebc78f85c5c297d",
        "Mamba._loss": "35d00af5423da167",
        "Mamba.decoder": "daac11c2c3a7e048",
        "Mamba.forward": "e37eab7995457801",
        "Mamba.hidden": "0499ef1031622141",
        "Mamba.prefill": "a41f5c3bbbe94590",
        "Mamba.read": "cbcaa611d0b023d1",
        "MambaBlock.mix": "f7055eda993b7803",
        "Mixer.forward": "4fd45177ef4e1d40",
        "conv_silu": "04e186d3800cf8f3",
        "in_tiles": "703209a0fb5c2e7d",
        "normed": "0c6499ef3cb79f4f",
        "one_by_one": "b968858bce4a19ce",
        "one_tile": "310550e40f04a205",
        "scan_of_part": "02abd21e816aff35",
        "selective_scan": "65986551745dafdb",
    },
    "mamba2": {
        "GatedRMSNorm.forward": "92a41d1f424dd990",
        "Mamba2Block.mix": "018564110bfecc92",
        "chunked": "05a398c55022eb76",
        "in_chunks": "678e01507091195d",
        "of_heads": "4c948ca174ebb8bf",
        "one_by_one": "a6a23c729adce0e4",
        "ssd": "968d99cea674e1f5",
    },
    "mamba3": {
        "Mamba3Block._keys_and_queries": "dff85551f457d449",
        "Mamba3Block.mix": "8cc2f3148c4c98bc",
        "Mamba3Block.mix_parts": "9229399347fe344a",
        "angles_since": "f46febe1d56f39e4",
        "chunked": "c424e1d332ce2b23",
        "one_by_one": "49be8c0c5ea287c9",
        "outer": "f1dd4742abe30f78",
        "turned": "85f5c29800f72247",
    },
}


def left_of(doors, file, place):
    """What is left of doors, this package or what this function has returned, where functions were
    edited; file and place: as in unedited of __init__.py."""
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
    """{name: digest of its text} of the functions in DOORS that are there and whose text is."""
    names = {name for names in DOORS[file].values() for name in names.split()}
    found = {}
    for name in sorted(names):
        try:
            text = text_of(attrgetter(name)(SimpleNamespace(**place)))
        except AttributeError:      # not all of the file has been copied
            continue
        if text:
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def text_of(function):
    """The text of a function but for comments, docstrings and spaces; "" if it is not there."""
    code = inspect.unwrap(function).__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1:]
    # all lines from "def" on that begin further right; inspect.getsource would take 1 ms for each
    begin = next((i for i, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
    inside = re.compile(re.match(" *", lines[begin]).group() + r"\s|\s*$") if lines else None
    end = next((i for i in range(begin + 1, len(lines)) if not inside.match(lines[i])), len(lines))
    return re.sub(r'"""[\s\S]*?"""|#[^\n]*|\s', "", "".join(lines[:end]))
