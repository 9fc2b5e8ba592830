"""
Writes text with a model that train.py has trained, or with released weights.
Needs only the checkpoint: the tokenizer is in it.

python sample.py                                      # the newest model under out/
python sample.py --start="ROMEO:" --temperature=0.7
python sample.py --out_dir=out/shakespeare --num_samples=3 --top_k=20 --seed=1
python sample.py --start=FILE:prompt.txt --max_new_tokens=2000
python sample.py --pretrained=state-spaces/mamba-130m --start="The capital of France is"
python sample.py --interactive --stop="\\nYou:"        # in turns; the model remembers all of it
python sample.py --start=FILE:text.txt --show=delta   # which tokens it takes in
python sample.py --start=FILE:text.txt --show=loss --html=loss.html     # which surprise it
python sample.py --start=FILE:text.txt --show=delta --html=picture.svg
python sample.py --start=FILE:text.txt --show=attention --html=page.html  # which each looks back to
python sample.py --export=folder --format=onnx        # writes the model for other programs
"""
from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    if not hasattr(sys, "ps1"):  # in a notebook Ctrl-C must not end the process
        # It ends the long import of torch without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")    # as in train.py; torch reads it once

import functools
import hashlib
import itertools
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import common
import runs
import show
from common import Problem, flag
from mamba import SCAN_METHODS, Mamba, check_sampling, fast
from mamba_files import RUN, check_usable, read_tokenizer, read_whole
from tokens import load_tokenizer


@dataclass
class Config:
    out_dir: str = flag("", "folder of the run; the newest under out/ by default")
    pretrained: str = flag("", "released weights instead: a folder, or a name on Hugging Face")
    start: str = flag("", r"text to continue, \n \t \\ as in --stop, or FILE:path; by default the "
                      "model begins a text")
    num_samples: int = flag(1, "texts to write", least=1)
    max_new_tokens: int = flag(500, "length of each (each answer with --interactive)", least=1)
    temperature: float = flag(0.8, "below 1 safer, above 1 wilder, 0 always the likeliest token")
    top_k: int | None = flag(None, "only among the k likeliest tokens")
    top_p: float | None = flag(None, "only among the likeliest that together are this probable")
    min_p: float | None = flag(None, "tokens at least this many times as likely as the likeliest")
    repetition_penalty: float | None = flag(None, "above 1, as 1.1: what was there is less likely")
    stop: str = flag("", r"text that ends an answer, not shown; several as A|B; \n newline, \t "
                     r"tab, \| bar, \\ backslash")
    ignore_eos: bool = flag(False, "go on after the token that ends a text (characters have none)")
    allow_special: bool = flag(False, "<|endoftext|> and its like in --start and in a chat are the "
                               "tokens of that name; by default they are text")
    seed: int | None = flag(None, "the same seed, the same text; by default another every time",
                            least=0, below=2 ** 63)
    interactive: bool = flag(False, "a line from you, an answer, and so on; /help there tells more")
    show: str = flag("", "delta, loss or attention: colour the tokens of --start by how far a "
                     "layer opens to each, by its surprise, or by what others take in of it")
    layer: int | None = flag(None, "the layer of delta or attention, from 0; by default the middle "
                             "one")
    channel: int | None = flag(None, "a channel of that layer (a head, if it has such); by default "
                               "the mean over all, of attention without the signs: they differ "
                               "from channel to channel, and would cancel")
    html: str = flag("", "file for what --show shows: a page, or a picture if it ends in .svg")
    export: str = flag("", "folder to write the model and its tokenizer to, for other programs")
    format: str = flag("mamba_ssm", "of --export: mamba_ssm, transformers or onnx")
    cache_dir: str = flag("", "folder for downloaded weights; Hugging Face's cache by default")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16, float16; auto: bfloat16 on CUDA, else float32")
    scan: str = flag("auto", "auto, triton (fused kernels, on CUDA), chunked or sequential")
    compile: bool = flag(False, "on a CPU: compiled in 10 to 25 s, then 1.2 to 2 times as fast")
    quantize: str = flag("", "int8: a quarter of float32's memory, and for large models faster")

CHOICES = {"scan": SCAN_METHODS, "quantize": ("", "int8"),
           "show": ("", "delta", "loss", "attention"),
           "format": ("mamba_ssm", "transformers", "onnx")}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

