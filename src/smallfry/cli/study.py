"""Compare optimizers or models as in the papers."""

from dataclasses import dataclass
from pathlib import Path

from smallfry.cli._fields import Choice, choice_of, settings_of
from smallfry.io.terminal import say
from smallfry.studies.config import STUDIES, RaceConfig, RunsConfig

CHOICES = {
    name: Choice(kind.purpose, kind.config, kind.defaults, {"short": kind.short})
    for name, kind in STUDIES.items()
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Reproduce one of the papers' comparisons; run the same command again to resume.

    Args:
        study: Study to run.
        folder: Folder of the runs and the report; default studies/STUDY-…
        short: Run a short form, in minutes instead of hours.
        settings: Settings of the study.
    """

    study: str = choice_of(CHOICES)
    folder: Path | None = None
    short: bool = False
    settings: RaceConfig | RunsConfig = settings_of(RunsConfig)


def run(options: Options) -> int:
    """Run the missing parts of a study, and write its report."""
    name, config = options.study, options.settings
    if isinstance(config, RaceConfig):
        from smallfry.studies.race import run_race

        folder = options.folder or Path("studies") / f"{name}-{config.problem}"
        report = run_race(name, config, folder)
    else:
        from smallfry.studies.study import run_study

        folder = options.folder or Path("studies") / f"{name}-{Path(config.data.name).name}"
        report = run_study(name, config, folder)
    say(f"report: {report}")
    return 0
