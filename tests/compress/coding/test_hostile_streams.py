"""Packed and shared files by an author who wishes harm and gets every checksum right."""

import hashlib
import json
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest

from smallfry.compress.codec import HCLT
from smallfry.compress.coding.packing import Tensor8, pack
from smallfry.compress.coding.rans import encode, encode_symbols
from smallfry_runtime import packed, shared
from smallfry_runtime.errors import DataError, ExportError
from smallfry_runtime.integer_models import (
    CODERS,
    SCALES,
    Coded,
    decode_integers,
    read_frequencies,
    read_tree,
    scale_tables,
    stored_frequencies,
)
from smallfry_runtime.latent_trees import LatentTree
from smallfry_runtime.rans import LEAST, TOTAL, Decoder, decode, find, quantized
from smallfry_runtime.storage import restored, stored_names


def packed_file(header, rest=b"", payload=b"") -> bytes:
    """A packed file of any header, with a right checksum."""
    squeezed = zlib.compress(json.dumps(header).encode())
    body = len(squeezed).to_bytes(4, "little") + squeezed + rest + payload
    return packed.MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


EMPTY = zlib.compress(b"")
STATIC = stored_frequencies(np.array([1.0, 3.0])) + encode_symbols(
    np.array([1, 0, 1, 1]), read_frequencies(stored_frequencies(np.array([1.0, 3.0])), 2)
)


def one_run(**changes):
    """A header with one run of the integers 8, 7, 8, 8, changed."""
    run = {"offset": 0, "coder": "static", "integers": 4, "low": 7, "symbols": 2, "channels": 1}
    run["length"] = len(STATIC)
    content = {
        "bytes": 4,
        "sha256": hashlib.sha256(bytes([8, 7, 8, 8])).hexdigest(),
        "rest": len(EMPTY),
        "runs": [[*(run | changes).values()]],
    }
    return packed_file(content, EMPTY, STATIC)


def test_a_file_written_by_hand_is_unpacked():
    assert packed.unpack(one_run()) == bytes([8, 7, 8, 8])


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    "change",
    [
        {"low": 0.5},
        {"low": float("nan")},
        {"low": "7"},
        {"low": None},
        {"low": 10**9},
        {"low": 255, "symbols": 1},
        {"offset": 1},
        {"offset": True},
        {"symbols": 2.0},
        {"symbols": 256},
        {"integers": 0},
        {"integers": 5},
        {"channels": 0},
        {"channels": 2.5},
        {"length": 1},
        {"length": 0},
        {"length": 10**30},
        {"coder": ["static"]},
        {"coder": {}},
    ],
)
def test_no_wrong_number_of_a_run_is_another_error(coder, change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="damaged"):
            packed.unpack(one_run(**{"coder": coder, **change}))


@pytest.mark.parametrize(
    "header",
    [
        *([], 3, "text", None, {}),
        {"bytes": 0, "rest": 8, "runs": []},
        {"bytes": 0, "rest": -8, "runs": [], "sha256": ""},
        {"bytes": 0, "rest": "8", "runs": [], "sha256": ""},
        {"bytes": 0, "rest": 8.0, "runs": [], "sha256": ""},
        {"bytes": True, "rest": 8, "runs": [], "sha256": ""},
        {"bytes": 0, "rest": 8, "runs": {"a": 1}, "sha256": ""},
        {"bytes": 0, "rest": 8, "runs": [[]], "sha256": ""},
        {"bytes": 0, "rest": 8, "runs": [None], "sha256": ""},
        {"bytes": 0, "rest": 8, "runs": [], "sha256": None},
    ],
)
def test_a_header_of_another_form_is_damage(header):
    with pytest.raises(DataError, match="the packed file is damaged"):
        packed.unpack(packed_file(header, EMPTY))


def even_tree(variables, states, symbols):
    """A stored circuit of one path, all of whose tables are even."""
    rows = [(1, states), (states, states), (states, symbols)]
    tables = (stored_frequencies(np.ones((count, width))) for count, width in rows)
    return bytes([variables, states, *range(variables)]) + b"".join(tables)


