"""Page of a classifier's evaluation: scores of classes, plots, and every mistake by class pair."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from smallfry.report.page import image, png_url, render, words
from smallfry.report.per_class import ClassScores
from smallfry.report.table import table

MOST_PAIRS = 60  # of classes, those with the most mistakes
MOST_SHOWN = 12  # images of a pair, the surest mistakes
SIDE = 96  # pixels of the shown images at most
PICTURES = {
    "confusion_matrix.png": "confusion matrix: true classes in rows, predicted ones in columns",
    "reliability.png": "accuracy of the predictions against their confidence",
}


class Mistake(NamedTuple):
    """Misclassified image."""

    position: int  # in the split
    confidence: float


class ClassPair(NamedTuple):
    """Mistakes of one class that was taken for another one."""

    true: int
    predicted: int
    mistakes: tuple[Mistake, ...]  # the surest first


def class_pairs(outputs: Tensor, labels: Tensor) -> list[ClassPair]:
    """Group all mistakes by class pair, the most frequent pair first.

    Args:
        outputs: Logits (images, classes).
        labels: (images,).
    """
    confidence, predicted = outputs.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero()[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    found: dict[tuple[int, int], list[Mistake]] = {}
    for i in wrong.tolist():
        pair = int(labels[i]), int(predicted[i])
        found.setdefault(pair, []).append(Mistake(i, float(confidence[i])))
    ordered = sorted(found.items(), key=lambda each: (-len(each[1]), each[0]))
    return [ClassPair(*pair, tuple(mistakes)) for pair, mistakes in ordered]


def mistakes_page(
    title: str,
    scores: Mapping[str, float],
    per_class: Sequence[ClassScores],
    pairs: Sequence[ClassPair],
    take: Callable[[Tensor], Tensor],
    place: Callable[[int], str],
    pictures: Path,
    facts: Mapping[str, Any],
) -> str:
    """Build the page, which needs no other files.

    Args:
        title: Its title.
        scores: Of all images.
        per_class: Of each class.
        pairs: As ``class_pairs``.
        take: Images (images, channels, height, width), uint8, by their positions.
        place: Source of an image by its position, such as a file.
        pictures: Folder of the plots; those that are missing are left out.
        facts: What was evaluated, for the table of provenance.
    """
    names = [each.name for each in per_class]
    sections = [_section(pair, names, take, place) for pair in pairs[:MOST_PAIRS]]
    left = pairs[MOST_PAIRS:]
    worst = sorted(per_class, key=lambda each: (each.f1, each.name))
    rows = [
        [each.name, each.images, *(f"{v:.1%}" for v in (each.precision, each.recall, each.f1))]
        for each in worst
    ]
    values = [[name.replace("_", " "), f"{value:.4f}"] for name, value in scores.items()]
    return render(
        "report/templates/mistakes.html",
        title=title,
        scores=table(["score", "value"], values),
        classes=table(["class", "images", "precision", "recall", "F1"], rows),
        pictures=[
            image(pictures / name, says)
            for name, says in PICTURES.items()
            if (pictures / name).is_file()
        ],
        sections=sections,
        count=sum(len(pair.mistakes) for pair in pairs),
        pairs=len(pairs),
        left=(len(left), sum(len(pair.mistakes) for pair in left)),
        provenance=table(["what", "value"], [[k, words(v)] for k, v in facts.items()], text=(0, 1)),
    )


def _section(
    pair: ClassPair,
    names: Sequence[str],
    take: Callable[[Tensor], Tensor],
    place: Callable[[int], str],
) -> dict[str, Any]:
    """Return what the template shows of a pair."""
    shown = pair.mistakes[:MOST_SHOWN]
    images = take(torch.tensor([each.position for each in shown]))
    return {
        "true": names[pair.true],
        "predicted": names[pair.predicted],
        "count": len(pair.mistakes),
        "images": [
            {
                "url": _thumbnail(pixels),
                "confidence": f"{each.confidence:.0%}",
                "place": place(each.position).removesuffix(": "),
            }
            for each, pixels in zip(shown, images, strict=True)
        ],
    }


def _thumbnail(pixels: Tensor) -> Markup:
    """Encode pixels (channels, height, width), uint8, as a PNG of at most ``SIDE`` pixels."""
    values = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    picture = Image.fromarray(values.numpy())
    picture.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    picture.save(encoded, format="png")
    return Markup(png_url(encoded.getvalue()))
