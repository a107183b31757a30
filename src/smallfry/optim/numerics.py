"""Precision of statistics, and finiteness of many tensors at once."""

from collections.abc import Iterable

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of statistics of parameters of a precision: float32 at least."""
    return dtype if dtype == torch.float64 else torch.float32


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite."""
    found = list(tensors)
    if not found:
        return True
    norms = torch._foreach_norm(found)
    return bool(torch.stack([n.float() for n in norms]).isfinite().all())
