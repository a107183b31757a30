"""Runtime of smallfry's exports: ONNX Runtime, NumPy and Pillow, and no PyTorch.

>>> from smallfry_runtime import Runtime
>>> Runtime("exports/digits").predict(["photo.png"])  # doctest: +SKIP
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from smallfry_runtime.version import __version__

if TYPE_CHECKING:
    from smallfry_runtime.manifest import Manifest
    from smallfry_runtime.runtime import Predictions, Runtime

__all__ = ["Manifest", "Predictions", "Runtime", "__version__"]

# ONNX Runtime's own builds send telemetry to their makers from its import on, by default.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {"Manifest": "manifest", "Predictions": "runtime", "Runtime": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'smallfry_runtime' has no attribute '{name}'")
    return getattr(import_module(f"smallfry_runtime.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
