"""Plot of a training batch."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from smallfry.report.figure import new_figure, plain, save, show_image, style

COLUMNS = 8
MOST_NAMED = 2  # classes of an image that are named
WHOLE = 0.995  # share from which a class is shown without it


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
            axes.set_title(plain([_classes(share, classes)])[0], fontsize=7)
        save(figure, file)


def _classes(share: Tensor, names: Sequence[str]) -> str:
    """Name the classes of an image, with their shares if it is mixed of several images."""
    order: list[int] = share.argsort(descending=True, stable=True).tolist()
    found = [i for i in order if share[i] > 1 - WHOLE]
    if not found:
        return "no class"
    shown, more = found[:MOST_NAMED], len(found) - MOST_NAMED
    is_mixed = any(share[i] < WHOLE for i in found)
    lines = [(f"{share[i]:.0%} {names[i]}" if is_mixed else names[i])[:18] for i in shown]
    if more > 0:
        lines[-1] = f"{lines[-1][:13]} +{more}"
    return "\n".join(lines)
