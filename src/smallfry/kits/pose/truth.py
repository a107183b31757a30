"""Truth of a picture as one row of numbers, and the codes that follow from it.

R (9), t (3), fx fy cx cy (4), crop x y side (3), symmetric (1), keypoints (1), then the
keypoints' pixels in the whole picture, and two masks of the crop's cells: what is seen, and all
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.errors import DataError
from smallfry_runtime.pnp import Camera, Pose

__all__ = ["Codes", "Truth", "codes", "pack", "unpack"]

HEAD = 21


class Truth(NamedTuple):
    """Truth of pictures, batch first."""

    rotation: Tensor  # (batch, 3, 3)
    translation: Tensor  # (batch, 3), metres
    camera: Tensor  # (batch, 4): fx, fy, cx, cy in pixels of the whole picture
    crop: Tensor  # (batch, 3): first column, first row and side
    symmetric: Tensor  # (batch,), 0 or 1
    pixels: Tensor  # (batch, points, 2): columns and rows of the keypoints in the whole picture
    masks: Tensor  # (batch, 2, cells, cells), 0 or 1: what is seen of the object, and all of it

    def pose(self, number: int) -> Pose:
        """Return the pose of a picture, in float64."""
        return Pose(
            self.rotation[number].double().numpy(), self.translation[number].double().numpy()
        )


class Codes(NamedTuple):
    """True codes of keypoints."""

    inside: Tensor  # (batch, points): 1 in the crop, seen or hidden
    x: Tensor  # (batch, bits, points), most significant first
    y: Tensor  # (batch, bits, points)


def pack(
    pose: Pose,
    camera: Camera,
    crop: tuple[int, int, int],
    symmetric: bool,
    pixels: NDArray[np.float64],
    masks: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Pack the truth of a picture; see ``Truth``."""
    head = [*pose.rotation.ravel(), *pose.translation, *camera, *crop, symmetric, len(pixels)]
    return np.concatenate([head, pixels.ravel(), masks.ravel()]).astype(np.float32)


def unpack(rows: Tensor) -> Truth:
    """Unpack the truth of pictures, (batch, numbers).

    Raises:
        DataError: Rows of another form.
    """
    points = int(rows[0, HEAD - 1]) if rows.ndim == 2 and rows.shape[1] > HEAD and len(rows) else 0
    cells = round(max(0, (rows.shape[-1] - HEAD - 2 * points) / 2) ** 0.5)
    if points == 0 or rows.shape[1] != HEAD + 2 * points + 2 * cells * cells:
        raise DataError(
            "the task pose needs pictures with poses: name generated ones (--data pose-objects), "
            "or a folder in the form of BOP (--data pose-bop --data.root DIR)"
        )
    parts = torch.split(rows, [9, 3, 4, 3, 1, 1, 2 * points, 2 * cells * cells], dim=1)
    return Truth(
        parts[0].view(-1, 3, 3),
        parts[1],
        parts[2],
        parts[3],
        parts[4][:, 0],
        parts[6].view(-1, points, 2),
        parts[7].view(-1, 2, cells, cells),
    )


def codes(truth: Truth, bits: int) -> Codes:
    """Compute the codes of the true pixels; places outside the crop are of the nearest cell."""
    cell = truth.crop[:, 2] / 2**bits
    found = ((truth.pixels - truth.crop[:, None, :2]) / cell[:, None, None]).floor()
    inside = ((found >= 0) & (found < 2**bits)).all(dim=2)
    cells = found.clamp(0, 2**bits - 1).to(torch.int64)
    shifts = torch.arange(bits - 1, -1, -1, device=cells.device)[:, None, None]
    x, y = ((cells[:, None] >> shifts) & 1).to(truth.pixels.dtype).unbind(-1)
    return Codes(inside.to(truth.pixels.dtype), x, y)
