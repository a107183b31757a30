"""Genetic algorithm over the weights of networks (Deep GA; Such et al. 2017, arXiv 1712.06567).

    generation 0   random networks
    parents        the best ``parents`` of a generation, and the elite
    elite          the best of the earlier elite and the next candidates, by more episodes where
                   they vary
    generation g   a random parent's weights plus a normal mutation, for each individual

Selection is by fitness, or by novelty of behaviour, which ignores fitness (GA-NS). Individuals are
chains of seeds; a generation follows from the seed and the line on the one before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.search.neuroevolution.network import Array
from smallfry.search.neuroevolution.novelty import novelties
from smallfry.search.neuroevolution.seed_chain import SeedChain

__all__ = ["DeepGA", "Evaluated", "Generation", "Problem", "Select"]

Select = Literal["fitness", "novelty", "random"]
ARCHIVED = 0.01  # probability that an individual enters the archive
REMEMBERED = 2**62
CANDIDATES = 10  # of the elite


class Evaluated(NamedTuple):
    """Evaluation of networks."""

    fitness: NDArray[np.float64]  # (networks,), the greater the better
    behaviours: NDArray[np.float64]  # (networks, numbers)


class Problem(Protocol):
    """Problem for evolved networks.

    Attributes:
        sizes: Widths of the networks, from inputs to outputs.
        power: Size of mutations.
        solved: Fitness from which the problem is solved; None where there is none.
        episodes: Episodes by which the elite is chosen; 1 where they are all alike.
    """

    sizes: tuple[int, ...]
    power: float
    solved: float | None
    episodes: int

    def __call__(self, weights: Array, seed: int, episodes: int = 1) -> Evaluated:
        """Evaluate networks.

        Args:
            weights: (networks, parameters).
            seed: Of the episodes.
            episodes: Whose mean is the fitness.
        """


@dataclass(frozen=True)
class Generation:
    """Result of a generation, from which the next one follows.

    Args:
        number: From 0.
        best: Greatest fitness of the generation.
        mean: Mean fitness.
        elite: Best individual so far.
        elite_fitness: Its fitness.
        parents: Chains of the next generation's parents.
        archived: Behaviours that entered the archive.
        evaluations: Of all generations so far, without those of elites.
    """

    number: int
    best: float
    mean: float
    elite: list[Any]
    elite_fitness: float
    parents: list[list[Any]]
    archived: list[list[float]] = field(default_factory=list)
    evaluations: int = 0


class DeepGA:
    """Evolution of the weights of a network.

    Args:
        problem: Gives fitness and behaviour.
        population: Individuals of a generation.
        parents: Of the next one.
        select: What parents are chosen by; random draws new networks instead, for comparison.
        nearest: Neighbours whose mean distance is the novelty.
        seed: Random seed.

    Raises:
        UsageError: More parents than individuals, or none.

    Example:
        >>> from smallfry.search.neuroevolution.problems.digits import Digits
        >>> ga = DeepGA(Digits(), population=8, parents=2)
        >>> [generation.number for generation in ga.run(2)]
        [0, 1]
    """

    def __init__(
        self,
        problem: Problem,
        population: int = 200,
        parents: int = 20,
        select: Select = "fitness",
        nearest: int = 25,
        seed: int = 0,
    ) -> None:
        if not 1 <= parents <= population:
            raise UsageError(f"parents are 1 to {population} of the population, not {parents}")
        self.problem, self.population, self.count = problem, population, parents
        self.select, self.nearest, self.seed = select, nearest, seed
        self._weights: dict[SeedChain, Array] = {}  # of parents

    def run(self, generations: int, done: Sequence[Generation] = ()) -> Iterator[Generation]:
        """Yield generations, until the problem is solved or there are as many as wanted.

        Args:
            generations: In all.
            done: Those of an earlier process.
        """
        history = list(done)
        while len(history) < generations and not self.is_solved(history):
            history.append(self._next(history))
            yield history[-1]

    def is_solved(self, history: Sequence[Generation]) -> bool:
        """Return whether a generation has solved the problem."""
        solved = self.problem.solved
        return solved is not None and any(each.best >= solved for each in history)

    def chain(self, content: Sequence[Any]) -> SeedChain:
        """Return the chain of an individual in a generation."""
        return SeedChain.from_list(self.problem.sizes, content)

    def _next(self, history: Sequence[Generation]) -> Generation:
        number = len(history)
        generator = np.random.default_rng([self.seed, number])
        last = history[-1] if history and self.select != "random" else None
        chains = self._born(last, generator)
        weights = np.stack([self._weights_of(each) for each in chains])
        found = self.problem(weights, int(generator.integers(REMEMBERED)))
        archive = [row for each in history for row in each.archived]
        scores = found.fitness
        if self.select == "novelty":
            behaviours = np.array(archive, np.float64).reshape(-1, found.behaviours.shape[1])
            scores = novelties(found.behaviours, behaviours, self.nearest)
        order = np.argsort(-scores, kind="stable")
        fittest = np.argsort(-found.fitness, kind="stable")[:CANDIDATES]
        candidates = [chains[row] for row in fittest]
        elite, value = self._elite(history, candidates, found.fitness[fittest[0]], generator)
        parents = [chains[row] for row in order[: self.count]]
        if self.select == "fitness" and elite not in parents:
            parents = [elite, *parents[:-1]]
        entering = generator.random(self.population) < ARCHIVED
        self._weights = {each: self._weights_of(each) for each in parents}
        return Generation(
            number,
            float(found.fitness.max()),
            float(found.fitness.mean()),
            elite.to_list(),
            value,
            [each.to_list() for each in parents],
            found.behaviours[entering].tolist() if self.select == "novelty" else [],
            (number + 1) * self.population,
        )

    def _born(self, last: Generation | None, generator: np.random.Generator) -> list[SeedChain]:
        seeds = generator.integers(REMEMBERED, size=self.population).tolist()
        if last is None:
            return [SeedChain(self.problem.sizes, seed) for seed in seeds]
        parents = [self.chain(each) for each in last.parents]
        chosen = generator.integers(len(parents), size=self.population).tolist()
        power = self.problem.power
        return [parents[row].child(seed, power) for row, seed in zip(chosen, seeds, strict=True)]

    def _weights_of(self, chain: SeedChain) -> Array:
        """Compute weights, with one addition where the parent's are known."""
        if chain in self._weights:
            return self._weights[chain]
        if not chain.steps:
            return chain.weights()
        parent = SeedChain(chain.sizes, chain.seed, chain.steps[:-1])
        if parent not in self._weights:
            self._weights[parent] = parent.weights()
        return chain.weights(self._weights[parent])

    def _elite(
        self,
        history: Sequence[Generation],
        candidates: Sequence[SeedChain],
        best: float,
        generator: np.random.Generator,
    ) -> tuple[SeedChain, float]:
        """Return the best individual so far, and its fitness."""
        before = [self.chain(history[-1].elite)] if history else []
        if self.problem.episodes == 1:
            if history and history[-1].elite_fitness >= best:
                return before[0], history[-1].elite_fitness
            return candidates[0], float(best)
        every = [*before, *candidates[: CANDIDATES - len(before)]]
        weights = np.stack([self._weights_of(each) for each in every])
        seed = int(generator.integers(REMEMBERED))
        values = self.problem(weights, seed, self.problem.episodes).fitness
        row = int(values.argmax())
        return every[row], float(values[row])
