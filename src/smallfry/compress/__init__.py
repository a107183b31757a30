"""Compression: methods that shrink a model, after or during training.

The settings of every registered method are here by their class, such as ``compress.LowRank``.
"""

from typing import Any

from smallfry.compress.pipeline import Session, apply, apply_to_model
from smallfry.training.method import Method, Setting, methods, register_method

__all__ = [
    "Method",
    "Session",
    "Setting",
    "apply",
    "apply_to_model",
    "methods",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for settings in methods().values():
            if settings.__name__ == name:
                return settings
    raise AttributeError(f"module 'smallfry.compress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*__all__, *(settings.__name__ for settings in methods().values())})
