"""Run the campaign, or parts of it; ``python -m campaign --help``.

What is done is kept in a folder, and the same command goes on with it.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that has threads can't be forked safely

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import smallfry  # noqa: F401  registers the models
from campaign import (
    damage,
    fuzz_config,
    fuzz_folders,
    fuzz_images,
    fuzz_shards,
    kills,
    outputs,
    poison,
    readers,
    soak,
)
from campaign.record import Record, tables, write_page, write_results
from campaign.running import campaign
from campaign.trials import Part

PARTS: tuple[Part, ...] = (
    kills.PART,
    outputs.PART,
    readers.PART,
    damage.PART,
    poison.PART,
    fuzz_config.PART,
    fuzz_config.TRAINED,
    fuzz_images.PART,
    fuzz_folders.PART,
    fuzz_shards.PART,
)
ROOT = Path(__file__).parent.parent


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m campaign", description=__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--part", choices=[*names, "soak"], action="append", help="default all")
    parser.add_argument("--count", type=int, help="trials of each part; 0 adds none")
    parser.add_argument("--short", action="store_true", help="about a minute")
    parser.add_argument("--minutes", type=float, default=120.0, help="of the soak")
    parser.add_argument("--folder", type=Path, default=ROOT / ".campaign", help="what is done")
    parser.add_argument("--again", action="store_true", help="forget what was done")
    parser.add_argument("--commit", action="store_true", help="write results/ and docs/")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.folder / "short" if given.short else given.folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["SMALLFRY_CACHE"] = str(folder / "cache")
    if given.part == ["soak"]:
        return soak.main(given.minutes, folder, given.again)
    chosen = [part for part in PARTS if given.part is None or part.name in given.part]
    for part in chosen:
        if given.again:
            (folder / f"{part.name}.json").unlink(missing_ok=True)
        usual = part.short if given.short else part.count
        _show(part, folder, usual if given.count is None else given.count)
    known = {p.name: Record.load(folder / f"{p.name}.json") for p in PARTS}
    records = {name: record for name, record in known.items() if record.done}
    _print(records)
    if given.commit:
        soaked, page = soak.load(folder), ROOT / "docs" / "reliability.md"
        write_results(PARTS, records, soaked, ROOT / "results" / "campaign.json")
        write_page(page, "figures", tables(PARTS, records))
        if soaked:
            write_page(page, "soak", soak.as_markdown(soaked))
    return 1 if any(known[part.name].failed for part in chosen) else 0


def _show(part: Part, folder: Path, count: int) -> None:
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn())
    left = (TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    shown = 0
    with Progress(*columns, *left, console=Console(stderr=True)) as bar:
        task = bar.add_task(part.name, total=count, failed=0)
        for record in campaign(part, folder, count):
            bar.update(task, completed=record.done, failed=record.failed)
            for failure in record.failures[shown:]:
                bar.console.print(f"{part.name} {failure}", markup=False)
            shown = len(record.failures)


def _print(records: dict[str, Record]) -> None:
    table = Table("part", "fault", "outcome", "trials", "failed", box=None)
    for name, record in records.items():
        for (kind, said), count in sorted(record.counts.items()):
            table.add_row(name, kind, said, f"{count:,}", "")
        table.add_row(name, "", "", f"{record.done:,}", f"{record.failed}", style="bold")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
