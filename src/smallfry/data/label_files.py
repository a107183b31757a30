"""Labels of images in a CSV or JSON-lines file beside them."""

import ast
import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smallfry.data.fingerprint import digest, stamp
from smallfry.data.sources import (
    LACKING,
    SPLIT_NAMES,
    TRAIN,
    UNLABELLED,
    EncodedSplit,
    Source,
    class_texts,
)
from smallfry.errors import DataError, UsageError, nearest
from smallfry_runtime.files import open_regular
from smallfry_runtime.inputs import in_order, list_folder
from smallfry_runtime.names import text_of

log = logging.getLogger(__name__)

MOST_BYTES = 2**30  # of a file of labels
MOST_HEAD = 2**16  # letters of its first line
IMAGE_NAMES = ("image", "file", "filename", "file_name", "path", "image_path", "image_id", "id")
LABEL_NAMES = ("label", "class", "category", "target", "class_name")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # that names may lack
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
DELIMITERS = ",;\t|"
GLUED = re.compile(r"""['"]\s+['"]""")  # in a list that NumPy wrote, without commas
ROW_NUMBERS = ("", "Unnamed: 0")  # names of the column of row numbers that pandas writes


class LabelColumns(NamedTuple):
    """Names of the columns of a file of labels; None for the usual ones."""

    image: str | None = None
    label: str | None = None
    split: str | None = None


class Record(NamedTuple):
    """Row of a file, with its image found."""

    where: str  # for messages
    image: Path
    split: str
    cells: Mapping[str, Any]
    image_column: str
    split_column: str | None  # None: all are for training


class _Row(NamedTuple):
    where: str  # for messages
    image: Path
    label: str  # "" for none
    split: str


def read_label_file(folder: Path, file: Path, columns: LabelColumns | None = None) -> Source:
    """Read a data set of images that a file names, with a label each.

    Args:
        folder: Folder of the images.
        file: CSV with a line of column names, separated by commas, semicolons, tabs or bars; or
            JSON lines (.jsonl), or a list in JSON (.json), of an object for each image. Its
            place is relative to ``folder``. Images are relative to the file, or to the folder;
            their names may lack the extension.
        columns: Names of its columns. Without a column of splits, all images are for training.

    Raises:
        UsageError: No such column, or several that could be meant.
        DataError: The file, or what it names, can't be used; the message has the line.
    """
    place = folder / file
    rows = list(_rows(folder, place, columns or LabelColumns()))
    seen: dict[Path, str] = {}
    for row in rows:
        if row.image in seen:
            raise DataError(f"{row.where}: {row.image} has a row before ({seen[row.image]})")
        seen[row.image] = row.where
    train = [row for row in rows if row.split == TRAIN]
    if not train:
        raise DataError(f"{place}: no row is of the train split")
    classes = in_order({row.label for row in train if row.label})
    splits = {
        split: _encoded([row for row in rows if row.split == split], classes)
        for split in dict.fromkeys(row.split for row in rows)
    }
    listed = list_folder(Path(os.path.abspath(folder))).images  # as the rows have them
    if unlisted := len({*listed} - {*seen}):
        log.info("%s: ignored %d images that %s does not list", folder, unlisted, place.name)
    return Source(str(place), class_texts(str(place), classes), splits, tuple(classes))


def _encoded(rows: Sequence[_Row], classes: Sequence[str]) -> EncodedSplit:
    places = dict.fromkeys(("", "-1"), UNLABELLED)  # but −1 may be a class, as of tables
    places |= {name: label for label, name in enumerate(classes)}
    labels = np.array([places.get(row.label, LACKING) for row in rows], np.int64)
    return EncodedSplit(
        labels,
        lambda i: rows[i].image,
        lambda i: str(rows[i].image),
        digest(*(stamp(row.image) for row in rows)),
        strangers=tuple(in_order({row.label for row in rows} - {*places})),
    )


def _rows(folder: Path, place: Path, columns: LabelColumns) -> Iterator[_Row]:
    """Yield the rows of a file with their images and labels."""
    records, names = read_records(folder, place, columns)
    others = [n for n in names if n not in (records[0].image_column, records[0].split_column)]
    usual = LABEL_NAMES if len(others) != 1 else tuple(others)
    label = choose_column(place, names, columns.label, "label", usual)
    for record in records:
        text = text_of(_text(record.where, record.cells.get(label)))
        yield _Row(record.where, record.image, text, record.split)


