"""Generated matrices in the manner of Raven's: three rows of three shapes, each row by two rules.

A rule for the shapes and one for the colours hold in every row: ``constant``, ``progression``, or
``permutation``, where each row has the same three values in another order. The label is whether the
rule of the colours is ``constant``. These are no RAVEN matrices: there is one shape a cell, of one
size, and no answer to choose. They test the machinery.

Sample *i* of a split is a function of the settings, the split and *i* alone.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.data.made_once import made_once
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import UsageError

__all__ = ["CLASSES", "COLOURS", "RULES", "SHAPES", "Panel", "PanelSettings", "draw_panel"]

VERSION = 1  # changes whenever the samples of a seed do
SPLITS = {"train": 0, "validation": 1, "test": 2}
CLASSES = ("changing", "constant")  # the rule of the colours
RULES = ("constant", "progression", "permutation")
SHAPES = ("triangle", "square", "pentagon", "hexagon", "circle")
COLOURS = tuple(range(24, 256, 28))  # 9 greys of shapes
BACKGROUNDS = tuple(range(10, 256, 28))[:8]  # greys between them
FINE = 4  # pixels of the drawing a side for each of the picture
RADIUS = 0.36  # of a shape, as a share of a cell
OUTLINE = 0.03  # width, the same
ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2))
Values = tuple[tuple[int, int, int], ...]  # by row and column


@dataclass(frozen=True, kw_only=True)
class PanelSettings:
    """Settings of generated matrices, in ``data.options``.

    Args:
        samples: Of all splits together, half of each class.
        size: Side of the pictures in pixels.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    samples: int = 2000
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 20 <= self.samples <= 1_000_000:
            raise UsageError(f"data.options.samples is 20 to 1,000,000, got {self.samples}")
        if not 32 <= self.size <= 512:
            raise UsageError(f"data.options.size is 32 to 512, got {self.size}")


class Panel(NamedTuple):
    """One matrix with its truth."""

    pixels: NDArray[np.uint8]  # (1, size, size)
    shapes: Values  # places in SHAPES
    colours: Values  # places in COLOURS
    rules: tuple[str, str]  # of the shapes, and of the colours
    background: int  # grey

    @property
    def label(self) -> int:
        """Place in CLASSES."""
        return int(self.rules[1] == RULES[0])


def draw_panel(settings: PanelSettings, split: str, number: int) -> Panel:
    """Draw a matrix.

    Args:
        settings: The settings.
        split: train, validation or test.
        number: Of the sample; those of odd ones have one colour a row.

    Example:
        >>> draw_panel(PanelSettings(), "train", 1).rules[1]
        'constant'
    """
    random = np.random.default_rng([settings.seed, SPLITS[split], number])
    shape_rule = RULES[int(random.integers(3))]
    colour_rule = RULES[0] if number % 2 else RULES[int(random.integers(1, 3))]
    shapes = rows_by(shape_rule, len(SHAPES), random)
    colours = rows_by(colour_rule, len(COLOURS), random)
    background = BACKGROUNDS[int(random.integers(len(BACKGROUNDS)))]
    pixels = _painted(settings.size, shapes, colours, background)
    return Panel(pixels, shapes, colours, (shape_rule, colour_rule), background)


def rows_by(rule: str, count: int, random: np.random.Generator) -> Values:
    """Draw three rows of values below ``count`` by a rule.

    A constant row has a value of its own; a progression has one step, up or down by 1 or 2, in
    every row; a permutation has the same three values in every row, each in another order.
    """
    if rule == "constant":
        return tuple((value, value, value) for value in random.integers(0, count, 3).tolist())
    if rule == "progression":
        step = int(random.choice((-2, -1, 1, 2)))
        lowest = random.integers(0, count - 2 * abs(step), 3) - min(0, 2 * step)
        return tuple((s, s + step, s + 2 * step) for s in lowest.tolist())
    values = random.permutation(count)[:3].tolist()
    orders = random.permutation(len(ORDERS))[:3]
    return tuple((values[a], values[b], values[c]) for a, b, c in (ORDERS[i] for i in orders))


def read_panels(name: str, wanted: Wanted) -> ImageData:
    """Generate matrices, or take them from the cache.

    Args:
        name: The name of the data set.
        wanted: Its options, and shares of validation and test samples.

    Raises:
        UsageError: A setting that does not apply.
    """
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root")
    settings: PanelSettings = settings_from(PanelSettings, wanted.options)
    wanted.require_fixed(name, image_size=settings.size, channels=1)
    tested = max(1, round(wanted.test * settings.samples))
    held = round(wanted.validation * (settings.samples - tested))
    counts = {"train": settings.samples - tested - held, "validation": held, "test": tested}
    parts = {split: _split(name, settings, split, count) for split, count in counts.items()}
    train = parts["train"]
    return ImageData(
        name,
        "generated",
        CLASSES,
        settings.size,
        1,
        train.take(torch.arange(len(train))[: wanted.limit]),
        parts["validation"],
        parts["test"],
        generated={"family": name, "version": VERSION, **asdict(settings)},
    )


def _split(name: str, settings: PanelSettings, split: str, count: int) -> Split:
    if not count:
        pixels = torch.zeros(0, 1, settings.size, settings.size, dtype=torch.uint8)
        return Split(pixels, torch.arange(0), torch.zeros(0, dtype=torch.int64))
    mark = f"{name} {VERSION} {settings.size} {settings.seed} {split}"
    return made_once(mark, count, partial(_sample, settings, split))


def _sample(
    settings: PanelSettings, split: str, number: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    panel = draw_panel(settings, split, number)
    return panel.pixels, np.array(panel.label, np.int64)


def _painted(size: int, shapes: Values, colours: Values, background: int) -> NDArray[np.uint8]:
    """Paint a matrix (1, size, size)."""
    from PIL import Image, ImageDraw

    side = size * FINE
    picture = Image.new("L", (side, side), background)
    brush, cell = ImageDraw.Draw(picture), side / 3
    width = max(1, round(OUTLINE * cell))
    for row in range(3):
        for column in range(3):
            centre = ((column + 0.5) * cell, (row + 0.5) * cell)
            grey, name = COLOURS[colours[row][column]], SHAPES[shapes[row][column]]
            radius = RADIUS * cell
            if name == "circle":
                box = [
                    centre[0] - radius,
                    centre[1] - radius,
                    centre[0] + radius,
                    centre[1] + radius,
                ]
                brush.ellipse(box, fill=grey, outline=0, width=width)
            else:
                brush.polygon(
                    _corners(3 + SHAPES.index(name), centre, radius),
                    fill=grey,
                    outline=0,
                    width=width,
                )
    return np.asarray(picture.reduce(FINE), np.uint8)[None].copy()


def _corners(count: int, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon with one above, or of a square on its side."""
    turn = -math.pi / 2 + (math.pi / count if count == 4 else 0)
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    x, y = centre
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


register_data(("symbolic-panels",), read_panels)
