"""Truth of two views as one row of numbers, and truth of the exits that follows from it.

    height, width, focal length × baseline (pixels × metres), offset of disparities, classes, the
    weights of the classes, then two maps: disparities, and classes

A disparity of 0 is unknown, a negative one that of a point that the other view doesn't see. A class
of −1 is unknown.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.errors import DataError, UsageError

__all__ = ["ExitTruth", "Truth", "at_exit", "class_weights", "pack", "unpack"]

HEAD = 5
KAPPA = 1.12
UNKNOWN = -1


class Truth(NamedTuple):
    """Truth of pairs of views, batch first."""

    disparity: Tensor  # (batch, height, width), pixels; only where ``known``
    known: Tensor  # (batch, height, width), bool
    hidden: Tensor  # (batch, height, width), bool: the right view doesn't see the point
    labels: Tensor  # (batch, height, width), int64; −1 unknown
    weights: Tensor  # (batch, classes): of the classes in the loss
    scale: Tensor  # (batch,): focal length × baseline; 0 if the cameras are not known
    offset: Tensor  # (batch,): added to a disparity before it becomes a depth


class ExitTruth(NamedTuple):
    """Truth at the size of an exit."""

    disparity: Tensor  # (batch, height, width), pixels of that size
    known: Tensor  # bool
    labels: Tensor  # int64; −1 unknown


def class_weights(shares: NDArray[np.float64], kappa: float = KAPPA) -> NDArray[np.float64]:
    """Compute weights of classes by their shares of the pixels; they sum to the classes.

    W_k = K / (log(P_k + κ) Σ_i 1 / log(P_i + κ)): Dovesi et al., who take κ = 1.12 for Cityscapes
    and 2 for KITTI.

    Raises:
        UsageError: κ of 1 or less, whose logarithm could be 0.
    """
    if not kappa > 1:
        raise UsageError(f"kappa is above 1, got {kappa}")
    inverse = 1 / np.log(shares + kappa)
    result: NDArray[np.float64] = len(shares) * inverse / inverse.sum()
    return result


def pack(
    disparity: NDArray[np.float64],
    hidden: NDArray[np.bool_],
    labels: NDArray[np.int64],
    classes: int,
    scale: float = 0.0,
    offset: float = 0.0,
) -> NDArray[np.float32]:
    """Pack the truth of a pair; see ``Truth``. Weights of classes are 1.

    Args:
        disparity: (height, width), pixels; 0 unknown.
        hidden: (height, width).
        labels: (height, width); −1 unknown.
        classes: How many there are.
        scale: Focal length × baseline, in pixels × metres.
        offset: Added to a disparity before it becomes a depth.
    """
    head = [*disparity.shape, scale, offset, classes, *[1.0] * classes]
    signed = np.where(hidden, -disparity, disparity)
    return np.concatenate([head, signed.ravel(), labels.ravel()]).astype(np.float32)


def weighted(rows: Tensor, weights: NDArray[np.float64]) -> Tensor:
    """Return packed rows with other weights of classes."""
    found = rows.clone()
    found[:, HEAD : HEAD + len(weights)] = torch.from_numpy(weights).to(rows)
    return found


def unpack(rows: Tensor) -> Truth:
    """Unpack the truth of pairs, (batch, numbers).

    Raises:
        DataError: Rows of another form.
    """
    usable = rows.ndim == 2 and rows.shape[1] > HEAD and len(rows) > 0
    head = rows[0, :HEAD].tolist() if usable else [0.0] * HEAD
    height, width, classes = int(head[0]), int(head[1]), int(head[4])
    if not usable or rows.shape[1] != HEAD + classes + 2 * height * width or not height:
        raise DataError(
            "the task stereo needs pairs of views with disparities: name generated ones (--data "
            "stereo-planes), or a folder (--data stereo-folder --data.root DIR)"
        )
    parts = torch.split(rows, [HEAD, classes, height * width, height * width], dim=1)
    signed = parts[2].view(-1, height, width)
    return Truth(
        signed.abs(),
        signed != 0,
        signed < 0,
        parts[3].view(-1, height, width).to(torch.int64),
        parts[1],
        parts[0][:, 2],
        parts[0][:, 3],
    )


def at_exit(truth: Truth, factor: int) -> ExitTruth:
    """Reduce truth to blocks of factor × factor pixels.

    A block's disparity is the mean of its known ones over the factor, unknown if fewer than half
    are; its class is the most frequent known one, of equals the first.
    """
    batch, height, width = truth.labels.shape
    blocks = (batch, height // factor, factor, width // factor, factor)
    known = truth.known.view(blocks).sum(dim=(2, 4))
    total = (truth.disparity * truth.known).view(blocks).sum(dim=(2, 4))
    counts = torch.stack(
        [(truth.labels == k).view(blocks).sum(dim=(2, 4)) for k in range(truth.weights.shape[1])]
    )
    most, labels = counts.max(dim=0)
    labels = torch.where(most > 0, labels, torch.full_like(labels, UNKNOWN))
    return ExitTruth(total / known.clamp(min=1) / factor, 2 * known >= factor**2, labels)
