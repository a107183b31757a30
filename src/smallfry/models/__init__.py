"""Architectures. Importing this package registers them with timm."""

from smallfry.models import baselines, cct
from smallfry.models.vitrm import RecursionStep, State, ViTRM
from smallfry.models.vitrm_plus import ViTRMPlus

__all__ = ["RecursionStep", "State", "ViTRM", "ViTRMPlus", "baselines", "cct"]
