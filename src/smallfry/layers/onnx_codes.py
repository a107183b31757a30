"""ONNX operators of quantised layers, for a graph that holds their codes.

While ``emitting_codes`` is on, quantised layers trace to ``DequantizeLinear`` of their codes and,
if their inputs are quantised, ``QuantizeLinear`` with the scale of the call. Only ONNX reads such a
trace.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

OPSET = 23
_emitting: ContextVar[bool] = ContextVar("emitting", default=False)


@contextmanager
def emitting_codes() -> Iterator[None]:
    """Trace quantised layers to operators on their codes."""
    token = _emitting.set(True)
    try:
        yield
    finally:
        _emitting.reset(token)


def emits_codes() -> bool:
    """Return whether ``emitting_codes`` is on."""
    return _emitting.get()


def dequantized(codes: Tensor, scales: Tensor, group: int | None) -> Tensor:
    """Emit the weight of codes.

    Args:
        codes: int8, (outputs, …).
        scales: (outputs, 1, …), or (outputs, groups).
        group: Consecutive inputs with a scale of their own; None for one scale per output.
    """
    if group is None:
        return _emit("DequantizeLinear", (codes, scales.flatten()), codes, scales.dtype, axis=0)
    flat = codes.flatten(1)
    block = _emit("DequantizeLinear", (flat, scales), flat, scales.dtype, axis=1, block_size=group)
    return block.view(codes.shape)


def rounded(inputs: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Emit the rounding of inputs by an affine quantiser of up to 8 bits."""
    if bits < 8:  # the operator saturates at eight
        middle = zero.to(scale.dtype)
        inputs = inputs.clamp(-middle * scale, (2**bits - 1 - middle) * scale)
    ends = (scale, zero)
    codes = _emit("QuantizeLinear", (inputs, *ends), inputs, torch.uint8)
    return _emit("DequantizeLinear", (codes, *ends), inputs, inputs.dtype)


def _emit(
    operator: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: Any
) -> Tensor:
    return torch.onnx.ops.symbolic(
        operator, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET
    )
