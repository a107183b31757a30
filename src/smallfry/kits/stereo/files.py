"""Files of stereo data: views, disparities in PNG or PFM, class numbers, and calibrations."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry.errors import DataError
from smallfry_runtime.images import header

__all__ = ["read_calibration", "read_disparity", "read_labels", "read_pfm"]

Floats = NDArray[np.float64]
MOST = 64 * 2**20  # pixels of a PFM
UNLABELLED = 255
PNG_SCALE = 256  # of KITTI's disparities


def read_disparity(file: Path) -> Floats:
    """Read disparities in pixels, (height, width), 0 unknown.

    Args:
        file: A PNG of 16 bits with 256 × disparity, 0 unknown, as KITTI's; or a PFM with infinity
            where it is unknown, as Middlebury's.

    Raises:
        DataError: Another form.
    """
    if file.suffix.lower() == ".pfm":
        found = read_pfm(file)
        return np.where(np.isfinite(found) & (found > 0), found, 0.0)
    values = _raw(file)
    if values.dtype.itemsize < 2:
        raise DataError(
            f"{file}: disparities are PNGs of 16 bits with 256 × disparity, and this has 8 bits or "
            "fewer"
        )
    return values.astype(np.float64) / PNG_SCALE


def read_labels(file: Path, classes: int) -> NDArray[np.int64]:
    """Read class numbers, (height, width); 255 becomes −1, unknown.

    Raises:
        DataError: Colours, or a number without a class.
    """
    values = _raw(file).astype(np.int64)
    found = np.where(values == UNLABELLED, -1, values)
    if classes and found.max(initial=-1) >= classes:
        raise DataError(
            f"{file}: has class {found.max()}, and there are {classes} classes, from 0; 255 is "
            "for pixels without one"
        )
    return found


def read_pfm(file: Path) -> Floats:
    """Read a grey portable float map, (height, width), from the top.

    Raises:
        DataError: Another form, or another number of values than its header has.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error})") from error
    found = re.match(rb"Pf\s+(\d{1,6})\s+(\d{1,6})\s+(-?[0-9.eE+-]+)(?:\r\n|\s)", content)
    if not found:
        raise DataError(f"{file}: isn't a grey PFM, which begins with Pf, its sides and a scale")
    width, height = int(found[1]), int(found[2])
    try:
        order = "<f4" if float(found[3]) < 0 else ">f4"
    except ValueError as error:
        raise DataError(f"{file}: its scale isn't a number") from error
    if not 0 < width * height <= MOST or len(content) - found.end() != 4 * width * height:
        raise DataError(f"{file}: has not the {height}×{width} values of its header")
    values = np.frombuffer(content, order, width * height, found.end())
    return values.reshape(height, width)[::-1].astype(np.float64)


def read_calibration(file: Path) -> tuple[float, float]:
    """Read Middlebury's ``calib.txt``: focal length × baseline in pixels × metres, and the offset.

    Raises:
        DataError: ``cam0`` or ``baseline`` is missing or not above 0, or an offset is no number.
    """
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error})") from error
    found = dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
    try:
        focal = float(found["cam0"].strip("[] ").split()[0].rstrip(";"))
        scale, offset = focal * float(found["baseline"]) / 1000, float(found.get("doffs", "0"))
        if not (focal > 0 and 0 < scale < np.inf and np.isfinite(offset)):
            raise ValueError(f"got {focal:g}, {scale:g} and {offset:g}")
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"{file}: needs lines cam0=[f 0 cx; 0 f cy; 0 0 1] and baseline=millimetres, both "
            "above 0, and perhaps doffs=pixels"
        ) from error
    return scale, offset


def _raw(file: Path) -> NDArray[np.generic]:
    """Read the values of a grey PNG as they are stored."""
    header(file, str(file))  # bounded
    try:
        with Image.open(file) as image:
            values = np.asarray(image)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't be read ({error})") from error
    if values.ndim != 2:
        raise DataError(f"{file}: has colours, and one number per pixel is needed")
    return values
