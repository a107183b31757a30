"""Callbacks of a training run."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from smallfry.errors import SmallfryError, TrainingError, UsageError, nearest
from smallfry.training.own_code import OwnCode

HOOKS = ("on_start", "on_step", "on_epoch", "on_end")


class Started(NamedTuple):
    """Start or continuation of a run.

    Attributes:
        folder: The run folder.
        settings: Its configuration, as ``config.yaml``.
        epochs: Epochs of the whole run.
        history: Rows of ``metrics.csv`` so far, none of a new run.
        model: The model on its device.
    """

    folder: Path
    settings: Mapping[str, Any]
    epochs: int
    history: Sequence[Mapping[str, float]]
    model: nn.Module


class StepDone(NamedTuple):
    """Finished step.

    Attributes:
        step: Steps done.
        steps: Steps of the whole run.
        epoch: Epoch of the step, from 1.
        loss: Mean training loss of the epoch so far; up to 20 steps late on a GPU.
        learning_rate: Of the step.
        images_per_second: Of the step.
        model: The model in training.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    images_per_second: float
    model: nn.Module


class EpochDone(NamedTuple):
    """Finished and scored epoch.

    Attributes:
        epoch: Epochs done.
        epochs: Epochs of the whole run.
        scores: Row of ``metrics.csv``, such as ``validation_accuracy``.
        is_best: It is the best so far, and saved as such.
        model: The model that was scored, the average if there is one.
        folder: The run folder.
    """

    epoch: int
    epochs: int
    scores: Mapping[str, float]
    is_best: bool
    model: nn.Module
    folder: Path


class Callback:
    """Base of callbacks; other classes with some of these methods work too.

    They observe: the model must stay as it is, and resuming is exact as long as it does. They run
    in the first of several processes. An exception stops the run, and the last checkpoint stays.
    """

    def on_start(self, started: Started) -> None:
        """Observe a run before its first step, or before it goes on."""

    def on_step(self, done: StepDone) -> bool | None:
        """Observe a step; True ends the training after the epoch in progress."""

    def on_epoch(self, done: EpochDone) -> bool | None:
        """Observe an epoch; True ends the training, which is tested and concluded as usual."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Observe the summary of a finished run, already written."""


@dataclass(frozen=True)
class Callbacks:
    """Callbacks of a run, by name."""

    each: Mapping[str, Any] = field(default_factory=dict)

    def call(self, hook: str, event: Any) -> str:
        """Call a method of all that have it.

        Returns:
            The name of the first that ends the training; empty if none does.

        Raises:
            TrainingError: It raised an exception.
        """
        asking = ""
        for name, callback in self.each.items():
            act = getattr(callback, hook, None)
            if act is None:
                continue
            with _named(name, hook):
                wants_end = act(event)
            if wants_end and hook in ("on_step", "on_epoch"):
                asking = asking or name
        return asking


def build_callbacks(paths: Sequence[str], code: OwnCode) -> Callbacks:
    """Build the callbacks that a configuration names; classes are called without arguments.

    Raises:
        UsageError: A name without code, or something else than a callback.
    """
    made: dict[str, Any] = {}
    for path in paths:
        if path in made:
            raise UsageError(f"callbacks has {path} twice")
        found = code.find(path, "callbacks")
        if isinstance(found, type):
            try:
                found = found()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise UsageError(f"callbacks: {path} can't be made ({reason})") from error
        _require_hooks(found, path)
        made[path] = found
    return Callbacks(made)


def _require_hooks(callback: Any, path: str) -> None:
    """Require a callback with at least one of the methods, and none of a similar name."""
    named = [name for name in dir(callback) if name.startswith("on_")]
    for name in named:
        if name not in HOOKS:
            raise UsageError(f"callbacks: {path} has a method '{name}'{nearest(name, HOOKS)}")
    if not named:
        raise UsageError(f"callbacks: {path} has none of {', '.join(HOOKS)}")


@contextmanager
def _named(name: str, hook: str) -> Any:
    """Name the callback in an error."""
    try:
        yield
    except SmallfryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TrainingError(f"the callback {name} failed in {hook} ({reason})") from error
