"""Reading texts: the loss of connectionist temporal classification, and scores of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults
from smallfry_runtime.decoders import ocr as decoder

__all__ = ["OCR", "require_feasible"]

BLANK = 0
SHOWN = 8  # texts of a picture


@register
@dataclass(frozen=True)
class OCR:
    """Texts: logits (images, steps, symbols), labels (images, longest), filled up with 0.

    The loss is the mean of -log p(text), not divided by its length; Graves et al., ICML 2006. It
    has no likelihood of single steps: natural gradient takes the empirical Fisher by default;
    ``optimizer.options {fisher: mc}`` approximates it, and samples each step by itself.
    """

    name: ClassVar[str] = "ocr"
    likelihood: ClassVar[str] = "categorical"
    fisher: ClassVar[str] = "empirical"
    choices: ClassVar[tuple[str, ...]] = ("accuracy", "character_error", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "crnn_dw_m", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset(
        {
            *("crop_padding", "border", "cutout", "erasing", "repeats", "policy", "color_jitter"),
            *("randaugment_ops", "randaugment_magnitude"),
        }
    )
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the number of symbols, the blank among them."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the labels (images, longest).

        Raises:
            UsageError: The data has one label for an image, not a text.
        """
        if labels.ndim != 2:
            raise UsageError(
                "the task ocr needs images of texts: name generated words (--data ocr-words), or "
                "a folder with a file of labels (--data ocr-folder --data.root DIR)"
            )
        return labels

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute -log p of each text, (images,)."""
        steps = torch.full((len(outputs),), outputs.shape[1], dtype=torch.int64)
        return F.ctc_loss(
            outputs.float().log_softmax(dim=-1).transpose(0, 1),
            targets,
            steps,
            (targets != BLANK).sum(dim=1),
            blank=BLANK,
            reduction="none",
            zero_infinity=True,  # such texts are refused as data is made: ``require_feasible``
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean of -log p over the texts of a batch."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the texts whose likeliest path is right, (images,)."""
        found = decoder.right(_numpy(outputs), targets.cpu().numpy())
        return torch.from_numpy(found).to(outputs.device)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the loss, the share of right texts, and edits over symbols."""
        found = [decoder.greedy(decoder.log_softmax(row)).symbols for row in _numpy(outputs)]
        wanted = [tuple(row[row != BLANK].tolist()) for row in labels]
        edits = sum(map(decoder.edit_distance, found, wanted))
        right = sum(one == other for one, other in zip(found, wanted, strict=True))
        return {
            "loss": self.loss(outputs, labels).item(),
            "accuracy": right / max(1, len(wanted)),
            "character_error": edits / max(1, sum(map(len, wanted))),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by right texts, then by the loss."""
        return scores["accuracy"], -scores["loss"]

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode texts; settings are ``smallfry_runtime.decoders.ocr.Settings``."""
        return decoder.decode(_numpy(outputs), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the worst texts with their probabilities, and the confused characters."""
        from smallfry.kits.ocr.pictures import draw_confusion, draw_texts

        worst = self.losses(outputs, split.labels).argsort(descending=True, stable=True)[:SHOWN]
        draw_texts(outputs[worst], split.take(worst), classes, folder / "texts.png")
        draw_confusion(outputs, split.labels, classes, folder / "characters.png")


def require_feasible(labels: Sequence[Sequence[int]], steps: int) -> list[bool]:
    """Mark the texts that a number of steps can hold: one a symbol, and one between equal ones."""
    repeats = [sum(a == b for a, b in pairwise(text)) for text in labels]
    return [len(text) + again <= steps for text, again in zip(labels, repeats, strict=True)]


def _numpy(outputs: Tensor) -> Any:
    return np.asarray(outputs.detach().float().cpu())
