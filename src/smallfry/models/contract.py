"""Interface of recursive models: a state rewritten step by step, and two heads that read it.

Training with deep supervision, early exit, export and the demo ask for ``Recursive``, never for a
class. A model without this contract is one from inputs to logits, as timm's are.

A *state* is a tensor whose first dimension is the batch, or a tuple, named tuple, list or
dictionary of states.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor

__all__ = [
    "FromImages",
    "FromTargets",
    "LatentRecursive",
    "ReadsOut",
    "RecursionStep",
    "Recursive",
    "map_tensors",
    "replace_tensors",
    "tensors",
]


class RecursionStep(NamedTuple):
    """Outcome of one recursion step."""

    state: Any  # after the step; ViTRM's is y and z
    logits: Tensor  # (batch, classes)
    halt_logits: Tensor  # (batch,); their sigmoid is the probability that the answer is right


@runtime_checkable
class Recursive(Protocol):
    """Module that refines its prediction in recursion steps.

    Its ``forward`` takes inputs to the logits of the last of ``recursion_steps`` steps. A step of
    an image depends on no other image, so that finished ones can leave the batch.
    """

    recursion_steps: int  # at inference

    def embed(self, inputs: Tensor) -> Tensor:
        """Compute the input features of every step, (batch, ...)."""

    def initial_state(self, batch_size: int) -> Any:
        """Return the common initial state of all inputs."""

    def step(self, x: Tensor, state: Any) -> RecursionStep:
        """Run one recursion step on embedded inputs."""

    def recurse(self, inputs: Tensor, steps: int | None = None) -> Sequence[RecursionStep]:
        """Run all recursion steps; ``steps`` defaults to ``recursion_steps``."""

    def advance(self, inputs: Tensor, state: Any = None) -> RecursionStep:
        """Run one recursion step on inputs, by default from the initial state, for training."""


@runtime_checkable
class FromImages(Protocol):
    """Module with data-dependent initial weights, set before training."""

    def initialize(self, images: Tensor) -> None:
        """Set these weights from normalised images (images, channels, side, side)."""


@runtime_checkable
class FromTargets(Protocol):
    """Module with data-dependent scales of its outputs, set before training."""

    def fit_outputs(self, labels: Tensor) -> None:
        """Set these scales from the labels of the training split."""


@runtime_checkable
class ReadsOut(Recursive, Protocol):
    """Recursive model whose heads read the first tensor of the state and no other, as TRM."""

    def read_out(self, state: Any) -> RecursionStep:
        """Compute the heads' outputs of a state."""


@runtime_checkable
class LatentRecursive(ReadsOut, Protocol):
    """Recursive model with several latent steps and one answer step in each step, as ViTRM."""

    latent_steps: int  # in a recursion step

    def think(self, x: Tensor, state: Any) -> Any:
        """Run one latent step."""

    def answer(self, state: Any) -> Any:
        """Run the answer step."""


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply a function to every tensor of a state, or of a nested structure.

    Raises:
        TypeError: Something in it is neither a tensor nor a collection of them.
    """
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, Mapping):
        return {key: map_tensors(function, value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        values = [map_tensors(function, value) for value in state]
        kind = cast(Any, type(state))
        return kind(*values) if hasattr(state, "_fields") else kind(values)
    raise TypeError(
        f"expected tensors, in tuples, lists or dictionaries, not a {type(state).__name__}"
    )


def tensors(state: Any) -> list[Tensor]:
    """Return the tensors of a state, in order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, state)
    return found


def replace_tensors(state: Any, values: Sequence[Tensor]) -> Any:
    """Rebuild a state from as many tensors as ``tensors`` returns."""
    left = iter(values)
    return map_tensors(lambda _: next(left), state)
