"""Labelled, encoded images from a folder or the Hub."""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.data.fingerprint import digest, stamp
from smallfry.data.shard_scan import label_of
from smallfry.errors import AccessError, DataError, UsageError, nearest
from smallfry_runtime.images import Encoded
from smallfry_runtime.inputs import in_order, is_hidden
from smallfry_runtime.names import text_of

if TYPE_CHECKING:
    from smallfry.data.shards import Shards

log = logging.getLogger(__name__)

IMAGE_COLUMNS = frozenset({"image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp"})

TRAIN, VALIDATION, TEST = "train", "validation", "test"
UNLABELLED, LACKING = -1, -2  # labels of images without one, and of classes that training lacks
SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
    "testing": TEST,
}


class Hub(NamedTuple):
    """Data set on the Hugging Face Hub."""

    repository: str
    label: str = "label"


@dataclass(frozen=True)
class EncodedSplit:
    """Encoded images, or pixels, each with a label.

    Args:
        labels: (images,) class indices.
        read: The i-th image, as a file, as bytes, or as pixels (channels, height, width).
        locate: Description of the i-th image's position, for messages.
        fingerprint: Changes when the content does; "" where the images need no cache.
        shards: Shards of the images, if they can be read shard by shard.
        strangers: Classes that training lacks; their images are labelled ``LACKING``.
    """

    labels: NDArray[np.int64]
    read: Callable[[int], Encoded | NDArray[np.uint8]]
    locate: Callable[[int], str]
    fingerprint: str = ""
    shards: "Shards | None" = None
    strangers: tuple[str, ...] = ()

    def take(self, rows: NDArray[np.int64]) -> "EncodedSplit":
        """Select images, in that order, each to be read on its own."""
        which = hashlib.sha256(rows.tobytes()).hexdigest()
        return EncodedSplit(
            self.labels[rows],
            lambda i: self.read(int(rows[i])),
            lambda i: self.locate(int(rows[i])),
            digest(self.fingerprint, which) if self.fingerprint else "",
        )


class Source(NamedTuple):
    """Class names and splits of a data set."""

    origin: str
    classes: tuple[str, ...]
    splits: dict[str, EncodedSplit]
    spelled: tuple[str, ...] = ()  # the classes as the source spells them, if that is otherwise


def class_texts(origin: str, names: Sequence[Any]) -> tuple[str, ...]:
    """Convert class names to distinct texts.

    Raises:
        DataError: Two that differ in how they spell their accents alone.
    """
    texts = tuple(text_of(str(name)) for name in names)
    twice = [name for name, count in Counter(texts).items() if count > 1]
    if twice:
        raise DataError(
            f"{origin}: two classes are named '{twice[0]}', in composed and in decomposed "
            f"Unicode; merge them"
        )
    return texts


def require_one_name(origin: str, split: str, names: Sequence[str]) -> None:
    """Refuse two names for one split, such as ``val`` and ``validation``.

    Raises:
        DataError: The names differ.
    """
    if len(set(names)) > 1:
        raise DataError(
            f"{origin}: {' and '.join(sorted(set(names)))} are both the {split} split; merge "
            f"them, or move one away"
        )


def read_hub(name: str, hub: Hub, label: str | None = None) -> Source:
    """Read a named data set from the local cache of ``datasets``, or else from the Hub."""
    import datasets

    try:
        with _offline():
            loaded = datasets.load_dataset(hub.repository)
    except Exception:  # whatever the cache lacks, the hub may have
        log.info("downloading %s from the Hub", hub.repository)
        try:
            loaded = datasets.load_dataset(hub.repository)
        except Exception as error:
            raise DataError(
                f"{name}: not in the local cache, and the Hub can't be reached "
                f"({type(error).__name__}); go online, or pass a folder with its parquet shards: "
                f"--data.root DIR"
            ) from error
    known = [split for split in loaded if split in SPLIT_NAMES]
    for split in known:
        same = [other for other in known if SPLIT_NAMES[other] == SPLIT_NAMES[split]]
        require_one_name(f"hub: {hub.repository}", SPLIT_NAMES[split], same)
    splits = {SPLIT_NAMES[split]: loaded[split] for split in known}
    fingerprints = {split: str(table._fingerprint) for split, table in splits.items()}
    return _read_tables(f"hub: {hub.repository}", splits, fingerprints, label, hub.label)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of ``datasets``, which count files and rows."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """Restrict ``datasets`` to its cache."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


# Parquet


