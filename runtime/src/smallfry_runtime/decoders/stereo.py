"""Disparity and classes of every pixel, from the maps of a stereo network's exits.

Maps of an exit are enlarged bilinearly, corners not aligned, to the views' size; a disparity grows
with its map. Without PyTorch.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry_runtime.decoders import chosen_settings
from smallfry_runtime.errors import UsageError
from smallfry_runtime.values import is_number

__all__ = ["Settings", "decode", "enlarge"]

Floats = NDArray[np.float32]
VIEWS = 2
FACTORS = (16, 8, 4)
LEAST = 0.5  # pixels: points with less are too far for a depth


@dataclass(frozen=True)
class Settings:
    """Settings of decoding.

    Args:
        exit: 1, 2 or 3, coarse to fine; 0 takes the last.
        focal: Focal length in pixels of the input; with the baseline, depths are computed.
        baseline: Distance of the cameras in metres.
        offset: Added to a disparity, where the cameras' centres differ.
        sizes: Height and width of each pair, in pixels, at the top left of its frame; the answer is
            cut to it. Default: all of the frame. Of files of pictures, they are filled in.

    Raises:
        UsageError: A value out of range, or one of focal and baseline without the other.
    """

    exit: int = 0
    focal: float = 0.0
    baseline: float = 0.0
    offset: float = 0.0
    sizes: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if type(self.exit) is not int or self.exit not in (0, 1, 2, 3):
            raise UsageError(f"exit is 1, 2 or 3, or 0 for the last, got {self.exit!r}")
        values = (self.focal, self.baseline, self.offset)
        if not all(map(is_number, values)):
            raise UsageError("focal, baseline and offset are numbers")
        if min(self.focal, self.baseline) < 0 or (self.focal > 0) != (self.baseline > 0):
            raise UsageError(
                "depths need both focal, in pixels, and baseline, in metres, above 0; got "
                f"{self.focal} and {self.baseline}"
            )
        if not isinstance(self.sizes, Sequence) or not all(map(_is_size, self.sizes)):
            raise UsageError(
                f"sizes are pairs of height and width in pixels, got {str(self.sizes)[:40]}"
            )


def decode(
    outputs: Mapping[str, NDArray[Any]],
    classes: Sequence[str],
    settings: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Decode the maps of an exit.

    Args:
        outputs: ``refined16`` and ``semantics16``, and those of 8 and 4 if there are.
        classes: Names of the classes.
        settings: See ``Settings``.

    Returns:
        For each pair ``disparity_png16``, a PNG of 16 bits in base64 with 256 × disparity as in
        KITTI; ``labels_png``, one of class numbers; ``disparity``, its least, median and greatest;
        ``shares`` of the classes; and with known cameras ``depth_m``, the median of each class.

    Raises:
        UsageError: A setting that is not there, an exit that the network does not have, or not as
            many sizes as pairs.
    """
    chosen = chosen_settings(Settings, settings)
    there = [factor for factor in FACTORS if f"refined{factor}" in outputs]
    if chosen.exit > len(there):
        raise UsageError(
            f"the network has {len(there)} exits, and exit {chosen.exit} was asked for"
        )
    factor = there[chosen.exit - 1]
    disparity = enlarge(np.asarray(outputs[f"refined{factor}"])[:, None], factor)[:, 0] * factor
    labels = enlarge(np.asarray(outputs[f"semantics{factor}"]), factor).argmax(axis=1)
    sizes = chosen.sizes or [disparity.shape[1:]] * len(disparity)
    if len(sizes) != len(disparity):
        raise UsageError(f"{len(sizes)} sizes for {len(disparity)} pairs; expected one for each")
    return [
        _to_dict(one[:height, :width], label[:height, :width], classes, chosen)
        for one, label, (height, width) in zip(disparity, labels, sizes, strict=True)
    ]


def enlarge(values: NDArray[Any], factor: int) -> Floats:
    """Enlarge maps (batch, channels, height, width) bilinearly, corners not aligned."""
    for axis in (2, 3):
        count = values.shape[axis]
        places = (np.arange(count * factor) + 0.5) / factor - 0.5
        places = np.clip(places, 0, count - 1).astype(np.float32)
        low = np.floor(places).astype(int)
        shape = [1] * 4
        shape[axis] = -1
        share = (places - low).reshape(shape)
        high = np.minimum(low + 1, count - 1)
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values.astype(np.float32)


def _is_size(value: Any) -> bool:
    """Return whether a value is a height and width in pixels."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return several and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _to_dict(
    disparity: Floats, labels: NDArray[np.int64], classes: Sequence[str], settings: Settings
) -> dict[str, Any]:
    names = {number: classes[number] for number in np.unique(labels).tolist()}
    found: dict[str, Any] = {
        "disparity_png16": _png(np.clip(np.rint(disparity * 256), 0, 65535).astype(np.uint16)),
        "labels_png": _png(labels.astype(np.uint8)),
        "disparity": {
            "least": float(disparity.min()),
            "median": float(np.median(disparity)),
            "greatest": float(disparity.max()),
        },
        "shares": {name: float((labels == number).mean()) for number, name in names.items()},
    }
    if settings.focal:
        near = np.maximum(disparity + settings.offset, LEAST)
        depth = settings.focal * settings.baseline / near
        found["depth_m"] = {
            name: float(np.median(depth[labels == number])) for number, name in names.items()
        }
    return found


def _png(values: NDArray[Any]) -> str:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