ONE_STATE = b"\1\0" + LEAST.to_bytes(8, "little")
ALMOST_SURE = stored_frequencies(np.array([1.0, 1e9]))
BOMBS = {
    "a row for each integer": [(Coded("static", 10_000_000, 0, 2), ALMOST_SURE + ONE_STATE)],
    "scales": [(Coded("laplace", 10_000_000, 0, 256), b"\0" + ONE_STATE)],
    "large tables": [(Coded("circuit", 5_000_000, 0, 2), even_tree(255, 128, 2) + ONE_STATE)],
    "runs": [(Coded("static", 8_000, 0, 2), ALMOST_SURE + ONE_STATE)] * 1_200,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_decoding_that_a_files_size_does_not_justify_is_refused_before_it_begins(kind):
    offset, runs, payloads = 0, [], []
    for coded, payload in BOMBS[kind]:
        runs.append([offset, *coded, len(payload)])
        payloads.append(payload)
        offset += coded.integers
    filling = zlib.compress(np.random.default_rng(0).bytes(8_000))
    header = {"bytes": offset + 8_000, "sha256": "", "rest": len(filling), "runs": runs}
    with pytest.raises(
        DataError, match=r"damaged \(\d+ s of decoding are too much for \d+ bytes\)"
    ):
        packed.unpack(packed_file(header, filling, b"".join(payloads)))


def test_a_number_of_samples_that_its_bytes_do_not_justify_is_refused():
    samples = np.random.default_rng(0).integers(0, 2, (50, 4))
    model = HCLT.fit(samples, states=2, epochs=2)
    data = model.encode(samples)
    assert np.array_equal(model.decode(data), samples)
    body = data[9:25] + (2**32 - 1).to_bytes(4, "little") + data[29:]
    altered = data[:5] + zlib.crc32(body).to_bytes(4, "little") + body
    with pytest.raises(DataError, match=f"{len(data)} bytes are too few for 4294967295 coded"):
        model.decode(altered)


def test_integers_of_next_to_no_information_are_packed_and_unpacked():
    """An entropy coder would need a two-thousandth of their bytes, which only a bomb does."""
    original = bytes(6_000_000)
    found = pack(original, [Tensor8("codes", 0, (1, 6_000_000), True)], ["static"])
    assert found.rows[0].coder == "zlib"
    assert packed.unpack(found.data) == original


def test_bytes_after_the_last_part_are_damage():
    digest = hashlib.sha256(b"").hexdigest()
    header = {"bytes": 0, "rest": len(EMPTY), "runs": [], "sha256": digest}
    assert packed.unpack(packed_file(header, EMPTY)) == b""
    with pytest.raises(DataError, match="its content is not that of its hash"):
        packed.unpack(packed_file(header, EMPTY, b"more"))
    with pytest.raises(DataError, match="a part has another length"):
        packed.unpack(packed_file({**header, "rest": len(EMPTY) + 4}, EMPTY, b"more"))


@pytest.mark.parametrize(("low", "high"), [(100, 140), (20, 60), (246, 255), (-128, -119), (0, 1)])
def test_integers_far_from_0_are_packed_without_a_warning(low, high):
    """The powers of small scales vanish there, and would divide by 0."""
    values = np.random.default_rng(0).integers(low, high, (4, 300), endpoint=True)
    kind = np.int8 if low < 0 else np.uint8
    original = values.astype(kind).tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pack(original, [Tensor8("codes", 0, (4, 300), low < 0)], ["laplace"])
    assert packed.unpack(found.data) == original
    assert len(found.data) < len(original)


@pytest.mark.parametrize("coder", ["laplace", "gauss"])
@pytest.mark.parametrize(("low", "symbols"), [(200, 56), (-256, 1), (256, 256), (0, 1), (12, 3)])
def test_every_scale_is_a_distribution_wherever_the_symbols_are(coder, low, symbols):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables = scale_tables(coder, low, symbols)
    assert tables.shape == (SCALES, symbols + 1)
    assert (tables[:, 0] == 0).all()
    assert (tables[:, -1] == TOTAL).all()
    assert (np.diff(tables) >= 1).all()


def test_a_tree_of_one_long_path_with_many_states_is_refused_before_memory_is_taken():
    variables, states, count = 255, 64, 30_000
    even = stored_frequencies(np.ones(states))
    stored = bytes([variables, states, *range(variables)]) + even
    stored += even * states + stored_frequencies(np.ones(2)) * states
    tree, size = read_tree(stored, 2)
    assert size == len(stored)
    stream = count.to_bytes(2, "little") + np.full(count, LEAST, "<u8").tobytes()
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="too many states for its tree"):
            tree.decode(stream, count)
        with pytest.raises(DataError, match="too many states for its tree"):
            decode_integers(Coded("circuit", count * variables, 0, 2), stored + stream)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (b"", "a circuit is missing"),
        (bytes([1]), "a circuit is missing"),
        (bytes([0, 0]), "frequencies have a wrong sum"),
        (bytes([1, 1, 0]), "frequencies are missing"),
        (bytes([2, 1, 0, 1]), "frequencies are missing"),
        (bytes([1, 2, 0]) + bytes(20), "frequencies have a wrong sum"),
    ],
)
def test_a_circuit_that_is_cut_short_is_damage(stored, reason):
    with pytest.raises(DataError, match=reason):
        read_tree(stored, 2)


