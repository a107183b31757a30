"""Scores of disparities and classes at full size, for each exit.

    EPE     mean distance to the true disparity, in pixels
    D1      share of pixels with an error above 3 pixels and above 5 % of the truth (KITTI)
    bad-1   share of pixels with an error above 1 pixel

Disparities and logits of an exit are enlarged bilinearly to the views' size first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.kits.stereo.models import FACTORS
from smallfry.kits.stereo.truth import Truth

__all__ = ["Errors", "full_disparity", "full_labels", "mean_iou", "score"]

AT_ONCE = 64  # pairs


class Errors:
    """Sums over pixels of disparity errors."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, found: Tensor, wanted: Tensor, chosen: Tensor) -> None:
        """Add the chosen pixels of disparities (batch, height, width)."""
        error = (found - wanted).abs()[chosen].double()
        truth = wanted[chosen].double()
        self.sums += torch.stack(
            [
                torch.tensor(float(len(error)), dtype=torch.float64),
                error.sum(),
                ((error > 3) & (error > 0.05 * truth)).sum().double(),
                (error > 1).sum().double(),
            ]
        )

    def means(self) -> dict[str, float]:
        """Return the EPE, D1 and bad-1 of the pixels so far; 0 without any."""
        count = max(1.0, self.sums[0].item())
        return dict(zip(("epe", "d1", "bad1"), (self.sums[1:] / count).tolist(), strict=True))


def full_disparity(found: Tensor, factor: int) -> Tensor:
    """Enlarge an exit's disparities (batch, height, width) to the views' size and pixels."""
    large = F.interpolate(found[:, None], scale_factor=factor, mode="bilinear", align_corners=False)
    return large[:, 0] * factor


def full_labels(logits: Tensor, factor: int) -> Tensor:
    """Choose the class of each pixel at the views' size, (batch, height, width)."""
    large = F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)
    return large.argmax(dim=1)


def mean_iou(counts: Tensor) -> float:
    """Compute the mean over classes of intersection over union.

    Args:
        counts: (classes, classes): pixels of a true class, by row, and a chosen one. Classes that
            are in neither don't count.
    """
    both = counts.diagonal().double()
    union = (counts.sum(0) + counts.sum(1)).double() - both
    there = union > 0
    return (both[there] / union[there]).mean().item() if there.any() else 0.0


def score(outputs: Any, truth: Truth) -> dict[str, float]:
    """Score the outputs for a split.

    Returns:
        Of exit 1, 2, … ``epe_1``, ``d1_1``, ``bad1_1`` where both views see the point,
        ``epe_all_1`` and ``d1_all_1`` of all known pixels, ``epe_plain_1`` before the refinement,
        ``miou_1`` and ``pixels_1``, the share of right classes; and ``depth_error``, in metres, of
        the last exit, where the cameras are known.
    """
    classes = truth.weights.shape[1]
    factors = FACTORS[: len(outputs) // 3]
    sums = [{name: Errors() for name in ("", "all", "plain")} for _ in factors]
    counts = torch.zeros(len(factors), classes * classes, dtype=torch.int64)
    depth = torch.zeros(2, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(truth.labels)), AT_ONCE):
        disparity, known = truth.disparity[rows], truth.known[rows]
        chosen = known & ~truth.hidden[rows]
        labels = truth.labels[rows]
        for i, factor in enumerate(factors):
            plain, refined, logits = (each[rows] for each in outputs[3 * i : 3 * i + 3])
            found = full_disparity(refined, factor)
            sums[i][""].add(found, disparity, chosen)
            sums[i]["all"].add(found, disparity, known)
            sums[i]["plain"].add(full_disparity(plain, factor), disparity, chosen)
            pairs = labels * classes + full_labels(logits, factor)
            counts[i] += torch.bincount(pairs[labels >= 0], minlength=classes**2)
        depth += _depth_errors(found, truth, rows, chosen)
    scores: dict[str, float] = {}
    for i in range(len(factors)):
        near, everywhere, plain = (sums[i][name].means() for name in ("", "all", "plain"))
        table = counts[i].view(classes, classes)
        scores |= {f"{name}_{i + 1}": value for name, value in near.items()}
        scores |= {f"{name}_all_{i + 1}": everywhere[name] for name in ("epe", "d1")}
        scores[f"epe_plain_{i + 1}"] = plain["epe"]
        scores[f"miou_{i + 1}"] = mean_iou(table)
        scores[f"pixels_{i + 1}"] = (table.diagonal().sum() / table.sum().clamp(min=1)).item()
    if depth[0] > 0:
        scores["depth_error"] = (depth[1] / depth[0]).item()
    return scores


def _depth_errors(found: Tensor, truth: Truth, rows: Tensor, chosen: Tensor) -> Tensor:
    """Return the number of pixels with a depth Z = f B / (d + offset), and their errors' sum."""
    scale, offset = (each[rows][:, None, None].expand_as(found) for each in truth[-2:])
    true = truth.disparity[rows] + offset
    near = (found + offset).clamp(min=0.5)  # farther than that, a depth is no estimate
    usable = chosen & (scale > 0) & (true > 0)
    errors = (scale / near - scale / true.clamp(min=1e-6)).abs()[usable].double()
    return torch.stack([usable.sum().double(), errors.sum()])
