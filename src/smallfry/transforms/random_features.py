"""Layers from random features in place of linear layers with their activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from smallfry.io.json import Plain
from smallfry.layers.random_features import SNNKLinear
from smallfry.order import Stage
from smallfry.transforms.erased import Skip
from smallfry.transforms.registry import register
from smallfry.transforms.replace import tied_layers
from smallfry.transforms.shorten import owner_of

ENTRIES = {"first", "activation", "features", "seed"}


@register
@dataclass(frozen=True)
class RandomFeatures:
    """Random features in place of pairs of linear layers around an activation.

    Args:
        pairs: By the name of each pair's second linear layer, where the features are put: the names
            ``first`` of the first one and ``activation``, which do nothing any more, the number of
            ``features``, and the ``seed`` of their projection.

    Example:
        >>> import timm
        >>> from smallfry.transforms.random_features import RandomFeatures
        >>> names = {"first": "blocks.0.mlp.fc1", "activation": "blocks.0.mlp.act"}
        >>> pair = {**names, "features": 64, "seed": 0}
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> RandomFeatures({"blocks.0.mlp.fc2": pair}).apply(model)
        >>> sum(p.numel() for p in model.blocks[0].mlp.parameters())
        12480
    """

    kind: ClassVar[str] = "random_features"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.FACTOR

    pairs: Mapping[str, Mapping[str, Plain]]

    def __post_init__(self) -> None:
        if not isinstance(self.pairs, Mapping) or not self.pairs:
            raise ValueError("pairs need the names of the layers to replace")
        for name, pair in self.pairs.items():
            if not isinstance(pair, Mapping) or set(pair) != ENTRIES:
                raise ValueError(
                    f"{name}: expected first, activation, features and seed, got {pair!r}"
                )

    def apply(self, model: nn.Module) -> None:
        """Put new features in the place of the pairs.

        Raises:
            ValueError: A module that the model lacks, or that is shared.
        """
        modules, ties = dict(model.named_modules()), tied_layers(model)
        for name, pair in self.pairs.items():
            given: Any = pair
            parts = [modules.get(str(given[part])) for part in ("first", "activation")]
            first, second = parts[0], modules.get(name)
            if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and parts[1]):
                raise ValueError(f"the model has no pair of linear layers before '{name}'")
            if any(len(ties[each]) > 1 for each in (given["first"], name)):
                raise ValueError(f"'{name}' or '{given['first']}' shares its weight: keep it dense")
            sizes = first.in_features, second.out_features
            made = SNNKLinear(*sizes, given["features"], seed=given["seed"], bias=True)
            made.to(second.weight).train(second.training)
            for skipped in (given["first"], given["activation"]):
                owner, leaf = owner_of(model, skipped)
                owner._modules[leaf] = Skip()
            owner, leaf = owner_of(model, name)
            owner._modules[leaf] = made
