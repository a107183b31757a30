"""Report on a classifier's predictions: tables, plots and a page of its mistakes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallfry.data import ImageData, Split
from smallfry.errors import RunError
from smallfry.io.replace import replacing
from smallfry.report.mistakes_page import (
    class_pairs,
    label_mistakes,
    mistakes_page,
    name_pairs,
)
from smallfry.report.page import write
from smallfry.report.per_class import class_scores, confusion_csv, scores_csv, scores_dict
from smallfry.tasks import Pictured, ScoredByClass
from smallfry.tasks.classification import Classification
from smallfry.tasks.multilabel import MultiLabel
from smallfry.training.evaluation import Predictions, score, task_of
from smallfry.training.run import TrainedModel, require_class_answers
from smallfry_runtime.names import path_of, text_of
from smallfry_runtime.stages import obstacle

CLASSES, CONFUSION, PAGE = "classes.csv", "confusion_matrix.csv", "report.html"
PICTURES = ("confusion_matrix.png", "mistakes.png", "reliability.png")
SEVERAL = ("classes.png", "precision_recall.png")  # of several classes per image
FILES = (CLASSES, CONFUSION, PAGE, *PICTURES, *SEVERAL)


def write_tables(
    folder: Path,
    trained: TrainedModel,
    data: ImageData,
    split: tuple[str, Split],
    predictions: Predictions,
    facts: Mapping[str, Any],
    pictures: Path,
) -> None:
    """Write ``classes.csv``, ``report.html`` and, of one class per image, ``confusion_matrix.csv``.

    Args:
        folder: Where to.
        trained: The classifier.
        data: The data set.
        split: Name and images of the split.
        predictions: On the split.
        facts: What was evaluated, by name.
        pictures: Folder of plots, which are in the page.
    """
    name, images = split
    outputs, labels, task = predictions.logits, images.labels, task_of(trained.manifest)
    per_class = per_class_scores(predictions, trained)
    write(folder / CLASSES, scores_csv(per_class))
    if isinstance(task, MultiLabel):
        chosen = task.chosen(outputs)
        unit, groups = "class", label_mistakes(outputs.sigmoid(), chosen, labels, trained.classes)
    else:
        write(folder / CONFUSION, confusion_csv(outputs, labels, trained.classes))
        unit, groups = "class pair", name_pairs(class_pairs(outputs, labels), trained.classes)
    page = mistakes_page(
        f"{len(labels):,}{'' if name == 'all' else f' {name}'} images of "
        f"{text_of(path_of(data.name).name)}",
        score(predictions, task),
        per_class,
        groups,
        lambda chosen: images.take(chosen).images,
        lambda i: data.locate(name, i),
        pictures,
        facts,
        unit,
    )
    write(folder / PAGE, page)


def per_class_scores(predictions: Predictions, trained: TrainedModel) -> dict[str, Any]:
    """Return the scores of each class by its name; none for tasks without such."""
    task = task_of(trained.manifest)
    logits, labels = predictions.logits, predictions.labels
    if isinstance(task, ScoredByClass):
        return task.class_scores(logits, labels, trained.classes)
    if not isinstance(task, Classification):
        return {}
    return scores_dict(class_scores(logits, labels, trained.classes))


def write_report(
    folder: Path,
    trained: TrainedModel,
    data: ImageData,
    split: tuple[str, Split],
    predictions: Predictions,
    facts: Mapping[str, Any],
) -> Path:
    """Write the tables with all plots into a new folder, and return the page.

    Raises:
        RunError: The folder holds something else than such a report, or can't be written.
        UsageError: The model's answers are no classes.
    """
    require_class_answers(trained)
    task = task_of(trained.manifest)
    assert isinstance(task, Pictured)

    def require_free() -> None:
        reason = obstacle(folder, "report", FILES, lambda place: (place / CLASSES).is_file())
        if reason is not None:
            raise RunError(f"{folder}: {reason}; use another: --report DIR")

    try:
        with replacing(folder, require_free) as new:
            task.draw(predictions.logits, split[1], trained.classes, new)
            write_tables(new, trained, data, split, predictions, facts, new)
    except OSError as error:
        raise RunError(f"{folder}: the report could not be written ({error})") from error
    return folder / PAGE