def main(cfg, given):
    check(cfg)
    # files to export are the same from any device
    device = common.pick_device("cpu" if cfg.export else cfg.device)
    dtype = common.pick_dtype(cfg.dtype, device)
    if cfg.pretrained:
        source = cfg.pretrained
        model, tokenizer = load_pretrained(source, device, getattr(torch, dtype), cfg.scan,
                                           cfg.cache_dir)
    else:
        source, model, tokenizer = load_run(Path(cfg.out_dir or newest_run()), cfg.scan)
        model.to(device, getattr(torch, dtype))
    if cfg.export:
        return export(cfg, model, tokenizer)
    if cfg.quantize:
        fast.quantize_int8(model)
    start = text_of(cfg.start)
    prompt = tokenizer.encode(start, cfg.allow_special) if start else []
    if cfg.show:
        show.check(cfg, model, prompt)

    generator = make_generator(cfg, device)
    config = model.config
    scan = common.pick_scan(cfg.scan, device, dtype, config.d_state,
                            getattr(config, "headdim", 0))
    int8, seed = ", int8 weights" * bool(cfg.quantize), f", seed {cfg.seed}" * (not cfg.show)
    print(f"{source}: {model.num_params() / 1e6:.2f}M parameters; {device}, {dtype}{int8}, "
          f"scan {scan}{seed}", file=sys.stderr)
    if cfg.show:
        return show.show(cfg, model, prompt, as_text(tokenizer, prompt))
    if cfg.compile and device.type == "cpu":
        compile_step(model)
    if cfg.interactive:
        if hasattr(sys.stdin, "reconfigure"):  # that of a notebook has not
            # A file or a pipe is UTF-8. A byte that is no text is refused as any character is.
            encoding = None if sys.stdin.isatty() else "utf-8"
            sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
        chat(Conversation(model, tokenizer, prompt), cfg, generator)
    else:
        write_samples(cfg, model, tokenizer, start, prompt, generator)

def check(cfg):
    """Problem: flags or settings that have no meaning."""
    for name, choices in CHOICES.items():
        if (value := getattr(cfg, name)) not in choices:
            raise Problem(f"--{name} takes {' or '.join(filter(None, choices))}, not '{value}'")
    try:
        check_sampling(**sampling(cfg))
    except ValueError as error:
        raise Problem(str(error)) from None
    run_dir, page, folder = Path(cfg.out_dir), Path(cfg.html), Path(cfg.export)
    for wrong, message in (
            (cfg.quantize and not fast, "--quantize=int8 needs the folder mamba_fast/"),
            (cfg.compile and not fast, "--compile needs the folder mamba_fast/"),
            (run_dir.is_file(),
             f"--out_dir takes the folder of a run, {run_dir.parent}, not a file in it"),
            (cfg.out_dir and cfg.pretrained, "--out_dir and --pretrained are two models; give one"),
            (cfg.show and (cfg.interactive or not cfg.start),
             "--show reads a text: give it as --start, and without --interactive"),
            ((cfg.html and not cfg.show)
             or ((cfg.layer, cfg.channel) != (None, None) and cfg.show in ("", "loss")),
             "--html goes with --show, and --channel and --layer with --show=delta or attention"),
            (cfg.html and (not page.parent.is_dir() or (page.exists() and not page.is_file())),
             f"--html takes a file in a folder that there is, not '{cfg.html}'"),
            (cfg.format != "mamba_ssm" and not cfg.export, "--format goes with --export"),
            (cfg.export and (cfg.start or cfg.show or cfg.interactive),
             "--export writes no text: give it without --start, --show and --interactive"),
            (cfg.export and cfg.quantize, "--export has no int8 weights: leave out --quantize"),
            (cfg.export and folder.exists() and (folder.is_file() or any(folder.iterdir())),
             f"--export takes a new or an empty folder, not '{folder}'")):
        if wrong:
            raise Problem(message)

def sampling(cfg):
    """The settings of mamba.sample."""
    return {name: getattr(cfg, name) for name in SAMPLING}

def newest_run():
    checkpoints = [*Path("out").glob("*/best.pt"), *Path("out").glob("*/ckpt.pt")]
    if not checkpoints:
        raise Problem("there is no model under out/; train one with: python train.py")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent

