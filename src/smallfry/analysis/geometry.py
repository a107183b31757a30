"""Geometry of a classifier's features: angles, lengths and margins, dense against compressed.

With features h and rows w_c of the last linear layer, logits are

    z_c = ‖w_c‖ ‖h‖ cos θ_c + b_c

and the margin min_{j≠y} (z_y − z_j) / ‖w_y − w_j‖ is the signed distance of h to the boundary of
its class y: positive if and only if the prediction is right. Features of two models differ by a
rotation, so only these scalars are compared, never h.

Source: Li et al., "Robustness Lottery", arXiv 2206.07918, for the question; the decomposition of
changes is our own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smallfry.analysis.features import Features, collect
from smallfry.analysis.question import Answer, Picture, Subject, Table, register_question
from smallfry.data.corruptions import corrupt
from smallfry.errors import UsageError
from smallfry.report.corruptions import (
    Accuracies,
    corruption_names,
    draw_corruptions,
    mean_corruption_errors,
)
from smallfry.report.figure import COLOURS, encode, new_figure, plain, show_image, style
from smallfry.report.pairs import Pair, draw_pairs

__all__ = ["Changes", "Geometry", "compare", "measure_geometry"]

CLEAN = ("clean", 0)
SHOWN = 24  # images of a gallery
LINKED = 400  # images of the interactive picture, all that changed first
Condition = tuple[str, int]


class Geometry(NamedTuple):
    """Geometry of each image at the last linear layer.

    Attributes:
        labels: (images,).
        predicted: (images,), of the logits in float64.
        angles: Between features and each class, (images, classes), in radians; π/2 of features
            that vanish.
        lengths: ‖h‖, (images,).
        margins: (images,), signed distances to the boundary of the true class.
        norms: ‖w_c‖, (classes,).
        bias: (classes,).
    """

    labels: Tensor
    predicted: Tensor
    angles: Tensor
    lengths: Tensor
    margins: Tensor
    norms: Tensor
    bias: Tensor

    @property
    def logits(self) -> Tensor:
        """Logits (images, classes) from angles, lengths, norms and bias."""
        return self.norms * self.lengths[:, None] * self.angles.cos() + self.bias

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float((self.predicted == self.labels).double().mean())

    def of_class(self, values: Tensor) -> Tensor:
        """Select the column of each image's true class, (images,)."""
        return values.gather(1, self.labels[:, None])[:, 0]


class Changes(NamedTuple):
    """Changes of each image from one model to another.

    Attributes:
        broken: Positions of images that were right and are wrong, largest drop of margin first.
        repaired: Positions of those that were wrong and are right, largest rise first.
        moved: Positions of those that were wrong and are wrong in another class.
        agreement: Share of equal predictions.
        turning: Change of the true class's logit by angles and norms of weights, (images,).
        stretching: Change of it by the features' lengths, (images,).
        shifting: Change of it by the bias, (images,).
    """

    broken: Tensor
    repaired: Tensor
    moved: Tensor
    agreement: float
    turning: Tensor
    stretching: Tensor
    shifting: Tensor


