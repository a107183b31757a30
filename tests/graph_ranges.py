"""Ranges written into a quantized graph, which those measured before it are compared with."""

from collections import defaultdict

import numpy as np
import onnx
from onnx import numpy_helper

from smallfry.deploy.quantize import PRODUCTS, QUANTIZED, CallRange


def call_ranges(graph: bytes) -> list[CallRange]:
    """Read the input range of every product in a statically quantized graph, in execution order."""
    model = onnx.load_from_string(graph).graph
    constants = {tensor.name: tensor for tensor in model.initializer}
    made_by = {output: node for node in model.node for output in node.output}
    calls: dict[str, int] = defaultdict(int)
    found = []
    for node in model.node:
        if node.op_type not in PRODUCTS:
            continue
        source, weight = (made_by.get(name) for name in node.input[:2])
        if source is None or weight is None or weight.op_type != "DequantizeLinear":
            continue
        if weight.input[0] not in constants or source.op_type != "DequantizeLinear":
            continue
        scale, zero = (numpy_helper.to_array(constants[name]) for name in source.input[1:3])
        limits = np.iinfo(zero.dtype)
        low, high = ((limit - int(zero)) * float(scale) for limit in (limits.min, limits.max))
        name = weight.input[0].removesuffix(QUANTIZED)
        found.append(CallRange(name, calls[name], low, high))
        calls[name] += 1
    return found
