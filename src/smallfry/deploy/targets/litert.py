"""LiteRT flat buffers (formerly TensorFlow Lite), for one image at a time.

In int8, fully connected layers and convolutions have weights with a scale per output channel, and a
range of each call measured on images.
"""

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from torch import Tensor

from smallfry.deploy.targets.single import calibration_batches, one_image, reason_of
from smallfry.deploy.targets.target import Source, register_target
from smallfry.errors import ExportError

PRODUCTS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")


@register_target
class LiteRt:
    """Flat buffers of LiteRT."""

    name: ClassVar[str] = "litert"
    title: ClassVar[str] = "LiteRT"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")
    packages: ClassVar[tuple[str, ...]] = ("litert-torch", "ai-edge-litert", "ai-edge-quantizer")

    def convert(self, source: Source, precision: str) -> dict[str, bytes]:
        """Convert the graphs; as ``Target.convert``."""
        import litert_torch

        batches = calibration_batches(source) if precision == "int8" else {}
        files = {}
        for graph in source.modules:
            try:
                with _quiet(), TemporaryDirectory() as folder:
                    model = litert_torch.convert(graph.module.eval(), one_image(graph))
                    file = Path(folder, "model.tflite")
                    model.export(str(file))
                    if graph.name in batches:
                        content = _quantized(file, batches[graph.name])
                    else:
                        content = file.read_bytes()
            except Exception as error:  # a compiler of others raises anything
                raise ExportError(
                    f"{graph.name}: can't be converted to LiteRT ({reason_of(error)})"
                ) from error
            files[f"{graph.name}.tflite"] = content
        return files


def _quantized(file: Path, batches: Iterable[tuple[Any, ...]]) -> bytes:
    """Quantize the products of a graph with ranges of batches; one without products stays."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.calibrator import CalibrationInterpreter, CalibrationMode
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    maker = quantizer.Quantizer(bytearray(file.read_bytes()))
    for product in PRODUCTS:
        maker.add_static_config(".*", TFLOperationName(product), 8, 8)
    mode = CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS
    interpreter = CalibrationInterpreter(str(file), mode, min_max_update)  # not moving averages
    run = interpreter.get_signature_runner()
    for image in chain.from_iterable(map(_images, batches)):
        run(**image)
    return bytes(maker.quantize(interpreter.get_calibration_results()).quantized_model)


def _images(batch: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Divide a batch into the arguments of single images, by LiteRT's names."""
    flat = [t for each in batch for t in ((each,) if isinstance(each, Tensor) else each)]
    for row in range(len(flat[0])):
        yield {f"args_{i}": each[row : row + 1].numpy() for i, each in enumerate(flat)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress of converter and quantizer."""
    from litert_torch import progress

    before, out = progress.config.show_progress, io.StringIO()
    progress.config.show_progress = False
    try:
        with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(out):
            warnings.simplefilter("ignore")
            yield
    finally:
        progress.config.show_progress = before
