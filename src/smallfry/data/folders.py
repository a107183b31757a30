"""Image folders: parquet tables, or one folder per class, optionally inside one per split."""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smallfry.data.fingerprint import digest, stamp
from smallfry.data.sources import (
    LACKING,
    SPLIT_NAMES,
    TRAIN,
    EncodedSplit,
    Source,
    read_parquet,
    require_one_name,
    shard_files,
)
from smallfry.errors import DataError, SmallfryWarning, UsageError
from smallfry_runtime.artifacts import is_artifact
from smallfry_runtime.inputs import (
    in_order,
    is_hidden,
    is_image,
    list_folder,
    unread_pictures,
)
from smallfry_runtime.names import text_of

log = logging.getLogger(__name__)


class ClassFolder(NamedTuple):
    """Folder of one class."""

    path: Path
    images: list[Path]
    others: list[Path]  # files that are no images by their names
    skipped: list[Path]  # folders in it that are a system's, or that smallfry wrote


def read_folder(
    folder: Path,
    label: str | None = None,
    default_label: str | None = None,
    image: str | None = None,
) -> Source:
    """Read parquet shards or class folders, in the folder or in one folder per split."""
    shards = shard_files(folder)
    if shards:
        return read_parquet(folder, shards, label, default_label, image)
    for option, column in (("label", label), ("image_column", image)):
        if column is not None:
            raise UsageError(
                f"data.{option} selects a column of a table, but {folder} has class folders"
            )
    return read_class_folders(folder)


def read_class_folders(folder: Path) -> Source:
    """Read the images of a folder with one folder per class, optionally inside one per split.

    Class names are compared as composed Unicode. Images of validation or test classes that
    training lacks are labelled ``LACKING``.

    Raises:
        DataError: Folders that can be meant in several ways, or that can't be opened.
    """
    places = _find_splits(folder)
    found = {}
    for split, place in places.items():
        _refuse_loose_images(place)
        _warn_of_broken_links(place)
        found[split] = _classes(place)
    train = places[TRAIN]
    classes = list(found[TRAIN])
    if not classes:
        raise DataError(
            f"{train}: expected one folder per class with images in it, or parquet files, but "
            f"found neither"
        )
    empty = [each for each in found[TRAIN].values() if not each.images]
    if empty:
        there = _endings(empty[0].others)
        raise DataError(
            f"{empty[0].path}: empty class folder{f', except for {there}' if there else ''}; add "
            f"images in a format that Pillow reads, or remove the folder"
        )
    loose = [file for place in {folder, *places.values()} for file in _files_in(place)]
    _report_left_out(folder, [each for split in found.values() for each in split.values()], loose)
    origin = train.parent if len(places) > 1 or train.name in SPLIT_NAMES else train
    splits = {split: _encoded(parts, classes) for split, parts in found.items()}
    spelled = tuple(each.path.name for each in found[TRAIN].values())
    return Source(str(origin), tuple(classes), splits, spelled)


def folders_in(folder: Path) -> list[Path]:
    """List the subfolders that may be a class or a split, sorted by name."""
    if not os.path.isdir(folder):  # also False of a name that no file can have
        return []
    names = [entry.name for entry in folder.iterdir() if not is_hidden(entry.name)]
    above = {folder.resolve(), *folder.resolve().parents}  # to which links may lead back
    paths = [folder / name for name in in_order(names)]
    return [path for path in paths if path.is_dir() and path.resolve() not in above]


def _find_splits(folder: Path) -> dict[str, Path]:
    """Find the folders of the splits; without any, the folder itself is for training."""
    inside = folders_in(folder)
    named = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    parted = [path for path in named if folders_in(path)]
    others = [path for path in inside if path not in parted and _has_images(path)]
    if not parted:
        if others and all(_begins_like_a_split(path.name) for path in others):
            names = ", ".join(text_of(path.name) for path in others[:5])
            raise DataError(
                f"{folder}: unclear whether {names} are splits; if so, name them train, val and "
                f"test, with one "
                "folder per class in each; if they are classes, rename one of them"
            )
        return {TRAIN: folder}
    splits: dict[str, Path] = {}
    for path in [*parted, *(path for path in named if path in others)]:
        split = SPLIT_NAMES[path.name.lower()]
        require_one_name(str(folder), split, [splits.get(split, path).name, path.name])
        if path in parted:
            splits[split] = path
    if TRAIN not in splits:
        raise DataError(f"{folder}: found a {min(splits)} folder, but no train folder beside it")
    _tell_neighbours(folder, splits, others)
    return splits


