"""Benchmark of deployed models: latency, throughput, memory, size and accuracy.

Latency is wall time from uint8 pixels to class probabilities. All contestants take turns on one
stream of images, in an order that is shuffled once, so that an early exit meets easy and hard ones.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smallfry.deploy.benchmark_config import BenchmarkConfig
from smallfry.deploy.contestants import (
    PEER_PRECISIONS,
    Contestant,
    Input,
    Pixels,
    Predictions,
    Skipped,
    of_export,
    of_run,
    peers,
)
from smallfry.deploy.latency import Latency, take_turns
from smallfry.deploy.memory import Memory, measure_memory
from smallfry.deploy.pretrained import load_trained, require_model
from smallfry.deploy.run_metadata import without_paths
from smallfry.deploy.targets import find_target, is_installed, require_installed, targets
from smallfry.errors import RunError, SmallfryError, UsageError
from smallfry.tasks import Task
from smallfry.tasks.classification import Classification
from smallfry.tasks.multilabel import MultiLabel
from smallfry.training.augment import Normalize
from smallfry.training.config import MULTILABEL
from smallfry.training.evaluation import as_tensors, score_probabilities, task_of
from smallfry.training.evaluation_data import load_like
from smallfry.training.provenance import provenance
from smallfry.training.run import (
    TrainedModel,
    require_classes,
    thresholds_of,
)
from smallfry_runtime.arrays import random_inputs
from smallfry_runtime.manifest import CLASSES, ONNX, Manifest, is_export
from smallfry_runtime.predictions import NOT_FINITE

log = logging.getLogger(__name__)

RANDOM_IMAGES = 64  # where there are no others
EVALUATED = 64  # images at a time


class Figures(NamedTuple):
    """Measured figures of a contestant; None where not available."""

    model: str
    form: str
    is_trained: bool
    parameters: int
    file_bytes: int
    latency: dict[int, Latency]  # by batch size, of the whole batch
    memory: Memory | None
    accuracy: float | None = None
    macro_f1: float | None = None
    agreement: float | None = None  # share of answers that equal those of the same model in float32
    steps: float | None = None  # recursion steps an image, with early exit


class Benchmark(NamedTuple):
    """Results of a benchmark, with its conditions."""

    name: str
    figures: list[Figures]
    left_out: list[Skipped]
    measured_on: str | None  # what accuracy is of
    config: BenchmarkConfig
    provenance: dict[str, Any]


class Images(NamedTuple):
    """Labelled images, in one order for all sizes."""

    pixels: Pixels
    labels: Tensor
    words: str  # how many of what
    task: Task  # of the model, with its thresholds


class Subject(NamedTuple):
    """Run or export given by the user."""

    given: str
    name: str
    is_export: bool
    trained: TrainedModel  # of an export, all but the model


def measure(
    models: Sequence[str],
    config: BenchmarkConfig | None = None,
    data: str | None = None,
    data_root: Path | None = None,
) -> Benchmark:
    """Benchmark runs and exports.

    Args:
        models: Runs, as for ``export``, and folders of exports.
        config: Settings of the benchmark.
        data: A data set or folder, for accuracy and early exit; default that of the first run.
        data_root: Folder of a named data set.

    Raises:
        UsageError: Impossible settings, or models of different classes.
        RunError, ExportError, DataError: What was named can't be used.
    """
    config = config or BenchmarkConfig()
    subjects = [_subject(given, config.checkpoint) for given in models]
    subjects = _with_unlike_names(subjects)
    _require_one_question(subjects)
    images = [_images(subject, subjects, data, data_root) for subject in subjects]
    _require_one_test(images)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with TemporaryDirectory() as place:
            field, left_out = _field(subjects, images, config, Path(place), (data, data_root))
            figures = _measured(field, config)
    finally:
        torch.set_num_threads(before)
    evidence = provenance(torch.device("cpu"))
    return Benchmark(
        subjects[0].name,
        figures,
        left_out,
        next((found.words for found in images if found is not None), None),
        config,
        evidence | {"command": without_paths(str(evidence["command"]), keep_relative=True)},
    )


class Entry(NamedTuple):
    """Contestant with its images, or noise of the same shape without images."""

    who: Contestant
    images: Images | None
    pixels: Pixels


def _subject(given: str, checkpoint: str) -> Subject:
    path = Path(given)
    if not is_export(path):
        require_model(given, exports=True)
        trained = load_trained(given, checkpoint)
        return Subject(given, path.resolve().name, False, trained)
    manifest = Manifest.read(path)
    stand_in = TrainedModel(
        nn.Identity(),
        manifest.classes,
        manifest.image_size,
        manifest.channels,
        Normalize(manifest.mean, manifest.std),
        {
            "data": {"name": "", "fingerprint": "", **manifest.training.get("data", {})},
            "input": {"values": manifest.values},
            **(
                {"task": MULTILABEL, "thresholds": manifest.thresholds}
                if manifest.thresholds
                else {"task": manifest.task}
            ),
        },
        manifest.bit_depth,
        resize=manifest.resize,
    )
    return Subject(given, path.resolve().name, True, stand_in)


def _with_unlike_names(subjects: Sequence[Subject]) -> list[Subject]:
    seen: dict[str, int] = {}
    found = []
    for subject in subjects:
        seen[subject.name] = number = seen.get(subject.name, 0) + 1
        name = subject.name if number == 1 else f"{subject.name} ({number})"
        found.append(subject._replace(name=name))
    return found


def _require_one_question(subjects: Sequence[Subject]) -> None:
    first, *others = subjects
    for other in others:
        if other.trained.classes != first.trained.classes:
            ours, theirs = (
                f"{len(s.trained.classes)} ({', '.join(s.trained.classes[:3])}, …)"
                for s in (first, other)
            )
            raise UsageError(
                f"{first.given} and {other.given} have different classes, {ours} and {theirs}: "
                f"compare models of the same task"
            )
        tasks = [each.trained.manifest.get("task", CLASSES) for each in (first, other)]
        if tasks[0] != tasks[1]:
            raise UsageError(
                f"{first.given} and {other.given} are for {tasks[0]} and {tasks[1]}: compare "
                "models of the same task"
            )


def _has_several(subject: Subject) -> bool:
    return thresholds_of(subject.trained) is not None


def _images(
    subject: Subject, subjects: Sequence[Subject], data: str | None, root: Path | None
) -> Images | None:
    """Load the test images at a model's input size."""
    trained, origin = subject.trained, subject
    if data is None and subject.is_export:
        runs = [other for other in subjects if not other.is_export]
        if not runs:
            return None
        origin = runs[0]
        wanted = {key: getattr(trained, key) for key in ("image_size", "resize", "channels")}
        trained = origin.trained._replace(**wanted)
    try:
        loaded, split, taken = load_like(trained, origin.given, data, root)
    except SmallfryError as error:
        if data is not None:
            raise
        log.info("without test images: %s", error)
        return None
    require_classes(trained, loaded.classes, loaded.origin)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(split)))
    shuffled = split.take(order)
    words = f"{len(split):,} {'' if taken == 'all' else f'{taken} '}images of "
    words += Path(loaded.name).name + (" (all that there are)" if taken == "all" else "")
    words += "; an image is right with exactly its classes" if _has_several(subject) else ""
    task = task_of(subject.trained.manifest)
    return Images(shuffled.images.numpy(), shuffled.labels, words, task)


