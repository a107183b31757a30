"""Architectures, registered with timm on import."""

from smallfry.models import baselines, cct, mobilenet_ulsam
from smallfry.models.contract import FromImages, LatentRecursive, RecursionStep, Recursive
from smallfry.models.dhvt import DHVT
from smallfry.models.gated_mlp import GatedMLP
from smallfry.models.loopnet import LoopNet
from smallfry.models.simplenet import SimpleNet
from smallfry.models.skipblocknet import SkipblockNet
from smallfry.models.vitrm import State, ViTRM
from smallfry.models.vitrm_plus import ViTRMPlus

__all__ = [
    "DHVT",
    "FromImages",
    "GatedMLP",
    "LatentRecursive",
    "LoopNet",
    "RecursionStep",
    "Recursive",
    "SimpleNet",
    "SkipblockNet",
    "State",
    "ViTRM",
    "ViTRMPlus",
    "baselines",
    "cct",
    "mobilenet_ulsam",
]
