"""Variance between programs against variance between seeds, and an evolution of programs.

    python benchmarks/kits_symbolic.py variance --out results/kits/symbolic/variance.json
    python benchmarks/kits_symbolic.py variance --images 1440 --size 64 --batch 32 --out FILE
    python benchmarks/kits_symbolic.py evolution --folder runs/programs --out FILE
    python benchmarks/kits_symbolic.py growth --out FILE

``variance`` trains networks of the first distinct programs, several seeds each, and seeds of the
baseline, all in one way, and analyses test accuracies. Written after each training; the same
command goes on. ``growth`` counts distinct graphs by round without training.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import smallfry
from smallfry.kits.symbolic.grammar import Grammar, enumerate_programs
from smallfry.kits.symbolic.interpreter import ProgramGraph, run
from smallfry.kits.symbolic.library import learn_library, learn_templates, learn_with_stitch
from smallfry.kits.symbolic.pictures import draw_graphs
from smallfry.kits.symbolic.population import Frontiers, find_graphs
from smallfry.kits.symbolic.programs import parse
from smallfry.kits.symbolic.search import (
    SETTINGS,
    GraphProgramSpace,
    ProgramEvolution,
    evolve_programs,
)
from smallfry.kits.symbolic.statistics import analyse_variance, compare_variances

PROGRAMS, SEEDS, BASELINES = 8, 3, 8
TESTED, HELD = 600, 40


def train(program: str | None, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train once; return accuracies and seconds."""
    images = given.images
    samples = TESTED + HELD + images
    model: dict[str, Any] = {"name": "gssnn_tiny_baseline"}
    if program is not None:
        model = {"name": "gssnn_tiny", "options": {"program": program}}
    with TemporaryDirectory() as place:
        began = time.process_time()
        trained = smallfry.train(
            task="symbolic",
            data={
                "name": "symbolic-panels",
                "options": {"samples": samples, "size": given.size},
                "test": TESTED / samples,
                "validation": HELD / (HELD + images),
            },
            model=model,
            optimizer={"lr": given.rate},
            epochs=given.epochs,
            batch_size=given.batch,
            seed=seed,
            threads=1,
            progress="quiet",
            run=Path(place) / "run",
        )
        seconds = time.process_time() - began
        found = {
            "test": trained.evaluate()["accuracy"],
            "train": trained.evaluate(split="train")["accuracy"],
            "cpu_seconds": round(seconds, 1),
        }
        model = smallfry.load(Path(place) / "run").model
        found["parameters"] = sum(p.numel() for p in model.parameters())
    return found


def variance(given: argparse.Namespace) -> None:
    """Train what is not recorded yet, and analyse."""
    record: dict[str, Any] = {}
    if given.out.is_file():
        record = json.loads(given.out.read_text())
    programs = record.setdefault("programs", [str(each) for each in find_graphs(PROGRAMS)])
    names = ("images", "size", "epochs", "batch", "rate")
    record["settings"] = {name: getattr(given, name) for name in names}
    record["settings"] |= {"validation": HELD, "test": TESTED}
    runs = record.setdefault("runs", {})
    jobs: list[tuple[str | None, int]] = [(p, s) for s in range(SEEDS) for p in programs]
    jobs += [(None, seed) for seed in range(BASELINES)]
    for program, seed in jobs:
        key = f"{program or 'baseline'} seed {seed}"
        if key not in runs:
            runs[key] = train(program, seed, given)
            write(record, given.out)
            print(key[-60:], runs[key], flush=True)
    for split in ("test", "train"):
        groups = [[100 * runs[f"{p} seed {s}"][split] for s in range(SEEDS)] for p in programs]
        baseline = [100 * runs[f"baseline seed {s}"][split] for s in range(BASELINES)]
        every = [value for group in groups for value in group]
        first = [group[0] for group in groups]
        ratio, p = compare_variances(first, baseline)
        record[split] = {
            "by_program": groups,
            "baseline": baseline,
            "programs_mean": float(np.mean(every)),
            "programs_best": max(every),
            "baseline_mean": float(np.mean(baseline)),
            "baseline_best": max(baseline),
            "baseline_sd": float(np.std(baseline, ddof=1)),
            "analysis": analyse_variance(groups)._asdict(),
            "one_seed_against_baseline": {"ratio": ratio, "p": p},
        }
        print(split, json.dumps(record[split]), flush=True)
    record["cpu_seconds"] = round(sum(each["cpu_seconds"] for each in runs.values()), 1)
    write(record, given.out)
    if given.picture:
        graphs = [run_text(program) for program in programs]
        titles = [
            f"{np.mean(group):.1f} %: " + ", ".join(f"{value:.1f}" for value in group)
            for group in record["test"]["by_program"]
        ]
        draw_graphs(graphs, given.picture, titles)


def run_text(program: str) -> ProgramGraph:
    """Return the graph of a program."""
    return run(parse(program))


def evolution(given: argparse.Namespace) -> None:
    """Evolve a population, or go on."""
    settings = {**SETTINGS, "epochs": given.epochs, "batch_size": given.batch}
    space = GraphProgramSpace(["(push (add (connect identity)))"], settings)
    search = ProgramEvolution(given.population, given.rounds)
    trials = evolve_programs(search, space, given.folder, told=lambda t: print(t.value, flush=True))
    record = {"history": search.history, "trials": [asdict(trial) for trial in trials]}
    write(record, given.out)


def growth(given: argparse.Namespace) -> None:
    """Count distinct graphs by round of enumeration and library learning, without training."""
    found, grammar, rounds = Frontiers(), Grammar.uniform(), []
    for number in range(given.rounds):
        began = time.process_time()
        for each in enumerate_programs(grammar, given.limit):
            found.add(each.program)
        corpus = found.corpus(range(len(found.graphs)))
        own = learn_templates(corpus)
        grammar = learn_library(corpus)
        stitch = learn_with_stitch(corpus) if given.stitch else None
        rounds.append(
            {
                "round": number + 1,
                "graphs": len(found.graphs),
                "most_nodes": max(len(graph.nodes) for graph in found.graphs),
                "cost_before": own.before,
                "cost_after": own.after,
                "library": {k: str(v) for k, v in own.templates.items()},
                "cost_after_stitch": stitch and stitch.after,
                "cpu_seconds": round(time.process_time() - began, 1),
            }
        )
        print(rounds[-1], flush=True)
        write({"limit": given.limit, "rounds": rounds}, given.out)
    if given.space:
        programs = [str(each[0]) for each in found.programs]
        GraphProgramSpace(programs).write(given.space)


def write(record: dict[str, Any], file: Path) -> None:
    """Write a record."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["variance", "evolution", "growth"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/programs"))
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=20_000)
    parser.add_argument("--stitch", action="store_true")
    parser.add_argument("--space", type=Path)
    given = parser.parse_args()
    {"variance": variance, "evolution": evolution, "growth": growth}[given.what](given)


if __name__ == "__main__":
    main()
