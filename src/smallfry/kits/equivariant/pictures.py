"""Pictures of turned images, and of the answers to them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.kits.equivariant.group import rotations
from smallfry.report.figure import in_legend, new_figure, save, style

__all__ = ["accuracy_by_angle", "draw_turns", "turn"]

SHOWN = 12  # turned copies of one image


def turn(images: Tensor, degrees: float) -> Tensor:
    """Turn images (images, channels, side, side) about their middle, bilinearly, zeros outside.

    Counter-clockwise, and by quarter turns exactly.

    Example:
        >>> corner = torch.zeros(1, 1, 4, 4)
        >>> corner[..., 0, 0] = 1
        >>> bool((turn(corner, 90) == corner.rot90(1, (2, 3))).all())
        True
    """
    if degrees % 90 == 0:
        return images.rot90(int(degrees) // 90, (2, 3))
    matrix = rotations(1, torch.pi * degrees / 180).elements[0]
    grid = F.affine_grid(
        F.pad(matrix, (0, 1)).expand(len(images), 2, 3).to(images), list(images.shape), False
    )
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def accuracy_by_angle(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalize: Callable[[Tensor], Tensor],
    angles: Sequence[float],
) -> list[float]:
    """Compute the share of right answers to images that are turned by each angle.

    Args:
        model: In evaluation mode; normalised images to logits.
        images: (images, channels, side, side), uint8.
        labels: (images,).
        normalize: From uint8 images to what the model takes.
        angles: In degrees.
    """
    device = next(model.parameters()).device
    found = []
    for degrees in angles:
        turned = turn(images.float(), degrees).round().to(torch.uint8)
        logits = model(normalize(turned).to(device)).cpu()
        found.append((logits.argmax(1) == labels).double().mean().item())
    return found


def draw_turns(
    images: Tensor, accuracies: Mapping[str, Sequence[float]], angles: Sequence[float], file: Path
) -> None:
    """Draw one image at some angles, and lines of accuracy over the angle.

    Args:
        images: (images, 1 or 3, side, side), uint8; the first is shown.
        accuracies: Shares of right answers by angle, of each network by its name.
        angles: In degrees.
        file: The PNG to write.
    """
    some = [*range(0, len(angles), max(1, len(angles) // SHOWN))]
    with style():
        figure = new_figure(9, 4.2)
        grid = figure.add_gridspec(2, len(some), height_ratios=(1, 4))
        for column, place in enumerate(some):
            ax = figure.add_subplot(grid[0, column])
            shown = turn(images[:1].float(), angles[place])[0].permute(1, 2, 0) / 255
            ax.imshow(shown.numpy().squeeze(), cmap="gray", vmin=0, vmax=1)
            ax.set_axis_off()
        ax = figure.add_subplot(grid[1, :])
        for name, values in zip(in_legend([*accuracies]), accuracies.values(), strict=True):
            ax.plot(angles, [100 * value for value in values], marker=".", label=name)
        ax.set_xticks(range(0, 361, 45))
        ax.set_xlabel("turned by, degrees")
        ax.set_ylabel("right, %")
        ax.set_ylim(0, 100)
        if any(accuracies):
            ax.legend()
        save(figure, file)
