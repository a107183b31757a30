"""Reduction of layer widths: parameter and buffer shapes, and the attributes that count them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.order import Stage
from smallfry.transforms.registry import register

# attributes that count heads or channels where a weight's shape does not
COUNTS = frozenset({"heads", "num_heads", "attn_dim"})
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register
@dataclass(frozen=True)
class Resize:
    """Widths of a model's layers, none larger than before.

    Args:
        shapes: Shapes of parameters and buffers, by qualified name.
        counts: New values of counting attributes, such as ``{"blocks.0.attn.heads": 3}``.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.resize import Resize
        >>> widths = {"layer4.1.conv1.weight": [100, 512, 3, 3], "layer4.1.bn1.weight": [100],
        ...     "layer4.1.bn1.bias": [100], "layer4.1.bn1.running_mean": [100],
        ...     "layer4.1.bn1.running_var": [100], "layer4.1.conv2.weight": [512, 100, 3, 3]}
        >>> build(ModelSpec("resnet18").then(Resize(widths))).layer4[1].conv1.out_channels
        100
    """

    kind: ClassVar[str] = "resize"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.WIDTH

    shapes: Mapping[str, Sequence[int]]
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [size for shape in self.shapes.values() for size in shape]
        if not all(type(size) is int and size >= 1 for size in (*sizes, *self.counts.values())):
            raise ValueError("shapes and counts are whole numbers of 1 or more")

    def without_classifier(self, name: str, classes: int) -> "Resize":
        """The same with a classifier of other classes, as narrow as this one."""
        shapes = {
            key: [classes, *shape[1:]] if key.startswith(f"{name}.") else shape
            for key, shape in self.shapes.items()
        }
        return replace(self, shapes=shapes)

    def apply(self, model: nn.Module) -> None:
        """Resize tensors to these shapes, keeping the first values.

        Raises:
            ValueError: A tensor or attribute that the model does not have, or one that would grow.
        """
        tensors, width = tensors_of(model), classifier_width(model)
        for name, shape in self.shapes.items():
            old = tensors.get(name)
            if old is None or old.ndim != len(shape):
                raise ValueError(f"the model has no tensor '{name}' with {len(shape)} dimensions")
            if any(new > size for new, size in zip(shape, old.shape, strict=True)):
                raise ValueError(f"'{name}' would grow from {tuple(old.shape)} to {tuple(shape)}")
            set_tensor(model, name, old.detach()[tuple(slice(size) for size in shape)].clone())
        apply_counts(model, self.counts)
        fit_attributes(model, self.shapes)
        fit_classifier(model, width)


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer under all its names."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module._parameters.get(leaf)
    if old is None:
        module._buffers[leaf] = value
        return
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for each in model.modules():
        for key, parameter in each._parameters.items():
            if parameter is old:
                each._parameters[key] = new


def apply_counts(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Set counting attributes.

    Raises:
        ValueError: An attribute that the model does not have, that counts nothing, or would grow.
    """
    for name, count in counts.items():
        owner, _, leaf = name.rpartition(".")
        module: Any = dict(model.named_modules(remove_duplicate=False)).get(owner)
        old = getattr(module, leaf, None) if leaf in COUNTS else None
        if type(old) is not int or count > old:
            raise ValueError(f"the model has no count '{name}' of {count} or more")
        setattr(module, leaf, count)


def fit_attributes(model: nn.Module, names: Mapping[str, Any]) -> None:
    """Set ``out_features``, ``num_channels`` and similar attributes from the tensors."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner in {name.rpartition(".")[0] for name in names}:
        module: Any = modules[owner]
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, CONVOLUTIONS):
            if module.groups > 1:  # depthwise: a channel is its own group
                module.groups = module.in_channels = len(weight)
            else:
                module.in_channels = weight.shape[1]
            module.out_channels = len(weight)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = len(next(t for t in module.state_dict().values() if t.ndim))


def classifier_width(model: nn.Module) -> int | None:
    """Return the input features of a timm model's classifier."""
    classifier = getattr(model, "get_classifier", lambda: None)()
    weight = getattr(classifier, "weight", None)
    return int(weight.shape[1]) if isinstance(weight, Tensor) and weight.ndim > 1 else None


def fit_classifier(model: Any, before: int | None) -> None:
    """Update timm's ``reset_classifier`` for the current number of features."""
    now = classifier_width(model)
    for name in ("num_features", "head_hidden_size"):
        if before is not None and now != before and getattr(model, name, None) == before:
            setattr(model, name, now)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def index_select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Copy the kept entries of a dimension."""
    return torch.index_select(tensor.detach(), dim, kept.to(tensor.device)).contiguous()
