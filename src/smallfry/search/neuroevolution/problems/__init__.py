"""Problems of neuroevolution, by name."""

from collections.abc import Callable

from smallfry.errors import UsageError, nearest
from smallfry.search.neuroevolution.deep_ga import Problem
from smallfry.search.neuroevolution.problems.digits import Digits
from smallfry.search.neuroevolution.problems.gym import PREFIX, Gym, find_environment
from smallfry.search.neuroevolution.problems.maze import LAYOUTS, Maze

__all__ = ["PROBLEMS", "find_problem"]

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "digits": Digits,
    **{name: (lambda name=name: Maze(name)) for name in LAYOUTS},  # type: ignore[misc]
    "cartpole": lambda: Gym("CartPole-v1", (4, 16, 2), solved=475.0),
    "acrobot": lambda: Gym("Acrobot-v1", (6, 16, 3), solved=-100.0),
}


def find_problem(name: str) -> Problem:
    """Find a problem by its name, or an environment of Gymnasium by ``gym:`` and its own.

    Raises:
        UsageError: There is none of this name, or it can't be made.

    Example:
        >>> find_problem("maze").sizes
        (11, 16, 2)
    """
    if name.startswith(PREFIX):
        return find_environment(name.removeprefix(PREFIX))
    if name not in PROBLEMS:
        raise UsageError(
            f"there is no problem '{name}'{nearest(name, PROBLEMS)} "
            "(gym:NAME is an environment of Gymnasium)"
        )
    return PROBLEMS[name]()
