"""Engines that run the graphs of exports, one module per device format.

A module is named after its format, and has

    TITLE, PACKAGE              name of the engine, and of the package that brings it
    SUFFIXES                    endings of the files of a graph
    start(contents, threads, providers)
                                session of a graph, given the contents of its files

Only ``start`` imports the engine itself, so that a device needs only that of its exports.
"""

import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Session", "engine_of", "engines", "graph_files", "one_by_one"]

Floats = NDArray[np.float32]
STEMS = {"whole": ("model",), "anytime": ("embed", "step", "read_out")}  # of graphs, by form


class Session(Protocol):
    """Graph ready to run."""

    def run(self, inputs: Sequence[Floats]) -> list[Any]:
        """Compute the outputs, given the inputs in the graph's order, each (batch, …)."""


@cache
def engines() -> tuple[str, ...]:
    """List the device formats with an engine, installed or not."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def engine_of(name: str) -> ModuleType:
    """Import the engine of a device format; ``name`` is one of ``engines()``."""
    return import_module(f"{__name__}.{name}")


def graph_files(form: str, engine: str = "onnx") -> tuple[str, ...]:
    """Return the names of the files of an export's graphs, graph by graph."""
    return tuple(stem + suffix for stem in STEMS[form] for suffix in engine_of(engine).SUFFIXES)


def one_by_one(run: Callable[[list[Floats]], list[Any]], inputs: Sequence[Floats]) -> list[Any]:
    """Run a graph for batches of one image on each image of a batch."""
    found = [run([each[row : row + 1] for each in inputs]) for row in range(len(inputs[0]))]
    return [np.concatenate(outputs) for outputs in zip(*found, strict=True)]