def read_records(
    folder: Path, place: Path, columns: LabelColumns
) -> tuple[list[Record], list[str]]:
    """Read the rows of a file, and the names of its columns; raises as ``read_label_file``."""
    try:
        with open_regular(place, MOST_BYTES) as stream:
            text = stream.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{place}: no such file of labels; data.labels is relative to the data's folder"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: can't be read as UTF-8 text ({error})") from error
    is_json = place.suffix.lower() in JSON_ENDINGS
    records = list(_json_records(place, text) if is_json else _csv_records(place, text))
    if not records:
        raise DataError(f"{place}: holds no images; expected column names and a row for each image")
    every = dict.fromkeys(name for _, record in records for name in record)
    names = [name for name in every if name not in ROW_NUMBERS]
    image = choose_column(place, names, columns.image, "image_column", IMAGE_NAMES)
    split = None
    if columns.split is not None or "split" in (name.lower() for name in names):
        split = choose_column(place, names, columns.split, "split_column", ("split",))
    found = []
    for where, record in records:
        said = _text(where, record.get(split)).lower() if split is not None else ""
        if said and said not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise DataError(f"{where}: unknown split '{said}'; expected one of {known}")
        file = _image(folder, place, _text(where, record.get(image)), where)
        found.append(Record(where, file, SPLIT_NAMES.get(said, TRAIN), record, image, split))
    return found, names


def choose_column(
    place: Path, names: Sequence[str], given: str | None, option: str, usual: Sequence[str]
) -> str:
    """Choose a column by the option, or else the one with a usual name.

    Raises:
        UsageError: There is none, or there are several.
    """
    if given is not None:
        if given not in names:
            hint = nearest(given, names)
            raise UsageError(f"data.{option}: {place} has no column '{given}'{hint}")
        return given
    found = [name for name in names if name.lower() in usual or name in usual]
    if len(found) == 1:
        return found[0]
    which = f"{' and '.join(found)} could be it" if found else "none has a usual name"
    raise UsageError(
        f"{place}: name its column with data.{option}: {which}; there are {', '.join(names)}"
    )


def _image(folder: Path, place: Path, name: str, where: str) -> Path:
    """Find an image by its name in a row.

    Raises:
        DataError: It is missing, or outside the folder.
    """
    if not name:
        raise DataError(f"{where}: names no image")
    top = os.path.normpath(os.path.abspath(folder))
    places = [os.path.abspath(base / name) for base in dict.fromkeys((place.parent, folder))]
    inside = [Path(path) for path in places if os.path.commonpath([top, path]) == top]
    if not inside:
        raise DataError(f"{where}: '{name}' is outside {folder}; move the images into it")
    for path in inside:
        endings = (*ENDINGS, *map(str.upper, ENDINGS))
        for each in (path, *(path.with_name(path.name + ending) for ending in endings)):
            if os.path.isfile(each):  # also False of a name that no file can have
                return each
    raise DataError(f"{where}: no image '{name}' in {folder}")


def _csv_records(place: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    head = re.sub(r'"[^"]*"', "", text[:MOST_HEAD]).split("\n", 1)[0]  # without quoted names
    delimiter = max(DELIMITERS, key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if len({*names}) != len(names):
            raise DataError(f"{place}: two columns have one name: {', '.join(names)}")
        for record in reader:
            where = f"{place}, line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{where}: {len(names)} cells were expected, as in the first line")
            yield where, record
    except csv.Error as error:
        raise DataError(f"{place}, line {reader.reader.line_num}: not CSV ({error})") from error


def _json_records(place: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        if place.suffix.lower() == ".json":
            records = [(f"{place}, entry {n}", r) for n, r in enumerate(json.loads(text), 1)]
        else:
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            records = [(f"{place}, line {n}", json.loads(line)) for n, line in lines]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: not JSON, or not a list or lines of it ({error})") from error
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f'{where}: expected an object, such as {{"image": …, "label": …}}')
        yield where, record


def list_in(where: str, cell: Any) -> list[Any] | None:
    """Read a cell that holds a list as Python writes it, and pandas into a table.

    Returns:
        The list, or None for other cells, such as the name "[none]".

    Raises:
        DataError: A list of another form.
    """
    text = cell.strip() if isinstance(cell, str) else ""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = None if GLUED.search(text) else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if isinstance(found, list):
        return found
    if any(mark in text for mark in ",'\""):
        raise DataError(
            f"{where}: {text[:60]} is no list of class names; expected one such as ['cat', 'dog']"
        )
    return None


def _text(where: str, value: Any) -> str:
    """Convert a cell to text; None and NaN are empty."""
    if isinstance(value, list | dict) or list_in(where, value) is not None:
        raise DataError(f"{where}: a cell holds several values ({value!r}); expected one")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()
