"""Search for smaller students of a teacher by policy gradient (N2N; Ashok et al., ICLR 2018)."""

from smallfry.search.n2n.layer import Layer
from smallfry.search.n2n.reward import constrained_reward, reward
from smallfry.search.n2n.strategy import N2N

__all__ = ["N2N", "Layer", "constrained_reward", "reward"]
