"""Compacter beside full fine-tuning and a classifier alone, from a trained model.

    nice -n 5 python benchmarks/adapters.py --root DIR --out results/adapters.json

DIR has the folders mnist and olivetti. A model of results/models, or a run, is fine-tuned on 50
images a class of MNIST (10,000 test images), and on the Olivetti faces (40 people; 80 test images,
so that one is 1.25 points), all in the size of the model's own images. ``per_call`` has adapters
for each call of a layer in a recursion step, for a recursive model, such as a ViTRM of digits:

    smallfry train --seed 0 --run runs/digits
    python benchmarks/adapters.py --root DIR --out results/adapters.json --model runs/digits \\
        --forms full compacter per_call --data mnist

Each form has the learning rate with the best validation accuracy on MNIST, of a seed
of its own; batches are of 16 images, the rest is default settings. The record is written after each
run, and a second start goes on.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import smallfry
from smallfry.compress.adapt.files import FILE, trained_names
from smallfry.training.config import DataConfig, ModelConfig, OptimizerConfig
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder, load_run

MODELS = Path(__file__).parents[1] / "results" / "models"
CHOOSING_SEED = 100
RATES = {"full": (1e-3, 3e-3)}  # others have few weights, of which each moves further
OTHER_RATES = (1e-2, 3e-2)
BATCH = 16  # 640 steps on MNIST
FORMS: dict[str, tuple[list[str], list[Any]]] = {  # frozen parts, methods
    "full": ([], []),
    "classifier": (["backbone"], []),
    "compacter": ([], [{"compacter": {}}]),
    "wide": ([], [{"compacter": {"n": 8, "reduction": 2}}]),
    "linear": ([], [{"compacter": {"activation": "none"}}]),
    "per_call": ([], [{"compacter": {"per_call": True}}]),
}
ALWAYS = [form for form in FORMS if form != "per_call"]  # which differs in recursive models alone


def data_configs(root: Path) -> dict[str, DataConfig]:
    """Return the settings of both data sets below a folder."""
    return {
        "mnist": DataConfig("mnist", root / "mnist", limit=500, validation=0.005),
        "olivetti": DataConfig(str(root / "olivetti")),
    }


def measure(
    data: DataConfig, start: str, form: str, rate: float, epochs: int, seed: int
) -> dict[str, Any]:
    """Train once, and return accuracies, trained parameters and the seconds of a core."""
    frozen, methods = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        summary = smallfry.train(
            data=data,
            model=ModelConfig(start=start, freeze=frozen),
            optimizer=OptimizerConfig(lr=rate),
            methods=methods,
            epochs=epochs,
            batch_size=BATCH,
            seed=seed,
            threads=1,
            run=run.path,
            references=False,
            progress="quiet",
        )
        measured, rows = summary["measured"], run.read_metrics()
        file = run.path / FILE
        model = load_run(run.path).model
        bytes_alone = file.stat().st_size if file.exists() else None
    trained = [p for p in model.parameters() if p.requires_grad]
    if form == "classifier":
        trained = list(model.get_classifier().parameters())
    elif methods:
        names = trained_names(model)
        trained = [p for name, p in model.named_parameters() if name in names]
    return {
        "accuracy": measured["test"]["accuracy"],
        "validation": rows[-1]["validation_accuracy"],
        "seconds": measured["cpu_seconds"],
        "trained": sum(p.numel() for p in trained),
        "parameters": measured["parameters"],
        "bytes_alone": bytes_alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="loopnet_70k", help="of results/models, or a run")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--forms", nargs="+", default=ALWAYS, choices=[*FORMS])
    parser.add_argument("--data", nargs="+", default=["mnist", "olivetti"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    record["provenance"] = provenance(torch.device("cpu"))
    runs: dict[str, Any] = record.setdefault("runs", {})
    sets, model = data_configs(given.root), Path(given.model).name
    start = MODELS / given.model if (MODELS / given.model).is_dir() else Path(given.model)

    def once(name: str, form: str, rate: float, seed: int) -> dict[str, Any]:
        key = f"{model}/{name}/{form}/{rate:g}/{seed}"
        if key not in runs:
            runs[key] = measure(sets[name], str(start), form, rate, given.epochs, seed)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
            print(key, runs[key], flush=True)
        found: dict[str, Any] = runs[key]
        return found

    for form in given.forms:
        rates = RATES.get(form, OTHER_RATES)
        found = {rate: once("mnist", form, rate, CHOOSING_SEED)["validation"] for rate in rates}
        rate = max(found, key=lambda each: found[each])
        for name in given.data:
            rows = [once(name, form, rate, seed) for seed in given.seeds]
            each = [100 * row["accuracy"] for row in rows]
            share = 100 * rows[0]["trained"] / rows[0]["parameters"]
            print(
                f"{model}, {name}, {form}: {statistics.mean(each):.2f} % {each}, "
                f"lr {rate:g}, {rows[0]['trained']:,} parameters trained ({share:.2f} %)",
                flush=True,
            )


if __name__ == "__main__":
    main()
