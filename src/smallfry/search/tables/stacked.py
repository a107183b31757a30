"""Many small networks as one network with groups.

A layer's weights lie behind each other along its first dimension, images along the channels
(batch, networks · channels, height, width); the summed loss gives each network its own gradient. On
a CPU, two dozen small networks take about as long together as two of them one after the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.search.tables.digits import Split

__all__ = [
    "Results",
    "StackedLinear",
    "correct_and_nll",
    "evaluate",
    "repeat_channels",
    "results_of",
    "stack",
]


class Results(NamedTuple):
    """Results of several networks."""

    correct: NDArray[np.uint16]  # validation images by moment and network
    nll: NDArray[np.float16]  # mean negative log-likelihood of these, by moment and network
    test_correct: NDArray[np.uint16]  # test images, after all epochs


class StackedLinear(nn.Module):
    """Linear layers side by side: (batch, networks · inputs) → (networks, batch, outputs).

    Args:
        layers: The layers that the networks start with; narrow ones get zeros.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(_padded([each.weight for each in layers]))  # (n, out, in)
        self.bias = nn.Parameter(_padded([each.bias for each in layers]))  # (n, out)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute the logits of each network, (networks, batch, classes)."""
        rows = inputs.reshape(len(inputs), len(self.weight), -1).transpose(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.transpose(1, 2))


def stack(models: Sequence[nn.Sequential]) -> nn.Sequential:
    """Stack networks of the same layers, whose numbers of channels may differ.

    Channels that a narrow network lacks have zero weights. Behind a batch norm and ReLU they stay
    0, and so do their gradients: the network computes and learns as it would alone.

    Args:
        models: Convolutions without biases, each followed by a batch norm and ReLU or by another
            convolution; a linear layer at the end. Other layers have no weights.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 3))
        >>> stack([model] * 5)(torch.zeros(7, 5, 4, 4)).shape
        torch.Size([5, 7, 3])
    """
    return nn.Sequential(*map(_stack_layers, zip(*models, strict=True)))


def _stack_layers(layers: Sequence[Any]) -> nn.Module:
    first, count = layers[0], len(layers)
    if isinstance(first, nn.Conv2d):
        weights = _padded([each.weight for each in layers])  # (networks, outputs, inputs, …)
        groups = count * max(each.groups for each in layers)
        made = nn.Conv2d(
            groups * weights.shape[2],
            count * weights.shape[1],
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            groups=groups,
            bias=False,
        )
        made.weight = nn.Parameter(weights.flatten(0, 1))
        return made
    if isinstance(first, nn.BatchNorm2d):
        channels = count * max(each.num_features for each in layers)
        return nn.BatchNorm2d(channels, dtype=first.weight.dtype)
    return StackedLinear(layers) if isinstance(first, nn.Linear) else first


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors, with zeros behind the entries of the smaller ones."""
    shape = [max(sizes) for sizes in zip(*(each.shape for each in tensors), strict=True)]
    found = tensors[0].new_zeros(len(tensors), *shape)
    for part, tensor in zip(found, tensors, strict=True):
        part[tuple(map(slice, tensor.shape))] = tensor.detach()
    return found


@torch.no_grad()
def evaluate(model: nn.Sequential, split: Split, networks: int) -> tuple[Tensor, Tensor]:
    """Evaluate stacked networks on the same images, as ``correct_and_nll``."""
    model.eval()
    return correct_and_nll(model(repeat_channels(split.images, networks)), split.labels)


def repeat_channels(images: Tensor, networks: int) -> Tensor:
    """Give each network the same images, (batch, 1, …) → (batch, networks, …)."""
    return images.expand(-1, networks, *images.shape[2:])


def correct_and_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Count the right answers of each network, and average their negative log-likelihoods.

    Args:
        logits: (networks, images, classes); a network that diverged has class 0 for all.
        labels: (images,).
    """
    finite = logits.isfinite().all(2, keepdim=True)
    logits = torch.where(finite, logits, torch.zeros((), dtype=logits.dtype))
    right = (logits.argmax(2) == labels).sum(1)
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels.expand(len(logits), -1), reduction="none"
    )
    return right, losses.mean(1)


def results_of(validation: Sequence[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor]) -> Results:
    """Collect evaluations, those on validation images by moment."""
    correct, losses = (torch.stack(each).numpy() for each in zip(*validation, strict=True))
    return Results(
        correct.astype(np.uint16), losses.astype(np.float16), test[0].numpy().astype(np.uint16)
    )
