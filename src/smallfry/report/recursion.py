"""Recursion trace: the prediction after each latent step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from smallfry.report.figure import (
    COLOURS,
    GREY,
    in_legend,
    new_figure,
    plain,
    save,
    show_image,
    style,
)

MOST_LINES = 100  # classes of an image


def recursion_trace(
    trace: tuple[Tensor, Tensor],
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    file: Path,
    *,
    latent_steps: int | None,
    recursion_steps: int,
) -> None:
    """Draw class probabilities and the halting probability of a few images, step by step.

    Args:
        trace: Class probabilities, (answers, images, classes), and halting probabilities,
            (answers, images), as ``smallfry.models.trace.trace_recursion`` gives them.
        images: The pixels, uint8, (images, channels, size, size).
        labels: (images,).
        classes: Class names.
        file: The PNG to write.
        latent_steps: Latent steps of a recursion step, each with an answer; None for a model that
            has one after each recursion step only.
        recursion_steps: Recursion steps after which the model stops in use; a line marks that.
    """
    classes, titles = plain(classes), in_legend(classes)
    probabilities, halting = (part.numpy() for part in trace)
    is_latent = latent_steps is not None
    kind = "latent step" if is_latent else "recursion step"
    first, count = 0 if is_latent else 1, len(images)
    times = range(first, first + len(probabilities))
    stop = recursion_steps * (latent_steps or 1)
    with style():
        figure = new_figure(10, 1.75 * count + 0.6)
        figure.suptitle(f"what the model would answer after each {kind}")
        grid = figure.subplots(count, 2, squeeze=False, width_ratios=[1, 6])
        for i in range(count):
            show_image(grid[i][0], images[i])
            grid[i][0].set_ylabel(f"is {classes[int(labels[i])]}")
            axes = grid[i][1]
            likeliest = probabilities[:, i].max(axis=0).argsort()[::-1][:MOST_LINES].tolist()
            shown = likeliest[:3]
            for c in likeliest[3:]:
                axes.plot(times, probabilities[:, i, c], color="#d1d5db", linewidth=0.8)
            for colour, c in zip(COLOURS, shown, strict=False):
                axes.plot(times, probabilities[:, i, c], color=colour, label=titles[c], marker=".")
            axes.plot(times, halting[:, i], color="black", linestyle="--", label="halting")
            if stop < times[-1]:
                axes.axvline(stop, color=GREY, linewidth=0.8)
            axes.set_ylim(-0.03, 1.03)
            axes.set_xlim(times[0], times[-1])
            axes.set_xticks(list(times))
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
            axes.tick_params(labelbottom=i == count - 1)
        note = f"{kind}s"
        if stop < times[-1]:
            note += f" (grey line: where the model stops; it recurs {recursion_steps} × in use)"
        grid[-1][1].set_xlabel(note)
        save(figure, file)


def interesting(logits: Tensor, labels: Tensor, most: int = 6) -> Tensor:
    """Choose images worth a trace: half least confident mistakes, half least confident hits."""
    top = logits.softmax(dim=1).topk(2, dim=1).values
    by_margin = (top[:, 0] - top[:, 1]).argsort()
    wrong = logits.argmax(dim=1)[by_margin] != labels[by_margin]
    mistakes = by_margin[wrong][: most // 2]
    return torch.cat([mistakes, by_margin[~wrong][: most - len(mistakes)]])
