"""Pose of a rigid object from its points and their places in a picture (PnP), in NumPy.

A camera maps a point p = R X + t to u = fx p_x / p_z + cx, v = fy p_y / p_z + cy, where pixel
(0, 0) has its centre at (0, 0). Poses come from direct linear transforms of random points (DLT,
Hartley & Zisserman, "Multiple View Geometry", section 7.1), the one with the most inliers kept
(RANSAC, Fischler & Bolles 1981), and Gauss-Newton steps on all its inliers, damped if need be.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST", "Camera", "Pose", "linear_pose", "project", "refine", "solve"]

Floats = NDArray[np.float64]
LEAST = 6  # points that a direct linear transform needs
TRIES = 150
ROUNDS = 4  # of choosing inliers and refining
NEAR = 1e-4  # metres: depths below count as this one
SMALL = 1e-12
STEPS, FIRST_STEPS = 30, 5
POLISHED = 3  # of the poses of few points


class Camera(NamedTuple):
    """Intrinsics of a camera, in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float


class Pose(NamedTuple):
    """Pose of an object before the camera."""

    rotation: Floats  # (3, 3)
    translation: Floats  # (3,), metres


class Solution(NamedTuple):
    """Pose, with its inliers."""

    pose: Pose
    inliers: NDArray[np.bool_]


def project(points: Floats, pose: Pose, camera: Camera) -> Floats:
    """Project points (…, n, 3) to pixels (…, n, 2), also in several poses."""
    return _to_pixels(_seen(points, pose), camera)


def _seen(points: Floats, pose: Pose) -> Floats:
    result: Floats = points @ pose.rotation.swapaxes(-1, -2) + pose.translation[..., None, :]
    return result


def _to_pixels(seen: Floats, camera: Camera) -> Floats:
    depth = np.where(np.abs(seen[..., 2:]) < NEAR, NEAR, seen[..., 2:])
    scale, centre = np.array(camera[:2]), np.array(camera[2:])
    result: Floats = seen[..., :2] / depth * scale + centre
    return result


def linear_pose(points: Floats, pixels: Floats, camera: Camera) -> Pose:
    """Estimate poses from six points or more by direct linear transforms.

    Args:
        points: (…, n, 3).
        pixels: (…, n, 2).
        camera: The camera.

    Returns:
        Rotations (…, 3, 3) and translations (…, 3).
    """
    middle = points.mean(axis=-2, keepdims=True)
    spread = np.maximum(np.linalg.norm(points - middle, axis=-1).mean(axis=-1), 1e-12)
    scaled = (points - middle) / spread[..., None, None]
    rays = (pixels - np.array(camera[2:])) / np.array(camera[:2])
    full = np.concatenate([scaled, np.ones_like(scaled[..., :1])], axis=-1)
    nothing = np.zeros_like(full)
    rows = np.concatenate(
        [
            np.concatenate([full, nothing, -rays[..., :1] * full], axis=-1),
            np.concatenate([nothing, full, -rays[..., 1:] * full], axis=-1),
        ],
        axis=-2,
    )
    matrix = np.linalg.svd(rows)[2][..., -1, :].reshape(*points.shape[:-2], 3, 4)
    left, values, right = np.linalg.svd(matrix[..., :3])
    sign = np.sign(np.linalg.det(left @ right))
    rotation = sign[..., None, None] * (left @ right)
    scale = sign / np.maximum(values.mean(axis=-1), 1e-12) * spread
    translation = scale[..., None] * matrix[..., 3]
    return Pose(rotation, translation - np.squeeze(rotation @ middle.swapaxes(-1, -2), -1))


