"""Compare N2N with random search and evolution on the enumerated table of students.

    python benchmarks/n2n_table.py --out results/n2n_table.json

Evaluations until one of the ten best students of 1,023 by the true reward was trained, of at most
200; each evaluation is one training, the truth the mean of three. ``n2n transferred`` begins with
the policies of a search of another seed with as many evaluations.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smallfry.io.replace import write_whole
from smallfry.search import Evolution, RandomSearch, Search, Trial
from smallfry.search.n2n import N2N
from smallfry.search.tables import Table, TableEvaluator, load_table
from smallfry.search.tables.micro_n2n import LAYERS

EVALUATIONS, REPEATS, TOP = 200, 20, 10
FIVE = 5  # seeds of the acceptance
ELSEWHERE = 1000  # first seed of the searches whose policies are transferred


def rewards_of(table: Table) -> np.ndarray:
    return table.rewards(table.accuracy / 100, table.parameters)


def searches(table: Table, seed: int) -> Iterator[tuple[str, Search]]:
    def worth(trial: Trial) -> float:
        return float(table.rewards(trial.value / 100, trial.cost["parameters"]))

    yield "random", RandomSearch(table.choices, EVALUATIONS, seed, lambda s: any(s.values()))
    yield "evolution", Evolution(table.choices, EVALUATIONS, seed, lambda s: any(s.values()))
    yield "n2n", N2N(LAYERS, EVALUATIONS, worth, seed)
    yield "n2n, advantage of the batch", N2N(LAYERS, EVALUATIONS, worth, seed, advantage="batch")
    earlier = N2N(LAYERS, EVALUATIONS, worth, ELSEWHERE + seed)
    search_once(table, earlier, ELSEWHERE + seed)
    policies = {name: policy.state_dict() for name, policy in earlier.policies.items()}
    yield "n2n transferred", N2N(LAYERS, EVALUATIONS, worth, seed, policies=policies)


def search_once(table: Table, search: Search, seed: int) -> dict[str, Any]:
    """Search by reward, and return when the true top was reached, and what was chosen."""
    rewards = rewards_of(table)
    top = {*np.argsort(-rewards, kind="stable")[:TOP].tolist()}
    evaluate, reached, count, best = TableEvaluator(table, "seed", seed), None, 0, (-np.inf, 0)
    while asked := search.ask(1):
        trial = evaluate(asked[0])
        position, count = table.position(trial.candidate), count + 1
        value = float(table.rewards(trial.value / 100, trial.cost["parameters"]))
        seen = trial if isinstance(search, N2N) else Trial(trial.candidate, value)
        search.tell([seen])
        best = max(best, (value, position))
        if reached is None and position in top:
            reached = count
    return {
        "reached": reached,
        "evaluations": count,
        "chosen_in_top": best[1] in top,
        "true_reward": round(float(rewards[best[1]]), 4),
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    reached = [run["reached"] or np.inf for run in runs]
    quartiles = np.quantile(reached, (0.25, 0.5, 0.75), method="inverted_cdf")
    return {
        "repeats": len(runs),
        "reached": int(np.isfinite(reached).sum()),
        "quartiles": [None if np.isinf(each) else float(each) for each in quartiles],
        "most": None if np.isinf(max(reached)) else max(reached),
        "median_of_5_seeds": float(np.median(reached[:FIVE])),
        "evaluations": float(np.mean([run["evaluations"] for run in runs])),
        "chosen_in_top": sum(run["chosen_in_top"] for run in runs),
        "true_reward": round(float(np.mean([run["true_reward"] for run in runs])), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = load_table("micro_n2n")
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(REPEATS):
        for name, search in searches(table, seed):
            found.setdefault(name, []).append(search_once(table, search, seed))
        print(f"repeat {seed + 1} of {REPEATS}", flush=True)
    rewards = rewards_of(table)
    best = np.argsort(-rewards, kind="stable")[:TOP]
    summary = {
        "command": "python benchmarks/n2n_table.py",
        "data": "scikit-learn digits, real; table micro_n2n",
        "sha256": table.record["sha256"],
        "evaluations": EVALUATIONS,
        "best": [
            {
                "shares": list(table.candidates[each].values()),
                "reward": round(float(rewards[each]), 4),
                "parameters": int(table.parameters[each]),
            }
            for each in best
        ],
        "searches": {name: summarize(runs) for name, runs in found.items()},
    }
    write_whole(given.out, (json.dumps(summary, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
