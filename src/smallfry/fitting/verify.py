"""Verification of an exported file through the runtime: size, latency, accuracy, early exit."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.errors import RunError
from smallfry.fitting.config import Budget
from smallfry.fitting.costs import latency
from smallfry.search.evaluation import value_of
from smallfry_runtime.early_exit import most_accurate, most_thrifty
from smallfry_runtime.runtime import Runtime

BATCH = 512  # images that are read at a time
EXIT_IMAGES = 48  # timed one by one with early exit
FEW = 1e-12  # added to probabilities before the logarithm


@dataclass(frozen=True)
class Verified:
    """Verified export.

    Args:
        name: Candidate's run and variant.
        run: Name of the run that was exported.
        model: Name of the candidate.
        variant: Name of the form.
        precision: Precision of the export.
        kb: Size of its graphs in kB.
        ms: CPU milliseconds for one image on one core.
        accuracy: Share of right validation images.
        loss: Mean negative log-likelihood of them.
        exit_threshold: Halting probability at which an image leaves a recursive model.
        exit_steps: Mean recursion steps there.
        failure: Reason, if it could not be made; all figures are None then.
        methods: Entries of the methods.
        export: Folder of the export in that of the fit.
    """

    name: str
    run: str
    model: str
    variant: str
    precision: str
    kb: float | None = None
    ms: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    exit_threshold: float | None = None
    exit_steps: float | None = None
    failure: str | None = None
    methods: list[Any] = field(default_factory=list)
    export: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data."""
        return asdict(self)

    @property
    def value(self) -> float:
        """Value of the model, as of a trial."""
        assert self.accuracy is not None
        assert self.loss is not None
        return value_of(self.accuracy, self.loss)


def verified(record: Mapping[str, Any]) -> Verified:
    """Parse what ``Verified.to_dict`` gave.

    Raises:
        TypeError: It is no verified export.
    """
    found = Verified(**record)
    figures = (found.kb, found.ms, found.accuracy, found.loss)
    measured = (type(each) in (int, float) for each in figures)
    if figures != (None,) * 4 and not all(measured):
        raise TypeError("expected kb, ms, accuracy and loss, or none of them")
    return found


class Exit(NamedTuple):
    """Early exit: a threshold, and mean recursion steps on the validation images."""

    threshold: float | None = None
    steps: float | None = None


def measure(answering: Runtime, data: ImageData, budget: Budget) -> dict[str, Any]:
    """Measure an export on the validation images.

    Returns:
        Values of ``Verified``: size, latency, accuracy, loss and early exit.

    Raises:
        RunError: Its answers are no numbers.
    """
    leave = find_exit(answering, data, budget)
    scores = score(predict(answering, data.validation, leave.threshold), data.validation)
    if not np.isfinite(scores["loss"]):
        raise RunError(f"its loss on the validation images is {scores['loss']}")
    if leave.threshold is None:
        taken = latency(answering, data)
    else:
        taken = mean_latency(answering, data.validation, leave.threshold)
    return {
        "kb": answering.file_bytes / 1000,
        "ms": taken,
        **scores,
        "exit_threshold": leave.threshold,
        "exit_steps": leave.steps,
    }


def find_exit(answering: Runtime, data: ImageData, budget: Budget) -> Exit:
    """Choose the early exit: no accuracy lost, or what the milliseconds allow."""
    exits = answering.manifest.exits
    steps = answering.manifest.recursion_steps or 1
    if not exits or steps == 1:
        return Exit()
    thrifty = most_thrifty(exits, 0.0)
    if budget.ms is None:
        return Exit(thrifty.threshold, thrifty.steps)
    first, all_steps = latency(answering, data, 0.0), latency(answering, data)
    each = max(1e-9, (all_steps - first) / (steps - 1))
    allowed = 1 + (budget.ms - first) / each
    chosen = thrifty if thrifty.steps <= allowed else most_accurate(exits, max(1.0, allowed))
    return Exit(chosen.threshold, chosen.steps)


def mean_latency(answering: Runtime, split: Split, threshold: float) -> float:
    """Measure the mean CPU milliseconds of images one by one, with early exit."""
    count = min(len(split), EXIT_IMAGES)
    pixels = split.take(torch.linspace(0, len(split) - 1, count).long()).images.numpy()
    taken = []
    for position in range(len(pixels)):
        image = pixels[position : position + 1]
        answering.predict(image, threshold=threshold)
        began = time.process_time()
        answering.predict(image, threshold=threshold)
        taken.append(time.process_time() - began)
    return 1000 * float(np.mean(taken))


def predict(answering: Runtime, split: Split, threshold: float | None) -> NDArray[np.float32]:
    """Return the probabilities of all images of a split, (images, classes)."""
    parts = [
        answering.predict(split.take(rows).images.numpy(), threshold=threshold).probabilities
        for rows in torch.split(torch.arange(len(split)), BATCH)
    ]
    return np.concatenate(parts)


def score(probabilities: NDArray[np.float32], split: Split) -> dict[str, float]:
    """Return accuracy and loss of predictions."""
    labels = split.labels.numpy()
    right = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "loss": float(-np.log(right + FEW).mean()),
    }


def choose(verified: list[Verified], budget: Budget) -> Verified | None:
    """Choose the most accurate export within the budget, the smaller of equals; None if none is."""
    within = [
        v for v in verified if v.kb is not None and v.ms is not None and budget.fits(v.kb, v.ms)
    ]
    return max(within, key=lambda v: (round(v.value, 9), -(v.kb or 0.0), v.name), default=None)


def nearest(verified: list[Verified], budget: Budget) -> Verified | None:
    """Return the export with the smallest excess over the budget; None without any."""
    known = [v for v in verified if v.kb is not None and v.ms is not None]
    return min(known, key=lambda v: budget.excess(v.kb or 0.0, v.ms or 0.0), default=None)
