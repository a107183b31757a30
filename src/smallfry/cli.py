"""The command ``smallfry``: one function for each verb."""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.markup import escape
from rich.table import Table

from smallfry.arguments import (
    EarlyExit,
    OtherData,
    build_config,
    build_parser,
    expand_home,
    expand_shorthand,
    given_settings,
    parse,
    verb_parsers,
)
from smallfry.errors import SmallfryError, Stopped, UsageError, is_out_of_memory, refusal
from smallfry.io.signals import Signalled, raising, second_ends
from smallfry.io.terminal import (
    CleanConsole,
    CleanFormatter,
    command,
    escape_unencodable,
    printable,
    say,
    shortened,
)
from smallfry.studies.config import STUDIES, RaceConfig, RunsConfig
from smallfry.training.config import TrainConfig
from smallfry.training.started import is_launched, launch, rank

LIGHTNING = ("lightning.fabric.utilities.distributed", "lightning.pytorch.utilities.rank_zero")
FAILED, MISUSED = 1, 2  # exit codes; a run that a signal stopped gives 128 + its number


# The verbs


def train(
    config: TrainConfig, resume: str | None = None, changes: Mapping[str, Any] | None = None
) -> int:
    """Train a model; without options, a ViTRM on handwritten digits.

    ``changes`` are settings of the resumed run that are given new values, by dotted name.
    """
    from smallfry.training import train as training

    if resume is not None:
        summary = training.resume(resume, changes=changes)
    else:
        summary = training.train(config)
    if rank() == 0:
        _print_summary(summary)
    return 0


def export(
    run: str,
    to: Path | None = None,
    form: str | None = None,
    precision: str = "float32",
    checkpoint: Literal["best", "last"] = "best",
    torch_program: bool = False,
    license: str | None = None,
    data: OtherData | None = None,
) -> int:
    """Export a trained model for ONNX Runtime."""
    from smallfry.deploy.export import export as write_export

    data = data or OtherData()
    folder = to or Path("exports") / f"{Path(run).resolve().name}-{precision}"
    write_export(
        run, folder, form, precision, checkpoint, torch_program, license, data.name, data.root
    )
    size = sum(file.stat().st_size for file in folder.glob("*.onnx"))
    if precision != "float32":
        from smallfry.deploy.quantization_report import print_report

        print_report(folder)
    say(f"export: {folder} ({size / 1e6:,.2f} MB)")
    say(f"use it: {command('smallfry', 'predict', folder)} IMAGE…")
    return 0


def benchmark(
    models: list[str],
    folder: Path | None = None,
    data: OtherData | None = None,
    as_json: bool = False,
    **settings: Any,
) -> int:
    """Measure deployed models side by side; settings are those of ``BenchmarkConfig``."""
    from smallfry.deploy import benchmark_page
    from smallfry.deploy.benchmark import BenchmarkConfig, measure
    from smallfry.io.json import strict

    config = BenchmarkConfig(**settings)
    folder = folder or Path("exports") / f"benchmark-{Path(models[0]).resolve().name}"
    data = data or OtherData()
    with benchmark_page.new_report(folder) as new:
        found = measure(models, config, data.name, data.root)
        benchmark_page.write_report(found, new)
    if as_json:
        say(json.dumps(strict(benchmark_page.summary_of(found))))
        return 0
    benchmark_page.print_tables(found)
    say(f"report: {folder / benchmark_page.PAGE}")
    return 0


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
    from smallfry.training.evaluation import require_finite, score
    from smallfry.training.evaluation_data import load_like
    from smallfry.training.run import require_classes
    from smallfry_runtime import early_exit

    trained = load_trained(run, checkpoint)
    loaded, chosen, taken = load_like(trained, run, data.name, data.root, split)
    require_classes(trained, loaded.classes, loaded.origin)
    threshold = None
    if exit_drop is not None or exit_steps is not None:
        _, calibration, _ = load_like(trained, run, split="validation")
        traced = exit_calibration.trace(trained.model, calibration, trained.normalize)
        points = early_exit.operating_points(traced)
        if exit_drop is None:
            threshold = early_exit.most_accurate(points, cast(float, exit_steps)).threshold
        else:
            threshold = early_exit.most_thrifty(points, exit_drop).threshold
    said = run_model(trained.model, chosen, trained.normalize, exit_threshold=threshold)
    scores = score(require_finite(said))
    result = {"data": loaded.name, "split": taken, "images": len(chosen), **scores}
    if threshold is not None:
        result["exit_threshold"] = threshold
    if as_json:
        say(json.dumps(result))
        return 0
    table = Table("", "", show_header=False, box=None)
    for name, value in result.items():
        percent = name in ("accuracy", "macro_f1")
        shown = value if isinstance(value, str | int) else f"{value:.4f}"
        cell = f"{value:.2%}" if percent else escape(printable(str(shown)))
        table.add_row(name.replace("_", " "), cell)
    CleanConsole().print(table)
    return 0


