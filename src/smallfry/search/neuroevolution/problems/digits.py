"""Classification of handwritten digits, with the loss as fitness."""

import numpy as np

from smallfry.search.neuroevolution.deep_ga import Evaluated
from smallfry.search.neuroevolution.network import Array, forward
from smallfry.search.tables.digits import load_split

__all__ = ["Digits"]


class Digits:
    """Digits of 8×8 pixels: 597 to train, 600 to validate; MLP 64-32-10.

    The behaviour is the share of the images given to each class.
    """

    sizes: tuple[int, ...] = (64, 32, 10)
    power = 0.02
    solved: float | None = None
    episodes = 1

    def __init__(self) -> None:
        split = load_split()
        parts = {"train": split.train, "validation": split.validation}
        self._images = {name: part.images.numpy().reshape(-1, 64) for name, part in parts.items()}
        self._labels = {name: part.labels.numpy() for name, part in parts.items()}

    def __call__(self, weights: Array, seed: int, episodes: int = 1) -> Evaluated:
        """Evaluate networks on all training images."""
        logits = self._logits(weights, "train").astype(np.float64)
        top = logits.max(2, keepdims=True)
        normalizers = np.log(np.exp(logits - top).sum(2)) + top[..., 0]
        chosen = logits[:, np.arange(logits.shape[1]), self._labels["train"]]
        classes = logits.argmax(2)
        shares = [(classes == label).mean(1) for label in range(10)]
        return Evaluated((chosen - normalizers).mean(1), np.stack(shares, 1))

    def accuracy(self, weights: Array) -> float:
        """Return the share of correct validation images of a network, (parameters,)."""
        answers = self._logits(weights[None], "validation")[0].argmax(1)
        return float((answers == self._labels["validation"]).mean())

    def _logits(self, weights: Array, part: str) -> Array:
        images = self._images[part]
        return forward(self.sizes, weights, np.broadcast_to(images, (len(weights), *images.shape)))
