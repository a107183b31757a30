"""Dynamic aggregation feed-forward, DAFF of DHVT (Lu et al. 2022, arXiv 2210.05958).

u ← gelu(bn(conv1×1 (patches)));   u ← u + gelu(bn(depthwise 3×3 (u)));   u ← bn(conv1×1 (u))
class token ← class token ⊙ E gelu(C mean over positions u)
"""

from math import gcd, isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DAFF"]


class DAFF(nn.Module):
    """Feed-forward layer that convolves patch tokens, and scales the class token by their mean.

    Args:
        dim: Features of a token.
        hidden_dim: Channels of the convolution.

    Example:
        >>> import torch
        >>> from smallfry.layers.daff import DAFF
        >>> DAFF(8, 32)(torch.zeros(2, 1 + 16, 8)).shape
        torch.Size([2, 17, 8])
    """

    def __init__(self, dim: int, hidden_dim: int, aspect: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        common = gcd(*aspect)
        self.aspect = aspect[0] // common, aspect[1] // common
        self.conv1 = nn.Conv2d(dim, hidden_dim, 1)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.conv3 = nn.Conv2d(hidden_dim, dim, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(hidden_dim), nn.BatchNorm2d(hidden_dim)
        self.bn3 = nn.BatchNorm2d(dim)
        self.compress = nn.Linear(dim, max(1, dim // 4))
        self.excitation = nn.Linear(max(1, dim // 4), dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (batch, 1 + rows · columns, dim), the class token first.

        Raises:
            ValueError: The patch tokens don't make a grid of ``aspect``.
        """
        batch, count, dim = tokens.shape
        rows, columns = self.aspect
        times = isqrt((count - 1) // (rows * columns))
        rows, columns = times * rows, times * columns
        if rows * columns != count - 1:
            raise ValueError(
                f"expected a class token and a grid of patches of {self.aspect[0]}:"
                f"{self.aspect[1]}, got {count} tokens"
            )
        patches = tokens[:, 1:].transpose(1, 2).reshape(batch, dim, rows, columns)
        hidden = F.gelu(self.bn1(self.conv1(patches)))
        hidden = hidden + F.gelu(self.bn2(self.conv2(hidden)))
        patches = self.bn3(self.conv3(hidden))
        scale = self.excitation(F.gelu(self.compress(patches.mean(dim=(2, 3)))))
        first = tokens[:, :1] * scale[:, None]
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
