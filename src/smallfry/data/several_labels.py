"""Images with several classes each: from a file of labels, or from class folders.

A file has a column of classes with separators, or a column of 0 and 1 for each class. In class
folders, the same image lies in several of them: as a link, or as a copy.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from smallfry.data.decoded import Decoding, decode_held_out, decode_training
from smallfry.data.fingerprint import digest, stamp
from smallfry.data.folders import read_class_folders
from smallfry.data.image_data import ImageData
from smallfry.data.label_files import (
    LABEL_NAMES,
    LabelColumns,
    Record,
    choose_column,
    list_in,
    read_records,
)
from smallfry.data.labels import some_of
from smallfry.data.sources import (
    LACKING,
    TEST,
    TRAIN,
    VALIDATION,
    EncodedSplit,
    class_texts,
    shard_files,
)
from smallfry.data.splits import Split, hold_out, take_some
from smallfry.errors import DataError, SmallfryWarning, UsageError, nearest
from smallfry_runtime.frames import Frame
from smallfry_runtime.inputs import in_order
from smallfry_runtime.names import text_of

SEVERAL_NAMES = (*LABEL_NAMES, "labels", "classes", "tags", "categories", "targets")
SEPARATORS = ("|", ";", ",")
YES_OR_NO = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


class LabelForm(NamedTuple):
    """Form of the labels in a file.

    Attributes:
        columns: Columns of 0 and 1, one for each class; empty for one column of classes.
        separator: Between the classes in a cell; default the one of | ; , that occurs.
    """

    columns: tuple[str, ...] = ()
    separator: str | None = None


class Labelled(NamedTuple):
    """Image with its classes."""

    path: Path
    classes: frozenset[str]
    split: str
    where: str  # for messages


class Found(NamedTuple):
    """Images of a source, and its classes in order."""

    origin: str
    images: list[Labelled]
    classes: tuple[str, ...]

    @property
    def encoded(self) -> EncodedSplit:
        """All images, without their labels."""
        return EncodedSplit(
            np.zeros(len(self.images), np.int64),
            lambda i: self.images[i].path,
            lambda i: str(self.images[i].path),
        )


def load_several(
    name: str,
    frame: Frame,
    channels: int,
    found: Found,
    *,
    validation: float,
    test: float,
    split_seed: int,
    limit: int | None,
    skip_unreadable: bool,
    bit_depth: int | None,
) -> ImageData:
    """Decode images with several classes into splits; arguments as ``load_data``.

    Held-out shares are stratified by the rarest class of each image. Labels are (images, classes).
    """
    places = {each: i for i, each in enumerate(found.classes)}
    parts = {kind: _encoded(found.images, kind) for kind in (TRAIN, VALIDATION, TEST)}
    tables = {kind: _table(found.images, kind, places) for kind in parts}
    present = {kind: part for kind, part in parts.items() if len(part.labels)}
    others = [part for kind, part in present.items() if kind != TRAIN]
    decoded: dict[str, Split] = {}
    decoding = Decoding(frame, channels, 1, skip_unreadable, bit_depth)
    train, decoding = decode_training(parts[TRAIN], others, decoding)
    decoded[TRAIN] = train
    for kind, part in present.items():
        if kind != TRAIN:
            decoded[kind] = decode_held_out(part, decoding)
    train = replace(train, labels=_rarest(tables[TRAIN])[train.rows])
    held, tested = decoded.get(VALIDATION), decoded.get(TEST)
    if tested is None:
        train, tested = hold_out(train, test, split_seed)
    if held is None:
        train, held = hold_out(train, validation, split_seed + 1)
    if limit is not None and limit < len(train):
        train = take_some(train, limit, split_seed + 2)
    kinds = {TRAIN: TRAIN, VALIDATION: VALIDATION, TEST: TEST}
    kinds |= {kind: TRAIN for kind in (VALIDATION, TEST) if kind not in decoded}
    splits = {
        kind: replace(split, labels=tables[kinds[kind]][split.rows])
        for kind, split in ((TRAIN, train), (VALIDATION, held), (TEST, tested))
    }
    _warn_of_missing(found, splits)
    return ImageData(
        *(name, found.origin, class_texts(found.origin, found.classes), frame.size, channels),
        splits[TRAIN],
        splits[VALIDATION],
        splits[TEST],
        skip_unreadable,
        found.classes,
        {kind: parts[kinds[kind]].locate for kind in kinds},
        decoding.bit_depth,
        resize=frame.resize,
    )


def find_several(
    folder: Path, labels: Path | None, columns: LabelColumns, form: LabelForm
) -> Found:
    """Find the images of a folder with their classes.

    Raises:
        UsageError: No such column, or a folder of tables.
        DataError: An image without labels, an unknown class, or a class without images.
    """
    if labels is not None:
        return _of_file(folder, labels, columns, form)
    if form != LabelForm():
        raise UsageError("data.label_columns and label_separator are of the file data.labels")
    if shard_files(folder):
        raise UsageError(
            f"{folder}: data.several_labels reads a file of labels (data.labels) or class folders, "
            "not tables"
        )
    return _of_folders(folder)


def _of_file(folder: Path, labels: Path, columns: LabelColumns, form: LabelForm) -> Found:
    place = folder / labels
    records, names = read_records(folder, place, columns)
    taken = {records[0].image_column, records[0].split_column}
    others = [name for name in names if name not in taken]
    wanted = form.columns or _columns_of_classes(records, others, columns.label)
    for number, name in enumerate(form.columns):
        if name in form.columns[:number]:
            raise UsageError(f"data.label_columns has '{name}' twice; leave out one")
        if name not in others:
            hint = nearest(name, others)
            raise UsageError(f"data.label_columns: {place} has no column '{name}'{hint}")
    if wanted:
        images = [
            Labelled(r.image, frozenset(c for c in wanted if _is_set(r, c)), r.split, r.where)
            for r in records
        ]
        classes = tuple(wanted)
    else:
        usual = SEVERAL_NAMES if len(others) != 1 else tuple(others)
        label = choose_column(place, names, columns.label, "label", usual)
        separator = form.separator or _separator(records, label)
        images = [
            Labelled(r.image, _classes_in(r, label, separator), r.split, r.where) for r in records
        ]
        classes = tuple(in_order({c for i in images if i.split == TRAIN for c in i.classes}))
    _require_known(images, classes)
    _require_one_row(images)
    for name in classes:
        if not any(name in image.classes for image in images if image.split == TRAIN):
            raise DataError(f"{place}: no training image has the class '{name}'; leave it out")
    if not classes:
        raise DataError(f"{place}: no training image has a class")
    return Found(str(place), images, classes)


def _columns_of_classes(
    records: Sequence[Record], others: Sequence[str], label: str | None
) -> tuple[str, ...]:
    """Return all other columns if they hold 0 and 1 alone, and none has the name of labels."""
    usual = any(name.lower() in SEVERAL_NAMES for name in others)
    if label is not None or usual or len(others) < 2:
        return ()
    first = records[0]
    binary = all(str(first.cells.get(name)).strip().lower() in YES_OR_NO for name in others)
    return tuple(others) if binary else ()


def _is_set(record: Record, column: str) -> bool:
    text = str(record.cells.get(column)).strip().lower()
    if text not in YES_OR_NO:
        raise DataError(f"{record.where}: column '{column}' must be 0 or 1, not '{text}'")
    return YES_OR_NO[text]


def _separator(records: Sequence[Record], label: str) -> str | None:
    cells = [
        value
        for record in records
        if isinstance(value := record.cells.get(label), str)
        and list_in(record.where, value) is None
    ]
    return next((each for each in SEPARATORS if any(each in cell for cell in cells)), None)


def _classes_in(record: Record, label: str, separator: str | None) -> frozenset[str]:
    value: Any = record.cells.get(label)
    if (listed := list_in(record.where, value)) is not None:
        value = listed
    if isinstance(value, list):
        if not all(isinstance(each, str | int) for each in value):
            raise DataError(f"{record.where}: expected a list of class names, not {value!r}")
        return frozenset(text_of(name) for each in value if (name := str(each).strip()))
    text = "" if value is None else str(value)
    found = re.split(re.escape(separator), text) if separator else [text]
    names = frozenset(text_of(name.strip()) for name in found if name.strip())
    if not names:
        raise DataError(
            f"{record.where}: has no labels; an image of no class has [] in JSON lines, or 0 in "
            "all columns of classes"
        )
    return names


def _of_folders(folder: Path) -> Found:
    source = read_class_folders(folder)
    images: list[Labelled] = []
    for kind, split in source.splits.items():
        if split.strangers:
            first = int((split.labels == LACKING).argmax())
            raise DataError(
                f"{split.locate(first)}: its {kind} split has the classes "
                f"{some_of(split.strangers)}, which training lacks"
            )
        merged: dict[Any, tuple[Path, set[str]]] = {}
        paths = [Path(str(split.read(i))) for i in range(len(split.labels))]
        for path, label in zip(paths, split.labels.tolist(), strict=True):
            key = _identity(path)
            merged.setdefault(key, (path, set()))[1].add(source.classes[label])
        images += [
            Labelled(path, frozenset(classes), kind, str(path)) for path, classes in merged.values()
        ]
    return Found(source.origin, images, source.classes)


def _identity(path: Path) -> bytes:
    """Return what is equal of links to a file, and of copies of it."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError:  # decoding names it
        return os.fsencode(path)


