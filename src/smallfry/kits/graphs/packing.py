"""Graphs as arrays of one shape: nodes × slots, with a channel for each part of an edge.

channel 0, 1, 2   source, destination and relation of an edge; edges fill the slots in any order
channel 3         1 where a slot has an edge, 0 where it is empty
channel 4 …       features of the node of each row, in slot 0; elsewhere 0
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.errors import DataError

__all__ = ["EDGE_CHANNELS", "Graphs", "pack", "unpack"]

EDGE_CHANNELS = 4


class Graphs(NamedTuple):
    """Batch of graphs as one, node i of graph b being b · nodes + i."""

    features: Tensor  # (graphs, nodes, features)
    edge_index: Tensor  # (2, edges)
    edge_type: Tensor  # (edges,)
    present: Tensor  # (edges,), bool

    def without_gaps(self) -> "Graphs":
        """Leave out empty slots."""
        kept = self.present
        index, types = self.edge_index[:, kept], self.edge_type[kept]
        return Graphs(self.features, index, types, kept[kept])


def pack(
    features: NDArray[Any],
    edges: Sequence[Sequence[int]] | NDArray[Any],
    slots: int,
    relations: int,
) -> NDArray[np.float32]:
    """Pack a graph into an array (4 + features, nodes, slots).

    Args:
        features: (nodes, features).
        edges: Source, destination and relation of each edge, (edges, 3).
        slots: Slots of a node, so that there are nodes · slots at most.
        relations: Relations.

    Raises:
        DataError: Too many edges, or a number outside of its range.

    Example:
        >>> pack(np.ones((3, 2)), [[0, 1, 0], [2, 1, 1]], slots=2, relations=2).shape
        (6, 3, 2)
    """
    features, given = np.asarray(features, np.float32), np.asarray(edges)
    given = given if given.size else np.zeros((0, 3), np.int64)
    rows = given.astype(np.int64)
    if not np.array_equal(rows, given):
        raise DataError("sources, destinations and relations of edges are whole numbers")
    if features.ndim != 2 or rows.ndim != 2 or rows.shape[1] != 3:
        raise DataError(
            "a graph has features (nodes, features) and edges (edges, 3) of source, destination "
            f"and relation, not {features.shape} and {rows.shape}"
        )
    nodes = len(features)
    if len(rows) > nodes * slots:
        raise DataError(f"{len(rows)} edges don't fit {nodes} nodes of {slots} slots each")
    for column, (name, limit) in enumerate(
        (("source", nodes), ("destination", nodes), ("relation", relations))
    ):
        wrong = (rows[:, column] < 0) | (rows[:, column] >= limit)
        if wrong.any():
            place = int(wrong.argmax())
            raise DataError(
                f"edge {place} has {name} {rows[place, column]}; it is 0 to {limit - 1}"
            )
    packed = np.zeros((EDGE_CHANNELS + features.shape[1], nodes * slots), np.float32)
    packed[:3, : len(rows)] = rows.T
    packed[3, : len(rows)] = 1
    packed = packed.reshape(-1, nodes, slots)
    packed[EDGE_CHANNELS:, :, 0] = features.T
    return packed


def unpack(images: Tensor, relations: int) -> Graphs:
    """Unpack arrays (graphs, 4 + features, nodes, slots).

    Numbers outside of their range become the nearest in it, and a slot has an edge from ½ on.
    """
    count, _, nodes, _ = images.shape
    edges = images[:, :EDGE_CHANNELS].flatten(2)
    numbers = edges[:, :3].round()
    ends = numbers[:, :2].clamp(0, nodes - 1).long()
    first = torch.arange(count, device=images.device)[:, None, None] * nodes
    index = (ends + first).transpose(0, 1).reshape(2, -1)
    types = numbers[:, 2].clamp(0, relations - 1).long().reshape(-1)
    features = images[:, EDGE_CHANNELS:, :, 0].transpose(1, 2)
    return Graphs(features, index, types, edges[:, 3].reshape(-1) >= 0.5)
