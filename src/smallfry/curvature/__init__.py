"""Curvature of the loss: taps, likelihoods, the exact Fisher, Kronecker algebra.

Independent of this package's models, data and training.
"""

from smallfry.curvature.composite_likelihoods import FromDistribution, Joint, as_likelihood
from smallfry.curvature.coverage import Block, Coverage, cover
from smallfry.curvature.fisher_layers import (
    FisherLayer,
    Metric,
    insert_fisher_layers,
    remove_fisher_layers,
)
from smallfry.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from smallfry.curvature.rows import Rows
from smallfry.curvature.taps import Observation, Taps

__all__ = [
    "Bernoulli",
    "Block",
    "Categorical",
    "Coverage",
    "FisherLayer",
    "FromDistribution",
    "Gaussian",
    "Joint",
    "Likelihood",
    "Metric",
    "Observation",
    "Rows",
    "Taps",
    "as_likelihood",
    "cover",
    "insert_fisher_layers",
    "remove_fisher_layers",
]