def shard_files(folder: Path, ending: str = "parquet") -> dict[str, list[Path]]:
    """Find files such as ``train-00000-of-00004.parquet`` or ``train/0000.parquet``, by split."""
    inner = [name for name in os.listdir(folder) if name.lower() in {"data", *SPLIT_NAMES}]
    places = [folder, *(folder / name for name in in_order(inner))]
    files = sorted(
        file for place in places for file in place.glob(f"*.{ending}") if not is_hidden(file.name)
    )
    files = [part for file in files for part in _parts(file, ending)]
    shards: dict[str, list[Path]] = {}
    words_of: dict[str, set[str]] = {}  # by split
    unnamed = []
    for file in files:
        words = re.split(r"[-_.]", file.parent.name) if file.parent != folder else []
        words += re.split(r"[-_.]", file.stem)
        named = {word: SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}
        if len(set(named.values())) == 1:
            word, split = next(iter(named.items()))
            shards.setdefault(split, []).append(file)
            words_of.setdefault(split, set()).add(word)
        else:
            unnamed.append(file)
    for split, said in words_of.items():
        require_one_name(str(folder), split, sorted(said))
    if unnamed and shards:
        raise DataError(
            f"{unnamed[0]}: unknown split: other files here have train, validation or test in "
            f"their names, but this one does not"
        )
    return {TRAIN: unnamed} if unnamed else shards


def _parts(file: Path, ending: str) -> list[Path]:
    """Return the file itself, or the files in a folder of that name, as written by Spark."""
    if not file.is_dir():
        return [file]
    return sorted(part for part in file.glob(f"*.{ending}") if not is_hidden(part.name))


def read_parquet(
    folder: Path,
    shards: dict[str, list[Path]],
    label: str | None,
    default_label: str | None,
    image: str | None = None,
) -> Source:
    """Read the tables in parquet files, by split; raises as ``read_hub``."""
    import datasets

    from smallfry.data.parquet_bounds import rows_at_once

    columns = _columns(folder, next(iter(shards.values()))[0], label, default_label, image)
    rows = {split: rows_at_once(files, columns or []) for split, files in shards.items()}
    tables = {}
    try:
        for split, files in shards.items():  # one by one, as each may have class names of its own
            given = {split: list(map(str, files))}
            with without_bars():
                loaded = datasets.load_dataset(
                    "parquet", data_files=given, batch_size=rows[split], columns=columns
                )
            tables[split] = loaded[split]
    except Exception as error:
        raise DataError(
            f"{folder}: its parquet files can't be read ({error.__cause__ or error})"
        ) from error
    fingerprints = {split: digest(*map(stamp, files)) for split, files in shards.items()}
    return _read_tables(str(folder), tables, fingerprints, label, default_label, folder, image)


def _columns(
    folder: Path,
    file: Path,
    label: str | None,
    default_label: str | None,
    wanted: str | None,
) -> list[str] | None:
    """Return the image and label columns, to decode no others; None for a damaged file."""
    from smallfry.data.parquet_shards import features

    try:
        found = features(file)
    except AccessError:
        raise
    except DataError:
        return None  # reading it will report it
    image = find_image_column(str(folder), found, wanted)
    return [image, find_label_column(str(folder), found, image, label, default_label)]


def _read_tables(
    origin: str,
    tables: dict[str, Any],
    fingerprints: dict[str, str],
    label: str | None,
    default_label: str | None = None,
    folder: Path | None = None,
    wanted: str | None = None,
) -> Source:
    """Read tables of the ``datasets`` library with an image and a label column."""
    if TRAIN not in tables:
        raise DataError(f"{origin}: no train split, only {', '.join(tables) or 'none'}")
    features = tables[TRAIN].features
    image = find_image_column(origin, features, wanted)
    chosen = find_label_column(origin, features, image, label, default_label)
    declared = getattr(features[chosen], "names", None)
    classes = declared or sorted(set(map(label_of, _label_values(tables[TRAIN], chosen))) - {None})
    splits = {
        split: _table_split(
            f"{origin}, {split}", table, image, chosen, classes, fingerprints[split], folder
        )
        for split, table in tables.items()
    }
    return Source(origin, class_texts(origin, classes), splits, tuple(map(str, classes)))


