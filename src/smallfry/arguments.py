"""What the command's verbs are told: their options, and what a mistake in them is called."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from smallfry.errors import SmallfryError, UsageError, nearest
from smallfry.io.safe_yaml import YAML_MODE
from smallfry.studies.config import STUDIES
from smallfry.training.config import TrainConfig
from smallfry.training.continuation import dotted
from smallfry.version import __version__

Config = TypeVar("Config")


@dataclass(frozen=True)
class OtherData:
    """Other data than that of the run.

    Args:
        name: A data set or a folder; its test split is taken, or all of it if it has none.
        root: Folder of a named data set.
    """

    name: str | None = None
    root: Path | None = None


@dataclass(frozen=True)
class EarlyExit:
    """When images may leave the recursion; at most one of these.

    Args:
        exit_drop: As soon as that costs at most this share of accuracy, such as 0.003.
        exit_steps: At this average of recursion steps.
        exit_threshold: At this halting probability.
    """

    exit_drop: float | None = None
    exit_steps: float | None = None
    exit_threshold: float | None = None


def build_parser(short: bool = False) -> ArgumentParser:
    """The parser of the whole command; ``short`` gives studies the defaults of their short form."""
    parser = _parser("Small networks that do the work of big ones.")
    parser.add_argument("--version", action="version", version=f"smallfry {__version__}")
    verbs = parser.add_subcommands(metavar="VERB")

    train_verb = _parser("Train a model; without options, a ViTRM on handwritten digits.")
    train_verb.add_argument("--config", action="config", help="A YAML file with any of these.")
    train_verb.add_argument(
        "--resume",
        type=str | None,
        metavar="RUN",
        help="Resume a run exactly where it stopped; --epochs N lengthens it.",
    )
    train_verb.add_argument(
        "--processes",
        type=int | None,
        metavar="N",
        help="Train in so many processes on this machine, such as one for each GPU; to train on "
        "several machines, start the command with torchrun or SLURM instead.",
    )
    train_verb.add_class_arguments(TrainConfig)
    verbs.add_subcommand("train", train_verb, help="train a model")

    evaluate_verb = _parser("Evaluate a trained model, by default on the test split of its data.")
    _add_run(evaluate_verb)
    evaluate_verb.add_argument(
        "--split", type=Literal["train", "validation", "test"], default="test", help="The split."
    )
    early = evaluate_verb.add_mutually_exclusive_group()
    early.add_argument(
        "--exit_drop",
        type=float,
        metavar="SHARE",
        help="Let images leave the recursion early, as far as that costs at most this share of "
        "accuracy on the run's validation split, such as 0.003.",
    )
    early.add_argument(
        "--exit_steps",
        type=float,
        metavar="MEAN",
        help="Let images leave the recursion early, at this average of steps on that split.",
    )
    evaluate_verb.add_class_arguments(OtherData, "data")
    verbs.add_subcommand("evaluate", evaluate_verb, help="evaluate a trained model")

    export_verb = _parser(
        "Export a trained model for ONNX Runtime, which needs neither PyTorch nor this machine."
    )
    _add_run(export_verb, as_json=False)
    export_verb.add_argument(
        "--to", type=Path | None, metavar="DIR", help="Where; default exports/RUN-PRECISION."
    )
    export_verb.add_argument(
        "--form",
        type=Literal["whole", "anytime"] | None,
        help="One graph, or three that let images leave the recursion early; default anytime for "
        "a model of several recursion steps.",
    )
    export_verb.add_argument(
        "--precision",
        type=Literal["float32", "int8", "int8_dynamic"],
        default="float32",
        help="int8: ranges of activations from training images; int8_dynamic: from each image.",
    )
    export_verb.add_argument(
        "--torch_program",
        action="store_true",
        help="Also write model.pt2 for torch.export.",
    )
    export_verb.add_argument(
        "--license", type=str | None, help="Of the weights, such as Apache-2.0; none is assumed."
    )
    export_verb.add_class_arguments(OtherData, "data")
    verbs.add_subcommand("export", export_verb, help="export a trained model for ONNX Runtime")

    benchmark_verb = _parser(
        "Measure latency, throughput, memory, size and accuracy of runs and exports, side by side."
    )
    benchmark_verb.add_argument("models", nargs="+", help="Runs, shared folders, or exports.")
    benchmark_verb.add_argument(
        "--folder", type=Path | None, help="For the report; default exports/benchmark-NAME."
    )
    benchmark_verb.add_argument("--json", action="store_true", help="Print JSON.")
    benchmark_verb.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 16, 64], help="Images at a time."
    )
    benchmark_verb.add_argument(
        "--forms",
        nargs="+",
        help="Of a run; default all: eager and compiled (PyTorch), float32, int8 and int8_dynamic "
        "(ONNX Runtime), exit (early exit).",
    )
    benchmark_verb.add_argument("--threads", type=int, default=1, help="CPU threads of each.")
    benchmark_verb.add_argument(
        "--seconds", type=float, default=2.0, help="Of timed answers for each and each batch size."
    )
    benchmark_verb.add_argument(
        "--peers", action="store_true", help="Beside them an untrained ViT, ResNet-18 and CCT."
    )
    benchmark_verb.add_argument(
        "--checkpoint", type=Literal["best", "last"], default="best", help="The weights of a run."
    )
    benchmark_verb.add_class_arguments(OtherData, "data")
    verbs.add_subcommand("benchmark", benchmark_verb, help="measure deployed models side by side")

    predict_verb = _parser("Classify images with a trained model, or with an export of one.")
    _add_run(predict_verb)
    predict_verb.add_argument(
        "inputs",
        nargs="+",
        help="Image files, folders, globs, or - for an image or a list of files on standard input.",
    )
    predict_verb.add_class_arguments(EarlyExit)
    predict_verb.add_argument("--top_k", type=int, default=3, help="Classes to name per image.")
    verbs.add_subcommand("predict", predict_verb, help="classify images")

    demo_verb = _parser("Serve a local page: drop an image, and watch the model think.")
    _add_run(demo_verb, as_json=False)
    demo_verb.add_argument("run2", nargs="?", help="A second run, to stand beside the first.")
    demo_verb.add_argument(
        "--host", default="127.0.0.1", help="Where to listen; 0.0.0.0 lets other machines in."
    )
    demo_verb.add_argument("--port", type=int, default=7860, help="0 picks a free one.")
    demo_verb.add_argument("--open", action="store_true", help="Open the page in the browser.")
    verbs.add_subcommand("demo", demo_verb, help="watch a trained model think, in the browser")

    models_verb = _parser("List smallfry's models with what one image costs.")
    models_verb.add_argument("pattern", nargs="?", default="*", help="Such as 'vitrm_*'.")
    models_verb.add_argument("--json", action="store_true", help="One JSON object per line.")
    verbs.add_subcommand("models", models_verb, help="list models and their cost")

    share_verb = _parser("Share a trained model: as a folder, or on the Hugging Face hub.")
    _add_run(share_verb)
    share_verb.add_argument("--to", type=Path | None, metavar="FOLDER", help="A new folder.")
    share_verb.add_argument("--hub", type=str | None, metavar="USER/NAME", help="A repository.")
    share_verb.add_argument("--private", action="store_true", help="Show it to nobody else.")
    share_verb.add_argument(
        "--license", type=str | None, help="Of the weights, such as apache-2.0; none is assumed."
    )
    verbs.add_subcommand("share", share_verb, help="share a trained model")

    study_verb = _parser("Run one of the papers' comparisons; the same command goes on with it.")
    verbs.add_subcommand("study", study_verb, help="compare optimizers or models as the papers did")
    studies = study_verb.add_subcommands(metavar="STUDY")
    for name, kind in STUDIES.items():
        parser_of_study = _parser(kind.purpose)
        parser_of_study.add_argument("--config", action="config", help="A YAML file with these.")
        parser_of_study.add_argument(
            "--folder", type=Path | None, help="Where runs and report go; default studies/STUDY-…"
        )
        parser_of_study.add_argument(
            "--short", action="store_true", help="A few minutes instead of hours, to try it."
        )
        parser_of_study.add_class_arguments(kind.config)
        parser_of_study.set_defaults({**kind.defaults, **(kind.short if short else {})})
        studies.add_subcommand(name, parser_of_study, help=kind.purpose)
    return parser


def _parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog="smallfry",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=YAML_MODE,
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _add_run(parser: ArgumentParser, as_json: bool = True) -> None:
    parser.add_argument(
        "run",
        help="A run folder, a checkpoint folder in one, a shared folder, or hf_hub:USER/NAME.",
    )
    parser.add_argument(
        "--checkpoint",
        type=Literal["best", "last"],
        default="best",
        help="The weights of the best epoch, or of the last step.",
    )
    if as_json:
        parser.add_argument("--json", action="store_true", help="Print JSON.")


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """What a command line says.

    Raises:
        UsageError: Words or settings that can't be meant.
    """
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(explain(str(error), arguments, parser)) from error
    except Exception as error:  # jsonargparse raises almost anything, given a stranger's file
        raise _unreadable(error) from error


def given_settings(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of ``train`` that a command line has, by dotted name, no defaults."""
    given = parser.parse_args(list(arguments), defaults=False)["train"].as_dict()
    for name in ("resume", "debug", "processes", "config"):
        given.pop(name, None)
    return dotted(given)