def _require_known(images: Sequence[Labelled], classes: Sequence[str]) -> None:
    known = frozenset(classes)
    for image in images:
        if strangers := image.classes - known:
            name = min(strangers)
            raise DataError(
                f"{image.where}: class '{name}' is not among the training classes"
                f"{nearest(name, classes)}"
            )


def _require_one_row(images: Sequence[Labelled]) -> None:
    seen: dict[Path, str] = {}
    for image in images:
        if image.path in seen:
            raise DataError(f"{image.where}: {image.path} has a row before ({seen[image.path]})")
        seen[image.path] = image.where


def _encoded(images: Sequence[Labelled], kind: str) -> EncodedSplit:
    paths = [image.path for image in images if image.split == kind]
    return EncodedSplit(
        np.zeros(len(paths), np.int64),
        lambda i: paths[i],
        lambda i: str(paths[i]),
        digest(*map(stamp, paths)),
    )


def _table(images: Sequence[Labelled], kind: str, places: Mapping[str, int]) -> torch.Tensor:
    """Return the classes of images, (images, classes), 0 or 1."""
    chosen = [image for image in images if image.split == kind]
    table = torch.zeros(len(chosen), len(places), dtype=torch.int64)
    for row, image in enumerate(chosen):
        for name in image.classes:
            table[row, places[name]] = 1
    return table


def _rarest(table: torch.Tensor) -> torch.Tensor:
    """Return the rarest class of each image, (images,); one more than all for none."""
    counts = table.sum(dim=0)
    rank = torch.where(table > 0, counts.double(), torch.inf)
    return torch.where(table.any(dim=1), rank.argmin(dim=1), table.shape[1])


def _warn_of_missing(found: Found, splits: Mapping[str, Split]) -> None:
    for kind in (TRAIN, VALIDATION):
        split = splits[kind]
        lacking = [
            c for c, n in zip(found.classes, split.labels.sum(0).tolist(), strict=True) if not n
        ]
        if lacking and len(split):
            warnings.warn(
                f"{found.origin}: no {kind} image of {some_of(lacking)}",
                SmallfryWarning,
                stacklevel=4,
            )
