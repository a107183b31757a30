"""Page of a fit: all trials, the choice with its reason, and the commands to run it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.errors import RunError
from smallfry.fitting.folder import PAGE
from smallfry.fitting.rungs import FitSpace, run_name
from smallfry.fitting.verify import FEW, Verified
from smallfry.io.terminal import command
from smallfry.report.classification import confusion_matrix
from smallfry.report.fit import Mark, draw_fit
from smallfry.report.page import image, render, words, write
from smallfry.report.per_class import confusion_csv
from smallfry.report.table import NONE, number, table
from smallfry.search import RUNG, Trial
from smallfry.training.provenance import provenance

MATRIX, PICTURE, CONFUSION = "confusion_matrix.png", "pareto.png", "confusion_matrix.csv"


def write_page(
    folder: Path,
    space: FitSpace,
    trials: Sequence[Trial],
    exports: Sequence[Verified],
    summary: Mapping[str, Any],
    probabilities: NDArray[np.float32] | None,
) -> Path:
    """Write the page with its pictures, and return it.

    Args:
        folder: Folder of the fit.
        space: The space.
        trials: All rungs.
        exports: All verified exports.
        summary: The result.
        probabilities: Of the test images, (images, classes), if a model was tested.

    Raises:
        RunError: It could not be written.
    """
    try:
        (folder / "pictures").mkdir(exist_ok=True)
        html = _page(folder, space, trials, exports, summary, probabilities)
        write(folder / PAGE, html)
    except OSError as error:
        raise RunError(f"{folder}: the page could not be written ({error})") from error
    return folder / PAGE


def _page(
    folder: Path,
    space: FitSpace,
    trials: Sequence[Trial],
    exports: Sequence[Verified],
    summary: Mapping[str, Any],
    probabilities: NDArray[np.float32] | None,
) -> str:
    pictures, budget, chosen = folder / "pictures", space.config.budget, summary["chosen"]
    limits = {"kb": budget.kb, "ms": budget.ms}
    draw_fit(_marks(trials, exports, chosen), limits, pictures / PICTURE)
    matrix = None
    if probabilities is not None:
        logits, labels = torch.from_numpy(np.log(probabilities + FEW)), space.data.test.labels
        confusion_matrix(logits, labels, space.data.classes, pictures / MATRIX)
        write(folder / CONFUSION, confusion_csv(logits, labels, space.data.classes))
        matrix = image(pictures / MATRIX, "confusion matrix of the chosen export")
    place = None if chosen is None else str(chosen["export"])
    return render(
        "fitting/templates/fit.html",
        title=f"Fit: {Path(space.data.name).name} within {budget}",
        summary=summary,
        chosen=chosen,
        why=_why(exports, summary, space),
        picture=image(pictures / PICTURE, "validation accuracy against size and latency"),
        exports=_exports_table(exports, chosen, space),
        trials=_trials_table(trials),
        candidates=_candidates_table(space),
        left_out=table(["candidate", "reason"], list(space.plan.left_out.items()), text=(0, 1)),
        left_out_count=len(space.plan.left_out),
        matrix=matrix,
        data=space.data,
        config=space.config,
        plan=space.plan,
        minutes=number((space.plan.seconds + space.plan.tuning_seconds) / 60),
        predict=None if place is None else command("smallfry", "predict", place) + " IMAGE…",
        serve=None if place is None else command("smallfry", "serve", place),
        place=place,
        threshold=None if chosen is None else chosen["exit_threshold"],
        provenance=_provenance(),
    )


def _marks(
    trials: Sequence[Trial], exports: Sequence[Verified], chosen: Mapping[str, Any] | None
) -> list[Mark]:
    """Return the points of the picture: trials at the cost of their int8 export, and exports."""
    name = None if chosen is None else chosen["name"]
    marks = [
        Mark(str(t.candidate["model"]), 100 * t.measured["accuracy"], t.cost["kb"], t.cost["ms"])
        for t in trials
        if t.value is not None
    ]
    return marks + [
        Mark(e.name, 100 * e.accuracy, e.kb, e.ms, exported=True, chosen=e.name == name)
        for e in exports
        if e.accuracy is not None and e.kb is not None and e.ms is not None
    ]


def _why(exports: Sequence[Verified], summary: Mapping[str, Any], space: FitSpace) -> str:
    """Describe the choice in a sentence or two."""
    budget, chosen = space.config.budget, summary["chosen"]
    if chosen is None:
        return "No candidate could be exported."
    measured = [e for e in exports if e.kb is not None and e.ms is not None]
    within = [e for e in measured if budget.fits(e.kb or 0.0, e.ms or 0.0)]
    if not within:
        return (
            f"None of {len(measured)} exports is within {budget}; this one exceeds it least, by a "
            f"factor of {budget.excess(chosen['kb'], chosen['ms']):.2f}."
        )
    text = (
        f"Of {len(measured)} exports, {len(within)} "
        f"{'is' if len(within) == 1 else 'are'} within {budget}, and this one has the highest "
        f"accuracy on {summary['validation_images']:,} validation images: {chosen['accuracy']:.2%}."
    )
    others = [e for e in measured if e.name != chosen["name"] and e.accuracy is not None]
    if others:
        best = max(others, key=lambda e: e.value)
        text += (
            f" Next is {best.name} with {best.accuracy:.2%}, {best.kb:.4g} kB, {best.ms:.3g} ms."
        )
    return text


def _exports_table(
    exports: Sequence[Verified], chosen: Mapping[str, Any] | None, space: FitSpace
) -> str:
    budget, rows, marked = space.config.budget, [], []
    for position, each in enumerate(exports):
        if chosen is not None and each.name == chosen["name"]:
            marked.append(position)
        if each.accuracy is None or each.kb is None or each.ms is None:
            rows.append([each.name, *[NONE] * 4, f"failed: {each.failure}"])
            continue
        within = "within" if budget.fits(each.kb, each.ms) else "exceeds"
        method = ", ".join(f"{k}: {words(v)}" for m in each.methods for k, v in m.items())
        exits = "" if each.exit_steps is None else f"; early exit, {each.exit_steps:.2f} steps"
        rows.append(
            [
                each.name,
                f"{each.accuracy:.2%}",
                number(each.kb, 4),
                number(each.ms),
                within,
                f"{each.precision}{f'; {method}' if method else ''}{exits}",
            ]
        )
    head = ["export", "validation", "kB", "ms", "budget", "made by"]
    return table(head, rows, text=(0, 4, 5), marked=marked)


def _trials_table(trials: Sequence[Trial]) -> str:
    rows = [
        [
            run_name(t.candidate),
            int(t.candidate[RUNG]) + 1,
            t.measured.get("epochs", NONE),
            f"failed: {t.failure}" if t.value is None else f"{t.measured['accuracy']:.2%}",
            NONE if t.value is None else number(t.measured["loss"]),
        ]
        for t in trials
    ]
    return table(["candidate", "rung", "epochs", "validation", "loss"], rows)


def _candidates_table(space: FitSpace) -> str:
    rows = [
        [
            each.name,
            f"{each.costs.parameters:,}",
            number(each.costs.macs / 1e6),
            number(each.costs.kb["float32"], 4),
            number(each.costs.kb["int8"], 4),
            number(each.costs.ms["float32"]),
            number(each.costs.ms["int8"]),
            number(each.epoch_seconds),
        ]
        for each in space.plan.candidates
    ]
    head = ["candidate", "parameters", "MMAC", "float32, kB", "int8, kB", "float32, ms", "int8, ms"]
    return table([*head, "CPU seconds per epoch"], rows)


def _provenance() -> str:
    found = provenance(torch.device("cpu"))
    rows = [[name, words(value)] for name, value in found.items() if value is not None]
    return table(["what", "value"], rows, text=(0, 1))
