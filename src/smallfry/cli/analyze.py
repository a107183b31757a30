"""Analyze a trained model: initial weights, features, robustness."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.markup import escape

from smallfry.cli._fields import argument, option
from smallfry.cli._shared import AsJson, OneRun, OtherData
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import printable, say


@dataclass(frozen=True, kw_only=True)
class Options(AsJson, OneRun):
    """Analyze a trained model: a page with pictures, and all numbers as JSON.

    Args:
        question: collapse, criticality, geometry, leakage, limits, or all.
        to: Folder of the page; default RUN-analysis.
        against: Further versions of the model, such as pruned or quantized ones, to compare.
        corruptions: Corrupt the test images: six corruptions at three severities, or all of them.
        images: Images of each split at most.
        seed: Random seed.
        data: Data to use instead of the run's own.
    """

    question: str = argument("all")
    to: Path | None = option(metavar="DIR")
    against: tuple[str, ...] = ()
    corruptions: Literal["none", "quick", "full"] = "none"
    images: int = 2000
    seed: int = 0
    data: OtherData = field(default_factory=OtherData)

    def __post_init__(self) -> None:
        if self.images < 2:
            raise UsageError("images is at least 2")


def run(options: Options) -> int:
    """Write the page and the JSON files, and print the findings."""
    from smallfry.analysis.page import ask_all, write_answers
    from smallfry.analysis.question import Answer, find_questions
    from smallfry.analysis.subject import load_subject
    from smallfry.data.corruptions import SETS
    from smallfry.io.json import strict

    find_questions(options.question)  # before the data is read
    begun = time.monotonic()
    subject, facts = load_subject(
        *(options.run, options.against, options.data.name, options.data.root),
        checkpoint=options.checkpoint,
        images=options.images,
        corruptions=SETS[options.corruptions],
        seed=options.seed,
    )
    report = (lambda name: None) if options.json else (lambda name: say(f"{name} ..."))
    answers = ask_all(subject, options.question, report)
    facts["seconds"] = round(time.monotonic() - begun, 1)
    folder = options.to or Path(f"{options.run.rstrip('/')}-analysis")
    page = write_answers(folder.expanduser(), f"Analysis of {subject.name}", answers, facts)
    if options.json:
        found = {
            name: {"findings": list(each.findings), "numbers": dict(each.numbers)}
            if isinstance(each, Answer)
            else {"not_applicable": each}
            for name, each in answers.items()
        }
        say(json.dumps(strict({"page": str(page), "facts": facts, "answers": found})))
        return 0
    console = CleanConsole(highlight=False)
    for name, each in answers.items():
        lines = each.findings if isinstance(each, Answer) else [each]
        console.print(f"[bold]{name}[/bold]")
        for line in lines:
            console.print(f"  {escape(printable(line))}", soft_wrap=True)
    console.print(f"page: {escape(printable(str(page)))}", soft_wrap=True)
    return 0
