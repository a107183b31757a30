"""Pictures of fields: given, true, computed, and the difference."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from smallfry.report.figure import new_figure, save, style

__all__ = ["draw_fields"]

TITLES = ("given", "solution", "answer", "difference")


def draw_fields(given: Tensor, wanted: Tensor, found: Tensor, file: Path) -> None:
    """Draw the first field of samples, one row each.

    Args:
        given: (samples, fields, height, width).
        wanted: True fields, the same.
        found: Computed ones.
        file: The PNG to write.
    """
    count = max(1, len(wanted))
    with style():
        figure = new_figure(10, 2.3 * count)
        axes = figure.subplots(count, 4, squeeze=False)
        for row, triple in enumerate(zip(given, wanted, found, strict=True)):
            inputs, truth, answer = (each[0].double().numpy() for each in triple)
            error = float(np.linalg.norm(answer - truth) / np.linalg.norm(truth))
            low, high = float(truth.min()), float(truth.max())
            _show(figure, axes[row, 0], inputs, None, "viridis")
            _show(figure, axes[row, 1], truth, (low, high), "viridis")
            _show(figure, axes[row, 2], answer, (low, high), "viridis")
            most = float(np.abs(answer - truth).max()) or 1.0
            _show(figure, axes[row, 3], answer - truth, (-most, most), "RdBu_r")
            axes[row, 3].set_xlabel(f"relative L² {error:.2%}")
            if row == 0:
                for ax, title in zip(axes[row], TITLES, strict=True):
                    ax.set_title(title)
        save(figure, file)


def _show(
    figure: Any, axes: Any, field: Any, limits: tuple[float, float] | None, colours: str
) -> None:
    low, high = limits or (None, None)
    shown = axes.imshow(field, origin="lower", cmap=colours, vmin=low, vmax=high)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
