"""Named data sets, and the lookup of a data source by name or folder."""

import math
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smallfry.data.curves import read_curves
from smallfry.data.faces import read_faces
from smallfry.data.folders import read_folder
from smallfry.data.generators import generated_names
from smallfry.data.parquet_shards import count_rows
from smallfry.data.registered import OWN, find_reader
from smallfry.data.shard_index import find_shards, read_shards
from smallfry.data.sources import TRAIN, EncodedSplit, Hub, Source, read_hub
from smallfry.errors import DataError, SmallfryWarning, UsageError, nearest
from smallfry_runtime.names import path_of

HUB: Mapping[str, Hub] = {
    "cifar10": Hub("uoft-cs/cifar10"),
    "cifar100": Hub("uoft-cs/cifar100", label="fine_label"),
    "mnist": Hub("ylecun/mnist"),
    "fashion_mnist": Hub("zalando-datasets/fashion_mnist"),
}
NAMED = (*OWN, *generated_names())
NO_ROOT: Mapping[str, str] = {
    "digits": "comes with scikit-learn",
    **dict.fromkeys(("curves", *generated_names()), "is generated"),
}
NOTHING_TO_TELL_APART: Mapping[str, str] = {
    "curves": "all its images are of one class",
    "faces": "its validation and test images show other people than its training images",
}


def is_named(name: str) -> bool:
    """Return whether a name is that of a data set, rather than of a folder.

    Example:
        >>> from smallfry.data import is_named
        >>> is_named("digits"), is_named("./digits")
        (True, False)
    """
    return name in NAMED or find_reader(name) is not None


def full_name(name: str) -> str:
    """Return the absolute path of a folder of data; the name of other data as it is."""
    folder = path_of(name)
    return str(folder.resolve()) if name and not is_named(name) and folder.is_dir() else name


def find_source(
    name: str,
    root: Path | None = None,
    label: str | None = None,
    stream_above: float = math.inf,
    skip_unreadable: bool = False,
    image: str | None = None,
) -> Source:
    """Find the source of a named data set or of a folder.

    A data set of the hub is looked for in ``root`` (or its subfolder of that name), then in the
    local cache of ``datasets``, then on the hub.

    Args:
        name: The name or folder.
        root: Folder of a named data set.
        label: Name of the label column.
        stream_above: Parquet shards with more training images than this are indexed, to be read
            piece by piece; tar files always are.
        skip_unreadable: Leave damaged shards out with a warning.
        image: Name of the image column of a folder's parquet shards.

    Raises:
        UsageError: ``name`` is neither a known name nor a folder, or its images have no columns.
        DataError: The source can't be reached, or what is there can't be used.
    """
    if name not in NAMED:
        return _read(find_folder(name, root), label, None, stream_above, skip_unreadable, image)
    if image is not None:
        raise UsageError(f"data.image_column is of a folder's tables, not of {name}: leave it out")
    if Path(name).is_dir() and root is None:
        warnings.warn(
            f"'{name}' selects the data set of that name; for the folder use './{name}'",
            SmallfryWarning,
            stacklevel=3,
        )
    require_no_root(name, root)
    if root is not None:
        root = path_of(str(root))
        if not root.is_dir():
            raise DataError(f"data.root: no such folder '{root}'")
    if name == "digits":
        return read_digits()
    if name == "curves":
        return read_curves()
    if name == "faces":
        return read_faces(root, label)
    hub = HUB[name]
    if root is None:
        return read_hub(name, hub, label)
    inner = root / name
    folder = inner if inner.is_dir() else root
    return _read(folder, label, hub.label, stream_above, skip_unreadable)


def require_no_root(name: str, root: Path | None) -> None:
    """Refuse a folder for a data set that needs none.

    Raises:
        UsageError: There is one.
    """
    if root is not None and name in NO_ROOT:
        raise UsageError(f"{name} {NO_ROOT[name]} and does not use data.root")


def read_digits() -> Source:
    """Load scikit-learn's 1,797 handwritten digits, 8×8, 17 grey levels."""
    pixels, labels = _digits()
    split = EncodedSplit(
        labels=labels.copy(),
        read=lambda i: pixels[i].copy(),
        locate=lambda i: f"digits[{i}]",
    )
    return Source("scikit-learn", tuple(map(str, range(10))), {TRAIN: split})


@cache  # they are a table of text, and short runs in one process read it again and again
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the pixels, (images, 1, 8, 8), and labels, (images,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return pixels, digits.target.astype(np.int64)


def find_folder(name: str, root: Path | None) -> Path:
    """Find a folder by its name.

    Raises:
        UsageError: There is none, the name is empty, or a root is given too.
    """
    if not name:  # which is the current folder to pathlib
        raise UsageError("data.name is empty: expected a data set or a folder")
    folder = path_of(name)
    if root is not None:
        raise UsageError(
            f"data.root applies to named data sets, not to the folder '{name}'"
            f"{nearest(name, NAMED)}"
        )
    if not folder.is_dir():
        what = " but a file" if folder.is_file() else ""
        raise UsageError(
            f"'{name}' is neither a folder nor a known data set{what}; expected a folder of images "
            f"or a data set such as digits or cifar10{nearest(name, NAMED)}"
        )
    return folder


def _read(
    folder: Path,
    label: str | None,
    default_label: str | None,
    stream_above: float,
    skip_unreadable: bool,
    image: str | None = None,
) -> Source:
    found = find_shards(folder)
    if found is not None and (
        found.kind == "tar" or count_rows(found.files.get(TRAIN, [])) > stream_above
    ):
        return read_shards(folder, found, label, default_label, skip_unreadable, image)
    return read_folder(folder, label, default_label, image)
