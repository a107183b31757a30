"""Pictures of matrices, and of the graphs that programs write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from smallfry.data import Split
from smallfry.kits.symbolic.interpreter import ProgramGraph
from smallfry.report.figure import COLOURS, GREY, new_figure, plain, save, show_image, style

__all__ = ["draw_answers", "draw_graphs"]

SHOWN = 12  # matrices of a picture
COLUMNS = 6


def draw_answers(outputs: Tensor, split: Split, classes: Sequence[str], file: Path) -> None:
    """Draw matrices from the surest mistake to the surest right answer.

    Args:
        outputs: Logits (matrices, classes).
        split: The matrices.
        classes: Names of the classes.
        file: The PNG to write.
    """
    shares = outputs.softmax(dim=1)
    of_truth = shares[np.arange(len(split)), split.labels]
    order = of_truth.argsort()
    places = np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)
    chosen = order[places]
    shown = split.take(chosen)
    rows = -(-len(chosen) // COLUMNS)
    with style():
        figure = new_figure(2 * COLUMNS, 2.3 * rows)
        axes = figure.subplots(rows, COLUMNS, squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for ax, picture, label, share in zip(
            axes.flat, shown.images, shown.labels.tolist(), of_truth[chosen].tolist(), strict=False
        ):
            show_image(ax, picture)
            colour = "black" if share > 0.5 else COLOURS[4]
            ax.set_title(f"{plain([classes[label]])[0]} {share:.0%}", color=colour)
        save(figure, file)


def draw_graphs(
    graphs: Sequence[ProgramGraph], file: Path, titles: Sequence[str] | None = None
) -> None:
    """Draw graphs: nodes with their numbers, and edges with their ports.

    Args:
        graphs: The graphs.
        file: The PNG to write.
        titles: One for each; default their numbers of nodes and edges.
    """
    import networkx

    columns = min(4, len(graphs))
    rows = -(-len(graphs) // columns)
    with style():
        figure = new_figure(3 * columns, 2.8 * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for number, (ax, graph) in enumerate(zip(axes.flat, graphs, strict=False)):
            simple = networkx.Graph((edge.one, edge.other) for edge in graph.edges)
            simple.add_nodes_from(graph.nodes)  # those without an edge
            _draw(ax, graph, networkx.kamada_kawai_layout(simple))
            usual = f"{len(graph.nodes)} nodes, {len(graph.edges)} edges"
            ax.set_title(usual if titles is None else plain([titles[number]])[0])
        save(figure, file)


def _draw(ax: Any, graph: ProgramGraph, places: Any) -> None:
    for edge in graph.edges:
        (x0, y0), (x1, y1) = places[edge.one], places[edge.other]
        ax.plot([x0, x1], [y0, y1], color=GREY, zorder=1)
        share = 0.5 + 0.12 * ((edge.port % 3) - 1)  # parallel edges have their ports side by side
        ax.text(
            x0 + share * (x1 - x0),
            y0 + share * (y1 - y0),
            str(edge.port),
            fontsize=8,
            color=COLOURS[1],
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            zorder=2,
        )
    for node in graph.nodes:
        x, y = places[node]
        ax.scatter([x], [y], s=260, color=COLOURS[0], zorder=3)
        ax.text(x, y, str(node), color="white", ha="center", va="center", zorder=4)
    ax.margins(0.25)
