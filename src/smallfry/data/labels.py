"""Labels missing from a split, or from training."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from smallfry.data.sources import LACKING, TEST, UNLABELLED, VALIDATION, EncodedSplit, Source
from smallfry.errors import DataError, SmallfryWarning


def with_known_labels(source: Source) -> Source:
    """Keep only the validation and test images of classes in the training split.

    A split without any label, as competitions withhold them, is left out; so are images of classes
    that training lacks. Warnings name both.

    Raises:
        DataError: No class of a split is among those of training, or one is in other letters.
    """
    splits = dict(source.splits)
    for name in (VALIDATION, TEST):
        split = splits.get(name)
        if split is None or not len(split.labels):
            continue
        if (split.labels == UNLABELLED).all():
            _warn(
                f"{source.origin}: its {name} split has no labels and is left out; {name} images "
                "are held out from training, if any are wanted"
            )
            del splits[name]
        elif (split.labels == LACKING).any():
            splits[name] = _of_known_classes(source, name, split)
    return source._replace(splits=splits)


def relabelled(split: EncodedSplit, table: NDArray[np.int64]) -> EncodedSplit:
    """Keep the images whose labels a table (classes,) maps to new labels."""
    labels = np.where(split.labels < 0, split.labels, table[np.maximum(split.labels, 0)])
    return replace(split, labels=labels).take(np.flatnonzero(labels != LACKING))


def some_of(names: Sequence[str]) -> str:
    """Abbreviate a list of names: ``cat, dog, … (12 in all)``."""
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")


def _of_known_classes(source: Source, name: str, split: EncodedSplit) -> EncodedSplit:
    lacking = split.labels == LACKING
    alike = {known.strip().casefold(): known for known in source.classes}
    for stranger in split.strangers:
        known = alike.get(stranger.strip().casefold())
        if known is not None or lacking.all():
            meant = f"; did you mean '{known}'?" if known is not None else ""
            raise DataError(
                f"{split.locate(int(np.flatnonzero(lacking)[0]))}: class '{stranger}' is not among "
                f"the training classes{meant}"
            )
    _warn(
        f"{source.origin}: {lacking.sum():,} of {len(lacking):,} {name} images are of "
        f"{some_of(split.strangers)}, not among the training classes, and are left out"
    )
    return split.take(np.flatnonzero(~lacking))


def _warn(message: str) -> None:
    warnings.warn(message, SmallfryWarning, stacklevel=4)
