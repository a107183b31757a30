"""Accuracy of loopnet_2m on corrupted CIFAR-10 images, before and after compression.

    python benchmarks/corruptions.py FOLDER [quick|full] [IMAGES]

FOLDER has CIFAR-10's parquet files. Models: as it is; int8 weights and activations; and the share
of weights of smallest magnitude in each convolution set to zero, without fine-tuning, with batch
norms estimated again. Each condition is a line of results/corruptions.jsonl, so that a stopped
benchmark goes on.
"""

import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

from smallfry import compress
from smallfry.analysis import collect, compare, corrupt, measure_geometry
from smallfry.data import load_data
from smallfry.data.corruptions import SETS
from smallfry.deploy.pretrained import load_trained
from smallfry.report.corruptions import draw_corruptions, mean_corruption_errors
from smallfry.training.run import TrainedModel

MODEL = "results/models/loopnet_2m"
SHARES = (0.5,)
CALIBRATION = 1000  # training images
SEED = 0


@torch.no_grad()
def pruned(trained: TrainedModel, share: float, images: torch.Tensor) -> TrainedModel:
    """Set the smallest weights of each convolution to zero, and estimate batch norms again."""
    model = copy.deepcopy(trained.model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            prune.l1_unstructured(module, "weight", share)
            prune.remove(module, "weight")
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
            module.train()
    for rows in images.split(250):
        model(trained.normalize(rows))
    return trained._replace(model=model.eval())


def main() -> None:
    folder, kind, count = sys.argv[1], (*sys.argv[2:], "quick")[0], int((*sys.argv[3:], 1000)[0])
    data = load_data("cifar10", folder, image_size=32)
    generator = torch.Generator().manual_seed(SEED)
    trained = load_trained(MODEL)
    data = data.relabelled(trained.classes)
    train = data.train.take(torch.randperm(len(data.train), generator=generator)[:CALIBRATION])
    test = data.test.take(torch.randperm(len(data.test), generator=generator)[:count])
    models = {
        "float32": trained,
        "int8": compress.apply(trained, [compress.Quantize(weights=8, activations=8)], data),
        **{f"{share:.0%} of weights 0": pruned(trained, share, train.images) for share in SHARES},
    }
    lines = Path("results/corruptions.jsonl")
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(row["corruption"], row["severity"]): row for row in known if row["images"] == count}
    for name, severity in (("clean", 0), *SETS[kind]):
        if (name, severity) in done:
            continue
        begun = time.monotonic()
        images = test.images if severity == 0 else corrupt(test.images, name, severity, SEED)
        found = {m: measure_geometry(*collect(each, images, test.labels)[:4])
                 for m, each in models.items()}  # fmt: skip
        base = found["float32"]
        row = {
            **{"corruption": name, "severity": severity, "images": count, "seed": SEED},
            "accuracy": {m: g.accuracy for m, g in found.items()},
            "mean_margin": {m: float(g.margins.mean()) for m, g in found.items()},
            "broken": {m: len(compare(base, g).broken) for m, g in found.items()},
            "repaired": {m: len(compare(base, g).repaired) for m, g in found.items()},
        }
        done[name, severity] = row
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, severity, row["accuracy"], f"{time.monotonic() - begun:.0f} s", flush=True)
    accuracies = {key: row["accuracy"] for key, row in done.items()}
    print("mean corruption error:", mean_corruption_errors(accuracies))
    Path("docs/pictures/corruptions.png").write_bytes(draw_corruptions(accuracies))


if __name__ == "__main__":
    main()
