"""Evaluation mode for a while, with the mode of every module restored."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and each of its modules back to its own mode at the end.

    A frozen batch norm is in evaluation mode while the model around it trains, which
    ``model.train()`` would undo.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
