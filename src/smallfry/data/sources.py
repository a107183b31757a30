"""From a folder or the hub to labelled, still encoded images."""

import errno
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import AccessError, DataError, UsageError, nearest
from smallfry.images import Encoded
from smallfry.inputs import images_below, is_image

if TYPE_CHECKING:
    from smallfry.data.shards import Shards

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
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
    """A data set on the Hugging Face hub."""

    repository: str
    label: str = "label"


@dataclass(frozen=True)
class EncodedSplit:
    """Images that are still encoded, or already pixels, each with a label.

    Args:
        labels: (images,) class indices.
        read: The i-th image, as a file, as bytes, or as pixels (channels, height, width).
        locate: Where the i-th image is, for messages.
        fingerprint: Changes when the content does; "" where the images need no cache.
        shards: Where the images are, if they can be read from there shard by shard.
    """

    labels: NDArray[np.int64]
    read: Callable[[int], Encoded | NDArray[np.uint8]]
    locate: Callable[[int], str]
    fingerprint: str = ""
    shards: "Shards | None" = None


class Source(NamedTuple):
    """What was found: class names, and the splits that there are."""

    origin: str
    classes: tuple[str, ...]
    splits: dict[str, EncodedSplit]


def read_folder(folder: Path, label: str | None = None, default_label: str | None = None) -> Source:
    """Parquet shards, or one folder per class, in the folder or in one folder per split."""
    shards = shard_files(folder)
    if shards:
        return _read_parquet(folder, shards, label, default_label)
    if label is not None:
        raise UsageError(f"data.label names a column of a table, and {folder} has class folders")
    inner = {
        SPLIT_NAMES[child.name.lower()]: child
        for child in sorted(folder.iterdir())
        if child.name.lower() in SPLIT_NAMES and class_names(child)
    }
    if inner and TRAIN not in inner:
        raise DataError(f"{folder}: there is a {min(inner)} folder, but no train folder beside it")
    return _read_class_folders(inner or {TRAIN: folder})


def read_hub(name: str, hub: Hub, label: str | None = None) -> Source:
    """A named data set from the local cache of ``datasets``, or else from the hub."""
    import datasets

    try:
        with _offline():
            loaded = datasets.load_dataset(hub.repository)
    except Exception:  # whatever the cache lacks, the hub may have
        log.info("asking the hub for %s", hub.repository)
        try:
            loaded = datasets.load_dataset(hub.repository)
        except Exception as error:
            raise DataError(
                f"{name}: not in the local cache, and the hub can't be reached "
                f"({type(error).__name__}); connect this machine, or name a folder that holds "
                f"its parquet shards: --data.root DIR"
            ) from error
    splits = {SPLIT_NAMES[split]: data for split, data in loaded.items() if split in SPLIT_NAMES}
    fingerprints = {split: str(table._fingerprint) for split, table in splits.items()}
    return _read_tables(f"hub: {hub.repository}", splits, fingerprints, label, hub.label)


