"""The rANS coder: exact against plain integers, close to the entropy, strict on damage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.compress.coding.rans import encode, encode_symbols, in_rows, states_for
from smallfry.errors import DataError
from smallfry_runtime.rans import LEAST, TOTAL, Decoder, decode, quantized


def plain_encode(symbols, cumulative):
    """The equations of the paper, one state, in Python's integers."""
    state, words = LEAST, []
    for symbol in reversed(symbols):
        c, f = cumulative[symbol], cumulative[symbol + 1] - cumulative[symbol]
        if state >= 8 * 2**32 * f:
            words.append(state % 2**32)
            state >>= 32
        state = state // f * TOTAL + state % f + c
    words = b"".join(word.to_bytes(4, "little") for word in reversed(words))
    return b"\1\0" + state.to_bytes(8, "little") + words


def table(symbols, seed=0):
    return quantized(np.random.default_rng(seed).exponential(size=(1, symbols)) ** 3)


def test_one_state_gives_the_stream_of_plain_integers():
    cumulative = table(7)
    symbols = np.random.default_rng(1).integers(0, 7, 500)
    expected = plain_encode(symbols.tolist(), cumulative[0].tolist())
    assert encode_symbols(symbols, cumulative, states=1) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_symbols_come_back(data):
    count, symbols = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 300))
    tables = np.concatenate([table(symbols, seed) for seed in range(3)])
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = random.integers(0, 3, count)
    wanted = random.integers(0, symbols, count)
    stream = encode_symbols(wanted, tables, rows, data.draw(st.integers(1, 20)))
    assert np.array_equal(decode(stream, tables, count, rows), wanted)


def test_extreme_frequencies_come_back():
    tables = np.array([[0, 1, TOTAL - 1, TOTAL], [0, TOTAL - 2, TOTAL - 1, TOTAL]])
    wanted = np.array([0, 1, 2] * 40)
    rows = np.arange(120) % 2
    assert np.array_equal(
        decode(encode_symbols(wanted, tables, rows, 4), tables, 120, rows), wanted
    )


def test_a_single_symbol_takes_no_words():
    tables = np.array([[0, TOTAL]])
    stream = encode_symbols(np.zeros(10_000, int), tables, states=1)
    assert len(stream) == 10
    assert decode(stream, tables, 10_000).sum() == 0


def test_the_stream_is_within_one_in_a_thousand_of_the_entropy():
    cumulative = table(40)
    probabilities = np.diff(cumulative[0]) / TOTAL
    symbols = np.random.default_rng(0).choice(40, 200_000, p=probabilities)
    bits = -np.log2(probabilities[symbols]).sum()
    stream = encode_symbols(symbols, cumulative)
    assert bits <= 8 * len(stream) <= 1.001 * bits + 64 * states_for(len(symbols))


def test_a_short_row_changes_no_state():
    starts, frequencies = np.array([5, 9, 2]), np.array([70, 80, 90])
    first, width = in_rows(starts, frequencies, 2)
    assert first.tolist() == [[5, 9], [2, 0]]
    assert width.tolist() == [[70, 80], [90, TOTAL]]
    decoder = Decoder(encode(first, width))
    decoder.advance(first[0], width[0])
    decoder.advance(first[1][:1], width[1][:1])
    decoder.finish()


def test_quantised_distributions_are_whole_and_positive():
    found = quantized(np.array([[0.0, 1.0, 0.0], [1e-300, 5e-301, 1e-301]]))
    assert found[:, 0].tolist() == [0, 0]
    assert found[:, -1].tolist() == [TOTAL, TOTAL]
    assert np.diff(found).min() >= 1
    assert np.diff(found)[1] == pytest.approx(TOTAL * np.array([10, 5, 1]) / 16, abs=2)


@pytest.mark.parametrize("change", ["cut", "longer", "state", "word", "empty", "odd"])
def test_a_damaged_stream_is_refused(change):
    cumulative = table(6)
    symbols = np.random.default_rng(0).integers(0, 6, 400)
    stream = encode_symbols(symbols, cumulative, states=3)
    damaged = bytearray(stream)
    damaged[40] ^= change == "word"
    if change == "state":
        damaged[2:10] = bytes(8)
    ends = {"cut": -4, "empty": 1, "odd": -1}
    damaged = damaged[: ends.get(change)] + (b"1234" if change == "longer" else b"")
    with pytest.raises(DataError, match="damaged"):
        decode(bytes(damaged), cumulative, 400)


@pytest.mark.parametrize(("start", "frequency"), [(0, 0), (1, TOTAL)])
def test_frequencies_that_no_decoder_can_have_are_refused(start, frequency):
    with pytest.raises(ValueError, match="at least 1"):
        encode(np.array([[start]]), np.array([[frequency]]))


def test_rows_need_one_width():
    with pytest.raises(ValueError, match="equal tables"):
        encode(np.zeros((2, 3), int), np.ones((2, 2), int))
