"""smallfry: small networks that do the work of big ones.

Importing it registers its models with timm: ``timm.create_model("vitrm_small_patch4_32")``. They
are registered when timm is imported, before or after smallfry, and nothing here imports PyTorch
before it is used. A device that only runs exports takes ``smallfry_runtime`` instead.
"""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import smallfry_runtime as smallfry_runtime  # turns ONNX Runtime's telemetry off
from smallfry._moved import install
from smallfry.version import __version__

if TYPE_CHECKING:
    from smallfry import analysis, compress, curvature, data, models, optim
    from smallfry.costing import Cost, cost
    from smallfry.deploy.export import export
    from smallfry.deploy.pretrained import load_trained as load
    from smallfry.training.train import run as train

__all__ = [
    "Cost",
    "__version__",
    "analysis",
    "compress",
    "cost",
    "curvature",
    "data",
    "export",
    "load",
    "models",
    "optim",
    "train",
]

_HOMES = {
    "Cost": "smallfry.costing.Cost",
    "cost": "smallfry.costing.cost",
    "export": "smallfry.deploy.export.export",
    "load": "smallfry.deploy.pretrained.load_trained",
    "train": "smallfry.training.train.run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, function = _HOMES[name].rpartition(".")
        return getattr(import_module(module), function)
    if name in __all__:
        return import_module(f"smallfry.{name}")
    raise AttributeError(f"module 'smallfry' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


install()
with suppress(ImportError):  # the optimizers do without timm and this hook
    from wrapt import register_post_import_hook

    register_post_import_hook(lambda timm: import_module("smallfry.models"), "timm")
