"""Compare searches on the enumerated table of architectures and recipes.

    python benchmarks/search_tables.py --out results/search_tables.json \\
        --picture docs/pictures/search_tables.png

*predictor*: Kendall's τ between predictions and truth on all pairs that were not labelled, after 32
random labels, with and without learning costs first. *searches*: evaluations until a candidate of
the true top 1 % is measured. The truth is the mean over all seeds; searches see one training of a
candidate, or that mean. Each repeat is a line in FILE.jsonl, so a stopped run continues.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from smallfry.io.json_lines import JsonLines
from smallfry.io.replace import write_whole
from smallfry.report.figure import COLOURS, GREY, new_figure, save, style
from smallfry.search import NARS, TPE, Evolution, RandomSearch, Search
from smallfry.search.nars import costed, new_predictor, shortest_proxy
from smallfry.search.predictor import features, kendall_tau
from smallfry.search.tables import Table, TableEvaluator, load_table
from smallfry.search.tables.micro_nars import ARCHITECTURE, RECIPE

EVALUATIONS, LABELS, REPEATS, TOP = 96, 32, 20, 0.01
NOISES = ("seed", "mean")
ALL = ARCHITECTURE + RECIPE


def costs_of(table: Table) -> Callable[[Any], list[float]]:
    recipe = {choice.name: choice.values[0] for choice in RECIPE}

    def costs(architecture: Any) -> list[float]:
        position = table.position({**recipe, **architecture})
        return [float(table.macs[position]), float(table.parameters[position])]

    return costs


def searches(table: Table, seed: int) -> Iterator[tuple[str, Search]]:
    """Yield new searches by name; nars without costs is the ablation."""
    yield "random", RandomSearch(ALL, EVALUATIONS, seed)
    yield "evolution", Evolution(ALL, EVALUATIONS, seed)
    yield "tpe", TPE(ALL, EVALUATIONS, seed)
    yield "nars", NARS(ARCHITECTURE, RECIPE, EVALUATIONS, costs_of(table), seed)
    yield "nars without costs", NARS(ARCHITECTURE, RECIPE, EVALUATIONS, None, seed)


def search_once(table: Table, search: Search, noise: Any, seed: int) -> dict[str, Any]:
    """Return the number of evaluations until the top 1 % is measured, and the curve."""
    top, evaluate = {*table.best(TOP).tolist()}, TableEvaluator(table, noise, seed)
    truth, reached, shown, best = table.accuracy, None, [], (-np.inf, 0)
    while asked := search.ask(1):
        trial = evaluate(asked[0])
        search.tell([trial])
        position = table.position(trial.candidate)
        best = max(best, (trial.value, position))
        shown.append(round(float(truth[best[1]]), 3))  # true accuracy of the best measured
        if reached is None and position in top:
            reached = len(shown)
    return {"reached": reached, "curve": shown, "chosen_in_top": best[1] in top}


def predict_once(table: Table, seed: int) -> dict[str, Any]:
    """Return τ on the pairs without labels, and on their best quarter, with and without costs."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(table.candidates))
    labelled, rest = order[:LABELS], order[LABELS:]
    evaluate, truth = TableEvaluator(table, "seed", seed), table.accuracy
    chosen = [table.candidates[int(row)] for row in labelled]
    scores = np.array([evaluate(each).value for each in chosen])
    others = [table.candidates[int(row)] for row in rest]
    parts = (ARCHITECTURE, RECIPE)
    inputs = [features(part, others) for part in parts]
    best = truth[rest] >= np.quantile(truth[rest], 0.75)
    found = {}
    for name, costs in {"with costs": costs_of(table), "without": None}.items():
        pretrained = costed(table.candidates, ARCHITECTURE, costs)
        predictor = new_predictor(parts, pretrained, seed)
        predictor.fit_scores(*(features(part, chosen) for part in parts), scores)
        means = predictor(*inputs).mean
        found[name] = {
            "tau": round(kendall_tau(means, truth[rest]), 4),
            "tau_best_quarter": round(kendall_tau(means[best], truth[rest][best]), 4),
        }
    return found


