"""Leaving one subject out: a training for each subject, which is then tested.

No window of the tested subject, and no statistic of its windows, is in its training: the readers
of this kit hold it out, and all statistics are of the training split.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch

from smallfry.errors import UsageError
from smallfry.kits.eeg.explanation import Hits, explain, pointing_game
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.kits.eeg.spindles import SpindleSettings, generate
from smallfry.training.config import TrainSettings
from smallfry.training.run import TrainedModel
from smallfry.training.train import run as train

__all__ = ["Left", "leave_one_out", "mean_and_error", "point_in_generated"]


class Left(NamedTuple):
    """Result of testing one subject."""

    subject: int
    accuracy: float
    windows: int
    run: str


def leave_one_out(
    subjects: Sequence[int],
    folder: Path,
    data: Mapping[str, Any],
    /,
    **settings: Unpack[TrainSettings],
) -> list[Left]:
    """Train a network without each of some subjects, and test it on that one.

    Args:
        subjects: Numbers of the subjects to leave out, in turn.
        folder: A run folder is made for each in it, ``subject-NUMBER``.
        data: Settings of the data, such as ``{"name": "eeg-mat", "root": "DIR"}``, without
            ``held_out``.
        settings: Other keywords of ``smallfry.train``; else those of the recipe.

    Raises:
        UsageError: No subject, a number below 1, or ``held_out`` is given.
    """
    options = dict(data.get("options", {}))
    if not subjects:
        raise UsageError("name the subjects to leave out, such as 1 2 3")
    if min(subjects) < 1:  # 0 would leave out the last
        raise UsageError(f"subjects are counted from 1, got {min(subjects)}")
    if "held_out" in options:
        raise UsageError("held_out is each subject in turn: leave it out")
    results = []
    for subject in subjects:
        asked = {**data, "options": {**options, "held_out": subject}}
        place = folder / f"subject-{subject}"
        chosen: Any = {"task": "eeg", **settings, "data": asked, "run": place}
        summary = train(**chosen)
        tested = summary["measured"]["test"]["accuracy"]
        results.append(Left(subject, tested, summary["data"]["test"], str(place)))
    return results


def mean_and_error(results: Sequence[Left]) -> tuple[float, float]:
    """Return the mean accuracy over subjects and its standard error; 0 of a single one."""
    values = np.array([each.accuracy for each in results])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def point_in_generated(trained: TrainedModel, settings: SpindleSettings) -> Hits:
    """Play the pointing game with the drowsy windows of the generated subject that is held out.

    Args:
        trained: A network of this kit.
        settings: Those that its data was generated with.

    Raises:
        UsageError: Another network.
    """
    model = trained.model
    if not isinstance(model, InterpretableCNN):
        raise UsageError(
            f"explanations are of interpretable_cnn, not of {trained.spec.architecture}"
        )
    windows, masks = generate(settings)
    held_out = settings.held_out or settings.subjects
    rows = np.flatnonzero((windows.subjects == held_out) & (windows.states == 1))
    inputs = trained.normalize(windows.values[torch.from_numpy(rows)][:, None])
    states = torch.ones(len(rows), dtype=torch.int64)
    return pointing_game(explain(model, inputs, states), masks[rows])