@pytest.mark.parametrize("parents", [(0, 0), (1, 1), (0, 3), (200, 1)])
def test_parents_that_form_no_tree_are_damage(parents):
    one = stored_frequencies(np.ones(1))
    stored = bytes([2, 1, *parents]) + one + one + stored_frequencies(np.ones(2))
    with pytest.raises(DataError, match="no tree"):
        read_tree(stored, 2)


def test_a_tree_of_one_variable_codes_and_decodes():
    table = quantized(np.array([[0.25, 0.75]]))
    tree = LatentTree([-1], quantized(np.ones(1)), quantized(np.ones((1, 1, 1))), table[None])
    symbols = np.array([0, 1, 1, 1, 0, 1])
    starts, frequencies = tree.interval(0, np.ones((6, 1)), symbols)
    stream = encode(starts[:, None], frequencies[:, None])
    assert np.array_equal(tree.decode(stream, 6)[:, 0], symbols)
    with pytest.raises(DataError, match="doesn't end with its last symbol"):
        tree.decode(stream, 5)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"", "its length"),
        (b"\0\0", "its length"),
        (b"\2\0" + LEAST.to_bytes(8, "little"), "its length"),
        (b"\1\0" + LEAST.to_bytes(8, "little") + b"abc", "its length"),
        (b"\1\0" + (LEAST - 1).to_bytes(8, "little"), "too small"),
        (b"\1\0" + bytes(8), "too small"),
    ],
)
def test_streams_without_whole_states_are_damage(stream, reason):
    with pytest.raises(DataError, match=reason):
        Decoder(stream)


def test_the_largest_state_that_a_stranger_can_write_gives_symbols_that_there_are():
    table = quantized(np.array([[1.0, 2.0, 3.0]]))
    stream = b"\1\0" + b"\xff" * 8 + b"\xff" * 400
    decoder = Decoder(stream)
    for _ in range(50):
        (symbol,) = find(table, decoder.slots())
        assert 0 <= symbol < 3
        decoder.advance(table[0, [symbol]], np.diff(table)[0, [symbol]])
    with pytest.raises(DataError, match="doesn't end"):
        decode(stream, table, 50)


def test_every_altered_bit_of_a_short_stream_is_other_symbols_or_damage():
    table = quantized(np.array([[0.5, 0.3, 0.2]]))
    symbols = np.random.default_rng(1).integers(0, 3, 40)
    stream = encode_symbols(symbols, table, states=2)
    for bit in range(8 * len(stream)):
        altered = bytearray(stream)
        altered[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(altered), table, 40)
        except DataError:
            continue
        assert not np.array_equal(found, symbols)
        assert set(found.tolist()) <= {0, 1, 2}


BASE = np.arange(2**16, dtype="<f4").tobytes()


