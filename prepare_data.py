"""
Turns text into tokens to train on: data/<name>/train.bin, val.bin and meta.json.

python prepare_data.py                                        # pydoc: Python's own manual, offline
python prepare_data.py --dataset=shakespeare                  # also: alice, tinystories (2 GB)
python prepare_data.py --dataset=book.txt --tokenizer=bpe     # your text, a vocabulary made for it
python prepare_data.py --dataset=folder --tokenizer=gpt-neox  # all texts in it, for mamba-130m
python prepare_data.py --dataset=https://example.org/text.txt --tokenizer=tokenizer.json --name=mine

A text is UTF-8: .txt, .md, or .jsonl with a "text" in each line, all of them also as .gz. The first
90 % of its characters train, the last 10 % validate; memory does not grow with it.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # `python -P` does not look for modules beside the script
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import numpy as np

import common
from common import Problem, dataset_name, flag, is_url, progress, reading, say
from texts import BREAK, DATASETS, find_text, is_text, read, sha256_of
from tokens import CharTokenizer, code_points, load_tokenizer, open_tokenizer, train_bpe


@dataclass
class Config:
    dataset: str = flag("pydoc", "pydoc, shakespeare, alice, tinystories, a text file, a folder of "
                        "them, or a URL")
    tokenizer: str = flag("char", "char, bpe (trained on the text), gpt-neox, or a tokenizer.json")
    vocab_size: int = flag(4096, "tokens of a vocabulary trained here (bpe)")
    data_dir: str = flag("data", "folder of all prepared data, and of downloaded texts")
    cache_dir: str = flag("", "for gpt-neox and tinystories; by default Hugging Face's own cache")
    name: str = flag("", "folder under data_dir; by default the names of dataset and tokenizer")
    allow_special: bool = flag(False, "<|endoftext|> and its like in a text are the tokens of that "
                               "name; else they are characters as all others")

FILES = ("train.bin", "val.bin", "meta.json")

def prepare(cfg, block_size=0, tokenizer=None, again=True):
    """Makes data_dir/<name> as cfg (a Config) says and returns its path; a failure leaves what was
    there. Problem: what is given is not a text, a tokenizer or a name; the tokenizer cannot spell
    the text; the text is too short for block_size; a download failed.
    tokenizer: one to take instead of that of cfg; what it cannot spell is left out, and said.
    again: also if this text has been prepared already."""
    name = dataset_name(cfg.dataset, cfg.tokenizer, cfg.name)
    folder = Path(cfg.data_dir) / name
    if Path(name).name != name or name == "..":
        raise Problem(f"--name takes the name of a folder, not '{name}'")
    given_one = tokenizer
    tokenizer = given_one or open_tokenizer(cfg.tokenizer, cfg.cache_dir, cfg.vocab_size)
    noticed = {}
    sources = find_text(cfg.dataset, Path(cfg.data_dir, "downloads"), cfg.cache_dir, noticed)
    with alone_in(folder) as new:
        if not again and is_prepared(folder, cfg.dataset):
            return folder  # by another process, while this one waited
        meta = {"name": name, "source": cfg.dataset, "sha256": sha256_of(*sources),
                **write_tokens(new, cfg, sources, tokenizer, given_one, noticed)}
        # of this folder alone, and not for the checkpoint of a run
        flags = {key: str(v) for key, v in vars(cfg).items() if v != getattr(Config, key)}
        meta["here"] = {"flags": None if given_one else flags, "checked": stamps(new)}
        write_meta(new, meta)
        load_data(new, block_size)  # a text that is too short ends here
        verb = "replaced" if (folder / "meta.json").exists() else "wrote"
        # meta.json moves last: if a crash comes between, load_data sees that they do not fit
        for file in FILES:
            os.replace(new / file, folder / file)
    say(f"tokens: {meta['train_tokens']:,} to train, {meta['val_tokens']:,} to validate, "
        f"vocabulary {meta['vocab_size']:,} ({meta['dtype']})\n{verb} {folder}")
    return folder

def write_tokens(folder, cfg, sources, tokenizer, given_one, noticed):
    """Writes train.bin and val.bin into a folder and returns what meta.json says of them."""
    # one that is made for this text is not there yet
    has_end = tokenizer.end_of_text is not None if tokenizer else cfg.tokenizer == "bpe"
    separator = BREAK if has_end else "\n"
    allow_special = cfg.allow_special
    if stories := cfg.dataset == "tinystories":  # which has a token between two stories
        separator, allow_special = "", True

    # First pass: is it text, how long is it, which characters does it have?
    size = sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in sources)
    seen, count = np.zeros(sys.maxunicode + 1, bool), 0
    with progress(size, "reading") as bar:
        for block in read(sources, separator, bar, noticed):
            seen[code_points(block or "")] = True
            count += len(block or "")
    chars = "".join(map(chr, np.flatnonzero(seen)))
    if count < 10:
        only = f"has only {count} characters; 10 are needed" if count else "is empty"
        raise Problem(f"{cfg.dataset} {only}")
    noticed["count"] = f"{cfg.dataset}: {count:,} characters, {len(chars):,} different ones"
    say("\n".join(noticed.values()))

    # The split counts characters, whatever the tokenizer, so that losses per byte can be compared.
    # TinyStories comes split.
    split = sum(map(len, read(sources[:1]))) if stories else int(count * 0.9)

    def part(name, bar=None):
        return (block for of, block in in_parts(read(sources, separator, bar), split) if of == name)
    if cfg.tokenizer == "bpe":
        tokenizer = train_bpe(part, size, split / count, cfg.vocab_size)
    tokenizer = tokenizer or CharTokenizer(chars)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 65536 else "uint32")
    meta = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size,
            "train_chars": split, "val_chars": count - split,
            "val_bytes": sum(len(block.encode()) for block in part("val") if block is not BREAK),
            "tokenizer": tokenizer.to_dict()}

    # Second pass: the tokens. If all characters of the text, each twice in a row, and its beginning
    # come back from their tokens, so will the rest. Else what is lost is counted in all of it.
    beginning = next(read(sources))[:50_000]
    spelled = tokenizer.spells(" ".join(f"a{c}{c}b" for c in chars) + beginning)
    lost = {name: None if spelled else Counter() for name in ("train", "val")}
    with progress(2 * size, "encoding") as bar:
        for name in ("train", "val"):
            digest = hashlib.sha256()
            with open(folder / f"{name}.bin", "wb") as file:
                for ids in tokenizer.encode_stream(part(name, bar), allow_special, lost[name]):
                    digest.update(tokens := ids.astype(dtype))
                    file.write(tokens)
                common.flush_to_disk(file)
                meta[f"{name}_tokens"] = file.tell() // dtype.itemsize
            meta[f"{name}_sha256"] = digest.hexdigest()
    if not spelled and (of_all := lost["train"] + lost["val"]):
        say_or_refuse(cfg, given_one, of_all, count)
        meta["val_bytes"] -= sum(len(c.encode()) * n for c, n in lost["val"].items())
    return meta

def say_or_refuse(cfg, given_one, lost, count):
    """Says which of `count` characters are lost to given_one, the tokenizer of some weights.
    Problem: these are more than half; or it is None, for a person chose the tokenizer."""
    total = sum(lost.values())
    share = f"{total:,} of its {count:,} characters ({total / count:.2%})"
    most = ", ".join(f"{char!r} ({n:,})" for char, n in lost.most_common(10))
    most += ", ..." * (len(lost) > 10)
    if not given_one:
        raise Problem(f"--tokenizer={cfg.tokenizer} cannot spell {cfg.dataset}: {share} do not "
                      f"come back when its tokens are decoded: {most}; --tokenizer=bpe spells all")
    if total > count / 2:
        raise Problem(f"{cfg.dataset} does not fit the tokenizer of these weights; {share} are not "
                      f"in it: {most}")
    say(f"{cfg.dataset} in the tokenizer of these weights; not in it: {most}. {share} are left out")

def in_parts(blocks, split):
    """("train", block) for the first so many characters, then ("val", block)."""
    position = 0
    for block in blocks:
        if block is not BREAK:
            cut = max(split - position, 0)
            yield from (pair for pair in (("train", block[:cut]), ("val", block[cut:])) if pair[1])
            position += len(block)
        elif position != split:
            yield "train" if position < split else "val", BREAK

@contextlib.contextmanager
def alone_in(folder):
    """A folder in there for unfinished files, which goes at the end. Until then it is of this
    process alone: another one waits."""
    new, waits = folder / "tmp_prepare", False
    while True:
        try:
            with contextlib.suppress(FileNotFoundError):  # who had it has just deleted it
                held = common.lock(new)
                break
        except Problem:
            if not waits:
                say(f"another process is preparing {folder}; waiting for it")
            waits = True
            time.sleep(0.1)
    try:
        for path in leftovers(folder):
            if path != new:
                shutil.rmtree(path)
        yield new
    finally:
        if os.name == "nt":
            held.close()  # or it could not be deleted
        shutil.rmtree(new, ignore_errors=True)
        held.close()
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing came of it

def leftovers(folder):
    """The unfinished folders of killed runs: those in folder, and what earlier versions left beside
    it. A folder that is empty or holds anything else is not one of them."""
    for place, known in ((folder, {*FILES, "lock"}), (folder.parent, set(FILES[:2]))):
        for path in place.glob("tmp????????"):
            if path.is_dir() and known.issuperset(names := os.listdir(path)) and names:
                yield path

# Prepared data

class Tokens:
    """The tokens in a file, read where they are wanted: tokens[start:stop] and windows(). A memory
    map would end the process if the file got shorter; this is a Problem."""

    def __init__(self, path, dtype, count):
        self.path, self.dtype, self.count = path, np.dtype(dtype), count
        with reading(path, "a file of tokens"):
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (it stays open)
        size, expected = os.fstat(self.file.fileno()).st_size, count * self.dtype.itemsize
        if size != expected:
            raise Problem(f"{path} has {size:,} bytes, not {expected:,}")
        # pread is for processes that share the file, too. Windows has none.
        self.read = (functools.partial(os.pread, self.file.fileno()) if hasattr(os, "pread")
                     else self.seek_and_read)

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        start, stop, step = part.indices(self.count)
        return self.windows([start], max(stop - start, 0))[0, ::step]

    def __contains__(self, token):
        parts = (self[i:i + 2 ** 24] for i in range(0, self.count, 2 ** 24))
        return any(np.any(part == token) for part in parts)

    def windows(self, starts, length):
        """(len(starts), length): the tokens from each start on. After the last comes the first."""
        width, rows = self.dtype.itemsize, []
        size, end = length * width, self.count * width
        with reading(self.path, "a file of tokens"):
            for start in np.asarray(starts).tolist():
                row = b""
                while len(row) < size:  # again after the last token, or all that a system can
                    place = (start * width + len(row)) % end
                    more = self.read(min(size - len(row), end - place), place)
                    if not more:
                        raise ValueError("it has become shorter since this run began")
                    row += more
                rows.append(row)
        return np.frombuffer(b"".join(rows), self.dtype).reshape(len(rows), length)

    def seek_and_read(self, size, place):
        self.file.seek(place)
        return self.file.read(size)

    def check(self, vocab_size, sha256=None):
        """Problem: a token beyond the vocabulary, or all of them have another hash than this."""
        digest, largest = hashlib.sha256(), 0
        for start in range(0, self.count, 1 << 20):
            tokens = self[start:start + (1 << 20)]
            digest.update(tokens)
            largest = max(largest, int(tokens.max()))
        if largest >= vocab_size:
            raise Problem(f"{self.path} has a token {largest:,}, and the vocabulary is of "
                          f"{vocab_size:,}")
        if sha256 not in (None, digest.hexdigest()):
            raise Problem(f"{self.path} holds other tokens than were written into it")

class Data(NamedTuple):
    folder: Path
    meta: dict            # what meta.json holds
    train: Tokens         # (train_tokens,) uint16 or uint32
    val: Tokens           # (val_tokens,)
    tokenizer: CharTokenizer    # or a BPETokenizer

def open_data(dataset, data_dir, block_size=0, may_prepare=True, tokenizer=None):
    """The Data of a dataset (as for --dataset, or the name of a folder in data_dir). It is prepared
    by characters if it is missing, or was by characters and its text has changed; unless not
    may_prepare.
    tokenizer: what it must be prepared with instead; this has a folder of its own.
    Problem: it cannot be prepared, is damaged, or has not block_size + 1 tokens in each part."""
    folder = Path(data_dir, dataset_name(dataset))
    if tokenizer is not None:
        folder = in_tokens_of(tokenizer, dataset, folder)
    if may_prepare:
        if any(leftovers(folder)) and os.access(folder, os.W_OK):
            with alone_in(folder):
                pass  # they are gone
        if not is_prepared(folder, dataset):
            if tokenizer is None and (folder / "meta.json").exists():
                meta = read_meta(folder, dataset)
                if meta["tokenizer"]["type"] != "char":
                    flags = meta.get("here", {}).get("flags")
                    flags = {**flags, "dataset": dataset} if flags else flags
                    meta = {**meta, "source": dataset, "here": {"flags": flags}}
                    raise Problem(f"{dataset} is not the text that {folder} was made of; "
                                  + how_to_make(folder, dataset, meta))
            cfg = Config(dataset, data_dir=data_dir, name=folder.name if tokenizer else "")
            prepare(cfg, block_size, tokenizer, again=False)
    return load_data(folder, block_size, dataset)

def in_tokens_of(tokenizer, dataset, folder):
    """The folder of a dataset's tokens by this tokenizer; folder: that of its tokens by any."""
    if (folder / "meta.json").exists():
        meta = read_meta(folder, dataset)
        if not is_text(dataset) or meta["tokenizer"] == tokenizer.to_dict():
            return folder
    digest = sha256_of(json.dumps(tokenizer.to_dict()).encode())
    return folder.with_name(f"{folder.name}-as-{digest[:8]}")

