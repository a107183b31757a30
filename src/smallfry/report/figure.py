"""Common style and atomic saving of all plots."""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor

from smallfry.io.replace import write_whole

log = logging.getLogger(__name__)

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626")
GREY = "#6b7280"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
}


def new_figure(width: float, height: float) -> Figure:
    """Create a figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def encode(figure: Figure) -> bytes:
    """Encode a figure as a PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, facecolor="white")
    return drawn.getvalue()


def save(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG atomically; raises as ``write_whole``."""
    write_whole(file, encode(figure))


def show_image(axes: Any, pixels: Tensor) -> None:
    """Show pixels (channels, height, width), uint8."""
    if len(pixels) == 1:
        axes.imshow(pixels[0].numpy(), cmap="gray", vmin=0, vmax=255)
    else:
        axes.imshow(pixels.permute(1, 2, 0).numpy())
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def plain(names: Sequence[str]) -> list[str]:
    """Escape names for matplotlib: a class may be called $_$, which is not a formula.

    A letter that no font of matplotlib's setting ``font.family`` has is written as its number, such
    as ``\\u732b``: a box would be the same for all of them.
    """
    known = _letters(tuple(rcParams["font.family"]))
    shown = ["".join(c if c.isascii() or ord(c) in known else _number(c) for c in n) for n in names]
    if shown != list(names):
        _note_numbers(tuple(rcParams["font.family"]))
    return [name.replace("$", r"\$") for name in shown]


@lru_cache
def _note_numbers(families: tuple[str, ...]) -> None:
    """Log once why names have numbers in pictures."""
    log.info(
        "pictures have numbers, such as \\u732b, for letters that are in no font of matplotlib's "
        "setting font.family (%s): add a family that has them in a file matplotlibrc",
        ", ".join(families),
    )


def _number(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode()


@lru_cache
def _letters(families: tuple[str, ...]) -> frozenset[int]:
    """Return the numbers of the letters in the fonts that matplotlib has of these families."""
    files = []
    for family in families:
        with suppress(ValueError):  # it is not installed
            files.append(findfont(FontProperties(family=family), fallback_to_default=False))
    fonts = map(get_font, files or [findfont("DejaVu Sans")])
    return frozenset(number for font in fonts for number in font.get_charmap())


def in_legend(names: Sequence[str]) -> list[str]:
    """Escape names for a legend, which leaves out those that begin with an underscore."""
    return [f" {name}" if name.startswith("_") else name for name in plain(names)]


@contextmanager
def style() -> Iterator[None]:
    """Apply the style of all plots, as a context; names are to be escaped by ``plain``."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        yield
