"""What a method says of one block of the Fisher: its statistics, their inverse, and what they cost.

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

State = dict[str, Any]


class Summed(NamedTuple):
    """Of a method that ``divides``: what processes do with the samples of one block."""

    numbers: int  # in sums for the owner
    spread: int  # beside the state, from the owner to all
    everywhere: int  # in sums for all
    macs: int  # multiply-adds for one row: a use of a sample


class Sum(NamedTuple):
    """Asks for sums over all processes: the owner of the block gets them, the others None.

    Sums that become part of the state as they are, under their names, can go to all.
    """

    parts: State  # this process's
    everywhere: bool = False


class Spread(NamedTuple):
    """Asks for what the owner of the block makes, in all processes."""

    like: State  # tensors of the same shapes
    make: Callable[[], State]


Updating = Generator[Sum | Spread, Any, None]


def alone(updating: Updating) -> None:
    """Go through an update in one process, which owns everything."""
    answer: Any = None
    try:
        while True:
            asked = updating.send(answer)
            answer = asked.parts if isinstance(asked, Sum) else asked.make()
    except StopIteration:
        return


class Approximation(ABC):
    """How a block's Fisher is approximated.

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

    @abstractmethod
    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Fold a batch into the running statistics.

        Args:
            block: The block.
            state: Its state, empty at first.
            rows: What it saw, one for each micro-batch.
            keep: Share of the old statistics; 0 at first.
            generator: For methods that draw.
        """

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """``update`` from sums over samples alone, so that processes can share the samples.

        Args:
            block: The block.
            state: Its state; changed in the owner, and in all by sums that go to all.
            rows: What it saw in this process, perhaps nothing.
            samples: That it saw in all processes.
            keep: Share of the old statistics.
            generator: In the same state in all processes.
        """
        raise NotImplementedError("a method that ``divides`` says how")

    @abstractmethod
    def invert(self, block: Block, state: State, damping: float) -> float:
        """Make anew what ``apply`` needs.

        Returns:
            How many times more than asked it had to be damped.

        Raises:
            NotFiniteError: Before anything is changed.
        """

    def moments(
        self, block: Block, state: State, rows: Sequence[Rows], samples: float
    ) -> Tensor | None:
        """What depends on the new inverse, such as a diagonal in its basis: a sum over samples.

        Args:
            block: The block.
            state: Its state.
            rows: What it saw in this process, perhaps nothing.
            samples: That it saw in all processes.

        Returns:
            This process's part of the sum; None while there is no inverse.
        """
        raise NotImplementedError("a method with ``settles`` says how")

    def settle(self, state: State, moments: Tensor, keep: float) -> None:
        """Fold in the whole sum of ``moments``."""
        raise NotImplementedError("a method with ``settles`` says how")

    @abstractmethod
    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ I)⁻¹ times a matrix (groups, outputs, inputs)."""

    @abstractmethod
    def trace(self, block: Block, state: State) -> float:
        """tr F̂."""

    @abstractmethod
    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """The approximation in words, numbers kept, multiply-adds of an inversion.

        Before any statistics ``state`` is empty, and the numbers are those to come.
        """

    def summed(self, block: Block) -> Summed | None:
        """What is summed over samples; None where the samples themselves are sent."""
        return None

    def burden(self, block: Block) -> int:
        """Multiply-adds of a refresh that only the block's owner does, about.

        Inversion, and for all numbers kept what small decompositions take for each.
        """
        _, numbers, work = self.cost(block, {})
        return work + 100 * numbers

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Eigenvalue ranges ``inputs`` and ``outputs`` and, given rows, ``fisher_error``."""
        return {}

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """The leading A and G, each (groups, size, size).

        Raises:
            UsageError: The method has none.
        """
        raise UsageError(f"{type(self).__name__} has no Kronecker factors")

    def settings(self) -> dict[str, Any]:
        """Plain data that a saved state depends on."""
        sharing = self.sharing if isinstance(self.sharing, str) else dict(self.sharing)
        return {"sharing": sharing}

    def check(self, blocks: Sequence[Block]) -> None:
        """Make sure that the settings fit the blocks.

        Raises:
            UsageError: ``sharing`` names an unknown way or layer.
        """
        asked = {"": self.sharing} if isinstance(self.sharing, str) else dict(self.sharing)
        layers = {name for block in blocks for name in block.layers}
        for name, way in asked.items():
            if way not in self.sharing_choices:
                choices = " or ".join(self.sharing_choices)
                raise UsageError(f"sharing is {choices} for this method, not '{way}'")
            if name and name not in layers:
                raise UsageError(f"sharing names layer '{name}', which is not covered")

    def for_one_hot(self) -> "Approximation | None":
        """The form of the method for embeddings; None where it takes one-hot inputs as they are."""
        return None

    def takes_numbers(self, block: Block) -> bool:
        """Whether one-hot inputs of a block are wanted by their numbers alone."""
        return False

    @property
    def name(self) -> str:
        """What a saved state calls the method."""
        return type(self).__name__

    def sharing_of(self, block: Block) -> str:
        """How a block's uses are put together."""
        if isinstance(self.sharing, str):
            return self.sharing
        default = self.sharing_choices[0]
        return next((self.sharing[name] for name in block.layers if name in self.sharing), default)

    def sums_over_uses(self, block: Block) -> bool:
        """Whether statistics are sums over uses, so that some drawn at random can stand for all."""
        return self.sharing_of(block) == "expand"


def eigenvalue_range(matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue."""
    values = eigendecompose(matrix).values
    return float(values.min()), float(values.max())
