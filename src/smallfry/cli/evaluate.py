"""Evaluate a trained model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.markup import escape
from rich.table import Table

from smallfry.cli._fields import option
from smallfry.cli._shared import AsJson, EarlyExit, OneRun, OtherData, json_line
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import printable, say

if TYPE_CHECKING:
    from smallfry.data import ImageData, Split
    from smallfry.training.run import TrainedModel

PERCENT = (
    *("accuracy", "macro_f1", "balanced_accuracy", "top_5_accuracy", "cell_accuracy"),
    *("accuracy_under_attack", "precision", "recall", "f1", "micro_f1", "average_precision"),
    "mean_average_precision",
)


@dataclass(frozen=True, kw_only=True)
class Options(EarlyExit, AsJson, OneRun):
    """Evaluate a trained model, by default on the test split of its data.

    Args:
        split: Split to evaluate.
        data: Data to use instead of the run's own.
        flips: Take the mean of the logits of each image and its mirror image.
        by_step: Score the prediction after each recursion step too; of puzzles, always.
        per_class: Print precision, recall and F1 score of each class too.
        report: New folder for the scores of classes and the confusion matrix as CSV, plots, and an
            HTML page with the misclassified images by class pair.
        attack: Score the images changed to mislead the model, too: pgd, projected gradient descent.
        eps: Largest change of a pixel in an attack, of images in [0, 1], such as 8/255.
        attack_steps: Steps of the attack, each a quarter of eps.
        submodels: Measure the sub-models of a nested run on the validation split instead, and keep
            their figures in the run's submodels.json.
    """

    split: Literal["train", "validation", "test"] = "test"
    data: OtherData = field(default_factory=OtherData)
    flips: bool = False
    by_step: bool = False
    per_class: bool = False
    report: Path | None = option(metavar="DIR")
    attack: Literal["pgd"] | None = None
    eps: str = "8/255"
    attack_steps: int = 20
    submodels: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        exits = ("exit_drop", "exit_steps")
        others = ("flips", "by_step", "per_class", "report", "attack", *exits)
        if self.submodels and (given := self._given("split", *others)):
            raise UsageError(f"submodels are measured without {given}: leave it out")
        if self.attack is None and (given := self._given("eps", "attack_steps")):
            raise UsageError(f"{given} is of an attack: add --attack pgd")
        if self.attack is not None and (given := self._given("flips", *exits)):
            raise UsageError(f"an attack is of the plain model, without {given}: leave it out")
        if self.flips and self.by_step:
            raise UsageError("the scores by step are without flips: leave out one of the two")

    def _given(self, *names: str) -> str | None:
        """Return the first of some options whose value is not the default."""
        return next((n for n in names if getattr(self, n) != getattr(Options, n)), None)


def run(options: Options) -> int:
    """Evaluate, and print the scores."""
    from smallfry.deploy.pretrained import load_trained
    from smallfry.tasks import LimitsAugmentation, ScoredByStep
    from smallfry.training.evaluation import predict, require_finite, score, score_steps, task_of
    from smallfry.training.evaluation_data import load_like
    from smallfry.training.evaluation_report import per_class_scores, write_report
    from smallfry.training.run import require_class_answers, require_classes

    trained = load_trained(options.run, options.checkpoint)
    data = options.data
    if options.submodels:
        return _submodels(options, trained)
    task = task_of(trained.manifest)
    if options.flips and isinstance(task, LimitsAugmentation) and "flip" not in task.augmentations:
        raise UsageError(
            f"the outputs of {task.name} do not hold for mirrored images: leave out flips"
        )
    loaded, images, split = load_like(trained, options.run, data.name, data.root, options.split)
    require_classes(trained, loaded.classes, loaded.origin)
    threshold = _exit_threshold(options, trained, loaded)
    predictions = predict(
        trained.model,
        images,
        trained.normalize,
        exit_threshold=threshold,
        flips=options.flips,
    )
    scores = score(require_finite(predictions), task)
    result: dict[str, Any] = {"data": loaded.name, "split": split, "images": len(images), **scores}
    if options.attack is not None:
        result |= _attacked(options, trained, images)
    if options.flips:
        result["flips"] = True
    if threshold is not None:
        result["exit_threshold"] = threshold
    if options.per_class:
        require_class_answers(trained)
        result["per_class"] = per_class_scores(predictions, trained)
    if options.report is not None:
        facts = {"model": options.run, "data": loaded.origin, "split": split}
        page = write_report(
            *(options.report.expanduser(), trained, loaded, (split, images), predictions, facts)
        )
        result["report"] = str(page)
    if options.by_step or (isinstance(task, ScoredByStep) and task.scored_by_step):
        result["steps"] = score_steps(trained.model, images, trained.normalize, task)
    if options.json:
        say(json_line(result))
    else:
        _print(result)
    return 0


def _print(result: Mapping[str, Any]) -> None:
    """Print the scores, then those of classes and steps, and the page."""
    apart = ("per_class", "steps", "report")
    table = Table("", "", show_header=False, box=None)
    for name, value in result.items():
        if name not in apart:
            table.add_row(name.replace("_", " "), escape(printable(_shown(name, value))))
    CleanConsole().print(table)
    per_class, steps, page = map(result.get, apart)
    if per_class:
        print_per_class(per_class)
    if steps:
        table = Table("step", *_titles(steps[0]), box=None)
        for number, row in enumerate(steps, 1):
            table.add_row(str(number), *(_shown(name, value) for name, value in row.items()))
        CleanConsole().print(table)
    if page is not None:
        CleanConsole().print(f"report: {escape(printable(page))}", soft_wrap=True)


def _submodels(options: Options, trained: "TrainedModel") -> int:
    """Measure all sub-models, keep their figures with the run, and print them."""
    from smallfry.deploy.submodels import FIGURES, measure, write_table
    from smallfry.training.evaluation_data import load_like
    from smallfry.training.run import require_classes
    from smallfry.transforms.nested import nest_of

    nest_of(trained.model)
    data = options.data
    loaded, images, _ = load_like(trained, options.run, data.name, data.root, "validation")
    require_classes(trained, loaded.classes, loaded.origin)
    rows = measure(trained, images)
    if trained.origin is not None:
        write_table(rows, trained, trained.origin)
    found = [
        {"name": str(row.submodel), **{name: getattr(row, name) for name in FIGURES}}
        for row in rows
    ]
    if options.json:
        say(json_line({"split": "validation", "images": len(images), "submodels": found}))
        return 0
    table = Table("sub-model", *FIGURES, box=None)
    for row in found:
        table.add_row(*(_shown(name, value) for name, value in row.items()))
    CleanConsole().print(table)
    return 0


def print_per_class(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print the scores of classes, worst F1 score first."""
    table = Table("class", *_titles(next(iter(scores.values()))), box=None)
    for name, row in sorted(scores.items(), key=lambda each: each[1]["f1"]):
        table.add_row(escape(printable(name)), *(_shown(key, v) for key, v in row.items()))
    CleanConsole().print(table)