def _tell_neighbours(folder: Path, splits: dict[str, Path], others: Sequence[Path]) -> None:
    """Refuse or warn of image folders that may be classes beside one named like a split."""
    if not others:
        return
    names = ", ".join(text_of(path.name) for path in others[:5])
    if len(splits) == 1 and others[0].name.lower() not in SPLIT_NAMES:
        raise DataError(
            f"{splits[TRAIN]}: unclear whether this is a class like {names} or the training "
            f"split; rename a class, or for a split move {names} out of {folder}"
        )
    warnings.warn(
        f"{folder}: ignored {names}, with images outside the class folders of a split",
        SmallfryWarning,
        stacklevel=4,
    )


def _begins_like_a_split(name: str) -> bool:
    """Return whether a name starts like a split's, such as ``train2017`` or ``test_images``."""
    return re.split(r"[^a-z]", name.lower())[0] in SPLIT_NAMES


def _has_images(folder: Path) -> bool:
    return not is_artifact(os.listdir(folder)) and bool(list_folder(folder).images)


def _classes(folder: Path) -> dict[str, ClassFolder]:
    """Map class names to their folders, without those that smallfry wrote."""
    found: dict[str, ClassFolder] = {}
    for path in folders_in(folder):
        if is_artifact(os.listdir(path)):
            log.info("ignored %s, written by smallfry", path)
            continue
        each = ClassFolder(path, *list_folder(path))
        if each.skipped and not each.images and not unread_pictures(each.others):
            log.info("ignored %s, which contains only %s", path, each.skipped[0].name)
            continue
        name = text_of(path.name)
        if name in found:
            raise DataError(
                f"{folder}: two folders have the class name '{name}' in different bytes (composed "
                f"and decomposed Unicode, or Latin-1): {found[name].path.name!r} and "
                f"{path.name!r}; merge them"
            )
        found[name] = each
    return found


def _encoded(parts: dict[str, ClassFolder], classes: Sequence[str]) -> EncodedSplit:
    places = {name: label for label, name in enumerate(classes)}
    strangers = tuple(name for name in parts if name not in places and parts[name].images)
    order = [*(name for name in classes if name in parts), *strangers]
    files = [file for name in order for file in parts[name].images]
    counts = [len(parts[name].images) for name in order]
    labels = np.repeat([places.get(name, LACKING) for name in order], counts).astype(np.int64)
    return EncodedSplit(
        labels,
        lambda i: files[i],
        lambda i: str(files[i]),
        digest(*map(stamp, files)),
        strangers=strangers,
    )


def _refuse_loose_images(folder: Path) -> None:
    loose = sorted(p for p in folder.iterdir() if is_image(p.name) and not p.is_dir())
    if loose:
        raise DataError(
            f"{loose[0]}: an image without a label; expected one folder per class, "
            f"such as {folder / 'cat' / loose[0].name}"
        )


def _warn_of_broken_links(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and not is_hidden(path.name):
            warnings.warn(
                f"{path}: ignored a broken link; fix or remove it",
                SmallfryWarning,
                stacklevel=4,
            )


def _files_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not is_hidden(p.name) and p.is_file())


def _report_left_out(folder: Path, classes: Sequence[ClassFolder], loose: Sequence[Path]) -> None:
    """Log the number of ignored files and folders; warn if there are pictures among them."""
    others = [*loose, *(file for each in classes for file in each.others)]
    unread = unread_pictures(others)
    if unread:
        warnings.warn(
            f"{folder}: {len(unread)} pictures ignored, with unsupported formats or names: "
            f"{_endings(unread)}, such as {unread[0]}; convert them to JPEG or PNG",
            SmallfryWarning,
            stacklevel=4,
        )
    rest = _endings(sorted({*others} - {*unread}))
    if rest:
        log.info("%s: ignored files that are not images: %s", folder, rest)
    skipped = Counter(text_of(path.name) for each in classes for path in each.skipped)
    if skipped:
        told = ", ".join(f"{count} {name}" for name, count in skipped.most_common(5))
        log.info("%s: ignored folders of the system or of smallfry: %s", folder, told)


def _endings(files: Sequence[Path]) -> str:
    """Count files by extension, the most frequent first: ``20 .heic, 1 .txt``."""
    counts = Counter(file.suffix.lower() or "without an extension" for file in files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))
