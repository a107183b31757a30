"""The command: ``smallfry train``, ``evaluate``, ``predict``, ``models``, ``share``, ``study``."""

import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from smallfry.errors import SmallfryError, Stopped, UsageError, nearest
from smallfry.studies.config import STUDIES, RaceConfig, RunsConfig
from smallfry.training.config import TrainConfig
from smallfry.version import __version__

FAILED, MISUSED = 1, 2  # exit codes; a run that a signal stopped gives 128 + its number


# The verbs


def train(config: TrainConfig, resume: str | None = None) -> int:
    """Train a model; without options, a ViTRM on handwritten digits."""
    from smallfry.training import train as training

    if resume is None:
        summary = training.train(config)
    elif config != TrainConfig():
        raise UsageError("--resume goes on with the run's own configuration: leave the rest away")
    else:
        summary = training.resume(resume)
    _print_summary(summary)
    return 0


@dataclass(frozen=True)
class OtherData:
    """Other data than that of the run.

    Args:
        name: A data set or a folder; its test split is taken, or all of it if it has none.
        root: Folder of a named data set.
    """

    name: str | None = None
    root: Path | None = None


def evaluate(
    run: str,
    data: OtherData,
    split: Literal["train", "validation", "test"] = "test",
    checkpoint: Literal["best", "last"] = "best",
    exit_drop: float | None = None,
    exit_steps: float | None = None,
    as_json: bool = False,
) -> int:
    """Evaluate a trained model."""
    from smallfry.deploy.pretrained import load_trained
    from smallfry.training import exit_calibration
    from smallfry.training.evaluation import predict as run_model
    from smallfry.training.evaluation import score
    from smallfry.training.run import require_classes
    from smallfry.training.train import load_like

    trained = load_trained(run, checkpoint)
    loaded, chosen, taken = load_like(trained, run, data.name, data.root, split)
    require_classes(trained, loaded.classes, loaded.origin)
    threshold = None
    if exit_drop is not None or exit_steps is not None:
        _, calibration, _ = load_like(trained, run, split="validation")
        traced = exit_calibration.trace(trained.model, calibration, trained.normalize)
        points = exit_calibration.operating_points(traced)
        if exit_drop is None:
            threshold = exit_calibration.most_accurate(points, cast(float, exit_steps)).threshold
        else:
            threshold = exit_calibration.most_thrifty(points, exit_drop).threshold
    scores = score(run_model(trained.model, chosen, trained.normalize, exit_threshold=threshold))
    result = {"data": loaded.name, "split": taken, "images": len(chosen), **scores}
    if threshold is not None:
        result["exit_threshold"] = threshold
    if as_json:
        print(json.dumps(result))
        return 0
    table = Table("", "", show_header=False, box=None)
    for name, value in result.items():
        percent = name in ("accuracy", "macro_f1")
        shown = value if isinstance(value, str | int) else f"{value:.4f}"
        table.add_row(name.replace("_", " "), f"{value:.2%}" if percent else str(shown))
    Console().print(table)
    return 0


def predict(
    run: str,
    inputs: list[str],
    top_k: int = 3,
    checkpoint: Literal["best", "last"] = "best",
    exit_threshold: float | None = None,
    as_json: bool = False,
) -> int:
    """Classify images."""
    from smallfry.deploy.pretrained import load_trained
    from smallfry.inputs import find_images
    from smallfry.training.inference import classify

    if top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}")
    trained = load_trained(run, checkpoint)
    failed = False
    found = find_images(inputs, sys.stdin.buffer)
    for answer in classify(trained, found, top_k, exit_threshold):
        if answer.error is not None:
            print(f"smallfry: {answer.error}", file=sys.stderr)
            failed = True
        elif as_json:
            print(json.dumps(answer.to_dict()), flush=True)
        else:
            guesses = "  ".join(f"{name} {share:.1%}" for name, share in answer.top)
            print(f"{answer.name}: {guesses}", flush=True)
    return FAILED if failed else 0


