"""ONNX, run by ONNX Runtime."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from smallfry.data import ImageData
from smallfry.deploy.export import Traced, assemble, calibrate, trace_graphs
from smallfry.deploy.targets.target import Answering, register_target
from smallfry.errors import ExportError
from smallfry.io.replace import replacing
from smallfry.models import Recursive
from smallfry.training.run import TrainedModel
from smallfry_runtime.manifest import require_free
from smallfry_runtime.runtime import Runtime


@register_target
class Onnx:
    """ONNX graphs, one, or three of a model with early exit."""

    name: ClassVar[str] = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8", "own_bits")

    def export(
        self,
        trained: TrainedModel,
        facts: dict[str, Any],
        folders: Mapping[str, Path],
        data: ImageData,
    ) -> None:
        """Export a model; as ``Target.export``."""
        model = trained.model
        recurs = isinstance(model, Recursive) and model.recursion_steps > 1
        form = "anytime" if recurs else "whole"
        graphs: dict[bool, dict[str, bytes]] = {}  # by whether they hold the model's own bits
        for precision, folder in folders.items():
            own = precision == "own_bits"
            if own not in graphs:
                graphs[own] = trace_graphs(trained, form, own_bits=own)
            traced = Traced(trained, facts, form, graphs[own], data)
            try:
                with replacing(folder, partial(require_free, folder)) as new:
                    assemble(traced, new, precision)
                    calibrate(traced, new)
            except OSError as error:
                raise ExportError(f"{folder}: the export could not be written ({error})") from error

    def load(self, folder: Path, threads: int) -> Answering:
        """Load an export; as ``Target.load``."""
        return Runtime(folder, threads)
