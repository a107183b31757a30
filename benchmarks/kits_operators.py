"""Compare neural operators on generated Darcy flow: MgNO and FNO of no more parameters.

Both have the recipe of the kit; the rate of each is the best of three by the validation error of
seed 0. Written after each run; the same command goes on.

    python benchmarks/kits_operators.py --out results/kits/operators/darcy.json
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import smallfry
from smallfry.data import load_data
from smallfry.kits.operators.task import relative_l2

MODELS = ("mgno_tiny", "fno_tiny")
RATES = (1e-3, 2e-3, 4e-3)


def train(model: str, rate: float, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train once; return errors, parameters and seconds."""
    with TemporaryDirectory() as place:
        began = time.process_time()
        trained = smallfry.train(
            task="operators",
            model={"name": model},
            data={"name": "operators-darcy", "options": options},
            optimizer={"name": "adam", "lr": rate, "weight_decay": 1e-4, "clip": None},
            seed=seed,
            threads=1,
            progress="quiet",
            run=Path(place) / "run",
        )
        seconds = time.process_time() - began
        scores = trained.evaluate()
        held = trained.evaluate(split="validation")
        found = smallfry.load(Path(place) / "run")
        parameters = sum(p.numel() for p in found.model.parameters())
    return {
        "test_l2": scores["l2_error"],
        "test_h1": scores["h1_error"],
        "validation_l2": held["l2_error"],
        "parameters": parameters,
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    """Run what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=400)
    given = parser.parse_args()
    record: dict[str, Any] = {"command": "python benchmarks/kits_operators.py", "runs": {}}
    if given.out.is_file():
        record = json.loads(given.out.read_text())
    options = {"samples": given.samples}
    data = load_data("operators-darcy", options=options)
    mean = data.train.labels.mean(0, keepdim=True).expand(len(data.test), -1, -1, -1)
    record["mean_field_l2"] = relative_l2(mean, data.test.labels).mean().item()
    record["data"] = dict(data.generated or {})
    runs = record["runs"]

    def done(model: str, rate: float, seed: int) -> dict[str, Any]:
        key = f"{model} {rate:g} seed {seed}"
        if key not in runs:
            runs[key] = train(model, rate, seed, options)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
            print(key, runs[key], flush=True)
        found: dict[str, Any] = runs[key]
        return found

    for model in MODELS:
        best = min(RATES, key=lambda rate: done(model, rate, given.seeds[0])["validation_l2"])
        errors = [done(model, best, seed)["test_l2"] for seed in given.seeds]
        print(f"{model} at {best:g}: " + ", ".join(f"{error:.2%}" for error in errors))


if __name__ == "__main__":
    main()
