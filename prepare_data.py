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
import math
import os
import re
import shutil
import sys
import time
import unicodedata
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

# Tokenizers: encode(text) -> ids, decode(ids) -> text, encode_stream(blocks of text) -> arrays of
# ids, vocab_size, end_of_text (the id between two documents, or None), to_dict() for meta.json.
# allow_special: special tokens that are spelled out in the text are those tokens.
# lost: a Counter, to which the characters are added that the tokenizer cannot spell.
class CharTokenizer:
    """One token per character."""
    end_of_text = None

    def __init__(self, chars):
        if len(set(chars)) != len(chars):
            raise ValueError("a character stands twice in the alphabet")
        self.chars, self.vocab_size = chars, len(chars)
        self.table = np.full(sys.maxunicode + 1, -1, np.int32)  # code point -> token
        self.table[code_points(chars)] = np.arange(len(chars))

    def encode_stream(self, blocks, allow_special=False, lost=None):
        for block in blocks:
            codes = code_points(block)
            ids = self.table[codes]
            if ids.min(initial=0) < 0:
                if lost is None:
                    raise Problem(f"character {block[ids.argmin()]!r} is not in this model's "
                                  f"vocabulary ({self.vocab_size:,} characters)")
                lost.update(map(chr, codes[ids < 0]))
            yield ids[ids >= 0]

    def encode(self, text, allow_special=False):
        """Tokens of a text. Problem: a character outside the vocabulary."""
        return next(self.encode_stream([text])).tolist()

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def spells(self, text):
        """Whether all characters of a text are in the alphabet."""
        return bool((self.table[code_points(text)] >= 0).all())

    def ids(self):
        """{token: id}"""
        return {character: i for i, character in enumerate(self.chars)}

    def to_dict(self):
        return {"type": "char", "chars": self.chars}

def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")

END_OF_TEXT = "<|endoftext|>"

