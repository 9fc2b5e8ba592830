"""
Turns text into tokens to train on: data/<name>/train.bin, val.bin and meta.json.

python prepare_data.py                                        # pydoc: Python's own manual, needs no network
python prepare_data.py --dataset=shakespeare                  # also: alice, tinystories (2 GB)
python prepare_data.py --dataset=book.txt --tokenizer=bpe     # your own text, a vocabulary trained on it
python prepare_data.py --dataset=folder --tokenizer=gpt-neox  # all .txt below it, the vocabulary of mamba-130m
python prepare_data.py --dataset=https://example.org/text.txt --tokenizer=tokenizer.json --name=mine

The first 90 % of the characters train, the last 10 % validate. Text is read in blocks, so memory does not grow with it.
"""
from __future__ import annotations

import codecs
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import urllib.parse
from pathlib import Path

import numpy as np
from tqdm import tqdm

BLOCK = 1 << 20  # bytes read at a time
PIECE = 1 << 15  # characters that BPE encodes at a time; 16 pieces go to all cores at once
LONGEST = 1 << 16  # BPE cuts a stretch longer than this wherever it stands
TRAIN_BPE_ON = 1 << 24  # bytes of text at most, and
DIFFERENT = 1 << 22  # bytes of different words: training keeps each of them, in 100 times its size
END_OF_TEXT = "<|endoftext|>"


class Problem(Exception):
    """Something the person can put right: shown as one line, without a traceback."""


def run(main, Config):
    """Calls main(cfg, given) with the flags of the command line; a Problem ends it with one line and status 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        # a console without a character still shows the others; what a pipe does not take fails where it is printed
        getattr(sys, name).reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the scripts set aside while they import torch
    # Under torchrun what goes wrong with the flags or the data does so in all processes, and one of each machine tells it.
    tells = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return main(*parse_flags(Config))
    except Problem as problem:
        message, status = tells and str(problem), 2
    except (MemoryError, RuntimeError) as error:
        if "by peer" in str(error):  # how gloo says that another process has ended
            message, status = tells and "another process of this run has ended", 2
        elif isinstance(error, MemoryError) or "memory" in str(error):  # how torch says it
            message, status = "not enough memory; try a smaller model, --batch_size or --block_size", 2
        else:
            raise
    except OSError as error:  # disk full, no permission, ...
        message, status = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part), 2
        if nobody_reads(error):
            message, status = None, 141
    except KeyboardInterrupt:
        message, status = tells and "interrupted", 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # from here on Ctrl-C ends Python at once, without a traceback
    if message:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def nobody_reads(error):
    """Whether this error is that of a pipe with nobody at its end (| head). If so, what stdout is still given gets lost."""
    gone = isinstance(error, BrokenPipeError) or (os.name, error.errno, error.filename) == ("nt", errno.EINVAL, None)
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again where it flushes at its end
    return gone


def flag(default, help):
    """A field of a Config: its default and its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help})


KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "text"}
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_flags(Config, argv=None):
    """Reads --key=value, --key value and, for a bool, --key alone. Returns (Config, dict of the flags given)."""
    words = list(sys.argv[1:] if argv is None else argv)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    types = {name: field.type.split(" | ") for name, field in fields.items()}  # "int | None" -> ["int", "None"]
    if "--help" in words or "-h" in words:
        print(f"{(sys.modules[Config.__module__].__doc__ or '').strip()}\n")
        for name, field in fields.items():
            print(f"  --{f'{name}={field.default}':<28} {types[name][0]:<6} {field.metadata.get('help', '')}")
        sys.exit(0)
    given = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise Problem(f"unexpected argument '{name}'; flags are written --name=value"
                          + f", as --{next(iter(fields))}={name}" * (name[:1] != "-"))
        if name[2:] not in fields:
            raise Problem(f"unknown flag {name}" + (nearest(name[2:], fields, "--") or "; --help lists those there are"))
        kind, *optional = types[name[2:]]
        if not equals:
            if kind == "bool" and not (words and words[0].lower() in BOOLS):
                value = "True"
            elif not words or words[0].startswith("--"):
                raise Problem(f"{name} needs a value: {KINDS[kind]}")
            else:
                value = words.pop(0)
        try:
            if optional and value.lower() == "none":
                given[name[2:]] = None
            else:
                given[name[2:]] = {"int": int, "float": float, "str": str, "bool": lambda v: BOOLS[v.lower()]}[kind](value)
                if kind == "float" and not math.isfinite(given[name[2:]]):
                    raise ValueError
        except (KeyError, ValueError):
            raise Problem(f"{name} takes {KINDS[kind]}, not '{value}'") from None
    return Config(**given), given


