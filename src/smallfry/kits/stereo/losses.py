"""Loss of RTS2Net: over its exits, smooth L1 of both disparities, and weighted cross-entropy.

    L = Σ_j W_j (L_d + 2 L_s + 2 L_dr),  W = ¼, ½, 1 from coarse to fine

Dovesi et al., ICRA 2020, section III-D.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.kits.stereo.models import FACTORS
from smallfry.kits.stereo.truth import Truth, at_exit

__all__ = ["disparity_loss", "semantic_loss", "terms", "total"]

EXIT_WEIGHTS = (0.25, 0.5, 1.0)
TERM_WEIGHTS = {"disparity": 1.0, "semantics": 2.0, "refined": 2.0}
COARSE = 0.1  # γ, of images that are labelled in part


def disparity_loss(found: Tensor, wanted: Tensor, known: Tensor) -> Tensor:
    """Compute the mean smooth L1 over known pixels (batch, height, width), (batch,)."""
    errors = F.smooth_l1_loss(found, wanted, reduction="none") * known
    return errors.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)


def semantic_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted cross-entropy, a mean over the labelled pixels, (batch,).

    It is multiplied by 1 + γ × unlabelled / labelled pixels, so that images that are labelled in
    part count no less.

    Args:
        logits: (batch, classes, height, width).
        labels: (batch, height, width); −1 unknown.
        weights: (batch, classes).
    """
    known = labels >= 0
    index = labels.clamp(min=0)
    found = -logits.log_softmax(dim=1).gather(1, index[:, None])[:, 0]
    factors = weights.gather(1, index.flatten(1)).view_as(found) * known
    labelled = known.sum(dim=(1, 2))
    unlabelled = known[0].numel() - labelled
    mean = (found * factors).sum(dim=(1, 2)) / labelled.clamp(min=1)
    return mean * (1 + COARSE * unlabelled / labelled.clamp(min=1))


def terms(outputs: Any, truth: Truth) -> dict[str, Tensor]:
    """Compute the terms of the loss of each exit, weighted by neither, (batch,) each."""
    found: dict[str, Tensor] = {}
    for factor in FACTORS[: len(outputs) // 3]:
        wanted = at_exit(truth, factor)
        for name in ("disparity", "refined"):
            found[f"{name}{factor}"] = disparity_loss(
                getattr(outputs, f"{name}{factor}"), wanted.disparity, wanted.known
            )
        found[f"semantics{factor}"] = semantic_loss(
            getattr(outputs, f"semantics{factor}"), wanted.labels, truth.weights
        )
    return found


def total(outputs: Any, truth: Truth) -> Tensor:
    """Compute the loss of each pair, (batch,)."""
    exits = dict(zip(FACTORS, EXIT_WEIGHTS, strict=True))
    parts = []
    for name, value in terms(outputs, truth).items():
        kind = name.rstrip("0123456789")
        parts.append(exits[int(name[len(kind) :])] * TERM_WEIGHTS[kind] * value)
    return torch.stack(parts).sum(dim=0)
