"""Poses of one object: loss and scores of codes, poses by PnP, and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from smallfry.data import Split
from smallfry.errors import DataError
from smallfry.kits.pose import losses
from smallfry.kits.pose.estimates import as_arrays, estimates, pose_errors
from smallfry.kits.pose.metrics import SHARES, area_under, diameter, rotation_error
from smallfry.kits.pose.truth import Truth, codes, unpack
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults
from smallfry_runtime.decoders import pose as decoder
from smallfry_runtime.pnp import Camera, project

__all__ = ["PoseTask"]

FAR = 0.1  # metres, of the area under the curve
SAME = 0.05  # pixels between the keypoints of the network and those of the data


@register
@dataclass(frozen=True)
class PoseTask:
    """Poses: outputs are ``PoseCodes``, labels rows of ``truth.pack``.

    A pose is right if its error is below a tenth of the object's diameter: the mean distance of the
    keypoints (ADD), of symmetric objects that to the nearest one (ADI).
    """

    name: ClassVar[str] = "pose"
    likelihood: ClassVar[Any] = dict.fromkeys(("in_roi", "x", "y"), "bernoulli_mean")
    augmentations: ClassVar[frozenset[str]] = frozenset({"cutout", "erasing", "color_jitter"})
    choices: ClassVar[tuple[str, ...]] = ("accuracy", "mean_error", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "checkerpose_s", "cross_entropy")
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the number of objects."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Truth:
        """Unpack the truth of pictures.

        Raises:
            DataError: The data has no poses.
        """
        return unpack(labels)

    def terms(self, outputs: Any, targets: Truth) -> dict[str, Tensor]:
        """Compute the terms of the loss, (pictures,) each; the loss is their sum."""
        return losses.terms(outputs, targets)

    def losses(self, outputs: Any, targets: Truth) -> Tensor:
        """Compute the loss of each picture, (pictures,)."""
        return losses.total(outputs, targets)

    def loss(self, outputs: Any, targets: Truth) -> Tensor:
        """Compute the mean loss of pictures."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Any, targets: Truth) -> Tensor:
        """Mark the pictures where nine in ten keypoints are at most a cell off, (pictures,).

        A picture without a keypoint in its crop is not right: no pose can be found in it.
        """
        wanted = codes(targets, outputs.x.shape[1])
        worth = 2 ** torch.arange(outputs.x.shape[1] - 1, -1, -1, device=outputs.x.device)
        worth = worth[:, None].to(wanted.x.dtype)
        apart = [
            (((found > 0).to(true.dtype) - true) * worth).sum(dim=1).abs() <= 1
            for found, true in ((outputs.x, wanted.x), (outputs.y, wanted.y))
        ]
        inside = wanted.inside > 0
        near = (apart[0] & apart[1] & inside).sum(dim=1)
        right: Tensor = (near >= 0.9 * inside.sum(dim=1)) & inside.any(dim=1)
        return right

    def metrics(self, outputs: Any, labels: Tensor) -> dict[str, float]:
        """Score a split.

        Returns:
            The loss; ``accuracy``, the share of right poses, and those within 0.02 and 0.05 of the
            diameter; ``auc``, the area under the share of errors up to 10 cm; ``mean_error`` of
            poses, in diameters; the medians of ``rotation_error``, degrees, and
            ``translation_error``, metres; ``no_pose``; the shares of right bits: ``in_roi``, and
            ``bit_1``, … of those whose bits before are right; and ``mask_iou`` of what is seen.

        Raises:
            DataError: The network's keypoints are of another object than the data's.
        """
        truth = unpack(labels)
        arrays = as_arrays(outputs)
        require_same_object(arrays["points"][0], truth)
        found = estimates(arrays, truth)
        errors = pose_errors(arrays["points"][0], truth, found)
        size = diameter(np.asarray(arrays["points"][0], np.float64))
        posed = [
            (truth.pose(i), each.pose) for i, each in enumerate(found) if each.pose is not None
        ]
        turns = [rotation_error(true.rotation, pose.rotation) for true, pose in posed]
        shifts = [np.linalg.norm(true.translation - pose.translation) for true, pose in posed]
        return {
            "loss": self.loss(outputs, truth).item(),
            "accuracy": float((errors < SHARES[2]).mean()),
            "within_0.02": float((errors < SHARES[0]).mean()),
            "within_0.05": float((errors < SHARES[1]).mean()),
            "auc": area_under(errors * size, FAR),
            "mean_error": float(errors.mean()),
            "rotation_error": float(np.median(turns)) if turns else 180.0,
            "translation_error": float(np.median(shifts)) if shifts else FAR,
            "no_pose": 1 - len(posed) / max(1, len(found)),
            **bit_scores(outputs, truth),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by right poses, then by the loss."""
        return scores["accuracy"], -scores["loss"]

    def decode(
        self, outputs: Any, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode poses; settings are ``smallfry_runtime.decoders.pose.Settings``."""
        return decoder.decode(as_arrays(outputs), classes, settings)

    def draw(self, outputs: Any, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw pictures with the keypoints of the true and the estimated pose, and their errors."""
        from smallfry.kits.pose.pictures import draw_keypoints, draw_poses

        truth = unpack(split.labels)
        draw_poses(outputs, split, truth, folder / "poses.png")
        draw_keypoints(outputs, truth, folder / "keypoints.png")


def bit_scores(outputs: Any, truth: Truth) -> dict[str, float]:
    """Compute shares of right bits, and the intersection over union of masks of what is seen."""
    wanted = codes(truth, outputs.x.shape[1])
    inside = wanted.inside > 0
    scores = {"in_roi": ((outputs.in_roi[:, 0] > 0) == inside).double().mean().item()}
    asked = torch.stack([inside, inside])
    for bit in range(outputs.x.shape[1]):
        pairs = ((outputs.x, wanted.x), (outputs.y, wanted.y))
        right = torch.stack([(f[:, bit] > 0) == (t[:, bit] > 0) for f, t in pairs])
        scores[f"bit_{bit + 1}"] = (right & asked).sum().item() / max(1, asked.sum().item())
        asked = asked & right
    seen, mask = outputs.masks[:, 0] > 0, truth.masks[:, 0] > 0
    both, any_of = (seen & mask).sum().item(), (seen | mask).sum().item()
    return {**scores, "mask_iou": both / max(1, any_of)}


def require_same_object(points: Any, truth: Truth) -> None:
    """Refuse data whose keypoints are not the network's, by their places in the first picture.

    Raises:
        DataError: They are others.
    """
    camera = Camera(*truth.camera[0].tolist())
    places = project(np.asarray(points, np.float64), truth.pose(0), camera)
    wanted = truth.pixels[0].double().numpy()
    if places.shape != wanted.shape or np.abs(places - wanted).max() > SAME:
        raise DataError(
            "the network's keypoints are of another object than the data's: give both the same "
            "shape (model.options.shape, data.options.shape), or the mesh's keypoints in "
            "model.options.keypoints"
        )
