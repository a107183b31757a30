"""The contract of recursive models: a state, rewritten step by step, and two heads that read it.

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
    "LatentRecursive",
    "RecursionStep",
    "Recursive",
    "map_tensors",
    "replace_tensors",
    "tensors",
]


class RecursionStep(NamedTuple):
    """The outcome of one recursion step."""

    state: Any  # after the step; ViTRM's is y and z
    logits: Tensor  # (batch, classes)
    halt_logits: Tensor  # (batch,); their sigmoid is the probability that the answer is right


@runtime_checkable
class Recursive(Protocol):
    """A module that improves its answer in recursion steps.

    Its ``forward`` takes inputs to the logits of the last of ``recursion_steps`` steps. A step of
    an image depends on no other image, so that finished ones can leave the batch.
    """

    recursion_steps: int  # at inference

    def embed(self, inputs: Tensor) -> Tensor:
        """Features of the inputs that every step reads, (batch, ...)."""

    def initial_state(self, batch_size: int) -> Any:
        """The state that every input starts from."""

    def step(self, x: Tensor, state: Any) -> RecursionStep:
        """One recursion step on embedded inputs."""

    def recurse(self, inputs: Tensor, steps: int | None = None) -> Sequence[RecursionStep]:
        """All recursion steps; ``steps`` defaults to ``recursion_steps``."""

    def advance(self, inputs: Tensor, state: Any = None) -> RecursionStep:
        """One recursion step on inputs, by default from the initial state; it is trained alone."""


@runtime_checkable
class FromImages(Protocol):
    """A module with weights that depend on the training images; training begins with them."""

    def initialize(self, images: Tensor) -> None:
        """Set these weights, given normalised images (images, channels, side, side)."""


@runtime_checkable
class LatentRecursive(Recursive, Protocol):
    """A recursive model whose step is several latent steps and an answer step, as ViTRM's.

    The heads read the first tensor of the state and no other.
    """

    latent_steps: int  # in a recursion step

    def think(self, x: Tensor, state: Any) -> Any:
        """The state after one latent step."""

    def answer(self, state: Any) -> Any:
        """The state after the answer step."""

    def read_out(self, state: Any) -> RecursionStep:
        """The heads' outputs of a state."""


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply a function to every tensor of a state, or of anything of such a kind.

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
    """The tensors of a state, in order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, state)
    return found


def replace_tensors(state: Any, values: Sequence[Tensor]) -> Any:
    """A state of the same kind that holds other tensors, as many as ``tensors`` gives of it."""
    left = iter(values)
    return map_tensors(lambda _: next(left), state)
