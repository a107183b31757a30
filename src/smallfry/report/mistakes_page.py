"""Page of a classifier's evaluation: scores of classes, plots, and its mistakes in groups.

Mistakes of one class per image are grouped by class pair, those of several by class.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from smallfry.report.page import image, png_url, render, words
from smallfry.report.table import table

MOST_GROUPS = 60  # those with the most mistakes
MOST_SHOWN = 12  # images of a group, the surest mistakes
SIDE = 96  # pixels of the shown images at most
NAMES = {"f1": "F1"}
PICTURES = {
    "confusion_matrix.png": "confusion matrix: true classes in rows, predicted ones in columns",
    "reliability.png": "accuracy of the predictions against their confidence",
    "classes.png": "average precision and F1 score of classes, with their images",
    "precision_recall.png": "precision against recall; dots: at the thresholds",
}


class Mistake(NamedTuple):
    """Misclassified image."""

    position: int  # in the split
    confidence: float


class ClassPair(NamedTuple):
    """Mistakes of one class for another one."""

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


class Group(NamedTuple):
    """Mistakes of one kind."""

    title: str
    label: str  # of the confidence
    mistakes: tuple[Mistake, ...]  # the surest first


def name_pairs(pairs: Sequence[ClassPair], classes: Sequence[str]) -> list[Group]:
    """Name the groups of ``class_pairs``."""
    return [
        Group(
            f"{classes[pair.true]}, taken for {classes[pair.predicted]}",
            classes[pair.predicted],
            pair.mistakes,
        )
        for pair in pairs
    ]


def label_mistakes(
    probabilities: Tensor, chosen: Tensor, labels: Tensor, classes: Sequence[str]
) -> list[Group]:
    """Group the missing and the wrong classes of images by class, the most frequent group first.

    Args:
        probabilities: (images, classes).
        chosen: Predicted classes (images, classes), bool.
        labels: True ones, 0 or 1.
        classes: Class names.
    """
    has, found = labels.bool(), []
    for i, name in enumerate(classes):
        share = probabilities[:, i]
        for kind, wrong in (
            ("missing", has[:, i] & ~chosen[:, i]),
            ("wrong", chosen[:, i] & ~has[:, i]),
        ):
            rows = wrong.nonzero()[:, 0]
            rows = rows[share[rows].argsort(descending=kind == "wrong", stable=True)]
            mistakes = tuple(Mistake(j, float(share[j])) for j in rows.tolist())
            if mistakes:
                found.append(Group(f"{name}, {kind}", name, mistakes))
    return sorted(found, key=lambda group: -len(group.mistakes))


def mistakes_page(
    title: str,
    scores: Mapping[str, float],
    per_class: Mapping[str, Mapping[str, float]],
    groups: Sequence[Group],
    take: Callable[[Tensor], Tensor],
    place: Callable[[int], str],
    pictures: Path,
    facts: Mapping[str, Any],
    unit: str = "class pair",
) -> str:
    """Build the page, which needs no other files.

    Args:
        title: Its title.
        scores: Of all images.
        per_class: Of each class by its name, with its number of ``images`` and its ``f1``.
        groups: Of ``name_pairs`` or ``label_mistakes``.
        take: Images (images, channels, height, width), uint8, by their positions.
        place: Source of an image by its position, such as a file.
        pictures: Folder of the plots; those that are missing are left out.
        facts: What was evaluated, for the table of provenance.
        unit: What the mistakes are grouped by.
    """
    sections = [_section(group, take, place) for group in groups[:MOST_GROUPS]]
    left = groups[MOST_GROUPS:]
    worst = sorted(per_class.items(), key=lambda each: (each[1]["f1"], each[0]))
    kinds = [name for name in next(iter(per_class.values()), {}) if name != "images"]
    rows = [[n, int(row["images"]), *(f"{row[k]:.1%}" for k in kinds)] for n, row in worst]
    head = ["class", "images", *(NAMES.get(kind, kind.replace("_", " ")) for kind in kinds)]
    values = [[name.replace("_", " "), f"{value:.4f}"] for name, value in scores.items()]
    return render(
        "report/templates/mistakes.html",
        title=title,
        scores=table(["score", "value"], values),
        classes=table(head, rows),
        pictures=[
            image(pictures / name, alt)
            for name, alt in PICTURES.items()
            if (pictures / name).is_file()
        ],
        sections=sections,
        count=sum(len(group.mistakes) for group in groups),
        groups=len(groups),
        left=(len(left), sum(len(group.mistakes) for group in left)),
        unit=unit,
        provenance=table(["what", "value"], [[k, words(v)] for k, v in facts.items()], text=(0, 1)),
    )


def _section(
    group: Group, take: Callable[[Tensor], Tensor], place: Callable[[int], str]
) -> dict[str, Any]:
    """Return what the template shows of a group."""
    shown = group.mistakes[:MOST_SHOWN]
    images = take(torch.tensor([each.position for each in shown]))
    return {
        "title": group.title,
        "label": group.label,
        "count": len(group.mistakes),
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
