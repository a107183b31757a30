"""Poses of a split from the outputs of a network, and their errors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry.kits.pose.metrics import add, adi, diameter
from smallfry.kits.pose.truth import Truth
from smallfry_runtime.decoders.pose import Estimate, estimate, places
from smallfry_runtime.pnp import Camera

__all__ = ["FAILED", "as_arrays", "estimates", "pose_errors"]

FAILED = 10.0  # diameters, of a picture without a pose


def as_arrays(outputs: Any) -> dict[str, Any]:
    """Return the outputs as arrays by name."""
    return {name: value.detach().cpu().numpy() for name, value in outputs._asdict().items()}


def estimates(outputs: Mapping[str, Any], truth: Truth) -> list[Estimate]:
    """Estimate the poses of pictures from their codes, with the cameras and crops of the truth."""
    crops = truth.crop.double().numpy()
    pixels = places(outputs, crops)
    inside = np.asarray(outputs["in_roi"])[:, 0] > 0
    points = np.asarray(outputs["points"][0], np.float64)
    found = []
    for number, (place, kept) in enumerate(zip(pixels, inside, strict=True)):
        camera = Camera(*truth.camera[number].tolist())
        cell = float(crops[number, 2]) / 2 ** outputs["x"].shape[1]
        found.append(estimate(points[kept], place[kept], camera, cell))
    return found


def pose_errors(points: Any, truth: Truth, found: Sequence[Estimate]) -> NDArray[np.float64]:
    """Compute the errors of poses in diameters, ADD or of symmetric objects ADI, (pictures,)."""
    model = np.asarray(points, np.float64)
    size = diameter(model)
    errors = np.full(len(found), FAILED)
    for number, each in enumerate(found):
        if each.pose is not None:
            distance = adi if truth.symmetric[number] else add
            errors[number] = min(FAILED, distance(model, truth.pose(number), each.pose) / size)
    return errors
