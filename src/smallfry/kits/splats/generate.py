"""Generated scenes: Gaussians on the surface of a body F(x) = 0, with smooth attributes.

Points are drawn near to the surface and moved onto it by Newton's steps; then two in five are moved
below it, where hardly a camera sees them, as trained scenes have such. Each Gaussian is flat, its
thin axis along the normal; sizes, opacities, colours and their harmonics are sums of sines of the
position.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError, nearest
from smallfry.kits.splats.render import Y0
from smallfry.kits.splats.scene import RESTS, Scene

__all__ = ["BODIES", "generate", "generated_attributes"]

Array = NDArray[np.float64]
Body = Callable[[Array], Array]
VERSION = 1  # changes whenever the scene of a seed does
DEGREE = 3
BAND = 0.04  # distance from the surface within which points are drawn
STEP = 1e-5  # of differences
AREA = 0.06  # scale of a Gaussian where 4,000 cover a body, in both flat directions
INSIDE, DEEPEST = 0.4, 0.15  # share of Gaussians below the surface, and how far at most
THIN = 0.012


def _torus(x: Array) -> Array:
    """Measure the distance to a torus of radii 1 and 0.35 around a sphere of radius 0.45."""
    rings = np.hypot(np.hypot(x[:, 0], x[:, 2]) - 1, x[:, 1]) - 0.35
    found: Array = np.minimum(rings, np.linalg.norm(x, axis=1) - 0.45)
    return found


def _gyroid(x: Array) -> Array:
    """Measure the distance to one side of a gyroid in a ball of radius 1.1."""
    u = 3.2 * x
    wave = (np.sin(u) * np.cos(np.roll(u, -1, axis=1))).sum(1) / 3.2
    found: Array = np.maximum(wave, np.linalg.norm(x, axis=1) - 1.1)
    return found


def _hills(x: Array) -> Array:
    """Measure the distance to a round plate with hills, thickness 0.16 and radius 1.2."""
    height = 0.25 * np.sin(3.1 * x[:, 0] + 0.4) * np.cos(2.7 * x[:, 2]) + 0.1 * np.sin(5 * x[:, 2])
    edge = np.hypot(x[:, 0], x[:, 2]) - 1.2
    found: Array = np.maximum(np.abs(x[:, 1] - height) - 0.08, edge)
    return found


BODIES: Final[Mapping[str, Body]] = {"torus": _torus, "gyroid": _gyroid, "hills": _hills}


def gradient(body: Body, x: Array) -> Array:
    """Compute the gradient of F by central differences, (n, 3)."""
    steps = STEP * np.eye(3)
    return np.stack([(body(x + step) - body(x - step)) / (2 * STEP) for step in steps], 1)


def surface(body: Body, count: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Draw points on a surface, nearly uniformly in its area, with their outer normals."""
    found: list[Array] = []
    while sum(map(len, found)) < count:
        x = random.uniform(-1.5, 1.5, (8 * count, 3))
        for _ in range(3):  # of the first look the distance counts, of the others the place
            slopes = gradient(body, x)
            lengths = np.linalg.norm(slopes, axis=1).clip(1e-6)
            distances = body(x) / lengths
            near = np.abs(distances) < BAND
            x, slopes = x[near], slopes[near]
            x = x - (distances / lengths)[near, None] * slopes
        found.append(x[np.abs(body(x)) < 1e-3])
    points = np.concatenate(found)[:count]
    normals = gradient(body, points)
    return points, normals / np.linalg.norm(normals, axis=1, keepdims=True)


def waves(x: Array, outputs: int, frequency: float, stream: int) -> Array:
    """Compute smooth functions of the position, of mean square near ½: (n, outputs)."""
    random = np.random.default_rng([stream, outputs])
    k = random.normal(0, frequency, (3, 3, outputs))
    phases = random.uniform(0, 2 * np.pi, (3, outputs))
    sines = np.stack([np.sin(x @ k[i] + phases[i]) for i in range(3)])
    found: Array = sines.sum(0) / math.sqrt(3)
    return found


def generated_attributes(x: Array, normals: Array, scale: float = 1.0) -> Array:
    """Compute the attributes of Gaussians at points of a surface, (n, 56).

    Args:
        x: (n, 3).
        normals: (n, 3), unit vectors.
        scale: Factor of all sizes.
    """
    sizes = np.log(scale * np.array([AREA, AREA, THIN])) + 0.25 * waves(x, 3, 2.0, 1)
    opacities = 2 + 0.8 * waves(x, 1, 2.5, 2)
    dc = 0.25 / Y0 * waves(x, 3, 2.5, 3)
    rest = 0.06 / Y0 * waves(x, RESTS[DEGREE], 2.0, 4)
    return np.concatenate([opacities, sizes, _turns(normals), dc, rest], 1)


def _turns(normals: Array) -> Array:
    """Return quaternions that turn z to unit vectors on the shortest way, (n, 4)."""
    n = np.where(normals[:, 2:] < 0, -normals, normals)  # either side of a flat one is the same
    turns = np.stack([1 + n[:, 2], -n[:, 1], n[:, 0], np.zeros(len(n))], 1)
    found: Array = turns / np.linalg.norm(turns, axis=1, keepdims=True)
    return found


def generate(body: str = "torus", count: int = 4000, seed: int = 0) -> Scene:
    """Generate a scene of a body, in float32.

    Args:
        body: torus, gyroid or hills.
        count: Of Gaussians. The more, the smaller each is.
        seed: Of the points.

    Raises:
        UsageError: An unknown body, or no or too many Gaussians.

    Example:
        >>> len(generate("hills", 100))
        100
    """
    if body not in BODIES:
        raise UsageError(f"unknown body '{body}'{nearest(body, BODIES)}")
    if not 1 <= count <= 1_000_000:
        raise UsageError(f"a generated scene has 1 to 1,000,000 Gaussians, not {count}")
    random = np.random.default_rng([seed, VERSION])
    points, normals = surface(BODIES[body], count, random)
    depths = random.uniform(0, DEEPEST, count) * (random.random(count) < INSIDE)
    points = points - depths[:, None] * normals
    attributes = generated_attributes(points, normals, math.sqrt(4000 / count))
    return Scene(points.astype(np.float32), attributes.astype(np.float32))
