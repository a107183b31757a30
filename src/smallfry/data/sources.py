"""From a name or a folder to labelled, still encoded images."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry.data.images import Encoded
from smallfry.errors import DataError, UsageError, nearest

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


NAMED: Mapping[str, Hub | None] = {
    "digits": None,  # comes with scikit-learn
    "cifar10": Hub("uoft-cs/cifar10"),
    "cifar100": Hub("uoft-cs/cifar100", label="fine_label"),
    "mnist": Hub("ylecun/mnist"),
    "fashion_mnist": Hub("zalando-datasets/fashion_mnist"),
}


@dataclass(frozen=True)
class EncodedSplit:
    """Images that are still encoded, or already pixels, each with a label.

    Args:
        labels: (images,) class indices.
        read: The i-th image, as a file, as bytes, or as pixels (channels, height, width).
        locate: Where the i-th image is, for messages.
        fingerprint: Changes when the content does; "" where the images need no cache.
    """

    labels: NDArray[np.int64]
    read: Callable[[int], Encoded | NDArray[np.uint8]]
    locate: Callable[[int], str]
    fingerprint: str = ""


class Source(NamedTuple):
    """What was found: class names, and the splits that there are."""

    origin: str
    classes: tuple[str, ...]
    splits: dict[str, EncodedSplit]


def find_source(name: str, root: Path | None = None, label: str | None = None) -> Source:
    """The source of a named data set or of a folder.

    A named data set is looked for in ``root`` (or its subfolder of that name), then in the local
    cache of ``datasets``, then on the hub.

    Raises:
        UsageError: ``name`` is neither a known name nor a folder.
        DataError: The source can't be reached, or what is there can't be used.
    """
    if name not in NAMED:
        folder = Path(name).expanduser()
        if root is not None:
            raise UsageError(
                f"data.root goes with a named data set, not with the folder '{name}'"
                f"{nearest(name, NAMED)}"
            )
        if not folder.is_dir():
            raise UsageError(
                f"'{name}' is neither a folder nor a known data set{nearest(name, NAMED)}"
            )
        return read_folder(folder, label)
    hub = NAMED[name]
    if hub is None:
        if root is not None:
            raise UsageError("digits comes with scikit-learn and takes no data.root")
        return read_digits()
    if root is not None:
        folder = root.expanduser()
        if not folder.is_dir():
            raise DataError(f"data.root: there is no folder '{root}'")
        inner = folder / name
        return read_folder(inner if inner.is_dir() else folder, label or hub.label)
    return read_hub(name, hub, label)


def read_digits() -> Source:
    """scikit-learn's 1,797 real handwritten digits, 8×8, 17 grey levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    split = EncodedSplit(
        labels=digits.target.astype(np.int64),
        read=lambda i: pixels[i],
        locate=lambda i: f"digits[{i}]",
    )
    return Source("scikit-learn", tuple(map(str, range(10))), {TRAIN: split})


def read_folder(folder: Path, label: str | None = None) -> Source:
    """Parquet shards, or one folder per class, in the folder or in one folder per split."""
    shards = _parquet_shards(folder)
    if shards:
        return _read_parquet(folder, shards, label)
    inner = {
        SPLIT_NAMES[child.name.lower()]: child
        for child in sorted(folder.iterdir())
        if child.is_dir() and child.name.lower() in SPLIT_NAMES
    }
    if TRAIN in inner:
        return _read_class_folders(folder, inner)
    return _read_class_folders(folder, {TRAIN: folder})


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
    return _read_tables(f"hub: {hub.repository}", splits, label or hub.label)


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


def _parquet_shards(folder: Path) -> dict[str, list[str]]:
    """Files such as ``train-00000-of-00004.parquet``, by split."""
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    shards: dict[str, list[str]] = {}
    for file in files:
        prefix = file.stem.split("-")[0].split("_")[0].lower()
        shards.setdefault(SPLIT_NAMES.get(prefix, TRAIN), []).append(str(file))
    return shards


def _read_parquet(folder: Path, shards: dict[str, list[str]], label: str | None) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset("parquet", data_files=shards)
    except Exception as error:
        raise DataError(
            f"{folder}: its parquet files can't be read ({error.__cause__ or error})"
        ) from error
    return _read_tables(str(folder), dict(loaded), label)


