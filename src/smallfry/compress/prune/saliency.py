"""Saliency of channels from their weights and the direction of an optimizer step (HESSO).

Of a channel with the values x and the direction d (what a step of rate 1 would subtract), the five
scores are ‖x‖, ‖x‖/n, 1 ± cos(x, d), |⟨x, d⟩| and ½⟨x, d⟩². Each is divided by its norm over all
channels of all groups, and their weighted sum is the saliency: the lowest are redundant
(Chen et al., arXiv 2409.09085; constants after the authors' only_train_once, MIT).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smallfry.optim import AdamATan2, NaturalGradient
from smallfry.transforms.groups import ChannelGroup, Slice

SCORES = ("magnitude", "mean_magnitude", "cosine", "taylor", "squared_taylor")
EQUAL = (0.2,) * len(SCORES)  # the authors' weights
TAYLOR = (0.0, 0.0, 0.0, 1.0, 0.0)
TINY = 1e-8

# optimizers whose weight decay is part of the gradient, unless their group sets otherwise
COUPLED = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam),
    *(torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta),
)


def channel_vectors(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Collect the values of each channel's zeroed entries, (channels, values) in float64."""
    return torch.cat([_rows(each, tensors[each.tensor]) for each in group.zeroed], dim=1)


def channel_scores(x: Tensor, d: Tensor, cosine_sign: int) -> Tensor:
    """Compute the five scores of channels, (5, channels), unnormalised.

    Args:
        x: Values, (channels, values).
        d: Directions of the same shape.
        cosine_sign: 1 makes channels large that a step moves towards zero, as the authors' code
            does; −1 makes them small.
    """
    norm, inner = x.norm(dim=1), (x * d).sum(1)
    cosine = inner / ((norm + TINY) * (d.norm(dim=1) + TINY))
    return torch.stack(
        [
            norm,
            norm / (x.shape[1] + 1e-6),
            cosine_sign * cosine + 1,
            inner.abs(),
            inner.square() / 2,
        ]
    )


def saliencies(
    groups: Sequence[ChannelGroup],
    before: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    weights: Sequence[float],
    cosine_sign: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Score channels, normalise the scores over all groups and sum them.

    Args:
        groups: The groups.
        before: Parameters before the step, by name.
        moved: Directions of the step, see ``directions``.
        weights: Of the five scores.
        cosine_sign: See ``channel_scores``.

    Returns:
        The saliencies (channels,) of each group, and the weighted scores (5, channels) that they
        are sums of.
    """
    scores = [
        channel_scores(channel_vectors(group, before), channel_vectors(group, moved), cosine_sign)
        for group in groups
    ]
    norms = (TINY + torch.cat(scores, dim=1).square().sum(1)).sqrt() + TINY
    factors = torch.tensor(weights, dtype=norms.dtype) / norms
    weighted = [factors[:, None] * each for each in scores]
    return [each.sum(0) for each in weighted], weighted


def scale_channels(
    group: ChannelGroup, tensors: Mapping[str, Tensor], channels: Sequence[int], factor: float
) -> None:
    """Multiply the zeroed entries of channels by a factor, in place."""
    if not len(channels):
        return
    chosen = torch.as_tensor(list(channels))
    for each in group.zeroed:
        tensor = tensors[each.tensor].detach()
        entries = each.entries[chosen].flatten().to(tensor.device)
        if factor == 0:
            tensor.index_fill_(each.dim, entries, 0)
        else:
            part = tensor.index_select(each.dim, entries)
            tensor.index_copy_(each.dim, entries, part * factor)


def directions(
    optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compute the directions of the optimizer's last step, without decoupled weight decay.

    d = (before − after)/lr, and with decay w that is no part of the gradient, less w · before. A
    step of rate 0 has the gradient instead; a parameter that the optimizer does not move has 0.

    Args:
        optimizer: Just after its step.
        before: Copies of parameters from before the step, by name.
        tensors: The parameters themselves.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {
        name: _direction(optimizer, groups.get(id(tensors[name])), old, tensors[name])
        for name, old in before.items()
    }


def _direction(
    optimizer: torch.optim.Optimizer, group: dict[str, Any] | None, old: Tensor, now: Tensor
) -> Tensor:
    if group is None:
        return torch.zeros_like(old)
    rate = float(group["lr"])
    if rate == 0:
        return torch.zeros_like(old) if now.grad is None else now.grad.detach()
    change = (old - now.detach()) / rate
    decay = float(group.get("weight_decay") or 0.0)
    return change - decay * old if decay and is_decoupled(optimizer, group) else change


def is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether a group's weight decay acts on weights past the gradient."""
    if isinstance(optimizer, NaturalGradient | AdamATan2 | torch.optim.AdamW):
        return True
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    return not isinstance(optimizer, COUPLED)


def clear_moments(
    optimizer: torch.optim.Optimizer,
    group: ChannelGroup,
    tensors: Mapping[str, Tensor],
    channels: Sequence[int],
) -> None:
    """Zero an optimizer's moments of channels, wherever a moment has its parameter's shape."""
    for each in group.zeroed:
        parameter = tensors[each.tensor]
        entries = each.entries[list(channels)].flatten()
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.index_fill_(each.dim, entries.to(value.device), 0)


def _rows(each: Slice, tensor: Tensor) -> Tensor:
    """Return a slice's values by channel, (channels, values), in float64."""
    values = tensor.detach().cpu().double()
    rows = values.movedim(each.dim, 0).reshape(values.shape[each.dim], -1)
    return rows[each.entries].flatten(1)
