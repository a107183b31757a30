"""Binary layers by a periodic function (BiPer), and their packed form.

    activations   a_b = sign(a₀), ∂a_b/∂a₀ = (2 − 2|a₀|)₊; in training a₀ = a / √(var(a) + 10⁻⁵) of
                  each sample, unbiased and differentiated through; a₀ = a in evaluation
    weights       stage 1: sin(ωw);  stage 2: sign(sin(ωw)) with the gradient of sin(ωw)
    output        α ⊙ conv(a_b, w), with a factor for each output channel

Division by a positive number changes no sign, so training and evaluation have the same outputs.
sign(0) = +1 everywhere, as one bit has no third value. Source: Vargas et al., BiPer, CVPR 2024.
"""

import math
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.io.json import Plain
from smallfry.layers.linear_map import APPLIED, register_layer, sizes_of, to_dense
from smallfry.order import Stage

EPSILON = 1e-5


class _Sign(torch.autograd.Function):
    """Sign with +1 at 0, and a triangle for its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return signs(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return cast(Tensor, gradients[0] * (2 - 2 * values.abs()).clamp(min=0))


def signs(values: Tensor) -> Tensor:
    """Return +1 where values are at least 0, else −1."""
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


def binary_activation(inputs: Tensor, training: bool) -> Tensor:
    """Binarise inputs (batch, …); see the module."""
    if training:
        variance = inputs.flatten(1).var(dim=1).view(-1, *[1] * (inputs.ndim - 1))
        inputs = inputs / (variance + EPSILON).sqrt()
    return cast(Tensor, _Sign.apply(inputs))


def periodic_weight(weight: Tensor, frequency: float, stage: int) -> Tensor:
    """Map real weights to sin(ωw), or to its signs with the sine's gradient."""
    wave = (frequency * weight).sin()
    return wave if stage == 1 else wave + (signs(wave) - wave).detach()


class _Binary(nn.Module):
    """Common part of the layers in training: ``weight``, ``alpha`` and the stage."""

    weight: Tensor
    training: bool

    def _begin(self, frequency: float, generator: torch.Generator | None) -> None:
        if not frequency > 0:
            raise ValueError(f"frequency must be positive, got {frequency}")
        self.frequency, self.stage = frequency, 1
        alpha = torch.rand(len(self.weight), generator=generator).to(self.weight)
        self.alpha = nn.Parameter(alpha)

    def periodic(self) -> Tensor:
        """Compute the weights of the product."""
        return periodic_weight(self.weight, self.frequency, self.stage)


class BinaryConv2d(nn.Conv2d, _Binary):
    """Convolution of binary activations with periodic weights, without bias.

    Args:
        in_channels: Channels of the inputs.
        out_channels: Channels of the outputs.
        kernel_size: As ``nn.Conv2d``.
        stride: As ``nn.Conv2d``.
        padding: As ``nn.Conv2d``.
        dilation: As ``nn.Conv2d``.
        groups: As ``nn.Conv2d``.
        padding_mode: As ``nn.Conv2d``.
        frequency: ω.
        generator: Of the initial α, uniform in [0, 1).
        device: Device of the weights.
        dtype: Type of the weights.

    Example:
        >>> import torch
        >>> from smallfry.layers.biper import BinaryConv2d
        >>> layer = BinaryConv2d(3, 8, 3, padding=1)
        >>> layer.stage = 2
        >>> layer(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        frequency: float = 20.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias=False, padding_mode=padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self._begin(frequency, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the convolution's outputs."""
        binary = binary_activation(inputs, self.training)
        outputs = self._conv_forward(binary, self.periodic(), None)
        return cast(Tensor, outputs * self.alpha[:, None, None])


class BinaryLinear(nn.Linear, _Binary):
    """Linear layer of binary activations with periodic weights, without bias.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        frequency: ω.
        generator: Of the initial α, uniform in [0, 1).
        device: Device of the weights.
        dtype: Type of the weights.

    Example:
        >>> import torch
        >>> from smallfry.layers.biper import BinaryLinear
        >>> BinaryLinear(16, 4)(torch.randn(2, 7, 16)).shape
        torch.Size([2, 7, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        frequency: float = 20.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self._begin(frequency, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, …, inputs) to (batch, …, outputs)."""
        return F.linear(binary_activation(inputs, self.training), self.periodic()) * self.alpha


