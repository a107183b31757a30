"""Reported figures for ViTRM and its rivals, kept apart from measured ones.

Top-1 test accuracy in percent. Those of arXiv 2603.19503 are the best test epoch of one run; each
rival names its source.
"""

from collections.abc import Mapping
from typing import NamedTuple

SOURCE = "arXiv 2603.19503, best test epoch of one run"
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
SIZES = (64, 128, 256, 512, 1024)

_ACCURACY: Mapping[str, Mapping[str, tuple[float | None, ...]]] = {  # None: out of memory
    "cifar10": {
        "vitrm_small": (92.6, 93.1, 92.8, 92.1, 91.2),
        "vit_small": (94.0, 93.9, 93.3, 92.8, 91.1),
        "vit_base": (93.7, 93.8, 94.3, 94.1, 94.0),
        "vit_large": (80.8, 73.4, 82.0, 83.2, None),
        "resnet18": (90.5, 89.7, 88.8, 87.8, 86.1),
        "resnet34": (90.8, 90.1, 89.7, 87.9, 86.3),
        "resnet50": (92.0, 90.9, 89.7, 87.9, 84.2),
    },
    "cifar100": {
        "vitrm_small": (71.8, 72.1, 72.0, 71.3, 69.8),
        "vit_small": (76.1, 75.2, 74.8, 72.7, 71.2),
        "vit_base": (72.4, 74.6, 75.4, 76.4, 75.1),
        "vit_large": (61.1, 58.9, 61.7, 64.7, None),
        "resnet18": (64.6, 63.4, 62.1, 60.5, 58.2),
        "resnet34": (65.4, 63.8, 62.0, 58.8, 56.7),
        "resnet50": (63.8, 63.4, 61.5, 58.0, 54.5),
    },
}
ACCURACY: Mapping[str, Mapping[str, Mapping[int, float | None]]] = {
    data: {name: dict(zip(SIZES, values, strict=True)) for name, values in of_data.items()}
    for data, of_data in _ACCURACY.items()
}
MILLIONS: Mapping[str, Mapping[str, float]] = {
    "cifar10": {
        "vitrm_small": 3.6,
        "vit_small": 16.9,
        "vit_base": 85.1,
        "vit_large": 302.4,
        "resnet18": 11.2,
        "resnet34": 21.3,
        "resnet50": 23.5,
    },
    "cifar100": {
        "vitrm_small": 3.7,
        "vit_small": 16.9,
        "vit_base": 85.2,
        "vit_large": 302.5,
        "resnet18": 11.2,
        "resnet34": 21.3,
        "resnet50": 23.7,
    },
}
RECURSION_GRID = "n ∈ {1, 2, 3, 6, 12} × N_sup ∈ {1, 2, 4, 8, 16}"
BEST_RECURSION = {"latent_steps": 3, "supervision_steps": 1}  # of that grid


class Rival(NamedTuple):
    """Figure from another paper."""

    label: str
    source: str
    epochs: int | None
    millions: float  # of parameters
    accuracy: float


CCT, SIMPLENET = "arXiv 2104.05704", "arXiv 1608.06037"
RIVALS: Mapping[str, tuple[Rival, ...]] = {
    "cifar10": (
        Rival("CCT-7/3×1", CCT, 300, 3.76, 96.53),
        Rival("CCT-7/3×1", CCT, 1500, 3.76, 97.48),
        Rival("CCT-7/3×1", CCT, 5000, 3.76, 98.00),
        Rival("SimpleNet", SIMPLENET, None, 5.5, 95.4),
    ),
    "cifar100": (
        Rival("CCT-7/3×1", CCT, 300, 3.76, 80.92),
        Rival("CCT-7/3×1", CCT, 1500, 3.76, 82.72),
        Rival("CCT-7/3×1", CCT, 5000, 3.76, 82.87),
    ),
}


def shown_for(data: str) -> str:
    """Return the data set whose reported figures are shown with this one's measurements."""
    return data if data in ACCURACY else "cifar10"
