"""Compiled training steps, and the errors of torch.compile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smallfry.errors import UsageError


class Compiled(nn.Module):
    """Wrapper of a compiled module, for hooks outside the compiled code."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.compiled = torch.compile(module, dynamic=True)  # one graph for all batch sizes

    def forward(self, *arguments: Any) -> Any:
        """Run the compiled module."""
        return self.compiled(*arguments)


@contextmanager
def compiling() -> Iterator[None]:
    """Translate an error of torch.compile."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"torch.compile can't compile the training step ({reason}); train with compile false"
        ) from error
