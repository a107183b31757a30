"""Generated scenes for two cameras: textured planes with exact disparities, classes and occlusions.

A layer is a plane whose disparity d(v) = a + b v is constant along a row, with a class, a shape
and a texture in the left view's coordinates. Layers are painted from far to near; pixel u' of the
right view shows u = u' + d(v). Pair *i* of a split is a function of the settings, the split and *i*
alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from smallfry.data import ImageData, Split
from smallfry.data.made_once import made_once
from smallfry.data.philox import generator
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import UsageError
from smallfry.kits.stereo.truth import KAPPA, class_weights, pack, unpack, weighted

__all__ = ["CLASSES", "Pair", "PlaneSettings", "draw_pair"]

Floats = NDArray[np.float64]
VERSION = 1  # changes whenever the pairs of a seed do
CLASSES = ("background", "ground", "box", "disc")
SIZE = (64, 128)
LARGEST = 28.0  # pixels of disparity
BACK = (1.0, 5.0)  # disparities of the background
CELLS, HELD_OUT = 64, 5  # of a pixel of the background's disparity, one in five for test pairs
TINTS = np.array([[0.2, 0.5, 0.9], [0.6, 0.5, 0.3], [0.9, 0.3, 0.3], [0.3, 0.9, 0.4]])


@dataclass(frozen=True, kw_only=True)
class PlaneSettings:
    """Settings of generated pairs, in ``data.options``.

    Args:
        pairs: Of all splits together.
        objects: Most boxes and discs of a scene; two at least.
        grain: Strength of white noise in textures.
        cameras: Strength of differences between the cameras: gain, offset and noise; 0 for none.
        kappa: κ of the classes' weights; see ``class_weights``.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    pairs: int = 3_000
    objects: int = 5
    grain: float = 0.3
    cameras: float = 1.0
    kappa: float = KAPPA
    seed: int = 0

    def __post_init__(self) -> None:
        if not 10 <= self.pairs <= 1_000_000:
            raise UsageError(f"data.options.pairs is 10 to 1,000,000, got {self.pairs}")
        if not 2 <= self.objects <= 100:
            raise UsageError(f"data.options.objects is 2 to 100, got {self.objects}")
        if not 0 <= self.grain <= 1 or not 0 <= self.cameras <= 2 or self.seed < 0:
            raise UsageError(
                "data.options.grain is 0 to 1, cameras 0 to 2, and seed a whole number from 0"
            )


class Layer(NamedTuple):
    """Textured plane."""

    label: int
    disparity: Floats  # (height,), of each row
    shape: Callable[[Floats], NDArray[np.bool_]]  # from columns (height, width) to the inside
    texture: Floats  # (height, any, 3), from column −1 on


class Pair(NamedTuple):
    """Two views with the truth of the left one; and the right one's disparities, for tests."""

    left: NDArray[np.uint8]  # (3, height, width)
    right: NDArray[np.uint8]
    disparity: Floats  # (height, width), pixels
    labels: NDArray[np.int64]
    hidden: NDArray[np.bool_]  # the right view doesn't see the point
    right_disparity: Floats


def draw_pair(
    settings: PlaneSettings, split: str, number: int, size: tuple[int, int] = SIZE
) -> Pair:
    """Draw a pair of views.

    Args:
        settings: Of all pairs.
        split: ``train`` or ``test``.
        number: Of the pair in its split.
        size: Height and width.
    """
    random = _random(settings, split, number)
    layers = _layers(settings, split, random, *size)
    left, disparity, labels = _paint(layers, size, to_left=False)
    right, right_disparity, _ = _paint(layers, size, to_left=True)
    columns = np.arange(size[1])
    there = np.rint(columns - disparity).astype(int)
    rows = np.arange(size[0])[:, None]
    apart = np.abs(right_disparity[rows, there.clip(0, size[1] - 1)] - disparity)
    hidden = (columns - disparity < 0) | (apart > 0.75)
    views = [_seen(view, settings.cameras, random) for view in (left, right)]
    return Pair(views[0], views[1], disparity, labels, hidden, right_disparity)


def read_planes(name: str, wanted: Wanted) -> ImageData:
    """Generate pairs, or take them from the cache.

    Args:
        name: The name of the data set.
        wanted: Its options, and shares held out for validation and testing.

    Raises:
        UsageError: A setting that does not apply.
    """
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root: see stereo-folder")
    settings: PlaneSettings = settings_from(PlaneSettings, wanted.options)
    size = wanted.images["image_size"] or SIZE
    height, width = (size, size) if isinstance(size, int) else size
    wanted.require_fixed(name, image_size=size, channels=6)
    if height % 32 or width % 32 or min(height, width) < 32 or width < 2 * LARGEST:
        raise UsageError(f"{name} has sides of multiples of 32, and 64 columns at least")
    tested = max(1, round(wanted.test * settings.pairs))
    everything = _split(settings, "train", settings.pairs - tested, (height, width))
    held_out = _split(settings, "test", tested, (height, width))
    count = round(wanted.validation * len(everything))
    chosen = torch.arange(len(everything))
    train = everything.take(chosen[count:][: wanted.limit])
    labels = unpack(train.labels).labels
    shares = torch.bincount(labels.flatten(), minlength=len(CLASSES)).double() / labels.numel()
    weights = class_weights(shares.numpy(), settings.kappa)

    def of(split: Split) -> Split:
        return Split(split.pixels, split.rows, weighted(split.labels, weights))

    return ImageData(
        name,
        "generated",
        CLASSES,
        (height, width),
        6,
        of(train),
        of(everything.take(chosen[:count])),
        of(held_out),
        generated={"family": name, "version": VERSION, **asdict(settings)},
    )