def is_prepared(folder, dataset):
    """Whether folder holds the tokens of this dataset: if it is files, of what they hold today."""
    if not (folder / "meta.json").exists():
        return False
    meta = read_meta(folder, dataset)
    if not is_text(dataset):
        return True
    if dataset in DATASETS or is_url(dataset):
        return meta["source"] == dataset
    sources = find_text(dataset, None)
    if "train_sha256" not in meta and Path(dataset).is_dir():  # earlier versions read these files
        sources = sorted(file for file in Path(dataset).rglob("*.txt") if file.is_file())
    return sha256_of(*sources) == meta["sha256"]

def load_data(folder, block_size=0, dataset=""):
    """The Data in folder, of this dataset if that is known. Problem: it is missing, its files are
    not what was written, or one of them has not block_size + 1 tokens."""
    meta = read_meta(folder, dataset)
    with advice(folder, dataset, meta):
        with reading(folder / "meta.json", "of prepared data"):
            tokenizer = load_tokenizer(meta["tokenizer"])
            if tokenizer.vocab_size != meta["vocab_size"]:
                raise ValueError("the vocabulary has another size")
        parts = {part: Tokens(folder / f"{part}.bin", meta["dtype"], meta[f"{part}_tokens"])
                 for part in ("train", "val")}
        # What has the size and the time of when it was read is not read again.
        here = meta.setdefault("here", {"flags": {}})
        if here.get("checked") != (today := stamps(folder)):
            for part, tokens in parts.items():
                tokens.check(meta["vocab_size"], meta.get(f"{part}_sha256"))
            here["checked"] = today
            with contextlib.suppress(Problem):  # then it is read again the next time
                write_meta(folder, meta)
        del meta["here"]
    for part, tokens in parts.items():
        if len(tokens) <= block_size:
            smaller = f"too few for --block_size={block_size}: take a smaller one, or "
            raise Problem(f"{meta['source']} has only {len(tokens):,} tokens in its {part} part; "
                          f"{smaller if block_size else ''}give a longer text")
    return Data(folder, meta, *parts.values(), tokenizer)

