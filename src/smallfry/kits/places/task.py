"""Recognising places: spiking modules that are fitted without gradients, and their recall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from smallfry.data import ImageData, Split
from smallfry.errors import UsageError
from smallfry.kits.places.images import patch_normalise
from smallfry.kits.places.models import SpikingPlaces
from smallfry.kits.places.modules import FEWEST, ModularSNN
from smallfry.kits.places.presentation import image_spikes
from smallfry.kits.places.scores import (
    absolute_difference,
    precision_recall,
    recall_at,
    ridge,
)
from smallfry.tasks import register
from smallfry.tasks.task import Fitted, TaskDefaults
from smallfry_runtime.decoders import places as decoder

__all__ = ["Places", "baselines", "synaptic_events"]


@register
@dataclass(frozen=True)
class Places:
    """Places of a route: scores (images, places), labels (images,).

    Its model is fitted by local learning. ``accuracy`` is recall@1 with tolerance 0; ``loss`` is
    what is missing of it.
    """

    name: ClassVar[str] = "places"
    likelihood: ClassVar[str] = "categorical"
    choices: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "modular_snn", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset()
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the number of places."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the places."""
        return labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the share of images without their place."""
        return 1 - self.right(outputs, targets).double().mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the images whose best place is right, and has a score, (images,)."""
        best = outputs.max(dim=1)
        return (best.indices == targets) & (best.values != 0)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute recall at 1 and 5, the area under precision and recall, and its end."""
        scores, truth = outputs.double().numpy(), labels.numpy()
        curve = precision_recall(scores, truth)
        recall = recall_at(scores, truth)
        return {
            "loss": 1 - recall,
            "accuracy": recall,
            "recall_at_5": recall_at(scores, truth, 5),
            "recall_within_1": recall_at(scores, truth, tolerance=1),
            "area": curve.area,
            "recall_at_full_precision": curve.recall_at_full_precision,
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by recall@1, then by the area."""
        return scores["accuracy"], scores["area"]

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode places; see ``smallfry_runtime.decoders.places``."""
        return decoder.decode(np.asarray(outputs.detach().float().cpu()), classes, settings)

    def fit(self, model: nn.Module, data: ImageData) -> Fitted:
        """Fit the modules to the reference traverses, and calibrate them on the validation split.

        Raises:
            UsageError: Another model.
        """
        if not isinstance(model, SpikingPlaces):
            raise UsageError("the task places fits modular_snn alone: leave out model")
        references = _traverses(data)
        queries, truth = data.validation.images[:, 0], data.validation.labels
        modules, found = model.fit(references, queries, truth)
        notes = []
        if 0 < len(truth) < FEWEST:
            notes.append(
                f"{len(truth)} calibration places: of fewer than {FEWEST}, the threshold is chosen "
                "by chance"
            )
        facts: dict[str, Any] = {
            "modules": len(modules.weights),
            "theta": round(float(modules.theta.mean()), 2),
            "threshold": modules.threshold,
            "unreachable_places": len(modules.unreachable),
            "synaptic_events": round(synaptic_events(modules, data.test.images[:20, 0].numpy())),
        }
        if found is not None:
            facts["calibration_recall"] = {str(t): r for t, r in found.recalls.items()}
            facts["calibration_queries"] = found.queries
        return Fitted(facts, baselines(references.numpy(), data.test), notes)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the scores of all places, and precision over recall."""
        from smallfry.kits.places.pictures import draw_curves, draw_scores

        scores, truth = outputs.double().numpy(), split.labels.numpy()
        draw_scores(scores, truth, folder / "scores.png")
        draw_curves({"spiking modules": scores}, truth, folder / "precision_recall.png")

    def explain(
        self,
        model: nn.Module,
        split: Split,
        normalize: Any,
        classes: Sequence[str],
        folder: Path,
    ) -> None:
        """Draw the receptive fields and the activity of neurons."""
        from smallfry.kits.places.pictures import draw_activity, draw_fields

        if isinstance(model, SpikingPlaces):
            modules = model.modules_of_places
            draw_fields(modules, folder / "receptive_fields.png")
            draw_activity(modules, folder / "hyperactive.png")


def baselines(references: Any, tested: Split) -> list[dict[str, Any]]:
    """Compute recall@1 of image difference and of ridge regression on the same pixels.

    Args:
        references: (traverses, places, side, side).
        tested: The query images, among all places.
    """
    known = patch_normalise(references).reshape(*references.shape[:2], -1)
    asked = patch_normalise(tested.images[:, 0].numpy()).reshape(len(tested), known.shape[2])
    found = {
        "image difference": absolute_difference(known, asked),
        "ridge": ridge(known, asked),
    }
    truth = tested.labels.numpy()
    return [
        {"name": name, "test_accuracy": recall_at(scores, truth)} for name, scores in found.items()
    ]


def synaptic_events(modules: ModularSNN, images: Any) -> float:
    """Count the synaptic events an image, spikes times fan-out, a proxy of energy.

    Args:
        modules: Fitted modules.
        images: (images, side, side).
    """
    arriving = image_spikes(images, modules.settings.seed, modules.settings.dt).sum()
    fired = modules.respond(images).sum()
    each = modules.weights.shape[0] * modules.weights.shape[2]
    # of an excitatory spike: to its partner, and of the partner's spike to all others
    return float((arriving * each + fired * modules.weights.shape[2]) / len(images))


def _traverses(data: ImageData) -> Tensor:
    """Return the training images by traverse and place, (traverses, places, side, side)."""
    images, labels = data.train.images[:, 0], data.train.labels
    count = len(labels) // len(data.classes)
    wanted = torch.arange(len(data.classes)).repeat_interleave(count)
    order = labels.argsort(stable=True)
    if not torch.equal(labels[order], wanted):
        raise UsageError("places needs as many training images of each place: whole traverses")
    return images[order].view(len(data.classes), count, *images.shape[1:]).transpose(0, 1)
