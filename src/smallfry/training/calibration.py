"""Calibration images: a spread sample of a split, without augmentation."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smallfry.data import Split
from smallfry.training.augment import Normalize

IMAGES, BATCH = 256, 64
EXAMPLES = 2  # images that groups of channels are verified on


class CalibrationBatches:
    """Batches of normalised images, reread in each iteration.

    Args:
        split: Split of the images.
        normalize: From uint8 to what the model takes.
        model: Gives dtype and device.
        images: Number of images, at most.
    """

    def __init__(
        self, split: Split, normalize: Normalize, model: nn.Module, images: int = IMAGES
    ) -> None:
        self._split, self._normalize, self._model = split, normalize, model
        count = min(images, len(split))
        last = max(0, len(split) - 1)
        self._positions = torch.linspace(0, last, count, dtype=torch.float64).long()

    def __iter__(self) -> Iterator[Tensor]:
        return (self._prepared(part) for part in torch.split(self._positions, BATCH))

    def __len__(self) -> int:
        return -(-len(self._positions) // BATCH)

    def example(self) -> Tensor:
        """Return the first two images, (2, channels, height, width)."""
        return self._prepared(self._positions[:EXAMPLES])

    def every(self) -> "CalibrationBatches":
        """Return batches of all images of the split, in order."""
        return CalibrationBatches(self._split, self._normalize, self._model, len(self._split))

    def prepared(self, pixels: Tensor) -> Tensor:
        """Normalise other pixels as those of the split."""
        images = self._normalize(pixels)
        weight = next((p for p in self._model.parameters() if p.is_floating_point()), None)
        return images if weight is None else images.to(weight.device, weight.dtype)

    def _prepared(self, positions: Tensor) -> Tensor:
        return self.prepared(self._split.take(positions).images)
