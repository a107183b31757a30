"""Infinitely wide networks of any depth, as a scikit-learn classifier.

It solves kernel regression with the neural tangent kernel of ``layers.hermite.deep_kernel``, whose
limit with depth is a vote of the training samples. Rows are centred, divided by their root mean
square norm, and mapped to the upper half of a sphere, x → (x, 1) over its norm, so that no two are
opposite. Columns of different units should be scaled before.

Source: Radhakrishnan, Belkin, Uhler, "Wide and deep neural networks achieve consistency for
classification", PNAS 2023, arXiv 2204.14126; the map to the sphere is our own.
"""

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from smallfry.errors import UsageError
from smallfry.layers.hermite import Dual, deep_kernel, dual, optimal_coefficients, relu_dual
from smallfry.settings import fitted

__all__ = ["DeepKernelClassifier"]

Array = NDArray[np.float64]


class DeepKernelClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifier by an infinitely wide network, for small tables.

    Args:
        activation: ``optimal``, which is consistent in the limit of depth, or ``relu``, which
            becomes a majority vote; or Hermite coefficients.
        depth: Hidden layers.
        dimension: Dimension that the optimal activation is made for; default the number of
            features.
        ridge: Added to the kernel's diagonal, which is 1.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> DeepKernelClassifier(depth=5).fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.9
        True
    """

    def __init__(
        self,
        activation: Literal["optimal", "relu"] | tuple[float, ...] = "optimal",
        depth: int = 5,
        dimension: int | None = None,
        ridge: float = 1e-8,
    ) -> None:
        self.activation = activation
        self.depth = depth
        self.dimension = dimension
        self.ridge = ridge

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to a table (samples, features) with classes; memory grows as samples squared.

        Raises:
            ValueError: Arrays of another form, or one class.
            UsageError: A negative depth or ridge, or an unknown activation.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"DeepKernelClassifier needs two classes, got {len(self.classes_)} class"
            )
        fitted(self.dimension, int | None, "dimension")
        depth, ridge = fitted(self.depth, int, "depth"), fitted(self.ridge, float, "ridge")
        if not (depth >= 0 and ridge >= 0):
            raise UsageError("depth and ridge can't be negative")
        self._dual = self._function(X.shape[1])
        size = float(np.sqrt(X.var(0).sum()))
        self._scale = (X.mean(0), size or 1.0)
        self._points = self._on_sphere(X)
        kernel = deep_kernel(self._points @ self._points.T, self._dual, self.depth)
        np.fill_diagonal(kernel, 1 + self.ridge)
        targets = 2.0 * np.eye(len(self.classes_))[labels] - 1
        self._votes = np.linalg.lstsq(kernel, targets, rcond=None)[0]
        return self

    def decision_function(self, X: Any) -> Array:
        """Compute scores, (samples, classes), or (samples,) of the second of two classes."""
        check_is_fitted(self, "_votes")
        X = validate_data(self, X, reset=False, dtype=np.float64)
        similarity = self._on_sphere(X) @ self._points.T
        kernel = deep_kernel(similarity, self._dual, self.depth)
        lost = np.flatnonzero(~kernel.any(axis=1))  # too small for float64: the nearest decides
        kernel[lost, similarity[lost].argmax(axis=1)] = 1
        scores: Array = kernel @ self._votes
        return scores[:, 1] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict classes, (samples,)."""
        scores = self.decision_function(X)
        chosen = scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(int)
        found: NDArray[Any] = self.classes_[chosen]
        return found

    def _function(self, features: int) -> Dual:
        if isinstance(self.activation, str):
            if self.activation == "relu":
                return relu_dual()
            if self.activation != "optimal":
                raise UsageError(
                    f"activation is optimal, relu or coefficients, not '{self.activation}'"
                )
            dimension = features if self.dimension is None else self.dimension
            return dual(optimal_coefficients(dimension))
        try:
            coefficients = np.array(self.activation, dtype=np.float64)
        except (TypeError, ValueError):
            coefficients = np.zeros(0)
        if coefficients.ndim != 1 or not coefficients.any() or not np.isfinite(coefficients).all():
            raise UsageError("activation needs finite coefficients, and one other than 0")
        return dual(coefficients / np.linalg.norm(coefficients))

    def _on_sphere(self, X: Array) -> Array:
        mean, size = self._scale
        rows = (X - mean) / size
        rows = np.column_stack([rows, np.ones(len(rows))])
        found: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return found
