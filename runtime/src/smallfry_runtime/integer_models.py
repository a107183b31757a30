"""Distributions of the integers in a packed file, given by a few stored parameters.

    static     one histogram, 16 bits a frequency
    laplace    p(k) ∝ θ^|k|, θ = s / (s + 1), with a scale s for each channel, 8 bits
    gauss      p(k) ∝ q^(k²), q = s² / (s² + ½), likewise
    circuit    a hidden Chow–Liu tree over blocks of neighbours, its tables shared by all of them

The powers are products, without exp: every processor computes the same bits.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import DataError
from smallfry_runtime.latent_trees import LatentTree
from smallfry_runtime.rans import TOTAL, Cumulative, decode, quantized, work_of_rows

STORED = 1 << 15  # sum of stored frequencies
SCALES, SMALLEST, RATIO = 128, 0.05, 1.075  # from 0.05 to 480
SCALED = ("laplace", "gauss")
RUN_WORK = 2**20  # of the tables of a run
CODERS = ("static", *SCALED, "circuit")


class Coded(NamedTuple):
    """Description of coded integers.

    Args:
        coder: One of ``CODERS``.
        integers: Number of integers.
        low: The smallest possible one.
        symbols: Number of possible values.
        channels: Channels, of equal size, for ``laplace`` and ``gauss``; else 1.
    """

    coder: str
    integers: int
    low: int
    symbols: int
    channels: int = 1


def decode_integers(coded: Coded, payload: bytes) -> NDArray[np.int64]:
    """Decode integers, (integers,).

    Raises:
        DataError: Damaged.
    """
    rows = None
    if coded.coder == "circuit":
        tree, size = read_tree(payload, coded.symbols)
        blocks = -(-coded.integers // len(tree.parents))
        symbols = tree.decode(payload[size:], blocks).ravel()[: coded.integers]
    elif coded.coder == "static":
        size = 2 * coded.symbols
        tables = read_frequencies(payload, coded.symbols)
        symbols = decode(payload[size:], tables, coded.integers)
    else:
        size = coded.channels
        scales = np.frombuffer(payload[:size], np.uint8)
        if len(scales) < size or coded.integers % size or int(scales.max(initial=0)) >= SCALES:
            raise DataError("the packed file is damaged: scales of channels are missing")
        tables = scale_tables(coded.coder, coded.low, coded.symbols)
        rows = np.repeat(scales.astype(np.int64), coded.integers // size)
        symbols = decode(payload[size:], tables, coded.integers, rows)
    return symbols + coded.low


def work_of(coded: Coded, payload: bytes) -> int:
    """Estimate the work of ``decode_integers``, before it is done, in nanoseconds of a processor.

    Raises:
        DataError: Damaged.
    """
    if coded.coder == "circuit":
        tree, size = read_tree(payload, coded.symbols)
        blocks = -(-coded.integers // len(tree.parents))
        return RUN_WORK + tree.work(payload[size:], blocks)
    size = 2 * coded.symbols if coded.coder == "static" else coded.channels
    return RUN_WORK + work_of_rows(payload[size:], coded.integers, coded.symbols)


def scale_tables(coder: str, low: int, symbols: int) -> Cumulative:
    """Compute the tables of all scales: (128, symbols + 1)."""
    scales = SMALLEST * np.cumprod(np.full((SCALES, 1), RATIO), axis=0)
    most = max(abs(low), abs(low + symbols - 1))
    if coder == "laplace":
        powers = np.cumprod(np.repeat(scales / (scales + 1), most, axis=1), axis=1)
    else:
        base = scales * scales / (scales * scales + 0.5)
        factors = base * np.cumprod(np.repeat(base * base, most, axis=1), axis=1)
        first = np.concatenate([base, factors], axis=1)[:, :most]  # q, q³, q⁵, …
        powers = np.cumprod(first, axis=1)
    powers = np.concatenate([np.ones((SCALES, 1)), powers], axis=1)
    powers = powers[:, np.abs(np.arange(low, low + symbols))]
    powers[powers.sum(axis=1) == 0] = 1  # a scale so small that no symbol has a share above 0
    return quantized(powers)


def read_frequencies(payload: bytes, symbols: int, rows: int = 1) -> Cumulative:
    """Read stored frequencies to tables (rows, symbols + 1).

    Raises:
        DataError: Too few bytes, or frequencies of another sum.
    """
    stored = np.frombuffer(payload[: 2 * symbols * rows], "<u2").astype(np.int64)
    if len(stored) != symbols * rows:
        raise DataError("the packed file is damaged: frequencies are missing")
    table = np.zeros((rows, symbols + 1), np.int64)
    table[:, 1:] = np.cumsum(stored.reshape(rows, symbols), axis=1) * (TOTAL // STORED)
    if bool((table[:, -1] != TOTAL).any()) or not stored.all():
        raise DataError("the packed file is damaged: frequencies have a wrong sum")
    return table


def stored_frequencies(probabilities: NDArray[Any]) -> bytes:
    """Store distributions (…, symbols) as ``read_frequencies`` takes them."""
    frequencies: NDArray[np.int64] = np.diff(quantized(probabilities, STORED), axis=-1)
    return frequencies.astype("<u2").tobytes()


def read_tree(payload: bytes, symbols: int) -> tuple[LatentTree, int]:
    """Read a tree with shared tables: variables, states, parents + 1, π, A, E; and its length.

    Raises:
        DataError: Too short, or no tree.
    """
    if len(payload) < 2:
        raise DataError("the packed file is damaged: a circuit is missing")
    variables, states = payload[0], payload[1]
    parents = [parent - 1 for parent in payload[2 : 2 + variables]]
    position, tables = 2 + variables, []
    for rows, width in ((1, states), (states, states), (states, symbols)):
        tables.append(read_frequencies(payload[position:], width, rows))
        position += 2 * rows * width
    return LatentTree(parents, tables[0][0], tables[1][None], tables[2][None]), position