class BPETokenizer:
    """What a tokenizer.json says, by the package `tokenizers`; name is what errors call it."""

    def __init__(self, json_text, name="the saved tokenizer"):
        from tokenizers import Tokenizer  # only where it is used: characters do without
        try:
            self.tokenizer = Tokenizer.from_str(json_text)
        except Exception as error:  # noqa: BLE001 (the package raises nothing narrower)
            raise Problem(f"{name} is not a tokenizer.json ({str(error)[:80]})") from None
        self.tokenizer.no_truncation()  # some published files would cut every text at 512 tokens
        self.tokenizer.no_padding()
        ids = self.tokenizer.get_vocab().values()
        self.vocab_size = max(ids, default=-1) + 1  # there may be holes between the ids
        if self.vocab_size == 0:
            raise Problem(f"{name} is a tokenizer.json without tokens")
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, texts, vocab_size, show_progress=False):
        """A byte-level BPE vocabulary, GPT-2's kind: it can spell any text, and has END_OF_TEXT."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT],
            initial_alphabet=byte_level.alphabet(), show_progress=show_progress)
        # END_OF_TEXT is a token from the start: pairs shall not go into spelling it out. And
        # merging takes a time that is quadratic in the length of a word, so long ones are cut.
        cut = re.compile(re.escape(END_OF_TEXT) + r"|(\w{100})")
        stretches = (part for text in texts for part in cut.split(text) if part)
        tokenizer.train_from_iterator(stretches, trainer)
        return cls(tokenizer.to_str())

    def encode_stream(self, blocks, allow_special=False, lost=None):
        pieces = cut_between_words(blocks)
        while batch := list(itertools.islice(pieces, 16)):  # they go to all cores at once
            texts = [piece for piece in batch if piece is not BREAK]
            encodings = iter(self._encode(texts, allow_special))
            for piece in batch:
                ids = [self.end_of_text] if piece is BREAK else next(encodings).ids
                if lost is not None and piece is not BREAK:
                    lost.update(self.not_spelled(piece, ids))
                yield np.array(ids, np.int64)

    def encode(self, text, allow_special=False):
        """Tokens of a text. Problem: there are none for it, or it is not valid Unicode."""
        return self._encode([text], allow_special)[0].ids

    def _encode(self, texts, allow_special):
        self.tokenizer.encode_special_tokens = not allow_special
        try:
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 (as above: whole words, say, and none for others)
            raise Problem("the tokenizer.json has no tokens for the text, or that is not valid "
                          f"Unicode ({error})") from None

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def not_spelled(self, text, ids):
        """A Counter of the characters of a text that do not come back when its ids are decoded.
        Two spellings of the same character, and a space at an end, make no difference."""
        known = [i for i in ids if i != self.unknown]
        before, after = (unicodedata.normalize("NFC", t).strip(" ")
                         for t in (text, self.decode(known)))
        if before == after:
            return Counter()
        before, after = Counter(before), Counter(after)
        return before - after or after - before

    def spells(self, text):
        """Whether all of a text comes back when its tokens are decoded."""
        try:
            return not self.not_spelled(text, self.encode(text))
        except Problem:  # it has no tokens for a part of it
            return False

    @functools.cached_property
    def unknown(self):
        """The token that stands for what has none, or None."""
        model = json.loads(self.tokenizer.to_str())["model"]
        return model.get("unk_id", self.tokenizer.token_to_id(model.get("unk_token") or ""))

    def ids(self):
        """{token: id}"""
        return self.tokenizer.get_vocab()

    def to_dict(self):
        return {"type": "bpe", "json": self.tokenizer.to_str()}

# Where a text may be cut without changing a token: before the first space after a word, or after a
# lone newline between words. GPT-2's pattern and its successors join a space only to what follows
# it, and a run of whitespace stays whole.
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=\S)")
PIECE = 1 << 15  # characters that a piece has at least: enough to keep a core busy
LONGEST = 1 << 16  # characters that it has at most, or a text without spaces would fill the memory

def cut_between_words(blocks):
    """The text in pieces that give the same tokens one by one as in one go. Only where LONGEST cuts
    they may be others, which still decode to the text."""
    rest = ""
    for block in blocks:
        if block is BREAK:
            yield from filter(None, (rest,))
            rest = ""
            yield BREAK
            continue
        rest += block
        while len(rest) > PIECE:
            cut = CUT.search(rest, PIECE, LONGEST)
            if cut is None and len(rest) < LONGEST:
                break  # such a place may come with the next block
            end = cut.end() if cut else LONGEST
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest

def load_tokenizer(saved):
    """The tokenizer whose to_dict() this was, from meta.json or a checkpoint. Any error: it is not
    what to_dict() gives."""
    if saved["type"] not in ("char", "bpe"):
        raise ValueError("an unknown kind of tokenizer")
    return CharTokenizer(saved["chars"]) if saved["type"] == "char" else BPETokenizer(saved["json"])

def open_tokenizer(tokenizer, cache_dir=None):
    """The tokenizer that --tokenizer names: gpt-neox or the path of a tokenizer.json."""
    path = Path(tokenizer)
    if tokenizer == "gpt-neox":
        from mamba_files import NEOX, hub_file  # only here: it brings torch along
        try:
            path = hub_file(NEOX, "tokenizer.json", cache_dir)
        except ConnectionError as error:
            raise Problem(f"{error}; --tokenizer=char and bpe need no network") from None
    elif not path.is_file():
        raise Problem(f"unknown tokenizer '{tokenizer}': it is char, bpe, gpt-neox or the path of "
                      f"a tokenizer.json{common.nearest(tokenizer, ('char', 'bpe', 'gpt-neox'))}")
    # what is not UTF-8 becomes what no tokenizer.json may hold, and is refused as such
    return BPETokenizer(path.read_text(encoding="utf-8", errors="surrogateescape"), path)

# From text to tokens

TRAIN_BPE_ON = 1 << 24  # bytes of text that a vocabulary is trained on, at most
DIFFERENT = 1 << 22  # bytes of different words in it, at most: each takes 100 times as much memory
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
    if cfg.tokenizer == "bpe":
        import tokenizers  # noqa: F401 (if it is missing, that is said before minutes of reading)
        if not 257 <= cfg.vocab_size <= TRAIN_BPE_ON:
            raise Problem(f"--vocab_size={cfg.vocab_size} must be at least 257 (256 bytes and "
                          f"{END_OF_TEXT}) and at most {TRAIN_BPE_ON}")
    given = tokenizer
    if cfg.tokenizer not in ("char", "bpe"):
        tokenizer = open_tokenizer(cfg.tokenizer, cfg.cache_dir)
    noticed = {}
    sources = find_text(cfg.dataset, Path(cfg.data_dir, "downloads"), cfg.cache_dir, noticed)
    with alone_in(folder) as new:
        if not again and is_prepared(folder, cfg.dataset):
            return folder  # by another process, while this one waited
        meta = {"name": name, "source": cfg.dataset, "sha256": sha256_of(*sources),
                **write_tokens(new, cfg, sources, tokenizer, given, noticed)}
        # of this folder alone, and not for the checkpoint of a run
        flags = {key: str(v) for key, v in vars(cfg).items() if v != getattr(Config, key)}
        meta["here"] = {"flags": None if given else flags, "checked": stamps(new)}
        write_meta(new, meta)
        load_data(new, block_size)  # a text that is too short ends here
        verb = "replaced" if (folder / "meta.json").exists() else "wrote"
        # meta.json moves last: if a crash comes between, load_data sees that they do not fit
        for file in FILES:
            os.replace(new / file, folder / file)
    say(f"tokens: {meta['train_tokens']:,} to train, {meta['val_tokens']:,} to validate, "
        f"vocabulary {meta['vocab_size']:,} ({meta['dtype']})\n{verb} {folder}")
    return folder

def write_tokens(folder, cfg, sources, tokenizer, given, noticed):
    """Writes train.bin and val.bin into a folder and returns what meta.json says of them."""
    # A tokenizer that is made for this text is not there yet.
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
        say_or_refuse(cfg, given, of_all, count)
        meta["val_bytes"] -= sum(len(c.encode()) * n for c, n in lost["val"].items())
    return meta

def say_or_refuse(cfg, given, lost, count):
    """Says which of `count` characters are lost to a tokenizer that was given. Problem: these are
    more than half, or the tokenizer is one that a person chose."""
    total = sum(lost.values())
    share = f"{total:,} of its {count:,} characters ({total / count:.2%})"
    most = ", ".join(f"{char!r} ({n:,})" for char, n in lost.most_common(10))
    most += ", ..." * (len(lost) > 10)
    if not given:
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

def train_bpe(part, size, share, vocab_size):
    """A BPETokenizer trained on part("train"), which is this share of a text of `size` bytes."""
    with progress(size, "training bpe") as bar:
        n = math.ceil(size * share / TRAIN_BPE_ON)
        pieces, every = pieces_to_learn_from(part("train", bar), n)
    on_screen = size > 4e6 and sys.stderr.isatty()
    tokenizer = BPETokenizer.train(pieces, vocab_size, show_progress=on_screen)
    if every > 1:
        say(f"bpe: trained on one in {every:,} stretches of the text, spread over all of it")
    if tokenizer.vocab_size < vocab_size:
        say(f"the text is too small for {vocab_size:,} tokens: it gave {tokenizer.vocab_size:,}")
    return tokenizer

WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # GPT-2's pattern, near enough to count words

def pieces_to_learn_from(blocks, n):
    """(one in n of the pieces of a text, n); n doubles until their different words are few."""
    pieces = filter(None, cut_between_words(blocks))
    pieces = list(itertools.islice(pieces, 0, None, n))
    while True:
        words = {word for piece in pieces for word in WORD.findall(piece)}
        if sum(len(word.encode()) for word in words) <= DIFFERENT:
            return pieces, n
        pieces, n = pieces[::2], 2 * n

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
    it. A folder that holds anything else is not one of them."""
    for place, known in ((folder, {*FILES, "lock"}), (folder.parent, set(FILES[:2]))):
        for path in place.glob("tmp????????"):
            if path.is_dir() and known.issuperset(os.listdir(path)):
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

    def windows(self, starts, length):
        """(len(starts), length): the tokens from each start on. After the last comes the first."""
        width, rows = self.dtype.itemsize, []
        size, end = length * width, self.count * width
        with reading(self.path, "a file of tokens"):
            for start in np.asarray(starts).tolist():
                place = start * width % end
                row = self.read(min(size, end - place), place)
                while len(row) < size:  # the last token has been read, or all that a system can
                    here = (place + len(row)) % end
                    more = self.read(min(size - len(row), end - here), here)
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
    tokenizer: CharTokenizer | BPETokenizer

def open_data(dataset, data_dir, block_size=0, may_prepare=True, tokenizer=None):
    """The Data of a dataset (as for --dataset, or the name of a folder in data_dir). It is prepared
    by characters if it is missing or its text has changed, unless not may_prepare.
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
