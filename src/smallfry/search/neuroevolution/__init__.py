"""Training without gradients: a genetic algorithm of seeds, and search for novelty."""

from smallfry.search.neuroevolution.deep_ga import DeepGA, Generation
from smallfry.search.neuroevolution.seed_chain import SeedChain

__all__ = ["DeepGA", "Generation", "SeedChain"]