def _read_tables(origin: str, tables: dict[str, Any], label: str | None) -> Source:
    """Tables of the ``datasets`` library with an image and a label column."""
    from datasets import ClassLabel

    if TRAIN not in tables:
        raise DataError(f"{origin}: there is no train split, only {', '.join(tables) or 'none'}")
    features = tables[TRAIN].features
    image_column = _image_column(origin, features)
    label_column = _label_column(origin, features, image_column, label)
    kind = features[label_column]
    if isinstance(kind, ClassLabel):
        classes = tuple(kind.names)
    else:
        found = sorted(set(tables[TRAIN][label_column]) - {None})
        classes = tuple(map(str, found))
    index = {name: i for i, name in enumerate(classes)}
    splits = {
        split: _table_split(origin, split, table, image_column, label_column, index)
        for split, table in tables.items()
    }
    return Source(origin, classes, splits)


def _image_column(origin: str, features: Mapping[str, Any]) -> str:
    from datasets import Image as ImageFeature

    for name, kind in features.items():
        if isinstance(kind, ImageFeature) or (isinstance(kind, dict) and "bytes" in kind):
            return name
    raise DataError(f"{origin}: no column holds images; there are {', '.join(features)}")


def _label_column(
    origin: str, features: Mapping[str, Any], image_column: str, label: str | None
) -> str:
    from datasets import ClassLabel

    others = [name for name in features if name != image_column]
    if label in others:
        return str(label)
    by_type = [name for name in others if isinstance(features[name], ClassLabel)]
    candidates = by_type or [name for name in others if "label" in name.lower()] or others
    if len(candidates) == 1:
        return candidates[0]
    raise DataError(
        f"{origin}: which column is the label? there are {', '.join(others) or 'none'}; "
        "name it: --data.label COLUMN"
    )


def _table_split(
    origin: str,
    split: str,
    table: Any,
    image_column: str,
    label_column: str,
    index: dict[str, int],
) -> EncodedSplit:
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    def locate(row: int) -> str:
        return f"{origin}, {split} row {row}"

    labels = table[label_column]
    if not isinstance(table.features[label_column], ClassLabel):
        unknown = next((row for row, value in enumerate(labels) if str(value) not in index), None)
        if unknown is not None:
            raise DataError(
                f"{locate(unknown)}: label {labels[unknown]!r} is not among the training classes"
            )
        labels = [index[str(value)] for value in labels]
    array = np.array([-1 if value is None else value for value in labels], dtype=np.int64)
    if isinstance(table.features[image_column], ImageFeature):
        encoded = table.cast_column(image_column, ImageFeature(decode=False))
    else:
        encoded = table

    def read(row: int) -> Encoded:
        cell = encoded[row][image_column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{locate(row)}: a label without an image")
        return Path(cell["path"]) if cell["bytes"] is None else bytes(cell["bytes"])

    return EncodedSplit(array, read, locate, _digest("table", split, table._fingerprint))


# One folder per class


def _read_class_folders(folder: Path, splits: dict[str, Path]) -> Source:
    from torchvision.datasets.folder import find_classes, make_dataset

    extensions = tuple(Image.registered_extensions())
    for path in splits.values():
        _refuse_loose_images(path, extensions)
    try:
        classes, index = find_classes(str(splits[TRAIN]))
    except FileNotFoundError:
        raise DataError(
            f"{splits[TRAIN]}: expected one folder per class with images in it, or parquet files, "
            "and found neither"
        ) from None
    if len(classes) < 2:
        raise DataError(f"{splits[TRAIN]}: there is one class, '{classes[0]}'; two are needed")
    encoded = {}
    for split, path in splits.items():
        strangers = sorted({p.name for p in path.iterdir() if _is_class(p)} - set(classes))
        if strangers:
            raise DataError(f"{path}: class '{strangers[0]}' is not among the training classes")
        samples = make_dataset(str(path), index, extensions=extensions, allow_empty=True)
        labels = np.array([target for _, target in samples], dtype=np.int64)
        missing = set(range(len(classes))) - set(labels.tolist()) if split == TRAIN else set()
        if missing:
            raise DataError(
                f"{path / classes[min(missing)]}: the class is empty; put images of a format that "
                "Pillow reads into it, or remove the folder"
            )
        encoded[split] = _file_split([Path(file) for file, _ in samples], labels)
    return Source(str(folder), tuple(classes), encoded)


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _refuse_loose_images(folder: Path, extensions: tuple[str, ...]) -> None:
    loose = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in extensions and p.is_file()]
    if loose:
        raise DataError(
            f"{loose[0]}: an image without a label; expected one folder per class, "
            f"such as {folder / 'cat' / loose[0].name}"
        )


def _file_split(files: list[Path], labels: NDArray[np.int64]) -> EncodedSplit:
    stats = [file.stat() for file in files]
    content = [f"{f}\0{s.st_size}\0{s.st_mtime_ns}" for f, s in zip(files, stats, strict=True)]
    return EncodedSplit(
        labels, lambda i: files[i], lambda i: str(files[i]), _digest("files", *content)
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
