"""Linear layer that uses oneDNN for float32 products on a CPU where that is faster."""

from typing import Any, cast

from torch import Tensor, autograd, nn
from torch.nn import functional as F

from smallfry.kernels.onednn import multiplies, multiply

__all__ = ["Linear"]


class Linear(nn.Linear):
    """``nn.Linear``, faster in float32 on some CPUs; values are the same within rounding."""

    acts_as = nn.Linear  # so that curvature is taken of it as of any linear layer

    def forward(self, input: Tensor) -> Tensor:
        """Map features (..., in_features) to (..., out_features)."""
        if multiplies(input, self.weight, self.bias):
            return cast(Tensor, _Product.apply(input, self.weight, self.bias))
        return F.linear(input, self.weight, self.bias)


class _Product(autograd.Function):
    """Product rows @ weightᵀ + bias; backward and forward mode use products of the same kind."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        ctx.save_for_backward(rows, weight)
        ctx.save_for_forward(rows, weight)
        return multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        flat, apply = gradient.flatten(0, -2), cast(Any, _Product.apply)
        return (
            apply(gradient, weight.t(), None) if needed[0] else None,
            apply(flat.t(), rows.flatten(0, -2).t(), None) if needed[1] else None,
            flat.sum(0) if needed[2] else None,
        )

    @staticmethod
    def jvp(ctx: Any, rows_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Any:
        rows, weight = ctx.saved_tensors
        tangent = rows.new_zeros(*rows.shape[:-1], weight.shape[0])
        if rows_t is not None:
            tangent = tangent + F.linear(rows_t, weight)
        if weight_t is not None:
            tangent = tangent + F.linear(rows, weight_t)
        return tangent if bias_t is None else tangent + bias_t
