"""Weights and sampling of classes with different numbers of training images."""

import torch
from torch import Tensor

from smallfry.data import ImageData
from smallfry.data.labels import some_of
from smallfry.errors import UsageError, nearest
from smallfry.tasks import Task
from smallfry.training.balance_config import BalanceConfig
from smallfry.training.optimization import NATURAL
from smallfry_runtime.names import text_of

FEW = 5  # training images, below which a class is hardly learnt beside one of twice as many


def class_weights(
    config: BalanceConfig, data: ImageData, task: Task, optimizer: str = ""
) -> tuple[float, ...]:
    """Compute the weights of the classes in the loss; none if all classes have the same weight.

    Source of ``effective``: Cui et al., "Class-Balanced Loss Based on Effective Number of
    Samples", arXiv 1901.05555.

    Raises:
        UsageError: Another task than classification, a weight of no class, or natural gradient,
            which takes the weights of mixed targets for another likelihood.
    """
    if config != BalanceConfig() and task.name != "classification":
        raise UsageError(f"balance is for classification, not {task.name}: leave it out")
    if optimizer in NATURAL and (config.weights or config.loss != "none"):
        raise UsageError(
            f"optimizer.name {optimizer} needs a loss without weights of classes: take "
            "balance.sampler balanced instead"
        )
    if config.weights:
        names = [text_of(name) for name in data.classes]
        for name in config.weights:
            if name not in names:
                raise UsageError(f"balance.weights: no class '{name}'{nearest(name, names)}")
        return tuple(config.weights.get(name, 1.0) for name in names)
    if config.loss == "none":
        return ()
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).double()
    if config.loss == "balanced":
        weights = 1 / counts
    else:
        weights = (1 - config.beta) / (1 - config.beta**counts)
    weights[counts == 0] = 0  # of which there is no loss
    weights *= counts.sum() / (weights * counts).sum()
    return tuple(weights.tolist())


def class_draws(labels: Tensor, exponent: float, generator: torch.Generator) -> Tensor:
    """Draw as many images as there are, in proportion to a power of the size of their class.

    The images of a class are drawn equally often, up to one. Which of them are drawn once more is
    random, and so is the rounding of the number of images of a class.

    Args:
        labels: (images,), int64.
        exponent: Of the sizes: 0 draws all classes equally often, 1 all images.
        generator: Source of the random choices.

    Returns:
        Positions of the drawn images, (images,), ascending.
    """
    labels = labels.cpu()
    count = len(labels)
    sizes = torch.bincount(labels)
    shares = torch.where(sizes > 0, sizes.double() ** exponent, 0.0)
    ends = count * shares.cumsum(0) / shares.sum()
    ends = (ends + torch.rand((), dtype=torch.float64, generator=generator)).floor().long()
    ends[-1] = count  # despite rounding errors
    wanted = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    order = torch.randperm(count, generator=generator)
    order = order[labels[order].argsort(stable=True)]
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(count) - starts[labels[order]]
    every = wanted // sizes.clamp(min=1)
    more = wanted % sizes.clamp(min=1)
    return torch.arange(count).repeat_interleave(every[labels] + (rank < more[labels]).long())


def describe_small_classes(data: ImageData, selects_on_validation: bool = True) -> list[str]:
    """Describe classes with too few images to be trained, or to choose an epoch by."""
    if data.train.labels.ndim != 1:
        return []
    train, validation = (
        torch.bincount(split.labels, minlength=len(data.classes))
        for split in (data.train, data.validation)
    )
    found = []
    missing = _named(data, (train > 0) & (validation == 0))
    if missing and selects_on_validation:
        found.append(
            f"{data.origin}: no validation image of {missing}, so that the choice of the epoch "
            "does not depend on them; give each at least 3 images"
        )
    if few := _named(data, (train > 0) & (train < FEW) & (2 * train <= train.max())):
        found.append(f"{data.origin}: fewer than {FEW} training images of {few}")
    return found


def _named(data: ImageData, chosen: Tensor) -> str:
    names = [data.classes[i] for i in chosen.nonzero()[:, 0].tolist()]
    return some_of(names) if names else ""
