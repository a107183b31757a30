"""Calibration images of a method, and unquantisable layers."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from smallfry.compress.select import DENSE, is_dense, read_by_others
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.models.contract import tensors
from smallfry.training.evaluation import forward

FEW = 32  # images, with fewer of which ranges are hardly known


class Images:
    """Images to calibrate with.

    Args:
        batches: Batches of images, which can be read again.
        example: A batch of images.
        rehearsal: True to look at the example alone.
    """

    def __init__(self, batches: Iterable[Tensor], example: Tensor, rehearsal: bool = False) -> None:
        self.batches = [example] if rehearsal else batches
        self.example, self.rehearsal = example, rehearsal
        self.count = 0  # known once required
        self.classes = 0  # that the model puts them in
        if not example.numel():
            self.example = next(iter(batches), example)

    def description(self) -> dict[str, int]:
        """Return plain data for a report."""
        return {"images": self.count, "predicted_classes": self.classes}


def require_images(method: str, model: nn.Module, images: Images) -> None:
    """Require images, and warn of few, or of those of one class alone.

    Raises:
        UsageError: There are none.
    """
    predicted: list[Tensor] = []
    with torch.no_grad():
        for batch in images.batches:
            outputs = forward(model, batch)[0]
            predicted.append(tensors(outputs)[0].flatten(1).argmax(1))
            images.count += len(batch)
    if not images.count:
        raise UsageError(
            f"{method} measures on images: give data (batches= of a model of your own), or choose "
            "settings that need none (no activations, budget, smooth, adaround or bias correction)"
        )
    images.classes = len({*torch.cat(predicted).tolist()})
    if images.rehearsal:
        return
    if images.count < FEW:
        _warn(
            f"{method} calibrates on only {images.count} images, and others may exceed their "
            f"ranges: give {FEW} or more"
        )
    elif images.classes == 1 and isinstance(outputs, Tensor) and outputs.flatten(1).shape[1] > 1:
        _warn(
            f"the model puts all {images.count} calibration images in one class: ranges and "
            "rounding will suit this class alone; give images of all classes"
        )


def unsupported(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[dict[str, Any]]:
    """List layers with weights that can't be quantised and stay in floating point.

    Args:
        model: Before quantisation.
        include: Shell patterns of the names that were meant.
        exclude: Patterns of those that were not.
    """
    modules, others = dict(model.named_modules()), read_by_others(model)
    found, counted = [], set[int]()
    for name, module in modules.items():
        weight = module._parameters.get("weight", module._parameters.get("in_proj_weight"))
        if weight is None and isinstance(module, DENSE):
            weight = module.weight  # computed from others
        inside = isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)
        plain = is_dense(module) and getattr(module, "padding_mode", "zeros") == "zeros"
        plain = plain and name not in others
        if weight is None or weight.ndim < 2 or (plain and not inside):
            continue
        if any(fnmatchcase(name, p) for p in include) and not any(
            fnmatchcase(name, p) for p in exclude
        ):
            kind = type(module).__name__
            size = 0 if id(weight) in counted else weight.numel()  # a shared one counts once
            counted.add(id(weight))
            found.append({"name": name, "type": kind, "parameters": size})
    return found


def supported(
    method: str, chosen: Sequence[str], left: Sequence[Mapping[str, Any]], rehearsal: bool = False
) -> list[str]:
    """Return the chosen layers that are not left in floating point; warn of those that are.

    Raises:
        UsageError: None remains.
    """
    names = {each["name"] for each in left}
    found = [name for name in chosen if name not in names]
    if not found:
        one = next(each for each in left if each["name"] in chosen)
        raise UsageError(
            f"{method} can replace none of the chosen layers, such as '{one['name']}' "
            f"({one['type']}): its weight is an embedding's too, or it has another padding than "
            "zeros"
        )
    if left and not rehearsal:
        warn_unsupported(left)
    return found


def warn_unsupported(left: Sequence[Mapping[str, Any]]) -> None:
    """Warn of layers with weights that stay in floating point."""
    names = ", ".join(f"{each['name']} ({each['type']})" for each in left[:5])
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    count = sum(each["parameters"] for each in left)
    _warn(
        f"{len(left)} layers with {count:,} weights stay in floating point, as no linear layer or "
        f"ordinary convolution, or tied to an embedding: {names}{more}"
    )


def _warn(message: str) -> None:
    warnings.warn(message, SmallfryWarning, stacklevel=3)
