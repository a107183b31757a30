"""Accuracy of models under corruptions: means, and a picture."""

from collections.abc import Mapping

import numpy as np

from smallfry.report.figure import COLOURS, GREY, encode, in_legend, new_figure, plain, style

__all__ = ["Accuracies", "corruption_names", "draw_corruptions", "mean_corruption_errors"]

LINES = ("-", "--", ":", "-.")  # of models beyond the colours
Accuracies = Mapping[tuple[str, int], Mapping[str, float]]  # by corruption and severity, by model


def corruption_names(accuracies: Accuracies) -> list[str]:
    """List the corruptions, without the clean images of severity 0."""
    return list(dict.fromkeys(name for name, severity in accuracies if severity))


def mean_corruption_errors(accuracies: Accuracies) -> dict[str, float]:
    """Compute the mean error of each model over severities, and then over corruptions.

    Example:
        >>> mean_corruption_errors({("clean", 0): {"a": 1.0}, ("fog", 1): {"a": 0.75}})
        {'a': 0.25}
    """
    errors: dict[str, dict[str, list[float]]] = {}
    for (name, severity), by_model in accuracies.items():
        for model, accuracy in by_model.items():
            if severity:
                errors.setdefault(model, {}).setdefault(name, []).append(1 - accuracy)
    return {
        model: float(np.mean([np.mean(values) for values in by_name.values()]))
        for model, by_name in errors.items()
    }


def draw_corruptions(accuracies: Accuracies) -> bytes:
    """Draw accuracy by severity, a panel for each corruption."""
    names = corruption_names(accuracies)
    models = list(dict.fromkeys(m for by_model in accuracies.values() for m in by_model))
    columns = max(1, min(5, len(names)))
    rows = max(1, -(-len(names) // columns))
    with style():
        figure = new_figure(2.3 * columns + 1, 1.9 * rows + 0.8)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat:
            axes.axis("off")
        for axes, name in zip(grid.flat, names, strict=False):
            axes.axis("on")
            for number, (model, title) in enumerate(zip(models, in_legend(models), strict=True)):
                points = sorted(
                    (severity, by_model[model])
                    for (each, severity), by_model in accuracies.items()
                    if each == name or not severity
                )
                again, colour = divmod(number, len(COLOURS))
                look = {"color": COLOURS[colour], "linestyle": LINES[again % len(LINES)]}
                axes.plot(*zip(*points, strict=True), marker=".", label=title, **look)
            axes.set_title(plain([name])[0], fontsize=9)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        figure.supxlabel("severity; 0 is clean", color=GREY, fontsize=9)
        figure.supylabel("accuracy", color=GREY, fontsize=9)
        return encode(figure)
