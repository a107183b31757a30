"""Reference accuracies of classical methods on the same images."""

import math
import time
from typing import Any

from torch import Tensor

from smallfry.data import ImageData, Split

MOST_VALUES = 2_000_000  # training pixels in all; beyond that a kernel machine takes minutes
MOST_CLASSES = 200  # a support vector machine has a problem for each pair


def fit_references(data: ImageData) -> list[dict[str, Any]]:
    """Measure the test accuracy of classical classifiers fitted on a data set.

    scikit-learn's default settings, pixels scaled to 0 to 1; nothing is tuned. An empty list if
    the images are too many or too large, or the classes too many.
    """
    if len(data.classes) > MOST_CLASSES:
        return []
    if len(data.train) * math.prod(data.input_shape) > MOST_VALUES:
        return []
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    classifiers = {
        "RBF support vector machine": SVC(),
        "logistic regression": LogisticRegression(max_iter=1000),
    }
    results = []
    for name, classifier in classifiers.items():
        started = time.monotonic()
        classifier.fit(_rows(data.train), data.train.labels.numpy())
        seconds = time.monotonic() - started
        accuracy = float(classifier.score(_rows(data.test), data.test.labels.numpy()))
        results.append({"name": name, "test_accuracy": accuracy, "fit_seconds": round(seconds, 3)})
    return results


def _rows(split: Split) -> Any:
    images: Tensor = split.images
    return (images.flatten(1).float() / 255).numpy()
