"""Floor and obstacles seen from a camera at a known height: masks, and depth in metres.

A camera h metres above the floor, pitched down by θ and rolled by ρ, sees the floor at pixel (u, v)
at the depth Z along its optical axis,

    Z = h / (y cos θ + sin θ),   y = ((v − c_y) cos ρ + (u − c_x) sin ρ) / f

where the denominator is positive, below the horizon. So pixels of the floor give the scale of any
relative depth r: Z ≈ s r, or 1 / Z ≈ a r + b for networks of affine-invariant inverse depth.

The task is that of Mocanu et al., arXiv 2510.16624; the equations are geometry of pinhole cameras,
not theirs. Without PyTorch.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import UsageError
from smallfry_runtime.values import is_number

__all__ = [
    "AdaptiveScale",
    "Camera",
    "Scale",
    "Settings",
    "clean_floor",
    "decode",
    "ground_depth",
    "metric_scale",
]

Floats = NDArray[np.float64]
FLOOR, OBSTACLE = "floor", "obstacle"
FEWEST = 0.02  # share of an image's pixels on clean floor that a scale needs
FEWEST_AFFINE = 200  # pixels that the inverse-affine model needs
SPAN = 1.5  # ratio of inverse depths, 90 % over 10 % quantile, that the inverse-affine model needs
FARTHEST = 100.0  # metres
NEIGHBOURS = 7  # of the 3×3 around a pixel that are floor where it is clean
HUBER, ROUNDS = 1.345 * 1.4826, 10
THIRDS = ("left", "middle", "right")


@dataclass(frozen=True)
class Camera:
    """Pinhole camera above a plane floor.

    Args:
        focal: Focal length in pixels.
        height: Above the floor, in metres.
        cx: Column of the optical axis, in pixels; pixel (0, 0) has its centre at (0, 0).
        cy: Row of the optical axis.
        pitch: Degrees downwards.
        roll: Degrees; the camera's right side dips where it is positive.

    Raises:
        UsageError: No focal length, height or centre, or one that is impossible.
    """

    focal: float
    height: float
    cx: float
    cy: float
    pitch: float = 0.0
    roll: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"camera.{each.name} is a number, got {value!r}")
            if not is_number(value):
                raise UsageError(f"camera.{each.name} is a finite number, got {value!r}")
        if not self.focal > 0 or not self.height > 0:
            raise UsageError(
                "camera.focal (pixels) and camera.height (metres) are positive, got "
                f"{self.focal:g} and {self.height:g}"
            )
        if max(abs(self.pitch), abs(self.roll)) >= 90:
            raise UsageError("camera.pitch and camera.roll are degrees between -90 and 90")

    @classmethod
    def of_view(cls, shape: tuple[int, int], view: float, height: float, pitch: float) -> "Camera":
        """Create a camera from its horizontal angle of view, with the axis in the middle.

        Args:
            shape: Height and width of images.
            view: Degrees from the left to the right edge.
            height: As of ``Camera``.
            pitch: As of ``Camera``.
        """
        rows, columns = shape
        focal = columns / 2 / math.tan(math.radians(view) / 2)
        return cls(focal, height, (columns - 1) / 2, (rows - 1) / 2, pitch)


class Scale(NamedTuple):
    """Metric scale of a relative depth: Z = a r, or 1 / Z = a r + b of the inverse-affine model."""

    a: float
    b: float
    pixels: int  # of clean floor
    residual: float  # median of |Z - Z of the floor| in metres
    model: Literal["scale", "inverse_affine"]

    def depth(self, relative: NDArray[Any]) -> Floats:
        """Compute the depth in metres, at most 100."""
        if self.model == "scale":
            return np.minimum(self.a * np.asarray(relative, np.float64), FARTHEST)
        return np.asarray(1 / np.maximum(self.a * relative + self.b, 1 / FARTHEST))


def ground_depth(camera: Camera, shape: tuple[int, int]) -> Floats:
    """Compute the depth of the floor at each pixel, (height, width); infinity above the horizon."""
    below = _below(camera, shape)
    depth = np.full(shape, np.inf)
    np.divide(camera.height, below, out=depth, where=below > 0)
    return depth


def _below(camera: Camera, shape: tuple[int, int]) -> Floats:
    """Compute y cos θ + sin θ: metres downwards for each metre of depth."""
    pitch, roll = math.radians(camera.pitch), math.radians(camera.roll)
    rows = (np.arange(shape[0], dtype=np.float64) - camera.cy) / camera.focal
    columns = (np.arange(shape[1], dtype=np.float64) - camera.cx) / camera.focal
    down = rows[:, None] * math.cos(roll) + columns * math.sin(roll)
    return down * math.cos(pitch) + math.sin(pitch)


def clean_floor(floor: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep pixels of the floor whose 3×3 neighbourhood has 7 of them; pixels outside have none."""
    padded = np.pad(floor.astype(np.int64), 1)
    rows, columns = floor.shape
    count = sum(padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3))
    return floor & (np.asarray(count) >= NEIGHBOURS)


