"""Deployment: export, quantization, runtimes, latency, sharing.

``Runtime`` and ``Manifest`` need ONNX Runtime, NumPy and Pillow, and never import PyTorch. They are
imported when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smallfry_runtime.manifest import Manifest
    from smallfry_runtime.runtime import Predictions, Runtime

__all__ = ["Manifest", "Predictions", "Runtime"]

_HOMES = {"Manifest": "manifest", "Predictions": "runtime", "Runtime": "runtime"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"smallfry_runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'smallfry.deploy' has no attribute '{name}'")
