"""Assignment of the rows of a layer's input to samples.

Samples are expected in the first dimension of what a layer is called with, as they are or in whole
multiples, or in the second behind a sequence. Rows that are routed, as to the experts of a mixture,
belong to no sample by their place; they are padded with rows of zeros that count nowhere.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry._torch import BatchNorm
from smallfry.curvature.layers import is_linear


def belongs(module: nn.Module, shape: Sequence[int], samples: int) -> bool:
    """Return whether a layer's input of this shape has a dimension of samples."""
    if not is_linear(module):
        spatial = 1 if isinstance(module, nn.Conv1d) else 2
        return (shape[0] if len(shape) == spatial + 2 else 1) % samples == 0
    lead = shape[:-1] or (1,)
    return lead[0] % samples == 0 or (len(lead) > 1 and lead[1] == samples)


def samples_of(
    layers: Sequence[tuple[nn.Module, Sequence[int]]], size: int, arguments: Iterable[Any]
) -> int:
    """Infer the number of samples in a network's batch.

    That is the first dimension of its output; where layers don't have it, but have that of the
    network's input, and this divides the former, samples and tokens have been put together.

    Args:
        layers: The modules called, and the shapes of their inputs.
        size: First dimension of the network's output.
        arguments: Arguments of the network's call, in whatever containers they come.
    """

    def fitting(samples: int) -> int:
        return sum(belongs(module, shape, samples) for module, shape in layers)

    best, most = size, fitting(size)
    if most == len(layers):
        return size
    for argument in arguments:
        for samples in argument.shape[:2] if isinstance(argument, Tensor) else ():
            if 0 < samples < size and size % samples == 0 and fitting(samples) > most:
                best, most = int(samples), fitting(samples)
    return best


def padded(module: nn.Module, tensor: Tensor, samples: int) -> Tensor:
    """Reshape a layer's input or output to rows that divide evenly among samples, zero-padded.

    Args:
        module: The layer.
        tensor: (…, features) of a linear layer, else (batch, channels, …).
        samples: Number of samples.
    """
    if is_linear(module):
        tensor = tensor.reshape(-1, tensor.shape[-1])
    elif tensor.ndim == (2 if isinstance(module, nn.Conv1d) else 3):
        tensor = tensor.unsqueeze(0)
    short = -len(tensor) % samples
    return F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, short])


def real_rows(module: nn.Module, shape: torch.Size, samples: int, like: Tensor) -> Tensor:
    """Return 1 for the rows of an output that are not padding, (samples, uses)."""
    if is_linear(module):
        count, positions = shape[:-1].numel(), 1
    else:
        spatial = 1 if isinstance(module, nn.Conv1d) else 2
        count, positions = (shape[0] if len(shape) == spatial + 2 else 1), shape[-spatial:].numel()
    ones = F.pad(like.new_ones(count), [0, -count % samples])
    return ones.reshape(samples, -1).repeat_interleave(positions, 1)


def is_ambiguous(module: nn.Module, shape: Sequence[int], samples: int) -> bool:
    """Return whether the samples may be in either the first or the second dimension of an input."""
    return is_linear(module) and len(shape) > 2 and shape[0] == shape[1] == samples


def own_share(gradients: Tensor, sample: int) -> float | None:
    """Return the share of a sample's gradient that arrives at its own rows.

    Args:
        gradients: In canonical form, (groups, samples, uses, outputs).
        sample: Index of the sample.

    Returns:
        By squares; None where nothing comes back.
    """
    mass = gradients.double().square().sum((0, 2, 3))
    whole = float(mass.sum())
    return float(mass[sample]) / whole if whole > 0 else None


def position_first(tensor: Tensor, samples: int) -> Tensor | None:
    """Reorder a tensor by sample if positions come first in its folded first dimension."""
    if len(tensor) <= samples or len(tensor) % samples:
        return None
    split = tensor.reshape(-1, samples, *tensor.shape[1:])
    return split.transpose(0, 1).flatten(0, 1)


def mixes_samples(model: nn.Module) -> bool:
    """Return whether a batch norm uses batch statistics."""
    return any(isinstance(module, BatchNorm) and module.training for module in model.modules())
