"""Last layer of a classifier."""

from torch import nn

__all__ = ["linear_classifier"]


def linear_classifier(features: int, classes: int, bias: bool = True) -> nn.Module:
    """Create a linear layer from features to classes, or the identity for 0 classes.

    Example:
        >>> from smallfry.layers.classifier import linear_classifier
        >>> linear_classifier(16, 10), linear_classifier(16, 0)
        (Linear(in_features=16, out_features=10, bias=True), Identity())
    """
    return nn.Linear(features, classes, bias) if classes else nn.Identity()
