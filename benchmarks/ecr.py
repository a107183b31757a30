"""Cues of a teacher's anchors (ECR) for a ViTRM on scikit-learn's digits.

    nice -n 5 python benchmarks/ecr.py --out results/ecr.json

The teacher is a kernel principal component analysis (radial basis functions, 32 components) of the
1,078 training images, as gone as its anchors are made. The student, ViTRM micro at a width of 32,
is trained with AdamW at 3e-3 and a cosine (batch 64, 12 epochs): without cues, with cues and no
teacher, with the teacher's assignments in half of the images (ECR), and the same with the
consistency loss of this project at a weight of 0.1. On 719 test images: accuracy, accuracy of a
logistic regression on the student's features, and the rank correlation (Spearman) of the distances
between class means with those of the teacher's features. The record is written after each run, and
a second start goes on.
"""

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.decomposition import KernelPCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.compress.distill.anchors import AnchorConsistency, AnchorSet, pooled_features
from smallfry.training.provenance import provenance
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.cues import Cues

TRAINED, BATCH, RATE, EPOCHS, ANCHORS = 1078, 64, 3e-3, 12, 32
GUESS, CONSISTENCY = 0.1, 0.1  # weights of losses
SPEC = ModelSpec("vitrm_micro_patch4_8", {"embed_dim": 32, "num_heads": 2, "mlp_hidden_dim": 48})
FORMS = ("no cues", "cues alone", "ecr", "ecr and consistency")


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return normalised images (images, 1, 8, 8) and labels, in an order of the seed."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 8 - 1
    return images, torch.tensor(labels)[order]


def teacher_features(images: Tensor) -> Tensor:
    """Return the teacher's features, fitted to the training images alone."""
    rows = images.flatten(1).numpy()
    teacher = KernelPCA(32, kernel="rbf", gamma=1 / 64).fit(rows[:TRAINED])
    return torch.from_numpy(teacher.transform(rows))


def class_distances(features: Tensor, labels: Tensor) -> Any:
    """Compute the distances between class means."""
    return pdist(torch.stack([features[labels == c].mean(0) for c in range(10)]).numpy())


def train(form: str, images: Tensor, labels: Tensor, anchors: AnchorSet, seed: int) -> nn.Module:
    """Train a student."""
    torch.manual_seed(seed)
    model = build(SPEC if form == "no cues" else SPEC.then(Cues(ANCHORS))).train()
    network: Any = model
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    steps = EPOCHS * -(-TRAINED // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    consistency = AnchorConsistency(anchors.similarities)
    taught = form.startswith("ecr")
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED).split(BATCH):
            given = anchors.assignments[rows]
            with network.cues.given(given) if taught else nullcontext():
                features = network.forward_features(images[rows])
                loss = F.cross_entropy(network.forward_head(features), labels[rows])
                if taught:
                    loss = loss + GUESS * network.cues.guess_loss()
            if form == "ecr and consistency":
                loss = loss + CONSISTENCY * consistency(features[:, 0], given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(form: str, seed: int) -> dict[str, float]:
    """Train a student, and score it."""
    images, labels = digits(seed)
    taught = teacher_features(images)
    anchors = AnchorSet.from_features(taught[:TRAINED], ANCHORS, seed)
    model = train(form, images, labels, anchors, seed)
    features = pooled_features(model, [images])
    with torch.no_grad():
        right = model(images[TRAINED:]).argmax(1) == labels[TRAINED:]
    probe = LogisticRegression(max_iter=2000).fit(features[:TRAINED], labels[:TRAINED])
    own, theirs = (class_distances(f[TRAINED:], labels[TRAINED:]) for f in (features, taught))
    return {
        "accuracy": 100 * float(right.float().mean()),
        "probe": 100 * float(probe.score(features[TRAINED:], labels[TRAINED:])),
        "rank_correlation": float(spearmanr(own, theirs).statistic),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    record["provenance"] = provenance(torch.device("cpu"))
    runs: dict[str, Any] = record.setdefault("runs", {})
    for seed in given.seeds:
        for form in FORMS:
            key = f"{form}/{seed}"
            if key not in runs:
                runs[key] = measure(form, seed)
                given.out.write_text(json.dumps(record, indent=1) + "\n")
                print(key, runs[key], flush=True)
    for form in FORMS:
        rows = [runs[f"{form}/{seed}"] for seed in given.seeds]
        text = []
        for name in ("accuracy", "probe", "rank_correlation"):
            each = [row[name] for row in rows]
            spread = statistics.stdev(each) if len(each) > 1 else 0.0
            text.append(f"{name} {statistics.mean(each):.2f} ± {spread:.2f}")
        print(f"{form}: {', '.join(text)}, {rows[0]['parameters']:,} parameters")


if __name__ == "__main__":
    main()
