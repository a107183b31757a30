"""Gaussian-process regression in one dimension with an RBF kernel.

    k(x, x') = s² exp(−(x − x')² / 2ℓ²);   mean(x) = k(x)ᵀ (K + σ²I)⁻¹ y

The scale s, the length ℓ and the noise σ maximise the marginal likelihood: a coarse grid, then
Nelder and Mead's simplex. Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["GaussianProcess", "fit_gaussian_process", "minimize"]

Array = NDArray[np.float64]
LEAST_NOISE = 1e-4  # in standard deviations of the outputs


class GaussianProcess(NamedTuple):
    """Fitted regression."""

    x: Array
    weights: Array  # (K + σ²I)⁻¹ y
    inverse: Array  # (K + σ²I)⁻¹
    hyperparameters: Array  # logarithms of s, ℓ and σ
    mean: float  # of the outputs
    deviation: float

    def __call__(self, x: float) -> tuple[float, float]:
        """Predict the value at a point, and its standard deviation without noise."""
        scale = np.exp(self.hyperparameters[0])
        row = _kernel(np.array([x]), self.x, self.hyperparameters)[0]
        variance = max(0.0, float(scale**2 - row @ self.inverse @ row))
        value = float(row @ self.weights) * self.deviation + self.mean
        return value, variance**0.5 * self.deviation


def fit_gaussian_process(x: Array, y: Array) -> GaussianProcess:
    """Fit a Gaussian process to values y at points x, both (points,)."""
    mean, deviation = float(y.mean()), float(y.std()) or 1.0
    outputs, spread = (y - mean) / deviation, float(np.ptp(x)) or 1.0

    def loss(hyperparameters: Array) -> float:
        return _negative_log_likelihood(x, outputs, hyperparameters)

    grid = product((0.5, 1.0, 2.0), (0.1, 0.3, 1.0, 3.0), (0.01, 0.1, 0.5))
    starts: list[Array] = [np.log([s, length * spread, noise]) for s, length, noise in grid]
    best: Array = minimize(loss, min(starts, key=loss))
    covariance = _covariance(x, best)
    inverse = np.asarray(np.linalg.inv(covariance), np.float64)
    return GaussianProcess(x, inverse @ outputs, inverse, best, mean, deviation)


def minimize(function: Callable[[Array], float], start: Array, iterations: int = 200) -> Array:
    """Minimise a function of a few variables by the simplex of Nelder and Mead."""
    points = [start, *(start + 0.3 * row for row in np.eye(len(start)))]
    simplex = sorted(((function(p), p) for p in points), key=lambda pair: pair[0])
    for _ in range(iterations):
        worst, at = simplex[-1]
        middle = np.mean([p for _, p in simplex[:-1]], axis=0)

        def tried(factor: float, at: Array = at, middle: Array = middle) -> tuple[float, Array]:
            point = middle + factor * (at - middle)
            return function(point), point

        new = tried(-1.0)
        if new[0] < simplex[0][0]:
            new = min(new, tried(-2.0), key=lambda pair: pair[0])
        elif new[0] >= simplex[-2][0]:
            new = tried(0.5)
        if new[0] < worst:
            simplex[-1] = new
        else:
            lowest = simplex[0][1]
            shrunk = [lowest + 0.5 * (p - lowest) for _, p in simplex]
            simplex = [(function(p), p) for p in shrunk]
        simplex.sort(key=lambda pair: pair[0])
    return simplex[0][1]


def _kernel(a: Array, b: Array, hyperparameters: Array) -> Array:
    scale, length = np.exp(hyperparameters[:2])
    found: Array = scale**2 * np.exp(-((a[:, None] - b) ** 2) / (2 * length**2))
    return found


def _covariance(x: Array, hyperparameters: Array) -> Array:
    noise = max(LEAST_NOISE, float(np.exp(hyperparameters[2])))
    return _kernel(x, x, hyperparameters) + noise**2 * np.eye(len(x))


def _negative_log_likelihood(x: Array, y: Array, hyperparameters: Array) -> float:
    if np.abs(hyperparameters).max() > 10:
        return np.inf
    sign, logarithm = np.linalg.slogdet(_covariance(x, hyperparameters))
    if sign <= 0:
        return np.inf
    return float(y @ np.linalg.solve(_covariance(x, hyperparameters), y) + logarithm) / 2
