"""Layers that a model does without: operators whose output is zero for every input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.order import Stage
from smallfry.transforms.registry import register
from smallfry.transforms.shorten import owner_of


class Zero(nn.Module):
    """Operator whose output is zero.

    Args:
        is_whole: Give zeros of the input's shape, else a single one, which an addition broadcasts.
    """

    def __init__(self, is_whole: bool = False) -> None:
        super().__init__()
        self.is_whole = is_whole

    def forward(self, inputs: Tensor, *others: Any, **named: Any) -> Tensor:
        """Return zero, of the input's shape or ()."""
        return torch.zeros_like(inputs) if self.is_whole else inputs.new_zeros(())

    def project(self, inputs: Tensor) -> Tensor:
        """Return nothing for rows (…, dim), as (…, 0): attention takes projections from outside."""
        return inputs[..., :0]


class Skip(nn.Module):
    """Operator that gives its first input, whatever others there are."""

    def forward(self, inputs: Tensor, *others: Any, **named: Any) -> Tensor:
        """Return the inputs."""
        return inputs


@register
@dataclass(frozen=True)
class Erase:
    """Branches that are added to others, erased.

    Args:
        zeros: Names of the branches' last modules, whose output becomes zero.
        skipped: Names of their other modules, which do nothing any more.
        whole: Those of ``zeros`` that give zeros of their input's shape, as something is added to
            them in place.

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

    zeros: Sequence[str]
    skipped: Sequence[str] = ()
    whole: Sequence[str] = ()

    def __post_init__(self) -> None:
        for names in (self.zeros, self.skipped, self.whole):
            if isinstance(names, str) or not all(isinstance(n, str) and n for n in names):
                raise ValueError("zeros, skipped and whole are lists of the names of modules")

    def apply(self, model: nn.Module) -> None:
        """Erase in place.

        Raises:
            ValueError: A module that the model does not have.
        """
        for name in (*self.zeros, *self.skipped):
            owner, leaf = owner_of(model, name)
            if owner._modules.get(leaf) is None:
                raise ValueError(f"the model has no module '{name}'")
            is_zero = name in self.zeros
            owner._modules[leaf] = Zero(name in self.whole) if is_zero else Skip()
