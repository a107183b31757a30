"""ExecuTorch programs for the kernels of XNNPACK, for one image at a time.

In int8, linear layers and convolutions have weights with a scale per output channel, and a range of
each call measured on images.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from smallfry.deploy.graphs import Graph, exported_program
from smallfry.deploy.targets.single import calibration_batches, one_image, reason_of
from smallfry.deploy.targets.target import Source, register_target
from smallfry.errors import ExportError


@register_target
class ExecuTorch:
    """Programs of ExecuTorch."""

    name: ClassVar[str] = "executorch"
    title: ClassVar[str] = "ExecuTorch"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")
    packages: ClassVar[tuple[str, ...]] = ("executorch",)

    def convert(self, source: Source, precision: str) -> dict[str, bytes]:
        """Convert the graphs; as ``Target.convert``."""
        batches = calibration_batches(source) if precision == "int8" else {}
        files = {}
        for graph in source.modules:
            with _quiet():
                try:
                    module = graph.module.eval()
                    if graph.name in batches:
                        module = _quantized(graph, batches[graph.name])
                    files[f"{graph.name}.pte"] = _lowered(module, one_image(graph))
                except ModuleNotFoundError:
                    raise
                except Exception as error:  # a compiler of others raises anything
                    raise ExportError(
                        f"{graph.name}: can't be converted to ExecuTorch ({reason_of(error)})"
                    ) from error
        return files


def _quantized(graph: Graph, batches: Iterable[tuple[Any, ...]]) -> nn.Module:
    """Quantize a graph's products with ranges of batches."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        CONV_TARGETS,
        LINEAR_TARGETS,
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    for product in (*LINEAR_TARGETS, *CONV_TARGETS):
        quantizer.set_operator_type(product, get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(exported_program(graph).module(), quantizer)
    names = list(graph.arguments)
    with torch.inference_mode():
        for batch in batches:
            prepared(**dict(zip(names, batch, strict=True)))
    converted: nn.Module = convert_pt2e(prepared)
    return _Positional(converted, names)


class _Positional(nn.Module):
    """Module with the arguments of another by position."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *given: Any) -> Any:
        return self.module(**dict(zip(self.names, given, strict=True)))


def _lowered(module: nn.Module, given: tuple[Any, ...]) -> bytes:
    """Compile a module for inputs of these shapes to a program."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    program = torch.export.export(module, given)
    lowered = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    return bytes(lowered.to_executorch().buffer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the compiler's informational messages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
