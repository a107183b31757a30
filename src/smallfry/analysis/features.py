"""Features of a model's last linear layer, and pooled outputs of the layers before it."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from smallfry.compress.quantize.calls import visit
from smallfry.curvature.layers import input_of
from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.layers.quantized import QuantizedWeight
from smallfry.training.evaluation import forward
from smallfry.training.run import TrainedModel
from smallfry.transforms.modes import evaluating

__all__ = ["Features", "collect", "collect_layers", "spread"]

BATCH = 250
TOLERANCE = 1e-4  # of logits that are a multiple of the classifier's outputs


class Features(NamedTuple):
    """Inputs and weights of the classifier in float64, and the model's own logits.

    Attributes:
        features: (images, features), of recursive models those of the last step.
        labels: (images,).
        weight: (classes, features); a constant factor of the logits is part of it.
        bias: (classes,).
        logits: (images, classes), as the model gave them.
    """

    features: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor
    logits: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float((self.logits.argmax(1) == self.labels).double().mean())


@torch.inference_mode()
def collect(trained: TrainedModel, images: Tensor, labels: Tensor) -> Features:
    """Run a model once over images, and collect the inputs of its classifier.

    Args:
        trained: The model.
        images: (images, channels, height, width), uint8.
        labels: (images,).

    Raises:
        UsageError: The logits are no linear function of one layer's inputs, or not finite.
    """
    head = _head(trained.model)
    taken: list[Tensor] = []

    def keep(module: nn.Module, given: Any, named: dict[str, Any], output: Tensor) -> None:
        inputs = input_of(given, named)
        if isinstance(module, QuantizedWeight):
            module.called -= 1  # once more, for the call that has just ended
            inputs = module.round_inputs(inputs)
        taken[:] = [inputs.flatten(1), output.flatten(1)]

    features, outputs, logits = [], [], []
    handle = head.register_forward_hook(keep, with_kwargs=True)
    try:
        with evaluating(trained.model):
            for rows in torch.split(images, BATCH):
                taken.clear()
                logits.append(forward(trained.model, trained.normalize(rows))[0].double())
                if not taken or len(taken[0]) != len(rows) or taken[1].shape != logits[-1].shape:
                    raise UsageError("the model's last linear layer does not take whole images")
                features.append(taken[0].double())
                outputs.append(taken[1].double())
    finally:
        handle.remove()
    given, own = torch.cat(logits), torch.cat(outputs)
    if not bool(given.isfinite().all()):
        raise UsageError("the model's logits are not finite: its training has diverged")
    factor = float((given * own).sum() / own.square().sum().clamp(min=1e-300))
    if (given - factor * own).abs().max() > TOLERANCE * given.abs().max():
        raise UsageError("the model's logits are no multiple of its last linear layer's outputs")
    dense = _dense(head)
    weight = dense.weight.detach().flatten(1).double() * factor
    bias = torch.zeros(len(weight)).double() if dense.bias is None else dense.bias.detach().double()
    return Features(torch.cat(features), labels, weight, bias * factor, given)


@torch.no_grad()
def collect_layers(trained: TrainedModel, split: Split) -> dict[str, Tensor]:
    """Collect outputs of linear layers and convolutions, pooled over places or tokens.

    Returns:
        (images, features) in float64 by layer, in the order of the first calls; of each layer the
        last call, and only layers that are called with whole batches.
    """
    kinds = (nn.Linear, nn.Conv2d, QuantizedWeight)
    names = [n for n, module in trained.model.named_modules() if isinstance(module, kinds)]
    modules = dict(trained.model.named_modules())
    found: dict[str, list[Tensor]] = {}
    sizes: list[int] = []

    def batches() -> Iterator[Tensor]:
        for rows in torch.split(torch.arange(len(split)), BATCH):
            sizes.append(len(rows))
            yield trained.normalize(split.take(rows).images)

    def see(name: str, call: int, _: Tensor, output: Tensor) -> None:
        del found.setdefault(name, [])[len(sizes) - 1 :]
        found[name].append(_pooled(modules[name], output).double())

    with evaluating(trained.model):
        visit(trained.model, names, batches(), see)
    whole = {n: parts for n, parts in found.items() if [len(each) for each in parts] == sizes}
    return {name: torch.cat(parts) for name, parts in whole.items()}


def spread(split: Split, count: int) -> Split:
    """Take images at equal distances; the first ones may be of one class.

    Args:
        split: The images.
        count: At most so many.
    """
    taken = min(count, len(split))
    return split.take(torch.arange(taken) * len(split) // max(1, taken))


def _pooled(module: nn.Module, output: Tensor) -> Tensor:
    if output.ndim == 4 and not isinstance(module, nn.Linear):
        return output.mean(dim=(2, 3))
    return output if output.ndim == 2 else output.flatten(1, -2).mean(dim=1)


def _head(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_classifier", None)
    head = None if find is None else find()
    if not isinstance(head, nn.Linear | nn.Conv2d) and not hasattr(head, "dense"):
        raise UsageError("the model has no linear layer as its classifier")
    return cast(nn.Module, head)


def _dense(head: nn.Module) -> Any:
    return head if isinstance(head, nn.Linear | nn.Conv2d) else cast(Any, head).dense()
