"""Scores of classifiers, bit-identical to torchmetrics, whose import takes seconds."""

import torch
from torch import Tensor

BINS = 15


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Compute the share of images whose class is right.

    Args:
        predicted: (images,), int64 class indices.
        labels: (images,), int64 class indices.
    """
    return (predicted == labels).float().mean().item()


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Compute the expected calibration error: Σ share |accuracy − confidence| over 15 equal bins.

    Guo et al. 2017, arXiv 1706.04599.

    Args:
        probabilities: (images, classes).
        labels: (images,), int64 class indices.
    """
    confidence, predicted = probabilities.float().max(dim=1)
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype)
    places = torch.bucketize(confidence, edges, right=True) - 1
    counts, sums, hits = (torch.zeros(BINS + 1) for _ in range(3))  # the last bin is that of 1
    counts.scatter_add_(0, places, torch.ones_like(confidence))
    sums.scatter_add_(0, places, confidence)
    hits.scatter_add_(0, places, (predicted == labels).float())
    gaps = ((hits / counts).nan_to_num() - (sums / counts).nan_to_num()).abs()
    return (gaps * (counts / counts.sum())).sum().item()
