"""Generated traverses of a route: one world, seen in other seasons, light and weather.

The world is a strip of fractal noise, 24 pixels a place, without frequencies below 1/96 per pixel,
so that a longer route is no harder one. A view is a crop of 48 pixels, so that neighbours overlap
by half.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry.data.philox import generator
from smallfry.errors import UsageError

__all__ = ["TraverseSettings", "draw_traverse", "fractal"]

VERSION = 1  # changes whenever the traverses of a seed do
VIEW, PITCH = 48, 24  # pixels of a view, and between places
LOWEST = 1 / 96  # frequency of the world, per pixel
SEASON, LIGHT, SHADE = 0.55, 0.2, 0.4
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TraverseSettings:
    """Settings of generated traverses, in ``data.options``.

    Args:
        places: Places of the route.
        references: Traverses to train on.
        calibration: Places at the end of the route, of whose queries the threshold is chosen.
        side: Side of the images.
        shift: Sideways pixels that a view may be off, to either side.
        rain: Streaks in the query traverse.
        night: The query traverse is dark and noisy.
        aliased: Places that look as others at the start of the route, from 0.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    places: int = 80
    references: int = 2
    calibration: int = 50
    side: int = 16
    shift: int = 2
    rain: bool = False
    night: bool = False
    aliased: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("places", 2, 100_000),
            ("references", 1, 20),
            ("side", 4, VIEW),
            ("shift", 0, 6),
            ("calibration", 1, self.places - 1),
            ("aliased", 0, self.places // 2),
        ):
            if not least <= getattr(self, name) <= most:
                raise UsageError(
                    f"data.options.{name} is {least} to {most:,}, got {getattr(self, name)}"
                )


def draw_traverse(settings: TraverseSettings, number: int) -> NDArray[np.uint8]:
    """Draw a traverse, (places, side, side).

    Args:
        settings: The settings.
        number: From 0; the references come first, and the next is the query.
    """
    width = PITCH * settings.places + 2 * PITCH + VIEW
    world = fractal(_random(settings, 0), VIEW, width, 1.6, LOWEST)
    if settings.aliased:
        start = PITCH * (settings.places - settings.aliased) + PITCH
        length = PITCH * settings.aliased + PITCH
        world[:, start : start + length] = world[:, PITCH : PITCH + length]
    random = _random(settings, number + 1)
    season = SEASON * fractal(random, VIEW, width, 1.2)
    light = fractal(random, VIEW, width, 2.2)
    strip = (world + season) * (1 + LIGHT * light) + SHADE * light
    query = number >= settings.references
    views = np.empty((settings.places, settings.side, settings.side), np.uint8)
    for place in range(settings.places):
        shift = int(random.integers(-settings.shift, settings.shift + 1))
        left = PITCH + PITCH * place + shift
        view = strip[:, left : left + VIEW].copy()
        if settings.rain and query:
            _rain(view, random)
        grey = 127.5 + 50 * view
        if settings.night and query:
            grey = 255 * np.clip(grey / 255, 0, 1) ** 2.5 + random.normal(0, 6, view.shape)
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
        views[place] = np.asarray(image.resize((settings.side,) * 2, Image.Resampling.BOX))
    return views


def fractal(
    random: np.random.Generator, height: int, width: int, power: float, lowest: float = 0.0
) -> Floats:
    """Draw noise with amplitudes f^-power, of mean 0 and variance 1; nothing below ``lowest``."""
    noise = np.fft.rfft2(random.standard_normal((height, width)))
    rates = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    rates[0, 0] = np.inf
    amplitudes = np.where(rates < lowest, 0.0, rates**-power)
    found = np.fft.irfft2(noise * amplitudes, (height, width))
    result: Floats = found / found.std()
    return result


def _rain(view: Floats, random: np.random.Generator) -> None:
    for _ in range(12):
        top, left = int(random.integers(0, VIEW - 12)), int(random.integers(0, VIEW))
        view[top : top + 12, left] += 1.5


def _random(settings: TraverseSettings, number: int) -> np.random.Generator:
    return generator(0x7472617665 + VERSION, settings.seed, number)
