"""Pictures of EEG: windows coloured by their explanation, and maps over the head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.data import Split
from smallfry.kits.eeg.electrodes import ELECTRODES, positions_of
from smallfry.kits.eeg.explanation import WIDTH, Explanation, explain
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.report.figure import new_figure, plain, save, style
from smallfry.training.augment import Normalize
from smallfry.transforms.modes import evaluating

__all__ = ["BANDS", "band_powers", "draw_bands", "draw_explanations"]

BANDS = {"delta": (1, 4), "theta": (4, 8), "alpha": (8, 12), "beta": (12, 30)}  # Hz
RATE = 128.0  # samples a second of the paper's windows
SHOWN = 2  # windows of each state


def band_powers(windows: NDArray[Any], rate: float = RATE) -> NDArray[np.float64]:
    """Compute the shares of bands in the power from 1 to 30 Hz, by Welch's method.

    Segments of a second, half overlapping, under Hann's window, their means taken off.

    Args:
        windows: (windows, electrodes, samples).
        rate: Samples a second; default 128.

    Returns:
        (windows, electrodes, bands), in the order of ``BANDS``.
    """
    length = min(round(rate), windows.shape[-1])
    segments = np.lib.stride_tricks.sliding_window_view(windows, length, axis=-1)
    segments = segments[..., :: max(1, length // 2), :].astype(np.float64)
    segments = segments - segments.mean(axis=-1, keepdims=True)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    power = (np.abs(np.fft.rfft(segments * hann, axis=-1)) ** 2).mean(axis=-2)
    rates = np.fft.rfftfreq(length, 1 / rate)
    parts = [power[..., (rates >= low) & (rates < high)].sum(-1) for low, high in BANDS.values()]
    found = np.stack(parts, axis=-1)
    result: NDArray[np.float64] = found / np.maximum(found.sum(axis=-1, keepdims=True), 1e-30)
    return result


def draw_bands(split: Split, classes: Sequence[str], file: Path) -> None:
    """Draw the mean share of each band over the head, a row for each state.

    Args:
        split: Windows with states, and their rate; 128 samples a second if it has none.
        classes: Names of the states.
        file: The PNG to write.
    """
    powers = band_powers(split.images[:, 0].numpy(), split.rate or RATE)
    labels = split.labels.numpy()
    present = [n for n in range(len(classes)) if (labels == n).any()]
    with style():
        figure = new_figure(2.2 * len(BANDS), 2.4 * max(1, len(present)))
        axes = figure.subplots(max(1, len(present)), len(BANDS), squeeze=False)
        means = {n: powers[labels == n].mean(axis=0) for n in present}
        for column, band in enumerate(BANDS):
            top = max((means[n][:, column].max() for n in present), default=1.0)
            for row, n in enumerate(present):
                title = f"{plain([classes[n]])[0]}, {band}"
                _draw_head(axes[row, column], means[n][:, column], title, (0.0, float(top)))
        save(figure, file)


def draw_explanations(
    model: InterpretableCNN, split: Split, normalize: Normalize, classes: Sequence[str], file: Path
) -> None:
    """Draw the surest right windows of each state, their traces coloured by the evidence for it.

    Args:
        model: The network, on any device.
        split: Windows with states, and their rate; 128 samples a second if it has none.
        normalize: Values to inputs.
        classes: Names of the states.
        file: The PNG to write.
    """
    device = next(model.parameters()).device
    inputs = normalize(split.images).to(device)
    with torch.inference_mode(), evaluating(model):
        logits = model(inputs).float().cpu()
    chosen = _surest(logits, split.labels)
    states = split.labels[chosen]
    rate = split.rate or RATE
    found = explain(model, inputs[chosen.to(device)], states, max(1, round(WIDTH * rate / RATE)))
    with style():
        figure = new_figure(11, 4.2 * max(1, len(chosen)))
        axes = figure.subplots(max(1, len(chosen)), 2, squeeze=False, width_ratios=(3, 1))
        for row, (i, state, each) in enumerate(
            zip(chosen.tolist(), states.tolist(), found, strict=True)
        ):
            _draw_traces(axes[row, 0], split.images[i, 0].numpy(), each, rate)
            share = logits[i].softmax(0)[state].item()
            axes[row, 0].set_title(f"{plain([classes[state]])[0]}, probability {share:.2f}")
            means = each.heat.mean(axis=1)
            _draw_head(axes[row, 1], means, "mean evidence", (means.min(), means.max()))
        save(figure, file)


def _surest(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the positions of the surest right windows of each state."""
    shares = logits.softmax(dim=1)[torch.arange(len(labels)), labels]
    order = shares.argsort(descending=True, stable=True)
    order = order[logits[order].argmax(dim=1) == labels[order]]
    parts = [order[labels[order] == state][:SHOWN] for state in sorted({*labels.tolist()})]
    return torch.cat([torch.arange(0), *parts])


def _draw_traces(axes: Any, window: NDArray[Any], explanation: Explanation, rate: float) -> None:
    from matplotlib.collections import LineCollection

    electrodes, samples = window.shape
    spacing = 4 * float(window.std()) or 1.0
    times = np.arange(samples) / rate
    top = max(float(explanation.heat.max()), 1e-9)
    lines, colours = [], []
    for row, (trace, heat) in enumerate(zip(window, explanation.heat, strict=True)):
        heights = trace - trace.mean() - row * spacing
        points = np.stack([times, heights], axis=1)
        lines.append(np.stack([points[:-1], points[1:]], axis=1))
        colours.append(np.clip(heat[:-1], 0, None))
    drawn = LineCollection(list(np.concatenate(lines)), cmap="turbo", linewidths=0.8)
    drawn.set_array(np.concatenate(colours))
    drawn.set_clim(0, top)
    axes.add_collection(drawn)
    axes.set_xlim(times[0], times[-1])
    axes.set_ylim(-electrodes * spacing, spacing)
    named = ELECTRODES if electrodes == len(ELECTRODES) else tuple(map(str, range(electrodes)))
    axes.set_yticks([-row * spacing for row in range(electrodes)], named, fontsize=6)
    axes.set_xlabel("seconds")
    axes.grid(False)


def _draw_head(
    axes: Any, values: NDArray[np.float64], title: str, limits: tuple[float, float]
) -> None:
    """Draw values of electrodes on a head, or as bars of electrodes without known places."""
    places = positions_of(ELECTRODES) if len(values) == len(ELECTRODES) else None
    axes.set_title(title, fontsize=9)
    axes.grid(False)
    if places is None:
        axes.bar(np.arange(len(values)), values)
        return
    around = np.linspace(0, 2 * np.pi, 100)
    axes.plot(1.12 * np.cos(around), 1.12 * np.sin(around), color="#6b7280", linewidth=1)
    axes.plot([-0.12, 0, 0.12], [1.11, 1.24, 1.11], color="#6b7280", linewidth=1)
    axes.scatter(*places.T, c=values, cmap="turbo", s=70, vmin=limits[0], vmax=limits[1])
    axes.set_aspect("equal")
    axes.set_axis_off()