def measure_geometry(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Geometry:
    """Measure angles, lengths and margins.

    Args:
        features: (images, features); they are taken in float64.
        labels: (images,).
        weight: (classes, features).
        bias: (classes,); default 0.

    Raises:
        UsageError: A label has no class.

    Example:
        >>> h = torch.tensor([[3.0, 4.0]]).double()
        >>> found = measure_geometry(h, torch.tensor([1]), torch.eye(2).double())
        >>> found.lengths.item(), round(found.margins.item(), 4)
        (5.0, 0.7071)
    """
    features, weight = features.double(), weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise UsageError(f"labels must be 0 to {len(weight) - 1}, the rows of the weight")
    lengths, norms = features.norm(dim=1), weight.norm(dim=1)
    logits = features @ weight.T + bias
    cosines = (features @ weight.T) / (lengths[:, None] * norms).clamp(min=1e-300)
    own = logits.gather(1, labels[:, None])
    apart = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")[labels]
    distances = (own - logits) / apart.clamp(min=1e-300)
    distances.scatter_(1, labels[:, None], math.inf)
    return Geometry(
        *(labels, logits.argmax(1), cosines.clamp(-1, 1).acos(), lengths),
        *(distances.min(1).values, norms, bias),
    )


def compare(before: Geometry, after: Geometry) -> Changes:
    """Compare two models on the same images.

    The change of the true class's logit is divided by Shapley values of two factors, the length
    and ‖w‖ cos θ, so that turning, stretching and shifting add up to it.
    """
    right, still = before.predicted == before.labels, after.predicted == after.labels
    drop = before.margins - after.margins
    factors = [g.of_class(g.norms * g.angles.cos()) for g in (before, after)]
    return Changes(
        _sorted(right & ~still, drop),
        _sorted(~right & still, -drop),
        _sorted(~right & ~still & (before.predicted != after.predicted), drop),
        float((before.predicted == after.predicted).double().mean()),
        (factors[1] - factors[0]) * (before.lengths + after.lengths) / 2,
        (after.lengths - before.lengths) * (factors[0] + factors[1]) / 2,
        (after.bias - before.bias)[before.labels],
    )


@register_question
def ask(subject: Subject) -> Answer:
    """Measure geometry on test images, of all versions of the model, clean and corrupted."""
    models = {subject.name: subject.trained, **subject.others}
    measured: dict[Condition, dict[str, Geometry]] = {}
    mismatch = 0
    for condition in (CLEAN, *subject.corruptions):
        images = subject.test.images
        if condition != CLEAN:
            images = corrupt(images, *condition, seed=subject.seed)
        measured[condition] = {}
        for name, trained in models.items():
            found = collect(trained, images, subject.test.labels)
            geometry = measure_geometry(*found[:4])
            measured[condition][name] = geometry
            mismatch += _mismatch(found, geometry)
    clean = measured[CLEAN]
    own = clean[subject.name]
    accuracies = {
        condition: {model: g.accuracy for model, g in by_model.items()}
        for condition, by_model in measured.items()
    }
    numbers: dict[str, Any] = {
        "predictions_that_differ_from_the_model": mismatch,
        "models": {name: _summary(geometry) for name, geometry in clean.items()},
        "accuracy": {f"{name} {level}": dict(a) for (name, level), a in accuracies.items()},
    }
    findings = [
        f"Accuracy from angles, lengths and bias is {own.accuracy:.2%} on {len(own.labels):,} "
        f"test images; {mismatch} predictions differ from the models' own.",
        f"Right predictions are {_median(own, True)}, wrong ones {_median(own, False)}.",
    ]
    pictures = [
        Picture("Angle to the true class and length of features", _draw_scatter(clean)),
    ]
    tables = [_model_table(clean), _class_table(own, subject.trained.classes)]
    for name in subject.others:
        changes = compare(own, clean[name])
        numbers.setdefault("changes", {})[name] = _change_numbers(changes)
        findings.append(_describe(name, changes))
        title = f"{subject.name} (hollow) against {name} (filled): point at an image"
        pairs = _pairs(own, clean[name], subject.trained.classes)
        drawing = draw_pairs(pairs, "angle to the true class, °", "length of the features")
        pictures.append(Picture(title, drawing))
        for kind in ("broken", "repaired"):
            chosen = getattr(changes, kind)[:SHOWN]
            if len(chosen):
                gallery = _draw_gallery(subject, chosen, own, clean[name])
                pictures.append(Picture(f"Images that {name} has {kind}", gallery))
    if subject.corruptions:
        tables.append(_corruption_table(accuracies))
        pictures.append(Picture("Accuracy under corruption", draw_corruptions(accuracies)))
        losses = mean_corruption_errors(accuracies)
        numbers["mean_corruption_error"] = losses
        shown = ", ".join(f"{name} {value:.2%}" for name, value in losses.items())
        findings.append(
            f"Mean corruption error: {shown} (generated corruptions with CIFAR-10-C's constants)."
        )
    return Answer(
        *("Geometry", findings, numbers, pictures, tables),
        {"geometry": _samples(measured, subject.trained.classes)},
    )


def _sorted(chosen: Tensor, by: Tensor) -> Tensor:
    positions = chosen.nonzero()[:, 0]
    return positions[by[positions].argsort(descending=True)]


def _mismatch(found: Features, geometry: Geometry) -> int:
    return int((geometry.logits.argmax(1) != found.logits.argmax(1)).sum())


def _summary(geometry: Geometry) -> dict[str, float]:
    return {
        "accuracy": geometry.accuracy,
        "mean_angle_degrees": float(geometry.of_class(geometry.angles).rad2deg().mean()),
        "mean_length": float(geometry.lengths.mean()),
        "mean_margin": float(geometry.margins.mean()),
        "lower_quartile_margin": float(geometry.margins.quantile(0.25)),
    }


def _change_numbers(changes: Changes) -> dict[str, Any]:
    return {
        **{kind: getattr(changes, kind).tolist() for kind in ("broken", "repaired", "moved")},
        "agreement": changes.agreement,
        "share_by_turning": _share_by_turning(changes),
    }


def _share_by_turning(changes: Changes) -> float:
    """Compute the share of turning in the broken images' loss of their logit."""
    lost = {
        name: float(getattr(changes, name)[changes.broken].sum())
        for name in ("turning", "stretching", "shifting")
    }
    total = sum(lost.values())
    return lost["turning"] / total if total else math.nan


def _describe(name: str, changes: Changes) -> str:
    share = _share_by_turning(changes)
    why = (
        ""
        if math.isnan(share)
        else f" Of the logits that broken images lost, {share:.0%} is due to turning, the rest to "
        "length and bias."
    )
    return (
        f"{name} agrees on {changes.agreement:.2%} of the images: it breaks "
        f"{len(changes.broken)}, repairs {len(changes.repaired)}, and moves {len(changes.moved)} "
        f"from one wrong class to another.{why}"
    )


def _median(geometry: Geometry, right: bool) -> str:
    chosen = (geometry.predicted == geometry.labels) == right
    if not chosen.any():
        return "none"
    angle = math.degrees(float(geometry.of_class(geometry.angles)[chosen].quantile(0.5)))
    length = float(geometry.lengths[chosen].quantile(0.5))
    return f"at {angle:.0f}° from their class with length {length:.3g} (medians)"


# Tables


def _model_table(clean: Mapping[str, Geometry]) -> Table:
    summaries = {name: _summary(geometry) for name, geometry in clean.items()}
    names = list(next(iter(summaries.values())))
    head = ["model", *(name.replace("_", " ") for name in names)]
    return Table("Models", head, [[m, *(s[n] for n in names)] for m, s in summaries.items()])


def _class_table(geometry: Geometry, classes: Sequence[str]) -> Table:
    rows = []
    angles = geometry.of_class(geometry.angles).rad2deg()
    for number, name in enumerate(classes):
        chosen = geometry.labels == number
        if chosen.any():
            margins = geometry.margins[chosen]
            quartiles = [float(margins.quantile(q)) for q in (0.25, 0.5, 0.75)]
            means = [float(v[chosen].mean()) for v in (angles, geometry.lengths)]
            rows.append([name, int(chosen.sum()), *means, *quartiles])
    head = ["class", "images", "angle, °", "length", "margin, 25 %", "50 %", "75 %"]
    return Table("Classes", head, rows)


def _corruption_table(accuracies: Accuracies) -> Table:
    clean = accuracies[CLEAN]
    rows = []
    for name in corruption_names(accuracies):
        cells: list[Any] = [name]
        for model, accuracy in clean.items():
            mean = float(np.mean([a[model] for (n, _), a in accuracies.items() if n == name]))
            cells += [mean, (1 - mean) / (1 - accuracy) if accuracy < 1 else math.nan]
        rows.append(cells)
    head = ["corruption", *(t for m in clean for t in (f"{m}: accuracy", "error over clean"))]
    return Table("Corruptions, means over severities", head, rows)


def _samples(measured: Mapping[Condition, Mapping[str, Geometry]], classes: Sequence[str]) -> Table:
    rows: list[list[Any]] = []
    for (corruption, severity), by_model in measured.items():
        for model, g in by_model.items():
            own = g.of_class(g.angles)
            taken = g.angles.gather(1, g.predicted[:, None])[:, 0]
            columns = (g.labels, g.predicted, own, taken, g.lengths, g.margins)
            for image, values in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                label, predicted, *numbers = values
                rows.append(
                    [
                        *(model, corruption, severity, image, classes[label], classes[predicted]),
                        *(float(f"{number:.6g}") for number in numbers),
                    ]
                )
    head = ("model", "corruption", "severity", "image", "label", "prediction")
    measures = ("angle_to_label", "angle_to_prediction", "length", "margin")
    return Table("Images", [*head, *measures], rows)


# Pictures


def _pairs(before: Geometry, after: Geometry, classes: Sequence[str]) -> list[Pair]:
    """Return the pairs of all images that changed, and of others up to ``LINKED``."""
    changed = before.predicted != after.predicted
    order = changed.int().argsort(descending=True, stable=True)
    shown = order[: max(LINKED, int(changed.sum()))].tolist()
    angles = [g.of_class(g.angles).rad2deg() for g in (before, after)]
    found = []
    for i in shown:
        ends = [
            (float(angle[i]), float(g.lengths[i]))
            for angle, g in zip(angles, (before, after), strict=True)
        ]
        label, was, now = (
            classes[int(each[i])] for each in (before.labels, before.predicted, after.predicted)
        )
        text = f"image {i}, {label}: predicted {was}, then {now}"
        found.append(Pair(ends[0], ends[1], text, bool(changed[i])))
    return found


def _draw_scatter(clean: Mapping[str, Geometry]) -> bytes:
    with style():
        figure = new_figure(min(14, 1 + 4 * len(clean)), 3.8)
        grid = figure.subplots(1, len(clean), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (name, geometry) in zip(grid, clean.items(), strict=True):
            angles = geometry.of_class(geometry.angles).rad2deg()
            right = geometry.predicted == geometry.labels
            for chosen, colour, label in (
                (right, COLOURS[0], "right"),
                (~right, COLOURS[1], "wrong"),
            ):
                axes.plot(
                    *(angles[chosen], geometry.lengths[chosen], "."),
                    **{"color": colour, "markersize": 4, "alpha": 0.5, "label": label},
                )
            axes.set_title(plain([f"{name}: {geometry.accuracy:.2%}"])[0])
            axes.set_xlabel("angle to the true class, °")
        grid[0].set_ylabel("length")
        grid[0].legend()
        return encode(figure)


def _draw_gallery(subject: Subject, chosen: Tensor, before: Geometry, after: Geometry) -> bytes:
    classes = plain(subject.trained.classes)
    images = subject.test.take(chosen).images
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    with style():
        figure = new_figure(max(3.0, 1.5 * columns), 1.9 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, image, i in zip(grid, images, chosen.tolist(), strict=False):
            axes.axis("on")
            show_image(axes, image)
            was, now = classes[int(before.predicted[i])], classes[int(after.predicted[i])]
            axes.set_title(f"{was} → {now}\nis {classes[int(before.labels[i])]}", fontsize=7)
        return encode(figure)