def nearest(word, known, prefix=""):
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{match[0]}?" if match else ""


@dataclasses.dataclass
class Config:
    dataset: str = flag("pydoc", "pydoc, shakespeare, alice, tinystories, a .txt file, a folder of them, or a URL")
    tokenizer: str = flag("char", "char, bpe (trained on the text), gpt-neox, or the path of a tokenizer.json")
    vocab_size: int = flag(4096, "tokens of a vocabulary trained here (bpe)")
    data_dir: str = flag("data", "folder of all prepared data, and of downloaded texts")
    cache_dir: str = flag("", "folder for GPT-NeoX's vocabulary, if Hugging Face's cache lacks it; default ~/.cache/mamba.py")
    name: str = flag("", "folder under data_dir; by default from the names of dataset and tokenizer")


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
                raise Problem(f"character {block[ids.argmin()]!r} is not in this model's vocabulary "
                              f"({self.vocab_size} characters)")
            yield ids

    def encode(self, text):
        """Tokens of a text; a character outside the vocabulary is a Problem."""
        return next(self.encode_stream([text])).tolist()

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def to_dict(self):
        return {"type": "char", "chars": self.chars}


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


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
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1  # ids may have holes
        if self.vocab_size == 0:
            raise Problem("a tokenizer.json without tokens")
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, texts, vocab_size, show_progress=False):
        """A byte-level BPE vocabulary, GPT-2's kind: it can spell any text, and knows END_OF_TEXT from the start."""
        tokenizers = import_tokenizers()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        # Without the split, pairs would go into spelling out what is a token anyway. A text without spaces is cut too: to
        # merge pairs takes a time that is quadratic in the length of a word.
        documents = (document for text in texts for document in text.split(END_OF_TEXT))
        stretches = (stretch for document in documents for stretch in re.split(r"(\w{100})", document))
        tokenizer.train_from_iterator(stretches, tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=show_progress,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        return cls(tokenizer.to_str())

    def encode_stream(self, blocks):
        pieces = cut_between_words(blocks)
        while batch := list(itertools.islice(pieces, 16)):
            for encoding in self._encode(batch):
                yield np.array(encoding.ids, np.int64)

    def encode(self, text):
        """Tokens of a text; what is not valid Unicode is a Problem."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Problem("the text is not valid UTF-8") from None
        return self._encode([text])[0].ids

    def _encode(self, texts):
        try:
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 (as above: one of whole words, say, without a token for others)
            raise Problem(f"the tokenizer.json has no tokens for the text ({str(error)[:80]})") from None

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_dict(self):
        return {"type": "bpe", "json": self.tokenizer.to_str()}


# Where a text may be cut without changing a token: before the first space after a word, or after a lone newline between
# words. GPT-2's pattern and its successors join a space only to what follows it, and a run of whitespace stays whole.
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=\S)")
WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # of that pattern, near enough to count words with


def cut_between_words(blocks):
    """The text in pieces of about PIECE characters that give the same tokens one by one as in one go."""
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > PIECE:
            cut = CUT.search(rest, start + PIECE, start + LONGEST)
            if cut is None and len(rest) - start < LONGEST:
                break  # such a place may come with the next block
            # A stretch without one must not fill the memory: it is cut at LONGEST, where tokens may then differ, but
            # they still decode to the same text.
            end = cut.end() if cut else start + LONGEST
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def import_tokenizers():
    try:
        import tokenizers  # only here: characters need no package
    except ImportError:
        raise Problem("this tokenizer needs a package: pip install tokenizers") from None
    return tokenizers


def load_tokenizer(saved):
    """The tokenizer whose to_dict() this was, from meta.json or a checkpoint."""
    if saved["type"] == "char":
        return CharTokenizer(saved["chars"])
    return BPETokenizer(saved["json"])


def download(url, path, size=None, sha256=None):
    """mamba.download, imported only where it is needed because it brings torch along. Problem: no network."""
    from mamba import download
    try:
        return download(url, path, size, sha256)
    except ConnectionError as error:
        raise Problem(f"{error}, and `python train.py` works without network on the built-in pydoc data") from None


def progress(total, what, done=0):
    """A bar over bytes for what takes long enough to look at, on a terminal only."""
    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, leave=False,
                disable=None if total is None or total > 4e6 else True)


DATASETS = ("pydoc", "shakespeare", "alice", "tinystories")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
ALICE = "https://www.gutenberg.org/cache/epub/11/pg11.txt"


def is_url(dataset):
    return dataset.startswith(("http://", "https://"))


def dataset_name(dataset, tokenizer="char", name=""):
    """The folder under data_dir: name if given, else from the dataset and the tokenizer, as in shakespeare-bpe."""
    if name:
        return name
    if is_url(dataset):
        url = urllib.parse.urlparse(dataset)
        last = url.path.rstrip("/").split("/")[-1] or url.netloc.replace(":", "-")
    else:
        last = Path(dataset).resolve().name
    if not last.removesuffix(".txt"):
        raise Problem(f"'{dataset}' does not make a name for a folder; prepare it with prepare_data.py and a --name")
    return last.removesuffix(".txt") + ("" if tokenizer == "char" else f"-{Path(tokenizer).stem}")


def find_text(dataset, downloads):
    """Returns the sources of the text and, for a dataset with its own split, those of its validation part."""
    if dataset == "pydoc":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise Problem("this Python comes without pydoc_data; try --dataset=shakespeare or a file") from None
        return ["\n\n".join(topics[key] for key in sorted(topics)).encode()], None
    if dataset == "shakespeare":
        return [download(SHAKESPEARE, downloads / "shakespeare.txt", 1115394,
                         "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")], None
    if dataset == "alice":  # without the licence, which would be the whole validation part
        path = download(ALICE, downloads / "alice.txt")
        text = path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n")
        story = re.search(r"\*\*\* ?START OF[^\n]*\n(.*)\*\*\* ?END OF", text, re.DOTALL)
        if not story:
            path.unlink()
            raise Problem(f"{ALICE} gave something else than the book; nothing was kept")
        return [(story[1].strip() + "\n").encode()], None
    if dataset == "tinystories":
        files = [f"TinyStories-{part}.txt" for part in ("train", "valid")]
        base = "datasets/roneneldan/TinyStories/resolve/main/"
        return tuple([download(base + file, downloads / file)] for file in files)
    if is_url(dataset):  # the hash keeps apart two URLs that end alike
        file = f"{dataset_name(dataset)}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}.txt"
        return [download(dataset, downloads / file)], None
    if dataset and Path(dataset).is_dir():  # Path("") is the current folder
        files = sorted(path for path in Path(dataset).rglob("*.txt") if path.is_file())
        if not files:
            raise Problem(f"{dataset} is a folder without .txt files")
        return files, None
    if Path(dataset).is_file():
        return [Path(dataset)], None
    if Path(dataset).name != dataset or "." in dataset:
        raise Problem(f"no such file or folder: {dataset}")
    raise Problem(f"unknown dataset '{dataset}': it is {', '.join(DATASETS)}, a .txt file, a folder or a URL"
                  + nearest(dataset, DATASETS))


def read(source, start=0, stop=math.inf, bar=None, digest=None):
    """The characters start to stop of a source in blocks, exactly as they stand. Problem if it is not text."""
    name = "the text" if isinstance(source, bytes) else source
    decoder = codecs.getincrementaldecoder("utf-8")()
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as f:
        position, data = 0, True
        while data and position < stop:
            data = f.read(BLOCK)
            if b"\0" in data:
                raise Problem(f"{name} has a NUL byte at offset {f.tell() - len(data) + data.index(0)}: "
                              "a binary file, or text in UTF-16")
            try:
                block = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = f.tell() - len(error.object) + error.start  # object begins with a rest of the last block
                raise Problem(f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset}; "
                              "convert it, for example with: iconv -f latin1 -t utf-8") from None
            if digest:
                digest.update(data)
            if bar is not None and position >= start:
                bar.update(len(data))
            yield block[max(start - position, 0):max(min(stop - position, len(block)), 0)]
            position += len(block)


def prepare(cfg, block_size=0):
    """
    Makes data_dir/<name> as cfg (a Config) says and returns its path. All or nothing: a failure leaves what was there.
    Problem: what the person gave is not a text, a tokenizer or a name, or too short for block_size; a failed download.
    """
    name = dataset_name(cfg.dataset, cfg.tokenizer, cfg.name)
    folder, downloads = Path(cfg.data_dir) / name, Path(cfg.data_dir) / "downloads"
    if Path(name).name != name or name == "..":
        raise Problem(f"--name takes the name of a folder, not '{name}'")
    if cfg.tokenizer == "bpe" and import_tokenizers() and not 257 <= cfg.vocab_size <= TRAIN_BPE_ON:
        raise Problem(f"--vocab_size={cfg.vocab_size} must be at least 257 (256 bytes and <|endoftext|>) and at most "
                      f"{TRAIN_BPE_ON}, the bytes that it is trained on")
    tokenizer = None if cfg.tokenizer in ("char", "bpe") else open_tokenizer(cfg.tokenizer, cfg.cache_dir)
    sources, own_val = find_text(cfg.dataset, downloads)

    # First pass: is it text, how long is it, which characters does it have?
    everything = sources + (own_val or [])
    size = sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in everything)
    digest, seen, lengths = hashlib.sha256(), np.zeros(sys.maxunicode + 1, bool), []
    with progress(size, "reading") as bar:
        for source in everything:
            lengths.append(0)
            for block in read(source, bar=bar, digest=digest):
                seen[code_points(block)] = True
                lengths[-1] += len(block)
    n = sum(lengths)
    if n < 10:
        raise Problem(f"{cfg.dataset} is empty" if n == 0 else f"{cfg.dataset} has only {n} characters; 10 are needed")
    chars = "".join(map(chr, np.flatnonzero(seen)))
    # The split counts characters, whatever the tokenizer, so that losses per character or byte can be compared.
    split = sum(lengths[:len(sources)]) if own_val else int(n * 0.9)
    train, val, begin = [], [], 0
    for source, length in zip(everything, lengths):
        cut = min(max(split - begin, 0), length)
        train += [(source, 0, cut)] if cut > 0 else []
        val += [(source, cut, length)] if cut < length else []
        begin += length

    if cfg.tokenizer == "char":
        tokenizer = CharTokenizer(chars)
    elif cfg.tokenizer == "bpe":
        every = math.ceil(size * split / n / TRAIN_BPE_ON)
        with progress(size, "training bpe") as bar:
            pieces, every = pieces_to_learn_from(train, every, bar)
        tokenizer = BPETokenizer.train(pieces, cfg.vocab_size, show_progress=size > 4e6 and sys.stderr.isatty())
        if every > 1:
            print(f"bpe: trained on one in {every} stretches of the text, spread over all of it ({TRAIN_BPE_ON / 1e6:.0f} MB "
                  f"at most, and {DIFFERENT / 1e6:.0f} MB of different words, which bounds the memory)")
        if tokenizer.vocab_size < cfg.vocab_size:
            print(f"the text is too small for {cfg.vocab_size} tokens: the vocabulary has {tokenizer.vocab_size}")
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 65536 else "uint32")
    meta = {"name": name, "source": cfg.dataset, "sha256": digest.hexdigest(), "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size, "train_chars": split, "val_chars": n - split,
            "val_bytes": sum(len(block.encode()) for part in val for block in read(*part)),
            "tokenizer": tokenizer.to_dict()}

    # Second pass: into a temporary folder, and into place only when all of it is on the disk. meta.json moves last, and
    # load_meta() sees by the sizes if a crash left the move half done.
    verb = "replaced" if (folder / "meta.json").exists() else "wrote"
    ours = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            new = Path(temporary)
            with progress(size, "encoding") as bar:
                meta["train_tokens"] = write_tokens(new / "train.bin", train, tokenizer, dtype, bar)
                meta["val_tokens"] = write_tokens(new / "val.bin", val, tokenizer, dtype, bar)
            check_length(meta, block_size)
            with open(new / "meta.json", "w", encoding="utf-8") as f:
                json.dump(meta, f)
                flush_to_disk(f)
            for file in ("train.bin", "val.bin", "meta.json"):
                os.replace(new / file, folder / file)
    finally:
        for path in ours:  # after a failure; rmdir spares what holds a file
            with contextlib.suppress(OSError):
                path.rmdir()
    print(f"{cfg.dataset}: {n:,} characters, {len(chars):,} different ones")
    print(f"tokens: {meta['train_tokens']:,} to train, {meta['val_tokens']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size:,} ({dtype})")
    print(f"{verb} {folder}; next: python train.py --dataset={name}")
    return folder


def check_length(meta, block_size):
    """Problem if one of the two parts has no window of block_size tokens and the one after."""
    for part in ("train", "val"):
        if (n := meta[f"{part}_tokens"]) <= block_size:
            shorter = f", too few for --block_size={block_size}; give a longer text, or a --block_size below {n}"
            raise Problem(f"{meta['source']} has only {n} tokens in its {part} part"
                          + (shorter if n > 1 else "; give a longer text"))


def is_prepared(folder, dataset):
    """Whether folder holds the tokens of this dataset: of these bytes, if it is a file or a folder of them."""
    if not (folder / "meta.json").exists():
        return False
    meta = load_meta(folder)
    if dataset in DATASETS or is_url(dataset):
        return meta["source"] == dataset
    if not Path(dataset).exists():
        return True  # the name of a folder that prepare_data.py made
    digest = hashlib.sha256()
    for path in find_text(dataset, None)[0]:
        with open(path, "rb") as f:
            while data := f.read(BLOCK):
                digest.update(data)
    return digest.hexdigest() == meta["sha256"]


def pieces_to_learn_from(parts, n, bar):
    """(one in n of the pieces of all parts, n), n as given or doubled until their different words are few enough."""
    pieces = list(itertools.islice((piece for part in parts for piece in cut_between_words(read(*part, bar))), 0, None, n))
    while sum(len(word.encode()) for word in {word for piece in pieces for word in WORD.findall(piece)}) > DIFFERENT:
        pieces, n = pieces[::2], 2 * n
    return pieces, n


def write_tokens(path, parts, tokenizer, dtype, bar):
    """Writes the tokens of parts, each (source, start, stop), and an end-of-text between two. Returns how many."""
    with open(path, "wb") as f:
        for i, part in enumerate(parts):
            if i > 0 and tokenizer.end_of_text is not None:
                f.write(np.array(tokenizer.end_of_text, dtype))
            f.writelines(ids.astype(dtype) for ids in tokenizer.encode_stream(read(*part, bar)))
        flush_to_disk(f)
        return f.tell() // dtype.itemsize


def open_tokenizer(tokenizer, cache_dir=None):
    """The tokenizer that --tokenizer names: gpt-neox or the path of a tokenizer.json."""
    path = Path(tokenizer)
    if tokenizer == "gpt-neox":
        from mamba import get_file  # here for the same reason as download
        path = get_file("EleutherAI/gpt-neox-20b", "tokenizer.json", cache_dir)
    elif not path.is_file():
        raise Problem(f"unknown tokenizer '{tokenizer}': it is char, bpe, gpt-neox or the path of a tokenizer.json"
                      + nearest(tokenizer, ("char", "bpe", "gpt-neox")))
    import_tokenizers()
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except (Problem, UnicodeDecodeError) as problem:
        raise Problem(f"{path} is {problem if isinstance(problem, Problem) else 'not a tokenizer.json'}") from None


def flush_to_disk(f):
    f.flush()
    os.fsync(f.fileno())


def load_meta(folder):
    """The contents of folder/meta.json. Problem if it is missing, or does not fit train.bin and val.bin beside it."""
    folder = Path(folder)
    command = f"python prepare_data.py --dataset=<name, file, folder or URL> --name={folder.name}"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for split in ("train", "val"):
            if (folder / f"{split}.bin").stat().st_size != meta[f"{split}_tokens"] * np.dtype(meta["dtype"]).itemsize:
                raise ValueError
        return meta
    except FileNotFoundError as error:
        raise Problem(f"{error.filename} is missing; make it with: {command}") from None
    except (ValueError, KeyError, TypeError):
        raise Problem(f"{folder} is damaged; make it again with: {command}") from None


def main(cfg, given):
    if "vocab_size" in given and cfg.tokenizer != "bpe":
        raise Problem("--vocab_size goes with --tokenizer=bpe; other vocabularies have a size of their own")
    prepare(cfg)


if __name__ == "__main__":
    run(main, Config)