def share(
    run: str,
    to: Path | None = None,
    hub: str | None = None,
    private: bool = False,
    license: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    as_json: bool = False,
) -> int:
    """Write a trained model into a folder to give away, or put it on the Hugging Face hub."""
    if (to is None) == (hub is None) or (private and hub is None):
        raise UsageError("share takes --to FOLDER, or --hub USER/NAME and perhaps --private")
    from smallfry.deploy.pretrained import push_to_hub, save_pretrained

    what: dict[str, Any] = {"checkpoint": checkpoint, "license": license}
    if hub is not None:
        name, where = f"hf_hub:{hub}", push_to_hub(run, hub, private=private, **what)
    else:
        name = where = str(save_pretrained(run, cast(Path, to), **what))
    timm_name = name if hub else f"local-dir:{where}"
    if as_json:
        print(json.dumps({"shared": where, "timm": timm_name}))
        return 0
    print(f"shared:  {where}\nuse it:  smallfry predict {shlex.quote(name)} IMAGE…")
    print(f"or:      timm.create_model({timm_name!r}, pretrained=True)")
    if license is None:
        print("licence: not stated, so others may not use it; --license apache-2.0 states one")
    return 0


def models(pattern: str = "*", as_json: bool = False) -> int:
    """List smallfry's models with what they cost."""
    import timm
    import torch

    from smallfry import cost

    names = [
        name
        for name in timm.list_models(pattern)
        if timm.model_entrypoint(name).__module__.startswith("smallfry.")
    ]
    if not names:
        raise UsageError(f"no model of smallfry matches '{pattern}'")
    table = Table("model", "parameters", "MMAC", "activations", "input", box=None)
    for name in names:
        shape = timm.get_pretrained_cfg(name).input_size
        with torch.device("meta"):  # the largest have no need to be filled with numbers
            spent = cost(timm.create_model(name), torch.zeros(1, *shape))
        if as_json:
            print(json.dumps({"model": name, "input": list(shape), **spent._asdict()}))
        table.add_row(
            name,
            f"{spent.parameters:,}",
            f"{spent.macs / 1e6:,.0f}",
            f"{spent.activation_bytes / 2**20:,.1f} MiB",
            "×".join(map(str, shape)),
        )
    if not as_json:
        Console().print(table)
    return 0


def study(name: str, config: RaceConfig | RunsConfig, folder: Path | None = None) -> int:
    """Run one of the papers' comparisons, or what is missing of it, and write its report."""
    if isinstance(config, RaceConfig):
        from smallfry.studies.race import run_race

        report = run_race(name, config, folder or Path("studies") / f"{name}-{config.problem}")
    else:
        from smallfry.studies.study import run_study

        data = Path(config.data.name).name
        report = run_study(name, config, folder or Path("studies") / f"{name}-{data}")
    print(f"report: {report}")
    return 0


# What the verbs are told


