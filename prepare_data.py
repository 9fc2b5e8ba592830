"""
Turns text into tokens to train on: data/<name>/train.bin, val.bin and meta.json.

python prepare_data.py                                        # pydoc: Python's own manual, offline
python prepare_data.py --dataset=shakespeare                  # also: alice, tinystories (2 GB)
python prepare_data.py --dataset=book.txt --tokenizer=bpe     # your text, a vocabulary made for it
python prepare_data.py --dataset=folder --tokenizer=gpt-neox  # all .txt in it, for mamba-130m
python prepare_data.py --dataset=https://example.org/text.txt --tokenizer=tokenizer.json --name=mine

The first 90 % of the characters train, the last 10 % validate. Text is read in blocks, so memory
does not grow with it.
"""
from __future__ import annotations

import codecs
import contextlib
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
    """Any tokenizer.json of the `tokenizers` package, given as its text."""

    def __init__(self, json_text):
        tokenizers = import_tokenizers()
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # noqa: BLE001 (the package raises nothing narrower)
            raise Problem(f"not a tokenizer.json ({str(error)[:80]})") from None
        self.tokenizer.no_truncation()  # some published files would cut every text at 512 tokens
        self.tokenizer.no_padding()
        ids = self.tokenizer.get_vocab().values()
        self.vocab_size = max(ids, default=-1) + 1  # there may be holes between the ids
        if self.vocab_size == 0:
            raise Problem("a tokenizer.json without tokens")
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, texts, vocab_size, show_progress=False):
        """A byte-level BPE vocabulary, GPT-2's kind: it can spell any text, and has END_OF_TEXT."""
        tokenizers = import_tokenizers()
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        # END_OF_TEXT is a token from the start: pairs shall not go into spelling it out.
        documents = (document for text in texts for document in text.split(END_OF_TEXT))
        # Merging takes a time that is quadratic in the length of a word, so a text without spaces
        # is cut too.
        stretches = (part for text in documents for part in re.split(r"(\w{100})", text))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT],
            initial_alphabet=byte_level.alphabet(), show_progress=show_progress)
        tokenizer.train_from_iterator(stretches, trainer)
        return cls(tokenizer.to_str())

    def encode_stream(self, blocks):
        pieces = cut_between_words(blocks)
        while batch := list(itertools.islice(pieces, 16)):  # they go to all cores at once
            for encoding in self._encode(batch):
                yield np.array(encoding.ids, np.int64)

    def encode(self, text):
        """Tokens of a text. Problem: what is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Problem("the text is not valid UTF-8") from None
        return self._encode([text])[0].ids

    def _encode(self, texts):
        try:
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 (as above: whole words, say, and none for others)
            raise Problem("the tokenizer.json has no tokens for the text "
                          f"({str(error)[:80]})") from None

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_dict(self):
        return {"type": "bpe", "json": self.tokenizer.to_str()}


def import_tokenizers():
    try:
        import tokenizers  # only here: characters need no package
    except ImportError:
        raise Problem("this tokenizer needs a package: pip install tokenizers") from None
    return tokenizers


# Where a text may be cut without changing a token: before the first space after a word, or after a
# lone newline between words. GPT-2's pattern and its successors join a space only to what follows
# it, and a run of whitespace stays whole.
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=\S)")
PIECE = 1 << 15  # characters that a piece has at least: enough to keep a core busy
LONGEST = 1 << 16  # characters that it has at most: without spaces it is cut where it stands


def cut_between_words(blocks):
    """The text in pieces that give the same tokens one by one as in one go."""
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > PIECE:
            cut = CUT.search(rest, start + PIECE, start + LONGEST)
            if cut is None and len(rest) - start < LONGEST:
                break  # such a place may come with the next block
            # A stretch without one must not fill the memory. Where it is cut its tokens may
            # differ, but they still decode to the same text.
            end = cut.end() if cut else start + LONGEST
            yield rest[start:end]
            start = end
        rest = rest[start:]
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
    if tokenizer != "gpt-neox" and not path.is_file():
        raise Problem(f"unknown tokenizer '{tokenizer}': it is char, bpe, gpt-neox or the path of "
                      f"a tokenizer.json{nearest(tokenizer, ('char', 'bpe', 'gpt-neox'))}")
    import_tokenizers()
    if tokenizer == "gpt-neox":
        from mamba_files import hub_file  # only here: it brings torch along
        try:
            path = Path(hub_file("EleutherAI/gpt-neox-20b", "tokenizer.json", cache_dir or None))
        except ConnectionError as error:
            raise Problem(f"{error}; --tokenizer=char and bpe need no network") from None
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise Problem(f"{path} is not a tokenizer.json") from None
    except Problem as problem:
        raise Problem(f"{path} is {problem}") from None


# Texts: where they come from


DATASETS = ("pydoc", "shakespeare", "alice", "tinystories")
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
ALICE = "https://www.gutenberg.org/cache/epub/11/pg11.txt"
WITHOUT_NETWORK = "`python train.py` works without network on the built-in pydoc data"


def find_text(dataset, downloads, cache_dir=None):
    """
    (sources, sources of the validation part), the latter None if the text has no split of its own.
    A source is a path or the bytes themselves. Problem: there is no such text.
    """
    if dataset == "pydoc":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise Problem("this Python comes without pydoc_data; try --dataset=shakespeare or a "
                          "file") from None
        return ["\n\n".join(topics[key] for key in sorted(topics)).encode()], None
    if dataset == "shakespeare":
        sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
        return [download(SHAKESPEARE, downloads / "shakespeare.txt", 1115394, sha256)], None
    if dataset == "alice":
        path = download(ALICE, downloads / "alice.txt")
        text = path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n")
        # without the licence, which would be the whole validation part
        story = re.search(r"\*\*\* ?START OF[^\n]*\n(.*)\*\*\* ?END OF", text, re.DOTALL)
        if not story:
            path.unlink()
            raise Problem(f"{ALICE} gave something else than the book; nothing was kept")
        return [(story[1].strip() + "\n").encode()], None
    if dataset == "tinystories":
        train, val = (tinystories(part, cache_dir) for part in ("train", "valid"))
        return [train], [val]
    if is_url(dataset):
        # the hash keeps apart two URLs that end alike
        digest = hashlib.sha256(dataset.encode()).hexdigest()
        return [download(dataset, downloads / f"{dataset_name(dataset)}-{digest[:8]}.txt")], None
    if dataset and Path(dataset).is_dir():  # Path("") is the current folder
        files = sorted(path for path in Path(dataset).rglob("*.txt") if path.is_file())
        if not files:
            raise Problem(f"{dataset} is a folder without .txt files")
        return files, None
    if Path(dataset).is_file():
        return [Path(dataset)], None
    if Path(dataset).name != dataset or "." in dataset:
        raise Problem(f"no such file or folder: {dataset}")
    raise Problem(f"unknown dataset '{dataset}': it is {', '.join(DATASETS)}, a .txt file, a "
                  f"folder or a URL{nearest(dataset, DATASETS)}")


def tinystories(part, cache_dir):
    """The path of this part of TinyStories: in Hugging Face's cache, or downloaded into it."""
    file = f"TinyStories-{part}.txt"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise Problem("tinystories needs a package: pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download("roneneldan/TinyStories", file, repo_type="dataset",
                                    cache_dir=cache_dir or None))
    except Exception as error:  # no network has many names there
        if getattr(error, "errno", None):  # a full disk, no permission, ...
            raise
        raise Problem(f"cannot download {file} from Hugging Face ({type(error).__name__}); is "
                      f"there a network? {WITHOUT_NETWORK}") from None


