"""Backward passes: their numbers, and the gradients of each."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from smallfry._torch import current_graph_task_id, tree_leaves


class Passes(dict[int, Tensor]):
    """Gradients that arrived at one node, by backward pass."""

    def note(self, gradient: Tensor) -> None:
        """Record a gradient of the current backward pass."""
        key, gradient = backward_pass(), gradient.detach()
        self[key] = self[key] + gradient if key in self else gradient

    def forget_after(self, number: int) -> None:
        """Drop the gradients of later backward passes."""
        for key in [key for key in self if key > number]:
            del self[key]

    def total(self, chosen: Collection[int]) -> Tensor | None:
        """Sum the gradients of some passes, as ``.grad`` does; None without any."""
        found = [gradient for key, gradient in self.items() if key in chosen]
        return sum(found[1:], start=found[0]) if found else None


def versions_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[int, ...]:
    """Return the in-place version of each tensor in a call's arguments."""
    leaves = tree_leaves((arguments, keywords))
    return tuple(t._version for t in leaves if isinstance(t, Tensor) and not t.is_inference())


def backward_pass() -> int:
    """Return the number of the current backward pass."""
    number: int = current_graph_task_id()
    return number