def metric_scale(
    relative: NDArray[Any],
    floor: NDArray[np.bool_],
    camera: Camera,
    model: Literal["scale", "inverse_affine"] = "scale",
) -> Scale | None:
    """Fit the scale of a relative depth on the floor.

    The inverse-affine fit (Huber's weights, ten rounds) is taken only where its slope is positive
    and the floor in view is large and deep enough to determine it. Elsewhere ``1 / relative`` has
    its median scale: the floor alone decides nothing more.

    Args:
        relative: Relative depth (height, width); for ``inverse_affine`` relative inverse depth.
        floor: Pixels of the floor, (height, width), bool; those without floor around are left out.
        camera: The camera.
        model: ``scale`` or ``inverse_affine``.

    Returns:
        The scale; None where less than 2 % of the image is clean floor.

    Raises:
        UsageError: Another model, or arrays of unlike shapes.
    """
    if model not in ("scale", "inverse_affine"):
        raise UsageError(f"model is scale or inverse_affine, not '{model}'")
    values = np.asarray(relative, np.float64)
    if values.shape != floor.shape or values.ndim != 2:
        raise UsageError(
            f"relative depth and floor are (height, width) of one image, got {values.shape} and "
            f"{floor.shape}"
        )
    plane = ground_depth(camera, (values.shape[0], values.shape[1]))
    used = clean_floor(np.asarray(floor, bool)) & np.isfinite(plane) & (plane <= FARTHEST)
    used &= np.isfinite(values) & (values > 0)
    count = int(used.sum())
    if count < FEWEST * values.size:
        return None
    depth, r = plane[used], values[used]
    if model == "inverse_affine":
        found = _inverse_affine(r, 1 / depth)
        if found is not None:
            return _with_residual(Scale(*found, count, 0.0, model), r, depth)
        slope = float(np.median(1 / (depth * r)))
        return _with_residual(Scale(slope, 0.0, count, 0.0, model), r, depth)
    return _with_residual(Scale(float(np.median(depth / r)), 0.0, count, 0.0, model), r, depth)


def _with_residual(scale: Scale, relative: Floats, depth: Floats) -> Scale:
    return scale._replace(residual=float(np.median(np.abs(scale.depth(relative) - depth))))


def _inverse_affine(r: Floats, inverse: Floats) -> tuple[float, float] | None:
    """Fit inverse = a r + b by iteratively reweighted least squares; None if it is not sure."""
    low, high = np.quantile(inverse, (0.1, 0.9))
    if len(r) < FEWEST_AFFINE or high < SPAN * low:
        return None
    weights = np.ones_like(r)
    a = b = 0.0
    for _ in range(ROUNDS):
        total = weights.sum()
        mean_r, mean_i = (weights @ r) / total, (weights @ inverse) / total
        spread = weights @ (r - mean_r) ** 2
        if not spread > 0:
            return None
        a = float(weights @ ((r - mean_r) * (inverse - mean_i)) / spread)
        b = float(mean_i - a * mean_r)
        error = np.abs(inverse - a * r - b)
        bound = HUBER * float(np.median(error))  # for residuals around zero, MAD is their median
        weights = np.minimum(1.0, bound / np.maximum(error, 1e-300)) if bound > 0 else weights
    return (a, b) if a > 0 else None


