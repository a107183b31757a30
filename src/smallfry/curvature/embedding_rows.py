"""Rows of embeddings: one-hot inputs as indices, and weights tied to linear layers.

An embedding is called with numbers, whose last dimension is made one of size 1 when they are
noted, so that samples are found in them as in the inputs of linear layers. Numbers below 0 stand
for inputs of zeros: padding, whose gradient PyTorch leaves out.

Some embeddings are called once for all samples, as those of positions are. The gradient at their
output is a sum over samples, W = Σ W_n. The W_n of sampled targets are independent with mean zero,
so that E[W Wᵀ] = Σ E[W_n W_nᵀ]: such rows are given to the first sample, and are right on average.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.curvature.identity import padded
from smallfry.curvature.layers import canonical_inputs


def one_hot(numbers: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Encode indices as one-hot vectors (…, size), zero for negative ones."""
    return F.one_hot(numbers.long() + 1, size + 1)[..., 1:].to(dtype)


def padding_of(module: nn.Module) -> int | None:
    """Return the index of the padding row, which gets no gradient; None without one."""
    return module.padding_idx if isinstance(module, nn.Embedding) else None


def numbers_of(
    module: nn.Module, inputs: Tensor, samples: int, place: str, kept: Tensor | None = None
) -> Tensor:
    """Return the indices that an embedding was called with, (1, samples, uses, 1).

    Args:
        module: The embedding.
        inputs: Numbers, with a last dimension of size 1.
        samples: That the network saw.
        place: Dimension of the samples: "first", "second", "none", or "together" for rows that all
            samples use.
        kept: Index of the uses wanted; None for all.
    """
    padding = padding_of(module)
    numbers = inputs if padding is None else inputs.masked_fill(inputs == padding, -1)
    if place == "together":
        rows = numbers.new_full((1, samples, numbers.numel(), 1), -1)
        rows[0, 0] = numbers.reshape(-1, 1)
    else:
        if place == "none":
            numbers = padded(module, numbers + 1, samples) - 1
        elif place == "second":
            numbers = numbers.transpose(0, 1)
        rows = canonical_inputs(module, numbers, numbers, samples)
    return rows if kept is None else rows.index_select(2, kept)


def given_to_first(gradient: Tensor, samples: int) -> Tensor:
    """Assign the rows of a gradient to the first sample, (1, samples, uses, features)."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    found = rows.new_zeros(1, samples, *rows.shape)
    found[0, 0] = rows
    return found


def is_tied(call: Any) -> bool:
    """Return whether an embedding's call is in a block of a linear layer with the same weight."""
    return isinstance(call.block.layers[call.layer], nn.Embedding) and not call.block.one_hot


def levelled(
    tied: Sequence[bool], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Rescale the δ of a tied embedding to match the linear layer's inputs, and its one-hots back.

    The gradient of a tied weight is Σ g hᵀ of the linear layer and Σ e δᵀ of the embedding, δ the
    gradient at its output. Products stay as they are. Where KFAC takes all uses for alike, A ⊗ G
    with A their mean and G their sum, it has F's own trace with that: as if uses, and their inputs
    and gradients, were independent.

    Args:
        tied: For each call, True if it is the embedding's.
        inputs: Inputs of each call, (1, samples, uses, inputs).
        gradients: Gradients of each call, (1, draws, samples, uses, outputs).
    """
    means = []
    for which in (True, False):
        own = [a for a, t in zip(inputs, tied, strict=True) if t == which]
        count = sum(a.shape[2] for a in own)
        means.append(sum(float((a.double() ** 2).sum()) for a in own) / max(count, 1))
    scale = (means[1] / means[0]) ** 0.5 if min(means) > 0 else 1.0
    return (
        [a * scale if t else a for a, t in zip(inputs, tied, strict=True)],
        [g / scale if t else g for g, t in zip(gradients, tied, strict=True)],
    )
