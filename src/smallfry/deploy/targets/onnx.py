"""ONNX, run by ONNX Runtime."""

from typing import ClassVar

from smallfry.deploy.onnx_metadata import with_metadata
from smallfry.deploy.quantize import with_precision
from smallfry.deploy.targets.target import Source, register_target


@register_target
class Onnx:
    """ONNX graphs with classes and preprocessing as metadata."""

    name: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8", "int8_dynamic", "own_bits")
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def convert(self, source: Source, precision: str) -> dict[str, bytes]:
        """Quantize the graphs, and add metadata; as ``Target.convert``."""
        graphs = with_precision(source.onnx, precision, source.images, source.recursion_steps)
        return {f"{n}.onnx": with_metadata(each, source.metadata) for n, each in graphs.items()}
