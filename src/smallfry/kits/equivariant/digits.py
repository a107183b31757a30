"""Digits under generated affine maps, with the map of each image known.

Originals are scikit-learn's 8×8 digits, enlarged, or those of a folder of MNIST (``data.root``).
Version *v* of original *i* of a split is a function of the settings, the split, *i* and *v* alone.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split, load_data
from smallfry.data.made_once import made_once
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import UsageError

__all__ = ["AffineDigits", "Distorted", "distort", "draw_matrix", "resample"]

VERSION = 1  # changes whenever the images of a seed do
SPLITS = {"train": 0, "validation": 1, "test": 2}
SMALL = (16, 10)  # pixels of an image, and of a digit in it, of scikit-learn's
MNIST = (40, 28)
LARGEST = 128
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AffineDigits:
    """Settings of distorted digits, in ``data.options``.

    Args:
        rotation: Largest angle in degrees, to either side.
        shear: Largest shear, to either side.
        scale_low: Smallest scale, of width and of height each.
        scale_high: Largest.
        translation: ``inside``, uniform among the shifts that leave every pixel of the digit in the
            image, or ``none``.
        distorted: The splits that are distorted: ``test``, ``all`` or ``none``; others stay upright
            and in the middle.
        versions: Distorted images of each original.
        size: Side of the images; 0 for 16 pixels, or 40 of MNIST.
        seed: Seed of the maps.

    Raises:
        UsageError: A value out of range.

    Example:
        >>> AffineDigits(rotation=45.0).distorted
        'test'
    """

    rotation: float = 20.0
    shear: float = 0.2
    scale_low: float = 0.8
    scale_high: float = 1.2
    translation: str = "inside"
    distorted: str = "test"
    versions: int = 1
    size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180 or not 0 <= self.shear <= 1:
            raise UsageError(
                "data.options.rotation is 0 to 180 degrees and shear 0 to 1, got "
                f"{self.rotation} and {self.shear}"
            )
        if not 0.1 <= self.scale_low <= self.scale_high <= 10:
            raise UsageError(
                "data.options.scale_low is 0.1 to scale_high, which is at most 10, got "
                f"{self.scale_low} and {self.scale_high}"
            )
        if self.translation not in ("inside", "none"):
            raise UsageError(
                f"data.options.translation is inside or none, not '{self.translation}'"
            )
        if self.distorted not in ("test", "all", "none"):
            raise UsageError(f"data.options.distorted is test, all or none, not '{self.distorted}'")
        if not 1 <= self.versions <= 100 or not (self.size == 0 or 8 <= self.size <= LARGEST):
            raise UsageError(
                f"data.options.versions is 1 to 100, and size 0 or 8 to {LARGEST}, got "
                f"{self.versions} and {self.size}"
            )


class Distorted(NamedTuple):
    """Image of a digit, with the map from the upright one."""

    pixels: NDArray[np.uint8]  # (1, size, size)
    matrix: Array  # (2, 3): upright places (x right, y down, from the middle) to those here


def draw_matrix(settings: AffineDigits, random: np.random.Generator) -> Array:
    """Draw rotation · shear · scales, (2, 2); a positive angle turns clockwise, as y is down."""
    turn = math.radians(random.uniform(-settings.rotation, settings.rotation))
    shear = random.uniform(-settings.shear, settings.shear)
    scales = random.uniform(settings.scale_low, settings.scale_high, 2)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array([[cos, -sin], [sin, cos]])
    found: Array = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(scales)
    return found


def resample(original: NDArray[np.uint8], size: int, pixels: float, matrix: Array) -> Array:
    """Map a digit into an image, bilinearly, (size, size), 0 to 255.

    Args:
        original: (rows, rows).
        size: Side of the image.
        pixels: Side that the digit's square has when upright.
        matrix: (2, 3), see ``Distorted``.
    """
    rows = len(original)
    places = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(places, places)
    back = np.linalg.inv(matrix[:, :2])
    moved = np.stack([x - matrix[0, 2], y - matrix[1, 2]])
    column, row = np.einsum("ij,jyx->iyx", back, moved) * (rows / pixels) + (rows - 1) / 2
    padded = np.pad(original.astype(np.float64), 1)
    column, row = (np.clip(each + 1, 0, rows + 1) for each in (column, row))
    left, top = (np.minimum(each.astype(np.int64), rows) for each in (column, row))
    right, down = column - left, row - top
    above = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    below = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    found: Array = above * (1 - down) + below * down
    return found


def distort(
    original: NDArray[np.uint8],
    settings: AffineDigits,
    split: str,
    number: int,
    version: int = 0,
    shape: tuple[int, int] = SMALL,
) -> Distorted:
    """Draw a distorted digit.

    Args:
        original: (rows, rows).
        settings: The settings.
        split: train, validation or test.
        number: Of the original in its split.
        version: Of this original.
        shape: Side of the image, and of the upright digit's square.

    Example:
        >>> square = np.full((8, 8), 255, np.uint8)
        >>> distort(square, AffineDigits(), "test", 0).pixels.shape
        (1, 16, 16)
    """
    size, pixels = shape
    random = np.random.default_rng([settings.seed, SPLITS[split], number, version])
    linear = draw_matrix(settings, random)
    shift = np.zeros(2)
    if settings.translation == "inside":
        shift = _shift_inside(original, linear, size, pixels, random)
    matrix = np.concatenate([linear, shift[:, None]], axis=1)
    found = np.rint(resample(original, size, pixels, matrix)).astype(np.uint8)
    return Distorted(found[None], matrix)


def _shift_inside(
    original: NDArray[np.uint8],
    linear: Array,
    size: int,
    pixels: float,
    random: np.random.Generator,
) -> Array:
    """Draw a shift (2,) that leaves all of a digit inside; one too large is centred."""
    row, column = np.nonzero(original)
    if not len(row):
        return np.zeros(2)
    rows = len(original)
    reach = 1.0  # of a pixel's bilinear footprint
    centres = np.stack([column, row]).astype(np.float64) - (rows - 1) / 2
    corners = [centres + np.array([[a], [b]]) * reach for a in (-1, 1) for b in (-1, 1)]
    moved = linear @ np.concatenate(corners, axis=1) * (pixels / rows)
    low, high = moved.min(axis=1), moved.max(axis=1)
    edge = (size - 1) / 2
    least, most = -edge - low, edge - high
    drawn = random.uniform(np.minimum(least, most), np.maximum(least, most))
    found: Array = np.where(least <= most, drawn, (least + most) / 2)
    return found


def read_digits(name: str, wanted: Wanted) -> ImageData:
    """Load the originals and distort them, or take the images from the cache."""
    settings: AffineDigits = settings_from(AffineDigits, dict(wanted.options))
    size, pixels = SMALL if wanted.root is None else MNIST
    size = settings.size or size
    wanted.require_fixed(name, image_size=size, channels=1)
    base = load_data(
        "digits" if wanted.root is None else "mnist",
        wanted.root,
        validation=wanted.validation,
        test=wanted.test,
        split_seed=wanted.split_seed,
        limit=wanted.limit,
    )
    parts = {}
    for split, originals in zip(SPLITS, (base.train, base.validation, base.test), strict=True):
        whole = {"all": SPLITS, "test": ("test",), "none": ()}[settings.distorted]
        own = settings if split in whole else replace(settings, distorted="none", versions=1)
        parts[split] = _made(name, originals, own, split, (size, pixels))
    return ImageData(
        name,
        f"generated distortions of {base.origin}",
        base.classes,
        size,
        1,
        parts["train"],
        parts["validation"],
        parts["test"],
        generated={"family": name, "version": VERSION, "of": base.origin, **asdict(settings)},
    )


def _made(
    name: str, originals: Split, settings: AffineDigits, split: str, shape: tuple[int, int]
) -> Split:
    if not len(originals):
        empty = torch.zeros(0, 1, shape[0], shape[0], dtype=torch.uint8)
        return Split(empty, torch.arange(0), originals.labels)
    images = originals.images[:, 0].numpy()
    labels = originals.labels.numpy()

    def make(settings: AffineDigits, number: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        which, version = divmod(number, settings.versions)
        label = np.asarray(labels[which])
        if settings.distorted == "none":
            upright = resample(images[which], *shape, np.eye(2, 3))
            return np.rint(upright).astype(np.uint8)[None], label
        return distort(images[which], settings, split, which, version, shape).pixels, label

    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    mark = f"{name} {VERSION} {sorted(asdict(settings).items())} {split} {shape} {content}"
    return made_once(mark, len(images) * settings.versions, partial(make, settings))


register_data(("equivariant-digits",), read_digits)
