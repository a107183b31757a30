"""Search for an architecture and its recipe."""

from dataclasses import dataclass
from pathlib import Path

from smallfry.cli._fields import option, settings_of
from smallfry.cli._shared import AsJson, json_line
from smallfry.errors import UsageError
from smallfry.io.terminal import command, say
from smallfry.studies.search.config import SearchConfig


@dataclass(frozen=True, kw_only=True)
class Options(AsJson):
    """Search for an architecture and its recipe; run the same command again to continue.

    Args:
        to: Folder of the search: ledger, runs, page and the best configuration.
        settings: Space, data, strategy and budget.
    """

    to: Path | None = option(metavar="DIR")
    settings: SearchConfig = settings_of(SearchConfig)


def run(options: Options) -> int:
    """Search, and print the best candidate; 1 if all trainings failed."""
    from smallfry.studies.search.page import BEST
    from smallfry.studies.search.session import search

    if options.to is None:
        raise UsageError("a search needs a folder: --to DIR")
    found = search(options.settings, options.to, quiet=options.json)
    if options.json:
        best = None if found.best is None else found.best.to_dict()
        confirmed = [each._asdict() for each in found.confirmed]
        say(json_line({"page": str(found.page), "best": best, "confirmed": confirmed}))
        return 0 if found.best is not None else 1
    if found.best is None:
        say(f"all trainings failed: {found.page}")
        return 1
    settings = ", ".join(f"{name} {value}" for name, value in found.best.candidate.items())
    say(f"best: {found.measure} {found.best.value:.2f} %: {settings}")
    for each in found.confirmed[:1]:
        say(f"with further seeds: {each.mean:.2f} % (mean of {len(each.values)})")
    say(f"page: {found.page}")
    if not options.settings.is_table:
        say(f"train it: {command('smallfry', 'train', '--config', options.to / BEST)}")
    return 0
