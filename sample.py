"""
Writes text with a model that train.py has trained, or with released weights. Needs nothing but its checkpoint.

python sample.py                                        # the newest model under out/
python sample.py --start="ROMEO:" --temperature=0.7
python sample.py --out_dir=out/shakespeare --num_samples=3 --top_k=20 --seed=1
python sample.py --start=FILE:prompt.txt --max_new_tokens=2000
python sample.py --pretrained=state-spaces/mamba-130m --start="The capital of France is"
python sample.py --interactive --stop="\\nYou:"          # write in turns; the model remembers all of it
python sample.py --start=FILE:text.txt --show=delta     # which tokens it takes in; --show=loss: which surprise it
python sample.py --start=FILE:text.txt --show=loss --html=loss.html
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import html
import itertools
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends the long import of torch without a traceback
import torch
import torch.nn.functional as F

from mamba import SCAN_METHODS, Mamba, check_sampling, get_file, quantize_int8
from prepare_data import (
    Problem,
    flag,
    flush_to_disk,
    load_tokenizer,
    nearest,
    open_tokenizer,
    parse_flags,
    run,
)
from train import (
    UNREADABLE,
    load_checkpoint,
    load_model,
    pick_device,
    pick_dtype,
    pick_scan,
)


@dataclass
class Config:
    out_dir: str = flag("", "folder of the run; the newest under out/ by default")
    pretrained: str = flag("", "released weights instead: a folder, or a name such as state-spaces/mamba-130m")
    start: str = flag("", "text to continue, or FILE:path; by default the model begins a text")
    num_samples: int = flag(1, "texts to write")
    max_new_tokens: int = flag(500, "length of each (of each answer with --interactive)")
    temperature: float = flag(0.8, "below 1 safer, above 1 wilder, 0 always the likeliest token")
    top_k: int | None = flag(None, "only among the k likeliest tokens")
    top_p: float | None = flag(None, "only among the likeliest tokens that together have this probability")
    min_p: float | None = flag(None, "only among tokens at least this many times as likely as the likeliest, as 0.05")
    repetition_penalty: float | None = flag(None, "above 1, as 1.1: tokens that were there before become less likely")
    stop: str = flag("", r"text that ends an answer, itself not shown; several as A|B; \n is a newline, \| a bar")
    ignore_eos: bool = flag(False, "go on after the token that ends a text (a vocabulary of characters has none)")
    seed: int | None = flag(None, "the same seed gives the same text; by default another text every time")
    interactive: bool = flag(False, "a line from you, an answer from the model, and so on; /help there tells more")
    show: str = flag("", "read --start and colour its tokens: delta by how far the selection opens, loss by surprise")
    layer: int | None = flag(None, "the layer whose delta it is, from 0; by default the middle one")
    html: str = flag("", "file for what --show shows, instead of the terminal")
    cache_dir: str = flag("", "folder for downloaded weights, if Hugging Face's cache lacks them; default ~/.cache/mamba.py")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float16; by default bfloat16 on CUDA, else float32")
    scan: str = flag("auto", "method of the selective scan: auto, triton (fused kernels, on CUDA), chunked or sequential")
    compile: bool = flag(False, "on a CPU, torch.compile the model: 10 to 25 s at first, then 1.2 to 2 times as fast")
    quantize: str = flag("", "int8: weights of 8 bits, a quarter of float32's memory; on a CPU several times faster")


AHEAD = 8   # tokens that a GPU makes before they are read back and shown
PART = 512  # tokens of a text that go through the model at a time
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "ignore_eos", "max_new_tokens",
            "seed")
COMMANDS = """\
/reset             forget the conversation
/save FILE         keep the conversation in a file of a few MB
/load FILE         go on with a conversation that was kept
/set NAME VALUE    change a setting, as in: /set temperature 0.7
/set               show the settings
/quit              end, as Ctrl-D does; Ctrl-C only stops an answer"""


def newest_run():
    checkpoints = [*Path("out").glob("*/best.pt"), *Path("out").glob("*/ckpt.pt")]
    if not checkpoints:
        raise Problem("there is no model under out/; train one with: python train.py")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def load_pretrained(name, device, dtype, scan, cache_dir):
    """The model and its tokenizer: the tokenizer.json beside the weights, else that of GPT-NeoX, as for all released."""
    with contextlib.redirect_stdout(sys.stderr):    # what a download says is not part of the text
        try:
            model = Mamba.from_pretrained(name, device, dtype, cache_dir, scan=scan)
            try:
                # those of state-spaces have none of their own, or the same; do not ask for it each time
                path = get_file(name, "tokenizer.json", cache_dir, local=name.startswith("state-spaces/"))
            except (FileNotFoundError, ConnectionError) as error:
                if isinstance(error, ConnectionError):
                    print(f"whether {name} has a tokenizer of its own is not known ({error}); taking GPT-NeoX's")
                path = get_file("EleutherAI/gpt-neox-20b", "tokenizer.json", cache_dir)
        except ValueError as error:
            raise Problem(f"--pretrained={name}: {error}") from None
    tokenizer, config = open_tokenizer(str(path)), model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise Problem(f"{path} has {tokenizer.vocab_size:,} tokens and {name} knows {config.vocab_size:,}: "
                      "put its own tokenizer.json beside the weights")
    # rows of padding, which some config.json count as tokens, are never drawn
    config.vocab_size, config.pad_vocab_size_multiple = tokenizer.vocab_size, len(model.lm_head.weight)
    return model, tokenizer


def prompt_of(start):
    if not start.startswith("FILE:"):
        return start
    path = Path(start[len("FILE:"):])
    try:
        return path.read_text(encoding="utf-8-sig")     # some editors on Windows put a mark in front
    except UnicodeDecodeError as error:
        raise Problem(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def check(cfg):
    """Problem for flags or settings that have no meaning."""
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1:
        raise Problem("--num_samples and --max_new_tokens must be at least 1")
    try:
        check_sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
    except ValueError as error:
        raise Problem(str(error)) from None
    if cfg.scan not in SCAN_METHODS:
        raise Problem(f"--scan takes {', '.join(SCAN_METHODS)}, not '{cfg.scan}'")
    if cfg.quantize not in ("", "int8"):
        raise Problem(f"--quantize takes int8, not '{cfg.quantize}'")
    if not 0 <= (cfg.seed or 0) < 2 ** 63:
        raise Problem(f"--seed must be at least 0 and below {2 ** 63}, not {cfg.seed}")
    if Path(cfg.out_dir).is_file():
        raise Problem(f"--out_dir takes the folder of a run, {Path(cfg.out_dir).parent}, not a file in it")
    if cfg.out_dir and cfg.pretrained:
        raise Problem("--out_dir and --pretrained are two models; give one of them")
    if cfg.show not in ("", "delta", "loss"):
        raise Problem(f"--show takes delta or loss, not '{cfg.show}'")
    if cfg.show and (cfg.interactive or not cfg.start):
        raise Problem("--show reads a text: give it as --start, or --start=FILE:path, and without --interactive")
    if (cfg.html and not cfg.show) or (cfg.layer is not None and cfg.show != "delta"):
        raise Problem("--html goes with --show, and --layer with --show=delta")
    page = Path(cfg.html)
    if cfg.html and ((page.exists() and not page.is_file()) or not page.parent.is_dir()):
        raise Problem(f"--html takes a file in a folder that there is, not '{cfg.html}'")


def main(cfg, given):
    check(cfg)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if cfg.pretrained:
        source = cfg.pretrained
        model, tokenizer = load_pretrained(source, device, getattr(torch, dtype), cfg.scan, cfg.cache_dir)
    else:
        out_dir = Path(cfg.out_dir) if cfg.out_dir else newest_run()
        checkpoint = load_checkpoint(*(out_dir / name for name in ("best.pt", "ckpt.pt", "ckpt.prev.pt")))
        source = f"{out_dir}, step {checkpoint['step']}"
        model = load_model(checkpoint, scan=cfg.scan).to(device, getattr(torch, dtype)).eval()
        tokenizer = load_tokenizer(checkpoint["meta"]["tokenizer"])
    if cfg.quantize:
        quantize_int8(model)
    start = prompt_of(cfg.start)
    prompt = tokenizer.encode(start) if start else []
    if cfg.show:
        check_show(cfg, model, prompt)
    generator = make_generator(cfg, device)
    print(f"{source}: {model.num_params() / 1e6:.2f}M parameters; {device}, {dtype}{', int8 weights' * bool(cfg.quantize)}, "
          f"scan {pick_scan(cfg.scan, device, dtype, model.config.d_state)}, seed {cfg.seed}", file=sys.stderr)
    if cfg.show:
        show(cfg, model, tokenizer, prompt)
        return
    if cfg.interactive:
        sys.stdin.reconfigure(errors="surrogateescape")     # a byte that is no text is refused with its line, as any character
        chat(Conversation(model, tokenizer, prompt), cfg, generator)
        return

    began, count = time.perf_counter(), 0
    for _ in range(cfg.num_samples):
        print(start, end="", flush=True)
        text = Conversation(model, tokenizer, prompt)
        for piece in text.answer(cfg, generator):
            print(piece, end="", flush=True)
        print("\n---------------" if cfg.num_samples > 1 else "", flush=True)
        count += text.tokens_made
    seconds = time.perf_counter() - began
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


def make_generator(cfg, device):
    """On a GPU of its own: random numbers from the CPU would make it wait. MPS takes those of the CPU."""
    if cfg.seed is None:
        cfg.seed = torch.seed() % 2 ** 32
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(cfg.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to text


def as_text(tokenizer, tokens, before=(), cut_off=False):
    """
    The text of token ids that follow those in before: a piece for each, and a last one. A token may end inside a
    character, which then waits for its other bytes; bytes that belong to no character come out as U+FFFD, at the end too
    unless tokens are cut_off there, somewhere in a text.
    """
    decode, unfinished = tokenizer.decode, "\ufffd"
    ends = ([*before[-n:]] for n in range(1, 5))
    ids = next((end for end in ends if unfinished not in decode(end)), [])  # one that does not begin inside a character
    out, done = len(ids), len(decode(ids))  # ids[:out] are out: next to them a token decodes as it does in the text
    for token in tokens:
        ids.append(int(token))
        text = decode(ids)
        if not text.endswith(unfinished):
            yield text[done:]
            ids = ids[out:]
            out, done = len(ids), len(decode(ids))
        elif len(ids) - out < 4:    # a character has at most 4 bytes, and a token at least one
            yield ""
        else:                       # these bytes make none; but the last of them may begin one
            yield text[done:-1]
            ids = ids[-4:]
            out, done = 0, len(decode(ids).removesuffix(unfinished))
    rest = decode(ids)[done:]
    yield rest.rstrip(unfinished) if cut_off else rest


def stop_strings(text):
    """Those in a --stop: separated by |; \\n and \\t are a newline and a tab, and a backslash takes | or \\ as it is."""
    parts = re.findall(r"(?:\\.|[^|])+", text, re.DOTALL)
    return [re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), part, flags=re.DOTALL) for part in parts]


def until(stops, pieces):
    """The pieces up to the first end of a string in stops. What may be the beginning of one waits until it is decided."""
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]
        if found:
            yield held[:min(found)[1]]
            return
        wait = max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[:len(held) - wait]
        held = held[len(held) - wait:]
    yield held


# ---------------------------------------------------------------------------------------------------------------------
# A text in turns


class Conversation:
    """What the model has read and written so far, as its state: constant memory, and nothing is ever read twice."""

    def __init__(self, model, tokenizer, prompt):
        self.model, self.tokenizer = model, tokenizer
        # what stands before a text: the token between documents, or the newline that sorts first in most alphabets
        self.prompt = prompt or [tokenizer.end_of_text or 0]
        self.tokens_made, self.interrupted = 0, False
        self.reset()

    def reset(self):
        self.state = self.model.init_state(1)
        self.unread = list(self.prompt)     # tokens that are not yet in the state
        self.seen = set()                   # those that are, for the repetition penalty

    def answer(self, cfg, generator):
        """The model's text in pieces, up to a stop string, the token that ends a text, or max_new_tokens."""
        tokens = self._tokens(cfg, generator)
        return until(stop_strings(cfg.stop), as_text(self.tokenizer, tokens, before=self.unread, cut_off=True))

    def _tokens(self, cfg, generator):
        device = self.model.lm_head.weight.device
        while cfg.interactive and len(self.unread) > PART and not self.interrupted:
            part = torch.tensor([self.unread[:PART]], device=device)
            with torch.inference_mode():
                self.model(part, state=self.state, num_last_tokens=1)
            self.seen.update(self.unread[:PART])
            self.unread = self.unread[PART:]
        if self.interrupted:    # looked at between two parts or tokens, so that the state is never left half updated
            return
        seen = None
        if cfg.repetition_penalty is not None:
            seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool)
            seen[0, sorted(self.seen)] = True
            seen = seen.to(device)
        stream = self.model.stream([self.unread], cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, generator,
                                   self.state, cfg.min_p, cfg.repetition_penalty, seen=seen, compile=cfg.compile)
        # a GPU may work ahead, but not where the state has to stay with what was shown
        ahead = AHEAD if device.type == "cuda" and not cfg.interactive else 1
        while tokens := list(itertools.islice(stream, ahead)):
            for token in torch.cat(tokens).tolist():
                self.seen.update(self.unread)
                self.unread = [token]
                self.tokens_made += 1
                if token == self.tokenizer.end_of_text and not cfg.ignore_eos:
                    return
                yield token
                if self.interrupted:
                    return

    @functools.cached_property
    def fingerprint(self):
        """sha256 of the model's config and of its weights as they are in memory."""
        config = {k: v for k, v in dataclasses.asdict(self.model.config).items() if k not in ("scan", "dropout")}
        digest = hashlib.sha256(repr(sorted(config.items())).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, path):
        state = [tuple(tensor.cpu().clone() for tensor in layer) for layer in self.state]   # without a larger storage
        saved = {"fingerprint": self.fingerprint, "state": state, "unread": self.unread, "seen": sorted(self.seen)}
        write_file(path, lambda f: torch.save(saved, f))

    def load(self, path):
        """Problem if the file is not whole or of another model; the conversation then stays as it was."""
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if archive.testzip():
                    raise ValueError
            saved = torch.load(path, map_location=self.model.lm_head.weight.device, weights_only=True)
            if saved.keys() != {"fingerprint", "state", "unread", "seen"}:
                raise ValueError
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise Problem(f"cannot read {path}: {error.strerror}") from None
        except UNREADABLE:
            raise Problem(f"{path} is damaged or not a conversation") from None
        if saved["fingerprint"] != self.fingerprint:
            raise Problem(f"{path} is a conversation with another model, or with this one in another --dtype or --quantize")
        self.state, self.unread, self.seen = saved["state"], saved["unread"], set(saved["seen"])


