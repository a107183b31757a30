"""Weakly bound hooks, and the graph nodes at which gradients arrive."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from smallfry._torch import disable_dynamo
from smallfry.curvature.taps import Observation


class EagerStance:
    """Eager stance of the compiler, held while any observer needs it.

    Observers of one model begin and end in the same order, so that each can't restore what it
    found.
    """

    depth = 0
    stance: Any = None

    @classmethod
    def begin(cls) -> None:
        """Run eagerly from now on."""
        if cls.depth == 0:
            cls.stance = torch.compiler.set_stance("force_eager")
        cls.depth += 1

    @classmethod
    def end(cls) -> None:
        """Restore the previous stance once no observer needs eager execution."""
        cls.depth -= 1
        if cls.depth == 0:
            cls.stance.__exit__(None, None, None)


class WeakHook:
    """Weakly held method, so that a copied or pickled model drops the optimizer."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self.method = None if method is None else weakref.WeakMethod(method)

    @disable_dynamo
    def __call__(self, *arguments: Any) -> None:
        """Call the method if its owner still exists."""
        method = None if self.method is None else self.method()
        if method is not None:
            method(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeakHook":
        return WeakHook()

    def __reduce__(self) -> tuple[type["WeakHook"], tuple[()]]:
        return WeakHook, ()


class Root(NamedTuple):
    """Output of the model, as a graph node at which gradients arrive."""

    which: int
    output: int  # of its node in the graph
    version: int
    sampled: bool  # whether targets are drawn when one does
    here: tuple[int, ...]  # calls whose output it is
    edges: dict[int, GradientEdge]  # the places of other calls that may lie behind it

    def dtype_of(self, seen: Observation) -> torch.dtype:
        """Return the precision of the output."""
        return seen.outputs[self.which].dtype


def upstream(
    own: GradientEdge, places: Mapping[int, GradientEdge], sampled: bool
) -> tuple[bool, tuple[int, ...], dict[int, GradientEdge]]:
    """Find the calls that a gradient at an output can reach.

    A node that was made later lies behind no hook of this one, and must not be held by it: the
    graph would keep itself alive.
    """
    here, edges = list[int](), dict[int, GradientEdge]()
    for number, place in places.items() if sampled else ():
        if place.node is own.node and place.output_nr == own.output_nr:
            here.append(number)
        elif place.node._sequence_nr() < own.node._sequence_nr():
            edges[number] = place
    return sampled, tuple(here), edges
