"""Normalisations of PyTorch, timm and other libraries."""

from torch import nn

from smallfry._torch import BatchNorm

__all__ = ["is_norm"]

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, BatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation.

    Those of other libraries, such as timm's ``RmsNorm``, have it in the name of their class, and
    parameters of their own.

    Example:
        >>> from timm.layers import RmsNorm
        >>> is_norm(RmsNorm(4)), is_norm(nn.Linear(4, 4))
        (True, False)
    """
    if isinstance(module, NORMS):
        return True
    own = next(module.parameters(recurse=False), None)
    return own is not None and "norm" in type(module).__name__.lower()
