"""Backward passes: their numbers, and the gradients that each brought to a place."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Passes(dict[int, Tensor]):
    """Gradients that came to one place, by the backward pass that brought them."""

    def note(self, gradient: Tensor) -> None:
        """Keep a gradient of the backward pass that is under way."""
        key, gradient = backward_pass(), gradient.detach()
        self[key] = self[key] + gradient if key in self else gradient

    def forget_after(self, number: int) -> None:
        """Drop what later backward passes brought."""
        for key in [key for key in self if key > number]:
            del self[key]

    def total(self, chosen: Collection[int]) -> Tensor | None:
        """The sum over some passes, as ``.grad`` adds them up; None where none came."""
        found = [gradient for key, gradient in self.items() if key in chosen]
        return sum(found[1:], start=found[0]) if found else None


def versions_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[int, ...]:
    """How often each tensor in a call's arguments has been overwritten."""
    leaves = tree_leaves((arguments, keywords))
    return tuple(t._version for t in leaves if isinstance(t, Tensor) and not t.is_inference())


def backward_pass() -> int:
    """A number for the backward pass that is under way."""
    number: int = torch._C._current_graph_task_id()
    return number
