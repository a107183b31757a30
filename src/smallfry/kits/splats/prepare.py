"""Preparation of a scene for networks: pruning, positions on a grid, signs of rotations."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.kits.splats.render import Camera, importance
from smallfry.kits.splats.scene import Scene

__all__ = ["HALF", "Grid", "Prepared", "align_rotations", "prepare"]

HALF = 16  # position bits that stand for half precision
NEIGHBOURS = 8
LARGEST = 1e15  # of a position: its square is still a float32
LARGEST_HALF = 65_504  # of half precision, in which means of attributes are kept


class Grid(NamedTuple):
    """Box of a scene's positions, and the numbers to which they are rounded in it.

    With 16 bits a number is in half precision, [−1, 1]; with fewer it is one of 2^bits evenly
    spaced ones. 12 bits have half precision's largest error.
    """

    centre: tuple[float, ...]
    half_sides: tuple[float, ...]
    bits: int = 12

    @classmethod
    def of(cls, positions: NDArray[np.floating], bits: int = 12) -> "Grid":
        """Fit the box to positions (n, 3)."""
        low, high = positions.min(0).astype(np.float64), positions.max(0).astype(np.float64)
        sides = np.maximum((high - low) / 2, 1e-9)
        return cls(tuple(((low + high) / 2).tolist()), tuple(sides.tolist()), bits)

    def integers(self, positions: NDArray[np.floating]) -> NDArray[np.uint16]:
        """Round positions (n, 3) to integers, which are in the order of the positions."""
        x = (positions.astype(np.float64) - self.centre) / np.asarray(self.half_sides)
        x = x.clip(-1, 1)
        if self.bits == HALF:
            raw = x.astype(np.float16).view(np.uint16)
            halves: NDArray[np.uint16] = np.where(raw >> 15, 0xFFFF - raw, raw | 0x8000)
            return halves.astype(np.uint16)
        most = 2**self.bits - 1
        found: NDArray[np.uint16] = np.round((x + 1) / 2 * most).astype(np.uint16)
        return found

    def codes(self, integers: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return the numbers in [−1, 1] of integers, (n, 3)."""
        if self.bits == HALF:
            raw = np.where(integers >> 15, integers & 0x7FFF, 0xFFFF - integers)
            halves: NDArray[np.float32] = raw.astype(np.uint16).view(np.float16).astype(np.float32)
            return halves
        found: NDArray[np.float32] = (integers / (2**self.bits - 1) * 2 - 1).astype(np.float32)
        return found

    def positions(self, codes: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return the positions of codes, (n, 3)."""
        wide = codes * np.asarray(self.half_sides) + np.asarray(self.centre)
        found: NDArray[np.float32] = wide.astype(np.float32)
        return found


class Prepared(NamedTuple):
    """Scene before networks."""

    scene: Scene  # all Gaussians, float32, rotations of length 1 and of neighbouring signs
    importance: NDArray[np.float64]  # (Gaussians,)
    kept: NDArray[np.bool_]  # (Gaussians,)
    grid: Grid
    integers: NDArray[np.uint16]  # (Gaussians, 3); those of pruned ones are of the box's border


def prepare(
    scene: Scene, cameras: Sequence[Camera], prune: float = 0.4, bits: int = 12
) -> Prepared:
    """Measure importance, prune, round positions and align rotations.

    Args:
        scene: The scene.
        cameras: Views for the importance.
        prune: Share of the Gaussians that are left out, those of the smallest importance.
        bits: Of a position, see ``Grid``.

    Raises:
        UsageError: No camera or Gaussian, a share or bits out of range, or positions or attributes
            of absurd size.
    """
    if not cameras or not len(scene):
        raise UsageError("compression needs at least one Gaussian, and one camera for importance")
    if not 0 <= prune < 1 or not 8 <= bits <= HALF:
        raise UsageError(f"prune is 0 to below 1 and position_bits 8 to 16, got {prune} and {bits}")
    if np.abs(scene.positions).max() > LARGEST:
        raise UsageError(f"positions beyond ±{LARGEST:g} can't be compressed: leave them out")
    if np.abs(scene.attributes).max() > LARGEST_HALF:
        raise UsageError(
            f"attributes beyond ±{LARGEST_HALF:,} can't be compressed, as half precision ends "
            "there: leave their Gaussians out"
        )
    attributes = scene.attributes.astype(np.float32, copy=True)
    lengths = np.linalg.norm(attributes[:, 4:8], axis=1, keepdims=True)
    unit = np.where(lengths > 0, attributes[:, 4:8] / np.maximum(lengths, 1e-30), [1, 0, 0, 0])
    found = importance(scene, cameras)
    kept = np.ones(len(scene), bool)
    kept[np.argsort(found, kind="stable")[: int(prune * len(scene))]] = False
    attributes[:, 4:8] = align_rotations(scene.positions, unit)
    whole = Scene(scene.positions.astype(np.float32, copy=True), attributes)
    grid = Grid.of(whole.positions[kept], bits)
    return Prepared(whole, found, kept, grid, grid.integers(whole.positions))


def align_rotations(
    positions: NDArray[np.floating], rotations: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Choose the signs of unit quaternions, so that neighbours have a positive product.

    q and −q are one rotation, but a network can't follow both. Signs spread along the spanning
    tree of least 1 − |q·q'| in the graph of the 8 nearest neighbours. Where the field of rotations
    has no continuous signs at all, some neighbours still differ.

    Args:
        positions: (n, 3).
        rotations: (n, 4), of length 1.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, connected_components
    from scipy.sparse.csgraph import minimum_spanning_tree as spanning_tree
    from scipy.spatial import cKDTree

    count = len(positions)
    if count < 2:
        return rotations
    near = cKDTree(positions).query(positions, min(NEIGHBOURS + 1, count))[1][:, 1:]
    rows, columns = np.repeat(np.arange(count), near.shape[1]), near.ravel()
    products = np.abs((rotations[rows] * rotations[columns]).sum(1))
    edges = coo_array((1.0 + 1e-6 - products.clip(0, 1), (rows, columns)), (count, count))
    tree = spanning_tree(edges.tocsr())
    _, parts = connected_components(tree, directed=False)
    signs = np.ones(count)
    for first in np.unique(parts, return_index=True)[1]:
        order, before = breadth_first_order(tree, first, directed=False)
        for node in order[1:]:
            parent = before[node]
            product = rotations[node] @ rotations[parent]
            signs[node] = signs[parent] * (1.0 if product >= 0 else -1.0)
    return rotations * signs[:, None]
