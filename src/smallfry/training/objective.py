"""What is minimised, as a value that the loop is given.

An objective turns a batch into one or more steps. The loop takes an optimizer step on the loss of
each before it asks for the next, so an objective that works on a batch for several steps, as deep
supervision does, is a generator that carries its state along.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.models.contract import map_tensors
from smallfry.training.config import ObjectiveConfig


class Batch(NamedTuple):
    """Normalised images with their labels."""

    images: Tensor  # (batch, channels, size, size)
    labels: Tensor  # (batch,), int64, before any mixing
    targets: Tensor  # (batch, classes), the class probabilities to learn

    def split(self, parts: int) -> list["Batch"]:
        """Micro-batches of this batch, none of them empty."""
        sizes = micro_batch_sizes(len(self.labels), parts)
        chunks = [torch.split(tensor, sizes) for tensor in self]
        return [Batch(*chunk) for chunk in zip(*chunks, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def micro_batch_sizes(images: int, parts: int) -> list[int]:
    """How many images each micro-batch has: equally many, and the last what is left."""
    size = -(-images // parts)
    return [min(size, images - start) for start in range(0, images, size)]


class Step(NamedTuple):
    """What an objective gives for one optimizer step."""

    loss: Tensor  # scalar, mean over the batch
    logits: Tensor  # (batch, classes), detached
    halting: Tensor | None = None  # (batch,), probability of having finished, detached
    last: bool = True  # the objective has nothing more to do on this batch


class Objective(Protocol):
    """A value that the training loop minimises.

    The batch is left early once the mean of ``Step.halting`` passes ``halt_threshold``.
    """

    @property
    def halt_threshold(self) -> float:
        """Mean halting probability that ends a batch."""

    @property
    def likelihood(self) -> str | dict[str, str]:
        """The density whose negative logarithm the loss is, for natural gradient."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module whose ``forward`` is all that the objective calls.

        Mixed precision and distribution act on ``forward`` alone, so nothing may go past it.
        """

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """One step after the other; the loop updates the model between them."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of a classifier's logits: one step per batch."""

    label_smoothing: float = 0.0
    halt_threshold: float = 1.0
    likelihood: str = "categorical"

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model itself: images to logits."""
        return model

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """The single step of a batch."""
        logits = prepared(batch.images)
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        yield Step(loss, logits.detach())


@dataclass(frozen=True)
class DeepSupervision:
    """Deep supervision of a recursive model (arXiv 2603.19503 and 2510.04871).

    Each recursion step is trained on CE(logits, target) + BCE(halting logit, "the prediction is
    right"), and hands its detached state to the next. "Right" compares with the unmixed label.

    Args:
        supervision_steps: Recursion steps per batch (N_sup).
        halt_threshold: Leave the batch once the mean halting probability passes this.
        label_smoothing: Share of the target spread over all classes.
    """

    supervision_steps: int = 1
    halt_threshold: float = 0.5
    label_smoothing: float = 0.0

    @property
    def likelihood(self) -> dict[str, str]:
        """Both heads: given the output, class and halting are independent, and their losses add."""
        return {"logits": "categorical", "halt_logits": "bernoulli"}

    def prepare(self, model: nn.Module) -> nn.Module:
        """One recursion step of a recursive model."""
        return _Advance(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """The steps of a batch."""
        state = None
        for number in range(1, self.supervision_steps + 1):
            step = prepared(batch.images, state)
            classification = F.cross_entropy(
                step.logits, batch.targets, label_smoothing=self.label_smoothing
            )
            right = (step.logits.argmax(dim=1) == batch.labels).to(step.halt_logits)
            halting = F.binary_cross_entropy_with_logits(step.halt_logits, right)
            yield Step(
                classification + halting,
                step.logits.detach(),
                step.halt_logits.detach().sigmoid(),
                last=number == self.supervision_steps,
            )
            state = map_tensors(Tensor.detach, step.state)


class _Advance(nn.Module):
    """``model.advance`` as a module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, state: Any) -> Any:
        model: Any = self.model
        return model.advance(images, state)


def build_objective(config: ObjectiveConfig, model: nn.Module) -> Objective:
    """The objective that a configuration names, for this model."""
    recursive = isinstance(model, Recursive)
    name = config.name
    if name == "auto":
        name = "deep_supervision" if recursive else "cross_entropy"
    if name == "cross_entropy":
        return CrossEntropy(config.label_smoothing)
    if not recursive:
        raise UsageError(
            f"deep_supervision needs a model that recurs, and {type(model).__name__} does not; "
            "take objective.name cross_entropy"
        )
    return DeepSupervision(config.supervision_steps, config.halt_threshold, config.label_smoothing)
