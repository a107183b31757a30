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
class StudyModel:
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
    "vitrm_small": StudyModel("ViTRM small", "vitrm_small_patch4_32"),
    "vit_small": StudyModel("ViT-S", "paper_vit_small_patch4_32"),
    "vit_base": StudyModel("ViT-B", "paper_vit_base_patch4_32"),
    "vit_large": StudyModel("ViT-L", "paper_vit_large_patch4_32"),
    "resnet18": StudyModel("ResNet-18, 7×7 stem", "paper_resnet18_32"),
    "resnet34": StudyModel("ResNet-34, 7×7 stem", "paper_resnet34_32"),
    "resnet50": StudyModel("ResNet-50, 7×7 stem", "paper_resnet50_32"),
}
MICRO = {
    "vitrm_micro": StudyModel("ViTRM micro", "vitrm_micro_patch4_8"),
    "vit_micro": StudyModel(
        "ViT micro",
        "paper_vit_small_patch4_32",
        {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
    ),
    "cct_micro": StudyModel(
        "CCT micro",
        "cct_2_3x2_32",
        {"convolutions": 1, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
    ),
    "resnet_micro": StudyModel(
        "ResNet-10 micro, 3×3 stem",
        "resnet18_cifar",
        {"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64]},
    ),
    "vitrm_micro_thrifty": StudyModel(
        "ViTRM micro, thrifty", "vitrm_micro_patch4_8", {"cross_attention": True, "latents": 1}
    ),
}
LOOPNETS = ("70k", "300k", "1m", "2m")
STUDY_MODELS = {
    **PAPER,
    "vitrm_thrifty": StudyModel("ViTRM thrifty", "vitrm_thrifty_patch4_32"),
    "vitrm_tiny": StudyModel("ViTRM tiny", "vitrm_tiny_patch4_32"),
    "cct_2_3x2": StudyModel("CCT-2/3×2", "cct_2_3x2_32"),
    "cct_4_3x2": StudyModel("CCT-4/3×2", "cct_4_3x2_32"),
    "cct_6_3x1": StudyModel("CCT-6/3×1", "cct_6_3x1_32"),
    "cct_7_3x1": StudyModel("CCT-7/3×1", "cct_7_3x1_32"),
    "resnet18_cifar": StudyModel("ResNet-18, 3×3 stem", "resnet18_cifar"),
    "resnet8_mlperf_tiny": StudyModel("ResNet-8 of MLPerf Tiny", "resnet8_mlperf_tiny"),
    "resnet20_he": StudyModel("ResNet-20", "resnet20_he"),
    "mobilenetv3_small": StudyModel("MobileNetV3 small", "mobilenetv3_small_100"),
    "simplenet_310k": StudyModel("SimpleNet 310k", "simplenet_cifar_310k"),
    **{f"loopnet_{n}": StudyModel(f"LoopNet {n}", f"loopnet_{n}") for n in LOOPNETS},
    **MICRO,
}


def find_study_model(name: str) -> StudyModel:
    """Find the study model of a name, or any model of timm.

    Raises:
        UsageError: Neither.
    """
    if name in STUDY_MODELS:
        return STUDY_MODELS[name]
    if not timm.is_model(name):
        raise UsageError(f"unknown model '{name}'{nearest(name, STUDY_MODELS)}")
    return StudyModel(name, name)


def label_of(name: str) -> str:
    """Return the label of a study model, or the name of another model."""
    return STUDY_MODELS[name].label if name in STUDY_MODELS else name


def find_vitrm(name: str) -> StudyModel:
    """Find a recursive study model by name.

    Raises:
        UsageError: It does not, or there is none.
    """
    entry = find_study_model(name)
    if not entry.recursive:
        raise UsageError(f"{name} is not a ViTRM; try vitrm_small")
    return entry


def find_study_models(names: Sequence[str]) -> dict[str, StudyModel]:
    """Find the study models of these names, each once.

    Raises:
        UsageError: There are none, or one is unknown.
    """
    if not names:
        raise UsageError("models is empty; give at least one")
    return {name: find_study_model(name) for name in names}
