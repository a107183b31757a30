"""Int8 quantization of weights and activations with ONNX Runtime.

Weights get a scale per output channel. Activations get a range per *call*: a recursive model
applies one matrix again and again to rows whose distribution moves from call to call, so each
product has a scale of its own, measured on calibration images (static), or taken from each image
as it comes (dynamic). The weights are still stored once. In the form "anytime" one graph serves
all recursion steps, so a range there is that of a call within a step, over all steps.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from smallfry.errors import ExportError

__all__ = ["CallRange", "compact", "graph_inputs", "measured_ranges", "quantize", "with_precision"]

PRODUCTS = ["MatMul", "Gemm", "Conv"]  # where the arithmetic is; the rest stays in float32
DYNAMIC_PRODUCTS = ["MatMul", "Gemm"]  # a dynamic convolution runs slower than a float32 one
QUANTIZED = "_quantized"  # what the quantizer appends to the name of a weight
CALIBRATION_BATCH = 32
ANY_SIZE = 2**40  # numbers in a constant that may be stored once for several

Floats = NDArray[np.float32]


class CallRange(NamedTuple):
    """Input range of one application of a weight."""

    weight: str
    call: int  # counted from 0
    low: float
    high: float


def quantize(
    graphs: Mapping[str, bytes], precision: str, images: Floats, recursion_steps: int = 1
) -> dict[str, bytes]:
    """Quantize the graphs of an export to int8.

    Args:
        graphs: ONNX models by name: ``model``, or ``embed``, ``step`` and ``read_out``.
        precision: ``int8`` (static) or ``int8_dynamic``.
        images: Normalised calibration images, (images, channels, height, width), for static ranges.
        recursion_steps: Number of applications of ``step``.

    Raises:
        ExportError: No images to calibrate with, or a graph that can't be quantized.
    """
    if precision == "int8_dynamic":
        return {name: _quantize(name, graph, None) for name, graph in graphs.items()}
    if len(images) == 0:
        raise ExportError("static int8 needs images to measure activation ranges")
    inputs = graph_inputs(graphs, images, recursion_steps)
    return {name: _quantize(name, graph, inputs[name]) for name, graph in graphs.items()}


def with_precision(
    graphs: Mapping[str, bytes], precision: str, images: Floats, recursion_steps: int = 1
) -> dict[str, bytes]:
    """Quantize graphs to ``int8`` or ``int8_dynamic``, and leave them as they are for others.

    Arguments and errors are those of ``quantize``.
    """
    if precision in ("float32", "own_bits"):
        return dict(graphs)
    return quantize(graphs, precision, images, recursion_steps)


def measured_ranges(
    graphs: Mapping[str, bytes], images: Floats, recursion_steps: int = 1
) -> dict[str, list[list[CallRange]]]:
    """Measure the input range of every product as images pass through a float32 export.

    Args:
        graphs: See ``quantize``.
        images: (images, channels, height, width), normalised.
        recursion_steps: Number of applications of ``step``.

    Returns:
        For each graph with products a list for each time that it is applied, in order of
        execution.
    """
    found = {}
    for name, batches in graph_inputs(graphs, images, recursion_steps).items():
        model, weights = _with_ranges(graphs[name])
        if not weights:  # a graph that multiplies nothing
            continue
        run = ort.InferenceSession(model).run
        said = np.array([run(None, batch) for batch in batches])
        times = recursion_steps if name in ("step", "read_out") else 1
        found[name] = [_called(weights, said[time::times]) for time in range(times)]
    return found


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches for ONNX Runtime's calibration."""

    def __init__(self, batches: list[dict[str, Floats]]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._left, None)


def _with_ranges(graph: bytes) -> tuple[bytes, list[str]]:
    """Build a graph that returns the input range of every product, and its weights."""
    model = onnx.load_from_string(graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [
        node for node in model.graph.node if node.op_type in PRODUCTS and node.input[1] in constants
    ]
    del model.graph.output[:]
    for number, node in enumerate(products):
        for operator in ("ReduceMin", "ReduceMax"):
            output = f"{operator}_{number}"
            model.graph.node.append(
                onnx.helper.make_node(operator, [node.input[0]], [output], keepdims=0)
            )
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [])
            )
    return model.SerializeToString(), [node.input[1] for node in products]


def _called(weights: list[str], said: NDArray[np.floating[Any]]) -> list[CallRange]:
    """Reduce ranges over all batches; ``said`` is (batches, 2 × products), min and max in turn."""
    lows, highs = said[:, ::2].min(axis=0), said[:, 1::2].max(axis=0)
    calls: dict[str, int] = defaultdict(int)
    found = []
    for weight, low, high in zip(weights, lows.tolist(), highs.tolist(), strict=True):
        found.append(CallRange(weight, calls[weight], low, high))
        calls[weight] += 1
    return found