class AdaptiveScale:
    """Scale over time: the median of the last five, kept where a view has too little floor."""

    def __init__(self) -> None:
        self.last: deque[Scale] = deque(maxlen=5)

    def update(
        self, relative: NDArray[Any], floor: NDArray[np.bool_], camera: Camera
    ) -> Scale | None:
        """Take a view in, and return the scale now; None as long as none had enough floor."""
        found = metric_scale(relative, floor, camera)
        if found is not None:
            self.last.append(found)
        if not self.last:
            return None
        ordered = sorted(self.last, key=lambda scale: scale.a)
        return ordered[len(ordered) // 2]


@dataclass(frozen=True)
class Settings:
    """Settings of decoding.

    Args:
        camera: Settings of ``Camera``: with them, distances of obstacles are measured.
        mask: Add the mask, as class numbers by row.
    """

    camera: Camera | None = None
    mask: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> "Settings":
        """Read settings.

        Raises:
            UsageError: One that is not there, or a camera without its intrinsics.
        """
        given = dict(settings or {})
        camera, mask = given.pop("camera", None), given.pop("mask", False)
        if given:
            raise UsageError(
                f"decoding has the settings camera and mask, not '{next(iter(given))}'"
            )
        if not isinstance(mask, bool):
            raise UsageError(f"mask is true or false, got {mask!r}")
        return cls(None if camera is None else camera_of(camera), mask)


def camera_of(values: Any) -> Camera:
    """Create a camera from a mapping.

    Raises:
        UsageError: A setting that is not there, or one that is missing.
    """
    known = [each.name for each in fields(Camera)]
    if not isinstance(values, Mapping) or not {*values} <= {*known}:
        raise UsageError(f"camera has the settings {', '.join(known)}, got {values!r}")
    missing = [name for name in ("focal", "height", "cx", "cy") if name not in values]
    if missing:
        raise UsageError(
            f"camera has no {', '.join(missing)}: without its focal length, centre (pixels) and "
            "height (metres) nothing in an image has a length"
        )
    return Camera(**values)


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (images, classes, height, width).

    Args:
        outputs: The logits.
        classes: Their names.
        settings: See ``Settings``.

    Returns:
        For each image the ``shares`` of the classes in its pixels. With a camera, ``obstacles``:
        metres along the optical axis to the nearest obstacle in the left, middle and right third,
        measured at its foot on the floor, None where no foot is in view. With ``mask``, the class
        number of each pixel, row by row.

    Raises:
        UsageError: A setting that is not there, or classes without floor and obstacle.
    """
    chosen = Settings.of(settings)
    if chosen.camera is not None and not {FLOOR, OBSTACLE} <= {*classes}:
        raise UsageError("distances need the classes floor and obstacle")
    return [_answer(labels, classes, chosen) for labels in outputs.argmax(axis=1)]


def _answer(
    labels: NDArray[np.int64], classes: Sequence[str], settings: Settings
) -> dict[str, Any]:
    counts = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    found: dict[str, Any] = {"shares": dict(zip(classes, counts.tolist(), strict=True))}
    if settings.camera is not None:
        found["obstacles"] = _feet(labels, classes, settings.camera)
    if settings.mask:
        found["mask"] = labels.tolist()
    return found


def _feet(
    labels: NDArray[np.int64], classes: Sequence[str], camera: Camera
) -> dict[str, float | None]:
    """Measure the nearest foot of an obstacle, with floor right below it, in each third."""
    floor, obstacle = (labels == list(classes).index(name) for name in (FLOOR, OBSTACLE))
    feet = np.zeros(labels.shape, bool)
    feet[1:] = obstacle[:-1] & floor[1:]
    shape = (labels.shape[0], labels.shape[1])
    depth = np.where(feet, ground_depth(camera, shape), np.inf)
    nearest = [float(np.min(part, initial=np.inf)) for part in np.array_split(depth, 3, axis=1)]
    return {
        name: round(value, 3) if math.isfinite(value) else None
        for name, value in zip(THIRDS, nearest, strict=True)
    }