PAUSES = (1, 2, 4)  # seconds before a dropped download goes on


def download(url, path, size=None, sha256=None):
    """
    Fetches url to path, unless it is there already, and returns path. It grows as path.part, from
    which a later call goes on, and gets its name only when size (in bytes) and sha256 are right,
    as far as they are known.
    Problem: no network, or it keeps dropping; no such file; its contents are not the expected.
    """
    try:
        import requests  # only here: nothing else needs it
    except ImportError:
        raise Problem(f"{url} has to be downloaded, which needs a package: "
                      "pip install requests") from None
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists() and sha256 in (None, sha256_of(path)):
        return path
    for pause in (*PAUSES, None):
        try:
            if fetch(url, part):
                break
            reason = "the connection dropped"
        except ValueError as error:  # not an address; nonsense in what the server says of the file
            raise Problem(f"cannot download {url}: {error}") from None
        except requests.RequestException as error:
            reason = type(error).__name__
            if isinstance(error, requests.ConnectionError) and not part.exists():
                pause = None  # no network: waiting for it helps nobody
        if pause is None:
            advice = "the same command goes on where it stopped; "
            if not part.exists():
                advice = "is there a network? "
            raise Problem(f"cannot download {url} ({reason}); {advice}{WITHOUT_NETWORK}")
        time.sleep(pause)
    came = part.stat().st_size
    if size not in (None, came) or sha256 not in (None, sha256_of(part)):
        part.unlink()
        raise Problem(f"{url} is not what it should be (size or sha256 differs; {came:,} bytes "
                      "came); nothing was kept")
    os.replace(part, path)
    return path


