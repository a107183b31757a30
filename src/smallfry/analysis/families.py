"""Families of building blocks, each as networks of several origins.

Networks of one version share code and differ in scale; an attack is tested on versions that it was
not trained on. Names are timm's, or torchvision's after a colon.
"""

from collections.abc import Iterator
from typing import NamedTuple

import timm
import torch
from torch import nn

__all__ = ["FAMILIES", "Member", "build_member", "members"]

FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "plain 3×3": (
        ("vgg11", "vgg16"),
        ("vgg11_bn", "vgg16_bn"),
        ("simplenet_cifar_310k",),
        ("loopnet_1m", "loopnet_2m"),
    ),
    "residual": (("resnet18", "resnet34"), ("resnet20_he",), ("seresnet18",)),
    "bottleneck": (
        ("resnet26", "resnet50"),
        ("resnext50_32x4d",),
        ("regnetx_002", "regnetx_004"),
        ("seresnet50",),
    ),
    "fire": ((":squeezenet1_0",), (":squeezenet1_1",)),
    "depthwise separable": (("mobilenetv1_100",), ("lcnet_050", "lcnet_100"), ("xception41",)),
    "inverted residual": (
        ("mobilenetv2_050", "mobilenetv2_100"),
        ("mnasnet_100",),
        ("fbnetc_100",),
        (":mobilenet_v2",),
    ),
    "inverted residual with gates": (
        ("efficientnet_b0", "efficientnet_b1"),
        ("mobilenetv3_small_100", "mobilenetv3_large_100"),
        ("semnasnet_100",),
        ("tinynet_a", "tinynet_e"),
    ),
    "shuffle": ((":shufflenet_v2_x0_5",), (":shufflenet_v2_x1_0",), (":shufflenet_v2_x2_0",)),
    "dense": (("densenet121",), (":densenet161",), (":densenet169",)),
    "transformer": (
        ("vit_tiny_patch16_224", "vit_small_patch32_224"),
        ("deit3_small_patch16_224",),
        ("vit_lite_2_4_32", "cvt_2_4_32"),
    ),
    "hybrid": (("mobilevit_xxs", "mobilevit_xs"), ("mobilevitv2_050",), ("edgenext_xx_small",)),
    "recursive": (
        ("vitrm_micro_patch4_8",),
        ("vitrm_tiny_patch4_32", "vitrm_small_patch4_32"),
        ("vitrm_thrifty_patch4_32",),
        ("vitrm_plus_small_32",),
    ),
}
SIDES = {"vit_tiny": 224, "vit_small": 224, "deit3": 224, "vitrm_micro": 8}  # by name's beginning
SMALL = ("simplenet", "loopnet", "resnet20", "vit_lite", "cvt", "vitrm")  # 32 pixels
SIDE = 96  # pixels of the others


class Member(NamedTuple):
    """Network of a family."""

    name: str
    family: str
    version: str  # of its code: the first name
    side: int


def members() -> Iterator[Member]:
    """Yield all networks, family by family."""
    for family, versions in FAMILIES.items():
        for version in versions:
            for name in version:
                yield Member(name, family, version[0], _side(name))


def build_member(member: Member) -> tuple[nn.Module, tuple[int, int, int]]:
    """Build a network on the device "meta", and the shape of its images."""
    with torch.device("meta"):
        if member.name.startswith(":"):
            from torchvision import models

            model: nn.Module = models.get_model(member.name[1:], weights=None)
        else:
            model = timm.create_model(member.name, pretrained=False)
    channels = 1 if member.side == SIDES["vitrm_micro"] else 3
    return model, (channels, member.side, member.side)


def _side(name: str) -> int:
    for start, side in SIDES.items():
        if name.startswith(start):
            return side
    return 32 if name.startswith(SMALL) else SIDE
