"""Corruptions of images at five severities, with the constants of CIFAR-10-C.

Values are in [0, 1]; lengths are for 32 pixels and scale with the images' side. Each image has a
random generator of its own, from the seed and its number, so that results depend neither on the
batch nor on the process. Names end in ``_like`` where a recipe is our own: the published frost
mixes photographs, and the published spatter follows edges. Scores compare with published ones only
on the published files.

Source of names and constants: Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019, arXiv 1903.12261, and its code for CIFAR-10-C.
"""

import io
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from smallfry.errors import UsageError, nearest

__all__ = ["BENCHMARK", "CORRUPTIONS", "EXTRA", "SETS", "SEVERITIES", "corrupt"]

Pixels = NDArray[np.float64]  # (height, width, 3), or (height, width) of a layer
Random = np.random.Generator

SEVERITIES = (1, 2, 3, 4, 5)
ROUNDING = 1e-9  # of a value that is a whole number of 255ths
ICE, ICE_SHARE = 0.55, 0.9  # threshold and brightness of frost_like's crystals
WATER, MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)
GREY = (0.299, 0.587, 0.114)


class Corruption(NamedTuple):
    """Recipe with its constants.

    Attributes:
        apply: From pixels, constants of the severity, the side over 32, and a generator.
        constants: By severity, from 1.
    """

    apply: Callable[[Pixels, Any, float, Random], Pixels]
    constants: tuple[Any, ...]


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupt images.

    Args:
        images: (images, 1 or 3, height, width), uint8.
        name: A corruption of ``CORRUPTIONS``.
        severity: 1 to 5; 0 returns the images.
        seed: Seed of all images.
        first: Number of the first image, for a split in several parts.

    Raises:
        UsageError: An unknown name or severity.

    Example:
        >>> images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
        >>> int(corrupt(images, "brightness", 3).max())
        138
    """
    if name not in CORRUPTIONS:
        raise UsageError(f"unknown corruption '{name}'{nearest(name, CORRUPTIONS)}")
    if severity not in (0, *SEVERITIES):
        raise UsageError(f"severity is 0 to 5, not {severity}")
    if severity == 0 or not len(images):
        return images
    apply, constants = CORRUPTIONS[name]
    scale = min(images.shape[2:]) / 32
    found = []
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy(), first):
        random = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        colour = np.broadcast_to(image, (*image.shape[:2], 3)) / 255
        pixels = apply(colour, constants[severity - 1], scale, random).clip(0, 1)
        if image.shape[2] == 1:
            pixels = pixels.mean(axis=2, keepdims=True)
        found.append((pixels * 255 + ROUNDING).astype(np.uint8))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


# Noise


def _gaussian_noise(x: Pixels, sigma: float, _: float, random: Random) -> Pixels:
    return x + random.normal(0, sigma, x.shape)


def _shot_noise(x: Pixels, count: float, _: float, random: Random) -> Pixels:
    return random.poisson(x * count) / count


def _impulse_noise(x: Pixels, share: float, _: float, random: Random) -> Pixels:
    drawn = random.random(x.shape)
    salted = np.where(drawn > 1 - share / 2, 1.0, x)
    return np.where(drawn < share / 2, 0.0, salted)


def _speckle_noise(x: Pixels, sigma: float, _: float, random: Random) -> Pixels:
    return x + x * random.normal(0, sigma, x.shape)


# Blur


def _defocus_blur(x: Pixels, constants: Any, scale: float, _: Random) -> Pixels:
    radius, smooth = constants
    reach = math.ceil(radius * scale) + 1
    down, across = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (down**2 + across**2 <= (radius * scale) ** 2).astype(float)
    disk = ndimage.gaussian_filter(disk / disk.sum(), smooth * scale, truncate=1 / smooth)
    return _filtered(x, disk)


def _gaussian_blur(x: Pixels, sigma: float, scale: float, _: Random) -> Pixels:
    return _smoothed(x, sigma * scale)


def _glass_blur(x: Pixels, constants: Any, scale: float, random: Random) -> Pixels:
    sigma, shift, passes = constants
    shift = max(1, round(shift * scale))
    x = _smoothed(x, sigma * scale)
    height, width = x.shape[:2]
    order = list(range(height * width))  # of the pixels, which are swapped one after another
    for one in random.integers(-shift, shift, (passes, height, width, 2)):
        steps = (one @ [width, 1]).ravel().tolist()
        for row in range(height - shift, shift, -1):
            for here in range(row * width + width - shift, row * width + shift, -1):
                there = here + steps[here]
                order[here], order[there] = order[there], order[here]
    x = x.reshape(-1, 3)[order].reshape(x.shape)
    return _smoothed(x.clip(0, 1), sigma * scale)


def _motion_blur(x: Pixels, constants: Any, scale: float, random: Random) -> Pixels:
    radius, sigma = constants
    return _moved(x, radius * scale, sigma * scale, random.uniform(-45, 45))


def _zoom_blur(x: Pixels, top: float, _: float, __: Random) -> Pixels:
    zooms = np.arange(1, top, 0.01)
    return (x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


# Weather


def _snow(x: Pixels, constants: Any, scale: float, random: Random) -> Pixels:
    mean, deviation, zoom, threshold, radius, sigma, mix = constants
    layer = _zoomed(random.normal(mean, deviation, x.shape[:2]), zoom)
    layer = np.where(layer < threshold, 0.0, layer).clip(0, 1)
    layer = _moved(layer, radius * scale, sigma * scale, random.uniform(-135, -45))[..., None]
    white = np.maximum(x, (x @ GREY)[..., None] * 1.5 + 0.5)
    found: Pixels = mix * x + (1 - mix) * white + layer + np.rot90(layer, 2)
    return found


def _frost(x: Pixels, constants: Any, _: float, random: Random) -> Pixels:
    image, ice = constants
    crystals = ((_plasma(x.shape[:2], 1.6, random) - ICE) / (1 - ICE)).clip(0, 1) ** 0.5
    found: Pixels = image * x + ice * ICE_SHARE * crystals[..., None]
    return found


def _fog(x: Pixels, constants: Any, _: float, random: Random) -> Pixels:
    amount, decay = constants
    top = x.max()
    fogged = x + amount * _plasma(x.shape[:2], decay, random)[..., None]
    found: Pixels = fogged * top / (top + amount)
    return found


def _brightness(x: Pixels, shift: float, _: float, __: Random) -> Pixels:
    value = x.max(axis=2, keepdims=True)
    lit = (value + shift).clip(0, 1)
    found: Pixels = np.where(value > 0, x * lit / np.maximum(value, 1e-12), lit)
    return found


def _saturate(x: Pixels, constants: Any, _: float, __: Random) -> Pixels:
    factor, shift = constants
    value = x.max(axis=2, keepdims=True)
    saturation = (value - x.min(axis=2, keepdims=True)) / np.maximum(value, 1e-12)
    wanted = (saturation * factor + shift).clip(0, 1)
    red = value * np.concatenate([np.ones_like(wanted), 1 - wanted, 1 - wanted], axis=2)
    scaled = value - (value - x) * wanted / np.maximum(saturation, 1e-12)
    found: Pixels = np.where(saturation > 0, scaled, red)  # a grey pixel has hue 0
    return found


# Digital


def _contrast(x: Pixels, factor: float, _: float, __: Random) -> Pixels:
    mean = x.mean(axis=(0, 1), keepdims=True)
    found: Pixels = (x - mean) * factor + mean
    return found


def _elastic(x: Pixels, constants: Any, _: float, random: Random) -> Pixels:
    alpha, sigma, jitter = constants
    height, width = x.shape[:2]
    side = min(height, width)
    centre, third = np.array([height, width]) / 2, side / 3
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + random.uniform(-jitter * side, jitter * side, corners.shape)
    affine = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # back to the source
    down, across = np.mgrid[:height, :width].astype(float)
    where = np.stack([down, across, np.ones_like(down)], axis=2) @ affine
    for axis in (0, 1):
        drawn = random.uniform(-1, 1, (height, width))
        if alpha:
            smooth = ndimage.gaussian_filter(drawn, sigma * side, mode="reflect", truncate=3)
            where[..., axis] += smooth * alpha * side
    places = where.transpose(2, 0, 1)
    sampled = [
        ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)
    ]
    return np.stack(sampled, axis=2)


def _pixelate(x: Pixels, factor: float, _: float, __: Random) -> Pixels:
    height, width = x.shape[:2]
    small = (max(1, int(width * factor)), max(1, int(height * factor)))
    picture = _picture(x).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX)) / 255


def _jpeg(x: Pixels, quality: int, _: float, __: Random) -> Pixels:
    encoded = io.BytesIO()
    _picture(x).save(encoded, "JPEG", quality=quality)
    return np.asarray(Image.open(encoded)) / 255


def _spatter(x: Pixels, constants: Any, scale: float, random: Random) -> Pixels:
    mean, deviation, sigma, threshold, strength, kind = constants
    liquid = ndimage.gaussian_filter(random.normal(mean, deviation, x.shape[:2]), sigma * scale)
    found: Pixels
    if kind == 0:
        drops = np.where(liquid > threshold, liquid, 0.0)[..., None]
        found = x + strength * drops * (WATER - x).clip(min=0)
    else:
        drops = ndimage.gaussian_filter((liquid > threshold).astype(float), strength * scale)
        drops = np.where(drops < 0.8, 0.0, drops)[..., None]
        found = x * (1 - drops) + drops * np.array(MUD)
    return found


# Shared parts


def _picture(x: Pixels) -> Image.Image:
    return Image.fromarray((x * 255 + ROUNDING).astype(np.uint8))


def _smoothed(x: Pixels, sigma: float) -> Pixels:
    found: Pixels = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    return found


def _filtered(x: Pixels, kernel: Pixels) -> Pixels:
    """Correlate with a small kernel that is mostly zero."""
    reach = len(kernel) // 2
    padded = np.pad(x, [(reach, reach)] * 2 + [(0, 0)] * (x.ndim - 2), mode="edge")
    height, width = x.shape[:2]
    found = np.zeros_like(x)
    for down, across in np.argwhere(kernel):
        found += kernel[down, across] * padded[down : down + height, across : across + width]
    return found


def _moved(x: Pixels, radius: float, sigma: float, angle: float) -> Pixels:
    """Blur along a line to one side, with Gaussian weights."""
    reach = math.ceil(2 * radius) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    direction = np.array([math.sin(math.radians(angle)), math.cos(math.radians(angle))])
    for distance in range(math.floor(2 * radius) + 1):
        place = reach + distance * direction
        low = np.floor(place).astype(int)
        part = place - low
        weight = math.exp(-(distance**2) / (2 * sigma**2))
        kernel[low[0] : low[0] + 2, low[1] : low[1] + 2] += weight * np.outer(
            [1 - part[0], part[0]], [1 - part[1], part[1]]
        )
    return _filtered(x, kernel / kernel.sum())


def _zoomed(x: Pixels, zoom: float) -> Pixels:
    """Magnify about the centre, with bilinear interpolation."""
    down, across = (_zoom_matrix(side, zoom) for side in x.shape[:2])
    rows = np.tensordot(down, x, axes=1)
    return np.moveaxis(np.tensordot(across, rows, axes=(1, 1)), 0, 1)


@cache
def _zoom_matrix(side: int, zoom: float) -> Pixels:
    """Return the interpolation of a line, (side, side)."""
    centre = (side - 1) / 2
    places = centre + (np.arange(side) - centre) / zoom
    found: Pixels = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side)))
    return found


def _plasma(shape: tuple[int, int], decay: float, random: Random) -> Pixels:
    """Draw a diamond–square plasma, scaled to [0, 1]."""
    side = 2 ** math.ceil(math.log2(max(shape)))
    field, amplitude, step = np.zeros((side, side)), 100.0, side
    while step >= 2:
        half = step // 2

        def drawn(total: Pixels, amplitude: float = amplitude) -> Pixels:
            return total / 4 + random.uniform(-(amplitude**2), amplitude**2, total.shape)

        corners = field[::step, ::step]
        total = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = drawn(total + np.roll(total, -1, 1))
        middles, corners = field[half::step, half::step], field[::step, ::step]
        above = middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        field[::step, half::step] = drawn(above)
        beside = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        field[half::step, ::step] = drawn(beside)
        step, amplitude = half, amplitude / decay
    field = field - field.min()
    top = field.max() or 1.0  # of a single pixel
    found: Pixels = (field / top)[: shape[0], : shape[1]]
    return found


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(
        _defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    ),
    "glass_blur": Corruption(
        _glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    ),
    "motion_blur": Corruption(_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(_zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25)),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost_like": Corruption(_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic": Corruption(
        _elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40)),
    "speckle_noise": Corruption(_speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20)),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "spatter_like": Corruption(
        _spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
    "saturate": Corruption(_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
EXTRA = ("speckle_noise", "gaussian_blur", "spatter_like", "saturate")  # apart from the benchmark
BENCHMARK = tuple(name for name in CORRUPTIONS if name not in EXTRA)
QUICK = ("gaussian_noise", "motion_blur", "fog", "brightness", "contrast", "jpeg")
SETS: dict[Literal["none", "quick", "full"], tuple[tuple[str, int], ...]] = {
    "none": (),
    "quick": tuple((name, severity) for name in QUICK for severity in (1, 3, 5)),
    "full": tuple((name, severity) for name in BENCHMARK for severity in SEVERITIES),
}