def build_config(parser: ArgumentParser, given: Namespace, kind: type[Config]) -> Config:
    """The configuration that a verb was given.

    Raises:
        UsageError: A group of settings that is something else.
    """
    for name, expected in get_type_hints(kind).items():
        if is_dataclass(expected) and not isinstance(given[name], Namespace | dict):
            raise UsageError(f"{name}: expected settings by their names, got '{given[name]}'")
    try:
        built = parser.instantiate(given)
        return kind(**{name: built[name] for name in get_type_hints(kind)})
    except SmallfryError:
        raise
    except Exception as error:  # such as a number that no float can hold
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UsageError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return UsageError(f"the settings can't be read: {reason}")


def expand_shorthand(arguments: Sequence[str]) -> list[str]:
    """``--data cifar10`` says ``--data.name cifar10``; so for model, objective and optimizer."""
    named = re.compile(r"--(data|model|objective|optimizer)(=.*)?", re.DOTALL)
    expanded = []
    for argument in arguments:
        match = named.fullmatch(argument)
        expanded.append(f"--{match[1]}.name{match[2] or ''}" if match else argument)
    return expanded


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Replace ``~`` at the start of a path by the home folder, as in ``--to=~/exports``.

    Shells do so at the start of a word only.
    """
    named = re.compile(r"(--[\w.]+=)?(~(?:/.*)?)", re.DOTALL)
    matches = [named.fullmatch(argument) for argument in arguments]
    return [
        f"{match[1] or ''}{Path(match[2]).expanduser()}" if match else argument
        for match, argument in zip(matches, arguments, strict=True)
    ]


def explain(message: str, arguments: Sequence[str], parser: ArgumentParser) -> str:
    """A parser's message on one line, with the nearest right name for a wrong one."""
    message = " ".join(message.split())
    verbs = verb_parsers(parser)
    verb, kind = next((argument for argument in arguments if argument in verbs), None), "verb"
    if verb == "study":
        studies = verb_parsers(verbs[verb])
        named = [argument for argument in arguments if argument in studies]
        verbs, kind = studies, "study"
        verb = named[0] if named else None
    if verb is None:
        wrong = re.search(r"invalid choice: '(.*?)'", message)
        hint = nearest(wrong[1], verbs) if wrong else f": {', '.join(verbs)}"
        return f"unknown {kind} '{wrong[1]}'{hint}" if wrong else f"expected a {kind}{hint}"
    option = re.search(r"nrecognized arguments: --([\w.]+)|option '([\w.]+)'", message)
    if option is not None:
        known = {name.lstrip("-") for name in verbs[verb]._option_string_actions}
        given = option[1] or option[2]
        hint = nearest(given, known) or f"; smallfry {verb} --help lists them"
        return f"{verb} has no option '{given}'{hint}"
    value = re.search(r"Parser key \"(.*?)\": (.*?)(?:Got|Given) value: (.*)$", message)
    if value is not None:
        key, expected, given = value.groups()
        types = re.search(r"Subtypes: \[(.*?)\] Errors", expected)
        expected = types[1] if types else expected.removeprefix("Expected a ").rstrip(". ")
        choices = re.findall(r"'(\w+)'", expected) if "Literal" in expected else []
        if choices:
            close = nearest(given, choices)
            return f"{key}: expected one of {', '.join(choices)}, got '{given}'{close}"
        expected = re.sub(r"<class '(\w+)'>", r"\1", expected).replace(", NoneType", " or null")
        return f"{key}: expected {expected}, got '{given}'"
    return message.removeprefix("Parser key ")


def verb_parsers(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """The parsers of a parser's subcommands, by name."""
    subcommands: Any = parser._subcommands_action
    return dict(subcommands.choices)
