"""Masks of weights while a model trains: the common part of sparse methods.

A mask has a weight's shape and is true where the weight may be other than zero. Gradients of masked
weights are zeroed before a step, and the weights after it, so any optimizer works; weight decay
meets zeros there. At the end the zeros are in the weights, which stay dense tensors. Biases, norms,
embeddings, the first layer and the classifier are not masked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smallfry.compress.select import chosen, dense_layers
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting


class LayerChoice(Protocol):
    """Choice of layers."""

    @property
    def include(self) -> tuple[str, ...]:
        """Patterns of layer names."""

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns of layers that stay dense."""

    @property
    def ends(self) -> bool:
        """Mask the first layer and the classifier too."""


def require_share(name: str, **shares: float) -> None:
    """Validate shares in [0, 1).

    Raises:
        UsageError: One is outside.
    """
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise UsageError(f"{name}.{key} must be in [0, 1), not {value}")


class MaskedMethod(Method):
    """Running method with a mask for the weight of each chosen layer.

    Attributes:
        weights: Parameters by name, each once.
        masks: Their masks by the same names; a weight without one is dense.
    """

    def __init__(self, choice: LayerChoice) -> None:
        self._choice = choice
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}

    def begin(self, model: nn.Module, setting: Setting) -> None:
        """Choose the weights."""
        self.weights = maskable(model, self._choice)
        self.masks = {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Zero the gradients of masked weights."""
        for name, mask in self.masks.items():
            gradient = self.weights[name].grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Zero masked weights."""
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Zero masked weights."""
        for name, mask in self.masks.items():
            self.weights[name].masked_fill_(~mask, 0)

    def forget(self, optimizer: torch.optim.Optimizer, name: str, where: Tensor) -> None:
        """Zero an optimizer's moments of some entries of a weight.

        Args:
            optimizer: The optimizer.
            name: Of the weight.
            where: Entries, bool, of its shape.
        """
        weight = self.weights[name]
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(where, 0)

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Zero the masked weights of the final model, which an average of weights need not be."""
        parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": dict(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the masks.

        Raises:
            ValueError: A mask of a weight that isn't there, or of another shape.
        """
        for name, mask in state["masks"].items():
            if name not in self.weights or self.weights[name].shape != mask.shape:
                raise ValueError(f"the model has no weight '{name}' of {tuple(mask.shape)}")
        self.masks = {n: mask.to(self.weights[n].device) for n, mask in state["masks"].items()}


def maskable(model: nn.Module, choice: LayerChoice) -> dict[str, nn.Parameter]:
    """Return the weights of chosen linear layers and convolutions by name, each once.

    A weight that a layer outside the choice shares, such as an embedding or the first layer, is
    left out.

    Raises:
        UsageError: None is chosen, or all are shared with layers that stay dense.
    """
    names = dense_layers(model)
    if not choice.ends:
        classifier = getattr(model, "get_classifier", lambda: None)()
        ends = list(classifier) if isinstance(classifier, tuple | list) else [classifier]
        inner = [n for n in names[1:] if all(model.get_submodule(n) is not e for e in ends)]
        names = inner if any(isinstance(end, nn.Module) for end in ends) else inner[:-1]
    inside = {id(model.get_submodule(name)) for name in names}
    outside = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    names = chosen(names, choice.include, choice.exclude, "linear layer or convolution")
    weights = [model.get_submodule(name).weight for name in names]
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        first[id(weight)]: weight
        for weight in weights
        if isinstance(weight, nn.Parameter) and id(weight) not in outside
    }
    if not found:
        raise UsageError(
            f"the weights of {', '.join(names[:3])} are also those of layers that stay dense"
        )
    return found


def largest(scores: Sequence[Tensor], keep: int, one_a_row: bool = False) -> list[Tensor]:
    """Mark the largest entries of several tensors together.

    Args:
        scores: Of any shapes.
        keep: Entries to mark in all; exactly so many are, or one a row where that is more.
        one_a_row: Mark the largest entry of each row (of the first dimension) before others.

    Returns:
        Masks of the same shapes.
    """
    flat = torch.cat([each.detach().flatten().double() for each in scores])
    forced = torch.zeros_like(flat, dtype=torch.bool)
    if one_a_row:
        offset = 0
        for each in scores:
            rows = each.detach().flatten(1)
            starts = torch.arange(len(rows), device=flat.device) * rows.shape[1]
            forced[offset + starts + rows.argmax(1)] = True
            offset += each.numel()
    order = flat.masked_fill(forced, torch.inf).sort(descending=True, stable=True).indices
    mask = torch.zeros_like(forced)
    mask[order[: max(keep, int(forced.sum()))]] = True
    parts = torch.split(mask, [each.numel() for each in scores])
    return [part.view_as(each) for part, each in zip(parts, scores, strict=True)]
