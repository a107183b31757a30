"""Quantised weights: integer codes q and one scale s per output channel, w ≈ s q.

Symmetric: Q = 2^(bits−1) − 1, s = max|w| / Q of the channel, q = clamp(round(w / s), −Q, Q) with
halves to even; a channel of zeros has s = 1. The product is taken in floating point.
"""

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.io.json import Plain
from smallfry.layers.linear_map import register_layer
from smallfry.order import Stage

BITS = range(2, 9)


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise a weight to codes and scales.

    Args:
        weight: (outputs, …).
        bits: 2 to 8.

    Returns:
        Codes, int8 in the weight's shape; scales, float32 of shape (outputs, 1, …).
    """
    most = 2 ** (bits - 1) - 1
    flat = weight.detach().double().flatten(1)
    scales = flat.abs().amax(1, keepdim=True) / most
    scales = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    codes = (flat / scales.double()).round().clamp(-most, most).to(torch.int8)
    return codes.view(weight.shape), scales.view(-1, *[1] * (weight.ndim - 1))


@register_layer
class QuantizedWeight(nn.Module):
    """Linear layer or convolution with 2- to 8-bit weights and floating-point inputs.

    Args:
        dense: The layer whose shape, stride and so on it has.
        bits: Bits per weight.

    Example:
        >>> import torch
        >>> from smallfry.layers.quantized import QuantizedWeight
        >>> small = QuantizedWeight.from_dense(torch.nn.Linear(8, 4), bits=4)
        >>> small.codes.dtype, int(small.codes.abs().max())
        (torch.int8, 7)
    """

    name: ClassVar[str] = "quantized_weight"
    stage: ClassVar[Stage] = Stage.BITS

    def __init__(self, dense: nn.Module, bits: int) -> None:
        super().__init__()
        weight = cast(Tensor, dense.weight)
        self.bits = bits
        self.shape = {name: getattr(dense, name) for name in _shape_of(dense)}
        self.is_convolution = isinstance(dense, nn.Conv2d)
        # of both sides of each dimension, as PyTorch computes them for every kind of padding
        self.sides = tuple(getattr(dense, "_reversed_padding_repeated_twice", ()))
        codes, scales = quantize(weight, bits)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.to(weight.device), requires_grad=False)
        self.bias = None if dense.bias is None else nn.Parameter(cast(Tensor, dense.bias).clone())

    @classmethod
    def like(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the structure; raises as ``from_dense``."""
        return cls.from_dense(layer, **settings)

    @classmethod
    def from_dense(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Round a layer's weight.

        Args:
            layer: ``nn.Linear`` or ``nn.Conv2d``.
            settings: ``bits``, 2 to 8.

        Raises:
            ValueError: Another layer, or other settings.
        """
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")
        bits = settings.get("bits")
        if set(settings) != {"bits"} or type(bits) is not int or bits not in BITS:
            raise ValueError(
                f"a quantized weight needs exactly one setting, bits from 2 to 8; got {settings}"
            )
        return cls(layer, bits)

    @property
    def weight(self) -> Tensor:
        """Weight in floating point."""
        return self.codes.to(self.scales.dtype) * self.scales

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """Convert to a layer with the floating-point weight."""
        kind = {"bias": self.bias is not None, "device": self.codes.device}
        make: Any = nn.Conv2d if self.is_convolution else nn.Linear
        layer = make(**self.shape, **kind)
        layer.weight.copy_(self.weight)
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return cast(nn.Module, layer)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the inputs of the dense layer to its outputs."""
        weight = self.weight.to(inputs.dtype)
        if not self.is_convolution:
            return F.linear(inputs, weight, self.bias)
        names = ("stride", "padding", "dilation", "groups")
        how = {n: self.shape[n] for n in names}
        if self.shape["padding_mode"] != "zeros":
            inputs = F.pad(inputs, self.sides, mode=self.shape["padding_mode"])
            how["padding"] = 0
        return F.conv2d(inputs, weight, self.bias, **how)


def _shape_of(layer: nn.Module) -> tuple[str, ...]:
    if not isinstance(layer, nn.Conv2d):
        return ("in_features", "out_features")
    kernel = ("in_channels", "out_channels", "kernel_size")
    return (*kernel, "stride", "padding", "dilation", "groups", "padding_mode")
