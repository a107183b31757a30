"""Losses of codes and masks, one number for each picture (Lian & Ling, ICCV 2023, section 3.4)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.kits.pose.models import PoseCodes
from smallfry.kits.pose.truth import Truth, codes

__all__ = ["code_loss", "mask_loss", "place_loss", "terms", "total"]

PLACES = 10.0  # weight of the distance of mean places, which are below 1; ours
BESIDE = 0.2  # of the crop's side, to which places outside the crop are drawn at most


def code_loss(logits: Tensor, bits: Tensor, inside: Tensor) -> Tensor:
    """Compute the mean cross-entropy of the bits of keypoints in the crop, (batch,).

    Args:
        logits: (batch, bits, points).
        bits: The same, 0 or 1.
        inside: (batch, points), 0 or 1.
    """
    found = F.binary_cross_entropy_with_logits(logits, bits, reduction="none")
    counted = found * inside[:, None]
    return counted.sum(dim=(1, 2)) / (inside.sum(dim=1) * logits.shape[1]).clamp(min=1)


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean distance of probabilities (batch, side, side) to a mask, (batch,).

    A mask of another size is brought to the logits' by the nearest pixel.
    """
    wanted = F.interpolate(mask[:, None], logits.shape[-2:], mode="nearest")[:, 0]
    return (logits.sigmoid() - wanted).abs().mean(dim=(1, 2))


def place_loss(places: Tensor, truth: Truth) -> Tensor:
    """Compute the mean distance in x and in y of mean places to the true ones, (batch,); ours.

    Args:
        places: (batch, 2, points), shares of the crop's side.
        truth: The truth.
    """
    crop = truth.crop[:, None]
    wanted = ((truth.pixels - crop[..., :2]) / crop[..., 2:]).clamp(-BESIDE, 1 + BESIDE)
    return (places - wanted.transpose(1, 2)).abs().mean(dim=(1, 2))


def terms(outputs: PoseCodes, truth: Truth) -> dict[str, Tensor]:
    """Compute the terms of the loss, (batch,) each; the loss is their sum."""
    wanted = codes(truth, outputs.x.shape[1])
    in_crop = F.binary_cross_entropy_with_logits(
        outputs.in_roi[:, 0], wanted.inside, reduction="none"
    )
    return {
        "in_roi": in_crop.mean(dim=1),
        "x": code_loss(outputs.x, wanted.x, wanted.inside),
        "y": code_loss(outputs.y, wanted.y, wanted.inside),
        "seen": mask_loss(outputs.masks[:, 0], truth.masks[:, 0]),
        "whole": mask_loss(outputs.masks[:, 1], truth.masks[:, 1]),
        "places": PLACES * place_loss(outputs.places, truth),
    }


def total(outputs: PoseCodes, truth: Truth) -> Tensor:
    """Compute the loss of each picture, (batch,)."""
    return torch.stack([*terms(outputs, truth).values()]).sum(dim=0)
