"""Inputs of layers call by call, as calibration images pass through a model."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smallfry.compress.quantize.ranges import Histogram
from smallfry.curvature.layers import input_of
from smallfry.errors import UsageError
from smallfry.training.evaluation import forward
from smallfry.transforms.classifier import classifier_names

See = Callable[[str, int, Tensor, Tensor], None]


@torch.no_grad()
def visit(model: nn.Module, layers: Collection[str], batches: Iterable[Tensor], see: See) -> None:
    """Pass images through a model, and show the inputs and outputs of layers.

    Args:
        model: In evaluation mode.
        layers: Names of the layers; a layer with several names is shown under the given one.
        batches: Batches of images.
        see: Called with the name of the layer, the number of its call within the batch, from 0,
            its inputs and its outputs.
    """
    calls: Counter[str] = Counter()
    modules = dict(model.named_modules(remove_duplicate=False))

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, named: dict[str, Any], output: Tensor) -> None:
            see(name, calls[name], input_of(given, named), output)
            calls[name] += 1

        return hook

    handles = [modules[n].register_forward_hook(note(n), with_kwargs=True) for n in layers]
    try:
        for batch in batches:
            calls.clear()
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


class Passes(NamedTuple):
    """Order and number of the calls in one pass of a model."""

    calls: dict[str, int]  # of each layer that is called, in the order of their first calls
    first: str | None  # the first called module, if it is called once: a pass begins with it


def count_calls(model: nn.Module, layers: Collection[str], example: Tensor) -> Passes:
    """Count the calls of layers in one pass, and find a module that begins it.

    Args:
        model: In evaluation mode.
        layers: Names of the layers.
        example: A batch of images.
    """
    leaves = [n for n, module in model.named_modules() if n and not any(module.children())]
    seen: Counter[str] = Counter()
    visit(model, {*leaves, *layers}, [example], lambda name, *_: seen.update([name]))
    first = next((name for name in seen if name in leaves), None)
    anchor = first if first is not None and seen[first] == 1 else None
    return Passes({name: count for name, count in seen.items() if name in layers}, anchor)


def histograms(
    model: nn.Module, layers: Collection[str], batches: Iterable[Tensor], per_call: bool = True
) -> dict[str, list[Histogram]]:
    """Collect histograms of the layers' inputs in two passes over the images.

    Args:
        model: In evaluation mode.
        layers: Names of the layers.
        batches: Batches of images, which can be read twice.
        per_call: A histogram for each call; else one for all calls of a layer. A classifier has one
            in any case: some passes of a recursive model read every step, others the last alone.

    Returns:
        Histograms of each layer in the order of its calls; a layer that is not called is left out.

    Raises:
        UsageError: An input is not finite, or there are no images.
    """
    extremes: dict[tuple[str, int], tuple[float, float]] = {}
    classifiers = classifier_names(model)

    def key_of(name: str, call: int) -> tuple[str, int]:
        return name, call if per_call and name not in classifiers else 0

    def extend(name: str, call: int, inputs: Tensor, _: Tensor) -> None:
        low, high = map(float, inputs.aminmax())
        if not (low > -torch.inf and high < torch.inf):
            raise UsageError(f"an input of '{name}' is not finite: the model can't be calibrated")
        key = key_of(name, call)
        before = extremes.get(key, (low, high))
        extremes[key] = (min(low, before[0]), max(high, before[1]))

    visit(model, layers, batches, extend)
    if not extremes:
        raise UsageError("no image to calibrate with: give data, or batches=")
    found = {key: Histogram.empty(*ends) for key, ends in extremes.items()}

    def count(name: str, call: int, inputs: Tensor, _: Tensor) -> None:
        found[key_of(name, call)].add(inputs)

    visit(model, layers, batches, count)
    by_layer: dict[str, list[Histogram]] = {}
    for (name, _), histogram in sorted(found.items(), key=lambda item: item[0][1]):
        by_layer.setdefault(name, []).append(histogram)
    return by_layer