def write_meta(folder, meta):
    common.write_whole(folder / "meta.json", lambda file: file.write(json.dumps(meta).encode()))

def stamps(folder):
    """{part: [size, time of the last change]} of the files of tokens in folder."""
    stats = {part: os.stat(folder / f"{part}.bin") for part in ("train", "val")}
    return {part: [stat.st_size, stat.st_mtime_ns] for part, stat in stats.items()}

def read_meta(folder, dataset):
    """What meta.json in folder holds. Problem: it is missing or damaged."""
    path = folder / "meta.json"
    with advice(folder, dataset, {}), reading(path, "of prepared data"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        common.check_kinds(meta, name=str, source=str, sha256=str, tokenizer=dict, vocab_size=int,
                           train_tokens=int, val_tokens=int, val_bytes=int)
        common.check_kinds(meta["tokenizer"], type=str)
        common.check_kinds(meta.get("here", {"flags": {}}), flags=(dict, type(None)))
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError("its dtype is not one of tokens")
        if min(meta["train_tokens"], meta["val_tokens"], meta["val_bytes"]) < 0:
            raise ValueError("a number in it is negative")
    return meta

@contextlib.contextmanager
def advice(folder, dataset, meta):
    """Adds to a Problem with prepared data how to make them. meta: {} if it is not known."""
    try:
        yield
    except Problem as problem:
        raise Problem(f"{problem}; {how_to_make(folder, dataset, meta)}") from None

def how_to_make(folder, dataset, meta):
    flags = meta.get("here", {}).get("flags", {})
    if flags is None:
        return f"delete {folder}, and the same command prepares it"
    if not flags:  # the default ones, or those of an earlier version, or not known
        source = dataset if dataset and is_text(dataset) else "<name, file, folder or URL>"
        flags = {"dataset": meta.get("source", source), "name": folder.name,
                 "data_dir": folder.parent}
        if meta and meta["tokenizer"]["type"] != "char":
            flags["tokenizer"] = "<the same as before>"
    if Path(flags.get("data_dir", Config.data_dir)) != folder.parent:  # it was moved or copied
        flags = {**flags, "data_dir": folder.parent}
    return f"make it with: {command('prepare_data.py', flags)}"

def command(script, flags):
    """python script --name=value ... as a shell reads it."""
    return " ".join(("python", script, *itertools.starmap(common.as_flag, flags.items())))

def main(cfg, given):
    if "vocab_size" in given and cfg.tokenizer != "bpe":
        raise Problem("--vocab_size goes with --tokenizer=bpe; others have a size of their own")
    flags = {"dataset": prepare(cfg).name}
    if cfg.data_dir != Config.data_dir:
        flags["data_dir"] = cfg.data_dir
    say(f"next: {command('train.py', flags)}")

if __name__ == "__main__":
    common.run(main, Config)
