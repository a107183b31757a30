"""Image decoding: from bytes or a file to pixels of a given size and number of channels.

Memory is bounded: of one image by ``most_pixels``, checked before its pixels are decoded, and of
all threads together by ``DECODED_AT_ONCE``.
"""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from smallfry_runtime.arrays import read_array
from smallfry_runtime.decoding import (
    IMAGE_MIB,
    decoding,
    most_pixels,
    pixels_in_icon,
    pixels_in_tile,
)
from smallfry_runtime.decoding import MOST_PIXELS as MOST_PIXELS
from smallfry_runtime.errors import DataError, SmallfryError, SmallfryWarning
from smallfry_runtime.files import open_regular
from smallfry_runtime.frames import LARGEST_SIDE as LARGEST_SIDE
from smallfry_runtime.frames import Frame, ImageSize, frame_of

Encoded = bytes | Path | Image.Image

# Those that people keep pictures in. Pillow opens others too: EPS starts Ghostscript, a program of
# its own, and rare ones have been read by few.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI"),
    *("TGA", "TIFF", "WEBP"),
)
Image.init()
READ = tuple(kind for kind in FORMATS if kind in Image.OPEN)  # as this Pillow was built
IMAGE_EXTENSIONS = frozenset(
    extension for extension, kind in Image.registered_extensions().items() if kind in (*READ, "MPO")
)
MOST_BYTES = 256 * 2**20  # of a file
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F"})
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras and scanners
FULL_DEPTH = 16
ORIENTATION, ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF
BEFORE = {"La": "LA", "LAB": "RGB"}  # modes that Pillow converts to these alone
STRIP = 2**20  # pixels that are laid over white at a time


class Pixels(NamedTuple):
    """Pixels of an image in a model's form."""

    values: NDArray[np.uint8]  # (channels, height, width)
    peak: int  # largest value of an image of more than 8 bits per channel; -1 of any other


def header(encoded: Encoded, where: str) -> tuple[int, int, bool]:
    """Read width, height, as ``decode`` turns it, and greyness, without decoding its pixels."""
    with _open(encoded, where) as image:
        try:
            width, height = image.size[::-1] if _is_on_its_side(image) else image.size
            return width, height, _is_grey(image)
        except Exception as error:
            raise _damaged(where, error) from error


def decode(
    encoded: Encoded,
    where: str,
    size: ImageSize | Frame,
    channels: int,
    bit_depth: int | None = None,
) -> NDArray[Any]:
    """Decode an image of one of ``FORMATS`` to pixels (channels, height, width).

    Inputs that are no pictures are read by ``arrays.read_array``.

    An EXIF rotation is applied, if it can be read, transparency laid over white, the first frame
    of an animation is taken, and a picture of another shape is cropped at its centre, put between
    borders, or stretched.

    Args:
        encoded: A file, its bytes, or an image of Pillow, which stays as it is.
        where: Its name in messages.
        size: Side that it is brought to, in pixels, or height and width; a frame also has the way.
        channels: 1 (grey) or 3 (RGB) of a picture.
        bit_depth: Bits of the values in images of more than 8 bits per channel, which are scaled
            from 0 to 2^bits - 1 down to 8 bits; default all 16, with a warning where the image
            does not look like it.

    Raises:
        DataError: Not an image, a damaged or too large one, or one of values beyond the bits.
        UsageError: ``SMALLFRY_IMAGE_MIB`` is no whole number.
    """
    frame = frame_of(size)
    if frame.is_array(channels):
        return read_array(encoded, where, frame, channels)
    values, peak = decode_with_peak(encoded, where, size, channels, bit_depth or FULL_DEPTH)
    if bit_depth is None and -1 < peak < 2 ** (FULL_DEPTH - 1):
        warnings.warn(
            "the bit depth of 16-bit images is unknown: values are assumed to span 0 to 65,535, "
            "but some images stay below 32,767 and will be dark; save them with 8 bits, or train "
            "on such images with --data.bit_depth",
            SmallfryWarning,
            stacklevel=2,
        )
    return values


