"""Handwritten digits of scikit-learn in a fixed split of training, validation and test images.

RandomState(0) permutes the 1,797 images of 8×8 pixels: 597, 600 and 600 of them, standardised by
the mean and deviation of all training pixels.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IMAGES", "MOMENTS", "Batch", "Digits", "Split", "epochs_of", "load_split", "shifted"]

TRAIN, IMAGES = 597, 600  # to train, and of validation and of test
MOMENTS = (2, 4, 8)  # epochs after which the networks of a table are evaluated
BATCH = 64


class Split(NamedTuple):
    """Images and their classes."""

    images: Tensor  # (images, 1, 8, 8)
    labels: Tensor  # (images,), int64


class Digits(NamedTuple):
    """Digits in three parts, and the value of a black pixel."""

    train: Split
    validation: Split
    test: Split
    black: float


def load_split(dtype: torch.dtype = torch.float32) -> Digits:
    """Load the digits.

    Example:
        >>> [len(part.labels) for part in load_split()[:3]]
        [597, 600, 600]
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(pixels))
    images = torch.from_numpy(pixels[order].reshape(-1, 1, 8, 8) / 16)
    mean, deviation = images[:TRAIN].mean(), images[:TRAIN].std(correction=0)
    images = ((images - mean) / deviation).to(dtype)
    classes = torch.from_numpy(labels[order].astype(np.int64))
    ends = (0, TRAIN, TRAIN + IMAGES, TRAIN + 2 * IMAGES)
    train, validation, test = (Split(images[a:b], classes[a:b]) for a, b in pairwise(ends))
    return Digits(train, validation, test, black=float(-mean / deviation))


def shifted(images: Tensor, black: float) -> Tensor:
    """Shift images by up to a pixel in both directions.

    Returns:
        Views of shape (images, 3, 3, 1, 8, 8); [:, 1, 1] are the images themselves.
    """
    padded = F.pad(images, (1, 1, 1, 1), value=black)
    return padded.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5)


class Batch(NamedTuple):
    """Training batch, and its share of the learning rate: half a cosine from 1 to 0."""

    rows: Tensor  # numbers of images
    shifts: Tensor  # of their rows and columns, 0 to 2, (images, 2)
    share: float


def epochs_of(train: Split, epochs: int, seed: int) -> Iterator[list[Batch]]:
    """Yield the batches of each epoch.

    Example:
        >>> batches = next(epochs_of(load_split().train, epochs=8, seed=0))
        >>> len(batches), batches[0].share
        (10, 1.0)
    """
    generator, count = np.random.default_rng(seed), len(train.labels)
    steps = epochs * math.ceil(count / BATCH)
    shares = iter((1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))
    for _ in range(epochs):
        order = torch.split(torch.from_numpy(generator.permutation(count)), BATCH)
        shifts = torch.split(torch.from_numpy(generator.integers(0, 3, (count, 2))), BATCH)
        yield [Batch(*each, next(shares)) for each in zip(order, shifts, strict=True)]