def fetch(url, part):
    """One attempt to get the rest of the file part. Returns whether it is whole then."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # compressed it would not fit the size and the range
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        sent = answer.headers.get("Content-Range", "")
        start, total = re.match(r"(?:bytes (?:(\d+)-\d+|\*)/(\d+))?", sent).groups()
        if answer.status_code == 416 and have:  # there is nothing after what we have
            whole = int(total or 0) == have
            if not whole:
                part.unlink()  # it came from another file than the one that is there now
            return whole
        if answer.status_code == 200:  # all of it: this server may not know Range
            have, total = 0, answer.headers.get("Content-Length")
        elif answer.status_code != 206 or int(start or 0) != have:
            login = " (a wrong name, or it needs a login)"
            raise Problem(f"{url}: status {answer.status_code} {answer.reason}"
                          f"{login if answer.status_code in (401, 403) else ''}")
        total = int(total) if total else None
        print(f"downloading {url}")
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if have else "wb") as file, progress(total, part.stem, have) as bar:
            for chunk in answer.iter_content(1 << 16):
                bar.update(file.write(chunk))
    return total in (None, part.stat().st_size)


BLOCK = 1 << 20  # bytes read at a time


def sha256_of(*paths):
    """The hash of the contents of these files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while data := file.read(BLOCK):
                digest.update(data)
    return digest.hexdigest()


def read(source, start=0, stop=math.inf, bar=None, digest=None):
    """
    The characters start to stop of a source, exactly as they stand, in blocks. bar and digest are
    told of the bytes. Problem: it is not text.
    """
    name = "the text" if isinstance(source, bytes) else source
    decoder = codecs.getincrementaldecoder("utf-8")()
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        position, data = 0, True
        while data and position < stop:
            data = file.read(BLOCK)
            if b"\0" in data:
                offset = file.tell() - len(data) + data.index(0)
                raise Problem(f"{name} has a NUL byte at offset {offset}: a binary file, or text "
                              "in UTF-16")
            try:
                block = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # error.object begins with what was left of the last block
                offset = file.tell() - len(error.object) + error.start
                raise Problem(f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at "
                              f"offset {offset}; convert it, for example with: iconv -f latin1 "
                              "-t utf-8") from None
            if digest is not None:
                digest.update(data)
            if bar is not None and position >= start:
                bar.update(len(data))
            yield block[max(start - position, 0):max(min(stop - position, len(block)), 0)]
            position += len(block)


# From text to tokens


TRAIN_BPE_ON = 1 << 24  # bytes of text that a vocabulary is trained on, at most
DIFFERENT = 1 << 22  # bytes of different words in it, at most: each takes 100 times as much memory


