"""Search for architectures and recipes: spaces, strategies that are asked and told, and rules."""

from smallfry.search.evolution import Evolution
from smallfry.search.halving import Halving
from smallfry.search.ledger import Ledger, replay, run
from smallfry.search.listed import Listed
from smallfry.search.nars import NARS
from smallfry.search.random_search import RandomSearch
from smallfry.search.scaling_rule import Sample, ScalingRule, fit_scaling_rule, giant_rule
from smallfry.search.space import RUNG, Candidate, Choice, Search, Space, Trial, encode
from smallfry.search.tpe import TPE

__all__ = [
    "NARS",
    "RUNG",
    "TPE",
    "Candidate",
    "Choice",
    "Evolution",
    "Halving",
    "Ledger",
    "Listed",
    "RandomSearch",
    "Sample",
    "ScalingRule",
    "Search",
    "Space",
    "Trial",
    "encode",
    "fit_scaling_rule",
    "giant_rule",
    "replay",
    "run",
]
