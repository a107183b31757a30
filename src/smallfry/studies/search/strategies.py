"""Strategies of a search by name."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from smallfry.errors import RunError, UsageError
from smallfry.search import NARS, TPE, Candidate, Evolution, RandomSearch, Search
from smallfry.search.n2n import N2N
from smallfry.search.n2n.strategy import load_policies
from smallfry.search.sampling import Allowed, sample
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.problem import HasTeacher, Problem

__all__ = ["STRATEGIES", "build_strategy", "limits", "why_none"]

Build = Callable[[Problem, int, int, Allowed], Search]  # of a count, a seed, and a limit


def _nars(problem: Problem, count: int, seed: int, allowed: Allowed) -> Search:
    def costs(architecture: Candidate) -> list[float]:
        return list(problem.costs(architecture).values())

    return NARS(problem.architecture, problem.recipe, count, costs, seed, allowed)


def _n2n(problem: Problem, config: SearchConfig) -> Search:
    if not isinstance(problem, HasTeacher):
        raise UsageError(
            "strategy n2n compresses a teacher: give the folder of its run as space, or "
            f"micro_n2n, not {config.space}"
        )
    free = replace(config, max_mmac=None, max_parameters=None)
    policies = None if config.policies is None else load_policies(config.policies)
    return N2N(
        problem.layers,
        config.budget,
        problem.reward,
        config.seed,
        allowed=limits(problem, free),
        within=limits(problem, config),
        policies=policies,
    )


STRATEGIES: dict[str, Build] = {
    "nars": _nars,
    "tpe": lambda problem, count, seed, allowed: TPE(
        problem.architecture + problem.recipe, count, seed, allowed=allowed
    ),
    "evolution": lambda problem, count, seed, allowed: Evolution(
        problem.architecture + problem.recipe, count, seed, allowed, population=max(5, count // 5)
    ),
    "random": lambda problem, count, seed, allowed: RandomSearch(
        problem.architecture + problem.recipe, count, seed, allowed
    ),
}


def build_strategy(name: str, problem: Problem, config: SearchConfig) -> Search:
    """Build a strategy for a problem, within the limits of the costs.

    Raises:
        UsageError: The strategy n2n without a teacher.
        RunError: Policies that can't be read.
    """
    if config.strategy == name == "n2n":
        return _n2n(problem, config)
    return STRATEGIES[name](problem, config.budget, config.seed, limits(problem, config))


def limits(problem: Problem, config: SearchConfig) -> Allowed:
    """Return the test of a candidate: that its model can be built, and is within the limits."""
    most = {
        "macs": None if config.max_mmac is None else 1e6 * config.max_mmac,
        "parameters": config.max_parameters,
    }

    def allowed(candidate: Candidate) -> bool:
        try:
            costs = problem.costs(candidate)
        except (UsageError, RunError):
            return False
        return all(limit is None or costs[name] <= limit for name, limit in most.items())

    return allowed


def why_none(problem: Problem, config: SearchConfig) -> str:
    """Return the reason for which a search had no candidate: that of one, or the limits."""
    choices = (*problem.architecture, *problem.recipe)
    try:
        problem.costs(sample(choices, np.random.default_rng(config.seed)))
    except (UsageError, RunError) as error:
        return f"no model of the space can be built: {error}"
    given = {"--max_mmac": config.max_mmac, "--max_parameters": config.max_parameters}
    beyond = " and ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
    return f"no candidate is within {beyond or 'the space'}"
