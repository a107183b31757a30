"""Pruning to half of the multiply-accumulates on CIFAR-10: HESSO beside Torch-Pruning's methods.

    nice -n 5 python benchmarks/prune.py --root DIR --out results/prune.json

From the trained weights in results/models, each contestant gets the same training: epochs,
optimizer, rate, order of images. "none" is that training alone. HESSO prunes during its first part.
Torch-Pruning's magnitude and Taylor importance (global over all groups, the first-order term on
1,024 training images) prune before it, at the smallest ratio that leaves at most the wanted
multiply-accumulates; survivors are multiples of the same number. With --distil all of them learn
from the unpruned model, too. Accuracy is on the test split, after the last epoch; nothing is chosen
on it. Latency is of the ONNX files, all in turns. Runs that
have ended are not repeated: the file is completed.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

import smallfry
from smallfry import compress
from smallfry.costing import macs
from smallfry.deploy.pretrained import load_trained, save_pretrained
from smallfry.studies.deployed import measure_deployed
from smallfry.training.evaluation_data import load_like
from smallfry.training.provenance import provenance
from smallfry.training.run import TrainedModel
from smallfry.transforms.resize import Resize, tensors_of

MODELS = Path(__file__).parents[1] / "results" / "models"
CONTESTANTS = ("none", "hesso", "cric", "torch-pruning magnitude", "torch-pruning taylor")
TAYLOR_IMAGES = 1024


def pruned(trained: TrainedModel, data: Any, share: float, divisible: int, taylor: bool) -> Any:
    """Prune with Torch-Pruning, and return the model as one of smallfry's."""
    example = torch.zeros(1, trained.channels, trained.image_size, trained.image_size)
    most = (1 - share) * macs(trained.model, example)
    for percent in range(10, 100):
        model = copy.deepcopy(trained.model).requires_grad_(True)  # the graph needs all
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        if taylor:
            importance = tp.importance.GroupTaylorImportance()
            batch = data.train.take(torch.arange(TAYLOR_IMAGES))
            F.cross_entropy(model(trained.normalize(batch.images)), batch.labels).backward()
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=importance,
            global_pruning=True,
            pruning_ratio=percent / 100,
            ignored_layers=[model.get_classifier()],
            round_to=divisible,
        )
        pruner.step()
        model.zero_grad(set_to_none=True)
        if macs(model, example) <= most:
            return described(trained, model)
    raise SystemExit("no ratio leaves so few multiply-accumulates")


def described(trained: TrainedModel, model: nn.Module) -> TrainedModel:
    """Find the transform that a pruned model came by."""
    before = tensors_of(trained.model)
    shapes = {
        name: list(tensor.shape)
        for name, tensor in tensors_of(model).items()
        if tensor.shape != before[name].shape
    }
    spec = trained.spec.then(Resize(shapes))
    small = smallfry.transforms.build(spec, model.state_dict())
    return trained.compressed(small, spec, [])


def folder(arguments: argparse.Namespace, name: str) -> Path:
    """Find the folder of a contestant's run."""
    distilled = "-distilled" if arguments.distil else ""
    return arguments.runs / (
        f"{arguments.model}-{arguments.share}-{arguments.epochs}-{arguments.seed}{distilled}-{name}"
    )


def settings(arguments: argparse.Namespace, start: Path, run: Path) -> dict[str, Any]:
    """Build the training that all contestants share."""
    teacher = {"teacher": str(MODELS / arguments.model), "temperature": 2.0}
    distillation = {"distillation": teacher} if arguments.distil else {}
    return {
        "data": {
            **{"name": "cifar10", "root": arguments.root, "validation": 0.02},
            "limit": arguments.limit,
        },
        "model": {"start": str(start)},
        "augment": {"mixup": 0.0, "cutmix": 0.0},
        "optimizer": {"name": "sgd", "lr": arguments.lr, "weight_decay": 5e-4},
        "schedule": {"warmup_epochs": 0.2, "shape": "linear"},
        "ema": {"decay": 0.0},
        "epochs": arguments.epochs,
        "batch_size": 256,
        "seed": arguments.seed,
        "threads": 1,
        "workers": 0,
        "precision": "bf16-mixed",
        "channels_last": True,
        "references": False,
        "progress": "plain",
        "run": run,
        **distillation,
    }


def measure(name: str, arguments: argparse.Namespace, data: Any, parent: Path) -> dict[str, Any]:
    """Prune and train one contestant; return its figures."""
    run, start, methods = folder(arguments, name), parent, []
    if name == "hesso":
        methods = [
            compress.HESSO(
                arguments.share,
                of="macs",
                begin=0.0,
                end=0.4,
                periods=5,
                divisible=arguments.divisible,
            )
        ]
    elif name == "cric":
        methods = [
            compress.CRIC(
                arguments.share,
                of="macs",
                begin=2,
                shrinking=0.2,
                divisible=arguments.divisible,
            )
        ]
    elif name != "none":
        start = arguments.runs / f"{run.name}-start"
        taylor = name.endswith("taylor")
        trained = load_trained(parent)
        if not start.exists():
            small = pruned(trained, data, arguments.share, arguments.divisible, taylor)
            save_pretrained(small, start)
    if run.exists():
        summary = smallfry.training.train.resume(run)
    else:
        summary = smallfry.train(**settings(arguments, start, run), methods=methods)
    measured = summary["measured"]
    return {
        "test_accuracy": measured["test"]["accuracy"],
        "macs": measured["macs"],
        "parameters": measured["parameters"],
        "cpu_seconds": measured.get("cpu_seconds"),
        "epochs": measured["epochs"],
    }


def main() -> int:
    """Measure what is missing in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--model", default="loopnet_70k")
    parser.add_argument("--only", nargs="*", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--divisible", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit", type=int, help="training images; default all")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distil", action="store_true", help="with the unpruned model as teacher")
    parser.add_argument("--runs", type=Path, default=Path("runs/prune"))
    parser.add_argument("--out", type=Path, default=Path("results/prune.json"))
    parser.add_argument("--without_latency", action="store_true", help="on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    key = f"{arguments.model}, {arguments.share} of the macs, {arguments.epochs} epochs"
    key += f", {arguments.limit or 'all'} images, seed {arguments.seed}"
    key += ", distilled" if arguments.distil else ""
    entry = results.setdefault(key, {})
    parent = MODELS / arguments.model
    trained = load_trained(parent)
    data, test, _ = load_like(trained, parent, "cifar10", arguments.root)
    if "parent" not in entry:
        found = smallfry.training.evaluation.predict(trained.model, test, trained.normalize)
        accuracy = smallfry.training.evaluation.score(found)["accuracy"]
        entry["parent"] = {"test_accuracy": accuracy}
    for name in arguments.only:
        if name not in entry:
            entry[name] = measure(name, arguments, data, parent)
            print(name, entry[name], flush=True)
            entry["provenance"] = provenance(torch.device("cpu"))
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.without_latency:
        return 0
    runs = {name: folder(arguments, name) for name in arguments.only}
    latencies = measure_deployed(runs, arguments.root, 300, 1, print)
    entry["latency_ms"] = {n: each["float32"]["median_ms"] for n, each in latencies.items()}
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(entry, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
