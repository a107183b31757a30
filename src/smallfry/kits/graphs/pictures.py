"""Picture of a graph: its types in columns, the edges of the rule, and right and wrong nodes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from smallfry.kits.graphs.heterographs import FAR, GROUP, ITEM, ITEM_TO_GROUP, NEAR, PERSON
from smallfry.kits.graphs.packing import EDGE_CHANNELS, unpack
from smallfry.report.figure import in_legend, new_figure, save, style

__all__ = ["draw_graph"]

COLUMNS = {ITEM: 0.0, GROUP: 1.0, PERSON: 2.0}
NAMES = {ITEM: "items", GROUP: "groups", PERSON: "persons"}
EDGES = {ITEM_TO_GROUP: "#8a8a8a", FAR: "#2a78b5", NEAR: "#d1701f"}
FILLS = ("#e8e8e8", "#2a78b5", "#d1701f")


def draw_graph(
    packed: Tensor, labels: Tensor, found: Tensor, classes: Sequence[str], file: Path
) -> None:
    """Draw a packed graph of the generator.

    Args:
        packed: (8, nodes, slots).
        labels: Class of each node, −1 of none.
        found: Computed class of each node.
        classes: Their names.
        file: The PNG to write.
    """
    most = int(packed[2].max()) + 1
    graph = unpack(packed[None], most).without_gaps()
    features = packed[EDGE_CHANNELS:, :, 0].numpy()
    types, marked = features[:-1].argmax(axis=0), features[-1] > 0.5
    x = np.array([COLUMNS[int(kind)] for kind in types])
    y = np.zeros(len(types))
    for kind in COLUMNS:
        own = types == kind
        y[own] = -np.linspace(0, 1, max(2, own.sum()))[: own.sum()]
    with style():
        figure = new_figure(8, 6.5)
        axes = figure.subplots()
        for relation, colour in EDGES.items():
            ends = graph.edge_index[:, graph.edge_type == relation].numpy()
            strong = marked[ends[0]] if relation != FAR else np.ones(ends.shape[1], bool)
            for bold in (False, True):
                chosen = ends[:, strong == bold]
                width, alpha = (1.4, 0.9) if bold and relation != FAR else (0.6, 0.35)
                axes.plot(x[chosen], y[chosen], color=colour, lw=width, alpha=alpha, zorder=1)
            axes.plot([], [], color=colour, label=f"relation {relation}")
        plain = (types != PERSON) & ~marked
        axes.scatter(x[plain], y[plain], s=40, color="white", edgecolor="#555555", zorder=2)
        given = (types != PERSON) & marked
        axes.scatter(x[given], y[given], s=60, color="#222222", zorder=2, label="marked")
        for number, name in enumerate(in_legend(classes)):
            own = (found.numpy() == number) & (types == PERSON)
            fill = FILLS[number % len(FILLS)]
            axes.scatter(
                x[own], y[own], s=70, color=fill, edgecolor="#333333", zorder=3, label=name
            )
        wrong = (found != labels).numpy() & (labels >= 0).numpy()
        axes.scatter(
            x[wrong], y[wrong], s=170, facecolor="none", edgecolor="red", zorder=4, label="wrong"
        )
        for kind, at in COLUMNS.items():
            axes.text(at, 0.06, NAMES[kind], ha="center")
        right = int(((labels >= 0) & (found == labels)).sum())
        axes.set_title(f"{right} of {int((labels >= 0).sum())} persons right", pad=22)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axes.set_axis_off()
        save(figure, file)
