"""
Looking inside a model: sample.py --show. A text is coloured token by token, by one of

    loss        how much the token surprised the model
    delta       how far a layer opens to the token
    attention   how much of what a later token takes in, in a layer, comes from the token

First what is measured, then what all ways of showing it share, then one way after the other: on a
terminal, as a page, and as a picture. A terminal shows the attention of the last token, a page that
of the token one points at, and a picture all of it, as a matrix.
"""
from __future__ import annotations

import contextlib
import html
import itertools
import json
import os
import sys
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Problem
from mamba import MambaBlock, Mixer, is_plain

PART = 512  # tokens of a text that are read at once: memory stays small
LONGEST = 4096  # tokens whose attention is shown: it takes minutes, and a page of 8 MB

def check(cfg, model, ids):
    """Problem: no text, no such layer or channel, or a text too long for its attention."""
    if not ids:
        raise Problem("--show has nothing to read: the text of --start is empty")
    if cfg.show == "loss":
        return
    layer, layers = layer_of(cfg, model), len(model.backbone["layers"])
    if not 0 <= layer < layers:
        raise Problem(f"--layer must be from 0 to {layers - 1}, not {layer}")
    mixer = model.backbone["layers"][layer].mixer
    if not isinstance(mixer, MambaBlock if cfg.show == "attention" else Mixer):
        name = type(mixer).__name__
        raise Problem(f"--show={cfg.show} cannot look into layer {layer} ({name}): attention is "
                      "that of Mamba-1, delta that of Mamba-1, 2 and 3")
    if not 0 <= (cfg.channel or 0) < len(mixer.D):
        raise Problem(f"--channel must be from 0 to {len(mixer.D) - 1}, not {cfg.channel}")
    most = COLUMNS if is_picture(cfg.html) else LONGEST
    if cfg.show == "attention" and len(ids) > most:
        raise Problem(f"--show=attention takes {LONGEST:,} tokens, a picture of it {COLUMNS}; the "
                      f"text of --start has {len(ids):,}")

def layer_of(cfg, model):
    """The number of the layer to look into: --layer, or the middle one."""
    return model.config.n_layer // 2 if cfg.layer is None else cfg.layer

def is_picture(path):
    return path.lower().endswith(".svg")

# ---- What is measured ----------------------------------------------------------------------------

@torch.no_grad()
def surprise(model, ids):
    """(L,): -log p of each token after those before it, in nats; nan for the first."""
    ids = torch.tensor([ids], device=model.device)
    parts = model.read(ids, num_last_tokens=0, part=PART)
    next_ids = ids[0].roll(-1).split(PART)  # after the last there is none: its value is dropped
    values = torch.cat([F.cross_entropy(logits[0].float(), after, reduction="none")
                        for (logits, _), after in zip(parts, next_ids)])
    return F.pad(values[:-1], (1, 0), value=torch.nan)

@torch.no_grad()
def outputs(model, ids, *modules):
    """What some modules of the model make of a text, (PART, ...) each, part after part."""
    made = {}

    def keep(module, inputs, output):   # output: (1, PART, ...)
        made[module] = output[0]
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(keep))
        for _ in model.read(torch.tensor([ids], device=model.device), part=PART):
            yield [made[module] for module in modules]

