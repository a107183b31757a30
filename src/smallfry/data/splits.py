"""Splits of images in memory, and their division."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.data.stream import ShardPixels


@dataclass(frozen=True)
class Split:
    """Images with labels.

    Args:
        pixels: (any, channels, height, width), uint8, or float32 of inputs that are no pictures;
            may be memory-mapped and hold other images too, or still be in shards, and read from
            there when they are indexed.
        rows: (images,), int64: where in ``pixels`` the images of this split are.
        labels: (images,), int64 class indices; of other tasks (images, …), of any type.
        rate: Samples a second of series; None of pictures.
    """

    pixels: Tensor | ShardPixels
    rows: Tensor
    labels: Tensor
    rate: float | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> Tensor:
        """Copy of all images, (images, channels, height, width)."""
        return self.pixels[self.rows]

    def take(self, positions: Tensor) -> "Split":
        """Select images of this split, in that order."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def relabelled(self, table: NDArray[np.int64]) -> "Split":
        """Keep the images whose labels a table (classes,) maps to new labels."""
        labels = torch.from_numpy(table)[self.labels]
        keep = labels >= 0
        return replace(self, rows=self.rows[keep], labels=labels[keep])

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """Shuffle all positions, (images,); within windows if the images are streamed."""
        if isinstance(self.pixels, ShardPixels):
            return self.pixels.order(self.rows, generator)
        return torch.randperm(len(self), generator=generator)


def hold_out(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Divide a split in two, the second with about ``share`` of every class.

    A class keeps at least one image in the first part, and gives at least one to the second
    if it has two.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for members in _by_class(split):
        members = members[torch.randperm(len(members), generator=generator)]
        wanted = max(1, round(share * len(members))) if share else 0
        count = min(wanted, max(0, len(members) - 1))
        held.append(members[:count])
        kept.append(members[count:])
    nothing = torch.empty(0, dtype=torch.int64)
    first, second = (torch.cat([nothing, *part]).sort().values for part in (kept, held))
    return split.take(first), split.take(second)


def take_some(split: Split, count: int, seed: int) -> Split:
    """Take a number of images of a split, stratified by class, at least one each if possible."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(split), dtype=torch.float64)
    for members in filter(len, _by_class(split)):
        members = members[torch.randperm(len(members), generator=generator)]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        place[members[0]] = -1.0
    return split.take(place.argsort(stable=True)[:count].sort().values)


def _by_class(split: Split) -> tuple[Tensor, ...]:
    """Return the positions of the images of each class, ascending."""
    if split.labels.ndim > 1 or split.labels.is_floating_point():  # no classes
        return (torch.arange(len(split)),)
    order = split.labels.argsort(stable=True)
    return torch.split(order, torch.bincount(split.labels).tolist())
