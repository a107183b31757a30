"""Fine-tuning of a trained model against training from random weights, at equal epochs.

    python benchmarks/fine_tune.py --root DIR --out results/fine_tune.json

DIR has the folders cifar10 and olivetti. A model of results/models, trained on CIFAR-10, and the
same architecture with random weights, each with the default settings, on the Olivetti faces (40
people) and on 50 images a class of CIFAR-10. The latter are among the images that the model was
trained on; its test images are not.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import smallfry
from smallfry.training.config import DataConfig, ModelConfig
from smallfry.training.provenance import provenance

MODELS = Path(__file__).parents[1] / "results" / "models"


def data_configs(root: Path) -> dict[str, DataConfig]:
    """Return the settings of both data sets below a folder."""
    return {
        "olivetti": DataConfig(str(root / "olivetti"), image_size=32, channels=3),
        "cifar10, 50 a class": DataConfig("cifar10", root / "cifar10", limit=500, validation=0.01),
    }


def measure(data: DataConfig, model: ModelConfig, epochs: int, seed: int) -> dict[str, Any]:
    """Train once, and return the test accuracy and the seconds of a core."""
    with tempfile.TemporaryDirectory() as folder:
        summary = smallfry.train(
            data=data,
            model=model,
            epochs=epochs,
            seed=seed,
            threads=1,
            run=Path(folder) / "run",
            references=False,
            progress="quiet",
        )
    measured = summary["measured"]
    return {"accuracy": measured["test"]["accuracy"], "seconds": measured["cpu_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="loopnet_70k")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    forms = {
        "random weights": ModelConfig(given.model),
        "fine-tuned": ModelConfig(start=str(MODELS / given.model)),
    }
    measured: dict[str, Any] = {}
    for name, data in data_configs(given.root).items():
        for form, model in forms.items():
            runs = [measure(data, model, given.epochs, seed) for seed in given.seeds]
            measured[f"{name}/{form}"] = runs
            each = [100 * run["accuracy"] for run in runs]
            seconds = statistics.mean(run["seconds"] for run in runs)
            print(f"{name}, {form}: {statistics.mean(each):.1f} %", each, f"{seconds:.0f} s")
    record = {"measured": measured, "provenance": provenance(torch.device("cpu"))}
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