def binary_layer(
    layer: nn.Module, frequency: float = 20.0, generator: torch.Generator | None = None
) -> BinaryConv2d | BinaryLinear:
    """Create the binary layer in training of a dense one, with its weights.

    Raises:
        ValueError: Another layer, or one with a bias.
    """
    if getattr(layer, "bias", None) is not None:
        raise ValueError("a binary layer has no bias; leave layers with one in floating point")
    made: BinaryConv2d | BinaryLinear
    if isinstance(layer, nn.Conv2d):
        made = BinaryConv2d(**sizes_of(layer), frequency=frequency, generator=generator)
    elif isinstance(layer, nn.Linear):
        made = BinaryLinear(layer.in_features, layer.out_features, frequency, generator)
    else:
        raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")
    made.to(layer.weight)
    with torch.no_grad():
        made.weight.copy_(layer.weight)
    return made


def pack_bits(weight: Tensor) -> Tensor:
    """Pack the signs of a weight, 8 in a byte, the first in the lowest bit: uint8, (bytes,)."""
    bits = (weight.detach().flatten() >= 0).to(torch.uint8)
    bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    powers = 2 ** torch.arange(8, device=bits.device)
    return (bits * powers).sum(dim=1).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack signs to a float32 weight of ±1."""
    each = torch.stack([(bits // 2**k) % 2 for k in range(8)], dim=1).flatten()
    return (2 * each[: math.prod(shape)].float() - 1).view(shape)


@register_layer
class BinaryWeight(nn.Module):
    """Layer of binary activations and weights, one bit a weight, for inference.

    Args:
        dense: Layer whose shape and signs it has; without bias.

    Example:
        >>> import torch
        >>> from smallfry.layers.biper import BinaryWeight
        >>> small = BinaryWeight.from_dense(torch.nn.Linear(16, 4, bias=False))
        >>> small.bits.dtype, small.bits.numel()
        (torch.uint8, 8)
    """

    name: ClassVar[str] = "binary_weight"
    stage: ClassVar[Stage] = Stage.BITS
    bias: ClassVar[None] = None

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        weight = cast(Tensor, dense.weight)
        self.is_convolution = isinstance(dense, nn.Conv2d)
        vars(self).update(sizes_of(dense))
        self.weight_shape = tuple(weight.shape)
        alpha = torch.ones(len(weight)).to(weight)
        if isinstance(dense, BinaryConv2d | BinaryLinear):
            alpha = dense.alpha.detach().clone()
            weight = (dense.frequency * weight.detach()).sin()
        self.bits = nn.Parameter(pack_bits(weight), requires_grad=False)
        self.alpha = nn.Parameter(alpha)

    @classmethod
    def like(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the structure; raises as ``from_dense``."""
        return cls.from_dense(layer, **settings)

    @classmethod
    def from_dense(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Take the signs of a layer, which is often one in training, with its α.

        Args:
            layer: ``nn.Linear`` or ``nn.Conv2d``.
            settings: None.

        Raises:
            ValueError: Another layer, one with a bias, or any setting.
        """
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")
        if settings or layer.bias is not None:
            raise ValueError("a binary weight has no settings, and its layer no bias")
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise ValueError("non-zero padding modes are not supported")
        return cls(layer)

    @property
    def codes(self) -> Tensor:
        """Signs of the weight in floating point."""
        return unpack_bits(self.bits, self.weight_shape).to(self.alpha)

    @property
    def weight(self) -> Tensor:
        """Signs times α."""
        return self.codes * self.alpha.view(-1, *[1] * (len(self.weight_shape) - 1))

    def integers(self, inputs: Tensor) -> Tensor:
        """Compute the outputs before α, whole numbers."""
        binary, weight = signs(inputs), self.codes.to(inputs.dtype)
        if not self.is_convolution:
            return F.linear(binary, weight)
        how: dict[str, Any] = {name: getattr(self, name) for name in APPLIED}
        return F.conv2d(binary, weight, None, **how)

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs as the layer in training does in its second stage."""
        outputs = self.integers(input)
        return outputs * (self.alpha[:, None, None] if self.is_convolution else self.alpha)

    def dense(self) -> nn.Module:
        """Convert to a layer of the same product; its inputs must be signs."""
        return to_dense(self)
