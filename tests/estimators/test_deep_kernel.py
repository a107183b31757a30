"""The deep kernel classifier is an estimator of scikit-learn, and learns by its activation."""

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.utils.estimator_checks import estimator_checks_generator

from smallfry.errors import UsageError
from smallfry.estimators.deep_kernel import DeepKernelClassifier


@pytest.mark.slow
def test_it_passes_the_checks_of_scikit_learn():
    faults = []
    for estimator, check in estimator_checks_generator(DeepKernelClassifier()):
        try:
            check(estimator)
        except Exception as error:
            if type(error).__name__ != "SkipTest":
                name = getattr(check, "func", check).__name__
                faults.append(f"{name}: {str(error).splitlines()[:1]}")
    assert faults == []


def test_it_classifies_digits_from_few_images():
    X, y = load_digits(return_X_y=True)
    X, y = X[:700], y[:700]
    model = DeepKernelClassifier().fit(X[:500], y[:500])
    assert model.score(X[500:], y[500:]) > 0.9
    assert model.decision_function(X[500:]).shape == (200, 10)
    np.testing.assert_array_equal(model.predict(X[:500]), y[:500])


def test_depth_turns_relu_into_a_majority_vote():
    X, y = load_iris(return_X_y=True)
    X, y = X[:100], y[:100] == 1
    some = np.r_[0:40, 50:70]  # 40 of one class and 20 of the other
    rest = np.setdiff1d(np.arange(100), some)
    shallow = DeepKernelClassifier("relu", depth=2).fit(X[some], y[some])
    assert shallow.score(X[rest], y[rest]) > 0.95
    assert shallow.decision_function(X[rest]).shape == (40,)
    draw = np.random.default_rng(0)
    points, far = draw.normal(size=(60, 3)), draw.normal(size=(200, 3))
    labels = np.arange(60) < 40
    shares = [
        DeepKernelClassifier("relu", depth=depth).fit(points, labels).predict(far).mean()
        for depth in (2, 1000)
    ]
    assert shares[0] < 0.9 < 0.97 < shares[1]


def test_an_activation_without_linear_part_is_a_nearest_neighbour():
    X, y = load_iris(return_X_y=True)
    model = DeepKernelClassifier((0.0, 0.0, 1.0, 1.0), depth=20).fit(X[::2], y[::2])
    shown = model._on_sphere(X[1::2]) @ model._points.T
    assert (model.predict(X[1::2]) == y[::2][shown.argmax(1)]).mean() > 0.95


def test_wrong_settings_are_refused():
    X, y = load_iris(return_X_y=True)
    with pytest.raises(UsageError, match="can't be negative"):
        DeepKernelClassifier(depth=-1).fit(X, y)
    with pytest.raises(UsageError, match="optimal, relu or coefficients, not 'tanh'"):
        DeepKernelClassifier("tanh").fit(X, y)
    with pytest.raises(UsageError, match="other than 0"):
        DeepKernelClassifier((0.0, 0.0)).fit(X, y)
    with pytest.raises(ValueError, match="got 1 class"):
        DeepKernelClassifier().fit(X[:9], y[:9])
