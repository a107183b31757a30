"""A linear layer that multiplies float32 matrices on a CPU with oneDNN.

PyTorch takes MKL for them, which on processors that are not Intel's leaves half of the arithmetic
unused (``benchmarks/vitrm.py`` measures both). oneDNN comes with PyTorch, which has it multiply
bfloat16 and convolve; nothing public has it multiply float32.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

__all__ = ["Linear"]

_BACKENDS: Any = torch.backends  # without types
_JIT: Any = torch.jit
_MULTIPLY: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = (
    _MULTIPLY is not None and _BACKENDS.mkldnn.is_available() and _BACKENDS.mkl.is_available()
)


class Linear(nn.Linear):
    """``nn.Linear``, faster in float32 on a CPU; parameters, gradients and values are the same."""

    acts_as = nn.Linear  # so that curvature is taken of it as of any linear layer

    def forward(self, input: Tensor) -> Tensor:
        """Features (..., in_features) to (..., out_features)."""
        if _takes(input, self.weight):
            return cast(Tensor, _Product.apply(input, self.weight, self.bias))
        return F.linear(input, self.weight, self.bias)


def _takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is there for this product, and nothing is that wants to see ``F.linear``."""
    return bool(
        _HAS_ONEDNN
        and _BACKENDS.mkldnn.enabled
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.ndim > 1
        and rows.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not _JIT.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Product(torch.autograd.Function):
    """rows @ weightᵀ + bias; backward and forward mode are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        ctx.save_for_backward(rows, weight)
        ctx.save_for_forward(rows, weight)
        return _MULTIPLY(rows, weight, bias, "none", [], "")

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


if _HAS_ONEDNN:

    @register_flop_formula(_MULTIPLY)
    def _flops(rows: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * weight[0]