def prepare(cfg, block_size=0):
    """
    Makes data_dir/<name> as cfg (a Config) says and returns its path. All or nothing: a failure
    leaves what was there.
    Problem: what the person gave is not a text, a tokenizer or a name, or too short for block_size;
    a failed download.
    """
    name = dataset_name(cfg.dataset, cfg.tokenizer, cfg.name)
    folder = Path(cfg.data_dir) / name
    if Path(name).name != name or name == "..":
        raise Problem(f"--name takes the name of a folder, not '{name}'")
    if cfg.tokenizer == "bpe":
        import_tokenizers()  # now, and not after minutes of reading
        if not 257 <= cfg.vocab_size <= TRAIN_BPE_ON:
            raise Problem(f"--vocab_size={cfg.vocab_size} must be at least 257 (256 bytes and "
                          f"{END_OF_TEXT}) and at most {TRAIN_BPE_ON}, the bytes that it is "
                          "trained on")
    elif cfg.tokenizer != "char":
        tokenizer = open_tokenizer(cfg.tokenizer, cfg.cache_dir)
    sources, own_val = find_text(cfg.dataset, Path(cfg.data_dir) / "downloads", cfg.cache_dir)
    everything = sources + (own_val or [])
    size = sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in everything)

    # First pass: is it text, how long is it, which characters does it have?
    digest, seen, lengths = hashlib.sha256(), np.zeros(sys.maxunicode + 1, bool), []
    with progress(size, "reading") as bar:
        for source in everything:
            lengths.append(0)
            for block in read(source, bar=bar, digest=digest):
                seen[code_points(block)] = True
                lengths[-1] += len(block)
    count, chars = sum(lengths), "".join(map(chr, np.flatnonzero(seen)))
    if count == 0:
        raise Problem(f"{cfg.dataset} is empty")
    if count < 10:
        raise Problem(f"{cfg.dataset} has only {count} characters; 10 are needed")
    # The split counts characters, whatever the tokenizer, so that losses per character or byte can
    # be compared.
    split = sum(lengths[:len(sources)]) if own_val else int(count * 0.9)
    train, val = split_at(split, everything, lengths)

    if cfg.tokenizer == "char":
        tokenizer = CharTokenizer(chars)
    elif cfg.tokenizer == "bpe":
        tokenizer = train_bpe(train, size * split / count, cfg.vocab_size)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 65536 else "uint32")
    val_bytes = sum(len(block.encode()) for part in val for block in read(*part))
    meta = {"name": name, "source": cfg.dataset, "sha256": digest.hexdigest(),
            "dtype": dtype.name, "vocab_size": tokenizer.vocab_size,
            "train_chars": split, "val_chars": count - split, "val_bytes": val_bytes,
            "tokenizer": tokenizer.to_dict()}

    # Second pass: the tokens
    verb = "replaced" if (folder / "meta.json").exists() else "wrote"
    with all_or_nothing(folder) as new:
        with progress(size, "encoding") as bar:
            for part, texts in (("train", train), ("val", val)):
                tokens = write_tokens(new / f"{part}.bin", texts, tokenizer, dtype, bar)
                meta[f"{part}_tokens"] = tokens
        check_length(meta, block_size)
        with open(new / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file)
            flush_to_disk(file)
    print(f"{cfg.dataset}: {count:,} characters, {len(chars):,} different ones")
    print(f"tokens: {meta['train_tokens']:,} to train, {meta['val_tokens']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size:,} ({dtype})")
    print(f"{verb} {folder}; next: python train.py --dataset={name}")
    return folder


def split_at(split, sources, lengths):
    """The first `split` characters and those after, as two lists of (source, start, stop)."""
    before, after, begin = [], [], 0
    for source, length in zip(sources, lengths):
        cut = min(max(split - begin, 0), length)
        if cut > 0:
            before.append((source, 0, cut))
        if cut < length:
            after.append((source, cut, length))
        begin += length
    return before, after


def train_bpe(parts, size, vocab_size):
    """A BPETokenizer trained on parts of the text, which have `size` bytes."""
    with progress(size, "training bpe") as bar:
        every = math.ceil(size / TRAIN_BPE_ON)
        pieces, every = pieces_to_learn_from(parts, every, bar)
    on_screen = size > 4e6 and sys.stderr.isatty()
    tokenizer = BPETokenizer.train(pieces, vocab_size, show_progress=on_screen)
    if every > 1:
        print(f"bpe: trained on one in {every} stretches of the text, spread over all of it "
              f"({TRAIN_BPE_ON / 1e6:.0f} MB at most, and {DIFFERENT / 1e6:.0f} MB of different "
              "words, which bounds the memory)")
    if tokenizer.vocab_size < vocab_size:
        print(f"the text is too small for {vocab_size} tokens: the vocabulary has "
              f"{tokenizer.vocab_size}")
    return tokenizer


WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # GPT-2's pattern, near enough to count words


def pieces_to_learn_from(parts, n, bar):
    """(one in n of the pieces of all parts, n); n doubles until their different words are few."""
    pieces = (piece for part in parts for piece in cut_between_words(read(*part, bar)))
    pieces = list(itertools.islice(pieces, 0, None, n))

    def different():
        words = {word for piece in pieces for word in WORD.findall(piece)}
        return sum(len(word.encode()) for word in words)
    while different() > DIFFERENT:
        pieces, n = pieces[::2], 2 * n
    return pieces, n


