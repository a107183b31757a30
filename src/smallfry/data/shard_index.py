"""Indexed folders of shards: parquet or WebDataset tar files, read piece by piece.

The index of a split holds the label of every sample and which samples are read together, and for
tar files where each image is: 4 to 20 bytes a sample, kept in the cache folder.
"""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from smallfry.data import parquet_shards, tar_shards
from smallfry.data.cache import cache_folder, content_hash
from smallfry.data.fingerprint import digest, stamp
from smallfry.data.folders import folders_in
from smallfry.data.shard_scan import Label, Scanned, reached
from smallfry.data.shards import ShardReader, Shards
from smallfry.data.sources import (
    LACKING,
    SPLIT_NAMES,
    TRAIN,
    UNLABELLED,
    EncodedSplit,
    Source,
    class_texts,
    find_image_column,
    find_label_column,
    shard_files,
)
from smallfry.errors import DataError, SmallfryWarning, UsageError
from smallfry_runtime.files import DIGEST, has_valid_digest, with_digest
from smallfry_runtime.names import text_of

log = logging.getLogger(__name__)

FORMAT = 3  # of the index; changes whenever it does
CLASSES = "classes.txt"  # one class name per line, in the order of the labels' numbers
COMPRESSED = ("*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz", "*.tar.zst")


class ShardFiles(NamedTuple):
    """Shards of a folder."""

    kind: str  # parquet or tar
    files: dict[str, list[Path]]  # by split


def find_shards(folder: Path) -> ShardFiles | None:
    """Find the parquet or tar files of a folder, by split; None if there are none.

    Raises:
        DataError: Tar files are compressed, or their names have no split.
    """
    files = shard_files(folder)
    if files:
        return ShardFiles("parquet", files)
    files = shard_files(folder, "tar")
    inside = {path.name.lower() for path in folders_in(folder)}
    if files and not (
        inside - {*SPLIT_NAMES, "data"} and _have_no_split(files, folder)
    ):  # a tar file beside class folders
        return ShardFiles("tar", files)
    packed = sorted(file for ending in COMPRESSED for file in folder.glob(ending))
    if packed and not inside:
        raise DataError(
            f"{packed[0]}: a compressed tar file can't be read in pieces; unpack it to a .tar, "
            f"e.g. with gunzip"
        )
    return None


def read_shards(
    folder: Path,
    found: ShardFiles,
    label: str | None = None,
    default_label: str | None = None,
    skip_unreadable: bool = False,
    image: str | None = None,
) -> Source:
    """Read the splits of a folder of shards, leaving the images in place.

    Args:
        folder: The folder.
        found: Its shards.
        label: The column with the labels, or in tar files the key of KEY.json.
        default_label: The column that is taken if there are several and none is asked for.
        skip_unreadable: Leave out damaged shards, or the rest of one, with a warning.
        image: The column with the images of parquet shards.

    Raises:
        UsageError: A column is named that there is not.
        DataError: A shard is damaged, or a sample has no label or one that is not known.
    """
    if TRAIN not in found.files:
        raise DataError(f"{folder}: there is no train split, only {', '.join(found.files)}")
    column = ""
    names: list[str] | None = None
    if image is not None and found.kind == "tar":
        raise UsageError(f"data.image_column selects a column of a table; {folder} has tar files")
    if found.kind == "parquet":
        columns = parquet_shards.features(_first_whole(found.files[TRAIN], skip_unreadable))
        column = find_image_column(str(folder), columns, image)
        label = find_label_column(str(folder), columns, column, label, default_label)
        names = getattr(columns[label], "names", None)
    indices = {
        split: _index(files, found.kind, column, label, split != TRAIN)
        for split, files in found.files.items()
    }
    for index in indices.values():
        _tell_damage(index, skip_unreadable)
    declared = names or _names_in_file(folder)
    classes = declared or _names_that_occur(folder, indices[TRAIN])
    splits = {}
    for split, index in indices.items():
        shards = _shards(found.files[split], column, index)
        labels, strangers = _class_indices(index, classes, by_number=names is None)
        if split == TRAIN:
            _require_known(index, labels, shards, len(classes))
        stamps = map(stamp, found.files[split])
        mark = digest(column, shards.mark, *stamps)
        splits[split] = EncodedSplit(
            labels, ShardReader(shards).read_one, shards.locate, mark, shards, strangers
        )
    spelled = tuple(map(str, classes))
    return Source(str(folder), class_texts(str(folder), classes), splits, spelled)


