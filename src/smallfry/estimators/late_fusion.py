"""Late fusion: a weighted sum of several classifiers' scores.

The weights minimise the cross-entropy of held-out images, which is convex in them. They scale the
scores as well, so that those of a support vector machine join a network's logits.

Source: Simonyan, Vedaldi, Zisserman, "Deep Fisher Networks for Large-Scale Image Classification",
NIPS 2013, where a Fisher network and a convolutional one are fused; these weights are ours.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.errors import UsageError

__all__ = ["fuse", "fusion_weights"]

STEPS = 200  # of L-BFGS at most
EQUAL = 1e-12  # deviation of scores, of the largest, up to which they are equal


def fuse(scores: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add scores by weights, (images, classes).

    Args:
        scores: Of each classifier, (images, classes); the sum has the finest of their types.
        weights: (classifiers,).

    Raises:
        UsageError: Scores of different images or classes, of none, or another number of weights.
    """
    _require_alike(scores)
    if weights.shape != (len(scores),):
        raise UsageError(
            f"weights are one of each of {len(scores)} classifiers, got {tuple(weights.shape)}"
        )
    kind = functools.reduce(torch.promote_types, (each.dtype for each in scores))
    kind = kind if kind.is_floating_point else weights.dtype
    stacked = torch.stack([each.to(kind) for each in scores])
    return torch.einsum("k,kic->ic", weights.to(stacked), stacked)


def fusion_weights(scores: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Find the weights with the least cross-entropy, (classifiers,), float64.

    Args:
        scores: Of each classifier on images that none was trained on, (images, classes).
        labels: Their classes (images,).

    Raises:
        UsageError: Scores of different images or classes, or of none, or that are no numbers, or
            labels that are no classes.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> weights = fusion_weights([scores, -scores], torch.tensor([0, 1, 1]))
        >>> bool((fuse([scores, -scores], weights).argmax(1) == torch.tensor([0, 1, 0])).all())
        True
    """
    _require_alike(scores)
    if len(scores[0]) != len(labels) or not len(labels):
        shape = tuple(scores[0].shape)
        raise UsageError(
            f"late fusion needs scores and labels of the same images, got {shape} for "
            f"{len(labels)} labels"
        )
    classes = scores[0].shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(f"labels are 0 to {classes - 1}, as the scores have {classes} classes")
    if not all(bool(each.isfinite().all()) for each in scores):
        raise UsageError("late fusion needs finite scores, and some are infinite or not numbers")
    exact = [each.detach().double() for each in scores]
    spread = torch.stack([each.std(correction=0) for each in exact])
    largest = torch.stack([each.abs().max() for each in exact])
    spread = torch.where(spread > EQUAL * largest, spread, 1.0)
    exact = [each / unit for each, unit in zip(exact, spread, strict=True)]
    weights = torch.ones(len(exact), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        # the square keeps separable scores from infinite weights
        value = F.cross_entropy(fuse(exact, weights), labels) + 1e-6 * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach() / spread


def _require_alike(scores: Sequence[Tensor]) -> None:
    """Require scores of the same images and classes."""
    if not all(isinstance(each, Tensor) for each in scores):
        raise UsageError("scores are tensors (images, classes), one of each classifier")
    shapes = [tuple(each.shape) for each in scores]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        listed = ", ".join(map(str, shapes)) or "none"
        raise UsageError(f"late fusion needs scores of the same images and classes, got {listed}")