def load_run(out_dir, scan):
    """(what it is, model, tokenizer) of a run, from its best checkpoint that is whole."""
    checkpoint = runs.load_checkpoint(*(out_dir / name for name in RUN))
    model = runs.load_model(checkpoint, scan=scan).eval()
    with common.reading(checkpoint["path"], "a checkpoint"):
        tokenizer = load_tokenizer(checkpoint["meta"]["tokenizer"])
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError("its tokenizer is that of another model")
    return f"{out_dir}, step {checkpoint['step']}", model, tokenizer

def load_pretrained(name, device, dtype, scan, cache_dir=None):
    """(model, tokenizer) of a folder or a name on Hugging Face."""
    try:
        model = Mamba.from_pretrained(name, device, dtype, cache_dir, scan=scan)
        tokenizer = load_tokenizer(read_tokenizer(name, cache_dir))
        check_usable(model, tokenizer, name)
    except (ValueError, Problem) as error:
        raise Problem(f"--pretrained={name}: {error}") from None
    # Some config.json count rows of padding as tokens. They stay, and are never drawn.
    model.config.vocab_size = tokenizer.vocab_size
    model.config.pad_vocab_size_multiple = len(model.lm_head.weight)
    return model, tokenizer

def text_of(start):
    r"""The text that a --start is: itself, its \n and \t read, or what stands in its FILE:. As in
    the text of prepare_data.py CRLF and CR become newlines, in a file by read_text."""
    if not start.startswith("FILE:"):
        return with_newlines(unescaped(start))
    path = Path(start[len("FILE:"):])
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors on Windows put a mark in front
    except UnicodeDecodeError as error:
        raise Problem(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None

def with_newlines(text):
    return re.sub(r"\r\n?", "\n", text)

def unescaped(text):
    r"""\n and \t are a newline and a tab, \| and \\ | and \. Any other \ is itself."""
    meant = {"n": "\n", "t": "\t"}
    return re.sub(r"\\([nt|\\])", lambda match: meant.get(match[1], match[1]), text)

def make_generator(cfg, device):
    """On a GPU one of its own: random numbers from the CPU would make it wait. MPS takes those."""
    if cfg.seed is None:
        cfg.seed = torch.seed() % 2 ** 32
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(cfg.seed)

def export(cfg, model, tokenizer):
    """Writes what --format says into the folder --export."""
    import mamba_export  # only here: nothing else needs it
    folder = Path(cfg.export)
    try:
        if cfg.format == "onnx":
            mamba_export.write_onnx(model, folder, tokenizer)
        else:
            model.save_pretrained(folder, layout=cfg.format)
            mamba_export.write_tokenizer(folder, tokenizer, model)
    except ValueError as error:
        raise Problem(f"--format={cfg.format}: {error}") from None
    print(f"wrote {', '.join(sorted(os.listdir(folder)))} into {folder}", file=sys.stderr)

def compile_step(model):
    """Compiles the step of a token, so that this is not counted in the time of a text."""
    print("compiling ...", file=sys.stderr)
    began = time.perf_counter()
    next(model.stream([[0]], 1, compile=True))
    print(f"compiling took {time.perf_counter() - began:.1f} s", file=sys.stderr)

def write_samples(cfg, model, tokenizer, start, prompt, generator):
    began, count = time.perf_counter(), 0
    for _ in range(cfg.num_samples):
        print(start, end="", flush=True)
        text = Conversation(model, tokenizer, prompt)
        for piece in text.answer(cfg, generator):
            print(piece, end="", flush=True)
        print("\n---------------" if cfg.num_samples > 1 else "", flush=True)
        count += text.tokens_made
    seconds = time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s", file=sys.stderr)

# ---- Tokens to text ------------------------------------------------------------------------------

def as_text(tokenizer, tokens, before=(), cut_off=False):
    """The text of token ids that follow those in before: a piece for each, and a last one.
    A token may end inside a character, which then waits for its other bytes. Bytes that belong to
    no character come out as U+FFFD; at the end too, unless the text is cut_off there."""
    decode, unfinished = tokenizer.decode, "\ufffd"
    # ids[:out] are out already, and done are their characters: next to them a token decodes as it
    # does in the text. They begin with the end of `before`, where that begins a character.
    ends = ([*before[-n:]] for n in range(1, 5))
    ids = next((end for end in ends if unfinished not in decode(end)), [])
    out, done = len(ids), len(decode(ids))
    for token in tokens:
        ids.append(int(token))
        text = decode(ids)
        if not text.endswith(unfinished):
            yield text[done:]
            ids = ids[out:]
            out, done = len(ids), len(decode(ids))
        elif len(ids) - out < 4:  # a character has at most 4 bytes, and a token at least one
            yield ""
        else:  # these bytes make no character, but the last of them may begin one
            yield text[done:-1]
            ids = ids[-4:]
            out, done = 0, len(decode(ids).removesuffix(unfinished))
    rest = decode(ids)[done:]
    yield rest.rstrip(unfinished) if cut_off else rest

def stop_strings(text):
    """Those in a --stop, separated by |."""
    return [unescaped(part) for part in re.findall(r"(?s)(?:\\.|[^|])+", text)]

def until(stops, pieces):
    """The pieces up to the first end of a stop string. What may begin one waits to be decided."""
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]
        if found:
            yield held[:min(found)[1]]
            return
        begun = [n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])]
        ready = len(held) - max(begun, default=0)
        yield held[:ready]
        held = held[ready:]
    yield held

