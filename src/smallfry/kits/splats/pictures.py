"""Pictures of scenes: original, decoded, and the difference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smallfry.kits.splats.cameras import psnr
from smallfry.report.figure import new_figure, save, style

__all__ = ["draw_views"]

SHOWN = 4
GAIN = 5  # of differences


def draw_views(pairs: Sequence[Any], file: Path) -> None:
    """Draw views in rows of three: original, decoded, and five times the absolute difference.

    Args:
        pairs: Decoded and original image of each view, (height, width, 3), of which at most four
            are shown.
        file: The PNG to write.
    """
    shown = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, SHOWN).round().astype(int))]
    with style():
        figure = new_figure(6.6, 2.2 * len(shown))
        axes = figure.subplots(len(shown), 3, squeeze=False)
        for row, pair in zip(axes, shown, strict=True):
            decoded, original = (np.clip(each, 0, 1) for each in pair)
            difference = np.clip(GAIN * np.abs(decoded - original), 0, 1)
            for ax, image in zip(row, (original, decoded, difference), strict=True):
                ax.imshow(image, interpolation="nearest")
                ax.set_xticks([])
                ax.set_yticks([])
                ax.grid(False)
            row[1].set_xlabel(f"{psnr(decoded, original):.1f} dB")
        titles = ("original", "decoded", f"difference × {GAIN}")
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        save(figure, file)
