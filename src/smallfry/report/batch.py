"""Plot of a training batch."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from smallfry.report.figure import new_figure, plain, save, show_image, style

COLUMNS = 8
MOST_NAMED = 2  # classes of a mixed image that are named


def draw_batch(
    images: Tensor, shares: Tensor, classes: Sequence[str], title: str, file: Path
) -> None:
    """Draw augmented images with the classes to learn.

    Args:
        images: (images, channels, height, width), uint8.
        shares: (images, classes), the share of each class.
        classes: Class names.
        title: Above all images.
        file: The PNG to write.
    """
    names = plain(classes)
    rows = -(-len(images) // COLUMNS)
    with style():
        figure = new_figure(1.35 * COLUMNS, 1.6 * rows + 0.5)
        figure.suptitle(plain([title])[0], fontsize=9)
        grid = figure.subplots(rows, COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, pixels, share in zip(grid.flat, images, shares, strict=False):
            axes.axis("on")
            show_image(axes, pixels)
            axes.set_title(_classes(share, names), fontsize=7)
        save(figure, file)


def _classes(share: Tensor, names: Sequence[str]) -> str:
    """Name the classes of an image, with their shares if there are several."""
    order: list[int] = share.argsort(descending=True, stable=True)[:MOST_NAMED].tolist()
    found = [i for i in order if share[i] > 0.005]
    if len(found) == 1:
        return names[found[0]][:18]
    return "\n".join(f"{share[i]:.0%} {names[i]}"[:18] for i in found)
