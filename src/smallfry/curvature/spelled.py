"""Modules with several weights in one function, decomposed into layer calls.

While curvature is taken, the forward of such a host is spelled out: it calls a linear layer for
each of its weights, and what lies between is what PyTorch's own function computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


class Part(nn.Linear):
    """Linear layer over parameters of another module.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,), or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)


@dataclass(frozen=True, eq=False)
class Host:
    """Module with its layers and a decomposed forward.

    Args:
        module: The module.
        parts: The layers that it doesn't have as modules of its own, by name.
        forward: Computes what the module does, and calls all its layers.
    """

    module: nn.Module
    parts: dict[str, Part]
    forward: Callable[..., Any]

    def spell_out(self) -> None:
        """Replace the module's forward by the decomposed one."""
        self.module.forward = self.forward

    def restore(self) -> None:
        """Restore the module's own forward, if it was replaced."""
        self.module.__dict__.pop("forward", None)
