"""One image: from bytes or a file to pixels of a wanted size and number of channels."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from smallfry.errors import DataError
from smallfry.reading import opened

Encoded = bytes | Path

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
MOST_PIXELS = 89_478_485  # a quarter of a GiB of RGB, where Pillow begins to warn
MOST_BYTES = 256 * 2**20  # of a file
LARGEST_SIDE = 4096  # that images are brought to for a model
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F"})


def header(encoded: Encoded, where: str) -> tuple[int, int, bool]:
    """Width, height and whether the image is grey, read without decoding its pixels."""
    with _open(encoded, where) as image:
        try:
            return image.width, image.height, _is_grey(image)
        except Exception as error:
            raise _damaged(where, error) from error


def decode(encoded: Encoded, where: str, size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels (channels, size, size) of an image of one of ``FORMATS``.

    An EXIF rotation is applied, if it can be read, transparency laid over white, 16-bit values are
    scaled to 8, the first frame of an animation is taken, and a picture that is not square is
    cropped at its centre.

    Raises:
        DataError: Not an image, or a damaged one; ``where`` names it.
    """
    with _open(encoded, where) as image:
        try:
            image.load()
            return _fit(_eight_bit(_upright(image), where), size, channels)
        except DataError:
            raise
        except Exception as error:
            raise _damaged(where, error) from error


def refit(pixels: NDArray[np.uint8], size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels (channels, height, width) brought to another size and number of channels."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return _fit(image, size, channels)


def _fit(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


@contextmanager
def _open(encoded: Encoded, where: str) -> Iterator[Image.Image]:
    try:
        if isinstance(encoded, Path):
            with opened(encoded, MOST_BYTES) as stream, _image_in(stream, where) as image:
                yield image
        else:
            if len(encoded) > MOST_BYTES:
                raise OSError(f"longer than {MOST_BYTES:,} bytes")
            with _image_in(BytesIO(encoded), where) as image:
                yield image
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{where}: can't be read ({reason})") from error


def _image_in(stream: BinaryIO, where: str) -> Image.Image:
    try:
        image = Image.open(stream, formats=READ)
    except UnidentifiedImageError:
        raise DataError(f"{where}: not an image, or of a format that is not read") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: too large to be decoded safely ({error})") from None
    except Exception as error:  # a stranger's bytes raise almost anything, struct.error too
        raise _damaged(where, error) from error
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise DataError(
            f"{where}: {image.width} × {image.height} pixels are too many to be decoded safely; "
            f"at most {MOST_PIXELS:,} are read: make it smaller"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data says it was taken, if these can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged in any way, which is no reason to lose the picture
        return image


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: the image is damaged ({error or type(error).__name__})")


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        channels = np.asarray(image)[..., :3]
        return bool((channels == channels[..., :1]).all())
    return image.mode in GREY_MODES or image.mode.startswith("I;16")


def _eight_bit(image: Image.Image, where: str) -> Image.Image:
    """The image over white, in a mode with 8 bits a channel."""
    if image.mode.startswith("I"):  # Pillow's own conversion would clip these at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{where}: 32-bit values outside 0 to 65535; save it with 8 or 16 bits")
        return Image.fromarray((values // (257 if values.max() > 255 else 1)).astype(np.uint8))
    if image.mode == "F":
        raise DataError(f"{where}: floating-point pixels; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image
