"""Control problems of Gymnasium, which need ``pip install 'smallfry[evolve]'``."""

from typing import Any

import numpy as np

from smallfry.search.neuroevolution.deep_ga import Evaluated
from smallfry.search.neuroevolution.network import Array, forward

__all__ = ["Gym"]


class Gym:
    """Control problem with a few actions; the behaviour is the mean of the last observation.

    Args:
        name: Of the environment.
        sizes: Widths of the networks.
        solved: Return from which it is solved.
    """

    power = 0.05
    episodes = 30

    def __init__(self, name: str, sizes: tuple[int, ...], solved: float) -> None:
        import gymnasium

        self.name, self.sizes = name, sizes
        self.solved: float | None = solved
        self._environment: Any = gymnasium.make(name)

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
        total, ended = 0.0, False
        while not ended:
            inputs = np.asarray(observation, np.float32)[None, None]
            action = int(forward(self.sizes, weights[None], inputs)[0, 0].argmax())
            observation, reward, terminated, truncated, _ = self._environment.step(action)
            total += float(reward)
            ended = terminated or truncated
        return total, observation
