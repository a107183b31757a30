"""Accuracy of 100-layer plain networks on digits, with PyTorch's and with critical initial weights.

    python benchmarks/critical_init.py

Each cell is a training run in a folder of its own, so that a stopped benchmark goes on. Both kinds
of initial weights have one learning rate.
"""

import json
import sys
from pathlib import Path
from typing import Any

import smallfry
from smallfry.report.figure import new_figure, save, style
from smallfry.training.run import RunFolder

EPOCHS, WIDTH, DEPTH = 10, 256, 100
RATE = 1e-4
ACTIVATIONS = ("tanh", "relu")
SEEDS = (0,)


def measure(folder: Path, act: str, init: str, seed: int) -> dict[str, Any]:
    """Train one network, or read its result."""
    run = RunFolder(folder / f"{act}-{init}-{RATE:g}-{seed}")
    options = {"depth": DEPTH, "embed_dim": WIDTH, "act_layer": act}
    if run.config.is_file():
        from smallfry.training.train import resume

        summary = resume(run.path)
    else:
        summary = smallfry.train(
            data={"name": "digits"},
            model={"name": "plain_mlp", "init": init, "options": options},
            optimizer={"lr": RATE, "weight_decay": 0.0},
            epochs=EPOCHS,
            seed=seed,
            references=False,
            progress="quiet",
            run=run.path,
        )
    history = run.read_metrics()
    row = {
        **{"activation": act, "init": init, "seed": seed},
        "validation_accuracy": max(each["validation_accuracy"] for each in history),
        "test_accuracy": summary["measured"]["test"]["accuracy"],
        "train_loss": [each["train_loss"] for each in history],
    }
    shown = {key: value for key, value in row.items() if key != "train_loss"}
    print(json.dumps(shown), flush=True)
    return row


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the training losses by epoch."""
    colours = {"default": "#9ca3af", "critical": "#2563eb"}
    with style():
        figure = new_figure(9, 3.6)
        grid = figure.subplots(1, len(ACTIVATIONS), sharey=True)
        for axes, act in zip(grid, ACTIVATIONS, strict=True):
            axes.set_title(f"{act}, {DEPTH} layers of {WIDTH}")
            for row in rows:
                if row["activation"] == act:
                    label = f"{row['init']} initial weights" if row["seed"] == 0 else None
                    epochs = range(1, len(row["train_loss"]) + 1)
                    axes.plot(epochs, row["train_loss"], color=colours[row["init"]], label=label)
            axes.set_xlabel("epoch")
        grid[0].set_ylabel("training loss, digits")
        grid[0].legend()
        save(figure, file)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/critical_init")
    rows = [
        measure(folder, act, init, seed)
        for act in ACTIVATIONS
        for init in ("critical", "default")
        for seed in SEEDS
    ]
    facts = {
        "command": "python benchmarks/critical_init.py",
        "data": "digits (real)",
        "device": "CPU, 1 thread",
        **{"lr": RATE, "epochs": EPOCHS, "depth": DEPTH, "width": WIDTH},
    }
    text = json.dumps({**facts, "rows": rows}, indent=1)
    Path("results/critical_init.json").write_text(text + "\n")
    draw(rows, Path("docs/pictures/critical_init.png"))


if __name__ == "__main__":
    main()