def predict(
    run: str,
    inputs: list[str],
    top_k: int = 3,
    checkpoint: Literal["best", "last"] = "best",
    leave: EarlyExit | None = None,
    as_json: bool = False,
) -> int:
    """Classify images, with PyTorch or, from an export, with ONNX Runtime alone."""
    from smallfry_runtime.inputs import find_images
    from smallfry_runtime.manifest import is_export

    if top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}")
    leave = leave or EarlyExit()
    found = find_images(inputs, sys.stdin.buffer)
    if is_export(Path(run)):
        from smallfry_runtime.runtime import Runtime

        runtime = Runtime(run)
        threshold = runtime.exit_threshold(leave.exit_steps, leave.exit_drop, leave.exit_threshold)
        answers = runtime.classify(found, top_k, threshold)
    else:
        from smallfry.deploy.pretrained import load_trained
        from smallfry.training.inference import classify

        if leave.exit_drop is not None or leave.exit_steps is not None:
            raise UsageError(
                "only an export knows what a budget costs; evaluate the run with this option to "
                "find the threshold, then predict with --exit_threshold"
            )
        answers = classify(load_trained(run, checkpoint), found, top_k, leave.exit_threshold)
    failed = False
    for answer in answers:
        if answer.error is not None:
            _complain(answer.error, FAILED)
            failed = True
        elif as_json:
            say(json.dumps(answer.to_dict()))
        else:
            guesses = "  ".join(f"{name} {share:.1%}" for name, share in answer.top)
            say(f"{answer.name}: {guesses}")
    return FAILED if failed else 0


def demo(
    runs: list[str],
    checkpoint: Literal["best", "last"] = "best",
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
) -> int:
    """Serve a local page to try one or two models on images, and watch them think."""
    from smallfry.demo.serve import serve

    serve(runs, checkpoint, host, port, open_browser)
    return 0


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
        say(json.dumps({"shared": where, "timm": timm_name}))
        return 0
    say(f"shared:  {where}\nuse it:  {command('smallfry', 'predict', name)} IMAGE…")
    say(f"or:      timm.create_model({timm_name!r}, pretrained=True)")
    if license is None:
        say("licence: not stated, so others may not use it; --license apache-2.0 states one")
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
            say(json.dumps({"model": name, "input": list(shape), **spent._asdict()}))
        table.add_row(
            name,
            f"{spent.parameters:,}",
            f"{spent.macs / 1e6:,.0f}",
            f"{spent.activation_bytes / 2**20:,.1f} MiB",
            "×".join(map(str, shape)),
        )
    if not as_json:
        CleanConsole().print(table)
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
    say(f"report: {report}")
    return 0


