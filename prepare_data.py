"""
Turns text into tokens to train on: data/<name>/train.bin, val.bin and meta.json.

python prepare_data.py                                        # pydoc: Python's own manual, offline
python prepare_data.py --dataset=shakespeare                  # also: alice, tinystories (2 GB)
python prepare_data.py --dataset=book.txt --tokenizer=bpe     # your text, a vocabulary made for it
python prepare_data.py --dataset=folder --tokenizer=gpt-neox  # all .txt in it, for mamba-130m
python prepare_data.py --dataset=https://example.org/text.txt --tokenizer=tokenizer.json --name=mine

The first 90 % of the characters train, the last 10 % validate; memory does not grow with the text.
"""
from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Problem, dataset_name, flag, flush_to_disk, is_url, nearest, progress, run


@dataclass
class Config:
    dataset: str = flag("pydoc", "pydoc, shakespeare, alice, tinystories, a .txt file, a folder of "
                        "them, or a URL")
    tokenizer: str = flag("char", "char, bpe (trained on the text), gpt-neox, or a tokenizer.json")
    vocab_size: int = flag(4096, "tokens of a vocabulary trained here (bpe)")
    data_dir: str = flag("data", "folder of all prepared data, and of downloaded texts")
    cache_dir: str = flag("", "for gpt-neox and tinystories; by default Hugging Face's own cache")
    name: str = flag("", "folder under data_dir; by default the names of dataset and tokenizer")

# Tokenizers: encode(text) -> ids, decode(ids) -> text, encode_stream(blocks of text) -> arrays of
# ids, vocab_size, end_of_text (the id between two documents, or None), to_dict() for meta.json
class CharTokenizer:
    """One token per character."""
    end_of_text = None

    def __init__(self, chars):
        self.chars, self.vocab_size = chars, len(chars)
        self.table = np.full(sys.maxunicode + 1, -1, np.int32)  # code point -> token
        self.table[code_points(chars)] = np.arange(len(chars))

    def encode_stream(self, blocks):
        for block in blocks:
            ids = self.table[code_points(block)]
            if ids.min(initial=0) < 0:
                raise Problem(f"character {block[ids.argmin()]!r} is not in this model's "
                              f"vocabulary ({self.vocab_size} characters)")
            yield ids

    def encode(self, text):
        """Tokens of a text. Problem: a character outside the vocabulary."""
        return next(self.encode_stream([text])).tolist()

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

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

    def encode_stream(self, blocks):
        pieces = cut_between_words(blocks)
        while batch := list(itertools.islice(pieces, 16)):  # they go to all cores at once
            for encoding in self._encode(batch):
                yield np.array(encoding.ids, np.int64)

    def encode(self, text):
        """Tokens of a text. Problem: there are none for it, or it is not valid Unicode."""
        return self._encode([text])[0].ids

    def _encode(self, texts):
        try:
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 (as above: whole words, say, and none for others)
            raise Problem("the tokenizer.json has no tokens for the text, or that is not valid "
                          f"Unicode ({error})") from None

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

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
    """The tokenizer whose to_dict() this was, from meta.json or a checkpoint."""
    if saved["type"] == "char":
        return CharTokenizer(saved["chars"])
    return BPETokenizer(saved["json"])

def open_tokenizer(tokenizer, cache_dir=None):
    """The tokenizer that --tokenizer names: gpt-neox or the path of a tokenizer.json."""
    path = Path(tokenizer)
    if tokenizer == "gpt-neox":
        from mamba_files import hub_file  # only here: it brings torch along
        try:
            path = hub_file("EleutherAI/gpt-neox-20b", "tokenizer.json", cache_dir)
        except ConnectionError as error:
            raise Problem(f"{error}; --tokenizer=char and bpe need no network") from None
    elif not path.is_file():
        raise Problem(f"unknown tokenizer '{tokenizer}': it is char, bpe, gpt-neox or the path of "
                      f"a tokenizer.json{nearest(tokenizer, ('char', 'bpe', 'gpt-neox'))}")
    # what is not UTF-8 becomes what no tokenizer.json may hold, and is refused as such
    return BPETokenizer(path.read_text(encoding="utf-8", errors="surrogateescape"), path)