@torch.no_grad()
def selected(model, ids, layer):
    """What a layer selects by its tokens, part after part of a text: delta (PART, D), B and C
    (PART, N). Of Mamba-2 and Mamba-3 delta alone, (PART, H). It is made of what hooks see, as in
    the blocks, so that it is what really runs."""
    mixer = model.backbone["layers"][layer].mixer
    config, number = mixer.config, torch.promote_types(mixer.D.dtype, torch.float32)
    if isinstance(mixer, MambaBlock):
        adapted = [] if is_plain(mixer.dt_proj) else [mixer.dt_proj]    # else it is not called
        for made, *delta in outputs(model, ids, mixer.x_proj, *adapted):
            parts = made.split((mixer.dt_rank, mixer.d_state, mixer.d_state), dim=-1)
            if eps := config.mixer_rms_eps:
                parts = [F.rms_norm(part, part.shape[-1:], eps=eps) for part in parts]
            dt, B, C = parts
            if not adapted:
                delta = [F.linear(dt, mixer.dt_proj.weight) + mixer.dt_proj.bias]
            yield F.softplus(delta[0].to(number)), B.to(number), C.to(number)
    else:
        begin = sum(mixer.sizes[:4]) if config.layer == "mamba3" else -config.nheads
        for (made,) in outputs(model, ids, mixer.in_proj):
            delta = made[:, begin:][:, :config.nheads].to(number) + mixer.dt_bias
            yield (F.softplus(delta).clamp(*config.dt_limit),)

def opening(model, ids, layer, channel=None):
    """(L,): delta of each token in a layer, of one channel (in Mamba-2 and 3 a head) or the mean
    over all: large where the token is taken in and the past fades, near 0 where it passes."""
    return torch.cat([delta.mean(1) if channel is None else delta[:, channel]
                      for delta, *_ in selected(model, ids, layer)])

@torch.no_grad()
def attention(model, ids, layer, channel=None, first=0):
    """How much token s counts for token t in the scan of a layer, the hidden attention of Mamba
    (arXiv 2403.01590). Written without its states the scan of a channel is

        y_t = D u_t + sum over s <= t of M[t, s] u_s
        M[t, s] = C_t . exp((delta_{s+1} + ... + delta_t) A) B_s delta_s

    Returns M of one channel, or the mean over all channels of |M|: what comes after the scan may
    turn the sign of a channel, so that in a mean of M itself channels would cancel that do not.
    (L - first, L): a row for each t from first on; 0 where s > t."""
    delta, B, C = (torch.cat(parts) for parts in zip(*selected(model, ids, layer)))
    A = -torch.exp(model.backbone["layers"][layer].mixer.A_log.to(delta.dtype)).T       # (N, D)
    if channel is not None:
        delta, A = delta[:, channel, None], A[:, channel, None]
    length, together = len(ids), 64
    M = delta.new_zeros(length - first, length)
    for begin in tqdm(range(first, length, together), "attention", leave=False, delay=1,
                      disable=None):
        end = min(begin + together, length)
        # What each t from begin to end reads of the state after step s: C_t, and then step by step
        # into the past C_t times all decays since. Products, no quotients: nothing overflows.
        reads = delta.new_zeros(A.shape[0], end - begin, A.shape[1])        # (N, t, D)
        for s in reversed(range(end)):
            if s >= begin:
                reads[:, s - begin] = C[s, :, None]
            counts = torch.tensordot(B[s], reads, 1) * delta[s]             # (t, D)
            counts = counts.abs().mean(1) if channel is None else counts[:, 0]
            M[begin - first:end - first, s] = counts
            reads *= torch.exp(delta[s] * A)[:, None]
            # numbers below 1e-38 make some CPUs slow
            torch.hardshrink(reads, 1e-30, out=reads)
    return M

def measured(cfg, model, ids):
    """What --show shows, in words, and its values (rows, L): one row, which says something of each
    token, or for the attention in a file one of each token."""
    if cfg.show == "loss":
        return "surprise in nats", surprise(model, ids)[None]
    layer = layer_of(cfg, model)
    one = "channel" if model.config.layer == "mamba" else "head"
    of = f"mean over {one}s" if cfg.channel is None else f"{one} {cfg.channel}"
    where = f"in layer {layer} of 0 to {model.config.n_layer - 1}, {of}"
    if cfg.show == "delta":
        return f"delta {where}", opening(model, ids, layer, cfg.channel)[None]
    first, whose = (0, "each") if cfg.html else (len(ids) - 1, "the last")
    values = attention(model, ids, layer, cfg.channel, first).abs()
    is_later = torch.ones_like(values).triu(first + 1).bool()
    what = f"attention {where}, percent of what {whose} token takes in"
    return what, values.masked_fill(is_later, torch.nan)

