"""Scale of a training loss, inferred from its gradient at the model's outputs.

Where a target is certain, the gradient is the factor of the loss times a probability; a soft target
makes it smaller. So the largest ratio of the two bounds the factor from below, and equals it where
targets are certain.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Scale(NamedTuple):
    """Scale of the training loss, inferred from the gradients at the outputs."""

    factor: float  # the loss is at least so many times the mean negative log-likelihood
    hard: bool  # targets are mostly certain, so that ``factor`` is exact
    fits: bool  # whether any targets explain the gradients
    even: bool = True  # all certain targets have one factor


def infer_scale(g: Tensor, expected: Tensor, rounding: float) -> Scale | None:
    """Return the largest ratio of a gradient to that of certain targets.

    Args:
        g: Gradients, (n,).
        expected: Those of certain targets and factor 1, (n,).
        rounding: Rounding error of the gradients.

    Returns:
        None if no gradient is above its rounding error.
    """
    if g.numel() == 0 or not bool(g.isfinite().all()):
        return None
    exact = g > rounding
    ratio, expected = (g / expected)[exact], expected[exact]
    if ratio.numel() == 0:
        return None
    factor = float(ratio.max())
    certain = ratio > 0.98 * factor
    share = certain.double().mean()
    # at p = 1 a smoothed target of the predicted class gives every row the same ratio, too
    told = bool((expected[certain] < 0.98).any())
    return Scale(factor, bool(share > 0.4) and told, True, bool(share > 0.98))


def rounding_of_probabilities(output: Tensor, classes: int = 2) -> float:
    """Bound the rounding errors of the probabilities of a row, which add up to 1.

    A logit's distance d from the largest one is rounded to d · eps / 2, and so is log p; the sum
    of p |log p| is at most the logarithm of the classes.
    """
    return torch.finfo(output.dtype).eps * (4.0 + math.log(classes))
