"""Share of solved Sudoku by improvement steps, with the clues of the training and with fewer.

    python benchmarks/trm_steps.py runs/sudoku9 --out results/trm/sudoku9_steps.json

The puzzles with other clues have another seed than the run's, so that none of them was seen.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from smallfry.data import load_data
from smallfry.report.figure import new_figure, save, style
from smallfry.training.config import config_of
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder, TrainedModel, load_run


@torch.inference_mode()
def solved(trained: TrainedModel, name: str, options: dict[str, Any], steps: int) -> list[float]:
    """Compute the share of test puzzles that are right after each step, in percent."""
    test = load_data(name, options=options).test
    right = torch.zeros(steps)
    for images, labels in zip(test.images.split(100), test.labels.split(100), strict=True):
        for number, state in enumerate(trained.model.recurse(trained.normalize(images), steps)):
            right[number] += (state.logits.argmax(-1) == labels.flatten(1)).all(1).sum()
    return [round(100 * float(share), 2) for share in right / len(test)]


def main() -> None:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--extra_clues", type=int, nargs="*", default=[6, 0])
    parser.add_argument("--out", type=Path, default=Path("results/trm/sudoku9_steps.json"))
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = load_run(given.run)
    config = RunFolder(given.run).config
    data = config_of(yaml.safe_load(config.read_text()), config).data
    rows = {"as in training": solved(trained, data.name, data.options, given.steps)}
    for clues in given.extra_clues:
        options = {**data.options, "extra_clues": clues, "seed": data.options.get("seed", 0) + 1}
        rows[f"{clues} extra clues"] = solved(trained, data.name, options, given.steps)
        print(clues, rows[f"{clues} extra clues"], flush=True)
    found = {"solved_percent": rows, "provenance": provenance(torch.device("cpu"))}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    if given.picture is not None:
        with style():
            figure = new_figure(6, 3.6)
            axes = figure.subplots()
            for name, shares in rows.items():
                axes.plot(range(1, given.steps + 1), shares, marker="o", label=name)
            axes.set(xlabel="improvement steps", ylabel="puzzles solved, %", ylim=(0, 102))
            axes.legend()
            save(figure, given.picture)


if __name__ == "__main__":
    main()