def describe_table(table: Table) -> dict[str, Any]:
    """Return quantiles, agreement of seeds, of short trainings and of recipes."""
    final = table.correct[:, -1].astype(float)
    tau = {
        "between seeds": [kendall_tau(final[a], final[b]) for a, b in ((0, 1), (0, 2), (1, 2))],
        "2 and 8 epochs": [kendall_tau(*each[[0, 2]].astype(float)) for each in table.correct],
        "4 and 8 epochs": [kendall_tau(*each[[1, 2]].astype(float)) for each in table.correct],
        "validation and test": [
            kendall_tau(*pair) for pair in zip(final, table.test_correct, strict=True)
        ],
    }
    grid = table.accuracy.reshape(-1, 24)  # architectures × recipes
    fixed = [
        int((table.accuracy > grid[grid[:, recipe].argmax()].max()).sum()) + 1
        for recipe in range(grid.shape[1])
    ]
    quantiles = (0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    return {
        "candidates": len(table.candidates),
        "quantiles": dict(
            zip(
                map(str, quantiles),
                np.quantile(table.accuracy, quantiles).round(2).tolist(),
                strict=True,
            )
        ),
        "tau": {name: np.round(values, 3).tolist() for name, values in tau.items()},
        "best_recipes": len({*grid.argmax(1).tolist()}),
        "architecture_only": {
            "accuracy_by_recipe": grid.max(0).round(2).tolist(),
            "rank_with_its_best_recipe": fixed,
        },
        "shortest_proxy": shortest_proxy(table.correct[0].T.astype(float)),
        "sha256": table.record["sha256"],
    }


def summarize(records: list[dict[str, Any]], table: Table) -> dict[str, Any]:
    taus = [each for each in records if each["part"] == "predictor"]
    pairs = [[each[name]["tau"] for name in ("with costs", "without")] for each in taus]
    better = sum(one > other for one, other in pairs)
    different = sum(one != other for one, other in pairs)
    predictor = {
        "labels": LABELS,
        "repeats": len(pairs),
        "better_with_costs": better,
        "sign_test_p": binomtest(better, different, alternative="greater").pvalue
        if different
        else 1.0,
        "tau": {
            name: spread([each[name]["tau"] for each in taus]) for name in ("with costs", "without")
        },
        "tau_best_quarter": {
            name: spread([each[name]["tau_best_quarter"] for each in taus])
            for name in ("with costs", "without")
        },
    }
    found: dict[str, Any] = {}
    for noise in NOISES:
        of = [each for each in records if each["part"] == "searches" and each["noise"] == noise]
        for name in dict.fromkeys(each["strategy"] for each in of):
            runs = [each for each in of if each["strategy"] == name]
            reached = [each["reached"] or np.inf for each in runs]
            found.setdefault(noise, {})[name] = {
                "repeats": len(runs),
                "reached": int(np.isfinite(reached).sum()),
                "quartiles": [
                    None if np.isinf(v) else float(v)
                    for v in np.quantile(reached, (0.25, 0.5, 0.75), method="inverted_cdf")
                ],
                "chosen_in_top": sum(each["chosen_in_top"] for each in runs),
                "accuracy": spread([each["curve"][-1] for each in runs]),
            }
    return {
        "command": "python benchmarks/search_tables.py",
        "data": "scikit-learn digits, real; table micro_nars",
        "evaluations": EVALUATIONS,
        "top": {"share": TOP, "candidates": len(table.best(TOP))},
        "random_expected_median": expected_median(len(table.candidates), len(table.best(TOP))),
        "predictor": predictor,
        "searches": found,
        "table": describe_table(table),
    }


def expected_median(count: int, top: int) -> int:
    """Return the median number of draws without repeats until one is of the top."""
    missed, draws = 1.0, 0
    while missed > 0.5:
        missed *= (count - top - draws) / (count - draws)
        draws += 1
    return draws


def spread(values: list[float]) -> dict[str, float]:
    found = np.array(values)
    return {
        "mean": round(float(found.mean()), 4),
        "least": round(float(found.min()), 4),
        "most": round(float(found.max()), 4),
    }


def draw(records: list[dict[str, Any]], table: Table, file: Path) -> None:
    """Draw the share of repeats that reached the top, and the true accuracy of the best."""
    with style():
        figure = new_figure(11.5, 4.4)
        left, right = figure.subplots(1, 2)
        of = [each for each in records if each["part"] == "searches" and each["noise"] == "seed"]
        names = list(dict.fromkeys(each["strategy"] for each in of))
        for name, colour in zip(names, (GREY, *COLOURS), strict=False):
            runs = [each for each in of if each["strategy"] == name]
            counts = np.arange(1, EVALUATIONS + 1)
            share = [np.mean([(r["reached"] or np.inf) <= n for r in runs]) for n in counts]
            left.step(counts, 100 * np.array(share), where="post", color=colour, label=name)
            curves = np.array([each["curve"] for each in runs])
            low, middle, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
            right.plot(counts, middle, color=colour)
            right.fill_between(counts, low, high, color=colour, alpha=0.13, linewidth=0)
        right.axhline(table.accuracy.max(), color=GREY, linestyle=":", label="best of the table")
        right.axhline(
            table.accuracy[table.best(TOP)[-1]], color=GREY, linestyle="--", label="top 1 %"
        )
        left.set(xlabel="evaluations", ylabel="repeats that reached the top 1 %, %")
        right.set(
            xlabel="evaluations", ylabel="true accuracy of the best measured, %", ylim=(92, 98)
        )
        figure.legend(loc="outside right center")
        save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--table", type=Path, help="another file of the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = load_table("micro_nars", given.table)
    lines = JsonLines(given.out.with_suffix(".jsonl"))
    known = {(r["part"], r.get("noise"), r.get("strategy"), r["seed"]) for r in lines.read()}
    began = time.process_time()
    for seed in range(given.repeats):
        if ("predictor", None, None, seed) not in known:
            lines.append({"part": "predictor", "seed": seed, **predict_once(table, seed)})
        for noise in given.noises:
            for name, search in searches(table, seed):
                if ("searches", noise, name, seed) not in known:
                    found = search_once(table, search, noise, seed)
                    head = {"part": "searches", "noise": noise, "strategy": name, "seed": seed}
                    lines.append({**head, **found})
        print(
            f"repeat {seed + 1} of {given.repeats}, {time.process_time() - began:.0f} CPU s",
            flush=True,
        )
    summary = summarize(lines.read(), table)
    write_whole(given.out, (json.dumps(summary, indent=1) + "\n").encode())
    if given.picture is not None:
        draw(lines.read(), table, given.picture)


if __name__ == "__main__":
    main()
