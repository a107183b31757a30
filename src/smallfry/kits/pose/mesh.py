"""Closed meshes of objects: generated ones, files, and keypoints on their surface.

Lengths are metres. Keypoints are chosen by farthest-point sampling from the centre of the
bounding box, and have as neighbours the nearest ones, themselves included (Lian &
Ling, ICCV 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry.data.philox import generator
from smallfry.errors import DataError

__all__ = [
    "Mesh",
    "farthest_points",
    "generated_mesh",
    "keypoints",
    "nearest_neighbours",
    "normalised",
    "read_mesh",
    "require_closed",
]

Floats = NDArray[np.float64]
SPACING = 0.006  # metres between points of the surface, of which keypoints are chosen
SIDES = 16  # of cylinders
WAVES = 3  # of textures
VERSION = 1  # changes whenever the objects of a seed do
LARGEST = 200_000  # triangles of a file
WIDEST = 2.0  # metres of a file's object: more would be millimetres, and points without number


@dataclass(frozen=True)
class Mesh:
    """Triangles of a surface.

    Args:
        vertices: (vertices, 3), metres.
        triangles: (triangles, 3), int64, counter-clockwise from outside.
        colours: (triangles, 3), 0 to 1.
        surface: (points, 3) on the outer surface.
        waves: Texture (waves, 5): three frequencies in radians a metre, phase and strength; none
            of files, which have the colours of their faces.
    """

    vertices: Floats
    triangles: NDArray[np.int64]
    colours: Floats
    surface: Floats
    waves: Floats = field(default_factory=lambda: np.zeros((0, 5)))


def farthest_points(points: Floats, count: int) -> NDArray[np.int64]:
    """Choose points that are far from one another and from the centre of their bounding box.

    Each has the largest distance to the centre and all points before; of equals, the first counts.

    Args:
        points: (points, 3).
        count: How many to choose.

    Raises:
        DataError: There are fewer points.
    """
    if len(points) < count:
        raise DataError(f"{count} keypoints were asked for, and the surface has {len(points)}")
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    distance = np.square(points - centre).sum(axis=1)
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(axis=1))
    return np.array(chosen, np.int64)


def normalised(points: Floats) -> Floats:
    """Subtract the mean, and divide by the largest norm."""
    moved = points - points.mean(axis=0)
    result: Floats = moved / np.linalg.norm(moved, axis=1).max()
    return result


def nearest_neighbours(points: Floats, count: int) -> NDArray[np.int64]:
    """Find the nearest points of each, itself first, (points, count)."""
    between = np.square(points[:, None] - points[None]).sum(axis=-1)
    return np.argsort(between, axis=1, kind="stable")[:, :count]


def keypoints(mesh: Mesh, count: int) -> Floats:
    """Choose keypoints of a mesh, (count, 3), to the hundredth of a millimetre."""
    chosen: Floats = mesh.surface[farthest_points(mesh.surface, count)]
    return np.round(chosen, 5)


def generated_mesh(seed: int) -> Mesh:
    """Build an object of three to six boxes, cylinders and wedges, without symmetry.

    Its largest extent is 8 to 15 cm. Surface points inside another part are left out.
    """
    random = generator(0x9E3779B9 + VERSION, seed)
    parts: list[tuple[Floats, NDArray[np.int64]]] = []
    centre = np.zeros(3)
    for _ in range(int(random.integers(3, 7))):
        size = random.uniform(0.3, 1.0, 3)
        made = (_box, _cylinder, _wedge)[int(random.integers(3))]()
        parts.append((made[0] * size / 2 @ _turn(random).T + centre, made[1]))
        corner = parts[-1][0]
        centre = corner[int(random.integers(len(corner)))]
    everything = np.concatenate([vertices for vertices, _ in parts])
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = random.uniform(0.08, 0.15) / (high - low).max()
    parts = [((vertices - (low + high) / 2) * scale, faces) for vertices, faces in parts]
    surface = [
        _surface(vertices, faces)[~_inside_others(_surface(vertices, faces), parts, number)]
        for number, (vertices, faces) in enumerate(parts)
    ]
    starts = np.cumsum([0, *(len(vertices) for vertices, _ in parts)])
    triangles = np.concatenate(
        [faces + start for (_, faces), start in zip(parts, starts, strict=False)]
    )
    tints = random.uniform(0.15, 1.0, (len(parts), 3))
    colours = np.concatenate(
        [
            np.clip(tint * random.uniform(0.7, 1.3, (len(faces), 1)), 0, 1)
            for tint, (_, faces) in zip(tints, parts, strict=True)
        ]
    )
    vertices = np.concatenate([vertices for vertices, _ in parts])
    outer = np.unique(np.concatenate(surface), axis=0)
    return Mesh(vertices, triangles, colours, outer, _waves(random))


def read_mesh(file: Path, scale: float = 1.0) -> Mesh:
    """Read a closed mesh from a PLY, OBJ or STL file, through trimesh.

    One whose triangles are all wound the other way, so that its volume is negative, is turned.

    Args:
        file: The file.
        scale: Metres of a unit; 0.001 for files in millimetres.

    Raises:
        DataError: Not such a file, a mesh that isn't closed, or one of more than two metres.
    """
    import trimesh

    try:
        read: Any = trimesh.load(file, force="mesh", process=True)
        vertices = np.asarray(read.vertices, np.float64) * scale
        triangles = np.asarray(read.faces, np.int64)
    except Exception as error:  # of any of trimesh's readers, given any file
        raise DataError(f"{file}: trimesh can't read it as a mesh ({error})") from error
    if not 4 <= len(triangles) <= LARGEST:
        raise DataError(f"{file}: has {len(triangles)} triangles; 4 to {LARGEST:,} can be drawn")
    require_closed(vertices, triangles, str(file))
    if (widest := float(np.ptp(vertices, axis=0).max())) > WIDEST:
        raise DataError(
            f"{file}: its object is {widest:g} metres wide, and {WIDEST:g} are the most: is its "
            "unit a millimetre? Set data.options.millimetres, or scale it"
        )
    a, b, c = vertices[triangles].swapaxes(0, 1)
    if (np.cross(a, b) * c).sum() < 0:  # six times the volume
        triangles = triangles[:, ::-1]
    colours = np.full((len(triangles), 3), 0.6)
    kind = getattr(read.visual, "kind", None)
    if kind in ("face", "vertex"):
        colours = np.asarray(read.visual.face_colors, np.float64)[:, :3] / 255
    surface = np.unique(_surface(vertices, triangles), axis=0)
    return Mesh(vertices, triangles, colours, surface)


def require_closed(vertices: Floats, triangles: NDArray[np.int64], where: str) -> None:
    """Refuse a mesh with an edge that isn't shared by two triangles of opposite direction.

    Vertices at one place count as one.

    Raises:
        DataError: The mesh isn't closed, or a corner is not a vertex.
    """
    if triangles.min() < 0 or triangles.max() >= len(vertices) or not np.isfinite(vertices).all():
        raise DataError(f"{where}: a triangle's corner is not among its {len(vertices)} vertices")
    _, same = np.unique(vertices, axis=0, return_inverse=True)
    corners = same.reshape(-1)[triangles]
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    code = edges[:, 0] * len(vertices) + edges[:, 1]
    back = edges[:, 1] * len(vertices) + edges[:, 0]
    one, times = np.unique(code, return_counts=True)
    other, times_back = np.unique(back, return_counts=True)
    if not (np.array_equal(one, other) and np.array_equal(times, times_back)):
        count = len(np.setxor1d(one, other))
        raise DataError(
            f"{where}: the mesh is not closed: {count} edges belong to one triangle alone, or "
            "neighbours are wound differently; fill its holes, such as with trimesh's fill_holes"
        )


def _surface(vertices: Floats, triangles: NDArray[np.int64]) -> Floats:
    """Spread points over triangles, corners included, some millimetres apart."""
    found = []
    for a, b, c in vertices[triangles]:
        longest = max(np.linalg.norm(b - a), np.linalg.norm(c - b), np.linalg.norm(a - c))
        steps = max(1, int(np.ceil(longest / SPACING)))
        i, j = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij")
        kept = i + j <= steps
        found.append(a + (b - a) * i[kept][:, None] / steps + (c - a) * j[kept][:, None] / steps)
    return np.round(np.concatenate(found), 9)


def _inside_others(
    points: Floats, parts: list[tuple[Floats, NDArray[np.int64]]], own: int
) -> NDArray[np.bool_]:
    """Mark points in the inside of another part; all parts are convex."""
    inside = np.zeros(len(points), bool)
    for number, (vertices, faces) in enumerate(parts):
        if number != own:
            a, b, c = vertices[faces].swapaxes(0, 1)
            normal = np.cross(b - a, c - a)
            inside |= ((points @ normal.T - (a * normal).sum(axis=1)) < 0).all(axis=1)
    return inside


def _turn(random: np.random.Generator) -> Floats:
    axis, _ = np.linalg.qr(random.normal(size=(3, 3)))
    result: Floats = axis * np.sign(np.linalg.det(axis))
    return result


def _waves(random: np.random.Generator) -> Floats:
    frequencies = random.normal(0, 120, (WAVES, 3))
    phases = random.uniform(0, 2 * np.pi, (WAVES, 1))
    result: Floats = np.concatenate(
        [frequencies, phases, random.uniform(0.1, 0.25, (WAVES, 1))], axis=1
    )
    return result


def _box() -> tuple[Floats, NDArray[np.int64]]:
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return corners, _fans(quads)


def _wedge() -> tuple[Floats, NDArray[np.int64]]:
    corners = np.array([[x, y, z] for x in (-1, 1) for y, z in ((-1, -1), (1, -1), (-1, 1))], float)
    return corners, _fans([(0, 2, 1), (3, 4, 5), (0, 1, 4, 3), (0, 3, 5, 2), (1, 2, 5, 4)])


def _cylinder() -> tuple[Floats, NDArray[np.int64]]:
    angle = 2 * np.pi * np.arange(SIDES) / SIDES
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    low = np.concatenate([ring, np.full((SIDES, 1), -1.0)], axis=1)
    high = np.concatenate([ring, np.full((SIDES, 1), 1.0)], axis=1)
    sides = [(i, (i + 1) % SIDES, (i + 1) % SIDES + SIDES, i + SIDES) for i in range(SIDES)]
    caps = [tuple(range(SIDES))[::-1], tuple(range(SIDES, 2 * SIDES))]
    return np.concatenate([low, high]), _fans([*sides, *caps])


def _fans(polygons: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    """Divide polygons into triangles from their first corner."""
    return np.array(
        [(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)], np.int64
    )
