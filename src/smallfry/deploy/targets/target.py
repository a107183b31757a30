"""Interface of device formats, and their registry by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from smallfry.deploy.graphs import Graph
from smallfry.errors import UsageError, nearest
from smallfry.io.plugins import load_plugins, scan
from smallfry.io.registry import add

PACKAGE = "smallfry.deploy.targets"
T = TypeVar("T", bound=type)

_targets: dict[str, Any] = {}


@dataclass(frozen=True)
class Source:
    """Graphs of a model to convert.

    Args:
        onnx: The graphs as ONNX by name, in float32 or, for own_bits, with the model's own codes.
        modules: The same as modules of PyTorch, in float32.
        images: Normalised images to measure ranges on, (images, channels, height, width).
        recursion_steps: Number of applications of a graph ``step``.
        metadata: Classes, and how pictures become inputs.
    """

    onnx: Mapping[str, bytes]
    modules: Sequence[Graph]
    images: NDArray[np.float32]
    recursion_steps: int
    metadata: Mapping[str, Any]


class Target(Protocol):
    """Device format with an engine in ``smallfry_runtime.engines``.

    Attributes:
        name: Name in commands, which is the engine's.
        title: Name in tables.
        precisions: Supported precisions, of float32, int8, int8_dynamic and own_bits.
        packages: Packages that convert and run it, which the extra of the same name brings.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]

    def convert(self, source: Source, precision: str) -> dict[str, bytes]:
        """Convert the graphs of a model to files by name, each with its graph's name as the stem.

        Raises:
            ExportError: They can't be converted.
            ModuleNotFoundError: A package is not installed.
        """


def register_target(kind: T) -> T:
    """Register a device format by its ``name``; a decorator.

    Raises:
        UsageError: Another device format has the name.
    """
    add(_targets, kind.name, kind, "device formats")  # type: ignore[attr-defined]
    return kind


def targets() -> dict[str, Target]:
    """Return all device formats by name.

    Example:
        >>> from smallfry.deploy.targets import targets
        >>> sorted(targets())
        ['executorch', 'litert', 'onnx', 'openvino']
    """
    scan(PACKAGE)
    load_plugins()
    return {name: kind() for name, kind in _targets.items()}


def find_target(name: str) -> Target:
    """Find a device format by name.

    Raises:
        UsageError: There is none.
    """
    known = targets()
    if name not in known:
        raise UsageError(f"target: there is no device format '{name}'{nearest(name, known)}")
    return known[name]


def is_installed(target: Target) -> bool:
    """Return whether all packages of a device format are installed."""
    return _missing(target) is None


def require_installed(target: Target) -> None:
    """Require the packages of a device format.

    Raises:
        UsageError: One is missing.
    """
    missing = _missing(target)
    if missing is not None:
        extra = "export" if target.name == "onnx" else target.name
        raise UsageError(
            f"target {target.name} needs {missing}, which is not installed: "
            f"pip install 'smallfry[{extra}]'"
        )


def _missing(target: Target) -> str | None:
    found = (name for name in target.packages if find_spec(name.replace("-", "_")) is None)
    return next(found, None)
