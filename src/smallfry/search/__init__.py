"""Search for architectures under a budget."""

from smallfry.search.scaling_rule import Sample, ScalingRule, fit_scaling_rule, giant_rule

__all__ = ["Sample", "ScalingRule", "fit_scaling_rule", "giant_rule"]