def decode_with_peak(
    encoded: Encoded, where: str, size: ImageSize | Frame, channels: int, bit_depth: int
) -> Pixels:
    """Decode like ``decode``, and also return the largest value, which implies the bit depth."""
    with _open(encoded, where) as image, decoding(image.width * image.height):
        try:
            is_wide = _is_wide(image)
            image.load()
            _turn_upright(image)
            peak = _peak(image, where) if is_wide else -1
            if peak >= 0 and bit_depth < FULL_DEPTH and not image.mode.startswith("I"):
                raise DataError(
                    f"{where}: 16-bit colour is read by its upper 8 bits, but its data set has a "
                    f"bit depth of {bit_depth}; save it with 8 bits"
                )
            if peak >= 2**bit_depth:
                raise DataError(
                    f"{where}: holds the value {peak:,}, and {2**bit_depth - 1:,} is the largest "
                    f"of {bit_depth} bits, the bit depth of its data set; scale it like the "
                    f"others, or train with a larger --data.bit_depth"
                )
            clear = image.info.get("transparency")
            if peak >= 0 and isinstance(clear, tuple):  # has all bits, where pixels have 8
                image.info["transparency"] = tuple(value >> 8 for value in clear)
            eight_bit = _eight_bit(image, where, bit_depth)
            return Pixels(_fit(eight_bit, frame_of(size), channels), peak)
        except DataError:
            raise
        except Exception as error:
            raise _damaged(where, error) from error


def peak_of(encoded: Encoded, where: str) -> int:
    """Return the largest value of an image of more than 8 bits per channel; -1, undecoded, else.

    Raises:
        DataError: See ``decode``.
    """
    with _open(encoded, where) as image:
        try:
            if not _is_wide(image):
                return -1
            with decoding(image.width * image.height):
                image.load()
                return _peak(image, where)
        except DataError:
            raise
        except Exception as error:
            raise _damaged(where, error) from error


def bit_depth_of(peak: int) -> int:
    """Return the smallest usual bit depth that holds a value."""
    return next(depth for depth in BIT_DEPTHS if peak < 2**depth)


def is_bit_depth(value: object) -> bool:
    """Return whether a manifest's value is a bit depth, or None for an unknown one."""
    return value is None or (type(value) is int and 1 <= value <= FULL_DEPTH)


