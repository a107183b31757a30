"""Storage of an export's graphs in fewer bytes: packed, or as parts of the full model's."""

from collections.abc import Iterator, Mapping
from itertools import product
from math import gcd

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from smallfry.compress.coding.packing import ENTROPIES, Tensor8, pack
from smallfry_runtime.shared import Part, part_of, restore, write_shared
from smallfry_runtime.storage import PACKED, SHARED, SUFFIXES

__all__ = ["packed_graphs", "shared_graphs"]

FEWEST = 256  # bytes of a tensor that is coded or shared
CODES: dict[int, bool] = {  # of ONNX, by whether their bytes have a sign; two of four bits make one
    onnx.TensorProto.INT8: True,
    onnx.TensorProto.UINT8: False,
    onnx.TensorProto.INT4: False,
    onnx.TensorProto.UINT4: False,
}


def packed_graphs(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Pack the files of graphs; of ONNX, weights in codes get an entropy coder of their own."""
    return {
        name + SUFFIXES[PACKED]: pack(content, _codes(name, content), ENTROPIES).data
        for name, content in files.items()
    }


def shared_graphs(files: Mapping[str, bytes], bases: Mapping[str, bytes]) -> dict[str, bytes]:
    """Store graphs without the weights that the full model's graphs have.

    A tensor of float32 that is a part of the full model's of the same name is left out; others
    stay, as those of other formats than ONNX do.
    """
    found = {}
    for name, content in files.items():
        base = bases[name]
        shared = write_shared(content, base, [*_parts(name, content, base)])
        if restore(shared, base) != content:
            raise RuntimeError("the shared file doesn't restore its original")
        found[name + SUFFIXES[SHARED]] = shared
    return found


def _tensors(name: str, content: bytes) -> dict[str, tuple[int, onnx.TensorProto]]:
    """Find large weights with their offsets in the file of an ONNX graph; none of another file."""
    if not name.endswith(".onnx"):
        return {}
    found, end = {}, 0
    for tensor in onnx.load_from_string(content).graph.initializer:  # in the order of the file
        if len(tensor.raw_data) >= FEWEST:
            found[tensor.name] = (content.index(tensor.raw_data, end), tensor)
            end = found[tensor.name][0] + len(tensor.raw_data)
    return found


def _codes(name: str, content: bytes) -> list[Tensor8]:
    found = []
    for key, (offset, each) in _tensors(name, content).items():
        if each.data_type in CODES:
            length = len(each.raw_data)
            rows = each.dims[0] if length % each.dims[0] == 0 else 1
            found.append(Tensor8(key, offset, (rows, length // rows), CODES[each.data_type]))
    return found


def _parts(name: str, content: bytes, base: bytes) -> Iterator[Part]:
    full = _tensors(name, base)
    for key, (offset, each) in _tensors(name, content).items():
        if key not in full or each.data_type != onnx.TensorProto.FLOAT:
            continue
        base_offset, of = full[key]
        whole, part = numpy_helper.to_array(of), numpy_helper.to_array(each)
        blocks = _blocks(whole, part)
        if of.data_type == each.data_type and blocks is not None:
            yield Part(offset, base_offset, whole.shape, part.shape, blocks)


def _blocks(whole: NDArray[np.float32], part: NDArray[np.float32]) -> tuple[int, ...] | None:
    """Find the blocks of each axis whose first values are a part; None if it is none."""
    if whole.ndim != part.ndim or any(a < b for a, b in zip(whole.shape, part.shape, strict=True)):
        return None
    choices = [
        [1] if a == b else [n for n in range(1, gcd(a, b) + 1) if a % n == b % n == 0]
        for a, b in zip(whole.shape, part.shape, strict=True)
    ]
    for blocks in product(*choices):
        if np.array_equal(part_of(whole, part.shape, blocks), part):
            return tuple(blocks)
    return None
