"""Control problems of Gymnasium, of the extra ``smallfry[evolve]``."""

from functools import cache
from importlib.metadata import entry_points
from math import prod
from typing import Any

import numpy as np

from smallfry.errors import UsageError
from smallfry.search.neuroevolution.deep_ga import Evaluated
from smallfry.search.neuroevolution.network import Array, forward

__all__ = ["PREFIX", "Gym", "find_environment"]

PREFIX = "gym:"  # before an environment's own name, such as gym:MinAtar/Breakout-v1
LONGEST = 10_000  # steps of an episode
NARROW, WIDE, MANY = 16, 32, 32  # hidden units, up to so many inputs and beyond


class Gym:
    """Control problem; the behaviour is the mean of the last observation.

    Args:
        name: Of the environment.
        sizes: Widths of the networks; default by its observations and actions.
        solved: Return from which it is solved; None if there is no such return.

    Raises:
        UsageError: Observations or actions that a network has no inputs or outputs for.
    """

    power = 0.05
    episodes = 30

    def __init__(
        self, name: str, sizes: tuple[int, ...] | None = None, solved: float | None = None
    ) -> None:
        import gymnasium

        self.name, self.solved = name, solved
        self._environment: Any = gymnasium.make(name)
        seen, acts = self._environment.observation_space, self._environment.action_space
        spaces = gymnasium.spaces
        self._chooses = isinstance(acts, spaces.Discrete)
        fits = self._chooses or (isinstance(acts, spaces.Box) and bool(acts.is_bounded()))
        if not isinstance(seen, spaces.Box) or not fits:
            raise UsageError(
                f"{name} has observations {seen} and actions {acts}: a network takes arrays, and "
                "answers with one of several actions, or with bounded numbers"
            )
        inputs, outputs = prod(seen.shape), int(acts.n) if self._chooses else prod(acts.shape)
        hidden = NARROW if inputs <= MANY else WIDE
        self.sizes = (inputs, hidden, outputs) if sizes is None else sizes

    def __call__(self, weights: Array, seed: int, episodes: int = 1) -> Evaluated:
        """Evaluate networks, all from the same first states."""
        returns, last = [], []
        for each in weights:
            played = [self._play(each, seed + number) for number in range(episodes)]
            returns.append(float(np.mean([value for value, _ in played])))
            last.append(np.mean([observation for _, observation in played], 0))
        return Evaluated(np.array(returns), np.array(last, np.float64))

    def _play(self, weights: Array, seed: int) -> tuple[float, Any]:
        observation, _ = self._environment.reset(seed=seed % 2**31)
        total = 0.0
        for _ in range(LONGEST):
            inputs = np.asarray(observation, np.float32).reshape(1, 1, -1)
            outputs = forward(self.sizes, weights[None], inputs)[0, 0]
            step = self._environment.step(self._action(outputs))
            observation, reward, terminated, truncated, _ = step
            total += float(reward)
            if terminated or truncated:
                break
        return total, np.asarray(observation, np.float32).ravel()

    def _action(self, outputs: Array) -> Any:
        """Choose the action of the largest output, or scale tanh of them to the bounds."""
        if self._chooses:
            return int(outputs.argmax())
        space = self._environment.action_space
        share = (np.tanh(outputs).reshape(space.shape) + 1) / 2
        return (space.low + share * (space.high - space.low)).astype(space.dtype)


@cache
def _register_installed() -> None:
    """Register the environments of other packages, which Gymnasium 1 leaves to its users."""
    for each in entry_points(group="gymnasium.envs"):
        each.load()()


def find_environment(name: str) -> Gym:
    """Build the problem of a registered environment, of another installed package too.

    Args:
        name: As Gymnasium has it, such as ``MinAtar/Breakout-v1``.

    Raises:
        UsageError: It is not registered, can't be made, or has no fitting observations or actions.
    """
    import gymnasium

    if name not in gymnasium.registry:
        _register_installed()
    try:
        return Gym(name)
    except gymnasium.error.Error as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"gym:{name}: Gymnasium can't make it ({reason}); install its package, or see "
            "gymnasium.registry for the names"
        ) from error
