"""Compare a network that is equivariant to quarter turns with an ordinary one on distorted digits.

All are trained on upright digits by the recipe of the kit. The ordinary network is of no more
parameters, and has as many epochs as take it about the CPU seconds of the equivariant one; both
are in the record. Written after each run; the same command goes on. ``--part samples`` measures
the error of layers under a turn by the number of samples, in float64.

    python benchmarks/kits_equivariant.py --out results/kits/equivariant/digits.json
    python benchmarks/kits_equivariant.py --part samples --out results/kits/equivariant/samples.json
"""

import argparse
import json
import statistics
import time
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smallfry
from smallfry.data import load_data
from smallfry.kits.equivariant.group import GL, SL, sample_rotations
from smallfry.kits.equivariant.models import GResNet
from smallfry.kits.equivariant.pictures import accuracy_by_angle, draw_turns
from smallfry.kits.equivariant.task import turned_alike
from smallfry.layers.group_conv import GroupConv2d, LiftingConv2d, Samples

NETWORKS: dict[str, dict[str, Any]] = {
    "turns": {"name": "gl2_resnet_turns"},
    "plain": {"name": "plain_gresnet", "options": {"width": 14}},
    "fresh": {"name": "gl2_resnet_turns", "options": {"sampling": "fresh"}},
}
TESTS: dict[str, dict[str, Any]] = {
    "upright": {"distorted": "none"},
    "distorted_20": {},
    "distorted_45": {"rotation": 45.0},
    "distorted_180": {"rotation": 180.0},
}
DRAWS = 5  # of samples, where a network draws them
ANGLES = range(0, 361, 15)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers to normalised images."""
    found = torch.cat([model(part).argmax(1) for part in torch.split(images, 128)])
    return (found == labels).double().mean().item()


def scores(model: nn.Module, normalize: Any) -> dict[str, Any]:
    """Return accuracies on all tests, and how many answers quarter turns leave."""
    found: dict[str, Any] = {}
    for name, options in TESTS.items():
        test = load_data("equivariant-digits", options=options).test
        found[name] = accuracy(model, normalize(test.images), test.labels)
    test = load_data("equivariant-digits").test
    images = normalize(test.images)
    found["unchanged"], found["largest_change"], found["turned"] = [], [], []
    for turns in (1, 2, 3):
        same, change = turned_alike(model, images, turns)
        found["unchanged"].append(same.double().mean().item())
        found["largest_change"].append(change.max().item())
        found["turned"].append(accuracy(model, images.rot90(turns, (2, 3)), test.labels))
    return found


def train(network: str, seed: int, epochs: int, keep: Path | None) -> dict[str, Any]:
    """Train once, and score."""
    with TemporaryDirectory() as place:
        folder = keep or Path(place) / "run"
        began = time.process_time()
        smallfry.train(
            task="equivariant",
            model=NETWORKS[network],
            epochs=epochs,
            seed=seed,
            threads=1,
            progress="quiet",
            run=folder,
        )
        seconds = time.process_time() - began
        trained = smallfry.load(folder)
    model = trained.model.eval()
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "cpu_seconds": round(seconds, 1),
    }
    if network != "fresh":
        return {**record, **scores(model, trained.normalize)}
    drawn = []
    for draw in range(DRAWS):
        frozen = deepcopy(model)
        assert isinstance(frozen, GResNet)
        drawn.append(scores(frozen.freeze_samples(draw), trained.normalize))
    for name in TESTS:
        values = [each[name] for each in drawn]
        record[name] = statistics.fmean(values)
        record[f"{name}_std"] = statistics.stdev(values)
    record["unchanged"] = [statistics.fmean(each["unchanged"]) for each in drawn]
    return record


def digits(
    out: Path, seeds: list[int], epochs: int, plain_epochs: int, pictures: Path | None
) -> None:
    """Train all networks; draw the accuracy of the first seed's by angle."""
    record: dict[str, Any] = {"command": f"python benchmarks/{Path(__file__).name}", "runs": {}}
    if out.is_file():
        record = json.loads(out.read_text())
    runs = record["runs"]

    def done(network: str, seed: int, epochs: int) -> dict[str, Any]:
        key = f"{network} seed {seed}"
        if key not in runs:
            keep = pictures / network if pictures and seed == seeds[0] else None
            runs[key] = train(network, seed, epochs, keep)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
            print(key, runs[key], flush=True)
        found: dict[str, Any] = runs[key]
        return found

    for seed in seeds:
        done("turns", seed, epochs)
        done("plain", seed, plain_epochs)
    done("fresh", seeds[0], epochs)
    if pictures:
        lines, test = {}, load_data("equivariant-digits", options=TESTS["upright"]).test
        labels = {"turns": "equivariant to quarter turns", "plain": "ordinary"}
        for network, label in labels.items():
            trained = smallfry.load(pictures / network)
            lines[label] = accuracy_by_angle(
                trained.model.eval(), test.images, test.labels, trained.normalize, ANGLES
            )
        draw_turns(test.images[2:3], lines, ANGLES, Path("docs/pictures/equivariant_turns.png"))


@torch.no_grad()
def samples(out: Path) -> None:
    """Measure the change of a group's mean under a quarter turn, by the number of samples."""
    record: dict[str, Any] = {"command": f"python benchmarks/{Path(__file__).name} --part samples"}
    counts = (4, 8, 16, 32, 64, 128)
    for name, group in {"SO(2)": SL(variance=0.0), "GL+(2)": GL(variance=0.1)}.items():
        torch.manual_seed(0)
        lift = LiftingConv2d(group, 1, 3, 5, width=8, hidden=1).double()
        conv = GroupConv2d(group, 3, 3, 3, padding=0, width=8, hidden=1).double()
        random = torch.Generator().manual_seed(1)
        picture = torch.randn(1, 1, 7, 7, dtype=torch.float64, generator=random)
        both = torch.cat([picture, picture.rot90(1, (2, 3))])
        errors = []
        for count in counts:
            found = []
            for _ in range(60):
                # independent rotations, times a window of symmetric matrices
                drawn = group.sample(count, random)
                r = sample_rotations(count, 2, random)
                some = Samples(drawn.elements @ r, r.mT @ drawn.inverses)
                h = F.gelu(lift(both, some))
                upright, turned = F.gelu(conv(h, some, some) / count).mean(2).flatten(1)
                found.append((upright - turned).square().mean())
            errors.append(torch.stack(found).mean().sqrt().item())
        slope = float(np.polyfit(np.log(counts), np.log(errors), 1)[0])
        record[name] = {"samples": counts, "errors": errors, "slope": slope}
        print(name, [f"{error:.2e}" for error in errors], f"slope {slope:.3f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Run what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("digits", "samples"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plain_epochs", type=int, default=75, help="of about the same seconds")
    parser.add_argument("--pictures", type=Path, help="keep runs of the first seed, and draw")
    given = parser.parse_args()
    if given.part == "samples":
        samples(given.out)
    else:
        digits(given.out, given.seeds, given.epochs, given.plain_epochs, given.pictures)


if __name__ == "__main__":
    main()
