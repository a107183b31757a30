"""smallfry: small networks that do the work of big ones.

Importing it registers its models with timm: ``timm.create_model("vitrm_small_patch4_32")``. They
are registered when timm is imported, before or after smallfry, and nothing here imports PyTorch
before it is used. A device that only runs exports takes ``smallfry_runtime`` instead.
"""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import smallfry_runtime as smallfry_runtime  # turns ONNX Runtime's telemetry off
from smallfry.version import __version__

if TYPE_CHECKING:
    from smallfry import models, optim
    from smallfry.costing import Cost, cost

__all__ = ["Cost", "__version__", "cost", "models", "optim"]

_HOMES = {"Cost": "smallfry.costing", "cost": "smallfry.costing"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"smallfry.{name}")
    raise AttributeError(f"module 'smallfry' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


with suppress(ImportError):  # the optimizers do without timm and this hook
    from wrapt import register_post_import_hook

    register_post_import_hook(lambda timm: import_module("smallfry.models"), "timm")
