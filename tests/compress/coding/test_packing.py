"""Packed files: restored to the bit, smaller than their integers, strict on damage."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.numpy

from smallfry.compress.coding.packing import FEWEST, Tensor8, find_integers, pack
from smallfry.errors import DataError, UsageError
from smallfry_runtime.integer_models import (
    SCALED,
    Coded,
    decode_integers,
    read_frequencies,
    scale_tables,
    stored_frequencies,
)
from smallfry_runtime.packed import HEAD, MAGIC, is_packed, unpack, unpack_file, write_packed
from smallfry_runtime.rans import TOTAL


def integers(shape, spread, seed=0, kind=np.int8, vary=1.0):
    random = np.random.default_rng(seed)
    most = np.iinfo(kind).max
    scales = spread * np.exp(vary * random.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    return (random.normal(size=shape) * scales).round().clip(-most, most).astype(kind)


def saved(**tensors):
    return safetensors.numpy.save(tensors)


@pytest.fixture(scope="module")
def original():
    return saved(
        codes=integers((48, 24, 3, 3), 6, vary=0.2),
        scales=np.random.default_rng(0).normal(size=(48, 1)).astype(np.float32),
        small=integers((5, 5), 3),
        bits=np.random.default_rng(1).integers(0, 256, 300, dtype=np.uint8),
    )


@pytest.mark.parametrize("entropy", ["static", "laplace", "circuit"])
def test_every_coder_restores_the_file(original, entropy):
    packed = pack(original, entropies=[entropy])
    assert unpack(packed.data) == original
    coders = {row.name: row.coder for row in packed.rows}
    wanted = {"static": ["static"], "laplace": SCALED, "circuit": ["circuit"]}[entropy]
    assert coders["codes"] in wanted
    assert coders["small"] == "zlib"  # too few
    assert coders["bits"] == "zlib"  # random bytes


def test_the_smallest_coder_of_each_tensor_is_chosen(original):
    packed = pack(original)
    sizes = {
        entropy: {r.name: r.bytes for r in pack(original, entropies=[entropy]).rows}
        for entropy in ("static", "laplace")
    }
    for row in packed.rows:
        least = min(each[row.name] for each in sizes.values())
        assert row.bytes == pytest.approx(least, abs=2)


@pytest.mark.parametrize("shape", [(1, FEWEST), (7, 37), (300, 1), (16, 200)])
@pytest.mark.parametrize("spread", [0, 0.2, 30, 1e4])
def test_shapes_and_spreads_come_back(shape, spread):
    file = saved(codes=integers(shape, spread))
    for entropy in ("static", "laplace", "circuit"):
        assert unpack(pack(file, entropies=[entropy]).data) == file


@pytest.mark.slow
def test_correlated_integers_are_left_to_the_circuit():
    """Neighbours that share a scale, which no histogram of a channel sees."""
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(0, 1.5, size=(8, 2000, 1)))
    codes = (random.normal(size=(8, 2000, 16)) * 3 * scales).round().clip(-40, 40).astype(np.int8)
    (row,) = pack(saved(codes=codes)).rows
    assert row.coder == "circuit"
    assert 8 * row.bytes < 0.97 * row.entropy * codes.size


def test_laplace_beats_a_histogram_where_channels_differ():
    (row,) = pack(saved(codes=integers((64, 128), 10)), entropies=["static", "laplace"]).rows
    assert row.coder in SCALED
    assert 8 * row.bytes < 0.95 * row.entropy * row.integers


@pytest.mark.parametrize("coder", SCALED)
def test_scaled_tables_are_the_closed_forms(coder):
    tables = scale_tables(coder, -3, 9)
    scale = 0.05 * 1.075 ** np.arange(1, 129)[:, None]
    k = np.abs(np.arange(-3, 6))
    base = scale / (scale + 1) if coder == "laplace" else scale**2 / (scale**2 + 0.5)
    expected = base ** (k if coder == "laplace" else k * k)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(np.diff(tables) / TOTAL, expected, atol=3e-8)


def test_bytes_without_integers_are_compressed_too():
    text = b"a header of words, of words, of words" * 20
    assert len(pack(text, []).data) < len(text) / 4
    assert unpack(pack(text, []).data) == text
    assert unpack(pack(b"", []).data) == b""


def test_integers_of_any_file_can_be_given():
    codes = integers((40, 40), 2)
    file = b"before" + codes.tobytes() + b"after"
    packed = pack(file, [Tensor8("codes", 6, (40, 40), True)])
    assert unpack(packed.data) == file
    assert len(packed.data) < 0.7 * len(file)


def test_tensors_of_safetensors_are_found_in_order(original):
    found = find_integers(original)
    assert {t.name: (t.shape, t.is_signed) for t in found} == {
        "codes": ((48, 24, 3, 3), True),
        "small": ((5, 5), True),
        "bits": ((300,), False),
    }
    for tensor in found:
        raw = original[tensor.offset : tensor.offset + int(np.prod(tensor.shape))]
        assert raw == safetensors.numpy.load(original)[tensor.name].tobytes()


@pytest.mark.parametrize("file", [b"", b"\x89PNG", b"\x10\0\0\0\0\0\0\0[1, 2]          "])
def test_other_files_are_refused(file):
    with pytest.raises(UsageError, match="safetensors"):
        pack(file)


def test_unknown_coders_are_refused(original):
    for wrong in (["zip"], []):
        with pytest.raises(UsageError, match="static, laplace, circuit"):
            pack(original, entropies=wrong)


def test_every_cut_and_every_altered_byte_is_refused(original):
    data = pack(original, entropies=["static", "laplace"]).data
    for end in (*range(0, 200, 7), len(data) // 2, len(data) - 1):
        with pytest.raises(DataError):
            unpack(data[:end])
    for place in (*range(0, 200, 7), len(data) // 2, len(data) - 1):
        altered = bytearray(data)
        altered[place] ^= 16
        with pytest.raises(DataError, match="packed file"):
            unpack(bytes(altered))
    with pytest.raises(DataError, match="truncated or altered"):
        unpack(data + b"\0")


def with_checksum(data):
    """A file whose author knows the checksum."""
    body = data[HEAD - 4 :]
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def test_altered_bytes_under_a_right_checksum_are_refused(original):
    data = pack(original, entropies=["static", "laplace"]).data
    for place in range(HEAD - 4, len(data), len(data) // 7):
        altered = bytearray(data)
        altered[place] ^= 8
        with pytest.raises(DataError):
            unpack(with_checksum(bytes(altered)))


@pytest.mark.parametrize(
    "change",
    [
        {"integers": 10**12},
        {"integers": -4},
        {"coder": "exec"},
        {"symbols": 0},
        {"symbols": 10**9},
        {"low": -(10**9)},
        {"channels": 0},
        {"channels": 7},
        {"channels": 10**9},
        {"integers": 10**7},
    ],
)
def test_hostile_descriptions_are_refused(change):
    coded = Coded("laplace", 400, -5, 11, 4)._replace(**change)
    from smallfry_runtime.packed import Run

    run = Run(0, Coded("laplace", 400, -5, 11, 4), 100)
    good = write_packed(bytes(400), [run], [bytes(100)])
    size = int.from_bytes(good[HEAD - 4 : HEAD], "little")
    header = zlib.decompress(good[HEAD : HEAD + size]).decode()
    old = '[0,"laplace",400,-5,11,4,100]'
    assert old in header
    new = f'[0,"{coded.coder}",{",".join(map(str, coded[1:]))},100]'
    changed = zlib.compress(header.replace(old, new).encode())
    body = len(changed).to_bytes(4, "little") + changed + good[HEAD + size :]
    with pytest.raises(DataError):
        unpack(MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)


def test_a_bomb_is_refused():
    small = pack(bytes(10**7), []).data  # zlib takes a thousandth
    assert unpack(small) == bytes(10**7)
    size = int.from_bytes(small[HEAD - 4 : HEAD], "little")
    header = zlib.decompress(small[HEAD : HEAD + size])
    for number in (b"10000", b"99999999999999"):
        changed = zlib.compress(header.replace(b"10000000", number))
        body = len(changed).to_bytes(4, "little") + changed + small[HEAD + size :]
        with pytest.raises(DataError, match="damaged"):
            unpack(MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize(
    ("coder", "payload"),
    [
        ("static", b""),
        ("static", bytes(400)),
        ("laplace", b"\xff" * 100),
        ("circuit", b"\x02"),
        ("circuit", bytes(200)),
        ("circuit", b"\x02\x01\x00\x00" + bytes(300)),
    ],
)
def test_wrong_parameters_are_refused(coder, payload):
    with pytest.raises(DataError, match=r"damaged|tree"):
        decode_integers(Coded(coder, 40, 0, 11, 4), payload)


def test_stored_frequencies_come_back():
    shares = np.random.default_rng(0).exponential(size=(3, 9))
    tables = read_frequencies(stored_frequencies(shares), 9, rows=3)
    assert tables.shape == (3, 10)
    expected = shares / shares.sum(1, keepdims=True)
    np.testing.assert_allclose(np.diff(tables) / TOTAL, expected, atol=4e-4)


def test_the_runtime_unpacks_without_torch(original, tmp_path):
    file, target = tmp_path / "model.packed", tmp_path / "model.safetensors"
    file.write_bytes(pack(original).data)
    code = (
        "import sys; from smallfry_runtime.packed import unpack_file; "
        f"unpack_file({str(file)!r}, {str(target)!r}); "
        "assert not {'torch', 'smallfry', 'safetensors', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert target.read_bytes() == original


def test_files_that_can_not_be_unpacked_are_named(tmp_path):
    missing, foreign = tmp_path / "none", tmp_path / "foreign"
    foreign.write_bytes(b"nothing of ours" * 9)
    for file in (missing, foreign, tmp_path):
        with pytest.raises(DataError, match=str(file)):
            unpack_file(file)
    assert not is_packed(foreign.read_bytes())