def _require_one_test(images: Iterable[Images | None]) -> None:
    labels = [found.labels for found in images if found is not None]
    if any(not torch.equal(labels[0], others) for others in labels[1:]):
        raise UsageError(
            "these models have different test images, so their accuracies can't be compared; give "
            "the same images to all: --data"
        )


def _field(
    subjects: Sequence[Subject],
    images: Sequence[Images | None],
    config: BenchmarkConfig,
    place: Path,
    data: tuple[str | None, Path | None],
) -> tuple[list[Entry], list[Skipped]]:
    entries, left_out = [], []
    formats = _formats(config)
    for number, (subject, own) in enumerate(zip(subjects, images, strict=True)):
        pixels = own.pixels if own is not None else _noise(subject.trained)
        if subject.is_export:
            found: Iterable[Contestant | Skipped]
            found = of_export(Path(subject.given), config.threads, subject.name)
        else:
            found = of_run(
                subject.given,
                config.checkpoint,
                place / str(number),
                config.forms,
                (*config.batch_sizes, EVALUATED),
                config.threads,
                data,
                formats,
            )
        for one in found:
            if isinstance(one, Skipped):
                left_out.append(one)
            elif one.leaves_early and own is None:
                reason = "how early images leave depends on them: give some with --data"
                left_out.append(Skipped(one.model, one.form, reason))
            else:
                entries.append(Entry(one._replace(model=subject.name), own, pixels))
    if config.peers:
        first = subjects[0].trained
        mean, std = (tuple([0.5] * first.channels) for _ in range(2))
        wanted = Input(first.classes, first.image_size, first.channels, mean, std, first.resize)
        precisions = tuple(name for name in PEER_PRECISIONS if name in config.forms)
        for one in peers(wanted, place / "peers", precisions, config.threads):
            if isinstance(one, Skipped):
                left_out.append(one)
            else:
                entries.append(Entry(one, None, entries[0].pixels if entries else _noise(first)))
    return entries, left_out


def _formats(config: BenchmarkConfig) -> tuple[str, ...]:
    """Return the device formats besides ONNX, those of the settings or all that are installed.

    Raises:
        UsageError: A named one is unknown or not installed.
    """
    if config.targets is None:
        return tuple(n for n, t in sorted(targets().items()) if n != ONNX and is_installed(t))
    for name in config.targets:
        require_installed(find_target(name))
    return tuple(name for name in config.targets if name != ONNX)


