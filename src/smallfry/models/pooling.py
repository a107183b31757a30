"""Largest value of each channel, with a gradient that torch.compile keeps finite."""

import torch
from torch import Tensor

__all__ = ["largest"]


def largest(values: Tensor, dims: tuple[int, ...] = (2, 3)) -> Tensor:
    """Compute the maximum over the last dimensions.

    The gradient of ``amax`` is divided by the number of places that equal the maximum. In bfloat16,
    compiled for a CPU (PyTorch 2.15), they are recomputed without rounding, so that none is equal
    and the gradient is 0 / 0. Compiled code therefore takes ``max``, whose gradient goes to one
    place by its index.

    Args:
        values: Tensor of any shape.
        dims: Its last dimensions, in order; default those of features (batch, channels, height,
            width).

    Returns:
        Tensor of the dimensions before.

    Example:
        >>> import torch
        >>> from smallfry.models.pooling import largest
        >>> largest(torch.arange(8.0).reshape(1, 2, 2, 2))
        tensor([[3., 7.]])
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return values.flatten(dims[0]).max(dim=dims[0]).values
    return values.amax(dim=dims)