def _dispatch(
    parsed: Namespace, parser: ArgumentParser, short: bool, changes: Mapping[str, Any]
) -> int:
    verb = parsed.subcommand
    given = parsed[verb]
    if verb != "train" and (count := launch().processes) > 1:
        if rank() > 0:
            return MISUSED  # the first one says it
        raise UsageError(f"only train works in several processes, and {count} do {verb}: start one")
    if verb == "train":
        config = build_config(verb_parsers(parser)[verb], given, TrainConfig)
        return train(config, given.resume, changes)
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
        return predict(
            given.run,
            given.inputs,
            given.top_k,
            given.checkpoint,
            EarlyExit(given.exit_drop, given.exit_steps, given.exit_threshold),
            given.json,
        )
    if verb == "export":
        return export(
            given.run,
            given.to,
            given.form,
            given.precision,
            given.checkpoint,
            given.torch_program,
            given.license,
            OtherData(given.data.name, given.data.root),
        )
    if verb == "benchmark":
        settings = {name: given[name] for name in ("threads", "seconds", "peers", "checkpoint")}
        lists = {name: given[name] for name in ("batch_sizes", "forms")}
        settings |= {name: tuple(values) for name, values in lists.items() if values is not None}
        other = OtherData(given.data.name, given.data.root)
        return benchmark(given.models, given.folder, other, given.json, **settings)
    if verb == "demo":
        runs = [run for run in (given.run, given.run2) if run is not None]
        return demo(runs, given.checkpoint, given.host, given.port, given.open)
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
    parser_of_study = verb_parsers(verb_parsers(parser)["study"])[name]
    config: Any = build_config(parser_of_study, given[name], kind.config)
    return study(name, config, given[name].folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 for a failure, 2 for wrong usage."""
    arguments = expand_home(sys.argv[1:] if arguments is None else arguments)
    arguments = expand_shorthand(arguments)
    escape_unencodable()
    _log_to_stderr()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # smallfry says itself what is wrong
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        if "--debug" in arguments:
            return _run(arguments)
        try:
            return _run(arguments)
        except (ArgumentError, UsageError) as error:
            return _complain(error, MISUSED)
        except SmallfryError as error:
            return _complain(error, FAILED)
        except (Stopped, Signalled) as stop:
            _speak_for_all(str(stop))
            return 128 + stop.signal_number
        except KeyboardInterrupt:
            say("smallfry: interrupted", sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if is_out_of_memory(error):
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                return _complain(
                    f"out of memory ({reason}); take a smaller batch_size, accumulate, or a "
                    "smaller model; a run that was saved goes on with --resume",
                    FAILED,
                )
            if isinstance(error, OSError) and (refused := refusal(error)) is not None:
                return _complain(refused, FAILED)
            return _complain(
                f"an error inside smallfry, {type(error).__name__}: {error}; "
                "--debug shows where, please report it",
                FAILED,
            )


def _run(arguments: Sequence[str]) -> int:
    short = "--short" in arguments
    parser = build_parser(short)
    parsed = parse(parser, arguments)
    processes = parsed[parsed.subcommand].get("processes")
    if processes is not None and not is_launched():
        from smallfry.training.launch import run_in_processes

        return run_in_processes(arguments, processes)
    changes = given_settings(parser, arguments) if parsed[parsed.subcommand].get("resume") else {}
    with second_ends(_speak_for_all), raising():
        return _dispatch(parsed, parser, short, changes)


def _log_to_stderr() -> None:
    ours = logging.getLogger("smallfry")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(CleanFormatter("smallfry: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
    for chatty in (*LIGHTNING, "datasets", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hints of DDP, once for each process
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _complain(error: Exception | str, code: int) -> int:
    who = f"smallfry (process {rank()})" if rank() else "smallfry"
    say(shortened(printable(f"{who}: {error}")), sys.stderr)
    return code


def _speak_for_all(message: str) -> None:
    if rank() == 0:
        _complain(message, 0)


def _show_warning(message: Warning | str, *_: Any) -> None:
    if rank() == 0:
        say(f"smallfry: warning: {message}", sys.stderr)


def _print_summary(summary: dict[str, Any]) -> None:
    """The result of a run, with its reference points."""
    measured, console = summary["measured"], CleanConsole(highlight=False)
    table = Table("", "test accuracy", "macro F1", "parameters", "MMAC", box=None)
    table.add_row(
        escape(printable(summary["model"]["name"])),
        f"{measured['test']['accuracy']:.2%}",
        f"{measured['test']['macro_f1']:.2%}",
        f"{measured['parameters']:,}",
        f"{measured['macs'] / 1e6:,.1f}",
    )
    for reference in measured["references"]:
        table.add_row(
            escape(printable(reference["name"])), f"{reference['test_accuracy']:.2%}", "", "", ""
        )
    console.print(table)
    split = escape(printable(measured["select_on"]))
    data, run = summary["data"], escape(printable(summary["run"]))
    console.print(
        f"best epoch {measured['best_epoch']} of {measured['epochs']}, selected on {split}; "
        f"{data['train']:,} images to train, {data['test']:,} to test; "
        f"{measured['training_seconds']:.0f} s of training",
        soft_wrap=True,
    )
    console.print(f"pictures: {run}/pictures", soft_wrap=True)
    use = escape(command("smallfry", "predict", summary["run"]))
    console.print(f"use it:   {use} IMAGE…", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