def _measured(field: Sequence[Entry], config: BenchmarkConfig) -> list[Figures]:
    scores = _scores(field)
    latency: list[dict[int, Latency]] = [{} for _ in field]
    for size in config.batch_sizes:
        log.info("timing %d contestants at batch %d", len(field), size)
        calls = {str(i): _stream(entry, size) for i, entry in enumerate(field)}
        for i, taken in take_turns(calls, config.seconds, warm_up=5 if size == 1 else 1).items():
            latency[int(i)][size] = taken
    log.info("measuring memory")
    memory: dict[tuple[str, Path] | None, Memory | None] = {None: None}
    for entry in field:
        alone = entry.who.alone
        if alone is not None and alone not in memory:
            memory[alone] = measure_memory(*alone, config.batch_sizes, config.threads)
    return [
        Figures(
            entry.who.model,
            entry.who.form,
            entry.who.weights is not None,
            entry.who.parameters,
            entry.who.file_bytes,
            latency[i],
            memory[entry.who.alone],
            **scores[i],
        )
        for i, entry in enumerate(field)
    ]


def _scores(field: Sequence[Entry]) -> list[Mapping[str, float | None]]:
    """Compute accuracy, macro F1, agreement and steps of each contestant, where available."""
    found: list[dict[str, float | None]] = []
    answers: list[NDArray[np.bool_] | None] = []
    for who, images, _ in field:
        if images is None or who.weights is None:
            found.append({})
            answers.append(None)
            continue
        log.info("testing %s, %s", who.model, who.form)
        outputs, steps = _answered(who, images.pixels)
        if images.task.name in (Classification.name, MULTILABEL):  # others give outputs
            scores = score_probabilities(outputs, images.labels, images.task)
            answers.append(_chosen(outputs, images.task))
        else:
            scores = images.task.metrics(as_tensors(outputs), images.labels)
            answers.append(None)
        found.append({name: scores[name] for name in ("accuracy", "macro_f1") if name in scores})
        if steps is not None:
            found[-1]["steps"] = float(steps.mean())
    for (who, *_), scores_of, ours in zip(field, found, answers, strict=True):
        same = [
            theirs
            for (other, *_), theirs in zip(field, answers, strict=True)
            if other.is_reference and other.weights == who.weights and theirs is not None
        ]
        if ours is not None and same:
            scores_of["agreement"] = float((ours == same[0]).all(axis=1).mean())
    return list(found)


def _chosen(probabilities: NDArray[Any], task: Task) -> NDArray[np.bool_]:
    """Mark the classes that are answered with, (images, classes)."""
    if isinstance(task, MultiLabel):
        cuts = task.thresholds or (0.5,) * probabilities.shape[1]
        return np.asarray(probabilities >= np.array(cuts, probabilities.dtype))
    return np.asarray(np.eye(probabilities.shape[1], dtype=bool)[probabilities.argmax(axis=1)])


def _answered(who: Contestant, pixels: Pixels) -> tuple[Any, NDArray[Any] | None]:
    """Predict all images, in batches of one size, as required by a compiled model."""
    said = [
        who.answer(_batch(pixels, start, EVALUATED)) for start in range(0, len(pixels), EVALUATED)
    ]
    first = said[0].outputs
    outputs: Any
    if isinstance(first, dict):
        parts = {name: [part.outputs[name] for part in said] for name in first}
        outputs = {name: np.concatenate(part)[: len(pixels)] for name, part in parts.items()}
    else:
        outputs = np.concatenate([part.outputs for part in said])[: len(pixels)]
    for each in outputs.values() if isinstance(outputs, dict) else [outputs]:
        if not np.isfinite(each).all():
            raise RunError(f"{who.model}, {who.form}: {NOT_FINITE}")
    steps = [part.steps for part in said if part.steps is not None]
    return outputs, np.concatenate(steps)[: len(pixels)] if steps else None


def _stream(entry: Entry, size: int) -> Callable[[], Predictions]:
    """Return a function that predicts one batch after the other, in a cycle."""
    pixels = entry.pixels
    whole = [pixels[at : at + size] for at in range(0, len(pixels) - size + 1, size)]
    batches = cycle(whole or [_batch(pixels, 0, size)])
    return lambda: entry.who.answer(next(batches))


def _batch(pixels: Pixels, start: int, size: int) -> Pixels:
    """Take a number of images from a position, wrapping around."""
    batch: Pixels = pixels[np.arange(start, start + size) % len(pixels)]
    return batch


def _noise(trained: TrainedModel) -> Pixels:
    return random_inputs(RANDOM_IMAGES, trained.frame, trained.channels)
