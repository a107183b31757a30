"""Export a trained model to a device format."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smallfry.cli._fields import option
from smallfry.cli._shared import Licensed, OneRun, OtherData
from smallfry.io.terminal import command, say


@dataclass(frozen=True, kw_only=True)
class Options(Licensed, OneRun):
    """Export a trained model to a device format, by default for ONNX Runtime.

    Args:
        to: Folder of the export; default exports/RUN-PRECISION, and -TARGET if not onnx.
        target: Device format: onnx, openvino, executorch or litert.
        form: One graph, or three for early exit from the recursion; default anytime for a model of
            several recursion steps.
        precision: int8 uses activation ranges of training images, int8_dynamic computes them for
            each batch; own_bits keeps the codes and ranges of a model that is quantised already.
        pack: Store the graphs packed, in fewer bytes; the runtime unpacks them when it starts.
        torch_program: Also write model.pt2 for torch.export.
        submodels: Sub-models of a nested run to export beside the full one, for predict with
            --budget_ms; the best by accuracy and latency.
        data: Images to calibrate with, instead of the run's own.
    """

    to: Path | None = option(metavar="DIR")
    target: str = "onnx"
    form: Literal["whole", "anytime"] | None = None
    precision: Literal["float32", "int8", "int8_dynamic", "own_bits"] = "float32"
    pack: bool = False
    torch_program: bool = False
    submodels: int = 0
    data: OtherData = field(default_factory=OtherData)


def run(options: Options) -> int:
    """Export, and print the folder and its size."""
    from smallfry.deploy.export import export, export_bytes

    precision = options.precision
    name = f"{Path(options.run).resolve().name}-{precision}"
    name += "" if options.target == "onnx" else f"-{options.target}"
    folder = options.to or Path("exports") / name
    export(
        options.run,
        folder,
        options.form,
        precision,
        options.checkpoint,
        options.torch_program,
        options.license,
        options.data.name,
        options.data.root,
        options.submodels,
        options.target,
        options.pack,
    )
    if precision not in ("float32", "own_bits"):
        from smallfry.deploy.quantization_report import print_report

        print_report(folder)
    say(f"export: {folder} ({export_bytes(folder) / 1e6:,.2f} MB)")
    say(f"use it: {command('smallfry', 'predict', folder)} FILE…")
    return 0
