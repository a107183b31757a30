"""Encoder of rANS streams; ``smallfry_runtime.rans`` decodes them and has the equations.

Symbols are removed in the reverse of the order in which they were added, so the last one is encoded
first:

    if s ≥ 2³⁵ f:  write the low 32 bits of s;  s ← ⌊s / 2³²⌋
    s ← 2²⁸ ⌊s / f⌋ + s mod f + c

A library, constriction, has the same coder without several states; the device would need it too.
"""

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.rans import LEAST, MOST_STATES, PRECISION, TOTAL, WORD, Cumulative, Integers

SYMBOLS_A_STATE = 4096  # so that the 64 bits of a state are about 0.2 % of a stream
MOST_AT_ONCE = 256  # states, with which NumPy's cost of a call is small


def states_for(symbols: int) -> int:
    """Return the number of states for a number of symbols."""
    return max(1, min(symbols // SYMBOLS_A_STATE, MOST_AT_ONCE))


def encode(starts: Integers, frequencies: Integers) -> bytes:
    """Encode rows of symbols.

    Args:
        starts: Sums c of the frequencies before each symbol, (rows, states).
        frequencies: f of each symbol, at least 1 and together with c at most 2²⁸. A row may be
            shorter than the others: fill it with c = 0 and f = 2²⁸, which changes no state.

    Raises:
        ValueError: Frequencies that are not positive or too large, or too many states.

    Example:
        >>> import numpy as np
        >>> from smallfry.compress.coding.rans import encode
        >>> from smallfry_runtime.rans import TOTAL, decode
        >>> table = np.array([[0, TOTAL // 4, TOTAL]])  # of two symbols
        >>> symbols = np.array([[1], [0], [1]])
        >>> stream = encode(table[0, symbols], np.diff(table)[0, symbols])
        >>> decode(stream, table, 3)
        array([1, 0, 1])
    """
    if starts.shape != frequencies.shape or not 1 <= starts.shape[1] <= MOST_STATES:
        raise ValueError(f"expected two equal tables of rows, got {starts.shape}")
    if starts.size and (frequencies.min() < 1 or (starts + frequencies).max() > TOTAL):
        raise ValueError(f"frequencies must be at least 1, and in all {TOTAL}")
    first, width = starts.astype(np.uint64), frequencies.astype(np.uint64)
    states = np.full(starts.shape[1], LEAST, np.uint64)
    words: list[NDArray[np.uint64]] = []
    limit = np.uint64(LEAST >> PRECISION << WORD)
    for c, f in zip(first[::-1], width[::-1], strict=True):
        large = states >= limit * f
        words.append(states[large] & np.uint64(2**WORD - 1))
        states[large] >>= np.uint64(WORD)
        quotient, rest = np.divmod(states, f)
        states = (quotient << np.uint64(PRECISION)) + rest + c
    stream = np.concatenate([*words[::-1], np.empty(0, np.uint64)]).astype("<u4")
    return len(states).to_bytes(2, "little") + states.astype("<u8").tobytes() + stream.tobytes()


def encode_symbols(
    symbols: Integers, tables: Cumulative, rows: Integers | None = None, states: int | None = None
) -> bytes:
    """Encode symbols that don't depend on each other; ``smallfry_runtime.rans.decode`` reads them.

    Args:
        symbols: (count,).
        tables: Sums of frequencies from 0 to 2²⁸: (tables, symbols + 1).
        rows: Table of each symbol, (count,); None for the first.
        states: States; by default one for 4,096 symbols, 256 at most.
    """
    own = np.zeros(len(symbols), np.int64) if rows is None else rows
    starts = tables[own, symbols]
    return encode(*in_rows(starts, tables[own, symbols + 1] - starts, states))


def in_rows(
    starts: Integers, frequencies: Integers, states: int | None = None
) -> tuple[Integers, Integers]:
    """Lay out symbols in rows of one for each state, the last row filled up."""
    width = states or states_for(len(starts))
    missing = -len(starts) % width
    first = np.pad(starts, (0, missing)).reshape(-1, width)
    return first, np.pad(frequencies, (0, missing), constant_values=TOTAL).reshape(-1, width)
