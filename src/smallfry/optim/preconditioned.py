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
    """Optimizer with a preconditioner, bound to one model and not copyable."""

    preconditioner: Preconditioner

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            "a natural-gradient optimizer is bound to its model and can't be copied or "
            "pickled: build a new one for the new model, and load_state_dict()"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Covered blocks."""
        return tuple(self.preconditioner.blocks.values())

    @property
    def approximation(self) -> Approximation:
        """Approximation of a block's Fisher."""
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
        """Counts of steps, refreshes, measurements and failures."""
        return self.preconditioner.counters

    @property
    def collectives(self) -> Collectives:
        """Communication between the processes that share a batch."""
        return self.preconditioner.collectives

    @property
    def owners(self) -> dict[str, int]:
        """Process that refreshes each block."""
        return self.preconditioner.owners

    @property
    def generator(self) -> torch.Generator:
        """Generator of sampled targets, uses and directions."""
        return self.preconditioner.generator

    @property
    def damping_factor(self) -> float:
        """Factor of adaptive damping on ``damping``."""
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
        """Describe the owner of each layer, and the messages of the last refresh."""
        return distribution(self.preconditioner)

    def costs(self, rows: int) -> dict[str, Cost]:
        """Compute the cost of a refresh of each block, for ``rows`` uses by the whole batch."""
        return {b.name: cost_of(b, self.approximation, rows) for b in self.blocks}

    def monitor(self, on: bool = True) -> None:
        """Keep the rows of the last refresh, so that diagnostics can compute the Fisher error."""
        self.preconditioner.monitoring, self.preconditioner.latest = on, {}
