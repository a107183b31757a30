"""Parquet shards: labels in one pass, images one row group at a time.

A row group is the least that the format lets one read, so it is what has to fit in memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from smallfry.data.fingerprint import digest
from smallfry.data.parquet_bounds import open_bounded
from smallfry.data.shard_scan import (
    NO_SPANS,
    Block,
    Label,
    Scanned,
    label_of,
    reached,
    unreadable_shard,
)
from smallfry.errors import DataError

MOST_BLOCK = 2**30  # bytes of the images of one row group
LABELS_AT_ONCE = 65_536
FAULTS = (pa.ArrowException, OSError, ValueError)  # names that are no text are a ValueError
SAMPLED = 64  # places of a shard whose bytes are looked at, to notice other images
SAMPLED_BYTES = 64  # of each


def features(file: Path) -> Mapping[str, Any]:
    """Return the columns of a shard in the schema of the ``datasets`` library.

    Raises:
        DataError: Not a whole parquet file.
    """
    from datasets import Features

    try:
        with reached(file):
            return dict(Features.from_arrow_schema(pq.read_schema(file)))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_damaged(file, error)) from error


def count_rows(files: Sequence[Path]) -> int:
    """Count the rows of all intact files by their footers.

    Raises:
        AccessError: A file can't be read now.
    """
    total = 0
    for file in files:
        try:
            with reached(file):
                total += pq.read_metadata(file).num_rows
        except FAULTS:
            continue  # scanning will report it
    return total


def scan(file: Path, image: str, label: str, withheld: bool = False) -> Scanned:
    """Index the labels and row groups of a shard, without its images.

    Args:
        file: The shard.
        image: The column with the images.
        label: The column with the labels.
        withheld: Take null and −1 for the label −1, as splits have them whose labels are withheld.

    Raises:
        AccessError: The shard can't be read now.
        DataError: The shard has other columns, a sample without a label, or too large row groups.
    """
    try:
        with reached(file), open_bounded(file, [image, label]) as shard:
            columns = features(file)
            lacking = [name for name in (image, label) if name not in columns]
            if lacking:
                raise DataError(f"{file}: has no column '{lacking[0]}', unlike the first shard")
            blocks = [_block(file, shard, i) for i in range(shard.num_row_groups)]
            names, codes = _labels(file, shard, label, columns[label], withheld)
            if sum(block.samples for block in blocks) != len(codes):
                raise pa.ArrowInvalid("its row groups have another number of labels than of rows")
            mark = _mark(file)
        return Scanned(names, codes, blocks, mark, NO_SPANS, [])
    except FAULTS as error:
        return unreadable_shard(_damaged(file, error))


def read_group(file: Path, group: int, image: str) -> pa.ChunkedArray:
    """Read the encoded images of a row group as bytes or null, equal ones stored once.

    Raises:
        AccessError: The shard can't be read now.
        DataError: The row group is damaged.
    """
    try:
        with reached(file), open_bounded(file, [image]) as shard:
            inside = pa.types.is_struct(shard.schema_arrow.field(image).type)
            column = f"{image}.bytes" if inside else image
            table = shard.read_row_group(group, columns=[column], use_threads=False)
            table.validate(full=True)  # reading leaves indices into dictionaries unchecked
        return pc.struct_field(table.column(0), [0]) if inside else table.column(0)
    except FAULTS as error:
        raise DataError(f"{file}: row group {group} is damaged ({_first_line(error)})") from error


def _labels(
    file: Path, shard: pq.ParquetFile, column: str, kind: Any, withheld: bool
) -> tuple[list[Label], NDArray[np.int32]]:
    declared: list[str] | None = getattr(kind, "names", None)
    known: dict[Label, int] = {}
    parts = [np.empty(0, np.int32)]
    done = 0
    for batch in shard.iter_batches(LABELS_AT_ONCE, columns=[column], use_threads=False):
        batch.validate(full=True)
        values = batch.column(0)
        if not isinstance(values, pa.DictionaryArray):
            values = values.dictionary_encode()
        listed = values.dictionary.to_pylist()
        translated = [_label(value, declared) for value in listed]
        missing = known.setdefault(-1, len(known)) if withheld and values.null_count else -1
        if withheld:
            translated = [-1 if raw == -1 else v for raw, v in zip(listed, translated, strict=True)]
        codes = [-1 if v is None else known.setdefault(v, len(known)) for v in translated]
        # nulls, and values that are no label, are -1
        indices = values.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)
        part = np.array([*codes, missing], np.int32)[indices]
        wrong = np.flatnonzero(part < 0)
        if len(wrong):
            row = int(wrong[0])
            expected = f"a number from 0 to {len(declared) - 1}" if declared else "a number or text"
            raise DataError(
                f"{file} row {done + row}: its label, {values[row].as_py()!r}, is missing or not "
                f"{expected}"
            )
        parts.append(part)
        done += len(part)
    return list(known), np.concatenate(parts)


def _label(value: Any, declared: list[str] | None) -> Label | None:
    if declared is None:
        return label_of(value)
    if isinstance(value, int) and 0 <= value < len(declared):
        return declared[value]
    return None


def _block(file: Path, shard: pq.ParquetFile, group: int) -> Block:
    # figures of single columns in a damaged footer can end the process inside of PyArrow 26
    found = shard.metadata.row_group(group)
    size = max(0, found.total_byte_size)
    if size > MOST_BLOCK:
        raise DataError(
            f"{file}: its row group {group} holds {size / 1e9:.1f} GB, but a row group must fit "
            f"in memory; write row groups of at most {MOST_BLOCK / 1e9:.1f} GB, better of about "
            f"1,000 "
            "rows"
        )
    return Block(found.num_rows, size)


def _mark(file: Path) -> str:
    """Hash the footer, which holds the layout, and bytes sampled from the file."""
    length = file.stat().st_size
    parts = []
    with open(file, "rb") as stream:
        stream.seek(-8, 2)
        size = int.from_bytes(stream.read(4), "little")
        stream.seek(-(8 + size), 2)
        parts.append(stream.read(size).hex())
        end = max(0, length - 8 - size - SAMPLED_BYTES)
        for place in np.unique(np.linspace(0, end, SAMPLED).astype(np.int64)).tolist():
            stream.seek(place)
            parts.append(stream.read(SAMPLED_BYTES).hex())
    return digest(*parts)


def _damaged(file: Path, error: Exception) -> str:
    return f"{file}: not a whole parquet file ({_first_line(error)}); copy or write it again"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
