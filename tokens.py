"""
Tokenizers: a text becomes the numbers of its tokens, and these become the text again.

encode(text) -> ids         decode(ids) -> text
encode_stream(blocks)       the ids of a text in blocks (as of texts.read), in arrays
spells(text)                whether all of it comes back from its ids
vocab_size, end_of_text     how many tokens; the one between two documents, or None
ids()                       {token: id}
to_dict()                   all of it, for meta.json and checkpoints; load_tokenizer reads that

allow_special: special tokens that are spelled out in a text are those tokens, else characters as
all others. lost: a Counter to which the characters are added that have no tokens.
"""
from __future__ import annotations

import functools
import itertools
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common import Problem, nearest, progress, say
from texts import BREAK


class CharTokenizer:
    """One token per character."""
    end_of_text = None

    def __init__(self, chars):
        if len(set(chars)) != len(chars):
            raise ValueError("a character stands twice in the alphabet")
        self.chars, self.vocab_size = chars, len(chars)
        self.table = np.full(sys.maxunicode + 1, -1, np.int32)  # code point -> token
        self.table[code_points(chars)] = np.arange(len(chars))

    def encode_stream(self, blocks: Iterable, allow_special=False, lost=None) -> Iterator:
        for block in blocks:
            codes = code_points(block)
            ids = self.table[codes]
            if ids.min(initial=0) < 0:
                if lost is None:
                    raise Problem(f"character {block[ids.argmin()]!r} is not in this model's "
                                  f"vocabulary ({self.vocab_size:,} characters)")
                lost.update(map(chr, codes[ids < 0]))
            yield ids[ids >= 0]

    def encode(self, text: str, allow_special=False) -> list[int]:
        """Tokens of a text. Problem: a character outside the vocabulary."""
        return next(self.encode_stream([text])).tolist()

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def spells(self, text: str) -> bool:
        """Whether all characters of a text are in the alphabet."""
        return bool((self.table[code_points(text)] >= 0).all())

    def ids(self):
        """{token: id}"""
        return {character: i for i, character in enumerate(self.chars)}

    def to_dict(self) -> dict:
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

    def encode_stream(self, blocks: Iterable, allow_special=False, lost=None) -> Iterator:
        pieces = cut_between_words(blocks)
        while batch := list(itertools.islice(pieces, 16)):  # they go to all cores at once
            encodings = self._encode([piece or "" for piece in batch], allow_special)
            for piece, encoding in zip(batch, encodings):
                ids = [self.end_of_text] if piece is BREAK else encoding.ids
                if lost is not None and piece is not BREAK:
                    lost.update(self.not_spelled(piece, ids))
                yield np.array(ids, np.int64)

    def encode(self, text: str, allow_special=False) -> list[int]:
        """Tokens of a text. Problem: there are none for it, or it is not valid Unicode."""
        return self._encode([text], allow_special)[0].ids

    def _encode(self, texts, allow_special):
        self.tokenizer.encode_special_tokens = not allow_special
        try:
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 (as above: whole words, say, and none for others)
            raise Problem("the tokenizer.json has no tokens for the text, or that is not valid "
                          f"Unicode ({error})") from None

    def decode(self, ids: list[int]) -> str:
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

    def spells(self, text: str) -> bool:
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

    def to_dict(self) -> dict:
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
            if rest:
                yield rest
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

TRAIN_BPE_ON = 1 << 24  # bytes of text that a vocabulary is trained on, at most
MOST_TOKENS = 1 << 24   # of a vocabulary
DIFFERENT = 1 << 22  # bytes of different words in it, at most: each takes 100 times as much memory
WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # GPT-2's pattern, near enough to count words

def train_bpe(part, size, share, vocab_size):
    """A BPETokenizer made for part("train", bar): blocks that are this share of `size` bytes."""
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

def pieces_to_learn_from(blocks, n):
    """(one in n of the pieces of a text, n); n doubles until their different words are few."""
    pieces = filter(None, cut_between_words(blocks))
    pieces = list(itertools.islice(pieces, 0, None, n))
    while True:
        words = {word for piece in pieces for word in WORD.findall(piece)}
        if sum(len(word.encode()) for word in words) <= DIFFERENT:
            return pieces, n
        pieces, n = pieces[::2], 2 * n

def load_tokenizer(saved: dict) -> CharTokenizer | BPETokenizer:
    """The tokenizer whose to_dict() this was, from meta.json or a checkpoint. Any error: it is not
    what to_dict() gives."""
    if saved["type"] not in ("char", "bpe"):
        raise ValueError("an unknown kind of tokenizer")
    return CharTokenizer(saved["chars"]) if saved["type"] == "char" else BPETokenizer(saved["json"])

def open_tokenizer(tokenizer: str, cache_dir=None, vocab_size=4096):
    """The tokenizer that --tokenizer names: gpt-neox or the path of a tokenizer.json. None for char
    and bpe, which are made for a text. Problem: there is none; bpe has none of this size."""
    path = Path(tokenizer)
    if tokenizer == "bpe":
        import tokenizers  # noqa: F401 (if it is missing, that is said before minutes of reading)
        if not 257 <= vocab_size <= MOST_TOKENS:
            raise Problem(f"--vocab_size={vocab_size} must be at least 257 (256 bytes and "
                          f"{END_OF_TEXT}) and at most {MOST_TOKENS:,}")
    if tokenizer in ("char", "bpe"):
        return None
    if tokenizer == "gpt-neox":
        from mamba_files import NEOX, hub_file  # only here: it brings torch along
        try:
            path = hub_file(NEOX, "tokenizer.json", cache_dir)
        except ConnectionError as error:
            raise Problem(f"{error}; --tokenizer=char and bpe need no network") from None
    elif not path.is_file():
        raise Problem(f"unknown tokenizer '{tokenizer}': it is char, bpe, gpt-neox or the path of "
                      f"a tokenizer.json{nearest(tokenizer, ('char', 'bpe', 'gpt-neox'))}")
    # what is not UTF-8 becomes what no tokenizer.json may hold, and is refused as such
    return BPETokenizer(path.read_text(encoding="utf-8", errors="surrogateescape"), path)
