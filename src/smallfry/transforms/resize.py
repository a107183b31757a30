"""Reduction of layer widths: parameter and buffer shapes, and the attributes of widths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from smallfry.order import Stage
from smallfry.transforms.registry import register

# attributes that count heads or channels where a weight's shape does not
COUNTS = frozenset({"heads", "num_heads", "attn_dim"})
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # (inputs, outputs, …)


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
        """Return the transform with a classifier of other classes, as narrow as this one."""
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
        tensors, widths = tensors_of(model), feature_widths(model)
        for name, shape in self.shapes.items():
            old = tensors.get(name)
            if old is None or old.ndim != len(shape):
                raise ValueError(f"the model has no tensor '{name}' with {len(shape)} dimensions")
            if any(new > size for new, size in zip(shape, old.shape, strict=True)):
                raise ValueError(f"'{name}' would grow from {tuple(old.shape)} to {tuple(shape)}")
            set_tensor(model, name, old.detach()[tuple(slice(size) for size in shape)].clone())
        apply_counts(model, self.counts)
        fit_attributes(model, self.shapes)
        fit_features(model, widths)


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
                setattr(each, key, new)  # a recurrent layer has a list of them besides


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
        elif isinstance(module, TRANSPOSED):  # without groups
            module.in_channels, module.out_channels = weight.shape[:2]
        elif isinstance(module, nn.RNNBase):
            module.input_size = len(module.get_parameter("weight_ih_l0").T)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = len(next(t for t in module.state_dict().values() if t.ndim))


class Width(NamedTuple):
    """Dimension of a tensor, counted by an attribute of the model."""

    tensor: str  # qualified name
    dim: int


def feature_widths(model: nn.Module) -> dict[str | int, Width]:
    """Return the widths in timm's attributes: ``num_features``, ``head_hidden_size`` and features.

    Args:
        model: Before its tensors change.

    Returns:
        By the name of an attribute, or the number of an entry of ``feature_info``.
    """
    found: dict[str | int, Width] = {}
    tensors = list(tensors_of(model).items())
    for number, entry in enumerate(_features(model)):
        if (source := _source(model, tensors, entry)) is not None:
            found[number] = source
    classifier: Any = getattr(model, "get_classifier", lambda: None)()
    name = next((n for n, module in model.named_modules() if module is classifier), None)
    sources = [Width(f"{name}.weight", 1)] if name is not None else []
    sources += [found[number] for number in [len(_features(model)) - 1] if number in found]
    sizes = {key: tensor.shape for key, tensor in tensors if tensor.ndim}
    for attribute in ("num_features", "head_hidden_size"):
        for source in sources:
            shape = sizes.get(source.tensor, ())
            if source.dim < len(shape) and getattr(model, attribute, None) == shape[source.dim]:
                found.setdefault(attribute, source)
    return found


def fit_features(model: Any, widths: Mapping[str | int, Width]) -> None:
    """Update the attributes of widths, as read by ``reset_classifier`` and others.

    Args:
        model: With tensors of other shapes.
        widths: As ``feature_widths`` gave it before.
    """
    tensors = tensors_of(model)
    entries = [dict(entry) for entry in _features(model)]
    for key, (name, dim) in widths.items():
        width = int(tensors[name].shape[dim])
        if isinstance(key, int):
            entries[key]["num_chs"] = width
        else:
            setattr(model, key, width)
    if entries:
        model.feature_info = entries


def _features(model: Any) -> list[dict[str, Any]]:
    entries = getattr(model, "feature_info", None)
    return entries if isinstance(entries, list) else []


def _source(
    model: nn.Module, tensors: Sequence[tuple[str, Tensor]], entry: Mapping[str, Any]
) -> Width | None:
    """Find the last tensor of a feature's module with a row for each channel.

    A module without tensors, such as an activation, has the channels of the one before it.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    module = entry.get("module")
    if module not in names:
        return None
    owned = [t for t in tensors if t[0].startswith(f"{module}.")]
    owners = {name.rpartition(".")[0] for name, _ in tensors}
    last = next((n for n in reversed(names[: names.index(module)]) if n in owners), None)
    for name, tensor in reversed(owned or [t for t in tensors if t[0].rpartition(".")[0] == last]):
        if tensor.ndim and len(tensor) == entry.get("num_chs"):
            return Width(name, 0)
    return None


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def index_select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Copy the kept entries of a dimension."""
    return torch.index_select(tensor.detach(), dim, kept.to(tensor.device)).contiguous()
