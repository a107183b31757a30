"""Labels of a Gaussian for the task: all that the loss and the pictures need, in one row.

    code 3 | position 3 | attributes C | deviations C | importance | kept | view

Codes are rounded positions in [−1, 1]; deviations are those of the attributes over the scene, and
importances have mean 1 over the Gaussians that are kept. Those that are not have importance 0: they
are of the original's pictures alone. The view is 0 for cameras that the importance was measured
with, ½ for cameras between them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.errors import UsageError
from smallfry.kits.splats.scene import FIXED, RESTS, Scene

__all__ = ["Labels", "make_labels"]

AROUND = 9  # numbers of a row beside attributes and their deviations


class Labels:
    """Parts of rows of labels (Gaussians, columns).

    Raises:
        UsageError: They are none.
    """

    def __init__(self, rows: Tensor) -> None:
        columns = (rows.shape[-1] - AROUND) // 2
        fits = rows.ndim == 2 and rows.is_floating_point() and columns - FIXED in RESTS
        if not fits or rows.shape[1] != 2 * columns + AROUND:
            raise UsageError(
                "the task splats needs a scene to learn: --data splats-torus, splats-gyroid or "
                "splats-hills, or --data.name splats-scene --data.root SCENE.ply"
            )
        self.rows, self.columns = rows, columns

    def _part(self, start: int, stop: int) -> Tensor:
        return self.rows[:, start:stop]

    @property
    def codes(self) -> Tensor:
        """Rounded positions in [−1, 1], (n, 3)."""
        return self._part(0, 3)

    @property
    def positions(self) -> Tensor:
        """Positions, (n, 3)."""
        return self._part(3, 6)

    @property
    def attributes(self) -> Tensor:
        """Attributes before activation, (n, columns)."""
        return self._part(6, 6 + self.columns)

    @property
    def deviations(self) -> Tensor:
        """Standard deviations of the attributes over the scene, (n, columns), all rows equal."""
        return self._part(6 + self.columns, 6 + 2 * self.columns)

    @property
    def importance(self) -> Tensor:
        """Weights of the loss, (n,)."""
        return self.rows[:, -3]

    @property
    def kept(self) -> Tensor:
        """Marks of the Gaussians that are kept, (n,), bool."""
        return self.rows[:, -2] > 0

    @property
    def view(self) -> float:
        """Share of the angle between neighbours by which the ring of cameras is turned."""
        return float(self.rows[0, -1]) if len(self.rows) else 0.0

    def scene(self, attributes: Tensor | None = None) -> Scene:
        """Return all Gaussians, or those that are kept with other attributes."""
        if attributes is None:
            return Scene(self.positions.numpy().copy(), self.attributes.numpy().copy())
        kept = self.kept
        return Scene(self.positions[kept].numpy(), attributes[kept].float().numpy())


def make_labels(
    scene: Scene,
    codes: NDArray[np.floating],
    importance: NDArray[np.float64],
    kept: NDArray[np.bool_],
    view: float,
) -> Tensor:
    """Build the rows of a scene's Gaussians, float32."""
    deviations = scene.attributes[kept].astype(np.float64).std(0).clip(1e-4)
    weights = np.where(kept, importance, 0)
    weights = weights / weights[kept].mean() if weights[kept].any() else kept.astype(np.float64)
    parts = [
        codes,
        scene.positions,
        scene.attributes,
        np.broadcast_to(deviations, scene.attributes.shape),
        np.stack([weights, kept, np.full(len(scene), view)], 1),
    ]
    return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))
