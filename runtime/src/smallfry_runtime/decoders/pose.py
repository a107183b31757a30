"""Pose of an object from the codes of its keypoints: cells, their centres in the picture, PnP.

A keypoint's cell is x = ⌊(u − x₀) / q⌋ of a crop from column x₀, with cells of q = side / cells
pixels; y likewise. Its bits are most significant first. It is read as the centre of the cell,
u = x₀ + (x + ½) q: the corner would be off by half a cell. Without PyTorch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import chosen_settings
from smallfry_runtime.errors import UsageError
from smallfry_runtime.pnp import LEAST, Camera, Pose, solve
from smallfry_runtime.values import is_number

__all__ = ["Settings", "cells_of", "decode", "estimate", "places"]

Floats = NDArray[np.float64]
ROUGH = 2.0  # cells, and pixels at least, between a projection and an inlier
TRIES = 150


@dataclass(frozen=True)
class Settings:
    """Settings of decoding.

    Args:
        camera: fx, fy, cx and cy of the whole picture in pixels; the centre of its first pixel is
            at (0, 0).
        crop: First column, first row and side of the square that the input shows, in the whole
            picture; one for all inputs, or a list with one for each.
        solver: ``own``, in NumPy; or ``opencv``, EPnP with its refinement, if it is installed.
        seed: Of random choices of keypoints.

    Raises:
        UsageError: A value of another form, or OpenCV is asked for and missing.
    """

    camera: Sequence[float] = ()
    crop: Sequence[Any] = ()
    solver: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        if not _numbers(self.camera, 4) or min(self.camera[:2]) <= 0:
            raise UsageError(
                "a pose needs the camera's intrinsics: set camera to [fx, fy, cx, cy] in pixels of "
                f"the whole picture, with fx and fy above 0; got {self.camera!r}"
            )
        several = _is_list(self.crop) and all(map(_is_list, self.crop))
        crops = self.crop if several else [self.crop]
        if not crops or not all(_numbers(each, 3) and each[2] > 0 for each in crops):
            raise UsageError(
                "a pose needs the square of the picture that the input shows: set crop to "
                f"[first column, first row, side] in pixels; got {self.crop}"
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise UsageError(f"seed is a whole number from 0 to 2³¹ - 1, got {self.seed!r}")
        if self.solver not in ("own", "opencv"):
            raise UsageError(f"solver is own or opencv, got '{self.solver}'")

    def crops(self, count: int) -> Floats:
        """Return one crop for each input, (count, 3).

        Raises:
            UsageError: There are several, but not as many.
        """
        found = np.array(self.crop, float).reshape(-1, 3)
        if len(found) not in (1, count):
            raise UsageError(f"crop has {len(found)} squares for {count} inputs: give one for each")
        return np.broadcast_to(found, (count, 3))


class Estimate(NamedTuple):
    """Pose, with its number of inliers."""

    pose: Pose | None  # None if too few agree on any
    inliers: int


def decode(
    outputs: Mapping[str, NDArray[Any]],
    classes: Sequence[str],
    settings: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Decode codes to poses.

    Args:
        outputs: ``in_roi``, ``x``, ``y`` and ``points``, as the network names them.
        classes: The name of the object.
        settings: See ``Settings``; camera and crop must be given.

    Returns:
        For each input the ``object``, its ``pose`` with ``rotation`` and ``translation`` in metres
        or None, ``inliers``, and the pixels of the ``keypoints`` in the crop, None outside it.

    Raises:
        UsageError: A setting that is not there or has another form.
    """
    chosen = chosen_settings(Settings, settings)
    crops = chosen.crops(len(outputs["x"]))
    pixels = places(outputs, crops)
    inside = np.asarray(outputs["in_roi"])[:, 0] > 0
    camera = Camera(*map(float, chosen.camera))
    answers = []
    for number, (crop, found, kept) in enumerate(zip(crops, pixels, inside, strict=True)):
        cell = crop[2] / 2 ** outputs["x"].shape[1]
        points = np.asarray(outputs["points"][number], np.float64)
        one = estimate(points[kept], found[kept], camera, float(cell), chosen.solver, chosen.seed)
        answers.append(_to_dict(classes[0], one, found, kept))
    return answers


def cells_of(bits: NDArray[Any]) -> NDArray[np.int64]:
    """Return cells (…, points) of logits of bits (…, bits, points), most significant first."""
    worth = 2 ** np.arange(bits.shape[-2])[::-1, None]
    cells: NDArray[np.int64] = ((np.asarray(bits) > 0) * worth).sum(axis=-2)
    return cells


def places(outputs: Mapping[str, NDArray[Any]], crops: Floats) -> Floats:
    """Return the pixels (images, points, 2) of the centres of the keypoints' cells."""
    cells = np.stack([cells_of(outputs["x"]), cells_of(outputs["y"])], axis=-1)
    side = crops[:, None, 2:] / 2 ** outputs["x"].shape[1]
    result: Floats = crops[:, None, :2] + (cells + 0.5) * side
    return result


def estimate(
    points: Floats, pixels: Floats, camera: Camera, cell: float, solver: str = "own", seed: int = 0
) -> Estimate:
    """Estimate a pose from keypoints in the crop.

    Args:
        points: (n, 3), metres.
        pixels: (n, 2).
        camera: The camera.
        cell: Side of a cell in pixels.
        solver: ``own`` or ``opencv``.
        seed: Of the random choices.

    Raises:
        UsageError: OpenCV is not installed.
    """
    threshold = max(ROUGH, ROUGH * cell)
    if len(points) < LEAST:
        return Estimate(None, 0)
    if solver == "opencv":
        return _by_opencv(points, pixels, camera, threshold, seed)
    found = solve(points, pixels, camera, threshold, seed)
    return Estimate(None, 0) if found is None else Estimate(found.pose, int(found.inliers.sum()))


def _by_opencv(
    points: Floats, pixels: Floats, camera: Camera, threshold: float, seed: int
) -> Estimate:
    try:
        import cv2
    except ImportError as error:
        raise UsageError(
            "solver opencv needs OpenCV: pip install opencv-python-headless, or take own"
        ) from error
    matrix = np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1.0]])
    cv2.setRNGSeed(seed)
    try:
        ok, turn, shift, inliers = cv2.solvePnPRansac(
            points,
            pixels,
            matrix,
            None,
            iterationsCount=TRIES,
            reprojectionError=threshold,
            flags=cv2.SOLVEPNP_EPNP,
        )
    except cv2.error:  # of degenerate points
        return Estimate(None, 0)
    if not ok or inliers is None or len(inliers) < LEAST:
        return Estimate(None, 0)
    kept = inliers[:, 0]
    turn, shift = cv2.solvePnPRefineLM(points[kept], pixels[kept], matrix, None, turn, shift)
    rotation = np.asarray(cv2.Rodrigues(turn)[0], np.float64)
    return Estimate(Pose(rotation, np.asarray(shift, np.float64)[:, 0]), len(kept))


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)


def _numbers(values: Any, count: int) -> bool:
    if not _is_list(values) or len(values) != count:
        return False
    return all(map(is_number, values))


def _to_dict(
    name: str, found: Estimate, pixels: Floats, inside: NDArray[np.bool_]
) -> dict[str, Any]:
    pose = found.pose
    return {
        "object": name,
        "pose": None
        if pose is None
        else {"rotation": pose.rotation.tolist(), "translation": pose.translation.tolist()},
        "inliers": found.inliers,
        "keypoints": [
            place.tolist() if kept else None for place, kept in zip(pixels, inside, strict=True)
        ],
    }
