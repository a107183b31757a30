"""Fewer layers in a sequence, and fewer steps of a recursion."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from smallfry.order import Stage
from smallfry.transforms.registry import register

STEPS = frozenset({"latent_steps", "recursion_steps"})


@register
@dataclass(frozen=True)
class Shorten:
    """Leading layers of sequences, and smaller numbers of recursion steps.

    Args:
        layers: Layers that stay, by the qualified name of an ``nn.Sequential`` or ``ModuleList``.
        steps: New values of the model's ``latent_steps`` and ``recursion_steps``.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.shorten import Shorten
        >>> spec = ModelSpec("vitrm_micro_patch4_8").then(Shorten({"blocks": 2}))
        >>> len(build(spec).blocks)
        2
    """

    kind: ClassVar[str] = "shorten"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.WIDTH

    layers: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (*self.layers.values(), *self.steps.values())
        if not all(type(count) is int and count >= 1 for count in counts):
            raise ValueError("layers and steps are whole numbers of 1 or more")

    def apply(self, model: nn.Module) -> None:
        """Shorten in place.

        Raises:
            ValueError: A sequence or number that the model does not have, or one that would grow.
        """
        for name, count in self.layers.items():
            owner, leaf = owner_of(model, name)
            container = owner._modules.get(leaf)
            if not isinstance(container, nn.Sequential | nn.ModuleList) or len(container) < count:
                raise ValueError(f"the model has no sequence '{name}' of {count} layers")
            owner._modules[leaf] = container[:count]
        for name, count in self.steps.items():
            if count > steps_of(model, name):
                raise ValueError(f"the model has no {name} of {count} or more")
            setattr(model, name, count)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a submodule or tensor, and its name there.

    Raises:
        ValueError: There is no such module.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(owner), leaf
    except AttributeError as error:
        raise ValueError(f"the model has no module '{owner}'") from error


def steps_of(model: nn.Module, name: str) -> int:
    """Return a number of recursion steps of a model; 0 of one without."""
    value: Any = getattr(model, name, 0) if name in STEPS else 0
    return value if type(value) is int else 0
