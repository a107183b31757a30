"""Quantised layers of a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from smallfry.io.json import Plain
from smallfry.layers.quantized import QuantizedWeight, number_calls
from smallfry.order import Stage
from smallfry.transforms.registry import register
from smallfry.transforms.replace import replace_layers


@register
@dataclass(frozen=True)
class Bits:
    """Quantisation of layers to few bits.

    Args:
        layers: Settings of each quantised layer by its qualified name, as
            ``smallfry.layers.quantized.QuantizedWeight`` takes them.
        first: Layer whose call begins a pass of the model, for layers with a range for each call;
            None if no layer is called more than once, or only the call of the model begins one.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.bits import Bits
        >>> spec = ModelSpec("resnet18").then(Bits({"fc": {"bits": 4, "group": 32}}))
        >>> tuple(build(spec).fc.scales.shape)
        (1000, 16)
    """

    kind: ClassVar[str] = "bits"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.BITS

    layers: Mapping[str, Mapping[str, Plain]]
    first: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ValueError("layers need the names of the layers to quantise")
        if not all(isinstance(each, Mapping) for each in self.layers.values()):
            raise ValueError("the settings of each layer are a mapping")
        if self.first is not None and not isinstance(self.first, str):
            raise ValueError(f"first is the name of a layer, got {self.first!r}")

    def without_classifier(self, name: str, classes: int) -> "Bits | None":
        """Return the transform without the classifier; None if nothing else was quantised."""
        kept = {key: each for key, each in self.layers.items() if key != name}
        return replace(self, layers=kept) if kept else None

    def apply(self, model: nn.Module) -> None:
        """Replace the layers by the structure of quantised ones.

        Raises:
            ValueError: A name that the model does not have, or a layer that can't be quantised.
        """
        make = QuantizedWeight.like
        replace_layers(model, self.layers, lambda old, name: make(old, **self.layers[name]))
        number_calls(model, self.first)
