"""Multigrid convolution: a learnt V-cycle from a field to a field.

    u ← S f                                            first iteration on the finest level
    u ← u + S (f − A u)                                each further one
    f ← R f, or R (f − A' u);  u ← Π u                 to the next coarser level
    u ← u + T u_coarse, then u ← u + S (f − A u)       on the way back

S, A, R, Π are 3×3 convolutions and T is a transposed one, each with weights of its own. There is no
activation. With fixed weights the layer is a cycle of the classical multigrid method for Poisson's
equation (``MultigridConv2d.poisson``).

He, Liu, Xu, "MgNO: Efficient Parameterization of Linear Operators via Multigrid", ICLR 2024, arXiv
2310.19809.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError

__all__ = ["MultigridConv2d", "level_sizes"]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Size = tuple[int, int]


def level_sizes(size: Size, levels: int, transfer_padding: int = 1) -> list[Size]:
    """Return the sizes of the levels, finest first.

    Args:
        size: Height and width of the finest.
        levels: Number of levels.
        transfer_padding: Padding of the convolutions to the next level.

    Raises:
        UsageError: A level would be empty.

    Example:
        >>> level_sizes((101, 64), 3)
        [(101, 64), (51, 32), (26, 16)]
    """
    sizes = [size]
    while len(sizes) < levels:
        coarse = [(n + 2 * transfer_padding - 3) // 2 + 1 for n in sizes[-1]]
        if min(coarse) < 1 or coarse == list(sizes[-1]):
            raise UsageError(
                f"a grid of {size[0]}×{size[1]} has at most {len(sizes)} levels, not {levels}"
            )
        sizes.append((coarse[0], coarse[1]))
    return sizes


class Smoothing(nn.Module):
    """Iteration u + S (f − A u), or S f in place of the first.

    Args:
        fields: Channels of f.
        channels: Channels of u.
        first: u is zero.
        padding_mode: Of both convolutions.
        bias: Of both.
    """

    A: nn.Conv2d | None

    def __init__(
        self, fields: int, channels: int, first: bool, padding_mode: PaddingMode, bias: bool
    ) -> None:
        super().__init__()
        same = {"padding": 1, "padding_mode": padding_mode, "bias": bias}
        self.A = None if first else nn.Conv2d(channels, fields, 3, **same)  # type: ignore[arg-type]
        self.S = nn.Conv2d(fields, channels, 3, **same)  # type: ignore[arg-type]

    def forward(self, f: Tensor, u: Tensor | None = None) -> Tensor:
        """Return the next u, (batch, channels, height, width)."""
        if self.A is None or u is None:
            return cast(Tensor, self.S(f))
        return u + cast(Tensor, self.S(f - self.A(u)))


class Coarsening(nn.Module):
    """Restriction of f and u to the next coarser level."""

    A: nn.Conv2d | None

    def __init__(
        self,
        fields: int,
        channels: int,
        padding: int,
        padding_mode: PaddingMode,
        residual: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.A = None
        if residual:
            self.A = nn.Conv2d(channels, fields, 3, padding=1, padding_mode=padding_mode, bias=bias)
        half = {"stride": 2, "padding": padding, "padding_mode": padding_mode, "bias": False}
        self.Pi = nn.Conv2d(channels, channels, 3, **half)  # type: ignore[arg-type]
        self.R = nn.Conv2d(fields, fields, 3, **half)  # type: ignore[arg-type]

    def forward(self, f: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f and u on the coarser grid."""
        residual = f if self.A is None else f - self.A(u)
        return cast(Tensor, self.R(residual)), cast(Tensor, self.Pi(u))


class Prolongation(nn.Module):
    """Transposed convolution to a given finer size.

    Args:
        channels: Channels.
        fine: Size of the finer grid; a side has a kernel of 4 if even, of 3 if odd.
        padding: Of the restriction.
        periodic: Wrap the coarse grid around; sides must be even.
    """

    def __init__(self, channels: int, fine: Size, padding: int, periodic: bool) -> None:
        super().__init__()
        kernel = (4 - fine[0] % 2, 4 - fine[1] % 2)
        self.periodic = periodic
        self.transfer = nn.ConvTranspose2d(
            channels, channels, kernel, stride=2, padding=padding, bias=False
        )

    @property
    def weight(self) -> Tensor:
        """Weight of the transposed convolution."""
        return self.transfer.weight

    def forward(self, u: Tensor) -> Tensor:
        """Return u on the finer grid."""
        if not self.periodic:
            return cast(Tensor, self.transfer(u))
        wide = self.transfer(F.pad(u, (1, 1, 1, 1), mode="circular"))
        return cast(Tensor, wide)[..., 2:-2, 2:-2]


