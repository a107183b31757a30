"""Sub-models of a nested run: their figures, the choice among them, and their export.

    submodels/1/  submodels/2/ …   in an export: an export of each sub-model
    submodels.json                 in a run folder: the figures of all sub-models

Accuracy is that on the validation images. Latency is that of one image in ONNX Runtime on one
thread, all sub-models in turns.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch

from smallfry.costing import macs
from smallfry.data import Split
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.deploy.latency import take_turns
from smallfry.errors import RunError, UsageError
from smallfry.io.replace import write_whole
from smallfry.training.checkpoint import weights_digest
from smallfry.training.evaluation import predict, score
from smallfry.training.run import TrainedModel
from smallfry.transforms.nested import Nested, SubModel, active, extract, nest_of
from smallfry_runtime.files import read_json
from smallfry_runtime.manifest import MANIFEST, Manifest, manifest_of
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.variants import FOLDER, FULL, Variant

log = logging.getLogger(__name__)

TABLE = "submodels.json"
FIGURES = ("accuracy", "macs", "parameters", "bytes", "ms")


class Row(NamedTuple):
    """Figures of a sub-model."""

    submodel: SubModel
    accuracy: float  # on the validation images
    macs: int  # of all calls for one image
    parameters: int
    bytes: int  # of its ONNX graph in float32
    ms: float  # median latency of one image in ONNX Runtime on one thread


def extracted(trained: TrainedModel, submodel: SubModel) -> TrainedModel:
    """Extract a sub-model of a nested run as a model of its own, which can be compressed further.

    Args:
        trained: The nested model.
        submodel: One of its sub-models.

    Raises:
        UsageError: The model has no such sub-model.
    """
    small, transforms = extract(trained.model, submodel)
    others = tuple(t for t in trained.spec.transforms if not isinstance(t, Nested))
    spec = replace(trained.spec, transforms=others)
    for each in transforms:
        spec = spec.then(each)
    return trained.compressed(small.eval(), spec, [])


def measure(
    trained: TrainedModel, split: Split, rounds: int = 30, only: Sequence[SubModel] = ()
) -> list[Row]:
    """Measure sub-models.

    Args:
        trained: A nested model.
        split: Labelled images that the sub-models are chosen by, such as the validation split.
        rounds: Timed calls of each.
        only: Sub-models; default all.

    Returns:
        A row for each.

    Raises:
        UsageError: No sub-models, or no images.
    """
    submodels = list(only) or nest_of(trained.model).nested.submodels
    if len(split) == 0:
        raise UsageError("sub-models are compared on validation images: hold some out")
    image = torch.zeros(1, *trained.input_shape)
    found: dict[str, dict[str, Any]] = {}
    calls = {}
    for submodel in submodels:
        log.info("measuring %s", submodel)
        with active(trained.model, submodel):
            said = predict(trained.model, split, trained.normalize)
        small = extract(trained.model, submodel)[0].eval()
        graph = whole_graph(small, image.repeat(2, 1, 1, 1))
        content: bytes = to_onnx(graph, exported_program(graph)).SerializeToString()
        calls[str(submodel)] = partial(session(content).run, None, {"images": image.numpy()})
        found[str(submodel)] = {
            "accuracy": score(said)["accuracy"],
            "macs": macs(small, image),
            "parameters": sum(p.numel() for p in small.parameters()),
            "bytes": len(content),
        }
    taken = take_turns(calls, seconds=0, rounds=rounds)
    return [Row(s, **found[str(s)], ms=taken[str(s)].p50) for s in submodels]


def best_under(
    rows: Sequence[Row],
    macs: float | None = None,
    ms: float | None = None,
    bytes: float | None = None,
) -> Row:
    """Choose the most accurate sub-model within budgets, the cheapest of equals.

    Args:
        rows: Figures of ``measure``.
        macs: Most multiply-accumulates.
        ms: Most milliseconds.
        bytes: Most bytes.

    Raises:
        UsageError: None is within all budgets.
    """
    given = {"macs": macs, "ms": ms, "bytes": bytes}
    budgets = {name: most for name, most in given.items() if most is not None}
    within = [r for r in rows if all(getattr(r, n) <= most for n, most in budgets.items())]
    if not within:
        wanted = ", ".join(f"{name} {most:g}" for name, most in budgets.items())
        least = ", ".join(f"{n} {min(getattr(r, n) for r in rows):g}" for n in budgets)
        raise UsageError(f"no sub-model is within {wanted}; the least of each: {least}")
    return max(within, key=lambda row: (row.accuracy, -row.macs))


def front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other beats in both latency and accuracy, the fastest first."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.ms, -row.accuracy)):
        if not kept or row.accuracy > kept[-1].accuracy:
            kept.append(row)
    return kept


def write_table(rows: Sequence[Row], trained: TrainedModel, run: Path) -> None:
    """Write the figures into a run folder."""
    content = {
        "weights": weights_digest(trained.model.state_dict()),
        "rows": [{"submodel": asdict(row[0]), **_figures(row)} for row in rows],
    }
    write_whole(run / TABLE, (json.dumps(content, indent=2) + "\n").encode())


def read_table(trained: TrainedModel, run: Path) -> list[Row] | None:
    """Read the figures of a run folder; None if there are none, or they are of other weights.

    Raises:
        RunError: Damaged.
    """
    try:
        content = read_json(run / TABLE)
        if content["weights"] != weights_digest(trained.model.state_dict()):
            return None
        return [_row(each) for each in content["rows"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run / TABLE}: damaged ({error}); delete it") from error


def _figures(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in FIGURES}


def _row(content: dict[str, Any]) -> Row:
    figures = {name: content[name] for name in FIGURES}
    if not all(type(value) in (int, float) for value in figures.values()):
        raise TypeError("a figure is not a number")
    return Row(SubModel(**content["submodel"]), **figures)


def add_submodels(
    trained: TrainedModel,
    macs: int,
    split: Split | None,
    folder: Path,
    most: int,
    write: Callable[[TrainedModel, Row, Path], None],
) -> None:
    """Export the best sub-models into an export, with their figures.

    Args:
        trained: The full model.
        macs: Its multiply-accumulates.
        split: Labelled validation images, if there are any.
        folder: Its export.
        most: Sub-models beside the full one.
        write: Writes an export of a sub-model into a folder.

    Raises:
        UsageError: No sub-models, or no labelled validation images.
    """
    if split is None or len(split) == 0:
        raise UsageError(
            "sub-models are chosen on validation images of the model's classes: export the run "
            "where its data is, or give --data"
        )
    rows = None if trained.origin is None else read_table(trained, trained.origin)
    rows = front(measure(trained, split) if rows is None else rows)
    rows = [row for row in rows if row.submodel != SubModel()]
    places, names, costs = {FULL: folder}, {FULL: str(SubModel())}, {FULL: macs}
    for number, row in enumerate(_spread(rows, most), 1):
        place = str(number)
        places[place], names[place] = folder / FOLDER / place, str(row.submodel)
        costs[place] = row.macs
        write(extracted(trained, row.submodel), row, places[place])
    _note(folder, places, names, costs, split)


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """Take some of the rows, evenly from the first to the last."""
    if len(rows) <= most:
        return list(rows)
    chosen = np.linspace(0, len(rows) - 1, most).round().astype(int)
    return [rows[i] for i in chosen]


def _note(
    folder: Path,
    places: dict[str, Path],
    names: dict[str, str],
    costs: dict[str, int],
    split: Split,
) -> None:
    """Measure the exports as they will run, and write their figures into the manifest."""
    pixels, labels = split.images.numpy(), split.labels.numpy()
    runtimes = {place: Runtime(path, threads=1) for place, path in places.items()}
    calls = {place: partial(each.predict, pixels[:1]) for place, each in runtimes.items()}
    taken = take_turns(calls, seconds=0, rounds=30)
    variants, digests = [], {}
    for place, each in runtimes.items():
        accuracy = float((each.predict(pixels).probabilities.argmax(1) == labels).mean())
        variant = Variant(names[place], place, taken[place].p50, accuracy, costs[place])
        variants.append(variant)
        if place != FULL:
            name = manifest_of(variant)
            digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest = Manifest.read(folder)
    manifest = replace(manifest, submodels=tuple(variants), files={**manifest.files, **digests})
    (folder / MANIFEST).write_text(manifest.to_json())


def session(content: bytes) -> ort.InferenceSession:
    """Start a graph on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
