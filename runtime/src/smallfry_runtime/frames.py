"""Sizes of a model's images, and ways of resizing pictures of another shape to them."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from smallfry_runtime.errors import UsageError

ImageSize = int | tuple[int, int]  # side of squares, or height and width of rectangles
Resize = Literal["crop", "letterbox", "squash"]

RESIZES: tuple[Resize, ...] = get_args(Resize)
LARGEST_SIDE = 4096  # pixels that images are brought to for a model
PIXELS, FLOATS = VALUES = ("uint8", "float32")  # types of inputs


class Frame(NamedTuple):
    """Height and width of a model's images, and how pictures of another shape become them.

    ``crop`` cuts off what is left over around the centre, ``letterbox`` keeps everything between
    black borders, and ``squash`` stretches it. Values of ``float32`` are no pixels, but numbers of
    any scale, such as a series of measurements for each electrode.
    """

    height: int
    width: int
    resize: Resize = "crop"
    values: str = PIXELS

    @property
    def size(self) -> ImageSize:
        """Side of squares; height and width of rectangles."""
        return self.height if self.height == self.width else (self.height, self.width)

    @property
    def plain(self) -> int | list[int]:
        """Size as in JSON and YAML."""
        return self.height if self.height == self.width else [self.height, self.width]

    def shape(self, channels: int) -> tuple[int, int, int]:
        """Return the shape of an image, (channels, height, width)."""
        return channels, self.height, self.width

    def is_array(self, channels: int) -> bool:
        """Return whether inputs are arrays of NumPy, which no picture can be brought to."""
        return self.values != PIXELS or channels not in (1, 3)

    @property
    def is_plain(self) -> bool:
        """True for cropped squares, the only ones of earlier versions."""
        return self.height == self.width and self.resize == "crop"

    def __str__(self) -> str:
        """Return ``height×width``, with the way of resizing unless it is a crop."""
        suffix = "" if self.resize == "crop" else f" ({self.resize})"
        return f"{self.height}×{self.width}{suffix}"


def frame_of(size: Any, resize: Any = None, option: str = "image_size") -> Frame:
    """Return the frame of a size.

    Args:
        size: A side in pixels, or height and width, or a frame.
        resize: One of ``RESIZES``; default that of a frame, else ``crop``.
        option: Name of the size in messages.

    Raises:
        UsageError: Another number of sides, no whole numbers, or 0, negative or too large ones.

    Example:
        >>> frame_of((96, 64)).shape(3)
        (3, 96, 64)
    """
    if isinstance(size, Frame):
        return size if resize is None else size._replace(resize=resize)
    sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size,)
    if not 1 <= len(sides) <= 2 or not all(type(side) is int for side in sides):
        raise UsageError(
            f"{option} must be a side in pixels, or height and width such as 96 64, not {size!r}"
        )
    if min(sides) < 1:
        raise UsageError(f"{option} must be at least 1, got {_text(sides)}")
    if max(sides) > LARGEST_SIDE:
        raise UsageError(f"{option} must be at most {LARGEST_SIDE}, got {_text(sides)}")
    if resize is not None and resize not in RESIZES:
        raise UsageError(f"resize must be one of {', '.join(RESIZES)}, not {resize!r}")
    return Frame(sides[0], sides[-1], resize or "crop")


def _text(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides))
