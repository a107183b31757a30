"""Image data sets: splits, class names and pixel statistics."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smallfry.data.decoded import Decoding, decode_held_out
from smallfry.data.duplicates import (
    Hashed,
    describe_duplicates,
    image_hashes,
    kept_without_duplicates,
)
from smallfry.data.labels import relabelled, some_of
from smallfry.data.sources import (
    LACKING,
    TEST,
    TRAIN,
    VALIDATION,
    EncodedSplit,
)
from smallfry.data.splits import Split
from smallfry.data.stream import ShardPixels
from smallfry.data.symmetry import Symmetry
from smallfry.errors import DataError, SmallfryWarning
from smallfry_runtime.frames import FLOATS, PIXELS, Frame, ImageSize, Resize, frame_of
from smallfry_runtime.names import text_of

log = logging.getLogger(__name__)

CONSTANT = 1e-6  # of a mean: the deviation of a channel whose values differ by rounding
MEASURED = 4096  # streamed images whose mean and deviation stand for all


@dataclass(frozen=True)
class ImageData:
    """Data set: class names, and train, validation and test splits of one image size.

    Args:
        name: The name or folder that was asked for.
        origin: Source of the data.
        classes: Class names, in the order of the labels.
        image_size: Side of square images in pixels, or height and width.
        channels: 1 for grey images, 3 for RGB; any number of inputs that are no pictures.
        train: The training split.
        validation: The validation split; empty if none was wanted.
        bit_depth: Bits of the values in images of more than 8 bits per channel, the scale that they
            were brought to 8 bits from; None if no training image has more.
        moments: Mean and standard deviation to normalise with; default those of the pixels.
        symmetries: Random symmetries of so many training grids of symbols, for their augmentation.
        generated: Settings of a generated data set; None of real images.
        resize: How pictures of another shape became such images; see ``Frame``.
        has_symbols: Labels are numbers of symbols, several a sample, such as a grid or a text;
            classes are their names, and the first is padding.
    """

    name: str
    origin: str
    classes: tuple[str, ...]
    image_size: ImageSize
    channels: int
    train: Split
    validation: Split
    _held_out: Split | EncodedSplit = field(repr=False)
    _skip_unreadable: bool = False
    _spelled: tuple[str, ...] = field(default=(), repr=False)  # classes as the source has them
    _locate: Mapping[str, Callable[[int], str]] = field(default_factory=dict, repr=False)
    bit_depth: int | None = None
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    symmetries: Callable[[int], Symmetry] | None = field(default=None, repr=False)
    generated: Mapping[str, Any] | None = None
    resize: Resize = "crop"
    has_symbols: bool = False

    @property
    def frame(self) -> Frame:
        """Size of the images, how pictures of another shape became such, and their type."""
        pixels = self.train.pixels
        floats = isinstance(pixels, Tensor) and pixels.is_floating_point() and len(pixels) > 0
        frame = frame_of(self.image_size, self.resize)
        return frame._replace(values=FLOATS if floats else PIXELS)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (channels, height, width)."""
        return self.frame.shape(self.channels)

    @property
    def test_count(self) -> int:
        """Number of test images, without reading them."""
        return len(self._held_out.labels)

    @cached_property
    def test(self) -> Split:
        """Test split, decoded on first access."""
        if isinstance(self._held_out, Split):
            return self._held_out
        form = (self.frame, self.channels, len(self.classes), self._skip_unreadable)
        return decode_held_out(self._held_out, Decoding(*form, self.bit_depth))

    def locate(self, split: str, position: int) -> str:
        """Describe the source of an image, such as its file.

        Args:
            split: train, validation or test; all is train.
            position: Of the image in its split.
        """
        kind = TRAIN if split == "all" else split
        found = {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}[kind]
        row = int(found.rows[position])
        if kind == TEST and isinstance(self._held_out, EncodedSplit):
            return self._held_out.locate(row)
        return self._locate[kind](row) if kind in self._locate else f"{self.name}[{row}]"

    @cached_property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the training images, or of 4,096 streamed ones.

        Pixels count from 0 to 1, other inputs as they are.
        """
        return self._moments[0]

    @cached_property
    def std(self) -> tuple[float, ...]:
        """Per-channel standard deviation of the pixels of ``mean``, on the same scale."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.moments is not None:
            return self.moments
        total = torch.zeros(2, self.channels, dtype=torch.float64)
        chosen = self.train.rows
        if isinstance(self.train.pixels, ShardPixels):
            spread = self.train.pixels.shards.spread(chosen.numpy(), MEASURED)
            chosen = torch.from_numpy(spread)
        scale = 255 if self.frame.values == PIXELS else 1
        for rows in torch.split(chosen, 4096):
            values = self.train.pixels[rows].to(torch.float64) / scale
            total += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        mean, square = total / (len(chosen) * self.frame.height * self.frame.width)
        std = (square - mean**2).clamp(min=0).sqrt()
        if self.frame.values == PIXELS:
            std = std.clamp(min=1e-3)  # a constant channel
        else:  # of any unit, such as volts
            std = torch.where(std > CONSTANT * mean.abs(), std, 1.0)
        return tuple(mean.tolist()), tuple(std.tolist())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the training and validation images, labels and class names, for provenance.

        Data sets of one fingerprint give the same training, wherever they are and whatever their
        names.
        """
        return self._fingerprint(self.classes)

    @cached_property
    def test_fingerprint(self) -> str:
        """Hash of the test images, their labels and the class names."""
        return self._fingerprint(self.classes, self.test)

    def matches(self, fingerprint: str) -> bool:
        """Compare the data with a fingerprint.

        Earlier versions took the class names as the source spells them.
        """
        if fingerprint == self.fingerprint:
            return True
        other = self._spelled not in ((), self.classes)
        return other and fingerprint == self._fingerprint(self._spelled)

    def duplicates(self) -> list[str]:
        """Describe identical images in several splits or under several labels.

        Streamed images are not compared, and generated puzzles are distinct.
        """
        if isinstance(self.train.pixels, ShardPixels) or self.generated is not None:
            return []
        return describe_duplicates(self.origin, self._hashed(), self.classes)

    def without_duplicates(self) -> "ImageData":
        """Drop training images that have several labels or are in other splits.

        Validation images that are test images too are left out as well.
        """
        train, validation, test = self._hashed()
        kept = kept_without_duplicates(train, (validation, test), unambiguous=True)
        chosen = kept_without_duplicates(validation, (test,), unambiguous=False)
        log.info(
            "%s: removed duplicate images: %d of training, %d of validation",
            self.origin,
            len(self.train) - len(kept),
            len(self.validation) - len(chosen),
        )
        return replace(
            self,
            train=self.train.take(torch.from_numpy(kept)),
            validation=self.validation.take(torch.from_numpy(chosen)),
            _held_out=self.test,
        )

    def relabelled(self, classes: Sequence[str]) -> "ImageData":
        """Map the labels to the same class names among other classes.

        Images of classes that are not among them are left out with a warning. If no class is, the
        data stays as it is.

        Raises:
            DataError: Symbols that are not among them.
        """
        if self.has_symbols:
            return self._respelled(classes)
        if self.train.labels.ndim > 2 or self.train.labels.is_floating_point():
            return self  # of no classes
        if self.train.labels.ndim == 2:
            return self._rearranged(classes)
        places = {text_of(name): label for label, name in enumerate(classes)}
        table = np.array([places.get(name, LACKING) for name in self.classes], np.int64)
        if tuple(classes) == self.classes or (table == LACKING).all():
            return self
        foreign = [name for name, at in zip(self.classes, table, strict=True) if at == LACKING]
        if foreign:
            warnings.warn(
                f"{self.origin}: skipped images of {some_of(foreign)}, which the model does not "
                f"have as a class",
                SmallfryWarning,
                stacklevel=3,
            )
        held_out = self._held_out
        if isinstance(held_out, EncodedSplit):
            held_out = relabelled(held_out, table)
        else:
            held_out = held_out.relabelled(table)
        return replace(
            self,
            classes=tuple(classes),
            train=self.train.relabelled(table),
            validation=self.validation.relabelled(table),
            _held_out=held_out,
        )

    def _rearranged(self, classes: Sequence[str]) -> "ImageData":
        """Return images of several classes with their labels in the order of other classes."""
        foreign = [name for name in self.classes if name not in classes]
        if tuple(classes) == self.classes or len(foreign) == len(self.classes):
            return self
        if foreign:
            warnings.warn(
                f"{self.origin}: left out the classes {some_of(foreign)}, which the model does not "
                "have",
                SmallfryWarning,
                stacklevel=4,
            )

        def of(split: Split) -> Split:
            table = split.labels.new_zeros(len(split), len(classes))
            for i, name in enumerate(self.classes):
                if name in classes:
                    table[:, list(classes).index(name)] = split.labels[:, i]
            return replace(split, labels=table)

        return replace(
            self,
            classes=tuple(classes),
            train=of(self.train),
            validation=of(self.validation),
            _held_out=of(self.test),
        )

    def _respelled(self, classes: Sequence[str]) -> "ImageData":
        """Return samples of several symbols with their labels in another order of symbols."""
        if tuple(classes) == self.classes:
            return self
        lacking = [name for name in self.classes if name not in classes]
        if lacking:
            raise DataError(
                f"{self.origin}: has symbols unknown to the model ({some_of(lacking)}); "
                "leave out the samples with them"
            )
        table = torch.tensor([list(classes).index(name) for name in self.classes])

        def of(split: Split) -> Split:
            return replace(split, labels=table[split.labels])

        return replace(
            self,
            classes=tuple(classes),
            train=of(self.train),
            validation=of(self.validation),
            _held_out=of(self.test),
        )

    def _hashed(self) -> tuple[Hashed, Hashed, Hashed]:
        def of(name: str, split: Split) -> Hashed:
            assert isinstance(split.pixels, Tensor)
            hashes = image_hashes(split.pixels, split.rows)
            several = split.labels.ndim > 1 or split.labels.is_floating_point()
            one_label = torch.zeros_like(split.rows) if several else split.labels
            return Hashed(
                name,
                hashes,
                one_label.numpy(),
                lambda i: self.locate(name, i),
            )

        return of(TRAIN, self.train), of(VALIDATION, self.validation), of(TEST, self.test)

    def _fingerprint(self, classes: Sequence[str], *splits: Split) -> str:
        digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape"))
        for split in splits or (self.train, self.validation):
            digest.update(split.labels.numpy().tobytes())
            if isinstance(split.pixels, ShardPixels):  # too many to be looked at
                digest.update(split.pixels.shards.mark.encode() + split.rows.numpy().tobytes())
                continue
            for rows in torch.split(split.rows, 4096):
                digest.update(split.pixels[rows].numpy().tobytes())
        return digest.hexdigest()[:16]
