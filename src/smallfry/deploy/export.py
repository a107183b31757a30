"""Export of a run to a self-contained folder, in a device format.

    model.onnx                            the whole model (form "whole"), or
    embed.onnx  step.onnx  read_out.onnx  its parts (form "anytime"), for images to leave early;
                                          in other formats with other endings
    model.pt2                             the whole model for torch.export.load, if asked for
    manifest.json                         classes, preprocessing, exits, figures, hashes
    quantization.json  quantization.png   what eight bits cost, of an export in eight bits
    submodels/                            exports of sub-models of a nested run, if asked for

The form "whole" gives the logits of every recursion step, and repeats in nodes, not in weights,
what recurs.
"""

import hashlib
import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smallfry.data import ImageData
from smallfry.deploy.agreement import require_agreement
from smallfry.deploy.few_bits import few_bits_graph
from smallfry.deploy.graphs import Graph, anytime_graphs, exported_program, to_onnx, whole_graph
from smallfry.deploy.onnx_metadata import metadata_of
from smallfry.deploy.pretrained import gather, load_trained
from smallfry.deploy.quantization_report import write_report
from smallfry.deploy.storing import packed_graphs, shared_graphs
from smallfry.deploy.submodels import Row, add_submodels
from smallfry.deploy.targets import Source, find_target, require_installed
from smallfry.errors import ExportError, SmallfryError, SmallfryWarning, UsageError
from smallfry.io.replace import replacing
from smallfry.layers.quantized import QuantizedWeight
from smallfry.models import Recursive
from smallfry.training.checkpoint import weights_digest
from smallfry.training.evaluation import task_of
from smallfry.training.evaluation_data import load_like
from smallfry.training.exit_calibration import judged_part
from smallfry.training.run import TrainedModel, thresholds_of
from smallfry.training.trained_run import TrainedRun
from smallfry.transforms.adapters import merge_adapters
from smallfry.transforms.nested import nest_of
from smallfry_runtime.early_exit import operating_points, pareto_front, warn_of_few
from smallfry_runtime.manifest import (
    CLASSES,
    LOGITS,
    MANIFEST,
    ONNX,
    PRECISIONS,
    PROGRAM,
    Manifest,
    manifest_of,
    read_export,
    require_free,
    restored_graphs,
)
from smallfry_runtime.names import path_of
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.storage import PACKED, PLAIN, SHARED, base_of
from smallfry_runtime.variants import FULL

log = logging.getLogger(__name__)

TRACED_BATCH = 2  # any size but 1, which tracers take for a broadcast
CALIBRATION_IMAGES = 256
FEW_FOR_RANGES = 32  # images, with fewer of which a static range is hardly known


def export(
    run: str | Path | TrainedModel | TrainedRun,
    folder: str | Path,
    form: str | None = None,
    precision: str = "float32",
    checkpoint: str = "best",
    torch_program: bool = False,
    license: str | None = None,
    data: str | None = None,
    data_root: Path | None = None,
    submodels: int = 0,
    target: str = ONNX,
    pack: bool = False,
) -> Path:
    """Export a run's model, replacing an existing export.

    Args:
        run: A run folder, a checkpoint in it, a shared folder, ``hf_hub:USER/NAME``, or what
            ``smallfry.load`` or ``smallfry.train`` returns.
        folder: Folder of the export. An existing export is kept until the new one is complete.
        form: ``whole``, ``anytime``, or None: anytime for a model of several recursion steps,
            unless its quantised layers have a range for each call of a pass.
        precision: ``float32``, ``int8`` (static ranges), ``int8_dynamic``, or ``own_bits``: codes
            and ranges of a model that is quantised already.
        checkpoint: ``best`` or ``last``.
        torch_program: Also write the whole model as a ``torch.export`` program, in float32.
        license: License of the weights, as an SPDX name; none is assumed.
        data: Other data than the run's to calibrate with: a name or a folder.
        data_root: Folder of a named data set.
        submodels: Sub-models of a nested run to export beside the full one, at most.
        target: Device format: ``onnx``, ``openvino``, ``executorch`` or ``litert``.
        pack: Store the graphs packed; the runtime unpacks them when it reads the export.

    Returns:
        The folder.

    Raises:
        ExportError: A model that can't be exported, graphs that differ from it, or a folder that
            holds something else or can't be written.
        UsageError: A form or precision that is not there, or not for this model.
        RunError: The run can't be read.

    Example:
        >>> import smallfry
        >>> smallfry.export("runs/digits", "exports/digits", precision="int8")  # doctest: +SKIP
        PosixPath('exports/digits')
    """
    run = run.model if isinstance(run, TrainedRun) else run
    folder = path_of(str(folder))
    _require_precision(precision, target)
    needed = precision == "int8"
    try:
        with replacing(folder, lambda: require_free(folder)) as new:
            own_bits = precision == "own_bits"
            if submodels:
                given = run if isinstance(run, TrainedModel) else load_trained(run, checkpoint)
                nest_of(given.model)
            traced = trace(run, form, checkpoint, data, data_root, needed, own_bits)
            storage = PACKED if pack else PLAIN
            assemble(traced, new, precision, license, torch_program, target, storage)
            calibrate(traced, new)
            if precision not in ("float32", "own_bits"):
                _report(traced, new, precision, target)
            if submodels:
                _add_submodels(traced, new, precision, license, submodels, target)
    except OSError as error:
        raise ExportError(f"{folder}: the export could not be written ({error})") from error
    return folder


