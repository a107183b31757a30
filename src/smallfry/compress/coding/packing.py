"""Packing of files with 8-bit integers, such as the weights of a quantised network.

Each tensor of codes gets the coder that makes it smallest, its parameters included; see
``smallfry_runtime.integer_models``. ``smallfry_runtime.packed`` restores the file, bit for bit and
without PyTorch.
"""

import zlib
from collections.abc import Collection, Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.compress.coding.chow_liu import mutual_information, spanning_tree
from smallfry.compress.coding.circuits import encode_samples
from smallfry.compress.coding.em import EMConfig, learn
from smallfry.compress.coding.rans import encode_symbols
from smallfry.errors import UsageError
from smallfry_runtime.files import parse_json
from smallfry_runtime.integer_models import (
    SCALED,
    Coded,
    read_frequencies,
    read_tree,
    scale_tables,
    stored_frequencies,
    work_of,
)
from smallfry_runtime.packed import MOST_RATIO, Run, unpack, write_packed
from smallfry_runtime.rans import TOTAL, Cumulative, is_justified

Entropy = Literal["static", "laplace", "circuit"]
ENTROPIES: tuple[Entropy, ...] = ("static", "laplace", "circuit")
FEWEST = 256  # integers of a tensor that is coded
FEWEST_FOR_CIRCUIT = 100_000
BLOCK, STATES = 16, 4  # neighbours and hidden states of a circuit
FITTED, EPOCHS = 10_000, 10  # blocks that a circuit is fitted to, and passes
INTEGERS = {"I8": np.int8, "U8": np.uint8, "BOOL": np.uint8}  # of safetensors


class Tensor8(NamedTuple):
    """Tensor of 8-bit integers in a file."""

    name: str
    offset: int
    shape: tuple[int, ...]
    is_signed: bool


class Row(NamedTuple):
    """Figures of a tensor in a packed file."""

    name: str
    integers: int
    entropy: float  # bits an integer, of one histogram
    coder: str  # "zlib" if it is left to the rest
    bytes: int  # with the parameters of the coder


class Packed(NamedTuple):
    """Packed file, and the figures of its tensors."""

    data: bytes
    rows: tuple[Row, ...]


def pack(
    original: bytes,
    tensors: Sequence[Tensor8] | None = None,
    entropies: Collection[Entropy] = ENTROPIES,
) -> Packed:
    """Pack a file; the result is decoded once and compared.

    Args:
        original: Content of the file.
        tensors: Integers in it, in the order of offsets; None for those of a safetensors file.
        entropies: Coders to try: ``static``, ``laplace`` (and Gauss), ``circuit`` (for tensors of
            100,000 integers and more).

    Raises:
        UsageError: An unknown coder, or not a safetensors file without ``tensors``.

    Example:
        >>> import numpy as np, safetensors.numpy
        >>> from smallfry.compress.coding.packing import pack
        >>> codes = np.random.default_rng(0).normal(0, 9, (64, 64)).astype(np.int8)
        >>> packed = pack(safetensors.numpy.save({"codes": codes}))
        >>> packed.rows[0].coder, len(packed.data) < 0.75 * codes.size
        ('gauss', True)
    """
    unknown = [each for each in entropies if each not in ENTROPIES]
    if unknown or not entropies:
        raise UsageError(f"entropies are of {', '.join(ENTROPIES)}, not {unknown}")
    runs: list[Run] = []
    payloads: list[bytes] = []
    rows: list[Row] = []
    work = 0
    for tensor in find_integers(original) if tensors is None else tensors:
        count = prod(tensor.shape)
        kind = np.int8 if tensor.is_signed else np.uint8
        values = np.frombuffer(original, kind, count, tensor.offset).astype(np.int64)
        coded, payload, size = None, b"", len(zlib.compress(values.astype(kind).tobytes(), 9))
        if count >= FEWEST:
            coded, payload = _smallest(values, tensor.shape[0], entropies)
        if (
            coded is not None
            and len(payload) < size
            and count <= MOST_RATIO // 2 * len(payload)
            and is_justified(new := work + work_of(coded, payload), sum(map(len, payloads)))
        ):
            work = new
            runs.append(Run(tensor.offset, coded, len(payload)))
            payloads.append(payload)
            rows.append(Row(tensor.name, count, _entropy(values), coded.coder, len(payload)))
        else:
            rows.append(Row(tensor.name, count, _entropy(values), "zlib", size))
    data = write_packed(original, runs, payloads)
    if unpack(data) != original:
        raise RuntimeError("the packed file doesn't decode to its original")
    return Packed(data, tuple(rows))


