"""Deep supervision in slots: each puzzle of a batch halts by itself, and the next takes its place.

A batch has as many slots as puzzles. An optimizer step takes one recursion step in every slot. A
slot whose puzzle has halted is refilled from the batch, at the same position, and starts anew; the
others go on with their state and their own puzzle, and what the batch has for them is not used.

Source: Jolicoeur-Martineau, "Less is More", arXiv 2510.04871, after Wang et al., "Hierarchical
Reasoning Model", arXiv 2506.21734.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.curvature.likelihoods import Bernoulli
from smallfry.curvature.scaled import Scaled
from smallfry.errors import UsageError
from smallfry.models.contract import map_tensors, replace_tensors, tensors
from smallfry.tasks import Batch, Task
from smallfry.training.objective_steps import Advance, Step, choose

__all__ = ["Carry", "SlotSupervision"]

HALT_WEIGHT = 0.5  # of the halting loss


class Carry(NamedTuple):
    """State of the slots between two batches."""

    state: Any  # of the model, detached
    inputs: Tensor  # (slots, ...)
    targets: Any
    steps: Tensor  # (slots,), int64: recursion steps taken
    halted: Tensor  # (slots,), bool


@dataclass(eq=False)
class SlotSupervision:
    """Deep supervision with adaptive halting, one optimizer step per batch.

    A slot halts after ``most_steps``, or when its halting logit is positive. With the probability
    ``exploration``, drawn at each step, it does not before a random step from 2 to ``most_steps``.
    The loss is the task's + ½ BCE(halting logit, "the prediction is right").

    Args:
        task: Meaning of the model's outputs.
        most_steps: Recursion steps after which every slot halts (N_sup).
        exploration: Probability of a random least number of steps.
        parts: Micro-batches of a batch, each of which has slots of its own.
    """

    task: Task
    most_steps: int = 16
    exploration: float = 0.1
    parts: int = 1
    carries: list[Carry] = field(default_factory=list)  # of the micro-batches, oldest first
    halt_threshold: float = 1.0
    model: Any = None  # of ``prepare``

    @property
    def supervision_steps(self) -> int:
        """One optimizer step per batch."""
        return 1

    @property
    def likelihood(self) -> dict[str, Any]:
        """Joint likelihood of both heads, independent given their outputs."""
        halting = Scaled(Bernoulli(), HALT_WEIGHT)
        return {"logits": self.task.likelihood, "halt_logits": halting}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return a module for one recursion step."""
        self.model = model
        return Advance(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the single step of a batch."""
        before = self.carries.pop(0) if len(self.carries) == self.parts else None
        slots = batch if before is None else _filled(before, batch)
        if before is None:
            steps = torch.zeros(len(batch.inputs), dtype=torch.int64, device=batch.inputs.device)
            step = prepared(slots.inputs, None)
        else:
            steps = before.steps.masked_fill(before.halted, 0)
            step = prepared(slots.inputs, before.state, before.halted)
        right = self.task.right(step.logits, slots.targets)
        halting = F.binary_cross_entropy_with_logits(step.halt_logits, right.to(step.halt_logits))
        loss = self.task.loss(step.logits, slots.targets) + HALT_WEIGHT * halting
        steps = steps + 1
        self.carries.append(
            Carry(
                map_tensors(Tensor.detach, step.state),
                *slots,
                steps,
                self._halts(step.halt_logits.detach(), steps),
            )
        )
        halted = step.halt_logits.detach().sigmoid()
        yield Step(loss, step.logits.detach(), halted, targets=slots.targets)

    def _halts(self, logits: Tensor, steps: Tensor) -> Tensor:
        """Decide which slots have halted, drawing from PyTorch's random state on the CPU."""
        draws = torch.rand(len(steps)), torch.randint(2, max(3, self.most_steps + 1), (len(steps),))
        chance, least = (drawn.to(steps.device) for drawn in draws)
        explores = (chance < self.exploration) & (steps < least)
        return (steps >= self.most_steps) | ((logits > 0) & ~explores)

    def state_dict(self) -> dict[str, Any]:
        """Return the carries, for an exact resume."""
        return {"carries": [_plain(carry) for carry in self.carries]}

    def load_state_dict(self, state: dict[str, Any], batch: Batch) -> None:
        """Restore the carries, after ``prepare``.

        Args:
            state: From ``state_dict``.
            batch: A batch on the device of the training, for the kind of its targets.

        Raises:
            UsageError: They are of other processes or micro-batches.
        """
        if len(state["carries"]) not in (0, self.parts):
            raise UsageError("the slots were trained with another accumulate")
        like = self.model.initial_state(1)
        device = batch.inputs.device

        def moved(parts: list[Tensor]) -> list[Tensor]:
            return [part.to(device) for part in parts]

        self.carries = [
            Carry(
                replace_tensors(like, moved(saved["state"])),
                saved["inputs"].to(device),
                replace_tensors(batch.targets, moved(saved["targets"])),
                saved["steps"].to(device),
                saved["halted"].to(device),
            )
            for saved in state["carries"]
        ]


def _plain(carry: Carry) -> dict[str, Any]:
    """Convert to tensors in lists, which are read without running code."""
    held = carry._asdict()
    return held | {"state": tensors(carry.state), "targets": tensors(carry.targets)}


def _filled(before: Carry, batch: Batch) -> Batch:
    """Refill the slots that have halted."""
    if len(before.inputs) != len(batch.inputs):
        raise UsageError(
            f"{len(before.inputs)} slots can't take a batch of {len(batch.inputs)}: the batch size "
            "can't change"
        )
    filled = Batch(before.inputs, before.targets)
    chosen: Batch = choose(before.halted, batch, filled)
    return chosen
