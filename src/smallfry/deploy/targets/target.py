"""Interface of device formats, and their registry by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from smallfry.data import ImageData
from smallfry.errors import UsageError, nearest
from smallfry.io.plugins import load_plugins, scan
from smallfry.training.run import TrainedModel
from smallfry_runtime.manifest import Manifest
from smallfry_runtime.runtime import Predictions

PACKAGE = "smallfry.deploy.targets"
T = TypeVar("T", bound=type)

_targets: dict[str, "Target"] = {}


class Answering(Protocol):
    """Loaded export.

    Attributes:
        manifest: Classes, preprocessing and exits.
        file_bytes: Size of the model's files.
    """

    manifest: Manifest
    file_bytes: int

    def predict(self, images: NDArray[np.uint8], *, threshold: float | None = None) -> Predictions:
        """Predict class probabilities of pixels (images, channels, size, size)."""


class Target(Protocol):
    """Device format.

    Attributes:
        name: Name in commands, such as onnx.
        precisions: Supported precisions, of float32, int8 and own_bits.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]

    def export(
        self,
        trained: TrainedModel,
        facts: dict[str, Any],
        folders: Mapping[str, Path],
        data: ImageData,
    ) -> None:
        """Export a model, with its early exit calibrated on validation images.

        Args:
            trained: The model.
            facts: Its metadata, as ``deploy.pretrained.gather`` returns it.
            folders: Folder of each export by precision; it replaces an earlier one.
            data: Images in the form that the model takes; ranges are of training images.

        Raises:
            ExportError: It can't be exported.
        """

    def load(self, folder: Path, threads: int) -> Answering:
        """Load an export, to run on so many CPU threads."""


def register_target(kind: T) -> T:
    """Register a device format by its ``name``; a decorator."""
    _targets[kind.name] = kind()  # type: ignore[attr-defined]
    return kind


def targets() -> dict[str, Target]:
    """Return all device formats by name."""
    scan(PACKAGE)
    load_plugins()
    return dict(_targets)


def find_target(name: str) -> Target:
    """Find a device format by name.

    Raises:
        UsageError: There is none.
    """
    known = targets()
    if name not in known:
        raise UsageError(f"target: there is no device format '{name}'{nearest(name, known)}")
    return known[name]