def find_integers(original: bytes) -> list[Tensor8]:
    """List the 8-bit tensors of a safetensors file.

    Raises:
        UsageError: Another file.
    """
    try:
        size = int.from_bytes(original[:8], "little")
        header: dict[str, Any] = parse_json(original[8 : 8 + size])
        found = [
            Tensor8(name, 8 + size + each["data_offsets"][0], tuple(each["shape"]), kind == "I8")
            for name, each in header.items()
            if (kind := each.get("dtype")) in INTEGERS and 0 not in each["shape"] and each["shape"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError("expected the content of a safetensors file") from error
    return sorted(found, key=lambda tensor: tensor.offset)


def _entropy(values: NDArray[np.int64]) -> float:
    shares = np.unique(values, return_counts=True)[1] / max(1, len(values))
    return float(-(shares * np.log2(shares)).sum())


def _smallest(
    values: NDArray[np.int64], channels: int, entropies: Collection[Entropy]
) -> tuple[Coded, bytes]:
    """Encode integers by the coder of the fewest bytes."""
    low, most = int(values.min()), int(values.max())
    form = Coded("static", len(values), low, most - low + 1)
    symbols = values - low
    plain = []
    if "static" in entropies:
        plain.append(_static(form, symbols))
    if "laplace" in entropies:
        scaled = form._replace(channels=channels)
        plain += [_scaled(scaled._replace(coder=coder), symbols) for coder in SCALED]
    found = []
    if plain:
        best = min(plain, key=lambda each: each.bits)
        stream = encode_symbols(symbols, best.tables, best.rows)
        found.append((best.coded, best.stored + stream))
    if "circuit" in entropies and (len(values) >= FEWEST_FOR_CIRCUIT or not plain):
        found.append((form._replace(coder="circuit"), _encode_circuit(form, symbols)))
    return min(found, key=lambda each: len(each[1]))


class _Plan(NamedTuple):
    """Coder of independent integers, with its parameters, before anything is encoded."""

    coded: Coded
    stored: bytes
    tables: Cumulative
    rows: NDArray[np.int64] | None
    bits: float


def _static(coded: Coded, symbols: NDArray[np.int64]) -> _Plan:
    counts = np.bincount(symbols, minlength=coded.symbols)
    stored = stored_frequencies(counts)
    tables = read_frequencies(stored, coded.symbols)
    bits = float(counts @ -np.log2(np.diff(tables[0]) / TOTAL))
    return _Plan(coded, stored, tables, None, 8 * len(stored) + bits)


def _scaled(coded: Coded, symbols: NDArray[np.int64]) -> _Plan:
    """Find the best scale of each channel."""
    tables = scale_tables(coded.coder, coded.low, coded.symbols)
    flat = symbols.reshape(coded.channels, -1)
    keys = flat + coded.symbols * np.arange(coded.channels)[:, None]
    counts = np.bincount(keys.ravel(), minlength=coded.channels * coded.symbols)
    bits = counts.reshape(coded.channels, -1) @ -np.log2(np.diff(tables) / TOTAL).T
    scales = bits.argmin(axis=1)
    stored = scales.astype(np.uint8).tobytes()
    rows = np.repeat(scales, flat.shape[1])
    return _Plan(coded, stored, tables, rows, 8 * len(stored) + float(bits.min(axis=1).sum()))


def _encode_circuit(coded: Coded, symbols: NDArray[np.int64]) -> bytes:
    """Encode blocks of neighbours by a hidden Chow–Liu tree with shared tables."""
    missing = -len(symbols) % BLOCK
    blocks = np.pad(symbols, (0, missing), constant_values=-coded.low).reshape(-1, BLOCK)
    blocks = blocks.clip(0, coded.symbols - 1)  # the filling, where 0 is no symbol
    chosen = blocks[np.linspace(0, len(blocks) - 1, min(FITTED, len(blocks))).astype(int)]
    parents = spanning_tree(mutual_information(chosen, coded.symbols))
    config = EMConfig(STATES, EPOCHS, tied=True, pseudo_count=coded.symbols / 4)
    tables = learn(parents, chosen, coded.symbols, config)
    stored = bytes([BLOCK, STATES, *(parent + 1 for parent in parents)])
    for table in tables:
        stored += stored_frequencies(table)
    tree, _ = read_tree(stored, coded.symbols)
    return stored + encode_samples(tree, blocks)
