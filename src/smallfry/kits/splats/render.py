"""Rasteriser of Gaussian splats in plain PyTorch, differentiable in every attribute.

    p = R x + t;  of z > near only, 0.2 by default
    Σ = M Mᵀ,  M = rot(q / ‖q‖) diag(exp s)
    Σ' = J R Σ Rᵀ Jᵀ + 0.3 I,  J the derivative of the projection, at x/z and y/z clipped to 1.3
         times the half of the field of view
    α = min(0.99, sigmoid(o) exp(−½ dᵀ Σ'⁻¹ d)),  0 below 1/255
    w_i = α_i Π_{j<i} (1 − α_j),  by depth;  pixel = Σ w_i c_i + Π (1 − α) background

Source: Kerbl et al. 2023. Theirs stops where Π (1 − α) falls below 10⁻⁴ and cuts at 3 σ; here each
Gaussian reaches as far as its α does, so that tiles change nothing.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.kits.splats.scene import Scene

__all__ = ["Camera", "Projected", "blend", "importance", "project", "rasterise", "render"]

NEAR = 0.2  # in the unit of the scene
BLUR = 0.3  # pixels², added to the covariance
CLIP = 1.3  # of the half of the field of view
MOST_ALPHA, LEAST_ALPHA = 0.99, 1 / 255
TILE = 8  # pixels per side
Y0 = 0.28209479177387814


class Camera(NamedTuple):
    """Pinhole camera: p = rotation · x + translation, with z forwards and y down.

    The principal point is the centre, and centres of pixels are at one half.
    """

    rotation: NDArray[np.float64]  # (3, 3)
    translation: NDArray[np.float64]  # (3,)
    focal: float  # pixels
    width: int
    height: int
    near: float = NEAR  # depth up to which nothing is seen


class Projected(NamedTuple):
    """Gaussians before a camera, nearest first."""

    rows: Tensor  # (visible,), in the scene
    centres: Tensor  # (visible, 2), pixels
    conics: Tensor  # (visible, 3): xx, xy and yy of the inverse covariance
    extents: Tensor  # (visible, 2): half sides of the box in which α is 1/255 and more
    opacities: Tensor  # (visible,)
    colours: Tensor  # (visible, 3)


def project(positions: Tensor, attributes: Tensor, camera: Camera) -> Projected:
    """Project Gaussians.

    Args:
        positions: (Gaussians, 3).
        attributes: (Gaussians, columns), before activation, as of ``Scene``.
        camera: The camera.
    """
    R, t = (
        torch.as_tensor(each, dtype=positions.dtype, device=positions.device)
        for each in (camera.rotation, camera.translation)
    )
    depths = (positions.detach() @ R.T + t)[:, 2]
    rows = (depths > camera.near).nonzero()[:, 0]
    rows = rows[depths[rows].argsort(stable=True)]
    x, own = positions[rows], attributes[rows]
    px, py, z = (x @ R.T + t).unbind(1)
    f = camera.focal
    limits = [CLIP * side / (2 * f) for side in (camera.width, camera.height)]
    cx, cy = (z * (p / z).clamp(-limit, limit) for p, limit in zip((px, py), limits, strict=True))
    zero = torch.zeros_like(z)
    J = torch.stack(
        [
            torch.stack([f / z, zero, -f * cx / z**2], 1),
            torch.stack([zero, f / z, -f * cy / z**2], 1),
        ],
        1,
    )
    M = rotation_matrices(own[:, 4:8]) * own[:, None, 1:4].exp()
    half = J @ R @ M
    covariance = half @ half.mT
    a, b, c = (
        covariance[:, 0, 0] + BLUR,
        covariance[:, 0, 1],
        covariance[:, 1, 1] + BLUR,
    )
    determinant = a * c - b * b
    opacities = own[:, 0].sigmoid()
    reach = 2 * (opacities.detach() / LEAST_ALPHA).clamp(min=1).log()
    return Projected(
        rows,
        torch.stack([f * px / z + camera.width / 2, f * py / z + camera.height / 2], 1),
        torch.stack([c, -b, a], 1) / determinant[:, None],
        (reach[:, None] * torch.stack([a, c], 1).detach()).sqrt(),
        opacities,
        colours(x + R.T @ t, own[:, 8:]),
    )


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Compute (n, 3, 3) rotations of quaternions (n, 4) of any length."""
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    entries = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(entries, 1).reshape(-1, 3, 3)


def colours(directions: Tensor, coefficients: Tensor) -> Tensor:
    """Compute ½ + Σ Y_k f_k, at least 0.

    Args:
        directions: (n, 3), from the camera to the Gaussians, of any length.
        coefficients: (n, 3 · harmonics): three of degree 0, then the rest by colour.
    """
    found = 0.5 + Y0 * coefficients[:, :3]
    if coefficients.shape[1] > 3:
        count = (coefficients.shape[1] - 3) // 3
        rest = coefficients[:, 3:].reshape(len(coefficients), 3, count)
        basis = harmonics(torch.nn.functional.normalize(directions, dim=1), count)
        found = found + (rest * basis[:, None]).sum(2)
    return found.clamp(min=0)


