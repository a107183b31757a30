"""Precision of statistics, and finiteness of many tensors at once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from smallfry._torch import foreach_norm


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of statistics for parameters: float32 or higher."""
    return dtype if dtype == torch.float64 else torch.float32


def finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all tensors are finite."""
    found = list(tensors)
    if not found:
        return True
    norms = foreach_norm(found)
    return bool(torch.stack([n.float() for n in norms]).isfinite().all())
