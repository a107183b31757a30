"""Generated EEG: noise of 1/f, with alpha spindles over the back of the head if drowsy.

A window is a function of the settings, its subject and its number alone. Alert windows have blinks
and bursts of beta at times, so that power alone does not decide. Of a subject's own are the peak
frequency, the amplitude and the gain of each electrode. The subject that is tested is no part of
training, nor of any statistic.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData
from smallfry.data.philox import generator
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import UsageError
from smallfry.kits.eeg.electrodes import ELECTRODES, FRONTAL, TEMPORAL, positions_of
from smallfry.kits.eeg.windows import Windows, to_data

__all__ = ["SpindleSettings", "Window", "draw_window", "generate"]

VERSION = 1  # changes whenever the windows of a seed do
SAMPLES, RATE = 384, 128  # 3 seconds
SPREAD = 0.35  # of a source over electrodes
FOCUS = 0.3  # of a spindle
AMPLITUDES = {"easy": 4.0, "hard": 2.0}
DRIFT = 0.5  # Hz, of the peak frequency from a subject's first window to the last
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SpindleSettings:
    """Settings of generated subjects, in ``data.options``.

    Args:
        subjects: Subjects.
        windows: Windows of each, half of them drowsy.
        held_out: Number of the subject that is tested, from 1; 0 is the last.
        level: ``easy``, or ``hard`` with spindles of half the amplitude.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    subjects: int = 10
    windows: int = 100
    held_out: int = 0
    level: str = "easy"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.subjects <= 1000:
            raise UsageError(f"data.options.subjects is 2 to 1,000, got {self.subjects}")
        if not 4 <= self.windows <= 100_000:
            raise UsageError(f"data.options.windows is 4 to 100,000, got {self.windows}")
        if not 0 <= self.held_out <= self.subjects:
            raise UsageError(
                f"data.options.held_out is a subject from 1 to {self.subjects}, or 0 for the "
                f"last, got {self.held_out}"
            )
        if self.level not in AMPLITUDES:
            raise UsageError(f"data.options.level is easy or hard, got '{self.level}'")


class Window(NamedTuple):
    """One window with its truth."""

    values: Floats  # (electrodes, samples)
    state: int  # 0 alert, 1 drowsy
    mask: NDArray[np.bool_]  # (electrodes, samples), True in spindles; where their weight is > 0.5


class _Subject(NamedTuple):
    peak: float  # Hz
    amplitude: float
    gains: Floats  # (electrodes,)


def draw_window(settings: SpindleSettings, subject: int, number: int) -> Window:
    """Draw a window.

    Args:
        settings: The settings.
        subject: From 1.
        number: From 0; odd ones are drowsy.
    """
    person = _subject(settings, subject)
    random = _random(settings, subject, number + 1)
    values = _background(random)
    mask = np.zeros(values.shape, np.bool_)
    strength = AMPLITUDES[settings.level] * person.amplitude
    state = number % 2
    if state:
        peak = person.peak + DRIFT * (number / (settings.windows - 1) - 0.5)
        for _ in range(int(random.integers(1, 3))):
            mask |= _add_spindle(values, random, peak, strength)
    else:
        if random.random() < 0.3:
            length = round(0.3 * RATE)
            start = int(random.integers(0, SAMPLES - length))
            shape = np.sin(np.pi * np.arange(length) / length)
            values[_rows(FRONTAL), start : start + length] += strength * shape
        if random.random() < 0.2:
            rate, phase = random.uniform(20, 30), random.uniform(0, 2 * np.pi)
            length = round(random.uniform(0.5, 1.2) * RATE)
            start = int(random.integers(0, SAMPLES - length))
            wave = np.sin(2 * np.pi * rate * np.arange(length) / RATE + phase) * np.hanning(length)
            values[_rows(TEMPORAL), start : start + length] += strength / 2 * wave
    return Window(values * person.gains[:, None], state, mask)