def refine(points: Floats, pixels: Floats, camera: Camera, start: Pose, steps: int = STEPS) -> Pose:
    """Minimise the squared distances of projections to pixels by damped Gauss-Newton steps.

    Args:
        points: (…, n, 3).
        pixels: (…, n, 2).
        camera: The camera.
        start: First poses, (…, 3, 3) and (…, 3).
        steps: Most steps.
    """
    pose, damping = start, np.full(points.shape[:-2], 1e-6)
    errors = project(points, pose, camera) - pixels
    cost = np.square(errors).sum(axis=(-1, -2))
    for _ in range(steps):
        slopes = _slopes(points, pose, camera)
        across = slopes.swapaxes(-1, -2)
        normal = across @ slopes
        own = np.diagonal(normal, axis1=-2, axis2=-1)
        least = SMALL * own.sum(axis=-1, keepdims=True) + 1e-30  # of points that fix no pose
        damped = normal + (damping[..., None] * own + least)[..., None] * np.eye(6)
        gradient = across @ errors.reshape(*errors.shape[:-2], -1, 1)
        step = -np.linalg.solve(damped, gradient)[..., 0]
        turned = _rotation(step[..., :3]) @ pose.rotation
        moved = Pose(turned, pose.translation + step[..., 3:])
        following = project(points, moved, camera) - pixels
        lower = np.square(following).sum(axis=(-1, -2))
        better = lower < cost
        done = ~better | (cost - lower <= 1e-14 * cost)
        pose = Pose(
            np.where(better[..., None, None], moved.rotation, pose.rotation),
            np.where(better[..., None], moved.translation, pose.translation),
        )
        errors = np.where(better[..., None, None], following, errors)
        if (done & (better | (damping > 1e6))).all():
            break
        cost = np.where(better, lower, cost)
        damping = np.where(better, damping / 10, damping * 10)
    return pose


def solve(
    points: Floats, pixels: Floats, camera: Camera, threshold: float, seed: int = 0
) -> Solution | None:
    """Estimate a pose from points of which some are wrong.

    Args:
        points: (n, 3).
        pixels: (n, 2).
        camera: The camera.
        threshold: Pixels between a projection and an inlier.
        seed: Of the random choices.

    Returns:
        The pose and its inliers; None if fewer than six points agree on any.
    """
    count = len(points)
    if count < LEAST:
        return None
    random = np.random.Generator(np.random.Philox(key=seed))
    found: Solution | None = None
    for size in dict.fromkeys((LEAST, count)):
        tries = TRIES if size < count else 1
        chosen = np.argsort(random.random((tries, count)), axis=1)[:, :size]
        few = points[chosen], pixels[chosen]
        poses = refine(*few, camera, linear_pose(*few, camera), FIRST_STEPS)
        seen = _seen(points, poses)
        far = np.linalg.norm(_to_pixels(seen, camera) - pixels, axis=-1)
        close = (far <= threshold) & (seen[..., 2] > 0)
        for best in np.argsort(-close.sum(axis=1), kind="stable")[:POLISHED]:
            pose = Pose(poses.rotation[best], poses.translation[best])
            one = _polished(points, pixels, camera, threshold, Solution(pose, close[best]))
            if one is not None and (found is None or one.inliers.sum() > found.inliers.sum()):
                found = one
    return found


def _polished(
    points: Floats, pixels: Floats, camera: Camera, threshold: float, found: Solution
) -> Solution | None:
    """Choose inliers and refine on them in turn, until they stay the same."""
    for _ in range(ROUNDS):
        if found.inliers.sum() < LEAST:
            return None
        pose = refine(points[found.inliers], pixels[found.inliers], camera, found.pose)
        far = np.linalg.norm(project(points, pose, camera) - pixels, axis=1)
        depth = _seen(points, pose)[:, 2]
        inliers = (far <= threshold) & (depth > 0)
        if np.array_equal(inliers, found.inliers):
            return Solution(pose, inliers)
        found = Solution(pose, inliers)
    return found if found.inliers.sum() >= LEAST else None


def _slopes(points: Floats, pose: Pose, camera: Camera) -> Floats:
    """Compute derivatives of pixels by a small turn and a shift, (…, 2 n, 6)."""
    turned = points @ pose.rotation.swapaxes(-1, -2)
    seen = turned + pose.translation[..., None, :]
    x, y, z = np.moveaxis(seen, -1, 0)
    z = np.where(np.abs(z) < NEAR, NEAR, z)
    zero = np.zeros_like(z)
    by_place = np.stack(
        [
            np.stack([camera.fx / z, zero, -camera.fx * x / z**2], axis=-1),
            np.stack([zero, camera.fy / z, -camera.fy * y / z**2], axis=-1),
        ],
        axis=-2,
    )
    by_turn = np.cross(np.eye(3), turned[..., None, :]).swapaxes(-1, -2)
    joined = np.concatenate([by_place @ by_turn, by_place], axis=-1)
    result: Floats = joined.reshape(*points.shape[:-2], -1, 6)
    return result


def _rotation(vector: Floats) -> Floats:
    """Return the rotations (…, 3, 3) about vectors by their lengths (Rodrigues)."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    axis = vector / np.maximum(angle[..., 0], 1e-15)
    cross = np.cross(axis[..., None, :], np.eye(3)).swapaxes(-1, -2)
    result: Floats = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return result
