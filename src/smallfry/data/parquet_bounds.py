"""Decoded size of parquet columns, measured without decoding them.

A dictionary stores a value once, however many cells have it: 4 kB of a file may stand for
gigabytes, without a trace in its footer. Read as dictionaries, columns take no more than what is
stored. A page is unpacked whole, and takes several times its size meanwhile: what is packed too
tightly is refused by the footer.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smallfry.data.shard_scan import MOST_BYTES, reached
from smallfry.errors import DataError

MOST_ROWS = 2**26  # of a file
MOST_DECODED = 2**30  # bytes that a file may decode to, or
MOST_EXPANSION = 100  # times its size, whichever is more
MOST_UNPACKED = 2**28  # bytes of a row group, or MOST_EXPANSION times the file's
AT_ONCE = 2**26  # bytes that are read at a time, if the footer is right
ROWS_AT_ONCE = 1000


class Decoded(NamedTuple):
    """Memory of decoded cells, in bytes."""

    total: int
    largest: int  # of a cell


def open_bounded(file: Path, columns: Iterable[str]) -> pq.ParquetFile:
    """Open a parquet file with the texts and bytes of some columns as dictionaries.

    Args:
        file: The file.
        columns: Names of its columns, of the outermost level.

    Raises:
        DataError: Too many rows, or in these columns lists, or what unpacks to too much.
        pa.ArrowException, OSError, ValueError: Not a whole parquet file.
    """
    wanted = set(columns)
    with pq.ParquetFile(file) as shard:
        rows, schema = shard.metadata.num_rows, shard.schema
        leaves = [schema.column(i) for i in range(len(schema.names))]
        _require_loosely_packed(file, shard.metadata)
    leaves = [leaf for leaf in leaves if leaf.path.partition(".")[0] in wanted]
    if rows > MOST_ROWS:
        raise DataError(
            f"{file}: has {rows:,} rows, more than the limit of {MOST_ROWS:,}: split it"
        )
    lists = [leaf.path.partition(".")[0] for leaf in leaves if leaf.max_repetition_level]
    if lists:
        raise DataError(
            f"{file}: its column '{lists[0]}' holds lists; expected one image, or one class, in a "
            "cell"
        )
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(file, read_dictionary=texts)


def _require_loosely_packed(file: Path, footer: Any) -> None:
    """Check the packing of whole row groups: PyArrow aborts on the columns of a damaged footer."""
    most = max(MOST_UNPACKED, MOST_EXPANSION * file.stat().st_size)
    for group in range(footer.num_row_groups):
        size = footer.row_group(group).total_byte_size
        if size > most:
            raise DataError(
                f"{file}: row group {group} unpacks to {size / 1e9:,.1f} GB, over "
                f"{MOST_EXPANSION} times the file; rewrite it with smaller row groups"
            )


def decoded_size(column: Any) -> Decoded:
    """Measure a PyArrow array as if each cell had a value of its own."""
    if isinstance(column, pa.ChunkedArray):
        parts = [decoded_size(chunk) for chunk in column.chunks]
        return Decoded(sum(p.total for p in parts), max((p.largest for p in parts), default=0))
    if isinstance(column, pa.StructArray):
        parts = [decoded_size(part) for part in column.flatten()]
        return Decoded(sum(p.total for p in parts), sum(p.largest for p in parts))
    if isinstance(column, pa.DictionaryArray):
        lengths = pc.binary_length(column.dictionary).take(column.indices.drop_null())
        return _sum(lengths)
    if pa.types.is_binary(column.type) or pa.types.is_string(column.type):
        return _sum(pc.binary_length(column))
    return Decoded(column.nbytes, 0)


def rows_at_once(files: Sequence[Path], columns: Sequence[str]) -> int:
    """Return the number of rows to decode at a time: 1,000, or fewer if they are large.

    Files that are damaged, or lack a column, are passed over: reading them will report it.

    Raises:
        AccessError: A file can't be read now.
        DataError: A cell, or a file, that decodes to more than is safe.
    """
    largest = 1
    for file in files:
        try:
            with reached(file), open_bounded(file, columns) as shard:
                if set(columns) <= set(shard.schema_arrow.names):
                    largest = max(largest, _largest_cell(file, shard, columns))
        except (pa.ArrowException, OSError, ValueError):
            continue
    return max(1, min(ROWS_AT_ONCE, AT_ONCE // largest))


def _largest_cell(file: Path, shard: pq.ParquetFile, columns: Sequence[str]) -> int:
    most = max(MOST_DECODED, MOST_EXPANSION * file.stat().st_size)
    total = largest = done = 0
    for group in range(shard.num_row_groups):
        size = max(1, shard.metadata.row_group(group).total_byte_size)
        rows = max(1, min(ROWS_AT_ONCE, ROWS_AT_ONCE * AT_ONCE // size))
        for batch in shard.iter_batches(rows, [group], list(columns), use_threads=False):
            sizes = [decoded_size(column) for column in batch.columns]
            total += sum(size.total for size in sizes)
            largest = max([largest, *(size.largest for size in sizes)])
            if largest > MOST_BYTES:
                raise DataError(
                    f"{file}: rows {done:,} to {done + len(batch) - 1:,} hold a cell of "
                    f"{largest / 1e6:,.0f} MB; at most {MOST_BYTES / 1e6:.0f} are read"
                )
            if total > most:
                raise DataError(
                    f"{file}: its first {done + len(batch):,} rows alone decode to "
                    f"{total / 1e9:,.1f} GB, over {MOST_EXPANSION} times the file; such a file can "
                    "only be read piece by piece, with --data.stream true"
                )
            done += len(batch)
    return largest


def _sum(lengths: Any) -> Decoded:
    sizes = np.asarray(lengths.drop_null(), np.int64)
    return Decoded(int(sizes.sum()), int(sizes.max(initial=0)))