def find_image_column(origin: str, features: Mapping[str, Any], wanted: str | None = None) -> str:
    """Find the column of a table that holds images, as ``datasets`` writes them or as bytes.

    Args:
        origin: The table, for errors.
        features: Kinds of its columns by their names.
        wanted: Name of the column; default the only one that may hold images.
    """
    from datasets import Image as ImageFeature

    if wanted is not None and wanted not in features:
        others = [*features]
        raise UsageError(f"{origin} has no column '{wanted}' for images{nearest(wanted, others)}")
    features = features if wanted is None else {wanted: features[wanted]}
    for name, kind in features.items():
        if isinstance(kind, ImageFeature) or (isinstance(kind, dict) and "bytes" in kind):
            return name
    binary = [name for name, kind in features.items() if is_bytes(kind)]
    named = [name for name in binary if name.lower() in IMAGE_COLUMNS]
    if len(named or binary) == 1:
        return (named or binary)[0]
    if binary:
        raise DataError(
            f"{origin}: unclear which column holds the images, with bytes in {', '.join(binary)}; "
            f"select it: --data.image_column COLUMN"
        )
    there = ", ".join(f"{name} ({getattr(kind, 'dtype', '…')})" for name, kind in features.items())
    raise DataError(
        f"{origin}: no column holds images, as encoded bytes or as {{bytes, path}}; found {there}"
    )


def is_bytes(kind: Any) -> bool:
    """Return whether a column holds raw bytes, as pandas and pyarrow write them."""
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def find_label_column(
    origin: str,
    features: Mapping[str, Any],
    image_column: str,
    label: str | None,
    default: str | None,
) -> str:
    """Find the column of a table that holds labels: the requested one, or the only candidate."""
    from datasets import ClassLabel

    others = [name for name in features if name != image_column]
    if label is not None and label not in others:
        raise UsageError(f"{origin} has no column '{label}' for labels{nearest(label, others)}")
    if label is not None or default in others:
        return str(label or default)
    by_type = [name for name in others if isinstance(features[name], ClassLabel)]
    candidates = by_type or [name for name in others if "label" in name.lower()] or others
    if len(candidates) == 1:
        return candidates[0]
    raise DataError(
        f"{origin}: unclear which column is the label, of {', '.join(others) or 'none'}; select "
        f"it: --data.label COLUMN"
    )


def _table_split(
    where: str,
    table: Any,
    image_column: str,
    label_column: str,
    classes: Sequence[Any],
    fingerprint: str,
    folder: Path | None,
) -> EncodedSplit:
    """Build a split from a table whose images may be files, only inside ``folder``."""
    from datasets import Image as ImageFeature

    def locate(row: int) -> str:
        return f"{where} row {row}"

    values = list(map(label_of, _label_values(table, label_column)))
    labels, strangers = class_indices(values, list(map(label_of, classes)))
    encoded = table
    if isinstance(table.features[image_column], ImageFeature):
        encoded = table.cast_column(image_column, ImageFeature(decode=False))

    def read(row: int) -> Encoded:
        cell = encoded[row][image_column]
        if isinstance(cell, bytes):
            return cell
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{locate(row)}: a label without an image")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        file = Path(cell["path"])
        if folder is None or not (folder / file).resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"{locate(row)}: its image is not in the table but in '{file}', outside the "
                "table's folder; move it there, or store the images in the table"
            )
        return folder / file

    # images in files of their own may change under a table that does not
    cells = encoded.data.column(image_column).combine_chunks()
    inside = is_bytes(table.features[image_column]) or cells.field("bytes").null_count == 0
    mark = digest(fingerprint, image_column) if inside else ""
    return EncodedSplit(labels, read, locate, mark, strangers=strangers)


def class_indices(
    values: Sequence[Any], classes: Sequence[Any]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Map class names or numbers to labels (samples,), and return the unknown names.

    None is ``UNLABELLED``, and so is −1, which stands for no label where labels are withheld.
    """
    index: dict[Any, int] = {-1: UNLABELLED, None: UNLABELLED}
    index |= {name: i for i, name in enumerate(classes)}
    strangers = sorted({str(value) for value in values if value not in index})
    labels = np.array([index.get(value, LACKING) for value in values], dtype=np.int64)
    return labels, tuple(strangers)


def _label_values(table: Any, label_column: str) -> list[Any]:
    """Return the labels of a table as class names, or as raw values."""
    from datasets import ClassLabel

    kind = table.features[label_column]
    values: list[Any] = table[label_column][:]
    if not isinstance(kind, ClassLabel):
        other = (v for v in values if not isinstance(v, int | float | str | None))
        if (odd := next(other, None)) is not None:
            raise DataError(
                f"the labels in '{label_column}' are no numbers or texts but of the type "
                f"{type(odd).__name__}; expected one class per image; select another column: "
                "--data.label COLUMN"
            )
        return values
    count = len(kind.names)
    return [kind.names[v] if v is not None and 0 <= v < count else None for v in values]
