"""A subject of an analysis whose features are its pixels, so that all numbers can be computed."""

import torch
from torch import nn

from smallfry.analysis.question import Subject
from smallfry.data import Split
from smallfry.training.augment import Normalize
from smallfry.training.run import TrainedModel

CLASSES = ("ant", "bee", "cat", "dog")


class Flat(nn.Module):
    """Linear classifier of pixels."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
        self.head.weight.data = weight.float()
        if bias is not None:
            self.head.bias.data = bias.float()

    def get_classifier(self):
        return self.head

    def forward(self, images):
        return self.head(images.flatten(1))


def split_of(pixels, labels):
    """Square grey images of pixels (images, side²)."""
    side = round(pixels.shape[1] ** 0.5)
    return Split(pixels.view(-1, 1, side, side), torch.arange(len(pixels)), labels)


def trained_of(weight, bias=None, classes=CLASSES):
    """A classifier of pixels, which are its inputs as they are."""
    side, normalize = round(weight.shape[1] ** 0.5), Normalize([0.0], [1 / 255])
    return TrainedModel(Flat(weight, bias), tuple(classes[: len(weight)]), side, 1, normalize, {})


def subject_of(training, test, trained, others=None, corruptions=(), seed=0):
    """A subject named flat."""
    return Subject("flat", trained, training, test, others or {}, corruptions, seed)
