"""Solutions of the two-dimensional wave equation u_tt = c² Δu between reflecting walls.

Leapfrog in float64 with the five-point Laplacian and Neumann walls (no flux), where
C = c dt/dx is the Courant number:

    u(t+1) = 2 u(t) − u(t−1) + C² Δu(t)

It conserves ½ ‖u(t+1) − u(t)‖² + ½ C² ⟨∇u(t+1), ∇u(t)⟩ up to rounding, and is stable for
C ≤ 1/√2. Fields start at rest as one Gaussian bump.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.errors import UsageError

SIDE, COURANT, AHEAD = 32, 0.5, 4
STABLE = 0.5**0.5
BEFORE = 40  # most steps from the start to a pair's inputs


class WavePairs(NamedTuple):
    """Two successive fields, and the field some steps later."""

    inputs: Tensor  # (pairs, 2, side, side), u(t−1) and u(t), float64
    targets: Tensor  # (pairs, 1, side, side), u(t + ahead)


def laplacian(field: Tensor) -> Tensor:
    """Apply the five-point Laplacian with no flux through the walls to (…, side, side)."""
    flat = field.reshape(-1, *field.shape[-2:])
    padded = F.pad(flat, (1, 1, 1, 1), mode="replicate").reshape(
        *field.shape[:-2], field.shape[-2] + 2, field.shape[-1] + 2
    )
    rows = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
    columns = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    return rows + columns - 4 * field


def simulate(start: Tensor, steps: int, courant: float = COURANT) -> Tensor:
    """Solve the wave equation from fields at rest.

    Args:
        start: u(0), (batch, side, side) in float64; cells are of size dx = 1.
        steps: Time steps.
        courant: C = c dt/dx.

    Returns:
        u(0) to u(steps), (steps + 1, batch, side, side).

    Raises:
        UsageError: Unstable, or no steps.

    Example:
        >>> import torch
        >>> from smallfry.data.generators.wave import bumps, simulate
        >>> simulate(bumps(3, seed=0), steps=5).shape
        torch.Size([6, 3, 32, 32])
    """
    if not 0 < courant <= STABLE:
        raise UsageError(f"the wave equation is stable for courant up to 1/√2, not {courant:g}")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    fields = [start, start + 0.5 * courant**2 * laplacian(start)]  # at rest, to second order
    for _ in range(steps - 1):
        fields.append(2 * fields[-1] - fields[-2] + courant**2 * laplacian(fields[-1]))
    return torch.stack(fields)


def bumps(count: int, seed: int, side: int = SIDE) -> Tensor:
    """Draw Gaussian bumps of random place, width and height, (count, side, side) in float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    centres = (0.15 + 0.7 * draws[:, :2]) * side
    widths = (0.06 + 0.08 * draws[:, 2]) * side
    heights = 0.5 + draws[:, 3]
    cells = torch.arange(side, dtype=torch.float64) + 0.5
    distances = (cells[None] - centres[:, :, None]).square()
    squares = distances[:, 0, :, None] + distances[:, 1, None, :]
    return heights[:, None, None] * torch.exp(-squares / (2 * widths[:, None, None].square()))


def wave_pairs(count: int, seed: int, side: int = SIDE, ahead: int = AHEAD) -> WavePairs:
    """Generate pairs of inputs and targets, each from a simulation of its own.

    Args:
        count: Pairs.
        seed: Seed of bumps and times.
        side: Cells of each side.
        ahead: Steps from the later input to the target.

    Example:
        >>> from smallfry.data.generators.wave import wave_pairs
        >>> [tuple(each.shape) for each in wave_pairs(3, seed=0)]
        [(3, 2, 32, 32), (3, 1, 32, 32)]
    """
    fields = simulate(bumps(count, seed, side), BEFORE + ahead)
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(1, BEFORE + 1, (count,), generator=generator)
    number = torch.arange(count)
    inputs = torch.stack([fields[times - 1, number], fields[times, number]], dim=1)
    return WavePairs(inputs, fields[times + ahead, number][:, None])
