"""Evolution of a small network in a folder from which it resumes.

evolution.json      settings
generations.jsonl   every generation, from which the next one follows
elite.json          best network, as a chain of seeds
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from smallfry.errors import RunError, UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.json_lines import JsonLines
from smallfry.io.replace import write_whole
from smallfry.search.neuroevolution import DeepGA, Generation
from smallfry.search.neuroevolution.problems import find_problem
from smallfry.studies.evolution_config import EvolutionConfig
from smallfry.studies.folder import locked, stoppable
from smallfry.studies.progress import Heartbeat, Shown, study_bar
from smallfry.training.progress import clock

__all__ = ["ELITE", "Evolved", "evolve"]

SETTINGS, GENERATIONS, ELITE = "evolution.json", "generations.jsonl", "elite.json"


class Evolved(NamedTuple):
    """Result of an evolution.

    Attributes:
        generations: All generations.
        solved: The problem was solved.
        accuracy: Share of correct validation images, of the problem digits.
        elite: File of the best network.
    """

    generations: Sequence[Generation]
    solved: bool
    accuracy: float | None
    elite: Path


def evolve(config: EvolutionConfig, folder: str | Path, quiet: bool = False) -> Evolved:
    """Evolve a network, or continue the evolution of a folder.

    Args:
        config: Problem and sizes.
        folder: Folder of the evolution.
        quiet: Show no progress.

    Raises:
        UsageError: An unknown problem, or a folder with another evolution.
        RunError: The folder is in use, or damaged.
        Stopped: A signal came; the same call continues.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> config = EvolutionConfig("digits", generations=2, population=10, parents=2)
        >>> with TemporaryDirectory() as folder:
        ...     len(evolve(config, folder, quiet=True).generations)
        2
    """
    folder = Path(folder).expanduser()
    problem = find_problem(config.problem)
    ga = DeepGA(problem, config.population, config.parents, config.select, seed=config.seed)
    note = f"what ended is in {folder}, the same command continues"
    with locked(folder, (SETTINGS,), "evolution", "--to"), stoppable(note):
        _require_same(config, folder)
        lines = JsonLines(folder / GENERATIONS, lambda each: Generation(**each), "a generation")
        done = [Generation(**each) for each in lines.read()]
        if [each.number for each in done] != list(range(len(done))):
            raise RunError(f"{lines.file}: damaged (generations are missing); use another --to")
        with _Progress(config.generations, quiet) as progress:
            for generation in ga.run(config.generations, done):
                lines.append(asdict(generation))
                done.append(generation)
                progress.end(generation)
        chain = ga.chain(done[-1].elite)
        chain.save(folder / ELITE, config.problem)
    accuracy = getattr(problem, "accuracy", None)
    return Evolved(
        done,
        ga.is_solved(done),
        None if accuracy is None else accuracy(chain.weights()),
        folder / ELITE,
    )


def _require_same(config: EvolutionConfig, folder: Path) -> None:
    """Write the settings of a new evolution, or compare those of an earlier one.

    Raises:
        UsageError: They differ.
        RunError: The file is damaged.
    """
    now: dict[str, Any] = {k: v for k, v in asdict(config).items() if k != "generations"}
    file = folder / SETTINGS
    if not file.exists():
        write_whole(file, (json.dumps(now, indent=1) + "\n").encode())
        return
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file}: damaged ({error}); use another --to") from error
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{folder} holds an evolution with {name} {before.get(name)}, not {now.get(name)}: "
                "use the same settings to continue it, or another --to"
            )


class _Progress(Shown):
    """Bar over generations, and a line from time to time outside of a terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.fresh = total, 0
        self.text = "no generation yet"
        console = CleanConsole(highlight=False, quiet=quiet)
        self.bar = study_bar(console, "generations")
        self.heart = Heartbeat(console, lambda: self.text)
        self.began = time.monotonic()

    def __enter__(self) -> "_Progress":
        self.task = self.bar.add_task("evolving", total=self.total, left="?")
        self.bar.start()
        self.heart.start()
        return self

    def end(self, generation: Generation) -> None:
        """Count a generation."""
        self.fresh += 1
        done = generation.number + 1
        seconds = (time.monotonic() - self.began) / self.fresh * (self.total - done)
        self.text = (
            f"generation {done} of {self.total}: best {generation.best:.4g}, elite "
            f"{generation.elite_fitness:.4g}; {clock(seconds)} left"
        )
        self.bar.update(
            self.task, completed=done, left=clock(seconds), description=self.text.split(";")[0]
        )