def _titles(row: Mapping[str, float]) -> list[str]:
    return [name.replace("_", " ") for name in row]


def _attacked(options: Options, trained: "TrainedModel", images: "Split") -> dict[str, float]:
    """Measure the accuracy under attack."""
    from smallfry.training.attack import PGD, accuracy_under_attack, parse_eps
    from smallfry.training.evaluation import task_of
    from smallfry.training.run import require_class_answers

    require_class_answers(trained)
    attack = PGD(parse_eps(options.eps), steps=options.attack_steps)
    task = task_of(trained.manifest)
    accuracy = accuracy_under_attack(trained.model, images, trained.normalize, attack, task=task)
    return {"accuracy_under_attack": accuracy, "eps": attack.eps}


def _shown(name: str, value: object) -> str:
    """Format a value of the result."""
    if name in PERCENT:
        return f"{value:.2%}"
    return str(value) if isinstance(value, str | int) else f"{value:.4f}"


def _exit_threshold(options: Options, trained: "TrainedModel", loaded: "ImageData") -> float | None:
    """Choose the halting threshold from a drop or a number of steps.

    It is chosen on the validation split of the run's own data, wherever that is now.
    """
    if options.exit_drop is None and options.exit_steps is None:
        return None
    from smallfry.training import exit_calibration
    from smallfry.training.evaluation import task_of
    from smallfry.training.evaluation_data import load_like
    from smallfry_runtime import early_exit

    calibration, own = loaded.validation, trained.manifest.get("data", {}).get("fingerprint", "")
    if len(calibration) == 0 or not loaded.matches(own):
        root = options.data.root if options.data.name is None else None
        _, calibration, _ = load_like(trained, options.run, None, root, "validation")
    task = task_of(trained.manifest)
    traced = exit_calibration.trace(trained.model, calibration, trained.normalize, task=task)
    points = early_exit.operating_points(traced)
    if options.exit_steps is not None:
        return early_exit.most_accurate(points, options.exit_steps).threshold
    assert options.exit_drop is not None
    return early_exit.most_thrifty(points, options.exit_drop).threshold