def shared_file(parts, total, rest=b"", **changes) -> bytes:
    header = {
        "bytes": total,
        "sha256": "0" * 64,
        "base": hashlib.sha256(BASE).hexdigest(),
        "parts": parts,
        **changes,
    }
    squeezed = zlib.compress(json.dumps(header).encode())
    body = len(squeezed).to_bytes(4, "little") + squeezed + zlib.compress(rest)
    return shared.MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def test_parts_that_are_longer_than_their_original_are_refused_before_memory_is_taken():
    """A few bytes name a part; a base of megabytes, a million times, is a bomb."""
    step = len(BASE)
    parts = [[k * step, 0, [2**16], [2**16], [1]] for k in range(400)]
    data = shared_file(parts, total=3 * step)
    assert len(data) < 8_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="parts overlap"):
            shared.restore(data, BASE)
        assert tracemalloc.get_traced_memory()[1] < 10 * step
    finally:
        tracemalloc.stop()


def test_of_a_large_tensor_only_what_a_part_takes_is_read():
    """Copies of the whole tensor for each of a million parts would take hours."""
    numbers = np.arange(2**16, dtype="<f4").reshape(256, 256)
    original = numbers[:, :1].tobytes()
    data = shared_file(
        [[0, 0, [256, 256], [256, 1], [1, 1]]], 1024, sha256=hashlib.sha256(original).hexdigest()
    )
    tracemalloc.start()
    try:
        assert shared.restore(data, BASE) == original
        assert tracemalloc.get_traced_memory()[1] < len(BASE) // 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("part", "total"),
    [
        ([0, 0, [4], [4], [1]], 12),
        ([4, 0, [4], [4], [1]], 16),
        ([0, 2**18, [1], [1], [1]], 4),
        ([0, 0, [4], [4], [3]], 16),
        ([0, 0, [4], [8], [1]], 32),
        ([0, 0, [1] * 9, [1] * 9, [1] * 9], 4),
        ([0.0, 0, [4], [4], [1]], 16),
        ([0, 0, [True], [1], [1]], 4),
        ([0, 0, "4", "4", "1"], 16),
        ([0, 0, 4, 4, 1], 16),
        ([0, 0], 16),
        (None, 16),
        ({"offset": 0}, 16),
        ([0, 0, [10**200], [4], [1]], 16),
    ],
)
def test_a_part_that_can_not_be_is_damage(part, total):
    with pytest.raises(DataError, match="the shared file is damaged"):
        shared.restore(shared_file([part], total, bytes(40)), BASE)


@pytest.mark.parametrize("header", [[], 3, None, {"base": 3}, {"base": None, "parts": []}])
def test_a_shared_header_of_another_form_is_an_error_of_data(header):
    squeezed = zlib.compress(json.dumps(header).encode())
    body = len(squeezed).to_bytes(4, "little") + squeezed + EMPTY
    with pytest.raises(DataError):
        shared.restore(shared.MAGIC + zlib.crc32(body).to_bytes(4, "little") + body, BASE)


def test_graphs_that_can_not_be_restored_are_named_with_their_folder(tmp_path):
    assert restored({"model.onnx": b"a"}, "plain", tmp_path, dict) == {"model.onnx": b"a"}
    assert stored_names(("a.xml", "a.bin"), "shared") == ("a.xml.shared", "a.bin.shared")
    with pytest.raises(ExportError, match=rf"^{tmp_path}: not a packed file.*export the run again"):
        restored({"model.onnx.packed": b"a"}, "packed", tmp_path, dict)
    with pytest.raises(ExportError, match=rf"^{tmp_path}: not a shared file"):
        restored({"model.onnx.shared": b"a"}, "shared", tmp_path, lambda: {"model.onnx": b""})
    with pytest.raises(ExportError, match=rf"^{tmp_path}: .*model\.onnx.*export the run again"):
        restored({"model.onnx.shared": b"a"}, "shared", tmp_path, dict)
    content = pack(bytes(500), []).data
    assert restored({"m.onnx.packed": content}, "packed", tmp_path, dict) == {"m.onnx": bytes(500)}