def graph_inputs(
    graphs: Mapping[str, bytes], images: Floats, recursion_steps: int
) -> dict[str, list[dict[str, Floats]]]:
    """Collect the inputs of each graph, by name, as the images pass through all of them.

    Args:
        graphs: See ``quantize``.
        images: (images, channels, height, width), normalised.
        recursion_steps: Number of applications of ``step``.

    Returns:
        For each graph the inputs of each batch, in the graph's order.
    """
    first = next(iter(graphs))
    batches = [
        {"images": images[start : start + CALIBRATION_BATCH]}
        for start in range(0, len(images), CALIBRATION_BATCH)
    ]
    seen: dict[str, list[dict[str, Floats]]] = {first: batches}
    if first == "model":
        return seen
    sessions = {name: ort.InferenceSession(graph) for name, graph in graphs.items()}
    run = {name: session.run for name, session in sessions.items()}
    names = [entry.name for entry in sessions["step"].get_inputs()]
    seen |= {"step": [], "read_out": []}
    for batch in batches:
        x, *state = run["embed"](None, batch)
        for _ in range(recursion_steps):
            seen["step"].append(dict(zip(names, (x, *state), strict=True)))
            state = run["step"](None, seen["step"][-1])
            seen["read_out"].append({"y": state[0]})
    return seen


def _quantize(name: str, graph: bytes, batches: list[dict[str, Floats]] | None) -> bytes:
    """Quantize one graph, statically with batches and dynamically without."""
    with TemporaryDirectory() as folder, _silent():
        source, target = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(graph if batches else _transposed_once(graph))
        options: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
        try:
            if batches is None:
                quantize_dynamic(source, target, op_types_to_quantize=DYNAMIC_PRODUCTS, **options)
            else:
                quantize_static(
                    source,
                    target,
                    _Reader(batches),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    op_types_to_quantize=PRODUCTS,
                    **options,
                )
        except Exception as error:  # the quantizer raises anything
            reason = " ".join(str(error).split())[:200]
            raise ExportError(f"{name}: can't be quantized ({reason})") from error
        model = compact(onnx.load(target))
        onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString()
        return content


def _transposed_once(graph: bytes) -> bytes:
    """Store the weights of Gemm in the order of the multiplication.

    The dynamic quantizer turns every Gemm into a MatMul, and transposes its weight in place: a
    weight that a second Gemm applies would be turned back.
    """
    model = onnx.load_from_string(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = {entry.name: entry for entry in node.attribute}
        turned = "transB" in attributes and attributes["transB"].i == 1
        if node.op_type != "Gemm" or not turned or node.input[1] not in weights:
            continue
        name = f"{node.input[1]}.transposed"
        if name not in weights:
            matrix = numpy_helper.to_array(weights[node.input[1]]).T.copy()
            weights[name] = numpy_helper.from_array(matrix, name)
            model.graph.initializer.append(weights[name])
        attributes["transB"].i = 0
        node.input[1] = name
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    content: bytes = model.SerializeToString()
    return content


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store equal constants once, shorten names, and drop default attributes.

    The quantizer gives every range two constants with names of fifty letters; in a small network
    what describes it would outweigh the weights.
    """
    ir_model = onnx_ir.from_proto(model)
    passes.DeduplicateInitializersPass(size_limit=ANY_SIZE)(ir_model)
    passes.ClearMetadataAndDocStringPass()(ir_model)
    model = onnx_ir.to_proto(ir_model)
    graph = model.graph
    del graph.value_info[:]
    kept = {entry.name for entry in (*graph.input, *graph.output)}
    kept |= {tensor.name for tensor in graph.initializer if tensor.name.endswith(QUANTIZED)}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    short: dict[str, str] = {}

    def rename(name: str) -> str:
        return name if not name or name in kept else short.setdefault(name, f"_{len(short):x}")

    for tensor in graph.initializer:
        tensor.name = rename(tensor.name)
    for node in graph.node:
        node.ClearField("name")
        attributes = [entry for entry in node.attribute if not _is_default(node, entry, opsets)]
        del node.attribute[:]
        node.attribute.extend(attributes)
        for names in (node.input, node.output):
            names[:] = [rename(name) for name in names]
    return model


def _is_default(node: Any, attribute: Any, opsets: Mapping[str, int]) -> bool:
    if not onnx.defs.has(node.op_type, node.domain):
        return False
    schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
    known = schema.attributes.get(attribute.name)
    return known is not None and known.default_value == attribute


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the quantizer's advice, which it logs to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
