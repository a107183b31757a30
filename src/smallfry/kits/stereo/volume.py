"""Matching of two views: warping, differences over candidate disparities, and soft-argmin.

A point at column u of the left view is at u − d of the right one, d being its disparity. Features
outside the right view are 0. Kendall et al., ICCV 2017, have the soft-argmin.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["difference_volume", "enlarge", "soft_argmin", "warp"]


def warp(right: Tensor, disparity: Tensor) -> Tensor:
    """Read features of the right view at the places that the left pixels have there.

    Args:
        right: (batch, channels, height, width).
        disparity: (batch, candidates, height, width), in pixels of this size.

    Returns:
        (batch, channels, candidates, height, width), bilinear, 0 outside.
    """
    candidates, height, width = disparity.shape[1:]
    columns = torch.arange(width, dtype=right.dtype, device=right.device)
    rows = torch.arange(height, dtype=right.dtype, device=right.device)
    across = 2 * (columns - disparity) / max(1, width - 1) - 1  # of align_corners
    down = (2 * rows / max(1, height - 1) - 1)[:, None].expand_as(across)
    grid = torch.stack([across, down], dim=-1).flatten(1, 2)
    read = F.grid_sample(right, grid, align_corners=True)
    return read.view(*right.shape[:2], candidates, height, width)


def difference_volume(left: Tensor, right: Tensor, disparities: int | Tensor) -> Tensor:
    """Subtract the right features at each candidate disparity from the left ones.

    Args:
        left: (batch, channels, height, width).
        right: The same.
        disparities: Candidates 0, 1, … of that number, or one for each pixel, (batch, candidates,
            height, width).

    Returns:
        (batch, channels, candidates, height, width); outside the right view, the left features.
    """
    if isinstance(disparities, Tensor):
        return left[:, :, None] - warp(right, disparities)
    width = left.shape[-1]
    shifted = [F.pad(right, (d, 0))[..., :width] for d in range(disparities)]
    return left[:, :, None] - torch.stack(shifted, dim=2)


def soft_argmin(cost: Tensor, candidates: Tensor) -> Tensor:
    """Compute the mean of the candidates weighted by softmax(−cost), (batch, height, width).

    Args:
        cost: (batch, candidates, height, width).
        candidates: (candidates,).
    """
    return ((-cost).softmax(dim=1) * candidates[:, None, None]).sum(dim=1)


def enlarge(values: Tensor, factor: int) -> Tensor:
    """Enlarge maps (batch, channels, height, width) bilinearly, corners not aligned."""
    return F.interpolate(values, scale_factor=factor, mode="bilinear", align_corners=False)
