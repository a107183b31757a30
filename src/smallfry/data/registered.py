"""Registered data sets: generated ones, and those of kits, each with a reader of its own."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from smallfry.data.image_data import ImageData
from smallfry.errors import UsageError, nearest
from smallfry.io.plugins import load_kit
from smallfry.io.registry import add, path_of

__all__ = ["OWN", "Reader", "Wanted", "find_reader", "register_data", "settings_from"]


SHARES = (0.1, 0.2)  # validation and test, in load_data


class Wanted(NamedTuple):
    """Request for a registered data set: the settings of ``load_data``."""

    root: Path | None
    options: Mapping[str, Any]  # of this set
    validation: float  # share of the training samples to hold out
    test: float  # share of all samples to hold out
    split_seed: int
    limit: int | None  # of training samples
    images: Mapping[str, Any]  # image_size, resize, channels, label, stream and bit_depth

    def require_fixed(self, name: str, **fixed: Any) -> None:
        """Refuse settings of images other than those that the data has.

        Args:
            name: Of the data set.
            fixed: What its images have; of other settings, only None is taken.

        Raises:
            UsageError: Another value.
        """
        for option, value in self.images.items():
            usual = "crop" if option == "resize" else None  # in load_data
            if value not in (None, usual, fixed.get(option)):
                raise UsageError(f"{name} has no data.{option}: leave it out")


# data sets with other readers than registered ones
OWN = ("digits", "curves", "faces", "cifar10", "cifar100", "mnist", "fashion_mnist")
Reader = Callable[[str, Wanted], ImageData]
_READERS: dict[str, Reader] = {}


def register_data(names: Iterable[str], read: Reader) -> None:
    """Register data sets by their names; those of a kit begin with the kit's and a hyphen.

    Args:
        names: The names.
        read: From a name and a request to the data.

    Raises:
        UsageError: Another data set has one of the names.
    """
    for name in names:
        if name in OWN:
            raise UsageError(
                f"two data sets are named '{name}': smallfry's own and {path_of(read)}; rename one"
            )
        add(_READERS, name, read, "data sets")


def find_reader(name: str) -> Reader | None:
    """Find the reader of a data set, in its kit if need be; None of folders and other data."""
    if name not in _READERS and "-" in name:
        load_kit(name)
    return _READERS.get(name)


def settings_from(kind: type[Any], options: Mapping[str, Any]) -> Any:
    """Build settings from ``data.options``.

    Raises:
        UsageError: One that is not there, of another type, or out of range.
    """
    known = {field.name: field.default for field in fields(kind)}
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"data.options has no '{name}'{nearest(name, known)}")
        wanted = type(known[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise UsageError(
                f"data.options.{name} must be of type {wanted.__name__}, got {value!r}"
            )
    found = kind(**options)
    if getattr(found, "seed", 0) < 0:
        raise UsageError(f"data.options.seed is a whole number from 0, got {found.seed}")
    return found