class MultigridConv2d(nn.Module):
    """Linear map of fields by a V-cycle of convolutions, over all scales of the grid.

    Args:
        in_channels: Fields, F.
        out_channels: Channels of the result, U.
        iterations: Smoothing iterations before and after each coarser level, finest level first; at
            least one before, and none after the coarsest.
        img_size: Height and width of the grid.
        padding_mode: Of smoothing and restriction: zeros for Dirichlet's boundary conditions,
            reflect for Neumann's, circular for periodic ones.
        transfer_padding: Padding of restriction and prolongation: 1, or 0 for grids of interior
            points.
        bias: Of smoothing convolutions.
        restrict_residual: Restrict f − A u instead of f.
        norm: LayerNorm of each level behind the coarse correction.
        transfer_periodic: Wrap prolongations of a circular padding mode around. Without it, as in
            the authors' networks, a shift of the input does not shift the output.

    Raises:
        UsageError: Impossible iterations, or more levels than the grid has.

    Example:
        >>> layer = MultigridConv2d(1, 24, [(1, 0), (2, 0)], 32)
        >>> layer(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 24, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        iterations: Sequence[tuple[int, int]],
        img_size: int | Size,
        padding_mode: PaddingMode = "zeros",
        transfer_padding: int = 1,
        bias: bool = False,
        restrict_residual: bool = False,
        norm: bool = False,
        transfer_periodic: bool = True,
    ) -> None:
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        _require_iterations(iterations)
        self.sizes = level_sizes(size, len(iterations), transfer_padding)
        periodic = padding_mode == "circular" and transfer_periodic
        if periodic and (transfer_padding != 1 or any(n % 2 for s in self.sizes[:-1] for n in s)):
            raise UsageError(
                f"a periodic grid halves evenly at every level, with a transfer padding of 1; its "
                f"levels are {self.sizes}"
            )
        smooth = (in_channels, out_channels)
        self.pre = nn.ModuleList()
        self.post = nn.ModuleList()
        for level, (before, after) in enumerate(iterations):
            firsts = [level == 0 and i == 0 for i in range(before)]
            self.pre.append(_smoothings(smooth, firsts, padding_mode, bias))
            self.post.append(_smoothings(smooth, [False] * after, padding_mode, bias))
        coarser = len(iterations) - 1
        self.down = nn.ModuleList(
            Coarsening(*smooth, transfer_padding, padding_mode, restrict_residual, bias)
            for _ in range(coarser)
        )
        self.up = nn.ModuleList(
            Prolongation(out_channels, fine, transfer_padding, periodic) for fine in self.sizes[:-1]
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm((out_channels, *fine)) if norm else nn.Identity()
            for fine in self.sizes[:-1]
        )

    def forward(self, f: Tensor) -> Tensor:
        """Return u (batch, out_channels, height, width) of f (batch, in_channels, …)."""
        if f.shape[-2:] != self.sizes[0]:
            raise UsageError(
                f"the layer was built for grids of {self.sizes[0][0]}×{self.sizes[0][1]}, not "
                f"{f.shape[-2]}×{f.shape[-1]}"
            )
        levels: list[tuple[Tensor, Tensor]] = []
        u: Tensor | None = None
        for level, smoothings in enumerate(self.pre):
            if u is not None:
                f, u = self.down[level - 1](f, u)
            for smoothing in cast(nn.ModuleList, smoothings):
                u = smoothing(f, u)
            levels.append((f, cast(Tensor, u)))
        found = levels[-1][1]
        for level in range(len(levels) - 2, -1, -1):
            f, u = levels[level]
            found = self.norms[level](u + self.up[level](found))
            for smoothing in cast(nn.ModuleList, self.post[level]):
                found = smoothing(f, found)
        return found

    @classmethod
    @torch.no_grad()
    def poisson(
        cls, levels: int, omega: float = 0.8, pre: int = 1, post: int = 1
    ) -> "MultigridConv2d":
        """Build a V-cycle for −Δu = f on 2^levels − 1 interior points per side, u = 0 outside.

        The smoother is the damped Jacobi method, restriction is full weighting, prolongation is
        bilinear, and the coarsest grid has one point, solved exactly.

        Args:
            levels: Levels; the coarsest is one point.
            omega: Damping of the smoother.
            pre: Iterations before each coarser level.
            post: Iterations after it.

        Example:
            >>> cycle = MultigridConv2d.poisson(5).double()
            >>> ones = torch.ones(1, 1, 31, 31, dtype=torch.float64)
            >>> round(float(cycle(ones)[0, 0, 15, 15].detach()), 2)
            0.05
        """
        points = 2**levels - 1
        iterations = [*[(pre, post)] * (levels - 1), (1, 0)]
        layer = cls(1, 1, iterations, points, transfer_padding=0, restrict_residual=True).double()
        stencil = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])
        line = torch.tensor([1.0, 2.0, 1.0])
        weights = torch.outer(line, line).double()
        for level in range(levels):
            h2 = (2**level / (points + 1)) ** 2
            damping = omega if level < levels - 1 else 1.0
            parts = [
                *cast(nn.ModuleList, layer.pre[level]),
                *cast(nn.ModuleList, layer.post[level]),
            ]
            for smoothing in cast(list[Smoothing], parts):
                smoothing.S.weight.zero_()[0, 0, 1, 1] = damping * h2 / 4
                if smoothing.A is not None:
                    smoothing.A.weight.copy_(stencil / h2)
            if level < levels - 1:
                down = cast(Coarsening, layer.down[level])
                cast(nn.Conv2d, down.A).weight.copy_(stencil / h2)
                down.R.weight.copy_(weights / 16)
                down.Pi.weight.zero_()
                cast(Prolongation, layer.up[level]).weight.copy_(weights / 4)
        return layer


def _smoothings(
    widths: tuple[int, int], firsts: Sequence[bool], padding_mode: PaddingMode, bias: bool
) -> nn.ModuleList:
    return nn.ModuleList(Smoothing(*widths, first, padding_mode, bias) for first in firsts)


def _require_iterations(iterations: Sequence[tuple[int, int]]) -> None:
    pairs = [tuple(pair) for pair in iterations]
    fits = pairs and all(len(pair) == 2 and pair[0] >= 1 and pair[1] >= 0 for pair in pairs)
    if not fits or pairs[-1][1]:
        raise UsageError(
            f"iterations are pairs for each level, of at least one before and any number after "
            f"the coarser level, and none after the coarsest; got {pairs}"
        )
