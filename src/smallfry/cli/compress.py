"""Compress a trained model."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from smallfry.cli._fields import option, settings_of
from smallfry.cli._shared import AsJson, OneRun, OtherData, json_line
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.json import strict
from smallfry.io.terminal import command, say

if TYPE_CHECKING:
    from smallfry.data import ImageData
    from smallfry.training.method import MethodSettings
    from smallfry.training.run import TrainedModel


@dataclass(frozen=True)
class CompressConfig:
    """Settings of a compression.

    Args:
        methods: Methods in the order of their stages, as NAME or NAME: {SETTING: VALUE}, such as
            [{magnitude: {sparsity: 0.5}}, {round_weights: {bits: 8}}].
        epochs: Budget of fine-tuning in epochs, which methods that train need.
        minutes: Budget in minutes instead, met to the nearest epoch by a short measurement.
        distill: Share of the loss that compares with the model before, 0 to 1.
        tuning: Settings of the fine-tuning by dotted name, over those of the model's own training
            with a tenth of its learning rate, such as {optimizer.lr: 0.01, batch_size: 128}.
        seed: Random seed.
    """

    methods: list[Any]
    epochs: int | None = None
    minutes: float | None = None
    distill: float = 0.0
    tuning: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("methods is empty; give at least one, such as [round_weights]")
        if self.epochs is not None and self.minutes is not None:
            raise UsageError("epochs excludes minutes; give one budget")
        if self.epochs is not None and self.epochs < 1:
            raise UsageError(f"epochs must be at least 1, got {self.epochs}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"minutes must be a finite number above 0, got {self.minutes}")
        if not 0 <= self.distill <= 1:
            raise UsageError(f"distill is 0 to 1, not {self.distill}")
        if not self.tunes and (self.distill or self.tuning):
            raise UsageError("distill and tuning need a budget: --epochs N or --minutes M")

    @property
    def tunes(self) -> bool:
        """True if there is a budget of fine-tuning."""
        return self.epochs is not None or self.minutes is not None


@dataclass(frozen=True, kw_only=True)
class Options(AsJson, OneRun):
    """Compress a trained model, such as --methods '[{round_weights: {bits: 8}}]'.

    Args:
        to: New folder, a run's, or a shared one where RUN is; default RUN-small.
        data: Data to calibrate and compare on, instead of the run's own.
        settings: The methods.
    """

    to: Path | None = option(metavar="DIR")
    data: OtherData = OtherData()
    settings: CompressConfig = settings_of(CompressConfig)


def run(options: Options) -> int:
    """Write the folder of the compressed model, and print the comparison."""
    import torch

    from smallfry.compress.layer_sizes import layer_sizes, written_bytes
    from smallfry.compress.report import compare, rows, to_dict
    from smallfry.compress.sparse.report import zero_sums
    from smallfry.deploy.pretrained import load_trained
    from smallfry.training.checkpoint import write_file
    from smallfry.training.evaluation_data import load_like
    from smallfry.training.method import from_dict
    from smallfry.training.run import RunFolder, require_classes

    methods = [from_dict(each) for each in options.settings.methods]
    training = [method.name for method in methods if method.trains]
    if training and not options.settings.tunes:
        raise UsageError(
            f"'{training[0]}' acts during training: give a budget, --epochs N or --minutes M"
        )
    trained = load_trained(options.run, options.checkpoint)
    place = options.to or _beside(options.run)
    if not options.settings.tunes:
        RunFolder(place.expanduser()).require_free()
    data, *_ = load_like(trained, options.run, options.data.name, options.data.root, "train")
    require_classes(trained, data.classes, data.origin)
    reports: list[dict[str, Any]] = []
    small, folder = _compressed(options, trained, methods, data, place, reports)
    found = compare(trained, small, data.validation)
    sample = torch.zeros(1, *small.input_shape)
    zeros = zero_sums(small.model, sample)
    sizes = layer_sizes(trained.model, small.model, sample, written_bytes(reports))
    layers = [each.to_dict() for each in sizes]
    figures = to_dict(found, small.manifest["methods"])
    summary = strict({**figures, "zeros": zeros, "layers": layers, "reports": reports})
    write_file(folder / "compression.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    lines = rows(found)
    if zeros is not None:
        share = zeros["zeros"] / zeros["weights"]
        lines.append(("zeros stored in dense layers", "", f"{share:.2%}", ""))
    page = _write_page(folder, lines, summary, options.run)
    if options.json:
        say(json_line({"run": str(folder), **summary}))
        return 0
    table = Table("", "before", "after", "", box=None)
    for line in lines:
        table.add_row(*line)
    CleanConsole(highlight=False).print(table)
    closer = command("smallfry", "analyze", options.run, "geometry", "--against", folder)
    say(f"run:     {folder}\npage:    {page}\nuse it:  {command('smallfry', 'evaluate', folder)}")
    say(f"compare: {closer}")
    return 0


def _beside(run: str) -> Path:
    """Name the folder of a compressed model beside its parent, also of ``.`` and ``..``."""
    place = Path(run)
    if place.name in ("", ".."):
        place = place.resolve()
    return place.with_name(f"{place.name}-small")


def _write_page(
    folder: Path, lines: Sequence[Sequence[str]], summary: dict[str, Any], parent: str
) -> Path:
    """Write the page of the new folder and its pictures, and return the page."""
    import torch

    from smallfry.report.compression_page import write_compression  # matplotlib takes a second
    from smallfry.training.provenance import provenance
    from smallfry_runtime.names import text_of

    facts = {"parent": text_of(Path(parent).name), **provenance(torch.device("cpu"))}
    title = f"Compressed: {text_of(folder.resolve().name)}"
    return write_compression(folder, title, lines, summary, facts)


def _compressed(
    options: Options,
    trained: "TrainedModel",
    methods: "Sequence[MethodSettings]",
    data: "ImageData",
    place: Path,
    reports: list[dict[str, Any]],
) -> "tuple[TrainedModel, Path]":
    """Write the folder of the compressed model, and return both; add the methods' reports."""
    from smallfry.compress.pipeline import apply
    from smallfry.deploy.pretrained import save_pretrained
    from smallfry.training.config import DataConfig
    from smallfry.training.method import packing_of
    from smallfry.training.run import load_run

    settings = options.settings
    if not settings.tunes:
        small = apply(trained, methods, data, settings.seed, reports)
        return small, small.save(place) if trained.has_run else save_pretrained(small, place)
    from smallfry.cli._tuning import fine_tune, tuning_config

    other = None
    if options.data.name is not None:
        other = DataConfig(options.data.name, options.data.root)
    config = tuning_config(
        *(trained, options.run, place, other, settings.epochs or 1, settings.seed),
        *(settings.distill, settings.tuning),
    )
    if other is None and options.data.root is not None:
        config = replace(config, data=replace(config.data, root=options.data.root))
    if options.json:
        config = replace(config, progress="quiet")
    fine_tune(trained, options.run, methods, config, data, settings.minutes, reports)
    return load_run(place)._replace(packing=packing_of(methods)), place
