"""Erased operators: branches with an output of zero, and steps of a recursion."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from smallfry.order import Stage
from smallfry.transforms.registry import register
from smallfry.transforms.shorten import Shorten, owner_of

NAMES = ("zeros", "skipped", "whole", "numbers", "taken_out", "parameters")


class Zero(nn.Module):
    """Operator with an output of zero.

    Args:
        is_whole: Give zeros of the input's shape, else a single one, which an addition broadcasts.
        is_number: Give the number 0, which anything can be added to in place.
    """

    def __init__(self, is_whole: bool = False, is_number: bool = False) -> None:
        super().__init__()
        self.is_whole, self.is_number = is_whole, is_number

    def forward(self, inputs: Tensor, *others: Any, **named: Any) -> Tensor | float:
        """Return zero, of the input's shape, of the shape () or as a number."""
        if self.is_number:
            return 0.0
        return torch.zeros_like(inputs) if self.is_whole else inputs.new_zeros(())

    def project(self, inputs: Tensor) -> Tensor:
        """Return nothing for rows (…, dim), as (…, 0): attention takes projections from outside."""
        return inputs[..., :0]


class Skip(nn.Module):
    """Identity of the first of several inputs."""

    def forward(self, inputs: Tensor, *others: Any, **named: Any) -> Tensor:
        """Return the inputs."""
        return inputs


@register
@dataclass(frozen=True)
class Erase:
    """Erasure of added branches, and of steps of a recursion.

    Args:
        zeros: Names of the branches' last modules, whose output becomes zero.
        skipped: Names of their other modules, which do nothing any more.
        whole: Those of ``zeros`` that give zeros of their input's shape, as something is added to
            them in place.
        numbers: Those of ``zeros`` that give the number 0, as something of another shape is.
        taken_out: Modules that leave their ``nn.ModuleList``, whose length is the number of steps;
            with the numbers that they have before.
        parameters: Parameters of a branch that none of its modules has; they become None.
        steps: New values of ``latent_steps`` and ``recursion_steps``, see ``Shorten``.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.erased import Erase
        >>> spec = ModelSpec("resnet18").then(Erase(["layer4.1.bn2"], ["layer4.1.conv1"]))
        >>> type(build(spec).layer4[1].bn2).__name__
        'Zero'
    """

    kind: ClassVar[str] = "erase"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.WIDTH

    zeros: Sequence[str] = field(default_factory=list)
    skipped: Sequence[str] = field(default_factory=list)
    whole: Sequence[str] = field(default_factory=list)
    numbers: Sequence[str] = field(default_factory=list)
    taken_out: Sequence[str] = field(default_factory=list)
    parameters: Sequence[str] = field(default_factory=list)
    steps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NAMES:
            names = getattr(self, name)
            if isinstance(names, str) or not all(isinstance(n, str) and n for n in names):
                raise ValueError(f"{', '.join(NAMES)} are lists of the names of modules")
        Shorten(steps=self.steps)

    @classmethod
    def all_of(cls, parts: Iterable["Erase"], steps: Mapping[str, int] | None = None) -> "Erase":
        """Join what several erase.

        Args:
            parts: Of one model.
            steps: New numbers of steps.
        """
        every = list(parts)
        names = {name: [n for each in every for n in getattr(each, name)] for name in NAMES}
        return cls(**names, steps=steps or {})

    def apply(self, model: nn.Module) -> None:
        """Erase in place.

        Raises:
            ValueError: A module, parameter or number of steps that the model does not have.
        """
        for name in (*self.zeros, *self.skipped, *self.taken_out):
            owner, leaf = owner_of(model, name)
            if owner._modules.get(leaf) is None:
                raise ValueError(f"the model has no module '{name}'")
            if name in self.taken_out and not isinstance(owner, nn.ModuleList):
                raise ValueError(f"the model has no list with a module '{name}'")
            if name not in self.taken_out:
                zero = Zero(name in self.whole, name in self.numbers)
                owner._modules[leaf] = zero if name in self.zeros else Skip()
        for name in self.parameters:
            owner, leaf = owner_of(model, name)
            if owner._parameters.get(leaf) is None:
                raise ValueError(f"the model has no parameter '{name}'")
            owner._parameters[leaf] = None
        places = [owner_of(model, name) for name in dict.fromkeys(self.taken_out)]
        for steps, leaf in sorted(places, key=lambda place: int(place[1]), reverse=True):
            del cast(nn.ModuleList, steps)[int(leaf)]
        Shorten(steps=self.steps).apply(model)


def without_steps(model: nn.Module, steps: Mapping[str, int]) -> Erase:
    """Return what leaves steps out, with the modules that only they call.

    Args:
        model: Left as it is.
        steps: New numbers of steps.
    """
    listed = getattr(model, "modules_of_steps", None)
    count = steps.get("recursion_steps")
    taken_out = listed(count) if callable(listed) and count is not None else []
    return Erase(taken_out=taken_out, steps=steps)
