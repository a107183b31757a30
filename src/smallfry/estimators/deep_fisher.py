"""Deep Fisher Networks: one or two layers of Fisher vectors, as a scikit-learn classifier.

There is no back-propagation through images. Descriptors are whitened patches with their positions.
The first layer pools them over the whole image and its quarters. For two layers, Fisher vectors of
local windows are projected by a low-rank classifier of their mean, 2×2 neighbours are stacked,
whitened and pooled by a second mixture; both poolings are the features of a linear support vector
machine.

Source: Simonyan, Vedaldi, Zisserman, "Deep Fisher Networks for Large-Scale Image Classification",
NIPS 2013; sizes for small images are ours.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.svm import LinearSVC
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.estimators.fisher_pipeline import FisherModule, FisherPipeline, Whitening
from smallfry.layers.fisher_vector import fit_mixture
from smallfry.settings import fitted

__all__ = ["DeepFisherNet"]

SAMPLE = 50_000  # descriptors that a mixture or a whitening is fitted to
WHITEN = 0.1  # added to eigenvalues


class DeepFisherNet(
    FisherPipeline,
    ClassifierMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """Classifier of images by one or two layers of Fisher vectors.

    A table is taken, too: a row is one descriptor, and there is one layer.

    Args:
        layers: 1 or 2 layers of Fisher vectors.
        components: Components of the mixture of each layer.
        patch: Side of a descriptor's patch in pixels.
        patch_features: Features that patches are whitened to.
        window: Side of the local windows of the first of two layers, in descriptors.
        projected: Features of the supervised projection of a window's vector (h).
        stacked: Features that 2×2 neighbours are whitened to.
        epochs: Passes over the images in learning the projection.
        C: Inverse regularisation of the support vector machine.
        batch_size: Images at a time.
        random_state: Seed of all random choices.
    """

    def __init__(
        self,
        layers: int = 1,
        components: tuple[int, int] = (16, 64),
        patch: int = 6,
        patch_features: int = 32,
        window: int = 9,
        projected: int = 64,
        stacked: int = 64,
        epochs: int = 20,
        C: float = 10.0,
        batch_size: int = 100,
        random_state: int | None = None,
    ) -> None:
        self.layers = layers
        self.components = components
        self.patch = patch
        self.patch_features = patch_features
        self.window = window
        self.projected = projected
        self.stacked = stacked
        self.epochs = epochs
        self.C = C
        self.batch_size = batch_size
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to images (images, channels, height, width), 0 to 255, or a table, with classes.

        Raises:
            ValueError: Arrays of another form, or one class.
            UsageError: Images smaller than the patches, or settings that do not fit.
        """
        X, y = validate_data(self, X, y, allow_nd=True, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"DeepFisherNet needs two classes, got {len(self.classes_)} class")
        if self.layers not in (1, 2) or (self.layers == 2 and X.ndim == 2):
            raise UsageError(f"layers is 1 or 2, and 1 for tables, not {self.layers}")
        self._require_positive()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._shape = X.shape[1:]
        generator = torch.Generator().manual_seed(seed)
        self._whitening = None
        if X.ndim == 2:
            deviation = X.std(0).clip(1e-6)
            self._scale = (torch.from_numpy(X.mean(0)), torch.from_numpy(deviation))
        else:
            if X.ndim != 4 or min(X.shape[2:]) < self.patch:
                raise UsageError(
                    f"images are (images, channels, height, width) with sides of {self.patch} "
                    f"pixels at least, got {X.shape}"
                )
            rows = self._sampled(X, self._patches, generator)
            self._whitening = _whitening(rows, self.patch_features)
        sample = self._sampled(X, self._descriptors, generator)
        self._first = fit_mixture(sample, min(self.components[0], len(sample)), 20, generator)[0]
        if self.layers == 2:
            self._fit_second(X, torch.from_numpy(labels), generator)
        features = self._features(X)
        self._svm = LinearSVC(C=self.C, random_state=seed).fit(features, labels)
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Compute the Fisher vectors of images, (images, features)."""
        return self._features(self._validated(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict the classes of images, (images,)."""
        features = self._features(self._validated(X))
        found: NDArray[Any] = self.classes_[self._svm.predict(features)]
        return found

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Compute the support vector machine's scores, (images, classes) or (images,) of two."""
        features = self._features(self._validated(X))
        scores: NDArray[np.float64] = self._svm.decision_function(features)
        return scores

    def to_module(self) -> FisherModule:
        """Return the fitted network as a frozen module of images from 0 to 255, in timm's manner.

        Raises:
            UsageError: It was fitted to a table.
        """
        check_is_fitted(self, "_svm")
        if self._whitening is None:
            raise UsageError("to_module is of networks of images, and this one had a table")
        weight, bias = (torch.from_numpy(each) for each in (self._svm.coef_, self._svm.intercept_))
        if len(weight) == 1:  # one score of two classes
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        return FisherModule(self, weight.float(), bias.float(), self._shape)

    def _validated(self, X: Any) -> NDArray[np.float32]:
        check_is_fitted(self, "_svm")
        X = validate_data(self, X, reset=False, allow_nd=True, dtype=np.float32)
        if X.shape[1:] != self._shape:
            raise ValueError(f"X has images of {X.shape[1:]}, and the fit had {self._shape}")
        found: NDArray[np.float32] = X
        return found

    def _require_positive(self) -> None:
        components = fitted(self.components, tuple[int, int], "components")
        names = ("patch", "patch_features", "window", "projected", "stacked", "batch_size")
        settings = {name: getattr(self, name) for name in names}
        for name, value in (settings | {"components": min(components)}).items():
            if fitted(value, int, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if fitted(self.epochs, int, "epochs") < 0 or not fitted(self.C, float, "C") > 0:
            raise UsageError(f"epochs can't be negative, and C is above 0: {self.epochs}, {self.C}")

    # Descriptors

    def _batches(self, X: NDArray[np.float32]) -> Iterator[Tensor]:
        for start in range(0, len(X), self.batch_size):
            yield torch.from_numpy(np.ascontiguousarray(X[start : start + self.batch_size]))

    def _sampled(
        self,
        X: NDArray[np.float32],
        extract: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Sample descriptors of all images, at most ``SAMPLE``."""
        each = max(1, SAMPLE // len(X))
        found = []
        for images in self._batches(X):
            rows = extract(images)
            places = torch.randint(rows.shape[1], (len(rows), each), generator=generator)
            if rows.shape[1] > each:
                rows = rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))
            found.append(rows.flatten(0, 1))
        return torch.cat(found)[:SAMPLE]

    # Features

    @torch.no_grad()
    def _features(self, X: NDArray[np.float32]) -> NDArray[np.float32]:
        found = [self._vectors(images).numpy() for images in self._batches(X)]
        features: NDArray[np.float32] = np.concatenate(found)
        return features

    # The second layer

    def _fit_second(
        self, X: NDArray[np.float32], labels: Tensor, generator: torch.Generator
    ) -> None:
        def means(images: Tensor) -> Tensor:
            rows = self._descriptors(images)
            return self._windows(rows, *self._grid(images))[0].mean(1)

        def stacked(images: Tensor) -> Tensor:
            return self._stack(self._descriptors(images), *self._grid(images))[0]

        pooled = torch.cat([means(images) for images in self._batches(X)])
        self._projection = _projection(pooled, labels, self.projected, self.epochs, generator)
        self._stacking = None
        self._stacking = _whitening(self._sampled(X, stacked, generator), self.stacked)
        sample = self._sampled(X, stacked, generator)
        self._second = fit_mixture(sample, self.components[1], 20, generator)[0]


def _whitening(rows: Tensor, kept: int) -> Whitening:
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((rows - mean).T).view(rows.shape[1], -1))
    kept = min(kept, len(values))
    basis = vectors[:, -kept:] / (values[-kept:].clamp(min=0) + WHITEN).sqrt()
    return Whitening(mean, basis)


def _projection(
    means: Tensor, labels: Tensor, rank: int, epochs: int, generator: torch.Generator
) -> Tensor:
    """Learn a low-rank linear classifier of images, and return its first factor."""
    classes, width = int(labels.max()) + 1, means.shape[1]
    inner: Tensor = (torch.randn(rank, width, generator=generator) / width**0.5).requires_grad_()
    outer: Tensor = (torch.randn(classes, rank, generator=generator) / rank**0.5).requires_grad_()
    optimizer = torch.optim.Adam([inner, outer], lr=1e-2, weight_decay=1e-4)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(means), generator=generator), 100):
                logits = means[rows] @ inner.T @ outer.T
                loss = F.cross_entropy(logits, labels[rows])
                inner.grad, outer.grad = torch.autograd.grad(loss, [inner, outer])
                optimizer.step()
    return inner.detach()
