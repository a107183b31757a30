"""Adapters after layers of a model, with rules that all of them share."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import nn

from smallfry.io.json import Plain
from smallfry.layers.phm import Activation, Adapted, PHMRules
from smallfry.layers.quantized import MOST_CALLS, number_calls
from smallfry.order import Stage
from smallfry.transforms.registry import register
from smallfry.transforms.replace import replace_layers

CHILD = "adapter_rules"  # of a model with adapters
SIZES = {"inner": 2**20, "calls": MOST_CALLS}  # of a layer's adapters, with the most of each


@register
@dataclass(frozen=True)
class Adapters:
    """Hypercomplex adapters of layers' outputs.

    Args:
        layers: Width ``inner`` of the adapters of each layer, and the number of ``calls`` with an
            adapter of their own, by its qualified name.
        n: Number of the shared rules.
        activation: Of the adapters, ``gelu`` or ``none``.
        first: Layer whose call begins a pass of the model, for adapters of each call; see
            ``smallfry.layers.quantized.number_calls``.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.adapters import Adapters
        >>> layers = {"layer4.1.conv2": {"inner": 32, "calls": 1}}
        >>> model = build(ModelSpec("resnet18").then(Adapters(layers)))
        >>> sum(p.numel() for p in model.layer4[1].conv2.adapters.parameters())
        1632
    """

    kind: ClassVar[str] = "adapters"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.ADAPTER

    layers: Mapping[str, Mapping[str, Plain]]
    n: int = 4
    activation: Activation = "gelu"
    first: str | None = None

    def __post_init__(self) -> None:
        if type(self.n) is not int or not 1 <= self.n <= 64:
            raise ValueError(f"n is a number from 1 to 64, got {self.n!r}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation is gelu or none, got {self.activation!r}")
        if self.first is not None and not isinstance(self.first, str):
            raise ValueError(f"first is the name of a layer, got {self.first!r}")
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ValueError("layers need the names of the layers to adapt")
        for name, sizes in self.layers.items():
            if not isinstance(sizes, Mapping) or set(sizes) != set(SIZES):
                raise ValueError(f"{name}: expected inner and calls, got {sizes!r}")
            for key, most in SIZES.items():
                size: Any = sizes[key]
                if type(size) is not int or not 1 <= size <= most:
                    raise ValueError(f"{name}: {key} is a number from 1 to {most}, got {size!r}")

    def without_classifier(self, name: str, classes: int) -> "Adapters":
        """Return the same transform: a classifier is never adapted."""
        return self

    def apply(self, model: nn.Module) -> None:
        """Add new adapters.

        Raises:
            ValueError: The model has adapters, or lacks a layer, or its width does not fit n.
        """
        if hasattr(model, CHILD):
            raise ValueError("the model has adapters already")
        rules = PHMRules(self.n)

        def make(layer: nn.Module, name: str) -> nn.Module:
            sizes: Any = self.layers[name]
            return Adapted(layer, rules, sizes["inner"], sizes["calls"], self.activation)

        replace_layers(model, self.layers, make)
        number_calls(model, self.first)
        setattr(model, CHILD, rules.to(next(model.parameters())))


def merge_adapters(model: nn.Module) -> nn.Module:
    """Merge adapters into the layers before them, where they are linear.

    Args:
        model: Left as it is.

    Returns:
        A copy with merged layers, or the model itself if it has no such adapters.
    """
    if not any(isinstance(module, Adapted) and module.is_mergeable for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    modules = dict(merged.named_modules())
    names = [n for n, m in modules.items() if isinstance(m, Adapted) and m.is_mergeable]
    replace_layers(merged, names, lambda layer, name: layer.dense())  # type: ignore[operator]
    if not any(isinstance(module, Adapted) for module in merged.modules()):
        delattr(merged, CHILD)
    return merged.train(model.training)
