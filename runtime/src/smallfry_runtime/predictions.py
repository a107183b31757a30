"""Class names and probabilities of images, for any backend."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import DataError
from smallfry_runtime.files import read_bytes
from smallfry_runtime.frames import Frame, ImageSize
from smallfry_runtime.images import decode as decode_image
from smallfry_runtime.inputs import InnerSize, InputImage

BATCH = 64
NOT_FINITE = (
    "the model's answer is not a number: its weights or what it computes are too large, or it is "
    "damaged; take another checkpoint, or export the run again"
)


class Answer(NamedTuple):
    """Prediction for one image."""

    name: str
    top: list[tuple[str, float]]  # class names and probabilities, the likeliest first
    halting: float | None = None  # probability of being right, by a recursive model itself
    steps: int | None = None  # recursion steps taken, with early exit
    error: str | None = None
    chosen: tuple[str, ...] | None = None  # the classes of an image that may have several

    @property
    def is_finite(self) -> bool:
        """True if all values are finite."""
        return all(isfinite(value) for value in (self.halting or 0.0, *dict(self.top).values()))

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON."""
        top = [{"class": name, "probability": round(share, 6)} for name, share in self.top]
        answer: dict[str, Any] = {"image": self.name}
        if self.chosen is None:
            answer["class"] = self.top[0][0]
        else:
            answer["classes"] = list(self.chosen)
        answer["top"] = top
        if self.halting is not None:
            answer["halting"] = round(self.halting, 6)
        if self.steps is not None:
            answer["steps"] = self.steps
        return answer


class Outputs(NamedTuple):
    """Model outputs for one batch."""

    probabilities: NDArray[np.float32]  # (images, classes)
    halting: NDArray[np.float32] | None = None  # (images,), of a recursive model
    steps: NDArray[np.int64] | None = None  # (images,), with early exit


def answers(
    run: Callable[[NDArray[np.uint8]], Outputs],
    images: Iterable[InputImage],
    classes: Sequence[str],
    image_size: ImageSize | Frame,
    channels: int,
    top_k: int = 3,
    bit_depth: int | None = None,
    thresholds: Sequence[float] | None = None,
) -> Iterator[Answer]:
    """Convert outputs to predictions, in the order of the images.

    An image that can't be read gives an ``error``, as does one whose scores are not finite numbers.

    Args:
        run: From pixels (images, channels, height, width) to outputs.
        images: The images.
        classes: Names of the model's classes.
        image_size: Size that the images are brought to; see ``smallfry_runtime.images.decode``.
        channels: 1 (grey) or 3 (RGB).
        top_k: Classes to name for each image, at most all; chosen ones are named in any case.
        bit_depth: Bit depth of 16-bit images; see ``smallfry_runtime.images.decode``.
        thresholds: Of classes, where an image may have several; None where it has one.
    """
    for chunk, pixels, errors in _chunks(images, image_size, channels, bit_depth):
        outputs = run(np.stack(pixels)) if pixels else None
        rows = iter(()) if outputs is None else _rows(outputs, classes, top_k, thresholds)
        shares = np.empty((0, 0)) if outputs is None else outputs.probabilities
        finite = iter([bool(np.isfinite(row).all()) for row in shares])
        for image, failure in zip(chunk, errors, strict=True):
            answer = Answer(image.name, []) if failure else next(rows)._replace(name=image.name)
            if failure is None and not (next(finite) and answer.is_finite):
                failure = f"{image.name}: {NOT_FINITE}"
            yield answer if failure is None else Answer(image.name, [], error=failure)


