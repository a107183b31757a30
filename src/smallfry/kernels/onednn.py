"""Products of float32 matrices on a CPU with oneDNN.

PyTorch takes MKL for them, which on processors that are not Intel's leaves half of the arithmetic
unused (``benchmarks/vitrm.py`` measures both). oneDNN comes with PyTorch, which has it multiply
bfloat16 and convolve; nothing public has it multiply float32.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["multiplies", "multiply"]

_BACKENDS: Any = torch.backends  # without types
_JIT: Any = torch.jit
_MULTIPLY: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = (
    _MULTIPLY is not None and _BACKENDS.mkldnn.is_available() and _BACKENDS.mkl.is_available()
)


def multiplies(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is there for this product, and nothing is that wants to see PyTorch's own."""
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


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (..., inner) @ weightᵀ + bias of a weight (outer, inner), if it ``multiplies`` them.

    Knows no gradients.
    """
    return cast(Tensor, _MULTIPLY(rows, weight, bias, "none", [], ""))


if _HAS_ONEDNN:

    @register_flop_formula(_MULTIPLY)
    def _flops(rows: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * weight[0]
