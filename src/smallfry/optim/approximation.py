"""Interface of Fisher approximations: statistics, inverse and cost of one block.

Everything else, from taking statistics to the length of a step, is the optimizer's and the same for
all methods. State is a dictionary of tensors and plain data, one for each block, so that it can be
saved; an approximation itself holds settings only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import eigendecompose
from smallfry.errors import UsageError
from smallfry.settings import fitted

State = dict[str, Any]


class Summed(NamedTuple):
    """Sums of a method that ``divides``: the messages about one block's samples."""

    numbers: int  # in sums for the owner
    spread: int  # beside the state, from the owner to all
    everywhere: int  # in sums for all
    macs: int  # multiply-adds for one row: a use of a sample


class Sum(NamedTuple):
    """Request for sums over all processes: the owner of the block gets them, the others None.

    Sums that become part of the state as they are, under their names, can go to all.
    """

    parts: State  # this process's
    everywhere: bool = False


class Broadcast(NamedTuple):
    """Request to broadcast the owner's result to all processes."""

    like: State  # tensors of the same shapes
    make: Callable[[], State]


Updating = Generator[Sum | Broadcast, Any, None]


def run_locally(updating: Updating) -> None:
    """Run an update in a single process, which owns everything."""
    result: Any = None
    try:
        while True:
            request = updating.send(result)
            result = request.parts if isinstance(request, Sum) else request.make()
    except StopIteration:
        return


class Approximation(ABC):
    """Approximation of a block's Fisher.

    Args:
        sharing: How the uses of a weight by one sample are put together, one of
            ``sharing_choices``; for all layers or by layer name.
    """

    sharing_choices: tuple[str, ...] = ("expand", "reduce")
    settles = False  # whether there are ``moments`` to ``settle``
    needs_gradients = True  # or inputs alone, so that no target need be drawn
    divides = False  # whether ``updating`` does what ``update`` does
    counts_absence = False  # whether a batch that did not call a block counts, as zero gradients

    def __init__(self, sharing: str | Mapping[str, str]) -> None:
        self.sharing = sharing

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Fold a batch into the running statistics.

        The default runs ``updating``; methods that without ``divides`` have their own.

        Args:
            block: The block.
            state: Its state, empty at first.
            rows: Its rows, one entry for each micro-batch.
            keep: Share of the old statistics; 0 at first.
            generator: For methods that draw.
        """
        run_locally(self.updating(block, state, rows, samples_of(rows), keep, generator))

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """Update from sums over samples alone, so that processes can share the samples.

        Args:
            block: The block.
            state: Its state; changed in the owner, and in all by sums that go to all.
            rows: Its rows in this process, possibly none.
            samples: That it saw in all processes.
            keep: Share of the old statistics.
            generator: In the same state in all processes.
        """
        raise NotImplementedError("a method with ``divides`` has its own")

    @abstractmethod
    def invert(self, block: Block, state: State, damping: float) -> float:
        """Recompute the inverse for ``apply``.

        Returns:
            How many times more than asked it had to be damped.

        Raises:
            NotFiniteError: Before anything is changed.
        """

    def moments(
        self, block: Block, state: State, rows: Sequence[Rows], samples: float
    ) -> Tensor | None:
        """Sum over samples a quantity of the new inverse, such as a diagonal in its basis.

        Args:
            block: The block.
            state: Its state.
            rows: Its rows in this process, possibly none.
            samples: That it saw in all processes.

        Returns:
            This process's part of the sum; None while there is no inverse.
        """
        raise NotImplementedError("a method with ``settles`` has its own")

    def settle(self, state: State, moments: Tensor, keep: float) -> None:
        """Average in the whole sum of ``moments``."""
        raise NotImplementedError("a method with ``settles`` has its own")

    @abstractmethod
    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Multiply (F̂ + λ I)⁻¹ by a matrix (groups, outputs, inputs)."""

    @abstractmethod
    def trace(self, block: Block, state: State) -> float:
        """Compute tr F̂."""

    @abstractmethod
    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, multiply-adds of an inversion.

        Before any statistics ``state`` is empty, and the numbers are those to come.
        """

    def summed(self, block: Block) -> Summed | None:
        """Describe the sums over samples; None if the samples themselves are sent."""
        return None

    def burden(self, block: Block) -> int:
        """Estimate the multiply-adds of a refresh for the block's owner alone.

        Inversion, and for all numbers kept what small decompositions take for each.
        """
        _, numbers, work = self.cost(block, {})
        return work + 100 * numbers

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute eigenvalue ranges ``inputs`` and ``outputs``, and from rows ``fisher_error``."""
        return {}

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the leading A and G, each (groups, size, size).

        Raises:
            UsageError: The method has none.
        """
        raise UsageError(f"{type(self).__name__} has no Kronecker factors")

    def settings(self) -> dict[str, Any]:
        """Return the settings that a saved state depends on, as plain data."""
        sharing = self.sharing if isinstance(self.sharing, str) else dict(self.sharing)
        return {"sharing": sharing}

    def check(self, blocks: Sequence[Block]) -> None:
        """Validate the settings against the blocks.

        Raises:
            UsageError: ``sharing`` names an unknown way or layer.
        """
        sharing = fitted(self.sharing, str | dict[str, str], "sharing")
        asked = {"": sharing} if isinstance(sharing, str) else sharing
        layers = {name for block in blocks for name in block.layers}
        for name, way in asked.items():
            if way not in self.sharing_choices:
                choices = " or ".join(self.sharing_choices)
                raise UsageError(f"sharing is {choices} for this method, not '{way}'")
            if name and name not in layers:
                raise UsageError(f"sharing names layer '{name}', which is not covered")

    def for_one_hot(self) -> "Approximation | None":
        """Return the method for embeddings; None if it uses one-hot inputs as they are."""
        return None

    def takes_numbers(self, block: Block) -> bool:
        """Return whether a block takes one-hot inputs as indices."""
        return False

    @property
    def name(self) -> str:
        """Name of the method in a saved state."""
        return type(self).__name__

    def sharing_of(self, block: Block) -> str:
        """Return the sharing mode of a block's uses."""
        if isinstance(self.sharing, str):
            return self.sharing
        default = self.sharing_choices[0]
        return next((self.sharing[name] for name in block.layers if name in self.sharing), default)

    def sums_over_uses(self, block: Block) -> bool:
        """Return whether statistics are sums over uses, so that a sample of uses suffices."""
        return self.sharing_of(block) == "expand"


def eigenvalue_range(matrix: Tensor) -> tuple[float, float]:
    """Compute the smallest and largest eigenvalue."""
    values = eigendecompose(matrix).values
    return float(values.min()), float(values.max())


def samples_of(rows: Sequence[Rows]) -> int:
    """Count the samples in all micro-batches."""
    return sum(part.samples for part in rows)


def running(state: State, key: str, fresh: Tensor, keep: float) -> Tensor:
    """Compute keep · old + (1 − keep) · fresh."""
    if key not in state:
        return fresh
    old: Tensor = state[key]
    return old.lerp_(fresh, 1 - keep)
