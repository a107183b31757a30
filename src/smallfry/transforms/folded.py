"""Convolutions with a bias in place of the batch norm after them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from smallfry._torch import BatchNorm
from smallfry.order import Stage
from smallfry.transforms.registry import register
from smallfry.transforms.shorten import owner_of

__all__ = ["Fold", "fold_weights"]


@register
@dataclass(frozen=True)
class Fold:
    """Batch norms folded into the convolutions before them.

    Args:
        norms: Names of the norms, by those of the convolutions.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.folded import Fold
        >>> model = build(ModelSpec("resnet18").then(Fold({"conv1": "bn1"})))
        >>> type(model.bn1).__name__, model.conv1.bias.shape
        ('Identity', torch.Size([64]))
    """

    kind: ClassVar[str] = "fold"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.SPARSE

    norms: Mapping[str, str]

    def __post_init__(self) -> None:
        names = (*self.norms, *self.norms.values())
        if not names or not all(isinstance(each, str) and each for each in names):
            raise ValueError("norms are the names of modules, by those of convolutions")

    def apply(self, model: nn.Module) -> None:
        """Give the convolutions a bias, and remove the norms, in place.

        Raises:
            ValueError: A module that the model does not have, or of another kind.
        """
        for name, norm_name in self.norms.items():
            layer, norm = pair_of(model, name, norm_name)
            if layer.bias is None:
                weight = layer.weight
                layer.bias = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)
            owner, leaf = owner_of(model, norm_name)
            owner._modules[leaf] = _left_of(norm)


def pair_of(model: nn.Module, name: str, norm_name: str) -> tuple[Any, Any]:
    """Return a convolution and its batch norm.

    Raises:
        ValueError: The model does not have them, or they are of another kind.
    """
    modules = dict(model.named_modules())
    layer, norm = modules.get(name), modules.get(norm_name)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d) or not isinstance(norm, BatchNorm):
        raise ValueError(f"the model has no convolution '{name}' with a batch norm '{norm_name}'")
    if layer.out_channels != norm.num_features:
        raise ValueError(f"'{norm_name}' normalises other channels than those of '{name}'")
    return layer, norm


def _left_of(norm: nn.Module) -> nn.Module:
    """Return what a norm does after normalising: timm has norms with an activation."""
    after = [each for each in norm.children() if not isinstance(each, nn.Identity)]
    return nn.Sequential(*after) if after else nn.Identity()


@torch.no_grad()
def fold_weights(layer: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute weight and bias of a convolution that includes its batch norm, in float64.

    Args:
        layer: The convolution; weight (out, in, …).
        norm: The norm, with running statistics.

    Returns:
        The weight, and the bias (out,), in the layer's own type.
    """
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    scale = (variance + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -mean if layer.bias is None else layer.bias.double() - mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    return weight.to(layer.weight), bias.to(layer.weight)