class Decoded(NamedTuple):
    """Decoded answer to one image, or to one puzzle of a text."""

    name: str
    value: Any  # that JSON can hold
    error: str | None = None
    puzzle: int | None = None  # number in its text, from 1

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON; a value that is one already is merged."""
        value = self.value if isinstance(self.value, dict) else {"answer": self.value}
        if self.puzzle is None:
            return {"image": self.name, **value}
        return {"file": self.name, "puzzle": self.puzzle, **value}


def decoded(
    decode: Callable[[NDArray[np.uint8], Sequence[InnerSize]], Sequence[Any]],
    images: Iterable[InputImage],
    image_size: ImageSize | Frame,
    channels: int,
    bit_depth: int | None = None,
) -> Iterator[Decoded]:
    """Decode the answers to images, in their order.

    An image that can't be read gives an ``error``, as does one whose answer is not a number.

    Args:
        decode: From pixels (images, channels, height, width) and the images' own heights and
            widths in them (None: all of the frame) to a value for each, or None for an answer that
            is not a number.
        images: The images.
        image_size: Size that the images are brought to.
        channels: 1 (grey) or 3 (RGB).
        bit_depth: Bit depth of 16-bit images.
    """
    for chunk, pixels, errors in _chunks(images, image_size, channels, bit_depth):
        pairs = zip(chunk, errors, strict=True)
        inner = [image.inner for image, failure in pairs if failure is None]
        values = iter(decode(np.stack(pixels), inner) if pixels else ())
        for image, failure in zip(chunk, errors, strict=True):
            yield Decoded(image.name, None, failure) if failure else _decoded(image, next(values))


def decoded_texts(
    decode: Callable[[NDArray[np.uint8]], Sequence[Any]],
    texts: Iterable[InputImage],
    read: Callable[[str], NDArray[np.uint8]],
) -> Iterator[Decoded]:
    """Decode the answers to the puzzles of texts, in their order.

    A text that can't be read gives an ``error``.

    Args:
        decode: From pixels (puzzles, 1, side, side) to a value for each, as for ``decoded``.
        texts: Their files or their bytes.
        read: From a text to pixels.
    """
    for text in texts:
        name, encoded, error, _ = text
        if error is not None:
            yield Decoded(name, None, error)
            continue
        try:
            if isinstance(encoded, Path):
                encoded = read_bytes(encoded)
            if not isinstance(encoded, bytes):
                raise DataError("a picture; expected a text")
            values = decode(read(encoded.decode()))
        except (OSError, DataError, UnicodeDecodeError) as problem:
            yield Decoded(name, None, f"{name}: {problem}")
        else:
            for number, value in enumerate(values, 1):
                yield _decoded(text, value)._replace(puzzle=number)


def _decoded(image: InputImage, value: Any) -> Decoded:
    error = f"{image.name}: {NOT_FINITE}" if value is None else None
    return Decoded(image.name, value, error)


def decoded_numbers(
    decode: Callable[[Any], Sequence[Any]], outputs: Any, halting: NDArray[Any] | None = None
) -> list[Any]:
    """Decode outputs, with None for samples whose values are not all numbers.

    Args:
        decode: From outputs to a value for each sample; those that are no numbers are 0 in it.
        outputs: (samples, …), or a dictionary of such.
        halting: (samples,), of a recursive model.

    Example:
        >>> decoded_numbers(np.ndarray.tolist, np.array([[1.0], [np.nan]]))
        [[1.0], None]
    """
    several = outputs if isinstance(outputs, dict) else {"": outputs}
    every = [*several.values(), *([] if halting is None else [halting])]
    known = np.all([np.isfinite(each).reshape(len(each), -1).all(1) for each in every], axis=0)
    zeroed = {name: np.where(np.isfinite(each), each, 0) for name, each in several.items()}
    values = decode(zeroed if isinstance(outputs, dict) else zeroed[""])
    return [value if number else None for value, number in zip(values, known, strict=True)]


def _chunks(
    images: Iterable[InputImage],
    image_size: ImageSize | Frame,
    channels: int,
    bit_depth: int | None,
) -> Iterator[tuple[list[InputImage], list[NDArray[np.uint8]], list[str | None]]]:
    """Read images in groups: the images, the pixels of those that can be read, and all errors."""
    remaining = iter(images)
    while chunk := list(islice(remaining, BATCH)):
        pixels: list[NDArray[np.uint8]] = []
        errors: list[str | None] = []
        for name, encoded, error, _ in chunk:
            try:
                if encoded is None:
                    raise DataError(error or name)
                pixels.append(decode_image(encoded, name, image_size, channels, bit_depth))
                errors.append(None)
            except DataError as problem:
                errors.append(str(problem))
        yield chunk, pixels, errors


def _rows(
    outputs: Outputs, classes: Sequence[str], top_k: int, thresholds: Sequence[float] | None
) -> Iterator[Answer]:
    """Yield answers without the names of their images."""
    order = np.argsort(-outputs.probabilities, axis=1, kind="stable")
    for number, indices in enumerate(order):
        shares = outputs.probabilities[number]
        chosen: list[int] = []
        if thresholds is not None:
            chosen = [i for i in indices.tolist() if shares[i] >= thresholds[i]]
        named = [i for place, i in enumerate(indices.tolist()) if place < top_k or i in chosen]
        yield Answer(
            "",
            [(classes[i], float(shares[i])) for i in named],
            None if outputs.halting is None else float(outputs.halting[number]),
            None if outputs.steps is None else int(outputs.steps[number]),
            chosen=None if thresholds is None else tuple(classes[i] for i in chosen),
        )
