"""Graphs for one image at a time, for some device formats."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from smallfry.deploy.graphs import Graph
from smallfry.deploy.quantize import graph_inputs
from smallfry.deploy.targets.target import Source
from smallfry.errors import ExportError

__all__ = ["calibration_batches", "one_image", "reason_of"]


def one_image(graph: Graph) -> tuple[Any, ...]:
    """Return the positional arguments of a graph for one image; some are tuples of tensors."""
    return tuple(
        given[:1] if isinstance(given, Tensor) else tuple(each[:1] for each in given)
        for given in graph.arguments.values()
    )


def calibration_batches(source: Source) -> Mapping[str, Iterator[tuple[Any, ...]]]:
    """Return for each graph the arguments, batch by batch, as the source's images pass.

    Raises:
        ExportError: There are no images.
    """
    if len(source.images) == 0:
        raise ExportError("static int8 needs images to measure activation ranges")
    seen = graph_inputs(source.onnx, source.images, source.recursion_steps)
    return {graph.name: _arguments(graph, seen[graph.name]) for graph in source.modules}


def _arguments(graph: Graph, batches: Any) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        left = iter(map(torch.from_numpy, batch.values()))
        yield tuple(
            next(left) if isinstance(given, Tensor) else tuple(next(left) for _ in given)
            for given in graph.arguments.values()
        )


def reason_of(error: Exception) -> str:
    """Return the message of a converter in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
