"""Late fusion: a weighted sum of several classifiers' scores.

The weights minimise the cross-entropy of held-out images, which is convex in them. They scale the
scores as well, so that those of a support vector machine join a network's logits.

Source: Simonyan, Vedaldi, Zisserman, "Deep Fisher Networks for Large-Scale Image Classification",
NIPS 2013, where a Fisher network and a convolutional one are fused; these weights are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.errors import UsageError

__all__ = ["fuse", "fusion_weights"]

STEPS = 200  # of L-BFGS at most


def fuse(scores: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add scores by weights, (images, classes).

    Args:
        scores: Of each classifier, (images, classes).
        weights: (classifiers,).
    """
    return torch.einsum("k,kic->ic", weights.to(scores[0]), torch.stack(list(scores)))


def fusion_weights(scores: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Find the weights with the least cross-entropy, (classifiers,), float64.

    Args:
        scores: Of each classifier on images that none was trained on, (images, classes).
        labels: Their classes (images,).

    Raises:
        UsageError: Scores of different images or classes.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> weights = fusion_weights([scores, -scores], torch.tensor([0, 1, 1]))
        >>> bool((fuse([scores, -scores], weights).argmax(1) == torch.tensor([0, 1, 0])).all())
        True
    """
    if len({each.shape for each in scores}) != 1 or len(scores[0]) != len(labels):
        raise UsageError(
            "late fusion needs scores of the same images and classes, got "
            f"{', '.join(str(tuple(each.shape)) for each in scores)} for {len(labels)} labels"
        )
    exact = [each.detach().double() for each in scores]
    spread = torch.stack([each.std().clamp(min=1e-12) for each in exact])
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
