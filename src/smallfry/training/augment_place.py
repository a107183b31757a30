"""Part of a batch that one of several processes augments."""

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Part of a batch held by one of several processes.

    Random choices are drawn for the whole batch, so that they don't depend on how it is shared.
    """

    rows: Tensor  # (images,), int64, their places in the batch
    total: int  # images in the whole batch
    borrowed: int = 0  # how many of them, in front, are there for mixing only
    mirrored: Tensor | None = None  # (images,), bool: those to mirror, where that is not by chance
    size: int | None = None  # side to bring them to, in pixels; as they are by default

    def own(self, draws: Tensor) -> Tensor:
        """Select the draws of the local images, along the last dimension."""
        return draws[..., self.rows]


def whole(images: Tensor) -> Place:
    """Describe a batch with all images local."""
    return Place(torch.arange(len(images)), len(images))


def beside(images: Tensor, drawn: Tensor) -> Tensor:
    """Move a few numbers to the images' device, without waiting for a GPU."""
    # CUDA takes pageable memory in before it returns, so the numbers may be freed
    return drawn.to(images.device, non_blocking=images.is_cuda)
