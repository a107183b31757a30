"""Attention of a ViTRM's prediction token: weights and rollout.

The answer step y <- f([y; z]) has no access to the image; z does, in the think steps before it. So
the weights are composed: attention rollout (Abnar and Zuidema, "Quantifying Attention Flow in
Transformers", arXiv 2005.00928) takes a layer for half attention, averaged over its heads, and half
identity, for the residual path. Here it goes through the layers of the answer step and of the think
steps of one recursion step. It shows possible sources of information, ignores values and MLPs, and
proves no cause.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smallfry.models.contract import LatentRecursive
from smallfry.models.layers import EVERY, Attention

__all__ = [
    "Attended",
    "attention_layers",
    "attention_on_image",
    "rollout",
    "watch_attention",
    "why_no_rollout",
]


class Attended(NamedTuple):
    """Attention weights of one call of one layer."""

    weights: Tensor  # (batch, kept, context + tokens), averaged over heads; each row sums to 1
    kept: slice  # which of the tokens were given
    context: int  # further rows that were attended to, in front of the tokens


def attention_layers(model: nn.Module) -> int:
    """Count a model's attention layers: calls of ``watch_attention`` in one latent step."""
    return sum(isinstance(module, Attention) for module in model.modules())


@contextmanager
def watch_attention(model: nn.Module) -> Iterator[list[Attended]]:
    """Collect the attention weights of every call of every layer, in order.

    The model computes what it always does; the weights are computed beside it.
    """
    seen: list[Attended] = []

    def watch(layer: nn.Module, given: tuple[Any, ...], _: Tensor) -> None:
        assert isinstance(layer, Attention)
        seen.append(_attended(layer, *given))

    hooks = [
        layer.register_forward_hook(watch)
        for layer in model.modules()
        if isinstance(layer, Attention)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def why_no_rollout(model: nn.Module) -> str:
    """Return the reason why attention rollout does not apply to a model; "" if it does.

    It needs a recursive model whose tokens meet in attention and nowhere else; such a model has
    ``why_no_rollout``, its own reason.
    """
    why: str | None = getattr(model, "why_no_rollout", None)
    if why is None or not isinstance(model, LatentRecursive):
        return "it has no prediction token that looks again and again"
    return why


def rollout(layers: Sequence[Attended]) -> Tensor:
    """Compute each input's share in a block's kept rows, (batch, kept, context + tokens).

    Args:
        layers: The calls of a block's layers, first to last; each row of the result sums to 1.
    """
    first = layers[0].weights
    inputs = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    inputs = inputs.expand(len(first), -1, -1)
    context, tokens = inputs[:, : layers[0].context], inputs[:, layers[0].context :]
    for layer in layers:
        read = layer.weights @ torch.cat([context, tokens], dim=1)
        tokens = (read + tokens[:, layer.kept]) / 2
    return tokens


def attention_on_image(
    thoughts: Sequence[Sequence[Attended]], answer: Sequence[Attended], patches: int
) -> Tensor:
    """Compute the share of y's rollout on each patch, (batch, patches).

    Its sum is the share of the image in the answer; the rest is on y and z as they were when the
    recursion step began.

    Args:
        thoughts: The layers of the think steps since the recursion step began; none give zeros.
        answer: The layers of the answer step after them.
        patches: Tokens of the image.
    """
    read = rollout(answer)  # (batch, 1, 1 + latents)
    held = read.new_zeros(len(read), read.shape[-1], patches)  # of the image in y and z
    for thought in thoughts:
        mixed = rollout(thought)  # (batch, latents, patches + 1 + latents)
        held = torch.cat([held[:, :1], mixed[..., :patches] + mixed[..., patches:] @ held], dim=1)
    return (read @ held)[:, 0]


def _attended(
    layer: Attention, qkv: Tensor, kept: slice = EVERY, context: Tensor | None = None
) -> Attended:
    everything = qkv if context is None else torch.cat([context, qkv], dim=1)
    queries = layer._split(qkv)[0][:, :, kept]
    keys = layer._split(everything)[1]
    scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5
    return Attended(
        scores.softmax(dim=-1).mean(dim=1), kept, 0 if context is None else context.shape[1]
    )
