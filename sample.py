"""
Writes text with a model that train.py has trained, or with released weights. Needs nothing but its checkpoint.

python sample.py                                        # the newest model under out/
python sample.py --start="ROMEO:" --temperature=0.7
python sample.py --out_dir=out/shakespeare --num_samples=3 --top_k=20 --seed=1
python sample.py --start=FILE:prompt.txt --max_new_tokens=2000
python sample.py --interactive                          # write in turns; the model remembers all of it
python sample.py --pretrained=state-spaces/mamba-130m --start="The capital of France is"
"""
from __future__ import annotations

import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mamba import SCAN_METHODS, Mamba, get_file, sample, scan_method
from prepare_data import Problem, flag, load_tokenizer, open_tokenizer, run
from train import load_checkpoint, load_model, pick_device, pick_dtype


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
    seed: int | None = flag(None, "the same seed gives the same text; by default another text every time")
    interactive: bool = flag(False, "a line from you, an answer from the model, and so on; Ctrl-C stops an answer")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; by default the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float16; by default bfloat16 on CUDA, else float32")
    scan: str = flag("auto", "method of the selective scan: auto, sequential or chunked")


def newest_run():
    checkpoints = [*Path("out").glob("*/best.pt"), *Path("out").glob("*/ckpt.pt")]
    if not checkpoints:
        raise Problem("there is no model under out/; train one with: python train.py")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def load_pretrained(name, device, dtype, scan):
    """The model and its tokenizer: the tokenizer.json beside the weights, else that of GPT-NeoX, as for all released."""
    with contextlib.redirect_stdout(sys.stderr):    # what a download says is not part of the text
        try:
            model = Mamba.from_pretrained(name, device, dtype, scan=scan)
        except ValueError as error:
            raise Problem(f"--pretrained={name}: {error}") from None
        try:
            path = get_file(name, "tokenizer.json", local=True)
        except FileNotFoundError:
            path = get_file("EleutherAI/gpt-neox-20b", "tokenizer.json")
    tokenizer = open_tokenizer(str(path), None)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise Problem(f"{path} has {tokenizer.vocab_size:,} tokens and {name} knows {model.config.vocab_size:,}: "
                      "put its own tokenizer.json beside the weights")
    return model, tokenizer


def prompt_of(start):
    if not start.startswith("FILE:"):
        return start
    path = Path(start[len("FILE:"):])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Problem(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def as_text(tokenizer, tokens):
    """The text of a stream of (1,) tokens, in pieces. A token may end inside a character: its bytes wait for the rest."""
    ids, shown, whole = [], 0, 0    # ids[shown:whole] is what the last piece ended with, ids[whole:] is not yet text
    for token in tokens:
        ids.append(token.item())
        before, text = tokenizer.decode(ids[shown:whole]), tokenizer.decode(ids[shown:])
        if not text.endswith("\ufffd"):
            yield text[len(before):]
            shown, whole = whole, len(ids)
    yield tokenizer.decode(ids[shown:])[len(tokenizer.decode(ids[shown:whole])):]


def main(cfg, given):
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1:
        raise Problem("--num_samples and --max_new_tokens must be at least 1")
    try:
        sample(torch.zeros(1, 1), cfg.temperature, cfg.top_k, cfg.top_p)
    except ValueError as error:
        raise Problem(str(error)) from None
    if cfg.scan not in SCAN_METHODS:
        raise Problem(f"--scan takes {', '.join(SCAN_METHODS)}, not '{cfg.scan}'")
    if not 0 <= (cfg.seed or 0) < 2 ** 63:
        raise Problem(f"--seed must be at least 0 and below {2 ** 63}, not {cfg.seed}")
    if cfg.out_dir and cfg.pretrained:
        raise Problem("--out_dir and --pretrained are two models; give one of them")
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if cfg.pretrained:
        source = cfg.pretrained
        model, tokenizer = load_pretrained(source, device, getattr(torch, dtype), cfg.scan)
    else:
        out_dir = Path(cfg.out_dir) if cfg.out_dir else newest_run()
        checkpoint = load_checkpoint(*(out_dir / name for name in ("best.pt", "ckpt.pt", "ckpt.prev.pt")))
        source = f"{out_dir}, step {checkpoint['step']}"
        model = load_model(checkpoint, scan=cfg.scan).to(device, getattr(torch, dtype)).eval()
        tokenizer = load_tokenizer(checkpoint["meta"]["tokenizer"])
    start = prompt_of(cfg.start)
    prompt = tokenizer.encode(start) if start else []
    seed = torch.seed() % 2 ** 32 if cfg.seed is None else cfg.seed
    generator = torch.Generator().manual_seed(seed)
    settings = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "generator": generator}
    print(f"{source}: {model.num_params() / 1e6:.2f}M parameters; {device}, {dtype}, "
          f"scan {scan_method(cfg.scan)}, seed {seed}", file=sys.stderr)
    if cfg.interactive:
        chat(model, tokenizer, prompt, cfg.max_new_tokens, settings)
        return

    began, count = time.perf_counter(), cfg.num_samples * cfg.max_new_tokens
    for _ in range(cfg.num_samples):
        print(start, end="", flush=True)
        tokens = model.stream([prompt or beginning(tokenizer)], cfg.max_new_tokens, **settings)
        for piece in as_text(tokenizer, tokens):
            print(piece, end="", flush=True)
        print("\n---------------" if cfg.num_samples > 1 else "", flush=True)
    seconds = time.perf_counter() - began
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


def beginning(tokenizer):
    """What stands before a text: the token between documents, or the newline that sorts first in most alphabets."""
    return [tokenizer.end_of_text or 0]


def chat(model, tokenizer, prompt, max_new_tokens, settings):
    """The state carries the whole conversation, in constant memory: nothing is ever read twice."""
    state, unread = model.init_state(1), prompt or beginning(tokenizer)     # unread: tokens not yet in the state
    stopped = False

    def stop(number, frame):    # looked at between two tokens, so that the state is never left half updated
        nonlocal stopped
        stopped = True

    def answer():
        nonlocal unread
        for token in model.stream([unread], max_new_tokens, state=state, **settings):
            unread = [token.item()]
            yield token
            if stopped:
                return

    print("Write a line and press Enter. Ctrl-C stops an answer; /quit or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        except UnicodeDecodeError as error:
            print(f"that is not {error.encoding} text", file=sys.stderr)
            continue
        if line == "/quit":
            break
        try:
            unread = unread + tokenizer.encode(line + "\n")
        except Problem as problem:
            print(problem, file=sys.stderr)
            continue
        stopped, before = False, signal.signal(signal.SIGINT, stop)
        for piece in as_text(tokenizer, answer()):
            print(piece, end="", flush=True)
        signal.signal(signal.SIGINT, before)
        print()


if __name__ == "__main__":
    run(main, Config)
