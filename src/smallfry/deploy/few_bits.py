"""ONNX graphs of quantised models with their own codes, scales and ranges.

A weight is stored once, in four bits where its codes allow it and else in eight, and every call
that applies it names it. So a graph computes what ``smallfry.layers.quantized`` computes.
"""

from collections import defaultdict

import numpy as np
import onnx
from onnx import numpy_helper

from smallfry.deploy.graphs import Graph, exported_program, to_onnx
from smallfry.deploy.quantize import compact
from smallfry.layers.onnx_codes import emitting_codes

FOUR_BITS = range(-8, 8)


def few_bits_graph(graph: Graph) -> bytes:
    """Convert a graph of a quantised model to ONNX with its codes.

    Raises:
        ExportError: It can't be traced or converted.
    """
    with emitting_codes():
        model = to_onnx(graph, exported_program(graph))
    model = compact(pack_four_bits(model))
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def pack_four_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store codes from −8 to 7 in four bits, two a byte."""
    readers = defaultdict(set)
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            readers[name].add((node.op_type, position))
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT8:
            continue
        codes = numpy_helper.to_array(tensor)
        fits = codes.size > 0 and codes.min() in FOUR_BITS and codes.max() in FOUR_BITS
        if not fits or readers[tensor.name] != {("DequantizeLinear", 0)}:
            continue
        nibbles = np.append(codes.flatten(), np.zeros(codes.size % 2, np.int8)).view(np.uint8) & 15
        packed = (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()
        tensor.CopyFrom(
            onnx.helper.make_tensor(
                tensor.name, onnx.TensorProto.INT4, codes.shape, packed, raw=True
            )
        )
    del model.graph.value_info[:]
    return model
