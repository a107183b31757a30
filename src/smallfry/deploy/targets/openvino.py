"""OpenVINO's intermediate representation, from ONNX.

Int8 graphs are those of ONNX, with the same scales and ranges, which OpenVINO turns to products in
integers; all but products reads values that were not rounded. Weights are stored once.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import onnx

from smallfry.deploy.quantize import PRODUCTS, with_precision
from smallfry.deploy.targets.target import Source, register_target
from smallfry.errors import ExportError


@register_target
class OpenVino:
    """Graphs of OpenVINO."""

    name: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")
    packages: ClassVar[tuple[str, ...]] = ("openvino",)

    def convert(self, source: Source, precision: str) -> dict[str, bytes]:
        """Convert the graphs; as ``Target.convert``."""
        import openvino

        graphs = with_precision(source.onnx, precision, source.images, source.recursion_steps)
        if precision == "int8":
            graphs = {name: rounding_for_products(graph) for name, graph in graphs.items()}
        core, files = openvino.Core(), {}
        with TemporaryDirectory() as folder:
            for name, graph in graphs.items():
                place = Path(folder, f"{name}.onnx")
                place.write_bytes(graph)
                try:
                    model = core.read_model(place)
                    # weights stay as they are, also in float32
                    openvino.save_model(model, place.with_suffix(".xml"), compress_to_fp16=False)
                except RuntimeError as error:
                    reason = " ".join(str(error).split())[:200]
                    raise ExportError(
                        f"{name}: can't be converted to OpenVINO ({reason})"
                    ) from error
                for suffix in (".xml", ".bin"):
                    files[f"{name}{suffix}"] = place.with_suffix(suffix).read_bytes()
        return files


def rounding_for_products(graph: bytes) -> bytes:
    """Connect all nodes of an int8 ONNX graph but products to values before quantization.

    OpenVINO (2026.4) loses the zero point of a product's input that another node reads, too.
    """
    model = onnx.load_from_string(graph)
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in (*PRODUCTS, "QuantizeLinear", "DequantizeLinear"):
            continue
        for position, name in enumerate(node.input):
            node.input[position] = _before_rounding(name, makers)
    for output in model.graph.output:
        source = _before_rounding(output.name, makers)
        if source != output.name:
            rounded = f"{output.name}_rounded"
            makers[output.name].output[0] = rounded
            for node in model.graph.node:
                node.input[:] = [rounded if name == output.name else name for name in node.input]
            model.graph.node.append(onnx.helper.make_node("Identity", [source], [output.name]))
    content: bytes = model.SerializeToString()
    return content


def _before_rounding(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    """Return the name of what was quantized and dequantized to a value; else its own."""
    maker = makers.get(name)
    if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in makers:
        return name  # a weight
    quantizer = makers[maker.input[0]]
    return quantizer.input[0] if quantizer.op_type == "QuantizeLinear" else name