# Texts: where they come from

DATASETS = ("pydoc", "shakespeare", "alice", "tinystories")
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ALICE = "https://www.gutenberg.org/cache/epub/11/pg11.txt"
WITHOUT_NETWORK = "`python train.py` works without network on the built-in pydoc data"

def find_text(dataset, downloads, cache_dir=None):
    """The sources of a text, each a path or the bytes themselves. Problem: there is no such text.
    downloads: the folder for what comes from a URL; cache_dir: for what Hugging Face has."""
    path = Path(dataset)
    if dataset == "pydoc":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise Problem("this Python comes without pydoc_data: give a --dataset") from None
        return ["\n\n".join(topics[key] for key in sorted(topics)).encode()]
    if dataset == "shakespeare":
        return [download(SHAKESPEARE, downloads / "shakespeare.txt", SHAKESPEARE_SHA256)]
    if dataset == "alice":
        path = download(ALICE, downloads / "alice.txt")
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        # without the licence, which would be the whole validation part
        story = re.search(r"\*\*\* ?START OF[^\n]*\n(.*)\*\*\* ?END OF", text, re.DOTALL)
        if not story:
            path.unlink()
            raise Problem(f"{ALICE} gave something else than the book; nothing was kept")
        return [(story[1].strip() + "\n").encode()]
    if dataset == "tinystories":
        return tinystories(cache_dir)
    if is_url(dataset):
        # the hash keeps apart two URLs that end alike
        digest = hashlib.sha256(dataset.encode()).hexdigest()
        return [download(dataset, downloads / f"{dataset_name(dataset)}-{digest[:8]}.txt")]
    if path.is_file():
        return [path]
    if dataset and path.is_dir():  # Path("") is the current folder
        if files := sorted(file for file in path.rglob("*.txt") if file.is_file()):
            return files
        raise Problem(f"{dataset} is a folder without .txt files")
    raise Problem(f"unknown dataset '{dataset}', and no such file or folder: it is "
                  f"{', '.join(DATASETS)}, a .txt file, a folder or a URL"
                  f"{nearest(dataset, DATASETS)}")

def tinystories(cache_dir):
    """Its two files, to train and to validate: in Hugging Face's cache, or downloaded into it."""
    from huggingface_hub import hf_hub_download
    files = (f"TinyStories-{part}.txt" for part in ("train", "valid"))
    try:
        return [Path(hf_hub_download("roneneldan/TinyStories", file, repo_type="dataset",
                                     cache_dir=cache_dir or None)) for file in files]
    except Exception as error:  # no network has many names there
        if getattr(error, "errno", None):  # a full disk, no permission, ...
            raise
        raise Problem(f"cannot download TinyStories from Hugging Face ({type(error).__name__}): "
                      f"is there a network? {WITHOUT_NETWORK}") from None

PAUSES = (1, 2, 4)  # seconds before a dropped download goes on

def download(url, path, sha256=None):
    """Fetches url to path, unless it is there already, and returns path. It grows as path.part,
    from which a later call goes on, and gets its name when it is whole and sha256, if known, right.
    Problem: no network, or it keeps dropping; no such file; not what it should be."""
    import requests  # only here: nothing else needs it
    if path.exists() and sha256 in (None, sha256_of(path)):
        return path
    part = path.with_name(path.name + ".part")
    for pause in (*PAUSES, None):
        try:
            fetch(url, part)
            break
        except ValueError as error:  # not an address; nonsense in what the server says of the file
            raise Problem(f"cannot download {url}: {error}") from None
        except requests.RequestException as error:
            # without a network waiting helps nobody
            no_network = isinstance(error, requests.ConnectionError) and not part.exists()
            if no_network or pause is None:
                raise Problem(f"cannot download {url} ({type(error).__name__}): is there a network?"
                              f" the same command goes on; {WITHOUT_NETWORK}") from None
            time.sleep(pause)
    if sha256 not in (None, sha256_of(part)):
        part.unlink()
        raise Problem(f"{url} is not what it should be (its sha256 differs); nothing was kept")
    os.replace(part, path)
    return path

