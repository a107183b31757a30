"""Shared files: restored to the bit from their base, and refused when damaged or hostile."""

import hashlib
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry_runtime.errors import DataError
from smallfry_runtime.shared import HEAD, MAGIC, Part, part_of, restore, write_shared

FULL = np.arange(48, dtype="<f4").reshape(6, 8)
BASE = b"before" + FULL.tobytes() + b"after"


def original(part):
    return b"head " + part.tobytes() + b" tail"


def shared(shape, blocks):
    part = part_of(FULL, shape, blocks)
    return original(part), [Part(5, 6, FULL.shape, shape, blocks)]


@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.data())
def test_parts_are_the_first_values_of_each_block_of_each_axis(rows, columns, data):
    kept = (
        data.draw(st.integers(1, 6 // rows)) * rows,
        data.draw(st.integers(1, 8 // columns)) * columns,
    )
    found = part_of(FULL, kept, (rows, columns))
    by_row = [b * 6 // rows + i for b in range(rows) for i in range(kept[0] // rows)]
    by_column = [b * 8 // columns + i for b in range(columns) for i in range(kept[1] // columns)]
    assert np.array_equal(found, FULL[np.ix_(by_row, by_column)])
    content, parts = shared(kept, (rows, columns))
    assert restore(write_shared(content, BASE, parts), BASE) == content


@pytest.mark.parametrize(
    ("shape", "blocks"), [((7, 8), (1, 1)), ((4, 8), (4, 1)), ((6, 3), (1, 2))]
)
def test_what_is_no_part_is_refused(shape, blocks):
    with pytest.raises(ValueError, match="no part of its tensor"):
        part_of(FULL, shape, blocks)


def test_several_parts_and_what_lies_between_are_restored():
    first, second = part_of(FULL, (2, 8), (1, 1)), part_of(FULL, (6, 4), (1, 2))
    content = b"a" + first.tobytes() + b"bc" + second.tobytes()
    parts = [Part(1, 6, (6, 8), (2, 8), (1, 1)), Part(67, 6, (6, 8), (6, 4), (1, 2))]
    assert restore(write_shared(content, BASE, parts), BASE) == content


def test_a_large_tensor_is_not_stored_again():
    full = np.random.default_rng(0).standard_normal((200, 100)).astype("<f4")
    part = part_of(full, (100, 50), (2, 1))
    content = original(part)
    found = write_shared(content, full.tobytes(), [Part(5, 0, (200, 100), (100, 50), (2, 1))])
    assert len(found) < 300 < len(content)


def test_every_altered_byte_and_every_truncation_is_an_error():
    content, parts = shared((2, 4), (1, 1))
    data = write_shared(content, BASE, parts)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(DataError):
            restore(bytes(changed), BASE)
    for length in range(len(data)):
        with pytest.raises(DataError):
            restore(data[:length], BASE)


def test_another_base_is_refused():
    content, parts = shared((2, 4), (1, 1))
    with pytest.raises(DataError, match="not the one that this sub-model shares"):
        restore(write_shared(content, BASE, parts), BASE + b"more")


def forged(**changes):
    """A file with a right checksum and wrong content."""
    content, parts = shared((2, 4), (1, 1))
    header = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "base": hashlib.sha256(BASE).hexdigest(),
        "parts": [list(part) for part in parts],
        **changes,
    }
    packed = zlib.compress(json.dumps(header).encode())
    body = len(packed).to_bytes(4, "little") + packed + zlib.compress(b"head  tail")
    assert len(MAGIC) + 8 == HEAD
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": 10**12},
        {"bytes": -1},
        {"bytes": "3"},
        {"sha256": "0"},
        {"parts": [[5, 6, [6, 8], [2, 4]]]},
        {"parts": [[5, 6, [6, 8], [2, 4], [1]]]},
        {"parts": [[5, 6, [6, 8], [0, 4], [1, 1]]]},
        {"parts": [[5, 6, [10**9, 10**9], [2, 4], [1, 1]]]},
        {"parts": [[5, 10**9, [6, 8], [2, 4], [1, 1]]]},
        {"parts": [[-5, 6, [6, 8], [2, 4], [1, 1]]]},
        {"parts": [[50, 6, [6, 8], [2, 4], [1, 1]]]},
        {"parts": [[5, 6, [6, 8], [2, 4], [1, 1]]] * 2},
        {"parts": 3},
    ],
)
def test_hostile_contents_are_refused(changes):
    assert restore(forged(), BASE) == shared((2, 4), (1, 1))[0]
    with pytest.raises(DataError, match="damaged"):
        restore(forged(**changes), BASE)