def harmonics(directions: Tensor, count: int) -> Tensor:
    """Compute the first real spherical harmonics beyond degree 0, with the sign (−1)^m.

    Args:
        directions: Unit vectors, (n, 3).
        count: 3, 8 or 15.

    Returns:
        (n, count), of m = −l … l for each degree l.
    """
    x, y, z = directions.unbind(1)
    xx, yy, zz = x * x, y * y, z * z
    c = math.sqrt(3 / (4 * math.pi))
    found = [-c * y, c * z, -c * x]
    if count > 3:
        c, d = math.sqrt(15 / (4 * math.pi)), math.sqrt(5 / (16 * math.pi))
        found += [c * x * y, -c * y * z, d * (2 * zz - xx - yy), -c * x * z, c / 2 * (xx - yy)]
    if count > 8:
        outer, second, third = (math.sqrt(n / (32 * math.pi)) for n in (35, 210, 21))
        found += [
            -outer * y * (3 * xx - yy),
            2 * second * x * y * z,
            -third * y * (4 * zz - xx - yy),
            math.sqrt(7 / (16 * math.pi)) * z * (2 * zz - 3 * xx - 3 * yy),
            -third * x * (4 * zz - xx - yy),
            second * z * (xx - yy),
            -outer * x * (xx - 3 * yy),
        ]
    return torch.stack(found, 1)


class Tile(NamedTuple):
    """Part of an image."""

    rows: slice
    columns: slice
    near: Tensor  # the Gaussians that reach it, as places in ``Projected``
    weights: Tensor  # (pixels, Gaussians)
    transmittance: Tensor  # (pixels,), that of all of them


def blend(found: Projected, camera: Camera) -> Iterator[Tile]:
    """Compute blending weights, tile by tile."""
    low, high = found.centres.detach() - found.extents, found.centres.detach() + found.extents
    packed = torch.cat([found.centres, found.conics, found.opacities[:, None]], 1)
    for top in range(0, camera.height, TILE):
        bottom = min(top + TILE, camera.height)
        in_rows = (low[:, 1] < bottom) & (high[:, 1] > top)
        for left in range(0, camera.width, TILE):
            right = min(left + TILE, camera.width)
            near = (in_rows & (low[:, 0] < right) & (high[:, 0] > left)).nonzero()[:, 0]
            ys, xs = (
                torch.arange(*ends, dtype=packed.dtype, device=packed.device) + 0.5
                for ends in ((top, bottom), (left, right))
            )
            pixels = xs.repeat(len(ys)), ys.repeat_interleave(len(xs))
            parts = _weights(packed[near], *pixels)
            yield Tile(slice(top, bottom), slice(left, right), near, *parts)


def _weights(packed: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    u, v, xx, xy, yy, opacity = packed.unbind(1)
    dx, dy = xs[:, None] - u, ys[:, None] - v
    power = -0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy
    alpha = (opacity * power.exp()).clamp(max=MOST_ALPHA)
    alpha = torch.where((power > 0) | (alpha < LEAST_ALPHA), 0.0, alpha)
    logs = (-alpha).log1p()
    sums = logs.cumsum(1)
    return alpha * (sums - logs).exp(), logs.sum(1).exp()


def rasterise(
    positions: Tensor, attributes: Tensor, camera: Camera, background: Sequence[float] = (0, 0, 0)
) -> Tensor:
    """Render an image (height, width, 3), differentiably; see ``project`` for the arguments."""
    found = project(positions, attributes, camera)
    behind = positions.new_tensor(background)
    rows: list[list[Tensor]] = []
    for tile in blend(found, camera):
        pixels = tile.weights @ found.colours[tile.near] + tile.transmittance[:, None] * behind
        if tile.columns.start == 0:
            rows.append([])
        rows[-1].append(pixels.reshape(tile.rows.stop - tile.rows.start, -1, 3))
    return torch.cat([torch.cat(row, 1) for row in rows])


@torch.no_grad()
def render(
    scene: Scene, camera: Camera, background: Sequence[float] = (0, 0, 0)
) -> NDArray[np.floating]:
    """Render a scene on the CPU: (height, width, 3), of its own precision.

    Example:
        >>> import numpy as np
        >>> from smallfry.kits.splats.render import Camera, render
        >>> from smallfry.kits.splats.scene import Scene
        >>> attributes = np.zeros((1, 11))
        >>> attributes[0, 4] = 1  # no rotation
        >>> scene = Scene(np.zeros((1, 3)), attributes)  # opacity ½, grey
        >>> camera = Camera(np.eye(3), np.array([0, 0, 3.0]), 24, 5, 5)
        >>> float(render(scene, camera)[2, 2, 0])
        0.25
    """
    positions, attributes = _tensors(scene)
    return rasterise(positions, attributes, camera, background).numpy()


@torch.no_grad()
def importance(scene: Scene, cameras: Sequence[Camera]) -> NDArray[np.float64]:
    """Sum each Gaussian's blending weights over all pixels of views, (Gaussians,)."""
    positions, attributes = _tensors(scene)
    total = torch.zeros(len(scene), dtype=torch.float64)
    for camera in cameras:
        found = project(positions, attributes, camera)
        for tile in blend(found, camera):
            total.index_add_(0, found.rows[tile.near], tile.weights.sum(0).double())
    return total.numpy()


def _tensors(scene: Scene) -> tuple[Tensor, Tensor]:
    return torch.tensor(scene.positions), torch.tensor(scene.attributes)