def _have_no_split(files: dict[str, list[Path]], folder: Path) -> bool:
    return list(files) == [TRAIN] and all(file.parent == folder for file in files[TRAIN])


def _first_whole(files: Sequence[Path], skip_unreadable: bool) -> Path:
    for file in files:
        try:
            parquet_shards.features(file)
            return file
        except DataError:
            if not skip_unreadable:
                raise
    raise DataError(f"{files[0]}: none of the {len(files)} shards is a whole parquet file")


# The index


class _Index(NamedTuple):
    """Concatenated indexes of the shards of a split."""

    names: list[Label]
    codes: NDArray[np.int32]
    samples: NDArray[np.int64]  # (shards,)
    blocks: NDArray[np.int64]  # (shards,)
    block_samples: NDArray[np.int64]  # (blocks,)
    block_bytes: NDArray[np.int64]  # (blocks,)
    spans: NDArray[np.int64]
    mark: str
    left_out: list[str]
    damage: list[str]


ARRAYS = ("codes", "samples", "blocks", "block_samples", "block_bytes", "spans")


def _index(
    files: Sequence[Path], kind: str, column: str, label: str | None, withheld: bool
) -> _Index:
    """Index a split once, and cache the index; labels may be ``withheld``.

    Raises:
        AccessError: A shard can't be read now; then no index is kept.
        DataError: A shard is not as it should be, or the index can't be kept.
    """
    kinds = (kind, column, str(label), str(withheld))
    key = digest("index", str(FORMAT), *kinds, *map(stamp, files))
    folder = cache_folder() / f"index-{key}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # one of several processes makes it
            kept = _load_index(folder)
            if kept is not None:
                return kept
            log.info("reading the labels of %d shards once, for %s", len(files), folder)
            if kind == "parquet":
                scans = (parquet_shards.scan(f, column, str(label), withheld) for f in files)
                made = _join(files, scans)
            else:
                made = _join(files, (tar_shards.scan(f, label) for f in files))
            _keep_index(made, folder)
            return _load_index(folder) or made
    except OSError as error:
        raise DataError(
            f"{folder.parent}: the index of the shards can't be kept there ({error}); free space, "
            "or name another folder in the environment variable SMALLFRY_CACHE"
        ) from error


def _join(files: Sequence[Path], scans: Iterator[Scanned]) -> _Index:
    names: dict[Label, int] = {}
    codes, spans = [np.empty(0, np.int32)], [np.empty((0, 2), np.int64)]
    samples, counts, blocks, marks = [], [], [], []
    left_out: list[str] = []
    damage: list[str] = []
    for file, scan in zip(files, scans, strict=True):
        ours = np.array([names.setdefault(name, len(names)) for name in scan.names], np.int32)
        codes.append(ours[scan.codes] if len(ours) else scan.codes)
        spans.append(scan.spans)
        samples.append(len(scan.codes))
        counts.append(len(scan.blocks))
        blocks += scan.blocks
        with reached(file):
            marks.append(f"{file.name}\0{file.stat().st_size}\0{scan.mark}")
        left_out += scan.left_out
        damage += [scan.damage] if scan.damage else []
    sizes = np.array(blocks, np.int64).reshape(-1, 2)
    return _Index(
        list(names),
        np.concatenate(codes),
        np.array(samples, np.int64),
        np.array(counts, np.int64),
        sizes[:, 0],
        sizes[:, 1],
        np.concatenate(spans),
        digest(*marks),
        left_out,
        damage,
    )


