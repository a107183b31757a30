"""Curvature of the loss: taps, likelihoods, the exact Fisher, Kronecker algebra.

Independent of this package's models, data and training.
"""

from smallfry.curvature.composite_likelihoods import FromDistribution, Joint, as_likelihood
from smallfry.curvature.coverage import Block, Coverage, cover
from smallfry.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from smallfry.curvature.rows import Rows
from smallfry.curvature.taps import Observation, Taps

__all__ = [
    "Bernoulli",
    "Block",
    "Categorical",
    "Coverage",
    "FromDistribution",
    "Gaussian",
    "Joint",
    "Likelihood",
    "Observation",
    "Rows",
    "Taps",
    "as_likelihood",
    "cover",
]
