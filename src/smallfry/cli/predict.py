"""Classify images, read texts, or solve puzzles: the answers of a model."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallfry.cli._answers import in_a_line
from smallfry.cli._fields import option
from smallfry.cli._messages import FAILED, complain
from smallfry.cli._shared import AsJson, EarlyExit, OneRun
from smallfry.errors import DataError, RunError, UsageError
from smallfry.io.csv_text import csv_text
from smallfry.io.replace import write_whole
from smallfry.io.terminal import say
from smallfry_runtime.files import MOST_TEXT, read_bytes
from smallfry_runtime.inputs import InputImage, find_images
from smallfry_runtime.names import path_of
from smallfry_runtime.predictions import Answer, Decoded

if TYPE_CHECKING:
    from smallfry.training.puzzle_inference import Solved
    from smallfry.training.run import TrainedModel

LINE = 100  # characters
SEPARATOR = "|"  # of several classes in a cell
MOST_CLASSES = 2**31 - 1  # all that a model has


@dataclass(frozen=True, kw_only=True)
class Options(EarlyExit, AsJson, OneRun):
    """Classify images with a trained model or an export, or answer by the task of the model.

    Args:
        inputs: Image files, folders, globs, or - for an image or a list of files on standard input;
            of a model for puzzles, text or JSON files, or - for such text; of a stereo model also
            left and right pictures by turns, or a folder with left and right.
        exit_threshold: Exit at this halting probability.
        top_k: Number of classes to print per image.
        budget_ms: Use the most accurate sub-model of an export within this latency of one image, in
            milliseconds on the machine that exported.
        decoding: Settings of the task's decoder, such as {beam: 10} of texts.
        csv: Write the class of each image and the probabilities of all classes into this file.
    """

    inputs: tuple[str, ...]
    exit_threshold: float | None = None
    top_k: int = 3
    budget_ms: float | None = option(metavar="MS")
    csv: Path | None = option(metavar="FILE")
    decoding: dict[str, Any] | None = option(metavar="SETTINGS")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, got {self.top_k}")


def run(options: Options) -> int:
    """Print the answer to each image; the exit code is 1 if one could not be read.

    Of a model for puzzles, print the answer to each after every recursion step.
    """
    from smallfry_runtime.manifest import Manifest, is_export

    if is_export(Path(options.run)):
        if options.checkpoint != "best":
            raise UsageError(
                "an export has the weights that it was made of: leave out checkpoint, or export "
                f"the run with --checkpoint {options.checkpoint}"
            )
        if not Manifest.read(Path(options.run)).is_classifier:
            return _decode_export(options)
    else:
        from smallfry.deploy.pretrained import load_trained, require_model

        require_model(options.run, exports=True)
        trained = load_trained(options.run, options.checkpoint)
        if not trained.is_classifier:
            return _decode_run(options, trained)
    if options.decoding:
        raise UsageError("decoding is of tasks whose answers are not classes: leave it out")
    images = find_images(options.inputs, sys.stdin.buffer)
    if options.csv is not None:
        return _write_csv(options, options.csv.expanduser(), images)
    code = 0
    for answer in _answers(options, images):
        if answer.error is not None:
            code = complain(answer.error, FAILED)
        elif options.json:
            say(json.dumps(answer.to_dict()))
        else:
            say(f"{answer.name}: {_guesses(answer)}")
    return code


def _write_csv(options: Options, file: Path, images: Iterable[InputImage]) -> int:
    """Write the answers as CSV; images that can't be read have empty cells."""
    code, found = 0, []
    for answer in _answers(replace(options, top_k=MOST_CLASSES), images):
        if answer.error is not None:
            code = complain(answer.error, FAILED)
        found.append(answer)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, csv_text(table_of(found)).encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{file}: can't be written ({error})") from error
    say(f"predictions: {file}")
    return code


def _guesses(answer: Answer) -> str:
    """List the classes of an answer with their probabilities, or only those chosen of several."""
    named = {name: f"{name} {share:.1%}" for name, share in answer.top}
    if answer.chosen is None:
        return "  ".join(named.values())
    likeliest = next(iter(named.values()))
    return "  ".join(named[name] for name in answer.chosen) or f"none (likeliest {likeliest})"


def table_of(answers: Sequence[Answer]) -> Iterator[list[object]]:
    """Yield column names, and a row for each image with the probabilities of all classes."""
    classes = sorted({name for answer in answers for name, _ in answer.top})
    known = {name for answer in answers for name, v in answer._asdict().items() if v is not None}
    extra = [name for name in ("halting", "steps") if name in known]
    several = "chosen" in known
    head = ["classes"] if several else ["class", "probability"]
    yield ["image", *head, *extra, *(f"p({name})" for name in classes)]
    for answer in answers:
        shares = dict(answer.top)
        best: tuple[object, ...] = answer.top[0] if answer.top else ("", "")
        if several:
            best = (SEPARATOR.join(answer.chosen or ()),)
        others = [getattr(answer, name) for name in extra]
        yield [answer.name, *best, *others, *(shares.get(name, "") for name in classes)]


