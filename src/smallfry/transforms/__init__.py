"""Identity of models: specs, and the transforms that turn one spec into another."""

from smallfry.io.json import Plain
from smallfry.order import Stage
from smallfry.transforms.build import build
from smallfry.transforms.registry import kinds, register
from smallfry.transforms.spec import ModelSpec, Transform

__all__ = ["ModelSpec", "Plain", "Stage", "Transform", "build", "kinds", "register"]
