"""Inputs that are no pictures: arrays of several channels or of numbers, in files of NumPy."""

from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry_runtime.errors import DataError
from smallfry_runtime.files import open_regular
from smallfry_runtime.frames import FLOATS, Frame

__all__ = ["is_array_file", "random_inputs", "read_array"]

MAGIC = (b"\x93NUMPY", b"PK")  # of numpy.save and numpy.savez
HEADER = 2**16  # bytes of a file before its values, at most
WIDEST = 8  # bytes of a value


def read_array(
    encoded: bytes | Path | Image.Image, where: str, frame: Frame, channels: int
) -> NDArray[Any]:
    """Read an input (channels, height, width) from a file of ``numpy.save``.

    Args:
        encoded: The file, or its bytes; (height, width) will do for one channel.
        where: Its name in messages.
        frame: Size of inputs, and the type of their values.
        channels: Number of channels.

    Returns:
        Values of the type of the frame.

    Raises:
        DataError: A picture, a damaged file, or values of another shape, of another type, or that
            are not finite.
    """
    shape = frame.shape(channels)
    wanted = f"an array of {frame.values}, {'×'.join(map(str, shape))}, as numpy.save writes it"
    if isinstance(encoded, Image.Image):
        raise DataError(f"{where}: a picture, and the model takes {wanted}")
    try:
        if isinstance(encoded, Path):
            with open_regular(encoded, HEADER + WIDEST * prod(shape)) as stream:
                encoded = stream.read()
        if not is_array_file(encoded):  # which NumPy takes for a pickle
            raise ValueError("not a file of NumPy")
        found = np.load(BytesIO(encoded), allow_pickle=False)
    except Exception as error:  # a stranger's bytes raise almost anything
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["empty"])[0]
        raise DataError(f"{where}: can't be read ({reason}); expected {wanted}") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{where}: several arrays in one file; expected {wanted}")
    if found.shape != shape and (1, *found.shape) != shape:
        of = "×".join(map(str, found.shape)) or "a single value"
        if found.ndim == 1:
            of = f"a row of {of}"
        raise DataError(f"{where}: is {of}; expected {wanted}")
    fits = found.dtype.kind in "fiu" if frame.values == FLOATS else found.dtype == np.uint8
    if not fits:
        raise DataError(f"{where}: its values are {found.dtype}; expected {wanted}")
    with np.errstate(over="ignore"):  # which the next line finds
        values = found.reshape(shape).astype(frame.values)
    if not np.isfinite(values).all():
        raise DataError(f"{where}: holds values that are not finite; replace them before")
    return values


def is_array_file(encoded: Any) -> bool:
    """Return whether bytes are those of a file of NumPy."""
    return isinstance(encoded, bytes) and encoded.startswith(MAGIC)


def random_inputs(count: int, frame: Frame, channels: int, below: int = 256) -> NDArray[Any]:
    """Draw the same inputs (count, channels, height, width) at each call.

    Args:
        count: How many.
        frame: Their size and the type of their values.
        channels: Channels.
        below: Of integer values, one more than the largest.

    Example:
        >>> random_inputs(2, Frame(4, 5), 6).shape
        (2, 6, 4, 5)
    """
    random, shape = np.random.default_rng(0), (count, *frame.shape(channels))
    if frame.values == FLOATS:
        return random.standard_normal(shape, np.float32)
    return random.integers(0, below, shape, np.uint8)
