"""Models of the training studies, by short name.

The micro ones have about 0.1M parameters and take 8×8 grey images, so that a study can be run on
digits in minutes. ViTRM micro and ViT micro see the same four patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm

from smallfry.errors import UsageError, nearest


@dataclass(frozen=True)
class Entrant:
    """Model in a study.

    Args:
        label: Its name for people.
        model: Its name in timm's registry.
        options: Keyword arguments, besides classes, channels and image size.
    """

    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recursive(self) -> bool:
        """True for a ViTRM."""
        return self.model.startswith("vitrm_")


PAPER = {
    "vitrm_small": Entrant("ViTRM small", "vitrm_small_patch4_32"),
    "vit_small": Entrant("ViT-S", "paper_vit_small_patch4_32"),
    "vit_base": Entrant("ViT-B", "paper_vit_base_patch4_32"),
    "vit_large": Entrant("ViT-L", "paper_vit_large_patch4_32"),
    "resnet18": Entrant("ResNet-18, 7×7 stem", "paper_resnet18_32"),
    "resnet34": Entrant("ResNet-34, 7×7 stem", "paper_resnet34_32"),
    "resnet50": Entrant("ResNet-50, 7×7 stem", "paper_resnet50_32"),
}
MICRO = {
    "vitrm_micro": Entrant("ViTRM micro", "vitrm_micro_patch4_8"),
    "vit_micro": Entrant(
        "ViT micro",
        "paper_vit_small_patch4_32",
        {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
    ),
    "cct_micro": Entrant(
        "CCT micro",
        "cct_2_3x2_32",
        {"convolutions": 1, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
    ),
    "resnet_micro": Entrant(
        "ResNet-10 micro, 3×3 stem",
        "resnet18_cifar",
        {"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64]},
    ),
    "vitrm_micro_thrifty": Entrant(
        "ViTRM micro, thrifty", "vitrm_micro_patch4_8", {"cross_attention": True, "latents": 1}
    ),
}
ENTRANTS = {
    **PAPER,
    "vitrm_thrifty": Entrant("ViTRM thrifty", "vitrm_thrifty_patch4_32"),
    "vitrm_tiny": Entrant("ViTRM tiny", "vitrm_tiny_patch4_32"),
    "cct_6_3x1": Entrant("CCT-6/3×1", "cct_6_3x1_32"),
    "cct_7_3x1": Entrant("CCT-7/3×1", "cct_7_3x1_32"),
    "resnet18_cifar": Entrant("ResNet-18, 3×3 stem", "resnet18_cifar"),
    **MICRO,
}


def find_entrant(name: str) -> Entrant:
    """Find the entrant of a name, or any model of timm.

    Raises:
        UsageError: Neither.
    """
    if name in ENTRANTS:
        return ENTRANTS[name]
    if not timm.is_model(name):
        raise UsageError(f"unknown model '{name}'{nearest(name, ENTRANTS)}")
    return Entrant(name, name)


def find_vitrm(name: str) -> Entrant:
    """Find a recursive entrant by name.

    Raises:
        UsageError: It does not, or there is none.
    """
    entrant = find_entrant(name)
    if not entrant.recursive:
        raise UsageError(f"{name} is not a ViTRM; try vitrm_small")
    return entrant


def find_entrants(names: Sequence[str]) -> dict[str, Entrant]:
    """Find the entrants of these names, each once.

    Raises:
        UsageError: There are none, or one is unknown.
    """
    if not names:
        raise UsageError("models is empty; give at least one")
    return {name: find_entrant(name) for name in names}
