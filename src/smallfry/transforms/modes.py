"""Evaluation mode for a while, with the mode of every module restored."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and each of its modules back to its own mode at the end.

    A frozen batch norm is in evaluation mode while the model around it trains, which
    ``model.train()`` would undo. Modules that were added meanwhile get the model's own mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in {**modes, **dict.fromkeys(model.modules())}:
            module.training = modes.get(module, modes[model])
