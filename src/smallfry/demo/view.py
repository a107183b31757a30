"""HTML and SVG views of one step of a recursion trace; their words are in ``templates``."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from smallfry.demo.trace import RecursionTrace, TraceStep
from smallfry.report.page import png_url, render

SHOWN = 5  # classes; each has a colour in page.css
ATTENTION = (234, 88, 12)  # its colour; the strongest patch is covered by STRONGEST of 255
STRONGEST = 210
PICTURE = "#picture"  # stands for the picture where many views share it
LEFT, RIGHT, TOP, BOTTOM = 58, 552, 16, 164  # edges of the curve in its drawing, 560 by 190


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
    shown = classes_to_show(trace)
    now = trace.moments[moment]
    return render(
        "demo/templates/moment.html",
        trace=trace,
        moment=moment,
        now=now,
        picture=picture or picture_url(trace),
        overlay=None if now.attention is None else _url(_overlay(now.attention.patches)),
        classes=classes,
        shown=shown,
        best=_chosen(trace, now),
        rest=None if trace.thresholds else max(0.0, 1 - sum(now.probabilities[c] for c in shown)),
        curve=_curve(trace, moment, classes, shown) if len(trace.moments) > 1 else None,
    )


def _chosen(trace: RecursionTrace, now: TraceStep) -> list[int]:
    """Return the likeliest class, or those above their thresholds."""
    shares = now.probabilities
    if trace.thresholds is None:
        return [int(np.argmax(shares))]
    return [i for i, cut in enumerate(trace.thresholds) if shares[i] >= cut]


def picture_url(trace: RecursionTrace) -> str:
    """Encode the model's input image as a data URL."""
    pixels = trace.pixels
    return _url(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


def show_status(name: str) -> str:
    """Render the name of a processed image."""
    return render("demo/templates/status.html", name=name)


def show_error(message: str) -> str:
    """Render a message that screen readers announce at once."""
    return render("demo/templates/error.html", message=message)


def classes_to_show(trace: RecursionTrace) -> list[int]:
    """Choose the most frequent top classes over the steps, in the order of the prediction."""
    seen = trace.moments[bool(trace.latent_steps) :]
    peaks = np.array([moment.probabilities for moment in seen]).max(axis=0)
    shown = np.argsort(-peaks, kind="stable")[:SHOWN].tolist()
    answer = trace.moments[trace.answer].probabilities
    return sorted(shown, key=lambda c: -answer[c])


def _url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "png")
    return png_url(file.getvalue())


def _overlay(patches: NDArray[np.float64]) -> Image.Image:
    """Render one pixel per patch, from clear for the least attention to opaque for the most."""
    least, most = patches.min(), patches.max()
    strength = (patches - least) / max(most - least, 1e-12)
    colours = np.empty((*patches.shape, 4), dtype=np.uint8)
    colours[..., :3] = ATTENTION
    colours[..., 3] = np.rint(STRONGEST * strength)
    return Image.fromarray(colours)


# The curve


def _curve(trace: RecursionTrace, moment: int, classes: Sequence[str], shown: list[int]) -> Markup:
    """Plot class probabilities and halting over all steps, with a line at the current one."""
    last = trace.moments[-1].probabilities
    halting = [m.halting for m in trace.moments if m.halting is not None]
    return render(
        "demo/templates/curve.html",
        trace=trace,
        moment=moment,
        shown=[classes[c] for c in shown],
        lines=[[m.probabilities[c] for m in trace.moments] for c in shown],
        best=(classes[int(np.argmax(last))], max(last)),
        halting=halting if len(halting) == len(trace.moments) else None,
        recursions=_recursions(trace),
        x=lambda step: round(LEFT + (RIGHT - LEFT) * step / (len(trace.moments) - 1), 1),
        y=lambda share: round(TOP + (BOTTOM - TOP) * (1 - share), 1),
    )


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
