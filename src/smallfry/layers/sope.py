"""Sequential overlapping patch embedding of DHVT (Lu et al. 2022, arXiv 2210.05958).

x ← α x + β;   x ← gelu(batchnorm(conv3×3, stride 2 (x))), several times;   x ← α' x + β'
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from smallfry.errors import UsageError

__all__ = ["SOPE", "ChannelAffine"]

SHARES = {2: (1,), 4: (2, 1), 16: (8, 4, 2, 1)}  # of the features after each convolution


class ChannelAffine(nn.Module):
    """Scale and shift of each channel, the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, channels, height, width)."""
        return x * self.alpha + self.beta


class SOPE(nn.Module):
    """Overlapping patches: 3×3 convolutions of stride 2 from images to a map of tokens.

    Args:
        channels: Channels of the images.
        dim: Features of a token.
        patch_size: 2, 4 or 16, the factor by which the side shrinks.

    Raises:
        UsageError: Another patch size, or too few features to divide.

    Example:
        >>> import torch
        >>> from smallfry.layers.sope import SOPE
        >>> SOPE(3, 16, patch_size=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        if patch_size not in SHARES:
            raise UsageError(f"patch_size is 2, 4 or 16, not {patch_size}")
        if dim % SHARES[patch_size][0]:
            raise UsageError(f"{dim} features don't divide by {SHARES[patch_size][0]}")
        widths = [channels, *(dim // share for share in SHARES[patch_size])]
        stages: list[nn.Module] = []
        for before, after in pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, 2, 1, bias=False)
            stages += [nn.Sequential(convolution, nn.BatchNorm2d(after)), nn.GELU()]
        # after a single convolution there is an activation, after the last of several none
        self.proj = nn.Sequential(*(stages if patch_size == 2 else stages[:-1]))
        self.pre_affine = ChannelAffine(channels)
        self.post_affine = ChannelAffine(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Compute (batch, dim, rows, columns) of images (batch, channels, height, width)."""
        return cast(Tensor, self.post_affine(self.proj(self.pre_affine(images))))