class Traced(NamedTuple):
    """ONNX graphs of a model, in float32 or with its own bits, the source of exports."""

    trained: TrainedModel
    facts: dict[str, Any]  # what is known of it
    form: str  # whole or anytime
    graphs: dict[str, bytes]  # ONNX models by name
    data: ImageData | None  # what ranges, exits and figures are measured on

    @property
    def is_labelled(self) -> bool:
        """True if the data has the classes of the model."""
        return self.data is not None and self.data.classes == self.trained.classes


def trace(
    run: str | Path | TrainedModel,
    form: str | None = None,
    checkpoint: str = "best",
    data: str | None = None,
    data_root: Path | None = None,
    needs_images: bool = False,
    own_bits: bool = False,
) -> Traced:
    """Trace a run's model to graphs, with its calibration data.

    Arguments and errors are those of ``export``; with ``own_bits``, graphs hold the codes of a
    quantised model, and are for that precision alone. Without ``needs_images``, missing data
    causes a warning only.
    """
    trained, facts, _ = gather(run, checkpoint)
    trained = trained._replace(model=merge_adapters(trained.model))
    form = _form(trained.model, form)
    if own_bits:
        _require_own_bits(trained.model)
    elif _is_quantised(trained.model):
        log.info("not with the model's own bits, which --precision own_bits keeps")
    images = _data(trained, run, data, data_root, needs_images, form == "anytime")
    return Traced(trained, facts, form, trace_graphs(trained, form, own_bits), images)


def trace_graphs(trained: TrainedModel, form: str, own_bits: bool = False) -> dict[str, bytes]:
    """Trace a model to the graphs of a form; arguments as ``trace``."""
    graphs = {}
    for graph in _graphs(trained, form):
        log.info("tracing %s", graph.name)
        if own_bits:
            graphs[graph.name] = few_bits_graph(graph)
        else:
            graphs[graph.name] = to_onnx(graph, exported_program(graph)).SerializeToString()
    return graphs


