"""HTML and SVG views of one step of a recursion trace, with all foreign text escaped."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry.demo.trace import AttentionMap, RecursionTrace, TraceStep

SHOWN = 5  # classes; each has a colour in STYLE
ATTENTION = (234, 88, 12)  # its colour; the strongest patch is covered by STRONGEST of 255
STRONGEST = 210
PICTURE = "#picture"  # stands for the picture where many views share it
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 190, 58, 8, 16, 26  # of the curve

STYLE = """
.sf { --halt: #111827; --quiet: #57606a; --c0: #2563eb; --c1: #c2410c; --c2: #15803d;
  --c3: #9333ea; --c4: #b91c1c; }
.dark .sf { --halt: #f3f4f6; --quiet: #b4bac4; --c0: #60a5fa; --c1: #fb923c; --c2: #4ade80;
  --c3: #c084fc; --c4: #f87171; }
.sf, .sf * { box-sizing: border-box; }
.sf p { margin: .35rem 0; overflow-wrap: anywhere; }
.sf h2 { margin: 0 0 .2rem; font-size: 1.15rem; overflow-wrap: anywhere; }
.sf-quiet, .sf figcaption, .sf caption { color: var(--quiet) !important;
  font-size: .85rem; }
.sf-top { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.sf-pictures { display: flex; gap: .75rem; flex: 1 1 17rem; max-width: 24rem; }
.sf figure { margin: 0; flex: 1 1 0; min-width: 0; }
.sf figcaption { margin-top: .3rem; line-height: 1.35; }
.sf-stack { position: relative; aspect-ratio: 1; border: 1px solid var(--border-color-primary); }
.sf-stack img { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0;
  max-width: none; border-radius: 0; }
.sf-pixels { image-rendering: pixelated; }
.sf-answer { flex: 1 1 15rem; min-width: 0; }
.sf table { width: 100%; table-layout: fixed; border-collapse: collapse; margin: .2rem 0; }
.sf caption { text-align: left; padding: 0 0 .2rem; }
.sf table, .sf tr { border: 0 !important; }
.sf th, .sf td { border: 0 !important; padding: .15rem 0; font-weight: 400; text-align: left;
  vertical-align: middle; }
.sf th { width: 30%; padding-right: .6rem; overflow-wrap: anywhere; }
.sf tr.sf-first th { font-weight: 700; }
.sf td.sf-number { width: 4rem; text-align: right; font-variant-numeric: tabular-nums; }
.sf-track { display: block; border-radius: 2px; background: var(--background-fill-secondary); }
.sf-bar { display: block; height: .8rem; min-width: 2px; border-radius: 2px;
  background: var(--line); }
.sf-halting th, .sf-halting td { padding-top: .5rem; }
.sf-halting .sf-bar { background: repeating-linear-gradient(90deg, var(--line) 0 6px,
  transparent 6px 9px); }
.sf svg { display: block; width: 100%; max-width: 46rem; height: auto; margin-top: .6rem; }
.sf svg text { fill: var(--quiet); font-size: 12px; }
@media (max-width: 640px) { .sf svg text { font-size: 17px; } }
.sf svg polyline { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; }
.sf svg circle { fill: var(--line); }
.sf-alert { border-left: 4px solid #dc2626; padding: .5rem .8rem; font-weight: 600;
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
"""


def show_moment(
    trace: RecursionTrace, moment: int, classes: Sequence[str], picture: str | None = None
) -> str:
    """Render one step of a trace: image, attention, probabilities, their curve and times.

    Args:
        trace: All moments.
        moment: Index of the step.
        classes: Their names.
        picture: The URL of the image; default ``picture_url``, which has all of it.
    """
    now = trace.moments[moment]
    picture = picture or picture_url(trace)
    shown = classes_to_show(trace)
    parts = [
        f'<p class="sf-now">{_where(trace, moment)}</p>',
        '<div class="sf-top">',
        f'<div class="sf-pictures">{_pictures(trace, now, picture)}</div>',
        f'<div class="sf-answer">{_table(now, shown, classes)}</div>',
        "</div>",
    ]
    if len(trace.moments) > 1:
        parts.append(_curve(trace, moment, shown, classes))
    parts.append(f'<p class="sf-quiet">{_latency(trace, now)}</p>')
    return f'<div class="sf">{"".join(parts)}</div>'


def picture_url(trace: RecursionTrace) -> str:
    """Encode the model's input image as a data URL."""
    return _png(_picture(trace.pixels))


def show_status(name: str) -> str:
    """Render the name of a processed image."""
    return f'<div class="sf"><p role="status">{escape(name)}</p></div>'


def show_error(message: str) -> str:
    """Render a message that screen readers announce at once."""
    return f'<div class="sf"><p class="sf-alert" role="alert">{escape(message)}</p></div>'


def classes_to_show(trace: RecursionTrace) -> list[int]:
    """Choose the most frequent top classes over the steps, in the order of the prediction."""
    seen = trace.moments[bool(trace.latent_steps) :]
    peaks = np.array([moment.probabilities for moment in seen]).max(axis=0)
    shown = np.argsort(-peaks, kind="stable")[:SHOWN].tolist()
    answer = trace.moments[trace.answer].probabilities
    return sorted(shown, key=lambda c: -answer[c])


def _where(trace: RecursionTrace, moment: int) -> str:
    now = trace.moments[moment]
    if len(trace.moments) == 1:
        return "This model does not recur: it answers at once."
    if not now.recursion:
        where = "Before the first look at the image"
    else:
        where = f"Recursion step {now.recursion}"
        if trace.latent_steps:
            where += f", latent step {now.latent_step} of {trace.latent_steps}"
    if moment == trace.answer:
        return f"<strong>{where}: the model’s answer</strong>"
    return f"{where} (beyond its training)" if moment > trace.answer else where


# Pictures


def _pictures(trace: RecursionTrace, now: TraceStep, picture: str) -> str:
    size = trace.pixels.shape[1]
    kind = ' class="sf-pixels"' if size <= 64 else ""
    image = f'<img{kind} src="{picture}" alt='
    seen = (
        f'<figure><div class="sf-stack">{image}"The image as the model sees it"></div>'
        f"<figcaption>What it sees: {size} × {size} pixels</figcaption></figure>"
    )
    if now.attention is None:
        why = f"No attention to show: {escape(trace.no_attention)}." if trace.no_attention else ""
        why = why or "Nothing has been looked at yet."
        return f"{seen}<figure><figcaption>{why}</figcaption></figure>"
    row, column = np.unravel_index(now.attention.patches.argmax(), now.attention.patches.shape)
    says = f"Attention, strongest in row {row + 1}, column {column + 1} of the patches"
    patches = now.attention.patches
    return (
        f'{seen}<figure><div class="sf-stack">{image}"">'
        f'<img class="sf-pixels" src="{_png(_overlay(now.attention))}" alt="{says}"></div>'
        f"<figcaption>Where it looks: {patches.min():.1%} of it on the clearest patch, "
        f"{patches.max():.1%} on the most orange</figcaption>"
        "</figure>"
    )


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _overlay(attention: AttentionMap) -> Image.Image:
    """Render one pixel per patch, from clear for the least attention to opaque for the most."""
    least, most = attention.patches.min(), attention.patches.max()
    strength = (attention.patches - least) / max(most - least, 1e-12)
    colours = np.empty((*attention.patches.shape, 4), dtype=np.uint8)
    colours[..., :3] = ATTENTION
    colours[..., 3] = np.rint(STRONGEST * strength)
    return Image.fromarray(colours)


def _png(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# Numbers


def _table(now: TraceStep, shown: list[int], classes: Sequence[str]) -> str:
    best = max(range(len(classes)), key=lambda c: now.probabilities[c])
    rows = [
        _row(
            escape(classes[c]),
            now.probabilities[c],
            f"--line: var(--c{number})",
            "sf-first" if c == best else "",
        )
        for number, c in enumerate(shown)
    ]
    if now.halting is not None:
        rows.append(_row("halting", now.halting, "--line: var(--halt)", "sf-halting"))
    said, others = "Class probabilities", len(classes) - len(shown)
    if others:
        rest = max(0.0, 1 - sum(now.probabilities[c] for c in shown))
        said += f" (the other {others}: {rest:.1%})"
    if now.halting is not None:
        said += "; halting: its own probability that it is right"
    return f"<table><caption>{said}</caption><tbody>{''.join(rows)}</tbody></table>"


def _row(name: str, share: float, style: str, kind: str) -> str:
    return (
        f'<tr class="{kind}" style="{style}"><th scope="row">{name}</th>'
        '<td aria-hidden="true"><span class="sf-track">'
        f'<span class="sf-bar" style="width: {share:.2%}"></span></span></td>'
        f'<td class="sf-number">{share:.1%}</td></tr>'
    )


def _latency(trace: RecursionTrace, now: TraceStep) -> str:
    timing = trace.timing
    how = (
        f"median of {timing.runs} runs on the {timing.device} with {timing.threads} "
        f"{'thread' if timing.threads == 1 else 'threads'}; the model alone, one image"
    )
    if now.milliseconds is None:
        return f"Latency: from the first recursion step on ({how})"
    until = f" to the end of recursion step {now.recursion}" if now.recursion else ""
    return f"Latency: <strong>{now.milliseconds:.1f} ms</strong>{until} ({how})"


# The curve


def _recursions(trace: RecursionTrace) -> list[tuple[float, float, str]]:
    """Return, per recursion step, the steps of its mark and its name, and the name."""
    last, latent = len(trace.moments) - 1, trace.latent_steps
    if not latent:  # a moment is a recursion step
        return [(i, i, f"{i + 1}{'*' * (i > trace.answer)}") for i in range(last + 1)]
    word = "recursion " if last <= 4 * latent else ""
    return [
        (start, start + latent / 2, f"{word}{start // latent + 1}{'*' * (start >= trace.answer)}")
        for start in range(0, last, latent)
    ]


def _curve(trace: RecursionTrace, moment: int, shown: list[int], classes: Sequence[str]) -> str:
    """Plot class probabilities and halting over all steps, with a line at the current one."""
    moments, bottom = trace.moments, HEIGHT - BOTTOM
    last = len(moments) - 1

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * i / last

    def y(share: float) -> float:
        return TOP + (bottom - TOP) * (1 - share)

    def line(shares: Sequence[float], colour: str, dashes: str = "") -> str:
        points = " ".join(f"{x(i):.1f},{y(share):.1f}" for i, share in enumerate(shares))
        here = f'cx="{x(moment):.1f}" cy="{y(shares[moment]):.1f}"'
        return (
            f'<g style="--line: var({colour})"><polyline points="{points}"{dashes}/>'
            f'<circle {here} r="4"/></g>'
        )

    quiet, strong = "var(--border-color-primary)", "var(--body-text-color)"
    marks = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(s):.1f}" y2="{y(s):.1f}" stroke="{quiet}"/>'
        f'<text x="{LEFT - 6}" y="{y(s) + 4:.1f}" text-anchor="end">{s:.0%}</text>'
        for s in (0, 0.5, 1)
    ]
    for start, middle, name in _recursions(trace):
        marks.append(
            f'<line x1="{x(start):.1f}" x2="{x(start):.1f}" y1="{TOP}" y2="{bottom}" '
            f'stroke="{quiet}"/>'
            f'<text x="{x(middle):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{name}</text>'
        )
    marks.append(
        f'<line x1="{x(moment):.1f}" x2="{x(moment):.1f}" y1="{TOP - 6}" y2="{bottom}" '
        f'stroke="{strong}"/>'
    )
    lines = [
        line([m.probabilities[c] for m in moments], f"--c{number}")
        for number, c in reversed(list(enumerate(shown)))
    ]
    halting = [m.halting for m in moments if m.halting is not None]
    if len(halting) == len(moments):
        lines.append(line(halting, "--halt", ' stroke-dasharray="5 4"'))
    best = max(range(len(classes)), key=lambda c: moments[-1].probabilities[c])
    kind = "latent" if trace.latent_steps else "recursion"
    says = (
        f"Probabilities of {', '.join(classes[c] for c in shown)}, and halting, after each {kind} "
        f"step; in the end {classes[best]} with {moments[-1].probabilities[best]:.1%}"
    )
    note = ""
    if trace.answer < last:
        note = '<p class="sf-quiet">* beyond its training: it answers before.</p>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(says)}">'
        f"{''.join(marks + lines)}</svg>{note}"
    )
