"""Cameras around a scene, and errors of images in decibels."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smallfry.errors import UsageError
from smallfry.kits.splats.render import NEAR, Camera

__all__ = ["around", "look_at", "psnr", "ring"]

SPREAD = 95  # percentile of distances from the centre that is in view
DISTANCE = 2.5  # of a camera, times that distance
HALF_FIELD = 1.25  # half of the field of view at the centre, the same


def look_at(
    place: ArrayLike,
    target: ArrayLike,
    focal: float,
    width: int,
    height: int,
    near: float = NEAR,
) -> Camera:
    """Build a camera at a place that sees a target in its centre, with −y of the scene below.

    Args:
        place: (3,).
        target: (3,).
        focal: Focal length in pixels.
        width: Pixels.
        height: Pixels.
        near: Depth up to which it sees nothing.

    Raises:
        UsageError: The place is the target, or above or below it.
    """
    eye, seen = (np.asarray(each, np.float64) for each in (place, target))
    forward = seen - eye
    right = np.cross(forward, [0.0, 1.0, 0.0])
    if np.linalg.norm(right) <= 1e-9 * np.linalg.norm(forward):
        raise UsageError("a camera can't be at its target, nor right above or below it")
    down = np.cross(forward, right)
    axes = np.stack([each / np.linalg.norm(each) for each in (right, down, forward)])
    return Camera(axes, -axes @ eye, focal, width, height, near)


def ring(
    count: int,
    centre: ArrayLike = (0, 0, 0),
    radius: float = 3.2,
    focal: float = 64.0,
    size: int = 64,
    start: float = 0.0,
    near: float = NEAR,
) -> list[Camera]:
    """Place cameras on a ring around a centre, at varying heights, all looking at it.

    Args:
        count: Of cameras.
        centre: (3,).
        radius: Of the ring.
        focal: Focal length in pixels.
        size: Pixels a side.
        start: Share of the angle between neighbours by which the ring is turned; ½ gives cameras
            between those of 0.
        near: Depth up to which a camera sees nothing.
    """
    middle = np.asarray(centre, np.float64)
    angles = 2 * np.pi * (np.arange(count) + start) / count
    heights = 0.45 * np.sin(2.4 * angles + 0.7)
    places = np.stack([np.cos(angles), heights, np.sin(angles)], 1)
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    return [look_at(middle + radius * each, middle, focal, size, size, near) for each in places]


def around(
    positions: NDArray[np.floating], count: int, size: int = 64, start: float = 0.0
) -> list[Camera]:
    """Place a ring of cameras around a scene: around its median, at 2.5 times its size.

    Its size is the 95th percentile of the distances from the median. A camera sees from a fifth of
    that on, so that a scene in another unit gives the same pictures. Photographs of a real scene
    were taken elsewhere: where their cameras are known, use those.

    Args:
        positions: (Gaussians, 3).
        count: Of cameras.
        size: Pixels a side.
        start: See ``ring``.

    Raises:
        UsageError: No positions.
    """
    if not len(positions):
        raise UsageError("a scene without Gaussians has no place for cameras around it")
    centre = np.median(positions.astype(np.float64), axis=0)
    size_of = float(np.percentile(np.linalg.norm(positions - centre, axis=1), SPREAD)) or 1.0
    focal = size / 2 * DISTANCE / HALF_FIELD
    return ring(count, centre, DISTANCE * size_of, focal, size, start, NEAR * size_of)


def psnr(found: ArrayLike, wanted: ArrayLike) -> float:
    """Compute the peak signal-to-noise ratio in dB of values that are clipped to 0 … 1.

    Example:
        >>> round(psnr([0.5, 0.5], [0.6, 0.4]), 6)
        20.0
    """
    images = [np.clip(np.asarray(each, np.float64), 0, 1) for each in (found, wanted)]
    error = float(np.square(images[0] - images[1]).mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))