def _decode_run(options: Options, trained: "TrainedModel") -> int:
    """Print the answers of a model whose answers are not classes."""
    from smallfry.tasks import ReadsText
    from smallfry.training.evaluation import task_of
    from smallfry.training.inference import decode_images
    from smallfry.training.puzzle_inference import solve
    from smallfry_runtime.decoders import require_no_settings
    from smallfry_runtime.pairs import find_pairs, takes_pairs

    _refuse_options_of_classes(options)
    _refuse_calibrated_exits(options)
    task = task_of(trained.manifest)
    if not isinstance(task, ReadsText):
        if takes_pairs(task.name):
            images = find_pairs(options.inputs, sys.stdin.buffer, trained.frame)
        else:
            images = find_images(options.inputs, sys.stdin.buffer)
        found = decode_images(trained, images, options.exit_threshold, options.decoding)
        return _print_decoded(options, found)

    require_no_settings(options.decoding)

    def answers(text: str) -> Iterator[tuple[dict[str, Any], str]]:
        for number, solved in enumerate(solve(trained, text, options.exit_threshold), 1):
            yield solved.to_dict(), _side_by_side(f"puzzle {number}", solved)

    return _print_of_files(options, answers)


def _decode_export(options: Options) -> int:
    """Print the answers of an export whose answers are not classes."""
    from smallfry_runtime.decoders import decoder_of
    from smallfry_runtime.runtime import Runtime

    _refuse_options_of_classes(options)
    runtime = Runtime(options.run)
    manifest = runtime.manifest
    threshold = runtime.exit_threshold(
        options.exit_steps, options.exit_drop, options.exit_threshold
    )
    if not runtime.takes_texts:
        images = runtime.find(options.inputs, sys.stdin.buffer)
        return _print_decoded(options, runtime.answer_each(images, options.decoding, threshold))

    read = decoder_of(manifest.task).read

    def answers(text: str) -> Iterator[tuple[dict[str, Any], str]]:
        pixels = read(text, manifest.classes, manifest.frame.height)
        found = runtime.decode(pixels, threshold, settings=options.decoding)
        for number, rows in enumerate(found, 1):
            yield {"answer": rows}, "\n".join((f"puzzle {number}:", *rows, ""))

    return _print_of_files(options, answers)


def _refuse_calibrated_exits(options: Options) -> None:
    if options.exit_drop is not None or options.exit_steps is not None:
        raise UsageError(
            "exit_drop and exit_steps need an export's calibrated thresholds; evaluate the run "
            "with this option to find the threshold, then predict with --exit_threshold"
        )


def _refuse_options_of_classes(options: Options) -> None:
    if options.top_k != Options.top_k:
        raise UsageError("top_k is for classifiers: leave it out")
    if options.csv is not None:
        raise UsageError("csv is for classifiers; take --json here")
    if options.budget_ms is not None:
        raise UsageError("budget_ms is for classifiers with sub-models: leave it out")


def _print_decoded(options: Options, answers: Iterable[Decoded]) -> int:
    """Print the answers to images; the exit code is 1 if one could not be read."""
    code = 0
    for answer in answers:
        if answer.error is not None:
            code = complain(answer.error, FAILED)
        elif options.json:
            say(json.dumps(answer.to_dict(), ensure_ascii=False))
        else:
            say(f"{answer.name}: {in_a_line(answer.value)}")
    return code


def _print_of_files(
    options: Options, answers: Callable[[str], Iterable[tuple[dict[str, Any], str]]]
) -> int:
    """Print the answers to text files, as JSON or text."""
    code = 0
    for name in options.inputs:
        try:
            content = sys.stdin.buffer.read(MOST_TEXT) if name == "-" else read_bytes(path_of(name))
            for number, (plain, text) in enumerate(answers(content.decode()), 1):
                if options.json:
                    say(json.dumps({"file": name, "puzzle": number, **plain}))
                else:
                    say(f"{name}, {text}")
        except (OSError, DataError, UnicodeDecodeError) as error:
            code = complain(f"{name}: {error}", FAILED)
    return code


def _side_by_side(title: str, solved: "Solved") -> str:
    """Arrange the puzzle and its answers in columns, as many as fit a line."""
    columns = [["given", "", *solved.given]]
    before = solved.given
    for number, (answer, halting) in enumerate(solved.steps, 1):
        cells = zip("".join(before), "".join(answer), strict=True)
        changed = sum(old != new for old, new in cells)
        columns.append([f"step {number}", f"{changed} new {halting:.0%}", *answer])
        before = answer
    width = max(len(cell) for column in columns for cell in column) + 2
    across = max(1, LINE // width)
    lines = [f"{title}: cells that are new, and the model's own probability of being right"]
    for start in range(0, len(columns), across):
        part = columns[start : start + across]
        lines += [
            "".join(cell.ljust(width) for cell in row).rstrip() for row in zip(*part, strict=True)
        ]
        lines.append("")
    return "\n".join(lines)


def _answers(options: Options, images: Iterable[InputImage]) -> Iterable[Answer]:
    """Classify with PyTorch or, for an export, with ONNX Runtime alone."""
    from smallfry_runtime.manifest import is_export

    threshold = options.exit_threshold
    if is_export(Path(options.run)):
        from smallfry_runtime.runtime import Runtime

        runtime = Runtime(options.run)
        if options.budget_ms is not None:
            runtime = runtime.within(options.budget_ms)
        threshold = runtime.exit_threshold(options.exit_steps, options.exit_drop, threshold)
        return runtime.classify(images, options.top_k, threshold)
    from smallfry.deploy.pretrained import load_trained
    from smallfry.training.inference import classify

    if options.budget_ms is not None:
        raise UsageError(
            "budget_ms needs an export with sub-models: export the run with --submodels N first"
        )
    _refuse_calibrated_exits(options)
    return classify(load_trained(options.run, options.checkpoint), images, options.top_k, threshold)
