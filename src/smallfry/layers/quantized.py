"""Quantised layers: weights as integer codes with scales, and inputs rounded at each call.

Weights are symmetric, w ≈ s q, with one scale per output channel, or per group of consecutive
inputs of a channel. Inputs stay in floating point, or are affine with a scale and a zero point for
each *call* of the layer within one pass of the model, as the rows of a recursion move from call to
call; calls beyond the known ones use the last. The product is taken in floating point: what an
integer runtime computes, but for the last bits (``smallfry.compress.quantize.integer``).
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from smallfry.io.json import Plain
from smallfry.layers.linear_map import APPLIED, register_layer, sizes_of, to_dense
from smallfry.layers.onnx_codes import dequantized, emits_codes, rounded
from smallfry.layers.quantizers import (
    BITS,
    encode,
    grouped,
    largest_code,
    round_affine,
    spread,
    symmetric_scale,
)
from smallfry.order import Stage

__all__ = ["BITS", "CallReset", "QuantizedWeight", "number_calls", "quantize"]

MOST_CALLS = 10_000  # of one layer in a pass
SETTINGS = {"bits", "group", "input_bits", "calls", "bias"}


def quantize(
    weight: Tensor, bits: int, group: int | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise a weight to codes and scales.

    Args:
        weight: (outputs, …).
        bits: 2 to 8.
        group: Consecutive inputs with a scale of their own; None for one scale per output.
        scales: (outputs, groups) instead of the min-max ones.

    Returns:
        Codes, int8 in the weight's shape; scales in float32, (outputs, 1, …), or (outputs, groups).
    """
    flat, most = weight.detach().double().flatten(1), largest_code(bits)
    rows = grouped(flat, group)
    found = (symmetric_scale(rows, bits).squeeze(-1) if scales is None else scales).float()
    codes = encode(rows, found.double()[..., None], 0, -most, most).to(torch.int8)
    codes = codes.flatten(1)[:, : flat.shape[1]].view(weight.shape)
    return codes, found if group is not None else spread(found, weight.shape, None)


