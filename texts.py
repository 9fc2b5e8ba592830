"""
The texts that prepare_data.py reads: where they come from, and what stands in them.

A text is UTF-8: .txt, .md, or .jsonl with a "text" in each line, all of them also as .gz; a file, a
folder of files, a URL, or one of those that come by name. It is read in blocks: memory does not
grow with it. What is no such text is said in one line.
"""
from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import time
from collections import Counter
from pathlib import Path

from common import Problem, dataset_name, is_url, nearest, progress, reading, say

BREAK = None  # stands among blocks and pieces of text where a document ends and another begins

# ---- Where they come from ------------------------------------------------------------------------

DATASETS = ("pydoc", "shakespeare", "alice", "tinystories")
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ALICE = "https://www.gutenberg.org/cache/epub/11/pg11.txt"
WITHOUT_NETWORK = "without network, `python train.py` works on the built-in pydoc data"

def find_text(dataset, downloads, cache_dir=None, noticed=None):
    """The sources of a text, each a path or the bytes themselves. Problem: there is no such text.
    downloads: the folder for what comes from a URL; cache_dir: for what Hugging Face has.
    noticed: a dict, here and below, in which lines to say are kept, one of each kind."""
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
        files, skipped = texts_in(path)
        if not files:
            raise Problem(f"{dataset} is a folder without .txt, .md or .jsonl files")
        if noticed is not None:
            noticed["files"] = (f"{dataset}: {len(files):,} file{'s' * (len(files) > 1)}, "
                                f"{skipped:,} skipped")
        return files
    raise Problem(f"unknown dataset '{dataset}', and no such file or folder: it is "
                  f"{', '.join(DATASETS)}, a text file, a folder or a URL"
                  f"{nearest(dataset, DATASETS)}")

TEXT_FILE = re.compile(r"[^.].*\.(txt|md|jsonl)(\.gz)?", re.IGNORECASE | re.DOTALL)

def texts_in(folder):
    """(the texts in a folder and in those below it, how many other files there are). Nothing that
    is hidden is looked into, and no file that links lead to is taken twice."""
    def give_up(error):
        raise error
    files, skipped, seen = [], 0, set()
    for place, folders, names in os.walk(folder, onerror=give_up, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        skipped += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in sorted(names)):
            if not (TEXT_FILE.fullmatch(path.name) and path.is_file()):
                skipped += 1
            elif os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                files.append(path)
    return sorted(files), skipped

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
        raise Problem("cannot download TinyStories from Hugging Face "
                      f"({type(error).__name__}); {WITHOUT_NETWORK}") from None

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
                raise Problem(f"cannot download {url} ({type(error).__name__}); the same command "
                              f"goes on where it stopped; {WITHOUT_NETWORK}") from None
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
        say(f"downloading {url}")
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if have else "wb") as file, progress(total, part.stem, have) as bar:
            for chunk in answer.iter_content(1 << 16):
                bar.update(file.write(chunk))
    if total not in (None, part.stat().st_size):
        raise requests.ConnectionError

# ---- What stands in them -------------------------------------------------------------------------

BLOCK = 1 << 20  # bytes read at a time
LINE = 1 << 26  # characters that a line of JSON has at most: it is read whole

def open_source(source):
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")

def name_of(source):
    return "the text" if isinstance(source, bytes) else str(source)

def sha256_of(*sources):
    """The hash of the contents of these sources, one after the other."""
    digest = hashlib.sha256()
    for source in sources:
        with open_source(source) as file:
            while data := file.read(BLOCK):
                digest.update(data)
    return digest.hexdigest()

def read(sources, separator="\n", bar=None, noticed=None):
    """The text of the sources in blocks, between two documents the separator: BREAK, or a text
    unless a line ends there anyway. bar is told of the bytes. Problem: it is not text."""
    last = ""
    for source in sources:
        for document in documents(source, bar, {} if noticed is None else noticed):
            for i, block in enumerate(filter(None, document)):
                if i == 0 and last and (separator is BREAK or last != "\n"):
                    yield separator
                yield block
                last = block[-1]

# How HTML, XML, RTF and JSON begin, or what such a file is called
MARKUP = re.compile(r'\s*(<[!?a-z]|\{\\rtf|[\[{]\s*["{])', re.IGNORECASE)
NAME_OF_JSON = re.compile(r"\.jsonl?(\.gz)?$", re.IGNORECASE)

