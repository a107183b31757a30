"""Compare deployed models side by side."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from smallfry.cli._fields import group_of
from smallfry.cli._shared import AsJson, OtherData
from smallfry.deploy.benchmark_config import BenchmarkConfig
from smallfry.io.terminal import say


@dataclass(frozen=True, kw_only=True)
class Options(AsJson):
    """Compare latency, throughput, memory, size and accuracy of runs and exports.

    Args:
        models: Runs, shared folders, or exports.
        folder: Folder of the report; default exports/benchmark-NAME.
        settings: Settings of the measurement.
        data: Data to use instead of the runs' own.
    """

    models: tuple[str, ...]
    folder: Path | None = None
    settings: BenchmarkConfig = group_of(BenchmarkConfig)
    data: OtherData = field(default_factory=OtherData)


def run(options: Options) -> int:
    """Run the benchmark, write its report, and print its tables."""
    from smallfry.deploy import benchmark_page
    from smallfry.deploy.benchmark import measure
    from smallfry.io.json import strict

    models, data = options.models, options.data
    folder = options.folder or Path("exports") / f"benchmark-{Path(models[0]).resolve().name}"
    with benchmark_page.new_report(folder) as new:
        result = measure(models, options.settings, data.name, data.root)
        benchmark_page.write_report(result, new)
    if options.json:
        say(json.dumps(strict(benchmark_page.summary_of(result))))
        return 0
    benchmark_page.print_tables(result)
    say(f"report: {folder / benchmark_page.PAGE}")
    return 0
