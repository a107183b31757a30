"""Find, train and export the most accurate model under a budget."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from smallfry.cli._fields import option, settings_of
from smallfry.cli._shared import AsJson, json_line
from smallfry.errors import UsageError
from smallfry.fitting.config import FitConfig
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import command, printable, say

if TYPE_CHECKING:
    from smallfry.fitting.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Options(AsJson):
    """Find the most accurate model under a budget; run the same command again to continue.

    Args:
        to: Folder of the fit: plan, runs, exports and the page.
        dry_run: Only print the candidates, with costs and epochs.
        settings: Data, budget and time.
    """

    to: Path | None = option(metavar="DIR")
    dry_run: bool = False
    settings: FitConfig = settings_of(FitConfig)


def run(options: Options) -> int:
    """Fit, and print the chosen export; 1 if the budget is not met."""
    from smallfry.fitting.run import fit

    config = options.settings
    config.require_budget()
    if options.dry_run:
        return _dry_run(options)
    if options.to is None:
        raise UsageError("a fit needs a folder: --to DIR")
    found = fit(config, options.to, _quiet if options.json else say, options.json)
    if options.json:
        say(json_line({"page": str(found.page), **found.summary}))
        return 0 if found.met else 1
    chosen, test = found.summary["chosen"], found.summary["test"]
    if chosen is not None:
        table = Table("", "kB", "ms", "validation", "test", box=None)
        table.add_row(
            escape(printable(chosen["name"])),
            f"{chosen['kb']:.4g}",
            f"{chosen['ms']:.3g}",
            f"{chosen['accuracy']:.2%}",
            f"{test['accuracy']:.2%}",
        )
        CleanConsole(highlight=False).print(table)
    if found.summary["lacks"] is not None:
        say(f"not met: {found.summary['lacks']}")
    say(f"page:   {found.page}")
    if chosen is not None:
        say(f"use it: {command('smallfry', 'predict', options.to / chosen['export'])} IMAGE…")
    return 0 if found.met else 1


def _quiet(text: str) -> None:
    """Print nothing."""


def _dry_run(options: Options) -> int:
    """Print the plan without training or writing a folder."""
    from dataclasses import asdict

    from smallfry.deploy.targets import find_target
    from smallfry.fitting.folder import PLAN, read_result
    from smallfry.fitting.plan import read_plan
    from smallfry.fitting.planning import make_plan
    from smallfry.fitting.run import load_images

    config, plan = options.settings, None
    find_target(config.target)
    if options.to is not None:
        read_result(config, options.to)
        plan = read_plan(options.to / PLAN)
    plan = plan or make_plan(config, load_images(config), _quiet if options.json else say)
    if options.json:
        say(json.dumps(asdict(plan)))
        return 0
    _print_plan(plan, config)
    return 0


def _print_plan(plan: "Plan", config: FitConfig) -> None:
    rungs = range(len(plan.counts))
    table = Table("", "MMAC", "kB", "ms", "epochs by rung", box=None)
    for each in plan.candidates:
        table.add_row(
            escape(printable(each.name)),
            f"{each.costs.macs / 1e6:,.3g}",
            f"{each.costs.kb['int8']:,.4g}",
            f"{each.costs.ms['int8']:.3g}",
            ", ".join(str(plan.epochs(each.name, rung)) for rung in rungs),
        )
    CleanConsole(highlight=False).print(table)
    minutes = (plan.seconds + plan.tuning_seconds) / plan.threads / 60
    counts = ", then ".join(map(str, plan.counts))
    say(
        f"{counts} of these candidates would be trained, about {minutes:.3g} of {config.minutes:g} "
        f"minutes on {plan.threads} idle core{'s' if plan.threads > 1 else ''}; "
        f"{len(plan.left_out)} others are left out"
    )
