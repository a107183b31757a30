"""Replacement of dense layers by layers of ``smallfry.layers``.

A module or a weight that is used under several names is replaced once, and stays shared.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from smallfry.errors import nearest
from smallfry.io.json import Plain
from smallfry.layers.linear_map import find_layer
from smallfry.order import Stage
from smallfry.transforms.registry import register

Make = Callable[[nn.Module, str], nn.Module]


@register
@dataclass(frozen=True)
class Replace:
    """Replacement of layers by others of one kind.

    Args:
        layer: Name of a registered layer, such as ``low_rank``.
        settings: Settings of each replaced layer, by its qualified name, such as
            ``{"block.0.mlp.fc1": {"rank": 8}}``.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.replace import Replace
        >>> spec = ModelSpec("resnet18").then(Replace("low_rank", {"fc": {"rank": 8}}))
        >>> tuple(build(spec).fc.reduce.weight.shape)
        (8, 512)
    """

    kind: ClassVar[str] = "replace"
    version: ClassVar[int] = 1

    layer: str
    settings: Mapping[str, Mapping[str, Plain]]

    def __post_init__(self) -> None:
        find_layer(self.layer)
        if not isinstance(self.settings, Mapping) or not self.settings:
            raise ValueError("settings need the names of the layers to replace")
        if not all(isinstance(each, Mapping) for each in self.settings.values()):
            raise ValueError("the settings of each layer are a mapping")

    @property
    def stage(self) -> Stage:
        """Stage of the layer: factor, adapter or bits."""
        stage: Stage = find_layer(self.layer).stage
        return stage

    def without_classifier(self, name: str, classes: int) -> "Replace | None":
        """Return the transform without the classifier; None if there was nothing else."""
        kept = {key: each for key, each in self.settings.items() if key != name}
        return replace(self, settings=kept) if kept else None

    def apply(self, model: nn.Module) -> None:
        """Replace the old layers by the structure of the new ones.

        Raises:
            ValueError: A name that the model does not have, or a layer that it can't be.
        """
        kind = find_layer(self.layer)
        replace_layers(model, self.settings, lambda old, n: kind.like(old, **self.settings[n]))


def replace_layers(model: nn.Module, names: Iterable[str], make: Make) -> None:
    """Replace layers in place, including modules that share their weights.

    Args:
        model: Changed in place.
        names: Qualified names of the layers.
        make: From a layer and its name to what takes its place.

    Raises:
        ValueError: A name that the model does not have, the model itself, or a layer that is used
            in another way than by a call; nothing is replaced then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, nn.Module] = {}  # by the layer that is replaced
    by_weight: dict[int, nn.Module] = {}
    for name in names:
        old = modules.get(name)
        if not name:
            raise ValueError(
                f"a {type(model).__name__} can't be replaced in place where it is the whole model: "
                "put it into nn.Sequential"
            )
        if old is None:
            raise ValueError(f"the model has no layer '{name}'{nearest(name, modules)}")
        if isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            raise ValueError(f"'{name}' is read by nn.MultiheadAttention, which never calls it")
        if id(old) in made:
            continue
        new = made[id(old)] = make(old, name)
        new.train(old.training)
        weight = old._parameters.get("weight")
        first = by_weight.setdefault(id(weight), new) if weight is not None else new
        if first is not new:
            _share(first, new)
    _require_whole_ties(modules, made, by_weight)
    for name, module in modules.items():
        if id(module) in made:
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, made[id(module)])
            if isinstance(owner := modules[parent], nn.TransformerEncoderLayer):
                owner.activation_relu_or_gelu = 0  # no fused inference, which reads weights alone


def tied_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names that use each named layer's weight, its own included."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    return {name: tuple(names) for names in owners.values() for name in names}


def _share(first: nn.Module, new: nn.Module) -> None:
    """Share a layer's parameters except for its bias, as in the dense layers, and ``unshared``."""
    unshared = getattr(new, "unshared", ("bias",))
    for name, parameter in first.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf not in unshared:
            setattr(new.get_submodule(owner), leaf, parameter)


def _require_whole_ties(
    modules: Mapping[str, nn.Module], made: Mapping[int, Any], by_weight: Mapping[int, Any]
) -> None:
    for name, module in modules.items():
        weight: Any = module._parameters.get("weight")
        if id(module) not in made and weight is not None and id(weight) in by_weight:
            raise ValueError(f"'{name}' has the weight of a layer that is replaced: replace it too")