# ---- What all ways of showing share --------------------------------------------------------------

def show(cfg, model, ids, pieces):
    """The text of ids coloured by what --show says: on the terminal, or in a file (--html). In a
    pipe the numbers are listed. pieces: the text of each token, and a last one."""
    what, values = measured(cfg, model, ids)
    texts, groups = zip(*by_text(pieces))
    values = means(values.T, groups).T
    if cfg.show == "attention":
        values = values if len(values) == 1 else means(values, groups)
        values = 100 * values / values.nansum(1, keepdim=True).clamp(min=1e-30)
    values = values.double().cpu().numpy()
    known = values[~np.isnan(values)]
    # one outlier must not make all others pale
    low, high = np.percentile(known if known.size else [0], [2, 98])
    shares = np.clip((values - low) / (high - low or 1), 0, 1)
    # What is shown are spans: a text, and its share of the colour, from 0 to 1, or None.
    spans = [(text, None if np.isnan(share) else share) for text, share in zip(texts, shares[-1])]
    numbers = ["" if np.isnan(value) else f"{value:.4f}" for value in values[-1]]
    # spaces that do not vanish at the end of a line
    steps = [("\u00a0", step / 20) for step in range(21)]
    scale = [(f"{low:.3g} ", None), *steps, (f" {high:.3g}", None)]

    if cfg.html:
        if cfg.show == "attention":
            write = as_svg_matrix if is_picture(cfg.html) else as_html_of_attention
            pieces = write(what, scale, spans, values, shares)
        else:
            pieces = (as_svg(what, scale, spans) if is_picture(cfg.html) else
                      as_html(what, scale, spans, numbers))
        common.write_whole(cfg.html, lambda file: file.write("".join(pieces).encode()))
        print(f"wrote {cfg.html}", file=sys.stderr)
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        if os.name == "nt":
            os.system("")  # makes an older console understand colours
        print(f"{what}: ", *(painted(*span) for span in scale), sep="")
        print(*(painted(*span) for span in spans), sep="")
    else:
        for (text, _), number in zip(spans, numbers):
            print(f"{number or '-':>8}  {text!r}")

def by_text(pieces):
    """(text, its tokens as a slice) for each token, or for those that make a character together."""
    *pieces, rest = pieces
    pieces[-1] += rest
    begin = 0
    for end, piece in enumerate(pieces, 1):
        if piece:
            yield piece, slice(begin, end)
            begin = end

def means(values, groups):
    """(tokens, ...) -> (groups, ...): the means over groups of tokens, without those that are nan.
    """
    return torch.stack([values[group].nanmean(0) for group in groups])

CONTROLS = {c: 0x2400 + c for c in range(32) if c not in b"\t\n"}  # to their pictures, as in ␛

def painted(text, share):
    """Text on a ground between dark grey and orange, for a terminal with 24-bit colours."""
    text = text.translate(CONTROLS)  # no escape sequence from a text
    if share is None:
        return text.replace("\n", "↵\n")
    ends = ((48, 255), (48, 140), (56, 0))
    ground = ";".join(str(round(dark + share * (bright - dark))) for dark, bright in ends)
    ink = "255;255;255" if share < 0.5 else "0;0;0"
    colour = f"\033[38;2;{ink};48;2;{ground}m"
    return colour + text.replace("\n", f"↵\033[0m\n{colour}") + "\033[0m"

def opacity(share):
    """Of the orange on a page. Text on it stays readable, light or dark, and less is no value."""
    return f"{0.1 + 0.5 * share:.2f}"

