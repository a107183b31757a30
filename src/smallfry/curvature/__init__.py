"""What is known of the loss surface: taps, likelihoods, the exact Fisher, Kronecker algebra.

Usable alone: it knows nothing of this package's models, data or training.
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
