"""The picture of architecture.md: ``python docs/pictures/architecture.py``.

Packages and arrows are the imports of the source, as grimp finds them; rows follow the layers of
the import contract in ``pyproject.toml``. An import that a longer way implies is left out.
"""

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path

import grimp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[2]
OWN, RUNTIME = "smallfry", "smallfry_runtime"
BOX = 2.4, 0.62  # width and height
STEP = 3.0, 1.35  # between the middles of boxes
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#be123c", "#4d7c0f", "#6b7280")

Graph = Mapping[str, frozenset[str]]
Place = tuple[float, float]


def packages() -> Graph:
    """Imports between the packages of the house."""
    graph = grimp.build_graph(OWN, RUNTIME, cache_dir=None)
    edges: dict[str, set[str]] = {}
    for module in graph.modules:
        edges.setdefault(package_of(module), set()).update(
            package
            for other in graph.find_modules_directly_imported_by(module)
            if not (package := package_of(other)).startswith("_")
        )
    names = sorted(name for name in edges if name != OWN and not name.startswith("_"))
    return {name: frozenset(edges[name] - {name, OWN}) for name in names}


def package_of(module: str) -> str:
    """The package or module below ``smallfry`` that a module belongs to."""
    names = module.split(".")
    return names[1] if names[0] == OWN and len(names) > 1 else names[0]


def without_detours(graph: Graph) -> Graph:
    """The transitive reduction: no arrow where a longer way leads to the same package."""

    def reached(name: str) -> frozenset[str]:
        return graph[name].union(*(reached(other) for other in graph[name]))

    return {
        name: direct - frozenset().union(*(reached(other) for other in direct))
        for name, direct in graph.items()
    }


def order() -> list[str]:
    """Packages in the order of the import contract, from the top."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (found,) = (c for c in content["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return [name.strip(" ()") for row in found["layers"] for name in row.split("|")] + [RUNTIME]


def rows(graph: Graph) -> list[list[str]]:
    """Packages by depth: each one row below the lowest of those that import it."""
    depth: dict[str, int] = {}
    for name in order():  # those that import it come before it
        if name in graph:
            users = [depth[other] for other in depth if name in graph[other]]
            depth[name] = 1 + max(users, default=-1)
    return [[n for n in depth if depth[n] == row] for row in range(1 + max(depth.values()))]


def places(graph: Graph) -> dict[str, Place]:
    """The middle of every box: below those that import it, with room beside its neighbours."""
    at: dict[str, Place] = {}
    for depth, row in enumerate(rows(graph)):
        users = {name: [at[other][0] for other in at if name in graph[other]] for name in row}
        wanted = {name: sum(above) / max(1, len(above)) for name, above in users.items()}
        names = sorted(row, key=lambda name: wanted[name])
        across: list[float] = []
        for name in names:
            across.append(max([wanted[name], *(x + STEP[0] for x in across[-1:])]))
        shift = (sum(wanted.values()) - sum(across)) / len(row)
        at |= {n: (x + shift, -STEP[1] * depth) for n, x in zip(names, across, strict=True)}
    return at


def draw(graph: Graph, file: Path) -> None:
    """Draw the packages and their imports."""
    graph = without_detours(graph)
    at = places(graph)
    across, down = ([place[axis] for place in at.values()] for axis in (0, 1))
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots()
    for i, (name, others) in enumerate((n, graph[n]) for n in at):
        for other in sorted(others & set(at)):
            arrow(axes, at[name], at[other], COLOURS[i % len(COLOURS)])
    for name, (x, y) in at.items():
        corner = x - BOX[0] / 2, y - BOX[1] / 2
        look = {"facecolor": "#f3f4f6" if name != RUNTIME else "#fef3c7", "edgecolor": "#374151"}
        axes.add_patch(FancyBboxPatch(corner, *BOX, "round,pad=0.04", zorder=3, **look))
        axes.text(x, y, name, ha="center", va="center", fontsize=12, zorder=4)
    axes.set_xlim(min(across) - BOX[0], max(across) + BOX[0])
    axes.set_ylim(min(down) - 0.6, 0.6)
    axes.set_axis_off()
    figure.savefig(file, dpi=110)


def arrow(axes: Axes, start: Place, end: Place, colour: str) -> None:
    """An arrow from the lower edge of one box to the upper edge of another."""
    (x, y), (to_x, to_y) = start, end
    lean = max(-0.8, min(0.8, 0.25 * (to_x - x)))  # leave on the side that it goes to
    axes.annotate(
        "",
        (to_x - lean, to_y + BOX[1] / 2 + 0.05),
        (x + lean, y - BOX[1] / 2 - 0.05),
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 1.3,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


def main() -> None:
    """Write the picture beside this script, or into another folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    draw(packages(), parser.parse_args().out / "architecture.png")


if __name__ == "__main__":
    main()
