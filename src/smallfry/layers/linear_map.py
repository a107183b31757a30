"""Substitutes for ``nn.Linear`` and ``nn.Conv2d``, registered by name.

Models read their layers as well as calling them: the type of a weight, its device, a kernel's size.
A substitute therefore has ``weight``, ``bias`` and the sizes of the layer in whose place it is.
"""

from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from smallfry.errors import UsageError, nearest
from smallfry.io.json import Plain
from smallfry.io.plugins import load_plugins, scan
from smallfry.io.registry import add
from smallfry.order import Stage

DENSE = (nn.Linear, nn.Conv2d)
LINEAR = ("in_features", "out_features")
APPLIED = ("stride", "padding", "dilation", "groups")  # arguments of F.conv2d
CONVOLUTION = ("in_channels", "out_channels", "kernel_size", *APPLIED, "padding_mode")
T = TypeVar("T", bound=type)

_layers: dict[str, Any] = {}


@runtime_checkable
class LinearMap(Protocol):
    """Layer in place of a dense one.

    Attributes:
        name: Name in files.
        stage: Place of the replacement in the order of transforms.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]

    @property
    def weight(self) -> Tensor:
        """Weight of ``dense``, for models that read it."""

    @property
    def bias(self) -> Tensor | None:
        """Bias of ``dense``."""

    @classmethod
    def like(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the structure for a dense layer; weights are loaded afterwards.

        Raises:
            ValueError: Settings or a layer that it can't stand for.
        """

    @classmethod
    def from_dense(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the closest layer to a dense one; raises as ``like``."""

    def dense(self) -> nn.Module:
        """Convert to an equivalent ``nn.Linear`` or ``nn.Conv2d``."""

    def __call__(self, input: Tensor) -> Tensor:
        """Apply the layer to a batch, under PyTorch's name for it."""


def sizes_of(layer: nn.Module) -> dict[str, Any]:
    """Return what a dense layer, or a substitute with its sizes, is created with, except for bias.

    Example:
        >>> import torch
        >>> from smallfry.layers.linear_map import sizes_of
        >>> sizes_of(torch.nn.Linear(8, 4))
        {'in_features': 8, 'out_features': 4}
    """
    names = CONVOLUTION if hasattr(layer, "kernel_size") else LINEAR
    return {name: getattr(layer, name) for name in names}


@torch.no_grad()
def to_dense(layer: nn.Module) -> nn.Module:
    """Create the linear layer or convolution of a substitute's sizes, weight and bias."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    make: Any = nn.Conv2d if hasattr(layer, "kernel_size") else nn.Linear
    kind = {"device": weight.device, "dtype": weight.dtype}
    dense: nn.Module = make(**sizes_of(layer), bias=bias is not None, **kind)
    dense.weight.copy_(weight)  # type: ignore[operator]
    if bias is not None:
        dense.bias.copy_(bias)  # type: ignore[operator]
    return dense


def register_layer(layer: T) -> T:
    """Register a layer by its ``name``; a decorator.

    Raises:
        UsageError: Another layer has the name.
    """
    add(_layers, layer.name, layer, "layers")  # type: ignore[attr-defined]
    return layer


def layers() -> dict[str, Any]:
    """Return all registered layers by name."""
    scan("smallfry.layers")
    load_plugins()
    return dict(_layers)


def find_layer(name: Any) -> Any:
    """Find a registered layer by name.

    Raises:
        UsageError: There is none; a plugin that brings it may not be installed.
    """
    known = _layers if name in _layers else layers()
    if name not in known:
        raise UsageError(f"unknown layer '{name}'{nearest(str(name), known)}")
    return known[name]


def is_whole(layer: nn.Module) -> bool:
    """Return whether a dense layer is no convolution in groups or with other padding than zeros."""
    return not isinstance(layer, nn.Conv2d) or (layer.groups, layer.padding_mode) == (1, "zeros")


def require_dense(layer: nn.Module) -> None:
    """Require a layer that others can replace.

    Raises:
        ValueError: No linear layer or ungrouped convolution.
    """
    if not isinstance(layer, DENSE):
        raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")
    if not is_whole(layer):
        raise ValueError("convolutions with groups or non-zero padding modes are not supported")
