"""Arrays of files that nobody vouches for: whatever they hold, an array or a reason comes out."""

import io
import warnings
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime.arrays import HEADER, random_inputs, read_array
from smallfry_runtime.errors import DataError
from smallfry_runtime.frames import Frame
from smallfry_runtime.images import decode

FRAME = Frame(2, 3, values="float32")
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5


def saved(values) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def with_header(header: str) -> bytes:
    encoded = header.encode()
    return b"\x93NUMPY\1\0" + len(encoded).to_bytes(2, "little") + encoded + bytes(24)


def read(content, frame=FRAME, channels=1):
    return read_array(content, "a.npy", frame, channels)


@pytest.mark.parametrize(
    "dtype", ["<f4", ">f4", "<f8", ">f8", "f2", "i1", "u1", ">i2", "<i8", "u8"]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_any_width_and_order_are_read(dtype, order):
    values = np.arange(12).reshape(2, 2, 3).astype(dtype, order=order)
    found = read(saved(values), channels=2)
    assert (found.dtype, found.shape) == (np.float32, (2, 2, 3))
    assert np.array_equal(found, np.arange(12).reshape(2, 2, 3))


def test_a_dimension_of_channels_can_be_left_out_if_there_is_one():
    assert np.array_equal(read(saved(VALUES))[0], VALUES)
    assert np.array_equal(read(saved(VALUES[None]))[0], VALUES)
    with pytest.raises(DataError, match="is 2×3; expected an array of float32, 2×2×3"):
        read(saved(VALUES), channels=2)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.zeros((3, 2)), "is 3×2"),
        (np.zeros((1, 1, 2, 3)), "is 1×1×2×3"),
        (np.float64(3), "is a single value"),
        (np.zeros(6), "is a row of 6"),
        (np.zeros((2, 0)), "is 2×0"),
        (np.zeros((2, 3), bool), "its values are bool"),
        (np.zeros((2, 3), complex), "its values are complex128"),
        (np.zeros((2, 3), "U2"), "its values are <U2"),
        (np.zeros((2, 3), "M8[s]"), r"its values are datetime64\[s\]"),
        (np.zeros((2, 3), [("a", "f4")]), r"its values are \[\('a', '<f4'\)\]"),
    ],
)
def test_another_shape_or_kind_of_value_is_named(values, found):
    with pytest.raises(DataError, match=rf"a\.npy: {found}; expected an array of float32, 1×2×3"):
        read(saved(values))


def test_pixels_of_several_channels_are_bytes_and_nothing_else():
    frame = Frame(2, 3)
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    assert np.array_equal(decode(saved(pixels), "x", frame, 4), pixels)
    with pytest.raises(DataError, match="its values are int64; expected an array of uint8, 4×2×3"):
        decode(saved(pixels.astype(np.int64)), "x", frame, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300, -1e39])
def test_values_that_no_float32_holds_are_refused_without_a_warning(bad):
    values = VALUES.astype(np.float64)
    values[1, 2] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"a.npy: holds values that are not finite"):
            read(saved(values))


def test_objects_are_not_unpickled():
    with pytest.raises(DataError, match=r"can't be read .*Object arrays cannot be loaded"):
        read(saved(np.array([[print, 1, 2], [3, 4, 5]], object)))
    with pytest.raises(DataError, match=r"can't be read"):
        read(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


def test_an_archive_of_arrays_is_no_array():
    stream = io.BytesIO()
    np.savez(stream, a=VALUES)
    with pytest.raises(DataError, match="several arrays in one file"):
        read(stream.getvalue())
    for content in (stream.getvalue()[:-30], b"PK\3\4" + bytes(40)):
        with pytest.raises(DataError, match=r"can't be read"):
            read(content)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w"):
        pass
    with pytest.raises(DataError, match=r"can't be read|several arrays"):
        read(stream.getvalue())


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{}",
        "-" * 5000 + "1",
        "(" * 150,
        "{'descr': '<f4', ",
        "{[]: 1}",
        "{1: 2, 'a': 3, None: 3}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}" % ("9" * 40),
        "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}" % 10**14,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2.0, 3)}",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': ['<f4'], 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': 3, 'shape': (2, 3)}",
        "__import__('os').system('true')",
    ],
)
def test_hostile_headers_are_refused(header):
    with pytest.raises(DataError, match=r"a\.npy: can't be read .*; expected an array of float32"):
        read(with_header(header))


def test_every_truncation_is_refused_and_no_altered_byte_is_another_error():
    whole = saved(VALUES)
    assert len(whole) == 128 + 24
    for length in range(len(whole)):
        with pytest.raises(DataError):
            read(whole[:length])
    for position in range(len(whole)):
        for flip in (1, 4, 16, 64, 255):
            altered = bytearray(whole)
            altered[position] ^= flip
            with suppress(DataError):  # and no other
                assert read(bytes(altered)).shape == (1, 2, 3)


def test_files_are_read_up_to_the_length_that_an_array_can_have(tmp_path):
    file = tmp_path / "a.npy"
    file.write_bytes(saved(VALUES))
    assert np.array_equal(read(file)[0], VALUES)
    with file.open("r+b") as stream:
        stream.truncate(HEADER + 8 * 6 + 1)
    with pytest.raises(DataError, match=r"can't be read .longer than 65,584 bytes"):
        read(file)
    with pytest.raises(DataError, match=r"can't be read .No such file"):
        read(tmp_path / "gone.npy")
    with pytest.raises(DataError, match=r"can't be read .not a regular file"):
        read(tmp_path)


def test_a_picture_is_no_array_and_an_array_no_picture():
    with pytest.raises(DataError, match="x: a picture, and the model takes an array of float32"):
        decode(Image.new("L", (3, 2)), "x", FRAME, 1)
    with pytest.raises(DataError, match="x: can't be read"):
        decode(b"\x89PNG\r\n\x1a\n" + bytes(50), "x", FRAME, 1)
    with pytest.raises(DataError, match="x: not an image"):
        decode(saved(VALUES), "x", Frame(2, 3), 1)


def test_random_inputs_are_the_same_at_each_call_and_in_range():
    floats = random_inputs(50, FRAME, 2)
    assert (floats.dtype, floats.shape) == (np.float32, (50, 2, 2, 3))
    assert abs(floats.mean()) < 0.2
    assert 0.8 < floats.std() < 1.2
    assert np.array_equal(floats, random_inputs(50, FRAME, 2))
    symbols = random_inputs(50, Frame(2, 3), 1, below=3)
    assert symbols.dtype == np.uint8
    assert np.unique(symbols).tolist() == [0, 1, 2]
    assert random_inputs(500, Frame(2, 3), 1).max() == 255
