"""Second renderer of Gaussian splats, in NumPy and SciPy, to check the kit's own.

It shares no code with the kit: it reads PLY files by itself, and takes rotations, spherical
harmonics and inverse matrices from libraries. Gaussians are laid over the whole image one by one.
"""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation
from scipy.special import expit, sph_harm_y


def read_ply(file: Path) -> dict[str, Any]:
    """Return the columns of a PLY file of float32 vertices by their names."""
    content = file.read_bytes()
    head, _, body = content.partition(b"end_header\n")
    names = [line.split()[2].decode() for line in head.splitlines() if b"property" in line]
    table = np.frombuffer(body, "<f4").reshape(-1, len(names)).astype(float)
    return dict(zip(names, table.T, strict=True))


def colours_of(columns: dict[str, Any], directions: Any) -> Any:
    """Return the colours seen in directions (n, 3) from the camera."""
    theta, phi = np.arccos(directions[:, 2]), np.arctan2(directions[:, 1], directions[:, 0])
    rest = sum(name.startswith("f_rest") for name in columns) // 3
    found = np.zeros((len(directions), 3))
    for channel in range(3):
        found[:, channel] = 0.5 + columns[f"f_dc_{channel}"] / (2 * np.sqrt(np.pi))
        orders = [(n, m) for n in (1, 2, 3) for m in range(-n, n + 1)][:rest]
        for k, (n, m) in enumerate(orders):
            wave = sph_harm_y(n, abs(m), theta, phi)
            if m:  # the library has the phase (−1)^m, which the files' convention has too
                wave = np.sqrt(2) * (wave.real if m > 0 else wave.imag)
            found[:, channel] += columns[f"f_rest_{channel * rest + k}"] * wave.real
    return np.maximum(found, 0)


def render_file(file: Path, camera: Any, background: float = 0.0) -> Any:
    """Render a PLY file from a camera (rotation, translation, focal, width, height, near)."""
    columns = read_ply(file)
    R, t, focal, width, height, near = camera
    x = np.stack([columns[axis] for axis in "xyz"], 1)
    turns = Rotation.from_quat(np.stack([columns[f"rot_{i}"] for i in (1, 2, 3, 0)], 1)).as_matrix()
    sizes = np.exp(2 * np.stack([columns[f"scale_{i}"] for i in range(3)], 1))
    covariances = np.einsum("nij,nj,nkj->nik", turns, sizes, turns)
    eye = -R.T @ t
    rays = x - eye
    colours = colours_of(columns, rays / np.linalg.norm(rays, axis=1, keepdims=True))
    opacities = expit(columns["opacity"])
    seen = rays @ R.T
    pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), 2)
    image, left = np.zeros((height, width, 3)), np.ones((height, width))
    for i in np.argsort(seen[:, 2], kind="stable"):
        px, py, z = seen[i]
        if z <= near:
            continue
        slopes = [
            np.clip(p / z, -1.3 * side / (2 * focal), 1.3 * side / (2 * focal))
            for p, side in ((px, width), (py, height))
        ]
        J = focal / z * np.array([[1, 0, -slopes[0]], [0, 1, -slopes[1]]])
        spread = J @ R @ covariances[i] @ R.T @ J.T + 0.3 * np.eye(2)
        offset = pixels - (focal * np.array([px, py]) / z + np.array([width, height]) / 2)
        power = -0.5 * np.einsum("hwi,ij,hwj->hw", offset, np.linalg.inv(spread), offset)
        alpha = np.minimum(0.99, opacities[i] * np.exp(power))
        alpha[alpha < 1 / 255] = 0
        image += (left * alpha)[:, :, None] * colours[i]
        left *= 1 - alpha
    return image + left[:, :, None] * background
