"""Contestants of a benchmark: a run in its several forms, exports, and untrained peers.

All take pixels and give class probabilities, preprocessing and softmax included. Those of ONNX
Runtime are written into a folder as exports, so that they run and are measured as a device would
run them.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from smallfry.deploy.export import (
    TRACED_BATCH,
    Traced,
    assemble,
    calibrate,
    trace,
)
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.deploy.memory import MODEL, WEIGHTS
from smallfry.deploy.pretrained import gather
from smallfry.deploy.quantize import quantize
from smallfry.deploy.targets import find_target
from smallfry.errors import ExportError, SmallfryError, UsageError
from smallfry.models import Recursive
from smallfry.training.checkpoint import safetensors_bytes, weights_digest
from smallfry.training.evaluation import as_arrays
from smallfry.training.run import TrainedModel, thresholds_of
from smallfry_runtime.arrays import random_inputs
from smallfry_runtime.early_exit import most_thrifty
from smallfry_runtime.engines import graph_files
from smallfry_runtime.frames import ImageSize, Resize, frame_of
from smallfry_runtime.manifest import MANIFEST, ONNX, Manifest
from smallfry_runtime.runtime import Runtime

log = logging.getLogger(__name__)

PEERS = ("paper_vit_small_patch4_32", "resnet18_cifar", "cct_7_3x1_32")
PRECISIONS = {
    "float32": "float32",
    "int8": "int8",
    "int8_dynamic": "int8 dynamic",
    "own_bits": "own bits",
}
DROPS = (0.0, 0.003)  # shares of accuracy that early exit may cost on the calibration images
PEER_PRECISIONS = ("float32", "int8")
NOISE = 32  # images that peers are quantized on
EXIT_PRECISIONS = ("float32", "int8")  # of a run's early exit
OTHER_PRECISIONS = ("float32", "int8")  # of formats other than ONNX

Pixels = NDArray[Any]  # (images, channels, height, width), uint8 or float32


class Predictions(NamedTuple):
    """Model outputs of a contestant."""

    outputs: Any  # probabilities (images, classes); of other tasks outputs, or several by name
    steps: NDArray[np.int64] | None = None  # (images,), recursion steps with early exit


class Contestant(NamedTuple):
    """Model in a benchmark, ready to be timed."""

    model: str  # the run, export or architecture that it comes from
    form: str  # how it runs, in words
    answer: Callable[[Pixels], Predictions]
    parameters: int
    file_bytes: int
    weights: str | None  # their hash; None of weights that were never trained
    is_reference: bool = False  # others with its weights are held against its answers
    leaves_early: bool = False  # so that its latency depends on the image
    alone: tuple[str, Path] | None = None  # its kind and folder, for ``measure_memory``


class Skipped(NamedTuple):
    """Unmeasurable contestant, with the reason."""

    model: str
    form: str
    reason: str


class Input(NamedTuple):
    """Input shape and classes of the contestants."""

    classes: tuple[str, ...]
    image_size: ImageSize  # pixels
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "crop"


def of_run(
    run: str,
    checkpoint: str,
    folder: Path,
    forms: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    threads: int,
    data: tuple[str | None, Path | None] = (None, None),
    formats: tuple[str, ...] = (),
) -> Iterator[Contestant | Skipped]:
    """Build the contestants of a run in PyTorch and, exported into a folder, in device formats.

    Args:
        run: See ``export``.
        checkpoint: ``best`` or ``last``.
        folder: Folder of the exports, needed as long as the contestants are used.
        forms: Forms from ``FORMS`` in ``benchmark_config``.
        batch_sizes: That the compiled model is compiled for.
        threads: CPU threads of ONNX Runtime; PyTorch's are those of the process.
        data: Name and folder of other data to calibrate with than the run's.
        formats: Device formats besides ONNX, of a recursive model in parts.
    """
    name = Path(run).resolve().name
    trained, facts, _ = gather(run, checkpoint)
    digest = weights_digest(trained.model.state_dict())
    parameters = int(facts["measured"]["parameters"])
    place = folder / "pytorch"
    size = _save(trained, place)
    about: dict[str, Any] = {"model": name, "parameters": parameters, "weights": digest}
    if "eager" in forms:
        answer = partial(_ask_pytorch, trained, trained.model)
        alone = ("pytorch", place)
        yield Contestant(form="PyTorch eager", answer=answer, file_bytes=size, alone=alone, **about)
    if "compiled" in forms:
        try:
            compiled = _compiled(trained, batch_sizes)
        except Exception as error:  # whatever a compiler stumbles over
            yield Skipped(name, "PyTorch compiled", _first_line(error))
        else:
            answer = partial(_ask_pytorch, trained, compiled)
            yield Contestant(form="PyTorch compiled", answer=answer, file_bytes=size, **about)
    precisions = [precision for precision in PRECISIONS if precision in forms]
    if precisions:
        whole = trace(run, "whole", checkpoint, *data)
        for precision in precisions:
            at = folder / f"whole-{precision}"
            yield from _exported(name, whole, at, precision, threads)
    wanted = [p for p in OTHER_PRECISIONS if p in forms]
    if wanted and formats:
        default = trace(run, None, checkpoint, *data)
        for target, precision in product(formats, wanted):
            at = folder / f"{target}-{precision}"
            found = _exported(name, default, at, precision, threads, target=target)
            yield from (c for c in found if "exit" in forms or not _leaves_early(c))
    if "exit" not in forms:
        return
    if not isinstance(trained.model, Recursive) or trained.model.recursion_steps < 2:
        yield Skipped(name, "early exit", "the model has at most one recursion step")
        return
    try:
        anytime = trace(run, "anytime", checkpoint, *data)
    except UsageError as error:
        yield Skipped(name, "early exit", str(error))
        return
    for precision in EXIT_PRECISIONS:
        at = folder / f"anytime-{precision}"
        yield from _exported(name, anytime, at, precision, threads, exits_only=True)


def of_export(export: Path, threads: int, name: str | None = None) -> Iterator[Contestant]:
    """Build the contestant of an export, and of its early exit if calibrated."""
    runtime = Runtime(export, threads)
    manifest = runtime.manifest
    form = words = form_of(manifest.engine, manifest.precision)
    if manifest.form == "anytime":
        form += ", in parts"
    whole = Contestant(
        model=name or export.resolve().name,
        form=form,
        answer=partial(_ask_runtime, runtime, None),
        parameters=int(manifest.model.get("parameters", 0)),
        file_bytes=runtime.file_bytes,
        weights=manifest.source.get("weights"),
        is_reference=manifest.precision == "float32",
        alone=("export", export),
    )
    yield whole
    drops: dict[float, list[float]] = {}
    for drop in DROPS if manifest.exits else ():
        drops.setdefault(most_thrifty(manifest.exits, drop).threshold, []).append(drop)
    for threshold, same in drops.items():
        yield whole._replace(
            form=f"{words}, exit at drop " + ", ".join(f"{drop:g}" for drop in same),
            answer=partial(_ask_runtime, runtime, threshold),
            is_reference=False,
            leaves_early=True,
        )


def peers(
    wanted: Input, folder: Path, precisions: tuple[str, ...], threads: int
) -> Iterator[Contestant | Skipped]:
    """Build other models for the same images and classes, with random weights.

    They are quantized on noise: how long a product takes does not depend on its range.

    Args:
        wanted: Images and classes.
        folder: Folder of the exports.
        precisions: Precisions from ``PRECISIONS``.
        threads: CPU threads.
    """
    shape = (NOISE, *frame_of(wanted.image_size).shape(wanted.channels))
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    for name in PEERS:
        log.info("tracing %s", name)
        try:
            graph, parameters = _traced_peer(name, wanted)
        except Exception as error:  # timm's models refuse sizes each in its own way
            yield Skipped(name, form_of(ONNX, "float32"), _first_line(error))
            continue
        for precision in precisions:
            try:
                graphs = {"model": graph}
                if precision != "float32":
                    graphs = quantize(graphs, precision, noise)
            except ExportError as error:
                yield Skipped(name, form_of(ONNX, precision), str(error))
                continue
            at = folder / f"{name}-{precision}"
            _write_peer(at, name, precision, wanted, graphs["model"], parameters)
            (contestant,) = of_export(at, threads, name)
            yield contestant._replace(weights=None, is_reference=False)


def _exported(
    name: str,
    traced: Traced,
    folder: Path,
    precision: str,
    threads: int,
    exits_only: bool = False,
    target: str = ONNX,
) -> Iterator[Contestant | Skipped]:
    log.info("exporting %s, %s, %s, %s", name, target, traced.form, precision)
    try:
        assemble(traced, folder, precision, target=target)
        calibrate(traced, folder)
    except SmallfryError as error:
        yield Skipped(name, form_of(target, precision), str(error))
        return
    found = list(of_export(folder, threads, name))
    if exits_only and len(found) == 1:
        form = f"{form_of(target, precision)}, early exit"
        yield Skipped(name, form, "no labelled validation images for calibration")
    yield from found[1:] if exits_only else found


def form_of(target: str, precision: str) -> str:
    """Return the words for a device format and a precision, such as ONNX int8."""
    separator = ", " if precision == "own_bits" else " "
    return f"{find_target(target).title}{separator}{PRECISIONS[precision]}"


def _leaves_early(who: Contestant | Skipped) -> bool:
    return isinstance(who, Contestant) and who.leaves_early


def _ask_runtime(runtime: Runtime, threshold: float | None, pixels: Pixels) -> Predictions:
    batch = max(1, len(pixels))
    if not runtime.manifest.is_classifier:
        found = runtime.compute(pixels, threshold, batch)
        return Predictions(found.logits, None if threshold is None else found.steps)
    said = runtime.predict(pixels, threshold=threshold, batch_size=batch)
    return Predictions(said.probabilities, None if threshold is None else said.steps)


@torch.no_grad()
def _ask_pytorch(trained: TrainedModel, model: Callable[..., Any], pixels: Pixels) -> Predictions:
    logits = model(trained.normalize(torch.from_numpy(pixels)))
    if not trained.is_classifier:
        return Predictions(as_arrays(logits))
    several = thresholds_of(trained) is not None
    return Predictions((logits.sigmoid() if several else logits.softmax(dim=1)).numpy())


def _compiled(trained: TrainedModel, batch_sizes: tuple[int, ...]) -> Callable[..., Any]:
    """Compile the model for these batch sizes; raises whatever the compiler does."""
    compiled: Callable[..., Any] = torch.compile(trained.model, dynamic=False)
    for size in sorted(set(batch_sizes)):
        log.info("compiling for batch %d", size)
        _ask_pytorch(trained, compiled, random_inputs(size, trained.frame, trained.channels))
    return compiled


def _save(trained: TrainedModel, folder: Path) -> int:
    """Save the files that PyTorch loads the model from; return the bytes of its weights."""
    folder.mkdir(parents=True)
    content = {
        **trained.spec.to_dict(),
        "frame": list(trained.frame),
        "channels": trained.channels,
    }
    (folder / MODEL).write_text(json.dumps(content))
    return (folder / WEIGHTS).write_bytes(safetensors_bytes(trained.model.state_dict()))


def _traced_peer(name: str, wanted: Input) -> tuple[bytes, int]:
    arguments: dict[str, Any] = {"num_classes": len(wanted.classes), "in_chans": wanted.channels}
    if timm.get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = wanted.image_size
    model: nn.Module = timm.create_model(name, **arguments).eval()
    shape = frame_of(wanted.image_size).shape(wanted.channels)
    graph = whole_graph(model, torch.zeros(TRACED_BATCH, *shape))
    content = to_onnx(graph, exported_program(graph)).SerializeToString()
    return content, sum(parameter.numel() for parameter in model.parameters())


def _write_peer(
    folder: Path, name: str, precision: str, wanted: Input, graph: bytes, parameters: int
) -> None:
    (file,) = graph_files("whole")
    manifest = Manifest(
        form="whole",
        precision=precision,
        model={"name": name, "parameters": parameters},
        files={file: hashlib.sha256(graph).hexdigest()},
        **wanted._asdict(),
    )
    folder.mkdir(parents=True)
    (folder / file).write_bytes(graph)
    (folder / MANIFEST).write_text(manifest.to_json())


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]
