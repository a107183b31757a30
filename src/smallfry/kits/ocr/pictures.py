"""Pictures of read texts: the worst ones with the probabilities of symbols, and confusions."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from smallfry.data import Split
from smallfry.report.figure import new_figure, plain, save, show_image, style
from smallfry_runtime.decoders.ocr import decode, greedy, log_softmax

__all__ = ["confusions", "draw_confusion", "draw_texts"]

MOST = 20  # pairs of a picture
BLANK = 0


def draw_texts(outputs: Tensor, split: Split, classes: Sequence[str], file: Path) -> None:
    """Draw texts with what was read, and the probability of each symbol along them.

    Args:
        outputs: Logits (texts, steps, symbols).
        split: The images and labels.
        classes: The symbols.
        file: The PNG to write.
    """
    count = len(split)
    with style():
        figure = new_figure(9, 1.9 * max(1, count))
        axes = figure.subplots(max(1, count), 2, squeeze=False, width_ratios=(1, 1.3))
        read = decode(outputs.float().numpy(), classes)
        for row, (image, label, logits, found) in enumerate(
            zip(split.images, split.labels, outputs, read, strict=True)
        ):
            wanted = "".join(classes[n] for n in label.tolist() if n != BLANK)
            left, right = axes[row]
            show_image(left, image)
            left.set_title(*plain([f"{wanted} read as {found['text'] or 'nothing'}"]), fontsize=9)
            _draw_probabilities(right, np.exp(log_softmax(logits.float().numpy())), classes)
        save(figure, file)


def _draw_probabilities(axes: Any, shares: Any, classes: Sequence[str]) -> None:
    """Draw the symbols that are likely anywhere, as rows."""
    shown = [n for n in range(1, len(classes)) if shares[:, n].max() >= 0.1] or [1]
    axes.imshow(
        shares[:, shown].T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_yticks(range(len(shown)), plain([classes[n] for n in shown]), fontsize=7)
    axes.set_xticks([])
    axes.grid(False)


def confusions(outputs: Tensor, labels: Tensor) -> Counter[tuple[int, int]]:
    """Count symbols that were read as others, in texts of the right length.

    Args:
        outputs: Logits (texts, steps, symbols).
        labels: (texts, longest), filled up with 0.
    """
    found: Counter[tuple[int, int]] = Counter()
    for logits, label in zip(outputs.float().numpy(), labels.numpy(), strict=True):
        wanted = tuple(label[label != BLANK].tolist())
        read = greedy(log_softmax(logits)).symbols
        if len(read) == len(wanted):
            found.update(pair for pair in zip(wanted, read, strict=True) if pair[0] != pair[1])
    return found


def draw_confusion(outputs: Tensor, labels: Tensor, classes: Sequence[str], file: Path) -> None:
    """Draw the most frequent confusions of symbols as bars; arguments as ``draw_texts``."""
    pairs = confusions(outputs, labels).most_common(MOST)[::-1]
    names = plain([f"{classes[wanted]} as {classes[read]}" for (wanted, read), _ in pairs])
    with style():
        figure = new_figure(5, 0.8 + 0.25 * max(1, len(pairs)))
        axes = figure.subplots()
        axes.barh(names, [count for _, count in pairs])
        axes.set_title("symbols read as others" if pairs else "no symbol read as another")
        axes.set_xlabel(f"times, in {len(labels):,} texts")
        save(figure, file)
