"""Fisher vectors: the gradient of a Gaussian mixture's log-likelihood as a code of a set.

With a mixture of weights pi, means mu and diagonal deviations sigma, posteriors q of the
descriptors x_1 … x_N, and u = (x - mu) / sigma,

    mean part      1 / (N sqrt(pi))    sum q u
    variance part  1 / (N sqrt(2 pi))  sum q (u^2 - 1)

which are the gradients by mu and sigma times the inverse square root of their Fisher information,
in its usual diagonal approximation. They are computed from three sums, of q, q x and q x^2, so that
memory is that of the posteriors.

Source: Perronnin, Sánchez, Mensink, "Improving the Fisher Kernel for Large-Scale Image
Classification", ECCV 2010; stacked by Simonyan, Vedaldi, Zisserman, NIPS 2013.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError

__all__ = ["FisherVector", "Mixture", "Sums", "fisher_vector", "fit_mixture", "normalized"]

EPSILON = 1e-8  # under the square root in training, whose gradient at 0 is infinite otherwise
FLOOR, RELATIVE_FLOOR = 1e-6, 0.01  # of variances: of the mean variance, and of each feature's own
LEAST_WEIGHT = 1e-8


class Mixture(NamedTuple):
    """Gaussian mixture with diagonal variances."""

    logits: Tensor  # (components,), their softmax are the weights
    means: Tensor  # (components, dim)
    log_sigma: Tensor  # (components, dim), logarithms of the standard deviations


class Sums(NamedTuple):
    """Moments of descriptors under posteriors."""

    total: Tensor  # (..., components), sum of q
    first: Tensor  # (..., components, dim), sum of q x
    second: Tensor  # (..., components, dim), sum of q x^2


def log_joint(descriptors: Tensor, mixture: Mixture) -> Tensor:
    """Compute log(weight · density), (..., descriptors, components)."""
    logits, means, log_sigma = mixture
    centre = means.mean(0)  # differences of large numbers lose digits
    x, means = descriptors - centre, means - centre
    precision = (-2 * log_sigma).exp()
    square = x.square() @ precision.T - 2 * x @ (means * precision).T
    square = square + (means.square() * precision).sum(1)
    constant = log_sigma.sum(1) + means.shape[1] * math.log(2 * math.pi) / 2
    return logits.log_softmax(0) - constant - square / 2


def sums_of(descriptors: Tensor, posteriors: Tensor) -> Sums:
    """Sum descriptors (..., descriptors, dim) under posteriors (..., descriptors, components)."""
    weights = posteriors.transpose(-1, -2)
    return Sums(posteriors.sum(-2), weights @ descriptors, weights @ descriptors.square())


def fisher_vector(sums: Sums, mixture: Mixture, number: int | Tensor) -> Tensor:
    """Compute the Fisher vector without normalisation, (..., 2 · components · dim).

    Means come first, component by component, then variances.

    Args:
        sums: Moments of the descriptors.
        mixture: The mixture.
        number: Descriptors in the sums (N).
    """
    weights, sigma = mixture.logits.softmax(0)[:, None], mixture.log_sigma.exp()
    means, count = mixture.means, sums.total[..., None]
    first = (sums.first - means * count) / (number * sigma * weights.sqrt())
    spread = sums.second - 2 * means * sums.first + (means.square() - sigma.square()) * count
    second = spread / (number * sigma.square() * (2 * weights).sqrt())
    return torch.cat([first.flatten(-2), second.flatten(-2)], dim=-1)


def normalized(vectors: Tensor, epsilon: float = 0.0) -> Tensor:
    """Take signed square roots, and divide by the length, (..., features)."""
    roots = vectors.sign() * ((vectors.abs() + epsilon).sqrt() - epsilon**0.5)
    return F.normalize(roots, dim=-1)


def fit_mixture(
    descriptors: Tensor, components: int, steps: int = 30, generator: torch.Generator | None = None
) -> tuple[Mixture, list[float]]:
    """Fit a mixture by k-means++ and expectation maximisation.

    Args:
        descriptors: (descriptors, dim).
        components: Components of the mixture.
        steps: Steps of expectation maximisation.
        generator: Source of the initial means.

    Returns:
        The mixture, and the mean log-likelihood before each step and after the last.

    Raises:
        UsageError: Fewer descriptors than components, or values that are no numbers.
    """
    if len(descriptors) < components:
        raise UsageError(f"{len(descriptors)} descriptors are too few for {components} components")
    if not bool(descriptors.isfinite().all()):
        raise UsageError("descriptors must be finite numbers")
    variance = descriptors.var(0, unbiased=False)
    floor = (RELATIVE_FLOOR * variance).clamp(min=FLOOR * float(variance.mean()) + 1e-12)
    means = _spread_out(descriptors, components, generator)
    spread = variance.clamp(min=1e-12).expand(components, -1).maximum(floor)
    mixture = Mixture(descriptors.new_zeros(components), means, spread.log() / 2)
    found = []
    for _ in range(steps):
        joint = log_joint(descriptors, mixture)
        found.append(joint.logsumexp(1).mean().item())
        mixture = _maximized(sums_of(descriptors, joint.softmax(1)), floor)
    found.append(log_joint(descriptors, mixture).logsumexp(1).mean().item())
    return mixture, found


def _maximized(sums: Sums, floor: Tensor) -> Mixture:
    weights = (sums.total / sums.total.sum()).clamp(min=LEAST_WEIGHT)
    count = sums.total.clamp(min=LEAST_WEIGHT)[:, None]
    means = sums.first / count
    variances = (sums.second / count - means.square()).maximum(floor)
    return Mixture(weights.log(), means, variances.log() / 2)


def _spread_out(descriptors: Tensor, components: int, generator: torch.Generator | None) -> Tensor:
    """Draw initial means far from each other (k-means++)."""
    chosen = int(torch.randint(len(descriptors), (), generator=generator))
    means = [descriptors[chosen]]
    nearest = (descriptors - means[0]).square().sum(1)
    for _ in range(components - 1):
        left = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        chosen = int(torch.multinomial(left, 1, generator=generator))
        means.append(descriptors[chosen])
        nearest = nearest.minimum((descriptors - means[-1]).square().sum(1))
    return torch.stack(means)


class FisherVector(nn.Module):
    """Pooling of a set of descriptors, or of a feature map, to its Fisher vector.

    Args:
        dim: Features of a descriptor.
        components: Components of the mixture.
        normalize: Take signed square roots, then divide by the length.
        trainable: Train the mixture, too.

    Example:
        >>> import torch
        >>> from smallfry.layers.fisher_vector import FisherVector
        >>> pool = FisherVector(dim=16, components=4)
        >>> pool.fit(torch.randn(500, 16))
        >>> pool(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self, dim: int, components: int, normalize: bool = True, trainable: bool = True
    ) -> None:
        super().__init__()
        if dim < 1 or components < 1:
            raise ValueError(f"dim and components must be at least 1, not {dim} and {components}")
        self.dim, self.normalize = dim, normalize
        self.num_features = 2 * components * dim
        self.logits = nn.Parameter(torch.zeros(components), requires_grad=trainable)
        self.means = nn.Parameter(torch.randn(components, dim), requires_grad=trainable)
        self.log_sigma = nn.Parameter(torch.zeros(components, dim), requires_grad=trainable)

    @property
    def mixture(self) -> Mixture:
        """Parameters of the mixture."""
        return Mixture(self.logits, self.means, self.log_sigma)

    @torch.no_grad()
    def fit(
        self, descriptors: Tensor, steps: int = 30, generator: torch.Generator | None = None
    ) -> None:
        """Fit the mixture to descriptors (descriptors, dim); raises as ``fit_mixture``."""
        found, _ = fit_mixture(descriptors.to(self.means), len(self.means), steps, generator)
        for own, fitted in zip(self.mixture, found, strict=True):
            own.copy_(fitted)

    def forward(self, descriptors: Tensor) -> Tensor:
        """Pool descriptors (batch, descriptors, dim), or maps (batch, dim, height, width).

        Returns:
            (batch, 2 · components · dim).
        """
        if descriptors.ndim == 4:
            descriptors = descriptors.flatten(2).transpose(1, 2)
        if descriptors.ndim != 3 or descriptors.shape[-1] != self.dim:
            raise ValueError(
                f"expected descriptors of {self.dim} features, (batch, descriptors, {self.dim}) or "
                f"(batch, {self.dim}, height, width), got {tuple(descriptors.shape)}"
            )
        posteriors = log_joint(descriptors, self.mixture).softmax(-1)
        sums = sums_of(descriptors, posteriors)
        vectors = fisher_vector(sums, self.mixture, descriptors.shape[1])
        return normalized(vectors, EPSILON if self.training else 0.0) if self.normalize else vectors