def as_html(what, scale, spans, numbers, script=""):
    """One HTML page, in pieces; the text in <main> is that of the spans."""
    def span(text, share, more=""):
        # a browser would turn the character \r itself into a newline
        text = html.escape(text).replace("\r", "&#13;").replace("\n", "<i></i>\n")
        colour = "" if share is None else f' style="--a:{opacity(share)}"'
        return f"<span{colour}{more}>{text}</span>"

    yield f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{what}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
p, main {{ font: 1rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
span {{ background: rgb(255 110 0 / var(--a, 0)) }}
i::before {{ content: "↵"; opacity: 0.5 }}
</style>
<p>{what}: {"".join(span(*step) for step in scale)}</p>
<main>"""
    for (text, share), number in zip(spans, numbers):
        yield span(text, share, f' title="{number}"' * (script == ""))
    yield f"</main>\n{script}</html>\n"

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

def as_html_of_attention(what, scale, spans, values, shares):
    """A page where the token that one points at, or taps, colours those that it takes in."""
    levels = np.nan_to_num(shares * (len(DIGITS) - 1)).round().astype(np.uint8)
    colours = np.frombuffer(DIGITS.encode(), np.uint8)[levels]
    rows = [[colours[t, :t + 1].tobytes().decode(),
             [[int(s), f"{row[s]:.3g}"] for s in np.argsort(-row[:t + 1], kind="stable")[:5]]]
            for t, row in enumerate(values)]
    script = SCRIPT.replace("DIGITS", DIGITS)
    script = script.replace("ROWS", json.dumps(rows, separators=(",", ":")))
    return as_html(what, scale, spans, [""] * len(spans), script)

SCRIPT = """<script>
// for each token: the colour of itself and those before it, as digits; and where most comes from
const rows = ROWS, digits = "DIGITS";
const main = document.querySelector("main"), spans = [...main.children];
// below the text, which must not move under the pointer when there is more to tell
const told = document.body.appendChild(document.createElement("p"));
told.style = "position: sticky; bottom: 0; margin: 0; padding: 0.5rem 0; background: Canvas";
told.textContent = "Point at a token, or tap it, to see which tokens it takes in from.";
let chosen = rows.length - 1, held = null;

function choose(t) {
  const [colours, most] = rows[t], name = s => JSON.stringify(spans[s].textContent);
  const from = most.map(([s, percent]) =>
    `${percent} % from ${s < t ? `${name(s)} ${t - s} before` : "itself"}`);
  told.textContent = `${name(t)} takes in ${from.join(", ")}`;
  spans[chosen].style.outline = "";
  spans[chosen = t].style.outline = "2px solid";
  spans.forEach((span, s) => {
    const opacity = s > t ? 0 : 0.1 + 0.5 * digits.indexOf(colours[s]) / (digits.length - 1);
    span.style.setProperty("--a", opacity);
  });
}
const pointedAt = event => spans.indexOf(event.target.closest("main > span"));
main.onmouseover = event => {
  if (held === null && pointedAt(event) >= 0) choose(pointedAt(event));
};
main.onclick = event => {     // holds a token, until another click on it lets go
  const t = pointedAt(event);
  if (t >= 0) choose(t);
  held = t < 0 || t === held ? null : t;
};
document.onkeydown = event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key] ?? 0;
  if (step && rows[chosen + step]) choose(held = chosen + step);
};
</script>
"""

COLUMNS = 72  # of the text in a picture, at most
# pixels: of a character, of a row, around all of it, and of a cell of a matrix
COLUMN, ROW, MARGIN, CELL = 9, 22, 12, 17
PICTURES = {**CONTROLS, ord("\t"): " " * 4, 0xfffe: "\ufffd", 0xffff: "\ufffd"}  # not in XML

def as_svg(what, scale, spans):
    """The same as a picture in pieces, for a README: it follows the reader's light or dark mode."""
    marked = [(text.replace("\n", "↵\n"), share) for text, share in spans]
    rows = list(in_rows([(f"{what}\n", None), *scale, ("\n\n", None), *marked]))
    return in_frame(what, widest(rows), len(rows) * ROW, drawn(rows))

