"""Decoder of rANS streams: asymmetric numeral systems with several states at once.

A state s ≥ L = 2³¹ holds the symbols that are still to come. With a symbol's frequency f of 2²⁸ and
the sum c of those of the symbols before it:

    t = s mod 2²⁸      the symbol is the one with c ≤ t < c + f
    s ← f ⌊s / 2²⁸⌋ + t − c;  if s < L:  s ← 2³² s + the next word

Symbols are laid out in rows of one symbol for each state, so that NumPy decodes a row at once; the
words of all states are in one stream. A stream is the number of states (16 bits), the states
(64 bits each) and the words (32 bits), little-endian. Source: J. Duda, arXiv 1311.2540.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import DataError

PRECISION = 28  # bits of a frequency
TOTAL = 1 << PRECISION
LEAST = 1 << 31  # L
WORD = 32
MOST_STATES = 2**16 - 1
ROW_WORK, SYMBOL_WORK, CELL_WORK = 2**15, 32, 2  # nanoseconds of a row, a symbol, a table's cell
MOST_WORK, WORK_A_BYTE = 2**38, 2**15  # which any file, and each of its bytes, can justify

Integers = NDArray[np.integer]
Cumulative = NDArray[np.int64]


class Decoder:
    """Reader of a stream, a row of symbols at a time.

    Args:
        stream: Output of ``smallfry.compress.coding.rans.encode``.

    Raises:
        DataError: Too short for its states, or not of whole words.

    Example:
        >>> import numpy as np
        >>> from smallfry_runtime.rans import TOTAL, Decoder, find
        >>> stream = b"\\1\\0" + (2**31 + 2**27).to_bytes(8, "little")  # one state, no word
        >>> cumulative = np.array([[0, 2**27, TOTAL]])  # two symbols, equally likely
        >>> decoder = Decoder(stream)
        >>> find(cumulative, decoder.slots())
        array([1])
    """

    def __init__(self, stream: bytes) -> None:
        states = int.from_bytes(stream[:2], "little")
        start = 2 + 8 * states
        if states == 0 or len(stream) < start or (len(stream) - start) % 4:
            raise DataError("the coded stream is damaged: its length is not that of its states")
        self._states = np.frombuffer(stream, "<u8", states, 2).astype(np.uint64)
        self._words = np.frombuffer(stream, "<u4", offset=start).astype(np.uint64)
        self._position = 0
        if bool((self._states < LEAST).any()):
            raise DataError("the coded stream is damaged: a state is too small")

    @property
    def states(self) -> int:
        """Number of states, which is that of symbols in a row."""
        return len(self._states)

    def slots(self) -> NDArray[np.int64]:
        """Return t of each state: (states,), below ``TOTAL``."""
        return (self._states & np.uint64(TOTAL - 1)).astype(np.int64)

    def advance(self, starts: Integers, frequencies: Integers) -> None:
        """Remove a row of symbols from the states.

        Args:
            starts: c of the symbols of the first states, of one symbol each.
            frequencies: Their f.

        Raises:
            DataError: The stream has ended.
        """
        states = self._states[: len(starts)]
        slot = states & np.uint64(TOTAL - 1)
        states[:] = frequencies.astype(np.uint64) * (states >> np.uint64(PRECISION))
        states += slot - starts.astype(np.uint64)
        short = np.flatnonzero(states < LEAST)
        words = self._words[self._position : self._position + len(short)]
        if len(words) < len(short):
            raise DataError("the coded stream is damaged: it ends too early")
        states[short] = (states[short] << np.uint64(WORD)) | words
        self._position += len(words)

    def finish(self) -> None:
        """Require that all symbols have been read.

        Raises:
            DataError: Words are left, or a state is not the first one of the encoder.
        """
        if self._position != len(self._words) or bool((self._states != LEAST).any()):
            raise DataError("the coded stream is damaged: it doesn't end with its last symbol")


def rows_of(stream: bytes, count: int) -> int:
    """Return the number of rows that so many symbols take in a stream."""
    return -(-count // max(1, int.from_bytes(stream[:2], "little")))


def work_of_rows(stream: bytes, count: int, symbols: int) -> int:
    """Estimate the work of ``decode``, before it is done, in nanoseconds of a processor.

    Args:
        stream: Output of the encoder, or of another author.
        count: Number of symbols.
        symbols: Number of possible symbols.
    """
    return ROW_WORK * rows_of(stream, count) + (SYMBOL_WORK + CELL_WORK * symbols) * count


def is_justified(work: int, size: int) -> bool:
    """Return whether a file of so many bytes may need so much work.

    Symbols of high probability take next to no bytes, so a few bytes can name billions of them.
    Minutes are left to any file, and to a longer one what its symbols of a bit or more take.
    """
    return work <= MOST_WORK + WORK_A_BYTE * size


def quantized(probabilities: NDArray[Any], total: int = TOTAL) -> Cumulative:
    """Quantise distributions to sums of integer frequencies, each at least 1.

    Args:
        probabilities: Non-negative, (…, symbols); need not sum to one.
        total: Sum of the frequencies, at least the number of symbols.

    Returns:
        (…, symbols + 1), from 0 to ``total``. Only additions in order, multiplications and
        divisions are used, so that every processor gives the same integers.
    """
    sums = np.cumsum(probabilities, axis=-1, dtype=np.float64)
    symbols = sums.shape[-1]
    inner = np.floor(sums / sums[..., -1:] * (total - symbols)).astype(np.int64)
    inner += np.arange(1, symbols + 1)
    return np.concatenate([np.zeros_like(inner[..., :1]), inner], axis=-1)


def find(cumulative: Cumulative, slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find the symbol of each slot.

    Args:
        cumulative: Sums c of frequencies, from 0 to ``TOTAL``: (rows or 1, symbols + 1).
        slots: (rows,).
    """
    found: NDArray[np.int64] = (cumulative[:, 1:] <= slots[:, None]).sum(axis=1)
    return found


def decode(
    stream: bytes, tables: Cumulative, count: int, rows: Integers | None = None
) -> NDArray[np.int64]:
    """Decode symbols that don't depend on each other.

    Args:
        stream: Output of the encoder.
        tables: Sums of frequencies: (tables, symbols + 1).
        count: Number of symbols.
        rows: Table of each symbol, (count,); None for the first.

    Returns:
        The symbols, (count,).

    Raises:
        DataError: A damaged stream.
    """
    decoder = Decoder(stream)
    symbols = np.empty(count, np.int64)
    for start in range(0, count, decoder.states):
        part = slice(start, min(start + decoder.states, count))
        length = part.stop - start
        slots = decoder.slots()[:length]
        own = np.zeros(length, np.int64) if rows is None else rows[part]
        table = tables if rows is None else tables[own]
        found = symbols[part] = find(table, slots)
        starts = tables[own, found]
        decoder.advance(starts, tables[own, found + 1] - starts)
    decoder.finish()
    return symbols