@contextmanager
def _offline() -> Iterator[None]:
    """Let ``datasets`` look at nothing but its cache."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


# Parquet


def shard_files(folder: Path, ending: str = "parquet") -> dict[str, list[Path]]:
    """Files such as ``train-00000-of-00004.parquet`` or ``train/0000.parquet``, by split."""
    patterns = ("", "data/", *(f"{name}/" for name in SPLIT_NAMES))
    files = sorted(file for place in patterns for file in folder.glob(f"{place}*.{ending}"))
    shards: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        words = [file.parent.name] if file.parent != folder else []
        words += re.split(r"[-_.]", file.stem)
        named = {SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}
        if len(named) == 1:
            shards.setdefault(named.pop(), []).append(file)
        else:
            unnamed.append(file)
    if unnamed and shards:
        raise DataError(
            f"{unnamed[0]}: which split is this? other files here say train, validation or test "
            "in their names, and this one does not say one of them"
        )
    return {TRAIN: unnamed} if unnamed else shards


def _read_parquet(
    folder: Path, shards: dict[str, list[Path]], label: str | None, default_label: str | None
) -> Source:
    import datasets

    from smallfry.data.parquet_bounds import rows_at_once

    columns = _columns(folder, next(iter(shards.values()))[0], label, default_label)
    rows = {split: rows_at_once(files, columns or []) for split, files in shards.items()}
    tables = {}
    try:
        for split, files in shards.items():  # one by one, as each may have class names of its own
            given = {split: list(map(str, files))}
            loaded = datasets.load_dataset(
                "parquet", data_files=given, batch_size=rows[split], columns=columns
            )
            tables[split] = loaded[split]
    except Exception as error:
        raise DataError(
            f"{folder}: its parquet files can't be read ({error.__cause__ or error})"
        ) from error
    fingerprints = {split: digest(*map(stamp, files)) for split, files in shards.items()}
    return _read_tables(str(folder), tables, fingerprints, label, default_label, folder)


def _columns(
    folder: Path, file: Path, label: str | None, default_label: str | None
) -> list[str] | None:
    """The columns with images and labels, so that no other is decoded; None of a damaged file."""
    from smallfry.data.parquet_shards import features

    try:
        found = features(file)
    except AccessError:
        raise
    except DataError:
        return None  # reading it will say so
    image = find_image_column(str(folder), found)
    return [image, find_label_column(str(folder), found, image, label, default_label)]


def _read_tables(
    origin: str,
    tables: dict[str, Any],
    fingerprints: dict[str, str],
    label: str | None,
    default_label: str | None = None,
    folder: Path | None = None,
) -> Source:
    """Tables of the ``datasets`` library with an image and a label column."""
    if TRAIN not in tables:
        raise DataError(f"{origin}: there is no train split, only {', '.join(tables) or 'none'}")
    features = tables[TRAIN].features
    image = find_image_column(origin, features)
    chosen = find_label_column(origin, features, image, label, default_label)
    declared = getattr(features[chosen], "names", None)
    classes = declared or sorted(set(_label_values(tables[TRAIN], chosen)) - {None})
    splits = {
        split: _table_split(
            f"{origin}, {split}", table, image, chosen, classes, fingerprints[split], folder
        )
        for split, table in tables.items()
    }
    return Source(origin, tuple(map(str, classes)), splits)


def find_image_column(origin: str, features: Mapping[str, Any]) -> str:
    """The column of a table that holds images."""
    from datasets import Image as ImageFeature

    for name, kind in features.items():
        if isinstance(kind, ImageFeature) or (isinstance(kind, dict) and "bytes" in kind):
            return name
    raise DataError(f"{origin}: no column holds images; there are {', '.join(features)}")


def find_label_column(
    origin: str,
    features: Mapping[str, Any],
    image_column: str,
    label: str | None,
    default: str | None,
) -> str:
    """The column of a table that holds labels: the wanted one, or the only one that may."""
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
        f"{origin}: which column is the label? there are {', '.join(others) or 'none'}; "
        "name it: --data.label COLUMN"
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
    """A split of a table, whose images may be files in ``folder`` and nowhere else."""
    from datasets import Image as ImageFeature

    def locate(row: int) -> str:
        return f"{where} row {row}"

    index = {name: i for i, name in enumerate(classes)}
    labels = _label_values(table, label_column)
    unknown = next((r for r, v in enumerate(labels) if v is not None and v not in index), None)
    if unknown is not None:
        raise DataError(
            f"{locate(unknown)}: label {labels[unknown]!r} is not among the training classes"
        )
    array = np.array([-1 if v is None else index[v] for v in labels], dtype=np.int64)
    encoded = table
    if isinstance(table.features[image_column], ImageFeature):
        encoded = table.cast_column(image_column, ImageFeature(decode=False))

    def read(row: int) -> Encoded:
        cell = encoded[row][image_column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{locate(row)}: a label without an image")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        file = Path(cell["path"])
        if folder is None or not (folder / file).resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"{locate(row)}: its image is not in the table but in '{file}', outside the "
                "table's folder; move it in there, or put the images into the table"
            )
        return folder / file

    # images in files of their own may change under a table that does not
    inside = encoded.data.column(image_column).combine_chunks().field("bytes").null_count == 0
    return EncodedSplit(array, read, locate, digest(fingerprint, image_column) if inside else "")


def _label_values(table: Any, label_column: str) -> list[Any]:
    """The labels of a table as class names, or as the values that stand there."""
    from datasets import ClassLabel

    kind = table.features[label_column]
    values: list[Any] = table[label_column][:]
    if not isinstance(kind, ClassLabel):
        return values
    count = len(kind.names)
    return [kind.names[v] if v is not None and 0 <= v < count else None for v in values]


# One folder per class


def _read_class_folders(splits: dict[str, Path]) -> Source:
    train = splits[TRAIN]
    for folder in splits.values():
        _refuse_loose_images(folder)
    classes = class_names(train)
    if not classes:
        raise DataError(
            f"{train}: expected one folder per class with images in it, or parquet files, and "
            "found neither"
        )
    encoded = {}
    for split, folder in splits.items():
        strangers = sorted(set(class_names(folder)) - set(classes))
        if strangers:
            raise DataError(f"{folder}: class '{strangers[0]}' is not among the training classes")
        files = [images_below(folder / name) for name in classes]
        empty = [name for name, found in zip(classes, files, strict=True) if not found]
        if empty and split == TRAIN:
            raise DataError(
                f"{folder / empty[0]}: the class is empty; put images of a format that Pillow "
                "reads into it, or remove the folder"
            )
        labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
        encoded[split] = _file_split([file for found in files for file in found], labels)
    origin = train.parent if len(splits) > 1 or train.name in SPLIT_NAMES else train
    return Source(str(origin), tuple(classes), encoded)


def class_names(folder: Path) -> list[str]:
    """The names of the folders in a folder."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _refuse_loose_images(folder: Path) -> None:
    loose = sorted(p for p in folder.iterdir() if is_image(p.name) and not p.is_dir())
    if loose:
        raise DataError(
            f"{loose[0]}: an image without a label; expected one folder per class, "
            f"such as {folder / 'cat' / loose[0].name}"
        )


def _file_split(files: list[Path], labels: NDArray[np.int64]) -> EncodedSplit:
    fingerprint = digest(*map(stamp, files))
    return EncodedSplit(labels, lambda i: files[i], lambda i: str(files[i]), fingerprint)


def stamp(file: Path) -> str:
    """What changes whenever the content of the file may have changed."""
    try:
        found = file.stat()
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):  # it is there all the same
            raise AccessError(f"{file}: can't be read now ({error}); try again") from error
        return f"{file}\0missing"  # a broken link; reading it will say so
    times = f"{found.st_mtime_ns}\0{found.st_ctime_ns}"
    return f"{file.resolve()}\0{found.st_ino}\0{found.st_size}\0{times}"


def digest(*parts: str) -> str:
    """A fingerprint of what the parts say, as the name of a kept array."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
