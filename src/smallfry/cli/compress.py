"""Compress a trained model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from smallfry.cli._fields import option, settings_of
from smallfry.cli._shared import AsJson, OneRun, OtherData
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import command, say


@dataclass(frozen=True)
class CompressConfig:
    """Settings of a compression.

    Args:
        methods: Methods in the order of their stages, as NAME or NAME: {SETTING: VALUE}, such as
            [{magnitude: {sparsity: 0.5}}, {round_weights: {bits: 8}}].
        seed: Random seed.
    """

    methods: list[Any]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("methods is empty; give at least one, such as [round_weights]")


@dataclass(frozen=True, kw_only=True)
class Options(AsJson, OneRun):
    """Compress a trained model, such as --methods '[{round_weights: {bits: 8}}]'.

    Args:
        to: New run folder; default RUN-small.
        data: Data to calibrate and compare on, instead of the run's own.
        settings: The methods.
    """

    to: Path | None = option(metavar="DIR")
    data: OtherData = OtherData()
    settings: CompressConfig = settings_of(CompressConfig)


def run(options: Options) -> int:
    """Write the run folder of the compressed model, and print the comparison."""
    from smallfry.compress.pipeline import apply
    from smallfry.compress.report import compare, rows, to_dict
    from smallfry.deploy.pretrained import load_trained
    from smallfry.training.checkpoint import write_file
    from smallfry.training.evaluation_data import load_like
    from smallfry.training.method import from_dict

    methods = [from_dict(each) for each in options.settings.methods]
    trained = load_trained(options.run, options.checkpoint)
    place = options.to or Path(f"{str(options.run).rstrip('/')}-small")
    trained.require_savable(place)
    data, *_ = load_like(trained, options.run, options.data.name, options.data.root, "train")
    reports: list[dict[str, Any]] = []
    small = apply(trained, methods, data, options.settings.seed, reports)
    is_classifier = trained.manifest.get("task", "classification") == "classification"
    found = compare(trained, small, data.validation if is_classifier else None)
    folder = small.save(place)
    summary = to_dict(found, small.manifest["methods"]) | {"reports": reports}
    for mixed in (each["mixed"] for each in reports if each.get("mixed")):
        from smallfry.report.bits import draw_trade_off  # matplotlib takes a second

        (folder / "pictures").mkdir(exist_ok=True)
        draw_trade_off(mixed, folder / "pictures" / "bits.png")
    write_file(folder / "compression.json", json.dumps(summary, indent=2) + "\n")
    if options.json:
        say(json.dumps({"run": str(folder), **summary}))
        return 0
    table = Table("", "before", "after", "", box=None)
    for row in rows(found):
        table.add_row(*row)
    CleanConsole(highlight=False).print(table)
    say(f"run:    {folder}\nuse it: {command('smallfry', 'evaluate', folder)}")
    return 0