def assemble(
    traced: Traced,
    folder: Path,
    precision: str = "float32",
    license: str | None = None,
    torch_program: bool = False,
    target: str = ONNX,
    storage: str = PLAIN,
) -> None:
    """Write an export, without early exit, into the caller's folder; raises as ``export``.

    With the storage ``shared``, the folder is that of a sub-model in the full model's export.
    """
    trained = traced.trained
    files: dict[str, bytes] = {}
    if torch_program:
        log.info("tracing model.pt2")
        files[PROGRAM] = _saved(exported_program(whole_graph(trained.model, _images(trained))))
    images = calibration_images(traced) if precision == "int8" else _no_images(trained)
    if 0 < len(images) < FEW_FOR_RANGES:
        warnings.warn(
            f"int8 ranges were measured on only {len(images)} images, and others may exceed "
            f"them: calibrate with {FEW_FOR_RANGES} or more (--data), or use int8_dynamic, "
            f"which needs none",
            SmallfryWarning,
            stacklevel=3,
        )
    log.info("converting to %s, %s", target, precision)
    modules = _graphs(trained, traced.form)
    steps = _steps(trained.model)
    source = Source(traced.graphs, modules, images, steps, metadata_of(trained))
    files |= _stored(find_target(target).convert(source, precision), storage, folder)
    outputs = (LOGITS,) if isinstance(trained.model, Recursive) else modules[0].outputs
    manifest = _manifest(traced, precision, license, files, target, storage, outputs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_text(manifest.to_json())
    runtime = Runtime(folder)
    if precision == "float32":
        require_agreement(trained, runtime)


def _stored(files: dict[str, bytes], storage: str, folder: Path) -> dict[str, bytes]:
    if storage == PLAIN:
        return files
    log.info("storing graphs, %s", storage)
    if storage == PACKED:
        return packed_graphs(files)
    base = base_of(folder)
    return shared_graphs(files, restored_graphs(*read_export(base), base))


def calibrate(traced: Traced, folder: Path) -> None:
    """Calibrate early exit of an export on its data, if it is split into graphs."""
    data = traced.data
    if traced.form != "anytime" or data is None or not traced.is_labelled:
        return
    trained = traced.trained
    validation = judged_part(data.validation, task_of(trained.manifest), len(trained.classes))
    if len(validation) == 0:
        return
    log.info("calibrating early exit")
    warn_of_few(len(validation))
    followed = Runtime(folder).trace(validation.images.numpy(), validation.labels.numpy())
    manifest = replace(
        Manifest.read(folder),
        exits=tuple(pareto_front(operating_points(followed))),
        calibrated_on=f"{len(validation):,} validation images of {Path(data.name).name}",
    )
    (folder / MANIFEST).write_text(manifest.to_json())


def export_bytes(folder: Path) -> int:
    """Sum the bytes of an export's graphs, those of its sub-models too."""
    manifest = Manifest.read(folder)
    nested = [(folder / manifest_of(v)).parent for v in manifest.submodels if v.place != FULL]
    places = [folder, *nested]
    return sum((at / name).stat().st_size for at in places for name in Manifest.read(at).graphs)


def calibration_images(traced: Traced) -> NDArray[np.float32]:
    """Return training images spread over the split, as graph inputs; none without data."""
    trained, data = traced.trained, traced.data
    if data is None:
        return _no_images(trained)
    count = min(CALIBRATION_IMAGES, len(data.train))
    positions = torch.linspace(0, len(data.train) - 1, count).long()
    images: NDArray[np.float32] = trained.normalize(data.train.take(positions).images).numpy()
    return images


def _no_images(trained: TrainedModel) -> NDArray[np.float32]:
    return np.empty((0, *trained.input_shape), np.float32)


def _require_precision(precision: str, target: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, not '{precision}'")
    format_ = find_target(target)
    if precision not in format_.precisions:
        known = ", ".join(format_.precisions)
        raise UsageError(f"target {target} has the precisions {known}, not {precision}")
    require_installed(format_)


def export_precisions(
    trained: TrainedModel,
    facts: dict[str, Any],
    folders: Mapping[str, Path],
    data: ImageData,
    target: str = ONNX,
) -> None:
    """Export a model in several precisions, with early exit calibrated on validation images.

    Args:
        trained: The model.
        facts: Its metadata, as ``deploy.pretrained.gather`` returns it.
        folders: Folder of each export by precision; it replaces an earlier one.
        data: Images in the form that the model takes; ranges are of training images.
        target: Device format.

    Raises:
        ExportError: It can't be exported.
    """
    form = _form(trained.model, None)
    graphs: dict[bool, dict[str, bytes]] = {}  # by whether they hold the model's own bits
    for precision, folder in folders.items():
        own = precision == "own_bits"
        if own not in graphs:
            graphs[own] = trace_graphs(trained, form, own_bits=own)
        traced = Traced(trained, facts, form, graphs[own], data)
        try:
            with replacing(folder, partial(require_free, folder)) as new:
                assemble(traced, new, precision, target=target)
                calibrate(traced, new)
        except OSError as error:
            raise ExportError(f"{folder}: the export could not be written ({error})") from error


def _add_submodels(
    traced: Traced, folder: Path, precision: str, license: str | None, most: int, target: str
) -> None:
    """Write exports of sub-models into an export."""
    data = traced.data

    def write(small: TrainedModel, row: Row, place: Path) -> None:
        facts = {**traced.facts, "measured": {"macs": row.macs, "parameters": row.parameters}}
        form = traced.form if _steps(small.model) > 1 else "whole"
        graphs = trace_graphs(small, form, precision == "own_bits")
        part = Traced(small, facts, form, graphs, data)
        storage = SHARED if form == traced.form else PLAIN
        assemble(part, place, precision, license, target=target, storage=storage)
        calibrate(part, place)

    split = data.validation if data is not None and traced.is_labelled else None
    macs = traced.facts["measured"]["macs"]
    add_submodels(traced.trained, macs, split, folder, most, write)


def _is_quantised(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedWeight) for module in model.modules())


def _require_own_bits(model: nn.Module) -> None:
    if not _is_quantised(model):
        raise UsageError(
            "precision own_bits is for quantised models: compress this one first "
            "(smallfry compress RUN --methods [quantize]), or take int8"
        )


def _report(traced: Traced, folder: Path, precision: str, target: str) -> None:
    """Report the loss of an export's precision against float32."""
    with TemporaryDirectory() as place:
        assemble(traced, Path(place), target=target)
        write_report(
            folder,
            Path(place),
            traced.graphs,
            calibration_images(traced) if precision == "int8" else None,
            traced.data if traced.is_labelled else None,
        )


def _form(model: nn.Module, form: str | None) -> str:
    recursive = isinstance(model, Recursive)
    layers = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    per_call = any(layer.input_bits is not None and layer.calls > 1 for layer in layers)
    if form is None and recursive and _steps(model) > 1 and per_call:
        log.info("one graph, without early exit: the layers have a range for each call of a pass")
    if form is None:
        return "anytime" if recursive and _steps(model) > 1 and not per_call else "whole"
    if form not in ("whole", "anytime"):
        raise UsageError(f"form must be whole or anytime, not '{form}'")
    if form == "anytime" and not recursive:
        raise UsageError(
            f"{type(model).__name__} is not recursive, so it has no early exit; export it with "
            f"--form whole"
        )
    if form == "anytime" and per_call:
        raise UsageError(
            "a graph for each step can't have a range for each call: export with --form whole, or "
            "quantise with per_call: false"
        )
    return form


def _steps(model: nn.Module) -> int:
    return model.recursion_steps if isinstance(model, Recursive) else 1


def _data(
    trained: TrainedModel,
    run: str | Path | TrainedModel,
    data: str | None,
    root: Path | None,
    needed: bool,
    exits: bool,
) -> ImageData | None:
    """Load the images of the run, or others; None if they are missing and optional."""
    if isinstance(run, TrainedModel):
        run = trained.origin or "this model"
    try:
        loaded, *_ = load_like(trained, run, data, root, split="train")
    except SmallfryError as error:
        if needed or data is not None:
            raise
        if exits:
            warnings.warn(
                f"without the images of the run, early exit is not calibrated ({error})",
                SmallfryWarning,
                stacklevel=4,
            )
        return None
    if loaded.classes != trained.classes:
        warnings.warn(
            f"{loaded.origin}: has other classes than the model: it is used for activation "
            f"ranges, but not for accuracy or early exit",
            SmallfryWarning,
            stacklevel=4,
        )
    return loaded


def _graphs(trained: TrainedModel, form: str) -> list[Graph]:
    images = _images(trained)
    if form == "anytime":
        assert isinstance(trained.model, Recursive)
        return anytime_graphs(trained.model, images)
    return [whole_graph(trained.model, images)]


def _images(trained: TrainedModel) -> Tensor:
    return torch.zeros(TRACED_BATCH, *trained.input_shape)


def _manifest(
    traced: Traced,
    precision: str,
    license: str | None,
    files: Mapping[str, bytes],
    target: str,
    storage: str,
    outputs: tuple[str, ...],
) -> Manifest:
    trained, facts = traced.trained, traced.facts
    sample = trained.manifest["input"]
    return Manifest(
        form=traced.form,
        precision=precision,
        model={
            "name": trained.manifest["model"]["name"],
            "parameters": facts["measured"]["parameters"],
            "macs": facts["measured"]["macs"],
        },
        classes=trained.classes,
        image_size=trained.image_size,
        channels=trained.channels,
        mean=tuple(sample["mean"]),
        std=tuple(sample["std"]),
        bit_depth=trained.bit_depth,
        resize=trained.resize,
        thresholds=thresholds_of(trained) or (),
        task=CLASSES if trained.is_classifier else trained.manifest["task"],
        recursion_steps=_steps(trained.model) if isinstance(trained.model, Recursive) else None,
        training=dict(facts),
        license=license,
        source={"weights": weights_digest(trained.model.state_dict())},
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        engine=target,
        storage=storage,
        values=trained.frame.values,
        outputs=outputs,
    )


def _saved(program: torch.export.ExportedProgram) -> bytes:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()
