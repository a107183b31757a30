"""Colour teacher: a support vector machine that labels pixels, and so images for students.

Features of a pixel are R, G, B, H, S, V, a* and b* of CIELAB, and its row over the height, all
standardised. What it has learned from ten labelled images it writes over any number of others.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError

__all__ = ["EXAMPLES", "ColourTeacher", "Teacher", "majority", "pixel_features", "pseudo_label"]

EXAMPLES = 10  # labelled images
PIXELS = 3000  # of them that the machine is fitted to
WHITE = np.array([0.95047, 1.0, 1.08883])  # D65
TO_XYZ = np.array(  # of linear sRGB, IEC 61966-2-1
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


class Teacher(Protocol):
    """Anything that makes masks of images."""

    def label(self, image: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the mask (height, width) of an image (3, height, width)."""


class ColourTeacher:
    """Support vector machine of pixel colours, with a 3×3 majority filter.

    Args:
        machine: A fitted pipeline of scikit-learn.
        classes: Number of classes.
    """

    def __init__(self, machine: Any, classes: int) -> None:
        self.machine, self.classes = machine, classes

    @classmethod
    def fit(
        cls,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        seed: int = 0,
        fast: bool = False,
    ) -> Self:
        """Fit to labelled images.

        Args:
            images: (images, 3, height, width).
            labels: (images, height, width).
            seed: Seed of the choice of 3,000 pixels.
            fast: A linear machine on features and their squares, in place of a radial kernel.

        Raises:
            UsageError: Images without labels of each pixel, or of a single class, also by chance
                among the chosen pixels.
        """
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC, LinearSVC

        if labels.shape != (len(images), *images.shape[2:]):
            raise UsageError(
                f"a teacher needs a label for each pixel, {(len(images), *images.shape[2:])}, got "
                f"{labels.shape}"
            )
        random = np.random.default_rng(seed)
        chosen = random.permutation(labels.size)[:PIXELS]
        if len(np.unique(labels.ravel()[chosen])) < 2:
            raise UsageError("a teacher needs pixels of two classes or more")
        features = np.concatenate([pixel_features(image) for image in images])
        machine: Any
        if fast:
            machine = make_pipeline(_Squares(), StandardScaler(), LinearSVC())
        else:
            machine = make_pipeline(StandardScaler(), SVC(C=10, gamma="scale"))
        machine.fit(features[chosen], labels.ravel()[chosen])
        return cls(machine, int(labels.max()) + 1)

    def label(self, image: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the mask (height, width) of an image (3, height, width)."""
        found = self.machine.predict(pixel_features(image)).reshape(image.shape[1:])
        return majority(np.asarray(found, np.int64), self.classes)


class _Squares:
    """Features with their squares, as a step of a pipeline."""

    def fit(self, features: NDArray[Any], labels: NDArray[Any]) -> Self:
        """Learn nothing."""
        return self

    def transform(self, features: NDArray[Any]) -> NDArray[Any]:
        """Append the squares."""
        return np.hstack([features, features**2])


def pseudo_label(teacher: Teacher, images: Sequence[Any] | NDArray[np.uint8]) -> NDArray[np.int64]:
    """Label images by a teacher, (images, height, width)."""
    return np.stack([teacher.label(image) for image in images])


def pixel_features(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute R, G, B, H, S, V, a*, b* and the row of each pixel, (pixels, 9).

    Args:
        image: (3, height, width), sRGB.
    """
    rgb = image.reshape(3, -1).T / 255
    value, chroma = rgb.max(axis=1), np.ptp(rgb, axis=1)
    saturation = np.divide(chroma, value, out=np.zeros_like(value), where=value > 0)
    red, green, blue = rgb.T
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [chroma == 0, value == red, value == green],
        [np.zeros_like(value), ((green - blue) / safe) % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ TO_XYZ.T / WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    a, b = 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])
    rows = np.repeat(np.arange(image.shape[1]) / image.shape[1], image.shape[2])
    return np.column_stack([rgb, hue / 6, saturation, value, a, b, rows])


def majority(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Replace each label by the most frequent one of its 3×3 neighbourhood, the lowest of equals.

    Pixels outside the image count for none.
    """
    rows, columns = labels.shape
    votes = np.zeros((classes, rows, columns), np.int64)
    for number in range(classes):
        padded = np.pad(labels == number, 1).astype(np.int64)
        for i in range(3):
            for j in range(3):
                votes[number] += padded[i : i + rows, j : j + columns]
    return np.asarray(votes.argmax(axis=0), np.int64)
