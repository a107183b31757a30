"""Architectures: each module of this package registers its own with timm."""

from smallfry.io.plugins import scan
from smallfry.models.contract import (
    FromImages,
    LatentRecursive,
    ReadsOut,
    RecursionStep,
    Recursive,
)
from smallfry.models.loopnet import LoopNet
from smallfry.models.trm import TRM
from smallfry.models.vitrm import State, ViTRM
from smallfry.models.vitrm_plus import ViTRMPlus

scan(__name__)

__all__ = [
    "TRM",
    "FromImages",
    "LatentRecursive",
    "LoopNet",
    "ReadsOut",
    "RecursionStep",
    "Recursive",
    "State",
    "ViTRM",
    "ViTRMPlus",
]
