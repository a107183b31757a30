"""Linear layers and convolutions that train with quantised weights and inputs: LSQ.

With a learned step s, and codes from −N to P (Esser et al. 2020, arXiv 1902.08153):

    v = x / s,    x̂ = s round(clamp(v, −N, P))
    ∂x̂/∂x = 1 for −N < v < P, else 0
    ∂x̂/∂s = round(v) − v inside, −N below, P above, times 1 / √(n P)

n is the number of weights, or of a sample's inputs. The parameter is log s: Adam's steps are as
large for every parameter, and would take a small s to 0, where all weights are clipped and nothing
is learned. Weights have N = 2^(b−1), P = 2^(b−1) − 1 and
one step; inputs have a zero point z from calibration, N = z, P = 2^b − 1 − z, and a step for each
call in one pass of the model. Inputs are rounded before hooks see them: natural gradient covers the
layers, with the curvature of what goes into the product.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F

from smallfry.layers.linear_map import sizes_of

SMALLEST_STEP = 1e-8


class _LearnedStep(autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, low: Tensor, high: Tensor, factor: float
    ) -> Any:
        v = values / step
        codes = torch.minimum(torch.maximum(v, low), high).round()
        ctx.save_for_backward(v, codes, low, high)
        ctx.factor = factor
        return codes * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        v, codes, low, high = ctx.saved_tensors
        inside = (v > low) & (v < high)
        by_step = torch.where(inside, codes - v, codes)
        to_step = (gradient * by_step).sum() * ctx.factor
        return gradient * inside, to_step, None, None, None


def learned_round(
    values: Tensor, step: Tensor, low: Tensor | int, high: Tensor | int, count: int
) -> Tensor:
    """Round numbers to multiples of a learned step.

    Args:
        values: Any shape.
        step: Positive, a single number.
        low: Smallest code, −N.
        high: Largest code, P.
        count: Numbers that the step is learned from, n.

    Example:
        >>> import torch
        >>> from smallfry.layers.fake_quant import learned_round
        >>> learned_round(torch.tensor([0.6, 9.0]), torch.tensor(0.5), -2, 1, count=2)
        tensor([0.5000, 0.5000])
    """
    ends = [torch.as_tensor(end, dtype=values.dtype, device=values.device) for end in (low, high)]
    factor = float((count * ends[1].clamp(min=1)) ** -0.5)
    return cast(Tensor, _LearnedStep.apply(values, step.to(values.dtype), *ends, factor))


class FakeQuantized:
    """Common part of layers with learned steps; mixed into a dense layer."""

    unshared: ClassVar[tuple[str, ...]] = ("bias", "input_log_steps")
    weight_log_step: nn.Parameter
    input_log_steps: nn.Parameter
    input_zeros: Tensor
    bits: int
    input_bits: int | None
    calls: int
    called: int

    def take(self, dense: nn.Module, bits: int, input_bits: int | None, calls: int) -> None:
        """Take a dense layer's own parameters, and create steps; the weight's follows from it."""
        own = cast(Any, dense)
        made = cast(Any, self)
        made.weight, made.bias = own.weight, own.bias
        self.bits, self.input_bits, self.calls, self.called = bits, input_bits, calls, 0
        weight = own.weight.detach()
        size = weight.abs().mean()
        if not bool(size > 0):  # as of a new classifier, whose weights would all be clipped
            size = size.new_tensor(weight[0].numel() ** -0.5)
        start = 2 * size / (2 ** (bits - 1) - 1) ** 0.5
        self.weight_log_step = nn.Parameter(start.clamp(min=SMALLEST_STEP).log())
        if input_bits is not None:
            made.register_buffer("input_zeros", weight.new_zeros(calls))
            self.input_log_steps = nn.Parameter(weight.new_zeros(calls))

    @property
    def weight_step(self) -> Tensor:
        """Step of the weight."""
        return self.weight_log_step.exp()

    @property
    def input_steps(self) -> Tensor:
        """Steps of the inputs, (calls,)."""
        return self.input_log_steps.exp()

    @torch.no_grad()
    def set_inputs(self, steps: Tensor, zeros: Tensor) -> None:
        """Set steps and zero points of the inputs, each (calls,)."""
        self.input_log_steps.copy_(steps.log())
        self.input_zeros.copy_(zeros)

    def round_inputs(self, inputs: Tensor) -> Tensor:
        """Round the inputs of the next call, and count it."""
        call = min(self.called, self.calls - 1)
        self.called += 1
        if self.input_bits is None:
            return inputs
        zero = self.input_zeros[call].to(inputs.dtype)
        ends = (-zero, 2**self.input_bits - 1 - zero)
        return learned_round(inputs, self.input_steps[call], *ends, inputs.shape[1:].numel())

    def rounded_weight(self) -> Tensor:
        """Round the weight."""
        half, weight = 2 ** (self.bits - 1), cast(Any, self).weight
        return learned_round(weight, self.weight_step, -half, half - 1, weight.numel())

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Compute the codes of the weight, int8."""
        half, weight = 2 ** (self.bits - 1), cast(Tensor, cast(Any, self).weight)
        return (weight / self.weight_step).clamp(-half, half - 1).round().to(torch.int8)


class FakeQuantLinear(FakeQuantized, nn.Linear):
    """``nn.Linear`` with learned steps of weight and inputs."""

    acts_as = nn.Linear

    def __call__(self, input: Tensor) -> Tensor:
        """Round the inputs, and run the layer with its hooks."""
        return cast(Tensor, nn.Module.__call__(self, self.round_inputs(input)))

    def forward(self, input: Tensor) -> Tensor:
        """Map rounded inputs (..., in_features) to (..., out_features)."""
        return F.linear(input, self.rounded_weight(), self.bias)


class FakeQuantConv2d(FakeQuantized, nn.Conv2d):
    """``nn.Conv2d`` with learned steps of weight and inputs."""

    acts_as = nn.Conv2d

    def __call__(self, input: Tensor) -> Tensor:
        """Round the inputs, and run the layer with its hooks."""
        return cast(Tensor, nn.Module.__call__(self, self.round_inputs(input)))

    def forward(self, input: Tensor) -> Tensor:
        """Map rounded images (batch, in_channels, height, width) to those of the outputs."""
        return cast(Tensor, self._conv_forward(input, self.rounded_weight(), self.bias))


def fake_quantized(
    dense: nn.Module, bits: int, input_bits: int | None = None, calls: int = 1
) -> FakeQuantLinear | FakeQuantConv2d:
    """Create a layer with learned steps that has a dense layer's own parameters.

    Args:
        dense: ``nn.Linear`` or ``nn.Conv2d``.
        bits: Bits of the weight, 2 to 8.
        input_bits: Bits of the inputs; None for floating point.
        calls: Calls in one pass of the model with a step of their own.

    Raises:
        ValueError: Another layer.

    Example:
        >>> import torch
        >>> from smallfry.layers.fake_quant import fake_quantized
        >>> layer = fake_quantized(torch.nn.Linear(8, 4), bits=2)
        >>> len(layer(torch.randn(3, 8)).unique()) <= 12
        True
    """
    layer: FakeQuantLinear | FakeQuantConv2d
    if not isinstance(dense, nn.Linear | nn.Conv2d):
        raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(dense).__name__}")
    made: Any = FakeQuantConv2d if isinstance(dense, nn.Conv2d) else FakeQuantLinear
    layer = made(**sizes_of(dense), bias=dense.bias is not None, device="meta")
    layer.take(dense, bits, input_bits, calls)
    return layer
