"""Errors of poses: mean distances of an object's points, rotation and translation.

    ADD   mean of ‖(R x + t) − (R̂ x + t̂)‖ over the object's points
    ADI   mean over true points of the distance to the nearest estimated one, of symmetric objects

Hinterstoisser et al., ACCV 2012. A pose is right if its error is below a share of the diameter.
"""

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.pnp import Pose

__all__ = ["SHARES", "add", "adi", "area_under", "diameter", "rotation_error"]

Floats = NDArray[np.float64]
SHARES = (0.02, 0.05, 0.1)  # of the diameter


def add(points: Floats, truth: Pose, found: Pose) -> float:
    """Compute the mean distance of points (n, 3) in two poses, in metres."""
    return float(np.linalg.norm(_moved(points, truth) - _moved(points, found), axis=1).mean())


def adi(points: Floats, truth: Pose, found: Pose) -> float:
    """Compute the mean distance of true points to the nearest estimated ones, in metres."""
    true, other = _moved(points, truth), _moved(points, found)
    between = np.linalg.norm(true[:, None] - other[None], axis=-1)
    return float(between.min(axis=1).mean())


def rotation_error(truth: Floats, found: Floats) -> float:
    """Compute the angle between two rotations, in degrees."""
    cosine = (np.trace(found @ truth.T) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def diameter(points: Floats) -> float:
    """Compute the largest distance of two points, in metres."""
    return float(np.linalg.norm(points[:, None] - points[None], axis=-1).max())


def area_under(errors: Floats, most: float) -> float:
    """Compute the area under the share of errors below a threshold, from 0 to the most, as a share.

    Xiang et al., "PoseCNN", RSS 2018, take 10 cm. It is exact: the mean of 1 − error / most,
    cut off at 0.
    """
    return float(np.maximum(0, 1 - errors / most).mean()) if len(errors) else 0.0


def _moved(points: Floats, pose: Pose) -> Floats:
    result: Floats = points @ pose.rotation.T + pose.translation
    return result
