"""Scores of classifiers are those of torchmetrics, without its import."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from smallfry.tasks.classification import Classification
from smallfry.tasks.scores import BINS, accuracy, calibration_error

SIZES = st.tuples(st.integers(1, 400), st.integers(2, 12), st.integers(0, 10**6))


def drawn(images, classes, seed, sharpness=1.0):
    random = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(images, classes, generator=random)
    return logits, torch.randint(classes, (images,), generator=random)


@given(SIZES, st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_scores_are_those_of_torchmetrics_to_the_bit(sizes, sharpness):
    logits, labels = drawn(*sizes, sharpness)
    classes = sizes[1]
    probabilities = logits.softmax(1)
    wanted = multiclass_accuracy(logits, labels, classes, average="micro").item()
    assert accuracy(logits.argmax(1), labels) == wanted
    if float(probabilities.max()) <= 1:  # above it, torchmetrics takes them for logits
        expected = multiclass_calibration_error(probabilities, labels, classes, n_bins=BINS).item()
        assert calibration_error(probabilities, labels) == expected


@pytest.mark.parametrize(
    ("confidence", "right", "error"),
    [
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [True, False], 0.5),
        ([0.75, 0.75, 0.75, 0.75], [True, True, True, False], 0.0),
        ([0.6, 0.9], [False, True], (0.6 + 0.1) / 2),
        ([0.62, 0.64], [True, False], 0.13),  # of one bin: |0.5 - 0.63|
    ],
)
def test_the_error_is_that_of_its_definition(confidence, right, error):
    share = torch.tensor(confidence)
    probabilities = torch.stack([share, 1 - share], dim=1)
    labels = torch.tensor([0 if each else 1 for each in right])
    assert calibration_error(probabilities, labels) == pytest.approx(error, abs=1e-6)


@given(SIZES)
def test_the_error_is_a_share_and_does_not_depend_on_the_order(sizes):
    logits, labels = drawn(*sizes)
    probabilities = logits.softmax(1)
    found = calibration_error(probabilities, labels)
    assert 0 <= found <= 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert calibration_error(probabilities[order], labels[order]) == pytest.approx(found, abs=1e-5)


def test_a_certainty_of_one_has_a_bin_of_its_own():
    """As rounding may leave a probability of exactly 1, of images that are wrong."""
    probabilities = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(probabilities, torch.tensor([1, 1, 1, 1])) == 1.0
    assert calibration_error(probabilities, torch.tensor([0, 0, 0, 0])) == 0.0


def test_half_precision_is_scored_in_float32():
    logits, labels = drawn(200, 5, 0)
    half = logits.softmax(1).to(torch.bfloat16)
    assert calibration_error(half, labels) == calibration_error(half.float(), labels)


def test_a_split_has_its_four_scores():
    logits, labels = drawn(300, 4, 1)
    scores = Classification().metrics(logits, labels)
    assert {*scores} == {"loss", "accuracy", "macro_f1", "calibration_error"}
    assert scores["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    expected = -logits.double().log_softmax(1)[torch.arange(300), labels].mean().item()
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert all(math.isfinite(score) for score in scores.values())


def test_epochs_are_ranked_by_accuracy_then_by_loss():
    task = Classification()
    better, worse = {"accuracy": 0.9, "loss": 2.0}, {"accuracy": 0.8, "loss": 0.1}
    assert task.rank(better) > task.rank(worse)
    assert task.rank({**better, "loss": 1.0}) > task.rank(better)


def test_predictions_are_probabilities_of_each_class():
    logits, _ = drawn(3, 4, 2)
    found = Classification().decode(logits)
    assert len(found) == 3
    assert found[0] == pytest.approx(logits.softmax(1)[0].tolist())
    assert all(sum(shares) == pytest.approx(1) for shares in found)


def test_evaluation_begins_without_packages_that_it_does_not_need():
    """Each takes a second or two of every start of evaluate, predict and export."""
    script = (
        "import sys, smallfry.training.evaluation, smallfry.deploy.pretrained;"
        "slow = {'torchmetrics', 'lightning', 'matplotlib', 'scipy', 'transformers'};"
        "print(slow & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