def refit(pixels: NDArray[np.uint8], size: ImageSize | Frame, channels: int) -> NDArray[np.uint8]:
    """Resize pixels (channels, height, width) and convert their number of channels."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return _fit(image, frame_of(size), channels)


def _fit(image: Image.Image, frame: Frame, channels: int) -> NDArray[np.uint8]:
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:  # or it would be copied
        image = image.convert(mode)
    if image.size != (frame.width, frame.height):
        image = _brought_to(frame, image)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _brought_to(frame: Frame, image: Image.Image) -> Image.Image:
    size = frame.width, frame.height
    if frame.resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    if frame.resize == "squash":
        return image.resize(size, Image.Resampling.BILINEAR)
    scale = min(frame.width / image.width, frame.height / image.height)
    width, height = (max(1, round(scale * side)) for side in image.size)
    whole = Image.new(image.mode, size)  # black
    inner = image.resize((width, height), Image.Resampling.BILINEAR)
    whole.paste(inner, ((frame.width - width) // 2, (frame.height - height) // 2))
    return whole


@contextmanager
def _open(encoded: Encoded, where: str) -> Iterator[Image.Image]:
    try:
        if isinstance(encoded, Image.Image):
            _require_bounded(encoded.width * encoded.height, where)
            yield _copy_of(encoded, where)
        elif isinstance(encoded, Path):
            with open_regular(encoded, MOST_BYTES) as stream, _image_in(stream, where) as image:
                yield image
        else:
            if len(encoded) > MOST_BYTES:
                raise OSError(f"longer than {MOST_BYTES:,} bytes")
            with _image_in(BytesIO(encoded), where) as image:
                yield image
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{where}: can't be read ({reason})") from error


def _copy_of(image: Image.Image, where: str) -> Image.Image:
    try:
        return image.copy()  # which loads it
    except Exception as error:
        raise _damaged(where, error) from error


def _image_in(stream: BinaryIO, where: str) -> Image.Image:
    _require_bounded(pixels_in_icon(stream), where)
    try:
        image = _by_format(stream)
    except Exception as error:  # a stranger's bytes raise almost anything
        raise _damaged(where, error) from error
    if image is None:
        raise DataError(f"{where}: not an image, or in an unsupported format")
    try:
        _require_bounded(image.width * image.height, where)
        _require_bounded(pixels_in_tile(image), where)
    except Exception as error:
        image.close()
        raise error if isinstance(error, SmallfryError) else _damaged(where, error) from error
    return image


def _by_format(stream: BinaryIO) -> Image.Image | None:
    """Open an image with the first format that accepts it; None if none does.

    ``Image.open`` warns of sizes too, which are judged here; to silence it is not safe in threads.
    """
    prefix = stream.read(16)
    for kind in READ:
        read, accept = Image.OPEN[kind]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this format
            accepted = accept is None or accept(prefix)
            if accepted and not isinstance(accepted, str):  # a text is the reason why not
                stream.seek(0)
                return read(stream, "")
    return None


def _require_bounded(pixels: int, where: str) -> None:
    """Refuse an image that would take too much memory, by its header."""
    most = most_pixels()
    if pixels > most:
        raise DataError(
            f"{where}: {pixels:,} pixels are too many to be decoded safely; at most {most:,} are "
            f"read: make it smaller, or allow more memory with the environment variable {IMAGE_MIB}"
        )


def _turn_upright(image: Image.Image) -> None:
    """Rotate an image upright by its EXIF orientation, if readable."""
    with suppress(Exception):  # damaged in any way, which is no reason to lose the picture
        ImageOps.exif_transpose(image, in_place=True)


def _is_on_its_side(image: Image.Image) -> bool:
    """Return whether ``_turn_upright`` will turn an image by a quarter."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return False  # Pillow has turned the size itself, or would decode the pixels to look
    with suppress(Exception):
        return image.getexif().get(ORIENTATION) in ON_ITS_SIDE
    return False


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: the image is damaged ({error or type(error).__name__})")


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        with decoding(image.width * image.height):
            used = np.flatnonzero(image.histogram())
        colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
        colours = colours[used[used < len(colours)]]
        return bool((colours == colours[:, :1]).all())
    return image.mode in GREY_MODES or image.mode.startswith("I;16")


def _is_wide(image: Image.Image) -> bool:
    """Return whether the channels of a lazily opened image have more than 8 bits."""
    if image.mode.startswith("I"):
        return True
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ()
    raw_mode = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    return ";16" in str(raw_mode) and raw_mode != "BGR;16"  # 5, 6 and 5 bits


def _peak(image: Image.Image, where: str) -> int:
    """Return the largest value on a 16-bit scale; of colour, Pillow keeps the upper 8 bits."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{where}: 32-bit values outside 0 to 65535; save it with 8 or 16 bits")
        return int(values.max())
    bands = image.getextrema()
    most = max(high for _, high in bands) if isinstance(bands[0], tuple) else bands[1]
    return int(most) * 257


def _eight_bit(image: Image.Image, where: str, bit_depth: int) -> Image.Image:
    """Convert an image to a mode with 8 bits per channel, over white."""
    if image.mode.startswith("I"):  # Pillow's own conversion would clip these at 255
        scaled = np.arange(2**bit_depth, dtype=np.uint32) * 255 // (2**bit_depth - 1)
        values = np.asarray(image)
        grey = scaled.astype(np.uint8)[values]
        if isinstance(clear := image.info.get("transparency"), int):  # the transparent value
            grey[values == clear] = 255
        return Image.fromarray(grey)
    if image.mode == "F":
        raise DataError(f"{where}: floating-point pixels; save it with 8 or 16 bits per channel")
    if image.mode in BEFORE:
        image = image.convert(BEFORE[image.mode])
    return _over_white(image) if image.has_transparency_data else image


def _over_white(image: Image.Image) -> Image.Image:
    """Composite an image onto white as RGB, strip by strip, since each step makes a copy."""
    whole = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        whole.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return whole
