"""Optimizer that owns a preconditioner, with views of it."""

from typing import Any, NoReturn

import torch

from smallfry.curvature import Block
from smallfry.errors import UsageError
from smallfry.optim.approximation import Approximation, State
from smallfry.optim.collectives import Collectives
from smallfry.optim.distribution import Cost, cost_of
from smallfry.optim.inspect import Distribution, distribution
from smallfry.optim.preconditioner import Preconditioner


class PreconditionedOptimizer(torch.optim.Optimizer):
    """Optimizer with a preconditioner, which belongs to one model and can't be copied."""

    preconditioner: Preconditioner

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            "a natural-gradient optimizer belongs to the model it watches and can't be copied or "
            "pickled: build a new one for the new model, and load_state_dict()"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The covered blocks."""
        return tuple(self.preconditioner.blocks.values())

    @property
    def approximation(self) -> Approximation:
        """How a block's Fisher is approximated."""
        return self.preconditioner.approximation

    @property
    def curvature(self) -> dict[str, State]:
        """State of each block."""
        return self.preconditioner.states

    @property
    def lambdas(self) -> dict[str, float]:
        """λ of each block."""
        return self.preconditioner.lambdas

    @property
    def counters(self) -> dict[str, int]:
        """Steps, refreshes, measurements, and those that failed."""
        return self.preconditioner.counters

    @property
    def collectives(self) -> Collectives:
        """Messages between the processes that share a batch."""
        return self.preconditioner.collectives

    @property
    def owners(self) -> dict[str, int]:
        """The process that refreshes each block."""
        return self.preconditioner.owners

    @property
    def generator(self) -> torch.Generator:
        """Of sampled targets, uses and directions."""
        return self.preconditioner.generator

    @property
    def damping_factor(self) -> float:
        """What adaptive damping multiplies ``damping`` with."""
        return self.preconditioner.damping_factor

    @damping_factor.setter
    def damping_factor(self, factor: float) -> None:
        self.preconditioner.damping_factor = factor

    @property
    def damping(self) -> float:
        """λ over the mean eigenvalue of F̂."""
        return self.preconditioner.damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self.preconditioner.damping = damping

    def distribution(self) -> Distribution:
        """Which process refreshes which layers, and what the last refresh sent."""
        return distribution(self.preconditioner)

    def costs(self, rows: int) -> dict[str, Cost]:
        """What a refresh of each block costs, for so many ``rows``: uses by the whole batch."""
        return {b.name: cost_of(b, self.approximation, rows) for b in self.blocks}

    def monitor(self, on: bool = True) -> None:
        """Keep the rows of the last refresh, so that diagnostics can tell the Fisher error."""
        self.preconditioner.monitoring, self.preconditioner.latest = on, {}
