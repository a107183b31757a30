"""Architectures, registered with timm on import."""

from smallfry.models import baselines, cct
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
    "baselines",
    "cct",
]
