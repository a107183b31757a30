"""Learning curves: loss, accuracy, halting and learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from smallfry.report.figure import COLOURS, GREY, new_figure, save, style


def learning_curves(history: Sequence[Mapping[str, float]], file: Path) -> None:
    """Draw the rows of ``metrics.csv`` over epochs.

    The training loss and accuracy are those of augmented images, with the halting loss in the
    former where the model has one.
    """
    held_out = "validation" if history and "validation_loss" in history[0] else "test"
    panels = [
        ("loss", {"train, augmented": "train_loss", held_out: f"{held_out}_loss"}),
        ("accuracy, %", {"train, augmented": "train_accuracy", held_out: f"{held_out}_accuracy"}),
        ("halting probability", {"train": "train_halting", held_out: f"{held_out}_halting"}),
        ("learning rate", {"": "learning_rate"}),
    ]
    panels = [panel for panel in panels if history and set(panel[1].values()) <= set(history[0])]
    epochs = [row["epoch"] for row in history]
    with style():
        figure = new_figure(3.6 * max(1, len(panels)), 3.2)
        for axes, (title, lines) in zip(
            figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False
        ):
            for colour, (label, column) in zip((GREY, COLOURS[0]), lines.items(), strict=False):
                values = [row[column] * (100 if "%" in title else 1) for row in history]
                marker = "o" if len(values) == 1 else None
                axes.plot(epochs, values, color=colour, label=label, marker=marker)
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if title == "loss" and any(row[c] > 0 for row in history for c in lines.values()):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(NullFormatter())
            if title == "halting probability":
                axes.set_ylim(0, 1.02)
            if len(lines) > 1:
                axes.legend()
        save(figure, file)
