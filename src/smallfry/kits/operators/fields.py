"""Generated pairs of fields: coefficients, and solutions of an equation with them.

Sample *i* of a split is a function of the settings, the split and *i* alone.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.data.made_once import made_once
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import DataError, UsageError
from smallfry.kits.operators.equations import gaussian_field, solve_darcy, solve_helmholtz

__all__ = ["DarcySettings", "HelmholtzSettings", "darcy_sample", "helmholtz_sample"]

log = logging.getLogger(__name__)

VERSION = 1  # changes whenever the samples of a seed do
SPLITS = {"train": 0, "validation": 1, "test": 2}
RESONANT = 20.0  # times the usual maximum, from which a wave field is drawn anew
USUAL_DRAWS = 32  # that give the usual maximum
TRIES = 100
Fields = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class DarcySettings:
    """Settings of Darcy's flow, in ``data.options``.

    Args:
        samples: Of all splits together.
        size: Points a side of the fields. They are solved on 2 · size + 1 points, of which every
            second is taken, and the last row and column left out.
        coefficient: ``two`` values by the sign of a Gaussian field, or ``log-normal``, its
            exponential.
        low: The value where the field is negative.
        high: Where it is not.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    samples: int = 400
    size: int = 32
    coefficient: str = "two"
    low: float = 3.0
    high: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_size(self.samples, self.size)
        if self.coefficient not in ("two", "log-normal"):
            raise UsageError(
                f"data.options.coefficient is two or log-normal, not '{self.coefficient}'"
            )
        if not 0 < self.low < self.high:
            raise UsageError(
                f"data.options.low is above 0 and below high, got {self.low} and {self.high}"
            )


@dataclass(frozen=True, kw_only=True)
class HelmholtzSettings:
    """Settings of standing waves, in ``data.options``.

    Args:
        samples: Of all splits together.
        size: Points a side.
        base: Mean wave number.
        spread: Times tanh of a Gaussian field is added to it.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    samples: int = 400
    size: int = 33
    base: float = 8.0
    spread: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_size(self.samples, self.size)
        if not 0 <= self.spread < self.base:
            raise UsageError(
                f"data.options.spread is 0 to below base, got {self.spread} and {self.base}"
            )


def _require_size(samples: int, size: int) -> None:
    if not 10 <= samples <= 1_000_000:
        raise UsageError(f"data.options.samples is 10 to 1,000,000, got {samples}")
    if not 8 <= size <= 512:
        raise UsageError(f"data.options.size is 8 to 512, got {size}")


def darcy_sample(settings: DarcySettings, split: str, number: int) -> Fields:
    """Draw a coefficient (1, size, size) and its pressure, the same."""
    fine = 2 * settings.size + 1
    field = gaussian_field(_random(settings.seed, split, number), fine)
    if settings.coefficient == "two":
        a = np.where(field >= 0, settings.high, settings.low)
    else:
        a = np.exp(field)
    return _every(a, 2, settings.size), _every(solve_darcy(a), 2, settings.size)


def helmholtz_sample(
    settings: HelmholtzSettings, split: str, number: int, most: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Draw wave numbers (1, size, size), the standing wave, and the number of draws left out.

    Those too near to resonance are left out: there the wave of an undamped square has no bound.

    Args:
        settings: The settings.
        split: train, validation or test.
        number: Of the sample.
        most: Largest absolute value of a wave that is taken.

    Raises:
        DataError: Hardly any draw has such a wave.
    """
    random = _random(settings.seed, split, number)
    for left_out in range(TRIES):
        k = _wave_numbers(settings, random)
        u = solve_helmholtz(k, _beam)
        if np.abs(u).max() <= most:
            return _every(k, 1, settings.size), _every(u, 1, settings.size), left_out
    raise DataError(f"of {TRIES} waves all were near resonance: lower data.options.spread")


def usual_maximum(settings: HelmholtzSettings) -> float:
    """Return the median over some draws of the largest absolute value of a wave."""
    found = []
    for number in range(USUAL_DRAWS):
        k = _wave_numbers(settings, _random(settings.seed, "usual", number))
        found.append(float(np.abs(solve_helmholtz(k, _beam)).max()))
    return float(np.median(found))


def _wave_numbers(settings: HelmholtzSettings, random: np.random.Generator) -> NDArray[np.float64]:
    return settings.base + settings.spread * np.tanh(gaussian_field(random, settings.size))


def _beam(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return ((x >= 0.35) & (x <= 0.65)).astype(np.float64)


def _every(field: NDArray[np.float64], step: int, size: int) -> NDArray[np.float32]:
    return field[::step, ::step][None, :size, :size].astype(np.float32)


def _random(seed: int, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.get(split, len(SPLITS)), number])


def read_darcy(name: str, wanted: Wanted) -> ImageData:
    """Generate Darcy's flow, or take it from the cache."""
    settings: DarcySettings = settings_from(DarcySettings, _options(name, wanted))
    return _data(name, wanted, settings, settings.size, partial(darcy_sample, settings))


def read_helmholtz(name: str, wanted: Wanted) -> ImageData:
    """Generate standing waves, or take them from the cache."""
    settings: HelmholtzSettings = settings_from(HelmholtzSettings, _options(name, wanted))
    most = RESONANT * usual_maximum(settings)
    rejected = []

    def make(split: str, number: int) -> Fields:
        k, u, tried = helmholtz_sample(settings, split, number, most)
        rejected.append(tried)
        return k, u

    data = _data(name, wanted, settings, settings.size, make)
    if rejected:
        log.info("%s: %d waves too near to resonance were drawn anew", name, sum(rejected))
    return data


def _options(name: str, wanted: Wanted) -> dict[str, object]:
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root")
    return dict(wanted.options)


def _data(
    name: str,
    wanted: Wanted,
    settings: DarcySettings | HelmholtzSettings,
    size: int,
    make: Callable[[str, int], Fields],
) -> ImageData:
    wanted.require_fixed(name, image_size=size, channels=1)
    tested = max(1, round(wanted.test * settings.samples))
    held = round(wanted.validation * (settings.samples - tested))
    counts = {"train": settings.samples - tested - held, "validation": held, "test": tested}
    drawn = {key: value for key, value in asdict(settings).items() if key != "samples"}
    parts = {}
    for split, count in counts.items():
        if count == 0:
            empty = torch.zeros(0, 1, size, size)
            parts[split] = Split(empty, torch.arange(0), empty)
            continue
        mark = f"{name} {VERSION} {sorted(drawn.items())} {split}"
        parts[split] = made_once(mark, count, partial(make, split))
    train = parts["train"]
    return ImageData(
        name,
        "generated",
        ("field",),
        size,
        1,
        train.take(torch.arange(len(train))[: wanted.limit]),
        parts["validation"],
        parts["test"],
        generated={"family": name, "version": VERSION, **asdict(settings)},
    )


register_data(("operators-darcy",), read_darcy)
register_data(("operators-helmholtz",), read_helmholtz)