# ---- A text in turns -----------------------------------------------------------------------------

AHEAD = 8  # tokens that a GPU makes before they are shown: to look at one makes it wait
PART = 512  # tokens of a text that are read at once: memory stays small, Ctrl-C need not wait long

class Conversation:
    """What the model has read and written, as its state: constant memory, nothing read twice."""

    def __init__(self, model, tokenizer, prompt):
        self.model, self.tokenizer = model, tokenizer
        # What stands before a text: the token between documents, or the newline, which sorts first
        # in most alphabets.
        self.prompt = prompt or [tokenizer.end_of_text or 0]
        self.tokens_made = 0
        self.interrupted = False  # set by Ctrl-C, looked at between two parts or tokens
        self.reset()

    def reset(self):
        self.state = self.model.init_state(1)
        self.unread = list(self.prompt)  # tokens that are not yet in the state
        self.seen = set()  # those that are, for the repetition penalty

    def hear(self, line, allow_special):
        """Takes in a line from the person. Problem: a character that the model does not know."""
        try:
            new = self.tokenizer.encode(line + "\n", allow_special)
        except Problem:  # of an alphabet without a newline; any other comes again
            new = self.tokenizer.encode(line, allow_special)
        self.unread = self.unread + new

    def answer(self, cfg, generator):
        """The model's text in pieces, to a stop string, an end-of-text or max_new_tokens."""
        tokens = self._tokens(cfg, generator)
        text = as_text(self.tokenizer, tokens, before=self.unread, cut_off=True)
        return until(stop_strings(cfg.stop), text)

    def _tokens(self, cfg, generator):
        model, device, seen = self.model, self.model.device, None
        while len(self.unread) > PART and not self.interrupted:
            part, rest = self.unread[:PART], self.unread[PART:]
            _, self.state = next(model.read(torch.tensor([part], device=device), self.state))
            self.seen.update(part)
            self.unread = rest
        if cfg.repetition_penalty is not None:
            seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=device)
            seen[0, list(self.seen)] = True
        stream = model.stream([self.unread], cfg.max_new_tokens, generator=generator, seen=seen,
                              state=self.state, compile=cfg.compile, **sampling(cfg))
        # A GPU may work ahead, but not where the state has to stay with what was shown.
        ahead = AHEAD if device.type == "cuda" and not cfg.interactive else 1
        try:
            while not self.interrupted and (tokens := list(itertools.islice(stream, ahead))):
                for token in torch.cat(tokens).tolist():
                    self.seen.update(self.unread)
                    self.unread = [token]
                    self.tokens_made += 1
                    if token == self.tokenizer.end_of_text and not cfg.ignore_eos:
                        return
                    yield token
        finally:  # also where a stop string ends it
            self.state = stream.state

    @functools.cached_property
    def fingerprint(self):
        """sha256 of the model's config and of its weights as they are in memory."""
        any_value = ("scan", "dropout", "residual_in_fp32")  # a kept state fits them all
        before = (("layer", "mamba"), ("mixer_rms_eps", 0.0))  # without these there was no other
        config = [item for item in sorted(asdict(self.model.config).items())
                  if item[0] not in any_value and item not in before]
        digest = hashlib.sha256(repr(config).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, path):
        # Plain tuples, because torch.load(weights_only=True) takes no others; clones, because a
        # view would be saved with all that it looks into.
        state = [tuple(tensor.cpu().clone() for tensor in layer) for layer in self.state]
        saved = {"fingerprint": self.fingerprint, "state": state, "unread": self.unread,
                 "seen": sorted(self.seen)}
        common.write_whole(path, lambda file: torch.save(saved, file))
        print(f"saved {path}", file=sys.stderr)

    def load(self, path):
        """Problem: not whole, or of another model; the conversation then stays as it was."""
        with common.reading(path, "a conversation"):
            saved = read_whole(path, self.model.device)
            common.check_kinds(saved, fingerprint=str, state=list, unread=list, seen=list)
        if saved["fingerprint"] != self.fingerprint:
            raise Problem(f"{path} is a conversation with another model, or with this one in "
                          "another --dtype or --quantize")
        with common.reading(path, "a conversation"):
            for token in (*saved["unread"], *saved["seen"]):
                if type(token) is not int or not 0 <= token < self.model.config.vocab_size:
                    raise ValueError("a token that the model does not know")
            state = self.model.init_state(1)
            counts = [[len(layer) for layer in layers] for layers in (saved["state"], state)]
            if counts[0] != counts[1] or not saved["unread"]:
                raise ValueError("not all of it is there")
            for own, kept in zip(itertools.chain(*state), itertools.chain(*saved["state"])):
                common.check_tensor("its state", kept, own.shape)
                own.copy_(kept.detach())
        self.state, self.unread, self.seen = state, saved["unread"], set(saved["seen"])
        print(f"loaded {path}", file=sys.stderr)

