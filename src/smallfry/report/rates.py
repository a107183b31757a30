"""Plot of a learning-rate range test."""

from collections.abc import Sequence
from pathlib import Path

from smallfry.report.figure import COLOURS, GREY, new_figure, save, style


def draw_rates(
    rates: Sequence[float],
    losses: Sequence[float],
    smooth: Sequence[float],
    suggestion: float | None,
    file: Path,
) -> None:
    """Draw the loss over the learning rate, with the suggestion.

    Args:
        rates: Learning rate of each step.
        losses: Its loss.
        smooth: The smoothed loss.
        suggestion: Suggested rate, if any.
        file: The PNG to write.
    """
    with style():
        figure = new_figure(5.6, 3.6)
        axes = figure.subplots()
        axes.plot(rates, losses, ".", color=GREY, alpha=0.5, label="loss of a step")
        axes.plot(rates, smooth, color=COLOURS[0], label="smoothed")
        if suggestion is not None:
            label = f"suggestion: {suggestion:.2g}"
            axes.axvline(suggestion, color=COLOURS[1], linestyle="--", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.legend()
        save(figure, file)