def write_tokens(path, parts, tokenizer, dtype, bar):
    """
    Writes the tokens of parts, each (source, start, stop), and an end-of-text between two.
    Returns how many.
    """
    with open(path, "wb") as file:
        for i, part in enumerate(parts):
            if i > 0 and tokenizer.end_of_text is not None:
                file.write(np.array(tokenizer.end_of_text, dtype))
            stream = tokenizer.encode_stream(read(*part, bar))
            file.writelines(ids.astype(dtype) for ids in stream)
        flush_to_disk(file)
        return file.tell() // dtype.itemsize


@contextlib.contextmanager
def all_or_nothing(folder):
    """
    A temporary folder for train.bin, val.bin and meta.json. They move into folder when the `with`
    ends without an error, and with one everything is as before.
    """
    made_here = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as new:
            yield Path(new)
            # meta.json moves last: if a crash leaves this half done, load_meta sees that the sizes
            # do not fit.
            for file in ("train.bin", "val.bin", "meta.json"):
                os.replace(Path(new, file), folder / file)
    finally:
        for path in made_here:
            with contextlib.suppress(OSError):  # rmdir spares a folder that holds a file
                path.rmdir()


# Prepared data


class Data(NamedTuple):
    folder: Path
    meta: dict            # what meta.json holds
    train: np.ndarray     # (train_tokens,) uint16 or uint32, mapped from the file
    val: np.ndarray       # (val_tokens,)
    tokenizer: CharTokenizer | BPETokenizer


def open_data(dataset, data_dir, block_size=0, may_prepare=True):
    """
    The Data of a dataset (as for --dataset, or the name of a folder in data_dir). It is prepared
    by characters if it is missing or its text has changed, unless not may_prepare.
    Problem: it cannot be prepared, is damaged, or has not block_size + 1 tokens in each part.
    """
    folder = Path(data_dir, dataset_name(dataset))
    if may_prepare and not is_prepared(folder, dataset):
        prepare(Config(dataset=dataset, data_dir=data_dir), block_size)
    meta = load_meta(folder)
    check_length(meta, block_size)
    train, val = (np.memmap(folder / f"{part}.bin", dtype=meta["dtype"], mode="r")
                  for part in ("train", "val"))
    return Data(folder, meta, train, val, load_tokenizer(meta["tokenizer"]))


def is_prepared(folder, dataset):
    """Whether folder holds the tokens of this dataset: if it is files, of what they hold today."""
    if not (folder / "meta.json").exists():
        return False
    meta = load_meta(folder)
    if dataset in DATASETS or is_url(dataset):
        return meta["source"] == dataset
    if not Path(dataset).exists():
        return True  # the name of a folder that prepare_data.py made
    files, _ = find_text(dataset, None)
    return sha256_of(*files) == meta["sha256"]


def load_meta(folder):
    """The contents of folder/meta.json. Problem: it is missing, or does not fit the .bin files."""
    folder = Path(folder)
    command = ("python prepare_data.py --dataset=<name, file, folder or URL> "
               f"--name={folder.name}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for part in ("train", "val"):
            size = meta[f"{part}_tokens"] * np.dtype(meta["dtype"]).itemsize
            if (folder / f"{part}.bin").stat().st_size != size:
                raise ValueError
        return meta
    except FileNotFoundError as error:
        raise Problem(f"{error.filename} is missing; make it with: {command}") from None
    except (ValueError, KeyError, TypeError):
        raise Problem(f"{folder} is damaged; make it again with: {command}") from None


def check_length(meta, block_size):
    """Problem: one of the two parts has no window of block_size tokens and the one after."""
    for part in ("train", "val"):
        tokens = meta[f"{part}_tokens"]
        if tokens <= block_size:
            advice = "; give a longer text"
            if tokens > 1:
                advice = (f", too few for --block_size={block_size}; give a longer text, or a "
                          f"--block_size below {tokens}")
            raise Problem(f"{meta['source']} has only {tokens} tokens in its {part} part{advice}")


def main(cfg, given):
    if "vocab_size" in given and cfg.tokenizer != "bpe":
        raise Problem("--vocab_size goes with --tokenizer=bpe; other vocabularies have a size of "
                      "their own")
    prepare(cfg)


if __name__ == "__main__":
    run(main, Config)
