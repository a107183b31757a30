"""Memory limits for image decoding, per image and across threads.

A pixel is counted with four bytes, as Pillow holds colour. For a moment it takes up to four times
as many, as some decoders keep whole frames of their own.
"""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from PIL import Image

from smallfry_runtime.errors import UsageError

IMAGE_MIB = "SMALLFRY_IMAGE_MIB"
PIXEL_BYTES = 4
MOST_DIGITS = 12  # of a number of MiB; longer texts are slow to convert, or refused by Python
MOST_PIXELS = 89_478_485  # by default, where Pillow begins to warn: 341 MiB
DECODED_AT_ONCE = 2**29  # bytes of all images that are being decoded
ICON, PNG = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n"
MOST_ICONS = 256  # sizes of one icon that are looked at
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF


def most_pixels() -> int:
    """Return the largest number of pixels per image that fits in ``$SMALLFRY_IMAGE_MIB``.

    Raises:
        UsageError: That is no whole number of at least 1.
    """
    wanted = os.environ.get(IMAGE_MIB)
    if not wanted:
        return MOST_PIXELS
    if not wanted.isdecimal() or len(wanted) > MOST_DIGITS or int(wanted) < 1:
        raise UsageError(
            f"the environment variable {IMAGE_MIB} must be an integer, the limit of a decoded "
            f"image in MiB, not '{wanted[:40]}'; unset it for the default, 341"
        )
    most = int(wanted) * 2**20 // PIXEL_BYTES
    if most > (Image.MAX_IMAGE_PIXELS or most):
        Image.MAX_IMAGE_PIXELS = most  # or Pillow would refuse what is wished
    return most


def pixels_in_icon(stream: BinaryIO) -> int:
    """Count the pixels of the largest image in an icon file, which Pillow decodes on open; else 0.

    The directory of an icon has no sides above 256, but the images in it have headers of their own.
    """
    head = stream.read(6)
    most = 0
    if len(head) == 6 and head.startswith(ICON):
        directory = stream.read(16 * min(MOST_ICONS, int.from_bytes(head[4:], "little")))
        for _, offset in struct.iter_unpack("<8x2I", directory[: len(directory) // 16 * 16]):
            stream.seek(offset)
            inner = stream.read(24)
            if len(inner) == 24:
                is_png = inner.startswith(PNG)
                width, height = struct.unpack_from(
                    *((">2i", inner, 16) if is_png else ("<2i", inner, 4))
                )
                most = max(most, abs(width * height))
    stream.seek(0)
    return most


def pixels_in_tile(image: Any) -> int:
    """Count the pixels (4 bytes each) of a TIFF tile, which may exceed the image; else 0."""
    tags = getattr(image, "tag_v2", {})
    sides = [int(tags.get(tag, 0)) for tag in (TILE_WIDTH, TILE_LENGTH)]
    bits = int(tags.get(277, 1)) * int(max(tags.get(258, (1,))))
    return -(-sides[0] * sides[1] * bits // (8 * PIXEL_BYTES))


class Budget:
    """Memory budget of several threads, blocking until enough of it is free.

    Args:
        total: The amount.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.reset()

    def reset(self) -> None:
        """Release the whole budget, as after a fork that left the other threads behind."""
        self._free = self.total
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, amount: int) -> Iterator[None]:
        """Reserve an amount, or the whole budget if that is less."""
        amount = min(amount, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


_BUDGET = Budget(DECODED_AT_ONCE)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_BUDGET.reset)


@contextmanager
def decoding(pixels: int) -> Iterator[None]:
    """Wait until an image's pixels fit in the budget, and reserve them while in use."""
    with _BUDGET.taking(pixels * PIXEL_BYTES):
        yield
