"""Evolve the weights of a small network without gradients."""

from dataclasses import dataclass
from pathlib import Path

from smallfry.cli._fields import option, settings_of
from smallfry.cli._shared import AsJson, json_line
from smallfry.errors import UsageError
from smallfry.io.terminal import say
from smallfry.studies.evolution_config import EvolutionConfig


@dataclass(frozen=True, kw_only=True)
class Options(AsJson):
    """Evolve a network by a genetic algorithm; run the same command again to continue.

    Args:
        to: Folder of the evolution: every generation, and the best network as a chain of seeds.
        settings: Problem, selection and sizes.
    """

    to: Path | None = option(metavar="DIR")
    settings: EvolutionConfig = settings_of(EvolutionConfig)


def run(options: Options) -> int:
    """Evolve, and print the best network's fitness."""
    from smallfry.studies.evolution import evolve

    if options.to is None:
        raise UsageError("an evolution needs a folder: --to DIR")
    found = evolve(options.settings, options.to, quiet=options.json)
    last = found.generations[-1]
    if options.json:
        summary = {
            "generations": len(found.generations),
            "evaluations": last.evaluations,
            "solved": found.solved,
            "fitness": last.elite_fitness,
            "accuracy": found.accuracy,
            "elite": str(found.elite),
        }
        say(json_line(summary))
        return 0
    solved = "solved" if found.solved else "not solved"
    result = solved if found.accuracy is None else f"{found.accuracy:.2%} of validation images"
    say(
        f"{result} after {len(found.generations)} generations, {last.evaluations:,} evaluations; "
        f"best fitness {last.elite_fitness:.4g}"
    )
    say(f"network: {found.elite}")
    return 0
