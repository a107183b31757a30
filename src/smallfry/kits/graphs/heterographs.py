"""Generated heterographs whose nodes have a class by a rule of two steps.

Persons, groups and items; persons are to be classified:

    near    a marked group has relation 2 to the person
    far     not near; a group has relation 3 to it, to which a marked item has relation 1
    apart   neither

Relation 0 leads from groups to persons as 2 and 3 do, and the others lead anywhere: only the
relation distinguishes them. Sample *i* of a split is a function of the settings, the split and *i*.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.data.made_once import made_once
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import UsageError
from smallfry.kits.graphs.packing import EDGE_CHANNELS, pack

__all__ = ["CLASSES", "Heterographs", "classes_by_rule", "draw_edges", "heterograph", "signatures"]

VERSION = 1  # changes whenever the samples of a seed do
SPLITS = {"train": 0, "validation": 1, "test": 2}
SIGNATURES = 3  # number of the stream that relations are drawn from
CLASSES = ("apart", "far", "near")
PERSON, GROUP, ITEM = range(3)
TYPES = 3
DISTRACTING, ITEM_TO_GROUP, NEAR, FAR = range(4)  # relations of the rule, and one like it
RULE = {
    DISTRACTING: (GROUP, PERSON),
    ITEM_TO_GROUP: (ITEM, GROUP),
    NEAR: (GROUP, PERSON),
    FAR: (GROUP, PERSON),
}
UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class Heterographs:
    """Settings of generated graphs, in ``data.options``.

    Args:
        samples: Graphs of all splits together.
        nodes: Nodes of a graph, a third of each type.
        degree: Edges drawn, for each node; those drawn twice are left out.
        relations: Relations; the r-th is drawn with a probability ∝ 1 / (r + 1).
        skew: Sources are drawn with a probability ∝ 1 / rank^skew; 0 of equal ones.
        marked: Share of groups and items that are marked.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    samples: int = 1000
    nodes: int = 60
    degree: int = 8
    relations: int = 12
    skew: float = 0.5
    marked: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "samples": (10, 1_000_000),
            "nodes": (9, 100_000),
            "degree": (1, 1000),
            "relations": (len(RULE), 10_000),
            "skew": (0, 4),
            "marked": (0, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"data.options.{name} is {low:,} to {high:,}, got {value}")


def signatures(settings: Heterographs) -> NDArray[np.int64]:
    """Return the types of source and destination of each relation, (relations, 2)."""
    random = np.random.default_rng([settings.seed, SIGNATURES])
    found = random.integers(TYPES, size=(settings.relations, 2))
    for relation, ends in RULE.items():
        found[relation] = ends
    return found


def draw_edges(
    random: np.random.Generator,
    ranges: NDArray[np.int64],
    ends: NDArray[np.int64],
    count: int,
    skew: float,
) -> NDArray[np.int64]:
    """Draw edges with frequent and rare relations, and with frequent and rare sources.

    Args:
        random: The generator.
        ranges: First node and end of each type, (types, 2).
        ends: Types of source and destination of each relation, (relations, 2).
        count: Edges to draw.
        skew: See ``Heterographs``.

    Returns:
        Source, destination and relation of the different ones among them, (edges, 3), shuffled.
    """
    shares = 1 / np.arange(1, len(ends) + 1)
    relation = random.choice(len(ends), count, p=shares / shares.sum())
    columns = np.empty((2, count), np.int64)
    ranks = [random.permutation(stop - start) for start, stop in ranges]
    for kind, (start, stop) in enumerate(ranges):
        weights = np.arange(1, stop - start + 1, dtype=np.float64) ** -skew
        from_here = ends[relation, 0] == kind
        drawn = random.choice(stop - start, int(from_here.sum()), p=weights / weights.sum())
        columns[0, from_here] = start + ranks[kind][drawn]
        to_here = ends[relation, 1] == kind
        columns[1, to_here] = random.integers(start, stop, int(to_here.sum()))
    edges = np.unique(np.stack([*columns, relation], axis=1), axis=0)
    return random.permutation(edges)


def classes_by_rule(
    edges: NDArray[np.int64], types: NDArray[np.int64], marked: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the class of each person, and −1 of other nodes.

    Args:
        edges: Source, destination and relation, (edges, 3).
        types: Type of each node.
        marked: Nodes that are marked.
    """

    def reached(relation: int, given: NDArray[np.bool_]) -> NDArray[np.bool_]:
        found = np.zeros(len(types), bool)
        kept = edges[edges[:, 2] == relation]
        found[kept[given[kept[:, 0]], 1]] = True
        return found

    near = reached(NEAR, marked & (types == GROUP))
    far = reached(FAR, reached(ITEM_TO_GROUP, marked & (types == ITEM)))
    classes = np.where(near, CLASSES.index("near"), np.where(far, CLASSES.index("far"), 0))
    return np.where(types == PERSON, classes, UNLABELLED)


def heterograph(
    settings: Heterographs, split: str, number: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw a packed graph (8, nodes, degree), and the classes of its nodes (nodes,)."""
    random = np.random.default_rng([settings.seed, SPLITS[split], number])
    limits = np.linspace(0, settings.nodes, TYPES + 1).round().astype(np.int64)
    ranges = np.stack([limits[:-1], limits[1:]], axis=1)
    types = np.repeat(np.arange(TYPES), np.diff(limits))
    count = settings.nodes * settings.degree
    edges = draw_edges(random, ranges, signatures(settings), count, settings.skew)
    marked = random.random(settings.nodes) < settings.marked
    features = np.concatenate([np.eye(TYPES)[types], marked[:, None]], axis=1)
    packed = pack(features, edges, settings.degree, settings.relations)
    return packed, classes_by_rule(edges, types, marked)


def read(name: str, wanted: Wanted) -> ImageData:
    """Generate graphs, or take them from the cache."""
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root")
    settings: Heterographs = settings_from(Heterographs, dict(wanted.options))
    channels, size = EDGE_CHANNELS + TYPES + 1, (settings.nodes, settings.degree)
    wanted.require_fixed(name, channels=channels, image_size=size)
    tested = max(1, round(wanted.test * settings.samples))
    held = round(wanted.validation * (settings.samples - tested))
    counts = {"train": settings.samples - tested - held, "validation": held, "test": tested}
    drawn: dict[str, Any] = {k: v for k, v in asdict(settings).items() if k != "samples"}
    parts = {}
    for split, count in counts.items():
        if count == 0:
            labels = torch.zeros(0, settings.nodes, dtype=torch.int64)
            parts[split] = Split(torch.zeros(0, channels, *size), torch.arange(0), labels)
            continue
        mark = f"{name} {VERSION} {sorted(drawn.items())} {split}"
        parts[split] = made_once(mark, count, partial(heterograph, settings, split))
    train = parts["train"]
    return ImageData(
        name,
        "generated",
        CLASSES,
        size,
        channels,
        train.take(torch.arange(len(train))[: wanted.limit]),
        parts["validation"],
        parts["test"],
        generated={"family": name, "version": VERSION, **asdict(settings)},
    )


register_data(("graphs-rules",), read)