def _split(settings: PlaneSettings, split: str, count: int, size: tuple[int, int]) -> Split:
    def make(number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        pair = draw_pair(settings, split, number, size)
        truth = pack(pair.disparity, pair.hidden, pair.labels, len(CLASSES))
        return np.concatenate([pair.left, pair.right]), truth

    drawn = {k: v for k, v in asdict(settings).items() if k not in ("pairs", "kappa")}
    return made_once(f"stereo-planes {VERSION} {split} {size} {drawn!r}", count, make)


def _random(settings: PlaneSettings, split: str, number: int) -> np.random.Generator:
    return generator(f"stereo-planes {VERSION} {split}", settings.seed, number)


def is_test_disparity(disparity: float) -> bool:
    """Return whether a background of this disparity is of test pairs."""
    return int(disparity * CELLS) % HELD_OUT == 0


def _layers(
    settings: PlaneSettings, split: str, random: np.random.Generator, height: int, width: int
) -> list[Layer]:
    """Draw the layers of a scene, far to near; objects stand on the ground or before it."""
    while True:
        back = float(random.uniform(*BACK))
        if is_test_disparity(back) == (split == "test"):
            break
    rows = np.arange(height, dtype=float)

    def texture(label: int) -> Floats:
        return _texture(random, settings, label, height, width)

    horizon = random.uniform(0.35, 0.55) * height
    slope = (random.uniform(14, 24) - back) / (height - 1 - horizon)
    ground = back + slope * np.maximum(0, rows - horizon)
    layers = [
        Layer(0, np.full(height, back), lambda u: np.ones(u.shape, bool), texture(0)),
        Layer(1, ground, lambda u: np.broadcast_to(rows[:, None] >= horizon, u.shape), texture(1)),
    ]
    objects = []
    for _ in range(int(random.integers(2, settings.objects + 1))):
        label = int(random.integers(2, 4))
        across, down = random.uniform(0.08, 0.22, 2) * (width, 1.5 * height)
        foot = random.uniform(0.45, 1.0) * height
        middle = (random.uniform(0, 1) * width, foot - down)
        lowest = ground[min(height - 1, int(np.ceil(foot)))]
        disparity = min(LARGEST, lowest + random.uniform(0.5, 4.5))
        shape = _box(middle, across, down, rows) if label == 2 else _disc(middle, down, rows)
        objects.append(Layer(label, np.full(height, disparity), shape, texture(label)))
    return layers + sorted(objects, key=lambda layer: float(layer.disparity[0]))


def _box(
    middle: tuple[float, float], across: float, down: float, rows: Floats
) -> Callable[[Floats], NDArray[np.bool_]]:
    inside = np.abs(rows[:, None] - middle[1]) <= down
    return lambda u: (np.abs(u - middle[0]) <= across) & inside


def _disc(
    middle: tuple[float, float], radius: float, rows: Floats
) -> Callable[[Floats], NDArray[np.bool_]]:
    far = np.square(rows[:, None] - middle[1])
    return lambda u: np.square(u - middle[0]) + far <= radius**2


def _texture(
    random: np.random.Generator, settings: PlaneSettings, label: int, height: int, width: int
) -> Floats:
    """Draw noise at scales of 2, 4, 8 and 16 pixels, and white noise, tinted by class."""
    wide = width + int(LARGEST) + 4
    grey = np.zeros((height, wide))
    for scale in (2, 4, 8, 16):
        coarse = random.normal(size=(height // scale + 2, wide // scale + 2)).astype(np.float32)
        grown = Image.fromarray(coarse).resize((wide, height), Image.Resampling.BILINEAR)
        grey += np.asarray(grown)
    grey += settings.grain * random.normal(size=grey.shape)
    tint = np.clip(TINTS[label] + random.uniform(-0.15, 0.15, 3), 0.05, 1)
    result: Floats = tint * (0.5 + 0.16 * grey[..., None])
    return result


def _paint(
    layers: list[Layer], size: tuple[int, int], to_left: bool
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Paint a view: the left one, or the right one, whose pixels are brought to left columns."""
    view = np.zeros((*size, 3))
    disparity, labels = np.zeros(size), np.zeros(size, np.int64)
    rows = np.arange(size[0])[:, None]
    for layer in layers:
        shift = layer.disparity[:, None] if to_left else np.zeros((size[0], 1))
        columns = np.arange(size[1]) + shift
        inside = layer.shape(columns)
        first = np.floor(columns).astype(int)
        share = (columns - first)[..., None]
        painted = layer.texture[rows, first + 1] * (1 - share)
        painted += layer.texture[rows, first + 2] * share
        view[inside] = painted[inside]
        disparity[inside] = np.broadcast_to(layer.disparity[:, None], size)[inside]
        labels[inside] = layer.label
    return view, disparity, labels


def _seen(view: Floats, strength: float, random: np.random.Generator) -> NDArray[np.uint8]:
    """Return what a camera makes of a view: gain, offset and noise, (3, height, width)."""
    gain = 1 + strength * random.uniform(-0.1, 0.1)
    moved = gain * view + strength * random.uniform(-0.05, 0.05)
    moved = moved + strength * random.normal(0, 0.015, view.shape)
    return np.rint(np.clip(moved, 0, 1) * 255).astype(np.uint8).transpose(2, 0, 1)


register_data(("stereo-planes",), read_planes)
