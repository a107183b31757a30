"""Deep Fisher Networks are estimators of scikit-learn, and learn more than plain pooling does."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import estimator_checks_generator

from smallfry.errors import UsageError
from smallfry.estimators.deep_fisher import DeepFisherNet

SMALL = {"components": (8, 8), "patch": 3, "patch_features": 8, "window": 3, "projected": 16}


@pytest.fixture(scope="module")
def digits():
    images = load_digits().images[:900, None].astype(np.float32) * 16
    return images, load_digits().target[:900]


def faults():
    found = []
    for estimator, check in estimator_checks_generator(DeepFisherNet(components=(4, 4))):
        try:
            check(estimator)
        except Exception as error:
            name = getattr(check, "func", check).__name__
            if type(error).__name__ != "SkipTest":
                found.append(f"{name}: {str(error).splitlines()[:1]}")
    return found


@pytest.mark.slow
def test_it_passes_scikit_learns_checks():
    assert faults() == []


def test_fisher_vectors_beat_averages_of_the_same_patches(digits):
    images, labels = digits
    train, test = slice(0, 600), slice(600, None)
    model = DeepFisherNet(random_state=0, **SMALL).fit(images[train], labels[train])
    accuracy = model.score(images[test], labels[test])
    windows = np.lib.stride_tricks.sliding_window_view(images[:, 0], (3, 3), axis=(1, 2))
    patches = windows.reshape(len(images), -1, 9)
    patches = patches - patches.mean(-1, keepdims=True)
    averages = np.concatenate([patches.mean(1), np.abs(patches).mean(1)], axis=1) / 100
    plain = LinearSVC(C=10.0).fit(averages[train], labels[train])
    assert accuracy > 0.9
    assert accuracy > plain.score(averages[test], labels[test]) + 0.05


def test_two_layers_are_seeded_and_independent_of_the_batch(digits):
    images, labels = digits[0][:120], digits[1][:120]
    model = DeepFisherNet(layers=2, random_state=0, stacked=8, epochs=3, **SMALL)
    found = model.fit(images, labels).transform(images)
    shallow = clone(model).set_params(layers=1).fit(images, labels).transform(images)
    assert found.shape[1] == shallow.shape[1] + 2 * 8 * (8 + 2)
    np.testing.assert_allclose(found[:, : shallow.shape[1]], shallow, atol=1e-5)
    again = clone(model).fit(images, labels)
    np.testing.assert_array_equal(again.transform(images), found)
    again.batch_size = 7
    np.testing.assert_allclose(again.transform(images), found, atol=1e-4)
    assert model.decision_function(images).shape == (120, 10)
    assert model.score(images, labels) > 0.9
    norms = np.linalg.norm(found[:, : shallow.shape[1]], axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def test_what_does_not_fit_is_refused(digits):
    images, labels = digits[0][:40], digits[1][:40]
    for settings, said in (
        ({"layers": 3}, "layers is 1 or 2"),
        ({"patch": 9}, "sides of 9 pixels"),
    ):
        with pytest.raises(UsageError, match=said):
            DeepFisherNet(**SMALL | settings).fit(images, labels)
    with pytest.raises(UsageError, match="windows of 6 leave no neighbours in 6×6"):
        DeepFisherNet(layers=2, **SMALL | {"window": 6}).fit(images, labels)
    with pytest.raises(UsageError, match="1 for tables"):
        DeepFisherNet(layers=2).fit(images.reshape(40, -1), labels)
    model = DeepFisherNet(**SMALL).fit(images, labels)
    with pytest.raises(ValueError, match="X has images of"):
        model.predict(np.zeros((2, 1, 9, 9)))
