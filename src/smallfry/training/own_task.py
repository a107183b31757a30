"""Classification with the user's own loss and metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smallfry.errors import TrainingError, UsageError
from smallfry.optim import METHODS
from smallfry.tasks import Task
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.config import TrainConfig
from smallfry.training.own_code import OwnCode

LOSS = "objective.loss"


@dataclass(frozen=True)
class OwnClassification(Classification):
    """Classification with other losses and further metrics.

    Args:
        label_smoothing: Share of the target spread over all classes.
        weights: Always empty.
        own_loss: Function of logits and targets, both (batch, classes), with the losses of the
            images, (batch,), or their mean.
        own_metrics: Functions of logits (images, classes) and labels (images,), by name.
    """

    own_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    own_metrics: tuple[tuple[str, Callable[[Tensor, Tensor], Any]], ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]  # more than the class has
        """Scores that can choose the best epoch."""
        return (*Classification.choices, *(name for name, _ in self.own_metrics))

    def loss(self, outputs: Tensor, targets: ClassTargets) -> Tensor:
        """Compute the mean loss."""
        if self.own_loss is None:
            return super().loss(outputs, targets)
        smooth = self.label_smoothing
        shares = targets.shares
        if smooth:
            shares = shares * (1 - smooth) + smooth / shares.shape[1]
        found = self.own_loss(outputs, shares)
        if not isinstance(found, Tensor) or found.shape not in ((), (len(outputs),)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"{LOSS} must return a tensor, the losses of the images ({len(outputs)},) or "
                f"their mean (), not {shape}"
            )
        if torch.is_grad_enabled() and not found.requires_grad:
            raise UsageError(f"{LOSS} must depend on the logits by PyTorch's operations")
        return found.mean()

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the scores of classification, then the others."""
        found = super().metrics(outputs, labels)
        for name, metric in self.own_metrics:
            try:
                found[name] = float(metric(outputs, labels))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise TrainingError(f"the metric {name} failed ({reason})") from error
        return found


def with_own(task: Task, config: TrainConfig, code: OwnCode) -> Task:
    """Return a task with the loss and metrics that a configuration names.

    Raises:
        UsageError: Another task or optimizer than these are for, a name without code, or a metric
            of a known name.
    """
    wanted = {LOSS: config.objective.loss, "metrics": config.metrics}
    given = [setting for setting, value in wanted.items() if value]
    if not given:
        return task
    if not isinstance(task, Classification):
        raise UsageError(f"{given[0]} is for classification, not {task.name}: leave it out")
    path, loss = config.objective.loss, None
    if path is not None:
        _require_no_weights(config)
        loss = _function(code.find(path, LOSS), path, LOSS)
    metrics: dict[str, Any] = {}
    for path in config.metrics:
        name = path.rpartition(":")[2].rpartition(".")[2]
        taken = (*Classification.choices, "top_5_accuracy", "halting", "recursion_steps", *metrics)
        if name in taken:
            raise UsageError(f"metrics: {path} has the name of another score; rename it")
        metrics[name] = _function(code.find(path, "metrics"), path, "metrics")
    return OwnClassification(
        task.label_smoothing, task.weights, own_loss=loss, own_metrics=tuple(metrics.items())
    )


def facts(config: TrainConfig) -> Mapping[str, Any]:
    """Return the own code of a run for its summary."""
    named = {"loss": config.objective.loss, "metrics": config.metrics}
    used = {name: value for name, value in named.items() if value}
    return {"own_code": used} if used else {}


def _require_no_weights(config: TrainConfig) -> None:
    """Require settings that a loss of the user's own goes with."""
    if config.optimizer.name in METHODS:
        raise UsageError(
            f"optimizer.name {config.optimizer.name} needs a likelihood, which {LOSS} has not: "
            "take another optimizer, such as adamw"
        )
    if config.objective.name == "bias":
        raise UsageError(f"objective.name bias has its own loss: leave out {LOSS}")
    if config.balance.loss != "none" or config.balance.weights:
        raise UsageError(f"balance.loss and balance.weights weigh cross-entropy: leave out {LOSS}")


def _function(value: Any, path: str, setting: str) -> Any:
    if not callable(value) or isinstance(value, type):
        raise UsageError(f"{setting}: {path} is not a function")
    return value
