"""Compute the two tables of search spaces by training every candidate on digits.

    python benchmarks/make_tables.py --parts DIR

About 14 CPU minutes. Each group of networks is a file in DIR, so a stopped run continues. The
tables go to ``src/smallfry/search/tables``.
"""

import argparse
import io
import platform
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smallfry
from smallfry.costing import cost
from smallfry.io.replace import write_whole
from smallfry.search.tables import micro_n2n, micro_nars, table
from smallfry.search.tables.digits import IMAGES, load_split
from smallfry.search.tables.stacked import Results

SEEDS = (0, 1, 2)
TOGETHER = 81  # students in one stacked network
HERE = Path(table.__file__).parent


@cache
def digits() -> Any:
    return load_split()


@cache
def teacher() -> torch.nn.Sequential:
    return micro_n2n.train_teacher(digits())


def train_recipes(group: list[dict], seed: int) -> Results:
    recipes = [{c.name: each[c.name] for c in micro_nars.RECIPE} for each in group]
    return micro_nars.train(group[0], recipes, seed, digits())[1]


def train_students(group: list[dict], seed: int) -> Results:
    targets = micro_n2n.teacher_logits(teacher(), digits())
    return micro_n2n.distill(group, targets, seed, digits())[1]


def groups_of(name: str) -> Iterator[list[dict]]:
    """Yield candidates that are trained at once."""
    if name == "micro_nars":
        shared: Callable[[dict], Any] = lambda c: [c[a.name] for a in micro_nars.ARCHITECTURE]  # noqa: E731
    else:
        shared = lambda c: [bool(share) for share in c.values()]  # noqa: E731
    for _, found in groupby(sorted(table.candidates_of(name), key=shared), key=shared):
        group = list(found)
        for start in range(0, len(group), TOGETHER):
            yield group[start : start + TOGETHER]


def part(file: Path, compute: Callable[[], Results]) -> Results:
    """Read a group's results, or compute and write them."""
    if not file.exists():
        stream = io.BytesIO()
        np.savez(stream, **compute()._asdict())
        write_whole(file, stream.getvalue())
    with np.load(file) as found:
        return Results(*(found[name] for name in Results._fields))


@cache
def measure(name: str, architecture: tuple[tuple[str, object], ...]) -> tuple[int, int]:
    """Return the parameters and MACs of a network."""
    build = micro_nars.build if name == "micro_nars" else micro_n2n.build
    candidate = dict(architecture)
    with torch.device("meta"):
        found = cost(build(candidate), torch.zeros(1, 1, 8, 8))
    return found.parameters, found.macs


def make(name: str, folder: Path) -> None:
    candidates = table.candidates_of(name)
    positions = {table.key_of(each): number for number, each in enumerate(candidates)}
    groups = list(groups_of(name))
    train = train_recipes if name == "micro_nars" else train_students
    shape = (len(SEEDS), 3, len(candidates))
    arrays = {
        "correct": np.zeros(shape, np.uint16),
        "nll": np.zeros(shape, np.float16),
        "test_correct": np.zeros((shape[0], shape[2]), np.uint16),
    }
    for row, seed in enumerate(SEEDS):
        for number, group in enumerate(groups):
            file = folder / f"{name}_{seed}_{number}.npz"
            found = part(file, lambda group=group, seed=seed: train(group, seed))
            columns = [positions[table.key_of(each)] for each in group]
            for key, values in found._asdict().items():
                arrays[key][row, ..., columns] = np.moveaxis(values, -1, 0)
            print(
                f"{name}, seed {seed}: {number + 1} of {len(groups)} groups, "
                f"best {arrays['correct'][row, -1].max()} of {IMAGES}",
                flush=True,
            )
    parts = [c.name for c in table.TABLES[name] if c not in micro_nars.RECIPE]
    architectures = [tuple((part, each[part]) for part in parts) for each in candidates]
    costs = np.array([measure(name, each) for each in architectures], np.int32)
    arrays |= {"parameters": costs[:, 0], "macs": costs[:, 1]}
    record = {
        "table": name,
        "command": "python benchmarks/make_tables.py",
        "data": "scikit-learn digits, real, 597/600/600 by RandomState(0)",
        "seeds": list(SEEDS),
        "versions": {
            "smallfry": smallfry.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    if name == "micro_n2n":
        record["teacher"] = describe_teacher()
    table.write_table(HERE / f"{name}.npz", arrays, record)
    print(f"{HERE / name}.npz: {(HERE / f'{name}.npz').stat().st_size:,} bytes")


@torch.no_grad()
def describe_teacher() -> dict[str, int]:
    correct = {
        name: int((teacher()(split.images).argmax(1) == split.labels).sum())
        for name, split in {"correct": digits().validation, "test_correct": digits().test}.items()
    }
    parameters, macs = measure("micro_n2n", tuple(micro_n2n.TEACHER.items()))
    return {**correct, "parameters": parameters, "macs": macs, "seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", default=list(table.TABLES), choices=table.TABLES)
    given = parser.parse_args()
    given.parts.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in given.tables:
        make(name, given.parts)


if __name__ == "__main__":
    main()
