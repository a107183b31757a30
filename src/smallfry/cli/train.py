"""Train a model."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from smallfry.cli._fields import command_only, given_settings, option, process_count, settings_of
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import command, printable, say
from smallfry.training.config import TrainConfig
from smallfry.training.launch_env import rank

if TYPE_CHECKING:
    from smallfry.training.own_code import OwnCode

WORST = 5  # classes whose scores are printed
MOST_SCORES = 5  # in a line


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model; without options, a ViTRM on handwritten digits.

    Args:
        resume: Resume an interrupted run exactly; --epochs N extends it.
        show_batch: Draw the first augmented images into this PNG, batch.png by default, instead of
            training.
        find_lr: Test learning rates on the model, optimizer and data, suggest one, and draw the
            losses into this PNG, learning_rate.png by default, instead of training.
        code: Python file or module with your own losses, metrics and callbacks, which settings name
            as MODULE:NAME; repeat it for several. No configuration can import code by itself.
        processes: Number of processes on this machine, such as one per GPU; for several machines,
            start the command with torchrun or SLURM instead.
        settings: Settings of a new run.
        given: Settings given with --resume.
    """

    resume: str | None = option(metavar="RUN")
    show_batch: Path | None = option(metavar="FILE")
    find_lr: Path | None = option(metavar="FILE")
    code: tuple[str, ...] = command_only(metavar="FILE")
    processes: int | None = process_count()
    settings: TrainConfig = settings_of(TrainConfig)
    given: Mapping[str, Any] = given_settings(beside="resume")


def complete(arguments: Sequence[str]) -> list[str]:
    """Put the recipe of a task before its options, unless a file of settings is given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--task", "--config", "--resume"):
        parser.add_argument(name)
    try:
        found, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # of an option without its value, which the parser explains
        return list(arguments)
    if found.task is None or found.config or found.resume:
        return list(arguments)
    from smallfry.training.recipes import recipe_of

    file = recipe_of(found.task)
    return [*arguments] if file is None else ["--config", str(file), *arguments]


def run(options: Options) -> int:
    """Train, and print the result with its baselines."""
    from smallfry.training import train as training
    from smallfry.training.continuation import dotted
    from smallfry.training.own_code import load_code

    if options.show_batch is not None:
        return _show_batch(options, options.show_batch)
    code = load_code(options.code)
    if options.find_lr is not None:
        return _find_lr(options, options.find_lr, code)
    if options.resume is not None:
        summary = training.resume(options.resume, changes=dotted(options.given), code=code)
    else:
        summary = training.train(options.settings, None, code)
    if rank() == 0:
        _print_summary(summary)
    return 0


def _show_batch(options: Options, file: Path) -> int:
    """Draw the first images of a run instead of training."""
    from smallfry.training.show_batch import show_batch

    if options.resume is not None:
        raise UsageError("show_batch draws images of a new run: leave out resume")
    say(f"images: {show_batch(options.settings, file)}")
    return 0


def _find_lr(options: Options, file: Path, code: "OwnCode") -> int:
    """Suggest a learning rate instead of training."""
    from smallfry.training.find_lr import find_learning_rate

    if options.resume is not None:
        raise UsageError("find_lr tests the rates of a new run: leave out resume")
    found = find_learning_rate(options.settings, file, code)
    say(f"{found.describe()}\npicture: {file}")
    return 0


def _print_summary(summary: dict[str, Any]) -> None:
    """Print the result of a run with its baselines."""
    measured, console = summary["measured"], CleanConsole(highlight=False)
    scores = {name: f"{value:.4g}" for name, value in measured["test"].items()}
    if "macro_f1" in measured["test"]:
        shown = {"accuracy": "accuracy", "macro F1": "macro_f1"}
        scores = {title: f"{measured['test'][name]:.2%}" for title, name in shown.items()}
    if "mean_average_precision" in measured["test"]:
        names = {"mAP": "mean_average_precision", "macro F1": "macro_f1", "micro F1": "micro_f1"}
        scores = {title: f"{measured['test'][name]:.2%}" for title, name in names.items()}
    if len(scores) > MOST_SCORES:  # of a task that names the main ones
        from smallfry.tasks import find_task

        main = getattr(find_task(summary["task"]), "choices", ())
        scores = {name: scores[name] for name in main if name in scores} or scores
    titles = [title.replace("_", " ") for title in scores]
    table = Table("", f"test {titles[0]}", *titles[1:], "parameters", "MMAC", box=None)
    table.add_row(
        escape(printable(summary["model"]["name"])),
        *scores.values(),
        f"{measured['parameters']:,}",
        f"{measured['macs'] / 1e6:,.1f}",
    )
    for reference in measured["references"]:
        table.add_row(escape(printable(reference["name"])), f"{reference['test_accuracy']:.2%}")
    console.print(table)
    which = f"best epoch {measured['best_epoch']} of {measured['epochs']}, selected on "
    which += escape(printable(measured["select_on"]))
    if measured.get("choice") == "last epoch":
        which = f"last epoch {measured['epochs']} of {measured['epochs']}"
    if methods := [next(iter(each)) for each in summary.get("methods", [])]:
        which += f", finished by {escape(printable(', '.join(methods)))}"
    data, run = summary["data"], escape(printable(summary["run"]))
    console.print(
        f"{which}; "
        f"{data['train']:,} images to train, {data['test']:,} to test; "
        f"{measured['training_seconds']:.0f} s of training",
        soft_wrap=True,
    )
    _print_worst(summary.get("per_class") or {})
    console.print(f"pictures: {run}/pictures", soft_wrap=True)
    if (Path(summary["run"]) / "report.html").is_file():
        console.print(f"mistakes: {run}/report.html", soft_wrap=True)
    use = escape(command("smallfry", "predict", summary["run"]))
    console.print(f"use it:   {use} FILE…", soft_wrap=True)


def _print_worst(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print the classes with the lowest F1 scores, of more than two."""
    from smallfry.cli.evaluate import print_per_class

    worst = sorted(scores, key=lambda name: scores[name]["f1"])[:WORST]
    if len(scores) > 2:
        if len(scores) > WORST:
            CleanConsole().print(f"the {WORST} worst of {len(scores)} classes:")
        print_per_class({name: scores[name] for name in worst})