@register_layer
class QuantizedWeight(nn.Module):
    """Linear layer or convolution with 2- to 8-bit weights, and optionally 2- to 8-bit inputs.

    Args:
        dense: The layer whose shape, stride and so on it has.
        bits: Bits per weight.
        group: Consecutive inputs of a row with a scale of their own; None for one per row.
        input_bits: Bits of the inputs; None for floating point.
        calls: Calls in one pass of the model with input ranges of their own.
        bias: True adds a bias where the layer has none.

    Attributes:
        called: Calls since the last ``CallReset``.

    Example:
        >>> import torch
        >>> from smallfry.layers.quantized import QuantizedWeight
        >>> small = QuantizedWeight.from_dense(torch.nn.Linear(8, 4), bits=4)
        >>> small.codes.dtype, int(small.codes.abs().max())
        (torch.int8, 7)
    """

    name: ClassVar[str] = "quantized_weight"
    stage: ClassVar[Stage] = Stage.BITS
    input_scales: Tensor
    input_zeros: Tensor

    def __init__(
        self,
        dense: nn.Module,
        bits: int,
        group: int | None = None,
        input_bits: int | None = None,
        calls: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        weight = cast(Tensor, dense.weight)
        self.bits, self.group, self.input_bits, self.calls = bits, group, input_bits, calls
        self.called = 0
        vars(self).update(sizes_of(dense))
        self.is_convolution = isinstance(dense, nn.Conv2d)
        # of both sides of each dimension, as PyTorch computes them for every kind of padding
        self.sides = tuple(getattr(dense, "_reversed_padding_repeated_twice", ()))
        codes, scales = quantize(weight, bits, group)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.to(weight.device), requires_grad=False)
        own: Tensor | None = cast(Any, dense.bias)
        if own is None and bias:
            own = weight.new_zeros(len(weight))
        self.bias = None if own is None else nn.Parameter(own.detach().clone())
        if input_bits is not None:
            ones = torch.ones(calls, device=weight.device)
            self.register_buffer("input_scales", ones)
            self.register_buffer("input_zeros", (ones * 2 ** (input_bits - 1)).to(torch.uint8))

    @classmethod
    def like(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the structure; raises as ``from_dense``."""
        return cls.from_dense(layer, **settings)

    @classmethod
    def from_dense(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Round a layer's weight; the inputs' ranges are set afterwards.

        Args:
            layer: ``nn.Linear`` or ``nn.Conv2d``.
            settings: ``bits``, 2 to 8; and optionally ``group``, ``input_bits``, ``calls`` and
                ``bias``, as of the class.

        Raises:
            ValueError: Another layer, or other settings.
        """
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")
        if not set(settings) <= SETTINGS or not _is_count(settings.get("bits"), BITS):
            raise ValueError(
                "a quantized weight needs bits from 2 to 8, and may have group, input_bits, "
                f"calls and bias; got {settings}"
            )
        limits = {"group": range(1, 2**20), "input_bits": BITS, "calls": range(1, MOST_CALLS + 1)}
        for name, allowed in limits.items():
            value = settings.get(name)
            if value is not None and not _is_count(value, allowed):
                raise ValueError(f"{name} is {allowed[0]} to {allowed[-1]}, got {value!r}")
        if not isinstance(settings.get("bias", False), bool):
            raise ValueError(f"bias is true or false, got {settings['bias']!r}")
        given: Any = {k: v for k, v in settings.items() if v is not None}
        return cls(layer, **given)

    @property
    def weight(self) -> Tensor:
        """Weight in floating point."""
        scales: Tensor = self.scales
        if self.group is not None:
            scales = spread(scales, self.codes.shape, self.group)
        return self.codes.to(scales.dtype) * scales

    def dense(self) -> nn.Module:
        """Convert to a layer with the floating-point weight and inputs."""
        return to_dense(self)

    def round_inputs(self, inputs: Tensor) -> Tensor:
        """Round the inputs of the next call, and count it; floating-point inputs pass unchanged."""
        call = min(self.called, self.calls - 1)
        self.called += 1
        if self.input_bits is None:
            return inputs
        scale, zero = self.input_scales[call], self.input_zeros[call]
        if emits_codes():
            return rounded(inputs, scale, zero, self.input_bits)
        return round_affine(inputs, scale.to(inputs.dtype), zero.to(inputs.dtype), self.input_bits)

    def forward(self, input: Tensor) -> Tensor:
        """Map the inputs of the dense layer to its outputs."""
        rows = self.round_inputs(input)
        if emits_codes():
            weight = dequantized(self.codes, self.scales, self.group)
        else:
            weight = self.weight.to(input.dtype)
        if not self.is_convolution:
            return F.linear(rows, weight, self.bias)
        how: dict[str, Any] = {n: getattr(self, n) for n in APPLIED}
        if self.padding_mode != "zeros":
            rows = F.pad(rows, self.sides, mode=cast(str, self.padding_mode))
            how["padding"] = 0
        return F.conv2d(rows, weight, self.bias, **how)


class CallReset:
    """Hook that begins the count of the layers' calls in a pass of the model.

    Args:
        layers: Layers with an attribute ``called``.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers: list[Any] = list(layers)

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Set the counts to zero."""
        for layer in self._layers:
            layer.called = 0


def number_calls(model: nn.Module, first: str | None = None) -> list[RemovableHandle]:
    """Count the calls of layers from the start of each pass of a model.

    Args:
        model: Changed in place.
        first: A layer that every pass calls exactly once, before those that are called more than
            once: a recursion may start without a call of the model itself.

    Returns:
        Handles of the hooks.

    Raises:
        ValueError: The model has no such layer.
    """
    layers = [m for m in model.modules() if getattr(m, "calls", 1) > 1 and hasattr(m, "called")]
    if not layers:
        return []
    modules = dict(model.named_modules())
    if first is not None and first not in modules:
        raise ValueError(f"the model has no layer '{first}'")
    reset = CallReset(layers)
    begun = [model, modules[first]] if first else [model]
    return [module.register_forward_pre_hook(reset) for module in begun]


def _is_count(value: Any, allowed: range) -> bool:
    return type(value) is int and value in allowed