def fetch(url, part):
    """Adds to the file part what it lacks. requests.RequestException: this attempt failed."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity",  # compressed it would not fit the size and the range
               "Range": f"bytes={have}-" if have else None}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        sent = answer.headers.get("Content-Range", "")
        if answer.status_code == 416 and have:  # nothing comes after it: was it of another file?
            part.unlink()
            return fetch(url, part)
        if answer.status_code == 200:
            have = 0  # all of it comes: this server may not know Range
        elif answer.status_code != 206 or not sent.startswith(f"bytes {have}-"):
            raise Problem(f"{url}: status {answer.status_code} {answer.reason}")
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        print(f"downloading {url}")
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if have else "wb") as file, progress(total, part.stem, have) as bar:
            for chunk in answer.iter_content(1 << 16):
                bar.update(file.write(chunk))
    if total not in (None, part.stat().st_size):
        raise requests.ConnectionError

BLOCK = 1 << 20  # bytes read at a time

def open_source(source):
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")

def sha256_of(*sources):
    """The hash of the contents of these sources, one after the other."""
    digest = hashlib.sha256()
    for source in sources:
        with open_source(source) as file:
            while data := file.read(BLOCK):
                digest.update(data)
    return digest.hexdigest()

def read(source, start=0, stop=math.inf, bar=None):
    """The characters start to stop of a source, exactly as they stand, in blocks. bar is told of
    the bytes. Problem: it is not text."""
    name = "the text" if isinstance(source, bytes) else source
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_source(source) as file:
        position, data = 0, True
        while data and position < stop:
            data = file.read(BLOCK)
            if b"\0" in data:
                offset = file.tell() - len(data) + data.index(0)
                raise Problem(f"{name} has a NUL byte at offset {offset}: binary, or UTF-16 text")
            try:
                block = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # error.object begins with what was left of the last block
                offset = file.tell() - len(error.object) + error.start
                byte = f"0x{error.object[error.start]:02x}"
                raise Problem(f"{name} is not UTF-8: byte {byte} at offset {offset}; convert it, "
                              "for example with: iconv -f latin1 -t utf-8") from None
            if bar is not None and position >= start:
                bar.update(len(data))
            yield block[max(start - position, 0):max(min(stop - position, len(block)), 0)]
            position += len(block)

# From text to tokens

TRAIN_BPE_ON = 1 << 24  # bytes of text that a vocabulary is trained on, at most
DIFFERENT = 1 << 22  # bytes of different words in it, at most: each takes 100 times as much memory

def prepare(cfg, block_size=0):
    """Makes data_dir/<name> as cfg (a Config) says and returns its path; a failure leaves what was
    there. Problem: what is given is not a text, a tokenizer or a name; the text is too short for
    block_size; a download failed."""
    name = dataset_name(cfg.dataset, cfg.tokenizer, cfg.name)
    folder = Path(cfg.data_dir) / name
    if Path(name).name != name or name == "..":
        raise Problem(f"--name takes the name of a folder, not '{name}'")
    if cfg.tokenizer == "bpe":
        import tokenizers  # noqa: F401 (if it is missing, that is said before minutes of reading)
        if not 257 <= cfg.vocab_size <= TRAIN_BPE_ON:
            raise Problem(f"--vocab_size={cfg.vocab_size} must be at least 257 (256 bytes and "
                          f"{END_OF_TEXT}) and at most {TRAIN_BPE_ON}")
    elif cfg.tokenizer != "char":
        tokenizer = open_tokenizer(cfg.tokenizer, cfg.cache_dir)
    sources = find_text(cfg.dataset, Path(cfg.data_dir, "downloads"), cfg.cache_dir)
    size = sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in sources)

    # First pass: is it text, how long is it, which characters does it have?
    seen, lengths = np.zeros(sys.maxunicode + 1, bool), []
    with progress(size, "reading") as bar:
        for source in sources:
            lengths.append(0)
            for block in read(source, bar=bar):
                seen[code_points(block)] = True
                lengths[-1] += len(block)
    count, chars = sum(lengths), "".join(map(chr, np.flatnonzero(seen)))
    if count < 10:
        only = f"has only {count} characters; 10 are needed" if count else "is empty"
        raise Problem(f"{cfg.dataset} {only}")

    # The split counts characters, whatever the tokenizer, so that losses per character or byte can
    # be compared. TinyStories comes split. What stands before the cut in each source trains.
    split = lengths[0] if cfg.dataset == "tinystories" else int(count * 0.9)
    starts = np.cumsum(lengths) - lengths
    cuts = np.clip(split - starts, 0, lengths).tolist()
    train = [(source, 0, cut) for source, cut in zip(sources, cuts) if cut > 0]
    val = [(source, cut, n) for source, cut, n in zip(sources, cuts, lengths) if cut < n]

    if cfg.tokenizer == "char":
        tokenizer = CharTokenizer(chars)
    elif cfg.tokenizer == "bpe":
        tokenizer = train_bpe(train, size * split / count, cfg.vocab_size)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 65536 else "uint32")
    val_bytes = sum(len(block.encode()) for part in val for block in read(*part))
    meta = {"name": name, "source": cfg.dataset, "sha256": sha256_of(*sources),
            "dtype": dtype.name, "vocab_size": tokenizer.vocab_size,
            "train_chars": split, "val_chars": count - split, "val_bytes": val_bytes,
            "tokenizer": tokenizer.to_dict()}

    # Second pass: the tokens, in a temporary folder. From there all files move, or none.
    verb = "replaced" if (folder / "meta.json").exists() else "wrote"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder if folder.exists() else folder.parent) as new:
        with progress(size, "encoding") as bar:
            for part, texts in (("train", train), ("val", val)):
                tokens = write_tokens(Path(new, f"{part}.bin"), texts, tokenizer, dtype, bar)
                meta[f"{part}_tokens"] = tokens
        with open(Path(new, "meta.json"), "w", encoding="utf-8") as file:
            json.dump(meta, file)
            flush_to_disk(file)
        load_data(Path(new), block_size)  # a text that is too short ends here
        folder.mkdir(exist_ok=True)
        # meta.json moves last: if a crash comes between, load_data sees that the sizes do not fit
        for file in ("train.bin", "val.bin", "meta.json"):
            os.replace(Path(new, file), folder / file)
    print(f"{cfg.dataset}: {count:,} characters, {len(chars):,} different ones")
    print(f"tokens: {meta['train_tokens']:,} to train, {meta['val_tokens']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size:,} ({dtype})")
    print(f"{verb} {folder}; next: python train.py --dataset={name}")
    return folder

def train_bpe(parts, size, vocab_size):
    """A BPETokenizer trained on parts of the text, which have `size` bytes."""
    with progress(size, "training bpe") as bar:
        pieces, every = pieces_to_learn_from(parts, math.ceil(size / TRAIN_BPE_ON), bar)
    on_screen = size > 4e6 and sys.stderr.isatty()
    tokenizer = BPETokenizer.train(pieces, vocab_size, show_progress=on_screen)
    if every > 1:
        print(f"bpe: trained on one in {every} stretches of the text, spread over all of it")
    if tokenizer.vocab_size < vocab_size:
        print(f"the text is too small for {vocab_size} tokens: it gave {tokenizer.vocab_size}")
    return tokenizer

WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # GPT-2's pattern, near enough to count words

def pieces_to_learn_from(parts, n, bar):
    """(one in n of the pieces of all parts, n); n doubles until their different words are few."""
    pieces = (piece for part in parts for piece in cut_between_words(read(*part, bar)))
    pieces = list(itertools.islice(pieces, 0, None, n))
    while True:
        words = {word for piece in pieces for word in WORD.findall(piece)}
        if sum(len(word.encode()) for word in words) <= DIFFERENT:
            return pieces, n
        pieces, n = pieces[::2], 2 * n

def write_tokens(path, parts, tokenizer, dtype, bar):
    """Writes the tokens of parts, each (source, start, stop), and end_of_text between two of them.
    Returns how many."""
    with open(path, "wb") as file:
        for i, part in enumerate(parts):
            if i > 0 and tokenizer.end_of_text is not None:
                file.write(np.array(tokenizer.end_of_text, dtype))
            stream = tokenizer.encode_stream(read(*part, bar))
            file.writelines(ids.astype(dtype) for ids in stream)
        flush_to_disk(file)
        return file.tell() // dtype.itemsize

# Prepared data

class Data(NamedTuple):
    folder: Path
    meta: dict            # what meta.json holds
    train: np.ndarray     # (train_tokens,) uint16 or uint32, mapped from the file
    val: np.ndarray       # (val_tokens,)
    tokenizer: CharTokenizer | BPETokenizer

def open_data(dataset, data_dir, block_size=0, may_prepare=True):
    """The Data of a dataset (as for --dataset, or the name of a folder in data_dir). It is prepared
    by characters if it is missing or its text has changed, unless not may_prepare.
    Problem: it cannot be prepared, is damaged, or has not block_size + 1 tokens in each part."""
    folder = Path(data_dir, dataset_name(dataset))
    if may_prepare and not is_prepared(folder, dataset):
        prepare(Config(dataset=dataset, data_dir=data_dir), block_size)
    return load_data(folder, block_size)

def is_prepared(folder, dataset):
    """Whether folder holds the tokens of this dataset: if it is files, of what they hold today."""
    if not (folder / "meta.json").exists():
        return False
    meta = load_data(folder).meta
    if dataset in DATASETS or is_url(dataset):
        return meta["source"] == dataset
    # what does not exist is the name of a folder that prepare_data.py made
    return not Path(dataset).exists() or sha256_of(*find_text(dataset, None)) == meta["sha256"]

def load_data(folder, block_size=0):
    """The Data in folder. Problem: it is missing, its files do not fit each other, or one of the
    parts has no window of block_size tokens and the one after."""
    try:
        meta, parts = json.loads((folder / "meta.json").read_text(encoding="utf-8")), []
        for part in ("train", "val"):
            tokens = meta[f"{part}_tokens"]
            if tokens <= block_size:
                smaller = f"too few for --block_size={block_size}: take a smaller one, or "
                raise Problem(f"{meta['source']} has only {tokens} tokens in its {part} part; "
                              f"{smaller if block_size else ''}give a longer text")
            parts.append(np.memmap(folder / f"{part}.bin", meta["dtype"], mode="r"))
            if len(parts[-1]) != tokens:
                raise ValueError
        return Data(folder, meta, *parts, load_tokenizer(meta["tokenizer"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise Problem(f"{folder} is missing or damaged; make it with: python prepare_data.py "
                      f"--dataset=<name, file, folder or URL> --name={folder.name}") from None

def main(cfg, given):
    if "vocab_size" in given and cfg.tokenizer != "bpe":
        raise Problem("--vocab_size goes with --tokenizer=bpe; others have a size of their own")
    prepare(cfg)

if __name__ == "__main__":
    run(main, Config)