def as_svg_matrix(what, scale, spans, values, shares):
    """A picture in pieces: a row for each token, of cells for it and all before it. Its text stands
    at the row's end, and so above the column where later tokens take in from it."""
    legend = list(in_rows([(f"{what}\n", None), *scale, ("\n\n", None)]))
    signs = {**PICTURES, ord(" "): "␣", ord("\t"): "⇥", ord("\n"): "↵"}
    labels = [text.translate(signs) for text, _ in spans]
    top = MARGIN + len(legend) * ROW

    def cells():
        yield from drawn(legend)
        for t, label in enumerate(labels):
            y = top + t * CELL
            for s in range(t + 1):
                yield (f'<rect x="{MARGIN + s * CELL}" y="{y}" width="{CELL}" height="{CELL}" '
                       f'fill-opacity="{opacity(shares[t, s])}"/>')
            x = MARGIN + (t + 1) * CELL + 4
            yield f'<text x="{x}" y="{y + 14}">{html.escape(label, quote=False)}</text>\n'
    ends = [(t + 1) * CELL + 4 + columns(label) * COLUMN for t, label in enumerate(labels)]
    height = len(legend) * ROW + len(labels) * CELL
    return in_frame(what, max(widest(legend), *ends), height, cells())

def in_frame(what, width, height, drawn):
    """A whole SVG file, in pieces, around what is drawn on a page of this width and height."""
    width, height = width + 2 * MARGIN, height + 2 * MARGIN
    size = f'width="{width}" height="{height}"'
    yield f"""<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}">
<title>{what}</title>
<style>
text {{ fill: #1f2328; font: 15px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }}
rect {{ fill: rgb(255, 110, 0) }}
.page {{ fill: white }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #f0f6fc }} .page {{ fill: #0d1117 }} }}
</style>
<rect class="page" {size}/>
"""
    yield from drawn
    yield "</svg>\n"

def widest(rows):
    """The width in pixels of the widest of some rows."""
    widths = [columns("".join(character for character, _ in row)) for row in rows]
    return min(max(widths), COLUMNS) * COLUMN

def drawn(rows):
    """Rows of (character, share) in SVG, from the top of the page on."""
    for i, row in enumerate(rows):
        x, y = MARGIN, MARGIN + i * ROW
        for share, cells in itertools.groupby(row, key=lambda cell: cell[1]):
            text = "".join(character for character, _ in cells)
            length = COLUMN * columns(text)
            if share is not None:
                yield (f'<rect x="{x}" y="{y}" width="{length}" height="{ROW}" '
                       f'fill-opacity="{opacity(share)}"/>')
            if not text.isspace():
                # made as long as its ground, whatever the font; spaces would be lost at its ends
                solid = html.escape(text, quote=False).replace(" ", "\u00a0")
                yield (f'<text x="{x}" y="{y + 16}" textLength="{length}" '
                       f'lengthAdjust="spacingAndGlyphs">{solid}</text>')
            x += length
        yield "\n"

def in_rows(spans):
    """The spans as rows of (character, share), which end at newlines and, where they would be
    longer than COLUMNS, at a space."""
    row = []
    for cell in ((c, share) for text, share in spans for c in text.translate(PICTURES)):
        row.append(cell)
        line = "".join(character for character, _ in row)
        if line.endswith("\n"):
            yield row[:-1]
            row = []
        elif columns(line) > COLUMNS + line.endswith(" "):  # one space may stand in the margin
            end = line.rfind(" ", 0, -1) + 1 or len(line) - 1
            yield row[:end]
            row = row[end:]
    if row:
        yield row

def columns(text):
    """The width of a text: a Chinese character takes two columns, and an accent of its own none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    accents = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)
    return len(text) + wide - accents
