"""Problems of optimizer races: network, loss and data, with the papers' batch sizes.

CURVES, MNIST and FACES are the auto-encoders of Koroko et al. 2022 (arXiv 2201.10285), the deep
linear networks and the convnet are from their 2023 paper (arXiv 2303.18083), which has
Fashion-MNIST where ``deep_linear`` takes MNIST by default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.data import load_data
from smallfry.models.autoencoders import (
    CURVES_SIZES,
    FACES_SIZES,
    MNIST_SIZES,
    Autoencoder,
    DeepLinear,
    SmallConvNet,
)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Network with its data and loss.

    Args:
        title: For people.
        data: Name of the data set.
        validation: Share of the training images held out, if the data has no such split.
        build: Makes the network, from the global random state.
        batch_size: Samples a step.
        likelihood: The density that the loss is the negative logarithm of.
        loss: Mean loss of outputs and targets, as PyTorch's users write it.
        loss_scale: That loss over the mean negative log-likelihood of a sample.
        whiten: Bring pixels to mean 0 and variance 1 (one mean and one variance for all).
        reconstruct: Targets are the inputs; labels otherwise.
    """

    title: str
    data: str
    validation: float
    build: Callable[[], nn.Module]
    batch_size: int
    likelihood: str
    loss: Loss
    loss_scale: float | Literal["mean"]
    whiten: bool = False
    reconstruct: bool = True


class Examples(NamedTuple):
    """Images on the race's device, with the conversion from pixels to inputs."""

    pixels: Tensor  # (images, channels, side, side), uint8
    labels: Tensor  # (images,)
    mean: float
    std: float

    def batch(self, rows: Tensor, reconstruct: bool) -> tuple[Tensor, Tensor]:
        """Return inputs, and targets: the flattened inputs, or labels."""
        inputs = (self.pixels[rows].float() / 255 - self.mean) / self.std
        return inputs, inputs.flatten(1) if reconstruct else self.labels[rows]


PROBLEMS = {
    "curves": Problem(
        "CURVES auto-encoder, 784-400-200-100-50-25-6-…",
        "curves",
        0.2,
        partial(Autoencoder, CURVES_SIZES),
        256,
        "bernoulli",
        F.binary_cross_entropy_with_logits,
        "mean",
    ),
    "mnist": Problem(
        "MNIST auto-encoder, 784-1000-500-250-30-…",
        "mnist",
        1 / 6,
        partial(Autoencoder, MNIST_SIZES),
        512,
        "bernoulli",
        F.binary_cross_entropy_with_logits,
        "mean",
    ),
    "faces": Problem(
        "FACES auto-encoder, 625-2000-1000-500-30-…",
        "faces",
        0.2,
        partial(Autoencoder, FACES_SIZES),
        1024,
        "gaussian",
        F.mse_loss,
        "mean",
        whiten=True,
    ),
    "deep_linear": Problem(
        "deep linear network, 64 layers with batch norm, MNIST",
        "mnist",
        1 / 6,
        DeepLinear,
        512,
        "categorical",
        F.cross_entropy,
        1.0,
        whiten=True,
        reconstruct=False,
    ),
    "deep_linear_plain": Problem(
        "deep linear network, 64 layers without batch norm, MNIST",
        "mnist",
        1 / 6,
        partial(DeepLinear, batch_norm=False),
        512,
        "categorical",
        F.cross_entropy,
        1.0,
        whiten=True,
        reconstruct=False,
    ),
    "convnet": Problem(
        "small convnet, CIFAR-10",
        "cifar10",
        0.2,
        SmallConvNet,
        256,
        "categorical",
        F.cross_entropy,
        1.0,
        whiten=True,
        reconstruct=False,
    ),
}


def load_examples(
    problem: Problem, root: Path | None, device: torch.device
) -> tuple[Examples, Examples]:
    """Load the training and the validation examples of a problem.

    Raises:
        DataError: The data can't be reached or used.
    """
    data = load_data(problem.data, root, validation=problem.validation, min_classes=1)
    mean, std = 0.0, 1.0
    if problem.whiten:
        mean = sum(data.mean) / len(data.mean)
        square = sum(s**2 + m**2 for m, s in zip(data.mean, data.std, strict=True))
        std = (square / len(data.mean) - mean**2) ** 0.5
    training, held_out = (
        Examples(split.images.to(device), split.labels.to(device), mean, std)
        for split in (data.train, data.validation)
    )
    return training, held_out
