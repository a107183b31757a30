"""Architectures. Importing this package registers them with timm."""

from smallfry.models import baselines, cct
from smallfry.models.vitrm import RecursionStep, State, ViTRM

__all__ = ["RecursionStep", "State", "ViTRM", "baselines", "cct"]
