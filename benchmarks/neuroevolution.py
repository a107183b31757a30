"""Compare novelty, fitness and random networks in the mazes, and a genetic algorithm on digits.

    python benchmarks/neuroevolution.py --out results/neuroevolution.json

Mazes: 200 networks a generation, 20 parents, at most 60 generations, five seeds; a row is the
generation that solved the maze, or none. Digits: a genetic algorithm of 100,000 evaluations of an
MLP 64-32-10 on 597 images beside SGD. Each line is kept in FILE.jsonl, so a stopped run continues.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from smallfry.io.json_lines import JsonLines
from smallfry.io.replace import write_whole
from smallfry.search.neuroevolution import DeepGA
from smallfry.search.neuroevolution.problems import find_problem
from smallfry.search.tables.digits import load_split

SEEDS, GENERATIONS = range(5), 60
DIGITS_GENERATIONS = 500  # of 200 networks
SELECTS = ("novelty", "fitness", "random")


def solve(maze: str, select: str, seed: int) -> dict[str, Any]:
    ga, began = DeepGA(find_problem(maze), select=select, seed=seed), time.process_time()
    history = list(ga.run(GENERATIONS))
    return {
        "generation": len(history) if ga.is_solved(history) else None,
        "nearest": round(-max(each.best for each in history), 1),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def evolve_digits(generations: int) -> dict[str, Any]:
    problem = find_problem("digits")
    ga, began = DeepGA(problem), time.process_time()
    last = list(ga.run(generations))[-1]
    chain = ga.chain(last.elite)
    return {
        "evaluations": last.evaluations,
        "loss": round(-last.elite_fitness, 4),
        "validation_accuracy": problem.accuracy(chain.weights()),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def descend_digits() -> dict[str, Any]:
    torch.manual_seed(0)
    split, began = load_split(), time.process_time()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(200):  # of all images
        loss = F.cross_entropy(model(split.train.images), split.train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = model(split.validation.images).argmax(1) == split.validation.labels
    return {
        "evaluations": 200,
        "loss": round(loss.item(), 4),
        "validation_accuracy": right.float().mean().item(),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mazes", nargs="+", default=["maze", "maze_staggered"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = JsonLines(given.out.with_suffix(".jsonl"))
    known = {(r["problem"], r["select"], r["seed"]) for r in lines.read()}
    jobs = [(maze, select, seed) for maze in given.mazes for select in SELECTS for seed in SEEDS]
    jobs += [("digits", "fitness", 0), ("digits", "gradient", 0)]
    for problem, select, seed in jobs:
        if (problem, select, seed) in known:
            continue
        if problem == "digits":
            found = descend_digits() if select == "gradient" else evolve_digits(DIGITS_GENERATIONS)
        else:
            found = solve(problem, select, seed)
        lines.append({"problem": problem, "select": select, "seed": seed, **found})
        print(problem, select, seed, found, flush=True)
    summary = {
        "command": "python benchmarks/neuroevolution.py",
        "generations": GENERATIONS,
        "population": 200,
        "runs": lines.read(),
    }
    write_whole(given.out, (json.dumps(summary, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