SETTINGS = (*SAMPLING, "stop", "ignore_eos", "allow_special", "max_new_tokens", "seed")
COMMANDS = """\
/reset             forget the conversation
/save FILE         keep the conversation in a file of a few MB
/load FILE         go on with a conversation that was kept
/set NAME VALUE    change a setting, as in: /set temperature 0.7
/set               show the settings
/quit              end, as Ctrl-D does; Ctrl-C only stops an answer"""

def chat(talk, cfg, generator):
    """Lines and commands from the person, and the answers of talk (a Conversation) to them."""
    def interrupt(number, frame):
        talk.interrupted = True

    print("Write a line and press Enter. Ctrl-C stops an answer, /help shows the commands, /quit "
          "or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = with_newlines(input("> ").removesuffix("\r"))
            command, _, rest = line.partition(" ")
            rest = rest.strip()
            if command == "/quit":
                break
            elif command == "/help":
                print(COMMANDS, file=sys.stderr)
            elif command == "/reset":
                talk.reset()
                print("the conversation is forgotten", file=sys.stderr)
            elif command in ("/save", "/load") and not rest:
                raise Problem(f"{command} needs the name of a file")
            elif command == "/save":
                talk.save(os.path.expanduser(rest))
            elif command == "/load":
                talk.load(os.path.expanduser(rest))
            elif command == "/set":
                cfg = with_setting(cfg, rest) if rest else cfg
                if rest.startswith("seed"):
                    generator = make_generator(cfg, talk.model.device)
                print("  ".join(f"{name}={getattr(cfg, name)}" for name in SETTINGS),
                      file=sys.stderr)
            elif command.startswith("/"):
                raise Problem(f"unknown command {command}; /help shows the commands")
            else:
                talk.hear(with_newlines(line), cfg.allow_special)
                talk.interrupted, before = False, signal.signal(signal.SIGINT, interrupt)
                for piece in talk.answer(cfg, generator):
                    print(piece, end="", flush=True)
                signal.signal(signal.SIGINT, before)
                print()
        except EOFError:
            break
        except KeyboardInterrupt:  # not in an answer; perhaps meant for one that had just ended
            print()
        except Problem as problem:
            print(problem, file=sys.stderr)

def with_setting(cfg, words):
    """cfg with the setting that "name value" says. Problem: it says none."""
    name, value = (re.split(r"\s+|=", words, maxsplit=1) + [""])[:2]
    if name not in SETTINGS:
        hint = common.nearest(name, SETTINGS) or "; /set shows them"
        raise Problem(f"no setting '{name}'{hint}")
    try:
        _, changed = common.parse_flags(Config, [f"--{name}={value}"])
        cfg = replace(cfg, **changed)
        check(cfg)
        return cfg
    except Problem as problem:  # which speaks of flags
        raise Problem(re.sub("^--", "/set ", str(problem))) from None

if __name__ == "__main__":
    common.run(main, Config)
