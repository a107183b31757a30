"""Import aliases for renamed and moved modules.

Importing an old name returns the current module with a DeprecationWarning, until version 0.2.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    f"smallfry.{old}": new
    for old, new in {
        "answers": "smallfry_runtime.predictions",
        "confusion": "smallfry.report.confusion",
        "data.draws": "smallfry.data.philox",
        "data.scanned": "smallfry.data.shard_scan",
        "decoding": "smallfry_runtime.decoding",
        "demo.answers": "smallfry.demo.routes",
        "demo.connections": "smallfry_runtime.serving.connections",
        "demo.guard": "smallfry_runtime.serving.guard",
        "demo.middleware": "smallfry_runtime.serving.guard",
        "demo.thinking": "smallfry.demo.trace",
        "deploy.description": "smallfry.deploy.hub_config",
        "deploy.facts": "smallfry.deploy.run_metadata",
        "deploy.manifest": "smallfry_runtime.manifest",
        "deploy.runtime": "smallfry_runtime.runtime",
        "exits": "smallfry_runtime.early_exit",
        "images": "smallfry_runtime.images",
        "inputs": "smallfry_runtime.inputs",
        "memory": "smallfry.deploy.memory",
        "names": "smallfry_runtime.names",
        "onednn": "smallfry.kernels.onednn",
        "plain_yaml": "smallfry.io.safe_yaml",
        "reading": "smallfry_runtime.files",
        "report.deployment": "smallfry.deploy.benchmark_page",
        "signals": "smallfry.io.signals",
        "studies.entrants": "smallfry.studies.study_models",
        "terminal": "smallfry.io.terminal",
        "training.started": "smallfry.training.launch_env",
        "training.rebuild": "smallfry.transforms.build",
        "writing": "smallfry.io.replace",
    }.items()
}


class OldNames(MetaPathFinder, Loader):
    """Import finder for moved modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the specification of an old name; None for any other."""
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Defer to the import system; ``exec_module`` substitutes the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Bind the current module to the old name."""
        old = module.__name__
        new = MOVED[old]
        warnings.warn(f"{old} has moved to {new}", DeprecationWarning, stacklevel=6)
        sys.modules[old] = import_module(new)


def install() -> None:
    """Enable imports by old names."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
