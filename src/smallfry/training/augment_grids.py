"""Augmentation of grids of symbols: a random symmetry of each puzzle and its solution."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smallfry.data import ImageData
from smallfry.data.symmetry import Symmetry
from smallfry.errors import UsageError
from smallfry.tasks import Batch, Task
from smallfry.training.augment import Augment, Augmentation, Normalize, Place, beside, whole
from smallfry.training.batches import flips_by_default
from smallfry.training.config import AugmentConfig, TrainConfig

__all__ = ["GridAugment", "build_augment"]


class GridAugment:
    """Random symmetries of grids and their labels, as ``Augment`` is of images.

    Args:
        draw: Random symmetries of so many grids, from PyTorch's global random state; None for none.
        symbols: Number of symbols.
        normalize: Pixels to inputs.
        targets: Targets of labels, as ``Task.targets``.
    """

    alternates: bool = False
    sizes: Sequence[int] = ()
    repeats: int = 1

    def __init__(
        self,
        draw: Callable[[int], Symmetry] | None,
        symbols: int,
        normalize: Normalize,
        targets: Callable[[Tensor, Tensor], Any],
    ) -> None:
        self.draw, self.classes = draw, symbols
        self.normalize, self.targets = normalize, targets

    def needed(self, part: slice, count: int) -> Place:
        """Return the grids that a part of a batch needs: its own."""
        return Place(torch.arange(part.start, part.stop), count)

    def __call__(self, images: Tensor, labels: Tensor, place: Place | None = None) -> Batch:
        """Transform grids (batch, 1, side, side), uint8, with labels (batch, cells), int64."""
        place = place or whole(images)
        if self.draw is not None:
            drawn = self.draw(place.total).take(place.rows)
            drawn = Symmetry(*(beside(images, each) for each in drawn))
            images = drawn(images.flatten(2)).view_as(images)
            labels = drawn(labels)
        return Batch(self.normalize(images), self.targets(labels, labels))


def build_augment(config: TrainConfig, data: ImageData, task: Task) -> Augmentation:
    """Build the augmentation of a training run.

    Raises:
        UsageError: Augmentation of images, or another normalisation, for grids of symbols.
    """
    mean, std = config.data.mean or data.mean, config.data.std or data.std
    if data.moments is None:
        return Augment(
            *(config.augment, data.image_size, len(data.classes), mean, std),
            flip=flips_by_default(data),
            targets=task.targets,
        )
    if replace(config.augment, resized_crop=None) != AugmentConfig():
        raise UsageError(
            f"{data.name} holds symbols, not images: leave out augment; data.options.symmetries "
            "turns its symmetries off"
        )
    if config.data.mean is not None and tuple(map(tuple, (mean, std))) != data.moments:
        raise UsageError(f"{data.name} holds symbols, not images: leave out data.mean and data.std")
    normalize = Normalize(*data.moments)
    return GridAugment(data.symmetries, len(data.classes), normalize, task.targets)