def write_file(path, write):
    """Calls write(file). What was there under this name stays until all of it is on the disk."""
    part = ""
    try:
        path = os.path.realpath(path)   # a link stays one
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is there, and not a file")
        part = f"{path}.part"
        with open(part, "wb") as f:
            write(f)
            flush_to_disk(f)
        os.replace(part, path)
    except (OSError, RuntimeError, ValueError) as error:    # a full disk to torch.save; a NUL in the name
        raise Problem(f"could not write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with contextlib.suppress(OSError, ValueError):  # it is in place, or could not even be opened
            os.unlink(part)


def chat(talk, cfg, generator):
    def interrupt(number, frame):
        talk.interrupted = True

    print("Write a line and press Enter. Ctrl-C stops an answer, /help shows the commands, /quit or Ctrl-D ends.",
          file=sys.stderr)
    while True:
        try:
            line = input("> ")
            command, _, rest = line.partition(" ")
            path = os.path.expanduser(rest.strip())
            if command == "/quit":
                break
            elif command == "/help":
                print(COMMANDS, file=sys.stderr)
            elif command == "/reset":
                talk.reset()
            elif command in ("/save", "/load") and not path:
                raise Problem(f"{command} needs the name of a file")
            elif command == "/save":
                talk.save(path)
                print(f"saved {path}", file=sys.stderr)
            elif command == "/load":
                talk.load(path)
                print(f"loaded {path}", file=sys.stderr)
            elif command == "/set":
                if rest.strip():
                    cfg, name = with_setting(cfg, rest.strip())
                    if name == "seed":
                        generator = make_generator(cfg, talk.model.lm_head.weight.device)
                print("  ".join(f"{name}={getattr(cfg, name)}" for name in SETTINGS), file=sys.stderr)
            elif command.startswith("/"):
                raise Problem(f"unknown command {command}; /help shows the commands")
            else:
                try:
                    new = talk.tokenizer.encode(line + "\n")
                except Problem:     # an alphabet without a newline, or without another character, which is told again
                    new = talk.tokenizer.encode(line)
                talk.unread = talk.unread + new
                talk.interrupted, before = False, signal.signal(signal.SIGINT, interrupt)
                for piece in talk.answer(cfg, generator):
                    print(piece, end="", flush=True)
                signal.signal(signal.SIGINT, before)
                print()
        except EOFError:
            break
        except KeyboardInterrupt:   # not in an answer; perhaps meant for one that had just ended
            print()
        except Problem as problem:
            print(problem, file=sys.stderr)


def with_setting(cfg, words):
    """(cfg with the setting that "name value" says, its name)."""
    name, value = (re.split(r"\s+|=", words, maxsplit=1) + [""])[:2]
    if name not in SETTINGS:
        raise Problem(f"no setting '{name}'{nearest(name, SETTINGS)}; /set shows them")
    cfg = dataclasses.replace(cfg, **parse_flags(Config, [f"--{name}={value}"])[1])
    check(cfg)
    return cfg, name


# ---------------------------------------------------------------------------------------------------------------------
# Looking inside: --show


@torch.no_grad()
def surprise(model, ids):
    """-log p of each token after those before it, in nats; None for the first. The parts follow each other by the state."""
    ids, state, values = torch.tensor(ids, device=model.lm_head.weight.device), model.init_state(1), [None]
    for part in ids.split(PART):
        logits, _ = model(part[None], state=state)                              # (1, PART, V)
        after = ids[len(values):len(values) + len(part)]                        # the last part has one less
        values += F.cross_entropy(logits[0, :len(after)].float(), after, reduction="none").tolist()
    return values


@torch.no_grad()
def opening(model, ids, layer):
    """
    delta of each token in one layer, the mean over the channels: large where the token is taken in and the past fades,
    near 0 where it passes. A forward hook reads dt, the first part of what x_proj makes; delta = softplus(dt_proj(dt)).
    """
    mixer, values = model.backbone["layers"][layer].mixer, []

    def read_dt(x_proj, inputs, output):                    # output: (1, PART, dt_rank + 2 N), of one token without PART
        # dt_proj's weight and bias apart, as in the block: with 16-bit weights the bias is still added in float32
        delta = F.softplus(F.linear(output[..., :mixer.dt_rank], mixer.dt_proj.weight) + mixer.dt_proj.bias)
        values.extend(delta.mean(-1).flatten().tolist())
    state = model.init_state(1)
    with mixer.x_proj.register_forward_hook(read_dt):
        for part in torch.tensor(ids, device=model.lm_head.weight.device).split(PART):
            model(part[None], state=state, num_last_tokens=1)
    return values


def check_show(cfg, model, ids):
    layers = model.config.n_layer
    if not ids:
        raise Problem("--show has nothing to read: the text of --start is empty")
    if not 0 <= (cfg.layer or 0) < layers:
        raise Problem(f"--layer must be from 0 to {layers - 1}, not {cfg.layer}")


def show(cfg, model, tokenizer, ids):
    """Prints the text of ids coloured by the delta or loss of its tokens, or writes it as HTML, or lists the numbers."""
    layers = model.config.n_layer
    layer = layers // 2 if cfg.layer is None else cfg.layer
    values = surprise(model, ids) if cfg.show == "loss" else opening(model, ids, layer)
    spans = list(by_text(as_text(tokenizer, ids), values))
    known = [value for _, value in spans if value is not None]
    low, high = np.percentile(known, [2, 98]) if known else (0, 0)    # one outlier must not make all others pale
    shares = [0 if value is None else min(max((value - low) / (high - low or 1), 0), 1) for _, value in spans]
    what = "surprise in nats" if cfg.show == "loss" else f"delta in layer {layer} of 0 to {layers - 1}, mean over channels"

    if cfg.html:
        write_file(cfg.html, lambda f: f.writelines(line.encode() for line in as_html(what, low, high, spans, shares)))
        print(f"wrote {cfg.html}", file=sys.stderr)
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        if os.name == "nt":
            os.system("")   # makes an older console understand colours
        scale = "".join(painted(" ", step / 20) for step in range(21))
        print(f"{what}: {low:.3g} {scale} {high:.3g}")
        for (text, _), share in zip(spans, shares):
            print(painted(text, share), end="")
        print()
    else:
        for text, value in spans:
            print(f"{'-' if value is None else format(value, '.4f'):>8}  {text!r}")


def by_text(pieces, values):
    """(text, value) for each token. Tokens that make a character together are one, with the mean of their values."""
    *pieces, rest = pieces
    pieces[-1] += rest
    group = []
    for i, (piece, value) in enumerate(zip(pieces, values)):
        group += [] if value is None else [value]
        if piece or i == len(pieces) - 1:
            yield piece, sum(group) / len(group) if group else None
            group = []


def painted(text, share):
    """Text on a ground between dark grey (share 0) and orange (1), for a terminal with 24-bit colours."""
    ground = ";".join(str(round(dark + share * (bright - dark))) for dark, bright in ((48, 255), (48, 140), (56, 0)))
    colour = f"\033[38;2;{'255;255;255' if share < 0.5 else '0;0;0'};48;2;{ground}m"
    text = text.translate({c: 0x2400 + c for c in range(32) if c not in b"\t\n"})  # no escape sequence from a text
    return colour + text.replace("\n", f"↵\033[0m\n{colour}") + "\033[0m"


def as_html(what, low, high, spans, shares):
    """One HTML page in pieces; the text in <main> is that of the spans."""
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{what}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.6 ui-monospace, monospace }}
main {{ white-space: pre-wrap; overflow-wrap: anywhere }}
span {{ background: rgb(255 110 0 / var(--a)) }}
.n::before {{ content: "↵"; opacity: 0.5 }}
</style>
</head>
<body>
<p>{what}: {low:.3g} """
    yield from (f'<span style="--a:{0.6 * step / 20:.2f}"> </span>' for step in range(21))
    yield f" {high:.3g}</p>\n<main>"
    for (text, value), share in zip(spans, shares):
        newline, title = ' class="n"' * text.startswith("\n"), "" if value is None else f"{value:.4f}"
        escaped = html.escape(text).replace("\r", "&#13;")  # a browser would turn the character itself into a newline
        yield f'<span{newline} style="--a:{0.6 * share:.2f}" title="{title}">{escaped}</span>'
    yield "</main>\n</body>\n</html>\n"


if __name__ == "__main__":
    run(main, Config)