def build_parser(short: bool = False) -> ArgumentParser:
    """The parser of the whole command; ``short`` gives studies the defaults of their short form."""
    parser = _parser("Small networks that do the work of big ones.")
    parser.add_argument("--version", action="version", version=f"smallfry {__version__}")
    verbs = parser.add_subcommands(metavar="VERB")

    train_verb = _parser("Train a model; without options, a ViTRM on handwritten digits.")
    train_verb.add_argument("--config", action="config", help="A YAML file with any of these.")
    train_verb.add_argument(
        "--resume", metavar="RUN", help="Go on with a run, exactly where it stopped."
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

    predict_verb = _parser("Classify images with a trained model.")
    _add_run(predict_verb)
    predict_verb.add_argument(
        "inputs",
        nargs="+",
        help="Image files, folders, globs, or - for an image or a list of files on standard input.",
    )
    predict_verb.add_argument(
        "--exit_threshold",
        type=float,
        help="Let images leave the recursion at this halting probability; evaluate finds one.",
    )
    predict_verb.add_argument("--top_k", type=int, default=3, help="Classes to name per image.")
    verbs.add_subcommand("predict", predict_verb, help="classify images")

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
        prog="smallfry", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _add_run(parser: ArgumentParser) -> None:
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
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _expand_shorthand(arguments: Sequence[str]) -> list[str]:
    """``--data cifar10`` says ``--data.name cifar10``; so for model, objective and optimizer."""
    named = re.compile(r"--(data|model|objective|optimizer)(=.*)?", re.DOTALL)
    expanded = []
    for argument in arguments:
        match = named.fullmatch(argument)
        expanded.append(f"--{match[1]}.name{match[2] or ''}" if match else argument)
    return expanded


def _dispatch(parsed: Namespace, parser: ArgumentParser, short: bool) -> int:
    verb = parsed.subcommand
    given = parsed[verb]
    if verb == "train":
        built = _verb_parsers(parser)[verb].instantiate(given)
        config = TrainConfig(**{field.name: built[field.name] for field in fields(TrainConfig)})
        return train(config, given.resume)
    if verb == "evaluate":
        other = OtherData(given.data.name, given.data.root)
        return evaluate(
            given.run,
            other,
            given.split,
            given.checkpoint,
            given.exit_drop,
            given.exit_steps,
            given.json,
        )
    if verb == "predict":
        names = ("run", "inputs", "top_k", "checkpoint", "exit_threshold", "json")
        return predict(*(given[name] for name in names))
    if verb == "share":
        wanted = ("run", "to", "hub", "private", "license", "checkpoint", "json")
        return share(*(given[name] for name in wanted))
    if verb == "study":
        return _dispatch_study(given, parser, short)
    return models(given.pattern, given.json)


def _dispatch_study(given: Namespace, parser: ArgumentParser, short: bool) -> int:
    name = given.subcommand
    if given[name].short and not short:
        raise UsageError("the short form is asked for on the command line: --short")
    kind = STUDIES[name]
    built = _verb_parsers(_verb_parsers(parser)["study"])[name].instantiate(given[name])
    config = kind.config(**{field.name: built[field.name] for field in fields(kind.config)})
    return study(name, config, given[name].folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 for a failure, 2 for wrong usage."""
    arguments = _expand_shorthand(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        if "--debug" in arguments:
            return _run(arguments)
        try:
            return _run(arguments)
        except (ArgumentError, UsageError) as error:
            return _complain(error, MISUSED)
        except SmallfryError as error:
            return _complain(error, FAILED)
        except Stopped as stop:
            print(f"smallfry: {stop}", file=sys.stderr)
            return 128 + stop.signal_number
        except KeyboardInterrupt:
            print("smallfry: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            return _complain(
                f"an error inside smallfry, {type(error).__name__}: {error}; "
                "--debug shows where, please report it",
                FAILED,
            )


def _run(arguments: Sequence[str]) -> int:
    short = "--short" in arguments
    parser = build_parser(short)
    try:
        parsed = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(_explain(str(error), arguments, parser)) from None
    return _dispatch(parsed, parser, short)


def _explain(message: str, arguments: Sequence[str], parser: ArgumentParser) -> str:
    """A parser's message on one line, with the nearest right name for a wrong one."""
    message = " ".join(message.split())
    verbs = _verb_parsers(parser)
    verb, kind = next((argument for argument in arguments if argument in verbs), None), "verb"
    if verb == "study":
        studies = _verb_parsers(verbs[verb])
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


def _verb_parsers(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    subcommands: Any = parser._subcommands_action
    return dict(subcommands.choices)


def _log_to_stderr() -> None:
    ours = logging.getLogger("smallfry")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("smallfry: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
    for chatty in ("lightning.pytorch.utilities.rank_zero", "datasets", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _complain(error: Exception | str, code: int) -> int:
    print(f"smallfry: {error}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"smallfry: warning: {message}", file=sys.stderr)


def _print_summary(summary: dict[str, Any]) -> None:
    """The result of a run, with its reference points."""
    measured, console = summary["measured"], Console(highlight=False)
    table = Table("", "test accuracy", "macro F1", "parameters", "MMAC", box=None)
    table.add_row(
        summary["model"]["name"],
        f"{measured['test']['accuracy']:.2%}",
        f"{measured['test']['macro_f1']:.2%}",
        f"{measured['parameters']:,}",
        f"{measured['macs'] / 1e6:,.1f}",
    )
    for reference in measured["references"]:
        table.add_row(reference["name"], f"{reference['test_accuracy']:.2%}", "", "", "")
    console.print(table)
    data, run = summary["data"], summary["run"]
    console.print(
        f"best epoch {measured['best_epoch']} of {measured['epochs']}, selected on "
        f"{measured['select_on']}; {data['train']:,} images to train, {data['test']:,} to test; "
        f"{measured['training_seconds']:.0f} s of training",
        soft_wrap=True,
    )
    console.print(f"pictures: {run}/pictures", soft_wrap=True)
    console.print(f"use it:   smallfry predict {run} IMAGE…", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