def _keep_index(index: _Index, folder: Path) -> None:
    part = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".part"))
    try:
        told = index._asdict()
        arrays = {name: told.pop(name) for name in ARRAYS}
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array, allow_pickle=False)
        told["hashes"] = {name: content_hash(array) for name, array in arrays.items()}
        (part / "index.json").write_text(json.dumps(with_digest(told)))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _load_index(folder: Path) -> _Index | None:
    try:
        told = json.loads((folder / "index.json").read_text())
        if not has_valid_digest(told):
            return None
        del told[DIGEST]
        hashes = told.pop("hashes")
        for name in ARRAYS:  # mapped, so that they need not stay in memory
            told[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if content_hash(told[name]) != hashes[name]:
                return None
        return _Index(**told)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, BadZipFile):
        return None


def _tell_damage(index: _Index, skip_unreadable: bool) -> None:
    if index.damage and not skip_unreadable:
        more = f"; {len(index.damage) - 1} more are damaged" if len(index.damage) > 1 else ""
        raise DataError(
            f"{index.damage[0]}{more}, or leave out what can't be read: --data.skip_unreadable true"
        )
    for told, what in (
        (index.damage, "damaged shards, of which what can't be read is left out"),
        (index.left_out, "members of tar files that are no samples left out"),
    ):
        if told:
            warnings.warn(
                f"{len(told)} {what}, the first: {told[0]}", SmallfryWarning, stacklevel=4
            )


def _shards(files: Sequence[Path], column: str, index: _Index) -> Shards:
    def edges(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    return Shards(
        tuple(files),
        column,
        edges(index.samples),
        edges(index.blocks),
        edges(index.block_samples),
        np.array(index.block_bytes),
        index.spans,
        index.mark,
    )


# Classes


def _names_in_file(folder: Path) -> list[str] | None:
    file = folder / CLASSES
    if not file.is_file():
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read as text ({error})") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    twice = [a for a, b in pairwise(sorted(names)) if a == b]
    if twice or "" in names:
        wrong = f"'{twice[0]}' stands there twice" if twice else "a line is empty"
        raise DataError(f"{file}: expected one class name per line, but {wrong}")
    return names or None


def _names_that_occur(folder: Path, index: _Index) -> list[Any]:
    kinds = {type(name) for name in index.names}
    if len(kinds) > 1:
        text = next(name for name in index.names if isinstance(name, str))
        raise DataError(
            f"{folder}: some labels are numbers and some are text, such as '{text}'; expected one "
            "kind"
        )
    return sorted({_key(name) for name in index.names})


def _class_indices(
    index: _Index, classes: Sequence[Any], by_number: bool
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Map labels to class indices (samples,), and return the unknown labels.

    A number is the place of its class if the classes are text.
    """
    places: dict[Any, int] = dict.fromkeys((-1, "-1"), UNLABELLED)
    if by_number and classes and isinstance(classes[0], str):
        places |= {i: i for i in range(len(classes))}
    places |= {_key(name): i for i, name in enumerate(classes)}
    table = np.array([places.get(_key(name), LACKING) for name in index.names], np.int64)
    strangers = tuple(str(index.names[i]) for i in np.flatnonzero(table == LACKING))
    return table[index.codes] if len(table) else np.empty(0, np.int64), strangers


def _require_known(index: _Index, labels: NDArray[np.int64], shards: Shards, classes: int) -> None:
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        row = int(unknown[0])
        raise DataError(
            f"{shards.locate(row)}: label {index.names[index.codes[row]]!r} is not among the "
            f"{classes} classes of the training split"
        )


def _key(name: Label) -> Label:
    return text_of(name) if isinstance(name, str) else name
