"""Rasteriser of meshes with a depth buffer, in NumPy.

1 / depth and barycentric coordinates are linear in a picture, so that depths are exact.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.kits.pose.mesh import Mesh
from smallfry_runtime.pnp import Camera, Pose

__all__ = ["Render", "crop_camera", "rasterise", "shade"]

Floats = NDArray[np.float64]


class Render(NamedTuple):
    """View of a mesh by a camera."""

    depth: Floats  # (height, width), metres; inf where nothing is
    triangle: NDArray[np.int64]  # (height, width); -1 where nothing is


def crop_camera(camera: Camera, crop: tuple[int, int, int], size: int) -> Camera:
    """Return the camera of a square crop that is brought to another size.

    Args:
        camera: Of the whole picture.
        crop: First column, first row and side.
        size: Pixels of the result.
    """
    x, y, side = crop
    scale = size / side
    return Camera(
        *(camera.fx * scale, camera.fy * scale),
        *((camera.cx - x + 0.5) * scale - 0.5, (camera.cy - y + 0.5) * scale - 0.5),
    )


def rasterise(mesh: Mesh, pose: Pose, camera: Camera, height: int, width: int) -> Render:
    """Draw a mesh.

    Args:
        mesh: The mesh; only triangles that face the camera are drawn.
        pose: Of the mesh.
        camera: The camera.
        height: Of the picture.
        width: Of the picture.

    Raises:
        UsageError: A part of the object is behind the camera.
    """
    seen = mesh.vertices @ pose.rotation.T + pose.translation
    if seen[:, 2].min() <= 1e-3:
        raise UsageError("an object must be before the camera: its pose has depths below 1 mm")
    u = seen[:, 0] / seen[:, 2] * camera.fx + camera.cx
    v = seen[:, 1] / seen[:, 2] * camera.fy + camera.cy
    corners = np.stack([u, v, np.ones_like(u)], axis=1)[mesh.triangles]  # (triangles, 3, 3)
    area = np.linalg.det(corners)
    facing = np.flatnonzero(area < -1e-9)  # rows go down in a picture
    weights = np.linalg.inv(corners[facing])  # barycentric = (u, v, 1) @ weights
    nearness = (weights @ (1 / seen[mesh.triangles[facing], 2])[..., None])[..., 0]
    low = np.ceil(corners[facing, :, :2].min(axis=1) - 1e-9).astype(int).clip(0)
    high = np.floor(corners[facing, :, :2].max(axis=1) + 1e-9).astype(int) + 1
    near = np.zeros((height, width))
    owner = np.full((height, width), -1, np.int64)
    for number, weight, slope, first, last in zip(
        facing, weights, nearness, low, high, strict=True
    ):
        box = np.s_[first[1] : last[1], first[0] : last[0]]
        shape = near[box].shape
        if 0 in shape:
            continue
        columns = np.arange(first[0], first[0] + shape[1])
        rows = np.arange(first[1], first[1] + shape[0])[:, None]
        inside = np.ones(shape, bool)
        for a, b, c in weight.T:
            inside &= a * columns + (b * rows + c) >= -1e-9
        closeness = slope[0] * columns + (slope[1] * rows + slope[2])
        nearer = inside & (closeness > near[box])
        near[box][nearer] = closeness[nearer]
        owner[box][nearer] = number
    depth = np.full((height, width), np.inf)
    depth[owner >= 0] = 1 / near[owner >= 0]
    return Render(depth, owner)


def shade(
    mesh: Mesh, pose: Pose, camera: Camera, render: Render, light: Floats, ambient: float
) -> Floats:
    """Compute the colours (pixels, 3) of the drawn pixels, row by row: Lambert's law and texture.

    Args:
        mesh: The mesh.
        pose: Of the mesh.
        camera: The camera.
        render: What was drawn.
        light: Direction to the light, (3,), of length 1, in the camera's frame.
        ambient: Share of light from everywhere.
    """
    rows, columns = np.nonzero(render.triangle >= 0)
    number, depth = render.triangle[rows, columns], render.depth[rows, columns]
    a, b, c = (mesh.vertices @ pose.rotation.T)[mesh.triangles].swapaxes(0, 1)
    normal = np.cross(b - a, c - a)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    bright = ambient + (1 - ambient) * np.maximum(normal @ light, 0)
    place = np.stack(
        [
            (columns - camera.cx) / camera.fx * depth,
            (rows - camera.cy) / camera.fy * depth,
            depth,
        ],
        axis=1,
    )
    own = (place - pose.translation) @ pose.rotation
    pattern = 1 + np.sin(own @ mesh.waves[:, :3].T + mesh.waves[:, 3]) @ mesh.waves[:, 4]
    result: Floats = mesh.colours[number] * (bright[number] * pattern)[:, None]
    return result
