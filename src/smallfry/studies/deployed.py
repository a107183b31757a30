"""ONNX files of a study's models: size, latency of one image, and the accuracy lost to int8."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smallfry.deploy.export import CALIBRATION_IMAGES, TRACED_BATCH
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.deploy.latency import take_turns
from smallfry.deploy.quantize import quantize
from smallfry.errors import RunError, SmallfryError
from smallfry.models import Recursive
from smallfry.training.config import read_config
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import RunFolder, load_run
from smallfry.transforms import ModelSpec, build
from smallfry_runtime.frames import frame_of

SIDES = {"cifar10": 32, "cifar100": 32, "mnist": 28, "fashion_mnist": 28, "digits": 8}
NOISE = 32  # images that models without their data are quantized on
EVALUATED = 64  # images at a time
PRECISIONS = ("float32", "int8")

Floats = NDArray[np.float32]


class Subject(NamedTuple):
    """Model to measure, with normalised images (images, channels, side, side)."""

    model: nn.Module
    calibration: Floats
    validation: tuple[Floats, Tensor] | None  # with labels; None of a model without its weights


def measure_deployed(
    runs: Mapping[str, Path],
    root: Path | None,
    rounds: int,
    threads: int,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Measure models in ONNX Runtime, all in turns.

    Args:
        runs: Run folders by name. Where the best weights are missing, an untrained model of the
            same shape is measured, quantized on noise: latency and size are the same.
        root: Folder of a named data set, if it is elsewhere than in the runs.
        rounds: Timed calls of each.
        threads: CPU threads.
        tell: Receiver of a line for each model.

    Returns:
        For each, by precision, ``bytes``, ``median_ms``, ``low_ms`` and ``high_ms``; and
        ``int8_points``, the validation accuracy of int8 minus that of float32 in percent, None of
        an untrained one. A model that can't be exported has an ``error`` instead.
    """
    found: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, run in runs.items():
        tell(f"exporting {name}")
        try:
            subject = _subject(run, root)
            graphs = _graphs(subject)
        except SmallfryError as error:
            found[name] = {"error": str(error)}
            continue
        sessions = {key: _session(graph, threads) for key, graph in graphs.items()}
        found[name] = {"int8_points": _points(subject, sessions)}
        for key, graph in graphs.items():
            found[name][key] = {"bytes": len(graph)}
            image = {"images": subject.calibration[:1]}
            calls[name, key] = partial(sessions[key].run, None, image)
    if calls:
        for (name, key), taken in _timed(calls, rounds).items():
            found[name][key] |= taken
    return found


def _timed(
    calls: Mapping[tuple[str, str], Callable[[], object]], rounds: int
) -> dict[tuple[str, str], dict[str, float]]:
    by_line = {"\n".join(key): call for key, call in calls.items()}
    taken = take_turns(by_line, seconds=0, rounds=rounds)
    return {
        key: {"median_ms": one.p50, "low_ms": one.low, "high_ms": one.high}
        for key in calls
        for one in [taken["\n".join(key)]]
    }


def _subject(run: Path, root: Path | None) -> Subject:
    if not (run / "best" / "manifest.json").is_file():
        return _untrained(run)
    trained = load_run(run)
    data, _, _ = load_like(trained, run, root=root, split="train")
    count = min(CALIBRATION_IMAGES, len(data.train))
    some = data.train.take(torch.linspace(0, len(data.train) - 1, count).long())
    held = data.validation
    validation = (trained.normalize(held.images).numpy(), held.labels) if len(held) else None
    return Subject(trained.model, trained.normalize(some.images).numpy(), validation)


def _untrained(run: Path) -> Subject:
    """Build the model of a summary with random weights.

    Raises:
        RunError: The size of its images is not known, or there is no such model.
    """
    summary = RunFolder(run).read_summary()
    if summary is None:
        raise RunError(f"{run}: has no summary.json")
    spec = ModelSpec.from_dict(summary["model"], str(run)).portable()
    recorded = read_config(run / "config.yaml").data
    side = recorded.image_size or spec.arguments.get("img_size") or SIDES.get(recorded.name)
    if side is None:
        raise RunError(f"{run}: the size of its images is not known without its weights")
    torch.manual_seed(0)
    channels = int(spec.arguments.get("in_chans", 3))
    shape = (NOISE, *frame_of(side).shape(channels))
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    model = build(spec, where=str(run))
    with torch.no_grad():
        for parameter in model.parameters():  # equal constants would be stored once
            parameter.add_(0.01 * torch.randn_like(parameter))
    return Subject(model, noise, None)


def _graphs(subject: Subject) -> dict[str, bytes]:
    images = subject.calibration
    graph = whole_graph(subject.model, torch.zeros(TRACED_BATCH, *images.shape[1:]))
    plain: bytes = to_onnx(graph, exported_program(graph)).SerializeToString()
    steps = subject.model.recursion_steps if isinstance(subject.model, Recursive) else 1
    return {"float32": plain, "int8": quantize({"model": plain}, "int8", images, steps)["model"]}


def _session(graph: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _points(subject: Subject, sessions: Mapping[str, ort.InferenceSession]) -> float | None:
    """Return the change of validation accuracy from float32 to int8 in percent."""
    if subject.validation is None:
        return None
    images, labels = subject.validation
    right = {}
    for name in PRECISIONS:
        answers = []
        for start in range(0, len(images), EVALUATED):
            batch = {"images": images[start : start + EVALUATED]}
            logits = sessions[name].run(None, batch)[0]
            last = logits[:, -1] if logits.ndim == 3 else logits  # of all recursion steps
            answers.append(last.argmax(axis=1))
        right[name] = float((np.concatenate(answers) == labels.numpy()).mean())
    return 100 * (right["int8"] - right["float32"])
