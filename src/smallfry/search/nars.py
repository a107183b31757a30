"""Joint search for architectures and recipes (NARS; Dai et al., CVPR 2021, arXiv 2006.02049).

1. A predictor learns the costs of architectures, which need no training.
2. In rounds, candidates are measured and the predictor is fitted to all of them: the first ones
   spread over the space, later ones those of the highest prediction, an eighth of them those whose
   prediction is least certain (constrained iterative optimisation).
3. Evolution on the predictions gives the last candidates, architecture and recipe together.

The structure is the paper's, whose search was not published; the constants are our own.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.search.predictor import Prediction, Predictor, features, kendall_tau
from smallfry.search.proposals import Proposals
from smallfry.search.sampling import (
    Allowed,
    all_candidates,
    crossover,
    from_units,
    mutate,
    new_candidate,
)
from smallfry.search.space import Candidate, Choice, Trial, key_of

__all__ = ["NARS", "Costs", "shortest_proxy"]

Costs = Callable[[Candidate], Sequence[float]]  # positive costs of an architecture
ROUNDS, LEAST = 10, 5  # at most, and candidates of one at least
UNCERTAIN = 1 / 8  # of a round
FINALS = 5  # candidates of the evolution, at most a quarter of all
APART = 0.05  # of the range of some choice, between those and all other candidates
POOL = 4096  # candidates that are scored
COSTED = 1000  # architectures whose costs the predictor learns
PARENTS, CHILDREN, GENERATIONS, PATIENCE = 100, 100, 40, 10
LEAST_GAIN, CROSSED = 1e-4, 0.3  # in the best prediction, share of children


class NARS:
    """Search by a predictor of accuracy that learns costs first; no candidate is asked for twice.

    Candidates of a round are asked for when all trials of the one before are told.

    Args:
        architecture: Choices that costs depend on, each after those in its condition.
        recipe: Other choices.
        count: Candidates to ask for.
        costs: Costs of an architecture, such as multiply-accumulates and parameters, which the
            predictor learns first; default none.
        seed: Random seed.
        allowed: Whether a candidate may be proposed; default every one.

    Raises:
        UsageError: No candidates, or no choices.

    Example:
        >>> widths, rates = Choice("width", (4, 8, 16)), Choice("lr", low=0.01, high=1, log=True)
        >>> search = NARS([widths], [rates], 8, lambda a: [a["width"], a["width"] ** 2])
        >>> len(search.ask(8)), search.ask(1)
        (6, [])
    """

    def __init__(
        self,
        architecture: Sequence[Choice],
        recipe: Sequence[Choice],
        count: int,
        costs: Costs | None = None,
        seed: int = 0,
        allowed: Allowed = lambda candidate: True,
    ) -> None:
        self._architecture, self._recipe = tuple(architecture), tuple(recipe)
        self._choices = self._architecture + self._recipe
        self._proposals = Proposals("nars", self._choices, count, seed)
        self._costs, self._allowed = costs, allowed
        self._sizes = round_sizes(count)
        self._planned: list[dict[str, Any]] = []
        self._pool: list[dict[str, Any]] = []
        self._untrained: Predictor | None = None  # but for costs
        self._round = 0
        self.predicted: dict[Any, float] = {}  # values before their measurement, by ``key_of``

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return candidates of this round; of the next one when all of this are told."""
        if not self._planned and not self._proposals.is_waiting and self._proposals.left:
            self._planned = self._plan()
            if not self._planned:
                self._proposals.end()
        return self._proposals.hand_out(self._planned, count)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials, which the predictor learns from in the next round."""
        self._proposals.tell(trials)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the round, the number of proposals, and the trials."""
        return {**self._proposals.state_dict(), "round": self._round}

    def _plan(self) -> list[dict[str, Any]]:
        """Choose the candidates of the next round, best first."""
        if not self._pool:
            found = candidate_pool(self._choices, self._proposals.seed)
            self._pool = [each for each in found if self._allowed(each)]
        size = self._sizes[self._round] if self._round < len(self._sizes) else self._proposals.left
        self._round += 1
        rest = [each for each in self._pool if not self._proposals.is_known(each)]
        if len(self._proposals.valued) < 2:
            return spread_out(rest, features(self._choices, rest), size, self._proposals.seed)
        predict = self._fitted()
        if self._round == len(self._sizes):
            chosen = self._evolved(predict, rest, size)
        else:
            chosen = most_promising(rest, predict(rest), size)
        if chosen:
            means = predict(chosen).mean.tolist()
            self.predicted |= {key_of(e): mean for e, mean in zip(chosen, means, strict=True)}
        return chosen

    def _fitted(self) -> Callable[[Sequence[Candidate]], Prediction]:
        """Fit the predictor that has learned costs to the trials."""
        parts, trials = (self._architecture, self._recipe), self._proposals.valued
        if self._untrained is None:
            costs = costed(self._pool, self._architecture, self._costs)
            self._untrained = new_predictor(parts, costs, self._proposals.seed)
        predictor = deepcopy(self._untrained)
        scores = np.array([trial.value for trial in trials], np.float64)
        candidates = [trial.candidate for trial in trials]
        architectures, recipes = (features(part, candidates) for part in parts)
        predictor.fit_scores(architectures, recipes, scores)
        return lambda each: predictor(*(features(part, each) for part in parts))

    def _evolved(
        self,
        predict: Callable[[Sequence[Candidate]], Prediction],
        rest: Sequence[dict[str, Any]],
        size: int,
    ) -> list[dict[str, Any]]:
        """Evolve predicted candidates, and return the best ones that are new."""
        measured = sorted(self._proposals.valued, key=lambda trial: -(trial.value or 0.0))
        predicted = most_promising(rest, predict(rest), PARENTS, 0.0)
        start = [dict(each.candidate) for each in measured[: PARENTS // 2]]
        start += predicted[: PARENTS // 2]
        generator = self._proposals.generator()
        found = evolve(self._choices, start, predict, self._allowed, generator)
        either = {key_of(each): each for each in found + predicted}.values()
        new = [each for each in either if not self._proposals.is_known(each)]
        points = features(self._choices, [trial.candidate for trial in measured])
        return different(new, features(self._choices, new), points, size)


def round_sizes(count: int) -> list[int]:
    """Divide candidates over the rounds, the last of which is that of the evolution.

    Example:
        >>> round_sizes(32), round_sizes(3)
        ([6, 6, 5, 5, 5, 5], [3])
    """
    finals = min(FINALS, count // 4)
    rounds = min(ROUNDS, max(1, (count - finals) // LEAST))
    parts = np.array_split(np.arange(count - finals), rounds)
    return [size for size in (*map(len, parts), finals) if size]


def candidate_pool(choices: Sequence[Choice], seed: int) -> list[dict[str, Any]]:
    """List the candidates of a small space, or spread some over it by Sobol's points."""
    found = all_candidates(choices, POOL)
    if found is not None:
        return found
    engine = torch.quasirandom.SobolEngine(len(choices), True, seed)  # type: ignore[no-untyped-call]
    units = engine.draw(POOL, dtype=torch.float64).clamp(0, 1 - 1e-12).tolist()
    proposed = [from_units(choices, row) for row in units]
    return list({key_of(each): each for each in proposed}.values())


def spread_out(
    pool: Sequence[dict[str, Any]], points: NDArray[np.float64], size: int, seed: int
) -> list[dict[str, Any]]:
    """Choose the candidates that are nearest to the centres of as many clusters."""
    from sklearn.cluster import KMeans

    if len(pool) <= size:
        return list(pool)
    centres = KMeans(size, n_init=1, random_state=seed % 2**32).fit(points).cluster_centers_
    chosen: list[int] = []
    for centre in centres:
        order = np.argsort(np.square(points - centre).sum(1), kind="stable")
        chosen.append(next(int(row) for row in order if int(row) not in chosen))
    return [pool[row] for row in chosen]


def most_promising(
    pool: Sequence[dict[str, Any]], predicted: Prediction, size: int, uncertain: float = UNCERTAIN
) -> list[dict[str, Any]]:
    """Choose candidates by prediction, best first, and then some by its uncertainty."""
    order = list(map(int, np.argsort(-predicted.mean, kind="stable")))
    kept = size - int(size * uncertain)
    rest = sorted(order[kept:], key=lambda row: -predicted.spread[row])
    return [pool[row] for row in order[:kept] + rest[: size - kept]]


def costed(
    pool: Sequence[Candidate], architecture: Sequence[Choice], costs: Costs | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the encodings and costs of the pool's architectures; None without costs."""
    if costs is None or not architecture:
        return None
    names = [choice.name for choice in architecture]
    parts = [{name: each[name] for name in names if name in each} for each in pool]
    different = list({key_of(each): each for each in parts}.values())[:COSTED]
    values = np.array([list(costs(each)) for each in different], np.float64)
    return features(architecture, different), values


def new_predictor(
    parts: tuple[Sequence[Choice], Sequence[Choice]],
    costs: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    seed: int,
) -> Predictor:
    """Create a predictor that has learned costs, if there are any, and no scores.

    Args:
        parts: Choices of architecture and recipe.
        costs: Encodings and costs of architectures.
        seed: Seed of the weights.
    """
    architecture, recipe = (features(part, [{}]).shape[1] for part in parts)
    if costs is None:
        return Predictor(architecture, recipe, seed=seed)
    predictor = Predictor(architecture, recipe, costs[1].shape[1], seed=seed)
    predictor.fit_costs(*costs)
    return predictor


def evolve(
    choices: Sequence[Choice],
    start: Sequence[dict[str, Any]],
    predict: Callable[[Sequence[Candidate]], Prediction],
    allowed: Allowed,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    """Evolve candidates on their predictions, and return the last parents, best first."""
    parents = list({key_of(each): each for each in start}.values())
    means = predict(parents).mean if parents else np.zeros(0)
    known, best, stalled = {key_of(each) for each in parents}, -np.inf, 0

    def child() -> dict[str, Any]:
        one, other = (parents[int(row)] for row in generator.integers(len(parents), size=2))
        if generator.random() < CROSSED:
            return crossover(choices, one, other, generator)
        return mutate(choices, one, generator, 1 / len(choices))

    for _ in range(GENERATIONS):
        children: list[dict[str, Any]] = []
        while parents and len(children) < CHILDREN:
            new = new_candidate(child, lambda each: key_of(each) in known, allowed)
            if new is None:
                break
            known.add(key_of(new))
            children.append(new)
        if not children:
            break
        every, means = [*parents, *children], np.append(means, predict(children).mean)
        order = np.argsort(-means, kind="stable")[:PARENTS]
        parents, means = [every[int(row)] for row in order], means[order]
        stalled = 0 if means[0] > best + LEAST_GAIN else stalled + 1
        best = max(best, float(means[0]))
        if stalled == PATIENCE:
            break
    order = np.argsort(-means, kind="stable")
    return [parents[int(row)] for row in order]


def different(
    candidates: Sequence[dict[str, Any]],
    points: NDArray[np.float64],
    known: NDArray[np.float64],
    size: int,
) -> list[dict[str, Any]]:
    """Choose the first candidates that differ from known points and each other, then the first.

    Evolution on a range ends with many candidates in one spot, where a single measurement shows
    all there is to learn.

    Args:
        candidates: Candidates, best first.
        points: Their encodings, (candidates, numbers).
        known: Encodings of other candidates, (others, numbers).
        size: Candidates to choose.
    """
    apart: list[int] = []
    for row, point in enumerate(points):
        others = np.concatenate([known, points[apart]])
        if len(apart) < size and (np.abs(others - point).max(1, initial=0) >= APART).all():
            apart.append(row)
    rest = [row for row in range(len(candidates)) if row not in apart]
    return [candidates[row] for row in (apart + rest)[:size]]


def shortest_proxy(curves: Sequence[Sequence[float]], least: float = 0.9) -> int:
    """Choose the earliest moment whose order of candidates agrees with that at the end.

    Args:
        curves: Scores of candidates by moment, (candidates, moments).
        least: Kendall's τ that is agreement.

    Returns:
        The moment's number; the last one agrees with itself.

    Example:
        >>> shortest_proxy([[1, 2, 3], [2, 1, 2], [3, 0, 1]])
        1
    """
    scores = np.asarray(curves, np.float64)
    taus = [kendall_tau(scores[:, moment], scores[:, -1]) for moment in range(scores.shape[1] - 1)]
    return next((moment for moment, tau in enumerate(taus) if tau >= least), len(taus))
