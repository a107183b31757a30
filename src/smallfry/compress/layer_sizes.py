"""Sizes of each layer before and after a compression."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from smallfry.costing import layer_macs

MODEL = "(model)"  # what no layer has, such as position embeddings


class LayerSize(NamedTuple):
    """Figures of a layer of the parent, then of its replacement.

    Attributes:
        name: The layer's name in the parent, or that of a new layer.
        parameters: Numbers that are learned, and integers in their place.
        bytes: Of all stored tensors.
        macs: Multiply-accumulates of all calls for one image.
    """

    name: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    macs: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON."""
        figures = {"parameters": self.parameters, "bytes": self.bytes, "macs": self.macs}
        return {"name": self.name} | {
            name: {"before": pair[0], "after": pair[1]} for name, pair in figures.items()
        }


def layer_sizes(
    parent: nn.Module,
    small: nn.Module,
    example: Tensor,
    written: Mapping[str, int] | None = None,
) -> list[LayerSize]:
    """Measure every layer of a model before and after a compression.

    What stands inside a layer's place counts as this layer: both factors of a matrix, say. A shared
    weight counts once.

    Args:
        parent: The model before; left as it is.
        small: The model after, likewise.
        example: An image, in a batch of one.
        written: Bytes of tensors of ``small`` that its file has in another form, by name.

    Returns:
        Layers with parameters, buffers or products, in the order of the parent; new ones last.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from smallfry.compress.layer_sizes import layer_sizes
        >>> dense = nn.Sequential(nn.Linear(8, 8, bias=False))
        >>> low = nn.Sequential(
        ...     nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
        ... )
        >>> layer_sizes(dense, low, torch.zeros(1, 8))[0].parameters
        (64, 32)
    """
    before, after = _figures(parent, example, {}), _figures(small, example, written or {})
    found: dict[str, list[list[int]]] = {name: [each, [0, 0, 0]] for name, each in before.items()}
    for name, each in after.items():
        place = _place(name, before)
        kept = found.setdefault(place, [[0, 0, 0], [0, 0, 0]])
        kept[1] = [a + b for a, b in zip(kept[1], each, strict=True)]
    return [
        LayerSize(name or MODEL, *zip(each, other, strict=True))
        for name, (each, other) in found.items()
    ]


def written_bytes(reports: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Gather the bytes of tensors that methods store in a form of their own."""
    return {name: size for each in reports for name, size in each.get("bytes", {}).items()}


def _figures(model: nn.Module, example: Tensor, written: Mapping[str, int]) -> dict[str, list[int]]:
    """Return parameters, bytes and multiply-accumulates of each module that has some, itself."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    stored, macs = model.state_dict(), layer_macs(model, example)
    tensors = {n: t for n, t in {**parameters, **buffers}.items() if n in stored}
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, tensor in tensors.items():
        owner = found[name.rpartition(".")[0]]
        owner[0] += tensor.numel() if name in parameters else 0
        owner[1] += written.get(name, tensor.numel() * tensor.element_size())
    for name, count in macs.items():
        found[name][2] = count
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return {name: found[name] for name in sorted(found, key=lambda each: order[each])}


def _place(name: str, layers: Mapping[str, Any]) -> str:
    """Return the layer of the parent that a module stands for, or is inside; else its own name."""
    place = name
    while place and place not in layers:
        place = place.rpartition(".")[0]
    return place if place or not name else name
