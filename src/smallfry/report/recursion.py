"""The recursion trace: how an answer forms, latent step by latent step."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.models import LatentRecursive, RecursionStep, Recursive
from smallfry.report.figure import COLOURS, GREY, new_figure, plain, save, show_image, style

MOST_LINES = 100  # classes of an image


class Trace(NamedTuple):
    """The answers of a model as it recurs, in the order of ``answers``."""

    probabilities: Tensor  # (answers, images, classes)
    halting: Tensor  # (answers, images)


def steps_to_follow(model: Recursive) -> int:
    """Recursion steps worth showing: those of its training, and a second one if that was one."""
    return max(2, model.recursion_steps)


def answers(model: Recursive, images: Tensor, steps: int) -> Iterator[RecursionStep]:
    """Answers of a model after 0, 1, 2, … latent steps; without those, after each recursion step.

    Args:
        model: In evaluation mode.
        images: Normalised, (images, channels, size, size).
        steps: Recursion steps to follow.
    """
    if not isinstance(model, LatentRecursive):
        yield from model.recurse(images, steps)
        return
    x = model.embed(images)
    state = model.initial_state(len(images))
    yield model.read_out(model.answer(state))
    for _ in range(steps):
        for _ in range(model.latent_steps):
            state = model.think(x, state)
            asked = model.read_out(model.answer(state))
            yield asked
        state = asked.state  # the last answer of a recursion step is the one that is kept


@torch.inference_mode()
def trace_recursion(model: Recursive, images: Tensor, steps: int) -> Trace:
    """Collect ``answers`` of a model, with the same arguments."""
    asked = list(answers(model, images, steps))
    return Trace(
        torch.stack([step.logits.softmax(dim=1) for step in asked]),
        torch.stack([step.halt_logits.sigmoid() for step in asked]),
    )


def recursion_trace(
    model: Recursive,
    inputs: Tensor,
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    file: Path,
) -> None:
    """Draw how class probabilities and the halting probability move for a few images.

    Args:
        model: In evaluation mode.
        inputs: Normalised images, (images, channels, size, size).
        images: The same as uint8.
        labels: (images,).
        classes: Class names.
        file: The PNG to write.
    """
    classes = plain(classes)
    trained = model.recursion_steps
    steps = steps_to_follow(model)
    trace = trace_recursion(model, inputs, steps)
    probabilities, halting = trace.probabilities.numpy(), trace.halting.numpy()
    is_latent = isinstance(model, LatentRecursive)
    a_step = model.latent_steps if isinstance(model, LatentRecursive) else 1
    kind = "latent step" if is_latent else "recursion step"
    times = range(len(probabilities)) if is_latent else range(1, 1 + len(probabilities))
    count = len(inputs)
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
                axes.plot(times, probabilities[:, i, c], color=colour, label=classes[c], marker=".")
            axes.plot(times, halting[:, i], color="black", linestyle="--", label="halting")
            if trained < steps:
                axes.axvline(trained * a_step, color=GREY, linewidth=0.8)
            axes.set_ylim(-0.03, 1.03)
            axes.set_xlim(times[0], times[-1])
            axes.set_xticks(list(times))
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
            axes.tick_params(labelbottom=i == count - 1)
        note = f"{kind}s"
        if trained < steps:
            note += f" (grey line: where the model stops; it recurs {trained} × in use)"
        grid[-1][1].set_xlabel(note)
        save(figure, file)


def interesting(logits: Tensor, labels: Tensor, most: int = 6) -> Tensor:
    """Images worth a trace: half of them the least sure mistakes, half the least sure hits."""
    top = logits.softmax(dim=1).topk(2, dim=1).values
    by_margin = (top[:, 0] - top[:, 1]).argsort()
    wrong = logits.argmax(dim=1)[by_margin] != labels[by_margin]
    mistakes = by_margin[wrong][: most // 2]
    return torch.cat([mistakes, by_margin[~wrong][: most - len(mistakes)]])
