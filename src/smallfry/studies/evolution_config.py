"""Settings of an evolution, without PyTorch."""

from dataclasses import dataclass
from typing import Literal

from smallfry.errors import UsageError

MOST_SEED = 2**63


@dataclass(frozen=True)
class EvolutionConfig:
    """Settings of an evolution.

    Args:
        problem: maze (deceptive), maze_staggered, digits, cartpole, acrobot, or gym:NAME of an
            environment of Gymnasium, such as gym:MinAtar/Breakout-v1.
        select: Parents are chosen by fitness, or by novelty of behaviour; random draws new networks
            instead.
        generations: Generations at most; it ends earlier if the problem is solved.
        population: Networks of a generation.
        parents: Parents of a generation.
        seed: Random seed.
    """

    problem: str = "maze"
    select: Literal["fitness", "novelty", "random"] = "fitness"
    generations: int = 100
    population: int = 200
    parents: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.generations < 1:
            raise UsageError(f"generations must be at least 1, got {self.generations}")
        if not 1 <= self.parents <= self.population:
            raise UsageError(
                f"parents are 1 to {self.population} of the population, not {self.parents}"
            )
        if not 0 <= self.seed < MOST_SEED:
            raise UsageError(f"seed is 0 to below 2**63, got {self.seed}")