def generate(settings: SpindleSettings) -> tuple[Windows, NDArray[np.bool_]]:
    """Generate all windows with the truths (windows, electrodes, samples), subject by subject."""
    every = [(s, n) for s in range(1, settings.subjects + 1) for n in range(settings.windows)]
    values = np.empty((len(every), len(ELECTRODES), SAMPLES), np.float32)
    masks = np.zeros(values.shape, np.bool_)
    for i, (subject, number) in enumerate(every):
        drawn = draw_window(settings, subject, number)
        values[i], masks[i] = drawn.values, drawn.mask
    states = np.array([number % 2 for _, number in every], np.int64)
    subjects = np.array([subject for subject, _ in every], np.int64)
    return Windows(torch.from_numpy(values), states, subjects, ELECTRODES, RATE), masks


def read_spindles(name: str, wanted: Wanted) -> ImageData:
    """Generate subjects.

    Args:
        name: The name of the data set.
        wanted: Its options, and the share of training windows held out for validation.

    Raises:
        UsageError: A setting that does not apply.
    """
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root: see eeg-mat")
    settings: SpindleSettings = settings_from(SpindleSettings, wanted.options)
    held_out = settings.held_out or settings.subjects
    generated = {"family": name, "version": VERSION, **asdict(settings), "held_out": held_out}
    return to_data(name, "generated", generate(settings)[0], held_out, wanted, generated)


def _background(random: np.random.Generator) -> Floats:
    """Draw 1/f noise of unit variance per source, mixed over electrodes, with white noise."""
    mixing = _mixing()
    waves = random.standard_normal((2, len(ELECTRODES), SAMPLES // 2 + 1))
    spectrum = waves[0] + 1j * waves[1]
    spectrum[:, 0] = 0
    spectrum[:, 1:] /= np.sqrt(np.arange(1, SAMPLES // 2 + 1))  # power 1/f
    sources = np.fft.irfft(spectrum, SAMPLES, axis=1)
    sources /= sources.std(axis=1, keepdims=True)
    result: Floats = mixing @ sources + 0.3 * random.standard_normal(sources.shape)
    return result


def _add_spindle(
    values: Floats, random: np.random.Generator, peak: float, strength: float
) -> NDArray[np.bool_]:
    """Add a spindle in place, and return where it is."""
    centre = np.array([random.uniform(-0.5, 0.5), random.uniform(-0.95, -0.4)])
    length = round(random.uniform(0.5, 1.2) * RATE)
    start = int(random.integers(0, SAMPLES - length))
    phase = random.uniform(0, 2 * np.pi)
    places = _positions()
    weight = np.exp(-((places - centre) ** 2).sum(axis=1) / (2 * FOCUS**2))
    wave = np.sin(2 * np.pi * peak * np.arange(length) / RATE + phase) * np.hanning(length)
    values[:, start : start + length] += strength * weight[:, None] * wave
    mask = np.zeros(values.shape, np.bool_)
    mask[weight > 0.5, start : start + length] = True
    return mask


def _subject(settings: SpindleSettings, subject: int) -> _Subject:
    random = _random(settings, subject, 0)
    return _Subject(
        random.uniform(8.5, 11.5),
        random.uniform(0.8, 1.2),
        random.uniform(0.8, 1.25, len(ELECTRODES)),
    )


def _random(settings: SpindleSettings, subject: int, number: int) -> np.random.Generator:
    return generator(f"eeg-spindles {VERSION}", settings.seed, number, subject)


def _rows(names: tuple[str, ...]) -> list[int]:
    return [ELECTRODES.index(name) for name in names]


@lru_cache(maxsize=1)
def _positions() -> Floats:
    places = positions_of(ELECTRODES)
    assert places is not None
    return places


@lru_cache(maxsize=1)
def _mixing() -> Floats:
    places = _positions()
    squared = ((places[:, None] - places[None]) ** 2).sum(axis=2)
    mixing = np.exp(-squared / (2 * SPREAD**2))
    result: Floats = mixing / mixing.sum(axis=1, keepdims=True)
    return result


register_data(("eeg-spindles",), read_spindles)