def documents(source, bar, noticed):
    """The documents of a source, each in blocks: one, or if its lines are JSON with a "text", those
    texts. Problem: only some lines are."""
    of_lines = {}   # of no interest where the lines are JSON
    blocks, name = characters(source, bar, of_lines), name_of(source)
    first = next(blocks, "")
    markup, texts = MARKUP.match(first) or NAME_OF_JSON.search(name), None
    if markup:
        texts = text_in(next(filter(str.strip, lines(characters(source, None, {}))), ""))
    if markup and texts is None:
        noticed["markup"] = (f'warning: {name} looks like HTML, XML or JSON without a "text" in '
                             "each line; it is learned with all its tags and braces")
    blocks = itertools.chain([first], blocks)
    if texts is None:
        yield blocks
        noticed.update(of_lines)
        return
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for number, line in enumerate(lines(blocks), 1):
        text = text_in(line) if line.strip() else ""
        if text is None:
            raise Problem(f'{name} is JSON with a "text" in its first line, but not in line '
                          f"{number:,}")
        yield [decoder.decode(text, final=True)]
    notice_newlines(decoder, name, noticed)

def lines(blocks):
    """The lines of a text in blocks; one that is longer than LINE comes in parts."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split("\n")
        yield from whole
        if len(rest) > LINE:
            yield rest
            rest = ""
    yield rest

def text_in(line):
    """The "text" in a line of JSON, or None."""
    try:
        text = json.loads(line)["text"]
        # half a character, which only JSON can spell, becomes the sign for that
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None

def characters(source, bar, noticed):
    """The text of a source in blocks, each \\r\\n and \\r being \\n. Problem: it is not text."""
    name = name_of(source)
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    with open_source(source) as packed:
        file, data, told = unpacked(packed), True, 0
        while data:
            with reading(name, "a text"):
                data = file.read(BLOCK)
            if b"\0" in data:
                offset = file.tell() - len(data) + data.index(0)
                raise Problem(f"{name} has a NUL byte at offset {offset}: binary, or UTF-16 text, "
                              f"which becomes UTF-8 by: {iconv(name, wide_encoding(source))}")
            try:
                block = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # error.object begins with what was left of the last block
                offset = file.tell() - len(error.object) + error.start
                raise not_utf8(name, offset, error.object[error.start]) from None
            if bar is not None:
                bar.update(packed.tell() - told)
                told = packed.tell()
            yield block
    notice_newlines(decoder, name, noticed)

def unpacked(file):
    """An open file, or what gzip has compressed in it."""
    packed = file.read(2) == b"\x1f\x8b" or str(getattr(file, "name", "")).lower().endswith(".gz")
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if packed else file

def notice_newlines(decoder, name, noticed):
    if decoder.newlines not in (None, "\n"):
        noticed["newlines"] = f"{name}: each \\r\\n and \\r became a newline"

def wide_encoding(source):
    """In which encoding a text with NUL bytes has most spaces and newlines."""
    with open_source(source) as file:
        data = unpacked(file).read(1 << 16)

    def spaces(encoding):
        text = data.decode(encoding, "ignore")
        return text.count(" ") + text.count("\n") - text.count("\0")
    return max(("utf-16le", "utf-16be", "utf-32le", "utf-32be"), key=spaces)

ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as "surrogateescape" has them

def not_utf8(path, offset, byte):
    """The Problem that a file has this byte there, and what helps. If the rest of it is UTF-8, to
    convert the whole file would garble that."""
    wrong, right_lines, right_parts, length = Counter(), False, False, 0
    number, count, first, last = 1, 0, 0, 0  # of this line; of wrong lines, the first and the last
    with open_source(path) as file:
        text = io.TextIOWrapper(unpacked(file), "utf-8", "surrogateescape", newline="\n")
        while part := text.readline(BLOCK):
            found = ESCAPED.findall(part)
            wrong.update(found)
            right_lines = right_lines or not (found or part.isascii())
            right_parts = right_parts or not ESCAPED.sub("", part).isascii()
            length += len(part)
            if found and last != number:
                count, first, last = count + 1, first or number, number
            number += part.endswith("\n")
    where = f"byte 0x{byte:02x} at offset {offset}"
    other_script = sum(wrong.values()) > length / 4  # parts of it can look like UTF-8 by chance
    if right_lines or (right_parts and not other_script):
        return Problem(f"{path} is not UTF-8 in {count:,} line{'s' * (count > 1)}, the first is "
                       f"line {first:,} ({where}): mend nothing but these; to convert the whole "
                       "file would garble the rest")
    if offset == 0 and byte in (0xfe, 0xff):
        encoding = "utf-16"
    elif other_script:
        encoding = "ITS_ENCODING"
    else:
        encoding = "cp1252" if min(wrong) < "\udca0" else "latin1"
        where += ", as in Western European texts"
    return Problem(f"{path} is not UTF-8: {where}; convert it with: {iconv(path, encoding)}")

def iconv(path, encoding):
    """The command that makes a file UTF-8."""
    quoted = shlex.quote(str(path))
    if str(path).lower().endswith(".gz"):
        return f"gunzip -c {quoted} | iconv -f {encoding} -t utf-8 >new.txt"
    return f"iconv -f {encoding} -t utf-8 {quoted} >new.txt"

def is_text(dataset):
    """Whether it is a text; else it can only be the name of a folder of prepared data."""
    return dataset in DATASETS or is_url(dataset) or Path(dataset).exists()
